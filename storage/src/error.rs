//! What can go wrong in storage. Small facts ([`IoFailure`], [`FullDisk`], [`Corruption`], [`Poisoned`]) and one enum per operation.
//!
//! Owns: the crate's errors and which of them are worth a retry. Refuses: wire codes (the broker maps) and logging (whoever
//! handles an error logs it). Misuse by the caller, a failing device and damaged bytes are different variants everywhere.

use std::io;
use std::path::{Path, PathBuf};

use headwater_proto::batch::BatchError;

use crate::files::{is_exhausted, is_full};

/// The operating system refused something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {error}", path.display())]
pub struct IoFailure {
    /// What was tried, as a verb.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The system's answer.
    pub error: io::Error,
}

impl IoFailure {
    pub(crate) fn new(action: &'static str, path: &Path, error: io::Error) -> IoFailure {
        IoFailure { action, path: path.into(), error }
    }
}

/// Says what was being done to which file when an I/O error came.
pub(crate) trait During<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T, IoFailure>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T, IoFailure> {
        self.map_err(|error| IoFailure::new(action, path, error))
    }
}

/// No room on the disk. Nothing was changed; the same call succeeds once there is room.
#[derive(Debug, thiserror::Error)]
#[error("the disk is full: no room for {needed} bytes in {}; appends succeed again once there is", path.display())]
pub struct FullDisk {
    /// The file that could not grow.
    pub path: PathBuf,
    /// How many bytes it asked for.
    pub needed: u64,
}

/// Bytes on the disk are not what was written there.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{} is damaged at position {position}{}: {detail}; inspect it with `headwater segment verify {}` and mend a copy with `headwater segment repair {} --out DIR`",
    path.display(), OffsetText(*offset), folder(path).display(), folder(path).display())]
pub struct Corruption {
    /// The damaged file.
    pub path: PathBuf,
    /// Where in the file, in bytes.
    pub position: u64,
    /// The first offset of the log that is affected, where it is known.
    pub offset: Option<i64>,
    /// What is wrong there.
    pub detail: String,
}

struct OffsetText(Option<i64>);

impl std::fmt::Display for OffsetText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |offset| write!(f, " (offset {offset})"))
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// A write or a sync failed earlier: nobody can say what is on the disk, so nothing more is written until the log was opened anew
/// (which recovers it).
#[derive(Debug, Clone, thiserror::Error)]
#[error("the log takes no writes until it is opened again: {reason}")]
pub struct Poisoned {
    /// The failure that came first.
    pub reason: String,
}

/// Both files that say where the logs of a data root begin are damaged.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "{} and {} are damaged, so nobody knows where the logs begin, and deleted records must not be served: put one of the two back, or remove both to begin every log with its first segment",
    checkpoint.display(), copy.display()
)]
pub struct UnknownLogStarts {
    /// Kafka's file.
    pub checkpoint: PathBuf,
    /// Ours.
    pub copy: PathBuf,
}

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk or the operating system.
    #[error(transparent)]
    Io(IoFailure),
    /// No room for what opening has to write.
    #[error(transparent)]
    FullDisk(#[from] FullDisk),
    /// Damage that recovery must not cut away.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// Where it begins is not known.
    #[error(transparent)]
    UnknownStart(#[from] UnknownLogStarts),
    /// The folder belongs to another topic.
    #[error("{} belongs to topic {found}, as line 2 of its partition.metadata says, not to {expected}", path.display())]
    ForeignTopic {
        /// The partition's folder.
        path: PathBuf,
        /// The topic id in its `partition.metadata`.
        found: String,
        /// The topic id asked for.
        expected: String,
    },
    /// The caller asked for something senseless.
    #[error("{0}")]
    Misuse(String),
}

/// Why an append was refused. Nothing of the group was appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// No room; works again once there is.
    #[error(transparent)]
    FullDisk(#[from] FullDisk),
    /// The write failed. The log is poisoned.
    #[error(transparent)]
    Io(IoFailure),
    /// An earlier write or sync failed.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// A batch cannot fit any segment of this log, or is beyond what the format can say.
    #[error("a batch of {size} bytes is larger than the {limit} that this log takes (max.message.bytes)")]
    TooLarge {
        /// The batch.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// A follower was handed a batch that does not continue its log.
    #[error("a batch begins at offset {given}, where {expected} is next")]
    OutOfOrder {
        /// The batch's base offset.
        given: i64,
        /// The log's end.
        expected: i64,
    },
    /// A leader epoch below one that the log has seen.
    #[error("leader epoch {given} is older than {latest}, which the log has seen")]
    OldEpoch {
        /// The epoch given.
        given: i32,
        /// The latest one.
        latest: i32,
    },
}

/// Why a method of the write half failed (all but open and append).
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk or the operating system. Where it was a write or a sync of the log itself, the log is poisoned.
    #[error(transparent)]
    Io(IoFailure),
    /// No room.
    #[error(transparent)]
    FullDisk(#[from] FullDisk),
    /// An earlier write or sync failed.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// Bytes that were read back are not what was written.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// An offset outside the log.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The caller broke the contract of the method.
    #[error("{0}")]
    Misuse(String),
}

/// An offset outside a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is out of range: the log holds {log_start} up to, not including, {log_end}")]
pub struct OutOfRange {
    /// The offset asked for.
    pub offset: i64,
    /// The first offset of the log.
    pub log_start: i64,
    /// One beyond the last (or beyond the last that may be read).
    pub log_end: i64,
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nothing at that offset (any more, or yet).
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The disk or the operating system.
    #[error(transparent)]
    Io(#[from] IoFailure),
    /// Bytes that are not what was written.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// The log was closed or its partition deleted.
    #[error("the log is closed")]
    Closed,
}

impl From<IoFailure> for OpenError {
    fn from(failure: IoFailure) -> Self {
        if is_full(&failure.error) {
            return OpenError::FullDisk(FullDisk { path: failure.path, needed: 0 });
        }
        OpenError::Io(failure)
    }
}

impl From<IoFailure> for AppendError {
    fn from(failure: IoFailure) -> Self {
        if is_full(&failure.error) {
            return AppendError::FullDisk(FullDisk { path: failure.path, needed: 0 });
        }
        AppendError::Io(failure)
    }
}

impl From<IoFailure> for LogError {
    fn from(failure: IoFailure) -> Self {
        if is_full(&failure.error) {
            return LogError::FullDisk(FullDisk { path: failure.path, needed: 0 });
        }
        LogError::Io(failure)
    }
}

impl From<LogError> for AppendError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Io(failure) => AppendError::Io(failure),
            LogError::FullDisk(full) => AppendError::FullDisk(full),
            LogError::Poisoned(poisoned) => AppendError::Poisoned(poisoned),
            other => AppendError::Poisoned(Poisoned { reason: other.to_string() }),
        }
    }
}

impl From<LogError> for OpenError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Io(failure) => OpenError::Io(failure),
            LogError::FullDisk(full) => OpenError::FullDisk(full),
            LogError::Corruption(corruption) => OpenError::Corruption(corruption),
            other => OpenError::Misuse(other.to_string()),
        }
    }
}

impl OpenError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            OpenError::FullDisk(_) => true,
            OpenError::Io(failure) => is_exhausted(&failure.error),
            _ => false,
        }
    }
}

impl AppendError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            AppendError::FullDisk(_) => true,
            AppendError::Io(failure) => is_exhausted(&failure.error),
            _ => false,
        }
    }
}

impl LogError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            LogError::FullDisk(_) => true,
            LogError::Io(failure) => is_exhausted(&failure.error),
            _ => false,
        }
    }
}

impl ReadError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        matches!(self, ReadError::Io(failure) if is_exhausted(&failure.error))
    }
}

/// A batch on disk that is not one.
pub(crate) fn bad_batch(path: &Path, position: u64, offset: Option<i64>, error: &BatchError) -> Corruption {
    Corruption { path: path.into(), position, offset, detail: error.to_string() }
}
