//! A segment of which a sync failed goes on in a new file.
//!
//! Owns: the word that the failed log left (`<base>.sync-failed`), and the new file. Refuses: contents (`segment.rs` scanned them). Read next:
//! `segment.rs`.
//!
//! After a sync that failed, nobody knows which of the file's blocks hold what was written, and a second sync of the same file may succeed
//! without having written them. So its batches are written to another file, which is synced and takes the name, and the directory is
//! synced; only once the log is open is the word removed. A power failure anywhere in between leaves the old file or the new one, and the word,
//! and the next recovery does it again. Without the word (the disk did not take it, or the process was killed) nobody knows of the failure: then what
//! was not flushed is written again in its place. So it is where a full disk has no room for the new file, and the word stays.

use std::io::IoSlice;
use std::path::Path;

use crate::active::{Place, SYNC_FAILED};
use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::error::{During, IoFailure};
use crate::files::{self, File, OpenMode, read_exact_at};
use crate::retention::ASIDE;

/// Copied at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// The segments of which a sync failed.
pub(super) fn failed_syncs(place: Place<'_>) -> Result<Vec<i64>, IoFailure> {
    let entries = place.files.list(place.dir).during("list", place.dir)?;
    let segments = entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name));
    Ok(segments.filter(|(_, extension)| *extension == SYNC_FAILED).map(|(base_offset, _)| base_offset).collect())
}

/// Puts a new file with the first `end` bytes of a segment in its place, durably. False: there is no room for it.
pub(super) fn renew(place: Place<'_>, base_offset: i64, end: u64) -> Result<bool, IoFailure> {
    let path = place.dir.join(segment_file_name(base_offset, ".log"));
    let aside = place.dir.join(segment_file_name(base_offset, ASIDE));
    let copied = copy(place, &path, &aside, end);
    if copied.is_err() {
        // What is left of it is removed when the log is opened the next time.
        let _ = files::remove_if_exists(&**place.files, &aside);
    }
    match copied {
        Err(failure) if files::is_full(&failure.error) => {
            tracing::warn!(
                path = %path.display(), bytes = end,
                "a sync of it had failed, and there is no room for a new file; it is written again in its place"
            );
            write_again(place, &path, end)?;
            return Ok(false);
        }
        copied => copied?,
    }
    place.files.rename(&aside, &path).during("rename", &aside)?;
    place.files.sync_dir(place.dir).during("sync", place.dir)?;
    tracing::info!(path = %path.display(), bytes = end, "a sync of it had failed; it goes on in a new file");
    Ok(true)
}

fn copy(place: Place<'_>, from: &Path, to: &Path, end: u64) -> Result<(), IoFailure> {
    let source = place.files.open(from, OpenMode::Read).during("open", from)?;
    let target = place.files.open(to, OpenMode::Create).during("create", to)?;
    pour(&*source, from, &*target, to, end)?;
    target.sync_all().during("sync", to)
}

fn pour(source: &dyn File, from: &Path, target: &dyn File, to: &Path, end: u64) -> Result<(), IoFailure> {
    let (mut bytes, mut at) = (Vec::new(), 0);
    while at < end {
        bytes.resize((end - at).min(CHUNK_BYTES) as usize, 0);
        read_exact_at(source, &mut bytes, at).during("read", from)?;
        target.write_at(at, &[IoSlice::new(&bytes)]).during("write", to)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Writes a file over itself, for whoever syncs it.
fn write_again(place: Place<'_>, path: &Path, end: u64) -> Result<(), IoFailure> {
    let file = place.files.open(path, OpenMode::Write).during("open", path)?;
    pour(&*file, path, &*file, path, end)
}

/// The log is open: nothing rests on those files any more.
pub(super) fn forget(place: Place<'_>, failed_syncs: &[i64]) -> Result<(), IoFailure> {
    for base_offset in failed_syncs {
        let path = place.dir.join(segment_file_name(*base_offset, SYNC_FAILED));
        files::remove_if_exists(&**place.files, &path).during("remove", &path)?;
    }
    Ok(())
}
