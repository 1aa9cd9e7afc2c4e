use super::super::command::{self, command::Command as Kind};
use super::super::format::{FrameKind, STEP_BYTES};
use super::super::journal_file::aside;
use super::*;
use headwater_proto::TopicId;
use headwater_storage::OsFiles;
use headwater_storage::files::{self, OpenMode};
use headwater_storage::sim::{Fault, Operation, SimFiles};
use std::io::IoSlice;
use tempfile::TempDir;

fn files() -> Arc<dyn Files> {
    Arc::new(OsFiles::new())
}

fn open(root: &TempDir) -> Result<Opened, JournalError> {
    Journal::open(files(), root.path(), "cluster", false)
}

fn register() -> Command {
    Kind::RegisterBroker(command::RegisterBroker { broker_id: 1, ..Default::default() }).into()
}

fn create(n: u32) -> Command {
    let mut id = [1; 16];
    id[..4].copy_from_slice(&n.to_be_bytes());
    Kind::CreateTopic(command::CreateTopic {
        name: format!("topic-{n}"),
        topic_id: TopicId::from_bytes(id).to_wire(),
        partitions: vec![command::Replicas { brokers: vec![1] }],
        ..Default::default()
    })
    .into()
}

/// Applies and journals a command, as the driver does.
fn run(journal: &mut Journal, state: &mut MetadataState, command: &Command) {
    let index = state.index() + 1;
    state.apply(index, command).expect("accepted");
    journal.append(index, command, false).expect("kept");
}

fn filled(root: &TempDir, topics: u32) -> MetadataState {
    let Opened { mut journal, mut state, .. } = open(root).expect("opens");
    run(&mut journal, &mut state, &register());
    for n in 0..topics {
        run(&mut journal, &mut state, &create(n));
    }
    state
}

fn bytes(root: &TempDir) -> Vec<u8> {
    std::fs::read(root.path().join(JOURNAL_FILE)).expect("reads")
}

fn write(root: &TempDir, bytes: &[u8]) {
    std::fs::write(root.path().join(JOURNAL_FILE), bytes).expect("writes");
}

#[test]
fn what_was_kept_is_there_when_it_is_opened_again() {
    let root = tempfile::tempdir().expect("a folder");
    let state = filled(&root, 20);
    let again = open(&root).expect("opens");
    assert_eq!((again.state, again.commands, again.torn_bytes), (state, 21, 0));
}

#[test]
fn a_snapshot_takes_the_place_of_the_commands() {
    let root = tempfile::tempdir().expect("a folder");
    let state = filled(&root, 20);
    let mut opened = open(&root).expect("opens");
    opened.journal.snapshot(&state).expect("written");
    run(&mut opened.journal, &mut opened.state, &create(99));
    let again = open(&root).expect("opens");
    assert_eq!((again.commands, &again.state), (1, &opened.state));
    assert!(!aside(&root.path().join(JOURNAL_FILE)).exists());
}

#[test]
fn commands_that_outgrow_the_snapshot_call_for_a_new_one() {
    let root = tempfile::tempdir().expect("a folder");
    let Opened { mut journal, mut state, .. } = open(&root).expect("opens");
    run(&mut journal, &mut state, &register());
    let config = std::collections::BTreeMap::from([("key".to_owned(), "x".repeat(200_000))]);
    run(&mut journal, &mut state, &create(0));
    let id = state.topic("topic-0").expect("there").id.to_wire();
    let mut appended = 0;
    while !journal.is_snapshot_due() {
        let alter = Kind::AlterTopic(command::AlterTopic { topic_id: id.clone(), config: config.clone() }).into();
        run(&mut journal, &mut state, &alter);
        appended += 1;
    }
    assert_eq!(appended, 6, "after a mebibyte of commands");
    journal.snapshot(&state).expect("written");
    assert!(!journal.is_snapshot_due());
    assert!(bytes(&root).len() < 500_000);
    assert_eq!(open(&root).expect("opens").state, state);
}

#[test]
fn a_torn_command_is_cut_and_the_next_one_takes_its_place() {
    let root = tempfile::tempdir().expect("a folder");
    let state = filled(&root, 3);
    let whole = bytes(&root);
    let torn_at = whole.len() - whole.iter().rev().take_while(|byte| **byte == 0).count();
    for lost in 1..20 {
        let mut torn = whole.clone();
        torn[torn_at - lost..].fill(0);
        write(&root, &torn);
        let mut opened = open(&root).expect("a torn frame is no damage");
        assert!(opened.torn_bytes > 0);
        assert_eq!(opened.state.index(), state.index() - 1);
        run(&mut opened.journal, &mut opened.state, &create(50));
        let again = open(&root).expect("opens");
        assert_eq!((&again.state, again.torn_bytes), (&opened.state, 0));
    }
}

/// What version 1 wrote of these commands.
fn version_1(commands: &[Command]) -> (Vec<u8>, MetadataState) {
    let mut state = MetadataState::new("cluster");
    let mut bytes = format::file_header(1).to_vec();
    bytes.extend(format::frame(1, bytes.len(), FrameKind::Snapshot, 0, &state.snapshot().encode_to_vec()));
    for command in commands {
        let index = state.index() + 1;
        state.apply(index, command).expect("accepted");
        bytes.extend(format::frame(1, bytes.len(), FrameKind::Command, index, &command.encode_to_vec()));
    }
    bytes.resize(2 * STEP_BYTES as usize, 0);
    (bytes, state)
}

fn version_of(files: &dyn Files) -> u8 {
    files::read(files, Path::new("/data").join(JOURNAL_FILE).as_path(), u64::MAX).expect("reads")[11]
}

#[test]
fn a_journal_of_the_first_version_is_read_and_replaced_once_there_is_room() {
    let commands: Vec<Command> = std::iter::once(register()).chain((0..20).map(create)).collect();
    let (bytes, state) = version_1(&commands);
    let root = Path::new("/data");
    for full in [false, true] {
        let disk = SimFiles::new(0);
        disk.create_dir_all(root).expect("made");
        let file = disk.open(&root.join(JOURNAL_FILE), OpenMode::Create).expect("created");
        file.write_at(0, &[IoSlice::new(&bytes)]).expect("written");
        drop(file);
        if full {
            disk.set_capacity(Some(disk.used_bytes()));
        }
        let open = || Journal::open(Arc::clone(&disk) as Arc<dyn Files>, root, "cluster", true).expect("opens");
        let mut opened = open();
        assert_eq!((&opened.state, opened.commands), (&state, 21));
        assert_eq!(version_of(&*disk), if full { 1 } else { 2 });
        // What goes on in the old file is read as the rest of it is, wherever its frames begin.
        for n in 0..20 {
            let topic_id = opened.state.topic(&format!("topic-{n}")).expect("there").id.to_wire();
            let delete: Command = Kind::DeleteTopic(command::DeleteTopic { topic_id }).into();
            let index = opened.state.index() + 1;
            opened.state.apply(index, &delete).expect("accepted");
            opened.journal.append(index, &delete, true).expect("kept");
        }
        disk.set_capacity(None);
        drop(opened.journal);
        let again = open();
        assert_eq!((again.state, again.commands), (opened.state, if full { 41 } else { 20 }));
        assert_eq!(version_of(&*disk), 2);
        assert_eq!(open().commands, if full { 0 } else { 20 });
    }
}

#[test]
fn damage_is_refused_with_file_and_position() {
    let root = tempfile::tempdir().expect("a folder");
    filled(&root, 3);
    let whole = bytes(&root);
    let end = whole.len() - whole.iter().rev().take_while(|byte| **byte == 0).count();
    for at in 0..end {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        write(&root, &damaged);
        let error = open(&root).expect_err("refused");
        let JournalError::Damaged { path, damage } = &error else { panic!("{error}") };
        assert!(path.ends_with(JOURNAL_FILE) && damage.position <= at, "{error}");
        assert_eq!(bytes(&root), damaged, "what is damaged is left as it is");
    }
    for len in [0, 5, end, end + 1, whole.len() - 1] {
        write(&root, &whole[..len]);
        let error = open(&root).expect_err("refused").to_string();
        assert!(error.contains("it was cut"), "{len}: {error}");
    }
    write(&root, &vec![0; whole.len()]);
    assert!(open(&root).expect_err("refused").to_string().contains("at byte 0"));
}

#[test]
fn a_missing_journal_beside_partitions_and_a_foreign_one_are_refused() {
    let root = tempfile::tempdir().expect("a folder");
    let missing = Journal::open(files(), root.path(), "cluster", true).expect_err("refused");
    assert!(matches!(missing, JournalError::Missing { .. }), "{missing}");
    filled(&root, 1);
    let foreign = Journal::open(files(), root.path(), "another", true).expect_err("refused");
    assert!(foreign.to_string().ends_with("belongs to cluster cluster, the folder to cluster another"), "{foreign}");
}

#[test]
fn a_command_that_this_build_does_not_know_stops_it() {
    let root = tempfile::tempdir().expect("a folder");
    let Opened { mut journal, state, .. } = open(&root).expect("opens");
    journal.append(state.index() + 1, &Command::default(), false).expect("kept");
    let error = open(&root).expect_err("refused").to_string();
    assert!(error.contains("at byte 52 cannot be used: the command has no known kind"), "{error}");
}

/// What a driver does with one command, on a disk that may fail at any time: what was acknowledged, and the journal.
fn live(
    disk: &Arc<SimFiles>,
    acknowledged: &mut MetadataState,
    commands: std::ops::Range<u32>,
) -> Result<(), JournalError> {
    let files: Arc<dyn Files> = disk.clone();
    let Opened { mut journal, mut state, .. } = Journal::open(files, Path::new("/data"), "cluster", false)?;
    // One command may have been kept without anybody hearing of it.
    assert!(state.index() == acknowledged.index() || state.index() == acknowledged.index() + 1, "lost or invented");
    acknowledged.clone_from(&state);
    for n in commands {
        let command = if n == 0 { register() } else { create(n) };
        let index = state.index() + 1;
        let mut next = state.clone();
        if next.apply(index, &command).is_err() {
            continue; // Kept before the power failed.
        }
        journal.append(index, &command, false)?;
        state = next;
        acknowledged.clone_from(&state);
        if n % 3 == 2 {
            journal.snapshot(&state)?;
        }
    }
    Ok(())
}

#[test]
fn a_power_failure_in_any_operation_loses_nothing_that_was_acknowledged() {
    for seed in 0..12u64 {
        let whole = SimFiles::new(seed);
        whole.create_dir_all(Path::new("/data")).expect("made");
        whole.sync_dir(Path::new("/")).expect("synced");
        let before = whole.operations();
        live(&whole, &mut MetadataState::new("cluster"), 0..8).expect("a good disk");
        let operations = whole.operations() - before;
        for last in 0..operations {
            let disk = SimFiles::new(seed.wrapping_mul(1000) + last);
            disk.create_dir_all(Path::new("/data")).expect("made");
            disk.sync_dir(Path::new("/")).expect("synced");
            let mut acknowledged = MetadataState::new("cluster");
            disk.power_off_after(last);
            live(&disk, &mut acknowledged, 0..8).expect_err("the power fails");
            let disk = disk.crash();
            live(&disk, &mut acknowledged, 0..12).expect("a good disk");
            assert_eq!(acknowledged.topics().count(), 11, "seed {seed}, power off after {last}");
        }
    }
}

#[test]
fn topics_can_be_deleted_on_a_full_disk() {
    let disk = SimFiles::new(7);
    disk.create_dir_all(Path::new("/data")).expect("made");
    let files: Arc<dyn Files> = disk.clone();
    let open = || Journal::open(files.clone(), Path::new("/data"), "cluster", false);
    let Opened { mut journal, mut state, .. } = open().expect("opens");
    run(&mut journal, &mut state, &register());
    disk.set_capacity(Some(disk.used_bytes()));
    let mut topics = 0;
    let full = loop {
        let command = create(topics);
        let index = state.index() + 1;
        if let Err(error) = journal.append(index, &command, false) {
            break error;
        }
        state.apply(index, &command).expect("accepted");
        topics += 1;
    };
    assert!(matches!(full, JournalError::Full { .. }), "{full}");
    assert!(full.to_string().contains("delete topics or free space"));
    drop(journal.snapshot(&state).expect_err("no room for a second file"));
    let ids: Vec<_> = state.topics().map(|topic| topic.id.to_wire()).collect();
    assert!(ids.len() > 50);
    for topic_id in ids {
        let index = state.index() + 1;
        let delete = Kind::DeleteTopic(command::DeleteTopic { topic_id }).into();
        journal.append(index, &delete, true).expect("urgent");
        state.apply(index, &delete).expect("accepted");
    }
    // A start on the full disk registers the broker, which is urgent too.
    drop(journal);
    let mut opened = open().expect("opens");
    assert_eq!(opened.state, state);
    opened.journal.append(state.index() + 1, &register(), true).expect("urgent");
    disk.set_capacity(None);
    opened.state.apply(state.index() + 1, &register()).expect("accepted");
    run(&mut opened.journal, &mut opened.state, &create(0));
    assert_eq!(open().expect("opens").state, opened.state);
}

#[test]
fn after_a_failed_write_or_sync_nothing_is_taken() {
    for operation in [Operation::Write, Operation::Sync] {
        let disk = SimFiles::new(3);
        disk.create_dir_all(Path::new("/data")).expect("made");
        let files: Arc<dyn Files> = disk.clone();
        let Opened { mut journal, mut state, .. } =
            Journal::open(files, Path::new("/data"), "cluster", false).expect("opens");
        run(&mut journal, &mut state, &register());
        disk.fail(Fault::new(operation).times(1));
        let failed = journal.append(state.index() + 1, &create(0), false).expect_err("a bad disk");
        assert!(matches!(failed, JournalError::Io { .. }), "{failed}");
        let refused = journal.append(state.index() + 1, &create(1), true).expect_err("refused");
        assert!(matches!(refused, JournalError::Poisoned { .. }), "{refused}");
        assert!(!journal.is_snapshot_due());
    }
}
