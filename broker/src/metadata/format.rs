//! The bytes of the metadata journal.
//!
//! ```text
//! file:   "HWMETA\0\0" | u32 version | u32 CRC-32 of the 12 bytes before | frames | zeros to the end
//! frame:  zeros to the next sector, if the header would cross its edge
//!         u32 payload length | u32 kind | u64 index | u32 CRC-32 of the 16 bytes before
//!         payload | u32 CRC-32 of frame header and payload | 0xA5
//! ```
//! All numbers are big-endian. The first frame is a snapshot, every later one a command with a larger index. The file's
//! length is a multiple of [`STEP_BYTES`]: space is taken ahead, and what was never written reads as zeros. A step that a full
//! disk gave in part may stand behind that, all zeros.
//!
//! **A torn frame and a damaged one.** Each frame is synced before the next is written, and the snapshot before the
//! file gets its name, so a crash can tear the last frame only; it leaves zeros where bytes never arrived: from some
//! byte to the frame's end, or in whole sectors. (That is what the last byte, which is never zero, is for.) A frame that
//! is wrong in any other way, or that has a good one behind it, was whole once: that is damage, and never cut. A header
//! lies in one sector, so that it is whole or was never there.
//!
//! Version 1 had no zeros before a header: of one that crossed an edge, the first bytes, zero by right, looked like a
//! sector that never arrived, and hid damage further on. It is read all the same, and replaced when it is opened.
//!
//! Versions 1 and 2 hold a snapshot of the state and commands, version 3 what a member of a quorum keeps ([`super::raft`]).
//!
//! Owns: the layout, and the verdict on every byte. Refuses: I/O. Read next: [`super::journal`].

use std::ops::RangeInclusive;

/// The file's length is a multiple of this many bytes.
pub const STEP_BYTES: u64 = 64 << 10;
/// Bytes in front of the first frame.
pub const FILE_HEADER_BYTES: usize = 16;
/// Bytes of a frame besides its payload.
pub const FRAME_OVERHEAD_BYTES: usize = FRAME_HEADER_BYTES + 5;
/// Largest payload of a frame, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 30;

const MAGIC: &[u8; 8] = b"HWMETA\0\0";
/// The format that a broker alone wrote.
pub const ALONE_VERSION: u32 = 2;
/// The format that a member of a quorum writes: frames as in version 2.
pub const RAFT_VERSION: u32 = 3;
/// The oldest format that is read.
pub const OLDEST_VERSION: u32 = 1;
const FRAME_HEADER_BYTES: usize = 20;
const END: u8 = 0xA5;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// What the file begins with: the whole state.
    Snapshot,
    /// One command, or whatever else comes after.
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

impl Frame<'_> {
    /// Where it ends in the file.
    pub fn end(&self) -> usize {
        self.position + self.payload.len() + FRAME_OVERHEAD_BYTES
    }
}

/// What a journal's bytes hold.
#[derive(Debug, PartialEq, Eq)]
pub struct Scan<'a> {
    /// The format of the file.
    pub version: u32,
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

/// The bytes in front of the first frame of a file of this version.
pub fn file_header(version: u32) -> [u8; FILE_HEADER_BYTES] {
    let mut out = [0; FILE_HEADER_BYTES];
    let (front, crc) = out.split_at_mut(12);
    let (magic, number) = front.split_at_mut(8);
    magic.copy_from_slice(MAGIC);
    number.copy_from_slice(&version.to_be_bytes());
    crc.copy_from_slice(&crc32fast::hash(front).to_be_bytes());
    out
}

/// The bytes of a frame that goes behind `end`, in a file of this version.
pub fn frame(version: u32, end: usize, kind: FrameKind, index: u64, payload: &[u8]) -> Vec<u8> {
    let zeros = start_of_frame(version, end) - end;
    let mut out = Vec::with_capacity(zeros + payload.len() + FRAME_OVERHEAD_BYTES);
    out.resize(zeros, 0);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(&kind_number(kind).to_be_bytes());
    out.extend_from_slice(&index.to_be_bytes());
    out.extend_from_slice(&crc32fast::hash(&out[zeros..]).to_be_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&crc32fast::hash(&out[zeros..]).to_be_bytes());
    out.push(END);
    out
}

/// Where the header of the frame behind `end` begins.
fn start_of_frame(version: u32, end: usize) -> usize {
    let crosses = end % SECTOR_BYTES > SECTOR_BYTES - FRAME_HEADER_BYTES;
    if crosses && version > 1 { end.next_multiple_of(SECTOR_BYTES) } else { end }
}

/// Takes the bytes of a journal apart that has one of the formats in `readable`.
///
/// # Errors
/// [`Damage`]: the first byte range that must not be trusted.
pub fn scan(bytes: &[u8], readable: RangeInclusive<u32>) -> Result<Scan<'_>, Damage> {
    let version = check_file(bytes, &readable)?;
    let mut frames: Vec<Frame<'_>> = Vec::new();
    let mut end = FILE_HEADER_BYTES;
    while let Some(frame) = good_frame(bytes, start_of_frame(version, end)) {
        let position = frame.position;
        if !is_zero(bytes, end, position) {
            return Err(Damage { position: end, why: "there are bytes where zeros come before a frame".to_owned() });
        }
        let orderly = match frames.last() {
            None => frame.kind == FrameKind::Snapshot,
            Some(before) => frame.kind == FrameKind::Command && frame.index > before.index,
        };
        if !orderly {
            let why = "a frame that cannot stand in this place".to_owned();
            return Err(Damage { position, why });
        }
        end = frame.end();
        frames.push(frame);
    }
    let torn_bytes = bytes.len() - end - trailing_zeros(bytes, end);
    if frames.is_empty() {
        return Err(Damage { position: end, why: "no snapshot can be read".to_owned() });
    }
    if torn_bytes > 0 {
        check_torn(version, bytes, end, end + torn_bytes)?;
    }
    Ok(Scan { version, frames, end, torn_bytes })
}

/// The file's version.
fn check_file(bytes: &[u8], readable: &RangeInclusive<u32>) -> Result<u32, Damage> {
    let damaged = |position, why: String| Err(Damage { position, why });
    let Some(header) = bytes.get(..FILE_HEADER_BYTES) else {
        return damaged(bytes.len(), format!("the file has only {} bytes: it was cut", bytes.len()));
    };
    let Some(version) = readable.clone().find(|version| header == file_header(*version)) else {
        let (front, crc) = header.split_at(12);
        return match header.strip_prefix(MAGIC).and_then(|rest| rest.first_chunk::<4>()) {
            Some(version) if crc == crc32fast::hash(front).to_be_bytes() => damaged(
                8,
                format!(
                    "the journal has format version {}, this build reads {} to {}",
                    u32::from_be_bytes(*version),
                    readable.start(),
                    readable.end()
                ),
            ),
            _ => damaged(0, "the file's header is wrong".to_owned()),
        };
    };
    let steps = bytes.len() / STEP_BYTES as usize * STEP_BYTES as usize;
    if steps == 0 || !is_zero(bytes, steps, bytes.len()) {
        let why = format!("the file ends, and a whole one has a multiple of {STEP_BYTES} bytes: it was cut");
        return damaged(bytes.len(), why);
    }
    Ok(version)
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

/// Whether what lies between the last good frame's `end` and `torn_end` (the last byte of it is not zero) is what a crash
/// leaves of a frame.
fn check_torn(version: u32, bytes: &[u8], end: usize, torn_end: usize) -> Result<(), Damage> {
    let position = start_of_frame(version, end);
    let damaged = |why: &str| Err(Damage { position, why: why.to_owned() });
    if (end + 1..torn_end).any(|later| good_frame(bytes, later).is_some()) {
        return damaged("a frame is damaged, and good ones lie behind it");
    }
    if torn_end > position && !is_zero(bytes, end, position) {
        return damaged("there are bytes where zeros come before a frame");
    }
    let header_end = position + FRAME_HEADER_BYTES;
    let torn = match good_header(bytes, position) {
        Some((_, _, size)) if position + size < torn_end => {
            return damaged("a frame is damaged, and other bytes lie behind it");
        }
        // The header's first bytes are right, whether they were written or are zero anyway. The end is cut off, or a sector
        // behind that of the first bytes is missing.
        Some((_, _, size)) => {
            let second_sector = (position + 1).next_multiple_of(SECTOR_BYTES);
            torn_end < position + size || misses_sector(bytes, second_sector, position + size)
        }
        // The header never arrived, or was cut off.
        None if torn_end <= header_end => true,
        None if version == 1 => misses_sector(bytes, position, torn_end),
        // With the header, all that shares its sector never arrived.
        None => is_zero(bytes, position, header_end.next_multiple_of(SECTOR_BYTES)),
    };
    if torn { Ok(()) } else { damaged("the last frame is damaged") }
}

/// Whether all that `from..to` has of some sector is zero.
fn misses_sector(bytes: &[u8], from: usize, to: usize) -> bool {
    sectors(from, to).any(|sector| is_zero(bytes, sector.start, sector.end))
}

fn is_zero(bytes: &[u8], from: usize, to: usize) -> bool {
    bytes.get(from..to).is_some_and(|part| part.iter().all(|byte| *byte == 0))
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

    const READABLE: RangeInclusive<u32> = OLDEST_VERSION..=RAFT_VERSION;

    /// Where a frame is.
    #[derive(Debug, Clone, Copy)]
    struct Place {
        /// Where the frame before it ends.
        behind: usize,
        header: usize,
        end: usize,
    }

    fn journal_of(version: u32, payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<Place>) {
        let mut bytes = file_header(version).to_vec();
        let mut places = Vec::new();
        let commands = payloads.iter().zip(8..).map(|(payload, index)| (FrameKind::Command, index, &payload[..]));
        for (kind, index, payload) in [(FrameKind::Snapshot, 7, &b"the state"[..])].into_iter().chain(commands) {
            let behind = bytes.len();
            bytes.extend(frame(version, behind, kind, index, payload));
            places.push(Place { behind, header: start_of_frame(version, behind), end: bytes.len() });
        }
        bytes.resize(STEP_BYTES as usize, 0);
        (bytes, places)
    }

    fn journal(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<Place>) {
        journal_of(ALONE_VERSION, payloads)
    }

    fn versions() -> impl Strategy<Value = u32> {
        OLDEST_VERSION..=RAFT_VERSION
    }

    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(1u8..=255, 0..1500), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_come_back(version in versions(), payloads in payloads()) {
            let (bytes, places) = journal_of(version, &payloads);
            let scan = scan(&bytes, READABLE).expect("good");
            prop_assert_eq!((scan.version, scan.torn_bytes), (version, 0));
            prop_assert_eq!(Some(scan.end), places.last().map(|last| last.end));
            let headers: Vec<usize> = places.iter().map(|place| place.header).collect();
            prop_assert_eq!(scan.frames.iter().map(|frame| frame.position).collect::<Vec<_>>(), headers);
            let found: Vec<Vec<u8>> = scan.frames.iter().skip(1).map(|frame| frame.payload.to_vec()).collect();
            prop_assert_eq!(found, payloads);
        }

        #[test]
        fn whatever_a_crash_leaves_of_the_last_frame_is_cut(
            version in versions(),
            payloads in payloads(),
            keep in any::<prop::sample::Index>(),
            sectors_kept in any::<u64>(),
            by_sector: bool,
        ) {
            let (mut bytes, places) = journal_of(version, &payloads);
            let Place { behind, end, .. } = *places.last().expect("a frame");
            if by_sector {
                let parts: Vec<_> = sectors(behind, end).collect();
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
                bytes[behind + keep.index(end - behind)..end].fill(0);
            }
            let scan = scan(&bytes, READABLE).expect("a torn frame is no damage");
            prop_assert_eq!(scan.end, behind);
            prop_assert!(bytes[behind + scan.torn_bytes..].iter().all(|b| *b == 0));
            prop_assert_eq!(scan.frames.len(), payloads.len());
        }

        #[test]
        fn a_flipped_bit_in_any_frame_is_damage_and_is_placed(
            payloads in payloads(),
            at in any::<prop::sample::Index>(),
            bit in 0..8u32,
        ) {
            let (mut bytes, places) = journal(&payloads);
            let at = at.index(places.last().expect("a frame").end);
            bytes[at] ^= 1 << bit;
            let damage = scan(&bytes, READABLE).expect_err("damage");
            let hit = places.iter().find(|place| (place.behind..place.end).contains(&at));
            let expected = hit.map_or(0, |place| if at < place.header { place.behind } else { place.header });
            prop_assert_eq!(damage.position, expected, "{}", damage.why);
        }

        #[test]
        fn a_file_that_was_cut_is_damage(payloads in payloads(), len in 0..STEP_BYTES as usize) {
            let (bytes, _) = journal(&payloads);
            prop_assert!(scan(&bytes[..len], READABLE).is_err());
        }

        #[test]
        fn random_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..3000)) {
            let (mut bytes, places) = journal(&[]);
            let from = places[0].end;
            bytes[from..from + tail.len()].copy_from_slice(&tail);
            drop(scan(&bytes, READABLE));
            drop(scan(&tail, READABLE));
        }
    }

    /// A header that lay across the edge of a sector, with nothing but zeros before the edge, looked as if its first sector had
    /// never arrived: a flipped bit in it, or further on, cut the frame, which had been acknowledged.
    #[test]
    fn damage_to_a_last_frame_is_told_wherever_it_begins() {
        let mut padded = 0;
        for begins in SECTOR_BYTES - FRAME_HEADER_BYTES..=SECTOR_BYTES + 1 {
            let (_, places) = journal(&[Vec::new()]);
            let fills = vec![1; begins - places[1].end];
            let (whole, places) = journal(&[fills, vec![1; 40]]);
            let Place { behind, header, end } = places[2];
            assert_eq!(behind, begins);
            assert!(header % SECTOR_BYTES + FRAME_HEADER_BYTES <= SECTOR_BYTES);
            padded += usize::from(header > behind);
            for at in behind..end {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << (at % 8);
                assert!(scan(&bytes, READABLE).is_err(), "byte {at} of a frame at {header}");
            }
        }
        assert_eq!(padded, FRAME_HEADER_BYTES - 1);
    }

    #[test]
    fn a_newer_version_is_named() {
        let (mut bytes, _) = journal(&[]);
        bytes[11] = 4;
        let crc = crc32fast::hash(&bytes[..12]).to_be_bytes();
        bytes[12..16].copy_from_slice(&crc);
        assert_eq!(
            scan(&bytes, READABLE).expect_err("refused").to_string(),
            "the journal has format version 4, this build reads 1 to 3 at byte 8"
        );
    }
}
