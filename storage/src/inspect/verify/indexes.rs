//! Holds a segment's offset index, time index and transaction index against its batches.
//!
//! Owns: what each entry must say. Refuses: to call an index wrong that is merely sparse, unless we wrote it.

use std::collections::HashMap;

use headwater_proto::batch::control::{self, ControlType};
use headwater_proto::batch::{BatchHeader, Record, TimestampType};

use super::{Findings, sibling_name};
use crate::index::{IndexEntry, LargestTimestamp, OffsetEntry, TimeEntry};
use crate::inspect::{FaultKind, InspectError, SegmentFile, Target};
use crate::transactions::{self, AbortedTransaction};

/// Bytes of log without an entry that nobody would configure, against a default interval of 4 KiB.
const SPARSE_BYTES: u64 = 64 << 10;
/// After more bytes than this an entry is due, unless something else is set (`index.interval.bytes`).
const DEFAULT_INTERVAL_BYTES: u64 = 4096;

/// Entries, the last one first, each with its position in the file. One that is out of order is a fault and left out.
fn in_order<E: IndexEntry>(bytes: &[u8], file: &str, kind: FaultKind, findings: &mut Findings) -> Vec<(u64, E)> {
    // Zeros at the end are space that is reserved while a segment is written.
    let used =
        bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1).next_multiple_of(E::SIZE).min(bytes.len());
    let chunks = bytes.get(..used).unwrap_or_default().chunks(E::SIZE);
    let mut entries = Vec::new();
    for (number, chunk) in chunks.enumerate() {
        let position = (number * E::SIZE) as u64;
        match E::decode(chunk) {
            Some(entry) if chunk.len() == E::SIZE => entries.push((position, entry)),
            _ => findings.fault(file, position, None, kind, "half an entry"),
        }
    }
    if used.is_multiple_of(E::SIZE) && !bytes.len().is_multiple_of(E::SIZE) {
        let position = (bytes.len() / E::SIZE * E::SIZE) as u64;
        findings.fault(file, position, None, kind, "half an entry of zeros");
    }
    let mut kept: Vec<(u64, E)> = Vec::with_capacity(entries.len());
    let mut entries = entries.into_iter().peekable();
    while let Some((position, entry)) = entries.next() {
        let last = kept.last().map(|(_, last)| *last);
        let follows_last = last.is_none_or(|last| entry.may_follow(&last));
        // Of two that contradict each other, the one is wrong without which the rest is in order.
        let next_skips_it = entries
            .peek()
            .is_some_and(|(_, next)| !next.may_follow(&entry) && last.is_none_or(|last| next.may_follow(&last)));
        if follows_last && !next_skips_it {
            kept.push((position, entry));
        } else {
            findings.fault(file, position, None, kind, format!("{entry:?} is out of order"));
        }
    }
    kept.reverse();
    kept
}

/// The offset index: for a position, the last offset of the batch there.
pub(super) struct OffsetIndexCheck {
    file: String,
    base_offset: i64,
    entries: Vec<(u64, OffsetEntry)>,
    /// Whether we wrote the segment.
    ours: bool,
    missing: bool,
    /// An entry whose offset is not that of the batch at its position, and the first offset of that batch.
    pending: Option<(u64, i64, i64)>,
    since_entry: u64,
    sparse_at: Option<u64>,
    bytes: u64,
    has_entries: bool,
    /// Bytes after which an entry came, the fewest.
    shortest: Option<u64>,
    /// Bytes after which none came, the most, up to the last entry.
    longest: u64,
    /// A batch of ours without an entry, though there was one after fewer bytes elsewhere: its position and last offset.
    unindexed: Option<(u64, i64)>,
}

impl OffsetIndexCheck {
    pub(super) fn read(
        target: &Target,
        segment: &SegmentFile,
        ours: bool,
        findings: &mut Findings,
    ) -> Result<OffsetIndexCheck, InspectError> {
        let file = sibling_name(segment, "index");
        let bytes = target.small_file(&segment.sibling("index"))?;
        let entries = in_order(bytes.as_deref().unwrap_or_default(), &file, FaultKind::Index, findings);
        let missing = bytes.is_none() && target.is_partition();
        let base_offset = segment.base_offset;
        Ok(OffsetIndexCheck {
            file,
            base_offset,
            has_entries: !entries.is_empty(),
            entries,
            ours,
            missing,
            pending: None,
            since_entry: 0,
            sparse_at: None,
            bytes: bytes.map_or(0, |bytes| bytes.len() as u64),
            shortest: None,
            longest: 0,
            unindexed: None,
        })
    }

    /// Entries before `position` point into damage; nothing can be said of them.
    pub(super) fn pass_over(&mut self, position: u64) {
        while self.entries.pop_if(|(_, entry)| u64::from(entry.position) < position).is_some() {}
        self.since_entry = 0;
    }

    pub(super) fn batch(&mut self, position: u64, header: &BatchHeader, findings: &mut Findings) {
        while let Some((at, entry)) = self.entries.pop_if(|(_, entry)| u64::from(entry.position) < position) {
            let offset = Some(self.base_offset + i64::from(entry.relative_offset));
            findings.fault(
                &self.file,
                at,
                offset,
                FaultKind::Index,
                format!("points at {}, where no batch begins", entry.position),
            );
        }
        if let Some((at, entry)) = self.entries.pop_if(|(_, entry)| u64::from(entry.position) == position) {
            self.settle(findings);
            let offset = self.base_offset + i64::from(entry.relative_offset);
            if offset != header.last_offset() {
                self.pending = Some((at, offset, header.base_offset));
            }
            self.shortest = Some(self.shortest.unwrap_or(u64::MAX).min(self.since_entry));
            self.since_entry = 0;
        } else if !self.entries.is_empty() {
            self.longest = self.longest.max(self.since_entry);
        } else if self.since_entry >= self.due_after() {
            // Behind the last entry: one is due, if the interval is still what it was.
            self.unindexed.get_or_insert((position, header.last_offset()));
        }
        // Kafka before 4.0 made one entry for several batches that were appended together, with the last offset of all.
        if !self.ours && self.pending.is_some_and(|(_, offset, _)| offset == header.last_offset()) {
            self.pending = None;
        }
        if self.since_entry > SPARSE_BYTES {
            self.sparse_at.get_or_insert(position);
        }
        self.since_entry += header.size() as u64;
    }

    /// Bytes after which an entry is due: by the default interval, if all entries fit it, or else when one came before after as many.
    fn due_after(&self) -> u64 {
        let by_default = DEFAULT_INTERVAL_BYTES + 1;
        let fits = self.longest < by_default && self.shortest.is_none_or(|shortest| shortest >= by_default);
        if fits { by_default } else { self.shortest.unwrap_or(by_default) }
    }

    fn settle(&mut self, findings: &mut Findings) {
        if let Some((at, offset, first)) = self.pending.take() {
            let detail =
                format!("says {offset} for the batch that begins with offset {first}, which ends with another");
            findings.fault(&self.file, at, Some(offset), FaultKind::Index, detail);
        }
    }

    /// Somebody else went on with the segment, and makes entries by a rule of its own.
    pub(super) fn continued(&mut self) {
        self.unindexed = None;
    }

    pub(super) fn finish(
        mut self,
        log_end: u64,
        unfinished: bool,
        compacted: bool,
        whole: bool,
        findings: &mut Findings,
    ) {
        if let Some((at, offset, first)) =
            self.pending.take_if(|(_, offset, first)| compacted && !self.ours && offset >= first)
        {
            let detail = format!(
                "says {offset} for the batch that begins with offset {first}: older versions of Kafka compact so"
            );
            findings.note(&self.file, at, Some(offset), FaultKind::Index, detail);
        }
        self.settle(findings);
        for (at, entry) in std::mem::take(&mut self.entries).into_iter().rev() {
            if whole || u64::from(entry.position) > log_end {
                let offset = Some(self.base_offset + i64::from(entry.relative_offset));
                let detail = format!("points at {}, behind the log's end at {log_end}", entry.position);
                findings.fault(&self.file, at, offset, FaultKind::Index, detail);
            }
        }
        if self.missing && log_end > 0 && unfinished {
            findings.note(&self.file, 0, None, FaultKind::Index, "is not there yet: the segment is being written");
        } else if self.missing && log_end > 0 {
            findings.fault(&self.file, 0, None, FaultKind::Index, "is missing");
        } else if let Some(position) = self.sparse_at.filter(|_| whole && !unfinished) {
            let detail = format!("has no entry for more than {SPARSE_BYTES} bytes before {position}");
            if self.ours && !self.has_entries {
                // Emptied. (Or, for a segment of more bytes than anybody would configure.)
                findings.fault(&self.file, 0, None, FaultKind::Index, detail);
            } else {
                let at = if self.ours && self.unindexed.is_some() { self.bytes } else { 0 };
                findings.note(&self.file, at, None, FaultKind::Index, detail);
            }
        } else if let Some((position, offset)) = self.unindexed.filter(|_| self.ours && whole && !unfinished) {
            // No fault: the interval may be one that was set for the topic, and be set anew while a segment is continued.
            let detail = format!(
                "may lack its end: an entry for the batch at {position} was due, if the interval was the same throughout"
            );
            findings.note(&self.file, self.bytes, Some(offset), FaultKind::Index, detail);
        }
    }
}

/// The time index: a timestamp that is the largest so far, and the last offset of the batch that brought it.
pub(super) struct TimeIndexCheck {
    file: String,
    base_offset: i64,
    entries: Vec<(u64, TimeEntry)>,
    last_entry: Option<TimeEntry>,
    bytes: Option<usize>,
    partition: bool,
    largest: Option<LargestTimestamp>,
    /// The offset of a record that has the timestamp of the next entry, which names that offset.
    record_matches: Option<i64>,
    /// Batches are missing, so that the largest timestamp is not known.
    uncertain: bool,
}

impl TimeIndexCheck {
    pub(super) fn read(
        target: &Target,
        segment: &SegmentFile,
        findings: &mut Findings,
    ) -> Result<TimeIndexCheck, InspectError> {
        let file = sibling_name(segment, "timeindex");
        let bytes = target.small_file(&segment.sibling("timeindex"))?;
        let entries = in_order(bytes.as_deref().unwrap_or_default(), &file, FaultKind::TimeIndex, findings);
        Ok(TimeIndexCheck {
            file,
            base_offset: segment.base_offset,
            last_entry: entries.first().map(|(_, entry): &(u64, TimeEntry)| *entry),
            entries,
            bytes: bytes.map(|bytes| bytes.len()),
            partition: target.is_partition(),
            largest: None,
            record_matches: None,
            uncertain: false,
        })
    }

    pub(super) fn uncertain(&mut self) {
        self.uncertain = true;
    }

    /// A record of the batch that [`TimeIndexCheck::batch`] is told of next.
    pub(super) fn record(&mut self, header: &BatchHeader, record: &Record) {
        if header.timestamp_type() == TimestampType::LogAppend {
            return;
        }
        let base = self.base_offset;
        let named = |entry: &TimeEntry| {
            base + i64::from(entry.relative_offset) == record.offset && entry.timestamp == record.timestamp
        };
        if self.entries.last().is_some_and(|(_, entry)| named(entry)) {
            self.record_matches = Some(record.offset);
        }
    }

    pub(super) fn batch(&mut self, header: &BatchHeader, findings: &mut Findings) {
        if self.largest.is_none_or(|largest| header.max_timestamp > largest.timestamp) {
            self.largest = Some(LargestTimestamp { timestamp: header.max_timestamp, offset: header.last_offset() });
        }
        let base = self.base_offset;
        let offset_of = |entry: &TimeEntry| base + i64::from(entry.relative_offset);
        while let Some((at, entry)) = self.entries.pop_if(|(_, entry)| offset_of(entry) <= header.last_offset()) {
            let offset = offset_of(&entry);
            let largest = self.largest.map_or(i64::MIN, |largest| largest.timestamp);
            // Older versions of Kafka named the offset of the record instead of the last one of its batch.
            let named = offset == header.last_offset() || self.record_matches == Some(offset);
            let here = named && header.max_timestamp == entry.timestamp && largest == entry.timestamp;
            if !here && !self.uncertain {
                let detail = format!(
                    "says {} is the largest timestamp up to offset {offset}, which came with it; it is {largest}",
                    entry.timestamp
                );
                findings.fault(&self.file, at, Some(offset), FaultKind::TimeIndex, detail);
            }
        }
    }

    pub(super) fn finish(self, unfinished: bool, findings: &mut Findings) {
        for (at, entry) in self.entries.iter().rev() {
            let offset = self.base_offset + i64::from(entry.relative_offset);
            if !self.uncertain {
                findings.fault(
                    &self.file,
                    *at,
                    Some(offset),
                    FaultKind::TimeIndex,
                    format!("names offset {offset}, behind the log's end"),
                );
            }
        }
        let Some(largest) = self.largest.filter(|_| !self.uncertain && !unfinished && self.partition) else { return };
        let known = self.last_entry.map_or(i64::MIN, |last| last.timestamp);
        match self.bytes {
            None => findings.fault(&self.file, 0, None, FaultKind::TimeIndex, "is missing"),
            Some(bytes) if known < largest.timestamp && largest.timestamp >= 0 => {
                let detail = format!("ends before the segment's largest timestamp, {}", largest.timestamp);
                findings.fault(&self.file, bytes as u64, Some(largest.offset), FaultKind::TimeIndex, detail);
            }
            Some(_) => {}
        }
    }
}

/// Transactions that have begun and not ended, by producer.
#[derive(Debug, Default)]
pub(super) struct OpenTransactions {
    first_offsets: HashMap<i64, i64>,
    /// Where the log begins: transactions that began before it are not known.
    begins_at_zero: Option<bool>,
}

impl OpenTransactions {
    pub(super) fn batch(&mut self, header: &BatchHeader) {
        self.begins_at_zero.get_or_insert(header.base_offset == 0);
        if header.is_transactional() && !header.is_control() {
            self.first_offsets.entry(header.producer_id).or_insert(header.base_offset);
        }
    }

    /// Whether that was the last stable offset once the transaction that ended at `offset` was over.
    fn is_stable_at(&self, offset: i64, last_stable_offset: i64) -> bool {
        let stable = self.first_offsets.values().min().copied().unwrap_or(offset + 1);
        self.begins_at_zero != Some(true) || stable == last_stable_offset
    }
}

/// The transaction index: an entry for each abort marker.
pub(super) struct TxnIndexCheck {
    file: String,
    entries: Vec<(u64, AbortedTransaction)>,
    unindexed_abort: Option<i64>,
    findings: Vec<(u64, i64, String)>,
}

impl TxnIndexCheck {
    pub(super) fn read(
        target: &Target,
        segment: &SegmentFile,
        findings: &mut Findings,
    ) -> Result<TxnIndexCheck, InspectError> {
        let file = sibling_name(segment, "txnindex");
        let bytes = target.small_file(&segment.sibling("txnindex"))?.unwrap_or_default();
        let (entries, fault) = transactions::decode(&bytes);
        if let Some(fault) = fault {
            findings.fault(&file, fault.position, None, FaultKind::TxnIndex, fault.detail);
        }
        let entries = entries.into_iter().enumerate();
        let entries =
            entries.map(|(number, entry)| ((number * transactions::ENTRY_BYTES) as u64, entry)).rev().collect();
        Ok(TxnIndexCheck { file, entries, unindexed_abort: None, findings: Vec::new() })
    }

    /// A record of the log; `open` are the transactions open before it.
    pub(super) fn record(&mut self, header: &BatchHeader, record: &Record, open: &mut OpenTransactions) {
        if !header.is_control() {
            return;
        }
        let first_offset = open.first_offsets.remove(&header.producer_id);
        while let Some((at, entry)) = self.entries.pop_if(|(_, entry)| entry.last_offset < record.offset) {
            let detail =
                format!("names offset {} as the end of a transaction, and no abort marker is there", entry.last_offset);
            self.findings.push((at, entry.last_offset, detail));
        }
        if control::parse_key(record.key.as_deref().unwrap_or_default()) != Ok(ControlType::Abort) {
            return;
        }
        match self.entries.pop_if(|(_, entry)| entry.last_offset == record.offset) {
            Some((at, entry)) if entry.producer_id != header.producer_id => {
                let detail =
                    format!("names producer {} where the marker is of {}", entry.producer_id, header.producer_id);
                self.findings.push((at, entry.last_offset, detail));
            }
            Some((at, entry)) if first_offset.is_some_and(|first| first != entry.first_offset) => {
                let detail = format!(
                    "names offset {} as the first of a transaction that ends at {}",
                    entry.first_offset, entry.last_offset
                );
                self.findings.push((at, entry.last_offset, detail));
            }
            Some((at, entry))
                if first_offset.is_some() && !open.is_stable_at(record.offset, entry.last_stable_offset) =>
            {
                let detail =
                    format!("names {} as the last stable offset at {}", entry.last_stable_offset, entry.last_offset);
                self.findings.push((at, entry.last_offset, detail));
            }
            Some(_) => {}
            None if first_offset.is_none() => {}
            None => self.unindexed_abort = self.unindexed_abort.or(Some(record.offset)),
        }
    }

    /// `complete`: every marker that was written is still there.
    pub(super) fn finish(self, complete: bool, findings: &mut Findings) {
        for (at, offset, detail) in self.findings.into_iter().filter(|_| complete) {
            findings.fault(&self.file, at, Some(offset), FaultKind::TxnIndex, detail);
        }
        for (at, entry) in self.entries.iter().rev().filter(|_| complete) {
            let detail =
                format!("names offset {} as the end of a transaction, and no abort marker is there", entry.last_offset);
            findings.fault(&self.file, *at, Some(entry.last_offset), FaultKind::TxnIndex, detail);
        }
        // An abort of a transaction that wrote nothing has no entry.
        if let Some(offset) = self.unindexed_abort {
            findings.note(
                &self.file,
                0,
                Some(offset),
                FaultKind::TxnIndex,
                format!("has no entry for the abort marker at offset {offset}"),
            );
        }
    }
}
