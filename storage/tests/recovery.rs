//! Recovery begins near the recovery point: what it leaves unread was flushed, is known of, and is checked before it is served.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use headwater_proto::batch::BuildOptions;
use headwater_storage::{
    BatchOutcome, Corruption, Log, LogConfig, LogError, OpenError, OpenHints, OsFiles, ReadError, RecoveryReport,
};

const BATCHES: i64 = 300;
/// What of the log is as good as read when the recovery point is at its end: two checkpoints, and what lies between two flushes.
const MOST_SCANNED_BYTES: u64 = 2 * CHECKPOINT_BYTES;
const CHECKPOINT_BYTES: u64 = 200_000;
const STEP_BYTES: usize = 64 << 10;

fn config() -> LogConfig {
    LogConfig { checkpoint_bytes: CHECKPOINT_BYTES, ..LogConfig::default() }
}

/// A process that was killed: one segment, two epochs, a producer. Timestamps rise up to `latest`, and fall from there on.
struct Killed {
    _root: tempfile::TempDir,
    dir: PathBuf,
    everything: Vec<(i64, Vec<u8>)>,
    log_bytes: u64,
    /// The first snapshot within the segment, which a later one replaced.
    early_snapshot: (String, Vec<u8>),
}

fn timestamp(offset: i64, latest: i64) -> i64 {
    NOW + offset.min(2 * latest - offset)
}

impl Killed {
    fn new(latest: i64) -> Killed {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("t-0");
        let (mut log, _) = open(&dir, &config(), OpenHints::default());
        let mut early_snapshot = None;
        for n in 0..BATCHES {
            let options =
                BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: n as i32, ..BuildOptions::default() };
            let value: Vec<u8> = (0..6_000).map(|at| ((at as i64 * (n + 3)) >> 2) as u8).collect();
            let batch = batch_of(options, timestamp(n, latest), &[&value]);
            let outcome = log.append(&[batch], 1 + (n / 40) as i32, NOW).unwrap();
            assert!(matches!(outcome[..], [BatchOutcome::Appended { .. }]));
            if n % 5 == 4 {
                log.flush().unwrap();
                early_snapshot = early_snapshot.or_else(|| {
                    let path = snapshots(&dir).pop()?;
                    Some((path.file_name()?.to_str()?.to_owned(), std::fs::read(path).unwrap()))
                });
            }
        }
        let (everything, log_bytes) = (all(&log), log.size_bytes());
        assert_eq!(log.reader().segment_count(), 1);
        let early_snapshot = early_snapshot.unwrap();
        assert_eq!(snapshots(&dir).len(), 1, "one replaces the other");
        assert!(!snapshots(&dir)[0].ends_with(&early_snapshot.0));
        Killed { _root: root, dir, everything, log_bytes, early_snapshot }
    }

    fn copy(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&self.dir).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        copy
    }

    /// A copy of the folder, in which `spoil` has changed the file of its segment that ends so.
    fn spoiled(&self, end: &str, spoil: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
        let copy = self.copy();
        let path = file(copy.path(), end);
        let mut bytes = std::fs::read(&path).unwrap();
        spoil(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        copy
    }
}

fn snapshots(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "snapshot")).collect()
}

fn file(dir: &Path, end: &str) -> PathBuf {
    dir.join(format!("{:020}{end}", 0))
}

fn recover(dir: &Path, recovery_point: i64) -> Result<(Log, RecoveryReport), OpenError> {
    let hints = OpenHints { recovery_point, ..OpenHints::default() };
    Log::open(Arc::new(OsFiles::with_open_limit(64)), dir, identity(), config(), hints, NOW)
}

/// Reads everything, as a broker would.
fn serve(log: &Log) -> Result<Vec<(i64, Vec<u8>)>, Corruption> {
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let mut bytes = Vec::new();
    let corruption = |error| match error {
        ReadError::Corruption(corruption) => corruption,
        error => panic!("{error}"),
    };
    while let Some(slice) = reader.read(&mut cursor, 20_000, i64::MAX).map_err(corruption)? {
        if !slice.is_resident() {
            slice.load().map_err(corruption)?;
        }
        bytes.extend_from_slice(&slice.bytes());
    }
    Ok(values(bytes))
}

/// The files of the segment, as a log leaves them that goes on a little and is closed.
fn closed(mut log: Log, dir: &Path) -> Vec<(String, Vec<u8>)> {
    (0..30).for_each(|n| drop(log.append(&[one(&[n; 900], NOW + 1_000 + i64::from(n))], 9, NOW).unwrap()));
    log.close().unwrap();
    let ends = [".log", ".index", ".timeindex", ".crc"];
    ends.map(|end| (end.to_owned(), std::fs::read(file(dir, end)).unwrap())).into()
}

#[test]
fn a_segment_is_scanned_from_the_recovery_point_on_and_becomes_what_a_whole_scan_makes_of_it() {
    for latest in [BATCHES, 200] {
        let killed = Killed::new(latest);
        let whole = {
            let copy = killed.copy();
            let (log, report) = recover(copy.path(), 0).unwrap();
            assert_eq!(report.scanned_bytes, killed.log_bytes);
            closed(log, copy.path())
        };
        for recovery_point in [BATCHES, BATCHES - 1, 250, 120, 40, 3] {
            let copy = killed.copy();
            let (log, report) = recover(copy.path(), recovery_point).unwrap();
            let beyond = killed.log_bytes / BATCHES as u64 * (BATCHES - recovery_point) as u64;
            // The time index says nothing of what came after the latest timestamp: it was scanned again, for later ones.
            let late = killed.log_bytes / BATCHES as u64 * (recovery_point - latest).max(0) as u64;
            let most = (beyond + late + MOST_SCANNED_BYTES).min(killed.log_bytes);
            assert!(report.scanned_bytes <= most, "{recovery_point}: {report:?}, {most}");
            assert!(report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{report:?}");
            assert_eq!(log.log_end_offset(), BATCHES);
            assert_eq!(log.last_sequence(7).map(|last| last.offset), Some(BATCHES - 1));
            let epochs: Vec<i64> = log.leader_epochs().entries().iter().map(|entry| entry.start_offset).collect();
            assert_eq!(epochs, (0..BATCHES).step_by(40).collect::<Vec<_>>());
            let largest = log.reader().offset_for_max_timestamp(i64::MAX).unwrap().unwrap();
            assert_eq!(largest.offset, latest.min(BATCHES - 1));
            let found = log.reader().offset_for_timestamp(timestamp(150, latest), i64::MAX).unwrap().unwrap();
            assert_eq!(found.offset, 150);
            assert_eq!(serve(&log).unwrap(), killed.everything);
            for ((end, bytes), (_, right)) in closed(log, copy.path()).iter().zip(&whole) {
                assert!(bytes == right, "{end} with a recovery point of {recovery_point}, {latest} the latest");
            }
        }
    }
}

#[test]
fn damage_in_the_part_that_is_not_scanned_is_found_before_it_is_served() {
    let killed = Killed::new(BATCHES);
    let size = killed.log_bytes as usize / BATCHES as usize;
    // Every field of a header, those too that no batch checksum covers, a record, and the batch in which the scan's 64 KiB begin.
    for batch in [0, 17, 150] {
        for at in [2, 7, 9, 13, 15, 16, 18, 22, 25, 40, 45, 52, 55, 60, 61, 3_000] {
            let position = batch * size + at;
            let copy = killed.spoiled(".log", |bytes| bytes[position] ^= 2);
            let corruption = match recover(copy.path(), BATCHES) {
                Ok((log, report)) => {
                    assert!(report.scanned_bytes < MOST_SCANNED_BYTES, "{report:?}");
                    serve(&log).expect_err("damage was served")
                }
                Err(OpenError::Corruption(corruption)) => corruption,
                Err(error) => panic!("{error}"),
            };
            assert!(corruption.path.ends_with("00000000000000000000.log"), "{corruption}");
            assert!(corruption.position.abs_diff(position as u64) <= STEP_BYTES as u64, "{position}: {corruption}");
        }
    }
    // The 64 KiB in which the scan begins are neither checked later nor scanned whole.
    let (_, report) = recover(killed.copy().path(), BATCHES).unwrap();
    let began = (killed.log_bytes - report.scanned_bytes) as usize;
    assert!(!began.is_multiple_of(STEP_BYTES));
    for position in [began / STEP_BYTES * STEP_BYTES, began - 1] {
        let copy = killed.spoiled(".log", |bytes| bytes[position] ^= 2);
        let Err(OpenError::Corruption(corruption)) = recover(copy.path(), BATCHES) else { panic!("{position}") };
        assert_eq!(corruption.position, (position / size * size) as u64);
    }
    // Damage that the scan comes upon is told from the first on.
    let near_the_end = (BATCHES as usize - 2) * size + 3_000;
    let copy = killed.spoiled(".log", |bytes| {
        bytes[near_the_end] ^= 2;
        bytes[10 * size + 3_000] ^= 2;
    });
    let Err(OpenError::Corruption(corruption)) = recover(copy.path(), BATCHES) else { panic!("it was opened") };
    assert_eq!(corruption.position, 10 * size as u64);
}

/// What stands beside the log need not have reached the disk.
#[test]
fn without_anything_that_vouches_for_it_a_segment_is_scanned_whole() {
    let killed = Killed::new(BATCHES);
    let expect = |what: &str, copy: &tempfile::TempDir, whole: bool| {
        let (log, report) = recover(copy.path(), BATCHES).unwrap();
        assert_eq!(report.scanned_bytes == killed.log_bytes, whole, "{what}: {report:?}");
        assert_eq!(serve(&log).unwrap(), killed.everything, "{what}");
        assert_eq!(log.last_sequence(7).map(|last| last.offset), Some(BATCHES - 1), "{what}");
        let last = log.reader().offset_for_max_timestamp(i64::MAX).unwrap().unwrap();
        assert_eq!(last.offset, BATCHES - 1, "{what}");
        for (batch, found) in [5, 100, 290].map(|n| (n, log.reader().offset_for_timestamp(NOW + n, i64::MAX))) {
            assert_eq!(found.unwrap().unwrap().offset, batch, "{what}");
        }
        log.close().unwrap();
        let hints = OpenHints { clean_shutdown: true, recovery_point: BATCHES, ..OpenHints::default() };
        let (_, report) = open(copy.path(), &config(), hints);
        assert!(report.rebuilt.is_empty() && report.crc_disagreements.is_empty(), "{what}: {report:?}");
    };
    expect("nothing is missing", &killed.copy(), false);
    for end in [".index", ".timeindex", ".crc"] {
        let copy = killed.copy();
        std::fs::remove_file(file(copy.path(), end)).unwrap();
        expect(&format!("no {end}"), &copy, true);
        expect(&format!("an empty {end}"), &killed.spoiled(end, Vec::clear), true);
        expect(&format!("zeros in {end}"), &killed.spoiled(end, |bytes| bytes.fill(0)), true);
        // A page that did not reach the disk: the scan begins before what it held.
        expect(&format!("a hole in {end}"), &killed.spoiled(end, |bytes| bytes[140..].fill(0)), false);
        let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2 + 1);
        expect(&format!("half of {end}"), &killed.spoiled(end, half), false);
    }
    let copy = killed.copy();
    snapshots(copy.path()).iter().for_each(|path| std::fs::remove_file(path).unwrap());
    expect("no snapshot", &copy, true);
    // The checksums of another partition.
    let other = |bytes: &mut Vec<u8>| {
        let right = headwater_storage::crcfile::decode(bytes).unwrap();
        let header = headwater_storage::crcfile::CrcHeader { partition: 3, ..right.header };
        bytes[..48].copy_from_slice(&header.encode());
    };
    let copy = killed.spoiled(".crc", other);
    let (log, report) = recover(copy.path(), BATCHES).unwrap();
    assert_eq!((report.scanned_bytes, report.crc_disagreements.len()), (killed.log_bytes, 1));
    assert_eq!(serve(&log).unwrap(), killed.everything);
}

/// A cut copies what it leaves of a segment, and makes new checksums. Over bytes that nobody had checked, they would have hidden the damage.
#[test]
fn a_cut_does_not_make_damage_good() {
    let killed = Killed::new(BATCHES);
    let size = killed.log_bytes as usize / BATCHES as usize;
    // The leader epoch, which no batch checksum covers.
    let copy = killed.spoiled(".log", |bytes| bytes[17 * size + 15] ^= 1);
    let (mut log, _) = recover(copy.path(), BATCHES).unwrap();
    assert!(matches!(log.truncate(250, NOW), Err(LogError::Corruption(_))));
    assert!(log.is_poisoned());
    let copy = killed.copy();
    let (mut log, _) = recover(copy.path(), BATCHES).unwrap();
    log.truncate(250, NOW).unwrap();
    assert_eq!(serve(&log).unwrap(), killed.everything[..250]);
}

/// A part of the log is known of by its producers' snapshot alone; where that does not count, nothing is learned from unchecked bytes.
#[test]
fn producers_are_learned_from_bytes_that_were_checked() {
    let killed = Killed::new(BATCHES);
    let size = killed.log_bytes as usize / BATCHES as usize;
    // The newest snapshot was lost: the scan begins at the one before.
    let with_early_snapshot = |spoiled_batch: Option<usize>| {
        let copy = killed.spoiled(".log", |bytes| spoiled_batch.iter().for_each(|batch| bytes[batch * size + 45] ^= 1));
        snapshots(copy.path()).iter().for_each(|path| std::fs::remove_file(path).unwrap());
        std::fs::write(copy.path().join(&killed.early_snapshot.0), &killed.early_snapshot.1).unwrap();
        recover(copy.path(), BATCHES).map(|(log, report)| (log.last_sequence(7).unwrap().offset, report.scanned_bytes))
    };
    let known_to: u64 = killed.early_snapshot.0[..20].parse().unwrap();
    let (last, scanned) = with_early_snapshot(None).unwrap();
    assert_eq!(last, BATCHES - 1);
    assert!((killed.log_bytes - known_to * size as u64..killed.log_bytes).contains(&scanned), "{scanned}");
    assert!(matches!(with_early_snapshot(Some(known_to as usize)), Err(OpenError::Corruption(_))));
    // The log ends before the snapshot, though it was flushed that far: the recovery point is behind, and the end is lost.
    let cut = |spoiled_batch: Option<usize>| {
        let copy = killed.spoiled(".log", |bytes| {
            bytes.truncate(250 * size);
            spoiled_batch.iter().for_each(|batch| bytes[batch * size + 45] ^= 1);
        });
        recover(copy.path(), 230).map(|(log, report)| (log.last_sequence(7).unwrap().offset, report.scanned_bytes))
    };
    let (last, scanned) = cut(None).unwrap();
    assert_eq!((last, scanned < killed.log_bytes / 2), (249, true));
    assert!(matches!(cut(Some(17)), Err(OpenError::Corruption(_))));
}

/// The largest timestamp may lie in the part that is not scanned, and its entry may not have reached the disk.
#[test]
fn a_time_index_that_lost_its_end_does_not_hide_the_largest_timestamp() {
    let killed = Killed::new(150);
    let right = std::fs::read(file(&killed.dir, ".timeindex")).unwrap().len();
    for keep in [0, 12, right / 24 * 12, right - 12, right] {
        let copy = killed.spoiled(".timeindex", |bytes| bytes.truncate(keep));
        let (log, _) = recover(copy.path(), BATCHES).unwrap();
        let largest = log.reader().offset_for_max_timestamp(i64::MAX).unwrap().unwrap();
        assert_eq!((largest.offset, largest.timestamp), (150, NOW + 150), "{keep} bytes of {right}");
    }
}
