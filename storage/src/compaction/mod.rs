//! Compaction: of each key, the last value stays.
//!
//! Owns: when a log is worth compacting and how far ([`Log::plan_compaction`]), the work ([`CompactionPlan::run`], which needs no write
//! half and may take as long as it wants), and its installation ([`Log::install`]). Refuses: the segment that is written, everything at or
//! above the high watermark, and everything younger than `min.compaction.lag.ms`.
//! Read next: `clean.rs`, then `swap.rs`.
//!
//! It is Kafka's cleaner: offsets never change, nothing moves, the order stays; small segments become one. A crash at any point leaves each group of
//! segments as it was, or compacted. A compacted segment has gaps, which recovery does not expect beyond the recovery point; so
//! installing asks for a recovery point on the disk that lies beyond everything compacted.

mod clean;
mod keys;
pub(crate) mod swap;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use headwater_proto::batch::BatchError;

use crate::active::crc_header;
use crate::config::{LogConfig, LogIdentity};
use crate::error::{Corruption, During, IoFailure, LogError, ReadError};
use crate::files::{self, Files};
use crate::log::Log;
use crate::metrics as names;
use crate::reader::SegmentEntry;
use crate::rewrite::{SegmentSummary, SegmentWriter};
use crate::segment::Segment;
use crate::transactions;
use clean::Transactions;

/// Why a compaction did not end. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CompactionError {
    /// Somebody asked to stop.
    #[error("compaction was stopped")]
    Cancelled,
    /// The segments are gone: the log was closed, cut or deleted meanwhile.
    #[error("the log changed under its compaction")]
    Departed,
    /// The memory does not hold the keys of a single batch.
    #[error("{0} bytes of memory do not hold the keys of one batch")]
    TooLittleMemory(usize),
    /// The log is damaged.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// A batch could not be written anew.
    #[error(transparent)]
    Batch(BatchError),
    /// The disk or the operating system; a full disk is one reason.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

impl From<ReadError> for CompactionError {
    fn from(error: ReadError) -> CompactionError {
        match error {
            ReadError::Io(failure) if failure.error.kind() == ErrorKind::NotFound => CompactionError::Departed,
            ReadError::Io(failure) => CompactionError::Io(failure),
            ReadError::Corruption(corruption) => CompactionError::Corruption(corruption),
            _ => CompactionError::Departed,
        }
    }
}

/// A compaction that is worth doing. Holds no part of the write half.
#[derive(Debug)]
pub struct CompactionPlan {
    files: Arc<dyn Files>,
    dir: Arc<Path>,
    identity: LogIdentity,
    config: LogConfig,
    /// Everything below `upper_bound`, clean segments too.
    segments: Vec<SegmentEntry>,
    first_dirty: i64,
    upper_bound: i64,
    now_ms: i64,
    /// The last offset of each live producer.
    last_offsets: HashMap<i64, i64>,
    /// Where leader epochs begin that come after another.
    epoch_starts: HashSet<i64>,
    transactions: Transactions,
}

/// What a compaction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompactionStats {
    /// Bytes of the segments that were looked through.
    pub bytes_before: u64,
    /// Bytes of what stayed of them.
    pub bytes_after: u64,
    /// Their records, control records left out.
    pub records_before: u64,
    /// How many of them stayed.
    pub records_after: u64,
}

/// New segments, ready to be put in place.
#[derive(Debug)]
pub struct CompactionResult {
    groups: Vec<Cleaned>,
    cleaned_until: i64,
    stats: CompactionStats,
}

/// One new segment and those that it was made of.
#[derive(Debug)]
struct Cleaned {
    sources: Vec<SegmentEntry>,
    summary: SegmentSummary,
}

impl CompactionPlan {
    /// Offset up to which the log is clean once this is done; less if the keys do not fit the memory.
    pub fn upper_bound(&self) -> i64 {
        self.upper_bound
    }

    /// Does the work: reads everything, and writes what stays beside the log. Uses at most `memory_bytes` for keys, and besides as much as
    /// the largest batch takes. Looks at `cancelled` often, and leaves nothing behind when it ends early.
    ///
    /// The log must stay open, or be closed without being opened anew, until this returns.
    pub fn run(self, memory_bytes: usize, cancelled: &dyn Fn() -> bool) -> Result<CompactionResult, CompactionError> {
        let mut known = clean::look(&self, memory_bytes, cancelled)?;
        if known.end_offset <= self.first_dirty {
            return Err(CompactionError::TooLittleMemory(memory_bytes));
        }
        let mut result =
            CompactionResult { groups: Vec::new(), cleaned_until: known.end_offset, stats: CompactionStats::default() };
        let written = (|| {
            for group in self.groups(known.end_offset)? {
                let Some(first) = group.first() else { continue };
                let crc = Some(crc_header(&self.identity, first.base_offset()));
                let (files, interval) = (Arc::clone(&self.files), self.config.index_interval_bytes);
                let mut writer =
                    SegmentWriter::create(files, &self.dir, first.base_offset(), swap::CLEANED, crc, interval)?;
                let mut changed = group.len() > 1;
                for entry in &group {
                    changed |= clean::copy(&self, &mut known, entry, &mut writer, &mut result.stats, cancelled)?;
                }
                let indexed = transactions::EXTENSION;
                let keeps_index =
                    files::exists(&*self.files, &first.segment.path(indexed)).during("look at", &self.dir)?;
                let summary = writer.finish(keeps_index)?;
                result.stats.bytes_after += summary.size;
                result.groups.push(Cleaned { sources: group, summary });
                if !changed {
                    result.groups.pop();
                    swap::discard(&*self.files, &self.dir, summary.base_offset)?;
                }
            }
            Ok(())
        })();
        match written {
            Ok(()) => Ok(result),
            Err(error) => {
                for entry in &self.segments {
                    // What cannot be removed now is removed when the log is opened.
                    let _ = swap::discard(&*self.files, &self.dir, entry.base_offset());
                }
                Err(error)
            }
        }
    }

    /// Neighbouring segments that fit one, below `end_offset`.
    fn groups(&self, end_offset: i64) -> Result<Vec<Vec<SegmentEntry>>, IoFailure> {
        let mut groups: Vec<Vec<SegmentEntry>> = Vec::new();
        let (mut bytes, mut index_bytes) = (0, 0);
        for (number, entry) in self.segments.iter().enumerate() {
            if entry.base_offset() >= end_offset {
                break;
            }
            let last_offset = self.segments.get(number + 1).map_or(self.upper_bound, SegmentEntry::base_offset) - 1;
            let (offsets, times) = entry.segment.index_sizes();
            let fits = groups.last().and_then(|group| group.first()).is_some_and(|first| {
                bytes + entry.size <= u64::from(self.config.segment_bytes)
                    && index_bytes + offsets.max(times) <= u64::from(self.config.segment_index_bytes)
                    && last_offset - first.base_offset() <= i64::from(i32::MAX)
            });
            if fits {
                (bytes, index_bytes) = (bytes + entry.size, index_bytes + offsets.max(times));
            } else {
                (bytes, index_bytes) = (entry.size, offsets.max(times));
                groups.push(Vec::new());
            }
            if let Some(group) = groups.last_mut() {
                group.push(entry.clone());
            }
        }
        Ok(groups)
    }

    /// The transaction index of a segment; empty if there is none.
    fn aborted_bytes(&self, path: &Path) -> Result<Vec<u8>, IoFailure> {
        read_transactions(&*self.files, path)
    }
}

impl CompactionResult {
    /// What was done.
    pub fn stats(&self) -> CompactionStats {
        self.stats
    }

    /// Offset up to which the log is clean once this is installed: it belongs into the cleaner's checkpoint then. The recovery point
    /// checkpoint must have passed it before.
    pub fn cleaned_until(&self) -> i64 {
        self.cleaned_until
    }
}

impl Log {
    /// Whether, and how far, the log is worth compacting: enough of it is new since the last time (`min.cleanable.dirty.ratio`), or some
    /// of it has waited for longer than `max.compaction.lag.ms`. `cleaned_until` is what the cleaner's checkpoint says. May block.
    pub fn plan_compaction(
        &self,
        now_ms: i64,
        high_watermark: i64,
        cleaned_until: Option<i64>,
    ) -> Result<Option<CompactionPlan>, LogError> {
        self.check_poisoned()?;
        if !self.config.cleanup.compact {
            return Ok(None);
        }
        // A checkpoint beyond the log is another log's.
        let first_dirty = cleaned_until.filter(|offset| *offset <= self.next_offset).unwrap_or(0).max(self.log_start);
        let mut upper_bound = self.active.segment.base_offset;
        let young_ms = i64::try_from(self.config.min_compaction_lag_ms).unwrap_or(i64::MAX);
        for entry in &self.sealed {
            let newest = entry.largest.map_or(i64::MIN, |largest| largest.timestamp);
            let young = young_ms > 0 && newest > now_ms.saturating_sub(young_ms);
            let unsafe_to_read = self.end_of(entry) > high_watermark;
            if entry.base_offset() >= first_dirty && young || unsafe_to_read {
                upper_bound = upper_bound.min(entry.base_offset());
                break;
            }
        }
        let segments: Vec<SegmentEntry> =
            self.sealed.iter().filter(|entry| entry.base_offset() < upper_bound).cloned().collect();
        let dirty: Vec<&SegmentEntry> = segments.iter().filter(|entry| self.end_of(entry) > first_dirty).collect();
        let bytes = |entries: &mut dyn Iterator<Item = &SegmentEntry>| entries.map(|entry| entry.size).sum::<u64>();
        let (dirty_bytes, all_bytes) = (bytes(&mut dirty.iter().copied()), bytes(&mut segments.iter()));
        if dirty_bytes == 0 {
            return Ok(None);
        }
        let overdue_ms = i64::try_from(self.config.max_compaction_lag_ms).unwrap_or(i64::MAX);
        let mut overdue = false;
        if overdue_ms < i64::MAX {
            for entry in &dirty {
                let first = entry.segment.headers(0).and_then(|mut headers| headers.next());
                let first = first.map_err(|error| reading(error, entry))?;
                overdue |= first.is_some_and(|(_, first)| {
                    first.max_timestamp > 0 && first.max_timestamp < now_ms.saturating_sub(overdue_ms)
                });
            }
        }
        if !overdue && dirty_bytes as f64 <= self.config.min_cleanable_dirty_ratio * all_bytes as f64 {
            return Ok(None);
        }
        let mut transactions = Transactions::default();
        for entry in &self.sealed {
            let bytes = read_transactions(&*self.files, &entry.segment.path(transactions::EXTENSION))?;
            transactions.add_aborted(&transactions::decode(&bytes).0);
        }
        let producers = self.producers.snapshot();
        let open = producers.iter().filter(|producer| producer.current_txn_first_offset >= 0);
        transactions.open = open.map(|producer| (producer.producer_id, producer.current_txn_first_offset)).collect();
        Ok(Some(CompactionPlan {
            files: Arc::clone(&self.files),
            dir: Arc::clone(&self.dir),
            identity: self.identity.clone(),
            config: self.config.clone(),
            segments,
            first_dirty,
            upper_bound,
            now_ms,
            last_offsets: self.producers.last_offsets().collect(),
            epoch_starts: self.epochs.entries().iter().skip(1).map(|entry| entry.start_offset).collect(),
            transactions,
        }))
    }

    /// Puts compacted segments in the place of those they were made of. Groups of which a segment was deleted or cut meanwhile are dropped.
    /// Readers go on where they are, with what stayed. Returns the offset up to which the log is clean, for the cleaner's checkpoint.
    ///
    /// `recovery_point` is what the recovery point checkpoint on the disk says of this log. It must lie at or beyond
    /// [`CompactionResult::cleaned_until`]: everything sealed is flushed, so it can be written at any time.
    pub fn install(&mut self, result: CompactionResult, recovery_point: i64) -> Result<i64, LogError> {
        self.check_poisoned()?;
        if recovery_point < result.cleaned_until {
            let until = result.cleaned_until;
            self.discard_compaction(result);
            let needs =
                format!("a compaction up to offset {until} needs a recovery point there, not at {recovery_point}");
            return Err(LogError::Misuse(needs));
        }
        let mut complete = true;
        for group in result.groups {
            let first = self.sealed.iter().position(|entry| {
                group.sources.first().is_some_and(|source| Arc::ptr_eq(&source.segment, &entry.segment))
            });
            let same = first.is_some_and(|first| {
                let here = self.sealed.get(first..first + group.sources.len()).unwrap_or_default();
                here.len() == group.sources.len()
                    && here.iter().zip(&group.sources).all(|(here, source)| Arc::ptr_eq(&here.segment, &source.segment))
            });
            match first.filter(|_| same) {
                Some(first) => {
                    let swapped = self.swap_in(first, &group);
                    self.poison_on_error(swapped)?;
                }
                None => {
                    complete = false;
                    swap::discard(&*self.files, &self.dir, group.summary.base_offset)?;
                }
            }
        }
        metrics::counter!(names::COMPACTIONS).increment(1);
        metrics::counter!(names::COMPACTED_BYTES)
            .increment(result.stats.bytes_before.saturating_sub(result.stats.bytes_after));
        // What was dropped is of segments that are gone, or of a log that was cut: the next compaction finds out.
        Ok(if complete { result.cleaned_until } else { self.log_start })
    }

    fn swap_in(&mut self, first: usize, group: &Cleaned) -> Result<(), LogError> {
        let SegmentSummary { base_offset, size, offsets_bytes, times_bytes, largest } = group.summary;
        let (files, dir) = (Arc::clone(&self.files), Arc::clone(&self.dir));
        swap::commit(&*files, &dir, base_offset)?;
        let segment = Segment::new(Arc::clone(&files), Arc::clone(&dir), base_offset, size, offsets_bytes, times_bytes);
        segment.read_swap_file(true);
        let last_append_ms = group.sources.iter().map(|source| source.last_append_ms).max().unwrap_or(0);
        let entry = SegmentEntry { segment: Arc::clone(&segment), size, largest, last_append_ms };
        self.sealed.splice(first..first + group.sources.len(), [entry]);
        // Readers see the new segment before the old ones can no longer be opened.
        self.relist();
        for source in &group.sources {
            source.segment.retire();
        }
        let others: Vec<i64> = group.sources.iter().skip(1).map(SegmentEntry::base_offset).collect();
        swap::complete(&*files, &dir, base_offset, &others)?;
        segment.read_swap_file(false);
        Ok(())
    }

    /// Removes what a compaction wrote that is not going to be installed.
    pub fn discard_compaction(&self, result: CompactionResult) {
        for group in result.groups {
            if let Err(failure) = swap::discard(&*self.files, &self.dir, group.summary.base_offset) {
                tracing::warn!(%failure, "an unused compacted segment could not be removed");
            }
        }
    }

    /// One beyond the last offset that a sealed segment can hold.
    fn end_of(&self, entry: &SegmentEntry) -> i64 {
        let after = self.sealed.partition_point(|other| other.base_offset() <= entry.base_offset());
        self.sealed.get(after).map_or(self.active.segment.base_offset, SegmentEntry::base_offset)
    }
}

fn reading(error: ReadError, entry: &SegmentEntry) -> LogError {
    match error {
        ReadError::Io(failure) => LogError::Io(failure),
        ReadError::Corruption(corruption) => LogError::Corruption(corruption),
        error => {
            LogError::Io(IoFailure::new("read", &entry.segment.log_path(), std::io::Error::other(error.to_string())))
        }
    }
}

fn read_transactions(files: &dyn Files, path: &Path) -> Result<Vec<u8>, IoFailure> {
    match files::read(files, path, 1 << 30) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(IoFailure::new("read", path, error)),
    }
}
