//! Opening a log: what is checked when it was closed in good order, and what is scanned when it was not.
//!
//! Owns: the judgement of every file of a partition's folder, and what the log's state is at the start. Refuses: mending damage
//! (the inspection's `repair` does, on a copy). Read next: `recovery/segment.rs`, `prefix.rs`, then `scan.rs`.
//!
//! * Below the recovery point everything was flushed: whatever is wrong there is corruption. The log does not open if it is come upon;
//!   what was not scanned is checked against the `.crc` before it is first served. Of the recovery point's segment, that is what
//!   lies before the last checkpoint that the write half made within it (`prefix.rs` says what vouches for it).
//! * From the recovery point on, the first batch that is invalid ends the log, and what follows is cut, if it can be a torn write:
//!   at most `unflushed_limit_bytes` are ever written and not flushed, so a valid batch further beyond says that these bytes were
//!   flushed, and that this is corruption too.
//! * Reserved space reads as zeros, and a recycled file's rest holds batches with smaller offsets: both end the log without a loss.
//! * The page cache is not believed: what lies beyond the recovery point is written again and synced before it counts, because pages
//!   whose write failed may be clean in memory and missing on the disk. Where a sync is known to have failed, it is written to a new file
//!   (`recovery/renewal.rs`).
//! * Indexes, checksums, snapshots and epochs are made from the log; damaged ones are made anew and reported.

pub(crate) mod history;
pub(crate) mod neighbours;
pub(crate) mod owner;
pub(crate) mod renewal;
mod report;
mod segment;

use std::io::ErrorKind;
use std::sync::Arc;

use crate::active::{Active, Place, SYNC_FAILED};
use crate::checkpoint::{self, CheckpointError, parse_segment_file_name, segment_file_name};
use crate::compaction::swap;
use crate::config::OpenHints;
use crate::epochs::{self, LeaderEpochs};
use crate::error::{Corruption, During, IoFailure, OpenError};
use crate::files::{self, parent};
use crate::producers::{self, ProducerState};
use crate::reader::SegmentEntry;
use crate::replay::{self, remove_snapshots, snapshot_offsets};
use crate::segment::Segment;
use crate::verify;

use owner::Folder;
use renewal::Doubtful;
pub use report::{CrcDisagreement, CutTail, RecoveryProgress, RecoveryReport};
use segment::{OpenedSegment, from_reading};

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
    /// Up to where everything is on stable storage: the end, but for the doubtful ones.
    pub(crate) flushed: i64,
    /// Segments of which a sync failed, and for whose new files there was no room.
    pub(crate) doubtful: Vec<Doubtful>,
    /// Sealed segments whose indexes and checksums found no room.
    pub(crate) incomplete: Vec<Active>,
}

/// What all steps of opening a log need.
struct Opening<'a> {
    place: Place<'a>,
    hints: OpenHints,
    now_ms: i64,
    report: RecoveryReport,
    epochs: LeaderEpochs,
    epochs_changed: bool,
    /// The checkpoint of leader epochs could be read, and nothing speaks against it.
    epochs_known: bool,
    /// The checkpoint is there and has none.
    epochs_empty: bool,
    /// As the checkpoint has them.
    epochs_as_read: LeaderEpochs,
    /// Epochs that begin before this offset were not held against the batches.
    history_unseen_before: i64,
    /// Segments of which a sync failed when they were last written.
    failed_syncs: Vec<i64>,
    /// Those of them for whose new files there was no room.
    doubtful: Vec<Doubtful>,
    /// The segments.
    bases: Vec<i64>,
    /// Offset of the newest snapshot of the producers that can be read.
    snapshot: Option<i64>,
    /// The segment of which a scan began somewhere in the middle, and the bytes that it did not check.
    unchecked: Option<(Arc<Segment>, u64)>,
    progress: &'a RecoveryProgress,
    /// Bytes that were announced to `progress` and are not behind yet.
    announced_bytes: u64,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        // What was cut, or is left since something else ended the recovery.
        self.progress.behind(self.announced_bytes);
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
        epochs_known: false,
        epochs_empty: false,
        epochs_as_read: LeaderEpochs::default(),
        history_unseen_before: i64::MIN,
        failed_syncs: Vec::new(),
        doubtful: Vec::new(),
        bases: Vec::new(),
        snapshot: None,
        unchecked: None,
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
    opening.report.crc_disagreements.extend(owner::take_over(Folder::of(place, &progress.neighbours, now_ms), &bases)?);
    opening.read_epochs()?;
    opening.failed_syncs = renewal::failed_syncs(place)?;
    let recovered = if bases.is_empty() { opening.create()? } else { opening.segments(&bases)? };
    renewal::forget(place, &opening.failed_syncs)?;
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
                let position = if fault.line > 1 { checkpoint::METADATA_SECOND_LINE_AT } else { 0 };
                Err(Corruption { path, position, offset: None, detail }.into())
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
        // An index whose segment was deleted before it was, or the word of a sync that failed.
        for (base_offset, extension) in entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name)) {
            let derived = [".index", ".timeindex", ".crc", ".txnindex", SYNC_FAILED].contains(&extension);
            if derived && bases.binary_search(&base_offset).is_err() {
                let path = self.place.dir.join(segment_file_name(base_offset, extension));
                self.place.files.remove_file(&path).during("remove", &path)?;
            }
        }
        Ok(bases)
    }

    /// The history of leader epochs, if it can be read.
    fn read_epochs(&mut self) -> Result<(), OpenError> {
        let path = self.place.dir.join(epochs::FILE_NAME);
        match files::read(&**self.place.files, &path, 16 << 20) {
            Ok(bytes) => match LeaderEpochs::decode(&bytes) {
                // One that knows nothing says nothing of batches from before the log start, which may still be there.
                Ok(epochs) => {
                    self.epochs_known = !epochs.entries().is_empty();
                    self.epochs_empty = !self.epochs_known;
                    (self.epochs, self.epochs_as_read) = (epochs.clone(), epochs);
                }
                Err(fault) => {
                    tracing::warn!(path = %path.display(), %fault, "damaged; made anew from the log");
                    self.report.rebuilt.push(path);
                }
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(IoFailure::new("read", &path, error).into()),
        }
        Ok(())
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
            flushed: start,
            doubtful: Vec::new(),
            incomplete: Vec::new(),
        })
    }

    fn segments(&mut self, bases: &[i64]) -> Result<Recovered, OpenError> {
        // Those that end before the log start were deleted, or were about to be.
        let departed = bases.windows(2).take_while(|pair| pair[1] <= self.hints.log_start_offset).count();
        let departed = if self.keep_producers(bases, departed)? { departed } else { 0 };
        let (departed, bases) = bases.split_at(departed);
        departed.iter().try_for_each(|base_offset| self.remove_segment(*base_offset))?;
        self.bases = bases.to_vec();
        self.failed_syncs.retain(|base_offset| bases.contains(base_offset));
        // Whoever says that all is well does not know.
        self.hints.clean_shutdown &= self.failed_syncs.is_empty();
        self.report.clean = self.hints.clean_shutdown;
        // The first segment of which something may not have been flushed.
        let first_scanned = match self.hints.clean_shutdown {
            true => bases.len(),
            false => {
                let failed = self.failed_syncs.iter().min().copied().unwrap_or(i64::MAX);
                bases.partition_point(|base| *base <= self.hints.recovery_point.min(failed)).saturating_sub(1)
            }
        };
        if !self.hints.clean_shutdown {
            self.snapshot = replay::newest_snapshot(&**self.place.files, self.place.dir, i64::MAX, self.now_ms)?
                .map(|(offset, _)| offset);
        }
        for base_offset in bases.get(first_scanned..).unwrap_or_default() {
            let path = self.place.dir.join(segment_file_name(*base_offset, ".log"));
            self.announce(self.place.files.metadata(&path).during("look at", &path)?.len);
        }
        let mut entries: Vec<SegmentEntry> = Vec::with_capacity(bases.len());
        let (mut active, mut incomplete): (Option<OpenedSegment>, Vec<Active>) = (None, Vec::new());
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
            entries.push(opened.active.entry());
            incomplete.extend(active.replace(opened).filter(|sealed| !sealed.complete).map(|sealed| sealed.active));
        }
        let Some(OpenedSegment { mut active, .. }) = active else {
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
        if let Some((segment, end)) = self.unchecked.take().filter(|_| self.snapshot.is_some_and(|at| at > next_offset))
        {
            // The snapshot counts for nothing, and its producers are learned from bytes that it was to stand for.
            let open = segment.open().map_err(from_reading)?;
            verify::verify(&segment, &open, 0..end, 0).map_err(from_reading)?;
        }
        if self.epochs_known {
            self.check_history(&entries, next_offset)?;
        }
        if !self.epochs_known {
            self.rebuild_epochs(&entries)?;
        }
        self.epochs_changed |= self.epochs.truncate_from(next_offset);
        let history = Arc::new(self.epochs.clone());
        for entry in &entries {
            let in_doubt = self.epochs_known && entry.base_offset() <= self.history_unseen_before;
            entry.segment.verified.expect_epochs(&history, in_doubt);
        }
        let log_start = self.hints.log_start_offset.max(entries.first().map_or(0, SegmentEntry::base_offset));
        if self.epochs_empty
            && (log_start..self.exact_below().min(next_offset)).contains(&self.first_epoch_from(log_start))
        {
            self.report_epochs(None, "there are batches of leader epochs, and it has none");
        }
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
            flushed: self.flushed(next_offset).max(log_start),
            doubtful: std::mem::take(&mut self.doubtful),
            incomplete,
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

    /// Up to where everything is on stable storage, now that all but the doubtful segments are: in those, what was flushed before.
    fn flushed(&self, next_offset: i64) -> i64 {
        let doubtful = self.doubtful.iter().map(|doubtful| doubtful.base_offset).min();
        doubtful.map_or(next_offset, |base_offset| self.hints.recovery_point.max(base_offset).min(next_offset))
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
        (recovered.next_offset, recovered.flushed) = (log_start, log_start);
        recovered.doubtful.clear();
        recovered.incomplete.clear();
        self.place.files.sync_dir(self.place.dir).during("sync", self.place.dir)?;
        for entry in recovered.sealed.drain(..).chain([old.entry()]) {
            self.remove_segment(entry.base_offset())?;
        }
        Ok(())
    }

    fn remove_later(&self, later: &[i64]) -> Result<(), OpenError> {
        later.iter().rev().try_for_each(|base_offset| self.remove_segment(*base_offset))
    }

    fn remove_segment(&self, base_offset: i64) -> Result<(), OpenError> {
        for extension in [".log", ".index", ".timeindex", ".crc", ".txnindex", SYNC_FAILED] {
            let path = self.place.dir.join(segment_file_name(base_offset, extension));
            files::remove_if_exists(&**self.place.files, &path).during("remove", &path)?;
        }
        Ok(())
    }

    fn rebuild_epochs(&mut self, entries: &[SegmentEntry]) -> Result<(), OpenError> {
        self.epochs = LeaderEpochs::default();
        for entry in entries {
            // Epochs never fall: where the newest batch has none, no batch has. Otherwise a log without any would be walked at every start.
            if history::newest(entry)?.is_some_and(|newest| newest.leader_epoch == epochs::NO_EPOCH) {
                continue;
            }
            let mut headers = entry.segment.headers(0).map_err(from_reading)?.until(entry.size);
            while let Some((_, header)) = headers.next().map_err(from_reading)? {
                self.epochs_changed |= self.epochs.assign(header.leader_epoch, header.base_offset);
            }
        }
        Ok(())
    }
}
