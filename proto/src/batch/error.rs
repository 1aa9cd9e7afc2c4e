//! What can be wrong with a batch.
//!
//! Owns: the facts, each small enough to be compared in a test, and their wire codes. Refuses: places (whoever knows the
//! file, the position or the peer adds it). Read next: [`super::header`].

use super::Codec;
use crate::ErrorCode;

/// Why bytes are no batch, or no batch that may be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// The bytes end before the batch does.
    #[error("batch is cut short: {needed} bytes needed, {have} there")]
    Truncated {
        /// Bytes that the batch needs, as far as is known.
        needed: usize,
        /// Bytes that are there.
        have: usize,
    },
    /// The batch's length is smaller than a header or larger than a batch may be.
    #[error("batch length {0} is impossible")]
    Length(i32),
    /// Another format than v2.
    #[error("batch has magic {0}; only 2 is read")]
    Magic(i8),
    /// The checksum does not fit the bytes.
    #[error("batch checksum is {computed:#010x} where the header says {stored:#010x}")]
    Crc {
        /// The checksum in the header.
        stored: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The counts contradict each other: more records than offsets, or a number that cannot be.
    #[error("batch counts are impossible: {record_count} records within {last_offset_delta} + 1 offsets")]
    Counts {
        /// Number of records that the header claims.
        record_count: i32,
        /// Last offset of the batch less its base offset.
        last_offset_delta: i32,
    },
    /// The offsets are negative or pass the largest number.
    #[error("batch offsets are impossible: base offset {base_offset} and {last_offset_delta} more")]
    Offsets {
        /// The batch's first offset.
        base_offset: i64,
        /// Last offset of the batch less its base offset.
        last_offset_delta: i32,
    },
    /// The codec's number has no meaning.
    #[error("batch is compressed with unknown codec {0}")]
    UnknownCodec(u8),
    /// The compressed bytes cannot be decompressed.
    #[error("batch cannot be decompressed ({codec}): {reason}")]
    Decompression {
        /// The codec that the header names.
        codec: Codec,
        /// The codec's own words.
        reason: String,
    },
    /// The batch could not be compressed.
    #[error("batch cannot be compressed ({codec}): {reason}")]
    Compression {
        /// The codec that was asked for.
        codec: Codec,
        /// The codec's own words.
        reason: String,
    },
    /// The batch is larger than allowed, as it lies or once decompressed.
    #[error("batch is larger than {limit} bytes")]
    TooLarge {
        /// The limit that was passed, in bytes.
        limit: usize,
    },
    /// A record inside the batch is wrong.
    #[error("record {index} of the batch: {fault}")]
    Record {
        /// Which record, counted from 0.
        index: u32,
        /// What is wrong with it.
        fault: RecordFault,
    },
    /// Bytes are left over after the last record.
    #[error("bytes are left over after the last of the batch's {record_count} records")]
    TrailingBytes {
        /// Number of records that the header claims.
        record_count: i32,
    },
    /// The header's largest timestamp is not that of the records.
    #[error("batch says its largest timestamp is {stored}, its records say {found}")]
    MaxTimestamp {
        /// The largest timestamp in the header, in milliseconds since 1970.
        stored: i64,
        /// The largest timestamp of the records, in milliseconds since 1970.
        found: i64,
    },
    /// The batch is well formed, and not for producers to send.
    #[error("a producer may not send {0}")]
    NotForProducers(&'static str),
    /// A batch without records was to be built.
    #[error("a batch needs at least one record")]
    Empty,
    /// The records to keep do not belong to the batch, or are out of order.
    #[error("record at offset {offset} does not belong here: the batch goes from {base_offset} to {last_offset}")]
    ForeignRecord {
        /// The record's offset.
        offset: i64,
        /// The batch's first offset.
        base_offset: i64,
        /// The batch's last offset.
        last_offset: i64,
    },
    /// The key or value of a control record is too short or of an unknown version.
    #[error("control record is malformed")]
    ControlRecord,
}

/// What is wrong with one record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordFault {
    /// The batch's bytes end before the record does.
    #[error("the batch ends before it")]
    Truncated,
    /// A variable-length number is longer than its type.
    #[error("a variable-length number is too long")]
    Varint,
    /// A length is negative where it cannot be, or its parts do not add up to it.
    #[error("its lengths do not add up")]
    Length,
    /// More headers than a record may have.
    #[error("it has {0} headers")]
    Headers(i32),
    /// The offset is not the one that the record must have.
    #[error("its offset delta is {found} where {expected} or more must stand")]
    OffsetDelta {
        /// The delta that the record must have, or the smallest it may have.
        expected: i32,
        /// The delta it has.
        found: i32,
    },
    /// The timestamp passes the largest number.
    #[error("its timestamp delta {0} leaves the range of timestamps")]
    Timestamp(i64),
    /// No key, where the topic asks for one.
    #[error("it has no key, and the topic is compacted")]
    MissingKey,
}

impl BatchError {
    /// The wire code with which a broker refuses such a batch.
    pub fn code(&self) -> ErrorCode {
        match self {
            BatchError::TooLarge { .. } => ErrorCode::MessageTooLarge,
            BatchError::UnknownCodec(_) => ErrorCode::UnsupportedCompression,
            BatchError::Magic(_) => ErrorCode::UnsupportedVersion,
            BatchError::NotForProducers(_)
            | BatchError::Empty
            | BatchError::ForeignRecord { .. }
            | BatchError::Record { fault: RecordFault::MissingKey, .. } => ErrorCode::InvalidRecord,
            BatchError::MaxTimestamp { .. } | BatchError::Record { fault: RecordFault::Timestamp(_), .. } => {
                ErrorCode::InvalidTimestamp
            }
            BatchError::Compression { .. } => ErrorCode::Internal,
            BatchError::Truncated { .. }
            | BatchError::Length(_)
            | BatchError::Crc { .. }
            | BatchError::Counts { .. }
            | BatchError::Offsets { .. }
            | BatchError::Decompression { .. }
            | BatchError::Record { .. }
            | BatchError::TrailingBytes { .. }
            | BatchError::ControlRecord => ErrorCode::CorruptBatch,
        }
    }

    /// Whether the same batch may pass later: never, its bytes are what is wrong.
    pub const fn retryable(&self) -> bool {
        false
    }
}
