//! The metadata journal: one file at the data root that holds a snapshot of the state and the commands after it.
//!
//! A command is on stable storage before anybody hears of it. After a failed write or sync the journal takes nothing
//! until it is opened again. Once the commands outgrow the snapshot, a new snapshot is written aside and renamed over.
//! Space is taken ahead, and the last of it is for the commands that free space, or that a start needs: topics can be
//! deleted on a full disk.
//!
//! Owns: what the file holds. Refuses: to cut anything but the torn frame of a command that was never acknowledged; everything
//! else that is wrong with the file is named with its place, and the broker does not start.
//! Read next: the file itself (`journal_file.rs`), [`mod@super::format`], then [`super::state`].

use super::command::{Command, Snapshot};
use super::format::{self, Damage, FILE_HEADER_BYTES, OLDEST_VERSION, VERSION};
use super::journal_file::{Bytes, JournalFile, unusable};
pub use super::journal_file::{JOURNAL_FILE, RESERVE_BYTES};
use super::state::{MetadataState, Refusal};
use headwater_storage::files::Files;
use prost::Message;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of commands before a new snapshot is considered.
const SNAPSHOT_AFTER_BYTES: u64 = 1 << 20;

/// The open journal. Every method may block.
#[derive(Debug)]
pub struct Journal {
    file: JournalFile,
    snapshot_bytes: u64,
    /// Where the file's end must be before a new snapshot is tried.
    snapshot_at: u64,
}

/// What opening the journal found.
#[derive(Debug)]
pub struct Opened {
    /// The journal.
    pub journal: Journal,
    /// The state that it holds.
    pub state: MetadataState,
    /// Commands after the snapshot.
    pub commands: usize,
    /// Bytes of a torn frame that were cut.
    pub torn_bytes: usize,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The operating system refused.
    #[error("{path}: cannot {what}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the operating system says.
        error: io::Error,
    },
    /// There is no room.
    #[error("{path}: no room on the disk for the command; delete topics or free space", path = path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// Bytes that were whole once and are not any more.
    #[error("{path}: {damage}; the broker does not start on damaged metadata. Restore the file from a backup", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        damage: Damage,
    },
    /// A good frame whose message makes no sense.
    #[error("{path}: what stands at byte {position} cannot be used: {why}", path = path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        position: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The file is gone, but the data is there.
    #[error("{path} is missing, but the folder holds partitions: without it nobody knows what they are. Restore it from a backup", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file belongs to another cluster.
    #[error("{path} belongs to cluster {found}, the folder to cluster {expected}", path = path.display())]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Its cluster.
        found: String,
        /// The folder's cluster.
        expected: String,
    },
    /// An earlier write or sync failed.
    #[error("{path} takes nothing since a write failed ({reason}): restart the broker", path = path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// The first failure.
        reason: String,
    },
    /// A command or snapshot beyond any sense.
    #[error("{path}: {bytes} bytes are too much for one frame", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The message's size.
        bytes: usize,
    },
}

impl Journal {
    /// Opens the journal of the data root, or makes an empty one where there is none and nothing that it should know.
    ///
    /// # Errors
    /// [`JournalError`]: the broker must not start.
    pub fn open(
        files: Arc<dyn Files>,
        root: &Path,
        cluster_id: &str,
        has_partitions: bool,
    ) -> Result<Opened, JournalError> {
        let Some(read) = Bytes::read(&*files, root)? else {
            let path = root.join(JOURNAL_FILE);
            if has_partitions {
                return Err(JournalError::Missing { path });
            }
            let state = MetadataState::new(cluster_id);
            let payload = state.snapshot().encode_to_vec();
            let file = JournalFile::create(files, path, VERSION, state.index(), &payload)?;
            let snapshot_bytes = frame_bytes(&payload);
            let journal = Journal { file, snapshot_bytes, snapshot_at: snapshot_at(snapshot_bytes) };
            return Ok(Opened { journal, state, commands: 0, torn_bytes: 0 });
        };
        let scan = read.scan(OLDEST_VERSION..=VERSION)?;
        let (state, snapshot_bytes) = replay(read.path(), &scan.frames)?;
        check_cluster(read.path(), state.cluster_id(), cluster_id)?;
        let file = JournalFile::open(files, &read, &scan)?;
        let mut journal = Journal { file, snapshot_bytes, snapshot_at: snapshot_at(snapshot_bytes) };
        if journal.file.version() < VERSION
            && let Err(error) = journal.snapshot(&state)
        {
            tracing::warn!(%error, "the metadata journal keeps its old format for now");
        }
        // With a full disk the reserve stays as it is.
        drop(journal.file.make_room(RESERVE_BYTES));
        Ok(Opened { journal, state, commands: scan.frames.len() - 1, torn_bytes: scan.torn_bytes })
    }

    /// Keeps one command: it is on stable storage when this returns. An urgent one may take the reserve.
    ///
    /// # Errors
    /// [`JournalError`]; the command is not kept.
    pub fn append(&mut self, index: u64, command: &Command, urgent: bool) -> Result<(), JournalError> {
        self.file.append(index, &command.encode_to_vec(), urgent)
    }

    /// Whether the commands have outgrown the snapshot.
    pub fn is_snapshot_due(&self) -> bool {
        self.file.end() >= self.snapshot_at && !self.file.is_poisoned()
    }

    /// Replaces snapshot and commands by a snapshot of `state`, which must be what they lead to.
    ///
    /// # Errors
    /// [`JournalError`]; the journal goes on as it was, and the next try comes after as many commands again.
    pub fn snapshot(&mut self, state: &MetadataState) -> Result<(), JournalError> {
        let payload = state.snapshot().encode_to_vec();
        let replaced = self.file.replace(VERSION, state.index(), &payload);
        match replaced {
            Ok(()) => {
                self.snapshot_bytes = frame_bytes(&payload);
                self.snapshot_at = snapshot_at(self.snapshot_bytes);
            }
            Err(_) => self.snapshot_at = self.file.end() + snapshot_at(self.snapshot_bytes),
        }
        replaced
    }
}

/// Refuses the journal of another cluster.
pub(super) fn check_cluster(path: &Path, found: &str, expected: &str) -> Result<(), JournalError> {
    if found == expected {
        return Ok(());
    }
    Err(JournalError::OtherCluster { path: path.to_owned(), found: found.to_owned(), expected: expected.to_owned() })
}

/// The state that the frames of a one-broker journal lead to, and the bytes of the snapshot that they begin with.
pub(super) fn replay(path: &Path, frames: &[format::Frame<'_>]) -> Result<(MetadataState, u64), JournalError> {
    let Some((first, commands)) = frames.split_first() else {
        let why = "there is no snapshot".to_owned();
        return Err(JournalError::Unusable { path: path.to_owned(), position: FILE_HEADER_BYTES, why });
    };
    let snapshot = Snapshot::decode(first.payload).map_err(|error| unusable(path, first, error))?;
    if snapshot.index != first.index {
        let why = format!("the snapshot is of index {}, its frame of {}", snapshot.index, first.index);
        return Err(unusable(path, first, why));
    }
    let mut state = MetadataState::from_snapshot(snapshot).map_err(|error| unusable(path, first, error))?;
    for frame in commands {
        let command = Command::decode(frame.payload).map_err(|error| unusable(path, frame, error))?;
        let applied = state.apply(frame.index, &command);
        applied.map_err(|refusal: Refusal| unusable(path, frame, refusal))?;
    }
    Ok((state, frame_bytes(first.payload)))
}

fn frame_bytes(payload: &[u8]) -> u64 {
    (payload.len() + format::FRAME_OVERHEAD_BYTES) as u64
}

fn snapshot_at(snapshot_bytes: u64) -> u64 {
    FILE_HEADER_BYTES as u64 + snapshot_bytes + SNAPSHOT_AFTER_BYTES.max(snapshot_bytes)
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
