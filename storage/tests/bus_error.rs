//! A page of a map that cannot be read ends the process, but not before file and offset were named. The signal's
//! number, and that it comes at a page behind the file's end, are Linux's.
#![cfg(target_os = "linux")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use common::*;
use headwater_storage::{LogConfig, OpenHints};

const FOLDER: &str = "HEADWATER_BUS_ERROR_FOLDER";
const SIGBUS: i32 = 7;

/// Runs in a process of its own: shortens a file under a map, as no program should, and touches what was cut.
#[test]
fn dies_naming_the_file() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let (mut log, _) = open(Path::new(&dir), &LogConfig::default(), OpenHints::default());
    for n in 0..20 {
        log.append(&[one(&vec![n; 10_000], NOW)], 1, NOW).unwrap();
    }
    let reader = log.reader();
    let mut cursor = reader.seek(0).unwrap();
    let bytes = reader.read(&mut cursor, 1 << 20, i64::MAX).unwrap().unwrap().bytes();
    let path = Path::new(&dir).join(format!("{:020}.log", 0));
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(8192).unwrap();
    std::hint::black_box(bytes[150_000]);
    unreachable!("the page behind the end of the file was readable");
}

#[test]
fn a_bus_error_names_file_and_offset_before_the_process_ends() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "dies_naming_the_file", "--nocapture"])
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(SIGBUS), "{text}");
    assert!(text.contains(&format!("{:020}.log at offset 150000", 0)), "{text}");
    assert!(text.contains("SIGBUS"), "{text}");
}
