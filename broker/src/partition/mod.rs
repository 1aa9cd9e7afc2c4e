//! One partition: the handle by which everybody else reaches it.
//!
//! Owns: [`PartitionHandle`] (append, read, status) and the messages to the partition's task. Refuses: to decide
//! ([`state`] does) and to drive ([`task`] does). Read next: [`state`], then [`task`].

mod following;
#[cfg(test)]
mod following_tests;
mod job;
#[cfg(test)]
mod role_tests;
pub mod state;
#[cfg(test)]
mod state_tests;
mod task;

use crate::clock::now_ms;
use crate::disk::DiskHealth;
use crate::error::PartitionError;
use crate::lease::Lease;
use crate::loan::Loan;
use crate::metrics::Metrics;
use crate::partitions::DataRoot;
use crate::planted::{Bug, planted};
use crate::pool::Pool;
use crate::replica::follower::Push;
use crate::replica::history::Verdict;
use crate::replica::lag::Lag;
use crate::replica::leader::{Altered, HelloRefusal, View};
use crate::replica::links::Replication;
use crate::replica::{Hello, Member, Report, Tenure};
use crate::topic_config::{TimestampSource, TopicConfig};
use arc_swap::ArcSwap;
use headwater_proto::TopicId;
use headwater_proto::batch::TimestampType;
use headwater_proto::wire::Acks;
use headwater_storage::{Cleanup, LastSequence, Log, LogConfig, LogError, LogReader, NewBatch, ReadError};
use state::{Append, AppendDone, AppendResult, Check, Limits, Offsets, fenced};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

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
    pub(crate) replica_lag_time_max_ms: u64,
    /// Whether this broker may take itself for the leader that it was made.
    pub(crate) lease: Lease,
    /// Which replicas are of no use.
    pub(crate) disk: Arc<DiskHealth>,
    /// The data folder, for what is written down before a log is cut.
    pub(crate) root: DataRoot,
    /// A follower deleted records as its leader did, and whoever asked for that waits until it is written down.
    pub(crate) trimmed: Arc<Notify>,
    /// What reaches other brokers and the metadata, once the broker has come so far.
    pub(crate) replication: Arc<OnceLock<Replication>>,
}

impl PartitionContext {
    fn limits(&self) -> Limits {
        Limits {
            group_bytes: self.group_bytes,
            // Half of what recovery reckons with, so that a group which is under way fits too.
            unflushed_bytes: usize::try_from(LogConfig::default().unflushed_limit_bytes / 2).unwrap_or(usize::MAX),
            replica_lag_time_max_ms: self.replica_lag_time_max_ms,
        }
    }
}

/// What readers of a partition follow.
#[derive(Debug, Clone)]
pub struct Watermarks {
    /// Where the log begins and ends, and what may be read.
    pub offsets: Offsets,
    /// Whether this broker leads the partition: readers go elsewhere once it does not.
    pub leads: bool,
    /// Where the log ended when it began to.
    pub epoch_start: i64,
    /// Since when a replica that does not lead has no leader that pushes to it; `None`: it has, or it leads. What it knows of the high
    /// watermark grows old then, and its readers are better served elsewhere.
    pub apart_since: Option<Instant>,
    /// Where this broker leads: below this no replica that is in sync with it has anything, nor will after a crash.
    pub kept_start: i64,
    /// Why the partition is no longer served, if it is not.
    pub ended: Option<PartitionError>,
}

/// A partition as it is shown.
#[derive(Debug, Clone)]
pub struct PartitionStatus {
    /// The epoch in which this broker keeps it.
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

/// What the checkpoints say of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) offsets: Offsets,
    pub(crate) unclean_taken: u32,
}

impl Noted {
    /// What they are to say now.
    pub(crate) fn of(handle: &PartitionHandle) -> Noted {
        Noted { offsets: handle.offsets(), unclean_taken: handle.unclean_taken() }
    }
}

/// A cheap handle on a partition.
#[derive(Clone)]
pub struct PartitionHandle {
    shared: Arc<PartitionShared>,
    /// Only handles have it: without any the task ends.
    mailbox: mpsc::UnboundedSender<Box<Message>>,
}

struct PartitionShared {
    topic: Arc<str>,
    topic_id: TopicId,
    partition: u32,
    me: Member,
    role: ArcSwap<AssignedRole>,
    config: ArcSwap<TopicConfig>,
    watermarks: watch::Sender<Watermarks>,
    /// `None` where the log could not be opened.
    reader: Option<LogReader>,
    /// Bytes that may wait in the mailbox and behind it.
    admission: Arc<Semaphore>,
    admission_bytes: u32,
    /// Work that may still be handed over.
    work_admission: Arc<Semaphore>,
    /// Where the log begins, as it is written down.
    kept_start: AtomicI64,
    /// New settings wait for the write half.
    configuring: AtomicBool,
    /// The end of the log moves back: what its offsets were is not to be written down any more.
    cutting: AtomicBool,
    /// How many unclean elections this replica has taken in.
    unclean_taken: AtomicU32,
    /// What the checkpoints were last made of, since this log was opened: what they said of another one in its folder does not count.
    noted: Mutex<Option<Noted>>,
    /// Held while the log's segments are compacted.
    compacting: tokio::sync::Mutex<()>,
    /// Its log failed, or bytes of it are damaged: it may be made anew where another broker leads.
    damaged: AtomicBool,
    /// The followers that refused what is sound here, which was told.
    refused_by: Mutex<BTreeSet<Member>>,
}

/// Who the metadata say leads.
#[derive(Debug)]
struct AssignedRole {
    view: Arc<View>,
    unclean_recoveries: u32,
}

/// What a follower's hello came to.
pub(crate) struct Admitted {
    pub(crate) verdict: Verdict,
    /// Cancelled when the stream has no business any more: the epoch is over, or the follower has opened another.
    pub(crate) over: CancellationToken,
}

/// How an append is answered; the bytes it took of the budget are free again when this is dropped.
struct Reply {
    tell: oneshot::Sender<AppendResult>,
    _admitted: OwnedSemaphorePermit,
}

/// Work for the write half, or the reason why it will never be done.
type Work = Box<dyn FnOnce(Result<&mut Log, PartitionError>) + Send>;

/// What the task is told; boxed, for a channel keeps room for 32 of what it carries, and most partitions are idle.
enum Message {
    Append(Append<Reply>),
    Work(Work),
    /// New settings, or another role.
    Configure,
    /// A follower of this leader opens its stream; the log is told from this offset on, where a batch begins.
    Hello(Box<Hello>, Option<i64>, oneshot::Sender<Result<Admitted, HelloRefusal>>),
    /// How far it is.
    Reported(Report),
    /// What became of a proposal of this partition epoch.
    Altered(i32, Altered),
    /// The leader answered the hello on this stream.
    Verdict(u64, Tenure, Verdict),
    /// The leader pushed something on this stream.
    Pushed(u64, Push, Pushed),
    /// The stream ended.
    Lost(u64),
    /// It is written down where the log begins.
    StartKept,
    /// How far the followers are behind, where this broker leads.
    Lags(oneshot::Sender<Vec<Lag>>),
    Fence(String),
    /// Everything taken is written and flushed, then the log is closed.
    Close(oneshot::Sender<Result<(), PartitionError>>),
    /// The log is let go as it is.
    Delete(oneshot::Sender<()>),
}

/// How what a partition waits for reaches it; does not keep its task alive.
#[derive(Clone)]
pub(crate) struct Inbox(mpsc::WeakUnboundedSender<Box<Message>>);

impl Inbox {
    fn send(&self, message: Message) {
        if let Some(mailbox) = self.0.upgrade() {
            // The task may have ended.
            drop(mailbox.send(Box::new(message)));
        }
    }

    /// The leader answered the hello on this stream.
    pub(crate) fn verdict(&self, stream: u64, tenure: Tenure, verdict: Verdict) {
        self.send(Message::Verdict(stream, tenure, verdict));
    }

    /// The leader pushed something on this stream.
    pub(crate) fn pushed(&self, stream: u64, push: Push, pushed: Pushed) {
        self.send(Message::Pushed(stream, push, pushed));
    }

    /// The stream ended; it is time for another.
    pub(crate) fn lost(&self, stream: u64) {
        self.send(Message::Lost(stream));
    }
}

/// Batches that a leader pushed, and the memory that they take.
pub(crate) struct Pushed {
    pub(crate) batches: Vec<NewBatch>,
    /// The base offsets of those with which the leader's segments begin.
    pub(crate) rolls: Vec<i64>,
    pub(crate) bytes: u64,
    /// What they were lent beyond their stream's share.
    pub(crate) loan: Option<Loan>,
}

/// Whether a partition's folder is one that an earlier topic of the name left. `found`: the topic id in it, if there is one.
pub fn is_of_another_topic(found: Option<TopicId>, assigned: TopicId) -> bool {
    found.is_some_and(|found| found != assigned) && !planted(Bug::OtherTopicOpened)
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
    /// This broker.
    pub me: Member,
    /// Who keeps it, who of them is in sync, and who leads, in which epoch.
    pub view: Arc<View>,
    /// How often a leader was elected that may have missed acknowledged records.
    pub unclean_recoveries: u32,
    /// The topic's settings.
    pub config: Arc<TopicConfig>,
}

impl AssignedPartition {
    /// Whether it is what it was: told apart by what was made anew, so that it costs nothing.
    pub(crate) fn is_still(&self, before: &AssignedPartition) -> bool {
        let is_same = Arc::ptr_eq(&self.view, &before.view) && Arc::ptr_eq(&self.config, &before.config);
        is_same && self.unclean_recoveries == before.unclean_recoveries
    }

    /// A partition that nobody but this broker keeps.
    #[cfg(test)]
    pub(crate) fn alone(
        topic: Arc<str>,
        topic_id: TopicId,
        partition: u32,
        leader_epoch: i32,
        config: Arc<TopicConfig>,
    ) -> AssignedPartition {
        let me = Member { broker: 0, incarnation: uuid::Uuid::nil() };
        let view = Arc::new(View::alone(me, leader_epoch));
        AssignedPartition { topic, topic_id, partition, me, view, unclean_recoveries: 0, config }
    }
}

impl PartitionHandle {
    /// Starts the task of a partition whose log was opened (with the high watermark that was known last, and how many unclean elections it
    /// has taken in), or could not be (`Err`: why; it is then fenced).
    pub(crate) fn start(
        assigned: &AssignedPartition,
        log: Result<(Log, i64, u32), (PartitionError, Offsets)>,
        context: &PartitionContext,
    ) -> PartitionHandle {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let mut unclean = 0;
        let (log, reader, offsets, ended) = match log {
            Ok((log, high_watermark, unclean_taken)) => {
                unclean = unclean_taken;
                let reader = log.reader();
                let (held, _) = reader.extent();
                let flushed = reader.flushed_offset();
                let high_watermark = high_watermark.clamp(held.start, held.end);
                let offsets = Offsets { log_start: held.start, high_watermark, log_end: held.end, flushed };
                (Some(log), Some(reader), offsets, None)
            }
            Err((why, offsets)) => (None, None, offsets, Some(why)),
        };
        let role = AssignedRole { view: Arc::clone(&assigned.view), unclean_recoveries: assigned.unclean_recoveries };
        let shared = Arc::new(PartitionShared {
            topic: Arc::clone(&assigned.topic),
            topic_id: assigned.topic_id,
            partition: assigned.partition,
            me: assigned.me,
            role: ArcSwap::from_pointee(role),
            config: ArcSwap::new(Arc::clone(&assigned.config)),
            watermarks: watch::Sender::new(Watermarks {
                offsets,
                leads: false,
                epoch_start: 0,
                apart_since: Some(Instant::now()),
                kept_start: i64::MIN,
                ended: ended.clone(),
            }),
            reader,
            admission: Arc::new(Semaphore::new(context.append_queue_bytes as usize)),
            admission_bytes: context.append_queue_bytes,
            work_admission: Arc::new(Semaphore::new(MAX_WAITING_WORK)),
            kept_start: AtomicI64::new(offsets.log_start),
            configuring: AtomicBool::new(false),
            cutting: AtomicBool::new(false),
            unclean_taken: AtomicU32::new(unclean),
            noted: Mutex::default(),
            compacting: tokio::sync::Mutex::default(),
            damaged: AtomicBool::new(false),
            refused_by: Mutex::default(),
        });
        task::spawn(Arc::clone(&shared), log, ended, Inbox(mailbox.downgrade()), messages, context);
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

    /// The epoch in which this broker keeps the partition.
    pub fn leader_epoch(&self) -> i32 {
        self.shared.role.load().view.leader_epoch
    }

    /// Whether this broker leads the partition, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.shared.leads()
    }

    /// Whether this broker's replica is in the ISR, as far as it knows.
    pub(crate) fn is_in_sync(&self) -> bool {
        let (view, me) = (self.view(), self.shared.me);
        view.replicas.iter().any(|replica| replica.member == me && replica.in_sync)
    }

    /// The epoch in which this broker leads the partition, if it does as far as it knows.
    pub(crate) fn leads_in(&self) -> Option<i32> {
        let role = self.shared.role.load();
        (role.view.leader == Some(self.shared.me)).then_some(role.view.leader_epoch)
    }

    /// Whether this is a handle on the same opened log.
    pub(crate) fn is(&self, other: &PartitionHandle) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// This broker.
    pub(crate) fn me(&self) -> Member {
        self.shared.me
    }

    /// Where the log ends once everything is written that was handed over before.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition is not served, or this broker does not lead it in this epoch.
    pub(crate) async fn written_end(&self, epoch: i32) -> Result<i64, PartitionError> {
        // An empty append waits for those before it.
        self.append_in(epoch, Vec::new(), Acks::Leader).await?;
        self.with_log(|log| Ok(log.log_end_offset())).await
    }

    /// Who keeps the partition, as far as this broker knows.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.shared.role.load().view)
    }

    /// Whether the end of its log moves back now.
    pub(crate) fn is_cutting(&self) -> bool {
        self.shared.cutting.load(Ordering::Acquire)
    }

    /// How many unclean elections this replica has taken in.
    pub(crate) fn unclean_taken(&self) -> u32 {
        self.shared.unclean_taken.load(Ordering::Acquire)
    }

    /// Whether the checkpoints say this of the replica.
    pub(crate) fn is_noted(&self, now: &Noted) -> bool {
        self.noted().as_ref() == Some(now)
    }

    /// The checkpoints say this of the replica, on stable storage.
    pub(crate) fn note(&self, now: Noted) {
        *self.noted() = Some(now);
    }

    fn noted(&self) -> MutexGuard<'_, Option<Noted>> {
        self.shared.noted.lock().unwrap_or_else(PoisonError::into_inner)
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
        let waiting = self.enqueue(None, batches, None, acks).await?;
        self.outcome(waiting).await
    }

    /// As [`append`](Self::append), of what was decided in a leader epoch: in no other one is it appended.
    ///
    /// # Errors
    /// Those of [`append`](Self::append); [`PartitionError::NotLeader`] in another epoch.
    pub(crate) async fn append_in(
        &self,
        epoch: i32,
        batches: Vec<NewBatch>,
        acks: Acks,
    ) -> Result<AppendDone, PartitionError> {
        let waiting = self.enqueue(Some(epoch), batches, None, acks).await?;
        self.outcome(waiting).await
    }

    /// Hands batches over in order, once the partition's budget admits them; with the leader epoch in which they were decided, if they
    /// rest on one, and what is left to check of them. What comes back yields the outcome.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition takes nothing, or not batches of this size.
    pub async fn enqueue(
        &self,
        epoch: Option<i32>,
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
        let append = Append { epoch, batches, check, bytes, acks, reply: Reply { tell, _admitted: admitted } };
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
        let Watermarks { offsets, ended, .. } = self.shared.watermarks.borrow().clone();
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
    /// [`PartitionError::OffsetOutOfRange`] above the high watermark; [`PartitionError::NotEnoughReplicas`] where one that is not heard of
    /// may be elected, which has the records.
    pub(crate) async fn delete_records(&self, before: i64) -> Result<i64, PartitionError> {
        self.view().check_in_sync()?;
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

    /// It is written down that the log begins here.
    pub(crate) fn start_is_kept(&self, log_start: i64) {
        // What was written down of a log that has begun anew lower since says nothing of this one.
        if self.is_cutting() || self.offsets().log_start < log_start {
            return;
        }
        if self.shared.kept_start.swap(log_start, Ordering::AcqRel) != log_start {
            // An error means that the task has ended.
            drop(self.send(Message::StartKept));
        }
    }

    /// Waits until every replica that is in sync begins here too, and will after a crash: no election brings back what lies below.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition is not served any more, or led elsewhere, or too few are in sync by now.
    pub(crate) async fn start_kept_everywhere(&self, log_start: i64) -> Result<(), PartitionError> {
        let mut watermarks = self.watermarks();
        let is_kept = |now: &Watermarks| now.kept_start >= log_start;
        let is_over = |now: &Watermarks| {
            is_kept(now) || now.ended.is_some() || !now.leads || self.view().check_in_sync().is_err()
        };
        let now = watermarks.wait_for(is_over).await.map_err(|_| self.why_ended())?.clone();
        match now.ended {
            Some(why) => Err(why),
            None if !now.leads => Err(PartitionError::NotLeader(self.leader_epoch())),
            None if !is_kept(&now) => self.view().check_in_sync(),
            None => Ok(()),
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

    /// Where the log begins and ends, for whoever asks where it ends: once everything that earlier leaders acknowledged is below the high
    /// watermark.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition is not served, or is led elsewhere.
    pub(crate) async fn settled_offsets(&self) -> Result<Offsets, PartitionError> {
        let mut watermarks = self.watermarks();
        let is_settled =
            |now: &Watermarks| now.ended.is_some() || !now.leads || now.offsets.high_watermark >= now.epoch_start;
        let now = watermarks.wait_for(is_settled).await.map_err(|_| self.why_ended())?.clone();
        match now.ended {
            Some(why) => Err(why),
            None if !now.leads => Err(PartitionError::NotLeader(self.leader_epoch())),
            None => Ok(now.offsets),
        }
    }

    /// Whether it was fenced while this broker ran because its log failed, or bytes of it are damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        self.shared.damaged.load(Ordering::Acquire)
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

    /// Takes new settings and another role.
    pub(crate) fn configure(&self, assigned: AssignedPartition) {
        let AssignedPartition { view, unclean_recoveries, config, .. } = assigned;
        self.shared.role.store(Arc::new(AssignedRole { view, unclean_recoveries }));
        self.shared.config.store(config);
        // A partition that ended has no use for settings.
        drop(self.send(Message::Configure));
    }

    /// A follower says where it is, and asks what to cut. `from`: where the log begins, if that is within a batch: at the batch.
    ///
    /// # Errors
    /// [`HelloRefusal`], or [`PartitionError`] where the partition is not served.
    pub(crate) async fn hello(
        &self,
        hello: Hello,
        from: Option<i64>,
    ) -> Result<Result<Admitted, HelloRefusal>, PartitionError> {
        let (tell, told) = oneshot::channel();
        self.send(Message::Hello(Box::new(hello), from, tell))?;
        told.await.map_err(|_| self.why_ended())
    }

    /// A follower says how far it is.
    ///
    /// # Errors
    /// [`PartitionError`] where the partition is not served.
    pub(crate) fn reported(&self, report: Report) -> Result<(), PartitionError> {
        self.send(Message::Reported(report))
    }

    /// Whether this follower has not refused before what is sound here.
    pub(crate) fn is_first_refusal_of(&self, follower: Member) -> bool {
        self.shared.refused_by.lock().unwrap_or_else(PoisonError::into_inner).insert(follower)
    }

    /// How far the followers are behind, where this broker leads; nothing is asked where all have everything.
    pub(crate) async fn lags(&self) -> Vec<Lag> {
        let (view, offsets) = (self.view(), self.offsets());
        let is_even = offsets.high_watermark >= offsets.log_end && view.replicas.iter().all(|replica| replica.in_sync);
        let (tell, told) = oneshot::channel();
        if is_even || !self.is_leader() || self.send(Message::Lags(tell)).is_err() {
            return Vec::new();
        }
        told.await.unwrap_or_default()
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

    /// Lets the log go as it is, refusing what waits: nothing is served any more. What comes back yields once no job has the log; the
    /// folder may be removed then.
    pub(crate) fn delete(&self) -> impl Future<Output = ()> + Send + use<> {
        let (tell, told) = oneshot::channel();
        // An error means that the task ended already, and so it does where nobody tells.
        drop(self.send(Message::Delete(tell)));
        async move { drop(told.await) }
    }

    fn send(&self, message: Message) -> Result<(), PartitionError> {
        self.mailbox.send(Box::new(message)).map_err(|_| self.why_ended())
    }

    fn check_served(&self) -> Result<(), PartitionError> {
        self.ended().map_or(Ok(()), Err)
    }

    fn why_ended(&self) -> PartitionError {
        self.ended().unwrap_or(PartitionError::ShuttingDown)
    }
}

impl std::fmt::Debug for Pushed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pushed")
            .field("batches", &self.batches.len())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PartitionHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PartitionHandle({}-{})", self.shared.topic, self.shared.partition)
    }
}

impl PartitionShared {
    fn leads(&self) -> bool {
        self.role.load().view.leader == Some(self.me)
    }
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
