//! The topic that groups are kept in: made once, of as many replicas as the cluster is to have, not as there happen to be.
//!
//! Owns: its settings, and when it may be made. Refuses: to change one that is there. Read next: [`super::seats`].

use crate::clock::now_ms;
use crate::config::BrokerConfig;
use crate::metadata::command::{CreateTopic, Replicas, command::Command as Kind};
use crate::metadata::handle::new_topic_id;
use crate::metadata::name::OFFSETS_TOPIC;
use crate::metadata::{MetadataError, MetadataHandle, MetadataState, Refusal, placement};
use crate::topic_config::{self, TopicDefaults, TopicValues};

/// Its settings: Kafka's, and room for a batch that holds all records of one event.
const CONFIG: [(&str, &str); 3] =
    [("cleanup.policy", "compact"), ("segment.bytes", "104857600"), ("max.message.bytes", "67108864")];

/// How it is made.
#[derive(Debug, Clone)]
pub(super) struct OffsetsTopic {
    broker_id: i32,
    partitions: u32,
    replication_factor: u32,
    /// Brokers that were named beside this one.
    named: usize,
    defaults: TopicDefaults,
}

/// Who is to keep it.
#[derive(Debug, PartialEq, Eq)]
enum Keepers {
    These(Vec<Replicas>),
    /// So many are to keep it, so many are known, and so many of those are active.
    NotYet {
        wanted: usize,
        known: usize,
        active: usize,
    },
}

impl OffsetsTopic {
    pub(super) fn new(config: &BrokerConfig) -> OffsetsTopic {
        OffsetsTopic {
            broker_id: i32::try_from(config.broker_id).unwrap_or(i32::MAX),
            partitions: config.groups.offsets_partitions,
            replication_factor: config.groups.offsets_replication_factor,
            named: config.quorum_servers().len(),
            defaults: config.topic_defaults.clone(),
        }
    }

    /// Makes it on this broker alone, unless it is there.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub(super) async fn make_alone(&self, metadata: &MetadataHandle) -> Result<(), MetadataError> {
        if metadata.state().topic(OFFSETS_TOPIC).is_some() {
            return Ok(());
        }
        let replicas = Replicas { brokers: vec![self.broker_id] };
        let create = self.command(vec![replicas; self.partitions as usize])?;
        made(metadata.propose(Kind::CreateTopic(create)).await.map(drop))
    }

    /// Makes it on as many brokers as it is to have, unless it is there. `Ok(Some(why))`: they are not there yet.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub(super) async fn make(&self, metadata: &MetadataHandle) -> Result<Option<String>, MetadataError> {
        // Before others are bothered: whoever asks asks again.
        if let Keepers::NotYet { wanted, known, active } = self.keepers(&metadata.state(), 0) {
            return Ok(Some(format!(
                "{wanted} brokers are to keep the offsets of groups (offsets.topic.replication.factor): of those, {known} are \
                 known so far, and {active} are active"
            )));
        }
        let this = self.clone();
        let decide = move |state: &MetadataState| {
            if state.topic(OFFSETS_TOPIC).is_some() {
                return Err(Refusal::TopicExists(OFFSETS_TOPIC.to_owned()).into());
            }
            let (asked, brokers) = (this.replication_factor, state.brokers().count());
            // The topic's name is always the same: whoever is asked first says where it lies.
            match this.keepers(state, now_ms().unsigned_abs()) {
                Keepers::These(replicas) => Ok(Kind::CreateTopic(this.command(replicas)?).into()),
                Keepers::NotYet { .. } => {
                    Err(MetadataError::InvalidReplicationFactor { asked, brokers, emptied: Vec::new() })
                }
            }
        };
        made(metadata.propose_with(decide).await.map(drop)).map(|()| None)
    }

    /// Who is to keep it, by what is known: as many as are wanted at most, of those that were named or have registered. Some of
    /// them may be gone for the moment, as long as a majority of each partition's is there.
    fn keepers(&self, state: &MetadataState, seed: u64) -> Keepers {
        let known = state.brokers().count();
        let wanted = known.max(self.named).min(self.replication_factor as usize).max(1);
        let active = state.brokers().filter(|broker| broker.takes_partitions()).count();
        if known < wanted || active < majority(wanted) {
            return Keepers::NotYet { wanted, known, active };
        }
        let at_once = u32::try_from(wanted.min(active)).unwrap_or(u32::MAX);
        let Ok(mut placed) = placement::place(state, None, self.partitions, at_once, seed) else {
            return Keepers::NotYet { wanted, known, active };
        };
        let away: Vec<i32> =
            state.brokers().filter(|broker| !broker.takes_partitions() && !broker.is_emptied).map(|it| it.id).collect();
        for (number, replicas) in placed.iter_mut().enumerate() {
            let missing = wanted - replicas.brokers.len();
            replicas.brokers.extend(away.iter().cycle().skip(number % away.len().max(1)).take(missing));
        }
        Keepers::These(placed)
    }

    fn command(&self, partitions: Vec<Replicas>) -> Result<CreateTopic, MetadataError> {
        let replicas = partitions.first().map_or(1, |replicas| replicas.brokers.len());
        let settings = CONFIG.map(|(key, value)| (key.to_owned(), Some(value.to_owned())));
        Ok(CreateTopic {
            name: OFFSETS_TOPIC.to_owned(),
            topic_id: new_topic_id().to_wire(),
            internal: true,
            partitions,
            config: topic_config::change(&TopicValues::new(), settings, &self.defaults)?,
            created_ms: now_ms(),
            default_min_insync_replicas: u32::try_from(majority(replicas)).unwrap_or(u32::MAX),
        })
    }
}

fn majority(of: usize) -> usize {
    of / 2 + 1
}

/// Somebody else may have made it: that is as good.
fn made(outcome: Result<(), MetadataError>) -> Result<(), MetadataError> {
    match outcome {
        Err(MetadataError::Refused(Refusal::TopicExists(_))) => Ok(()),
        Err(MetadataError::Elsewhere { code: headwater_proto::ErrorCode::TopicExists, .. }) => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{BecomeController, Command, FenceBroker, RegisterBroker, UnfenceBroker};
    use std::collections::BTreeSet;

    /// These brokers, of which so many are active.
    fn brokers(known: i32, active: i32) -> MetadataState {
        let mut state = MetadataState::new("cluster");
        let id = |broker: i32| uuid::Uuid::from_u128(broker.unsigned_abs().into()).as_bytes().to_vec().into();
        let mut apply = |command: Command| state.apply(state.index() + 1, &command).map(drop).unwrap();
        for broker_id in 1..=known {
            let registration = RegisterBroker { broker_id, incarnation: id(broker_id), boots: 1, ..Default::default() };
            apply(Kind::RegisterBroker(registration).into());
        }
        apply(Kind::BecomeController(BecomeController { broker_id: 1, incarnation: id(1) }).into());
        for broker_id in 1..=known {
            let incarnation = id(broker_id);
            let kind = match broker_id <= active {
                true => Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation }),
                false => Kind::FenceBroker(FenceBroker { broker_id, incarnation }),
            };
            let controller_epoch = state.controller_epoch();
            let _ = state.apply(state.index() + 1, &Command { controller_epoch, ..kind.into() });
        }
        state
    }

    fn topic(named: usize, pairs: &[&str]) -> OffsetsTopic {
        let mut config = BrokerConfig::default();
        pairs.iter().for_each(|pair| config.set_pair(pair).unwrap());
        OffsetsTopic { named, ..OffsetsTopic::new(&config) }
    }

    #[test]
    fn nobody_is_left_out_who_is_to_come_or_is_gone_for_the_moment() {
        let not_yet = |wanted, known, active| Keepers::NotYet { wanted, known, active };
        let three = topic(3, &[]);
        assert_eq!(three.keepers(&brokers(1, 1), 1), not_yet(3, 1, 1), "the others were named");
        assert_eq!(three.keepers(&brokers(3, 1), 1), not_yet(3, 3, 1), "nothing would be kept");
        for active in [2, 3] {
            let Keepers::These(replicas) = three.keepers(&brokers(3, active), 1) else { panic!("{active}") };
            assert_eq!(replicas.len(), 16);
            for partition in replicas {
                assert!(partition.brokers[0] <= active, "somebody leads: {partition:?}");
                assert_eq!(partition.brokers.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([1, 2, 3]));
            }
        }
        let Keepers::These(replicas) = topic(1, &[]).keepers(&brokers(5, 4), 7) else { panic!("there are five") };
        let leaders: BTreeSet<i32> = replicas.iter().map(|partition| partition.brokers[0]).collect();
        assert_eq!(leaders, BTreeSet::from([1, 2, 3, 4]), "spread");
        assert!(replicas.iter().all(|partition| partition.brokers.len() == 3));
        let Keepers::These(replicas) = topic(3, &["offsets.topic.replication.factor=1"]).keepers(&brokers(1, 1), 1)
        else {
            panic!("it was told to be content with one")
        };
        assert!(replicas.iter().all(|partition| partition.brokers == [1]));
    }

    #[test]
    fn a_majority_of_the_replicas_has_to_have_what_was_committed() {
        for (replicas, least) in [(1, 1), (2, 2), (3, 2), (5, 3)] {
            let partitions = vec![Replicas { brokers: (1..=replicas).collect() }];
            let mut state = brokers(5, 5);
            let create = topic(5, &[]).command(partitions).unwrap();
            assert!(create.internal);
            state.apply(state.index() + 1, &Kind::CreateTopic(create).into()).unwrap();
            assert_eq!(state.topic(OFFSETS_TOPIC).unwrap().min_insync_replicas(), least);
        }
    }
}
