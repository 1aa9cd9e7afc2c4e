//! A partition that this broker does not lead: what is done next with its log. What a follower may take and has to cut is
//! [`FollowerState`]'s to say; a partition that nobody leads only has its upkeep done.
//!
//! Owns: [`Following`], pure: what was pushed and waits to be written, what is flushed when, and which stream counts. It is generic over
//! other work for the log's write half (`W`). Refuses: clocks, files, streams. Read next: [`super::task`], which drives it.
//!
//! What always holds: `log_start <= high_watermark <= log_end` and `flushed <= log_end`; what another stream than the newest
//! brought is never written; nothing is written while the log waits to be cut.

use super::state::{Limits, Offsets};
use super::{Pushed, TopicConfig};
use crate::error::PartitionError;
use crate::loan::Loan;
use crate::replica::follower::{self, FollowerState, Push, PushError, Replica, Take};
use crate::replica::history::{History, Verdict};
use crate::replica::{Hello, Report, Tenure};
use crate::topic_config::TopicDurability;
use headwater_storage::NewBatch;
use std::collections::VecDeque;

/// How long after a job that found no room the next is tried, in milliseconds.
const RETRY_MS: i64 = 1000;

/// What the driver does next with the log's write half.
#[derive(Debug)]
pub(super) enum Job<W> {
    /// Check and write these; then flush, if so told.
    Append {
        /// Where the log has to end for them.
        from: i64,
        batches: Vec<NewBatch>,
        /// The base offsets of those with which segments begin.
        rolls: Vec<i64>,
        bytes: usize,
        flush: bool,
    },
    Flush,
    /// Move the end of the log back.
    Cut(Cut),
    /// Delete what lies before this offset.
    Trim {
        before: i64,
        high_watermark: i64,
    },
    Work(W),
}

impl<W> Job<W> {
    /// Whether it may be long where the disk is well.
    pub(super) fn is_long(&self) -> bool {
        !matches!(self, Job::Append { .. } | Job::Flush)
    }
}

/// How the end of a log moves back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    To(i64),
    /// All of it goes; it begins anew here.
    RestartAt(i64),
}

/// What the driver does now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Publish(Offsets),
    /// Say this to the leader, on a stream of this number.
    Open(u64, Hello),
    /// Tell the leader on the stream.
    Report(Report),
    /// So many bytes that the stream brought are not in memory any more.
    Released(u64),
    /// End the stream: what it brings cannot be taken. The leader is told from where on that is damaged, if it is.
    Close(u64, Option<i64>),
    Fence(String),
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Following<W> {
    /// `None`: nobody leads, or nothing is known of this replica.
    state: Option<FollowerState>,
    /// The stream that counts.
    stream: u64,
    /// It ended: another is to be opened once the write half is here.
    is_lost: bool,
    /// What was pushed, and where each push begins.
    waiting: VecDeque<(i64, Pushed)>,
    cut: Option<Cut>,
    /// Where the leader's log begins.
    begins_at: i64,
    work: VecDeque<W>,
    limits: Limits,
    durability: TopicDurability,
    flush_interval_ms: u64,
    offsets: Offsets,
    busy: bool,
    /// What the job under way belongs to.
    job: Option<Tenure>,
    /// Bytes that it writes, and the stream that brought them.
    writing: (u64, u64),
    /// What they were lent.
    loans: Vec<Loan>,
    unflushed_bytes: usize,
    unflushed_since_ms: Option<i64>,
    /// Nothing but other work before this time.
    retry_ms: Option<i64>,
    ended: Option<PartitionError>,
    effects: Vec<Effect>,
}

impl<W> Following<W> {
    /// Begins to follow (`replica`: in which epoch, as what, after how many unclean elections), or to wait for somebody to lead.
    /// `stream`: the number of the last stream that there was.
    pub(super) fn new(
        replica: Option<(i32, Replica, u32)>,
        stream: u64,
        topic: &TopicConfig,
        limits: Limits,
        offsets: Offsets,
    ) -> Following<W> {
        let state = replica.map(|(epoch, replica, unclean)| FollowerState::follow(epoch, replica, unclean));
        let mut following = Following {
            state,
            stream,
            is_lost: false,
            waiting: VecDeque::new(),
            cut: None,
            begins_at: 0,
            work: VecDeque::new(),
            limits,
            durability: topic.durability,
            flush_interval_ms: topic.flush_ms,
            offsets,
            busy: false,
            job: None,
            writing: (0, 0),
            loans: Vec::new(),
            unflushed_bytes: 0,
            unflushed_since_ms: (offsets.flushed < offsets.log_end).then_some(i64::MIN / 2),
            retry_ms: None,
            ended: None,
            effects: Vec::new(),
        };
        following.advance();
        following
    }

    /// The newest stream.
    pub(super) fn stream(&self) -> u64 {
        self.stream
    }

    /// How many unclean elections this replica has taken in, and how often it has cut its log, if that is known here.
    pub(super) fn history(&self) -> Option<(u32, u64)> {
        self.state.as_ref().map(|state| (state.unclean_taken(), state.tenure().generation))
    }

    pub(super) fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// Whether a leader pushes to this replica.
    pub(super) fn is_led(&self) -> bool {
        !self.is_lost && self.state.as_ref().is_some_and(FollowerState::is_following)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy
    }

    /// Whether nothing waits that was asked for here.
    pub(super) fn is_idle(&self) -> bool {
        !self.busy && self.work.is_empty()
    }

    pub(super) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(super) fn take_work(&mut self) -> VecDeque<W> {
        std::mem::take(&mut self.work)
    }

    /// Other work for the write half arrives. It goes before what was pushed.
    pub(super) fn work(&mut self, work: W) {
        self.work.push_back(work);
    }

    pub(super) fn configure(&mut self, topic: &TopicConfig) {
        (self.durability, self.flush_interval_ms) = (topic.durability, topic.flush_ms);
    }

    /// Nothing more is taken from a leader.
    pub(super) fn end(&mut self, why: Option<PartitionError>) {
        if let Some(state) = &mut self.state {
            state.end();
        }
        self.waiting.clear();
        (self.cut, self.is_lost) = (None, false);
        if self.ended.is_none() {
            self.ended = why;
        }
    }

    /// The leader answered the hello on this stream.
    pub(super) fn verdict(&mut self, stream: u64, tenure: Tenure, verdict: Verdict) {
        if stream != self.stream {
            return;
        }
        if let Some(state) = &mut self.state {
            state.verdict(tenure, verdict);
        }
        self.advance();
    }

    /// The leader pushed something on this stream. What makes no sense ends the stream.
    pub(super) fn pushed(&mut self, stream: u64, push: &Push, pushed: Pushed) {
        if stream != self.stream || self.is_lost {
            return;
        }
        let Some(state) = &mut self.state else { return };
        match state.push(push) {
            Ok(Take::Append(_)) => self.waiting.push_back((push.from, pushed)),
            Ok(Take::Nothing) if pushed.bytes > 0 => self.effects.push(Effect::Released(pushed.bytes)),
            Ok(Take::Nothing) => {}
            Err(error) => {
                tracing::warn!(%error, "what the leader pushed cannot be taken");
                let at = match error {
                    PushError::Hole { .. } => None,
                    PushError::Unordered { .. } => Some(push.from),
                };
                self.effects.push(Effect::Close(stream, at));
            }
        }
        self.advance();
    }

    /// The stream ended: another is opened once the write half is here.
    pub(super) fn lost(&mut self, stream: u64) {
        if stream == self.stream {
            self.is_lost = true;
            self.waiting.clear();
        }
    }

    /// Opens another stream, if the last was lost. The write half is here: `history` tells what it holds.
    pub(super) fn reopen(&mut self, history: impl FnOnce() -> History) {
        if self.busy || self.cut.is_some() || !std::mem::take(&mut self.is_lost) {
            return;
        }
        if let Some(state) = &mut self.state {
            state.reconnect(history());
        }
        self.advance();
    }

    /// What to do next, if the write half is here and there is something to do. Whoever takes a job reports back with what came of it and
    /// then with [`returned`](Self::returned).
    pub(super) fn next_job(&mut self, now_ms: i64) -> Option<Job<W>> {
        if self.busy {
            return None;
        }
        self.job = self.state.as_ref().map(FollowerState::tenure);
        let job = match self.work.pop_front() {
            Some(work) => Some(Job::Work(work)),
            None if self.ended.is_some() || self.retry_ms.is_some_and(|retry| now_ms < retry) => None,
            None => self.own_job(now_ms),
        };
        self.busy = job.is_some();
        job
    }

    fn own_job(&mut self, now_ms: i64) -> Option<Job<W>> {
        self.retry_ms = None;
        if let Some(cut) = self.cut {
            return Some(Job::Cut(cut));
        }
        // Whoever deletes records waits for that, however much is appended meanwhile.
        let before = self.begins_at.min(self.offsets.high_watermark);
        if before > self.offsets.log_start {
            return Some(Job::Trim { before, high_watermark: self.offsets.high_watermark });
        }
        let (mut batches, mut rolls, mut bytes, mut memory) = (Vec::new(), Vec::new(), 0, 0);
        let from = self.waiting.front().map_or(self.offsets.log_end, |(from, _)| *from);
        while let Some((begins, next)) = self.waiting.pop_front() {
            let more: usize = next.batches.iter().map(|batch| batch.bytes.len()).sum();
            if bytes > 0 && bytes + more > self.limits.group_bytes {
                self.waiting.push_front((begins, next));
                break;
            }
            bytes += more;
            memory += next.bytes;
            self.loans.extend(next.loan);
            batches.extend(next.batches);
            rolls.extend(next.rolls);
        }
        if !batches.is_empty() {
            self.writing = (memory, self.stream);
            let flush = self.durability == TopicDurability::Flushed
                || self.unflushed_bytes + bytes >= self.limits.unflushed_bytes
                || self.flush_is_due(now_ms);
            return Some(Job::Append { from, batches, rolls, bytes, flush });
        }
        self.flush_is_due(now_ms).then_some(Job::Flush)
    }

    fn flush_is_due(&self, now_ms: i64) -> bool {
        self.flush_at_ms().is_some_and(|due| due <= now_ms)
    }

    fn flush_at_ms(&self) -> Option<i64> {
        let interval = match self.durability {
            TopicDurability::Flushed => 0,
            TopicDurability::Replicated => i64::try_from(self.flush_interval_ms).unwrap_or(i64::MAX),
        };
        self.unflushed_since_ms.map(|since| since.saturating_add(interval))
    }

    /// When there is something to do, if nothing happens before.
    pub(super) fn deadline_ms(&self) -> Option<i64> {
        match self.ended {
            Some(_) => None,
            None => self.retry_ms.or(self.flush_at_ms()),
        }
    }

    /// Where the log begins is written down.
    pub(super) fn start_kept(&mut self, offset: i64) {
        if let Some(state) = &mut self.state {
            state.start_kept(offset);
        }
        self.advance();
    }

    /// The batches are written, up to here.
    pub(super) fn appended(&mut self, log_end: i64, bytes: usize, now_ms: i64) {
        if log_end > self.offsets.log_end {
            self.offsets.log_end = log_end;
            self.unflushed_since_ms.get_or_insert(now_ms);
            self.unflushed_bytes += bytes;
        }
        if let Some((state, job)) = self.state.as_mut().zip(self.job) {
            state.written(job, log_end);
        }
        self.release();
    }

    /// Everything below `offset` is on stable storage.
    pub(super) fn flushed(&mut self, offset: i64) {
        self.offsets.flushed = self.offsets.flushed.max(offset.min(self.offsets.log_end));
        if self.offsets.flushed == self.offsets.log_end {
            (self.unflushed_since_ms, self.unflushed_bytes) = (None, 0);
        }
        if let Some((state, job)) = self.state.as_mut().zip(self.job) {
            state.flushed(job, offset);
        }
    }

    /// The end of the log was moved back, and it is this now, all of it flushed.
    pub(super) fn was_cut(&mut self, history: History) {
        let (log_start, log_end) = (history.log_start(), history.log_end());
        let high_watermark = self.offsets.high_watermark.clamp(log_start, log_end);
        self.offsets = Offsets { log_start, high_watermark, log_end, flushed: log_end };
        (self.unflushed_since_ms, self.unflushed_bytes) = (None, 0);
        self.cut = None;
        if let Some((state, job)) = self.state.as_mut().zip(self.job) {
            state.cut(job, history);
        }
    }

    /// A job found no room, or too many open files: the log is as it was, and the same is tried again in a while. What was to be written is
    /// asked for again.
    pub(super) fn postponed(&mut self, now_ms: i64) {
        self.retry_ms = Some(now_ms.saturating_add(RETRY_MS));
        if self.writing.0 > 0 {
            self.refused(None);
        }
    }

    /// What was to be written is not sound, from this offset on: it is asked for again, on another stream. Of this one nothing is taken any more.
    pub(super) fn refused(&mut self, at: Option<i64>) {
        self.waiting.clear();
        if let Some(state) = &mut self.state {
            state.refused();
        }
        self.effects.push(Effect::Close(self.writing.1, at));
        self.release();
    }

    /// The write half is back, with where the log begins now.
    pub(super) fn returned(&mut self, log_start: i64) {
        self.busy = false;
        self.job = None;
        self.offsets.log_start = self.offsets.log_start.max(log_start);
        self.offsets.high_watermark = self.offsets.high_watermark.max(self.offsets.log_start);
        self.advance();
    }

    fn release(&mut self) {
        let (bytes, stream) = std::mem::take(&mut self.writing);
        self.loans.clear();
        if bytes > 0 && stream == self.stream {
            self.effects.push(Effect::Released(bytes));
        }
    }

    /// Does what the follower's machine decided.
    fn advance(&mut self) {
        for effect in self.state.iter_mut().flat_map(FollowerState::take_effects) {
            match effect {
                follower::Effect::Hello(hello) => {
                    self.stream += 1;
                    self.is_lost = false;
                    self.waiting.clear();
                    self.effects.push(Effect::Open(self.stream, hello));
                }
                follower::Effect::Cut { to } => self.cut = Some(Cut::To(to)),
                follower::Effect::Restart { at } => self.cut = Some(Cut::RestartAt(at)),
                follower::Effect::Report(report) => self.effects.push(Effect::Report(report)),
                // The machine may know of less than was written: it is as high as the log has it.
                follower::Effect::HighWatermark(to) => {
                    self.offsets.high_watermark = to.clamp(self.offsets.log_start, self.offsets.log_end);
                }
                follower::Effect::LogStart(at) => self.begins_at = at,
                follower::Effect::Fence(why) => self.effects.push(Effect::Fence(why)),
            }
        }
        self.effects.push(Effect::Publish(self.offsets));
        let Offsets { log_start, high_watermark, log_end, flushed } = self.offsets;
        assert!(
            log_start <= high_watermark && high_watermark <= log_end && flushed <= log_end,
            "offsets of a replica disagree: {:?}",
            self.offsets
        );
    }
}
