//! What a consumer hands out, and how positions are said.
//!
//! Owns: records and batches as the application sees them, positions, what to start from. Refuses: fetching.

use std::sync::Arc;

use bytes::Bytes;
use headwater_proto::batch::{BatchHeader, Header, Record, Records, TimestampType};

use crate::error::ConsumeError;

/// A record, as it stands in the log. `{:?}` shows no contents.
#[derive(Clone, PartialEq, Eq)]
pub struct ConsumedRecord {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: u32,
    /// The offset.
    pub offset: i64,
    /// Milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Who set the timestamp.
    pub timestamp_type: TimestampType,
    /// The key.
    pub key: Option<Bytes>,
    /// The value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// The headers, in order.
    pub headers: Vec<Header>,
    /// Epoch of the leader that wrote the record.
    pub leader_epoch: i32,
}

impl ConsumedRecord {
    /// The position after this record: what to commit once it is done with, and where to go on.
    pub fn next_position(&self) -> Position {
        Position { offset: self.offset + 1, leader_epoch: self.leader_epoch }
    }
}

impl std::fmt::Debug for ConsumedRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsumedRecord")
            .field("topic", &self.topic)
            .field("partition", &self.partition)
            .field("offset", &self.offset)
            .field("timestamp_ms", &self.timestamp_ms)
            .field("timestamp_type", &self.timestamp_type)
            .field("key_bytes", &self.key.as_ref().map(Bytes::len))
            .field("value_bytes", &self.value.as_ref().map(Bytes::len))
            .field("headers", &self.headers.len())
            .field("leader_epoch", &self.leader_epoch)
            .finish()
    }
}

/// Where a consumer begins with a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartFrom {
    /// The first offset the log holds.
    Earliest,
    /// What comes from now on.
    Latest,
    /// This offset.
    Offset(i64),
    /// This offset, with the leader epoch of the record before it: if the log lost that record meanwhile, the consumer is
    /// told ([`ConsumeError::LogTruncated`]) instead of passing over what stands in its place.
    Position(Position),
    /// The first record whose timestamp is at or after this one, in milliseconds since 1970; the end if there is none.
    Timestamp(i64),
}

/// What to do when a position lies outside the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutOfRange {
    /// Say so ([`ConsumeError::OffsetOutOfRange`]) and stop reading the partition: nothing is skipped unseen.
    #[default]
    Error,
    /// Go on with the first offset the log holds.
    Earliest,
    /// Go on with what comes from now on.
    Latest,
}

/// A place in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The next offset.
    pub offset: i64,
    /// Leader epoch of the record before it; -1: unknown. With it a broker can tell that the log was cut in between.
    pub leader_epoch: i32,
}

/// An offset alone, of which nothing more is known.
impl From<i64> for Position {
    fn from(offset: i64) -> Position {
        Position { offset, leader_epoch: -1 }
    }
}

impl Position {
    /// Nobody has found out yet.
    pub(crate) const UNKNOWN: Position = Position { offset: -1, leader_epoch: -1 };

    pub(crate) fn is_known(&self) -> bool {
        self.offset >= 0
    }
}

/// What every record of a batch has in common.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: u32,
    pub(crate) leader_epoch: i32,
    pub(crate) timestamp_type: TimestampType,
}

impl Origin {
    pub(crate) fn new(topic: &Arc<str>, partition: u32, header: &BatchHeader) -> Origin {
        Origin {
            topic: topic.clone(),
            partition,
            leader_epoch: header.leader_epoch,
            timestamp_type: header.timestamp_type(),
        }
    }

    pub(crate) fn record(&self, record: Record) -> ConsumedRecord {
        ConsumedRecord {
            topic: self.topic.clone(),
            partition: self.partition,
            offset: record.offset,
            timestamp_ms: record.timestamp,
            timestamp_type: self.timestamp_type,
            key: record.key,
            value: record.value,
            headers: record.headers,
            leader_epoch: self.leader_epoch,
        }
    }

    pub(crate) fn corrupt(&self, offset: i64, reason: impl ToString) -> ConsumeError {
        ConsumeError::Corrupt {
            topic: self.topic.clone(),
            partition: self.partition,
            offset,
            reason: reason.to_string(),
        }
    }
}

/// Records of one partition that were written together. Iterating decodes them.
///
/// It may hold none: where a batch has only control records, or compaction took them, the position moves all the same.
/// `{:?}` shows no contents.
pub struct ConsumedBatch {
    pub(crate) origin: Origin,
    /// `None`: nothing to deliver.
    pub(crate) records: Option<Records>,
    /// Records outside of these offsets are not delivered.
    pub(crate) from: i64,
    pub(crate) below: i64,
    pub(crate) bytes: usize,
}

impl std::fmt::Debug for ConsumedBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsumedBatch")
            .field("topic", &self.origin.topic)
            .field("partition", &self.origin.partition)
            .field("base_offset", &self.from)
            .field("next_offset", &self.below)
            .field("leader_epoch", &self.origin.leader_epoch)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl ConsumedBatch {
    /// The topic.
    pub fn topic(&self) -> &Arc<str> {
        &self.origin.topic
    }

    /// The partition.
    pub fn partition(&self) -> u32 {
        self.origin.partition
    }

    /// Epoch of the leader that wrote the batch.
    pub fn leader_epoch(&self) -> i32 {
        self.origin.leader_epoch
    }

    /// Who set the timestamps.
    pub fn timestamp_type(&self) -> TimestampType {
        self.origin.timestamp_type
    }

    /// The offset from which on this batch delivers.
    pub fn base_offset(&self) -> i64 {
        self.from
    }

    /// The offset after what this batch delivers: the consumer's position.
    pub fn next_offset(&self) -> i64 {
        self.below
    }

    /// The position after what this batch delivers: what to commit once it is done with, and where to go on.
    pub fn next_position(&self) -> Position {
        Position { offset: self.below, leader_epoch: self.origin.leader_epoch }
    }

    /// Bytes of the batch in the log, compressed as it is there.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl IntoIterator for ConsumedBatch {
    type Item = Result<ConsumedRecord, ConsumeError>;
    type IntoIter = ConsumedRecords;

    fn into_iter(self) -> ConsumedRecords {
        ConsumedRecords { batch: self }
    }
}

/// The records of a [`ConsumedBatch`].
#[derive(Debug)]
pub struct ConsumedRecords {
    batch: ConsumedBatch,
}

impl Iterator for ConsumedRecords {
    type Item = Result<ConsumedRecord, ConsumeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let ConsumedBatch { origin, records, from, below, .. } = &mut self.batch;
        loop {
            match records.as_mut()?.next()? {
                Ok(record) if record.offset < *from => {}
                Ok(record) if record.offset >= *below => {
                    *records = None;
                    return None;
                }
                Ok(record) => {
                    *from = record.offset + 1;
                    return Some(Ok(origin.record(record)));
                }
                Err(error) => {
                    *records = None;
                    return Some(Err(origin.corrupt(*from, error)));
                }
            }
        }
    }
}
