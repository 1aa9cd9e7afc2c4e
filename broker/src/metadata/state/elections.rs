//! Elections: who leads a partition when its leader does not.
//!
//! In this order, each time the first of the partition's replicas: one that is in sync; one that is eligible, and then it
//! alone is in sync; one that may have missed acknowledged records, only if the topic asks for that or a person does, and
//! then it alone is in sync and the recovery is counted; nobody. Of those that may have missed some, first the one that was in sync
//! last, and last those that have lost what they had. Only an active broker is elected. One that drains leads on
//! where nobody can take over.

use super::super::command::{self, ElectionKind};
use super::brokers::{Broker, BrokerState};
use super::partitions::{NO_LEADER, Partition, Rules, remove};
use super::{MetadataState, Outcome, Refusal};
use crate::planted::{Bug, planted};

impl Rules<'_> {
    fn state(&self, broker_id: i32) -> Option<BrokerState> {
        self.brokers.get(&broker_id).map(|broker: &Broker| broker.state)
    }

    /// Whether a broker may be elected.
    pub(super) fn is_active(&self, broker_id: i32) -> bool {
        let elects_fenced = planted(Bug::FencedBrokerElected) && self.state(broker_id).is_some();
        self.state(broker_id) == Some(BrokerState::Active) || elects_fenced
    }

    fn is_draining(&self, broker_id: i32) -> bool {
        self.state(broker_id) == Some(BrokerState::Draining)
    }
}

impl Partition {
    /// Elects a leader where there is none, or where it must not go on.
    pub(super) fn elect(&mut self, rules: &Rules<'_>) {
        self.elect_among(rules, rules.unclean);
    }

    fn elect_among(&mut self, rules: &Rules<'_>, unclean: bool) {
        let is_in_sync = |partition: &Partition, broker| partition.isr.contains(&broker);
        if is_in_sync(self, self.leader) && rules.is_active(self.leader) {
            return;
        }
        let first = |partition: &Partition, fits: &dyn Fn(i32) -> bool| {
            partition.replicas.iter().copied().find(|broker| fits(*broker))
        };
        if let Some(leader) = first(self, &|broker| is_in_sync(self, broker) && rules.is_active(broker)) {
            // It led on because nobody else was in sync.
            if is_in_sync(self, self.leader) && rules.is_draining(self.leader) {
                self.leave(self.leader, true);
            }
            self.leader = leader;
        } else if let Some(leader) = first(self, &|broker| is_in_sync(self, broker) && rules.is_draining(broker)) {
            self.leader = leader;
        } else if let Some(leader) = first(self, &|broker| self.elr.contains(&broker) && rules.is_active(broker)) {
            remove(&mut self.elr, leader);
            self.lead_alone(leader);
            if planted(Bug::EligibleAllInSync) {
                self.isr.append(&mut self.elr);
            }
        } else if (unclean || planted(Bug::UncleanUnasked))
            && let Some(leader) = self.first_to_lead_uncleanly(rules)
        {
            self.elr.clear();
            if !planted(Bug::UncleanUnrecorded) {
                self.unclean_recoveries = self.unclean_recoveries.saturating_add(1);
            }
            self.lead_alone(leader);
        } else {
            self.leader = NO_LEADER;
        }
    }

    fn first_to_lead_uncleanly(&self, rules: &Rules<'_>) -> Option<i32> {
        let runs = |broker: &&i32| rules.is_active(**broker) && !self.fenced.contains(broker);
        let has_its_log = |broker: &&i32| runs(broker) && !self.lost.contains(broker);
        let first = self.last_known.iter().find(has_its_log).or_else(|| self.replicas.iter().find(has_its_log));
        first.or_else(|| self.replicas.iter().find(runs)).copied()
    }

    fn lead_alone(&mut self, leader: i32) {
        self.leader = leader;
        self.isr = vec![leader];
    }
}

impl MetadataState {
    /// Elections that somebody asks for. Partitions where there is nothing to elect stay as they are.
    pub(super) fn elect_leaders(&mut self, elect: &command::ElectLeaders) -> Result<Outcome, Refusal> {
        let kind = ElectionKind::try_from(elect.kind);
        let kind = kind.map_err(|_| Refusal::Unknown("asks for an election of no known kind"))?;
        for named in &elect.partitions {
            self.partition(&named.topic_id, named.partition)?;
        }
        let mut changed = 0;
        for named in &elect.partitions {
            let is_changed =
                self.change_partition(&named.topic_id, named.partition, |partition, rules| match kind {
                    ElectionKind::Preferred => partition.elect_preferred(rules),
                    ElectionKind::Unclean => partition.elect_among(rules, true),
                })?;
            changed += usize::from(is_changed);
        }
        Ok(Outcome::PartitionsChanged(changed))
    }
}

impl Partition {
    fn elect_preferred(&mut self, rules: &Rules<'_>) {
        if planted(Bug::PreferredOutOfSync)
            && let Some(preferred) = self.replicas.first().filter(|broker| !self.isr.contains(broker))
        {
            self.isr.push(*preferred);
        }
        let preferred = self.replicas.first().filter(|broker| self.isr.contains(broker) && rules.is_active(**broker));
        self.leader = preferred.copied().unwrap_or(self.leader);
    }
}
