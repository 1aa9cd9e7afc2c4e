//! The Headwater client: producer, consumer, consumer groups and administration over QUIC.
//!
//! [`Client::connect`] reaches a cluster. [`Client::producer`] sends records, [`Client::consumer`] reads them, alone or in a
//! group, and [`Client::admin`] administers topics and groups.
//!
//! Owns: what an application links. Refuses: knowing how a broker stores anything. To follow a record through the source,
//! read `config.rs`, `connection.rs`, then `producer/mod.rs` and `consumer/mod.rs`.
//!
//! ```no_run
//! # async fn example() -> Result<(), headwater_client::Error> {
//! use headwater_client::{Client, ClientConfig};
//! let client = Client::connect(ClientConfig::from_profile("headwater-data/client.toml")?).await?;
//! println!("broker {} of cluster {}", client.broker().broker_id, client.broker().cluster_id);
//! client.close().await;
//! # Ok(()) }
//! ```

// Whoever keeps one of these in a type of theirs can derive `Debug`.
#![warn(missing_debug_implementations)]

mod admin;
mod config;
mod connection;
mod consumer;
mod coordinators;
mod error;
mod leaders;
mod lookup;
mod metadata;
mod partitioner;
#[cfg(not(feature = "planted-bugs"))]
mod planted;
#[cfg(feature = "planted-bugs")]
#[doc(hidden)]
pub mod planted;
mod producer;
pub mod quic;
mod reach;
mod retry;
#[cfg(feature = "simulation")]
#[doc(hidden)]
pub mod simulation;
mod stream;
mod watch;

pub use admin::{
    AddingReplica, Admin, BrokerDescription, BrokerHealth, ClusterBroker, ClusterDescription, ClusterHealth,
    ClusterMetadata, CommittedOffset, ConfigEntry, CreatedTopic, Elected, ElectedLeader, FeatureLevels,
    GroupDescription, GroupListing, GroupOffset, LeaderlessPartition, MemberDescription, Moves, NewTopic, OffsetAnswer,
    OffsetAt, OffsetQuery, PartitionDescription, PartitionMove, PartitionState, QuorumHealth, Reassignment,
    TopicDescription, TopicListing,
};
pub use config::{ClientConfig, ClientIdentity, ConfigError, IdentityFiles};
pub use consumer::{
    Committer, ConsumedBatch, ConsumedRecord, ConsumedRecords, Consumer, ConsumerBuilder, OutOfRange, Position,
    Rebalance, StartFrom,
};
pub use error::{ConsumeError, Error, LeaderHint, ProduceError, Refusal};
pub use headwater_proto::batch::{Codec, Header, TimestampType};
pub use headwater_proto::wire::{Acks, Durability};
pub use headwater_proto::{ErrorCode, TopicId};
pub use partitioner::{PartitionContext, PartitionFn, Partitioner, partition_for_key};
pub use producer::{Acknowledgement, Delivery, Producer, ProducerBuilder, ProducerRecord, durability_name};

use std::sync::Arc;

use crate::connection::Connections;
use crate::metadata::Metadata;
use crate::retry::Deadline;

/// A partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: u32,
}

impl TopicPartition {
    /// Partition `partition` of `topic`.
    pub fn new(topic: impl Into<Arc<str>>, partition: u32) -> TopicPartition {
        TopicPartition { topic: topic.into(), partition }
    }
}

impl std::fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// A cluster, reached. Cheap to clone; all clones, and the producers and consumers made from them, share connections.
#[derive(Clone)]
pub struct Client {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    broker: Arc<BrokerInfo>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("broker", &self.broker).finish_non_exhaustive()
    }
}

/// The broker that answered first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerInfo {
    /// Its id.
    pub broker_id: i32,
    /// Its cluster's id.
    pub cluster_id: String,
    /// Its software and version.
    pub software: String,
}

impl Client {
    /// Connects to the first of the configuration's brokers that answers, trying again until
    /// [`ClientConfig::connect_timeout`] is over. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the configuration makes no sense, nobody answers, or whoever answers is no broker that this client trusts and
    /// understands.
    pub async fn connect(config: ClientConfig) -> Result<Client, Error> {
        let deadline = Deadline::within(config.connect_timeout);
        let connections = Connections::new(config)?;
        let link = connections.control_by(deadline).await?;
        let broker = BrokerInfo {
            broker_id: link.broker_id,
            cluster_id: link.cluster_id.clone(),
            software: link.software.clone(),
        };
        let metadata = Arc::new(Metadata::new(connections.clone()));
        Ok(Client { connections, metadata, broker: Arc::new(broker) })
    }

    /// Sends records.
    pub fn producer(&self) -> ProducerBuilder {
        ProducerBuilder::new(self.connections.clone(), self.metadata.clone())
    }

    /// Reads records.
    pub fn consumer(&self) -> ConsumerBuilder {
        ConsumerBuilder::new(self.connections.clone(), self.metadata.clone())
    }

    /// Topics, groups and brokers.
    pub fn admin(&self) -> Admin {
        Admin::new(self.connections.clone(), self.metadata.clone())
    }

    /// The broker that answered when the client connected.
    pub fn broker(&self) -> &BrokerInfo {
        &self.broker
    }

    /// Closes every connection; producers and consumers made from this client end with an error. Close those first.
    pub async fn close(&self) {
        self.connections.close().await;
    }
}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
