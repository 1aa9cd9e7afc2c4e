//! `headwater import`: a Kafka log directory becomes part of a broker's data root.
//!
//! Owns: what is taken from Kafka's directory (partition folders with their topic ids, log start offsets, leader epochs and producers' state,
//! and the offsets that groups committed), that all of it is whole, and that a crash at any time leaves either nothing of the
//! import or all of it. Refuses: a root that a broker is running on, topics that are there already, partitions that are
//! missing or damaged, and everything that Headwater does not serve yet, which is named in the report.
//! Read next: `manifest.rs`, which is how the broker learns of it.
//!
//! Every folder is verified, copied under a name that a broker removes, synced, and renamed. The manifest says before that which folders are
//! being made, so that a later start removes them if the import did not end.

mod manifest;
mod offsets;
mod source;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::TopicId;
use serde::Serialize;

use crate::checkpoint::{self, CLEANER_OFFSETS, CheckpointError, HIGH_WATERMARKS, PartitionOffsets, RECOVERY_POINTS};
use crate::datadir::{DataDir, DataDirError, NewIdentity};
use crate::error::{During, IoFailure};
use crate::files::{Files, OpenMode};
use crate::inspect::{Fault, InspectError};
use source::{Source, SourcePartition};

pub use manifest::{FILE_NAME, ImportedOffset, ImportedTopic, Manifest, take, taken_over};

/// What to import, and where to.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// One of Kafka's log directories.
    pub source: PathBuf,
    /// The broker's data root, which is made if it is not there.
    pub data_dir: PathBuf,
    /// Whose the root is, if it is made.
    pub identity: NewIdentity,
    /// Only these topics; all of them if none is named.
    pub topics: Vec<String>,
    /// Settings of the imported topics. Retention is unlimited where they say nothing of it.
    pub config: BTreeMap<String, String>,
}

/// What was imported.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ImportReport {
    /// The topics.
    pub topics: Vec<TopicReport>,
    /// Bytes that were copied.
    pub bytes: u64,
    /// Groups with committed offsets.
    pub groups: Vec<String>,
    /// Their offsets.
    pub offsets: u64,
    /// Producer ids begin here from now on.
    pub producer_ids_from: i64,
    /// What was found and is not served yet, or was left behind.
    pub not_served: Vec<NotServed>,
}

/// A topic that was imported.
#[derive(Debug, Clone, Serialize)]
pub struct TopicReport {
    /// Its name.
    pub name: String,
    /// Its id.
    pub topic_id: String,
    /// Number of partitions.
    pub partitions: u32,
    /// Records, control records left out.
    pub records: u64,
    /// Bytes of `.log` files.
    pub bytes: u64,
    /// Where each partition begins.
    pub log_start_offsets: Vec<i64>,
    /// Where each partition ends.
    pub log_end_offsets: Vec<i64>,
}

/// Something that was found and is not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotServed {
    /// A partition, a folder or a file.
    pub place: String,
    /// What it is, and what becomes of it.
    pub detail: String,
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The data root cannot be used; a running broker is the usual reason.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The source is no log directory.
    #[error("{}: no partition folder there; give one of Kafka's log directories (log.dirs)", .0.display())]
    NoPartitions(PathBuf),
    /// A topic was named that is not there.
    #[error("topic {0} is not in the log directory")]
    UnknownTopic(String),
    /// A topic of this name is in the data root already.
    #[error("topic {0} exists already; delete it first, or import the others with --topic")]
    TopicExists(String),
    /// Another topic has this id.
    #[error("topic {topic} has the id {id}, which {other} has, too")]
    IdTaken {
        /// The topic.
        topic: String,
        /// Its id.
        id: String,
        /// Whose it is as well.
        other: String,
    },
    /// Partitions lie between others and are not there.
    #[error(
        "topic {topic}: partition {partition} is missing; a topic is imported whole (were its partitions on other brokers, too?)"
    )]
    MissingPartition {
        /// The topic.
        topic: String,
        /// The first partition that is missing.
        partition: u32,
    },
    /// A partition's topic id is missing, damaged, or another than that of the topic's other partitions.
    #[error("{}: {detail}", path.display())]
    TopicId {
        /// The partition's folder.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Kafka was stopped while it swapped segments.
    #[error("{} is half swapped in; start Kafka there once and stop it in good order", .0.display())]
    Unfinished(PathBuf),
    /// Partitions are damaged.
    #[error("{} of the partition {} at position {}: {}{}; see `headwater segment verify {}`, or import a copy that `headwater segment repair` made",
        faults[0].file, path.display(), faults[0].position, faults[0].detail, more(faults), path.display())]
    Damaged {
        /// The partition's folder.
        path: PathBuf,
        /// What is wrong with it: one fault at least.
        faults: Vec<Fault>,
    },
    /// There is no room.
    #[error("{needed} bytes are needed in {}, {free} are free", path.display())]
    FullDisk {
        /// The data root.
        path: PathBuf,
        /// Bytes to be copied.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// A checkpoint makes no sense.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Reading the source failed.
    #[error(transparent)]
    Source(#[from] InspectError),
    /// Writing failed.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

fn more(faults: &[Fault]) -> String {
    match faults.len() {
        0 | 1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    }
}

/// Imports. `progress` is told of bytes as they are verified, and again as they are copied.
pub fn import(
    files: &Arc<dyn Files>,
    options: &ImportOptions,
    progress: &dyn Fn(u64),
) -> Result<ImportReport, ImportError> {
    let root = DataDir::open(Arc::clone(files), &options.data_dir, &options.identity)?;
    root.check_log_starts().map_err(DataDirError::from)?;
    let imported = import_into(&root, options, progress);
    if root.was_clean() {
        // Nothing that a broker left was touched, and what was added is complete.
        root.close_clean()?;
    }
    imported
}

fn import_into(root: &DataDir, options: &ImportOptions, progress: &dyn Fn(u64)) -> Result<ImportReport, ImportError> {
    let files = root.files();
    let mut manifest = take(&**files, root.path())?.unwrap_or_default();
    let mut source = Source::list(files, &options.source, &options.topics)?;
    refuse_known(root, &manifest, &source)?;
    source.read(progress)?;
    let needed = source.partitions().map(|partition| partition.file_bytes).sum();
    let free = files.free_bytes(root.path()).during("look at", root.path())?;
    if needed > free {
        return Err(ImportError::FullDisk { path: root.path().to_owned(), needed, free });
    }
    let names: Vec<_> = source.partitions().map(|partition| (partition.topic.clone(), partition.partition)).collect();
    manifest.begin(&**files, root.path(), names)?;
    if let Err(failure) = copy(root, &source, progress) {
        // Undone now if that works, else when the root is opened next.
        let _ = take(&**files, root.path());
        return Err(failure.into());
    }
    let report = hand_over(source, options, &mut manifest);
    manifest.end(&**files, root.path())?;
    Ok(report)
}

fn refuse_known(root: &DataDir, manifest: &Manifest, source: &Source) -> Result<(), ImportError> {
    let folders = root.partitions()?;
    let mut ids: BTreeMap<TopicId, String> = BTreeMap::new();
    let here = folders.iter().map(|folder| (folder.topic.clone(), folder.topic_id));
    let waiting = manifest.topics.iter().map(|topic| (topic.name.clone(), Some(topic.topic_id)));
    let known: Vec<_> = here.chain(waiting).collect();
    ids.extend(known.iter().filter_map(|(name, id)| Some(((*id)?, name.clone()))));
    let names: BTreeSet<&String> = known.iter().map(|(name, _)| name).collect();
    for topic in &source.topics {
        if names.contains(&topic.name) {
            return Err(ImportError::TopicExists(topic.name.clone()));
        }
        if let Some(other) = ids.insert(topic.id, topic.name.clone()) {
            return Err(ImportError::IdTaken { topic: topic.name.clone(), id: topic.id.to_string(), other });
        }
    }
    Ok(())
}

/// Copies every partition and writes the checkpoints.
fn copy(root: &DataDir, source: &Source, progress: &dyn Fn(u64)) -> Result<(), IoFailure> {
    let files = root.files();
    for partition in source.partitions() {
        let aside = manifest::unfinished(root.path(), &partition.topic, partition.partition);
        files.create_dir_all(&aside).during("create", &aside)?;
        for name in &partition.files {
            copy_file(&**files, &partition.path.join(name), &aside.join(name), progress)?;
        }
        files.sync_dir(&aside).during("sync", &aside)?;
        let path = root.partition_path(&partition.topic, partition.partition);
        files.rename(&aside, &path).during("rename", &aside)?;
    }
    files.sync_dir(root.path()).during("sync", root.path())?;
    type Value = fn(&SourcePartition) -> Option<i64>;
    let mut log_starts = checkpoint::read_log_starts(&**files, root.path()).unwrap_or_default().offsets;
    log_starts.extend(
        source
            .partitions()
            .filter(|partition| partition.log_start > 0)
            .map(|partition| ((partition.topic.clone(), partition.partition), partition.log_start)),
    );
    checkpoint::write_log_starts(&**files, root.path(), &log_starts)?;
    let values: [(&str, Value); 3] = [
        (CLEANER_OFFSETS, |partition| partition.cleaned),
        (HIGH_WATERMARKS, |partition| Some(partition.log_end)),
        (RECOVERY_POINTS, |partition| Some(partition.log_end)),
    ];
    for (name, value) in values {
        // A damaged checkpoint counts as empty when it is used, and is made anew here.
        let mut offsets =
            checkpoint::read_offsets(&**files, root.path(), name).unwrap_or_else(|_| PartitionOffsets::new());
        for partition in source.partitions() {
            offsets.extend(value(partition).map(|value| ((partition.topic.clone(), partition.partition), value)));
        }
        checkpoint::write_offsets(&**files, root.path(), name, &offsets)?;
    }
    Ok(())
}

fn copy_file(files: &dyn Files, from: &Path, to: &Path, progress: &dyn Fn(u64)) -> Result<(), IoFailure> {
    let input = files.open(from, OpenMode::Read).during("open", from)?;
    let output = files.open(to, OpenMode::Create).during("create", to)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let read = input.read_at(&mut buffer, at).during("read", from)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        output.write_at(at, &[IoSlice::new(bytes)]).during("write", to)?;
        at += read as u64;
        progress(read as u64);
    }
    output.sync_all().during("sync", to)
}

fn hand_over(source: Source, options: &ImportOptions, manifest: &mut Manifest) -> ImportReport {
    let mut config = options.config.clone();
    for key in ["retention.ms", "retention.bytes"] {
        config.entry(key.to_owned()).or_insert_with(|| "-1".to_owned());
    }
    let mut report = ImportReport { not_served: source.not_served, ..ImportReport::default() };
    let mut ends: BTreeMap<(String, u32), TopicId> = BTreeMap::new();
    for topic in source.topics {
        report.bytes += topic.partitions.iter().map(|partition| partition.file_bytes).sum::<u64>();
        for partition in &topic.partitions {
            ends.insert((topic.name.clone(), partition.partition), topic.id);
            manifest.producer_ids_from = manifest.producer_ids_from.max(partition.max_producer_id.saturating_add(1));
        }
        manifest.topics.push(ImportedTopic {
            name: topic.name.clone(),
            topic_id: topic.id,
            leader_epochs: topic.partitions.iter().map(|partition| partition.leader_epoch).collect(),
            config: config.clone(),
        });
        report.topics.push(TopicReport {
            name: topic.name,
            topic_id: topic.id.to_string(),
            partitions: topic.partitions.len() as u32,
            records: topic.partitions.iter().map(|partition| partition.records).sum(),
            bytes: topic.partitions.iter().map(|partition| partition.log_bytes).sum(),
            log_start_offsets: topic.partitions.iter().map(|partition| partition.log_start).collect(),
            log_end_offsets: topic.partitions.iter().map(|partition| partition.log_end).collect(),
        });
    }
    let (offsets, left_out) = source.offsets.finish(|topic, partition, commit| {
        let id = ends.get(&(topic.to_owned(), partition));
        id.is_some_and(|id| commit.topic_id == TopicId::ZERO || commit.topic_id == *id)
    });
    if left_out > 0 {
        let detail = format!("{left_out} committed offsets are of topics that were not imported");
        report.not_served.push(NotServed { place: source::OFFSETS_TOPIC.into(), detail });
    }
    report.groups = offsets.iter().map(|offset| offset.group.clone()).collect::<BTreeSet<_>>().into_iter().collect();
    report.offsets = offsets.len() as u64;
    manifest.offsets.extend(offsets);
    report.producer_ids_from = manifest.producer_ids_from;
    report
}
