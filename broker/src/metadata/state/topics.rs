//! Topics: made, changed, enlarged, deleted, imported.
//!
//! Owns: which topics may come in, and the replicas they may name. Read next: [`super::super::name`].

use super::super::command;
use super::super::name;
use super::{MetadataState, Outcome, Partition, Refusal, Topic, topic_id};
use headwater_proto::TopicId;
use headwater_proto::limits::MAX_PARTITIONS_PER_TOPIC;
use std::sync::Arc;

impl MetadataState {
    pub(super) fn create(&mut self, create: &command::CreateTopic) -> Result<Outcome, Refusal> {
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

    pub(super) fn alter(&mut self, alter: &command::AlterTopic) -> Result<Outcome, Refusal> {
        let topic = self.topic_mut(&alter.topic_id)?;
        topic.config = alter.config.clone();
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
        let mut added = Vec::with_capacity(add.partitions.len());
        for (place, replicas) in add.partitions.iter().enumerate() {
            let partition = new_partition(replicas, 0);
            self.check_replicas(&topic.name, topic.partitions.len() + place, &partition)?;
            added.push(partition);
        }
        self.topic_mut(&add.topic_id)?.partitions.append(&mut added);
        Ok(Outcome::TopicChanged(id))
    }

    pub(super) fn delete(&mut self, delete: &command::DeleteTopic) -> Result<Outcome, Refusal> {
        let id = topic_id(&delete.topic_id)?;
        let name = self.names.remove(&id).ok_or(Refusal::UnknownTopicId(id))?;
        self.topics.remove(&name);
        Ok(Outcome::TopicDeleted(id))
    }

    pub(super) fn import(&mut self, import: &command::ImportTopics) -> Result<Outcome, Refusal> {
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

    pub(super) fn insert(&mut self, topic: Topic) {
        self.names.insert(topic.id, topic.name.clone());
        self.topics.insert(topic.name.clone(), Arc::new(topic));
    }

    fn topic_mut(&mut self, id: &[u8]) -> Result<&mut Topic, Refusal> {
        let id = topic_id(id)?;
        let name = self.names.get(&id).ok_or(Refusal::UnknownTopicId(id))?;
        self.topics.get_mut(name).map(Arc::make_mut).ok_or(Refusal::UnknownTopicId(id))
    }
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
