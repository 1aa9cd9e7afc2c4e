//! What members ask of each other, as messages, and back.
//!
//! Owns: the translation, and the refusal of what a member would not say: a follower's openraft takes its leader's word for
//! much, so what it must not see is stopped here. Refuses: sockets. Read next: [`super::convert`].

use super::super::command::{
    self, PartitionAltered, PartitionsAltered, ProducerIdBlock, RaftAppend, RaftAppended, RaftAskVote,
    RaftChangeMembers, RaftOutcome, RaftSnapshotMismatch, RaftSnapshotPart, RaftSnapshotTaken, RaftVoted,
    raft_appended, raft_change_members, raft_outcome::Outcome as Message,
};
use super::super::format::MAX_PAYLOAD_BYTES;
use super::super::state::Outcome;
use super::convert::{self, Malformed};
use super::members::Change;
use super::{LogId, SnapshotMeta, StoredMembership, TypeConfig, Vote};
use headwater_proto::TopicId;
use openraft::error::SnapshotMismatch;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};

fn malformed<T>(why: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(why.into()))
}

fn vote_of(message: Option<&command::RaftVote>) -> Result<Vote, Malformed> {
    message.map(convert::vote).ok_or_else(|| Malformed("nobody's vote".to_owned()))
}

fn message_of(log_id: Option<LogId>) -> Option<command::RaftLogId> {
    log_id.as_ref().map(convert::log_id_message)
}

/// Entries to keep.
pub(super) fn append_message(request: &AppendEntriesRequest<TypeConfig>) -> RaftAppend {
    RaftAppend {
        vote: Some(convert::vote_message(&request.vote)),
        previous: message_of(request.prev_log_id),
        entries: request.entries.iter().map(convert::entry_message).collect(),
        committed: message_of(request.leader_commit),
    }
}

/// Entries to keep.
///
/// # Errors
/// [`Malformed`]: it is no leader's, or the entries do not follow one another.
pub(super) fn append(message: RaftAppend) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let vote = vote_of(message.vote.as_ref())?;
    if !vote.committed {
        return malformed("entries of somebody who was not elected");
    }
    let previous = message.previous.as_ref().map(convert::log_id);
    let entries: Vec<_> = message.entries.into_iter().map(convert::entry).collect::<Result<_, _>>()?;
    let mut last = previous;
    for entry in &entries {
        let follows = last.map_or(0, |last| last.index.saturating_add(1));
        let is_older = last.is_some_and(|last| entry.log_id.leader_id < last.leader_id);
        if entry.log_id.index != follows || is_older || entry.log_id.leader_id.term > vote.leader_id.term {
            return malformed(format!("entry {} does not follow, of the leader {vote}", entry.log_id));
        }
        last = Some(entry.log_id);
    }
    let leader_commit = message.committed.as_ref().map(convert::log_id);
    Ok(AppendEntriesRequest { vote, prev_log_id: previous, entries, leader_commit })
}

/// What became of the entries.
pub(super) fn appended_message(response: &AppendEntriesResponse<u64>) -> RaftAppended {
    use raft_appended::Result as Said;
    let (result, vote) = match response {
        // A follower keeps all of them or none.
        AppendEntriesResponse::Success | AppendEntriesResponse::PartialSuccess(_) => (Said::Kept, None),
        AppendEntriesResponse::Conflict => (Said::Conflict, None),
        AppendEntriesResponse::HigherVote(vote) => (Said::Outvoted, Some(convert::vote_message(vote))),
    };
    RaftAppended { result: result.into(), vote }
}

/// What became of the entries that `asked` sent after `previous`.
///
/// # Errors
/// [`Malformed`]: it makes no sense as an answer to that.
pub(super) fn appended(
    message: &RaftAppended,
    asked: &Vote,
    previous: Option<LogId>,
) -> Result<AppendEntriesResponse<u64>, Malformed> {
    use raft_appended::Result as Said;
    match raft_appended::Result::try_from(message.result) {
        Ok(Said::Kept) => Ok(AppendEntriesResponse::Success),
        Ok(Said::Conflict) if previous.is_some() => Ok(AppendEntriesResponse::Conflict),
        Ok(Said::Conflict) => malformed("the first entries cannot be in conflict"),
        Ok(Said::Outvoted) => {
            let vote = vote_of(message.vote.as_ref())?;
            if vote > *asked {
                Ok(AppendEntriesResponse::HigherVote(vote))
            } else {
                malformed("an earlier vote counts")
            }
        }
        Err(_) => malformed("an answer of no known kind"),
    }
}

/// Who asks to be elected.
pub(super) fn ask_vote_message(request: &VoteRequest<u64>) -> RaftAskVote {
    RaftAskVote { vote: Some(convert::vote_message(&request.vote)), last: message_of(request.last_log_id) }
}

/// Who asks to be elected.
///
/// # Errors
/// [`Malformed`]: it says not who.
pub(super) fn ask_vote(message: &RaftAskVote) -> Result<VoteRequest<u64>, Malformed> {
    let vote = vote_of(message.vote.as_ref())?;
    if vote.committed {
        return malformed("a candidate that was elected already");
    }
    Ok(VoteRequest::new(vote, message.last.as_ref().map(convert::log_id)))
}

/// Who is voted for.
pub(super) fn voted_message(response: &VoteResponse<u64>) -> RaftVoted {
    RaftVoted {
        vote: Some(convert::vote_message(&response.vote)),
        granted: response.vote_granted,
        last: message_of(response.last_log_id),
    }
}

/// Who is voted for.
///
/// # Errors
/// [`Malformed`]: it says not who.
pub(super) fn voted(message: &RaftVoted) -> Result<VoteResponse<u64>, Malformed> {
    let (vote, last) = (vote_of(message.vote.as_ref())?, message.last.as_ref().map(convert::log_id));
    Ok(VoteResponse::new(vote, last, message.granted))
}

/// A part of a snapshot.
pub(super) fn snapshot_part_message(request: InstallSnapshotRequest<TypeConfig>) -> RaftSnapshotPart {
    let meta = &request.meta;
    RaftSnapshotPart {
        vote: Some(convert::vote_message(&request.vote)),
        snapshot: Some(command::RaftSnapshot {
            last_log_id: message_of(meta.last_log_id),
            membership_log_id: message_of(*meta.last_membership.log_id()),
            membership: Some(convert::membership_message(meta.last_membership.membership())),
            snapshot_id: meta.snapshot_id.clone(),
            state: None,
        }),
        offset: request.offset,
        data: request.data.into(),
        done: request.done,
    }
}

/// A part of a snapshot.
///
/// # Errors
/// [`Malformed`]: it is no leader's, of nothing, or lies beyond what a journal can hold.
pub(super) fn snapshot_part(message: RaftSnapshotPart) -> Result<InstallSnapshotRequest<TypeConfig>, Malformed> {
    let vote = vote_of(message.vote.as_ref())?;
    let Some(snapshot) = message.snapshot else { return malformed("a part of no snapshot") };
    let end = usize::try_from(message.offset).ok().and_then(|offset| offset.checked_add(message.data.len()));
    if !vote.committed || snapshot.last_log_id.is_none() {
        return malformed("a snapshot of nobody who was elected, or of nothing");
    }
    if end.is_none_or(|end| end > MAX_PAYLOAD_BYTES) {
        return malformed("a snapshot larger than a journal can hold");
    }
    let members = convert::membership(&snapshot.membership.unwrap_or_default())?;
    let meta = SnapshotMeta {
        last_log_id: snapshot.last_log_id.as_ref().map(convert::log_id),
        last_membership: StoredMembership::new(snapshot.membership_log_id.as_ref().map(convert::log_id), members),
        snapshot_id: snapshot.snapshot_id,
    };
    Ok(InstallSnapshotRequest { vote, meta, offset: message.offset, data: message.data.into(), done: message.done })
}

/// What became of the part.
pub(super) fn snapshot_taken_message(
    taken: Result<&InstallSnapshotResponse<u64>, &SnapshotMismatch>,
) -> RaftSnapshotTaken {
    match taken {
        Ok(response) => RaftSnapshotTaken { vote: Some(convert::vote_message(&response.vote)), mismatch: None },
        Err(SnapshotMismatch { expect, got }) => RaftSnapshotTaken {
            vote: None,
            mismatch: Some(RaftSnapshotMismatch {
                expected_id: expect.id.clone(),
                expected_offset: expect.offset,
                given_id: got.id.clone(),
                given_offset: got.offset,
            }),
        },
    }
}

/// What became of the part.
///
/// # Errors
/// [`Malformed`]: it says nothing.
pub(super) fn snapshot_taken(
    message: RaftSnapshotTaken,
) -> Result<Result<InstallSnapshotResponse<u64>, SnapshotMismatch>, Malformed> {
    if let Some(mismatch) = message.mismatch {
        return Ok(Err(SnapshotMismatch {
            expect: (mismatch.expected_id, mismatch.expected_offset).into(),
            got: (mismatch.given_id, mismatch.given_offset).into(),
        }));
    }
    Ok(Ok(InstallSnapshotResponse { vote: vote_of(message.vote.as_ref())? }))
}

/// What somebody wants of the membership.
pub(super) fn change_message(change: Change, address: &str) -> RaftChangeMembers {
    use raft_change_members::Kind;
    let (kind, node_id, by_node_id) = match change {
        Change::AddObserver(id) => (Kind::AddObserver, id, 0),
        Change::Promote(id) => (Kind::Promote, id, 0),
        Change::Demote(id) => (Kind::Demote, id, 0),
        Change::Remove(id) => (Kind::Remove, id, 0),
        Change::Replace { voter, by } => (Kind::Replace, voter, by),
    };
    RaftChangeMembers { kind: kind.into(), node_id, by_node_id, address: address.to_owned() }
}

/// What somebody wants of the membership.
///
/// # Errors
/// [`Malformed`]: it names nobody, or is of no known kind.
pub(super) fn change(message: &RaftChangeMembers) -> Result<Change, Malformed> {
    use raft_change_members::Kind;
    let id = message.node_id;
    if id == 0 {
        return malformed("a change of nobody's membership");
    }
    Ok(match Kind::try_from(message.kind) {
        Ok(Kind::AddObserver) => Change::AddObserver(id),
        Ok(Kind::Promote) => Change::Promote(id),
        Ok(Kind::Demote) => Change::Demote(id),
        Ok(Kind::Remove) => Change::Remove(id),
        Ok(Kind::Replace) if message.by_node_id != 0 => Change::Replace { voter: id, by: message.by_node_id },
        Ok(Kind::Replace) | Err(_) => return malformed("a change of the membership of no known kind"),
    })
}

/// What came of a command.
pub(super) fn outcome_message(outcome: &Outcome) -> RaftOutcome {
    let outcome = match outcome {
        Outcome::BrokerRegistered { boots } => Message::BrokerBoots(*boots),
        Outcome::BrokerChanged { broker_id, partitions } => {
            Message::BrokerChanged(command::BrokerChanged { broker_id: *broker_id, partitions: *partitions as u64 })
        }
        Outcome::ControllerChanged { epoch } => Message::ControllerEpoch(*epoch),
        Outcome::FeatureLevelRaised(level) => Message::FeatureLevel(*level),
        Outcome::PartitionsChanged(partitions) => Message::PartitionsChanged(*partitions as u64),
        Outcome::PartitionAltered { leader_epoch, partition_epoch } => Message::PartitionAltered(PartitionAltered {
            leader_epoch: *leader_epoch,
            partition_epoch: *partition_epoch,
        }),
        Outcome::PartitionsAltered { changed, refused } => {
            Message::PartitionsAltered(PartitionsAltered { changed: *changed as u64, refused: refused.clone() })
        }
        Outcome::TopicCreated(id) => Message::TopicCreated(id.to_wire()),
        Outcome::TopicChanged(id) => Message::TopicChanged(id.to_wire()),
        Outcome::TopicDeleted(id) => Message::TopicDeleted(id.to_wire()),
        Outcome::ProducerIds { first, count } => Message::ProducerIds(ProducerIdBlock { first: *first, count: *count }),
        Outcome::ProducerEpoch(epoch) => Message::ProducerEpoch(i32::from(*epoch)),
        Outcome::TopicsImported { added } => Message::TopicsImported(*added as u64),
    };
    RaftOutcome { outcome: Some(outcome) }
}

/// What came of a command.
///
/// # Errors
/// [`Malformed`]: it makes no sense.
pub(super) fn outcome(message: Option<RaftOutcome>) -> Result<Outcome, Malformed> {
    let topic = |id: &[u8]| TopicId::from_slice(id).ok_or_else(|| Malformed("a topic id of another length".to_owned()));
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    Ok(match message.and_then(|message| message.outcome) {
        None => return malformed("an outcome of no known kind"),
        Some(Message::BrokerBoots(boots)) => Outcome::BrokerRegistered { boots },
        Some(Message::BrokerChanged(changed)) => {
            Outcome::BrokerChanged { broker_id: changed.broker_id, partitions: count(changed.partitions) }
        }
        Some(Message::ControllerEpoch(epoch)) => Outcome::ControllerChanged { epoch },
        Some(Message::FeatureLevel(level)) => Outcome::FeatureLevelRaised(level),
        Some(Message::PartitionsChanged(partitions)) => Outcome::PartitionsChanged(count(partitions)),
        Some(Message::PartitionAltered(altered)) => {
            Outcome::PartitionAltered { leader_epoch: altered.leader_epoch, partition_epoch: altered.partition_epoch }
        }
        Some(Message::PartitionsAltered(altered)) => {
            Outcome::PartitionsAltered { changed: count(altered.changed), refused: altered.refused }
        }
        Some(Message::TopicCreated(id)) => Outcome::TopicCreated(topic(&id)?),
        Some(Message::TopicChanged(id)) => Outcome::TopicChanged(topic(&id)?),
        Some(Message::TopicDeleted(id)) => Outcome::TopicDeleted(topic(&id)?),
        Some(Message::ProducerIds(block)) => Outcome::ProducerIds { first: block.first, count: block.count },
        Some(Message::ProducerEpoch(epoch)) => {
            let epoch = i16::try_from(epoch).map_err(|_| Malformed(format!("a producer epoch of {epoch}")))?;
            Outcome::ProducerEpoch(epoch)
        }
        Some(Message::TopicsImported(added)) => Outcome::TopicsImported { added: count(added) },
    })
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
