//! A record as the application hands it over.
//!
//! Owns: [`ProducerRecord`], and refusing by name what no batch can hold: within a batch it would fail its neighbours too.
//! Refuses: what depends on the topic (see [`super::batcher`]).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use headwater_proto::batch::{Header, NO_TIMESTAMP};
use headwater_proto::limits::{MAX_DECOMPRESSED_BATCH_BYTES, MAX_HEADERS_PER_RECORD};

use super::batcher::Parts;
use crate::error::ProduceError;

/// A record to be produced. `{:?}` shows where to and how much, not what.
#[derive(Clone, PartialEq, Eq)]
pub struct ProducerRecord {
    /// Where to. Cloning an `Arc<str>` is cheaper than making one for each record.
    pub topic: Arc<str>,
    /// The partition; `None`: the producer's [`Partitioner`](crate::Partitioner) chooses.
    pub partition: Option<u32>,
    /// Milliseconds since 1970; `None`: the time of sending.
    pub timestamp_ms: Option<i64>,
    /// The key. Records of one key go to one partition, and stay in order.
    pub key: Option<Bytes>,
    /// The value; `None` is a tombstone where the topic is compacted.
    pub value: Option<Bytes>,
    /// The headers, in order; names may come twice.
    pub headers: Vec<Header>,
}

impl ProducerRecord {
    /// A record without a key, with the time of sending.
    pub fn new(topic: impl Into<Arc<str>>, value: impl Into<Option<Bytes>>) -> ProducerRecord {
        ProducerRecord {
            topic: topic.into(),
            partition: None,
            timestamp_ms: None,
            key: None,
            value: value.into(),
            headers: Vec::new(),
        }
    }

    /// Sets the key.
    pub fn key(mut self, key: impl Into<Option<Bytes>>) -> ProducerRecord {
        self.key = key.into();
        self
    }

    /// Names the partition.
    pub fn partition(mut self, partition: u32) -> ProducerRecord {
        self.partition = Some(partition);
        self
    }

    /// Sets the timestamp, in milliseconds since 1970.
    pub fn timestamp_ms(mut self, timestamp_ms: i64) -> ProducerRecord {
        self.timestamp_ms = Some(timestamp_ms);
        self
    }

    /// Adds a header.
    pub fn header(mut self, key: impl Into<Bytes>, value: impl Into<Option<Bytes>>) -> ProducerRecord {
        self.headers.push(Header { key: key.into(), value: value.into() });
        self
    }

    /// What goes into a batch. `now_ms` is only asked where the record brings no time of its own.
    pub(crate) fn parts(&self, now_ms: impl FnOnce() -> i64) -> Parts<'_> {
        Parts {
            timestamp_ms: self.timestamp_ms.unwrap_or_else(now_ms),
            key: self.key.as_ref(),
            value: self.value.as_ref(),
            headers: &self.headers,
        }
    }

    /// The most bytes that the record takes in a batch.
    ///
    /// # Errors
    /// When no batch can hold it.
    pub(crate) fn bound(&self) -> Result<usize, ProduceError> {
        let invalid = |reason: String| Err(ProduceError::InvalidRecord { topic: self.topic.clone(), reason });
        if let Some(timestamp_ms) = self.timestamp_ms.filter(|ms| *ms < NO_TIMESTAMP) {
            return invalid(format!("timestamp {timestamp_ms} lies before 1970; only -1 may, and means none"));
        }
        if self.headers.len() > MAX_HEADERS_PER_RECORD {
            return invalid(format!("{} headers are more than {MAX_HEADERS_PER_RECORD}", self.headers.len()));
        }
        let bytes = self.parts(|| 0).bound();
        if bytes > MAX_DECOMPRESSED_BATCH_BYTES {
            return invalid(format!("{bytes} bytes are more than {MAX_DECOMPRESSED_BATCH_BYTES}, compressed or not"));
        }
        Ok(bytes)
    }
}

impl std::fmt::Debug for ProducerRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProducerRecord")
            .field("topic", &self.topic)
            .field("partition", &self.partition)
            .field("timestamp_ms", &self.timestamp_ms)
            .field("key_bytes", &self.key.as_ref().map(Bytes::len))
            .field("value_bytes", &self.value.as_ref().map(Bytes::len))
            .field("headers", &self.headers.len())
            .finish()
    }
}

/// The time of sending.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
