//! What `segment repair` makes of a damaged partition is a partition: it opens wherever the recovery point is, and nothing is lost twice.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::*;
use headwater_storage::{Log, LogConfig, OpenHints, inspect};

/// The segments of a log, by name.
fn logs(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    paths.sort();
    paths
}

/// Where the batches of a segment begin, each with its offset.
fn batches(path: &Path) -> Vec<(usize, i64)> {
    let bytes = std::fs::read(path).unwrap();
    headwater_proto::batch::Batches::new(&bytes)
        .map(|item| item.map(|(position, header, _)| (position, header.base_offset)).unwrap())
        .collect()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Three segments, and a leader epoch that begins every 25 offsets.
fn written(dir: &Path, config: &LogConfig) -> Vec<(i64, Vec<u8>)> {
    let (mut log, _) = open(dir, config, OpenHints::default());
    for n in 0..110 {
        let value = format!("value {n} {}", "x".repeat(n % 40)).into_bytes();
        log.append(&[one(&value, NOW + n as i64)], 1 + n as i32 / 25, NOW).unwrap();
    }
    let everything = all(&log);
    log.close().unwrap();
    everything
}

/// Recovery took a gap before the recovery point for what compaction left, and refused every other one: also one that a repair had left, which a
/// second repair did not change.
#[test]
fn a_repaired_log_opens_wherever_the_recovery_point_is() {
    type Spoil = fn(&mut Vec<u8>, usize, usize);
    let spoils: [(&str, Spoil); 3] = [
        ("overwritten", |bytes, from, to| bytes[from..to].fill(0xa5)),
        ("zeros", |bytes, from, to| bytes[from..to].fill(0)),
        ("cut", |bytes, from, to| drop(bytes.drain(from..to))),
    ];
    let config = small();
    let root = tempfile::tempdir().unwrap();
    let master = root.path().join("t-0");
    let everything = written(&master, &config);
    for (what, spoil) in spoils {
        for segment in [0, 1] {
            for (skip, at_end) in [(5, true), (0, false), (5, false)] {
                if what == "cut" && !at_end {
                    continue;
                }
                let root = tempfile::tempdir().unwrap();
                let dir = root.path().join("t-0");
                copy(&master, &dir);
                let paths = logs(&dir);
                assert!(paths.len() > 2, "{paths:?}");
                let found = batches(&paths[segment]);
                let next_base = batches(&paths[segment + 1])[0].1;
                let mut bytes = std::fs::read(&paths[segment]).unwrap();
                let (from, first) = found[skip];
                let (to, next) = if at_end { (bytes.len(), next_base) } else { found[skip + 8] };
                spoil(&mut bytes, from, to);
                std::fs::write(&paths[segment], bytes).unwrap();
                let case = format!("{what}, segment {segment}, {first}..{next}");

                let report = inspect::repair(&files(), &dir, &inspect::RepairMode::InPlace, &|_| ()).unwrap();
                let lost: Vec<(i64, i64)> = report.lost.iter().map(|range| (range.from, range.to)).collect();
                assert_eq!(lost, [(first, next - 1)], "{case}");

                let left: Vec<(i64, Vec<u8>)> =
                    everything.iter().filter(|(offset, _)| !(first..next).contains(offset)).cloned().collect();
                for recovery_point in BTreeSet::from([0, first, first + 1, next - 1, next, 110]) {
                    let opened = root.path().join(recovery_point.to_string());
                    copy(&dir, &opened);
                    let hints = OpenHints { recovery_point, ..OpenHints::default() };
                    let (log, report) = Log::open(files(), &opened, identity(), config.clone(), hints, NOW)
                        .unwrap_or_else(|error| panic!("{case}, flushed to {recovery_point}: {error}"));
                    assert!(report.cut.is_none(), "{case}, flushed to {recovery_point}: {report:?}");
                    assert!(all(&log) == left, "{case}, flushed to {recovery_point}");
                    let epochs: Vec<i64> =
                        log.leader_epochs().entries().iter().map(|entry| entry.start_offset).collect();
                    assert_eq!(epochs, [0, 25, 50, 75, 100], "{case}, flushed to {recovery_point}");
                }

                let target = inspect::Target::open(files(), &dir).unwrap();
                let verified = inspect::verify(&target, &|_| ()).unwrap();
                assert_eq!(verified.faults, [], "{case}");
                let again = inspect::repair(&files(), &dir, &inspect::RepairMode::InPlace, &|_| ()).unwrap();
                assert!(again.lost.is_empty() && again.dropped_bytes == 0, "{case}: {again:?}");
            }
        }
    }
}

/// What stands for lost offsets has no epoch that falls, whatever a damaged checkpoint says: recovery would refuse the log.
#[test]
fn a_repaired_log_opens_though_the_leader_epochs_are_damaged_too() {
    let config = small();
    let root = tempfile::tempdir().unwrap();
    let master = root.path().join("t-0");
    written(&master, &config);
    let name = "leader-epoch-checkpoint";
    let text = std::fs::read_to_string(master.join(name)).unwrap();
    let segments = logs(&master).len() - 1;
    for (right, wrong) in [("2 25", "2 4"), ("2 25", "2 48"), ("3 50", "3 30"), ("3 50", "3 74"), ("4 75", "4 55")] {
        assert!(text.contains(right), "{text}");
        for segment in 0..segments {
            for at_end in [false, true] {
                let root = tempfile::tempdir().unwrap();
                let dir = root.path().join("t-0");
                copy(&master, &dir);
                std::fs::write(dir.join(name), text.replace(right, wrong)).unwrap();
                let path = &logs(&dir)[segment];
                let found = batches(path);
                let mut bytes = std::fs::read(path).unwrap();
                let (from, to) = (found[3].0, if at_end { bytes.len() } else { found[found.len() - 3].0 });
                bytes[from..to].fill(0xa5);
                std::fs::write(path, bytes).unwrap();
                let case = format!("{right} became {wrong}, segment {segment}, to its end: {at_end}");
                inspect::repair(&files(), &dir, &inspect::RepairMode::InPlace, &|_| ()).unwrap();
                let opened = Log::open(files(), &dir, identity(), config.clone(), OpenHints::default(), NOW);
                opened.unwrap_or_else(|error| panic!("{case}: {error}"));
                let target = inspect::Target::open(files(), &dir).unwrap();
                assert_eq!(inspect::verify(&target, &|_| ()).unwrap().faults, [], "{case}");
            }
        }
    }
}
