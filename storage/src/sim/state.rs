//! The state of a simulated disk: its nodes by number, the names that lead to them, and what is to fail.
//!
//! Owns: finding and changing names, disk space, counting operations, injected faults. Refuses: the seam's contracts (`sim.rs`) and
//! what a crash leaves (`disk.rs`). Read next: `disk.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::path::{Component, Path};
use std::sync::Arc;

use super::disk::{DirNode, FileNode, NameOperation, Random};
use super::{Fault, Gate, Operation};

pub(super) const ROOT: u64 = 0;

#[derive(Debug)]
pub(super) enum Node {
    File(FileNode),
    Dir(DirNode),
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) random: Random,
    pub(super) nodes: BTreeMap<u64, Node>,
    pub(super) next_node: u64,
    /// Operations on names whose directory was not synced since.
    pub(super) journal: Vec<NameOperation>,
    pub(super) capacity: Option<u64>,
    pub(super) faults: Vec<Fault>,
    pub(super) holds: Vec<(Fault, Arc<Gate>)>,
    pub(super) operations: u64,
    pub(super) off_at: Option<u64>,
    pub(super) off: bool,
    pub(super) clock_ms: i64,
    pub(super) locked: BTreeSet<u64>,
    /// What the last fault that struck does lasts.
    pub(super) lasting: bool,
}

impl State {
    pub(super) fn empty(random: Random) -> State {
        State {
            random,
            nodes: BTreeMap::new(),
            next_node: 0,
            journal: Vec::new(),
            capacity: None,
            faults: Vec::new(),
            holds: Vec::new(),
            operations: 0,
            off_at: None,
            off: false,
            clock_ms: 0,
            locked: BTreeSet::new(),
            lasting: false,
        }
    }

    pub(super) fn check_power(&self) -> io::Result<()> {
        if self.off { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }

    /// Called before an operation changes anything. [`State::end`] follows, which says whether it was interrupted.
    pub(super) fn begin(&mut self, operation: Operation, path: &Path) -> io::Result<()> {
        self.step()?;
        self.check_faults(operation, path)
    }

    pub(super) fn step(&mut self) -> io::Result<()> {
        self.check_power()?;
        self.operations += 1;
        self.off = self.off_at.is_some_and(|last| self.operations >= last);
        Ok(())
    }

    pub(super) fn end<T>(&self, result: T) -> io::Result<T> {
        self.check_power().map(|()| result)
    }

    pub(super) fn check_faults(&mut self, operation: Operation, path: &Path) -> io::Result<()> {
        let struck = |fault: &mut Fault| fault.strikes(operation, path).then_some((fault.errno, fault.lasting));
        match self.faults.iter_mut().find_map(struck) {
            Some((errno, lasting)) => {
                self.lasting = lasting;
                Err(io::Error::from_raw_os_error(errno))
            }
            None => Ok(()),
        }
    }

    /// What this operation has to wait for.
    pub(super) fn held(&mut self, operation: Operation, path: &Path) -> Option<Arc<Gate>> {
        self.holds.retain(|(_, gate)| !gate.is_open());
        self.holds.iter_mut().find_map(|(which, gate)| which.strikes(operation, path).then(|| Arc::clone(gate)))
    }

    pub(super) fn used_bytes(&self) -> u64 {
        let mut named = BTreeSet::new();
        for node in self.nodes.values() {
            if let Node::Dir(dir) = node {
                named.extend(dir.cached.values().copied());
            }
        }
        let takes_space = |(number, node): (&u64, &Node)| match node {
            Node::File(file) if file.handles > 0 || named.contains(number) => file.allocated_bytes(),
            _ => 0,
        };
        self.nodes.iter().map(takes_space).sum()
    }

    pub(super) fn free_bytes(&self) -> u64 {
        /// What a disk without a limit says.
        const PLENTY: u64 = 1 << 50;
        self.capacity.map_or(PLENTY, |capacity| capacity.saturating_sub(self.used_bytes()))
    }

    pub(super) fn file(&mut self, number: u64) -> io::Result<&mut FileNode> {
        match self.nodes.get_mut(&number) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Dir(_)) => Err(ErrorKind::IsADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn dir(&self, number: u64) -> io::Result<&DirNode> {
        match self.nodes.get(&number) {
            Some(Node::Dir(dir)) => Ok(dir),
            Some(Node::File(_)) => Err(ErrorKind::NotADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn find(&self, path: &Path) -> io::Result<u64> {
        let mut number = ROOT;
        for name in names_of(path)? {
            number = *self.dir(number)?.cached.get(name).ok_or(ErrorKind::NotFound)?;
        }
        Ok(number)
    }

    /// The directory that holds a path's name, and that name.
    pub(super) fn place(&self, path: &Path) -> io::Result<(u64, String)> {
        let mut names = names_of(path)?;
        let name = names.pop().ok_or(ErrorKind::InvalidInput)?.to_owned();
        let mut number = ROOT;
        for name in names {
            number = *self.dir(number)?.cached.get(name).ok_or(ErrorKind::NotFound)?;
        }
        self.dir(number)?;
        Ok((number, name))
    }

    pub(super) fn add(&mut self, node: Node) -> u64 {
        let number = self.next_node;
        self.next_node += 1;
        self.nodes.insert(number, node);
        number
    }

    /// Changes names as programs see them, and notes that a crash may undo it.
    pub(super) fn rename(&mut self, operation: NameOperation) {
        for change in &operation {
            if let Some(Node::Dir(dir)) = self.nodes.get_mut(&change.dir) {
                change.apply(&mut dir.cached);
            }
        }
        self.journal.push(operation);
    }

    /// Makes the names of a directory durable, and those of others that changed in one operation with them.
    pub(super) fn sync_dir(&mut self, number: u64) {
        let mut dirs = BTreeSet::from([number]);
        loop {
            let before = dirs.len();
            for operation in &self.journal {
                if operation.iter().any(|change| dirs.contains(&change.dir)) {
                    dirs.extend(operation.iter().map(|change| change.dir));
                }
            }
            if dirs.len() == before {
                break;
            }
        }
        let (synced, rest) = std::mem::take(&mut self.journal)
            .into_iter()
            .partition(|operation| operation.iter().any(|change| dirs.contains(&change.dir)));
        self.journal = rest;
        let synced: Vec<NameOperation> = synced;
        for change in synced.iter().flatten() {
            if let Some(Node::Dir(dir)) = self.nodes.get_mut(&change.dir) {
                change.apply(&mut dir.stored);
            }
        }
    }

    /// A directory's names must be gone before it is, and a file's node must be of the right kind.
    pub(super) fn check_replaceable(&self, number: u64, by_dir: bool) -> io::Result<()> {
        match (self.nodes.get(&number), by_dir) {
            (Some(Node::Dir(dir)), true) if dir.cached.is_empty() => Ok(()),
            (Some(Node::Dir(_)), true) => Err(ErrorKind::DirectoryNotEmpty.into()),
            (Some(Node::Dir(_)), false) => Err(ErrorKind::IsADirectory.into()),
            (Some(Node::File(_)), true) => Err(ErrorKind::NotADirectory.into()),
            (Some(Node::File(_)) | None, _) => Ok(()),
        }
    }
}

/// The names that a path is made of.
pub(super) fn names_of(path: &Path) -> io::Result<Vec<&str>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => names.push(name.to_str().ok_or(ErrorKind::InvalidInput)?),
            Component::Prefix(_) | Component::ParentDir => return Err(ErrorKind::InvalidInput.into()),
        }
    }
    Ok(names)
}
