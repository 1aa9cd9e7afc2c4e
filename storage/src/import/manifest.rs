//! `headwater.import`: what an import hands over to the broker that starts next.
//!
//! Owns: the file, and what an import that was cut short left behind. Refuses: the broker's metadata: the broker takes the topics over
//! into its journal and commits the offsets ([`take`]), then deletes the file ([`taken_over`]). Taking over twice must change nothing,
//! because the broker may be stopped in between.
//!
//! ```text
//! headwater.import 1 <CRC-32 of everything after this line, 8 hex digits>
//! <one JSON object, see [`Manifest`]>
//! ```

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use headwater_proto::TopicId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::checkpoint::{self, CLEANER_OFFSETS, CheckpointError, HIGH_WATERMARKS, RECOVERY_POINTS};
use crate::datadir::{remove_folder, retain};
use crate::epochs::TextFault;
use crate::error::{During, IoFailure};
use crate::files::{self, Files};

/// Name of the file, in the data root.
pub const FILE_NAME: &str = "headwater.import";

const FIRST_WORDS: &str = "headwater.import 1 ";
/// A file beyond this is damaged.
const MAX_BYTES: u64 = 1 << 30;

/// What was imported and is not taken over yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Topics whose partition folders are in place, complete and durable.
    pub topics: Vec<ImportedTopic>,
    /// Offsets that groups had committed for them.
    pub offsets: Vec<ImportedOffset>,
    /// Producer ids below this one stand in the imported logs.
    pub producer_ids_from: i64,
    /// Folders of an import that has not ended. They are removed when the file is read again: the import was cut short.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    copying: Vec<(String, u32)>,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedTopic {
    /// Its name.
    pub name: String,
    /// Its id, as Kafka gave it.
    #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
    pub topic_id: TopicId,
    /// For each partition, the largest leader epoch that its log has seen; -1 for none.
    pub leader_epochs: Vec<i32>,
    /// Settings by Kafka's names.
    pub config: BTreeMap<String, String>,
}

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedOffset {
    /// The group.
    pub group: String,
    /// The topic, one of the manifest's.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// The next offset to be read.
    pub offset: i64,
    /// Leader epoch of the last record read; -1 when unknown.
    pub leader_epoch: i32,
    /// What the client wanted to be kept with it.
    pub metadata: String,
    /// When it was committed, in milliseconds since 1970.
    pub commit_timestamp_ms: i64,
}

/// What an import left for the broker, if it left anything. Folders of an import that was cut short are removed first.
///
/// Call it with the data root locked, before any of its logs is opened.
pub fn take(files: &dyn Files, root: &Path) -> Result<Option<Manifest>, CheckpointError> {
    let Some(mut manifest) = read(files, root)? else { return Ok(None) };
    if !manifest.copying.is_empty() {
        undo(files, root, &manifest.copying)?;
        manifest.copying.clear();
        if manifest.topics.is_empty() {
            taken_over(files, root)?;
            return Ok(None);
        }
        write(files, root, &manifest)?;
    }
    Ok(Some(manifest))
}

/// The broker has taken over what [`take`] returned: its journal holds the topics, and the offsets are committed.
pub fn taken_over(files: &dyn Files, root: &Path) -> Result<(), IoFailure> {
    let path = root.join(FILE_NAME);
    files::remove_if_exists(files, &path).during("remove", &path)?;
    files.sync_dir(root).during("sync", root)
}

impl Manifest {
    /// Says that these folders are about to be made.
    pub(super) fn begin(
        &mut self,
        files: &dyn Files,
        root: &Path,
        copying: Vec<(String, u32)>,
    ) -> Result<(), IoFailure> {
        self.copying = copying;
        write(files, root, self)
    }

    /// Says that everything is in place.
    pub(super) fn end(mut self, files: &dyn Files, root: &Path) -> Result<(), IoFailure> {
        self.copying.clear();
        write(files, root, &self)
    }
}

fn write(files: &dyn Files, root: &Path, manifest: &Manifest) -> Result<(), IoFailure> {
    let path = root.join(FILE_NAME);
    let body = serde_json::to_vec_pretty(manifest).map_err(std::io::Error::other).during("write", &path)?;
    let mut bytes = format!("{FIRST_WORDS}{:08x}\n", crc32fast::hash(&body)).into_bytes();
    bytes.extend_from_slice(&body);
    files::replace(files, &path, &bytes).during("write", &path)
}

fn read(files: &dyn Files, root: &Path) -> Result<Option<Manifest>, CheckpointError> {
    let path = root.join(FILE_NAME);
    let bytes = match files::read(files, &path, MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(IoFailure::new("read", &path, error).into()),
    };
    decode(&bytes).map(Some).map_err(|fault| CheckpointError::Damaged { path, fault })
}

fn decode(bytes: &[u8]) -> Result<Manifest, TextFault> {
    let fault = |line: usize, detail: String| TextFault { line, detail };
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (first, rest) = bytes.split_at(end);
    let body = rest.get(1..).unwrap_or_default();
    let sum = first.strip_prefix(FIRST_WORDS.as_bytes()).and_then(|sum| std::str::from_utf8(sum).ok());
    let Some(sum) = sum.and_then(|sum| u32::from_str_radix(sum, 16).ok()) else {
        return Err(fault(1, "not a list of imported topics, or of a version that this build does not know".into()));
    };
    if sum != crc32fast::hash(body) {
        return Err(fault(1, "the checksum does not fit the contents".into()));
    }
    serde_json::from_slice(body).map_err(|error| fault(error.line() + 1, error.to_string()))
}

/// Removes what an import made before it was cut short: folders, and what the checkpoints say of them.
fn undo(files: &dyn Files, root: &Path, copying: &[(String, u32)]) -> Result<(), CheckpointError> {
    let mut log_starts = checkpoint::read_log_starts(files, root)?.offsets;
    let before = log_starts.len();
    retain(&mut log_starts, |partition| !copying.contains(partition));
    if log_starts.len() != before {
        checkpoint::write_log_starts(files, root, &log_starts)?;
    }
    for name in [RECOVERY_POINTS, HIGH_WATERMARKS, CLEANER_OFFSETS] {
        let mut offsets = checkpoint::read_offsets(files, root, name)?;
        let before = offsets.len();
        retain(&mut offsets, |partition| !copying.contains(partition));
        if offsets.len() != before {
            checkpoint::write_offsets(files, root, name, &offsets)?;
        }
    }
    for (topic, partition) in copying {
        for path in [root.join(checkpoint::partition_dir_name(topic, *partition)), unfinished(root, topic, *partition)]
        {
            if files::exists(files, &path).during("look at", &path)? {
                remove_folder(files, &path)?;
            }
        }
    }
    files.sync_dir(root).during("sync", root)?;
    Ok(())
}

/// The name that a partition's folder has while it is being copied. A broker that finds it removes it.
pub(super) fn unfinished(root: &Path, topic: &str, partition: u32) -> PathBuf {
    let suffix = format!("-{partition}.{:032x}-delete", 0);
    let kept = topic.len().min(255 - suffix.len());
    root.join(format!("{}{suffix}", topic.get(..kept).unwrap_or("topic")))
}

fn write_id<S: Serializer>(id: &TopicId, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(id)
}

fn read_id<'de, D: Deserializer<'de>>(from: D) -> Result<TopicId, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}
