//! Every batch that Kafka wrote into `tests/fixtures/kafka-logs`, compared with what Kafka itself says of it: the dump
//! tool's batches and records, and the records that its consumer read.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use headwater_proto::batch::{
    self, BatchBuilder, BatchHeader, Batches, BuildOptions, Codec, HEADER_BYTES, Header, Origin, Record, Records,
    TimestampType, WalkRules, control, rebuild, walk,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs")
}

/// Partition directory, segment name without its ending, and the log's bytes; in the order of their offsets.
fn logs() -> Vec<(String, String, Bytes)> {
    let mut logs = Vec::new();
    for folder in fs::read_dir(fixtures().join("dirs")).unwrap() {
        let folder = folder.unwrap().path();
        for file in fs::read_dir(&folder).into_iter().flatten() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|ending| ending == "log") {
                let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
                logs.push((name(&folder), name(&file), Bytes::from(fs::read(&file).unwrap())));
            }
        }
    }
    logs.sort();
    assert!(logs.len() >= 15, "the fixtures are missing: {} logs", logs.len());
    logs
}

/// Every batch of a log, as a slice of its own.
fn batches(log: &Bytes) -> Vec<(usize, BatchHeader, Bytes)> {
    Batches::new(log)
        .map(|item| {
            let (position, header, batch) = item.unwrap();
            (position, header, log.slice_ref(batch))
        })
        .collect()
}

fn golden(name: &str) -> Option<String> {
    let path = fixtures().join("golden").join(name);
    if let Ok(text) = fs::read_to_string(&path) {
        return Some(text);
    }
    let packed = fs::read(path.with_file_name(format!("{name}.gz"))).ok()?;
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_string(&mut text).unwrap();
    Some(text)
}

/// The `name: value` pairs of a line of the dump tool.
fn pairs(line: &str) -> BTreeMap<&str, &str> {
    let words: Vec<&str> = line.split(' ').collect();
    words.windows(2).filter_map(|pair| Some((pair[0].strip_suffix(':')?, pair[1]))).collect()
}

#[test]
fn every_batch_and_record_is_what_the_dump_tool_says() {
    let (mut batch_count, mut record_count) = (0, 0);
    for (partition, segment, log) in logs() {
        let dump = golden(&format!("{partition}.{segment}.log.dump.txt")).unwrap();
        let mut lines =
            dump.lines().filter(|line| line.starts_with("baseOffset: ") || line.starts_with('|')).peekable();
        for (position, header, batch) in batches(&log) {
            let line = lines.next().unwrap_or_else(|| panic!("{partition}: Kafka sees no batch at {position}"));
            let said = pairs(line);
            let place = format!("{partition}/{segment} at {position}");
            assert_eq!(batch::check(&batch), Ok(header), "{place}");
            let time = if header.timestamp_type() == TimestampType::Create { "CreateTime" } else { "LogAppendTime" };
            let horizon = match header.delete_horizon_ms() {
                Some(ms) => format!("OptionalLong[{ms}]"),
                None => "OptionalLong.empty".into(),
            };
            for (field, value) in [
                ("baseOffset", header.base_offset.to_string()),
                ("lastOffset", header.last_offset().to_string()),
                ("count", header.record_count.to_string()),
                ("baseSequence", header.base_sequence.to_string()),
                ("lastSequence", header.last_sequence().to_string()),
                ("producerId", header.producer_id.to_string()),
                ("producerEpoch", header.producer_epoch.to_string()),
                ("partitionLeaderEpoch", header.leader_epoch.to_string()),
                ("isTransactional", header.is_transactional().to_string()),
                ("isControl", header.is_control().to_string()),
                ("deleteHorizonMs", horizon),
                ("position", position.to_string()),
                (time, header.max_timestamp.to_string()),
                ("size", header.size().to_string()),
                ("magic", header.magic.to_string()),
                ("compresscodec", header.codec().unwrap().name().to_owned()),
                ("crc", header.crc.to_string()),
                ("isvalid", "true".into()),
            ] {
                assert_eq!(said.get(field), Some(&value.as_str()), "{field} of {place}");
            }
            for record in Records::new(&batch).unwrap() {
                let record = record.unwrap_or_else(|error| panic!("{place}: {error}"));
                compare_with_dump(&header, &record, lines.next().unwrap(), &place);
                record_count += 1;
            }
            assert!(lines.peek().is_none_or(|line| !line.starts_with('|')), "{place}: Kafka sees more records");
            batch_count += 1;
        }
        assert_eq!(lines.next(), None, "{partition}: Kafka sees more batches");
    }
    assert!(batch_count > 300 && record_count > 10_000, "{batch_count} batches, {record_count} records");
}

fn compare_with_dump(header: &BatchHeader, record: &Record, line: &str, place: &str) {
    let (line, header_keys) = line.split_once(" headerKeys: [").expect("a record's line");
    let said = pairs(line);
    let time = if header.timestamp_type() == TimestampType::Create { "CreateTime" } else { "LogAppendTime" };
    let size = |bytes: &Option<Bytes>| bytes.as_ref().map_or("-1".into(), |bytes| bytes.len().to_string());
    for (field, value) in [
        ("offset", record.offset.to_string()),
        (time, record.timestamp.to_string()),
        ("keySize", size(&record.key)),
        ("valueSize", size(&record.value)),
    ] {
        assert_eq!(said.get(field), Some(&value.as_str()), "{field} of the record {line:?} in {place}");
    }
    let keys: Vec<_> = record.headers.iter().map(Header::key_str).collect();
    let (said_keys, marker) = header_keys.rsplit_once(']').unwrap();
    assert_eq!(said_keys, keys.join(","), "header keys in {place}");
    if header.is_control() {
        let control = control::parse_key(record.key.as_deref().unwrap()).unwrap();
        let epoch = control::parse_coordinator_epoch(record.value.as_deref().unwrap()).unwrap();
        let name = control.name().to_uppercase();
        assert_eq!(marker, format!(" endTxnMarker: {name} coordinatorEpoch: {epoch}"), "{place}");
        assert_eq!(control::key(control), *record.key.as_deref().unwrap());
        assert_eq!(control::marker_value(epoch), *record.value.as_deref().unwrap());
    }
}

#[test]
fn records_are_what_the_consumer_read() {
    let starts = fs::read_to_string(fixtures().join("dirs/log-start-offset-checkpoint")).unwrap();
    let mut read: BTreeMap<String, Vec<serde_json::Value>> = BTreeMap::new();
    for (partition, _, log) in logs() {
        let (topic, number) = partition.rsplit_once('-').unwrap();
        let start = starts.lines().find_map(|line| line.strip_prefix(&format!("{topic} {number} ")));
        let start: i64 = start.map_or(0, |offset| offset.parse().unwrap());
        let lines = read.entry(partition.clone()).or_default();
        for (_, header, batch) in batches(&log) {
            if header.is_control() {
                continue;
            }
            let encoded = |bytes: &Bytes| STANDARD.encode(bytes);
            for record in Records::new(&batch).unwrap().map(Result::unwrap).filter(|record| record.offset >= start) {
                let headers: Vec<_> = record
                    .headers
                    .iter()
                    .map(|header| serde_json::json!([encoded(&header.key), header.value.as_ref().map(encoded)]))
                    .collect();
                lines.push(serde_json::json!({
                    "offset": record.offset,
                    "timestamp": record.timestamp,
                    "timestamp_type": header.timestamp_type().name(),
                    "leader_epoch": header.leader_epoch,
                    "key": record.key.as_ref().map(encoded),
                    "value": record.value.as_ref().map(encoded),
                    "headers": headers,
                }));
            }
        }
    }
    let mut compared = 0;
    for (partition, lines) in read {
        let Some(golden) = golden(&format!("{partition}.records.jsonl")) else {
            assert!(partition.starts_with("__consumer_offsets"), "no golden records of {partition}");
            continue;
        };
        let golden: Vec<serde_json::Value> = golden.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), golden.len(), "{partition}");
        for (ours, kafkas) in lines.iter().zip(&golden) {
            assert_eq!(ours, kafkas, "{partition}");
        }
        compared += lines.len();
    }
    assert!(compared > 10_000, "{compared} records");
}

/// The records with the timestamps that their producer gave them, also where the broker stamped its own.
fn as_created(header: &BatchHeader, batch: &Bytes) -> Vec<Record> {
    const LOG_APPEND_TIME: i16 = 1 << 3;
    let created = BatchHeader { attributes: header.attributes & !LOG_APPEND_TIME, ..*header };
    let batch = Bytes::from([created.encode().as_slice(), &batch[HEADER_BYTES..]].concat());
    Records::new(&batch).unwrap().map(Result::unwrap).collect()
}

fn build(header: &BatchHeader, records: &[Record], codec: Codec) -> Bytes {
    let mut builder = BatchBuilder::new(BuildOptions {
        codec,
        compression_level: None,
        base_offset: header.base_offset,
        timestamp_type: TimestampType::Create,
        producer_id: header.producer_id,
        producer_epoch: header.producer_epoch,
        base_sequence: header.base_sequence,
        transactional: header.is_transactional(),
        control: header.is_control(),
        leader_epoch: header.leader_epoch,
    });
    for (index, record) in records.iter().enumerate() {
        let delta = builder.append(record.timestamp, record.key.as_deref(), record.value.as_deref(), &record.headers);
        assert_eq!(delta as usize, index);
    }
    let built = builder.build().unwrap();
    match header.timestamp_type() {
        TimestampType::Create => built,
        TimestampType::LogAppend => {
            let body = &built[HEADER_BYTES..];
            let stamped = BatchHeader::parse(&built).unwrap().with_log_append_time(header.max_timestamp, body);
            Bytes::from([stamped.encode().as_slice(), body].concat())
        }
    }
}

fn is_thinned_out(header: &BatchHeader) -> bool {
    header.delete_horizon_ms().is_some() || header.record_count != header.last_offset_delta + 1
}

#[test]
fn the_builder_writes_kafkas_bytes_again() {
    let (mut plain, mut compressed) = (0, 0);
    for (partition, _, log) in logs() {
        for (position, header, batch) in batches(&log) {
            if is_thinned_out(&header) {
                continue;
            }
            let place = format!("{partition} at {position}");
            let records = as_created(&header, &batch);
            let codec = header.codec().unwrap();
            let built = build(&header, &records, codec);
            if codec == Codec::None {
                assert_eq!(built, batch, "{place}");
                plain += 1;
                continue;
            }
            // Another implementation of the codec need not find the same bytes, but what they hold must be the same.
            let again = batch::check(&built).unwrap();
            let same = BatchHeader { batch_length: header.batch_length, crc: header.crc, ..again };
            assert_eq!(same, header, "{place}");
            let decompress = |batch: &Bytes| batch::compression::decompress(codec, &batch[HEADER_BYTES..], 1 << 20);
            assert_eq!(decompress(&built), decompress(&batch), "{place}");
            compressed += 1;
        }
    }
    assert!(plain > 300 && compressed > 30, "{plain} plain and {compressed} compressed batches");
}

#[test]
fn rebuilding_a_compacted_batch_changes_nothing() {
    let (mut thinned, mut horizons) = (0, 0);
    for (partition, _, log) in logs() {
        for (position, header, batch) in batches(&log) {
            let place = format!("{partition} at {position}");
            let records: Vec<Record> = Records::new(&batch).unwrap().map(Result::unwrap).collect();
            if header.timestamp_type() == TimestampType::LogAppend {
                continue; // compaction rewrites every timestamp as the append time, which the builder's own tests show
            }
            let codec = header.codec().unwrap();
            // A horizon that is there already stays.
            let horizon = header.delete_horizon_ms().map(|ms| ms + 1);
            let rebuilt = rebuild(&header, &records, horizon).unwrap();
            if codec == Codec::None {
                assert_eq!(rebuilt, batch, "{place}");
            } else {
                let again = batch::check(&rebuilt).unwrap();
                let same = BatchHeader { batch_length: header.batch_length, crc: header.crc, ..again };
                assert_eq!(same, header, "{place}");
                let decompress = |batch: &Bytes| batch::compression::decompress(codec, &batch[HEADER_BYTES..], 1 << 20);
                assert_eq!(decompress(&rebuilt), decompress(&batch), "{place}");
            }
            thinned += usize::from(is_thinned_out(&header));
            horizons += usize::from(header.delete_horizon_ms().is_some());
        }
    }
    assert!(thinned > 2 && horizons > 2, "{thinned} thinned out, {horizons} with a horizon");
}

#[test]
fn every_batch_of_a_log_can_be_walked() {
    let rules = WalkRules { origin: Origin::Log, ..WalkRules::default() };
    for (partition, _, log) in logs() {
        for (position, header, batch) in batches(&log) {
            let place = format!("{partition} at {position}");
            let walked = walk(&batch, rules).unwrap_or_else(|error| panic!("{place}: {error}"));
            assert_eq!(walked.header, header);
            let records: Vec<Record> = Records::new(&batch).unwrap().map(Result::unwrap).collect();
            if let Some(largest) = records.iter().map(|record| record.timestamp).max() {
                let first = records.iter().find(|record| record.timestamp == largest).unwrap();
                assert_eq!(walked.max_timestamp, largest, "{place}");
                if header.timestamp_type() == TimestampType::Create {
                    let found = header.base_offset + i64::from(walked.offset_of_max_timestamp_delta);
                    assert_eq!(found, first.offset, "{place}");
                }
            }
            let asks_keys = walk(&batch, WalkRules { require_keys: true, ..rules });
            let has_keys = header.is_control() || records.iter().all(|record| record.key.is_some());
            assert_eq!(asks_keys.is_ok(), has_keys, "{place}");
            let as_produced = walk(&batch, WalkRules::default());
            let producers = !is_thinned_out(&header)
                && !header.is_control()
                && !header.is_transactional()
                && header.timestamp_type() == TimestampType::Create;
            assert_eq!(as_produced.is_ok(), producers, "{place}: {as_produced:?}");
        }
    }
}
