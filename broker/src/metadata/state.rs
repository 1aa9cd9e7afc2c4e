//! The metadata state machine: `apply(index, command)`, nothing else changes it.
//!
//! Invariants, checked after every command in tests: names and ids of topics belong together one to one; a partition's
//! leader and in-sync replicas are among its replicas; leader epochs and the next producer id never fall; a producer
//! id belongs to one block at most.
//!
//! Owns: what commands mean and which are refused. Refuses: clocks, random numbers, files, and the legality of settings
//! ([`crate::topic_config`] checks values before they are proposed, so that replaying old commands never depends on
//! the table of today). Read next: [`super::journal`].

use super::command::{self, command::Command as Kind};
use super::name::{self, NameError};
use crate::topic_config::TopicValues;
use headwater_proto::TopicId;
use headwater_proto::limits::MAX_PARTITIONS_PER_TOPIC;
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
}

/// Bytes that are no snapshot of the state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot makes no sense: {0}")]
pub struct InvalidSnapshot(String);

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
        }?;
        self.index = index;
        Ok(outcome)
    }

    /// The state as a message.
    pub fn snapshot(&self) -> command::Snapshot {
        command::Snapshot {
            index: self.index,
            cluster_id: self.cluster_id.clone(),
            brokers: self.brokers.values().cloned().collect(),
            topics: self.topics.values().map(|topic| topic_message(topic)).collect(),
            next_producer_id: self.next_producer_id,
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
        state.index = snapshot.index;
        Ok(state)
    }

    fn register(&mut self, register: &command::RegisterBroker) -> Outcome {
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

    fn create(&mut self, create: &command::CreateTopic) -> Result<Outcome, Refusal> {
        let topic = new_topic(create, |_| 0)?;
        self.admit(&topic)?;
        // Topics that were imported may differ so little; those that are made here may not.
        let key = name::collision_key(&topic.name);
        if let Some(with) = self.topics.keys().find(|name| name::collision_key(name) == key) {
            return Err(Refusal::Collision { name: topic.name, with: with.clone() });
        }
        let id = topic.id;
        self.insert(topic);
        Ok(Outcome::TopicCreated(id))
    }

    fn alter(&mut self, alter: &command::AlterTopic) -> Result<Outcome, Refusal> {
        let topic = self.topic_mut(&alter.topic_id)?;
        topic.config = alter.config.clone();
        Ok(Outcome::TopicChanged(topic.id))
    }

    fn add_partitions(&mut self, add: &command::AddPartitions) -> Result<Outcome, Refusal> {
        let id = topic_id(&add.topic_id)?;
        let topic = self.topic_by_id(&id).ok_or(Refusal::UnknownTopicId(id))?;
        let asked = topic.partitions.len() + add.partitions.len();
        let refused = |why: String| Refusal::InvalidPartitions { topic: topic.name.clone(), asked, why };
        if add.from as usize != topic.partitions.len() {
            return Err(refused(format!("it has {} by now, not {}", topic.partitions.len(), add.from)));
        }
        if add.partitions.is_empty() {
            return Err(refused(format!("it has {asked} already, and partitions are only ever added")));
        }
        if asked > MAX_PARTITIONS_PER_TOPIC as usize {
            return Err(refused(format!("at most {MAX_PARTITIONS_PER_TOPIC} are allowed")));
        }
        let mut added = Vec::with_capacity(add.partitions.len());
        for (place, replicas) in add.partitions.iter().enumerate() {
            let partition = new_partition(replicas, 0);
            self.check_replicas(&topic.name, topic.partitions.len() + place, &partition)?;
            added.push(partition);
        }
        self.topic_mut(&add.topic_id)?.partitions.append(&mut added);
        Ok(Outcome::TopicChanged(id))
    }

    fn delete(&mut self, delete: &command::DeleteTopic) -> Result<Outcome, Refusal> {
        let id = topic_id(&delete.topic_id)?;
        let name = self.names.remove(&id).ok_or(Refusal::UnknownTopicId(id))?;
        self.topics.remove(&name);
        Ok(Outcome::TopicDeleted(id))
    }

    fn allocate(&mut self, allocate: &command::AllocateProducerIds) -> Result<Outcome, Refusal> {
        if !self.brokers.contains_key(&allocate.broker_id) {
            return Err(Refusal::UnknownBroker(allocate.broker_id));
        }
        let first = self.next_producer_id;
        self.next_producer_id = first.checked_add(i64::from(allocate.count)).ok_or(Refusal::ProducerIdsExhausted)?;
        Ok(Outcome::ProducerIds { first, count: allocate.count })
    }

    fn import(&mut self, import: &command::ImportTopics) -> Result<Outcome, Refusal> {
        let mut next = self.clone();
        let mut added = 0;
        for imported in &import.topics {
            let create = imported.topic.as_ref().ok_or(Refusal::Unknown("names no topic"))?;
            let epoch = |partition: usize| imported.leader_epochs.get(partition).copied().unwrap_or(0).max(0);
            let topic = new_topic(create, epoch)?;
            if next.topic(&topic.name).is_some_and(|known| known.id == topic.id) {
                continue;
            }
            next.admit(&topic)?;
            next.insert(topic);
            added += 1;
        }
        next.next_producer_id = next.next_producer_id.max(import.producer_ids_from);
        *self = next;
        Ok(Outcome::TopicsImported { added })
    }

    /// Whether a topic may come in.
    fn admit(&self, topic: &Topic) -> Result<(), Refusal> {
        name::check(&topic.name, topic.internal)?;
        if self.topics.contains_key(&topic.name) {
            return Err(Refusal::TopicExists(topic.name.clone()));
        }
        if topic.id == TopicId::ZERO || self.names.contains_key(&topic.id) {
            return Err(Refusal::IdTaken(topic.id));
        }
        let asked = topic.partitions.len();
        if asked == 0 || asked > MAX_PARTITIONS_PER_TOPIC as usize {
            return Err(Refusal::InvalidPartitions {
                topic: topic.name.clone(),
                asked,
                why: format!("it takes from 1 to {MAX_PARTITIONS_PER_TOPIC}"),
            });
        }
        topic
            .partitions
            .iter()
            .enumerate()
            .try_for_each(|(n, partition)| self.check_replicas(&topic.name, n, partition))
    }

    fn check_replicas(&self, topic: &str, number: usize, partition: &Partition) -> Result<(), Refusal> {
        let refused = |why| Refusal::InvalidReplicas {
            topic: topic.to_owned(),
            partition: number,
            replicas: partition.replicas.clone(),
            why,
        };
        let replicas = &partition.replicas;
        if replicas.is_empty() {
            return Err(refused("there are none"));
        }
        if replicas.iter().enumerate().any(|(n, broker)| replicas.iter().skip(n + 1).any(|other| other == broker)) {
            return Err(refused("one is named twice"));
        }
        if replicas.iter().any(|broker| !self.brokers.contains_key(broker)) {
            return Err(refused("one never registered"));
        }
        if !replicas.contains(&partition.leader) || partition.isr.iter().any(|broker| !replicas.contains(broker)) {
            return Err(refused("the leader and the in-sync replicas are not all among them"));
        }
        Ok(())
    }

    fn insert(&mut self, topic: Topic) {
        self.names.insert(topic.id, topic.name.clone());
        self.topics.insert(topic.name.clone(), Arc::new(topic));
    }

    fn topic_mut(&mut self, id: &[u8]) -> Result<&mut Topic, Refusal> {
        let id = topic_id(id)?;
        let name = self.names.get(&id).ok_or(Refusal::UnknownTopicId(id))?;
        self.topics.get_mut(name).map(Arc::make_mut).ok_or(Refusal::UnknownTopicId(id))
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

fn new_topic(create: &command::CreateTopic, epoch: impl Fn(usize) -> i32) -> Result<Topic, Refusal> {
    Ok(Topic {
        name: create.name.clone(),
        id: topic_id(&create.topic_id)?,
        internal: create.internal,
        config: create.config.clone(),
        created_ms: create.created_ms,
        partitions: create
            .partitions
            .iter()
            .enumerate()
            .map(|(n, replicas)| new_partition(replicas, epoch(n)))
            .collect(),
    })
}

fn new_partition(replicas: &command::Replicas, leader_epoch: i32) -> Partition {
    Partition {
        leader: replicas.brokers.first().copied().unwrap_or(-1),
        leader_epoch,
        replicas: replicas.brokers.clone(),
        isr: replicas.brokers.clone(),
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

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
