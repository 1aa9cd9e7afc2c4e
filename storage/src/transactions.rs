//! The transaction index: which transactions of a segment were aborted.
//!
//! Owns: the entries' bytes. Refuses: their use; until transactions are served, everything is read as Kafka's read_uncommitted reads it.
//! Read next: `inspect/verify/indexes.rs`, which holds the entries against the log's markers.
//!
//! ```text
//! <base>.txnindex  34 bytes an entry:  i16 version (0) | i64 producer id | i64 first offset | i64 last offset | i64 last stable offset   (big endian)
//!                  in the segment that holds the abort marker, which lies at the last offset; last offsets strictly rising
//! ```

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 34;

/// Extension of the file.
pub const EXTENSION: &str = ".txnindex";

/// A transaction that was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbortedTransaction {
    /// Whose it was.
    pub producer_id: i64,
    /// Offset of its first record.
    pub first_offset: i64,
    /// Offset of its abort marker.
    pub last_offset: i64,
    /// The last stable offset when the marker was written.
    pub last_stable_offset: i64,
}

/// A transaction index that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("position {position}: {detail}")]
pub struct TransactionsFault {
    /// Where in the file, in bytes.
    pub position: u64,
    /// What is wrong there.
    pub detail: String,
}

impl AbortedTransaction {
    /// The entry's bytes.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let fields = [self.producer_id, self.first_offset, self.last_offset, self.last_stable_offset];
        for (place, field) in bytes[2..].chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_be_bytes());
        }
        bytes
    }
}

/// All entries up to the first that is wrong, and what is wrong there.
pub fn decode(bytes: &[u8]) -> (Vec<AbortedTransaction>, Option<TransactionsFault>) {
    let mut entries: Vec<AbortedTransaction> = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
    for (number, chunk) in bytes.chunks(ENTRY_BYTES).enumerate() {
        let fault =
            |detail: &str| Some(TransactionsFault { position: (number * ENTRY_BYTES) as u64, detail: detail.into() });
        let Ok([version_high, version_low, fields @ ..]) = <[u8; ENTRY_BYTES]>::try_from(chunk) else {
            return (entries, fault("half an entry"));
        };
        if [version_high, version_low] != [0, 0] {
            return (entries, fault("an unknown version"));
        }
        let mut fields = fields.as_chunks::<8>().0.iter().map(|field| i64::from_be_bytes(*field));
        let mut next = || fields.next().unwrap_or_default();
        let entry = AbortedTransaction {
            producer_id: next(),
            first_offset: next(),
            last_offset: next(),
            last_stable_offset: next(),
        };
        if entry.producer_id < 0
            || entry.first_offset < 0
            || entry.first_offset > entry.last_offset
            || entry.last_stable_offset < 0
        {
            return (entries, fault("impossible offsets"));
        }
        if entries.last().is_some_and(|last| last.last_offset >= entry.last_offset) {
            return (entries, fault("offsets do not rise"));
        }
        entries.push(entry);
    }
    (entries, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(last_offset: i64) -> AbortedTransaction {
        AbortedTransaction { producer_id: 3, first_offset: 4, last_offset, last_stable_offset: 5 }
    }

    #[test]
    fn entries_come_back() {
        let bytes = [entry(6).encode(), entry(9).encode()].concat();
        assert_eq!(decode(&bytes), (vec![entry(6), entry(9)], None));
    }

    #[test]
    fn what_cannot_be_is_placed() {
        let fault = |bytes: &[u8]| decode(bytes).1.map(|fault| fault.position);
        assert_eq!(fault(&[entry(6).encode(), entry(6).encode()].concat()), Some(34));
        assert_eq!(fault(&entry(6).encode()[..33]), Some(0));
        assert_eq!(fault(&entry(3).encode()), Some(0));
        let mut newer = entry(6).encode();
        newer[1] = 1;
        assert_eq!(fault(&newer), Some(0));
    }
}
