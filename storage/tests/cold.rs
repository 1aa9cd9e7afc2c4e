//! Ranges that left the page cache, on a real file: they are told from those in memory, and brought in before anybody touches
//! them. What leaves the page cache, and how one sees that, are Linux's.
#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use common::*;
use headwater_storage::{Files, LogConfig, OpenHints, OpenMode, OsFiles, Slice};
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

const BATCHES: u8 = 8;
const BATCH_BYTES: usize = 512 << 10;
/// Pages that are in use when they are to leave stay; nobody uses these for long.
const ATTEMPTS: usize = 20;

/// Sends a file's pages out of memory, as far as the system lets them go.
fn evict(file: &File) {
    file.sync_all().unwrap();
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

/// Whether reading here would not wait for the disk, told by the system in another way than the log asks it; `None`: it cannot
/// tell. The question itself may bring bytes in.
fn reads_at_once(file: &File, offset: u64) -> Option<bool> {
    let mut byte = [0];
    match preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => {
            assert_eq!(read, 1);
            Some(true)
        }
        Err(Errno::AGAIN) => Some(false),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => None,
        Err(error) => panic!("{error}"),
    }
}

fn skipped(why: &str, dir: &Path) {
    eprintln!("** SKIPPED: {why} ({}): set TMPDIR to a folder on a disk **", dir.display());
}

#[test]
fn what_left_the_page_cache_is_cold_until_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &LogConfig::default(), OpenHints::default());
    for n in 0..BATCHES {
        log.append(&[one(&vec![n; BATCH_BYTES], NOW)], 1, NOW).unwrap();
    }
    log.flush().unwrap();
    let path = dir.path().join(format!("{:020}.log", 0));
    let file = File::open(&path).unwrap();
    let asked = OsFiles::default().open(&path, OpenMode::Read).unwrap();
    if asked.is_resident(0, 1).is_none() {
        return skipped("this kernel does not tell what is in memory (Linux 6.5 does)", dir.path());
    }

    // None of them is touched yet: what the process has mapped in does not leave.
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let mut slices: Vec<Slice> = Vec::new();
    while let Some(slice) = reader.read(&mut cursor, BATCH_BYTES, i64::MAX).unwrap() {
        slices.push(slice);
    }
    assert!(slices.iter().all(Slice::is_resident), "just written");
    let middle =
        |n: usize| slices[..n].iter().map(|slice| slice.len() as u64).sum::<u64>() + slices[n].len() as u64 / 2;

    // The log is asked first: the other question may start to read ahead.
    let told = (0..ATTEMPTS).find_map(|_| {
        evict(&file);
        let told = (slices[3].is_resident(), asked.is_resident(middle(3), 1));
        match reads_at_once(&file, middle(3)) {
            Some(false) => Some(told),
            Some(true) | None => None,
        }
    });
    let Some(told) = told else { return skipped("this file system keeps everything in memory", dir.path()) };
    assert_eq!(told, (false, Some(false)), "what must be waited for was told to be in memory");

    evict(&file);
    slices[3].load().unwrap();
    assert!(slices[3].is_resident());
    assert_eq!(reads_at_once(&file, middle(3)), Some(true));
    for (n, slice) in slices.iter().enumerate() {
        slice.load().unwrap();
        assert!(slice.is_resident(), "slice {n}");
        assert_eq!(reads_at_once(&file, middle(n)), Some(true), "slice {n}");
    }
    let found = values(slices.iter().flat_map(Slice::bytes).collect());
    let written: Vec<_> = (0..BATCHES).map(|n| (i64::from(n), vec![n; BATCH_BYTES])).collect();
    assert!(found == written, "the bytes are those that were written");
}
