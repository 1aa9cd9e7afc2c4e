//! What is known of topics: ids, partitions, leaders.
//!
//! Owns: the cache and asking anew. Refuses: deciding when it is wrong (whoever was refused, or changes a topic, says so).
//! Read next: `producer/partition.rs` and `consumer/fetch.rs`, which use it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use headwater_proto::wire::{self, call, call_response::Response};
use headwater_proto::{ErrorCode, TopicId};
use tokio::time::Instant;

use crate::connection::{Connections, lock};
use crate::error::{ConsumeError, Error};
use crate::lookup::Lookups;

/// A topic, as the broker described it last.
#[derive(Debug)]
pub(crate) struct TopicInfo {
    pub(crate) name: Arc<str>,
    pub(crate) id: TopicId,
    pub(crate) partitions: Vec<PartitionInfo>,
    /// 0: unknown.
    pub(crate) max_message_bytes: usize,
    /// When it was asked.
    pub(crate) at: Instant,
}

/// Who leads a partition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartitionInfo {
    /// -1: nobody.
    pub(crate) leader: i32,
    pub(crate) leader_epoch: i32,
}

impl TopicInfo {
    pub(crate) fn partition_count(&self) -> u32 {
        u32::try_from(self.partitions.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn leader(&self, partition: u32) -> Option<PartitionInfo> {
        self.partitions.get(partition as usize).copied()
    }
}

/// The cache, shared by a client's producers and consumers.
pub(crate) struct Metadata {
    connections: Arc<Connections>,
    topics: Arc<Mutex<Topics>>,
    /// A thousand partitions with the same doubt ask once.
    lookups: Lookups<Arc<TopicInfo>, Error>,
}

/// What was learned last.
#[derive(Default)]
struct Topics {
    known: HashMap<Arc<str>, Arc<TopicInfo>>,
    /// Topics of which something turned out wrong: the next to ask for one asks anew.
    doubted: HashMap<Arc<str>, Instant>,
    /// When this client changed one of the topics last: what was asked before then is not to be remembered.
    changed: Option<Instant>,
}

/// A topic that this client changes: when this is dropped, what was known of the topic is forgotten, whatever became of it.
#[must_use = "the topic is forgotten at once"]
pub(crate) struct Changing<'a> {
    topics: &'a Mutex<Topics>,
    name: &'a str,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut topics = lock(self.topics);
        topics.known.remove(self.name);
        topics.changed = Some(Instant::now());
    }
}

impl Metadata {
    /// On the current runtime.
    pub(crate) fn new(connections: Arc<Connections>) -> Metadata {
        Metadata { connections, topics: Arc::default(), lookups: Lookups::new() }
    }

    /// What is known, unless it is too old.
    pub(crate) fn cached(&self, topic: &str) -> Option<Arc<TopicInfo>> {
        let topics = lock(&self.topics);
        let info = topics.known.get(topic).cloned()?;
        let doubted = topics.doubted.get(topic).is_some_and(|doubted| info.at <= *doubted);
        (!doubted && info.at.elapsed() < self.connections.config.metadata_max_age).then_some(info)
    }

    /// Something of this has turned out wrong: whoever needs the topic next asks anew.
    pub(crate) fn doubt(&self, info: &TopicInfo) {
        lock(&self.topics).doubted.insert(info.name.clone(), info.at);
    }

    /// What is known, or else the broker's word.
    pub(crate) async fn topic(&self, topic: &str) -> Result<Arc<TopicInfo>, Error> {
        match self.cached(topic) {
            Some(info) => Ok(info),
            None => self.newer_than(topic, None).await,
        }
    }

    /// This client is about to change a topic.
    pub(crate) fn changing<'a>(&'a self, name: &'a str) -> Changing<'a> {
        Changing { topics: &self.topics, name }
    }

    /// The broker's word from after `doubted`: what was known then has turned out wrong.
    pub(crate) async fn newer_than(&self, topic: &str, doubted: Option<Instant>) -> Result<Arc<TopicInfo>, Error> {
        if let Some(info) = self.cached(topic)
            && doubted.is_none_or(|doubted| info.at > doubted)
        {
            return Ok(info);
        }
        let name = Arc::from(topic);
        let doubted = {
            let topics = lock(&self.topics);
            doubted.max(topics.changed).max(topics.doubted.get(topic).copied())
        };
        let ask = || ask(self.connections.clone(), self.topics.clone(), Arc::clone(&name));
        self.lookups.join(&name, doubted, ask).await
    }
}

/// Asks the broker, and remembers what it says.
async fn ask(
    connections: Arc<Connections>,
    topics: Arc<Mutex<Topics>>,
    name: Arc<str>,
) -> Result<Arc<TopicInfo>, Error> {
    let at = Instant::now();
    let request = wire::Metadata { topics: vec![name.to_string()], ..wire::Metadata::default() };
    let answer = match connections.call("metadata", call::Request::Metadata(request)).await? {
        Response::Metadata(answer) => answer,
        _ => return Err(Error::Protocol("no answer to metadata".into())),
    };
    connections.learn_brokers(&answer.brokers);
    let found = answer.topics.into_iter().find(|t| *t.name == *name);
    let found = found.ok_or_else(|| {
        lock(&topics).known.remove(&name);
        Error::refused(ErrorCode::UnknownTopic, format!("there is no topic {name:?}"))
    })?;
    if let Some(error) = found.error {
        lock(&topics).known.remove(&name);
        return Err(Error::Refused(error.into()));
    }
    let id =
        TopicId::from_slice(&found.topic_id).ok_or_else(|| Error::Protocol(format!("topic {name:?} without an id")))?;
    let mut partitions = vec![PartitionInfo { leader: -1, leader_epoch: -1 }; found.partitions.len()];
    for p in &found.partitions {
        let place = partitions.get_mut(p.partition as usize);
        *place.ok_or_else(|| Error::Protocol(format!("topic {name:?} misses partitions")))? =
            PartitionInfo { leader: p.leader, leader_epoch: p.leader_epoch };
    }
    let max_message_bytes = found.max_message_bytes as usize;
    let info = Arc::new(TopicInfo { name, id, partitions, max_message_bytes, at });
    // An answer to an earlier question may have been slower.
    let mut topics = lock(&topics);
    let known = topics.known.get(&info.name).map(|known| known.at);
    if known.is_none_or(|known| known <= at) && topics.changed.is_none_or(|changed| changed < at) {
        topics.known.insert(info.name.clone(), info.clone());
        if topics.doubted.get(&info.name).is_some_and(|doubted| *doubted < at) {
            topics.doubted.remove(&info.name);
        }
    }
    Ok(info)
}

/// Whether a broker that refuses so contradicts what is known of the topic.
pub(crate) fn is_stale(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::NotLeader
            | ErrorCode::FencedLeaderEpoch
            | ErrorCode::UnknownLeaderEpoch
            | ErrorCode::UnknownTopicId
            | ErrorCode::UnknownPartition
    )
}

/// Why a consumer cannot have a topic.
pub(crate) fn unknown_topic(error: Error, topic: &Arc<str>) -> ConsumeError {
    match error.code() {
        Some(ErrorCode::UnknownTopic) => ConsumeError::UnknownTopic { topic: topic.clone() },
        _ => error.into(),
    }
}
