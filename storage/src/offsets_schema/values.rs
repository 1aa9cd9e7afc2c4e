//! The values of the offsets topic's records, version by version.
//!
//! Owns: their structures and layouts. Version 4 of the older two, and every version of a KIP-848 record, is *flexible*: compact
//! lengths, and tagged fields at the end of each structure. Written are the versions that Kafka 4.1 writes. Refuses: nothing that
//! Kafka wrote; tagged fields that are not known are passed over. Read next: `fields`.

use super::fields::{Reader, Writer};
use super::{OffsetsKey, OffsetsValue, SchemaError};
use bytes::Bytes;
use headwater_proto::TopicId;

/// A member whose assignment is the target.
pub const MEMBER_STATE_STABLE: i8 = 0;
/// A member that has still to confirm that it gave partitions up.
pub const MEMBER_STATE_UNREVOKED_PARTITIONS: i8 = 1;
/// A member that waits for partitions which others have not given up.
pub const MEMBER_STATE_UNRELEASED_PARTITIONS: i8 = 2;

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetCommit {
    /// The next offset to be read.
    pub offset: i64,
    /// The leader epoch of the last record read; -1 when unknown.
    pub leader_epoch: i32,
    /// What the client wanted to be kept with it.
    pub metadata: String,
    /// When it was committed, in milliseconds since 1970.
    pub commit_timestamp_ms: i64,
    /// When it expires, in milliseconds since 1970 (version 1 only, which a commit with a time of expiry is written as); -1: by the broker's retention.
    pub expire_timestamp_ms: i64,
    /// The topic that the name meant; [`TopicId::ZERO`] when unknown.
    pub topic_id: TopicId,
}

/// A classic group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMetadata {
    /// "consumer" for groups of consumers; empty for one that only holds offsets.
    pub protocol_type: String,
    /// Rises with each rebalance.
    pub generation: i32,
    /// The assignor agreed on.
    pub protocol: Option<String>,
    /// The member that assigns.
    pub leader: Option<String>,
    /// When the group entered its state, in milliseconds since 1970; -1 when unknown.
    pub current_state_timestamp_ms: i64,
    /// Its members.
    pub members: Vec<ClassicMember>,
}

/// A member of a classic group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassicMember {
    /// The member.
    pub member_id: String,
    /// Its instance, if it is a static one.
    pub group_instance_id: Option<String>,
    /// What the client calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// How long it may take to rejoin; -1 when unknown.
    pub rebalance_timeout_ms: i32,
    /// How long it may be silent.
    pub session_timeout_ms: i32,
    /// Its subscription, as the client wrote it.
    pub subscription: Vec<u8>,
    /// Its assignment, as the assigning client wrote it.
    pub assignment: Vec<u8>,
}

/// A topic as a consumer group last saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicSnapshot {
    /// The topic.
    pub topic_id: TopicId,
    /// Its name.
    pub topic: String,
    /// How many partitions it had.
    pub partitions: i32,
    /// Racks by partition (unused since Kafka 4.0).
    pub racks: Vec<PartitionRacks>,
}

/// The racks that hold a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionRacks {
    /// The partition.
    pub partition: i32,
    /// Its racks.
    pub racks: Vec<String>,
}

/// A member of a consumer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerMember {
    /// Its instance, if it is a static one.
    pub instance_id: Option<String>,
    /// Its rack.
    pub rack_id: Option<String>,
    /// What the client calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// The topics it subscribes to by name.
    pub subscribed_topics: Vec<String>,
    /// The topics it subscribes to by regular expression.
    pub subscribed_regex: Option<String>,
    /// How long it may take to give partitions up; -1 when unknown.
    pub rebalance_timeout_ms: i32,
    /// The assignor it asks for.
    pub server_assignor: Option<String>,
    /// Set for a member that speaks the classic protocol.
    pub classic: Option<ClassicMemberMetadata>,
    /// How long it may be silent, if it asked for that. Kafka has no such field (there it is the broker's alone) and passes over it.
    pub session_timeout_ms: Option<i32>,
}

/// The number of a member's session timeout among the tagged fields: far from those that Kafka may come to give out.
const SESSION_TIMEOUT_TAG: u32 = 0x4857;

/// What a consumer group keeps of a member that speaks the classic protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassicMemberMetadata {
    /// How long it may be silent.
    pub session_timeout_ms: i32,
    /// The assignors it supports, with its subscription as written for each.
    pub supported_protocols: Vec<(String, Vec<u8>)>,
}

/// Partitions of one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicPartitions {
    /// The topic.
    pub topic_id: TopicId,
    /// The partitions.
    pub partitions: Vec<i32>,
}

/// What a member owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CurrentAssignment {
    /// The epoch that the member is expected to name.
    pub member_epoch: i32,
    /// The epoch that it names when the last answer was lost.
    pub previous_member_epoch: i32,
    /// One of the `MEMBER_STATE_` numbers.
    pub state: i8,
    /// The partitions it owns.
    pub assigned: Vec<TopicPartitions>,
    /// The partitions it has still to give up.
    pub pending_revocation: Vec<TopicPartitions>,
}

/// What a regular expression resolved to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedExpression {
    /// The names it matched.
    pub topics: Vec<String>,
    /// The version of the cluster's metadata that it was resolved against.
    pub version: i64,
    /// When, in milliseconds since 1970.
    pub timestamp_ms: i64,
}

impl OffsetsValue {
    /// Reads the value of a record whose key is `key`.
    ///
    /// # Errors
    /// [`SchemaError::UnknownVersion`] for versions after Kafka 4.1; otherwise the bytes are no such value.
    pub fn decode(key: &OffsetsKey, bytes: &[u8]) -> Result<OffsetsValue, SchemaError> {
        let version = Reader::new(bytes, false).i16()?;
        let (newest, flexible_from) = match key {
            OffsetsKey::OffsetCommit { .. } | OffsetsKey::GroupMetadata { .. } => (4, 4),
            _ => (0, 0),
        };
        if !(0..=newest).contains(&version) {
            return Err(SchemaError::UnknownVersion { kind: key.kind(), version });
        }
        let mut reader = Reader::new(bytes.get(2..).unwrap_or_default(), version >= flexible_from);
        let from = &mut reader;
        Ok(match key {
            OffsetsKey::OffsetCommit { .. } => OffsetsValue::OffsetCommit(OffsetCommit::read(from, version)?),
            OffsetsKey::GroupMetadata { .. } => OffsetsValue::GroupMetadata(GroupMetadata::read(from, version)?),
            OffsetsKey::ConsumerGroup { .. } => {
                let epoch = from.i32()?;
                let mut metadata_hash = 0;
                from.tagged(|tag, field| {
                    if tag == 0 {
                        metadata_hash = field.i64()?;
                    }
                    Ok(())
                })?;
                OffsetsValue::ConsumerGroup { epoch, metadata_hash }
            }
            OffsetsKey::PartitionMetadata { .. } => {
                OffsetsValue::PartitionMetadata(structure(from, |from| from.array(TopicSnapshot::read))?)
            }
            OffsetsKey::Member { .. } => OffsetsValue::Member(ConsumerMember::read(from)?),
            OffsetsKey::TargetAssignmentEpoch { .. } => {
                OffsetsValue::TargetAssignmentEpoch(structure(from, Reader::i32)?)
            }
            OffsetsKey::TargetAssignment { .. } => {
                OffsetsValue::TargetAssignment(structure(from, |from| from.array(TopicPartitions::read))?)
            }
            OffsetsKey::CurrentAssignment { .. } => {
                OffsetsValue::CurrentAssignment(structure(from, CurrentAssignment::read)?)
            }
            OffsetsKey::RegularExpression { .. } => {
                OffsetsValue::RegularExpression(structure(from, ResolvedExpression::read)?)
            }
        })
    }

    /// Writes a value, in the version that Kafka 4.1 writes.
    ///
    /// # Errors
    /// [`SchemaError::TooLong`] for a field that its length cannot count.
    pub fn encode(&self) -> Result<Bytes, SchemaError> {
        let mut writer = match self {
            OffsetsValue::OffsetCommit(commit) if commit.expire_timestamp_ms != -1 => Writer::new(1, false),
            OffsetsValue::OffsetCommit(_) => Writer::new(4, true),
            OffsetsValue::GroupMetadata(_) => Writer::new(3, false),
            _ => Writer::new(0, true),
        };
        let to = &mut writer;
        match self {
            OffsetsValue::OffsetCommit(commit) => commit.write(to)?,
            OffsetsValue::GroupMetadata(group) => group.write(to)?,
            OffsetsValue::ConsumerGroup { epoch, metadata_hash } => {
                to.i32(*epoch);
                if *metadata_hash == 0 {
                    to.untagged();
                } else {
                    to.tagged(|field| {
                        field.i64(*metadata_hash);
                        Ok(())
                    })?;
                }
            }
            OffsetsValue::PartitionMetadata(topics) => {
                to.array(topics, |to, topic| topic.write(to))?;
                to.untagged();
            }
            OffsetsValue::Member(member) => member.write(to)?,
            OffsetsValue::TargetAssignmentEpoch(epoch) => {
                to.i32(*epoch);
                to.untagged();
            }
            OffsetsValue::TargetAssignment(topics) => {
                to.array(topics, |to, topic| topic.write(to))?;
                to.untagged();
            }
            OffsetsValue::CurrentAssignment(assignment) => {
                to.i32(assignment.member_epoch);
                to.i32(assignment.previous_member_epoch);
                to.i8(assignment.state);
                to.array(&assignment.assigned, |to, topic| topic.write(to))?;
                to.array(&assignment.pending_revocation, |to, topic| topic.write(to))?;
                to.untagged();
            }
            OffsetsValue::RegularExpression(resolved) => {
                to.array(&resolved.topics, |to, name| to.string(name))?;
                to.i64(resolved.version);
                to.i64(resolved.timestamp_ms);
                to.untagged();
            }
        }
        Ok(writer.bytes.into())
    }
}

/// Fields, and then the tagged ones, of which none is known.
fn structure<'a, T>(
    from: &mut Reader<'a>,
    fields: impl FnOnce(&mut Reader<'a>) -> Result<T, SchemaError>,
) -> Result<T, SchemaError> {
    let value = fields(from)?;
    from.untagged()?;
    Ok(value)
}

impl OffsetCommit {
    fn read(from: &mut Reader<'_>, version: i16) -> Result<OffsetCommit, SchemaError> {
        let offset = from.i64()?;
        let leader_epoch = if version >= 3 { from.i32()? } else { -1 };
        let metadata = from.string()?;
        let commit_timestamp_ms = from.i64()?;
        let expire_timestamp_ms = if version == 1 { from.i64()? } else { -1 };
        let mut topic_id = TopicId::ZERO;
        from.tagged(|tag, field| {
            if tag == 0 {
                topic_id = field.topic_id()?;
            }
            Ok(())
        })?;
        Ok(OffsetCommit { offset, leader_epoch, metadata, commit_timestamp_ms, expire_timestamp_ms, topic_id })
    }

    fn write(&self, to: &mut Writer) -> Result<(), SchemaError> {
        to.i64(self.offset);
        if self.expire_timestamp_ms != -1 {
            to.string(&self.metadata)?;
            to.i64(self.commit_timestamp_ms);
            to.i64(self.expire_timestamp_ms);
            return Ok(());
        }
        to.i32(self.leader_epoch);
        to.string(&self.metadata)?;
        to.i64(self.commit_timestamp_ms);
        if self.topic_id == TopicId::ZERO {
            to.untagged();
            return Ok(());
        }
        to.tagged(|field| {
            field.topic_id(&self.topic_id);
            Ok(())
        })
    }
}

impl GroupMetadata {
    fn read(from: &mut Reader<'_>, version: i16) -> Result<GroupMetadata, SchemaError> {
        structure(from, |from| {
            Ok(GroupMetadata {
                protocol_type: from.string()?,
                generation: from.i32()?,
                protocol: from.nullable_string()?,
                leader: from.nullable_string()?,
                current_state_timestamp_ms: if version >= 2 { from.i64()? } else { -1 },
                members: from.array(|from| {
                    structure(from, |from| {
                        Ok(ClassicMember {
                            member_id: from.string()?,
                            group_instance_id: if version >= 3 { from.nullable_string()? } else { None },
                            client_id: from.string()?,
                            client_host: from.string()?,
                            rebalance_timeout_ms: if version >= 1 { from.i32()? } else { -1 },
                            session_timeout_ms: from.i32()?,
                            subscription: from.byte_string()?,
                            assignment: from.byte_string()?,
                        })
                    })
                })?,
            })
        })
    }

    fn write(&self, to: &mut Writer) -> Result<(), SchemaError> {
        to.string(&self.protocol_type)?;
        to.i32(self.generation);
        to.nullable_string(self.protocol.as_deref())?;
        to.nullable_string(self.leader.as_deref())?;
        to.i64(self.current_state_timestamp_ms);
        to.array(&self.members, |to, member| {
            to.string(&member.member_id)?;
            to.nullable_string(member.group_instance_id.as_deref())?;
            to.string(&member.client_id)?;
            to.string(&member.client_host)?;
            to.i32(member.rebalance_timeout_ms);
            to.i32(member.session_timeout_ms);
            to.byte_string(&member.subscription)?;
            to.byte_string(&member.assignment)
        })
    }
}

impl TopicSnapshot {
    fn read(from: &mut Reader<'_>) -> Result<TopicSnapshot, SchemaError> {
        structure(from, |from| {
            Ok(TopicSnapshot {
                topic_id: from.topic_id()?,
                topic: from.string()?,
                partitions: from.i32()?,
                racks: from.array(|from| {
                    structure(from, |from| {
                        Ok(PartitionRacks { partition: from.i32()?, racks: from.array(Reader::string)? })
                    })
                })?,
            })
        })
    }

    fn write(&self, to: &mut Writer) -> Result<(), SchemaError> {
        to.topic_id(&self.topic_id);
        to.string(&self.topic)?;
        to.i32(self.partitions);
        to.array(&self.racks, |to, partition| {
            to.i32(partition.partition);
            to.array(&partition.racks, |to, rack| to.string(rack))?;
            to.untagged();
            Ok(())
        })?;
        to.untagged();
        Ok(())
    }
}

impl ConsumerMember {
    fn read(from: &mut Reader<'_>) -> Result<ConsumerMember, SchemaError> {
        let mut member = ConsumerMember {
            instance_id: from.nullable_string()?,
            rack_id: from.nullable_string()?,
            client_id: from.string()?,
            client_host: from.string()?,
            subscribed_topics: from.array(Reader::string)?,
            subscribed_regex: from.nullable_string()?,
            rebalance_timeout_ms: from.i32()?,
            server_assignor: from.nullable_string()?,
            classic: None,
            session_timeout_ms: None,
        };
        from.tagged(|tag, field| {
            if tag == SESSION_TIMEOUT_TAG {
                member.session_timeout_ms = Some(field.i32()?);
            }
            // A nullable structure begins with 1, or is -1 when null.
            if tag == 0 && field.i8()? == 1 {
                member.classic = Some(structure(field, |from| {
                    Ok(ClassicMemberMetadata {
                        session_timeout_ms: from.i32()?,
                        supported_protocols: from
                            .array(|from| structure(from, |from| Ok((from.string()?, from.byte_string()?))))?,
                    })
                })?);
            }
            Ok(())
        })?;
        Ok(member)
    }

    fn write(&self, to: &mut Writer) -> Result<(), SchemaError> {
        to.nullable_string(self.instance_id.as_deref())?;
        to.nullable_string(self.rack_id.as_deref())?;
        to.string(&self.client_id)?;
        to.string(&self.client_host)?;
        to.array(&self.subscribed_topics, |to, name| to.string(name))?;
        to.nullable_string(self.subscribed_regex.as_deref())?;
        to.i32(self.rebalance_timeout_ms);
        to.nullable_string(self.server_assignor.as_deref())?;
        let mut fields = Vec::new();
        if let Some(classic) = &self.classic {
            let mut field = Writer::field();
            field.i8(1);
            field.i32(classic.session_timeout_ms);
            field.array(&classic.supported_protocols, |to, (name, metadata)| {
                to.string(name)?;
                to.byte_string(metadata)?;
                to.untagged();
                Ok(())
            })?;
            field.untagged();
            fields.push((0, field));
        }
        if let Some(session_timeout_ms) = self.session_timeout_ms {
            let mut field = Writer::field();
            field.i32(session_timeout_ms);
            fields.push((SESSION_TIMEOUT_TAG, field));
        }
        to.tagged_fields(fields)
    }
}

impl TopicPartitions {
    fn read(from: &mut Reader<'_>) -> Result<TopicPartitions, SchemaError> {
        structure(from, |from| Ok(TopicPartitions { topic_id: from.topic_id()?, partitions: from.array(Reader::i32)? }))
    }

    fn write(&self, to: &mut Writer) -> Result<(), SchemaError> {
        to.topic_id(&self.topic_id);
        to.array(&self.partitions, |to, partition| {
            to.i32(*partition);
            Ok(())
        })?;
        to.untagged();
        Ok(())
    }
}

impl CurrentAssignment {
    fn read(from: &mut Reader<'_>) -> Result<CurrentAssignment, SchemaError> {
        Ok(CurrentAssignment {
            member_epoch: from.i32()?,
            previous_member_epoch: from.i32()?,
            state: from.i8()?,
            assigned: from.array(TopicPartitions::read)?,
            pending_revocation: from.array(TopicPartitions::read)?,
        })
    }
}

impl ResolvedExpression {
    fn read(from: &mut Reader<'_>) -> Result<ResolvedExpression, SchemaError> {
        Ok(ResolvedExpression { topics: from.array(Reader::string)?, version: from.i64()?, timestamp_ms: from.i64()? })
    }
}
