//! The state machine as openraft sees it: [`MetadataState`] in memory, rebuilt from the snapshot and the log.
//!
//! The index of an entry is the version of the state after its command. Entries that are no commands, and commands that are
//! refused, leave the state and its version as they were; every member refuses the same ones.
//!
//! A member that is alone refuses nothing: it tries every command on the state that it will be applied to before it writes it
//! down, one after another ([`super::node`]). So a refused command of its own log was in force once, for a build that reads it
//! otherwise than this one does. To go on without it would undo what was acknowledged, and partitions that nobody knows any
//! more are set aside; so that ends the member, and names the entry. Nothing needs to be kept beside the log for this. Where
//! others vote, a leader may not have applied yet what it writes behind: such a command says that it was not tried, and a
//! refusal is an answer.
//!
//! Owns: applying in order, and what was applied last. Refuses: to guess what a command means that this build does not know:
//! that ends the member too. Read next: [`super::super::state`].

use super::super::command::Snapshot;
use super::super::state::{MetadataState, Refusal};
use super::kept::KeptSnapshot;
use super::store::Store;
use super::{Answer, Entry, EntryPayload, LogId, SnapshotMeta, StorageError, StoredMembership, TypeConfig};
use openraft::storage::RaftStateMachine;
use openraft::{AnyError, EmptyNode, OptionalSend, RaftSnapshotBuilder, StorageIOError};
use prost::Message;
use std::io::Cursor;
use std::sync::Arc;
use tokio::sync::watch;

/// What was applied.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The state it led to.
    pub state: Arc<MetadataState>,
    /// The last entry.
    pub last_log_id: Option<LogId>,
    /// The last membership among the entries.
    pub membership: StoredMembership,
}

/// The state machine.
#[derive(Debug)]
pub struct RaftMachine {
    store: Store,
    applied: watch::Sender<Arc<Applied>>,
}

impl RaftMachine {
    /// The machine of this store, at its snapshot, and what tells of everything that it applies.
    pub fn new(store: Store) -> (RaftMachine, watch::Receiver<Arc<Applied>>) {
        let applied = match &store.kept().snapshot {
            Some(KeptSnapshot { meta, state }) => Applied {
                state: Arc::clone(state),
                last_log_id: meta.last_log_id,
                membership: meta.last_membership.clone(),
            },
            None => Applied {
                state: Arc::new(MetadataState::new(store.cluster_id())),
                last_log_id: None,
                membership: StoredMembership::default(),
            },
        };
        let (applied, told) = watch::channel(Arc::new(applied));
        (RaftMachine { store, applied }, told)
    }

    fn applied(&self) -> Arc<Applied> {
        Arc::clone(&self.applied.borrow())
    }
}

impl RaftStateMachine<TypeConfig> for RaftMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        let applied = self.applied();
        Ok((applied.last_log_id, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answer>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut next = Applied::clone(&self.applied());
        let mut answers = Vec::new();
        for entry in entries {
            let log_id = entry.log_id;
            let answer = apply(&mut next, entry, self.store.node_id());
            answers.push(answer.map_err(|error| StorageIOError::apply(log_id, AnyError::new(&error)))?);
        }
        self.applied.send_replace(Arc::new(next));
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { store: self.store.clone(), applied: self.applied() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let failed = |error: AnyError| StorageIOError::write_snapshot(Some(meta.signature()), error);
        let state = self.decode(meta, snapshot.get_ref()).map_err(|why| failed(AnyError::error(why)))?;
        let state = Arc::new(state);
        let kept = KeptSnapshot { meta: meta.clone(), state: Arc::clone(&state) };
        let written = self.store.blocking(move |store| store.keep_snapshot(kept)).await;
        written.map_err(|error| failed(AnyError::new(&error)))?;
        let (last_log_id, membership) = (meta.last_log_id, meta.last_membership.clone());
        self.applied.send_replace(Arc::new(Applied { state, last_log_id, membership }));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<openraft::Snapshot<TypeConfig>>, StorageError> {
        let kept = self.store.kept().snapshot.clone();
        Ok(kept.map(|kept| readable(&kept)))
    }
}

impl RaftMachine {
    /// The state that a leader's snapshot holds.
    fn decode(&self, meta: &SnapshotMeta, bytes: &[u8]) -> Result<MetadataState, String> {
        let message = Snapshot::decode(bytes).map_err(|error| error.to_string())?;
        let state = MetadataState::from_snapshot(message).map_err(|error| error.to_string())?;
        if state.cluster_id() != self.store.cluster_id() {
            let (theirs, ours) = (state.cluster_id(), self.store.cluster_id());
            return Err(format!("the snapshot is of cluster {theirs}, this is a member of {ours}"));
        }
        if state.index() > meta.last_log_id.map_or(0, |last| last.index) {
            return Err(format!("the snapshot's state is of version {}, later than its last entry", state.index()));
        }
        Ok(state)
    }
}

/// Writes a snapshot of what was applied when it was made.
#[derive(Debug)]
pub struct SnapshotBuilder {
    store: Store,
    applied: Arc<Applied>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<openraft::Snapshot<TypeConfig>, StorageError> {
        let applied = Arc::clone(&self.applied);
        let written =
            self.store.blocking(move |store| store.write_snapshot(&applied).map(|kept| readable(&kept))).await;
        written.map_err(|error| StorageIOError::write_snapshot(None, AnyError::new(&error)).into())
    }
}

fn readable(kept: &KeptSnapshot) -> openraft::Snapshot<TypeConfig> {
    let bytes = kept.state.snapshot().encode_to_vec();
    openraft::Snapshot { meta: kept.meta.clone(), snapshot: Box::new(Cursor::new(bytes)) }
}

/// Why an entry of the log cannot be applied.
#[derive(Debug, thiserror::Error)]
enum Inapplicable {
    /// Nobody knows what it means.
    #[error(transparent)]
    Unknown(Refusal),
    /// It was in force.
    #[error(
        "entry {index} of the metadata log ({command}) was in force, and this version of Headwater refuses it: {refusal}. \
         Start the version that wrote it"
    )]
    Refused { index: u64, command: String, refusal: Refusal },
}

/// Applies one entry, for this member.
fn apply(applied: &mut Applied, entry: Entry, node_id: u64) -> Result<Answer, Inapplicable> {
    let log_id = entry.log_id;
    let is_alone = matches!(&applied.membership.membership().get_joint_config()[..], [voters] if voters.iter().eq([&node_id]))
        && log_id.leader_id.node_id == node_id;
    let answer = match entry.payload {
        EntryPayload::Blank => Answer::NoCommand,
        EntryPayload::Membership(membership) => {
            applied.membership = openraft::StoredMembership::<u64, EmptyNode>::new(Some(log_id), membership);
            Answer::NoCommand
        }
        EntryPayload::Normal(command) if command.command.is_none() => {
            return Err(Inapplicable::Unknown(Refusal::Unknown("has no known kind")));
        }
        EntryPayload::Normal(command) => match Arc::make_mut(&mut applied.state).apply(log_id.index, &command) {
            Ok(outcome) => Answer::Applied(outcome),
            Err(refusal) if is_alone && !command.untried => {
                let text = command.command.map(|kind| format!("{kind:?}")).unwrap_or_default();
                let command = text.split('(').next().unwrap_or_default().to_owned();
                return Err(Inapplicable::Refused { index: log_id.index, command, refusal });
            }
            Err(refusal) => Answer::Refused(refusal),
        },
    };
    applied.last_log_id = Some(log_id);
    Ok(answer)
}
