//! What a follower of a partition decides, in one leader epoch: what it cuts, what it appends, what it reports, and how far its
//! readers may read.
//!
//! It begins with a [`Hello`] that carries its whole history. The leader answers what to cut; the follower cuts and says
//! hello again, until nothing is to be cut. Only then is anything appended, in order and without a hole.
//!
//! A cut below the follower's own high watermark would take what was acknowledged: it fences the replica, unless the metadata
//! record an unclean election since the watermark was learned.
//!
//! Owns: [`FollowerState`]. Refuses: the log, streams, clocks. Read next: [`crate::partition::state`], which is the leader's side of
//! the log.
//!
//! Always: the high watermark is at most the log's end, and falls only with a cut that an unclean election permits; what
//! belongs to another epoch or generation changes nothing.

use super::history::{History, Verdict};
use super::{Hello, Member, Report, Tenure};
use crate::planted::{Bug, planted};
use headwater_storage::epochs::EpochEntry;

/// The replica as it is when an epoch begins. No job is on its way then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// This broker.
    pub member: Member,
    /// Its log.
    pub history: History,
    /// Everything below is on stable storage.
    pub flushed: i64,
    /// The high watermark that it knows.
    pub high_watermark: i64,
    /// How often this incarnation has cut the log.
    pub generation: u64,
    /// How many unclean elections of the partition it has taken in.
    pub unclean_taken: u32,
}

/// What the leader pushes: batches, or news of its offsets alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// The epoch and generation of the hello that this goes on from.
    pub tenure: Tenure,
    /// Where the follower's log must end.
    pub from: i64,
    /// What each batch is.
    pub batches: Vec<BatchSpan>,
    /// The leader's high watermark.
    pub high_watermark: i64,
    /// The leader's log start.
    pub log_start: i64,
}

/// Where a batch lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSpan {
    /// Offset of its first record.
    pub base_offset: i64,
    /// One beyond its last record.
    pub next_offset: i64,
    /// The leader epoch in which it was appended.
    pub leader_epoch: i32,
}

/// What to do with the batches of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// Append them, and report back with this.
    Append(Tenure),
    /// There are none, they are there already, or they are another stream's.
    Nothing,
}

/// What no leader sends. The stream ends, and the follower says hello on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// Something is missing, or lies elsewhere.
    #[error("batches from offset {from} where the log ends at {expected}")]
    Hole {
        /// Where they begin.
        from: i64,
        /// Where they should.
        expected: i64,
    },
    /// A batch does not come after the one before it.
    #[error("a batch of epoch {} from {} to {} does not follow offset {after} of epoch {epoch}", .batch.leader_epoch, .batch.base_offset, .batch.next_offset)]
    Unordered {
        /// The batch.
        batch: BatchSpan,
        /// Where the one before ends.
        after: i64,
        /// Its epoch.
        epoch: i32,
    },
}

/// What the driver does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Say this to the leader, on a new stream.
    Hello(Hello),
    /// Cut the log so that this is its end, then say so with [`FollowerState::cut`].
    Cut {
        /// The end.
        to: i64,
    },
    /// Throw the log away and begin anew here, then say so with [`FollowerState::cut`].
    Restart {
        /// The beginning.
        at: i64,
    },
    /// Tell the leader how far this replica is.
    Report(Report),
    /// Readers may read up to here.
    HighWatermark(i64),
    /// The leader's log begins here; what lies below may be deleted, up to the high watermark.
    LogStart(i64),
    /// Nothing of the replica is served or changed any more, until a person looks at it.
    Fence(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A hello is on its way.
    Asking,
    /// The log is being cut.
    Cutting,
    /// Batches come.
    Following,
    /// What was taken was not written: nothing more of this stream can follow it.
    Refusing,
    /// It is fenced.
    Fenced,
    /// The epoch is over.
    Ended,
}

/// See the module's head.
#[derive(Debug, Clone)]
pub struct FollowerState {
    member: Member,
    tenure: Tenure,
    phase: Phase,
    history: History,
    /// Everything below was taken for the log.
    taken: i64,
    /// The epoch of the last batch taken.
    taken_epoch: i32,
    written: i64,
    flushed: i64,
    high_watermark: i64,
    leader_high_watermark: i64,
    log_start: i64,
    /// Where the log begins, as no crash takes back, as far as was told.
    kept_start: i64,
    unclean_taken: u32,
    /// How many unclean elections the metadata record.
    unclean_recorded: u32,
    /// It has begun anew for that.
    is_begun_anew: bool,
    effects: Vec<Effect>,
}

impl FollowerState {
    /// Begins to follow in an epoch. `unclean_recorded`: how many unclean elections of the partition the metadata record as of
    /// this epoch.
    pub fn follow(leader_epoch: i32, replica: Replica, unclean_recorded: u32) -> FollowerState {
        let log_end = replica.history.log_end();
        let mut state = FollowerState {
            member: replica.member,
            tenure: Tenure { leader_epoch, generation: replica.generation },
            phase: Phase::Asking,
            taken: log_end,
            taken_epoch: -1,
            written: log_end,
            flushed: replica.flushed.min(log_end),
            high_watermark: replica.high_watermark.min(log_end),
            leader_high_watermark: -1,
            log_start: replica.history.log_start(),
            kept_start: 0,
            unclean_taken: replica.unclean_taken,
            unclean_recorded,
            is_begun_anew: false,
            history: replica.history,
            effects: Vec::new(),
        };
        if state.written == state.log_start && state.deleted_others() {
            // Before the leader hears of it, which would take it for whole.
            (state.phase, state.is_begun_anew, state.high_watermark) = (Phase::Cutting, true, 0);
            state.tenure.generation += 1;
            state.effects = vec![Effect::HighWatermark(0), Effect::Restart { at: 0 }];
        } else {
            state.say_hello();
        }
        state
    }

    /// What completions of jobs that begin now belong to.
    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    /// Readers may read what is below.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// How many unclean elections of the partition this replica has taken in.
    pub fn unclean_taken(&self) -> u32 {
        self.unclean_taken
    }

    /// Whether batches are taken.
    pub fn is_following(&self) -> bool {
        self.phase == Phase::Following
    }

    /// Whether the replica is fenced.
    pub fn is_fenced(&self) -> bool {
        self.phase == Phase::Fenced
    }

    /// The stream ended, or no answer came: says hello again, with the log as it is (no job is on its way).
    pub fn reconnect(&mut self, history: History) {
        if matches!(self.phase, Phase::Asking | Phase::Following | Phase::Refusing) {
            self.phase = Phase::Asking;
            self.taken = history.log_end();
            self.history = history;
            self.say_hello();
        }
    }

    /// Whether an unclean election, which it has not taken in, may have put other records where it deleted some.
    fn deleted_others(&self) -> bool {
        self.unclean_recorded != self.unclean_taken && !self.is_begun_anew && self.log_start > 0
    }

    /// The leader answered a hello.
    pub fn verdict(&mut self, tenure: Tenure, verdict: Verdict) {
        if self.phase != Phase::Asking || tenure != self.tenure {
            return;
        }
        let verdict = match verdict {
            // What it deleted stands for other records since an unclean election: those it fetches.
            Verdict::Restart { at, .. } if at == self.log_start && self.deleted_others() => {
                Verdict::Restart { at: 0, equal_below: 0 }
            }
            verdict => verdict,
        };
        self.is_begun_anew |= matches!(verdict, Verdict::Restart { .. });
        let (effect, equal_below) = match verdict {
            Verdict::Agrees => {
                self.phase = Phase::Following;
                self.unclean_taken = self.unclean_recorded;
                // An epoch that begins at the end wrote nothing: it may have been this broker's, and the leader has older records.
                let wrote = |entry: &&EpochEntry| entry.start_offset < self.written || planted(Bug::EmptyEpochCounts);
                self.taken_epoch = self.history.epochs().iter().rfind(wrote).map_or(-1, |latest| latest.epoch);
                return self.report();
            }
            Verdict::Cut { to } if to < self.log_start || to >= self.written => {
                return self.fence(format!(
                    "the leader asks for a cut at {to} of a log from {} to {}",
                    self.log_start, self.written
                ));
            }
            Verdict::Cut { .. } if planted(Bug::TruncatesByWatermark) => {
                (Effect::Cut { to: self.high_watermark }, self.high_watermark)
            }
            Verdict::Cut { to } => (Effect::Cut { to }, to),
            Verdict::Restart { at, equal_below } => (Effect::Restart { at }, equal_below),
        };
        if equal_below < self.high_watermark && self.unclean_recorded == self.unclean_taken {
            return self.fence(format!(
                "the leader of epoch {} lacks what lies from {equal_below} to the high watermark, {}, and no unclean election is recorded",
                self.tenure.leader_epoch, self.high_watermark
            ));
        }
        self.phase = Phase::Cutting;
        self.tenure.generation += 1;
        if equal_below < self.high_watermark {
            self.high_watermark = equal_below;
            self.effects.push(Effect::HighWatermark(equal_below));
        }
        self.effects.push(effect);
    }

    /// The log was cut, and is this now, all of it flushed. Says hello again.
    pub fn cut(&mut self, tenure: Tenure, history: History) {
        if self.phase != Phase::Cutting || tenure != self.tenure {
            return;
        }
        self.phase = Phase::Asking;
        let log_end = history.log_end();
        (self.taken, self.written, self.flushed, self.log_start) = (log_end, log_end, log_end, history.log_start());
        // Where it begins anew is written down before, and may be lower. Otherwise it begins where it did, which may be within a batch.
        self.kept_start = self.kept_start.min(log_end).max(history.log_start());
        self.high_watermark = self.high_watermark.min(log_end);
        self.history = history;
        self.say_hello();
    }

    /// The leader pushed something.
    ///
    /// # Errors
    /// [`PushError`]: the driver ends the stream and [`reconnect`](Self::reconnect)s.
    pub fn push(&mut self, push: &Push) -> Result<Take, PushError> {
        if self.phase != Phase::Following || push.tenure != self.tenure {
            return Ok(Take::Nothing);
        }
        let mut take = Take::Nothing;
        if !push.batches.is_empty() && push.from >= self.taken {
            if push.from > self.taken {
                return Err(PushError::Hole { from: push.from, expected: self.taken });
            }
            let (mut after, mut epoch) = (self.taken, self.taken_epoch);
            for batch in &push.batches {
                let rises = batch.base_offset >= after && batch.next_offset > batch.base_offset;
                if !rises || batch.leader_epoch < epoch || batch.leader_epoch > self.tenure.leader_epoch {
                    return Err(PushError::Unordered { batch: *batch, after, epoch });
                }
                (after, epoch) = (batch.next_offset, batch.leader_epoch);
            }
            (self.taken, self.taken_epoch) = (after, epoch);
            take = Take::Append(self.tenure);
        }
        self.leader_high_watermark = self.leader_high_watermark.max(push.high_watermark);
        self.advance();
        if push.log_start > self.log_start {
            self.log_start = push.log_start;
            self.effects.push(Effect::LogStart(push.log_start));
        }
        Ok(take)
    }

    /// What was taken is not written, and will not be: nothing more is taken until the driver ended the stream and
    /// [`reconnect`](Self::reconnect)ed. What comes behind it would leave a hole.
    pub fn refused(&mut self) {
        if self.is_following() {
            self.phase = Phase::Refusing;
        }
    }

    /// Everything below `offset` is written to the log.
    pub fn written(&mut self, tenure: Tenure, offset: i64) {
        if tenure == self.tenure && self.is_following() && offset > self.written {
            self.written = offset;
            self.advance();
            self.report();
        }
    }

    /// Everything below `offset` is on stable storage.
    pub fn flushed(&mut self, tenure: Tenure, offset: i64) {
        let offset = if planted(Bug::FlushOutlivesCut) { offset } else { offset.min(self.written) };
        if (tenure == self.tenure || planted(Bug::FlushOutlivesCut)) && offset > self.flushed {
            self.flushed = offset;
            if self.is_following() && !planted(Bug::FlushUnreported) {
                self.report();
            }
        }
    }

    /// The log begins here, as no crash takes back.
    pub fn start_kept(&mut self, offset: i64) {
        if offset > self.kept_start {
            self.kept_start = offset;
            if self.is_following() {
                self.report();
            }
        }
    }

    /// The epoch is over: nothing is taken any more.
    pub fn end(&mut self) {
        if self.phase != Phase::Fenced {
            self.phase = Phase::Ended;
        }
    }

    /// What has been decided since the last call, in order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn say_hello(&mut self) {
        let hello = Hello { member: self.member, tenure: self.tenure, history: self.history.clone() };
        self.effects.push(Effect::Hello(hello));
    }

    fn report(&mut self) {
        let flushed = if planted(Bug::WrittenReportedAsFlushed) { self.written } else { self.flushed };
        let (member, tenure, received, log_start) = (self.member, self.tenure, self.written, Some(self.kept_start));
        self.effects.push(Effect::Report(Report { member, tenure, received, flushed, log_start }));
    }

    fn advance(&mut self) {
        let written = if planted(Bug::WatermarkBeyondEnd) { i64::MAX } else { self.written };
        let to = self.leader_high_watermark.min(written);
        if to > self.high_watermark {
            self.high_watermark = to;
            self.effects.push(Effect::HighWatermark(to));
        }
    }

    fn fence(&mut self, why: String) {
        self.phase = Phase::Fenced;
        self.effects.push(Effect::Fence(why));
    }
}
