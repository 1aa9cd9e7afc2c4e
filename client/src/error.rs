//! What can go wrong in a client, one type for each kind of work, composed of small facts.
//!
//! Owns: every error of this crate, which code it carries, whether trying again can help. Every error is `Clone`,
//! because one failure may answer thousands of records. Refuses: deciding to retry (see [`crate::retry`]).

use std::sync::Arc;
use std::time::Duration;

use headwater_proto::{ErrorCode, wire};

use crate::config::ConfigError;

/// What the broker said when it refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct Refusal {
    /// The stable code.
    pub code: ErrorCode,
    /// The broker's sentence for a person.
    pub message: String,
    /// Whether the same request may succeed later without anybody changing anything.
    pub retryable: bool,
    /// For [`ErrorCode::OffsetOutOfRange`] and [`ErrorCode::LogTruncated`]: the first offset the log holds.
    pub log_start_offset: i64,
    /// For [`ErrorCode::OffsetOutOfRange`] and [`ErrorCode::LogTruncated`]: the offset at which the readable log ends.
    pub end_offset: i64,
    /// For [`ErrorCode::NotLeader`]: who leads, as far as the broker knows.
    pub leader: Option<LeaderHint>,
}

/// Who leads a partition, as a broker that does not lead it believes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderHint {
    /// The leader's broker id.
    pub broker_id: i32,
    /// Its address, `host:port`.
    pub address: String,
    /// Its leader epoch.
    pub leader_epoch: i32,
}

impl From<wire::Error> for Refusal {
    fn from(error: wire::Error) -> Refusal {
        Refusal {
            code: ErrorCode::from_number(error.code),
            message: error.message,
            retryable: error.retryable,
            log_start_offset: error.log_start_offset,
            end_offset: error.end_offset,
            leader: error.leader.map(|l| LeaderHint {
                broker_id: l.broker_id,
                address: l.address,
                leader_epoch: l.leader_epoch,
            }),
        }
    }
}

/// Why a connection or a call failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No broker could be reached.
    #[error(
        "cannot connect to {address}: {reason}; check that a broker listens there and that the profile is the broker's own"
    )]
    Connect {
        /// The addresses that were tried.
        address: String,
        /// What the attempts said.
        reason: String,
    },
    /// Somebody answered, and the TLS handshake failed: a certificate that the profile's authorities did not sign, another
    /// name, another protocol.
    #[error("no secure connection to {address}: {reason}; check that the profile is the broker's own")]
    Untrusted {
        /// The broker's address.
        address: String,
        /// What TLS said.
        reason: String,
    },
    /// The broker refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No answer within the time that the configuration allows. The request may still take effect.
    #[error("no answer to {what} within {after:?}")]
    TimedOut {
        /// What was asked.
        what: &'static str,
        /// How long the client waited.
        after: Duration,
    },
    /// The connection ended before the answer came. The request may have taken effect.
    #[error("the connection to {address} ended: {reason}")]
    ConnectionLost {
        /// The broker's address.
        address: String,
        /// What the transport said.
        reason: String,
    },
    /// The broker's bytes make no sense: a broker of another kind or version, or a defect.
    #[error("the broker broke the protocol: {0}")]
    Protocol(String),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

impl Error {
    /// The broker's code, if the broker answered.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Error::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            Error::Refused(refusal) => refusal.retryable,
            Error::Connect { .. } | Error::TimedOut { .. } | Error::ConnectionLost { .. } => true,
            Error::Config(_) | Error::Untrusted { .. } | Error::Protocol(_) | Error::Closed => false,
        }
    }

    pub(crate) fn refused(code: ErrorCode, message: impl Into<String>) -> Error {
        Error::Refused(wire::Error::new(code, message).into())
    }
}

/// Why a record was not acknowledged.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ProduceError {
    /// The broker refused the record's batch: none of it was written.
    #[error("{topic}-{partition}: {refusal}")]
    Refused {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// What the broker said.
        refusal: Refusal,
    },
    /// The broker will not say what became of the record's batch: the partition failed, or was deleted, while the batch was
    /// on its way or in the log. It may have been written.
    #[error("{topic}-{partition}: {refusal}; the record was sent and may have been written")]
    OutcomeUnknown {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// What the broker said.
        refusal: Refusal,
    },
    /// There is no such topic.
    #[error("there is no topic {topic:?}; create it first")]
    UnknownTopic {
        /// The topic.
        topic: Arc<str>,
    },
    /// The topic has no such partition.
    #[error("topic {topic:?} has {partitions} partitions and no partition {partition}")]
    UnknownPartition {
        /// The topic.
        topic: Arc<str>,
        /// The partition that was asked for.
        partition: u32,
        /// How many there are.
        partitions: u32,
    },
    /// The record alone is larger than the topic takes.
    #[error(
        "a record of {bytes} bytes is too large for topic {topic:?}: its max.message.bytes is {limit}; raise it or send less"
    )]
    TooLarge {
        /// The topic.
        topic: Arc<str>,
        /// The size of a batch with this record alone, in bytes.
        bytes: usize,
        /// The topic's `max.message.bytes`.
        limit: usize,
    },
    /// No batch can hold the record: its timestamp lies before 1970, or it has too many headers or bytes.
    #[error("the record for topic {topic:?} cannot be written: {reason}")]
    InvalidRecord {
        /// The topic.
        topic: Arc<str>,
        /// What is wrong with it.
        reason: String,
    },
    /// The record can never fit the producer's buffer.
    #[error("a record of {bytes} bytes does not fit the producer's buffer of {limit} bytes; raise buffer_bytes")]
    LargerThanBuffer {
        /// The record's size in memory, in bytes.
        bytes: usize,
        /// The producer's `buffer_bytes`.
        limit: usize,
    },
    /// No acknowledgement within the delivery timeout.
    #[error("{topic}-{partition}: not acknowledged within {after:?}{}{}", if *.sent { "; it was sent and may have been written, or may still be" } else { "; it was never sent" }, reason.as_ref().map(|refusal| format!("; the broker said last: {refusal}")).unwrap_or_default())]
    TimedOut {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// The delivery timeout.
        after: Duration,
        /// Whether it was given to a broker: then its outcome is unknown.
        sent: bool,
        /// Why the broker refused it last.
        reason: Option<Box<Refusal>>,
    },
    /// [`crate::Producer::try_send`] only: no room in the buffer at this moment. [`crate::Producer::send`] waits for it.
    #[error("the producer's buffer is full")]
    BufferFull,
    /// [`crate::Producer::try_send`] only: the topic, or the partition that the record names, is not known yet, and is being
    /// asked for. Try again a little later; [`crate::Producer::send`] waits for it.
    #[error("topic {topic:?} is not known yet; it is being asked for")]
    TopicPending {
        /// The topic.
        topic: Arc<str>,
    },
    /// The broker could not be asked about the topic.
    #[error(transparent)]
    Client(#[from] Error),
    /// The producer was closed before the record was acknowledged.
    #[error("the producer is closed")]
    Closed,
    /// A defect of this client ended what had the record in hand. It may have been written.
    #[error("{topic}-{partition}: a defect of this client; the record may have been written")]
    Defect {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
    },
}

impl ProduceError {
    /// The broker's code, if the broker answered, or would have.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ProduceError::Refused { refusal, .. } | ProduceError::OutcomeUnknown { refusal, .. } => Some(refusal.code),
            ProduceError::UnknownTopic { .. } => Some(ErrorCode::UnknownTopic),
            ProduceError::UnknownPartition { .. } => Some(ErrorCode::UnknownPartition),
            ProduceError::TooLarge { .. } => Some(ErrorCode::MessageTooLarge),
            ProduceError::InvalidRecord { .. } => Some(ErrorCode::InvalidRecord),
            ProduceError::Client(error) => error.code(),
            _ => None,
        }
    }

    /// The same, said of a record that a broker may have.
    pub(crate) fn of_unknown_outcome(self, partition: u32) -> ProduceError {
        match self {
            ProduceError::Refused { topic, partition, refusal } => {
                ProduceError::OutcomeUnknown { topic, partition, refusal }
            }
            ProduceError::UnknownTopic { topic } => {
                let why = format!("there is no topic {topic:?} any more");
                let refusal = wire::Error::new(ErrorCode::UnknownTopic, why).into();
                ProduceError::OutcomeUnknown { topic, partition, refusal }
            }
            other => other,
        }
    }

    /// Whether sending the record again may succeed without anybody changing anything. Where the outcome is unknown
    /// ([`ProduceError::OutcomeUnknown`], and [`ProduceError::TimedOut`] with `sent`), the record may then stand in the log
    /// twice.
    pub fn retryable(&self) -> bool {
        match self {
            ProduceError::Refused { refusal, .. } | ProduceError::OutcomeUnknown { refusal, .. } => refusal.retryable,
            ProduceError::TimedOut { .. } | ProduceError::BufferFull | ProduceError::TopicPending { .. } => true,
            ProduceError::Client(error) => error.retryable(),
            _ => false,
        }
    }
}

/// Why a consumer cannot go on, with a partition or at all.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConsumeError {
    /// The broker refused to serve a partition. Reading it stops until [`crate::Consumer::seek`].
    #[error("{topic}-{partition}: {refusal}")]
    Refused {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// What the broker said.
        refusal: Refusal,
    },
    /// The position lies outside the log. Reading stops until [`crate::Consumer::seek`].
    #[error(
        "{topic}-{partition}: offset {offset} is out of range: the log holds {log_start_offset} up to {end_offset}; seek, or choose what to do with ConsumerBuilder::on_out_of_range"
    )]
    OffsetOutOfRange {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// The position.
        offset: i64,
        /// The first offset the log holds.
        log_start_offset: i64,
        /// The high watermark.
        end_offset: i64,
    },
    /// The log was cut below the position: records that were delivered are gone from it. Reading stops until
    /// [`crate::Consumer::seek`].
    #[error(
        "{topic}-{partition}: the log was truncated: it agrees with what was read only up to offset {end_offset}, and the position is {offset}; seek to {end_offset} to go on"
    )]
    LogTruncated {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// The position.
        offset: i64,
        /// Up to where the log still agrees with what was read.
        end_offset: i64,
    },
    /// A batch arrived damaged. Nothing of it was delivered; reading stops until [`crate::Consumer::seek`].
    #[error("{topic}-{partition}: a damaged batch at or after offset {offset}: {reason}")]
    Corrupt {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// The offset from which on nothing could be read.
        offset: i64,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such topic.
    #[error("there is no topic {topic:?}; create it first")]
    UnknownTopic {
        /// The topic.
        topic: Arc<str>,
    },
    /// The topic has no such partition.
    #[error("topic {topic:?} has {partitions} partitions and no partition {partition}")]
    UnknownPartition {
        /// The topic.
        topic: Arc<str>,
        /// The partition that was asked for.
        partition: u32,
        /// How many there are.
        partitions: u32,
    },
    /// The partition is not this consumer's (any more).
    #[error("{topic}-{partition} is not assigned to this consumer")]
    NotAssigned {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
    },
    /// The consumer was built in a way that does not allow this.
    #[error("{0}")]
    Usage(&'static str),
    /// An offset was not committed.
    #[error("{topic}-{partition}: offset not committed: {refusal}")]
    CommitRefused {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: u32,
        /// What the coordinator said.
        refusal: Refusal,
    },
    /// The coordinator refused the member for good.
    #[error("group {group:?}: {refusal}")]
    Group {
        /// The group.
        group: Arc<str>,
        /// What the coordinator said.
        refusal: Refusal,
    },
    /// The application's rebalance callback panicked. The consumer has left its group and reads nothing more.
    #[error("the rebalance callback panicked: {reason}; the consumer has left its group")]
    CallbackPanicked {
        /// What the panic said.
        reason: String,
    },
    /// A call failed.
    #[error(transparent)]
    Client(#[from] Error),
    /// The consumer was closed.
    #[error("the consumer is closed")]
    Closed,
}

impl ConsumeError {
    /// The broker's code, if the broker answered.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ConsumeError::Refused { refusal, .. }
            | ConsumeError::CommitRefused { refusal, .. }
            | ConsumeError::Group { refusal, .. } => Some(refusal.code),
            ConsumeError::OffsetOutOfRange { .. } => Some(ErrorCode::OffsetOutOfRange),
            ConsumeError::LogTruncated { .. } => Some(ErrorCode::LogTruncated),
            ConsumeError::Corrupt { .. } => Some(ErrorCode::CorruptBatch),
            ConsumeError::UnknownTopic { .. } => Some(ErrorCode::UnknownTopic),
            ConsumeError::UnknownPartition { .. } => Some(ErrorCode::UnknownPartition),
            ConsumeError::Client(error) => error.code(),
            ConsumeError::NotAssigned { .. }
            | ConsumeError::Usage(_)
            | ConsumeError::CallbackPanicked { .. }
            | ConsumeError::Closed => None,
        }
    }

    /// Whether the same may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            ConsumeError::Refused { refusal, .. }
            | ConsumeError::CommitRefused { refusal, .. }
            | ConsumeError::Group { refusal, .. } => refusal.retryable,
            ConsumeError::Client(error) => error.retryable(),
            _ => false,
        }
    }
}
