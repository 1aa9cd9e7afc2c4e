//! The idempotent producer: numbers its batches, has at most five on the way, and sends all of them again, the same and in
//! order, on another connection when one of them fails.

use crate::node::{RequestId, batch, keyed, values};
use headwater_storage::NewBatch;
use std::collections::VecDeque;

#[derive(Default)]
pub(crate) struct Producer {
    pub(crate) connection: u64,
    pub(crate) leader: Option<i32>,
    /// What is not acknowledged, the oldest first.
    pub(crate) waiting: VecDeque<NewBatch>,
    /// How many requests went out on this connection.
    pub(crate) sent: u64,
    /// How many of them were acknowledged.
    pub(crate) acknowledged: u64,
    pub(crate) next_value: u64,
    pub(crate) epoch: i16,
    pub(crate) next_sequence: i32,
    pub(crate) heard_ms: i64,
    /// Whether records have keys.
    pub(crate) compacts: bool,
}

impl Producer {
    /// False: the connection is of no use any more.
    pub(crate) fn answered(&mut self, id: RequestId, done: bool) -> bool {
        if id.0 != self.connection {
            return true;
        }
        if done && id.1 == self.acknowledged {
            self.acknowledged += 1;
            self.waiting.pop_front();
            return true;
        }
        false
    }

    /// An unclean election took what comes before the oldest batch: it goes on under another epoch, from the first sequence.
    pub(crate) fn begin_anew(&mut self, now: i64) {
        self.epoch += 1;
        self.next_sequence = 0;
        for waiting in &mut self.waiting {
            let values = values(waiting);
            let records: Vec<_> = values.iter().map(|value| keyed(self.compacts, *value)).collect();
            *waiting = batch(Some(self.epoch), self.next_sequence, &records, 0, now);
            self.next_sequence += values.len() as i32;
        }
    }

    pub(crate) fn unacknowledged(&self) -> usize {
        self.waiting.iter().map(|batch| values(batch).len()).sum()
    }
}
