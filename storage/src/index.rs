//! The two indexes of a segment, as Kafka lays them out and means them.
//!
//! Owns: the entries' bytes, when an entry is due ([`IndexBuilder`]), and whether a file of entries is sane. Refuses: I/O.
//! Read next: `segment.rs`, which keeps the files.
//!
//! ```text
//! <base>.index      8 bytes an entry:  u32 offset - base | u32 position                  (big endian)
//!                   the batch that begins at `position` ends with that offset; both strictly rising
//! <base>.timeindex 12 bytes an entry:  i64 timestamp | u32 offset - base                 (big endian)
//!                   `timestamp` is the largest of all batches up to the one that ends with that offset, which brought it;
//!                   timestamps strictly rising, offsets rising
//! ```

use headwater_proto::batch::BatchHeader;

/// An entry of the offset index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffsetEntry {
    /// Last offset of the batch, less the segment's base offset.
    pub relative_offset: u32,
    /// Where the batch begins in the `.log`, in bytes.
    pub position: u32,
}

/// An entry of the time index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeEntry {
    /// The largest timestamp so far, in milliseconds since the epoch.
    pub timestamp: i64,
    /// Last offset of the batch that brought it, less the segment's base offset.
    pub relative_offset: u32,
}

/// What both kinds of entries have in common.
pub trait IndexEntry: Sized + Copy + std::fmt::Debug {
    /// Bytes of an entry.
    const SIZE: usize;
    /// The extension of the file that holds them.
    const EXTENSION: &'static str;
    /// Appends the entry's bytes.
    fn put(&self, to: &mut Vec<u8>);
    /// The entry in exactly [`IndexEntry::SIZE`] bytes.
    fn decode(bytes: &[u8]) -> Option<Self>;
    /// Whether this entry may follow that one.
    fn may_follow(&self, earlier: &Self) -> bool;
}

impl IndexEntry for OffsetEntry {
    const SIZE: usize = 8;
    const EXTENSION: &'static str = ".index";

    fn put(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.relative_offset.to_be_bytes());
        to.extend_from_slice(&self.position.to_be_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<OffsetEntry> {
        let (offset, position) = bytes.split_first_chunk::<4>()?;
        Some(OffsetEntry {
            relative_offset: u32::from_be_bytes(*offset),
            position: u32::from_be_bytes(position.try_into().ok()?),
        })
    }

    fn may_follow(&self, earlier: &OffsetEntry) -> bool {
        self.relative_offset > earlier.relative_offset && self.position > earlier.position
    }
}

impl IndexEntry for TimeEntry {
    const SIZE: usize = 12;
    const EXTENSION: &'static str = ".timeindex";

    fn put(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.timestamp.to_be_bytes());
        to.extend_from_slice(&self.relative_offset.to_be_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<TimeEntry> {
        let (timestamp, offset) = bytes.split_first_chunk::<8>()?;
        Some(TimeEntry {
            timestamp: i64::from_be_bytes(*timestamp),
            relative_offset: u32::from_be_bytes(offset.try_into().ok()?),
        })
    }

    fn may_follow(&self, earlier: &TimeEntry) -> bool {
        self.timestamp > earlier.timestamp && self.relative_offset >= earlier.relative_offset
    }
}

/// A file of entries that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("position {position}: {detail}")]
pub struct IndexFault {
    /// Where in the index file, in bytes.
    pub position: u64,
    /// What is wrong there.
    pub detail: String,
}

/// All entries of an index file, whose order is checked. Zero entries at the end are space that Kafka reserves in the index of
/// an active segment, and are left out.
pub fn decode_entries<E: IndexEntry>(bytes: &[u8]) -> Result<Vec<E>, IndexFault> {
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1).next_multiple_of(E::SIZE);
    if !bytes.len().is_multiple_of(E::SIZE) || used > bytes.len() {
        let position = bytes.len() / E::SIZE * E::SIZE;
        return Err(IndexFault {
            position: position as u64,
            detail: format!("half an entry ({} bytes)", bytes.len() - position),
        });
    }
    let mut entries: Vec<E> = Vec::with_capacity(used / E::SIZE);
    for (number, chunk) in bytes[..used].chunks_exact(E::SIZE).enumerate() {
        let Some(entry) = E::decode(chunk) else { continue };
        if let Some(earlier) = entries.last().filter(|earlier| !entry.may_follow(earlier)) {
            let detail = format!("{entry:?} does not follow {earlier:?}");
            return Err(IndexFault { position: (number * E::SIZE) as u64, detail });
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// The entries of an index file up to the first that is not in order: of a file that a crash may have left with an end, or with zeros.
pub fn leading_entries<E: IndexEntry>(bytes: &[u8]) -> Vec<E> {
    let mut entries: Vec<E> = Vec::with_capacity(bytes.len() / E::SIZE);
    for chunk in bytes.chunks_exact(E::SIZE) {
        match E::decode(chunk) {
            Some(entry) if entries.last().is_none_or(|earlier| entry.may_follow(earlier)) => entries.push(entry),
            _ => break,
        }
    }
    entries
}

/// Both indexes' entries as bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexBytes {
    /// Of the offset index.
    pub offsets: Vec<u8>,
    /// Of the time index.
    pub times: Vec<u8>,
}

/// Decides, batch by batch, which entries a segment's indexes get.
#[derive(Debug, Clone)]
pub struct IndexBuilder {
    base_offset: i64,
    interval_bytes: u64,
    bytes_since_entry: u64,
    largest: Option<LargestTimestamp>,
    last_time_entry: Option<i64>,
    offset_entries: usize,
    time_entries: usize,
}

/// The largest timestamp of a segment, and the last offset of the batch that brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestTimestamp {
    /// In milliseconds since the epoch.
    pub timestamp: i64,
    /// Last offset of the first batch that has it.
    pub offset: i64,
}

impl IndexBuilder {
    /// For a segment from its first byte on, with an entry after every `interval_bytes` (Kafka's `index.interval.bytes`).
    pub fn new(base_offset: i64, interval_bytes: u32) -> IndexBuilder {
        IndexBuilder {
            base_offset,
            interval_bytes: u64::from(interval_bytes),
            bytes_since_entry: 0,
            largest: None,
            last_time_entry: None,
            offset_entries: 0,
            time_entries: 0,
        }
    }

    /// Takes note of a batch that begins at `position`; appends the entries that are due to `to`.
    pub fn batch(&mut self, header: &BatchHeader, position: u64, to: &mut IndexBytes) {
        let last_offset = header.last_offset();
        if self.largest.is_none_or(|largest| header.max_timestamp > largest.timestamp) {
            self.largest = Some(LargestTimestamp { timestamp: header.max_timestamp, offset: last_offset });
        }
        if self.bytes_since_entry > self.interval_bytes {
            // Both conversions hold: a segment is rolled before either number could pass 2^31.
            if let (Ok(relative_offset), Ok(position)) =
                (u32::try_from(last_offset - self.base_offset), u32::try_from(position))
            {
                OffsetEntry { relative_offset, position }.put(&mut to.offsets);
                self.offset_entries += 1;
            }
            self.time_entry(to);
            self.bytes_since_entry = 0;
        }
        self.bytes_since_entry += header.size() as u64;
    }

    /// Appends the time index's last entry, which Kafka writes when a segment is rolled or closed.
    pub fn seal(&mut self, to: &mut IndexBytes) {
        self.time_entry(to);
    }

    fn time_entry(&mut self, to: &mut IndexBytes) {
        let Some(largest) = self.largest else { return };
        // Nor is there an entry for batches without a timestamp (-1).
        if largest.timestamp <= self.last_time_entry.unwrap_or(-1) {
            return;
        }
        if let Ok(relative_offset) = u32::try_from(largest.offset - self.base_offset) {
            TimeEntry { timestamp: largest.timestamp, relative_offset }.put(&mut to.times);
            self.last_time_entry = Some(largest.timestamp);
            self.time_entries += 1;
        }
    }

    /// The segment's largest timestamp so far.
    pub fn largest(&self) -> Option<LargestTimestamp> {
        self.largest
    }

    /// Whether either index has reached `index_bytes` (Kafka's `segment.index.bytes`); the segment is rolled then.
    pub fn is_full(&self, index_bytes: u32) -> bool {
        let limit = index_bytes as usize;
        // The time index keeps room for the entry that sealing adds.
        (self.offset_entries + 1) * OffsetEntry::SIZE > limit || (self.time_entries + 2) * TimeEntry::SIZE > limit
    }

    /// Continues a segment whose indexes hold these entries already, `bytes_since_entry` bytes of log beyond the last of them.
    pub fn resume(
        &mut self,
        offset_entries: usize,
        time_entries: usize,
        last_time_entry: Option<i64>,
        largest: Option<LargestTimestamp>,
        bytes_since_entry: u64,
    ) {
        self.offset_entries = offset_entries;
        self.time_entries = time_entries;
        self.last_time_entry = last_time_entry;
        self.largest = largest;
        self.bytes_since_entry = bytes_since_entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<E: IndexEntry>(entries: &[E]) -> Vec<u8> {
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| entry.put(&mut bytes));
        bytes
    }

    #[test]
    fn entries_are_kafkas_bytes() {
        let entries = [
            OffsetEntry { relative_offset: 179, position: 16333 },
            OffsetEntry { relative_offset: 269, position: 32648 },
        ];
        assert_eq!(bytes(&entries), [0, 0, 0, 0xb3, 0, 0, 0x3f, 0xcd, 0, 0, 1, 0x0d, 0, 0, 0x7f, 0x88]);
        let times = [TimeEntry { timestamp: 1_700_261_765_463, relative_offset: 179 }];
        assert_eq!(bytes(&times), [0, 0, 1, 0x8b, 0xdf, 0x7f, 0xa1, 0x57, 0, 0, 0, 0xb3]);
        assert_eq!(decode_entries::<OffsetEntry>(&bytes(&entries)), Ok(entries.to_vec()));
        assert_eq!(decode_entries::<TimeEntry>(&bytes(&times)), Ok(times.to_vec()));
    }

    #[test]
    fn reserved_zeros_at_the_end_are_no_entries() {
        let entry = OffsetEntry { relative_offset: 256, position: 0x100 };
        let mut file = bytes(&[entry]);
        file.resize(80, 0);
        assert_eq!(decode_entries::<OffsetEntry>(&file), Ok(vec![entry]));
        assert_eq!(decode_entries::<TimeEntry>(&[0; 24]), Ok(vec![]));
        assert_eq!(decode_entries::<TimeEntry>(&[]), Ok(vec![]));
    }

    #[test]
    fn half_entries_and_wrong_order_are_faults_at_their_position() {
        let file = bytes(&[
            OffsetEntry { relative_offset: 9, position: 90 },
            OffsetEntry { relative_offset: 8, position: 100 },
        ]);
        assert_eq!(decode_entries::<OffsetEntry>(&file).map_err(|fault| fault.position), Err(8));
        assert_eq!(decode_entries::<OffsetEntry>(&file[..11]).map_err(|fault| fault.position), Err(8));
        let times =
            bytes(&[TimeEntry { timestamp: 5, relative_offset: 1 }, TimeEntry { timestamp: 5, relative_offset: 2 }]);
        assert_eq!(decode_entries::<TimeEntry>(&times).map_err(|fault| fault.position), Err(12));
    }
}
