//! Reassignments: a partition moves to other brokers.
//!
//! While it moves it is kept by those it leaves and those it comes to. It is where it shall be once all of those are in
//! sync; the others leave then, in the same command that brought the last of them in sync.
//!
//! Owns: where a partition moves, and when it has. Read next: [`super::partitions`].

use super::super::command;
use super::partitions::{Partition, Rules};
use super::topics::invalid_replicas;
use super::{MetadataState, Outcome, Refusal};
use crate::planted::{Bug, planted};

impl MetadataState {
    pub(super) fn reassign(&mut self, reassign: &command::Reassign) -> Result<Outcome, Refusal> {
        let (topic, number, target) = (&reassign.topic_id, reassign.partition, &reassign.replicas);
        let partition = self.partition(topic, number)?;
        if !partition.target.is_empty() && partition.target != *target {
            let target = partition.target.clone();
            return Err(Refusal::Reassigning { topic: self.name_of(topic)?, partition: number, target });
        }
        let wanted = Partition::new(target.clone(), Vec::new(), 0);
        let registered = |()| match target.iter().all(|broker| self.brokers.contains_key(broker)) {
            true => Ok(()),
            false => Err("one never registered"),
        };
        if let Err(why) = wanted.check().and_then(registered) {
            return Err(invalid_replicas(&self.name_of(topic)?, number as usize, &wanted, why));
        }
        let throttle = reassign.throttle_bytes_per_second;
        let changed = self.change_partition(topic, number, |partition, _| {
            partition.begin_reassignment(target);
            // Said again, it may be at another pace.
            if !partition.target.is_empty() {
                partition.throttle_bytes_per_second = throttle;
            }
        })?;
        Ok(Outcome::PartitionsChanged(usize::from(changed)))
    }

    pub(super) fn cancel_reassignment(&mut self, cancel: &command::CancelReassignment) -> Result<Outcome, Refusal> {
        let (topic, number) = (&cancel.topic_id, cancel.partition);
        let partition = self.partition(topic, number)?;
        if partition.target.is_empty() {
            return Err(Refusal::NotReassigning { topic: self.name_of(topic)?, partition: number });
        }
        // Those who have everything that was acknowledged.
        let holders = [&partition.isr, &partition.elr, &partition.last_known];
        let holders = holders.into_iter().find(|holders| !holders.is_empty());
        let goes = |holders: &Vec<i32>| holders.iter().all(|broker| partition.adding.contains(broker));
        if holders.is_some_and(goes) && !planted(Bug::CancelledForGood) {
            return Err(Refusal::NoWayBack { topic: self.name_of(topic)?, partition: number });
        }
        let changed = self.change_partition(topic, number, |partition, _| {
            let adding = std::mem::take(&mut partition.adding);
            partition.keep_only(|broker| !adding.contains(&broker));
            partition.removing.clear();
            partition.target.clear();
            partition.throttle_bytes_per_second = 0;
        })?;
        Ok(Outcome::PartitionsChanged(usize::from(changed)))
    }

    fn name_of(&self, topic: &[u8]) -> Result<String, Refusal> {
        let id = super::topic_id(topic)?;
        self.names.get(&id).cloned().ok_or(Refusal::UnknownTopicId(id))
    }
}

impl Partition {
    fn begin_reassignment(&mut self, target: &[i32]) {
        if self.target == target || self.replicas == target {
            return;
        }
        self.target = target.to_vec();
        self.adding = target.iter().copied().filter(|broker| !self.replicas.contains(broker)).collect();
        self.removing = self.replicas.iter().copied().filter(|broker| !target.contains(broker)).collect();
        // Those that are there come first in elections until the others are as good.
        self.replicas.extend(&self.adding);
    }

    /// Where all of the target are in sync, they are the replicas.
    pub(super) fn finish_reassignment(&mut self, rules: &Rules<'_>) {
        let Partition { target, isr, .. } = &*self;
        // A set of replicas that is only put in another order need not wait for anybody.
        let is_order_alone = self.adding.is_empty() && self.removing.is_empty();
        let is_led = target.contains(&self.leader) || target.iter().any(|broker| rules.is_active(*broker));
        let in_sync = |broker: &i32| isr.contains(broker) || planted(Bug::MovedBeforeInSync);
        if target.is_empty() || !(is_order_alone || (is_led && target.iter().all(in_sync))) {
            return;
        }
        self.replicas = std::mem::take(&mut self.target);
        self.adding.clear();
        self.removing.clear();
        self.throttle_bytes_per_second = 0;
        let replicas = self.replicas.clone();
        self.keep_only(|broker| replicas.contains(&broker));
    }

    /// Whoever does not keep the partition any more is nothing else in it either.
    fn keep_only(&mut self, stays: impl Fn(i32) -> bool) {
        let Partition { replicas, isr, elr, fenced, last_known, lost, .. } = self;
        for list in [replicas, isr, elr, fenced, last_known, lost] {
            list.retain(|broker| stays(*broker));
        }
    }
}
