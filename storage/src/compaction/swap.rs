//! Puts a cleaned segment in the place of those it was made of, so that a crash at any point leaves the old ones or the new one.
//!
//! Owns: the order of names. Refuses: contents. Read next: `../recovery.rs`, which calls [`finish_or_undo`] before it looks at anything.
//!
//! 1. The cleaned segment's files are complete and synced under `<base>.<extension>.compact.cleaned`; the directory is synced.
//! 2. All but the `.log` get the end `.swap`; the directory is synced.
//! 3. The `.log` gets the end `.swap`; the directory is synced. **From here on the new segment counts.**
//! 4. The other segments that it replaces are removed; the files beside its `.log` get their final names, over the old ones; the directory is synced.
//! 5. The `.log` gets its final name, over the old one; the directory is synced.
//!
//! So a `.log.swap`, without anything of its segment that ends in `.cleaned`, means: finish. Anything else means: undo. That is what Kafka's
//! recovery does with these names, and what it leaves can be finished or undone here.

use std::path::{Path, PathBuf};

use headwater_proto::batch::{BatchHeader, HEADER_BYTES};

use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::error::{During, IoFailure};
use crate::files::{self, Files, OpenMode};
use crate::index::{IndexEntry, OffsetEntry, TimeEntry};
use crate::{producers, transactions};

/// End of the names of files that are being written.
pub(super) const CLEANED: &str = ".compact.cleaned";
/// End of the names of files that are to take the place of others.
pub(crate) const SWAP: &str = ".swap";
/// What stands beside a `.log` and is made with it.
const BESIDE: [&str; 4] = [OffsetEntry::EXTENSION, TimeEntry::EXTENSION, ".crc", transactions::EXTENSION];

/// Steps 2 and 3: the cleaned segment counts afterwards.
pub(super) fn commit(files: &dyn Files, dir: &Path, base_offset: i64) -> Result<(), IoFailure> {
    files.sync_dir(dir).during("sync", dir)?;
    let path = |extension: &str, end: &str| dir.join(segment_file_name(base_offset, &format!("{extension}{end}")));
    for extension in BESIDE {
        rename_if_exists(files, &path(extension, CLEANED), &path(extension, SWAP))?;
    }
    files.sync_dir(dir).during("sync", dir)?;
    let (from, to) = (path(".log", CLEANED), path(".log", SWAP));
    files.rename(&from, &to).during("rename", &from)?;
    files.sync_dir(dir).during("sync", dir)
}

/// Steps 4 and 5. `replaced` are the base offsets of the other segments whose place it takes.
pub(super) fn complete(files: &dyn Files, dir: &Path, base_offset: i64, replaced: &[i64]) -> Result<(), IoFailure> {
    for other in replaced {
        // Its `.log` first: what is left beside a log that is gone is removed when the folder is opened.
        for extension in [".log"].into_iter().chain(BESIDE).chain([producers::EXTENSION]) {
            let path = dir.join(segment_file_name(*other, extension));
            files::remove_if_exists(files, &path).during("remove", &path)?;
        }
    }
    let path = |extension: &str, end: &str| dir.join(segment_file_name(base_offset, &format!("{extension}{end}")));
    for extension in BESIDE {
        rename_if_exists(files, &path(extension, SWAP), &path(extension, ""))?;
    }
    files.sync_dir(dir).during("sync", dir)?;
    let (from, to) = (path(".log", SWAP), path(".log", ""));
    files.rename(&from, &to).during("rename", &from)?;
    files.sync_dir(dir).during("sync", dir)
}

/// Removes what was written of cleaned segments that are not wanted any more.
pub(super) fn discard(files: &dyn Files, dir: &Path, base_offset: i64) -> Result<(), IoFailure> {
    for extension in [".log"].into_iter().chain(BESIDE) {
        let path = dir.join(segment_file_name(base_offset, &format!("{extension}{CLEANED}")));
        files::remove_if_exists(files, &path).during("remove", &path)?;
    }
    Ok(())
}

/// Finishes what counted when the power failed or the process ended, and removes what did not. Returns the segments that were put in place.
pub(crate) fn finish_or_undo(files: &dyn Files, dir: &Path) -> Result<Vec<PathBuf>, IoFailure> {
    let mut swapped: Vec<i64> = Vec::new();
    let mut cleaned: Vec<i64> = Vec::new();
    let (mut undone, mut logs): (Vec<(i64, PathBuf)>, Vec<i64>) = (Vec::new(), Vec::new());
    for entry in files.list(dir).during("list", dir)?.into_iter().filter(|entry| !entry.is_dir) {
        let Some((base_offset, extension)) = parse_segment_file_name(&entry.name) else { continue };
        if extension == ".log" {
            logs.push(base_offset);
        } else if extension.ends_with(".cleaned") {
            cleaned.push(base_offset);
        } else if extension.ends_with(SWAP) {
            if extension == format!(".log{SWAP}") {
                swapped.push(base_offset);
            }
            undone.push((base_offset, dir.join(&entry.name)));
        }
    }
    swapped.retain(|base_offset| !cleaned.contains(base_offset));
    undone.retain(|(base_offset, _)| !swapped.contains(base_offset));
    if !undone.is_empty() {
        for (_, path) in &undone {
            files.remove_file(path).during("remove", path)?;
        }
        // They must be gone before the `.cleaned` ones go, which say that they do not count.
        files.sync_dir(dir).during("sync", dir)?;
    }
    for base_offset in &swapped {
        let path = dir.join(segment_file_name(*base_offset, &format!(".log{SWAP}")));
        let next_offset = next_offset(files, &path)?.unwrap_or(*base_offset);
        let within = |other: &&i64| **other > *base_offset && **other < next_offset;
        let replaced: Vec<i64> = logs.iter().filter(within).copied().collect();
        complete(files, dir, *base_offset, &replaced)?;
    }
    Ok(swapped.into_iter().map(|base_offset| dir.join(segment_file_name(base_offset, ".log"))).collect())
}

/// The offset after the last batch of a file.
fn next_offset(files: &dyn Files, path: &Path) -> Result<Option<i64>, IoFailure> {
    let file = files.open(path, OpenMode::Read).during("open", path)?;
    let len = file.len().during("look at", path)?;
    let (mut position, mut next_offset) = (0, None);
    let mut head = [0; HEADER_BYTES];
    while position + HEADER_BYTES as u64 <= len {
        files::read_exact_at(&*file, &mut head, position).during("read", path)?;
        let Ok(header) = BatchHeader::parse(&head) else { break };
        next_offset = Some(header.next_offset());
        position += header.size() as u64;
    }
    Ok(next_offset)
}

fn rename_if_exists(files: &dyn Files, from: &Path, to: &Path) -> Result<(), IoFailure> {
    match files.rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.during("rename", from),
    }
}
