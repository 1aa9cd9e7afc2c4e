//! Brokers: how they come into the cluster, stop being trusted, and leave it; and which of them is the controller.
//!
//! Leadership and a place among the in-sync replicas belong to a broker's *incarnation*, one start of it. Registering a new
//! one ends everything that the old one held, in the same command.
//!
//! Owns: registrations, fencing, draining, the controller's office, the feature level. Refuses: who leads then
//! ([`super::elections`]). Read next: [`super::partitions`].

use super::super::command;
use super::partitions::{Partition, remove};
use super::{MetadataState, Outcome, Refusal, topic_id};
use crate::planted::{Bug, planted};
use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::wire::RaftStart;
use std::collections::BTreeSet;
use uuid::Uuid;

/// A broker's registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broker {
    /// Which broker it is.
    pub id: i32,
    /// Which start of it: what it drew at random.
    pub incarnation: Uuid,
    /// How often its disk was started, as far as the cluster goes by it: a broker that hears of another number than its own
    /// takes this one.
    pub boots: u64,
    /// Where it is reached.
    pub address: String,
    /// Where it stands; empty: nobody said.
    pub rack: String,
    /// Whether it may lead and be in sync.
    pub state: BrokerState,
    /// When it registered, in milliseconds since 1970.
    pub registered_ms: i64,
    /// The index of its registration.
    pub epoch: u64,
    /// Its disk; empty: nobody said.
    pub directory_id: String,
    /// The highest feature level that it can.
    pub feature_level: u32,
    /// Which member of the metadata quorum it is; 0: nobody said.
    pub node_id: u64,
    /// Which members it was before its disk was emptied: the last [`MAX_FORMER_MEMBERS`], of whom nobody is any any more.
    pub former_node_ids: Vec<u64>,
    /// It is to keep nothing: it is given no partition, as a person said (`cluster drain`).
    pub is_emptied: bool,
}

/// Most members that a broker is known to have been.
const MAX_FORMER_MEMBERS: usize = 8;

impl Broker {
    /// Whether a member of the metadata quorum is this broker, or was it before its disk was emptied.
    pub fn is_or_was(&self, node_id: u64) -> bool {
        self.node_id == node_id || self.former_node_ids.contains(&node_id)
    }

    /// Whether a start of its disk is none that may come: the disk was started less often than the cluster knows, and knows nothing of
    /// the start that the cluster knows. It is an older copy of the disk, then, and has forgotten what it promised since.
    pub fn is_older_copy(&self, start: &RaftStart) -> bool {
        let is_known = |incarnation: &[u8]| incarnation == self.incarnation.as_bytes();
        start.boots <= self.boots && !is_known(&start.incarnation) && !start.tried.iter().any(|tried| is_known(tried))
    }

    /// The members that it was, as of a registration as this one.
    fn former_as(&self, node_id: u64) -> Vec<u64> {
        let all = self.former_node_ids.iter().copied().chain([self.node_id]);
        let mut former: Vec<u64> = all.filter(|id| *id != 0 && *id != node_id).collect();
        former.drain(..former.len().saturating_sub(MAX_FORMER_MEMBERS));
        former
    }

    /// Whether partitions may be placed on it, or moved there, by a plan.
    pub fn takes_partitions(&self) -> bool {
        self.state == BrokerState::Active && !self.is_emptied
    }
}

/// What a broker may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokerState {
    /// It is in no ISR, leads nothing and is not elected.
    Fenced,
    /// Everything.
    Active,
    /// It is about to stop: it leads on only where nobody else can, and is not elected.
    Draining,
}

impl BrokerState {
    /// The word shown to people and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            BrokerState::Fenced => "fenced",
            BrokerState::Active => "active",
            BrokerState::Draining => "draining",
        }
    }
}

impl MetadataState {
    pub(super) fn register(&mut self, index: u64, register: &command::RegisterBroker) -> Result<Outcome, Refusal> {
        let broker_id = register.broker_id;
        let known = self.brokers.get(&broker_id);
        let mut broker = Broker {
            id: broker_id,
            incarnation: incarnation_from_wire(&register.incarnation)?,
            boots: register.boots,
            address: register.address.clone(),
            rack: register.rack.clone(),
            state: BrokerState::Fenced,
            registered_ms: register.registered_ms,
            epoch: index,
            directory_id: register.directory_id.clone(),
            feature_level: register.feature_level.max(1),
            node_id: register.node_id,
            former_node_ids: known.map_or_else(Vec::new, |known| known.former_as(register.node_id)),
            is_emptied: known.is_some_and(|known| known.is_emptied),
        };
        if register.boots == 0 {
            broker.boots = known.map_or(0, |known| known.boots) + 1;
            broker.state = BrokerState::Active;
            return Ok(self.register_alone(broker));
        }
        if broker_id < 0 || broker.incarnation.is_nil() {
            return Err(Refusal::Unknown("registers a broker without a number or an incarnation"));
        }
        if broker.feature_level < self.feature_level {
            let (able, level) = (broker.feature_level, self.feature_level);
            return Err(Refusal::FeatureLevel { broker_id, able, level });
        }
        let mut is_other_disk = false;
        if let Some(known) = known {
            if known.incarnation == broker.incarnation {
                // Said twice.
                return Ok(Outcome::BrokerRegistered { boots: known.boots });
            }
            // An older disk, or an emptied one. Whoever registered long ago, and comes late, does not name what stands here.
            // Nor may one that counts as many be told to come again: it would have counted one more by then, and be believed.
            let is_older = register.boots <= known.boots
                && (register.replaces == known.epoch || planted(Bug::LateRegistrationObeyed));
            if register.boots <= known.boots && !is_older {
                return Err(Refusal::StaleBoots { broker_id, given: register.boots, known: known.boots });
            }
            if is_older {
                broker.boots = known.boots + 1;
            }
            is_other_disk = is_older || (!known.directory_id.is_empty() && known.directory_id != broker.directory_id);
        }
        let lost = replicas_of(&register.lost)?;
        let boots = broker.boots;
        self.brokers.insert(broker_id, broker);
        self.end_office_of(broker_id);
        self.change_partitions(is_on(broker_id), |topic, number, partition, _| {
            let is_lost = lost.contains(&(*topic, number)) && !planted(Bug::LossNotBelieved);
            let is_other_disk = is_other_disk && !planted(Bug::OtherDiskBelieved);
            // Recovery has looked at what the disk fenced. If the replica was the last one that was in sync it has everything; not if it was
            // lost before, and somebody brought back what may be an older copy.
            let was_lost = remove(&mut partition.lost, broker_id);
            let is_whole = remove(&mut partition.fenced, broker_id) && !was_lost && !is_other_disk && !is_lost;
            if is_whole && remove(&mut partition.last_known, broker_id) {
                partition.elr.push(broker_id);
            }
            if is_other_disk || is_lost {
                partition.lost.push(broker_id);
            }
            if !(planted(Bug::LeadershipResumed) && partition.leader == broker_id) {
                partition.leave(broker_id, !is_other_disk && !is_lost);
            }
        });
        Ok(Outcome::BrokerRegistered { boots })
    }

    /// A registration from before there were clusters: the one broker there is goes on at once.
    fn register_alone(&mut self, broker: Broker) -> Outcome {
        let (broker_id, boots) = (broker.id, broker.boots);
        self.brokers.insert(broker_id, broker);
        self.end_office_of(broker_id);
        self.change_partitions(is_on(broker_id), |_, _, partition, _| {
            if partition.leader == broker_id {
                partition.leader_epoch = partition.leader_epoch.saturating_add(1);
            }
        });
        Outcome::BrokerRegistered { boots }
    }

    pub(super) fn become_controller(
        &mut self,
        index: u64,
        become_controller: &command::BecomeController,
    ) -> Result<Outcome, Refusal> {
        let broker = self.incarnation_mut(become_controller.broker_id, &become_controller.incarnation)?;
        self.controller = Some((broker.id, broker.incarnation));
        self.controller_epoch = index;
        Ok(Outcome::ControllerChanged { epoch: index })
    }

    pub(super) fn fence(&mut self, fence: &command::FenceBroker) -> Result<Outcome, Refusal> {
        let broker_id = fence.broker_id;
        self.incarnation_mut(broker_id, &fence.incarnation)?.state = BrokerState::Fenced;
        let partitions = self.change_partitions(is_on(broker_id), |_, _, partition, _| {
            if planted(Bug::FencedStaysInSync) && partition.leader != broker_id {
                return;
            }
            partition.leave(broker_id, true);
        });
        Ok(Outcome::BrokerChanged { broker_id, partitions })
    }

    pub(super) fn unfence(&mut self, unfence: &command::UnfenceBroker) -> Result<Outcome, Refusal> {
        let broker_id = unfence.broker_id;
        let broker = self.incarnation_mut(broker_id, &unfence.incarnation)?;
        if broker.state == BrokerState::Draining {
            return Err(Refusal::Draining(broker_id));
        }
        broker.state = BrokerState::Active;
        let elects = |partition: &Partition| is_on(broker_id)(partition) && !planted(Bug::NoElectionAtUnfence);
        let partitions = self.change_partitions(elects, |_, _, _, _| {});
        Ok(Outcome::BrokerChanged { broker_id, partitions })
    }

    pub(super) fn drain(&mut self, drain: &command::DrainBroker) -> Result<Outcome, Refusal> {
        let broker_id = drain.broker_id;
        let broker = self.incarnation_mut(broker_id, &drain.incarnation)?;
        if broker.state == BrokerState::Fenced {
            return Err(Refusal::Fenced(broker_id));
        }
        broker.state = BrokerState::Draining;
        let partitions = self.change_partitions(is_on(broker_id), |_, _, partition, rules| {
            if partition.isr.iter().any(|other| rules.is_active(*other)) || planted(Bug::DrainedOfTheLast) {
                partition.leave(broker_id, !planted(Bug::DrainedOfTheLast));
            }
        });
        Ok(Outcome::BrokerChanged { broker_id, partitions })
    }

    pub(super) fn empty_broker(&mut self, empty: &command::EmptyBroker) -> Result<Outcome, Refusal> {
        let broker_id = empty.broker_id;
        let broker = self.brokers.get_mut(&broker_id).ok_or(Refusal::UnknownBroker(broker_id))?;
        broker.is_emptied = empty.is_emptied;
        Ok(Outcome::BrokerChanged { broker_id, partitions: 0 })
    }

    pub(super) fn remove_broker(&mut self, remove: &command::RemoveBroker) -> Result<Outcome, Refusal> {
        let broker_id = remove.broker_id;
        if !self.brokers.contains_key(&broker_id) {
            return Err(Refusal::UnknownBroker(broker_id));
        }
        for topic in self.topics.values() {
            if let Some(partition) = topic.partitions.iter().position(is_on(broker_id)) {
                return Err(Refusal::HasReplicas { broker_id, topic: topic.name.clone(), partition });
            }
        }
        self.brokers.remove(&broker_id);
        self.end_office_of(broker_id);
        Ok(Outcome::BrokerChanged { broker_id, partitions: 0 })
    }

    pub(super) fn fence_replicas(&mut self, fence: &command::FenceReplicas) -> Result<Outcome, Refusal> {
        let broker_id = fence.broker_id;
        self.incarnation_mut(broker_id, &fence.incarnation)?;
        let replicas = replicas_of(&fence.replicas)?;
        let partitions = self.change_partitions(is_on(broker_id), |topic, number, partition, _| {
            if replicas.contains(&(*topic, number)) {
                if !partition.fenced.contains(&broker_id) {
                    partition.fenced.push(broker_id);
                }
                partition.leave(broker_id, false);
            }
        });
        Ok(Outcome::BrokerChanged { broker_id, partitions })
    }

    /// A disk came back, or a replica begins anew. If it was the last one that was in sync, and was not lost, it has everything, and leads
    /// again.
    pub(super) fn restore_replicas(&mut self, restore: &command::RestoreReplicas) -> Result<Outcome, Refusal> {
        let broker_id = restore.broker_id;
        self.incarnation_mut(broker_id, &restore.incarnation)?;
        let replicas = replicas_of(&restore.replicas)?;
        let partitions = self.change_partitions(is_on(broker_id), |topic, number, partition, _| {
            let is_restored = replicas.contains(&(*topic, number)) && remove(&mut partition.fenced, broker_id);
            let has_its_log = !partition.lost.contains(&broker_id) || planted(Bug::LostRestored);
            if is_restored && has_its_log && remove(&mut partition.last_known, broker_id) {
                partition.elr.push(broker_id);
            }
        });
        Ok(Outcome::BrokerChanged { broker_id, partitions })
    }

    pub(super) fn raise_feature_level(&mut self, raise: &command::RaiseFeatureLevel) -> Result<Outcome, Refusal> {
        let level = raise.level;
        if level < self.feature_level {
            return Err(Refusal::FeatureLevelFalls { asked: level, level: self.feature_level });
        }
        if let Some(broker) = self.brokers.values().find(|broker| broker.feature_level < level) {
            return Err(Refusal::FeatureLevel { broker_id: broker.id, able: broker.feature_level, level });
        }
        self.feature_level = level;
        Ok(Outcome::FeatureLevelRaised(level))
    }

    /// The broker, if this is the incarnation that it registered.
    pub(super) fn incarnation(&self, broker_id: i32, incarnation: &[u8]) -> Result<&Broker, Refusal> {
        let given = incarnation_from_wire(incarnation)?;
        let broker = self.brokers.get(&broker_id).ok_or(Refusal::UnknownBroker(broker_id))?;
        match broker.incarnation == given {
            true => Ok(broker),
            false => Err(Refusal::StaleIncarnation { broker_id, given, registered: broker.incarnation }),
        }
    }

    fn incarnation_mut(&mut self, broker_id: i32, incarnation: &[u8]) -> Result<&mut Broker, Refusal> {
        self.incarnation(broker_id, incarnation)?;
        self.brokers.get_mut(&broker_id).ok_or(Refusal::UnknownBroker(broker_id))
    }

    /// A broker that started anew, or is gone, is not the controller that it was. The epoch stays: it never falls.
    fn end_office_of(&mut self, broker_id: i32) {
        self.controller = self.controller.filter(|(controller, _)| *controller != broker_id);
    }
}

/// Whether a partition is kept on a broker.
fn is_on(broker_id: i32) -> impl Fn(&Partition) -> bool {
    move |partition| partition.replicas.contains(&broker_id)
}

fn replicas_of(named: &[command::TopicPartition]) -> Result<BTreeSet<(TopicId, u32)>, Refusal> {
    named.iter().map(|replica| Ok((topic_id(&replica.topic_id)?, replica.partition))).collect()
}

/// As an incarnation stands in commands. Journals of before there were clusters may have none.
pub(super) fn incarnation_to_wire(incarnation: Uuid) -> Bytes {
    if incarnation.is_nil() { Bytes::new() } else { Bytes::copy_from_slice(incarnation.as_bytes()) }
}

pub(super) fn incarnation_from_wire(bytes: &[u8]) -> Result<Uuid, Refusal> {
    match bytes {
        [] => Ok(Uuid::nil()),
        _ => Uuid::from_slice(bytes).map_err(|_| Refusal::Unknown("holds an incarnation of another length than 16")),
    }
}
