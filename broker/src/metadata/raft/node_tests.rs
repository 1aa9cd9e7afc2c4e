//! A quorum of one, run by openraft, on the simulated disk.

use super::super::command::{self, Command, command::Command as Kind};
use super::super::handle::MetadataError;
use super::super::journal::JournalError;
use super::super::journal_file::JOURNAL_FILE;
use super::super::state::MetadataState;
use super::kept::Change;
use super::store::StoreError;
use super::*;
use crate::pool::Pool;
use headwater_proto::TopicId;
use headwater_storage::sim::{Fault, Operation, SimFiles};
use headwater_storage::{DataDir, DataDirError, Files, NewIdentity};
use openraft::ServerState;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

const ROOT: &str = "/data";

fn disk(seed: u64) -> Arc<SimFiles> {
    let disk = SimFiles::new(seed);
    disk.create_dir_all(Path::new(ROOT)).expect("made");
    disk.sync_dir(Path::new("/")).expect("synced");
    disk
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn open(disk: &Arc<SimFiles>) -> Store {
    let opened = Store::open(disk.clone(), Path::new(ROOT), "cluster", false, Founding::Alone, new_node_id());
    opened.expect("opens").store
}

async fn start(disk: &Arc<SimFiles>) -> RaftNode {
    RaftNode::start(open(disk), NoNetwork, soon()).await.expect("leads")
}

fn state(node: &RaftNode) -> Arc<MetadataState> {
    Arc::clone(&node.applied().borrow().state)
}

fn register() -> Command {
    Kind::RegisterBroker(command::RegisterBroker { broker_id: 1, ..Default::default() }).into()
}

fn topic_id(n: u64) -> TopicId {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    TopicId::from_bytes(id)
}

fn create(n: u64) -> Command {
    Kind::CreateTopic(command::CreateTopic {
        name: format!("topic-{n}"),
        topic_id: topic_id(n).to_wire(),
        partitions: vec![command::Replicas { brokers: vec![1] }],
        ..Default::default()
    })
    .into()
}

async fn propose(node: &RaftNode, command: Command) -> Result<(u64, Outcome), MetadataError> {
    node.propose(command, false, soon()).await
}

/// The term in which it leads.
async fn leads_in(node: &RaftNode) -> u64 {
    let mut metrics = node.metrics();
    let leads = tokio::time::timeout_at(soon(), metrics.wait_for(|now| now.state == ServerState::Leader)).await;
    leads.expect("in time").expect("it runs").current_term
}

#[tokio::test]
async fn a_quorum_of_one_leads_at_once_and_goes_on_where_it_was() {
    let disk = disk(1);
    let node = start(&disk).await;
    // A member that holds that it leads leads on; one that stands for election is in another term.
    assert_eq!(leads_in(&node).await, 1, "nobody was elected");
    assert_eq!(propose(&node, register()).await.expect("in force").0, 1, "the index is the version");
    for n in 2..=5 {
        assert_eq!(propose(&node, create(n)).await.expect("in force").0, n);
    }
    let before = state(&node);
    assert_eq!(before.index(), 5);
    node.stop().await;
    // Nothing was said of what is committed when the last one was written, and everything is applied all the same.
    let again = start(&disk.restart()).await;
    assert_eq!(leads_in(&again).await, 1, "nobody was elected");
    assert_eq!(state(&again), before);
    assert_eq!(propose(&again, create(6)).await.expect("in force").0, 6);
    again.stop().await;
}

/// Whoever looked once read the same watch twice, one within the other: with a change that waited in between nobody went on.
#[test]
fn the_leadership_can_be_looked_at_while_it_changes() {
    const CHANGES: u64 = 2000;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let made = runtime.block_on(async {
        let changes = async {
            let node = start(&disk(7)).await;
            propose(&node, register()).await.expect("in force");
            let (seen, done) = (node.clone(), Arc::new(AtomicBool::new(false)));
            let told = Arc::clone(&done);
            let looks = std::thread::spawn(move || {
                while !told.load(Ordering::Relaxed) {
                    assert_eq!(seen.observed(0).leads_in, Some(1));
                }
            });
            for n in 0..CHANGES {
                propose(&node, create(n)).await.expect("in force");
            }
            done.store(true, Ordering::Relaxed);
            looks.join().expect("leads all the time");
            node.stop().await;
        };
        tokio::time::timeout(Duration::from_secs(30), changes).await
    });
    // Threads that wait for each other would be waited for.
    runtime.shutdown_background();
    made.expect("in time");
}

#[tokio::test]
async fn a_power_failure_loses_nothing_that_was_answered() {
    for seed in 0..6 {
        let first = disk(seed);
        let node = start(&first).await;
        propose(&node, register()).await.expect("in force");
        first.power_off_after(7 + 3 * seed);
        let mut answered = 1;
        let failed = loop {
            match propose(&node, create(answered + 1)).await {
                Ok((index, _)) => answered = index,
                Err(error) => break error,
            }
        };
        assert!(matches!(failed, MetadataError::Journal(_)), "{failed}");
        let ended = propose(&node, create(1000)).await.expect_err("it ended");
        assert!(matches!(ended, MetadataError::Journal(JournalError::Poisoned { .. })), "{ended}");
        node.stop().await;
        let again = start(&first.crash()).await;
        assert!((answered..=answered + 1).contains(&state(&again).index()), "{answered}");
        again.stop().await;
    }
}

#[tokio::test]
async fn a_command_of_a_person_is_applied_once_also_by_the_next_start() {
    let disk = disk(2);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    let command = Command { command_id: vec![9; 16].into(), ..create(7) };
    let first = propose(&node, command.clone()).await.expect("in force");
    let again = propose(&node, command.clone()).await.expect("answered");
    assert_eq!((&first.1, first.0 + 1), (&again.1, again.0));
    node.stop().await;
    let node = start(&disk.restart()).await;
    assert_eq!(propose(&node, command).await.expect("answered").1, first.1);
    let refused = propose(&node, create(7)).await.expect_err("another command");
    assert!(matches!(refused, MetadataError::Refused(_)), "{refused}");
    assert_eq!(state(&node).topics().count(), 1);
    node.stop().await;
}

#[tokio::test]
async fn a_proposal_has_a_deadline_and_may_come_into_force_after_it() {
    let disk = disk(3);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let late = node.propose(create(2), false, Instant::now() + Duration::from_millis(50)).await;
    assert!(matches!(late, Err(MetadataError::TimedOut)), "{late:?}");
    drop(held);
    let mut applied = node.applied();
    let came = tokio::time::timeout_at(soon(), applied.wait_for(|applied| applied.state.index() == 2)).await;
    drop(came.expect("in time").expect("it runs"));
    node.stop().await;
}

#[tokio::test]
async fn the_log_is_bounded_by_snapshots() {
    let disk = disk(4);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    propose(&node, create(2)).await.expect("in force");
    let config = std::collections::BTreeMap::from([("key".to_owned(), "x".repeat(20_000))]);
    let path = Path::new(ROOT).join(JOURNAL_FILE);
    // 12 MB in all.
    for _ in 0..600 {
        let alter = command::AlterTopic { topic_id: topic_id(2).to_wire(), config: config.clone() };
        propose(&node, Kind::AlterTopic(alter).into()).await.expect("in force");
        node.snapshot_if_due().await;
    }
    let mut metrics = node.metrics();
    let purged = metrics.wait_for(|now| now.purged.is_some_and(|purged| purged.index > 100));
    drop(tokio::time::timeout_at(soon(), purged).await.expect("in time").expect("it runs"));
    let before = state(&node);
    node.stop().await;
    let bytes = disk.metadata(&path).expect("there").len;
    assert!(bytes < 4 << 20, "{bytes}");
    let again = start(&disk.restart()).await;
    assert_eq!(state(&again), before);
    again.stop().await;
}

#[tokio::test]
async fn topics_can_be_deleted_on_a_full_disk_and_the_member_goes_on() {
    let disk = disk(5);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    disk.set_capacity(Some(disk.used_bytes()));
    let mut topics = 0;
    let full = loop {
        match propose(&node, create(topics)).await {
            Ok(_) => topics += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, MetadataError::Journal(JournalError::Full { .. })), "{full}");
    assert!(topics > 50);
    for n in 0..topics {
        let delete = Kind::DeleteTopic(command::DeleteTopic { topic_id: topic_id(n).to_wire() });
        node.propose(delete.into(), true, soon()).await.expect("urgent");
    }
    node.stop().await;
    // A start on the full disk registers the broker, which is urgent too.
    let disk = disk.restart();
    let node = start(&disk).await;
    assert_eq!(state(&node).topics().count(), 0);
    node.propose(register(), true, soon()).await.expect("urgent");
    disk.set_capacity(None);
    propose(&node, create(0)).await.expect("there is room again");
    node.stop().await;
}

#[tokio::test]
async fn a_log_with_a_command_that_this_build_does_not_know_is_not_led() {
    let disk = disk(6);
    let node = start(&disk).await;
    let refused = propose(&node, Command::default()).await.expect_err("it is not written");
    assert!(matches!(refused, MetadataError::Refused(Refusal::Unknown(_))), "{refused}");
    node.stop().await;
    let refused = start_with_log(&disk.restart(), &[Command::default()]).await.expect_err("it is not led");
    assert!(refused.to_string().contains("has no known kind"), "{refused}");
}

/// A start with these commands at the log's end.
async fn start_with_log(disk: &Arc<SimFiles>, commands: &[Command]) -> Result<RaftNode, MetadataError> {
    let store = open(disk);
    let last = store.kept().last_log_id().expect("it was founded");
    let entry = |(command, index): (&Command, u64)| Entry {
        log_id: LogId::new(last.leader_id, index),
        payload: EntryPayload::Normal(command.clone()),
    };
    store.change(Change::Append(commands.iter().zip(last.index + 1..).map(entry).collect())).expect("kept");
    RaftNode::start(store, NoNetwork, soon()).await
}

/// A member that waits for nobody told seven times a second that nothing had changed.
#[tokio::test(start_paused = true)]
async fn the_only_voter_idles() {
    let disk = disk(11);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    let mut metrics = node.metrics();
    let news = async {
        metrics.mark_unchanged();
        metrics.changed().await
    };
    // The time is the runtime's: it goes on at once where nothing else is to be done.
    tokio::time::sleep(Duration::from_millis(2 * node::ELECTION_TIMEOUT_MS)).await;
    let heard = tokio::time::timeout(Duration::from_secs(3600), news).await;
    assert!(heard.is_err(), "{:?}", node.metrics().borrow());
    assert_eq!(propose(&node, create(2)).await.expect("in force").0, 2, "it leads all the same");
    assert!(node.observed(0).unheard_ms.is_some_and(|ms| ms < node::ELECTION_TIMEOUT_MS));
    node.stop().await;
}

/// Left out without a word, a command that another build took was undone, and its topic's folders set aside.
#[tokio::test]
async fn a_log_with_a_command_that_is_refused_is_not_led_and_the_entry_named() {
    let disk = disk(9);
    let refused = start_with_log(&disk, &[register(), create(2), create(2), create(3)]).await.expect_err("refused");
    let told = refused.to_string();
    assert!(told.contains("entry 3 of the metadata log (CreateTopic) was in force"), "{told}");
    let again = RaftNode::start(open(&disk.restart()), NoNetwork, soon()).await.expect_err("and so is the next");
    assert_eq!(again.to_string(), told);
}

/// Where others vote, two may be under way together. A member that is the only voter again must not end over what is left of
/// that time.
#[tokio::test]
async fn a_command_that_was_not_tried_may_be_refused_in_the_log() {
    let disk = disk(12);
    let untried = Command { untried: true, ..create(2) };
    let node = start_with_log(&disk, &[register(), create(2), untried, create(3)]).await.expect("it is led");
    assert_eq!((state(&node).topics().count(), state(&node).index()), (2, 4));
    node.stop().await;
}

/// It was tried without the one before it, which nobody waited for any more: refused in the log, it would end every later start.
#[tokio::test]
async fn what_a_late_command_rules_out_is_not_written_behind_it() {
    let disk = disk(10);
    let node = start(&disk).await;
    propose(&node, register()).await.expect("in force");
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let late = node.propose(create(2), false, Instant::now() + Duration::from_millis(50)).await;
    assert!(matches!(late, Err(MetadataError::TimedOut)), "{late:?}");
    let (again, ()) = tokio::join!(propose(&node, create(2)), async {
        tokio::task::yield_now().await;
        drop(held);
    });
    let refused = again.expect_err("there is one");
    assert!(matches!(refused, MetadataError::Refused(Refusal::TopicExists(_))), "{refused}");
    node.stop().await;
    let node = start(&disk.restart()).await;
    assert_eq!(state(&node).topics().count(), 1);
    node.stop().await;
}

fn folder(disk: &Arc<SimFiles>) -> Result<DataDir, DataDirError> {
    let identity = NewIdentity { cluster_id: "cluster".into(), broker_id: 1, directory_id: "directory".into() };
    DataDir::open(disk.clone(), Path::new(ROOT), &identity)
}

/// openraft's end does not wait for its snapshots: one that was being written took the place of the next owner's file.
#[tokio::test]
async fn a_member_that_stops_lets_go_of_its_folder_after_its_last_write() {
    let disk = disk(7);
    let (locked, pool) = (Arc::new(folder(&disk).expect("free")), Pool::start(2).expect("threads"));
    let store = open(&disk).of_broker(locked, pool.clone());
    let node = RaftNode::start(store.clone(), NoNetwork, soon()).await.expect("leads");
    propose(&node, register()).await.expect("in force");
    propose(&node, create(2)).await.expect("in force");
    let config = std::collections::BTreeMap::from([("key".to_owned(), "x".repeat(200_000))]);
    while !store.is_snapshot_due() {
        let alter = command::AlterTopic { topic_id: topic_id(2).to_wire(), config: config.clone() };
        propose(&node, Kind::AlterTopic(alter).into()).await.expect("in force");
    }
    let held = disk.hold(Fault::new(Operation::Sync).on(".new"));
    node.snapshot_if_due().await;
    let hangs = async {
        while held.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout_at(soon(), hangs).await.expect("a snapshot is written");
    let mut metrics = node.metrics();
    let stopping = tokio::spawn({
        let node = node.clone();
        async move { node.stop().await }
    });
    let ended = metrics.wait_for(|now| now.running_state.is_err());
    drop(tokio::time::timeout_at(soon(), ended).await.expect("openraft ends"));
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(matches!(folder(&disk), Err(DataDirError::Locked(_))) && !stopping.is_finished());
    drop(held);
    tokio::time::timeout_at(soon(), stopping).await.expect("in time").expect("no panic");
    drop(folder(&disk).expect("free"));
    let before = disk.operations();
    let refused = store.change(Change::Purge(openraft::LogId::default())).expect_err("closed");
    assert!(matches!(refused, StoreError::Journal(JournalError::Closed { .. })), "{refused}");
    let refused = store.make_room(1, true).expect_err("closed");
    assert!(matches!(refused, JournalError::Closed { .. }), "{refused}");
    let mut newer = Applied::clone(&node.applied().borrow());
    newer.last_log_id = newer.last_log_id.map(|last| LogId::new(last.leader_id, last.index + 1));
    let refused = store.write_snapshot(&newer).map(|kept| kept.meta).expect_err("closed");
    assert!(matches!(refused, JournalError::Closed { .. }), "{refused}");
    let refused = propose(&node, create(3)).await.expect_err("closed");
    assert!(matches!(refused, MetadataError::ShuttingDown), "{refused}");
    assert_eq!(disk.operations(), before);
    pool.close();
}

/// Whoever was dropped and not stopped keeps the folder too, for as long as something is being written.
#[tokio::test]
async fn a_store_that_is_dropped_keeps_its_folder_locked_while_it_writes() {
    let disk = disk(8);
    let (locked, pool) = (Arc::new(folder(&disk).expect("free")), Pool::start(2).expect("threads"));
    let store = open(&disk).of_broker(locked, pool.clone());
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let vote = openraft::Vote::new(9, store.node_id());
    let writing = tokio::spawn(async move { store.blocking(move |store| store.change(Change::Vote(vote))).await });
    let until = async |what: &dyn Fn() -> bool| {
        let waited = async {
            while !what() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout_at(soon(), waited).await.expect("in time");
    };
    until(&|| held.waiting() > 0).await;
    writing.abort();
    drop(writing.await);
    assert!(matches!(folder(&disk), Err(DataDirError::Locked(_))));
    drop(held);
    until(&|| folder(&disk).is_ok()).await;
    pool.close();
}

/// Its own task held the member, and so openraft's tasks and the folder, for as long as the process lived.
#[tokio::test]
async fn a_member_that_is_dropped_ends_and_lets_go_of_its_folder() {
    let disk = disk(13);
    let (locked, pool) = (Arc::new(folder(&disk).expect("free")), Pool::start(2).expect("threads"));
    let node = RaftNode::start(open(&disk).of_broker(locked, pool.clone()), NoNetwork, soon()).await.expect("leads");
    propose(&node, register()).await.expect("in force");
    let (mut metrics, other) = (node.metrics(), node.clone());
    drop(node);
    propose(&other, create(2)).await.expect("somebody has it still");
    drop(other);
    let ended = async { while metrics.changed().await.is_ok() {} };
    tokio::time::timeout_at(soon(), ended).await.expect("openraft ends");
    let free = async {
        while folder(&disk).is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout_at(soon(), free).await.expect("the folder is free");
    pool.close();
}

/// Why the member ended was asked of the journal, for as long as the disk did not answer.
#[tokio::test]
async fn a_start_that_fails_waits_for_a_disk_that_hangs_no_longer_than_its_deadline() {
    let disk = disk(14);
    let (locked, pool) = (Arc::new(folder(&disk).expect("free")), Pool::start(2).expect("threads"));
    let store = open(&disk).of_broker(locked, pool.clone());
    // It stands for election: its vote is what the disk refuses.
    store.change(Change::Vote(openraft::Vote::new(9, store.node_id()))).expect("kept");
    disk.fail(Fault::new(Operation::Sync).on(JOURNAL_FILE).lasting());
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let hang = Arc::new(std::sync::Barrier::new(3));
    let starting = tokio::spawn(RaftNode::start(store, NoNetwork, Instant::now() + Duration::from_secs(1)));
    let busy = async {
        while held.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout_at(soon(), busy).await.expect("it stands for election");
    for _ in 0..2 {
        let hang = Arc::clone(&hang);
        pool.spawn(move || {
            hang.wait();
        });
    }
    drop(held);
    let started = tokio::time::timeout(Duration::from_secs(10), starting).await;
    hang.wait();
    let refused = started.expect("in time").expect("no panic").expect_err("it is not led");
    assert!(matches!(refused, MetadataError::Stopped(_)), "{refused}");
    pool.close();
}
