//! What people ask for, now and then twice, because the answer was lost: other settings, other replicas, elections, a broker
//! drained. And brokers that want producer ids.

use super::*;
use headwater_broker::metadata::command::ElectionKind;

impl World {
    pub(super) fn people(&mut self) {
        if self.healing {
            return;
        }
        let next = self.random.between(200, 1_200);
        self.at(next, Event::People);
        let up: Vec<i32> = self.nodes.iter().filter(|node| node.process.is_some()).map(|node| node.id).collect();
        let (Some(through), Some(partition)) = (self.random.pick(&up), self.partition().cloned()) else { return };
        let (topic_id, number) = (TOPIC.to_wire(), 0);
        let named = vec![command::TopicPartition { topic_id: topic_id.clone(), partition: number }];
        if self.random.percent(25) {
            // Nobody deletes the records of groups.
            return if self.members.is_empty() {
                self.delete_records(&partition)
            };
        }
        let kind = match self.random.below(18) {
            0..3 => {
                self.reached.setting_changed = true;
                let least = self.random.between(1, partition.replicas.len().min(2) as i64) as u32;
                Kind::AlterTopic(command::AlterTopic { topic_id, config: self.topic_values(least) })
            }
            3..8 => {
                let replicas = self.other_replicas();
                if self.random.percent(30) {
                    let lasts = self.random.between(300, 3_000);
                    self.rest(lasts);
                }
                Kind::Reassign(command::Reassign { topic_id, partition: number, replicas, ..Default::default() })
            }
            8..10 => Kind::CancelReassignment(command::CancelReassignment { topic_id, partition: number }),
            10..12 => {
                let kind = ElectionKind::Preferred.into();
                Kind::ElectLeaders(command::ElectLeaders { kind, partitions: named })
            }
            12 if self.unclean => {
                let kind = ElectionKind::Unclean.into();
                Kind::ElectLeaders(command::ElectLeaders { kind, partitions: named })
            }
            12..14 => {
                self.reached.drained = true;
                let incarnation = self.incarnation(through);
                Kind::DrainBroker(command::DrainBroker { broker_id: through, incarnation })
            }
            14..16 => {
                // Refused as long as it keeps anything; else it registers again, as one that is new.
                let broker_id = self.random.between(1, self.nodes.len() as i64) as i32;
                Kind::RemoveBroker(command::RemoveBroker { broker_id })
            }
            _ => Kind::AllocateProducerIds(command::AllocateProducerIds { broker_id: through, count: 10 }),
        };
        let is_drained = matches!(kind, Kind::DrainBroker(_));
        let command_id = match kind {
            Kind::AllocateProducerIds(_) => bytes::Bytes::new(),
            _ => wire(self.random.uuid()),
        };
        let command = command::Command { command_id, ..kind.into() };
        self.propose(through, command.clone(), None);
        if self.random.percent(40) {
            self.propose(through, command, None);
        }
        if is_drained {
            // It stops once it has handed over, or after a while.
            let after = self.random.between(50, 1_000);
            let member = self.node(through).process.as_ref().map(|process| process.me);
            self.at(after, Event::Stop(through, member));
        }
    }

    /// Somebody wants records deleted that the leader has shown.
    fn delete_records(&mut self, partition: &Partition) {
        let share = self.random.between(0, 100);
        let leader = self.nodes.iter_mut().find(|node| node.id == partition.leader);
        let Some(process) = leader.and_then(|node| node.process.as_mut()) else { return };
        if let Role::Leader { state, .. } = &mut process.role {
            state.work(Chore::Delete(process.high_watermark * share / 100));
        }
    }

    /// A broker that drained stops, and starts again.
    pub(super) fn stop(&mut self, id: i32, member: Option<Member>) {
        if self.node(id).process.as_ref().map(|process| process.me) == member {
            self.kill(id);
        }
    }

    /// Some brokers, as many as min.insync.replicas and no more than three.
    fn other_replicas(&mut self) -> Vec<i32> {
        let mut all: Vec<i32> = (1..=self.nodes.len() as i32).collect();
        let most = all.len().min(3) as i64;
        let least = i64::from(self.min_insync_replicas()).min(most);
        let count = self.random.between(least.max(2).min(most), most);
        let mut chosen = Vec::new();
        for _ in 0..count {
            let place = self.random.below(all.len() as u64) as usize;
            chosen.push(all.remove(place));
        }
        chosen
    }

    /// The topic's own values.
    pub(super) fn topic_values(&self, min_insync_replicas: u32) -> BTreeMap<String, String> {
        let unclean = ("unclean.leader.election.enable", self.unclean.to_string());
        let values = [unclean, ("min.insync.replicas", min_insync_replicas.to_string())];
        values.map(|(key, value)| (key.to_owned(), value)).into()
    }

    pub(super) fn min_insync_replicas(&self) -> u32 {
        self.truth.topic_by_id(&TOPIC).map_or(self.topic.min_insync_replicas, |topic| topic.min_insync_replicas())
    }
}
