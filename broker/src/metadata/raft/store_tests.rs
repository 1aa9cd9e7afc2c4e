use super::super::command::{self, Command, RaftRecord, command::Command as Kind};
use super::super::format::{self, ALONE_VERSION, FrameKind, RAFT_VERSION, STEP_BYTES};
use super::super::journal::{self, JournalError};
use super::super::journal_file::JOURNAL_FILE;
use super::super::state::MetadataState;
use super::kept::{Change, Kept, KeptSnapshot};
use super::recover;
use super::store::StoreError;
use super::*;
use crate::replica::Member;
use crate::replica::follower::{FollowerState, Replica};
use crate::replica::history::{History, Verdict};
use headwater_proto::TopicId;
use headwater_storage::Files;
use headwater_storage::epochs::EpochEntry;
use headwater_storage::files::{self, OpenMode};
use headwater_storage::sim::{Fault, Operation, SimFiles};
use openraft::CommittedLeaderId;
use prost::Message;
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ROOT: &str = "/data";
const MEMBER: u64 = 7;

fn disk(seed: u64) -> Arc<SimFiles> {
    let disk = SimFiles::new(seed);
    disk.create_dir_all(Path::new(ROOT)).expect("made");
    disk.sync_dir(Path::new("/")).expect("synced");
    disk
}

fn open(disk: &Arc<SimFiles>) -> Result<OpenedStore, JournalError> {
    Store::open(disk.clone(), Path::new(ROOT), "cluster", false, Founding::Alone, MEMBER)
}

fn store(disk: &Arc<SimFiles>) -> Store {
    open(disk).expect("opens").store
}

fn path() -> PathBuf {
    Path::new(ROOT).join(JOURNAL_FILE)
}

fn bytes(disk: &SimFiles) -> Vec<u8> {
    files::read(disk, &path(), u64::MAX).expect("reads")
}

fn write(disk: &SimFiles, bytes: &[u8]) {
    let file = disk.open(&path(), OpenMode::Create).expect("created");
    file.write_at(0, &[IoSlice::new(bytes)]).expect("written");
    file.sync_all().expect("synced");
    disk.sync_dir(Path::new(ROOT)).expect("synced");
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, MEMBER), index)
}

fn register() -> Command {
    Kind::RegisterBroker(command::RegisterBroker { broker_id: 1, ..Default::default() }).into()
}

fn create(n: u64) -> Command {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    Kind::CreateTopic(command::CreateTopic {
        name: format!("topic-{n}"),
        topic_id: TopicId::from_bytes(id).to_wire(),
        partitions: vec![command::Replicas { brokers: vec![1] }],
        ..Default::default()
    })
    .into()
}

/// What stands at an index of these tests' logs.
fn command_at(index: u64) -> Command {
    if index == 1 { register() } else { create(index) }
}

fn entry(term: u64, index: u64) -> Entry {
    Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(command_at(index)) }
}

fn entries(term: u64, indexes: std::ops::RangeInclusive<u64>) -> Change {
    Change::Append(indexes.map(|index| entry(term, index)).collect())
}

/// What the entries up to this one lead to.
fn applied(term: u64, index: u64) -> Applied {
    let mut state = MetadataState::new("cluster");
    for index in 1..=index {
        state.apply(index, &command_at(index)).expect("accepted");
    }
    let membership = StoredMembership::new(Some(log_id(1, 0)), Membership::new(vec![[MEMBER].into()], ()));
    Applied { state: Arc::new(state), last_log_id: Some(log_id(term, index)), membership }
}

/// Everything that must survive. What is committed need not: it is learned again.
fn durable(kept: &Kept) -> command::RaftJournal {
    command::RaftJournal { committed: None, ..kept.message(kept.snapshot.as_ref()) }
}

#[derive(Clone)]
enum Step {
    Change(Change),
    Committed(LogId),
    Snapshot(Applied),
    Install(Applied),
}

/// A member's life: it writes, votes, takes back what another leader did not have, takes snapshots and drops what is in them,
/// and is sent a snapshot beyond its log.
fn life() -> Vec<Step> {
    vec![
        Step::Change(entries(1, 1..=3)),
        Step::Committed(log_id(1, 2)),
        Step::Change(Change::Vote(Vote::new(2, MEMBER))),
        Step::Change(Change::Vote(Vote::new_committed(2, MEMBER))),
        Step::Change(entries(2, 4..=9)),
        Step::Change(Change::Truncate(log_id(2, 6))),
        Step::Change(entries(3, 6..=7)),
        Step::Committed(log_id(3, 7)),
        Step::Snapshot(applied(3, 7)),
        Step::Change(entries(3, 8..=8)),
        Step::Change(Change::Purge(log_id(2, 5))),
        Step::Change(entries(3, 9..=9)),
        Step::Change(Change::Vote(Vote::new(4, 99))),
        Step::Install(applied(4, 20)),
        Step::Change(Change::Purge(log_id(4, 20))),
        Step::Change(entries(4, 21..=22)),
    ]
}

/// What is kept after each of the steps, and before the first.
fn course(steps: &[Step]) -> Vec<command::RaftJournal> {
    let mut kept = store(&disk(0)).kept().clone();
    let mut after = vec![durable(&kept)];
    for step in steps {
        match step.clone() {
            Step::Change(change) => {
                kept.check(&change).expect("legal");
                kept.apply(change);
            }
            Step::Committed(log_id) => kept.committed = Some(log_id),
            Step::Snapshot(applied) | Step::Install(applied) => kept.snapshot = Some(snapshot(&applied)),
        }
        after.push(durable(&kept));
    }
    after
}

fn snapshot(applied: &Applied) -> KeptSnapshot {
    let (last_log_id, last_membership) = (applied.last_log_id, applied.membership.clone());
    let snapshot_id = applied.last_log_id.map(|last| last.to_string()).unwrap_or_default();
    KeptSnapshot { meta: SnapshotMeta { last_log_id, last_membership, snapshot_id }, state: Arc::clone(&applied.state) }
}

fn take(store: &Store, step: Step) -> Result<(), StoreError> {
    match step {
        Step::Change(change) => store.change(change)?,
        Step::Committed(log_id) => store.set_committed(Some(log_id)),
        Step::Snapshot(applied) => {
            // An older one is what comes of it where it cannot be written.
            let written = store.write_snapshot(&applied)?;
            if written.meta.last_log_id != applied.last_log_id {
                return Err(JournalError::Full { path: path() }.into());
            }
        }
        Step::Install(applied) => store.keep_snapshot(snapshot(&applied))?,
    }
    Ok(())
}

/// Lives on from the step that the disk is at, and says after each which it was.
fn live(disk: &Arc<SimFiles>, done: &mut usize) -> Result<(), StoreError> {
    let (steps, course) = (life(), course(&life()));
    let store = open(disk)?.store;
    let found = durable(&store.kept());
    // One step may have been kept without anybody hearing of it. What is committed is only remembered.
    let at = (*done..=*done + 1).find(|n| course.get(*n) == Some(&found));
    *done = at.unwrap_or_else(|| panic!("lost or invented after step {done}: {found:?}"));
    for step in steps.into_iter().skip(*done) {
        take(&store, step)?;
        *done += 1;
    }
    Ok(())
}

#[test]
fn what_was_kept_is_there_when_it_is_opened_again() {
    let disk = disk(1);
    live(&disk, &mut 0).expect("a good disk");
    let again = open(&disk).expect("opens");
    assert_eq!((again.torn_bytes, again.taken_over, again.store.node_id()), (0, false, MEMBER));
    assert_eq!(Some(&durable(&again.store.kept())), course(&life()).last());
    assert_eq!(again.store.kept().last_log_id(), Some(log_id(4, 22)));
    assert_eq!(again.store.kept().vote, Some(Vote::new(4, 99)));
}

#[test]
fn a_power_failure_in_any_operation_loses_no_vote_and_no_entry() {
    for seed in 0..8u64 {
        let whole = disk(seed);
        let before = whole.operations();
        live(&whole, &mut 0).expect("a good disk");
        let operations = whole.operations() - before;
        assert!(operations > 40);
        for last in 0..operations {
            let disk = disk(seed.wrapping_mul(1000) + last);
            let mut done = 0;
            disk.power_off_after(last);
            live(&disk, &mut done).expect_err("the power fails");
            let disk = disk.crash();
            live(&disk, &mut done).expect("a good disk");
            assert_eq!(done, life().len(), "seed {seed}, power off after {last}");
        }
    }
}

#[test]
fn what_is_committed_is_said_with_the_next_change() {
    let disk = disk(2);
    let first = store(&disk);
    first.change(entries(1, 1..=4)).expect("kept");
    first.set_committed(Some(log_id(1, 3)));
    assert_eq!(store(&disk).kept().committed, Some(log_id(1, 0)), "known late, never wrong");
    first.change(entries(1, 5..=5)).expect("kept");
    first.set_committed(Some(log_id(1, 5)));
    assert_eq!(store(&disk).kept().committed, Some(log_id(1, 3)));
    first.write_snapshot(&applied(1, 5)).expect("written");
    assert_eq!(store(&disk).kept().committed, Some(log_id(1, 5)));
}

#[test]
fn only_the_only_voter_takes_what_it_kept_for_committed() {
    let disk = disk(14);
    let store = store(&disk);
    store.change(entries(1, 1..=3)).expect("kept");
    store.commit_if_alone();
    assert_eq!(store.kept().committed, Some(log_id(1, 3)));
    let members = |index, voters: Vec<std::collections::BTreeSet<u64>>| {
        let payload = EntryPayload::Membership(Membership::new(voters, ()));
        Change::Append(vec![Entry { log_id: log_id(1, index), payload }])
    };
    for (index, voters) in [(4, vec![[MEMBER].into(), [MEMBER, 8].into()]), (5, vec![[8].into()]), (6, vec![])] {
        store.change(members(index, voters)).expect("kept");
        store.commit_if_alone();
        assert_eq!(store.kept().committed, Some(log_id(1, 3)));
    }
    store.change(members(7, vec![[MEMBER].into()])).expect("kept");
    store.commit_if_alone();
    assert_eq!(store.kept().committed, Some(log_id(1, 7)));
}

/// A snapshot takes the place of entries, which are dropped a moment later. A start in between took this member for the only
/// voter that it once was, and what it had left for committed.
#[test]
fn what_a_snapshot_has_overtaken_says_nothing_of_who_votes() {
    let disk = disk(15);
    let first = store(&disk);
    first.change(entries(1, 1..=3)).expect("kept");
    let members = |voters: &[u64]| Membership::new(vec![voters.iter().copied().collect()], ());
    let payload = EntryPayload::Membership(members(&[MEMBER]));
    first.change(Change::Append(vec![Entry { log_id: log_id(1, 4), payload }])).expect("kept");
    assert!(first.kept().is_only_voter());
    let mut sent = snapshot(&applied(2, 9));
    sent.meta.last_membership = StoredMembership::new(Some(log_id(2, 8)), members(&[MEMBER, 8, 9]));
    first.keep_snapshot(sent).expect("kept");
    drop(first);
    let again = store(&disk.crash());
    assert_eq!(again.kept().entries.len(), 4);
    assert!(!again.kept().is_only_voter());
    again.commit_if_alone();
    assert_ne!(again.kept().committed, Some(log_id(1, 4)));
    // What follows the snapshot counts again.
    let payload = EntryPayload::Membership(members(&[MEMBER]));
    again.change(Change::Purge(log_id(2, 9))).expect("kept");
    again.change(Change::Append(vec![Entry { log_id: log_id(2, 10), payload }])).expect("kept");
    assert!(again.kept().is_only_voter());
}

#[test]
fn a_torn_record_is_cut_and_the_next_one_takes_its_place() {
    let disk = disk(3);
    let first = store(&disk);
    first.change(entries(1, 1..=3)).expect("kept");
    first.change(entries(1, 4..=4)).expect("kept");
    drop(first);
    let whole = bytes(&disk);
    let torn_at = whole.len() - whole.iter().rev().take_while(|byte| **byte == 0).count();
    for lost in 1..40 {
        let mut torn = whole.clone();
        torn[torn_at - lost..].fill(0);
        write(&disk, &torn);
        let opened = open(&disk).expect("a torn record is no damage");
        assert!(opened.torn_bytes > 0);
        assert_eq!(opened.store.kept().last_log_id(), Some(log_id(1, 3)));
        opened.store.change(entries(2, 4..=4)).expect("kept");
        let again = open(&disk).expect("opens");
        assert_eq!((again.store.kept().last_log_id(), again.torn_bytes), (Some(log_id(2, 4)), 0));
    }
}

#[test]
fn damage_is_refused_with_file_and_position() {
    let disk = disk(4);
    live(&disk, &mut 0).expect("a good disk");
    let whole = bytes(&disk);
    let end = whole.len() - whole.iter().rev().take_while(|byte| **byte == 0).count();
    for at in 0..end {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        write(&disk, &damaged);
        let error = open(&disk).expect_err("refused");
        let JournalError::Damaged { path, damage } = &error else { panic!("{error}") };
        assert!(path.ends_with(JOURNAL_FILE) && damage.position <= at, "{error}");
        assert_eq!(bytes(&disk), damaged, "what is damaged is left as it is");
    }
    for len in [0, 5, end, end + 1, STEP_BYTES as usize - 1] {
        write(&disk, &whole[..len]);
        let error = open(&disk).expect_err("refused").to_string();
        assert!(error.contains("it was cut"), "{len}: {error}");
    }
    // Behind the first step are zeros, where there is anything.
    for len in [STEP_BYTES as usize, STEP_BYTES as usize + 1, whole.len() - 1] {
        write(&disk, &whole[..len]);
        drop(open(&disk).expect("nothing is lost"));
        let mut damaged = bytes(&disk);
        damaged.push(1);
        write(&disk, &damaged);
        open(&disk).expect_err("refused");
    }
}

#[test]
fn a_missing_journal_and_a_foreign_one_are_refused() {
    let disk = disk(5);
    let open = |cluster, has_partitions| {
        Store::open(disk.clone(), Path::new(ROOT), cluster, has_partitions, Founding::Alone, MEMBER)
    };
    let missing = open("cluster", true).expect_err("refused");
    assert!(matches!(missing, JournalError::Missing { .. }), "{missing}");
    drop(open("cluster", false).expect("opens"));
    let foreign = open("another", true).expect_err("refused").to_string();
    assert!(foreign.contains("belongs to cluster cluster, the folder to cluster another"), "{foreign}");
    assert!(foreign.contains("as cluster.id in /data/meta.properties says"), "{foreign}");
}

#[test]
fn a_member_is_the_same_until_its_disk_is_emptied() {
    let disk = disk(6);
    let open = |new_node_id| {
        let opened = Store::open(disk.clone(), Path::new(ROOT), "cluster", false, Founding::Joins, new_node_id);
        opened.expect("opens").store
    };
    let first = open(11);
    first.change(Change::Vote(Vote::new(5, 11))).expect("kept");
    let again = open(12);
    assert_eq!((again.node_id(), again.kept().vote), (11, Some(Vote::new(5, 11))));
    disk.remove_file(&path()).expect("removed");
    let emptied = open(13);
    let kept = emptied.kept().clone();
    assert_eq!((kept.node_id, kept.vote, kept.last_log_id()), (13, None, None));
    assert_ne!(new_node_id(), new_node_id());
}

#[test]
fn changes_that_break_the_log_are_refused_and_change_nothing() {
    let disk = disk(7);
    let store = store(&disk);
    store.change(entries(2, 1..=5)).expect("kept");
    store.change(Change::Vote(Vote::new(3, MEMBER))).expect("kept");
    store.set_committed(Some(log_id(2, 3)));
    let before = bytes(&disk);
    for (change, why) in [
        (entries(2, 7..=8), "does not follow"),
        (entries(2, 5..=6), "does not follow"),
        (entries(1, 6..=6), "does not follow"),
        (Change::Append(vec![entry(2, 6), entry(2, 8)]), "does not follow"),
        (Change::Vote(Vote::new(2, MEMBER)), "is older than"),
        (Change::Truncate(log_id(2, 3)), "is committed"),
        (Change::Truncate(log_id(1, 0)), "is committed"),
    ] {
        let refused = store.change(change).expect_err("refused");
        assert!(matches!(refused, StoreError::Illegal(_)) && refused.to_string().contains(why), "{refused}");
    }
    assert_eq!(bytes(&disk), before);
    store.change(Change::Truncate(log_id(2, 4))).expect("not committed");
    assert_eq!(store.kept().last_log_id(), Some(log_id(2, 3)));
}

/// A journal that begins as `kept` says and goes on with this record.
fn journal_of(kept: &Kept, record: &RaftRecord) -> Vec<u8> {
    let mut bytes = format::file_header(RAFT_VERSION).to_vec();
    let begins = kept.message(kept.snapshot.as_ref()).encode_to_vec();
    bytes.extend(format::frame(RAFT_VERSION, bytes.len(), FrameKind::Snapshot, 0, &begins));
    bytes.extend(format::frame(RAFT_VERSION, bytes.len(), FrameKind::Command, 1, &record.encode_to_vec()));
    bytes.resize(STEP_BYTES as usize, 0);
    bytes
}

#[test]
fn whole_records_that_make_no_sense_are_refused_with_their_place() {
    let disk = disk(8);
    let kept = store(&disk).kept().clone();
    for (record, why) in [
        (RaftRecord::default(), "a change of no known kind"),
        (kept.record(&entries(1, 2..=3)), "does not follow"),
        (kept.record(&Change::Truncate(log_id(1, 0))), "is committed"),
        (kept.record(&Change::Purge(log_id(1, 4))), "were dropped, and the snapshot ends with"),
    ] {
        write(&disk, &journal_of(&kept, &record));
        let refused = open(&disk).expect_err("refused");
        assert!(matches!(refused, JournalError::Unusable { .. }), "{refused}");
        assert!(refused.to_string().contains(why), "{refused}");
    }
}

#[test]
fn what_is_in_a_snapshot_is_dropped_so_that_file_and_memory_stay_small() {
    let disk = disk(9);
    let store = store(&disk);
    let config = BTreeMap::from([("key".to_owned(), "x".repeat(100_000))]);
    store.change(entries(1, 1..=2)).expect("kept");
    let mut applied = applied(1, 2);
    let id = applied.state.topic("topic-2").expect("there").id.to_wire();
    let (mut longest, mut snapshots) = (0, 0);
    for index in 3..=60u64 {
        let alter: Command =
            Kind::AlterTopic(command::AlterTopic { topic_id: id.clone(), config: config.clone() }).into();
        Arc::make_mut(&mut applied.state).apply(index, &alter).expect("accepted");
        applied.last_log_id = Some(log_id(1, index));
        let entry = Entry { log_id: log_id(1, index), payload: EntryPayload::Normal(alter) };
        store.change(Change::Append(vec![entry])).expect("kept");
        if store.is_snapshot_due() {
            store.write_snapshot(&applied).expect("written");
            store.change(Change::Purge(log_id(1, index))).expect("kept");
            assert!(!store.is_snapshot_due());
            snapshots += 1;
        }
        longest = longest.max(bytes(&disk).len());
    }
    assert!((4..=6).contains(&snapshots), "after a mebibyte each: {snapshots}");
    assert!(longest < 3 << 20, "{longest}");
    assert!(store.kept().entries.len() < 12);
    let again = self::store(&disk);
    assert_eq!(durable(&again.kept()), durable(&store.kept()));
}

#[test]
fn on_a_full_disk_only_what_is_urgent_has_room_and_nothing_ends() {
    // A disk may have room for a part of what is asked for.
    for pages_left in [0, 1, 5, 15, 16, 17] {
        fill_the_disk(10 + pages_left, pages_left * 4096);
    }
}

fn fill_the_disk(seed: u64, left_bytes: u64) {
    let disk = disk(seed);
    let store = store(&disk);
    store.change(entries(1, 1..=1)).expect("kept");
    disk.set_capacity(Some(disk.used_bytes() + left_bytes));
    let mut index = 1;
    let full = loop {
        let bytes = command_at(index + 1).encoded_len() as u64 + 100;
        if let Err(error) = store.make_room(bytes, false) {
            break error;
        }
        index += 1;
        store.change(entries(1, index..=index)).expect("there is room");
    };
    assert!(matches!(full, JournalError::Full { .. }), "{full}");
    let before = store.kept().snapshot.as_ref().and_then(|kept| kept.meta.last_log_id);
    let older = store.write_snapshot(&applied(1, index)).expect("the older one goes on");
    assert_eq!(older.meta.last_log_id, before);
    for _ in 0..500 {
        store.make_room(200, true).expect("urgent");
        index += 1;
        store.change(entries(1, index..=index)).expect("the reserve");
    }
    drop(store);
    // A start on the full disk.
    let disk = if seed.is_multiple_of(2) { disk.restart() } else { disk.crash() };
    let store = self::store(&disk);
    assert_eq!(store.kept().last_log_id(), Some(log_id(1, index)));
    disk.set_capacity(None);
    store.make_room(200, false).expect("there is room again");
    assert_eq!(self::store(&disk).kept().last_log_id(), Some(log_id(1, index)));
}

#[test]
fn after_a_failed_write_or_sync_nothing_is_taken() {
    for operation in [Operation::Write, Operation::Sync] {
        let disk = disk(11);
        let store = store(&disk);
        store.change(entries(1, 1..=2)).expect("kept");
        disk.fail(Fault::new(operation).times(1));
        let failed = store.change(Change::Vote(Vote::new(9, MEMBER))).expect_err("a bad disk");
        assert!(matches!(failed, StoreError::Journal(JournalError::Io { .. })), "{failed}");
        assert_eq!(store.kept().vote, Some(Vote::new_committed(1, MEMBER)), "nobody hears of it");
        let refused = store.change(entries(1, 3..=3)).expect_err("refused");
        assert!(matches!(refused, StoreError::Journal(JournalError::Poisoned { .. })), "{refused}");
        let refused = store.write_snapshot(&applied(1, 2)).expect_err("refused");
        assert!(matches!(refused, JournalError::Poisoned { .. }), "{refused}");
        assert!(!store.is_snapshot_due());
    }
}

/// openraft goes on with an older snapshot as if nothing had happened, and the journal would take nothing any more.
#[test]
fn a_snapshot_that_leaves_the_journal_in_doubt_is_a_failure() {
    let disk = disk(15);
    let store = store(&disk);
    store.change(entries(1, 1..=2)).expect("kept");
    disk.fail(Fault::new(Operation::SyncDir).times(1));
    let failed = store.write_snapshot(&applied(1, 2)).expect_err("which of the two files is there?");
    assert!(matches!(failed, JournalError::Io { .. }), "{failed}");
    store.change(entries(1, 3..=3)).expect_err("refused");
}

/// After a failed sync the system calls pages clean that the disk never got, and shows them until they leave its memory.
#[test]
fn what_is_read_after_a_failed_sync_is_written_once_more() {
    for seed in 0..40 {
        let disk = disk(seed);
        let store = store(&disk);
        store.change(entries(1, 1..=2)).expect("kept");
        let config = BTreeMap::from([("key".to_owned(), "x".repeat(3 * 4096))]);
        let alter = Kind::AlterTopic(command::AlterTopic { topic_id: vec![1; 16].into(), config });
        let entry = Entry { log_id: log_id(1, 3), payload: EntryPayload::Normal(alter.into()) };
        disk.fail(Fault::new(Operation::Sync).times(1));
        store.change(Change::Append(vec![entry])).expect_err("a bad disk");
        drop(store);
        let disk = disk.restart();
        let store = self::store(&disk);
        assert_eq!(store.kept().last_log_id(), Some(log_id(1, 3)), "memory shows it");
        store.change(entries(1, 4..=4)).expect("kept");
        drop(store);
        let disk = disk.crash();
        assert_eq!(self::store(&disk).kept().last_log_id(), Some(log_id(1, 4)), "{seed}");
    }
}

/// The folder of a broker that kept a journal of commands alone.
fn alone(disk: &Arc<SimFiles>) -> MetadataState {
    let commands: Vec<Command> = (1..=8).map(command_at).collect();
    let (bytes, state) = journal::tests::journal_of_a_broker_alone(ALONE_VERSION, 5, &commands);
    write(disk, &bytes);
    state
}

/// What the older Headwater finds in a folder.
fn found_by_the_older(disk: &SimFiles) -> Result<MetadataState, String> {
    let bytes = bytes(disk);
    let scan = format::scan(&bytes, format::OLDEST_VERSION..=ALONE_VERSION).map_err(|damage| damage.to_string())?;
    journal::replay(&path(), &scan.frames).map_err(|error| error.to_string())
}

#[test]
fn the_folder_of_a_broker_alone_goes_on_as_a_quorum_of_one() {
    let disk = disk(12);
    let state = alone(&disk);
    let taken = Store::open(disk.clone(), Path::new(ROOT), "cluster", true, Founding::Joins, MEMBER).expect("opens");
    assert!(taken.taken_over);
    let (mut machine, told) = RaftMachine::new(taken.store.clone());
    assert_eq!(*told.borrow().state, state);
    assert_eq!(told.borrow().last_log_id.map(|last| last.index), Some(state.index()), "the version goes on");
    taken.store.change(entries(1, 9..=9)).expect("the next version");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let answers = runtime.block_on(openraft::storage::RaftStateMachine::apply(&mut machine, [entry(1, 9)]));
    assert!(matches!(answers.expect("applied")[..], [Answer::Applied(Outcome::TopicCreated(_))]));
    assert_eq!(told.borrow().state.index(), 9);
    let again = open(&disk).expect("opens");
    assert!(!again.taken_over && again.store.node_id() == MEMBER);
    // Who goes back to the older Headwater is told.
    let older = found_by_the_older(&disk).expect_err("refused");
    assert!(older.contains("the journal has format version 3, this build reads 1 to 2"), "{older}");
}

#[test]
fn a_power_failure_while_a_folder_is_taken_over_leaves_the_old_or_the_new() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..20u64 {
        let whole = disk(seed);
        let state = alone(&whole);
        let before = whole.operations();
        drop(open(&whole).expect("a good disk"));
        for last in 0..whole.operations() - before {
            let disk = disk(seed * 100 + last);
            alone(&disk);
            disk.power_off_after(last);
            open(&disk).expect_err("the power fails");
            let disk = disk.crash();
            // The older Headwater reads the old one as it was.
            match found_by_the_older(&disk) {
                Ok(found) => {
                    assert_eq!(found, state);
                    old += 1;
                }
                Err(_) => new += 1,
            }
            let taken = open(&disk).expect("a good disk");
            let kept = taken.store.kept().snapshot.clone().expect("a snapshot");
            assert_eq!((&*kept.state, kept.meta.last_log_id), (&state, Some(log_id(1, state.index()))));
        }
    }
    assert!(old > 20 && new > 5, "{old} {new}");
}

/// Those who are lost went on for so many commands after this member's log ends, and nobody is left who knows.
#[test]
fn a_recovery_gives_nothing_out_that_those_who_are_lost_may_have_given_out() {
    for commands in [1, 1_000u32] {
        let disk = disk(21);
        let store = store(&disk);
        store.change(entries(1, 1..=3)).expect("kept");
        drop(store);
        let mut lost = MetadataState::clone(&applied(1, 3).state);
        let ids = command::AllocateProducerIds { broker_id: 1, count: 1_000 };
        let allocate: Command = Kind::AllocateProducerIds(ids).into();
        for n in 0..commands {
            let command = if n % 2 == 0 { register() } else { allocate.clone() };
            lost.apply(lost.index() + 1, &command).expect("accepted");
        }
        let root = Path::new(ROOT);
        let recovered = Store::recover_alone(disk.clone(), root, "cluster", MEMBER + 1).expect("recovered");
        let store = self::store(&disk);
        assert_eq!((store.node_id(), recovered.voters), (MEMBER + 1, 1));
        let founded = store.kept().snapshot.clone().expect("a snapshot").state;
        assert_eq!(recovered.version, founded.index());
        let mut found = MetadataState::clone(&founded);
        // Its broker starts, and leads.
        found.apply(found.index() + 1, &register()).expect("accepted");
        assert!(founded.index() > lost.index() && founded.next_producer_id() > lost.next_producer_id());
        assert!(!lost.may_have_forgotten() && founded.may_have_forgotten());
        let (was, is) = (&lost.topic("topic-2").expect("there"), &found.topic("topic-2").expect("there"));
        let (was, is) = (&was.partitions[0], &is.partitions[0]);
        assert!(is.leader_epoch > was.leader_epoch && is.partition_epoch > was.partition_epoch, "{was:?} {is:?}");

        // Who followed the lost ones has records from 100 on that are others there.
        let log = |epoch, log_end| {
            let epochs = [(0, 0), (epoch, 100)].map(|(epoch, start_offset)| EpochEntry { epoch, start_offset });
            History::new(epochs.to_vec(), 0, log_end).expect("a history")
        };
        let follower = log(was.leader_epoch, 150);
        let verdict = follower.compare(&log(is.leader_epoch, 180));
        assert_eq!(verdict, Verdict::Cut { to: 100 }, "it is not believed");
        let replica = Replica {
            member: Member { broker: 2, incarnation: uuid::Uuid::nil() },
            history: follower,
            flushed: 150,
            high_watermark: 150,
            generation: 0,
            // As many as they may have recorded.
            unclean_taken: commands,
        };
        let mut follower = FollowerState::follow(is.leader_epoch, replica, is.unclean_recoveries);
        follower.verdict(follower.tenure(), verdict);
        assert!(!follower.is_fenced(), "a person wants it cut");
    }
}

/// An empty cluster came of it, and whatever was on the disk was set aside for deletion.
#[test]
fn nothing_is_recovered_from_a_member_that_knows_nothing() {
    let (disk, root) = (disk(22), Path::new(ROOT));
    let store = store(&disk);
    store.change(entries(1, 1..=3)).expect("kept");
    drop(store);
    let was = headwater_storage::files::read(&*disk, &root.join(JOURNAL_FILE), u64::MAX).expect("read");
    let former = root.join(recover::FORMER_FILE);
    let kept_in = Store::begin_anew(disk.clone(), root, "cluster", MEMBER + 1).expect("begun anew");
    assert_eq!(kept_in.as_ref(), Some(&former));
    let refused = Store::recover_alone(disk.clone(), root, "cluster", MEMBER + 2).expect_err("it knows nothing");
    assert!(refused.to_string().contains(recover::FORMER_FILE), "{refused}");
    // Whoever waits for the broker to come in says it once more: what it knew was written over with nothing.
    for node_id in [MEMBER + 2, MEMBER + 3] {
        assert_eq!(Store::begin_anew(disk.clone(), root, "cluster", node_id).expect("begun anew"), None);
    }
    assert_eq!(headwater_storage::files::read(&*disk, &former, u64::MAX).expect("kept"), was);
    // What it says is to be done.
    headwater_storage::files::replace(&*disk, &root.join(JOURNAL_FILE), &was).expect("put back");
    assert!(disk.list(root).expect("listed").iter().any(|entry| entry.name == recover::FORMER_FILE));
    Store::recover_alone(disk.clone(), root, "cluster", MEMBER + 2).expect("recovered");
    // It comes to know more, and is made anew again.
    let now = headwater_storage::files::read(&*disk, &root.join(JOURNAL_FILE), u64::MAX).expect("read");
    let another = root.join(format!("{}.1", recover::FORMER_FILE));
    for _ in 0..2 {
        let kept_in = Store::begin_anew(disk.clone(), root, "cluster", MEMBER + 4).expect("begun anew");
        assert_eq!(kept_in.as_ref(), Some(&another));
        // As where that was interrupted.
        headwater_storage::files::replace(&*disk, &root.join(JOURNAL_FILE), &now).expect("put back");
    }
    let kept = [&former, &another].map(|path| headwater_storage::files::read(&*disk, path, u64::MAX).expect("kept"));
    assert_eq!(kept, [was, now]);
}

#[test]
fn a_command_that_this_build_does_not_know_ends_the_member() {
    let disk = disk(13);
    let (mut machine, told) = RaftMachine::new(store(&disk));
    let unknown = Entry { log_id: log_id(1, 1), payload: EntryPayload::Normal(Command::default()) };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let error = runtime.block_on(openraft::storage::RaftStateMachine::apply(&mut machine, [unknown]));
    assert!(error.expect_err("ends").to_string().contains("has no known kind"));
    assert_eq!(told.borrow().state.index(), 0);
}

/// With this feature openraft lets a follower lose its log.
#[test]
fn openraft_does_not_let_a_log_be_taken_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let features = |manifest: &str, table: &str| {
        let text = std::fs::read_to_string(root.join(manifest)).expect("reads");
        let manifest: toml::Table = text.parse().expect("parses");
        let at = table.split('.').fold(toml::Value::Table(manifest), |at, key| at[key].clone());
        at["openraft"].clone()
    };
    let ours = features("../Cargo.toml", "workspace.dependencies");
    assert_eq!(ours["features"].as_array().expect("named"), &["storage-v2".into()]);
    let broker = features("Cargo.toml", "dependencies");
    assert_eq!(broker.as_table().expect("a table").keys().collect::<Vec<_>>(), ["workspace"]);
}
