//! `segment dump`: every batch of a segment or partition, damaged ones too.
//!
//! Owns: what is told about a batch, with the field names that the command's JSON has. Refuses: rendering records (they come along
//! decoded). Read next: `scan.rs`.

use std::collections::VecDeque;

use headwater_proto::batch::{BatchHeader, Record, Records};
use serde::Serialize;

use super::scan::{Damage, FoundBatch, Item, Scanner};
use super::{InspectError, SegmentFile, Target, at};
use crate::epochs::LeaderEpochs;

/// What to dump.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpOptions {
    /// Decode the records too.
    pub records: bool,
    /// Leave out batches that end before this offset.
    pub from_offset: Option<i64>,
}

/// A batch as it lies in its file. Of a damaged one, the fields that stand where its header should be, true or not.
#[derive(Debug, Clone, Serialize)]
pub struct DumpedBatch {
    /// The file's name.
    pub file: String,
    /// Offset of its first record.
    pub base_offset: i64,
    /// Offset of its last record, kept even when compaction removed that record.
    pub last_offset: i64,
    /// Number of records.
    pub count: i32,
    /// Sequence of its first record; -1 without an idempotent producer.
    pub base_sequence: i32,
    /// The producer; -1 for none.
    pub producer_id: i64,
    /// The producer's epoch; -1 for none.
    pub producer_epoch: i16,
    /// Epoch of the leader that appended it.
    pub leader_epoch: i32,
    /// Part of a transaction.
    pub transactional: bool,
    /// Holds control records.
    pub control: bool,
    /// When its tombstones may be removed, in milliseconds since 1970; only where compaction has set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delete_horizon_ms: Option<i64>,
    /// Byte of the file where it begins.
    pub position: u64,
    /// `create` or `append`.
    pub timestamp_type: &'static str,
    /// Its largest timestamp, in milliseconds since 1970.
    pub max_timestamp: i64,
    /// Its bytes; of damage, the bytes passed over.
    pub size: u64,
    /// Name of its compression.
    pub codec: &'static str,
    /// The checksum in its header.
    pub crc: u32,
    /// Whole and in its place.
    pub valid: bool,
    /// What is wrong, when it is not valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Its records, if they were asked for.
    #[serde(skip)]
    pub records: Vec<Record>,
}

/// The batches of a target, in order. After an error there is nothing more.
pub struct Dump<'a> {
    target: &'a Target,
    options: DumpOptions,
    epochs: Option<LeaderEpochs>,
    segments: VecDeque<SegmentFile>,
    /// Batches of the segment being read, which is named first.
    current: Option<(SegmentFile, Scanner)>,
    previous: Option<BatchHeader>,
}

/// Dumps a target.
pub fn dump(target: &Target, options: DumpOptions) -> Dump<'_> {
    let from = options.from_offset.unwrap_or(i64::MIN);
    let wanted = |segment: &&SegmentFile| segment.next_base_offset.is_none_or(|next| next > from);
    let segments = target.segments.iter().filter(wanted).cloned().collect();
    Dump { target, options, epochs: target.leader_epochs(), segments, current: None, previous: None }
}

impl Dump<'_> {
    fn advance(&mut self) -> Result<Option<DumpedBatch>, InspectError> {
        loop {
            let Some((segment, scanner)) = &mut self.current else {
                let Some(segment) = self.segments.pop_front() else { return Ok(None) };
                self.current =
                    self.target.scan(&segment, self.epochs.clone(), self.previous)?.map(|scanner| (segment, scanner));
                continue;
            };
            let item = scanner.next().map_err(at(&segment.path))?;
            let dumped = match item {
                Some(Item::Batch(found)) => of_batch(segment, found, self.options.records),
                Some(Item::Damage(damage)) => of_damage(segment, damage),
                Some(Item::Tail(_)) => continue,
                None => {
                    self.previous = scanner.previous();
                    self.current = None;
                    continue;
                }
            };
            // What is damaged is told in any case: its offsets cannot be relied on.
            if !dumped.valid || self.options.from_offset.is_none_or(|from| dumped.last_offset >= from) {
                return Ok(Some(dumped));
            }
        }
    }
}

impl Iterator for Dump<'_> {
    type Item = Result<DumpedBatch, InspectError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.current = None;
            self.segments.clear();
        }
        next.transpose()
    }
}

fn of_batch(segment: &SegmentFile, found: FoundBatch, with_records: bool) -> DumpedBatch {
    let mut dumped = of_header(segment, &found.header, found.position, found.bytes.len() as u64);
    dumped.valid = true;
    if with_records {
        match Records::new(&found.bytes).and_then(|records| records.collect()) {
            Ok(records) => dumped.records = records,
            Err(error) => {
                dumped.valid = false;
                dumped.detail = Some(error.to_string());
            }
        }
    }
    dumped
}

fn of_damage(segment: &SegmentFile, damage: Damage) -> DumpedBatch {
    let header = damage.header.unwrap_or(BatchHeader {
        base_offset: damage.expected_offset,
        batch_length: 0,
        leader_epoch: -1,
        magic: 0,
        crc: 0,
        attributes: 0,
        last_offset_delta: 0,
        base_timestamp: -1,
        max_timestamp: -1,
        producer_id: -1,
        producer_epoch: -1,
        base_sequence: -1,
        record_count: 0,
    });
    let mut dumped = of_header(segment, &header, damage.position, damage.size);
    dumped.detail = Some(damage.detail);
    dumped
}

fn of_header(segment: &SegmentFile, header: &BatchHeader, position: u64, size: u64) -> DumpedBatch {
    DumpedBatch {
        file: segment.name(),
        base_offset: header.base_offset,
        last_offset: header.base_offset.saturating_add(i64::from(header.last_offset_delta)),
        count: header.record_count,
        base_sequence: header.base_sequence,
        producer_id: header.producer_id,
        producer_epoch: header.producer_epoch,
        leader_epoch: header.leader_epoch,
        transactional: header.is_transactional(),
        control: header.is_control(),
        delete_horizon_ms: header.delete_horizon_ms(),
        position,
        timestamp_type: header.timestamp_type().name(),
        max_timestamp: header.max_timestamp,
        size,
        codec: header.codec().map_or("unknown", |codec| codec.name()),
        crc: header.crc,
        valid: false,
        detail: None,
        records: Vec::new(),
    }
}
