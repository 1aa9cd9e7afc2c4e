use std::collections::HashSet;

use super::*;
use crate::files::{exists, read, replace};

const FILE: &str = "/data/file";

fn write(file: &dyn File, offset: u64, bytes: &[u8]) {
    file.write_at(offset, &[IoSlice::new(bytes)]).unwrap();
}

fn contents(files: &SimFiles, path: &str) -> Vec<u8> {
    read(files, Path::new(path), 1 << 30).unwrap()
}

/// A disk with one file, whose bytes and name are durable.
fn disk_with(seed: u64, bytes: &[u8]) -> (Arc<SimFiles>, Arc<dyn File>) {
    let files = SimFiles::new(seed);
    files.create_dir_all(Path::new("/data")).unwrap();
    let file = files.open(Path::new(FILE), OpenMode::CreateNew).unwrap();
    write(&*file, 0, bytes);
    file.sync_data().unwrap();
    files.sync_dir(Path::new("/data")).unwrap();
    files.sync_dir(Path::new("/")).unwrap();
    (files, file)
}

#[test]
fn what_was_synced_survives_every_crash() {
    for seed in 0..50 {
        let (files, file) = disk_with(seed, &[1; 10_000]);
        write(&*file, 10_000, &[2; 10_000]);
        let after = files.crash();
        assert_eq!(contents(&after, FILE)[..10_000], [1; 10_000], "seed {seed}");
        assert!(file.read_at(&mut [0], 0).is_err());
        assert!(files.open(Path::new(FILE), OpenMode::Read).is_err());
    }
}

#[test]
fn a_crash_keeps_loses_or_tears_what_was_not_synced() {
    let (mut kept, mut lost, mut torn, mut shorter) = (0, 0, 0, 0);
    for seed in 0..200 {
        let (files, file) = disk_with(seed, &[1; 16_384]);
        write(&*file, 0, &[2; 8_192]);
        write(&*file, 16_384, &[2; 8_192]);
        let bytes = contents(&files.crash(), FILE);
        shorter += usize::from(bytes.len() < 24_576);
        let sectors: Vec<&[u8]> = bytes.chunks(512).collect();
        assert!(sectors.iter().all(|sector| sector.iter().all(|byte| *byte == sector[0])), "seed {seed}");
        assert_eq!(bytes[8_192..16_384], [1; 8_192], "seed {seed}");
        assert!(bytes[..8_192].iter().all(|byte| [1, 2].contains(byte)), "seed {seed}");
        assert!(bytes[16_384..].iter().all(|byte| [0, 2].contains(byte)), "seed {seed}");
        let new = sectors[..16].iter().filter(|sector| sector[0] == 2).count();
        match new {
            0 => lost += 1,
            16 => kept += 1,
            _ => torn += 1,
        }
    }
    assert!([kept, lost, torn, shorter].iter().all(|count| *count > 20), "{kept} {lost} {torn} {shorter}");
}

#[test]
fn a_crash_may_leave_any_version_of_a_sector() {
    let mut seen = HashSet::new();
    for seed in 0..200 {
        let (files, file) = disk_with(seed, &[1; 512]);
        write(&*file, 0, &[2; 512]);
        write(&*file, 0, &[3; 512]);
        seen.insert(contents(&files.crash(), FILE)[0]);
    }
    assert_eq!(seen, HashSet::from([1, 2, 3]));
}

#[test]
fn a_file_that_was_cut_and_grew_again_never_shows_what_was_cut_off() {
    for seed in 0..100 {
        let (files, file) = disk_with(seed, &[1; 6_000]);
        file.set_len(5_000).unwrap();
        file.reserve(5_000, 10_000).unwrap();
        let bytes = contents(&files.crash(), FILE);
        match bytes.len() {
            6_000 => assert!(bytes[..5_000].iter().all(|byte| *byte == 1), "seed {seed}"),
            5_000 => assert_eq!(bytes, [1; 5_000], "seed {seed}"),
            15_000 => assert!(bytes[5_000..].iter().all(|byte| *byte == 0), "seed {seed}"),
            len => panic!("seed {seed}: {len} bytes"),
        }
    }
}

#[test]
fn names_are_durable_once_their_directory_is_synced() {
    let dir = Path::new("/data");
    let (a, b) = (dir.join("a"), dir.join("b"));
    let mut outcomes = HashSet::new();
    for seed in 0..100 {
        let (files, _) = disk_with(seed, b"x");
        files.open(&a, OpenMode::CreateNew).unwrap();
        files.rename(&a, &b).unwrap();
        files.remove_file(Path::new(FILE)).unwrap();
        let after = files.crash();
        let names = |files: &SimFiles| files.list(dir).unwrap().into_iter().map(|entry| entry.name).collect::<Vec<_>>();
        let left = names(&after);
        assert!(!(left.contains(&"a".into()) && left.contains(&"b".into())), "a rename is atomic: {left:?}");
        outcomes.insert(left);

        let (files, _) = disk_with(seed, b"x");
        files.open(&a, OpenMode::CreateNew).unwrap();
        files.rename(&a, &b).unwrap();
        files.remove_file(Path::new(FILE)).unwrap();
        files.sync_dir(dir).unwrap();
        assert_eq!(names(&files.crash()), ["b"]);
    }
    assert!(outcomes.len() >= 4, "{outcomes:?}");
}

#[test]
fn a_replaced_file_is_the_old_or_the_new_at_every_power_failure() {
    let path = Path::new(FILE);
    let (files, _) = disk_with(0, b"old");
    let before = files.operations();
    replace(&*files, path, b"new").unwrap();
    let operations = files.operations() - before;
    let mut seen = HashSet::new();
    for (seed, n) in (0..20).flat_map(|seed| (0..=operations).map(move |n| (seed, n))) {
        let (files, _) = disk_with(seed, b"old");
        files.power_off_after(n);
        let result = replace(&*files, path, b"new");
        assert_eq!(result.is_ok(), n == operations, "seed {seed}, {n}");
        assert_eq!(files.is_off(), n < operations);
        let left = contents(&files.crash(), FILE);
        assert!(left == b"new" || (left == b"old" && result.is_err()), "seed {seed}, {n}: {left:?}");
        seen.insert(left);
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn after_a_failed_sync_pages_are_seen_but_not_all_of_them_are_on_the_disk() {
    let mut lost = 0;
    for seed in 0..50 {
        let (files, file) = disk_with(seed, &[1; 8_192]);
        files.fail(Fault::new(Operation::Sync).on("file").times(1));
        write(&*file, 0, &[2; 8_192]);
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
        // What every database believed before 2018: that trying again is enough.
        file.sync_data().unwrap();
        assert_eq!(contents(&files, FILE), [2; 8_192], "seed {seed}");
        lost += usize::from(contents(&files.crash(), FILE) != [2; 8_192]);
    }
    assert!(lost > 10, "{lost}");
}

#[test]
fn the_end_of_a_process_loses_nothing_and_makes_nothing_durable() {
    let mut lost = 0;
    for seed in 0..20 {
        let (files, file) = disk_with(seed, b"old");
        let held = files.lock(Path::new("/data/.lock")).unwrap();
        assert_eq!(files.lock(Path::new("/data/.lock")).unwrap_err().kind(), ErrorKind::WouldBlock);
        write(&*file, 0, b"new");
        let next = files.restart();
        assert!(file.sync_data().is_err());
        assert_eq!(contents(&next, FILE), b"new");
        drop(next.lock(Path::new("/data/.lock")).unwrap());
        drop(held);
        lost += usize::from(contents(&next.crash(), FILE) == b"old");
    }
    assert!(lost > 0);
}

#[test]
fn a_full_disk_refuses_reservations_and_cuts_writes_short() {
    let (files, file) = disk_with(0, &[1; 4_096]);
    files.set_capacity(Some(3 * 4_096));
    assert_eq!(files.free_bytes(Path::new("/data")).unwrap(), 2 * 4_096);
    assert_eq!(file.reserve(4_096, 3 * 4_096).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!((files.used_bytes(), file.len().unwrap()), (3 * 4_096, 3 * 4_096));
    write(&*file, 4_096, &[2; 2 * 4_096]);
    let refused = file.write_at(3 * 4_096 - 10, &[IoSlice::new(&[3; 20])]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::StorageFull);
    assert_eq!(contents(&files, FILE)[3 * 4_096 - 11..], [2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
    file.set_len(100).unwrap();
    assert_eq!(files.used_bytes(), 4_096);
    files.remove_file(Path::new(FILE)).unwrap();
    assert_eq!(files.used_bytes(), 4_096, "an open file keeps its space");
    drop(file);
    assert_eq!(files.used_bytes(), 0);
}

#[test]
fn faults_hit_what_they_name_and_nothing_else() {
    let (files, file) = disk_with(0, b"bytes");
    files.fail(Fault::new(Operation::Write).on("file").after(1).times(1));
    files.fail(Fault::new(Operation::Read).on("other"));
    files.fail(Fault::new(Operation::Rename).full());
    write(&*file, 0, b"1");
    assert!(file.write_at(0, &[IoSlice::new(b"2")]).is_err());
    write(&*file, 0, b"3");
    assert_eq!(contents(&files, FILE), b"3ytes");
    let renamed = files.rename(Path::new(FILE), Path::new("/data/x"));
    assert_eq!(renamed.unwrap_err().kind(), ErrorKind::StorageFull);
    files.heal();
    files.rename(Path::new(FILE), Path::new("/data/x")).unwrap();
    assert!(!exists(&*files, Path::new(FILE)).unwrap());
}

#[test]
fn the_same_seed_leaves_the_same_disk() {
    let left = |seed| {
        let (files, file) = disk_with(seed, &[1; 100_000]);
        (0..50u8).for_each(|n| write(&*file, u64::from(n) * 3_000, &[n; 5_000]));
        contents(&files.crash(), FILE)
    };
    assert_eq!(left(7), left(7));
    assert!((0..10).map(left).collect::<HashSet<_>>().len() > 4);
}

#[test]
fn a_map_shows_what_is_published_and_keeps_a_removed_file() {
    let (files, file) = disk_with(0, b"published");
    let map = Arc::clone(&file).map(Path::new(FILE), 4_096).unwrap();
    map.publish(9);
    let view = map.view(0..9).unwrap();
    assert!(map.view(0..10).is_none());
    files.remove_file(Path::new(FILE)).unwrap();
    drop(file);
    assert_eq!((&view[..], &map.view(0..9).unwrap()[..]), (&b"published"[..], &b"published"[..]));
}

#[test]
#[should_panic(expected = "are written anew")]
fn changing_published_bytes_is_caught() {
    let (_files, file) = disk_with(0, b"published");
    let map = Arc::clone(&file).map(Path::new(FILE), 4_096).unwrap();
    map.publish(9);
    write(&*file, 0, b"published and more");
    write(&*file, 8, b"D");
}

#[test]
fn directories_behave_as_directories() {
    let files = SimFiles::new(0);
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    files.create_dir_all(Path::new("/a/b")).unwrap();
    files.create_dir_all(Path::new("/a/b")).unwrap();
    files.open(Path::new("/a/b/f"), OpenMode::Ensure).unwrap();
    assert_eq!(kind(files.open(Path::new("/x/f"), OpenMode::Ensure).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(files.open(Path::new("/a/b/f"), OpenMode::CreateNew).map(drop)), ErrorKind::AlreadyExists);
    assert_eq!(kind(files.open(Path::new("/a/b"), OpenMode::Read).map(drop)), ErrorKind::IsADirectory);
    assert_eq!(kind(files.remove_dir(Path::new("/a/b"))), ErrorKind::DirectoryNotEmpty);
    assert_eq!(kind(files.remove_file(Path::new("/a/b"))), ErrorKind::IsADirectory);
    assert_eq!(kind(files.list(Path::new("/nowhere")).map(drop)), ErrorKind::NotFound);
    files.rename(Path::new("/a/b"), Path::new("/c")).unwrap();
    assert_eq!(files.list(Path::new("/")).unwrap().len(), 2);
    assert!(files.metadata(Path::new("/c/f")).is_ok_and(|metadata| !metadata.is_dir));
    files.remove_file(Path::new("/c/f")).unwrap();
    files.remove_dir(Path::new("/c")).unwrap();
}

#[test]
fn what_is_held_waits_and_nothing_else_does() {
    let files = SimFiles::new(1);
    let [slow, quick] = ["/slow", "/quick"].map(|path| files.open(Path::new(path), OpenMode::CreateNew).unwrap());
    let held = files.hold(Fault::new(Operation::Sync).on("slow"));
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| slow.sync_data());
        while held.waiting() == 0 {
            std::thread::yield_now();
        }
        slow.write_at(0, &[IoSlice::new(b"x")]).unwrap();
        quick.sync_data().unwrap();
        assert!(!syncing.is_finished());
        drop(held);
        syncing.join().unwrap().unwrap();
    });
    slow.sync_data().unwrap();
}

#[test]
fn what_is_evicted_is_resident_again_once_it_was_read_or_written() {
    let files = SimFiles::new(1);
    let path = Path::new("/file");
    let file = files.open(path, OpenMode::CreateNew).unwrap();
    file.write_at(0, &[IoSlice::new(&[1; 20_000])]).unwrap();
    assert_eq!(file.is_resident(0, 20_000), Some(true));
    files.evict(path).unwrap();
    assert_eq!((file.is_resident(0, 1), file.is_resident(19_999, 1)), (Some(false), Some(false)));
    let mut buffer = [0; 4096];
    assert_eq!(file.read_at(&mut buffer, 4000).unwrap(), 4096);
    assert_eq!((file.is_resident(0, 8192), file.is_resident(0, 8193)), (Some(true), Some(false)));
    file.write_at(8192, &[IoSlice::new(b"x")]).unwrap();
    assert_eq!((file.is_resident(0, 12_288), file.is_resident(0, 12_289)), (Some(true), Some(false)));
}
