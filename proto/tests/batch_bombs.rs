//! Bombs: batches that decompress to far more than they may. Alone in its binary, because it looks at the memory of the
//! whole process.

use std::io::Write;

use bytes::Bytes;
use headwater_proto::batch::{self, BatchError, BatchHeader, Codec, Record, Records, WalkRules, walk};
use lz4_flex::frame::{BlockSize, FrameEncoder, FrameInfo};

const LIMIT: usize = 1 << 20;

/// Writes one record whose value is `length` zeros, never holding it whole.
fn write_zeros(out: &mut dyn Write, length: usize) {
    let mut front = Vec::new();
    // Attributes, timestamp delta, offset delta, null key; then the value, and no headers.
    let mut fields = vec![0, 0, 0, 1];
    batch::varint::write_i32(&mut fields, length as i32);
    batch::varint::write_i32(&mut front, (fields.len() + length + 1) as i32);
    front.extend_from_slice(&fields);
    out.write_all(&front).unwrap();
    let zeros = vec![0; 1 << 20];
    let mut left = length + 1;
    while left > 0 {
        let step = left.min(zeros.len());
        out.write_all(&zeros[..step]).unwrap();
        left -= step;
    }
}

/// The same record in xerial's snappy, one block at a time.
struct SnappyBlocks(Vec<u8>);

impl Write for SnappyBlocks {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let block = snap::raw::Encoder::new().compress_vec(data).map_err(std::io::Error::other)?;
        self.0.extend_from_slice(&(block.len() as u32).to_be_bytes());
        self.0.extend_from_slice(&block);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A batch of one record of so many zeros.
fn bomb(codec: Codec, length: usize) -> Bytes {
    let body = match codec {
        Codec::None => unreachable!("a bomb is compressed"),
        Codec::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            write_zeros(&mut encoder, length);
            encoder.finish().unwrap()
        }
        Codec::Snappy => {
            let mut blocks = SnappyBlocks(b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01".to_vec());
            write_zeros(&mut blocks, length);
            blocks.0
        }
        Codec::Lz4 => {
            let frame = FrameInfo::new().block_size(BlockSize::Max4MB);
            let mut encoder = FrameEncoder::with_frame_info(frame, Vec::new());
            write_zeros(&mut encoder, length);
            encoder.finish().unwrap()
        }
        Codec::Zstd => {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            write_zeros(&mut encoder, length);
            encoder.finish().unwrap()
        }
    };
    seal(codec, &body)
}

fn seal(codec: Codec, body: &[u8]) -> Bytes {
    let header = BatchHeader {
        base_offset: 0,
        batch_length: 49 + body.len() as i32,
        leader_epoch: -1,
        magic: 2,
        crc: 0,
        attributes: codec.number(),
        last_offset_delta: 0,
        base_timestamp: 5,
        max_timestamp: 5,
        producer_id: -1,
        producer_epoch: -1,
        base_sequence: -1,
        record_count: 1,
    };
    let mut bytes = [header.encode().as_slice(), body].concat();
    let crc = batch::crc(&bytes);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

/// Most memory that this process ever held, in bytes, where the system says.
fn peak_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok().map(|kib| kib << 10)
}

#[test]
fn a_bomb_costs_no_more_memory_than_the_limit() {
    let small = LIMIT / 2;
    for codec in [Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
        let harmless = bomb(codec, small);
        assert!(walk(&harmless, WalkRules::default()).is_ok(), "{codec}");
        let value = Some(Bytes::from(vec![0; small]));
        let record = Record { offset: 0, timestamp: 5, key: None, value, headers: Vec::new() };
        assert_eq!(Records::new(&harmless).unwrap().collect::<Vec<_>>(), [Ok(record)]);
        assert!(harmless.len() < small / 15, "{codec}");
    }
    for codec in [Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
        let bomb = bomb(codec, 400 << 20);
        let before = peak_bytes();
        let rules = WalkRules::default();
        let limit = rules.max_decompressed_bytes;
        assert_eq!(walk(&bomb, rules), Err(BatchError::TooLarge { limit }), "{codec}");
        let refused = Records::with_limit(&bomb, LIMIT).map(drop);
        assert_eq!(refused, Err(BatchError::TooLarge { limit: LIMIT }), "{codec}");
        if let (Some(before), Some(after)) = (before, peak_bytes()) {
            let grown = after - before;
            assert!(grown < 48 << 20, "{codec}: {grown} bytes more in memory");
        }
    }
    // One bare snappy block cannot be read in pieces; it is refused by its own length, before there is room for it.
    let mut block = vec![0x80, 0x80, 0x80, 0xc8, 0x01]; // 400 MiB, which the elements below would really yield
    block.extend_from_slice(&[0, 0]);
    block.resize(block.len() + (400 << 20) / 64 * 3, 0);
    for element in block[7..].chunks_exact_mut(3) {
        element.copy_from_slice(&[63 << 2 | 2, 1, 0]);
    }
    let before = peak_bytes();
    let limit = WalkRules::default().max_decompressed_bytes;
    let bomb = seal(Codec::Snappy, &block);
    assert_eq!(walk(&bomb, WalkRules::default()), Err(BatchError::TooLarge { limit }));
    if let (Some(before), Some(after)) = (before, peak_bytes()) {
        assert!(after - before < 96 << 20, "{} bytes more in memory", after - before);
    }
}
