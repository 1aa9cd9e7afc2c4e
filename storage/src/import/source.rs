//! Reads one of Kafka's log directories.
//!
//! Owns: which folders are topics' partitions, that those are complete and whole, and what else is there. Refuses: to write. Read next:
//! `offsets.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_proto::batch::Records;

use super::offsets::CommittedOffsets;
use super::{ImportError, NotServed};
use crate::checkpoint::{
    self, CLEANER_OFFSETS, CheckpointError, LOG_START_OFFSETS, PARTITION_METADATA, PartitionOffsets,
};
use crate::epochs;
use crate::error::{During, IoFailure};
use crate::files::Files;
use crate::inspect::scan::{FoundBatch, Item};
use crate::inspect::{self, Target};
use crate::producers;

/// Where Kafka keeps what groups committed.
pub(super) const OFFSETS_TOPIC: &str = "__consumer_offsets";

/// Kafka's own topics, which are read for what they say or left behind.
const INTERNAL: [(&str, &str); 5] = [
    ("__transaction_state", "transactions are not served yet: their coordinator's state is left behind"),
    ("__share_group_state", "share groups are not served yet: their state is left behind"),
    ("__cluster_metadata", "Kafka's cluster metadata is left behind: settings of topics are not imported"),
    (
        "__remote_log_metadata",
        "tiered storage is not served yet: segments that are only in a remote store are left behind",
    ),
    ("__metadata", "an internal topic is left behind"),
];

/// What a log directory holds.
#[derive(Debug)]
pub(super) struct Source {
    files: Arc<dyn Files>,
    pub(super) topics: Vec<SourceTopic>,
    offsets_folders: Vec<PathBuf>,
    pub(super) offsets: CommittedOffsets,
    pub(super) not_served: Vec<NotServed>,
}

#[derive(Debug)]
pub(super) struct SourceTopic {
    pub(super) name: String,
    pub(super) id: TopicId,
    /// By number.
    pub(super) partitions: Vec<SourcePartition>,
}

#[derive(Debug)]
pub(super) struct SourcePartition {
    pub(super) topic: String,
    pub(super) partition: u32,
    pub(super) path: PathBuf,
    /// Names of the files that belong to the partition.
    pub(super) files: Vec<String>,
    pub(super) file_bytes: u64,
    pub(super) log_bytes: u64,
    pub(super) records: u64,
    pub(super) log_start: i64,
    pub(super) log_end: i64,
    /// Up to where Kafka's cleaner came.
    pub(super) cleaned: Option<i64>,
    /// The largest that the log has seen; -1 for none.
    pub(super) leader_epoch: i32,
    /// -1 for none.
    pub(super) max_producer_id: i64,
}

impl Source {
    /// Finds the topics; `wanted` may limit them.
    pub(super) fn list(files: &Arc<dyn Files>, dir: &Path, wanted: &[String]) -> Result<Source, ImportError> {
        let mut source = Source {
            files: Arc::clone(files),
            topics: Vec::new(),
            offsets_folders: Vec::new(),
            offsets: CommittedOffsets::default(),
            not_served: Vec::new(),
        };
        let log_starts = source.checkpoint(dir, LOG_START_OFFSETS)?;
        let cleaned = source.checkpoint(dir, CLEANER_OFFSETS)?;
        let mut by_topic: BTreeMap<String, BTreeMap<u32, SourcePartition>> = BTreeMap::new();
        let entries = match files.list(dir) {
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {
                return Err(ImportError::NoPartitions(dir.to_owned()));
            }
            entries => entries.during("list", dir)?,
        };
        for entry in entries.iter().filter(|entry| entry.is_dir) {
            let path = dir.join(&entry.name);
            let Some((topic, partition)) = checkpoint::parse_partition_dir_name(&entry.name) else {
                source.leave(
                    &entry.name,
                    "is no partition's folder (being deleted, moved or set aside) and is left behind",
                );
                continue;
            };
            if topic == OFFSETS_TOPIC {
                source.offsets_folders.push(path);
                continue;
            }
            if let Some((_, why)) = INTERNAL.iter().find(|(name, _)| *name == topic) {
                source.leave(&entry.name, why);
                continue;
            }
            if !wanted.is_empty() && !wanted.contains(&topic) {
                continue;
            }
            let key = (topic.clone(), partition);
            let found = SourcePartition {
                topic: topic.clone(),
                partition,
                path,
                files: Vec::new(),
                file_bytes: 0,
                log_bytes: 0,
                records: 0,
                log_start: log_starts.get(&key).copied().unwrap_or(0),
                log_end: 0,
                cleaned: cleaned.get(&key).copied(),
                leader_epoch: -1,
                max_producer_id: -1,
            };
            by_topic.entry(topic).or_default().insert(partition, found);
        }
        if let Some(missing) = wanted.iter().find(|topic| !by_topic.contains_key(*topic)) {
            return Err(ImportError::UnknownTopic(missing.clone()));
        }
        if by_topic.is_empty() && source.offsets_folders.is_empty() {
            return Err(ImportError::NoPartitions(dir.to_owned()));
        }
        for (name, partitions) in by_topic {
            if let Some((number, _)) = (0..).zip(partitions.keys()).find(|(number, partition)| number != *partition) {
                return Err(ImportError::MissingPartition { topic: name, partition: number });
            }
            let partitions: Vec<_> = partitions.into_values().collect();
            let id = source.topic_id(&partitions)?;
            source.topics.push(SourceTopic { name, id, partitions });
        }
        Ok(source)
    }

    pub(super) fn partitions(&self) -> impl Iterator<Item = &SourcePartition> {
        self.topics.iter().flat_map(|topic| &topic.partitions)
    }

    /// Verifies every partition and reads what groups committed.
    pub(super) fn read(&mut self, progress: &dyn Fn(u64)) -> Result<(), ImportError> {
        let mut topics = std::mem::take(&mut self.topics);
        for topic in &mut topics {
            for partition in &mut topic.partitions {
                self.partition(partition, progress)?;
            }
            if topic.partitions.iter().any(|partition| partition.cleaned.is_some()) {
                self.leave(
                    &topic.name,
                    "Kafka compacted it; it is imported without cleanup.policy=compact unless -c says so",
                );
            }
        }
        self.topics = topics;
        for folder in std::mem::take(&mut self.offsets_folders) {
            let target = self.verified(&folder, progress)?;
            let epochs = target.leader_epochs();
            batches(&target, &epochs, |found, records| {
                self.offsets.batch(&found.header, records);
            })?;
        }
        for (kind, count) in std::mem::take(&mut self.offsets.unknown) {
            let what = if (10..=15).contains(&kind) { "share groups" } else { "streams groups" };
            self.leave(OFFSETS_TOPIC, &format!("{count} records of kind {kind} ({what}) are left behind"));
        }
        if self.offsets.unreadable > 0 {
            let detail = format!("{} records could not be read and are left behind", self.offsets.unreadable);
            self.leave(OFFSETS_TOPIC, &detail);
        }
        if !self.offsets.groups.is_empty() {
            let detail = format!(
                "members and assignments of {} groups are left behind; their offsets are imported",
                self.offsets.groups.len()
            );
            self.leave(OFFSETS_TOPIC, &detail);
        }
        Ok(())
    }

    fn leave(&mut self, place: &str, detail: &str) {
        self.not_served.push(NotServed { place: place.into(), detail: detail.into() });
    }

    fn checkpoint(&self, dir: &Path, name: &str) -> Result<PartitionOffsets, CheckpointError> {
        checkpoint::read_offsets(&*self.files, dir, name)
    }

    /// The id that all partitions of a topic name.
    fn topic_id(&self, partitions: &[SourcePartition]) -> Result<TopicId, ImportError> {
        let mut id = None;
        for partition in partitions {
            let wrong = |detail: String| ImportError::TopicId { path: partition.path.join(PARTITION_METADATA), detail };
            let found = match checkpoint::read_partition_metadata(&*self.files, &partition.path) {
                Ok(Some(found)) => found,
                Ok(None) => {
                    return Err(wrong(
                        "is missing: versions of Kafka before 2.8 wrote the folder; let a newer one open it first"
                            .into(),
                    ));
                }
                Err(CheckpointError::Damaged { fault, .. }) => {
                    return Err(wrong(format!("is damaged at line {}: {}", fault.line, fault.detail)));
                }
                Err(CheckpointError::Io(failure)) => return Err(failure.into()),
            };
            if found == TopicId::ZERO || id.is_some_and(|id| id != found) {
                return Err(wrong(format!(
                    "names the topic id {found}, which is not that of the topic's other partitions"
                )));
            }
            id = Some(found);
        }
        id.ok_or_else(|| ImportError::NoPartitions(PathBuf::new()))
    }

    fn partition(&mut self, partition: &mut SourcePartition, progress: &dyn Fn(u64)) -> Result<(), ImportError> {
        let target = self.verified(&partition.path, progress)?;
        for entry in self.files.list(&partition.path).during("list", &partition.path)? {
            let extension = checkpoint::parse_segment_file_name(&entry.name).map(|(_, extension)| extension);
            let segment = [".log", ".index", ".timeindex", ".txnindex", ".crc", producers::EXTENSION];
            let ours = extension.is_some_and(|extension| segment.contains(&extension))
                || [epochs::FILE_NAME, PARTITION_METADATA].contains(&&*entry.name);
            let path = partition.path.join(&entry.name);
            if entry.is_dir || !ours {
                if extension.is_some_and(|extension| extension.ends_with(".swap")) {
                    return Err(ImportError::Unfinished(path));
                }
                continue;
            }
            partition.file_bytes += self.files.metadata(&path).during("look at", &path)?.len;
            partition.files.push(entry.name);
        }
        partition.log_bytes = target.log_bytes();
        partition.log_end = target.segments.last().map_or(0, |segment| segment.base_offset);
        let epochs = target.leader_epochs();
        partition.leader_epoch = epochs.as_ref().and_then(|epochs| epochs.latest()).unwrap_or(-1);
        let (mut transactional, mut open) = (0u64, BTreeSet::new());
        headers(&target, &epochs, |found| {
            let header = &found.header;
            partition.log_end = header.next_offset();
            partition.leader_epoch = partition.leader_epoch.max(header.leader_epoch);
            partition.max_producer_id = partition.max_producer_id.max(header.producer_id);
            if header.is_control() {
                open.remove(&header.producer_id);
                return;
            }
            partition.records += header.record_count as u64;
            if header.is_transactional() {
                transactional += 1;
                open.insert(header.producer_id);
            }
        })?;
        let first = target.segments.first().map_or(0, |segment| segment.base_offset);
        partition.log_start = partition.log_start.clamp(first, partition.log_end.max(first));
        partition.max_producer_id = partition.max_producer_id.max(self.snapshot_producer_id(partition)?);
        let place = checkpoint::partition_dir_name(&partition.topic, partition.partition);
        if transactional > 0 {
            self.leave(
                &place,
                &format!(
                    "{transactional} batches of transactions are read as read_uncommitted reads them, aborted ones too"
                ),
            );
        }
        if !open.is_empty() {
            let ids: Vec<_> = open.iter().map(i64::to_string).collect();
            self.leave(
                &place,
                &format!("transactions that never ended, of producers {}, stay unfinished", ids.join(", ")),
            );
        }
        Ok(())
    }

    fn snapshot_producer_id(&self, partition: &SourcePartition) -> Result<i64, IoFailure> {
        let mut largest = -1;
        for name in partition.files.iter().filter(|name| name.ends_with(producers::EXTENSION)) {
            let path = partition.path.join(name);
            let bytes = crate::files::read(&*self.files, &path, 1 << 30).during("read", &path)?;
            // It has been verified.
            let entries = producers::decode_snapshot(&bytes).unwrap_or_default();
            largest = entries.iter().map(|entry| entry.producer_id).fold(largest, i64::max);
        }
        Ok(largest)
    }

    fn verified(&self, path: &Path, progress: &dyn Fn(u64)) -> Result<Target, ImportError> {
        let target = Target::open(Arc::clone(&self.files), path)?;
        let report = inspect::verify(&target, progress)?;
        if report.faults.is_empty() {
            Ok(target)
        } else {
            Err(ImportError::Damaged { path: path.to_owned(), faults: report.faults })
        }
    }
}

type Epochs = Option<crate::epochs::LeaderEpochs>;

fn headers(target: &Target, epochs: &Epochs, mut visit: impl FnMut(&FoundBatch)) -> Result<(), ImportError> {
    let mut previous = None;
    for segment in &target.segments {
        let Some(mut scanner) = target.scan(segment, epochs.clone(), previous)? else { continue };
        while let Some(item) = scanner.next().map_err(inspect::at(&segment.path))? {
            if let Item::Batch(found) = item {
                visit(&found);
            }
        }
        previous = scanner.previous();
    }
    Ok(())
}

fn batches(
    target: &Target,
    epochs: &Epochs,
    mut visit: impl FnMut(&FoundBatch, Vec<headwater_proto::batch::Record>),
) -> Result<(), ImportError> {
    headers(target, epochs, |found| {
        // The records have been read once, to verify them.
        let records = Records::new(&found.bytes).and_then(|records| records.collect::<Result<Vec<_>, _>>());
        visit(found, records.unwrap_or_default());
    })
}
