//! A log on a disk that crashes, fills up and fails, its broker, and the model that both are held against.
//!
//! One [`World`] lives through random operations. After each, the log must be what the model says it is; after a crash, one of the
//! things that it says are possible.

use std::path::Path;
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchBuilder, BatchHeader, BuildOptions, Codec, TimestampType};
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{
    AppendError, Cursor, Files, LastSequence, Log, LogConfig, LogIdentity, LogReader, NewBatch, OpenHints, ReadError,
    SimFiles, epochs, inspect,
};

use crate::choices::Choices;
use crate::expected::{self, Expected, Kept, Verdict, decide};

const DIR: &str = "/data/t-0";

/// How a log ended that is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its files are opened by the same process.
    Dropped,
    /// Its process was killed.
    Killed,
    /// The power failed.
    Crashed,
}

/// A reader that goes on over many operations.
struct Follower {
    cursor: Cursor,
    /// Where it began, maybe within a batch.
    from: i64,
    /// The batch that it is in, and how many bytes of it it has.
    offset: i64,
    within: usize,
}

/// See the module.
pub(crate) struct World<'a> {
    choices: Choices<'a>,
    files: Arc<SimFiles>,
    log: Option<Log>,
    /// Segments are so large that recovery need not scan all of one.
    large: bool,
    config: LogConfig,
    expected: Expected,
    now_ms: i64,
    epoch: i32,
    high_watermark: i64,
    /// What the checkpoints of the data root say.
    recovery_point: i64,
    checkpointed_start: i64,
    followers: Vec<Follower>,
    /// Batches that producers sent, to be sent again.
    sent: Vec<NewBatch>,
    next_producer: i64,
    /// How far records were deleted, even if a crash took the log start back: nothing is known of epochs before.
    deleted_to: i64,
    /// A truncation was interrupted: what the log says is flushed may be what was to go.
    cutting: bool,
    /// A fault was injected; the disk was made full.
    faulty: bool,
    full: bool,
    /// The disk was full or faulty, and nothing was flushed since; it was so once.
    behind: bool,
    was_troubled: bool,
    /// What was done.
    trace: Vec<String>,
}

/// A test that fails tells what was done, and what the disk holds.
impl Drop for World<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let first = self.trace.len().saturating_sub(120);
            eprintln!("the last operations of {}:\n{}", self.trace.len(), self.trace[first..].join("\n"));
            for entry in self.files.list(Path::new(DIR)).unwrap_or_default() {
                let metadata = self.files.metadata(&Path::new(DIR).join(&entry.name));
                eprintln!("{} {:?}", entry.name, metadata.map(|metadata| metadata.len));
            }
        }
    }
}

macro_rules! trace {
    ($world:expr, $($text:tt)*) => { $world.trace.push(format!($($text)*)) };
}

fn identity() -> LogIdentity {
    LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([7; 16]), partition: 0 }
}

impl<'a> World<'a> {
    /// An empty log of small segments.
    pub(crate) fn new(choices: Choices<'a>) -> World<'a> {
        World::of(choices, false)
    }

    /// An empty log of large segments.
    #[allow(dead_code)] // the fuzz target has small ones only
    pub(crate) fn large(choices: Choices<'a>) -> World<'a> {
        World::of(choices, true)
    }

    fn of(mut choices: Choices<'a>, large: bool) -> World<'a> {
        let files = SimFiles::with_open_limit(choices.below(1 << 16) as u64, choices.of(&[1, 3, 50]));
        files.create_dir_all(Path::new(DIR)).unwrap();
        files.sync_dir(Path::new("/data")).unwrap();
        files.sync_dir(Path::new("/")).unwrap();
        let unflushed_limit_bytes = choices.of(&[2 << 10, 20 << 10, 1 << 20]);
        let index_interval_bytes = choices.of(&[1, 200, 1_000, 4_096]);
        let mut world = World {
            choices,
            files,
            log: None,
            large,
            config: LogConfig { unflushed_limit_bytes, index_interval_bytes, ..LogConfig::default() },
            expected: Expected::default(),
            now_ms: 1_700_000_000_000,
            epoch: 0,
            high_watermark: 0,
            recovery_point: 0,
            checkpointed_start: 0,
            followers: Vec::new(),
            sent: Vec::new(),
            next_producer: 1,
            cutting: false,
            faulty: false,
            full: false,
            behind: false,
            was_troubled: false,
            deleted_to: 0,
            trace: Vec::new(),
        };
        world.config = world.some_config();
        world.open(End::Crashed, false);
        world
    }

    /// Lives through this many operations, or until the choices end.
    pub(crate) fn run(&mut self, operations: usize) {
        for _ in 0..operations {
            if self.choices.is_empty() {
                break;
            }
            self.now_ms += self.choices.between(0, 50);
            self.files.set_clock_ms(self.now_ms);
            if self.choices.one_in(25) {
                let operations = self.choices.below(12) as u64;
                trace!(self, "power off after {operations} operations");
                self.files.power_off_after(operations);
            }
            self.step();
            self.settle();
            self.check();
        }
        self.heal();
        self.reopen(End::Crashed, false);
    }

    fn step(&mut self) {
        match self.choices.below(100) {
            0..=37 => self.append(),
            38..=40 => self.append_as_follower(),
            41..=49 => self.flush(),
            50..=53 => self.checkpoint(),
            54..=62 => self.read_somewhere(),
            63..=72 => self.follow(),
            73..=77 => self.look_up_timestamps(),
            78..=79 => self.truncate(),
            80..=82 => self.delete_records(),
            83..=85 => self.enforce_retention(),
            86..=88 => self.change_config(),
            89 => self.bump_epoch(),
            90 => self.pass_time(),
            91 => self.expire_producers(),
            92..=93 => self.close(),
            94 => self.end_process(),
            95 => self.fail_something(),
            96 => self.fill_disk(),
            97 => self.heal(),
            98 => self.reopen(End::Crashed, false),
            _ => self.restart_elsewhere(),
        }
    }

    fn log(&mut self) -> &mut Log {
        self.log.as_mut().unwrap()
    }

    fn reader(&mut self) -> LogReader {
        self.log().reader()
    }

    /// Passes a result on; an error must have a cause.
    fn explained<T, E: std::fmt::Display>(&mut self, result: Result<T, E>, what: &str) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                trace!(self, "{what}: {error}");
                assert!(self.faulty || self.full || self.files.is_off(), "{what} failed without a cause: {error}");
                None
            }
        }
    }

    fn some_config(&mut self) -> LogConfig {
        let choices = &mut self.choices;
        if self.large {
            return LogConfig {
                segment_bytes: choices.of(&[400_000, 2_000_000]),
                checkpoint_bytes: choices.of(&[1_000, 70_000, 200_000, u64::MAX]),
                retention_ms: choices.of(&[None, None, Some(100_000)]),
                producer_id_expiration_ms: 20_000,
                recycled_segments: choices.below(2),
                ..self.config.clone()
            };
        }
        LogConfig {
            segment_bytes: choices.of(&[1_000, 4_000, 20_000, 200_000]),
            segment_ms: choices.of(&[5_000, 1_000_000, u64::MAX]),
            segment_index_bytes: choices.of(&[24, 120, 10 << 20]),
            retention_ms: choices.of(&[None, Some(0), Some(3_000), Some(100_000)]),
            retention_bytes: choices.of(&[None, None, Some(0), Some(5_000), Some(50_000)]),
            timestamp_type: choices.of(&[TimestampType::Create, TimestampType::Create, TimestampType::LogAppend]),
            producer_id_expiration_ms: 20_000,
            recycled_segments: choices.below(3),
            ..self.config.clone()
        }
    }

    /// Records of any size and time.
    fn some_batch(&mut self, producer: Option<(i64, i16, i32)>) -> NewBatch {
        let codec = self.choices.of(&[Codec::None, Codec::None, Codec::Lz4, Codec::Zstd, Codec::Gzip, Codec::Snappy]);
        let mut options = BuildOptions { codec, ..BuildOptions::default() };
        if let Some((id, epoch, sequence)) = producer {
            options = BuildOptions { producer_id: id, producer_epoch: epoch, base_sequence: sequence, ..options };
        }
        let mut builder = BatchBuilder::new(options);
        let count = self.choices.of(&[1, 1, 2, 5, 20]);
        for _ in 0..count {
            let spread = self.choices.of(&[0, 10, 2_000, 200_000]);
            let timestamp = self.now_ms + self.choices.between(-spread, spread / 2);
            let size = self.choices.of(&[0, 1, 30, 200, if self.large { 12_000 } else { 3_000 }]);
            let fill = self.choices.below(256);
            let value: Vec<u8> = (0..size).map(|n| (fill + n * n / 7) as u8).collect();
            builder.append(timestamp, Some(b"key"), Some(&value), &[]);
        }
        let bytes = builder.build().unwrap();
        NewBatch { header: batch::check(&bytes).unwrap(), bytes }
    }

    /// A batch of a known producer (the next, a gap, an old epoch, a new one), of a new one, of none, or one that was sent before.
    fn some_request(&mut self, producers: &expected::Producers) -> NewBatch {
        if !self.sent.is_empty() && self.choices.one_in(4) {
            let back = self.choices.below(self.sent.len().min(12));
            return self.sent[self.sent.len() - 1 - back].clone();
        }
        let usable: Vec<i64> = producers.keys().filter(|id| !self.expected.expired.contains(id)).copied().collect();
        let producer = match self.choices.below(8) {
            0..=1 => None,
            2 => {
                self.next_producer += 1;
                Some((self.next_producer, self.choices.below(3) as i16, self.choices.of(&[0, 0, 0, 4])))
            }
            _ if usable.is_empty() => None,
            kind => {
                let id = usable[usable.len() - 1 - self.choices.below(usable.len().min(4))];
                let known = &producers[&id];
                let next = known.batches.last().map_or(0, |last| last.1.checked_add(1).unwrap_or(0));
                Some(match (kind, self.choices.below(6)) {
                    (3, 0) => (id, known.epoch, next.wrapping_add(3).max(0)),
                    (3, 1) => (id, known.epoch - 1, next),
                    (3, 2) => (id, known.epoch + 1, 0),
                    (3, 3) => (id, known.epoch + 1, 7),
                    _ => (id, known.epoch, next),
                })
            }
        };
        let batch = self.some_batch(producer);
        if producer.is_some() {
            self.sent.push(batch.clone());
        }
        batch
    }

    fn append(&mut self) {
        let mut producers = self.expected.producers.clone();
        let mut next_offset = self.expected.end;
        let (mut batches, mut verdicts, mut planned) = (Vec::new(), Vec::new(), Vec::new());
        let (epoch, now_ms, timestamps) = (self.epoch, self.now_ms, self.config.timestamp_type);
        for _ in 0..self.choices.of(&[1, 1, 2, 6]) {
            let batch = self.some_request(&producers);
            let header = BatchHeader { base_offset: next_offset, ..batch.header };
            let verdict = decide(&producers, &header);
            verdicts.push((verdict, next_offset));
            if verdict == Verdict::Append {
                expected::note(&mut producers, &header, now_ms);
                planned.push(Kept::new(&batch, next_offset, epoch, timestamps, now_ms));
                next_offset = header.next_offset();
            }
            batches.push(batch);
        }
        trace!(self, "append {} batches, {} of them new, at {}", batches.len(), planned.len(), self.expected.end);
        if self.choices.one_in(30) {
            let latest = self.log().leader_epochs().latest();
            if latest.is_some_and(|latest| latest > 0 && latest == epoch) {
                let refused = self.log().append(&batches, epoch - 1, now_ms);
                assert!(matches!(refused, Err(AppendError::OldEpoch { .. })), "{refused:?}");
            }
        }
        let result = self.log().append(&batches, epoch, now_ms);
        if let Err(error) = &result
            && self.full
            && !self.faulty
            && !self.files.is_off()
        {
            assert!(error.retryable(), "for want of room alone: {error}");
            assert!(!self.log().is_poisoned(), "for want of room alone: {error}");
        }
        match self.explained(result, "append") {
            Some(outcomes) => {
                assert_eq!(outcomes.len(), verdicts.len());
                for (n, (outcome, (verdict, base_offset))) in outcomes.iter().zip(&verdicts).enumerate() {
                    let explained = self.expected.explains(*verdict, outcome, *base_offset);
                    assert!(explained, "batch {n}: {outcome:?}, where {verdict:?} is right: {:?}", batches[n].header);
                }
                self.expected.append(planned, now_ms);
            }
            None => self.perhaps(planned),
        }
    }

    fn append_as_follower(&mut self) {
        let mut next_offset = self.expected.end;
        let mut planned = Vec::new();
        let mut batches = Vec::new();
        for _ in 0..self.choices.of(&[1, 3]) {
            let producer = self.choices.one_in(3).then(|| {
                // Sequences that soon begin again at 0.
                self.next_producer += 1;
                (self.next_producer, 0, i32::MAX - 3)
            });
            let batch = self.some_batch(producer);
            let kept = Kept::new(&batch, next_offset, self.epoch, TimestampType::Create, self.now_ms);
            next_offset = kept.header.next_offset();
            batches.push(NewBatch { header: kept.header, bytes: kept.bytes.clone() });
            planned.push(kept);
        }
        trace!(self, "append {} batches as a follower at {}", batches.len(), self.expected.end);
        let now_ms = self.now_ms;
        let result = self.log().append_as_follower(&batches, &[], now_ms);
        match self.explained(result, "append as a follower") {
            Some(()) => self.expected.append(planned, now_ms),
            None => self.perhaps(planned),
        }
    }

    /// A write that failed: the log is as before, or nobody knows before it is opened again.
    fn perhaps(&mut self, planned: Vec<Kept>) {
        if self.log().is_poisoned() || self.files.is_off() {
            self.expected.perhaps = planned;
        }
    }

    fn flush(&mut self) {
        let result = self.log().flush();
        trace!(self, "flush");
        if let Some(flushed) = self.explained(result, "flush") {
            assert_eq!(flushed, self.expected.end);
            self.behind = self.full || self.faulty;
        }
        if self.choices.one_in(2) {
            self.raise_watermark();
        }
    }

    fn raise_watermark(&mut self) {
        let flushed = self.log().flushed_offset();
        let at_least = self.high_watermark;
        let boundaries = self.expected.boundaries();
        let possible: Vec<i64> = boundaries.into_iter().filter(|at| (at_least..=flushed).contains(at)).collect();
        if !possible.is_empty() {
            self.high_watermark = self.choices.of(&possible);
        }
    }

    fn checkpoint(&mut self) {
        self.recovery_point = self.log().recovery_point();
        self.checkpointed_start = self.log().log_start_offset();
        trace!(self, "checkpoint {} {}", self.recovery_point, self.checkpointed_start);
        assert!(self.recovery_point <= self.expected.end);
    }

    /// Reads from an offset on, in pieces, to a boundary.
    fn read_somewhere(&mut self) {
        let (start, end) = (self.expected.log_start, self.expected.end);
        let reader = self.reader();
        for outside in [start - 1, end + 1] {
            assert!(matches!(reader.seek(outside), Err(ReadError::OutOfRange(_))));
        }
        let from = self.choices.between(start, end);
        let possible: Vec<i64> = self.expected.boundaries().into_iter().filter(|at| *at >= from).collect();
        let below = self.choices.of(&possible);
        let piece = self.choices.of(&[7, 61, 500, 5_000, 1 << 20]);
        trace!(self, "read from {from} below {below} in pieces of {piece}");
        self.read(&reader, from, below, piece);
    }

    fn read(&mut self, reader: &LogReader, from: i64, below: i64, piece: usize) {
        let result = (|| {
            let mut cursor = reader.seek(from)?;
            let mut bytes = Vec::new();
            while let Some(slice) = reader.read(&mut cursor, piece, below)? {
                slice.load()?;
                assert!(!slice.is_empty() && slice.len() <= piece, "{} bytes", slice.len());
                let read = slice.bytes();
                if read.len() < slice.len() {
                    // Only a simulated map can fail so late.
                    return Ok(None);
                }
                bytes.extend_from_slice(&read);
            }
            Ok::<_, ReadError>(Some(bytes))
        })();
        match self.explained(result, "read") {
            Some(Some(bytes)) => assert_same(&bytes, &self.expected.bytes(from, below), from, below),
            Some(None) => assert!(self.faulty || self.files.is_off()),
            None => {}
        }
    }

    /// Lets a reader that was begun earlier, or one that begins now, read on up to the high watermark.
    fn follow(&mut self) {
        let reader = self.reader();
        let (start, watermark) = (self.expected.log_start, self.high_watermark);
        if start > watermark {
            return;
        }
        if self.followers.len() < 3 {
            let from = self.choices.between(start, watermark);
            let result = reader.seek(from);
            let Some(cursor) = self.explained(result, "seek") else { return };
            let holds = self.expected.live().iter().find(|batch| batch.header.last_offset() >= from);
            let offset = holds.map_or(from, |batch| batch.header.base_offset);
            self.followers.push(Follower { cursor, from, offset, within: 0 });
        }
        let number = self.choices.below(self.followers.len());
        let mut follower = self.followers.swap_remove(number);
        for _ in 0..self.choices.of(&[1, 3, 10]) {
            let piece = self.choices.of(&[7, 61, 500, 5_000, 1 << 20]);
            let slice = match reader.read(&mut follower.cursor, piece, watermark) {
                Ok(slice) => slice,
                Err(ReadError::OutOfRange(_)) if follower.offset < start => return,
                Err(error) => {
                    self.explained(Err::<(), _>(error), "read on");
                    return;
                }
            };
            let all = self.expected.bytes(follower.offset, watermark);
            let rest = all.get(follower.within..).unwrap_or_default();
            let Some(slice) = slice else {
                assert!(rest.is_empty(), "nothing from {} below {watermark}", follower.offset);
                break;
            };
            let bytes = slice.bytes();
            if bytes.is_empty() {
                assert!(self.faulty || self.files.is_off());
                return;
            }
            assert!(rest.starts_with(&bytes), "other bytes from {} + {} on", follower.offset, follower.within);
            follower.within += bytes.len();
            let first = self.expected.batches.partition_point(|batch| batch.header.base_offset < follower.offset);
            for batch in &self.expected.batches[first..] {
                if follower.within < batch.bytes.len() {
                    break;
                }
                follower.within -= batch.bytes.len();
                follower.offset = batch.header.next_offset();
            }
            let next_offset = slice.next_offset();
            if let Some(next_offset) = self.explained(next_offset, "next offset") {
                assert_eq!(next_offset, follower.offset.max(follower.from));
            }
        }
        self.followers.push(follower);
    }

    fn look_up_timestamps(&mut self) {
        let reader = self.reader();
        let below = self.choices.of(&self.expected.boundaries());
        let timestamp = match self.expected.batches.len() {
            0 => self.now_ms,
            count => {
                let batch = self.choices.below(count);
                self.expected.batches[batch].header.max_timestamp + self.choices.between(-2, 2)
            }
        };
        trace!(self, "look up {timestamp} below {below}");
        let right = self.expected.records(below).find(|(_, at, _)| *at >= timestamp);
        let result = reader.offset_for_timestamp(timestamp, below);
        if let Some(found) = self.explained(result, "look up a timestamp") {
            let found = found.map(|found| (found.offset, found.timestamp, found.leader_epoch));
            assert_eq!(found, right, "first at or after {timestamp}");
        }
        let largest = self.expected.records(below).map(|(_, at, _)| at).max();
        let right = self.expected.records(below).find(|(_, at, _)| Some(*at) == largest);
        let result = reader.offset_for_max_timestamp(below);
        if let Some(found) = self.explained(result, "look up the largest timestamp") {
            let found = found.map(|found| (found.offset, found.timestamp, found.leader_epoch));
            assert_eq!(found, right, "largest below {below}");
        }
    }

    fn truncate(&mut self) {
        let boundaries = self.expected.boundaries();
        let to = boundaries[boundaries.len() - 1 - self.choices.below(boundaries.len().min(20))];
        trace!(self, "truncate to {to}");
        self.recovery_point = self.recovery_point.min(to);
        if to < self.high_watermark {
            // Readers were shown what goes.
            self.followers.clear();
            self.high_watermark = to;
        }
        let now_ms = self.now_ms;
        let result = self.log().truncate(to, now_ms);
        let cut = self.explained(result, "truncate").is_some();
        if cut {
            self.expected.truncate(to, now_ms);
            self.forget_deleted();
        } else if self.log().is_poisoned() || self.files.is_off() {
            self.expected.perhaps = self.expected.truncate(to, now_ms);
            self.cutting = true;
        }
    }

    fn delete_records(&mut self) {
        let watermark = self.high_watermark;
        let before = self.choices.between(self.expected.log_start, watermark.max(self.expected.log_start));
        let now_ms = self.now_ms;
        trace!(self, "delete records before {before}");
        if self.expected.end > watermark {
            assert!(self.log().delete_records(watermark + 1, watermark, now_ms).is_err());
        }
        self.expected.log_start_most = before;
        let result = self.log().delete_records(before, watermark, now_ms);
        if let Some(start) = self.explained(result, "delete records") {
            assert_eq!(start, before);
        }
        self.log_start_moved();
    }

    fn enforce_retention(&mut self) {
        let watermark = self.high_watermark;
        let (now_ms, old) = (self.now_ms, self.expected.log_start);
        self.expected.log_start_most = watermark.max(old);
        let result = self.log().enforce_retention(now_ms, watermark);
        trace!(self, "enforce retention: {result:?}");
        let done = self.explained(result, "enforce retention");
        let start = self.log().log_start_offset();
        if let Some(moved) = done {
            assert_eq!(moved.unwrap_or(old), start);
        }
        assert!(start == old || self.expected.boundaries().contains(&start));
        let (gone, kept): (Vec<&Kept>, Vec<&Kept>) =
            self.expected.live().iter().partition(|batch| batch.header.last_offset() < start);
        let kept_bytes: usize = kept.iter().map(|batch| batch.bytes.len()).sum();
        let by_size = self.config.retention_bytes.is_some_and(|bytes| kept_bytes as u64 >= bytes);
        for batch in gone {
            let newest = batch.header.max_timestamp.max(batch.appended_ms);
            let by_time = self.config.retention_ms.is_some_and(|ms| now_ms - newest > ms as i64);
            assert!(by_size || by_time, "{:?} went too early", batch.header);
        }
        self.log_start_moved();
    }

    fn log_start_moved(&mut self) {
        let (start, most) = (self.log().log_start_offset(), self.expected.log_start_most);
        assert!((self.expected.log_start..=most).contains(&start), "{start}");
        self.expected.log_start = start;
        self.deleted_to = self.deleted_to.max(start);
        if !self.files.is_off() {
            self.expected.log_start_most = start;
            if !self.choices.one_in(4) {
                self.checkpointed_start = start;
            }
        }
    }

    fn restart_elsewhere(&mut self) {
        let to = self.expected.end + self.choices.between(0, 1_000);
        trace!(self, "restart at {to}");
        let before = std::mem::replace(&mut self.checkpointed_start, to);
        self.recovery_point = self.recovery_point.min(to);
        self.followers.clear();
        let now_ms = self.now_ms;
        let result = self.log().truncate_and_restart_at(to, now_ms);
        let done = self.explained(result, "restart elsewhere").is_some();
        if !done && !self.log().is_poisoned() && !self.files.is_off() {
            // It was refused, and whoever asked takes back what was written down for it.
            self.checkpointed_start = before;
        } else {
            let mut expired = std::mem::take(&mut self.expected.expired);
            expired.extend(self.expected.producers.keys());
            let log_start_most = to;
            self.expected =
                Expected { log_start: to, log_start_most, end: to, flushed: to, expired, ..Expected::default() };
            self.sent.clear();
            self.high_watermark = to;
        }
    }

    fn change_config(&mut self) {
        self.config = self.some_config();
        trace!(self, "{:?}", self.config);
        let config = self.config.clone();
        self.log().set_config(config);
    }

    fn bump_epoch(&mut self) {
        self.epoch += self.choices.between(1, 2) as i32;
        trace!(self, "leader epoch {}", self.epoch);
        if self.choices.one_in(2) {
            let epoch = self.epoch;
            self.log().assign_leader_epoch(epoch);
        }
    }

    fn pass_time(&mut self) {
        self.now_ms += self.choices.of(&[1_000, 6_000, 30_000, 2_000_000]);
        trace!(self, "time passes");
        self.files.set_clock_ms(self.now_ms);
        let now_ms = self.now_ms;
        let result = self.log().roll_if_due(now_ms);
        self.explained(result, "roll");
    }

    fn expire_producers(&mut self) {
        trace!(self, "expire producers");
        let now_ms = self.now_ms;
        self.log().expire_producers(now_ms);
        let after_ms = self.config.producer_id_expiration_ms as i64;
        let stale = self.expected.producers.iter().filter(|(_, known)| now_ms - known.active_ms >= after_ms);
        let stale: Vec<i64> = stale.map(|(id, _)| *id).collect();
        for id in stale {
            if !self.expected.expired.contains(&id) {
                assert_eq!(self.log().last_sequence(id), None, "producer {id}");
                self.expected.expired.push(id);
            }
        }
        self.forget_expired();
    }

    /// A disk that is full when a segment is sealed, and when it is deleted, has no room for what it knew of producers: those whose
    /// batches are gone may be forgotten.
    fn forget_deleted(&mut self) {
        let start = self.expected.log_start;
        let log = self.log.as_ref().unwrap();
        let is_forgotten = |(id, known): &(&i64, &expected::KnownProducer)| {
            let deleted = known.batches.last().filter(|last| last.3 < start);
            deleted.is_some_and(|last| log.last_sequence(**id).is_none_or(|found| found.offset < last.3))
        };
        let forgotten: Vec<i64> = self.expected.producers.iter().filter(is_forgotten).map(|(id, _)| *id).collect();
        for id in forgotten {
            assert!(self.was_troubled || self.expected.expired.contains(&id), "producer {id} was forgotten");
            self.expected.expired.push(id);
        }
        self.forget_expired();
    }

    /// A producer that the log forgot sends nothing more.
    fn forget_expired(&mut self) {
        let expired = self.expected.expired.clone();
        self.sent.retain(|batch| !expired.contains(&batch.header.producer_id));
    }

    /// Closes the log in good order; whatever happens to the machine then, it opens as it was.
    fn close(&mut self) {
        trace!(self, "close");
        let log = self.log.take().unwrap();
        let reader = log.reader();
        let (rolled, end) = (log.flushed_offset(), log.log_end_offset());
        let result = log.close();
        self.claim_flushed(rolled);
        if self.explained(result, "close").is_none() {
            return;
        }
        assert!(matches!(reader.seek(end), Err(ReadError::Closed)));
        self.claim_flushed(end);
        (self.recovery_point, self.checkpointed_start) = (end, self.expected.log_start);
        if !self.faulty {
            self.verify_files();
        }
        let how = self.choices.of(&[End::Dropped, End::Killed, End::Crashed]);
        self.reopen(how, true);
    }

    /// What is closed must pass `segment verify`.
    fn verify_files(&self) {
        if self.files.is_off() {
            return;
        }
        let files: Arc<dyn Files> = self.files.clone();
        let target = inspect::Target::open(files, Path::new(DIR));
        let report = match target.and_then(|target| inspect::verify(&target, &|_| {})) {
            Ok(report) => report,
            Err(error) => return assert!(self.files.is_off(), "{error}"),
        };
        assert!(report.faults.is_empty(), "{report:#?}");
    }

    fn end_process(&mut self) {
        let how = self.choices.of(&[End::Dropped, End::Killed]);
        self.reopen(how, false);
    }

    fn fail_something(&mut self) {
        use Operation::{CreateDir, Open, Read, Remove, Rename, Reserve, SetLen, Sync, SyncDir, Write};
        let all = [Open, Read, Write, Reserve, SetLen, Sync, Rename, Remove, CreateDir, SyncDir, Write, Sync, Read];
        let operation = self.choices.of(&all);
        let path = self.choices.of(&["", "", ".log", ".index", ".crc", ".snapshot", "leader-epoch"]);
        let after = self.choices.below(4) as u64;
        trace!(self, "{operation:?} of {path:?} fails, after {after} more");
        self.files.fail(Fault::new(operation).on(path).after(after).times(1));
        (self.faulty, self.behind, self.was_troubled) = (true, true, true);
    }

    fn fill_disk(&mut self) {
        let left = self.choices.of(&[0, 4_096, 20_000, 70_000]);
        trace!(self, "{left} bytes of room are left");
        self.files.set_capacity(Some(self.files.used_bytes() + left));
        (self.full, self.behind, self.was_troubled) = (true, true, true);
    }

    fn heal(&mut self) {
        trace!(self, "all is well");
        self.files.heal();
        self.files.set_capacity(None);
        (self.faulty, self.full) = (false, false);
    }

    /// After an operation: a log that was poisoned, closed or cut off from its disk is opened again.
    fn settle(&mut self) {
        if self.files.is_off() {
            let how = self.choices.of(&[End::Crashed, End::Crashed, End::Killed]);
            self.reopen(how, false);
        } else if self.log.as_ref().is_none_or(Log::is_poisoned) {
            let how = self.choices.of(&[End::Dropped, End::Killed, End::Crashed]);
            self.reopen(how, false);
        }
    }

    fn claim_flushed(&mut self, flushed: i64) {
        assert!(
            flushed
                <= self.expected.end
                    + self.expected.perhaps.iter().map(|batch| batch.records.len() as i64).sum::<i64>()
        );
        self.expected.flushed = self.expected.flushed.max(flushed);
    }

    fn reopen(&mut self, how: End, clean: bool) {
        if let Some(log) = self.log.take() {
            // What it said was flushed, even within an operation that failed, must be there.
            if !std::mem::take(&mut self.cutting) {
                self.claim_flushed(log.flushed_offset());
            }
        }
        match how {
            End::Dropped => {}
            End::Killed => self.files = self.files.restart(),
            End::Crashed => self.files = self.files.crash(),
        }
        if how != End::Dropped {
            self.faulty = false;
        }
        self.open(how, clean);
    }

    fn open(&mut self, mut how: End, clean: bool) {
        self.followers.clear();
        loop {
            if self.choices.one_in(8) {
                self.files.power_off_after(self.choices.below(20) as u64);
            }
            let recovery_point = if self.choices.one_in(8) && !clean { 0 } else { self.recovery_point };
            let log_start_offset = self.checkpointed_start;
            let hints = OpenHints { clean_shutdown: clean, recovery_point, log_start_offset };
            trace!(self, "{how:?}; open with {hints:?}");
            let files: Arc<dyn Files> = self.files.clone();
            let opened = Log::open(files, Path::new(DIR), identity(), self.config.clone(), hints, self.now_ms);
            if let Some((log, report)) = self.explained(opened, "open") {
                let (start, end) = (log.log_start_offset(), log.log_end_offset());
                trace!(self, "it holds {start} to {end}, {:?}", report.cut);
                // Checksums that found no room, or a bad block, are half written.
                assert!(self.was_troubled || report.crc_disagreements.is_empty(), "{report:?}");
                let epochs = report.rebuilt.iter().find(|path| path.ends_with(epochs::FILE_NAME));
                assert_eq!(epochs, None, "nobody damaged it");
                if how != End::Crashed {
                    assert!(end >= self.expected.end, "{end} of {}: no power was lost", self.expected.end);
                }
                if clean {
                    assert_eq!((start, end), (self.expected.log_start, self.expected.end));
                    assert_eq!((report.cut, report.rebuilt), (None, Vec::new()));
                }
                self.expected.reopened(start, end, self.checkpointed_start, self.now_ms);
                // Leader epochs, and what a sync failed of, may have to be written before it counts.
                let flushed = log.flushed_offset();
                assert!(flushed == end || self.full, "{flushed} of {end}, and there is room");
                self.expected.flushed = flushed;
                self.log = Some(log);
                self.high_watermark = self.high_watermark.clamp(start, end);
                break;
            }
            if self.files.is_off() {
                self.files = self.files.crash();
                how = End::Crashed;
                self.faulty = false;
            } else {
                self.heal();
            }
        }
        self.forget_deleted();
        let reader = self.reader();
        self.read(&reader, self.expected.log_start, self.expected.end, 1 << 20);
    }

    /// What must hold at any time.
    fn check(&mut self) {
        let log = self.log.as_ref().unwrap();
        let reader = log.reader();
        let expected = &self.expected;
        assert_eq!((log.log_start_offset(), log.log_end_offset()), (expected.log_start, expected.end));
        assert_eq!((reader.log_start_offset(), reader.log_end_offset()), (expected.log_start, expected.end));
        assert!((expected.flushed..=expected.end).contains(&log.flushed_offset()), "{}", log.flushed_offset());
        assert_eq!(reader.flushed_offset(), log.flushed_offset());
        // Retention may go beyond what was flushed before a log was opened on a full disk.
        let gone = log.flushed_offset() <= expected.log_start;
        assert!(gone || expected.boundaries().contains(&log.flushed_offset()));
        let bytes: usize = expected.live().iter().map(|batch| batch.bytes.len()).sum();
        assert!(log.size_bytes() >= bytes as u64 && log.size_bytes() == reader.size_bytes());
        let unflushed: usize = expected
            .live()
            .iter()
            .filter(|batch| batch.header.base_offset >= log.flushed_offset())
            .map(|batch| batch.bytes.len())
            .sum();
        let largest = expected.live().iter().map(|batch| batch.bytes.len()).max().unwrap_or(0);
        // While leader epochs cannot be written, what is flushed does not count as flushed.
        assert!(
            self.behind || unflushed as u64 <= self.config.unflushed_limit_bytes.max(largest as u64),
            "{unflushed} unflushed"
        );
        for batch in expected.live().iter().rev().take(3) {
            let offset = batch.header.last_offset();
            if offset < self.deleted_to {
                continue;
            }
            assert_eq!(reader.epoch_at(offset), Some(batch.header.leader_epoch), "of offset {offset}");
        }
        for (id, known) in &expected.producers {
            if expected.expired.contains(id) {
                continue;
            }
            let last =
                known.batches.last().map(|last| LastSequence { epoch: known.epoch, sequence: last.1, offset: last.3 });
            assert_eq!(log.last_sequence(*id), last, "producer {id}");
        }
        let flushed = log.flushed_offset();
        self.claim_flushed(flushed);
    }
}

fn assert_same(read: &[u8], right: &[u8], from: i64, below: i64) {
    if read != right {
        let offsets = |bytes: &[u8]| {
            let headers = batch::Batches::new(bytes).map(|item| match item {
                Ok((_, header, _)) => format!("{}..{}", header.base_offset, header.next_offset()),
                Err((position, error)) => format!("{position}: {error}"),
            });
            headers.collect::<Vec<_>>().join(" ")
        };
        panic!("from {from} below {below} the log has\n{}\nand should have\n{}", offsets(read), offsets(right));
    }
}
