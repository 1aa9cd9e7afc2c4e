//! Whether `leader-epoch-checkpoint` and the batches agree on who wrote what, and which of the two is wrong where they do not.
//!
//! Owns: that judgement. Refuses: the comparison of single batches (`../scan.rs`, `../verify.rs`). Read next: `../epochs.rs`.
//!
//! A batch's checksum leaves its leader epoch out, and the checkpoint has none, so each vouches for the other. The checkpoint is written before
//! the recovery point passes what it says: below that, it is exact. Where nothing is scanned, each of its entries is held against the two
//! batches that meet where it begins, which the index leads to: after a crash when the log is opened; after an end in good order then
//! only the newest (and the first), and the others of each segment before that is first served, since each start of a broker may add one and a
//! clean start has to be quick. Where they disagree:
//!
//! * Epochs never fall. If those of the batches do, a batch is damaged.
//! * The `.crc` tells whether the first batch that the checkpoint contradicts is as it was written.
//! * Several batches contradict a checkpoint only if that is wrong. A single one may be wrong itself: then nobody can say, and the log does
//!   not open.
//!
//! A checkpoint that is wrong is made anew from the batches.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::batch::{BatchHeader, HEADER_BYTES};

use super::Opening;
use crate::active::{crc_header, read_crc_file};
use crate::checkpoint::segment_file_name;
use crate::crcfile::{CrcFile, RunningCrc, STEP_BYTES};
use crate::epochs::{self, EpochEntry, LeaderEpochs, NO_EPOCH};
use crate::error::{Corruption, During, IoFailure, OpenError, ReadError};
use crate::files::{File, OpenMode, read_exact_at};
use crate::reader::SegmentEntry;
use crate::segment::{READ_AHEAD_BYTES, Segment};

/// Entries of the checkpoint that a clean start holds against the log at once, besides the first: the newest. Each takes a few small reads.
const LOOKED_AT: usize = 64;

/// Batches one after another with the same leader epoch.
struct Run {
    base_offset: i64,
    position: u64,
    offset: i64,
    epoch: i32,
    batches: u64,
}

/// What was found to contradict the other.
pub(super) enum Upon {
    /// This entry of the checkpoint.
    Entry(usize),
    /// This batch, as it was read.
    Batch(Corruption),
}

impl Upon {
    /// The line of the checkpoint, where one is known to be the one.
    fn line(&self) -> Option<usize> {
        match self {
            Upon::Entry(number) => Some(epochs::FIRST_LINE + number),
            Upon::Batch(_) => None,
        }
    }
}

/// What a walk over all batches found.
#[derive(Default)]
struct Walked {
    runs: Vec<Run>,
    /// The segment, position and header of the first batch that the checkpoint contradicts.
    first: Option<(i64, u64, BatchHeader)>,
    contradicted: u64,
}

impl Opening<'_> {
    /// Holds each entry of the checkpoint against the batch at which it begins, and the one before. Looks at a few headers for each.
    pub(super) fn check_history(&mut self, entries: &[SegmentEntry], end: i64) -> Result<(), OpenError> {
        match self.contradicted(entries, end)? {
            None => Ok(()),
            // A log start that a crash took moves back, and the oldest epoch with it.
            Some(0) if !self.hints.clean_shutdown && self.begins_late(entries)? => {
                let path = self.place.dir.join(epochs::FILE_NAME);
                let line = self.epochs_as_read.line_of(0);
                tracing::warn!(path = %path.display(), line, "the log begins before its oldest epoch; made anew from the log");
                (self.epochs, self.epochs_known, self.epochs_changed) = (LeaderEpochs::default(), false, true);
                Ok(())
            }
            Some(number) => self.settle_epochs(Upon::Entry(number)),
        }
    }

    /// Which entry of the history is contradicted.
    fn contradicted(&mut self, entries: &[SegmentEntry], end: i64) -> Result<Option<usize>, OpenError> {
        let Some(first) = entries.first() else { return Ok(None) };
        let mut known = self.epochs.clone();
        known.truncate_from(end);
        let starts = known.entries();
        let newest = if self.hints.clean_shutdown { starts.len().saturating_sub(LOOKED_AT) } else { 0 };
        if newest > 0 {
            self.history_unseen_before = starts.get(newest).map_or(end, |newest| newest.start_offset);
        }
        for (number, entry) in starts.iter().enumerate().filter(|(number, _)| *number == 0 || *number >= newest) {
            let begins = entry.start_offset.max(first.base_offset());
            let next = starts.get(number + 1).map_or(end, |next| next.start_offset);
            if next <= begins {
                continue;
            }
            let (before, at) = around(entries, begins)?;
            // Compaction may have taken every batch of an epoch, and the first one of it.
            let at_odds = at.filter(|at| at.base_offset < next && at.leader_epoch != NO_EPOCH).is_some_and(|at| {
                at.leader_epoch != entry.epoch || (number > 0 && at.base_offset < entry.start_offset)
            });
            if at_odds || before.is_some_and(|before| known.contradiction(&before).is_some()) {
                return Ok(Some(number));
            }
        }
        if self.begins_late(entries)? {
            return Ok(Some(0));
        }
        let (last, _) = around(entries, end)?;
        Ok(last.filter(|last| known.contradiction(last).is_some()).map(|_| starts.len().saturating_sub(1)))
    }

    /// Whether the oldest epoch that is known wrote before it began.
    fn begins_late(&self, entries: &[SegmentEntry]) -> Result<bool, OpenError> {
        let late = |oldest: &&EpochEntry| oldest.start_offset > self.hints.log_start_offset;
        let Some(oldest) = self.epochs.entries().first().filter(late) else { return Ok(false) };
        let (before, at) = around(entries, oldest.start_offset)?;
        let before = at.filter(|at| at.base_offset < oldest.start_offset).or(before);
        Ok(before.is_some_and(|before| before.leader_epoch >= oldest.epoch))
    }

    /// The checkpoint and the batches contradict each other: the checkpoint counts for nothing any more, if it is the one that is wrong.
    ///
    /// # Errors
    /// [`Corruption`] of a batch, or of either.
    pub(super) fn settle_epochs(&mut self, upon: Upon) -> Result<(), OpenError> {
        let walked = self.walk()?;
        if let Some(falling) = walked.runs.windows(2).position(|pair| pair[0].epoch > pair[1].epoch) {
            return Err(self.odd_one(&walked.runs, falling).into());
        }
        let (line, detail) = match &walked.first {
            None => match upon {
                // What was come upon is not there any more: the disk reads one thing now and another one then.
                Upon::Batch(upon) if !self.epochs_known => {
                    let detail = format!("{}, and not so when its header was read again", upon.detail);
                    return Err(Corruption { detail, ..upon }.into());
                }
                upon => (upon.line(), "an epoch begins within a batch, or where another one still led".to_owned()),
            },
            Some((base_offset, position, header)) => {
                let log = self.log_path(*base_offset);
                let detail = self.epochs_as_read.contradiction(header).unwrap_or_default();
                let line = self.epochs_as_read.line_of(header.base_offset);
                let corruption = |detail| Corruption {
                    path: log.clone(),
                    position: *position,
                    offset: Some(header.base_offset),
                    detail,
                };
                if !self.epochs_known {
                    return Err(corruption(detail).into());
                }
                match self.vouches(*base_offset, &log, *position)? {
                    Some(true) => {}
                    Some(false) => {
                        let detail = format!(
                            "{detail} in line {line}, and its .crc says that the batch is not as it was written"
                        );
                        return Err(corruption(detail).into());
                    }
                    None if walked.contradicted > 1 => {}
                    None => {
                        let detail = format!("{detail} in line {line}: nothing tells which of the two is wrong");
                        return Err(corruption(detail).into());
                    }
                }
                let offset = header.base_offset;
                (Some(line), format!("{} batches from offset {offset} on say otherwise: {detail}", walked.contradicted))
            }
        };
        self.report_epochs(line, &detail);
        (self.epochs, self.epochs_known, self.epochs_changed) = (LeaderEpochs::default(), false, true);
        Ok(())
    }

    /// The checkpoint is damaged, in this line or as a whole.
    pub(super) fn report_epochs(&mut self, line: Option<usize>, detail: &str) {
        let path = self.place.dir.join(epochs::FILE_NAME);
        // Without one line that is wrong, the file is.
        let line = line.unwrap_or(1);
        tracing::warn!(path = %path.display(), line, detail, "damaged; made anew from the log");
        self.report.rebuilt.push(path);
    }

    /// The first offset from `log_start` on of which the history says who wrote it.
    pub(super) fn first_epoch_from(&self, log_start: i64) -> i64 {
        self.epochs.entries().first().map_or(i64::MAX, |first| first.start_offset.max(log_start))
    }

    /// Where epochs fall after the run `falling`: the batch that is damaged.
    fn odd_one(&self, runs: &[Run], falling: usize) -> Corruption {
        let epoch = |number: usize| runs.get(number).map(|run| run.epoch);
        let (high, low) = (epoch(falling).unwrap_or(0), epoch(falling + 1).unwrap_or(0));
        let juts_out = falling.checked_sub(1).and_then(epoch).is_none_or(|before| before <= low);
        let falls_short = epoch(falling + 2).is_none_or(|after| after >= high);
        let is_known =
            |number: usize| runs.get(number).is_some_and(|run| self.epochs_as_read.at(run.offset) == Some(run.epoch));
        let batches = |number: usize| runs.get(number).map_or(0, |run| run.batches);
        let first_is_wrong = match (juts_out, falls_short) {
            (true, true) if is_known(falling) != is_known(falling + 1) => is_known(falling + 1),
            (true, true) => batches(falling) <= batches(falling + 1),
            (juts_out, _) => juts_out,
        };
        let number = if first_is_wrong { falling } else { falling + 1 };
        let Run { base_offset, position, offset, epoch, .. } = runs[number];
        let detail = format!(
            "leader epoch {epoch}, though epochs never fall and its neighbours are of {}",
            if first_is_wrong { low } else { high }
        );
        Corruption { path: self.log_path(base_offset), position, offset: Some(offset), detail }
    }

    /// Looks at the header of every batch, up to what is none in each segment.
    fn walk(&self) -> Result<Walked, OpenError> {
        let mut walked = Walked::default();
        let known = self.epochs_known.then_some(&self.epochs_as_read);
        let mut next_offset = i64::MIN;
        for (number, base_offset) in self.bases.iter().enumerate() {
            let next_base = self.bases.get(number + 1).copied().unwrap_or(i64::MAX);
            let path = self.log_path(*base_offset);
            let file = self.place.files.open(&path, OpenMode::Read).during("open", &path)?;
            each_header(&*file, &path, |position, header| {
                if header.base_offset < next_offset.max(*base_offset) || header.base_offset >= next_base {
                    return ControlFlow::Break(());
                }
                next_offset = header.next_offset();
                walked.take(*base_offset, position, header, known, self.exact_below());
                ControlFlow::Continue(())
            })?;
        }
        Ok(walked)
    }

    /// Up to where the checkpoint is exact.
    pub(super) fn exact_below(&self) -> i64 {
        if self.hints.clean_shutdown { i64::MAX } else { self.hints.recovery_point }
    }

    /// Whether the segment's `.crc` says that the leader epoch of the batch at a position is the one that was written; `None` if it
    /// says nothing.
    fn vouches(&self, base_offset: i64, log: &Path, position: u64) -> Result<Option<bool>, IoFailure> {
        const EPOCH_AT: u64 = 12;
        let Some(Ok(crc)) = read_crc_file(&**self.place.files, &log.with_extension("crc"))? else { return Ok(None) };
        if crc.header != crc_header(self.place.identity, base_offset) {
            return Ok(None);
        }
        let file = self.place.files.open(log, OpenMode::Read).during("open", log)?;
        let (first, last) = (position + EPOCH_AT, position + EPOCH_AT + 3);
        for step in first / STEP_BYTES..=last / STEP_BYTES {
            match is_as_written(&*file, log, &crc, step, last)? {
                Some(true) => {}
                other => return Ok(other),
            }
        }
        Ok(Some(true))
    }

    fn log_path(&self, base_offset: i64) -> PathBuf {
        self.place.dir.join(segment_file_name(base_offset, ".log"))
    }
}

impl Walked {
    fn take(
        &mut self,
        base_offset: i64,
        position: u64,
        header: &BatchHeader,
        known: Option<&LeaderEpochs>,
        exact_below: i64,
    ) {
        let (offset, epoch) = (header.base_offset, header.leader_epoch);
        if epoch == NO_EPOCH {
            return;
        }
        match self.runs.last_mut() {
            Some(run) if run.epoch == epoch => run.batches += 1,
            _ => self.runs.push(Run { base_offset, position, offset, epoch, batches: 1 }),
        }
        let is_wrong = match known {
            None => epoch < NO_EPOCH,
            Some(known) => {
                let is_new = offset >= exact_below && known.latest().is_none_or(|latest| epoch > latest);
                !is_new && known.contradiction(header).is_some()
            }
        };
        if is_wrong {
            self.first.get_or_insert((base_offset, position, *header));
            self.contradicted += 1;
        }
    }
}

/// The last batch that ends before an offset, and the first one that does not; neither, where what lies there is no batch.
fn around(entries: &[SegmentEntry], offset: i64) -> Result<(Option<BatchHeader>, Option<BatchHeader>), OpenError> {
    let number = entries.partition_point(|entry| entry.base_offset() <= offset).saturating_sub(1);
    let (mut before, at) = entries.get(number).map_or(Ok((None, None)), |entry| around_within(entry, offset))?;
    if before.is_none()
        && let Some(earlier) = number.checked_sub(1).and_then(|earlier| entries.get(earlier))
    {
        before = around_within(earlier, offset)?.0;
    }
    Ok((before, at))
}

/// The newest batch of a segment, to which its index leads.
pub(super) fn newest(entry: &SegmentEntry) -> Result<Option<BatchHeader>, OpenError> {
    Ok(around_within(entry, i64::MAX)?.0)
}

fn around_within(entry: &SegmentEntry, offset: i64) -> Result<(Option<BatchHeader>, Option<BatchHeader>), OpenError> {
    match around_in(&entry.segment, entry.size, offset) {
        // Whoever reads it comes upon that.
        Err(ReadError::Corruption(_)) => Ok((None, None)),
        Err(error) => Err(super::from_reading(error)),
        Ok((before, at)) => Ok((before.map(|(_, header)| header), at.map(|(_, header)| header))),
    }
}

/// A batch's position and header.
type Placed = (u64, BatchHeader);

/// Of the first `end` bytes of a segment, the last batch that ends before an offset, and the first one that does not.
fn around_in(segment: &Arc<Segment>, end: u64, offset: i64) -> Result<(Option<Placed>, Option<Placed>), ReadError> {
    let start = segment.position_before(offset.saturating_sub(1))?;
    let mut headers = segment.headers(start)?.until(end);
    let mut before = None;
    while let Some((position, header)) = headers.next()? {
        if header.last_offset() >= offset {
            return Ok((before, Some((position, header))));
        }
        before = Some((position, header));
    }
    Ok((before, None))
}

/// A batch in the first `end` bytes of a segment that the history contradicts, and the entry that came upon it. Epochs never fall: so what
/// holds of the first batch and of the last one, and of the two that meet where an epoch begins, holds of all between.
pub(crate) fn contradicted_within(
    segment: &Arc<Segment>,
    end: u64,
    known: &LeaderEpochs,
) -> Result<Option<(Placed, EpochEntry)>, ReadError> {
    let Some((_, first)) = around_in(segment, end, segment.base_offset)?.1 else { return Ok(None) };
    let starts = known.entries();
    let later = starts.partition_point(|entry| entry.start_offset <= first.base_offset);
    let Some(oldest) = starts.get(later.saturating_sub(1)) else { return Ok(None) };
    let here = (first.base_offset, *oldest);
    let starts_here = starts.get(later..).unwrap_or_default().iter().map(|entry| (entry.start_offset, *entry));
    let behind = starts.last().map(|newest| (i64::MAX, *newest));
    for (offset, entry) in std::iter::once(here).chain(starts_here).chain(behind) {
        let (before, at) = around_in(segment, end, offset)?;
        let is_odd = |(_, header): &Placed| known.contradiction(header).is_some();
        // No epoch begins within a batch.
        let is_split = |(_, header): &Placed| header.base_offset < offset && header.leader_epoch != NO_EPOCH;
        if let Some(odd) = before.filter(is_odd).or(at.filter(|at| is_odd(at) || is_split(at))) {
            return Ok(Some((odd, entry)));
        }
        if at.is_none() {
            break;
        }
    }
    Ok(None)
}

/// Calls `visit` with the position and header of each batch, up to the first that cannot be read.
fn each_header(
    file: &dyn File,
    path: &Path,
    mut visit: impl FnMut(u64, &BatchHeader) -> ControlFlow<()>,
) -> Result<(), IoFailure> {
    let len = file.len().during("look at", path)?;
    let (mut bytes, mut at, mut position) = (Vec::new(), 0, 0);
    while position + HEADER_BYTES as u64 <= len {
        if position < at || position + HEADER_BYTES as u64 > at + bytes.len() as u64 {
            bytes.resize((len - position).min(READ_AHEAD_BYTES) as usize, 0);
            read_exact_at(file, &mut bytes, position).during("read", path)?;
            at = position;
        }
        let Ok(header) = BatchHeader::parse(bytes.get((position - at) as usize..).unwrap_or_default()) else { break };
        if position + header.size() as u64 > len || visit(position, &header).is_break() {
            break;
        }
        position += header.size() as u64;
    }
    Ok(())
}

/// Whether a 64 KiB step of a log is what it was when its entry was made; `None` where there is none for just that, or it does not
/// reach beyond the byte at `last`: the last entry is of where the log ended then.
fn is_as_written(file: &dyn File, path: &Path, crc: &CrcFile, step: u64, last: u64) -> Result<Option<bool>, IoFailure> {
    let number = step as usize;
    let Some(after) = crc.entries.get(number) else { return Ok(None) };
    let (start, end) = (step * STEP_BYTES, u64::from(after.position));
    let reaches_it = end > last.min(start + STEP_BYTES - 1);
    if end > file.len().during("look at", path)? || end > start + STEP_BYTES || !reaches_it {
        return Ok(None);
    }
    let mut running = match number.checked_sub(1).and_then(|before| crc.entries.get(before)) {
        Some(before) => RunningCrc::resume(*before, number),
        None => RunningCrc::new(&crc.header),
    };
    let mut bytes = vec![0; (end - start) as usize];
    read_exact_at(file, &mut bytes, start).during("read", path)?;
    running.update(&bytes);
    Ok(Some(running.entry() == *after))
}
