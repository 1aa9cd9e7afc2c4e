//! Which brokers are heard of: what every voter remembers of heartbeats, and what the controller makes of it. Pure.
//!
//! A broker says to every voter that it is there, so a new controller knows at once who is not: nobody waits for another
//! session because the controller died too. Only what this voter heard itself counts, by its own clock; where it could
//! not have heard anything, because it did not run or did not vote, nobody is late before a whole session after that.
//!
//! A heartbeat also names the replicas that are of no use to anybody, as a disk fenced them: they are taken out of the in-sync ones.
//!
//! Owns: who is fenced and unfenced, and which replicas. Refuses: clocks, sockets, proposals ([`super::heartbeat`]); what a fence means
//! ([`super::super::state`]).

use super::super::command::TopicPartition;
use super::super::state::{BrokerState, MetadataState, RESTORED_LEVEL};
use crate::rounds::Key;
use headwater_proto::TopicId;
use std::collections::BTreeMap;
use uuid::Uuid;

/// What a voter remembers.
#[derive(Debug)]
pub struct Sessions {
    timeout_ms: u64,
    /// Since when it could have heard.
    since_ms: u64,
    heard: BTreeMap<i32, Heard>,
}

/// A broker's last heartbeat.
#[derive(Debug, Clone)]
struct Heard {
    incarnation: Uuid,
    at_ms: u64,
    says: Says,
}

/// What a broker says of itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Says {
    /// It has recovered what it keeps.
    pub is_ready: bool,
    /// Replicas that are of no use.
    pub unfit: Vec<TopicPartition>,
    /// Replicas that were, and whose disk came back.
    pub restored: Vec<TopicPartition>,
}

/// What the controller is to propose.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// The broker's session is over.
    Fence {
        /// Which broker.
        broker_id: i32,
        /// Which start of it.
        incarnation: Uuid,
    },
    /// The broker is there, and has recovered.
    Unfence {
        /// Which broker.
        broker_id: i32,
        /// Which start of it.
        incarnation: Uuid,
    },
    /// The broker's disk fenced replicas.
    FenceReplicas {
        /// Which broker.
        broker_id: i32,
        /// Which start of it.
        incarnation: Uuid,
        /// Which replicas.
        replicas: Vec<TopicPartition>,
    },
    /// The broker's disk came back, and replicas that it fenced are well.
    RestoreReplicas {
        /// Which broker.
        broker_id: i32,
        /// Which start of it.
        incarnation: Uuid,
        /// Which replicas.
        replicas: Vec<TopicPartition>,
    },
}

impl Sessions {
    /// Nobody was heard of yet.
    pub fn new(timeout_ms: u64, now_ms: u64) -> Sessions {
        Sessions { timeout_ms, since_ms: now_ms, heard: BTreeMap::new() }
    }

    /// A broker says that it is there. A start that is over is not heard of again once a later one was, as the state knows.
    pub fn hear(&mut self, now_ms: u64, broker_id: i32, incarnation: Uuid, says: Says, state: &MetadataState) {
        let registered = state.broker(broker_id).map(|broker| broker.incarnation);
        let is_other = |heard: &Heard| heard.incarnation != incarnation && Some(heard.incarnation) == registered;
        if self.heard.get(&broker_id).is_some_and(is_other) {
            return;
        }
        self.heard.insert(broker_id, Heard { incarnation, at_ms: now_ms, says });
    }

    /// Nothing could be heard until now: this process stood still, or did not vote.
    pub fn could_not_hear(&mut self, now_ms: u64) {
        self.since_ms = self.since_ms.max(now_ms);
    }

    /// This process stood still for so long, and heard nothing in that time, which therefore counts against nobody. After a
    /// whole session connections may have ended too, and everybody has another one.
    pub fn stood_still(&mut self, now_ms: u64, for_ms: u64) {
        if for_ms >= self.timeout_ms {
            return self.could_not_hear(now_ms);
        }
        let later = |at_ms: u64| at_ms.saturating_add(for_ms).min(now_ms);
        self.since_ms = later(self.since_ms);
        self.heard.values_mut().for_each(|heard| heard.at_ms = later(heard.at_ms));
    }

    /// How long nothing was heard of a broker.
    pub fn unheard_ms(&self, broker_id: i32, now_ms: u64) -> u64 {
        let heard = self.heard.get(&broker_id).map_or(self.since_ms, |heard| heard.at_ms);
        now_ms.saturating_sub(heard)
    }

    /// What a controller is to propose in this state.
    pub fn decide(&self, now_ms: u64, state: &MetadataState) -> Vec<Decision> {
        let mut decisions = Vec::new();
        for broker in state.brokers() {
            let (broker_id, incarnation) = (broker.id, broker.incarnation);
            let heard = self.heard.get(&broker_id).filter(|heard| heard.incarnation == incarnation);
            let since_ms = heard.map_or(0, |heard| heard.at_ms).max(self.since_ms);
            let is_late = now_ms.saturating_sub(since_ms) >= self.timeout_ms;
            match broker.state {
                BrokerState::Active | BrokerState::Draining if is_late => {
                    decisions.push(Decision::Fence { broker_id, incarnation });
                }
                BrokerState::Fenced
                    if heard.is_some_and(|heard| heard.says.is_ready && self.is_fresh(heard, now_ms)) =>
                {
                    decisions.push(Decision::Unfence { broker_id, incarnation });
                }
                _ => {}
            }
            // Whoever was not heard of for so long may have said something else since, to others.
            let says = heard.filter(|heard| self.is_fresh(heard, now_ms)).map(|heard| &heard.says);
            let those = |replicas: &[TopicPartition], are_fenced| {
                let concerned = replicas.iter().filter(|it| is_named_fenced(state, broker_id, it) == Some(are_fenced));
                concerned.cloned().collect::<Vec<_>>()
            };
            let replicas = says.map_or_else(Vec::new, |says| those(&says.unfit, false));
            if !replicas.is_empty() {
                decisions.push(Decision::FenceReplicas { broker_id, incarnation, replicas });
            }
            // Before, the broker's next start gives them back.
            let may_restore = state.feature_level() >= RESTORED_LEVEL && broker.state == BrokerState::Active;
            let replicas = says.filter(|_| may_restore).map_or_else(Vec::new, |says| those(&says.restored, true));
            if !replicas.is_empty() {
                decisions.push(Decision::RestoreReplicas { broker_id, incarnation, replicas });
            }
        }
        decisions
    }

    fn is_fresh(&self, heard: &Heard, now_ms: u64) -> bool {
        now_ms.saturating_sub(heard.at_ms) < self.timeout_ms
    }
}

/// Whether the state counts the replica of a broker that may keep it as fenced by its disk; `None`: it does not keep it.
pub(super) fn is_fenced(state: &MetadataState, broker_id: i32, (topic, partition): &Key) -> Option<bool> {
    let partition = state.topic_by_id(topic)?.partitions.get(*partition as usize)?;
    partition.replicas.contains(&broker_id).then(|| partition.fenced.contains(&broker_id))
}

fn is_named_fenced(state: &MetadataState, broker_id: i32, replica: &TopicPartition) -> Option<bool> {
    is_fenced(state, broker_id, &(TopicId::from_slice(&replica.topic_id)?, replica.partition))
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{
        BecomeController, Command, CreateTopic, DrainBroker, FenceReplicas, RaiseFeatureLevel, RegisterBroker,
        Replicas, RestoreReplicas, UnfenceBroker, command::Command as Kind,
    };
    use super::super::super::state::FEATURE_LEVEL;
    use super::*;

    fn start(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn apply(state: &mut MetadataState, command: impl Into<Command>) {
        state.apply(state.index() + 1, &command.into()).expect("accepted");
    }

    fn register(state: &mut MetadataState, broker_id: i32, boots: u64) {
        let incarnation = start(u128::from(boots)).as_bytes().to_vec().into();
        let feature_level = FEATURE_LEVEL;
        let register = RegisterBroker { broker_id, incarnation, boots, feature_level, ..RegisterBroker::default() };
        apply(state, Kind::RegisterBroker(register));
    }

    fn unfence(state: &mut MetadataState, broker_id: i32) {
        let incarnation = state.broker(broker_id).expect("there").incarnation.as_bytes().to_vec();
        let controller_epoch = state.controller_epoch();
        let unfence = Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: incarnation.into() });
        apply(state, Command { controller_epoch, ..unfence.into() });
    }

    /// Brokers 1 to 3, of which 1 is the controller; 1 and 2 are active.
    fn state() -> MetadataState {
        let mut state = MetadataState::new("cluster");
        (1..=3).for_each(|broker_id| register(&mut state, broker_id, 1));
        let incarnation = start(1).as_bytes().to_vec().into();
        apply(&mut state, Kind::BecomeController(BecomeController { broker_id: 1, incarnation }));
        (1..=2).for_each(|broker_id| unfence(&mut state, broker_id));
        state
    }

    fn ready() -> Says {
        Says { is_ready: true, ..Says::default() }
    }

    fn fence(broker_id: i32) -> Decision {
        Decision::Fence { broker_id, incarnation: start(1) }
    }

    #[test]
    fn a_broker_is_fenced_a_session_after_it_was_heard_last() {
        let state = state();
        let mut sessions = Sessions::new(600, 0);
        for at in [100, 500] {
            sessions.hear(at, 1, start(1), ready(), &state);
        }
        sessions.hear(100, 2, start(1), ready(), &state);
        assert_eq!(sessions.decide(699, &state), []);
        assert_eq!(sessions.decide(700, &state), [fence(2)]);
        assert_eq!(sessions.decide(1100, &state), [fence(1), fence(2)]);
    }

    #[test]
    fn nobody_is_late_before_they_could_be_heard() {
        let state = state();
        let mut sessions = Sessions::new(600, 10_000);
        assert_eq!(sessions.decide(10_599, &state), []);
        assert_eq!(sessions.decide(10_600, &state), [fence(1), fence(2)], "never heard of, and active");
        // This process stood still.
        sessions.could_not_hear(20_000);
        assert_eq!(sessions.decide(20_599, &state), []);
        sessions.hear(20_500, 1, start(1), ready(), &state);
        assert_eq!(sessions.decide(20_600, &state), [fence(2)]);
    }

    /// Each look that came late forgave everybody a whole session: on a machine with much to do nobody was ever fenced.
    #[test]
    fn time_in_which_this_process_stood_still_counts_against_nobody_and_no_other_time_is_given() {
        let state = state();
        let mut sessions = Sessions::new(600, 0);
        for broker_id in [1, 2] {
            sessions.hear(100, broker_id, start(1), ready(), &state);
        }
        // Broker 2 is silent from now on; the process is late at each look.
        let mut now_ms = 100;
        let fenced = loop {
            now_ms += 50 + 150;
            sessions.stood_still(now_ms, 150);
            sessions.hear(now_ms, 1, start(1), ready(), &state);
            let decisions = sessions.decide(now_ms, &state);
            if !decisions.is_empty() || now_ms > 10_000 {
                break decisions;
            }
        };
        assert_eq!((fenced, now_ms), (vec![fence(2)], 100 + 12 * 200));
        // After a longer time connections have to be made anew.
        sessions.stood_still(20_000, 600);
        assert_eq!(sessions.decide(20_599, &state), []);
        assert_eq!(sessions.decide(20_600, &state), [fence(1), fence(2)]);
    }

    #[test]
    fn a_fenced_broker_is_unfenced_once_it_is_ready_and_while_it_is_heard() {
        let state = state();
        let unfence = [Decision::Unfence { broker_id: 3, incarnation: start(1) }];
        let mut sessions = Sessions::new(600, 0);
        let hear = |sessions: &mut Sessions, at, incarnation, is_ready| {
            for broker_id in [1, 2] {
                sessions.hear(at, broker_id, start(1), ready(), &state);
            }
            sessions.hear(at, 3, incarnation, Says { is_ready, ..Says::default() }, &state);
        };
        hear(&mut sessions, 100, start(1), false);
        assert_eq!(sessions.decide(150, &state), [], "it recovers");
        hear(&mut sessions, 200, start(9), true);
        assert_eq!(sessions.decide(250, &state), [], "not the start that registered");
        hear(&mut sessions, 300, start(1), true);
        assert_eq!(sessions.decide(350, &state), unfence.clone());
        assert!(!sessions.decide(900, &state).contains(&unfence[0]), "it is silent again");
    }

    /// A start that is over may be heard late: it neither keeps the new one alive nor hides it.
    #[test]
    fn only_the_registered_start_counts() {
        let mut state = state();
        register(&mut state, 2, 2);
        unfence(&mut state, 2);
        let mut sessions = Sessions::new(600, 0);
        sessions.hear(100, 1, start(1), ready(), &state);
        sessions.hear(100, 2, start(2), ready(), &state);
        sessions.hear(650, 2, start(1), ready(), &state);
        sessions.hear(650, 1, start(1), ready(), &state);
        assert_eq!(sessions.decide(699, &state), []);
        assert_eq!(sessions.decide(700, &state), [Decision::Fence { broker_id: 2, incarnation: start(2) }]);
    }

    #[test]
    fn a_broker_that_drains_is_fenced_at_its_end_and_never_unfenced() {
        let mut state = state();
        let incarnation = start(1).as_bytes().to_vec().into();
        apply(&mut state, Kind::DrainBroker(DrainBroker { broker_id: 2, incarnation }));
        let mut sessions = Sessions::new(600, 0);
        sessions.hear(100, 1, start(1), ready(), &state);
        sessions.hear(100, 2, start(1), ready(), &state);
        assert_eq!(sessions.decide(200, &state), []);
        sessions.hear(700, 1, start(1), ready(), &state);
        assert_eq!(sessions.decide(700, &state), [fence(2)]);
    }

    #[test]
    fn replicas_that_a_disk_fenced_are_fenced_once() {
        let mut state = state();
        let topic_id = TopicId::from_bytes([1; 16]).to_wire();
        let create = CreateTopic {
            name: "t".into(),
            topic_id: topic_id.clone(),
            partitions: vec![Replicas { brokers: vec![1, 2] }, Replicas { brokers: vec![1] }],
            ..CreateTopic::default()
        };
        apply(&mut state, Kind::CreateTopic(create));
        let replica = |partition| TopicPartition { topic_id: topic_id.clone(), partition };
        let mut sessions = Sessions::new(600, 0);
        sessions.hear(100, 1, start(1), ready(), &state);
        let unfit = vec![replica(0), replica(1), replica(2)];
        sessions.hear(100, 2, start(1), Says { unfit, ..ready() }, &state);
        let replicas = vec![replica(0)];
        let fence = Decision::FenceReplicas { broker_id: 2, incarnation: start(1), replicas: replicas.clone() };
        assert_eq!(sessions.decide(150, &state), [fence], "what it does not keep is nobody's business");
        let incarnation = start(1).as_bytes().to_vec().into();
        let controller_epoch = state.controller_epoch();
        let fenced = Kind::FenceReplicas(FenceReplicas { broker_id: 2, incarnation, replicas });
        apply(&mut state, Command { controller_epoch, ..fenced.into() });
        assert_eq!(state.topic("t").expect("there").partitions[0].isr, [1]);
        assert_eq!(sessions.decide(200, &state), []);

        // Its disk hung, and came back.
        let silent = |brokers: [i32; 2]| brokers.map(|broker_id| Decision::Fence { broker_id, incarnation: start(1) });
        let restored = vec![replica(0), replica(1)];
        sessions.hear(200, 2, start(1), Says { restored, ..ready() }, &state);
        let restore = Decision::RestoreReplicas { broker_id: 2, incarnation: start(1), replicas: vec![replica(0)] };
        assert_eq!(sessions.decide(200, &state), [], "an older broker of the cluster would not understand it");
        apply(&mut state, Kind::RaiseFeatureLevel(RaiseFeatureLevel { level: FEATURE_LEVEL }));
        assert_eq!(sessions.decide(200, &state), [restore]);
        let incarnation = start(1).as_bytes().to_vec().into();
        let restored = Kind::RestoreReplicas(RestoreReplicas { broker_id: 2, incarnation, replicas: vec![replica(0)] });
        assert_eq!(sessions.decide(800, &state), silent([1, 2]), "it was said long ago, and may not be so any more");
        apply(&mut state, Command { controller_epoch, ..restored.into() });
        assert_eq!(sessions.decide(200, &state), []);
        sessions.hear(300, 2, start(1), Says { unfit: vec![replica(0)], ..ready() }, &state);
        sessions.hear(900, 1, start(1), ready(), &state);
        assert_eq!(sessions.decide(900, &state), silent([2, 2])[..1], "the same");
    }
}
