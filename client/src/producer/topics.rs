//! The topics that a producer sends to.
//!
//! Owns: learning of a topic once for all who wait for it, serving its partitions, and letting go of it when it is gone.
//! Refuses: the cache of metadata ([`crate::metadata`]), and which partition a record goes to. Read next: [`super::partition`].

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use headwater_proto::ErrorCode;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::batcher::{Batcher, BatcherConfig};
use super::partition::{Partition, Sender, Shared};
use super::stream::allocate_identity;
use super::window::Identity;
use crate::connection::lock;
use crate::error::{Error, ProduceError};
use crate::lookup::{Lookup, Lookups};
use crate::metadata::TopicInfo;
use crate::partitioner::Sticky;

/// A topic that is being produced to.
pub(crate) struct Topic {
    pub(crate) info: Arc<TopicInfo>,
    pub(crate) partitions: Vec<Arc<Partition>>,
    identity: Option<Identity>,
    pub(crate) sticky: Mutex<Sticky>,
}

type Known = HashMap<Arc<str>, Arc<Topic>>;
type TopicLookup = Lookup<Arc<Topic>, ProduceError>;
/// When a look-up ended, and how.
type Ended = (Instant, Result<Arc<Topic>, ProduceError>);

/// How long an outcome waits to be asked for.
const OUTCOME_MAX_AGE: Duration = Duration::from_secs(1);

/// All topics of a producer.
pub(crate) struct Topics {
    shared: Arc<Shared>,
    identity: Option<Identity>,
    batches: BatcherConfig,
    known: ArcSwap<Known>,
    /// Topics that were gone once. Held while what is known changes.
    gone: Mutex<HashSet<Arc<str>>>,
    lookups: Lookups<Arc<Topic>, ProduceError>,
    /// Look-ups that nobody waits for, and whose outcome somebody will ask for.
    polled: Mutex<HashMap<Arc<str>, Arc<OnceLock<Ended>>>>,
    runtime: Handle,
    tasks: TaskTracker,
}

impl Topics {
    /// Everything runs on the current runtime.
    pub(crate) fn new(shared: Arc<Shared>, identity: Option<Identity>, batches: BatcherConfig) -> Arc<Topics> {
        Arc::new(Topics {
            shared,
            identity,
            batches,
            known: ArcSwap::default(),
            gone: Mutex::default(),
            lookups: Lookups::new(),
            polled: Mutex::default(),
            runtime: Handle::current(),
            tasks: TaskTracker::new(),
        })
    }

    pub(crate) fn known(&self) -> Guard<Arc<Known>> {
        self.known.load()
    }

    /// Who the producer is, where it is idempotent.
    pub(crate) fn identity(&self) -> Option<Identity> {
        self.identity
    }

    pub(crate) fn batch_bytes(&self) -> usize {
        self.batches.batch_bytes
    }

    /// Waits until every partition's task has ended.
    pub(crate) async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The topic as the broker describes it after `doubted`, being served.
    pub(crate) fn look_up(self: &Arc<Self>, name: &Arc<str>, doubted: Option<Instant>) -> TopicLookup {
        self.lookups.join(name, doubted, || {
            let (topics, name) = (self.clone(), name.clone());
            async move {
                let closed = topics.shared.closed.clone();
                let learned = closed.run_until_cancelled(topics.learn(&name, doubted)).await;
                learned.unwrap_or(Err(ProduceError::Closed))
            }
        })
    }

    /// What a look-up finds, of a topic that is to have this partition: that it has none, the broker that was asked may say because it has
    /// not heard yet that it was added.
    pub(crate) async fn with_partition(
        self: &Arc<Self>,
        lookup: TopicLookup,
        partition: Option<u32>,
    ) -> Result<Arc<Topic>, ProduceError> {
        let topic = lookup.await?;
        if partition.is_none_or(|partition| topic.info.leader(partition).is_some()) {
            return Ok(topic);
        }
        let name = &topic.info.name;
        self.shared.metadata.confirmed(&topic.info).await.map_err(|error| unknown(error, name))?;
        self.look_up(name, Some(topic.info.at)).await
    }

    /// The outcome of the look-up that an earlier call began.
    ///
    /// # Errors
    /// [`ProduceError::TopicPending`] while it goes on; where none was begun, one is.
    pub(crate) fn poll(self: &Arc<Self>, name: &Arc<str>, partition: Option<u32>) -> Result<Arc<Topic>, ProduceError> {
        let mut polled = lock(&self.polled);
        // What was learned a while ago is no answer any more; neither do names pile up that nobody asks for again.
        polled.retain(|_, outcome| outcome.get().is_none_or(|(ended, _)| ended.elapsed() < OUTCOME_MAX_AGE));
        match polled.get(name).map(|outcome| outcome.get()) {
            Some(Some((_, outcome))) => {
                let outcome = outcome.clone();
                polled.remove(name);
                return outcome;
            }
            Some(None) => {}
            None => {
                let known = self.known().get(name).map(|topic| topic.info.at);
                let (topics, lookup, outcome) = (self.clone(), self.look_up(name, known), Arc::new(OnceLock::new()));
                polled.insert(name.clone(), outcome.clone());
                self.runtime.spawn(async move {
                    let learned = topics.with_partition(lookup, partition).await;
                    // Nobody else sets it.
                    drop(outcome.set((Instant::now(), learned)));
                });
            }
        }
        Err(ProduceError::TopicPending { topic: name.clone() })
    }

    async fn learn(&self, name: &Arc<str>, doubted: Option<Instant>) -> Result<Arc<Topic>, ProduceError> {
        loop {
            let (known, was_gone) = {
                let gone = lock(&self.gone);
                (self.known().get(name).cloned(), gone.contains(name))
            };
            if let Some(topic) = known.as_ref().filter(|topic| doubted.is_none_or(|doubted| topic.info.at > doubted)) {
                return Ok(topic.clone());
            }
            let info = self.shared.metadata.newer_than(name, known.as_ref().map(|topic| topic.info.at)).await;
            let info = info.map_err(|error| unknown(error, name))?;
            let identity = match &known {
                Some(topic) if topic.info.id == info.id => topic.identity,
                // Another topic under the same name, or perhaps the same after all: sequences must not be used twice.
                _ if was_gone && self.identity.is_some() => {
                    Some(allocate_identity(&self.shared.connections, None).await?)
                }
                _ => self.identity,
            };
            if let Some(topic) = self.serve(info, identity, known.as_ref(), was_gone) {
                return Ok(topic);
            }
        }
    }

    /// Serves the topic, those of its partitions that are new included, unless what was known of it has changed meanwhile.
    fn serve(
        &self,
        info: Arc<TopicInfo>,
        identity: Option<Identity>,
        known: Option<&Arc<Topic>>,
        was_gone: bool,
    ) -> Option<Arc<Topic>> {
        let mut gone = lock(&self.gone);
        let name = info.name.clone();
        if self.known().get(&name).map(Arc::as_ptr) != known.map(Arc::as_ptr) || gone.contains(&name) != was_gone {
            return None;
        }
        let mut partitions = match known {
            Some(topic) if topic.info.id == info.id => topic.partitions.clone(),
            Some(_) => {
                gone.insert(name.clone());
                Vec::new()
            }
            None => Vec::new(),
        };
        for partition in partitions.len() as u32..info.partition_count() {
            let (batches, budget) = (self.batches.clone(), self.shared.budget.clone());
            let batcher = Batcher::new(name.clone(), partition, batches, budget, info.max_message_bytes);
            let new = Partition::new(info.clone(), partition, batcher);
            let sender = Sender::new(self.shared.clone(), new.clone(), identity);
            self.tasks.spawn_on(sender.run(), &self.runtime);
            partitions.push(new);
        }
        let sticky = Mutex::new(Sticky::new(rand::random(), info.partition_count()));
        let topic = Arc::new(Topic { info, partitions, identity, sticky });
        let mut all = Known::clone(&self.known());
        all.insert(name, topic.clone());
        self.known.store(Arc::new(all));
        Some(topic)
    }

    /// Forgets a topic whose partitions take no more records.
    pub(crate) fn retire(&self, topic: &Arc<Topic>) {
        let mut gone = lock(&self.gone);
        let name = &topic.info.name;
        gone.insert(name.clone());
        let mut all = Known::clone(&self.known());
        if all.get(name).is_some_and(|known| Arc::ptr_eq(known, topic)) {
            all.remove(name);
            self.known.store(Arc::new(all));
        }
    }
}

/// Why a producer cannot have a topic.
pub(crate) fn unknown(error: Error, topic: &Arc<str>) -> ProduceError {
    match error.code() {
        Some(ErrorCode::UnknownTopic) => ProduceError::UnknownTopic { topic: topic.clone() },
        _ => ProduceError::Client(error),
    }
}
