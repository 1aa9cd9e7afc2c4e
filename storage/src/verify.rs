//! Bad bytes are never served: what was on the disk before this process is checked once before it is handed out.
//!
//! Owns: which ranges of a segment were checked, and the check. Refuses: what recovery scanned and what this process appended: that
//! was checked already. Read next: `segment.rs`.
//!
//! Blocks of 64 KiB are compared with the `.crc` file; where there is none (Kafka wrote the segment), batches are checked by their own
//! checksums, and their leader epochs, which those leave out, by the history of the moment when the log was opened. Where not all of that history
//! was held against the batches then, it is held against a segment's before the segment is first served: `recovery/history.rs`. Bytes that differ in a segment which is as long as its `.crc` says were changed in place, and are damage, even where every batch is
//! valid by itself: its checksum leaves out the first 21 bytes. If the length differs too, Kafka appended or compacted here; then valid
//! batches are good enough, and the disagreement is reported once. So they are for whoever still reads a segment that compaction replaced: the
//! `.crc` of that name is its successor's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use headwater_proto::batch::{self, BatchHeader, HEADER_BYTES};

use crate::active::read_crc_file;
use crate::crcfile::{CrcFile, RunningCrc, STEP_BYTES};
use crate::epochs::{self, LeaderEpochs};
use crate::error::{Corruption, During, ReadError, bad_batch};
use crate::files::{self, read_exact_at};
use crate::index::IndexBuilder;
use crate::recovery::history;
use crate::scan::{self, EpochAudit, IndexAudit, ScanRules, ScanStart};
use crate::segment::{Opened, Segment, lock};

/// What of a segment was checked.
#[derive(Debug, Default)]
pub(crate) struct Verified {
    /// Bytes from here on were written or scanned by this process.
    below: AtomicU64,
    /// Ranges before that which were checked: start and end, apart from each other.
    ranges: Mutex<BTreeMap<u64, u64>>,
    /// The checksum file disagrees with valid batches.
    ignore_crc: AtomicBool,
    /// Who wrote the bytes that were there before this process.
    epochs: OnceLock<Arc<LeaderEpochs>>,
    /// Not all of that was held against the batches of this segment.
    history_in_doubt: AtomicBool,
}

impl Verified {
    /// Nothing before `below` was checked.
    pub(crate) fn distrust(&self, below: u64) {
        self.below.store(below, Ordering::Release);
    }

    /// What the leader epochs of batches before `below` must be; `in_doubt` if the batches have yet to be asked.
    pub(crate) fn expect_epochs(&self, epochs: &Arc<LeaderEpochs>, in_doubt: bool) {
        self.history_in_doubt.store(in_doubt, Ordering::Relaxed);
        // Once: they are those of the moment when the log was opened.
        let _ = self.epochs.set(Arc::clone(epochs));
    }

    /// Whether the checksum file turned out not to be this log's.
    pub(crate) fn ignores_crc(&self) -> bool {
        self.ignore_crc.load(Ordering::Relaxed)
    }

    /// Whether a range was checked.
    pub(crate) fn contains(&self, range: &Range<u64>) -> bool {
        let end = range.end.min(self.below.load(Ordering::Acquire));
        if range.start >= end {
            return true;
        }
        let ranges = lock(&self.ranges);
        ranges.range(..=range.start).next_back().is_some_and(|(_, known_end)| *known_end >= end)
    }

    fn insert(&self, range: Range<u64>) {
        let mut ranges = lock(&self.ranges);
        let (mut start, mut end) = (range.start, range.end);
        while let Some((known_start, known_end)) = ranges.range(..=end).next_back().map(|(start, end)| (*start, *end)) {
            if known_end < start {
                break;
            }
            ranges.remove(&known_start);
            (start, end) = (start.min(known_start), end.max(known_end));
        }
        ranges.insert(start, end);
    }
}

/// Checks a range of a segment that is in memory. `boundary` is where a batch begins, at or before the range.
pub(crate) fn verify(segment: &Arc<Segment>, open: &Opened, range: Range<u64>, boundary: u64) -> Result<(), ReadError> {
    if segment.verified.contains(&range) {
        return Ok(());
    }
    if segment.verified.history_in_doubt.load(Ordering::Relaxed) {
        verify_history(segment, open)?;
        segment.verified.history_in_doubt.store(false, Ordering::Relaxed);
    }
    verify_bytes(segment, open, range, boundary)
}

/// Holds the history of leader epochs against a segment's batches.
fn verify_history(segment: &Arc<Segment>, open: &Opened) -> Result<(), ReadError> {
    let Some(known) = segment.verified.epochs.get() else { return Ok(()) };
    let below = segment.verified.below.load(Ordering::Acquire);
    let Some(((position, header), said)) = history::contradicted_within(segment, below, known)? else { return Ok(()) };
    // Unless it is the batch that is wrong.
    verify_bytes(segment, open, position..(position + header.size() as u64).min(below), position)?;
    let path = segment.path("").with_file_name(epochs::FILE_NAME);
    let line = format!("{} {}", said.epoch, said.start_offset);
    let text = files::read(segment.files(), &path, 16 << 20).during("read", &path)?;
    let before =
        text.split_inclusive(|byte| *byte == b'\n').take_while(|text| text.trim_ascii_end() != line.as_bytes());
    let (number, bytes) = before.fold((1, 0), |(number, bytes), line| (number + 1, bytes + line.len() as u64));
    let detail = format!(
        "line {number} says that epoch {} began at offset {}, and the batch of leader epoch {} at position {position} of {} says otherwise; it is made anew when the log is opened again",
        said.epoch,
        said.start_offset,
        header.leader_epoch,
        segment.log_path().display()
    );
    Err(Corruption { path, position: bytes, offset: Some(header.base_offset), detail }.into())
}

fn verify_bytes(segment: &Arc<Segment>, open: &Opened, range: Range<u64>, boundary: u64) -> Result<(), ReadError> {
    let verified = &segment.verified;
    let below = verified.below.load(Ordering::Acquire);
    if !verified.ignore_crc.load(Ordering::Relaxed)
        && let Some(file) = crc_file(segment)?
        // Asked after the file was read: a segment is ended before its names are another's.
        && !segment.is_retired()
    {
        let blocks = range.start / STEP_BYTES * STEP_BYTES..range.end.next_multiple_of(STEP_BYTES).min(below);
        return match compare(segment, open, &file, blocks.clone(), below)? {
            None => {
                verified.insert(blocks);
                Ok(())
            }
            Some(position) => judge(segment, open, &file, position, below),
        };
    }
    let mut at = boundary;
    let path = segment.log_path();
    let corrupt = |position, error| ReadError::Corruption(bad_batch(&path, position, None, &error));
    let mut bytes = Vec::new();
    while at < range.end.min(below) {
        let mut header = [0; HEADER_BYTES];
        read_exact_at(&*open.file, &mut header, at).during("read", &path)?;
        let header = BatchHeader::parse(&header).map_err(|error| corrupt(at, error))?;
        // `below` may lie within the batch.
        bytes.resize(header.size().min(segment.published().saturating_sub(at) as usize), 0);
        read_exact_at(&*open.file, &mut bytes, at).during("read", &path)?;
        batch::check(&bytes).map_err(|error| corrupt(at, error))?;
        if let Some(detail) = verified.epochs.get().and_then(|epochs| epochs.contradiction(&header)) {
            return Err(ReadError::Corruption(Corruption {
                path,
                position: at,
                offset: Some(header.base_offset),
                detail,
            }));
        }
        at += bytes.len() as u64;
    }
    verified.insert(boundary..at);
    Ok(())
}

/// The segment's checksum file, if it can be used.
fn crc_file(segment: &Arc<Segment>) -> Result<Option<CrcFile>, ReadError> {
    let path = segment.path(".crc");
    match read_crc_file(segment.files(), &path)? {
        Some(Ok(file)) if file.header.base_offset == segment.base_offset => Ok(Some(file)),
        Some(Err(fault)) => {
            tracing::warn!(path = %path.display(), %fault, "damaged; batches are checked instead");
            segment.verified.ignore_crc.store(true, Ordering::Relaxed);
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Compares blocks with the checksum file; the position of the first that differs, or that it does not know.
fn compare(
    segment: &Arc<Segment>,
    open: &Opened,
    file: &CrcFile,
    blocks: Range<u64>,
    below: u64,
) -> Result<Option<u64>, ReadError> {
    let path = segment.log_path();
    let mut bytes = vec![0; STEP_BYTES as usize];
    let mut at = blocks.start;
    while at < blocks.end {
        let number = (at / STEP_BYTES) as usize;
        let end = (at + STEP_BYTES).min(below);
        let Some(after) = file.entries.get(number).filter(|entry| u64::from(entry.position) == end) else {
            return Ok(Some(at));
        };
        let mut running = match number.checked_sub(1).and_then(|before| file.entries.get(before)) {
            Some(before) => RunningCrc::resume(*before, number),
            None => RunningCrc::new(&file.header),
        };
        bytes.resize((end - at) as usize, 0);
        read_exact_at(&*open.file, &mut bytes, at).during("read", &path)?;
        running.update(&bytes);
        if running.entry() != *after {
            return Ok(Some(at));
        }
        at = end;
    }
    Ok(None)
}

/// A block differs: damage, if not every batch of the segment is valid and in order, or if nothing but bytes changed.
fn judge(segment: &Arc<Segment>, open: &Opened, file: &CrcFile, position: u64, below: u64) -> Result<(), ReadError> {
    let path = segment.log_path();
    let rules = ScanRules {
        base_offset: segment.base_offset,
        exact_from: i64::MAX,
        compacted: true,
        next_base: None,
        rewrite_from: i64::MAX,
    };
    // What is built along the way is not needed.
    let index = IndexBuilder::new(segment.base_offset, u32::MAX);
    let crc = RunningCrc::new(&file.header);
    let audit = IndexAudit::new(segment.base_offset, None, None, i64::MIN);
    let start = ScanStart::beginning(index, audit, crc, segment.base_offset);
    let known = segment.verified.epochs.get();
    let mut epochs = known.map(|epochs| LeaderEpochs::clone(epochs)).unwrap_or_default();
    let exact_below = if known.is_some() { i64::MAX } else { i64::MIN };
    let mut epochs = EpochAudit { epochs: &mut epochs, exact_below, changed: false };
    let scanned = scan::scan_segment(&*open.file, &path, rules, start, &mut epochs, |_| {})?;
    if let Some(fault) = scanned.fault.filter(|fault| fault.position < below) {
        let mut corruption: Corruption = fault.corruption(&path);
        corruption.detail.push_str(&format!("; the checksum of the 64 KiB at position {position} says so too"));
        return Err(corruption.into());
    }
    // Opening the log made sure that it did not reach beyond the segment's end.
    if file.entries.last().is_some_and(|last| u64::from(last.position) >= below) {
        let detail = "the 64 KiB from here on are not those that were written".into();
        return Err(Corruption { path, position, offset: None, detail }.into());
    }
    let crc_path = segment.path(".crc");
    tracing::warn!(path = %crc_path.display(), position, "the checksum file disagrees with valid batches");
    segment.verified.ignore_crc.store(true, Ordering::Relaxed);
    segment.verified.insert(0..below);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Verified;

    #[test]
    fn checked_ranges_grow_together() {
        let verified = Verified::default();
        assert!(verified.contains(&(0..100)));
        verified.distrust(1000);
        assert!(verified.contains(&(1000..5000)));
        assert!(!verified.contains(&(999..5000)));
        verified.insert(100..200);
        verified.insert(300..400);
        assert!(verified.contains(&(100..200)) && verified.contains(&(350..400)) && !verified.contains(&(150..350)));
        verified.insert(200..300);
        assert!(verified.contains(&(100..400)));
        verified.insert(0..1000);
        assert!(verified.contains(&(0..7000)));
        assert_eq!(verified.ranges.lock().unwrap().len(), 1);
    }
}
