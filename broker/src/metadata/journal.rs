//! The journal that a broker kept alone, before there were quorums: a snapshot of the state and the commands after it, in
//! versions 1 and 2 of the file. It is read once, when its folder is taken over ([`super::raft::store`]).
//!
//! Owns: reading it, and what can be wrong with a journal of any version. Refuses: everything that makes no sense, with its
//! place. Read next: the file itself (`journal_file.rs`), [`mod@super::format`].

use super::command::{Command, Snapshot};
use super::format::{Damage, FILE_HEADER_BYTES, Frame};
use super::journal_file::unusable;
pub use super::journal_file::{JOURNAL_FILE, RESERVE_BYTES};
use super::state::{MetadataState, Refusal};
use headwater_storage::checkpoint::META_PROPERTIES;
use prost::Message;
use std::io;
use std::path::{Path, PathBuf};

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
    /// There is no room for what a start writes, and nothing can be deleted before it.
    #[error(
        "{path}: no room on the disk for the metadata journal that this version writes; free space on it and start again. \
         The journal is as it was", path = path.display()
    )]
    FullAtStart {
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
    #[error("{path} belongs to cluster {found}, the folder to cluster {expected}, as cluster.id in {} says: one of the two is damaged or another folder's",
        path.with_file_name(META_PROPERTIES).display(), path = path.display())]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Its cluster.
        found: String,
        /// The folder's cluster.
        expected: String,
    },
    /// An earlier write or sync failed.
    #[error("{path} takes nothing since a write failed ({reason}): restart the broker. What was written then may be in force after it", path = path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// The first failure.
        reason: String,
    },
    /// The broker has let go of it: the next one may have it by now.
    #[error("{path} is closed: nothing is written to it any more", path = path.display())]
    Closed {
        /// The file.
        path: PathBuf,
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

impl JournalError {
    /// As it is told to whoever starts a broker.
    pub(crate) fn at_start(self) -> JournalError {
        match self {
            JournalError::Full { path } => JournalError::FullAtStart { path },
            error => error,
        }
    }
}

/// Refuses the journal of another cluster.
pub(super) fn check_cluster(path: &Path, found: &str, expected: &str) -> Result<(), JournalError> {
    if found == expected {
        return Ok(());
    }
    Err(JournalError::OtherCluster { path: path.to_owned(), found: found.to_owned(), expected: expected.to_owned() })
}

/// The state that the frames lead to.
pub(super) fn replay(path: &Path, frames: &[Frame<'_>]) -> Result<MetadataState, JournalError> {
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
    Ok(state)
}

#[cfg(test)]
#[path = "journal_tests.rs"]
pub(super) mod tests;
