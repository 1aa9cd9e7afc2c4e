//! Names that were used before: a topic that is deleted and made anew has the partition numbers, the folder names and the
//! lines in the checkpoints of the one before, and inherits nothing of it.
//!
//! The checkpoints are Kafka's and name a partition by its topic's name. Once they were read at the start, and said of a
//! new topic what had been true of the old: that it was flushed up to an offset which it never had (so that it was
//! fenced), that it began where the old one began (so that the next recovery deleted what lay before, acknowledged or
//! not), that it was clean (so that it was never compacted). And a folder whose deletion was cut short kept the name for
//! itself.

mod harness;

use harness::*;
use headwater_broker::Broker;
use headwater_proto::batch::{BatchBuilder, BuildOptions};
use headwater_proto::wire::{self, call, call_response};
use headwater_storage::checkpoint::{
    CLEANER_OFFSETS, HIGH_WATERMARKS, LOG_START_OFFSETS, RECOVERY_POINTS, parse_partition_dir_name, read_offsets,
};
use headwater_storage::sim::{Fault, Operation, SimFiles};
use headwater_storage::{Files, OsFiles};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

async fn start_on(dir: &Path, files: &Arc<SimFiles>) -> Broker {
    let files = Arc::clone(files);
    within("start", Broker::start_on(config(dir), files)).await.unwrap()
}

async fn delete_topic(client: &Client, name: &str) {
    let answer = client.call(call::Request::DeleteTopic(wire::DeleteTopic { name: name.into() })).await;
    assert!(!matches!(answer, call_response::Response::Error(_)), "{answer:?}");
}

async fn delete_all_records(client: &Client, topic: &str) {
    let delete = wire::DeleteRecords { topic: topic.into(), partition: 0, before_offset: -1 };
    let answer = client.call(call::Request::DeleteRecords(delete)).await;
    assert!(matches!(answer, call_response::Response::DeleteRecords(_)), "{answer:?}");
}

/// Appends so many batches of one record, each acknowledged; they get the offsets from `first` on.
async fn fill(client: &Client, topic: &bytes::Bytes, first: i64, count: i64) {
    let (mut produce, opened) = client.produce(open_produce(topic, 0)).await;
    assert_eq!(opened.error, None);
    for n in 0..count {
        let mut builder = BatchBuilder::new(BuildOptions::default());
        builder.append(1_700_000_000_000, Some(format!("key {}", n % 3).as_bytes()), Some(&[b'x'; 100]), &[]);
        produce.request(&builder.build().unwrap()).await;
        let answer = produce.answer().await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.batches[0].base_offset, first + n);
    }
}

async fn count_to(client: &Client, topic: &bytes::Bytes, end: i64) -> usize {
    let (mut fetch, opened) = client.fetch(open_fetch(topic, 0, 0)).await;
    assert_eq!(opened.error, None);
    fetch.read_to(end).await.len()
}

/// What a checkpoint says of the partition `name`-0.
fn said(files: &dyn Files, dir: &Path, checkpoint: &str, name: &str) -> Option<i64> {
    read_offsets(files, dir, checkpoint).unwrap().get(&(name.to_owned(), 0)).copied()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    within(what, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_topic_made_anew_begins_at_offset_zero_and_is_served() {
    let dir = tempfile::tempdir().unwrap();
    for emptied in [false, true] {
        let broker = start(dir.path()).await;
        let client = Client::connect(&broker).await;
        let topic = client.create_topic("a", 1, &[]).await;
        fill(&client, &topic, 0, 20).await;
        if emptied {
            delete_all_records(&client, "a").await;
        }
        assert!(broker.shutdown().await);

        // This broker has read at its start how far the old log reached and where it began.
        let broker = start(dir.path()).await;
        let client = Client::connect(&broker).await;
        delete_topic(&client, "a").await;
        let files = OsFiles::with_open_limit(4);
        for checkpoint in [RECOVERY_POINTS, LOG_START_OFFSETS, HIGH_WATERMARKS, CLEANER_OFFSETS] {
            assert_eq!(said(&files, dir.path(), checkpoint, "a"), None, "{checkpoint}");
        }
        let topic = client.create_topic("a", 1, &[]).await;
        fill(&client, &topic, 0, 5).await;
        assert_eq!(count_to(&client, &topic, 5).await, 5);
        delete_topic(&client, "a").await;
        assert!(broker.shutdown().await);
    }
}

#[tokio::test]
async fn recovery_does_not_cut_a_topic_to_where_its_namesake_began() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let broker = start_on(dir.path(), &files).await;
    let client = Client::connect(&broker).await;
    let old = client.create_topic("a", 1, &[]).await;
    fill(&client, &old, 0, 50).await;
    delete_all_records(&client, "a").await;
    until("the checkpoint", || said(&*files, dir.path(), LOG_START_OFFSETS, "a") == Some(50)).await;
    delete_topic(&client, "a").await;
    // From here on no checkpoint is written any more: the power fails before the next.
    files.fail(Fault::new(Operation::Open).on("offset-checkpoint.tmp"));
    let new = client.create_topic("a", 1, &[]).await;
    fill(&client, &new, 0, 10).await;

    let files = files.crash();
    drop(broker);
    let broker = start_on(dir.path(), &files).await;
    let client = Client::connect(&broker).await;
    assert_eq!(count_to(&client, &new, 10).await, 10, "all of it was acknowledged");
    broker.shutdown().await;
}

#[tokio::test]
async fn a_compacted_topic_made_anew_is_compacted_from_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["log.cleaner.backoff.ms=20"]).await;
    let client = Client::connect(&broker).await;
    let config = [("cleanup.policy", "compact"), ("segment.bytes", "4096"), ("min.cleanable.dirty.ratio", "0.01")];
    let files = OsFiles::with_open_limit(4);
    for _ in 0..2 {
        let topic = client.create_topic("t", 1, &config).await;
        fill(&client, &topic, 0, 150).await;
        within("compaction", async {
            while count_to(&client, &topic, 150).await >= 60 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        until("the checkpoint", || said(&files, dir.path(), CLEANER_OFFSETS, "t").is_some()).await;
        delete_topic(&client, "t").await;
        assert_eq!(said(&files, dir.path(), CLEANER_OFFSETS, "t"), None);
    }
    broker.shutdown().await;
}

fn strays(files: &dyn Files, dir: &Path, name: &str) -> usize {
    let entries = files.list(dir).unwrap();
    let is_stray = |entry: &str| entry.starts_with(&format!("{name}-0.")) && entry.ends_with("-stray");
    entries.iter().filter(|entry| is_stray(&entry.name) && parse_partition_dir_name(&entry.name).is_none()).count()
}

#[tokio::test]
async fn a_deletion_cut_short_leaves_the_name_free() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(2);
    let broker = start_on(dir.path(), &files).await;
    let client = Client::connect(&broker).await;
    for name in ["now", "later"] {
        let topic = client.create_topic(name, 1, &[]).await;
        fill(&client, &topic, 0, 5).await;
        files.fail(Fault::new(Operation::Rename).on(format!("{name}-0")));
        // The deletion is journaled; then its folder cannot be renamed, or the process ends before it is.
        delete_topic(&client, name).await;
        assert!(files.list(dir.path()).unwrap().iter().any(|entry| entry.name == format!("{name}-0")));
        files.heal();
    }
    let now = client.create_topic("now", 1, &[]).await;
    fill(&client, &now, 0, 3).await;
    assert_eq!(strays(&*files, dir.path(), "now"), 1);

    let files = files.crash();
    drop(broker);
    let broker = start_on(dir.path(), &files).await;
    assert_eq!((strays(&*files, dir.path(), "now"), strays(&*files, dir.path(), "later")), (1, 1));
    let client = Client::connect(&broker).await;
    assert_eq!(count_to(&client, &now, 3).await, 3);
    let later = client.create_topic("later", 1, &[]).await;
    fill(&client, &later, 0, 3).await;
    assert!(broker.shutdown().await);
    // Strays neither come back nor go away by themselves.
    let files = files.restart();
    let broker = start_on(dir.path(), &files).await;
    assert_eq!((strays(&*files, dir.path(), "now"), strays(&*files, dir.path(), "later")), (1, 1));
    broker.shutdown().await;
}
