//! What a recovery tells: while it runs, and when it is done.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::neighbours::Neighbours;

/// How far recoveries are, of all logs that were given it, and what they need not all find out for themselves. A log that was closed in good order
/// adds nothing.
#[derive(Debug, Default)]
pub struct RecoveryProgress {
    /// What they know of each other's folders.
    pub(super) neighbours: Neighbours,
    to_scan_bytes: AtomicU64,
    scanned_bytes: AtomicU64,
}

impl RecoveryProgress {
    /// Bytes that are to be scanned, as far as is known: a log adds its own when it begins.
    pub fn to_scan_bytes(&self) -> u64 {
        self.to_scan_bytes.load(Ordering::Acquire)
    }

    /// Bytes of them that are behind.
    pub fn scanned_bytes(&self) -> u64 {
        self.scanned_bytes.load(Ordering::Acquire)
    }

    /// More is to be scanned.
    pub(super) fn announce(&self, bytes: u64) {
        self.to_scan_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// So much of it is done.
    pub(super) fn behind(&self, bytes: u64) {
        self.scanned_bytes.fetch_add(bytes, Ordering::AcqRel);
    }
}

/// What opening a log found and did.
#[derive(Debug, Clone, Default)]
pub struct RecoveryReport {
    /// The log was taken as it was closed: nothing was scanned.
    pub clean: bool,
    /// Bytes that were read and checked.
    pub scanned_bytes: u64,
    /// Batches that were read and checked.
    pub scanned_batches: u64,
    /// What was cut off the end: a torn write. Zeros and stale bytes of recycled files do not count.
    pub cut: Option<CutTail>,
    /// Files that were missing or made no sense, and were made anew from the log.
    pub rebuilt: Vec<PathBuf>,
    /// Segments whose reserved space was still there.
    pub finished_trims: Vec<PathBuf>,
    /// Checksum files that disagree with a log whose batches are all valid: Kafka wrote here, or the folder was copied
    /// under another name. They were made anew.
    pub crc_disagreements: Vec<CrcDisagreement>,
}

/// A torn write that recovery cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutTail {
    /// The segment.
    pub path: PathBuf,
    /// Where it was cut, in bytes.
    pub position: u64,
    /// How many bytes were lost.
    pub bytes: u64,
    /// The offset that is next now.
    pub next_offset: i64,
    /// Why the bytes there are no batch.
    pub detail: String,
}

/// A checksum file that disagrees with its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrcDisagreement {
    /// The checksum file.
    pub path: PathBuf,
    /// The first position of the log up to which it disagrees; 0 if the file is for another segment or unreadable.
    pub position: u64,
    /// How it disagrees.
    pub detail: String,
}
