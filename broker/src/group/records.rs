//! How groups stand in `__consumer_offsets`: Kafka's records for consumer groups (KIP-848), written and read back.
//!
//! Owns: the translation, both ways. A session timeout has no place in those records: one that a member asked for stands in a
//! field of our own. Refuses: layouts (`headwater_storage::offsets_schema` owns them).
//! Read next: [`super::task`].

use super::assign::Assignor;
use super::offsets::Committed;
use super::state::{Effect, Effects, Group, Join, Member, Standing};
use super::{GroupSettings, Now, Partitions};
use crate::metadata::MetadataState;
use crate::planted::{Bug, planted};
use headwater_proto::TopicId;
use headwater_storage::offsets_schema::{
    ConsumerMember, CurrentAssignment, MEMBER_STATE_STABLE, MEMBER_STATE_UNRELEASED_PARTITIONS,
    MEMBER_STATE_UNREVOKED_PARTITIONS, OffsetCommit, OffsetsKey, OffsetsValue, TopicPartitions,
};
use std::collections::BTreeMap;

/// The epoch that stands for a static member which said that it will be back (Kafka's number).
const AWAY_EPOCH: i32 = -2;

/// The group's epoch.
pub(super) fn write_epoch(group: &str, epoch: i32) -> Effect {
    let value = OffsetsValue::ConsumerGroup { epoch, metadata_hash: 0 };
    Effect::Write(OffsetsKey::ConsumerGroup { group: group.to_owned() }, Some(value))
}

/// The epoch of the target assignment.
pub(super) fn write_target_epoch(group: &str, epoch: i32) -> Effect {
    let key = OffsetsKey::TargetAssignmentEpoch { group: group.to_owned() };
    Effect::Write(key, Some(OffsetsValue::TargetAssignmentEpoch(epoch)))
}

/// A member's target.
pub(super) fn write_target(group: &str, member: &str, target: &Partitions) -> Effect {
    let key = OffsetsKey::TargetAssignment { group: group.to_owned(), member: member.to_owned() };
    Effect::Write(key, Some(OffsetsValue::TargetAssignment(to_topics(target))))
}

/// Who a member is.
pub(super) fn write_member(group: &str, id: &str, member: &Member) -> Effect {
    let key = OffsetsKey::Member { group: group.to_owned(), member: id.to_owned() };
    Effect::Write(key, Some(member_value(member)))
}

/// What the record of a member says.
pub(super) fn member_value(member: &Member) -> OffsetsValue {
    OffsetsValue::Member(ConsumerMember {
        instance_id: member.instance_id.clone(),
        rack_id: member.rack.clone(),
        client_id: member.client_id.clone(),
        client_host: member.client_host.clone(),
        subscribed_topics: member.topics.iter().cloned().collect(),
        subscribed_regex: None,
        rebalance_timeout_ms: i32::try_from(member.rebalance_timeout_ms).unwrap_or(i32::MAX),
        server_assignor: member.assignor.map(|assignor| assignor.name().to_owned()),
        classic: None,
        session_timeout_ms: member.asked_session_ms.map(|ms| i32::try_from(ms).unwrap_or(i32::MAX)),
    })
}

/// What a member has.
pub(super) fn write_current(group: &str, member: &str, standing: &Standing) -> Effect {
    let state = match (standing.revoking.is_empty(), standing.complete) {
        (false, _) => MEMBER_STATE_UNREVOKED_PARTITIONS,
        (true, false) => MEMBER_STATE_UNRELEASED_PARTITIONS,
        (true, true) => MEMBER_STATE_STABLE,
    };
    let (member_epoch, previous_member_epoch) = match standing.away {
        true => (AWAY_EPOCH, standing.epoch),
        false => (standing.epoch, standing.previous_epoch),
    };
    let value = OffsetsValue::CurrentAssignment(CurrentAssignment {
        member_epoch,
        previous_member_epoch,
        state,
        assigned: to_topics(&standing.assigned),
        pending_revocation: to_topics(&standing.revoking),
    });
    Effect::Write(OffsetsKey::CurrentAssignment { group: group.to_owned(), member: member.to_owned() }, Some(value))
}

/// Everything about a member, gone.
pub(super) fn forget_member(group: &str, member: &str) -> Effects {
    let (group, member) = (group.to_owned(), member.to_owned());
    vec![
        Effect::Write(OffsetsKey::CurrentAssignment { group: group.clone(), member: member.clone() }, None),
        Effect::Write(OffsetsKey::TargetAssignment { group: group.clone(), member: member.clone() }, None),
        Effect::Write(OffsetsKey::Member { group, member }, None),
    ]
}

/// Everything about a group without members and offsets, gone.
pub(super) fn forget_group(group: &str) -> Effects {
    let group = group.to_owned();
    vec![
        Effect::Write(OffsetsKey::TargetAssignmentEpoch { group: group.clone() }, None),
        Effect::Write(OffsetsKey::ConsumerGroup { group }, None),
    ]
}

/// An offset, or that there is none any more.
pub(super) fn write_offset(group: &str, topic: &str, partition: u32, committed: Option<&Committed>) -> Effect {
    let key = OffsetsKey::OffsetCommit {
        group: group.to_owned(),
        topic: topic.to_owned(),
        partition: i32::try_from(partition).unwrap_or(i32::MAX),
    };
    let value = committed.map(|committed| {
        OffsetsValue::OffsetCommit(OffsetCommit {
            offset: committed.offset,
            leader_epoch: committed.leader_epoch,
            metadata: committed.metadata.clone(),
            commit_timestamp_ms: committed.commit_time_ms,
            expire_timestamp_ms: -1,
            topic_id: committed.topic_id,
        })
    });
    Effect::Write(key, value)
}

/// Builds groups from the records of one partition of the offsets topic, read in order.
///
/// Compaction may put a member's records into any order, so nothing is made of them until all were read.
#[derive(Debug, Default)]
pub struct Replay {
    groups: BTreeMap<String, Kept>,
    passed_over: u64,
}

/// What the records say of a group.
#[derive(Debug, Default)]
struct Kept {
    epoch: i32,
    members: BTreeMap<String, ConsumerMember>,
    current: BTreeMap<String, CurrentAssignment>,
    target: BTreeMap<String, Vec<TopicPartitions>>,
    offsets: BTreeMap<(String, u32), Committed>,
}

impl Replay {
    /// Takes the next record.
    pub fn apply(&mut self, key: OffsetsKey, value: Option<OffsetsValue>) {
        let kept = self.groups.entry(key.group().to_owned()).or_default();
        match (key, value) {
            (OffsetsKey::ConsumerGroup { .. }, Some(OffsetsValue::ConsumerGroup { epoch, .. })) => kept.epoch = epoch,
            (OffsetsKey::ConsumerGroup { .. }, None) => kept.epoch = 0,
            (OffsetsKey::Member { member, .. }, Some(OffsetsValue::Member(value))) => {
                kept.members.insert(member, value);
            }
            (OffsetsKey::Member { member, .. }, None) => {
                kept.members.remove(&member);
            }
            (OffsetsKey::TargetAssignment { member, .. }, Some(OffsetsValue::TargetAssignment(value))) => {
                kept.target.insert(member, value);
            }
            (OffsetsKey::TargetAssignment { member, .. }, None) => {
                kept.target.remove(&member);
            }
            (OffsetsKey::CurrentAssignment { member, .. }, Some(OffsetsValue::CurrentAssignment(value))) => {
                kept.current.insert(member, value);
            }
            (OffsetsKey::CurrentAssignment { member, .. }, None) => {
                kept.current.remove(&member);
            }
            (OffsetsKey::OffsetCommit { topic, partition, .. }, value) => {
                let key = (topic, u32::try_from(partition).unwrap_or(u32::MAX));
                match value {
                    Some(OffsetsValue::OffsetCommit(commit)) => {
                        kept.offsets.insert(key, committed(commit));
                    }
                    _ => {
                        kept.offsets.remove(&key);
                    }
                }
            }
            (OffsetsKey::TargetAssignmentEpoch { .. } | OffsetsKey::PartitionMetadata { .. }, _) => {}
            _ => self.passed_over += 1,
        }
    }

    /// Counts a record that is not understood.
    pub fn pass_over(&mut self) {
        self.passed_over += 1;
    }

    /// Records that were passed over: classic groups, and kinds that are not served.
    pub fn passed_over(&self) -> u64 {
        self.passed_over
    }

    /// The groups, with sessions that begin now, and what has become of each since. `elsewhere_ms`: for how long the coordinator before
    /// this one may still have members that take it for theirs.
    pub fn finish(
        self,
        now: Now,
        metadata: &MetadataState,
        settings: &GroupSettings,
        elsewhere_ms: u64,
    ) -> (BTreeMap<String, Group>, Vec<(String, Effects)>) {
        let mut effects = Vec::new();
        let mut groups = BTreeMap::new();
        for (name, kept) in self.groups {
            let mut group = kept.into_group(&name, now, settings);
            if !group.is_forgotten() {
                effects.push((name.clone(), group.loaded(now, metadata, elsewhere_ms)));
                groups.insert(name, group);
            }
        }
        (groups, effects)
    }
}

impl Kept {
    fn into_group(mut self, name: &str, now: Now, settings: &GroupSettings) -> Group {
        let mut group = Group::new(name);
        group.epoch = if planted(Bug::GroupEpochForgotten) { 0 } else { self.epoch };
        group.offsets = self.offsets;
        for (id, kept) in self.members {
            let join = Join {
                member_id: id.clone(),
                instance_id: kept.instance_id,
                client_id: kept.client_id,
                client_host: kept.client_host,
                rack: kept.rack_id,
                topics: kept.subscribed_topics.into_iter().collect(),
                assignor: kept.server_assignor.and_then(|name| name.parse::<Assignor>().ok()),
                session_timeout_ms: kept
                    .session_timeout_ms
                    .and_then(|ms| u32::try_from(ms).ok())
                    // The bounds may be others by now.
                    .map_or(0, |ms| ms.max(settings.min_session_timeout_ms).min(settings.max_session_timeout_ms)),
                rebalance_timeout_ms: u32::try_from(kept.rebalance_timeout_ms).unwrap_or(0),
                ..Join::default()
            };
            let mut member = Member::new(now, join, settings);
            if let Some(current) = self.current.remove(&id) {
                member.away = current.member_epoch == AWAY_EPOCH;
                (member.epoch, member.previous_epoch) = match member.away {
                    true => (current.previous_member_epoch, 0),
                    false => (current.member_epoch, current.previous_member_epoch),
                };
                if !planted(Bug::AssignmentForgotten) {
                    member.assigned = from_topics(&current.assigned);
                }
                if !planted(Bug::RevocationForgotten) {
                    member.revoking = from_topics(&current.pending_revocation);
                }
            }
            group.target.insert(id.clone(), from_topics(&self.target.remove(&id).unwrap_or_default()));
            group.members.insert(id, member);
        }
        group
    }
}

/// A commit as the broker holds it.
pub fn committed(commit: OffsetCommit) -> Committed {
    Committed {
        offset: commit.offset,
        leader_epoch: commit.leader_epoch,
        metadata: commit.metadata,
        commit_time_ms: commit.commit_timestamp_ms,
        topic_id: commit.topic_id,
    }
}

fn to_topics(partitions: &Partitions) -> Vec<TopicPartitions> {
    let mut topics: BTreeMap<TopicId, Vec<i32>> = BTreeMap::new();
    for (topic, partition) in partitions {
        topics.entry(*topic).or_default().push(i32::try_from(*partition).unwrap_or(i32::MAX));
    }
    topics.into_iter().map(|(topic_id, partitions)| TopicPartitions { topic_id, partitions }).collect()
}

fn from_topics(topics: &[TopicPartitions]) -> Partitions {
    let partitions = |topic: &TopicPartitions| {
        let id = topic.topic_id;
        topic.partitions.iter().filter_map(move |p| Some((id, u32::try_from(*p).ok()?))).collect::<Vec<_>>()
    };
    topics.iter().flat_map(partitions).collect()
}
