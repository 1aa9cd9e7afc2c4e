//! The state as a message, and back.
//!
//! Owns: the translation, and the refusal of a snapshot that breaks an invariant.

use super::super::command;
use super::applied::AppliedCommands;
use super::brokers::{Broker, BrokerState, incarnation_from_wire, incarnation_to_wire};
use super::partitions::Partition;
use super::{MetadataState, Refusal, Topic, topic_id};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that are no snapshot of the state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot makes no sense: {0}")]
pub struct InvalidSnapshot(String);

impl MetadataState {
    /// The state as a message.
    pub fn snapshot(&self) -> command::Snapshot {
        command::Snapshot {
            index: self.index,
            cluster_id: self.cluster_id.clone(),
            brokers: self.brokers.values().map(broker_message).collect(),
            topics: self.topics.values().map(|topic| topic_message(topic)).collect(),
            next_producer_id: self.next_producer_id,
            producer_epochs: self
                .producer_epochs
                .iter()
                .map(|(id, (epoch, index))| command::ProducerEpoch {
                    producer_id: *id,
                    epoch: i32::from(*epoch),
                    index: *index,
                })
                .collect(),
            controller: self.controller.map(|(broker_id, incarnation)| command::Controller {
                broker_id,
                incarnation: incarnation_to_wire(incarnation),
            }),
            controller_epoch: self.controller_epoch,
            feature_level: self.feature_level,
            applied: self.applied.to_messages(),
        }
    }

    /// The state that a snapshot holds.
    ///
    /// # Errors
    /// [`InvalidSnapshot`] if it breaks an invariant.
    pub fn from_snapshot(snapshot: command::Snapshot) -> Result<MetadataState, InvalidSnapshot> {
        MetadataState::restore(snapshot).map_err(|refusal| InvalidSnapshot(refusal.to_string()))
    }

    fn restore(snapshot: command::Snapshot) -> Result<MetadataState, Refusal> {
        let mut state = MetadataState::new(snapshot.cluster_id);
        for message in snapshot.brokers {
            let broker = broker_from(message)?;
            state.brokers.insert(broker.id, broker);
        }
        if snapshot.next_producer_id < 0 {
            return Err(Refusal::Unknown("holds a negative producer id"));
        }
        for message in snapshot.topics {
            let topic = topic_from(message)?;
            state.admit(&topic)?;
            state.insert(topic);
        }
        state.next_producer_id = snapshot.next_producer_id;
        let mut epochs = BTreeMap::new();
        for given in snapshot.producer_epochs {
            let epoch = i16::try_from(given.epoch).ok().filter(|epoch| *epoch > 0);
            let epoch = epoch.filter(|_| (0..snapshot.next_producer_id).contains(&given.producer_id));
            let epoch =
                epoch.ok_or(Refusal::Unknown("holds an epoch of a producer id that cannot have been given out"))?;
            epochs.insert(given.producer_id, (epoch, given.index));
        }
        state.producer_epochs = Arc::new(epochs);
        if let Some(office) = snapshot.controller {
            state.controller = Some((office.broker_id, incarnation_from_wire(&office.incarnation)?));
        }
        state.controller_epoch = snapshot.controller_epoch;
        state.feature_level = snapshot.feature_level.max(1);
        state.applied = AppliedCommands::from_messages(snapshot.applied)?;
        state.index = snapshot.index;
        Ok(state)
    }
}

fn broker_message(broker: &Broker) -> command::Broker {
    command::Broker {
        broker_id: broker.id,
        incarnation: incarnation_to_wire(broker.incarnation),
        boots: broker.boots,
        address: broker.address.clone(),
        rack: broker.rack.clone(),
        registered_ms: broker.registered_ms,
        state: match broker.state {
            BrokerState::Active => command::BrokerState::Active,
            BrokerState::Fenced => command::BrokerState::Fenced,
            BrokerState::Draining => command::BrokerState::Draining,
        }
        .into(),
        epoch: broker.epoch,
        directory_id: broker.directory_id.clone(),
        feature_level: broker.feature_level,
        node_id: broker.node_id,
        former_node_ids: broker.former_node_ids.clone(),
        is_emptied: broker.is_emptied,
    }
}

fn broker_from(message: command::Broker) -> Result<Broker, Refusal> {
    Ok(Broker {
        id: message.broker_id,
        incarnation: incarnation_from_wire(&message.incarnation)?,
        boots: message.boots,
        state: match message.state() {
            command::BrokerState::Active => BrokerState::Active,
            command::BrokerState::Fenced => BrokerState::Fenced,
            command::BrokerState::Draining => BrokerState::Draining,
        },
        address: message.address,
        rack: message.rack,
        registered_ms: message.registered_ms,
        epoch: message.epoch,
        directory_id: message.directory_id,
        feature_level: message.feature_level.max(1),
        node_id: message.node_id,
        former_node_ids: message.former_node_ids,
        is_emptied: message.is_emptied,
    })
}

fn topic_message(topic: &Topic) -> command::Topic {
    command::Topic {
        name: topic.name.clone(),
        topic_id: topic.id.to_wire(),
        internal: topic.internal,
        config: topic.config.clone(),
        created_ms: topic.created_ms,
        default_min_insync_replicas: topic.default_min_insync_replicas,
        partitions: topic
            .partitions
            .iter()
            .map(|partition| command::Partition {
                leader: partition.leader,
                leader_epoch: partition.leader_epoch,
                replicas: partition.replicas.clone(),
                isr: partition.isr.clone(),
                partition_epoch: partition.partition_epoch,
                elr: partition.elr.clone(),
                unclean_recoveries: partition.unclean_recoveries,
                fenced: partition.fenced.clone(),
                last_known: partition.last_known.clone(),
                lost: partition.lost.clone(),
                target: partition.target.clone(),
                adding: partition.adding.clone(),
                removing: partition.removing.clone(),
                throttle_bytes_per_second: partition.throttle_bytes_per_second,
            })
            .collect(),
    }
}

fn topic_from(message: command::Topic) -> Result<Topic, Refusal> {
    Ok(Topic {
        id: topic_id(&message.topic_id)?,
        name: message.name,
        internal: message.internal,
        config: message.config,
        created_ms: message.created_ms,
        default_min_insync_replicas: message.default_min_insync_replicas.max(1),
        partitions: message
            .partitions
            .into_iter()
            .map(|partition| Partition {
                leader: partition.leader,
                leader_epoch: partition.leader_epoch,
                replicas: partition.replicas,
                isr: partition.isr,
                partition_epoch: partition.partition_epoch,
                elr: partition.elr,
                unclean_recoveries: partition.unclean_recoveries,
                fenced: partition.fenced,
                last_known: partition.last_known,
                lost: partition.lost,
                target: partition.target,
                adding: partition.adding,
                removing: partition.removing,
                throttle_bytes_per_second: partition.throttle_bytes_per_second,
            })
            .collect(),
    })
}
