//! Against directories that Kafka wrote, whole and damaged.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use headwater_proto::batch::Record;

use super::*;
use crate::{OsFiles, producers};

const PARTITIONS: [&str; 11] = [
    "__consumer_offsets-0",
    "__consumer_offsets-1",
    "appendtime-0",
    "codecs-0",
    "compacted-0",
    "empty-0",
    "epochs-0",
    "segments-0",
    "shapes-0",
    "trimmed-0",
    "txn-0",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs")
}

fn target(path: &Path) -> Target {
    Target::open(Arc::new(OsFiles::new()), path).unwrap()
}

fn verified(path: &Path) -> VerifyReport {
    verify(&target(path), &|_| ()).unwrap()
}

fn dumped(path: &Path) -> Vec<DumpedBatch> {
    dump(&target(path), DumpOptions { records: true, from_offset: None }).collect::<Result<_, _>>().unwrap()
}

/// A copy of a fixture that may be damaged.
fn copy(partition: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join(partition);
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(fixtures().join("dirs").join(partition)).unwrap() {
        let entry = entry.unwrap();
        fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    (dir, to)
}

fn golden(name: &str) -> Option<String> {
    let path = fixtures().join("golden").join(name);
    if let Ok(text) = fs::read(&path) {
        return Some(String::from_utf8_lossy(&text).into_owned());
    }
    let mut text = Vec::new();
    let packed = fs::File::open(path.with_file_name(format!("{name}.gz"))).ok()?;
    flate2::read::GzDecoder::new(packed).read_to_end(&mut text).unwrap();
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// "name: value name: value ..." as Kafka's dump tool prints batches.
fn fields(line: &str) -> HashMap<&str, &str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    words.windows(2).filter_map(|pair| Some((pair[0].strip_suffix(':')?, pair[1]))).collect()
}

#[test]
fn a_dump_says_what_kafkas_says() {
    for partition in PARTITIONS {
        let path = fixtures().join("dirs").join(partition);
        let batches = dumped(&path);
        let mut expected = 0;
        for segment in &target(&path).segments {
            let kafkas = golden(&format!("{partition}.{}.dump.txt", segment.name())).unwrap();
            let ours: Vec<_> = batches.iter().filter(|batch| batch.file == segment.name()).collect();
            let kafkas: Vec<_> = kafkas.lines().filter(|line| line.starts_with("baseOffset:")).collect();
            assert_eq!(ours.len(), kafkas.len(), "{partition}");
            expected += kafkas.len();
            for (batch, line) in ours.iter().zip(kafkas) {
                let say = fields(line);
                assert!(batch.valid, "{partition}: {batch:?}");
                for (name, value) in [
                    ("baseOffset", batch.base_offset.to_string()),
                    ("lastOffset", batch.last_offset.to_string()),
                    ("count", batch.count.to_string()),
                    ("baseSequence", batch.base_sequence.to_string()),
                    ("producerId", batch.producer_id.to_string()),
                    ("producerEpoch", batch.producer_epoch.to_string()),
                    ("partitionLeaderEpoch", batch.leader_epoch.to_string()),
                    ("isTransactional", batch.transactional.to_string()),
                    ("isControl", batch.control.to_string()),
                    ("position", batch.position.to_string()),
                    ("size", batch.size.to_string()),
                    ("compresscodec", batch.codec.to_string()),
                    ("crc", batch.crc.to_string()),
                ] {
                    assert_eq!(say.get(name), Some(&value.as_str()), "{partition}: {name} of {line}");
                }
                let stamp = if batch.timestamp_type == "append" { "LogAppendTime" } else { "CreateTime" };
                assert_eq!(say.get(stamp), Some(&batch.max_timestamp.to_string().as_str()), "{line}");
            }
        }
        assert_eq!(batches.len(), expected);
    }
}

fn told(record: &Record) -> serde_json::Value {
    let text = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map(|bytes| STANDARD.encode(bytes));
    let headers: Vec<_> =
        record.headers.iter().map(|header| (STANDARD.encode(&header.key), text(&header.value))).collect();
    serde_json::json!({
        "offset": record.offset, "timestamp": record.timestamp, "key": text(&record.key), "value": text(&record.value), "headers": headers,
    })
}

#[test]
fn records_are_those_that_kafkas_consumer_read() {
    for partition in PARTITIONS {
        let Some(records) = golden(&format!("{partition}.records.jsonl")) else { continue };
        let records: Vec<serde_json::Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let start = if partition == "trimmed-0" { 333 } else { 0 };
        let ours = dumped(&fixtures().join("dirs").join(partition));
        let ours = ours.iter().filter(|batch| !batch.control).flat_map(|batch| &batch.records);
        let ours: Vec<_> = ours.filter(|record| record.offset >= start).map(told).collect();
        assert_eq!(ours.len(), records.len(), "{partition}");
        for (ours, mut kafkas) in ours.into_iter().zip(records) {
            kafkas.as_object_mut().unwrap().retain(|key, _| ours.get(key).is_some());
            assert_eq!(ours, kafkas, "{partition}");
        }
    }
}

#[test]
fn what_kafka_wrote_verifies() {
    for partition in PARTITIONS {
        let report = verified(&fixtures().join("dirs").join(partition));
        assert_eq!((&report.faults[..], &report.notes[..]), (&[][..], &[][..]), "{partition}");
    }
}

/// One bit of every so many bytes of a file; all of them, eight times, when asked to be thorough.
fn flips(len: usize) -> impl Iterator<Item = (usize, u8)> {
    let step = if std::env::var_os("HEADWATER_THOROUGH").is_some() { 1 } else { 41 };
    (0..len * 8).step_by(step).map(|bit| (bit / 8, (bit % 8) as u8))
}

/// Whether nothing in a partition contradicts this flip: the topic's id is a name like any other, and the epochs that no batch is of,
/// and the beginning of the first, are nowhere else.
fn nothing_contradicts(file: &str, at: usize) -> bool {
    file == crate::checkpoint::PARTITION_METADATA && at >= 21 || file == epochs::FILE_NAME && [6, 8].contains(&at)
}

#[test]
fn every_flipped_bit_is_found_and_placed() {
    for partition in ["epochs-0", "txn-0", "appendtime-0"] {
        let (_dir, path) = copy(partition);
        for entry in fs::read_dir(&path).unwrap() {
            let file = entry.unwrap().path();
            let bytes = fs::read(&file).unwrap();
            for (at, bit) in flips(bytes.len()) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                fs::write(&file, &damaged).unwrap();
                let report = verified(&path);
                // Of two lines of text that contradict each other, the later one is named.
                let text = name(&file) == epochs::FILE_NAME;
                let here = |fault: &&Fault| name(&file) == fault.file && (text || fault.position <= at as u64);
                let found = report.faults.iter().find(here);
                let found = found.is_some_and(|fault| (at as u64).saturating_sub(fault.position) < 65_536);
                assert!(
                    found || nothing_contradicts(&name(&file), at),
                    "{} byte {at} bit {bit}: {report:?}",
                    file.display()
                );
            }
            fs::write(&file, &bytes).unwrap();
        }
    }
}

#[test]
fn every_flipped_bit_of_a_large_segments_indexes_is_found() {
    let (_dir, path) = copy("segments-0");
    for name in ["00000000000000005700.index", "00000000000000011432.timeindex"] {
        let file = path.join(name);
        let bytes = fs::read(&file).unwrap();
        for (at, bit) in flips(bytes.len()).step_by(53) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            fs::write(&file, &damaged).unwrap();
            let report = verified(&path.join(name).with_extension("log"));
            let placed = report.faults.iter().any(|fault| name == fault.file && fault.position / 12 <= at as u64 / 8);
            assert!(placed, "{name} byte {at} bit {bit}: {report:?}");
        }
        fs::write(&file, &bytes).unwrap();
    }
}

#[test]
fn a_damaged_batch_is_passed_over_and_nothing_else() {
    let (_dir, path) = copy("segments-0");
    let whole = dumped(&path);
    let file = path.join("00000000000000005700.log");
    let bytes = fs::read(&file).unwrap();
    let here: Vec<_> = whole.iter().filter(|batch| batch.file == name(&file)).collect();
    // Header fields that the checksum leaves out, the checksum, one that it covers, and a record.
    for at in [1, 7, 9, 10, 12, 15, 16, 18, 26, 60, 400] {
        let victim = here[here.len() / 2];
        let mut damaged = bytes.clone();
        damaged[victim.position as usize + at] ^= 4;
        fs::write(&file, &damaged).unwrap();
        let after = dumped(&path);
        let bad: Vec<_> = after.iter().filter(|batch| !batch.valid).collect();
        assert_eq!(bad.len(), 1, "byte {at}: {bad:?}");
        assert_eq!((bad[0].position, bad[0].size), (victim.position, victim.size), "byte {at}");
        assert!(bad[0].detail.is_some() && bad[0].records.is_empty());
        let good: Vec<_> = after.iter().filter(|batch| batch.valid).map(|batch| batch.base_offset).collect();
        let others: Vec<_> =
            whole.iter().map(|batch| batch.base_offset).filter(|base| *base != victim.base_offset).collect();
        assert_eq!(good, others, "byte {at}");
    }
}

#[test]
fn batches_inside_a_records_value_are_not_taken_for_the_logs() {
    use headwater_proto::batch::{BatchBuilder, BuildOptions};
    let batch = |base_offset: i64, value: &[u8]| {
        let mut builder = BatchBuilder::new(BuildOptions { base_offset, leader_epoch: 0, ..BuildOptions::default() });
        builder.append(1_700_000_000_000, None, Some(value), &[]);
        builder.build().unwrap().to_vec()
    };
    let inner: Vec<u8> = (1..40).flat_map(|offset| batch(offset, b"not of this log")).collect();
    let (outer, last) = (batch(0, &inner), batch(1, b"of this log"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("00000000000000000000.log");
    let mut log = [outer.clone(), last].concat();
    fs::write(&path, &log).unwrap();
    assert!(dumped(&path).iter().all(|batch| batch.valid));
    // A record's byte behind the inner batches: the outer header still says where the batch ends.
    log[outer.len() - 2] ^= 1;
    fs::write(&path, &log).unwrap();
    let found: Vec<_> = dumped(&path).iter().map(|batch| (batch.position, batch.valid)).collect();
    assert_eq!(found, [(0, false), (outer.len() as u64, true)]);
    // The length as well: the index says where the next batch begins.
    log[9] ^= 1;
    fs::write(&path, &log).unwrap();
    let mut index = Vec::new();
    crate::index::IndexEntry::put(&OffsetEntry { relative_offset: 1, position: outer.len() as u32 }, &mut index);
    fs::write(path.with_extension("index"), index).unwrap();
    let found: Vec<_> = dumped(&path).iter().map(|batch| (batch.position, batch.valid)).collect();
    assert_eq!(found, [(0, false), (outer.len() as u64, true)]);
}

#[test]
fn reserved_space_and_what_a_recycled_segment_held_are_no_damage() {
    let (_dir, path) = copy("segments-0");
    let file = path.join("00000000000000011432.log");
    let bytes = fs::read(&file).unwrap();
    let batches = dumped(&path).len();
    let reserved = [bytes.clone(), vec![0; 200_000]].concat();
    let older = fs::read(path.join("00000000000000000000.log")).unwrap();
    let recycled = [bytes.clone(), vec![0; 61], older].concat();
    for tail in [&reserved, &recycled] {
        fs::write(&file, tail).unwrap();
        let report = verified(&path);
        assert!(report.faults.is_empty(), "{report:?}");
        assert_eq!(dumped(&path).len(), batches);
    }
    // The zeros of a lost page in the middle are damage.
    let mut holed = bytes.clone();
    holed[100_000..104_096].fill(0);
    fs::write(&file, &holed).unwrap();
    let report = verified(&path);
    let in_log: Vec<_> = report.faults.iter().filter(|fault| fault.file == name(&file)).collect();
    assert_eq!(in_log.len(), 1, "{report:?}");
    assert!(in_log[0].position <= 100_000 && in_log[0].kind == FaultKind::Batch);
}

#[test]
fn files_that_are_cut_emptied_or_foreign_are_named() {
    let (_dir, path) = copy("segments-0");
    let files: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
    let foreign = fs::read(fixtures().join("README.md")).unwrap();
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let last_segment = name(&file).starts_with("00000000000000011432.log");
        for (what, damaged) in
            [("cut", bytes[..bytes.len() / 2].to_vec()), ("emptied", Vec::new()), ("foreign", foreign.clone())]
        {
            fs::write(&file, damaged).unwrap();
            let report = verified(&path);
            let named = report.faults.iter().chain(&report.notes).any(|found| found.file == name(&file));
            // A log that ends early is contradicted by its indexes, not by itself.
            let contradicted = name(&file).ends_with(".log") && what != "foreign" && !report.faults.is_empty();
            assert!(named || contradicted, "{} {what}: {report:?}", file.display());
            assert!(!last_segment || !report.faults.is_empty());
        }
        fs::write(&file, &bytes).unwrap();
    }
}

#[test]
fn junk_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("00000000000000000000.log");
    let noise: Vec<u8> = (0..5000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (junk, faults) in [(Vec::new(), 0), (vec![0; 4096], 0), (noise, 1), (vec![2; 61], 1), (vec![0xff; 300_000], 1)]
    {
        fs::write(&path, &junk).unwrap();
        let report = verified(dir.path());
        assert_eq!(report.faults.iter().filter(|fault| fault.file.ends_with(".log")).count(), faults, "{report:?}");
        assert!(dumped(dir.path()).iter().all(|batch| !batch.valid));
        assert_eq!(stats(&target(dir.path()), &|_| ()).unwrap().batches, 0);
    }
    let open = |path: &Path| Target::open(Arc::new(OsFiles::new()), path).map(|_| ());
    assert!(matches!(open(&dir.path().join("nowhere")), Err(InspectError::NotFound(_))));
    assert!(matches!(open(&fixtures()), Err(InspectError::NoSegment(_))));
    assert!(matches!(
        open(&fixtures().join("dirs/segments-0/00000000000000000000.index")),
        Err(InspectError::NoSegment(_))
    ));
}

#[test]
fn statistics_add_up() {
    for partition in PARTITIONS {
        let path = fixtures().join("dirs").join(partition);
        let (stats, batches) = (stats(&target(&path), &|_| ()).unwrap(), dumped(&path));
        let records: Vec<_> = batches.iter().filter(|batch| !batch.control).flat_map(|batch| &batch.records).collect();
        assert_eq!((stats.batches, stats.records), (batches.len() as u64, records.len() as u64), "{partition}");
        assert_eq!(stats.batch_bytes, stats.file_bytes);
        assert_eq!(stats.codecs.values().map(|codec| codec.batches).sum::<u64>(), stats.batches);
        assert_eq!(stats.batch_sizes.buckets.iter().map(|bucket| bucket.count).sum::<u64>(), stats.batches);
        let keys: std::collections::HashSet<_> = records.iter().filter_map(|record| record.key.as_ref()).collect();
        assert_eq!((stats.keys.count, stats.keys.exact), (keys.len() as u64, true));
        let kept: u64 = batches.iter().map(|batch| batch.records.len() as u64).sum();
        let span = stats.end_offset.unwrap_or(0) - stats.first_offset.unwrap_or(0);
        assert_eq!(kept + stats.gaps.offsets, span as u64, "{partition}: {:?}", stats.gaps);
    }
    let codecs = stats(&target(&fixtures().join("dirs/codecs-0")), &|_| ()).unwrap().codecs;
    assert_eq!(codecs.keys().copied().collect::<Vec<_>>(), ["gzip", "lz4", "none", "snappy", "zstd"]);
    assert!(codecs.iter().all(|(name, codec)| (codec.ratio > 1.0) == (*name != "none")), "{codecs:?}");
}

#[test]
fn a_dump_may_begin_at_an_offset() {
    let path = fixtures().join("dirs/segments-0");
    let target = target(&path);
    let options = DumpOptions { records: false, from_offset: Some(6000) };
    let first = dump(&target, options).next().unwrap().unwrap();
    assert!((first.base_offset..=first.last_offset).contains(&6000), "{first:?}");
}

fn repaired(path: &Path, out: &Path) -> RepairReport {
    let files: Arc<dyn Files> = Arc::new(OsFiles::new());
    repair(&files, path, &RepairMode::Copy(out.to_owned()), &|_| ()).unwrap()
}

fn records_of(path: &Path) -> Vec<Record> {
    dumped(path).into_iter().filter(|batch| !batch.control).flat_map(|batch| batch.records).collect()
}

/// The records that a repair may lack are those that it says are lost, and no others.
fn only_the_lost_are_missing(before: &[Record], out: &Path, report: &RepairReport) {
    let lost = |offset: i64| report.lost.iter().any(|range| (range.from..=range.to).contains(&offset));
    let kept: Vec<_> = before.iter().filter(|record| !lost(record.offset)).collect();
    let found = records_of(out);
    let differs = found.iter().zip(&kept).find(|(found, kept)| found != *kept);
    assert!(
        differs.is_none() && found.len() == kept.len(),
        "{} of {}: {differs:?} {report:?}",
        found.len(),
        kept.len()
    );
    let report = verified(out);
    assert!(report.faults.is_empty(), "{report:?}");
}

#[test]
fn a_repair_of_what_is_whole_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for partition in PARTITIONS {
        let (path, out) = (fixtures().join("dirs").join(partition), dir.path().join(partition));
        let report = repaired(&path, &out);
        assert_eq!((&report.lost[..], &report.mended[..], report.dropped_bytes), (&[][..], &[][..], 0), "{partition}");
        only_the_lost_are_missing(&records_of(&path), &out, &report);
        for segment in &target(&path).segments {
            for extension in ["log", "index", "timeindex", "txnindex"] {
                let of = |dir: &Path| fs::read(dir.join(name(&segment.sibling(extension)))).unwrap_or_default();
                // Kafka adds an entry to the time index each time that it closes a log.
                if (extension, partition) != ("timeindex", "epochs-0") {
                    assert_eq!(of(&path), of(&out), "{partition} {extension}");
                }
            }
        }
        for entry in fs::read_dir(&out).unwrap() {
            let made = entry.unwrap().path();
            let Ok(original) = fs::read(path.join(name(&made))) else { continue };
            if name(&made).ends_with(producers::EXTENSION) {
                // Producers that expired are in the log still.
                let ours = snapshot_facts(&fs::read(&made).unwrap());
                assert!(
                    snapshot_facts(&original).iter().all(|fact| ours.contains(fact)),
                    "{}: {ours:?}",
                    made.display()
                );
            }
        }
        let of = |dir: &Path, file: &str| fs::read(dir.join(file)).unwrap();
        for file in [epochs::FILE_NAME, checkpoint::PARTITION_METADATA] {
            assert_eq!(of(&path, file), of(&out, file), "{partition}");
        }
    }
}

fn snapshot_facts(bytes: &[u8]) -> Vec<(i64, i16, i32, i64)> {
    let entries = producers::decode_snapshot(bytes).unwrap();
    entries
        .iter()
        .map(|entry| (entry.producer_id, entry.producer_epoch, entry.last_sequence, entry.last_offset))
        .collect()
}

#[test]
fn one_damaged_bit_costs_one_batch_at_most() {
    for partition in ["segments-0", "txn-0", "compacted-0", "epochs-0", "codecs-0"] {
        let (dir, path) = copy(partition);
        let whole = records_of(&path);
        let batches = dumped(&path);
        for (number, victim) in batches.iter().enumerate().step_by(batches.len() / 7 + 1) {
            let file = path.join(&victim.file);
            let bytes = fs::read(&file).unwrap();
            for at in [3, 7, 9, 11, 14, 16, 19, 22, 26, 60, victim.size as usize - 1] {
                // Without a `.crc` nothing contradicts a batch that moves a little within a gap.
                if (partition, at) == ("compacted-0", 7) {
                    continue;
                }
                let mut damaged = bytes.clone();
                damaged[victim.position as usize + at] ^= 4;
                fs::write(&file, &damaged).unwrap();
                let out = dir.path().join(format!("{number}-{at}"));
                let report = repaired(&path, &out);
                only_the_lost_are_missing(&whole, &out, &report);
                let offsets: i64 = report.lost.iter().map(|range| range.to - range.from + 1).sum();
                let of_victim = victim.last_offset - victim.base_offset + 1;
                // In a gap, which compaction left, a batch whose offsets are damaged might have lain anywhere.
                let anywhere = partition == "compacted-0" && (at < 8 || at == 26);
                assert!(offsets <= of_victim || anywhere, "{partition} {number} byte {at}: {report:?}");
                // Length, epoch and magic follow from what stands around them; nothing needs to be lost.
                assert!(
                    !matches!(at, 9 | 11 | 14 | 16) || report.lost.is_empty(),
                    "{partition} {number} byte {at}: {report:?}"
                );
                fs::remove_dir_all(&out).unwrap();
            }
            fs::write(&file, &bytes).unwrap();
        }
    }
}

#[test]
fn offsets_lost_at_the_end_are_never_given_again() {
    let (dir, path) = copy("segments-0");
    let file = path.join("00000000000000011432.log");
    let bytes = fs::read(&file).unwrap();
    let whole = records_of(&path);
    fs::write(&file, &bytes[..bytes.len() - 100_000]).unwrap();
    let out = dir.path().join("out");
    let report = repaired(&path, &out);
    assert_eq!(report.lost.last().map(|range| range.to), Some(13_999));
    only_the_lost_are_missing(&whole, &out, &report);
    let last = dumped(&out).pop().unwrap();
    assert_eq!((last.last_offset, last.count), (13_999, 0));
}

#[test]
fn a_repair_in_place_keeps_the_original_and_survives_being_cut_short() {
    let (dir, path) = copy("epochs-0");
    let file = path.join("00000000000000000000.log");
    let mut bytes = fs::read(&file).unwrap();
    bytes[300] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let files: Arc<dyn Files> = Arc::new(OsFiles::new());
    // Between the two renames of an earlier attempt, a crash.
    fs::rename(&path, dir.path().join("epochs-0.00000000000000000000000000000007-stray")).unwrap();
    let report = repair(&files, &path, &RepairMode::InPlace, &|_| ()).unwrap();
    assert_eq!(report.lost.len(), 1);
    assert!(verified(&path).faults.is_empty());
    let original = PathBuf::from(report.original.unwrap());
    assert_eq!(fs::read(original.join("00000000000000000000.log")).unwrap(), bytes);
    let lock = files.lock(&dir.path().join(checkpoint::LOCK)).unwrap();
    assert!(matches!(repair(&files, &path, &RepairMode::InPlace, &|_| ()), Err(InspectError::Refused { .. })));
    drop(lock);
    let in_the_way = repair(&files, &path, &RepairMode::Copy(original), &|_| ());
    assert!(matches!(in_the_way, Err(InspectError::InTheWay(_))));
}
