//! Topics, offsets and consumer groups of a running broker, over the wire.

mod harness;

use bytes::Bytes;
use harness::members::{Member, commit, committed, entry, open_member};
use harness::{Client, batch, batch_with, open_produce, start, start_with, within};
use headwater_broker::Broker;
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchBuilder, BuildOptions, Codec};
use headwater_proto::wire::{self, call::Request, call_response::Response};
use headwater_storage::SimFiles;
use headwater_storage::import::{self, ImportOptions, import};
use headwater_storage::{Files, NewIdentity, OsFiles};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

async fn describe_group(client: &Client, group: &str) -> Result<wire::DescribeGroupResponse, ErrorCode> {
    match client.call(Request::DescribeGroup(wire::DescribeGroup { group: group.into() })).await {
        Response::DescribeGroup(described) => Ok(described),
        Response::Error(error) => Err(ErrorCode::from_number(error.code)),
        other => panic!("{other:?}"),
    }
}

async fn describe(client: &Client, topic: &str) -> wire::DescribeTopicResponse {
    match client.call(Request::DescribeTopic(wire::DescribeTopic { name: topic.into(), stale: false })).await {
        Response::DescribeTopic(described) => described,
        other => panic!("{other:?}"),
    }
}

async fn refusal(client: &Client, request: Request) -> (ErrorCode, String) {
    match client.call(request).await {
        Response::Error(error) => (ErrorCode::from_number(error.code), error.message),
        other => panic!("accepted: {other:?}"),
    }
}

async fn accepted(client: &Client, request: Request) {
    let answer = client.call(request).await;
    assert!(matches!(answer, Response::Done(_)), "{answer:?}");
}

fn change(name: &str, value: Option<&str>) -> wire::ConfigChange {
    wire::ConfigChange { name: name.into(), value: value.map(str::to_owned) }
}

async fn produce(client: &Client, topic: &Bytes, partition: u32, records: &[(i64, &str)]) {
    let (mut stream, opened) = client.produce(open_produce(topic, partition)).await;
    assert_eq!(opened.error, None);
    for (timestamp, value) in records {
        let mut batch = BatchBuilder::new(BuildOptions::default());
        batch.append(*timestamp, None, Some(value.as_bytes()), &[]);
        let payload = batch.build().expect("a record");
        stream.requests += 1;
        let header = wire::ProduceRequest { request_id: stream.requests, partition };
        stream.request_as(header, &payload).await;
        assert_eq!(stream.answer().await.error, None);
    }
}

/// Lets a broker go as if it had crashed, and starts another one on its data at once: it waits for the lock.
async fn crash_and_start(broker: Broker, dir: &Path) -> Broker {
    drop(broker);
    within("another start", Broker::start(harness::config(dir))).await.expect("a broker")
}

async fn stop(broker: Broker) {
    assert!(within("shutdown", broker.shutdown()).await, "not in good order");
}

#[tokio::test]
async fn topics_are_made_described_changed_grown_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["log.segment.bytes=1048576"]).await;
    let client = Client::connect(&broker).await;
    let id = client.create_topic("orders", 3, &[("retention.ms", "3600000")]).await;

    let described = describe(&client, "orders").await;
    assert_eq!((described.partitions.len(), &described.topic_id), (3, &id));
    let of = |described: &wire::DescribeTopicResponse, name: &str| {
        let entry = described.config.iter().find(|entry| entry.name == name).expect("shown");
        (entry.value.clone(), entry.source.clone())
    };
    assert_eq!(of(&described, "retention.ms"), ("3600000".into(), "topic".into()));
    assert_eq!(of(&described, "segment.bytes"), ("1048576".into(), "broker".into()));
    assert_eq!(of(&described, "max.message.bytes"), ("1048588".into(), "default".into()));

    let alter = |config| Request::AlterTopic(wire::AlterTopic { name: "orders".into(), config, validate_only: false });
    accepted(&client, alter(vec![change("retention.ms", None), change("flush.ms", Some("5"))])).await;
    let add = |name: &str, partitions| Request::AddPartitions(wire::AddPartitions { name: name.into(), partitions });
    accepted(&client, add("orders", 5)).await;
    let described = describe(&client, "orders").await;
    assert_eq!(of(&described, "retention.ms"), ("604800000".into(), "default".into()));
    assert_eq!((described.partitions.len(), of(&described, "flush.ms").0), (5, "5".into()));

    let (code, why) = refusal(&client, alter(vec![change("retention.mss", Some("1"))])).await;
    assert_eq!(code, ErrorCode::InvalidConfig);
    assert!(why.contains("retention.mss") && why.contains("retention.ms?"), "{why}");
    assert_eq!(refusal(&client, add("orders", 4)).await.0, ErrorCode::InvalidPartitions);
    assert_eq!(refusal(&client, add("nosuch", 4)).await.0, ErrorCode::UnknownTopic);
    assert_eq!(refusal(&client, add("__consumer_offsets", 99)).await.0, ErrorCode::InvalidTopic);
    let create = |name: &str, replicas, partitions| {
        let replication_factor = replicas;
        Request::CreateTopic(wire::CreateTopic {
            name: name.into(),
            partitions,
            replication_factor,
            ..Default::default()
        })
    };
    assert_eq!(refusal(&client, create("orders", 0, 1)).await.0, ErrorCode::TopicExists);
    assert_eq!(refusal(&client, create("a/b", 0, 1)).await.0, ErrorCode::InvalidTopic);
    assert_eq!(refusal(&client, create("three", 3, 1)).await.0, ErrorCode::InvalidReplicationFactor);
    assert_eq!(refusal(&client, create("many", 1, u32::MAX)).await.0, ErrorCode::InvalidPartitions);

    produce(&client, &id, 0, &[(1, "old")]).await;
    accepted(&client, Request::DeleteTopic(wire::DeleteTopic { name: "orders".into() })).await;
    assert_eq!(
        refusal(&client, Request::DescribeTopic(wire::DescribeTopic { name: "orders".into(), stale: false })).await.0,
        ErrorCode::UnknownTopic
    );
    let again = client.create_topic("orders", 1, &[]).await;
    assert_ne!(again, id);
    assert_eq!(describe(&client, "orders").await.partitions[0].log_end_offset, 0, "old records in the new topic");
    let (_, opened) = client.produce(open_produce(&id, 0)).await;
    assert_eq!(opened.error.map(|error| error.code), Some(ErrorCode::UnknownTopicId.number()));
    stop(broker).await;
}

#[tokio::test]
async fn a_restart_keeps_topics_raises_epochs_and_never_repeats_a_producer_id() {
    let dir = tempfile::tempdir().unwrap();
    let mut ids = BTreeSet::new();
    let mut epochs = Vec::new();
    let mut broker = start(dir.path()).await;
    for round in 0..3 {
        let client = Client::connect(&broker).await;
        if round == 0 {
            client.create_topic("kept", 2, &[("flush.ms", "7")]).await;
        }
        let described = describe(&client, "kept").await;
        assert_eq!(described.partitions.len(), 2);
        epochs.push(described.partitions[1].leader_epoch);
        for _ in 0..3 {
            let Response::AllocateProducerId(id) =
                client.call(Request::AllocateProducerId(wire::AllocateProducerId::default())).await
            else {
                panic!("no id");
            };
            assert!(ids.insert(id.producer_id), "{} was given twice", id.producer_id);
        }
        broker = if round == 1 {
            crash_and_start(broker, dir.path()).await
        } else {
            stop(broker).await;
            start(dir.path()).await
        };
    }
    stop(broker).await;
    assert_eq!(epochs, [0, 1, 2]);
}

#[tokio::test]
async fn offsets_are_found_by_place_and_time() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let id = client.create_topic("t", 1, &[]).await;
    let now = 1_700_000_000_000;
    produce(&client, &id, 0, &[(now, "a"), (now + 50, "b"), (now + 20, "c"), (now + 50, "d")]).await;
    let query = |at| wire::OffsetQuery { topic: "t".into(), partition: 0, at: Some(at) };
    use wire::offset_query::At;
    let done = wire::Done {};
    let queries = vec![
        query(At::Earliest(done)),
        query(At::Latest(done)),
        query(At::TimestampMs(now + 1)),
        query(At::TimestampMs(now + 51)),
        query(At::MaxTimestamp(done)),
        query(At::LeaderEpochEnd(0)),
        wire::OffsetQuery { topic: "nosuch".into(), partition: 0, at: Some(At::Latest(done)) },
        wire::OffsetQuery { topic: "t".into(), partition: 7, at: Some(At::Latest(done)) },
    ];
    let Response::ListOffsets(found) = client.call(Request::ListOffsets(wire::ListOffsets { queries })).await else {
        panic!("no answer");
    };
    let offsets: Vec<i64> = found.answers.iter().map(|answer| answer.offset).collect();
    assert_eq!(offsets, [0, 4, 1, -1, 1, 4, -1, -1]);
    let codes: Vec<u32> = found.answers.iter().skip(6).map(|answer| answer.error.as_ref().expect("why").code).collect();
    assert_eq!(codes, [ErrorCode::UnknownTopic.number(), ErrorCode::UnknownPartition.number()]);
    assert_eq!(found.answers[2].timestamp_ms, now + 50);

    let delete = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset: 2 };
    let Response::DeleteRecords(deleted) = client.call(Request::DeleteRecords(delete)).await else { panic!("refused") };
    assert_eq!(deleted.log_start_offset, 2);
    let beyond = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset: 9 };
    assert_eq!(refusal(&client, Request::DeleteRecords(beyond)).await.0, ErrorCode::OffsetOutOfRange);
    stop(broker).await;
}

/// A lookup by time may have to unpack a whole batch. As prompt work of the I/O pool, a client that asked for many of them
/// stood in front of everybody's commits, on every thread.
#[tokio::test]
async fn lookups_in_large_batches_leave_threads_for_commits() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["num.io.threads=2"]).await;
    let client = Client::connect(&broker).await;
    let large = client.create_topic("large", 1, &[]).await;
    let small = client.create_topic("small", 1, &[("durability", "replicated")]).await;
    let value = vec![0u8; 1 << 20];
    let options = BuildOptions { codec: Codec::Zstd, ..BuildOptions::default() };
    let (mut packed, _) = client.produce(open_produce(&large, 0)).await;
    let mut builder = BatchBuilder::new(options);
    (0..48).for_each(|n| _ = builder.append(1_700_000_000_000 + n, None, Some(&value), &[]));
    packed.request(&builder.build().unwrap()).await;
    assert_eq!(packed.answer().await.error, None);

    let last = wire::offset_query::At::TimestampMs(1_700_000_000_047);
    let query = wire::OffsetQuery { topic: "large".into(), partition: 0, at: Some(last) };
    let queries = vec![query; 48];
    let asking = Client::connect(&broker).await;
    let (mut produce, _) = client.produce(open_produce(&small, 0)).await;
    let commits = async {
        for _ in 0..48 {
            produce.request(&batch(&[b"x"])).await;
            assert_eq!(produce.answer().await.error, None);
        }
    };
    tokio::select! {
        Response::ListOffsets(found) = asking.call(Request::ListOffsets(wire::ListOffsets { queries })) => {
            assert!(found.answers.iter().all(|answer| answer.offset == 47), "{found:?}");
            panic!("the commits waited for the lookups");
        }
        () = commits => {}
    }
    stop(broker).await;
}

#[tokio::test]
async fn partitions_move_between_members_and_commits_of_the_old_owner_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let id = client.create_topic("t", 4, &[]).await;
    for partition in 0..4 {
        produce(&client, &id, partition, &[(1, "x"), (2, "y")]).await;
    }
    let mut x = Member::join(&client, "g", "x", &["t"]).await;
    assert_eq!(x.take().await.len(), 4);
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", 3, 2)]).await, Ok(vec![0]));

    let mut y = Member::join(&client, "g", "y", &["t"]).await;
    assert_eq!(y.take().await, []);
    let kept = x.take().await;
    assert_eq!(kept.len(), 2);
    let got = y.take_until(|partitions| !partitions.is_empty()).await;
    let all: BTreeSet<_> = kept.iter().chain(&got).collect();
    assert_eq!((got.len(), all.len()), (2, 4));

    // x has not heard of its new epoch, and what it says in its old one does not count.
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", 3, 1)]).await, Err(ErrorCode::StaleMemberEpoch));
    x.take().await;
    let results = commit(&client, "g", Some(&x), vec![entry("t", 0, 1), entry("t", 9, 1), entry("u", 0, 1)]).await;
    assert_eq!(
        results,
        Ok(vec![0, ErrorCode::UnknownPartition.number(), ErrorCode::UnknownTopic.number()]),
        "each entry stands alone"
    );
    assert_eq!(commit(&client, "g", None, vec![entry("t", 0, 0)]).await, Err(ErrorCode::GroupNotEmpty));

    let described = describe_group(&client, "g").await.expect("there");
    assert_eq!((described.state.as_str(), described.members.len()), ("stable", 2));
    let lag: Vec<(u32, i64, i64)> = described.offsets.iter().map(|o| (o.partition, o.committed, o.lag)).collect();
    assert_eq!(lag, [(0, 1, 1), (1, -1, 2), (2, -1, 2), (3, 2, 0)]);
    assert!(!described.members[0].client_host.is_empty());

    y.leave(false).await;
    assert_eq!(x.take_until(|partitions| partitions.len() == 4).await.len(), 4);
    assert_eq!(commit(&client, "g", Some(&y), vec![entry("t", 0, 1)]).await, Err(ErrorCode::UnknownMember));
    x.leave(false).await;
    assert_eq!(commit(&client, "g", None, vec![entry("t", 0, 0)]).await, Ok(vec![0]), "nobody is left");
    stop(broker).await;
}

#[tokio::test]
async fn groups_survive_a_restart_and_old_members_go_on_or_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    client.create_topic("t", 2, &[]).await;
    let mut x = Member::join(&client, "g", "x", &["t"]).await;
    x.take_until(|partitions| partitions.len() == 2).await;
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", 0, 5), entry("t", 1, 6)]).await, Ok(vec![0, 0]));

    let broker = crash_and_start(broker, dir.path()).await;
    let client = Client::connect(&broker).await;
    assert_eq!(committed(&client, "g").await, [("t".into(), 0, 5), ("t".into(), 1, 6)]);
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", 0, 7)]).await, Ok(vec![0]), "its epoch is known");
    let stranger = Member { id: "z".into(), ..x };
    assert_eq!(commit(&client, "g", Some(&stranger), vec![entry("t", 0, 8)]).await, Err(ErrorCode::UnknownMember));

    let again = wire::OpenMember {
        member_epoch: stranger.epoch,
        owned: stranger.owned.clone(),
        ..open_member("g", "x", &["t"])
    };
    let mut x = Member::open(&client, again.clone()).await;
    assert_eq!(x.take().await.len(), 2, "it goes on with what it had");
    let mut ahead = Member::open(&client, wire::OpenMember { member_epoch: 99, ..again.clone() }).await;
    assert_eq!(ahead.error().await.0, ErrorCode::FencedMemberEpoch);
    let mut unknown = Member::open(&client, wire::OpenMember { member_id: "w".into(), ..again }).await;
    assert_eq!(unknown.error().await.0, ErrorCode::UnknownMember);
    stop(broker).await;
}

#[tokio::test]
async fn a_silent_member_is_out_and_a_killed_static_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["group.consumer.heartbeat.interval.ms=200"]).await;
    let client = Client::connect(&broker).await;
    client.create_topic("t", 2, &[]).await;
    let open = |id: &str, instance: &str, session| wire::OpenMember {
        instance_id: instance.into(),
        session_timeout_ms: session,
        ..open_member("g", id, &["t"])
    };
    let mut silent = Member::open(&client, open("silent", "", 1_000)).await;
    silent.take_until(|partitions| partitions.len() == 2).await;
    let (code, why) = silent.error().await;
    assert_eq!(code, ErrorCode::FencedMemberEpoch);
    assert!(why.contains("session timeout"), "{why}");
    assert_eq!(silent.hear().await, None, "the stream ends");
    let late = commit(&client, "g", Some(&silent), vec![entry("t", 0, 1)]).await;
    assert_eq!((late, committed(&client, "g").await), (Err(ErrorCode::UnknownMember), Vec::new()));

    let mut first = Member::open(&client, open("first", "i", 60_000)).await;
    let had = first.take_until(|partitions| partitions.len() == 2).await;
    let epoch = first.epoch;
    // It is not heard from again, and its connection is still open: as if its process had been killed.
    let mut second = Member::open(&client, open("second", "i", 60_000)).await;
    assert_eq!(second.take().await, had, "the instance gets what it had");
    assert_eq!(second.epoch, epoch, "for nobody else anything changed");
    let (code, why) = first.error().await;
    assert_eq!(code, ErrorCode::FencedInstanceId, "{why}");
    // Its epoch is the one that counts, and yet it is not the member that it was.
    let late = commit(&client, "g", Some(&first), vec![entry("t", 0, 1)]).await;
    assert_eq!((late, committed(&client, "g").await), (Err(ErrorCode::UnknownMember), Vec::new()));
    assert_eq!(commit(&client, "g", Some(&second), vec![entry("t", 0, 2)]).await, Ok(vec![0]));

    // While the holder reports, another one is refused.
    let mut third = Member::open(&client, open("third", "i", 60_000)).await;
    let refused = loop {
        tokio::select! {
            biased;
            (code, why) = third.error() => break (code, why),
            () = tokio::time::sleep(Duration::from_millis(50)) => second.report().await,
        }
    };
    assert_eq!(refused.0, ErrorCode::UnreleasedInstanceId, "{}", refused.1);

    second.leave(true).await;
    let mut fourth = Member::open(&client, open("fourth", "i", 60_000)).await;
    assert_eq!(fourth.take().await, had);
    stop(broker).await;
}

#[tokio::test]
async fn deleting_topics_and_groups_removes_offsets_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    for topic in ["t", "u"] {
        client.create_topic(topic, 2, &[]).await;
    }
    let offsets = || vec![entry("t", 0, 1), entry("t", 1, 2), entry("u", 0, 3)];
    for group in ["g", "h", "k"] {
        assert_eq!(commit(&client, group, None, offsets()).await, Ok(vec![0, 0, 0]));
    }
    let delete = |group: &str| Request::DeleteGroup(wire::DeleteGroup { group: group.into() });
    accepted(&client, delete("h")).await;
    assert_eq!(refusal(&client, delete("h")).await.0, ErrorCode::GroupNotFound);
    assert_eq!(describe_group(&client, "h").await.map(|_| ()), Err(ErrorCode::GroupNotFound));
    let delete_offsets = wire::DeleteOffsets { group: "k".into(), topic: "t".into(), partitions: vec![1] };
    accepted(&client, Request::DeleteOffsets(delete_offsets)).await;
    accepted(&client, Request::DeleteTopic(wire::DeleteTopic { name: "u".into() })).await;
    client.create_topic("u", 2, &[]).await;
    let expect_all = async |client: &Client| {
        assert_eq!(committed(client, "g").await, [("t".into(), 0, 1), ("t".into(), 1, 2)]);
        assert_eq!(committed(client, "h").await, []);
        assert_eq!(committed(client, "k").await, [("t".into(), 0, 1)]);
        let Response::ListGroups(listed) = client.call(Request::ListGroups(wire::ListGroups::default())).await else {
            panic!("no list");
        };
        let names: Vec<&str> = listed.groups.iter().map(|group| group.group.as_str()).collect();
        assert_eq!(names, ["g", "k"]);
    };
    expect_all(&client).await;
    let broker = crash_and_start(broker, dir.path()).await;
    expect_all(&Client::connect(&broker).await).await;
    stop(broker).await;
}

#[tokio::test]
async fn ten_members_join_at_once_and_share_evenly_and_new_partitions_are_assigned() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    client.create_topic("t", 25, &[]).await;
    let mut members = Vec::new();
    for n in 0..10 {
        members.push(Member::join(&client, "g", &format!("m{n}"), &["t", "later"]).await);
    }
    let settle = async |members: &mut Vec<Member>, total: usize| {
        let (least, most) = (total / members.len(), total.div_ceil(members.len()));
        loop {
            let owned: BTreeSet<(String, u32)> = members.iter().flat_map(Member::partitions).collect();
            let count: usize = members.iter().map(|member| member.partitions().len()).sum();
            assert_eq!(owned.len(), count, "a partition has two owners");
            if count == total && members.iter().all(|m| (least..=most).contains(&m.partitions().len())) {
                return;
            }
            let hear = members.iter_mut().map(|member| Box::pin(member.take()));
            drop(within("an update", futures::future::select_all(hear)).await);
        }
    };
    settle(&mut members, 25).await;
    accepted(&client, Request::AddPartitions(wire::AddPartitions { name: "t".into(), partitions: 30 })).await;
    settle(&mut members, 30).await;
    client.create_topic("later", 10, &[]).await;
    settle(&mut members, 40).await;
    accepted(&client, Request::DeleteTopic(wire::DeleteTopic { name: "t".into() })).await;
    settle(&mut members, 10).await;
    stop(broker).await;
}

#[tokio::test]
async fn nobody_but_the_broker_writes_to_the_offsets_topic() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let described = describe(&client, "__consumer_offsets").await;
    assert_eq!((described.internal, described.partitions.len()), (true, 16));
    let (_, opened) = client.produce(open_produce(&described.topic_id, 0)).await;
    assert_eq!(opened.error.map(|error| error.code), Some(ErrorCode::InvalidTopic.number()));
    let name = || "__consumer_offsets".to_owned();
    let config = vec![change("cleanup.policy", Some("delete"))];
    for request in [
        Request::DeleteTopic(wire::DeleteTopic { name: name() }),
        Request::AlterTopic(wire::AlterTopic { name: name(), config, validate_only: false }),
        Request::DeleteRecords(wire::DeleteRecords { topic: name(), partition: 0, before_offset: -1 }),
        Request::CreateTopic(wire::CreateTopic { name: name(), ..Default::default() }),
    ] {
        let (code, why) = refusal(&client, request).await;
        assert_eq!(code, ErrorCode::InvalidTopic, "{why}");
    }
    stop(broker).await;
}

#[tokio::test]
async fn membership_streams_that_make_no_sense_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let cases = [
        (wire::OpenMember { group: String::new(), ..open_member("g", "x", &[]) }, ErrorCode::InvalidGroup),
        (open_member("g", "", &[]), ErrorCode::InvalidRequest),
        (wire::OpenMember { assignor: "sticky".into(), ..open_member("g", "x", &[]) }, ErrorCode::UnsupportedAssignor),
        (wire::OpenMember { session_timeout_ms: 1, ..open_member("g", "x", &[]) }, ErrorCode::InvalidRequest),
        (wire::OpenMember { member_epoch: 4, ..open_member("g", "x", &[]) }, ErrorCode::UnknownMember),
    ];
    for (open, expected) in cases {
        let mut member = Member::open(&client, open).await;
        let (code, why) = member.error().await;
        assert_eq!(code, expected, "{why}");
        assert_eq!(member.hear().await, None);
    }
    assert_eq!(describe_group(&client, "g").await.map(|_| ()), Err(ErrorCode::GroupNotFound));
    stop(broker).await;
}

#[tokio::test]
async fn commits_on_a_full_disk_are_refused_and_count_again_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimFiles::with_open_limit(11, 1000);
    let config = || {
        let mut config = harness::config(dir.path());
        config.set_pair("offsets.topic.num.partitions=2").unwrap();
        config
    };
    let broker = within("start", Broker::start_on(config(), disk.clone())).await.unwrap();
    let client = Client::connect(&broker).await;
    client.create_topic("t", 3, &[]).await;
    let mut member = Member::join(&client, "g", "m", &["t"]).await;
    member.take_until(|partitions| partitions.len() == 3).await;
    disk.set_capacity(Some(disk.used_bytes()));
    let long = |partition, offset| wire::OffsetEntry { metadata: "x".repeat(4096), ..entry("t", partition, offset) };
    let mut kept = 0;
    let refused = loop {
        match commit(&client, "g", Some(&member), vec![long(0, kept + 1)]).await {
            Ok(results) => assert_eq!(results, [0]),
            Err(code) => break code,
        }
        kept += 1;
    };
    assert_eq!(refused, ErrorCode::DiskFull);
    assert!(refused.retryable() && kept > 0);
    // What was refused is not seen; members open their streams again and go on with what they have.
    let (code, why) = member.error().await;
    assert_eq!(code, ErrorCode::DiskFull, "{why}");
    let seen = async |client: &Client| loop {
        let fetch = wire::FetchOffsets { group: "g".into(), ..Default::default() };
        match client.call(Request::FetchOffsets(fetch)).await {
            Response::FetchOffsets(found) => break found.offsets.into_iter().map(|o| o.offset).collect::<Vec<_>>(),
            // The groups are being read.
            Response::Error(error) => assert!(error.retryable, "{error:?}"),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(within("the offsets", seen(&client)).await, [kept]);
    let again =
        wire::OpenMember { member_epoch: member.epoch, owned: member.owned.clone(), ..open_member("g", "m", &["t"]) };
    let mut member = Member::open(&client, again).await;
    assert_eq!(member.take().await.len(), 3);
    disk.set_capacity(None);
    assert_eq!(commit(&client, "g", Some(&member), vec![long(0, kept + 9)]).await, Ok(vec![0]));
    stop(broker).await;

    let broker = within("start", Broker::start_on(config(), disk.restart())).await.unwrap();
    let client = Client::connect(&broker).await;
    assert_eq!(within("the offsets", seen(&client)).await, [kept + 9]);
    stop(broker).await;
}

/// Imports what Kafka wrote into a new folder.
fn import_into(data: &Path) -> import::ImportReport {
    let files: Arc<dyn Files> = Arc::new(OsFiles::new());
    let options = ImportOptions {
        source: Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs/dirs"),
        data_dir: data.to_owned(),
        identity: NewIdentity { cluster_id: "imported".into(), broker_id: 1, directory_id: "directory".into() },
        topics: Vec::new(),
        config: BTreeMap::new(),
    };
    import(&files, &options, &|_| ()).expect("imported")
}

/// Kafka gave out these ids and epochs: that the log holds them says so.
#[tokio::test]
async fn producers_of_an_imported_log_go_on_under_their_epochs() {
    let dir = tempfile::tempdir().unwrap();
    import_into(dir.path());
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    for (topic, producer_id, producer_epoch, base_sequence) in [("txn", 2, 5, 0), ("epochs", 1000, 0, 4)] {
        let topic = describe(&client, topic).await.topic_id;
        let open = |producer_epoch| wire::OpenProduce { producer_id, producer_epoch, ..open_produce(&topic, 0) };
        let (_, opened) = client.produce(open(i32::from(producer_epoch) + 1)).await;
        assert_eq!(ErrorCode::from_number(opened.error.expect("refused").code), ErrorCode::InvalidProducerEpoch);
        let (mut produce, opened) = client.produce(open(producer_epoch.into())).await;
        assert_eq!((opened.error, opened.last_producer_epoch), (None, producer_epoch.into()));
        let options = BuildOptions { producer_id, producer_epoch, base_sequence, ..BuildOptions::default() };
        produce.request(&batch_with(options, &[b"more"])).await;
        assert_eq!(produce.answer().await.error, None);
    }
    stop(broker).await;
}

#[tokio::test]
async fn an_import_becomes_topics_offsets_and_producer_ids_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let report = import_into(&data);
    let manifest = data.join(import::FILE_NAME);
    let left = std::fs::read(&manifest).expect("left for the broker");

    let mut broker = start(&data).await;
    let mut epochs = Vec::new();
    for round in 0..3i64 {
        assert!(!manifest.exists(), "taken over");
        let client = Client::connect(&broker).await;
        for topic in &report.topics {
            let described = describe(&client, &topic.name).await;
            assert_eq!(described.partitions[0].log_end_offset, topic.log_end_offsets[0], "{}", topic.name);
            let config = described.config.iter().find(|entry| entry.name == "retention.ms").expect("shown");
            assert_eq!((config.value.as_str(), config.source.as_str()), ("-1", "topic"));
        }
        epochs.push(describe(&client, "epochs").await.partitions[0].leader_epoch);
        // What the group commits here is better than what Kafka knew.
        assert_eq!(committed(&client, "billing").await, [("codecs".into(), 0, 7 + round), ("shapes".into(), 0, 380)]);
        assert_eq!(committed(&client, "search").await, [("codecs".into(), 0, 7), ("shapes".into(), 0, 380)]);
        assert_eq!(commit(&client, "billing", None, vec![entry("codecs", 0, 8 + round)]).await, Ok(vec![0]));
        let Response::AllocateProducerId(id) =
            client.call(Request::AllocateProducerId(wire::AllocateProducerId::default())).await
        else {
            panic!("no id");
        };
        assert!(id.producer_id >= report.producer_ids_from);
        stop(broker).await;
        if round == 0 {
            // As if the broker had been stopped just before it removed the manifest.
            std::fs::write(&manifest, &left).expect("written");
        }
        broker = start(&data).await;
    }
    assert!(epochs.is_sorted() && epochs.first() < epochs.last(), "{epochs:?}");
    stop(broker).await;
}
