//! Letting go of the beginning and the end of a log: retention, delete-records, truncation, recycled files.

mod common;

use std::path::Path;

use common::*;
use headwater_proto::batch::BuildOptions;
use headwater_storage::{
    BatchOutcome, Cleanup, Log, LogConfig, LogError, NewBatch, OpenHints, ReadError, SequenceError,
};

/// About ten batches a segment.
fn config() -> LogConfig {
    LogConfig { segment_bytes: 1000, index_interval_bytes: 100, retention_ms: None, ..LogConfig::default() }
}

fn append(log: &mut Log, count: usize, timestamp: i64, now: i64) {
    for _ in 0..count {
        log.append(&[one(&[7; 20], timestamp)], 1, now).unwrap();
    }
}

fn log_files(dir: &Path, end: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(end))
        .collect();
    names.sort();
    names
}

#[test]
fn old_segments_go_and_a_held_slice_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { retention_ms: Some(1000), recycled_segments: 0, ..config() };
    let (mut log, _) = open(dir.path(), &config, OpenHints::default());
    append(&mut log, 35, NOW, NOW);
    append(&mut log, 30, NOW + 5000, NOW + 5000);
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let slice = reader.read(&mut cursor, 100, i64::MAX).unwrap().unwrap();
    let held = slice.bytes();
    let copy = held.to_vec();
    assert_eq!(log.enforce_retention(NOW + 900, 65).unwrap(), None);
    // Nothing at or above the high watermark goes.
    assert_eq!(log.enforce_retention(NOW + 5900, 5).unwrap(), None);
    let start = log.enforce_retention(NOW + 5900, 65).unwrap().unwrap();
    assert!((20..=35).contains(&start), "{start}");
    assert_eq!((reader.log_start_offset(), log.log_start_offset()), (start, start));
    assert!(!log_files(dir.path(), ".log").contains(&format!("{:020}.log", 0)));
    assert_eq!(held, copy);
    // The batch that was begun is read to its end, and nothing after it.
    let rest = reader.read(&mut cursor, 100, i64::MAX).unwrap().unwrap().bytes();
    assert_eq!(values([copy, rest.to_vec()].concat()).len(), 2);
    assert!(matches!(reader.read(&mut cursor, 100, i64::MAX), Err(ReadError::OutOfRange(_))));
    assert_eq!(all(&log).len() as i64, 65 - start);
    // The segment that is written goes too, once everything in it is old.
    assert_eq!(log.enforce_retention(NOW + 50_000, 65).unwrap(), Some(65));
    assert_eq!((reader.log_start_offset(), reader.log_end_offset(), reader.segment_count()), (65, 65, 1));
    assert_eq!(log_files(dir.path(), ".log").len(), 1);
}

#[test]
fn history_that_is_loaded_today_is_not_deleted_tonight() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { retention_ms: Some(7 * 86_400_000), ..config() };
    let (mut log, _) = open(dir.path(), &config, OpenHints::default());
    append(&mut log, 50, NOW - 900 * 86_400_000, NOW);
    assert_eq!(log.enforce_retention(NOW + 6 * 86_400_000, 50).unwrap(), None);
    assert_eq!(log.enforce_retention(NOW + 8 * 86_400_000, 50).unwrap(), Some(50));
}

#[test]
fn by_size_at_least_the_retention_remains() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { retention_bytes: Some(2500), ..config() };
    let (mut log, _) = open(dir.path(), &config, OpenHints::default());
    append(&mut log, 60, NOW, NOW);
    let before = log.size_bytes();
    assert!(before > 5000);
    log.enforce_retention(NOW, 60).unwrap().unwrap();
    assert!(log.size_bytes() >= 2500 && log.size_bytes() < 3500, "{}", log.size_bytes());
    assert_eq!(log.enforce_retention(NOW, 60).unwrap(), None);
    // A log that is only compacted is not cut.
    log.set_config(LogConfig { cleanup: Cleanup { delete: false, compact: true }, retention_bytes: Some(0), ..config });
    assert_eq!(log.enforce_retention(NOW + 1, 60).unwrap(), None);
}

#[test]
fn deleted_records_stay_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &config(), OpenHints::default());
    append(&mut log, 60, NOW, NOW);
    assert!(matches!(log.delete_records(61, 60, NOW), Err(LogError::OutOfRange(_))));
    assert!(matches!(log.delete_records(41, 40, NOW), Err(LogError::OutOfRange(_))));
    assert_eq!(log.delete_records(33, 60, NOW).unwrap(), 33);
    assert_eq!(log.delete_records(20, 60, NOW).unwrap(), 33);
    let reader = log.reader();
    assert!(matches!(reader.seek(32), Err(ReadError::OutOfRange(_))));
    assert_eq!(all(&log).first().map(|(offset, _)| *offset), Some(33));
    assert_eq!(reader.offset_for_timestamp(0, 60).unwrap().map(|found| found.offset), Some(33));
    drop(log);
    let hints = OpenHints { log_start_offset: 33, recovery_point: 60, ..OpenHints::default() };
    let (mut log, _) = open(dir.path(), &config(), hints);
    assert_eq!(all(&log).first().map(|(offset, _)| *offset), Some(33));
    assert_eq!(log.delete_records(60, 60, NOW).unwrap(), 60);
    assert_eq!((log.reader().segment_count(), log.size_bytes()), (1, 0));
    append(&mut log, 1, NOW, NOW);
    assert_eq!(all(&log).first().map(|(offset, _)| *offset), Some(60));
}

#[test]
fn a_log_start_beyond_what_a_crash_left_gives_no_offset_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &config(), OpenHints::default());
    append(&mut log, 5, NOW, NOW);
    drop(log);
    let hints = OpenHints { log_start_offset: 9, ..OpenHints::default() };
    for _ in 0..2 {
        let (log, _) = open(dir.path(), &config(), hints);
        assert_eq!((log.log_start_offset(), log.log_end_offset()), (9, 9));
    }
    let (mut log, _) = open(dir.path(), &config(), hints);
    append(&mut log, 1, NOW, NOW);
    assert_eq!(all(&log).first().map(|(offset, _)| *offset), Some(9));
}

fn sequenced(sequence: i32) -> NewBatch {
    let options =
        BuildOptions { producer_id: 5, producer_epoch: 0, base_sequence: sequence, ..BuildOptions::default() };
    batch_of(options, NOW, &[b"v"])
}

#[test]
fn truncation_takes_back_records_producers_and_epochs() {
    for to in [0i64, 1, 7, 11, 12, 23, 24] {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path(), &config(), OpenHints::default());
        for n in 0..25 {
            log.append(&[sequenced(n)], 1 + n / 12, NOW).unwrap();
        }
        let reader = log.reader();
        let mut cursor = reader.seek(0).unwrap();
        let kept = reader.read(&mut cursor, 1 << 20, i64::MAX).unwrap().unwrap().bytes();
        let copy = kept.to_vec();
        log.truncate(to, NOW).unwrap();
        assert_eq!(kept, copy);
        assert_eq!((log.log_end_offset(), log.flushed_offset()), (to, to));
        assert_eq!(all(&log).len() as i64, to);
        assert_eq!(log.leader_epochs().latest(), [None, Some(1), Some(2)][(to as usize).div_ceil(12).min(2)]);
        let next = SequenceError::OutOfOrder { given: 25, expected: to as i32 };
        let unknown = SequenceError::UnknownProducer { given: 25 };
        let expected = if to == 0 { unknown } else { next };
        assert_eq!(log.append(&[sequenced(25)], 3, NOW).unwrap(), [BatchOutcome::Refused(expected)]);
        log.append(&[sequenced(to as i32)], 3, NOW).unwrap();
        let everything = all(&log);
        drop(log);
        let hints = OpenHints { recovery_point: to, ..OpenHints::default() };
        let (log, report) = open(dir.path(), &config(), hints);
        assert!(report.cut.is_none() && report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{report:?}");
        assert_eq!(all(&log), everything);
        log.close().unwrap();
    }
}

#[test]
fn a_log_can_begin_anew_at_any_offset() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &config(), OpenHints::default());
    append(&mut log, 30, NOW, NOW);
    log.truncate_and_restart_at(500, NOW).unwrap();
    append(&mut log, 3, NOW, NOW);
    assert_eq!(all(&log).iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), [500, 501, 502]);
    assert_eq!(log_files(dir.path(), ".log"), [format!("{:020}.log", 500)]);
    drop(log);
    let (log, _) =
        open(dir.path(), &config(), OpenHints { recovery_point: 500, log_start_offset: 500, ..Default::default() });
    assert_eq!(log.log_end_offset(), 503);
}

#[test]
fn a_deleted_segments_file_is_written_again_unless_somebody_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { retention_bytes: Some(1500), recycled_segments: 2, ..config() };
    let (mut log, _) = open(dir.path(), &config, OpenHints::default());
    let inode = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(dir.path().join(name)).unwrap().ino()
    };
    append(&mut log, 45, NOW, NOW);
    let names = log_files(dir.path(), ".log");
    let inodes: Vec<u64> = names.iter().map(|name| inode(name)).collect();
    // Somebody reads the second segment.
    let reader = log.reader();
    let second: i64 = names[1][..20].parse().unwrap();
    let mut cursor = reader.seek(second).unwrap();
    let held = reader.read(&mut cursor, 10_000, i64::MAX).unwrap().unwrap().bytes();
    let copy = held.to_vec();
    log.enforce_retention(NOW, 45).unwrap().unwrap();
    let kept = log_files(dir.path(), ".deleted");
    assert!(!kept.is_empty() && kept.len() <= 2, "{kept:?}");
    assert!(!kept.iter().any(|name| inode(name) == inodes[1]), "the file that is held is not kept");
    let expected_start = log.log_start_offset();
    append(&mut log, 45, NOW, NOW);
    assert_eq!(held, copy);
    let reused = log_files(dir.path(), ".log").iter().filter(|name| inodes.contains(&inode(name))).count();
    assert!(reused >= 2, "{reused}");
    assert_eq!(all(&log).len() as i64, 90 - expected_start);
    // A crash now leaves stale batches behind the end of the newest segment; they do not come back.
    drop(log);
    let (log, report) = open(dir.path(), &config, OpenHints { recovery_point: 45, ..OpenHints::default() });
    assert_eq!((report.cut, log.log_end_offset()), (None, 90));
    assert_eq!(all(&log).len() as i64, 90 - expected_start);
    assert!(log_files(dir.path(), ".deleted").is_empty());
    log.close().unwrap();
}

#[test]
fn segments_roll_by_record_time_by_clock_and_by_a_full_index() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { segment_ms: 1000, ..LogConfig::default() };
    let (mut log, _) = open(&dir.path().join("a"), &config, OpenHints::default());
    append(&mut log, 3, NOW, NOW);
    append(&mut log, 3, NOW + 1000, NOW);
    assert_eq!(log.reader().segment_count(), 1);
    append(&mut log, 1, NOW + 1001, NOW);
    assert_eq!(log.reader().segment_count(), 2);
    assert!(!log.roll_if_due(NOW + 999).unwrap());
    assert!(log.roll_if_due(NOW + 1000).unwrap());
    assert!(!log.roll_if_due(NOW + 100_000).unwrap(), "an empty segment stays");
    let config = LogConfig { segment_index_bytes: 10 * 12, index_interval_bytes: 0, ..LogConfig::default() };
    let (mut log, _) = open(&dir.path().join("b"), &config, OpenHints::default());
    (0..40).for_each(|n| append(&mut log, 1, NOW + n, NOW));
    assert!(log.reader().segment_count() >= 4);
    assert_eq!(all(&log).len(), 40);
}
