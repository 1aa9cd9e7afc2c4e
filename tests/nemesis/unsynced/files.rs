//! The operating system's files, each change to which is written down first so that it can be undone.
//!
//! Syncs reach no disk (a test only kills processes, and the page cache outlives those); they take the time of one, so that there is
//! a while in which a broker could say too much.

use super::log::{Change, UndoLog};
use headwater_storage::files::{DirEntry, Lock, Metadata};
use headwater_storage::{Directory, File, Files, Map, OpenLimit, OpenMode, OsFiles};
use std::fs;
use std::io::{self, ErrorKind, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

/// What a sync does.
#[derive(Debug, Clone)]
pub(crate) enum Sync {
    /// It makes durable what was written, and takes so long.
    Works(Duration),
    /// It waits for somebody after it has begun, and before it ends.
    Held(Arc<Barrier>),
}

/// The files below one folder.
#[derive(Debug)]
pub(crate) struct UnsyncedFiles {
    inner: OsFiles,
    root: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Held while a change is written down and made.
    log: Mutex<UndoLog>,
    sync: Sync,
}

impl Shared {
    /// Runs a sync: what was changed before it began is on the disk when it ends.
    fn sync(&self, synced: impl FnOnce(u64) -> Change) -> io::Result<()> {
        let before = self.log.lock().expect("whole").next;
        match &self.sync {
            Sync::Works(takes) => std::thread::sleep(*takes),
            Sync::Held(barrier) => {
                barrier.wait();
                barrier.wait();
            }
        }
        self.log.lock().expect("whole").add(&synced(before), &[]).map(drop)
    }
}

impl UnsyncedFiles {
    pub(crate) fn open(root: &Path, sync: Sync) -> io::Result<UnsyncedFiles> {
        let log = Mutex::new(UndoLog::open(root)?);
        let shared = Arc::new(Shared { log, sync });
        Ok(UnsyncedFiles { inner: OsFiles::new(), root: root.to_owned(), shared })
    }

    /// The directory of a name below the root, and the name in it.
    fn name_of(&self, path: &Path) -> io::Result<(u64, String)> {
        let dir = path.parent().filter(|dir| dir.starts_with(&self.root)).ok_or(ErrorKind::InvalidInput)?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(ErrorKind::InvalidInput)?;
        Ok((fs::metadata(dir)?.ino(), name.to_owned()))
    }

    /// Keeps what is about to vanish from its name aside.
    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut log = self.shared.log.lock().expect("whole");
        let (dir, name) = self.name_of(path)?;
        let aside = log.keep_next_at();
        log.add(&Change::Remove { dir, name, ino: fs::symlink_metadata(path)?.ino() }, &[])?;
        fs::rename(path, aside)
    }
}

impl Files for UnsyncedFiles {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut log = self.shared.log.lock().expect("whole");
        let ((dir, name), was_there) = (self.name_of(path)?, fs::metadata(path));
        if mode == OpenMode::Create
            && let Ok(was) = &was_there
        {
            let file = self.inner.open(path, OpenMode::Read)?;
            change_length(&mut log, &*file, was.ino(), 0)?;
        }
        let file = self.inner.open(path, mode)?;
        let ino = fs::metadata(path)?.ino();
        if was_there.is_err() {
            log.add(&Change::Made { dir, name, ino }, &[])?;
        }
        Ok(Arc::new(UnsyncedFile { inner: file, ino, shared: Arc::clone(&self.shared) }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.inner.list(dir)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.inner.metadata(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut log = self.shared.log.lock().expect("whole");
        let ((dir, from_name), (to_dir, to_name)) = (self.name_of(from)?, self.name_of(to)?);
        assert_eq!(dir, to_dir, "nothing moves from one directory to another");
        let ino = fs::metadata(from)?.ino();
        let aside = log.keep_next_at();
        log.add(&Change::Rename { dir, from: from_name, to: to_name, ino }, &[])?;
        match fs::metadata(to) {
            // A directory is replaced only if it is empty: then a new one is as good.
            Ok(replaced) if replaced.is_file() => fs::hard_link(to, aside)?,
            _ => {}
        }
        self.inner.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        if fs::symlink_metadata(path)?.is_dir() {
            return Err(ErrorKind::IsADirectory.into());
        }
        self.remove(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|dir| !dir.exists()).collect();
        for dir in missing.into_iter().rev() {
            let mut log = self.shared.log.lock().expect("whole");
            self.inner.create_dir_all(dir)?;
            if dir != self.root && dir.starts_with(&self.root) {
                let (parent, name) = self.name_of(dir)?;
                log.add(&Change::Made { dir: parent, name, ino: fs::metadata(dir)?.ino() }, &[])?;
            }
        }
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        if fs::read_dir(path)?.next().is_some() {
            return Err(ErrorKind::DirectoryNotEmpty.into());
        }
        self.remove(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        // It must be one, and be there.
        drop(self.inner.open_dir(path)?);
        Ok(Box::new(UnsyncedDirectory { ino: fs::metadata(path)?.ino(), shared: Arc::clone(&self.shared) }))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.inner.lock(path)
    }

    fn open_limit(&self) -> &OpenLimit {
        self.inner.open_limit()
    }
}

#[derive(Debug)]
struct UnsyncedDirectory {
    ino: u64,
    shared: Arc<Shared>,
}

impl Directory for UnsyncedDirectory {
    fn sync(&self) -> io::Result<()> {
        self.shared.sync(|before| Change::NamesSynced { dir: self.ino, before })
    }
}

#[derive(Debug)]
struct UnsyncedFile {
    inner: Arc<dyn File>,
    ino: u64,
    shared: Arc<Shared>,
}

/// The bytes of a range up to the file's end; empty, and true, where all are zeros.
fn old_bytes(file: &dyn File, from: u64, to: u64) -> io::Result<(Vec<u8>, bool)> {
    let mut old = vec![0; usize::try_from(to.saturating_sub(from)).expect("it fits")];
    headwater_storage::files::read_exact_at(file, &mut old, from)?;
    let zeros = old.iter().all(|byte| *byte == 0);
    Ok((if zeros { Vec::new() } else { old }, zeros))
}

/// Writes down that a length changes.
fn change_length(log: &mut UndoLog, file: &dyn File, ino: u64, new_len: u64) -> io::Result<()> {
    let old_len = file.len()?;
    if old_len == new_len {
        return Ok(());
    }
    let (old, zeros) = old_bytes(file, new_len, old_len)?;
    log.add(&Change::Length { ino, old_len, new_len, zeros }, &old).map(drop)
}

impl File for UnsyncedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len = parts.iter().map(|part| part.len() as u64).sum::<u64>();
        let mut log = self.shared.log.lock().expect("whole");
        let old_len = self.inner.len()?;
        let (old, zeros) = old_bytes(&*self.inner, offset, old_len.min(offset + len))?;
        log.add(&Change::Write { ino: self.ino, at: offset, len, old_len, zeros }, &old)?;
        self.inner.write_at(offset, parts)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.shared.sync(|before| Change::Synced { ino: self.ino, before })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut log = self.shared.log.lock().expect("whole");
        change_length(&mut log, &*self.inner, self.ino, len)?;
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut log = self.shared.log.lock().expect("whole");
        let new_len = self.inner.len()?.max(offset + len);
        change_length(&mut log, &*self.inner, self.ino, new_len)?;
        self.inner.reserve(offset, len)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn is_resident(&self, offset: u64, len: u64) -> Option<bool> {
        self.inner.is_resident(offset, len)
    }

    fn map(self: Arc<Self>, path: &Path, len: u64) -> io::Result<Arc<Map>> {
        Arc::clone(&self.inner).map(path, len)
    }
}
