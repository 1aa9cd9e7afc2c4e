//! The log on real files: what is appended is read back, and survives being closed, dropped and opened again.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::*;
use headwater_proto::batch::{self, BuildOptions};
use headwater_storage::{
    AppendError, Cleanup, Files, Log, LogConfig, NewBatch, OpenHints, ReadError, SimFiles, inspect,
};

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

/// Descriptors of this process that lead into a folder: only Linux's /proc tells.
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
    log.append_as_follower(&[of_epoch(1, 1), of_epoch(2, 3)], &[], NOW).unwrap();
    let epochs: Vec<_> = log.leader_epochs().entries().iter().map(|entry| (entry.epoch, entry.start_offset)).collect();
    assert_eq!(epochs, [(1, 0), (3, 2)]);
    assert!(matches!(log.append_as_follower(&[of_epoch(3, 2)], &[], NOW), Err(AppendError::OldEpoch { .. })));
}

/// Whatever the follower's own settings say of it.
#[test]
fn a_follower_begins_segments_where_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &LogConfig::default(), OpenHints::default());
    let batches: Vec<NewBatch> = (0..6).map(|offset| sent(offset, 1)).collect();
    log.append_as_follower(&batches[..2], &[0], NOW).unwrap();
    log.append_as_follower(&batches[2..5], &[2, 4], NOW).unwrap();
    log.append_as_follower(&batches[5..], &[], NOW).unwrap();
    log.flush().unwrap();
    assert_eq!((log.reader().segment_count(), all(&log).len()), (3, 6));
    for base in [0, 2, 4] {
        assert!(dir.path().join(format!("{base:020}.log")).exists(), "a segment at {base}");
    }
}

/// What a leader sends of a compacted topic, whose offsets may lie as far apart as they like.
fn sent(base_offset: i64, records: usize) -> NewBatch {
    batch_of(
        BuildOptions { base_offset, ..BuildOptions::default() },
        NOW + (base_offset >> 20),
        &vec![&b"x"[..]; records],
    )
}

/// Both indexes hold 31 bits of the distance to the segment's base, in Kafka and here. An empty segment that was begun far before the next offset
/// took that offset in all the same: its time index then named a batch that is not there.
#[test]
fn a_segment_ends_where_its_indexes_cannot_hold_the_next_offset() {
    const MOST: i64 = i32::MAX as i64;
    let compacted = Cleanup { compact: true, delete: false };
    let config = LogConfig { cleanup: compacted, index_interval_bytes: 0, ..LogConfig::default() };
    /// Offsets that are sent, each with a number of records, and where the segments then begin.
    type Sent = (&'static [(i64, usize)], &'static [i64]);
    let logs: [Sent; 6] = [
        (&[(0, 1), (MOST - 1, 2)], &[0]),
        (&[(0, 1), (MOST - 1, 3)], &[0, MOST - 1]),
        (&[(0, 1), (MOST, 1), (MOST + 1, 1), (2 * MOST, 1)], &[0, MOST + 1]),
        (&[(7, 1), (MOST, 1), (MOST + 7, 1), (MOST + 8, 2)], &[0, MOST + 7]),
        (&[(0, 1), (1 << 40, 1), ((1 << 40) + MOST, 1), (1 << 50, 1)], &[0, 1 << 40, 1 << 50]),
        // Nothing is in the first segment.
        (&[(MOST + 1, 1), (MOST + 2, 1), (1 << 33, 2)], &[0, MOST + 1, 1 << 33]),
    ];
    for (at_once, (offsets, segments)) in [false, true].into_iter().flat_map(|once| logs.map(|log| (once, log))) {
        let batches: Vec<NewBatch> = offsets.iter().map(|(offset, records)| sent(*offset, *records)).collect();
        let what = format!("{offsets:?}, at once: {at_once}");
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path(), &config, OpenHints::default());
        for group in batches.chunks(if at_once { batches.len() } else { 1 }) {
            log.append_as_follower(group, &[], NOW).unwrap();
        }
        let end = log.flush().unwrap();
        let check = |log: &Log| {
            let reader = log.reader();
            assert_eq!(reader.segment_count(), segments.len(), "{what}");
            assert_eq!(all(log).len(), offsets.iter().map(|(_, records)| records).sum::<usize>(), "{what}");
            for (offset, batch) in offsets.iter().map(|(offset, _)| offset).zip(&batches) {
                let mut cursor = reader.seek(*offset).unwrap();
                let found = values(bytes_from(&reader, &mut cursor, 1, i64::MAX));
                assert_eq!(found.first().map(|(offset, _)| offset), Some(offset), "{what}");
                let by_time = reader.offset_for_timestamp(batch.header.base_timestamp, i64::MAX).unwrap().unwrap();
                assert!(by_time.offset <= *offset && by_time.timestamp >= batch.header.base_timestamp, "{what}");
            }
        };
        check(&log);
        for base in segments {
            assert!(dir.path().join(format!("{base:020}.log")).exists(), "{what}: {base}");
        }
        drop(log);
        for recovery_point in [end, offsets[0].0, 0] {
            let (log, report) = open(dir.path(), &config, OpenHints { recovery_point, ..OpenHints::default() });
            assert!(report.rebuilt.is_empty() && report.cut.is_none(), "{what}: {report:?}");
            check(&log);
            log.close().unwrap();
            let (log, report) = open(dir.path(), &config, OpenHints { recovery_point: end, ..clean() });
            assert!(report.rebuilt.is_empty() && report.cut.is_none(), "{what}: {report:?}");
            check(&log);
        }
        let files: Arc<dyn Files> = files();
        let report = inspect::verify(&inspect::Target::open(files, dir.path()).unwrap(), &|_| ()).unwrap();
        // Nothing says that it was compaction which left the gaps.
        assert!(report.faults.iter().all(|fault| fault.detail.ends_with("are missing")), "{what}: {report:?}");
    }
}

#[test]
fn space_is_reserved_in_growing_steps() {
    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;
    let dir = Path::new("/data/t-0");
    let disk = SimFiles::new(1);
    disk.create_dir_all(dir).unwrap();
    let config = LogConfig { segment_bytes: 70 << 20, ..LogConfig::default() };
    let open = |config: &LogConfig| {
        let files = Arc::<SimFiles>::clone(&disk) as Arc<dyn Files>;
        Log::open(files, dir, identity(), config.clone(), OpenHints::default(), NOW).unwrap().0
    };
    let path = dir.join(format!("{:020}.log", 0));
    let reserved = || disk.metadata(&path).unwrap().len;
    let mut log = open(&config);
    assert_eq!(reserved(), 0, "an idle partition costs nothing");
    let idle_bytes = disk.used_bytes();
    log.append(&[one(b"x", NOW)], 0, NOW).unwrap();
    assert_eq!((reserved(), disk.used_bytes() - idle_bytes), (64 * KIB, 64 * KIB));
    let mut steps = vec![reserved()];
    while log.reader().segment_count() == 1 {
        // Each step is seen, since a batch is no larger than the smallest.
        let size = if log.size_bytes() < 2 * MIB { 30 << 10 } else { 900 << 10 };
        log.append(&[one(&vec![1; size], NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        if log.reader().segment_count() == 1 {
            assert!(log.size_bytes() <= reserved());
            steps.extend(Some(reserved()).filter(|reserved| steps.last() != Some(reserved)));
        }
    }
    let doubled = (0..9).map(|n| (64 * KIB) << n);
    // Never beyond what the segment may hold.
    let expected: Vec<u64> = doubled.chain([32, 48, 64, 70].map(|mib| mib * MIB)).collect();
    assert_eq!(steps, expected);
    drop(log);

    // Where there is no room for a step, as much as is needed; where there is none for that, nothing is written.
    let disk = SimFiles::new(2);
    disk.create_dir_all(dir).unwrap();
    let files = Arc::<SimFiles>::clone(&disk) as Arc<dyn Files>;
    let (mut log, _) = Log::open(files, dir, identity(), config, OpenHints::default(), NOW).unwrap();
    disk.set_capacity(Some(disk.used_bytes() + 40 * KIB));
    for _ in 0..2 {
        log.append(&[one(&vec![1; 10 << 10], NOW)], 0, NOW).unwrap();
    }
    let refused = log.append(&[one(&vec![1; 30 << 10], NOW)], 0, NOW).unwrap_err();
    assert!(matches!(refused, AppendError::FullDisk(_)) && refused.retryable(), "{refused}");
    assert_eq!(log.log_end_offset(), 2);
}
