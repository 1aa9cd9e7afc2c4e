//! What a log knows of its idempotent producers, so that a retry never appends twice.
//!
//! Owns: the decision on a batch's sequence ([`Staged::admit`]), the five batches remembered of each producer, and Kafka's `.snapshot` format.
//! Refuses: I/O and clocks. Read next: `log.rs`.
//!
//! Always: a producer's remembered batches have rising offsets and consecutive sequences, all of one epoch.
//!
//! ```text
//! <offset>.snapshot   i16 version (1) | u32 CRC-32C of everything after it | i32 number of entries | entries of 46 bytes (big endian):
//!   i64 producer id | i16 epoch | i32 last sequence (-1: none) | i64 last offset (-1: none) | i32 last offset - first offset of its last batch |
//!   i64 timestamp | i32 coordinator epoch | i64 first offset of its open transaction (-1: none)
//! ```

use std::cmp::Ordering;
use std::collections::HashMap;

use headwater_proto::batch::{BatchHeader, NO_PRODUCER_ID, NO_SEQUENCE};
use headwater_proto::limits::MAX_IN_FLIGHT_BATCHES;

/// Most producers that a log takes in: a client that writes each batch under another id fills no more memory and snapshots
/// than these. They are forgotten after `producer.id.expiration.ms`.
pub const MAX_PRODUCERS: usize = 1 << 18;

/// Extension of a snapshot file.
pub const EXTENSION: &str = ".snapshot";

/// A batch that is remembered to recognise its duplicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RememberedBatch {
    last_sequence: i32,
    last_offset: i64,
    offset_delta: i32,
    timestamp: i64,
}

impl RememberedBatch {
    fn of(header: &BatchHeader) -> RememberedBatch {
        RememberedBatch {
            last_sequence: header.last_sequence(),
            last_offset: header.last_offset(),
            offset_delta: header.last_offset_delta,
            timestamp: header.max_timestamp,
        }
    }

    fn first_sequence(&self) -> i32 {
        sequence_before(self.last_sequence, self.offset_delta)
    }

    fn first_offset(&self) -> i64 {
        self.last_offset - i64::from(self.offset_delta)
    }

    /// Whether its sequence may be at 0 because it went around: so many records of the producer lie before it.
    fn may_begin_again(&self) -> bool {
        self.first_sequence() == 0 && self.first_offset() >= 1 << 31
    }
}

/// The sequence `n` before this one, on the ring of non-negative numbers.
fn sequence_before(sequence: i32, n: i32) -> i32 {
    (i64::from(sequence) - i64::from(n)).rem_euclid(1 << 31) as i32
}

fn sequence_after(sequence: i32) -> i32 {
    sequence.checked_add(1).unwrap_or(0)
}

/// Everything known of one producer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    /// The oldest first; at most [`MAX_IN_FLIGHT_BATCHES`]; none after a control batch with a new epoch.
    batches: Vec<RememberedBatch>,
    coordinator_epoch: i32,
    current_txn_first_offset: Option<i64>,
    last_timestamp: i64,
    /// When it last wrote (or was read from disk), by our clock: record timestamps may be of any age.
    last_active_ms: i64,
}

impl Producer {
    fn new(epoch: i16, now_ms: i64) -> Producer {
        Producer {
            epoch,
            batches: Vec::with_capacity(1),
            coordinator_epoch: -1,
            current_txn_first_offset: None,
            last_timestamp: -1,
            last_active_ms: now_ms,
        }
    }

    fn remember(&mut self, header: &BatchHeader, now_ms: i64) {
        self.set_epoch(header.producer_epoch);
        if self.batches.len() == MAX_IN_FLIGHT_BATCHES {
            self.batches.remove(0);
        }
        self.batches.push(RememberedBatch::of(header));
        self.last_timestamp = header.max_timestamp;
        self.last_active_ms = now_ms;
        if header.is_transactional() && self.current_txn_first_offset.is_none() {
            self.current_txn_first_offset = Some(header.base_offset);
        }
    }

    fn misses_batches(&self) -> bool {
        self.batches.len() < MAX_IN_FLIGHT_BATCHES
            && self.batches.first().is_some_and(|oldest| oldest.first_sequence() != 0 || oldest.may_begin_again())
    }

    /// Whether the oldest batch that is remembered is the next one after this.
    fn begins_after(&self, epoch: i16, last_sequence: i32, last_offset: i64) -> bool {
        self.epoch == epoch
            && self.batches.first().is_some_and(|oldest| {
                last_offset < oldest.first_offset() && sequence_after(last_sequence) == oldest.first_sequence()
            })
    }

    fn set_epoch(&mut self, epoch: i16) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.batches.clear();
        }
    }
}

/// Why a batch's sequence was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// A newer epoch of the producer has written here.
    #[error("producer epoch {given} is fenced by {current}")]
    OldEpoch {
        /// The batch's epoch.
        given: i16,
        /// The newest one.
        current: i16,
    },
    /// Batches are missing before this one.
    #[error("sequence {given}, where {expected} is next")]
    OutOfOrder {
        /// The batch's first sequence.
        given: i32,
        /// The one that would have been right.
        expected: i32,
    },
    /// Nothing is known of the producer, and the batch is not its first.
    #[error("nothing is known of this producer, and sequence {given} is not its first")]
    UnknownProducer {
        /// The batch's first sequence.
        given: i32,
    },
    /// The batch was appended long ago: too long to say where.
    #[error("sequence {given} was appended before; the oldest batch remembered begins at {oldest_known}")]
    DuplicateTooOld {
        /// The batch's first sequence.
        given: i32,
        /// First sequence of the oldest batch that is remembered.
        oldest_known: i32,
    },
    /// As many producers are known as a log remembers.
    #[error("{limit} idempotent producers wrote here lately: no other is taken before one of them is forgotten")]
    TooManyProducers {
        /// How many there may be.
        limit: usize,
    },
}

impl SequenceError {
    /// Whether the same batch may be taken later. A gap may close (the missing batch is on its way on another try); nothing else changes.
    pub fn retryable(&self) -> bool {
        false
    }
}

/// What to do with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Append it.
    Append,
    /// It is there already, at these offsets.
    Duplicate {
        /// The original's first offset.
        base_offset: i64,
        /// The original's last offset.
        last_offset: i64,
    },
}

/// The last thing that a producer wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastSequence {
    /// Its epoch.
    pub epoch: i16,
    /// The last sequence; -1 if it wrote no records in this epoch.
    pub sequence: i32,
    /// The offset of that record; -1 likewise.
    pub offset: i64,
}

/// Whether a producer may miss batches that are older still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recalled {
    /// It may.
    More,
    /// It has all that it may send again, or all that there are.
    All,
}

/// The producers of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProducerState {
    producers: HashMap<i64, Producer>,
    max_producer_id: Option<i64>,
}

/// Decisions on a group of batches that is not written yet. Nothing changes before [`ProducerState::commit`].
#[derive(Debug)]
pub struct Staged<'a> {
    state: &'a ProducerState,
    touched: HashMap<i64, Producer>,
    now_ms: i64,
}

/// The decisions of a [`Staged`] group, ready to be committed.
#[derive(Debug, Default)]
pub struct StagedProducers(HashMap<i64, Producer>);

impl Staged<'_> {
    /// Decides on a batch, whose header has the offsets that it would get. Batches without a producer id are always appended.
    pub fn admit(&mut self, header: &BatchHeader) -> Result<Admission, SequenceError> {
        if header.producer_id == NO_PRODUCER_ID {
            return Ok(Admission::Append);
        }
        let known = self.touched.get(&header.producer_id).or_else(|| self.state.producers.get(&header.producer_id));
        let given = header.base_sequence;
        match known {
            None if given != 0 => return Err(SequenceError::UnknownProducer { given }),
            None if self.state.producers.len() + self.touched.len() >= MAX_PRODUCERS => {
                return Err(SequenceError::TooManyProducers { limit: MAX_PRODUCERS });
            }
            None => {}
            Some(producer) => match header.producer_epoch.cmp(&producer.epoch) {
                Ordering::Less => {
                    return Err(SequenceError::OldEpoch { given: header.producer_epoch, current: producer.epoch });
                }
                Ordering::Greater if given != 0 => return Err(SequenceError::OutOfOrder { given, expected: 0 }),
                Ordering::Greater => {}
                Ordering::Equal => {
                    if let Some(duplicate) = duplicate(producer, header)? {
                        return Ok(duplicate);
                    }
                }
            },
        }
        let mut producer = match known {
            Some(producer) => producer.clone(),
            None => Producer::new(header.producer_epoch, self.now_ms),
        };
        producer.remember(header, self.now_ms);
        self.touched.insert(header.producer_id, producer);
        Ok(Admission::Append)
    }

    /// The decisions, to be committed once they are written.
    pub fn finish(self) -> StagedProducers {
        StagedProducers(self.touched)
    }
}

/// For a batch of the producer's current epoch: whether it is there already, or must not be.
fn duplicate(producer: &Producer, header: &BatchHeader) -> Result<Option<Admission>, SequenceError> {
    let given = header.base_sequence;
    let Some(last) = producer.batches.last() else {
        // A control batch began the epoch; the records that follow begin at 0.
        return if given == 0 { Ok(None) } else { Err(SequenceError::OutOfOrder { given, expected: 0 }) };
    };
    let expected = sequence_after(last.last_sequence);
    if given == expected {
        return Ok(None);
    }
    let last_sequence = header.last_sequence();
    let same = |batch: &&RememberedBatch| batch.first_sequence() == given && batch.last_sequence == last_sequence;
    if let Some(original) = producer.batches.iter().rev().find(same) {
        let (base_offset, last_offset) = (original.first_offset(), original.last_offset);
        return Ok(Some(Admission::Duplicate { base_offset, last_offset }));
    }
    // On the ring, what lies less than half of it behind was written before.
    let behind = sequence_before(expected, given);
    let oldest_known = producer.batches.first().map_or(NO_SEQUENCE, RememberedBatch::first_sequence);
    if behind < 1 << 30 && sequence_before(expected, oldest_known) < behind {
        return Err(SequenceError::DuplicateTooOld { given, oldest_known });
    }
    // Compaction may have taken the batch from between those that are remembered, once the log was opened anew.
    let ends = sequence_before(expected, last_sequence);
    let is_remembered = |batch: &RememberedBatch| {
        ends <= sequence_before(expected, batch.first_sequence())
            && sequence_before(expected, batch.last_sequence) <= behind
    };
    if (1..=behind).contains(&ends) && behind < 1 << 30 && !producer.batches.iter().any(is_remembered) {
        return Err(SequenceError::DuplicateTooOld { given, oldest_known });
    }
    Err(SequenceError::OutOfOrder { given, expected })
}

impl ProducerState {
    /// Begins to decide on a group of batches.
    pub fn stage(&self, now_ms: i64) -> Staged<'_> {
        Staged { state: self, touched: HashMap::new(), now_ms }
    }

    /// Makes decisions true: their batches are in the log.
    pub fn commit(&mut self, staged: StagedProducers) {
        for (id, producer) in staged.0 {
            self.max_producer_id = self.max_producer_id.max(Some(id));
            self.producers.insert(id, producer);
        }
    }

    /// Takes note of a batch that is in the log already (a follower's append, or recovery). `coordinator_epoch` is that of a control batch's marker.
    pub fn replay(&mut self, header: &BatchHeader, coordinator_epoch: Option<i32>, now_ms: i64) {
        if header.producer_id == NO_PRODUCER_ID {
            return;
        }
        self.max_producer_id = self.max_producer_id.max(Some(header.producer_id));
        let producer =
            self.producers.entry(header.producer_id).or_insert_with(|| Producer::new(header.producer_epoch, now_ms));
        if header.is_control() {
            producer.set_epoch(header.producer_epoch);
            producer.coordinator_epoch = coordinator_epoch.unwrap_or(producer.coordinator_epoch);
            producer.current_txn_first_offset = None;
            producer.last_timestamp = header.max_timestamp;
            producer.last_active_ms = now_ms;
        } else {
            producer.remember(header, now_ms);
        }
    }

    /// The producers of which fewer batches are remembered than they may send again, and the first offset of the oldest. One whose sequence
    /// began with that batch has no earlier one.
    pub(crate) fn missing(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        let missing = self.producers.iter().filter(|(_, producer)| producer.misses_batches());
        missing.filter_map(|(id, producer)| Some((*id, producer.batches.first()?.first_offset())))
    }

    /// The first offset of the oldest batch that is remembered of a producer.
    pub(crate) fn known_from(&self, producer_id: i64) -> Option<i64> {
        self.producers.get(&producer_id)?.batches.first().map(RememberedBatch::first_offset)
    }

    /// Whether the oldest batch that is remembered of a producer is the next one after the last of a snapshot.
    pub(crate) fn follows(&self, producer_id: i64, before: &SnapshotEntry) -> bool {
        let Some(producer) = self.producers.get(&producer_id) else { return false };
        let is_known = before.last_offset >= 0 && before.last_sequence >= 0;
        is_known && producer.begins_after(before.producer_epoch, before.last_sequence, before.last_offset)
    }

    /// Whether a segment that begins with this snapshot may hold earlier batches of a producer, which the snapshot's last one does not lead to. A
    /// sequence does not go around within a segment.
    pub(crate) fn may_have_begun_after(&self, producer_id: i64, before: Option<&SnapshotEntry>) -> bool {
        let Some(producer) = self.producers.get(&producer_id) else { return false };
        let known_before = before.is_some_and(|before| before.producer_epoch == producer.epoch);
        known_before || producer.batches.first().is_some_and(|oldest| oldest.first_sequence() != 0)
    }

    /// Remembers a batch that is older than those that are. Batches are given from the newest on.
    pub(crate) fn recall(&mut self, header: &BatchHeader) -> Recalled {
        let Some(producer) = self.producers.get_mut(&header.producer_id) else { return Recalled::All };
        let batch = RememberedBatch::of(header);
        if producer.batches.first().is_some_and(|oldest| batch.last_offset >= oldest.first_offset()) {
            return Recalled::More;
        }
        if !producer.begins_after(header.producer_epoch, batch.last_sequence, batch.last_offset) {
            // Another epoch's, or one that compaction cut off from what came behind it.
            return Recalled::All;
        }
        producer.batches.insert(0, batch);
        if producer.misses_batches() { Recalled::More } else { Recalled::All }
    }

    /// The last thing that a producer wrote.
    pub fn last_sequence(&self, producer_id: i64) -> Option<LastSequence> {
        let producer = self.producers.get(&producer_id)?;
        let last = producer.batches.last();
        Some(LastSequence {
            epoch: producer.epoch,
            sequence: last.map_or(NO_SEQUENCE, |batch| batch.last_sequence),
            offset: last.map_or(-1, |batch| batch.last_offset),
        })
    }

    /// The last offset written by each live producer, which compaction must keep.
    pub fn last_offsets(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.producers.iter().filter_map(|(id, producer)| producer.batches.last().map(|batch| (*id, batch.last_offset)))
    }

    /// The largest producer id that was ever seen.
    pub fn max_producer_id(&self) -> Option<i64> {
        self.max_producer_id
    }

    /// How many producers are known.
    pub fn len(&self) -> usize {
        self.producers.len()
    }

    /// Whether no producer is known.
    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// Forgets producers that wrote nothing for `expiration_ms` and have no open transaction; how many.
    pub fn expire(&mut self, now_ms: i64, expiration_ms: u64) -> usize {
        let before = self.producers.len();
        let expiration_ms = i64::try_from(expiration_ms).unwrap_or(i64::MAX);
        self.producers.retain(|_, producer| {
            producer.current_txn_first_offset.is_some()
                || now_ms.saturating_sub(producer.last_active_ms) < expiration_ms
        });
        before - self.producers.len()
    }

    /// What a snapshot holds, by producer id.
    pub fn snapshot(&self) -> Vec<SnapshotEntry> {
        let mut entries: Vec<SnapshotEntry> = self
            .producers
            .iter()
            .map(|(id, producer)| {
                let last = producer.batches.last();
                SnapshotEntry {
                    producer_id: *id,
                    producer_epoch: producer.epoch,
                    last_sequence: last.map_or(NO_SEQUENCE, |batch| batch.last_sequence),
                    last_offset: last.map_or(-1, |batch| batch.last_offset),
                    offset_delta: last.map_or(0, |batch| batch.offset_delta),
                    timestamp: producer.last_timestamp,
                    coordinator_epoch: producer.coordinator_epoch,
                    current_txn_first_offset: producer.current_txn_first_offset.unwrap_or(-1),
                }
            })
            .collect();
        entries.sort_by_key(|entry| entry.producer_id);
        entries
    }

    /// The state that a snapshot holds.
    pub fn from_snapshot(entries: &[SnapshotEntry], now_ms: i64) -> ProducerState {
        let mut state = ProducerState::default();
        for entry in entries {
            state.max_producer_id = state.max_producer_id.max(Some(entry.producer_id));
            let mut producer = Producer::new(entry.producer_epoch, now_ms);
            producer.coordinator_epoch = entry.coordinator_epoch;
            producer.last_timestamp = entry.timestamp;
            producer.current_txn_first_offset = Some(entry.current_txn_first_offset).filter(|offset| *offset >= 0);
            if entry.last_offset >= 0 && entry.last_sequence >= 0 {
                producer.batches.push(RememberedBatch {
                    last_sequence: entry.last_sequence,
                    last_offset: entry.last_offset,
                    offset_delta: entry.offset_delta,
                    timestamp: entry.timestamp,
                });
            }
            state.producers.insert(entry.producer_id, producer);
        }
        state
    }
}

/// One producer in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// The producer.
    pub producer_id: i64,
    /// Its epoch.
    pub producer_epoch: i16,
    /// Last sequence of its last batch; -1: none in this epoch.
    pub last_sequence: i32,
    /// Last offset of its last batch; -1 likewise.
    pub last_offset: i64,
    /// Last offset less first offset of that batch.
    pub offset_delta: i32,
    /// Largest timestamp of that batch.
    pub timestamp: i64,
    /// Epoch of the transaction coordinator that wrote its last marker; -1: none.
    pub coordinator_epoch: i32,
    /// Where its open transaction began; -1: none.
    pub current_txn_first_offset: i64,
}

/// A snapshot file that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("position {position}: {detail}")]
pub struct SnapshotFault {
    /// Where in the file, in bytes.
    pub position: u64,
    /// What is wrong there.
    pub detail: String,
}

const SNAPSHOT_VERSION: i16 = 1;
pub(crate) const SNAPSHOT_HEADER_BYTES: usize = 10;
pub(crate) const SNAPSHOT_ENTRY_BYTES: usize = 46;

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// A snapshot file's bytes.
pub fn encode_snapshot(entries: &[SnapshotEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SNAPSHOT_HEADER_BYTES + entries.len() * SNAPSHOT_ENTRY_BYTES);
    bytes.extend_from_slice(&SNAPSHOT_VERSION.to_be_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(entries.len() as i32).to_be_bytes());
    for entry in entries {
        bytes.extend_from_slice(&entry.producer_id.to_be_bytes());
        bytes.extend_from_slice(&entry.producer_epoch.to_be_bytes());
        bytes.extend_from_slice(&entry.last_sequence.to_be_bytes());
        bytes.extend_from_slice(&entry.last_offset.to_be_bytes());
        bytes.extend_from_slice(&entry.offset_delta.to_be_bytes());
        bytes.extend_from_slice(&entry.timestamp.to_be_bytes());
        bytes.extend_from_slice(&entry.coordinator_epoch.to_be_bytes());
        bytes.extend_from_slice(&entry.current_txn_first_offset.to_be_bytes());
    }
    let crc = crc32c(&bytes[6..]);
    bytes[2..6].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// Reads a snapshot file.
pub fn decode_snapshot(bytes: &[u8]) -> Result<Vec<SnapshotEntry>, SnapshotFault> {
    let fault = |position: usize, detail: String| SnapshotFault { position: position as u64, detail };
    let Some((header, body)) = bytes.split_first_chunk::<SNAPSHOT_HEADER_BYTES>() else {
        return Err(fault(bytes.len(), "the header is cut short".into()));
    };
    let [v0, v1, c0, c1, c2, c3, n0, n1, n2, n3] = *header;
    let version = i16::from_be_bytes([v0, v1]);
    if version != SNAPSHOT_VERSION {
        return Err(fault(0, format!("version {version}, expected {SNAPSHOT_VERSION}")));
    }
    let (stored, computed) = (u32::from_be_bytes([c0, c1, c2, c3]), crc32c(&bytes[6..]));
    if stored != computed {
        return Err(fault(2, format!("checksum {computed}, the file says {stored}")));
    }
    let count = i32::from_be_bytes([n0, n1, n2, n3]);
    if usize::try_from(count).ok().and_then(|count| count.checked_mul(SNAPSHOT_ENTRY_BYTES)) != Some(body.len()) {
        return Err(fault(6, format!("{count} entries do not fill {} bytes", body.len())));
    }
    Ok(body.chunks_exact(SNAPSHOT_ENTRY_BYTES).filter_map(decode_entry).collect())
}

fn decode_entry(mut bytes: &[u8]) -> Option<SnapshotEntry> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (first, rest) = bytes.split_first_chunk::<N>()?;
        *bytes = rest;
        Some(*first)
    }
    Some(SnapshotEntry {
        producer_id: i64::from_be_bytes(take(&mut bytes)?),
        producer_epoch: i16::from_be_bytes(take(&mut bytes)?),
        last_sequence: i32::from_be_bytes(take(&mut bytes)?),
        last_offset: i64::from_be_bytes(take(&mut bytes)?),
        offset_delta: i32::from_be_bytes(take(&mut bytes)?),
        timestamp: i64::from_be_bytes(take(&mut bytes)?),
        coordinator_epoch: i32::from_be_bytes(take(&mut bytes)?),
        current_txn_first_offset: i64::from_be_bytes(take(&mut bytes)?),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(id: i64, epoch: i16, sequence: i32, records: i32, base_offset: i64) -> BatchHeader {
        BatchHeader {
            base_offset,
            batch_length: 100,
            leader_epoch: 0,
            magic: 2,
            crc: 0,
            attributes: 0,
            last_offset_delta: records - 1,
            base_timestamp: 1000,
            max_timestamp: 1000 + base_offset,
            producer_id: id,
            producer_epoch: epoch,
            base_sequence: sequence,
            record_count: records,
        }
    }

    /// Every id was once remembered: one client with a fresh id in each batch filled the memory, and the snapshots.
    #[test]
    fn a_log_takes_no_more_producers_than_it_remembers() {
        let mut state = ProducerState::default();
        let limit = MAX_PRODUCERS as i64;
        (0..limit - 1).for_each(|id| state.replay(&batch(id, 0, 0, 1, id), None, 0));
        assert_eq!(append(&mut state, &batch(limit, 0, 0, 1, limit)), Ok(Admission::Append));
        let refused = Err(SequenceError::TooManyProducers { limit: MAX_PRODUCERS });
        assert_eq!(append(&mut state, &batch(limit + 1, 0, 0, 1, limit + 1)), refused);
        assert_eq!(append(&mut state, &batch(7, 0, 1, 1, limit + 1)), Ok(Admission::Append), "those known go on");
        assert_eq!(state.expire(1000, 1000), MAX_PRODUCERS);
        assert_eq!(append(&mut state, &batch(limit + 1, 0, 0, 1, limit + 2)), Ok(Admission::Append));
    }

    fn append(state: &mut ProducerState, header: &BatchHeader) -> Result<Admission, SequenceError> {
        let mut staged = state.stage(0);
        let decision = staged.admit(header);
        let staged = staged.finish();
        state.commit(staged);
        decision
    }

    #[test]
    fn the_last_five_batches_are_recognised_and_older_ones_named() {
        let mut state = ProducerState::default();
        for n in 0..7 {
            assert_eq!(append(&mut state, &batch(1, 0, n * 10, 10, i64::from(n) * 10)), Ok(Admission::Append));
        }
        for n in 2..7i64 {
            let duplicate = Admission::Duplicate { base_offset: n * 10, last_offset: n * 10 + 9 };
            assert_eq!(append(&mut state, &batch(1, 0, n as i32 * 10, 10, 70)), Ok(duplicate));
        }
        let too_old = SequenceError::DuplicateTooOld { given: 10, oldest_known: 20 };
        assert_eq!(append(&mut state, &batch(1, 0, 10, 10, 70)), Err(too_old));
        assert_eq!(
            append(&mut state, &batch(1, 0, 80, 1, 70)),
            Err(SequenceError::OutOfOrder { given: 80, expected: 70 })
        );
        assert_eq!(
            append(&mut state, &batch(1, 0, 65, 10, 70)),
            Err(SequenceError::OutOfOrder { given: 65, expected: 70 })
        );
        assert_eq!(state.last_sequence(1), Some(LastSequence { epoch: 0, sequence: 69, offset: 69 }));
    }

    /// The retry of a batch that was acknowledged on its way to nobody, and compacted meanwhile, is no gap: its records were kept.
    #[test]
    fn a_batch_that_compaction_took_from_between_others_was_appended() {
        let mut state = ProducerState::default();
        for (first, offset) in [(0, 0), (20, 20), (40, 40)] {
            state.replay(&batch(1, 0, first, 10, offset), None, 0);
        }
        for given in [10, 30, 35] {
            let too_old = SequenceError::DuplicateTooOld { given, oldest_known: 0 };
            assert_eq!(append(&mut state, &batch(1, 0, given, 5, 50)), Err(too_old));
        }
        // Nobody ever sent these: they overlap others, or go beyond the end.
        for (given, count) in [(15, 10), (18, 4), (22, 3), (45, 10), (60, 5)] {
            let gap = SequenceError::OutOfOrder { given, expected: 50 };
            assert_eq!(append(&mut state, &batch(1, 0, given, count, 50)), Err(gap));
        }
    }

    #[test]
    fn a_new_epoch_begins_at_zero_and_fences_the_old() {
        let mut state = ProducerState::default();
        append(&mut state, &batch(1, 3, 0, 5, 0)).unwrap();
        assert_eq!(append(&mut state, &batch(1, 4, 5, 1, 5)), Err(SequenceError::OutOfOrder { given: 5, expected: 0 }));
        assert_eq!(append(&mut state, &batch(1, 4, 0, 5, 5)), Ok(Admission::Append));
        assert_eq!(append(&mut state, &batch(1, 3, 5, 5, 10)), Err(SequenceError::OldEpoch { given: 3, current: 4 }));
        assert_eq!(append(&mut state, &batch(2, 0, 7, 1, 10)), Err(SequenceError::UnknownProducer { given: 7 }));
        assert_eq!(state.max_producer_id(), Some(1));
    }

    #[test]
    fn sequences_go_on_at_zero_after_the_largest() {
        let mut state = ProducerState::default();
        state.replay(&batch(1, 0, i32::MAX - 4, 5, 0), None, 0);
        assert_eq!(append(&mut state, &batch(1, 0, 0, 3, 5)), Ok(Admission::Append));
        let original = Admission::Duplicate { base_offset: 0, last_offset: 4 };
        assert_eq!(append(&mut state, &batch(1, 0, i32::MAX - 4, 5, 8)), Ok(original));
        assert!(matches!(
            append(&mut state, &batch(1, 0, i32::MAX - 9, 5, 8)),
            Err(SequenceError::DuplicateTooOld { .. })
        ));
    }

    #[test]
    fn a_group_sees_its_own_batches_and_nothing_counts_before_the_commit() {
        let mut state = ProducerState::default();
        let mut staged = state.stage(0);
        assert_eq!(staged.admit(&batch(1, 0, 0, 2, 0)), Ok(Admission::Append));
        assert_eq!(staged.admit(&batch(1, 0, 2, 2, 2)), Ok(Admission::Append));
        assert_eq!(staged.admit(&batch(1, 0, 0, 2, 4)), Ok(Admission::Duplicate { base_offset: 0, last_offset: 1 }));
        let staged = staged.finish();
        assert!(state.is_empty());
        state.commit(staged);
        assert_eq!(state.last_sequence(1).map(|last| last.sequence), Some(3));
    }

    #[test]
    fn producers_that_write_nothing_are_forgotten() {
        let mut state = ProducerState::default();
        state.replay(&batch(1, 0, 0, 1, 0), None, 1_000);
        state.replay(&batch(2, 0, 0, 1, 1), None, 5_000);
        assert_eq!(state.expire(6_000, 5_000), 1);
        assert_eq!((state.last_sequence(1), state.len(), state.max_producer_id()), (None, 1, Some(2)));
    }

    #[test]
    fn kafkas_snapshots_come_back_byte_for_byte() {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs/dirs");
        let mut seen = 0;
        for folder in std::fs::read_dir(fixtures).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
            for file in std::fs::read_dir(folder.path()).unwrap().flatten() {
                if file.path().extension().is_some_and(|extension| extension == "snapshot") {
                    let bytes = std::fs::read(file.path()).unwrap();
                    let entries = decode_snapshot(&bytes).unwrap();
                    assert_eq!(encode_snapshot(&entries), bytes, "{}", file.path().display());
                    let state = ProducerState::from_snapshot(&entries, 0).snapshot();
                    assert_eq!(state, entries, "{}", file.path().display());
                    seen += 1;
                }
            }
        }
        assert!(seen >= 15, "{seen}");
    }

    #[test]
    fn every_flipped_bit_of_a_snapshot_is_seen() {
        let mut state = ProducerState::default();
        append(&mut state, &batch(1, 0, 0, 2, 0)).unwrap();
        append(&mut state, &batch(9, 2, 0, 2, 2)).unwrap();
        let bytes = encode_snapshot(&state.snapshot());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_snapshot(&damaged).is_err(), "bit {bit}");
        }
        (0..bytes.len()).for_each(|cut| assert!(decode_snapshot(&bytes[..cut]).is_err()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_snapshot_or_a_fault(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_snapshot(&bytes);
        }
    }
}
