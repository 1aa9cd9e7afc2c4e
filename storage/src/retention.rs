//! Letting go of the beginning of a log, and of its end.
//!
//! Owns: retention by time and size, delete-records, truncation, and the deleted segments that are kept to be written again. Refuses:
//! compaction. Read next: `log.rs`.
//!
//! Whatever is deleted stays readable for those who hold a slice of it. A deleted segment's file becomes a new segment's only if nobody
//! does, and only if it was deleted from the log's beginning: stale batches beyond a recycled segment's end have
//! smaller offsets than any that follow, which is how recovery tells them apart; those cut off the end would have larger ones.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::active::{Active, SYNC_FAILED, crc_header};
use crate::checkpoint::segment_file_name;
use crate::crcfile::RunningCrc;
use crate::epochs::{self, LeaderEpochs};
use crate::error::{During, IoFailure, LogError, OutOfRange, ReadError};
use crate::files::{self, Directory, OpenMode};
use crate::index::{IndexBuilder, IndexBytes};
use crate::log::Log;
use crate::metrics as names;
use crate::producers::{self, ProducerState};
use crate::reader::{RecentEnds, SegmentEntry};
use crate::replay;
use crate::rewrite::write_synced;
use crate::segment::Segment;
use crate::verify;

/// How long a deleted segment waits to be written again.
const RECYCLED_FOR_MS: i64 = 60 * 60 * 1000;

/// What stands beside a `.log` and is made from it.
pub(crate) const DERIVED: [&str; 4] = [".index", ".timeindex", ".crc", ".txnindex"];

/// Extension of a segment file that is deleted but kept.
pub(crate) const DELETED: &str = ".deleted";

/// Extension of a segment file that will take another's place. What a crash leaves of it is removed when the log is opened.
pub(crate) const ASIDE: &str = ".log.cleaned";

/// All that a cut puts in the place of what it removes.
#[derive(Debug)]
struct PreparedCut {
    dir: Box<dyn Directory>,
    active: Active,
    /// Offsets of the snapshots that go.
    snapshots: Vec<i64>,
    producers: ProducerState,
    /// The epochs that are left, if that is not all of them.
    epochs: Option<LeaderEpochs>,
}

/// A deleted segment's `.log`, kept to become a new segment.
#[derive(Debug)]
pub(crate) struct Recycled {
    pub(crate) path: PathBuf,
    since_ms: i64,
}

impl Log {
    /// Deletes segments that are beyond the retention, by time and by size, none at or above the high watermark. Returns the new log
    /// start, if it moved: it belongs into the log start checkpoint.
    ///
    /// A segment's age counts from its largest record timestamp or from its last append, whichever is later: history that is
    /// loaded today is not deleted tonight. By size, a segment goes only while at least `retention_bytes` remain.
    pub fn enforce_retention(&mut self, now_ms: i64, high_watermark: i64) -> Result<Option<i64>, LogError> {
        self.check_poisoned()?;
        self.drop_old_recycled(now_ms)?;
        let before = self.log_start;
        let mut count = 0;
        if self.config.cleanup.delete {
            if let Some(retention_ms) = self.config.retention_ms {
                let retention_ms = i64::try_from(retention_ms).unwrap_or(i64::MAX);
                let expired = |entry: &SegmentEntry| {
                    let newest = entry.largest.map_or(i64::MIN, |largest| largest.timestamp).max(entry.last_append_ms);
                    now_ms.saturating_sub(newest) > retention_ms
                };
                let active_expired = self.active.size > 0 && expired(&self.active.entry());
                let may_roll = self.doubtful.is_empty() && self.next_offset <= high_watermark;
                if active_expired && may_roll && self.sealed.iter().all(expired) {
                    self.roll(now_ms)?;
                }
                count = self.sealed.iter().take_while(|entry| expired(entry)).count();
            }
            if let Some(retention_bytes) = self.config.retention_bytes {
                let mut excess = self.size_bytes().saturating_sub(retention_bytes);
                let by_size = self
                    .sealed
                    .iter()
                    .take_while(|entry| {
                        let goes = entry.size <= excess;
                        excess = excess.saturating_sub(entry.size);
                        goes
                    })
                    .count();
                count = count.max(by_size);
            }
        }
        let below_watermark = (0..self.sealed.len()).take_while(|n| self.end_of_sealed(*n) <= high_watermark).count();
        let before_start = (0..self.sealed.len()).take_while(|n| self.end_of_sealed(*n) <= self.log_start).count();
        let count = count.min(below_watermark).max(before_start);
        if count > 0 {
            self.delete_first(count, self.log_start.max(self.end_of_sealed(count - 1)), now_ms)?;
        }
        self.settle_if_there_is_room()?;
        Ok(Some(self.log_start).filter(|start| *start != before))
    }

    /// Deletes all records before `before` (up to the high watermark), whole segments at once and the rest by moving the
    /// log start, which is returned and belongs into the log start checkpoint. An offset before the log start changes nothing.
    pub fn delete_records(&mut self, before: i64, high_watermark: i64, now_ms: i64) -> Result<i64, LogError> {
        self.check_poisoned()?;
        if before > high_watermark || before > self.next_offset {
            let log_end = high_watermark.min(self.next_offset);
            return Err(OutOfRange { offset: before, log_start: self.log_start, log_end }.into());
        }
        if before <= self.log_start {
            return Ok(self.log_start);
        }
        if before > self.flushed {
            self.flush_active()?;
        }
        self.publish();
        if before == self.next_offset && self.active.size > 0 {
            self.roll(now_ms)?;
        }
        let count = (0..self.sealed.len()).take_while(|n| self.end_of_sealed(*n) <= before).count();
        self.delete_first(count, before, now_ms)?;
        self.settle_if_there_is_room()?;
        Ok(self.log_start)
    }

    /// Cuts the log so that `to` is its end; offsets from there on will be given again. Does nothing if the log ends before. `to`
    /// must be a boundary between batches; one within a batch removes that batch.
    ///
    /// The caller first writes a recovery point of at most `to`: a log that ends before its recovery point is taken for damaged.
    /// Without room or descriptors nothing is changed, and the same call may succeed later.
    pub fn truncate(&mut self, to: i64, now_ms: i64) -> Result<(), LogError> {
        self.check_poisoned()?;
        if to >= self.next_offset {
            return Ok(());
        }
        if to < self.log_start {
            return Err(OutOfRange { offset: to, log_start: self.log_start, log_end: self.next_offset }.into());
        }
        // Everything that stays must be durable before anything goes.
        self.flush_active()?;
        self.publish();
        let (kept, last) = match self.active.segment.base_offset <= to {
            true => (self.sealed.len(), self.active.entry()),
            false => {
                let kept = self.sealed.partition_point(|entry| entry.base_offset() <= to).saturating_sub(1);
                (kept, self.sealed.get(kept).cloned().ok_or_else(|| LogError::Misuse("an empty log".into()))?)
            }
        };
        let aside = last.segment.path(ASIDE);
        let prepared = self.prepare_cut(&last, &aside, to, now_ms);
        let cut = self.unless_refused(prepared, &aside)?;
        let result = self.replace_from(kept, Some(&last), cut, &aside, to);
        self.poison_on_error(result)
    }

    /// Throws the whole log away; it goes on, empty, at `offset`. The caller first writes a recovery point of at most
    /// `offset`, and a log start of `offset`.
    pub fn truncate_and_restart_at(&mut self, offset: i64, now_ms: i64) -> Result<(), LogError> {
        self.check_poisoned()?;
        let aside = self.dir.join(segment_file_name(offset, ASIDE));
        let prepared = self.prepare_restart(&aside, offset, now_ms);
        let cut = self.unless_refused(prepared, &aside)?;
        self.log_start = offset;
        let result = self.replace_from(0, None, cut, &aside, offset);
        self.doubtful.clear();
        self.poison_on_error(result)
    }

    /// Passes on what was prepared. A lack of room or of descriptors passes, and nothing was changed yet.
    fn unless_refused<T>(&mut self, prepared: Result<T, LogError>, aside: &Path) -> Result<T, LogError> {
        match prepared {
            Err(error) if error.retryable() => {
                let removed = [aside, &self.epochs_aside()]
                    .into_iter()
                    .try_for_each(|path| files::remove_if_exists(&*self.files, path).during("remove", path).map(drop));
                self.poison_on_error(removed.map_err(LogError::Io))?;
                Err(error)
            }
            prepared => self.poison_on_error(prepared),
        }
    }

    /// Does what a cut needs room or descriptors for.
    fn prepare_cut(&self, last: &SegmentEntry, aside: &Path, to: i64, now_ms: i64) -> Result<PreparedCut, LogError> {
        let dir = self.files.open_dir(&self.dir).during("open", &self.dir)?;
        let (active, end) = self.cut_copy(last, aside, to, now_ms)?;
        let entries: Vec<SegmentEntry> = self.sealed.iter().cloned().chain([self.active.entry()]).collect();
        let producers = replay::producers_before(&*self.files, &self.dir, &entries, end, now_ms)
            .map_err(|error| reading(error, &self.dir.join(segment_file_name(to, producers::EXTENSION))))?;
        let mut epochs = LeaderEpochs::clone(&self.epochs);
        let epochs = epochs.truncate_from(to).then_some(epochs);
        self.prepare(dir, active, producers, epochs, |offset| offset > to)
    }

    fn prepare_restart(&self, aside: &Path, offset: i64, now_ms: i64) -> Result<PreparedCut, LogError> {
        let dir = self.files.open_dir(&self.dir).during("open", &self.dir)?;
        self.files.open(aside, OpenMode::Create).during("create", aside)?;
        let active = Active::empty(self.place(), offset, now_ms);
        self.prepare(dir, active, ProducerState::default(), Some(LeaderEpochs::default()), |_| true)
    }

    fn prepare(
        &self,
        dir: Box<dyn Directory>,
        active: Active,
        producers: ProducerState,
        epochs: Option<LeaderEpochs>,
        departs: impl Fn(i64) -> bool,
    ) -> Result<PreparedCut, LogError> {
        let mut snapshots = replay::snapshot_offsets(&*self.files, &self.dir)?;
        snapshots.retain(|offset| departs(*offset));
        if let Some(epochs) = &epochs {
            write_synced(&*self.files, &self.epochs_aside(), epochs.encode().as_bytes())?;
        }
        Ok(PreparedCut { dir, active, snapshots, producers, epochs })
    }

    fn epochs_aside(&self) -> PathBuf {
        self.dir.join(format!("{}.tmp", epochs::FILE_NAME))
    }

    /// Puts what was prepared in the place of everything but the first `kept` segments; the copy that was made aside takes that of `replaced`.
    /// Nothing is opened or written on the way.
    fn replace_from(
        &mut self,
        kept: usize,
        replaced: Option<&SegmentEntry>,
        cut: PreparedCut,
        aside: &Path,
        to: i64,
    ) -> Result<(), LogError> {
        let path = cut.active.segment.log_path();
        // The newest goes first, so that a crash in between leaves a log without a hole.
        let departed = self.sealed.split_off(kept);
        for entry in departed.iter().chain([&self.active.entry()]).rev() {
            if replaced.is_some_and(|replaced| Arc::ptr_eq(&replaced.segment, &entry.segment)) {
                entry.segment.retire();
                for extension in DERIVED {
                    let path = entry.segment.path(extension);
                    files::remove_if_exists(&*self.files, &path).during("remove", &path)?;
                }
            } else {
                self.unlink(entry)?;
            }
        }
        self.files.rename(aside, &path).during("rename", aside)?;
        self.active = cut.active;
        (self.next_offset, self.flushed, self.unflushed_bytes) = (to, to, 0);
        for offset in cut.snapshots {
            let path = self.dir.join(segment_file_name(offset, producers::EXTENSION));
            files::remove_if_exists(&*self.files, &path).during("remove", &path)?;
        }
        self.producers = cut.producers;
        if let Some(epochs) = cut.epochs {
            let aside = self.epochs_aside();
            self.files.rename(&aside, &self.dir.join(epochs::FILE_NAME)).during("rename", &aside)?;
            self.epochs = Arc::new(epochs);
            self.epochs_changed = false;
        }
        cut.dir.sync().during("sync", &self.dir)?;
        self.relist();
        Ok(())
    }

    /// One beyond the last offset that a sealed segment can hold.
    fn end_of_sealed(&self, number: usize) -> i64 {
        self.sealed.get(number + 1).map_or(self.active.segment.base_offset, SegmentEntry::base_offset)
    }

    /// Moves the log start, and removes the first `count` sealed segments. Readers see a log without them before their files go.
    fn delete_first(&mut self, count: usize, log_start: i64, now_ms: i64) -> Result<(), LogError> {
        let owed = self.producers_owed(count, now_ms)?;
        self.log_start = log_start;
        let deleted: Vec<SegmentEntry> = self.sealed.drain(..count).collect();
        if std::sync::Arc::make_mut(&mut self.epochs).start_at(self.log_start) {
            self.epochs_changed = true;
        }
        self.relist();
        let result = deleted.iter().try_for_each(|entry| self.delete(entry, now_ms));
        if let Some((base_offset, producers)) = owed {
            self.give_up_recycled();
            if let Err(failure) = self.write_snapshot(base_offset, &producers) {
                tracing::warn!(%failure, "what deleted segments knew of producers is in memory only");
            }
        }
        // One that stayed, with those behind it gone, would be a hole when the log is opened again.
        self.poison_on_error(result.map_err(LogError::from))?;
        metrics::counter!(names::SEGMENTS_DELETED).increment(count as u64);
        if count > 0 {
            self.write_epochs()?;
        }
        Ok(())
    }

    /// What is known of producers where the log will begin, if no snapshot says it, because there was no room for one, and there is
    /// none now: the deletion makes some.
    fn producers_owed(&mut self, count: usize, now_ms: i64) -> Result<Option<(i64, ProducerState)>, LogError> {
        let Some(last) = count.checked_sub(1) else { return Ok(None) };
        let base_offset = self.end_of_sealed(last);
        let path = self.dir.join(segment_file_name(base_offset, producers::EXTENSION));
        if files::exists(&*self.files, &path).during("look at", &path)? {
            return Ok(None);
        }
        let producers = replay::producers_at(&*self.files, &self.dir, &self.sealed, base_offset, now_ms)
            .map_err(|error| reading(error, &path))?;
        match self.write_snapshot(base_offset, &producers) {
            Ok(()) => Ok(None),
            Err(failure) if files::is_full(&failure.error) => Ok(Some((base_offset, producers))),
            Err(failure) => Err(failure.into()),
        }
    }

    fn delete(&mut self, entry: &SegmentEntry, now_ms: i64) -> Result<(), IoFailure> {
        let alone = entry.segment.retire();
        let path = entry.segment.log_path();
        // What failed once is written to another file.
        let doubtful = self.doubtful.iter().any(|doubtful| doubtful.base_offset == entry.base_offset());
        if alone && !doubtful && self.recycled.len() < self.config.recycled_segments && entry.size > 0 {
            let kept = entry.segment.path(&format!(".log{DELETED}"));
            self.files.rename(&path, &kept).during("rename", &path)?;
            self.recycled.push(Recycled { path: kept, since_ms: now_ms });
        } else {
            self.files.remove_file(&path).during("remove", &path)?;
        }
        self.remove_companions(&entry.segment)
    }

    fn unlink(&self, entry: &SegmentEntry) -> Result<(), IoFailure> {
        entry.segment.retire();
        let path = entry.segment.log_path();
        self.files.remove_file(&path).during("remove", &path)?;
        self.remove_companions(&entry.segment)
    }

    fn remove_companions(&self, segment: &Segment) -> Result<(), IoFailure> {
        for extension in DERIVED.iter().chain(&[producers::EXTENSION, SYNC_FAILED]) {
            let path = segment.path(extension);
            files::remove_if_exists(&*self.files, &path).during("remove", &path)?;
        }
        Ok(())
    }

    /// Gives up the deleted segments that were kept; whether there were any.
    pub(crate) fn give_up_recycled(&mut self) -> bool {
        let any = !self.recycled.is_empty();
        for recycled in self.recycled.drain(..) {
            if let Err(error) = self.files.remove_file(&recycled.path) {
                tracing::warn!(path = %recycled.path.display(), %error, "a deleted segment could not be removed");
            }
        }
        any
    }

    fn drop_old_recycled(&mut self, now_ms: i64) -> Result<(), IoFailure> {
        let too_many = self.recycled.len().saturating_sub(self.config.recycled_segments);
        let mut number = 0;
        for recycled in std::mem::take(&mut self.recycled) {
            number += 1;
            if number <= too_many || now_ms.saturating_sub(recycled.since_ms) > RECYCLED_FOR_MS {
                self.files.remove_file(&recycled.path).during("remove", &recycled.path)?;
            } else {
                self.recycled.push(recycled);
            }
        }
        Ok(())
    }

    /// A new file aside with what a segment holds before `to`, which will take the old one's place: readers keep that. Also where the
    /// batches begin that it leaves out.
    fn cut_copy(&self, entry: &SegmentEntry, aside: &Path, to: i64, now_ms: i64) -> Result<(Active, i64), LogError> {
        let old = &entry.segment;
        let path = old.log_path();
        let open = old.open().map_err(|error| reading(error, &path))?;
        // The copy gets checksums of its own: they must not be those of damage.
        let mut headers =
            old.position_before(to).and_then(|at| old.headers(at)).map_err(|error| reading(error, &path))?;
        let mut kept = 0;
        while let Some((position, header)) = headers.next().map_err(|error| reading(error, &path))? {
            kept = position;
            if header.last_offset() >= to {
                break;
            }
            kept += header.size() as u64;
        }
        verify::verify(old, &open, 0..kept, 0).map_err(|error| reading(error, &path))?;
        let source = open.file;
        let target = self.files.open(aside, OpenMode::Create).during("create", aside)?;
        let mut index = IndexBuilder::new(old.base_offset, self.config.index_interval_bytes);
        let mut entries = IndexBytes::default();
        let mut crc = RunningCrc::new(&crc_header(&self.identity, old.base_offset));
        let mut first_timestamp = None;
        let (mut size, mut end) = (0, to);
        let mut headers = old.headers(0).map_err(|error| reading(error, &path))?.until(entry.size);
        let mut buffer = Vec::new();
        while let Some((position, header)) = headers.next().map_err(|error| reading(error, &path))? {
            if header.last_offset() >= to {
                end = end.min(header.base_offset);
                break;
            }
            buffer.resize(header.size(), 0);
            files::read_exact_at(&*source, &mut buffer, position).during("read", &path)?;
            target.write_at(position, &[IoSlice::new(&buffer)]).during("write", aside)?;
            index.batch(&header, position, &mut entries);
            crc.update(&buffer);
            first_timestamp = first_timestamp.or(Some(header.max_timestamp));
            size = position + header.size() as u64;
        }
        target.sync_all().during("sync", aside)?;
        let segment = Segment::new(self.files.clone(), self.dir.clone(), old.base_offset, size, 0, 0);
        segment.expect_bytes(u64::from(self.config.segment_bytes));
        segment.index(&entries);
        let active = Active {
            segment,
            size,
            reserved: size,
            index,
            crc: Some(crc),
            first_timestamp,
            begun_ms: now_ms,
            last_append_ms: entry.last_append_ms,
            recycled: false,
            recent: RecentEnds::default(),
            unflushed: None,
            checkpointed: 0,
        };
        Ok((active, end))
    }
}

fn reading(error: ReadError, path: &Path) -> LogError {
    match error {
        ReadError::Io(failure) => LogError::Io(failure),
        ReadError::Corruption(corruption) => LogError::Corruption(corruption),
        error => LogError::Io(IoFailure::new("read", path, std::io::Error::other(error.to_string()))),
    }
}
