//! Brokers: how they come into the cluster.

use super::super::command;
use super::{MetadataState, Outcome};
use std::sync::Arc;

impl MetadataState {
    pub(super) fn register(&mut self, register: &command::RegisterBroker) -> Outcome {
        let boots = self.brokers.get(&register.broker_id).map_or(0, |broker| broker.boots) + 1;
        self.brokers.insert(
            register.broker_id,
            command::Broker {
                broker_id: register.broker_id,
                incarnation: register.incarnation.clone(),
                boots,
                address: register.address.clone(),
                rack: register.rack.clone(),
                registered_ms: register.registered_ms,
            },
        );
        for topic in self.topics.values_mut() {
            if topic.partitions.iter().any(|partition| partition.leader == register.broker_id) {
                for partition in &mut Arc::make_mut(topic).partitions {
                    if partition.leader == register.broker_id {
                        partition.leader_epoch = partition.leader_epoch.saturating_add(1);
                    }
                }
            }
        }
        Outcome::BrokerRegistered { boots }
    }
}
