use super::super::command::{self, command::Command as Kind};
use super::super::format::{self, ALONE_VERSION, FrameKind, OLDEST_VERSION, STEP_BYTES};
use super::super::journal_file::JOURNAL_FILE;
use super::super::raft::{Founding, OpenedStore, RaftMachine, Store};
use super::*;
use headwater_proto::TopicId;
use headwater_storage::files::{self, Files, OpenMode};
use headwater_storage::sim::SimFiles;
use std::io::IoSlice;
use std::sync::Arc;

const ROOT: &str = "/data";

fn command_at(index: u64) -> Command {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&index.to_be_bytes());
    let create = command::CreateTopic {
        name: format!("topic-{index}"),
        topic_id: TopicId::from_bytes(id).to_wire(),
        partitions: vec![command::Replicas { brokers: vec![1] }],
        ..Default::default()
    };
    match index {
        1 => Kind::RegisterBroker(command::RegisterBroker { broker_id: 1, ..Default::default() }).into(),
        _ => Kind::CreateTopic(create).into(),
    }
}

/// What a broker alone wrote in this version: a snapshot after `in_snapshot` commands, and the rest of `commands` behind it.
pub(crate) fn journal_of_a_broker_alone(
    version: u32,
    in_snapshot: u64,
    commands: &[Command],
) -> (Vec<u8>, MetadataState) {
    let mut state = MetadataState::new("cluster");
    let mut bytes = format::file_header(version).to_vec();
    for (index, command) in (0..=commands.len() as u64).zip(std::iter::once(None).chain(commands.iter().map(Some))) {
        if let Some(command) = command {
            // One that this build does not know was known to the one that wrote it.
            drop(state.apply(index, command));
        }
        let (kind, payload) = match command {
            _ if index == in_snapshot => (FrameKind::Snapshot, state.snapshot().encode_to_vec()),
            Some(command) if index > in_snapshot => (FrameKind::Command, command.encode_to_vec()),
            _ => continue,
        };
        bytes.extend(format::frame(version, bytes.len(), kind, index, &payload));
    }
    bytes.resize(bytes.len().next_multiple_of(STEP_BYTES as usize), 0);
    (bytes, state)
}

fn disk_with(bytes: &[u8]) -> Arc<SimFiles> {
    let disk = SimFiles::new(0);
    disk.create_dir_all(Path::new(ROOT)).expect("made");
    let file = disk.open(&path(), OpenMode::Create).expect("created");
    file.write_at(0, &[IoSlice::new(bytes)]).expect("written");
    disk
}

fn path() -> PathBuf {
    Path::new(ROOT).join(JOURNAL_FILE)
}

fn take_over(disk: &Arc<SimFiles>, cluster_id: &str) -> Result<OpenedStore, JournalError> {
    Store::open(disk.clone(), Path::new(ROOT), cluster_id, true, Founding::Alone, 7)
}

fn commands() -> Vec<Command> {
    (1..=20).map(command_at).collect()
}

fn end_of(bytes: &[u8]) -> usize {
    bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count()
}

#[test]
fn journals_of_both_versions_are_taken_over_at_their_version() {
    for version in OLDEST_VERSION..=ALONE_VERSION {
        for in_snapshot in [0, 7, 20] {
            let (bytes, state) = journal_of_a_broker_alone(version, in_snapshot, &commands());
            let taken = take_over(&disk_with(&bytes), "cluster").expect("opens");
            assert!(taken.taken_over && taken.torn_bytes == 0);
            let (_, applied) = RaftMachine::new(taken.store);
            assert_eq!(*applied.borrow().state, state);
            assert_eq!(applied.borrow().last_log_id.map(|last| last.index), Some(20));
        }
    }
}

#[test]
fn a_torn_last_command_is_not_taken_over() {
    let (bytes, state) = journal_of_a_broker_alone(ALONE_VERSION, 0, &commands());
    for lost in 1..20 {
        let mut torn = bytes.clone();
        torn[end_of(&bytes) - lost..].fill(0);
        let taken = take_over(&disk_with(&torn), "cluster").expect("a torn frame is no damage");
        assert!(taken.torn_bytes > 0);
        assert_eq!(RaftMachine::new(taken.store).1.borrow().state.index(), state.index() - 1);
    }
}

#[test]
fn damage_is_refused_with_file_and_position_and_left_as_it_is() {
    let (bytes, _) = journal_of_a_broker_alone(ALONE_VERSION, 2, &commands()[..4]);
    for at in 0..end_of(&bytes) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        let disk = disk_with(&damaged);
        let error = take_over(&disk, "cluster").expect_err("refused");
        let JournalError::Damaged { path, damage } = &error else { panic!("{error}") };
        assert!(path.ends_with(JOURNAL_FILE) && damage.position <= at, "{error}");
        assert_eq!(files::read(&*disk, path, u64::MAX).expect("reads"), damaged);
    }
}

#[test]
fn a_command_that_this_build_does_not_know_and_another_cluster_are_refused() {
    let (bytes, _) = journal_of_a_broker_alone(ALONE_VERSION, 0, &[Command::default()]);
    let error = take_over(&disk_with(&bytes), "cluster").expect_err("refused").to_string();
    assert!(error.contains("at byte 52 cannot be used: the command has no known kind"), "{error}");
    let (bytes, _) = journal_of_a_broker_alone(ALONE_VERSION, 3, &commands());
    let disk = disk_with(&bytes);
    let foreign = take_over(&disk, "another").expect_err("refused").to_string();
    assert!(foreign.contains("belongs to cluster cluster, the folder to cluster another"), "{foreign}");
    assert!(foreign.contains("as cluster.id in /data/meta.properties says"), "{foreign}");
    assert_eq!(files::read(&*disk, &path(), u64::MAX).expect("reads"), bytes);
}

#[test]
fn without_room_for_the_new_journal_the_old_one_stays() {
    let (bytes, state) = journal_of_a_broker_alone(ALONE_VERSION, 3, &commands());
    let disk = disk_with(&bytes);
    disk.set_capacity(Some(disk.used_bytes()));
    let full = take_over(&disk, "cluster").expect_err("no room");
    assert!(matches!(full, JournalError::FullAtStart { .. }), "{full}");
    let told = full.to_string();
    assert!(told.contains("free space on it and start again") && !told.contains("delete topics"), "{told}");
    assert_eq!(files::read(&*disk, &path(), u64::MAX).expect("reads"), bytes);
    disk.set_capacity(None);
    let taken = take_over(&disk, "cluster").expect("opens");
    assert_eq!(*RaftMachine::new(taken.store).1.borrow().state, state);
}
