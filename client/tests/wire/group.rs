//! Membership: taking on, letting go, fencing, coming back, leaving, and what is committed when.

use super::support::*;
use futures::{FutureExt, StreamExt};
use headwater_client::{
    ConsumeError, Consumer, ConsumerBuilder, ErrorCode, Position, Rebalance, StartFrom, TopicPartition,
};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, MemberHeartbeat, MemberUpdate};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

async fn consumer(peer: &Peer, set: impl FnOnce(ConsumerBuilder) -> ConsumerBuilder) -> Consumer {
    let builder = peer.client().await.consumer().group("billing").topics([TOPIC]);
    within("build", set(builder).build()).await.unwrap()
}

fn partitions(partitions: &[u32]) -> Vec<wire::TopicPartitions> {
    let topic =
        wire::TopicPartitions { topic: TOPIC.into(), topic_id: TOPIC_ID.to_wire(), partitions: partitions.to_vec() };
    if partitions.is_empty() { Vec::new() } else { vec![topic] }
}

/// Gives a member its partitions.
async fn assign(stream: &mut PeerStream, member_epoch: i32, owns: &[u32]) {
    let update = MemberUpdate {
        member_epoch,
        assignment: partitions(owns),
        heartbeat_interval_ms: 100,
        ..MemberUpdate::default()
    };
    stream.send(&update, &[]).await;
}

/// The next heartbeat that says the member owns exactly these.
async fn owns(stream: &mut PeerStream, expected: &[u32]) -> MemberHeartbeat {
    within("letting go or taking on", async {
        loop {
            let (heartbeat, _) = stream.frame::<MemberHeartbeat>().await.expect("a heartbeat");
            if heartbeat.owned == partitions(expected) {
                return heartbeat;
            }
        }
    })
    .await
}

/// What was committed since this was last asked: epoch, partition, offset, leader epoch.
fn commits(peer: &Peer) -> Vec<(i32, u32, i64, i32)> {
    let commit = |call| match call {
        Request::CommitOffsets(c) => Some(c),
        _ => None,
    };
    let commits = peer.calls().into_iter().filter_map(commit);
    commits
        .flat_map(|c| {
            let epoch = c.member_epoch;
            c.offsets.into_iter().map(move |o| (epoch, o.partition, o.offset, o.leader_epoch))
        })
        .collect()
}

/// Accepts the fetch streams of these partitions, in order of their numbers.
async fn fetches(peer: &mut Peer, count: usize) -> Vec<(PeerStream, wire::OpenFetch)> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(peer.fetch(1000).await);
    }
    streams.sort_by_key(|(_, open)| open.partition);
    streams
}

async fn next_offset(consumer: &mut Consumer) -> i64 {
    within("a record", consumer.next()).await.unwrap().unwrap().offset
}

#[tokio::test]
async fn a_member_begins_where_its_group_committed_and_elsewhere_at_the_start() {
    let mut peer = Peer::start(2).await;
    peer.answer(|request| match request {
        Request::FetchOffsets(asked) => {
            assert_eq!((asked.member_epoch, &*asked.group), (1, "billing"));
            let committed = wire::CommittedOffset {
                topic: TOPIC.into(),
                partition: 1,
                offset: 40,
                leader_epoch: 2,
                ..Default::default()
            };
            Some(Response::FetchOffsets(wire::FetchOffsetsResponse { offsets: vec![committed] }))
        }
        _ => None,
    });
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, join) = peer.member().await;
    assert_eq!((&*join.group, join.member_epoch, join.topics), ("billing", 0, vec![TOPIC.to_owned()]));
    assert_eq!(Some(&*join.member_id), consumer.member_id());
    assign(&mut member, 1, &[0, 1]).await;
    let streams = fetches(&mut peer, 2).await;
    let begun: Vec<_> = streams.iter().map(|(_, o)| (o.partition, o.offset, o.position_leader_epoch)).collect();
    assert_eq!(begun, [(0, 0, -1), (1, 40, 2)]);
    assert_eq!(within("assignment", consumer.assigned()).await.unwrap().len(), 2);
    assert_eq!(owns(&mut member, &[0, 1]).await.member_epoch, 1);
}

#[tokio::test]
async fn a_partition_is_let_go_only_when_the_application_is_done_and_its_progress_is_committed() {
    let mut peer = Peer::start(2).await;
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let callback = move |event: Rebalance| {
        seen.lock().unwrap().push(match event {
            Rebalance::Assigned(p) => format!("assigned {}", p.len()),
            Rebalance::Revoked(p, _) => format!("revoked {}", p[0]),
            Rebalance::Lost(p) => format!("lost {}", p.len()),
        });
        async {}
    };
    let mut consumer = consumer(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    let mut streams = fetches(&mut peer, 2).await;
    owns(&mut member, &[0, 1]).await;
    streams[1].0.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    // The application has record 1 in hand when partition 1 is taken away.
    assign(&mut member, 2, &[0]).await;
    let heartbeat = owns(&mut member, &[0, 1]).await;
    assert_eq!(heartbeat.member_epoch, 2, "alive, and not done yet");
    assert!(commits(&peer).is_empty());
    assert!(consumer.next().now_or_never().is_none(), "record 2 is somebody else's now");
    owns(&mut member, &[0]).await;
    assert_eq!(commits(&peer), [(2, 1, 2, 3)], "both records that the application is done with");
    assert_eq!(*events.lock().unwrap(), ["assigned 2".to_owned(), format!("revoked {TOPIC}-1")]);
    assert_eq!(consumer.assignment().into_iter().collect::<Vec<_>>(), [TopicPartition::new(TOPIC, 0)]);
}

#[tokio::test]
async fn a_partition_that_is_not_served_ends_no_membership_and_holds_up_no_rebalance() {
    let mut peer = Peer::start(3).await;
    peer.answer(|request| match request {
        Request::ListOffsets(asked) => Some(offsets(asked, |partition| match partition {
            1 => Some(ErrorCode::PartitionFenced),
            2 => Some(ErrorCode::NotLeader),
            _ => None,
        })),
        _ => None,
    });
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1, 2]).await;
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!(open.partition, 0);
    owns(&mut member, &[0, 1, 2]).await;
    let error = within("an error", consumer.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, ConsumeError::Refused { partition: 1, .. }), "{error}");
    assign(&mut member, 2, &[0]).await;
    assert_eq!(owns(&mut member, &[0]).await.member_epoch, 2, "nobody waits for the partition without a leader");
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
}

#[tokio::test]
async fn a_seek_back_while_the_partition_is_taken_away_is_where_the_next_owner_begins() {
    let mut peer = Peer::start(2).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    let mut streams = fetches(&mut peer, 2).await;
    owns(&mut member, &[0, 1]).await;
    streams[1].0.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    assign(&mut member, 2, &[0]).await;
    assert_eq!(owns(&mut member, &[0, 1]).await.member_epoch, 2);
    // Record 1 failed, and is to come again.
    within("seek", consumer.seek(TOPIC, 1, StartFrom::Offset(1))).await.unwrap();
    assert!(consumer.next().now_or_never().is_none(), "it is somebody else's now");
    owns(&mut member, &[0]).await;
    assert_eq!(commits(&peer), [(2, 1, 1, -1)]);
    assert!(peer.no_further_stream(), "nothing more is read here");
    let late = consumer.seek(TOPIC, 1, StartFrom::Offset(0)).await.unwrap_err();
    assert!(matches!(late, ConsumeError::NotAssigned { partition: 1, .. }), "{late}");
}

#[tokio::test]
async fn what_is_in_hand_is_not_committed_because_reading_begins_anew_behind_it() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    consumer.until([(TopicPartition::new(TOPIC, 0), 2)]);
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    stream.data(4, 1000, &batch(0, &[b"a", b"b", b"c", b"d"])).await;
    let held = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    assert_eq!((held.base_offset(), held.next_offset()), (0, 2));
    // What lies behind the bound is fetched again.
    consumer.until([]);
    assert_eq!(peer.fetch(1000).await.1.offset, 2);
    assign(&mut member, 2, &[]).await;
    assert_eq!(owns(&mut member, &[0]).await.member_epoch, 2, "the batch is in hand still");
    assert!(commits(&peer).is_empty());
    assert!(consumer.next().now_or_never().is_none());
    owns(&mut member, &[]).await;
    assert_eq!(commits(&peer), [(2, 0, 2, 3)]);
}

#[tokio::test]
async fn a_consumer_that_is_dropped_while_it_is_told_of_partitions_reads_none_of_them() {
    let mut peer = Peer::start(1).await;
    let (told, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (told.clone(), go_on.clone());
    let callback = move |event: Rebalance| {
        let (tell, wait) = (tell.clone(), wait.clone());
        async move {
            if let Rebalance::Assigned(_) = event {
                tell.notify_one();
                wait.notified().await;
            }
        }
    };
    let consumer = consumer(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    within("the callback", told.notified()).await;
    drop(consumer);
    go_on.notify_one();
    while !member.frame::<MemberHeartbeat>().await.expect("a goodbye").0.leave {}
    assert!(peer.is_quiet(Duration::from_millis(100)).await, "nobody is there to read for");
}

#[tokio::test]
async fn a_revoked_partition_can_be_committed_by_hand_in_the_callback() {
    let mut peer = Peer::start(1).await;
    let callback = |event: Rebalance| async move {
        if let Rebalance::Revoked(partitions, committer) = event {
            let offsets = partitions.into_iter().map(|at| (at, 77));
            committer.commit_offsets(offsets).await.unwrap();
        }
    };
    let _consumer = consumer(&peer, |b| b.auto_commit(None).on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    owns(&mut member, &[0]).await;
    assign(&mut member, 2, &[]).await;
    owns(&mut member, &[]).await;
    assert_eq!(commits(&peer), [(2, 0, 77, -1)]);
}

#[tokio::test]
async fn a_lost_membership_stream_is_opened_again_with_the_same_epoch_and_partitions() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, first) = peer.member().await;
    assign(&mut member, 5, &[0]).await;
    let _ = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    peer.drop_connections();
    let mut rejoined = None;
    let mut fetch = None;
    while rejoined.is_none() || fetch.is_none() {
        let mut stream = peer.stream().await;
        match stream.open.clone() {
            wire::open::Stream::Member(join) => rejoined = Some((stream, join)),
            wire::open::Stream::Fetch(open) => {
                stream.send(&wire::FetchOpened::default(), &[]).await;
                fetch = Some((stream, open));
            }
            other => panic!("{other:?}"),
        }
    }
    let (mut member, again) = rejoined.unwrap();
    assert_eq!((again.member_id, again.member_epoch, again.owned), (first.member_id, 5, partitions(&[0])));
    assign(&mut member, 5, &[0]).await;
    fetch.unwrap().0.data(1, 1000, &batch(0, &[b"on it goes"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
}

#[tokio::test]
async fn a_fenced_member_loses_everything_says_so_and_joins_anew() {
    let mut peer = Peer::start(1).await;
    let lost = Arc::new(Mutex::new(Vec::new()));
    let seen = lost.clone();
    let callback = move |event: Rebalance| {
        if let Rebalance::Lost(partitions) = event {
            seen.lock().unwrap().extend(partitions);
        }
        async {}
    };
    let mut consumer = consumer(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 5, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    let error = Some(wire::Error::new(ErrorCode::FencedMemberEpoch, "too slow"));
    member.send(&MemberUpdate { error, ..MemberUpdate::default() }, &[]).await;
    let (mut member, join) = peer.member().await;
    assert_eq!((join.member_epoch, join.owned.len()), (0, 0));
    assert_eq!(*lost.lock().unwrap(), [TopicPartition::new(TOPIC, 0)]);
    assert!(consumer.next().now_or_never().is_none(), "record 1 may be somebody else's");
    assert!(commits(&peer).is_empty(), "a fenced member commits nothing");
    assign(&mut member, 7, &[0]).await;
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!(open.offset, 0, "nothing was committed");
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
}

#[tokio::test]
async fn a_member_that_is_refused_for_good_tells_the_application() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.assignor("astrological")).await;
    let (mut member, join) = peer.member().await;
    assert_eq!(join.assignor, "astrological");
    let error = Some(wire::Error::new(ErrorCode::UnsupportedAssignor, "no such assignor"));
    member.send(&MemberUpdate { error, ..MemberUpdate::default() }, &[]).await;
    let error = within("an error", consumer.assigned()).await.unwrap_err();
    assert!(matches!(error, ConsumeError::Group { .. }), "{error}");
    assert_eq!(error.code(), Some(ErrorCode::UnsupportedAssignor));
}

#[tokio::test]
async fn closing_commits_what_was_delivered_and_says_goodbye() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.instance_id("till-7")).await;
    let (mut member, join) = peer.member().await;
    assert_eq!(join.instance_id, "till-7");
    assign(&mut member, 1, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    stream.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    let close = tokio::spawn(consumer.close());
    let goodbye = loop {
        let (heartbeat, _) = member.frame::<MemberHeartbeat>().await.expect("a heartbeat");
        if heartbeat.leave {
            break heartbeat;
        }
    };
    assert!(goodbye.keep_static, "a static member comes back");
    assert_eq!(commits(&peer), [(1, 0, 2, 3)], "committed before");
    member.send(&MemberUpdate { left: true, ..MemberUpdate::default() }, &[]).await;
    within("close", close).await.unwrap().unwrap();
}

#[tokio::test]
async fn dropping_leaves_without_committing() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    drop(consumer);
    while !member.frame::<MemberHeartbeat>().await.expect("a goodbye").0.leave {}
    assert!(commits(&peer).is_empty());
}

#[tokio::test]
async fn another_subscription_is_told_at_once() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[]).await;
    assert!(within("assignment", consumer.assigned()).await.unwrap().is_empty());
    consumer.subscribe(["arrivals", "departures"]).await.unwrap();
    let told = loop {
        let (heartbeat, _) = member.frame::<MemberHeartbeat>().await.expect("a heartbeat");
        if heartbeat.subscribe {
            break heartbeat;
        }
    };
    assert_eq!(told.topics, ["arrivals", "departures"]);
}

#[tokio::test]
async fn progress_is_committed_regularly_and_only_what_the_application_is_done_with() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.auto_commit(Some(Duration::from_millis(20)))).await;
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
    let build = peer.client().await.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    let consumer = within("build", build).await.unwrap();
    let refusals = AtomicUsize::new(2);
    peer.answer(move |request| match request {
        Request::CommitOffsets(_) => {
            refusals.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).ok()?;
            Some(Response::Error(wire::Error::new(ErrorCode::CoordinatorLoading, "not yet")))
        }
        _ => None,
    });
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
    let build = peer.client().await.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    let consumer = within("build", build).await.unwrap();
    let refusals = AtomicUsize::new(2);
    peer.answer(move |request| match request {
        Request::CommitOffsets(_) => {
            refusals.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).ok()?;
            Some(Response::Error(wire::Error::new(ErrorCode::CoordinatorLoading, "not yet")))
        }
        _ => None,
    });
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
    let consumer = consumer(&peer, |b| b.auto_commit(None)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 5, &[0]).await;
    let _ = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    let (loading, tried) = (Arc::new(AtomicBool::new(true)), Arc::new(Notify::new()));
    let (until, tell) = (loading.clone(), tried.clone());
    peer.answer(move |request| match request {
        Request::CommitOffsets(_) if loading.load(SeqCst) => {
            tell.notify_one();
            Some(Response::Error(wire::Error::new(ErrorCode::CoordinatorLoading, "not yet")))
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
    let error = Some(wire::Error::new(ErrorCode::FencedMemberEpoch, "too slow"));
    member.send(&MemberUpdate { error, ..MemberUpdate::default() }, &[]).await;
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
    let build = peer.client().await.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut stream, _) = peer.fetch(1000).await;
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    within("commit", consumer.commit()).await.unwrap();
    assert_eq!(commits(&peer), [(0, 0, 1, 3)]);
    within("commit", consumer.commit()).await.unwrap();
    assert!(commits(&peer).is_empty(), "nothing moved");
    assert!(peer.no_further_stream(), "no membership");
}
