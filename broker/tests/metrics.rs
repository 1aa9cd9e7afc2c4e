//! What the metrics tell: each of them is there, and moves with what it is named after.

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_broker::Broker;
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use std::collections::BTreeMap;

/// Every sample, by name and labels.
async fn samples(broker: &Broker) -> BTreeMap<String, f64> {
    let text = get(broker.admin_addr(), "/metrics").await;
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain"), "{head}");
    let samples = body.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    samples
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

async fn commit(client: &Client, group: &str, offset: i64) -> Response {
    let entry = wire::OffsetEntry { topic: "t".into(), partition: 0, offset, ..Default::default() };
    let commit = wire::CommitOffsets { group: group.into(), offsets: vec![entry], ..Default::default() };
    client.call(Request::CommitOffsets(commit)).await
}

async fn produce(client: &Client, topic: &Bytes, batches: usize) -> usize {
    let (mut produce, _) = client.produce(open_produce(topic, 0)).await;
    // Large enough that opening a log which was closed in good order does not check all of it: it looks at the last 64 KiB at most.
    let bytes = batch(&[&[b'x'; 40_000], b"two"]);
    for _ in 0..batches {
        produce.request(&bytes).await;
        assert_eq!(produce.answer().await.error, None);
    }
    batches * bytes.len()
}

/// Each has a line for people.
async fn says_what_it_is(broker: &Broker, names: impl Iterator<Item = &String>) {
    let text = get(broker.admin_addr(), "/metrics").await;
    for name in names {
        let name = name.split('{').next().unwrap();
        let plain = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(text.contains(&format!("# HELP {plain} ")), "{plain} says nothing of itself");
    }
}

#[tokio::test]
async fn every_metric_is_there_and_moves() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    produce(&client, &topic, 3).await;
    // What storage counts goes to the first broker of a process.
    let first = samples(&broker).await;
    assert!(first["headwater_storage_appended_bytes_total"] > 100_000.0);
    says_what_it_is(&broker, first.keys()).await;
    assert!(broker.shutdown().await);

    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    assert!(matches!(commit(&client, "g", 0).await, Response::CommitOffsets(_)));
    let before = samples(&broker).await;
    let appended = produce(&client, &topic, 2).await;
    // What this process has not checked yet is read as what is not in memory.
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(fetch.read_to(10).await.len(), 10);
    let (mut refused, _) = client.produce(open_produce(&topic, 0)).await;
    refused.request(b"nonsense").await;
    assert!(refused.answer().await.error.is_some());
    assert!(matches!(commit(&client, "g", 4).await, Response::CommitOffsets(_)));
    let _another = Client::connect(&broker).await;
    let after = samples(&broker).await;

    let moved = |name: &str| {
        let value = after.get(name).unwrap_or_else(|| panic!("{name} is missing in {after:#?}"));
        value - before.get(name).unwrap_or(&0.0)
    };
    for (name, by) in [
        ("headwater_produce_bytes_total", appended as f64),
        ("headwater_produce_records_total", 4.0),
        ("headwater_produce_batches_total", 2.0),
        ("headwater_fetch_bytes_total", appended as f64 / 2.0 * 5.0),
        ("headwater_fetch_records_total", 10.0),
        ("headwater_partition_log_end_offset{topic=\"t\",partition=\"0\"}", 4.0),
        ("headwater_partition_high_watermark{topic=\"t\",partition=\"0\"}", 4.0),
        ("headwater_partition_log_start_offset{topic=\"t\",partition=\"0\"}", 0.0),
        ("headwater_partition_fenced{topic=\"t\",partition=\"0\"}", 0.0),
        ("headwater_partition_size_bytes{topic=\"t\",partition=\"0\"}", appended as f64),
        // Ten records, of which four were read; before, six and none.
        ("headwater_group_lag{group=\"g\",topic=\"t\",partition=\"0\"}", 0.0),
        ("headwater_connections", 1.0),
        ("headwater_connections_opened_total", 1.0),
        ("headwater_streams{kind=\"fetch\"}", 1.0),
        ("headwater_rejected_total{code=\"corrupt_batch\"}", 1.0),
        ("headwater_request_seconds_count{call=\"commit_offsets\"}", 1.0),
        ("headwater_produce_seconds_count", 2.0),
        ("headwater_partitions", 0.0),
        ("headwater_partitions_recovering", 0.0),
        ("headwater_partitions_fenced", 0.0),
    ] {
        assert_eq!(moved(name), by, "{name}");
    }
    assert_eq!(after["headwater_group_lag{group=\"g\",topic=\"t\",partition=\"0\"}"], 6.0);
    for name in [
        "headwater_append_seconds_count",
        "headwater_append_seconds_sum",
        "headwater_append_group_bytes_sum",
        "headwater_flush_seconds_count",
        "headwater_flush_seconds_sum",
        "headwater_request_seconds_sum{call=\"commit_offsets\"}",
        "headwater_fetch_cold_reads_total",
        "headwater_fetch_cold_read_seconds_count",
        "headwater_process_cpu_seconds_total",
        "headwater_streams{kind=\"produce\"}",
    ] {
        assert!(moved(name) > 0.0, "{name}");
    }
    for name in [
        "headwater_process_resident_bytes",
        "headwater_start_time_seconds",
        "headwater_network_threads",
        "headwater_partitions",
    ] {
        assert!(after[name] > 0.0, "{name}");
    }
    assert!(after.contains_key("headwater_io_pool_queued"));
    says_what_it_is(&broker, after.keys()).await;
    broker.shutdown().await;
}
