//! A broker: its disk, its log, and what drives the pure machines.

use crate::world::groups::Coordinator;
use bytes::Bytes;
use headwater_broker::error::{PartitionError, ProducerIdentity};
use headwater_broker::metadata::MetadataState;
use headwater_broker::metadata::boots::Boots;
use headwater_broker::metadata::command::TopicPartition;
use headwater_broker::metadata::raft::sessions::{Says, Sessions};
use headwater_broker::partition::state::PartitionState;
use headwater_broker::replica::follower::FollowerState;
use headwater_broker::replica::history::History;
use headwater_broker::replica::{Member, Tenure};
use headwater_proto::TopicId;
use headwater_proto::batch::{BatchBuilder, Batches, BuildOptions, Records, check};
use headwater_proto::wire::{self, OpenProduce, ProduceRequest, ProduceResponse};
use headwater_storage::{
    Cleanup, CompactionPlan, CompactionResult, Files, Log, LogConfig, LogIdentity, NewBatch, OpenHints, SimFiles,
};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) const TOPIC: TopicId = TopicId::from_bytes([1; 16]);
/// One that had the same name, and was deleted.
pub(crate) const EARLIER_TOPIC: TopicId = TopicId::from_bytes([9; 16]);
const DIR: &str = "/data/topic-0";
const HANGS_MS: i64 = 300;
/// When a job began that is not taken for one that hangs.
pub(crate) const NEVER_HANGS: i64 = i64::MAX / 2;

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
    /// How many unclean elections what it holds, and what was deleted before, comes after.
    pub(crate) lineage: u32,
    pub(crate) log_start: i64,
    /// Up to where the log is compacted.
    pub(crate) cleaned: Option<i64>,
    pub(crate) disk: u64,
    /// Whether it keeps the partition.
    pub(crate) has_replica: bool,
    /// Its start found less than was there, and the metadata do not know it yet: a second start still says so.
    pub(crate) claims_loss: bool,
}

/// What is special about the topic's logs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Policy {
    /// Of each key the last record stays.
    pub(crate) compacts: bool,
    pub(crate) retention_bytes: Option<u64>,
}

pub(crate) struct Node {
    pub(crate) id: i32,
    pub(crate) files: Arc<SimFiles>,
    pub(crate) kept: Kept,
    /// What the disk knows of the broker's starts.
    pub(crate) boots: Boots,
    /// Something was lost, and the metadata do not know it yet.
    pub(crate) lost: bool,
    /// The partition's folder alone is gone, and is not made anew yet: the rest of the disk is what it was.
    pub(crate) lost_folder: bool,
    /// The topic whose folder is there.
    pub(crate) folder_of: TopicId,
    /// The disk fails under the partition, and the broker says so.
    pub(crate) unfit: bool,
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
    /// The group, in the leader epoch in which it was read.
    pub(crate) coordinator: Option<(i32, Box<Coordinator>)>,
    /// Until when what a coordinator appended is on its way to the partition.
    pub(crate) handed_until: i64,
    /// min.insync.replicas, as the settings say that came last, and whether others are on their way.
    pub(crate) configured: Option<u32>,
    pub(crate) is_configuring: bool,
    /// Where the leader's log begins.
    pub(crate) begins_at: i64,
    pub(crate) metadata: MetadataState,
    /// Its replica is lost, and not made anew: it has no role.
    pub(crate) is_unhealed: bool,
    /// That was so while it ran, and it does not know yet that the metadata know it.
    pub(crate) is_damaged: bool,
    /// Everything that was decided when it found the damage, which it asks for before it makes it anew.
    pub(crate) damaged_at: usize,
    /// How often its replica was made anew, and whether the leader is still to hear of the last time.
    pub(crate) times_anew: u64,
    pub(crate) is_unknown: bool,
    /// What it found when it started: less than was there.
    pub(crate) claims_loss: bool,
    /// How many commands were applied.
    pub(crate) applied: usize,
    pub(crate) apply_pending: bool,
    pub(crate) registered_at: i64,
    pub(crate) role: Role,
    /// The leader and the leader epoch of the role, and whether it keeps the partition.
    pub(crate) role_of: (i32, i32, bool),
    /// Since when a job for the log is under way.
    pub(crate) busy: Option<i64>,
    /// Its replica was of no use, and is well now.
    pub(crate) is_restored: bool,
    pub(crate) high_watermark: i64,
    pub(crate) generation: u64,
    pub(crate) contact_ms: i64,
    /// How many unclean elections what it serves comes after.
    pub(crate) lineage: u32,
    /// How many the replica has taken in.
    pub(crate) unclean_taken: u32,
    /// How many there had been when the role was given.
    pub(crate) role_lineage: u32,
    /// Up to where readers were seen to be served what is committed.
    pub(crate) checked: i64,
    pub(crate) sessions: Sessions,
    pub(crate) asked: BTreeMap<i32, i64>,
    pub(crate) ticked_ms: i64,
    /// A compaction under way, and one that waits to be put in place.
    pub(crate) plan: Option<CompactionPlan>,
    pub(crate) compacted: Option<CompactionResult>,
    /// Produce streams, and those that are asked for.
    pub(crate) connections: BTreeMap<u64, ProduceStream>,
    pub(crate) opening: BTreeMap<u64, OpenProduce>,
    pub(crate) requests: BTreeMap<RequestId, Vec<u64>>,
}

pub(crate) enum Role {
    Idle,
    Leader { state: Box<PartitionState<RequestId, Chore>>, streams: BTreeMap<i32, Stream> },
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

/// A broker's end of a produce stream.
#[derive(Debug)]
pub(crate) struct ProduceStream {
    /// In which it was opened; it does not outlive it.
    pub(crate) leader_epoch: i32,
    producer: ProducerIdentity,
    last_request: u64,
    /// Whether the partition refused a request: none that it has of those after it is written.
    pub(crate) not_written: Arc<AtomicBool>,
    /// Whether a request was refused: all that come later are.
    failed: bool,
    /// Whether one was answered so: all that follow are.
    has_refused: bool,
    /// The requests that are not answered, and what they will be.
    pending: VecDeque<(u64, Option<Result<ProduceResponse, wire::Error>>)>,
}

impl ProduceStream {
    pub(crate) fn new(leader_epoch: i32, producer: ProducerIdentity) -> ProduceStream {
        ProduceStream {
            leader_epoch,
            producer,
            last_request: 0,
            not_written: Arc::default(),
            failed: false,
            has_refused: false,
            pending: VecDeque::new(),
        }
    }

    /// A request comes. What is wrong with it, if anything is.
    pub(crate) fn take(&mut self, request: &ProduceRequest, batch: &NewBatch, limit: usize) -> Result<(), wire::Error> {
        assert_eq!(request.request_id, self.last_request + 1, "requests of a stream follow one another");
        self.last_request = request.request_id;
        self.pending.push_back((request.request_id, None));
        let (stream, bytes) = (self.producer, batch.bytes.len());
        let batch = ProducerIdentity { id: batch.header.producer_id, epoch: batch.header.producer_epoch };
        if self.failed || self.not_written.load(Ordering::Acquire) {
            return Err(PartitionError::EarlierFailed.to_wire());
        }
        if bytes > limit {
            return Err(PartitionError::TooLarge { bytes, limit }.to_wire());
        }
        if batch != stream { Err(PartitionError::ForeignProducer { batch, stream }.to_wire()) } else { Ok(()) }
    }

    /// A request has its outcome: what can be answered now, in order.
    pub(crate) fn answers(
        &mut self,
        number: u64,
        outcome: Result<ProduceResponse, wire::Error>,
    ) -> Vec<ProduceResponse> {
        self.failed |= outcome.is_err();
        let place = self.pending.iter_mut().find(|(pending, _)| *pending == number);
        place.expect("a request that was not answered").1 = Some(outcome);
        let mut answers = Vec::new();
        while let Some((_, Some(_))) = self.pending.front()
            && let Some((request_id, Some(outcome))) = self.pending.pop_front()
        {
            let refused = |error| ProduceResponse { error: Some(error), ..ProduceResponse::default() };
            let answer = match outcome {
                Ok(_) if self.has_refused => refused(PartitionError::EarlierFailed.to_wire()),
                Ok(answer) => answer,
                Err(_) if self.has_refused => refused(PartitionError::EarlierFailed.to_wire()),
                Err(error) => {
                    self.has_refused = true;
                    refused(error)
                }
            };
            answers.push(ProduceResponse { request_id, ..answer });
        }
        answers
    }
}

#[derive(Debug, Clone)]
pub(crate) enum FollowerJob {
    Append(Tenure, Vec<NewBatch>),
    Flush(Tenure),
    Cut(Tenure, i64),
    Restart(Tenure, i64),
    Chore(Chore),
}

/// What is done to a log between its appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chore {
    /// Delete what lies below.
    Delete(i64),
    /// Delete what is beyond the retention.
    Retain,
    /// Look whether it is worth compacting.
    PlanCompaction,
    /// Put compacted segments in place.
    InstallCompaction,
    /// Look what the log holds of a producer that wants a stream, on this connection.
    OpenProduce(u64),
}

/// Whether the disk takes so long for a job that the replica is of no use.
pub(crate) fn hangs(busy: Option<i64>, now: i64) -> bool {
    busy.is_some_and(|since| now - since >= HANGS_MS)
}

impl Node {
    pub(crate) fn new(id: i32, seed: u64, clock: (i64, i64)) -> Node {
        let (files, kept) = (disk(seed), Kept { disk: seed, ..Kept::default() });
        Node {
            id,
            files,
            kept,
            boots: Boots::default(),
            lost: false,
            lost_folder: false,
            folder_of: TOPIC,
            unfit: false,
            rebooted: false,
            was_flushed: 0,
            process: None,
            paused_until: 0,
            slow_disk_until: 0,
            clock,
        }
    }

    pub(crate) fn local(&self, now: i64) -> i64 {
        now * self.clock.0 / 1000 + self.clock.1
    }

    /// What the broker says of itself.
    pub(crate) fn says(&self, now: i64) -> Says {
        let replica = TopicPartition { topic_id: TOPIC.to_wire(), partition: 0 };
        let process = self.process.as_ref();
        let is_unfit = self.unfit || process.is_some_and(|process| process.is_unhealed || hangs(process.busy, now));
        let is_restored = !is_unfit && process.is_some_and(|process| process.is_restored);
        let named = |is_named: bool| if is_named { vec![replica.clone()] } else { Vec::new() };
        Says { is_ready: true, unfit: named(is_unfit), restored: named(is_restored) }
    }

    /// Everything on the disk is gone.
    pub(crate) fn wipe(&mut self, seed: u64) {
        self.files = disk(seed);
        (self.kept, self.boots) = (Kept { disk: seed, ..Kept::default() }, Boots::default());
        (self.lost_folder, self.unfit, self.folder_of) = (false, false, TOPIC);
    }

    /// The partition's folder is gone, and nothing else.
    pub(crate) fn wipe_folder(&mut self, seed: u64) {
        self.files = disk(seed);
        (self.lost_folder, self.unfit, self.folder_of) = (true, false, TOPIC);
    }

    /// What lies there is nobody's: the partition's folder is a new one.
    pub(crate) fn set_folder_aside(&mut self, seed: u64) {
        (self.files, self.folder_of) = (disk(seed), TOPIC);
    }

    /// Nothing is known of what was in the partition's folder that is gone: the one that is there is a new one.
    pub(crate) fn begin_folder(&mut self) {
        if self.lost_folder {
            let Kept { disk, has_replica, .. } = self.kept;
            (self.lost_folder, self.kept) = (false, Kept { disk, has_replica, ..Kept::default() });
        }
    }

    /// An earlier topic of the name was deleted while the broker was down: its folder is there.
    pub(crate) fn leave_folder(&mut self, seed: u64, records: u64, now: i64) {
        self.files = disk(seed);
        self.folder_of = EARLIER_TOPIC;
        let mut log = self.open(Policy::default(), now);
        for number in 0..records {
            let value = u64::MAX - 1_000 + number;
            log.append(&[batch(None, -1, &[(Some(vec![0]), value)], 20, now)], (number / 4) as i32, now)
                .expect("an append");
        }
        log.flush().expect("a flush");
        drop(log);
        self.files = self.files.restart();
    }

    pub(crate) fn open(&self, policy: Policy, now: i64) -> Log {
        let identity = LogIdentity { topic: "topic".into(), topic_id: self.folder_of, partition: 0 };
        let config = LogConfig {
            segment_bytes: if policy.compacts { 1200 } else { 3000 },
            cleanup: Cleanup { delete: !policy.compacts, compact: policy.compacts },
            min_cleanable_dirty_ratio: 0.0,
            retention_bytes: policy.retention_bytes,
            ..LogConfig::default()
        };
        let hints = OpenHints {
            clean_shutdown: false,
            recovery_point: self.kept.flushed,
            log_start_offset: self.kept.log_start,
        };
        let open = |hints| {
            let files = Arc::clone(&self.files) as Arc<dyn Files>;
            Log::open(files, Path::new(DIR), identity.clone(), config.clone(), hints, now).map(|(log, _)| log)
        };
        // It is gone, whatever is known to have been in it: a new follower, once the metadata know.
        let hints = if self.lost_folder { OpenHints::default() } else { hints };
        open(hints).expect("a log that opens")
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
        let (start, end) = (log.log_start_offset(), log.log_end_offset());
        // Whoever begins anew does so with a whole batch.
        let start = if start < end { log.reader().batch_at(start).expect("a batch") } else { start };
        History::of_log(log.leader_epochs(), start, end)
    }

    /// The batches from an offset on, as many as one message takes.
    pub(crate) fn batches_from(&self, from: i64) -> Vec<NewBatch> {
        let reader = self.log.reader();
        let mut cursor = reader.seek(from.max(self.log.log_start_offset())).expect("an offset of the log");
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
            if header.next_offset() > from {
                batches.push(NewBatch { header, bytes: bytes.slice_ref(whole) });
            }
        }
        batches
    }

    /// Everything that the log holds, at its offsets, and where nothing is. `committed` stands for what was deleted, and for
    /// what compaction took: nobody deletes what is not committed.
    pub(crate) fn read_all(&self, committed: &[Entry]) -> (Vec<Entry>, Vec<i64>) {
        let begin = self.log.log_start_offset();
        let begin =
            if begin < self.log.log_end_offset() { self.log.reader().batch_at(begin).expect("a batch") } else { begin };
        let mut entries: Vec<Entry> =
            committed.get(..begin as usize).expect("only what is committed is deleted").to_vec();
        let mut holes = Vec::new();
        while (entries.len() as i64) < self.log.log_end_offset() {
            let batches = self.batches_from(entries.len() as i64);
            assert!(!batches.is_empty(), "the log ends before its end");
            for batch in batches {
                check(&batch.bytes).expect("a sound batch");
                holes.extend(self.extend(&mut entries, &batch, committed));
            }
        }
        (entries, holes)
    }

    /// What can be read of what is committed, in order: compaction left it.
    pub(crate) fn survivors(&self) -> Vec<Entry> {
        let (mut next, end) = (self.log.log_start_offset(), self.high_watermark);
        let mut entries = Vec::new();
        while next < end {
            for batch in self.batches_from(next) {
                let shown = records(&batch).into_iter().filter(|(offset, _)| *offset < end);
                entries.extend(shown.map(|(_, entry)| entry));
                next = batch.header.next_offset();
            }
        }
        entries
    }

    /// Puts a batch's records where they belong. Returns where there is none.
    pub(crate) fn extend(&self, entries: &mut Vec<Entry>, batch: &NewBatch, committed: &[Entry]) -> Vec<i64> {
        let (begin, compacts) = (entries.len() as i64, self.log.config().cleanup.compact);
        assert!(batch.header.base_offset >= begin, "a batch from {} at {begin}", batch.header.base_offset);
        let records: BTreeMap<i64, Entry> = records(batch).into_iter().collect();
        let mut holes = Vec::new();
        for offset in begin..batch.header.next_offset() {
            let entry = records.get(&offset).copied().unwrap_or_else(|| {
                assert!(compacts, "a hole in the log at {offset}");
                holes.push(offset);
                *committed.get(offset as usize).expect("only what is committed is compacted")
            });
            entries.push(entry);
        }
        holes
    }
}

/// What records say, and their keys.
pub(crate) type Keyed = (Option<Vec<u8>>, u64);

/// A record of the producer, with a key where the topic is compacted.
pub(crate) fn keyed(compacts: bool, value: u64) -> Keyed {
    (compacts.then(|| (value % 5).to_le_bytes().to_vec()), value)
}

/// A batch of the producer in an epoch of it, or one of nobody's.
pub(crate) fn batch(epoch: Option<i16>, sequence: i32, records: &[Keyed], padding: usize, now: i64) -> NewBatch {
    let options = match epoch {
        Some(producer_epoch) => {
            BuildOptions { producer_id: 7, producer_epoch, base_sequence: sequence, ..BuildOptions::default() }
        }
        None => BuildOptions::default(),
    };
    let mut builder = BatchBuilder::new(options);
    for (key, value) in records {
        let mut bytes = value.to_le_bytes().to_vec();
        bytes.resize(8 + padding, 0);
        builder.append(now, key.as_deref(), Some(&bytes), &[]);
    }
    let bytes = builder.build().expect("a batch");
    NewBatch { header: check(&bytes).expect("a sound batch"), bytes }
}

/// What the records of a batch say, and where they lie.
pub(crate) fn records(batch: &NewBatch) -> Vec<(i64, Entry)> {
    let records = Records::new(&batch.bytes).expect("a sound batch");
    let entry = |record: headwater_proto::batch::Record| {
        let value = record.value.expect("a value");
        let value = u64::from_le_bytes(value[..8].try_into().expect("eight bytes"));
        (record.offset, (batch.header.leader_epoch, value))
    };
    records.map(|record| entry(record.expect("a sound record"))).collect()
}

/// What the records of a batch say.
pub(crate) fn values(batch: &NewBatch) -> Vec<u64> {
    records(batch).into_iter().map(|(_, (_, value))| value).collect()
}
