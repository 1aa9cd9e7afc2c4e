//! The scheduler: a virtual clock, a network, a quorum. What brokers do is in `broker.rs`, what goes wrong in `trouble.rs`.

mod admins;
mod broker;
pub(crate) mod groups;
mod log;
mod people;
mod producing;
mod readers;
mod trouble;

use self::admins::Admin;
use self::groups::{COORDINATOR, Handed, Members, ToCoordinator, ToMember};
use self::readers::{Fetched, Reader};
use crate::checks::Checks;
use crate::node::{
    Chore, FollowerJob, Kept, Node, Policy, Process, RequestId, Role, Stream, TOPIC, batch, keyed, records, values,
};
use crate::producer::Producer;
use crate::random::Random;
use headwater_broker::error::PartitionError;
use headwater_broker::metadata::boots::Boots;
use headwater_broker::metadata::command::{self, Command, command::Command as Kind};
use headwater_broker::metadata::raft::sessions::{Decision, Says, Sessions};
use headwater_broker::metadata::state::{BrokerState, FEATURE_LEVEL};
use headwater_broker::metadata::{MetadataState, Outcome as Applied, Partition};
use headwater_broker::partition::is_of_another_topic;
use headwater_broker::partition::state::{
    Append, AppendResult, Effect as LeaderEffect, Job, Limits, Offsets, PartitionState, Request,
};
use headwater_broker::replica::follower::{self, BatchSpan, FollowerState, Push, Replica, Take};
use headwater_broker::replica::history::{History, Verdict};
use headwater_broker::replica::leader::{AlterPartition, Altered, View};
use headwater_broker::replica::{Hello, Member, Report, Tenure};
use headwater_broker::topic_config::{TopicConfig, TopicDurability};
use headwater_proto::TopicId;
use headwater_proto::wire::{self as proto, Acks};
use headwater_storage::{BatchOutcome, NewBatch, SequenceError};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Arguments;

/// Milliseconds of trouble, and those that a healed cluster gets.
const TROUBLE_MS: i64 = 6_000;
const HEALED_MS: i64 = 20_000;
/// More than any seed takes: whoever does has come to a stop.
const MAX_STEPS: u64 = 1_000_000;
const TICK_MS: i64 = 50;
const SESSION_MS: i64 = 600;
const LEASE_MS: i64 = 400;
/// A look that comes so much later: the process stood still, and heard nothing.
const STOOD_STILL_MS: i64 = 150;
const LAG_MS: u64 = 800;
/// After which a proposal without an answer counts as unknown, and a stream without a word as dead.
const PATIENCE_MS: i64 = 500;

/// What a seed reached.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reached {
    pub(crate) isr_of_one: bool,
    pub(crate) eligible_elected: bool,
    pub(crate) truncation: bool,
    pub(crate) controller_lost: bool,
    pub(crate) duplicate_after_failover: bool,
    pub(crate) torn_write: bool,
    pub(crate) proposal_unknown: bool,
    pub(crate) unclean_elected: bool,
    pub(crate) reassigned: bool,
    pub(crate) drained: bool,
    pub(crate) disk_emptied: bool,
    pub(crate) setting_changed: bool,
    pub(crate) led_on: bool,
    pub(crate) coordinator_moved: bool,
    pub(crate) committed_offset: bool,
    pub(crate) records_deleted: bool,
    pub(crate) begun_anew: bool,
    pub(crate) read_from_follower: bool,
    pub(crate) latest_awaited: bool,
    pub(crate) compacted: bool,
    pub(crate) retained: bool,
    pub(crate) loss_claimed: bool,
    pub(crate) replica_fenced: bool,
    pub(crate) broker_added: bool,
    pub(crate) broker_removed: bool,
    pub(crate) folder_left: bool,
    pub(crate) healed: bool,
    pub(crate) unconfirmed: bool,
    pub(crate) disk_hung: bool,
    pub(crate) message_lost: bool,
    pub(crate) message_twice: bool,
    pub(crate) cut_one_way: bool,
    pub(crate) cut_both_ways: bool,
    pub(crate) paused: bool,
    pub(crate) all_off: bool,
    pub(crate) clocks_apart: bool,
    pub(crate) older_disk: bool,
    pub(crate) window_full: bool,
    pub(crate) too_large: bool,
    pub(crate) producer_epoch: bool,
    pub(crate) timed_out_sent: bool,
    pub(crate) timed_out_unsent: bool,
    pub(crate) damaged: bool,
    pub(crate) isolated: bool,
    pub(crate) former_looked_at: bool,
}

/// What became of a seed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) trace: u64,
    pub(crate) committed: usize,
    pub(crate) elections: i32,
    pub(crate) reached: Reached,
}

#[derive(Debug)]
enum Event {
    Tick(i32, Member),
    Apply(i32, Member),
    Deliver(Box<Envelope>),
    Job(i32, Member, Box<Work>),
    /// The segments that a compaction makes are written.
    Compact(i32, Member),
    /// A command reaches the quorum's log.
    Commit(Box<Proposal>),
    /// Nobody answered a proposal in time, or somebody did.
    Answer(i32, Member, i32, Answer),
    Start(i32),
    /// The disk of a broker, which has said so, loses the partition.
    LoseFolder(i32),
    Elect,
    Trouble,
    People,
    /// A broker that drained stops.
    Stop(i32, Option<Member>),
    /// The completion of a follower's flush comes.
    Flushed(i32, Member, Tenure, i64),
    Heal(i32, i32),
    /// The quorum is asked how far its log goes, and answers.
    Confirm(i32, Member, u64),
    Confirmed(i32, Member, u64, usize),
    Producer,
    Reader,
    Member(usize),
    Admin,
    Isolate,
    /// Settings come that the metadata have had for a while.
    Configure(i32, Member),
    /// What a coordinator appends reaches the partition.
    Handed(i32, Member, Box<Handed>),
}

#[derive(Debug)]
enum Work {
    Commit(Vec<Request>, i32, bool),
    Flush,
    Chore(Chore),
    Follower(FollowerJob),
}

#[derive(Debug, Clone)]
struct Proposal {
    from: i32,
    member: Member,
    command: command::Command,
    /// The partition epoch of an `AlterPartition`, and whether its outcome is told.
    alter: Option<(i32, bool)>,
    /// Who is told what a producer is given, and what was asked for.
    call: Option<(u64, proto::AllocateProducerId)>,
}

#[derive(Debug, Clone)]
enum Answer {
    Refused,
    Unknown,
}

#[derive(Debug, Clone)]
struct Envelope {
    from: i32,
    to: i32,
    /// Both ends of the connection; without, it is a datagram.
    connection: Option<(u64, Option<Member>)>,
    message: Message,
}

#[derive(Debug, Clone)]
enum Message {
    Heartbeat(Member, Says),
    Hello(u64, Hello),
    Verdict(u64, Tenure, Verdict),
    Push(u64, Push, Vec<NewBatch>),
    Report(Report),
    /// The producer asks for an identity, for a stream, for records to be appended; each on a connection.
    AllocateProducerId(u64, proto::AllocateProducerId),
    ProducerId(u64, Result<proto::AllocateProducerIdResponse, proto::Error>),
    OpenProduce(u64, proto::OpenProduce),
    Opened(u64, proto::ProduceOpened),
    Produce(u64, proto::ProduceRequest, bytes::Bytes),
    Produced(u64, proto::ProduceResponse),
    /// A reader asks from an offset on, and where the log ends for readers.
    Fetch(i64),
    Fetched(Fetched),
    ToCoordinator(u64, ToCoordinator),
    ToMember(u64, ToMember),
}

/// The producer's place in the network.
const CLIENT: i32 = -1;
/// The quorum's.
const QUORUM: i32 = -2;
/// The reader's.
const READER: i32 = -3;

pub(crate) struct World {
    random: Random,
    seed: u64,
    now: i64,
    steps: u64,
    queue: BTreeMap<(i64, u64), Event>,
    next_event: u64,
    nodes: Vec<Node>,
    topic: TopicConfig,
    policy: Policy,
    /// How many brokers there are at first.
    first_brokers: i32,
    /// What the producer had made when all was mended, and what members had committed.
    at_heal: (u64, u64),
    /// Whether the topic asks for unclean elections.
    unclean: bool,
    /// The quorum's log, and the state after all of it.
    commands: Vec<command::Command>,
    truth: MetadataState,
    leaderless_since: i64,
    proposals: BTreeMap<i32, usize>,
    cut: BTreeSet<(i32, i32)>,
    slow: bool,
    broken: BTreeSet<u64>,
    next_stream: u64,
    last_on: BTreeMap<(u64, i32), i64>,
    producer: Producer,
    reader: Reader,
    has_group: bool,
    members: Members,
    admin: Admin,
    checks: Checks,
    healing: bool,
    /// Whether a broker was given the folder of an earlier topic.
    has_left_folder: bool,
    trace: u64,
    reached: Reached,
    verbose: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut random = Random::new(seed);
        let count = random.between(2, 5) as i32;
        let durability = if random.percent(75) { TopicDurability::Flushed } else { TopicDurability::Replicated };
        let replicas = i64::from(count.min(3));
        let topic = TopicConfig {
            durability,
            min_insync_replicas: random.between(1, replicas - i64::from(replicas > 2)) as u32,
            flush_ms: 200,
            ..TopicConfig::default()
        };
        let unclean = random.percent(15);
        let has_group = !unclean && random.percent(50);
        // Of groups' records nothing is deleted but what later ones say anew.
        // What an unclean election takes, and what was deleted before it, cannot be told apart here.
        let policy = match random.below(10) {
            _ if unclean => Policy::default(),
            0..4 => Policy { compacts: true, ..Policy::default() },
            4..7 if !has_group => Policy { retention_bytes: Some(4_000), ..Policy::default() },
            _ => Policy::default(),
        };
        // Nothing that is acknowledged rests on clocks.
        let (slowest, fastest) = if random.percent(50) { (950, 1050) } else { (600, 1700) };
        let nodes = (1..=count)
            .map(|id| Node::new(id, random.next(), (random.between(slowest, fastest), random.between(0, 100_000))))
            .collect();
        // Mostly a record has time enough for everything to be mended.
        let delivery_timeout_ms = if random.percent(60) { 120_000 } else { random.between(200, 2_500) as u64 };
        let first_brokers = if count > 2 && random.percent(30) { count - 1 } else { count };
        let mut world = World {
            random,
            seed,
            now: 1,
            steps: 0,
            queue: BTreeMap::new(),
            next_event: 0,
            nodes,
            topic,
            policy,
            first_brokers,
            at_heal: (0, 0),
            unclean,
            commands: Vec::new(),
            truth: MetadataState::new("simulated"),
            leaderless_since: 0,
            proposals: BTreeMap::new(),
            cut: BTreeSet::new(),
            slow: false,
            broken: BTreeSet::new(),
            next_stream: 0,
            last_on: BTreeMap::new(),
            producer: Producer::new(policy.compacts, delivery_timeout_ms),
            reader: Reader::default(),
            has_group: false,
            members: Members::default(),
            admin: Admin::default(),
            checks: Checks::default(),
            healing: false,
            has_left_folder: false,
            trace: 0xcbf2_9ce4_8422_2325,
            reached: Reached::default(),
            verbose: std::env::var_os("SIMULATION_TRACE").is_some(),
        };
        let speeds = world.nodes.iter().map(|node| node.clock.0);
        world.reached.clocks_apart =
            speeds.clone().max().zip(speeds.min()).is_some_and(|(fast, slow)| fast > slow * 3 / 2);
        // As the first broker of a cluster does.
        let begins: Command = Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: FEATURE_LEVEL }).into();
        world.truth.apply(1, &begins).expect("nobody is older");
        world.commands.push(begins);
        for id in 1..=first_brokers {
            world.start(id);
        }
        world.has_group = has_group;
        world.at(20, Event::Elect);
        world.at(50, Event::Producer);
        world
    }

    /// Lives through the seed.
    pub(crate) fn run(mut self) -> Outcome {
        self.run_until("the topic is led", 5_000, |world| {
            if world.truth.topic_by_id(&TOPIC).is_none() {
                world.create_topic();
            }
            world.partition().is_some_and(|partition| partition.leader >= 0)
        });
        let begin = self.now;
        self.at(300, Event::Trouble);
        self.at(300, Event::People);
        self.at(300, Event::Reader);
        if self.has_group {
            self.begin_group();
        }
        for id in self.first_brokers + 1..=self.nodes.len() as i32 {
            let after = self.random.between(100, 4_000);
            self.reached.broker_added = true;
            self.at(after, Event::Start(id));
        }
        while self.now < begin + TROUBLE_MS {
            self.step();
        }
        self.heal();
        self.run_until("everything is healed", HEALED_MS, World::is_healed);
        self.finish()
    }

    fn run_until(&mut self, what: &str, within_ms: i64, mut done: impl FnMut(&mut World) -> bool) {
        let deadline = self.now + within_ms;
        while !done(self) {
            assert!(self.now < deadline, "not within {within_ms} ms: {what}; {}", self.describe());
            self.step();
        }
    }

    fn describe(&self) -> String {
        let nodes = self.nodes.iter().map(|node| match &node.process {
            None => format!("{} down", node.id),
            Some(process) => format!(
                "{} end {} hw {} role {:?} applied {} {}",
                node.id,
                process.mirror.len(),
                process.high_watermark,
                process.role_of,
                process.applied,
                match &process.role {
                    Role::Idle => "idle".to_owned(),
                    Role::Leader { state, .. } => format!("{:?}", state.leader()),
                    Role::Follower { state, .. } => format!("following {}", state.is_following()),
                }
            ),
        });
        let nodes: Vec<String> = nodes.collect();
        format!(
            "{:?}, {} unacknowledged, {} commands\n{}",
            self.partition(),
            self.producer.unacknowledged(),
            self.commands.len(),
            nodes.join("\n")
        )
    }

    fn at(&mut self, after_ms: i64, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now + after_ms.max(0), self.next_event), event);
    }

    fn note(&mut self, what: Arguments<'_>) {
        let text = format!("{} {what}", self.now);
        for byte in text.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.verbose {
            eprintln!("{text}");
        }
    }

    fn node(&mut self, id: i32) -> &mut Node {
        &mut self.nodes[id as usize - 1]
    }

    /// What a broker's own clock says.
    fn local(&self, id: i32) -> i64 {
        self.nodes[id as usize - 1].local(self.now)
    }

    /// The process of a broker, if it is still this one.
    fn process(&mut self, id: i32, member: Member) -> Option<&mut Process> {
        self.node(id).process.as_mut().filter(|process| process.me == member)
    }

    fn partition(&self) -> Option<&Partition> {
        self.truth.topic_by_id(&TOPIC)?.partitions.first()
    }

    fn step(&mut self) {
        self.steps += 1;
        assert!(self.steps < MAX_STEPS, "no end to it: {}", self.describe());
        let ((at, number), event) = self.queue.pop_first().expect("ticks go on for ever");
        self.now = self.now.max(at);
        let on = match &event {
            Event::Tick(id, _) | Event::Apply(id, _) | Event::Job(id, ..) | Event::Answer(id, ..) => *id,
            Event::Flushed(id, ..) | Event::Compact(id, _) | Event::Confirmed(id, ..) => *id,
            Event::Configure(id, _) | Event::Handed(id, ..) => *id,
            Event::Deliver(envelope) => envelope.to,
            _ => 0,
        };
        if on > 0 {
            let paused_until = self.node(on).paused_until;
            if paused_until > self.now {
                // In the order in which it would have come.
                self.queue.insert((paused_until, number), event);
                return;
            }
            self.look_at_lease(on);
        }
        match event {
            Event::Tick(id, member) => self.tick(id, member),
            Event::Apply(id, member) => self.apply(id, member),
            Event::Deliver(envelope) => self.deliver(*envelope),
            Event::Job(id, member, work) => self.work(id, member, *work),
            Event::Compact(id, member) => self.compact(id, member),
            Event::Commit(proposal) => self.commit(*proposal),
            Event::Answer(id, member, epoch, answer) => self.answered(id, member, epoch, answer),
            Event::Start(id) => self.start(id),
            Event::LoseFolder(id) => self.folder_lost(id),
            Event::Elect => self.elect(),
            Event::Trouble => self.trouble(),
            Event::People => self.people(),
            Event::Stop(id, member) => self.stop(id, member),
            Event::Flushed(id, member, tenure, offset) => self.flush_completed(id, member, tenure, offset),
            Event::Heal(from, to) => drop(self.cut.remove(&(from, to))),
            Event::Confirm(id, member, number) => self.asked_how_far(id, member, number),
            Event::Confirmed(id, member, number, index) => self.told_how_far(id, member, number, index),
            Event::Producer => self.produce(),
            Event::Reader => self.read(),
            Event::Member(place) => self.member(place),
            Event::Admin => self.look_at_offsets(),
            Event::Isolate => self.isolate(),
            Event::Configure(id, member) => self.configured(id, member),
            Event::Handed(id, member, handed) => self.handed(id, member, *handed),
        }
        if on > 0 {
            self.proceed(on);
        }
        self.check_in_sync();
    }

    // The network.

    fn is_cut(&self, from: i32, to: i32) -> bool {
        self.cut.contains(&(from, to))
    }

    fn delay(&mut self) -> i64 {
        if self.slow && self.random.percent(20) { self.random.between(50, 400) } else { self.random.between(1, 8) }
    }

    /// Sends on a connection, in order; it breaks where something is lost.
    fn send(&mut self, from: i32, to: i32, connection: u64, message: Message) {
        if self.broken.contains(&connection) {
            return;
        }
        if self.is_cut(from, to) || (!self.healing && self.random.below(1000) < 3) {
            self.reached.message_lost |= !self.is_cut(from, to);
            self.broken.insert(connection);
            return;
        }
        let delay = self.delay();
        let last = self.last_on.entry((connection, to)).or_default();
        *last = (*last + 1).max(self.now + delay);
        let after = *last - self.now;
        let member = (to > 0).then(|| self.node(to).process.as_ref().map(|process| process.me)).flatten();
        if to > 0 && member.is_none() {
            self.broken.insert(connection);
            return;
        }
        let envelope = Envelope { from, to, connection: Some((connection, member)), message };
        // In every fourth seed the network keeps what it carries for long, and delivers it twice.
        let twice = if self.seed % 4 == 3 { 50 } else { 5 };
        if matches!(envelope.message, Message::Report(_)) && self.random.percent(twice) {
            self.reached.message_twice = true;
            let late = self.random.between(1, 4_000);
            self.at(after + late, Event::Deliver(Box::new(envelope.clone())));
        }
        if let Message::ToCoordinator(_, ToCoordinator::Commit { .. }) = &envelope.message
            && self.random.percent(10)
        {
            // A call of its own, of which nobody awaits the answer any more.
            let late = self.random.between(100, 4_000);
            let again = Envelope { connection: None, ..envelope.clone() };
            self.at(after + late, Event::Deliver(Box::new(again)));
        }
        self.at(after, Event::Deliver(Box::new(envelope)));
    }

    fn deliver(&mut self, envelope: Envelope) {
        let Envelope { from, to, connection, message } = envelope;
        // A report that comes late comes all the same.
        let is_broken = connection.is_some_and(|(connection, _)| self.broken.contains(&connection));
        if self.is_cut(from, to) || (is_broken && !matches!(message, Message::Report(_))) {
            if let Some((connection, _)) = connection {
                self.broken.insert(connection);
            }
            return;
        }
        match message {
            Message::Fetched(fetched) => return self.fetched(fetched),
            Message::ToMember(stream, told) if self.admin.listens_on(stream) => return self.admin_told(told),
            Message::ToMember(stream, told) => return self.told(stream, told),
            _ => {}
        }
        if to == CLIENT {
            return match message {
                Message::ProducerId(call, answer) => self.identity_given(call, answer),
                Message::Opened(connection, opened) => self.opened(connection, opened),
                Message::Produced(connection, answer) => self.produced(connection, answer),
                _ => {}
            };
        }
        let local = self.local(to);
        let Some(process) = &mut self.node(to).process else { return };
        if connection.is_some_and(|(_, member)| member != Some(process.me)) {
            return;
        }
        match message {
            Message::Heartbeat(member, says) => {
                process.sessions.hear(local as u64, from, member.incarnation, says, &process.metadata);
            }
            Message::Hello(stream, hello) => self.hello(to, from, stream, hello),
            Message::Verdict(stream, tenure, verdict) => self.verdict(to, stream, tenure, verdict),
            Message::Push(stream, push, batches) => self.pushed(to, stream, push, batches),
            Message::Report(report) => {
                let Some(Process { role: Role::Leader { state, streams }, .. }) = &mut self.node(to).process else {
                    return;
                };
                let counts = state.replicas(|leader| leader.report(report, local));
                if !counts && state.leader().awaits_hello(report.member) {
                    let ended = streams.remove(&report.member.broker);
                    self.broken.extend(ended.map(|stream| stream.id));
                }
            }
            Message::AllocateProducerId(call, request) => self.allocate_producer_id(to, call, request),
            Message::OpenProduce(connection, open) => self.open_produce(to, connection, open),
            Message::Produce(connection, request, bytes) => self.append(to, connection, request, bytes),
            Message::Fetch(from) => self.serve(to, from),
            // What comes late is the word of an epoch that is over, or makes no difference.
            Message::ToCoordinator(_, ToCoordinator::Commit { member, epoch, .. })
                if connection.is_none() && !self.members.is_past(&member, epoch) => {}
            // A member commits one after the other. What it gave up on before it went on elsewhere may come yet, as in Kafka, and takes offsets
            // back until it commits again: the epoch tells members apart, and not the commits of one.
            Message::ToCoordinator(stream, ToCoordinator::Commit { member, epoch, .. })
                if connection.is_some() && self.members.goes_on_elsewhere(&member, epoch, stream) => {}
            Message::ToCoordinator(stream, asked) => self.asked(to, stream, asked),
            Message::ProducerId(..) | Message::Opened(..) | Message::Produced(..) => {}
            Message::Fetched(_) | Message::ToMember(..) => {}
        }
    }

    // The quorum.

    fn propose(&mut self, from: i32, command: command::Command, alter: Option<i32>) {
        self.propose_for(from, command, alter, None);
    }

    fn propose_for(
        &mut self,
        from: i32,
        command: command::Command,
        alter: Option<i32>,
        call: Option<(u64, proto::AllocateProducerId)>,
    ) {
        let Some(member) = self.node(from).process.as_ref().map(|process| process.me) else { return };
        let luck = if self.healing { 100 } else { self.random.below(100) };
        let is_lost = self.is_cut(from, QUORUM) || luck < 4;
        let is_unanswered = is_lost || luck < 10;
        if let Some(epoch) = alter.filter(|_| is_unanswered) {
            self.reached.proposal_unknown = true;
            self.at(PATIENCE_MS, Event::Answer(from, member, epoch, Answer::Unknown));
        }
        if !is_lost {
            // What nobody heard of any more may be committed long after.
            let after = if luck < 7 { self.random.between(100, 3_000) } else { self.delay() };
            *self.proposals.entry(from).or_default() += 1;
            let alter = alter.map(|epoch| (epoch, !is_unanswered));
            let call = call.filter(|_| !is_unanswered);
            let proposal = Box::new(Proposal { from, member, command, alter, call });
            if !self.healing && self.random.percent(3) {
                // Whoever passed it on passed it on again.
                let late = self.random.between(1, 2_000);
                let alter = alter.map(|(epoch, _)| (epoch, false));
                let again = Proposal { alter, call: None, ..(*proposal).clone() };
                self.at(after + late, Event::Commit(Box::new(again)));
            }
            self.at(after, Event::Commit(proposal));
        }
    }

    fn commit(&mut self, proposal: Proposal) {
        let Proposal { from, member, command, alter, call } = proposal;
        let waiting = self.proposals.entry(from).or_default();
        *waiting = waiting.saturating_sub(1);
        // Another setting clears the eligible replicas, and going back takes out some that are in sync, perhaps the last that are whole:
        // nobody asks for that while a disk is lost and the metadata do not know.
        let is_risky = matches!(command.command, Some(Kind::AlterTopic(_) | Kind::CancelReassignment(_)));
        if is_risky && self.nodes.iter().any(|node| node.lost) {
            return;
        }
        let (before, state_before) = (self.partition().cloned(), self.truth.clone());
        let index = self.commands.len() as u64 + 1;
        let result = self.truth.apply(index, &command);
        self.note(format_args!("{from} commits {index}: {:?} {result:?}", command.command));
        self.checks.applied(&command, &state_before, &self.truth, &result);
        if result.is_ok() {
            match &command.command {
                Some(Kind::RegisterBroker(register)) => self.reached.loss_claimed |= !register.lost.is_empty(),
                Some(Kind::FenceReplicas(_)) => self.reached.replica_fenced = true,
                Some(Kind::RemoveBroker(_)) => self.reached.broker_removed = true,
                _ => {}
            }
        }
        self.commands.push(command);
        if let Some(topic) = self.truth.topic_by_id(&TOPIC) {
            self.checks.least_min_insync = self.checks.least_min_insync.min(topic.min_insync_replicas() as usize);
        }
        if let Some(partition) = self.partition().cloned() {
            self.checks.partition(&self.truth, &partition);
            self.check_in_sync();
            let old = before.as_ref();
            self.reached.unclean_elected |=
                old.is_some_and(|old| partition.unclean_recoveries > old.unclean_recoveries);
            self.reached.reassigned |= old.is_some_and(|old| !old.target.is_empty() && partition.target.is_empty());
            self.reached.isr_of_one |= partition.isr.len() == 1;
            let eligible = before
                .is_some_and(|before| partition.leader != before.leader && before.elr.contains(&partition.leader));
            self.reached.eligible_elected |= eligible;
        }
        for id in 1..=self.nodes.len() as i32 {
            self.apply_later(id);
        }
        if let Some(call) = call {
            self.identity_decided(from, member, call, &result);
        }
        // Of what comes into force, and of what is too old to, the metadata tell.
        if let (Some((epoch, true)), Ok(Applied::PartitionsAltered { refused, .. })) = (alter, &result)
            && !refused.is_empty()
        {
            let delay = self.delay();
            self.at(delay, Event::Answer(from, member, epoch, Answer::Refused));
        }
    }

    /// Who is in sync has what is committed.
    fn check_in_sync(&self) {
        if let Some(partition) = self.partition() {
            let is_flushed = self.topic.durability == TopicDurability::Flushed;
            self.checks.in_sync(&self.truth, partition, &self.nodes, is_flushed);
        }
    }

    fn answered(&mut self, id: i32, member: Member, epoch: i32, answer: Answer) {
        let now = self.local(id);
        let Some(process) = self.process(id, member) else { return };
        let Role::Leader { state, .. } = &mut process.role else { return };
        let answer = match answer {
            Answer::Refused => Altered::Refused,
            Answer::Unknown => Altered::Unknown,
        };
        state.replicas(|leader| leader.altered(epoch, answer, now));
    }

    fn apply_later(&mut self, id: i32) {
        let delay = if self.slow { self.random.between(1, 300) } else { self.random.between(1, 20) };
        if let Some(process) = &mut self.node(id).process
            && !process.apply_pending
        {
            process.apply_pending = true;
            let member = process.me;
            self.at(delay, Event::Apply(id, member));
        }
    }

    fn apply(&mut self, id: i32, member: Member) {
        let cut = self.is_cut(QUORUM, id);
        let (total, count) = (self.commands.len(), self.random.between(1, 4) as usize);
        let Some(process) = self.process(id, member) else { return };
        process.apply_pending = false;
        let from = process.applied;
        if !cut {
            let to = (from + count).min(total);
            for place in from..to {
                let command = self.commands[place].clone();
                if let Some(process) = self.process(id, member) {
                    // Refused here as it was there.
                    let _ = process.metadata.apply(place as u64 + 1, &command);
                    process.applied = place + 1;
                }
            }
            self.learned(id);
        }
        if self.process(id, member).is_some_and(|process| process.applied < total) {
            self.apply_later(id);
        }
    }

    /// Now and then the office goes to somebody.
    fn elect(&mut self) {
        self.at(100, Event::Elect);
        let sits = self.truth.controller().map(|(id, incarnation)| Member { broker: id, incarnation });
        let works = sits
            .is_some_and(|member| !self.is_cut(member.broker, QUORUM) && self.process(member.broker, member).is_some());
        if works {
            self.leaderless_since = self.now;
        }
        let deposed = !self.healing && self.random.percent(1);
        if !deposed && self.now - self.leaderless_since < 300 {
            return;
        }
        let able: Vec<i32> = (1..=self.nodes.len() as i32).filter(|id| self.is_registered(*id)).collect();
        if let Some(id) = self.random.pick(&able) {
            let incarnation = self.incarnation(id);
            let broker_id = id;
            let kind = Kind::BecomeController(command::BecomeController { broker_id, incarnation });
            self.propose(id, kind.into(), None);
            self.leaderless_since = self.now;
        }
    }

    fn is_registered(&mut self, id: i32) -> bool {
        let registered = self.truth.broker(id).map(|broker| broker.incarnation);
        let up = self.node(id).process.as_ref().map(|process| process.me.incarnation);
        up.is_some() && up == registered && !self.is_cut(id, QUORUM)
    }

    fn incarnation(&mut self, id: i32) -> bytes::Bytes {
        let member = self.node(id).process.as_ref().map(|process| process.me);
        member.map(|member| wire(member.incarnation)).unwrap_or_default()
    }

    fn create_topic(&mut self) {
        let count = self.first_brokers;
        let all_active = self.truth.brokers().filter(|broker| broker.state == BrokerState::Active).count();
        if all_active < count as usize || self.random.percent(90) {
            return;
        }
        let first = self.random.between(0, i64::from(count) - 1) as i32;
        let brokers = (0..count.min(3)).map(|n| (first + n) % count + 1).collect();
        let create = command::CreateTopic {
            name: "topic".into(),
            topic_id: TOPIC.to_wire(),
            partitions: vec![command::Replicas { brokers }],
            default_min_insync_replicas: self.topic.min_insync_replicas,
            config: self.topic_values(self.topic.min_insync_replicas),
            ..command::CreateTopic::default()
        };
        self.propose(1, Kind::CreateTopic(create).into(), None);
        // Once: each further try, of a command that was lost, would else cost another broker.
        if self.random.percent(30) && !std::mem::replace(&mut self.has_left_folder, true) {
            // A topic of this name was deleted while a broker was down that keeps the new one too.
            let id = self.random.between(1, i64::from(count)) as i32;
            self.kill(id);
            let (seed, records, now) = (self.random.next(), self.random.below(30), self.now);
            self.node(id).leave_folder(seed, records, now);
            self.note(format_args!("{id} has the folder of an earlier topic"));
        }
    }
}

fn wire(incarnation: uuid::Uuid) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(incarnation.as_bytes())
}
