//! A process without a free descriptor: whatever needs one is refused and succeeds later. No log is poisoned, no partition
//! taken for damaged, unless a write or a sync itself failed.
//!
//! The directory that a roll syncs was opened after the group's first batches were written, and the file of the leader epochs
//! after the flush in the middle of a group: either poisoned the log, as did opening a log at the wrong moment fence it.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{NOW, identity, one, values};
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{
    DataDir, DataDirError, Files, Log, LogConfig, LogError, LogReader, NewIdentity, OpenError, OpenHints,
    RecoveryReport, SimFiles,
};

const DIR: &str = "/data/t-0";
/// More than any of these opens.
const MOST_OPENED: u64 = 60;

fn disk(seed: u64) -> Arc<SimFiles> {
    // One segment is held open: the next one needs a descriptor of its own.
    let files = SimFiles::with_open_limit(seed, 1);
    files.create_dir_all(Path::new(DIR)).unwrap();
    files.sync_dir(Path::new("/data")).unwrap();
    files.sync_dir(Path::new("/")).unwrap();
    files
}

fn open(
    files: &Arc<SimFiles>,
    config: &LogConfig,
    recovery_point: i64,
    log_start: i64,
) -> Result<(Log, RecoveryReport), OpenError> {
    let hints = OpenHints { clean_shutdown: false, recovery_point, log_start_offset: log_start };
    Log::open(Arc::clone(files) as Arc<dyn Files>, Path::new(DIR), identity(), config.clone(), hints, NOW)
}

fn offsets(reader: &LogReader) -> Vec<i64> {
    let mut cursor = reader.seek(reader.log_start_offset()).unwrap();
    values(common::bytes_from(reader, &mut cursor, 1 << 20, i64::MAX)).into_iter().map(|(offset, _)| offset).collect()
}

fn config() -> LogConfig {
    LogConfig { segment_bytes: 1_000, unflushed_limit_bytes: 500, segment_ms: 1_000, ..LogConfig::default() }
}

/// Does one thing to a log of five records in three segments, of which the last is not flushed.
type Act = fn(&mut Log) -> Result<(), LogError>;

fn append(log: &mut Log, sizes: &[usize], epoch: i32) -> Result<(), LogError> {
    let group: Vec<_> = sizes.iter().map(|size| one(&vec![b'x'; *size], NOW)).collect();
    match log.append(&group, epoch, NOW) {
        Ok(_) => Ok(()),
        Err(error) if error.retryable() => {
            Err(LogError::FullDisk(headwater_storage::FullDisk { path: error.to_string().into(), needed: 0 }))
        }
        Err(error) => panic!("{error}"),
    }
}

/// With whether it is refused at all: what is done to durable batches is only put off.
const ACTS: [(&str, bool, Act); 13] = [
    ("append, and flush in the middle", false, |log| append(log, &[10, 400, 10], 2)),
    ("append, and roll", true, |log| append(log, &[300, 400, 300], 2)),
    ("append, and roll and flush several times", true, |log| append(log, &[400, 400, 400, 400, 10, 400], 3)),
    ("flush", true, |log| log.flush().map(drop)),
    ("roll by age", true, |log| log.roll_if_due(NOW + 5_000).map(drop)),
    ("flush, and roll by age", true, |log| {
        log.flush()?;
        // Reading takes the only place among the segments that are held open.
        let reader = log.reader();
        let _ = reader.seek(0).and_then(|mut cursor| reader.read(&mut cursor, 10, 5).map(drop));
        log.roll_if_due(NOW + 5_000).map(drop)
    }),
    ("delete some records", true, |log| log.delete_records(3, 5, NOW).map(drop)),
    ("delete all records", true, |log| log.delete_records(5, 5, NOW).map(drop)),
    ("cut off what is not flushed", true, |log| log.truncate(4, NOW)),
    ("cut off segments", true, |log| log.truncate(1, NOW)),
    ("cut off everything", true, |log| log.truncate(0, NOW)),
    ("begin again elsewhere", true, |log| log.truncate_and_restart_at(9, NOW)),
    ("retention", true, |log| {
        log.set_config(LogConfig { retention_bytes: Some(0), ..config() });
        log.enforce_retention(NOW, 5).map(drop)
    }),
];

fn five_records(files: &Arc<SimFiles>) -> Log {
    let (mut log, _) = open(files, &config(), 0, 0).unwrap();
    for _ in 0..2 {
        append(&mut log, &[300, 300], 0).unwrap();
        log.flush().unwrap();
    }
    append(&mut log, &[300], 1).unwrap();
    log
}

#[test]
fn whatever_finds_no_descriptor_is_refused_and_succeeds_later() {
    for (name, refusable, act) in ACTS {
        let mut expected = five_records(&disk(0));
        act(&mut expected).unwrap();
        let mut refused = 0;
        for (after, times) in (0..MOST_OPENED).flat_map(|after| [(after, 1), (after, u64::MAX)]) {
            let what = format!("{name}: {times} times no descriptor after {after}");
            let files = disk(after);
            let mut log = five_records(&files);
            files.fail(Fault::new(Operation::Open).exhausted().after(after).times(times));
            if let Err(error) = act(&mut log) {
                assert!(error.retryable(), "{what}: {error}");
                refused += 1;
                files.heal();
                assert!(!log.is_poisoned(), "{what}: {error}");
                act(&mut log).unwrap_or_else(|error| panic!("{what}, and later: {error}"));
            }
            files.heal();
            assert!(!log.is_poisoned(), "{what}");
            let found = (log.log_start_offset(), log.log_end_offset());
            assert_eq!(found, (expected.log_start_offset(), expected.log_end_offset()), "{what}");
            let flushed = log.flush().unwrap();
            assert_eq!(flushed, found.1, "{what}");
            assert_eq!(offsets(&log.reader()), (found.0..found.1).collect::<Vec<_>>(), "{what}");

            assert_eq!(log.leader_epochs(), expected.leader_epochs(), "{what}");

            let (log, _) = open(&files.crash(), &config(), flushed, found.0).unwrap();
            assert_eq!((log.log_start_offset(), log.log_end_offset()), found, "{what}, after a crash");
            assert_eq!(offsets(&log.reader()), (found.0..found.1).collect::<Vec<_>>(), "{what}, after a crash");
        }
        assert_eq!(refused > 0, refusable, "{name}");
    }
}

#[test]
fn a_log_that_finds_no_descriptor_opens_later_as_if_nothing_had_been() {
    for crashed in [false, true] {
        let mut refused = 0;
        for after in 0..2 * MOST_OPENED {
            let files = disk(after);
            let mut log = five_records(&files);
            append(&mut log, &[300, 300, 300], 2).unwrap();
            log.flush().unwrap();
            drop(log);
            let files = if crashed { files.crash() } else { files.restart() };
            for times in [1, u64::MAX] {
                files.fail(Fault::new(Operation::Open).exhausted().after(after).times(times));
                if let Err(error) = open(&files, &config(), 3, 1) {
                    assert!(error.retryable(), "after {after}: {error}");
                    refused += 1;
                }
                files.heal();
            }
            let (log, report) = open(&files, &config(), 3, 1).unwrap();
            assert_eq!(offsets(&log.reader()), (1..8).collect::<Vec<_>>(), "after {after}");
            assert_eq!((report.cut, report.crc_disagreements), (None, Vec::new()), "after {after}");
        }
        assert!(refused > 20, "{refused}");
    }
}

/// What a cut puts in the place of the end was written in the middle of it: without room or descriptors the log was stopped.
#[test]
fn a_cut_that_is_refused_changes_nothing_and_leaves_nothing_behind() {
    let names = |files: &Arc<SimFiles>| -> Vec<String> {
        files.list(Path::new(DIR)).unwrap().into_iter().map(|entry| entry.name).collect()
    };
    let cuts: [Act; 3] =
        [|log| log.truncate(1, NOW), |log| log.truncate(3, NOW), |log| log.truncate_and_restart_at(7, NOW)];
    let faults =
        || [Fault::new(Operation::Open).exhausted(), Fault::new(Operation::Write).full()].into_iter().enumerate();
    for ((number, cut), (kind, fault)) in
        cuts.iter().enumerate().flat_map(|cut| faults().map(move |fault| (cut, fault)))
    {
        let mut refused = 0;
        for after in 0..20 {
            let files = disk(after);
            let mut log = five_records(&files);
            log.flush().unwrap();
            let (before, epochs) = (names(&files), log.leader_epochs().clone());
            files.fail(fault.clone().after(after));
            let result = cut(&mut log);
            files.heal();
            let Err(error) = result else { continue };
            refused += 1;
            assert!(error.retryable() && !log.is_poisoned(), "{after}: {error}");
            assert_eq!((names(&files), log.leader_epochs()), (before, &epochs), "{after}");
            assert_eq!(offsets(&log.reader()), [0, 1, 2, 3, 4], "{after}");
            append(&mut log, &[10], 1).unwrap();
            log.flush().unwrap();
            let (log, _) = open(&files.crash(), &config(), 6, 0).unwrap();
            assert_eq!((offsets(&log.reader()), log.leader_epochs()), (vec![0, 1, 2, 3, 4, 5], &epochs), "{after}");
        }
        assert!(refused > 0, "cut {number} is never refused by fault {kind}");
    }
}

/// A checkpoint that found no descriptor counted as damaged, and was written over: every log was then recovered from its beginning, and
/// no log began anywhere but with its first segment.
#[test]
fn a_data_root_that_finds_no_descriptor_opens_later_as_if_nothing_had_been() {
    let (root, us) =
        (Path::new("/data"), || NewIdentity { cluster_id: "c".into(), broker_id: 4, directory_id: "d".into() });
    let mut refused = 0;
    for (after, times) in (0..40).flat_map(|after| [(after, 1), (after, u64::MAX)]) {
        let files = SimFiles::new(after);
        let dyn_files = Arc::clone(&files) as Arc<dyn Files>;
        let data_dir = DataDir::open(Arc::clone(&dyn_files), root, &us()).unwrap();
        data_dir.update_checkpoints(|checkpoints| {
            for offsets in [
                &mut checkpoints.recovery_points,
                &mut checkpoints.log_start_offsets,
                &mut checkpoints.high_watermarks,
                &mut checkpoints.cleaner_offsets,
            ] {
                offsets.insert(("t".into(), 0), 17);
            }
        });
        data_dir.write_checkpoints().unwrap();
        data_dir.close_clean().unwrap();
        files.fail(Fault::new(Operation::Open).exhausted().after(after).times(times));
        if let Err(error) = DataDir::open(Arc::clone(&dyn_files), root, &us()) {
            let DataDirError::Io(failure) = &error else { panic!("{error}") };
            assert_eq!(failure.error.raw_os_error(), Some(24), "{error}");
            refused += 1;
        } else {
            continue;
        }
        files.heal();
        let data_dir = DataDir::open(dyn_files, root, &us()).unwrap();
        let hints = data_dir.hints("t", 0);
        assert!(data_dir.faults().is_empty() && data_dir.was_clean(), "{after}: {:?}", data_dir.faults());
        assert_eq!((hints.recovery_point, hints.log_start_offset), (17, 17), "{after}");
        assert_eq!(data_dir.cleaned_until("t", 0), Some(17), "{after}");
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn a_directory_whose_sync_failed_at_a_roll_poisons_the_log_even_for_want_of_room() {
    let mut poisoned = 0;
    // The small files that are replaced on the way may fail for want of room, and then nothing is refused.
    for (after, fault) in
        (0..4).flat_map(|n| [(n, Fault::new(Operation::SyncDir)), (n, Fault::new(Operation::SyncDir).full())])
    {
        let files = disk(0);
        let mut log = five_records(&files);
        files.fail(fault.on(DIR).after(after).times(1));
        let rolled = log.roll_if_due(NOW + 5_000);
        assert_eq!(rolled.is_err(), log.is_poisoned(), "{after}: {rolled:?}");
        poisoned += usize::from(log.is_poisoned());
    }
    assert_eq!(poisoned, 4, "three that fail, and one of the two for want of room");
}
