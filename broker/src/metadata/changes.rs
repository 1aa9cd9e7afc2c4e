//! What happened between two states: who leads now, who came in sync and who left. Pure; for logs and metrics.
//!
//! Topics that nobody changed cost nothing.
//!
//! Owns: the count. Refuses: to judge.

use super::state::{MetadataState, NO_LEADER, Partition, TopicSince};

/// What happened to partitions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Partitions that another broker leads now.
    pub new_leaders: usize,
    /// Those of them that `me` leads.
    pub led_by_me: usize,
    /// Partitions that nobody leads any more.
    pub without_leader: usize,
    /// Partitions led by `me` of which a replica left the in-sync replicas.
    pub shrunk: usize,
    /// Partitions led by `me` of which a replica came in sync.
    pub expanded: usize,
    /// Leaders that may miss acknowledged records.
    pub unclean: Vec<Unclean>,
}

/// A leader that may miss acknowledged records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unclean {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: usize,
    /// Who leads it now.
    pub leader: i32,
}

/// What happened from one state to a later one, as broker `me` counts it.
pub fn changes(before: &MetadataState, after: &MetadataState, me: i32) -> Changes {
    let mut changes = Changes::default();
    for TopicSince { before, now } in after.topics_since(before) {
        let Some((known, topic)) = before.zip(now).filter(|(known, topic)| known.id == topic.id) else { continue };
        for (number, (was, is)) in known.partitions.iter().zip(&topic.partitions).enumerate() {
            if was.partition_epoch != is.partition_epoch {
                changes.count(was, is, me);
            }
            if is.unclean_recoveries > was.unclean_recoveries {
                changes.unclean.push(Unclean { topic: topic.name.clone(), partition: number, leader: is.leader });
            }
        }
    }
    changes
}

impl Changes {
    fn count(&mut self, was: &Partition, is: &Partition, me: i32) {
        if was.leader != is.leader {
            match is.leader {
                NO_LEADER => self.without_leader += 1,
                leader => {
                    self.new_leaders += 1;
                    self.led_by_me += usize::from(leader == me);
                }
            }
        }
        if is.leader == me {
            self.shrunk += usize::from(was.isr.iter().any(|broker| !is.isr.contains(broker)));
            self.expanded += usize::from(is.isr.iter().any(|broker| !was.isr.contains(broker)));
        }
    }
}

/// How partitions are now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Led by `me`, with a replica that is not in sync.
    pub under_replicated: usize,
    /// Led by `me`, with fewer in-sync replicas than min.insync.replicas.
    pub under_min_isr: usize,
    /// Led by `me`, with just as many.
    pub at_min_isr: usize,
    /// Led by `me`, and moving.
    pub reassigning: usize,
    /// Led by `me`.
    pub led: usize,
    /// Led by nobody, in the whole cluster.
    pub offline: usize,
    /// Replicas that a disk fenced, in the whole cluster.
    pub fenced_replicas: usize,
}

/// How partitions are, as broker `me` counts them.
pub fn standing(state: &MetadataState, me: i32) -> Standing {
    let mut now = Standing::default();
    for topic in state.topics() {
        let needed = topic.min_insync_replicas() as usize;
        for partition in &topic.partitions {
            now.offline += usize::from(partition.leader == NO_LEADER);
            now.fenced_replicas += partition.fenced.len();
            if partition.leader != me {
                continue;
            }
            let in_sync = partition.isr.len();
            now.led += 1;
            now.under_replicated += usize::from(in_sync < partition.replicas.len());
            now.under_min_isr += usize::from(in_sync < needed);
            now.at_min_isr += usize::from(in_sync == needed);
            now.reassigning += usize::from(!partition.target.is_empty());
        }
    }
    now
}

#[cfg(test)]
mod tests {
    use super::super::command::{self, command::Command as Kind};
    use super::*;
    use headwater_proto::TopicId;

    fn incarnation(broker: i32) -> bytes::Bytes {
        vec![broker as u8; 16].into()
    }

    fn apply(state: &mut MetadataState, kind: Kind) {
        let controller_epoch = match kind {
            Kind::FenceBroker(_) | Kind::UnfenceBroker(_) => state.controller_epoch(),
            _ => 0,
        };
        let command = command::Command { controller_epoch, ..kind.into() };
        state.apply(state.index() + 1, &command).expect("accepted");
    }

    /// Three active brokers, and a topic of three partitions that prefers the safe choice, or not.
    fn cluster(unclean: &str) -> MetadataState {
        let mut state = MetadataState::new("cluster");
        for broker_id in 1..=3 {
            let incarnation = incarnation(broker_id);
            apply(
                &mut state,
                Kind::RegisterBroker(command::RegisterBroker { broker_id, incarnation, ..Default::default() }),
            );
        }
        apply(
            &mut state,
            Kind::BecomeController(command::BecomeController { broker_id: 3, incarnation: incarnation(3) }),
        );
        let partitions = [vec![1, 2], vec![2, 1], vec![1]].map(|brokers| command::Replicas { brokers });
        let config = [("unclean.leader.election.enable".to_owned(), unclean.to_owned())];
        apply(
            &mut state,
            Kind::CreateTopic(command::CreateTopic {
                name: "t".into(),
                topic_id: TopicId::from_bytes([1; 16]).to_wire(),
                partitions: partitions.into(),
                config: config.into(),
                default_min_insync_replicas: 1,
                ..Default::default()
            }),
        );
        state
    }

    fn fence(state: &mut MetadataState, broker_id: i32) {
        apply(state, Kind::FenceBroker(command::FenceBroker { broker_id, incarnation: incarnation(broker_id) }));
    }

    #[test]
    fn a_fence_gives_some_partitions_leaders_and_leaves_others_without() {
        let before = cluster("false");
        let mut after = before.clone();
        fence(&mut after, 1);
        let seen = changes(&before, &after, 2);
        let wanted =
            Changes { new_leaders: 1, led_by_me: 1, without_leader: 1, shrunk: 2, expanded: 0, unclean: vec![] };
        assert_eq!(seen, wanted);
        assert_eq!(changes(&after, &after, 2), Changes::default());
        let now = standing(&after, 2);
        assert_eq!((now.under_replicated, now.at_min_isr, now.led, now.offline), (2, 2, 2, 1));
        assert_eq!(standing(&before, 3), Standing::default());
    }

    #[test]
    fn an_unclean_leader_is_named() {
        let mut before = cluster("true");
        fence(&mut before, 2);
        let mut after = before.clone();
        fence(&mut after, 1);
        assert_eq!(changes(&before, &after, 1).unclean, [], "nobody is left");
        apply(&mut after, Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 2, incarnation: incarnation(2) }));
        let unclean = changes(&before, &after, 1).unclean;
        let named = |partition| Unclean { topic: "t".into(), partition, leader: 2 };
        assert_eq!(unclean, [named(0), named(1)]);
    }
}
