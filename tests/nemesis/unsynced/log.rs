//! How each change that is not synced yet is undone: one file beside the data folder, written through the page cache, which
//! outlives the process.
//!
//! A record is a line of JSON, and behind it the bytes that were there before. Files and directories go by their inodes: names
//! change. What is removed or replaced is kept in a folder beside the log, so that no inode comes again.

use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// A change, as it can be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Change {
    /// Bytes of a file are about to be overwritten. Behind the record stand those that were there, up to the file's old end.
    Write { ino: u64, at: u64, len: u64, old_len: u64, zeros: bool },
    /// A file's length is about to change. Behind the record stand the bytes beyond the new one.
    Length { ino: u64, old_len: u64, new_len: u64, zeros: bool },
    /// Everything before this record was on the disk when the sync of this file returned.
    Synced { ino: u64, before: u64 },
    /// A name was made.
    Made { dir: u64, name: String, ino: u64 },
    /// A name is about to be removed; its file or directory is kept under the record's number.
    Remove { dir: u64, name: String, ino: u64 },
    /// A name is about to become another one; what had that is kept under the record's number.
    Rename { dir: u64, from: String, to: String, ino: u64 },
    /// As [`Change::Synced`], of the names in a directory.
    NamesSynced { dir: u64, before: u64 },
}

impl Change {
    /// How many bytes stand behind the record.
    fn old_bytes(&self) -> u64 {
        match self {
            Change::Write { zeros: false, at, len, old_len, .. } => (at + len).min(*old_len).saturating_sub(*at),
            Change::Length { zeros: false, old_len, new_len, .. } => old_len.saturating_sub(*new_len),
            _ => 0,
        }
    }
}

/// A change, and the bytes that were there before.
pub(super) type Record = (Change, Vec<u8>);

/// The log, written to.
#[derive(Debug)]
pub(super) struct UndoLog {
    file: File,
    /// The number of the next record.
    pub(super) next: u64,
    kept: PathBuf,
}

/// Where the undo log of a data folder is.
fn folder_of(root: &Path) -> PathBuf {
    let mut name = root.file_name().expect("a folder with a name").to_owned();
    name.push(".unsynced");
    root.with_file_name(name)
}

fn path_of(root: &Path) -> PathBuf {
    folder_of(root).join("undo.log")
}

/// Where that is kept which the record with this number removes or replaces.
pub(super) fn kept_at(kept: &Path, number: u64) -> PathBuf {
    kept.join(number.to_string())
}

/// The folder of what was removed or replaced.
pub(super) fn kept_of(root: &Path) -> PathBuf {
    folder_of(root).join("kept")
}

impl UndoLog {
    /// Goes on with the log of this data folder: what an earlier process did not sync is not synced by its end.
    pub(super) fn open(root: &Path) -> std::io::Result<UndoLog> {
        fs::create_dir_all(kept_of(root))?;
        let (records, whole) = read(root)?;
        let file = OpenOptions::new().create(true).append(true).open(path_of(root))?;
        // A record that the end of a process cut belongs to a change that was not made.
        file.set_len(whole)?;
        Ok(UndoLog { file, next: records.len() as u64, kept: kept_of(root) })
    }

    /// Adds a record and answers with its number.
    pub(super) fn add(&mut self, change: &Change, old: &[u8]) -> std::io::Result<u64> {
        assert_eq!(change.old_bytes(), old.len() as u64, "{change:?}");
        let mut bytes = serde_json::to_vec(change).expect("plain values");
        bytes.push(b'\n');
        bytes.extend_from_slice(old);
        self.file.write_all(&bytes)?;
        self.next += 1;
        Ok(self.next - 1)
    }

    /// Where what the next record removes is kept.
    pub(super) fn keep_next_at(&self) -> PathBuf {
        kept_at(&self.kept, self.next)
    }
}

/// The whole records, and how many bytes of the log they are.
pub(super) fn read(root: &Path) -> std::io::Result<(Vec<Record>, u64)> {
    let mut bytes = Vec::new();
    match File::open(path_of(root)) {
        Ok(mut file) => file.read_to_end(&mut bytes)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let (mut records, mut at) = (Vec::new(), 0);
    while let Some(end) = bytes[at..].iter().position(|byte| *byte == b'\n').map(|length| at + length) {
        let change: Change = serde_json::from_slice(&bytes[at..end])?;
        let old_end = end + 1 + usize::try_from(change.old_bytes()).expect("it was read whole");
        let Some(old) = bytes.get(end + 1..old_end) else { break };
        records.push((change, old.to_vec()));
        at = old_end;
    }
    Ok((records, at as u64))
}

/// Everything that was written is on the disk now: there is nothing to undo.
pub(super) fn forget(root: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(folder_of(root)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
