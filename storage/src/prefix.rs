//! The part of a segment that recovery need not scan.
//!
//! Owns: where the scan of the recovery point's segment may begin. Refuses: to guess; where anything is missing or does not fit, the
//! segment is scanned from its beginning. Read next: `recovery/segment.rs`.
//!
//! Everything before that place was flushed, and is known of without reading it:
//!
//! * The indexes are taken as they are, as those of a sealed segment: an entry is a hint, and checked by whoever follows it. Their files were not
//!   synced, so a crash may have left zeros in them, or an end: what counts is what stands before those. The offset index's last entry that
//!   counts is where the scan begins. The largest timestamp before it is known if the time index reaches at least as far.
//! * The `.crc` vouches for every byte: its entries up to there become those of the log that goes on, and the bytes are compared with
//!   them before they are first served. The 64 KiB in which the scan begins are compared now. If they agree, so does all that
//!   the running checksum covered before, unless the bytes themselves changed since, and then that is found.
//! * What is known of producers stands in a snapshot at or beyond that place, so that no header before it is looked at.
//! * Leader epochs are written before the recovery point passes them.

use std::io::ErrorKind;

use headwater_proto::batch::{BatchHeader, HEADER_BYTES};

use crate::active::{Place, crc_header};
use crate::checkpoint::segment_file_name;
use crate::crcfile::{self, RunningCrc, STEP_BYTES};
use crate::error::{During, IoFailure};
use crate::files::{self, File, read_exact_at};
use crate::index::{self, IndexBuilder, IndexBytes, IndexEntry, LargestTimestamp, OffsetEntry, TimeEntry};
use crate::scan::{IndexAudit, ScanStart};

/// Larger files are no index or checksums of a segment.
const LARGEST_BYTES: u64 = 1 << 30;

/// Where the scan of a segment may begin whose batches below `known_to` were flushed, and hold no producer that is not known of. `None`: at
/// its beginning.
pub(crate) fn find(
    place: Place<'_>,
    file: &dyn File,
    base_offset: i64,
    known_to: i64,
) -> Result<Option<ScanStart>, IoFailure> {
    let path_of = |extension| place.dir.join(segment_file_name(base_offset, extension));
    let path = path_of(".log");
    let len = file.len().during("look at", &path)?;
    let Some(checksums) = read(place, base_offset, ".crc")?.and_then(|bytes| crcfile::decode_leading(&bytes).ok())
    else {
        return Ok(None);
    };
    if checksums.header != crc_header(place.identity, base_offset) {
        return Ok(None);
    }
    let steps = checksums.entries.iter().zip(1..).take_while(|(entry, number)| {
        let end = number * STEP_BYTES;
        u64::from(entry.position) == end && end <= len
    });
    let covered = steps.count() as u64 * STEP_BYTES;
    let offsets_bytes = read(place, base_offset, OffsetEntry::EXTENSION)?.unwrap_or_default();
    let times_bytes = read(place, base_offset, TimeEntry::EXTENSION)?.unwrap_or_default();
    let offsets: Vec<OffsetEntry> = index::leading_entries(&offsets_bytes);
    let times: Vec<TimeEntry> = index::leading_entries(&times_bytes);
    let Some(last_time) = times.last() else { return Ok(None) };
    // The step in which the scan begins must be covered to its end.
    let counts = |entry: &OffsetEntry| {
        base_offset + i64::from(entry.relative_offset) < known_to
            && u64::from(entry.position) < covered
            && entry.relative_offset <= last_time.relative_offset
    };
    let offset_entries = offsets.partition_point(counts);
    let Some(entry) = offset_entries.checked_sub(1).and_then(|last| offsets.get(last)) else { return Ok(None) };
    let position = u64::from(entry.position);
    let step = position / STEP_BYTES;
    let time_entries = times.partition_point(|time| time.relative_offset <= entry.relative_offset);
    let time = time_entries.checked_sub(1).and_then(|last| times.get(last));
    let (Some(time), true) = (time, step > 0) else { return Ok(None) };
    let entries = checksums.entries.get(..step as usize).unwrap_or_default();
    let Some(mut crc) = RunningCrc::resume_whole(entries) else { return Ok(None) };
    let mut bytes = vec![0; STEP_BYTES as usize];
    read_exact_at(file, &mut bytes, step * STEP_BYTES).during("read", &path)?;
    let mut ahead = crc.clone();
    ahead.update(&bytes);
    if checksums.entries.get(step as usize) != Some(&ahead.entry()) {
        return Ok(None);
    }
    let before = (position - step * STEP_BYTES) as usize;
    crc.update(bytes.get(..before).unwrap_or_default());
    let mut head = [0; HEADER_BYTES];
    read_exact_at(file, &mut head, position).during("read", &path)?;
    let last_offset = base_offset + i64::from(entry.relative_offset);
    let fits = |header: &BatchHeader| header.last_offset() == last_offset && header.max_timestamp <= time.timestamp;
    let Some(header) = BatchHeader::parse(&head).ok().filter(fits) else { return Ok(None) };
    read_exact_at(file, &mut head, 0).during("read", &path)?;
    let Ok(first) = BatchHeader::parse(&head) else { return Ok(None) };
    let largest = LargestTimestamp { timestamp: time.timestamp, offset: base_offset + i64::from(time.relative_offset) };
    let mut builder = IndexBuilder::new(base_offset, place.config.index_interval_bytes);
    let bytes_since_entry = header.size() as u64;
    builder.resume(offset_entries, time_entries, Some(time.timestamp), Some(largest), bytes_since_entry);
    let (offsets, later_offsets) = offsets_bytes.split_at(offset_entries * OffsetEntry::SIZE);
    let (times, later_times) = times_bytes.split_at(time_entries * TimeEntry::SIZE);
    Ok(Some(ScanStart {
        position,
        next_offset: header.base_offset,
        unchecked: step * STEP_BYTES,
        indexed: position + header.size() as u64,
        first_timestamp: Some(first.max_timestamp),
        index: builder,
        entries: IndexBytes { offsets: offsets.to_vec(), times: times.to_vec() },
        audit: IndexAudit::new(
            base_offset,
            Some(later_offsets.to_vec()),
            Some(later_times.to_vec()),
            largest.timestamp,
        ),
        crc,
    }))
}

fn read(place: Place<'_>, base_offset: i64, extension: &str) -> Result<Option<Vec<u8>>, IoFailure> {
    let path = place.dir.join(segment_file_name(base_offset, extension));
    match files::read(&**place.files, &path, LARGEST_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::FileTooLarge) => Ok(None),
        Err(error) => Err(IoFailure::new("read", &path, error)),
    }
}
