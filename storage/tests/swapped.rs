//! Segments that lie in another partition's folder: their batches are all valid, and none of them was ever written there.

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::*;
use headwater_proto::TopicId;
use headwater_proto::batch::Batches;
use headwater_storage::config::Cleanup;
use headwater_storage::files::{DirEntry, Directory, File, Files, Lock, Metadata, OpenMode};
use headwater_storage::inspect::{self, FaultKind, RepairMode, Target};
use headwater_storage::{
    Corruption, Log, LogConfig, LogIdentity, OpenError, OpenHints, OpenLimit, OsFiles, ReadError, RecoveryProgress,
    RecoveryReport,
};

const BATCHES: i64 = 60;

fn config(segment_bytes: u32) -> LogConfig {
    LogConfig { segment_bytes, ..LogConfig::default() }
}

fn identity_of(topic: &str, partition: u32) -> LogIdentity {
    let topic_id = TopicId::from_bytes([topic.as_bytes()[0]; 16]);
    LogIdentity { topic: topic.into(), topic_id, partition }
}

/// A partition in a data root, closed in good order.
fn build(root: &Path, identity: &LogIdentity, config: &LogConfig, value_bytes: usize) -> PathBuf {
    let dir = root.join(format!("{}-{}", identity.topic, identity.partition));
    let hints = OpenHints::default();
    let (mut log, _) =
        Log::open(Arc::new(OsFiles::default()), &dir, identity.clone(), config.clone(), hints, NOW).unwrap();
    let salt = i64::from(identity.partition) + i64::from(identity.topic.as_bytes()[0]);
    for n in 0..BATCHES {
        let value: Vec<u8> = (0..value_bytes).map(|at| ((at as i64 * (n + salt)) >> 2) as u8).collect();
        log.append(&[one(&value, NOW + n)], 1, NOW).unwrap();
    }
    log.close().unwrap();
    dir
}

/// Offsets and values.
type Rows = Vec<(i64, Vec<u8>)>;

fn serve(
    dir: &Path,
    identity: &LogIdentity,
    config: &LogConfig,
    hints: OpenHints,
) -> Result<(Rows, RecoveryReport), Corruption> {
    let opened = Log::open(Arc::new(OsFiles::default()), dir, identity.clone(), config.clone(), hints, NOW);
    let (log, report) = match opened {
        Ok(opened) => opened,
        Err(OpenError::Corruption(corruption)) => return Err(corruption),
        Err(error) => panic!("{error}"),
    };
    let corruption = |error| match error {
        ReadError::Corruption(corruption) => corruption,
        error => panic!("{error}"),
    };
    let reader = log.reader();
    let mut cursor = reader.seek(reader.log_start_offset()).map_err(corruption)?;
    let mut bytes = Vec::new();
    while let Some(slice) = reader.read(&mut cursor, 1 << 20, i64::MAX).map_err(corruption)? {
        if !slice.is_resident() {
            slice.load().map_err(corruption)?;
        }
        bytes.extend_from_slice(&slice.bytes());
    }
    Ok((values(bytes), report))
}

fn hints() -> [OpenHints; 3] {
    let clean = OpenHints { clean_shutdown: true, recovery_point: BATCHES, log_start_offset: 0 };
    [
        clean,
        OpenHints { clean_shutdown: false, ..clean },
        OpenHints { clean_shutdown: false, recovery_point: 30, ..clean },
    ]
}

fn logs(dir: &Path) -> Vec<PathBuf> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.sort();
    logs
}

/// What goes with the `.log`.
const COMPANIONS: [&[&str]; 4] = [&[], &["crc"], &["index", "timeindex"], &["crc", "index", "timeindex"]];

/// Exchanges two segments' `.log`, and what goes with it.
fn exchange(ours: &Path, theirs: &Path, moved: &[&str]) {
    for extension in moved.iter().chain(&["log"]) {
        let (ours, theirs) = (ours.with_extension(extension), theirs.with_extension(extension));
        let aside = ours.with_extension("aside");
        std::fs::rename(&ours, &aside).unwrap();
        std::fs::rename(&theirs, &ours).unwrap();
        std::fs::rename(&aside, &theirs).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A foreign segment of valid batches that was longer than its own, or brought its `.crc` along, was said to be one that Kafka had
/// written, and served.
#[test]
fn a_segment_of_another_partition_is_never_served() {
    let mut named = 0;
    for segment_bytes in [150_000, 40_000] {
        for (other, other_bytes) in [(("t", 1), 6000), (("t", 1), 6040), (("u", 0), 6000), (("u", 3), 6040)] {
            let root = tempfile::tempdir().unwrap();
            let config = config(segment_bytes);
            let pair = [(identity_of("t", 0), 6000), (identity_of(other.0, other.1), other_bytes)];
            let dirs = pair.clone().map(|(identity, bytes)| build(root.path(), &identity, &config, bytes));
            let all_logs = dirs.clone().map(|dir| logs(&dir));
            let count = all_logs[0].len();
            assert!(count > 2 && count == all_logs[1].len());
            for (number, moved) in
                [0, 1, count - 1].into_iter().flat_map(|number| COMPANIONS.map(|moved| (number, moved)))
            {
                for hints in hints() {
                    let spoiled = tempfile::tempdir().unwrap();
                    let dirs = dirs.clone().map(|dir| {
                        let to = spoiled.path().join(dir.file_name().unwrap());
                        copy(&dir, &to);
                        to
                    });
                    let [ours, theirs] = dirs.clone().map(|dir| logs(&dir)[number].clone());
                    exchange(&ours, &theirs, moved);
                    let what = format!("segment {number} with {moved:?} of {other:?}, {other_bytes} bytes, {hints:?}");
                    for (dir, (identity, _)) in dirs.iter().zip(&pair) {
                        let name = logs(dir)[number].clone();
                        for round in 0..2 {
                            match serve(dir, identity, &config, hints) {
                                Err(corruption) => {
                                    assert_eq!(corruption.path, name, "{what}: {corruption}");
                                    named += usize::from(corruption.detail.contains("no file of this partition"));
                                }
                                Ok((rows, report)) => {
                                    panic!("{what}: {} rows in round {round}: {report:?}", rows.len())
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(named > 400, "{named}");
}

/// `segment verify` had only notes for a segment that was exchanged together with its `.crc`, and `segment repair`, which the error named, kept every
/// batch of it under checksums of this partition: what was fenced before was served then.
#[test]
fn a_repair_leaves_out_a_segment_of_another_partition() {
    for (other, other_bytes) in [(("t", 1), 6000), (("u", 0), 6040)] {
        let root = tempfile::tempdir().unwrap();
        let config = config(150_000);
        let pair = [(identity_of("t", 0), 6000), (identity_of(other.0, other.1), other_bytes)];
        let dirs = pair.clone().map(|(identity, bytes)| build(root.path(), &identity, &config, bytes));
        let written = [0, 1].map(|n| serve(&dirs[n], &pair[n].0, &config, hints()[0]).unwrap().0);
        let count = logs(&dirs[0]).len();
        assert!(count > 2 && count == logs(&dirs[1]).len());
        for (number, moved) in (0..count).flat_map(|number| COMPANIONS.map(|moved| (number, moved))) {
            let spoiled = tempfile::tempdir().unwrap();
            let dirs = dirs.clone().map(|dir| {
                let to = spoiled.path().join(dir.file_name().unwrap());
                copy(&dir, &to);
                to
            });
            let both = dirs.clone().map(|dir| logs(&dir)[number].clone());
            exchange(&both[0], &both[1], moved);
            for (n, (identity, _)) in pair.iter().enumerate() {
                let (dir, log) = (&dirs[n], &both[n]);
                let what = format!("{} with {moved:?}", log.display());
                let name = log.file_name().unwrap().to_str().unwrap();
                let files: Arc<dyn Files> = Arc::new(OsFiles::default());
                let report = inspect::verify(&Target::open(Arc::clone(&files), dir).unwrap(), &|_| ()).unwrap();
                let named: Vec<_> = report.faults.iter().filter(|fault| fault.kind == FaultKind::Owner).collect();
                assert!(matches!(named.as_slice(), [fault] if fault.file == name), "{what}: {report:?}");
                let out = spoiled.path().join("repaired").join(dir.file_name().unwrap());
                std::fs::create_dir_all(out.parent().unwrap()).unwrap();
                let report = inspect::repair(&files, dir, &RepairMode::Copy(out.clone()), &|_| ()).unwrap();
                assert!(matches!(report.foreign.as_slice(), [left] if left.file == name), "{what}: {report:?}");
                // Exactly what was in the segment is lost, and the rest is served; nothing is given twice.
                let bases: Vec<i64> =
                    logs(dir).iter().map(|log| log.file_stem().unwrap().to_str().unwrap().parse().unwrap()).collect();
                let lost = bases[number]..bases.get(number + 1).copied().unwrap_or(BATCHES);
                let expected = inspect::OffsetRange { from: lost.start, to: lost.end - 1 };
                assert_eq!(report.lost, [expected], "{what}: {report:?}");
                for hints in hints() {
                    let (rows, report) = serve(&out, identity, &config, hints)
                        .unwrap_or_else(|corruption| panic!("{what}: {hints:?}: {corruption}"));
                    let mut kept = written[n].clone();
                    kept.retain(|(offset, _)| !lost.contains(offset));
                    assert!(rows == kept, "{what}: {} rows, not {}", rows.len(), kept.len());
                    assert!(report.crc_disagreements.is_empty(), "{what}: {report:?}");
                }
                let report = inspect::verify(&Target::open(files, &out).unwrap(), &|_| ()).unwrap();
                assert!(report.faults.is_empty(), "{what}: {report:?}");
            }
        }
    }
}

/// A folder that was copied as a whole is no exchange: it verifies, with notes, and a repair keeps all of it.
#[test]
fn a_repair_keeps_a_copied_folder() {
    let root = tempfile::tempdir().unwrap();
    let config = config(150_000);
    let dir = build(root.path(), &identity_of("t", 0), &config, 6000);
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    for elsewhere in ["t-1", "aside/t-1", "aside/any"] {
        let copied = root.path().join(elsewhere);
        copy(&dir, &copied);
        let report = inspect::verify(&Target::open(Arc::clone(&files), &copied).unwrap(), &|_| ()).unwrap();
        assert!(report.faults.is_empty(), "{elsewhere}: {report:?}");
        assert_eq!(report.notes.is_empty(), elsewhere.ends_with("any"), "{elsewhere}: {report:?}");
        let out = root.path().join("repaired").join(elsewhere).join("t-1");
        std::fs::create_dir_all(out.parent().unwrap()).unwrap();
        let report = inspect::repair(&files, &copied, &RepairMode::Copy(out.clone()), &|_| ()).unwrap();
        assert!(report.lost.is_empty() && report.foreign.is_empty(), "{elsewhere}: {report:?}");
        assert_eq!(serve(&out, &identity_of("t", 1), &config, hints()[0]).unwrap().0.len(), BATCHES as usize);
    }
}

/// What Kafka appends, and what it compacts, is its to write, and neither lies in another partition.
#[test]
fn what_kafka_appended_or_compacted_is_served() {
    for compact in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let config = LogConfig { cleanup: Cleanup { delete: !compact, compact }, ..config(150_000) };
        let identity = identity_of("t", 0);
        build(root.path(), &identity_of("t", 1), &config, 6000);
        let dir = build(root.path(), &identity, &config, 6000);
        let name = match compact {
            true => logs(&dir)[0].clone(),
            false => logs(&dir).pop().unwrap(),
        };
        let bytes = bytes::Bytes::from(std::fs::read(&name).unwrap());
        let crc = std::fs::read(name.with_extension("crc")).unwrap();
        let batches: Vec<_> = Batches::new(&bytes).map(|item| item.unwrap()).collect();
        let range = |number: usize| batches[number].0..batches.get(number + 1).map_or(bytes.len(), |next| next.0);
        let mut expected: Vec<i64> = (0..BATCHES).collect();
        let mut changed = Vec::new();
        for number in 0..batches.len() {
            if !compact || number % 4 != 1 {
                changed.extend_from_slice(&bytes[range(number)]);
            } else {
                expected.retain(|offset| *offset != number as i64);
            }
        }
        if !compact {
            // The `.crc` is that of a log that ended before the last five batches.
            let mut running = headwater_storage::crcfile::RunningCrc::new(&headwater_storage::crcfile::CrcHeader {
                topic_id: identity.topic_id,
                partition: 0,
                base_offset: batches[0].1.base_offset,
            });
            running.update(&bytes[..range(batches.len() - 6).end]);
            let mut shorter = crc[..headwater_storage::crcfile::HEADER_BYTES].to_vec();
            shorter.extend(running.take().1);
            shorter.extend(running.last_entry());
            std::fs::write(name.with_extension("crc"), shorter).unwrap();
        } else {
            assert!(changed.len() > 70_000 && changed.len() < bytes.len());
        }
        std::fs::write(&name, changed).unwrap();
        for hints in [hints()[0], hints()[1]] {
            let copied = tempfile::tempdir().unwrap();
            for folder in ["t-0", "t-1"] {
                copy(&root.path().join(folder), &copied.path().join(folder));
            }
            let (rows, _) = serve(&copied.path().join("t-0"), &identity, &config, hints)
                .unwrap_or_else(|corruption| panic!("{compact} {hints:?}: {corruption}"));
            let offsets: Vec<i64> = rows.iter().map(|(offset, _)| *offset).collect();
            assert_eq!(offsets, expected, "{compact} {hints:?}");
        }
    }
}

/// A folder that was copied under another name was fenced as if its segments had been exchanged, and so was one that another name was given.
#[test]
fn a_copied_folder_is_served_and_reported() {
    for segment_bytes in [150_000, 1_000_000] {
        for is_renamed in [false, true] {
            for hints in hints() {
                let root = tempfile::tempdir().unwrap();
                let config = config(segment_bytes);
                let identities = [0, 1].map(|partition| identity_of("t", partition));
                let dir = build(root.path(), &identities[0], &config, 6000);
                let (written, _) = serve(&dir, &identities[0], &config, hints).unwrap();
                let copied = root.path().join("t-1");
                match is_renamed {
                    true => std::fs::rename(&dir, &copied).unwrap(),
                    false => copy(&dir, &copied),
                }
                let what = format!("{segment_bytes}, renamed: {is_renamed}, {hints:?}");
                let target = Target::open(files(), &copied).unwrap();
                assert!(inspect::verify(&target, &|_| ()).unwrap().faults.is_empty(), "{what}");
                for reported in [logs(&copied).len(), 0] {
                    let (rows, report) = serve(&copied, &identities[1], &config, hints)
                        .unwrap_or_else(|corruption| panic!("{what}: {corruption}"));
                    assert!(rows == written, "{what}: {} rows", rows.len());
                    assert_eq!(report.crc_disagreements.len(), reported, "{what}: {report:?}");
                }
                // The original stays what it is, also where nothing but the copy could say whose it was.
                for bit in (0..if is_renamed { 0 } else { 8 * 60 }).step_by(37) {
                    let damaged = tempfile::tempdir().unwrap();
                    ["t-0", "t-1"]
                        .into_iter()
                        .for_each(|name| copy(&root.path().join(name), &damaged.path().join(name)));
                    let dir = damaged.path().join("t-0");
                    let crc = logs(&dir)[0].with_extension("crc");
                    let mut bytes = std::fs::read(&crc).unwrap();
                    bytes[bit / 8] ^= 1 << (bit % 8);
                    std::fs::write(&crc, bytes).unwrap();
                    let (rows, report) = serve(&dir, &identities[0], &config, hints)
                        .unwrap_or_else(|corruption| panic!("{what}, bit {bit}: {corruption}"));
                    assert!(rows == written, "{what}, bit {bit}: {} rows", rows.len());
                    assert_eq!(report.crc_disagreements.len(), 1, "{what}, bit {bit}: {report:?}");
                }
            }
        }
    }
}

/// What looks like a copy and is none: all that two partitions have was exchanged, or all that they have is one segment.
#[test]
fn exchanged_folders_are_never_served() {
    for (segment_bytes, what) in
        [(150_000, "folders"), (1_000_000, "folders"), (1_000_000, "crc"), (1_000_000, "damaged")]
    {
        for hints in hints() {
            let root = tempfile::tempdir().unwrap();
            let config = config(segment_bytes);
            let identities = [0, 1].map(|partition| identity_of("t", partition));
            let dirs = identities.clone().map(|identity| build(root.path(), &identity, &config, 6000));
            let both = dirs.clone().map(|dir| logs(&dir)[0].clone());
            match what {
                "folders" => {
                    std::fs::rename(&dirs[0], root.path().join("aside")).unwrap();
                    std::fs::rename(&dirs[1], &dirs[0]).unwrap();
                    std::fs::rename(root.path().join("aside"), &dirs[1]).unwrap();
                }
                "crc" => exchange(&both[0], &both[1], &["crc"]),
                _ => {
                    exchange(&both[0], &both[1], &[]);
                    let crc = both[0].with_extension("crc");
                    let mut bytes = std::fs::read(&crc).unwrap();
                    bytes[50] ^= 1;
                    std::fs::write(&crc, bytes).unwrap();
                }
            }
            for (dir, identity) in dirs.iter().zip(&identities) {
                let what = format!("{what}, {segment_bytes}, {hints:?}, {}", dir.display());
                match serve(dir, identity, &config, hints) {
                    Err(corruption) => assert_eq!(corruption.path, logs(dir)[0], "{what}: {corruption}"),
                    Ok((rows, report)) => panic!("{what}: {} rows: {report:?}", rows.len()),
                }
                let report = inspect::verify(&Target::open(files(), dir).unwrap(), &|_| ()).unwrap();
                assert!(!report.faults.is_empty(), "{what}: {report:?}");
                if what.starts_with("damaged") && identity.partition == 1 {
                    // Nothing says any more whose these bytes are, only that they are not its own.
                    continue;
                }
                assert!(report.faults.iter().any(|fault| fault.kind == FaultKind::Owner), "{what}: {report:?}");
                let out = root.path().join("repaired").join(dir.file_name().unwrap());
                std::fs::create_dir_all(out.parent().unwrap()).unwrap();
                let report = inspect::repair(&files(), dir, &RepairMode::Copy(out.clone()), &|_| ()).unwrap();
                assert!(!report.foreign.is_empty(), "{what}: {report:?}");
                let (rows, _) = serve(&out, identity, &config, hints).unwrap();
                assert!(rows.is_empty(), "{what}: {} rows", rows.len());
                std::fs::remove_dir_all(out).unwrap();
            }
        }
    }
}

/// Files that count what is opened and listed.
#[derive(Debug, Default)]
struct Counted {
    files: OsFiles,
    looks: AtomicU64,
}

impl Files for Counted {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.files.open(path, mode)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.files.list(dir)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.files.metadata(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.files.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.files.remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.files.create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.files.remove_dir(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        self.files.open_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.files.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.files.lock(path)
    }

    fn open_limit(&self) -> &OpenLimit {
        self.files.open_limit()
    }
}

/// Each partition that Kafka compacted looked into the folder of each other one, for each segment: ten thousand of them opened a hundred million
/// files. What they see of each other is learned once.
#[test]
fn many_partitions_that_kafka_compacted_look_at_each_file_once() {
    let looks = [8_u32, 32].map(|partitions| {
        let root = tempfile::tempdir().unwrap();
        let config = LogConfig { cleanup: Cleanup { delete: false, compact: true }, ..config(80_000) };
        for partition in 0..partitions {
            let dir = build(root.path(), &identity_of("t", partition), &config, 3000);
            let name = logs(&dir)[0].clone();
            let bytes = bytes::Bytes::from(std::fs::read(&name).unwrap());
            let batches: Vec<_> = Batches::new(&bytes).map(|item| item.unwrap().0).collect();
            std::fs::write(&name, [&bytes[..batches[1]], &bytes[batches[2]..]].concat()).unwrap();
        }
        let counted = Arc::new(Counted::default());
        let progress = RecoveryProgress::default();
        for partition in 0..partitions {
            let files: Arc<dyn Files> = counted.clone();
            let dir = root.path().join(format!("t-{partition}"));
            let identity = identity_of("t", partition);
            let (_, report) =
                Log::open_watched(files, &dir, identity, config.clone(), hints()[0], NOW, &progress).unwrap();
            assert_eq!(report.crc_disagreements.len(), 1, "{report:?}");
        }
        counted.looks.load(Ordering::Relaxed) as f64 / f64::from(partitions)
    });
    assert!(looks[1] < looks[0] * 1.1, "looks for each partition of 8, and of 32: {looks:?}");
}

/// A partition that was closed before anything was written, as a crash leaves it later: its checksum file has no entry.
fn build_unclosed(root: &Path, identity: &LogIdentity, batches: i64) -> PathBuf {
    let dir = root.join(format!("{}-{}", identity.topic, identity.partition));
    let open = || Log::open(files(), &dir, identity.clone(), config(150_000), OpenHints::default(), NOW).unwrap().0;
    open().close().unwrap();
    let mut log = open();
    for n in 0..batches {
        log.append(&[one(&[identity.partition as u8; 500], NOW + n)], 1, NOW).unwrap();
    }
    drop(log);
    let crc = dir.join("00000000000000000000.crc");
    assert_eq!(std::fs::metadata(crc).unwrap().len() as usize, headwater_storage::crcfile::HEADER_BYTES);
    dir
}

/// The `.crc` of a partition that was never written, put in another's place, fenced a good log, of which it knows no byte. Only where both partitions have
/// the other's may the logs have been exchanged, too.
#[test]
fn a_checksum_file_without_entries_says_nothing_alone() {
    let crc = |dir: &Path| dir.join("00000000000000000000.crc");
    let log = |dir: &Path| dir.join("00000000000000000000.log");
    let identities = [0, 1].map(|partition| identity_of("t", partition));
    let unclean = OpenHints::default();
    for (case, batches) in [("copied", [20, 0]), ("copied", [20, 20]), ("exchanged", [20, 0]), ("swapped", [20, 20])] {
        for is_closed in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let [dir, other] = [0, 1].map(|n| build_unclosed(root.path(), &identities[n], batches[n]));
            if is_closed {
                let opened = Log::open(files(), &dir, identities[0].clone(), config(150_000), unclean, NOW).unwrap();
                opened.0.close().unwrap();
            }
            let hints = OpenHints { clean_shutdown: is_closed, ..unclean };
            match case {
                "copied" => drop(std::fs::copy(crc(&other), crc(&dir)).unwrap()),
                "exchanged" => {
                    std::fs::rename(crc(&dir), root.path().join("aside")).unwrap();
                    std::fs::rename(crc(&other), crc(&dir)).unwrap();
                    std::fs::rename(root.path().join("aside"), crc(&other)).unwrap();
                }
                _ => exchange(&log(&dir), &log(&other), &["crc"]),
            }
            let what = format!("{case} {batches:?}, closed: {is_closed}");
            for (dir, identity, count) in [(&dir, &identities[0], batches[0]), (&other, &identities[1], batches[1])] {
                match serve(dir, identity, &config(150_000), hints) {
                    Ok((rows, report)) => {
                        assert!(case != "swapped", "{what}: {} rows: {report:?}", rows.len());
                        assert_eq!(rows.len() as i64, count, "{what}");
                        assert!(rows.iter().all(|(_, value)| value[0] == identity.partition as u8), "{what}");
                    }
                    Err(corruption) => {
                        assert!(case == "swapped" && corruption.path == log(dir), "{what}: {corruption}");
                        let target = Target::open(files(), dir).unwrap();
                        let report = inspect::verify(&target, &|_| ()).unwrap();
                        assert!(report.faults.iter().any(|fault| fault.kind == FaultKind::Owner), "{what}: {report:?}");
                    }
                }
            }
        }
    }
}

/// A `.crc` alone that is another partition's says nothing against the log beside it.
#[test]
fn a_foreign_checksum_file_beside_the_right_log_is_reported_and_made_anew() {
    let root = tempfile::tempdir().unwrap();
    let (identity, config) = (identity_of("t", 0), config(150_000));
    // A longer one.
    let other = build(root.path(), &identity_of("t", 1), &config, 6040);
    let dir = build(root.path(), &identity, &config, 6000);
    for log in logs(&dir) {
        let crc = log.with_extension("crc");
        let right = std::fs::read(&crc).unwrap();
        let aside = other.join(crc.file_name().unwrap());
        std::fs::copy(&aside, &crc).unwrap();
        std::fs::write(&aside, &right).unwrap();
        let (rows, report) = serve(&dir, &identity, &config, hints()[0]).unwrap();
        assert_eq!((rows.len(), report.crc_disagreements.len()), (BATCHES as usize, 1), "{report:?}");
        assert_eq!(std::fs::read(&crc).unwrap(), right);
    }
}
