//! The metadata journal: one file at the data root that holds a snapshot of the state and the commands after it.
//!
//! A command is on stable storage before anybody hears of it. After a failed write or sync the journal takes nothing
//! until it is opened again. Once the commands outgrow the snapshot, a new snapshot is written aside and renamed over.
//! Space is taken ahead, and the last of it is for the commands that free space, or that a start needs: topics can be
//! deleted on a full disk.
//!
//! Owns: the file. Refuses: to cut anything but the torn frame of a command that was never acknowledged; everything
//! else that is wrong with the file is named with its place, and the broker does not start.
//! Read next: [`mod@super::format`], then [`super::state`].

use super::command::{Command, Snapshot};
use super::format::{self, Damage, FILE_HEADER_BYTES, FrameKind, MAX_PAYLOAD_BYTES, STEP_BYTES, VERSION};
use super::state::{MetadataState, Refusal};
use headwater_storage::files::{self, File, Files, OpenMode};
use prost::Message;
use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The journal's name at the data root.
pub const JOURNAL_FILE: &str = "headwater.metadata";
/// Space that only urgent commands may take, in bytes: more than a thousand deletions.
pub const RESERVE_BYTES: u64 = 128 << 10;
/// Bytes of commands before a new snapshot is considered.
const SNAPSHOT_AFTER_BYTES: u64 = 1 << 20;

/// The open journal. Every method may block.
#[derive(Debug)]
pub struct Journal {
    files: Arc<dyn Files>,
    path: PathBuf,
    file: Arc<dyn File>,
    /// The file's format.
    version: u32,
    /// Where the next frame goes.
    end: u64,
    len: u64,
    snapshot_bytes: u64,
    /// Where `end` must be before a new snapshot is tried.
    snapshot_at: u64,
    poisoned: Option<String>,
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
        let path = root.join(JOURNAL_FILE);
        let io_error = |what| {
            let path = path.clone();
            move |error| JournalError::Io { path, what, error }
        };
        files::remove_if_exists(&*files, &aside(&path)).map_err(io_error("remove what was written aside for"))?;
        if !files::exists(&*files, &path).map_err(io_error("look for"))? {
            if has_partitions {
                return Err(JournalError::Missing { path });
            }
            let state = MetadataState::new(cluster_id);
            let journal = Journal::write_new(files, path, &state)?;
            return Ok(Opened { journal, state, commands: 0, torn_bytes: 0 });
        }
        let bytes = files::read(&*files, &path, u64::MAX).map_err(io_error("read"))?;
        let scan = format::scan(&bytes).map_err(|damage| JournalError::Damaged { path: path.clone(), damage })?;
        let (state, snapshot_bytes) = replay(&path, &scan.frames)?;
        if state.cluster_id() != cluster_id {
            let found = state.cluster_id().to_owned();
            return Err(JournalError::OtherCluster { path, found, expected: cluster_id.to_owned() });
        }
        let file = files.open(&path, OpenMode::Write).map_err(io_error("open"))?;
        if scan.torn_bytes > 0 {
            let zeros = vec![0; scan.torn_bytes];
            file.write_at(scan.end as u64, &[IoSlice::new(&zeros)]).map_err(io_error("cut a torn frame of"))?;
        }
        // What was read may be in memory only.
        file.sync_all().map_err(io_error("sync"))?;
        files.sync_dir(root).map_err(io_error("sync the folder of"))?;
        let mut journal = Journal {
            files,
            file,
            version: scan.version,
            end: scan.end as u64,
            len: bytes.len() as u64,
            snapshot_bytes,
            snapshot_at: snapshot_at(snapshot_bytes),
            poisoned: None,
            path,
        };
        if journal.version < VERSION
            && let Err(error) = journal.snapshot(&state)
        {
            tracing::warn!(%error, "the metadata journal keeps its old format for now");
        }
        // With a full disk the reserve stays as it is.
        drop(journal.make_room(RESERVE_BYTES));
        Ok(Opened { journal, state, commands: scan.frames.len() - 1, torn_bytes: scan.torn_bytes })
    }

    /// Keeps one command: it is on stable storage when this returns. An urgent one may take the reserve.
    ///
    /// # Errors
    /// [`JournalError`]; the command is not kept.
    pub fn append(&mut self, index: u64, command: &Command, urgent: bool) -> Result<(), JournalError> {
        if let Some(reason) = &self.poisoned {
            return Err(JournalError::Poisoned { path: self.path.clone(), reason: reason.clone() });
        }
        let payload = command.encode_to_vec();
        self.check_size(payload.len())?;
        let end = usize::try_from(self.end).unwrap_or(usize::MAX);
        let frame = format::frame(self.version, end, FrameKind::Command, index, &payload);
        let needed = frame.len() as u64;
        if let Err(error) = self.make_room(needed + RESERVE_BYTES) {
            let fits = urgent && self.len - self.end >= needed;
            if self.poisoned.is_some() || !fits {
                return Err(error);
            }
        }
        self.file.write_at(self.end, &[IoSlice::new(&frame)]).map_err(|error| self.poison("write", error))?;
        self.file.sync_data().map_err(|error| self.poison("sync", error))?;
        self.end += needed;
        Ok(())
    }

    /// Whether the commands have outgrown the snapshot.
    pub fn is_snapshot_due(&self) -> bool {
        self.end >= self.snapshot_at && self.poisoned.is_none()
    }

    /// Replaces snapshot and commands by a snapshot of `state`, which must be what they lead to.
    ///
    /// # Errors
    /// [`JournalError`]; the journal goes on as it was, and the next try comes after as many commands again.
    pub fn snapshot(&mut self, state: &MetadataState) -> Result<(), JournalError> {
        match Journal::write_new(Arc::clone(&self.files), self.path.clone(), state) {
            Ok(fresh) => {
                *self = fresh;
                Ok(())
            }
            Err(error) => {
                self.snapshot_at = self.end + snapshot_at(self.snapshot_bytes);
                if let JournalError::Io { what: SYNC_FOLDER, error, .. } = &error {
                    // Nobody knows which of the two files a crash would leave.
                    self.poisoned = Some(error.to_string());
                }
                Err(error)
            }
        }
    }

    fn write_new(files: Arc<dyn Files>, path: PathBuf, state: &MetadataState) -> Result<Journal, JournalError> {
        let aside = aside(&path);
        let written = Journal::write_aside(&*files, &path, &aside, state);
        if written.is_err() {
            // It is of no use, and the next start removes it if this cannot.
            drop(files::remove_if_exists(&*files, &aside));
        }
        let (file, end, len) = written?;
        let root = path.parent().unwrap_or(Path::new("."));
        files.sync_dir(root).map_err(|error| JournalError::Io { path: path.clone(), what: SYNC_FOLDER, error })?;
        let snapshot_bytes = end - FILE_HEADER_BYTES as u64;
        let snapshot_at = snapshot_at(snapshot_bytes);
        Ok(Journal { files, path, file, version: VERSION, end, len, snapshot_bytes, snapshot_at, poisoned: None })
    }

    /// Writes a journal that holds a snapshot alone, and gives it its name. The file, its end, its length.
    fn write_aside(
        files: &dyn Files,
        path: &Path,
        aside: &Path,
        state: &MetadataState,
    ) -> Result<(Arc<dyn File>, u64, u64), JournalError> {
        let failed = |what| move |error| failure(aside, what, error);
        let payload = state.snapshot().encode_to_vec();
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(JournalError::TooLarge { path: path.to_owned(), bytes: payload.len() });
        }
        let frame = format::frame(VERSION, FILE_HEADER_BYTES, FrameKind::Snapshot, state.index(), &payload);
        let header = format::file_header(VERSION);
        let end = (header.len() + frame.len()) as u64;
        let len = (end + RESERVE_BYTES).next_multiple_of(STEP_BYTES);
        let file = files.open(aside, OpenMode::Create).map_err(failed("create"))?;
        file.reserve(0, len).map_err(failed("take space for"))?;
        file.write_at(0, &[IoSlice::new(&header), IoSlice::new(&frame)]).map_err(failed("write"))?;
        file.sync_all().map_err(failed("sync"))?;
        files.rename(aside, path).map_err(failed("rename"))?;
        Ok((file, end, len))
    }

    /// Takes space until `bytes` fit behind the end. Space counts once the file's length is on stable storage.
    fn make_room(&mut self, bytes: u64) -> Result<(), JournalError> {
        let wanted = (self.end + bytes).next_multiple_of(STEP_BYTES);
        if wanted <= self.len {
            return Ok(());
        }
        let reserved = self.file.reserve(self.len, wanted - self.len);
        reserved.map_err(|error| failure(&self.path, "take space for", error))?;
        self.file.sync_all().map_err(|error| self.poison("sync", error))?;
        self.len = wanted;
        Ok(())
    }

    fn check_size(&self, bytes: usize) -> Result<(), JournalError> {
        match bytes {
            0..=MAX_PAYLOAD_BYTES => Ok(()),
            _ => Err(JournalError::TooLarge { path: self.path.clone(), bytes }),
        }
    }

    fn poison(&mut self, what: &'static str, error: io::Error) -> JournalError {
        self.poisoned = Some(format!("cannot {what}: {error}"));
        JournalError::Io { path: self.path.clone(), what, error }
    }
}

const SYNC_FOLDER: &str = "sync the folder of";

fn replay(path: &Path, frames: &[format::Frame<'_>]) -> Result<(MetadataState, u64), JournalError> {
    let unusable = |position, why: String| JournalError::Unusable { path: path.to_owned(), position, why };
    let Some((first, commands)) = frames.split_first() else {
        return Err(unusable(FILE_HEADER_BYTES, "there is no snapshot".to_owned()));
    };
    let at = first.position;
    let snapshot = Snapshot::decode(first.payload).map_err(|error| unusable(at, error.to_string()))?;
    if snapshot.index != first.index {
        return Err(unusable(at, format!("the snapshot is of index {}, its frame of {}", snapshot.index, first.index)));
    }
    let mut state = MetadataState::from_snapshot(snapshot).map_err(|error| unusable(at, error.to_string()))?;
    for frame in commands {
        let command = Command::decode(frame.payload).map_err(|error| unusable(frame.position, error.to_string()))?;
        let applied = state.apply(frame.index, &command);
        applied.map_err(|refusal: Refusal| unusable(frame.position, refusal.to_string()))?;
    }
    Ok((state, (first.payload.len() + format::FRAME_OVERHEAD_BYTES) as u64))
}

fn snapshot_at(snapshot_bytes: u64) -> u64 {
    FILE_HEADER_BYTES as u64 + snapshot_bytes + SNAPSHOT_AFTER_BYTES.max(snapshot_bytes)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

fn failure(path: &Path, what: &'static str, error: io::Error) -> JournalError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => JournalError::Full { path: path.to_owned() },
        _ => JournalError::Io { path: path.to_owned(), what, error },
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
