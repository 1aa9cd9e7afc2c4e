//! Segments that lie in another partition's folder: their batches are all valid, and none of them was ever written there.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use headwater_proto::TopicId;
use headwater_proto::batch::Batches;
use headwater_storage::config::Cleanup;
use headwater_storage::{
    Corruption, Log, LogConfig, LogIdentity, OpenError, OpenHints, OsFiles, ReadError, RecoveryReport,
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
    let companions: [&[&str]; 4] = [&[], &["crc"], &["index", "timeindex"], &["crc", "index", "timeindex"]];
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
                [0, 1, count - 1].into_iter().flat_map(|number| companions.map(|moved| (number, moved)))
            {
                for hints in hints() {
                    let spoiled = tempfile::tempdir().unwrap();
                    let dirs = dirs.clone().map(|dir| {
                        let to = spoiled.path().join(dir.file_name().unwrap());
                        copy(&dir, &to);
                        to
                    });
                    let [ours, theirs] = dirs.clone().map(|dir| logs(&dir)[number].clone());
                    for extension in moved.iter().chain(&["log"]) {
                        let (ours, theirs) = (ours.with_extension(extension), theirs.with_extension(extension));
                        let aside = spoiled.path().join("aside");
                        std::fs::rename(&ours, &aside).unwrap();
                        std::fs::rename(&theirs, &ours).unwrap();
                        std::fs::rename(&aside, &theirs).unwrap();
                    }
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
