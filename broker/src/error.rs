//! The broker's errors, and the one place where they become codes of the wire.
//!
//! Owns: [`PartitionError`] and [`StartError`]. The peer gets the sentence; what else is known goes to the log.
//! Refuses: the client's errors. Read next: [`crate::partition`].

use crate::config::ConfigError;
use crate::metadata::Refusal;
use crate::metadata::journal::JournalError;
use crate::quic::QuicError;
use crate::tls::TlsError;
use headwater_proto::batch::BatchError;
use headwater_proto::{ErrorCode, wire};
use headwater_storage::checkpoint::CheckpointError;
use headwater_storage::{DataDirError, IoFailure, SequenceError};
use std::net::SocketAddr;
use std::sync::Arc;

/// Whose batches these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerIdentity {
    /// The producer id; -1: not idempotent.
    pub id: i64,
    /// Its epoch.
    pub epoch: i16,
}

impl std::fmt::Display for ProducerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.id {
            ..0 => f.write_str("no producer id"),
            id => write!(f, "producer id {id}, epoch {}", self.epoch),
        }
    }
}

/// Why a partition did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PartitionError {
    /// Damage or a failed disk: the partition is not served until it is recovered.
    #[error("the partition is fenced: {0}")]
    Fenced(Arc<str>),
    /// No room; the next append tries again.
    #[error("no room on the disk: {0}")]
    DiskFull(Arc<str>),
    /// `min.insync.replicas` asks for more than there are.
    #[error(
        "not enough in-sync replicas: {in_sync} of {needed} (min.insync.replicas), without which acks=all is refused"
    )]
    NotEnoughReplicas {
        /// How many there are.
        in_sync: u32,
        /// The topic's `min.insync.replicas`.
        needed: u32,
    },
    /// Too many open files or maps at the moment.
    #[error("the broker is at a limit of its process: {0}")]
    Exhausted(Arc<str>),
    /// The batch does not follow the producer's last one.
    #[error("{0}")]
    Sequence(SequenceError),
    /// The batch is larger than the topic takes.
    #[error("a batch of {bytes} bytes is larger than max.message.bytes of the topic, {limit}")]
    TooLarge {
        /// The batch's size.
        bytes: usize,
        /// The topic's `max.message.bytes`.
        limit: usize,
    },
    /// More batches at once than can be answered at once.
    #[error("a frame holds more than {limit} record batches")]
    TooManyBatches {
        /// How many it may hold.
        limit: usize,
    },
    /// What came before it on its stream was not appended.
    #[error("an earlier append of this stream failed; open the stream again and send what was not acknowledged")]
    EarlierFailed,
    /// The batch is not well formed.
    #[error("{0}")]
    Batch(#[from] BatchError),
    /// The batch is another producer's than the one that opened the stream, or of another epoch.
    #[error("a batch of {batch}, where the stream was opened by {stream}")]
    ForeignProducer {
        /// The batch's.
        batch: ProducerIdentity,
        /// The stream's.
        stream: ProducerIdentity,
    },
    /// A record's timestamp is outside what the topic takes.
    #[error("timestamp {timestamp_ms} is more than {key} = {limit_ms} away from the broker's clock, {now_ms}")]
    Timestamp {
        /// The record's.
        timestamp_ms: i64,
        /// The broker's.
        now_ms: i64,
        /// The topic's setting.
        key: &'static str,
        /// Its value.
        limit_ms: u64,
    },
    /// This broker does not lead the partition, or not in that epoch.
    #[error("this broker does not lead the partition in epoch {0}")]
    NotLeader(i32),
    /// The topic or partition was deleted.
    #[error("the partition was deleted")]
    Deleted,
    /// The broker is going away.
    #[error("the broker is shutting down")]
    ShuttingDown,
    /// No such offset.
    #[error("offset {offset} is outside the log, which holds {log_start_offset} to {end_offset}")]
    OffsetOutOfRange {
        /// The offset that was asked for.
        offset: i64,
        /// The first offset of the log.
        log_start_offset: i64,
        /// The offset after the last one that may be read.
        end_offset: i64,
    },
    /// The reader saw records that the log no longer holds.
    #[error("the log was cut at offset {end_offset}, and the reader is at {offset} after records of epoch {epoch}")]
    LogTruncated {
        /// The reader's position.
        offset: i64,
        /// The epoch of the record before it.
        epoch: i32,
        /// The first offset of the log.
        log_start_offset: i64,
        /// Where the reader's history ends.
        end_offset: i64,
    },
    /// The storage refused for a reason that is nobody's fault but ours.
    #[error("{0}")]
    Internal(Arc<str>),
}

impl PartitionError {
    /// The code for the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            PartitionError::Fenced(_) => ErrorCode::PartitionFenced,
            PartitionError::DiskFull(_) => ErrorCode::DiskFull,
            PartitionError::NotEnoughReplicas { .. } => ErrorCode::NotEnoughReplicas,
            PartitionError::Exhausted(_) => ErrorCode::Overloaded,
            PartitionError::Sequence(error) => match error {
                SequenceError::OldEpoch { .. } => ErrorCode::InvalidProducerEpoch,
                SequenceError::OutOfOrder { .. } => ErrorCode::OutOfOrderSequence,
                SequenceError::UnknownProducer { .. } => ErrorCode::UnknownProducerId,
                SequenceError::DuplicateTooOld { .. } => ErrorCode::DuplicateSequence,
                SequenceError::TooManyProducers { .. } => ErrorCode::LimitExceeded,
            },
            PartitionError::TooLarge { .. } => ErrorCode::MessageTooLarge,
            PartitionError::TooManyBatches { .. } => ErrorCode::LimitExceeded,
            PartitionError::EarlierFailed => ErrorCode::EarlierAppendFailed,
            PartitionError::Batch(error) => error.code(),
            PartitionError::ForeignProducer { .. } => ErrorCode::InvalidRequest,
            PartitionError::Timestamp { .. } => ErrorCode::InvalidTimestamp,
            PartitionError::NotLeader(_) => ErrorCode::NotLeader,
            PartitionError::Deleted => ErrorCode::UnknownTopicId,
            PartitionError::ShuttingDown => ErrorCode::ShuttingDown,
            PartitionError::OffsetOutOfRange { .. } => ErrorCode::OffsetOutOfRange,
            PartitionError::LogTruncated { .. } => ErrorCode::LogTruncated,
            PartitionError::Internal(_) => ErrorCode::Internal,
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        self.code().retryable()
    }

    /// What the peer is told.
    pub fn to_wire(&self) -> wire::Error {
        let mut error = wire::Error::new(self.code(), self.to_string());
        if let PartitionError::OffsetOutOfRange { log_start_offset, end_offset, .. }
        | PartitionError::LogTruncated { log_start_offset, end_offset, .. } = self
        {
            error.log_start_offset = *log_start_offset;
            error.end_offset = *end_offset;
        }
        error
    }
}

/// Why a broker does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The operating system refused a thread.
    #[error("cannot start a thread: {0}")]
    Threads(std::io::Error),
    /// The data folder: in use, foreign, newer, or unreadable.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A file of the data folder.
    #[error(transparent)]
    Io(#[from] IoFailure),
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The QUIC endpoint.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// The metadata journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The metadata log does not come up.
    #[error("the metadata cannot be led: {0}")]
    Quorum(String),
    /// What the disk holds of the metadata was promised by a later copy of it differently.
    #[error("{0}; it is a new member of the metadata quorum now: start the broker again")]
    OlderDisk(String),
    /// A broker that is to be one of several, on a folder that is in no cluster.
    #[error(
        "{} belongs to no cluster, and controller.quorum.bootstrap.servers is set: `headwater cluster init --config FILE` makes a new \
         cluster, `headwater cluster join --config FILE` joins one", .0.display()
    )]
    NoCluster(std::path::PathBuf),
    /// A folder that is in a cluster already.
    #[error("{} belongs to a cluster already: start the broker", .0.display())]
    InCluster(std::path::PathBuf),
    /// How often the disk was started.
    #[error("{}, the number of this disk's starts: {error}", path.display())]
    Boots {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        error: std::io::Error,
    },
    /// The metadata do not take this broker.
    #[error(transparent)]
    Metadata(Refusal),
    /// The list of what an import left.
    #[error(transparent)]
    Manifest(#[from] CheckpointError),
    /// What an import left cannot be taken over.
    #[error("the import cannot be taken over: {0}")]
    Import(String),
    /// The offsets topic cannot be made or served.
    #[error("the groups cannot be served: {0}")]
    Groups(String),
}
