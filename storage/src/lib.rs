//! The log of one Headwater partition, as Kafka lays it out on disk.
//!
//! Owns: segments, indexes, checkpoints, producer state, recovery. Refuses: network, async, clocks (callers pass the time) and
//! every use of the file system that does not go through [`files`]. Read next: [`files`], then [`datadir`].

mod active;
pub mod checkpoint;
mod compaction;
pub mod config;
pub mod crcfile;
pub mod datadir;
pub mod epochs;
pub mod error;
pub mod files;
pub mod import;
pub mod index;
pub mod inspect;
mod log;
mod map;
pub mod metrics;
pub mod offsets_schema;
mod os;
mod prefix;
pub mod producers;
mod reader;
mod recovery;
mod refill;
mod replay;
mod retention;
mod rewrite;
mod scan;
mod segment;
pub mod sim;
pub mod transactions;
mod verify;

pub use checkpoint::KeptReplica;
pub use compaction::{CompactionError, CompactionPlan, CompactionResult, CompactionStats};
pub use config::{Cleanup, LogConfig, LogIdentity, OpenHints};
pub use datadir::{Checkpoints, DataDir, DataDirError, NewIdentity, PartitionFolder};
pub use error::{
    AppendError, Corruption, FullDisk, IoFailure, LogError, OpenError, OutOfRange, Poisoned, ReadError,
    UnknownLogStarts,
};
pub use files::{Directory, File, Files, OpenMode};
pub use log::{BatchOutcome, Log, NewBatch};
pub use map::Map;
pub use os::OsFiles;
pub use producers::{LastSequence, SequenceError};
pub use reader::{Cursor, LogReader, Slice, TimestampOffset};
pub use recovery::{CrcDisagreement, CutTail, RecoveryProgress, RecoveryReport};
pub use segment::OpenLimit;
pub use sim::SimFiles;
