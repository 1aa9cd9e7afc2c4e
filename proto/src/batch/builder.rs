//! Writing batches: a producer's, and those that compaction rewrites.
//!
//! Owns: the bytes of a new batch, the same that Kafka's own writer makes of the same records. Refuses: deciding when a
//! batch is full, and which records compaction keeps. Read next: [`mod@super::walk`].

use bytes::Bytes;

use super::header::{self, MAGIC, NO_LEADER_EPOCH};
use super::varint::{size_i32, size_i64, write_i32, write_i64};
use super::{
    BatchError, BatchHeader, Codec, HEADER_BYTES, Header, LENGTH_PREFIX_BYTES, NO_PRODUCER_EPOCH, NO_PRODUCER_ID,
    NO_SEQUENCE, NO_TIMESTAMP, Record, TimestampType, compression,
};
use crate::limits::{MAX_BATCH_BYTES, MAX_DECOMPRESSED_BATCH_BYTES, MAX_HEADERS_PER_RECORD, MAX_RECORDS_PER_BATCH};

/// What a batch says about all of its records. The default is what a producer without idempotence sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildOptions {
    /// How the records are compressed.
    pub codec: Codec,
    /// gzip's (0 to 9) or zstd's level; `None` is the codec's default. The other codecs have none.
    pub compression_level: Option<i32>,
    /// Offset of the first record: 0 from a producer, since the leader assigns it.
    pub base_offset: i64,
    /// Who set the timestamps.
    pub timestamp_type: TimestampType,
    /// The idempotent producer, or [`NO_PRODUCER_ID`].
    pub producer_id: i64,
    /// The producer's epoch, or [`NO_PRODUCER_EPOCH`].
    pub producer_epoch: i16,
    /// Sequence of the first record, or [`NO_SEQUENCE`].
    pub base_sequence: i32,
    /// Whether the batch belongs to a transaction.
    pub transactional: bool,
    /// Whether the batch holds control records.
    pub control: bool,
    /// Epoch of the leader, or [`NO_LEADER_EPOCH`] from a producer.
    pub leader_epoch: i32,
}

impl Default for BuildOptions {
    fn default() -> BuildOptions {
        BuildOptions {
            codec: Codec::None,
            compression_level: None,
            base_offset: 0,
            timestamp_type: TimestampType::Create,
            producer_id: NO_PRODUCER_ID,
            producer_epoch: NO_PRODUCER_EPOCH,
            base_sequence: NO_SEQUENCE,
            transactional: false,
            control: false,
            leader_epoch: NO_LEADER_EPOCH,
        }
    }
}

/// Collects records and makes them a batch.
///
/// ```
/// use headwater_proto::batch::{BatchBuilder, BuildOptions, Codec, Records, check};
///
/// let mut builder = BatchBuilder::new(BuildOptions { codec: Codec::Zstd, ..BuildOptions::default() });
/// builder.append(1_700_000_000_000, Some(b"key"), Some(b"value"), &[]);
/// let batch = builder.build()?;
///
/// let header = check(&batch)?;
/// assert_eq!((header.record_count, header.last_offset()), (1, 0));
/// for record in Records::new(&batch)? {
///     assert_eq!(record?.value.as_deref(), Some(b"value".as_slice()));
/// }
/// # Ok::<(), headwater_proto::batch::BatchError>(())
/// ```
#[derive(Debug, Clone)]
pub struct BatchBuilder {
    options: BuildOptions,
    /// Room for the header, then the records as they will stand in an uncompressed batch.
    bytes: Vec<u8>,
    base_timestamp: Option<i64>,
    max_timestamp: i64,
    record_count: i32,
    last_offset_delta: i32,
    /// A record was too large for the format.
    too_large: bool,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new(options: BuildOptions) -> BatchBuilder {
        BatchBuilder {
            options,
            bytes: vec![0; HEADER_BYTES],
            base_timestamp: None,
            max_timestamp: NO_TIMESTAMP,
            record_count: 0,
            last_offset_delta: -1,
            too_large: false,
        }
    }

    /// An empty batch with room for `bytes` before it must grow.
    pub fn with_capacity(options: BuildOptions, bytes: usize) -> BatchBuilder {
        let mut builder = BatchBuilder::new(options);
        builder.bytes.reserve(bytes.saturating_sub(HEADER_BYTES));
        builder
    }

    /// Adds a record and returns its offset less the base offset. `timestamp` is in milliseconds since 1970.
    /// A batch that grows beyond the format's limits is refused by [`BatchBuilder::build`].
    pub fn append(&mut self, timestamp: i64, key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> i32 {
        let offset_delta = self.last_offset_delta.saturating_add(1);
        let headers = headers.iter().map(|header| (&*header.key, header.value.as_deref()));
        self.append_at(offset_delta, timestamp, key, value, headers);
        offset_delta
    }

    /// Number of records so far.
    pub fn record_count(&self) -> usize {
        self.record_count as usize
    }

    /// Whether there is no record yet.
    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// Largest timestamp so far, or -1.
    pub fn max_timestamp(&self) -> i64 {
        self.max_timestamp
    }

    /// Bytes of the batch as it stands, header included: exact without a codec, and before compression with one.
    pub fn size_estimate(&self) -> usize {
        self.bytes.len()
    }

    /// The most bytes by which a record can lengthen a batch, before compression.
    pub fn record_bound(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
        const LENGTH_BYTES: usize = super::varint::MAX_I32_BYTES;
        // Length, attributes, timestamp delta, offset delta, key length, value length, header count.
        const FIXED_BYTES: usize = 5 * LENGTH_BYTES + 1 + super::varint::MAX_I64_BYTES;
        let len = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        let headers = headers.iter().map(|h| 2 * LENGTH_BYTES + h.key.len() + len(h.value.as_deref()));
        FIXED_BYTES + len(key) + len(value) + headers.sum::<usize>()
    }

    /// Names the producer, whose sequence is often known only when the batch is about to be sent.
    pub fn set_producer(&mut self, id: i64, epoch: i16, base_sequence: i32) {
        self.options.producer_id = id;
        self.options.producer_epoch = epoch;
        self.options.base_sequence = base_sequence;
    }

    /// The batch. [`BatchError::Empty`] without records, [`BatchError::TooLarge`] beyond the format's limits.
    pub fn build(self) -> Result<Bytes, BatchError> {
        if self.record_count == 0 {
            return Err(BatchError::Empty);
        }
        let header = BatchHeader {
            base_offset: self.options.base_offset,
            batch_length: 0,
            leader_epoch: self.options.leader_epoch,
            magic: MAGIC,
            crc: 0,
            attributes: header::attributes(
                self.options.codec,
                self.options.timestamp_type,
                self.options.transactional,
                self.options.control,
            ),
            last_offset_delta: self.last_offset_delta,
            base_timestamp: self.base_timestamp.unwrap_or(NO_TIMESTAMP),
            max_timestamp: self.max_timestamp,
            producer_id: self.options.producer_id,
            producer_epoch: self.options.producer_epoch,
            base_sequence: self.options.base_sequence,
            record_count: self.record_count,
        };
        self.build_with(header)
    }

    /// The batch with this header, of which length and checksum are still to be set.
    fn build_with(self, header: BatchHeader) -> Result<Bytes, BatchError> {
        if self.too_large || self.bytes.len() > HEADER_BYTES + MAX_DECOMPRESSED_BATCH_BYTES {
            return Err(BatchError::TooLarge { limit: MAX_DECOMPRESSED_BATCH_BYTES });
        }
        let mut bytes = match self.options.codec {
            Codec::None => self.bytes,
            codec => {
                let mut compressed = vec![0; HEADER_BYTES];
                let records = &self.bytes[HEADER_BYTES..];
                compression::compress(codec, self.options.compression_level, records, &mut compressed)?;
                compressed
            }
        };
        if bytes.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge { limit: MAX_BATCH_BYTES });
        }
        let batch_length = (bytes.len() - LENGTH_PREFIX_BYTES) as i32;
        let (front, body) = bytes.split_at_mut(HEADER_BYTES);
        front.copy_from_slice(&BatchHeader { batch_length, ..header }.sealed(body).encode());
        Ok(bytes.into())
    }

    fn append_at<'h>(
        &mut self,
        offset_delta: i32,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl ExactSizeIterator<Item = (&'h [u8], Option<&'h [u8]>)> + Clone,
    ) {
        let base_timestamp = *self.base_timestamp.get_or_insert(timestamp);
        // Wraps as the reader's sum does; a record whose timestamp is that far away is refused there.
        let timestamp_delta = timestamp.wrapping_sub(base_timestamp);
        let header_count = headers.len();
        let header_sizes = headers.clone().map(|(key, value)| size_nullable(Some(key)) + size_nullable(value));
        let length = 1
            + size_i64(timestamp_delta)
            + size_i32(offset_delta)
            + size_nullable(key)
            + size_nullable(value)
            + size_i32(header_count as i32)
            + header_sizes.sum::<usize>();
        self.too_large |= length > MAX_DECOMPRESSED_BATCH_BYTES
            || header_count > MAX_HEADERS_PER_RECORD
            || self.record_count as usize >= MAX_RECORDS_PER_BATCH;
        if self.too_large {
            // The batch is refused when it is built; there is no use in copying what it will not hold.
            self.record_count = self.record_count.saturating_add(1);
            return;
        }
        let out = &mut self.bytes;
        out.reserve(size_i32(length as i32) + length);
        write_i32(out, length as i32);
        out.push(0);
        write_i64(out, timestamp_delta);
        write_i32(out, offset_delta);
        write_nullable(out, key);
        write_nullable(out, value);
        write_i32(out, header_count as i32);
        for (key, value) in headers {
            write_nullable(out, Some(key));
            write_nullable(out, value);
        }
        self.max_timestamp = self.max_timestamp.max(timestamp);
        self.last_offset_delta = offset_delta;
        self.record_count += 1;
    }
}

/// The batch that compaction leaves of one with this `header` when only the `kept` records stay. Base offset, last offset
/// delta, producer, sequence, epoch, codec and flags are kept, so that no offset moves and the producer's last sequence
/// stays known. A batch may end up with no record at all; it then has no codec either, as Kafka writes it.
///
/// `delete_horizon_ms` is when the tombstones of the batch may go; a horizon that the batch already has stays.
pub fn rebuild(header: &BatchHeader, kept: &[Record], delete_horizon_ms: Option<i64>) -> Result<Bytes, BatchError> {
    if kept.is_empty() {
        return Ok(empty(header));
    }
    let horizon = header.delete_horizon_ms().or(delete_horizon_ms);
    let mut builder = BatchBuilder::new(BuildOptions { codec: header.codec()?, ..BuildOptions::default() });
    builder.base_timestamp = horizon;
    for record in kept {
        let foreign = || BatchError::ForeignRecord {
            offset: record.offset,
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
        };
        let offset_delta = record.offset.checked_sub(header.base_offset).ok_or_else(foreign)?;
        if offset_delta <= i64::from(builder.last_offset_delta) || offset_delta > i64::from(header.last_offset_delta) {
            return Err(foreign());
        }
        let headers = record.headers.iter().map(|header| (&*header.key, header.value.as_deref()));
        builder.append_at(
            offset_delta as i32,
            record.timestamp,
            record.key.as_deref(),
            record.value.as_deref(),
            headers,
        );
    }
    let rebuilt = BatchHeader {
        record_count: builder.record_count,
        base_timestamp: builder.base_timestamp.unwrap_or(NO_TIMESTAMP),
        max_timestamp: match header.timestamp_type() {
            TimestampType::LogAppend => header.max_timestamp,
            TimestampType::Create => builder.max_timestamp,
        },
        ..*header
    };
    builder.build_with(match horizon {
        Some(ms) => rebuilt.with_delete_horizon(ms),
        None => rebuilt,
    })
}

/// What is left of a batch when no record is: its header, which keeps the producer's last sequence and the offsets known.
fn empty(header: &BatchHeader) -> Bytes {
    let header = BatchHeader {
        batch_length: (HEADER_BYTES - LENGTH_PREFIX_BYTES) as i32,
        attributes: header::attributes(
            Codec::None,
            header.timestamp_type(),
            header.is_transactional(),
            header.is_control(),
        ),
        base_timestamp: NO_TIMESTAMP,
        record_count: 0,
        ..*header
    };
    Bytes::copy_from_slice(&header.sealed(&[]).encode())
}

fn size_nullable(bytes: Option<&[u8]>) -> usize {
    // Beyond the limit the batch is refused, whatever the length's size.
    bytes.map_or(size_i32(-1), |bytes| size_i32(bytes.len() as i32) + bytes.len())
}

fn write_nullable(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        None => write_i32(out, -1),
        Some(bytes) => {
            write_i32(out, bytes.len() as i32);
            out.extend_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Records, check};
    use super::*;

    fn three_records(options: BuildOptions) -> Bytes {
        let mut builder = BatchBuilder::new(options);
        for timestamp in [100, 300, 200] {
            builder.append(timestamp, Some(b"key"), Some(b"value"), &[]);
        }
        builder.build().unwrap()
    }

    fn records(batch: &Bytes) -> Vec<Record> {
        Records::new(batch).unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn size_estimate_and_record_bound_hold() {
        let headers = [Header { key: Bytes::from_static(b"h"), value: None }];
        let mut builder = BatchBuilder::new(BuildOptions::default());
        assert_eq!(builder.size_estimate(), HEADER_BYTES);
        for timestamp in [0, i64::MAX, i64::MIN, 5] {
            let before = builder.size_estimate();
            builder.append(timestamp, Some(b"key"), None, &headers);
            assert!(builder.size_estimate() - before <= BatchBuilder::record_bound(Some(b"key"), None, &headers));
        }
        let estimate = builder.size_estimate();
        assert_eq!(builder.build().unwrap().len(), estimate);
    }

    #[test]
    fn an_empty_batch_and_one_beyond_the_limits_are_refused() {
        assert_eq!(BatchBuilder::new(BuildOptions::default()).build(), Err(BatchError::Empty));
        let headers = vec![Header { key: Bytes::new(), value: None }; MAX_HEADERS_PER_RECORD + 1];
        let mut builder = BatchBuilder::new(BuildOptions::default());
        builder.append(0, None, None, &headers);
        assert!(matches!(builder.build(), Err(BatchError::TooLarge { .. })));
    }

    #[test]
    fn a_producer_can_be_named_before_and_after_building() {
        let mut builder = BatchBuilder::new(BuildOptions::default());
        builder.append(0, None, None, &[]);
        let anonymous = builder.clone().build().unwrap();
        builder.set_producer(7, 1, 42);
        let named = builder.build().unwrap();
        let body = &anonymous[HEADER_BYTES..];
        assert_eq!(Ok(check(&anonymous).unwrap().with_producer(7, 1, 42, body)), check(&named));
    }

    #[test]
    fn compaction_keeps_offsets_sequences_and_codec() {
        let options = BuildOptions {
            base_offset: 10,
            producer_id: 7,
            producer_epoch: 1,
            base_sequence: 42,
            ..Default::default()
        };
        for codec in Codec::ALL {
            let batch = three_records(BuildOptions { codec, ..options });
            let header = check(&batch).unwrap();
            let kept = records(&batch).split_off(2);
            let rebuilt = rebuild(&header, &kept, Some(5_000)).unwrap();
            let again = check(&rebuilt).unwrap();
            assert_eq!((again.base_offset, again.last_offset(), again.record_count), (10, 12, 1));
            assert_eq!((again.producer_id, again.base_sequence, again.last_sequence()), (7, 42, 44));
            assert_eq!((again.codec(), again.max_timestamp), (Ok(codec), 200));
            assert_eq!((again.delete_horizon_ms(), again.base_timestamp), (Some(5_000), 5_000));
            assert_eq!(records(&rebuilt), kept);
            let later = rebuild(&again, &kept, Some(9_000)).unwrap();
            assert_eq!(later, rebuilt, "a horizon never moves");
        }
    }

    #[test]
    fn compaction_writes_append_time_into_the_records() {
        let batch = three_records(BuildOptions::default());
        let body = &batch[HEADER_BYTES..];
        let stamped = check(&batch).unwrap().with_log_append_time(777, body);
        let batch = Bytes::from([stamped.encode().as_slice(), body].concat());
        let rebuilt = rebuild(&stamped, &records(&batch)[..2], None).unwrap();
        let again = check(&rebuilt).unwrap();
        assert_eq!((again.base_timestamp, again.max_timestamp), (777, 777));
        assert!(records(&rebuilt).iter().all(|record| record.timestamp == 777));
    }

    #[test]
    fn an_emptied_batch_keeps_its_place_and_no_codec() {
        let batch = three_records(BuildOptions { codec: Codec::Zstd, base_sequence: 3, ..BuildOptions::default() });
        let header = check(&batch).unwrap();
        let rebuilt = rebuild(&header, &[], Some(5_000)).unwrap();
        let again = check(&rebuilt).unwrap();
        assert_eq!((rebuilt.len(), again.record_count, again.last_offset(), again.last_sequence()), (61, 0, 2, 5));
        assert_eq!((again.base_timestamp, again.max_timestamp), (NO_TIMESTAMP, 300));
        assert_eq!((again.codec(), again.delete_horizon_ms()), (Ok(Codec::None), None));
        assert_eq!(Records::new(&rebuilt).unwrap().next(), None);
    }

    #[test]
    fn compaction_refuses_records_of_another_batch() {
        let batch = three_records(BuildOptions { base_offset: 10, ..BuildOptions::default() });
        let header = check(&batch).unwrap();
        let mut kept = records(&batch);
        kept.reverse();
        assert!(matches!(rebuild(&header, &kept, None), Err(BatchError::ForeignRecord { offset: 11, .. })));
        for offset in [9, 13, i64::MIN] {
            kept[0].offset = offset;
            assert!(matches!(rebuild(&header, &kept[..1], None), Err(BatchError::ForeignRecord { .. })));
        }
    }
}
