//! Leaders that come back to the brokers that should lead: when the controller says so. Pure.
//!
//! A broker that was away leads nothing any more. Once it is in sync wherever it keeps a replica, and has stayed so for a while, the
//! partitions that prefer it are given back to it.
//!
//! Owns: which partitions, and when. Refuses: clocks and proposals ([`super::heartbeat`]).

use super::super::command::TopicPartition;
use super::super::state::{BrokerState, MetadataState};
use std::collections::{BTreeMap, BTreeSet};

/// Most partitions that are given back at once: for a moment nobody serves them.
const MOST: usize = 250;

/// What the controller remembers.
#[derive(Debug)]
pub struct Balance {
    settled_ms: u64,
    /// Since when each broker has been in sync everywhere.
    since_ms: BTreeMap<i32, u64>,
}

impl Balance {
    /// Brokers get their leaderships back that were in sync everywhere for so long.
    pub fn new(settled_ms: u64) -> Balance {
        Balance { settled_ms, since_ms: BTreeMap::new() }
    }

    /// Whoever comes into office has seen nothing yet.
    pub fn forget(&mut self) {
        self.since_ms.clear();
    }

    /// The partitions that their preferred leaders are to lead now.
    pub fn decide(&mut self, now_ms: u64, state: &MetadataState) -> Vec<TopicPartition> {
        let mut behind: BTreeSet<i32> = BTreeSet::new();
        let mut wanted: Vec<(i32, TopicPartition)> = Vec::new();
        for topic in state.topics() {
            for (partition, number) in topic.partitions.iter().zip(0u32..) {
                behind.extend(partition.replicas.iter().filter(|broker| !partition.isr.contains(broker)));
                let Some(preferred) = partition.replicas.first() else { continue };
                if partition.leader != *preferred && partition.isr.contains(preferred) {
                    wanted.push((*preferred, TopicPartition { topic_id: topic.id.to_wire(), partition: number }));
                }
            }
        }
        let is_well = |broker: &i32| {
            !behind.contains(broker) && state.broker(*broker).is_some_and(|known| known.state == BrokerState::Active)
        };
        self.since_ms.retain(|broker, _| is_well(broker));
        for broker in state.brokers().map(|broker| broker.id).filter(|broker| is_well(broker)) {
            self.since_ms.entry(broker).or_insert(now_ms);
        }
        let is_settled = |broker: &i32| {
            self.since_ms.get(broker).is_some_and(|since| now_ms.saturating_sub(*since) >= self.settled_ms)
        };
        let settled = wanted.into_iter().filter(|(broker, _)| is_settled(broker));
        settled.map(|(_, partition)| partition).take(MOST).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{
        BecomeController, Command, CreateTopic, ElectLeaders, FenceBroker, RegisterBroker, Replicas, UnfenceBroker,
        command::Command as Kind,
    };
    use super::*;
    use bytes::Bytes;
    use headwater_proto::TopicId;
    use uuid::Uuid;

    fn incarnation(broker_id: i32) -> Bytes {
        Bytes::copy_from_slice(Uuid::from_u128(broker_id.unsigned_abs().into()).as_bytes())
    }

    fn apply(state: &mut MetadataState, kind: Kind) {
        let controller_epoch = state.controller().map_or(0, |_| state.controller_epoch());
        state.apply(state.index() + 1, &Command { controller_epoch, ..kind.into() }).expect("accepted");
    }

    fn fence(state: &mut MetadataState, broker_id: i32) {
        apply(state, Kind::FenceBroker(FenceBroker { broker_id, incarnation: incarnation(broker_id) }));
    }

    fn unfence(state: &mut MetadataState, broker_id: i32) {
        apply(state, Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: incarnation(broker_id) }));
    }

    /// Brokers 1 and 2, and a topic whose first partition 1 should lead, and whose second 2.
    fn state() -> MetadataState {
        let mut state = MetadataState::new("cluster");
        for broker_id in [1, 2] {
            let register =
                RegisterBroker { broker_id, incarnation: incarnation(broker_id), boots: 1, ..Default::default() };
            apply(&mut state, Kind::RegisterBroker(register));
        }
        let office = BecomeController { broker_id: 1, incarnation: incarnation(1) };
        state.apply(state.index() + 1, &Kind::BecomeController(office).into()).expect("accepted");
        [1, 2].into_iter().for_each(|broker_id| unfence(&mut state, broker_id));
        let replicas = |brokers: &[i32]| Replicas { brokers: brokers.to_vec() };
        let create = CreateTopic {
            name: "t".into(),
            topic_id: TopicId::from_bytes([1; 16]).to_wire(),
            partitions: vec![replicas(&[1, 2]), replicas(&[2, 1])],
            ..Default::default()
        };
        apply(&mut state, Kind::CreateTopic(create));
        state
    }

    /// The leader of partition 1 says that both are in sync.
    fn join(state: &mut MetadataState, partition: u32) {
        let member =
            |broker_id| super::super::super::command::Member { broker_id, incarnation: incarnation(broker_id) };
        let topic = state.topic("t").expect("there").partitions[partition as usize].clone();
        let alter = super::super::super::command::AlterPartition {
            topic_id: TopicId::from_bytes([1; 16]).to_wire(),
            partition,
            leader: Some(member(topic.leader)),
            leader_epoch: topic.leader_epoch,
            partition_epoch: topic.partition_epoch,
            isr: vec![member(1), member(2)],
        };
        state.apply(state.index() + 1, &Kind::AlterPartition(alter).into()).expect("accepted");
    }

    #[test]
    fn leaders_go_back_once_the_broker_was_in_sync_everywhere_for_a_while() {
        let mut state = state();
        let mut balance = Balance::new(5_000);
        assert_eq!(balance.decide(0, &state), [], "they lead what they should");
        fence(&mut state, 2);
        assert_eq!(balance.decide(1_000, &state), []);
        unfence(&mut state, 2);
        join(&mut state, 1);
        assert_eq!(balance.decide(10_000, &state), [], "it is behind in the other partition");
        join(&mut state, 0);
        assert_eq!(balance.decide(11_000, &state), [], "it has only come back");
        assert_eq!(balance.decide(15_999, &state), []);
        let wanted = balance.decide(16_000, &state);
        assert_eq!(wanted, [TopicPartition { topic_id: TopicId::from_bytes([1; 16]).to_wire(), partition: 1 }]);
        apply(&mut state, Kind::ElectLeaders(ElectLeaders { kind: 0, partitions: wanted }));
        assert_eq!(state.topic("t").expect("there").partitions[1].leader, 2);
        assert_eq!(balance.decide(17_000, &state), []);
    }

    #[test]
    fn whoever_comes_into_office_looks_for_a_while_first() {
        let mut state = state();
        let mut balance = Balance::new(5_000);
        fence(&mut state, 2);
        unfence(&mut state, 2);
        [0, 1].into_iter().for_each(|partition| join(&mut state, partition));
        assert_eq!(balance.decide(0, &state), []);
        balance.forget();
        assert_eq!(balance.decide(5_000, &state), []);
        assert_eq!(balance.decide(10_000, &state).len(), 1);
    }
}
