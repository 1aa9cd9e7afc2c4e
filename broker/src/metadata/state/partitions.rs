//! A partition: who keeps it, who leads it, and how that changes.
//!
//! Invariants ([`Partition::check`]): replicas are named once; in-sync and eligible replicas are among them, and nobody is
//! both; the leader is in sync, and there is one exactly where somebody is in sync; epochs never fall.
//!
//! Owns: what one partition looks like after somebody came or went, and what its leader may say of who is in sync. Refuses:
//! who is elected ([`super::elections`]), where it moves ([`super::reassignments`]).

use super::super::command;
use super::brokers::{Broker, BrokerState};
use super::topics::topic_mut;
use super::{MetadataState, Outcome, Refusal, Topic, topic_id};
use crate::planted::{Bug, planted};
use headwater_proto::TopicId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The leader of a partition that nobody leads.
pub const NO_LEADER: i32 = -1;

/// Who keeps a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The broker that leads it, or [`NO_LEADER`].
    pub leader: i32,
    /// Raised whenever a leadership ends, so that no two leaderships have one epoch; and whenever a replica is taken out.
    pub leader_epoch: i32,
    /// Raised by every change of the partition.
    pub partition_epoch: i32,
    /// The brokers that keep it, in the order in which they should lead.
    pub replicas: Vec<i32>,
    /// Those of them that have everything that was acknowledged, and without which nothing is.
    pub isr: Vec<i32>,
    /// Those that are not in sync but have everything that was acknowledged, because nothing was since: they left when too
    /// few for an acknowledgement remained.
    pub elr: Vec<i32>,
    /// Those that a disk fenced: neither in sync nor elected, until the disk came back or their broker starts.
    pub fenced: Vec<i32>,
    /// Where nobody is in sync or eligible: who was last, and was lost or fenced by its disk. To be healed from by hand.
    pub last_known: Vec<i32>,
    /// Those whose newest start said that what they had is gone, and that were not in sync since.
    pub lost: Vec<i32>,
    /// How often a leader was elected that may have missed acknowledged records.
    pub unclean_recoveries: u32,
    /// While it moves: the brokers that it moves to, in the order in which they should lead. Else empty.
    pub target: Vec<i32>,
    /// Those of the target that did not keep it before.
    pub adding: Vec<i32>,
    /// Those that will not keep it any more.
    pub removing: Vec<i32>,
    /// While it moves: what a broker that it comes to is sent in a second at most, in bytes, of all that move there. 0: no limit.
    pub throttle_bytes_per_second: u64,
}

/// What a partition's changes depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) brokers: &'a BTreeMap<i32, Broker>,
    /// The topic's min.insync.replicas.
    pub(super) min_insync_replicas: u32,
    /// The topic's unclean.leader.election.enable.
    pub(super) unclean: bool,
}

impl Partition {
    /// A partition that is new: `isr` are those of its replicas that are active.
    pub(crate) fn new(replicas: Vec<i32>, isr: Vec<i32>, leader_epoch: i32) -> Partition {
        Partition {
            leader: isr.first().copied().unwrap_or(NO_LEADER),
            leader_epoch,
            partition_epoch: 0,
            replicas,
            isr,
            elr: Vec::new(),
            fenced: Vec::new(),
            last_known: Vec::new(),
            lost: Vec::new(),
            unclean_recoveries: 0,
            target: Vec::new(),
            adding: Vec::new(),
            removing: Vec::new(),
            throttle_bytes_per_second: 0,
        }
    }

    /// What is sent to a replica in a second at most, if there is a limit: while the partition moves to it.
    pub fn throttle_of(&self, broker_id: i32) -> Option<u64> {
        let moves_there = self.adding.contains(&broker_id) && !self.isr.contains(&broker_id);
        Some(self.throttle_bytes_per_second).filter(|limit| *limit > 0 && moves_there)
    }

    /// Whether a replica that was damaged while its broker runs may be made anew: it is known to be of no use, and another broker leads.
    pub fn may_begin_anew(&self, broker_id: i32) -> bool {
        let counts = [&self.isr, &self.elr, &self.last_known].into_iter().any(|counting| counting.contains(&broker_id));
        let is_led = self.leader != NO_LEADER && self.leader != broker_id;
        is_led && self.fenced.contains(&broker_id) && !counts
    }

    /// Takes a replica out of the in-sync replicas. If it has its log it stays eligible, unless enough others remain
    /// ([`tidy`](Self::tidy)); if not, it is not eligible either.
    pub(super) fn leave(&mut self, broker_id: i32, has_its_log: bool) {
        let was_in_sync = remove(&mut self.isr, broker_id);
        if has_its_log {
            if was_in_sync && !planted(Bug::LastOneForgotten) {
                self.elr.push(broker_id);
            }
        } else {
            let was_eligible = remove(&mut self.elr, broker_id);
            if (was_in_sync || was_eligible) && self.isr.is_empty() && self.elr.is_empty() {
                self.last_known = vec![broker_id];
            }
        }
    }

    /// As many in-sync replicas as an acknowledgement needs, as far as there are replicas.
    fn enough(&self, rules: &Rules<'_>) -> usize {
        (rules.min_insync_replicas as usize).min(self.replicas.len()).max(1)
    }

    /// Puts lists right after a change. Whoever left stays eligible only while too few remain for an acknowledgement: with
    /// enough in sync, the others may miss what is acknowledged now.
    fn tidy(&mut self, rules: &Rules<'_>) {
        let Partition { isr, elr, fenced, last_known, lost, .. } = self;
        for list in [elr, fenced, lost] {
            list.retain(|broker| !isr.contains(broker));
        }
        if !isr.is_empty() {
            last_known.clear();
        }
        if self.isr.len() >= self.enough(rules) && !planted(Bug::EligibleKept) {
            self.elr.clear();
        }
    }

    /// Raises the epochs of a partition that is not what it was `before`. True: it is not.
    pub(super) fn raise_epochs(&mut self, before: &Partition) -> bool {
        if self == before {
            return false;
        }
        // Whoever is taken out may be given the partition again before it hears of either: it throws away then what it has, and what
        // it told the leader must not count any more.
        let is_taken_out = before.replicas.iter().any(|broker| !self.replicas.contains(broker))
            && !planted(Bug::EpochOutlivesReplicas);
        let is_over = (self.leader != before.leader && !planted(Bug::EpochNotRaised)) || is_taken_out;
        // An epoch that nobody led is the next leader's.
        if is_over && before.leader != NO_LEADER {
            self.leader_epoch = before.leader_epoch.saturating_add(1);
        }
        self.partition_epoch = before.partition_epoch.saturating_add(1);
        true
    }

    /// Whether what must always hold does.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), &'static str> {
        let Partition { replicas, isr, elr, fenced, last_known, lost, .. } = self;
        let among = |some: &[i32]| is_set(some) && some.iter().all(|broker| replicas.contains(broker));
        let ensure = |holds: bool, why| if holds { Ok(()) } else { Err(why) };
        ensure(!replicas.is_empty(), "there are none")?;
        ensure(is_set(replicas), "one is named twice")?;
        ensure(
            (self.leader == NO_LEADER || replicas.contains(&self.leader)) && among(isr),
            "the leader and the in-sync replicas are not all among them",
        )?;
        let are_among = [elr, fenced, last_known, lost].into_iter().all(|some| among(some));
        ensure(are_among, "the eligible and the lost are not all among them")?;
        ensure(elr.iter().chain(fenced).chain(lost).all(|broker| !isr.contains(broker)), "one is in sync and is not")?;
        ensure(fenced.iter().chain(lost).all(|broker| !elr.contains(broker)), "one is eligible and is not")?;
        ensure(isr.is_empty() == (self.leader == NO_LEADER), "some are in sync, and nobody leads")?;
        ensure(isr.is_empty() || isr.contains(&self.leader), "the leader is not in sync")?;
        ensure(last_known.is_empty() || (isr.is_empty() && elr.is_empty()), "the last one is not the last one")?;
        let Partition { target, adding, removing, .. } = self;
        ensure(among(target) && is_set(adding) && is_set(removing), "it moves to where it is not kept")?;
        ensure(adding.iter().all(|broker| target.contains(broker)), "it moves to where it shall not be kept")?;
        let is_to_go = |broker: &i32| !target.is_empty() && !target.contains(broker);
        ensure(
            replicas.iter().all(|broker| is_to_go(broker) == removing.contains(broker)),
            "who is to go is not removed",
        )?;
        ensure(removing.iter().all(is_to_go), "who is to stay is removed")?;
        ensure(self.leader_epoch >= 0 && self.partition_epoch >= 0, "an epoch is negative")
    }
}

impl Topic {
    /// In-sync replicas without which nothing is acknowledged: the topic's own value, or what counted when it was made.
    pub fn min_insync_replicas(&self) -> u32 {
        let own = self.config.get("min.insync.replicas").and_then(|value| value.parse().ok());
        own.unwrap_or(self.default_min_insync_replicas)
    }

    /// Whether a replica that may have missed acknowledged records may lead where no other can.
    pub fn unclean_leader_election(&self) -> bool {
        self.config.get("unclean.leader.election.enable").is_some_and(|value| value == "true")
    }
}

impl MetadataState {
    /// Changes every partition that `concerns`, elects where that is called for, and raises the epochs of those that are not
    /// what they were. Returns how many that are.
    pub(super) fn change_partitions(
        &mut self,
        concerns: impl Fn(&Partition) -> bool,
        mut change: impl FnMut(&TopicId, u32, &mut Partition, &Rules<'_>),
    ) -> usize {
        let (mut count, mut all) = (0, Vec::new());
        for topic in self.topics.values() {
            let rules = rules(&self.brokers, topic);
            let mut changed = Vec::new();
            for (place, partition) in topic.partitions.iter().enumerate().filter(|(_, partition)| concerns(partition)) {
                let (mut next, number) = (partition.clone(), u32::try_from(place).unwrap_or(u32::MAX));
                if next.change(&rules, |partition| change(&topic.id, number, partition, &rules)) {
                    changed.push((place, next));
                }
            }
            if changed.is_empty() {
                continue; // Whoever holds an older state holds the same topic.
            }
            count += changed.len();
            let mut topic = Topic::clone(topic);
            for (place, next) in changed {
                if let Some(partition) = topic.partitions.get_mut(place) {
                    *partition = next;
                }
            }
            all.push(topic);
        }
        for topic in all {
            self.topics.insert(topic.name.clone(), Arc::new(topic));
        }
        count
    }
}

impl Partition {
    /// Changes a partition, elects where that is called for, and raises the epochs. True: it is not what it was.
    pub(super) fn change(&mut self, rules: &Rules<'_>, change: impl FnOnce(&mut Partition)) -> bool {
        let before = self.clone();
        change(self);
        self.finish_reassignment(rules);
        self.elect(rules);
        self.tidy(rules);
        self.raise_epochs(&before)
    }
}

impl MetadataState {
    pub(super) fn alter_partition(&mut self, alter: &command::AlterPartition) -> Result<Outcome, Refusal> {
        let partition = self.partition(&alter.topic_id, alter.partition)?;
        let leader = self.member(alter.leader.as_ref())?;
        if partition.leader != leader.id {
            return Err(Refusal::NotLeader { broker_id: leader.id, leader: partition.leader });
        }
        if partition.leader_epoch != alter.leader_epoch && !planted(Bug::AlteredInAnotherEpoch) {
            return Err(Refusal::LeaderEpoch { given: alter.leader_epoch, current: partition.leader_epoch });
        }
        if partition.partition_epoch != alter.partition_epoch && !planted(Bug::AlteredInAnotherEpoch) {
            return Err(Refusal::PartitionEpoch { given: alter.partition_epoch, current: partition.partition_epoch });
        }
        let mut isr = Vec::with_capacity(alter.isr.len());
        for named in &alter.isr {
            let broker = self.member(Some(named))?;
            let ineligible = |why| Refusal::IneligibleReplica { broker_id: broker.id, why };
            if !partition.replicas.contains(&broker.id) {
                return Err(ineligible("is no replica of the partition"));
            }
            // The leader is in sync as long as it leads, and one that drains leads on where nobody can take over.
            let may_join = broker.state == BrokerState::Active || planted(Bug::FencedFollowerCounted);
            if !may_join && broker.id != leader.id {
                return Err(ineligible("is not active"));
            }
            if partition.fenced.contains(&broker.id) {
                return Err(ineligible("is fenced by its disk"));
            }
            if isr.contains(&broker.id) {
                return Err(ineligible("is named twice"));
            }
            isr.push(broker.id);
        }
        if !isr.contains(&leader.id) {
            return Err(Refusal::IneligibleReplica { broker_id: leader.id, why: "leads, and is not named" });
        }
        self.change_partition(&alter.topic_id, alter.partition, |partition, _| {
            let left = partition.isr.iter().copied().filter(|broker| !isr.contains(broker));
            partition.elr.extend(left);
            partition.isr = partition.replicas.iter().copied().filter(|broker| isr.contains(broker)).collect();
            // Also where that is nothing new: every copy of an older proposal is refused from now on.
            partition.partition_epoch = partition.partition_epoch.saturating_add(1);
        })?;
        let Partition { leader_epoch, partition_epoch, .. } = *self.partition(&alter.topic_id, alter.partition)?;
        Ok(Outcome::PartitionAltered { leader_epoch, partition_epoch })
    }

    pub(super) fn alter_partitions(&mut self, alter: &command::AlterPartitions) -> Outcome {
        let (mut changed, mut refused) = (0, Vec::new());
        for (alter, place) in alter.partitions.iter().zip(0u32..) {
            match self.alter_partition(alter) {
                Ok(_) => changed += 1,
                // Its epochs are those of now: it was not applied before under another index, and never will be.
                Err(Refusal::IneligibleReplica { .. } | Refusal::StaleIncarnation { .. }) => refused.push(place),
                Err(_) => {}
            }
        }
        Outcome::PartitionsAltered { changed, refused }
    }

    /// The registration of a broker, if this is the incarnation that it registered.
    fn member(&self, named: Option<&command::Member>) -> Result<&Broker, Refusal> {
        let named = named.ok_or(Refusal::Unknown("names no leader"))?;
        match self.broker(named.broker_id) {
            Some(broker) if planted(Bug::AlteredWithoutIncarnation) => Ok(broker),
            _ => self.incarnation(named.broker_id, &named.incarnation),
        }
    }

    /// A partition of the topic with this id.
    pub(super) fn partition(&self, topic: &[u8], number: u32) -> Result<&Partition, Refusal> {
        let id = topic_id(topic)?;
        let topic = self.topic_by_id(&id).ok_or(Refusal::UnknownTopicId(id))?;
        let unknown = || Refusal::UnknownPartition { topic: topic.name.clone(), partition: number };
        topic.partitions.get(number as usize).ok_or_else(unknown)
    }

    /// Changes one partition, as [`change_partitions`](Self::change_partitions) does. True: it is not what it was.
    pub(super) fn change_partition(
        &mut self,
        topic: &[u8],
        number: u32,
        change: impl FnOnce(&mut Partition, &Rules<'_>),
    ) -> Result<bool, Refusal> {
        let mut partition = self.partition(topic, number)?.clone();
        let MetadataState { names, topics, brokers, .. } = self;
        let topic = topic_mut(names, topics, topic)?;
        let rules = rules(brokers, topic);
        let changed = partition.change(&rules, |partition| change(partition, &rules));
        if let Some(place) = topic.partitions.get_mut(number as usize) {
            *place = partition;
        }
        Ok(changed)
    }
}

/// What the changes of a topic's partitions depend on.
pub(super) fn rules<'a>(brokers: &'a BTreeMap<i32, Broker>, topic: &Topic) -> Rules<'a> {
    Rules { brokers, min_insync_replicas: topic.min_insync_replicas(), unclean: topic.unclean_leader_election() }
}

/// Takes a broker out of a list. True: it was in there.
pub(super) fn remove(list: &mut Vec<i32>, broker_id: i32) -> bool {
    let before = list.len();
    list.retain(|listed| *listed != broker_id);
    list.len() < before
}

/// Whether none is named twice.
pub(super) fn is_set(list: &[i32]) -> bool {
    list.iter().enumerate().all(|(n, broker)| list.iter().skip(n + 1).all(|other| other != broker))
}
