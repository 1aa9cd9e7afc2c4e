//! The segment that is being written: space reserved ahead, one vectored write for a group, and sealing.
//!
//! Owns: the end of the log's last file, its reserved space, its running checksum and index entries. Refuses: offsets, sequences and when
//! to roll (`log.rs`). Read next: `log.rs`.
//!
//! Always: `size <= reserved`; bytes from `size` on are zeros (or, in a recycled file, a zeroed header and then batches with
//! smaller offsets than any that is written here); what was appended lies below `size` and is never written again.

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use headwater_proto::batch::{BatchHeader, HEADER_BYTES};

use crate::config::{LogConfig, LogIdentity};
use crate::crcfile::{self, CrcHeader, RunningCrc};
use crate::error::{During, FullDisk, IoFailure, LogError, ReadError};
use crate::files::{Directory, File, Files, OpenMode, is_full, parent};
use crate::index::{IndexBuilder, IndexBytes};
use crate::reader::{RecentEnds, SegmentEntry};
use crate::segment::Segment;

/// The first step of space that is reserved; each later one is as large as what is there already.
pub(crate) const FIRST_RESERVATION_BYTES: u64 = 64 * 1024;
/// The largest step of space that is reserved.
const LARGEST_RESERVATION_BYTES: u64 = 16 << 20;
/// Bytes of index entries and checksums that are kept in memory before they go to their files.
const SPILL_BYTES: usize = 4096;

/// Extension of an empty file that says that a sync of the segment's `.log` failed: what was not flushed then must not be written to that file
/// again. Kafka ignores it; the recovery that puts a new file in the place of that one removes it.
pub(crate) const SYNC_FAILED: &str = ".sync-failed";

/// Where a log is, and what it was told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) files: &'a Arc<dyn Files>,
    pub(crate) dir: &'a Arc<Path>,
    pub(crate) identity: &'a LogIdentity,
    pub(crate) config: &'a LogConfig,
}

/// The segment at the end of a log.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) segment: Arc<Segment>,
    /// Bytes of batches.
    pub(crate) size: u64,
    /// Bytes of the file that have space behind them.
    pub(crate) reserved: u64,
    pub(crate) index: IndexBuilder,
    /// `None` where Kafka wrote the segment's beginning and nobody has read it since.
    pub(crate) crc: Option<RunningCrc>,
    /// The largest timestamp of its first batch, from which its age counts.
    pub(crate) first_timestamp: Option<i64>,
    /// When it was begun, by our clock.
    pub(crate) begun_ms: i64,
    pub(crate) last_append_ms: i64,
    /// Stale bytes lie beyond the end.
    pub(crate) recycled: bool,
    pub(crate) recent: RecentEnds,
    /// The file, from a write until it is synced: a handle that is opened anew might not be told of a write that failed meanwhile.
    pub(crate) unflushed: Option<Arc<dyn File>>,
    /// Recovery would have to scan it from here on.
    pub(crate) checkpointed: u64,
}

/// A group of batches ready to be written one after another: patched headers, and what follows them.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    pub(crate) headers: Vec<(BatchHeader, [u8; HEADER_BYTES])>,
    pub(crate) bodies: Vec<bytes::Bytes>,
}

impl Active {
    /// Begins an empty segment in a new file, or in a deleted segment's `recycled` one. The directory is not synced yet.
    pub(crate) fn begin(
        place: Place<'_>,
        base_offset: i64,
        recycled: Option<&Path>,
        now_ms: i64,
    ) -> Result<Active, IoFailure> {
        let files = place.files;
        let mut active = Active::empty(place, base_offset, now_ms);
        let path = active.segment.log_path();
        match recycled {
            Some(old) => {
                let file = files.open(old, OpenMode::Write).during("open", old)?;
                // Before the file has its new name, its beginning must no longer look like a batch.
                file.write_at(0, &[IoSlice::new(&[0; HEADER_BYTES])]).during("write", old)?;
                active.reserved = file.len().during("look at", old)?;
                active.recycled = true;
                files.rename(old, &path).during("rename", old)?;
            }
            // One that could not be removed when it was given up holds nothing.
            None => drop(files.open(&path, OpenMode::Create).during("create", &path)?),
        }
        Ok(active)
    }

    /// A segment without batches, whose file is empty.
    pub(crate) fn empty(place: Place<'_>, base_offset: i64, now_ms: i64) -> Active {
        let Place { files, dir, identity, config } = place;
        let segment = Segment::new(Arc::clone(files), Arc::clone(dir), base_offset, 0, 0, 0);
        segment.expect_bytes(u64::from(config.segment_bytes));
        Active {
            segment,
            size: 0,
            reserved: 0,
            index: IndexBuilder::new(base_offset, config.index_interval_bytes),
            crc: Some(RunningCrc::new(&crc_header(identity, base_offset))),
            first_timestamp: None,
            begun_ms: now_ms,
            last_append_ms: now_ms,
            recycled: false,
            recent: RecentEnds::default(),
            unflushed: None,
            checkpointed: 0,
        }
    }

    /// Removes a segment without batches, durably.
    pub(crate) fn discard(&self, files: &dyn Files, dir: &dyn Directory) -> Result<(), IoFailure> {
        self.segment.retire();
        let path = self.segment.log_path();
        files.remove_file(&path).during("remove", &path)?;
        dir.sync().during("sync the folder of", &path)
    }

    /// Makes sure that `more` bytes beyond the end (and a zeroed header behind them) have space. Nothing is changed when there is none.
    pub(crate) fn reserve(&mut self, more: u64, config: &LogConfig) -> Result<(), LogError> {
        let needed = self.size + more + if self.recycled { HEADER_BYTES as u64 } else { 0 };
        if needed <= self.reserved {
            return Ok(());
        }
        let path = self.segment.log_path();
        let file = self.segment.open().map_err(|error| unexpected(error, &path))?.file;
        let step = self.reserved.clamp(FIRST_RESERVATION_BYTES, LARGEST_RESERVATION_BYTES);
        let ahead = (self.reserved + step).min(u64::from(config.segment_bytes));
        let generous = needed.max(ahead);
        let modest = needed.next_multiple_of(4096).min(generous);
        for target in [generous, modest] {
            match file.reserve(self.reserved, target - self.reserved) {
                Ok(()) => {
                    self.reserved = target;
                    return Ok(());
                }
                Err(error) if is_full(&error) => {}
                Err(error) => return Err(IoFailure::new("reserve space in", &path, error).into()),
            }
        }
        // A failed reservation may have extended the file over part of the range; the space counts only once it is asked for.
        Err(FullDisk { path, needed: modest - self.reserved }.into())
    }

    /// Writes a group at the end. The space must be reserved. On an error nobody knows what the file holds.
    pub(crate) fn write(&mut self, group: &Prepared) -> Result<u64, IoFailure> {
        let path = self.segment.log_path();
        let file = self.file()?;
        let mut parts = Vec::with_capacity(group.headers.len() * 2 + 1);
        let mut bytes = 0;
        for ((header, encoded), body) in group.headers.iter().zip(&group.bodies) {
            parts.push(IoSlice::new(encoded));
            parts.push(IoSlice::new(body));
            bytes += header.size() as u64;
        }
        if self.recycled {
            parts.push(IoSlice::new(&[0; HEADER_BYTES]));
        }
        let written = file.write_at(self.size, &parts).during("write", &path);
        self.unflushed = Some(file);
        written?;
        if let Some(crc) = &mut self.crc {
            for ((_, encoded), body) in group.headers.iter().zip(&group.bodies) {
                crc.update(encoded);
                crc.update(body);
            }
        }
        self.size += bytes;
        Ok(bytes)
    }

    /// Moves index entries and checksums to their files once there are enough of them.
    pub(crate) fn spill_if_large(&mut self, files: &dyn Files, identity: &LogIdentity) -> Result<(), IoFailure> {
        if self.segment.unspilled() >= SPILL_BYTES {
            self.segment.spill(false)?;
            self.write_crc(files, identity, false)?;
        }
        Ok(())
    }

    /// Writes what is known of every batch so far to its indexes and checksums, durably.
    pub(crate) fn checkpoint(&mut self, files: &dyn Files, identity: &LogIdentity) -> Result<(), IoFailure> {
        self.segment.spill(true)?;
        self.write_crc(files, identity, true)
    }

    fn write_crc(&mut self, files: &dyn Files, identity: &LogIdentity, seal: bool) -> Result<(), IoFailure> {
        // Entries count as taken only once they are written.
        let Some(mut crc) = self.crc.clone() else { return Ok(()) };
        let path = self.segment.path(".crc");
        let header = crc_header(identity, self.segment.base_offset).encode();
        let (at, mut bytes) = crc.take();
        let len = crc.file_len();
        if seal {
            bytes.extend_from_slice(&crc.last_entry());
        }
        let write = || {
            let file = files.open(&path, OpenMode::Ensure)?;
            file.write_at(0, &[IoSlice::new(&header)])?;
            file.write_at(at, &[IoSlice::new(&bytes)])?;
            if seal {
                file.set_len(len)?;
                file.sync_all()?;
            }
            Ok(())
        };
        write().during("write", &path)?;
        self.crc = Some(crc);
        Ok(())
    }

    /// Completes the segment's files as Kafka would leave them, durably: nothing is reserved beyond the end, and both indexes
    /// and the checksums are complete.
    pub(crate) fn seal(&mut self, files: &dyn Files, identity: &LogIdentity) -> Result<(), LogError> {
        self.trim()?;
        Ok(self.complete(files, identity)?)
    }

    /// Makes every batch durable, and gives back the space that is reserved beyond the end. A sync that failed is [`LogError::Io`], even for want of
    /// room: the pages may count as clean afterwards without being on the disk.
    pub(crate) fn trim(&mut self) -> Result<(), LogError> {
        let path = self.segment.log_path();
        let file = self.file()?;
        file.set_len(self.size).during("trim", &path)?;
        self.reserved = self.size;
        self.recycled = false;
        if let Err(failure) = file.sync_all().during("sync", &path) {
            note_failed_sync(&self.segment);
            return Err(LogError::Io(failure));
        }
        self.unflushed = None;
        Ok(())
    }

    /// Makes every batch durable.
    pub(crate) fn sync(&mut self) -> Result<(), IoFailure> {
        let file = self.file()?;
        if let Err(failure) = file.sync_data().during("sync", &self.segment.log_path()) {
            note_failed_sync(&self.segment);
            return Err(failure);
        }
        self.unflushed = None;
        Ok(())
    }

    /// Takes the file in hand, so that neither a write nor a sync has to open it.
    pub(crate) fn hold(&mut self) -> Result<(), IoFailure> {
        self.unflushed = Some(self.file()?);
        Ok(())
    }

    fn file(&self) -> Result<Arc<dyn File>, IoFailure> {
        if let Some(file) = &self.unflushed {
            return Ok(Arc::clone(file));
        }
        match self.segment.open() {
            Ok(open) => Ok(open.file),
            Err(ReadError::Io(failure)) => Err(failure),
            Err(error) => {
                Err(IoFailure::new("open", &self.segment.log_path(), std::io::Error::other(error.to_string())))
            }
        }
    }

    /// Completes what is made from the log: both indexes and the checksums.
    pub(crate) fn complete(&mut self, files: &dyn Files, identity: &LogIdentity) -> Result<(), IoFailure> {
        let mut entries = IndexBytes::default();
        self.index.seal(&mut entries);
        self.segment.index(&entries);
        self.checkpoint(files, identity)
    }

    /// The entry that a picture of the log has for this segment.
    pub(crate) fn entry(&self) -> SegmentEntry {
        SegmentEntry {
            segment: Arc::clone(&self.segment),
            size: self.size,
            largest: self.index.largest(),
            last_append_ms: self.last_append_ms,
        }
    }
}

/// Leaves word for the next recovery, if the disk takes it.
pub(crate) fn note_failed_sync(segment: &Segment) {
    let (files, path) = (segment.files(), segment.path(SYNC_FAILED));
    let written = files.open(&path, OpenMode::Create).and_then(|file| {
        file.sync_all()?;
        files.sync_dir(parent(&path))
    });
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "the next recovery will not know of a sync that failed");
    }
}

/// The identity that seeds a segment's checksum.
pub(crate) fn crc_header(identity: &LogIdentity, base_offset: i64) -> CrcHeader {
    CrcHeader { topic_id: identity.topic_id, partition: identity.partition, base_offset }
}

/// Reads a segment's checksum file; `None` if there is none.
pub(crate) fn read_crc_file(
    files: &dyn Files,
    path: &Path,
) -> Result<Option<Result<crcfile::CrcFile, crcfile::CrcFault>>, IoFailure> {
    /// A segment of 2 GiB has 32,768 steps.
    const LARGEST: u64 = 1 << 20;
    match crate::files::read(files, path, LARGEST) {
        Ok(bytes) => Ok(Some(crcfile::decode(&bytes))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::FileTooLarge => {
            Ok(Some(Err(crcfile::CrcFault { position: LARGEST, detail: error.to_string() })))
        }
        Err(error) => Err(IoFailure::new("read", path, error)),
    }
}

fn unexpected(error: ReadError, path: &Path) -> LogError {
    match error {
        ReadError::Io(failure) => failure.into(),
        error => LogError::Io(IoFailure::new("open", path, std::io::Error::other(error.to_string()))),
    }
}
