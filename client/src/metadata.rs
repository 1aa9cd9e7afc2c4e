//! What is known of topics: ids, partitions, leaders.
//!
//! Owns: the cache, asking anew, and what a watch stream tells ([`crate::watch`]). What is known never becomes older: an answer of an
//! earlier version is not taken, and of two leaders that of the later epoch counts. Refuses: deciding when it is wrong (whoever was
//! refused, or changes a topic, says so). Read next: `producer/partition.rs` and `consumer/fetch.rs`, which use it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use headwater_proto::wire::{self, call, call_response::Response};
use headwater_proto::{ErrorCode, TopicId};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::connection::{Connections, lock};
use crate::coordinators::Coordinators;
use crate::error::{ConsumeError, Error, LeaderHint};
use crate::lookup::Lookups;
use crate::retry::Deadline;
use crate::watch::{LeaderWatch, Nudge, keep};

/// How long a broker that knows less than was heard before is asked again.
const BEHIND: Duration = Duration::from_secs(2);
/// The pause between two such questions.
const BEHIND_PAUSE: Duration = Duration::from_millis(20);
/// So many new watchers of leaders, at least, lie between two looks for those that nobody needs any more.
const WATCHERS_BETWEEN_SWEEPS: usize = 64;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    knowledge: Arc<Knowledge>,
    coordinators: Coordinators,
    /// A thousand partitions with the same doubt ask once.
    lookups: Lookups<Arc<TopicInfo>, Error>,
    /// Those that ask for what is in force, whoever is asked.
    confirming: Lookups<Arc<TopicInfo>, Error>,
    runtime: Handle,
    /// The task that hears of new leaders, once somebody wants to know.
    watching: OnceLock<AbortOnDropHandle<()>>,
}

/// What is known, and how it comes to be known.
pub(crate) struct Knowledge {
    connections: Arc<Connections>,
    topics: Mutex<Topics>,
    pub(crate) nudge: Nudge,
}

/// What was learned last.
#[derive(Default)]
struct Topics {
    known: HashMap<Arc<str>, Arc<TopicInfo>>,
    /// The names of those.
    names: HashMap<TopicId, Arc<str>>,
    /// Topics of which something turned out wrong: the next to ask for one asks anew.
    doubted: HashMap<Arc<str>, Instant>,
    /// When this client changed one of the topics last: what was asked before then is not to be remembered.
    changed: Option<Instant>,
    /// The newest version of the metadata that was heard of.
    version: u64,
    /// Who waits for new leaders of which partitions.
    watched: HashMap<TopicId, HashMap<u32, watch::Sender<PartitionInfo>>>,
    /// Counts up with each change of the topics that are watched.
    watched_changes: u64,
    /// New watchers since the last sweep, and how many were left by that.
    watchers: (usize, usize),
}

/// Of two, the one of the later epoch.
fn newer(known: PartitionInfo, said: PartitionInfo) -> PartitionInfo {
    if said.leader_epoch >= known.leader_epoch { said } else { known }
}

impl Topics {
    /// Somebody says who leads. Returns who does, as far as is known then.
    fn learn(&mut self, id: &TopicId, partition: u32, said: PartitionInfo) -> PartitionInfo {
        let Some(watcher) = self.watched.get(id).and_then(|watched| watched.get(&partition)) else { return said };
        let newest = newer(*watcher.borrow(), said);
        watcher.send_if_modified(|known| std::mem::replace(known, newest) != newest);
        newest
    }

    /// As [`Topics::learn`], of some partitions of one topic, where the topic is known too.
    fn learn_leaders(&mut self, id: &TopicId, said: impl IntoIterator<Item = (u32, PartitionInfo)>) {
        let known = self.names.get(id).and_then(|name| self.known.get(name)).filter(|known| known.id == *id).cloned();
        let mut partitions = known.as_ref().map(|known| known.partitions.clone());
        let mut is_new = false;
        for (partition, said) in said {
            let newest = self.learn(id, partition, said);
            if let Some(place) = partitions.as_mut().and_then(|partitions| partitions.get_mut(partition as usize)) {
                let newest = newer(*place, newest);
                is_new |= std::mem::replace(place, newest) != newest;
            }
        }
        if let (true, Some(known), Some(partitions)) = (is_new, known, partitions) {
            let (name, max_message_bytes, at) = (known.name.clone(), known.max_message_bytes, known.at);
            let info = TopicInfo { name: name.clone(), id: *id, partitions, max_message_bytes, at };
            self.known.insert(name, Arc::new(info));
        }
    }

    /// Something of this turned out wrong. Of a topic that is not known nothing is believed anyway.
    fn doubt(&mut self, info: &TopicInfo) {
        if self.known.contains_key(&info.name) {
            self.doubted.insert(info.name.clone(), info.at);
        }
    }

    /// There is no such topic any more.
    fn gone(&mut self, name: &str) {
        self.forget(name);
        self.doubted.remove(name);
    }

    fn forget(&mut self, name: &str) {
        if let Some(known) = self.known.remove(name) {
            self.names.remove(&known.id);
        }
    }

    /// Lets go of watchers that nobody needs any more, where there may be many.
    fn sweep(&mut self) {
        self.watchers.0 += 1;
        if self.watchers.0 < self.watchers.1.max(WATCHERS_BETWEEN_SWEEPS) {
            return;
        }
        let mut left = 0;
        self.watched.retain(|_, partitions| {
            partitions.retain(|_, watcher| watcher.receiver_count() > 0);
            left += partitions.len();
            !partitions.is_empty()
        });
        self.watched_changes += 1;
        self.watchers = (0, left);
    }
}

impl Knowledge {
    /// The topics to be watched, unless that is what was `seen` already.
    pub(crate) fn watched(&self, seen: &mut Option<u64>) -> Option<HashSet<TopicId>> {
        let topics = lock(&self.topics);
        let changes = Some(topics.watched_changes);
        (std::mem::replace(seen, changes) != changes).then(|| topics.watched.keys().copied().collect())
    }

    /// What a broker pushed.
    pub(crate) fn told(&self, update: wire::WatchUpdate) {
        let mut topics = lock(&self.topics);
        let is_behind = update.version < topics.version;
        topics.version = topics.version.max(update.version);
        for topic in update.topics {
            let Some(id) = TopicId::from_slice(&topic.topic_id) else { continue };
            let name = topics.names.get(&id).cloned();
            if topic.deleted {
                if let Some(name) = name.filter(|_| !is_behind) {
                    topics.gone(&name);
                }
                continue;
            }
            if let Some(known) = name.and_then(|name| topics.known.get(&name)).cloned()
                && known.partition_count() < topic.partition_count
            {
                topics.doubt(&known);
            }
            let leader = |p: wire::PartitionLeader| {
                (p.partition, PartitionInfo { leader: p.leader, leader_epoch: p.leader_epoch })
            };
            topics.learn_leaders(&id, topic.partitions.into_iter().map(leader));
        }
        drop(topics);
        if !is_behind {
            self.connections.learn_brokers(&update.brokers);
        }
    }
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
        topics.forget(self.name);
        topics.changed = Some(Instant::now());
    }
}

impl Metadata {
    /// On the current runtime.
    pub(crate) fn new(connections: Arc<Connections>) -> Metadata {
        let coordinators = Coordinators::new(connections.clone());
        let knowledge = Arc::new(Knowledge { connections, topics: Mutex::default(), nudge: Nudge::default() });
        let (lookups, confirming) = (Lookups::new(), Lookups::new());
        let (runtime, watching) = (Handle::current(), OnceLock::new());
        Metadata { knowledge, coordinators, lookups, confirming, runtime, watching }
    }

    /// Who coordinates groups.
    pub(crate) fn coordinators(&self) -> &Coordinators {
        &self.coordinators
    }

    /// What is known, unless it is too old.
    pub(crate) fn cached(&self, topic: &str) -> Option<Arc<TopicInfo>> {
        let topics = lock(&self.knowledge.topics);
        let info = topics.known.get(topic).cloned()?;
        let doubted = topics.doubted.get(topic).is_some_and(|doubted| info.at <= *doubted);
        (!doubted && info.at.elapsed() < self.knowledge.connections.config.metadata_max_age).then_some(info)
    }

    /// Something of this has turned out wrong: whoever needs the topic next asks anew.
    pub(crate) fn doubt(&self, info: &TopicInfo) {
        lock(&self.knowledge.topics).doubt(info);
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
        Changing { topics: &self.knowledge.topics, name }
    }

    /// Hears of new leaders of a partition, as soon as a broker knows.
    pub(crate) fn watch_leader(&self, id: TopicId, partition: u32) -> LeaderWatch {
        let newest = {
            let mut topics = lock(&self.knowledge.topics);
            topics.sweep();
            let count = topics.watched.len();
            let watched = topics.watched.entry(id).or_default();
            let unknown = || watch::Sender::new(PartitionInfo { leader: -1, leader_epoch: -1 });
            let newest = watched.entry(partition).or_insert_with(unknown).subscribe();
            if topics.watched.len() > count {
                topics.watched_changes += 1;
            }
            newest
        };
        self.knowledge.nudge.look();
        self.watching.get_or_init(|| {
            let knowledge = self.knowledge.clone();
            let connections = knowledge.connections.clone();
            AbortOnDropHandle::new(self.runtime.spawn(keep(connections, knowledge)))
        });
        LeaderWatch::new(newest)
    }

    /// Somebody waits for longer than usual: the broker that tells of new leaders is asked whether it is there.
    pub(crate) fn nudge(&self) {
        self.knowledge.nudge.ask();
    }

    /// A broker that does not lead a partition says who does. `true`: that is news.
    pub(crate) fn hinted(&self, topic: &TopicInfo, partition: u32, hint: &LeaderHint) -> bool {
        if hint.broker_id < 0 || topic.leader(partition).is_none_or(|known| known.leader_epoch >= hint.leader_epoch) {
            return false;
        }
        let address = hint.address.clone();
        let node = wire::BrokerNode { broker_id: hint.broker_id, address, ..wire::BrokerNode::default() };
        self.knowledge.connections.learn_brokers(&[node]);
        let leader = PartitionInfo { leader: hint.broker_id, leader_epoch: hint.leader_epoch };
        lock(&self.knowledge.topics).learn_leaders(&topic.id, [(partition, leader)]);
        true
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
            let topics = lock(&self.knowledge.topics);
            doubted.max(topics.changed).max(topics.doubted.get(topic).copied())
        };
        let ask = || ask(self.knowledge.clone(), Arc::clone(&name), false);
        self.lookups.join(&name, doubted, ask).await
    }

    /// As [`Metadata::newer_than`], of a topic that is to have this partition. Others may have heard that it was added: that there is none is
    /// the word of a broker that knows what is in force.
    pub(crate) async fn with_partition(
        &self,
        topic: &str,
        partition: u32,
        doubted: Option<Instant>,
    ) -> Result<Arc<TopicInfo>, Error> {
        let info = self.newer_than(topic, doubted).await?;
        match info.leader(partition) {
            Some(_) => Ok(info),
            None => self.confirmed(&info).await,
        }
    }

    /// A topic as it is in force, where what is known of it may be of the past.
    pub(crate) async fn confirmed(&self, known: &TopicInfo) -> Result<Arc<TopicInfo>, Error> {
        let name = &known.name;
        let ask = || ask(self.knowledge.clone(), Arc::clone(name), true);
        self.confirming.join(name, Some(known.at), ask).await
    }
}

/// Asks a broker, and remembers what it says. `confirmed`: what is in force when it is asked, be it known there or not.
async fn ask(knowledge: Arc<Knowledge>, name: Arc<str>, confirmed: bool) -> Result<Arc<TopicInfo>, Error> {
    let deadline = Deadline::within(BEHIND);
    let (at, answer) = loop {
        let at = Instant::now();
        let request = wire::Metadata { topics: vec![name.to_string()], confirmed, ..wire::Metadata::default() };
        let answer = match knowledge.connections.ask("metadata", true, call::Request::Metadata(request)).await? {
            (broker_id, Response::Metadata(answer)) => {
                let version = lock(&knowledge.topics).version;
                if answer.version >= version {
                    answer
                } else if deadline.passed() {
                    let known = answer.version;
                    let why = format!("broker {broker_id} knows the metadata of version {known}, and not {version}");
                    return Err(Error::refused(ErrorCode::TimedOut, why));
                } else {
                    tokio::time::sleep(BEHIND_PAUSE).await;
                    continue;
                }
            }
            _ => return Err(Error::Protocol("no answer to metadata".into())),
        };
        break (at, answer);
    };
    knowledge.connections.learn_brokers(&answer.brokers);
    let mut topics = lock(&knowledge.topics);
    topics.version = topics.version.max(answer.version);
    let found = answer.topics.into_iter().find(|t| *t.name == *name);
    let found = found.ok_or_else(|| {
        topics.gone(&name);
        Error::refused(ErrorCode::UnknownTopic, format!("there is no topic {name:?}"))
    })?;
    if let Some(error) = found.error {
        topics.gone(&name);
        return Err(Error::Refused(error.into()));
    }
    let id =
        TopicId::from_slice(&found.topic_id).ok_or_else(|| Error::Protocol(format!("topic {name:?} without an id")))?;
    let known = topics.known.get(&name).filter(|known| known.id == id).cloned();
    let mut partitions = vec![PartitionInfo { leader: -1, leader_epoch: -1 }; found.partitions.len()];
    for p in &found.partitions {
        let place = partitions.get_mut(p.partition as usize);
        let place = place.ok_or_else(|| Error::Protocol(format!("topic {name:?} misses partitions")))?;
        let said = PartitionInfo { leader: p.leader, leader_epoch: p.leader_epoch };
        let said = known.as_ref().and_then(|known| known.leader(p.partition)).map_or(said, |known| newer(known, said));
        *place = topics.learn(&id, p.partition, said);
    }
    let max_message_bytes = found.max_message_bytes as usize;
    let info = Arc::new(TopicInfo { name, id, partitions, max_message_bytes, at });
    // An answer to an earlier question may have been slower.
    let known = topics.known.get(&info.name).map(|known| known.at);
    if known.is_none_or(|known| known <= at) && topics.changed.is_none_or(|changed| changed < at) {
        topics.forget(&info.name);
        topics.names.insert(id, info.name.clone());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_topics_that_are_gone_nothing_is_kept() {
        let info = |number: u8| TopicInfo {
            name: format!("t{number}").into(),
            id: TopicId::from_bytes([number; 16]),
            partitions: Vec::new(),
            max_message_bytes: 0,
            at: Instant::now(),
        };
        let mut topics = Topics::default();
        for info in (0..100).map(info) {
            let name = info.name.clone();
            topics.names.insert(info.id, name.clone());
            topics.known.insert(name.clone(), Arc::new(info));
            let info = topics.known[&name].clone();
            topics.doubt(&info);
            assert_eq!(topics.doubted.len(), 1);
            topics.gone(&name);
            // Whoever reads it finds out later.
            topics.doubt(&info);
            assert!(topics.known.is_empty() && topics.names.is_empty() && topics.doubted.is_empty());
        }
    }
}
