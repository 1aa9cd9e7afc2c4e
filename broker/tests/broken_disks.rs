//! Disks that fill up, fail and lose power under a running broker.

mod harness;

use harness::*;
use headwater_broker::{Broker, runtime};
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BuildOptions, Codec};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, Acks, Durability};
use headwater_storage::checkpoint::CLEAN_SHUTDOWN;
use headwater_storage::sim::{Fault, Held, Operation, SimFiles};
use headwater_storage::{DataDir, DataDirError, Files, NewIdentity};
use std::path::Path;
use std::sync::{Arc, mpsc};

fn code(error: Option<&wire::Error>) -> ErrorCode {
    ErrorCode::from_number(error.expect("an error").code)
}

/// Whether the next start would believe that every log is whole.
fn is_marked_clean(files: &Arc<SimFiles>, data: &Path) -> bool {
    files.list(data).unwrap().iter().any(|entry| entry.name == CLEAN_SHUTDOWN)
}

#[tokio::test]
async fn a_failed_flush_fences_its_partition_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let sick = client.create_topic("sick", 1, &[]).await;
    let well = client.create_topic("well", 1, &[]).await;
    assert_eq!(produced(&client, &sick, b"kept").await.error, None);
    let (mut reader, _) = client.fetch(open_fetch(&sick, 0, 1)).await;
    files.fail(Fault::new(Operation::Sync).on("sick-0"));
    let refused = produced(&client, &sick, b"lost").await.error.unwrap();
    assert_eq!((code(Some(&refused)), refused.retryable), (ErrorCode::PartitionFenced, false));
    let (last, _) = reader.data().await;
    assert_eq!(code(last.error.as_ref()), ErrorCode::PartitionFenced);
    assert_eq!(last.high_watermark, 1, "what was not flushed is never shown");
    // The disk may be well again: the log is not trusted before it was recovered.
    files.heal();
    assert_eq!(code(produced(&client, &sick, b"x").await.error.as_ref()), ErrorCode::PartitionFenced);
    assert_eq!(produced(&client, &well, b"x").await.durability(), Durability::Flushed);
    assert!(!broker.shutdown().await, "no clean marker with a fenced partition");
    assert!(!is_marked_clean(&files, dir.path()));

    let files = files.restart();
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let (mut reader, opened) = client.fetch(open_fetch(&sick, 0, 0)).await;
    assert_eq!(opened.error, None);
    assert_eq!(&reader.read_to(1).await[0].1[..], b"kept");
    assert_eq!(produced(&client, &sick, b"again").await.error, None);
    assert!(broker.shutdown().await);
    assert!(is_marked_clean(&files, dir.path()), "with every partition served");
}

/// Later calls were once told that the broker is shutting down, which is worth a retry, and nobody else was told anything.
#[tokio::test]
async fn a_broker_whose_metadata_end_says_why_and_serves_its_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    assert!(get(broker.admin_addr(), "/ready").await.starts_with("HTTP/1.1 200"));
    assert_eq!(sample(&broker, "headwater_metadata_ended").await, 0.0);
    files.fail(Fault::new(Operation::Sync).on("headwater.metadata"));
    let create = |name: &str, validate_only| {
        let create = wire::CreateTopic { name: name.into(), partitions: 1, validate_only, ..Default::default() };
        client.call(Request::CreateTopic(create))
    };
    let names_the_cause = |answer: Response| {
        let Response::Error(error) = answer else { panic!("{answer:?}") };
        assert_eq!((code(Some(&error)), error.retryable), (ErrorCode::Internal, false), "{error:?}");
        assert!(
            error.message.contains("headwater.metadata") && error.message.contains("restart the broker"),
            "{error:?}"
        );
    };
    names_the_cause(create("first", false).await);
    // The disk may be well again: the journal is not trusted before it was read anew.
    files.heal();
    names_the_cause(create("later", false).await);
    names_the_cause(client.call(Request::AllocateProducerId(wire::AllocateProducerId::default())).await);
    names_the_cause(create("asked", true).await);
    let ready = get(broker.admin_addr(), "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("restart the broker"), "{ready}");
    assert_eq!(sample(&broker, "headwater_metadata_ended").await, 1.0);
    assert_eq!(produced(&client, &topic, b"served").await.error, None);
    let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(&reader.read_to(1).await[0].1[..], b"served");
    broker.shutdown().await;

    let broker = start_on(dir.path(), &files.restart(), &[]).await;
    let client = Client::connect(&broker).await;
    client.create_topic("later", 1, &[]).await;
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn a_full_disk_refuses_appends_by_name_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(2);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    assert_eq!(produced(&client, &topic, b"first").await.error, None);
    files.set_capacity(Some(files.used_bytes()));
    let big = vec![b'x'; 500_000];
    let refused = produced(&client, &topic, &big).await.error.unwrap();
    assert_eq!((code(Some(&refused)), refused.retryable), (ErrorCode::DiskFull, true));
    let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(reader.read_to(1).await.len(), 1, "readers are served all the same");
    files.set_capacity(None);
    let done = produced(&client, &topic, &big).await;
    assert_eq!((done.error, done.batches[0].base_offset), (None, 1));
    assert!(broker.shutdown().await);
}

#[tokio::test]
async fn what_was_acknowledged_as_flushed_survives_a_power_failure() {
    for seed in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let files = SimFiles::new(seed);
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        let topic = client.create_topic("t", 1, &[]).await;
        let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
        let values: Vec<_> = (0..40).map(|n| format!("{seed} {n}")).collect();
        for value in &values {
            produce.request(&batch(&[value.as_bytes()])).await;
        }
        let mut acknowledged = 0;
        while acknowledged < 20 {
            assert_eq!(produce.answer().await.durability(), Durability::Flushed);
            acknowledged += 1;
        }
        let files = files.crash();
        drop(broker);
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        let (mut reader, opened) = client.fetch(open_fetch(&topic, 0, 0)).await;
        assert!(opened.high_watermark >= acknowledged, "seed {seed}: {opened:?}");
        let got = reader.read_to(opened.high_watermark).await;
        let expected: Vec<_> = values.iter().take(got.len()).map(|value| bytes::Bytes::from(value.clone())).collect();
        assert_eq!(got.into_iter().map(|(_, value)| value).collect::<Vec<_>>(), expected, "seed {seed}");
        broker.shutdown().await;
    }
}

#[tokio::test]
async fn a_reader_ahead_of_a_log_that_lost_unflushed_records_is_told() {
    let mut lost = 0;
    for seed in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let files = SimFiles::new(seed);
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        let config = [("durability", "replicated"), ("flush.ms", "3600000")];
        let topic = client.create_topic("t", 1, &config).await;
        let (mut produce, opened) = client.produce(open_produce(&topic, 0)).await;
        let epoch = opened.leader_epoch;
        for _ in 0..10 {
            produce.request(&batch(&[&[b'x'; 5000]])).await;
            assert_eq!(produce.answer().await.durability(), Durability::Replicated);
        }
        let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
        reader.read_to(10).await;

        let files = files.crash();
        drop(broker);
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
        let mut first_new = None;
        for _ in 0..20 {
            produce.request(&batch(&[b"new"])).await;
            let offset = produce.answer().await.batches[0].base_offset;
            first_new.get_or_insert(offset);
        }
        // By its offset alone the reader would go on within the new records, and miss some of them.
        let first_new = first_new.unwrap();
        let open = wire::OpenFetch { position_leader_epoch: epoch, ..open_fetch(&topic, 0, 10) };
        let (_, opened) = client.fetch(open).await;
        if first_new < 10 {
            lost += 1;
            let error = opened.error.unwrap();
            assert_eq!(code(Some(&error)), ErrorCode::LogTruncated, "seed {seed}");
            assert_eq!(error.end_offset, first_new, "seed {seed}");
        } else {
            assert_eq!(opened.error, None, "seed {seed}");
        }
        broker.shutdown().await;
    }
    assert!(lost > 0, "with none of these seeds the power failure took anything: choose others");
}

#[tokio::test]
async fn a_replicated_topic_is_flushed_by_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(4);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("durability", "replicated"), ("flush.ms", "1")]).await;
    let open = wire::OpenProduce { acks: Acks::All.into(), ..open_produce(&topic, 0) };
    let (mut produce, _) = client.produce(open).await;
    produce.request(&batch(&[b"x"])).await;
    assert_eq!(produce.answer().await.durability(), Durability::Replicated);
    // The recovery point is written down once the flush has happened: wait for that file to say so.
    let checkpoint = dir.path().join(headwater_storage::checkpoint::RECOVERY_POINTS);
    within("the flush", async {
        while !headwater_storage::files::read(&*files, &checkpoint, 1 << 20)
            .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains("t 0 1"))
        {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    broker.shutdown().await;
}

#[tokio::test]
async fn a_damaged_partition_is_fenced_with_its_file_named_and_the_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let damaged = client.create_topic("damaged", 1, &[]).await;
    let well = client.create_topic("well", 1, &[]).await;
    for topic in [&damaged, &well] {
        for _ in 0..3 {
            produced(&client, topic, &[b'x'; 10_000]).await;
        }
    }
    assert!(broker.shutdown().await);
    // Bytes that were flushed are gone, and the broker believes that it crashed: recovery looks, and must not call it a
    // torn write.
    let log = dir.path().join("damaged-0").join("00000000000000000000.log");
    std::fs::OpenOptions::new().write(true).open(&log).unwrap().set_len(12_000).unwrap();
    std::fs::remove_file(dir.path().join(".kafka_cleanshutdown")).unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let (_, opened) = client.fetch(open_fetch(&damaged, 0, 0)).await;
    if let Some(error) = opened.error {
        assert_eq!(code(Some(&error)), ErrorCode::PartitionFenced);
        assert!(error.message.contains("00000000000000000000.log"), "{}", error.message);
    } else {
        panic!("served damaged bytes up to {}", opened.high_watermark);
    }
    assert_eq!(produced(&client, &well, b"x").await.batches[0].base_offset, 3);
    assert!(!broker.shutdown().await);
}

/// Before the recovery point may pass a leader epoch, a small file says so. When there was no room for that file the partition was
/// fenced until the next start, though its log was well.
#[tokio::test]
async fn a_flush_without_room_for_the_leader_epochs_is_tried_again_and_then_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(5);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    files.fail(Fault::new(Operation::Write).on("leader-epoch-checkpoint").full().times(1));
    let done = produced(&client, &topic, b"kept").await;
    assert_eq!((done.error.clone(), done.durability()), (None, Durability::Flushed));
    let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(&reader.read_to(1).await[0].1[..], b"kept");
    assert!(broker.shutdown().await);
}

/// With more open segments configured than the process may open files, whoever came next fenced a healthy partition until the next start.
#[tokio::test]
async fn too_many_open_files_are_told_and_fence_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(6);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("first", 1, &[]).await;
    assert_eq!(produced(&client, &topic, b"kept").await.error, None);
    // This disk keeps few segments open: those of these topics, not that of the first.
    for number in 0..8 {
        let other = client.create_topic(&format!("other{number}"), 1, &[]).await;
        for _ in 0..2 {
            assert_eq!(produced(&client, &other, b"x").await.error, None);
        }
    }
    files.fail(Fault::new(Operation::Open).on("first-0").exhausted());
    let refused = produced(&client, &topic, b"refused").await.error.unwrap();
    assert_eq!((code(Some(&refused)), refused.retryable), (ErrorCode::Overloaded, true));
    let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    let (last, _) = reader.data().await;
    assert_eq!(code(last.error.as_ref()), ErrorCode::Overloaded);
    files.heal();
    let done = produced(&client, &topic, b"again").await;
    assert_eq!((done.error, done.batches[0].base_offset), (None, 1));
    let (mut reader, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(reader.read_to(2).await.len(), 2);
    assert!(broker.shutdown().await);
}

async fn delete_records(client: &Client, topic: &str, before_offset: i64) -> Result<i64, wire::Error> {
    let delete = wire::DeleteRecords { topic: topic.into(), partition: 0, before_offset };
    match client.call(Request::DeleteRecords(delete)).await {
        Response::DeleteRecords(deleted) => Ok(deleted.log_start_offset),
        Response::Error(error) => Err(error),
        other => panic!("{other:?}"),
    }
}

/// The log start was written down with the other checkpoints, up to a second after the answer: a crash in between brought
/// records back that somebody had been told are deleted.
#[tokio::test]
async fn records_that_were_deleted_do_not_come_back_after_a_crash() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let files = SimFiles::new(seed);
        let config = ["log.flush.offset.checkpoint.interval.ms=60000"];
        let broker = start_on(dir.path(), &files, &config).await;
        let client = Client::connect(&broker).await;
        // What was not flushed goes with a crash, but not before the log start does.
        let durability = ["flushed", "replicated"][seed as usize % 2];
        let topic = client.create_topic("t", 1, &[("durability", durability), ("flush.ms", "3600000")]).await;
        for _ in 0..5 {
            assert_eq!(produced(&client, &topic, b"x").await.error, None);
        }
        assert_eq!(delete_records(&client, "t", 3).await, Ok(3));

        let files = files.crash();
        drop(broker);
        let broker = start_on(dir.path(), &files, &config).await;
        let client = Client::connect(&broker).await;
        let (_, opened) = client.fetch(open_fetch(&topic, 0, 2)).await;
        assert_eq!(code(opened.error.as_ref()), ErrorCode::OffsetOutOfRange, "seed {seed}");
        let (mut reader, opened) = client.fetch(open_fetch(&topic, 0, 3)).await;
        assert_eq!((opened.log_start_offset, opened.high_watermark), (3, 5), "seed {seed}");
        assert_eq!(reader.read_to(5).await.iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), [3, 4]);
        broker.shutdown().await;
    }
}

#[tokio::test]
async fn a_deletion_that_cannot_be_written_down_is_not_confirmed() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let broker = start_on(dir.path(), &files, &["log.flush.offset.checkpoint.interval.ms=60000"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    for _ in 0..5 {
        assert_eq!(produced(&client, &topic, b"x").await.error, None);
    }
    for (fault, expected) in [
        (Fault::new(Operation::Write).full(), ErrorCode::DiskFull),
        (Fault::new(Operation::Open).exhausted(), ErrorCode::Overloaded),
        (Fault::new(Operation::Sync), ErrorCode::Internal),
    ] {
        files.fail(fault.on("log-start-offset-checkpoint"));
        assert_eq!(code(delete_records(&client, "t", 3).await.as_ref().err()), expected);
        files.heal();
    }
    assert_eq!(delete_records(&client, "t", 3).await, Ok(3), "asking again writes it down");
    let files = files.crash();
    drop(broker);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let (_, opened) = client.fetch(open_fetch(&topic, 0, 3)).await;
    assert_eq!((opened.error, opened.log_start_offset), (None, 3));
    broker.shutdown().await;
}

/// A look-up by time answered `internal` where a fetch fences, and the next one read the bad block again.
#[tokio::test]
async fn a_bad_block_fences_its_partition_and_no_other_whoever_reads_it() {
    use wire::offset_query::At;
    let ways: [Option<At>; 3] = [None, Some(At::TimestampMs(1)), Some(At::MaxTimestamp(wire::Done {}))];
    for (seed, way) in (7..).zip(ways) {
        let dir = tempfile::tempdir().unwrap();
        let files = SimFiles::new(seed);
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        let sick = client.create_topic("sick", 1, &[]).await;
        let well = client.create_topic("well", 1, &[]).await;
        for topic in [&sick, &well] {
            assert_eq!(produced(&client, topic, b"kept").await.error, None);
        }
        assert!(broker.shutdown().await);

        let files = files.restart();
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        files.fail(Fault::new(Operation::Read).on("sick-0/00000000000000000000.log"));
        let error = match way {
            None => client.fetch(open_fetch(&sick, 0, 0)).await.0.data().await.0.error,
            Some(at) => {
                let query = wire::OffsetQuery { topic: "sick".into(), partition: 0, at: Some(at) };
                let list = wire::ListOffsets { queries: vec![query] };
                match client.call(Request::ListOffsets(list)).await {
                    Response::ListOffsets(listed) => listed.answers[0].error.clone(),
                    other => panic!("{other:?}"),
                }
            }
        };
        assert_eq!(code(error.as_ref()), ErrorCode::PartitionFenced, "{error:?}");
        assert!(error.unwrap().message.contains("00000000000000000000.log"));
        // The disk may be well again: nothing of the log is served before it was recovered.
        files.heal();
        let (_, opened) = client.fetch(open_fetch(&sick, 0, 0)).await;
        assert_eq!(code(opened.error.as_ref()), ErrorCode::PartitionFenced);
        assert_eq!(code(produced(&client, &sick, b"x").await.error.as_ref()), ErrorCode::PartitionFenced);
        assert_eq!(produced(&client, &well, b"x").await.durability(), Durability::Flushed);
        assert_eq!(client.fetch(open_fetch(&well, 0, 0)).await.0.read_to(2).await.len(), 2);
        assert!(!broker.shutdown().await, "no clean marker with a fenced partition");

        let files = files.restart();
        let broker = start_on(dir.path(), &files, &[]).await;
        let client = Client::connect(&broker).await;
        assert_eq!(&client.fetch(open_fetch(&sick, 0, 0)).await.0.read_to(1).await[0].1[..], b"kept");
        assert!(broker.shutdown().await);
    }
}

/// Whoever found no descriptor while a partition was opened fenced it until the next start.
#[tokio::test]
async fn partitions_that_find_no_descriptor_open_by_themselves_once_there_are_some() {
    let dir = tempfile::tempdir().unwrap();
    let config = ["log.flush.offset.checkpoint.interval.ms=20"];
    let files = SimFiles::new(7);
    let broker = start_on(dir.path(), &files, &config).await;
    let client = Client::connect(&broker).await;
    let kept = client.create_topic("kept", 1, &[]).await;
    assert_eq!(produced(&client, &kept, b"kept").await.error, None);

    let files = files.restart();
    drop(broker);
    for name in ["kept-0/0000", "new-0"] {
        files.fail(Fault::new(Operation::Open).on(name).exhausted());
    }
    let broker = start_on(dir.path(), &files, &config).await;
    let client = Client::connect(&broker).await;
    let new = client.create_topic("new", 1, &[]).await;
    let well = client.create_topic("well", 1, &[]).await;
    assert_eq!(produced(&client, &well, b"x").await.error, None);
    for topic in [&kept, &new] {
        let refused = produced(&client, topic, b"refused").await.error.unwrap();
        assert_eq!((code(Some(&refused)), refused.retryable), (ErrorCode::Overloaded, true), "{}", refused.message);
    }
    files.heal();
    for (topic, offset) in [(&kept, 1), (&new, 0)] {
        let done = within("a partition that opens by itself", async {
            loop {
                let done = produced(&client, topic, b"again").await;
                match &done.error {
                    None => return done,
                    Some(error) => assert!(error.retryable, "{}", error.message),
                }
            }
        });
        assert_eq!(done.await.batches[0].base_offset, offset);
    }
    let (mut reader, _) = client.fetch(open_fetch(&kept, 0, 0)).await;
    assert_eq!(
        reader.read_to(2).await.into_iter().map(|(_, value)| value).collect::<Vec<_>>(),
        [&b"kept"[..], b"again"]
    );
    assert!(broker.shutdown().await);
}

/// The flushes of both partitions of a topic have begun, and end once what is returned is dropped.
async fn hang_both(files: &Arc<SimFiles>, client: &Client, topic: &bytes::Bytes) -> (Held, Vec<Produce>) {
    let held = files.hold(Fault::new(Operation::Sync).on("hung-"));
    let mut hanging = Vec::new();
    for partition in 0..2 {
        let (mut produce, _) = client.produce(open_produce(topic, partition)).await;
        produce.request_as(wire::ProduceRequest { request_id: 1, partition }, &batch(&[b"x"])).await;
        hanging.push(produce);
    }
    within("two flushes at once", async {
        while held.waiting() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    (held, hanging)
}

/// With one thread for all flushes, or one queue, a disk that hangs under one partition would stop every other.
#[tokio::test]
async fn partitions_flush_side_by_side_and_one_that_hangs_holds_up_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(10);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let hung = client.create_topic("hung", 2, &[]).await;
    let well = client.create_topic("well", 1, &[]).await;
    let (held, mut hanging) = hang_both(&files, &client, &hung).await;
    for _ in 0..3 {
        let done = produced(&client, &well, b"x").await;
        assert_eq!((done.error.clone(), done.durability()), (None, Durability::Flushed));
    }
    assert_eq!(held.waiting(), 2);
    drop(held);
    for produce in &mut hanging {
        assert_eq!(produce.answer().await.durability(), Durability::Flushed);
    }
    assert!(broker.shutdown().await);
}

/// Whoever deleted a partition waited for the job that had its log, and everything else that changed waited behind.
#[tokio::test]
async fn a_topic_whose_disk_hangs_is_deleted_and_others_come_and_go_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(17);
    let broker = start_on(dir.path(), &files, &["num.io.threads=4"]).await;
    let client = Client::connect(&broker).await;
    let hung = client.create_topic("hung", 2, &[]).await;
    let held = files.hold(Fault::new(Operation::Sync).on("hung-0/"));
    let (mut produce, _) = client.produce(open_produce(&hung, 0)).await;
    produce.request(&batch(&[b"x"])).await;
    within("the disk to hang", async {
        while held.waiting() < 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let delete = |name: &str| Request::DeleteTopic(wire::DeleteTopic { name: name.into() });
    let deleted = within("the deletion", client.call(delete("hung"))).await;
    assert!(matches!(deleted, Response::Done(_)), "{deleted:?}");
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::UnknownTopicId, "whoever waits is told");
    for n in 0..3 {
        let name = format!("well-{n}");
        let well = within("another topic", client.create_topic(&name, 2, &[])).await;
        assert_eq!(within("a record", produced(&client, &well, b"x")).await.error, None);
        let deleted = within("its deletion", client.call(delete(&name))).await;
        assert!(matches!(deleted, Response::Done(_)), "{deleted:?}");
        assert!(!headwater_storage::files::exists(&*files, &dir.path().join(format!("{name}-0"))).unwrap());
    }
    let is_there = |n: u32| headwater_storage::files::exists(&*files, &dir.path().join(format!("hung-{n}"))).unwrap();
    assert_eq!((is_there(0), is_there(1), held.waiting()), (true, false, 1));
    drop(held);
    within("its folder to go", async {
        while is_there(0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(broker.shutdown().await);
}

async fn until_produce_streams_are(broker: &Broker, number: f64) {
    within("produce streams to end", async {
        while sample(broker, "headwater_streams{kind=\"produce\"}").await != number {}
    })
    .await;
}

/// Each stream that was opened again on a disk that hangs stayed, though its client had given it up: after a thousand the
/// connection had none left, not even for other partitions.
#[tokio::test]
async fn streams_that_wait_for_a_disk_that_hangs_end_in_time_or_with_their_client() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(14);
    for patience in ["frame.timeout.ms=300", "frame.timeout.ms=600000"] {
        let hangs = format!("hung-{}", patience.len());
        let broker = start_on(dir.path(), &files, &[patience, "append.queue.bytes=1048576"]).await;
        let client = Client::connect(&broker).await;
        let hung = client.create_topic(&hangs, 1, &[]).await;
        let producer_id = client.allocate_producer_id().await;
        let held = files.hold(Fault::new(Operation::Sync).on(&hangs));
        let (mut first, _) = client.produce(open_produce(&hung, 0)).await;
        first.request(&batch(&[&vec![b'x'; 700_000]])).await;
        within("the flush", async {
            while held.waiting() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let open = wire::OpenProduce { producer_id, producer_epoch: 0, ..open_produce(&hung, 0) };
        if patience == "frame.timeout.ms=300" {
            let refused = client.produce(open).await.1.error.expect("nothing is known of the producer");
            assert_eq!((code(Some(&refused)), refused.retryable), (ErrorCode::TimedOut, true), "{}", refused.message);
            until_produce_streams_are(&broker, 1.0).await;
        } else {
            // Two wait for what the log knows of their producer, and two for room in front of it.
            let mut waiting = Vec::new();
            for _ in 0..2 {
                waiting.push(client.open(wire::open::Stream::Produce(open.clone())).await);
            }
            let mut full = Vec::new();
            for _ in 0..2 {
                let (mut produce, _) = client.produce(open_produce(&hung, 0)).await;
                produce.request(&batch(&[&vec![b'x'; 700_000]])).await;
                full.push(produce);
            }
            until_produce_streams_are(&broker, 5.0).await;
            drop(waiting);
            until_produce_streams_are(&broker, 3.0).await;
            drop(full);
            until_produce_streams_are(&broker, 1.0).await;
        }
        drop(held);
        assert_eq!(first.answer().await.durability(), Durability::Flushed);
        assert!(broker.shutdown().await);
    }
}

/// One flush for whatever came during the one before it, whoever sent it: a flush for each batch would be forty-one.
#[tokio::test]
async fn what_arrives_during_a_flush_is_written_and_flushed_at_once() {
    const LOG: &str = "t-0/00000000000000000000.log";
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(12);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let held = files.hold(Fault::new(Operation::Sync).on(LOG).times(1));
    // The first batch, all that came meanwhile, and once more whatever the broker did not see in time.
    files.fail(Fault::new(Operation::Sync).on(LOG).after(3));
    files.fail(Fault::new(Operation::Write).on(LOG).after(3));
    let (mut first, _) = client.produce(open_produce(&topic, 0)).await;
    first.request(&batch(&[b"first"])).await;
    within("the first flush", async {
        while held.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut others = Vec::new();
    for _ in 0..2 {
        let another = Client::connect(&broker).await;
        for _ in 0..2 {
            let (mut produce, _) = another.produce(open_produce(&topic, 0)).await;
            for _ in 0..10 {
                produce.request(&batch(&[b"x"])).await;
            }
            others.push(produce);
        }
        // What was sent before this call was taken in before it is answered.
        another.call(Request::Metadata(wire::Metadata::default())).await;
    }
    drop(held);
    assert_eq!(first.answer().await.durability(), Durability::Flushed);
    for produce in &mut others {
        for _ in 0..10 {
            let done = produce.answer().await;
            assert_eq!((done.error.clone(), done.durability()), (None, Durability::Flushed));
        }
    }
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(fetch.read_to(41).await.len(), 41);
    files.heal();
    assert!(broker.shutdown().await);
}

/// Lets go of what is held when it is told to, or when the thread that should tell hangs itself. True: it was told.
fn let_go_later(held: Held) -> (mpsc::Sender<()>, std::thread::JoinHandle<bool>) {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let in_time = told.recv_timeout(DEADLINE).is_ok();
        drop(held);
        in_time
    });
    (tell, thread)
}

/// Broker and client share the one thread of this test: if it read what is not in memory, nothing here would go on.
#[tokio::test]
async fn what_is_not_in_memory_is_read_by_other_threads_than_those_that_serve() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(13);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let (cold, warm) = (client.create_topic("cold", 1, &[]).await, client.create_topic("warm", 1, &[]).await);
    let value = vec![b'x'; 100_000];
    for topic in [&cold, &warm] {
        for _ in 0..10 {
            assert_eq!(produced(&client, topic, &value).await.error, None);
        }
    }
    let cold_reads = async || sample(&broker, "headwater_fetch_cold_reads_total").await;
    assert_eq!(client.fetch(open_fetch(&cold, 0, 0)).await.0.read_to(10).await.len(), 10);
    // One reader is within the log, and another one has to find its place.
    let (mut within_the_log, _) = client.fetch(wire::OpenFetch { credit_bytes: 1000, ..open_fetch(&cold, 0, 0) }).await;
    let begun = within_the_log.data().await.1;
    assert_eq!((begun.len(), cold_reads().await), (1000, 0.0), "what was written just now is in memory");

    files.evict(&dir.path().join("cold-0/00000000000000000000.log")).unwrap();
    let held = files.hold(Fault::new(Operation::Read).on("cold-0/00000000000000000000.log"));
    let (let_go, thread) = let_go_later(held);
    within_the_log.grant(1 << 20).await;
    let (mut reader, opened) = client.fetch(open_fetch(&cold, 0, 0)).await;
    assert_eq!((opened.error, opened.high_watermark), (None, 10));
    for _ in 0..3 {
        assert_eq!(produced(&client, &warm, b"x").await.durability(), Durability::Flushed);
        assert_eq!(produced(&client, &cold, b"x").await.durability(), Durability::Flushed);
        assert!(client.fetch(open_fetch(&warm, 0, 0)).await.0.read_to(11).await.len() >= 11);
    }
    assert_eq!(cold_reads().await, 0.0, "it waits for the disk");
    let_go.send(()).unwrap();
    assert!(thread.join().unwrap(), "this thread waited for the disk");
    let mut bytes = bytes::BytesMut::from(&begun[..]);
    while bytes.len() < 10 * value.len() {
        bytes.extend_from_slice(&within_the_log.data().await.1);
    }
    assert!(values(&bytes.freeze()).iter().take(10).all(|(_, read)| *read == value));
    assert_eq!(reader.read_to(13).await.len(), 13);
    let read = cold_reads().await;
    assert!((1.0..=10.0).contains(&read), "{read}");
    assert_eq!(sample(&broker, "headwater_fetch_cold_read_seconds_count").await, read);
    assert_eq!(client.fetch(open_fetch(&cold, 0, 0)).await.0.read_to(13).await.len(), 13);
    assert_eq!(cold_reads().await, read, "now it is in memory");
    assert!(broker.shutdown().await);
}

/// Proposals and votes waited in one queue with the partitions' flushes, and a busy disk looked like a quorum that is lost.
#[tokio::test]
async fn what_the_metadata_keep_waits_for_no_flush_of_a_partition() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(16);
    let few_threads = ["num.io.threads=2", "log.flush.offset.checkpoint.interval.ms=60000"];
    let broker = start_on(dir.path(), &files, &few_threads).await;
    let client = Client::connect(&broker).await;
    let hung = client.create_topic("hung", 2, &[]).await;
    let (held, mut hanging) = hang_both(&files, &client, &hung).await;
    assert_eq!(within("a command in force", client.allocate_producer_id()).await, 0);
    assert_eq!(held.waiting(), 2);
    drop(held);
    for produce in &mut hanging {
        assert_eq!(produce.answer().await.durability(), Durability::Flushed);
    }
    assert!(broker.shutdown().await);
}

/// Both threads that may wait for a disk do so: whatever is answered was checked by the thread that serves connections.
#[tokio::test]
async fn batches_are_checked_by_other_threads_than_those_that_serve() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(15);
    let few_threads = ["num.io.threads=2", "log.flush.offset.checkpoint.interval.ms=60000"];
    let broker = start_on(dir.path(), &files, &few_threads).await;
    let client = Client::connect(&broker).await;
    let (hung, well) = (client.create_topic("hung", 2, &[]).await, client.create_topic("well", 4, &[]).await);
    let (held, mut hanging) = hang_both(&files, &client, &hung).await;

    // Whoever checks these finds the last byte wrong.
    let wrong = async |partition, bytes: bytes::Bytes| {
        let mut bytes = bytes.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        let (mut produce, opened) = client.produce(open_produce(&well, partition)).await;
        assert_eq!(opened.error, None);
        produce.request_as(wire::ProduceRequest { request_id: 1, partition }, &bytes).await;
        produce
    };
    let queued = async || sample(&broker, "headwater_io_pool_queued").await;
    let refused = async || sample(&broker, "headwater_rejected_total{code=\"corrupt_batch\"}").await;
    let before = queued().await;
    let compressed = BuildOptions { codec: Codec::Lz4, ..BuildOptions::default() };
    let mut waiting = Vec::new();
    let batches =
        [batch(&[b"x"]), batch(&[&vec![b'x'; 128 << 10]]), batch(&[&b"x"[..]; 1000]), batch_with(compressed, &[b"x"])];
    for (partition, bytes) in (0..).zip(batches) {
        waiting.push(wrong(partition, bytes).await);
        let more = f64::from(partition + 1);
        within("one more to wait for a thread", async { while queued().await < before + more {} }).await;
        // What waits may be something else.
        assert_eq!(refused().await, 0.0, "{more}");
    }
    assert_eq!(held.waiting(), 2);
    drop(held);
    for produce in &mut waiting {
        assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::CorruptBatch);
    }
    for produce in &mut hanging {
        assert_eq!(produce.answer().await.durability(), Durability::Flushed);
    }
    assert!(broker.shutdown().await);
}

/// What is refused as it arrives is refused before the partition has written what came earlier.
#[tokio::test]
async fn a_refusal_takes_nothing_with_it_that_came_before() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(17);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("max.message.bytes", "1000")]).await;
    let other = client.create_topic("other", 1, &[]).await;
    let held = files.hold(Fault::new(Operation::Sync).on("/t-0"));
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"being written"])).await;
    within("the disk to hang", async {
        while held.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    produce.request(&batch(&[b"waits"])).await;
    produce.request(&batch(&[&[b'x'; 2000]])).await;
    // What another stream sent later was answered: this one's frames have arrived.
    for _ in 0..3 {
        let (mut produce, _) = client.produce(open_produce(&other, 0)).await;
        produce.request(&batch(&[b"x"])).await;
        assert_eq!(produce.answer().await.error, None);
    }
    drop(held);
    assert_eq!(produce.answer().await.error, None);
    assert_eq!(produce.answer().await.error, None);
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::MessageTooLarge);
    assert!(broker.shutdown().await);
}

fn open_folder(files: &Arc<SimFiles>, data: &Path) -> Result<DataDir, DataDirError> {
    let identity = NewIdentity { cluster_id: "other".into(), broker_id: 1, directory_id: "other".into() };
    DataDir::open(files.clone(), data, &identity)
}

/// The write to the journal that hung was done by a thread that the runtime's end waits for; and the folder was free while that
/// write could still come to its end, within a file that another broker had by then.
#[test]
fn a_shutdown_ends_though_the_journal_hangs_and_the_folder_is_locked_until_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(16);
    let mut config = config(dir.path());
    config.set_pair("shutdown.timeout.ms=500").unwrap();
    let runtime = runtime::build(&config).unwrap();
    let held = runtime.block_on(async {
        let broker = within("start", Broker::start_on(config, files.clone())).await.unwrap();
        let client = Client::connect(&broker).await;
        let held = files.hold(Fault::new(Operation::Sync).on("headwater.metadata"));
        tokio::spawn(async move {
            let create = wire::CreateTopic { name: "t".into(), partitions: 1, ..Default::default() };
            client.call(Request::CreateTopic(create)).await
        });
        within("the journal to hang", async {
            while held.waiting() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert!(!within("the shutdown", broker.shutdown()).await);
        held
    });
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        drop(runtime);
        tell.send(())
    });
    told.recv_timeout(DEADLINE).expect("the runtime ends");
    assert_eq!(held.waiting(), 1);
    let locked = open_folder(&files, dir.path()).err();
    assert!(matches!(locked, Some(DataDirError::Locked(_))), "{locked:?}");
    drop(held);
    let since = std::time::Instant::now();
    while let Err(error) = open_folder(&files, dir.path()) {
        assert!(since.elapsed() < DEADLINE, "{error}");
        std::thread::yield_now();
    }
}
