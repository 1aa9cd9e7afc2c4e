//! The offsets that groups committed, out of Kafka's `__consumer_offsets` partitions.
//!
//! Owns: which commit of a group counts: the last, unless it was deleted after; one of a transaction only from its commit on.
//! Refuses: classic groups' members and everything else that is about who is alive. Read next: `../offsets_schema/mod.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use headwater_proto::batch::control::{self, ControlType};
use headwater_proto::batch::{BatchHeader, Record};

use super::manifest::ImportedOffset;
use crate::offsets_schema::{self, OffsetCommit, OffsetsKey, OffsetsValue, SchemaError};

/// What was read so far.
#[derive(Debug, Default)]
pub(super) struct CommittedOffsets {
    commits: BTreeMap<(String, String, i32), OffsetCommit>,
    /// Records of transactions that have not ended, by producer.
    pending: HashMap<i64, Vec<Record>>,
    /// Kinds of records that are not known, and how many there were.
    pub(super) unknown: BTreeMap<i16, u64>,
    pub(super) unreadable: u64,
    pub(super) groups: BTreeSet<String>,
}

impl CommittedOffsets {
    pub(super) fn batch(&mut self, header: &BatchHeader, records: Vec<Record>) {
        if header.is_control() {
            let kind = records.first().and_then(|record| control::parse_key(record.key.as_deref()?).ok());
            let ended = self.pending.remove(&header.producer_id).unwrap_or_default();
            if kind == Some(ControlType::Commit) {
                ended.iter().for_each(|record| self.record(record.key.as_deref(), record.value.as_deref()));
            }
        } else if header.is_transactional() {
            self.pending.entry(header.producer_id).or_default().extend(records);
        } else {
            records.iter().for_each(|record| self.record(record.key.as_deref(), record.value.as_deref()));
        }
    }

    fn record(&mut self, key: Option<&[u8]>, value: Option<&[u8]>) {
        match offsets_schema::decode(key.unwrap_or_default(), value) {
            Ok((OffsetsKey::OffsetCommit { group, topic, partition }, value)) => {
                match value {
                    Some(OffsetsValue::OffsetCommit(commit)) => self.commits.insert((group, topic, partition), commit),
                    _ => self.commits.remove(&(group, topic, partition)),
                };
            }
            Ok((key, Some(_))) => drop(self.groups.insert(key.group().to_owned())),
            Ok((_, None)) => {}
            Err(SchemaError::UnknownKind(kind)) => *self.unknown.entry(kind).or_default() += 1,
            Err(_) => self.unreadable += 1,
        }
    }

    /// The offsets of partitions that `known` takes; how many others there are.
    pub(super) fn finish(self, known: impl Fn(&str, u32, &OffsetCommit) -> bool) -> (Vec<ImportedOffset>, u64) {
        let mut offsets = Vec::new();
        let mut left_out = 0;
        for ((group, topic, partition), commit) in self.commits {
            match u32::try_from(partition)
                .ok()
                .filter(|partition| commit.offset >= 0 && known(&topic, *partition, &commit))
            {
                None => left_out += 1,
                Some(partition) => offsets.push(ImportedOffset {
                    group,
                    topic,
                    partition,
                    offset: commit.offset,
                    leader_epoch: commit.leader_epoch,
                    metadata: commit.metadata,
                    commit_timestamp_ms: commit.commit_timestamp_ms,
                }),
            }
        }
        (offsets, left_out)
    }
}
