//! Any bytes as a partition's folder, whole files of them or written over a folder that is in order: opening it is an error or a log,
//! never a panic, and a log that opens can be read, written and closed.
//!
//! `cargo +nightly fuzz run recovery`
#![no_main]

use std::io::IoSlice;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchBuilder, Batches, BuildOptions, Codec};
use headwater_storage::{
    Cleanup, Files, Log, LogConfig, LogIdentity, NewBatch, OpenHints, OpenMode, ReadError, SimFiles, files,
};
use libfuzzer_sys::fuzz_target;

const DIR: &str = "/t-0";
const NOW: i64 = 1_700_000_000_000;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let names = names();
    let disk = SimFiles::new(0);
    disk.create_dir_all(Path::new(DIR)).expect("a new disk");
    if input.byte().is_multiple_of(4) {
        while !input.0.is_empty() {
            let name = &names[input.byte() as usize % names.len()];
            let bytes = input.take();
            write(&disk, name, bytes);
        }
    } else {
        let mut folder = in_order().clone();
        while !input.0.is_empty() {
            edit(&mut folder, &mut input);
        }
        folder.iter().for_each(|(name, bytes)| write(&disk, name, bytes));
    }
    use_it(&disk, data);
});

/// What a fuzzer made up, piece by piece; zeros at its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> usize {
        usize::from(u16::from_be_bytes([self.byte(), self.byte()]))
    }

    /// So many bytes as the next two say, or what there is.
    fn take(&mut self) -> &'a [u8] {
        let count = self.number().min(self.0.len());
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }
}

fn edit(folder: &mut Vec<(String, Vec<u8>)>, input: &mut Input<'_>) {
    if folder.is_empty() {
        input.0 = &[];
        return;
    }
    let which = input.byte() as usize % folder.len();
    let other = input.byte() as usize % folder.len();
    let bytes = &mut folder[which].1;
    let at = input.number() % (bytes.len() + 1);
    match input.byte() % 8 {
        0 => bytes.truncate(at),
        1 => bytes.extend_from_slice(input.take()),
        2 => bytes.extend(std::iter::repeat_n(0, at)),
        3 => drop(folder.remove(which)),
        4 => (folder[which].1, folder[other].1) = (folder[other].1.clone(), folder[which].1.clone()),
        5 => {
            let name = names()[input.byte() as usize % names().len()].clone();
            folder.retain(|(kept, _)| *kept != name);
            let which = which.min(folder.len().saturating_sub(1));
            if let Some(entry) = folder.get_mut(which) {
                entry.0 = name;
            }
        }
        6 => {
            let end = bytes.len().min(at + usize::from(input.byte()));
            bytes[at..end].fill(0);
        }
        _ => {
            let new = input.take();
            let end = bytes.len().min(at + new.len());
            bytes[at..end].copy_from_slice(&new[..end - at]);
        }
    }
}

fn names() -> &'static [String] {
    static NAMES: OnceLock<Vec<String>> = OnceLock::new();
    NAMES.get_or_init(|| {
        let mut names: Vec<String> = in_order().iter().map(|(name, _)| name.clone()).collect();
        for end in [".log", ".index", ".timeindex", ".crc", ".snapshot", ".txnindex", ".log.deleted"] {
            names.extend([0, 1, 7, i64::MAX].map(|base_offset| format!("{base_offset:020}{end}")));
        }
        for end in [".log.cleaned", ".log.swap", ".index.swap", ".timeindex.swap", ".crc.swap"] {
            names.extend([0, 3].map(|base_offset| format!("{base_offset:020}{end}")));
        }
        names
    })
}

fn write(disk: &SimFiles, name: &str, bytes: &[u8]) {
    let file = disk.open(&Path::new(DIR).join(name), OpenMode::Create).expect("a name in the folder");
    file.write_at(0, &[IoSlice::new(bytes)]).expect("room");
}

fn open(disk: &Arc<SimFiles>, compact: bool, hints: OpenHints) -> Option<Log> {
    let config = LogConfig {
        segment_bytes: 600,
        index_interval_bytes: 100,
        unflushed_limit_bytes: 1_000,
        cleanup: Cleanup { delete: !compact, compact },
        ..LogConfig::default()
    };
    let identity = LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([5; 16]), partition: 0 };
    let disk: Arc<dyn Files> = Arc::<SimFiles>::clone(disk);
    // A folder that makes no sense is refused by name.
    Log::open(disk, Path::new(DIR), identity, config, hints, NOW)
        .map(|(log, _)| log)
        .map_err(|error| error.to_string())
        .ok()
}

fn some_batch(n: i32) -> NewBatch {
    let codec = if n % 2 == 0 { Codec::None } else { Codec::Lz4 };
    let producer = BuildOptions { producer_id: 9, producer_epoch: 0, base_sequence: n * 2, ..BuildOptions::default() };
    let mut builder = BatchBuilder::new(BuildOptions { codec, ..producer });
    builder.append(NOW + i64::from(n % 5) * 1_000, Some(b"key"), Some(&[n as u8; 100]), &[]);
    builder.append(NOW + i64::from(n), None, Some(b"value"), &[]);
    let bytes = builder.build().expect("two records");
    NewBatch { header: batch::check(&bytes).expect("a batch"), bytes }
}

/// A folder as a log leaves it that was closed: segments, indexes, checksums, snapshots.
fn in_order() -> &'static Vec<(String, Vec<u8>)> {
    static FOLDER: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let disk = SimFiles::new(0);
        disk.create_dir_all(Path::new(DIR)).expect("a new disk");
        let mut log = open(&disk, false, OpenHints::default()).expect("a new log");
        for n in 0..9 {
            log.append(&[some_batch(n)], n / 4, NOW).expect("room");
        }
        log.close().expect("a log in order");
        let names = disk.list(Path::new(DIR)).expect("the folder").into_iter().map(|entry| entry.name);
        let read = |name: String| {
            let bytes = files::read(&*disk, &Path::new(DIR).join(&name), 1 << 20).expect("a file of it");
            (name, bytes)
        };
        names.map(read).collect()
    })
}

/// Opens what is there as a broker would, now and after it was closed.
fn use_it(disk: &Arc<SimFiles>, data: &[u8]) {
    let last = data.last().copied().unwrap_or(0);
    let hints = OpenHints {
        clean_shutdown: last & 1 == 1,
        recovery_point: i64::from(last >> 3),
        log_start_offset: if last & 2 == 2 { 5 } else { 0 },
    };
    let Some(mut log) = open(disk, last & 4 == 4, hints) else { return };
    read_all(&log);
    // Damage that only reading finds may make an append's producer unknown or its log full; not more.
    let _ = log.append(&[some_batch(9), some_batch(100)], 50, NOW);
    let _ = log.flush();
    read_all(&log);
    let end = log.log_end_offset();
    if log.close().is_ok() {
        let hints = OpenHints { clean_shutdown: true, recovery_point: end, log_start_offset: hints.log_start_offset };
        let log = open(disk, last & 4 == 4, hints).expect("a log that was closed in good order opens");
        assert_eq!(log.log_end_offset(), end);
    }
}

fn read_all(log: &Log) {
    let reader = log.reader();
    let mut bytes = Vec::new();
    let read = (|| {
        let mut cursor = reader.seek(reader.log_start_offset())?;
        while let Some(slice) = reader.read(&mut cursor, 300, i64::MAX)? {
            slice.load()?;
            bytes.extend_from_slice(&slice.bytes());
        }
        reader.offset_for_timestamp(NOW + 2_000, i64::MAX)?;
        reader.offset_for_max_timestamp(i64::MAX)?;
        Ok::<(), ReadError>(())
    })();
    let bytes = Bytes::from(bytes);
    for item in Batches::new(&bytes) {
        match item {
            Ok((_, _, whole)) => drop(batch::check(whole).expect("what is served was checked")),
            Err(_) => return assert!(read.is_err(), "half a batch at the end of the log"),
        }
    }
}
