//! The producer: records in, acknowledgements out.
//!
//! Owns: [`Producer`] and its settings, the buffer's bound, choosing a partition. Refuses: batches and streams. Read next:
//! [`partition`], where a partition's records are sent, then [`window`], which makes a retry exact.

mod batcher;
mod delivery;
mod partition;
mod record;
mod stream;
mod window;

pub use delivery::{Acknowledgement, Delivery, durability_name};
pub use record::ProducerRecord;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use headwater_proto::ErrorCode;
use headwater_proto::batch::Codec;
use headwater_proto::limits::MAX_IN_FLIGHT_BATCHES;
use headwater_proto::wire::Acks;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::ConfigError;
use crate::connection::{Connections, lock};
use crate::error::{Error, ProduceError};
use crate::metadata::{Metadata, TopicInfo};
use crate::partitioner::{PartitionContext, Partitioner, Sticky, partition_for_key};
use batcher::{Batcher, BatcherConfig};
use partition::{FINISH_TIMEOUT, Partition, Sender, Shared};
use record::now_ms;
use stream::allocate_identity;
use window::Identity;

/// How a producer is set up. Made by [`crate::Client::producer`].
#[derive(Clone)]
#[must_use = "a builder does nothing until it is built"]
pub struct ProducerBuilder {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    acks: Acks,
    idempotent: Option<bool>,
    max_in_flight: usize,
    buffer_bytes: usize,
    partitioner: Partitioner,
    batches: BatcherConfig,
}

impl std::fmt::Debug for ProducerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProducerBuilder")
            .field("acks", &self.acks)
            .field("idempotent", &self.idempotent)
            .field("max_in_flight", &self.max_in_flight)
            .field("buffer_bytes", &self.buffer_bytes)
            .field("partitioner", &self.partitioner)
            .field("batches", &self.batches)
            .finish_non_exhaustive()
    }
}

impl ProducerBuilder {
    pub(crate) fn new(connections: Arc<Connections>, metadata: Arc<Metadata>) -> ProducerBuilder {
        ProducerBuilder {
            connections,
            metadata,
            acks: Acks::All,
            idempotent: None,
            max_in_flight: MAX_IN_FLIGHT_BATCHES,
            buffer_bytes: 64 << 20,
            partitioner: Partitioner::Default,
            batches: BatcherConfig {
                batch_bytes: 256 << 10,
                linger: Duration::ZERO,
                delivery_timeout: Duration::from_secs(120),
                codec: Codec::None,
                compression_level: None,
            },
        }
    }

    /// What an acknowledgement waits for. Default: [`Acks::All`], as durable as the topic asks.
    pub fn acks(mut self, acks: Acks) -> ProducerBuilder {
        self.acks = acks;
        self
    }

    /// How batches are compressed. Default: not.
    pub fn compression(mut self, codec: Codec) -> ProducerBuilder {
        self.batches.codec = codec;
        self
    }

    /// The codec's level (gzip, zstd). Default: the codec's own.
    pub fn compression_level(mut self, level: i32) -> ProducerBuilder {
        self.batches.compression_level = Some(level);
        self
    }

    /// The size at which a batch is full, in bytes before compression. Default: 256 KiB. Larger ones cost less for each
    /// record and wait no longer: a batch grows only while earlier ones are on their way, or lingers.
    pub fn batch_bytes(mut self, bytes: usize) -> ProducerBuilder {
        self.batches.batch_bytes = bytes;
        self
    }

    /// How long a batch that is not full waits for more records. Default: not at all.
    pub fn linger(mut self, linger: Duration) -> ProducerBuilder {
        self.batches.linger = linger;
        self
    }

    /// How long after it was sent a record without an acknowledgement fails. Default: 120 s.
    pub fn delivery_timeout(mut self, timeout: Duration) -> ProducerBuilder {
        self.batches.delivery_timeout = timeout;
        self
    }

    /// Bytes of records that wait for their acknowledgement, at most; beyond them [`Producer::send`] waits. Default: 64 MiB.
    pub fn buffer_bytes(mut self, bytes: usize) -> ProducerBuilder {
        self.buffer_bytes = bytes;
        self
    }

    /// How records are placed that name no partition. Default: by the key's hash, as Kafka places them.
    pub fn partitioner(mut self, partitioner: Partitioner) -> ProducerBuilder {
        self.partitioner = partitioner;
        self
    }

    /// Whether the broker recognises a batch that is sent again. Default: yes, except with [`Acks::None`], where nothing is
    /// sent again. Without it a lost connection may double records.
    pub fn idempotent(mut self, idempotent: bool) -> ProducerBuilder {
        self.idempotent = Some(idempotent);
        self
    }

    /// Batches of one partition that may be unacknowledged: 1 to 5, since the broker remembers five. Default: 5.
    pub fn max_in_flight(mut self, batches: usize) -> ProducerBuilder {
        self.max_in_flight = batches;
        self
    }

    /// The producer. Where it is idempotent, the broker is asked for a producer id.
    ///
    /// # Errors
    /// When a setting makes no sense, or the broker cannot be asked.
    pub async fn build(self) -> Result<Producer, Error> {
        let wrong = |setting, reason: &str| Err(ConfigError::Setting { setting, reason: reason.into() }.into());
        let idempotent = self.idempotent.unwrap_or(self.acks != Acks::None);
        if idempotent && self.acks == Acks::None {
            return wrong("idempotent", "needs acknowledgements: acks=1 or acks=all");
        }
        if !(1..=MAX_IN_FLIGHT_BATCHES).contains(&self.max_in_flight) {
            return wrong("max_in_flight", "1 to 5 batches");
        }
        if self.batches.batch_bytes == 0 || self.buffer_bytes == 0 {
            return wrong("batch_bytes and buffer_bytes", "must be above 0");
        }
        if self.buffer_bytes > Semaphore::MAX_PERMITS / 2 {
            return wrong("buffer_bytes", "is larger than any memory");
        }
        let identity = match idempotent {
            true => Some(allocate_identity(&self.connections, None).await?),
            false => None,
        };
        let shared = Arc::new(Shared {
            connections: self.connections,
            metadata: self.metadata,
            acks: self.acks,
            codec: self.batches.codec,
            delivery_timeout: self.batches.delivery_timeout,
            max_in_flight: self.max_in_flight,
            budget: Arc::new(Semaphore::new(self.buffer_bytes)),
            starving: AtomicUsize::new(0),
            closed: CancellationToken::new(),
            finishing: CancellationToken::new(),
        });
        Ok(Producer {
            inner: Arc::new(Inner {
                shared,
                identity,
                partitioner: self.partitioner,
                batches: self.batches,
                buffer_bytes: self.buffer_bytes,
                topics: ArcSwap::default(),
                adding: tokio::sync::Mutex::default(),
                tasks: TaskTracker::new(),
            }),
        })
    }
}

/// Sends records. Cheap to clone; all clones share one buffer, one producer id and its sequences.
///
/// Records of one partition are written in the order of their [`Producer::send`] calls, each of them once, across lost
/// connections and restarts of the broker. Dropping the last clone ends the producer: records without an acknowledgement
/// fail. [`Producer::flush`] or [`Producer::close`] first.
///
/// ```no_run
/// # async fn example(client: headwater_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use headwater_client::ProducerRecord;
/// let producer = client.producer().build().await?;
/// let record = ProducerRecord::new("flights", bytes::Bytes::from("landed")).key(bytes::Bytes::from("N14228"));
/// let delivery = producer.send(record).await?;
/// let acknowledged = delivery.await?;
/// println!("{}-{} offset {}", acknowledged.topic, acknowledged.partition, acknowledged.offset);
/// producer.close().await;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Producer {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    identity: Option<Identity>,
    partitioner: Partitioner,
    batches: BatcherConfig,
    buffer_bytes: usize,
    topics: ArcSwap<HashMap<Arc<str>, Arc<Topic>>>,
    /// Held while a topic or its partitions are added; tells of topics that were gone once.
    adding: tokio::sync::Mutex<std::collections::HashSet<Arc<str>>>,
    tasks: TaskTracker,
}

/// A topic that is being produced to.
struct Topic {
    info: Arc<TopicInfo>,
    partitions: Vec<Arc<Partition>>,
    identity: Option<Identity>,
    sticky: Mutex<Sticky>,
    /// What is known is old, and is being asked anew.
    refreshing: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer")
            .field("acks", &self.inner.shared.acks)
            .field("producer_id", &self.inner.identity.map(|identity| identity.id))
            .field("topics", &self.inner.topics.load().keys().collect::<Vec<_>>())
            .field("free_buffer_bytes", &self.inner.shared.budget.available_permits())
            .finish_non_exhaustive()
    }
}

impl Producer {
    /// Hands a record over. Waits until the topic is known and the buffer has room, and for nothing else; the
    /// [`Delivery`] tells what becomes of the record.
    ///
    /// # Errors
    /// When there is no such topic or partition, the record is too large or no batch can hold it, or there was no room within
    /// the delivery timeout.
    pub async fn send(&self, record: ProducerRecord) -> Result<Delivery, ProduceError> {
        let charge = self.charge(&record)?;
        // A sender that never waits must not keep the tasks behind it from running.
        tokio::task::consume_budget().await;
        let permit = match self.inner.shared.budget.try_acquire_many(charge) {
            Ok(permit) => permit,
            Err(_) => self.wait_for_room(&record, charge).await?,
        };
        loop {
            let topic = self.topic(&record).await?;
            match self.append(&topic, &record, charge as usize) {
                Some(Ok(delivery)) => {
                    permit.forget();
                    return Ok(delivery);
                }
                Some(Err(error)) => return Err(error),
                None if self.inner.shared.closed.is_cancelled() => return Err(ProduceError::Closed),
                None => self.retire(&topic).await,
            }
        }
    }

    /// Hands a record over, if that needs no waiting.
    ///
    /// # Errors
    /// As [`Producer::send`], and [`ProduceError::BufferFull`] where that would wait; the record comes back.
    // The record is what the caller wants back; boxing it would cost an allocation in the common case.
    #[allow(clippy::result_large_err)]
    pub fn try_send(&self, record: ProducerRecord) -> Result<Delivery, (ProducerRecord, ProduceError)> {
        let charge = match self.charge(&record) {
            Ok(charge) => charge,
            Err(error) => return Err((record, error)),
        };
        let Ok(permit) = self.inner.shared.budget.try_acquire_many(charge) else {
            return Err((record, ProduceError::BufferFull));
        };
        let topics = self.inner.topics.load();
        let topic = topics.get(&record.topic).filter(|topic| knows(topic, &record));
        match topic.and_then(|topic| self.append(topic, &record, charge as usize)) {
            Some(Ok(delivery)) => {
                permit.forget();
                Ok(delivery)
            }
            Some(Err(error)) => Err((record, error)),
            None if self.inner.shared.closed.is_cancelled() => Err((record, ProduceError::Closed)),
            None => Err((record, ProduceError::BufferFull)),
        }
    }

    /// How many partitions a topic has.
    ///
    /// # Errors
    /// When there is no such topic, or the broker cannot be asked.
    pub async fn partitions(&self, topic: &str) -> Result<u32, ProduceError> {
        let info = self.inner.shared.metadata.topic(topic).await.map_err(|e| unknown(e, &topic.into()))?;
        Ok(info.partition_count())
    }

    /// Sends everything at once, and waits until every record handed over before has its outcome.
    pub async fn flush(&self) {
        let mut newest = Vec::new();
        for topic in self.inner.topics.load().values() {
            for partition in &topic.partitions {
                newest.extend(lock(&partition.batcher).seal());
                partition.wake.notify_one();
            }
        }
        for completion in newest {
            completion.resolved().await;
        }
    }

    /// Flushes, then ends this producer and all its clones.
    pub async fn close(self) {
        self.flush().await;
        self.inner.shared.finishing.cancel();
        self.inner.tasks.close();
        if self.inner.shared.acks == Acks::None {
            // What was written has a while to reach the broker.
            let _ = tokio::time::timeout(FINISH_TIMEOUT, self.inner.tasks.wait()).await;
        }
        self.inner.shared.closed.cancel();
        self.inner.tasks.wait().await;
    }

    /// Bytes of the buffer that a record takes, if a batch can hold it.
    fn charge(&self, record: &ProducerRecord) -> Result<u32, ProduceError> {
        let bytes = record.bound()?;
        match u32::try_from(bytes) {
            Ok(charge) if bytes <= self.inner.buffer_bytes => Ok(charge),
            _ => Err(ProduceError::LargerThanBuffer { bytes, limit: self.inner.buffer_bytes }),
        }
    }

    /// Waits for `charge` bytes of the buffer; meanwhile no batch lingers.
    async fn wait_for_room(
        &self,
        record: &ProducerRecord,
        charge: u32,
    ) -> Result<tokio::sync::SemaphorePermit<'_>, ProduceError> {
        struct Starving<'a>(&'a AtomicUsize);
        impl Drop for Starving<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let shared = &self.inner.shared;
        shared.starving.fetch_add(1, Ordering::Relaxed);
        let _starving = Starving(&shared.starving);
        for topic in self.inner.topics.load().values() {
            topic.partitions.iter().for_each(|partition| partition.wake.notify_one());
        }
        tokio::select! {
            permit = shared.budget.acquire_many(charge) => permit.map_err(|_| ProduceError::Closed),
            () = shared.closed.cancelled() => Err(ProduceError::Closed),
            () = tokio::time::sleep(shared.delivery_timeout) => Err(ProduceError::TimedOut {
                topic: record.topic.clone(),
                partition: record.partition.unwrap_or(0),
                after: shared.delivery_timeout,
                sent: false,
            }),
        }
    }

    /// Adds a record to its partition's batch. `None`: the topic is gone (or the producer closed), and no record was added.
    fn append(&self, topic: &Topic, record: &ProducerRecord, charge: usize) -> Option<Result<Delivery, ProduceError>> {
        let parts = record.parts(now_ms);
        let place = self.place(topic, record, charge);
        let Some(partition) = topic.partitions.get(place as usize) else {
            return Some(Err(ProduceError::UnknownPartition {
                topic: record.topic.clone(),
                partition: place,
                partitions: topic.info.partition_count(),
            }));
        };
        let (appended, closed) = {
            let mut batcher = lock(&partition.batcher);
            (batcher.append(parts, charge, Instant::now), batcher.is_closed())
        };
        match appended {
            Ok((delivery, notable)) => {
                if notable {
                    partition.wake.notify_one();
                    self.refresh_if_old(topic);
                }
                Some(Ok(delivery))
            }
            Err(_) if closed => None,
            Err(error) => Some(Err(error)),
        }
    }

    fn place(&self, topic: &Topic, record: &ProducerRecord, charge: usize) -> u32 {
        let partitions = topic.info.partition_count();
        match (record.partition, &self.inner.partitioner, &record.key) {
            (Some(partition), _, _) => partition,
            (None, Partitioner::Custom(choose), key) => choose(&PartitionContext {
                topic: &record.topic,
                key: key.as_ref(),
                value: record.value.as_ref(),
                partitions,
            }),
            (None, Partitioner::Default, Some(key)) => partition_for_key(key, partitions),
            (None, Partitioner::Default, None) => {
                lock(&topic.sticky).place(charge, self.inner.batches.batch_bytes, partitions, rand::random)
            }
        }
    }

    /// The record's topic, as it is known; asked where it is not, or where it had fewer partitions than the record names.
    async fn topic(&self, record: &ProducerRecord) -> Result<Arc<Topic>, ProduceError> {
        let known = match self.inner.topics.load().get(&record.topic) {
            Some(topic) if knows(topic, record) => return Ok(topic.clone()),
            known => known.map(|topic| topic.info.at),
        };
        if self.inner.shared.closed.is_cancelled() {
            return Err(ProduceError::Closed);
        }
        self.inner.learn(&record.topic, known).await
    }

    /// New partitions of a topic are noticed in time, without holding anybody up.
    fn refresh_if_old(&self, topic: &Topic) {
        let age = self.inner.shared.connections.config.metadata_max_age;
        // `try_send` works outside of a runtime too; then it is left to somebody else.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if topic.info.at.elapsed() > age && !topic.refreshing.swap(true, Ordering::Relaxed) {
            let inner = Arc::downgrade(&self.inner);
            let (name, at) = (topic.info.name.clone(), topic.info.at);
            runtime.spawn(async move {
                if let Some(inner) = inner.upgrade() {
                    // What is known stays in use where nobody answers, and is asked anew later.
                    let _ = inner.learn(&name, Some(at)).await;
                    if let Some(topic) = inner.topics.load().get(&name) {
                        topic.refreshing.store(false, Ordering::Relaxed);
                    }
                }
            });
        }
    }

    /// Forgets a topic whose partitions take no more records.
    async fn retire(&self, gone: &Arc<Topic>) {
        let mut names = self.inner.adding.lock().await;
        let name = &gone.info.name;
        names.insert(name.clone());
        self.inner.topics.rcu(|topics| {
            let mut topics = HashMap::clone(topics);
            if topics.get(name).is_some_and(|known| Arc::ptr_eq(known, gone)) {
                topics.remove(name);
            }
            topics
        });
    }
}

impl Inner {
    /// Asks about a topic, unless somebody else has since `doubted`, and starts to serve its new partitions.
    async fn learn(&self, name: &Arc<str>, doubted: Option<Instant>) -> Result<Arc<Topic>, ProduceError> {
        let mut gone = self.adding.lock().await;
        let known = self.topics.load().get(name).cloned();
        if let Some(topic) = known.as_ref().filter(|topic| doubted.is_none_or(|doubted| topic.info.at > doubted)) {
            return Ok(topic.clone());
        }
        let shared = &self.shared;
        let info = shared.metadata.newer_than(name, known.as_ref().map(|topic| topic.info.at)).await;
        let info = match (info, &known) {
            (Ok(info), _) => info,
            // A broker that cannot be asked is no reason to stop; one that says there is no such topic is.
            (Err(error), Some(topic)) if error.retryable() => return Ok(topic.clone()),
            (Err(error), _) => return Err(unknown(error, name)),
        };
        let (mut partitions, identity) = match &known {
            Some(topic) if topic.info.id == info.id => (topic.partitions.clone(), topic.identity),
            // Another topic under the same name, or perhaps the same after all: sequences must not be used twice.
            _ if gone.contains(name) && self.identity.is_some() => {
                (Vec::new(), Some(allocate_identity(&shared.connections, None).await?))
            }
            _ => (Vec::new(), self.identity),
        };
        if known.is_some() && partitions.is_empty() {
            gone.insert(name.clone());
        }
        for partition in partitions.len() as u32..info.partition_count() {
            let batches = self.batches.clone();
            let batcher = Batcher::new(name.clone(), partition, batches, shared.budget.clone(), info.max_message_bytes);
            let new = Arc::new(Partition {
                topic: info.clone(),
                partition,
                batcher: Mutex::new(batcher),
                wake: Notify::new(),
            });
            self.tasks.spawn(Sender::new(shared.clone(), new.clone(), identity).run());
            partitions.push(new);
        }
        let sticky = Mutex::new(Sticky::new(rand::random(), info.partition_count()));
        let refreshing = AtomicBool::new(false);
        let topic = Arc::new(Topic { info, partitions, identity, sticky, refreshing });
        self.topics.rcu(|topics| {
            let mut topics = HashMap::clone(topics);
            topics.insert(name.clone(), topic.clone());
            topics
        });
        Ok(topic)
    }
}

/// Whether what is known of a topic is enough for a record.
fn knows(topic: &Topic, record: &ProducerRecord) -> bool {
    record.partition.is_none_or(|partition| partition < topic.info.partition_count())
}

fn unknown(error: Error, topic: &Arc<str>) -> ProduceError {
    match error.code() {
        Some(ErrorCode::UnknownTopic) => ProduceError::UnknownTopic { topic: topic.clone() },
        _ => ProduceError::Client(error),
    }
}
