//! `segment verify`: whether the files of a partition are whole, and agree with each other.
//!
//! Owns: what every file must say, and that every segment is this partition's (`foreign.rs`). Batches are judged by `scan.rs`, their records here; then the offset index, the time index, the
//! transaction index, the `.crc`, the producer snapshots, the leader epoch checkpoint and `partition.metadata` are held against them.
//! Refuses: to mend anything. What Kafka wrote is never a fault, whatever its version: indexes that older ones wrote for several batches
//! at once, gaps that compaction left, and a `.crc` that no longer fits because Kafka went on here are notes.
//! Read next: `verify/indexes.rs`, `verify/crc.rs` and `verify/gaps.rs`.
//!
//! The smaller files are read before the log, so that beside a running broker they are never ahead of it.

mod crc;
mod gaps;
mod indexes;
mod producers;

use std::collections::HashMap;

use headwater_proto::TopicId;
use headwater_proto::batch::{BatchHeader, Record, Records, control};
use serde::Serialize;

use super::foreign::Owners;
use super::scan::{FoundBatch, Item};
use super::{Fault, FaultKind, InspectError, SegmentFile, Target, at, name};
use crate::checkpoint::PARTITION_METADATA;
use crate::epochs::{self, LeaderEpochs};
use crate::files;
use crc::CrcCheck;
use gaps::GapCheck;
use indexes::{OffsetIndexCheck, OpenTransactions, TimeIndexCheck, TxnIndexCheck};
use producers::SnapshotCheck;

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// The path as given.
    pub path: String,
    /// Batches that are whole and in their place.
    pub batches: u64,
    /// Their records.
    pub records: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// What is worth knowing and no fault.
    pub notes: Vec<Fault>,
}

/// Where the topic's id stands in `partition.metadata`.
const METADATA_TOPIC_AT: u64 = "version: 0\ntopic_id: ".len() as u64;

/// Faults of one file beyond so many are counted and not listed.
const LISTED_FAULTS: usize = 1000;

/// Verifies a target. `progress` is told of bytes of `.log` files as they are read.
pub fn verify(target: &Target, progress: &dyn Fn(u64)) -> Result<VerifyReport, InspectError> {
    let mut verifier = Verifier::new(target)?;
    for segment in &target.segments {
        verifier.segment(segment, progress)?;
    }
    verifier.finish()
}

/// Collects faults and notes, with a bound for each file.
#[derive(Debug, Default)]
struct Findings {
    faults: Vec<Fault>,
    notes: Vec<Fault>,
    by_file: HashMap<String, usize>,
}

impl Findings {
    fn fault(&mut self, file: &str, position: u64, offset: Option<i64>, kind: FaultKind, detail: impl Into<String>) {
        let listed = self.by_file.entry(file.to_owned()).or_default();
        *listed += 1;
        if *listed <= LISTED_FAULTS {
            self.faults.push(Fault { file: file.to_owned(), position, offset, kind, detail: detail.into() });
        }
    }

    fn note(&mut self, file: &str, position: u64, offset: Option<i64>, kind: FaultKind, detail: impl Into<String>) {
        if self.notes.iter().filter(|note| note.file == file).count() < LISTED_FAULTS {
            self.notes.push(Fault { file: file.to_owned(), position, offset, kind, detail: detail.into() });
        }
    }

    fn finish(mut self) -> (Vec<Fault>, Vec<Fault>) {
        for (file, found) in self.by_file {
            if let Some(last) = self.faults.iter_mut().rfind(|fault| fault.file == file && found > LISTED_FAULTS) {
                last.detail.push_str(&format!("; {} more faults of this file are not listed", found - LISTED_FAULTS));
            }
        }
        (self.faults, self.notes)
    }
}

struct Verifier<'a> {
    target: &'a Target,
    owners: Owners<'a>,
    report: VerifyReport,
    findings: Findings,
    epochs: Option<LeaderEpochs>,
    snapshots: SnapshotCheck,
    previous: Option<BatchHeader>,
    /// Offset after the last batch so far.
    end_offset: Option<i64>,
    damaged: bool,
    /// The log's end has not been trimmed: it is being written, or was not closed.
    unfinished: bool,
    gaps: GapCheck,
    /// The checkpoint contradicts a batch at this offset.
    epoch_doubt: Option<i64>,
    /// Where the last segment's batches end, in bytes, unless something is wrong with it that explains its end.
    log_end: Option<u64>,
    /// The topic that checksum files were written for, and how many of them; `None` if they do not agree.
    topics: Option<(TopicId, String)>,
    topics_differ: bool,
    /// The oldest leader that is known wrote something before it began.
    begins_late: bool,
    transactions: OpenTransactions,
}

impl<'a> Verifier<'a> {
    fn new(target: &'a Target) -> Result<Verifier<'a>, InspectError> {
        let mut findings = Findings::default();
        let epochs = leader_epochs(target, &mut findings)?;
        partition_metadata(target, &mut findings)?;
        let snapshots = SnapshotCheck::read(target, &mut findings)?;
        let gaps = GapCheck::new(target)?;
        let report = VerifyReport { path: target.path().display().to_string(), ..VerifyReport::default() };
        Ok(Verifier {
            target,
            owners: Owners::read(target)?,
            report,
            findings,
            epochs,
            snapshots,
            previous: None,
            end_offset: None,
            damaged: false,
            unfinished: false,
            gaps,
            epoch_doubt: None,
            log_end: None,
            topics: None,
            topics_differ: false,
            begins_late: false,
            transactions: OpenTransactions::default(),
        })
    }

    fn segment(&mut self, segment: &SegmentFile, progress: &dyn Fn(u64)) -> Result<(), InspectError> {
        let crc = CrcCheck::read(self.target, segment, &mut self.findings)?;
        if let Some(crc) = &crc {
            let topic = crc.topic_id();
            self.topics_differ |= self.topics.as_ref().is_some_and(|(known, _)| *known != topic);
            self.topics.get_or_insert_with(|| (topic, sibling_name(segment, "crc")));
        }
        self.log_end = None;
        if let Some(other) = self.owners.other(segment)? {
            return self.pass_over(segment, &other, progress);
        }
        let mut offsets = OffsetIndexCheck::read(self.target, segment, crc.is_some(), &mut self.findings)?;
        let mut times = TimeIndexCheck::read(self.target, segment, &mut self.findings)?;
        let mut transactions = TxnIndexCheck::read(self.target, segment, &mut self.findings)?;
        let file = segment.name();
        self.gaps.begin(segment);
        let Some(mut scanner) = self.target.scan(segment, self.epochs.clone(), self.previous)? else {
            self.gaps.departed();
            return Ok(());
        };
        let mut damaged: Vec<(u64, u64)> = Vec::new();
        let mut log_end = 0;
        while let Some(item) = scanner.next().map_err(at(&segment.path))? {
            let (position, header) = match item {
                Item::Batch(found) => {
                    progress(found.bytes.len() as u64);
                    self.gaps.batch(&file, found.position, &found.header, self.end_offset);
                    let open = &mut self.transactions;
                    open.batch(&found.header);
                    let visit = |record: &Record| {
                        transactions.record(&found.header, record, open);
                        times.record(&found.header, record);
                    };
                    match deep(&found, visit) {
                        Ok(records) => self.report.records += records,
                        Err(detail) => {
                            let offset = Some(found.header.base_offset);
                            self.findings.fault(&file, found.position, offset, FaultKind::Records, detail);
                        }
                    }
                    self.report.batches += 1;
                    log_end = found.position + found.bytes.len() as u64;
                    (found.position, found.header)
                }
                Item::Damage(damage) => {
                    progress(damage.size);
                    let repairable = if damage.mended.is_some() { " (repair can mend it)" } else { "" };
                    let detail = format!("{}; {} bytes{repairable}", damage.detail, damage.size);
                    self.findings.fault(&file, damage.position, Some(damage.expected_offset), damage.kind, detail);
                    damaged.push((damage.position, damage.position + damage.size));
                    self.damaged = true;
                    offsets.pass_over(damage.position + damage.size);
                    let Some((header, _)) = damage.mended else {
                        times.uncertain();
                        continue;
                    };
                    times.batch(&header, &mut self.findings);
                    self.gaps.follow(&header);
                    self.end_offset = Some(header.next_offset());
                    continue;
                }
                Item::Tail(tail) => {
                    progress(tail.size);
                    if segment.next_base_offset.is_some() {
                        let what = if tail.zeros { "zeros" } else { "bytes of an older segment" };
                        let detail = format!(
                            "{} {what} behind the segment's end were not trimmed when it was rolled",
                            tail.size
                        );
                        self.findings.note(&file, tail.position, None, FaultKind::Tail, detail);
                    }
                    self.unfinished |= segment.next_base_offset.is_none();
                    continue;
                }
            };
            self.check_starts(&header);
            offsets.batch(position, &header, &mut self.findings);
            times.batch(&header, &mut self.findings);
            self.snapshots.batch(&header, &self.gaps, &mut self.findings);
            self.end_offset = Some(header.next_offset());
        }
        if log_end == 0 && damaged.is_empty() {
            self.gaps.nothing_in(self.target, segment)?;
        }
        // Both indexes are written when a segment is rolled or closed: without either it is the one that is being written.
        let no_index = |kind| self.target.small_file(&segment.sibling(kind)).map(|bytes| bytes.is_none());
        if segment.next_base_offset.is_none() && no_index("index")? && no_index("timeindex")? {
            self.unfinished = true;
        }
        if !crc.as_ref().is_some_and(|crc| crc.ends_at(log_end)) {
            offsets.continued();
        }
        offsets.finish(log_end, self.unfinished, self.gaps.compacted(), damaged.is_empty(), &mut self.findings);
        times.finish(segment.next_base_offset.is_none() && self.unfinished, &mut self.findings);
        transactions.finish(damaged.is_empty() && !self.gaps.compacted(), &mut self.findings);
        if let Some(crc) = crc {
            let closed = segment.next_base_offset.is_some() || !self.unfinished;
            crc.run(self.target, segment, log_end, closed, &damaged, &mut self.findings)?;
        }
        self.log_end = damaged.is_empty().then_some(log_end);
        self.previous = scanner.previous();
        if let Some(doubt) = scanner.epoch_doubt() {
            let detail =
                format!("leader epoch {} where the checkpoint says {}; either is wrong", doubt.epoch, doubt.known);
            self.findings.fault(&file, doubt.position, Some(doubt.offset), FaultKind::Epoch, detail);
            self.epoch_doubt.get_or_insert(doubt.offset);
        }
        self.end_offset = self.end_offset.or(Some(segment.base_offset));
        Ok(())
    }

    /// A segment of another partition: what is in it says nothing of this one.
    fn pass_over(&mut self, segment: &SegmentFile, other: &str, progress: &dyn Fn(u64)) -> Result<(), InspectError> {
        let len = self.target.files.metadata(&segment.path).map_err(at(&segment.path))?.len;
        progress(len);
        let detail = format!("is no segment of this partition: {other}; {len} bytes");
        self.findings.fault(&segment.name(), 0, Some(segment.base_offset), FaultKind::Owner, detail);
        self.damaged = true;
        self.gaps.begin(segment);
        self.gaps.departed();
        self.end_offset = Some(segment.next_base_offset.unwrap_or(segment.base_offset));
        Ok(())
    }

    /// Every checksum file was written for one topic, and the folder is said to be another's.
    fn check_topic(&mut self) {
        let Some((topic, crc)) = self.topics.as_ref().filter(|_| !self.topics_differ) else { return };
        if let Some(id) = self.target.topic_id().filter(|id| id != topic) {
            let detail = format!("names topic {id}, where {crc} was written for {topic}");
            let position = METADATA_TOPIC_AT;
            self.findings.fault(PARTITION_METADATA, position, None, FaultKind::PartitionMetadata, detail);
        }
    }

    /// The data root knows of more than there is. (A log that was flushed never ends before that.)
    fn check_end(&mut self) {
        let (Some(known), Some(position)) = (self.target.known, self.log_end) else { return };
        let Some(last) = self.target.segments.last().filter(|_| self.target.is_partition()) else { return };
        let end = self.end_offset.unwrap_or(0).max(last.base_offset);
        if end < known.flushed {
            let detail = format!(
                "the log ends here, at offset {end}, though {} says that everything before {} was flushed",
                crate::checkpoint::RECOVERY_POINTS,
                known.flushed
            );
            self.findings.fault(&last.name(), position, Some(end), FaultKind::Offsets, detail);
        }
    }

    /// Leaders begin between batches; the oldest that is known, where the log does.
    fn check_starts(&mut self, header: &BatchHeader) {
        let Some(epochs) = &self.epochs else { return };
        let (first, last) = (header.base_offset, header.last_offset());
        let entries = epochs.entries();
        let within = |entry: &&epochs::EpochEntry| (first + 1..=last).contains(&entry.start_offset);
        if let Some(entry) = entries.iter().skip(1).find(within) {
            let (offset, epoch) = (entry.start_offset, entry.epoch);
            let detail =
                format!("leader epoch {epoch} begins at {offset}, within the batch of offsets {first} to {last}");
            let position = self.epoch_position(offset);
            self.findings.fault(epochs::FILE_NAME, position, Some(offset), FaultKind::LeaderEpochs, detail);
        } else if let (Some(oldest), Some(known)) = (entries.first(), self.target.known)
            && !self.begins_late
            && known.log_start <= last
            && known.log_start.max(first) < oldest.start_offset
            && header.leader_epoch >= oldest.epoch
        {
            self.begins_late = true;
            let (offset, epoch) = (oldest.start_offset, oldest.epoch);
            let detail = format!("leader epoch {epoch} begins at {offset}, though it wrote offset {first}");
            let position = self.epoch_position(offset);
            self.findings.note(epochs::FILE_NAME, position, Some(offset), FaultKind::LeaderEpochs, detail);
        }
    }

    /// Where in the leader epoch checkpoint the entry stands that says who wrote an offset.
    fn epoch_position(&self, offset: i64) -> u64 {
        let text = self.epochs.as_ref().map(|epochs| (epochs.encode(), epochs.line_of(offset)));
        text.map_or(0, |(text, line)| line_position(text.as_bytes(), line))
    }

    fn finish(mut self) -> Result<VerifyReport, InspectError> {
        self.snapshots.finish(self.end_offset, &self.gaps, self.damaged, &mut self.findings);
        if let Some(offset) = self.epoch_doubt {
            let detail = format!("contradicts the batch at offset {offset}; either is wrong");
            let position = self.epoch_position(offset);
            self.findings.fault(epochs::FILE_NAME, position, Some(offset), FaultKind::LeaderEpochs, detail);
        }
        let late = |entry: &&epochs::EpochEntry| self.end_offset.is_some_and(|end| entry.start_offset > end);
        if self.target.is_partition()
            && !self.damaged
            && let Some(entry) = self.epochs.iter().flat_map(|epochs| epochs.entries()).find(late).copied()
        {
            let detail = format!("leader epoch {} begins beyond the log's end", entry.epoch);
            let position = self.epoch_position(entry.start_offset);
            let offset = Some(entry.start_offset);
            self.findings.fault(epochs::FILE_NAME, position, offset, FaultKind::LeaderEpochs, detail);
        }
        // Who never wrote anything is nobody's history.
        let is_missing = !files::exists(&*self.target.files, &self.target.dir.join(epochs::FILE_NAME)).unwrap_or(true);
        if is_missing && self.target.is_partition() && self.report.batches > 0 {
            self.findings.note(epochs::FILE_NAME, 0, None, FaultKind::LeaderEpochs, "is missing");
        }
        self.check_topic();
        self.check_end();
        self.gaps.finish(self.target, self.damaged, &mut self.findings)?;
        (self.report.faults, self.report.notes) = self.findings.finish();
        Ok(self.report)
    }
}

/// Reads every record of a batch; the number of them.
fn deep(found: &FoundBatch, mut visit: impl FnMut(&Record)) -> Result<u64, String> {
    let mut count = 0;
    for record in Records::new(&found.bytes).map_err(|error| error.to_string())? {
        let record = record.map_err(|error| error.to_string())?;
        if record.timestamp > found.header.max_timestamp {
            let (offset, max) = (record.offset, found.header.max_timestamp);
            return Err(format!(
                "the record at offset {offset} is of {}, after the batch's largest timestamp {max}",
                record.timestamp
            ));
        }
        if found.header.is_control() {
            control::parse_key(record.key.as_deref().unwrap_or_default()).map_err(|error| error.to_string())?;
        }
        visit(&record);
        count += 1;
    }
    Ok(count)
}

fn leader_epochs(target: &Target, findings: &mut Findings) -> Result<Option<LeaderEpochs>, InspectError> {
    let Some(bytes) = target.small_file(&target.dir.join(epochs::FILE_NAME))? else {
        return Ok(None);
    };
    match LeaderEpochs::decode(&bytes) {
        Ok(epochs) => Ok(Some(epochs)),
        Err(fault) => {
            let position = line_position(&bytes, fault.line);
            findings.fault(epochs::FILE_NAME, position, None, FaultKind::LeaderEpochs, fault.to_string());
            Ok(None)
        }
    }
}

fn partition_metadata(target: &Target, findings: &mut Findings) -> Result<(), InspectError> {
    if !target.is_partition() {
        return Ok(());
    }
    match crate::checkpoint::read_partition_metadata(&*target.files, &target.dir) {
        Ok(Some(_)) => {}
        Ok(None) => findings.note(PARTITION_METADATA, 0, None, FaultKind::PartitionMetadata, "is missing"),
        Err(error) => findings.fault(PARTITION_METADATA, 0, None, FaultKind::PartitionMetadata, error.to_string()),
    }
    Ok(())
}

/// Where a line (from 1) of a text begins.
fn line_position(text: &[u8], line: usize) -> u64 {
    text.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum::<usize>() as u64
}

/// The name of a file of the same segment.
fn sibling_name(segment: &SegmentFile, extension: &str) -> String {
    name(&segment.sibling(extension))
}
