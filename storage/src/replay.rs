//! What is known of a log's producers, from its snapshots and its batches.
//!
//! Owns: which snapshot is begun with, and the walk over the headers behind it. Refuses: what a batch means to its producer
//! (`producers.rs`), and writing snapshots (`log.rs`). Read next: `refill.rs`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use headwater_proto::batch::{BatchHeader, Records, control};

use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::error::{During, IoFailure, ReadError};
use crate::files::{self, Files, read_exact_at};
use crate::producers::{self, ProducerState};
use crate::reader::SegmentEntry;
use crate::refill;
use crate::segment::Segment;

/// Removes the producers' snapshots at the offsets that are named.
pub(crate) fn remove_snapshots(files: &dyn Files, dir: &Path, which: impl Fn(i64) -> bool) -> Result<(), IoFailure> {
    for offset in snapshot_offsets(files, dir)? {
        if which(offset) {
            let path = dir.join(segment_file_name(offset, producers::EXTENSION));
            files.remove_file(&path).during("remove", &path)?;
        }
    }
    Ok(())
}

pub(crate) fn snapshot_offsets(files: &dyn Files, dir: &Path) -> Result<Vec<i64>, IoFailure> {
    let entries = files.list(dir).during("list", dir)?;
    let parsed = entries.iter().filter_map(|entry| parse_segment_file_name(&entry.name));
    Ok(parsed.filter(|(_, extension)| *extension == producers::EXTENSION).map(|(offset, _)| offset).collect())
}

/// The newest snapshot at or before `to` that can be read: its offset, and what it says.
pub(crate) fn newest_snapshot(
    files: &dyn Files,
    dir: &Path,
    to: i64,
    now_ms: i64,
) -> Result<Option<(i64, ProducerState)>, IoFailure> {
    for offset in snapshot_offsets(files, dir)?.into_iter().rev().filter(|offset| *offset <= to) {
        let path = dir.join(segment_file_name(offset, producers::EXTENSION));
        let bytes = files::read(files, &path, 1 << 30).during("read", &path)?;
        if let Ok(entries) = producers::decode_snapshot(&bytes) {
            return Ok(Some((offset, ProducerState::from_snapshot(&entries, now_ms))));
        }
    }
    Ok(None)
}

/// What is known of producers at offset `to`: the newest snapshot that can be read, and the headers after it. Snapshots beyond
/// `to`, damaged ones, and those that belong to no segment and are not the newest, are removed.
pub(crate) fn replay_producers(
    files: &dyn Files,
    dir: &Path,
    entries: &[SegmentEntry],
    to: i64,
    now_ms: i64,
    rebuilt: &mut Vec<PathBuf>,
) -> Result<ProducerState, ReadError> {
    let mut found: Option<(i64, ProducerState)> = None;
    for offset in snapshot_offsets(files, dir)?.into_iter().rev() {
        let path = dir.join(segment_file_name(offset, producers::EXTENSION));
        let of_segment = entries.iter().any(|entry| entry.base_offset() == offset);
        if offset > to || (found.is_some() && !of_segment) {
            files.remove_file(&path).during("remove", &path)?;
            continue;
        }
        if found.is_some() {
            continue;
        }
        let bytes = files::read(files, &path, 1 << 30).during("read", &path)?;
        match producers::decode_snapshot(&bytes) {
            Ok(entries) => found = Some((offset, ProducerState::from_snapshot(&entries, now_ms))),
            Err(fault) => {
                tracing::warn!(path = %path.display(), %fault, "damaged; made anew from the log");
                files.remove_file(&path).during("remove", &path)?;
                rebuilt.push(path);
            }
        }
    }
    let (from, mut state) = found.unwrap_or((i64::MIN, ProducerState::default()));
    replay(entries, from, to, now_ms, &mut state)?;
    if from > i64::MIN {
        // A snapshot holds one batch of each producer.
        refill::refill(files, dir, entries, &mut state)?;
    }
    Ok(state)
}

/// What is known of producers at `to`, where a segment begins: the newest snapshot before it that can be read, and the headers after that.
pub(crate) fn producers_at(
    files: &dyn Files,
    dir: &Path,
    entries: &[SegmentEntry],
    to: i64,
    now_ms: i64,
) -> Result<ProducerState, ReadError> {
    let (from, mut state) = newest_snapshot(files, dir, to, now_ms)?.unwrap_or((i64::MIN, ProducerState::default()));
    replay(entries, from, to, now_ms, &mut state)?;
    Ok(state)
}

/// What will be known of producers when the log is cut at `to`.
pub(crate) fn producers_before(
    files: &dyn Files,
    dir: &Path,
    entries: &[SegmentEntry],
    to: i64,
    now_ms: i64,
) -> Result<ProducerState, ReadError> {
    let mut state = producers_at(files, dir, entries, to, now_ms)?;
    refill::refill(files, dir, entries, &mut state)?;
    Ok(state)
}

/// What is known of producers at `to`, where the log begins with the segments before it (`departed`) about to be removed; `None` if a
/// snapshot says it, or if they do not lead there. They are beyond every check: what a walk over their headers comes upon ends it.
pub(crate) fn producers_owed(
    files: &Arc<dyn Files>,
    dir: &Arc<Path>,
    departed: &[i64],
    to: i64,
    now_ms: i64,
) -> Result<Option<ProducerState>, IoFailure> {
    let newest = newest_snapshot(&**files, dir, to, now_ms)?;
    let (mut reached, mut state) = newest.unwrap_or((i64::MIN, ProducerState::default()));
    if reached == to {
        return Ok(None);
    }
    let from = reached;
    for base_offset in
        departed.get(departed.partition_point(|base| *base <= from).saturating_sub(1)..).unwrap_or_default()
    {
        let path = dir.join(segment_file_name(*base_offset, ".log"));
        let size = files.metadata(&path).during("look at", &path)?.len;
        let segment = Segment::new(Arc::clone(files), Arc::clone(dir), *base_offset, size, 0, 0);
        let entry = SegmentEntry { segment, size, largest: None, last_append_ms: 0 };
        let walked = walk(&entry, from, to, |segment, position, header| {
            note(segment, position, header, now_ms, &mut state)?;
            reached = header.next_offset();
            Ok(())
        });
        match walked {
            Ok(_) | Err(ReadError::Corruption(_)) => {}
            Err(ReadError::Io(failure)) => return Err(failure),
            Err(_) => return Ok(None),
        }
    }
    Ok(Some(state).filter(|_| reached == to))
}

fn replay(
    entries: &[SegmentEntry],
    from: i64,
    to: i64,
    now_ms: i64,
    state: &mut ProducerState,
) -> Result<(), ReadError> {
    let first = entries.partition_point(|entry| entry.base_offset() <= from).saturating_sub(1);
    for entry in entries.get(first..).unwrap_or_default() {
        walk(entry, from, to, |segment, position, header| note(segment, position, header, now_ms, state))?;
    }
    Ok(())
}

/// Visits the headers of a segment's batches that end at or beyond `from` and begin before `to`.
fn walk(
    entry: &SegmentEntry,
    from: i64,
    to: i64,
    mut visit: impl FnMut(&Arc<Segment>, u64, &BatchHeader) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let segment = &entry.segment;
    let start = if entry.base_offset() >= from { 0 } else { segment.position_before(from)? };
    let mut headers = segment.headers(start)?.until(entry.size);
    while let Some((position, header)) = headers.next()?.filter(|(_, header)| header.base_offset < to) {
        if header.last_offset() >= from {
            visit(segment, position, &header)?;
        }
    }
    Ok(())
}

/// Takes note of a batch that is in the log.
fn note(
    segment: &Arc<Segment>,
    position: u64,
    header: &BatchHeader,
    now_ms: i64,
    state: &mut ProducerState,
) -> Result<(), ReadError> {
    if header.is_idempotent() {
        let coordinator_epoch = if header.is_control() { coordinator_epoch(segment, position, header)? } else { None };
        state.replay(header, coordinator_epoch, now_ms);
    }
    Ok(())
}

/// The coordinator epoch in a control batch's marker.
fn coordinator_epoch(segment: &Arc<Segment>, position: u64, header: &BatchHeader) -> Result<Option<i32>, ReadError> {
    let path = segment.log_path();
    let open = segment.open()?;
    let mut bytes = vec![0; header.size()];
    read_exact_at(&*open.file, &mut bytes, position).during("read", &path)?;
    let marker = Records::new(&Bytes::from(bytes)).ok().and_then(|mut records| records.next()).and_then(Result::ok);
    Ok(marker.and_then(|record| record.value).and_then(|value| control::parse_coordinator_epoch(&value).ok()))
}
