//! The state machine of one consumer group: its members and who may read what (KIP-848, decided in the broker).
//!
//! A change of members, subscriptions or topics raises the group's epoch and gives a new *target* assignment. Members
//! move towards it one by one: what a member must give up goes from `assigned` to `revoking`, and only once it reported
//! that it let go (or was fenced) may somebody else get it; a member that has nothing to give up takes the group's
//! epoch and whatever of its target is free.
//!
//! Updates and reports cross on the way, so a report without a partition says nothing while the member may not have
//! heard that it was given it. Therefore a partition is taken back only once a report named it (`confirmed`).
//!
//! Invariants (`Group::check`): no partition is in two members' `assigned` or `revoking`; `revoking` and `confirmed`
//! partitions of a member were assigned to it; a member's epoch is at most the group's; nothing falls back.
//!
//! Owns: decisions. Refuses: clocks, streams, the log (a driver performs the [`Effect`]s, and makes none visible before
//! the records among them are kept). Read next: [`super::offsets`], [`super::records`], then [`super::task`].

use super::assign::{self, Assignor, PartitionCounts, Subscriber, Subscribers};
use super::offsets::Committed;
use super::{GroupError, GroupSettings, Now, Partitions, records};
use crate::metadata::MetadataState;
use crate::planted::{Bug, planted};
use headwater_proto::limits::MAX_GROUP_NAME_BYTES;
use headwater_storage::offsets_schema::{OffsetsKey, OffsetsValue};
use std::collections::{BTreeMap, BTreeSet};

/// What a driver does after an event, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Append this record to the offsets topic; `None` is a tombstone.
    Write(OffsetsKey, Option<OffsetsValue>),
    /// Tell a member its epoch, and what it may own.
    Update {
        /// The member.
        member_id: String,
        /// Its epoch.
        epoch: i32,
        /// Everything it may own.
        assigned: Partitions,
    },
    /// Tell a member why it is out, and end its stream.
    Expel {
        /// The member.
        member_id: String,
        /// Why.
        error: GroupError,
    },
    /// Tell a member that it left, and end its stream.
    Left {
        /// The member.
        member_id: String,
    },
}

/// What a driver does after an event.
pub type Effects = Vec<Effect>;

/// A group.
#[derive(Debug, Clone)]
pub struct Group {
    pub(super) name: String,
    pub(super) epoch: i32,
    pub(super) members: BTreeMap<String, Member>,
    pub(super) target: BTreeMap<String, Partitions>,
    /// The subscribed topics that the target was made for.
    counts: PartitionCounts,
    pub(super) offsets: BTreeMap<(String, u32), Committed>,
    pub(super) empty_since_ms: Option<i64>,
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its static identity.
    pub instance_id: Option<String>,
    /// What the client calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// Where it stands.
    pub rack: Option<String>,
    /// The topics it subscribes to.
    pub topics: BTreeSet<String>,
    /// The assignor it asks for.
    pub assignor: Option<Assignor>,
    /// How long it may be silent.
    pub session_timeout_ms: u32,
    /// Whether it asked for that; `None`: it has the broker's.
    pub asked_session_ms: Option<u32>,
    /// How long it may take to let go.
    pub rebalance_timeout_ms: u32,
    /// The epoch it has.
    pub epoch: i32,
    /// The one before.
    pub previous_epoch: i32,
    /// What it may own.
    pub assigned: Partitions,
    /// What it owned and must let go.
    pub revoking: Partitions,
    /// What of `assigned` it has reported as its own.
    confirmed: Partitions,
    /// It is static, said goodbye, and its partitions wait for it.
    pub away: bool,
    /// A stream is open to it.
    connected: bool,
    heard_ms: u64,
    /// It may have been told by another coordinator until now: it is not put out earlier, unless it is heard here.
    stays_until_ms: u64,
    let_go_by_ms: Option<u64>,
    /// What its last record says.
    written: Option<Standing>,
    /// The epoch and the partitions that its stream was last told.
    told: Option<(i32, Partitions)>,
}

/// What a member's record of its current assignment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) epoch: i32,
    pub(super) previous_epoch: i32,
    pub(super) assigned: Partitions,
    pub(super) revoking: Partitions,
    pub(super) away: bool,
    pub(super) complete: bool,
}

/// What a member says when it opens its stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Join {
    pub member_id: String,
    pub instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub rack: Option<String>,
    pub topics: BTreeSet<String>,
    pub assignor: Option<Assignor>,
    /// 0: the broker's.
    pub session_timeout_ms: u32,
    /// 0: the broker's.
    pub rebalance_timeout_ms: u32,
    /// What it still owns from an earlier stream.
    pub owned: Partitions,
    /// Epoch of the earlier stream, 0 for a new member.
    pub member_epoch: i32,
}

/// What a member reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Report {
    pub member_epoch: i32,
    pub owned: Partitions,
    /// The new subscription, if it changes.
    pub topics: Option<BTreeSet<String>>,
}

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It has no members.
    Empty,
    /// Members are on the way to their target.
    Reconciling,
    /// Every member has what it should.
    Stable,
}

impl Phase {
    /// The word on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Empty => "empty",
            Phase::Reconciling => "reconciling",
            Phase::Stable => "stable",
        }
    }
}

/// Whether a group may be called this.
///
/// # Errors
/// [`GroupError::InvalidName`].
pub fn check_name(name: &str) -> Result<(), GroupError> {
    match name.len() {
        1..=MAX_GROUP_NAME_BYTES => Ok(()),
        len => Err(GroupError::InvalidName { len }),
    }
}

impl Group {
    /// A group nobody knows yet.
    pub fn new(name: impl Into<String>) -> Group {
        Group {
            name: name.into(),
            epoch: 0,
            members: BTreeMap::new(),
            target: BTreeMap::new(),
            counts: PartitionCounts::new(),
            offsets: BTreeMap::new(),
            empty_since_ms: None,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How often its assignment has been made anew.
    pub fn epoch(&self) -> i32 {
        self.epoch
    }

    /// Its members, by id.
    pub fn members(&self) -> &BTreeMap<String, Member> {
        &self.members
    }

    /// What a member should end up with.
    pub fn target(&self, member_id: &str) -> Option<&Partitions> {
        self.target.get(member_id)
    }

    /// Whether nothing of it needs remembering.
    pub fn is_forgotten(&self) -> bool {
        self.epoch == 0 && self.members.is_empty() && self.offsets.is_empty()
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        let settled = |(id, member): (&String, &Member)| {
            (member.away || member.epoch == self.epoch)
                && member.revoking.is_empty()
                && self.target.get(id).is_some_and(|target| *target == member.assigned)
        };
        match self.members.is_empty() {
            true => Phase::Empty,
            false if self.members.iter().all(settled) => Phase::Stable,
            false => Phase::Reconciling,
        }
    }

    /// The assignor that most of its members ask for.
    pub fn assignor(&self) -> Assignor {
        let mut votes: BTreeMap<Assignor, usize> = BTreeMap::new();
        for assignor in self.members.values().filter_map(|member| member.assignor) {
            *votes.entry(assignor).or_default() += 1;
        }
        votes
            .into_iter()
            .max_by_key(|(assignor, count)| (*count, std::cmp::Reverse(*assignor)))
            .map(|(assignor, _)| assignor)
            .unwrap_or_default()
    }

    /// How often a member should report.
    pub fn heartbeat_interval_ms(&self, member_id: &str, settings: &GroupSettings) -> u32 {
        let session = self.members.get(member_id).map_or(settings.session_timeout_ms, |m| m.session_timeout_ms);
        settings.heartbeat_interval_ms.min(session / 3).max(1)
    }

    /// A member opens its stream.
    ///
    /// # Errors
    /// [`GroupError`]; the group is as it was.
    pub fn join(
        &mut self,
        now: Now,
        join: Join,
        metadata: &MetadataState,
        settings: &GroupSettings,
    ) -> Result<Effects, GroupError> {
        check_join(&join, settings)?;
        let mut effects = Effects::new();
        let id = join.member_id.clone();
        if self.members.get(&id).is_some_and(|member| member.instance_id != join.instance_id) {
            return Err(GroupError::InstanceChanged { member: id });
        }
        let holder = join.instance_id.as_deref().and_then(|instance| self.holder_of(instance)).map(str::to_owned);
        match holder {
            Some(holder) if holder != id => {
                self.replace_static(now, &holder, join, metadata, settings, &mut effects)?;
            }
            _ if self.members.contains_key(&id) => self.rejoin(now, join, metadata, settings, &mut effects)?,
            _ if join.member_epoch != 0 => {
                return Err(GroupError::UnknownMember { group: self.name.clone(), member: id });
            }
            _ if self.members.len() >= settings.max_size as usize => {
                return Err(GroupError::Full { group: self.name.clone(), members: self.members.len() });
            }
            _ => {
                let member = Member::new(now, join, settings);
                effects.push(records::write_member(&self.name, &id, &member));
                self.members.insert(id, member);
                self.assign(metadata, &mut effects);
            }
        }
        self.settle(now, &mut effects);
        Ok(effects)
    }

    /// A member reports.
    ///
    /// # Errors
    /// [`GroupError`] for a member that is not in the group, or names an epoch it was never given. A member that claims
    /// what it was never given is expelled (among the effects).
    pub fn heartbeat(
        &mut self,
        now: Now,
        member_id: &str,
        report: Report,
        metadata: &MetadataState,
    ) -> Result<Effects, GroupError> {
        let Some(member) = self.members.get_mut(member_id).filter(|member| !member.away) else {
            return Err(GroupError::UnknownMember { group: self.name.clone(), member: member_id.to_owned() });
        };
        if report.member_epoch > member.epoch && !planted(Bug::AnyMemberEpoch) {
            return Err(GroupError::FencedEpoch {
                member: member_id.to_owned(),
                named: report.member_epoch,
                current: member.epoch,
            });
        }
        (member.heard_ms, member.stays_until_ms) = (now.monotonic_ms, 0);
        let mut effects = Effects::new();
        let Some(changed) = member.take_report(&report.owned) else {
            self.expel(now, member_id, "it claims a partition that it was never given", &mut effects);
            self.assign(metadata, &mut effects);
            self.settle(now, &mut effects);
            return Ok(effects);
        };
        let subscribed = report.topics.filter(|topics| *topics != member.topics);
        let subscribes = subscribed.is_some();
        if let Some(topics) = subscribed {
            member.topics = topics;
            effects.push(records::write_member(&self.name, member_id, member));
            self.assign(metadata, &mut effects);
        }
        if changed || subscribes {
            self.settle(now, &mut effects);
        }
        Ok(effects)
    }

    /// A member leaves. With `keep` a static one's partitions wait for its return, until its session ends.
    ///
    /// # Errors
    /// [`GroupError::UnknownMember`].
    pub fn leave(
        &mut self,
        now: Now,
        member_id: &str,
        keep: bool,
        metadata: &MetadataState,
    ) -> Result<Effects, GroupError> {
        let Some(member) = self.members.get_mut(member_id) else {
            return Err(GroupError::UnknownMember { group: self.name.clone(), member: member_id.to_owned() });
        };
        let mut effects = vec![Effect::Left { member_id: member_id.to_owned() }];
        if keep && member.instance_id.is_some() {
            member.away = true;
            member.connected = false;
            (member.heard_ms, member.stays_until_ms) = (now.monotonic_ms, 0);
            member.revoking.clear();
            member.confirmed.clear();
        } else {
            self.forget_member(now, member_id, &mut effects);
            self.assign(metadata, &mut effects);
        }
        self.settle(now, &mut effects);
        Ok(effects)
    }

    /// A member's stream ended without a word. It stays a member until its session ends.
    pub fn disconnected(&mut self, member_id: &str) {
        if let Some(member) = self.members.get_mut(member_id) {
            member.connected = false;
        }
    }

    /// Puts out whoever was silent, or held on to a partition, for too long.
    pub fn tick(&mut self, now: Now, metadata: &MetadataState) -> Effects {
        let mut effects = Effects::new();
        let late: Vec<(String, &'static str)> = self
            .members
            .iter()
            .filter_map(|(id, member)| {
                let why = if member.session_ends_ms() <= now.monotonic_ms {
                    "it was silent for longer than its session timeout"
                } else if member.let_go_by_ms().is_some_and(|by| by <= now.monotonic_ms) {
                    "it did not let go of a partition within its rebalance timeout"
                } else {
                    return None;
                };
                Some((id.clone(), why))
            })
            .collect();
        if !late.is_empty() && !planted(Bug::SilentMemberStays) {
            for (id, why) in late {
                self.expel(now, &id, why, &mut effects);
            }
            self.assign(metadata, &mut effects);
            self.settle(now, &mut effects);
        }
        effects
    }

    /// When (monotonic) [`tick`](Self::tick) must come at the latest.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.members.values().flat_map(|m| [Some(m.session_ends_ms()), m.let_go_by_ms()]).flatten().min()
    }

    /// Topics may have come, gone or grown.
    pub fn topics_changed(&mut self, now: Now, metadata: &MetadataState) -> Effects {
        let mut effects = Effects::new();
        if self.counts != self.subscribed(metadata) {
            self.assign(metadata, &mut effects);
            self.settle(now, &mut effects);
        }
        effects
    }

    /// After the group's records were read: sessions begin now, and none is shorter than the coordinator before this one may take to send
    /// its members away (`elsewhere_ms`).
    pub(super) fn loaded(&mut self, now: Now, metadata: &MetadataState, elsewhere_ms: u64) -> Effects {
        for member in self.members.values_mut() {
            member.heard_ms = now.monotonic_ms;
            if !member.away {
                member.stays_until_ms = now.monotonic_ms + elsewhere_ms;
                member.confirmed.clone_from(&member.assigned);
            }
        }
        self.target.retain(|id, _| self.members.contains_key(id));
        self.empty_since_ms = self.members.is_empty().then_some(now.wall_ms);
        self.counts = self.subscribed(metadata);
        let settled: Vec<(String, Standing)> =
            self.members.iter().map(|(id, member)| (id.clone(), self.standing(id, member))).collect();
        for (id, standing) in settled {
            if let Some(member) = self.members.get_mut(&id) {
                member.written = Some(standing);
            }
        }
        let mut effects = Effects::new();
        if !self.members.is_empty() {
            if self.computed_target(metadata) != self.target {
                self.assign(metadata, &mut effects);
            }
            self.settle(now, &mut effects);
        }
        effects
    }

    fn holder_of(&self, instance: &str) -> Option<&str> {
        let holds = |(_, member): &(&String, &Member)| member.instance_id.as_deref() == Some(instance);
        self.members.iter().find(holds).map(|(id, _)| id.as_str())
    }

    /// A new member under the instance id of `holder`, which is away or silent: it gets what that one had.
    fn replace_static(
        &mut self,
        now: Now,
        holder: &str,
        join: Join,
        metadata: &MetadataState,
        settings: &GroupSettings,
        effects: &mut Effects,
    ) -> Result<(), GroupError> {
        let instance = join.instance_id.clone().unwrap_or_default();
        let interval = u64::from(self.heartbeat_interval_ms(holder, settings));
        let Some(old) = self.members.get(holder) else { return Ok(()) };
        if join.member_epoch != 0 {
            return Err(GroupError::FencedInstance { instance, holder: holder.to_owned() });
        }
        let silent_at_ms = old.heard_ms + interval + interval / 2;
        if old.connected && silent_at_ms > now.monotonic_ms {
            return Err(GroupError::UnreleasedInstance {
                instance,
                holder: holder.to_owned(),
                heard_ms_ago: now.monotonic_ms.saturating_sub(old.heard_ms),
                silent_in_ms: silent_at_ms - now.monotonic_ms,
            });
        }
        let id = join.member_id.clone();
        let mut member = Member::new(now, join, settings);
        member.epoch = old.epoch;
        member.previous_epoch = old.previous_epoch;
        member.assigned.clone_from(&old.assigned);
        let same = (&member.topics, member.assignor) == (&old.topics, old.assignor);
        let target = self.target.get(holder).cloned().unwrap_or_default();
        if !old.away {
            let error = GroupError::FencedInstance { instance, holder: id.clone() };
            effects.push(Effect::Expel { member_id: holder.to_owned(), error });
        }
        self.forget_member(now, holder, effects);
        self.empty_since_ms = None;
        effects.push(records::write_member(&self.name, &id, &member));
        effects.push(records::write_target(&self.name, &id, &target));
        self.target.insert(id.clone(), target);
        self.members.insert(id.clone(), member);
        if !same {
            self.assign(metadata, effects);
        }
        self.drop_unowned(&id);
        Ok(())
    }

    /// A member that the group knows opens another stream.
    fn rejoin(
        &mut self,
        now: Now,
        join: Join,
        metadata: &MetadataState,
        settings: &GroupSettings,
        effects: &mut Effects,
    ) -> Result<(), GroupError> {
        let id = join.member_id.clone();
        let Some(old) = self.members.get(&id) else { return Ok(()) };
        let continues = join.member_epoch != 0;
        let given = |partition| old.assigned.contains(partition) || old.revoking.contains(partition);
        if continues && (old.away || join.member_epoch > old.epoch || !join.owned.iter().all(given)) {
            return Err(GroupError::FencedEpoch { member: id, named: join.member_epoch, current: old.epoch });
        }
        let owned = if continues { join.owned.clone() } else { Partitions::new() };
        let mut member = Member::new(now, join, settings);
        member.epoch = old.epoch;
        member.previous_epoch = old.previous_epoch;
        member.assigned.clone_from(&old.assigned);
        member.confirmed = owned.intersection(&old.assigned).copied().collect();
        member.revoking = owned.intersection(&old.revoking).copied().collect();
        member.let_go_by_ms = old.let_go_by_ms;
        member.written.clone_from(&old.written);
        let same = (&member.topics, member.assignor) == (&old.topics, old.assignor);
        if records::member_value(&member) != records::member_value(old) {
            effects.push(records::write_member(&self.name, &id, &member));
        }
        self.members.insert(id.clone(), member);
        if !same {
            self.assign(metadata, effects);
        }
        self.drop_unowned(&id);
        Ok(())
    }

    /// Takes back at once what a member should not have and has not: its earlier stream cannot give it anything now.
    fn drop_unowned(&mut self, member_id: &str) {
        if let (Some(member), Some(target)) = (self.members.get_mut(member_id), self.target.get(member_id)) {
            let confirmed = &member.confirmed;
            member.assigned.retain(|partition| target.contains(partition) || confirmed.contains(partition));
        }
    }

    /// Puts a member out and says why.
    fn expel(&mut self, now: Now, member_id: &str, why: &'static str, effects: &mut Effects) {
        let error = GroupError::Fenced { group: self.name.clone(), member: member_id.to_owned(), why };
        effects.push(Effect::Expel { member_id: member_id.to_owned(), error });
        self.forget_member(now, member_id, effects);
    }

    fn forget_member(&mut self, now: Now, member_id: &str, effects: &mut Effects) {
        self.members.remove(member_id);
        self.target.remove(member_id);
        if self.members.is_empty() {
            self.empty_since_ms = Some(now.wall_ms);
        }
        effects.extend(records::forget_member(&self.name, member_id));
    }

    /// The subscribed topics that exist, with their sizes.
    fn subscribed(&self, metadata: &MetadataState) -> PartitionCounts {
        let names = self.members.values().flat_map(|member| &member.topics);
        names.filter_map(|name| metadata.topic(name)).map(|t| (t.id, t.partitions.len() as u32)).collect()
    }

    /// Raises the epoch and gives the group a new target. [`settle`](Self::settle) must follow.
    fn assign(&mut self, metadata: &MetadataState, effects: &mut Effects) {
        if !self.members.is_empty() {
            self.empty_since_ms = None;
        }
        self.counts = self.subscribed(metadata);
        self.epoch += 1;
        effects.push(records::write_epoch(&self.name, self.epoch));
        let target = self.computed_target(metadata);
        for (id, partitions) in &target {
            if self.target.get(id) != Some(partitions) {
                effects.push(records::write_target(&self.name, id, partitions));
            }
        }
        effects.push(records::write_target_epoch(&self.name, self.epoch));
        self.target = target;
    }

    fn computed_target(&self, metadata: &MetadataState) -> BTreeMap<String, Partitions> {
        // Static members come first, in the order of their instances, so that a return under another id changes nothing.
        let order = |id: &String, member: &Member| match &member.instance_id {
            Some(instance) => format!("0{instance}"),
            None => format!("1{id}"),
        };
        let ids: BTreeMap<String, &String> = self.members.iter().map(|(id, m)| (order(id, m), id)).collect();
        let subscribers: Subscribers = self
            .members
            .iter()
            .map(|(id, member)| {
                let topics = member.topics.iter().filter_map(|name| metadata.topic(name)).map(|t| t.id).collect();
                (order(id, member), Subscriber { topics, previous: self.target.get(id).cloned().unwrap_or_default() })
            })
            .collect();
        let counts = self.subscribed(metadata);
        assign::assign(self.assignor(), &subscribers, &counts)
            .into_iter()
            .filter_map(|(order, partitions)| Some(((*ids.get(&order)?).clone(), partitions)))
            .collect()
    }

    /// Moves every member as far towards its target as it may go now, and says what became of it.
    fn settle(&mut self, now: Now, effects: &mut Effects) {
        for (id, member) in &mut self.members {
            if let Some(target) = self.target.get(id) {
                member.take_back(now, target);
            }
        }
        let mut taken: Partitions =
            self.members.values().flat_map(|m| m.assigned.iter().chain(&m.revoking)).copied().collect();
        for (id, member) in &mut self.members {
            let Some(target) = self.target.get(id) else { continue };
            if member.away || !member.revoking.is_empty() || !member.assigned.is_subset(target) {
                continue;
            }
            if member.epoch != self.epoch {
                member.previous_epoch = member.epoch;
                member.epoch = self.epoch;
            }
            for partition in target {
                let is_free = taken.insert(*partition) || planted(Bug::GivenBeforeLetGo);
                if !member.assigned.contains(partition) && is_free {
                    member.assigned.insert(*partition);
                }
            }
        }
        self.publish(effects);
    }

    /// The records and updates of every member that is not what it was said to be.
    fn publish(&mut self, effects: &mut Effects) {
        let standings: Vec<(String, Standing)> =
            self.members.iter().map(|(id, member)| (id.clone(), self.standing(id, member))).collect();
        for (id, standing) in standings {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let told = (standing.epoch, standing.assigned.clone());
            if member.written.as_ref() != Some(&standing) {
                effects.push(records::write_current(&self.name, &id, &standing));
                member.written = Some(standing);
            }
            if !member.away && member.told.as_ref() != Some(&told) {
                effects.push(Effect::Update { member_id: id, epoch: told.0, assigned: told.1.clone() });
                member.told = Some(told);
            }
        }
    }

    fn standing(&self, id: &str, member: &Member) -> Standing {
        Standing {
            epoch: member.epoch,
            previous_epoch: member.previous_epoch,
            assigned: member.assigned.clone(),
            revoking: member.revoking.clone(),
            away: member.away,
            complete: self.target.get(id) == Some(&member.assigned),
        }
    }
}

impl Member {
    pub(super) fn new(now: Now, join: Join, settings: &GroupSettings) -> Member {
        let or_default = |asked: u32, default: u32| if asked == 0 { default } else { asked };
        Member {
            instance_id: join.instance_id,
            client_id: join.client_id,
            client_host: join.client_host,
            rack: join.rack,
            topics: join.topics,
            assignor: join.assignor,
            session_timeout_ms: or_default(join.session_timeout_ms, settings.session_timeout_ms),
            asked_session_ms: Some(join.session_timeout_ms).filter(|asked| *asked > 0),
            rebalance_timeout_ms: or_default(join.rebalance_timeout_ms, settings.rebalance_timeout_ms),
            epoch: 0,
            previous_epoch: 0,
            assigned: Partitions::new(),
            revoking: Partitions::new(),
            confirmed: Partitions::new(),
            away: false,
            connected: true,
            heard_ms: now.monotonic_ms,
            stays_until_ms: 0,
            let_go_by_ms: None,
            written: None,
            told: None,
        }
    }

    fn session_ends_ms(&self) -> u64 {
        self.stays_until_ms.max(self.heard_ms + u64::from(self.session_timeout_ms))
    }

    fn let_go_by_ms(&self) -> Option<u64> {
        self.let_go_by_ms.map(|by| by.max(self.stays_until_ms))
    }

    /// Notes what the member owns; whether that changes anything, or `None` if it cannot own all of it.
    fn take_report(&mut self, owned: &Partitions) -> Option<bool> {
        if !owned.iter().all(|partition| self.assigned.contains(partition) || self.revoking.contains(partition)) {
            return None;
        }
        let before = (self.revoking.len(), self.confirmed.len());
        self.revoking.retain(|partition| owned.contains(partition));
        self.confirmed.extend(owned.intersection(&self.assigned));
        Some(before != (self.revoking.len(), self.confirmed.len()))
    }

    /// Begins to take back what is not its target's, as far as it is known to have it.
    fn take_back(&mut self, now: Now, target: &Partitions) {
        let surplus: Partitions = self.assigned.difference(target).copied().collect();
        for partition in surplus {
            if self.away || self.confirmed.remove(&partition) || planted(Bug::TakenBackUnasked) {
                self.assigned.remove(&partition);
                if !self.away && !planted(Bug::TakenBackUnasked) {
                    self.revoking.insert(partition);
                }
            }
        }
        let owing = !self.revoking.is_empty() || !self.assigned.is_subset(target);
        let by = now.monotonic_ms + u64::from(self.rebalance_timeout_ms);
        self.let_go_by_ms = owing.then(|| self.let_go_by_ms.unwrap_or(by));
    }
}

fn check_join(join: &Join, settings: &GroupSettings) -> Result<(), GroupError> {
    let identities = [("member id", Some(&join.member_id)), ("instance id", join.instance_id.as_ref())];
    for (what, identity) in identities {
        let Some(len) = identity.map(String::len) else { continue };
        if !(1..=MAX_GROUP_NAME_BYTES).contains(&len) {
            return Err(GroupError::InvalidIdentity { what, len });
        }
    }
    let (min, max) = (settings.min_session_timeout_ms, settings.max_session_timeout_ms);
    match join.session_timeout_ms {
        0 => Ok(()),
        asked if (min..=max).contains(&asked) => Ok(()),
        asked => Err(GroupError::InvalidSessionTimeout { asked, min, max }),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
