//! Leader epochs of batches, which no checksum of a batch covers, and `leader-epoch-checkpoint`, which has none: each is held against the other.
//! Once a flipped epoch was served as it was where no `.crc` covered it yet, and a checkpoint whose digits had changed was believed.

mod common;

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use headwater_proto::batch::{Batches, NO_PRODUCER_EPOCH};
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{
    Corruption, Files as _, Log, LogConfig, OpenError, OpenHints, OpenMode, ReadError, RecoveryReport, SimFiles,
    checkpoint, inspect,
};

const CHECKPOINT: &str = "leader-epoch-checkpoint";
/// Leader epochs and the offsets at which they begin. Each wrote several batches.
const EPOCHS: [(i32, i64); 4] = [(1, 0), (4, 7), (5, 12), (19, 30)];
const END: i64 = 40;

/// Four batches a segment.
fn config() -> LogConfig {
    LogConfig { segment_bytes: 5_000, index_interval_bytes: 1_000, ..LogConfig::default() }
}

fn closed() -> OpenHints {
    OpenHints { clean_shutdown: true, recovery_point: END, log_start_offset: 0 }
}

/// A crash came when everything was flushed.
fn crashed() -> OpenHints {
    OpenHints { clean_shutdown: false, ..closed() }
}

fn build(dir: &Path, close: bool, epoch_of: impl Fn(i64) -> i32) {
    let (mut log, _) = Log::open(files(), dir, identity(), config(), OpenHints::default(), NOW).unwrap();
    for offset in 0..END {
        log.append(&[one(&[offset as u8; 1_000], NOW + offset)], epoch_of(offset), NOW).unwrap();
    }
    log.flush().unwrap();
    if close {
        log.close().unwrap();
    }
}

/// Its `.crc` ends where it was closed, within the last segment.
fn build_reopened(dir: &Path) {
    let open = |hints| Log::open(files(), dir, identity(), config(), hints, NOW).unwrap().0;
    let append = |log: &mut Log, offset: i64, epoch| {
        log.append(&[one(&[offset as u8; 1_000], NOW + offset)], epoch, NOW).unwrap();
    };
    let mut log = open(OpenHints::default());
    (0..END - 2).for_each(|offset| append(&mut log, offset, epoch_of(offset)));
    log.close().unwrap();
    let mut log = open(OpenHints { recovery_point: END - 2, ..closed() });
    (END - 2..END).for_each(|offset| append(&mut log, offset, 21));
    log.flush().unwrap();
}

fn epoch_of(offset: i64) -> i32 {
    EPOCHS.iter().rfind(|(_, start)| *start <= offset).unwrap().0
}

fn spoiled(dir: &Path, name: &str, spoil: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let copy = in_root(root.path(), 0);
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let path = copy.join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    spoil(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    (root, copy)
}

/// Whether `segment verify` finds something in a file at one of these places. Without a word if nothing is wrong.
fn verify_names(dir: &Path, name: &str, positions: std::ops::RangeInclusive<usize>) -> Result<(), String> {
    let report = inspect::verify(&inspect::Target::open(files(), dir).unwrap(), &|_| ()).unwrap();
    let found = |fault: &inspect::Fault| fault.file == name && positions.contains(&(fault.position as usize));
    if report.faults.iter().chain(&report.notes).any(found) { Ok(()) } else { Err(format!("{report:?}")) }
}

/// A partition's folder in a data root that says how far it was flushed.
fn in_root(root: &Path, number: u32) -> PathBuf {
    let key = |number| ((String::from("t"), number), END);
    let points = (0..2).map(key).collect();
    checkpoint::write_offsets(&*files(), root, checkpoint::RECOVERY_POINTS, &points).unwrap();
    root.join(format!("t-{number}"))
}

/// Reads everything, as a broker would. The epochs too, that the log knows.
fn serve(dir: &Path, hints: OpenHints) -> Result<(Vec<(i32, i64)>, RecoveryReport), Corruption> {
    let (log, report) = match Log::open(files(), dir, identity(), config(), hints, NOW) {
        Ok(opened) => opened,
        Err(OpenError::Corruption(corruption)) => return Err(corruption),
        Err(error) => panic!("{error}"),
    };
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let mut bytes = Vec::new();
    while let Some(slice) = reader.read(&mut cursor, 1_500, i64::MAX).unwrap() {
        match slice.load() {
            Err(ReadError::Corruption(corruption)) => return Err(corruption),
            loaded => loaded.unwrap(),
        }
        bytes.extend_from_slice(&slice.bytes());
    }
    let offsets: Vec<i64> = values(bytes).into_iter().map(|(offset, _)| offset).collect();
    assert_eq!(offsets, (0..END).collect::<Vec<_>>());
    Ok((log.leader_epochs().entries().iter().map(|entry| (entry.epoch, entry.start_offset)).collect(), report))
}

/// The segments' files, and where in each its batches begin.
fn batches(dir: &Path) -> Vec<(String, Vec<usize>)> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.sort();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let begin = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        let whole = Batches::new(&bytes).take_while(Result::is_ok);
        whole.map(|item| item.unwrap().0).collect()
    };
    logs.iter().map(|path| (name(path), begin(path))).collect()
}

/// What its last entry says of the bytes before it was taken for those behind it too: the flipped epoch was served, and the
/// checkpoint, which was right, made anew from it.
#[test]
fn a_checksum_that_ends_before_a_batch_says_nothing_of_its_epoch() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("t-0");
    build_reopened(&dir);
    let (name, positions) = batches(&dir).pop().unwrap();
    assert!(dir.join(&name).with_extension("crc").exists() && positions.len() == 4);
    for position in &positions[2..] {
        for bit in 0..31 {
            let (_root, copy) = spoiled(&dir, &name, |bytes| bytes[position + 15 - bit / 8] ^= 1 << (bit % 8));
            let what = format!("{position} {bit}");
            let corruption = serve(&copy, crashed()).map(|_| ()).expect_err(&what);
            assert!(corruption.path.ends_with(&name), "{what}: {corruption}");
            assert_eq!(corruption.position as usize, *position, "{what}: {corruption}");
        }
    }
}

#[test]
fn a_flipped_leader_epoch_is_never_served() {
    let root = tempfile::tempdir().unwrap();
    for (close, hints) in [(true, closed()), (false, crashed())] {
        let dir = root.path().join(format!("t-{}", u8::from(close)));
        build(&dir, close, epoch_of);
        let found = batches(&dir);
        let last = found.last().unwrap().0.clone();
        assert_eq!(found.iter().map(|(_, positions)| positions.len()).sum::<usize>() as i64, END);
        for (name, positions) in found {
            let right = std::fs::read(dir.join(&name)).unwrap();
            for (number, &position) in positions.iter().enumerate() {
                for bit in (0..4).map(|byte| byte * 8 + (position / 7 + byte) % 8) {
                    let (at, bit) = (position + 12 + bit / 8, bit % 8);
                    let (_root, copy) = spoiled(&dir, &name, |bytes| bytes[at] ^= 1 << bit);
                    let what = format!("{hints:?} {name} {position} {at} {bit}");
                    verify_names(&copy, &name, position..=position).expect(&what);
                    let corruption = serve(&copy, hints).map(|_| ()).expect_err(&what);
                    assert!(corruption.path.ends_with(&name), "{what}: {corruption}");
                    // Where the epoch falls in what nothing but its reader looks at, the batch is named that has a smaller one behind it.
                    let falls = right[at] & 1 << bit != 0;
                    let named = match close && falls && name == last && number > 0 {
                        true => positions[number - 1],
                        false => position,
                    };
                    assert_eq!(corruption.position as usize, named, "{what}: {corruption}");
                }
            }
        }
    }
}

#[test]
fn without_checksums_the_history_tells_of_a_flipped_leader_epoch() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("t-0");
    build(&dir, true, epoch_of);
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "crc") {
            std::fs::remove_file(path).unwrap();
        }
    }
    for (name, positions) in batches(&dir) {
        for position in positions {
            let (_root, copy) = spoiled(&dir, &name, |bytes| bytes[position + 14] ^= 2);
            let corruption = serve(&copy, closed()).map(|_| ()).expect_err(&name);
            assert!(corruption.path.ends_with(&name), "{corruption}");
            assert_eq!(corruption.position as usize, position, "{corruption}");
        }
    }
}

#[test]
fn a_damaged_checkpoint_of_leader_epochs_is_named_and_made_anew() {
    let root = tempfile::tempdir().unwrap();
    for (close, hints) in [(true, closed()), (false, crashed())] {
        let dir = root.path().join(format!("t-{}", u8::from(close)));
        build(&dir, close, epoch_of);
        let right = std::fs::read(dir.join(CHECKPOINT)).unwrap();
        assert_eq!(right, b"0\n4\n1 0\n4 7\n5 12\n19 30\n");
        let (epochs, report) = serve(&dir, hints).unwrap();
        assert_eq!((epochs, report.rebuilt), (EPOCHS.to_vec(), Vec::new()));
        let starts = [0, 2, 4, 8, 12, 17];
        for (position, bit) in (0..right.len()).flat_map(|position| (0..8).map(move |bit| (position, bit))) {
            let (_root, copy) = spoiled(&dir, CHECKPOINT, |bytes| bytes[position] ^= 1 << bit);
            let what = format!("{hints:?} {position} {bit}");
            // The line, or one beside it, which it contradicts; without its end, the number of lines may be what is wrong.
            let line = starts.partition_point(|start| *start <= position) - 1;
            let named = match line {
                0 | 1 => starts[line]..=starts[line],
                _ => starts[(line - 1).max(2)]..=starts[(line + 1).min(starts.len() - 1)],
            };
            let is_end = right[position] == b'\n';
            let found = verify_names(&copy, CHECKPOINT, named);
            found.or_else(|why| if is_end { verify_names(&copy, CHECKPOINT, 2..=2) } else { Err(why) }).expect(&what);
            let (epochs, report) = serve(&copy, hints).expect(&what);
            assert_eq!(epochs, EPOCHS, "{what}");
            // After a crash, the log's beginning may be one that was known no more.
            let first_start = right.iter().position(|byte| *byte == b' ').unwrap() + 1;
            let is_start = !hints.clean_shutdown && position == first_start && report.rebuilt.is_empty();
            assert!(is_start || report.rebuilt == [copy.join(CHECKPOINT)], "{what}: {report:?}");
            assert_eq!(std::fs::read(copy.join(CHECKPOINT)).unwrap(), right, "{what}");
        }
        for other in ["0\n0\n", "0\n3\n1 0\n4 7\n5 12\n", "0\n2\n1 0\n77 30\n", "0\n1\n7 900\n"] {
            let (_root, copy) = spoiled(&dir, CHECKPOINT, |bytes| *bytes = other.into());
            let (epochs, report) = serve(&copy, hints).expect(other);
            assert_eq!((epochs, report.rebuilt.len()), (EPOCHS.to_vec(), 1), "{other}");
        }
    }
}

/// Where a leader wrote one batch only and no `.crc` covers it, that batch may as well be the wrong one.
#[test]
fn where_nothing_tells_which_of_the_two_is_wrong_both_are_named() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("t-0");
    build(&dir, false, |offset| if offset == END - 1 { 20 } else { epoch_of(offset) });
    let (name, positions) = batches(&dir).pop().unwrap();
    let (_root, copy) = spoiled(&dir, CHECKPOINT, |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("20 39", "24 39").into();
    });
    let corruption = serve(&copy, crashed()).unwrap_err();
    assert_eq!((corruption.position as usize, corruption.offset), (*positions.last().unwrap(), Some(END - 1)));
    assert!(corruption.path.ends_with(name), "{corruption}");
    assert!(corruption.detail.contains("leader-epoch-checkpoint says 24 in line 7"), "{corruption}");
    // A `.crc` that covers it tells.
    let (log, _) = Log::open(files(), &dir, identity(), config(), crashed(), NOW).unwrap();
    log.close().unwrap();
    let (_root, copy) = spoiled(&dir, CHECKPOINT, |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("20 39", "24 39").into();
    });
    for hints in [closed(), crashed()] {
        let (epochs, report) = serve(&copy, hints).unwrap();
        assert_eq!((epochs.last(), report.rebuilt.len()), (Some(&(20, 39)), usize::from(hints.clean_shutdown)));
    }
}

/// Beyond the recovery point the checkpoint knows too little, or of a leader that wrote nothing: neither is damage, and nothing is lost.
#[test]
fn epochs_beyond_the_recovery_point_are_learned_from_the_batches() {
    let disk = SimFiles::new(1);
    let dir = Path::new("/t-0");
    let open = |disk: &Arc<SimFiles>, recovery_point| {
        let hints = OpenHints { recovery_point, ..OpenHints::default() };
        Log::open(Arc::clone(disk) as Arc<_>, dir, identity(), LogConfig::default(), hints, NOW).unwrap()
    };
    let (mut log, _) = open(&disk, 0);
    log.append(&[one(b"a", NOW), one(b"b", NOW)], 3, NOW).unwrap();
    // A leader that writes nothing, and is known on the disk all the same.
    log.assign_leader_epoch(9);
    log.close().unwrap();
    let disk = disk.restart();
    let (mut log, _) = open(&disk, 2);
    assert_eq!(log.leader_epochs().latest(), Some(3));
    log.assign_leader_epoch(9);
    log.flush().unwrap();
    log.roll_if_due(NOW + 100 * 24 * 60 * 60 * 1_000).unwrap();
    let mut batch = one(b"c", NOW);
    (batch.header.base_offset, batch.header.leader_epoch) = (2, 7);
    assert_eq!(batch.header.producer_epoch, NO_PRODUCER_EPOCH);
    log.append_as_follower(&[batch], &[], NOW).unwrap();
    log.append(&[one(b"d", NOW)], 11, NOW).unwrap();
    drop(log);
    let (log, report) = open(&disk.restart(), 2);
    let known: Vec<(i32, i64)> = log.leader_epochs().entries().iter().map(|e| (e.epoch, e.start_offset)).collect();
    assert_eq!((log.log_end_offset(), report.cut, report.rebuilt), (4, None, Vec::new()));
    assert_eq!(known, [(3, 0), (7, 2), (11, 3)]);
}

/// A clean start held only the newest entries of the checkpoint against the log, and what the `.crc` agreed with was served without a look at
/// its epochs: a digit that had changed further up was believed for good, and told whoever asked where an epoch ended.
#[test]
fn a_damaged_line_of_a_long_history_is_named_before_its_segment_is_served() {
    const EPOCHS: i64 = 100;
    let (root, config) = (tempfile::tempdir().unwrap(), config());
    let dir = in_root(root.path(), 0);
    let hints = |clean_shutdown| OpenHints { clean_shutdown, recovery_point: EPOCHS * 3, log_start_offset: 0 };
    let open = |clean| Log::open(files(), &dir, identity(), config.clone(), hints(clean), NOW).unwrap();
    let (mut log, _) = Log::open(files(), &dir, identity(), config.clone(), OpenHints::default(), NOW).unwrap();
    for offset in 0..EPOCHS * 3 {
        log.append(&[one(&[offset as u8; 100], NOW)], 100 + (offset / 3 * 10) as i32, NOW).unwrap();
    }
    log.close().unwrap();
    let right = std::fs::read_to_string(dir.join(CHECKPOINT)).unwrap();
    let lines: Vec<&str> = right.lines().collect();
    assert_eq!(lines.len() as i64, EPOCHS + 2);
    let read_all = |log: &Log| -> Result<(), ReadError> {
        let reader = log.reader();
        let mut cursor = reader.seek(0)?;
        while let Some(slice) = reader.read(&mut cursor, 1_500, i64::MAX)? {
            slice.load()?;
        }
        Ok(())
    };
    let (log, report) = open(true);
    read_all(&log).unwrap();
    assert!(report.clean && report.rebuilt.is_empty());
    drop(log);
    let (mut at_once, mut later) = (0, 0);
    for number in (2..lines.len()).step_by(2) {
        let (epoch, start) = lines[number].split_once(' ').unwrap();
        let (epoch, start): (i64, i64) = (epoch.parse().unwrap(), start.parse().unwrap());
        for (epoch, start) in [(epoch + 1, start), (epoch - 9, start), (epoch, start + 1), (epoch, start - 2)] {
            if start < 0 {
                continue;
            }
            let wrong = format!("{epoch} {start}");
            let mut spoiled = lines.clone();
            spoiled[number] = &wrong;
            std::fs::write(dir.join(CHECKPOINT), spoiled.join("\n") + "\n").unwrap();
            let (log, report) = open(true);
            if report.rebuilt.is_empty() {
                later += 1;
                let error = read_all(&log).expect_err(&wrong);
                let ReadError::Corruption(corruption) = error else { panic!("{wrong}: {error}") };
                assert_eq!(corruption.path, dir.join(CHECKPOINT), "{wrong}: {corruption}");
                let said: usize = corruption.detail.split(' ').nth(1).unwrap().parse().unwrap();
                assert!((number..=number + 1).contains(&said), "line {}, {wrong}: {corruption}", number + 1);
                let before: usize = lines[..said - 1].iter().map(|line| line.len() + 1).sum();
                assert!(corruption.position.abs_diff(before as u64) < 3, "{wrong}: {corruption}");
                drop(log);
                // What was come upon is no end in good order.
                let (log, report) = open(false);
                assert_eq!((report.rebuilt, log.leader_epochs().entries().len()), (vec![dir.join(CHECKPOINT)], 100));
            } else {
                at_once += 1;
                read_all(&log).unwrap();
            }
            assert_eq!(std::fs::read_to_string(dir.join(CHECKPOINT)).unwrap(), right, "{wrong}");
        }
    }
    assert!(at_once > 50 && later > 50, "{at_once} {later}");
}

/// Of batches without a leader epoch no checkpoint can be made, so each start in good order read all their headers.
#[test]
fn a_log_without_leader_epochs_is_not_walked_at_each_start() {
    const BATCHES: i64 = 1_000;
    for checkpoint in [None, Some("0\n0\n")] {
        let disk = SimFiles::new(1);
        let dir = Path::new("/t-0");
        let config = LogConfig { segment_bytes: 400_000, ..LogConfig::default() };
        let open = |disk: &Arc<SimFiles>, hints| {
            Log::open(Arc::clone(disk) as Arc<_>, dir, identity(), config.clone(), hints, NOW)
        };
        let (mut log, _) = open(&disk, OpenHints::default()).unwrap();
        for offset in 0..BATCHES {
            log.append(&[one(&[0; 1_000], NOW + offset)], -1, NOW).unwrap();
        }
        log.close().unwrap();
        if let Some(text) = checkpoint {
            let file = disk.open(&dir.join(CHECKPOINT), OpenMode::Create).unwrap();
            file.write_at(0, &[IoSlice::new(text.as_bytes())]).unwrap();
        }
        // A walk reads each batch's header, and these lie in pages of their own.
        disk.fail(Fault::new(Operation::Read).on(".log").after(BATCHES as u64 / 10));
        let hints = OpenHints { clean_shutdown: true, recovery_point: BATCHES, log_start_offset: 0 };
        let (log, report) = open(&disk, hints).unwrap();
        assert!(report.clean && report.rebuilt.is_empty(), "{report:?}");
        assert_eq!((log.log_end_offset(), log.leader_epochs().entries().len()), (BATCHES, 0));
    }
}

/// A disk that reads a header in one way and then in another left nothing to blame, and the log was refused without a file's name.
#[test]
fn a_leader_epoch_that_is_right_when_it_is_read_again_is_named_with_its_place() {
    const SPOILED: usize = 20;
    let dir = Path::new("/t-0");
    let mut named = 0;
    for reads in 0..8 {
        let disk = SimFiles::new(1);
        let open = |disk: &Arc<SimFiles>| {
            let hints = OpenHints::default();
            Log::open(Arc::clone(disk) as Arc<_>, dir, identity(), LogConfig::default(), hints, NOW)
        };
        let (mut log, _) = open(&disk).unwrap();
        let mut position = 0;
        for offset in 0..END {
            let batch = one(&[offset as u8; 1_000], NOW + offset);
            position += if (offset as usize) < SPOILED { batch.bytes.len() as u64 } else { 0 };
            log.append(&[batch], epoch_of(offset), NOW).unwrap();
        }
        log.flush().unwrap();
        drop(log);
        disk.remove_file(&dir.join(CHECKPOINT)).unwrap();
        let file = disk.open(&dir.join("00000000000000000000.log"), OpenMode::Write).unwrap();
        let write = |epoch: i32| file.write_at(position + 12, &[IoSlice::new(&epoch.to_be_bytes())]).unwrap();
        write(2);
        let held = disk.hold(Fault::new(Operation::Read).on(".log").after(reads));
        let opening = std::thread::scope(|scope| {
            let opening = scope.spawn(|| open(&disk).map(|_| ()));
            let deadline = Instant::now() + Duration::from_secs(30);
            while held.waiting() == 0 && !opening.is_finished() {
                assert!(Instant::now() < deadline, "it neither waits nor ends");
                std::thread::yield_now();
            }
            write(epoch_of(SPOILED as i64));
            drop(held);
            opening.join().unwrap()
        });
        match opening {
            Ok(()) => {}
            Err(OpenError::Corruption(corruption)) => {
                assert!(corruption.path.ends_with("00000000000000000000.log"), "{corruption}");
                assert_eq!((corruption.position, corruption.offset), (position, Some(SPOILED as i64)));
                named += u32::from(corruption.detail.ends_with("not so when its header was read again"));
            }
            Err(error) => panic!("{reads}: {error}"),
        }
    }
    assert!(named > 0);
}
