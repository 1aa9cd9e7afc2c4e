//! A partition's task through its roles, on a log: what a leader pushes is played here.

use super::*;
use crate::replica::follower::BatchSpan;
use crate::replica::history::{History, Verdict};
use crate::replica::leader::Assigned;
use bytes::Bytes;
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_storage::epochs::EpochEntry;
use headwater_storage::sim::{Fault, Operation};
use headwater_storage::{DataDir, Files, LogIdentity, NewIdentity, OpenHints, SimFiles};
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

const TOPIC: TopicId = TopicId::from_bytes([1; 16]);
const PATIENCE: Duration = Duration::from_secs(60);

fn member(broker: i32) -> Member {
    Member { broker, incarnation: Uuid::from_u128(broker as u128) }
}

/// Broker 1 is here, 2 the other one.
fn assigned(leader: i32, leader_epoch: i32, isr: &[i32]) -> AssignedPartition {
    let replica = |broker| Assigned { member: member(broker), active: true, in_sync: isr.contains(&broker) };
    let view = View {
        index: leader_epoch as u64,
        leader: (leader > 0).then(|| member(leader)),
        leader_epoch,
        partition_epoch: leader_epoch,
        min_insync_replicas: Some(1),
        replicas: [1, 2].map(replica).to_vec(),
    };
    let (config, unclean_recoveries) = (Arc::default(), 0);
    AssignedPartition {
        topic: "t".into(),
        topic_id: TOPIC,
        partition: 0,
        me: member(1),
        view: Arc::new(view),
        unclean_recoveries,
        config,
    }
}

struct Replica {
    files: Arc<SimFiles>,
    root: DataRoot,
    lease: Lease,
    disk: Arc<DiskHealth>,
    pool: Pool,
    handle: PartitionHandle,
}

fn start(assigned: &AssignedPartition) -> Replica {
    // Whatever is under way takes too long.
    start_on(assigned, Arc::new(DiskHealth::new(Duration::ZERO)))
}

fn start_on(assigned: &AssignedPartition, disk: Arc<DiskHealth>) -> Replica {
    let files = SimFiles::new(1);
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 1, directory_id: "d".into() };
    let shared: Arc<dyn Files> = files.clone();
    let data_dir = Arc::new(DataDir::open(Arc::clone(&shared), Path::new("/data"), &us).unwrap());
    let identity = LogIdentity { topic: "t".into(), topic_id: TOPIC, partition: 0 };
    let hints = OpenHints { clean_shutdown: false, recovery_point: 0, log_start_offset: 0 };
    let path = data_dir.partition_path("t", 0);
    let (log, _) = Log::open(shared, &path, identity, LogConfig::default(), hints, 0).unwrap();
    let root = DataRoot::new(data_dir);
    let context = PartitionContext {
        pool: Pool::start(2).unwrap(),
        metrics: Arc::new(Metrics::new()),
        append_queue_bytes: 1 << 20,
        group_bytes: 1 << 20,
        producer_id_expiration_ms: 1 << 30,
        replica_lag_time_max_ms: 60_000,
        lease: Lease::unlimited(),
        disk,
        root: root.clone(),
        trimmed: Arc::default(),
        replication: Arc::default(),
    };
    let handle = PartitionHandle::start(assigned, Ok((log, 0, 0)), &context);
    let PartitionContext { lease, disk, pool, .. } = context;
    Replica { files, root, lease, disk, pool, handle }
}

fn batch(leader_epoch: i32, base_offset: i64) -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    builder.append(0, None, Some(b"value"), &[]);
    let bytes: Bytes = builder.build().unwrap();
    let header = BatchHeader { base_offset, leader_epoch, ..BatchHeader::parse(&bytes).unwrap() };
    NewBatch { header, bytes }
}

impl Replica {
    fn tell(&self, message: Message) {
        self.handle.send(message).unwrap();
    }

    /// The leader of this epoch pushes these, on this stream, and says up to where readers may read.
    fn push(&self, stream: u64, tenure: Tenure, batches: Vec<NewBatch>, high_watermark: i64) {
        let span = |batch: &NewBatch| BatchSpan {
            base_offset: batch.header.base_offset,
            next_offset: batch.header.next_offset(),
            leader_epoch: batch.header.leader_epoch,
        };
        let spans: Vec<_> = batches.iter().map(span).collect();
        let from = spans.first().map_or(0, |first| first.base_offset);
        let push = Push { tenure, from, batches: spans, high_watermark, log_start: 0 };
        let bytes = batches.iter().map(|batch| batch.bytes.len() as u64).sum();
        self.tell(Message::Pushed(stream, push, Pushed { batches, rolls: Vec::new(), bytes, loan: None }));
    }

    async fn until(&self, what: &str, is_so: impl FnMut(&Watermarks) -> bool) -> Watermarks {
        let mut watermarks = self.handle.watermarks();
        let reached = tokio::time::timeout(PATIENCE, watermarks.wait_for(is_so)).await;
        reached.unwrap_or_else(|_| panic!("{what}: {:?}", self.handle.watermarks().borrow())).unwrap().clone()
    }

    /// Everything that was said before has been heard.
    async fn heard(&self) {
        self.handle.with_log(|_| Ok(())).await.unwrap();
    }
}

fn tenure(leader_epoch: i32, generation: u64) -> Tenure {
    Tenure { leader_epoch, generation }
}

#[tokio::test]
async fn a_follower_refuses_appends_and_writes_what_its_leader_pushes() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    assert!(!replica.handle.is_leader());
    let refused = replica.handle.append(vec![batch(0, 0)], Acks::All).await.unwrap_err();
    assert_eq!((refused.code(), refused.retryable()), (ErrorCode::NotLeader, true));
    // Nothing before the leader has agreed.
    replica.push(1, tenure(3, 0), vec![batch(3, 0)], 0);
    replica.heard().await;
    assert_eq!(replica.handle.offsets().log_end, 0);
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.push(1, tenure(3, 0), vec![batch(3, 0), batch(3, 1)], 1);
    let written = replica.until("written", |now| now.offsets.flushed == 2).await;
    assert_eq!(written.offsets, Offsets { log_start: 0, high_watermark: 1, log_end: 2, flushed: 2 });
    assert_eq!(replica.handle.reader().unwrap().epoch_at(1), Some(3));
}

/// Its leader went on by what the log before had reported: an empty replica was in sync.
#[tokio::test]
async fn a_replica_that_is_made_anew_is_well_once_its_leader_knows_it_for_another_log() {
    let disk = Arc::new(DiskHealth::new(Duration::from_secs(3600)));
    disk.begins_anew((TOPIC, 0));
    let replica = start_on(&assigned(2, 3, &[2]), Arc::clone(&disk));
    replica.heard().await;
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.heard().await;
    assert_eq!(disk.restored(), [], "that was said of the log before");
    replica.tell(Message::Verdict(1, tenure(3, 1 << 32), Verdict::Agrees));
    replica.heard().await;
    assert_eq!(disk.restored(), [(TOPIC, 0)]);
    replica.push(1, tenure(3, 1 << 32), vec![batch(3, 0)], 1);
    replica.until("written", |now| now.offsets.high_watermark == 1).await;

    disk.begins_anew((TOPIC, 0));
    assert_eq!(disk.restored(), [], "it is another one again");
    replica.handle.configure(assigned(0, 4, &[]));
    replica.heard().await;
    replica.heard().await;
    assert_eq!(disk.restored(), [(TOPIC, 0)], "nobody leads who could go by what was said before");
}

#[tokio::test]
async fn a_batch_with_a_flipped_bit_is_not_written_and_nothing_behind_it_is() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.push(1, tenure(3, 0), vec![batch(3, 0)], 0);
    replica.until("the first", |now| now.offsets.log_end == 1).await;
    let mut bad = batch(3, 1);
    let mut bytes = bad.bytes.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    bad.bytes = bytes.into();
    replica.push(1, tenure(3, 0), vec![bad, batch(3, 2)], 3);
    replica.push(1, tenure(3, 0), vec![batch(3, 3)], 4);
    replica.heard().await;
    replica.heard().await;
    assert_eq!(replica.handle.offsets().log_end, 1);
    assert_eq!(replica.handle.ended().map(|why| why.to_string()), None, "its own log is well");
    // It says hello again, and is sent what is sound.
    replica.tell(Message::Lost(1));
    replica.heard().await;
    replica.tell(Message::Verdict(2, tenure(3, 0), Verdict::Agrees));
    replica.push(2, tenure(3, 0), vec![batch(3, 1)], 2);
    replica.until("the second", |now| now.offsets.high_watermark == 2).await;
}

#[tokio::test]
async fn leading_and_following_take_turns_and_what_is_parked_fails_with_its_epoch() {
    let replica = start(&assigned(1, 3, &[1, 2]));
    assert!(replica.handle.is_leader() && replica.handle.watermarks().borrow().leads);
    let parked = replica.handle.enqueue(None, vec![batch(0, 0)], None, Acks::All).await.unwrap();
    let led = replica.until("written here", |now| now.offsets.flushed == 1).await;
    assert_eq!(led.offsets.high_watermark, 0, "the other one has not reported");

    replica.handle.configure(assigned(2, 4, &[1, 2]));
    let refused = replica.handle.outcome(parked).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::NotLeader);
    replica.until("following", |now| !now.leads).await;
    replica.heard().await;
    // A push of the epoch before counts for nothing.
    replica.tell(Message::Verdict(1, tenure(4, 0), Verdict::Cut { to: 0 }));
    replica.until("cut", |now| now.offsets.log_end == 0).await;
    replica.tell(Message::Verdict(2, tenure(4, 1), Verdict::Agrees));
    replica.push(2, tenure(3, 1), vec![batch(3, 0)], 1);
    replica.push(2, tenure(4, 1), vec![batch(4, 0)], 1);
    replica.until("the new leader's", |now| now.offsets.high_watermark == 1).await;
    assert_eq!(replica.handle.reader().unwrap().epoch_at(0), Some(4));

    // It leads again, alone in sync: what it appends now is of the new epoch.
    replica.handle.configure(assigned(1, 5, &[1]));
    replica.until("leading", |now| now.leads).await;
    replica.handle.append(vec![batch(0, 0)], Acks::All).await.unwrap();
    assert_eq!(replica.handle.reader().unwrap().epoch_at(1), Some(5));
    assert_eq!(replica.handle.leader_epoch(), 5);
}

/// The death of one broker is news to all partitions of all others, and each troubled a thread for settings that it had.
#[tokio::test]
async fn the_write_half_is_told_of_settings_only_where_they_are_others() {
    let replica = start(&assigned(1, 3, &[1, 2]));
    replica.heard().await;
    // Both of the pool's threads have something else to do.
    let (begun, begins) = std::sync::mpsc::channel();
    let releases = [(); 2].map(|()| {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let begun = begun.clone();
        replica.pool.spawn(move || {
            begun.send(()).unwrap();
            // An error means that it is released.
            released.recv().unwrap_or(());
        });
        begins.recv().unwrap();
        release
    });
    let hear = async |assigned: AssignedPartition| {
        replica.handle.configure(assigned);
        // What is asked after it is answered after it.
        let (tell, told) = oneshot::channel();
        let history = History::default();
        let hello = Hello { member: member(3), tenure: tenure(3, 0), history };
        replica.tell(Message::Hello(Box::new(hello), None, tell));
        assert!(told.await.unwrap().is_err());
    };
    hear(assigned(1, 3, &[1])).await;
    assert_eq!(replica.pool.queued(), 0, "another follower is in sync, and nothing else is new");
    let config = Arc::new(TopicConfig { segment_bytes: 1 << 20, ..TopicConfig::default() });
    hear(AssignedPartition { config, ..assigned(1, 3, &[1]) }).await;
    assert_eq!(replica.pool.queued(), 1);
    drop(releases);
    replica.heard().await;
}

#[tokio::test]
async fn before_a_log_is_cut_its_recovery_point_says_so() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.push(1, tenure(3, 0), vec![batch(3, 0), batch(3, 1), batch(3, 2)], 1);
    replica.until("written", |now| now.offsets.flushed == 3).await;
    let data_dir = replica.root.get().unwrap();
    let key = ("t".to_owned(), 0);
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.recovery_points.insert(key, 3);
    });
    data_dir.write_checkpoints().unwrap();
    // The cut itself hangs.
    let held = replica.files.hold(Fault::new(Operation::Rename).on("t-0/"));
    replica.tell(Message::Lost(1));
    replica.heard().await;
    replica.tell(Message::Verdict(2, tenure(3, 0), Verdict::Cut { to: 2 }));
    tokio::time::timeout(PATIENCE, async {
        while held.waiting() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(data_dir.written_recovery_point("t", 0), Some(2));
    assert!(replica.handle.is_cutting(), "nobody writes down what its offsets were");
    drop(held);
    replica.until("cut", |now| now.offsets.log_end == 2).await;
    assert!(!replica.handle.is_cutting());
}

/// The leader would take what was acknowledged: a person has to look at it.
#[tokio::test]
async fn a_cut_below_the_high_watermark_fences_the_replica() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.push(1, tenure(3, 0), vec![batch(3, 0), batch(3, 1)], 2);
    replica.until("written", |now| now.offsets.high_watermark == 2).await;
    replica.handle.configure(assigned(2, 4, &[2]));
    replica.heard().await;
    replica.tell(Message::Verdict(2, tenure(4, 0), Verdict::Cut { to: 1 }));
    let fenced = replica.until("fenced", |now| now.ended.is_some()).await;
    assert_eq!(fenced.ended.unwrap().code(), ErrorCode::PartitionFenced);
    assert_eq!(fenced.offsets.log_end, 2);
}

#[tokio::test]
async fn where_nobody_leads_the_log_has_its_upkeep_and_is_closed_in_good_order() {
    let replica = start(&assigned(0, 3, &[]));
    replica.heard().await;
    assert!(replica.handle.append(vec![batch(0, 0)], Acks::Leader).await.is_err());
    replica.handle.close().await.unwrap();
}

/// What waits for other replicas at the end is told so, and the log is closed in good order.
#[tokio::test]
async fn a_leader_closes_though_its_followers_never_answered() {
    let replica = start(&assigned(1, 3, &[1, 2]));
    let parked = replica.handle.enqueue(None, vec![batch(0, 0)], None, Acks::All).await.unwrap();
    replica.until("written here", |now| now.offsets.flushed == 1).await;
    tokio::time::timeout(PATIENCE, replica.handle.close()).await.unwrap().unwrap();
    assert_eq!(replica.handle.outcome(parked).await.unwrap_err().code(), ErrorCode::ShuttingDown);
}

/// What an earlier leader acknowledged may lie above the high watermark that this one knows.
#[tokio::test]
async fn a_new_leader_says_where_the_log_ends_once_all_that_was_acknowledged_is_readable() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.push(1, tenure(3, 0), vec![batch(3, 0), batch(3, 1)], 1);
    replica.until("written", |now| now.offsets.flushed == 2).await;
    assert!(replica.handle.settled_offsets().await.is_err(), "it leads nothing");
    replica.handle.configure(assigned(1, 4, &[1, 2]));
    replica.until("leading", |now| now.leads).await;
    let mut asked = Box::pin(replica.handle.settled_offsets());
    assert!(futures::poll!(&mut asked).is_pending(), "1 of 2 records are known to be kept");
    let history = History::new(vec![EpochEntry { epoch: 3, start_offset: 0 }], 0, 2).unwrap();
    let hello = Hello { member: member(2), tenure: tenure(4, 0), history };
    assert_eq!(replica.handle.hello(hello, None).await.unwrap().map(|admitted| admitted.verdict), Ok(Verdict::Agrees));
    let report = Report { member: member(2), tenure: tenure(4, 0), received: 2, flushed: 2, log_start: Some(0) };
    replica.handle.reported(report).unwrap();
    let told = tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap();
    assert_eq!(told.high_watermark, 2);
}

#[tokio::test]
async fn without_its_lease_a_leader_takes_only_what_the_whole_isr_answers_for() {
    let replica = start(&assigned(1, 3, &[1]));
    replica.lease.limit();
    for acks in [Acks::Leader, Acks::None] {
        let refused = replica.handle.append(vec![batch(0, 0)], acks).await.unwrap_err();
        assert_eq!((refused.code(), refused.retryable()), (ErrorCode::NotLeader, true));
    }
    replica.handle.append(vec![batch(0, 0)], Acks::All).await.unwrap();
    replica.lease.confirm(replica.lease.now_ms(), PATIENCE);
    replica.handle.append(vec![batch(0, 0)], Acks::Leader).await.unwrap();
}

#[tokio::test]
async fn a_replica_that_hangs_in_a_flush_or_is_fenced_is_unfit() {
    let replica = start(&assigned(1, 3, &[1]));
    let until = async |what: &str, unfit: &[(TopicId, u32)]| {
        let reached = async {
            while replica.disk.unfit() != unfit {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{what}"));
    };
    let held = replica.files.hold(Fault::new(Operation::Sync).on("t-0/"));
    let waiting = replica.handle.enqueue(None, vec![batch(0, 0)], None, Acks::All).await.unwrap();
    until("it hangs", &[(TOPIC, 0)]).await;
    drop(held);
    replica.handle.outcome(waiting).await.unwrap();
    until("it goes on", &[]).await;
    replica.files.fail(Fault::new(Operation::Sync).on("t-0/"));
    replica.handle.append(vec![batch(0, 0)], Acks::All).await.unwrap_err();
    replica.until("fenced", |now| now.ended.is_some()).await;
    until("it is fenced", &[(TOPIC, 0)]).await;
    let Replica { disk, handle, .. } = replica;
    drop(handle);
    let gone = async {
        while !disk.unfit().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("nobody keeps it any more");
}

/// The partition took no append any more, and its leadership never moved.
#[tokio::test]
async fn a_replica_that_hangs_in_other_work_is_unfit_too() {
    let replica = start(&assigned(1, 3, &[1]));
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let work = replica.handle.with_log(move |_| {
        // An error means that it was let go.
        let _ = held.recv();
        Ok(())
    });
    let hung = async {
        while replica.disk.unfit() != [(TOPIC, 0)] {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(let_go);
    };
    let both = tokio::time::timeout(PATIENCE, async { tokio::join!(work, hung).0 }).await;
    both.expect("it is unfit").unwrap();
}

#[tokio::test]
async fn a_replica_knows_since_when_it_has_no_leader() {
    let replica = start(&assigned(2, 3, &[1, 2]));
    replica.until("it looks for its leader", |now| now.apart_since.is_some()).await;
    replica.tell(Message::Verdict(1, tenure(3, 0), Verdict::Agrees));
    replica.until("it follows", |now| now.apart_since.is_none()).await;
    replica.tell(Message::Lost(1));
    let lost = replica.until("it lost it", |now| now.apart_since.is_some()).await;
    // Other news change nothing of that.
    replica.heard().await;
    assert_eq!(replica.handle.watermarks().borrow().apart_since, lost.apart_since);
    replica.handle.configure(assigned(1, 4, &[1, 2]));
    replica.until("it leads", |now| now.leads && now.apart_since.is_none()).await;
}
