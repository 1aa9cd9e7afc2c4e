//! What a log must hold: the model, a plain vector of batches. No files, and nothing of the log's own code but the batch format.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use headwater_proto::batch::{BatchHeader, HEADER_BYTES, Records, TimestampType};
use headwater_storage::{BatchOutcome, NewBatch, SequenceError};

/// A batch as it is in the log.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) header: BatchHeader,
    pub(crate) bytes: Bytes,
    /// Offset and timestamp of every record.
    pub(crate) records: Vec<(i64, i64)>,
    pub(crate) appended_ms: i64,
}

impl Kept {
    /// What a leader makes of a batch: its offset, its epoch, and its time where the topic says so.
    pub(crate) fn new(batch: &NewBatch, base_offset: i64, epoch: i32, timestamps: TimestampType, now_ms: i64) -> Kept {
        let body = batch.bytes.slice(HEADER_BYTES..);
        let mut header = BatchHeader { base_offset, leader_epoch: epoch, ..batch.header };
        if timestamps == TimestampType::LogAppend {
            header = header.with_log_append_time(now_ms, &body);
        }
        let mut bytes = BytesMut::from(&header.encode()[..]);
        bytes.extend_from_slice(&body);
        let bytes = bytes.freeze();
        let records = Records::new(&bytes).unwrap().map(|record| record.unwrap());
        let records = records.map(|record| (record.offset, record.timestamp)).collect();
        Kept { header, bytes, records, appended_ms: now_ms }
    }
}

/// A producer as the log must know it: its epoch, and its batches of that epoch as (first sequence, last sequence, first offset, last
/// offset), the oldest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct KnownProducer {
    pub(crate) epoch: i16,
    pub(crate) batches: Vec<(i32, i32, i64, i64)>,
    pub(crate) active_ms: i64,
}

/// Producers by id.
pub(crate) type Producers = BTreeMap<i64, KnownProducer>;

/// How many batches of a producer a log must recognise.
const REMEMBERED: usize = 5;

/// What must become of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Append,
    Duplicate { base_offset: i64, last_offset: i64 },
    OldEpoch,
    OutOfOrder,
    Unknown,
}

fn sequence_after(sequence: i32) -> i32 {
    sequence.checked_add(1).unwrap_or(0)
}

/// Decides on a batch whose header has the offsets that it would get.
pub(crate) fn decide(producers: &Producers, header: &BatchHeader) -> Verdict {
    if header.producer_id < 0 {
        return Verdict::Append;
    }
    let starts_anew = header.base_sequence == 0;
    let Some(known) = producers.get(&header.producer_id) else {
        return if starts_anew { Verdict::Append } else { Verdict::Unknown };
    };
    if header.producer_epoch < known.epoch {
        return Verdict::OldEpoch;
    }
    if header.producer_epoch > known.epoch {
        return if starts_anew { Verdict::Append } else { Verdict::OutOfOrder };
    }
    let sequences = (header.base_sequence, header.last_sequence());
    let last = known.batches.last().map_or(-1, |last| last.1);
    if header.base_sequence == sequence_after(last) {
        return Verdict::Append;
    }
    let recent = known.batches.iter().rev().take(REMEMBERED);
    match recent.clone().find(|batch| (batch.0, batch.1) == sequences) {
        Some(&(_, _, base_offset, last_offset)) => Verdict::Duplicate { base_offset, last_offset },
        None => Verdict::OutOfOrder,
    }
}

/// Takes note of a batch that is in the log.
pub(crate) fn note(producers: &mut Producers, header: &BatchHeader, now_ms: i64) {
    if header.producer_id < 0 {
        return;
    }
    let known = producers.entry(header.producer_id).or_default();
    if known.epoch != header.producer_epoch {
        *known = KnownProducer { epoch: header.producer_epoch, ..KnownProducer::default() };
    }
    known.active_ms = now_ms;
    known.batches.push((header.base_sequence, header.last_sequence(), header.base_offset, header.last_offset()));
}

/// Everything that a log must hold, and what it may.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// Every batch that was appended and not truncated, in the order of offsets; those that were deleted from the beginning too.
    pub(crate) batches: Vec<Kept>,
    /// What an operation that was interrupted may have left behind these, or not: any number of them, from the first on.
    pub(crate) perhaps: Vec<Kept>,
    pub(crate) log_start: i64,
    /// How far an operation that was interrupted may have moved the log start.
    pub(crate) log_start_most: i64,
    pub(crate) end: i64,
    pub(crate) flushed: i64,
    pub(crate) producers: Producers,
    /// Producers that were forgotten, and come back if the log is read anew.
    pub(crate) expired: Vec<i64>,
}

impl Expected {
    /// The batches that are in the log: from the one that holds the log start on.
    pub(crate) fn live(&self) -> &[Kept] {
        let first = self.batches.partition_point(|batch| batch.header.last_offset() < self.log_start);
        &self.batches[first..]
    }

    /// Where a batch begins or the log ends.
    pub(crate) fn boundaries(&self) -> Vec<i64> {
        let begins = self.live().iter().map(|batch| batch.header.base_offset);
        begins.filter(|at| *at >= self.log_start).chain([self.end]).collect()
    }

    /// The bytes of whole batches from the one that holds `from` on, up to the boundary `below`.
    pub(crate) fn bytes(&self, from: i64, below: i64) -> Vec<u8> {
        let wanted = |batch: &&Kept| batch.header.last_offset() >= from && batch.header.base_offset < below;
        self.batches.iter().filter(wanted).flat_map(|batch| batch.bytes.iter().copied()).collect()
    }

    /// The records below `below`: offset, timestamp, leader epoch.
    pub(crate) fn records(&self, below: i64) -> impl Iterator<Item = (i64, i64, i32)> + '_ {
        let records = self.live().iter().flat_map(|batch| {
            batch.records.iter().map(|(offset, timestamp)| (*offset, *timestamp, batch.header.leader_epoch))
        });
        records.filter(move |(offset, ..)| *offset >= self.log_start && *offset < below)
    }

    /// Takes batches into the log.
    pub(crate) fn append(&mut self, batches: Vec<Kept>, now_ms: i64) {
        for batch in batches {
            note(&mut self.producers, &batch.header, now_ms);
            self.end = batch.header.next_offset();
            self.batches.push(batch);
        }
    }

    /// Cuts everything from `to` on. What was cut is returned.
    pub(crate) fn truncate(&mut self, to: i64, now_ms: i64) -> Vec<Kept> {
        if to >= self.end {
            return Vec::new();
        }
        let first = self.batches.partition_point(|batch| batch.header.last_offset() < to);
        let cut = self.batches.split_off(first);
        self.end = to;
        self.flushed = self.flushed.min(to);
        self.relearn(now_ms);
        cut
    }

    /// Whether the verdict on a batch explains what the log answered.
    pub(crate) fn explains(&self, verdict: Verdict, outcome: &BatchOutcome, base_offset: i64) -> bool {
        use SequenceError::{DuplicateTooOld, OldEpoch, OutOfOrder, UnknownProducer};
        match (verdict, outcome) {
            (Verdict::Append, BatchOutcome::Appended { base_offset: given, .. }) => *given == base_offset,
            (
                Verdict::Duplicate { base_offset, last_offset },
                BatchOutcome::Duplicate { base_offset: base, last_offset: last },
            ) => (base_offset, last_offset) == (*base, *last),
            // Its original was deleted: the log may remember it, and need not.
            (Verdict::Duplicate { base_offset, .. }, BatchOutcome::Refused(DuplicateTooOld { oldest_known, .. })) => {
                // Sequences that begin again at 0 within fewer offsets than there are sequences are made up here.
                base_offset < self.log_start || *oldest_known == 0
            }
            (Verdict::OldEpoch, BatchOutcome::Refused(OldEpoch { .. })) => true,
            (Verdict::OutOfOrder, BatchOutcome::Refused(OutOfOrder { .. } | DuplicateTooOld { .. })) => true,
            (Verdict::Unknown, BatchOutcome::Refused(UnknownProducer { .. })) => true,
            _ => false,
        }
    }

    /// The log was opened, and holds what it holds from `log_start` up to `end`: that must be possible. What was possible and is
    /// not so is forgotten.
    pub(crate) fn reopened(&mut self, log_start: i64, end: i64, checkpointed_start: i64, now_ms: i64) {
        let at_least = checkpointed_start.min(self.log_start_most);
        assert!(log_start >= at_least, "the log start fell to {log_start}, though {at_least} was on the disk");
        assert!(
            log_start <= self.log_start_most,
            "the log begins at {log_start}, nobody asked for more than {}",
            self.log_start_most
        );
        assert!(end >= self.flushed, "the log ends at {end}: offsets up to {} were flushed", self.flushed);
        let perhaps = std::mem::take(&mut self.perhaps);
        self.batches.extend(perhaps.into_iter().filter(|batch| batch.header.last_offset() < end));
        let held_end = self.batches.last().map_or(end, |batch| batch.header.next_offset());
        if end > self.end {
            assert_eq!(end, held_end, "the log holds what nobody appended");
        }
        self.batches.retain(|batch| batch.header.last_offset() < end);
        if let Some(last) = self.batches.last() {
            assert!(last.header.next_offset() == end || log_start == end, "the log ends at {end}, within a batch");
        }
        (self.log_start, self.log_start_most, self.end, self.flushed) = (log_start, log_start, end, end);
        self.relearn(now_ms);
    }

    /// Learns the producers from the batches again.
    fn relearn(&mut self, now_ms: i64) {
        self.producers.clear();
        let batches = std::mem::take(&mut self.batches);
        batches.iter().for_each(|batch| note(&mut self.producers, &batch.header, now_ms));
        self.batches = batches;
    }
}
