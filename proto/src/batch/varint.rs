//! Variable-length numbers, zigzag-coded: seven bits a byte, least significant first (protobuf's `sint32` and `sint64`).
//!
//! Owns: reading them from bytes that may end anywhere, writing them, and their sizes. Refuses: numbers that are longer
//! than their type. Longer spellings of a short number are read, as Kafka reads them. Read next: [`super::record`].

use super::RecordFault;

/// Most bytes of a 32-bit number.
pub const MAX_I32_BYTES: usize = 5;
/// Most bytes of a 64-bit number.
pub const MAX_I64_BYTES: usize = 10;

/// Reads a 32-bit number off the front of `input`.
pub fn read_i32(input: &mut &[u8]) -> Result<i32, RecordFault> {
    decode_i32(|| take_byte(input))
}

/// Reads a 64-bit number off the front of `input`.
pub fn read_i64(input: &mut &[u8]) -> Result<i64, RecordFault> {
    decode_i64(|| take_byte(input))
}

/// Appends a 32-bit number.
pub fn write_i32(out: &mut Vec<u8>, value: i32) {
    write_raw(out, u64::from(zigzag_i32(value)));
}

/// Appends a 64-bit number.
pub fn write_i64(out: &mut Vec<u8>, value: i64) {
    write_raw(out, zigzag_i64(value));
}

/// Bytes that a 32-bit number takes.
pub const fn size_i32(value: i32) -> usize {
    size_raw(zigzag_i32(value) as u64)
}

/// Bytes that a 64-bit number takes.
pub const fn size_i64(value: i64) -> usize {
    size_raw(zigzag_i64(value))
}

/// Decodes a 32-bit number from bytes that come one at a time.
#[inline]
pub(super) fn decode_i32<E: From<RecordFault>>(mut next: impl FnMut() -> Result<u8, E>) -> Result<i32, E> {
    let mut raw = 0_u32;
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        raw |= u32::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(unzigzag_i32(raw));
        }
    }
    match next()? {
        byte @ ..=0x0f => Ok(unzigzag_i32(raw | u32::from(byte) << 28)),
        _ => Err(RecordFault::Varint.into()),
    }
}

/// Decodes a 64-bit number from bytes that come one at a time.
#[inline]
pub(super) fn decode_i64<E: From<RecordFault>>(mut next: impl FnMut() -> Result<u8, E>) -> Result<i64, E> {
    let mut raw = 0_u64;
    for shift in [0, 7, 14, 21, 28, 35, 42, 49, 56] {
        let byte = next()?;
        raw |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(unzigzag_i64(raw));
        }
    }
    match next()? {
        byte @ ..=1 => Ok(unzigzag_i64(raw | u64::from(byte) << 63)),
        _ => Err(RecordFault::Varint.into()),
    }
}

/// Takes one byte off the front.
#[inline]
pub(super) fn take_byte(input: &mut &[u8]) -> Result<u8, RecordFault> {
    let (byte, rest) = input.split_first().ok_or(RecordFault::Truncated)?;
    *input = rest;
    Ok(*byte)
}

#[inline]
fn write_raw(out: &mut Vec<u8>, mut raw: u64) {
    while raw >= 0x80 {
        out.push(raw as u8 | 0x80);
        raw >>= 7;
    }
    out.push(raw as u8);
}

const fn size_raw(raw: u64) -> usize {
    (64 - (raw | 1).leading_zeros()).div_ceil(7) as usize
}

const fn zigzag_i32(value: i32) -> u32 {
    (value << 1 ^ value >> 31) as u32
}

const fn zigzag_i64(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

const fn unzigzag_i32(raw: u32) -> i32 {
    (raw >> 1) as i32 ^ -((raw & 1) as i32)
}

const fn unzigzag_i64(raw: u64) -> i64 {
    (raw >> 1) as i64 ^ -((raw & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_in_the_bytes_that_size_promises() {
        let edges = (0..64).flat_map(|bit| [-1, 0, 1].map(|near| (1_i64 << bit).wrapping_add(near)));
        for value in edges.chain([i64::MIN, i64::MAX, -1, -64, -65, 63, 64]) {
            let mut out = Vec::new();
            write_i64(&mut out, value);
            assert_eq!(out.len(), size_i64(value), "{value}");
            assert_eq!(read_i64(&mut out.as_slice()), Ok(value));

            let value = value as i32;
            let mut out = Vec::new();
            write_i32(&mut out, value);
            assert_eq!(out.len(), size_i32(value), "{value}");
            assert_eq!(read_i32(&mut out.as_slice()), Ok(value));
        }
        assert_eq!((size_i32(i32::MIN), size_i64(i64::MIN)), (MAX_I32_BYTES, MAX_I64_BYTES));
    }

    #[test]
    fn spellings_are_those_of_the_format() {
        for (value, bytes) in [(0, vec![0]), (-1, vec![1]), (1, vec![2]), (-64, vec![0x7f]), (64, vec![0x80, 1])] {
            let mut out = Vec::new();
            write_i32(&mut out, value);
            assert_eq!(out, bytes);
        }
    }

    #[test]
    fn a_number_that_ends_early_or_never_is_refused() {
        assert_eq!(read_i32(&mut [].as_slice()), Err(RecordFault::Truncated));
        assert_eq!(read_i32(&mut [0x80, 0x80].as_slice()), Err(RecordFault::Truncated));
        assert_eq!(read_i32(&mut [0xff, 0xff, 0xff, 0xff, 0x10].as_slice()), Err(RecordFault::Varint));
        assert_eq!(read_i32(&mut [0xff; 9].as_slice()), Err(RecordFault::Varint));
        assert_eq!(read_i64(&mut [0xff; 20].as_slice()), Err(RecordFault::Varint));
    }
}
