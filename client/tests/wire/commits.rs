//! Committing: what is committed when, in which order, in whose name.

use super::support::*;
use futures::{FutureExt, StreamExt};
use headwater_client::{ConsumeError, Consumer, ErrorCode, Position, StartFrom, TopicPartition};
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::Notify;

/// A consumer that is told its partition, and commits to the group `billing` by hand.
async fn assigned_of_billing(peer: &Peer) -> Consumer {
    let build = peer.client().await.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    within("build", build).await.unwrap()
}

/// What a coordinator says while it loads.
fn not_yet() -> Option<Response> {
    Some(Response::Error(wire::Error::new(ErrorCode::CoordinatorLoading, "not yet")))
}

/// The coordinator loads when the next two commits come.
fn refuse_two_commits(peer: &Peer) {
    let refusals = AtomicUsize::new(2);
    peer.answer(move |request| match request {
        Request::CommitOffsets(_) => {
            refusals.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).ok()?;
            not_yet()
        }
        _ => None,
    });
}

#[tokio::test]
async fn progress_is_committed_regularly_and_only_what_the_application_is_done_with() {
    let mut peer = Peer::start(1).await;
    let mut consumer = member_of_billing(&peer, |b| b.auto_commit(Some(Duration::from_millis(20)))).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    stream.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    let mut seen = Vec::new();
    within("a commit", async {
        while !seen.contains(&1) {
            seen.extend(commits(&peer).into_iter().map(|c| c.2));
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(seen.iter().all(|offset| *offset <= 1), "record 1 is still in hand: {seen:?}");
    within("commit", consumer.commit()).await.unwrap();
    assert_eq!(commits(&peer).last().map(|c| c.2), Some(2), "by hand, everything delivered");
}

#[tokio::test]
async fn every_commit_names_the_topic_it_was_read_from_and_a_commit_of_another_one_is_no_beginning() {
    let mut peer = Peer::start(1).await;
    peer.answer(|request| match request {
        Request::FetchOffsets(_) => {
            let topic_id = headwater_client::TopicId::from_bytes([8; 16]).to_wire();
            let of_its_successor =
                wire::CommittedOffset { topic: TOPIC.into(), topic_id, offset: 40, ..Default::default() };
            Some(Response::FetchOffsets(wire::FetchOffsetsResponse { offsets: vec![of_its_successor] }))
        }
        _ => None,
    });
    let client = peer.client().await;
    let build = client.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!(open.offset, 0);
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    within("commit", consumer.commit()).await.unwrap();
    within("commit", consumer.commit_offsets([(TopicPartition::new(TOPIC, 0), 7)])).await.unwrap();
    let idle = within("build", client.consumer().group("billing").topics([TOPIC]).build()).await.unwrap();
    let committer = idle.committer().unwrap();
    drop(idle);
    within("commit", committer.commit_offsets([(TopicPartition::new(TOPIC, 0), 8)])).await.unwrap();
    let ids: Vec<_> = peer
        .calls()
        .into_iter()
        .filter_map(|call| if let Request::CommitOffsets(c) = call { Some(c.offsets) } else { None })
        .flatten()
        .map(|o| (o.offset, o.topic_id))
        .collect();
    assert_eq!(ids, [1, 7, 8].map(|offset| (offset, TOPIC_ID.to_wire())));
}

#[tokio::test]
async fn positions_and_commits_carry_the_leader_epoch_of_what_was_read() {
    let mut peer = Peer::start(1).await;
    let client = peer.client().await;
    let position = Position { offset: 5, leader_epoch: 2 };
    let build = client.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None);
    let mut consumer = within("build", build.start_at(TOPIC, 0, StartFrom::Position(position)).build()).await.unwrap();
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!((open.offset, open.position_leader_epoch), (5, 2));
    let at = TopicPartition::new(TOPIC, 0);
    stream.data(7, 1000, &batch(5, &[b"a", b"b"])).await;
    let record = within("a record", consumer.next()).await.unwrap().unwrap();
    within("commit", consumer.commit_offsets([(at.clone(), record.next_position())])).await.unwrap();
    let rest = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    let committer = consumer.committer().unwrap();
    within("commit", committer.commit_offsets([(at.clone(), rest.next_position())])).await.unwrap();
    within("commit", committer.commit_offsets([(at.clone(), 6)])).await.unwrap();
    assert_eq!(commits(&peer), [(0, 0, 6, 3), (0, 0, 7, 3), (0, 0, 6, -1)]);
    within("seek", consumer.seek(TOPIC, 0, StartFrom::Position(record.next_position()))).await.unwrap();
    let open = peer.fetch(1000).await.1;
    assert_eq!((open.offset, open.position_leader_epoch), (6, 3));
}

#[tokio::test]
async fn commits_of_one_consumer_arrive_one_after_another_however_often_one_is_repeated() {
    let peer = Peer::start(1).await;
    let consumer = assigned_of_billing(&peer).await;
    refuse_two_commits(&peer);
    let at = TopicPartition::new(TOPIC, 0);
    let (older, newer) = (consumer.committer().unwrap(), consumer.committer().unwrap());
    peer.calls();
    let (older, newer) = within("commits", async {
        tokio::join!(older.commit_offsets([(at.clone(), 10)]), newer.commit_offsets([(at.clone(), 20)]))
    })
    .await;
    assert!(older.is_ok() && newer.is_ok());
    let offsets: Vec<i64> = commits(&peer).into_iter().map(|c| c.2).collect();
    assert_eq!(offsets, [10, 10, 10, 20], "the newer one is the last word");
}

#[tokio::test]
async fn a_commit_that_nobody_waits_for_any_more_does_not_overtake_a_later_one() {
    let peer = Peer::start(1).await;
    let consumer = assigned_of_billing(&peer).await;
    refuse_two_commits(&peer);
    let at = TopicPartition::new(TOPIC, 0);
    let committer = consumer.committer().unwrap();
    peer.calls();
    assert!(committer.commit_offsets([(at.clone(), 10)]).now_or_never().is_none());
    within("commit", committer.commit_offsets([(at.clone(), 20)])).await.unwrap();
    let offsets: Vec<i64> = commits(&peer).into_iter().map(|c| c.2).collect();
    assert_eq!(offsets, [10, 10, 10, 20]);
}

#[tokio::test]
async fn a_repeated_commit_leaves_out_what_was_lost_meanwhile() {
    let mut peer = Peer::start(1).await;
    let consumer = member_of_billing(&peer, |b| b.auto_commit(None)).await;
    let (mut member, _) = joined(&mut peer, 5).await;
    let (loading, tried) = (Arc::new(AtomicBool::new(true)), Arc::new(Notify::new()));
    let (until, tell) = (loading.clone(), tried.clone());
    peer.answer(move |request| match request {
        Request::CommitOffsets(_) if loading.load(SeqCst) => {
            tell.notify_one();
            not_yet()
        }
        _ => None,
    });
    let committer = consumer.committer().unwrap();
    let at = TopicPartition::new(TOPIC, 0);
    let commit = tokio::spawn({
        let (committer, at) = (committer.clone(), at.clone());
        async move { committer.commit_offsets([(at, 9)]).await }
    });
    within("an attempt", tried.notified()).await;
    refuse(&mut member, ErrorCode::FencedMemberEpoch).await;
    let (mut member, _) = peer.member().await;
    peer.calls();
    assign(&mut member, 7, &[]).await;
    owns(&mut member, &[]).await;
    until.store(false, SeqCst);
    let error = within("the commit", commit).await.unwrap().unwrap_err();
    assert!(matches!(error, ConsumeError::NotAssigned { partition: 0, .. }), "{error}");
    let error = within("commit", committer.commit_offsets([(at, 9)])).await.unwrap_err();
    assert!(matches!(error, ConsumeError::NotAssigned { partition: 0, .. }), "{error}");
    assert!(commits(&peer).iter().all(|c| c.0 != 7), "the new member spoke for the old one");
}

#[tokio::test]
async fn a_consumer_told_its_partitions_commits_to_a_group_without_being_a_member() {
    let mut peer = Peer::start(1).await;
    let mut consumer = assigned_of_billing(&peer).await;
    let (mut stream, _) = peer.fetch(1000).await;
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    within("commit", consumer.commit()).await.unwrap();
    assert_eq!(commits(&peer), [(0, 0, 1, 3)]);
    within("commit", consumer.commit()).await.unwrap();
    assert!(commits(&peer).is_empty(), "nothing moved");
    assert!(peer.no_further_stream(), "no membership");
}
