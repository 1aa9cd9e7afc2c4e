//! The codecs of record batches, each in the framing that Kafka gives it.
//!
//! | codec | what is written | what is read |
//! | --- | --- | --- |
//! | gzip | one member | members one after another |
//! | snappy | xerial's framing: a 16-byte header, then blocks of 32 KiB, each with its length | that (repeated headers too), and one bare block |
//! | lz4 | one frame: independent 64 KiB blocks, no checksums of content or blocks | one frame of any block size, mode and checksums, with its end mark, no dictionary |
//! | zstd | one frame with its content size | frames one after another, windows of up to 128 MiB (zstd's own limit) |
//!
//! Owns: compressing, and decompressing as a stream that stops at a limit: memory follows what was really decompressed,
//! never a number that a frame claims. Refuses: records (bytes in, bytes out). Read next: [`mod@super::walk`].

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read, Write};

use flate2::bufread::MultiGzDecoder;
use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use zstd::zstd_safe;

use super::BatchError;

/// How a batch's records are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// Not at all.
    #[default]
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// Snappy, in xerial's framing.
    Snappy,
    /// The LZ4 frame format.
    Lz4,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// The text names no codec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: expected none, gzip, snappy, lz4 or zstd")]
pub struct UnknownCodecName(String);

impl Codec {
    /// Every codec, by its number.
    pub const ALL: [Codec; 5] = [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd];

    /// The codec's name, Kafka's `compression.type`.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::None => "none",
            Codec::Gzip => "gzip",
            Codec::Snappy => "snappy",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        }
    }

    /// The codec of a batch with these attributes; an error for a number without meaning.
    pub fn from_attributes(attributes: i16) -> Result<Codec, BatchError> {
        let number = attributes & 0b111;
        Codec::from_number(number).ok_or(BatchError::UnknownCodec(number as u8))
    }

    /// The codec's number, in the lowest three attribute bits of a batch.
    pub const fn number(self) -> i16 {
        match self {
            Codec::None => 0,
            Codec::Gzip => 1,
            Codec::Snappy => 2,
            Codec::Lz4 => 3,
            Codec::Zstd => 4,
        }
    }

    const fn from_number(number: i16) -> Option<Codec> {
        match number {
            0 => Some(Codec::None),
            1 => Some(Codec::Gzip),
            2 => Some(Codec::Snappy),
            3 => Some(Codec::Lz4),
            4 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Codec {
    type Err = UnknownCodecName;

    fn from_str(text: &str) -> Result<Codec, UnknownCodecName> {
        Codec::ALL.into_iter().find(|codec| codec.name() == text).ok_or_else(|| UnknownCodecName(text.into()))
    }
}

/// gzip's default level.
const DEFAULT_GZIP_LEVEL: u32 = 6;
/// What `0` means to zstd: its default level, 3.
const DEFAULT_ZSTD_LEVEL: i32 = 0;
/// Uncompressed bytes of one snappy block that we write, xerial's default.
const SNAPPY_BLOCK_BYTES: usize = 32 << 10;
/// Xerial's header: magic, version 1, oldest compatible version 1.
const XERIAL_HEADER: [u8; 16] = *b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
/// The part of it by which it is known; versions are not compared, as Kafka does not.
const XERIAL_MAGIC: [u8; 8] = *b"\x82SNAPPY\0";
/// Snappy's densest element yields 64 bytes from 3, so a block that claims more than this times its size lies.
const SNAPPY_LARGEST_RATIO: usize = 22;
/// Decompressed bytes that are looked at in one piece.
const PIECE_BYTES: usize = 64 << 10;
/// Decompressed bytes that are reserved ahead for each compressed one.
const EXPECTED_RATIO: usize = 4;

/// Appends `data`, compressed, to `out`. `level` is gzip's (0 to 9; below 0 its default, as Kafka's -1) or zstd's; the
/// others have none. A level beyond the codec's range means its nearest end.
pub fn compress(codec: Codec, level: Option<i32>, data: &[u8], out: &mut Vec<u8>) -> Result<(), BatchError> {
    let done = match codec {
        Codec::None => out.write_all(data),
        Codec::Gzip => compress_gzip(level, data, out),
        Codec::Snappy => compress_snappy(data, out),
        Codec::Lz4 => compress_lz4(data, out),
        Codec::Zstd => compress_zstd(level, data, out),
    };
    done.map_err(|error| BatchError::Compression { codec, reason: error.to_string() })
}

/// All of `data`, decompressed; [`BatchError::TooLarge`] once it passes `limit` bytes.
pub fn decompress(codec: Codec, data: &[u8], limit: usize) -> Result<Vec<u8>, BatchError> {
    with_reader(codec, data, limit, |reader| {
        let mut out = Vec::with_capacity(data.len().saturating_mul(EXPECTED_RATIO).min(limit));
        reader.take(limit as u64 + 1).read_to_end(&mut out).map_err(|error| failed(codec, &error))?;
        if out.len() > limit { Err(BatchError::TooLarge { limit }) } else { Ok(out) }
    })
}

/// Gives `read` what `data` decompresses to, piece by piece. Only snappy needs `limit`, for the size of a block; `read`
/// counts what it takes.
pub(super) fn with_reader<T>(
    codec: Codec,
    data: &[u8],
    limit: usize,
    read: impl FnOnce(&mut dyn BufRead) -> Result<T, BatchError>,
) -> Result<T, BatchError> {
    thread_local! {
        /// Setting one up costs more than decompressing a small batch. It keeps its window from use to use, and zstd
        /// itself lets an oversized one go.
        static ZSTD: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
    }
    match codec {
        Codec::None => read(&mut { data }),
        Codec::Gzip => read(&mut BufReader::with_capacity(PIECE_BYTES, MultiGzDecoder::new(data))),
        Codec::Snappy => read(&mut SnappyReader::new(data, limit)),
        Codec::Lz4 => read(&mut Lz4Reader { frame: FrameDecoder::new(Exhaustible(data)), ended: false }),
        Codec::Zstd => ZSTD.with_borrow_mut(|context| {
            let decoder = zstd::stream::read::Decoder::with_context(data, context);
            read(&mut BufReader::with_capacity(PIECE_BYTES, decoder))
        }),
    }
}

/// The error of a batch whose decompression failed.
pub(super) fn failed(codec: Codec, error: &io::Error) -> BatchError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<BatchError>()) {
        Some(error) => error.clone(),
        None => BatchError::Decompression { codec, reason: error.to_string() },
    }
}

fn compress_gzip(level: Option<i32>, data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let level = level.and_then(|level| u32::try_from(level).ok()).map_or(DEFAULT_GZIP_LEVEL, |level| level.min(9));
    let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::new(level));
    encoder.write_all(data)?;
    encoder.finish().map(drop)
}

fn compress_snappy(data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let mut encoder = snap::raw::Encoder::new();
    out.extend_from_slice(&XERIAL_HEADER);
    let mut block = vec![0; snap::raw::max_compress_len(SNAPPY_BLOCK_BYTES.min(data.len()))];
    for piece in data.chunks(SNAPPY_BLOCK_BYTES) {
        let length = encoder.compress(piece, &mut block)?;
        out.extend_from_slice(&(length as u32).to_be_bytes());
        out.extend_from_slice(&block[..length]);
    }
    Ok(())
}

fn compress_lz4(data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let frame = FrameInfo::new().block_size(BlockSize::Max64KB).block_mode(BlockMode::Independent);
    let mut encoder = FrameEncoder::with_frame_info(frame, out);
    encoder.write_all(data)?;
    encoder.finish().map(drop).map_err(io::Error::from)
}

fn compress_zstd(level: Option<i32>, data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    thread_local! {
        /// Its tables are as large as a batch; a producer keeps to one level, so it is set up once.
        static ZSTD: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    }
    let range = zstd::compression_level_range();
    let level = level.map_or(DEFAULT_ZSTD_LEVEL, |level| level.clamp(*range.start(), *range.end()));
    ZSTD.with_borrow_mut(|kept| {
        let compressor = match kept {
            Some((kept_level, compressor)) if *kept_level == level => compressor,
            _ => &mut kept.insert((level, zstd::bulk::Compressor::new(level)?)).1,
        };
        let start = out.len();
        out.resize(start + zstd_safe::compress_bound(data.len()), 0);
        let length = compressor.compress_to_buffer(data, &mut out[start..])?;
        out.truncate(start + length);
        Ok(())
    })
}

/// Reads the blocks of a snappy stream, xerial's or bare.
struct SnappyReader<'a> {
    rest: &'a [u8],
    bare: bool,
    limit: usize,
    block: Vec<u8>,
    taken: usize,
}

impl<'a> SnappyReader<'a> {
    fn new(data: &'a [u8], limit: usize) -> SnappyReader<'a> {
        SnappyReader { rest: data, bare: !data.starts_with(&XERIAL_MAGIC), limit, block: Vec::new(), taken: 0 }
    }

    /// The next compressed block; `None` at the end.
    fn next_block(&mut self) -> io::Result<Option<&'a [u8]>> {
        if self.bare {
            return Ok(Some(std::mem::take(&mut self.rest)).filter(|block| !block.is_empty()));
        }
        while self.rest.starts_with(&XERIAL_MAGIC) {
            self.rest = self.rest.get(XERIAL_HEADER.len()..).ok_or_else(|| invalid("the header is cut short"))?;
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (length, rest) = self.rest.split_first_chunk().ok_or_else(|| invalid("a block's length is cut short"))?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let (block, rest) = rest.split_at_checked(length).ok_or_else(|| invalid("a block is cut short"))?;
        self.rest = rest;
        Ok(Some(block))
    }
}

impl BufRead for SnappyReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.taken == self.block.len() {
            let Some(compressed) = self.next_block()? else { break };
            let length = snap::raw::decompress_len(compressed)?;
            if length > compressed.len().saturating_mul(SNAPPY_LARGEST_RATIO) {
                return Err(invalid("a block claims more than it can hold"));
            }
            if length > self.limit {
                return Err(io::Error::other(BatchError::TooLarge { limit: self.limit }));
            }
            self.block.resize(length, 0);
            snap::raw::Decoder::new().decompress(compressed, &mut self.block)?;
            self.taken = 0;
        }
        Ok(&self.block[self.taken..])
    }

    fn consume(&mut self, bytes: usize) {
        self.taken = self.block.len().min(self.taken + bytes);
    }
}

impl Read for SnappyReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// Reads one LZ4 frame and insists on its end mark, without which Kafka's reader fails.
struct Lz4Reader<'a> {
    frame: FrameDecoder<Exhaustible<'a>>,
    ended: bool,
}

impl BufRead for Lz4Reader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.ended {
            return Ok(&[]);
        }
        // Asked twice, because what the first call returns cannot be both looked at and returned.
        if self.frame.fill_buf()?.is_empty() {
            self.ended = true;
            if !self.frame.get_ref().0.is_empty() {
                return Err(invalid("bytes follow the end of the frame"));
            }
            return Ok(&[]);
        }
        self.frame.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.frame.consume(bytes);
    }
}

impl Read for Lz4Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// Bytes whose end is an error: the frame decoder takes an ordinary end where a block should begin for the end of the frame.
struct Exhaustible<'a>(&'a [u8]);

impl Read for Exhaustible<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self.0.read(out)? {
            0 if !out.is_empty() => Err(invalid("the frame is cut short")),
            length => Ok(length),
        }
    }
}

fn read_buffered(reader: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
    let length = reader.fill_buf()?.read(out)?;
    reader.consume(length);
    Ok(length)
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
