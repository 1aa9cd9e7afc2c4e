//! How far a partition is.
//!
//! Owns: [`Cell`]: what was delivered and what the application is done with; [`Feed`]: what the application took, for the
//! task that fetches more. Refuses: what arrived and whose turn it is (see [`super::state`]).
//!
//! What must always hold: what the application is done with is never ahead of what was delivered to it, and a seek back
//! takes both back.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use headwater_proto::TopicId;
use tokio::sync::Notify;

use super::prefetch::{Claim, Prefetch};
use super::record::Position;
use crate::TopicPartition;
use crate::connection::lock;

/// An assigned partition's positions, shared by whoever needs them. It outlives seeks.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) at: TopicPartition,
    pub(crate) topic_id: TopicId,
    progress: Mutex<Progress>,
    /// The highest that was told; -1: not known yet, or not of the log as it is now, which was cut.
    pub(crate) high_watermark: AtomicI64,
    /// It is not this consumer's any more, or another one has taken its place here.
    let_go: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    /// After what was handed out last.
    delivered: Position,
    /// Before what was handed out last, until the application asks for more: then it is done with that.
    processed: Position,
    /// The application has something of this partition in hand.
    held: bool,
}

impl Cell {
    /// Where it begins is still to be found out.
    pub(crate) fn new(at: TopicPartition, topic_id: TopicId) -> Cell {
        let (delivered, processed) = (Position::UNKNOWN, Position::UNKNOWN);
        Cell {
            at,
            topic_id,
            progress: Mutex::new(Progress { delivered, processed, held: false }),
            high_watermark: AtomicI64::new(-1),
            let_go: AtomicBool::new(false),
        }
    }

    /// From now on the partition is somebody else's.
    pub(crate) fn let_go(&self) {
        self.let_go.store(true, Ordering::Release);
    }

    pub(crate) fn is_let_go(&self) -> bool {
        self.let_go.load(Ordering::Acquire)
    }

    /// Reading goes on at `to`. What the application has in hand is not done with by that, but what lies behind `to` is to
    /// be delivered again.
    pub(crate) fn reposition(&self, to: Position) {
        let mut progress = lock(&self.progress);
        progress.delivered = to;
        if !progress.held || to.offset < progress.processed.offset {
            progress.processed = to;
        }
    }

    /// The application has something of this partition in hand.
    pub(crate) fn hold(&self) {
        lock(&self.progress).held = true;
    }

    /// The application is given what lies before `to`.
    pub(crate) fn hand_out(&self, to: Position) {
        let mut progress = lock(&self.progress);
        progress.processed = progress.delivered;
        progress.delivered = to;
        progress.held = true;
    }

    /// The position moves over offsets that hold nothing for the application.
    pub(crate) fn pass(&self, to: Position) {
        let mut progress = lock(&self.progress);
        if !progress.held {
            progress.processed = to;
        }
        progress.delivered = to;
    }

    /// The application is done with what it was given.
    pub(crate) fn done(&self) {
        let mut progress = lock(&self.progress);
        progress.processed = progress.delivered;
        progress.held = false;
    }

    /// [`Position::UNKNOWN`] until it is found out where to begin.
    pub(crate) fn delivered(&self) -> Position {
        lock(&self.progress).delivered
    }

    /// [`Position::UNKNOWN`] until it is found out where to begin.
    pub(crate) fn processed(&self) -> Position {
        lock(&self.progress).processed
    }

    pub(crate) fn is_held(&self) -> bool {
        lock(&self.progress).held
    }
}

/// What the task that fetches a partition is told by those who take from it, and its part of the prefetch, which outlives
/// the task as long as something of it waits here. A seek begins another one.
#[derive(Debug)]
pub(crate) struct Feed {
    /// Bytes that the application took and the task has not counted yet.
    released: AtomicU64,
    /// The task should look.
    pub(crate) wake: Arc<Notify>,
    pub(crate) claim: Claim,
}

impl Feed {
    pub(crate) fn new(prefetch: &Arc<Prefetch>) -> Arc<Feed> {
        let wake = Arc::new(Notify::new());
        Arc::new(Feed { released: AtomicU64::new(0), claim: prefetch.claim(wake.clone()), wake })
    }

    pub(crate) fn release(&self, bytes: usize) {
        self.released.fetch_add(bytes as u64, Ordering::AcqRel);
        self.wake.notify_one();
    }

    pub(crate) fn take_released(&self) -> u64 {
        self.released.swap(0, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64) -> Position {
        Position { offset, leader_epoch: 3 }
    }

    fn offsets(cell: &Cell) -> (i64, i64) {
        (cell.processed().offset, cell.delivered().offset)
    }

    #[test]
    fn a_seek_back_lowers_what_counts_as_done_and_one_forward_or_none_leaves_it() {
        let cell = Cell::new(TopicPartition::new("t", 0), TopicId::ZERO);
        cell.reposition(at(10));
        assert_eq!(offsets(&cell), (10, 10));
        cell.hand_out(at(15));
        cell.reposition(at(15));
        assert_eq!(offsets(&cell), (10, 15), "what is in hand is not done with because reading begins anew behind it");
        cell.reposition(at(90));
        assert_eq!(offsets(&cell), (10, 90));
        cell.reposition(at(12));
        assert_eq!(offsets(&cell), (10, 12));
        cell.reposition(at(3));
        assert_eq!(offsets(&cell), (3, 3), "it comes again, so nothing of it may be committed");
        cell.done();
        assert_eq!(offsets(&cell), (3, 3));
    }
}
