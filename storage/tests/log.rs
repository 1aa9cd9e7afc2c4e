//! The log on real files: what is appended is read back, and survives being closed, dropped and opened again.

mod common;

use common::*;
use headwater_proto::batch::{self, BuildOptions};
use headwater_storage::{AppendError, LogConfig, NewBatch, OpenHints, ReadError};

#[test]
fn what_is_appended_is_read_in_pieces_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let expected = fill(&mut log, 200);
    assert!(log.reader().segment_count() > 3);
    let reader = log.reader();
    for piece in [1, 7, 61, 100, 1000, 1 << 20] {
        for start in [0, 1, 57, 199, 200] {
            let mut cursor = reader.seek(start).unwrap();
            let bytes = bytes_from(&reader, &mut cursor, piece, i64::MAX);
            assert_eq!(values(bytes), expected[start as usize..], "from {start} by {piece}");
        }
    }
}

#[test]
fn nothing_at_or_beyond_the_limit_is_read_and_the_next_offset_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let expected = fill(&mut log, 100);
    let reader = log.reader();
    for below in [0, 1, 40, 99, 100] {
        for piece in [50, 130, 1 << 20] {
            let mut cursor = reader.seek(0).unwrap();
            let mut bytes = Vec::new();
            while let Some(slice) = reader.read(&mut cursor, piece, below).unwrap() {
                bytes.extend_from_slice(&slice.bytes());
                let complete = batch::Batches::new(&bytes).take_while(Result::is_ok).count() as i64;
                assert_eq!(slice.next_offset().unwrap(), complete);
            }
            assert_eq!(values(bytes), expected[..below as usize]);
        }
    }
}

#[test]
fn how_far_the_end_is_counts_over_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    fill(&mut log, 200);
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let mut left = log.size_bytes();
    loop {
        for bytes in [0, 1, left.saturating_sub(1), left, left + 1, u64::MAX] {
            assert_eq!(reader.is_far(&cursor, bytes), left > bytes, "{left} and {bytes}");
        }
        let Some(slice) = reader.read(&mut cursor, 500, i64::MAX).unwrap() else { break };
        left -= slice.len() as u64;
    }
    assert_eq!(left, 0);
}

#[test]
fn a_cursor_at_the_end_sees_what_comes_over_rolls() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    assert!(reader.read(&mut cursor, 1000, i64::MAX).unwrap().is_none());
    let mut seen = Vec::new();
    let mut expected = Vec::new();
    for _ in 0..40 {
        expected.extend(fill(&mut log, 3));
        assert!(reader.flushed_offset() < reader.log_end_offset());
        assert_eq!(log.flush().unwrap(), reader.log_end_offset());
        seen.extend(values(bytes_from(&reader, &mut cursor, 1 << 20, reader.flushed_offset())));
        assert_eq!(seen, expected);
    }
}

#[test]
fn a_closed_log_opens_as_it_was_without_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("t-0");
    let mut expected = Vec::new();
    for round in 0..3 {
        let (mut log, report) = open(&dir, &small(), clean());
        assert!(report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{report:?}");
        assert_eq!(report.scanned_bytes, 0);
        assert_eq!(all(&log), expected, "round {round}");
        expected.extend(fill(&mut log, 70));
        let reader = log.reader();
        let mut cursor = reader.seek(0).unwrap();
        let slice = reader.read(&mut cursor, 100, i64::MAX).unwrap().unwrap();
        let held = slice.bytes();
        log.close().unwrap();
        assert!(matches!(reader.read(&mut cursor, 100, i64::MAX), Err(ReadError::Closed)));
        assert_eq!(held.len(), 100);
    }
    let names: Vec<String> =
        std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    for needed in [".log", ".index", ".timeindex", ".crc"] {
        assert!(names.contains(&format!("{:020}{needed}", 0)), "{names:?}");
    }
    assert!(names.contains(&format!("{:020}.snapshot", 210)), "{names:?}");
}

#[test]
fn a_dropped_log_is_recovered_with_everything_that_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("t-0");
    let mut expected = Vec::new();
    for round in 0..4 {
        let hints = OpenHints { recovery_point: expected.len() as i64 / 2, ..OpenHints::default() };
        let (mut log, report) = open(&dir, &small(), hints);
        assert_eq!(report.cut, None);
        assert!(report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{report:?}");
        assert_eq!(report.scanned_bytes > 0, round > 0);
        assert_eq!(all(&log), expected, "round {round}");
        expected.extend(fill(&mut log, 70));
    }
}

#[test]
fn a_group_larger_than_segments_is_one_append() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let group: Vec<NewBatch> = (0..100).map(|n| one(&[n as u8; 300], NOW)).collect();
    let outcomes = log.append(&group, 1, NOW).unwrap();
    assert_eq!(outcomes.len(), 100);
    assert!(log.reader().segment_count() >= 9);
    assert_eq!(all(&log).len(), 100);
    drop(log);
}

#[test]
fn timestamps_are_found_late_ones_included() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let stamps: Vec<i64> = (0..150).map(|n| NOW + if n % 10 == 0 { n * 10 } else { n }).collect();
    for stamp in &stamps {
        log.append(&[one(b"v", *stamp)], 1, NOW).unwrap();
    }
    let reader = log.reader();
    for wanted in (NOW - 1..NOW + 1500).step_by(7) {
        for below in [0, 60, 150] {
            let right = stamps.iter().take(below).position(|stamp| *stamp >= wanted).map(|offset| offset as i64);
            let found = reader.offset_for_timestamp(wanted, below as i64).unwrap();
            assert_eq!(found.map(|found| found.offset), right, "{wanted} below {below}");
            assert!(
                found.is_none_or(|found| found.timestamp == stamps[found.offset as usize] && found.leader_epoch == 1)
            );
        }
    }
    for below in [1usize, 60, 99, 150] {
        let largest = stamps.iter().take(below).max().unwrap();
        let right = stamps.iter().position(|stamp| stamp == largest).unwrap() as i64;
        assert_eq!(reader.offset_for_max_timestamp(below as i64).unwrap().map(|found| found.offset), Some(right));
    }
    assert_eq!(reader.offset_for_max_timestamp(0).unwrap(), None);
}

#[test]
fn offsets_outside_the_log_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints { log_start_offset: 1000, ..clean() });
    fill(&mut log, 5);
    let reader = log.reader();
    assert_eq!((reader.log_start_offset(), reader.log_end_offset()), (1000, 1005));
    for offset in [999, 1006, 0, -1] {
        let Err(ReadError::OutOfRange(error)) = reader.seek(offset) else { panic!("{offset} was found") };
        assert_eq!((error.offset, error.log_start, error.log_end), (offset, 1000, 1005));
    }
}

/// Descriptors of this process that lead into a folder.
#[cfg(target_os = "linux")]
fn descriptors_into(dir: &std::path::Path) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.starts_with(dir))
        .count()
}

#[test]
#[cfg(target_os = "linux")]
fn many_logs_share_few_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let files: std::sync::Arc<dyn headwater_storage::Files> =
        std::sync::Arc::new(headwater_storage::OsFiles::with_open_limit(8));
    let mut logs: Vec<headwater_storage::Log> = (0..100)
        .map(|n| {
            let dir = dir.path().join(format!("t-{n}"));
            headwater_storage::Log::open(files.clone(), &dir, identity(), small(), OpenHints::default(), NOW).unwrap().0
        })
        .collect();
    let mut expected = Vec::new();
    let mut cursors: Vec<_> = logs.iter().map(|log| log.reader().seek(0).unwrap()).collect();
    for _ in 0..3 {
        for log in &mut logs {
            expected = fill(log, 20);
            log.flush().unwrap();
        }
        for (log, cursor) in logs.iter().zip(&mut cursors) {
            let reader = log.reader();
            assert_eq!(values(bytes_from(&reader, cursor, 1 << 20, i64::MAX)), expected);
            assert!(descriptors_into(dir.path()) <= 9, "{}", descriptors_into(dir.path()));
        }
    }
    for log in logs {
        assert_eq!(all(&log).len(), 60);
        log.close().unwrap();
    }
}

#[test]
fn readers_on_other_threads_see_only_whole_flushed_records() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(&dir.path().join("t-0"), &small(), OpenHints::default());
    let total = 300;
    let threads: Vec<_> = (0..3)
        .map(|n| {
            let reader = log.reader();
            std::thread::spawn(move || {
                let mut cursor = reader.seek(0).unwrap();
                let mut seen = Vec::new();
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
                while !values_reach(&seen, total) {
                    assert!(std::time::Instant::now() < deadline, "reader {n} saw {} bytes", seen.len());
                    match reader.read(&mut cursor, 97 + n * 1000, reader.flushed_offset()).unwrap() {
                        Some(slice) => seen.extend_from_slice(&slice.bytes()),
                        None => std::thread::yield_now(),
                    }
                }
                values(seen)
            })
        })
        .collect();
    let mut expected = Vec::new();
    for _ in 0..total / 10 {
        expected.extend(fill(&mut log, 10));
        log.flush().unwrap();
    }
    for thread in threads {
        assert_eq!(thread.join().unwrap(), expected);
    }
}

fn values_reach(bytes: &[u8], total: usize) -> bool {
    batch::Batches::new(bytes).filter(Result::is_ok).count() == total
}

/// A broker led in epoch 2 and wrote nothing. The next leader knows records of epoch 1 from there on: they were refused as older
/// than the log's latest epoch, for ever.
#[test]
fn an_epoch_that_wrote_nothing_does_not_refuse_a_leaders_older_batches() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &LogConfig::default(), OpenHints::default());
    log.append(&[one(b"first", NOW)], 1, NOW).unwrap();
    log.assign_leader_epoch(2);
    let of_epoch = |base_offset, leader_epoch| {
        batch_of(BuildOptions { base_offset, leader_epoch, ..BuildOptions::default() }, NOW, &[b"x"])
    };
    log.append_as_follower(&[of_epoch(1, 1), of_epoch(2, 3)], NOW).unwrap();
    let epochs: Vec<_> = log.leader_epochs().entries().iter().map(|entry| (entry.epoch, entry.start_offset)).collect();
    assert_eq!(epochs, [(1, 0), (3, 2)]);
    assert!(matches!(log.append_as_follower(&[of_epoch(3, 2)], NOW), Err(AppendError::OldEpoch { .. })));
}
