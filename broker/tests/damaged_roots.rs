//! A broker on a data root whose checkpoints are damaged.

mod harness;

use harness::*;
use headwater_broker::Broker;
use headwater_proto::ErrorCode;
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_storage::checkpoint::{LOG_START_COPY, LOG_START_OFFSETS};
use std::path::Path;

async fn produce(client: &Client, topic: &bytes::Bytes, values: std::ops::Range<i64>) {
    let (mut produce, _) = client.produce(open_produce(topic, 0)).await;
    for n in values {
        produce.request(&batch(&[n.to_string().as_bytes()])).await;
        assert_eq!(produce.answer().await.batches[0].base_offset, n);
    }
}

/// What a reader is given who asks for offset 0 and takes the log's word for where it begins.
async fn first_offset(broker: &Broker, topic: &bytes::Bytes) -> i64 {
    let client = Client::connect(broker).await;
    let (_, opened) = client.fetch(open_fetch(topic, 0, 0)).await;
    let error = opened.error.expect("the first records were deleted");
    assert_eq!(ErrorCode::from_number(error.code), ErrorCode::OffsetOutOfRange);
    let (mut fetch, _) = client.fetch(open_fetch(topic, 0, error.log_start_offset)).await;
    fetch.read_to(5).await[0].0
}

fn spoil(dir: &Path, name: &str) {
    let file = dir.join(name);
    let mut bytes = std::fs::read(&file).unwrap();
    let half = bytes.len() / 2;
    bytes.truncate(half);
    std::fs::write(file, bytes).unwrap();
}

/// The checkpoint of the log starts counted as empty where it was damaged: what had been deleted within a segment was served again.
#[tokio::test]
async fn deleted_records_stay_deleted_whatever_happens_to_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    produce(&client, &topic, 0..5).await;
    let delete = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset: 3 };
    let deleted = client.call(Request::DeleteRecords(delete)).await;
    assert!(matches!(&deleted, Response::DeleteRecords(done) if done.log_start_offset == 3), "{deleted:?}");
    assert!(broker.shutdown().await);

    for name in [LOG_START_OFFSETS, LOG_START_COPY] {
        for clean in [true, false] {
            spoil(dir.path(), name);
            if !clean {
                std::fs::remove_file(dir.path().join(".kafka_cleanshutdown")).unwrap();
            }
            let broker = start(dir.path()).await;
            assert_eq!(first_offset(&broker, &topic).await, 3, "{name} {clean}");
            assert!(broker.shutdown().await);
        }
    }

    let sound = std::fs::read(dir.path().join(LOG_START_OFFSETS)).unwrap();
    spoil(dir.path(), LOG_START_OFFSETS);
    spoil(dir.path(), LOG_START_COPY);
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let (_, opened) = client.fetch(open_fetch(&topic, 0, 0)).await;
    let error = opened.error.expect("fenced");
    assert_eq!(ErrorCode::from_number(error.code), ErrorCode::PartitionFenced);
    assert!(error.message.contains(LOG_START_OFFSETS) && error.message.contains(LOG_START_COPY), "{}", error.message);
    let new = client.create_topic("new", 1, &[]).await;
    produce(&client, &new, 0..1).await;
    assert!(!broker.shutdown().await);
    std::fs::write(dir.path().join(LOG_START_OFFSETS), sound).unwrap();
    std::fs::remove_file(dir.path().join(LOG_START_COPY)).unwrap();
    let broker = start(dir.path()).await;
    assert_eq!(first_offset(&broker, &topic).await, 3, "one of the two was put back");
    broker.shutdown().await;
}
