//! Consumer groups whose log lies on a disk that fills up or fails.

mod harness;

use harness::*;
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_storage::offsets_schema::partition_of_group;
use headwater_storage::sim::{Fault, Operation, SimFiles};

/// The shards of the groups once kept the handles that they were started with, though those of partitions which found
/// no room for their first files are replaced when there is some: commits were refused until the next start.
#[tokio::test]
async fn groups_are_served_once_a_full_disk_has_room() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(3);
    files.fail(Fault::new(Operation::Write).on("__consumer_offsets-").full());
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    client.create_topic("t", 1, &[]).await;
    let commit = || {
        let entry = wire::OffsetEntry { topic: "t".into(), partition: 0, offset: 0, ..Default::default() };
        let commit = wire::CommitOffsets { group: "g".into(), offsets: vec![entry], ..Default::default() };
        client.call(Request::CommitOffsets(commit))
    };
    let refused = commit().await;
    assert!(matches!(refused, Response::Error(_)), "{refused:?}");
    files.heal();
    within("a commit", async {
        while !matches!(commit().await, Response::CommitOffsets(_)) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
    broker.shutdown().await;
}

/// One partition of the offsets topic that could not be read hid the lag of every group.
#[tokio::test]
async fn groups_that_cannot_be_read_hide_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(11);
    let groups = ["a", "b"].map(|name| (name, partition_of_group(name, 16)));
    assert_ne!(groups[0].1, groups[1].1, "they lie in different partitions");
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    assert_eq!(produced(&client, &topic, b"x").await.error, None);
    let commit = async |client: &Client, group: &str| {
        let entry = wire::OffsetEntry { topic: "t".into(), partition: 0, offset: 0, ..Default::default() };
        let commit = wire::CommitOffsets { group: group.into(), offsets: vec![entry], ..Default::default() };
        matches!(client.call(Request::CommitOffsets(commit)).await, Response::CommitOffsets(_))
    };
    for (group, _) in groups {
        assert!(commit(&client, group).await);
    }
    assert!(broker.shutdown().await);

    let files = files.restart();
    files.fail(Fault::new(Operation::Read).on(format!("__consumer_offsets-{}/00000000000000000000.log", groups[0].1)));
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    within("the first group to be refused", async { while commit(&client, "a").await {} }).await;
    assert_eq!(sample(&broker, "headwater_partitions_fenced").await, 1.0);
    let lag = async |group: &str| {
        sample(&broker, &format!("headwater_group_lag{{group=\"{group}\",topic=\"t\",partition=\"0\"}}")).await
    };
    assert_eq!((lag("a").await, lag("b").await), (0.0, 1.0));
    assert!(!broker.shutdown().await);
}

/// The groups' log was opened on a full disk after a failed sync, and its end did not count as flushed yet. The groups were read up to there; what
/// lay behind came to count later, and nobody who was asked knew of it until the next start.
#[tokio::test]
async fn groups_are_read_to_the_end_of_their_log_or_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(12);
    let log = format!("__consumer_offsets-{}/00000000000000000000.log", partition_of_group("g", 16));
    let commit = async |client: &Client, offset: i64| {
        let entry = wire::OffsetEntry { topic: "t".into(), partition: 0, offset, ..Default::default() };
        let commit = wire::CommitOffsets { group: "g".into(), offsets: vec![entry], ..Default::default() };
        matches!(client.call(Request::CommitOffsets(commit)).await, Response::CommitOffsets(_))
    };
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    for _ in 0..3 {
        assert_eq!(produced(&client, &topic, b"x").await.error, None);
    }
    assert!(commit(&client, 1).await);
    files.fail(Fault::new(Operation::Sync).on(&*log).times(1));
    assert!(!commit(&client, 2).await, "nobody was told that it is kept");
    assert!(!broker.shutdown().await);

    let files = files.restart();
    // The new file that the failed sync asks for has no room.
    files.fail(Fault::new(Operation::Reserve).on(log.replace(".log", ".log.cleaned")).full());
    let broker = start_on(dir.path(), &files, &["log.retention.check.interval.ms=20"]).await;
    let client = Client::connect(&broker).await;
    let fetched = async || {
        let fetch = wire::FetchOffsets { group: "g".into(), ..Default::default() };
        match client.call(Request::FetchOffsets(fetch)).await {
            Response::FetchOffsets(found) => Ok(found.offsets.first().map(|entry| entry.offset)),
            Response::Error(error) => Err(error),
            other => panic!("{other:?}"),
        }
    };
    let refused = fetched().await.expect_err("the end of the log may be lost yet");
    assert!(refused.retryable, "{refused:?}");
    files.heal();
    let known = within("the groups", async {
        loop {
            match fetched().await {
                Ok(known) => break known,
                Err(error) => assert!(error.retryable, "{error:?}"),
            }
        }
    });
    assert_eq!(known.await, Some(2));
    assert!(broker.shutdown().await);
}
