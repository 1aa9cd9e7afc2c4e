//! Holds a segment's `.crc` against its bytes.
//!
//! Owns: what a disagreement means. The checksum runs, but two neighbouring entries say whether the 64 KiB between them agree by
//! themselves, so a disagreement is placed, and a damaged entry told from damaged bytes. Bytes that changed in place (what follows
//! agrees again, or the length is what it was when the segment was closed) are damage, whatever their batches say; a segment that
//! Kafka compacted or appended to differs to its end, and that is a note. So is a header that names another partition: the folder was copied under
//! this name, or the `.crc` alone is another's. Refuses: to find out whose a segment is (`../foreign.rs` has, before).

use std::io::ErrorKind;

use headwater_proto::TopicId;

use super::{Findings, sibling_name};
use crate::crcfile::{self, CrcEntry, CrcFile};
use crate::files::OpenMode;
use crate::inspect::{FaultKind, InspectError, SegmentFile, Target, at};

/// A `.crc` that could be read.
pub(super) struct CrcCheck {
    file: String,
    decoded: CrcFile,
}

impl CrcCheck {
    /// Reads the `.crc` of a segment; `None` if there is none (Kafka wrote the segment), or none that can be used.
    pub(super) fn read(
        target: &Target,
        segment: &SegmentFile,
        findings: &mut Findings,
    ) -> Result<Option<CrcCheck>, InspectError> {
        let file = sibling_name(segment, "crc");
        let Some(bytes) = target.small_file(&segment.sibling("crc"))? else { return Ok(None) };
        let decoded = match crcfile::decode(&bytes) {
            Ok(decoded) => decoded,
            Err(fault) => {
                findings.fault(&file, fault.position, None, FaultKind::Crc, fault.detail);
                return Ok(None);
            }
        };
        let header = decoded.header;
        let other = |what: &str, its: String, ours: String| format!("was written for {what} {its}; this is {ours}");
        if let Some(id) = target.topic_id().filter(|id| *id != header.topic_id) {
            findings.note(&file, 8, None, FaultKind::Crc, other("topic", header.topic_id.to_string(), id.to_string()));
        }
        if let Some((_, partition)) = target.partition().filter(|(_, partition)| *partition != header.partition) {
            findings.note(
                &file,
                24,
                None,
                FaultKind::Crc,
                other("partition", header.partition.to_string(), partition.to_string()),
            );
        }
        if header.base_offset != segment.base_offset {
            findings.note(
                &file,
                28,
                None,
                FaultKind::Crc,
                other("segment", header.base_offset.to_string(), segment.base_offset.to_string()),
            );
        }
        Ok(Some(CrcCheck { file, decoded }))
    }

    /// The topic that it was written for.
    pub(super) fn topic_id(&self) -> TopicId {
        self.decoded.header.topic_id
    }

    /// Whether it was made for a log of this length.
    pub(super) fn ends_at(&self, log_end: u64) -> bool {
        self.decoded.entries.last().map_or(0, |last| u64::from(last.position)) == log_end
    }

    /// Compares. `closed`: nothing is written to the segment any more. `damaged`: ranges of the log that are known to be.
    pub(super) fn run(
        self,
        target: &Target,
        segment: &SegmentFile,
        log_end: u64,
        closed: bool,
        damaged: &[(u64, u64)],
        findings: &mut Findings,
    ) -> Result<(), InspectError> {
        let log = segment.name();
        let handle = match target.files.open(&segment.path, OpenMode::Read) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            answer => answer.map_err(at(&segment.path))?,
        };
        let len = handle.len().map_err(at(&segment.path))?;
        let seed = crc32fast::hash(&self.decoded.header.encode());
        let mut outcome: Vec<(u64, CrcEntry, Chunk)> = Vec::with_capacity(self.decoded.entries.len());
        let mut previous = CrcEntry { position: 0, crc: seed };
        let mut running = seed;
        let mut buffer = Vec::new();
        for entry in &self.decoded.entries {
            let (start, end) = (u64::from(previous.position), u64::from(entry.position));
            if end > len {
                let detail = format!("covers {end} bytes of the log, which has {len}");
                findings.fault(&log, len, None, FaultKind::Crc, format!("{} {detail}", self.file));
                break;
            }
            buffer.resize((end - start) as usize, 0);
            crate::files::read_exact_at(&*handle, &mut buffer, start).map_err(at(&segment.path))?;
            let extended = |from: u32| {
                let mut hasher = crc32fast::Hasher::new_with_initial(from);
                hasher.update(&buffer);
                hasher.finalize()
            };
            running = extended(running);
            let chunk = if running == entry.crc {
                Chunk::Agrees
            } else if extended(previous.crc) == entry.crc {
                running = entry.crc;
                Chunk::AgreesAgain
            } else {
                Chunk::Differs
            };
            outcome.push((start, *entry, chunk));
            previous = *entry;
        }
        let last = self.decoded.entries.last().map_or(0, |entry| u64::from(entry.position));
        if closed && last < log_end {
            let detail = format!("ends at byte {last} of the log's {log_end}: nothing vouches for the rest");
            let position = (crcfile::HEADER_BYTES + self.decoded.entries.len() * crcfile::ENTRY_BYTES) as u64;
            findings.note(&self.file, position, None, FaultKind::Crc, detail);
        }
        let unchanged_length =
            closed && self.decoded.entries.last().is_some_and(|last| u64::from(last.position) == log_end);
        for (index, (start, entry, chunk)) in outcome.iter().enumerate() {
            let known = damaged.iter().any(|(from, to)| *from < u64::from(entry.position) && *start < *to);
            if *chunk != Chunk::Differs || known {
                continue;
            }
            let next = outcome.get(index + 1).map(|(_, _, chunk)| *chunk);
            let detail =
                format!("bytes {start} to {} are not those that {} was written for", entry.position, self.file);
            match next {
                Some(Chunk::Agrees) => {
                    let position = (crcfile::HEADER_BYTES + index * crcfile::ENTRY_BYTES) as u64;
                    findings.fault(&self.file, position, None, FaultKind::Crc, "the entry is wrong, the log is not");
                }
                Some(Chunk::AgreesAgain) => findings.fault(&log, *start, None, FaultKind::Crc, detail),
                _ if unchanged_length => findings.fault(&log, *start, None, FaultKind::Crc, detail),
                _ => {
                    let detail = format!(
                        "{detail}, and every batch there is whole: something else wrote here, or its `.crc` is another segment's"
                    );
                    findings.note(&log, *start, None, FaultKind::Crc, detail);
                }
            }
        }
        Ok(())
    }
}

/// How 64 KiB of the log compare with the entries around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// Everything up to their end agrees.
    Agrees,
    /// They agree, what lies before them does not.
    AgreesAgain,
    /// They do not agree.
    Differs,
}
