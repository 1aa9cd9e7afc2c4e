//! What one partition decides: which appends form a group, what is written and flushed next, where the high watermark
//! stands, and which acknowledgement may go out.
//!
//! Owns: [`PartitionState`], pure: time, offsets and results come in as arguments, decisions go out as a [`Job`] and
//! [`Effect`]s. It is generic over how a request is answered (`R`) and over other work for the log's write half (`W`), so
//! that a test needs neither channels nor files. Refuses: clocks, files, tasks. Read next: [`super::task`].
//!
//! What always holds, and is checked after each step: `log_start <= high_watermark <= log_end`; `flushed <= log_end`; the
//! high watermark never falls; whatever is parked waits for an offset above the high watermark.
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
//! unflushed bytes reach the limit that recovery knows. Once there are replicas, "flushed" and "written" are those of the
//! whole in-sync set, and nothing else in the table changes.
//!
//! Where a topic asks for more in-sync replicas (`min.insync.replicas`) than there are, acks=all is refused as it arrives: it
//! would promise more than can be kept.

use crate::error::PartitionError;
use crate::topic_config::{TopicConfig, TopicDurability};
use headwater_proto::wire::{Acks, Durability};
use headwater_storage::{BatchOutcome, NewBatch};
use std::collections::VecDeque;
use std::sync::Arc;

/// How long after a flush that found no room the next is tried, in milliseconds.
const RETRY_FLUSH_MS: i64 = 1000;

/// In-sync replicas of a partition: this broker's own.
const IN_SYNC_REPLICAS: u32 = 1;

/// What an append came to.
#[derive(Debug, Clone, PartialEq)]
pub struct AppendDone {
    /// One for each batch, in order. None of them is [`BatchOutcome::Refused`].
    pub batches: Vec<BatchOutcome>,
    /// The level that was reached.
    pub durability: Durability,
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

/// The bounds on what a partition gathers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupLimits {
    /// Most bytes of one group commit, unless a single request is larger.
    pub(crate) group_bytes: usize,
    /// Most bytes that may be written and not flushed.
    pub(crate) unflushed_bytes: usize,
}

/// One request to append.
pub(crate) struct Append<R> {
    pub(crate) batches: Vec<NewBatch>,
    pub(crate) bytes: usize,
    pub(crate) acks: Acks,
    pub(crate) reply: R,
}

/// What the driver does next with the log's write half.
pub(crate) enum Job<W> {
    /// Write these batches as one group; then flush, if so told. `tell_written`: somebody waits for the write alone.
    Commit { batches: Vec<NewBatch>, bytes: usize, leader_epoch: i32, flush: bool, tell_written: bool },
    /// Flush what was written.
    Flush,
    /// Other work.
    Work(W),
}

/// What the driver does now.
pub(crate) enum Effect<R> {
    /// Answer a request.
    Answer(R, AppendResult),
    /// Offsets changed: publish them.
    Publish(Offsets),
}

struct Written<R> {
    batches: usize,
    acks: Acks,
    reply: R,
}

struct Parked<R> {
    /// The high watermark that has to be reached.
    offset: i64,
    done: Vec<BatchOutcome>,
    reply: R,
}

/// See the module's head.
pub(crate) struct PartitionState<R, W> {
    leader_epoch: i32,
    durability: TopicDurability,
    flush_interval_ms: u64,
    min_insync_replicas: u32,
    limits: GroupLimits,
    offsets: Offsets,
    waiting: VecDeque<Append<R>>,
    work: VecDeque<W>,
    /// The requests of the commit under way, until its outcomes are known.
    writing: Vec<Written<R>>,
    /// Whether the write half is away.
    busy: bool,
    parked: VecDeque<Parked<R>>,
    unflushed_bytes: usize,
    unflushed_since_ms: Option<i64>,
    /// When a flush is tried again for which there was no room.
    retry_flush_ms: Option<i64>,
    /// Why nothing more is taken.
    ended: Option<PartitionError>,
    effects: Vec<Effect<R>>,
}

impl<R, W> PartitionState<R, W> {
    pub(crate) fn new(leader_epoch: i32, topic: &TopicConfig, limits: GroupLimits, mut offsets: Offsets) -> Self {
        // Recovery synced all that it kept, so all of it may be read.
        offsets.high_watermark = offsets.log_end;
        PartitionState {
            leader_epoch,
            durability: topic.durability,
            flush_interval_ms: topic.flush_ms,
            min_insync_replicas: topic.min_insync_replicas,
            limits,
            offsets,
            waiting: VecDeque::new(),
            work: VecDeque::new(),
            writing: Vec::new(),
            busy: false,
            parked: VecDeque::new(),
            unflushed_bytes: 0,
            unflushed_since_ms: None,
            retry_flush_ms: None,
            ended: None,
            effects: Vec::new(),
        }
    }

    /// A request arrives.
    pub(crate) fn append(&mut self, append: Append<R>) {
        let too_few = append.acks == Acks::All && self.min_insync_replicas > IN_SYNC_REPLICAS;
        if let Some(why) = &self.ended {
            self.effects.push(Effect::Answer(append.reply, Err(why.clone())));
        } else if too_few && !append.batches.is_empty() {
            let why = PartitionError::NotEnoughReplicas { in_sync: IN_SYNC_REPLICAS, needed: self.min_insync_replicas };
            self.effects.push(Effect::Answer(append.reply, Err(why)));
        } else {
            self.waiting.push_back(append);
        }
    }

    /// Other work for the write half arrives. It goes before the appends that wait.
    pub(crate) fn work(&mut self, work: W) {
        self.work.push_back(work);
    }

    /// The topic's settings or the leadership are new.
    pub(crate) fn configure(&mut self, leader_epoch: i32, topic: &TopicConfig) {
        self.leader_epoch = self.leader_epoch.max(leader_epoch);
        self.durability = topic.durability;
        self.flush_interval_ms = topic.flush_ms;
        self.min_insync_replicas = topic.min_insync_replicas;
        self.advance();
    }

    /// What to do next, if the write half is here and there is something to do. Whoever takes a job reports back with
    /// [`written`](Self::written) or [`refused`](Self::refused) (a commit), [`flushed`](Self::flushed) or
    /// [`flush_postponed`](Self::flush_postponed) (a flush, and a commit that flushes) and, at last,
    /// [`returned`](Self::returned).
    pub(crate) fn next_job(&mut self, now_ms: i64) -> Option<Job<W>> {
        if self.busy {
            return None;
        }
        if let Some(work) = self.work.pop_front() {
            self.busy = true;
            return Some(Job::Work(work));
        }
        let flush_due = self.flush_deadline_ms().is_some_and(|deadline| deadline <= now_ms);
        if self.waiting.is_empty() {
            self.busy = flush_due;
            return flush_due.then_some(Job::Flush);
        }
        let mut batches = Vec::new();
        let mut bytes = 0;
        let mut tell_written = false;
        while let Some(next) = self.waiting.pop_front() {
            if bytes > 0 && bytes + next.bytes > self.limits.group_bytes {
                self.waiting.push_front(next);
                break;
            }
            bytes += next.bytes;
            tell_written |= next.acks != Acks::All || self.durability == TopicDurability::Replicated;
            self.writing.push(Written { batches: next.batches.len(), acks: next.acks, reply: next.reply });
            batches.extend(next.batches);
        }
        // A request without batches only waits for those before it.
        let flush = flush_due
            || bytes > 0
                && (self.durability == TopicDurability::Flushed
                    || self.unflushed_bytes + bytes >= self.limits.unflushed_bytes);
        self.busy = true;
        Some(Job::Commit { batches, bytes, leader_epoch: self.leader_epoch, flush, tell_written })
    }

    /// When a flush is due, if nothing else causes one before.
    pub(crate) fn flush_deadline_ms(&self) -> Option<i64> {
        let since = self.unflushed_since_ms?;
        if self.retry_flush_ms.is_some() {
            return self.retry_flush_ms;
        }
        Some(since.saturating_add(i64::try_from(self.flush_interval_ms).unwrap_or(i64::MAX)))
    }

    /// The commit's batches were written (not flushed): `outcomes`, one for each batch in order.
    pub(crate) fn written(&mut self, outcomes: Vec<BatchOutcome>, log_end: i64, bytes: usize, now_ms: i64) {
        if log_end > self.offsets.log_end {
            self.unflushed_since_ms.get_or_insert(now_ms);
            self.unflushed_bytes += bytes;
            self.offsets.log_end = log_end;
        }
        let mut outcomes = outcomes.into_iter();
        for request in std::mem::take(&mut self.writing) {
            let done: Vec<BatchOutcome> = outcomes.by_ref().take(request.batches).collect();
            let refused = done.iter().find_map(|outcome| match outcome {
                BatchOutcome::Refused(error) => Some(*error),
                _ => None,
            });
            if let Some(error) = refused {
                self.effects.push(Effect::Answer(request.reply, Err(PartitionError::Sequence(error))));
                continue;
            }
            match request.acks {
                Acks::None => self.answer(request.reply, done, Durability::None),
                Acks::Leader => self.answer(request.reply, done, Durability::Written),
                Acks::All => {
                    let offset = done.iter().map(end_of).max().unwrap_or(0);
                    self.parked.push_back(Parked { offset, done, reply: request.reply });
                }
            }
        }
        self.advance();
    }

    /// The commit wrote nothing: its requests are refused, and the log is as it was.
    pub(crate) fn refused(&mut self, why: &PartitionError) {
        for request in std::mem::take(&mut self.writing) {
            self.effects.push(Effect::Answer(request.reply, Err(why.clone())));
        }
    }

    /// Everything below `offset` is on stable storage.
    pub(crate) fn flushed(&mut self, offset: i64) {
        self.offsets.flushed = self.offsets.flushed.max(offset.min(self.offsets.log_end));
        if self.offsets.flushed == self.offsets.log_end {
            self.unflushed_since_ms = None;
            self.unflushed_bytes = 0;
            self.retry_flush_ms = None;
        }
        self.advance();
    }

    /// There was no room for what a flush writes beside the log. What is parked stays so, and the flush is tried again in a
    /// while. Whether this is the first time.
    pub(crate) fn flush_postponed(&mut self, now_ms: i64) -> bool {
        self.retry_flush_ms.replace(now_ms.saturating_add(RETRY_FLUSH_MS)).is_none()
    }

    /// The write half is back, with where the log begins now.
    pub(crate) fn returned(&mut self, log_start: i64) {
        self.busy = false;
        if log_start > self.offsets.log_start {
            self.offsets.log_start = log_start;
            self.effects.push(Effect::Publish(self.offsets));
        }
        self.check();
    }

    /// Nothing more is taken, and everything that waits is refused: the partition is fenced, deleted, or led elsewhere.
    /// What is parked rests on writes that will never be confirmed, so it is refused too.
    pub(crate) fn end(&mut self, why: PartitionError) {
        self.refused(&why);
        for parked in std::mem::take(&mut self.parked) {
            self.effects.push(Effect::Answer(parked.reply, Err(why.clone())));
        }
        for request in std::mem::take(&mut self.waiting) {
            self.effects.push(Effect::Answer(request.reply, Err(why.clone())));
        }
        self.unflushed_since_ms = None;
        self.ended = Some(why);
    }

    /// Nothing more is taken; what waits is still written, flushed and answered.
    pub(crate) fn drain(&mut self, why: PartitionError) {
        self.ended.get_or_insert(why);
    }

    /// Whether the write half is away.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    /// Whether nothing waits, is being written, or is parked (but for a flush for which there is no room).
    pub(crate) fn is_idle(&self) -> bool {
        let parked = !self.parked.is_empty() && self.retry_flush_ms.is_none();
        !self.busy && self.waiting.is_empty() && self.work.is_empty() && !parked
    }

    pub(crate) fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// What has been decided since the last call, in order.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect<R>> {
        std::mem::take(&mut self.effects)
    }

    /// Work that was handed over and never begun, for refusal.
    pub(crate) fn take_work(&mut self) -> VecDeque<W> {
        std::mem::take(&mut self.work)
    }

    /// Moves the high watermark and answers what it releases.
    fn advance(&mut self) {
        let (to, level) = match self.durability {
            TopicDurability::Flushed => (self.offsets.flushed, Durability::Flushed),
            TopicDurability::Replicated => (self.offsets.log_end, Durability::Replicated),
        };
        self.offsets.high_watermark = self.offsets.high_watermark.max(to);
        self.effects.push(Effect::Publish(self.offsets));
        // Requests are parked in the order of their appends, but a duplicate waits for an original that lies before.
        let high_watermark = self.offsets.high_watermark;
        if self.parked.iter().any(|parked| parked.offset <= high_watermark) {
            for parked in std::mem::take(&mut self.parked) {
                if parked.offset <= high_watermark {
                    self.answer(parked.reply, parked.done, level);
                } else {
                    self.parked.push_back(parked);
                }
            }
        }
        self.check();
    }

    fn answer(&mut self, reply: R, batches: Vec<BatchOutcome>, durability: Durability) {
        self.effects.push(Effect::Answer(reply, Ok(AppendDone { batches, durability })));
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
