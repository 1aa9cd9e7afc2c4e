//! The batches of producers that no snapshot holds.
//!
//! Owns: finding in the log, for each producer of which fewer batches are remembered than a retry may repeat, those before. Refuses: what a batch
//! means to its producer (`producers.rs`). Read next: `producers.rs`.
//!
//! Kafka's snapshot holds one batch of each producer, and nothing in the log leads from a batch to the one before it of the same producer.
//! What leads there are the snapshots at the beginnings of segments: if the producer's last batch there is the one that its sequence goes on from,
//! then the segment holds nothing that is looked for, and the snapshot names the offset to look at. So a segment's headers are only
//! walked where the producer wrote in it, from the newest batch that is looked for backwards, and only as far as anybody misses something.
//! A producer whose first batch is known misses nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use headwater_proto::batch::BatchHeader;

use crate::checkpoint::segment_file_name;
use crate::error::{Corruption, During, ReadError};
use crate::files::{self, Files};
use crate::producers::{self, ProducerState, Recalled, SnapshotEntry};
use crate::reader::SegmentEntry;
use crate::segment::READ_AHEAD_BYTES;

/// Most bytes that are read of headers and snapshots to refill the producers of a log: 65,536 headers of batches that lie apart. Producers that
/// are not found within them are remembered by fewer batches, and a retry of the others is answered as a duplicate without its offsets.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes of log that are walked first; each step further back is twice as large as the one before.
const FIRST_STEP_BYTES: u64 = 64 << 10;
/// The largest such step, whose headers are held in memory.
const LARGEST_STEP_BYTES: u64 = 16 << 20;

/// Gives producers the batches that a retry may repeat, as far as the log still holds them.
pub(crate) fn refill(
    files: &dyn Files,
    dir: &Path,
    entries: &[SegmentEntry],
    state: &mut ProducerState,
) -> Result<(), ReadError> {
    refill_within(files, dir, entries, state, MOST_BYTES).map(drop)
}

/// Returns how many bytes were read.
fn refill_within(
    files: &dyn Files,
    dir: &Path,
    entries: &[SegmentEntry],
    state: &mut ProducerState,
    bytes: u64,
) -> Result<u64, ReadError> {
    let mut search = Search { entries, left: bytes };
    // By the segment in which they are looked for next.
    let mut wanted: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
    for (id, known_from) in state.missing() {
        if let Some(number) = search.segment_before(known_from) {
            wanted.entry(number).or_default().push(id);
        }
    }
    while let Some((number, ids)) = wanted.pop_last() {
        if search.left == 0 {
            let producers = ids.len() + wanted.values().map(Vec::len).sum::<usize>();
            tracing::info!(dir = %dir.display(), producers, bytes, "older batches of these are not looked for any further");
            break;
        }
        let Some(entry) = entries.get(number) else { continue };
        let before = search.snapshot_at(files, dir, entry.base_offset(), &ids)?;
        // What leads past this segment, to the batch that the producer's known ones follow.
        let leads = |id: i64, state: &ProducerState| {
            let last = before.as_ref()?.get(&id)?;
            state.follows(id, last).then_some(last.last_offset)
        };
        let may_be_here = |id: i64| match &before {
            Some(before) => state.may_have_begun_after(id, before.get(&id)),
            None => true,
        };
        let (elsewhere, here): (Vec<i64>, Vec<i64>) = ids.into_iter().partition(|id| leads(*id, state).is_some());
        let mut here: HashSet<i64> = here.into_iter().filter(|id| may_be_here(*id)).collect();
        search.walk_back(entry, &mut here, state)?;
        for id in elsewhere.into_iter().chain(here) {
            let next = match &before {
                Some(_) => leads(id, state).and_then(|last_offset| search.segment_before(last_offset + 1)),
                None => number.checked_sub(1),
            };
            if let Some(next) = next.filter(|next| *next < number) {
                wanted.entry(next).or_default().push(id);
            }
        }
    }
    Ok(bytes - search.left)
}

struct Search<'a> {
    entries: &'a [SegmentEntry],
    /// Bytes that may still be read.
    left: u64,
}

impl Search<'_> {
    /// The segment that holds what is before an offset, if the log does.
    fn segment_before(&self, offset: i64) -> Option<usize> {
        self.entries.partition_point(|entry| entry.base_offset() < offset).checked_sub(1)
    }

    /// What the snapshot at the beginning of a segment says of these producers; `None` if there is none that can be read.
    fn snapshot_at(
        &mut self,
        files: &dyn Files,
        dir: &Path,
        offset: i64,
        ids: &[i64],
    ) -> Result<Option<HashMap<i64, SnapshotEntry>>, ReadError> {
        let path = dir.join(segment_file_name(offset, producers::EXTENSION));
        let bytes = match files::read(files, &path, 1 << 30) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            result => result.during("read", &path)?,
        };
        self.left = self.left.saturating_sub(bytes.len() as u64);
        let Ok(entries) = producers::decode_snapshot(&bytes) else { return Ok(None) };
        let ids: HashSet<i64> = ids.iter().copied().collect();
        let asked = entries.into_iter().filter(|entry| ids.contains(&entry.producer_id));
        Ok(Some(asked.map(|entry| (entry.producer_id, entry)).collect()))
    }

    /// Walks the headers of a segment, from behind, until the producers in `here` miss nothing that it may hold. Those that may miss something
    /// that lies before it are left in `here`.
    fn walk_back(
        &mut self,
        entry: &SegmentEntry,
        here: &mut HashSet<i64>,
        state: &mut ProducerState,
    ) -> Result<(), ReadError> {
        let (mut end, mut step) = (entry.size, FIRST_STEP_BYTES);
        while end > 0 && self.left > 0 {
            let Some(below) = here.iter().filter_map(|id| state.known_from(*id)).max() else { break };
            let newest = entry.segment.position_before(below)?.min(end);
            let start = entry.segment.boundary_before(newest.saturating_sub(step))?;
            let mut found: Vec<BatchHeader> = Vec::new();
            let mut headers = entry.segment.headers(start)?.until(end);
            let mut next_offset = entry.base_offset();
            while let Some((position, header)) = headers.next()?.filter(|(_, header)| header.base_offset < below) {
                if header.base_offset < next_offset {
                    let detail = format!("a batch of offset {}, behind {}", header.base_offset, next_offset - 1);
                    let (path, offset) = (entry.segment.log_path(), None);
                    return Err(Corruption { path, position, offset, detail }.into());
                }
                next_offset = header.next_offset();
                self.left = self.left.saturating_sub((header.size() as u64).min(READ_AHEAD_BYTES));
                if here.contains(&header.producer_id) && !header.is_control() {
                    found.push(header);
                }
            }
            for header in found.iter().rev() {
                if here.contains(&header.producer_id) && state.recall(header) == Recalled::All {
                    here.remove(&header.producer_id);
                }
            }
            (end, step) = (start, (step * 2).min(LARGEST_STEP_BYTES));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use headwater_proto::TopicId;
    use headwater_proto::batch::{self, BatchBuilder, BuildOptions};

    use super::*;
    use crate::sim::SimFiles;
    use crate::{Log, LogConfig, LogIdentity, NewBatch, OpenHints};

    const DIR: &str = "/t-0";
    const NOW: i64 = 1_700_000_000_000;

    fn append(log: &mut Log, options: BuildOptions, value: &[u8]) {
        let mut builder = BatchBuilder::new(options);
        builder.append(NOW, None, Some(value), &[]);
        let bytes = builder.build().unwrap();
        log.append(&[NewBatch { header: batch::check(&bytes).unwrap(), bytes }], 0, NOW).unwrap();
    }

    fn of_producer(log: &mut Log, producer_id: i64, base_sequence: i32) {
        append(log, BuildOptions { producer_id, producer_epoch: 0, base_sequence, ..BuildOptions::default() }, b"x");
    }

    fn filler(log: &mut Log, segments: usize) {
        let until = log.reader().segment_count() + segments;
        while log.reader().segment_count() < until {
            append(log, BuildOptions::default(), &[7; 3_000]);
        }
    }

    fn empty() -> Log {
        let config = LogConfig { segment_bytes: 300_000, ..LogConfig::default() };
        let identity = LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([9; 16]), partition: 0 };
        let files = SimFiles::new(1);
        Log::open(files, Path::new(DIR), identity, config, OpenHints::default(), NOW).unwrap().0
    }

    /// As a snapshot leaves it, and refilled; and the bytes that this took.
    fn refilled(log: &Log, bytes: u64) -> (ProducerState, u64) {
        let entries: Vec<SegmentEntry> = log.sealed.iter().cloned().chain([log.active.entry()]).collect();
        let mut state = ProducerState::from_snapshot(&log.producers.snapshot(), NOW);
        let read = refill_within(&*log.files, &log.dir, &entries, &mut state, bytes).unwrap();
        (state, read)
    }

    #[test]
    fn snapshots_lead_past_what_a_producer_did_not_write() {
        let mut log = empty();
        (0..7).for_each(|n| of_producer(&mut log, 1, n));
        filler(&mut log, 20);
        (0..3).for_each(|n| of_producer(&mut log, 2, n));
        filler(&mut log, 20);
        (3..5).for_each(|n| of_producer(&mut log, 2, n));
        of_producer(&mut log, 3, 0);
        let (state, read) = refilled(&log, MOST_BYTES);
        assert_eq!(&state, log.producers());
        assert!(read < 4 * LARGEST_STEP_BYTES.min(300_000), "{read} bytes were read");
        // One whose first batch is remembered misses nothing.
        let mut single = empty();
        filler(&mut single, 3);
        (0..100).for_each(|id| of_producer(&mut single, id, 0));
        filler(&mut single, 3);
        let (state, read) = refilled(&single, MOST_BYTES);
        assert_eq!((&state, read), (single.producers(), 0));
    }

    /// A producer that wrote so much that its sequence went around.
    #[test]
    fn a_sequence_that_begins_again_at_0_is_followed_back() {
        let mut log = empty();
        log.truncate_and_restart_at(1 << 31, NOW).unwrap();
        let options = BuildOptions { producer_id: 7, producer_epoch: 0, base_sequence: i32::MAX, ..Default::default() };
        let mut builder = BatchBuilder::new(BuildOptions { base_offset: 1 << 31, ..options });
        builder.append(NOW, None, Some(b"x"), &[]);
        let bytes = builder.build().unwrap();
        log.append_as_follower(&[NewBatch { header: batch::check(&bytes).unwrap(), bytes }], &[], NOW).unwrap();
        filler(&mut log, 3);
        of_producer(&mut log, 7, 0);
        (100..110).for_each(|id| of_producer(&mut log, id, 0));
        assert_eq!(&refilled(&log, MOST_BYTES).0, log.producers());
    }

    #[test]
    fn without_snapshots_the_log_is_walked_as_far_as_anybody_misses_something() {
        let mut log = empty();
        filler(&mut log, 2);
        (0..7).for_each(|n| of_producer(&mut log, 1, n));
        filler(&mut log, 3);
        crate::replay::remove_snapshots(&*log.files, &log.dir, |_| true).unwrap();
        let (state, read) = refilled(&log, MOST_BYTES);
        assert_eq!(&state, log.producers());
        assert!(read < log.size_bytes(), "{read}");
    }

    #[test]
    fn what_is_read_is_bounded_and_what_is_found_until_then_counts() {
        let mut log = empty();
        for n in 0..8 {
            (0..50).for_each(|id| of_producer(&mut log, id, n));
            filler(&mut log, 2);
        }
        let (whole, needed) = refilled(&log, MOST_BYTES);
        assert_eq!(&whole, log.producers());
        let mut partly = 0;
        for bytes in (0..needed).step_by(50_000) {
            let (state, read) = refilled(&log, bytes);
            assert!(read <= bytes);
            partly += usize::from(state != *log.producers());
            for id in 0..50 {
                assert_eq!(state.last_sequence(id), log.producers().last_sequence(id));
            }
        }
        assert!(partly > 1);
    }
}
