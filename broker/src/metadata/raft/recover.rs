//! What is left when the majority of a quorum is lost for good: one member's folder becomes a quorum of one, and the others begin
//! anew. Both are a person's decision, on folders that no broker runs on.
//!
//! The one goes on from everything in its log, be it committed or not, under another member id: whoever speaks to the old one,
//! because it did not hear of this, is refused. What only the lost ones had is gone; the numbers that they may have given out
//! are not given out again.
//!
//! Owns: the two new journals. Refuses: folders that are in use (whoever calls has them locked); how far numbers are raised
//! ([`super::super::state`]). Read next: [`super::store`].

use super::super::format::{OLDEST_VERSION, RAFT_VERSION};
use super::super::journal::{self, JournalError};
use super::super::journal_file::{Bytes, JOURNAL_FILE, JournalFile};
use super::super::state::MetadataState;
use super::kept::Kept;
use super::store::{Store, founded, replay};
use headwater_storage::{Files, files};
use openraft::EntryPayload;
use prost::Message;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The journal of the member that was in a folder before the one that is there now; where there were more, the later ones have a number
/// behind that.
pub const FORMER_FILE: &str = "headwater.metadata.former";

/// What a member that is a quorum of one now goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The version of the metadata.
    pub version: u64,
    /// Entries of its log that it does not know to be committed: they count now.
    pub uncommitted: usize,
    /// Members that voted before, itself included.
    pub voters: usize,
}

impl Store {
    /// Makes a quorum of one of what the folder's member kept. May block.
    ///
    /// # Errors
    /// [`JournalError`]: nothing changed. Also where the member knows nothing of the cluster.
    pub fn recover_alone(
        files: Arc<dyn Files>,
        root: &Path,
        cluster_id: &str,
        new_node_id: u64,
    ) -> Result<Recovered, JournalError> {
        let path = root.join(JOURNAL_FILE);
        let read = Bytes::read(&*files, root)?.ok_or(JournalError::Missing { path: path.clone() })?;
        let scan = read.scan(OLDEST_VERSION..=RAFT_VERSION)?;
        let (mut state, uncommitted, voters) = match scan.version < RAFT_VERSION {
            true => (journal::replay(&path, &scan.frames)?, 0, 1),
            false => {
                let kept = replay(&path, &scan)?;
                let voters = kept.voters().len();
                if voters == 0 {
                    // All that is on the disk would be taken for nobody's, and be deleted after a while.
                    let why = "its member was made anew and never taken in: it knows nothing of the cluster; recover another broker, or put \
                               back what is beside it as headwater.metadata.former";
                    return Err(JournalError::Unusable { path, position: 0, why: why.to_owned() });
                }
                let (state, uncommitted) = everything(&path, &kept)?;
                (state, uncommitted, voters)
            }
        };
        journal::check_cluster(&path, state.cluster_id(), cluster_id)?;
        state.leave_out_what_is_lost();
        let recovered = Recovered { version: state.index(), uncommitted, voters };
        write(files, &path, &founded(new_node_id, state))?;
        Ok(recovered)
    }

    /// Makes a new member of the folder's, which waits to be taken in. What the old one kept stays beside it, for a person who finds out
    /// that nobody else has it: where it is comes back. A member that knew nothing kept nothing (`None`). May block.
    ///
    /// # Errors
    /// [`JournalError`]: the folder's member is who it was.
    pub fn begin_anew(
        files: Arc<dyn Files>,
        root: &Path,
        cluster_id: &str,
        new_node_id: u64,
    ) -> Result<Option<PathBuf>, JournalError> {
        let path = root.join(JOURNAL_FILE);
        let former = match Bytes::read(&*files, root)?.filter(|kept| !knows_nothing(&path, kept)) {
            Some(kept) => Some(keep_former(&*files, root, kept.as_slice())?),
            None => None,
        };
        write(files, &path, &Kept::new(new_node_id, cluster_id))?;
        Ok(former)
    }
}

/// Whether a journal is that of a member which was made anew and never taken in. One that cannot be read is not known to be.
fn knows_nothing(path: &Path, kept: &Bytes) -> bool {
    let Ok(scan) = kept.scan(OLDEST_VERSION..=RAFT_VERSION) else { return false };
    scan.version == RAFT_VERSION && replay(path, &scan).is_ok_and(|kept| kept.voters().is_empty())
}

/// Keeps a journal beside the one that takes its place, and whatever was kept before of others.
fn keep_former(files: &dyn Files, root: &Path, journal: &[u8]) -> Result<PathBuf, JournalError> {
    let mut former = root.join(FORMER_FILE);
    let io_error = |path: &Path, what| {
        let path = path.to_owned();
        move |error| JournalError::Io { path, what, error }
    };
    for number in 1.. {
        if !files::exists(files, &former).map_err(io_error(&former, "look for"))? {
            break;
        }
        let there = files::read(files, &former, u64::MAX).map_err(io_error(&former, "read the older journal in"))?;
        if there == journal {
            // The one before was interrupted.
            return Ok(former);
        }
        former = root.join(format!("{FORMER_FILE}.{number}"));
    }
    let copied = files::replace(files, &former, journal);
    copied.map_err(io_error(&former, "keep the old journal beside the new one"))?;
    Ok(former)
}

fn write(files: Arc<dyn Files>, path: &Path, kept: &Kept) -> Result<(), JournalError> {
    let payload = kept.message(kept.snapshot.as_ref()).encode_to_vec();
    let written = JournalFile::create(files, path.to_owned(), RAFT_VERSION, 0, &payload);
    written.map(drop).map_err(JournalError::at_start)
}

/// The state after all that is in the log, and how many entries of it were not known to be committed.
fn everything(path: &Path, kept: &Kept) -> Result<(MetadataState, usize), JournalError> {
    let in_snapshot = kept.snapshot.as_ref().and_then(|it| it.meta.last_log_id).map_or(0, |last| last.index);
    let committed = kept.committed.map_or(0, |last| last.index).max(in_snapshot);
    let mut state = match &kept.snapshot {
        Some(snapshot) => MetadataState::clone(&snapshot.state),
        None => MetadataState::new(&*kept.cluster_id),
    };
    let mut uncommitted = 0;
    for (index, entry) in kept.entries.range(in_snapshot + 1..) {
        uncommitted += usize::from(*index > committed);
        if let EntryPayload::Normal(command) = &entry.payload {
            if command.command.is_none() {
                let why = format!("entry {index} of the log has no known kind: it was written by a newer Headwater");
                return Err(JournalError::Unusable { path: path.to_owned(), position: 0, why });
            }
            // A refusal is an answer, as when it was applied before.
            drop(state.apply(*index, command));
        }
    }
    Ok((state, uncommitted))
}
