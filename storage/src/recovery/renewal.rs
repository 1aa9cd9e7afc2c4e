//! A segment of which a sync failed goes on in a new file.
//!
//! Owns: the word that the failed log left (`<base>.sync-failed`), and the new file. Refuses: contents (`segment.rs` scanned them). Read next:
//! `segment.rs`.
//!
//! After a sync that failed, nobody knows which of the file's blocks hold what was written, and a second sync of the same file may succeed
//! without having written them. So its batches are written to another file, which is synced and takes the name, and the directory is
//! synced; only once the log is open is the word removed. A power failure anywhere in between leaves the old file or the new one, and the word,
//! and the next recovery does it again. Without the word (the disk did not take it, or the process was killed) nobody knows of the failure: then what
//! was not flushed is written again in its place.
//!
//! Where a full disk has no room for the new file, its batches are written again in their place too, which may help and says nothing: the
//! segment is doubtful. The log opens, so that it can be read and retention may make room. The word stays; nothing of the segment counts as flushed but what was
//! before; nothing is written to the log, whose appends are refused for want of room. Each append, each flush and each round of
//! retention tries again to make the new file. What is copied then is held against what recovery read: pages that only seemed to be written may have left the
//! memory meanwhile.

use std::io::IoSlice;
use std::path::{Path, PathBuf};

use crate::active::{Place, SYNC_FAILED, crc_header};
use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::crcfile::RunningCrc;
use crate::error::{Corruption, During, FullDisk, IoFailure, LogError};
use crate::files::{self, Directory, File, OpenMode, read_exact_at};
use crate::log::Log;
use crate::retention::ASIDE;

/// Copied at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// A segment of which a sync failed, and for whose new file there was no room.
#[derive(Debug)]
pub(crate) struct Doubtful {
    pub(crate) base_offset: i64,
    /// Of all of it, as recovery read it.
    crc: RunningCrc,
}

/// The segments of which a sync failed.
pub(super) fn failed_syncs(place: Place<'_>) -> Result<Vec<i64>, IoFailure> {
    let entries = place.files.list(place.dir).during("list", place.dir)?;
    let segments = entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name));
    Ok(segments.filter(|(_, extension)| *extension == SYNC_FAILED).map(|(base_offset, _)| base_offset).collect())
}

/// Puts a new file with what `crc` was made of in a segment's place, durably. Where there is no room for it, the batches are written again in
/// their place, and the segment is doubtful.
pub(super) fn renew_or_write_again(
    place: Place<'_>,
    base_offset: i64,
    crc: &RunningCrc,
) -> Result<Option<Doubtful>, LogError> {
    match copy_aside(place, base_offset, crc) {
        Err(LogError::FullDisk(full)) => {
            let path = place.dir.join(segment_file_name(base_offset, ".log"));
            tracing::warn!(path = %path.display(), %full, "a sync of it had failed; nothing is appended until there is room for a new file");
            write_again(place, &path, crc.position())?;
            Ok(Some(Doubtful { base_offset, crc: crc.clone() }))
        }
        copied => {
            let aside = copied?;
            let dir = place.files.open_dir(place.dir).during("open", place.dir)?;
            put_in_place(place, &*dir, base_offset, &aside)?;
            Ok(None)
        }
    }
}

/// Writes a segment's batches to a new file beside it, and syncs that. After an error nothing was changed.
fn copy_aside(place: Place<'_>, base_offset: i64, crc: &RunningCrc) -> Result<PathBuf, LogError> {
    let path = place.dir.join(segment_file_name(base_offset, ".log"));
    let aside = place.dir.join(segment_file_name(base_offset, ASIDE));
    let copied = (|| {
        let source = place.files.open(&path, OpenMode::Read).during("open", &path)?;
        let target = place.files.open(&aside, OpenMode::Create).during("create", &aside)?;
        let end = crc.position();
        if end > 0 {
            // What there is no room for is not begun.
            target.reserve(0, end).during("reserve space in", &aside)?;
        }
        let mut copied = RunningCrc::new(&crc_header(place.identity, base_offset));
        pour(&*source, &path, &*target, &aside, end, |bytes| copied.update(bytes))?;
        check(&copied, crc, &path)?;
        Ok(target.sync_all().during("sync", &aside)?)
    })();
    if let Err(error) = copied {
        // What is left of it is removed when the log is opened the next time.
        let _ = files::remove_if_exists(&**place.files, &aside);
        return Err(match error {
            LogError::FullDisk(FullDisk { path, .. }) => FullDisk { path, needed: crc.position() }.into(),
            error => error,
        });
    }
    Ok(aside)
}

/// Whether what was copied is what recovery read.
fn check(copied: &RunningCrc, known: &RunningCrc, path: &Path) -> Result<(), Corruption> {
    let all = |crc: &RunningCrc| crc.pending().chain([crc.entry()]).collect::<Vec<_>>();
    match all(known).into_iter().zip(all(copied)).find(|(known, copied)| known != copied) {
        None => Ok(()),
        Some((known, _)) => {
            let detail = "a sync of it had failed, and the bytes before here are not those that were read when the log was opened";
            Err(Corruption { path: path.into(), position: known.position.into(), offset: None, detail: detail.into() })
        }
    }
}

/// Gives the new file a segment's name, durably.
fn put_in_place(place: Place<'_>, dir: &dyn Directory, base_offset: i64, aside: &Path) -> Result<(), IoFailure> {
    let path = place.dir.join(segment_file_name(base_offset, ".log"));
    place.files.rename(aside, &path).during("rename", aside)?;
    dir.sync().during("sync", place.dir)?;
    tracing::info!(path = %path.display(), "a sync of it had failed; it goes on in a new file");
    Ok(())
}

fn pour(
    source: &dyn File,
    from: &Path,
    target: &dyn File,
    to: &Path,
    end: u64,
    mut seen: impl FnMut(&[u8]),
) -> Result<(), IoFailure> {
    let (mut bytes, mut at) = (Vec::new(), 0);
    while at < end {
        bytes.resize((end - at).min(CHUNK_BYTES) as usize, 0);
        read_exact_at(source, &mut bytes, at).during("read", from)?;
        target.write_at(at, &[IoSlice::new(&bytes)]).during("write", to)?;
        seen(&bytes);
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Writes a file over itself, for whoever syncs it.
fn write_again(place: Place<'_>, path: &Path, end: u64) -> Result<(), IoFailure> {
    let file = place.files.open(path, OpenMode::Write).during("open", path)?;
    pour(&*file, path, &*file, path, end, |_| {})
}

/// Nothing rests on those files any more.
pub(super) fn forget(place: Place<'_>, failed_syncs: &[i64]) -> Result<(), IoFailure> {
    for base_offset in failed_syncs {
        let path = place.dir.join(segment_file_name(*base_offset, SYNC_FAILED));
        files::remove_if_exists(&**place.files, &path).during("remove", &path)?;
    }
    Ok(())
}

impl Log {
    /// Puts new files in the places of the doubtful ones. While there is no room for them, nothing may be written to the log, and nothing of
    /// what lies in them counts as flushed. Afterwards everything does that was there when it was opened.
    pub(crate) fn renew_doubtful(&mut self) -> Result<(), LogError> {
        while let Some(doubtful) = self.doubtful.last() {
            let base_offset = doubtful.base_offset;
            let dir = match self.files.open_dir(&self.dir).during("open", &self.dir) {
                Ok(dir) => dir,
                Err(failure) => return Err(self.not_opened(failure)),
            };
            let entries = self.sealed.iter().cloned().chain([self.active.entry()]);
            // Retention may have taken it.
            if let Some(entry) = entries.into_iter().find(|entry| entry.base_offset() == base_offset) {
                let mut copied = copy_aside(self.place(), base_offset, &doubtful.crc);
                if matches!(copied, Err(LogError::FullDisk(_))) && self.give_up_recycled() {
                    copied = match self.doubtful.last() {
                        Some(doubtful) => copy_aside(self.place(), base_offset, &doubtful.crc),
                        None => return Ok(()),
                    };
                }
                let aside = match copied {
                    Err(error) if error.retryable() => return Err(error),
                    copied => self.poison_on_error(copied)?,
                };
                let renewed = put_in_place(self.place(), &*dir, base_offset, &aside).map_err(LogError::Io);
                self.poison_on_error(renewed)?;
                // Slices of the old file stay good; its bytes are the same.
                entry.segment.close();
                if self.active.segment.base_offset == base_offset {
                    self.active.unflushed = None;
                }
                if let Err(failure) = forget(self.place(), &[base_offset]) {
                    tracing::warn!(%failure, "the next recovery will write the segment anew once more");
                }
            }
            self.doubtful.pop();
        }
        Ok(())
    }

    /// What was freed may be the room that what was found by opening waits for, to count as flushed: a new file, or the leader epochs.
    pub(crate) fn settle_if_there_is_room(&mut self) -> Result<(), LogError> {
        let waits = !self.doubtful.is_empty() || self.flushed < self.next_offset;
        if !waits || self.unflushed_bytes > 0 {
            return Ok(());
        }
        match self.renew_doubtful().and_then(|()| self.flush_active()) {
            Err(error) if error.retryable() && !self.is_poisoned() => {
                tracing::debug!(%error, "a segment waits for a new file")
            }
            flushed => flushed?,
        }
        self.publish();
        Ok(())
    }
}
