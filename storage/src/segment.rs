//! One segment: a `.log` with its two indexes, as readers and the write half share it.
//!
//! Owns: opening a segment when it is needed and closing it when too many are ([`OpenLimit`]), its map, finding a position in it
//! by offset or timestamp. Refuses: writing batches (`active.rs`), and lists of segments (`log.rs`, `reader.rs`).
//! Read next: `reader.rs`.
//!
//! Always: bytes below `published` were written, and no longer change. An index entry is only ever a hint: what it points at is
//! checked before it is believed.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use headwater_proto::batch::{BatchHeader, HEADER_BYTES};

use crate::checkpoint::segment_file_name;
use crate::compaction::swap::SWAP;
use crate::error::{Corruption, During, IoFailure, ReadError, bad_batch};
use crate::files::{File, Files, OpenMode, is_full, read_exact_at, remove_if_exists};
use crate::index::{IndexBytes, IndexEntry, OffsetEntry, TimeEntry};
use crate::map::Map;
use crate::verify::Verified;

/// The bound on segments that are open at once. An open one costs a file descriptor and a map; one that is closed is opened again when
/// somebody reads or writes it. What somebody holds beyond it stays open: a file until it is synced, a map until its slices are gone.
#[derive(Debug)]
pub struct OpenLimit {
    most: usize,
    /// In the order of opening; one that was used since it was last looked at gets a second round.
    open: Mutex<VecDeque<Weak<Segment>>>,
}

impl OpenLimit {
    /// At most this many at once.
    pub fn new(most: usize) -> OpenLimit {
        OpenLimit { most: most.max(1), open: Mutex::new(VecDeque::new()) }
    }

    fn opened(&self, segment: &Arc<Segment>) {
        let mut closing = Vec::new();
        {
            let mut open = lock(&self.open);
            open.push_back(Arc::downgrade(segment));
            let mut rounds = open.len() * 2;
            while open.len() > self.most && rounds > 0 {
                rounds -= 1;
                let Some(oldest) = open.pop_front() else { break };
                let Some(oldest) = oldest.upgrade() else { continue };
                if Arc::ptr_eq(&oldest, segment) || oldest.used.swap(false, Ordering::Relaxed) {
                    open.push_back(Arc::downgrade(&oldest));
                } else {
                    closing.push(oldest);
                }
            }
        }
        closing.iter().for_each(|segment| segment.close());
    }
}

/// Locks a mutex whose data is valid whatever happened to its last holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open `.log`.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(crate) file: Arc<dyn File>,
    pub(crate) map: Arc<Map>,
}

#[derive(Debug)]
enum Slot {
    Closed,
    Open(Opened),
    /// Its files are gone or belong to another segment: it is never opened again.
    Retired,
}

/// The entries of an index that are not in its file yet, and how many bytes are.
#[derive(Debug, Default)]
struct IndexTail {
    in_file: u64,
    bytes: Vec<u8>,
}

/// A segment.
#[derive(Debug)]
pub(crate) struct Segment {
    files: Arc<dyn Files>,
    dir: Arc<Path>,
    pub(crate) base_offset: i64,
    slot: Mutex<Slot>,
    /// Maps that were let go of here while a reader held them.
    released: Mutex<Vec<Weak<Map>>>,
    used: AtomicBool,
    /// Its `.log` may still have the name that it had when compaction wrote it.
    swapping: AtomicBool,
    published: AtomicU64,
    /// How far a map reaches at least, so that a growing segment is mapped once.
    map_bytes: AtomicU64,
    offsets: Mutex<IndexTail>,
    times: Mutex<IndexTail>,
    pub(crate) verified: Verified,
}

impl Segment {
    /// A segment whose first `size` bytes may be read, with indexes of these sizes.
    pub(crate) fn new(
        files: Arc<dyn Files>,
        dir: Arc<Path>,
        base_offset: i64,
        size: u64,
        offsets_bytes: u64,
        times_bytes: u64,
    ) -> Arc<Segment> {
        Arc::new(Segment {
            files,
            dir,
            base_offset,
            slot: Mutex::new(Slot::Closed),
            released: Mutex::new(Vec::new()),
            used: AtomicBool::new(false),
            swapping: AtomicBool::new(false),
            published: AtomicU64::new(size),
            map_bytes: AtomicU64::new(0),
            offsets: Mutex::new(IndexTail { in_file: offsets_bytes, bytes: Vec::new() }),
            times: Mutex::new(IndexTail { in_file: times_bytes, bytes: Vec::new() }),
            verified: Verified::default(),
        })
    }

    /// The files it lies on.
    pub(crate) fn files(&self) -> &dyn Files {
        &*self.files
    }

    /// One of its files.
    pub(crate) fn path(&self, extension: &str) -> PathBuf {
        self.dir.join(segment_file_name(self.base_offset, extension))
    }

    /// Its `.log`.
    pub(crate) fn log_path(&self) -> PathBuf {
        self.path(".log")
    }

    /// Bytes of the log that may be read.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// The segment will grow to about this size: map that much at once.
    pub(crate) fn expect_bytes(&self, bytes: u64) {
        self.map_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Everything below `end` is written and may be read.
    pub(crate) fn publish(&self, end: u64) {
        let mut slot = lock(&self.slot);
        self.published.fetch_max(end, Ordering::Release);
        if let Slot::Open(open) = &*slot {
            if open.map.len() < end {
                self.release(&mut slot);
            } else {
                open.map.publish(end);
            }
        }
    }

    /// The open `.log`, opened if need be.
    pub(crate) fn open(self: &Arc<Segment>) -> Result<Opened, ReadError> {
        self.used.store(true, Ordering::Relaxed);
        let open = {
            let mut slot = lock(&self.slot);
            match &*slot {
                Slot::Open(open) => return Ok(open.clone()),
                Slot::Retired => return Err(ReadError::Closed),
                Slot::Closed => {}
            }
            let path = self.log_path();
            let file = self.open_file(&path).during("open", &path)?;
            let published = self.published();
            let len = published.max(self.map_bytes.load(Ordering::Relaxed)).max(1);
            let map = Arc::clone(&file).map(&path, len).during("map", &path)?;
            map.publish(published);
            let open = Opened { file, map };
            *slot = Slot::Open(open.clone());
            open
        };
        self.files.open_limit().opened(self);
        Ok(open)
    }

    fn open_file(&self, path: &Path) -> std::io::Result<Arc<dyn File>> {
        if self.swapping.load(Ordering::Acquire) {
            match self.files.open(&self.path(&format!(".log{SWAP}")), OpenMode::Write) {
                // It has its final name by now.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                opened => return opened,
            }
        }
        self.files.open(path, OpenMode::Write)
    }

    /// Whether its `.log` is to be looked for under the name that it has before it takes another's place.
    pub(crate) fn read_swap_file(&self, swapping: bool) {
        self.swapping.store(swapping, Ordering::Release);
    }

    /// Closes it; whoever reads or writes it opens it anew.
    pub(crate) fn close(&self) {
        self.release(&mut lock(&self.slot));
    }

    fn release(&self, slot: &mut Slot) {
        if let Slot::Open(open) = &*slot {
            let mut released = lock(&self.released);
            released.retain(|map| map.strong_count() > 0);
            if Arc::strong_count(&open.map) > 1 {
                released.push(Arc::downgrade(&open.map));
            }
            *slot = Slot::Closed;
        }
    }

    /// Whether the segment was ended: what now has its files' names may be another's.
    pub(crate) fn is_retired(&self) -> bool {
        matches!(*lock(&self.slot), Slot::Retired)
    }

    /// Ends the segment: it is never opened again. True if nobody holds its map, so that its file may be written anew.
    pub(crate) fn retire(&self) -> bool {
        let mut slot = lock(&self.slot);
        // New holders come out of the slot, under this lock, or are cloned from existing ones: once there is none, there never is.
        let retired = matches!(*slot, Slot::Retired);
        self.release(&mut slot);
        *slot = Slot::Retired;
        !retired && lock(&self.released).iter().all(|map| map.strong_count() == 0)
    }

    /// Adds entries to the indexes. They reach the files with [`Segment::spill`].
    pub(crate) fn index(&self, entries: &IndexBytes) {
        if !entries.offsets.is_empty() {
            lock(&self.offsets).bytes.extend_from_slice(&entries.offsets);
        }
        if !entries.times.is_empty() {
            lock(&self.times).bytes.extend_from_slice(&entries.times);
        }
    }

    /// Bytes of the offset index and of the time index.
    pub(crate) fn index_sizes(&self) -> (u64, u64) {
        let size = |tail: &Mutex<IndexTail>| {
            let tail = lock(tail);
            tail.in_file + tail.bytes.len() as u64
        };
        (size(&self.offsets), size(&self.times))
    }

    /// Bytes of index entries that are not in their files.
    pub(crate) fn unspilled(&self) -> usize {
        lock(&self.offsets).bytes.len() + lock(&self.times).bytes.len()
    }

    /// Writes index entries to their files; with `sync`, durably, and cuts what lies beyond them.
    pub(crate) fn spill(&self, sync: bool) -> Result<(), IoFailure> {
        self.spill_one::<OffsetEntry>(&self.offsets, sync)?;
        self.spill_one::<TimeEntry>(&self.times, sync)
    }

    fn spill_one<E: IndexEntry>(&self, tail: &Mutex<IndexTail>, sync: bool) -> Result<(), IoFailure> {
        let (at, bytes) = {
            let tail = lock(tail);
            (tail.in_file, tail.bytes.clone())
        };
        if bytes.is_empty() && !sync {
            return Ok(());
        }
        let path = self.path(E::EXTENSION);
        let write = || {
            let file = self.files.open(&path, OpenMode::Ensure)?;
            if !bytes.is_empty() {
                file.write_at(at, &[std::io::IoSlice::new(&bytes)])?;
            }
            let len = at + bytes.len() as u64;
            if sync {
                if file.len()? != len {
                    file.set_len(len)?;
                }
                file.sync_all()?;
            }
            Ok(())
        };
        write().during("write", &path)?;
        let mut tail = lock(tail);
        tail.in_file += bytes.len() as u64;
        tail.bytes.drain(..bytes.len());
        Ok(())
    }

    /// Replaces both indexes by these entries, durably once the directory is synced. Without room for it no index is left on the disk: the
    /// entries wait in memory for [`Segment::spill`].
    pub(crate) fn rewrite_indexes(&self, entries: IndexBytes) -> Result<(), IoFailure> {
        self.rewrite_one::<OffsetEntry>(&self.offsets, &entries.offsets)?;
        self.rewrite_one::<TimeEntry>(&self.times, &entries.times)
    }

    /// Written aside: half the old entries and half the new could pass for an index.
    fn rewrite_one<E: IndexEntry>(&self, tail: &Mutex<IndexTail>, bytes: &[u8]) -> Result<(), IoFailure> {
        let (path, aside) = (self.path(E::EXTENSION), self.path(&format!("{}.tmp", E::EXTENSION)));
        let write = || {
            let file = self.files.open(&aside, OpenMode::Create)?;
            file.write_at(0, &[std::io::IoSlice::new(bytes)])?;
            file.sync_all()?;
            self.files.rename(&aside, &path)
        };
        let mut written = write();
        if written.as_ref().is_err_and(is_full) {
            // What the old one takes may be room enough.
            for stale in [&aside, &path] {
                remove_if_exists(self.files(), stale).during("remove", stale)?;
            }
            written = write();
        }
        let tail = &mut *lock(tail);
        *tail = IndexTail { in_file: bytes.len() as u64, bytes: Vec::new() };
        match written {
            Err(error) if is_full(&error) => {
                remove_if_exists(self.files(), &aside).during("remove", &aside)?;
                *tail = IndexTail { in_file: 0, bytes: bytes.into() };
                Ok(())
            }
            written => written.during("write", &path),
        }
    }

    /// Where to begin to look for an offset: the position of a batch that begins at or before it.
    pub(crate) fn position_before(self: &Arc<Segment>, offset: i64) -> Result<u64, ReadError> {
        let relative = offset.saturating_sub(self.base_offset);
        self.boundary(self.floor(&self.offsets, |entry: &OffsetEntry| i64::from(entry.relative_offset) <= relative)?)
    }

    /// Where a batch begins at or before a position, near it.
    pub(crate) fn boundary_before(self: &Arc<Segment>, position: u64) -> Result<u64, ReadError> {
        self.boundary(self.floor(&self.offsets, |entry: &OffsetEntry| u64::from(entry.position) <= position)?)
    }

    /// Where the batch begins that an entry names; the segment's beginning if there is none, or not that one.
    fn boundary(self: &Arc<Segment>, found: Option<OffsetEntry>) -> Result<u64, ReadError> {
        let Some(entry) = found else { return Ok(0) };
        let position = u64::from(entry.position);
        let expected = self.base_offset + i64::from(entry.relative_offset);
        match self.header_at(position) {
            Ok(header) if header.last_offset() == expected => Ok(position),
            _ => {
                // Not an error of the log: the scan from its beginning finds what is there.
                let path = self.path(OffsetEntry::EXTENSION);
                tracing::warn!(path = %path.display(), position, expected, "an index entry points at no such batch");
                Ok(0)
            }
        }
    }

    /// Where to begin to look for a batch with a timestamp of at least this: everything before has smaller ones.
    pub(crate) fn position_before_timestamp(self: &Arc<Segment>, timestamp: i64) -> Result<u64, ReadError> {
        let found = self.floor::<TimeEntry>(&self.times, |entry| entry.timestamp < timestamp)?;
        let Some(entry) = found else { return Ok(0) };
        let offset = self.base_offset + i64::from(entry.relative_offset);
        let mut headers = self.headers(self.position_before(offset)?)?;
        while let Some((position, header)) = headers.next()? {
            if header.last_offset() >= offset {
                let is_it = header.base_offset <= offset && header.max_timestamp == entry.timestamp;
                if !is_it {
                    let path = self.path(TimeEntry::EXTENSION);
                    tracing::warn!(path = %path.display(), position, ?entry, "an index entry points at no such batch");
                }
                return Ok(if is_it { position } else { 0 });
            }
        }
        Ok(0)
    }

    /// The last entry for which `is_before` holds; entries for which it does come first.
    fn floor<E: IndexEntry>(
        &self,
        tail: &Mutex<IndexTail>,
        is_before: impl Fn(&E) -> bool,
    ) -> Result<Option<E>, IoFailure> {
        let last_before = |bytes: &[u8]| {
            let (mut low, mut high) = (0, bytes.len() / E::SIZE);
            let mut found = None;
            while low < high {
                let middle = (low + high) / 2;
                match bytes.get(middle * E::SIZE..(middle + 1) * E::SIZE).and_then(E::decode) {
                    Some(entry) if is_before(&entry) => (low, found) = (middle + 1, Some(entry)),
                    _ => high = middle,
                }
            }
            found
        };
        let in_file = {
            let tail = lock(tail);
            if let Some(entry) = last_before(&tail.bytes) {
                return Ok(Some(entry));
            }
            tail.in_file
        };
        if in_file == 0 {
            return Ok(None);
        }
        let path = self.path(E::EXTENSION);
        let search = || -> std::io::Result<Option<E>> {
            let file = self.files.open(&path, OpenMode::Read)?;
            // Narrow down to a page of entries by single ones, then read that page.
            let per_page = 4096 / E::SIZE as u64;
            let (mut low, mut high) = (0, in_file.min(file.len()?) / E::SIZE as u64);
            let mut buffer = vec![0; E::SIZE];
            while high - low > per_page {
                let middle = (low + high) / 2;
                read_exact_at(&*file, &mut buffer, middle * E::SIZE as u64)?;
                match E::decode(&buffer) {
                    Some(entry) if is_before(&entry) => low = middle,
                    _ => high = middle,
                }
            }
            buffer.resize((high - low) as usize * E::SIZE, 0);
            read_exact_at(&*file, &mut buffer, low * E::SIZE as u64)?;
            Ok(last_before(&buffer))
        };
        match search() {
            // The log is scanned instead.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            result => result.during("read", &path),
        }
    }

    /// The header of the batch at a position.
    pub(crate) fn header_at(self: &Arc<Segment>, position: u64) -> Result<BatchHeader, ReadError> {
        let open = self.open()?;
        let path = self.log_path();
        let mut bytes = [0; HEADER_BYTES];
        if position + HEADER_BYTES as u64 > self.published() {
            return Err(ReadError::Corruption(Corruption {
                path,
                position,
                offset: None,
                detail: "the segment ends here, within a batch".into(),
            }));
        }
        read_exact_at(&*open.file, &mut bytes, position).during("read", &path)?;
        BatchHeader::parse(&bytes).map_err(|error| ReadError::Corruption(bad_batch(&path, position, None, &error)))
    }

    /// The headers of the batches from a position on, which must be where one begins.
    pub(crate) fn headers(self: &Arc<Segment>, position: u64) -> Result<Headers, ReadError> {
        let (buffer, buffer_at) = (Vec::new(), 0);
        Ok(Headers { open: self.open()?, path: self.log_path(), position, end: self.published(), buffer, buffer_at })
    }
}

/// Walks the headers of a segment's batches. Reads through the file, so that a bad block is an error.
#[derive(Debug)]
pub(crate) struct Headers {
    /// Its map too, which is what retention looks at before it gives the file to another segment.
    open: Opened,
    path: PathBuf,
    position: u64,
    end: u64,
    /// Bytes read ahead, from `buffer_at` on: small batches lie close to each other.
    buffer: Vec<u8>,
    buffer_at: u64,
}

/// Bytes that a walk over headers reads at once.
pub(crate) const READ_AHEAD_BYTES: u64 = 4096;

impl Headers {
    /// Stops at this position.
    pub(crate) fn until(mut self, end: u64) -> Headers {
        self.end = self.end.min(end);
        self
    }

    /// The next batch's position and header.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, BatchHeader)>, ReadError> {
        if self.position >= self.end {
            return Ok(None);
        }
        let position = self.position;
        let wanted = (self.end - position).min(HEADER_BYTES as u64);
        if position < self.buffer_at || position + wanted > self.buffer_at + self.buffer.len() as u64 {
            self.buffer.resize((self.end - position).min(READ_AHEAD_BYTES) as usize, 0);
            let n = self.open.file.read_at(&mut self.buffer, position).during("read", &self.path)?;
            self.buffer.truncate(n);
            self.buffer_at = position;
        }
        let bytes = self.buffer.get((position - self.buffer_at) as usize..).unwrap_or_default();
        let corrupt = |detail: String| {
            ReadError::Corruption(Corruption { path: self.path.clone(), position, offset: None, detail })
        };
        let header = BatchHeader::parse(bytes).map_err(|error| corrupt(error.to_string()))?;
        let left = self.end - position;
        if header.size() as u64 > left {
            return Err(corrupt(format!("a batch of {} bytes, where the segment has {left} left", header.size())));
        }
        self.position += header.size() as u64;
        Ok(Some((position, header)))
    }
}

#[cfg(test)]
mod tests {
    //! A walk over headers used to hold the `.log` without its map, and the map is what [`Segment::retire`] counts. So retention, which
    //! may run between two headers, took the segment for nobody's and wrote its file anew under the reader.

    use std::io::IoSlice;

    use super::*;
    use crate::sim::SimFiles;

    #[test]
    fn a_walk_over_headers_keeps_the_file_from_being_written_anew() {
        let (files, dir) = (SimFiles::new(1), Path::new("/t-0"));
        files.create_dir_all(dir).unwrap();
        let segment = || Segment::new(Arc::clone(&files) as Arc<dyn Files>, Arc::from(dir), 0, 100, 0, 0);
        let file = files.open(&segment().log_path(), OpenMode::CreateNew).unwrap();
        file.write_at(0, &[IoSlice::new(&[7; 100])]).unwrap();
        let read = segment();
        let headers = read.headers(0).unwrap();
        assert!(!read.retire(), "somebody reads it");
        drop(headers);
        let unread = segment();
        drop(unread.headers(0).unwrap());
        assert!(unread.retire());
    }
}
