//! The file under a metadata journal: what it begins with, and records after that, each on stable storage before anybody
//! hears of it.
//!
//! Invariants: every record is synced before the next is written, so only the last can be torn. After a failed write or
//! sync the file takes nothing until it is opened again; then the last record, of which memory may show what the disk never
//! got, is written and synced once more. A new file is written aside, synced, and renamed over the old one: a crash leaves the
//! one or the other.
//!
//! Owns: writing, syncing, taking space ahead, replacing. Refuses: to cut anything but a torn record; the bytes' layout
//! ([`mod@super::format`]), and what they mean ([`super::journal`], [`super::raft`]). Every method may block.

use super::format::{self, FILE_HEADER_BYTES, Frame, FrameKind, MAX_PAYLOAD_BYTES, STEP_BYTES, Scan};
use super::journal::JournalError;
use headwater_storage::files::{self, File, Files, OpenMode};
use std::io::{self, ErrorKind, IoSlice};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The journal's name at the data root.
pub const JOURNAL_FILE: &str = "headwater.metadata";
/// Space that only urgent commands may take, and what the quorum itself writes, in bytes: more than a thousand deletions.
pub const RESERVE_BYTES: u64 = 128 << 10;

/// The file, open for appending.
#[derive(Debug)]
pub(super) struct JournalFile {
    files: Arc<dyn Files>,
    path: PathBuf,
    file: Arc<dyn File>,
    /// The file's format.
    version: u32,
    /// Where the next frame goes.
    end: u64,
    len: u64,
    poisoned: Option<String>,
    closed: bool,
}

/// What a journal's file holds, before anything in it was understood.
#[derive(Debug)]
pub(super) struct Bytes {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Bytes {
    /// Reads the journal of the data root; `None` where there is none. Removes what was written aside for it.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub(super) fn read(files: &dyn Files, root: &Path) -> Result<Option<Bytes>, JournalError> {
        let path = root.join(JOURNAL_FILE);
        let io_error = |what| {
            let path = path.clone();
            move |error| JournalError::Io { path, what, error }
        };
        files::remove_if_exists(files, &aside(&path)).map_err(io_error("remove what was written aside for"))?;
        if !files::exists(files, &path).map_err(io_error("look for"))? {
            return Ok(None);
        }
        let bytes = files::read(files, &path, u64::MAX).map_err(io_error("read"))?;
        Ok(Some(Bytes { path, bytes }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// Its frames, if it has one of the formats in `readable`.
    ///
    /// # Errors
    /// [`JournalError::Damaged`], also for another format.
    pub(super) fn scan(&self, readable: RangeInclusive<u32>) -> Result<Scan<'_>, JournalError> {
        format::scan(&self.bytes, readable).map_err(|damage| JournalError::Damaged { path: self.path.clone(), damage })
    }
}

impl JournalFile {
    /// Opens the file that was read, cuts what is torn, and makes sure that what was read is on stable storage. No sync does
    /// that for bytes whose sync failed once: the system counts them as written. Only the last record can be such.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub(super) fn open(files: Arc<dyn Files>, read: &Bytes, scan: &Scan<'_>) -> Result<JournalFile, JournalError> {
        let path = read.path.clone();
        let io_error = |what| {
            let path = path.clone();
            move |error| JournalError::Io { path, what, error }
        };
        let file = files.open(&path, OpenMode::Write).map_err(io_error("open"))?;
        if scan.torn_bytes > 0 {
            let zeros = vec![0; scan.torn_bytes];
            file.write_at(scan.end as u64, &[IoSlice::new(&zeros)]).map_err(io_error("cut a torn frame of"))?;
        }
        if let [.., before, _] = scan.frames.as_slice()
            && let Some(last) = read.bytes.get(before.end()..scan.end)
        {
            file.write_at(before.end() as u64, &[IoSlice::new(last)]).map_err(io_error("write the last record of"))?;
        }
        file.sync_all().map_err(io_error("sync"))?;
        files.sync_dir(path.parent().unwrap_or(Path::new("."))).map_err(io_error("sync the folder of"))?;
        let end = scan.end as u64;
        // A reservation that failed and a crash may have left less than a step behind it.
        let len = read.bytes.len() as u64 / STEP_BYTES * STEP_BYTES;
        Ok(JournalFile { files, path, file, version: scan.version, end, len, poisoned: None, closed: false })
    }

    /// A new file of this format that begins with `payload`, in the place of the one of this name if there is one.
    ///
    /// # Errors
    /// [`JournalError`]; the old file is there, or nobody knows which of the two a crash would leave.
    pub(super) fn create(
        files: Arc<dyn Files>,
        path: PathBuf,
        version: u32,
        index: u64,
        payload: &[u8],
    ) -> Result<JournalFile, JournalError> {
        let aside = aside(&path);
        let written = write_aside(&*files, &path, &aside, version, index, payload);
        if written.is_err() {
            // It is of no use, and the next start removes it if this cannot.
            drop(files::remove_if_exists(&*files, &aside));
        }
        let (file, end, len) = written?;
        let root = path.parent().unwrap_or(Path::new("."));
        files.sync_dir(root).map_err(|error| JournalError::Io { path: path.clone(), what: SYNC_FOLDER, error })?;
        Ok(JournalFile { files, path, file, version, end, len, poisoned: None, closed: false })
    }

    /// Takes the place of this file by a new one that begins with `payload`.
    ///
    /// # Errors
    /// [`JournalError`]; this file goes on as it was, unless nobody knows which of the two a crash would leave: then it takes
    /// nothing any more.
    pub(super) fn replace(&mut self, version: u32, index: u64, payload: &[u8]) -> Result<(), JournalError> {
        self.check_open()?;
        match JournalFile::create(Arc::clone(&self.files), self.path.clone(), version, index, payload) {
            Ok(fresh) => {
                *self = fresh;
                Ok(())
            }
            Err(error) => {
                if let JournalError::Io { what: SYNC_FOLDER, error, .. } = &error {
                    self.poisoned = Some(error.to_string());
                }
                Err(error)
            }
        }
    }

    /// Keeps one record: it is on stable storage when this returns. Where there is no other room, it takes the reserve.
    ///
    /// # Errors
    /// [`JournalError`]; the record is not kept. After [`JournalError::Io`] it may be there when the file is opened again.
    pub(super) fn append(&mut self, index: u64, payload: &[u8]) -> Result<(), JournalError> {
        self.check_open()?;
        check_size(&self.path, payload.len())?;
        let end = usize::try_from(self.end).unwrap_or(usize::MAX);
        let frame = format::frame(self.version, end, FrameKind::Command, index, payload);
        let needed = frame.len() as u64;
        if let Err(error) = self.make_room(needed + RESERVE_BYTES) {
            let fits = self.len - self.end >= needed;
            if self.poisoned.is_some() || !fits {
                return Err(error);
            }
        }
        self.file.write_at(self.end, &[IoSlice::new(&frame)]).map_err(|error| self.poison("write", error))?;
        self.file.sync_data().map_err(|error| self.poison("sync", error))?;
        self.end += needed;
        Ok(())
    }

    /// Takes space until `bytes` fit behind the end. Space counts once the file's length is on stable storage.
    ///
    /// # Errors
    /// [`JournalError`]: there is no room.
    pub(super) fn make_room(&mut self, bytes: u64) -> Result<(), JournalError> {
        self.check_open()?;
        let wanted = (self.end + bytes).next_multiple_of(STEP_BYTES);
        if wanted <= self.len {
            return Ok(());
        }
        if let Err(error) = self.file.reserve(self.len, wanted - self.len) {
            // It may have got some of it, and a file ends with a step.
            self.file.set_len(self.len).map_err(|error| self.poison("give back space of", error))?;
            return Err(failure(&self.path, "take space for", error));
        }
        self.file.sync_all().map_err(|error| self.poison("sync", error))?;
        self.len = wanted;
        Ok(())
    }

    /// Where the next record goes, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Whether it takes anything still.
    pub(super) fn is_open(&self) -> bool {
        self.check_open().is_ok()
    }

    /// Refuses everything from now on.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    fn check_open(&self) -> Result<(), JournalError> {
        if self.closed {
            return Err(JournalError::Closed { path: self.path.clone() });
        }
        match &self.poisoned {
            Some(reason) => Err(JournalError::Poisoned { path: self.path.clone(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn poison(&mut self, what: &'static str, error: io::Error) -> JournalError {
        self.poisoned = Some(format!("cannot {what}: {error}"));
        JournalError::Io { path: self.path.clone(), what, error }
    }
}

/// A good frame of the file at `path` whose message makes no sense.
pub(super) fn unusable(path: &Path, frame: &Frame<'_>, why: impl ToString) -> JournalError {
    JournalError::Unusable { path: path.to_owned(), position: frame.position, why: why.to_string() }
}

const SYNC_FOLDER: &str = "sync the folder of";

/// Writes a file without records, and gives it its name. The file, its end, its length.
fn write_aside(
    files: &dyn Files,
    path: &Path,
    aside: &Path,
    version: u32,
    index: u64,
    payload: &[u8],
) -> Result<(Arc<dyn File>, u64, u64), JournalError> {
    let failed = |what| move |error| failure(aside, what, error);
    check_size(path, payload.len())?;
    let frame = format::frame(version, FILE_HEADER_BYTES, FrameKind::Snapshot, index, payload);
    let header = format::file_header(version);
    let end = (header.len() + frame.len()) as u64;
    let len = (end + RESERVE_BYTES).next_multiple_of(STEP_BYTES);
    let file = files.open(aside, OpenMode::Create).map_err(failed("create"))?;
    file.reserve(0, len).map_err(failed("take space for"))?;
    file.write_at(0, &[IoSlice::new(&header), IoSlice::new(&frame)]).map_err(failed("write"))?;
    file.sync_all().map_err(failed("sync"))?;
    files.rename(aside, path).map_err(failed("rename"))?;
    Ok((file, end, len))
}

fn check_size(path: &Path, bytes: usize) -> Result<(), JournalError> {
    match bytes {
        0..=MAX_PAYLOAD_BYTES => Ok(()),
        _ => Err(JournalError::TooLarge { path: path.to_owned(), bytes }),
    }
}

/// What is written under this name takes the file's once it is whole.
pub(super) fn aside(path: &Path) -> PathBuf {
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
