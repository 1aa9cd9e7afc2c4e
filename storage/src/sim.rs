//! A simulated disk: files and directories in memory that a crash robs of what was not synced, decided by a seed.
//!
//! Owns: [`SimFiles`], an implementation of the seam in [`crate::files`] for tests and simulations. Everything it does follows from its
//! seed and the order of the calls. Refuses: time (callers set the clock) and speed. Read next: `sim/state.rs`, then `sim/disk.rs` for
//! what a crash may leave.
//!
//! * [`SimFiles::crash`] is a power failure: the disk as it comes back, each unsynced page kept, lost or torn between sectors, each unsynced length
//!   kept or lost, and of each directory's unsynced changes those up to one of them. [`SimFiles::restart`] is the end of a process: nothing is lost, but handles, maps and locks are gone.
//! * [`SimFiles::power_off_after`] lets the power fail within any operation: run something, count [`SimFiles::operations`], then
//!   run it again with a power failure in each of them.
//! * [`SimFiles::fail`] and [`SimFiles::set_capacity`] make operations fail, as bad and as full disks do. After a sync that failed, the
//!   pages that were not written count as clean, as Linux has it.
//! * [`SimFiles::hold`] makes operations wait, as a disk that hangs does.
//! * A write that changes bytes which a map has published, and a cut below them, panic: they would be undefined behaviour elsewhere.

mod disk;
mod state;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::files::{DirEntry, Directory, File, Files, Lock, Metadata, OpenMode};
use crate::map::Map;
use crate::segment::{OpenLimit, lock};

use disk::{DirNode, FileNode, NameChange, NameOperation, Random};
use state::{Node, ROOT, State, names_of};

/// Segments open at once unless told otherwise: few, so that reopening them is part of every test.
const OPEN_SEGMENTS: usize = 4;

/// A simulated file system. See the module.
#[derive(Debug)]
pub struct SimFiles {
    state: Arc<Mutex<State>>,
    open_limit: OpenLimit,
    open_segments: usize,
}

/// What an operation does, for faults to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Opening a file, which may create or empty it; or a directory, to list or to sync it.
    Open,
    /// Reading from a file, through a handle or a map.
    Read,
    /// Writing to a file.
    Write,
    /// Taking disk space for a file.
    Reserve,
    /// Changing a file's length.
    SetLen,
    /// Syncing a file.
    Sync,
    /// Giving a file or directory another name.
    Rename,
    /// Removing a file or directory.
    Remove,
    /// Creating a directory.
    CreateDir,
    /// Syncing a directory.
    SyncDir,
}

/// Operations that are to fail.
#[derive(Debug, Clone)]
pub struct Fault {
    operation: Operation,
    path: Option<String>,
    after: u64,
    times: u64,
    errno: i32,
    lasting: bool,
}

impl Fault {
    /// Every operation of this kind fails with EIO.
    pub fn new(operation: Operation) -> Fault {
        Fault { operation, path: None, after: 0, times: u64::MAX, errno: libc::EIO, lasting: false }
    }

    /// Only on paths that contain this text.
    pub fn on(self, path: impl Into<String>) -> Fault {
        Fault { path: Some(path.into()), ..self }
    }

    /// Only once this many of them have succeeded.
    pub fn after(self, operations: u64) -> Fault {
        Fault { after: operations, ..self }
    }

    /// Only this many times.
    pub fn times(self, times: u64) -> Fault {
        Fault { times, ..self }
    }

    /// With EMFILE: the process has too many open files.
    pub fn exhausted(self) -> Fault {
        Fault { errno: libc::EMFILE, ..self }
    }

    /// With ENOSPC.
    pub fn full(self) -> Fault {
        Fault { errno: libc::ENOSPC, ..self }
    }

    /// A sync that fails hits blocks that stay bad: the pages that it was to write are never on the disk, and later syncs of the
    /// same file succeed without them.
    pub fn lasting(self) -> Fault {
        Fault { lasting: true, ..self }
    }

    /// Whether this operation is one of those.
    fn strikes(&mut self, operation: Operation, path: &Path) -> bool {
        let on_path = |part: &String| path.to_string_lossy().contains(part.as_str());
        if self.operation != operation || !self.path.as_ref().is_none_or(on_path) {
            return false;
        }
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        let strikes = self.times > 0;
        self.times = self.times.saturating_sub(1);
        strikes
    }
}

/// Operations that wait until this is dropped.
#[derive(Debug)]
pub struct Held {
    gate: Arc<Gate>,
}

impl Held {
    /// How many operations wait now.
    pub fn waiting(&self) -> usize {
        lock(&self.gate.state).1
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.gate.state).0 = true;
        self.gate.opened.notify_all();
    }
}

#[derive(Debug, Default)]
struct Gate {
    /// Whether it is open, and how many wait for that.
    state: Mutex<(bool, usize)>,
    opened: Condvar,
}

impl Gate {
    fn is_open(&self) -> bool {
        lock(&self.state).0
    }

    fn wait(&self) {
        let mut state = lock(&self.state);
        state.1 += 1;
        while !state.0 {
            state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.1 -= 1;
    }
}

/// Waits as long as this operation is held. Nothing is locked meanwhile: everything else goes on.
fn wait_while_held(state: &Mutex<State>, operation: Operation, path: &Path) {
    loop {
        let Some(gate) = lock(state).held(operation, path) else { return };
        gate.wait();
    }
}

impl SimFiles {
    /// An empty disk.
    pub fn new(seed: u64) -> Arc<SimFiles> {
        SimFiles::with_open_limit(seed, OPEN_SEGMENTS)
    }

    /// An empty disk, with at most this many segments open at once.
    pub fn with_open_limit(seed: u64, segments: usize) -> Arc<SimFiles> {
        let mut random = Random(seed);
        random.next();
        let nodes = BTreeMap::from([(ROOT, Node::Dir(DirNode::default()))]);
        SimFiles::of(State { nodes, next_node: ROOT + 1, ..State::empty(random) }, segments)
    }

    fn of(state: State, open_segments: usize) -> Arc<SimFiles> {
        let open_limit = OpenLimit::new(open_segments);
        Arc::new(SimFiles { state: Arc::new(Mutex::new(state)), open_limit, open_segments })
    }

    /// The power fails: the disk as it comes back. Whoever still uses the old one gets errors. The capacity and the clock stay;
    /// faults that were injected are gone.
    pub fn crash(&self) -> Arc<SimFiles> {
        self.succeed(|old, random| {
            let operations = disk::surviving(&old.journal, random);
            for change in operations.iter().flatten() {
                if let Some(Node::Dir(dir)) = old.nodes.get_mut(&change.dir) {
                    change.apply(&mut dir.stored);
                }
            }
            let mut nodes = BTreeMap::new();
            let mut reached = vec![ROOT];
            while let Some(number) = reached.pop() {
                let node = match old.nodes.get(&number) {
                    _ if nodes.contains_key(&number) => continue,
                    Some(Node::File(file)) => Node::File(file.after_crash(random)),
                    Some(Node::Dir(dir)) => {
                        reached.extend(dir.stored.values());
                        Node::Dir(DirNode { cached: dir.stored.clone(), stored: dir.stored.clone() })
                    }
                    None => continue,
                };
                nodes.insert(number, node);
            }
            (nodes, Vec::new())
        })
    }

    /// The process ends (`kill -9`), and another begins: nothing written is lost, nothing more is durable, and whoever still
    /// uses the old handles, maps and locks gets errors.
    pub fn restart(&self) -> Arc<SimFiles> {
        self.succeed(|old, _| {
            let mut nodes = std::mem::take(&mut old.nodes);
            for node in nodes.values_mut() {
                if let Node::File(file) = node {
                    (file.handles, file.maps) = (0, Vec::new());
                }
            }
            (nodes, std::mem::take(&mut old.journal))
        })
    }

    fn succeed(
        &self,
        successor: impl FnOnce(&mut State, &mut Random) -> (BTreeMap<u64, Node>, Vec<NameOperation>),
    ) -> Arc<SimFiles> {
        let mut old = lock(&self.state);
        let mut random = Random(old.random.next());
        let (nodes, journal) = successor(&mut old, &mut random);
        old.off = true;
        let (next_node, capacity, clock_ms) = (old.next_node, old.capacity, old.clock_ms);
        let state = State { nodes, journal, next_node, capacity, clock_ms, ..State::empty(random) };
        SimFiles::of(state, self.open_segments)
    }

    /// How many operations changed something, or tried to. Reading does not count.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Lets the power fail within an operation: `operations` more complete, the next fails and may or may not have happened, and so
    /// does everything after it. Then [`SimFiles::crash`] tells what is left.
    pub fn power_off_after(&self, operations: u64) {
        let mut state = lock(&self.state);
        state.off_at = Some(state.operations + operations + 1);
    }

    /// Whether the power failed.
    pub fn is_off(&self) -> bool {
        lock(&self.state).off
    }

    /// How many bytes the disk has room for; `None` is no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        lock(&self.state).capacity = bytes;
    }

    /// How many bytes are taken, in whole pages, by files that have a name or a handle.
    pub fn used_bytes(&self) -> u64 {
        lock(&self.state).used_bytes()
    }

    /// Lets operations fail from now on.
    pub fn fail(&self, fault: Fault) {
        lock(&self.state).faults.push(fault);
    }

    /// Lets reads, writes, syncs and changes of names wait that would fail by [`SimFiles::fail`], until what comes back is
    /// dropped: a disk, or a part of it, that hangs.
    pub fn hold(&self, which: Fault) -> Held {
        let gate = Arc::new(Gate::default());
        lock(&self.state).holds.push((which, Arc::clone(&gate)));
        Held { gate }
    }

    /// Takes the pages of a file out of memory: what is not read again, or written, is not resident.
    pub fn evict(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let number = state.find(path)?;
        state.file(number).map(FileNode::evict)
    }

    /// No operation fails any more.
    pub fn heal(&self) {
        lock(&self.state).faults.clear();
    }

    /// The time that files get when they are written.
    pub fn set_clock_ms(&self, ms: i64) {
        lock(&self.state).clock_ms = ms;
    }

    fn change(&self, operation: Operation, path: &Path) -> io::Result<MutexGuard<'_, State>> {
        wait_while_held(&self.state, operation, path);
        let mut state = lock(&self.state);
        state.begin(operation, path)?;
        Ok(state)
    }
}

impl Files for SimFiles {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let missing = {
            let mut state = lock(&self.state);
            state.check_power()?;
            state.check_faults(Operation::Open, path)?;
            match state.find(path) {
                Ok(_) => false,
                Err(error) if error.kind() == ErrorKind::NotFound => true,
                Err(error) => return Err(error),
            }
        };
        let creates = matches!(mode, OpenMode::CreateNew | OpenMode::Create | OpenMode::Ensure);
        if !missing && mode == OpenMode::CreateNew {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut state = lock(&self.state);
        let number = if missing && creates {
            let (dir, name) = state.place(path)?;
            state.step()?;
            let modified_ms = state.clock_ms;
            let number = state.add(Node::File(FileNode::new(modified_ms)));
            state.rename(vec![NameChange { dir, name, to: Some(number), from: None }]);
            state.end(number)?
        } else {
            let number = state.find(path)?;
            if mode == OpenMode::Create {
                state.step()?;
                drop(state);
                cut(&self.state, number, path, 0)?;
                state = lock(&self.state);
                state.end(())?;
            }
            number
        };
        state.file(number)?.handles += 1;
        Ok(Arc::new(SimFile { state: Arc::clone(&self.state), number, path: path.into() }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let mut state = lock(&self.state);
        state.check_power()?;
        state.check_faults(Operation::Open, dir)?;
        let is_dir = |number: &u64| matches!(state.nodes.get(number), Some(Node::Dir(_)));
        let entry = |(name, number): (&String, &u64)| DirEntry { name: name.clone(), is_dir: is_dir(number) };
        Ok(state.dir(state.find(dir)?)?.cached.iter().map(entry).collect())
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let state = lock(&self.state);
        state.check_power()?;
        match state.nodes.get(&state.find(path)?) {
            Some(Node::File(file)) => {
                Ok(Metadata { len: file.cached.len, modified_ms: file.modified_ms, is_dir: false })
            }
            _ => Ok(Metadata { len: 0, modified_ms: 0, is_dir: true }),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.change(Operation::Rename, from)?;
        let ((from_dir, from_name), (to_dir, to_name)) = (state.place(from)?, state.place(to)?);
        let number = state.find(from)?;
        if let Ok(replaced) = state.find(to) {
            if replaced == number {
                return state.end(());
            }
            let by_dir = matches!(state.nodes.get(&number), Some(Node::Dir(_)));
            state.check_replaceable(replaced, by_dir)?;
        }
        state.rename(vec![
            NameChange { dir: from_dir, name: from_name, to: None, from: Some(number) },
            NameChange { dir: to_dir, name: to_name, to: Some(number), from: None },
        ]);
        state.end(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change(Operation::Remove, path)?;
        let ((dir, name), number) = (state.place(path)?, state.find(path)?);
        state.check_replaceable(number, false)?;
        state.rename(vec![NameChange { dir, name, to: None, from: Some(number) }]);
        state.end(())
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut so_far = PathBuf::from("/");
        for name in names_of(path)? {
            so_far.push(name);
            let mut state = lock(&self.state);
            state.check_power()?;
            match state.find(&so_far).map(|number| state.dir(number).map(drop)) {
                Ok(is_dir) => is_dir?,
                Err(_) => {
                    state.begin(Operation::CreateDir, &so_far)?;
                    let (dir, name) = state.place(&so_far)?;
                    let number = state.add(Node::Dir(DirNode::default()));
                    state.rename(vec![NameChange { dir, name, to: Some(number), from: None }]);
                    state.end(())?;
                }
            }
        }
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change(Operation::Remove, path)?;
        let ((dir, name), number) = (state.place(path)?, state.find(path)?);
        state.check_replaceable(number, true)?;
        state.rename(vec![NameChange { dir, name, to: None, from: Some(number) }]);
        state.end(())
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        let mut state = lock(&self.state);
        state.check_power()?;
        state.check_faults(Operation::Open, path)?;
        let number = state.find(path)?;
        state.dir(number)?;
        Ok(Box::new(SimDirectory { state: Arc::clone(&self.state), number, path: path.into() }))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let state = lock(&self.state);
        state.check_power()?;
        state.find(path)?;
        Ok(state.free_bytes())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        drop(self.open(path, OpenMode::Ensure)?);
        let mut state = lock(&self.state);
        let number = state.find(path)?;
        if !state.locked.insert(number) {
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock { state: Arc::clone(&self.state), number }))
    }

    fn open_limit(&self) -> &OpenLimit {
        &self.open_limit
    }
}

#[derive(Debug)]
struct SimLock {
    state: Arc<Mutex<State>>,
    number: u64,
}

impl Lock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        lock(&self.state).locked.remove(&self.number);
    }
}

#[derive(Debug)]
struct SimDirectory {
    state: Arc<Mutex<State>>,
    number: u64,
    path: PathBuf,
}

impl Directory for SimDirectory {
    fn sync(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin(Operation::SyncDir, &self.path)?;
        state.end(())?;
        state.sync_dir(self.number);
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    state: Arc<Mutex<State>>,
    number: u64,
    path: PathBuf,
}

impl Drop for SimFile {
    fn drop(&mut self) {
        if let Ok(file) = lock(&self.state).file(self.number) {
            file.handles = file.handles.saturating_sub(1);
        }
    }
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        wait_while_held(&self.state, Operation::Read, &self.path);
        let mut state = lock(&self.state);
        state.check_power()?;
        state.check_faults(Operation::Read, &self.path)?;
        Ok(state.file(self.number)?.read(buffer, offset))
    }

    fn write_at(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        wait_while_held(&self.state, Operation::Write, &self.path);
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let published = published(&self.state, self.number).min(offset + bytes.len() as u64);
        let mut state = lock(&self.state);
        let failed = state.begin(Operation::Write, &self.path);
        if failed.is_err() && state.check_power().is_err() {
            return failed;
        }
        let free_bytes = state.free_bytes();
        // Nobody knows how much a write that failed has written.
        let most = if failed.is_err() { state.random.below(bytes.len() + 1) } else { bytes.len() };
        let modified_ms = state.clock_ms;
        let file = state.file(self.number)?;
        let count = file.allocate(offset, most as u64, free_bytes) as usize;
        let written = bytes.get(..count).unwrap_or_default();
        if offset < published {
            let mut before = vec![0; (published - offset) as usize];
            file.cached.read(&mut before, offset);
            let same = before.iter().zip(written).all(|(before, after)| before == after);
            assert!(same, "published bytes of {} are written anew, from {offset}", self.path.display());
        }
        file.write(offset, written);
        file.modified_ms = modified_ms;
        failed?;
        state.end(())?;
        if count < bytes.len() { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        wait_while_held(&self.state, Operation::Sync, &self.path);
        let mut state = lock(&self.state);
        let failed = state.begin(Operation::Sync, &self.path);
        state.end(())?;
        let State { random, nodes, lasting, .. } = &mut *state;
        let Some(Node::File(file)) = nodes.get_mut(&self.number) else { return Err(ErrorKind::NotFound.into()) };
        match &failed {
            Ok(()) => file.sync(),
            Err(_) if std::mem::take(lasting) => file.lose_for_good(),
            Err(_) => file.fail_to_sync(random),
        }
        failed
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin(Operation::SetLen, &self.path)?;
        drop(state);
        cut(&self.state, self.number, &self.path, len)?;
        state = lock(&self.state);
        state.end(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin(Operation::Reserve, &self.path)?;
        let free_bytes = state.free_bytes();
        let file = state.file(self.number)?;
        let count = file.allocate(offset, len, free_bytes);
        // A reservation that fails keeps what it got.
        if count > 0 {
            file.extend(offset + count);
        }
        state.end(())?;
        if count < len { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = lock(&self.state);
        state.check_power()?;
        Ok(state.file(self.number)?.cached.len)
    }

    fn is_resident(&self, offset: u64, len: u64) -> Option<bool> {
        Some(lock(&self.state).file(self.number).ok()?.is_resident(offset, usize::try_from(len).ok()?))
    }

    fn map(self: Arc<Self>, path: &Path, len: u64) -> io::Result<Arc<Map>> {
        let (state, number) = (Arc::clone(&self.state), self.number);
        lock(&state).check_power()?;
        let map = Map::of_simulated(self as Arc<dyn File>, path, len);
        lock(&state).file(number)?.maps.push(Arc::downgrade(&map));
        Ok(map)
    }
}

/// How far the maps of a file have published it.
fn published(state: &Mutex<State>, number: u64) -> u64 {
    // Dropped after the lock is: the last holder of a map drops its file too.
    let maps: Vec<Arc<Map>> = match lock(state).file(number) {
        Ok(file) => {
            file.maps.retain(|map| map.strong_count() > 0);
            file.maps.iter().filter_map(|map| map.upgrade()).collect()
        }
        Err(_) => Vec::new(),
    };
    maps.iter().map(|map| map.published()).max().unwrap_or(0)
}

fn cut(state: &Mutex<State>, number: u64, path: &Path, len: u64) -> io::Result<()> {
    let published = published(state, number);
    assert!(len >= published, "{} is cut to {len}, below the {published} bytes that are published", path.display());
    let mut state = lock(state);
    let modified_ms = state.clock_ms;
    let file = state.file(number)?;
    file.set_len(len);
    file.modified_ms = modified_ms;
    Ok(())
}

#[cfg(test)]
mod tests;
