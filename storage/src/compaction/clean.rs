//! What compaction keeps of a log.
//!
//! Owns: the two passes over the segments: where the last value of each key is, and which records stay. Refuses: to change the log; what
//! is kept goes to new files. Read next: `swap.rs`.
//!
//! A record stays if it is the last of its key, or lies beyond the keys that were looked at. A tombstone stays until its batch's
//! delete horizon has passed, which is set when compaction first sees it. Batches keep base offset, last offset delta and sequences. Even
//! when nothing of it stays, a batch is kept (empty) if it is the last of a producer that may go on, the first of a leader epoch that
//! comes after another (whoever copies the log learns from its batches where epochs begin, and cuts by that), or the last of what was
//! looked at.
//! Control batches stay. Records of aborted transactions go, and count for nothing; those of transactions that have not ended
//! stay, and count for nothing either.

use std::collections::HashMap;

use bytes::Bytes;
use headwater_proto::batch::{self, BatchError, BatchHeader, Record, Records, rebuild};

use super::keys::LastOffsets;
use super::{CompactionError, CompactionPlan, CompactionStats};
use crate::error::{Corruption, During, IoFailure};
use crate::files;
use crate::reader::SegmentEntry;
use crate::rewrite::SegmentWriter;
use crate::segment::Opened;
use crate::transactions::{self, AbortedTransaction};

/// Read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Which transactions of the log count.
#[derive(Debug, Default)]
pub(super) struct Transactions {
    /// First and last offsets of aborted ones, by producer.
    aborted: HashMap<i64, Vec<(i64, i64)>>,
    /// First offsets of those that have not ended, by producer.
    pub(super) open: HashMap<i64, i64>,
}

/// What a batch is to compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Its records count.
    Counts,
    /// It is kept as it is, and counts for nothing.
    Untouched,
    /// Its records are gone.
    Aborted,
}

impl Transactions {
    pub(super) fn add_aborted(&mut self, aborted: &[AbortedTransaction]) {
        for transaction in aborted {
            let ranges = self.aborted.entry(transaction.producer_id).or_default();
            ranges.push((transaction.first_offset, transaction.last_offset));
        }
    }

    fn standing(&self, header: &BatchHeader) -> Standing {
        if header.is_control() {
            return Standing::Untouched;
        }
        if !header.is_transactional() {
            return Standing::Counts;
        }
        let (id, offset) = (header.producer_id, header.base_offset);
        let within = |(first, last): &(i64, i64)| (*first..=*last).contains(&offset);
        if self.aborted.get(&id).is_some_and(|ranges| ranges.iter().any(within)) {
            Standing::Aborted
        } else if self.open.get(&id).is_some_and(|first| offset >= *first) {
            Standing::Untouched
        } else {
            Standing::Counts
        }
    }
}

/// The keys of the part of the log that is not clean, and up to which offset they are known.
pub(super) struct KnownKeys {
    keys: LastOffsets,
    /// One after the last offset that was looked at.
    pub(super) end_offset: i64,
}

/// The first pass: notes the last offset of each key from `first_dirty` on.
pub(super) fn look(
    plan: &CompactionPlan,
    memory_bytes: usize,
    cancelled: &dyn Fn() -> bool,
) -> Result<KnownKeys, CompactionError> {
    let most = u64::try_from(plan.upper_bound - plan.first_dirty).unwrap_or(0);
    let mut known = KnownKeys { keys: LastOffsets::new(memory_bytes, most), end_offset: plan.first_dirty };
    for (number, entry) in plan.segments.iter().enumerate() {
        let next_base = plan.segments.get(number + 1).map_or(plan.upper_bound, SegmentEntry::base_offset);
        if next_base <= plan.first_dirty {
            continue;
        }
        let mut batches = BatchReader::new(entry)?;
        while let Some((header, bytes)) = batches.next(cancelled)? {
            if header.last_offset() < plan.first_dirty {
                continue;
            }
            if plan.transactions.standing(&header) == Standing::Counts {
                for record in batches.records(&header, &bytes)? {
                    let Some(key) = record.key.as_ref().filter(|_| record.offset >= plan.first_dirty) else { continue };
                    if !known.keys.put(key, record.offset) {
                        return Ok(known);
                    }
                }
            }
            known.end_offset = header.next_offset();
        }
        known.end_offset = next_base;
    }
    Ok(known)
}

/// The second pass over one segment: what stays of it goes to `writer`. Whether anything did not stay as it was.
pub(super) fn copy(
    plan: &CompactionPlan,
    known: &mut KnownKeys,
    entry: &SegmentEntry,
    writer: &mut SegmentWriter,
    stats: &mut CompactionStats,
    cancelled: &dyn Fn() -> bool,
) -> Result<bool, CompactionError> {
    let mut changed = false;
    let mut batches = BatchReader::new(entry)?;
    while let Some((header, bytes)) = batches.next(cancelled)? {
        stats.bytes_before += bytes.len() as u64;
        let standing = plan.transactions.standing(&header);
        let kept = match standing {
            Standing::Untouched => Some(bytes.clone()),
            Standing::Aborted => retain(plan, known, &header, &bytes, Vec::new())?,
            Standing::Counts => {
                let mut records = batches.records(&header, &bytes)?;
                stats.records_before += records.len() as u64;
                let before = records.len();
                records.retain(|record| stays(plan, known, &header, record));
                stats.records_after += records.len() as u64;
                if records.len() == before && before > 0 && !wants_horizon(known, &header, &records) {
                    Some(bytes.clone())
                } else {
                    retain(plan, known, &header, &bytes, records)?
                }
            }
        };
        changed |= kept.as_ref().is_none_or(|kept| *kept != bytes);
        if let Some(kept) = kept {
            let header = batch::check(&kept).map_err(|error| batches.corrupt(&header, &error))?;
            writer.append(&header, &kept)?;
        }
    }
    let path = entry.segment.path(transactions::EXTENSION);
    for transaction in transactions::decode(&plan.aborted_bytes(&path)?).0 {
        writer.append_aborted(&transaction);
    }
    Ok(changed)
}

fn stays(plan: &CompactionPlan, known: &mut KnownKeys, header: &BatchHeader, record: &Record) -> bool {
    if record.offset >= known.end_offset {
        return true;
    }
    // A record without a key can have no successor, and a compacted topic takes none: it was there before it was compacted.
    let Some(key) = &record.key else { return false };
    let superseded = known.keys.get(key).is_some_and(|last| last > record.offset);
    let expired = record.value.is_none() && header.delete_horizon_ms().is_some_and(|horizon| plan.now_ms >= horizon);
    !superseded && !expired
}

/// Whether a batch has tombstones whose time begins to run now.
fn wants_horizon(known: &KnownKeys, header: &BatchHeader, records: &[Record]) -> bool {
    header.delete_horizon_ms().is_none()
        && header.last_offset() < known.end_offset
        && records.iter().any(|record| record.value.is_none())
}

/// The batch with these of its records; `None` if nothing keeps it.
fn retain(
    plan: &CompactionPlan,
    known: &KnownKeys,
    header: &BatchHeader,
    bytes: &Bytes,
    records: Vec<Record>,
) -> Result<Option<Bytes>, CompactionError> {
    if records.is_empty() {
        let of_producer = plan.last_offsets.get(&header.producer_id) == Some(&header.last_offset());
        let begins_epoch = plan.epoch_starts.contains(&header.base_offset);
        if !of_producer && !begins_epoch && header.next_offset() != known.end_offset {
            return Ok(None);
        }
        if header.record_count == 0 {
            return Ok(Some(bytes.clone()));
        }
    }
    let horizon = wants_horizon(known, header, &records)
        .then(|| plan.now_ms.saturating_add(i64::try_from(plan.config.delete_retention_ms).unwrap_or(i64::MAX)));
    Ok(Some(rebuild(header, &records, horizon).map_err(CompactionError::Batch)?))
}

/// Reads the batches of a segment one after another and checks them.
struct BatchReader<'a> {
    entry: &'a SegmentEntry,
    /// Its map too: as long as somebody holds that, retention gives the file to no other segment.
    open: Opened,
    position: u64,
    chunk: Bytes,
    chunk_at: u64,
}

impl<'a> BatchReader<'a> {
    fn new(entry: &'a SegmentEntry) -> Result<BatchReader<'a>, CompactionError> {
        let open = entry.segment.open()?;
        Ok(BatchReader { entry, open, position: 0, chunk: Bytes::new(), chunk_at: 0 })
    }

    fn next(&mut self, cancelled: &dyn Fn() -> bool) -> Result<Option<(BatchHeader, Bytes)>, CompactionError> {
        if cancelled() {
            return Err(CompactionError::Cancelled);
        }
        if self.position >= self.entry.size {
            return Ok(None);
        }
        let head = self.bytes(batch::HEADER_BYTES)?;
        let header = BatchHeader::parse(&head).map_err(|error| self.corrupt_here(&error))?;
        let bytes = self.bytes(header.size())?;
        let header = batch::check(&bytes).map_err(|error| self.corrupt(&header, &error))?;
        self.position += bytes.len() as u64;
        Ok(Some((header, bytes)))
    }

    fn records(&self, header: &BatchHeader, bytes: &Bytes) -> Result<Vec<Record>, CompactionError> {
        let records = Records::new(bytes).and_then(|records| records.collect::<Result<Vec<_>, _>>());
        records.map_err(|error| self.corrupt(header, &error))
    }

    /// As many bytes from the position on, or what is left of the segment.
    fn bytes(&mut self, size: usize) -> Result<Bytes, IoFailure> {
        let size = size.min((self.entry.size - self.position) as usize);
        let start = (self.position - self.chunk_at) as usize;
        if start + size > self.chunk.len() {
            let mut chunk = vec![0; size.max(CHUNK_BYTES).min((self.entry.size - self.position) as usize)];
            files::read_exact_at(&*self.open.file, &mut chunk, self.position)
                .during("read", &self.entry.segment.log_path())?;
            (self.chunk, self.chunk_at) = (chunk.into(), self.position);
            return Ok(self.chunk.slice(..size));
        }
        Ok(self.chunk.slice(start..start + size))
    }

    fn corrupt(&self, header: &BatchHeader, error: &BatchError) -> CompactionError {
        self.corruption(Some(header.base_offset), error)
    }

    fn corrupt_here(&self, error: &BatchError) -> CompactionError {
        self.corruption(None, error)
    }

    fn corruption(&self, offset: Option<i64>, error: &BatchError) -> CompactionError {
        let (path, position, detail) = (self.entry.segment.log_path(), self.position, error.to_string());
        CompactionError::Corruption(Corruption { path, position, offset, detail })
    }
}
