//! `headwater segment`: what a partition's files hold, what is wrong with them, and a repaired copy.
//!
//! Owns: finding the segments that a path means ([`Target`]) and the facts that are reported ([`Fault`]). Works on a `.log` file or on
//! a partition directory under any name, without a broker, or beside a running one: it takes no lock, and only repair writes.
//! Refuses: rendering. Everything streams, so a file needs no more memory than its largest batch.
//! Read next: `scan.rs`, which finds batches and passes over damage; then [`mod@dump`], [`mod@verify`], [`mod@stats`] and [`mod@repair`].

pub mod dump;
mod foreign;
pub mod repair;
pub(crate) mod scan;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod verify;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_proto::batch::BatchHeader;
use serde::Serialize;

use crate::checkpoint::{self, parse_partition_dir_name, parse_segment_file_name, segment_file_name};
use crate::epochs::{self, LeaderEpochs};
use crate::files::{self, Files};
use crate::index::{OffsetEntry, decode_entries};
use crate::producers;
use scan::Scanner;

pub use dump::{Dump, DumpOptions, DumpedBatch, dump};
pub use repair::{ForeignSegment, MendedBatch, OffsetRange, RepairMode, RepairReport, repair};
pub use stats::{Stats, stats};
pub use verify::{VerifyReport, verify};

/// Why a path cannot be inspected at all.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Nothing is there.
    #[error("{path}: nothing there; give a .log file or a partition directory", path = .0.display())]
    NotFound(PathBuf),
    /// Neither a segment nor a directory that holds one.
    #[error("{path}: no segment; give a .log file or a directory that holds some", path = .0.display())]
    NoSegment(PathBuf),
    /// The system failed to read or write.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something is where a repaired partition is to be written.
    #[error("{path} is there already; name a directory that is not, or an empty one", path = .0.display())]
    InTheWay(PathBuf),
    /// It cannot be done this way.
    #[error("{path}: {reason}", path = .path.display())]
    Refused {
        /// The partition.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// An error of the system, at a file.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> InspectError + '_ {
    move |source| InspectError::Io { path: path.to_owned(), source }
}

/// What kind of file, or what about a batch, a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// A batch that is not what its checksum or its structure says.
    Batch,
    /// A batch whose checksum holds, and whose records do not.
    Records,
    /// Offsets that overlap, go back or are missing.
    Offsets,
    /// A batch whose leader epoch cannot be.
    Epoch,
    /// Bytes after the last batch.
    Tail,
    /// The offset index.
    Index,
    /// The time index.
    TimeIndex,
    /// The transaction index.
    TxnIndex,
    /// The `.crc`.
    Crc,
    /// A producer snapshot.
    Snapshot,
    /// The leader epoch checkpoint.
    LeaderEpochs,
    /// `partition.metadata`.
    PartitionMetadata,
    /// A segment that is another partition's.
    Owner,
}

impl FaultKind {
    /// The kind's name, as it stands in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            FaultKind::Batch => "batch",
            FaultKind::Records => "records",
            FaultKind::Offsets => "offsets",
            FaultKind::Epoch => "epoch",
            FaultKind::Tail => "tail",
            FaultKind::Index => "index",
            FaultKind::TimeIndex => "time_index",
            FaultKind::TxnIndex => "txn_index",
            FaultKind::Crc => "crc",
            FaultKind::Snapshot => "snapshot",
            FaultKind::LeaderEpochs => "leader_epochs",
            FaultKind::PartitionMetadata => "partition_metadata",
            FaultKind::Owner => "owner",
        }
    }
}

/// One thing that is wrong, or worth knowing, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file's name.
    pub file: String,
    /// Byte of the file where what is wrong begins; for a `.log`, where its batch begins.
    pub position: u64,
    /// The offset in the log that is concerned, where there is one.
    pub offset: Option<i64>,
    /// What is wrong.
    pub kind: FaultKind,
    /// The same in words.
    pub detail: String,
}

/// What a path means: a partition, or one segment of one.
#[derive(Debug, Clone)]
pub struct Target {
    pub(crate) files: Arc<dyn Files>,
    path: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) segments: Vec<SegmentFile>,
    /// Offsets that snapshots are of, rising.
    snapshots: Vec<i64>,
    whole: bool,
    /// What the data root says of the partition, if the folder lies in one.
    pub(crate) known: Option<KnownOffsets>,
}

/// What the checkpoints of a data root say of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KnownOffsets {
    /// Everything before was flushed.
    pub(crate) flushed: i64,
    /// Where the log begins, or where it began when that was last written down.
    pub(crate) log_start: i64,
}

/// A `.log` file.
#[derive(Debug, Clone)]
pub(crate) struct SegmentFile {
    pub(crate) path: PathBuf,
    pub(crate) base_offset: i64,
    /// The base offset of the segment after it; `None` for the last.
    pub(crate) next_base_offset: Option<i64>,
}

impl SegmentFile {
    /// The file's name.
    pub(crate) fn name(&self) -> String {
        name(&self.path)
    }

    /// A file of the same segment.
    pub(crate) fn sibling(&self, extension: &str) -> PathBuf {
        self.path.with_extension(extension)
    }
}

pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

impl Target {
    /// Finds the segments of `path`.
    ///
    /// # Errors
    /// [`InspectError::NotFound`], [`InspectError::NoSegment`], or the system failed.
    pub fn open(files: Arc<dyn Files>, path: &Path) -> Result<Target, InspectError> {
        let metadata = match files.metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(InspectError::NotFound(path.to_owned())),
            answer => answer.map_err(at(path))?,
        };
        let dir = if metadata.is_dir { path } else { files::parent(path) };
        // Before anything else, so that beside a running broker it is never ahead of the rest.
        let known = known_offsets(&*files, dir);
        let mut bases = offsets_of(&*files, dir, ".log")?;
        let mut snapshots = offsets_of(&*files, dir, producers::EXTENSION)?;
        snapshots.sort_unstable();
        let mut segments = Vec::new();
        if metadata.is_dir {
            bases.sort_unstable();
            for (index, base_offset) in bases.iter().enumerate() {
                let path = dir.join(segment_file_name(*base_offset, ".log"));
                let next_base_offset = bases.get(index + 1).copied();
                segments.push(SegmentFile { path, base_offset: *base_offset, next_base_offset });
            }
        } else {
            let file_name = name(path);
            let base_offset = match parse_segment_file_name(&file_name) {
                Some((base_offset, ".log")) => base_offset,
                Some(_) => return Err(InspectError::NoSegment(path.to_owned())),
                None => scan::first_offset(&*files, path).map_err(at(path))?,
            };
            let next_base_offset = bases.into_iter().filter(|next| *next > base_offset).min();
            segments.push(SegmentFile { path: path.to_owned(), base_offset, next_base_offset });
        }
        if segments.is_empty() {
            return Err(InspectError::NoSegment(path.to_owned()));
        }
        let dir = dir.to_owned();
        Ok(Target { files, path: path.to_owned(), dir, segments, snapshots, whole: metadata.is_dir, known })
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Topic and partition, if the directory's name tells.
    pub fn partition(&self) -> Option<(String, u32)> {
        partition_of(&self.dir)
    }

    /// The folder that the partition's lies in: the data root, if it is in one.
    pub(crate) fn root(&self) -> PathBuf {
        root_of(&self.dir)
    }

    /// Up to where the cleaner's checkpoint calls the log clean.
    pub(crate) fn cleaned_until(&self) -> Option<i64> {
        let offsets = checkpoint::read_offsets(&*self.files, &self.root(), checkpoint::CLEANER_OFFSETS).ok()?;
        offsets.get(&self.partition()?).copied()
    }

    /// Bytes of all segments' `.log` files, as a measure of the work.
    pub fn log_bytes(&self) -> u64 {
        self.segments.iter().filter_map(|segment| self.files.metadata(&segment.path).ok()).map(|found| found.len).sum()
    }

    /// Whether the path is a partition's directory rather than one segment of it.
    pub(crate) fn is_partition(&self) -> bool {
        self.whole
    }

    /// The topic id that `partition.metadata` names, if there is a readable one.
    pub(crate) fn topic_id(&self) -> Option<TopicId> {
        checkpoint::read_partition_metadata(&*self.files, &self.dir).ok().flatten()
    }

    /// The leader epochs, if their checkpoint is there and readable.
    pub(crate) fn leader_epochs(&self) -> Option<LeaderEpochs> {
        let bytes = files::read(&*self.files, &self.dir.join(epochs::FILE_NAME), MAX_SMALL_FILE_BYTES).ok()?;
        LeaderEpochs::decode(&bytes).ok()
    }

    /// A scanner at the start of a segment, of which `previous` is the last batch before it. `None` if a running broker removed it.
    pub(crate) fn scan(
        &self,
        segment: &SegmentFile,
        epochs: Option<LeaderEpochs>,
        previous: Option<BatchHeader>,
    ) -> Result<Option<Scanner>, InspectError> {
        // An index that cannot be read vouches for nothing.
        let index = self.small_file(&segment.sibling("index")).ok().flatten().unwrap_or_default();
        let entries = decode_entries::<OffsetEntry>(&index).unwrap_or_default();
        let boundaries = entries.into_iter().map(|entry| u64::from(entry.position)).collect();
        let flushed = self.known.map_or(i64::MIN, |known| known.flushed);
        match Scanner::open(&*self.files, segment, epochs, boundaries, self.snapshots.clone(), previous, flushed) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            scanner => scanner.map(Some).map_err(at(&segment.path)),
        }
    }

    /// The contents of a file beside the segments; `None` if there is none.
    pub(crate) fn small_file(&self, path: &Path) -> Result<Option<Vec<u8>>, InspectError> {
        match files::read(&*self.files, path, MAX_SMALL_FILE_BYTES) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(InspectError::Io { path: path.to_owned(), source }),
        }
    }
}

fn partition_of(dir: &Path) -> Option<(String, u32)> {
    let dir = match dir.file_name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => name(&std::path::absolute(dir).ok()?),
    };
    parse_partition_dir_name(&dir)
}

fn root_of(dir: &Path) -> PathBuf {
    match dir.file_name() {
        Some(_) => files::parent(dir).to_owned(),
        // `.` and the like.
        None => std::path::absolute(dir).map_or(PathBuf::new(), |dir| files::parent(&dir).to_owned()),
    }
}

/// What the data root says of the partition in `dir`; `None` if it is in none, or nothing is said that can be read.
fn known_offsets(files: &dyn Files, dir: &Path) -> Option<KnownOffsets> {
    let (root, partition) = (root_of(dir), partition_of(dir)?);
    let flushed = *checkpoint::read_offsets(files, &root, checkpoint::RECOVERY_POINTS).ok()?.get(&partition)?;
    let log_starts = checkpoint::read_log_starts(files, &root).ok()?.offsets;
    Some(KnownOffsets { flushed, log_start: log_starts.get(&partition).copied().unwrap_or(0) })
}

/// Indexes and snapshots beyond this size are refused; Kafka's indexes stop at 10 MiB unless told otherwise.
const MAX_SMALL_FILE_BYTES: u64 = 1 << 30;

/// The offsets that name the files with this extension.
fn offsets_of(files: &dyn Files, dir: &Path, extension: &str) -> Result<Vec<i64>, InspectError> {
    let entries = files.list(dir).map_err(at(dir))?;
    let entries = entries.iter().filter(|entry| !entry.is_dir).filter_map(|entry| parse_segment_file_name(&entry.name));
    Ok(entries.filter(|(_, found)| *found == extension).map(|(offset, _)| offset).collect())
}
