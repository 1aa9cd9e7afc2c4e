//! The records of Kafka's internal topic `__consumer_offsets`.
//!
//! Owns: the keys and values of committed offsets, of classic groups, and of the consumer groups of KIP-848, byte for byte as Kafka
//! 4.1 lays them out (its message definitions, `group-coordinator/src/main/resources/common/message`). A key begins with two bytes
//! that name the kind of record, a value with two that name its version. Refuses: share and streams groups
//! ([`SchemaError::UnknownKind`]); what a record means to a group is the coordinator's business. Foreign bytes give an error, never
//! a panic. Read next: `fields`, the encoding of single fields.

mod fields;
#[cfg(test)]
mod tests;
mod values;

use bytes::Bytes;
use fields::{Reader, Writer};

pub use values::{
    ClassicMember, ClassicMemberMetadata, ConsumerMember, CurrentAssignment, GroupMetadata, MEMBER_STATE_STABLE,
    MEMBER_STATE_UNRELEASED_PARTITIONS, MEMBER_STATE_UNREVOKED_PARTITIONS, OffsetCommit, PartitionRacks,
    ResolvedExpression, TopicPartitions, TopicSnapshot,
};

/// Why bytes are no record of the offsets topic, or a record cannot be written as one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// The bytes end inside a field.
    #[error("the record ends inside a field")]
    Truncated,
    /// A field contradicts the schema.
    #[error("{0}")]
    Malformed(&'static str),
    /// A key of a kind that Headwater does not serve (share groups are 10 to 15, streams groups 17 to 23).
    #[error("record kind {0} is not known")]
    UnknownKind(i16),
    /// A value of a version that is newer than Kafka 4.1's.
    #[error("version {version} of record kind {kind} is not known")]
    UnknownVersion {
        /// The kind of the record.
        kind: i16,
        /// The version found.
        version: i16,
    },
    /// A string, byte string or array is longer than its length field can say.
    #[error("a field of {0} bytes or items does not fit its length")]
    TooLong(usize),
}

/// What a record of the offsets topic is about. The number is the kind that the key begins with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum OffsetsKey {
    /// An offset that a group committed (kind 1; kind 0 reads the same and is no longer written).
    OffsetCommit {
        /// The group.
        group: String,
        /// The topic's name.
        topic: String,
        /// The partition.
        partition: i32,
    },
    /// A classic group with all of its members (kind 2).
    GroupMetadata {
        /// The group.
        group: String,
    },
    /// A consumer group's epoch (kind 3).
    ConsumerGroup {
        /// The group.
        group: String,
    },
    /// The partition counts that a consumer group was last assigned by (kind 4; replaced by a hash in Kafka 4.1).
    PartitionMetadata {
        /// The group.
        group: String,
    },
    /// A member of a consumer group (kind 5).
    Member {
        /// The group.
        group: String,
        /// The member.
        member: String,
    },
    /// The epoch of a consumer group's target assignment (kind 6).
    TargetAssignmentEpoch {
        /// The group.
        group: String,
    },
    /// The target assignment of a member (kind 7).
    TargetAssignment {
        /// The group.
        group: String,
        /// The member.
        member: String,
    },
    /// What a member owns and has still to give up (kind 8).
    CurrentAssignment {
        /// The group.
        group: String,
        /// The member.
        member: String,
    },
    /// The topics that a regular expression resolved to (kind 16).
    RegularExpression {
        /// The group.
        group: String,
        /// The expression.
        expression: String,
    },
}

/// The value of a record, of the kind that its key names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OffsetsValue {
    /// Of [`OffsetsKey::OffsetCommit`].
    OffsetCommit(OffsetCommit),
    /// Of [`OffsetsKey::GroupMetadata`].
    GroupMetadata(GroupMetadata),
    /// Of [`OffsetsKey::ConsumerGroup`].
    ConsumerGroup {
        /// The group epoch.
        epoch: i32,
        /// A hash of the metadata of all subscribed topics; 0 when unknown.
        metadata_hash: i64,
    },
    /// Of [`OffsetsKey::PartitionMetadata`].
    PartitionMetadata(Vec<TopicSnapshot>),
    /// Of [`OffsetsKey::Member`].
    Member(ConsumerMember),
    /// Of [`OffsetsKey::TargetAssignmentEpoch`].
    TargetAssignmentEpoch(i32),
    /// Of [`OffsetsKey::TargetAssignment`].
    TargetAssignment(Vec<TopicPartitions>),
    /// Of [`OffsetsKey::CurrentAssignment`].
    CurrentAssignment(CurrentAssignment),
    /// Of [`OffsetsKey::RegularExpression`].
    RegularExpression(ResolvedExpression),
}

/// Both halves of a record. `None` instead of a value is a tombstone.
///
/// # Errors
/// Whatever [`OffsetsKey::decode`] and [`OffsetsValue::decode`] refuse.
pub fn decode(key: &[u8], value: Option<&[u8]>) -> Result<(OffsetsKey, Option<OffsetsValue>), SchemaError> {
    let key = OffsetsKey::decode(key)?;
    let value = value.map(|bytes| OffsetsValue::decode(&key, bytes)).transpose()?;
    Ok((key, value))
}

/// The partition of the offsets topic that holds a group, among `partitions` of them: Java's hash of the name, as Kafka places it.
pub fn partition_of_group(group: &str, partitions: u32) -> u32 {
    let hash = group.encode_utf16().fold(0i32, |hash, unit| hash.wrapping_mul(31).wrapping_add(i32::from(unit)));
    // The one number without an absolute value counts as 0 (org.apache.kafka.common.utils.Utils.abs).
    hash.checked_abs().unwrap_or(0).unsigned_abs() % partitions.max(1)
}

impl OffsetsKey {
    /// The number that this kind of record is known by.
    pub fn kind(&self) -> i16 {
        match self {
            OffsetsKey::OffsetCommit { .. } => 1,
            OffsetsKey::GroupMetadata { .. } => 2,
            OffsetsKey::ConsumerGroup { .. } => 3,
            OffsetsKey::PartitionMetadata { .. } => 4,
            OffsetsKey::Member { .. } => 5,
            OffsetsKey::TargetAssignmentEpoch { .. } => 6,
            OffsetsKey::TargetAssignment { .. } => 7,
            OffsetsKey::CurrentAssignment { .. } => 8,
            OffsetsKey::RegularExpression { .. } => 16,
        }
    }

    /// The group that the record belongs to.
    pub fn group(&self) -> &str {
        match self {
            OffsetsKey::OffsetCommit { group, .. }
            | OffsetsKey::GroupMetadata { group }
            | OffsetsKey::ConsumerGroup { group }
            | OffsetsKey::PartitionMetadata { group }
            | OffsetsKey::Member { group, .. }
            | OffsetsKey::TargetAssignmentEpoch { group }
            | OffsetsKey::TargetAssignment { group, .. }
            | OffsetsKey::CurrentAssignment { group, .. }
            | OffsetsKey::RegularExpression { group, .. } => group,
        }
    }

    /// Reads a record's key.
    ///
    /// # Errors
    /// [`SchemaError::UnknownKind`] for kinds that are not served; else the bytes are no key.
    pub fn decode(bytes: &[u8]) -> Result<OffsetsKey, SchemaError> {
        let mut reader = Reader::new(bytes, false);
        let kind = reader.i16()?;
        if !matches!(kind, 0..=8 | 16) {
            return Err(SchemaError::UnknownKind(kind));
        }
        let group = reader.string()?;
        Ok(match kind {
            2 => OffsetsKey::GroupMetadata { group },
            3 => OffsetsKey::ConsumerGroup { group },
            4 => OffsetsKey::PartitionMetadata { group },
            5 => OffsetsKey::Member { group, member: reader.string()? },
            6 => OffsetsKey::TargetAssignmentEpoch { group },
            7 => OffsetsKey::TargetAssignment { group, member: reader.string()? },
            8 => OffsetsKey::CurrentAssignment { group, member: reader.string()? },
            16 => OffsetsKey::RegularExpression { group, expression: reader.string()? },
            _ => OffsetsKey::OffsetCommit { group, topic: reader.string()?, partition: reader.i32()? },
        })
    }

    /// Writes a record's key.
    ///
    /// # Errors
    /// [`SchemaError::TooLong`] for a name beyond 32,767 bytes.
    pub fn encode(&self) -> Result<Bytes, SchemaError> {
        let mut writer = Writer::new(self.kind(), false);
        writer.string(self.group())?;
        match self {
            OffsetsKey::OffsetCommit { topic, partition, .. } => {
                writer.string(topic)?;
                writer.i32(*partition);
            }
            OffsetsKey::Member { member, .. }
            | OffsetsKey::TargetAssignment { member, .. }
            | OffsetsKey::CurrentAssignment { member, .. } => writer.string(member)?,
            OffsetsKey::RegularExpression { expression, .. } => writer.string(expression)?,
            _ => {}
        }
        Ok(writer.bytes.into())
    }
}
