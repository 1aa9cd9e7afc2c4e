//! What a simulated disk holds: bytes and names, each as programs see them and as they are certain to be after a crash.
//!
//! Owns: pages, sectors, lengths, directory entries, and the choice of what a crash leaves of them. Refuses: paths, handles, faults
//! (`sim.rs`). Read next: `sim.rs`.
//!
//! Always: what was synced is in `stored`; what was not is in `dirty`, `lens` or the journal of names, from which a crash chooses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use crate::map::Map;

/// Bytes that are cached, allocated and written back together.
pub(super) const PAGE_BYTES: usize = 4096;
/// Bytes that a disk writes whole or not at all.
pub(super) const SECTOR_BYTES: usize = 512;
/// Versions of a page that wait for a sync and of which a crash may leave any.
const MOST_VERSIONS: usize = 8;

type Page = [u8; PAGE_BYTES];

/// SplitMix64: small, and the same on every machine.
#[derive(Debug, Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(super) fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// Contents of a file; a page that is missing reads as zeros.
#[derive(Debug, Clone, Default)]
pub(super) struct Contents {
    pub(super) len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Contents {
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let count = (self.len.saturating_sub(offset)).min(buffer.len() as u64) as usize;
        for (page, within, range) in pages_of(offset, count) {
            let target = &mut buffer[range];
            match self.pages.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[within..within + target.len()]),
                None => target.fill(0),
            }
        }
        count
    }

    /// Cuts what lies beyond, or extends with zeros.
    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.pages.split_off(&len.div_ceil(PAGE_BYTES as u64));
            let within = (len % PAGE_BYTES as u64) as usize;
            if let Some(last) = self.pages.get_mut(&(len / PAGE_BYTES as u64)) {
                Arc::make_mut(last)[within..].fill(0);
            }
        }
        self.len = len;
    }
}

/// The pages that a range touches: page number, position within the page, and which part of the range.
fn pages_of(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == count {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE_BYTES as u64) as usize;
        let end = count.min(done + PAGE_BYTES - within);
        let range = done..end;
        done = end;
        Some((at / PAGE_BYTES as u64, within, range))
    })
}

/// A file.
#[derive(Debug, Default)]
pub(super) struct FileNode {
    /// What programs see.
    pub(super) cached: Contents,
    /// What is on the disk for certain.
    stored: Contents,
    /// Pages written since the last sync, each as it was after every write.
    dirty: BTreeMap<u64, Vec<Arc<Page>>>,
    /// Lengths that the file took since the last sync.
    lens: Vec<u64>,
    /// Pages that have space behind them.
    allocated: BTreeSet<u64>,
    /// Pages whose blocks are bad: what is written there is never on the disk.
    bad: BTreeSet<u64>,
    /// Pages that are not in memory.
    evicted: BTreeSet<u64>,
    pub(super) modified_ms: i64,
    pub(super) handles: usize,
    pub(super) maps: Vec<Weak<Map>>,
}

impl FileNode {
    pub(super) fn new(modified_ms: i64) -> FileNode {
        FileNode { modified_ms, ..FileNode::default() }
    }

    /// Bytes of disk space that the file takes.
    pub(super) fn allocated_bytes(&self) -> u64 {
        (self.allocated.len() * PAGE_BYTES) as u64
    }

    /// Takes space for a range, as much as there is: how far it got.
    pub(super) fn allocate(&mut self, offset: u64, count: u64, mut free_bytes: u64) -> u64 {
        for (page, _, range) in pages_of(offset, count as usize) {
            if !self.allocated.contains(&page) {
                if free_bytes < PAGE_BYTES as u64 {
                    return range.start as u64;
                }
                free_bytes -= PAGE_BYTES as u64;
                self.allocated.insert(page);
            }
        }
        count
    }

    pub(super) fn evict(&mut self) {
        self.evicted = self.cached.pages.keys().copied().collect();
    }

    pub(super) fn is_resident(&self, offset: u64, count: usize) -> bool {
        self.evicted.is_empty() || !pages_of(offset, count).any(|(page, ..)| self.evicted.contains(&page))
    }

    /// What is read is in memory then.
    pub(super) fn read(&mut self, buffer: &mut [u8], offset: u64) -> usize {
        for (page, ..) in pages_of(offset, if self.evicted.is_empty() { 0 } else { buffer.len() }) {
            self.evicted.remove(&page);
        }
        self.cached.read(buffer, offset)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, within, range) in pages_of(offset, bytes.len()) {
            self.evicted.remove(&page);
            let part = &bytes[range];
            let cached = self.cached.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(cached)[within..within + part.len()].copy_from_slice(part);
            let versions = self.dirty.entry(page).or_default();
            if versions.len() == MOST_VERSIONS {
                versions.remove(0);
            }
            versions.push(Arc::clone(cached));
        }
        self.extend(offset + bytes.len() as u64);
    }

    /// Makes the file at least this long.
    pub(super) fn extend(&mut self, len: u64) {
        if len > self.cached.len {
            self.cached.set_len(len);
            self.lens.push(len);
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.cached.len {
            self.cached.set_len(len);
            self.lens.push(len);
            let end = len.div_ceil(PAGE_BYTES as u64);
            self.allocated.split_off(&end);
            self.dirty.split_off(&end);
            // The zeros behind the new end are on the disk before the new length is.
            let last = len / PAGE_BYTES as u64;
            if let (Some(versions), Some(page)) = (self.dirty.get_mut(&last), self.cached.pages.get(&last)) {
                *versions = vec![Arc::clone(page)];
            }
        }
        self.extend(len);
    }

    /// Everything written so far is on the disk.
    pub(super) fn sync(&mut self) {
        self.lens.drain(..).for_each(|len| self.stored.set_len(len));
        for (page, mut versions) in std::mem::take(&mut self.dirty) {
            if let Some(newest) = versions.pop().filter(|_| !self.bad.contains(&page)) {
                self.stored.pages.insert(page, newest);
            }
        }
    }

    /// A sync that failed, as Linux does it: some pages reached the disk, the others count as clean all the same. Programs go on
    /// seeing them, and no later sync writes them.
    pub(super) fn fail_to_sync(&mut self, random: &mut Random) {
        for (page, mut versions) in std::mem::take(&mut self.dirty) {
            if let (true, Some(newest)) = (random.coin(), versions.pop()) {
                self.stored.pages.insert(page, newest);
            }
        }
    }

    /// A sync that failed on bad blocks, and was the last that said so.
    pub(super) fn lose_for_good(&mut self) {
        self.bad.extend(std::mem::take(&mut self.dirty).into_keys());
    }

    /// What is on the disk after the power failed.
    pub(super) fn after_crash(&self, random: &mut Random) -> FileNode {
        let fate = random.below(4);
        let lens = match fate {
            0 => 0,
            1 => self.lens.len(),
            _ => random.below(self.lens.len() + 1),
        };
        let mut left = self.stored.clone();
        self.lens.iter().take(lens).for_each(|len| left.set_len(*len));
        for (page, versions) in self.dirty.iter().filter(|(page, _)| !self.bad.contains(page)) {
            match fate {
                0 => {}
                1 => drop(versions.last().map(|newest| left.pages.insert(*page, Arc::clone(newest)))),
                2 => {
                    if let Some(version) = versions.get(random.below(versions.len() + 1)) {
                        left.pages.insert(*page, Arc::clone(version));
                    }
                }
                _ => {
                    let torn = left.pages.entry(*page).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
                    for sector in (0..PAGE_BYTES).step_by(SECTOR_BYTES) {
                        if let Some(version) = versions.get(random.below(versions.len() + 1)) {
                            let range = sector..sector + SECTOR_BYTES;
                            Arc::make_mut(torn)[range.clone()].copy_from_slice(&version[range]);
                        }
                    }
                }
            }
        }
        // Pages beyond the length that survived are not part of the file.
        let len = std::mem::replace(&mut left.len, u64::MAX);
        left.set_len(len);
        let mut allocated = self.allocated.clone();
        allocated.split_off(&len.div_ceil(PAGE_BYTES as u64));
        allocated.extend(left.pages.keys());
        let (bad, modified_ms) = (self.bad.clone(), self.modified_ms);
        FileNode { cached: left.clone(), stored: left, allocated, bad, modified_ms, ..FileNode::default() }
    }
}

/// Names in a directory, and the node that each stands for.
pub(super) type Names = BTreeMap<String, u64>;

/// A directory.
#[derive(Debug, Default)]
pub(super) struct DirNode {
    /// What programs see.
    pub(super) cached: Names,
    /// What is on the disk for certain.
    pub(super) stored: Names,
}

/// One name that an operation changes.
#[derive(Debug, Clone)]
pub(super) struct NameChange {
    pub(super) dir: u64,
    pub(super) name: String,
    /// Given to this node.
    pub(super) to: Option<u64>,
    /// Taken from this one.
    pub(super) from: Option<u64>,
}

impl NameChange {
    pub(super) fn apply(&self, names: &mut Names) {
        match self.to {
            Some(node) => drop(names.insert(self.name.clone(), node)),
            None if names.get(&self.name).copied() == self.from => drop(names.remove(&self.name)),
            None => {}
        }
    }
}

/// An operation on names that is on the disk whole or not at all: a rename changes two.
pub(super) type NameOperation = Vec<NameChange>;

/// The operations of a journal that are on the disk after the power failed: of each directory, all up to one.
pub(super) fn surviving(journal: &[NameOperation], random: &mut Random) -> Vec<NameOperation> {
    let mut left: BTreeMap<u64, usize> = BTreeMap::new();
    journal.iter().flatten().for_each(|change| *left.entry(change.dir).or_default() += 1);
    left.values_mut().for_each(|count| *count = random.below(*count + 1));
    let mut survives = |operation: &&NameOperation| {
        let dirs: BTreeSet<u64> = operation.iter().map(|change| change.dir).collect();
        let survives = dirs.iter().all(|dir| left.get(dir).is_some_and(|left| *left > 0));
        for dir in dirs {
            left.entry(dir).and_modify(|left| *left = if survives { *left - 1 } else { 0 });
        }
        survives
    };
    journal.iter().filter(|operation| survives(operation)).cloned().collect()
}
