//! The header of a record batch, its checksum, and batches that lie one after another.
//!
//! ```text
//!  0        8        12       16  17       21       23           27               35
//!  | i64    | i32    | i32    |i8 | u32    | i16    | i32        | i64            | i64
//!  | base   | batch  | leader |ma-| CRC-32C| attri- | last offset| base timestamp | largest timestamp
//!  | offset | length | epoch  |gic| 21..end| butes  | delta      |                |
//!
//!  43            51        53        57       61
//!  | i64         | i16     | i32     | i32    | records, compressed as one when a codec is set
//!  | producer id | producer| base    | record |
//!  |             | epoch   | sequence| count  |
//!
//!  attributes   bits 0-2 codec (0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd), bit 3 timestamp type (0 create, 1 log append),
//!               bit 4 transactional, bit 5 control, bit 6 the base timestamp is a delete horizon
//! ```
//! Numbers are big-endian. The length counts what follows it (from byte 12). Base offset, length, leader epoch and magic
//! lie before the checksummed bytes, so a broker assigns offset and epoch without touching the checksum.
//! The format is Kafka's message format v2 (its `DefaultRecordBatch`).
//!
//! Owns: parsing and writing the 61 bytes, and [`check`]. Refuses: what lies after them. Read next: [`super::record`].

use crc_fast::CrcAlgorithm::Crc32Iscsi;

use super::{BatchError, Codec};
use crate::limits::{MAX_BATCH_BYTES, MAX_RECORDS_PER_BATCH};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 61;
/// Bytes in front of those that the batch's length counts: base offset and the length itself.
pub const LENGTH_PREFIX_BYTES: usize = 12;
/// Where the checksummed bytes begin.
pub const CRC_START: usize = 21;
/// The producer id of a batch that has none.
pub const NO_PRODUCER_ID: i64 = -1;
/// The producer epoch of a batch that has none.
pub const NO_PRODUCER_EPOCH: i16 = -1;
/// The sequence of a batch that has none.
pub const NO_SEQUENCE: i32 = -1;
/// The timestamp of a record that has none.
pub const NO_TIMESTAMP: i64 = -1;
/// The leader epoch of a batch that no leader has taken yet.
pub const NO_LEADER_EPOCH: i32 = -1;

/// Byte 16 of this format.
pub const MAGIC: i8 = 2;
const LOG_APPEND_TIME: i16 = 1 << 3;
const TRANSACTIONAL: i16 = 1 << 4;
const CONTROL: i16 = 1 << 5;
const DELETE_HORIZON: i16 = 1 << 6;
/// Attribute bits that have no meaning yet.
pub(super) const RESERVED_ATTRIBUTES: i16 = !0b111_1111;

/// Who set the timestamps of a batch's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TimestampType {
    /// The producer (`CreateTime`).
    #[default]
    Create,
    /// The broker, when it appended: every record has the batch's largest timestamp (`LogAppendTime`).
    LogAppend,
}

impl TimestampType {
    /// The type's name in this project's JSON: `create` or `append`.
    pub const fn name(self) -> &'static str {
        match self {
            TimestampType::Create => "create",
            TimestampType::LogAppend => "append",
        }
    }
}

/// The attribute bits of a batch.
pub(super) fn attributes(codec: Codec, timestamps: TimestampType, transactional: bool, control: bool) -> i16 {
    let bit = |set: bool, bit: i16| if set { bit } else { 0 };
    codec.number()
        | bit(timestamps == TimestampType::LogAppend, LOG_APPEND_TIME)
        | bit(transactional, TRANSACTIONAL)
        | bit(control, CONTROL)
}

/// The header of a batch, every field as it stands in the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record that the batch was written with (compaction may have removed it).
    pub base_offset: i64,
    /// Bytes of the batch after this field: its size less [`LENGTH_PREFIX_BYTES`].
    pub batch_length: i32,
    /// Epoch of the leader that appended the batch, or [`NO_LEADER_EPOCH`].
    pub leader_epoch: i32,
    /// The format: always [`MAGIC`].
    pub magic: i8,
    /// CRC-32C of everything from [`CRC_START`] on.
    pub crc: u32,
    /// Codec and flags; read them with the methods.
    pub attributes: i16,
    /// Offset of the last record that the batch was written with, less the base offset.
    pub last_offset_delta: i32,
    /// What record timestamps count from, in milliseconds since 1970: the first record's, or the delete horizon.
    pub base_timestamp: i64,
    /// Largest timestamp of the records, in milliseconds since 1970.
    pub max_timestamp: i64,
    /// The idempotent producer, or [`NO_PRODUCER_ID`].
    pub producer_id: i64,
    /// The producer's epoch, or [`NO_PRODUCER_EPOCH`].
    pub producer_epoch: i16,
    /// Sequence of the first record, or [`NO_SEQUENCE`].
    pub base_sequence: i32,
    /// Number of records that are there; fewer than offsets in a batch that compaction thinned out, even 0.
    pub record_count: i32,
}

impl BatchHeader {
    /// Reads the header that `bytes` begin with. Checks everything that 61 bytes can tell: format, length, counts and
    /// offsets, but not the checksum ([`check`]), nor that the whole batch is there.
    pub fn parse(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
        let mut rest = bytes;
        let header =
            BatchHeader::take(&mut rest).ok_or(BatchError::Truncated { needed: HEADER_BYTES, have: bytes.len() })?;
        if header.magic != MAGIC {
            return Err(BatchError::Magic(header.magic));
        }
        let smallest = (HEADER_BYTES - LENGTH_PREFIX_BYTES) as i32;
        let largest = (MAX_BATCH_BYTES - LENGTH_PREFIX_BYTES) as i32;
        if !(smallest..=largest).contains(&header.batch_length) {
            return Err(BatchError::Length(header.batch_length));
        }
        let BatchHeader { base_offset, last_offset_delta, record_count, .. } = header;
        if last_offset_delta < 0
            || record_count < 0
            || i64::from(record_count) > i64::from(last_offset_delta) + 1
            || record_count as usize > MAX_RECORDS_PER_BATCH
        {
            return Err(BatchError::Counts { record_count, last_offset_delta });
        }
        if base_offset < 0 || base_offset.checked_add(i64::from(last_offset_delta) + 1).is_none() {
            return Err(BatchError::Offsets { base_offset, last_offset_delta });
        }
        Ok(header)
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut rest = out.as_mut_slice();
        put(&mut rest, self.base_offset.to_be_bytes());
        put(&mut rest, self.batch_length.to_be_bytes());
        put(&mut rest, self.leader_epoch.to_be_bytes());
        put(&mut rest, self.magic.to_be_bytes());
        put(&mut rest, self.crc.to_be_bytes());
        put(&mut rest, self.attributes.to_be_bytes());
        put(&mut rest, self.last_offset_delta.to_be_bytes());
        put(&mut rest, self.base_timestamp.to_be_bytes());
        put(&mut rest, self.max_timestamp.to_be_bytes());
        put(&mut rest, self.producer_id.to_be_bytes());
        put(&mut rest, self.producer_epoch.to_be_bytes());
        put(&mut rest, self.base_sequence.to_be_bytes());
        put(&mut rest, self.record_count.to_be_bytes());
        out
    }

    /// Bytes of the whole batch.
    pub const fn size(&self) -> usize {
        LENGTH_PREFIX_BYTES + self.batch_length as usize
    }

    /// Offset of the last record that the batch was written with.
    pub const fn last_offset(&self) -> i64 {
        self.base_offset + self.last_offset_delta as i64
    }

    /// The offset after the batch.
    pub const fn next_offset(&self) -> i64 {
        self.last_offset() + 1
    }

    /// Sequence of the last record; sequences go on at 0 after [`i32::MAX`]. [`NO_SEQUENCE`] where there is none.
    pub const fn last_sequence(&self) -> i32 {
        match self.base_sequence {
            NO_SEQUENCE => NO_SEQUENCE,
            first => first.wrapping_add(self.last_offset_delta) & i32::MAX,
        }
    }

    /// The codec of the records.
    pub fn codec(&self) -> Result<Codec, BatchError> {
        Codec::from_attributes(self.attributes)
    }

    /// Who set the timestamps.
    pub const fn timestamp_type(&self) -> TimestampType {
        if self.attributes & LOG_APPEND_TIME == 0 { TimestampType::Create } else { TimestampType::LogAppend }
    }

    /// Whether the batch belongs to a transaction.
    pub const fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// Whether the batch holds control records (the end of a transaction, ...), which are never given to a consumer.
    pub const fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    /// Whether the batch comes from an idempotent producer.
    pub const fn is_idempotent(&self) -> bool {
        self.producer_id != NO_PRODUCER_ID
    }

    /// When compaction may remove the batch's tombstones, in milliseconds since 1970; `None` until compaction has seen them.
    pub const fn delete_horizon_ms(&self) -> Option<i64> {
        if self.attributes & DELETE_HORIZON == 0 { None } else { Some(self.base_timestamp) }
    }

    /// The header of the same batch appended at `ms`: timestamp type, largest timestamp and checksum change.
    /// `body` is what follows the header.
    pub fn with_log_append_time(self, ms: i64, body: &[u8]) -> BatchHeader {
        BatchHeader { attributes: self.attributes | LOG_APPEND_TIME, max_timestamp: ms, ..self }.sealed(body)
    }

    /// The header of the same batch sent by this producer: its three fields and the checksum change.
    /// `body` is what follows the header.
    pub fn with_producer(self, id: i64, epoch: i16, base_sequence: i32, body: &[u8]) -> BatchHeader {
        BatchHeader { producer_id: id, producer_epoch: epoch, base_sequence, ..self }.sealed(body)
    }

    /// The header with a delete horizon, which takes the place of the base timestamp. The checksum is not renewed.
    pub(super) fn with_delete_horizon(self, ms: i64) -> BatchHeader {
        BatchHeader { attributes: self.attributes | DELETE_HORIZON, base_timestamp: ms, ..self }
    }

    /// The header with the checksum of itself and `body`.
    pub(super) fn sealed(self, body: &[u8]) -> BatchHeader {
        let mut digest = crc_fast::Digest::new(Crc32Iscsi);
        digest.update(&self.encode()[CRC_START..]);
        digest.update(body);
        BatchHeader { crc: digest.finalize() as u32, ..self }
    }

    fn take(rest: &mut &[u8]) -> Option<BatchHeader> {
        Some(BatchHeader {
            base_offset: i64::from_be_bytes(take(rest)?),
            batch_length: i32::from_be_bytes(take(rest)?),
            leader_epoch: i32::from_be_bytes(take(rest)?),
            magic: i8::from_be_bytes(take(rest)?),
            crc: u32::from_be_bytes(take(rest)?),
            attributes: i16::from_be_bytes(take(rest)?),
            last_offset_delta: i32::from_be_bytes(take(rest)?),
            base_timestamp: i64::from_be_bytes(take(rest)?),
            max_timestamp: i64::from_be_bytes(take(rest)?),
            producer_id: i64::from_be_bytes(take(rest)?),
            producer_epoch: i16::from_be_bytes(take(rest)?),
            base_sequence: i32::from_be_bytes(take(rest)?),
            record_count: i32::from_be_bytes(take(rest)?),
        })
    }
}

/// The CRC-32C that a batch's header should carry: of everything from [`CRC_START`] on.
pub fn crc(batch: &[u8]) -> u32 {
    crc_fast::checksum(Crc32Iscsi, batch.get(CRC_START..).unwrap_or_default()) as u32
}

/// Whether `batch` is one whole batch, not a byte more, with the right checksum.
pub fn check(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = exactly(batch)?;
    let computed = crc(batch);
    if computed != header.crc {
        return Err(BatchError::Crc { stored: header.crc, computed });
    }
    Ok(header)
}

/// The header of `batch`, if it is as long as its header says.
pub(super) fn exactly(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = BatchHeader::parse(batch)?;
    match batch.len() {
        have if have < header.size() => Err(BatchError::Truncated { needed: header.size(), have }),
        have if have > header.size() => Err(BatchError::Length(header.batch_length)),
        _ => Ok(header),
    }
}

/// The batches of a piece of a log, in their order. Each item is the batch's position in the piece, its parsed header and
/// all its bytes; checksums are not looked at. The first offence is the last item, with its position: bytes that end within
/// a batch, as fetched pieces do, are [`BatchError::Truncated`].
#[derive(Debug, Clone)]
pub struct Batches<'a> {
    rest: &'a [u8],
    position: usize,
}

impl<'a> Batches<'a> {
    /// The batches of `bytes`, which begin with one.
    pub fn new(bytes: &'a [u8]) -> Batches<'a> {
        Batches { rest: bytes, position: 0 }
    }

    /// Bytes of the batches that have been returned: where the next one begins.
    pub fn position(&self) -> usize {
        self.position
    }
}

impl<'a> Iterator for Batches<'a> {
    type Item = Result<(usize, BatchHeader, &'a [u8]), (usize, BatchError)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let found = BatchHeader::parse(self.rest).and_then(|header| match self.rest.split_at_checked(header.size()) {
            Some((batch, rest)) => Ok((header, batch, rest)),
            None => Err(BatchError::Truncated { needed: header.size(), have: self.rest.len() }),
        });
        let position = self.position;
        match found {
            Ok((header, batch, rest)) => {
                self.rest = rest;
                self.position += batch.len();
                Some(Ok((position, header, batch)))
            }
            Err(error) => {
                self.rest = &[];
                Some(Err((position, error)))
            }
        }
    }
}

impl std::iter::FusedIterator for Batches<'_> {}

#[inline]
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (front, back) = rest.split_first_chunk::<N>()?;
    *rest = back;
    Some(*front)
}

/// Writes `bytes` to the front of `rest`. The header's fields add up to its size, which `encode`'s test shows.
#[inline]
fn put<const N: usize>(rest: &mut &mut [u8], bytes: [u8; N]) {
    if let Some((front, back)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *front = bytes;
        *rest = back;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> BatchHeader {
        BatchHeader {
            base_offset: 0x0102_0304_0506_0708,
            batch_length: 49,
            leader_epoch: 7,
            magic: MAGIC,
            crc: 0,
            attributes: 0,
            last_offset_delta: 9,
            base_timestamp: 1_700_000_000_000,
            max_timestamp: 1_700_000_000_009,
            producer_id: 42,
            producer_epoch: 3,
            base_sequence: 100,
            record_count: 10,
        }
        .sealed(&[])
    }

    #[test]
    fn bytes_come_back() {
        let bytes = header().encode();
        assert_eq!(bytes[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[57..], [0, 0, 0, 10]);
        assert_eq!(check(&bytes), Ok(header()));
    }

    #[test]
    fn a_flipped_bit_under_the_checksum_is_noticed() {
        for bit in 17 * 8..HEADER_BYTES * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_61_bytes_can_tell_is_told() {
        let parse = |change: fn(&mut BatchHeader)| {
            let mut changed = header();
            change(&mut changed);
            BatchHeader::parse(&changed.encode())
        };
        assert_eq!(BatchHeader::parse(&[0; 60]), Err(BatchError::Truncated { needed: 61, have: 60 }));
        assert_eq!(BatchHeader::parse(&[0; 61]), Err(BatchError::Magic(0)));
        assert_eq!(parse(|h| h.batch_length = 48), Err(BatchError::Length(48)));
        assert_eq!(parse(|h| h.batch_length = -1), Err(BatchError::Length(-1)));
        assert_eq!(parse(|h| h.batch_length = i32::MAX), Err(BatchError::Length(i32::MAX)));
        let counts = |record_count, last_offset_delta| Err(BatchError::Counts { record_count, last_offset_delta });
        assert_eq!(parse(|h| h.record_count = 11), counts(11, 9));
        assert_eq!(parse(|h| h.record_count = -1), counts(-1, 9));
        assert_eq!(parse(|h| h.last_offset_delta = -1), counts(10, -1));
        assert!(parse(|h| h.record_count = 0).is_ok());
        assert!(matches!(parse(|h| h.base_offset = i64::MAX), Err(BatchError::Offsets { .. })));
        assert!(matches!(parse(|h| h.base_offset = -1), Err(BatchError::Offsets { .. })));
        assert!(parse(|h| h.base_offset = i64::MAX - 10).is_ok());
    }

    #[test]
    fn sequences_go_on_at_zero() {
        let last = |base_sequence| BatchHeader { base_sequence, ..header() }.last_sequence();
        assert_eq!((last(0), last(i32::MAX - 9), last(i32::MAX - 8), last(NO_SEQUENCE)), (9, i32::MAX, 0, NO_SEQUENCE));
    }

    #[test]
    fn log_append_time_is_stamped_with_its_checksum() {
        let body = b"records".as_slice();
        let created = BatchHeader { batch_length: 49 + 7, ..header() }.sealed(body);
        let stamped = created.with_log_append_time(5, body);
        assert_eq!((stamped.timestamp_type(), stamped.max_timestamp), (TimestampType::LogAppend, 5));
        assert_eq!(check(&[stamped.encode().as_slice(), body].concat()), Ok(stamped));
    }

    #[test]
    fn batches_stop_at_the_first_offence_and_tell_its_position() {
        let one = header().encode();
        let mut bytes = [one, one].concat();
        bytes.extend_from_slice(&one[..40]);
        let mut batches = Batches::new(&bytes);
        assert_eq!(batches.next(), Some(Ok((0, header(), one.as_slice()))));
        assert_eq!(batches.next(), Some(Ok((61, header(), one.as_slice()))));
        assert_eq!(batches.next(), Some(Err((122, BatchError::Truncated { needed: 61, have: 40 }))));
        assert_eq!((batches.next(), batches.position()), (None, 122));
    }
}
