//! The records inside a batch.
//!
//! ```text
//!  | length | attributes | timestamp delta | offset delta | key length | key | value length | value | headers | header ...
//!  | varint | i8, unused | varint (64 bit) | varint       | varint     |     | varint       |       | varint  |
//!
//!  header   | key length: varint | key | value length: varint | value |
//! ```
//! Lengths count bytes, -1 stands for null (a header's key is never null); the record's length counts what follows it.
//! Offsets count from the batch's base offset, timestamps from its base timestamp. When the batch is compressed, all
//! records are compressed as one.
//!
//! Owns: reading records, as slices of the batch where it is not compressed. Refuses: checksums (call
//! [`super::check`] first), and more decompressed bytes than the limit. Read next: [`super::builder`].

use std::borrow::Cow;

use bytes::Bytes;

use super::header::exactly;
use super::varint::{read_i32, read_i64, take_byte};
use super::{BatchError, BatchHeader, Codec, HEADER_BYTES, RecordFault, TimestampType, compression};
use crate::limits::{MAX_DECOMPRESSED_BATCH_BYTES, MAX_HEADERS_PER_RECORD};

/// A record with its offset and timestamp resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record's offset in its partition.
    pub offset: i64,
    /// Milliseconds since 1970, or -1 for none. With [`TimestampType::LogAppend`] it is when the broker appended it.
    pub timestamp: i64,
    /// The key; `None` is Kafka's null, which is not an empty key.
    pub key: Option<Bytes>,
    /// The value; `None` is Kafka's null: in a compacted topic a tombstone.
    pub value: Option<Bytes>,
    /// Headers in their order; keys may repeat.
    pub headers: Vec<Header>,
}

/// A header of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The key: UTF-8 by convention, not by force.
    pub key: Bytes,
    /// The value, or null.
    pub value: Option<Bytes>,
}

impl Header {
    /// The key as text; bytes that are not UTF-8 come as replacement characters.
    pub fn key_str(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.key)
    }
}

/// The records of one batch, in their order. After an error there is nothing more.
#[derive(Debug, Clone)]
pub struct Records {
    header: BatchHeader,
    /// The records, decompressed.
    data: Bytes,
    /// Where in them the next one begins.
    position: usize,
    next_index: u32,
    /// The smallest offset delta that the next record may have.
    smallest_delta: i32,
    ended: bool,
}

impl Records {
    /// The records of `batch`, which is one whole batch. The checksum is not looked at.
    pub fn new(batch: &Bytes) -> Result<Records, BatchError> {
        Records::with_limit(batch, MAX_DECOMPRESSED_BATCH_BYTES)
    }

    /// As [`Records::new`], with a limit of its own on the decompressed size.
    pub fn with_limit(batch: &Bytes, limit: usize) -> Result<Records, BatchError> {
        let header = exactly(batch)?;
        let body = batch.slice(HEADER_BYTES..);
        let data = match header.codec()? {
            Codec::None => body,
            // Compaction leaves empty batches without a codec, but nothing forbids the other.
            _ if header.record_count == 0 && body.is_empty() => body,
            codec => compression::decompress(codec, &body, limit)?.into(),
        };
        Ok(Records { header, data, position: 0, next_index: 0, smallest_delta: 0, ended: false })
    }

    /// The batch's header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Bytes of all the records, decompressed.
    pub fn data_len(&self) -> usize {
        self.data.len()
    }

    fn read(&mut self) -> Result<Record, RecordFault> {
        let mut input = self.data.get(self.position..).unwrap_or_default();
        let length = length(read_i32(&mut input)?)?;
        let end = self.data.len() - input.len() + length;
        let input = input.get(..length).ok_or(RecordFault::Truncated)?;
        let mut fields = Fields { data: &self.data, end, input };
        let record = fields.record(&self.header, self.smallest_delta).map_err(|fault| match fault {
            RecordFault::Truncated => RecordFault::Length,
            fault => fault,
        })?;
        // At most i32::MAX: a record beyond the batch's last offset has been refused.
        self.smallest_delta =
            (record.offset - self.header.base_offset).saturating_add(1).min(i64::from(i32::MAX)) as i32;
        self.position = end;
        Ok(record)
    }
}

impl Iterator for Records {
    type Item = Result<Record, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let record_count = self.header.record_count;
        if self.next_index as i32 >= record_count {
            self.ended = true;
            return (self.position < self.data.len()).then_some(Err(BatchError::TrailingBytes { record_count }));
        }
        let index = self.next_index;
        self.next_index += 1;
        let record = self.read();
        self.ended = record.is_err();
        Some(record.map_err(|fault| BatchError::Record { index, fault }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // A record takes at least seven bytes, which bounds what a wrong count can claim.
        let left = self.header.record_count as usize - self.next_index as usize;
        (0, Some(left.min((self.data.len() - self.position) / SMALLEST_RECORD_BYTES) + 1))
    }
}

impl std::iter::FusedIterator for Records {}

/// Bytes of the smallest record: its length, and six fields of one byte.
const SMALLEST_RECORD_BYTES: usize = 7;

/// A length that cannot be null.
pub(super) fn length(value: i32) -> Result<usize, RecordFault> {
    usize::try_from(value).map_err(|_| RecordFault::Length)
}

/// A length, or null.
pub(super) fn nullable_length(value: i32) -> Result<Option<usize>, RecordFault> {
    if value == -1 { Ok(None) } else { length(value).map(Some) }
}

/// The number of a record's headers.
pub(super) fn header_count(value: i32) -> Result<usize, RecordFault> {
    match usize::try_from(value) {
        Ok(count) if count <= MAX_HEADERS_PER_RECORD => Ok(count),
        _ => Err(RecordFault::Headers(value)),
    }
}

/// Reads the fields of one record.
struct Fields<'a> {
    data: &'a Bytes,
    /// Where in `data` the record ends.
    end: usize,
    /// What is not read yet of the record.
    input: &'a [u8],
}

impl Fields<'_> {
    fn record(&mut self, batch: &BatchHeader, smallest_delta: i32) -> Result<Record, RecordFault> {
        let _attributes = take_byte(&mut self.input)?;
        let timestamp_delta = read_i64(&mut self.input)?;
        let offset_delta = read_i32(&mut self.input)?;
        if offset_delta < smallest_delta || offset_delta > batch.last_offset_delta {
            return Err(RecordFault::OffsetDelta { expected: smallest_delta, found: offset_delta });
        }
        let timestamp = match batch.timestamp_type() {
            TimestampType::LogAppend => batch.max_timestamp,
            TimestampType::Create => {
                batch.base_timestamp.checked_add(timestamp_delta).ok_or(RecordFault::Timestamp(timestamp_delta))?
            }
        };
        let key = self.nullable()?;
        let value = self.nullable()?;
        let header_count = header_count(read_i32(&mut self.input)?)?;
        // A header takes at least two bytes.
        let mut headers = Vec::with_capacity(header_count.min(self.input.len() / 2));
        for _ in 0..header_count {
            let key_length = length(read_i32(&mut self.input)?)?;
            headers.push(Header { key: self.bytes(key_length)?, value: self.nullable()? });
        }
        if !self.input.is_empty() {
            return Err(RecordFault::Length);
        }
        Ok(Record { offset: batch.base_offset + i64::from(offset_delta), timestamp, key, value, headers })
    }

    fn nullable(&mut self) -> Result<Option<Bytes>, RecordFault> {
        nullable_length(read_i32(&mut self.input)?)?.map(|length| self.bytes(length)).transpose()
    }

    fn bytes(&mut self, length: usize) -> Result<Bytes, RecordFault> {
        let start = self.end - self.input.len();
        self.input = self.input.get(length..).ok_or(RecordFault::Truncated)?;
        Ok(self.data.slice(start..start + length))
    }
}
