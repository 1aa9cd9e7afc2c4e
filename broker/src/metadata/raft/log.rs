//! The log as openraft sees it: votes and entries, each on stable storage before openraft hears that it is kept.
//!
//! Owns: the translation of openraft's calls, and the errors it is told. Refuses: blocking an async thread. An error ends the
//! member: openraft answers nothing any more, so nothing is acknowledged that may be lost. Read next: [`super::machine`].

use super::kept::Change;
use super::store::{Store, StoreError};
use super::{Entry, LogId, StorageError, TypeConfig, Vote};
use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{AnyError, OptionalSend, RaftLogReader, StorageIOError};
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;

/// Bytes of commands that are read at once, besides the first.
const READ_BYTES: usize = 4 << 20;

/// The log.
#[derive(Debug, Clone)]
pub struct RaftLog {
    store: Store,
}

impl RaftLog {
    /// The log of this store.
    pub fn new(store: Store) -> RaftLog {
        RaftLog { store }
    }

    async fn change(&self, change: Change) -> Result<(), StoreError> {
        self.store.blocking(move |store| store.change(change)).await
    }
}

impl RaftLogReader<TypeConfig> for RaftLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let bounds = (range.start_bound().cloned(), range.end_bound().cloned());
        if is_empty(&bounds) {
            return Ok(Vec::new());
        }
        Ok(self.store.kept().entries.range(bounds).map(|(_, entry)| Entry::clone(entry)).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        let mut left = READ_BYTES;
        let mut entries = Vec::new();
        if start < end {
            for entry in self.store.kept().entries.range(start..end).map(|(_, entry)| entry) {
                let bytes = prost::Message::encoded_len(&super::convert::entry_message(entry));
                if bytes > left && !entries.is_empty() {
                    break;
                }
                left = left.saturating_sub(bytes);
                entries.push(Entry::clone(entry));
            }
        }
        Ok(entries)
    }
}

impl RaftLogStorage<TypeConfig> for RaftLog {
    type LogReader = RaftLog;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let kept = self.store.kept();
        Ok(LogState { last_purged_log_id: kept.purged, last_log_id: kept.last_log_id() })
    }

    async fn get_log_reader(&mut self) -> RaftLog {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        self.change(Change::Vote(*vote)).await.map_err(|error| StorageIOError::write_vote(AnyError::new(&error)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.store.kept().vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.store.set_committed(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.store.kept().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        // What was dropped is in the snapshot, and needs not be kept again.
        let purged = self.store.kept().purged;
        let is_new = |entry: &Entry| purged.is_none_or(|purged| entry.log_id.index > purged.index);
        let entries: Vec<Entry> = entries.into_iter().filter(is_new).collect();
        let kept = if entries.is_empty() { Ok(()) } else { self.change(Change::Append(entries)).await };
        match kept {
            Ok(()) => {
                callback.log_io_completed(Ok(()));
                Ok(())
            }
            Err(error) => {
                callback.log_io_completed(Err(io::Error::other(error.to_string())));
                Err(write_error(&error))
            }
        }
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.change(Change::Truncate(log_id)).await.map_err(|error| write_error(&error))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.change(Change::Purge(log_id)).await.map_err(|error| write_error(&error))
    }
}

fn write_error(error: &StoreError) -> StorageError {
    StorageIOError::write_logs(AnyError::new(error)).into()
}

fn is_empty((start, end): &(std::ops::Bound<u64>, std::ops::Bound<u64>)) -> bool {
    use std::ops::Bound;
    let start = match start {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    match end {
        Bound::Included(end) => start > *end,
        Bound::Excluded(end) => start >= *end,
        Bound::Unbounded => false,
    }
}
