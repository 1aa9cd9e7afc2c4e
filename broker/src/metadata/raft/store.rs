//! The store of a member of the quorum: what it keeps, in one journal file.
//!
//! A change is on stable storage before it is made in memory, and answered after that. What is committed is said again with
//! each change, and costs no write of its own: after a crash it may be known late, never wrong. Once the changes outgrow the
//! snapshot, the file is replaced by a new one ([`Store::write_snapshot`]); openraft then drops the entries in it.
//!
//! A quorum begins with the file of its first member: a snapshot of the state, as if that member had been voted for and had
//! committed itself as the only voter at the version of the state. The same makes a quorum of one of the folder of a broker
//! that kept a journal of commands, in one rename.
//!
//! openraft ends before its snapshots do, so its end is not the file's: the broker's folder stays locked by the store itself,
//! until it is closed, which waits for what is being written and refuses everything after it; or until nobody has the store
//! any more, not even what is being written. So whoever finds the folder free finds a file that nobody writes.
//!
//! Owns: the file's one writer, the order of disk and memory, and the threads that do what may block. Refuses: everything about
//! the file that is damaged, with its place. Read next: `kept.rs`, then [`super::log`].

use super::super::command::{RaftJournal, RaftRecord};
use super::super::format::{FrameKind, OLDEST_VERSION, RAFT_VERSION, Scan};
use super::super::journal::{self, JournalError};
use super::super::journal_file::{Bytes, JOURNAL_FILE, JournalFile, RESERVE_BYTES, unusable};
use super::super::state::MetadataState;
use super::kept::{Change, Kept, KeptSnapshot};
use super::{Applied, LogId, Membership, SnapshotMeta, StoredMembership, Vote};
use crate::pool::Pool;
use headwater_storage::{DataDir, Files};
use openraft::{CommittedLeaderId, EmptyNode};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Bytes of changes before a new snapshot is considered.
const SNAPSHOT_AFTER_BYTES: u64 = 1 << 20;
/// The term in which a quorum begins.
const FIRST_TERM: u64 = 1;

/// What becomes of a folder without a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Founding {
    /// A quorum begins, with this member alone.
    Alone,
    /// The member waits for a quorum to take it in.
    Joins,
}

/// What opening the store found.
#[derive(Debug)]
pub struct OpenedStore {
    /// The store.
    pub store: Store,
    /// Bytes of a torn record that were cut.
    pub torn_bytes: usize,
    /// Whether the folder was that of a broker alone until now.
    pub taken_over: bool,
}

/// A handle on what a member keeps.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("node_id", &self.shared.node_id).finish_non_exhaustive()
    }
}

struct Shared {
    node_id: u64,
    cluster_id: String,
    /// What it does on disk, one after another; where it belongs to no broker, any thread does.
    pool: OnceLock<Pool>,
    writer: Mutex<Writer>,
    kept: Mutex<Kept>,
}

impl Shared {
    /// What is queued is done before, and finds the file closed.
    fn end_thread(&self) {
        if let Some(pool) = self.pool.get() {
            pool.close();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end_thread();
    }
}

/// The file. Whoever changes anything holds it; it is locked before `kept`.
struct Writer {
    file: JournalFile,
    /// The broker's folder, and with it its lock.
    folder: Option<Arc<DataDir>>,
    /// The number of the last record.
    record: u64,
    /// Where the file's end must be before a new snapshot is tried.
    snapshot_at: u64,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The journal does not take it.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It breaks what the log promises.
    #[error("the metadata log refuses a change: {0}")]
    Illegal(#[from] super::convert::Malformed),
}

impl Store {
    /// Opens the store of the data root. Where there is none, and nothing that it should know, a new member begins, with
    /// `new_node_id`. May block.
    ///
    /// # Errors
    /// [`JournalError`]: the broker must not start.
    pub fn open(
        files: Arc<dyn Files>,
        root: &Path,
        cluster_id: &str,
        has_partitions: bool,
        founding: Founding,
        new_node_id: u64,
    ) -> Result<OpenedStore, JournalError> {
        let Some(read) = Bytes::read(&*files, root)? else {
            let path = root.join(JOURNAL_FILE);
            if has_partitions {
                return Err(JournalError::Missing { path });
            }
            let kept = match founding {
                Founding::Alone => founded(new_node_id, MetadataState::new(cluster_id)),
                Founding::Joins => Kept::new(new_node_id, cluster_id),
            };
            let payload = kept.message(kept.snapshot.as_ref()).encode_to_vec();
            let file = JournalFile::create(files, path, RAFT_VERSION, 0, &payload).map_err(JournalError::at_start)?;
            return Ok(OpenedStore { store: Store::fresh(file, kept), torn_bytes: 0, taken_over: false });
        };
        let scan = read.scan(OLDEST_VERSION..=RAFT_VERSION)?;
        let (path, torn_bytes) = (read.path(), scan.torn_bytes);
        if scan.version < RAFT_VERSION {
            let state = journal::replay(path, &scan.frames)?;
            journal::check_cluster(path, state.cluster_id(), cluster_id)?;
            let kept = founded(new_node_id, state);
            let payload = kept.message(kept.snapshot.as_ref()).encode_to_vec();
            let file = JournalFile::create(files, path.to_owned(), RAFT_VERSION, 0, &payload)
                .map_err(JournalError::at_start)?;
            return Ok(OpenedStore { store: Store::fresh(file, kept), torn_bytes, taken_over: true });
        }
        let kept = replay(path, &scan)?;
        journal::check_cluster(path, &kept.cluster_id, cluster_id)?;
        let record = scan.frames.last().map_or(0, |frame| frame.index);
        // The records begin behind this.
        let begins = scan.frames.first().map_or(0, |first| (first.position + first.payload.len()) as u64);
        let mut file = JournalFile::open(files, &read, &scan)?;
        // With a full disk the reserve stays as it is.
        drop(file.make_room(RESERVE_BYTES));
        Ok(OpenedStore { store: Store::of(file, record, begins, kept), torn_bytes, taken_over: false })
    }

    fn fresh(file: JournalFile, kept: Kept) -> Store {
        let begins = file.end();
        Store::of(file, 0, begins, kept)
    }

    fn of(file: JournalFile, record: u64, begins: u64, kept: Kept) -> Store {
        let snapshot_bytes = kept.snapshot.as_ref().map_or(0, |kept| kept.state.snapshot().encoded_len() as u64);
        let writer =
            Mutex::new(Writer { file, folder: None, record, snapshot_at: begins + snapshot_after(snapshot_bytes) });
        let (node_id, cluster_id) = (kept.node_id, kept.cluster_id.clone());
        Store {
            shared: Arc::new(Shared { node_id, cluster_id, pool: OnceLock::new(), writer, kept: Mutex::new(kept) }),
        }
    }

    /// The store of a broker: `pool`, which nobody else has, does what may block, so that no vote and no proposal waits behind
    /// the data's flushes. `folder` stays locked for as long as anything may be written.
    pub(crate) fn of_broker(self, folder: Arc<DataDir>, pool: Pool) -> Store {
        self.writer().folder = Some(folder);
        // It is the broker's once.
        drop(self.shared.pool.set(pool));
        self
    }

    /// Lets go of the file and of the broker's folder: nothing is written after this, and what asks for it is refused. May
    /// block.
    pub(super) fn close(&self) {
        let mut writer = self.writer();
        writer.file.close();
        let folder = writer.folder.take();
        drop(writer);
        drop(folder);
        self.shared.end_thread();
    }

    /// Does what may block away from the async threads. It is done even if nobody waits for it any more.
    pub(super) async fn blocking<T: Send + 'static>(&self, job: impl FnOnce(&Store) -> T + Send + 'static) -> T {
        let store = self.clone();
        let job = move || job(&store);
        if let Some(pool) = self.shared.pool.get().filter(|pool| !pool.is_closed()) {
            return pool.run(job).await;
        }
        match tokio::task::spawn_blocking(job).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and with it whoever waits here.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Whether nobody else is a member, as far as the log says.
    pub(crate) fn is_only_member(&self) -> bool {
        self.kept().is_only_member()
    }

    /// Which member this is.
    pub fn node_id(&self) -> u64 {
        self.shared.node_id
    }

    /// The cluster it belongs to.
    pub fn cluster_id(&self) -> &str {
        &self.shared.cluster_id
    }

    /// Whether the changes have outgrown the snapshot: time for another one. May block.
    pub fn is_snapshot_due(&self) -> bool {
        let writer = self.writer();
        writer.file.end() >= writer.snapshot_at && writer.file.is_open()
    }

    /// Takes space ahead for a change of so many bytes, and leaves the reserve. Whoever proposes asks before, because a change
    /// that does not fit later ends the member. An urgent one may take the reserve. May block.
    ///
    /// # Errors
    /// [`JournalError::Full`]; or the file takes nothing any more.
    pub fn make_room(&self, bytes: u64, urgent: bool) -> Result<(), JournalError> {
        let mut writer = self.writer();
        match writer.file.make_room(bytes + RESERVE_BYTES) {
            Err(JournalError::Full { .. }) if urgent => writer.file.make_room(bytes),
            made => made,
        }
    }

    /// Writes a snapshot of what was applied, which the log can be cut to. What comes out is the newest snapshot: where there
    /// is a newer one already, or this one cannot be written now, that is an older one. May block.
    ///
    /// # Errors
    /// [`JournalError`]: there is no snapshot at all, or the file takes nothing any more.
    pub(super) fn write_snapshot(&self, applied: &Applied) -> Result<KeptSnapshot, JournalError> {
        let last = applied.last_log_id.map_or_else(|| "nothing".to_owned(), |last| last.to_string());
        let meta = SnapshotMeta {
            last_log_id: applied.last_log_id,
            last_membership: applied.membership.clone(),
            snapshot_id: last,
        };
        let mut writer = self.writer();
        let before = self.kept().snapshot.clone();
        if let Some(before) = &before
            && before.meta.last_log_id >= meta.last_log_id
        {
            return Ok(before.clone());
        }
        match self.replace(&mut writer, KeptSnapshot { meta, state: Arc::clone(&applied.state) }) {
            Ok(kept) => Ok(kept),
            Err(error) if !writer.file.is_open() => Err(error),
            Err(error) => match before {
                Some(before) => {
                    tracing::warn!(%error, "metadata snapshot not written; the journal goes on without it");
                    Ok(before)
                }
                None => Err(error),
            },
        }
    }

    /// Keeps the snapshot that a leader sent. May block.
    ///
    /// # Errors
    /// [`JournalError`]: nothing changed.
    pub(super) fn keep_snapshot(&self, snapshot: KeptSnapshot) -> Result<(), JournalError> {
        let mut writer = self.writer();
        let in_it = snapshot.meta.last_log_id;
        self.replace(&mut writer, snapshot)?;
        let mut kept = self.kept();
        kept.committed = kept.committed.max(in_it);
        Ok(())
    }

    /// Makes a change: it is on stable storage when this returns. May block.
    ///
    /// # Errors
    /// [`StoreError`]: the change was not made.
    pub(super) fn change(&self, change: Change) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let record = {
            let kept = self.kept();
            kept.check(&change)?;
            kept.record(&change)
        };
        writer.append(&record)?;
        self.kept().apply(change);
        Ok(())
    }

    /// What is kept, for reading.
    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.shared.kept)
    }

    /// Remembers what is committed; the next change says it on disk.
    pub(super) fn set_committed(&self, committed: Option<LogId>) {
        self.kept().committed = committed;
    }

    /// Where this member is a quorum by itself, what it kept is committed. openraft, which leads on at once then, would not say
    /// so before the next entry.
    pub(super) fn commit_if_alone(&self) {
        let mut kept = self.kept();
        if kept.is_only_voter() {
            kept.committed = kept.committed.max(kept.last_log_id());
        }
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.shared.writer)
    }

    fn replace(&self, writer: &mut Writer, snapshot: KeptSnapshot) -> Result<KeptSnapshot, JournalError> {
        // Whoever appends needs it too: what takes long is done with a copy, which nobody changes without the writer.
        let kept = self.kept().clone();
        let message = kept.message(Some(&snapshot));
        let snapshot_bytes = message.snapshot.as_ref().map_or(0, |message| message.encoded_len() as u64);
        let replaced = writer.file.replace(RAFT_VERSION, writer.record, &message.encode_to_vec());
        // Where it cannot be written, the next try comes after as many changes again.
        writer.snapshot_at = writer.file.end() + snapshot_after(snapshot_bytes);
        replaced?;
        self.kept().snapshot = Some(snapshot.clone());
        Ok(snapshot)
    }
}

impl Writer {
    fn append(&mut self, record: &RaftRecord) -> Result<(), JournalError> {
        // Whoever proposed asked for room; what raft writes by itself may take the reserve.
        self.file.append(self.record + 1, &record.encode_to_vec())?;
        self.record += 1;
        Ok(())
    }
}

/// The first member of a quorum, which goes on from this state.
pub(super) fn founded(node_id: u64, state: MetadataState) -> Kept {
    let founding = LogId::new(CommittedLeaderId::new(FIRST_TERM, node_id), state.index());
    let nodes = BTreeMap::from([(node_id, EmptyNode {})]);
    let members = Membership::new(vec![BTreeSet::from([node_id])], nodes);
    let meta = SnapshotMeta {
        last_log_id: Some(founding),
        last_membership: StoredMembership::new(Some(founding), members),
        snapshot_id: founding.to_string(),
    };
    Kept {
        vote: Some(Vote::new_committed(FIRST_TERM, node_id)),
        committed: Some(founding),
        purged: Some(founding),
        snapshot: Some(KeptSnapshot { meta, state: Arc::new(state.clone()) }),
        ..Kept::new(node_id, state.cluster_id())
    }
}

pub(super) fn replay(path: &Path, scan: &Scan<'_>) -> Result<Kept, JournalError> {
    let Some((first, records)) = scan.frames.split_first() else {
        let why = "there is no beginning".to_owned();
        return Err(JournalError::Unusable { path: path.to_owned(), position: scan.end, why });
    };
    debug_assert_eq!(first.kind, FrameKind::Snapshot, "the scan says so");
    let message = RaftJournal::decode(first.payload).map_err(|error| unusable(path, first, error))?;
    let mut kept = Kept::from_message(message).map_err(|error| unusable(path, first, error))?;
    for frame in records {
        let record = RaftRecord::decode(frame.payload).map_err(|error| unusable(path, frame, error))?;
        kept.replay(record).map_err(|error| unusable(path, frame, error))?;
    }
    let last = scan.frames.last().unwrap_or(first);
    kept.check_whole().map_err(|error| unusable(path, last, error))?;
    Ok(kept)
}

fn snapshot_after(snapshot_bytes: u64) -> u64 {
    SNAPSHOT_AFTER_BYTES.max(snapshot_bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
