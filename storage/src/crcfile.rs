//! `<base>.crc`: a running checksum of a whole segment, which Kafka's formats do not have.
//!
//! Owns: the file's bytes and the running sum. Refuses: I/O, and judging what a disagreement means (`recovery.rs` and the inspection do).
//! Read next: `segment.rs`.
//!
//! The checksum of a record batch leaves its first 21 bytes (base offset, length, leader epoch, magic) unprotected and binds a
//! batch to no partition. This one covers every byte of the segment, and begins with the segment's identity, so that a
//! file under another name disagrees from its first byte on. It is extended only over bytes that were checked as they were
//! appended.
//!
//! ```text
//! header  48 bytes:  "HWCRC" 0 0 1 (magic and version) | topic id 16 | u32 partition | i64 base offset | u32 check | 8 zero bytes
//! entries 12 bytes:  u32 position | u32 CRC-32 (ISO-HDLC) of the header and of every byte of the .log before that position | u32 check
//! check              CRC-32 of the bytes before it, in the header or in the entry: damage to this file is never taken for
//!                    damage to the log                                                                         (big endian)
//! ```
//!
//! There is an entry for each 64 KiB of the log; when the segment is sealed or closed, a last one for its end.

use headwater_proto::TopicId;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 12;
/// Bytes of log between two entries.
pub const STEP_BYTES: u64 = 64 * 1024;

const MAGIC: [u8; 8] = *b"HWCRC\0\0\x01";

/// Which segment a file of checksums belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrcHeader {
    /// The topic.
    pub topic_id: TopicId,
    /// The partition.
    pub partition: u32,
    /// The segment.
    pub base_offset: i64,
}

/// The checksum up to a position of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrcEntry {
    /// How many bytes of the log it covers.
    pub position: u32,
    /// The checksum.
    pub crc: u32,
}

/// A file of checksums, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrcFile {
    /// Which segment it was written for.
    pub header: CrcHeader,
    /// Its entries, positions strictly rising.
    pub entries: Vec<CrcEntry>,
}

impl CrcFile {
    /// The bytes of this file, had it been written for another segment with the same bytes. The log need not be read for that: every checksum begins with
    /// the header, and what the header adds can be taken out.
    pub fn renamed(&self, header: CrcHeader) -> Vec<u8> {
        let difference = crc32fast::hash(&self.header.encode()) ^ crc32fast::hash(&header.encode());
        let mut bytes = header.encode().to_vec();
        for CrcEntry { position, crc } in &self.entries {
            put(CrcEntry { position: *position, crc: crc ^ carried(difference, *position) }, &mut bytes);
        }
        bytes
    }

    /// The first checksum, of the log's bytes alone: that of the same bytes is the same in every segment.
    pub fn first_of_bytes(&self) -> Option<CrcEntry> {
        let CrcEntry { position, crc } = *self.entries.first()?;
        let header = crc32fast::hash(&self.header.encode());
        Some(CrcEntry { position, crc: crc ^ carried(header, position) })
    }
}

/// What a checksum adds to that of so many bytes behind it.
fn carried(crc: u32, bytes: u32) -> u32 {
    let mut behind = crc32fast::Hasher::new_with_initial(crc);
    behind.combine(&crc32fast::Hasher::new_with_initial_len(0, u64::from(bytes)));
    behind.finalize()
}

/// A file of checksums that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("position {position}: {detail}")]
pub struct CrcFault {
    /// Where in the file, in bytes.
    pub position: u64,
    /// What is wrong there.
    pub detail: String,
}

impl CrcHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(self.topic_id.as_bytes());
        bytes[24..28].copy_from_slice(&self.partition.to_be_bytes());
        bytes[28..36].copy_from_slice(&self.base_offset.to_be_bytes());
        let check = crc32fast::hash(&bytes[..36]);
        bytes[36..40].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<CrcHeader, CrcFault> {
        let fault = |position, detail: &str| Err(CrcFault { position, detail: detail.into() });
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return fault(bytes.len() as u64, "the header is cut short");
        };
        if bytes[..8] != MAGIC {
            return fault(0, "no checksum file, or of a version that this build does not know");
        }
        if bytes[36..40] != crc32fast::hash(&bytes[..36]).to_be_bytes() || bytes[40..].iter().any(|byte| *byte != 0) {
            return fault(36, "the header does not match its own check");
        }
        let mut topic_id = [0; 16];
        topic_id.copy_from_slice(&bytes[8..24]);
        let (mut partition, mut base_offset) = ([0; 4], [0; 8]);
        partition.copy_from_slice(&bytes[24..28]);
        base_offset.copy_from_slice(&bytes[28..36]);
        Ok(CrcHeader {
            topic_id: TopicId::from_bytes(topic_id),
            partition: u32::from_be_bytes(partition),
            base_offset: i64::from_be_bytes(base_offset),
        })
    }
}

/// Reads a file of checksums.
pub fn decode(bytes: &[u8]) -> Result<CrcFile, CrcFault> {
    let (file, fault) = decode_entries(bytes)?;
    fault.map_or(Ok(file), Err)
}

/// Reads what of a file of checksums stands before anything that is wrong: all that a crash may have left.
pub fn decode_leading(bytes: &[u8]) -> Result<CrcFile, CrcFault> {
    decode_entries(bytes).map(|(file, _)| file)
}

/// The entries up to the first that is wrong, and what is wrong there.
fn decode_entries(bytes: &[u8]) -> Result<(CrcFile, Option<CrcFault>), CrcFault> {
    let header = CrcHeader::decode(bytes)?;
    let body = &bytes[HEADER_BYTES..];
    let mut entries: Vec<CrcEntry> = Vec::with_capacity(body.len() / ENTRY_BYTES);
    for (number, chunk) in body.chunks(ENTRY_BYTES).enumerate() {
        let position = (HEADER_BYTES + number * ENTRY_BYTES) as u64;
        let fault = |entries, detail: &str| {
            Ok((CrcFile { header, entries }, Some(CrcFault { position, detail: detail.into() })))
        };
        let Ok(chunk) = <&[u8; ENTRY_BYTES]>::try_from(chunk) else { return fault(entries, "half an entry") };
        let [a, b, c, d, e, f, g, h, check @ ..] = *chunk;
        if check != crc32fast::hash(&chunk[..8]).to_be_bytes() {
            return fault(entries, "the entry does not match its own check");
        }
        let entry = CrcEntry { position: u32::from_be_bytes([a, b, c, d]), crc: u32::from_be_bytes([e, f, g, h]) };
        if entries.last().map_or(0, |last| last.position) >= entry.position {
            return fault(entries, "positions do not rise");
        }
        entries.push(entry);
    }
    Ok((CrcFile { header, entries }, None))
}

/// The running checksum of a segment that is being written or scanned.
#[derive(Debug, Clone)]
pub struct RunningCrc {
    hasher: crc32fast::Hasher,
    position: u64,
    /// Entries not yet taken.
    pending: Vec<u8>,
    taken: usize,
}

impl RunningCrc {
    /// Before the segment's first byte.
    pub fn new(header: &CrcHeader) -> RunningCrc {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header.encode());
        RunningCrc { hasher, position: 0, pending: Vec::new(), taken: 0 }
    }

    /// Covers the next bytes of the log.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = STEP_BYTES - self.position % STEP_BYTES;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.hasher.update(now);
            self.position += now.len() as u64;
            if self.position.is_multiple_of(STEP_BYTES) {
                let entry = self.entry();
                put(entry, &mut self.pending);
            }
            bytes = later;
        }
    }

    /// How many bytes of the log are covered.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The checksum at this moment.
    pub fn entry(&self) -> CrcEntry {
        CrcEntry { position: self.position as u32, crc: self.hasher.clone().finalize() }
    }

    /// The entries that became due and were not taken.
    pub fn pending(&self) -> impl Iterator<Item = CrcEntry> + '_ {
        self.pending.chunks_exact(ENTRY_BYTES).filter_map(|chunk| {
            let (position, rest) = chunk.split_first_chunk::<4>()?;
            let (crc, _) = rest.split_first_chunk::<4>()?;
            Some(CrcEntry { position: u32::from_be_bytes(*position), crc: u32::from_be_bytes(*crc) })
        })
    }

    /// The bytes of the entries that became due since the last call, and where in the file they belong.
    pub fn take(&mut self) -> (u64, Vec<u8>) {
        let at = HEADER_BYTES + self.taken;
        self.taken += self.pending.len();
        (at as u64, std::mem::take(&mut self.pending))
    }

    /// The bytes of the entry for the end of a log that is being sealed or closed, which belongs behind all that were
    /// taken; empty if the log ends on a step. It is no part of the running state: a log that goes on overwrites it.
    pub fn last_entry(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.position.is_multiple_of(STEP_BYTES) {
            put(self.entry(), &mut bytes);
        }
        bytes
    }

    /// Bytes of the whole file for what was covered so far.
    pub fn file_len(&self) -> u64 {
        HEADER_BYTES as u64 + self.position.div_ceil(STEP_BYTES) * ENTRY_BYTES as u64
    }

    /// Continues after the last of a file's first entries. They are due again, so that the whole file is written anew; `None` if there is none.
    pub fn resume_whole(entries: &[CrcEntry]) -> Option<RunningCrc> {
        let mut running = RunningCrc::resume(*entries.last()?, 0);
        entries.iter().for_each(|entry| put(*entry, &mut running.pending));
        Some(running)
    }

    /// Continues after the entry of a file that is known to be right. `entry` lies at `number` in the file.
    pub fn resume(entry: CrcEntry, entries_before: usize) -> RunningCrc {
        RunningCrc {
            hasher: crc32fast::Hasher::new_with_initial_len(entry.crc, u64::from(entry.position) + HEADER_BYTES as u64),
            position: u64::from(entry.position),
            pending: Vec::new(),
            taken: entries_before * ENTRY_BYTES,
        }
    }
}

fn put(entry: CrcEntry, to: &mut Vec<u8>) {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&entry.position.to_be_bytes());
    bytes[4..].copy_from_slice(&entry.crc.to_be_bytes());
    to.extend_from_slice(&bytes);
    to.extend_from_slice(&crc32fast::hash(&bytes).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: CrcHeader = CrcHeader { topic_id: TopicId::from_bytes([7; 16]), partition: 3, base_offset: 4711 };

    fn file_of(log: &[u8], pieces: usize) -> Vec<u8> {
        file_for(HEADER, log, pieces)
    }

    fn file_for(header: CrcHeader, log: &[u8], pieces: usize) -> Vec<u8> {
        let mut running = RunningCrc::new(&header);
        let mut file = header.encode().to_vec();
        for piece in log.chunks(log.len().div_ceil(pieces).max(1)) {
            running.update(piece);
            let (at, bytes) = running.take();
            assert_eq!(at as usize, file.len());
            file.extend(bytes);
        }
        file.extend(running.last_entry());
        assert_eq!(running.file_len() as usize, file.len());
        file
    }

    #[test]
    fn the_file_does_not_depend_on_how_the_log_was_appended() {
        let log: Vec<u8> = (0..300_000u32).map(|n| ((n * 7919) >> 3) as u8).collect();
        let file = file_of(&log, 1);
        assert_eq!(file, file_of(&log, 977));
        let decoded = decode(&file).unwrap();
        assert_eq!(decoded.header, HEADER);
        assert_eq!(
            decoded.entries.iter().map(|entry| entry.position).collect::<Vec<_>>(),
            [65536, 131072, 196608, 262144, 300000]
        );
        let mut whole = crc32fast::Hasher::new();
        whole.update(&HEADER.encode());
        whole.update(&log);
        assert_eq!(decoded.entries[4].crc, whole.finalize());
    }

    #[test]
    fn a_renamed_file_is_as_if_it_had_always_been_that() {
        let header = CrcHeader { partition: 4, base_offset: 0, ..HEADER };
        for len in [0, 1, 50_000, 65_536, 300_000] {
            let log: Vec<u8> = (0..len).map(|n: u32| ((n * 7919) >> 3) as u8).collect();
            let file = decode(&file_of(&log, 1)).unwrap();
            assert_eq!(file.renamed(header), file_for(header, &log, 1), "{len}");
            assert_eq!(file.renamed(HEADER), file_of(&log, 1), "{len}");
            let first =
                log.chunks(STEP_BYTES as usize).next().map(|bytes| (bytes.len() as u32, crc32fast::hash(bytes)));
            assert_eq!(file.first_of_bytes().map(|entry| (entry.position, entry.crc)), first, "{len}");
        }
    }

    #[test]
    fn a_log_that_ends_on_a_step_has_no_extra_entry() {
        assert_eq!(decode(&file_of(&vec![1; 131072], 3)).unwrap().entries.len(), 2);
        assert_eq!(decode(&file_of(&[], 1)).unwrap().entries.len(), 0);
    }

    #[test]
    fn it_resumes_from_an_entry() {
        let log: Vec<u8> = (0..200_000u32).map(|n| (n >> 5) as u8).collect();
        let file = decode(&file_of(&log, 1)).unwrap();
        let mut resumed = RunningCrc::resume(file.entries[1], 2);
        resumed.update(&log[131072..]);
        let mut whole = RunningCrc::new(&HEADER);
        whole.update(&log);
        assert_eq!(resumed.entry(), whole.entry());
        assert_eq!(resumed.take().0, (HEADER_BYTES + 2 * ENTRY_BYTES) as u64);
    }

    #[test]
    fn every_flipped_bit_of_the_file_is_seen() {
        let log: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        let file = file_of(&log, 1);
        let right = decode(&file).unwrap();
        for bit in 0..file.len() * 8 {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        for cut in 0..file.len() {
            assert_ne!(decode(&file[..cut]), Ok(right.clone()));
        }
    }
}
