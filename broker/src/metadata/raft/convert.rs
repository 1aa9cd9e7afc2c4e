//! openraft's types as messages, and back: in the journal, and between members.
//!
//! Owns: the translation, and the refusal of messages with a part missing.

use super::super::command::{
    RaftEntry, RaftLogId, RaftMembership, RaftSnapshot, RaftVote, RaftVoters, raft_entry::Payload,
};
use super::super::state::MetadataState;
use super::{Entry, EntryPayload, LogId, Membership, SnapshotMeta, StoredMembership, Vote};
use openraft::{CommittedLeaderId, EmptyNode};
use std::collections::{BTreeMap, BTreeSet};

/// A message that lacks what it is about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub(super) String);

fn malformed<T>(why: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(why.into()))
}

/// Where an entry stands.
pub fn log_id_message(log_id: &LogId) -> RaftLogId {
    RaftLogId { term: log_id.leader_id.term, node_id: log_id.leader_id.node_id, index: log_id.index }
}

/// Where an entry stands.
pub fn log_id(message: &RaftLogId) -> LogId {
    LogId::new(CommittedLeaderId::new(message.term, message.node_id), message.index)
}

/// A vote.
pub fn vote_message(vote: &Vote) -> RaftVote {
    RaftVote { term: vote.leader_id.term, node_id: vote.leader_id.node_id, committed: vote.committed }
}

/// A vote.
pub fn vote(message: &RaftVote) -> Vote {
    match message.committed {
        true => Vote::new_committed(message.term, message.node_id),
        false => Vote::new(message.term, message.node_id),
    }
}

/// Who votes and who only follows.
pub fn membership_message(membership: &Membership) -> RaftMembership {
    let voters = |config: &BTreeSet<u64>| RaftVoters { node_ids: config.iter().copied().collect() };
    RaftMembership {
        configs: membership.get_joint_config().iter().map(voters).collect(),
        node_ids: membership.nodes().map(|(node_id, _)| *node_id).collect(),
    }
}

/// Who votes and who only follows.
///
/// # Errors
/// [`Malformed`]: a voter is no member, or there are more than two groups of voters.
pub fn membership(message: &RaftMembership) -> Result<Membership, Malformed> {
    let nodes: BTreeMap<u64, EmptyNode> = message.node_ids.iter().map(|id| (*id, EmptyNode {})).collect();
    let configs: Vec<BTreeSet<u64>> =
        message.configs.iter().map(|config| config.node_ids.iter().copied().collect()).collect();
    if configs.len() > 2 {
        return malformed("a membership with more than two groups of voters");
    }
    if configs.iter().flatten().any(|voter| !nodes.contains_key(voter)) {
        return malformed("a membership with a voter that is no member");
    }
    Ok(Membership::new(configs, nodes))
}

/// An entry.
pub fn entry_message(entry: &Entry) -> RaftEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(command) => Some(Payload::Command(command.clone())),
        EntryPayload::Membership(membership) => Some(Payload::Membership(membership_message(membership))),
    };
    RaftEntry { log_id: Some(log_id_message(&entry.log_id)), payload }
}

/// An entry.
///
/// # Errors
/// [`Malformed`]: it stands nowhere, or holds a malformed membership.
pub fn entry(message: RaftEntry) -> Result<Entry, Malformed> {
    let Some(id) = &message.log_id else { return malformed("an entry that does not say where it stands") };
    let payload = match message.payload {
        None => EntryPayload::Blank,
        Some(Payload::Command(command)) => EntryPayload::Normal(command),
        Some(Payload::Membership(message)) => EntryPayload::Membership(membership(&message)?),
    };
    Ok(Entry { log_id: log_id(id), payload })
}

/// A snapshot of this state.
pub fn snapshot_message(meta: &SnapshotMeta, state: &MetadataState) -> RaftSnapshot {
    RaftSnapshot {
        last_log_id: meta.last_log_id.as_ref().map(log_id_message),
        membership_log_id: meta.last_membership.log_id().as_ref().map(log_id_message),
        membership: Some(membership_message(meta.last_membership.membership())),
        snapshot_id: meta.snapshot_id.clone(),
        state: Some(state.snapshot()),
    }
}

/// A snapshot, and the state in it.
///
/// # Errors
/// [`Malformed`]: something is missing, or the state makes no sense.
pub fn snapshot(message: RaftSnapshot) -> Result<(SnapshotMeta, MetadataState), Malformed> {
    let Some(state) = message.state else { return malformed("a snapshot without a state") };
    let state = MetadataState::from_snapshot(state).map_err(|error| Malformed(error.to_string()))?;
    let members = membership(&message.membership.unwrap_or_default())?;
    let last_log_id = message.last_log_id.as_ref().map(log_id);
    if state.index() > last_log_id.map_or(0, |last| last.index) {
        return malformed(format!("a snapshot of a later state than its last entry leads to, {}", state.index()));
    }
    let meta = SnapshotMeta {
        last_log_id,
        last_membership: StoredMembership::new(message.membership_log_id.as_ref().map(log_id), members),
        snapshot_id: message.snapshot_id,
    };
    Ok((meta, state))
}
