//! A consumer group: the coordinator is whoever leads the partition, its records lie among the others, and its members are clients
//! that come, go, fall silent and commit. The group's state machine and the reading of its records are the broker's.

use super::admins::ADMIN;
use super::*;
use headwater_broker::group::offsets::Speaker;
use headwater_broker::group::records::Replay;
use headwater_broker::group::state::Phase;
use headwater_broker::group::waiting::{Asked, Outbox, Questions};
use headwater_broker::group::{
    CommitEntry, Effect as GroupEffect, Effects, Group, GroupError, GroupSettings, Join, Now, PartitionOf, Partitions,
    Report as MemberReport,
};
use headwater_storage::offsets_schema::{OffsetsKey, OffsetsValue};

/// What the group reads: partitions that nobody simulates, but for who owns them.
const READ: TopicId = TopicId::from_bytes([2; 16]);
const READ_NAME: &str = "read";
pub(super) const READ_PARTITIONS: u32 = 3;

/// Values of records from here on stand for records of the group.
pub(crate) const GROUP_VALUES: u64 = 1 << 32;
/// The coordinator's appends, among the requests of a leader.
pub(super) const COORDINATOR: u64 = u64::MAX;
/// The members' place in the network.
pub(super) const MEMBERS: i32 = -4;

const SESSION_TIMEOUT_MS: u32 = 1_500;
/// How often a coordinator asks whether it is one, and how long it waits for an answer.
const CONFIRM_MS: i64 = 1_000;
/// After which a member that hears nothing looks for the coordinator again.
pub(super) const SILENCE_MS: i64 = 700;

/// Groups as a coordinator has them, in one leader epoch.
pub(crate) struct Coordinator {
    group: Group,
    stage: Stage,
    streams: BTreeMap<String, u64>,
    outbox: Outbox<u64, Then>,
    /// The append under way.
    appending: Option<u64>,
    questions: Questions<(u64, ToCoordinator)>,
    confirming: Option<Confirming>,
    /// When the quorum is asked next, though nobody waits for it.
    confirm_at: i64,
}

/// How far a coordinator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What was handed to the log before is being written; this request comes after it.
    Writing(u64),
    /// Everything that was written has to count.
    Counting(i64),
    /// It is asked whether it leads.
    Loading,
    Serving,
}

/// The question to the quorum whether this broker leads still.
#[derive(Debug, Clone, Copy)]
struct Confirming {
    number: u64,
    deadline: i64,
    /// So many commands there were after the question was put.
    index: Option<usize>,
}

/// What a coordinator appends, and in which leader epoch it was decided.
#[derive(Debug, Clone)]
pub(super) struct Handed {
    epoch: i32,
    batch: Option<NewBatch>,
    acks: Acks,
    request: u64,
}

/// What waits for records to be kept.
#[derive(Debug, Clone)]
enum Then {
    Tell(u64, ToMember),
    Update(u64, String, i32, Partitions),
    Out(u64, String),
    Committed(u64, String, PartitionOf, i64),
}

/// What a member asks.
#[derive(Debug, Clone)]
pub(super) enum ToCoordinator {
    Join(Join),
    Report(String, MemberReport),
    Leave(String),
    Commit {
        member: String,
        epoch: i32,
        partition: u32,
        offset: i64,
    },
    Offset {
        member: String,
        epoch: i32,
        partition: u32,
        known: i64,
    },
    /// What was committed of all partitions, for somebody who is no member.
    Look {
        known: Vec<i64>,
    },
}

/// What a member is told.
#[derive(Debug, Clone)]
pub(super) enum ToMember {
    Heard,
    Update(i32, Partitions),
    /// It is out, and comes back as another.
    Out,
    /// This is not the coordinator, or not yet.
    Elsewhere,
    Committed(u32, i64),
    /// What was committed, and what is known to have been when it was asked.
    Offset(u32, i64, i64),
    /// The same of all partitions.
    Seen(Vec<i64>, Vec<i64>),
}

/// The members, and what was seen of the group.
#[derive(Default)]
pub(crate) struct Members {
    members: Vec<Consumer>,
    /// What stands for records of the group.
    records: Vec<(OffsetsKey, Option<OffsetsValue>)>,
    /// Who was given what, and has not let go.
    owners: BTreeMap<PartitionOf, String>,
    /// What each was last told that it may own.
    told: BTreeMap<String, Partitions>,
    /// On which stream.
    told_on: BTreeMap<String, u64>,
    /// Up to where commits were acknowledged, or shown to a member; and in which leader epoch.
    committed: BTreeMap<u32, (i32, i64)>,
    /// Up to where members were delivered records, and asked to commit them.
    delivered: BTreeMap<u32, i64>,
    /// The last epoch that each was told.
    epochs: BTreeMap<String, i32>,
    /// The newest leader epoch in which the group was read.
    read_in: i32,
    /// How many commits were acknowledged.
    pub(crate) commits: u64,
    moved_from: Option<i32>,
}

struct Consumer {
    id: String,
    number: u32,
    epoch: i32,
    owned: Partitions,
    /// The next offset of what it owns, once it knows.
    offsets: BTreeMap<u32, i64>,
    stream: Option<(u64, i32)>,
    heard_ms: i64,
    silent_until: i64,
}

impl Members {
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether the member goes on in a later epoch than this.
    pub(super) fn is_past(&self, id: &str, epoch: i32) -> bool {
        self.members.iter().any(|member| member.id == id && member.epoch > epoch)
    }

    /// Whether the member goes on in this epoch, and not on this stream.
    pub(super) fn goes_on_elsewhere(&self, id: &str, epoch: i32, stream: u64) -> bool {
        let is_it = |member: &Consumer| member.id == id && member.epoch == epoch;
        self.members.iter().any(is_it) && !self.speaks_on(id, stream)
    }

    /// Whether nobody is this member any more: it began anew as another.
    fn is_gone(&self, id: &str) -> bool {
        self.members.iter().all(|member| member.id != id)
    }

    /// What a member has, and what it was told to take.
    fn has_or_is_told(&self, id: &str) -> Vec<PartitionOf> {
        let has = self.members.iter().filter(|member| member.id == id).flat_map(|member| &member.owned);
        let is_heard = self.told_on.get(id).is_some_and(|stream| self.speaks_on(id, *stream));
        has.chain(self.told.get(id).filter(|_| is_heard).into_iter().flatten()).copied().collect()
    }

    /// Up to where commits of a partition were acknowledged, or shown to somebody.
    pub(super) fn committed_of(&self, partition: u32) -> i64 {
        self.committed.get(&partition).map_or(0, |(_, offset)| *offset)
    }

    /// Somebody is told how far a partition was committed: that is no further than members were delivered its records, and stays so.
    pub(super) fn is_shown(&mut self, to: &str, partition: u32, offset: i64) {
        let delivered = self.delivered.get(&partition).copied().unwrap_or(0);
        assert!(offset <= delivered, "{to} is told of {offset}, and {delivered} were delivered");
        let committed = self.committed.entry(partition).or_default();
        committed.1 = committed.1.max(offset);
    }

    /// Whether this is the stream on which the member listens.
    fn speaks_on(&self, id: &str, stream: u64) -> bool {
        let is_it = |member: &Consumer| member.id == id && member.stream.is_some_and(|(on, _)| on == stream);
        self.members.iter().any(is_it)
    }
}

impl Coordinator {
    /// One that reads the group once everything before this request is written.
    fn new(request: u64) -> Coordinator {
        Coordinator {
            group: Group::new("group"),
            stage: Stage::Writing(request),
            streams: BTreeMap::new(),
            outbox: Outbox::default(),
            appending: None,
            questions: Questions::default(),
            confirming: None,
            confirm_at: 0,
        }
    }
}

impl Consumer {
    fn begin_anew(&mut self) {
        self.number += 1;
        let (name, _) = self.id.rsplit_once('-').expect("its number");
        self.id = format!("{name}-{}", self.number);
        (self.epoch, self.stream) = (0, None);
        self.owned.clear();
        self.offsets.clear();
    }
}

fn settings() -> GroupSettings {
    GroupSettings {
        session_timeout_ms: SESSION_TIMEOUT_MS,
        min_session_timeout_ms: 100,
        max_session_timeout_ms: 10_000,
        heartbeat_interval_ms: 300,
        rebalance_timeout_ms: 2_000,
        max_size: 100,
        offsets_partitions: 1,
        offsets_replication_factor: 3,
        offsets_retention_minutes: 10_000,
        offsets_check_interval_ms: 600_000,
    }
}

fn now(local: i64) -> Now {
    Now { monotonic_ms: local as u64, wall_ms: local }
}

impl World {
    /// Members come, and the topic that they read.
    pub(super) fn begin_group(&mut self) {
        for place in 0..3 {
            let member = Consumer {
                id: format!("member-{place}-0"),
                number: 0,
                epoch: 0,
                owned: Partitions::new(),
                offsets: BTreeMap::new(),
                stream: None,
                heard_ms: 0,
                silent_until: 0,
            };
            self.members.members.push(member);
            self.at(100, Event::Member(place));
        }
        self.at(100, Event::Admin);
        self.at(1_000, Event::Isolate);
    }

    /// The topic that they read is made, however often it takes.
    fn create_read(&mut self) {
        let Some(first) = self.truth.brokers().next().map(|broker| broker.id) else { return };
        let create = command::CreateTopic {
            name: READ_NAME.into(),
            topic_id: READ.to_wire(),
            partitions: (0..READ_PARTITIONS).map(|_| command::Replicas { brokers: vec![first] }).collect(),
            ..command::CreateTopic::default()
        };
        self.propose(first, Kind::CreateTopic(create).into(), None);
    }

    // The coordinator.

    /// Whoever leads, sees everything that was written, and knows since that it leads still, reads the group and serves it.
    pub(super) fn coordinate(&mut self, id: i32) {
        if self.members.members.is_empty() {
            return;
        }
        let local = self.local(id);
        let node = &mut self.nodes[id as usize - 1];
        let Some(process) = &mut node.process else { return };
        let epoch = process.role_of.1;
        if process.coordinator.as_ref().is_some_and(|(known, _)| *known != epoch) {
            process.coordinator = None;
        }
        let state = match &mut process.role {
            Role::Leader { state, .. } if !state.leader().is_ended() => state,
            _ => return,
        };
        if process.metadata.topic(READ_NAME).is_none() {
            return;
        }
        let (high_watermark, has_lease) = (process.high_watermark, state.leader().has_lease());
        let Some((_, coordinator)) = &mut process.coordinator else {
            self.next_stream += 1;
            let request = self.next_stream;
            process.coordinator = Some((epoch, Box::new(Coordinator::new(request))));
            return self.hand_over(id, Handed { epoch, batch: None, acks: Acks::Leader, request });
        };
        if matches!(coordinator.stage, Stage::Counting(end) if high_watermark >= end) {
            coordinator.stage = Stage::Loading;
            return self.confirm(id);
        }
        let answer = coordinator.confirming.and_then(|confirming| match confirming.index {
            Some(index) if process.applied >= index => {
                let known = process.metadata.topic_by_id(&TOPIC).and_then(|topic| topic.partitions.first());
                Some(known.is_some_and(|known| (known.leader, known.leader_epoch) == (id, epoch)))
            }
            _ => (local > confirming.deadline).then_some(false),
        });
        if let Some(leads) = answer {
            self.confirmed(id, leads);
        }
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        if coordinator.stage != Stage::Serving {
            return;
        }
        let is_time = !coordinator.streams.is_empty() && local >= coordinator.confirm_at;
        if is_time && has_lease {
            // Nobody took it for dead: if the partition is led elsewhere, it hears of that.
            coordinator.confirm_at = local + CONFIRM_MS;
        }
        if coordinator.questions.asks_now(is_time && !has_lease) {
            self.confirm(id);
        }
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        if coordinator.group.next_deadline_ms().is_some_and(|deadline| deadline <= local as u64) {
            let effects = coordinator.group.tick(now(local), &process.metadata);
            self.decided(id, effects, Vec::new());
        }
    }

    /// Asks the quorum whether this broker leads still.
    fn confirm(&mut self, id: i32) {
        let (local, delay) = (self.local(id), self.delay());
        let is_lost = self.is_cut(id, QUORUM) || (!self.healing && self.random.percent(3));
        self.next_stream += 1;
        let number = self.next_stream;
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        coordinator.questions.begin();
        coordinator.confirming = Some(Confirming { number, deadline: local + CONFIRM_MS, index: None });
        coordinator.confirm_at = local + CONFIRM_MS;
        let member = process.me;
        if !is_lost {
            self.at(delay, Event::Confirm(id, member, number));
        }
    }

    pub(super) fn asked_how_far(&mut self, id: i32, member: Member, number: u64) {
        let (index, delay) = (self.commands.len(), self.delay());
        if !self.is_cut(QUORUM, id) {
            self.at(delay, Event::Confirmed(id, member, number, index));
        }
    }

    pub(super) fn told_how_far(&mut self, id: i32, member: Member, number: u64, index: usize) {
        let Some(process) = self.process(id, member) else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        if let Some(confirming) = coordinator.confirming.as_mut().filter(|confirming| confirming.number == number) {
            confirming.index = Some(index);
        }
    }

    /// It is known whether this broker led after the question was put.
    fn confirmed(&mut self, id: i32, leads: bool) {
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        coordinator.confirming = None;
        let (questions, is_loading) = (coordinator.questions.answered(), coordinator.stage == Stage::Loading);
        if leads {
            if is_loading {
                self.load(id);
            }
            return questions.into_iter().for_each(|(stream, asked)| self.serve_member(id, stream, asked));
        }
        let ended: Vec<u64> = coordinator.streams.values().copied().collect();
        process.coordinator = None;
        self.reached.unconfirmed = true;
        self.note(format_args!("nobody confirms that {id} coordinates still"));
        for stream in questions.into_iter().map(|(stream, _)| stream).chain(ended) {
            self.tell(id, stream, ToMember::Elsewhere);
        }
    }

    /// Reads the group.
    fn load(&mut self, id: i32) {
        let local = self.local(id);
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        // Whom the one before put out, and could not tell any more.
        for (_, value) in &process.mirror[..process.high_watermark as usize] {
            let record = value.checked_sub(GROUP_VALUES).and_then(|n| self.members.records.get(n as usize));
            if let Some((OffsetsKey::Member { member, .. }, None)) = record {
                self.members.owners.retain(|_, owner| owner != member);
                self.members.told.remove(member);
            }
        }
        let mut replay = Replay::default();
        for (_, value) in process.survivors() {
            if let Some((key, value)) =
                value.checked_sub(GROUP_VALUES).and_then(|n| self.members.records.get(n as usize))
            {
                replay.apply(key.clone(), value.clone());
            }
        }
        let (mut groups, effects) = replay.finish(now(local), &process.metadata, &settings(), 0);
        let group = groups.remove("group").unwrap_or_else(|| Group::new("group"));
        let standing = group.members().iter().fold(String::new(), |all, (id, member)| {
            let numbers = |partitions: &Partitions| partitions.iter().map(|(_, n)| *n).collect::<Vec<_>>();
            format!(
                "{all} {id} {:?} in {}, letting go {:?};",
                numbers(&member.assigned),
                member.epoch,
                numbers(&member.revoking)
            )
        });
        let Some((epoch, coordinator)) = &mut process.coordinator else { return };
        let epoch = *epoch;
        (coordinator.group, coordinator.stage) = (group, Stage::Serving);
        self.members.read_in = self.members.read_in.max(epoch);
        self.reached.coordinator_moved |= self.members.moved_from.is_some_and(|from| from != id);
        self.members.moved_from = Some(id);
        self.note(format_args!("{id} coordinates in epoch {epoch}: {standing}"));
        for (_, effects) in effects {
            self.decided(id, effects, Vec::new());
        }
    }

    pub(super) fn asked(&mut self, id: i32, stream: u64, asked: ToCoordinator) {
        self.note(format_args!("{id} is asked {asked:?} on {stream}"));
        let elsewhere = |world: &mut World| world.tell(id, stream, ToMember::Elsewhere);
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let is_led = matches!(&process.role, Role::Leader { state, .. } if !state.leader().is_ended());
        let has_lease = matches!(&process.role, Role::Leader { state, .. } if state.leader().has_lease());
        let coordinator = process.coordinator.as_mut().map(|(_, coordinator)| coordinator);
        let Some(coordinator) = coordinator.filter(|it| is_led && it.stage == Stage::Serving) else {
            return elsewhere(self);
        };
        if matches!(asked, ToCoordinator::Look { .. }) {
            let leads = self.truth.topic_by_id(&TOPIC).and_then(|topic| topic.partitions.first()).map(|it| it.leader);
            self.reached.former_looked_at |= leads != Some(id);
        }
        // What another one may have changed by now is not told, nor anybody taken in, before it is known that there is none.
        let at_once = match asked {
            ToCoordinator::Join(_) | ToCoordinator::Offset { .. } | ToCoordinator::Look { .. } => {
                coordinator.questions.ask((stream, asked), has_lease)
            }
            asked => Asked::Answered((stream, asked)),
        };
        match at_once {
            Asked::Waits => {}
            Asked::Answered((stream, asked)) => self.serve_member(id, stream, asked),
            Asked::Refused(_) => elsewhere(self),
        }
    }

    fn serve_member(&mut self, id: i32, stream: u64, asked: ToCoordinator) {
        let local = self.local(id);
        let elsewhere = |world: &mut World| world.tell(id, stream, ToMember::Elsewhere);
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let metadata = process.metadata.clone();
        let Some((_, coordinator)) = process.coordinator.as_mut() else { return elsewhere(self) };
        let group = &mut coordinator.group;
        let is_current = |member: &String| coordinator.streams.get(member) == Some(&stream);
        let decided: Result<(Effects, Vec<Then>), GroupError> = match asked {
            ToCoordinator::Join(join) => {
                let (member, owned) = (join.member_id.clone(), join.owned.clone());
                let joined = group.join(now(local), join, &metadata, &settings());
                if joined.is_ok() {
                    // What an earlier stream may still bring does not reach the member any more; whoever is gone has said nothing since.
                    let is_newest = self.members.speaks_on(&member, stream) || self.members.is_gone(&member);
                    if is_newest {
                        self.members.told.remove(&member);
                    }
                    // On an earlier stream it spoke of what it had then, and may have been given more since.
                    let has: Vec<PartitionOf> = match is_newest {
                        true => Vec::new(),
                        false => self.members.has_or_is_told(&member),
                    };
                    let keeps = |partition: &PartitionOf| owned.contains(partition) || has.contains(partition);
                    self.members.owners.retain(|partition, owner| *owner != member || keeps(partition));
                    coordinator.streams.insert(member, stream);
                }
                joined.map(|effects| (effects, Vec::new()))
            }
            ToCoordinator::Report(member, _) | ToCoordinator::Leave(member) if !is_current(&member) => {
                return elsewhere(self);
            }
            ToCoordinator::Report(member, report) => {
                let owned = report.owned.clone();
                let effects = group.heartbeat(now(local), &member, report, &metadata);
                if effects.is_ok() {
                    let told = self.members.told.entry(member.clone()).or_default();
                    let keeps = |partition: &PartitionOf| owned.contains(partition) || told.contains(partition);
                    self.members.owners.retain(|partition, owner| *owner != member || keeps(partition));
                }
                effects.map(|effects| (effects, vec![Then::Tell(stream, ToMember::Heard)]))
            }
            ToCoordinator::Leave(member) => {
                group.leave(now(local), &member, false, &metadata).map(|effects| (effects, Vec::new()))
            }
            ToCoordinator::Commit { member, epoch, partition, offset } => {
                let entry = CommitEntry {
                    topic: READ_NAME.into(),
                    topic_id: READ,
                    partition,
                    offset,
                    leader_epoch: -1,
                    metadata: String::new(),
                };
                let speaker = Speaker::Member { id: &member, epoch };
                let committed = group.commit(now(local), speaker, vec![entry], &metadata);
                let then = vec![Then::Committed(stream, member.clone(), (READ, partition), offset)];
                match committed {
                    Ok((effects, _)) => Ok((effects, then)),
                    // Only this commit is refused.
                    Err(_) => Ok((Effects::new(), Vec::new())),
                }
            }
            ToCoordinator::Offset { member, epoch, partition, known } => {
                match group.check_speaker(Speaker::Member { id: &member, epoch }) {
                    Ok(()) => {
                        let offset = group.offset(READ_NAME, partition).map_or(0, |committed| committed.offset);
                        let told = ToMember::Offset(partition, offset, known);
                        Ok((Effects::new(), vec![Then::Tell(stream, told)]))
                    }
                    Err(_) => Ok((Effects::new(), Vec::new())),
                }
            }
            ToCoordinator::Look { known } => {
                let offset = |n| group.offset(READ_NAME, n).map_or(0, |committed| committed.offset);
                let seen = (0..READ_PARTITIONS).map(offset).collect();
                Ok((Effects::new(), vec![Then::Tell(stream, ToMember::Seen(seen, known))]))
            }
        };
        match decided {
            Ok((effects, then)) => self.decided(id, effects, then),
            Err(error) => {
                self.note(format_args!("{id} refuses a member: {error}"));
                self.tell(id, stream, ToMember::Out);
            }
        }
    }

    /// What a group decided is appended, and what it makes visible waits until that is kept.
    fn decided(&mut self, id: i32, effects: Effects, then: Vec<Then>) {
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        let mut visible = Vec::new();
        for effect in effects {
            match effect {
                GroupEffect::Write(key, value) => {
                    coordinator.outbox.write(self.members.records.len() as u64);
                    self.members.records.push((key, value));
                }
                GroupEffect::Update { member_id, epoch, assigned } => {
                    if let Some(stream) = coordinator.streams.get(&member_id) {
                        visible.push(Then::Update(*stream, member_id, epoch, assigned));
                    }
                }
                GroupEffect::Expel { member_id, .. } | GroupEffect::Left { member_id } => {
                    let stream = coordinator.streams.remove(&member_id).unwrap_or(0);
                    visible.push(Then::Out(stream, member_id));
                }
            }
        }
        visible.extend(then);
        let visible: Vec<Then> = visible.into_iter().filter_map(|then| coordinator.outbox.defer(then)).collect();
        self.show(id, visible);
        self.append_gathered(id);
    }

    fn append_gathered(&mut self, id: i32) {
        let now = self.now;
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((epoch, coordinator)) = &mut process.coordinator else { return };
        let Some(gathered) = coordinator.outbox.next_append() else { return };
        let key = |place: &u64| self.members.records[*place as usize].0.encode().expect("a key").to_vec();
        let records: Vec<_> = gathered.iter().map(|place| (Some(key(place)), GROUP_VALUES + place)).collect();
        self.checks.keys.extend(records.iter().map(|(key, value)| (*value, key.clone().unwrap_or_default())));
        self.next_stream += 1;
        coordinator.appending = Some(self.next_stream);
        let batch = Some(batch(None, -1, &records, 0, now));
        // Groups as of this epoch: another coordinator may have decided otherwise since.
        let handed = Handed { epoch: *epoch, batch, acks: Acks::All, request: self.next_stream };
        self.hand_over(id, handed);
    }

    /// What a coordinator appends waits until the partition takes it, in order; meanwhile the partition may be led elsewhere, and here again.
    fn hand_over(&mut self, id: i32, handed: Handed) {
        let delay = match self.random.below(100) {
            _ if self.healing => 0,
            0..3 => self.random.between(100, 3_000),
            3..15 => self.random.between(1, 60),
            _ => 0,
        };
        let now = self.now;
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let at = process.handed_until.max(now + delay);
        let member = process.me;
        if at == now {
            return self.handed(id, member, handed);
        }
        process.handed_until = at;
        self.at(at - now, Event::Handed(id, member, Box::new(handed)));
    }

    pub(super) fn handed(&mut self, id: i32, member: Member, handed: Handed) {
        let Some(process) = self.process(id, member) else { return };
        let Handed { epoch, batch, acks, request } = handed;
        match &mut process.role {
            Role::Leader { state, .. } => {
                let (epoch, batches, reply) = (Some(epoch), Vec::from_iter(batch), (COORDINATOR, request));
                let bytes = batches.iter().map(|batch| batch.bytes.len()).sum();
                state.append(Append { epoch, batches, check: None, bytes, acks, reply });
            }
            _ => self.group_kept(id, request, false),
        }
    }

    /// An append of the coordinator is kept, or is not: then the group is read anew.
    pub(super) fn group_kept(&mut self, id: i32, request: u64, is_kept: bool) {
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some((_, coordinator)) = &mut process.coordinator else { return };
        if coordinator.stage == Stage::Writing(request) && is_kept {
            coordinator.stage = Stage::Counting(process.log.log_end_offset());
            return;
        }
        let waits = coordinator.appending.take_if(|waits| *waits == request).is_some();
        if !is_kept && (waits || coordinator.stage == Stage::Writing(request)) {
            process.coordinator = None;
            return;
        }
        if !waits {
            return;
        }
        let visible = coordinator.outbox.appended();
        self.show(id, visible);
        self.append_gathered(id);
    }

    fn show(&mut self, id: i32, visible: Vec<Then>) {
        for then in visible {
            match then {
                Then::Tell(stream, told) => self.tell(id, stream, told),
                // It listens on another stream by now, and never hears of this.
                Then::Update(stream, member, ..) if !self.members.speaks_on(&member, stream) => {}
                Then::Update(stream, member, epoch, assigned) => {
                    for partition in &assigned {
                        let owner = self.members.owners.insert(*partition, member.clone());
                        assert!(
                            owner.as_ref().is_none_or(|owner| *owner == member),
                            "{member} is given what {owner:?} has not let go: {partition:?}"
                        );
                    }
                    self.note(format_args!("{id} gives {member} {} partitions in {epoch}", assigned.len()));
                    let last = self.members.epochs.insert(member.clone(), epoch);
                    assert!(last.is_none_or(|last| last <= epoch), "{member} was in {last:?}, and is in {epoch}");
                    self.members.told_on.insert(member.clone(), stream);
                    self.members.told.insert(member, assigned.clone());
                    self.tell(id, stream, ToMember::Update(epoch, assigned));
                }
                Then::Out(stream, member) => {
                    self.note(format_args!("{id} puts {member} out"));
                    self.members.owners.retain(|_, owner| *owner != member);
                    self.members.told.remove(&member);
                    self.tell(id, stream, ToMember::Out);
                }
                Then::Committed(stream, member, partition, offset) => {
                    // An earlier coordinator may hear late that what it wrote was kept: somebody else may own it by now.
                    let epoch = self.nodes[id as usize - 1].process.as_ref().map_or(0, |process| process.role_of.1);
                    let owner = self.members.owners.get(&partition);
                    assert!(
                        owner.is_none_or(|owner| *owner == member) || epoch < self.members.read_in,
                        "{member} commits what {owner:?} owns: {partition:?}"
                    );
                    let committed = self.members.committed.entry(partition.1).or_default();
                    let (of, known) = *committed;
                    assert!(
                        offset >= known || epoch < of,
                        "the commit of {partition:?} goes back from {known} to {offset}"
                    );
                    *committed = (of.max(epoch), known.max(offset));
                    self.members.commits += 1;
                    self.reached.committed_offset = true;
                    self.tell(id, stream, ToMember::Committed(partition.1, offset));
                }
            }
        }
    }

    fn tell(&mut self, id: i32, stream: u64, told: ToMember) {
        if stream > 0 {
            let to = if self.admin.listens_on(stream) { ADMIN } else { MEMBERS };
            self.send(id, to, stream, Message::ToMember(stream, told));
        }
    }

    // The members.

    pub(super) fn member(&mut self, place: usize) {
        let next = self.random.between(50, 150);
        self.at(next, Event::Member(place));
        if place == 0 && self.truth.topic(READ_NAME).is_none() {
            self.create_read();
        }
        let clock = self.now;
        let luck = if self.healing { 1_000 } else { self.random.below(1_000) };
        let silent_for = self.random.between(500, 4_000);
        let leader = self.leader_by_hearsay();
        let known: Vec<i64> = (0..READ_PARTITIONS).map(|n| self.members.committed_of(n)).collect();
        self.next_stream += 1;
        let new_stream = self.next_stream;
        let (commits, forgets) = (self.random.percent(40), self.random.percent(10));
        let member = &mut self.members.members[place];
        if clock < member.silent_until && !self.healing {
            return;
        }
        if luck < 6 {
            member.silent_until = clock + silent_for;
            return;
        }
        if (12..18).contains(&luck) {
            // It starts anew, and says so to nobody.
            return member.begin_anew();
        }
        if member.stream.is_some() && clock - member.heard_ms > SILENCE_MS {
            member.stream = None;
        }
        let mut asked = Vec::new();
        let (stream, to) = match member.stream {
            None => {
                let Some(to) = leader.filter(|leader| *leader >= 0) else { return };
                (member.stream, member.heard_ms) = (Some((new_stream, to)), clock);
                asked.push(ToCoordinator::Join(Join {
                    member_id: member.id.clone(),
                    topics: [READ_NAME.to_owned()].into(),
                    owned: member.owned.clone(),
                    member_epoch: member.epoch,
                    ..Join::default()
                }));
                (new_stream, to)
            }
            Some(stream) if luck < 12 => {
                asked.push(ToCoordinator::Leave(member.id.clone()));
                stream
            }
            Some(stream) => {
                if forgets {
                    // It asks anew from where it is to read.
                    member.offsets.clear();
                }
                let report = MemberReport { member_epoch: member.epoch, owned: member.owned.clone(), topics: None };
                asked.push(ToCoordinator::Report(member.id.clone(), report));
                for (_, partition) in &member.owned {
                    let (partition, id, epoch) = (*partition, member.id.clone(), member.epoch);
                    match member.offsets.get(&partition) {
                        None => {
                            let known = known[partition as usize];
                            asked.push(ToCoordinator::Offset { member: id, epoch, partition, known });
                        }
                        Some(offset) if commits => {
                            let offset = *offset + 1;
                            asked.push(ToCoordinator::Commit { member: id, epoch, partition, offset });
                        }
                        Some(_) => {}
                    }
                }
                stream
            }
        };
        for asked in asked {
            if let ToCoordinator::Commit { partition, offset, .. } = &asked {
                let delivered = self.members.delivered.entry(*partition).or_default();
                *delivered = (*delivered).max(*offset);
            }
            self.send(MEMBERS, to, stream, Message::ToCoordinator(stream, asked));
        }
    }

    pub(super) fn told(&mut self, on: u64, told: ToMember) {
        let clock = self.now;
        let is_on = |member: &&mut Consumer| member.stream.is_some_and(|(stream, _)| stream == on);
        let Some(member) = self.members.members.iter_mut().find(is_on) else { return };
        member.heard_ms = clock;
        match told {
            ToMember::Heard | ToMember::Seen(..) => {}
            ToMember::Update(epoch, assigned) => {
                member.epoch = epoch;
                member.owned = assigned;
                let owned = &member.owned;
                member.offsets.retain(|partition, _| owned.contains(&(READ, *partition)));
            }
            ToMember::Out => member.begin_anew(),
            ToMember::Elsewhere => member.stream = None,
            ToMember::Committed(partition, offset) => {
                if let Some(known) = member.offsets.get_mut(&partition) {
                    *known = (*known).max(offset);
                }
            }
            ToMember::Offset(partition, offset, known) => {
                assert!(offset >= known, "{} is told that {offset} of {known} were committed", member.id);
                if member.owned.contains(&(READ, partition)) {
                    member.offsets.entry(partition).or_insert(offset);
                }
                let id = member.id.clone();
                self.members.is_shown(&id, partition, offset);
            }
        }
    }

    /// Every partition has one owner, every member knows, and commits are taken.
    pub(super) fn is_group_settled(&self) -> bool {
        if self.members.members.is_empty() {
            return true;
        }
        let Some(partition) = self.partition() else { return false };
        let Some(node) = self.nodes.iter().find(|node| node.id == partition.leader) else { return false };
        let coordinator = node.process.as_ref().and_then(|process| process.coordinator.as_ref());
        let Some((_, coordinator)) = coordinator else { return false };
        let group = &coordinator.group;
        let owns = |member: &Consumer| {
            group
                .members()
                .get(&member.id)
                .is_some_and(|known| known.epoch == member.epoch && known.assigned == member.owned)
        };
        coordinator.stage == Stage::Serving
            && coordinator.outbox.is_empty()
            && self.members.commits > self.at_heal.1
            && group.phase() == Phase::Stable
            && group.members().len() == self.members.members.len()
            && self.members.members.iter().all(owns)
            && self.members.owners.len() == READ_PARTITIONS as usize
    }
}
