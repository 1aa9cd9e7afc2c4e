//! Opening a log: what is checked when it was closed in good order, and what is scanned when it was not.
//!
//! Owns: the judgement of every file of a partition's folder, and what the log's state is at the start. Refuses: mending damage
//! (the inspection's `repair` does, on a copy). Read next: `scan.rs`.
//!
//! * Below the recovery point everything was flushed: whatever is wrong there is corruption, and the log does not open.
//! * From the recovery point on, the first batch that is invalid ends the log, and what follows is cut, if it can be a torn write:
//!   at most `unflushed_limit_bytes` are ever written and not flushed, so a valid batch further beyond says that these bytes were
//!   flushed, and that this is corruption too.
//! * Reserved space reads as zeros, and a recycled file's rest holds batches with smaller offsets: both end the log without a loss.
//! * The page cache is not believed: what lies beyond the recovery point is written again and synced before it counts, because pages
//!   whose write failed may be clean in memory and missing on the disk.
//! * Indexes, checksums, snapshots and epochs are made from the log; damaged ones are made anew and reported.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::active::{Active, Place, crc_header, read_crc_file};
use crate::checkpoint::{self, CheckpointError, parse_segment_file_name, segment_file_name};
use crate::compaction::swap;
use crate::config::OpenHints;
use crate::crcfile::{self, RunningCrc};
use crate::epochs::{self, LeaderEpochs};
use crate::error::{Corruption, During, IoFailure, OpenError, ReadError};
use crate::files::{self, OpenMode, parent};
use crate::index::IndexBuilder;
use crate::metrics as names;
use crate::producers::{self, ProducerState};
use crate::reader::{RecentEnds, SegmentEntry};
use crate::replay::{self, remove_snapshots, snapshot_offsets};
use crate::scan::{self, Checked, IndexAudit, SegmentScan};
use crate::segment::Segment;

/// How far recoveries are, of all logs that were given it. A log that was closed in good order adds nothing.
#[derive(Debug, Default)]
pub struct RecoveryProgress {
    to_scan_bytes: AtomicU64,
    scanned_bytes: AtomicU64,
}

impl RecoveryProgress {
    /// Bytes that are to be scanned, as far as is known: a log adds its own when it begins.
    pub fn to_scan_bytes(&self) -> u64 {
        self.to_scan_bytes.load(Ordering::Acquire)
    }

    /// Bytes of them that are behind.
    pub fn scanned_bytes(&self) -> u64 {
        self.scanned_bytes.load(Ordering::Acquire)
    }
}

/// What opening a log found and did.
#[derive(Debug, Clone, Default)]
pub struct RecoveryReport {
    /// The log was taken as it was closed: nothing was scanned.
    pub clean: bool,
    /// Bytes that were read and checked.
    pub scanned_bytes: u64,
    /// Batches that were read and checked.
    pub scanned_batches: u64,
    /// What was cut off the end: a torn write. Zeros and stale bytes of recycled files do not count.
    pub cut: Option<CutTail>,
    /// Files that were missing or made no sense, and were made anew from the log.
    pub rebuilt: Vec<PathBuf>,
    /// Segments whose reserved space was still there.
    pub finished_trims: Vec<PathBuf>,
    /// Checksum files that disagree with a log whose batches are all valid: Kafka wrote here, or the folder was copied
    /// under another name. They were made anew.
    pub crc_disagreements: Vec<CrcDisagreement>,
}

/// A torn write that recovery cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutTail {
    /// The segment.
    pub path: PathBuf,
    /// Where it was cut, in bytes.
    pub position: u64,
    /// How many bytes were lost.
    pub bytes: u64,
    /// The offset that is next now.
    pub next_offset: i64,
    /// Why the bytes there are no batch.
    pub detail: String,
}

/// A checksum file that disagrees with its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrcDisagreement {
    /// The checksum file.
    pub path: PathBuf,
    /// The first position of the log up to which it disagrees; 0 if the file is for another segment or unreadable.
    pub position: u64,
    /// How it disagrees.
    pub detail: String,
}

/// The state that a log begins with.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) sealed: Vec<SegmentEntry>,
    pub(crate) active: Active,
    pub(crate) producers: ProducerState,
    pub(crate) epochs: LeaderEpochs,
    pub(crate) epochs_changed: bool,
    pub(crate) log_start: i64,
    pub(crate) next_offset: i64,
}

/// What all steps of opening a log need.
struct Opening<'a> {
    place: Place<'a>,
    hints: OpenHints,
    now_ms: i64,
    report: RecoveryReport,
    epochs: LeaderEpochs,
    epochs_changed: bool,
    progress: &'a RecoveryProgress,
    /// Bytes that were announced to `progress` and are not behind yet.
    announced_bytes: u64,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        // What was cut, or is left since something else ended the recovery.
        self.progress.scanned_bytes.fetch_add(self.announced_bytes, Ordering::AcqRel);
    }
}

/// Opens the folder of a partition.
pub(crate) fn recover(
    place: Place<'_>,
    hints: OpenHints,
    now_ms: i64,
    progress: &RecoveryProgress,
) -> Result<(Recovered, RecoveryReport), OpenError> {
    let Place { files, dir, .. } = place;
    let mut opening = Opening {
        place,
        hints,
        now_ms,
        report: RecoveryReport { clean: hints.clean_shutdown, ..Default::default() },
        epochs: LeaderEpochs::default(),
        epochs_changed: false,
        progress,
        announced_bytes: 0,
    };
    if !files::exists(&**files, dir).during("look at", dir)? {
        files.create_dir_all(dir).during("create", dir)?;
        files.sync_dir(parent(dir)).during("sync", parent(dir))?;
    }
    opening.tidy()?;
    opening.claim()?;
    let bases = opening.base_offsets()?;
    let epochs_known = opening.read_epochs()?;
    let recovered = if bases.is_empty() { opening.create()? } else { opening.segments(&bases, epochs_known)? };
    Ok((recovered, std::mem::take(&mut opening.report)))
}

impl Opening<'_> {
    /// Finishes or undoes what was interrupted, and removes what it left behind.
    fn tidy(&mut self) -> Result<(), OpenError> {
        for path in swap::finish_or_undo(&**self.place.files, self.place.dir)? {
            tracing::info!(path = %path.display(), "finished putting a compacted segment in its place");
        }
        for entry in self.place.files.list(self.place.dir).during("list", self.place.dir)? {
            let leftover = [".tmp", crate::retention::DELETED, ".cleaned"].iter().any(|end| entry.name.ends_with(end));
            if leftover && !entry.is_dir {
                let path = self.place.dir.join(&entry.name);
                self.place.files.remove_file(&path).during("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Makes sure that the folder is this topic's.
    fn claim(&self) -> Result<(), OpenError> {
        match checkpoint::read_partition_metadata(&**self.place.files, self.place.dir) {
            Ok(Some(found)) if found == self.place.identity.topic_id => Ok(()),
            Ok(Some(found)) => Err(OpenError::ForeignTopic {
                path: self.place.dir.to_path_buf(),
                found: found.to_string(),
                expected: self.place.identity.topic_id.to_string(),
            }),
            Ok(None) => Ok(checkpoint::write_partition_metadata(
                &**self.place.files,
                self.place.dir,
                self.place.identity.topic_id,
            )?),
            Err(CheckpointError::Io(failure)) => Err(failure.into()),
            Err(CheckpointError::Damaged { path, fault }) => {
                let detail = format!("line {}: {}", fault.line, fault.detail);
                Err(Corruption { path, position: 0, offset: None, detail }.into())
            }
        }
    }

    fn base_offsets(&self) -> Result<Vec<i64>, OpenError> {
        let mut bases = Vec::new();
        let entries = self.place.files.list(self.place.dir).during("list", self.place.dir)?;
        for (base_offset, extension) in entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name)) {
            if extension == ".log" {
                bases.push(base_offset);
            }
        }
        bases.sort_unstable();
        // An index whose segment was deleted before it was.
        for (base_offset, extension) in entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name)) {
            let derived = [".index", ".timeindex", ".crc", ".txnindex"].contains(&extension);
            if derived && bases.binary_search(&base_offset).is_err() {
                let path = self.place.dir.join(segment_file_name(base_offset, extension));
                self.place.files.remove_file(&path).during("remove", &path)?;
            }
        }
        Ok(bases)
    }

    /// The history of leader epochs; whether it could be read.
    fn read_epochs(&mut self) -> Result<bool, OpenError> {
        let path = self.place.dir.join(epochs::FILE_NAME);
        match files::read(&**self.place.files, &path, 16 << 20) {
            Ok(bytes) => match LeaderEpochs::decode(&bytes) {
                Ok(epochs) => self.epochs = epochs,
                Err(fault) => {
                    tracing::warn!(path = %path.display(), %fault, "damaged; made anew from the log");
                    self.report.rebuilt.push(path);
                    return Ok(false);
                }
            },
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(IoFailure::new("read", &path, error).into()),
        }
        Ok(true)
    }

    /// An empty log.
    fn create(&mut self) -> Result<Recovered, OpenError> {
        let start = self.hints.log_start_offset.max(0);
        if self.hints.recovery_point > start {
            let detail = format!(
                "there is no segment, though {} says that everything before offset {} was flushed",
                checkpoint::RECOVERY_POINTS,
                self.hints.recovery_point
            );
            let path = self.place.dir.join(segment_file_name(start, ".log"));
            return Err(Corruption { path, position: 0, offset: Some(start), detail }.into());
        }
        let active = Active::begin(self.place, start, None, self.now_ms)?;
        remove_snapshots(&**self.place.files, self.place.dir, |_| true)?;
        self.place.files.sync_dir(self.place.dir).during("sync", self.place.dir)?;
        let epochs_changed = !self.epochs.entries().is_empty();
        Ok(Recovered {
            sealed: Vec::new(),
            active,
            producers: ProducerState::default(),
            epochs: LeaderEpochs::default(),
            epochs_changed,
            log_start: start,
            next_offset: start,
        })
    }

    fn segments(&mut self, bases: &[i64], epochs_known: bool) -> Result<Recovered, OpenError> {
        // Those that end before the log start were deleted, or were about to be.
        let departed = bases.windows(2).take_while(|pair| pair[1] <= self.hints.log_start_offset).count();
        let departed = if self.keep_producers(bases, departed)? { departed } else { 0 };
        let (departed, bases) = bases.split_at(departed);
        departed.iter().try_for_each(|base_offset| self.remove_segment(*base_offset))?;
        // The first segment of which something may not have been flushed.
        let first_scanned = match self.hints.clean_shutdown {
            true => bases.len(),
            false => bases.partition_point(|base| *base <= self.hints.recovery_point).saturating_sub(1),
        };
        for base_offset in bases.get(first_scanned..).unwrap_or_default() {
            let path = self.place.dir.join(segment_file_name(*base_offset, ".log"));
            self.announce(self.place.files.metadata(&path).during("look at", &path)?.len);
        }
        let mut entries: Vec<SegmentEntry> = Vec::with_capacity(bases.len());
        let mut active = None;
        let mut next_offset = bases.first().copied().unwrap_or(0);
        let mut number = 0;
        while let Some(base_offset) = bases.get(number).copied() {
            if base_offset < next_offset {
                let detail = format!("it begins before offset {next_offset}, where the segment before it ends");
                let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
                return Err(Corruption { path, position: 0, offset: Some(base_offset), detail }.into());
            }
            let later = bases.get(number + 1..).unwrap_or_default();
            let (opened, ends_here) = match number < first_scanned {
                true => self.check(base_offset, later)?,
                false => self.scan(base_offset, later)?,
            };
            if ends_here {
                self.remove_later(later)?;
                number = bases.len();
            }
            next_offset = opened.next_offset;
            number += 1;
            let opened = opened.active;
            entries.push(opened.entry());
            active = Some(opened);
        }
        let Some(mut active) = active else {
            return Err(OpenError::Misuse("a log without a segment".into()));
        };
        if next_offset < self.hints.recovery_point && self.hints.log_start_offset < self.hints.recovery_point {
            let detail = format!(
                "the log ends at offset {next_offset}, though {} says that everything before {} was flushed",
                checkpoint::RECOVERY_POINTS,
                self.hints.recovery_point
            );
            let (path, position) = (active.segment.log_path(), active.size);
            return Err(Corruption { path, position, offset: Some(next_offset), detail }.into());
        }
        if !epochs_known {
            self.rebuild_epochs(&entries)?;
        }
        self.epochs_changed |= self.epochs.truncate_from(next_offset);
        let log_start = self.hints.log_start_offset.max(entries.first().map_or(0, SegmentEntry::base_offset));
        let producers = replay::replay_producers(
            &**self.place.files,
            self.place.dir,
            &entries,
            next_offset,
            self.now_ms,
            &mut self.report.rebuilt,
        )
        .map_err(|error| self.locate(error))?;
        entries.pop();
        let mut recovered = Recovered {
            sealed: entries,
            active,
            producers,
            epochs: std::mem::take(&mut self.epochs),
            epochs_changed: self.epochs_changed,
            log_start,
            next_offset,
        };
        if log_start > next_offset {
            self.restart_at(&mut recovered, log_start)?;
        } else {
            recovered.epochs_changed |= recovered.epochs.start_at(log_start);
        }
        active = recovered.active;
        active.segment.expect_bytes(u64::from(self.place.config.segment_bytes));
        recovered.active = active;
        if !self.hints.clean_shutdown {
            if let Some(newest) = snapshot_offsets(&**self.place.files, self.place.dir)?.last() {
                self.sync_file(*newest, producers::EXTENSION)?;
            }
            self.place.files.sync_dir(self.place.dir).during("sync", self.place.dir)?;
        }
        Ok(recovered)
    }

    /// Makes sure that what the first segments know of producers is kept once they are removed: a crash may have come before the snapshot
    /// that a roll writes behind them. Whether they may go; they stay while there is no room for it.
    fn keep_producers(&self, bases: &[i64], departed: usize) -> Result<bool, OpenError> {
        let Some((departed, to)) = bases.get(..departed).filter(|bases| !bases.is_empty()).zip(bases.get(departed))
        else {
            return Ok(true);
        };
        let Place { files, dir, .. } = self.place;
        let Some(owed) = replay::producers_owed(files, dir, departed, *to, self.now_ms)? else { return Ok(true) };
        let path = dir.join(segment_file_name(*to, producers::EXTENSION));
        match files::replace(&**files, &path, &producers::encode_snapshot(&owed.snapshot())) {
            Err(error) if files::is_full(&error) => Ok(false),
            result => Ok(result.during("write", &path).map(|()| true)?),
        }
    }

    /// The log was moved to begin beyond what a crash left of it: it goes on, empty, where it was to begin, so that no offset is given twice.
    fn restart_at(&mut self, recovered: &mut Recovered, log_start: i64) -> Result<(), OpenError> {
        let active = Active::begin(self.place, log_start, None, self.now_ms)?;
        let old = std::mem::replace(&mut recovered.active, active);
        recovered.next_offset = log_start;
        self.place.files.sync_dir(self.place.dir).during("sync", self.place.dir)?;
        for entry in recovered.sealed.drain(..).chain([old.entry()]) {
            self.remove_segment(entry.base_offset())?;
        }
        Ok(())
    }

    /// The end of a process may have come between the write of a file and its sync.
    fn sync_file(&self, base_offset: i64, extension: &str) -> Result<(), OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, extension));
        match self.place.files.open(&path, OpenMode::Write).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => Ok(result.during("sync", &path)?),
        }
    }

    /// A segment that was complete when it was last written: its ends are looked at, not what lies between.
    /// Also returns whether the log ends in it although later segments exist.
    fn check(&mut self, base_offset: i64, later: &[i64]) -> Result<(OpenedSegment, bool), OpenError> {
        let next_base = later.first().copied();
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let metadata = self.place.files.metadata(&path).during("look at", &path)?;
        if !self.hints.clean_shutdown && next_base.is_some_and(|next| next >= self.hints.recovery_point) {
            [".index", ".timeindex", ".crc"].iter().try_for_each(|extension| self.sync_file(base_offset, extension))?;
        }
        let checked = scan::check_segment(self.place, base_offset, metadata, next_base);
        let complete = matches!(checked, Ok(Checked::Complete(_)));
        if !complete && !self.hints.clean_shutdown && self.first_written(later)?.is_none() {
            // The crash came when the next segment had been begun and this one was not sealed yet.
            return self.scan(base_offset, later);
        }
        match checked? {
            Checked::Complete(complete) => {
                let active = Active {
                    segment: complete.segment,
                    size: complete.size,
                    reserved: metadata.len,
                    index: complete.index,
                    crc: complete.crc,
                    first_timestamp: complete.first_timestamp,
                    begun_ms: self.now_ms,
                    last_append_ms: metadata.modified_ms,
                    recycled: false,
                    recent: RecentEnds::default(),
                    unflushed: None,
                };
                Ok((OpenedSegment { active, next_offset: complete.next_offset }, false))
            }
            Checked::Suspect(why) => {
                tracing::info!(path = %path.display(), why, "reading the segment whole");

                let rebuilt_before = self.report.rebuilt.len();
                self.announce(metadata.len);
                let scanned = self.scan_segment(base_offset, i64::MAX, next_base)?;
                if why.contains("index") && self.report.rebuilt.len() == rebuilt_before {
                    self.report.rebuilt.push(path.with_extension(if why.contains("time") {
                        "timeindex"
                    } else {
                        "index"
                    }));
                }
                let zeros_follow = scanned.fault.as_ref().is_some_and(|fault| fault.zeros_follow);
                if let Some(fault) = scanned.fault.as_ref().filter(|_| !zeros_follow) {
                    return Err(fault.corruption(&path).into());
                }
                Ok((self.adopt(scanned, metadata.modified_ms, false)?, false))
            }
        }
    }

    /// A segment that a crash may have torn. Also returns whether the log ends in it although later segments exist.
    fn scan(&mut self, base_offset: i64, later: &[i64]) -> Result<(OpenedSegment, bool), OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let metadata = self.place.files.metadata(&path).during("look at", &path)?;
        let scanned = self.scan_segment(base_offset, self.hints.recovery_point, later.first().copied())?;
        let mut ends_here = false;
        let end = scanned.next_offset;
        if scanned.fault.is_none() && later.first().is_some_and(|next| *next != end) {
            match self.first_written(later)? {
                // Segments were begun for a group whose beginning was never written here.
                None => ends_here = true,
                Some(_) if self.place.config.cleanup.compact || end < self.hints.recovery_point => {}
                Some(goes_on) => {
                    let detail = format!("it ends before offset {end}; {} goes on behind it", goes_on.display());
                    return Err(Corruption { path, position: scanned.end, offset: Some(end), detail }.into());
                }
            }
        }
        if let Some(fault) = &scanned.fault {
            // Where the next segment goes on exactly here, what follows was reserved, or is stale.
            let continued = later.first() == Some(&fault.expected_offset);
            let only_reserved = fault.zeros_follow && later.is_empty();
            if !continued && !only_reserved {
                self.judge(&path, &scanned, later)?;
                ends_here = true;
            }
            if !continued && !fault.zeros_follow && !fault.stale_follows {
                let bytes = scanned.len - fault.position;
                tracing::warn!(path = %path.display(), position = fault.position, bytes, detail = fault.detail, "cut a torn write");
                metrics::counter!(names::CUT_BYTES).increment(bytes);
                self.report.cut = Some(CutTail {
                    path,
                    position: fault.position,
                    bytes,
                    next_offset: fault.expected_offset,
                    detail: fault.detail.clone(),
                });
            }
        }
        Ok((self.adopt(scanned, metadata.modified_ms, true)?, ends_here))
    }

    /// Whether an invalid batch can be a torn write; if not, it is corruption.
    fn judge(&self, path: &Path, scanned: &SegmentScan, later: &[i64]) -> Result<(), OpenError> {
        let Some(fault) = &scanned.fault else { return Ok(()) };
        if fault.expected_offset < self.hints.recovery_point {
            return Err(fault.corruption(path).into());
        }
        let beyond = fault.position.saturating_add(self.place.config.unflushed_limit_bytes);
        let file = self.place.files.open(path, OpenMode::Read).during("open", path)?;
        let found = scan::find_batch(&*file, path, beyond, scanned.len, fault.expected_offset)?;
        if let Some(position) = found {
            let mut corruption = fault.corruption(path);
            corruption.detail.push_str(&format!("; a valid batch follows at position {position}"));
            return Err(corruption.into());
        }
        // A segment is flushed before the next one is written.
        if let Some(goes_on) = self.first_written(later)? {
            let mut corruption = fault.corruption(path);
            corruption.detail.push_str(&format!("; {} goes on behind it", goes_on.display()));
            return Err(corruption.into());
        }
        Ok(())
    }

    /// The first of these segments that begins with a batch of its own.
    fn first_written(&self, bases: &[i64]) -> Result<Option<PathBuf>, OpenError> {
        for base_offset in bases {
            let path = self.place.dir.join(segment_file_name(*base_offset, ".log"));
            let file = self.place.files.open(&path, OpenMode::Read).during("open", &path)?;
            let len = file.len().during("look at", &path)?;
            if scan::batch_at(&*file, &path, 0, len)?.is_some_and(|header| header.base_offset >= *base_offset) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    fn announce(&mut self, bytes: u64) {
        self.announced_bytes += bytes;
        self.progress.to_scan_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    fn scan_segment(
        &mut self,
        base_offset: i64,
        recovery_point: i64,
        next_base: Option<i64>,
    ) -> Result<SegmentScan, OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let file = self.place.files.open(&path, OpenMode::Write).during("open", &path)?;
        let crc = RunningCrc::new(&crc_header(self.place.identity, base_offset));
        let index = IndexBuilder::new(base_offset, self.place.config.index_interval_bytes);
        let rules = scan::ScanRules {
            base_offset,
            // Compaction leaves gaps; nothing else does.
            exact_from: if self.place.config.cleanup.compact { i64::MAX } else { recovery_point },
            compacted: self.place.config.cleanup.compact,
            next_base,
            rewrite_from: recovery_point,
        };
        let found = |extension| {
            let path = self.place.dir.join(segment_file_name(base_offset, extension));
            match files::read(&**self.place.files, &path, 1 << 30) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(IoFailure::new("read", &path, error)),
            }
        };
        let mut audit = IndexAudit::new(base_offset, found(".index")?, found(".timeindex")?);
        let (epochs, progress, announced) = (&mut self.epochs, self.progress, &mut self.announced_bytes);
        let mut epochs_changed = false;
        let mut behind = |bytes: u64| {
            let bytes = bytes.min(*announced);
            *announced -= bytes;
            progress.scanned_bytes.fetch_add(bytes, Ordering::AcqRel);
        };
        let scanned = scan::scan_segment(&*file, &path, rules, index, crc, &mut audit, |header| {
            epochs_changed |= epochs.assign(header.leader_epoch, header.base_offset);
            behind(header.size() as u64);
        })?;
        behind(scanned.len - scanned.end);
        for (extension, wrong) in [(".index", audit.wrong_offsets), (".timeindex", audit.wrong_times)] {
            if wrong {
                let path = self.place.dir.join(segment_file_name(base_offset, extension));
                tracing::warn!(path = %path.display(), "damaged; made anew from the log");
                self.report.rebuilt.push(path);
            }
        }
        self.epochs_changed |= epochs_changed;
        self.report.scanned_bytes += scanned.end;
        self.report.scanned_batches += scanned.batches;
        metrics::counter!(names::RECOVERED_BYTES).increment(scanned.end);
        Ok(scanned)
    }

    /// Takes a scanned segment as it is: cut to its valid batches, its derived files made from them, everything synced.
    /// `torn` if the crash may have come while its files were written.
    fn adopt(&mut self, scanned: SegmentScan, modified_ms: i64, torn: bool) -> Result<OpenedSegment, OpenError> {
        let base_offset = scanned.base_offset;
        let segment =
            Segment::new(Arc::clone(self.place.files), Arc::clone(self.place.dir), base_offset, scanned.end, 0, 0);
        let path = segment.log_path();
        let file = self.place.files.open(&path, OpenMode::Write).during("open", &path)?;
        if scanned.len > scanned.end {
            file.set_len(scanned.end).during("cut", &path)?;
            if scanned.fault.as_ref().is_some_and(|fault| fault.zeros_follow || fault.stale_follows) {
                self.report.finished_trims.push(path.clone());
            }
        }
        file.sync_all().during("sync", &path)?;
        let mut index = scanned.index;
        let mut entries = scanned.entries;
        index.seal(&mut entries);
        segment.rewrite_indexes(entries)?;
        self.compare_crc(&segment.path(".crc"), &scanned.crc, base_offset, scanned.flushed, torn)?;
        let mut active = Active {
            segment,
            size: scanned.end,
            reserved: scanned.end,
            index,
            crc: Some(scanned.crc),
            first_timestamp: scanned.first_timestamp,
            begun_ms: self.now_ms,
            last_append_ms: modified_ms,
            recycled: false,
            recent: RecentEnds::default(),
            unflushed: None,
        };
        active.seal(&**self.place.files, self.place.identity)?;
        Ok(OpenedSegment { active, next_offset: scanned.next_offset })
    }

    /// Whether a checksum file may be what a crash left of a write: short, or with zeros where an entry should be.
    fn looks_torn(&self, path: &Path) -> Result<bool, OpenError> {
        let bytes = files::read(&**self.place.files, path, 1 << 20).during("read", path)?;
        let entry_bytes = crcfile::ENTRY_BYTES;
        let is_short = bytes.len() < crcfile::HEADER_BYTES || !bytes.len().is_multiple_of(entry_bytes);
        Ok(is_short || bytes.chunks(entry_bytes).any(|entry| entry.iter().all(|byte| *byte == 0)))
    }

    /// Reports where a checksum file disagrees with a log of valid batches. `flushed`: bytes that lie below the recovery point.
    fn compare_crc(
        &mut self,
        path: &Path,
        computed: &RunningCrc,
        base_offset: i64,
        flushed: u64,
        torn: bool,
    ) -> Result<(), OpenError> {
        let found = read_crc_file(&**self.place.files, path)?;
        let torn = torn && matches!(found, Some(Err(_))) && self.looks_torn(path)?;
        let mut report = |position: u64, detail: String| {
            tracing::warn!(path = %path.display(), position, detail, "the checksum file disagrees with valid batches");
            self.report.crc_disagreements.push(CrcDisagreement { path: path.into(), position, detail });
        };
        match found {
            None => {}
            Some(Err(_)) if torn => {}
            Some(Err(fault)) => report(0, fault.to_string()),
            Some(Ok(file)) if file.header != crc_header(self.place.identity, base_offset) => {
                report(0, format!("it was written for {:?}", file.header));
            }
            Some(Ok(file)) => {
                let right: BTreeMap<u32, u32> =
                    computed.pending().chain([computed.entry()]).map(|entry| (entry.position, entry.crc)).collect();
                let wrong =
                    file.entries.iter().find(|entry| right.get(&entry.position).is_some_and(|crc| *crc != entry.crc));
                if let Some(entry) = wrong {
                    let position = u64::from(entry.position);
                    let as_long =
                        file.entries.last().is_some_and(|last| u64::from(last.position) >= computed.position());
                    if position <= flushed && as_long {
                        // Changed in place, in bytes that batch checksums leave out.
                        let detail =
                            format!("bytes before here are not those that were written, as {} says", path.display());
                        let log = path.with_extension("log");
                        return Err(Corruption { path: log, position, offset: None, detail }.into());
                    }
                    report(position, "the bytes up to here are others".into());
                }
            }
        }
        Ok(())
    }

    /// A walk over headers that came upon something else than a batch says where; the damage may lie further ahead, in a
    /// length. A scan finds it.
    fn locate(&mut self, error: ReadError) -> OpenError {
        let error = from_reading(error);
        let OpenError::Corruption(corruption) = &error else { return error };
        let name = corruption.path.file_name().and_then(|name| name.to_str());
        let Some((base_offset, ".log")) = name.and_then(parse_segment_file_name) else { return error };
        match self.scan_segment(base_offset, i64::MAX, None) {
            Ok(SegmentScan { fault: Some(fault), .. }) if fault.position < corruption.position => {
                fault.corruption(&corruption.path).into()
            }
            _ => error,
        }
    }

    fn remove_later(&self, later: &[i64]) -> Result<(), OpenError> {
        later.iter().rev().try_for_each(|base_offset| self.remove_segment(*base_offset))
    }

    fn remove_segment(&self, base_offset: i64) -> Result<(), OpenError> {
        for extension in [".log", ".index", ".timeindex", ".crc", ".txnindex"] {
            let path = self.place.dir.join(segment_file_name(base_offset, extension));
            files::remove_if_exists(&**self.place.files, &path).during("remove", &path)?;
        }
        Ok(())
    }

    fn rebuild_epochs(&mut self, entries: &[SegmentEntry]) -> Result<(), OpenError> {
        self.epochs = LeaderEpochs::default();
        for entry in entries {
            let mut headers = entry.segment.headers(0).map_err(from_reading)?.until(entry.size);
            while let Some((_, header)) = headers.next().map_err(from_reading)? {
                self.epochs_changed |= self.epochs.assign(header.leader_epoch, header.base_offset);
            }
        }
        Ok(())
    }
}

struct OpenedSegment {
    active: Active,
    next_offset: i64,
}

fn from_reading(error: ReadError) -> OpenError {
    match error {
        ReadError::Io(failure) => failure.into(),
        ReadError::Corruption(corruption) => corruption.into(),
        error => OpenError::Misuse(error.to_string()),
    }
}
