//! The data root's checkpoints, damaged. What says where the logs begin decides which records are served and which segments
//! go: no damage to it may bring back what was deleted, or delete what was not.

use std::path::Path;
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_storage::checkpoint::{
    self, HIGH_WATERMARKS, LOG_START_COPY, LOG_START_OFFSETS, RECOVERY_POINTS, REPLICAS,
};
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{DataDir, DataDirError, Files, KeptReplica, NewIdentity, OpenError, OsFiles, SimFiles, files};

const ID: TopicId = TopicId::from_bytes([7; 16]);

fn open(files: &Arc<dyn Files>, path: &Path) -> DataDir {
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 4, directory_id: "d".into() };
    DataDir::open(Arc::clone(files), path, &us).unwrap()
}

/// A root whose checkpoints say where the logs of `t` begin.
fn root(files: &Arc<dyn Files>, path: &Path) {
    let data_dir = open(files, path);
    begin_at(&data_dir, 17);
    data_dir.write_checkpoints().unwrap();
}

fn begin_at(data_dir: &DataDir, offset: i64) {
    data_dir.update_checkpoints(|checkpoints| {
        for partition in 0..2 {
            checkpoints.log_start_offsets.insert(("t".to_owned(), partition), offset + i64::from(partition));
        }
    });
}

fn log_start(data_dir: &DataDir, partition: u32) -> i64 {
    data_dir.admit("t", partition, ID, false, 0).unwrap().log_start_offset
}

/// The checkpoint counted as empty where it was damaged, and records came back that somebody had been told are deleted.
#[test]
fn no_damage_to_one_file_moves_a_log_start() {
    for name in [LOG_START_OFFSETS, LOG_START_COPY] {
        let files: Arc<dyn Files> = SimFiles::new(1);
        let path = Path::new("/data");
        root(&files, path);
        let file = path.join(name);
        let sound = files::read(&*files, &file, 1 << 20).unwrap();
        let flipped = (0..sound.len() * 8).map(|bit| {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        });
        let cut = (0..sound.len()).map(|length| sound[..length].to_vec());
        for damaged in flipped.chain(cut) {
            files::replace(&*files, &file, &damaged).unwrap();
            let data_dir = open(&files, path);
            let why = || format!("{name}: {:?}", String::from_utf8_lossy(&damaged));
            assert_eq!((log_start(&data_dir, 0), log_start(&data_dir, 1)), (17, 18), "{}", why());
            assert!(data_dir.faults().iter().all(|fault| fault.to_string().contains(name)), "{}", why());
            if name == LOG_START_COPY {
                assert_eq!(data_dir.faults().len(), 1, "{}", why());
            }
            data_dir.write_checkpoints().unwrap();
            assert_eq!(files::read(&*files, &file, 1 << 20).unwrap(), sound, "mended: {}", why());
        }
        files.remove_file(&file).unwrap();
        assert_eq!(log_start(&open(&files, path), 1), 18, "{name} is missing");
    }
}

#[test]
fn where_both_files_are_damaged_no_log_is_opened_and_nothing_is_written_over_them() {
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    let folder = tempfile::tempdir().unwrap();
    root(&files, folder.path());
    let sound = std::fs::read(folder.path().join(LOG_START_COPY)).unwrap();
    for name in [LOG_START_OFFSETS, LOG_START_COPY] {
        std::fs::write(folder.path().join(name), "0\n1\nt 0 x\n").unwrap();
    }
    let data_dir = open(&files, folder.path());
    let refused = data_dir.admit("t", 0, ID, false, 0).unwrap_err();
    assert!(matches!(refused, OpenError::UnknownStart(_)));
    for name in [LOG_START_OFFSETS, LOG_START_COPY] {
        assert!(refused.to_string().contains(name), "{refused}");
    }
    data_dir.admit("new", 0, ID, true, 0).unwrap();
    begin_at(&data_dir, 0);
    data_dir.write_checkpoints().unwrap();
    drop(data_dir);
    assert!(open(&files, folder.path()).admit("t", 0, ID, false, 0).is_err());
    std::fs::write(folder.path().join(LOG_START_COPY), sound).unwrap();
    assert_eq!(log_start(&open(&files, folder.path()), 0), 17, "one of the two is enough");
}

#[test]
fn damage_to_the_others_is_named_and_costs_no_more_than_work() {
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    let folder = tempfile::tempdir().unwrap();
    root(&files, folder.path());
    for name in [RECOVERY_POINTS, HIGH_WATERMARKS, checkpoint::CLEANER_OFFSETS] {
        std::fs::write(folder.path().join(name), "0\n7\n").unwrap();
        let data_dir = open(&files, folder.path());
        assert_eq!((data_dir.faults().len(), log_start(&data_dir, 1)), (1, 18));
        assert!(data_dir.faults()[0].to_string().contains(name), "{}", data_dir.faults()[0]);
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
}

/// Cut between `node.id` and its last line, `meta.properties` looks like Kafka's: whoever started the broker was told to import its own folder.
#[test]
fn a_root_of_ours_is_never_called_kafkas() {
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    let folder = tempfile::tempdir().unwrap();
    drop(open(&files, folder.path()));
    let meta = folder.path().join(checkpoint::META_PROPERTIES);
    let sound = std::fs::read_to_string(&meta).unwrap();
    let with = |text: &str| {
        std::fs::write(&meta, text).unwrap();
        let us = NewIdentity { cluster_id: "c".into(), broker_id: 4, directory_id: "d".into() };
        DataDir::open(Arc::clone(&files), folder.path(), &us).unwrap_err()
    };
    let node = sound.find("node.id=4").unwrap() + "node.id=4".len();
    let format = sound.find("headwater.format").unwrap();
    for name in ["headwater.metadata", LOG_START_COPY] {
        std::fs::write(folder.path().join(name), "").unwrap();
        for length in 0..sound.len() {
            let error = with(&sound[..length]);
            assert!(matches!(error, DataDirError::Damaged(_)), "{length}: {error}");
            let lines = sound[..length].lines().count() + usize::from(sound[..length].ends_with('\n'));
            let said = error.to_string();
            assert!(said.contains("meta.properties"), "{length}: {error}");
            assert!(length < node || said.contains(&format!("line {lines}: ")), "{length}: {error}");
            assert!(length != format || said.contains(name), "{length}: {error}");
        }
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
    // Without anything of ours, it is Kafka's.
    let error = with(&sound[..format]);
    assert!(matches!(error, DataDirError::Kafka(_)), "{error}");
}

/// Whichever of the two was written last, a log begins where it did before or after, never elsewhere.
#[test]
fn a_power_failure_leaves_the_old_log_starts_or_the_new() {
    let path = Path::new("/data");
    for operations in 0.. {
        let sim = SimFiles::new(operations);
        let files: Arc<dyn Files> = sim.clone();
        root(&files, path);
        let data_dir = open(&files, path);
        begin_at(&data_dir, 40);
        sim.power_off_after(operations);
        let written = data_dir.write_checkpoints();
        let after: Arc<dyn Files> = sim.crash();
        let found = open(&after, path);
        assert!(found.faults().is_empty());
        let starts = (log_start(&found, 0), log_start(&found, 1));
        assert!(starts == (40, 41) || (starts == (17, 18) && written.is_err()), "{operations}: {starts:?}");
        if written.is_ok() {
            break;
        }
    }
}

/// A write that fails is tried again as a whole.
#[test]
fn log_starts_that_were_written_once_only_are_written_again() {
    let sim = SimFiles::new(3);
    let files: Arc<dyn Files> = sim.clone();
    let path = Path::new("/data");
    root(&files, path);
    let data_dir = open(&files, path);
    begin_at(&data_dir, 40);
    sim.fail(Fault::new(Operation::Rename).on(LOG_START_OFFSETS).times(1));
    assert!(data_dir.write_checkpoints().is_err() && data_dir.has_unwritten_checkpoints());
    data_dir.write_checkpoints().unwrap();
    let said = checkpoint::read_log_starts(&*files, path).unwrap();
    assert!(said.twice && said.fault.is_none());
    assert_eq!(said.offsets[&("t".to_owned(), 1)], 41);
}

#[test]
fn what_is_known_of_a_replica_outlives_its_folder_and_not_its_damage() {
    let files = SimFiles::new(1);
    let files: Arc<dyn Files> = files;
    let root = Path::new("/data");
    let kept = KeptReplica { topic_id: TopicId::from_bytes([1; 16]), flushed: 42, unclean_taken: 1 };
    let data_dir = open(&files, root);
    assert!(!data_dir.knows_replicas() && data_dir.replica("t", 0).is_none());
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.replicas.insert(("t".into(), 0), kept);
    });
    data_dir.write_checkpoints().unwrap();
    drop(data_dir);
    let data_dir = open(&files, root);
    assert_eq!((data_dir.knows_replicas(), data_dir.replica("t", 0)), (true, Some(kept)));
    data_dir.update_checkpoints(|checkpoints| checkpoints.retain(|_| false));
    data_dir.write_checkpoints().unwrap();
    drop(data_dir);
    let data_dir = open(&files, root);
    assert_eq!((data_dir.knows_replicas(), data_dir.replica("t", 0)), (true, None));
    drop(data_dir);

    let path = root.join(REPLICAS);
    headwater_storage::files::replace(&*files, &path, b"0\n0\n00000000\n").unwrap();
    let data_dir = open(&files, root);
    assert!(!data_dir.knows_replicas() && data_dir.faults().len() == 1, "{:?}", data_dir.faults());
}

/// Before a log is cut the checkpoints must not say more of it. To write all of them for each of a thousand logs took longer than the
/// cuts.
#[test]
fn what_was_never_said_of_a_log_needs_no_taking_back() {
    let sim = SimFiles::new(1);
    let files: Arc<dyn Files> = sim.clone();
    let path = Path::new("/data");
    let data_dir = open(&files, path);
    let key = ("t".to_owned(), 0);
    let say = |offset| {
        data_dir.update_checkpoints(|checkpoints| {
            checkpoints.recovery_points.insert(key.clone(), offset);
        });
    };
    assert!(!data_dir.lower_checkpoints(&key, 3, false), "nothing was said");
    say(5);
    assert!(!data_dir.lower_checkpoints(&key, 5, false));
    assert!(data_dir.lower_checkpoints(&key, 4, false), "it is to be said");
    say(7);
    data_dir.write_checkpoints().unwrap();
    say(2);
    assert!(data_dir.lower_checkpoints(&key, 6, false), "it is said on the disk");
    data_dir.write_checkpoints().unwrap();
    assert!(!data_dir.lower_checkpoints(&key, 6, false));
    assert!(data_dir.lower_checkpoints(&key, 6, true), "where it begins is new");
    data_dir.write_checkpoints().unwrap();
    assert_eq!(data_dir.hints("t", 0).log_start_offset, 6);

    // After a write that failed, nobody knows what the files say.
    say(9);
    sim.fail(Fault::new(Operation::Rename).on(checkpoint::HIGH_WATERMARKS));
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.high_watermarks.insert(key.clone(), 9);
    });
    data_dir.write_checkpoints().unwrap_err();
    say(1);
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.high_watermarks.remove(&key);
    });
    assert!(data_dir.lower_checkpoints(&key, 8, false));
    data_dir.write_checkpoints().unwrap();
    assert!(!data_dir.lower_checkpoints(&key, 8, false));
}
