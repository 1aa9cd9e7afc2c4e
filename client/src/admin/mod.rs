//! Administration: topics, offsets, groups, brokers.
//!
//! Owns: one method for each call of the protocol; those about the cluster stand in [`cluster`]. Refuses: state of its own.
//! Read next: [`types`].

mod types;

pub use types::*;

use std::sync::Arc;

use headwater_proto::wire::{self, call::Request, call_response::Response};

use crate::TopicPartition;
use crate::connection::Connections;
use crate::error::{Error, Refusal};
use crate::leaders::Leaders;
use crate::metadata::Metadata;

/// Administrative calls. Cheap to clone.
///
/// Every call is repeated while that can help, for as long as [`crate::ClientConfig::request_timeout`] allows. What changes topics
/// or the cluster bears an id, by which it is done once. Calls that have none and would not give the same answer twice (deleting
/// groups and their offsets) are not repeated once their outcome is unknown: then the error says that the request may have taken
/// effect.
///
/// ```no_run
/// # async fn example() -> Result<(), headwater_client::Error> {
/// use headwater_client::{Client, ClientConfig, NewTopic};
/// let client = Client::connect(ClientConfig::from_profile("client.toml")?).await?;
/// client.admin().create_topic(NewTopic::new("flights").partitions(6).config("retention.ms", "3600000")).await?;
/// for topic in client.admin().list_topics().await? {
///     println!("{} has {} partitions", topic.name, topic.partitions);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Admin {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    stale: bool,
    is_patient: bool,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").field("bootstrap", &self.connections.config.bootstrap).finish_non_exhaustive()
    }
}

/// Calls, and takes the one kind of answer that belongs to the request.
macro_rules! call {
    ($admin:expr, $what:literal, $request:ident($body:expr) => $response:ident) => {
        match $admin.connections.ask($what, $admin.is_patient, Request::$request($body)).await? {
            (_, Response::$response(answer)) => answer,
            _ => return Err(Error::Protocol(concat!("an answer that does not belong to ", $what).into())),
        }
    };
}

/// As `call!`, to the coordinator of a group.
macro_rules! call_coordinator {
    ($admin:expr, $group:expr, $what:literal, $request:ident($body:expr) => $response:ident) => {
        match $admin.metadata.coordinators().call($group, $what, $admin.is_patient, Request::$request($body)).await? {
            Response::$response(answer) => answer,
            _ => return Err(Error::Protocol(concat!("an answer that does not belong to ", $what).into())),
        }
    };
}

mod cluster;

pub use cluster::*;

impl Admin {
    pub(crate) fn new(connections: Arc<Connections>, metadata: Arc<Metadata>) -> Admin {
        Admin { connections, metadata, stale: false, is_patient: true }
    }

    fn leaders(&self) -> Leaders {
        Leaders::new(self.connections.clone(), self.metadata.clone())
    }

    /// The same, but what is described and listed is what the broker that is asked knows, though the others may know more. It
    /// answers also where the cluster has lost its majority.
    pub fn stale(&self) -> Admin {
        Admin { stale: true, ..self.clone() }
    }

    /// The same, but where the cluster has lost the majority of its metadata quorum, it is not waited for: a call fails once every broker that is
    /// reached has said so.
    pub fn impatient(&self) -> Admin {
        Admin { is_patient: false, ..self.clone() }
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// When the topic exists, or its name, partitions or settings are refused (by name).
    pub async fn create_topic(&self, topic: NewTopic) -> Result<CreatedTopic, Error> {
        let config = topic.config.into_iter().map(|(name, value)| wire::ConfigChange { name, value: Some(value) });
        let _changing = self.metadata.changing(&topic.name);
        let request = wire::CreateTopic {
            name: topic.name.clone(),
            partitions: topic.partitions,
            replication_factor: topic.replication_factor,
            config: config.collect(),
            validate_only: topic.validate_only,
            placement: topic.placement.into_iter().map(|brokers| wire::TopicReplicas { brokers }).collect(),
        };
        let answer = call!(self, "create topic", CreateTopic(request) => CreateTopic);
        Ok(CreatedTopic {
            topic_id: headwater_proto::TopicId::from_slice(&answer.topic_id).unwrap_or(headwater_proto::TopicId::ZERO),
            partitions: answer.partitions,
            replication_factor: answer.replication_factor,
        })
    }

    /// All topics, in the order of their names.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn list_topics(&self) -> Result<Vec<TopicListing>, Error> {
        let mut topics = self.metadata(&[]).await?.topics;
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(topics)
    }

    /// A topic's partitions and settings. What only a partition's leader knows is asked of that one; it is missing (-1) where
    /// there is no leader, or none that answers within some seconds.
    ///
    /// # Errors
    /// When there is no such topic.
    pub async fn describe_topic(&self, name: &str) -> Result<TopicDescription, Error> {
        self.leaders().describe_topic(name, self.stale, self.is_patient).await?.try_into()
    }

    /// Changes settings: a value, or `None` for the broker's own. All of them, or none.
    ///
    /// # Errors
    /// When a setting is unknown or its value makes no sense.
    pub async fn alter_topic(
        &self,
        name: &str,
        changes: Vec<(String, Option<String>)>,
        validate_only: bool,
    ) -> Result<(), Error> {
        let config = changes.into_iter().map(|(name, value)| wire::ConfigChange { name, value }).collect();
        let _changing = self.metadata.changing(name);
        let request = wire::AlterTopic { name: name.into(), config, validate_only };
        call!(self, "alter topic", AlterTopic(request) => Done);
        Ok(())
    }

    /// Raises the number of partitions to `total`. Keys move to other partitions with it.
    ///
    /// # Errors
    /// When the topic has that many already.
    pub async fn add_partitions(&self, name: &str, total: u32) -> Result<(), Error> {
        let _changing = self.metadata.changing(name);
        let request = wire::AddPartitions { name: name.into(), partitions: total };
        call!(self, "add partitions", AddPartitions(request) => Done);
        Ok(())
    }

    /// Deletes a topic with its records and the offsets that groups committed for it.
    ///
    /// # Errors
    /// When there is no such topic, or it is the cluster's own.
    pub async fn delete_topic(&self, name: &str) -> Result<(), Error> {
        let _changing = self.metadata.changing(name);
        let request = wire::DeleteTopic { name: name.into() };
        call!(self, "delete topic", DeleteTopic(request) => Done);
        Ok(())
    }

    /// Deletes a partition's records below offset `before`; `None`: all that can be read. Returns the first offset left.
    ///
    /// # Errors
    /// When `before` is beyond the high watermark.
    pub async fn delete_records(&self, topic: &str, partition: u32, before: Option<i64>) -> Result<i64, Error> {
        let request = wire::DeleteRecords { topic: topic.into(), partition, before_offset: before.unwrap_or(-1) };
        let request = Request::DeleteRecords(request);
        match self.leaders().call("delete records", topic, partition, request).await? {
            Response::DeleteRecords(answer) => Ok(answer.log_start_offset),
            _ => Err(Error::Protocol("an answer that does not belong to delete records".into())),
        }
    }

    /// Offsets by place or time, answered one by one in the order of the questions, each by the partition's leader.
    ///
    /// # Errors
    /// When no broker can be asked; what is wrong with a single question stands in its answer.
    pub async fn list_offsets(&self, queries: Vec<OffsetQuery>) -> Result<Vec<Result<OffsetAnswer, Refusal>>, Error> {
        let queries = queries.into_iter().map(Into::into).collect();
        let answers = self.leaders().list_offsets_patiently(queries).await?;
        Ok(answers.into_iter().map(|answer| answer.map(Into::into)).collect())
    }

    /// All consumer groups.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn list_groups(&self) -> Result<Vec<GroupListing>, Error> {
        Ok(self.metadata.coordinators().list(self.is_patient).await?.into_iter().map(Into::into).collect())
    }

    /// A group's members, what they own, and how far the group is.
    ///
    /// # Errors
    /// When there is no such group.
    pub async fn describe_group(&self, group: &str) -> Result<GroupDescription, Error> {
        let request = wire::DescribeGroup { group: group.into() };
        let mut described = call_coordinator!(self, group, "describe group", DescribeGroup(request) => DescribeGroup);
        self.leaders().fill_in_offsets(&mut described.offsets).await?;
        Ok(described.into())
    }

    /// Deletes a group and its offsets.
    ///
    /// # Errors
    /// When it has members, or does not exist.
    pub async fn delete_group(&self, group: &str) -> Result<(), Error> {
        let request = wire::DeleteGroup { group: group.into() };
        call_coordinator!(self, group, "delete group", DeleteGroup(request) => Done);
        Ok(())
    }

    /// Deletes a group's offsets of a topic: of `partitions`, or of all if that is empty.
    ///
    /// # Errors
    /// When a member subscribes to the topic, or the group, the topic or a partition does not exist.
    pub async fn delete_offsets(&self, group: &str, topic: &str, partitions: &[u32]) -> Result<(), Error> {
        let request = wire::DeleteOffsets { group: group.into(), topic: topic.into(), partitions: partitions.to_vec() };
        call_coordinator!(self, group, "delete offsets", DeleteOffsets(request) => Done);
        Ok(())
    }

    /// Everything a group has committed.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn fetch_offsets(&self, group: &str) -> Result<Vec<CommittedOffset>, Error> {
        let request = wire::FetchOffsets { group: group.into(), ..wire::FetchOffsets::default() };
        let answer = call_coordinator!(self, group, "fetch offsets", FetchOffsets(request) => FetchOffsets);
        Ok(answer.offsets.into_iter().map(Into::into).collect())
    }

    /// Sets a group's offsets: a reset. The group must have no members at that moment. Answered one by one, in order.
    ///
    /// # Errors
    /// When the broker cannot be asked, or the group has members.
    pub async fn commit_offsets(
        &self,
        group: &str,
        offsets: Vec<(TopicPartition, i64)>,
    ) -> Result<Vec<(TopicPartition, Result<(), Refusal>)>, Error> {
        let entries = offsets.iter().map(|(at, offset)| wire::OffsetEntry {
            topic: at.topic.to_string(),
            partition: at.partition,
            offset: *offset,
            leader_epoch: -1,
            ..wire::OffsetEntry::default()
        });
        let request =
            wire::CommitOffsets { group: group.into(), offsets: entries.collect(), ..wire::CommitOffsets::default() };
        let results = call_coordinator!(self, group, "commit offsets", CommitOffsets(request) => CommitOffsets).results;
        if results.len() != offsets.len() {
            return Err(Error::Protocol(format!("{} answers to {} commits", results.len(), offsets.len())));
        }
        let told = |result: wire::Error| if result.code == 0 { Ok(()) } else { Err(result.into()) };
        Ok(offsets.into_iter().zip(results).map(|((at, _), result)| (at, told(result))).collect())
    }

    /// What the broker at the other end of the control connection says of itself.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub async fn describe_broker(&self) -> Result<BrokerDescription, Error> {
        Ok(call!(self, "describe broker", DescribeBroker(wire::DescribeBroker {}) => DescribeBroker).into())
    }

    /// Brokers and topics; of all topics if `topics` is empty.
    ///
    /// # Errors
    /// When one of `topics` does not exist.
    pub async fn metadata(&self, topics: &[&str]) -> Result<ClusterMetadata, Error> {
        let topics = topics.iter().map(|t| (*t).to_owned()).collect();
        let request = wire::Metadata { topics, topic_ids: Vec::new(), confirmed: !self.stale };
        let answer = call!(self, "metadata", Metadata(request) => Metadata);
        self.connections.learn_brokers(&answer.brokers);
        Ok(ClusterMetadata {
            cluster_id: answer.cluster_id,
            brokers: answer.brokers.into_iter().map(|b| (b.broker_id, b.address)).collect(),
            topics: answer.topics.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}
