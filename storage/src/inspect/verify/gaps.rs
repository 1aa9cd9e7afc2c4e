//! Offsets that no batch covers: what compaction took, and what a lost segment held.
//!
//! Owns: the difference. Refuses: gaps within damage, which the damage explains. Read next: `../../compaction/swap.rs`, for what compaction leaves.
//!
//! * A `.log` that is missing while another file of its segment is there was lost, whatever else is missing: compaction and retention
//!   remove the `.log` first and the rest at once. (A swap that was cut short is finished when the log is opened; until then nothing is said.)
//! * Compaction leaves many gaps, or batches with fewer records than offsets; a lost segment leaves one gap, and room for itself:
//!   the segment before ends before the offset that names the next one.
//! * A segment of which compaction kept nothing stays, empty, with both its indexes: everything up to the next one was its own. One that
//!   was emptied by accident is contradicted by its `.crc` or an index, or has lost them too.
//! * Where one gap with room is all there is, the cleaner's checkpoint in the data root decides: beyond the gap, compaction took it. Nothing
//!   in a folder by itself tells, so without a checkpoint (the folder was copied elsewhere) it is a fault.

use std::collections::BTreeMap;

use headwater_proto::batch::BatchHeader;

use super::Findings;
use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::compaction::swap;
use crate::inspect::{FaultKind, InspectError, SegmentFile, Target, at};
use crate::retention;

/// One stretch of missing offsets.
struct Gap {
    /// The file and the position where the log goes on.
    file: String,
    position: u64,
    from: i64,
    next: i64,
    /// A segment would fit in.
    has_room: bool,
}

pub(super) struct GapCheck {
    /// Files whose `.log` was missing before anything was read, by base offset.
    orphans: BTreeMap<i64, String>,
    count: u64,
    incomplete_batches: u64,
    first: Option<Gap>,
    /// Up to where the segments so far account for offsets; `None`: up to the next one.
    reached: Option<i64>,
    /// Since the last batch, a segment began beyond what was reached.
    has_room: bool,
}

impl GapCheck {
    pub(super) fn new(target: &Target) -> Result<GapCheck, InspectError> {
        let orphans = if target.is_partition() { orphans(target)? } else { BTreeMap::new() };
        Ok(GapCheck { orphans, count: 0, incomplete_batches: 0, first: None, reached: None, has_room: false })
    }

    pub(super) fn begin(&mut self, segment: &SegmentFile) {
        self.has_room |= self.reached.is_some_and(|reached| reached < segment.base_offset);
        self.reached = Some(segment.base_offset);
    }

    /// A batch of the segment that was begun; the log is known to reach to `expected`.
    pub(super) fn batch(&mut self, file: &str, position: u64, header: &BatchHeader, expected: Option<i64>) {
        if i64::from(header.record_count) <= i64::from(header.last_offset_delta) {
            self.incomplete_batches += 1;
        }
        let has_room = self.follow(header);
        let next = header.base_offset;
        let Some(from) = expected.filter(|expected| *expected < next) else { return };
        self.count += 1;
        self.first.get_or_insert_with(|| Gap { file: file.to_owned(), position, from, next, has_room });
    }

    /// A batch that is whole, or was mended. Whether a segment may be lost before it.
    pub(super) fn follow(&mut self, header: &BatchHeader) -> bool {
        self.reached = Some(header.next_offset());
        std::mem::take(&mut self.has_room)
    }

    /// The segment that was begun has no batch: what compaction leaves has its indexes.
    pub(super) fn nothing_in(&mut self, target: &Target, segment: &SegmentFile) -> Result<(), InspectError> {
        let mut has_indexes = true;
        for extension in ["index", "timeindex"] {
            has_indexes &= target.small_file(&segment.sibling(extension))?.is_some();
        }
        if has_indexes {
            self.reached = None;
        }
        Ok(())
    }

    /// A running broker removed the segment that was begun.
    pub(super) fn departed(&mut self) {
        (self.reached, self.has_room) = (None, false);
    }

    /// Whether the log looks like one that was compacted.
    pub(super) fn compacted(&self) -> bool {
        self.count > 1 || self.incomplete_batches > 0
    }

    /// Whether there may have been a batch at an offset which is in none: in a gap, or anywhere in a log that was compacted.
    pub(super) fn may_have_held(&self, offset: i64) -> bool {
        self.compacted() || self.first.as_ref().is_some_and(|gap| (gap.from..gap.next).contains(&offset))
    }

    /// `damaged`: batches are missing for a reason that is known.
    pub(super) fn finish(
        mut self,
        target: &Target,
        damaged: bool,
        findings: &mut Findings,
    ) -> Result<(), InspectError> {
        if !self.orphans.is_empty() {
            // A running broker may have been removing them.
            let still = orphans(target)?;
            self.orphans.retain(|base_offset, _| still.contains_key(base_offset));
        }
        let first_base = target.segments.first().map_or(0, |segment| segment.base_offset);
        for (base_offset, other) in &self.orphans {
            if *base_offset > first_base {
                let detail = format!("is missing, though {other} is there");
                let file = segment_file_name(*base_offset, ".log");
                findings.fault(&file, 0, Some(*base_offset), FaultKind::Offsets, detail);
            } else {
                let detail = "is left of a segment that was deleted";
                findings.note(other, 0, Some(*base_offset), FaultKind::Offsets, detail);
            }
        }
        let compacted = self.compacted();
        let Some(gap) = self.first.filter(|_| !compacted && !damaged) else { return Ok(()) };
        let detail = format!("offsets {} to {} are missing", gap.from, gap.next - 1);
        let is_lost = gap.has_room && target.cleaned_until().is_none_or(|until| until < gap.next);
        // Compaction may leave a single gap, too; then nothing else contradicts it.
        if target.is_partition() && (is_lost || !findings.faults.is_empty()) {
            findings.fault(&gap.file, gap.position, Some(gap.from), FaultKind::Offsets, detail);
        } else {
            findings.note(&gap.file, gap.position, Some(gap.from), FaultKind::Offsets, detail);
        }
        Ok(())
    }
}

/// Files of segments whose `.log` is not there, one of each, by base offset; none while a segment takes others' place.
fn orphans(target: &Target) -> Result<BTreeMap<i64, String>, InspectError> {
    let entries = target.files.list(&target.dir).map_err(at(&target.dir))?;
    let mut orphans = BTreeMap::new();
    let mut known = Vec::new();
    for entry in entries.iter().filter(|entry| !entry.is_dir) {
        let Some((base_offset, extension)) = parse_segment_file_name(&entry.name) else { continue };
        if extension.ends_with(swap::SWAP) {
            return Ok(BTreeMap::new());
        }
        if extension == ".log" || extension.strip_suffix(retention::DELETED) == Some(".log") {
            known.push(base_offset);
        } else if retention::DERIVED.contains(&extension) {
            orphans.entry(base_offset).or_insert_with(|| entry.name.clone());
        }
    }
    known.iter().for_each(|base_offset| drop(orphans.remove(base_offset)));
    Ok(orphans)
}
