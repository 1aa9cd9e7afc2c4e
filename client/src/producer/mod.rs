//! The producer: records in, acknowledgements out.
//!
//! Owns: [`Producer`], the buffer's bound, choosing a partition. Refuses: settings ([`builder`]), learning of topics
//! ([`topics`]), batches and streams. Read next: [`partition`], where a partition's records are sent, then [`window`], which
//! makes a retry exact.

pub(crate) mod batcher;
mod builder;
mod delivery;
pub(crate) mod exchange;
mod partition;
mod record;
mod split;
pub(crate) mod stream;
mod topics;
pub(crate) mod window;

pub use builder::ProducerBuilder;
pub use delivery::{Acknowledgement, Delivery, durability_name};
pub use record::ProducerRecord;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use headwater_proto::wire::Acks;
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use crate::connection::lock;
use crate::error::ProduceError;
use crate::partitioner::{PartitionContext, Partitioner, partition_for_key};
use crate::retry::Deadline;
use partition::Shared;
use record::now_ms;
use topics::{Topic, Topics, unknown};

/// Sends records. Cheap to clone; all clones share one buffer, one producer id and its sequences.
///
/// Records of one partition are written in the order of their [`Producer::send`] calls, each of them once, across lost
/// connections and restarts of the broker. Where `max.message.bytes` was lowered, batches that are larger are split, and only
/// a record that is too large alone fails. Dropping the last clone ends the producer: records without an acknowledgement
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
    topics: Arc<Topics>,
    partitioner: Partitioner,
    buffer_bytes: usize,
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
            .field("producer_id", &self.inner.topics.identity().map(|identity| identity.id))
            .field("topics", &self.inner.topics.known().keys().collect::<Vec<_>>())
            .field("free_buffer_bytes", &self.inner.shared.budget.available_permits())
            .finish_non_exhaustive()
    }
}

impl Producer {
    /// Hands a record over. Waits until the topic is known and the buffer has room, and for nothing else; the
    /// [`Delivery`] tells what becomes of the record.
    ///
    /// # Errors
    /// When there is no such topic or partition, the record is too large or no batch can hold it, or it was not known where to,
    /// or there was no room, within the delivery timeout.
    pub async fn send(&self, record: ProducerRecord) -> Result<Delivery, ProduceError> {
        let charge = self.charge(&record)?;
        // A sender that never waits must not keep the tasks behind it from running.
        tokio::task::consume_budget().await;
        let mut deadline = None;
        let mut room = None;
        loop {
            let topic = match self.known(&record) {
                Some(topic) => topic,
                None => self.in_time(&record, &mut deadline, self.learn(&record)).await?,
            };
            let permit = match room.take() {
                Some(permit) => permit,
                None => match self.inner.shared.budget.try_acquire_many(charge) {
                    Ok(permit) => permit,
                    Err(_) => self.in_time(&record, &mut deadline, self.room(charge)).await?,
                },
            };
            match self.append(&topic, &record, charge as usize) {
                Some(Ok(delivery)) => {
                    permit.forget();
                    return Ok(delivery);
                }
                Some(Err(error)) => return Err(error),
                None if self.inner.shared.closed.is_cancelled() => return Err(ProduceError::Closed),
                None => self.inner.topics.retire(&topic),
            }
            room = Some(permit);
        }
    }

    /// Hands a record over, if that needs no waiting.
    ///
    /// # Errors
    /// As [`Producer::send`]; and where that would wait, [`ProduceError::BufferFull`] or, with the topic's look-up under way,
    /// [`ProduceError::TopicPending`]. The record comes back.
    // The record is what the caller wants back; boxing it would cost an allocation in the common case.
    #[allow(clippy::result_large_err)]
    pub fn try_send(&self, record: ProducerRecord) -> Result<Delivery, (ProducerRecord, ProduceError)> {
        match self.send_now(&record) {
            Ok(delivery) => Ok(delivery),
            Err(error) => Err((record, error)),
        }
    }

    fn send_now(&self, record: &ProducerRecord) -> Result<Delivery, ProduceError> {
        let charge = self.charge(record)?;
        let shared = &self.inner.shared;
        let topics = self.inner.topics.known();
        let learned;
        let topic = match topics.get(&record.topic).filter(|topic| knows(topic, record)) {
            Some(topic) => topic,
            None if shared.closed.is_cancelled() => return Err(ProduceError::Closed),
            None => {
                learned = self.inner.topics.poll(&record.topic, record.partition)?;
                &learned
            }
        };
        let Ok(permit) = shared.budget.try_acquire_many(charge) else { return Err(ProduceError::BufferFull) };
        match self.append(topic, record, charge as usize) {
            Some(outcome) => outcome.inspect(|_| permit.forget()),
            None if shared.closed.is_cancelled() => Err(ProduceError::Closed),
            None => {
                self.inner.topics.retire(topic);
                self.inner.topics.poll(&record.topic, record.partition)?;
                Err(ProduceError::TopicPending { topic: record.topic.clone() })
            }
        }
    }

    /// How many partitions a topic has, as its records are spread over them: as the client knows it, or else as the broker
    /// says now. What is known is asked anew once it is [`crate::ClientConfig::metadata_max_age`] old, was contradicted, or
    /// this client has changed the topic.
    ///
    /// # Errors
    /// When there is no such topic, or the broker cannot be asked.
    pub async fn partitions(&self, topic: &str) -> Result<u32, ProduceError> {
        let info = self.inner.shared.metadata.topic(topic).await;
        Ok(info.map_err(|error| unknown(error, &topic.into()))?.partition_count())
    }

    /// Sends everything at once, and waits until every record handed over before has its outcome.
    ///
    /// With [`Acks::None`] a record's outcome is told when it is written to the connection; this waits until the broker has
    /// given all of them to its logs, so that the producer and the client may go, unless the connection is lost before or
    /// the broker takes longer than the delivery timeout. It costs a new stream for each partition that is sent to again.
    pub async fn flush(&self) {
        let mut newest = Vec::new();
        for topic in self.inner.topics.known().values() {
            for partition in &topic.partitions {
                newest.extend(lock(&partition.batcher).seal().map(|completion| (completion, partition.clone())));
                partition.wake.notify_one();
            }
        }
        let mut arrivals = Vec::new();
        for (completion, partition) in newest {
            completion.resolved().await;
            if self.inner.shared.acks == Acks::None {
                arrivals.push(partition.arrival());
            }
        }
        futures::future::join_all(arrivals).await;
    }

    /// Flushes, then ends this producer and all its clones.
    pub async fn close(self) {
        self.flush().await;
        self.inner.shared.closed.cancel();
        self.inner.topics.ended().await;
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
    async fn room(&self, charge: u32) -> Result<SemaphorePermit<'_>, ProduceError> {
        struct Starving<'a>(&'a AtomicUsize);
        impl Drop for Starving<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let shared = &self.inner.shared;
        shared.starving.fetch_add(1, Ordering::Relaxed);
        let _starving = Starving(&shared.starving);
        for topic in self.inner.topics.known().values() {
            topic.partitions.iter().for_each(|partition| partition.wake.notify_one());
        }
        shared.budget.acquire_many(charge).await.map_err(|_| ProduceError::Closed)
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
                lock(&topic.sticky).place(charge, self.inner.topics.batch_bytes(), partitions, rand::random)
            }
        }
    }

    /// The record's topic, as it is known; `None`: not at all, or with fewer partitions than the record names.
    fn known(&self, record: &ProducerRecord) -> Option<Arc<Topic>> {
        self.inner.topics.known().get(&record.topic).filter(|topic| knows(topic, record)).cloned()
    }

    /// Asks for the record's topic, or joins those who do.
    async fn learn(&self, record: &ProducerRecord) -> Result<Arc<Topic>, ProduceError> {
        if self.inner.shared.closed.is_cancelled() {
            return Err(ProduceError::Closed);
        }
        let known = self.inner.topics.known().get(&record.topic).map(|topic| topic.info.at);
        let topics = &self.inner.topics;
        topics.with_partition(topics.look_up(&record.topic, known), record.partition).await
    }

    /// Waits for `work`, but no longer than until `deadline`, which is set by the first wait for a record.
    async fn in_time<T>(
        &self,
        record: &ProducerRecord,
        deadline: &mut Option<Deadline>,
        work: impl Future<Output = Result<T, ProduceError>>,
    ) -> Result<T, ProduceError> {
        let shared = &self.inner.shared;
        let deadline = *deadline.get_or_insert_with(|| Deadline::within(shared.delivery_timeout));
        tokio::select! {
            biased;
            done = work => done,
            () = shared.closed.cancelled() => Err(ProduceError::Closed),
            () = tokio::time::sleep_until(deadline.at) => Err(ProduceError::TimedOut {
                topic: record.topic.clone(),
                partition: record.partition.unwrap_or(0),
                after: deadline.after,
                sent: false,
                reason: None,
            }),
        }
    }

    /// New partitions of a topic are noticed in time, without holding anybody up. What is known stays in use meanwhile.
    fn refresh_if_old(&self, topic: &Topic) {
        if topic.info.at.elapsed() > self.inner.shared.connections.config.metadata_max_age {
            drop(self.inner.topics.look_up(&topic.info.name, Some(topic.info.at)));
        }
    }
}

/// Whether what is known of a topic is enough for a record.
fn knows(topic: &Topic, record: &ProducerRecord) -> bool {
    record.partition.is_none_or(|partition| partition < topic.info.partition_count())
}
