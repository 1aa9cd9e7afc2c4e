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

use crate::active::{Active, crc_header};
use crate::checkpoint::segment_file_name;
use crate::crcfile::RunningCrc;
use crate::error::{During, IoFailure, LogError, OutOfRange, ReadError};
use crate::files::{self, OpenMode};
use crate::index::{IndexBuilder, IndexBytes};
use crate::log::Log;
use crate::metrics as names;
use crate::producers::{self, ProducerState};
use crate::reader::{RecentEnds, SegmentEntry};
use crate::replay;
use crate::segment::Segment;
use crate::verify;

/// How long a deleted segment waits to be written again.
const RECYCLED_FOR_MS: i64 = 60 * 60 * 1000;

/// What stands beside a `.log` and is made from it.
pub(crate) const DERIVED: [&str; 4] = [".index", ".timeindex", ".crc", ".txnindex"];

/// Extension of a segment file that is deleted but kept.
pub(crate) const DELETED: &str = ".deleted";

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
                if active_expired && self.sealed.iter().all(expired) && self.next_offset <= high_watermark {
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
        self.flush_active()?;
        self.publish();
        if before == self.next_offset && self.active.size > 0 {
            self.roll(now_ms)?;
        }
        let count = (0..self.sealed.len()).take_while(|n| self.end_of_sealed(*n) <= before).count();
        self.delete_first(count, before, now_ms)?;
        Ok(self.log_start)
    }

    /// Cuts the log so that `to` is its end; offsets from there on will be given again. Does nothing if the log ends before. `to`
    /// must be a boundary between batches; one within a batch removes that batch.
    ///
    /// The caller first writes a recovery point of at most `to`: a log that ends before its recovery point is taken for damaged.
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
        let result = self.cut(to, now_ms);
        self.poison_on_error(result)
    }

    fn cut(&mut self, to: i64, now_ms: i64) -> Result<(), LogError> {
        let kept = self.sealed.partition_point(|entry| entry.base_offset() <= to).saturating_sub(1);
        let last = match self.active.segment.base_offset <= to {
            true => self.active.entry(),
            false => self.sealed.get(kept).cloned().ok_or_else(|| LogError::Misuse("an empty log".into()))?,
        };
        let first_removed = if self.active.segment.base_offset <= to { self.sealed.len() } else { kept };
        // The newest goes first, so that a crash in between leaves a log without a hole.
        if self.active.segment.base_offset > to {
            self.unlink(&self.active.entry())?;
            for entry in self.sealed.get(first_removed + 1..).unwrap_or_default().iter().rev() {
                self.unlink(entry)?;
            }
        }
        self.sealed.truncate(first_removed);
        self.active = self.cut_copy(&last, to, now_ms)?;
        self.next_offset = to;
        self.flushed = to;
        self.unflushed_bytes = 0;
        self.forget_from(to, now_ms)?;
        self.files.sync_dir(&self.dir).during("sync", &self.dir)?;
        self.relist();
        Ok(())
    }

    /// Throws the whole log away; it goes on, empty, at `offset`. The caller first writes a recovery point of at most
    /// `offset`, and a log start of `offset`.
    pub fn truncate_and_restart_at(&mut self, offset: i64, now_ms: i64) -> Result<(), LogError> {
        self.check_poisoned()?;
        let result = self.restart_at(offset, now_ms);
        self.poison_on_error(result)
    }

    fn restart_at(&mut self, offset: i64, now_ms: i64) -> Result<(), LogError> {
        self.unlink(&self.active.entry())?;
        for entry in self.sealed.iter().rev() {
            self.unlink(entry)?;
        }
        self.sealed.clear();
        self.active = Active::begin(self.place(), offset, None, now_ms)?;
        (self.log_start, self.next_offset, self.flushed, self.unflushed_bytes) = (offset, offset, offset, 0);
        self.producers = ProducerState::default();
        self.epochs = Default::default();
        self.epochs_changed = true;
        self.write_epochs()?;
        replay::remove_snapshots(&*self.files, &self.dir, |_| true)?;
        self.files.sync_dir(&self.dir).during("sync", &self.dir)?;
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
        if alone && self.recycled.len() < self.config.recycled_segments && entry.size > 0 {
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
        for extension in DERIVED.iter().chain(&[producers::EXTENSION]) {
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

    /// A new file with what a segment holds before `to`, in the old one's place: readers keep the old one.
    fn cut_copy(&self, entry: &SegmentEntry, to: i64, now_ms: i64) -> Result<Active, LogError> {
        let old = &entry.segment;
        let path = old.log_path();
        let aside = old.path(".log.cleaned");
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
        let target = self.files.open(&aside, OpenMode::Create).during("create", &aside)?;
        let mut index = IndexBuilder::new(old.base_offset, self.config.index_interval_bytes);
        let mut entries = IndexBytes::default();
        let mut crc = RunningCrc::new(&crc_header(&self.identity, old.base_offset));
        let mut first_timestamp = None;
        let mut size = 0;
        let mut headers = old.headers(0).map_err(|error| reading(error, &path))?.until(entry.size);
        let mut buffer = Vec::new();
        while let Some((position, header)) = headers.next().map_err(|error| reading(error, &path))? {
            if header.last_offset() >= to {
                break;
            }
            buffer.resize(header.size(), 0);
            files::read_exact_at(&*source, &mut buffer, position).during("read", &path)?;
            target.write_at(position, &[IoSlice::new(&buffer)]).during("write", &aside)?;
            index.batch(&header, position, &mut entries);
            crc.update(&buffer);
            first_timestamp = first_timestamp.or(Some(header.max_timestamp));
            size = position + header.size() as u64;
        }
        target.sync_all().during("sync", &aside)?;
        old.retire();
        for extension in DERIVED {
            let path = old.path(extension);
            files::remove_if_exists(&*self.files, &path).during("remove", &path)?;
        }
        self.files.rename(&aside, &path).during("rename", &aside)?;
        let segment = Segment::new(self.files.clone(), self.dir.clone(), old.base_offset, size, 0, 0);
        segment.expect_bytes(u64::from(self.config.segment_bytes));
        segment.index(&entries);
        Ok(Active {
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
        })
    }

    /// Takes back what producers and epochs did from an offset on.
    fn forget_from(&mut self, to: i64, now_ms: i64) -> Result<(), LogError> {
        replay::remove_snapshots(&*self.files, &self.dir, |offset| offset > to)?;
        if std::sync::Arc::make_mut(&mut self.epochs).truncate_from(to) {
            self.epochs_changed = true;
            self.write_epochs()?;
        }
        let entries: Vec<SegmentEntry> = self.sealed.iter().cloned().chain([self.active.entry()]).collect();
        self.producers = replay::replay_producers(&*self.files, &self.dir, &entries, to, now_ms, &mut Vec::new())
            .map_err(|error| reading(error, &self.dir.join(segment_file_name(to, producers::EXTENSION))))?;
        Ok(())
    }
}

fn reading(error: ReadError, path: &Path) -> LogError {
    match error {
        ReadError::Io(failure) => LogError::Io(failure),
        ReadError::Corruption(corruption) => LogError::Corruption(corruption),
        error => LogError::Io(IoFailure::new("read", path, std::io::Error::other(error.to_string()))),
    }
}
