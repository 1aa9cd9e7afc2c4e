//! Damage of every kind to every file of a partition: named with file and position, or mended and reported; never served, never a panic.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use headwater_proto::TopicId;
use headwater_proto::batch::BuildOptions;
use headwater_storage::{
    BatchOutcome, Corruption, DataDir, DataDirError, Log, LogConfig, LogIdentity, NewIdentity, OpenError, OpenHints,
    OsFiles, ReadError, RecoveryReport, checkpoint, crcfile, inspect,
};

/// Segments of two 64 KiB blocks and a bit.
fn config() -> LogConfig {
    LogConfig { segment_bytes: 150_000, ..LogConfig::default() }
}

const BATCHES: i64 = 60;
const BATCH_VALUE_BYTES: usize = 6000;

/// A log that was closed in good order: three segments, two epochs, a producer.
fn build(dir: &Path, identity: LogIdentity) -> Vec<(i64, Vec<u8>)> {
    let files = Arc::new(OsFiles::with_open_limit(64));
    let (mut log, _) = Log::open(files, dir, identity, config(), OpenHints::default(), NOW).unwrap();
    for n in 0..BATCHES {
        let options =
            BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: n as i32, ..BuildOptions::default() };
        let value: Vec<u8> = (0..BATCH_VALUE_BYTES).map(|at| ((at as i64 * (n + 3)) >> 2) as u8).collect();
        let batch = batch_of(options, NOW + n, &[&value]);
        assert!(matches!(log.append(&[batch], 1 + (n / 40) as i32, NOW).unwrap()[..], [BatchOutcome::Appended { .. }]));
    }
    let everything = all(&log);
    assert!(log.reader().segment_count() == 3);
    log.close().unwrap();
    everything
}

/// Offsets and values.
type Rows = Vec<(i64, Vec<u8>)>;

struct Master {
    _root: tempfile::TempDir,
    dir: PathBuf,
    everything: Rows,
}

impl Master {
    fn new() -> Master {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("t-0");
        let everything = build(&dir, identity());
        Master { _root: root, dir, everything }
    }

    /// A copy of the folder, in which `spoil` has changed a file.
    fn spoiled(&self, name: &str, spoil: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&self.dir).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        let path = copy.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        spoil(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        copy
    }

    fn files(&self, end: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(end))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "{end}");
        names
    }
}

/// Opens and reads everything, as a broker would.
fn serve(dir: &Path, hints: OpenHints) -> Result<(Rows, RecoveryReport), Corruption> {
    let files = Arc::new(OsFiles::with_open_limit(64));
    let (log, report) = match Log::open(files, dir, identity(), config(), hints, NOW) {
        Ok(opened) => opened,
        Err(OpenError::Corruption(corruption)) => return Err(corruption),
        Err(error) => panic!("{error}"),
    };
    let reader = log.reader();
    let mut bytes = Vec::new();
    let corruption = |error| match error {
        ReadError::Corruption(corruption) => corruption,
        error => panic!("{error}"),
    };
    let mut cursor = reader.seek(reader.log_start_offset()).map_err(corruption)?;
    while let Some(slice) = reader.read(&mut cursor, 20_000, i64::MAX).map_err(corruption)? {
        if !slice.is_resident() {
            slice.load().map_err(corruption)?;
        }
        bytes.extend_from_slice(&slice.bytes());
    }
    let last = log.last_sequence(7).map(|last| (last.sequence, last.offset));
    assert_eq!(last, Some((BATCHES as i32 - 1, BATCHES - 1)), "{hints:?} {report:?}");
    let epochs: Vec<(i32, i64)> = log.leader_epochs().entries().iter().map(|e| (e.epoch, e.start_offset)).collect();
    assert_eq!(epochs, [(1, 0), (2, 40)]);
    Ok((values(bytes), report))
}

fn flushed() -> OpenHints {
    OpenHints { recovery_point: BATCHES, ..OpenHints::default() }
}

fn closed() -> OpenHints {
    OpenHints { clean_shutdown: true, recovery_point: BATCHES, ..OpenHints::default() }
}

fn closed_well(report: &RecoveryReport) -> bool {
    report.rebuilt.is_empty()
        && report.crc_disagreements.is_empty()
        && report.cut.is_none()
        && report.finished_trims.is_empty()
}

/// Positions that tell most: every byte of some headers, and some of everything else.
fn positions(len: usize, header_at: &[usize]) -> Vec<usize> {
    let mut positions: Vec<usize> = header_at.iter().flat_map(|at| *at..at + 61).collect();
    positions.extend((0..len).step_by(19_973));
    positions.push(len - 1);
    positions.retain(|position| *position < len);
    positions
}

#[test]
fn an_undamaged_log_is_served_without_a_word() {
    let master = Master::new();
    for hints in [closed(), flushed(), OpenHints::default()] {
        let copy = master.spoiled("leader-epoch-checkpoint", |_| {});
        let (everything, report) = serve(copy.path(), hints).unwrap();
        assert_eq!(everything, master.everything);
        assert!(closed_well(&report), "{report:?}");
    }
}

#[test]
fn a_flipped_bit_of_a_log_is_never_served() {
    let master = Master::new();
    let batch_bytes = std::fs::read(master.dir.join(&master.files(".log")[0])).unwrap();
    let size = 12 + u32::from_be_bytes(batch_bytes[8..12].try_into().unwrap()) as usize;
    for name in master.files(".log") {
        let len = std::fs::metadata(master.dir.join(&name)).unwrap().len() as usize;
        for (number, position) in positions(len, &[0, 10 * size]).into_iter().enumerate() {
            let copy = master.spoiled(&name, |bytes| bytes[position] ^= 1 << (number % 8));
            let hints = if number % 5 == 0 { flushed() } else { closed() };
            match serve(copy.path(), hints) {
                Err(corruption) => {
                    assert_eq!(corruption.path.file_name().unwrap().to_str().unwrap(), name, "{corruption}");
                    assert!(corruption.position.abs_diff(position as u64) <= 2 * 65536, "{corruption}: {position}");
                    assert!(corruption.to_string().contains("headwater segment"), "{corruption}");
                }
                Ok((_, report)) => panic!("a flipped bit at {position} of {name} was served: {report:?}"),
            }
        }
    }
}

#[test]
fn a_log_that_was_cut_or_emptied_is_named() {
    let master = Master::new();
    for name in master.files(".log") {
        let len = std::fs::metadata(master.dir.join(&name)).unwrap().len() as usize;
        for keep in [0, 1, 61, 6000, 12_200, len / 2, len - 6100, len - 1] {
            for hints in [closed(), flushed()] {
                let copy = master.spoiled(&name, |bytes| bytes.truncate(keep));
                let corruption = serve(copy.path(), hints).unwrap_err();
                assert_eq!(corruption.path.file_name().unwrap().to_str().unwrap(), name, "{keep}: {corruption}");
            }
        }
    }
}

#[test]
fn a_segment_that_is_missing_is_noticed() {
    let master = Master::new();
    let names = master.files(".log");
    for name in [&names[2]] {
        for hints in [closed(), flushed()] {
            let copy = master.spoiled(name, |_| {});
            std::fs::remove_file(copy.path().join(name)).unwrap();
            let corruption = serve(copy.path(), hints).unwrap_err();
            assert!(corruption.detail.contains("was flushed"), "{corruption}");
        }
    }
}

/// How a segment in the middle may be lost.
#[derive(Debug, Clone, Copy)]
enum Loss {
    /// The `.log` is gone, the rest is there.
    Log,
    /// Every file is gone, its producers' snapshot too.
    Everything,
    /// The `.log` is empty, the rest is there.
    LogEmptied,
    /// Every file is empty.
    EverythingEmptied,
    /// The `.log` is empty, the rest is gone.
    LogEmptiedRestGone,
}

/// Compaction empties segments and removes them. What may be its work must not hide what is not.
#[test]
fn a_segment_that_is_lost_or_emptied_is_a_fault_to_verify() {
    use Loss::{Everything, EverythingEmptied, Log, LogEmptied, LogEmptiedRestGone};
    let master = Master::new();
    let names = master.files(".log");
    let (lost, behind) = (&names[1], &names[2]);
    let (from, next): (i64, i64) = (lost[..20].parse().unwrap(), behind[..20].parse().unwrap());
    for loss in [Log, Everything, LogEmptied, EverythingEmptied, LogEmptiedRestGone] {
        let copy = master.spoiled(lost, |_| {});
        for entry in std::fs::read_dir(copy.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if !name.starts_with(&lost[..20]) {
                continue;
            }
            match (loss, name == lost) {
                (Log, true) | (Everything, _) | (LogEmptiedRestGone, false) => std::fs::remove_file(&path).unwrap(),
                (LogEmptied | LogEmptiedRestGone, true) | (EverythingEmptied, _) => std::fs::write(&path, []).unwrap(),
                (Log | LogEmptied, false) => {}
            }
        }
        let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
        let report = inspect::verify(&inspect::Target::open(files, copy.path()).unwrap(), &|_| ()).unwrap();
        let gap = format!("offsets {from} to {} are missing", next - 1);
        let fault = report.faults.iter().find(|fault| fault.detail == gap);
        let fault = fault.unwrap_or_else(|| panic!("{loss:?}: {report:?}"));
        assert_eq!((&fault.file, fault.offset), (behind, Some(from)), "{loss:?}");
        let named = report.faults.iter().any(|fault| fault.file[..20] == lost[..20]);
        assert_eq!(named, matches!(loss, Log | LogEmptied | EverythingEmptied), "{loss:?}: {report:?}");
    }
}

#[test]
fn damaged_indexes_are_made_anew_and_lead_nobody_astray() {
    let master = Master::new();
    for end in [".index", ".timeindex"] {
        for name in master.files(end) {
            let right = std::fs::read(master.dir.join(&name)).unwrap();
            let spoils: [fn(&mut Vec<u8>); 5] = [
                |bytes| bytes.clear(),
                |bytes| bytes.truncate(bytes.len() - 1),
                |bytes| bytes.extend_from_slice(&[0; 96]),
                |bytes| bytes.fill(0xff),
                |bytes| bytes.reverse(),
            ];
            for (which, spoil) in spoils.into_iter().enumerate() {
                let copy = master.spoiled(&name, spoil);
                for hints in [closed(), flushed()] {
                    let (everything, _) = serve(copy.path(), hints).unwrap();
                    assert_eq!(everything, master.everything, "{name} {which}");
                }
                if which != 2 {
                    assert_eq!(std::fs::read(copy.path().join(&name)).unwrap(), right, "{name} {which}");
                }
            }
            for position in (0..right.len()).step_by(7) {
                let copy = master.spoiled(&name, |bytes| bytes[position] ^= 0x10);
                let files = Arc::new(OsFiles::default());
                let (log, _) = Log::open(files, copy.path(), identity(), config(), closed(), NOW).unwrap();
                let reader = log.reader();
                for offset in 0..BATCHES {
                    let mut cursor = reader.seek(offset).unwrap();
                    let slice = reader.read(&mut cursor, 6200, i64::MAX).unwrap().unwrap();
                    let header = headwater_proto::batch::BatchHeader::parse(&slice.bytes()).unwrap();
                    assert_eq!(header.base_offset, offset);
                    let found = reader.offset_for_timestamp(NOW + offset, i64::MAX).unwrap();
                    assert_eq!(found.map(|found| found.offset), Some(offset), "{name} {position}");
                }
            }
        }
    }
}

#[test]
fn damaged_checksum_files_are_reported_and_made_anew() {
    let master = Master::new();
    for name in master.files(".crc") {
        let right = std::fs::read(master.dir.join(&name)).unwrap();
        for position in 0..right.len() {
            let copy = master.spoiled(&name, |bytes| bytes[position] ^= 4);
            let (everything, report) =
                serve(copy.path(), if position % 2 == 0 { closed() } else { flushed() }).unwrap();
            assert_eq!(everything, master.everything);
            let sealed = name != *master.files(".crc").last().unwrap();
            if position % 2 == 0 || !sealed {
                assert_eq!(report.crc_disagreements.len(), 1, "{name} {position}: {report:?}");
            }
            assert_eq!(std::fs::read(copy.path().join(&name)).unwrap(), right, "{name} {position}");
        }
        // Whole entries that are missing at its end leave a checksum file, of a shorter log.
        for keep in (crcfile::HEADER_BYTES..right.len()).step_by(crcfile::ENTRY_BYTES) {
            let copy = master.spoiled(&name, |bytes| bytes.truncate(keep));
            let (everything, report) = serve(copy.path(), closed()).unwrap();
            assert_eq!(everything, master.everything, "{name} {keep}");
            assert_eq!(report.rebuilt, [copy.path().join(&name)], "{name} {keep}: {report:?}");
            assert_eq!(std::fs::read(copy.path().join(&name)).unwrap(), right, "{name} {keep}");
        }
        let copy = master.spoiled(&name, |bytes| bytes.truncate(50));
        let (everything, report) = serve(copy.path(), closed()).unwrap();
        assert_eq!((everything == master.everything, report.crc_disagreements.len()), (true, 1));
    }
}

/// What is not scanned ends at a multiple of 64 KiB, within a batch. When the `.crc` could not be used any more once the log was open,
/// that batch was checked as if it ended there too: a healthy partition was fenced.
#[test]
fn a_checksum_file_that_goes_while_the_log_is_open_costs_nothing() {
    let master = Master::new();
    let spoils: [fn(&Path); 3] = [
        |crc| std::fs::remove_file(crc).unwrap(),
        |crc| {
            let bytes = std::fs::read(crc).unwrap();
            std::fs::write(crc, &bytes[..bytes.len() - 5]).unwrap();
        },
        |crc| std::fs::write(crc, []).unwrap(),
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        for truncates in [false, true] {
            let copy = master.spoiled("partition.metadata", |_| {});
            let (mut log, _) = open(copy.path(), &config(), closed());
            for name in master.files(".crc") {
                spoil(&copy.path().join(name));
            }
            let kept = if truncates { BATCHES - 1 } else { BATCHES };
            log.truncate(kept, NOW).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(all(&log), master.everything[..kept as usize], "{number}");
        }
    }
}

/// It was an error of the disk, for which the partition was fenced.
#[test]
fn an_index_that_is_too_large_is_made_anew() {
    let master = Master::new();
    for end in [".index", ".timeindex"] {
        for name in master.files(end) {
            for hints in [closed(), flushed(), OpenHints::default()] {
                let copy = master.spoiled(&name, |_| {});
                let path = copy.path().join(&name);
                std::fs::File::options().write(true).open(&path).unwrap().set_len((1 << 30) + 24).unwrap();
                let (everything, report) = serve(copy.path(), hints).unwrap();
                assert_eq!(everything, master.everything, "{name}");
                assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(master.dir.join(&name)).unwrap(), "{name}");
                assert!(report.rebuilt.contains(&path), "{name} {hints:?}: {report:?}");
            }
        }
    }
}

#[test]
fn damaged_snapshots_and_epochs_are_made_anew() {
    let master = Master::new();
    for name in master.files(".snapshot").into_iter().chain(["leader-epoch-checkpoint".into()]) {
        let len = std::fs::metadata(master.dir.join(&name)).unwrap().len() as usize;
        for cut in [0, 3, len - 1] {
            for hints in [closed(), flushed(), OpenHints::default()] {
                let copy = master.spoiled(&name, |bytes| bytes.truncate(cut));
                assert_eq!(serve(copy.path(), hints).unwrap().0, master.everything, "{name}");
            }
        }
        let newest = name.starts_with(&format!("{BATCHES:020}"));
        for position in 0..len {
            let copy = master.spoiled(&name, |bytes| bytes[position] ^= 0x80);
            let (everything, report) = serve(copy.path(), closed()).unwrap();
            assert_eq!(everything, master.everything, "{name}");
            if newest || name.starts_with("leader") {
                assert_eq!(report.rebuilt.len(), 1, "{name} {position}: {report:?}");
            }
        }
    }
}

#[test]
fn damaged_partition_metadata_is_named() {
    let master = Master::new();
    for cut in [0, 5, 15, 30] {
        let copy = master.spoiled("partition.metadata", |bytes| bytes.truncate(cut));
        let corruption = serve(copy.path(), closed()).unwrap_err();
        assert!(corruption.path.ends_with("partition.metadata"), "{corruption}");
    }
    let len = std::fs::metadata(master.dir.join("partition.metadata")).unwrap().len() as usize;
    let mut of_another_topic = 0;
    for bit in 0..len * 8 {
        let copy = master.spoiled("partition.metadata", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        let second_at = "version: 0\n".len();
        let line = if bit / 8 < second_at { 1 } else { 2 };
        let files = Arc::new(OsFiles::default());
        match Log::open(files, copy.path(), identity(), config(), closed(), NOW) {
            Err(OpenError::Corruption(corruption)) => {
                assert!(corruption.path.ends_with("partition.metadata"), "{bit}: {corruption}");
                assert!(corruption.detail.contains(&format!("line {line}")), "{bit}: {corruption}");
                assert_eq!(corruption.position as usize, if line == 1 { 0 } else { second_at }, "{bit}: {corruption}");
            }
            Err(error @ OpenError::ForeignTopic { .. }) => {
                assert!(line == 2 && error.to_string().contains("line 2 of its partition.metadata"), "{bit}: {error}");
                of_another_topic += 1;
            }
            Err(error) => panic!("{bit}: {error}"),
            Ok(_) => panic!("a flipped bit {bit} went unnoticed"),
        }
    }
    assert!(of_another_topic > 20);
}

#[test]
fn files_of_another_partition_are_reported() {
    let master = Master::new();
    let root = tempfile::tempdir().unwrap();
    let other = root.path().join("u-3");
    build(&other, LogIdentity { topic: "u".into(), topic_id: TopicId::from_bytes([3; 16]), partition: 3 });
    for end in [".log", ".crc"] {
        for name in master.files(end) {
            let foreign = std::fs::read(other.join(&name)).unwrap();
            let copy = master.spoiled(&name, |bytes| *bytes = foreign);
            match serve(copy.path(), closed()) {
                // Both logs hold the same bytes, so only the checksums can tell.
                Ok((everything, report)) => {
                    assert_eq!(everything, master.everything);
                    assert_eq!(report.crc_disagreements.len(), usize::from(end == ".crc"), "{name}: {report:?}");
                }
                Err(corruption) => panic!("{corruption}"),
            }
        }
    }
    // A whole folder under another name.
    std::fs::copy(master.dir.join("partition.metadata"), other.join("partition.metadata")).unwrap();
    let (everything, report) = serve(&other, closed()).unwrap();
    assert_eq!((everything == master.everything, report.crc_disagreements.len()), (true, 3));
    let (_, report) = serve(&other, flushed()).unwrap();
    assert!(report.crc_disagreements.is_empty(), "they were made anew: {report:?}");
}

#[test]
fn a_torn_tail_is_cut_and_damage_further_back_is_not() {
    let master = Master::new();
    let last = master.files(".log").pop().unwrap();
    let base: i64 = last[..20].parse().unwrap();
    let len = std::fs::metadata(master.dir.join(&last)).unwrap().len() as usize;
    let count = (BATCHES - base) as usize;
    let batch = len / count;
    let unflushed = |recovery_point| {
        let config = LogConfig { unflushed_limit_bytes: 3 * batch as u64, ..config() };
        move |dir: &Path| {
            let hints = OpenHints { recovery_point, ..OpenHints::default() };
            Log::open(Arc::new(OsFiles::default()), dir, identity(), config.clone(), hints, NOW)
        }
    };
    for back in 1..count {
        let copy = master.spoiled(&last, |bytes| bytes[len - back * batch + 500] ^= 1);
        let opened = unflushed(base)(copy.path());
        // The damaged batch and those behind it may be one torn write, if together they are within the limit.
        if back <= 3 {
            let (log, report) = opened.unwrap();
            let cut = report.cut.unwrap();
            assert_eq!((cut.position as usize, cut.bytes as usize), (len - back * batch, back * batch));
            assert_eq!((log.log_end_offset(), cut.next_offset), (BATCHES - back as i64, BATCHES - back as i64));
            assert_eq!(all(&log), master.everything[..(BATCHES - back as i64) as usize]);
        } else {
            let Err(OpenError::Corruption(corruption)) = opened else { panic!("{back} was cut") };
            assert_eq!(corruption.position as usize, len - back * batch);
            assert!(corruption.detail.contains("a valid batch follows"), "{corruption}");
        }
        // Below the recovery point nothing is torn.
        let Err(OpenError::Corruption(_)) = unflushed(BATCHES - back as i64 + 1)(copy.path()) else { continue };
        let copy = master.spoiled(&last, |bytes| bytes[len - back * batch + 500] ^= 1);
        assert!(matches!(unflushed(BATCHES)(copy.path()), Err(OpenError::Corruption(_))));
    }
    for garbage in [1usize, 60, 61, 5000] {
        let copy = master.spoiled(&last, |bytes| bytes.extend((0..garbage).map(|n| (n * 31 + 1) as u8)));
        let (log, report) = unflushed(BATCHES)(copy.path()).unwrap();
        assert_eq!(report.cut.map(|cut| cut.bytes), Some(garbage as u64));
        assert_eq!(all(&log), master.everything);
    }
}

#[test]
fn reserved_zeros_are_trimmed_wherever_they_are() {
    let master = Master::new();
    for name in master.files(".log") {
        for hints in [closed(), flushed(), OpenHints::default()] {
            let copy = master.spoiled(&name, |bytes| bytes.resize(bytes.len() + 70_000, 0));
            let (everything, report) = serve(copy.path(), hints).unwrap();
            assert_eq!(everything, master.everything);
            assert_eq!(report.cut, None);
            let last = name == *master.files(".log").last().unwrap();
            if hints.clean_shutdown || last {
                assert_eq!(report.finished_trims.len(), 1, "{name} {hints:?}: {report:?}");
                assert!(report.rebuilt.iter().all(|path| path.extension().unwrap() != "crc"), "{report:?}");
            }
        }
    }
}

/// Where each batch of a `.log` begins, with its first offset.
fn batches(bytes: &[u8]) -> Vec<(usize, i64)> {
    let bytes = bytes::Bytes::copy_from_slice(bytes);
    headwater_proto::batch::Batches::new(&bytes)
        .map(|item| item.map(|(position, header, _)| (position, header.base_offset)).unwrap())
        .collect()
}

/// Zeros behind the batches of a sealed segment were taken for space that was reserved, and cut, whatever its `.crc` said: records
/// that were acknowledged were gone without a word.
#[test]
fn flushed_bytes_that_read_as_zeros_are_never_cut() {
    let master = Master::new();
    let names = master.files(".log");
    let (_, sealed) = names.split_last().unwrap();
    for name in sealed {
        let right = std::fs::read(master.dir.join(name)).unwrap();
        let starts = batches(&right);
        let mut losses: Vec<usize> = starts.iter().map(|(position, _)| right.len() - position).collect();
        losses.extend([1, 61, 4096, 8192, 65536, right.len() - 1]);
        for (number, lost) in losses.into_iter().enumerate() {
            let kept = right.len() - lost;
            if right[kept..].iter().all(|byte| *byte == 0) {
                continue;
            }
            let within = starts.iter().rfind(|(position, _)| *position <= kept).unwrap().1;
            let hints_within = OpenHints { recovery_point: within + 1, ..OpenHints::default() };
            for (hints, has_crc) in [closed(), flushed(), hints_within].into_iter().zip([true, false].repeat(2)) {
                let has_crc = has_crc == number.is_multiple_of(2);
                let copy = master.spoiled(name, |bytes| bytes[kept..].fill(0));
                if !has_crc {
                    std::fs::remove_file(copy.path().join(name).with_extension("crc")).unwrap();
                }
                match serve(copy.path(), hints) {
                    Err(corruption) => {
                        assert!(corruption.path.ends_with(name), "{lost} {hints:?}: {corruption}");
                        let (from, to) = (corruption.position as usize, right.len());
                        assert!(from <= kept && kept - from <= 65536 && from < to, "{lost} {hints:?}: {corruption}");
                    }
                    Ok((rows, report)) => {
                        panic!("{name} {lost} {hints:?} {has_crc}: {} records: {report:?}", rows.len())
                    }
                }
                let left = std::fs::metadata(copy.path().join(name)).unwrap().len();
                assert_eq!(left as usize, right.len(), "{name} {lost} {hints:?} {has_crc}");
            }
        }
    }
}

/// Cut exactly between two batches, and before the recovery point, a segment looked as if compaction had been there.
#[test]
fn a_segment_that_was_cut_between_batches_is_named() {
    let master = Master::new();
    let names = master.files(".log");
    let (_, sealed) = names.split_last().unwrap();
    for name in sealed {
        let right = std::fs::read(master.dir.join(name)).unwrap();
        let starts = batches(&right);
        for (number, (kept, next_offset)) in starts.iter().copied().enumerate() {
            let hints_within = OpenHints { recovery_point: next_offset + 1, ..OpenHints::default() };
            for (hints, has_crc) in [(closed(), true), (flushed(), true), (hints_within, true), (hints_within, false)] {
                // Before the recovery point, compaction leaves that too, if it was ever set.
                if !has_crc && number + 1 == starts.len() {
                    continue;
                }
                let copy = master.spoiled(name, |bytes| bytes.truncate(kept));
                if !has_crc {
                    std::fs::remove_file(copy.path().join(name).with_extension("crc")).unwrap();
                }
                match serve(copy.path(), hints) {
                    Err(corruption) => {
                        assert!(corruption.path.ends_with(name), "{kept} {hints:?}: {corruption}");
                        assert_eq!(corruption.position as usize, kept, "{hints:?}: {corruption}");
                    }
                    Ok((rows, report)) => {
                        panic!("{name} {kept} {hints:?} {has_crc}: {} records: {report:?}", rows.len())
                    }
                }
            }
        }
    }
}

#[test]
fn a_data_root_says_what_is_wrong_with_it() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("data");
    let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 4, directory_id: "d".into() };
    let open = |us: &NewIdentity| DataDir::open(files.clone(), &path, us);
    let data_dir = open(&us).unwrap();
    assert!(!data_dir.was_clean());
    assert!(matches!(open(&us), Err(DataDirError::Locked(_))));
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.recovery_points.insert(("t".to_owned(), 0), 17);
        checkpoints.log_start_offsets.insert(("t".to_owned(), 0), 17);
    });
    data_dir.write_checkpoints().unwrap();
    std::fs::create_dir(path.join("t-0")).unwrap();
    std::fs::create_dir(path.join("no-partition")).unwrap();
    assert_eq!(data_dir.partitions().unwrap().len(), 1);
    data_dir.close_clean().unwrap();
    let data_dir = open(&us).unwrap();
    assert_eq!(data_dir.hints("t", 0), OpenHints { clean_shutdown: true, recovery_point: 17, log_start_offset: 17 });
    assert_eq!(data_dir.hints("t", 1), OpenHints { clean_shutdown: true, recovery_point: 0, log_start_offset: 0 });
    data_dir.remove_partition("t", 0, TopicId::from_bytes([1; 16])).unwrap();
    data_dir.remove_partition("t", 0, TopicId::from_bytes([1; 16])).unwrap();
    assert!(data_dir.partitions().unwrap().is_empty());
    drop(data_dir);
    assert!(!open(&us).unwrap().was_clean(), "the marker counts once");
    assert!(matches!(
        open(&NewIdentity { broker_id: 5, ..us.clone() }),
        Err(DataDirError::OtherBroker { found: 4, .. })
    ));
    std::fs::write(path.join(checkpoint::RECOVERY_POINTS), "0\n1\nt 0 x\n").unwrap();
    let data_dir = open(&us).unwrap();
    assert_eq!((data_dir.faults().len(), data_dir.hints("t", 0).recovery_point), (1, 0));
    assert!(data_dir.faults()[0].to_string().contains("line 3"), "{}", data_dir.faults()[0]);
    drop(data_dir);
    let meta = std::fs::read_to_string(path.join("meta.properties")).unwrap();
    let with = |text: &str| {
        std::fs::write(path.join("meta.properties"), text).unwrap();
        open(&us).unwrap_err()
    };
    assert!(matches!(
        with(&meta.replace("headwater.format=1", "headwater.format=9")),
        DataDirError::Newer { found: 9, .. }
    ));
    assert!(matches!(with(&meta.replace("headwater.format=1", "")), DataDirError::Damaged(_)));
    let cut_short = with(meta.trim_end()).to_string();
    assert!(cut_short.contains("meta.properties") && cut_short.contains("line "), "{cut_short}");
    assert!(matches!(with("nonsense"), DataDirError::Damaged(_)));
    assert!(matches!(with(""), DataDirError::Damaged(_)));
    std::fs::remove_file(path.join("meta.properties")).unwrap();
    std::fs::create_dir(path.join("t-0")).unwrap();
    assert!(matches!(open(&us), Err(DataDirError::Unidentified(_))));
}

/// The timer, the cleaner and the closing broker write checkpoints at the same time. They once shared a temporary file
/// without knowing of each other: one renamed what the other was still writing, and an older checkpoint could come last.
#[test]
fn checkpoints_written_at_once_end_as_the_newest() {
    let root = tempfile::tempdir().unwrap();
    let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 4, directory_id: "d".into() };
    let data_dir = DataDir::open(files, root.path(), &us).unwrap();
    std::thread::scope(|scope| {
        for partition in 0..4 {
            let data_dir = &data_dir;
            scope.spawn(move || {
                for offset in 0..100 {
                    let key = ("t".to_owned(), partition);
                    data_dir.update_checkpoints(|checkpoints| {
                        checkpoints.recovery_points.insert(key.clone(), offset);
                    });
                    data_dir.write_checkpoints().unwrap();
                    // What another caller wrote meanwhile is newer, never older.
                    let path = data_dir.path().join(checkpoint::RECOVERY_POINTS);
                    let written = checkpoint::decode_offsets(&std::fs::read(path).unwrap()).unwrap();
                    assert_eq!(written[&key], offset);
                }
            });
        }
    });
    assert!(!data_dir.has_unwritten_checkpoints());
}

/// The first bytes of an entry may all be zeros, which were taken for reserved space.
#[test]
fn half_an_entry_of_an_index_is_a_fault_to_verify() {
    let master = Master::new();
    for (end, size) in [(".index", 8), (".timeindex", 12)] {
        for name in master.files(end) {
            let len = std::fs::metadata(master.dir.join(&name)).unwrap().len() as usize;
            for keep in (1..len).filter(|keep| !keep.is_multiple_of(size)) {
                let copy = master.spoiled(&name, |bytes| bytes.truncate(keep));
                let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
                let report = inspect::verify(&inspect::Target::open(files, copy.path()).unwrap(), &|_| ()).unwrap();
                let position = (keep / size * size) as u64;
                let named = |fault: &inspect::Fault| fault.file == name && fault.position == position;
                assert!(report.faults.iter().any(named), "{name} {keep}: {report:?}");
            }
        }
    }
}

/// An index that lacks its last entries is an index, and leads nobody astray: so nobody noticed. By the rule that all of ours are made by, an
/// entry is missing.
#[test]
fn an_index_that_lacks_its_last_entries_is_named_and_made_anew() {
    let master = Master::new();
    for (end, size) in [(".index", 8), (".timeindex", 12)] {
        for name in master.files(end) {
            let right = std::fs::read(master.dir.join(&name)).unwrap();
            assert!(right.len() > 2 * size, "{name}");
            for keep in (0..right.len()).step_by(size) {
                let copy = master.spoiled(&name, |bytes| bytes.truncate(keep));
                let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
                let report = inspect::verify(&inspect::Target::open(files, copy.path()).unwrap(), &|_| ()).unwrap();
                let named = |fault: &inspect::Fault| fault.file == name && fault.position == keep as u64;
                assert!(report.faults.iter().chain(&report.notes).any(named), "{name} {keep}: {report:?}");
                let (everything, report) = serve(copy.path(), closed()).unwrap();
                assert_eq!(everything, master.everything, "{name} {keep}");
                assert_eq!(report.rebuilt, [copy.path().join(&name)], "{name} {keep}");
                assert_eq!(std::fs::read(copy.path().join(&name)).unwrap(), right, "{name} {keep}");
            }
        }
    }
}

#[test]
fn an_index_of_a_larger_interval_is_whole() {
    let root = tempfile::tempdir().unwrap();
    for interval in [10_000, 20_000, 50_000] {
        let dir = root.path().join(interval.to_string()).join("t-0");
        let sparse = LogConfig { index_interval_bytes: interval, segment_bytes: 1 << 20, ..LogConfig::default() };
        let (mut log, _) =
            Log::open(Arc::new(OsFiles::default()), &dir, identity(), sparse, OpenHints::default(), NOW).unwrap();
        for n in 0..50 {
            let value = vec![n; 2_000 + 977 * (n as usize % 5)];
            log.append(&[one(&value, NOW + i64::from(n))], 1, NOW).unwrap();
        }
        log.close().unwrap();
        let hints = OpenHints { recovery_point: 50, ..closed() };
        let (_, report) =
            Log::open(Arc::new(OsFiles::default()), &dir, identity(), LogConfig::default(), hints, NOW).unwrap();
        assert_eq!(report.rebuilt, [] as [PathBuf; 0], "{interval}");
        let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
        let report = inspect::verify(&inspect::Target::open(files, &dir).unwrap(), &|_| ()).unwrap();
        assert!(report.faults.is_empty() && report.notes.is_empty(), "{interval}: {report:?}");
    }
}

/// However little lies behind the entry that is gone: batches of other sizes came before.
#[test]
fn an_index_that_lacks_one_entry_is_noted_by_verify() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("t-0");
    let config = LogConfig { segment_bytes: 1 << 20, ..LogConfig::default() };
    let (mut log, _) =
        Log::open(Arc::new(OsFiles::default()), &dir, identity(), config, OpenHints::default(), NOW).unwrap();
    // Entries come after 6,000 and more bytes, the last one after less.
    for (n, size) in [2900; 9].into_iter().chain([1300; 5]).enumerate() {
        log.append(&[one(&vec![7; size], NOW + n as i64)], 1, NOW).unwrap();
    }
    log.close().unwrap();
    let index = dir.join("00000000000000000000.index");
    let whole = std::fs::read(&index).unwrap();
    let verify = || {
        let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
        inspect::verify(&inspect::Target::open(files, &dir).unwrap(), &|_| ()).unwrap()
    };
    let report = verify();
    assert!(report.faults.is_empty() && report.notes.is_empty(), "{report:?}");
    let left = whole.len() - 8;
    std::fs::write(&index, &whole[..left]).unwrap();
    let report = verify();
    assert!(report.faults.is_empty(), "{report:?}");
    let named = report.notes.iter().any(|note| note.file.ends_with(".index") && note.position == left as u64);
    assert!(named, "{report:?}");
}

/// `index.interval.bytes` may have been anything, and anything else while the segment was continued.
#[test]
fn an_index_of_several_intervals_is_no_damage() {
    let pieces = [[4096, 65_536, 4096], [65_536, 4096, 65_536], [1 << 20, 4096, 100], [100, 1 << 20, 10_000]];
    for intervals in pieces {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("t-0");
        let mut hints = OpenHints::default();
        for (n, interval) in intervals.into_iter().chain([intervals[0]]).enumerate() {
            let config = LogConfig { index_interval_bytes: interval, segment_bytes: 1 << 20, ..LogConfig::default() };
            let (mut log, report) =
                Log::open(Arc::new(OsFiles::default()), &dir, identity(), config, hints, NOW).unwrap();
            // An index that is denser from now on was made anew, and is no less true.
            assert!(report.rebuilt.is_empty() || interval < *intervals[..n].iter().max().unwrap(), "{report:?}");
            for m in 0..25 {
                log.append(&[one(&vec![m; 1000 + 77 * m as usize], NOW + n as i64 * 100 + i64::from(m))], 1, NOW)
                    .unwrap();
            }
            hints = OpenHints { recovery_point: log.log_end_offset(), ..closed() };
            log.close().unwrap();
            let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
            let report = inspect::verify(&inspect::Target::open(files, &dir).unwrap(), &|_| ()).unwrap();
            assert!(report.faults.is_empty(), "{intervals:?}, {n}: {report:?}");
        }
    }
}

/// A folder alone cannot tell that its log ended further on, or whose it is.
#[test]
fn verify_knows_what_the_data_root_and_the_checksums_say() {
    let master = Master::new();
    let verify = |dir: &Path| {
        let files: Arc<dyn headwater_storage::Files> = Arc::new(OsFiles::default());
        inspect::verify(&inspect::Target::open(files, dir).unwrap(), &|_| ()).unwrap()
    };
    let last = master.files(".log").pop().unwrap();
    let bytes = std::fs::read(master.dir.join(&last)).unwrap();
    let ends: Vec<(usize, i64)> = headwater_proto::batch::Batches::new(&bytes)
        .map(|item| item.map(|(position, header, _)| (position, header.base_offset)).unwrap())
        .collect();
    assert!(ends.len() > 5);
    for (position, offset) in ends {
        let copy = master.spoiled(&last, |bytes| bytes.truncate(position));
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("t-0");
        std::fs::rename(copy.path(), &dir).unwrap();
        // As a crash leaves it: without what closing adds.
        for extension in ["index", "timeindex", "crc"] {
            std::fs::remove_file(dir.join(&last).with_extension(extension)).unwrap();
        }
        std::fs::remove_file(dir.join(format!("{BATCHES:020}.snapshot"))).unwrap();
        let flushed = |to: i64| {
            let points = [(("t".to_owned(), 0), to)].into_iter().collect();
            checkpoint::write_offsets(&OsFiles::default(), root.path(), checkpoint::RECOVERY_POINTS, &points).unwrap();
        };
        let is_named = |fault: &inspect::Fault| {
            (&fault.file, fault.position, fault.offset) == (&last, position as u64, Some(offset))
        };
        flushed(BATCHES);
        let report = verify(&dir);
        assert!(report.faults.iter().any(is_named), "{position}: {report:?}");
        flushed(offset);
        let report = verify(&dir);
        assert!(!report.faults.iter().any(is_named), "{position}: {report:?}");
    }
    let copy = master.spoiled("partition.metadata", |bytes| bytes[30] ^= 1);
    let report = verify(copy.path());
    let named = |fault: &inspect::Fault| fault.file == "partition.metadata" && fault.position == 21;
    assert!(report.faults.iter().any(named), "{report:?}");
}
