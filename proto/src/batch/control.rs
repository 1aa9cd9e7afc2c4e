//! The records of control batches: the ends of transactions, and what Kafka's own quorum writes.
//!
//! ```text
//!  key     0         2       4                 value   0         2                   6
//!          | i16     | i16   |                         | i16     | i32               |
//!          | version | type  |                         | version | coordinator epoch |
//! ```
//!
//! Owns: reading and writing both. Refuses: what a transaction's end means for readers. Read next: [`super::record`].

use super::BatchError;

/// What a control record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlType {
    /// The producer's transaction was aborted.
    Abort,
    /// The producer's transaction was committed.
    Commit,
    /// Something that is not ours to read (leader changes and snapshots of Kafka's quorum, ...).
    Other(i16),
}

/// Version of the keys and values that are written.
const VERSION: i16 = 0;

impl ControlType {
    /// The type's number in the key.
    pub const fn number(self) -> i16 {
        match self {
            ControlType::Abort => 0,
            ControlType::Commit => 1,
            ControlType::Other(number) => number,
        }
    }

    /// The type's name.
    pub const fn name(self) -> &'static str {
        match self {
            ControlType::Abort => "abort",
            ControlType::Commit => "commit",
            ControlType::Other(_) => "other",
        }
    }
}

/// Reads a control record's key. Bytes after the type belong to later versions and are left alone.
pub fn parse_key(key: &[u8]) -> Result<ControlType, BatchError> {
    let (version, rest) = key.split_first_chunk().ok_or(BatchError::ControlRecord)?;
    let number = rest.first_chunk().ok_or(BatchError::ControlRecord)?;
    if i16::from_be_bytes(*version) < VERSION {
        return Err(BatchError::ControlRecord);
    }
    Ok(match i16::from_be_bytes(*number) {
        0 => ControlType::Abort,
        1 => ControlType::Commit,
        number => ControlType::Other(number),
    })
}

/// Reads the value of a transaction's end: the epoch of the coordinator that wrote it.
pub fn parse_coordinator_epoch(value: &[u8]) -> Result<i32, BatchError> {
    let (version, rest) = value.split_first_chunk().ok_or(BatchError::ControlRecord)?;
    let epoch = rest.first_chunk().ok_or(BatchError::ControlRecord)?;
    if i16::from_be_bytes(*version) < VERSION {
        return Err(BatchError::ControlRecord);
    }
    Ok(i32::from_be_bytes(*epoch))
}

/// The key of a control record.
pub fn key(control: ControlType) -> [u8; 4] {
    let ([a, b], [c, d]) = (VERSION.to_be_bytes(), control.number().to_be_bytes());
    [a, b, c, d]
}

/// The value of a transaction's end.
pub fn marker_value(coordinator_epoch: i32) -> [u8; 6] {
    let ([a, b], [c, d, e, f]) = (VERSION.to_be_bytes(), coordinator_epoch.to_be_bytes());
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_come_back() {
        for control in [ControlType::Abort, ControlType::Commit, ControlType::Other(2)] {
            assert_eq!(parse_key(&key(control)), Ok(control));
        }
        assert_eq!(parse_coordinator_epoch(&marker_value(-7)), Ok(-7));
    }

    #[test]
    fn short_ones_and_negative_versions_are_refused() {
        assert_eq!(parse_key(&[0, 0, 0]), Err(BatchError::ControlRecord));
        assert_eq!(parse_key(&[0xff, 0xff, 0, 0]), Err(BatchError::ControlRecord));
        assert_eq!(parse_coordinator_epoch(&[0, 0, 0, 0, 0]), Err(BatchError::ControlRecord));
    }
}
