//! What the leader of a partition decides for its replicas, in one leader epoch: who is in sync, and how far the high watermark
//! stands. The one source of the high watermark, for one broker and for many.
//!
//! *One offset counts*: the flushed one, or the written one where `durability=replicated`; for the high watermark, for the
//! ISR, for lag, and for the leader itself. The high watermark is the least of it in the **maximal** ISR: the one that
//! is committed, and every one that was proposed and may be yet. It does not move while the committed ISR is smaller than
//! `min.insync.replicas` (or than the number of replicas, if that is less: a topic with one replica is read though it asks for two).
//!
//! A follower joins when its offset is at or above the high watermark and the start of this epoch; it leaves when the oldest
//! batch that it has not reported is older than `replica.lag.time.max.ms`. Changes are proposed one at a time, against the
//! partition epoch they were decided in. A proposal that was left unknown counts until a later partition epoch shows that it
//! cannot be committed any more.
//!
//! Owns: [`LeaderState`]. Refuses: appends and acknowledgements ([`crate::partition::state`] has them), clocks, streams. What a
//! metadata command may do is the metadata's to decide. Read next: [`super::follower`].
//!
//! Always: the high watermark never falls; the leader is in its ISR; at most one proposal is on its way; what belongs to another
//! epoch, incarnation or generation counts for nothing.

use super::history::{History, Verdict};
use super::lag::Position;
use super::{Hello, Member, Report, Tenure};
use crate::error::PartitionError;
use crate::metadata::state::BrokerState;
use crate::metadata::{MetadataState, Partition, Topic};
use crate::planted::{Bug, planted};
use crate::topic_config::TopicDurability;
use headwater_proto::wire::Acks;
use std::collections::{BTreeMap, VecDeque};
use uuid::Uuid;

/// How long after a refused proposal the next one is made, in milliseconds.
const PROPOSE_AGAIN_MS: i64 = 100;

/// Most entries that remember when batches were appended. The last one stands for all that come after.
const MAX_APPENDED: usize = 64;

/// What the metadata say of a partition, as of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The last command that had been applied. A view of an earlier one tells nothing new, even of the same partition epoch: a broker
    /// that registers anew need not change the partition.
    pub index: u64,
    /// The broker that leads it, and its incarnation; `None`: nobody does.
    pub leader: Option<Member>,
    /// How often the leadership was given.
    pub leader_epoch: i32,
    /// How often anything of this was changed.
    pub partition_epoch: i32,
    /// The topic's `min.insync.replicas`; `None`: the metadata do not say. Whether those who leave the ISR stay eligible was decided by
    /// it, so that it counts from this view on, whatever the settings say that come from elsewhere.
    pub min_insync_replicas: Option<u32>,
    /// The brokers that keep it.
    pub replicas: Vec<Assigned>,
}

/// A replica, as the metadata have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// The broker in its registered incarnation.
    pub member: Member,
    /// Whether the broker may become a member of the ISR.
    pub active: bool,
    /// Whether it is in the committed ISR.
    pub in_sync: bool,
}

/// As many in-sync replicas as an acknowledgement needs, as far as there are replicas.
fn enough(min_insync_replicas: u32, replicas: usize) -> usize {
    (min_insync_replicas as usize).min(replicas)
}

impl View {
    /// What the metadata say of this partition of a topic of theirs.
    pub fn of(metadata: &MetadataState, topic: &Topic, partition: &Partition) -> View {
        let replica = |broker: &i32| {
            let registered = metadata.broker(*broker);
            Assigned {
                member: Member {
                    broker: *broker,
                    incarnation: registered.map_or(Uuid::nil(), |broker| broker.incarnation),
                },
                active: registered.is_some_and(|broker| broker.state == BrokerState::Active)
                    && !partition.fenced.contains(broker),
                in_sync: partition.isr.contains(broker),
            }
        };
        let replicas: Vec<Assigned> = partition.replicas.iter().map(replica).collect();
        let leader = replicas.iter().find(|replica| replica.member.broker == partition.leader);
        View {
            index: metadata.index(),
            leader: leader.map(|leader| leader.member),
            leader_epoch: partition.leader_epoch,
            partition_epoch: partition.partition_epoch,
            min_insync_replicas: Some(topic.min_insync_replicas()),
            replicas,
        }
    }

    /// Whether fewer are in sync than an acknowledgement needs: others may be eligible then, and be elected, that are not heard of.
    ///
    /// # Errors
    /// [`PartitionError::NotEnoughReplicas`]: so it is.
    pub fn check_in_sync(&self) -> Result<(), PartitionError> {
        let in_sync = self.replicas.iter().filter(|replica| replica.in_sync).count();
        let needed = enough(self.min_insync_replicas.unwrap_or(0), self.replicas.len());
        let as_number = |count| u32::try_from(count).unwrap_or(u32::MAX);
        match in_sync < needed {
            true => Err(PartitionError::NotEnoughReplicas { in_sync: as_number(in_sync), needed: as_number(needed) }),
            false => Ok(()),
        }
    }

    /// Whether it says nothing that the other does not, as of whichever command: of many partitions each command concerns few.
    pub fn says_the_same(&self, other: &View) -> bool {
        let View { index: _, leader, leader_epoch, partition_epoch, min_insync_replicas, replicas } = other;
        (&self.leader, &self.leader_epoch, &self.partition_epoch) == (leader, leader_epoch, partition_epoch)
            && (&self.min_insync_replicas, &self.replicas) == (min_insync_replicas, replicas)
    }

    /// Whether a lost replica is made anew by now: another broker leads, and it is known that this start of the broker is behind. Before
    /// that nothing tells of the loss but what is left on the disk.
    pub fn heals(&self, me: Member) -> bool {
        let is_led = self.leader.is_some_and(|leader| leader.broker != me.broker);
        let is_known = |replica: &Assigned| replica.member == me && !replica.in_sync;
        let is_mine = |replica: &Assigned| planted(Bug::HealedBeforeKnown) && replica.member.broker == me.broker;
        is_led && self.replicas.iter().any(|replica| is_known(replica) || is_mine(replica))
    }

    /// A partition whose only replica is `me`.
    pub fn alone(me: Member, leader_epoch: i32) -> View {
        let replicas = vec![Assigned { member: me, active: true, in_sync: true }];
        let min_insync_replicas = None;
        View { index: 0, leader: Some(me), leader_epoch, partition_epoch: 0, min_insync_replicas, replicas }
    }
}

/// What a leader goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The topic's `min.insync.replicas`, where a view does not say it.
    pub min_insync_replicas: u32,
    /// The topic's `durability`: which offset counts.
    pub durability: TopicDurability,
    /// `replica.lag.time.max.ms`. More keeps slow followers in sync, and acknowledgements waiting for dead ones.
    pub lag_time_max_ms: u64,
}

/// The log as it is when an epoch begins. No job is on its way then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalLog {
    /// Where it ends: the start of the epoch.
    pub log_end: i64,
    /// Everything below is on stable storage.
    pub flushed: i64,
    /// The high watermark that this replica knows.
    pub high_watermark: i64,
    /// How often this incarnation has cut it.
    pub generation: u64,
}

/// The ISR is to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlterPartition {
    /// Who asks.
    pub leader: Member,
    /// In which leader epoch.
    pub leader_epoch: i32,
    /// The partition epoch in which this was decided.
    pub partition_epoch: i32,
    /// The ISR as it is to be.
    pub isr: Vec<Member>,
}

/// What became of a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Altered {
    /// It was committed, and this is the partition now.
    Committed(View),
    /// It was refused, and will not be committed.
    Refused,
    /// Nobody answered: it may be committed yet.
    Unknown,
}

/// What the driver does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Propose this, and say what [became of it](LeaderState::altered).
    Propose(AlterPartition),
    /// The high watermark moved: followers and readers are told.
    HighWatermark(i64),
    /// The epoch is over: what is parked fails retriably, streams of followers end.
    Ended,
}

/// Why a follower is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloRefusal {
    /// Not led here in this epoch, or no longer.
    #[error("this broker does not lead the partition in epoch {0}")]
    NotLeader(i32),
    /// The metadata known here assign the partition to no such broker, or to another incarnation of it.
    #[error("broker {} is no replica in this incarnation, as far as is known here", .0.broker)]
    UnknownReplica(Member),
    /// The broker has said a newer hello.
    #[error("the follower has cut its log since")]
    Stale,
}

#[derive(Debug, Clone, Copy)]
struct Follower {
    member: Member,
    active: bool,
    generation: u64,
    /// Nothing of its log is to be cut.
    agreed: bool,
    /// -1: it has reported nothing in this epoch.
    received: i64,
    flushed: i64,
    /// Where its log begins, as no crash takes back; `None`: it says nothing of that. Counts once it has reported.
    log_start: Option<i64>,
    has_reported: bool,
}

/// Batches that were appended, as lag is told from them.
#[derive(Debug, Clone, Copy)]
struct Appended {
    end: i64,
    at_ms: i64,
}

/// See the module's head.
#[derive(Debug, Clone)]
pub struct LeaderState {
    me: Member,
    tenure: Tenure,
    epoch_start: i64,
    settings: Settings,
    /// The newest view's.
    min_insync_replicas: Option<u32>,
    /// The command as of which the replicas and the ISR are known.
    index: u64,
    partition_epoch: i32,
    /// The committed ISR, by broker.
    isr: Vec<Member>,
    others: BTreeMap<i32, Follower>,
    written: i64,
    flushed: i64,
    high_watermark: i64,
    /// Where the leader's log begins.
    log_start: i64,
    /// The ISR on its way to the metadata.
    in_flight: Option<Vec<Member>>,
    /// Those that were left unknown in this partition epoch.
    doubtful: Vec<Vec<Member>>,
    propose_from_ms: Option<i64>,
    /// Whether this broker has its lease.
    lease: bool,
    ended: bool,
    appended: VecDeque<Appended>,
    effects: Vec<Effect>,
}

impl LeaderState {
    /// Begins an epoch. `lease`: whether this broker has its lease.
    pub fn lead(me: Member, view: &View, log: LocalLog, settings: Settings, lease: bool, now_ms: i64) -> LeaderState {
        let mut state = LeaderState {
            me,
            tenure: Tenure { leader_epoch: view.leader_epoch, generation: log.generation },
            epoch_start: if planted(Bug::EpochStartsAtWatermark) { log.high_watermark } else { log.log_end },
            settings,
            min_insync_replicas: view.min_insync_replicas.filter(|_| !planted(Bug::SettingOfAnotherView)),
            index: view.index,
            partition_epoch: view.partition_epoch,
            isr: Vec::new(),
            others: BTreeMap::new(),
            written: log.log_end,
            flushed: log.flushed.min(log.log_end),
            high_watermark: log.high_watermark,
            log_start: 0,
            in_flight: None,
            doubtful: Vec::new(),
            propose_from_ms: None,
            lease,
            ended: false,
            appended: VecDeque::new(),
            effects: Vec::new(),
        };
        state.assign(view);
        // What lay there before counts as appended now: followers have until then to say where they are.
        state.note_appended(state.epoch_start, now_ms);
        state.step(now_ms);
        state
    }

    /// What completions of jobs that begin now belong to.
    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    /// Where this epoch began.
    pub fn epoch_start(&self) -> i64 {
        self.epoch_start
    }

    /// Readers see what is below.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// The committed ISR.
    pub fn isr(&self) -> &[Member] {
        &self.isr
    }

    /// As many in-sync replicas as an acknowledgement needs.
    pub fn min_insync_replicas(&self) -> u32 {
        self.min_insync_replicas.unwrap_or(self.settings.min_insync_replicas)
    }

    /// The partition epoch of the committed ISR.
    pub fn partition_epoch(&self) -> i32 {
        self.partition_epoch
    }

    /// Whether everything that earlier epochs acknowledged is below the high watermark. Before that, nobody is told where the
    /// log ends.
    pub fn serves_offsets(&self) -> bool {
        self.high_watermark >= self.epoch_start || planted(Bug::OffsetsServedEarly)
    }

    /// Whether others keep the partition too.
    pub fn has_followers(&self) -> bool {
        !self.others.is_empty()
    }

    /// Where this leader's log ends.
    pub fn log_end(&self) -> i64 {
        self.written
    }

    /// Where the followers are, for people: what they report, and at least what everybody in sync has.
    pub fn positions(&self) -> impl Iterator<Item = Position> {
        self.others.values().map(|follower| {
            let least = if self.isr.contains(&follower.member) { self.high_watermark } else { -1 };
            let offset = self.counted(follower.received, follower.flushed).max(least);
            Position { broker: follower.member.broker, offset }
        })
    }

    /// Whether the broker has its lease, as far as is known here.
    pub fn has_lease(&self) -> bool {
        self.lease
    }

    /// Whether the epoch is over.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Whether an append with these acks may be taken now.
    ///
    /// # Errors
    /// [`PartitionError`], retriable.
    pub fn admit(&self, acks: Acks) -> Result<(), PartitionError> {
        let needed = self.min_insync_replicas();
        let in_sync = u32::try_from(self.isr.len()).unwrap_or(u32::MAX);
        match acks {
            _ if self.ended => Err(PartitionError::NotLeader(self.tenure.leader_epoch)),
            Acks::All if in_sync < needed => Err(PartitionError::NotEnoughReplicas { in_sync, needed }),
            // The whole ISR answers for acks=all; for the others there is only the lease.
            Acks::Leader | Acks::None if !self.lease => Err(PartitionError::NotLeader(self.tenure.leader_epoch)),
            _ => Ok(()),
        }
    }

    /// Other settings.
    pub fn configure(&mut self, settings: Settings, now_ms: i64) {
        self.settings = settings;
        self.step(now_ms);
    }

    /// Everything below `offset` is written to the leader's log.
    pub fn written(&mut self, tenure: Tenure, offset: i64, now_ms: i64) {
        if tenure == self.tenure && offset > self.written {
            self.written = offset;
            self.note_appended(offset, now_ms);
            self.step(now_ms);
        }
    }

    /// Everything below `offset` of the leader's log is on stable storage.
    pub fn flushed(&mut self, tenure: Tenure, offset: i64, now_ms: i64) {
        if tenure == self.tenure {
            self.flushed = self.flushed.max(offset.min(self.written));
            self.step(now_ms);
        }
    }

    /// A follower says where it is, and asks what to cut. Batches are pushed from its log end once the answer is
    /// [`Verdict::Agrees`].
    ///
    /// # Errors
    /// [`HelloRefusal`]: it asks again when it knows more, or this broker does.
    pub fn hello(&mut self, hello: &Hello, log: &History, now_ms: i64) -> Result<Verdict, HelloRefusal> {
        if self.ended || hello.tenure.leader_epoch != self.tenure.leader_epoch {
            return Err(HelloRefusal::NotLeader(hello.tenure.leader_epoch));
        }
        let follower = self.others.get_mut(&hello.member.broker).filter(|known| known.member == hello.member);
        let follower = follower.ok_or(HelloRefusal::UnknownReplica(hello.member))?;
        if hello.tenure.generation < follower.generation {
            return Err(HelloRefusal::Stale);
        }
        let verdict = match hello.history.compare(log) {
            Verdict::Cut { .. } if planted(Bug::NothingCut) => Verdict::Agrees,
            verdict => verdict,
        };
        let is_another = hello.tenure.generation > follower.generation && !planted(Bug::ReportOutlivesLog);
        if verdict != Verdict::Agrees || is_another {
            *follower = Follower::new(follower.member, follower.active);
        }
        follower.generation = hello.tenure.generation;
        if verdict == Verdict::Agrees {
            follower.agreed = true;
            follower.received = follower.received.max(hello.history.log_end());
        }
        self.step(now_ms);
        Ok(verdict)
    }

    /// A follower says how far it is. False: the report counts for nothing.
    pub fn report(&mut self, report: Report, now_ms: i64) -> bool {
        let is_of_epoch = report.tenure.leader_epoch == self.tenure.leader_epoch || planted(Bug::ReportOutlivesEpoch);
        if self.ended || !is_of_epoch {
            return false;
        }
        let follower = self.others.get_mut(&report.member.broker);
        let Some(follower) = follower.filter(|known| {
            let is_of_log = known.generation == report.tenure.generation || planted(Bug::ReportOutlivesCut);
            known.member == report.member && known.agreed && is_of_log
        }) else {
            return false;
        };
        follower.received = follower.received.max(report.received);
        follower.flushed = follower.flushed.max(report.flushed.min(report.received));
        (follower.log_start, follower.has_reported) = (report.log_start.max(follower.log_start), true);
        self.step(now_ms);
        true
    }

    /// The leader's log begins here: whoever is to be in sync has to begin there too, so that nothing comes back with an election.
    pub fn begins_at(&mut self, log_start: i64, now_ms: i64) {
        if log_start > self.log_start {
            self.log_start = log_start;
            self.step(now_ms);
        }
    }

    /// Below this offset no replica that may be elected has anything any more, nor will after a crash; what builds keep that do not say where
    /// their logs begin is not known. Nor is what those have who stay eligible while too few are in sync.
    pub fn kept_start(&self) -> i64 {
        if self.isr.len() < self.enough() {
            return i64::MIN;
        }
        let pending = self.in_flight.iter().chain(&self.doubtful).flatten();
        let members = self.isr.iter().chain(pending).filter(|member| **member != self.me);
        let start = |member: &Member| match self.others.get(&member.broker).filter(|known| known.member == *member) {
            Some(follower) if follower.has_reported => follower.log_start.unwrap_or(i64::MAX),
            _ => i64::MIN,
        };
        members.map(start).min().unwrap_or(i64::MAX)
    }

    /// Whether this replica has to say hello before it counts: another start of its broker was known meanwhile, and nothing is left of what
    /// it said before.
    pub fn awaits_hello(&self, member: Member) -> bool {
        let known = self.others.get(&member.broker).filter(|known| known.member == member);
        !self.ended && known.is_some_and(|known| !known.agreed)
    }

    /// The metadata say this of the partition. What is older than what is known changes nothing; another leader epoch ends this one.
    pub fn view(&mut self, view: &View, now_ms: i64) {
        if self.ended || (view.index < self.index && !planted(Bug::OlderViewTaken)) {
            return;
        }
        self.index = view.index;
        if view.leader_epoch != self.tenure.leader_epoch || view.leader != Some(self.me) {
            self.end();
            return;
        }
        if view.partition_epoch > self.partition_epoch {
            self.partition_epoch = view.partition_epoch;
            // Whatever was decided in an earlier partition epoch is either this, or will be refused.
            self.in_flight = None;
            self.doubtful.clear();
            self.propose_from_ms = None;
        }
        self.assign(view);
        self.step(now_ms);
    }

    /// What became of the proposal that was made in this partition epoch; said once for each.
    pub fn altered(&mut self, partition_epoch: i32, altered: Altered, now_ms: i64) {
        match altered {
            Altered::Committed(view) => self.view(&view, now_ms),
            Altered::Refused | Altered::Unknown if self.ended || partition_epoch != self.partition_epoch => {}
            Altered::Refused => {
                if !planted(Bug::RefusedNeverAskedAgain) {
                    self.in_flight = None;
                }
                self.propose_from_ms = Some(now_ms + PROPOSE_AGAIN_MS);
                self.step(now_ms);
            }
            Altered::Unknown => {
                if let Some(isr) = self.in_flight.take().filter(|isr| !self.doubtful.contains(isr))
                    && !planted(Bug::UnknownProposalForgotten)
                {
                    self.doubtful.push(isr);
                }
                self.propose_from_ms = Some(now_ms + PROPOSE_AGAIN_MS);
                self.step(now_ms);
            }
        }
    }

    /// The broker got or lost its lease.
    pub fn lease(&mut self, held: bool, now_ms: i64) {
        self.lease = held;
        self.step(now_ms);
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ms: i64) {
        self.step(now_ms);
    }

    /// When [`tick`](Self::tick) is next due, if nothing happens before.
    pub fn deadline_ms(&self) -> Option<i64> {
        if self.ended || !self.lease || self.in_flight.is_some() {
            return None;
        }
        let lagging = self.others.values().filter(|follower| self.isr.contains(&follower.member));
        let lagging = lagging.filter_map(|follower| self.unreported_since_ms(follower)).min();
        let leaves_at = lagging.map(|since| since.saturating_add(self.lag_time_max_ms()).saturating_add(1));
        // Before that time nothing is proposed, whatever happens.
        self.propose_from_ms.or(leaves_at)
    }

    /// The epoch ends, whatever the metadata say: the partition is fenced, deleted, or let go.
    pub fn end(&mut self) {
        if !self.ended {
            self.ended = true;
            self.effects.push(Effect::Ended);
        }
    }

    /// What has been decided since the last call, in order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Takes who keeps the partition, and who of them is in sync.
    fn assign(&mut self, view: &View) {
        if !planted(Bug::SettingOfAnotherView) {
            self.min_insync_replicas = view.min_insync_replicas;
        }
        let known = std::mem::take(&mut self.others);
        for assigned in view.replicas.iter().filter(|assigned| assigned.member.broker != self.me.broker) {
            let is_same =
                |known: &&Follower| known.member == assigned.member || planted(Bug::OffsetsOutliveIncarnation);
            let kept = known.get(&assigned.member.broker).filter(is_same);
            let follower = match kept {
                Some(kept) => Follower { member: assigned.member, active: assigned.active, ..*kept },
                None => Follower::new(assigned.member, assigned.active),
            };
            self.others.insert(assigned.member.broker, follower);
        }
        self.isr = view.replicas.iter().filter(|assigned| assigned.in_sync).map(|assigned| assigned.member).collect();
        if !self.isr.contains(&self.me) {
            self.isr.push(self.me);
        }
        self.isr.sort();
        // A proposal that names an incarnation which is no more is refused whenever it arrives.
        let (me, others) = (self.me, &self.others);
        let is_current = |member: &Member| {
            *member == me || others.get(&member.broker).is_some_and(|follower| follower.member == *member)
        };
        self.doubtful.retain(|isr| isr.iter().all(is_current));
    }

    /// Decides anew after anything happened.
    fn step(&mut self, now_ms: i64) {
        if self.ended {
            return;
        }
        // Whoever joins does so at the high watermark as it is by now.
        self.advance();
        self.propose(now_ms);
        self.time_who_lags(now_ms);
        let in_sync = self.others.values().filter(|follower| self.isr.contains(&follower.member));
        let reported = in_sync.map(|follower| self.counted(follower.received, follower.flushed)).min();
        let unreported = |batch: &Appended| reported.is_some_and(|reported| batch.end > reported);
        while self.appended.front().is_some_and(|oldest| !unreported(oldest)) {
            self.appended.pop_front();
        }
    }

    /// Proposes the ISR as it should be, if it is another.
    fn propose(&mut self, now_ms: i64) {
        let waits = self.propose_from_ms.is_some_and(|from| now_ms < from);
        if !self.lease || self.in_flight.is_some() || waits {
            return;
        }
        let stays = |follower: &&Follower| match self.isr.contains(&follower.member) {
            true => !self.is_lagging(follower, now_ms),
            false => self.may_join(follower),
        };
        let mut isr: Vec<Member> = self.others.values().filter(stays).map(|follower| follower.member).collect();
        isr.push(self.me);
        isr.sort();
        self.propose_from_ms = None;
        // What was left unknown may be in force yet, and counts until then: whatever is committed now ends that.
        if isr != self.isr || !self.doubtful.is_empty() {
            self.in_flight = Some(isr.clone());
            let (leader_epoch, partition_epoch) = (self.tenure.leader_epoch, self.partition_epoch);
            self.effects.push(Effect::Propose(AlterPartition { leader: self.me, leader_epoch, partition_epoch, isr }));
        }
    }

    fn may_join(&self, follower: &Follower) -> bool {
        let counted = match planted(Bug::JoinsOnReceived) {
            true => follower.received,
            false => self.counted(follower.received, follower.flushed),
        };
        let has_watermark = counted >= self.high_watermark || planted(Bug::JoinsBelowWatermark);
        let has_epoch_start = counted >= self.epoch_start || planted(Bug::JoinsBelowEpochStart);
        // A build that does not say where its log begins is believed.
        let begins = follower.has_reported && follower.log_start.is_none_or(|start| start >= self.log_start);
        let has_start = self.log_start == 0 || begins;
        follower.active && follower.agreed && has_watermark && has_epoch_start && has_start
    }

    fn is_lagging(&self, follower: &Follower, now_ms: i64) -> bool {
        self.unreported_since_ms(follower).is_some_and(|since| now_ms.saturating_sub(since) > self.lag_time_max_ms())
    }

    /// Since when the oldest batch that a follower has not reported has been there.
    fn unreported_since_ms(&self, follower: &Follower) -> Option<i64> {
        let counted = self.counted(follower.received, follower.flushed);
        self.appended.iter().find(|batch| batch.end > counted).map(|batch| batch.at_ms)
    }

    /// Whoever came to be in sync below the log's end, of which no time is kept, has the time from now on to take the rest.
    fn time_who_lags(&mut self, now_ms: i64) {
        let is_behind = |follower: &Follower| {
            self.isr.contains(&follower.member)
                && self.counted(follower.received, follower.flushed) < self.written
                && self.unreported_since_ms(follower).is_none()
        };
        if self.others.values().any(is_behind) {
            self.note_appended(self.written, now_ms);
        }
    }

    fn note_appended(&mut self, end: i64, at_ms: i64) {
        let full = self.appended.len() >= MAX_APPENDED;
        match self.appended.back_mut() {
            Some(last) if full || last.at_ms == at_ms => last.end = end,
            _ => self.appended.push_back(Appended { end, at_ms }),
        }
    }

    /// As many in sync as an acknowledgement needs, as far as there are replicas.
    fn enough(&self) -> usize {
        enough(self.min_insync_replicas(), self.others.len() + 1)
    }

    /// Moves the high watermark, if it may.
    fn advance(&mut self) {
        if self.isr.len() < self.enough() && !planted(Bug::WatermarkBelowMinIsr) {
            return;
        }
        let to = self.least();
        if to > self.high_watermark {
            self.high_watermark = to;
            self.effects.push(Effect::HighWatermark(to));
        }
    }

    /// Up to where all of the maximal ISR are, by the offset that counts now; -1 where somebody has not said it in this epoch.
    pub fn least(&self) -> i64 {
        let in_flight = self.in_flight.iter().filter(|_| !planted(Bug::PendingIsrForgotten));
        let proposed = in_flight.chain(&self.doubtful).flatten();
        self.isr.iter().chain(proposed).map(|member| self.counted_of(member)).min().unwrap_or(-1)
    }

    /// The offset that counts of a member; -1 where nothing is known of this incarnation.
    fn counted_of(&self, member: &Member) -> i64 {
        if *member == self.me {
            let flushed = if planted(Bug::LeaderCountsItsWrites) { self.written } else { self.flushed };
            return self.counted(self.written, flushed);
        }
        let follower = self.others.get(&member.broker).filter(|known| known.member == *member);
        follower.map_or(-1, |follower| self.counted(follower.received, follower.flushed))
    }

    fn counted(&self, received: i64, flushed: i64) -> i64 {
        match self.settings.durability {
            TopicDurability::Flushed if planted(Bug::ReceivedCountsAsFlushed) => received,
            TopicDurability::Flushed => flushed,
            TopicDurability::Replicated => received,
        }
    }

    fn lag_time_max_ms(&self) -> i64 {
        i64::try_from(self.settings.lag_time_max_ms).unwrap_or(i64::MAX)
    }
}

impl Follower {
    fn new(member: Member, active: bool) -> Follower {
        Follower {
            member,
            active,
            generation: 0,
            agreed: false,
            received: -1,
            flushed: -1,
            log_start: None,
            has_reported: false,
        }
    }
}
