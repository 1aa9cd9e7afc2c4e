//! One partition: the handle by which everybody else reaches it.
//!
//! Owns: [`PartitionHandle`] (append, read, status) and the messages to the partition's task. Refuses: to decide
//! ([`state`] does) and to drive ([`task`] does). Read next: [`state`], then [`task`].

pub mod state;
#[cfg(test)]
mod state_tests;
mod task;

use crate::clock::now_ms;
use crate::error::PartitionError;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::replica::Member;
use crate::replica::leader::View;
use crate::topic_config::{TimestampSource, TopicConfig};
use arc_swap::ArcSwap;
use headwater_proto::TopicId;
use headwater_proto::batch::TimestampType;
use headwater_proto::wire::Acks;
use headwater_storage::{Cleanup, LastSequence, Log, LogConfig, LogError, LogReader, NewBatch, ReadError};
use state::{Append, AppendDone, AppendResult, Check, Limits, Offsets, PartitionState, fenced};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// This broker's replica, where nothing but the broker keeps the partition.
const ONLY_REPLICA: Member = Member { broker: 0, incarnation: uuid::Uuid::nil() };

/// Kafka's `replica.lag.time.max.ms`.
const REPLICA_LAG_TIME_MAX_MS: u64 = 30_000;

/// What an append counts for in the mailbox beside its bytes: empty ones take memory too.
const APPEND_OVERHEAD_BYTES: usize = 256;

/// Work that may wait for the write half. Whoever has more waits with it: a partition that hangs gathers no more than this.
const MAX_WAITING_WORK: usize = 256;

/// What every partition of a broker needs.
#[derive(Clone)]
pub(crate) struct PartitionContext {
    pub(crate) pool: Pool,
    pub(crate) metrics: Arc<Metrics>,
    /// Bytes that may wait for one partition's log.
    pub(crate) append_queue_bytes: u32,
    /// Most bytes of a group commit.
    pub(crate) group_bytes: usize,
    pub(crate) producer_id_expiration_ms: u64,
}

/// What readers of a partition follow.
#[derive(Debug, Clone)]
pub struct Watermarks {
    /// Where the log begins and ends, and what may be read.
    pub offsets: Offsets,
    /// Why the partition is no longer served, if it is not.
    pub ended: Option<PartitionError>,
}

/// A partition as it is shown.
#[derive(Debug, Clone)]
pub struct PartitionStatus {
    /// The epoch in which this broker leads it.
    pub leader_epoch: i32,
    /// First offset of the log.
    pub log_start_offset: i64,
    /// Readers see what is below.
    pub high_watermark: i64,
    /// The offset that the next record gets.
    pub log_end_offset: i64,
    /// Everything below is on stable storage.
    pub flushed_offset: i64,
    /// Bytes of its segments.
    pub size_bytes: u64,
    /// Why it is not served, if it is not.
    pub fenced: Option<String>,
}

/// A cheap handle on a partition.
#[derive(Clone)]
pub struct PartitionHandle {
    shared: Arc<PartitionShared>,
    /// Only handles have it: without any the task ends.
    mailbox: mpsc::UnboundedSender<Message>,
}

struct PartitionShared {
    topic: Arc<str>,
    topic_id: TopicId,
    partition: u32,
    leader_epoch: AtomicI32,
    config: ArcSwap<TopicConfig>,
    watermarks: watch::Sender<Watermarks>,
    /// `None` where the log could not be opened.
    reader: Option<LogReader>,
    /// Bytes that may wait in the mailbox and behind it.
    admission: Arc<Semaphore>,
    admission_bytes: u32,
    /// Work that may still be handed over.
    work_admission: Arc<Semaphore>,
    /// New settings wait for the write half.
    configuring: AtomicBool,
    /// Held while the log's segments are compacted.
    compacting: tokio::sync::Mutex<()>,
}

/// How an append is answered; the bytes it took of the budget are free again when this is dropped.
struct Reply {
    tell: oneshot::Sender<AppendResult>,
    _admitted: OwnedSemaphorePermit,
}

/// Work for the write half, or the reason why it will never be done.
type Work = Box<dyn FnOnce(Result<&mut Log, PartitionError>) + Send>;

enum Message {
    Append(Append<Reply>),
    Work(Work),
    Configure,
    Fence(String),
    /// Everything taken is written and flushed, then the log is closed.
    Close(oneshot::Sender<Result<(), PartitionError>>),
    /// The log is let go as it is.
    Delete(oneshot::Sender<()>),
}

/// What a partition is.
#[derive(Debug, Clone)]
pub struct AssignedPartition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The topic's id.
    pub topic_id: TopicId,
    /// The partition's number.
    pub partition: u32,
    /// The epoch in which this broker leads it.
    pub leader_epoch: i32,
    /// The topic's settings.
    pub config: Arc<TopicConfig>,
}

impl PartitionHandle {
    /// Starts the task of a partition whose log was opened, or could not be (`Err`: why; it is then fenced).
    pub(crate) fn start(
        assigned: &AssignedPartition,
        log: Result<Log, (PartitionError, Offsets)>,
        context: &PartitionContext,
    ) -> PartitionHandle {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let (log, reader, offsets, ended) = match log {
            Ok(log) => {
                let reader = log.reader();
                let end = reader.log_end_offset();
                let log_start = reader.log_start_offset();
                let flushed = reader.flushed_offset();
                let offsets = Offsets { log_start, high_watermark: log_start, log_end: end, flushed };
                (Some(log), Some(reader), offsets, None)
            }
            Err((why, offsets)) => (None, None, offsets, Some(why)),
        };
        let limits = Limits {
            group_bytes: context.group_bytes,
            // Half of what recovery reckons with, so that a group which is under way fits too.
            unflushed_bytes: usize::try_from(LogConfig::default().unflushed_limit_bytes / 2).unwrap_or(usize::MAX),
            replica_lag_time_max_ms: REPLICA_LAG_TIME_MAX_MS,
        };
        let view = alone(assigned.leader_epoch);
        let state = PartitionState::new(ONLY_REPLICA, &view, true, &assigned.config, limits, offsets, now_ms());
        let offsets = state.offsets();
        let shared = Arc::new(PartitionShared {
            topic: Arc::clone(&assigned.topic),
            topic_id: assigned.topic_id,
            partition: assigned.partition,
            leader_epoch: AtomicI32::new(assigned.leader_epoch),
            config: ArcSwap::new(Arc::clone(&assigned.config)),
            watermarks: watch::Sender::new(Watermarks { offsets, ended: ended.clone() }),
            reader,
            admission: Arc::new(Semaphore::new(context.append_queue_bytes as usize)),
            admission_bytes: context.append_queue_bytes,
            work_admission: Arc::new(Semaphore::new(MAX_WAITING_WORK)),
            configuring: AtomicBool::new(false),
            compacting: tokio::sync::Mutex::default(),
        });
        task::spawn(Arc::clone(&shared), state, log, ended, messages, context);
        PartitionHandle { shared, mailbox }
    }

    /// The topic's name.
    pub fn topic(&self) -> &Arc<str> {
        &self.shared.topic
    }

    /// The topic's id.
    pub fn topic_id(&self) -> TopicId {
        self.shared.topic_id
    }

    /// The partition's number.
    pub fn partition(&self) -> u32 {
        self.shared.partition
    }

    /// What the partition is, as it is now.
    pub(crate) fn assigned(&self) -> AssignedPartition {
        AssignedPartition {
            topic: Arc::clone(self.topic()),
            topic_id: self.topic_id(),
            partition: self.partition(),
            leader_epoch: self.leader_epoch(),
            config: self.config(),
        }
    }

    /// The epoch in which this broker leads the partition.
    pub fn leader_epoch(&self) -> i32 {
        self.shared.leader_epoch.load(Ordering::Acquire)
    }

    /// The topic's settings.
    pub fn config(&self) -> Arc<TopicConfig> {
        self.shared.config.load_full()
    }

    /// Appends batches that were checked and walked, and waits until `acks` and the topic's durability are met.
    ///
    /// # Errors
    /// [`PartitionError`]. After a refusal none of the batches was appended, except that of several batches with a
    /// sequence those before the refused one were.
    pub async fn append(&self, batches: Vec<NewBatch>, acks: Acks) -> Result<AppendDone, PartitionError> {
        let waiting = self.enqueue(batches, None, acks).await?;
        self.outcome(waiting).await
    }

    /// Hands batches over in order, once the partition's budget admits them; with what is left to check of them. What comes back
    /// yields the outcome.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition takes nothing, or not batches of this size.
    pub async fn enqueue(
        &self,
        batches: Vec<NewBatch>,
        check: Option<Check>,
        acks: Acks,
    ) -> Result<oneshot::Receiver<AppendResult>, PartitionError> {
        self.check_served()?;
        let config = self.shared.config.load();
        let limit = config.max_message_bytes as usize;
        if let Some(batch) = batches.iter().find(|batch| batch.bytes.len() > limit) {
            return Err(PartitionError::TooLarge { bytes: batch.bytes.len(), limit });
        }
        drop(config);
        let bytes: usize = batches.iter().map(|batch| batch.bytes.len()).sum();
        let counted = bytes.saturating_add(APPEND_OVERHEAD_BYTES);
        let permits = u32::try_from(counted).unwrap_or(u32::MAX).min(self.shared.admission_bytes);
        let admitted = Arc::clone(&self.shared.admission).acquire_many_owned(permits).await;
        let admitted = admitted.map_err(|_| self.why_ended())?;
        let (tell, told) = oneshot::channel();
        let append = Append { batches, check, bytes, acks, reply: Reply { tell, _admitted: admitted } };
        self.send(Message::Append(append))?;
        Ok(told)
    }

    /// Waits for what [`enqueue`](Self::enqueue) gave.
    ///
    /// # Errors
    /// The append's own.
    pub async fn outcome(&self, waiting: oneshot::Receiver<AppendResult>) -> AppendResult {
        waiting.await.unwrap_or_else(|_| Err(self.why_ended()))
    }

    /// Offsets, size, and whether it is served.
    pub fn status(&self) -> PartitionStatus {
        let Watermarks { offsets, ended } = self.shared.watermarks.borrow().clone();
        PartitionStatus {
            leader_epoch: self.leader_epoch(),
            log_start_offset: offsets.log_start,
            high_watermark: offsets.high_watermark,
            log_end_offset: offsets.log_end,
            flushed_offset: offsets.flushed,
            size_bytes: self.shared.reader.as_ref().map_or(0, LogReader::size_bytes),
            fenced: ended.map(|why| why.to_string()),
        }
    }

    /// The read half of the log.
    ///
    /// # Errors
    /// When the partition is fenced or gone.
    pub fn reader(&self) -> Result<LogReader, PartitionError> {
        self.check_served()?;
        self.shared.reader.clone().ok_or_else(|| self.why_ended())
    }

    /// What readers follow: changes whenever an offset does, and when the partition ends.
    pub fn watermarks(&self) -> watch::Receiver<Watermarks> {
        self.shared.watermarks.subscribe()
    }

    /// Deletes the records below `before`, or below the high watermark if `before` is -1. Returns where the log begins, once
    /// [`offsets`](Self::offsets) says so too. A crash may bring them back as long as the checkpoint does not.
    ///
    /// # Errors
    /// [`PartitionError::OffsetOutOfRange`] above the high watermark.
    pub(crate) async fn delete_records(&self, before: i64) -> Result<i64, PartitionError> {
        let Offsets { log_start, high_watermark, .. } = self.offsets();
        let before = if before == -1 { high_watermark } else { before };
        if before < 0 || before > high_watermark {
            return Err(PartitionError::OffsetOutOfRange {
                offset: before,
                log_start_offset: log_start,
                end_offset: high_watermark,
            });
        }
        let log_start = self.with_log(move |log| log.delete_records(before, high_watermark, now_ms())).await?;
        let mut watermarks = self.watermarks();
        let told = watermarks.wait_for(|now| now.offsets.log_start >= log_start || now.ended.is_some()).await;
        match told.map_err(|_| self.why_ended())?.ended.clone() {
            None => Ok(log_start),
            Some(why) => Err(why),
        }
    }

    /// The last batch that the log holds of a producer.
    ///
    /// # Errors
    /// When the partition is fenced or gone.
    pub async fn last_sequence(&self, producer_id: i64) -> Result<Option<LastSequence>, PartitionError> {
        // What was handed over before counts: an empty append waits for it.
        self.append(Vec::new(), Acks::Leader).await?;
        self.with_log(move |log| Ok(log.last_sequence(producer_id))).await
    }

    /// Where the log begins and ends now.
    pub fn offsets(&self) -> Offsets {
        self.shared.watermarks.borrow().offsets
    }

    /// Why the partition is not served, if it is not.
    pub(crate) fn ended(&self) -> Option<PartitionError> {
        self.shared.watermarks.borrow().ended.clone()
    }

    /// What whoever reads is told of a read that failed. A bad block, and bytes that make no sense, fence the partition.
    pub(crate) fn read_failed(&self, error: &ReadError) -> PartitionError {
        match error {
            ReadError::OutOfRange(range) => PartitionError::OffsetOutOfRange {
                offset: range.offset,
                // What was deleted just now may not have been published yet.
                log_start_offset: range.log_start.max(self.offsets().log_start),
                end_offset: self.offsets().high_watermark,
            },
            ReadError::Closed => self.why_ended(),
            ReadError::Io(_) if error.retryable() => PartitionError::Exhausted(error.to_string().into()),
            ReadError::Io(_) | ReadError::Corruption(_) => self.fence(error),
        }
    }

    /// Nothing of the partition is served any more.
    pub(crate) fn fence(&self, reason: &impl std::fmt::Display) -> PartitionError {
        // A partition that ended is not served already.
        drop(self.send(Message::Fence(reason.to_string())));
        fenced(reason)
    }

    /// Held while the log's segments are compacted; the folder is not given to another log meanwhile.
    pub(crate) fn compacting(&self) -> &tokio::sync::Mutex<()> {
        &self.shared.compacting
    }

    /// Runs `work` with the write half, on the I/O pool, before the appends that wait.
    pub(crate) async fn with_log<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Log) -> Result<T, LogError> + Send + 'static,
    ) -> Result<T, PartitionError> {
        let admitted = Arc::clone(&self.shared.work_admission).acquire_owned().await;
        let admitted = admitted.map_err(|_| self.why_ended())?;
        let (tell, told) = oneshot::channel();
        let work: Work = Box::new(move |log| {
            // Whoever asked may have gone.
            drop(tell.send(log.and_then(|log| work(log).map_err(|error| log_error(&error)))));
            drop(admitted);
        });
        self.send(Message::Work(work))?;
        told.await.unwrap_or_else(|_| Err(self.why_ended()))
    }

    /// Takes new settings and a new leader epoch.
    pub(crate) fn configure(&self, leader_epoch: i32, config: Arc<TopicConfig>) {
        self.shared.leader_epoch.fetch_max(leader_epoch, Ordering::AcqRel);
        self.shared.config.store(config);
        // A partition that ended has no use for settings.
        drop(self.send(Message::Configure));
    }

    /// Writes, flushes and answers what was taken, then closes the log.
    ///
    /// # Errors
    /// When the partition is fenced, or closing it failed: the folder needs recovery.
    pub(crate) async fn close(&self) -> Result<(), PartitionError> {
        let (tell, told) = oneshot::channel();
        self.send(Message::Close(tell))?;
        told.await.unwrap_or_else(|_| Err(self.why_ended()))
    }

    /// Lets the log go as it is, refusing what waits. The folder may be removed afterwards.
    pub(crate) async fn delete(&self) {
        let (tell, told) = oneshot::channel();
        if self.send(Message::Delete(tell)).is_ok() {
            // An error means that the task ended already.
            drop(told.await);
        }
    }

    fn send(&self, message: Message) -> Result<(), PartitionError> {
        self.mailbox.send(message).map_err(|_| self.why_ended())
    }

    fn check_served(&self) -> Result<(), PartitionError> {
        self.ended().map_or(Ok(()), Err)
    }

    fn why_ended(&self) -> PartitionError {
        self.ended().unwrap_or(PartitionError::ShuttingDown)
    }
}

impl std::fmt::Debug for PartitionHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PartitionHandle({}-{})", self.shared.topic, self.shared.partition)
    }
}

/// A partition whose only replica is here.
fn alone(leader_epoch: i32) -> View {
    View::alone(ONLY_REPLICA, leader_epoch)
}

/// A topic's settings as its logs take them.
pub(crate) fn log_config(topic: &TopicConfig, producer_id_expiration_ms: u64) -> LogConfig {
    LogConfig {
        segment_bytes: topic.segment_bytes,
        segment_ms: topic.segment_ms,
        segment_index_bytes: topic.segment_index_bytes,
        index_interval_bytes: topic.index_interval_bytes,
        retention_ms: topic.retention_ms,
        retention_bytes: topic.retention_bytes,
        cleanup: Cleanup { delete: topic.cleanup_delete, compact: topic.cleanup_compact },
        delete_retention_ms: topic.delete_retention_ms,
        min_compaction_lag_ms: topic.min_compaction_lag_ms,
        max_compaction_lag_ms: topic.max_compaction_lag_ms,
        min_cleanable_dirty_ratio: topic.min_cleanable_dirty_ratio,
        max_message_bytes: topic.max_message_bytes,
        timestamp_type: match topic.message_timestamp_type {
            TimestampSource::Create => TimestampType::Create,
            TimestampSource::LogAppend => TimestampType::LogAppend,
        },
        producer_id_expiration_ms,
        ..LogConfig::default()
    }
}

/// What the log's write half refused, for whoever asked.
fn log_error(error: &LogError) -> PartitionError {
    match error {
        LogError::FullDisk(full) => PartitionError::DiskFull(full.to_string().into()),
        LogError::OutOfRange(range) => PartitionError::OffsetOutOfRange {
            offset: range.offset,
            log_start_offset: range.log_start,
            end_offset: range.log_end,
        },
        LogError::Io(_) if error.retryable() => PartitionError::Exhausted(error.to_string().into()),
        LogError::Io(_) | LogError::Poisoned(_) | LogError::Corruption(_) => fenced(error),
        LogError::Misuse(_) => PartitionError::Internal(error.to_string().into()),
    }
}
