//! Topics: made, changed, enlarged, deleted, imported.
//!
//! Owns: which topics may come in, and the replicas they may name. Read next: [`super::super::name`].

use super::super::command;
use super::super::name;
use super::brokers::BrokerState;
use super::partitions::{NO_LEADER, Partition, rules};
use super::{MetadataState, Outcome, Refusal, Topic, topic_id};
use crate::planted::{Bug, planted};
use headwater_proto::TopicId;
use headwater_proto::limits::MAX_PARTITIONS_PER_TOPIC;
use imbl::OrdMap;
use std::sync::Arc;

impl MetadataState {
    pub(super) fn create(&mut self, create: &command::CreateTopic) -> Result<Outcome, Refusal> {
        let topic = self.new_topic(create, |_| 0)?;
        self.admit(&topic)?;
        self.check_led(&topic.name, 0, &topic.partitions)?;
        // Topics that were imported may differ so little; those that are made here may not.
        let key = name::collision_key(&topic.name);
        let alike = self.alike.range((key.to_string(), String::new())..).next().filter(|(other, _)| *other == key);
        if let Some((_, with)) = alike {
            return Err(Refusal::Collision { with: with.clone(), name: topic.name });
        }
        let id = topic.id;
        self.insert(topic);
        Ok(Outcome::TopicCreated(id))
    }

    pub(super) fn alter(&mut self, alter: &command::AlterTopic) -> Result<Outcome, Refusal> {
        let MetadataState { names, topics, brokers, .. } = self;
        let topic = topic_mut(names, topics, &alter.topic_id)?;
        let min_insync_replicas = topic.min_insync_replicas();
        topic.config = alter.config.clone();
        let rules = rules(brokers, topic);
        for partition in &mut topic.partitions {
            let eligible = partition.elr.clone();
            partition.change(&rules, |partition| {
                // Who is eligible because nothing was acknowledged under the old value may miss what is under the new one.
                // Where nobody is in sync, nothing is acknowledged, and the eligible are all there is.
                if rules.min_insync_replicas != min_insync_replicas && !partition.isr.is_empty() {
                    partition.elr.clear();
                }
            });
            if planted(Bug::EligibleOutliveSetting) {
                partition.elr = eligible;
            }
        }
        Ok(Outcome::TopicChanged(topic.id))
    }

    pub(super) fn add_partitions(&mut self, add: &command::AddPartitions) -> Result<Outcome, Refusal> {
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
        let mut added: Vec<Partition> = add.partitions.iter().map(|replicas| self.new_partition(replicas, 0)).collect();
        for (partition, number) in added.iter().zip(topic.partitions.len()..) {
            self.check_replicas(&topic.name, number, partition)?;
        }
        self.check_led(&topic.name, topic.partitions.len(), &added)?;
        let MetadataState { names, topics, .. } = self;
        topic_mut(names, topics, &add.topic_id)?.partitions.append(&mut added);
        Ok(Outcome::TopicChanged(id))
    }

    pub(super) fn delete(&mut self, delete: &command::DeleteTopic) -> Result<Outcome, Refusal> {
        let id = topic_id(&delete.topic_id)?;
        let name = self.names.remove(&id).ok_or(Refusal::UnknownTopicId(id))?;
        self.topics.remove(&name);
        self.alike.remove(&(name::collision_key(&name).into_owned(), name));
        Ok(Outcome::TopicDeleted(id))
    }

    pub(super) fn import(&mut self, import: &command::ImportTopics) -> Result<Outcome, Refusal> {
        let mut next = self.clone();
        let mut added = 0;
        for imported in &import.topics {
            let create = imported.topic.as_ref().ok_or(Refusal::Unknown("names no topic"))?;
            let epoch = |partition: usize| imported.leader_epochs.get(partition).copied().unwrap_or(0).max(0);
            let topic = next.new_topic(create, epoch)?;
            if next.topic(&topic.name).is_some_and(|known| known.id == topic.id) {
                continue;
            }
            next.admit(&topic)?;
            next.check_led(&topic.name, 0, &topic.partitions)?;
            next.insert(topic);
            added += 1;
        }
        next.next_producer_id = next.next_producer_id.max(import.producer_ids_from);
        *self = next;
        Ok(Outcome::TopicsImported { added })
    }

    /// Whether a topic may come in.
    pub(super) fn admit(&self, topic: &Topic) -> Result<(), Refusal> {
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
        let registered = |()| match partition.replicas.iter().all(|broker| self.brokers.contains_key(broker)) {
            true => Ok(()),
            false => Err("one never registered"),
        };
        partition.check().and_then(registered).map_err(|why| invalid_replicas(topic, number, partition, why))
    }

    /// Whether new partitions have leaders: one that nobody could lead would never have one.
    fn check_led(&self, topic: &str, first: usize, partitions: &[Partition]) -> Result<(), Refusal> {
        match partitions.iter().zip(first..).find(|(partition, _)| partition.leader == NO_LEADER) {
            Some((partition, number)) => Err(invalid_replicas(topic, number, partition, "none of them is active")),
            None => Ok(()),
        }
    }

    pub(super) fn insert(&mut self, topic: Topic) {
        self.names.insert(topic.id, topic.name.clone());
        self.alike.insert((name::collision_key(&topic.name).into_owned(), topic.name.clone()));
        self.topics.insert(topic.name.clone(), Arc::new(topic));
    }

    fn new_topic(&self, create: &command::CreateTopic, epoch: impl Fn(usize) -> i32) -> Result<Topic, Refusal> {
        let partitions = create.partitions.iter().enumerate();
        Ok(Topic {
            name: create.name.clone(),
            id: topic_id(&create.topic_id)?,
            internal: create.internal,
            config: create.config.clone(),
            created_ms: create.created_ms,
            default_min_insync_replicas: create.default_min_insync_replicas.max(1),
            partitions: partitions.map(|(n, replicas)| self.new_partition(replicas, epoch(n))).collect(),
        })
    }

    fn new_partition(&self, replicas: &command::Replicas, leader_epoch: i32) -> Partition {
        let is_active = |broker: &i32| self.broker(*broker).is_some_and(|broker| broker.state == BrokerState::Active);
        let isr = replicas.brokers.iter().copied().filter(is_active).collect();
        Partition::new(replicas.brokers.clone(), isr, leader_epoch)
    }
}

pub(super) fn invalid_replicas(topic: &str, partition: usize, with: &Partition, why: &'static str) -> Refusal {
    Refusal::InvalidReplicas { topic: topic.to_owned(), partition, replicas: with.replicas.clone(), why }
}

pub(super) fn topic_mut<'a>(
    names: &OrdMap<TopicId, String>,
    topics: &'a mut OrdMap<String, Arc<Topic>>,
    id: &[u8],
) -> Result<&'a mut Topic, Refusal> {
    let id = topic_id(id)?;
    let name = names.get(&id).ok_or(Refusal::UnknownTopicId(id))?;
    topics.get_mut(name).map(Arc::make_mut).ok_or(Refusal::UnknownTopicId(id))
}
