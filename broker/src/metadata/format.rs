//! The bytes of the metadata journal.
//!
//! ```text
//! file:   "HWMETA\0\0" | u32 version | u32 CRC-32 of the 12 bytes before | frames | zeros to the end
//! frame:  u32 payload length | u32 kind | u64 index | u32 CRC-32 of the 16 bytes before
//!         payload | u32 CRC-32 of frame header and payload | 0xA5
//! ```
//! All numbers are big-endian. The first frame is a snapshot, every later one a command with a larger index. The file's
//! length is a multiple of [`STEP_BYTES`]: space is taken ahead, and what was never written reads as zeros.
//!
//! **A torn frame and a damaged one.** Each frame is synced before the next is written, and the snapshot before the
//! file gets its name, so a crash can tear the last frame only; it leaves zeros where bytes never arrived: from some
//! byte to the frame's end, or in whole sectors. (That is what the last byte, which is never zero, is for.) A frame that
//! is wrong in any other way, or that has a good one behind it, was whole once: that is damage, and never cut.
//!
//! Owns: the layout, and the verdict on every byte. Refuses: I/O. Read next: [`super::journal`].

/// The file's length is a multiple of this many bytes.
pub const STEP_BYTES: u64 = 64 << 10;
/// Bytes in front of the first frame.
pub const FILE_HEADER_BYTES: usize = 16;
/// Bytes of a frame besides its payload.
pub const FRAME_OVERHEAD_BYTES: usize = FRAME_HEADER_BYTES + 5;
/// Largest payload of a frame, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 30;

const MAGIC: &[u8; 8] = b"HWMETA\0\0";
const VERSION: u32 = 1;
const FRAME_HEADER_BYTES: usize = 20;
const END: u8 = 0xA5;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// The whole state.
    Snapshot,
    /// One command.
    Command,
}

/// A good frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Where it begins in the file.
    pub position: usize,
    /// What it holds.
    pub kind: FrameKind,
    /// The index of its command, or of the last command in its snapshot.
    pub index: u64,
    /// The message.
    pub payload: &'a [u8],
}

/// What a journal's bytes hold.
#[derive(Debug, PartialEq, Eq)]
pub struct Scan<'a> {
    /// The snapshot, and the commands after it.
    pub frames: Vec<Frame<'a>>,
    /// Where the next frame goes.
    pub end: usize,
    /// Bytes from `end` on that a torn frame left; 0 where none did.
    pub torn_bytes: usize,
}

/// Bytes that were whole once and are not any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why} at byte {position}")]
pub struct Damage {
    /// Where, in bytes from the file's beginning.
    pub position: usize,
    /// What is wrong there.
    pub why: String,
}

/// The bytes in front of the first frame.
pub fn file_header() -> [u8; FILE_HEADER_BYTES] {
    let mut out = [0; FILE_HEADER_BYTES];
    let (front, crc) = out.split_at_mut(12);
    let (magic, version) = front.split_at_mut(8);
    magic.copy_from_slice(MAGIC);
    version.copy_from_slice(&VERSION.to_be_bytes());
    crc.copy_from_slice(&crc32fast::hash(front).to_be_bytes());
    out
}

/// A frame's bytes.
pub fn frame(kind: FrameKind, index: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + FRAME_OVERHEAD_BYTES);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(&kind_number(kind).to_be_bytes());
    out.extend_from_slice(&index.to_be_bytes());
    out.extend_from_slice(&crc32fast::hash(&out).to_be_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&crc32fast::hash(&out).to_be_bytes());
    out.push(END);
    out
}

/// Takes a journal's bytes apart.
///
/// # Errors
/// [`Damage`]: the first byte range that must not be trusted.
pub fn scan(bytes: &[u8]) -> Result<Scan<'_>, Damage> {
    check_file(bytes)?;
    let mut frames: Vec<Frame<'_>> = Vec::new();
    let mut position = FILE_HEADER_BYTES;
    while let Some(frame) = good_frame(bytes, position) {
        let orderly = match frames.last() {
            None => frame.kind == FrameKind::Snapshot,
            Some(before) => frame.kind == FrameKind::Command && frame.index > before.index,
        };
        if !orderly {
            let why = "a frame that cannot stand in this place".to_owned();
            return Err(Damage { position, why });
        }
        position += frame.payload.len() + FRAME_OVERHEAD_BYTES;
        frames.push(frame);
    }
    let torn_bytes = bytes.len() - position - trailing_zeros(bytes, position);
    if frames.is_empty() {
        return Err(Damage { position, why: "no snapshot can be read".to_owned() });
    }
    if torn_bytes > 0 {
        check_torn(bytes, position, position + torn_bytes)?;
    }
    Ok(Scan { frames, end: position, torn_bytes })
}

fn check_file(bytes: &[u8]) -> Result<(), Damage> {
    let damaged = |position, why: String| Err(Damage { position, why });
    let Some(header) = bytes.get(..FILE_HEADER_BYTES) else {
        return damaged(bytes.len(), format!("the file has only {} bytes: it was cut", bytes.len()));
    };
    if header != file_header() {
        let (front, crc) = header.split_at(12);
        return match header.strip_prefix(MAGIC).and_then(|rest| rest.first_chunk::<4>()) {
            Some(version) if crc == crc32fast::hash(front).to_be_bytes() => damaged(
                8,
                format!("the journal has format version {}, this build reads {VERSION}", u32::from_be_bytes(*version)),
            ),
            _ => damaged(0, "the file's header is wrong".to_owned()),
        };
    }
    if !(bytes.len() as u64).is_multiple_of(STEP_BYTES) {
        let why = format!("the file ends, and a whole one has a multiple of {STEP_BYTES} bytes: it was cut");
        return damaged(bytes.len(), why);
    }
    Ok(())
}

/// The frame at `position` if every byte of it is right.
fn good_frame(bytes: &[u8], position: usize) -> Option<Frame<'_>> {
    let (kind, index, size) = good_header(bytes, position)?;
    let whole = bytes.get(position..position.checked_add(size)?)?;
    let (front, end) = whole.split_at_checked(size - 5)?;
    let (crc, end) = end.split_at_checked(4)?;
    let good = crc == crc32fast::hash(front).to_be_bytes() && end == [END];
    good.then_some(Frame { position, kind, index, payload: front.get(FRAME_HEADER_BYTES..)? })
}

/// Kind, index and size of the whole frame, if its header is right.
fn good_header(bytes: &[u8], position: usize) -> Option<(FrameKind, u64, usize)> {
    let header = bytes.get(position..position.checked_add(FRAME_HEADER_BYTES)?)?;
    let (front, crc) = header.split_at_checked(16)?;
    let (length, rest) = front.split_first_chunk::<4>()?;
    let (kind, index) = rest.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let kind = match u32::from_be_bytes(*kind) {
        1 => FrameKind::Snapshot,
        2 => FrameKind::Command,
        _ => return None,
    };
    let index = u64::from_be_bytes(*index.first_chunk::<8>()?);
    let good = length <= MAX_PAYLOAD_BYTES && crc == crc32fast::hash(front).to_be_bytes();
    good.then_some((kind, index, length + FRAME_OVERHEAD_BYTES))
}

/// Whether what lies at `position..end` (the last byte of it is not zero) is what a crash leaves of a frame.
fn check_torn(bytes: &[u8], position: usize, end: usize) -> Result<(), Damage> {
    let damaged = |why: &str| Err(Damage { position, why: why.to_owned() });
    if (position + 1..end).any(|later| good_frame(bytes, later).is_some()) {
        return damaged("a frame is damaged, and good ones lie behind it");
    }
    // Where a sector may be missing, and the end of the frame.
    let (from, frame_end) = match good_header(bytes, position) {
        Some((_, _, size)) if position + size < end => {
            return damaged("a frame is damaged, and other bytes lie behind it");
        }
        // The header's first bytes are right, whether they were written or are zero anyway.
        Some((_, _, size)) => ((position + 1).next_multiple_of(SECTOR_BYTES), position + size),
        // The header never arrived, or was cut off.
        None if end <= position + FRAME_HEADER_BYTES => (position, position + FRAME_HEADER_BYTES + 1),
        None => (position, end),
    };
    let cut_short = end < frame_end;
    let sector_missing = sectors(from, frame_end)
        .any(|sector| bytes.get(sector.clone()).is_some_and(|part| !part.is_empty() && part.iter().all(|b| *b == 0)));
    if cut_short || sector_missing { Ok(()) } else { damaged("the last frame is damaged") }
}

/// The parts of `from..to` that lie in one sector each.
fn sectors(from: usize, to: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = from;
    std::iter::from_fn(move || {
        let next = (at / SECTOR_BYTES + 1) * SECTOR_BYTES;
        let part = at..next.min(to);
        at = next;
        (!part.is_empty()).then_some(part)
    })
}

fn trailing_zeros(bytes: &[u8], from: usize) -> usize {
    bytes.get(from..).map_or(0, |rest| rest.iter().rev().take_while(|b| **b == 0).count())
}

const fn kind_number(kind: FrameKind) -> u32 {
    match kind {
        FrameKind::Snapshot => 1,
        FrameKind::Command => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn journal(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = file_header().to_vec();
        bytes.extend(frame(FrameKind::Snapshot, 7, b"the state"));
        let mut starts = Vec::new();
        for (n, payload) in payloads.iter().enumerate() {
            starts.push(bytes.len());
            bytes.extend(frame(FrameKind::Command, 8 + n as u64, payload));
        }
        starts.push(bytes.len());
        bytes.resize(STEP_BYTES as usize, 0);
        (bytes, starts)
    }

    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(1u8..=255, 0..1500), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_come_back(payloads in payloads()) {
            let (bytes, starts) = journal(&payloads);
            let scan = scan(&bytes).expect("good");
            prop_assert_eq!(scan.torn_bytes, 0);
            prop_assert_eq!(Some(&scan.end), starts.last());
            let found: Vec<Vec<u8>> = scan.frames.iter().skip(1).map(|frame| frame.payload.to_vec()).collect();
            prop_assert_eq!(found, payloads);
        }

        #[test]
        fn whatever_a_crash_leaves_of_the_last_frame_is_cut(
            payloads in payloads(),
            keep in any::<prop::sample::Index>(),
            sectors_kept in any::<u64>(),
            by_sector: bool,
        ) {
            let (mut bytes, starts) = journal(&payloads);
            let (last, end) = (starts[payloads.len() - 1], starts[payloads.len()]);
            if by_sector {
                let parts: Vec<_> = sectors(last, end).collect();
                let mut lost = false;
                for (n, part) in parts.iter().enumerate() {
                    if sectors_kept >> n & 1 == 0 {
                        // Zeros that never arrive are there all the same.
                        lost |= bytes[part.clone()].iter().any(|b| *b != 0);
                        bytes[part.clone()].fill(0);
                    }
                }
                prop_assume!(lost);
            } else {
                bytes[last + keep.index(end - last)..end].fill(0);
            }
            let scan = scan(&bytes).expect("a torn frame is no damage");
            prop_assert_eq!(scan.end, last);
            prop_assert!(bytes[last + scan.torn_bytes..].iter().all(|b| *b == 0));
            prop_assert_eq!(scan.frames.len(), payloads.len());
        }

        #[test]
        fn a_flipped_bit_in_any_frame_is_damage_and_is_placed(
            payloads in payloads(),
            at in any::<prop::sample::Index>(),
            bit in 0..8u32,
        ) {
            let (mut bytes, starts) = journal(&payloads);
            let at = at.index(*starts.last().expect("an end"));
            bytes[at] ^= 1 << bit;
            // A last frame whose first bytes, zero by right, lie alone in their sector looks like one whose sector never arrived.
            let begins = starts.iter().copied().filter(|start| *start <= at).max().unwrap_or(0);
            prop_assume!(begins % SECTOR_BYTES <= SECTOR_BYTES - 8 || at >= begins + FRAME_HEADER_BYTES);
            let damage = scan(&bytes).expect_err("damage");
            let frame = starts.iter().copied().chain([FILE_HEADER_BYTES]).filter(|start| *start <= at).max();
            prop_assert_eq!(damage.position, frame.unwrap_or(0), "{}", damage.why);
        }

        #[test]
        fn a_file_that_was_cut_is_damage(payloads in payloads(), len in 0..STEP_BYTES as usize) {
            let (bytes, _) = journal(&payloads);
            prop_assert!(scan(&bytes[..len]).is_err());
        }

        #[test]
        fn random_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..3000)) {
            let (mut bytes, starts) = journal(&[]);
            let from = starts[0];
            bytes[from..from + tail.len()].copy_from_slice(&tail);
            drop(scan(&bytes));
            drop(scan(&tail));
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let (mut bytes, _) = journal(&[]);
        bytes[11] = 2;
        let crc = crc32fast::hash(&bytes[..12]).to_be_bytes();
        bytes[12..16].copy_from_slice(&crc);
        assert_eq!(
            scan(&bytes).expect_err("refused").to_string(),
            "the journal has format version 2, this build reads 1 at byte 8"
        );
    }
}
