//! Read-only maps of segment files, and views of them that the transport may hold.
//!
//! Owns: all of this crate's memory mapping, and the argument why it is sound. Refuses: deciding which bytes are published
//! (`segment.rs`). Read next: `segment.rs`.
//!
//! # Why this is sound
//!
//! A `&[u8]` over a file is sound while nobody changes the bytes under it and the file keeps them. So:
//!
//! * A [`Map`] is read-only; every write goes through a file handle, at a position.
//! * A view exists only of bytes below the map's *published end*, which [`Map::publish`] alone moves, and only up. Its callers
//!   (all in this crate) publish bytes after they were written. Published bytes are never rewritten: an append writes at or beyond
//!   the published end, truncation builds a new file, and a file is recycled for a new segment only once nobody
//!   holds its map (`segment.rs`, `Segment::retire`), and then is mapped anew.
//! * A file is never shortened below its published end: trimming cuts reserved space beyond it. Deleting is unlinking, and a map
//!   keeps an unlinked file's bytes.
//! * The data directory is locked against other brokers (`datadir.rs`).
//!
//! What remains is accepted: another program that writes into or shortens the files of a running broker, and a medium that
//! fails under a page which is not in memory. The latter raises SIGBUS; a handler names file and offset before the process
//! ends, and cold ranges are populated first ([`Map::populate`]), which returns such a failure as an error.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::files::{File, read_exact_at};

/// A read-only map of the beginning of a file.
#[derive(Debug)]
pub struct Map {
    memory: Memory,
    file: Arc<dyn File>,
    path: PathBuf,
    published: AtomicU64,
    len: u64,
}

#[derive(Debug)]
enum Memory {
    Mapped {
        mmap: memmap2::Mmap,
        registration: bus_error::Registration,
    },
    /// A simulated file: views are copies.
    Copied,
}

impl Map {
    /// Maps the first `len` bytes of the file behind `descriptor`, which is also `file`.
    pub(crate) fn of_descriptor(
        descriptor: &std::fs::File,
        file: Arc<dyn File>,
        path: &Path,
        len: u64,
    ) -> io::Result<Arc<Map>> {
        let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: the module's head says why bytes below the published end never change or vanish; no others are read.
        let mmap = unsafe { memmap2::MmapOptions::new().len(bytes).map(descriptor)? };
        let registration = bus_error::Registration::new(mmap.as_ptr() as usize, bytes, path);
        let memory = Memory::Mapped { mmap, registration };
        Ok(Arc::new(Map { memory, file, path: path.into(), published: AtomicU64::new(0), len }))
    }

    /// A stand-in whose views are read from the file and copied.
    pub(crate) fn of_simulated(file: Arc<dyn File>, path: &Path, len: u64) -> Arc<Map> {
        Arc::new(Map { memory: Memory::Copied, file, path: path.into(), published: AtomicU64::new(0), len })
    }

    /// How far the map reaches, in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty map cannot be made
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How much of it may be viewed, in bytes.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// Allows views of everything below `end`: those bytes are written and will never be written again.
    pub(crate) fn publish(&self, end: u64) {
        self.published.fetch_max(end.min(self.len), Ordering::Release);
    }

    /// A view of published bytes, without a copy. `None` if the range reaches beyond the published end.
    ///
    /// Touching the bytes of a view may fault and block; see [`Map::populate`].
    pub(crate) fn view(self: &Arc<Map>, range: Range<u64>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.published.load(Ordering::Acquire) {
            return None;
        }
        match &self.memory {
            Memory::Mapped { .. } => Some(Bytes::from_owner(View { map: Arc::clone(self), range })),
            Memory::Copied => {
                let mut copy = vec![0; (range.end - range.start) as usize];
                read_exact_at(&*self.file, &mut copy, range.start).ok()?;
                Some(copy.into())
            }
        }
    }

    /// Copies published bytes from a position on. False if they reach beyond the published end.
    pub(crate) fn copy(&self, position: u64, to: &mut [u8]) -> bool {
        let range = position..position.saturating_add(to.len() as u64);
        if range.end > self.published.load(Ordering::Acquire) {
            return false;
        }
        match &self.memory {
            Memory::Mapped { .. } => to.copy_from_slice(self.bytes(range)),
            Memory::Copied => return read_exact_at(&*self.file, to, position).is_ok(),
        }
        true
    }

    /// Whether a published range is in memory, so that touching it will not block. `None` if the system cannot tell.
    pub(crate) fn is_resident(&self, range: Range<u64>) -> Option<bool> {
        self.file.is_resident(range.start, range.end.saturating_sub(range.start))
    }

    /// Brings a published range into memory and into this map; blocks. A bad block is an error here, where touching it would
    /// be a SIGBUS.
    pub(crate) fn populate(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.published.load(Ordering::Acquire));
        if range.start >= end {
            return Ok(());
        }
        if let Memory::Mapped { mmap, .. } = &self.memory {
            match crate::os::populate_read(mmap, range.start as usize, (end - range.start) as usize) {
                Some(result) => return result,
                None => tracing::trace!("no populating here, reading instead"),
            }
        }
        let mut scratch = vec![0; (1 << 20).min((end - range.start) as usize)];
        let mut at = range.start;
        while at < end {
            let n = self.file.read_at(&mut scratch, at)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += n as u64;
        }
        Ok(())
    }

    fn bytes(&self, range: Range<u64>) -> &[u8] {
        debug_assert!(range.end <= self.published.load(Ordering::Acquire));
        match &self.memory {
            Memory::Mapped { mmap, .. } => &mmap[range.start as usize..range.end as usize],
            Memory::Copied => &[],
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if let Memory::Mapped { registration, .. } = &mut self.memory {
            // Before the addresses may belong to somebody else.
            registration.remove();
        }
        tracing::trace!(path = %self.path.display(), "unmapped");
    }
}

/// Part of a map, kept alive by whoever holds it.
struct View {
    map: Arc<Map>,
    range: Range<u64>,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.map.bytes(self.range.clone())
    }
}

/// The SIGBUS handler: finds the map that the fault lies in, names its file and the offset, and lets the process die of the signal.
mod bus_error {
    use std::path::Path;
    use std::ptr;
    use std::sync::Once;
    use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

    /// Maps beyond this many at once are not named by the handler.
    const MAX_NAMED_MAPS: usize = 8192;

    /// A mapped range. `start` is written last and cleared first, so that the handler, which may run at any moment on any thread, sees whole entries.
    struct Entry {
        start: AtomicUsize,
        len: AtomicUsize,
        path: AtomicPtr<PathText>,
    }

    /// A path as the handler prints it. Leaked once per entry of the table and then reused, so that the handler never
    /// reads freed memory: at most `MAX_NAMED_MAPS` of them exist.
    struct PathText {
        len: AtomicUsize,
        bytes: [std::sync::atomic::AtomicU8; MAX_PATH_TEXT],
    }

    const MAX_PATH_TEXT: usize = 240;

    static TABLE: [Entry; MAX_NAMED_MAPS] = [const {
        Entry { start: AtomicUsize::new(0), len: AtomicUsize::new(0), path: AtomicPtr::new(ptr::null_mut()) }
    }; MAX_NAMED_MAPS];
    static NEXT_FREE_HINT: AtomicUsize = AtomicUsize::new(0);
    static INSTALL: Once = Once::new();

    /// Marks a slot whose owner is still writing it.
    const CLAIMED: usize = 1;

    /// A line of the table, given back by [`Registration::remove`].
    #[derive(Debug)]
    pub(super) struct Registration {
        slot: Option<usize>,
    }

    impl Registration {
        pub(super) fn new(start: usize, len: usize, path: &Path) -> Registration {
            INSTALL.call_once(install);
            let first = NEXT_FREE_HINT.load(Ordering::Relaxed);
            for step in 0..MAX_NAMED_MAPS {
                let slot = (first + step) % MAX_NAMED_MAPS;
                let entry = &TABLE[slot];
                if entry.start.compare_exchange(0, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                NEXT_FREE_HINT.store(slot + 1, Ordering::Relaxed);
                let mut text = entry.path.load(Ordering::Acquire);
                if text.is_null() {
                    text = Box::leak(Box::new(PathText {
                        len: AtomicUsize::new(0),
                        bytes: [const { std::sync::atomic::AtomicU8::new(0) }; MAX_PATH_TEXT],
                    }));
                    entry.path.store(text, Ordering::Release);
                }
                // SAFETY: `text` was leaked above or by an earlier owner of the slot, and is never freed.
                let text = unsafe { &*text };
                let bytes = path.as_os_str().as_encoded_bytes();
                let kept = &bytes[bytes.len().saturating_sub(MAX_PATH_TEXT)..];
                text.bytes.iter().zip(kept).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
                text.len.store(kept.len(), Ordering::Relaxed);
                entry.len.store(len, Ordering::Relaxed);
                entry.start.store(start, Ordering::Release);
                return Registration { slot: Some(slot) };
            }
            Registration { slot: None }
        }

        pub(super) fn remove(&mut self) {
            if let Some(slot) = self.slot.take() {
                TABLE[slot].start.store(0, Ordering::Release);
                NEXT_FREE_HINT.store(slot, Ordering::Relaxed);
            }
        }
    }

    static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

    fn install() {
        // SAFETY: zero is a valid `sigaction`; the handler below has the signature that SA_SIGINFO asks for and does only
        // what a signal handler may (atomics and write(2)); both pointers are valid for the call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            let previous = Box::leak(Box::new(std::mem::zeroed::<libc::sigaction>()));
            if libc::sigaction(libc::SIGBUS, &action, previous) == 0 {
                PREVIOUS.store(previous, Ordering::Release);
            }
        }
    }

    extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo for SIGBUS.
        let address = unsafe { (*info).si_addr() } as usize;
        for entry in &TABLE {
            let start = entry.start.load(Ordering::Acquire);
            let len = entry.len.load(Ordering::Relaxed);
            if start <= CLAIMED || address < start || address - start >= len {
                continue;
            }
            // SAFETY: set before `start` was, leaked, never freed.
            let text = unsafe { &*entry.path.load(Ordering::Acquire) };
            let mut message = Message { bytes: [0; 512], len: 0 };
            message.push(b"headwater: SIGBUS: cannot read ");
            let kept = text.len.load(Ordering::Relaxed).min(MAX_PATH_TEXT);
            text.bytes[..kept].iter().for_each(|byte| message.push(&[byte.load(Ordering::Relaxed)]));
            message.push(b" at offset ");
            message.push_decimal(address - start);
            message.push(b": a bad block, or the file was shortened by another program\n");
            message.write_to_standard_error();
            break;
        }
        // Whoever was installed before decides; without anybody the default does, which ends the process at the same
        // instruction.
        let previous = PREVIOUS.load(Ordering::Acquire);
        // SAFETY: `previous` is null or was leaked by `install`; sigaction may be called from a handler.
        unsafe {
            if previous.is_null() {
                libc::signal(signal, libc::SIG_DFL);
            } else {
                libc::sigaction(signal, previous, ptr::null_mut());
            }
        }
    }

    /// A line of text put together without allocating.
    struct Message {
        bytes: [u8; 512],
        len: usize,
    }

    impl Message {
        fn push(&mut self, text: &[u8]) {
            let room = &mut self.bytes[self.len..];
            let n = text.len().min(room.len());
            room[..n].copy_from_slice(&text[..n]);
            self.len += n;
        }

        fn push_decimal(&mut self, mut number: usize) {
            let mut digits = [0u8; 20];
            let mut at = digits.len();
            loop {
                at -= 1;
                digits[at] = b'0' + (number % 10) as u8;
                number /= 10;
                if number == 0 {
                    break;
                }
            }
            self.push(&digits[at..]);
        }

        fn write_to_standard_error(&self) {
            // SAFETY: the pointer and length are those of a live array.
            unsafe { libc::write(2, self.bytes.as_ptr().cast(), self.len) };
        }
    }
}
