use super::*;
use crate::assignments::{Assigned, AssignedTopic, Assignments};
use crate::cleaner::Cleaner;
use crate::metadata::command::command::Command as Kind;
use crate::metadata::command::{
    self as wire, AlterPartition, AlterPartitions, CreateTopic, FenceBroker, RegisterBroker, Replicas, UnfenceBroker,
};
use crate::metadata::handle::common::Common;
use crate::replica::Member;
use crate::replica::leader::{self, View};
use crate::topic_config::{TopicConfig, TopicDurability};
use bytes::Bytes;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_proto::wire::Acks;
use headwater_storage::sim::{Fault, Held, Operation};
use headwater_storage::{Files, NewBatch, NewIdentity, SimFiles, files};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

const DEADLINE: Duration = Duration::from_secs(60);

fn open_on(files: &Arc<SimFiles>) -> Partitions {
    open_with(files, &BrokerConfig::default())
}

fn open_with(files: &Arc<SimFiles>, config: &BrokerConfig) -> Partitions {
    let files: Arc<dyn Files> = files.clone();
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 1, directory_id: "d".into() };
    let data_dir = Arc::new(DataDir::open(files, Path::new("/data"), &us).unwrap());
    Partitions::new(data_dir, Pool::start(4).unwrap(), 4, Arc::new(Metrics::new()), config)
}

fn assigned(partition: u32) -> AssignedPartition {
    assigned_with(partition, TopicConfig::default())
}

fn assigned_with(partition: u32, config: TopicConfig) -> AssignedPartition {
    let (topic_id, config) = (TopicId::from_bytes([1; 16]), Arc::new(config));
    AssignedPartition::alone("t".into(), topic_id, partition, 1, config)
}

/// What a state gives to this broker.
fn of(partitions: Vec<AssignedPartition>) -> Assigned {
    let mut topics: BTreeMap<Arc<str>, Vec<AssignedPartition>> = BTreeMap::new();
    for partition in partitions {
        topics.entry(Arc::clone(&partition.topic)).or_default().push(partition);
    }
    let topic = |(name, partitions): (Arc<str>, Vec<AssignedPartition>)| {
        let id = partitions[0].topic_id;
        (Arc::clone(&name), Arc::new(AssignedTopic { name, id, partitions }))
    };
    topics.into_iter().map(topic).collect()
}

fn batch(bytes: usize) -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    builder.append(0, Some(b"key"), Some(&vec![b'x'; bytes]), &[]);
    let bytes: Bytes = builder.build().unwrap();
    NewBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes }
}

fn handle(partitions: &Partitions, partition: u32) -> PartitionHandle {
    partitions.get(&assigned(0).topic_id, partition).unwrap()
}

async fn append(partitions: &Partitions, partition: u32, bytes: usize) {
    handle(partitions, partition).append(vec![batch(bytes)], Acks::All).await.unwrap();
}

/// Waits, in real time: the clock of these tests runs on whenever nothing else does.
async fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !probe() {
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until everything is done that was begun, however long a disk takes.
async fn until_done(partitions: &Partitions, begun: Vec<Folder>) {
    until("what was begun", || begun.iter().all(|folder| !partitions.kept().is_busy_with(folder))).await;
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Logged {
    fn begin(&self) -> tracing::subscriber::DefaultGuard {
        let to = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn line(&self, part: &str) -> Option<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().find(|line| line.contains(part)).map(str::to_owned)
    }
}

/// Progress was told only when a partition had been opened: nothing was heard of a large one for as long as it took.
#[tokio::test(start_paused = true)]
async fn a_recovery_tells_how_far_it_is_within_a_partition() {
    const BATCHES: u64 = 12;
    const BATCH_BYTES: usize = 1 << 19;
    let files = SimFiles::new(1);
    let partitions = open_on(&files);
    partitions.apply(&of(vec![assigned(0)])).await;
    for _ in 0..BATCHES {
        append(&partitions, 0, BATCH_BYTES).await;
    }
    assert_eq!(partitions.recovery().to_scan_bytes(), 0);

    // As after `kill -9`; a read in the middle of the log takes its time.
    let files = files.restart();
    let held = files.hold(Fault::new(Operation::Read).on("t-0/00000000000000000000.log").after(BATCHES / 3));
    let partitions = Arc::new(open_on(&files));
    let logged = Logged::default();
    let _logging = logged.begin();
    let opening = tokio::spawn({
        let partitions = Arc::clone(&partitions);
        async move { partitions.apply(&of(vec![assigned(0)])).await }
    });
    until("a read that waits", || held.waiting() == 1).await;
    let (scanned, to_scan) = (partitions.recovery().scanned_bytes(), partitions.recovery().to_scan_bytes());
    assert!(
        scanned > 1 << 20 && scanned < to_scan && to_scan >= BATCHES * BATCH_BYTES as u64,
        "{scanned} of {to_scan}"
    );
    let told = format!("scanned_bytes={scanned} to_scan_bytes={to_scan}");
    until("a line each interval", || logged.line(&told).is_some()).await;
    assert!(logged.line(&told).unwrap().contains("done=0 total=1"));
    drop(held);
    opening.await.unwrap();
    assert_eq!(partitions.recovery().scanned_bytes(), to_scan);
    assert!(partitions.close().await);
}

/// With thousands of partitions in a topic, each command that concerned one of them woke all.
#[tokio::test]
async fn a_partition_is_told_only_what_is_new_of_it() {
    let files = SimFiles::new(1);
    let partitions = open_on(&files);
    partitions.apply(&of(vec![assigned(0)])).await;
    let as_of = |index, partition_epoch| {
        let view = View { index, partition_epoch, ..View::clone(&assigned(0).view) };
        AssignedPartition { view: Arc::new(view), ..assigned(0) }
    };
    partitions.apply(&of(vec![as_of(7, 0)])).await;
    assert_eq!(handle(&partitions, 0).view().index, 0, "it knows that already");
    partitions.apply(&of(vec![as_of(8, 1)])).await;
    assert_eq!(handle(&partitions, 0).view().index, 8);
}

/// Each state had all partitions looked at, and a broker that came or went made what is known of all of them anew.
#[test]
fn only_what_a_state_says_anew_is_looked_at() {
    const PARTITIONS: u32 = 1_000;
    let incarnation = |broker: i32| Bytes::from(vec![u8::try_from(broker).unwrap(); 16]);
    let common = Common::new("c");
    let fence = |broker_id| {
        let fence = FenceBroker { broker_id, incarnation: incarnation(broker_id) };
        common.control(Kind::FenceBroker(fence)).unwrap();
    };
    for broker_id in 1..=4 {
        let register =
            RegisterBroker { broker_id, incarnation: incarnation(broker_id), boots: 1, ..Default::default() };
        common.apply(Kind::RegisterBroker(register)).unwrap();
        let unfence = UnfenceBroker { broker_id, incarnation: incarnation(broker_id) };
        common.control(Kind::UnfenceBroker(unfence)).unwrap();
    }
    let create = |id: u8, brokers: Vec<i32>, partitions: u32| {
        let create = CreateTopic {
            name: format!("t{id}"),
            topic_id: TopicId::from_bytes([id; 16]).to_wire(),
            partitions: vec![Replicas { brokers }; partitions as usize],
            ..Default::default()
        };
        common.apply(Kind::CreateTopic(create)).unwrap();
    };
    create(1, vec![1, 2], PARTITIONS);
    create(2, vec![1, 3], 10);
    create(3, vec![2, 3], 10);
    let me = crate::assignments::member(1, &incarnation(1));
    let mut assignments = Assignments::new(&BrokerConfig::default(), me);
    let mut kept = Kept::default();
    let mut looked_at = || kept.direct(&assignments.of(&common.state())).1;
    assert_eq!(looked_at(), PARTITIONS as usize + 10);
    assert_eq!(looked_at(), 0);
    let leader = wire::Member { broker_id: 1, incarnation: incarnation(1) };
    let topic_id = TopicId::from_bytes([1; 16]).to_wire();
    let isr = vec![leader.clone()];
    let alter = AlterPartition { topic_id, partition: 7, leader: Some(leader), isr, ..Default::default() };
    common.apply(Kind::AlterPartitions(AlterPartitions { partitions: vec![alter] })).unwrap();
    assert_eq!(looked_at(), 1, "one of a thousand changed");
    create(4, vec![2, 3], 10);
    assert_eq!(looked_at(), 0, "nothing of it is kept here");
    fence(4);
    assert_eq!(looked_at(), 0, "it keeps nothing");
    fence(3);
    assert_eq!(looked_at(), 10, "those that it keeps too");
}

/// A follower that forgot it would follow a leader below what was acknowledged, because of an election long ago.
#[tokio::test]
async fn the_unclean_elections_that_a_replica_has_taken_in_are_known_to_the_next_start() {
    let files = SimFiles::new(1);
    let partitions = open_on(&files);
    let elected = AssignedPartition { unclean_recoveries: 2, ..assigned(0) };
    partitions.apply(&of(vec![elected.clone()])).await;
    partitions.checkpoint().await.unwrap();
    drop(partitions);

    let partitions = open_on(&files.restart());
    let view = View { leader: None, ..View::clone(&elected.view) };
    partitions.apply(&of(vec![AssignedPartition { view: Arc::new(view), unclean_recoveries: 3, ..elected }])).await;
    let replica = partitions.replica(&assigned(0).topic_id, 0).unwrap();
    assert_eq!(replica.unclean_taken(), 2, "not the newest one, that it has not seen");
}

/// They went after a day, though they may have been all that was left of topics which the metadata had forgotten.
#[tokio::test(start_paused = true)]
async fn what_was_set_aside_is_kept_where_the_metadata_may_have_forgotten_its_topic() {
    let files = SimFiles::new(1);
    let partitions = Arc::new(open_on(&files));
    let data_dir = partitions.data_dir().unwrap();
    data_dir.files().create_dir_all(Path::new("/data/forgotten-0")).unwrap();
    data_dir.set_aside("forgotten", 0, now_ms()).unwrap();
    let (asked, is_kept) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
    let ask = {
        let (asked, is_kept) = (Arc::clone(&asked), Arc::clone(&is_kept));
        move || {
            asked.fetch_add(1, Ordering::AcqRel);
            is_kept.load(Ordering::Acquire)
        }
    };
    let stop = CancellationToken::new();
    let deleting = tokio::spawn({
        let (partitions, stop) = (Arc::clone(&partitions), stop.clone());
        async move { partitions.delete_strays(Duration::ZERO, ask, stop).await }
    });
    until("some rounds", || asked.load(Ordering::Acquire) > 3).await;
    assert_eq!(data_dir.strays().unwrap().len(), 1);
    is_kept.store(false, Ordering::Release);
    until("it is deleted", || data_dir.strays().unwrap().is_empty()).await;
    stop.cancel();
    deleting.await.unwrap();
}

/// What was acknowledged in the memory of replicas is gone with the memory, and nothing in the log shows it.
#[tokio::test]
async fn a_replica_that_flushes_late_is_behind_after_another_start_of_the_machine() {
    let replicated = |brokers: &[i32], durability| {
        let it = assigned_with(0, TopicConfig { durability, ..TopicConfig::default() });
        let of = |broker: &i32| leader::Assigned {
            member: Member { broker: *broker, incarnation: it.me.incarnation },
            active: true,
            in_sync: true,
        };
        let view = View { replicas: brokers.iter().map(of).collect(), ..View::clone(&it.view) };
        AssignedPartition { view: Arc::new(view), ..it }
    };
    let lost = async |files: &Arc<SimFiles>, assigned: &AssignedPartition, same_kernel| {
        let partitions = open_on(files);
        let lost = partitions.examine(vec![assigned.clone()], same_kernel, &HashSet::new()).await;
        lost.into_iter().map(|lost| lost.why).collect::<Vec<_>>()
    };
    let files = SimFiles::new(1);
    let partitions = open_on(&files);
    partitions.apply(&of(vec![assigned(0)])).await;
    append(&partitions, 0, 10).await;
    partitions.checkpoint().await.unwrap();
    drop(partitions);
    let files = files.restart();
    let late = replicated(&[0, 2], TopicDurability::Replicated);
    let [why] = &lost(&files, &late, false).await[..] else { panic!("it is named") };
    assert!(why.contains("went down without a flush"), "{why}");
    assert_eq!(lost(&files, &late, true).await, [""; 0], "the machine ran on: what was written is there");
    let flushed = replicated(&[0, 2], TopicDurability::Flushed);
    assert_eq!(lost(&files, &flushed, false).await, [""; 0], "what was acknowledged is on the disk");
    assert_eq!(lost(&files, &replicated(&[0], TopicDurability::Replicated), false).await, [""; 0], "nobody has more");

    let partitions = open_on(&files);
    partitions.apply(&of(vec![assigned(0)])).await;
    assert!(partitions.close().await && partitions.close_data_dir(true).await);
    assert_eq!(lost(&files, &late, false).await, [""; 0], "it was stopped in good order");
}

/// A state in which another broker leads partition 0, in this epoch.
fn led_elsewhere(leader_epoch: i32) -> Assigned {
    let it = assigned(0);
    let replica = |broker, in_sync| leader::Assigned {
        member: Member { broker, incarnation: it.me.incarnation },
        active: true,
        in_sync,
    };
    let replicas = vec![replica(0, false), replica(2, true)];
    let view = View { leader: Some(replicas[1].member), leader_epoch, replicas, ..View::clone(&it.view) };
    of(vec![AssignedPartition { view: Arc::new(view), ..it }])
}

/// Partition 0 with a record, led elsewhere: its replica is damaged.
async fn damaged(files: &Arc<SimFiles>, is_noted: bool) -> Arc<Partitions> {
    let partitions = Arc::new(open_on(files));
    partitions.apply(&of(vec![assigned(0)])).await;
    append(&partitions, 0, 100).await;
    if is_noted {
        partitions.checkpoint().await.unwrap();
    }
    let damaged = handle(&partitions, 0);
    damaged.fence(&"a byte is not what it was");
    until("it is fenced", || damaged.ended().is_some()).await;
    partitions.apply(&led_elsewhere(2)).await;
    partitions.count_as_lost(&damaged);
    partitions
}

/// On an idle partition it came to be where the damaged one had been, and nothing was written down of it: a disk that lost what it had flushed
/// was believed.
#[tokio::test(start_paused = true)]
async fn what_a_replica_holds_that_was_made_anew_is_written_down_where_it_is_what_the_one_before_held() {
    let files = SimFiles::new(1);
    let partitions = damaged(&files, true).await;
    let before = partitions.replica(&assigned(0).topic_id, 0).unwrap().offsets();
    partitions.retry();
    partitions.finish().await;
    assert_eq!(partitions.replica(&assigned(0).topic_id, 0).unwrap().offsets().log_end, 0, "it is a new log");
    partitions.apply(&topic_of(1, 0..1, 3)).await;
    append(&partitions, 0, 100).await;
    assert_eq!(handle(&partitions, 0).offsets(), before);
    partitions.checkpoint().await.unwrap();
    let data_dir = partitions.data_dir().unwrap();
    assert_eq!(data_dir.replica("t", 0).map(|known| known.flushed), Some(1));
    assert_eq!((data_dir.hints("t", 0).recovery_point, data_dir.high_watermark("t", 0)), (1, 1));
}

/// Its recovery point was that of the damaged log, which it had not yet: at the next start it was damaged itself.
#[tokio::test(start_paused = true)]
async fn nothing_is_written_down_of_a_damaged_log_while_it_is_made_anew() {
    let files = SimFiles::new(1);
    let partitions = damaged(&files, false).await;
    let keeping = keep_up(&partitions);
    let held = files.hold(Fault::new(Operation::Sync).on("t-0/"));
    partitions.retry();
    until("a log that is being created", || held.waiting() >= 1).await;
    partitions.checkpoint().await.unwrap();
    let data_dir = partitions.data_dir().unwrap();
    assert_eq!((data_dir.hints("t", 0).recovery_point, data_dir.replica("t", 0)), (0, None));
    drop(held);
    let is_new = || partitions.replica(&assigned(0).topic_id, 0).is_some_and(|it| it.ended().is_none());
    until("it is made anew", is_new).await;
    partitions.checkpoint().await.unwrap();
    assert_eq!(data_dir.replica("t", 0).map(|known| known.flushed), Some(0));
    keeping.abort();
    drop(keeping.await);
}

const QUEUE_BYTES: u32 = 1 << 20;

/// Partitions `0..4`, of which number 0 hangs in a sync while it holds its log, and what was appended to it.
async fn with_one_that_hangs(files: &Arc<SimFiles>, config: TopicConfig) -> (Arc<Partitions>, Held) {
    let partitions =
        Arc::new(open_with(files, &BrokerConfig { append_queue_bytes: QUEUE_BYTES, ..BrokerConfig::default() }));
    partitions.apply(&of((0..4).map(|partition| assigned_with(partition, config.clone())).collect())).await;
    let held = files.hold(Fault::new(Operation::Sync).on("t-0/"));
    tokio::spawn({
        let partitions = Arc::clone(&partitions);
        async move { append(&partitions, 0, 100).await }
    });
    until("a sync that waits", || held.waiting() == 1).await;
    (partitions, held)
}

/// A state as `partitions` assigned at `leader_epoch`, of the topic with this id.
fn topic_of(id: u8, partitions: impl Iterator<Item = u32>, leader_epoch: i32) -> Assigned {
    let config: Arc<TopicConfig> = Arc::default();
    let one = |partition| {
        AssignedPartition::alone(
            "t".into(),
            TopicId::from_bytes([id; 16]),
            partition,
            leader_epoch,
            Arc::clone(&config),
        )
    };
    of(partitions.map(one).collect())
}

fn keep_up(partitions: &Arc<Partitions>) -> tokio::task::JoinHandle<()> {
    let partitions = Arc::clone(partitions);
    tokio::spawn(async move { partitions.keep_up().await })
}

/// One loop carried out one state after the other, and waited for what it deleted: a broker with one bad disk was elected for other
/// partitions and never led them.
#[tokio::test(start_paused = true)]
async fn a_log_that_hangs_while_it_is_deleted_keeps_no_other_from_its_role_and_no_new_one_from_being_opened() {
    let files = SimFiles::new(5);
    let (partitions, held) = with_one_that_hangs(&files, TopicConfig::default()).await;
    let hung = handle(&partitions, 0);
    let keeping = keep_up(&partitions);
    let gone = partitions.direct(&topic_of(1, 1..4, 1));
    assert!(partitions.replica(&assigned(0).topic_id, 0).is_none(), "it is let go of at once");
    until("whoever has it is told", || matches!(hung.ended(), Some(PartitionError::Deleted))).await;
    // Whoever would like to say that a topic is gone does not wait for the disk.
    partitions.settled(gone.clone()).await;
    assert_eq!(held.waiting(), 1);
    // Another is elected, one is new, one goes.
    let elected = partitions.direct(&topic_of(1, 2..6, 2));
    assert_eq!((handle(&partitions, 3).leader_epoch(), handle(&partitions, 3).is_leader()), (2, true));
    until_done(&partitions, elected).await;
    append(&partitions, 3, 100).await;
    append(&partitions, 5, 100).await;
    let folder = |partition: u32| files::exists(&*files, &Path::new("/data").join(format!("t-{partition}"))).unwrap();
    assert_eq!((folder(0), folder(1)), (true, false), "the folder stays as long as a job may write into it");
    // And it comes back before it has gone.
    let back = partitions.direct(&topic_of(1, (0..1).chain(2..6), 3));
    assert!(partitions.replica(&assigned(0).topic_id, 0).is_none());
    assert_eq!(held.waiting(), 1);
    drop((held, hung));
    until_done(&partitions, back).await;
    assert_eq!(handle(&partitions, 0).offsets().log_end, 0, "it is a new log");
    append(&partitions, 0, 100).await;
    until_done(&partitions, gone).await;
    keeping.abort();
    drop(keeping.await);
    assert!(partitions.close().await);
}

/// A topic that is created again has the folders of the old one, of which one is not free yet.
#[tokio::test(start_paused = true)]
async fn a_topic_that_is_created_again_waits_for_the_folder_that_hangs_and_for_no_other() {
    let files = SimFiles::new(6);
    let (partitions, held) = with_one_that_hangs(&files, TopicConfig::default()).await;
    let keeping = keep_up(&partitions);
    partitions.direct(&Assigned::new());
    let again = partitions.direct(&topic_of(2, 0..4, 1));
    let new = TopicId::from_bytes([2; 16]);
    until("the others", || (1..4).all(|partition| partitions.get(&new, partition).is_some())).await;
    assert!(partitions.get(&new, 0).is_none());
    drop(held);
    until_done(&partitions, again).await;
    let opened = partitions.get(&new, 0).unwrap();
    assert_eq!(opened.offsets().log_end, 0);
    opened.append(vec![batch(100)], Acks::All).await.unwrap();
    keeping.abort();
    drop(keeping.await);
    assert!(partitions.close().await);
}

#[tokio::test(start_paused = true)]
async fn a_topic_of_many_partitions_is_deleted_while_an_election_is_due() {
    const PARTITIONS: u32 = 100;
    let files = SimFiles::new(8);
    let partitions = Arc::new(open_on(&files));
    let other = |epoch| {
        let (topic_id, config) = (TopicId::from_bytes([9; 16]), Arc::default());
        AssignedPartition::alone("other".into(), topic_id, 0, epoch, config)
    };
    let mut both = topic_of(1, 0..PARTITIONS, 1);
    both.extend(of(vec![other(1)]));
    partitions.apply(&both).await;
    let keeping = keep_up(&partitions);
    let held = files.hold(Fault::new(Operation::Remove).on("-delete"));
    let begun = partitions.direct(&of(vec![other(1)]));
    until("a folder that is being removed", || held.waiting() >= 1).await;
    partitions.direct(&of(vec![other(2)]));
    let elected = partitions.get(&other(0).topic_id, 0).unwrap();
    assert_eq!(elected.leader_epoch(), 2);
    elected.append(vec![batch(100)], Acks::All).await.unwrap();
    let new = partitions.direct(&of(vec![other(2), AssignedPartition { partition: 1, ..other(1) }]));
    until_done(&partitions, new).await;
    drop(held);
    until_done(&partitions, begun).await;
    let left = DataDir::partitions(&partitions.data_dir().unwrap()).unwrap();
    assert_eq!(left.len(), 2, "{left:?}");
    keeping.abort();
    drop(keeping.await);
    assert!(partitions.close().await);
}

/// Recovering a large log took as long as it took, and so long nothing was heard of the metadata.
#[tokio::test(start_paused = true)]
async fn what_changes_while_a_log_is_opened_counts_once_it_is_open() {
    let files = SimFiles::new(7);
    let partitions = Arc::new(open_on(&files));
    partitions.apply(&topic_of(1, 0..2, 1)).await;
    append(&partitions, 0, 100).await;
    let keeping = keep_up(&partitions);
    let held = files.hold(Fault::new(Operation::Sync).on("t-2/"));
    let begun = partitions.direct(&topic_of(1, 0..4, 1));
    until("a log that is being created", || held.waiting() >= 1).await;
    partitions.direct(&topic_of(1, 0..4, 2));
    assert_eq!(handle(&partitions, 0).leader_epoch(), 2, "roles change meanwhile");
    let fourth = AssignedPartition {
        config: Arc::new(TopicConfig { segment_bytes: 1 << 20, ..TopicConfig::default() }),
        ..assigned(2)
    };
    let view = Arc::new(View { leader_epoch: 7, ..View::clone(&fourth.view) });
    let newest = AssignedPartition { view, ..fourth };
    partitions.direct(&of(vec![assigned(0), assigned(1), newest.clone()]));
    drop(held);
    until_done(&partitions, begun).await;
    let opened = handle(&partitions, 2);
    assert_eq!((opened.leader_epoch(), opened.config().segment_bytes), (7, 1 << 20));
    assert_eq!(opened.with_log(|log| Ok(log.config().segment_bytes)).await.unwrap(), 1 << 20);
    assert!(partitions.replica(&assigned(0).topic_id, 3).is_none(), "it went while it was to be opened");
    assert!(!files::exists(&*files, Path::new("/data/t-3")).unwrap());
    // One that goes while it is opened leaves nothing behind.
    let held = files.hold(Fault::new(Operation::Sync).on("t-4/"));
    let opening = partitions.direct(&of(vec![assigned(0), assigned(4)]));
    until("a log that is being created", || held.waiting() >= 1).await;
    partitions.direct(&of(vec![assigned(0)]));
    drop(held);
    until_done(&partitions, opening).await;
    assert!(!files::exists(&*files, Path::new("/data/t-4")).unwrap());
    keeping.abort();
    drop(keeping.await);
    assert!(partitions.close().await);
}

const SMALL_SEGMENT_BYTES: u32 = 4096;

/// Retention waited for one partition after another without a deadline: the first that hung was the last that was looked at.
#[tokio::test(start_paused = true)]
async fn a_partition_that_hangs_stops_the_retention_of_no_other() {
    let config = TopicConfig { segment_bytes: SMALL_SEGMENT_BYTES, retention_bytes: Some(0), ..TopicConfig::default() };
    let files = SimFiles::new(2);
    let (partitions, held) = with_one_that_hangs(&files, config).await;
    let stop = CancellationToken::new();
    let retention = tokio::spawn({
        let (partitions, stop) = (Arc::clone(&partitions), stop.clone());
        async move { partitions.enforce_retention(Duration::from_secs(1), stop).await }
    });
    // More than one round, so that the others do not merely come before it.
    for round in 1..=3 {
        for partition in 1..4 {
            for _ in 0..2 {
                append(&partitions, partition, 3000).await;
            }
        }
        let starts = || (1..4).map(|partition| handle(&partitions, partition).offsets().log_start);
        until("segments to be deleted", || starts().all(|start| start == 2 * round - 1)).await;
    }
    drop(held);
    append(&partitions, 0, 3000).await;
    append(&partitions, 0, 3000).await;
    until("the one that hung to come round again", || handle(&partitions, 0).offsets().log_start > 0).await;
    stop.cancel();
    retention.await.unwrap();
    assert!(partitions.close().await);
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_hangs_stops_the_compaction_of_no_other() {
    let config = TopicConfig {
        segment_bytes: SMALL_SEGMENT_BYTES,
        cleanup_compact: true,
        cleanup_delete: false,
        min_cleanable_dirty_ratio: 0.01,
        ..TopicConfig::default()
    };
    let files = SimFiles::new(3);
    let (partitions, held) = with_one_that_hangs(&files, config).await;
    let stop = CancellationToken::new();
    let cleaner = Cleaner {
        partitions: Arc::clone(&partitions),
        pool: partitions.context.pool.clone(),
        memory_bytes: 1 << 20,
        backoff: Duration::from_secs(1),
        shutdown: stop.clone(),
    };
    let cleaning = tokio::spawn(cleaner.run());
    let mut cleaned = [-1; 4];
    for _ in 0..3 {
        for partition in 1..4 {
            for _ in 0..2 {
                append(&partitions, partition, 3000).await;
            }
        }
        until("logs to be compacted", || {
            let now = |partition: u32| partitions.cleaned_until(&handle(&partitions, partition)).unwrap_or(-1);
            (1..4).all(|partition| now(partition) > cleaned[partition as usize])
        })
        .await;
        for partition in 1..4 {
            cleaned[partition as usize] = partitions.cleaned_until(&handle(&partitions, partition)).unwrap();
        }
    }
    drop(held);
    stop.cancel();
    cleaning.await.unwrap();
    assert!(partitions.close().await);
}

/// Appends were bounded by their bytes, of which empty ones have none, and work for the log not at all: behind a log that hung,
/// clients that came, asked and went could gather as much as they liked.
#[tokio::test(start_paused = true)]
async fn what_waits_for_a_partition_that_hangs_is_bounded() {
    const ASKED: usize = 20_000;
    let files = SimFiles::new(4);
    let (partitions, held) = with_one_that_hangs(&files, TopicConfig::default()).await;
    let hung = handle(&partitions, 0);
    let done = Arc::new(AtomicUsize::new(0));
    let mut appends = Vec::new();
    for _ in 0..ASKED {
        // As a client does who asks and goes at once.
        let done = Arc::clone(&done);
        let count = move |_: &mut Log| Ok(done.fetch_add(1, Ordering::Relaxed));
        assert!(hung.with_log(count).now_or_never().is_none());
        appends.extend(hung.enqueue(None, Vec::new(), None, Acks::All).now_or_never());
        hung.configure(assigned(0));
        tokio::task::yield_now().await;
    }
    let most = QUEUE_BYTES as usize / 256;
    assert!((most / 2..=most).contains(&appends.len()), "{} appends wait", appends.len());
    let waiting = tokio::spawn({
        let hung = hung.clone();
        async move { hung.with_log(|log| Ok(log.log_start_offset())).await }
    });
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!waiting.is_finished() && done.load(Ordering::Relaxed) == 0);
    drop(held);
    assert_eq!(waiting.await.unwrap().unwrap(), 0);
    assert_eq!(done.load(Ordering::Relaxed), 256);
    for append in appends {
        hung.outcome(append.unwrap()).await.unwrap();
    }
    append(&partitions, 0, 100).await;
    assert!(partitions.close().await);
}
