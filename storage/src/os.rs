//! Files of the operating system, and everything that only Linux has.
//!
//! Owns: [`OsFiles`]; `fallocate`, `cachestat` and `MADV_POPULATE_READ`, each with a portable fallback. Refuses: policy (how much to
//! reserve, when to ask whether a range is resident). Read next: `segment.rs`.
// One system call that no safe wrapper has (cachestat, 451) is made here, in `cachestat`.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, ErrorKind, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::files::{DirEntry, Directory, File, Files, Lock, Metadata, OpenMode};
use crate::map::Map;
use crate::segment::OpenLimit;

/// Most parts of one vectored write (`IOV_MAX`).
const MAX_PARTS: usize = 1024;

/// The operating system's files.
#[derive(Debug)]
pub struct OsFiles {
    open_limit: OpenLimit,
}

impl OsFiles {
    /// Files with a bound on open segments that leaves most of the process's descriptors to others: a quarter of its
    /// limit, at most 4,096.
    pub fn new() -> OsFiles {
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        OsFiles::with_open_limit((descriptors / 4).clamp(16, 4096) as usize)
    }

    /// Files with at most this many segments open at once (a descriptor and a map each). Fewer cost reopening.
    pub fn with_open_limit(segments: usize) -> OsFiles {
        OsFiles { open_limit: OpenLimit::new(segments) }
    }
}

impl Default for OsFiles {
    fn default() -> Self {
        OsFiles::new()
    }
}

impl Files for OsFiles {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::Write => options.write(true),
            OpenMode::CreateNew => options.write(true).create_new(true),
            OpenMode::Create => options.write(true).create(true).truncate(true),
            OpenMode::Ensure => options.write(true).create(true),
        };
        Ok(Arc::new(OsFile(options.open(path)?)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string() {
                entries.push(DirEntry { name, is_dir: entry.file_type()?.is_dir() });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let metadata = fs::metadata(path)?;
        let modified_ms = match metadata.modified()?.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_millis() as i64,
            Err(before) => -(before.duration().as_millis() as i64),
        };
        Ok(Metadata { len: metadata.len(), modified_ms, is_dir: metadata.is_dir() })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        Ok(Box::new(OsDirectory(fs::File::open(path)?)))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(OsLock { _file: file })),
            Err(fs::TryLockError::WouldBlock) => Err(ErrorKind::WouldBlock.into()),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn open_limit(&self) -> &OpenLimit {
        &self.open_limit
    }
}

#[derive(Debug)]
struct OsLock {
    _file: fs::File,
}

impl Lock for OsLock {}

#[derive(Debug)]
struct OsDirectory(fs::File);

impl Directory for OsDirectory {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

#[derive(Debug)]
struct OsFile(fs::File);

impl File for OsFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, mut offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut parts: Vec<IoSlice<'_>> = parts.to_vec();
        let mut rest = parts.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match rustix::io::pwritev(&self.0, &rest[..rest.len().min(MAX_PARTS)], offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    offset += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        reserve(&self.0, offset, len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn is_resident(&self, offset: u64, len: u64) -> Option<bool> {
        cachestat::is_resident(&self.0, offset, len)
    }

    fn map(self: Arc<Self>, path: &Path, len: u64) -> io::Result<Arc<Map>> {
        let file: Arc<dyn File> = Arc::clone(&self) as Arc<dyn File>;
        Map::of_descriptor(&self.0, file, path, len)
    }
}

/// Takes disk space. Where the file system cannot (and off Linux), zeros are written, which takes it as surely.
fn reserve(file: &fs::File, offset: u64, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    loop {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), offset, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let (mut at, end) = (file.metadata()?.len().max(offset), offset + len);
    let zeros = vec![0u8; 64 * 1024];
    while at < end {
        let n = (zeros.len() as u64).min(end - at);
        file.write_all_at(&zeros[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// Faults a range of a map in, as reads. `None` if the system has no such call.
pub(crate) fn populate_read(mmap: &memmap2::Mmap, offset: usize, len: usize) -> Option<io::Result<()>> {
    #[cfg(target_os = "linux")]
    {
        let page = rustix::param::page_size();
        let start = offset / page * page;
        match mmap.advise_range(memmap2::Advice::PopulateRead, start, offset + len - start) {
            Ok(()) => Some(Ok(())),
            Err(error) if error.kind() == ErrorKind::InvalidInput => None,
            // EFAULT is how the kernel reports a page that cannot be read.
            Err(error) => Some(Err(error)),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (mmap, offset, len);
        None
    }
}

mod cachestat {
    #[cfg(target_os = "linux")]
    pub(super) fn is_resident(file: &std::fs::File, offset: u64, len: u64) -> Option<bool> {
        use std::os::fd::AsRawFd;
        use std::sync::atomic::{AtomicBool, Ordering};

        /// `cachestat(2)`, Linux 6.5; the number is the same on every architecture.
        const SYS_CACHESTAT: libc::c_long = 451;
        static MISSING: AtomicBool = AtomicBool::new(false);

        #[repr(C)]
        struct Range {
            offset: u64,
            len: u64,
        }
        #[repr(C)]
        #[derive(Default)]
        struct Stat {
            cached: u64,
            dirty: u64,
            writeback: u64,
            evicted: u64,
            recently_evicted: u64,
        }

        if len == 0 {
            return Some(true);
        }
        if MISSING.load(Ordering::Relaxed) {
            return None;
        }
        let page = rustix::param::page_size() as u64;
        let range = Range { offset, len };
        let mut stat = Stat::default();
        // SAFETY: both structures are the kernel's (include/uapi/linux/mman.h), live for the call, and the descriptor is open.
        let answer = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &range, &mut stat, 0) };
        if answer != 0 {
            MISSING.store(true, Ordering::Relaxed);
            return None;
        }
        let pages = (offset + len).div_ceil(page) - offset / page;
        Some(stat.cached >= pages)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_resident(_file: &std::fs::File, _offset: u64, _len: u64) -> Option<bool> {
        None
    }
}
