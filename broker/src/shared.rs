//! What all of a broker's tasks share.
//!
//! Owns: [`Shared`]: the parts, wired together in [`crate::Broker::start`], and how a partition is found. Refuses: to own
//! any of the parts' state. Read next: [`crate::server`].

use crate::cluster_calls;
use crate::config::BrokerConfig;
use crate::error::PartitionError;
use crate::group::{GroupError, Groups};
use crate::metadata::name::OFFSETS_TOPIC;
use crate::metadata::raft::RaftNode;
use crate::metadata::several::Ready;
use crate::metadata::{MetadataHandle, MetadataState};
use crate::metrics::Metrics;
use crate::partition::PartitionHandle;
use crate::partitions::Partitions;
use crate::pool::Pool;
use crate::replica::throttle::Throttles;
use crate::server::Connections;
use crate::tls;
use crate::tls::live::Live;
use headwater_proto::{ErrorCode, TopicId, wire};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A running broker's parts.
pub(crate) struct Shared {
    pub(crate) config: BrokerConfig,
    pub(crate) cluster_id: String,
    /// What this broker shows, and whom it trusts.
    pub(crate) tls: Arc<Live>,
    pub(crate) started_ms: i64,
    /// Threads that serve connections.
    pub(crate) network_threads: u32,
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) pool: Pool,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) partitions: Arc<Partitions>,
    pub(crate) metadata: MetadataHandle,
    pub(crate) groups: Groups,
    pub(crate) connections: Arc<Connections>,
    /// This broker's member of the metadata quorum.
    pub(crate) node: Option<RaftNode>,
    /// Of a broker that is one of several.
    pub(crate) ready: Option<Ready>,
    /// Memory for frames larger than their stream's share of credit.
    pub(crate) loans: Arc<Semaphore>,
    /// What partitions that move to other brokers are sent.
    pub(crate) throttles: Arc<Throttles>,
    pub(crate) sessions: TaskTracker,
    /// Streams of those who watch: each ends once its client has heard what is new.
    pub(crate) watches: TaskTracker,
    /// Those who watch are told the last of it: shutdown follows.
    pub(crate) leaving: CancellationToken,
    /// Shutdown has begun: nothing new is taken.
    pub(crate) shutdown: CancellationToken,
    /// Shutdown is over: everything is closed.
    pub(crate) closed: CancellationToken,
}

impl Shared {
    /// This broker's id as the wire has it.
    pub(crate) fn broker_id(&self) -> i32 {
        i32::try_from(self.config.broker_id).unwrap_or(i32::MAX)
    }

    /// What clients are told to connect to.
    pub(crate) fn advertised(&self) -> String {
        self.config.advertised_listener.clone().unwrap_or_else(|| tls::reachable(self.listen).to_string())
    }

    /// Who leads a partition, for a client that asked in a wrong epoch.
    pub(crate) fn leader_hint(&self, leader_epoch: i32) -> wire::LeaderHint {
        wire::LeaderHint { broker_id: self.broker_id(), address: self.advertised(), leader_epoch }
    }

    /// The partition that a stream names.
    pub(crate) fn partition(&self, topic_id: &[u8], partition: u32) -> Result<PartitionHandle, wire::Error> {
        let Some(id) = TopicId::from_slice(topic_id) else {
            let why = format!("a topic id has 16 bytes, not {}", topic_id.len());
            return Err(wire::Error::new(ErrorCode::InvalidRequest, why));
        };
        if let Some(found) = self.partitions.get(&id, partition) {
            return Ok(found);
        }
        let state = self.metadata.state();
        Err(match state.topic_by_id(&id) {
            None => wire::Error::new(ErrorCode::UnknownTopicId, format!("no topic has the id {id}: it was deleted")),
            Some(topic) if partition as usize >= topic.partitions.len() => wire::Error::new(
                ErrorCode::UnknownPartition,
                format!("topic {} has {} partitions, and no number {partition}", topic.name, topic.partitions.len()),
            ),
            Some(topic) => {
                let why = format!("this broker does not lead {}-{partition}", topic.name);
                let leader = self.leader_of(&state, &id, partition);
                wire::Error { leader, ..wire::Error::new(ErrorCode::NotLeader, why) }
            }
        })
    }

    /// Looks something up that others may know of already: what would be refused for good is looked up again once everything is known
    /// here that was in force before.
    ///
    /// # Errors
    /// As `look_up`; one that may pass where the newest metadata are not known in time.
    pub(crate) async fn look_twice<T>(&self, look_up: impl Fn() -> Result<T, wire::Error>) -> Result<T, wire::Error> {
        match look_up() {
            Err(error) if !error.retryable => {
                cluster_calls::look_again(self).await?;
                look_up()
            }
            found => found,
        }
    }

    /// The partition that a reader names who was sent to this replica of it.
    pub(crate) fn replica(&self, topic_id: &[u8], partition: u32) -> Result<PartitionHandle, wire::Error> {
        let refused = match self.partition(topic_id, partition) {
            Ok(found) => return Ok(found),
            Err(refused) => refused,
        };
        let kept = TopicId::from_slice(topic_id).and_then(|id| self.partitions.replica(&id, partition));
        kept.filter(PartitionHandle::is_in_sync).ok_or(refused)
    }

    /// What a peer is told of a partition that refused something: where this broker does not lead it any more, who does.
    pub(crate) fn refusal(&self, partition: &PartitionHandle, error: &PartitionError) -> wire::Error {
        let state = self.metadata.state();
        let topic = state.topic_by_id(&partition.topic_id());
        let known = topic.and_then(|topic| topic.partitions.get(partition.partition() as usize));
        let is_elsewhere = known.is_some_and(|known| !known.replicas.contains(&self.broker_id()));
        let mut told = match error {
            // Only what was kept here.
            PartitionError::Deleted if is_elsewhere => PartitionError::NotLeader(partition.leader_epoch()).to_wire(),
            error => error.to_wire(),
        };
        if told.code == ErrorCode::NotLeader.number() {
            told.leader = self.leader_of(&state, &partition.topic_id(), partition.partition());
        }
        told
    }

    /// What whoever asks about a group is told: where this broker does not coordinate it, who does.
    pub(crate) fn group_refusal(&self, group: &str, error: &GroupError) -> wire::Error {
        let mut told = wire::Error::from(error);
        if error.code() == ErrorCode::NotCoordinator {
            let (state, found) = (self.metadata.state(), self.groups.known_coordinator(group));
            let topic = state.topic(OFFSETS_TOPIC).zip(found.filter(|found| found.broker_id != self.broker_id()));
            told.leader = topic.and_then(|(topic, found)| self.leader_of(&state, &topic.id, found.partition));
        }
        told
    }

    /// Who leads a partition, as the metadata have it.
    fn leader_of(&self, state: &MetadataState, topic_id: &TopicId, partition: u32) -> Option<wire::LeaderHint> {
        let partition = state.topic_by_id(topic_id)?.partitions.get(partition as usize)?;
        let leader_epoch = partition.leader_epoch;
        if partition.leader == self.broker_id() {
            return Some(self.leader_hint(leader_epoch));
        }
        let address = self.address_of(state, partition.leader)?;
        Some(wire::LeaderHint { broker_id: partition.leader, address, leader_epoch })
    }

    /// Where clients reach a broker.
    pub(crate) fn address_of(&self, state: &MetadataState, broker_id: i32) -> Option<String> {
        match broker_id == self.broker_id() {
            true => Some(self.advertised()),
            false => state.broker(broker_id).map(|broker| broker.address.clone()),
        }
    }
}
