//! What the leader of a partition decides: which appends form a group, what is written and flushed next, and which
//! acknowledgement may go out. Where the high watermark stands is [`LeaderState`]'s to say, for one broker as for many.
//!
//! Owns: [`PartitionState`], pure: time, offsets and results come in as arguments, decisions go out as a [`Job`] and
//! [`Effect`]s. It is generic over how a request is answered (`R`) and over other work for the log's write half (`W`), so
//! that a test needs neither channels nor files. Refuses: clocks, files, tasks. Read next: [`super::task`]; for what
//! replicas add, [`crate::replica::leader`].
//!
//! What always holds, and is checked after each step: `log_start <= high_watermark <= log_end`; `flushed <= log_end`; the
//! high watermark never falls; whatever is parked waits for an offset above the high watermark, and for no longer than its leader
//! epoch: another leader may cut what it waits for.
//!
//! # acks and durability
//!
//! | acks | durability | the acknowledgement waits for               | high watermark | it reports |
//! |------|------------|---------------------------------------------|----------------|------------|
//! | 0    | flushed    | nothing (credit comes back after the write) | flushed offset | none       |
//! | 0    | replicated | nothing (credit comes back after the write) | written offset | none       |
//! | 1    | flushed    | the write                                   | flushed offset | written    |
//! | 1    | replicated | the write                                   | written offset | written    |
//! | all  | flushed    | the flush (high watermark)                  | flushed offset | flushed    |
//! | all  | replicated | the write (high watermark)                  | written offset | replicated |
//!
//! With `replicated`, what is written is flushed at the latest `flush.ms` after the first unflushed byte, or once the
//! unflushed bytes reach the limit that recovery knows. Where there are other replicas, the offsets of the high watermark are those of
//! the whole in-sync set, and nothing else in the table changes.
//!
//! Where a topic asks for more in-sync replicas (`min.insync.replicas`) than there are, acks=all is refused as it arrives: it
//! would promise more than can be kept.

use crate::error::PartitionError;
use crate::planted::{Bug, planted};
use crate::replica::leader::{self, AlterPartition, LeaderState, LocalLog, Settings, View};
use crate::replica::{Member, Tenure};
use crate::topic_config::{TopicConfig, TopicDurability};
use headwater_proto::wire::{Acks, BatchAck, Durability};
use headwater_storage::{BatchOutcome, NewBatch};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How long after a flush that found no room the next is tried, in milliseconds.
const RETRY_FLUSH_MS: i64 = 1000;

/// What an append came to.
#[derive(Debug, Clone, PartialEq)]
pub struct AppendDone {
    /// One for each batch, in order. None of them is [`BatchOutcome::Refused`].
    pub batches: Vec<BatchOutcome>,
    /// The level that was reached.
    pub durability: Durability,
}

impl AppendDone {
    /// How many records were appended: none of those that were there before.
    pub fn appended(&self) -> u64 {
        let appended = |outcome: &BatchOutcome| match *outcome {
            BatchOutcome::Appended { base_offset, last_offset, .. } => {
                u64::try_from(last_offset - base_offset + 1).unwrap_or(0)
            }
            BatchOutcome::Duplicate { .. } | BatchOutcome::Refused(_) => 0,
        };
        self.batches.iter().map(appended).sum()
    }

    /// What its producer is told of each batch.
    pub fn acks(&self) -> Vec<BatchAck> {
        let ack = |outcome: &BatchOutcome| match *outcome {
            BatchOutcome::Appended { base_offset, log_append_time_ms, .. } => {
                BatchAck { base_offset, log_append_time_ms, duplicate: false }
            }
            BatchOutcome::Duplicate { base_offset, .. } => {
                BatchAck { base_offset, log_append_time_ms: -1, duplicate: true }
            }
            // Never among what was appended; -1 is no offset.
            BatchOutcome::Refused(_) => BatchAck { base_offset: -1, log_append_time_ms: -1, duplicate: false },
        };
        self.batches.iter().map(ack).collect()
    }
}

/// How an append ended.
pub type AppendResult = Result<AppendDone, PartitionError>;

/// The offsets that readers go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets {
    /// First offset of the log.
    pub log_start: i64,
    /// Readers see what is below.
    pub high_watermark: i64,
    /// The offset that the next record gets.
    pub log_end: i64,
    /// Everything below is on stable storage.
    pub flushed: i64,
}

impl Offsets {
    /// Up to where records may go for the sake of later ones: what is not committed may be cut, and would leave nothing.
    pub fn compactable(&self) -> i64 {
        if planted(Bug::CompactionPastWatermark) { self.log_end } else { self.high_watermark }
    }
}

/// The bounds that a partition keeps.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes of one group commit, unless a single request is larger.
    pub group_bytes: usize,
    /// Most bytes that may be written and not flushed.
    pub unflushed_bytes: usize,
    /// Longest time in milliseconds that a batch may be unreported by a replica that stays in sync.
    pub replica_lag_time_max_ms: u64,
}

/// One request to append.
#[derive(Debug)]
pub struct Append<R> {
    /// The leader epoch in which it was decided, which it does not outlive; `None`: it rests on nothing that an epoch could change.
    pub epoch: Option<i32>,
    /// What is appended; nothing: the request waits for those before it.
    pub batches: Vec<NewBatch>,
    /// What is left to check of them, unless they were checked.
    pub check: Option<Check>,
    /// Bytes of all batches.
    pub bytes: usize,
    /// When it is acknowledged.
    pub acks: Acks,
    /// How it is answered.
    pub reply: R,
}

/// What is left to be asked about batches by whoever writes them.
pub type Ask = Box<dyn FnOnce(&[NewBatch]) -> Result<(), PartitionError> + Send>;

/// What a request of a stream waits for, besides its turn: its batches' check, and that nothing failed before it.
pub struct Check {
    ask: Option<Ask>,
    failed: Arc<AtomicBool>,
}

impl Check {
    /// `failed` is the stream's: whether the partition refused one of its requests, which none that follows may overtake. `ask`:
    /// what is wrong with the batches, asked where the log is written; `None`: they were checked.
    pub fn new(failed: Arc<AtomicBool>, ask: Option<Ask>) -> Check {
        Check { ask, failed }
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }
}

impl<R> Append<R> {
    /// It is not taken, and nothing that follows on its stream is.
    pub fn refuse(self) -> R {
        self.check.iter().for_each(Check::fail);
        self.reply
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// The batches of one request, on their way into the log.
#[derive(Debug)]
pub struct Request {
    batches: Vec<NewBatch>,
    check: Option<Check>,
}

impl Request {
    /// How many batches it has.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether it only waits for those before it.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Its batches, once, if they may be written.
    ///
    /// # Errors
    /// [`PartitionError`]: what is wrong with them, or [`PartitionError::EarlierFailed`].
    pub fn take(&mut self) -> Result<Vec<NewBatch>, PartitionError> {
        let batches = std::mem::take(&mut self.batches);
        if let Some(check) = &mut self.check {
            if check.failed.load(Ordering::Acquire) {
                return Err(PartitionError::EarlierFailed);
            }
            if let Some(ask) = check.ask.take() {
                ask(&batches).inspect_err(|_| self.fail())?;
            }
        }
        Ok(batches)
    }

    /// What became of it, by the outcomes of its batches.
    ///
    /// # Errors
    /// [`PartitionError::Sequence`].
    pub fn became(&self, outcomes: Vec<BatchOutcome>) -> Result<Vec<BatchOutcome>, PartitionError> {
        let refused = outcomes.iter().find_map(|outcome| match outcome {
            BatchOutcome::Refused(error) => Some(*error),
            _ => None,
        });
        match refused {
            None => Ok(outcomes),
            Some(error) => {
                self.fail();
                Err(PartitionError::Sequence(error))
            }
        }
    }

    /// It was not written: nothing of its stream is from here on.
    pub fn fail(&self) {
        if let Some(check) = &self.check {
            check.fail();
        }
    }
}

/// What the driver does next with the log's write half.
#[derive(Debug)]
pub enum Job<W> {
    /// Check and write these as one group; then flush, if so told.
    Commit {
        /// All requests, in order.
        requests: Vec<Request>,
        /// Bytes of their batches.
        bytes: usize,
        /// The epoch in which they are appended.
        leader_epoch: i32,
        /// Whether to flush.
        flush: bool,
        /// Whether somebody waits for the write alone.
        tell_written: bool,
    },
    /// Flush what was written.
    Flush,
    /// Other work.
    Work(W),
}

impl<W> Job<W> {
    /// Whether it may be long where the disk is well.
    pub(super) fn is_long(&self) -> bool {
        !matches!(self, Job::Commit { .. } | Job::Flush)
    }
}

/// What the driver does now.
#[derive(Debug)]
pub enum Effect<R> {
    /// Answer a request.
    Answer(R, AppendResult),
    /// Offsets changed: publish them.
    Publish(Offsets),
    /// Propose that the in-sync replicas change, and [tell the leader](PartitionState::replicas) what became of it.
    Propose(AlterPartition),
}

#[derive(Debug)]
struct Written<R> {
    acks: Acks,
    failed: Option<Arc<AtomicBool>>,
    reply: R,
}

#[derive(Debug)]
struct Parked<R> {
    /// The high watermark that has to be reached.
    offset: i64,
    done: Vec<BatchOutcome>,
    /// Its stream's mark: nothing that follows overtakes it when it is refused after all.
    failed: Option<Arc<AtomicBool>>,
    reply: R,
}

/// See the module's head.
#[derive(Debug)]
pub struct PartitionState<R, W> {
    me: Member,
    leader: LeaderState,
    /// The epoch that begins once the write half is back: only then is it known where.
    next_epoch: Option<View>,
    settings: Settings,
    flush_interval_ms: u64,
    limits: Limits,
    offsets: Offsets,
    waiting: VecDeque<Append<R>>,
    work: VecDeque<W>,
    /// The requests of the commit under way, until its outcomes are known.
    writing: Vec<Written<R>>,
    /// Whether the epoch ended in which the commit under way began.
    writing_outlived: bool,
    /// Whether the write half is away.
    busy: bool,
    /// What the job under way belongs to.
    job: Tenure,
    parked: VecDeque<Parked<R>>,
    unflushed_bytes: usize,
    unflushed_since_ms: Option<i64>,
    /// The topic was `replicated` when the high watermark came here: that is no level of `flushed` before all in sync have flushed it.
    not_all_flushed_below: Option<i64>,
    /// When a flush is tried again for which there was no room.
    retry_flush_ms: Option<i64>,
    /// Why nothing more is taken.
    ended: Option<PartitionError>,
    effects: Vec<Effect<R>>,
}

impl<R, W> PartitionState<R, W> {
    /// Begins to lead. `view`: the partition, as the metadata have it; `lease`: whether the broker has its lease; `offsets`: those of the
    /// log, with the high watermark that this replica knows.
    pub fn new(
        me: Member,
        view: &View,
        lease: bool,
        topic: &TopicConfig,
        limits: Limits,
        mut offsets: Offsets,
        now_ms: i64,
    ) -> Self {
        let settings = settings(topic, &limits);
        let mut leader = LeaderState::lead(me, view, local_log(&offsets, 0), settings, lease, now_ms);
        leader.begins_at(offsets.log_start, now_ms);
        offsets.high_watermark = leader.high_watermark();
        PartitionState {
            me,
            job: leader.tenure(),
            leader,
            next_epoch: None,
            settings,
            flush_interval_ms: topic.flush_ms,
            limits,
            offsets,
            waiting: VecDeque::new(),
            work: VecDeque::new(),
            writing: Vec::new(),
            writing_outlived: false,
            busy: false,
            parked: VecDeque::new(),
            unflushed_bytes: 0,
            // What a follower had not flushed yet when it was elected is flushed at once: its own offset counts.
            unflushed_since_ms: (offsets.flushed < offsets.log_end).then_some(i64::MIN / 2),
            retry_flush_ms: None,
            // The one before may have led a topic that was `replicated`: nobody knows here.
            not_all_flushed_below: (settings.durability == TopicDurability::Flushed).then_some(offsets.high_watermark),
            ended: None,
            effects: Vec::new(),
        }
    }

    /// A request arrives.
    pub fn append(&mut self, append: Append<R>) {
        let epoch = self.next_epoch.as_ref().map_or(self.leader.tenure().leader_epoch, |next| next.leader_epoch);
        let admitted = match &self.ended {
            Some(why) => Err(why.clone()),
            None if append.epoch.is_some_and(|decided| decided != epoch) && !planted(Bug::DecidedInAnotherEpoch) => {
                Err(PartitionError::NotLeader(epoch))
            }
            None if append.batches.is_empty() => Ok(()),
            None => self.leader.admit(append.acks),
        };
        match admitted {
            Ok(()) => self.waiting.push_back(append),
            Err(why) => {
                append.check.iter().for_each(Check::fail);
                self.effects.push(Effect::Answer(append.reply, Err(why)));
            }
        }
    }

    /// Other work for the write half arrives. It goes before the appends that wait.
    pub fn work(&mut self, work: W) {
        self.work.push_back(work);
    }

    /// The topic's settings are new.
    pub fn configure(&mut self, topic: &TopicConfig, now_ms: i64) {
        let before = std::mem::replace(&mut self.settings, settings(topic, &self.limits)).durability;
        match (before, self.settings.durability) {
            (TopicDurability::Replicated, TopicDurability::Flushed) => {
                self.not_all_flushed_below = Some(self.offsets.high_watermark);
            }
            (_, TopicDurability::Replicated) => self.not_all_flushed_below = None,
            _ => {}
        }
        self.flush_interval_ms = topic.flush_ms;
        self.leader.configure(self.settings, now_ms);
        self.advance();
    }

    /// This broker leads on in a later epoch, which begins where the log ends once the write half is here. What is parked, what
    /// is being written with acks=all, and what waits and was decided in it belongs to the epoch that ends.
    pub fn lead(&mut self, view: View, now_ms: i64) {
        let epoch = self.leader.tenure().leader_epoch;
        if view.leader_epoch <= epoch || self.ended.is_some() {
            return;
        }
        for parked in std::mem::take(&mut self.parked) {
            self.outlived(parked.reply, parked.failed.as_deref(), epoch);
        }
        self.writing_outlived = !self.writing.is_empty();
        for request in std::mem::take(&mut self.waiting) {
            let is_over = request.epoch.is_some_and(|decided| decided != view.leader_epoch);
            match is_over && !planted(Bug::DecidedInAnotherEpoch) {
                true => self.effects.push(Effect::Answer(request.refuse(), Err(PartitionError::NotLeader(epoch)))),
                false => self.waiting.push_back(request),
            }
        }
        self.next_epoch = Some(view);
        self.begin_epoch(now_ms);
    }

    /// Tells the leader machine something of the replicas, the metadata or the lease, and does what follows.
    pub fn replicas<T>(&mut self, tell: impl FnOnce(&mut LeaderState) -> T) -> T {
        let told = tell(&mut self.leader);
        self.advance();
        told
    }

    /// The leader machine.
    pub fn leader(&self) -> &LeaderState {
        &self.leader
    }

    /// What to do next, if the write half is here and there is something to do. Whoever takes a job reports back with
    /// [`written`](Self::written) or [`refused`](Self::refused) (a commit), [`flushed`](Self::flushed) or
    /// [`flush_postponed`](Self::flush_postponed) (a flush, and a commit that flushes) and, at last,
    /// [`returned`](Self::returned).
    pub fn next_job(&mut self, now_ms: i64) -> Option<Job<W>> {
        if self.busy {
            return None;
        }
        self.job = self.leader.tenure();
        if let Some(work) = self.work.pop_front() {
            self.busy = true;
            return Some(Job::Work(work));
        }
        let flush_due = self.flush_deadline_ms().is_some_and(|deadline| deadline <= now_ms);
        if self.waiting.is_empty() {
            self.busy = flush_due;
            return flush_due.then_some(Job::Flush);
        }
        let mut requests = Vec::new();
        let mut bytes = 0;
        // Followers are pushed what is written while the leader flushes it.
        let mut tell_written = self.leader.has_followers();
        while let Some(next) = self.waiting.pop_front() {
            if bytes > 0 && bytes + next.bytes > self.limits.group_bytes {
                self.waiting.push_front(next);
                break;
            }
            bytes += next.bytes;
            tell_written |= next.acks != Acks::All || self.settings.durability == TopicDurability::Replicated;
            let failed = next.check.as_ref().map(|check| Arc::clone(&check.failed));
            self.writing.push(Written { acks: next.acks, failed, reply: next.reply });
            requests.push(Request { batches: next.batches, check: next.check });
        }
        // A request without batches only waits for those before it.
        let flush = flush_due
            || bytes > 0
                && (self.settings.durability == TopicDurability::Flushed
                    || self.unflushed_bytes + bytes >= self.limits.unflushed_bytes);
        self.busy = true;
        Some(Job::Commit { requests, bytes, leader_epoch: self.job.leader_epoch, flush, tell_written })
    }

    /// When a flush is due, if nothing else causes one before.
    pub fn flush_deadline_ms(&self) -> Option<i64> {
        let since = self.unflushed_since_ms?;
        if self.retry_flush_ms.is_some() {
            return self.retry_flush_ms;
        }
        Some(since.saturating_add(i64::try_from(self.flush_interval_ms).unwrap_or(i64::MAX)))
    }

    /// The commit was written (not flushed): `requests`, what became of each in order, one outcome for each of its batches;
    /// `bytes`: what was written.
    pub fn written(
        &mut self,
        requests: Vec<Result<Vec<BatchOutcome>, PartitionError>>,
        log_end: i64,
        bytes: usize,
        now_ms: i64,
    ) {
        if log_end > self.offsets.log_end {
            self.unflushed_since_ms.get_or_insert(now_ms);
            self.unflushed_bytes += bytes;
            self.offsets.log_end = log_end;
        }
        debug_assert!(self.writing.is_empty() || self.writing.len() == requests.len(), "each has its answer");
        for (request, became) in std::mem::take(&mut self.writing).into_iter().zip(requests) {
            let done = match became {
                Ok(done) => done,
                Err(why) => {
                    self.effects.push(Effect::Answer(request.reply, Err(why)));
                    continue;
                }
            };
            match request.acks {
                Acks::None => self.answer(request.reply, done, Durability::None),
                Acks::Leader => self.answer(request.reply, done, Durability::Written),
                Acks::All if self.writing_outlived => {
                    self.outlived(request.reply, request.failed.as_deref(), self.job.leader_epoch);
                }
                Acks::All => {
                    let is_early = |done: &&BatchOutcome| {
                        planted(Bug::DuplicateAcknowledgedEarly) && matches!(done, BatchOutcome::Duplicate { .. })
                    };
                    let awaited = done.iter().filter(|done| !is_early(done));
                    let offset = awaited.map(end_of).max().unwrap_or(0);
                    self.parked.push_back(Parked { offset, done, failed: request.failed, reply: request.reply });
                }
            }
        }
        self.leader.written(self.job, log_end, now_ms);
        self.advance();
    }

    /// The commit wrote nothing: its requests are refused, and the log is as it was.
    pub fn refused(&mut self, why: &PartitionError) {
        for request in std::mem::take(&mut self.writing) {
            self.effects.push(Effect::Answer(request.reply, Err(why.clone())));
        }
    }

    /// Everything below `offset` is on stable storage.
    pub fn flushed(&mut self, offset: i64, now_ms: i64) {
        self.offsets.flushed = self.offsets.flushed.max(offset.min(self.offsets.log_end));
        if self.offsets.flushed == self.offsets.log_end {
            self.unflushed_since_ms = None;
            self.unflushed_bytes = 0;
            self.retry_flush_ms = None;
        }
        self.leader.flushed(self.job, offset, now_ms);
        self.advance();
    }

    /// There was no room for what a flush writes beside the log. What is parked stays so, and the flush is tried again in a
    /// while. Whether this is the first time.
    pub fn flush_postponed(&mut self, now_ms: i64) -> bool {
        self.retry_flush_ms.replace(now_ms.saturating_add(RETRY_FLUSH_MS)).is_none()
    }

    /// The write half is back, with where the log begins now.
    pub fn returned(&mut self, log_start: i64, now_ms: i64) {
        self.busy = false;
        self.writing_outlived = false;
        self.begin_epoch(now_ms);
        if log_start > self.offsets.log_start {
            self.offsets.log_start = log_start;
            self.leader.begins_at(log_start, now_ms);
            self.advance();
        }
        self.check();
    }

    /// Nothing more is taken, and everything that waits is refused: the partition is fenced, deleted, or led elsewhere.
    /// What is parked rests on writes that will never be confirmed, so it is refused too.
    pub fn end(&mut self, why: PartitionError) {
        // Whatever follows on their streams may come to a later leadership of this broker: it overtakes none of these.
        let mark = |failed: Option<&AtomicBool>| failed.into_iter().for_each(|it| it.store(true, Ordering::Release));
        self.writing.iter().for_each(|request| mark(request.failed.as_deref()));
        self.refused(&why);
        for parked in std::mem::take(&mut self.parked) {
            mark(parked.failed.as_deref());
            if planted(Bug::AcknowledgedAtTheEnd) {
                self.answer(parked.reply, parked.done, Durability::Flushed);
                continue;
            }
            self.effects.push(Effect::Answer(parked.reply, Err(why.clone())));
        }
        for request in std::mem::take(&mut self.waiting) {
            request.check.iter().for_each(Check::fail);
            self.effects.push(Effect::Answer(request.reply, Err(why.clone())));
        }
        self.unflushed_since_ms = None;
        self.next_epoch = None;
        self.leader.end();
        self.ended = Some(why);
    }

    /// Nothing more is taken; what waits is still written, flushed and answered.
    pub fn drain(&mut self, why: PartitionError) {
        self.ended.get_or_insert(why);
    }

    /// Whether the write half is away.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Whether nothing waits, is being written, or is parked (but for a flush for which there is no room, or for other replicas).
    pub fn is_idle(&self) -> bool {
        let parked = !self.parked.is_empty() && self.retry_flush_ms.is_none() && !self.leader.has_followers();
        !self.busy && self.waiting.is_empty() && self.work.is_empty() && !parked
    }

    /// Where the log begins and ends, and what may be read.
    pub fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// What has been decided since the last call, in order.
    pub fn take_effects(&mut self) -> Vec<Effect<R>> {
        std::mem::take(&mut self.effects)
    }

    /// Work that was handed over and never begun, for refusal.
    pub fn take_work(&mut self) -> VecDeque<W> {
        std::mem::take(&mut self.work)
    }

    /// Begins the next epoch, if there is one and the write half is here.
    fn begin_epoch(&mut self, now_ms: i64) {
        if self.busy {
            return;
        }
        if let Some(view) = self.next_epoch.take() {
            let log = local_log(&self.offsets, self.leader.tenure().generation);
            self.leader = LeaderState::lead(self.me, &view, log, self.settings, self.leader.has_lease(), now_ms);
            self.leader.begins_at(self.offsets.log_start, now_ms);
            self.advance();
        }
    }

    /// Does what the leader machine decided: takes its high watermark and answers what that releases.
    fn advance(&mut self) {
        let mut is_over = false;
        for effect in self.leader.take_effects() {
            match effect {
                leader::Effect::Propose(alter) => self.effects.push(Effect::Propose(alter)),
                leader::Effect::HighWatermark(_) => {}
                leader::Effect::Ended => is_over = true,
            }
        }
        self.offsets.high_watermark = self.leader.high_watermark();
        self.effects.push(Effect::Publish(self.offsets));
        let level = match self.settings.durability {
            TopicDurability::Flushed => Durability::Flushed,
            TopicDurability::Replicated => Durability::Replicated,
        };
        // Requests are parked in the order of their appends, but a duplicate waits for an original that lies before.
        let mut high_watermark = self.offsets.high_watermark;
        if let Some(below) = self.not_all_flushed_below {
            let flushed = self.leader.least();
            high_watermark = high_watermark.min(flushed);
            self.not_all_flushed_below = (flushed < below).then_some(below);
        }
        if self.parked.iter().any(|parked| parked.offset <= high_watermark) {
            for parked in std::mem::take(&mut self.parked) {
                let is_kept = parked.offset <= high_watermark;
                if is_kept || (planted(Bug::AcknowledgedWithinGroup) && parked.offset <= high_watermark + 1) {
                    self.answer(parked.reply, parked.done, level);
                } else {
                    self.parked.push_back(parked);
                }
            }
        }
        if is_over && self.ended.is_none() {
            self.end(PartitionError::NotLeader(self.leader.tenure().leader_epoch));
        }
        self.check();
    }

    fn answer(&mut self, reply: R, batches: Vec<BatchOutcome>, durability: Durability) {
        self.effects.push(Effect::Answer(reply, Ok(AppendDone { batches, durability })));
    }

    /// Its epoch ended before it was acknowledged: it is refused, and whatever follows on its stream.
    fn outlived(&mut self, reply: R, failed: Option<&AtomicBool>, epoch: i32) {
        failed.into_iter().for_each(|failed| failed.store(true, Ordering::Release));
        self.effects.push(Effect::Answer(reply, Err(PartitionError::NotLeader(epoch))));
    }

    fn check(&self) {
        let Offsets { log_start, high_watermark, log_end, flushed } = self.offsets;
        assert!(
            log_start <= high_watermark && high_watermark <= log_end && flushed <= log_end,
            "offsets of a partition disagree: {:?}",
            self.offsets
        );
    }
}

fn settings(topic: &TopicConfig, limits: &Limits) -> Settings {
    Settings {
        min_insync_replicas: topic.min_insync_replicas,
        durability: topic.durability,
        lag_time_max_ms: limits.replica_lag_time_max_ms,
    }
}

fn local_log(offsets: &Offsets, generation: u64) -> LocalLog {
    let Offsets { high_watermark, log_end, flushed, .. } = *offsets;
    LocalLog { log_end, flushed, high_watermark, generation }
}

/// The offset that the high watermark has to reach for this batch to be as durable as asked.
fn end_of(outcome: &BatchOutcome) -> i64 {
    match outcome {
        BatchOutcome::Appended { last_offset, .. } | BatchOutcome::Duplicate { last_offset, .. } => last_offset + 1,
        BatchOutcome::Refused(_) => 0,
    }
}

/// The reason of a fence, as everybody is told it.
pub(crate) fn fenced(reason: impl std::fmt::Display) -> PartitionError {
    PartitionError::Fenced(Arc::from(reason.to_string()))
}
