//! Holds the producer snapshots against the batches.
//!
//! Owns: what a snapshot must say: for each producer, the last batch before the snapshot's offset. Refuses: to miss producers that
//! expired, or batches that compaction or retention removed.

use std::collections::HashMap;

use headwater_proto::batch::BatchHeader;

use super::Findings;
use super::gaps::GapCheck;
use crate::checkpoint::parse_segment_file_name;
use crate::inspect::{FaultKind, InspectError, Target, at};
use crate::producers::{self, SnapshotEntry};

/// What a producer's last batch said.
#[derive(Debug, Clone, Copy)]
struct LastBatch {
    epoch: i16,
    last_sequence: i32,
    last_offset: i64,
}

pub(super) struct SnapshotCheck {
    /// Snapshots not yet compared, the lowest offset last.
    snapshots: Vec<(i64, String, Vec<SnapshotEntry>)>,
    producers: HashMap<i64, LastBatch>,
    first_offset: Option<i64>,
    /// The offset after the last batch that was seen.
    reached: i64,
}

impl SnapshotCheck {
    /// Reads all snapshots of a partition; of a single segment there are none to compare.
    pub(super) fn read(target: &Target, findings: &mut Findings) -> Result<SnapshotCheck, InspectError> {
        let mut snapshots = Vec::new();
        let entries =
            if target.is_partition() { target.files.list(&target.dir).map_err(at(&target.dir))? } else { Vec::new() };
        for entry in entries {
            let Some((offset, producers::EXTENSION)) = parse_segment_file_name(&entry.name) else { continue };
            let Some(bytes) = target.small_file(&target.dir.join(&entry.name))? else { continue };
            match producers::decode_snapshot(&bytes) {
                Ok(decoded) => snapshots.push((offset, entry.name.clone(), decoded)),
                Err(fault) => {
                    findings.fault(&entry.name, fault.position, Some(offset), FaultKind::Snapshot, fault.detail)
                }
            }
        }
        snapshots.sort_by_key(|(offset, ..)| std::cmp::Reverse(*offset));
        Ok(SnapshotCheck { snapshots, producers: HashMap::new(), first_offset: None, reached: 0 })
    }

    pub(super) fn batch(&mut self, header: &BatchHeader, gaps: &GapCheck, findings: &mut Findings) {
        self.first_offset.get_or_insert(header.base_offset);
        while let Some((offset, file, entries)) = self.snapshots.pop_if(|(offset, ..)| *offset <= header.base_offset) {
            self.compare(offset, &file, &entries, gaps, findings);
        }
        self.reached = header.next_offset();
        if header.is_idempotent() && !self.snapshots.is_empty() {
            let seen = self.producers.entry(header.producer_id).or_insert(LastBatch {
                epoch: header.producer_epoch,
                last_sequence: -1,
                last_offset: -1,
            });
            if header.is_control() {
                // The end of a transaction raises the epoch and forgets the batches, or changes neither.
                if header.producer_epoch != seen.epoch {
                    *seen = LastBatch { epoch: header.producer_epoch, last_sequence: -1, last_offset: -1 };
                }
            } else {
                *seen = LastBatch {
                    epoch: header.producer_epoch,
                    last_sequence: header.last_sequence(),
                    last_offset: header.last_offset(),
                };
            }
        }
    }

    fn compare(&self, offset: i64, file: &str, entries: &[SnapshotEntry], gaps: &GapCheck, findings: &mut Findings) {
        for (number, entry) in entries.iter().enumerate() {
            let position = (producers::SNAPSHOT_HEADER_BYTES + number * producers::SNAPSHOT_ENTRY_BYTES) as u64;
            if entry.last_offset >= offset {
                let detail = format!(
                    "producer {}: offset {} is not before the snapshot's",
                    entry.producer_id, entry.last_offset
                );
                findings.fault(file, position, Some(offset), FaultKind::Snapshot, detail);
                continue;
            }
            if self.first_offset.is_none_or(|first| entry.last_offset < first) {
                continue;
            }
            // Compaction may have left no batch there: the producer has a later one.
            let compacted = gaps.may_have_held(entry.last_offset) || entry.last_offset >= self.reached;
            let Some(seen) = self.producers.get(&entry.producer_id) else {
                if !compacted {
                    let detail = format!("producer {} has no batch before offset {offset}", entry.producer_id);
                    findings.fault(file, position, Some(offset), FaultKind::Snapshot, detail);
                }
                continue;
            };
            let same = seen.last_offset == entry.last_offset
                && (seen.epoch, seen.last_sequence) == (entry.producer_epoch, entry.last_sequence);
            if !(same || compacted && seen.last_offset < entry.last_offset) {
                let detail = format!(
                    "producer {}: epoch {}, sequence {} at offset {}; the log says epoch {}, sequence {} at offset {}",
                    entry.producer_id,
                    entry.producer_epoch,
                    entry.last_sequence,
                    entry.last_offset,
                    seen.epoch,
                    seen.last_sequence,
                    seen.last_offset
                );
                findings.fault(file, position, Some(offset), FaultKind::Snapshot, detail);
            }
        }
    }

    /// The log ends at `end_offset`.
    pub(super) fn finish(&mut self, end_offset: Option<i64>, gaps: &GapCheck, damaged: bool, findings: &mut Findings) {
        let snapshots = std::mem::take(&mut self.snapshots);
        for (offset, file, entries) in snapshots.into_iter().rev() {
            if damaged {
                continue;
            }
            if end_offset.is_some_and(|end| offset > end) {
                findings.fault(&file, 0, Some(offset), FaultKind::Snapshot, "lies beyond the log's end");
            } else {
                self.compare(offset, &file, &entries, gaps, findings);
            }
        }
    }
}
