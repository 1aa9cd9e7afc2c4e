//! The metadata state machine: `apply(index, command)`, nothing else changes it.
//!
//! Invariants, checked after every command in tests: names and ids of topics belong together one to one; a partition's
//! leader and in-sync replicas are among its replicas; leader epochs and the next producer id never fall; a producer
//! id belongs to one block at most; an epoch of a producer id is given out only to whoever has the one before.
//!
//! Owns: what commands mean and which are refused. Refuses: clocks, random numbers, files, and the legality of settings
//! ([`crate::topic_config`] checks values before they are proposed, so that replaying old commands never depends on
//! the table of today). Read next: [`super::journal`].

mod brokers;
mod producers;
mod snapshot;
mod topics;

pub use snapshot::InvalidSnapshot;

use super::command::{self, command::Command as Kind};
use super::name::NameError;
use crate::topic_config::TopicValues;
use headwater_proto::TopicId;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Everything the metadata says, after the command with [`index`](MetadataState::index). Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct MetadataState {
    index: u64,
    cluster_id: String,
    brokers: BTreeMap<i32, command::Broker>,
    topics: BTreeMap<String, Arc<Topic>>,
    names: HashMap<TopicId, String>,
    next_producer_id: i64,
    /// For ids that go on under a later epoch than their first: the newest, and the index of the command that gave it out.
    producer_epochs: Arc<BTreeMap<i64, (i16, u64)>>,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// What it is called.
    pub name: String,
    /// What it is: never given again.
    pub id: TopicId,
    /// Whether it belongs to the broker.
    pub internal: bool,
    /// The settings it has of its own.
    pub config: TopicValues,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: i64,
    /// Its partitions; the place is the number.
    pub partitions: Vec<Partition>,
}

/// Who keeps a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The broker that leads it.
    pub leader: i32,
    /// How often its leadership has been given.
    pub leader_epoch: i32,
    /// The brokers that keep it.
    pub replicas: Vec<i32>,
    /// Those of them that have everything that was acknowledged.
    pub isr: Vec<i32>,
}

/// What an accepted command did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The broker has now registered this often.
    BrokerRegistered {
        /// Its boot counter.
        boots: u64,
    },
    /// A topic was created.
    TopicCreated(TopicId),
    /// A topic's settings, or the number of its partitions, are new.
    TopicChanged(TopicId),
    /// A topic is gone.
    TopicDeleted(TopicId),
    /// Producer ids `first..first + count` belong to whoever asked.
    ProducerIds {
        /// The first id.
        first: i64,
        /// How many.
        count: u32,
    },
    /// A producer may go on under this epoch.
    ProducerEpoch(i16),
    /// Imported topics were added; those that the metadata knew already were left as they are.
    TopicsImported {
        /// How many were new.
        added: usize,
    },
}

/// Why a command was not applied. The state is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Indexes only grow.
    #[error("command {index} does not come after {applied}")]
    OutOfOrder {
        /// The command's index.
        index: u64,
        /// The last one applied.
        applied: u64,
    },
    /// A command that this build does not know, or one with a part missing.
    #[error("the command {0}: it was written by a newer Headwater, or is damaged")]
    Unknown(&'static str),
    /// The name is not allowed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The name is taken.
    #[error("topic {0} exists already")]
    TopicExists(String),
    /// A topic's name differs only by '.' and '_'.
    #[error("topic {name} collides with {with}: Kafka keeps names apart that differ only by '.' and '_'")]
    Collision {
        /// The name that was asked for.
        name: String,
        /// The topic that exists.
        with: String,
    },
    /// The id is taken.
    #[error("topic id {0} is taken")]
    IdTaken(TopicId),
    /// No topic has this id.
    #[error("no topic has the id {0}: it was deleted")]
    UnknownTopicId(TopicId),
    /// Too few or too many partitions.
    #[error("topic {topic} cannot have {asked} partitions: {why}")]
    InvalidPartitions {
        /// The topic's name.
        topic: String,
        /// How many were asked for.
        asked: usize,
        /// What is legal.
        why: String,
    },
    /// A partition without replicas, with one twice, or on a broker that never registered.
    #[error("partition {topic}-{partition} cannot be kept on brokers {replicas:?}: {why}")]
    InvalidReplicas {
        /// The topic's name.
        topic: String,
        /// The partition.
        partition: usize,
        /// The brokers that were named.
        replicas: Vec<i32>,
        /// What is wrong.
        why: &'static str,
    },
    /// A broker that never registered.
    #[error("broker {0} is not registered")]
    UnknownBroker(i32),
    /// There are no more producer ids.
    #[error("no producer ids are left")]
    ProducerIdsExhausted,
    /// Nobody has this producer id.
    #[error("producer id {0} was never given out: ask for one")]
    UnknownProducerId(i64),
    /// Nobody has this epoch of the producer id.
    #[error("epoch {given} of producer id {producer_id} was never given out: the newest is {newest}")]
    UnknownProducerEpoch {
        /// The id.
        producer_id: i64,
        /// The epoch that was named.
        given: i32,
        /// The newest one.
        newest: i16,
    },
    /// The producer id has no further epoch.
    #[error("producer id {0} has no epochs left: ask for another")]
    ProducerEpochsExhausted(i64),
}

impl MetadataState {
    /// The state of a cluster before its first command.
    pub fn new(cluster_id: impl Into<String>) -> MetadataState {
        MetadataState {
            index: 0,
            cluster_id: cluster_id.into(),
            brokers: BTreeMap::new(),
            topics: BTreeMap::new(),
            names: HashMap::new(),
            next_producer_id: 0,
            producer_epochs: Arc::default(),
        }
    }

    /// The index of the last command applied: the state's version.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The cluster's identity.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Every broker that ever registered, by id.
    pub fn brokers(&self) -> impl Iterator<Item = &command::Broker> {
        self.brokers.values()
    }

    /// A broker's registration.
    pub fn broker(&self, broker_id: i32) -> Option<&command::Broker> {
        self.brokers.get(&broker_id)
    }

    /// Every topic, by name.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.topics.values()
    }

    /// The topic of this name.
    pub fn topic(&self, name: &str) -> Option<&Arc<Topic>> {
        self.topics.get(name)
    }

    /// The topic with this id.
    pub fn topic_by_id(&self, id: &TopicId) -> Option<&Arc<Topic>> {
        self.topics.get(self.names.get(id)?)
    }

    /// The first producer id that belongs to nobody.
    pub fn next_producer_id(&self) -> i64 {
        self.next_producer_id
    }

    /// The newest epoch of a producer id that was given out, as far as it is known: 0 is that of every id at first.
    pub fn producer_epoch(&self, producer_id: i64) -> i16 {
        self.producer_epochs.get(&producer_id).map_or(0, |(epoch, _)| *epoch)
    }

    /// Applies one command.
    ///
    /// # Errors
    /// [`Refusal`]; the state is as it was.
    pub fn apply(&mut self, index: u64, command: &command::Command) -> Result<Outcome, Refusal> {
        if index <= self.index {
            return Err(Refusal::OutOfOrder { index, applied: self.index });
        }
        let outcome = match command.command.as_ref().ok_or(Refusal::Unknown("has no known kind"))? {
            Kind::RegisterBroker(register) => Ok(self.register(register)),
            Kind::CreateTopic(create) => self.create(create),
            Kind::AlterTopic(alter) => self.alter(alter),
            Kind::AddPartitions(add) => self.add_partitions(add),
            Kind::DeleteTopic(delete) => self.delete(delete),
            Kind::AllocateProducerIds(allocate) => self.allocate(allocate),
            Kind::ImportTopics(import) => self.import(import),
            Kind::NextProducerEpoch(next) => self.next_epoch(index, next),
        }?;
        self.index = index;
        Ok(outcome)
    }
}

impl From<Kind> for command::Command {
    fn from(kind: Kind) -> Self {
        command::Command { command: Some(kind) }
    }
}

fn topic_id(bytes: &[u8]) -> Result<TopicId, Refusal> {
    TopicId::from_slice(bytes).ok_or(Refusal::Unknown("holds a topic id that is not sixteen bytes long"))
}

#[cfg(test)]
mod tests;
