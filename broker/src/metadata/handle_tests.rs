use super::super::command::{self, CreateTopic, Replicas};
use super::super::journal::JOURNAL_FILE;
use super::super::raft::{Founding, NoNetwork, Store};
use super::*;
use headwater_storage::Files;
use headwater_storage::sim::{Fault, Held, Operation, SimFiles};
use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Mutex;
use tokio::time::timeout;
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);

struct Running {
    disk: Arc<SimFiles>,
    node: RaftNode,
    handle: MetadataHandle,
    /// The versions that were carried out.
    carried: Arc<Mutex<Vec<u64>>>,
    stop: CancellationToken,
}

/// A broker that has registered, and whose office is still to be taken.
async fn running() -> Running {
    running_with(|_| Box::pin(std::future::ready(()))).await
}

/// As [`running`], with partitions that carry states out in their own time.
async fn running_with(mut then: impl FnMut(RaftNode) -> BoxFuture<'static, ()> + Send + 'static) -> Running {
    let disk = SimFiles::new(1);
    disk.create_dir_all(Path::new("/data")).expect("made");
    let store =
        Store::open(disk.clone(), Path::new("/data"), "cluster", false, Founding::Alone, 7).expect("opens").store;
    let node = RaftNode::start(store, NoNetwork, Instant::now() + PATIENCE).await.expect("leads");
    let incarnation = Uuid::from_u128(1).as_bytes().to_vec().into();
    let registration = RegisterBroker { broker_id: 1, incarnation, ..RegisterBroker::default() };
    let state = Arc::clone(&node.applied().borrow().state);
    let register = alone::registration_command(&state, &registration);
    node.propose(register, true, Instant::now() + PATIENCE).await.expect("in force");
    let state = Arc::clone(&node.applied().borrow().state);
    let (carried, stop) = (Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
    let (seen, member) = (Arc::clone(&carried), node.clone());
    let carry_out: CarryOut = Box::new(move |state| {
        seen.lock().expect("whole").push(state.index());
        then(member.clone())
    });
    let office = (Office::new(600), registration);
    let (handle, task) = MetadataHandle::new(node.clone(), state, office, carry_out, stop.clone());
    tokio::spawn(task);
    Running { disk, node, handle, carried, stop }
}

/// Waits for the office, and lets the broker serve.
async fn serve(handle: &MetadataHandle) {
    let mut in_office = handle.controller_epoch();
    let epoch =
        timeout(PATIENCE, in_office.wait_for(Option::is_some)).await.expect("in time").expect("runs").expect("it");
    let incarnation = Uuid::from_u128(1).as_bytes().to_vec().into();
    let unfence = Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 1, incarnation });
    let unfence = Command { controller_epoch: epoch, ..unfence.into() };
    handle.propose(unfence).await.expect("in force");
}

fn create(n: u8) -> Command {
    Kind::CreateTopic(CreateTopic {
        name: format!("topic-{n}"),
        topic_id: TopicId::from_bytes([n; 16]).to_wire(),
        partitions: vec![Replicas { brokers: vec![1] }],
        ..CreateTopic::default()
    })
    .into()
}

#[tokio::test]
async fn the_office_is_taken_by_a_command_whose_index_is_the_epoch() {
    let Running { node, handle, carried, stop, .. } = running().await;
    let mut in_office = handle.controller_epoch();
    let epoch =
        timeout(PATIENCE, in_office.wait_for(Option::is_some)).await.expect("in time").expect("runs").expect("it");
    assert_eq!(
        (handle.state().controller(), handle.state().controller_epoch()),
        (Some((1, Uuid::from_u128(1))), epoch)
    );
    assert_eq!((epoch, carried.lock().expect("whole").as_slice()), (2, &[2][..]));
    // A controller's command says it.
    let unfence = command::UnfenceBroker { broker_id: 1, incarnation: Uuid::from_u128(1).as_bytes().to_vec().into() };
    for (given, accepted) in [(epoch, true), (epoch + 1, false)] {
        let command = Command { controller_epoch: given, ..Kind::UnfenceBroker(unfence.clone()).into() };
        assert_eq!(handle.propose(command).await.is_ok(), accepted);
    }
    stop.cancel();
    node.stop().await;
}

/// So does what was proposed here and answered too late.
#[tokio::test]
async fn what_nobody_waits_for_is_carried_out_and_published_all_the_same() {
    let Running { node, handle, carried, stop, .. } = running().await;
    serve(&handle).await;
    let (index, _) = node.propose(create(1), false, Instant::now() + PATIENCE).await.expect("in force");
    let mut changes = handle.changes();
    drop(timeout(PATIENCE, changes.wait_for(|now| *now >= index)).await.expect("in time").expect("runs"));
    assert!(handle.state().topic("topic-1").is_some());
    assert_eq!(carried.lock().expect("whole").last(), Some(&index));
    let refused = handle.propose(create(1)).await.expect_err("it is there");
    assert!(matches!(refused, MetadataError::Refused(Refusal::TopicExists(_))), "{refused}");
    stop.cancel();
    node.stop().await;
}

#[tokio::test]
async fn what_is_refused_here_does_not_reach_the_log() {
    let Running { node, handle, stop, .. } = running().await;
    serve(&handle).await;
    handle.propose(create(1)).await.expect("in force");
    let before = node.applied().borrow().last_log_id;
    handle.propose(create(1)).await.expect_err("it is there");
    assert_eq!(node.applied().borrow().last_log_id, before);
    stop.cancel();
    node.stop().await;
    let ended = handle.propose(create(2)).await.expect_err("it ended");
    assert!(matches!(ended, MetadataError::ShuttingDown), "{ended}");
    assert!(handle.ended().is_none(), "that is no failure");
}

/// Whether the log's writer meets the failure, or whoever asks for room before: openraft hears nothing of that.
#[tokio::test]
async fn after_a_failure_of_the_journal_everybody_is_told_of_it_and_not_of_a_shutdown() {
    for large in [false, true] {
        let Running { disk, node, handle, stop, .. } = running().await;
        serve(&handle).await;
        let before = handle.state();
        disk.fail(Fault::new(Operation::Sync).on(JOURNAL_FILE));
        let Command { command: Some(Kind::CreateTopic(mut first)), .. } = create(1) else { panic!("a topic") };
        if large {
            first.config.insert("key".to_owned(), "x".repeat(1 << 20));
        }
        let failed = handle.propose(Kind::CreateTopic(first)).await.expect_err("not kept");
        assert!(matches!(failed, MetadataError::Journal(_)), "{failed}");
        disk.heal();
        for n in 2..5 {
            let refused = handle.propose(create(n)).await.expect_err("the journal takes nothing");
            assert!(matches!(refused, MetadataError::Ended(_)), "{refused}");
            assert!(refused.to_string().contains(JOURNAL_FILE), "{refused}");
            assert_eq!((refused.code(), refused.code().retryable()), (ErrorCode::Internal, false));
        }
        assert!(handle.ended().is_some());
        assert!(matches!(handle.validate(|_| Ok(create(6))), Err(MetadataError::Ended(_))));
        assert_eq!((handle.controller_epoch().borrow().as_ref(), &handle.state()), (None, &before));
        stop.cancel();
        node.stop().await;
        let refused = handle.propose(create(7)).await.expect_err("it ended");
        assert!(matches!(refused, MetadataError::ShuttingDown), "{refused}");
    }
}

/// The next start may find it: whoever hears that it was refused might try it again.
#[tokio::test]
async fn what_is_under_way_when_the_member_ends_is_in_force_or_unknown() {
    for _ in 0..10 {
        let Running { disk, node, handle, stop, .. } = running().await;
        serve(&handle).await;
        let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
        let mut proposed = pin!(handle.propose(create(1)));
        let under_way = async {
            while held.waiting() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            answer = proposed.as_mut() => panic!("the disk hangs: {answer:?}"),
            () = under_way => {}
        }
        let stopping = tokio::spawn(async move { node.stop().await });
        tokio::task::yield_now().await;
        drop(held);
        match timeout(PATIENCE, proposed).await.expect("in time") {
            Ok(_) | Err(MetadataError::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
        stop.cancel();
        stopping.await.expect("ends");
    }
}

fn alter(config: BTreeMap<String, String>) -> Command {
    Kind::AlterTopic(command::AlterTopic { topic_id: TopicId::from_bytes([1; 16]).to_wire(), config }).into()
}

/// Sets one setting, and leaves the others.
fn set(key: &'static str) -> impl FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send + 'static {
    move |state| {
        let mut config = topic_to_change(state, "topic-1")?.config.clone();
        config.insert(key.to_owned(), "1".to_owned());
        Ok(alter(config))
    }
}

fn after(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

/// The second command once undid what the first one did: it was decided without it, and both came into force.
#[tokio::test]
async fn nothing_is_decided_before_the_fate_of_a_late_command_is_known() {
    let Running { disk, node, handle, stop, .. } = running().await;
    serve(&handle).await;
    handle.propose(create(1)).await.expect("in force");
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let late = handle.propose_by(after(50), set("first")).await.expect_err("the disk hangs");
    assert!(matches!(late, MetadataError::TimedOut), "{late}");
    assert!(handle.waits() >= Duration::from_millis(50), "nobody else waits for it; it is under way all the same");
    for _ in 0..20 {
        let began = Instant::now();
        let refused = handle.propose_with(set("second")).await.expect_err("the disk hangs");
        assert!(matches!(refused, MetadataError::Behind), "{refused}");
        assert_eq!(refused.code(), ErrorCode::TimedOut);
        assert!(began.elapsed() < PROPOSAL_TIMEOUT / 2, "at once");
    }
    assert_eq!(held.waiting(), 1);
    drop(held);
    let both = async {
        while let Err(error) = handle.propose_with(set("second")).await {
            assert!(matches!(error, MetadataError::Behind), "{error}");
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, both).await.expect("in time");
    assert_eq!(handle.waits(), Duration::ZERO);
    let state = handle.state();
    let keys: Vec<_> = state.topic("topic-1").expect("there").config.keys().collect();
    assert_eq!(keys, ["first", "second"]);
    stop.cancel();
    node.stop().await;
}

/// It once began when those before were answered.
#[tokio::test]
async fn a_proposal_has_its_deadline_from_when_it_is_made() {
    let Running { disk, node, handle, stop, .. } = running().await;
    serve(&handle).await;
    handle.propose(create(1)).await.expect("in force");
    let held = disk.hold(Fault::new(Operation::Sync).on(JOURNAL_FILE));
    let mut first = pin!(handle.propose_by(Instant::now() + PATIENCE, set("first")));
    assert!(timeout(Duration::from_millis(50), first.as_mut()).await.is_err(), "the disk hangs");
    let began = Instant::now();
    let decided = Arc::new(Mutex::new(false));
    let told = Arc::clone(&decided);
    let late = handle.propose_by(after(50), move |state| {
        *told.lock().expect("whole") = true;
        set("second")(state)
    });
    let late = late.await.expect_err("another one is under way");
    assert_eq!(late.code(), ErrorCode::TimedOut);
    assert!(began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
    drop(held);
    first.await.expect("in force");
    handle.propose_with(set("third")).await.expect("in force");
    assert!(!*decided.lock().expect("whole"), "nobody waits for it");
    stop.cancel();
    node.stop().await;
}

/// Whether a snapshot is due is known when the journal is free.
#[tokio::test]
async fn a_disk_that_hangs_in_a_snapshot_holds_up_no_answer_to_what_is_in_force() {
    let held: Arc<Mutex<Option<Held>>> = Arc::default();
    let hangs = Arc::clone(&held);
    let Running { disk, node, handle, stop, .. } = running_with(move |node| {
        let hangs = Arc::clone(&hangs);
        Box::pin(async move {
            let waiting = || hangs.lock().expect("whole").as_ref().map(Held::waiting);
            if waiting() == Some(0) {
                node.snapshot_if_due().await;
                while waiting() == Some(0) {
                    tokio::task::yield_now().await;
                }
            }
        })
    })
    .await;
    serve(&handle).await;
    handle.propose(create(1)).await.expect("in force");
    for n in 0..60 {
        let config = BTreeMap::from([("key".to_owned(), format!("{n}{}", "x".repeat(20_000)))]);
        node.propose(alter(config), false, Instant::now() + PATIENCE).await.expect("in force");
    }
    let mut changes = handle.changes();
    let newest = node.applied().borrow().state.index();
    drop(timeout(PATIENCE, changes.wait_for(|now| *now >= newest)).await.expect("in time").expect("runs"));
    *held.lock().expect("whole") = Some(disk.hold(Fault::new(Operation::Rename)));
    let answer = timeout(PATIENCE, handle.propose_with(set("in.force"))).await.expect("in time");
    answer.expect("the journal was free still");
    let late = handle.propose_by(after(50), set("late")).await.expect_err("the disk hangs");
    assert!(matches!(late, MetadataError::TimedOut), "{late}");
    *held.lock().expect("whole") = None;
    let again = async { while handle.propose_with(set("again")).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("in time");
    stop.cancel();
    node.stop().await;
}
