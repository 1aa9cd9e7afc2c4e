//! Reading a log while it is written: an immutable picture of it, published after every change, and cursors that move over it.
//!
//! Owns: [`LogReader`], [`Cursor`], [`Slice`]. Refuses: changing anything, and waiting for the write half: a reader takes the newest
//! picture and never a lock that is held during I/O of the log. Read next: `log.rs`.
//!
//! Always, in a picture: `log_start <= log_end`, `flushed <= log_end`, segments in the order of their base offsets and at
//! least one, the last of them being the one that is written.

use std::ops::Range;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use headwater_proto::batch::{BatchHeader, HEADER_BYTES, Records};

use crate::epochs::LeaderEpochs;
use crate::error::{Corruption, During, OutOfRange, ReadError, bad_batch};
use crate::files::read_exact_at;
use crate::index::LargestTimestamp;
use crate::map::Map;
use crate::segment::{Opened, Segment};
use crate::verify;

/// A segment in a picture of the log.
#[derive(Debug, Clone)]
pub(crate) struct SegmentEntry {
    pub(crate) segment: Arc<Segment>,
    /// Bytes. For the last segment of a picture, `View::end_position` counts.
    pub(crate) size: u64,
    /// For the last segment of a picture, `View::largest` counts.
    pub(crate) largest: Option<LargestTimestamp>,
    /// When it was last written, by our clock.
    pub(crate) last_append_ms: i64,
}

impl SegmentEntry {
    pub(crate) fn base_offset(&self) -> i64 {
        self.segment.base_offset
    }
}

/// How many of the newest ends of groups a picture remembers, so that a watermark close to the end costs no search.
const RECENT_ENDS: usize = 8;

/// Ends of groups in the last segment: an offset and the position where everything before it ends.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RecentEnds {
    ends: [(i64, u64); RECENT_ENDS],
    next: usize,
}

impl RecentEnds {
    pub(crate) fn push(&mut self, offset: i64, position: u64) {
        self.ends[self.next % RECENT_ENDS] = (offset, position);
        self.next = (self.next + 1) % RECENT_ENDS;
    }

    fn position_of(&self, offset: i64) -> Option<u64> {
        self.ends.iter().find(|(end, position)| *end == offset && *position > 0).map(|(_, position)| *position)
    }
}

/// The picture.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) log_start: i64,
    pub(crate) log_end: i64,
    pub(crate) flushed: i64,
    pub(crate) segments: Arc<[SegmentEntry]>,
    pub(crate) end_position: u64,
    pub(crate) largest: Option<LargestTimestamp>,
    pub(crate) recent: RecentEnds,
    pub(crate) epochs: Arc<LeaderEpochs>,
    pub(crate) closed: bool,
}

impl View {
    fn size(&self, number: usize) -> u64 {
        if number + 1 == self.segments.len() {
            self.end_position
        } else {
            self.segments.get(number).map_or(0, |entry| entry.size)
        }
    }

    fn largest(&self, number: usize) -> Option<LargestTimestamp> {
        if number + 1 == self.segments.len() {
            self.largest
        } else {
            self.segments.get(number).and_then(|entry| entry.largest)
        }
    }

    /// One beyond the last offset that a segment can hold.
    fn next_base(&self, number: usize) -> i64 {
        self.segments.get(number + 1).map_or(self.log_end, SegmentEntry::base_offset)
    }

    /// The segment that holds an offset, or would.
    fn number_of(&self, offset: i64) -> usize {
        self.segments.partition_point(|entry| entry.base_offset() <= offset).saturating_sub(1)
    }

    fn out_of_range(&self, offset: i64) -> ReadError {
        OutOfRange { offset, log_start: self.log_start, log_end: self.log_end }.into()
    }
}

/// Reads a log. Cheap to clone and to send.
#[derive(Debug, Clone)]
pub struct LogReader {
    pub(crate) view: Arc<ArcSwap<View>>,
}

/// A place in a log, from which reading goes on. It stays good while segments are rolled, deleted and compacted.
#[derive(Debug)]
pub struct Cursor {
    segment: Arc<Segment>,
    /// Where in the list of segments it was last seen.
    number: usize,
    /// The next byte to be read.
    position: u64,
    /// The last boundary between batches that is known at or before `position`, and the offset there.
    boundary: u64,
    offset: i64,
    /// Where the last limit that needed a search was found.
    limit: Option<(i64, u64)>,
    /// Keeps the file of a batch that was handed out in part.
    held: Option<Opened>,
}

impl Cursor {
    /// The offset of the first batch that was not handed out whole, as far as that is known without looking at bytes that may not be in
    /// memory. [`Slice::next_offset`] of the newest slice is exact.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// Moves the known boundary up to the position, over batches that were handed out: those are in memory.
    fn follow(&mut self, open: &Opened) -> Result<(), ReadError> {
        // The header of a batch that was handed out in part may not have been handed out whole.
        while self.position - self.boundary >= HEADER_BYTES as u64 {
            let header = header_in(&open.map, &self.segment, self.boundary)?;
            let end = self.boundary + header.size() as u64;
            if end > self.position {
                break;
            }
            (self.boundary, self.offset) = (end, header.next_offset());
        }
        Ok(())
    }
}

/// A timestamp that was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimestampOffset {
    /// The record's offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since the epoch.
    pub timestamp: i64,
    /// The leader epoch of its batch.
    pub leader_epoch: i32,
}

impl LogReader {
    /// The first offset of the log.
    pub fn log_start_offset(&self) -> i64 {
        self.view.load().log_start
    }

    /// One beyond the last offset that was written.
    pub fn log_end_offset(&self) -> i64 {
        self.view.load().log_end
    }

    /// One beyond the last offset that is on stable storage.
    pub fn flushed_offset(&self) -> i64 {
        self.view.load().flushed
    }

    /// Bytes of all segments.
    pub fn size_bytes(&self) -> u64 {
        let view = self.view.load();
        (0..view.segments.len()).map(|number| view.size(number)).sum()
    }

    /// How many segments there are.
    pub fn segment_count(&self) -> usize {
        self.view.load().segments.len()
    }

    /// For a peer that knows the log up to `epoch`: the largest epoch here that is not newer, and where it ends.
    pub fn epoch_end(&self, epoch: i32) -> Option<(i32, i64)> {
        let view = self.view.load();
        view.epochs.end_of(epoch, view.log_end)
    }

    /// The leader epoch that wrote an offset.
    pub fn epoch_at(&self, offset: i64) -> Option<i32> {
        self.view.load().epochs.at(offset)
    }

    /// The history of leader epochs.
    pub fn leader_epochs(&self) -> Arc<LeaderEpochs> {
        Arc::clone(&self.view.load().epochs)
    }

    /// Where the log begins and ends, and the history of its leader epochs, all of one moment.
    pub fn extent(&self) -> (Range<i64>, Arc<LeaderEpochs>) {
        let view = self.view.load();
        (view.log_start..view.log_end, Arc::clone(&view.epochs))
    }

    /// Where the batch begins that holds this offset, or the first one after it; the end of the log if there is none. Records may have
    /// been deleted up to within a batch. May block.
    pub fn batch_at(&self, offset: i64) -> Result<i64, ReadError> {
        self.with_view(|view| {
            let cursor = self.seek_in(view, offset)?;
            if cursor.offset >= view.log_end {
                return Ok(view.log_end);
            }
            Ok(header_in(&cursor.segment.open()?.map, &cursor.segment, cursor.position)?.base_offset)
        })
    }

    /// A cursor at the batch that holds this offset, or at the first one after it. May block.
    pub fn seek(&self, offset: i64) -> Result<Cursor, ReadError> {
        self.with_view(|view| self.seek_in(view, offset))
    }

    /// Does something with the newest picture; again, where a segment of it was replaced meanwhile.
    fn with_view<T>(&self, mut act: impl FnMut(&View) -> Result<T, ReadError>) -> Result<T, ReadError> {
        let mut view = self.view.load_full();
        loop {
            let result = act(&view);
            let replaced = matches!(result, Err(ReadError::Closed)) && !view.closed;
            let newest = self.view.load_full();
            if !replaced || Arc::ptr_eq(&view, &newest) {
                return result;
            }
            view = newest;
        }
    }

    fn seek_in(&self, view: &View, offset: i64) -> Result<Cursor, ReadError> {
        if view.closed {
            return Err(ReadError::Closed);
        }
        if offset < view.log_start || offset > view.log_end {
            return Err(view.out_of_range(offset));
        }
        let mut number = view.number_of(offset);
        loop {
            let Some(entry) = view.segments.get(number) else { return Err(view.out_of_range(offset)) };
            let segment = Arc::clone(&entry.segment);
            let end = view.size(number);
            let at = |position, offset| Cursor {
                segment: Arc::clone(&segment),
                number,
                position,
                boundary: position,
                offset,
                limit: None,
                held: None,
            };
            if offset == view.log_end {
                return Ok(at(end, offset));
            }
            let mut headers = segment.headers(segment.position_before(offset)?)?.until(end);
            while let Some((position, header)) = headers.next()? {
                if header.last_offset() >= offset {
                    return Ok(at(position, header.base_offset.max(offset)));
                }
            }
            if number + 1 == view.segments.len() {
                return Ok(at(end, view.log_end));
            }
            number += 1;
        }
    }

    /// Bytes of the log from the cursor on: at most `max_bytes` of one segment, of whole batches or of part of one, and nothing of
    /// a batch at or beyond offset `below` (a boundary between batches, such as the high watermark). `None` if there is nothing yet.
    /// Advances the cursor.
    ///
    /// Does not touch the bytes of the slice, which may not be in memory: see [`Slice::is_resident`]. Near the end of the log it
    /// takes a fraction of a microsecond; a `below` far from the end is searched for once, which may block.
    pub fn read(&self, cursor: &mut Cursor, max_bytes: usize, below: i64) -> Result<Option<Slice>, ReadError> {
        match self.read_in(&self.view.load(), cursor, max_bytes, below) {
            Err(ReadError::Closed) => self.with_view(|view| self.read_in(view, cursor, max_bytes, below)),
            result => result,
        }
    }

    /// Whether more than `bytes` of the log lie behind the cursor. Does not block.
    pub fn is_far(&self, cursor: &Cursor, bytes: u64) -> bool {
        let view = self.view.load();
        let mut behind = 0;
        for (number, entry) in view.segments.iter().enumerate().rev() {
            if entry.base_offset() <= cursor.segment.base_offset {
                return behind + view.size(number).saturating_sub(cursor.position) > bytes;
            }
            behind += view.size(number);
            if behind > bytes {
                return true;
            }
        }
        false
    }

    fn read_in(
        &self,
        view: &View,
        cursor: &mut Cursor,
        max_bytes: usize,
        below: i64,
    ) -> Result<Option<Slice>, ReadError> {
        if view.closed {
            return Err(ReadError::Closed);
        }
        loop {
            let here = |number: usize| {
                view.segments.get(number).is_some_and(|entry| Arc::ptr_eq(&entry.segment, &cursor.segment))
            };
            if !here(cursor.number) {
                let number = view.number_of(cursor.segment.base_offset);
                if !here(number) {
                    return self.read_departed(view, cursor, max_bytes, below);
                }
                cursor.number = number;
            }
            let number = cursor.number;
            if cursor.offset < view.log_start {
                let open = cursor.segment.open()?;
                cursor.follow(&open)?;
                if cursor.offset < view.log_start {
                    return Err(view.out_of_range(cursor.offset));
                }
            }
            let size = view.size(number);
            let limit = limit(view, cursor, below)?;
            if cursor.position < limit {
                let open = match cursor.held.take() {
                    Some(open) if open.map.published() >= limit => open,
                    _ => cursor.segment.open()?,
                };
                // What was handed out may not have been loaded yet; then the boundary stays behind until it is.
                let handed_out = cursor.boundary..cursor.position;
                if !handed_out.is_empty() && open.map.is_resident(handed_out) != Some(false) {
                    cursor.follow(&open)?;
                }
                // A map shows what was published when the picture was made, or more.
                let end = limit.min(cursor.position + max_bytes as u64).min(open.map.published());
                let range = cursor.position..end.max(cursor.position);
                if range.is_empty() {
                    return Ok(None);
                }
                let mut slice = Slice {
                    open: open.clone(),
                    segment: Arc::clone(&cursor.segment),
                    range,
                    boundary: cursor.boundary,
                    offset: cursor.offset,
                    next_offset: None,
                };
                cursor.position = end;
                if end == limit {
                    // A limit is a boundary, and the offset there is known.
                    let last = number + 1 == view.segments.len();
                    let offset = match (end == size, last) {
                        (true, true) => view.log_end,
                        (true, false) => view.next_base(number),
                        (false, _) => below,
                    };
                    (cursor.boundary, cursor.offset) = (end, offset);
                    slice.next_offset = Some(offset);
                } else {
                    cursor.held = Some(open);
                }
                return Ok(Some(slice));
            }
            let Some(next) = view.segments.get(number + 1) else { return Ok(None) };
            if cursor.position < size || below <= next.base_offset() {
                return Ok(None);
            }
            let segment = Arc::clone(&next.segment);
            let offset = next.base_offset();
            *cursor = Cursor { segment, number: number + 1, position: 0, boundary: 0, offset, limit: None, held: None };
        }
    }

    /// Reads on where the cursor's segment is no longer part of the log: to the end of a batch that was begun, then elsewhere.
    fn read_departed(
        &self,
        view: &View,
        cursor: &mut Cursor,
        max_bytes: usize,
        below: i64,
    ) -> Result<Option<Slice>, ReadError> {
        let held = cursor.held.take();
        if let Some(open) = &held {
            cursor.follow(open)?;
        }
        if cursor.position > cursor.boundary && cursor.offset < view.log_end.min(below) {
            let Some(open) = held else { return Err(view.out_of_range(cursor.offset)) };
            let header = header_in(&open.map, &cursor.segment, cursor.boundary)?;
            let end = cursor.boundary + header.size() as u64;
            let range = cursor.position..end.min(cursor.position + max_bytes as u64);
            if range.is_empty() {
                cursor.held = Some(open);
                return Ok(None);
            }
            let slice = Slice {
                open: open.clone(),
                segment: Arc::clone(&cursor.segment),
                range: range.clone(),
                boundary: cursor.boundary,
                offset: cursor.offset,
                next_offset: None,
            };
            cursor.position = range.end;
            cursor.held = Some(open);
            return Ok(Some(slice));
        }
        if cursor.position > cursor.boundary {
            return Err(view.out_of_range(cursor.offset));
        }
        *cursor = self.seek(cursor.offset)?;
        self.read(cursor, max_bytes, below)
    }

    /// The first record, in the order of offsets, whose timestamp is at least `timestamp`, among the records below `below`. May block.
    pub fn offset_for_timestamp(&self, timestamp: i64, below: i64) -> Result<Option<TimestampOffset>, ReadError> {
        self.with_view(|view| offset_for_timestamp(view, timestamp, below))
    }

    /// The first record that has the largest timestamp of all below `below`. May block.
    pub fn offset_for_max_timestamp(&self, below: i64) -> Result<Option<TimestampOffset>, ReadError> {
        self.with_view(|view| offset_for_max_timestamp(view, below))
    }
}

fn offset_for_timestamp(view: &View, timestamp: i64, below: i64) -> Result<Option<TimestampOffset>, ReadError> {
    for number in 0..view.segments.len() {
        let Some(entry) = view.segments.get(number) else { break };
        if view.next_base(number) <= view.log_start
            || view.largest(number).is_none_or(|largest| largest.timestamp < timestamp)
        {
            continue;
        }
        let start = entry.segment.position_before_timestamp(timestamp)?;
        let mut headers = entry.segment.headers(start)?.until(view.size(number));
        while let Some((position, header)) = headers.next()? {
            if header.base_offset >= below {
                return Ok(None);
            }
            if header.max_timestamp < timestamp || header.last_offset() < view.log_start {
                continue;
            }
            let found = find_record(&entry.segment, position, &header, |record_timestamp, offset| {
                record_timestamp >= timestamp && offset >= view.log_start && offset < below
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}

fn offset_for_max_timestamp(view: &View, below: i64) -> Result<Option<TimestampOffset>, ReadError> {
    let mut best: Option<TimestampOffset> = None;
    for number in 0..view.segments.len() {
        let Some(entry) = view.segments.get(number) else { break };
        let Some(largest) = view.largest(number) else { continue };
        if view.next_base(number) <= view.log_start
            || best.is_some_and(|best| best.timestamp >= largest.timestamp)
            || entry.base_offset() >= below
        {
            continue;
        }
        // What the index promises may be cut off at either end of what may be read; then everything there is looked at.
        let whole = entry.base_offset() >= view.log_start && below >= view.next_base(number);
        let start = match whole {
            true => entry.segment.position_before_timestamp(largest.timestamp)?,
            false => entry.segment.position_before(view.log_start)?,
        };
        let mut headers = entry.segment.headers(start)?.until(view.size(number));
        while let Some((position, header)) = headers.next()? {
            if header.base_offset >= below {
                break;
            }
            let seen = best.map_or(i64::MIN, |best| best.timestamp);
            if header.max_timestamp <= seen || header.last_offset() < view.log_start {
                continue;
            }
            // A batch at the log's start may have its largest timestamp in the part that is gone.
            let wanted = if header.base_offset >= view.log_start { header.max_timestamp } else { seen + 1 };
            let mut in_batch: Option<TimestampOffset> = None;
            find_record(&entry.segment, position, &header, |timestamp, offset| {
                let larger = in_batch.is_none_or(|largest| timestamp > largest.timestamp);
                if timestamp >= wanted && offset >= view.log_start && larger {
                    in_batch = Some(TimestampOffset { offset, timestamp, leader_epoch: header.leader_epoch });
                }
                false
            })?;
            best = in_batch.or(best);
            if whole && header.max_timestamp == largest.timestamp {
                break;
            }
        }
    }
    Ok(best)
}

/// Where reading below `below` ends in the cursor's segment, which is part of the view.
fn limit(view: &View, cursor: &mut Cursor, below: i64) -> Result<u64, ReadError> {
    let number = cursor.number;
    let size = view.size(number);
    if below >= view.next_base(number) {
        return Ok(size);
    }
    if below <= cursor.segment.base_offset || below <= cursor.offset {
        return Ok(cursor.boundary.min(cursor.position));
    }
    if number + 1 == view.segments.len()
        && let Some(position) = view.recent.position_of(below)
    {
        return Ok(position.min(size));
    }
    if let Some((_, position)) = cursor.limit.filter(|(limit, _)| *limit == below) {
        return Ok(position);
    }
    let segment = &cursor.segment;
    // The batch before the boundary ends with `below - 1`, unless compaction took it.
    let mut headers = segment.headers(segment.position_before(below - 1)?)?.until(size);
    let mut position = size;
    while let Some((at, header)) = headers.next()? {
        if header.last_offset() >= below {
            position = at;
            break;
        }
    }
    cursor.limit = Some((below, position));
    Ok(position)
}

/// A header that is in memory.
fn header_in(map: &Arc<Map>, segment: &Segment, position: u64) -> Result<BatchHeader, ReadError> {
    let path = || segment.log_path();
    let mut bytes = [0; HEADER_BYTES];
    if !map.copy(position, &mut bytes) {
        let detail = "the segment ends here, within a batch".into();
        return Err(ReadError::Corruption(Corruption { path: path(), position, offset: None, detail }));
    }
    BatchHeader::parse(&bytes).map_err(|error| ReadError::Corruption(bad_batch(&path(), position, None, &error)))
}

/// The first record of a batch that is wanted.
fn find_record(
    segment: &Arc<Segment>,
    position: u64,
    header: &BatchHeader,
    mut wanted: impl FnMut(i64, i64) -> bool,
) -> Result<Option<TimestampOffset>, ReadError> {
    let path = segment.log_path();
    let open = segment.open()?;
    let mut bytes = vec![0; header.size()];
    read_exact_at(&*open.file, &mut bytes, position).during("read", &path)?;
    let corrupt = |error| ReadError::Corruption(bad_batch(&path, position, Some(header.base_offset), &error));
    headwater_proto::batch::check(&bytes).map_err(corrupt)?;
    for record in Records::new(&Bytes::from(bytes)).map_err(corrupt)? {
        let record = record.map_err(corrupt)?;
        if wanted(record.timestamp, record.offset) {
            let leader_epoch = header.leader_epoch;
            return Ok(Some(TimestampOffset { offset: record.offset, timestamp: record.timestamp, leader_epoch }));
        }
    }
    Ok(None)
}

/// Bytes of a log, not yet touched. Keeps its segment's map alive, whatever happens to the segment.
#[derive(Debug, Clone)]
pub struct Slice {
    open: Opened,
    segment: Arc<Segment>,
    range: Range<u64>,
    boundary: u64,
    offset: i64,
    next_offset: Option<i64>,
}

impl Slice {
    /// How many bytes.
    pub fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Where the segment begins that they are in.
    pub fn segment_base_offset(&self) -> i64 {
        self.segment.base_offset
    }

    /// Never: a slice has bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Whether the bytes are in memory, so that touching them does not block, and were checked since this process began. Takes about a microsecond.
    /// Where the system cannot tell, the last few megabytes of a segment count as present.
    pub fn is_resident(&self) -> bool {
        const PROBABLY_PRESENT_BYTES: u64 = 4 << 20;
        let present = || {
            let resident = self.open.map.is_resident(self.range.clone());
            resident.unwrap_or_else(|| self.range.start + PROBABLY_PRESENT_BYTES >= self.segment.published())
        };
        self.segment.verified.contains(&self.range) && present()
    }

    /// Brings the bytes into memory and checks them, if this process has not. Blocks. A bad block or a damaged batch is an error:
    /// nothing of the slice must be served.
    pub fn load(&self) -> Result<(), ReadError> {
        self.open.map.populate(self.range.clone()).during("read", &self.segment.log_path())?;
        verify::verify(&self.segment, &self.open, self.range.clone(), self.boundary)
    }

    /// The bytes, without a copy: a view of the map. Touching them blocks if they are not in memory. They are checked only if
    /// [`Slice::is_resident`] said so or [`Slice::load`] succeeded.
    pub fn bytes(&self) -> Bytes {
        self.open.map.view(self.range.clone()).unwrap_or_default()
    }

    /// The offset after the last batch that is complete with this slice (and those before it). Touches the headers.
    pub fn next_offset(&self) -> Result<i64, ReadError> {
        if let Some(offset) = self.next_offset {
            return Ok(offset);
        }
        let (mut boundary, mut offset) = (self.boundary, self.offset);
        while boundary + HEADER_BYTES as u64 <= self.range.end {
            let header = header_in(&self.open.map, &self.segment, boundary)?;
            boundary += header.size() as u64;
            if boundary > self.range.end {
                break;
            }
            offset = header.next_offset();
        }
        Ok(offset)
    }
}
