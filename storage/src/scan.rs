//! Looking at a segment's bytes: whole, or only at its ends.
//!
//! Owns: the scan that checks every batch, the quick check of a segment that ought to be complete, and the search for a valid batch
//! among bytes that are none. Refuses: judging what it finds (`recovery.rs`). Read next: `recovery.rs`.

use std::io::{ErrorKind, IoSlice};
use std::path::Path;
use std::sync::Arc;

use headwater_proto::batch::{self, BatchError, BatchHeader, HEADER_BYTES};

use crate::active::{Place, crc_header, read_crc_file};
use crate::checkpoint::segment_file_name;
use crate::crcfile::{self, RunningCrc, STEP_BYTES};
use crate::epochs::{EpochEntry, LeaderEpochs};
use crate::error::{Corruption, During, IoFailure, OpenError, ReadError};
use crate::files::{File, Files, Metadata, OpenMode, read_exact_at};
use crate::index::{IndexBuilder, IndexBytes, IndexEntry, LargestTimestamp, OffsetEntry, TimeEntry, decode_entries};
use crate::segment::Segment;
use crate::verify;

/// Bytes read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Entries that an offset index of Kafka's may lack at its end before it counts as incomplete. Ours lacks none.
const MOST_MISSING_ENTRIES: u64 = 1;

/// What a scan demands of batches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScanRules {
    pub(crate) base_offset: i64,
    /// From this offset on, no offset may be missing. Before, offsets may only rise.
    pub(crate) exact_from: i64,
    /// Whether the log is compacted, so that its last batch may follow a gap.
    pub(crate) compacted: bool,
    /// Where the next segment begins.
    pub(crate) next_base: Option<i64>,
    /// Batches that end at or beyond this offset are written again, because nobody knows whether they reached the disk.
    pub(crate) rewrite_from: i64,
}

/// Where a scan begins, and what is known of the bytes before.
#[derive(Debug)]
pub(crate) struct ScanStart {
    /// Where a batch begins.
    pub(crate) position: u64,
    /// The offset that is next there.
    pub(crate) next_offset: i64,
    /// Bytes before this position are not checked.
    pub(crate) unchecked: u64,
    /// The indexes know the batches that begin before this position.
    pub(crate) indexed: u64,
    pub(crate) first_timestamp: Option<i64>,
    pub(crate) index: IndexBuilder,
    pub(crate) entries: IndexBytes,
    pub(crate) audit: IndexAudit,
    /// Up to `position`.
    pub(crate) crc: RunningCrc,
}

impl ScanStart {
    /// At the segment's beginning.
    pub(crate) fn beginning(index: IndexBuilder, audit: IndexAudit, crc: RunningCrc, base_offset: i64) -> ScanStart {
        ScanStart {
            position: 0,
            next_offset: base_offset,
            unchecked: 0,
            indexed: 0,
            first_timestamp: None,
            index,
            entries: IndexBytes::default(),
            audit,
            crc,
        }
    }
}

/// What a scan found.
#[derive(Debug)]
pub(crate) struct SegmentScan {
    pub(crate) base_offset: i64,
    /// Where the scan began.
    pub(crate) began: u64,
    /// Bytes before this position were not checked.
    pub(crate) unchecked: u64,
    /// The file's length.
    pub(crate) len: u64,
    /// Where the valid batches end.
    pub(crate) end: u64,
    pub(crate) next_offset: i64,
    /// Where the batches end that did not have to be written again.
    pub(crate) flushed: u64,
    pub(crate) batches: u64,
    pub(crate) first_timestamp: Option<i64>,
    pub(crate) index: IndexBuilder,
    pub(crate) entries: IndexBytes,
    pub(crate) crc: RunningCrc,
    pub(crate) audit: IndexAudit,
    /// What ended the scan before the file's end.
    pub(crate) fault: Option<Fault>,
}

/// Where the bytes of a segment are no batch, or not the next one.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) position: u64,
    pub(crate) expected_offset: i64,
    pub(crate) detail: String,
    /// Nothing but zeros from there on: space that was reserved.
    pub(crate) zeros_follow: bool,
    /// A zeroed header and then other bytes: the end of a recycled file (or a hole in a torn write).
    pub(crate) stale_follows: bool,
    /// Nothing but the batch's leader epoch is wrong, or else what is known of leader epochs.
    pub(crate) only_epoch: bool,
}

/// Compares the leader epochs of batches with what is known of them, and learns of those that are new.
#[derive(Debug)]
pub(crate) struct EpochAudit<'a> {
    pub(crate) epochs: &'a mut LeaderEpochs,
    /// The history is exact below this offset. From there on leaders may have written of which it does not know, and the newest of those that
    /// it knows may have written nothing.
    pub(crate) exact_below: i64,
    pub(crate) changed: bool,
}

impl EpochAudit<'_> {
    /// What is wrong with the leader epoch of a batch that is whole; `next` is the header behind it, if one can be read there.
    fn contradiction(&mut self, header: &BatchHeader, next: Option<&BatchHeader>) -> Option<String> {
        let (epoch, base_offset) = (header.leader_epoch, header.base_offset);
        if base_offset < self.exact_below || epoch < 0 {
            return self.epochs.contradiction(header);
        }
        let wrote_nothing = |last: &&EpochEntry| {
            last.start_offset == base_offset
                && epoch < last.epoch
                && next.is_none_or(|next| next.leader_epoch != last.epoch)
        };
        if self.epochs.entries().last().filter(wrote_nothing).is_some() {
            self.epochs.truncate_from(base_offset);
            self.changed = true;
        }
        if self.epochs.latest().is_some_and(|latest| epoch <= latest) {
            return self.epochs.contradiction(header);
        }
        let falls =
            |next: &&BatchHeader| next.base_offset == header.next_offset() && (0..epoch).contains(&next.leader_epoch);
        if let Some(next) = next.filter(falls) {
            return Some(format!("leader epoch {epoch}, and the batch behind it is of {}", next.leader_epoch));
        }
        self.changed |= self.epochs.assign(epoch, base_offset);
        None
    }
}

impl Fault {
    pub(crate) fn corruption(&self, path: &Path) -> Corruption {
        Corruption {
            path: path.into(),
            position: self.position,
            offset: Some(self.expected_offset),
            detail: self.detail.clone(),
        }
    }
}

/// Checks every batch of a segment from `start` on, up to the first that is invalid or not the next one.
pub(crate) fn scan_segment(
    file: &dyn File,
    path: &Path,
    rules: ScanRules,
    start: ScanStart,
    epochs: &mut EpochAudit<'_>,
    mut on_batch: impl FnMut(&BatchHeader),
) -> Result<SegmentScan, IoFailure> {
    let len = file.len().during("look at", path)?;
    let mut scan = SegmentScan {
        base_offset: rules.base_offset,
        began: start.position,
        unchecked: start.unchecked,
        len,
        end: start.position,
        next_offset: start.next_offset,
        flushed: start.position,
        batches: 0,
        first_timestamp: start.first_timestamp,
        index: start.index,
        entries: start.entries,
        crc: start.crc,
        audit: start.audit,
        fault: None,
    };
    let mut window = Window { file, path, len, bytes: Vec::new(), at: 0 };
    while scan.end < len {
        let expected = scan.next_offset;
        let ahead = window.header_ahead(scan.end)?;
        let found = window.batch(scan.end)?;
        let mut only_epoch = false;
        let detail = match &found {
            Ok((header, _)) if header.base_offset < expected => {
                format!("a batch of offset {}, where {expected} is next", header.base_offset)
            }
            Ok((header, _)) if header.base_offset > expected && expected >= rules.exact_from => {
                format!("a batch of offset {}, where {expected} is next", header.base_offset)
            }
            // Base offsets are outside the batch's checksum. Behind a true gap the log goes on; behind a damaged offset it goes back.
            Ok((header, _))
                if header.base_offset > expected
                    && ahead
                        .map(|header| header.base_offset)
                        .or(rules.next_base)
                        .map_or(!rules.compacted, |next| next < header.next_offset()) =>
            {
                format!(
                    "a batch of offset {}, which the one behind it does not follow; {expected} is next",
                    header.base_offset
                )
            }
            Ok((header, _)) if header.last_offset() - rules.base_offset > i64::from(u32::MAX) => {
                format!("offset {} is too far from the segment's base", header.last_offset())
            }
            Ok((header, batch)) => match epochs.contradiction(header, ahead.as_ref()) {
                Some(detail) => {
                    only_epoch = true;
                    detail
                }
                None => {
                    if header.last_offset() >= rules.rewrite_from {
                        file.write_at(scan.end, &[IoSlice::new(batch)]).during("write", path)?;
                    } else {
                        scan.flushed = scan.end + batch.len() as u64;
                    }
                    on_batch(header);
                    scan.audit.batch(header, scan.end);
                    if scan.end >= start.indexed {
                        scan.index.batch(header, scan.end, &mut scan.entries);
                    }
                    scan.crc.update(batch);
                    scan.first_timestamp = scan.first_timestamp.or(Some(header.max_timestamp));
                    scan.next_offset = header.next_offset();
                    scan.end += batch.len() as u64;
                    scan.batches += 1;
                    continue;
                }
            },
            Err(error) => error.to_string(),
        };
        let zeros = window.zeros_from(scan.end)?;
        scan.fault = Some(Fault {
            position: scan.end,
            expected_offset: expected,
            detail,
            zeros_follow: scan.end + zeros == len,
            stale_follows: scan.end + zeros < len && zeros >= HEADER_BYTES as u64,
            only_epoch,
        });
        break;
    }
    Ok(scan)
}

/// Compares the entries that were found in a segment's index files with the batches that a scan comes by. There may be fewer than
/// there should be, or more (each close adds to the time index); none may be wrong.
#[derive(Debug)]
pub(crate) struct IndexAudit {
    base_offset: i64,
    offsets: std::vec::IntoIter<OffsetEntry>,
    times: std::vec::IntoIter<TimeEntry>,
    next_offset: Option<OffsetEntry>,
    next_time: Option<TimeEntry>,
    largest: i64,
    pub(crate) wrong_offsets: bool,
    pub(crate) wrong_times: bool,
}

impl IndexAudit {
    /// Of two index files' bytes; a missing one is no fault here. `largest` is the largest timestamp of the batches before.
    pub(crate) fn new(base_offset: i64, offsets: Option<Vec<u8>>, times: Option<Vec<u8>>, largest: i64) -> IndexAudit {
        let offsets = offsets.map_or(Ok(Vec::new()), |bytes| decode_entries(&bytes));
        let times = times.map_or(Ok(Vec::new()), |bytes| decode_entries(&bytes));
        let (wrong_offsets, wrong_times) = (offsets.is_err(), times.is_err());
        let (mut offsets, mut times) = (offsets.unwrap_or_default().into_iter(), times.unwrap_or_default().into_iter());
        let (next_offset, next_time) = (offsets.next(), times.next());
        IndexAudit { base_offset, offsets, times, next_offset, next_time, largest, wrong_offsets, wrong_times }
    }

    fn batch(&mut self, header: &BatchHeader, position: u64) {
        self.largest = self.largest.max(header.max_timestamp);
        let last_offset = header.last_offset();
        while let Some(entry) = self.next_offset {
            let offset = self.base_offset + i64::from(entry.relative_offset);
            if offset > last_offset {
                break;
            }
            self.wrong_offsets |= offset != last_offset || u64::from(entry.position) != position;
            self.next_offset = self.offsets.next();
        }
        while let Some(entry) = self.next_time {
            let offset = self.base_offset + i64::from(entry.relative_offset);
            if offset > last_offset {
                break;
            }
            self.wrong_times |= offset < header.base_offset || entry.timestamp != self.largest;
            self.next_time = self.times.next();
        }
    }
}

/// A piece of a file in memory.
struct Window<'a> {
    file: &'a dyn File,
    path: &'a Path,
    len: u64,
    bytes: Vec<u8>,
    at: u64,
}

impl Window<'_> {
    /// Up to `count` bytes from a position on; fewer only at the end of the file.
    fn bytes(&mut self, position: u64, count: usize) -> Result<&[u8], IoFailure> {
        let have = self.at + self.bytes.len() as u64;
        let wanted = (count as u64).min(self.len.saturating_sub(position));
        if position < self.at || position + wanted > have {
            let read = (self.len.saturating_sub(position)).min(wanted.max(CHUNK_BYTES as u64));
            self.bytes.resize(read as usize, 0);
            self.at = position;
            read_exact_at(self.file, &mut self.bytes, position).during("read", self.path)?;
        }
        let start = (position - self.at) as usize;
        Ok(self.bytes.get(start..start + wanted as usize).unwrap_or_default())
    }

    /// The checked batch at a position.
    fn batch(&mut self, position: u64) -> Result<Result<(BatchHeader, &[u8]), BatchError>, IoFailure> {
        let header = match BatchHeader::parse(self.bytes(position, HEADER_BYTES)?) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let bytes = self.bytes(position, header.size())?;
        Ok(batch::check(bytes).map(|header| (header, bytes)))
    }

    /// The header behind the batch at a position, if there is one. What is in memory stays there.
    fn header_ahead(&mut self, position: u64) -> Result<Option<BatchHeader>, IoFailure> {
        let Ok(header) = BatchHeader::parse(self.bytes(position, HEADER_BYTES)?) else { return Ok(None) };
        let behind = position + header.size() as u64;
        if behind + HEADER_BYTES as u64 > self.len {
            return Ok(None);
        }
        if behind + HEADER_BYTES as u64 <= self.at + self.bytes.len() as u64 {
            return Ok(BatchHeader::parse(self.bytes(behind, HEADER_BYTES)?).ok());
        }
        let mut bytes = [0; HEADER_BYTES];
        read_exact_at(self.file, &mut bytes, behind).during("read", self.path)?;
        Ok(BatchHeader::parse(&bytes).ok())
    }

    /// How many zero bytes there are from a position on.
    fn zeros_from(&mut self, position: u64) -> Result<u64, IoFailure> {
        let mut at = position;
        while at < self.len {
            let bytes = self.bytes(at, CHUNK_BYTES)?;
            match bytes.iter().position(|byte| *byte != 0) {
                Some(first) => return Ok(at + first as u64 - position),
                None => at += bytes.len() as u64,
            }
        }
        Ok(at - position)
    }
}

/// The checked batch at a position, if there is one.
pub(crate) fn batch_at(
    file: &dyn File,
    path: &Path,
    position: u64,
    len: u64,
) -> Result<Option<BatchHeader>, IoFailure> {
    let mut window = Window { file, path, len, bytes: Vec::new(), at: 0 };
    Ok(window.batch(position)?.ok().map(|(header, _)| header))
}

/// The first position from `from` on where a valid batch lies that could follow `expected_offset`.
pub(crate) fn find_batch(
    file: &dyn File,
    path: &Path,
    from: u64,
    len: u64,
    expected_offset: i64,
) -> Result<Option<u64>, IoFailure> {
    /// Where in a batch its magic stands.
    const MAGIC_AT: usize = 16;
    let mut window = Window { file, path, len, bytes: Vec::new(), at: 0 };
    let mut start = from;
    while start + HEADER_BYTES as u64 <= len {
        let bytes = window.bytes(start, CHUNK_BYTES)?;
        let candidates: Vec<u64> = bytes
            .windows(HEADER_BYTES)
            .enumerate()
            .filter(|(_, header)| header.get(MAGIC_AT) == Some(&2))
            .filter_map(|(at, header)| Some((start + at as u64, BatchHeader::parse(header).ok()?)))
            .filter(|(at, header)| {
                let ahead = header.base_offset.saturating_sub(expected_offset);
                (0..i64::from(u32::MAX)).contains(&ahead) && header.size() as u64 <= len - at
            })
            .map(|(at, _)| at)
            .collect();
        let looked_at = (bytes.len() + 1 - HEADER_BYTES) as u64;
        for position in candidates {
            if batch_at(file, path, position, len)?.is_some() {
                return Ok(Some(position));
            }
        }
        start += looked_at;
    }
    Ok(None)
}

/// The answer of [`check_segment`].
#[derive(Debug)]
pub(crate) enum Checked {
    /// Its files fit together.
    Complete(Complete),
    /// They do not; the reason. The segment has to be read whole.
    Suspect(&'static str),
    /// But for an index or the checksums, of which the end is missing. The segment has to be read whole.
    CutIndex(CutIndex),
    /// They do, but for the leader epoch of this batch, or what is known of leader epochs.
    WrongEpoch(Corruption),
}

/// An index or a checksum file that ends before an entry that must be there.
#[derive(Debug)]
pub(crate) struct CutIndex {
    pub(crate) extension: &'static str,
    /// Where the file's entries end.
    pub(crate) position: u64,
}

/// A segment whose files fit together.
#[derive(Debug)]
pub(crate) struct Complete {
    pub(crate) segment: Arc<Segment>,
    pub(crate) size: u64,
    pub(crate) next_offset: i64,
    pub(crate) index: IndexBuilder,
    pub(crate) crc: Option<RunningCrc>,
    pub(crate) first_timestamp: Option<i64>,
}

/// Looks at the ends of a segment's files. Nothing is read between the last index entry and the beginning.
pub(crate) fn check_segment(
    place: Place<'_>,
    base_offset: i64,
    metadata: Metadata,
    next_base: Option<i64>,
    epochs: Option<&LeaderEpochs>,
) -> Result<Checked, OpenError> {
    let Place { files, dir, identity, config } = place;
    let size = metadata.len;
    let path_of = |extension| dir.join(segment_file_name(base_offset, extension));
    let crc = match read_crc_file(&**files, &path_of(".crc"))? {
        None if size == 0 => Some(RunningCrc::new(&crc_header(identity, base_offset))),
        None => None,
        Some(Err(_)) => return Ok(Checked::Suspect("its checksum file is damaged")),
        Some(Ok(file)) if file.header != crc_header(identity, base_offset) => {
            return Ok(Checked::Suspect("its checksum file is another segment's"));
        }
        Some(Ok(file)) => match file.entries.last() {
            // Kafka may have compacted the segment; nothing else makes one shorter.
            Some(last) if u64::from(last.position) > size && config.cleanup.compact && next_base.is_some() => {
                return Ok(Checked::Suspect("its checksum file reaches beyond its end"));
            }
            Some(last) if u64::from(last.position) > size => {
                let detail = format!("the file ends here, though {} bytes were written", last.position);
                let (path, offset) = (path_of(".log"), None);
                return Err(Corruption { path, position: size, offset, detail }.into());
            }
            Some(last) if u64::from(last.position) == size => {
                let before = file.entries.len() - usize::from(!size.is_multiple_of(STEP_BYTES));
                Some(RunningCrc::resume(*last, before))
            }
            None if size == 0 => Some(RunningCrc::new(&crc_header(identity, base_offset))),
            _ => {
                let position = (crcfile::HEADER_BYTES + file.entries.len() * crcfile::ENTRY_BYTES) as u64;
                return Ok(Checked::CutIndex(CutIndex { extension: ".crc", position }));
            }
        },
    };
    let index = |extension| match files.metadata(&path_of(extension)) {
        Ok(metadata) => Ok(metadata.len),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(IoFailure::new("look at", &path_of(extension), error)),
    };
    let (offsets_len, times_len) = (index(OffsetEntry::EXTENSION)?, index(TimeEntry::EXTENSION)?);
    let mut builder = IndexBuilder::new(base_offset, config.index_interval_bytes);
    if size == 0 {
        if offsets_len > 0 || times_len > 0 {
            return Ok(Checked::Suspect("it is empty, its indexes are not"));
        }
        let segment = Segment::new(Arc::clone(files), Arc::clone(dir), base_offset, 0, 0, 0);
        let next_offset = base_offset;
        return Ok(Checked::Complete(Complete {
            segment,
            size,
            next_offset,
            index: builder,
            crc,
            first_timestamp: None,
        }));
    }
    let cut = |extension, position| Ok(Checked::CutIndex(CutIndex { extension, position }));
    for (extension, len, entry) in [
        (OffsetEntry::EXTENSION, offsets_len, OffsetEntry::SIZE as u64),
        (TimeEntry::EXTENSION, times_len, TimeEntry::SIZE as u64),
    ] {
        if !len.is_multiple_of(entry) {
            return cut(extension, len / entry * entry);
        }
    }
    let segment = Segment::new(Arc::clone(files), Arc::clone(dir), base_offset, size, offsets_len, times_len);
    if times_len == 0 {
        // There is nothing in it only if no batch has a timestamp.
        return match segment.header_at(0) {
            Ok(first) if first.max_timestamp >= 0 => cut(TimeEntry::EXTENSION, 0),
            _ => Ok(Checked::Suspect("its time index is empty")),
        };
    }
    let index_path = path_of(OffsetEntry::EXTENSION);
    let last_offset_entry: Option<OffsetEntry> = last_entry(&**files, &index_path, offsets_len)?;
    let last_time_entry: Option<TimeEntry> = last_entry(&**files, &path_of(TimeEntry::EXTENSION), times_len)?;
    let start = last_offset_entry.map_or(0, |entry| u64::from(entry.position));
    if last_offset_entry.is_some_and(|entry| entry.position == 0) || start >= size {
        return Ok(Checked::Suspect("its offset index points nowhere"));
    }
    let Some(time) = last_time_entry else { return Ok(Checked::Suspect("its time index is empty")) };
    let interval = match crc.is_some() {
        true => interval_of(&segment, &index_path, offsets_len, config.index_interval_bytes)?,
        false => u64::from(config.index_interval_bytes),
    };
    let most_missing = if crc.is_some() { 0 } else { MOST_MISSING_ENTRIES };
    let mut walk = segment.headers(start).map_err(open_error)?;
    let mut first_of_walk = true;
    let mut next_offset = base_offset;
    let mut bytes_since_entry = 0;
    let mut missing = 0;
    let mut largest =
        LargestTimestamp { timestamp: time.timestamp, offset: base_offset + i64::from(time.relative_offset) };
    loop {
        let (position, header) = match walk.next() {
            Ok(Some((position, header))) => (position, header),
            Ok(None) => break,
            Err(ReadError::Corruption(_)) => return Ok(Checked::Suspect("its end is no batch")),
            Err(error) => return Err(open_error(error)),
        };
        let expected = last_offset_entry.map(|entry| base_offset + i64::from(entry.relative_offset));
        if std::mem::take(&mut first_of_walk) && expected.is_some_and(|expected| expected != header.last_offset()) {
            return Ok(Checked::Suspect("its offset index points at another batch"));
        }
        if header.base_offset < next_offset {
            return Ok(Checked::Suspect("its offsets do not rise"));
        }
        if let Some(detail) = epochs.and_then(|epochs| epochs.contradiction(&header)) {
            let (path, offset) = (segment.log_path(), Some(header.base_offset));
            return Ok(Checked::WrongEpoch(Corruption { path, position, offset, detail }));
        }
        if bytes_since_entry > interval * (missing + 1) {
            missing += 1;
        }
        if missing > most_missing {
            return cut(OffsetEntry::EXTENSION, offsets_len);
        }
        if header.max_timestamp > largest.timestamp {
            // Ours ends with the largest timestamp.
            if crc.is_some() {
                return cut(TimeEntry::EXTENSION, times_len);
            }
            largest = LargestTimestamp { timestamp: header.max_timestamp, offset: header.last_offset() };
        }
        bytes_since_entry += header.size() as u64;
        next_offset = header.next_offset();
    }
    if next_base.is_some_and(|next_base| next_offset > next_base) {
        return Ok(Checked::Suspect("it reaches into the next segment"));
    }
    let offset = base_offset + i64::from(time.relative_offset);
    if !names_its_batch(&segment, offset, time.timestamp)? {
        return Ok(Checked::Suspect("its time index points at another batch"));
    }
    let first_timestamp = match segment.header_at(0) {
        Ok(header) => Some(header.max_timestamp),
        Err(ReadError::Corruption(_)) => return Ok(Checked::Suspect("its beginning is no batch")),
        Err(error) => return Err(open_error(error)),
    };
    builder.resume(
        (offsets_len / OffsetEntry::SIZE as u64) as usize,
        (times_len / TimeEntry::SIZE as u64) as usize,
        Some(time.timestamp),
        Some(largest),
        bytes_since_entry,
    );
    segment.verified.distrust(size);
    if next_base.is_none() {
        // The log goes on behind these bytes, and the checksum of the last step with it: check that now.
        let boundary = last_offset_entry.map_or(0, |entry| u64::from(entry.position));
        let from = if crc.is_some() { size / STEP_BYTES * STEP_BYTES } else { boundary };
        let open = segment.open().map_err(open_error)?;
        match verify::verify(&segment, &open, from..size, boundary) {
            Ok(()) if crc.is_some() && segment.verified.ignores_crc() => {
                return Ok(Checked::Suspect("its checksum file disagrees"));
            }
            Ok(()) => segment.verified.distrust(from),
            Err(ReadError::Corruption(corruption)) => return Err(corruption.into()),
            Err(error) => return Err(open_error(error)),
        }
    }
    Ok(Checked::Complete(Complete { segment, size, next_offset, index: builder, crc, first_timestamp }))
}

/// The interval at which a segment of ours got its index entries: that of the settings, if the last two entries fit it, else one that is
/// not smaller than it was.
fn interval_of(segment: &Arc<Segment>, path: &Path, offsets_len: u64, configured: u32) -> Result<u64, OpenError> {
    let configured = u64::from(configured);
    let size = OffsetEntry::SIZE as u64;
    let Some(earlier_len) = offsets_len.checked_sub(size) else { return Ok(configured) };
    let position = |len| {
        last_entry::<OffsetEntry>(segment.files(), path, len)
            .map(|entry| entry.map_or(0, |entry| u64::from(entry.position)))
    };
    let (from, to) = (position(earlier_len)?, position(offsets_len)?);
    if from >= to {
        return Ok(configured);
    }
    // An entry is due once more than the interval lies behind the one before; the last batch made it so.
    let mut before_last = from;
    let mut headers = segment.headers(from).map_err(open_error)?.until(to);
    loop {
        match headers.next() {
            Ok(Some((position, _))) => before_last = position,
            Ok(None) if (before_last - from..to - from).contains(&configured) => return Ok(configured),
            // Something else was set: there is surely an entry after as many bytes.
            Ok(None) => return Ok(configured.max(to - from - 1)),
            Err(ReadError::Corruption(_)) => return Ok(configured),
            Err(error) => return Err(open_error(error)),
        }
    }
}

/// Whether the batch that holds an offset has this largest timestamp.
fn names_its_batch(segment: &Arc<Segment>, offset: i64, timestamp: i64) -> Result<bool, OpenError> {
    let found = (|| {
        let mut headers = segment.headers(segment.position_before(offset)?)?;
        while let Some((_, header)) = headers.next()? {
            if header.last_offset() >= offset {
                return Ok(header.base_offset <= offset && header.max_timestamp == timestamp);
            }
        }
        Ok(false)
    })();
    match found {
        Err(ReadError::Corruption(_)) => Ok(false),
        result => result.map_err(open_error),
    }
}

fn last_entry<E: IndexEntry>(files: &dyn Files, path: &Path, len: u64) -> Result<Option<E>, IoFailure> {
    if len == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; E::SIZE];
    let read = || {
        let file = files.open(path, OpenMode::Read)?;
        read_exact_at(&*file, &mut bytes, len - E::SIZE as u64)
    };
    let mut read = read;
    read().during("read", path)?;
    Ok(E::decode(&bytes))
}

fn open_error(error: ReadError) -> OpenError {
    match error {
        ReadError::Io(failure) => failure.into(),
        ReadError::Corruption(corruption) => corruption.into(),
        error => OpenError::Misuse(error.to_string()),
    }
}
