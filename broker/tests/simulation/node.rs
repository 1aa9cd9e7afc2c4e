//! A broker: its disk, its log, and what drives the pure machines.

use bytes::Bytes;
use headwater_broker::metadata::MetadataState;
use headwater_broker::partition::state::PartitionState;
use headwater_broker::replica::follower::FollowerState;
use headwater_broker::replica::history::History;
use headwater_broker::replica::{Member, Tenure};
use headwater_proto::TopicId;
use headwater_proto::batch::{BatchBuilder, Batches, BuildOptions, Records, check};
use headwater_storage::{Files, Log, LogConfig, LogIdentity, NewBatch, OpenHints, SimFiles};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

pub(crate) const TOPIC: TopicId = TopicId::from_bytes([1; 16]);
const DIR: &str = "/data/topic-0";

/// A request of the producer: its connection, and which one on it.
pub(crate) type RequestId = (u64, u64);

/// A record as it is told apart: in which epoch it was appended, and what it says.
pub(crate) type Entry = (i32, u64);

/// What a broker writes down beside the log, whole and synced.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Kept {
    pub(crate) flushed: i64,
    pub(crate) high_watermark: i64,
    pub(crate) unclean_taken: u32,
    pub(crate) boots: u64,
    pub(crate) disk: u64,
    /// Whether it keeps the partition.
    pub(crate) has_replica: bool,
}

pub(crate) struct Node {
    pub(crate) id: i32,
    pub(crate) files: Arc<SimFiles>,
    pub(crate) kept: Kept,
    /// Something was lost, and the metadata do not know it yet.
    pub(crate) lost: bool,
    /// The kernel booted since, and what was only in memory is gone.
    pub(crate) rebooted: bool,
    /// Up to where the log was on stable storage, whatever became of the disk since.
    pub(crate) was_flushed: i64,
    pub(crate) process: Option<Process>,
    pub(crate) paused_until: i64,
    /// The disk takes long for everything until then.
    pub(crate) slow_disk_until: i64,
    /// The clock runs so many thousandths as fast, from here.
    pub(crate) clock: (i64, i64),
}

pub(crate) struct Process {
    pub(crate) me: Member,
    pub(crate) log: Log,
    /// What the log holds.
    pub(crate) mirror: Vec<Entry>,
    pub(crate) metadata: MetadataState,
    /// How many commands were applied.
    pub(crate) applied: usize,
    pub(crate) apply_pending: bool,
    pub(crate) claims_loss: bool,
    pub(crate) registered_at: i64,
    pub(crate) role: Role,
    /// The leader and the leader epoch of the role, and whether it keeps the partition.
    pub(crate) role_of: (i32, i32, bool),
    pub(crate) busy: bool,
    pub(crate) high_watermark: i64,
    pub(crate) generation: u64,
    pub(crate) contact_ms: i64,
    /// How many unclean elections what it serves comes after.
    pub(crate) lineage: u32,
    /// Up to where readers were seen to be served what is committed.
    pub(crate) checked: i64,
    pub(crate) heard: BTreeMap<i32, (Member, i64)>,
    pub(crate) asked: BTreeMap<i32, i64>,
    pub(crate) in_office_since: Option<(u64, i64)>,
    pub(crate) connections: BTreeMap<u64, Option<u64>>,
    pub(crate) requests: BTreeMap<RequestId, Vec<u64>>,
}

pub(crate) enum Role {
    Idle,
    Leader { state: Box<PartitionState<RequestId, ()>>, streams: BTreeMap<i32, Stream> },
    Follower { state: FollowerState, stream: u64, heard_ms: i64, jobs: VecDeque<FollowerJob> },
}

/// The leader's end of a replica stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream {
    pub(crate) id: u64,
    pub(crate) tenure: Tenure,
    pub(crate) next: i64,
    pub(crate) told: i64,
}

#[derive(Debug, Clone)]
pub(crate) enum FollowerJob {
    Append(Tenure, Vec<NewBatch>),
    Flush(Tenure),
    Cut(Tenure, i64),
    Restart(Tenure, i64),
}

impl Node {
    pub(crate) fn new(id: i32, seed: u64, clock: (i64, i64)) -> Node {
        let (files, kept) = (disk(seed), Kept { disk: seed, ..Kept::default() });
        let (lost, rebooted, was_flushed, process) = (false, false, 0, None);
        let (paused_until, slow_disk_until) = (0, 0);
        Node { id, files, kept, lost, rebooted, was_flushed, process, paused_until, slow_disk_until, clock }
    }

    pub(crate) fn local(&self, now: i64) -> i64 {
        now * self.clock.0 / 1000 + self.clock.1
    }

    /// Everything on the disk is gone.
    pub(crate) fn wipe(&mut self, seed: u64) {
        self.files = disk(seed);
        self.kept = Kept { disk: seed, ..Kept::default() };
    }

    pub(crate) fn open(&mut self, now: i64) -> Log {
        let identity = LogIdentity { topic: "topic".into(), topic_id: TOPIC, partition: 0 };
        let config = LogConfig { segment_bytes: 3000, ..LogConfig::default() };
        let hints = OpenHints { clean_shutdown: false, recovery_point: self.kept.flushed, log_start_offset: 0 };
        let files = Arc::clone(&self.files) as Arc<dyn Files>;
        Log::open(files, Path::new(DIR), identity, config, hints, now).expect("a log that opens").0
    }
}

fn disk(seed: u64) -> Arc<SimFiles> {
    let files = SimFiles::new(seed);
    files.create_dir_all(Path::new(DIR)).expect("a new disk");
    files.sync_dir(Path::new("/data")).expect("a new disk");
    files.sync_dir(Path::new("/")).expect("a new disk");
    files
}

impl Process {
    pub(crate) fn history(&self) -> History {
        let log = &self.log;
        History::of_log(log.leader_epochs(), log.log_start_offset(), log.log_end_offset())
    }

    /// The batches from an offset on, as many as one message takes.
    pub(crate) fn batches_from(&self, from: i64) -> Vec<NewBatch> {
        let reader = self.log.reader();
        let mut cursor = reader.seek(from).expect("an offset of the log");
        let mut bytes = Vec::new();
        while bytes.len() < 2000
            && let Some(slice) = reader.read(&mut cursor, 4000, i64::MAX).expect("a log that reads")
        {
            bytes.extend_from_slice(&slice.bytes());
        }
        let bytes = Bytes::from(bytes);
        let mut batches = Vec::new();
        let mut position = 0;
        while let Some(Ok((at, header, _))) = Batches::new(&bytes[position..]).next() {
            let at = position + at;
            let Some(whole) = bytes.get(at..at + header.size()) else { break };
            position = at + header.size();
            if header.base_offset >= from {
                batches.push(NewBatch { header, bytes: bytes.slice_ref(whole) });
            }
        }
        batches
    }

    /// Everything that the log holds.
    pub(crate) fn read_all(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        while (entries.len() as i64) < self.log.log_end_offset() {
            let batches = self.batches_from(entries.len() as i64);
            assert!(!batches.is_empty(), "the log ends before its end");
            for batch in batches {
                assert_eq!(batch.header.base_offset, entries.len() as i64, "a hole in the log");
                check(&batch.bytes).expect("a sound batch");
                entries.extend(values(&batch).into_iter().map(|value| (batch.header.leader_epoch, value)));
            }
        }
        entries
    }
}

/// A batch of a producer.
pub(crate) fn batch(epoch: i16, sequence: i32, first: u64, count: u64, padding: usize, now: i64) -> NewBatch {
    let options =
        BuildOptions { producer_id: 7, producer_epoch: epoch, base_sequence: sequence, ..BuildOptions::default() };
    let mut builder = BatchBuilder::new(options);
    for value in first..first + count {
        let mut bytes = value.to_le_bytes().to_vec();
        bytes.resize(8 + padding, 0);
        builder.append(now, None, Some(&bytes), &[]);
    }
    let bytes = builder.build().expect("a batch");
    NewBatch { header: check(&bytes).expect("a sound batch"), bytes }
}

/// What the records of a batch say.
pub(crate) fn values(batch: &NewBatch) -> Vec<u64> {
    let records = Records::new(&batch.bytes).expect("a sound batch");
    let value = |record: headwater_proto::batch::Record| {
        let value = record.value.expect("a value");
        u64::from_le_bytes(value[..8].try_into().expect("eight bytes"))
    };
    records.map(|record| value(record.expect("a sound record"))).collect()
}
