//! What [`super::Admin`] asks and answers, in the words of the log.
//!
//! Owns: the types and how they come out of wire messages. Refuses: calls (see `admin.rs`).

use std::sync::Arc;

use headwater_proto::{TopicId, wire};

use crate::TopicPartition;
use crate::error::{Error, Refusal};

/// A topic to be created.
#[derive(Debug, Clone, Default)]
pub struct NewTopic {
    pub(super) name: String,
    pub(super) partitions: u32,
    pub(super) replication_factor: u32,
    pub(super) config: Vec<(String, String)>,
    pub(super) validate_only: bool,
    pub(super) placement: Vec<Vec<i32>>,
}

impl NewTopic {
    /// A topic with the broker's default number of partitions, replication and settings.
    pub fn new(name: impl Into<String>) -> NewTopic {
        NewTopic { name: name.into(), ..NewTopic::default() }
    }

    /// How many partitions.
    pub fn partitions(mut self, partitions: u32) -> NewTopic {
        self.partitions = partitions;
        self
    }

    /// How many replicas each partition has.
    pub fn replication_factor(mut self, replicas: u32) -> NewTopic {
        self.replication_factor = replicas;
        self
    }

    /// A setting of the topic, under Kafka's name (`retention.ms`, ...).
    pub fn config(mut self, name: impl Into<String>, value: impl Into<String>) -> NewTopic {
        self.config.push((name.into(), value.into()));
        self
    }

    /// Which brokers keep each partition, the leader first. Without it the cluster chooses.
    pub fn placement(mut self, placement: Vec<Vec<i32>>) -> NewTopic {
        self.placement = placement;
        self
    }

    /// Only say whether it would be created.
    pub fn validate_only(mut self, validate_only: bool) -> NewTopic {
        self.validate_only = validate_only;
        self
    }
}

/// A topic just created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedTopic {
    /// Its id; zero where it was only validated.
    pub topic_id: TopicId,
    /// How many partitions it has.
    pub partitions: u32,
    /// How many replicas each partition has.
    pub replication_factor: u32,
}

/// A topic, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicListing {
    /// Its name.
    pub name: String,
    /// Its id.
    pub topic_id: TopicId,
    /// How many partitions it has.
    pub partitions: u32,
    /// How many replicas each partition has.
    pub replication_factor: u32,
    /// Whether it is the cluster's own (`__consumer_offsets`).
    pub internal: bool,
}

/// A topic, in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicDescription {
    /// Its name.
    pub name: String,
    /// Its id.
    pub topic_id: TopicId,
    /// Whether it is the cluster's own.
    pub internal: bool,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionDescription>,
    /// Every setting with its value and where that comes from.
    pub config: Vec<ConfigEntry>,
}

/// A partition's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionDescription {
    /// Its number.
    pub partition: u32,
    /// The broker that leads it; -1: none.
    pub leader: i32,
    /// The leader's epoch.
    pub leader_epoch: i32,
    /// The brokers that hold it.
    pub replicas: Vec<i32>,
    /// Those of them that are in sync.
    pub isr: Vec<i32>,
    /// The first offset it holds, as its leader says; -1: no leader says it.
    pub log_start_offset: i64,
    /// The offset up to which it may be read; -1 likewise. Just after a change of leader it may be behind what was acknowledged:
    /// [`super::Admin::list_offsets`] waits for that.
    pub high_watermark: i64,
    /// The offset the next record gets; -1 likewise.
    pub log_end_offset: i64,
    /// Bytes of the leader's segments.
    pub size_bytes: u64,
    /// Why it is not served, if it is not.
    pub fenced: Option<Refusal>,
}

/// A setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigEntry {
    /// Its name, Kafka's.
    pub name: String,
    /// Its value, as text.
    pub value: String,
    /// `topic`, `broker` or `default`.
    pub source: String,
}

/// Which offset of a partition is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetAt {
    /// The first one the log holds.
    Earliest,
    /// The high watermark: the offset of the next record to become readable.
    Latest,
    /// The first record whose timestamp is at or after this one, in milliseconds since 1970.
    Timestamp(i64),
    /// The record with the largest timestamp.
    MaxTimestamp,
    /// The end of a leader epoch.
    LeaderEpochEnd(i32),
}

/// A question to [`super::Admin::list_offsets`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetQuery {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Which offset.
    pub at: OffsetAt,
}

/// The answer to an [`OffsetQuery`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetAnswer {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// The offset, if there is such a record.
    pub offset: Option<i64>,
    /// The record's timestamp in milliseconds; -1 where no record was asked for.
    pub timestamp_ms: i64,
    /// The leader epoch of the record; -1: unknown.
    pub leader_epoch: i32,
    /// The first offset the log holds.
    pub log_start_offset: i64,
    /// The offset up to which it may be read.
    pub high_watermark: i64,
}

/// A consumer group, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupListing {
    /// Its name.
    pub group: String,
    /// `empty`, `assigning`, `reconciling`, `stable` or `dead`.
    pub state: String,
    /// How many members it has.
    pub members: u32,
    /// How it assigns.
    pub assignor: String,
}

/// A consumer group, in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupDescription {
    /// Its name.
    pub group: String,
    /// As in [`GroupListing::state`].
    pub state: String,
    /// The group's epoch.
    pub epoch: i32,
    /// How it assigns.
    pub assignor: String,
    /// Its members.
    pub members: Vec<MemberDescription>,
    /// Its offsets: every partition with a commit or an owner.
    pub offsets: Vec<GroupOffset>,
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberDescription {
    /// Its id.
    pub member_id: String,
    /// Its static identity, if it has one.
    pub instance_id: Option<String>,
    /// What it calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// Its epoch.
    pub member_epoch: i32,
    /// What it owns.
    pub assigned: Vec<TopicPartition>,
    /// What it is to own.
    pub target: Vec<TopicPartition>,
    /// What it subscribes to.
    pub topics: Vec<String>,
}

/// How far a group is with a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOffset {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// The next offset to read, if one was committed.
    pub committed: Option<i64>,
    /// The first offset the log holds.
    pub log_start_offset: i64,
    /// The offset up to which it may be read.
    pub high_watermark: i64,
    /// Records still to be read; `None` where nothing was committed.
    pub lag: Option<i64>,
    /// Leader epoch of the commit; -1: unknown.
    pub leader_epoch: i32,
    /// What the committer added.
    pub metadata: String,
}

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedOffset {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// The next offset to read.
    pub offset: i64,
    /// Leader epoch of the record before it; -1: unknown.
    pub leader_epoch: i32,
    /// What the committer added.
    pub metadata: String,
    /// When it was committed, in milliseconds since 1970.
    pub commit_time_ms: i64,
}

/// A broker's own account of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct BrokerDescription {
    /// Its id.
    pub broker_id: i32,
    /// Its cluster's id.
    pub cluster_id: String,
    /// Its software and version.
    pub software: String,
    /// Its process id.
    pub pid: u32,
    /// When it started, in milliseconds since 1970.
    pub started_ms: i64,
    /// User and system time of its process, in seconds.
    pub cpu_seconds: f64,
    /// Open connections.
    pub connections: u32,
    /// Its I/O threads.
    pub io_threads: u32,
    /// Its resident memory, in bytes.
    pub resident_bytes: u64,
    /// Where its HTTP port for health and metrics is.
    pub admin_address: String,
}

/// A cluster: who is in it, who votes on its metadata, who is the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterDescription {
    /// The cluster's id.
    pub cluster_id: String,
    /// The broker that is the controller, if one is in office.
    pub controller: Option<i32>,
    /// The newest controller's epoch.
    pub controller_epoch: u64,
    /// Brokers that vote on the metadata.
    pub voters: Vec<i32>,
    /// Votes beside theirs that nobody casts: of disks that were emptied, before the broker votes again. A majority is one of all votes.
    pub vacant_votes: u32,
    /// Brokers that follow the metadata without a vote.
    pub observers: Vec<i32>,
    /// Every broker that has come in, running or not.
    pub brokers: Vec<ClusterBroker>,
    /// Partitions with fewer in-sync replicas than replicas.
    pub under_replicated: u64,
    /// Partitions with fewer in-sync replicas than `min.insync.replicas`.
    pub under_min_isr: u64,
    /// Partitions that nobody leads.
    pub offline: u64,
    /// The version of the metadata.
    pub metadata_version: u64,
}

/// A broker of a cluster, as the metadata know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterBroker {
    /// Its id.
    pub id: i32,
    /// Which start of it: another one after each.
    pub incarnation: String,
    /// Where it is reached.
    pub address: String,
    /// Where it stands; empty: nobody said.
    pub rack: String,
    /// `active`, `fenced` or `draining`.
    pub state: String,
    /// How many partitions it leads.
    pub leaders: u64,
    /// How many partitions it keeps.
    pub partitions: u64,
    /// When it registered, in milliseconds since 1970.
    pub registered_ms: i64,
}

/// A cluster's brokers and topics.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterMetadata {
    /// The cluster's id.
    pub cluster_id: String,
    /// Its brokers: id and address.
    pub brokers: Vec<(i32, String)>,
    /// Its topics.
    pub topics: Vec<TopicListing>,
}

pub(super) fn topic_id(bytes: &[u8]) -> Result<TopicId, Error> {
    TopicId::from_slice(bytes).ok_or_else(|| Error::Protocol("a topic id that has not 16 bytes".into()))
}

impl TryFrom<wire::TopicMetadata> for TopicListing {
    type Error = Error;

    fn try_from(topic: wire::TopicMetadata) -> Result<TopicListing, Error> {
        if let Some(error) = topic.error {
            return Err(Error::Refused(error.into()));
        }
        Ok(TopicListing {
            topic_id: topic_id(&topic.topic_id)?,
            name: topic.name,
            partitions: u32::try_from(topic.partitions.len()).unwrap_or(u32::MAX),
            replication_factor: topic.replication_factor,
            internal: topic.internal,
        })
    }
}

impl TryFrom<wire::DescribeTopicResponse> for TopicDescription {
    type Error = Error;

    fn try_from(topic: wire::DescribeTopicResponse) -> Result<TopicDescription, Error> {
        let config = topic.config.into_iter();
        Ok(TopicDescription {
            topic_id: topic_id(&topic.topic_id)?,
            name: topic.name,
            internal: topic.internal,
            partitions: topic.partitions.into_iter().map(Into::into).collect(),
            config: config.map(|c| ConfigEntry { name: c.name, value: c.value, source: c.source }).collect(),
        })
    }
}

impl From<wire::PartitionDescription> for PartitionDescription {
    fn from(p: wire::PartitionDescription) -> PartitionDescription {
        PartitionDescription {
            partition: p.partition,
            leader: p.leader,
            leader_epoch: p.leader_epoch,
            replicas: p.replicas,
            isr: p.isr,
            log_start_offset: p.log_start_offset,
            high_watermark: p.high_watermark,
            log_end_offset: p.log_end_offset,
            size_bytes: p.size_bytes,
            fenced: p.fenced.map(Into::into),
        }
    }
}

impl From<OffsetAt> for wire::offset_query::At {
    fn from(at: OffsetAt) -> wire::offset_query::At {
        use wire::offset_query::At;
        match at {
            OffsetAt::Earliest => At::Earliest(wire::Done {}),
            OffsetAt::Latest => At::Latest(wire::Done {}),
            OffsetAt::Timestamp(ms) => At::TimestampMs(ms),
            OffsetAt::MaxTimestamp => At::MaxTimestamp(wire::Done {}),
            OffsetAt::LeaderEpochEnd(epoch) => At::LeaderEpochEnd(epoch),
        }
    }
}

impl From<OffsetQuery> for wire::OffsetQuery {
    fn from(query: OffsetQuery) -> wire::OffsetQuery {
        wire::OffsetQuery { topic: query.topic, partition: query.partition, at: Some(query.at.into()) }
    }
}

impl From<wire::OffsetAnswer> for OffsetAnswer {
    fn from(a: wire::OffsetAnswer) -> OffsetAnswer {
        OffsetAnswer {
            topic: a.topic,
            partition: a.partition,
            offset: (a.offset >= 0).then_some(a.offset),
            timestamp_ms: a.timestamp_ms,
            leader_epoch: a.leader_epoch,
            log_start_offset: a.log_start_offset,
            high_watermark: a.high_watermark,
        }
    }
}

impl From<wire::GroupListing> for GroupListing {
    fn from(g: wire::GroupListing) -> GroupListing {
        GroupListing { group: g.group, state: g.state, members: g.members, assignor: g.assignor }
    }
}

impl From<wire::DescribeGroupResponse> for GroupDescription {
    fn from(g: wire::DescribeGroupResponse) -> GroupDescription {
        GroupDescription {
            group: g.group,
            state: g.state,
            epoch: g.epoch,
            assignor: g.assignor,
            members: g.members.into_iter().map(Into::into).collect(),
            offsets: g.offsets.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<wire::MemberDescription> for MemberDescription {
    fn from(m: wire::MemberDescription) -> MemberDescription {
        MemberDescription {
            member_id: m.member_id,
            instance_id: (!m.instance_id.is_empty()).then_some(m.instance_id),
            client_id: m.client_id,
            client_host: m.client_host,
            member_epoch: m.member_epoch,
            assigned: flatten(m.assigned),
            target: flatten(m.target),
            topics: m.topics,
        }
    }
}

impl From<wire::GroupOffset> for GroupOffset {
    fn from(o: wire::GroupOffset) -> GroupOffset {
        GroupOffset {
            topic: o.topic,
            partition: o.partition,
            committed: (o.committed >= 0).then_some(o.committed),
            log_start_offset: o.log_start_offset,
            high_watermark: o.high_watermark,
            lag: (o.committed >= 0).then_some(o.lag),
            leader_epoch: o.leader_epoch,
            metadata: o.metadata,
        }
    }
}

impl From<wire::CommittedOffset> for CommittedOffset {
    fn from(o: wire::CommittedOffset) -> CommittedOffset {
        CommittedOffset {
            topic: o.topic,
            partition: o.partition,
            offset: o.offset,
            leader_epoch: o.leader_epoch,
            metadata: o.metadata,
            commit_time_ms: o.commit_time_ms,
        }
    }
}

impl From<wire::DescribeBrokerResponse> for BrokerDescription {
    fn from(b: wire::DescribeBrokerResponse) -> BrokerDescription {
        BrokerDescription {
            broker_id: b.broker_id,
            cluster_id: b.cluster_id,
            software: b.software,
            pid: b.pid,
            started_ms: b.started_ms,
            cpu_seconds: b.cpu_seconds,
            connections: b.connections,
            io_threads: b.io_threads,
            resident_bytes: b.resident_bytes,
            admin_address: b.admin_address,
        }
    }
}

impl From<wire::DescribeClusterResponse> for ClusterDescription {
    fn from(c: wire::DescribeClusterResponse) -> ClusterDescription {
        ClusterDescription {
            cluster_id: c.cluster_id,
            controller: (c.controller >= 0).then_some(c.controller),
            controller_epoch: c.controller_epoch,
            voters: c.voters,
            vacant_votes: c.vacant_votes,
            observers: c.observers,
            brokers: c.brokers.into_iter().map(Into::into).collect(),
            under_replicated: c.under_replicated,
            under_min_isr: c.under_min_isr,
            offline: c.offline,
            metadata_version: c.metadata_version,
        }
    }
}

impl From<wire::BrokerDescription> for ClusterBroker {
    fn from(b: wire::BrokerDescription) -> ClusterBroker {
        ClusterBroker {
            id: b.broker_id,
            incarnation: b.incarnation.iter().map(|byte| format!("{byte:02x}")).collect(),
            address: b.address,
            rack: b.rack,
            state: b.state,
            leaders: b.leaders,
            partitions: b.partitions,
            registered_ms: b.registered_ms,
        }
    }
}

fn flatten(topics: Vec<wire::TopicPartitions>) -> Vec<TopicPartition> {
    let of_topic = |t: wire::TopicPartitions| {
        let topic: Arc<str> = t.topic.into();
        t.partitions.into_iter().map(move |partition| TopicPartition { topic: topic.clone(), partition })
    };
    topics.into_iter().flat_map(of_topic).collect()
}
