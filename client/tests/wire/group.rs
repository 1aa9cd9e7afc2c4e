//! Membership: taking on, letting go, fencing, coming back, leaving, and what is committed when.

use super::support::*;
use futures::{FutureExt, StreamExt};
use headwater_client::{
    Client, ClientConfig, ConsumeError, ConsumerBuilder, ErrorCode, Rebalance, StartFrom, TopicId, TopicPartition,
};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, MemberHeartbeat, MemberUpdate};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

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
    let mut consumer = member_of_billing(&peer, |b| b).await;
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
async fn a_member_says_in_which_rack_it_is_and_asks_there_for_what_it_reads() {
    let mut peer = Peer::start(1).await;
    let config = ClientConfig { rack: Some("b".into()), ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let _consumer = within("build", client.consumer().group("billing").topics([TOPIC]).build()).await.unwrap();
    let (mut member, join) = peer.member().await;
    assert_eq!(join.rack, "b");
    assign(&mut member, 1, &[0]).await;
    let (_, open) = fetches(&mut peer, 1).await.remove(0);
    assert_eq!(open.rack, "b");
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
    let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    let mut streams = fetches(&mut peer, 2).await;
    owns(&mut member, &[0, 1]).await;
    streams[1].0.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    // The application has record 1 in hand when partition 1 is taken away.
    assign(&mut member, 2, &[0]).await;
    owns_in_epoch(&mut member, 2, &[0, 1]).await;
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
    let mut consumer = member_of_billing(&peer, |b| b).await;
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
    let mut consumer = member_of_billing(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    let mut streams = fetches(&mut peer, 2).await;
    owns(&mut member, &[0, 1]).await;
    streams[1].0.data(3, 1000, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!((next_offset(&mut consumer).await, next_offset(&mut consumer).await), (0, 1));
    assign(&mut member, 2, &[0]).await;
    owns_in_epoch(&mut member, 2, &[0, 1]).await;
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
    let mut consumer = member_of_billing(&peer, |b| b).await;
    consumer.until([(TopicPartition::new(TOPIC, 0), 2)]);
    let (mut member, mut stream) = joined(&mut peer, 1).await;
    stream.data(4, 1000, &batch(0, &[b"a", b"b", b"c", b"d"])).await;
    let held = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    assert_eq!((held.base_offset(), held.next_offset()), (0, 2));
    // What lies behind the bound is fetched again.
    consumer.until([]);
    assert_eq!(peer.fetch(1000).await.1.offset, 2);
    assign(&mut member, 2, &[]).await;
    owns_in_epoch(&mut member, 2, &[0]).await;
    assert!(commits(&peer).is_empty());
    assert!(consumer.next().now_or_never().is_none());
    owns(&mut member, &[]).await;
    assert_eq!(commits(&peer), [(2, 0, 2, 3)]);
}

#[tokio::test]
async fn a_stream_ends_at_its_bound_though_where_it_begins_is_found_out_later() {
    let mut peer = Peer::start(1).await;
    let found = Arc::new(AtomicBool::new(false));
    let (say, asked) = (found.clone(), Arc::new(Notify::new()));
    let tell = asked.clone();
    peer.answer(move |request| match request {
        Request::ListOffsets(questions) => {
            tell.notify_one();
            Some(offsets(questions, |_| (!found.load(SeqCst)).then_some(ErrorCode::NotLeader)))
        }
        _ => None,
    });
    let mut consumer = member_of_billing(&peer, |b| b).await;
    consumer.until([(TopicPartition::new(TOPIC, 0), 0)]);
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    within("a question", asked.notified()).await;
    within("assignment", consumer.assigned()).await.unwrap();
    assert_eq!(consumer.position(TOPIC, 0), None);
    let mut end = std::pin::pin!(consumer.next());
    assert!(end.as_mut().now_or_never().is_none());
    say.store(true, SeqCst);
    assert!(within("the end", end).await.is_none(), "nothing stands before the bound");
    assert_eq!(consumer.position(TOPIC, 0).map(|p| p.offset), Some(0));
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
    let consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
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
    let _consumer = member_of_billing(&peer, |b| b.auto_commit(None).on_rebalance(callback)).await;
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
    let mut consumer = member_of_billing(&peer, |b| b).await;
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
    let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, mut stream) = joined(&mut peer, 5).await;
    stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    refuse(&mut member, ErrorCode::FencedMemberEpoch).await;
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

/// Its stream is with a coordinator that does not know yet that another one has followed. The member read on beside the next owner of what it
/// had, and was told at every commit that it was none any more.
#[tokio::test]
async fn a_member_whose_commit_is_refused_because_it_is_none_lets_go_though_its_stream_lives() {
    for code in [ErrorCode::UnknownMember, ErrorCode::FencedMemberEpoch] {
        let mut peer = Peer::start(1).await;
        peer.answer(move |request| match request {
            Request::CommitOffsets(_) => Some(Response::Error(wire::Error::new(code, "it is no member any more"))),
            _ => None,
        });
        let (events, note) = listener();
        let callback = move |event: Rebalance| {
            note(&event);
            async {}
        };
        let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
        let (_member, mut stream) = joined(&mut peer, 5).await;
        stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
        assert_eq!(next_offset(&mut consumer).await, 0);
        let refused = within("a commit", consumer.commit()).await.unwrap_err();
        assert_eq!(refused.code(), Some(code));
        let (mut member, join) = peer.member().await;
        assert_eq!((join.member_epoch, join.owned.len()), (0, 0));
        assert_eq!(*events.lock().unwrap(), ["assigned 1", "lost 1"]);
        assert!(consumer.next().now_or_never().is_none(), "record 1 may be somebody else's");
        // What was said of the member that it was says nothing of the one that it is.
        assign(&mut member, 7, &[0]).await;
        assert_eq!(peer.fetch(1000).await.1.partition, 0);
        owns_in_epoch(&mut member, 7, &[0]).await;
    }
}

#[tokio::test]
async fn a_member_that_is_refused_for_good_tells_the_application() {
    let mut peer = Peer::start(1).await;
    let mut consumer = member_of_billing(&peer, |b| b.assignor("astrological")).await;
    let (mut member, join) = peer.member().await;
    assert_eq!(join.assignor, "astrological");
    refuse(&mut member, ErrorCode::UnsupportedAssignor).await;
    let error = within("an error", consumer.assigned()).await.unwrap_err();
    assert!(matches!(error, ConsumeError::Group { .. }), "{error}");
    assert_eq!(error.code(), Some(ErrorCode::UnsupportedAssignor));
}

/// The client knew the topic from before it was deleted, and so does, for a while, the broker that it asks. A member that
/// believed either kept the partition and never read it.
#[tokio::test]
async fn a_member_reads_a_topic_that_was_created_anew_though_the_one_before_is_remembered() {
    let mut peer = Peer::start(1).await;
    let (before, answers) = (TopicId::from_bytes([6; 16]), AtomicUsize::new(0));
    peer.answer(move |request| match request {
        Request::Metadata(_) if answers.fetch_add(1, SeqCst) < 2 => Some(metadata(before, 1)),
        _ => None,
    });
    let client = peer.client().await;
    let _remembers = within("build", client.consumer().assign([(TOPIC, 0)]).build()).await.unwrap();
    let (_stream, open) = peer.fetch(1000).await;
    assert_eq!((open.topic_id, peer.metadata_asked()), (before.to_wire(), 1));
    let build = client.consumer().group("billing").topics([TOPIC]).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!((open.topic_id, peer.metadata_asked()), (TOPIC_ID.to_wire(), 3));
    stream.data(1, 1000, &batch(0, &[b"anew"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
}

#[tokio::test]
async fn a_member_whose_broker_serves_the_partition_no_more_asks_who_does() {
    let mut peer = Peer::start(1).await;
    let mut consumer = member_of_billing(&peer, |b| b).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut stream, _) = peer.fetch(1000).await;
    for code in [ErrorCode::UnknownTopicId, ErrorCode::UnknownPartition, ErrorCode::NotLeader] {
        let asked = peer.metadata_asked();
        let error = Some(wire::Error::new(code, "not here"));
        stream.send(&wire::FetchData { error, ..wire::FetchData::default() }, &[]).await;
        let (again, _) = peer.fetch(1000).await;
        assert_eq!(peer.metadata_asked(), asked + 1, "{code}");
        stream = again;
    }
    stream.data(1, 1000, &batch(0, &[b"found"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
}

/// Writes down what it is told.
fn listener() -> (Arc<Mutex<Vec<String>>>, impl Fn(&Rebalance) + Send + Sync + Clone) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let note = move |event: &Rebalance| {
        seen.lock().unwrap().push(match event {
            Rebalance::Assigned(p) => format!("assigned {}", p.len()),
            Rebalance::Revoked(p, _) => format!("revoked {}", p.len()),
            Rebalance::Lost(p) => format!("lost {}", p.len()),
        });
    };
    (events, note)
}

/// A callback that says when it is told of a revocation, and ends then when it is let go on.
fn held_revocation(
    note: impl Fn(&Rebalance) + Send + Sync,
    begun: Arc<Notify>,
    go_on: Arc<Notify>,
) -> impl Fn(Rebalance) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync {
    move |event| {
        note(&event);
        let (begun, go_on) = (begun.clone(), go_on.clone());
        Box::pin(async move {
            if let Rebalance::Revoked(..) = event {
                begun.notify_one();
                go_on.notified().await;
            }
        })
    }
}

/// A callback that only writes down what it is told.
fn told(note: impl Fn(&Rebalance)) -> impl Fn(Rebalance) -> std::future::Ready<()> {
    move |event| {
        note(&event);
        std::future::ready(())
    }
}

async fn goodbye(member: &mut PeerStream) -> MemberHeartbeat {
    loop {
        let (heartbeat, _) = member.frame::<MemberHeartbeat>().await.expect("a goodbye");
        if heartbeat.leave {
            return heartbeat;
        }
    }
}

#[tokio::test]
async fn a_member_whose_membership_ends_for_good_reads_nothing_more() {
    let mut peer = Peer::start(1).await;
    let (events, note) = listener();
    let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(told(note))).await;
    let (_member, mut stream) = joined(&mut peer, 5).await;
    stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    // The broker comes back as one that this client does not understand.
    peer.set_hello(|hello| hello.version = 99);
    peer.drop_connections();
    within("the end", async {
        while !consumer.assignment().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let error = within("an error", consumer.next()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnsupportedVersion));
    assert!(consumer.next().now_or_never().is_none(), "record 1 may be somebody else's");
    assert_eq!(*events.lock().unwrap(), ["assigned 1", "lost 1"]);
}

#[tokio::test]
async fn a_callback_that_panics_ends_the_membership_and_the_application_is_told() {
    for at_fault in ["assigned 1", "revoked 1"] {
        let mut peer = Peer::start(1).await;
        let (events, note) = listener();
        let callback = move |event| {
            note(&event);
            let last = events.lock().unwrap().last().cloned();
            assert_ne!(last.as_deref(), Some(at_fault), "a defect of the application");
            async {}
        };
        let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
        let (mut member, _) = peer.member().await;
        assign(&mut member, 1, &[0]).await;
        assign(&mut member, 2, &[]).await;
        goodbye(&mut member).await;
        member.send(&MemberUpdate { left: true, ..MemberUpdate::default() }, &[]).await;
        let error = within("an error", consumer.next()).await.unwrap().unwrap_err();
        assert!(matches!(&error, ConsumeError::CallbackPanicked { reason } if reason.contains("a defect")), "{error}");
        assert!(consumer.assignment().is_empty());
    }
}

#[tokio::test]
async fn closing_or_dropping_while_a_partition_is_taken_away_waits_for_nobody_and_tells() {
    for close in [true, false] {
        let mut peer = Peer::start(1).await;
        let (events, note) = listener();
        let mut consumer = member_of_billing(&peer, |b| b.on_rebalance(told(note))).await;
        let (mut member, mut stream) = joined(&mut peer, 1).await;
        stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
        assert_eq!(next_offset(&mut consumer).await, 0);
        assign(&mut member, 2, &[]).await;
        owns_in_epoch(&mut member, 2, &[0]).await;
        let began = std::time::Instant::now();
        let closing = close.then(|| tokio::spawn(consumer.close()));
        goodbye(&mut member).await;
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        member.send(&MemberUpdate { left: true, ..MemberUpdate::default() }, &[]).await;
        if let Some(closing) = closing {
            within("close", closing).await.unwrap().unwrap();
        }
        assert_eq!(*events.lock().unwrap(), ["assigned 1", "revoked 1"]);
        let expected = if close { vec![(2, 0, 1, 3)] } else { Vec::new() };
        assert_eq!(commits(&peer), expected);
    }
}

#[tokio::test]
async fn a_rebalance_goes_on_while_the_coordinator_is_away() {
    let mut peer = Peer::start(2).await;
    let (events, note) = listener();
    let builder = |b: ConsumerBuilder| b.auto_commit(None).on_rebalance(told(note));
    let mut consumer = member_of_billing(&peer, builder).await;
    let (mut member, mut stream) = joined(&mut peer, 1).await;
    stream.data(2, 1000, &batch(0, &[b"a", b"b"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    // Partition 1 is taken on only when 0 was let go of.
    assign(&mut member, 2, &[1]).await;
    owns_in_epoch(&mut member, 2, &[0]).await;
    peer.set_deaf(true);
    peer.drop_connections();
    // One for the fetch stream, one for the membership.
    peer.knocked(2).await;
    assert!(consumer.next().now_or_never().is_none());
    let rebalanced = ["assigned 1", "revoked 1", "assigned 1"];
    within("letting go and taking on", async {
        while *events.lock().unwrap() != rebalanced || !consumer.assignment().contains(&TopicPartition::new(TOPIC, 1)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(consumer.assignment().len(), 1);
    peer.set_deaf(false);
    let (mut member, join) = peer.member().await;
    assert_eq!(
        (join.member_epoch, join.owned),
        (2, partitions(&[1])),
        "what it has when the coordinator is there again"
    );
    owns(&mut member, &[1]).await;
}

/// The next membership stream, among others that are left alone.
async fn rejoined(peer: &mut Peer) -> (PeerStream, wire::OpenMember) {
    loop {
        let stream = peer.stream().await;
        if let wire::open::Stream::Member(join) = stream.open.clone() {
            return (stream, join);
        }
    }
}

/// A coordinator takes what a join says for all that the member has, and gives the rest to others. A member that took on from what an
/// earlier one had told it read a partition beside its next owner, and was put out for that.
#[tokio::test]
async fn a_member_takes_nothing_on_from_its_join_until_the_coordinator_has_answered_it() {
    let mut peer = Peer::start(3).await;
    let (events, note) = listener();
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let callback = held_revocation(note, begun.clone(), go_on.clone());
    let _consumer = member_of_billing(&peer, |b| b.auto_commit(None).on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    owns(&mut member, &[0, 1]).await;
    // It would take 2 on once 0 was let go of.
    assign(&mut member, 2, &[1, 2]).await;
    within("the callback", begun.notified()).await;
    peer.drop_connections();
    let (mut member, join) = rejoined(&mut peer).await;
    assert_eq!((join.member_epoch, join.owned), (2, partitions(&[0, 1])));
    go_on.notify_one();
    owns(&mut member, &[1]).await;
    let (next, _) = member.frame::<MemberHeartbeat>().await.expect("a heartbeat");
    assert_eq!(next.owned, partitions(&[1]), "2 may be somebody else's");
    // A join that was not answered may have been taken all the same.
    peer.drop_connections();
    let (mut member, join) = rejoined(&mut peer).await;
    assert_eq!((join.member_epoch, join.owned), (2, partitions(&[1])));
    assert_eq!(*events.lock().unwrap(), ["assigned 2", "revoked 1"]);
    assign(&mut member, 3, &[1, 2]).await;
    owns(&mut member, &[1, 2]).await;
    assert_eq!(*events.lock().unwrap(), ["assigned 2", "revoked 1", "assigned 1"]);
}

#[tokio::test]
async fn closing_while_a_revocation_s_callback_runs_says_goodbye_when_it_is_done_and_tells_once() {
    let mut peer = Peer::start(1).await;
    let (events, note) = listener();
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let callback = held_revocation(note, begun.clone(), go_on.clone());
    let consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    owns(&mut member, &[0]).await;
    assign(&mut member, 2, &[]).await;
    within("the callback", begun.notified()).await;
    let closing = tokio::spawn(consumer.close());
    for _ in 0..3 {
        let (heartbeat, _) = member.frame::<MemberHeartbeat>().await.expect("a heartbeat");
        assert!(!heartbeat.leave && heartbeat.owned == partitions(&[0]), "it is not let go of yet: {heartbeat:?}");
    }
    go_on.notify_one();
    assert!(goodbye(&mut member).await.owned.is_empty());
    member.send(&MemberUpdate { left: true, ..MemberUpdate::default() }, &[]).await;
    within("close", closing).await.unwrap().unwrap();
    assert_eq!(*events.lock().unwrap(), ["assigned 1", "revoked 1"]);
}

#[tokio::test]
async fn a_callback_that_has_begun_is_carried_through_though_the_member_is_fenced() {
    let mut peer = Peer::start(2).await;
    let (events, note) = listener();
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait, done) = (begun.clone(), go_on.clone(), events.clone());
    let callback = move |event: Rebalance| {
        let (tell, wait, done) = (tell.clone(), wait.clone(), done.clone());
        note(&event);
        async move {
            if let Rebalance::Revoked(..) = event {
                tell.notify_one();
                wait.notified().await;
                done.lock().unwrap().push("carried through".into());
            }
        }
    };
    let _consumer = member_of_billing(&peer, |b| b.on_rebalance(callback)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0, 1]).await;
    owns(&mut member, &[0, 1]).await;
    assign(&mut member, 2, &[0]).await;
    within("the callback", begun.notified()).await;
    refuse(&mut member, ErrorCode::FencedMemberEpoch).await;
    // The stream's end says that the member has taken it in.
    within("the end of the stream", async { while member.frame::<MemberHeartbeat>().await.is_some() {} }).await;
    go_on.notify_one();
    let join = loop {
        let stream = peer.stream().await;
        if let wire::open::Stream::Member(join) = stream.open {
            break join;
        }
    };
    assert_eq!((join.member_epoch, join.owned.len()), (0, 0));
    assert_eq!(*events.lock().unwrap(), ["assigned 2", "revoked 1", "carried through", "lost 1"]);
}

#[tokio::test]
async fn a_coordinator_that_does_not_answer_a_join_is_asked_anew() {
    let mut peer = Peer::start(1).await;
    let config = ClientConfig { request_timeout: Duration::from_millis(200), ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let _consumer = within("build", client.consumer().group("billing").topics([TOPIC]).build()).await.unwrap();
    let (_silent, first) = peer.member().await;
    let (mut member, again) = peer.member().await;
    assert_eq!((again.member_id, again.member_epoch), (first.member_id, 0));
    assign(&mut member, 1, &[0]).await;
    owns(&mut member, &[0]).await;
}

#[tokio::test]
async fn closing_commits_what_was_delivered_and_says_goodbye() {
    let mut peer = Peer::start(1).await;
    let mut consumer = member_of_billing(&peer, |b| b.instance_id("till-7")).await;
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
    let mut consumer = member_of_billing(&peer, |b| b).await;
    let (mut member, mut stream) = joined(&mut peer, 1).await;
    stream.data(1, 1000, &batch(0, &[b"a"])).await;
    assert_eq!(next_offset(&mut consumer).await, 0);
    drop(consumer);
    while !member.frame::<MemberHeartbeat>().await.expect("a goodbye").0.leave {}
    assert!(commits(&peer).is_empty());
}

#[tokio::test]
async fn another_subscription_is_told_at_once() {
    let mut peer = Peer::start(1).await;
    let mut consumer = member_of_billing(&peer, |b| b).await;
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
