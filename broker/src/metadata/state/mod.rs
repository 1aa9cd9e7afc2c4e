//! The metadata state machine: `apply(index, command)`, nothing else changes it.
//!
//! Invariants, checked after every command in tests: names and ids of topics belong together one to one; what
//! [`Partition::check`] says; whoever leads or is in sync is registered and not fenced; epochs, the controller's epoch and
//! the next producer id never fall; no two leaderships of a partition have one epoch; a producer id belongs to one block at
//! most; an epoch of it is given out only to whoever has the one before. A refused command changes nothing.
//!
//! Who sends what: a controller's command carries its epoch, and is refused once another is in office. A person's carries an
//! id, and is applied once. What belongs to one start of a broker carries its incarnation.
//!
//! Owns: what commands mean and which are refused. Refuses: clocks, random numbers, files, and the legality of settings
//! ([`crate::topic_config`] checks values before they are proposed, so that replaying old commands never depends on
//! the table of today). Read next: [`partitions`], [`elections`], [`brokers`].

mod applied;
mod brokers;
mod elections;
mod levels;
mod partitions;
mod producers;
mod reassignments;
mod recovery;
mod snapshot;
mod topics;

pub use brokers::{Broker, BrokerState};
pub use levels::FEATURE_LEVEL;
pub(crate) use levels::{EMPTIED_LEVEL, RESTORED_LEVEL};
pub use partitions::{NO_LEADER, Partition};
pub use snapshot::InvalidSnapshot;

use super::command::{self, command::Command as Kind};
use super::name::NameError;
use crate::planted::{Bug, planted};
use crate::topic_config::TopicValues;
use applied::{AppliedCommands, command_id};
use headwater_proto::TopicId;
use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Everything the metadata says, after the command with [`index`](MetadataState::index). Cheap to clone, and what two states have in common
/// is shared, however many topics there are.
#[derive(Debug, Clone, PartialEq)]
pub struct MetadataState {
    index: u64,
    cluster_id: String,
    brokers: BTreeMap<i32, Broker>,
    topics: OrdMap<String, Arc<Topic>>,
    names: OrdMap<TopicId, String>,
    /// What no other name may be like, and the name.
    alike: OrdSet<(String, String)>,
    next_producer_id: i64,
    /// For ids that go on under a later epoch than their first: the newest, and the index of the command that gave it out.
    producer_epochs: Arc<BTreeMap<i64, (i16, u64)>>,
    controller: Option<(i32, Uuid)>,
    controller_epoch: u64,
    feature_level: u32,
    applied: AppliedCommands,
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
    /// What counts where it has no `min.insync.replicas` of its own.
    pub default_min_insync_replicas: u32,
    /// Its partitions; the place is the number.
    pub partitions: Vec<Partition>,
}

/// What became of a topic's name between two states.
#[derive(Debug, Clone, Copy)]
pub struct TopicSince<'a> {
    /// The topic of this name that there was.
    pub before: Option<&'a Arc<Topic>>,
    /// That there is: another one where the ids differ.
    pub now: Option<&'a Arc<Topic>>,
}

/// What an accepted command did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The broker has now registered this often.
    BrokerRegistered {
        /// Its boot counter. If that is not what it said, it goes by this one from now on.
        boots: u64,
    },
    /// A broker was fenced, unfenced, drained or removed, or replicas of it fenced.
    BrokerChanged {
        /// Which one.
        broker_id: i32,
        /// How many partitions are not what they were.
        partitions: usize,
    },
    /// A controller is in office.
    ControllerChanged {
        /// Its epoch.
        epoch: u64,
    },
    /// Commands up to this level may be proposed.
    FeatureLevelRaised(u32),
    /// So many partitions are not what they were.
    PartitionsChanged(usize),
    /// A leader's word on who is in sync counts.
    PartitionAltered {
        /// The partition's leader epoch now: another one where the leader handed over with this.
        leader_epoch: i32,
        /// Its epoch now.
        partition_epoch: i32,
    },
    /// What leaders said of who is in sync.
    PartitionsAltered {
        /// How many count.
        changed: usize,
        /// The places of those that name a member which may not be in sync: they never come into force.
        refused: Vec<u32>,
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
    /// The broker started anew since, or another process took its number.
    #[error("incarnation {given} of broker {broker_id} is not the one that registered, {registered}")]
    StaleIncarnation {
        /// The broker.
        broker_id: i32,
        /// Who the command speaks of.
        given: Uuid,
        /// Who counts.
        registered: Uuid,
    },
    /// A disk that was started less often than the cluster knows, or as often by another process.
    #[error(
        "broker {broker_id} was started {known} times as the cluster knows it, this disk {given} times: it is an older copy of the disk, or another broker has its number"
    )]
    StaleBoots {
        /// The broker.
        broker_id: i32,
        /// What the disk says.
        given: u64,
        /// What the cluster knows.
        known: u64,
    },
    /// The command comes from a controller that is not in office.
    #[error("the controller of epoch {given} is not in office: the last epoch is {current}")]
    StaleController {
        /// The command's.
        given: u64,
        /// The newest.
        current: u64,
    },
    /// The broker is fenced.
    #[error("broker {0} is fenced: it has nothing to hand over")]
    Fenced(i32),
    /// The broker is about to stop.
    #[error("broker {0} drains: only its next start makes it active")]
    Draining(i32),
    /// The topic has no such partition.
    #[error("topic {topic} has no partition {partition}")]
    UnknownPartition {
        /// The topic.
        topic: String,
        /// The number that was given.
        partition: u32,
    },
    /// Only a partition's leader says who is in sync.
    #[error("broker {broker_id} does not lead the partition: {leader} does (-1: nobody)")]
    NotLeader {
        /// Who said it.
        broker_id: i32,
        /// Who leads.
        leader: i32,
    },
    /// The command is of another leadership.
    #[error("the command is of leader epoch {given}, the partition in {current}")]
    LeaderEpoch {
        /// The command's.
        given: i32,
        /// The partition's.
        current: i32,
    },
    /// The partition is not what it was when the command was decided.
    #[error("the command is of partition epoch {given}, the partition in {current}")]
    PartitionEpoch {
        /// The command's.
        given: i32,
        /// The partition's.
        current: i32,
    },
    /// A broker that cannot be in sync.
    #[error("broker {broker_id} cannot be in sync: it {why}")]
    IneligibleReplica {
        /// The broker.
        broker_id: i32,
        /// What keeps it out.
        why: &'static str,
    },
    /// The partition moves elsewhere.
    #[error("{topic}-{partition} moves to brokers {target:?} already: wait for that, or cancel it first")]
    Reassigning {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// Where it moves.
        target: Vec<i32>,
    },
    /// The partition does not move.
    #[error("{topic}-{partition} is not being reassigned")]
    NotReassigning {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
    },
    /// Going back would lose records.
    #[error("{topic}-{partition} cannot stay where it was: only replicas that it moves to have everything")]
    NoWayBack {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
    },
    /// The broker cannot be removed.
    #[error("broker {broker_id} keeps {topic}-{partition}: move its replicas to other brokers first")]
    HasReplicas {
        /// The broker.
        broker_id: i32,
        /// The topic of one of them.
        topic: String,
        /// Its partition.
        partition: usize,
    },
    /// The broker does not understand what the cluster may say.
    #[error("broker {broker_id} can feature level {able}, not {level}: run a newer Headwater on it")]
    FeatureLevel {
        /// The broker.
        broker_id: i32,
        /// What it can.
        able: u32,
        /// What it has to.
        level: u32,
    },
    /// Brokers that run an older Headwater would not understand the command.
    #[error(
        "{what} needs feature level {needed}, and the cluster is at {level}: `headwater cluster upgrade --finalize` raises it once every broker can"
    )]
    AboveFeatureLevel {
        /// What the command would do.
        what: &'static str,
        /// The level it needs.
        needed: u32,
        /// What it is.
        level: u32,
    },
    /// A feature level is for good.
    #[error("the feature level is {level} and cannot become {asked}: it never falls")]
    FeatureLevelFalls {
        /// What was asked for.
        asked: u32,
        /// What it is.
        level: u32,
    },
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
            topics: OrdMap::new(),
            names: OrdMap::new(),
            alike: OrdSet::new(),
            next_producer_id: 0,
            producer_epochs: Arc::default(),
            controller: None,
            controller_epoch: 0,
            feature_level: 1,
            applied: AppliedCommands::default(),
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

    /// Every broker that registered and was not removed, by id.
    pub fn brokers(&self) -> impl Iterator<Item = &Broker> {
        self.brokers.values()
    }

    /// A broker's registration.
    pub fn broker(&self, broker_id: i32) -> Option<&Broker> {
        self.brokers.get(&broker_id)
    }

    /// Every topic, by name.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.topics.values()
    }

    /// What became of topics since a state before, in the order of their names: it takes as long as there is of it, not as there are topics.
    pub fn topics_since<'a>(&'a self, before: &'a MetadataState) -> impl Iterator<Item = TopicSince<'a>> {
        before.topics.diff(&self.topics).map(|item| match item {
            DiffItem::Add(_, now) => TopicSince { before: None, now: Some(now) },
            DiffItem::Update { old: (_, before), new: (_, now) } => TopicSince { before: Some(before), now: Some(now) },
            DiffItem::Remove(_, before) => TopicSince { before: Some(before), now: None },
        })
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

    /// The broker that is the controller, and which start of it.
    pub fn controller(&self) -> Option<(i32, Uuid)> {
        self.controller
    }

    /// The epoch of the newest controller, in office or not; 0: there was none.
    pub fn controller_epoch(&self) -> u64 {
        self.controller_epoch
    }

    /// Commands up to this level may be proposed.
    pub fn feature_level(&self) -> u32 {
        self.feature_level
    }

    /// Whether a person's command of this id was applied, as far as that is remembered.
    pub fn has_applied(&self, id: &[u8]) -> bool {
        self.outcome(id).is_some()
    }

    /// What came of a person's command of this id, as far as that is remembered.
    pub fn outcome(&self, id: &[u8]) -> Option<&Outcome> {
        self.applied.outcome(&command_id(id).ok().flatten()?)
    }

    /// Applies one command.
    ///
    /// # Errors
    /// [`Refusal`]; the state is as it was.
    pub fn apply(&mut self, index: u64, command: &command::Command) -> Result<Outcome, Refusal> {
        if index <= self.index {
            return Err(Refusal::OutOfOrder { index, applied: self.index });
        }
        let kind = command.command.as_ref().ok_or(Refusal::Unknown("has no known kind"))?;
        let id = command_id(&command.command_id)?;
        let known = id.and_then(|id| self.applied.outcome(&id)).filter(|_| !planted(Bug::AppliedTwice));
        if let Some(outcome) = known.cloned() {
            self.index = index;
            return Ok(outcome);
        }
        levels::check(kind, self.feature_level)?;
        self.check_controller(command.controller_epoch, matches!(kind, Kind::FenceBroker(_) | Kind::UnfenceBroker(_)))?;
        let outcome = match kind {
            Kind::RegisterBroker(register) => self.register(index, register),
            Kind::CreateTopic(create) => self.create(create),
            Kind::AlterTopic(alter) => self.alter(alter),
            Kind::AddPartitions(add) => self.add_partitions(add),
            Kind::DeleteTopic(delete) => self.delete(delete),
            Kind::AllocateProducerIds(allocate) => self.allocate(allocate),
            Kind::ImportTopics(import) => self.import(import),
            Kind::NextProducerEpoch(next) => self.next_epoch(index, next),
            Kind::BecomeController(become_controller) => self.become_controller(index, become_controller),
            Kind::FenceBroker(fence) => self.fence(fence),
            Kind::UnfenceBroker(unfence) => self.unfence(unfence),
            Kind::DrainBroker(drain) => self.drain(drain),
            Kind::EmptyBroker(empty) => self.empty_broker(empty),
            Kind::RemoveBroker(remove) => self.remove_broker(remove),
            Kind::FenceReplicas(fence) => self.fence_replicas(fence),
            Kind::RestoreReplicas(restore) => self.restore_replicas(restore),
            Kind::RaiseFeatureLevel(raise) => self.raise_feature_level(raise),
            Kind::AlterPartition(alter) => self.alter_partition(alter),
            Kind::AlterPartitions(alter) => Ok(self.alter_partitions(alter)),
            Kind::ElectLeaders(elect) => self.elect_leaders(elect),
            Kind::Reassign(reassign) => self.reassign(reassign),
            Kind::CancelReassignment(cancel) => self.cancel_reassignment(cancel),
        }?;
        if let Some(id) = id {
            self.applied.keep(id, &outcome);
        }
        self.index = index;
        Ok(outcome)
    }

    /// Whether the controller that sent a command is in office. Some commands are a controller's alone.
    fn check_controller(&self, given: u64, is_required: bool) -> Result<(), Refusal> {
        let in_office = self.controller.map_or(0, |_| self.controller_epoch);
        match given {
            0 if !is_required => Ok(()),
            1.. if given == in_office || planted(Bug::DeposedControllerObeyed) => Ok(()),
            _ => Err(Refusal::StaleController { given, current: self.controller_epoch }),
        }
    }
}

impl From<Kind> for command::Command {
    fn from(kind: Kind) -> Self {
        command::Command { command: Some(kind), ..command::Command::default() }
    }
}

fn topic_id(bytes: &[u8]) -> Result<TopicId, Refusal> {
    TopicId::from_slice(bytes).ok_or(Refusal::Unknown("holds a topic id that is not sixteen bytes long"))
}

#[cfg(test)]
mod cluster_tests;
#[cfg(test)]
mod partition_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod tests;
