//! The log of one partition: its write half.
//!
//! Owns: offsets, the group append, flushing, rolling, the checkpoint files of the partition's folder, and the picture that readers
//! see. Refuses: deciding about durability (it says what is flushed, the broker says who waits for that), and any use by two threads.
//! Every method may block. Read next: `broker/src/fetch.rs` for the way out; of the log itself `active.rs` (the write),
//! `recovery.rs` (opening), `retention.rs` (deleting).
//!
//! Always: `log_start <= next_offset` and `flushed <= next_offset`; epochs never fall; at most `unflushed_limit_bytes` lie between
//! `flushed` and the end; after a failed write or sync nothing is written at all, and nothing either while a segment waits for room in which
//! to be written anew because its sync had failed (`recovery/renewal.rs`).

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::Bytes;
use headwater_proto::batch::{BatchHeader, HEADER_BYTES, TimestampType};
use headwater_proto::limits::MAX_BATCH_BYTES;

use crate::active::{Active, Place, Prepared};
use crate::checkpoint::segment_file_name;
use crate::config::{LogConfig, LogIdentity, OpenHints};
use crate::epochs::{self, LeaderEpochs};
use crate::error::{AppendError, During, IoFailure, LogError, OpenError, Poisoned};
use crate::files::{self, Directory, Files};
use crate::index::{IndexBuilder, IndexBytes};
use crate::metrics as names;
use crate::producers::{self, Admission, LastSequence, ProducerState, SequenceError};
use crate::reader::{LogReader, SegmentEntry, View};
use crate::recovery::renewal::Doubtful;
use crate::recovery::{self, RecoveryProgress, RecoveryReport};
use crate::retention::Recycled;

/// What is written of producers for recovery's sake is at most one part in so many of what is written in all.
const CHECKPOINT_SHARE: u64 = 16;

/// A batch to be appended: checked and walked by whoever took it in.
#[derive(Debug, Clone)]
pub struct NewBatch {
    /// Its header.
    pub header: BatchHeader,
    /// The whole batch, header and all.
    pub bytes: Bytes,
}

/// What became of a batch of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchOutcome {
    /// It is in the log.
    Appended {
        /// Offset of its first record.
        base_offset: i64,
        /// Offset of its last record.
        last_offset: i64,
        /// The timestamp that its records got; -1 where they keep their own.
        log_append_time_ms: i64,
    },
    /// It was there already. Its original may not be flushed yet.
    Duplicate {
        /// Offset of the original's first record.
        base_offset: i64,
        /// Offset of the original's last record.
        last_offset: i64,
    },
    /// Its sequence does not fit. Nothing of it was appended; the rest of the group was.
    Refused(SequenceError),
}

/// The write half of a log. There is one; readers are had from [`Log::reader`].
#[derive(Debug)]
pub struct Log {
    pub(crate) files: Arc<dyn Files>,
    pub(crate) dir: Arc<Path>,
    pub(crate) identity: LogIdentity,
    pub(crate) config: LogConfig,
    pub(crate) sealed: Vec<SegmentEntry>,
    pub(crate) active: Active,
    pub(crate) producers: ProducerState,
    pub(crate) epochs: Arc<LeaderEpochs>,
    pub(crate) epochs_changed: bool,
    pub(crate) log_start: i64,
    pub(crate) next_offset: i64,
    pub(crate) flushed: i64,
    pub(crate) unflushed_bytes: u64,
    pub(crate) poisoned: Option<Poisoned>,
    pub(crate) recycled: Vec<Recycled>,
    /// Segments of which a sync failed, and for whose new files there was no room yet.
    pub(crate) doubtful: Vec<Doubtful>,
    /// Sealed segments whose indexes and checksums found no room.
    incomplete: Vec<Active>,
    /// Offset of a snapshot within the segment that is written.
    stray_snapshot: Option<i64>,
    /// What readers see of the segments; made anew when their list changes.
    pub(crate) segments: Arc<[SegmentEntry]>,
    pub(crate) view: Arc<ArcSwap<View>>,
}

/// How a run of batches goes on from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunStart {
    /// In the same segment.
    Continue,
    /// In the same segment, once what was written before is flushed.
    Flush,
    /// In a new segment.
    Roll,
}

/// A segment in which the log may go on, and its folder in hand: what follows must not fail for want of a descriptor.
#[derive(Debug)]
struct Begun {
    active: Active,
    dir: Box<dyn Directory>,
}

/// Batches of a group that are written with one call.
#[derive(Debug)]
struct Run {
    start: RunStart,
    base_offset: i64,
    batches: Prepared,
    bytes: u64,
    index: IndexBuilder,
    entries: IndexBytes,
    first_timestamp: Option<i64>,
}

impl Log {
    /// Opens the log in a partition's folder, or creates it. Recovers it, unless the hints say that it was closed in good order.
    pub fn open(
        files: Arc<dyn Files>,
        dir: &Path,
        identity: LogIdentity,
        config: LogConfig,
        hints: OpenHints,
        now_ms: i64,
    ) -> Result<(Log, RecoveryReport), OpenError> {
        Log::open_watched(files, dir, identity, config, hints, now_ms, &RecoveryProgress::default())
    }

    /// As [`Log::open`]; `progress` is told how far a recovery is.
    pub fn open_watched(
        files: Arc<dyn Files>,
        dir: &Path,
        identity: LogIdentity,
        config: LogConfig,
        hints: OpenHints,
        now_ms: i64,
        progress: &RecoveryProgress,
    ) -> Result<(Log, RecoveryReport), OpenError> {
        let dir: Arc<Path> = dir.into();
        let place = Place { files: &files, dir: &dir, identity: &identity, config: &config };
        let (recovered, report) = recovery::recover(place, hints, now_ms, progress)?;
        let epochs = Arc::new(recovered.epochs);
        let view = View {
            log_start: recovered.log_start,
            log_end: recovered.next_offset,
            flushed: recovered.flushed,
            segments: Arc::new([]),
            end_position: 0,
            largest: None,
            recent: Default::default(),
            epochs: Arc::clone(&epochs),
            closed: false,
        };
        let mut log = Log {
            files,
            dir,
            identity,
            config,
            sealed: recovered.sealed,
            active: recovered.active,
            producers: recovered.producers,
            epochs,
            epochs_changed: recovered.epochs_changed,
            log_start: recovered.log_start,
            next_offset: recovered.next_offset,
            flushed: recovered.flushed,
            unflushed_bytes: 0,
            poisoned: None,
            recycled: Vec::new(),
            doubtful: recovered.doubtful,
            incomplete: recovered.incomplete,
            stray_snapshot: None,
            segments: Arc::new([]),
            view: Arc::new(ArcSwap::from_pointee(view)),
        };
        // Recovery reads them from the batches beyond the recovery point, which may move on only then.
        match log.write_epochs() {
            Err(failure) if files::is_full(&failure.error) => {
                log.flushed = hints.recovery_point.clamp(log.log_start, log.flushed);
            }
            written => written?,
        }
        log.relist();
        Ok((log, report))
    }

    /// Appends a group of batches as their leader: checks sequences, assigns offsets, stamps them if the topic says so, and writes
    /// them with one call. Either all that is not a duplicate and not refused is appended, or (on an error) nothing is.
    /// Appended is not flushed: see [`Log::flush`].
    pub fn append(
        &mut self,
        batches: &[NewBatch],
        leader_epoch: i32,
        now_ms: i64,
    ) -> Result<Vec<BatchOutcome>, AppendError> {
        self.check_poisoned()?;
        if let Some(latest) = self.epochs.latest().filter(|latest| leader_epoch < *latest) {
            return Err(AppendError::OldEpoch { given: leader_epoch, latest });
        }
        let began = Instant::now();
        let mut staged = self.producers.stage(now_ms);
        let mut next_offset = self.next_offset;
        let mut group = Vec::with_capacity(batches.len());
        let mut outcomes = Vec::with_capacity(batches.len());
        for batch in batches {
            let mut header = BatchHeader { base_offset: next_offset, leader_epoch, ..batch.header };
            let stamped = self.config.timestamp_type == TimestampType::LogAppend;
            if stamped {
                header.max_timestamp = now_ms;
            }
            match staged.admit(&header) {
                Err(refusal) => outcomes.push(BatchOutcome::Refused(refusal)),
                Ok(Admission::Duplicate { base_offset, last_offset }) => {
                    outcomes.push(BatchOutcome::Duplicate { base_offset, last_offset });
                }
                Ok(Admission::Append) => {
                    let body = body_of(batch)?;
                    if stamped {
                        header = header.with_log_append_time(now_ms, &body);
                    }
                    next_offset = header.next_offset();
                    let log_append_time_ms = if stamped { now_ms } else { -1 };
                    let (base_offset, last_offset) = (header.base_offset, header.last_offset());
                    outcomes.push(BatchOutcome::Appended { base_offset, last_offset, log_append_time_ms });
                    group.push((header, body));
                }
            }
        }
        self.write_group(group, &[], now_ms)?;
        metrics::histogram!(names::APPEND_SECONDS).record(began.elapsed());
        Ok(outcomes)
    }

    /// Appends what a leader sent, with the offsets and epochs that it has. `rolls`: base offsets of batches with which the leader's
    /// segments begin, in order; so does one here.
    pub fn append_as_follower(&mut self, batches: &[NewBatch], rolls: &[i64], now_ms: i64) -> Result<(), AppendError> {
        self.check_poisoned()?;
        let mut next_offset = self.next_offset;
        if let (Some(first), Some(latest)) = (batches.first(), self.epochs.entries().last())
            && latest.start_offset >= next_offset
            && first.header.leader_epoch < latest.epoch
        {
            // Whoever led here from this end wrote nothing, and the leader has older records than that from here on.
            self.epochs_changed |= Arc::make_mut(&mut self.epochs).truncate_from(next_offset);
        }
        let mut latest = self.epochs.latest().unwrap_or(-1);
        let mut group = Vec::with_capacity(batches.len());
        for batch in batches {
            let header = batch.header;
            if header.base_offset < next_offset {
                return Err(AppendError::OutOfOrder { given: header.base_offset, expected: next_offset });
            }
            if header.leader_epoch < latest {
                return Err(AppendError::OldEpoch { given: header.leader_epoch, latest });
            }
            (next_offset, latest) = (header.next_offset(), header.leader_epoch);
            group.push((header, body_of(batch)?));
        }
        self.write_group(group, rolls, now_ms)
    }

    /// Makes everything that was appended durable. Returns the offset up to which the log is on stable storage. After an
    /// error the log takes no writes until it was opened anew: nobody can say what is on the disk.
    pub fn flush(&mut self) -> Result<i64, LogError> {
        self.check_poisoned()?;
        self.flush_active()?;
        let checkpointed = self.checkpoint_if_due();
        self.or_poison(checkpointed)?;
        self.publish();
        Ok(self.flushed)
    }

    /// A reader of this log.
    pub fn reader(&self) -> LogReader {
        LogReader { view: Arc::clone(&self.view) }
    }

    /// The producers that the log knows.
    pub fn producers(&self) -> &ProducerState {
        &self.producers
    }

    /// The last thing that a producer wrote here.
    pub fn last_sequence(&self, producer_id: i64) -> Option<LastSequence> {
        self.producers.last_sequence(producer_id)
    }

    /// Forgets producers that wrote nothing for as long as the settings say; how many.
    pub fn expire_producers(&mut self, now_ms: i64) -> usize {
        self.producers.expire(now_ms, self.config.producer_id_expiration_ms)
    }

    /// A leader of this epoch begins here. In memory until the next append is flushed: an epoch that wrote nothing is nobody's history.
    pub fn assign_leader_epoch(&mut self, epoch: i32) {
        self.note_epoch(epoch, self.next_offset);
        self.publish();
    }

    /// The history of leader epochs.
    pub fn leader_epochs(&self) -> &LeaderEpochs {
        &self.epochs
    }

    /// One beyond the last offset that was written.
    pub fn log_end_offset(&self) -> i64 {
        self.next_offset
    }

    /// The first offset of the log.
    pub fn log_start_offset(&self) -> i64 {
        self.log_start
    }

    /// One beyond the last offset on stable storage.
    pub fn flushed_offset(&self) -> i64 {
        self.flushed
    }

    /// What belongs into the recovery point checkpoint: the flushed offset.
    pub fn recovery_point(&self) -> i64 {
        self.flushed
    }

    /// Bytes of all segments.
    pub fn size_bytes(&self) -> u64 {
        self.sealed.iter().map(|entry| entry.size).sum::<u64>() + self.active.size
    }

    /// Whether a write or sync failed, so that the log must be opened anew.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.is_some()
    }

    /// The settings.
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    /// Changes the settings, from the next operation on.
    pub fn set_config(&mut self, config: LogConfig) {
        self.active.segment.expect_bytes(u64::from(config.segment_bytes));
        self.config = config;
    }

    /// Which topic and partition this is.
    pub fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    /// The partition's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Closes the log in good order: everything flushed, no space reserved, indexes complete, the producers' snapshot
    /// written. Readers are told that it is closed; slices they hold stay good.
    pub fn close(mut self) -> Result<(), LogError> {
        self.check_poisoned()?;
        self.flush_active()?;
        let sealed = self.active.seal(&*self.files, &self.identity).and_then(|()| Ok(self.complete_sealed()?));
        self.or_poison(sealed)?;
        self.write_snapshot(self.next_offset, &self.producers)?;
        self.write_epochs()?;
        for recycled in self.recycled.drain(..) {
            files::remove_if_exists(&*self.files, &recycled.path).during("remove", &recycled.path)?;
        }
        self.files.sync_dir(&self.dir).during("sync", &self.dir)?;
        self.view.rcu(|view| View { closed: true, ..View::clone(view) });
        Ok(())
    }

    /// Rolls the segment that is written if it has been so for longer than `segment.ms`; whether it was rolled.
    pub fn roll_if_due(&mut self, now_ms: i64) -> Result<bool, LogError> {
        self.check_poisoned()?;
        let age_ms = u64::try_from(now_ms.saturating_sub(self.active.begun_ms)).unwrap_or(0);
        if self.active.size == 0 || age_ms < self.config.segment_ms || !self.doubtful.is_empty() {
            return Ok(false);
        }
        self.roll(now_ms)?;
        Ok(true)
    }

    /// Seals the segment that is written and begins an empty one.
    pub(crate) fn roll(&mut self, now_ms: i64) -> Result<(), LogError> {
        self.renew_doubtful()?;
        if let Err(failure) = self.active.hold() {
            return Err(self.not_opened(failure));
        }
        let begun = self.begin_segment(self.next_offset, 0, now_ms)?;
        self.roll_to(begun)?;
        self.relist();
        Ok(())
    }

    pub(crate) fn place(&self) -> Place<'_> {
        Place { files: &self.files, dir: &self.dir, identity: &self.identity, config: &self.config }
    }

    pub(crate) fn check_poisoned(&self) -> Result<(), Poisoned> {
        self.poisoned.clone().map_or(Ok(()), Err)
    }

    /// Passes a result on; a failure (but for a lack of room) poisons the log.
    pub(crate) fn or_poison<T>(&mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        result.inspect_err(|error| {
            if !matches!(error, LogError::FullDisk(_)) {
                self.poison(error.to_string());
            }
        })
    }

    /// Passes a result on; an error leaves the folder half changed, so that the log must be opened anew.
    pub(crate) fn poison_on_error<T>(&mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        if let Err(error) = &result {
            self.poison(error.to_string());
        }
        result
    }

    /// The segment that is written could not be opened: that passes if there are too many open files, and nothing else does.
    pub(crate) fn not_opened(&mut self, failure: IoFailure) -> LogError {
        if !files::is_exhausted(&failure.error) {
            self.poison(failure.to_string());
        }
        LogError::Io(failure)
    }

    fn poison(&mut self, reason: String) {
        if self.poisoned.is_none() {
            metrics::counter!(names::POISONED).increment(1);
            self.poisoned = Some(Poisoned { reason });
        }
    }

    /// Cuts a group into runs: where segments are rolled, and where the limit on unflushed bytes asks for a flush.
    fn plan(&self, group: Vec<(BatchHeader, Bytes)>, rolls: &[i64]) -> Result<Vec<Run>, AppendError> {
        let active = &self.active;
        let mut runs: Vec<Run> = Vec::with_capacity(1);
        let (mut size, mut base_offset) = (active.size, active.segment.base_offset);
        let (mut first_timestamp, mut unflushed) = (active.first_timestamp, self.unflushed_bytes);
        for (header, body) in group {
            let bytes = header.size() as u64;
            if header.size() > MAX_BATCH_BYTES {
                return Err(AppendError::TooLarge { size: header.size(), limit: MAX_BATCH_BYTES });
            }
            let index = runs.last().map_or(&active.index, |run| &run.index);
            let too_old = first_timestamp.is_some_and(|first| {
                u64::try_from(header.max_timestamp.saturating_sub(first)).unwrap_or(0) > self.config.segment_ms
            });
            let full = size + bytes > u64::from(self.config.segment_bytes)
                || too_old
                || rolls.contains(&header.base_offset)
                || index.is_full(self.config.segment_index_bytes);
            // Even an empty segment's indexes hold 31 bits of an offset's distance to its base, and a follower may go on anywhere.
            let too_far = header.last_offset() - base_offset > i64::from(i32::MAX) && header.base_offset > base_offset;
            let start = if too_far || (size > 0 && full) {
                RunStart::Roll
            } else if unflushed > 0 && unflushed + bytes > self.config.unflushed_limit_bytes {
                RunStart::Flush
            } else {
                RunStart::Continue
            };
            match start {
                RunStart::Roll => {
                    (size, base_offset, first_timestamp, unflushed) = (0, header.base_offset, None, 0);
                }
                RunStart::Flush => unflushed = 0,
                RunStart::Continue => {}
            }
            first_timestamp = first_timestamp.or(Some(header.max_timestamp));
            if start != RunStart::Continue || runs.is_empty() {
                let index = match start {
                    RunStart::Roll => IndexBuilder::new(base_offset, self.config.index_interval_bytes),
                    _ => index.clone(),
                };
                runs.push(Run {
                    start,
                    base_offset,
                    batches: Prepared::default(),
                    bytes: 0,
                    index,
                    entries: IndexBytes::default(),
                    first_timestamp,
                });
            }
            if let Some(run) = runs.last_mut() {
                run.index.batch(&header, size, &mut run.entries);
                run.bytes += bytes;
                run.batches.headers.push((header, header.encode()));
                run.batches.bodies.push(body);
            }
            size += bytes;
            unflushed += bytes;
        }
        Ok(runs)
    }

    fn write_group(&mut self, group: Vec<(BatchHeader, Bytes)>, rolls: &[i64], now_ms: i64) -> Result<(), AppendError> {
        let runs = self.plan(group, rolls)?;
        if runs.is_empty() {
            return Ok(());
        }
        let mut begun = match self.renew_doubtful().and_then(|()| self.reserve_for(&runs, now_ms)) {
            Ok(begun) => begun,
            Err(error) => {
                metrics::counter!(names::DISK_FULL).increment(u64::from(matches!(error, LogError::FullDisk(_))));
                return Err(error.into());
            }
        };
        // Once something is written, nothing may fail for want of a descriptor.
        if let Err(failure) =
            self.active.hold().and_then(|()| begun.iter_mut().try_for_each(|begun| begun.active.hold()))
        {
            begun.iter().for_each(|unused| self.discard(unused));
            return Err(self.not_opened(failure).into());
        }
        let mut begun = begun.into_iter();
        let mut bytes_written = 0;
        if let Err(error) = self.write_runs(runs, &mut begun, &mut bytes_written, now_ms) {
            if bytes_written > 0 {
                // Part of the group is in the log, and its producers are told that nothing is.
                self.poison(error.to_string());
            }
            begun.for_each(|unused| self.discard(&unused));
            return Err(error.into());
        }
        metrics::counter!(names::APPENDED_BYTES).increment(bytes_written);
        if let Err(failure) = self.active.spill_if_large(&*self.files, &self.identity) {
            // Nothing is lost: the entries stay in memory, and opening rebuilds what is not in the files.
            tracing::warn!(%failure, "index entries could not be written");
        }
        self.publish();
        Ok(())
    }

    fn write_runs(
        &mut self,
        runs: Vec<Run>,
        begun: &mut impl Iterator<Item = Begun>,
        bytes_written: &mut u64,
        now_ms: i64,
    ) -> Result<(), LogError> {
        for run in runs {
            match run.start {
                RunStart::Continue => {}
                RunStart::Flush => self.flush_between()?,
                RunStart::Roll => {
                    if let Some(begun) = begun.next() {
                        self.roll_to(begun)?;
                    }
                }
            }
            *bytes_written += self.write_run(run, now_ms)?;
        }
        Ok(())
    }

    /// Flushes in the middle of a group, of which the rest must not fail for want of room or of a descriptor: the file stays in hand, and
    /// the flushed offset behind the batches, which are durable, where their epochs could not be written.
    fn flush_between(&mut self) -> Result<(), LogError> {
        let held = self.active.unflushed.clone();
        match self.flush_active() {
            Err(error) if error.retryable() && !self.is_poisoned() => {
                tracing::warn!(%error, "leader epochs could not be written");
            }
            result => result?,
        }
        self.active.unflushed = held;
        Ok(())
    }

    /// Takes the space for all runs, so that a full disk refuses the whole group before anything is written. Returns the
    /// segments that it begins.
    fn reserve_for(&mut self, runs: &[Run], now_ms: i64) -> Result<Vec<Begun>, LogError> {
        let mut begun: Vec<Begun> = Vec::new();
        let mut rest = runs;
        while let Some((first, others)) = rest.split_first() {
            let length = 1 + others.iter().take_while(|run| run.start != RunStart::Roll).count();
            let (these, later) = rest.split_at(length);
            let needed = these.iter().map(|run| run.bytes).sum();
            let result = match first.start {
                RunStart::Roll => {
                    self.begin_segment(first.base_offset, needed, now_ms).map(|segment| begun.push(segment))
                }
                _ => self.reserve(needed),
            };
            if let Err(error) = result {
                begun.iter().for_each(|unused| self.discard(unused));
                return Err(error);
            }
            rest = later;
        }
        Ok(begun)
    }

    fn reserve(&mut self, needed: u64) -> Result<(), LogError> {
        match self.active.reserve(needed, &self.config) {
            Err(LogError::FullDisk(full)) if self.give_up_recycled() => {
                tracing::info!(path = %full.path.display(), "gave up recycled segments for room");
                self.active.reserve(needed, &self.config)
            }
            result => result,
        }
    }

    /// Begins a segment that has space for `needed` bytes, or leaves nothing behind.
    fn begin_segment(&mut self, base_offset: i64, needed: u64, now_ms: i64) -> Result<Begun, LogError> {
        let recycled = self.recycled.pop();
        match self.begin_in(recycled.as_ref().map(|recycled| &*recycled.path), base_offset, needed, now_ms) {
            Err(LogError::FullDisk(_)) if !self.is_poisoned() && (self.give_up_recycled() || recycled.is_some()) => {
                self.begin_in(None, base_offset, needed, now_ms)
            }
            Ok(begun) => {
                metrics::counter!(names::SEGMENTS_RECYCLED).increment(u64::from(recycled.is_some()));
                Ok(begun)
            }
            Err(error) => {
                // It may be as it was, for the next time.
                self.recycled.extend(
                    recycled.filter(|recycled| files::exists(&*self.files, &recycled.path).is_ok_and(|exists| exists)),
                );
                Err(error)
            }
        }
    }

    fn begin_in(
        &mut self,
        recycled: Option<&Path>,
        base_offset: i64,
        needed: u64,
        now_ms: i64,
    ) -> Result<Begun, LogError> {
        let dir = match self.files.open_dir(&self.dir).during("open", &self.dir) {
            Ok(dir) => dir,
            Err(failure) => return Err(self.not_opened(failure)),
        };
        let mut begun = Begun { active: Active::begin(self.place(), base_offset, recycled, now_ms)?, dir };
        if needed > 0
            && let Err(error) = begun.active.reserve(needed, &self.config)
        {
            self.discard(&begun);
            return Err(error);
        }
        Ok(begun)
    }

    /// Removes a segment that was begun and is not needed, for good: the log may go on beyond its base offset in the one before.
    fn discard(&mut self, unused: &Begun) {
        let removed = unused.active.discard(&*self.files, &*unused.dir);
        if let Err(failure) = removed {
            self.poison(format!("an empty segment could not be removed: {failure}"));
        }
    }

    /// Seals the segment that is written; the log goes on in this one. Afterwards everything before it is durable.
    fn roll_to(&mut self, begun: Begun) -> Result<(), LogError> {
        let sealed = self.seal_active(&*begun.dir);
        let complete = match self.or_poison(sealed) {
            Ok(complete) => complete,
            Err(error) => {
                self.discard(&begun);
                return Err(error);
            }
        };
        self.active.segment.publish(self.active.size);
        self.sealed.push(self.active.entry());
        let sealed = std::mem::replace(&mut self.active, begun.active);
        if !complete {
            self.incomplete.push(sealed);
        }
        self.unflushed_bytes = 0;
        if !self.epochs_changed {
            self.flushed = self.next_offset;
        }
        self.relist();
        metrics::counter!(names::SEGMENTS_ROLLED).increment(1);
        Ok(())
    }

    /// Makes the active segment durable, and complete if there is room for its indexes: they are made from the log, and a group of
    /// which a part is written must not fail for want of room.
    fn seal_active(&mut self, dir: &dyn Directory) -> Result<bool, LogError> {
        self.active.trim()?;
        let mut complete = true;
        let mut unless_full = |result: Result<(), IoFailure>| match result {
            Err(failure) if files::is_full(&failure.error) || files::is_exhausted(&failure.error) => {
                tracing::warn!(%failure, "a segment is sealed without it");
                complete = false;
                Ok(())
            }
            result => result,
        };
        unless_full(self.active.complete(&*self.files, &self.identity))?;
        unless_full(self.complete_sealed())?;
        let snapshot = self.write_snapshot(self.next_offset, &self.producers);
        if snapshot.is_ok() {
            self.stray_snapshot_at(None);
        }
        unless_full(snapshot)?;
        unless_full(self.write_epochs())?;
        // Full or not: nobody knows which names are on the disk after this failed.
        dir.sync().during("sync", &self.dir).map_err(LogError::Io)?;
        Ok(complete)
    }

    /// Writes the indexes and checksums of sealed segments for which there was no room before.
    fn complete_sealed(&mut self) -> Result<(), IoFailure> {
        while let Some(mut incomplete) = self.incomplete.pop() {
            let exists = self.sealed.iter().any(|entry| Arc::ptr_eq(&entry.segment, &incomplete.segment));
            if exists && let Err(failure) = incomplete.complete(&*self.files, &self.identity) {
                self.incomplete.push(incomplete);
                return Err(failure);
            }
        }
        Ok(())
    }

    fn write_run(&mut self, run: Run, now_ms: i64) -> Result<u64, LogError> {
        let written = self.active.write(&run.batches);
        let bytes = match written {
            Ok(bytes) => bytes,
            Err(failure) => {
                // Even for want of room: how much of it was written, nobody knows.
                self.poison(failure.to_string());
                return Err(LogError::Io(failure));
            }
        };
        self.active.index = run.index;
        self.active.segment.index(&run.entries);
        self.active.first_timestamp = run.first_timestamp;
        self.active.last_append_ms = now_ms;
        for (header, _) in &run.batches.headers {
            self.producers.replay(header, None, now_ms);
            self.note_epoch(header.leader_epoch, header.base_offset);
            self.next_offset = header.next_offset();
        }
        self.unflushed_bytes += bytes;
        self.active.recent.push(self.next_offset, self.active.size);
        Ok(bytes)
    }

    fn note_epoch(&mut self, epoch: i32, start_offset: i64) {
        if self.epochs.latest().is_none_or(|latest| epoch > latest) {
            self.epochs_changed |= Arc::make_mut(&mut self.epochs).assign(epoch, start_offset);
        }
    }

    pub(crate) fn flush_active(&mut self) -> Result<(), LogError> {
        if self.flushed == self.next_offset {
            return Ok(());
        }
        self.renew_doubtful()?;
        let began = Instant::now();
        if let Err(failure) = self.active.hold() {
            return Err(self.not_opened(failure));
        }
        if let Err(failure) = self.active.sync() {
            // Full or not: after a failed sync the pages may count as clean without being on the disk.
            self.poison(failure.to_string());
            return Err(LogError::Io(failure));
        }
        self.unflushed_bytes = 0;
        self.write_epochs()?;
        self.flushed = self.next_offset;
        metrics::histogram!(names::FLUSH_SECONDS).record(began.elapsed());
        Ok(())
    }

    /// Puts on the disk what recovery would otherwise scan for, if there is enough of it. What finds no room is left for the next time.
    fn checkpoint_if_due(&mut self) -> Result<(), LogError> {
        let known_bytes = (self.producers.len() * producers::SNAPSHOT_ENTRY_BYTES) as u64;
        let step = self.config.checkpoint_bytes.max(known_bytes * CHECKPOINT_SHARE);
        if self.active.size - self.active.checkpointed < step || self.flushed < self.next_offset {
            return Ok(());
        }
        let written = self.active.checkpoint(&*self.files, &self.identity);
        match written.and_then(|()| self.write_snapshot(self.next_offset, &self.producers)) {
            Ok(()) => self.stray_snapshot_at(Some(self.next_offset)),
            Err(failure) if files::is_full(&failure.error) || files::is_exhausted(&failure.error) => {
                tracing::warn!(%failure, "recovery will scan more than it should");
            }
            Err(failure) => return Err(LogError::Io(failure)),
        }
        self.active.checkpointed = self.active.size;
        Ok(())
    }

    /// A snapshot within a segment takes the place of the one before, or (`None`) there is one behind the segment.
    fn stray_snapshot_at(&mut self, offset: Option<i64>) {
        let old = std::mem::replace(&mut self.stray_snapshot, offset);
        if let Some(old) = old.filter(|old| Some(*old) != offset && *old < self.next_offset) {
            let path = self.dir.join(segment_file_name(old, producers::EXTENSION));
            if let Err(error) = files::remove_if_exists(&*self.files, &path) {
                tracing::warn!(path = %path.display(), %error, "a snapshot that is not needed any more could not be removed");
            }
        }
    }

    /// Writes the history of leader epochs, if it changed: before the recovery point passes what it says, since recovery reads
    /// only what lies beyond.
    pub(crate) fn write_epochs(&mut self) -> Result<(), IoFailure> {
        if self.epochs_changed {
            let path = self.dir.join(epochs::FILE_NAME);
            files::replace(&*self.files, &path, self.epochs.encode().as_bytes()).during("write", &path)?;
            self.epochs_changed = false;
        }
        Ok(())
    }

    /// Writes what is known of producers at an offset.
    pub(crate) fn write_snapshot(&self, offset: i64, producers: &ProducerState) -> Result<(), IoFailure> {
        let path = self.dir.join(segment_file_name(offset, producers::EXTENSION));
        let bytes = producers::encode_snapshot(&producers.snapshot());
        files::replace(&*self.files, &path, &bytes).during("write", &path)
    }

    /// Shows readers the list of segments anew, and everything else.
    pub(crate) fn relist(&mut self) {
        self.segments = self.sealed.iter().cloned().chain([self.active.entry()]).collect();
        self.publish();
    }

    /// Shows readers what the log holds now.
    pub(crate) fn publish(&mut self) {
        self.active.segment.publish(self.active.size);
        self.view.store(Arc::new(View {
            log_start: self.log_start,
            log_end: self.next_offset,
            flushed: self.flushed,
            segments: Arc::clone(&self.segments),
            end_position: self.active.size,
            largest: self.active.index.largest(),
            recent: self.active.recent,
            epochs: Arc::clone(&self.epochs),
            closed: false,
        }));
    }
}

/// What follows a batch's header.
fn body_of(batch: &NewBatch) -> Result<Bytes, AppendError> {
    if batch.bytes.len() != batch.header.size() || batch.bytes.len() < HEADER_BYTES {
        return Err(AppendError::TooLarge { size: batch.bytes.len(), limit: batch.header.size() });
    }
    Ok(batch.bytes.slice(HEADER_BYTES..))
}
