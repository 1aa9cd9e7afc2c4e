use super::*;
use crate::metadata::command::{Command, DeleteTopic, RaftEntry, command::Command as Kind};
use crate::metadata::raft::{Entry, EntryPayload, Membership};
use openraft::CommittedLeaderId;
use openraft::error::SnapshotMismatch;

fn at(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, 7), index)
}

fn entry(term: u64, index: u64) -> Entry {
    let delete: Command = Kind::DeleteTopic(DeleteTopic { topic_id: vec![1; 16].into() }).into();
    Entry { log_id: at(term, index), payload: EntryPayload::Normal(delete) }
}

fn request() -> AppendEntriesRequest<TypeConfig> {
    AppendEntriesRequest {
        vote: Vote::new_committed(3, 7),
        prev_log_id: Some(at(2, 4)),
        entries: vec![entry(2, 5), entry(3, 6)],
        leader_commit: Some(at(2, 4)),
    }
}

#[test]
fn what_is_asked_comes_back() {
    let there = append(append_message(&request())).expect("well formed");
    assert_eq!(format!("{there:?}"), format!("{:?}", request()));
    let vote = VoteRequest::new(Vote::new(4, 9), Some(at(3, 6)));
    assert_eq!(ask_vote(&ask_vote_message(&vote)), Ok(vote));
    let granted = VoteResponse::new(Vote::new(4, 9), None, true);
    assert_eq!(voted(&voted_message(&granted)), Ok(granted));
    let members = Membership::new(vec![[7, 8].into()], std::collections::BTreeSet::from([7, 8, 9]));
    let part = InstallSnapshotRequest {
        vote: Vote::new_committed(3, 7),
        meta: SnapshotMeta {
            last_log_id: Some(at(3, 6)),
            last_membership: StoredMembership::new(Some(at(2, 1)), members),
            snapshot_id: "x".into(),
        },
        offset: 100,
        data: vec![1, 2, 3],
        done: true,
    };
    assert_eq!(snapshot_part(snapshot_part_message(part.clone())), Ok(part));
    let taken = InstallSnapshotResponse { vote: Vote::new_committed(3, 7) };
    assert_eq!(snapshot_taken(snapshot_taken_message(Ok(&taken))), Ok(Ok(taken)));
    let mismatch = SnapshotMismatch { expect: ("a".to_owned(), 1).into(), got: ("b".to_owned(), 2).into() };
    assert_eq!(snapshot_taken(snapshot_taken_message(Err(&mismatch))), Ok(Err(mismatch)));
    let changes = [
        Change::AddObserver(1),
        Change::Promote(2),
        Change::Demote(3),
        Change::Remove(4),
        Change::Replace { voter: 5, by: 6 },
    ];
    for asked in changes {
        assert_eq!(change(&change_message(asked, "")), Ok(asked));
    }
}

#[test]
fn what_comes_of_a_command_comes_back() {
    let id = TopicId::from_bytes([3; 16]);
    let outcomes = [
        Outcome::BrokerRegistered { boots: 3 },
        Outcome::BrokerChanged { broker_id: 2, partitions: 5 },
        Outcome::ControllerChanged { epoch: 17 },
        Outcome::FeatureLevelRaised(2),
        Outcome::PartitionsChanged(4),
        Outcome::PartitionAltered { leader_epoch: 3, partition_epoch: 9 },
        Outcome::TopicCreated(id),
        Outcome::TopicChanged(id),
        Outcome::TopicDeleted(id),
        Outcome::ProducerIds { first: 1000, count: 10 },
        Outcome::ProducerEpoch(-1),
        Outcome::TopicsImported { added: 7 },
    ];
    for came in outcomes {
        assert_eq!(outcome(Some(outcome_message(&came))), Ok(came));
    }
    assert!(outcome(None).is_err());
}

#[test]
fn answers_fit_what_was_asked() {
    let asked = Vote::new_committed(3, 7);
    for answer in [
        AppendEntriesResponse::Success,
        AppendEntriesResponse::Conflict,
        AppendEntriesResponse::HigherVote(Vote::new(4, 1)),
    ] {
        assert_eq!(appended(&appended_message(&answer), &asked, Some(at(1, 1))), Ok(answer));
    }
    let conflict = appended_message(&AppendEntriesResponse::Conflict);
    assert!(appended(&conflict, &asked, None).is_err(), "nothing comes before the first");
    let earlier = appended_message(&AppendEntriesResponse::HigherVote(Vote::new(2, 9)));
    assert!(appended(&earlier, &asked, None).is_err());
}

/// openraft takes a leader's word for all of this: it would end, or keep what breaks the log.
#[test]
fn what_no_member_would_say_is_refused() {
    let refused = |change: &dyn Fn(&mut RaftAppend)| {
        let mut message = append_message(&request());
        change(&mut message);
        append(message).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|message| message.vote = None));
    assert!(refused(&|message| message.vote = Some(convert::vote_message(&Vote::new(3, 7)))), "not elected");
    assert!(refused(&|message| message.previous = Some(convert::log_id_message(&at(2, 3)))), "a gap");
    assert!(refused(&|message| message.entries.reverse()));
    assert!(refused(&|message| message.entries.push(convert::entry_message(&entry(2, 7)))), "an older leader's behind");
    assert!(refused(&|message| message.entries.push(convert::entry_message(&entry(4, 7)))), "a later leader's");
    assert!(refused(&|message| message.entries.push(RaftEntry::default())));
    let part = |offset, last: Option<LogId>| RaftSnapshotPart {
        vote: Some(convert::vote_message(&Vote::new_committed(3, 7))),
        snapshot: Some(command::RaftSnapshot { last_log_id: message_of(last), ..Default::default() }),
        offset,
        data: vec![1].into(),
        done: false,
    };
    assert!(snapshot_part(part(0, Some(at(1, 1)))).is_ok());
    assert!(snapshot_part(part(u64::MAX, Some(at(1, 1)))).is_err(), "it would be allocated");
    assert!(snapshot_part(part(MAX_PAYLOAD_BYTES as u64, Some(at(1, 1)))).is_err());
    assert!(snapshot_part(part(0, None)).is_err());
    assert!(
        ask_vote(&RaftAskVote { vote: Some(convert::vote_message(&Vote::new_committed(3, 7))), last: None }).is_err()
    );
    assert!(change(&RaftChangeMembers::default()).is_err());
}
