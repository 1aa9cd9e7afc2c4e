//! The state as a message, and back.
//!
//! Owns: the translation, and the refusal of a snapshot that breaks an invariant.

use super::super::command;
use super::{MetadataState, Partition, Refusal, Topic, topic_id};
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
            brokers: self.brokers.values().cloned().collect(),
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
        }
    }

    /// The state that a snapshot holds.
    ///
    /// # Errors
    /// [`InvalidSnapshot`] if it breaks an invariant.
    pub fn from_snapshot(snapshot: command::Snapshot) -> Result<MetadataState, InvalidSnapshot> {
        let invalid = |why: &dyn std::fmt::Display| InvalidSnapshot(why.to_string());
        let mut state = MetadataState::new(snapshot.cluster_id);
        for broker in snapshot.brokers {
            state.brokers.insert(broker.broker_id, broker);
        }
        if snapshot.next_producer_id < 0 {
            return Err(invalid(&"the next producer id is negative"));
        }
        for message in snapshot.topics {
            let topic = topic_from(message).map_err(|refusal| invalid(&refusal))?;
            state.admit(&topic).map_err(|refusal| invalid(&refusal))?;
            state.insert(topic);
        }
        state.next_producer_id = snapshot.next_producer_id;
        let mut epochs = BTreeMap::new();
        for given in snapshot.producer_epochs {
            let epoch = i16::try_from(given.epoch).ok().filter(|epoch| *epoch > 0);
            let epoch = epoch.filter(|_| (0..snapshot.next_producer_id).contains(&given.producer_id));
            let epoch = epoch.ok_or_else(|| invalid(&"an epoch of a producer id that cannot have been given out"))?;
            epochs.insert(given.producer_id, (epoch, given.index));
        }
        state.producer_epochs = Arc::new(epochs);
        state.index = snapshot.index;
        Ok(state)
    }
}

fn topic_message(topic: &Topic) -> command::Topic {
    command::Topic {
        name: topic.name.clone(),
        topic_id: topic.id.to_wire(),
        internal: topic.internal,
        config: topic.config.clone(),
        created_ms: topic.created_ms,
        partitions: topic
            .partitions
            .iter()
            .map(|partition| command::Partition {
                leader: partition.leader,
                leader_epoch: partition.leader_epoch,
                replicas: partition.replicas.clone(),
                isr: partition.isr.clone(),
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
        partitions: message
            .partitions
            .into_iter()
            .map(|partition| Partition {
                leader: partition.leader,
                leader_epoch: partition.leader_epoch,
                replicas: partition.replicas,
                isr: partition.isr,
            })
            .collect(),
    })
}
