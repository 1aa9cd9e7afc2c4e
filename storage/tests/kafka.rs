//! Folders that Kafka 4.1 wrote open, read back as Kafka's own consumer read them, and are appended to.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchBuilder, BuildOptions, Records};
use headwater_storage::{Log, LogConfig, LogIdentity, NewBatch, OpenHints, OsFiles, checkpoint};

const NOW: i64 = 1_800_000_000_000;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::write(to.join(entry.file_name()), std::fs::read(entry.path()).unwrap()).unwrap();
    }
}

fn partitions() -> Vec<(String, u32)> {
    let mut found: Vec<(String, u32)> = std::fs::read_dir(fixtures().join("dirs"))
        .unwrap()
        .filter_map(|entry| checkpoint::parse_partition_dir_name(entry.unwrap().file_name().to_str().unwrap()))
        .collect();
    found.sort();
    assert!(found.len() >= 10);
    found
}

fn open(dir: &Path, topic: &str, partition: u32, clean_shutdown: bool) -> Log {
    let files = OsFiles::with_open_limit(8);
    let root = fixtures().join("dirs");
    let of = |name| checkpoint::read_offsets(&files, &root, name).unwrap().get(&(topic.to_owned(), partition)).copied();
    let hints = OpenHints {
        clean_shutdown,
        recovery_point: of(checkpoint::RECOVERY_POINTS).unwrap_or(0),
        log_start_offset: of(checkpoint::LOG_START_OFFSETS).unwrap_or(0),
    };
    let topic_id = checkpoint::read_partition_metadata(&files, dir).unwrap().unwrap();
    let identity = LogIdentity { topic: topic.into(), topic_id, partition };
    let (log, report) = Log::open(Arc::new(files), dir, identity, LogConfig::default(), hints, NOW).unwrap();
    assert_eq!((report.cut, report.crc_disagreements), (None, Vec::new()), "{topic}");
    assert!(report.rebuilt.is_empty(), "{topic}: {:?}", report.rebuilt);
    assert_eq!(report.scanned_bytes > 0, !clean_shutdown && log.size_bytes() > 0, "{topic}");
    log
}

/// Offset, timestamp, key, value of every record that a consumer is given.
type Row = (i64, i64, Option<Vec<u8>>, Option<Vec<u8>>);

fn records(log: &Log) -> Vec<Row> {
    let reader = log.reader();
    let start = reader.log_start_offset();
    let mut cursor = reader.seek(start).unwrap();
    let mut bytes = Vec::new();
    while let Some(slice) = reader.read(&mut cursor, 100_000, i64::MAX).unwrap() {
        bytes.extend_from_slice(&slice.bytes());
    }
    let bytes = Bytes::from(bytes);
    let mut rows = Vec::new();
    for item in batch::Batches::new(&bytes) {
        let (position, header, _) = item.unwrap();
        if header.is_control() {
            continue;
        }
        for record in Records::new(&bytes.slice(position..position + header.size())).unwrap() {
            let record = record.unwrap();
            if record.offset >= start {
                let bytes = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.to_vec());
                rows.push((record.offset, record.timestamp, bytes(record.key), bytes(record.value)));
            }
        }
    }
    rows
}

fn golden(topic: &str, partition: u32) -> Option<Vec<Row>> {
    use base64::Engine;
    let path = fixtures().join(format!("golden/{topic}-{partition}.records.jsonl"));
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(_) => {
            let file = std::fs::File::open(format!("{}.gz", path.display())).ok()?;
            let mut text = String::new();
            flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
            text
        }
    };
    let bytes = |value: &serde_json::Value| {
        value.as_str().map(|text| base64::engine::general_purpose::STANDARD.decode(text).unwrap())
    };
    let rows = text.lines().map(|line| {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        (row["offset"].as_i64().unwrap(), row["timestamp"].as_i64().unwrap(), bytes(&row["key"]), bytes(&row["value"]))
    });
    Some(rows.collect())
}

#[test]
fn every_folder_reads_back_as_kafka_reads_it_and_goes_on() {
    let mut compared = 0;
    for (topic, partition) in partitions() {
        for clean in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().join(checkpoint::partition_dir_name(&topic, partition));
            copy(&fixtures().join("dirs").join(checkpoint::partition_dir_name(&topic, partition)), &dir);
            let mut log = open(&dir, &topic, partition, clean);
            let before = records(&log);
            if let Some(golden) = golden(&topic, partition) {
                assert_eq!(before, golden, "{topic}-{partition}");
                compared += 1;
            }
            let mut builder = BatchBuilder::new(BuildOptions::default());
            builder.append(NOW, None, Some(b"ours"), &[]);
            let bytes = builder.build().unwrap();
            let epoch = log.leader_epochs().latest().unwrap_or(0) + 1;
            let header = batch::check(&bytes).unwrap();
            log.append(&[NewBatch { header, bytes }], epoch, NOW).unwrap();
            let end = log.log_end_offset();
            assert_eq!(log.reader().epoch_at(end - 1), Some(epoch));
            log.close().unwrap();
            let files = OsFiles::default();
            let topic_id = checkpoint::read_partition_metadata(&files, &dir).unwrap().unwrap();
            let identity = LogIdentity { topic: topic.clone(), topic_id, partition };
            let log_start_offset = if topic == "trimmed" { 333 } else { 0 };
            let hints = OpenHints { clean_shutdown: true, recovery_point: end, log_start_offset };
            let (log, report) = Log::open(Arc::new(files), &dir, identity, LogConfig::default(), hints, NOW).unwrap();
            assert!(report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{topic}: {report:?}");
            assert_eq!(report.scanned_bytes, 0, "{topic}");
            let after = records(&log);
            assert_eq!(after[..before.len()], before);
            assert_eq!(after[before.len()..], [(end - 1, NOW, None, Some(b"ours".to_vec()))]);
        }
    }
    assert!(compared >= 14, "{compared}");
}

#[test]
fn recovery_makes_the_indexes_and_snapshots_that_kafka_made() {
    for (topic, partition) in partitions() {
        let dir = tempfile::tempdir().unwrap();
        let name = checkpoint::partition_dir_name(&topic, partition);
        let kafkas = fixtures().join("dirs").join(&name);
        let dir = dir.path().join(&name);
        copy(&kafkas, &dir);
        let mut newest = String::new();
        for entry in std::fs::read_dir(&kafkas).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            // Compacted segments keep index entries and a snapshot of batches that are gone.
            if file.ends_with("index") && !file.ends_with("txnindex")
                || file.ends_with(".snapshot") && topic != "compacted"
            {
                std::fs::remove_file(dir.join(&file)).unwrap();
            }
            if file.ends_with(".snapshot") {
                newest = newest.max(file);
            }
        }
        let topic_id = checkpoint::read_partition_metadata(&OsFiles::default(), &dir).unwrap().unwrap();
        let identity = LogIdentity { topic: topic.clone(), topic_id, partition };
        let hints = OpenHints { clean_shutdown: true, ..OpenHints::default() };
        let config = LogConfig::default();
        let (log, _) = Log::open(Arc::new(OsFiles::default()), &dir, identity, config, hints, NOW).unwrap();
        log.close().unwrap();
        for entry in std::fs::read_dir(&kafkas).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            if file.ends_with("index") || file == newest {
                let (ours, theirs) = (std::fs::read(dir.join(&file)), std::fs::read(kafkas.join(&file)).unwrap());
                let ours = ours.unwrap_or_default();
                if file.ends_with(".snapshot") {
                    let sorted = |bytes: &[u8]| {
                        let mut entries = headwater_storage::producers::decode_snapshot(bytes).unwrap();
                        entries.sort_by_key(|entry| entry.producer_id);
                        entries
                    };
                    // Kafka forgets producers whose record time is long ago.
                    let ours = sorted(&ours);
                    assert!(sorted(&theirs).iter().all(|entry| ours.contains(entry)), "{name}/{file}: {ours:?}");
                    assert!(ours.len() <= sorted(&theirs).len() + 1, "{name}/{file}: {ours:?}");
                } else if name != "epochs-0" {
                    // There, Kafka was killed, and had written the time index's last entry twice.
                    assert_eq!(ours, theirs, "{name}/{file}");
                }
            }
        }
    }
}

#[test]
fn a_folder_of_another_topic_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures().join("dirs/shapes-0"), dir.path());
    let identity = LogIdentity { topic: "shapes".into(), topic_id: TopicId::from_bytes([1; 16]), partition: 0 };
    let files = Arc::new(OsFiles::default());
    let error = Log::open(files, dir.path(), identity, LogConfig::default(), OpenHints::default(), NOW).unwrap_err();
    assert!(error.to_string().contains("belongs to topic"), "{error}");
}
