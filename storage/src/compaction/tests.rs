//! Against a model in memory, and against a power failure in every operation.

use std::collections::BTreeMap;

use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchBuilder, BuildOptions, Codec, Record, Records};
use proptest::prelude::*;

use super::*;
use crate::checkpoint;
use crate::config::{Cleanup, OpenHints};
use crate::inspect::{self, Target};
use crate::log::NewBatch;
use crate::producers;
use crate::reader::LogReader;
use crate::sim::SimFiles;

const DIR: &str = "/t-0";
const NOW: i64 = 1_700_000_000_000;

fn identity() -> LogIdentity {
    LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([9; 16]), partition: 0 }
}

fn config() -> LogConfig {
    LogConfig {
        segment_bytes: 2_000,
        index_interval_bytes: 200,
        cleanup: Cleanup { delete: false, compact: true },
        delete_retention_ms: 1_000,
        min_cleanable_dirty_ratio: 0.0,
        ..LogConfig::default()
    }
}

fn open(files: &Arc<dyn Files>, config: LogConfig, hints: OpenHints) -> Log {
    Log::open(Arc::clone(files), Path::new(DIR), identity(), config, hints, NOW).unwrap().0
}

/// A batch of these keys and values, of an idempotent producer if one is named.
fn batch_of(records: &[(u8, Option<u8>)], codec: Codec, producer: Option<(i64, i32)>) -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions { codec, ..BuildOptions::default() });
    for (key, value) in records {
        let value = value.map(|value| vec![value; 40]);
        builder.append(NOW, Some(&[b'k', *key]), value.as_deref(), &[]);
    }
    if let Some((id, sequence)) = producer {
        builder.set_producer(id, 0, sequence);
    }
    let bytes = builder.build().unwrap();
    NewBatch { header: batch::check(&bytes).unwrap(), bytes }
}

fn append(log: &mut Log, batch: NewBatch) {
    log.append(&[batch], 0, NOW).unwrap();
}

fn records(reader: &LogReader) -> Vec<Record> {
    let mut cursor = reader.seek(reader.log_start_offset()).unwrap();
    let mut bytes = Vec::new();
    while let Some(slice) = reader.read(&mut cursor, 700, i64::MAX).unwrap() {
        bytes.extend_from_slice(&slice.bytes());
    }
    let bytes = Bytes::from(bytes);
    let mut records = Vec::new();
    for item in batch::Batches::new(&bytes) {
        let (position, header, _) = item.unwrap();
        let batch = bytes.slice(position..position + header.size());
        batch::check(&batch).unwrap();
        records.extend(Records::new(&batch).unwrap().map(|record| record.unwrap()));
    }
    records
}

/// Compacts whatever can be, once.
fn compact(log: &mut Log, now_ms: i64, cleaned_until: Option<i64>, memory: usize) -> Option<i64> {
    let plan = log.plan_compaction(now_ms, log.log_end_offset(), cleaned_until).unwrap()?;
    let result = plan.run(memory, &|| false).unwrap();
    Some(log.install(result, log.recovery_point()).unwrap())
}

/// The last value of every key survives, tombstones maybe; nothing moved, nothing was made up, nothing newer than `clean` is missing.
fn check(before: &[Record], after: &[Record], clean: i64) {
    assert!(after.windows(2).all(|pair| pair[0].offset < pair[1].offset), "the order is kept");
    let by_offset: BTreeMap<i64, &Record> = before.iter().map(|record| (record.offset, record)).collect();
    for record in after {
        assert_eq!(by_offset.get(&record.offset), Some(&record), "an offset never changes");
    }
    let kept: BTreeMap<i64, &Record> = after.iter().map(|record| (record.offset, record)).collect();
    let last: BTreeMap<_, _> = before.iter().map(|record| (record.key.clone(), record)).collect();
    for record in before {
        let is_last = last.get(&record.key).is_some_and(|last| last.offset == record.offset);
        if record.offset >= clean || is_last && record.value.is_some() {
            assert!(kept.contains_key(&record.offset), "offset {} is missing; clean up to {clean}", record.offset);
        }
    }
}

fn verified(files: &Arc<dyn Files>) -> inspect::VerifyReport {
    inspect::verify(&Target::open(Arc::clone(files), Path::new(DIR)).unwrap(), &|_| ()).unwrap()
}

fn verify(files: &Arc<dyn Files>) {
    let report = verified(files);
    assert!(report.faults.is_empty(), "{report:?}");
}

/// Writes the cleaner's checkpoint, as a broker does after each compaction.
fn checkpoint_cleaned(files: &Arc<dyn Files>, until: i64) {
    let offsets = [(("t".to_owned(), 0), until)].into_iter().collect();
    checkpoint::write_offsets(&**files, Path::new("/"), checkpoint::CLEANER_OFFSETS, &offsets).unwrap();
}

fn sim(seed: u64) -> (Arc<SimFiles>, Arc<dyn Files>) {
    let sim = SimFiles::new(seed);
    (Arc::clone(&sim), sim)
}

fn fill(log: &mut Log, batches: &[Vec<(u8, Option<u8>)>]) {
    let mut sequence = 0;
    for (number, records) in batches.iter().enumerate() {
        let codec = if number % 3 == 0 { Codec::Lz4 } else { Codec::None };
        let producer = (number % 2 == 0).then_some((7, sequence));
        append(log, batch_of(records, codec, producer));
        if producer.is_some() {
            sequence += records.len() as i32;
        }
    }
    log.flush().unwrap();
}

/// Batches over few keys, with tombstones; or single records over many keys, of which compaction takes hardly any.
fn batches() -> impl Strategy<Value = Vec<Vec<(u8, Option<u8>)>>> {
    let batches = |keys: u8, most: usize| {
        let record = (0..keys, prop::option::weighted(0.8, any::<u8>()));
        prop::collection::vec(prop::collection::vec(record, 1..most), 20..90)
    };
    prop_oneof![batches(12, 6), batches(255, 2)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn the_last_value_of_every_key_survives(batches in batches(), memory in prop::sample::select(vec![160usize, 400, 1 << 20])) {
        let (_, files) = sim(1);
        let mut log = open(&files, config(), OpenHints::default());
        fill(&mut log, &batches);
        let (before, end) = (records(&log.reader()), log.log_end_offset());
        let bytes = log.size_bytes();
        let mut clean = None;
        for round in 0..40 {
            let Some(until) = compact(&mut log, NOW + round, clean, memory) else { break };
            prop_assert!(Some(until) > clean);
            clean = Some(until);
            check(&before, &records(&log.reader()), until);
        }
        // A delete horizon takes the place of a batch's base timestamp, and the records' distance from it takes a byte more, or two.
        prop_assert!(log.size_bytes() <= bytes + 2 * before.len() as u64);
        prop_assert_eq!(log.log_end_offset(), end);
        let reached = log.last_sequence(7);
        log.close().unwrap();
        checkpoint_cleaned(&files, clean.unwrap_or(0));
        verify(&files);
        let log = open(&files, config(), OpenHints { clean_shutdown: true, ..OpenHints::default() });
        prop_assert_eq!(log.log_end_offset(), end);
        prop_assert_eq!(log.last_sequence(7), reached);
        check(&before, &records(&log.reader()), clean.unwrap_or(0));
    }
}

/// A log of which every key was written often, on a disk that has it all.
fn prepared(seed: u64) -> (Arc<SimFiles>, Log, Vec<Record>) {
    let (sim, files) = sim(seed);
    let mut log = open(&files, config(), OpenHints::default());
    let batches: Vec<Vec<(u8, Option<u8>)>> =
        (0..60u8).map(|n| (0..4).map(|m| ((n * 3 + m) % 11, (n % 5 != 0).then_some(n))).collect()).collect();
    fill(&mut log, &batches);
    let before = records(&log.reader());
    (sim, log, before)
}

#[test]
fn a_power_failure_in_any_operation_loses_nothing() {
    let (sim, mut log, _) = prepared(0);
    let operations = {
        let before = sim.operations();
        compact(&mut log, NOW, None, 1 << 20).unwrap();
        sim.operations() - before
    };
    let (mut old, mut new) = (0, 0);
    for stop in 0..=operations {
        for seed in 0..if std::env::var_os("HEADWATER_THOROUGH").is_some() { 10 } else { 1 } {
            let (sim, mut log, before) = prepared(stop * 10 + seed);
            let (end, flushed) = (log.log_end_offset(), log.recovery_point());
            sim.power_off_after(stop);
            let bound = log.plan_compaction(NOW, end, None).unwrap().unwrap().upper_bound();
            let done = log.plan_compaction(NOW, end, None).unwrap().unwrap().run(1 << 20, &|| false);
            if let Ok(result) = done {
                let _ = log.install(result, flushed);
            }
            drop(log);
            let files: Arc<dyn Files> = sim.crash();
            let hints = OpenHints { recovery_point: flushed, ..OpenHints::default() };
            let mut log = open(&files, config(), hints);
            assert_eq!(log.log_end_offset(), end, "power failed after {stop} operations");
            let after = records(&log.reader());
            check(&before, &after, bound);
            if after.len() == before.len() {
                old += 1
            } else {
                new += 1
            }
            assert!(
                files
                    .list(Path::new(DIR))
                    .unwrap()
                    .iter()
                    .all(|entry| !entry.name.ends_with("cleaned") && !entry.name.ends_with("swap"))
            );
            compact(&mut log, NOW, None, 1 << 20);
            check(&before, &records(&log.reader()), bound);
            append(&mut log, batch_of(&[(1, Some(1))], Codec::None, None));
            log.close().unwrap();
            verify(&files);
        }
    }
    assert!(old > 0 && new > 0, "{old} {new}");
}

#[test]
fn readers_go_on_with_what_stayed() {
    let (_, mut log, before) = prepared(3);
    let reader = log.reader();
    let mut held = reader.seek(0).unwrap();
    // Half a batch has been handed out when its segment is replaced.
    let first = reader.read(&mut held, 100, i64::MAX).unwrap().unwrap().bytes();
    let mut behind = reader.seek(before[30].offset).unwrap();
    let until = compact(&mut log, NOW, None, 1 << 20).unwrap();
    let mut bytes = first.to_vec();
    while let Some(slice) = reader.read(&mut held, 100, i64::MAX).unwrap() {
        bytes.extend_from_slice(&slice.bytes());
    }
    let mut offsets = Vec::new();
    for item in batch::Batches::new(&bytes) {
        offsets.push(item.unwrap().1.base_offset);
    }
    assert_eq!(offsets[0], 0);
    assert!(offsets.windows(2).all(|pair| pair[0] < pair[1]));
    let slice = reader.read(&mut behind, 1 << 20, i64::MAX).unwrap().unwrap();
    let (_, header, _) = batch::Batches::new(&slice.bytes()).next().unwrap().unwrap();
    assert!(header.last_offset() >= before[30].offset);
    assert!(until > 0);
    let found = reader.offset_for_timestamp(NOW, i64::MAX).unwrap().unwrap();
    assert_eq!(found.offset, records(&reader)[0].offset);
}

#[test]
fn tombstones_stay_until_their_time_has_passed() {
    let (_, files) = sim(1);
    let mut log = open(&files, config(), OpenHints::default());
    append(&mut log, batch_of(&[(1, Some(1)), (2, Some(2))], Codec::None, None));
    append(&mut log, batch_of(&[(1, None)], Codec::None, None));
    log.roll(NOW).unwrap();
    let kept = |log: &Log| {
        records(&log.reader()).iter().map(|record| (record.offset, record.value.is_some())).collect::<Vec<_>>()
    };
    let clean = compact(&mut log, NOW, None, 1 << 20);
    assert_eq!((clean, kept(&log)), (Some(3), vec![(1, true), (2, false)]));
    assert_eq!(compact(&mut log, NOW, clean, 1 << 20), None, "nothing is new");
    append(&mut log, batch_of(&[(3, Some(3))], Codec::None, None));
    log.roll(NOW).unwrap();
    let clean = compact(&mut log, NOW + 999, clean, 1 << 20);
    assert_eq!(kept(&log), [(1, true), (2, false), (3, true)]);
    append(&mut log, batch_of(&[(4, Some(4))], Codec::None, None));
    log.roll(NOW).unwrap();
    compact(&mut log, NOW + 1_000, clean, 1 << 20);
    assert_eq!(kept(&log), [(1, true), (3, true), (4, true)]);
}

#[test]
fn the_last_batch_of_a_producer_stays_even_empty() {
    let (_, files) = sim(1);
    let mut log = open(&files, config(), OpenHints::default());
    append(&mut log, batch_of(&[(1, Some(1))], Codec::None, Some((7, 0))));
    append(&mut log, batch_of(&[(1, Some(2))], Codec::None, Some((7, 1))));
    append(&mut log, batch_of(&[(1, Some(3))], Codec::None, None));
    log.roll(NOW).unwrap();
    compact(&mut log, NOW, None, 1 << 20);
    assert_eq!(records(&log.reader()).iter().map(|record| record.offset).collect::<Vec<_>>(), [2]);
    log.close().unwrap();
    for entry in files.list(Path::new(DIR)).unwrap() {
        if entry.name.ends_with(producers::EXTENSION) {
            files.remove_file(&Path::new(DIR).join(entry.name)).unwrap();
        }
    }
    // Without its snapshots, what is known of the producer comes from the batches.
    let mut log = open(&files, config(), OpenHints { clean_shutdown: true, ..OpenHints::default() });
    let last = log.last_sequence(7).unwrap();
    assert_eq!((last.sequence, last.offset), (1, 1));
    let outcome = log.append(&[batch_of(&[(1, Some(2))], Codec::None, Some((7, 1)))], 0, NOW).unwrap();
    assert_eq!(outcome, [crate::BatchOutcome::Duplicate { base_offset: 1, last_offset: 1 }]);
}

/// Whoever copies a compacted log learns from its batches where each epoch began. If it took one for later than it was, a replica that
/// wrote on in the epoch before would be told to keep what nobody else has.
#[test]
fn a_copy_of_a_compacted_log_knows_where_each_epoch_began() {
    let (_, files) = sim(5);
    let mut log = open(&files, config(), OpenHints::default());
    for (epoch, keys) in [(0, 0..10), (1, 0..10), (4, 0..20), (5, 0..40), (5, 0..40)] {
        for key in keys {
            log.append(&[batch_of(&[(key, Some(key))], Codec::None, None)], epoch, NOW).unwrap();
        }
    }
    log.flush().unwrap();
    log.roll(NOW).unwrap();
    let clean = compact(&mut log, NOW, None, 1 << 20).unwrap();
    assert!(records(&log.reader()).len() <= 50, "clean up to {clean}");
    let (_, elsewhere) = sim(6);
    let mut copy = open(&elsewhere, config(), OpenHints::default());
    let mut cursor = log.reader().seek(0).unwrap();
    while let Some(slice) = log.reader().read(&mut cursor, 1 << 20, i64::MAX).unwrap() {
        let bytes = Bytes::from(slice.bytes().to_vec());
        for item in batch::Batches::new(&bytes) {
            let (position, header, _) = item.unwrap();
            let bytes = bytes.slice(position..position + header.size());
            copy.append_as_follower(&[NewBatch { header, bytes }], &[], NOW).unwrap();
        }
    }
    // The first epoch has no other before it, and nothing of it may be left.
    let later = |log: &Log| log.leader_epochs().entries().iter().filter(|it| it.epoch > 0).copied().collect::<Vec<_>>();
    assert_eq!(later(&copy), later(&log));
    assert_eq!(later(&log).len(), 3);
}

#[test]
fn young_records_and_those_above_the_high_watermark_are_left_alone() {
    let (_, mut log, _) = prepared(1);
    let end = log.log_end_offset();
    let bound = |log: &Log, high_watermark| {
        log.plan_compaction(NOW, high_watermark, None).unwrap().map(|plan| plan.upper_bound())
    };
    let whole = bound(&log, end).unwrap();
    assert_eq!(whole, log.active.segment.base_offset);
    assert!(bound(&log, whole - 1).unwrap() < whole);
    assert_eq!(bound(&log, 1), None);
    log.set_config(LogConfig { min_compaction_lag_ms: 1, ..config() });
    assert_eq!(bound(&log, end), None);
    log.set_config(LogConfig { min_cleanable_dirty_ratio: 1.0, ..config() });
    assert_eq!(bound(&log, end), None);
    log.set_config(LogConfig { min_cleanable_dirty_ratio: 1.0, max_compaction_lag_ms: 0, ..config() });
    assert_eq!(log.plan_compaction(NOW + 1, end, None).unwrap().map(|plan| plan.upper_bound()), Some(whole));
    log.set_config(LogConfig { cleanup: Cleanup { delete: true, compact: false }, ..config() });
    assert_eq!(bound(&log, end), None);
}

#[test]
fn a_compaction_of_segments_that_are_gone_is_dropped() {
    let (sim, mut log, before) = prepared(1);
    let end = log.log_end_offset();
    let result = log.plan_compaction(NOW, end, None).unwrap().unwrap().run(1 << 20, &|| false).unwrap();
    log.delete_records(before[20].offset, end, NOW).unwrap();
    let recovery_point = log.recovery_point();
    log.install(result, recovery_point).unwrap();
    let left: Vec<Record> = before.iter().filter(|record| record.offset >= log.log_start_offset()).cloned().collect();
    check(
        &left,
        &records(&log.reader())
            .into_iter()
            .filter(|record| record.offset >= log.log_start_offset())
            .collect::<Vec<_>>(),
        log.active.segment.base_offset,
    );
    let result = log.plan_compaction(NOW, end, None).unwrap().unwrap().run(1 << 20, &|| false).unwrap();
    assert!(matches!(log.install(result, 0), Err(LogError::Misuse(_))));
    let plan = log.plan_compaction(NOW, end, None).unwrap().unwrap();
    assert!(matches!(plan.run(1 << 20, &|| true), Err(CompactionError::Cancelled)));
    let files: Arc<dyn Files> = sim;
    assert!(files.list(Path::new(DIR)).unwrap().iter().all(|entry| !entry.name.ends_with("cleaned")));
    log.close().unwrap();
    verify(&files);
}

#[test]
fn a_damaged_batch_stops_a_compaction_by_name() {
    let (sim, log, _) = prepared(1);
    let end = log.log_end_offset();
    let path = Path::new(DIR).join("00000000000000000000.log");
    let file = sim.open(&path, crate::OpenMode::Write).unwrap();
    let plan = log.plan_compaction(NOW, end, None).unwrap().unwrap();
    drop(log);
    let files: Arc<dyn Files> = sim;
    let mut byte = [0];
    file.read_at(&mut byte, 100).unwrap();
    let aside = Path::new("/damaged");
    let mut bytes = files::read(&*files, &path, 1 << 20).unwrap();
    bytes[100] ^= 1;
    crate::rewrite::write_synced(&*files, aside, &bytes).unwrap();
    files.rename(aside, &path).unwrap();
    for entry in &plan.segments {
        // Opened anew, as after many others were opened.
        entry.segment.retire();
    }
    assert!(matches!(plan.run(1 << 20, &|| false), Err(CompactionError::Departed)));
    let log = open(&files, config(), OpenHints { clean_shutdown: true, ..OpenHints::default() });
    let plan = log.plan_compaction(NOW, end, None).unwrap().unwrap();
    let Err(CompactionError::Corruption(corruption)) = plan.run(1 << 20, &|| false) else { panic!("not found") };
    assert_eq!((corruption.path, corruption.position), (path, 0));
}

#[test]
fn small_segments_become_one() {
    let (_, files) = sim(1);
    let mut log = open(&files, config(), OpenHints::default());
    for key in 0..8 {
        append(&mut log, batch_of(&[(key, Some(key))], Codec::None, None));
        log.roll(NOW).unwrap();
    }
    assert_eq!(log.reader().segment_count(), 9);
    let before = records(&log.reader());
    compact(&mut log, NOW, None, 1 << 20);
    assert_eq!(log.reader().segment_count(), 2);
    assert_eq!(records(&log.reader()), before);
    log.close().unwrap();
    verify(&files);
}

/// One of Kafka's directories, opened as a compacted log of ours and compacted.
fn compacted(topic: &str, root: &Path) -> (Arc<dyn Files>, Log, Vec<Record>) {
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs/dirs").join(format!("{topic}-0"));
    let dir = root.join(format!("{topic}-0"));
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(fixture).unwrap() {
        let entry = entry.unwrap();
        std::fs::write(dir.join(entry.file_name()), std::fs::read(entry.path()).unwrap()).unwrap();
    }
    let files: Arc<dyn Files> = Arc::new(crate::OsFiles::new());
    let topic_id = crate::checkpoint::read_partition_metadata(&*files, &dir).unwrap().unwrap();
    let identity = LogIdentity { topic: topic.into(), topic_id, partition: 0 };
    let config = LogConfig { segment_bytes: 1 << 30, index_interval_bytes: 4096, ..config() };
    let (mut log, _) = Log::open(Arc::clone(&files), &dir, identity, config, OpenHints::default(), NOW).unwrap();
    log.roll(NOW).unwrap();
    let before = records(&log.reader());
    compact(&mut log, NOW, None, 64 << 20).unwrap();
    (files, log, before)
}

#[test]
fn kafkas_logs_are_compacted_and_verify() {
    let root = tempfile::tempdir().unwrap();
    for topic in ["segments", "compacted", "codecs", "shapes", "appendtime"] {
        let (files, log, before) = compacted(topic, root.path());
        let keyed: Vec<Record> = before.into_iter().filter(|record| record.key.is_some()).collect();
        let after = records(&log.reader());
        check(&keyed, &after, log.active.segment.base_offset);
        let keys: std::collections::BTreeSet<_> = keyed.iter().map(|record| &record.key).collect();
        assert_eq!(after.len(), keys.len(), "{topic}");
        let dir = log.dir().to_owned();
        log.close().unwrap();
        let report = inspect::verify(&Target::open(files, &dir).unwrap(), &|_| ()).unwrap();
        assert_eq!((&report.faults[..], &report.notes[..]), (&[][..], &[][..]), "{topic}");
    }
}

#[test]
fn aborted_transactions_supersede_nothing_and_open_ones_stay() {
    let root = tempfile::tempdir().unwrap();
    let (files, log, before) = compacted("txn", root.path());
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs/golden/txn-0.committed.records.jsonl");
    let text = std::fs::read_to_string(golden).unwrap();
    let committed =
        text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["offset"].as_i64().unwrap());
    // What read_committed does not see: an open transaction at offset 50, and a record behind it.
    let counts: std::collections::BTreeSet<i64> = committed.chain([51]).collect();
    let after: Vec<i64> = records(&log.reader()).iter().map(|record| record.offset).collect();
    let markers: Vec<i64> = before
        .iter()
        .filter(|record| record.key.as_ref().is_some_and(|key| key.starts_with(&[0, 0])))
        .map(|record| record.offset)
        .collect();
    let mut last = BTreeMap::new();
    for record in before.iter().filter(|record| counts.contains(&record.offset)) {
        last.insert(record.key.clone(), record.offset);
    }
    let mut expected: Vec<i64> = last.into_values().chain(markers).chain([50]).collect();
    expected.sort_unstable();
    assert_eq!(after, expected);
    let dir = log.dir().to_owned();
    log.close().unwrap();
    let report = inspect::verify(&Target::open(files, &dir).unwrap(), &|_| ()).unwrap();
    assert_eq!(report.faults, []);
}

/// Small segments of different keys, which compaction makes one of without taking a record.
fn distinct(log: &mut Log) {
    for key in 0..40 {
        append(log, batch_of(&[(key, Some(key)), (key + 40, Some(key))], Codec::None, None));
    }
    log.flush().unwrap();
    assert!(log.reader().segment_count() > 3);
}

/// Compaction held the `.log` that it was reading without its map, and the map is what retention looks at: delete-records in the
/// middle of a compaction let the next segment be written into the file, and compaction fenced the log for what it found there.
#[test]
fn a_segment_that_is_deleted_while_it_is_compacted_is_not_written_anew() {
    let (_, files) = sim(1);
    let config = LogConfig { recycled_segments: 1, ..config() };
    let mut log = open(&files, config, OpenHints::default());
    distinct(&mut log);
    let end = log.log_end_offset();
    let plan = log.plan_compaction(NOW, end, None).unwrap().unwrap();
    let log = std::cell::RefCell::new(log);
    let asked = std::cell::Cell::new(false);
    // Asked between opening the first segment and reading it.
    let meanwhile = || {
        if !asked.replace(true) {
            let mut log = log.borrow_mut();
            log.delete_records(end, end, NOW).unwrap();
            for key in 0..20 {
                let larger: Vec<(u8, Option<u8>)> = (0..7).map(|n| (key * 7 + n, Some(n))).collect();
                append(&mut log, batch_of(&larger, Codec::None, None));
            }
        }
        false
    };
    let compacted = plan.run(1 << 20, &meanwhile);
    assert!(matches!(compacted, Err(CompactionError::Departed)), "the first segment is read as it was: {compacted:?}");
    let log = log.into_inner();
    assert_eq!(records(&log.reader()).len(), 140);
    log.close().unwrap();
    verify(&files);
}

/// A fetch may hold bytes of a segment that were not checked yet while compaction puts another in its place. They were compared with
/// the `.crc` of that name, which is the other's by then, and a healthy partition was fenced.
#[test]
fn bytes_of_a_replaced_segment_are_not_compared_with_the_checksums_of_its_successor() {
    let (_, files) = sim(1);
    let mut log = open(&files, config(), OpenHints::default());
    distinct(&mut log);
    let end = log.log_end_offset();
    log.roll(NOW).unwrap();
    log.close().unwrap();
    let hints = OpenHints { clean_shutdown: true, recovery_point: end, log_start_offset: 0 };
    let mut log = open(&files, LogConfig { segment_bytes: 1 << 20, ..config() }, hints);
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let held = reader.read(&mut cursor, 1 << 20, i64::MAX).unwrap().unwrap();
    assert!(!held.is_resident(), "it is still to be checked");
    let before = log.reader().segment_count();
    compact(&mut log, NOW, None, 1 << 20).unwrap();
    assert!(log.reader().segment_count() < before);
    held.load().unwrap();
    assert!(held.is_resident());
    assert_eq!(records(&log.reader()).len(), 80);
}

/// Segments of single-record batches with these keys, the last segment but for the active one; compacted, and closed. Keys from 100 on
/// are written by an idempotent producer.
fn compacted_segments(segments: &[&[u8]]) -> (Arc<dyn Files>, i64) {
    let (_, files) = sim(1);
    let mut log = open(&files, config(), OpenHints::default());
    let mut sequence = 0;
    for keys in segments {
        for key in *keys {
            let producer = (*key >= 100).then_some((7, sequence));
            sequence += i32::from(*key >= 100);
            append(&mut log, batch_of(&[(*key, Some(1))], Codec::None, producer));
        }
        log.roll(NOW).unwrap();
    }
    // Each segment stays one of its own.
    log.set_config(LogConfig { segment_bytes: 1, ..config() });
    let until = compact(&mut log, NOW, None, 1 << 20).unwrap();
    log.close().unwrap();
    (files, until)
}

/// Offsets missing at a segment boundary were called a fault wherever they were the only ones that compaction took.
#[test]
fn a_single_gap_that_compaction_left_is_no_fault() {
    let cases: [(&str, &[&[u8]]); 6] = [
        ("the first segment", &[&[9], &[9, 1]]),
        ("one in the middle", &[&[1, 2], &[9], &[9, 3]]),
        ("the head of a segment", &[&[1, 2], &[9, 3], &[9, 4]]),
        ("the tail of a segment", &[&[1, 2, 9], &[9, 3], &[4]]),
        ("a tail and the next segment", &[&[1, 9], &[9], &[9, 3]]),
        ("a tail of a producer that a later snapshot names", &[&[1, 2, 100], &[3, 4], &[100, 5]]),
    ];
    for (case, segments) in cases {
        let (files, until) = compacted_segments(segments);
        checkpoint_cleaned(&files, until);
        let report = verified(&files);
        assert!(report.faults.is_empty(), "{case}: {report:?}");
        assert_eq!(report.notes.len(), 1, "{case}: {report:?}");
        // Without the cleaner's checkpoint, a tail looks like a lost segment.
        checkpoint_cleaned(&files, 0);
        let report = verified(&files);
        assert_eq!(report.faults.is_empty(), !case.contains("tail"), "{case}: {report:?}");
        // A repair then says what is lost, and leaves nothing that looks so. (Only compaction takes the head of a segment.)
        let out = Path::new("/filled/t-0");
        files.create_dir_all(Path::new("/filled")).unwrap();
        let report = inspect::repair(&files, Path::new(DIR), &inspect::RepairMode::Copy(out.into()), &|_| ()).unwrap();
        let is_lost = case.contains("tail") && !case.contains("next segment");
        assert_eq!(report.lost.is_empty(), !is_lost, "{case}: {report:?}");
        let report = inspect::verify(&Target::open(Arc::clone(&files), out).unwrap(), &|_| ()).unwrap();
        assert!(report.faults.is_empty(), "{case}: {report:?}");
        // A repaired copy of what the cleaner made verifies as it does.
        checkpoint_cleaned(&files, until);
        let out = Path::new("/copy/t-0");
        files.create_dir_all(Path::new("/copy")).unwrap();
        let report = inspect::repair(&files, Path::new(DIR), &inspect::RepairMode::Copy(out.into()), &|_| ()).unwrap();
        assert!(report.lost.is_empty(), "{case}: {report:?}");
        let report = inspect::verify(&Target::open(Arc::clone(&files), out).unwrap(), &|_| ()).unwrap();
        assert_eq!(report.faults.is_empty(), !case.contains("tail"), "{case}: {report:?}");
    }
}

/// Among the many gaps of a compacted log, those of a lost segment are told by what is left of it.
#[test]
fn a_segment_that_is_lost_from_a_compacted_log_is_named() {
    let segments: [&[u8]; 5] = [&[1, 9, 2], &[9, 3, 8], &[9, 4], &[9, 5, 8, 6], &[9, 8]];
    let lost = Path::new(DIR).join("00000000000000000006.log");
    for left in ["", ".index", ".timeindex", ".crc"] {
        let (files, until) = compacted_segments(&segments);
        checkpoint_cleaned(&files, until);
        verify(&files);
        files.remove_file(&lost).unwrap();
        for extension in [".index", ".timeindex", ".crc"] {
            if !left.is_empty() && left != extension {
                files.remove_file(&lost.with_extension(&extension[1..])).unwrap();
            }
        }
        let faults = verified(&files).faults;
        assert!(
            faults.iter().any(|fault| lost.ends_with(&fault.file) && fault.offset == Some(6)),
            "{left}: {faults:?}"
        );
    }
    // While a compaction is being put in place, files are there without their `.log`.
    let (files, _) = compacted_segments(&segments);
    files.remove_file(&lost).unwrap();
    files.open(&Path::new(DIR).join("00000000000000000000.log.swap"), crate::OpenMode::Create).unwrap();
    verify(&files);
}
