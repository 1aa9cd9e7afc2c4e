//! Walking a batch: what a broker asks of every batch that it takes in, compressed ones too.
//!
//! It goes from length to length without building records: no allocation per record, and of a compressed batch one piece
//! at a time, so that neither a large batch nor a lying one costs memory. It runs on every batch that is produced; off the
//! I/O threads, because decompressing burns the CPU.
//!
//! Owns: checksum, counts, offset deltas, lengths to the last byte, the range of timestamps, keys, and what only a log may
//! hold. Refuses: sizes (`max.message.bytes`) and sequences, which are the log's. Read next: the broker's produce path.

use std::io::BufRead;

use super::compression::{failed, with_reader};
use super::header::RESERVED_ATTRIBUTES;
use super::record::{header_count, length, nullable_length};
use super::varint::{decode_i32, decode_i64, take_byte};
use super::{BatchError, BatchHeader, Codec, HEADER_BYTES, NO_TIMESTAMP, RecordFault, TimestampType, check};
use crate::limits::MAX_DECOMPRESSED_BATCH_BYTES;

/// Where a batch comes from, which decides what it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Origin {
    /// A producer sent it: offsets without gaps, create time, no control records, transactions or delete horizons.
    #[default]
    Producer,
    /// A log holds it: compaction may have thinned it out, and every flag is legal.
    Log,
}

/// What is asked of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalkRules {
    /// Where the batch comes from.
    pub origin: Origin,
    /// Whether every record must have a key, as in a compacted topic.
    pub require_keys: bool,
    /// Most bytes that the records may have once decompressed. Raising it costs time, not memory.
    pub max_decompressed_bytes: usize,
}

impl Default for WalkRules {
    fn default() -> WalkRules {
        WalkRules {
            origin: Origin::Producer,
            require_keys: false,
            max_decompressed_bytes: MAX_DECOMPRESSED_BATCH_BYTES,
        }
    }
}

/// What a walk found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walk {
    /// The batch's header.
    pub header: BatchHeader,
    /// Largest timestamp of the records, in milliseconds since 1970; -1 without records or timestamps.
    pub max_timestamp: i64,
    /// Offset of the first record with that timestamp, less the base offset.
    pub offset_of_max_timestamp_delta: i32,
    /// Smallest timestamp of the records that have one of their own.
    pub min_timestamp: Option<i64>,
}

/// Checks `batch`, one whole batch, to the last byte. Begins with [`check`], so that a broker needs no other call.
pub fn walk(batch: &[u8], rules: WalkRules) -> Result<Walk, BatchError> {
    let header = check(batch)?;
    let codec = header.codec()?;
    if rules.origin == Origin::Producer {
        refuse_foreign(&header)?;
    }
    let body = batch.get(HEADER_BYTES..).unwrap_or_default();
    let mut progress = Progress {
        header: &header,
        from_producer: rules.origin == Origin::Producer,
        require_keys: rules.require_keys && !header.is_control(),
        next_delta: 0,
        max_timestamp: NO_TIMESTAMP,
        delta_of_max: 0,
        min_timestamp: None,
    };
    match codec {
        Codec::None => progress.walk_bytes(body)?,
        _ if header.record_count == 0 && body.is_empty() => {}
        codec => with_reader(codec, body, rules.max_decompressed_bytes, |reader| {
            let mut stream =
                Stream { reader, codec, left: rules.max_decompressed_bytes, limit: rules.max_decompressed_bytes };
            progress.walk_stream(&mut stream)
        })?,
    }
    progress.finish()
}

/// What a producer may not send, however well formed.
fn refuse_foreign(header: &BatchHeader) -> Result<(), BatchError> {
    let refuse = |what| Err(BatchError::NotForProducers(what));
    if header.record_count == 0 {
        return refuse("a batch without records");
    }
    if i64::from(header.record_count) != i64::from(header.last_offset_delta) + 1 {
        return Err(BatchError::Counts {
            record_count: header.record_count,
            last_offset_delta: header.last_offset_delta,
        });
    }
    if header.is_control() {
        return refuse("control records");
    }
    if header.is_transactional() {
        return refuse("transactional records: there are no transactions");
    }
    if header.timestamp_type() == TimestampType::LogAppend {
        return refuse("a batch that claims the broker's append time");
    }
    if header.delete_horizon_ms().is_some() {
        return refuse("a batch with a delete horizon");
    }
    if header.attributes & RESERVED_ATTRIBUTES != 0 {
        return refuse("attributes that have no meaning");
    }
    let has_sequence = header.producer_epoch >= 0 && header.base_sequence >= 0;
    if header.producer_id < -1 || (header.is_idempotent() && !has_sequence) {
        return refuse("a producer id without epoch and sequence");
    }
    Ok(())
}

/// What a walk knows so far.
struct Progress<'h> {
    header: &'h BatchHeader,
    from_producer: bool,
    require_keys: bool,
    next_delta: i32,
    max_timestamp: i64,
    delta_of_max: i32,
    min_timestamp: Option<i64>,
}

impl Progress<'_> {
    fn walk_bytes(&mut self, mut input: &[u8]) -> Result<(), BatchError> {
        for index in 0..self.header.record_count as u32 {
            self.record_in(&mut input).map_err(|fault| BatchError::Record { index, fault })?;
        }
        if input.is_empty() { Ok(()) } else { Err(self.trailing()) }
    }

    fn walk_stream(&mut self, stream: &mut Stream<'_>) -> Result<(), BatchError> {
        let mut index = 0;
        let record_count = self.header.record_count as u32;
        while index < record_count {
            // First all records that lie whole in the piece at hand, then the one that crosses into the next.
            let piece = stream.piece()?;
            let mut input = piece;
            while index < record_count && holds_record(input) {
                self.record_in(&mut input).map_err(|fault| BatchError::Record { index, fault })?;
                index += 1;
            }
            let walked = piece.len() - input.len();
            stream.consume(walked);
            if index < record_count {
                self.record_across(stream).map_err(|fault| fault.at(index))?;
                index += 1;
            }
        }
        if stream.piece()?.is_empty() { Ok(()) } else { Err(self.trailing()) }
    }

    /// Walks one record that lies whole in `input`.
    #[inline]
    fn record_in(&mut self, input: &mut &[u8]) -> Result<(), RecordFault> {
        let length = length(decode_i32(|| take_byte(input))?)?;
        let (mut body, rest) = input.split_at_checked(length).ok_or(RecordFault::Truncated)?;
        *input = rest;
        match self.fields(&mut body) {
            Ok(()) if body.is_empty() => Ok(()),
            Ok(()) | Err(RecordFault::Truncated) => Err(RecordFault::Length),
            Err(fault) => Err(fault),
        }
    }

    /// Walks one record of which only a part has been decompressed.
    fn record_across(&mut self, stream: &mut Stream<'_>) -> Result<(), Fault> {
        let length = length(decode_i32(|| stream.byte())?)?;
        let mut body = Within { stream, left: length };
        self.fields(&mut body)?;
        if body.left == 0 { Ok(()) } else { Err(RecordFault::Length.into()) }
    }

    #[inline]
    fn fields<S: Source>(&mut self, source: &mut S) -> Result<(), S::Error> {
        source.skip(1)?; // attributes, unused
        let timestamp_delta = decode_i64(|| source.byte())?;
        let offset_delta = decode_i32(|| source.byte())?;
        self.take(timestamp_delta, offset_delta)?;
        match nullable_length(decode_i32(|| source.byte())?)? {
            Some(length) => source.skip(length)?,
            None if self.require_keys => return Err(RecordFault::MissingKey.into()),
            None => {}
        }
        let value = nullable_length(decode_i32(|| source.byte())?)?;
        source.skip(value.unwrap_or(0))?;
        for _ in 0..header_count(decode_i32(|| source.byte())?)? {
            let key = length(decode_i32(|| source.byte())?)?;
            source.skip(key)?;
            let value = nullable_length(decode_i32(|| source.byte())?)?;
            source.skip(value.unwrap_or(0))?;
        }
        Ok(())
    }

    #[inline]
    fn take(&mut self, timestamp_delta: i64, offset_delta: i32) -> Result<(), RecordFault> {
        let expected = self.next_delta;
        if offset_delta < expected
            || offset_delta > self.header.last_offset_delta
            || (self.from_producer && offset_delta != expected)
        {
            return Err(RecordFault::OffsetDelta { expected, found: offset_delta });
        }
        // At most i32::MAX, after which no further record can pass the comparison above.
        self.next_delta = offset_delta.saturating_add(1);
        let timestamp = match self.header.base_timestamp.checked_add(timestamp_delta) {
            Some(timestamp) if timestamp >= NO_TIMESTAMP || !self.from_producer => timestamp,
            _ => return Err(RecordFault::Timestamp(timestamp_delta)),
        };
        if timestamp > self.max_timestamp {
            self.max_timestamp = timestamp;
            self.delta_of_max = offset_delta;
        }
        if timestamp != NO_TIMESTAMP {
            self.min_timestamp = Some(self.min_timestamp.map_or(timestamp, |smallest| smallest.min(timestamp)));
        }
        Ok(())
    }

    fn finish(self) -> Result<Walk, BatchError> {
        let header = *self.header;
        // Compaction leaves an emptied batch its largest timestamp; the broker's own append time is nobody's record's.
        if header.timestamp_type() == TimestampType::LogAppend || header.record_count == 0 {
            let max_timestamp = header.max_timestamp;
            return Ok(Walk { header, max_timestamp, offset_of_max_timestamp_delta: 0, min_timestamp: None });
        }
        if self.max_timestamp != header.max_timestamp {
            return Err(BatchError::MaxTimestamp { stored: header.max_timestamp, found: self.max_timestamp });
        }
        Ok(Walk {
            header,
            max_timestamp: self.max_timestamp,
            offset_of_max_timestamp_delta: self.delta_of_max,
            min_timestamp: self.min_timestamp,
        })
    }

    fn trailing(&self) -> BatchError {
        BatchError::TrailingBytes { record_count: self.header.record_count }
    }
}

/// Whether a whole record lies at the front. A length that is no length is for the record's own walk to refuse.
#[inline]
fn holds_record(mut input: &[u8]) -> bool {
    match decode_i32(|| take_byte(&mut input)) {
        Ok(length) => usize::try_from(length).is_ok_and(|length| length <= input.len()),
        Err(RecordFault::Truncated) => false,
        Err(_) => true,
    }
}

/// Bytes that are gone through one field after another.
trait Source {
    type Error: From<RecordFault>;

    fn byte(&mut self) -> Result<u8, Self::Error>;
    fn skip(&mut self, bytes: usize) -> Result<(), Self::Error>;
}

impl Source for &[u8] {
    type Error = RecordFault;

    #[inline]
    fn byte(&mut self) -> Result<u8, RecordFault> {
        take_byte(self)
    }

    #[inline]
    fn skip(&mut self, bytes: usize) -> Result<(), RecordFault> {
        *self = self.get(bytes..).ok_or(RecordFault::Truncated)?;
        Ok(())
    }
}

/// Why a record that comes out of a decompressor cannot be walked.
enum Fault {
    Record(RecordFault),
    Batch(BatchError),
}

impl Fault {
    fn at(self, index: u32) -> BatchError {
        match self {
            Fault::Record(fault) => BatchError::Record { index, fault },
            Fault::Batch(error) => error,
        }
    }
}

impl From<RecordFault> for Fault {
    fn from(fault: RecordFault) -> Fault {
        Fault::Record(fault)
    }
}

impl From<BatchError> for Fault {
    fn from(error: BatchError) -> Fault {
        Fault::Batch(error)
    }
}

/// Decompressed bytes, of which one piece is in memory.
struct Stream<'r> {
    reader: &'r mut dyn BufRead,
    codec: Codec,
    /// Bytes that may still come.
    left: usize,
    limit: usize,
}

impl Stream<'_> {
    /// The piece at hand; empty at the end.
    fn piece(&mut self) -> Result<&[u8], BatchError> {
        let (codec, limit, left) = (self.codec, self.limit, self.left);
        let piece = self.reader.fill_buf().map_err(|error| failed(codec, &error))?;
        if piece.len() > left { Err(BatchError::TooLarge { limit }) } else { Ok(piece) }
    }

    /// Goes past bytes of the piece at hand.
    fn consume(&mut self, bytes: usize) {
        self.left = self.left.saturating_sub(bytes);
        self.reader.consume(bytes);
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        let byte = *self.piece()?.first().ok_or(RecordFault::Truncated)?;
        self.consume(1);
        Ok(byte)
    }
}

/// One record's part of the stream.
struct Within<'s, 'r> {
    stream: &'s mut Stream<'r>,
    left: usize,
}

impl Source for Within<'_, '_> {
    type Error = Fault;

    fn byte(&mut self) -> Result<u8, Fault> {
        self.left = self.left.checked_sub(1).ok_or(RecordFault::Length)?;
        self.stream.byte()
    }

    fn skip(&mut self, mut bytes: usize) -> Result<(), Fault> {
        self.left = self.left.checked_sub(bytes).ok_or(RecordFault::Length)?;
        while bytes > 0 {
            let step = self.stream.piece()?.len().min(bytes);
            if step == 0 {
                return Err(RecordFault::Truncated.into());
            }
            self.stream.consume(step);
            bytes -= step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
