//! What a running broker does by itself in time: retention, rolling, compaction, expiry.

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_broker::Broker;
use headwater_proto::batch::{BatchBuilder, BuildOptions};
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use std::path::Path;
use std::time::Duration;

/// Everything that comes round does so at once.
const OFTEN: [&str; 3] =
    ["log.retention.check.interval.ms=20", "log.cleaner.backoff.ms=20", "offsets.retention.check.interval.ms=20"];

async fn describe(client: &Client, topic: &str) -> wire::PartitionDescription {
    match client.call(Request::DescribeTopic(wire::DescribeTopic { name: topic.into(), stale: false })).await {
        Response::DescribeTopic(described) => described.partitions[0].clone(),
        other => panic!("{other:?}"),
    }
}

/// Asks until the partition is as it should be.
async fn until(
    client: &Client,
    topic: &str,
    what: &str,
    wanted: impl Fn(&wire::PartitionDescription) -> bool,
) -> wire::PartitionDescription {
    within(what, async {
        loop {
            let described = describe(client, topic).await;
            if wanted(&described) {
                return described;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

/// Appends records of a kilobyte, a batch each.
async fn fill(client: &Client, topic: &Bytes, records: i64) {
    let (mut produce, _) = client.produce(open_produce(topic, 0)).await;
    for n in 0..records {
        let mut builder = BatchBuilder::new(BuildOptions::default());
        builder.append(1_700_000_000_000, Some(format!("key {}", n % 3).as_bytes()), Some(&[b'x'; 1000]), &[]);
        produce.request(&builder.build().unwrap()).await;
        assert_eq!(produce.answer().await.error, None);
    }
}

async fn offsets_from(client: &Client, topic: &Bytes, from: i64, end: i64) -> Vec<i64> {
    let (mut fetch, opened) = client.fetch(open_fetch(topic, 0, from)).await;
    assert_eq!(opened.error, None);
    fetch.read_to(end).await.into_iter().map(|(offset, _)| offset).collect()
}

fn segments(dir: &Path, partition: &str) -> Vec<String> {
    let names = std::fs::read_dir(dir.join(partition)).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.retain(|name| name.ends_with(".log"));
    names.sort();
    names
}

#[tokio::test]
async fn retention_by_size_keeps_what_it_promises_and_no_whole_segment_more() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &OFTEN).await;
    let client = Client::connect(&broker).await;
    let config = [("segment.bytes", "4096"), ("retention.bytes", "10000")];
    let (bounded, all) =
        (client.create_topic("bounded", 1, &config).await, client.create_topic("all", 1, &config[..1]).await);
    fill(&client, &all, 40).await;
    fill(&client, &bounded, 40).await;
    // Three records fill a segment; ten are the fewest whole segments that hold so many bytes.
    let kept = until(&client, "bounded", "old segments to go", |now| now.log_start_offset == 30).await;
    assert!((10_000..10_000 + 4096).contains(&kept.size_bytes), "{kept:?}");
    assert_eq!(offsets_from(&client, &bounded, 30, 40).await, (30..40).collect::<Vec<_>>());
    assert_eq!(segments(dir.path(), "bounded-0").len(), 4);
    assert_eq!(offsets_from(&client, &all, 0, 40).await.len(), 40, "without a bound nothing goes");
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn retention_by_time_ends_with_an_empty_log_whose_offsets_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &OFTEN).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("segment.bytes", "4096"), ("retention.ms", "300")]).await;
    let kept = client.create_topic("kept", 1, &[("segment.bytes", "4096")]).await;
    fill(&client, &kept, 10).await;
    fill(&client, &topic, 10).await;
    let gone = until(&client, "t", "everything to go", |now| now.log_start_offset == 10).await;
    assert_eq!((gone.high_watermark, gone.size_bytes), (10, 0));
    assert_eq!(describe(&client, "kept").await.log_start_offset, 0, "its records are as old, and its time is a week");
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"x"])).await;
    assert_eq!(produce.answer().await.batches[0].base_offset, 10);
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn a_segment_rolls_when_its_time_is_up_although_nobody_writes() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &OFTEN).await;
    let client = Client::connect(&broker).await;
    let (quick, slow) =
        (client.create_topic("quick", 1, &[("segment.ms", "100")]).await, client.create_topic("slow", 1, &[]).await);
    fill(&client, &slow, 2).await;
    fill(&client, &quick, 2).await;
    within("a second segment", async {
        while segments(dir.path(), "quick-0").last().map(String::as_str) != Some("00000000000000000002.log") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(segments(dir.path(), "slow-0"), ["00000000000000000000.log"]);
    assert_eq!(offsets_from(&client, &quick, 0, 2).await, [0, 1]);
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn a_topic_that_is_compacted_and_deleted_loses_old_values_and_old_segments() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &OFTEN).await;
    let client = Client::connect(&broker).await;
    let config = [
        ("cleanup.policy", "compact,delete"),
        ("segment.bytes", "4096"),
        ("min.cleanable.dirty.ratio", "0.01"),
        ("retention.ms", "-1"),
    ];
    let topic = client.create_topic("t", 1, &config).await;
    fill(&client, &topic, 60).await;
    // Three keys: of the sealed segments three records and the last offset stay.
    let compacted = until(&client, "t", "old values to go", |now| now.size_bytes < 12_000).await;
    let left = offsets_from(&client, &topic, compacted.log_start_offset, 60).await;
    assert!(left.len() < 12 && left.ends_with(&[58, 59]), "{left:?}");
    // Not before: a busy machine may take longer to compact than any time that a test would wait for retention.
    let config = vec![wire::ConfigChange { name: "retention.ms".into(), value: Some("100".into()) }];
    let alter = wire::AlterTopic { name: "t".into(), config, validate_only: false };
    let altered = client.call(Request::AlterTopic(alter)).await;
    assert!(!matches!(altered, Response::Error(_)), "{altered:?}");
    let gone = until(&client, "t", "old segments to go", |now| now.log_start_offset == 60).await;
    assert_eq!((gone.high_watermark, gone.size_bytes), (60, 0));
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn a_producer_that_writes_nothing_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &[OFTEN[0], "producer.id.expiration.ms=1000"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let producer_id = client.allocate_producer_id().await;
    let open = wire::OpenProduce { producer_id, producer_epoch: 0, ..open_produce(&topic, 0) };
    let (mut produce, _) = client.produce(open.clone()).await;
    let options = BuildOptions { producer_id, producer_epoch: 0, base_sequence: 0, ..BuildOptions::default() };
    produce.request(&batch_with(options, &[b"x"])).await;
    assert_eq!(produce.answer().await.error, None);
    assert_eq!(client.produce(open.clone()).await.1.last_sequence, 0);
    within("the producer to be forgotten", async {
        while client.produce(open.clone()).await.1.last_sequence != -1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(broker.shutdown().await);
}

async fn commit(client: &Client, group: &str, offset: i64) {
    let entry = wire::OffsetEntry { topic: "t".into(), partition: 0, offset, ..Default::default() };
    let commit = wire::CommitOffsets { group: group.into(), offsets: vec![entry], ..Default::default() };
    let answer = client.call(Request::CommitOffsets(commit)).await;
    assert!(matches!(answer, Response::CommitOffsets(_)), "{answer:?}");
}

async fn committed(client: &Client, group: &str) -> Option<i64> {
    let fetch = wire::FetchOffsets { group: group.into(), ..Default::default() };
    match client.call(Request::FetchOffsets(fetch)).await {
        Response::FetchOffsets(fetched) => fetched.offsets.first().map(|offset| offset.offset),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_offsets_topic_is_compacted_and_groups_are_read_back_from_what_is_left() {
    const OFFSETS: &str = "__consumer_offsets";
    let dir = tempfile::tempdir().unwrap();
    let settings = [
        OFTEN[0],
        OFTEN[1],
        "offsets.topic.num.partitions=1",
        "log.roll.ms=50",
        "log.cleaner.min.cleanable.ratio=0.01",
    ];
    let broker = start_with(dir.path(), &settings).await;
    let client = Client::connect(&broker).await;
    client.create_topic("t", 1, &[]).await;
    commit(&client, "gone", 7).await;
    for offset in 0..300 {
        commit(&client, "moves", offset).await;
    }
    commit(&client, "stays", 5).await;
    let before = describe(&client, OFFSETS).await;
    let delete = wire::DeleteGroup { group: "gone".into() };
    assert!(matches!(client.call(Request::DeleteGroup(delete)).await, Response::Done(_)));
    let after = until(&client, OFFSETS, "old commits to go", |now| now.size_bytes < 3000).await;
    assert!(before.log_end_offset > 300 && after.log_end_offset >= before.log_end_offset, "{before:?} {after:?}");
    assert!(broker.shutdown().await);

    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    assert_eq!(committed(&client, "moves").await, Some(299));
    assert_eq!((committed(&client, "stays").await, committed(&client, "gone").await), (Some(5), None));
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn offsets_of_a_group_without_members_expire_by_the_brokers_own_timer() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    OFTEN.iter().for_each(|pair| config.set_pair(pair).unwrap());
    let config_of_a_week = config.clone();
    // Less than a setting can say.
    config.groups.offsets_retention_minutes = 0;
    let broker = within("start", Broker::start(config)).await.unwrap();
    let client = Client::connect(&broker).await;
    client.create_topic("t", 1, &[]).await;
    commit(&client, "g", 3).await;
    within("the offsets to expire", async {
        while committed(&client, "g").await.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(broker.shutdown().await);

    let broker = within("start", Broker::start(config_of_a_week)).await.unwrap();
    let client = Client::connect(&broker).await;
    assert_eq!(committed(&client, "g").await, None, "it was written down");
    assert!(broker.shutdown().await);
}
