//! The seam between the log and the disk: everything that storage asks of a file system.
//!
//! Owns: the [`Files`] and [`File`] contracts, and the two small-file operations that everything else composes
//! ([`read`], [`replace`]). Refuses: caching, formats, and any other use of `std::fs` in this crate.
//! Implementations: [`crate::OsFiles`] (the operating system) and [`crate::SimFiles`] (a disk that crashes).
//! Read next: `os.rs`, then `segment.rs`.

use std::fmt::Debug;
use std::io::{self, ErrorKind, IoSlice};
use std::path::Path;
use std::sync::Arc;

use crate::map::Map;
use crate::segment::OpenLimit;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Existing, for reading.
    Read,
    /// Existing, for reading and writing.
    Write,
    /// New, for reading and writing; an existing file is an error.
    CreateNew,
    /// For reading and writing; emptied if it exists.
    Create,
    /// For reading and writing; made if it is missing.
    Ensure,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without its directory. Names that are not UTF-8 are left out of listings: nobody here wrote them.
    pub name: String,
    /// A directory rather than a file.
    pub is_dir: bool,
}

/// What the file system knows about a file without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Its length in bytes.
    pub len: u64,
    /// When it was last written, in milliseconds since the epoch.
    pub modified_ms: i64,
    /// A directory rather than a file.
    pub is_dir: bool,
}

/// A file system. Every method may block.
///
/// What it promises about a crash is what POSIX and ext4 promise: the bytes of a file are durable once
/// [`File::sync_data`] returned, a name (made, renamed or removed) once [`Files::sync_dir`] returned, a rename is atomic,
/// the changes to one directory reach the disk in their order, and nothing else is certain.
pub trait Files: Debug + Send + Sync + 'static {
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;
    /// The names in a directory, in order.
    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>>;
    /// Length and times of a file.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;
    /// Gives a file or directory another name, replacing a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file's name. Open files and maps of it live on.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Creates a directory and those above it; one that exists is fine.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens a directory, so that no further file is needed to sync it.
    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.open_dir(path)?.sync()
    }
    /// Bytes that may still be written below this path.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Locks a file, which is created if missing, against every other process (and every other lock of it in this one) until what
    /// is returned is dropped. `WouldBlock` if somebody has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>>;
    /// The bound on segments that are open at once, over all logs that use these files.
    fn open_limit(&self) -> &OpenLimit;
}

/// What [`Files::lock`] returns: the lock is let go when this is dropped.
pub trait Lock: Debug + Send + Sync {}

/// An open directory.
pub trait Directory: Debug + Send + Sync {
    /// Makes the names in it durable (`fsync`).
    fn sync(&self) -> io::Result<()>;
}

/// An open file. Reads and writes are positional; a write reaches every open handle and map of the file at once.
pub trait File: Debug + Send + Sync {
    /// Reads into `buffer` from `offset`; fewer bytes than asked only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all parts, one after another, from `offset` on.
    fn write_at(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;
    /// Makes the bytes written so far durable, and the length if it is needed to read them (`fdatasync`).
    fn sync_data(&self) -> io::Result<()>;
    /// As [`File::sync_data`], and everything else about the file (`fsync`).
    fn sync_all(&self) -> io::Result<()>;
    /// Cuts the file, or extends it with zeros that may have no space behind them.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Takes disk space for `len` bytes from `offset` on and extends the file over them with zeros; bytes that are there stay.
    /// `StorageFull` when there is none: then a later write there would have failed.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Whether every byte of the range is in memory; `None` if the system cannot tell.
    fn is_resident(&self, offset: u64, len: u64) -> Option<bool>;
    /// A read-only map of the first `len` bytes, which may reach beyond the end of the file.
    fn map(self: Arc<Self>, path: &Path, len: u64) -> io::Result<Arc<Map>>;
}

/// Reads exactly `buffer.len()` bytes; `UnexpectedEof` if the file ends before.
pub fn read_exact_at(file: &dyn File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Reads a small file whole; `FileTooLarge` if it has more than `limit` bytes.
pub fn read(files: &dyn Files, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = files.open(path, OpenMode::Read)?;
    let len = file.len()?;
    if len > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("{len} bytes, at most {limit} are sensible")));
    }
    let mut bytes = vec![0; len as usize];
    read_exact_at(&*file, &mut bytes, 0)?;
    Ok(bytes)
}

/// Gives a small file new contents so that a crash leaves either the old or the new: written aside, synced, renamed over, and
/// the directory synced.
pub fn replace(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = Path::new(&aside);
    let written = (|| {
        let file = files.open(aside, OpenMode::Create)?;
        file.write_at(0, &[IoSlice::new(bytes)])?;
        file.sync_all()?;
        files.rename(aside, path)
    })();
    if let Err(error) = written {
        // What was written aside is of no use to anybody; that it cannot be removed either changes nothing.
        let _ = files.remove_file(aside);
        return Err(error);
    }
    files.sync_dir(parent(path))
}

/// Whether something of this name exists.
pub fn exists(files: &dyn Files, path: &Path) -> io::Result<bool> {
    match files.metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a file; one that is not there is fine.
pub fn remove_if_exists(files: &dyn Files, path: &Path) -> io::Result<bool> {
    match files.remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The directory that holds this name.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Whether an error says that the disk (or the quota) is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Whether an error says that the process or the system has too many files or maps, which passes.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}
