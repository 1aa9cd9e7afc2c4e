use super::super::command::{self, command::Command as Kind};
use super::*;
use headwater_proto::TopicId;
use headwater_storage::OsFiles;
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
    assert!(error.contains("at byte 50 cannot be used: the command has no known kind"), "{error}");
}
