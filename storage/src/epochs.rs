//! Which leader wrote which part of a log: Kafka's `leader-epoch-checkpoint`.
//!
//! Owns: the history of leader epochs and its file's text. Refuses: I/O (`log.rs` writes the file before the recovery point
//! passes a new epoch's start). Read next: `log.rs`.
//!
//! Always: epochs and start offsets rise strictly.
//!
//! ```text
//! 0            version
//! 2            number of entries
//! 0 333        epoch, start offset
//! 2 900
//! ```

use std::fmt::Write;

use headwater_proto::batch::BatchHeader;

/// Name of the file in a partition's folder.
pub const FILE_NAME: &str = "leader-epoch-checkpoint";

/// The leader epoch of a batch whose leader had none.
pub(crate) const NO_EPOCH: i32 = -1;
/// The line on which the file's first entry stands.
pub(crate) const FIRST_LINE: usize = 3;

/// A leader epoch and where it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEntry {
    /// The leader epoch.
    pub epoch: i32,
    /// The first offset that this leader could write.
    pub start_offset: i64,
}

/// The history of a log's leader epochs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaderEpochs {
    entries: Vec<EpochEntry>,
}

/// A checkpoint file that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {detail}")]
pub struct TextFault {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub detail: String,
}

impl LeaderEpochs {
    /// Every epoch, the oldest first.
    pub fn entries(&self) -> &[EpochEntry] {
        &self.entries
    }

    /// The newest epoch that the log has seen.
    pub fn latest(&self) -> Option<i32> {
        self.entries.last().map(|entry| entry.epoch)
    }

    /// A leader of this epoch begins at this offset. True if that was news. An epoch that began where this one begins wrote nothing and
    /// is forgotten; an older epoch than the latest changes nothing.
    pub fn assign(&mut self, epoch: i32, start_offset: i64) -> bool {
        if epoch < 0 || self.latest().is_some_and(|latest| epoch <= latest) {
            return false;
        }
        self.entries.retain(|entry| entry.start_offset < start_offset);
        self.entries.push(EpochEntry { epoch, start_offset });
        true
    }

    /// The epoch that wrote an offset.
    pub fn at(&self, offset: i64) -> Option<i32> {
        let after = self.entries.partition_point(|entry| entry.start_offset <= offset);
        after.checked_sub(1).and_then(|last| self.entries.get(last)).map(|entry| entry.epoch)
    }

    /// The epoch that wrote a batch. The oldest epoch begins with the log, which may be within a batch.
    pub(crate) fn of_batch(&self, header: &BatchHeader) -> Option<i32> {
        let first = self.entries.first()?.start_offset;
        if header.last_offset() < first { None } else { self.at(header.base_offset.max(first)) }
    }

    /// What is wrong with a batch's leader epoch where the history says exactly who wrote what. Batches of before epochs were known
    /// have none; of those before the oldest one, it is known only that no newer leader wrote them.
    pub(crate) fn contradiction(&self, header: &BatchHeader) -> Option<String> {
        let epoch = header.leader_epoch;
        match self.of_batch(header) {
            _ if epoch == NO_EPOCH => None,
            _ if epoch < NO_EPOCH => Some(format!("leader epoch {epoch}")),
            Some(known) if epoch != known => Some(format!("leader epoch {epoch}, where {FILE_NAME} says {known}")),
            None if self.entries.first().is_some_and(|first| epoch > first.epoch) => {
                Some(format!("leader epoch {epoch}, which {FILE_NAME} does not know there"))
            }
            _ => None,
        }
    }

    /// For a peer that knows the log up to `epoch`: the largest epoch here that is not newer, and where the next one
    /// begins (`log_end` if there is none). `None` if this log knows no epoch at all, or only older ones than it.
    pub fn end_of(&self, epoch: i32, log_end: i64) -> Option<(i32, i64)> {
        if epoch < 0 || self.latest().is_none_or(|latest| epoch > latest) {
            return None;
        }
        let after = self.entries.partition_point(|entry| entry.epoch <= epoch);
        let end = self.entries.get(after).map_or(log_end, |next| next.start_offset);
        match after.checked_sub(1).and_then(|last| self.entries.get(last)) {
            Some(entry) => Some((entry.epoch, end)),
            // Everything of that epoch is gone from the log's beginning: it ended where the oldest known one begins.
            None => Some((epoch, end)),
        }
    }

    /// The log was cut: nothing at or beyond `end` exists. True if that changed anything.
    pub fn truncate_from(&mut self, end: i64) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| entry.start_offset < end);
        before != self.entries.len()
    }

    /// The log begins at `start`: epochs that ended before it are forgotten, the one at `start` begins there. True if that changed anything.
    pub fn start_at(&mut self, start: i64) -> bool {
        let after = self.entries.partition_point(|entry| entry.start_offset <= start);
        let Some(current) = after.checked_sub(1) else { return false };
        let changed = current > 0 || self.entries.first().is_some_and(|entry| entry.start_offset < start);
        self.entries.drain(..current);
        if let Some(entry) = self.entries.first_mut() {
            entry.start_offset = start;
        }
        changed
    }

    /// The line of the file that says who wrote an offset; the first entry's, of those before it.
    pub(crate) fn line_of(&self, offset: i64) -> usize {
        FIRST_LINE + self.entries.partition_point(|entry| entry.start_offset <= offset).saturating_sub(1)
    }

    /// The file's text.
    pub fn encode(&self) -> String {
        let mut text = format!("0\n{}\n", self.entries.len());
        for entry in &self.entries {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "{} {}", entry.epoch, entry.start_offset);
        }
        text
    }

    /// Reads the file's text.
    pub fn decode(bytes: &[u8]) -> Result<LeaderEpochs, TextFault> {
        let mut epochs = LeaderEpochs::default();
        for (line, fields) in crate::checkpoint::checkpoint_lines(bytes)? {
            let fault = |detail: &str| TextFault { line, detail: detail.into() };
            let [epoch, start_offset] = fields[..] else { return Err(fault("expected an epoch and an offset")) };
            let epoch: i32 = epoch.parse().map_err(|_| fault("not an epoch"))?;
            let start_offset: i64 = start_offset.parse().map_err(|_| fault("not an offset"))?;
            let rises = epochs.entries.last().is_none_or(|last| epoch > last.epoch && start_offset > last.start_offset);
            if epoch < 0 || start_offset < 0 || !rises {
                return Err(fault("epochs and offsets do not rise"));
            }
            epochs.entries.push(EpochEntry { epoch, start_offset });
        }
        Ok(epochs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epochs(entries: &[(i32, i64)]) -> LeaderEpochs {
        let mut epochs = LeaderEpochs::default();
        entries.iter().for_each(|(epoch, start)| assert!(epochs.assign(*epoch, *start)));
        epochs
    }

    #[test]
    fn kafkas_text_comes_back() {
        let text = "0\n2\n0 333\n2 900\n";
        let epochs = LeaderEpochs::decode(text.as_bytes()).unwrap();
        assert_eq!(
            epochs.entries(),
            [EpochEntry { epoch: 0, start_offset: 333 }, EpochEntry { epoch: 2, start_offset: 900 }]
        );
        assert_eq!(epochs.encode(), text);
        for bad in [
            "",
            "1\n0\n",
            "0\n1\n",
            "0\n1\n0 0\n1 1\n",
            "0\n1\nx 0\n",
            "0\n2\n1 5\n1 6\n",
            "0\n1\n0 0 0\n",
            "0\n1\n-1 0\n",
        ] {
            assert!(LeaderEpochs::decode(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_epoch_that_wrote_nothing_is_replaced() {
        let mut history = epochs(&[(1, 0), (2, 10)]);
        assert!(history.assign(5, 10));
        assert_eq!(history, epochs(&[(1, 0), (5, 10)]));
        assert!(!history.assign(5, 20));
        assert!(!history.assign(3, 20));
    }

    #[test]
    fn the_end_of_an_epoch_is_where_the_next_begins() {
        let history = epochs(&[(1, 0), (4, 10), (6, 25)]);
        assert_eq!(history.end_of(1, 40), Some((1, 10)));
        assert_eq!(history.end_of(3, 40), Some((1, 10)));
        assert_eq!(history.end_of(4, 40), Some((4, 25)));
        assert_eq!(history.end_of(6, 40), Some((6, 40)));
        assert_eq!(history.end_of(7, 40), None);
        assert_eq!(history.end_of(0, 40), Some((0, 0)));
        assert_eq!(
            (history.at(0), history.at(24), history.at(25), epochs(&[(3, 5)]).at(4)),
            (Some(1), Some(4), Some(6), None)
        );
    }

    #[test]
    fn cuts_at_both_ends_leave_what_the_log_still_holds() {
        let mut history = epochs(&[(1, 0), (4, 10), (6, 25)]);
        assert!(history.truncate_from(25));
        assert!(!history.truncate_from(25));
        assert_eq!(history, epochs(&[(1, 0), (4, 10)]));
        assert!(history.start_at(12));
        assert!(!history.start_at(12));
        assert_eq!(history, epochs(&[(4, 12)]));
    }
}
