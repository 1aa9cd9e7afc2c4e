//! The framings of the codecs that other writers use, and lies in them.

use std::io::Write;

use headwater_proto::batch::{BatchError, Codec, compression};
use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

const LIMIT: usize = 1 << 20;

fn text() -> Vec<u8> {
    (0..30_000).flat_map(|n: u32| format!("{} bottles of beer on the wall, ", n % 977).into_bytes()).collect()
}

fn read(codec: Codec, data: &[u8]) -> Result<Vec<u8>, BatchError> {
    compression::decompress(codec, data, LIMIT)
}

#[track_caller]
fn assert_refused(codec: Codec, data: &[u8]) {
    let refused = read(codec, data);
    assert!(matches!(refused, Err(BatchError::Decompression { .. })), "{:?}", refused.map(|data| data.len()));
}

fn xerial(blocks: &[&[u8]]) -> Vec<u8> {
    let mut out = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01".to_vec();
    for block in blocks {
        let packed = snap::raw::Encoder::new().compress_vec(block).unwrap();
        out.extend_from_slice(&(packed.len() as u32).to_be_bytes());
        out.extend_from_slice(&packed);
    }
    out
}

#[test]
fn snappy_is_read_bare_in_blocks_of_any_size_and_one_stream_after_another() {
    let text = text();
    assert_eq!(read(Codec::Snappy, &snap::raw::Encoder::new().compress_vec(&text).unwrap()).unwrap(), text);
    let blocks: Vec<&[u8]> = [&text[..1], &[], &text[1..100_000], &text[100_000..]].into();
    assert_eq!(read(Codec::Snappy, &xerial(&blocks)).unwrap(), text);
    let twice = [xerial(&blocks), xerial(&blocks)].concat();
    let limit = 2 * text.len();
    assert_eq!(compression::decompress(Codec::Snappy, &twice, limit).unwrap(), [text.clone(), text].concat());
}

#[test]
fn snappy_that_is_cut_or_lies_is_refused() {
    let good = xerial(&[b"hello"]);
    for length in 1..good.len() {
        if length != 16 {
            assert_refused(Codec::Snappy, &good[..length]);
        }
    }
    // A block that claims 4 GiB less one byte.
    assert_refused(Codec::Snappy, &[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0]);
    assert_refused(Codec::Snappy, &xerial(&[])[..10]);
}

#[test]
fn lz4_is_read_with_blocks_of_any_size_linked_or_not_and_with_checksums() {
    let text = text();
    for block_size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max1MB, BlockSize::Max4MB] {
        for block_mode in [BlockMode::Independent, BlockMode::Linked] {
            for checksums in [false, true] {
                let frame = FrameInfo::new()
                    .block_size(block_size)
                    .block_mode(block_mode)
                    .block_checksums(checksums)
                    .content_checksum(checksums)
                    .content_size(checksums.then_some(text.len() as u64));
                let mut encoder = FrameEncoder::with_frame_info(frame, Vec::new());
                encoder.write_all(&text).unwrap();
                assert_eq!(read(Codec::Lz4, &encoder.finish().unwrap()).unwrap(), text);
            }
        }
    }
}

#[test]
fn lz4_is_written_as_kafka_writes_it() {
    let mut out = Vec::new();
    compression::compress(Codec::Lz4, None, &text(), &mut out).unwrap();
    // Version 1, independent blocks, no checksums, no content size; blocks of 64 KiB.
    assert_eq!(out[..6], [0x04, 0x22, 0x4d, 0x18, 0x60, 0x40]);
    assert_eq!(out[out.len() - 4..], [0; 4], "the end mark");
}

#[test]
fn a_frame_that_is_cut_or_followed_by_something_is_refused() {
    for codec in [Codec::Gzip, Codec::Lz4, Codec::Zstd] {
        let mut good = Vec::new();
        compression::compress(codec, None, &text()[..2_000], &mut good).unwrap();
        for length in 1..good.len() {
            assert_refused(codec, &good[..length]);
        }
        good.push(1);
        assert_refused(codec, &good);
        assert!(codec == Codec::Zstd || read(codec, &[]).is_err(), "{codec}");
    }
}

#[test]
fn gzip_and_zstd_have_levels_with_ends_and_a_default() {
    let size = |codec, level| {
        let mut out = Vec::new();
        compression::compress(codec, level, &text(), &mut out).unwrap();
        out.len()
    };
    for (codec, default, fastest, smallest) in [(Codec::Gzip, -1, 1, 9), (Codec::Zstd, 0, -50, 19)] {
        assert_eq!(size(codec, None), size(codec, Some(default)), "{codec}");
        assert!(size(codec, Some(fastest)) > size(codec, Some(smallest)), "{codec}");
    }
    assert_eq!(size(Codec::Gzip, Some(9)), size(Codec::Gzip, Some(i32::MAX)));
    assert_eq!(size(Codec::Zstd, Some(22)), size(Codec::Zstd, Some(i32::MAX)));
}

#[test]
fn gzip_and_zstd_are_read_one_after_another() {
    for codec in [Codec::Gzip, Codec::Zstd] {
        let mut twice = Vec::new();
        compression::compress(codec, None, b"one, ", &mut twice).unwrap();
        compression::compress(codec, None, b"two", &mut twice).unwrap();
        assert_eq!(read(codec, &twice).unwrap(), b"one, two", "{codec}");
    }
}

/// A zstd frame without content size: one run of `length` zeros, in a window of `10 + exponent` bits.
fn zstd_run(exponent: u8, length: u32) -> Vec<u8> {
    let [a, b, c, _] = (1 | 1 << 1 | length << 3).to_le_bytes();
    vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, exponent << 3, a, b, c, 0]
}

#[test]
fn zstd_windows_end_where_kafkas_largest_level_does() {
    assert_eq!(read(Codec::Zstd, &zstd_run(17, 100_000)).unwrap(), vec![0; 100_000], "128 MiB, level 22");
    for exponent in [18, 21, 31] {
        assert_refused(Codec::Zstd, &zstd_run(exponent, 100_000));
    }
}

#[test]
fn zstd_that_claims_an_absurd_size_is_refused() {
    // Single segment, eight bytes of content size.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    frame.extend_from_slice(&(1_u64 << 60).to_le_bytes());
    frame.extend_from_slice(&[1, 0, 0]);
    assert_refused(Codec::Zstd, &frame);
}
