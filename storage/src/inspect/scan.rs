//! Reads the batches of a segment one after another, tells damage from the end of the log, and finds the next batch after damage.
//!
//! Owns: the judgement of single batches. The checksum of a batch leaves base offset, length, leader epoch, magic and itself out
//! (bytes 0 to 20), so those are judged by what stands around them: the offset that must come next, the batch after it, the next
//! segment, and the leader epochs. Where the rest of a batch is whole and its surroundings leave one possibility only for a wrong
//! field, the batch as it must have been comes along with the damage ([`Damage::mended`]).
//! Refuses: other files than the `.log` (`verify.rs`), and to trust a length before the bytes behind it are checked.
//!
//! What counts as in sequence: a batch at or after the expected offset (compaction leaves gaps) and below the next segment.
//! A recycled segment may hold older batches behind its end; they lie before the expected offset and are never taken.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use headwater_proto::batch::{self, BatchError, BatchHeader, HEADER_BYTES};

use super::{FaultKind, SegmentFile};
use crate::checkpoint::segment_file_name;
use crate::epochs::LeaderEpochs;
use crate::files::{File, Files, OpenMode};

/// Read at once. Larger batches are read whole.
const WINDOW_BYTES: usize = 1 << 20;
/// A search gives up after so many checksummed bytes, so that hostile bytes cannot make it quadratic.
const SEARCH_BUDGET_BYTES: u64 = 8 << 30;
/// Where a file that is being written is looked at again, so often at most.
const REREADS: usize = 64;

/// What lies at a place of a segment.
#[derive(Debug)]
pub(crate) enum Item {
    /// A batch that is whole and in its place.
    Batch(FoundBatch),
    /// Bytes that are not.
    Damage(Damage),
    /// The end of the log, with bytes behind it that are none of its: reserved space, or what a recycled segment held before.
    Tail(Tail),
}

/// A batch that is whole and in its place.
#[derive(Debug)]
pub(crate) struct FoundBatch {
    pub(crate) position: u64,
    pub(crate) header: BatchHeader,
    pub(crate) bytes: Bytes,
}

/// Bytes that are no batch, or no batch that can stand there.
#[derive(Debug)]
pub(crate) struct Damage {
    pub(crate) position: u64,
    /// How many bytes are passed over.
    pub(crate) size: u64,
    /// The fields that stand where a header should, whatever they say.
    pub(crate) header: Option<BatchHeader>,
    /// The first offset that may be lost.
    pub(crate) expected_offset: i64,
    pub(crate) kind: FaultKind,
    pub(crate) detail: String,
    /// The batch as it must have been, where that is certain.
    pub(crate) mended: Option<(BatchHeader, Bytes)>,
}

/// Bytes behind the end of the log.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) position: u64,
    pub(crate) size: u64,
    /// Nothing but zeros.
    pub(crate) zeros: bool,
}

/// A batch and the leader epoch checkpoint contradict each other, and either may be wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EpochDoubt {
    pub(crate) position: u64,
    pub(crate) offset: i64,
    /// What the batch says.
    pub(crate) epoch: i32,
    /// What the checkpoint says.
    pub(crate) known: i32,
}

/// Reads one segment.
pub(crate) struct Scanner {
    window: Window,
    epochs: Option<LeaderEpochs>,
    /// The file ends in zeros: its log was not closed, or is being written, and the leader epoch checkpoint may lag behind.
    unfinished: bool,
    /// But not of batches before this offset: they are known to be flushed, and their epochs were written down before.
    flushed: i64,
    /// Batch positions that an index vouches for, rising.
    boundaries: Vec<u64>,
    position: u64,
    expected_offset: i64,
    next_base_offset: Option<i64>,
    previous: Option<BatchHeader>,
    /// The first batch of the next segment.
    after: Option<BatchHeader>,
    /// Offsets at which the log ended once: batches end there too. Rising.
    log_ends: Vec<i64>,
    /// Where the segment begins.
    base_offset: i64,
    /// The first batch that is at odds with the leader epoch checkpoint where either may be wrong.
    epoch_doubt: Option<EpochDoubt>,
}

impl Scanner {
    /// A scanner at the start of a segment. `previous` is the last batch before it; `boundaries` are positions out of its offset index;
    /// `log_ends` are offsets at which the log ended once; everything before `flushed` is known to be on the disk.
    pub(crate) fn open(
        files: &dyn Files,
        segment: &SegmentFile,
        epochs: Option<LeaderEpochs>,
        boundaries: Vec<u64>,
        log_ends: Vec<i64>,
        previous: Option<BatchHeader>,
        flushed: i64,
    ) -> io::Result<Scanner> {
        let mut window = Window::open(files, &segment.path)?;
        let end = window.slice(window.len.saturating_sub(HEADER_BYTES as u64), HEADER_BYTES)?;
        Ok(Scanner {
            unfinished: segment.next_base_offset.is_none() && !end.is_empty() && end.iter().all(|byte| *byte == 0),
            flushed,
            window,
            epochs,
            boundaries,
            position: 0,
            expected_offset: segment.base_offset,
            next_base_offset: segment.next_base_offset,
            previous,
            after: segment.next_base_offset.and_then(|next| {
                let path = segment.path.with_file_name(segment_file_name(next, ".log"));
                first_header(files, &path).ok().flatten().filter(|header| header.base_offset >= next)
            }),
            log_ends,
            base_offset: segment.base_offset,
            epoch_doubt: None,
        })
    }

    /// Bytes of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.window.len
    }

    /// The last batch that was taken, mended ones included.
    pub(crate) fn previous(&self) -> Option<BatchHeader> {
        self.previous
    }

    /// The first batch of the segment that is at odds with the leader epoch checkpoint where either may be wrong.
    pub(crate) fn epoch_doubt(&self) -> Option<EpochDoubt> {
        self.epoch_doubt
    }

    /// What comes next; `None` at the end of the file.
    pub(crate) fn next(&mut self) -> io::Result<Option<Item>> {
        if self.position >= self.window.len {
            return Ok(None);
        }
        let item = self.look()?;
        let (size, taken) = match &item {
            Item::Batch(found) => (found.bytes.len() as u64, Some(found.header)),
            Item::Damage(damage) => (damage.size, damage.mended.as_ref().map(|(header, _)| *header)),
            Item::Tail(tail) => (tail.size, None),
        };
        self.position += size;
        if let Some(header) = taken {
            self.expected_offset = header.next_offset();
            self.previous = Some(header);
        }
        Ok(Some(item))
    }

    fn look(&mut self) -> io::Result<Item> {
        let at = self.position;
        for _ in 0..REREADS {
            let head = self.window.slice(at, HEADER_BYTES)?;
            if head.iter().all(|byte| *byte == 0) {
                return self.look_at_zeros();
            }
            match self.whole_batch(at)? {
                Ok((header, bytes)) => {
                    let following = self.following(at + bytes.len() as u64)?;
                    return Ok(match self.misplaced(&header, following.as_ref()) {
                        None => Item::Batch(FoundBatch { position: at, header, bytes }),
                        Some((kind, detail)) => {
                            let mended =
                                self.mend(&bytes, following.as_ref().map(|next| next.base_offset), following.as_ref());
                            Item::Damage(Damage {
                                position: at,
                                size: bytes.len() as u64,
                                header: Some(header),
                                expected_offset: self.expected_offset,
                                kind,
                                detail,
                                mended,
                            })
                        }
                    });
                }
                // The last segment of a running broker: what was read may have been half a batch.
                Err(_) if self.next_base_offset.is_none() && self.window.changed(at)? => {}
                Err(error) => return self.look_at_damage(error.to_string()),
            }
        }
        self.look_at_damage("the file is being rewritten".into())
    }

    /// The batch at `at`, if its checksum holds.
    fn whole_batch(&mut self, at: u64) -> io::Result<Result<(BatchHeader, Bytes), BatchError>> {
        let head = self.window.slice(at, HEADER_BYTES)?;
        let header = match BatchHeader::parse(&head) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let have = (self.window.len - at) as usize;
        if header.size() > have {
            return Ok(Err(BatchError::Truncated { needed: header.size(), have }));
        }
        let bytes = self.window.slice(at, header.size())?;
        Ok(batch::check(&bytes).map(|header| (header, bytes)))
    }

    /// The header after a batch, as far as it can be read.
    fn following(&mut self, at: u64) -> io::Result<Option<BatchHeader>> {
        if at >= self.window.len {
            return Ok(self.after);
        }
        Ok(BatchHeader::parse(&self.window.slice(at, HEADER_BYTES)?).ok())
    }

    /// Whether a batch with this header cannot stand where it does.
    fn misplaced(&mut self, header: &BatchHeader, following: Option<&BatchHeader>) -> Option<(FaultKind, String)> {
        let (first, last, expected) = (header.base_offset, header.last_offset(), self.expected_offset);
        if first < expected {
            return Some((FaultKind::Offsets, format!("base offset {first} where {expected} or more must stand")));
        }
        if let Some(next) = self.next_base_offset.filter(|next| last >= *next) {
            return Some((
                FaultKind::Offsets,
                format!("offsets {first} to {last} reach into the next segment, which begins at {next}"),
            ));
        }
        if let Some(next) =
            following.map(|next| next.base_offset).filter(|next| first > expected && (expected..=last).contains(next))
        {
            return Some((
                FaultKind::Offsets,
                format!("base offset {first} lies between {expected}, which must come, and {next}, which follows"),
            ));
        }
        if last - self.base_offset > i64::from(i32::MAX) {
            let detail = format!("offset {last} is out of reach of a segment that begins at {}", self.base_offset);
            return Some((FaultKind::Offsets, detail));
        }
        if let Some(end) = self.log_ends.iter().find(|end| (first + 1..=last).contains(*end)) {
            let detail =
                format!("offsets {first} to {last} reach over {end}, where the log ended when a snapshot was taken");
            return Some((FaultKind::Offsets, detail));
        }
        if first > expected && following.is_none() && self.log_end_after(expected + i64::from(header.last_offset_delta))
        {
            let detail =
                format!("base offset {first} where, by the last snapshot, the log's last batch began at {expected}");
            return Some((FaultKind::Offsets, detail));
        }
        self.wrong_epoch(header, following)
    }

    /// Whether the last known end of the log lies just behind this offset.
    fn log_end_after(&self, last_offset: i64) -> bool {
        self.log_ends.last() == Some(&(last_offset + 1))
    }

    /// Whether a batch's leader epoch contradicts what stands around it: the checkpoint, the batch before and the batch after.
    fn wrong_epoch(&mut self, header: &BatchHeader, following: Option<&BatchHeader>) -> Option<(FaultKind, String)> {
        let epoch = header.leader_epoch;
        let known = |header: &BatchHeader| self.epochs.as_ref().and_then(|epochs| epochs.at(header.base_offset));
        let agrees = |header: &BatchHeader| known(header).is_none_or(|epoch| epoch == header.leader_epoch);
        let before = self.previous.map(|previous| previous.leader_epoch);
        let after = following.map(|next| next.leader_epoch);
        let (position, offset) = (self.position, header.base_offset);
        let doubt = |known| EpochDoubt { position, offset, epoch, known };
        let falls = before.is_some_and(|before| before > epoch);
        let juts_out = after.is_some_and(|after| after < epoch && before.is_none_or(|before| before <= after));
        let wrong = match known(header) {
            Some(known) if known == epoch => false,
            Some(known)
                if self.unfinished
                    && header.base_offset >= self.flushed
                    && self.epochs.as_ref().is_some_and(|epochs| epochs.latest() == Some(known)) =>
            {
                falls || juts_out
            }
            Some(_) if falls || juts_out => true,
            // One batch against the checkpoint and against both its neighbours is wrong. Where a neighbour has the same epoch,
            // it may be the checkpoint.
            Some(known)
                if (before.is_some() || after.is_some())
                    && before != Some(epoch)
                    && after != Some(epoch)
                    && self.previous.as_ref().is_none_or(agrees)
                    && following.is_none_or(agrees) =>
            {
                // Unless it is the only one of its leader.
                if before.is_some_and(|before| before < epoch) && after.is_none_or(|after| after > epoch) {
                    self.epoch_doubt.get_or_insert(doubt(known));
                }
                true
            }
            Some(known) => {
                self.epoch_doubt.get_or_insert(doubt(known));
                false
            }
            None => {
                let first = self.epochs.as_ref().and_then(|epochs| epochs.entries().first());
                falls || juts_out || first.is_some_and(|first| first.epoch < epoch)
            }
        };
        wrong.then(|| {
            let detail = match (known(header), before) {
                (Some(known), _) => format!("leader epoch {epoch} where the checkpoint says {known}"),
                (None, Some(before)) => format!("leader epoch {epoch} after {before}"),
                (None, None) => format!("leader epoch {epoch}, which its neighbours contradict"),
            };
            (FaultKind::Epoch, detail)
        })
    }

    /// Zeros where a header should be: reserved space, the end of a recycled segment's log, or damage.
    fn look_at_zeros(&mut self) -> io::Result<Item> {
        let at = self.position;
        let rest = self.window.len - at;
        if self.window.zeros_end(at)? == self.window.len {
            return Ok(Item::Tail(Tail { position: at, size: rest, zeros: true }));
        }
        let complete = self.next_base_offset.is_none_or(|next| self.expected_offset >= next);
        if let Some(next) = self.search(at)? {
            return self.damage(next - at, "zeros where a batch must stand".into());
        }
        if complete {
            return Ok(Item::Tail(Tail { position: at, size: rest, zeros: false }));
        }
        self.damage(rest, "zeros where a batch must stand".into())
    }

    fn look_at_damage(&mut self, detail: String) -> io::Result<Item> {
        let at = self.position;
        let head = self.window.slice(at, HEADER_BYTES)?;
        let end = match self.believed_end(at, &head)? {
            Some(end) => end,
            None => self.search(at + 1)?.unwrap_or(self.window.len),
        };
        self.damage(end - at, detail)
    }

    fn damage(&mut self, size: u64, detail: String) -> io::Result<Item> {
        let position = self.position;
        let head = self.window.slice(position, HEADER_BYTES)?;
        let following = self.following(position + size)?;
        // Only what a batch may be long can be mended, and a batch cannot begin with zeros.
        let mended = if size <= headwater_proto::limits::MAX_BATCH_BYTES as u64 {
            let bytes = self.window.slice(position, size as usize)?;
            self.mend(&bytes, following.as_ref().map(|next| next.base_offset), following.as_ref())
        } else {
            None
        };
        let to_the_end = position + size == self.window.len;
        let kind = if to_the_end && self.next_base_offset.is_none() && mended.is_none() {
            FaultKind::Tail
        } else {
            FaultKind::Batch
        };
        Ok(Item::Damage(Damage {
            position,
            size,
            header: raw_header(&head),
            expected_offset: self.expected_offset,
            kind,
            detail,
            mended,
        }))
    }

    /// Where a damaged batch ends, if its header fits its place and what it says of its length leads to a batch or to the end.
    fn believed_end(&mut self, at: u64, head: &[u8]) -> io::Result<Option<u64>> {
        let Some(raw) = raw_header(head) else { return Ok(None) };
        let Some(size) =
            u64::try_from(raw.batch_length).ok().map(|length| length + 12).filter(|size| *size >= HEADER_BYTES as u64)
        else {
            return Ok(None);
        };
        let end = at + size;
        if end > self.window.len || self.boundaries.iter().any(|boundary| (at + 1..end).contains(boundary)) {
            return Ok(None);
        }
        if end == self.window.len {
            return Ok((raw.base_offset == self.expected_offset).then_some(end));
        }
        if self.window.slice(end, HEADER_BYTES)?.iter().all(|byte| *byte == 0) {
            return Ok((raw.base_offset == self.expected_offset && self.window.zeros_end(end)? == self.window.len)
                .then_some(end));
        }
        Ok(self.in_sequence(end)?.map(|_| end))
    }

    /// The header of the batch at `at`, if it is whole and comes after everything taken so far.
    fn in_sequence(&mut self, at: u64) -> io::Result<Option<BatchHeader>> {
        let found = self.whole_batch(at)?.ok().map(|(header, _)| header);
        Ok(found.filter(|header| self.may_follow(header)))
    }

    fn may_follow(&self, header: &BatchHeader) -> bool {
        header.base_offset >= self.expected_offset
            && self.next_base_offset.is_none_or(|next| header.last_offset() < next)
    }

    /// The position of the next batch in sequence at or after `from`. Where the index vouches for a boundary, a batch that is found
    /// before it must lead to it: the value of a record may hold what looks like batches.
    fn search(&mut self, from: u64) -> io::Result<Option<u64>> {
        let mut budget = SEARCH_BUDGET_BYTES;
        let mut at = from;
        let boundaries: Vec<u64> = self.boundaries.iter().copied().filter(|boundary| *boundary >= from).collect();
        for boundary in boundaries {
            if boundary < at || self.in_sequence(boundary)?.is_none() {
                continue;
            }
            while let Some(found) = self.search_range(at, boundary, &mut budget)? {
                if self.leads_to(found, boundary)? {
                    return Ok(Some(found));
                }
                at = found + 1;
            }
            return Ok(Some(boundary));
        }
        self.search_range(at, self.window.len, &mut budget)
    }

    fn search_range(&mut self, from: u64, to: u64, budget: &mut u64) -> io::Result<Option<u64>> {
        let mut at = from;
        while at < to && at + HEADER_BYTES as u64 <= self.window.len {
            let chunk = self.window.buffered(at)?;
            let candidates = chunk.windows(HEADER_BYTES).enumerate();
            for (index, head) in candidates {
                let position = at + index as u64;
                if position >= to {
                    return Ok(None);
                }
                // Byte 16 is the magic; it sorts almost everything out.
                if head.get(16) != Some(&2) {
                    continue;
                }
                let Some(header) = BatchHeader::parse(head).ok().filter(|header| self.may_follow(header)) else {
                    continue;
                };
                if header.size() as u64 > self.window.len - position {
                    continue;
                }
                let Some(left) = budget.checked_sub(header.size() as u64) else { return Ok(None) };
                *budget = left;
                if self.in_sequence(position)?.is_some() {
                    return Ok(Some(position));
                }
            }
            at += (chunk.len() + 1).saturating_sub(HEADER_BYTES).max(1) as u64;
        }
        Ok(None)
    }

    /// Whether whole batches lie one after another from `at` exactly to `boundary`.
    fn leads_to(&mut self, mut at: u64, boundary: u64) -> io::Result<bool> {
        while at < boundary {
            match self.whole_batch(at)? {
                Ok((_, bytes)) => at += bytes.len() as u64,
                Err(_) => return Ok(false),
            }
        }
        Ok(at == boundary)
    }

    /// The batch that these bytes must have been, if its checksummed part is whole and each wrong field can have one value only.
    fn mend(
        &self,
        bytes: &[u8],
        next_offset: Option<i64>,
        following: Option<&BatchHeader>,
    ) -> Option<(BatchHeader, Bytes)> {
        let mut header = raw_header(bytes)?;
        header.magic = 2;
        header.batch_length = i32::try_from(bytes.len().checked_sub(12)?).ok()?;
        if batch::crc(bytes) != header.crc || header.last_offset_delta < 0 {
            return None;
        }
        let expected = self.expected_offset;
        let span = i64::from(header.last_offset_delta) + 1;
        let limits = [next_offset.filter(|next| *next >= expected), self.next_base_offset];
        let at_the_end = following.is_none() && self.log_end_after(expected + span - 1);
        let limit = limits.into_iter().flatten().min().or(at_the_end.then_some(expected + span));
        let fits = header.base_offset >= expected
            && header.base_offset.checked_add(span).is_some_and(|end| limit.is_none_or(|limit| end <= limit));
        if !fits {
            if limit != Some(expected.checked_add(span)?) {
                return None;
            }
            header.base_offset = expected;
        }
        let known = self.epochs.as_ref().and_then(|epochs| epochs.at(header.base_offset));
        let before = self.previous.map(|previous| previous.leader_epoch);
        let after = following.map(|next| next.leader_epoch);
        let neighbours = || (before.is_some() && before == after).then_some(before).flatten();
        match known.or_else(neighbours) {
            Some(epoch) => header.leader_epoch = epoch,
            None if before.is_some_and(|before| before > header.leader_epoch)
                || after.is_some_and(|after| after < header.leader_epoch) =>
            {
                return None;
            }
            None => {}
        }
        let mut mended = header.encode().to_vec();
        mended.extend_from_slice(bytes.get(HEADER_BYTES..)?);
        let header = batch::check(&mended).ok()?;
        Some((header, mended.into()))
    }
}

/// The offset that the first batch of a file claims; 0 if there is none.
pub(crate) fn first_offset(files: &dyn Files, path: &Path) -> io::Result<i64> {
    Ok(first_header(files, path)?.map_or(0, |header| header.base_offset))
}

fn first_header(files: &dyn Files, path: &Path) -> io::Result<Option<BatchHeader>> {
    let file = files.open(path, OpenMode::Read)?;
    let mut head = [0; HEADER_BYTES];
    let read = file.read_at(&mut head, 0)?;
    Ok(BatchHeader::parse(head.get(..read).unwrap_or_default()).ok())
}

/// The fields of a header, unchecked.
fn raw_header(bytes: &[u8]) -> Option<BatchHeader> {
    fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at..)?.first_chunk().copied()
    }
    bytes.get(..HEADER_BYTES)?;
    Some(BatchHeader {
        base_offset: i64::from_be_bytes(field(bytes, 0)?),
        batch_length: i32::from_be_bytes(field(bytes, 8)?),
        leader_epoch: i32::from_be_bytes(field(bytes, 12)?),
        magic: i8::from_be_bytes(field(bytes, 16)?),
        crc: u32::from_be_bytes(field(bytes, 17)?),
        attributes: i16::from_be_bytes(field(bytes, 21)?),
        last_offset_delta: i32::from_be_bytes(field(bytes, 23)?),
        base_timestamp: i64::from_be_bytes(field(bytes, 27)?),
        max_timestamp: i64::from_be_bytes(field(bytes, 35)?),
        producer_id: i64::from_be_bytes(field(bytes, 43)?),
        producer_epoch: i16::from_be_bytes(field(bytes, 51)?),
        base_sequence: i32::from_be_bytes(field(bytes, 53)?),
        record_count: i32::from_be_bytes(field(bytes, 57)?),
    })
}

/// A file of which one stretch is in memory. Its length is that of the moment it was opened.
struct Window {
    file: Arc<dyn File>,
    len: u64,
    start: u64,
    bytes: Bytes,
}

impl Window {
    fn open(files: &dyn Files, path: &Path) -> io::Result<Window> {
        let file = files.open(path, OpenMode::Read)?;
        let len = file.len()?;
        Ok(Window { file, len, start: 0, bytes: Bytes::new() })
    }

    /// `size` bytes from `at`, or as many as there are.
    fn slice(&mut self, at: u64, size: usize) -> io::Result<Bytes> {
        let size = size.min(self.len.saturating_sub(at) as usize);
        if let Some(start) = at.checked_sub(self.start).map(|start| start as usize)
            && start + size <= self.bytes.len()
        {
            return Ok(self.bytes.slice(start..start + size));
        }
        self.fill(at, size.max(WINDOW_BYTES))?;
        Ok(self.bytes.slice(..size.min(self.bytes.len())))
    }

    /// Everything that is in memory from `at` on: at least a header, unless the file ends before.
    fn buffered(&mut self, at: u64) -> io::Result<Bytes> {
        self.slice(at, HEADER_BYTES)?;
        let start = (at - self.start) as usize;
        if self.bytes.len() - start < WINDOW_BYTES / 2 {
            self.fill(at, WINDOW_BYTES)?;
        }
        Ok(self.bytes.slice((at - self.start) as usize..))
    }

    fn fill(&mut self, at: u64, size: usize) -> io::Result<()> {
        let mut bytes = vec![0; size.min(self.len.saturating_sub(at) as usize)];
        let read = self.file.read_at(&mut bytes, at)?;
        // A running broker may have cut the file since: what is not there any more reads as reserved space.
        bytes.get_mut(read..).unwrap_or_default().fill(0);
        self.start = at;
        self.bytes = bytes.into();
        Ok(())
    }

    /// Reads what is in memory from `at` on again, and says whether it changed.
    fn changed(&mut self, at: u64) -> io::Result<bool> {
        let before = self.buffered(at)?;
        self.fill(at, before.len())?;
        Ok(self.bytes != before)
    }

    /// Where the zeros that begin at `at` end.
    fn zeros_end(&mut self, mut at: u64) -> io::Result<u64> {
        while at < self.len {
            let chunk = self.slice(at, WINDOW_BYTES)?;
            match chunk.iter().position(|byte| *byte != 0) {
                Some(index) => return Ok(at + index as u64),
                None => at += chunk.len() as u64,
            }
        }
        Ok(self.len)
    }
}
