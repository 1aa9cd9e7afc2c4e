//! A power failure takes what was not synced, and nothing else.

use super::{Loss, PowerFailure, Sync, UnsyncedFiles};
use headwater_storage::{File, Files, OpenMode, files};
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

const AT_ONCE: Sync = Sync::Works(Duration::ZERO);

struct Disk {
    folder: tempfile::TempDir,
    files: UnsyncedFiles,
}

impl Disk {
    fn new() -> Disk {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("data");
        std::fs::create_dir(&root).expect("made");
        let files = UnsyncedFiles::open(&root, AT_ONCE).expect("opened");
        Disk { folder, files }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn sync_names(&self) {
        self.files.sync_dir(&self.root()).expect("synced");
    }

    /// A file of which the name and the bytes are durable.
    fn durable(&self, name: &str, bytes: &[u8]) -> Arc<dyn File> {
        let file = self.files.open(&self.at(name), OpenMode::CreateNew).expect("made");
        write(&file, 0, bytes);
        file.sync_data().expect("synced");
        self.sync_names();
        file
    }

    fn fail(&mut self, loss: Loss) -> PowerFailure {
        let struck = PowerFailure::strike(&self.root(), loss).expect("undone");
        self.files = UnsyncedFiles::open(&self.root(), AT_ONCE).expect("opened");
        struck
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.at(name)).ok()
    }
}

fn write(file: &Arc<dyn File>, at: u64, bytes: &[u8]) {
    file.write_at(at, &[IoSlice::new(bytes)]).expect("written");
}

#[test]
fn what_was_synced_stays_and_what_was_not_is_gone() {
    let mut disk = Disk::new();
    let file = disk.durable("a", b"synced");
    write(&file, 3, b"overwritten and longer");
    file.reserve(0, 100_000).expect("reserved");
    write(&file, 70_000, b"far");
    let struck = disk.fail(Loss::Everything);
    assert_eq!((struck.names, struck.files), (0, 1));
    assert_eq!(disk.read("a").expect("there"), b"synced");
    assert_eq!(disk.fail(Loss::Everything), PowerFailure::default(), "what it left is on the disk");
}

#[test]
fn a_sync_does_not_cover_what_is_written_while_it_runs() {
    let mut disk = Disk::new();
    disk.durable("a", b"one");
    let barrier = Arc::new(Barrier::new(2));
    disk.files = UnsyncedFiles::open(&disk.root(), Sync::Held(Arc::clone(&barrier))).expect("opened");
    let file = disk.files.open(&disk.at("a"), OpenMode::Write).expect("opened");
    let syncing = Arc::clone(&file);
    write(&file, 3, b"two");
    let sync = std::thread::spawn(move || syncing.sync_data());
    barrier.wait();
    write(&file, 6, b"three");
    barrier.wait();
    sync.join().expect("no panic").expect("synced");
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("a").expect("there"), b"onetwo");
}

#[test]
fn the_end_of_a_process_syncs_nothing() {
    let mut disk = Disk::new();
    let file = disk.durable("a", b"one");
    write(&file, 3, b"two");
    disk.files = UnsyncedFiles::open(&disk.root(), AT_ONCE).expect("opened");
    let again = disk.files.open(&disk.at("a"), OpenMode::Write).expect("opened");
    write(&again, 6, b"three");
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("a").expect("there"), b"one");
}

#[test]
fn names_are_durable_once_their_directory_was_synced() {
    let mut disk = Disk::new();
    disk.durable("old", b"old");
    disk.durable("replaced", b"replaced");
    disk.durable("gone", b"gone");
    let new = disk.files.open(&disk.at("new"), OpenMode::Create).expect("made");
    write(&new, 0, b"new");
    new.sync_all().expect("synced");
    disk.files.rename(&disk.at("old"), &disk.at("replaced")).expect("renamed");
    disk.files.remove_file(&disk.at("gone")).expect("removed");
    disk.files.create_dir_all(&disk.at("dir/deeper")).expect("made");
    assert_eq!((disk.read("gone"), disk.read("replaced").as_deref()), (None, Some(b"old".as_slice())));
    assert_eq!(disk.fail(Loss::Everything).names, 5);
    let texts = ["old", "replaced", "gone", "new"].map(|name| disk.read(name));
    let as_before = [&b"old"[..], b"replaced", b"gone"].map(|bytes| Some(bytes.to_vec()));
    assert_eq!((&texts[..3], &texts[3]), (&as_before[..], &None));
    assert!(!disk.at("dir").exists());
}

#[test]
fn a_directory_comes_back_with_its_names() {
    let mut disk = Disk::new();
    disk.files.create_dir_all(&disk.at("dir")).expect("made");
    disk.sync_names();
    files::replace(&disk.files, &disk.at("dir/a"), b"contents").expect("written");
    disk.files.rename(&disk.at("dir"), &disk.at("dir-delete")).expect("renamed");
    disk.files.remove_file(&disk.at("dir-delete/a")).expect("removed");
    assert!(disk.files.remove_dir(&disk.root()).is_err(), "it is not empty");
    disk.files.remove_dir(&disk.at("dir-delete")).expect("removed");
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("dir/a").expect("there"), b"contents");
}

#[test]
fn what_is_cut_and_not_synced_comes_back() {
    let mut disk = Disk::new();
    let file = disk.durable("a", b"a long text");
    file.set_len(3).expect("cut");
    write(&file, 3, b"!!");
    assert_eq!(disk.read("a").expect("there"), b"a l!!");
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("a").expect("there"), b"a long text");
    let emptied = disk.files.open(&disk.at("a"), OpenMode::Create).expect("emptied");
    assert_eq!((emptied.len().expect("asked"), disk.read("a").expect("there").len()), (0, 0));
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("a").expect("there"), b"a long text");
}

#[test]
fn a_small_file_is_replaced_whole_or_not_at_all() {
    for seed in 0..40 {
        let mut disk = Disk::new();
        files::replace(&disk.files, &disk.at("a"), b"old").expect("written");
        let aside = disk.files.open(&disk.at("a.tmp"), OpenMode::Create).expect("made");
        write(&aside, 0, &[7; 9000]);
        aside.sync_all().expect("synced");
        disk.files.rename(&disk.at("a.tmp"), &disk.at("a")).expect("renamed");
        disk.fail(Loss::Some(seed));
        let left = disk.read("a").expect("there");
        assert!(left == b"old" || left == [7; 9000], "seed {seed}: {} bytes", left.len());
    }
}

#[test]
fn a_seed_keeps_loses_and_tears() {
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..60 {
        let mut disk = Disk::new();
        let file = disk.durable("a", &[1; 8192]);
        write(&file, 4096, &[2; 4096]);
        disk.fail(Loss::Some(seed));
        let left = disk.read("a").expect("there");
        assert_eq!((left.len(), &left[..4096]), (8192, &[1; 4096][..]), "seed {seed}: what was synced");
        match left[4096..].iter().filter(|byte| **byte == 2).count() {
            0 => lost += 1,
            4096 => kept += 1,
            part => {
                assert_eq!(part % 512, 0, "a sector is written whole");
                torn += 1;
            }
        }
    }
    assert!(kept > 5 && lost > 5 && torn > 5, "{kept} {lost} {torn}");
}

#[test]
fn a_change_that_was_only_written_down_is_none() {
    let mut disk = Disk::new();
    let file = disk.durable("a", b"a");
    write(&file, 1, b"b");
    let log = disk.folder.path().join("data.unsynced/undo.log");
    let mut bytes = std::fs::read(&log).expect("there");
    bytes.extend_from_slice(br#"{"Remove":{"dir":1"#);
    std::fs::write(&log, &bytes).expect("written");
    // A new process cuts the torn record and goes on behind it.
    disk.files = UnsyncedFiles::open(&disk.root(), AT_ONCE).expect("opened");
    write(&disk.files.open(&disk.at("a"), OpenMode::Write).expect("opened"), 2, b"c");
    disk.fail(Loss::Everything);
    assert_eq!(disk.read("a").expect("there"), b"a");
}

#[test]
fn paths_outside_of_the_root_are_refused() {
    let disk = Disk::new();
    assert!(disk.files.open(Path::new("/tmp/elsewhere"), OpenMode::CreateNew).is_err());
}
