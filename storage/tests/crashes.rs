//! What the model (`model.rs`) found, told one by one: crashes, full disks and failing ones, on a simulated disk.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{NOW, batch_of, identity, one, values};
use headwater_proto::batch::BuildOptions;
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{
    AppendError, Files, Log, LogConfig, LogReader, OpenHints, OpenMode, RecoveryReport, SimFiles, inspect,
};

const DIR: &str = "/data/t-0";

fn disk(seed: u64) -> Arc<SimFiles> {
    let files = SimFiles::new(seed);
    files.create_dir_all(Path::new(DIR)).unwrap();
    files.sync_dir(Path::new("/data")).unwrap();
    files.sync_dir(Path::new("/")).unwrap();
    files
}

fn hints(recovery_point: i64, log_start_offset: i64) -> OpenHints {
    OpenHints { clean_shutdown: false, recovery_point, log_start_offset }
}

fn open(files: &Arc<SimFiles>, config: &LogConfig, hints: OpenHints) -> (Log, RecoveryReport) {
    Log::open(Arc::clone(files) as Arc<dyn Files>, Path::new(DIR), identity(), config.clone(), hints, NOW).unwrap()
}

fn small_segments() -> LogConfig {
    LogConfig { segment_bytes: 1_000, ..LogConfig::default() }
}

fn offsets(reader: &LogReader) -> Vec<i64> {
    let mut cursor = reader.seek(reader.log_start_offset()).unwrap();
    values(common::bytes_from(reader, &mut cursor, 1 << 20, i64::MAX)).into_iter().map(|(offset, _)| offset).collect()
}

/// A group that rolls takes the space for all of its segments before anything is written, so the later ones exist while the batches of the
/// first are still in the page cache. When the power failed there, recovery took the empty segment for the end of the log, and the
/// log had a hole that nobody had written.
#[test]
fn a_segment_that_was_begun_for_a_lost_group_leaves_no_hole() {
    let group: Vec<_> = (0..4).map(|n| one(&[n; 400], NOW)).collect();
    let mut lost = 0;
    for (seed, operations) in (0..20).flat_map(|seed| (0..25).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        log.append(&[one(b"first", NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        files.power_off_after(operations);
        let _ = log.append(&group, 0, NOW);
        let (log, _) = open(&files.crash(), &small_segments(), hints(1, 0));
        let end = log.log_end_offset();
        assert_eq!(offsets(&log.reader()), (0..end).collect::<Vec<_>>(), "seed {seed}, {operations} operations");
        lost += usize::from(end < 5);
    }
    assert!(lost > 0);
}

/// The same segments are removed again when a later part of the group finds no room. The removal was not synced: after a power
/// failure while the log was being closed the empty segment was back, in the middle of what was written since, and the log did not open.
#[test]
fn a_segment_that_was_given_up_does_not_come_back() {
    for (seed, operations) in (0..10).flat_map(|seed| (0..12).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        log.append(&[one(&[0; 400], NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        files.set_capacity(Some(files.used_bytes() + 4_096));
        let group: Vec<_> = (0..6).map(|n| one(&[n; 900], NOW)).collect();
        assert!(matches!(log.append(&group, 0, NOW), Err(AppendError::FullDisk(_))));
        log.append(&[one(b"x", NOW), one(b"y", NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        files.set_capacity(None);
        files.power_off_after(operations);
        let _ = log.close();
        let (log, _) = open(&files.crash(), &small_segments(), hints(3, 0));
        assert_eq!(offsets(&log.reader()), [0, 1, 2], "seed {seed}, {operations} operations");
    }
}

/// Rolling writes indexes, checksums, a snapshot and leader epochs, none of which has space reserved. With the first batches of a
/// group written and the disk full, that failed, and the log was fenced, though nothing was wrong with it but want of room.
#[test]
fn a_full_disk_refuses_appends_and_never_poisons_the_log() {
    for left in (0..20).map(|pages| pages * 4_096) {
        let files = disk(left);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        log.append(&[one(b"first", NOW)], 0, NOW).unwrap();
        files.set_capacity(Some(files.used_bytes() + left));
        let mut appended = 1;
        for n in 0..60 {
            match log.append(&[one(&[n; 300], NOW), one(&[n; 300], NOW)], i32::from(n) / 10, NOW) {
                Ok(_) => appended += 2,
                Err(error) => assert!(error.retryable(), "{error}"),
            }
        }
        assert!(!log.is_poisoned());
        assert_eq!(offsets(&log.reader()), (0..appended).collect::<Vec<_>>());
        files.set_capacity(None);
        log.append(&[one(b"last", NOW)], 9, NOW).unwrap();
        assert_eq!(log.flush().unwrap(), appended + 1);
        log.close().unwrap();
        let (log, report) =
            open(&files.crash(), &small_segments(), OpenHints { clean_shutdown: true, ..hints(appended + 1, 0) });
        assert!(report.rebuilt.is_empty(), "{report:?}");
        assert_eq!(offsets(&log.reader()), (0..=appended).collect::<Vec<_>>());
    }
}

/// Recovery reads leader epochs from the batches beyond the recovery point, and kept them in memory until the next append was
/// flushed. A log that was closed before that forgot who had written those batches.
#[test]
fn leader_epochs_survive_a_crash_and_a_quiet_day() {
    for seed in 0..10 {
        let files = disk(seed);
        let (mut log, _) = open(&files, &LogConfig::default(), hints(0, 0));
        log.append(&[one(b"a", NOW)], 3, NOW).unwrap();
        log.flush().unwrap();
        log.append(&[one(b"b", NOW)], 5, NOW).unwrap();
        drop(log);
        let files = files.restart();
        let (log, _) = open(&files, &LogConfig::default(), hints(0, 0));
        log.close().unwrap();
        let clean = OpenHints { clean_shutdown: true, ..hints(2, 0) };
        let (log, _) = open(&files.crash(), &LogConfig::default(), clean);
        assert_eq!((log.reader().epoch_at(0), log.reader().epoch_at(1)), (Some(3), Some(5)), "seed {seed}");
    }
}

/// A deleted segment's file becomes a new segment's once nobody holds its map. A segment that had been closed, because too
/// many were open, counted as held by nobody, while a reader had a slice of it: the bytes changed under the reader.
#[test]
fn a_file_is_not_recycled_under_a_reader_whose_segment_was_closed() {
    let config = LogConfig { recycled_segments: 2, ..small_segments() };
    let files = SimFiles::with_open_limit(0, 1);
    files.create_dir_all(Path::new(DIR)).unwrap();
    let (mut log, _) = open(&files, &config, hints(0, 0));
    (0..6).for_each(|n| drop(log.append(&[one(&[n; 700], NOW)], 0, NOW).unwrap()));
    log.flush().unwrap();
    let reader = log.reader();
    let slice = reader.read(&mut reader.seek(0).unwrap(), 1 << 20, 6).unwrap().unwrap();
    let before = slice.bytes();
    assert!(!before.is_empty());
    // Reading elsewhere closes the slice's segment.
    reader.read(&mut reader.seek(4).unwrap(), 1 << 20, 6).unwrap().unwrap();
    log.delete_records(5, 6, NOW).unwrap();
    (0..6).for_each(|n| drop(log.append(&[one(&[n + 100; 700], NOW)], 0, NOW).unwrap()));
    assert_eq!(slice.bytes(), before);
}

/// A follower that is told to begin again elsewhere throws its log away, the newest segment first. A crash in between left a
/// log that ended before its recovery point, which was taken for damage, though the log start lay beyond all of it.
#[test]
fn a_log_that_was_being_thrown_away_opens_where_it_was_to_begin() {
    for (seed, operations) in (0..10).flat_map(|seed| (0..30).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        (0..5).for_each(|n| drop(log.append(&[one(&[n; 700], NOW)], 0, NOW).unwrap()));
        log.flush().unwrap();
        files.power_off_after(operations);
        let _ = log.truncate_and_restart_at(100, NOW);
        let files = files.crash();
        let (mut log, _) = open(&files, &small_segments(), hints(5, 100));
        assert_eq!((log.log_start_offset(), log.log_end_offset()), (100, 100), "seed {seed}, {operations} operations");
        log.append(&[one(b"on", NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        let (log, _) = open(&files.crash(), &small_segments(), hints(5, 100));
        assert_eq!(offsets(&log.reader()), [100], "seed {seed}, {operations} operations");
    }
}

/// The snapshot at a roll found no room; then retention deleted the segments before it, and a crash took with the memory all
/// that was known of their producers.
#[test]
fn producers_survive_the_deletion_of_their_batches_on_a_full_disk() {
    let config = small_segments();
    let files = disk(0);
    let (mut log, _) = open(&files, &config, hints(0, 0));
    let options = BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: 0, ..BuildOptions::default() };
    log.append(&[batch_of(options, NOW, &[&[1; 700]])], 0, NOW).unwrap();
    log.flush().unwrap();
    files.fail(Fault::new(Operation::Write).on(".snapshot").times(1).full());
    (1..4).for_each(|n| drop(log.append(&[one(&[n; 700], NOW)], 0, NOW).unwrap()));
    log.flush().unwrap();
    log.delete_records(1, 4, NOW).unwrap();
    let (mut log, _) = open(&files.crash(), &config, hints(0, 1));
    assert_eq!(log.last_sequence(7).map(|last| last.sequence), Some(0));
    log.truncate(1, NOW).unwrap();
    assert_eq!(log.last_sequence(7).map(|last| last.sequence), Some(0));
}

/// A process that was killed between the write and the sync of a snapshot left it in the page cache, whole to see. The next one
/// believed it, and rested on it when the power failed.
#[test]
fn what_a_killed_process_left_unsynced_is_synced_before_it_is_relied_on() {
    for (seed, operations) in (0..10).flat_map(|seed| (0..30).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        log.append(&[one(&[1; 700], NOW)], 0, NOW).unwrap();
        let flushed = log.flush().unwrap();
        files.power_off_after(operations);
        let _ = log.append(&[one(&[2; 700], NOW)], 0, NOW);
        let files = files.restart();
        let (log, _) = open(&files, &small_segments(), hints(flushed, 0));
        let end = log.log_end_offset();
        log.close().unwrap();
        let clean = OpenHints { clean_shutdown: true, ..hints(end, 0) };
        let (_, report) = open(&files.crash(), &small_segments(), clean);
        assert!(report.rebuilt.is_empty(), "seed {seed}, {operations} operations: {report:?}");
    }
}

/// A sealed segment is synced once and never again. Where that sync failed for want of room, the error was taken for a refusal that
/// changed nothing: the log stayed in service, the next flush found nothing to do about the segment, and reported as flushed what the
/// kernel had dropped. A power failure then took records that were acknowledged as flushed.
#[test]
fn a_sync_that_fails_for_want_of_room_when_a_segment_is_sealed_is_never_made_up_for() {
    let files = disk(1);
    let (mut log, _) = open(&files, &small_segments(), OpenHints::default());
    log.append(&[one(&[7; 100], NOW)], 1, NOW).unwrap();
    files.fail(Fault::new(Operation::Sync).on(".log").full());
    let refused = (0..100).find_map(|_| log.append(&[one(&[7; 100], NOW)], 1, NOW).err()).unwrap();
    assert!(!refused.retryable(), "{refused}");
    assert!(log.is_poisoned());
    files.heal();
    assert!(log.flush().is_err() && log.append(&[one(b"x", NOW)], 1, NOW).is_err());
    assert_eq!(log.flushed_offset(), 0);
}

/// The power failed while a roll was being prepared, right after a flush: the recovery point was where the new, empty segment
/// began, so the one before it counted as sealed. It was not: stale batches of the recycled file lay behind its end, and that was taken for damage.
#[test]
fn a_segment_counts_as_sealed_only_once_the_next_is_written() {
    let config = LogConfig { recycled_segments: 1, ..small_segments() };
    for (seed, operations) in (0..10).flat_map(|seed| (0..16).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        (1..5).for_each(|n| drop(log.append(&[one(&[n; 900], NOW)], 0, NOW).unwrap()));
        log.flush().unwrap();
        log.delete_records(3, 4, NOW).unwrap();
        log.append(&[one(b"short", NOW)], 0, NOW).unwrap();
        let flushed = log.flush().unwrap();
        files.power_off_after(operations);
        let _ = log.append(&[one(&[5; 900], NOW)], 0, NOW);
        let (log, _) = open(&files.crash(), &config, hints(flushed, 3));
        let end = log.log_end_offset();
        assert!(end >= flushed, "seed {seed}, {operations} operations");
        assert_eq!(offsets(&log.reader()), (3..end).collect::<Vec<_>>(), "seed {seed}, {operations} operations");
    }
}

/// Recovery wrote indexes anew in place. The power failed in between, and new entries with old ones behind them passed for an index.
#[test]
fn an_index_is_written_anew_as_a_whole() {
    let config = LogConfig { index_interval_bytes: 100, ..LogConfig::default() };
    for (seed, operations) in (0..20).flat_map(|seed| (0..12).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        log.append(&[one(b"a", NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        // Recovery ends a time index as if the segment were sealed, and the log goes on behind that: an entry more than a scan finds.
        let files = files.crash();
        let (mut log, _) = open(&files, &config, hints(0, 0));
        (1..9).for_each(|n| drop(log.append(&[one(&[n; 60], NOW + i64::from(n) * 10)], 0, NOW).unwrap()));
        log.close().unwrap();
        files.power_off_after(operations);
        let dir: Arc<dyn Files> = Arc::<SimFiles>::clone(&files);
        let _ = Log::open(dir, Path::new(DIR), identity(), config.clone(), hints(9, 0), NOW);
        let files = files.crash();
        open(&files, &config, OpenHints { clean_shutdown: true, ..hints(9, 0) });
        let target = inspect::Target::open(files, Path::new(DIR)).unwrap();
        let report = inspect::verify(&target, &|_| {}).unwrap();
        assert!(report.faults.is_empty(), "seed {seed}, {operations} operations: {report:#?}");
    }
}

/// Closing a log writes a snapshot at its end, which may be where its only segment begins: there one stood already, and was written over in
/// place. With the write failed, nobody knew the producers any more.
#[test]
fn a_snapshot_that_cannot_be_written_leaves_the_one_before() {
    let files = disk(0);
    let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
    let options = BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: 0, ..BuildOptions::default() };
    log.append(&[batch_of(options, NOW, &[&[1; 700]])], 0, NOW).unwrap();
    log.delete_records(1, 1, NOW).unwrap();
    files.fail(Fault::new(Operation::Write).on(".snapshot"));
    assert!(log.close().is_err());
    let (log, _) = open(&files.crash(), &small_segments(), hints(1, 1));
    assert_eq!(log.last_sequence(7).map(|last| last.sequence), Some(0));
}

/// A segment that was begun and then given up for want of room could not be removed. Where the log went on in the segment before it
/// (the next batches were smaller, or fewer), it lay in the middle of what was written since, or beyond the end: the log did not open
/// any more, or began again at an offset that nobody had reached.
#[test]
fn a_segment_that_cannot_be_given_up_stops_the_log() {
    for (larger, number) in [(900, 1), (900, 3), (1_900, 2)] {
        let files = disk(0);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        log.append(&[one(&[0; 300], NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        files.set_capacity(Some(files.used_bytes() + 4_096 * (number - 1)));
        files.fail(Fault::new(Operation::Remove).on(".log").times(1));
        let group: Vec<_> = (0..number).map(|n| one(&vec![n as u8; larger], NOW)).collect();
        assert!(log.append(&group, 0, NOW).is_err());
        files.set_capacity(None);
        assert!(log.is_poisoned(), "{larger} {number}");
        drop(log);
        let (mut log, _) = open(&files, &small_segments(), hints(1, 0));
        (1..4).for_each(|n| drop(log.append(&[one(&[n; 300], NOW)], 0, NOW).unwrap()));
        log.flush().unwrap();
        log.close().unwrap();
        let (log, _) = open(&files, &small_segments(), OpenHints { clean_shutdown: true, ..hints(4, 0) });
        assert_eq!(offsets(&log.reader()), [0, 1, 2, 3], "{larger} {number}");
    }
}

/// A deleted segment could not be removed, and the log went on without it, and deleted the ones behind it. When it was opened again,
/// it had a hole, and counted as damaged.
#[test]
fn a_deletion_that_fails_is_finished_before_the_next_one() {
    for after in 0..12 {
        let files = disk(0);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        (0..6).for_each(|n| drop(log.append(&[one(&[n; 900], NOW)], 0, NOW).unwrap()));
        log.flush().unwrap();
        files.fail(Fault::new(Operation::Remove).after(after).times(1));
        let start = log.delete_records(3, 6, NOW).map_or(0, |start| start);
        let _ = log.delete_records(5, 6, NOW);
        drop(log);
        files.heal();
        let (log, _) = open(&files, &small_segments(), hints(0, start));
        let start = log.log_start_offset();
        assert_eq!(offsets(&log.reader()), (start..6).collect::<Vec<_>>(), "after {after} removals");
    }
}

/// All records of the last segment were deleted, so that the log began where it ended. The power failed while that segment was rolled, with
/// the next one begun and no snapshot at its beginning yet: recovery removed the segment as deleted, and with it all that was known of its
/// producers.
#[test]
fn producers_survive_the_removal_of_a_segment_that_a_crash_left_without_a_snapshot_behind_it() {
    let mut begun = 0;
    for (seed, operations) in (0..10).flat_map(|seed| (0..14).map(move |operations| (seed, operations))) {
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        let options = BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: 0, ..BuildOptions::default() };
        log.append(&[batch_of(options, NOW, &[&[1; 700]]), one(b"x", NOW)], 0, NOW).unwrap();
        log.flush().unwrap();
        assert_eq!(log.delete_records(1, 2, NOW).unwrap(), 1);
        log.truncate(1, NOW).unwrap();
        files.power_off_after(operations);
        let _ = log.append(&[one(&[2; 700], NOW)], 0, NOW);
        let files = files.crash();
        begun += usize::from(files.list(Path::new(DIR)).unwrap().iter().any(|entry| entry.name.ends_with("1.log")));
        let (log, _) = open(&files, &small_segments(), hints(0, 1));
        let last = log.last_sequence(7).map(|last| (last.sequence, last.offset));
        assert_eq!(last, Some((0, 0)), "seed {seed}, {operations} operations");
    }
    assert!(begun > 0);
}

/// After a sync that failed, Linux counts the pages as clean: they can be read, and no later sync writes them. So nothing that such a sync was
/// to cover may be acknowledged, by that log ever, and by the one that is opened next only once the bytes were written anew.
#[test]
fn after_a_failed_sync_nothing_is_acknowledged_that_was_not_written_anew() {
    // Flushes of the middle and of the end of a group, seals, and checkpoints.
    let config = LogConfig {
        segment_bytes: 6_000,
        unflushed_limit_bytes: 1_500,
        checkpoint_bytes: 3_000,
        ..LogConfig::default()
    };
    let (mut fenced, mut seen_and_lost) = (0, 0);
    for (seed, after) in (0..12).flat_map(|seed| (0..24).map(move |after| (seed, after))) {
        let what = format!("seed {seed}, {after} syncs");
        let files = disk(seed);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        files.fail(Fault::new(Operation::Sync).on(if seed % 3 == 0 { "" } else { ".log" }).after(after).times(1));
        let mut acknowledged = 0;
        for n in 0..12u8 {
            let group: Vec<_> = (0..3).map(|m| one(&[n * 3 + m; 400], NOW)).collect();
            if log.append(&group, 0, NOW).is_ok() {
                let _ = log.flush();
            }
            acknowledged = log.flushed_offset();
            if log.is_poisoned() {
                break;
            }
        }
        files.heal();
        if log.is_poisoned() {
            fenced += 1;
            // The disk is well again, and each of these would succeed.
            assert!(log.flush().is_err() && log.append(&[one(b"x", NOW)], 0, NOW).is_err(), "{what}");
            assert!(log.roll_if_due(i64::MAX).is_err() && log.delete_records(0, 0, NOW).is_err(), "{what}");
            assert_eq!(log.flushed_offset(), acknowledged, "{what}");
            assert!(log.close().is_err(), "{what}");
        } else {
            drop(log);
        }
        let files = files.restart();
        let (log, _) = open(&files, &config, hints(acknowledged, 0));
        // A log that was opened counts as flushed to its end, and whoever waits is told so.
        let served = (log.flushed_offset(), log.log_end_offset());
        assert_eq!(served.0, served.1, "{what}");
        assert!(served.0 >= acknowledged, "{what}");
        seen_and_lost += usize::from(served.0 > acknowledged);
        drop(log);
        let (log, _) = open(&files.crash(), &config, hints(served.0, 0));
        assert_eq!(offsets(&log.reader()), (0..served.1).collect::<Vec<_>>(), "{what}");
    }
    assert!(
        fenced > 100 && seen_and_lost > 50,
        "{fenced} fenced, {seen_and_lost} with more to see than was acknowledged"
    );
}

/// A full disk has no room for the new file that a failed sync asks for: what is there is read all the same, and retention may make room. The
/// next start tries again.
#[test]
fn after_a_failed_sync_a_log_opens_on_a_full_disk_too() {
    // Nothing is reserved behind the end that could be given back.
    let config = LogConfig { segment_bytes: 241_000, ..LogConfig::default() };
    for pages in 0..6 {
        let files = disk(pages);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        (0..3).for_each(|n| drop(log.append(&[one(&[n; 60_000], NOW)], 0, NOW).unwrap()));
        let flushed = log.flush().unwrap();
        files.fail(Fault::new(Operation::Sync).on(".log").times(1));
        log.append(&[one(&[3; 60_000], NOW)], 0, NOW).unwrap();
        log.flush().unwrap_err();
        drop(log);
        let files = files.restart();
        let word = || files.list(Path::new(DIR)).unwrap().iter().any(|entry| entry.name.ends_with(".sync-failed"));
        assert!(word());
        files.set_capacity(Some(files.used_bytes() + pages * 4_096));
        let (log, _) = open(&files, &config, hints(flushed, 0));
        assert_eq!(offsets(&log.reader()), (0..flushed + 1).collect::<Vec<_>>(), "{pages} pages");
        assert_eq!(log.flushed_offset(), flushed, "{pages} pages");
        drop(log);
        assert!(word(), "nothing was done of what it asks for");
        files.set_capacity(None);
        let files = files.crash();
        let (log, _) = open(&files, &config, hints(flushed, 0));
        let end = log.log_end_offset();
        assert!(end >= flushed, "{pages} pages");
        assert_eq!(offsets(&log.reader()), (0..end).collect::<Vec<_>>(), "{pages} pages");
        assert!(!files.list(Path::new(DIR)).unwrap().iter().any(|entry| entry.name.ends_with(".sync-failed")));
    }
}

/// After a crash indexes, checksums and leader epochs are written anew. On a full disk there was no room for them, and the log was not opened:
/// it could not be read, and retention could not make room.
#[test]
fn a_log_opens_on_a_full_disk_after_a_crash() {
    let config = LogConfig { index_interval_bytes: 100, ..small_segments() };
    for (pages, kept) in (0..12).flat_map(|pages| [(pages, false), (pages, true)]) {
        let what = format!("{pages} pages, {kept}");
        let files = disk(pages);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        (0..7).for_each(|n| drop(log.append(&[one(&[n; 300], NOW)], 3, NOW).unwrap()));
        let flushed = log.flush().unwrap();
        log.append(&[one(&[7; 300], NOW)], 5, NOW).unwrap();
        drop(log);
        let files = files.restart();
        if !kept {
            for name in files.list(Path::new(DIR)).unwrap().into_iter().map(|entry| entry.name) {
                if [".index", ".timeindex", ".crc"].iter().any(|end| name.ends_with(end)) {
                    files.remove_file(&Path::new(DIR).join(name)).unwrap();
                }
            }
        }
        files.set_capacity(Some(files.used_bytes() + pages * 4_096));
        let (mut log, _) = open(&files, &config, hints(0, 0));
        let reader = log.reader();
        assert_eq!(offsets(&reader), (0..8).collect::<Vec<_>>(), "{what}");
        assert_eq!((reader.epoch_at(6), reader.epoch_at(7)), (Some(3), Some(5)), "{what}");
        // What says who wrote it is not on the disk.
        let knows =
            files.metadata(&Path::new(DIR).join("leader-epoch-checkpoint")).unwrap().len > b"0\n1\n3 0\n".len() as u64;
        assert_eq!(log.flushed_offset() == 8, knows, "{what}");
        if pages % 2 == 1 {
            // The power fails while it is so.
            let flushed = log.flushed_offset();
            let files = files.crash();
            files.set_capacity(None);
            let (log, _) = open(&files, &config, hints(flushed, 0));
            assert_eq!(offsets(&log.reader()), (0..log.log_end_offset()).collect::<Vec<_>>(), "{what}");
            assert!(log.log_end_offset() >= flushed, "{what}");
            continue;
        }
        log.delete_records(2, flushed.min(log.flushed_offset()), NOW).unwrap_or_default();
        files.set_capacity(None);
        log.enforce_retention(NOW, 0).unwrap();
        assert_eq!(log.flushed_offset(), 8, "{what}: it tries again by itself");
        let start = log.log_start_offset();
        log.append(&[one(b"last", NOW)], 5, NOW).unwrap();
        assert_eq!(log.flush().unwrap(), 9, "{what}");
        log.close().unwrap();
        let (log, report) = open(&files, &config, OpenHints { clean_shutdown: true, ..hints(9, start) });
        assert!(report.clean && report.rebuilt.is_empty() && report.scanned_bytes == 0, "{what}: {report:?}");
        assert_eq!(offsets(&log.reader()), (start..9).collect::<Vec<_>>(), "{what}");
        assert_eq!((log.reader().epoch_at(6), log.reader().epoch_at(7)), (Some(3), Some(5)), "{what}");
        let target = inspect::Target::open(files, Path::new(DIR)).unwrap();
        let verified = inspect::verify(&target, &|_| {}).unwrap();
        assert!(verified.faults.is_empty() && verified.notes.is_empty(), "{what}: {verified:#?}");
    }
}

/// The log that was opened on a full disk went on in the very file whose sync had failed: once there was room again it took appends there, and
/// acknowledged them after a sync that said nothing. A power failure took them, and the log did not open any more.
#[test]
fn after_a_failed_sync_on_a_full_disk_nothing_is_acknowledged_from_the_same_file() {
    let record = |n: u8| one(&[n; 9_000], NOW);
    for (seed, rolls, lasting, later) in (0..24).flat_map(|seed| {
        [(seed, false, true, 0), (seed, true, true, 1), (seed, false, false, 2), (seed, true, true, 3)]
    }) {
        let what = format!("seed {seed}, rolls {rolls}, lasting {lasting}, {later}");
        let config = LogConfig { segment_bytes: 40_000, ..LogConfig::default() };
        let files = disk(seed);
        let (mut log, _) = open(&files, &config, hints(0, 0));
        (0..6).for_each(|n| drop(log.append(&[record(n)], 0, NOW).unwrap()));
        let flushed = log.flush().unwrap();
        let fault = Fault::new(Operation::Sync).on(".log").times(1);
        files.fail(if lasting { fault.lasting() } else { fault });
        log.append(&[record(6)], 0, NOW).unwrap();
        match rolls {
            true => assert!(log.append(&[record(7), record(8)], 0, NOW).is_err(), "{what}"),
            false => assert!(log.flush().is_err(), "{what}"),
        }
        drop(log);
        let files = files.restart();
        files.set_capacity(Some(files.used_bytes()));
        let (mut log, _) = open(&files, &config, hints(flushed, 0));
        files.set_capacity(Some(files.used_bytes()));
        let end = log.log_end_offset();
        assert!(end > flushed, "{what}");
        assert_eq!(offsets(&log.reader()), (0..end).collect::<Vec<_>>(), "{what}");
        let mut acknowledged = log.flushed_offset();
        let mut log_start = 0;
        for n in 10..18 {
            match log.append(&[record(n)], 0, NOW).map(|_| log.flush()) {
                Ok(result) => acknowledged = result.unwrap(),
                Err(error) => assert!(error.retryable() && !log.is_poisoned(), "{what}: {error}"),
            }
            match (n, later) {
                // What is deleted makes room, though it would be kept to be written again.
                (14, 1) => {
                    log_start = log.delete_records(4, flushed, NOW).unwrap();
                    assert_eq!(log.flushed_offset(), end, "{what}: it tries again by itself");
                    acknowledged = end;
                }
                (14, 0) => files.set_capacity(None),
                (14, 2) => {
                    files.set_capacity(None);
                    log.enforce_retention(NOW, flushed).unwrap();
                    assert_eq!(log.flushed_offset(), end, "{what}: it tries again by itself");
                    acknowledged = end;
                }
                _ => {}
            }
        }
        assert_eq!(acknowledged > flushed, later < 3, "{what}");
        // What was begun before the failure is taken along.
        assert!(later == 3 || log.log_end_offset() == end + 3, "{what}: {}", log.log_end_offset());
        drop(log);
        let files = files.crash();
        files.set_capacity(None);
        let (log, report) = open(&files, &config, hints(acknowledged, log_start));
        let end = log.log_end_offset();
        assert!(end >= acknowledged, "{what}: {report:?}");
        assert_eq!(offsets(&log.reader()), (log_start..end).collect::<Vec<_>>(), "{what}");
        let mut left = files.list(Path::new(DIR)).unwrap().into_iter();
        assert!(!left.any(|entry| entry.name.ends_with(".sync-failed")), "{what}");
    }
}

/// Nothing removed the word of a failed sync with its segment: once retention had taken that, each start after an end in good order scanned
/// the whole log.
#[test]
fn the_word_of_a_failed_sync_goes_with_its_segment() {
    let word = |base_offset| Path::new(DIR).join(format!("{base_offset:020}.sync-failed"));
    let clean = |log_start| OpenHints { clean_shutdown: true, ..hints(5, log_start) };
    for way in 0..3 {
        let files = disk(way);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        (0..5).for_each(|n| drop(log.append(&[one(&[n; 700], NOW)], 0, NOW).unwrap()));
        log.flush().unwrap();
        let leave_word = || files.open(&word(1), OpenMode::CreateNew).unwrap().sync_all().unwrap();
        let start = match way {
            // Retention takes it.
            0 => {
                leave_word();
                let start = log.delete_records(3, 5, NOW).unwrap();
                assert!(files.metadata(&word(1)).is_err());
                start
            }
            // A crash came between the one and the other.
            1 => {
                let start = log.delete_records(3, 5, NOW).unwrap();
                leave_word();
                start
            }
            // The next start takes it: the log start was moved, and nothing was deleted yet.
            _ => {
                leave_word();
                3
            }
        };
        log.close().unwrap();
        let (log, report) = open(&files, &small_segments(), clean(start));
        assert!(report.clean && report.scanned_bytes == 0, "{way}: {report:?}");
        assert_eq!(offsets(&log.reader()), [3, 4], "{way}");
        assert!(files.metadata(&word(1)).is_err(), "{way}");
        drop(log);
        // That of a segment that is there is heeded.
        files.open(&word(4), OpenMode::CreateNew).unwrap();
        let (_, report) = open(&files, &small_segments(), clean(start));
        assert!(!report.clean && report.scanned_bytes > 0, "{way}: {report:?}");
    }
}

/// Recovery wrote what was not flushed again into the file whose sync had failed. Where that file's blocks are bad, a second sync that
/// says nothing is worth nothing: what recovery called flushed was gone after the next power failure.
#[test]
fn after_a_failed_sync_the_log_goes_on_in_a_new_file() {
    for (seed, operations, rolls) in (0..8).flat_map(|seed| (0..40).map(move |n| (seed, n, seed % 2 == 1))) {
        let what = format!("seed {seed}, {operations} operations");
        let files = disk(seed);
        let (mut log, _) = open(&files, &small_segments(), hints(0, 0));
        (0..3).for_each(|n| drop(log.append(&[one(&[n; 200], NOW)], 0, NOW).unwrap()));
        let flushed = log.flush().unwrap();
        files.fail(Fault::new(Operation::Sync).on(".log").times(1).lasting());
        log.append(&[one(&[3; 100], NOW)], 0, NOW).unwrap();
        match rolls {
            // The segment's last sync, when it is sealed.
            true => assert!(log.append(&[one(&[4; 900], NOW)], 0, NOW).is_err()),
            false => assert!(log.flush().is_err()),
        }
        let end = log.log_end_offset();
        assert!(log.is_poisoned() && end == flushed + 1, "{what}");
        drop(log);
        let mut files = if seed % 4 < 2 { files.restart() } else { files };
        files.power_off_after(operations);
        let dir: Arc<dyn Files> = Arc::<SimFiles>::clone(&files);
        let opened = Log::open(dir, Path::new(DIR), identity(), small_segments(), hints(flushed, 0), NOW);
        if let Ok((log, report)) = &opened
            && !files.is_off()
        {
            assert_eq!((log.log_end_offset(), report.cut.as_ref()), (end, None), "{what}");
            drop(opened);
            files = files.crash();
            let (log, _) = open(&files, &small_segments(), hints(flushed, 0));
            assert_eq!(offsets(&log.reader()), (0..end).collect::<Vec<_>>(), "{what}: it was called flushed");
        } else {
            files = files.crash();
        }
        // And whatever is written then.
        let (mut log, _) = open(&files, &small_segments(), hints(flushed, 0));
        log.append(&[one(&[5; 50], NOW)], 0, NOW).unwrap();
        let end = log.flush().unwrap();
        let (log, _) = open(&files.crash(), &small_segments(), hints(flushed, 0));
        assert_eq!(offsets(&log.reader()), (0..end).collect::<Vec<_>>(), "{what}");
    }
}
