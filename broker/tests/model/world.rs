//! The brokers around the machines, and what may happen to them.

use headwater_broker::metadata::command::{self, command::Command as Kind};
use headwater_broker::metadata::state::BrokerState;
use headwater_broker::metadata::{MetadataState, Partition as Assignment};
use headwater_broker::replica::follower::{self, BatchSpan, FollowerState, Push, Replica, Take};
use headwater_broker::replica::history::History;
use headwater_broker::replica::leader::{self, AlterPartition, Altered, LeaderState, LocalLog, Settings, View};
use headwater_broker::replica::{Member, Report, Tenure};
use headwater_broker::topic_config::TopicDurability;
use headwater_proto::TopicId;
use headwater_storage::epochs::LeaderEpochs;
use stateright::{Model, Property};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use uuid::Uuid;

const TOPIC: TopicId = TopicId::from_bytes([1; 16]);
const LAG_MS: u64 = 100;

/// How much may happen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) replicas: i32,
    /// min.insync.replicas.
    pub(crate) least: u32,
    pub(crate) records: u8,
    pub(crate) crashes: u8,
    pub(crate) fences: u8,
    /// How often time passes until whoever has not reported lags.
    pub(crate) lags: u8,
    /// How many reports of one follower are on their way at once: an older one may come after a newer one.
    pub(crate) reports: usize,
    /// Whether a flush takes time, in which its log may be cut.
    pub(crate) slow_flushes: bool,
    pub(crate) durability: TopicDurability,
}

pub(crate) struct Partition {
    pub(crate) bounds: Bounds,
    /// A mistake in the machines, to see that it is found.
    #[cfg(feature = "planted-bugs")]
    pub(crate) bug: Option<headwater_broker::planted::Bug>,
}

/// A record: the epoch in which it was appended, and which one it is.
type Record = (i32, u8);

#[derive(Debug, Clone)]
struct Broker {
    member: Member,
    log: Vec<Record>,
    flushed: usize,
    flushing: Option<Flushing>,
    high_watermark: i64,
    generation: u64,
    /// Its process does not run.
    down: bool,
    /// How many commands it applied.
    applied: usize,
    role: Role,
    /// The leader and the leader epoch of the role.
    role_of: (i32, i32),
}

/// A flush that has begun.
#[derive(Debug, Clone, Copy)]
struct Flushing {
    tenure: Tenure,
    /// What it says when it has ended, and up to where the disk has the log then: a cut may come between.
    says: usize,
    has: usize,
}

#[derive(Debug, Clone)]
struct Proposal {
    alter: AlterPartition,
    /// The proposer does not wait for it any more.
    is_unanswered: bool,
}

#[derive(Debug, Clone)]
enum Role {
    Idle,
    Leader(Box<LeaderState>),
    Follower(Box<FollowerState>),
}

/// The metadata as of some command, and what tells them apart.
#[derive(Debug, Clone)]
struct Known {
    state: Arc<MetadataState>,
    digest: u64,
}

impl Known {
    fn new(state: MetadataState) -> Known {
        let mut hasher = DefaultHasher::new();
        fmt::write(&mut Feed(&mut hasher), format_args!("{state:?}")).expect("a hasher takes all");
        Known { state: Arc::new(state), digest: hasher.finish() }
    }
}

/// Everything, at one moment.
#[derive(Debug, Clone)]
pub(crate) struct State {
    now: i64,
    brokers: Vec<Broker>,
    /// The metadata after each command; the last are those of the quorum.
    history: Vec<Known>,
    /// On their way to the quorum, which may take them at any time.
    proposals: Vec<Proposal>,
    /// On their way, to which broker.
    reports: Vec<(i32, Report)>,
    /// Whatever any reader may have read.
    committed: Vec<Record>,
    leaders: Vec<(i32, Member)>,
    appended: u8,
    crashes: u8,
    fences: u8,
    lags: u8,
    /// What must not be, and is.
    broken: Option<String>,
    truncated: bool,
    eligible_elected: bool,
}

struct Feed<'a, H>(&'a mut H);

impl<H: Hasher> fmt::Write for Feed<'_, H> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Two states are one if all that may come of them is the same: the machines show all that they are, and of the metadata
/// only what some broker has not applied yet matters.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let State { now, brokers, history, proposals, reports, committed, leaders, broken, .. } = self;
        let first = brokers.iter().map(|broker| broker.applied).min().unwrap_or(0);
        history.iter().skip(first).for_each(|known| hasher.write_u64(known.digest));
        for broker in brokers {
            hasher.write_usize(broker.applied - first);
            let Broker { member, log, flushed, flushing, high_watermark, generation, down, role, role_of, .. } = broker;
            let shown = (member.incarnation, log, flushed, flushing, high_watermark, generation, down, role, role_of);
            fmt::write(&mut Feed(hasher), format_args!("{shown:?}")).expect("a hasher takes all");
        }
        let counts = (self.appended, self.crashes, self.fences, self.lags, self.truncated, self.eligible_elected);
        let shown = (now, proposals, reports, committed, leaders, broken, counts);
        fmt::write(&mut Feed(hasher), format_args!("{shown:?}")).expect("a hasher takes all");
    }
}

impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        let digest = |state: &State| {
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        };
        digest(self) == digest(other)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Append(i32),
    Flush(i32),
    /// A flush that takes time begins, and ends.
    BeginFlush(i32),
    EndFlush(i32),
    /// A follower says where it is, is answered, and cuts its log if it is told to.
    Hello(i32),
    /// The leader pushes the next record, or its watermark alone.
    Push(i32),
    /// A report arrives; one that is lost never does.
    Report(usize),
    /// The quorum takes a proposal, or refuses it, and the proposer is told if it still waits for that.
    Commit(usize),
    /// Nobody answered a proposal in time, which may be taken later.
    Unanswered(usize),
    Apply(i32),
    /// What is not flushed is gone.
    Crash(i32),
    /// A broker starts, and registers.
    Start(i32),
    Fence(i32),
    Unfence(i32),
    Lag,
}

impl Partition {
    fn settings(&self) -> Settings {
        let Bounds { least, durability, .. } = self.bounds;
        Settings { min_insync_replicas: least, durability, lag_time_max_ms: LAG_MS }
    }
}

impl Model for Partition {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            now: 0,
            brokers: Vec::new(),
            history: vec![Known::new(MetadataState::new("model"))],
            proposals: Vec::new(),
            reports: Vec::new(),
            committed: Vec::new(),
            leaders: Vec::new(),
            appended: 0,
            crashes: 0,
            fences: 0,
            lags: 0,
            broken: None,
            truncated: false,
            eligible_elected: false,
        };
        let ids = 1..=self.bounds.replicas;
        for id in ids.clone() {
            state.register(member(id, 1), 1);
        }
        let first = wire(member(1, 1).incarnation);
        state.command(Kind::BecomeController(command::BecomeController { broker_id: 1, incarnation: first }));
        for id in ids.clone() {
            state.unfence(member(id, 1));
        }
        state.command(Kind::CreateTopic(command::CreateTopic {
            name: "topic".into(),
            topic_id: TOPIC.to_wire(),
            partitions: vec![command::Replicas { brokers: ids.clone().collect() }],
            default_min_insync_replicas: self.bounds.least,
            ..command::CreateTopic::default()
        }));
        for id in ids.clone() {
            state.brokers.push(Broker {
                member: member(id, 1),
                log: Vec::new(),
                flushed: 0,
                flushing: None,
                high_watermark: 0,
                generation: 0,
                down: false,
                applied: state.history.len() - 1,
                role: Role::Idle,
                role_of: (-1, -1),
            });
        }
        ids.for_each(|id| state.adopt(id, self));
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        let Bounds { records, crashes, fences, lags, .. } = self.bounds;
        for broker in &state.brokers {
            let id = broker.member.broker;
            match &broker.role {
                Role::Leader(leader) if !leader.is_ended() && state.appended < records => {
                    actions.push(Action::Append(id));
                }
                Role::Follower(follower) => {
                    let leader = &state.brokers[broker.role_of.0 as usize - 1];
                    let is_led = matches!(&leader.role, Role::Leader(leading)
                        if !leading.is_ended() && leading.tenure().leader_epoch == broker.role_of.1);
                    let is_behind =
                        leader.log.len() > broker.log.len() || leader.high_watermark > broker.high_watermark;
                    if is_led && !follower.is_following() {
                        actions.push(Action::Hello(id));
                    } else if is_led && is_behind {
                        actions.push(Action::Push(id));
                    }
                }
                _ => {}
            }
            let is_unflushed = broker.flushed < broker.log.len();
            match broker.flushing {
                Some(_) => actions.push(Action::EndFlush(id)),
                None if is_unflushed && self.bounds.slow_flushes && broker.tenure().is_some() => {
                    actions.push(Action::BeginFlush(id));
                }
                None if is_unflushed => actions.push(Action::Flush(id)),
                None => {}
            }
            if broker.down {
                actions.push(Action::Start(id));
                continue;
            }
            if broker.applied + 1 < state.history.len() {
                actions.push(Action::Apply(id));
            }
            if state.crashes < crashes {
                actions.push(Action::Crash(id));
            }
            let registered = state.truth().broker(id).filter(|known| known.incarnation == broker.member.incarnation);
            match registered.map(|known| known.state) {
                Some(BrokerState::Fenced) => actions.push(Action::Unfence(id)),
                Some(BrokerState::Active) if state.fences < fences => actions.push(Action::Fence(id)),
                _ => {}
            }
        }
        actions.extend((0..state.reports.len()).map(Action::Report));
        for (place, proposal) in state.proposals.iter().enumerate() {
            actions.push(Action::Commit(place));
            if !proposal.is_unanswered {
                actions.push(Action::Unanswered(place));
            }
        }
        if state.lags < lags {
            actions.push(Action::Lag);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        #[cfg(feature = "planted-bugs")]
        headwater_broker::planted::plant(self.bug);
        let mut state = last.clone();
        state.take(&action, self);
        state.pass_over();
        for id in 1..=self.bounds.replicas {
            state.perform(id, self);
        }
        state.look(self);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("nothing is broken", |_, state| state.broken.is_none()),
            Property::<Self>::sometimes(crate::COMMITTED, |_, state| !state.committed.is_empty()),
            Property::<Self>::sometimes(crate::ISR_OF_ONE, |_, state| {
                state.partition().is_some_and(|partition| partition.isr.len() == 1)
            }),
            Property::<Self>::sometimes(crate::CUT, |_, state| state.truncated),
            Property::<Self>::sometimes(crate::ELIGIBLE, |_, state| state.eligible_elected),
            Property::<Self>::sometimes(crate::FAILOVER, |_, state| {
                !state.committed.is_empty() && state.partition().is_some_and(|now| now.leader != 1 && now.isr.len() > 1)
            }),
        ]
    }
}

impl State {
    fn truth(&self) -> &MetadataState {
        &self.history.last().expect("it begins with none").state
    }

    fn partition(&self) -> Option<&Assignment> {
        self.truth().topic_by_id(&TOPIC)?.partitions.first()
    }

    /// What must not be, and is.
    pub(crate) fn broken(&self) -> &str {
        self.broken.as_deref().unwrap_or_default()
    }

    fn broker(&mut self, id: i32) -> &mut Broker {
        &mut self.brokers[id as usize - 1]
    }

    /// The quorum applies a command. True: it counts.
    fn command(&mut self, kind: Kind) -> bool {
        let is_controllers = matches!(kind, Kind::FenceBroker(_) | Kind::UnfenceBroker(_));
        let controller_epoch = if is_controllers { self.truth().controller_epoch() } else { 0 };
        let command = command::Command { controller_epoch, ..kind.into() };
        let before = self.partition().cloned();
        let mut state = self.truth().clone();
        let is_applied = state.apply(self.history.len() as u64, &command).is_ok();
        if is_applied {
            self.history.push(Known::new(state));
            let after = self.partition().cloned();
            if let (Some(before), Some(after)) = (before, after) {
                self.eligible_elected |= before.leader != after.leader && before.elr.contains(&after.leader);
            }
        }
        is_applied
    }

    fn register(&mut self, member: Member, boots: u64) {
        let replaces = self.truth().broker(member.broker).map_or(0, |known| known.epoch);
        self.command(Kind::RegisterBroker(command::RegisterBroker {
            broker_id: member.broker,
            incarnation: wire(member.incarnation),
            boots,
            replaces,
            ..command::RegisterBroker::default()
        }));
    }

    fn unfence(&mut self, Member { broker, incarnation }: Member) {
        let incarnation = wire(incarnation);
        if self.truth().controller().is_none() {
            // Some other broker takes the office: who does is of no matter here.
            let fittest = self.truth().brokers().map(|other| (other.id, other.incarnation)).max();
            if let Some((broker_id, incarnation)) = fittest {
                let incarnation = wire(incarnation);
                self.command(Kind::BecomeController(command::BecomeController { broker_id, incarnation }));
            }
        }
        self.command(Kind::UnfenceBroker(command::UnfenceBroker { broker_id: broker, incarnation }));
    }

    fn take(&mut self, action: &Action, model: &Partition) {
        let now = self.now;
        match *action {
            Action::Append(id) => {
                self.appended += 1;
                let record = self.appended;
                let broker = self.broker(id);
                let Role::Leader(leader) = &mut broker.role else { return };
                broker.log.push((leader.tenure().leader_epoch, record));
                leader.written(leader.tenure(), broker.log.len() as i64, now);
            }
            Action::Flush(id) => {
                let broker = self.broker(id);
                broker.flushed = broker.log.len();
                let end = broker.log.len() as i64;
                match &mut broker.role {
                    Role::Leader(leader) => leader.flushed(leader.tenure(), end, now),
                    Role::Follower(follower) => follower.flushed(follower.tenure(), end),
                    Role::Idle => {}
                }
            }
            Action::BeginFlush(id) => {
                let broker = self.broker(id);
                let end = broker.log.len();
                broker.flushing = broker.tenure().map(|tenure| Flushing { tenure, says: end, has: end });
            }
            Action::EndFlush(id) => {
                let broker = self.broker(id);
                let Some(Flushing { tenure, says, has }) = broker.flushing.take() else { return };
                broker.flushed = broker.flushed.max(has);
                match &mut broker.role {
                    Role::Leader(leader) => leader.flushed(tenure, says as i64, now),
                    Role::Follower(follower) => follower.flushed(tenure, says as i64),
                    Role::Idle => {}
                }
            }
            Action::Hello(id) => self.hello(id),
            Action::Push(id) => self.push(id),
            Action::Report(place) => {
                let (to, report) = self.reports.remove(place);
                if let Role::Leader(leader) = &mut self.broker(to).role {
                    leader.report(report, now);
                }
            }
            Action::Commit(place) => {
                let Proposal { alter, is_unanswered } = self.proposals.remove(place);
                let is_applied = self.command(alter_partition(&alter));
                if !is_unanswered {
                    let topic = self.truth().topic_by_id(&TOPIC).expect("a topic");
                    let view = View::of(self.truth(), topic, &topic.partitions[0]);
                    let became = if is_applied { Altered::Committed(view) } else { Altered::Refused };
                    self.answer(&alter, became);
                }
            }
            Action::Unanswered(place) => {
                self.proposals[place].is_unanswered = true;
                let alter = self.proposals[place].alter.clone();
                self.answer(&alter, Altered::Unknown);
            }
            Action::Apply(id) => {
                self.broker(id).applied += 1;
                self.adopt(id, model);
            }
            Action::Crash(id) => {
                self.crashes += 1;
                let broker = self.broker(id);
                (broker.down, broker.flushing) = (true, None);
                broker.log.truncate(broker.flushed);
                broker.high_watermark = broker.high_watermark.min(broker.log.len() as i64);
                (broker.generation, broker.role, broker.role_of) = (0, Role::Idle, (-1, -1));
            }
            Action::Start(id) => {
                let broker = self.broker(id);
                let boots = (broker.member.incarnation.as_u128() & 0xff) as u64 + 1;
                (broker.down, broker.member) = (false, member(id, boots));
                let again = broker.member;
                self.register(again, boots);
            }
            Action::Fence(id) => {
                self.fences += 1;
                let (broker_id, incarnation) = (id, wire(self.broker(id).member.incarnation));
                self.command(Kind::FenceBroker(command::FenceBroker { broker_id, incarnation }));
            }
            Action::Unfence(id) => {
                let member = self.broker(id).member;
                self.unfence(member);
            }
            Action::Lag => {
                self.lags += 1;
                self.now += LAG_MS as i64 + 1;
                let now = self.now;
                for broker in &mut self.brokers {
                    if let Role::Leader(leader) = &mut broker.role {
                        leader.tick(now);
                    }
                }
            }
        }
    }

    fn answer(&mut self, alter: &AlterPartition, became: Altered) {
        let now = self.now;
        let broker = self.broker(alter.leader.broker);
        if let Role::Leader(leader) = &mut broker.role
            && broker.member == alter.leader
            && leader.tenure().leader_epoch == alter.leader_epoch
        {
            leader.altered(alter.partition_epoch, became, now);
        }
    }

    /// A broker takes the role that the metadata give it, or hears of them in the one it has.
    fn adopt(&mut self, id: i32, model: &Partition) {
        let now = self.now;
        let broker = &mut self.brokers[id as usize - 1];
        let metadata = Arc::clone(&self.history[broker.applied].state);
        let Some(topic) = metadata.topic_by_id(&TOPIC) else { return };
        let partition = &topic.partitions[0];
        let view = View::of(&metadata, topic, partition);
        let is_known = metadata.broker(id).is_some_and(|known| known.incarnation == broker.member.incarnation);
        let role_of = (partition.leader, partition.leader_epoch);
        if let Role::Leader(leader) = &mut broker.role {
            leader.view(&view, now);
        }
        if role_of == broker.role_of || !is_known {
            return;
        }
        broker.role_of = role_of;
        let log_end = broker.log.len() as i64;
        if partition.leader == id {
            let log = LocalLog {
                log_end,
                flushed: broker.flushed as i64,
                high_watermark: broker.high_watermark.min(log_end),
                generation: broker.generation,
            };
            let leader = LeaderState::lead(broker.member, &view, log, model.settings(), true, now);
            broker.role = Role::Leader(Box::new(leader));
            let led = (partition.leader_epoch, broker.member);
            let other = self.leaders.iter().find(|(epoch, member)| *epoch == led.0 && *member != led.1);
            if other.is_some() {
                self.broken = Some(format!("epoch {} has two leaders", led.0));
            }
            self.leaders.push(led);
        } else if partition.leader >= 0 {
            let replica = Replica {
                member: broker.member,
                history: broker.history(),
                flushed: broker.flushed as i64,
                high_watermark: broker.high_watermark,
                generation: broker.generation,
                unclean_taken: 0,
            };
            broker.role = Role::Follower(Box::new(FollowerState::follow(partition.leader_epoch, replica, 0)));
        } else {
            broker.role = Role::Idle;
        }
    }

    /// Commands of which a broker makes nothing: when it applies them is of no matter. Leaders look at everything.
    fn pass_over(&mut self) {
        let State { brokers, history, .. } = self;
        for broker in brokers.iter_mut().filter(|broker| !broker.down && !matches!(broker.role, Role::Leader(_))) {
            while let Some(next) = history.get(broker.applied + 1) {
                let id = broker.member.broker;
                let partition = next.state.topic_by_id(&TOPIC).map(|topic| &topic.partitions[0]);
                let role_of = partition.map_or((-1, -1), |partition| (partition.leader, partition.leader_epoch));
                let registered = next.state.broker(id).map(|known| known.incarnation);
                if role_of != broker.role_of && registered == Some(broker.member.incarnation) {
                    break;
                }
                broker.applied += 1;
            }
        }
    }

    fn hello(&mut self, id: i32) {
        let now = self.now;
        let follower = self.broker(id);
        let history = follower.history();
        let to = follower.role_of.0;
        let Role::Follower(state) = &mut follower.role else { return };
        state.take_effects();
        state.reconnect(history);
        let hello = state.take_effects().into_iter().find_map(|effect| match effect {
            follower::Effect::Hello(hello) => Some(hello),
            _ => None,
        });
        let (Some(hello), leader) = (hello, self.broker(to)) else { return };
        let history = leader.history();
        let Role::Leader(leading) = &mut leader.role else { return };
        let Ok(verdict) = leading.hello(&hello, &history, now) else { return };
        let follower = self.broker(id);
        let Role::Follower(state) = &mut follower.role else { return };
        state.verdict(hello.tenure, verdict);
    }

    fn push(&mut self, id: i32) {
        let follower = &self.brokers[id as usize - 1];
        let (to, end) = (follower.role_of.0, follower.log.len());
        let Role::Follower(state) = &follower.role else { return };
        let tenure = state.tenure();
        let leader = &self.brokers[to as usize - 1];
        let Role::Leader(leading) = &leader.role else { return };
        if leading.is_ended() || leading.tenure().leader_epoch != tenure.leader_epoch {
            return;
        }
        let record = leader.log.get(end).copied();
        let span = |(leader_epoch, _)| BatchSpan { base_offset: end as i64, next_offset: end as i64 + 1, leader_epoch };
        let batches = record.map(span).into_iter().collect();
        let high_watermark = leading.high_watermark();
        let push = Push { tenure, from: end as i64, batches, high_watermark, log_start: 0 };
        let follower = self.broker(id);
        let Role::Follower(state) = &mut follower.role else { return };
        match state.push(&push) {
            Ok(Take::Append(tenure)) => {
                follower.log.extend(record);
                state.written(tenure, follower.log.len() as i64);
            }
            Ok(Take::Nothing) => {}
            Err(why) => self.broken = Some(format!("broker {id} is pushed {why}")),
        }
    }

    /// Does what the machines of a broker decided.
    fn perform(&mut self, id: i32, model: &Partition) {
        let State { brokers, proposals, reports, broken, truncated, .. } = self;
        let broker = &mut brokers[id as usize - 1];
        loop {
            let history = broker.history();
            match &mut broker.role {
                Role::Idle => return,
                Role::Leader(leader) => {
                    broker.high_watermark = leader.high_watermark();
                    for effect in leader.take_effects() {
                        if let leader::Effect::Propose(alter) = effect {
                            proposals.push(Proposal { alter, is_unanswered: false });
                        }
                    }
                    return;
                }
                Role::Follower(follower) => {
                    let effects = follower.take_effects();
                    if effects.is_empty() {
                        return;
                    }
                    for effect in effects {
                        match effect {
                            follower::Effect::Cut { to } => {
                                *truncated = true;
                                broker.log.truncate(to as usize);
                                broker.flushed = broker.flushed.min(broker.log.len());
                                cut_flush(&mut broker.flushing, broker.log.len());
                            }
                            follower::Effect::Restart { .. } => {
                                *truncated = true;
                                broker.log.clear();
                                broker.flushed = 0;
                                cut_flush(&mut broker.flushing, broker.log.len());
                            }
                            follower::Effect::Report(report) => {
                                // The newest says all that the older ones do: of few, some come out of order.
                                let is_like =
                                    |other: &Report| other.member == report.member && other.tenure == report.tenure;
                                let mut alike = reports.iter().filter(|(_, other)| is_like(other)).count();
                                reports.retain(|(_, other)| {
                                    let stays = !is_like(other) || alike < model.bounds.reports;
                                    alike -= usize::from(!stays);
                                    stays
                                });
                                if !reports.iter().any(|(_, other)| *other == report) {
                                    reports.push((broker.role_of.0, report));
                                }
                            }
                            follower::Effect::HighWatermark(to) => broker.high_watermark = to,
                            follower::Effect::Fence(why) => *broken = Some(format!("broker {id} is fenced: {why}")),
                            follower::Effect::Hello(_) | follower::Effect::LogStart(_) => continue,
                        }
                    }
                    if follower.tenure().generation > broker.generation {
                        broker.generation = follower.tenure().generation;
                        broker.flushed = broker.log.len();
                        let history = History::of_log(&epochs_of(&broker.log), 0, broker.log.len() as i64);
                        follower.cut(follower.tenure(), history);
                    } else {
                        drop(history);
                    }
                }
            }
        }
    }

    /// What must hold, does.
    fn look(&mut self, model: &Partition) {
        let broken = self.find_broken(model);
        self.broken = self.broken.take().or(broken);
    }

    fn find_broken(&mut self, model: &Partition) -> Option<String> {
        for broker in &self.brokers {
            let (id, visible) = (broker.member.broker, broker.high_watermark as usize);
            let Some(shown) = broker.log.get(..visible) else {
                return Some(format!("broker {id} serves up to {visible} of {} records", broker.log.len()));
            };
            let equal = shown.iter().zip(&self.committed).all(|(shown, committed)| shown == committed);
            if !equal {
                return Some(format!("broker {id} shows {shown:?}, and {:?} was committed", self.committed));
            }
            if shown.len() > self.committed.len() {
                self.committed = shown.to_vec();
            }
        }
        let partition = self.partition()?;
        if let Err(why) = partition.check() {
            return Some(format!("{why}: {partition:?}"));
        }
        // StrongIsr: on disk, whatever became of the process.
        let flushed = model.bounds.durability == TopicDurability::Flushed;
        for id in partition.isr.iter().chain(&partition.elr) {
            let broker = &self.brokers[*id as usize - 1];
            let has = if flushed { broker.flushed } else { broker.log.len() };
            if broker.log.get(..has.min(self.committed.len())) != Some(&self.committed[..]) {
                return Some(format!("broker {id} is in sync or eligible and has {has} of {:?}", self.committed));
            }
        }
        None
    }
}

impl Broker {
    /// In which tenure its log is written now.
    fn tenure(&self) -> Option<Tenure> {
        match &self.role {
            Role::Idle => None,
            Role::Leader(leader) => Some(leader.tenure()),
            Role::Follower(follower) => Some(follower.tenure()),
        }
    }

    fn history(&self) -> History {
        let mut epochs = epochs_of(&self.log);
        if let Role::Leader(leader) = &self.role {
            epochs.assign(leader.tenure().leader_epoch, leader.epoch_start());
        }
        History::of_log(&epochs, 0, self.log.len() as i64)
    }
}

/// What a flush under way was to put on the disk beyond the end of the log is gone.
fn cut_flush(flushing: &mut Option<Flushing>, end: usize) {
    if let Some(flushing) = flushing {
        flushing.has = flushing.has.min(end);
    }
}

fn epochs_of(log: &[Record]) -> LeaderEpochs {
    let mut epochs = LeaderEpochs::default();
    for (offset, (epoch, _)) in log.iter().enumerate() {
        epochs.assign(*epoch, offset as i64);
    }
    epochs
}

fn member(broker: i32, boots: u64) -> Member {
    Member { broker, incarnation: Uuid::from_u128(((broker as u128) << 8) | u128::from(boots)) }
}

fn wire(incarnation: Uuid) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(incarnation.as_bytes())
}

fn alter_partition(alter: &AlterPartition) -> Kind {
    let named = |member: &Member| command::Member { broker_id: member.broker, incarnation: wire(member.incarnation) };
    Kind::AlterPartition(command::AlterPartition {
        topic_id: TOPIC.to_wire(),
        partition: 0,
        leader: Some(named(&alter.leader)),
        leader_epoch: alter.leader_epoch,
        partition_epoch: alter.partition_epoch,
        isr: alter.isr.iter().map(named).collect(),
    })
}
