//! Record batches, format v2: the one form that records have on the wire and on disk, byte for byte Kafka's.
//!
//! Owns: the 61-byte header and its checksum ([`header`]), records inside a batch ([`record`]), the four codecs
//! ([`compression`]), writing batches ([`builder`]), what a broker asks of a batch that it takes in ([`mod@walk`]), and the
//! records of control batches ([`control`]). Refuses: I/O, clocks, and trust. Every byte here may come from a stranger or
//! from a failing disk: an offence is a [`BatchError`], never a panic, and nothing is allocated on the word of a length
//! that was not compared with a limit. Read next: [`header`].

pub mod builder;
pub mod compression;
pub mod control;
mod error;
pub mod header;
pub mod record;
pub mod varint;
pub mod walk;

pub use builder::{BatchBuilder, BuildOptions, rebuild};
pub use compression::Codec;
pub use error::{BatchError, RecordFault};
pub use header::{
    BatchHeader, Batches, HEADER_BYTES, LENGTH_PREFIX_BYTES, NO_PRODUCER_EPOCH, NO_PRODUCER_ID, NO_SEQUENCE,
    NO_TIMESTAMP, TimestampType, check, crc,
};
pub use record::{Header, Record, Records};
pub use walk::{Origin, Walk, WalkRules, walk};
