//! What the application's side of a consumer and its tasks share.
//!
//! Owns: the assigned partitions, what has arrived for each, positions, whose turn it is. Refuses: streams and calls; every
//! method returns at once. Read next: [`super::fetch`], which fills it, and `consumer/mod.rs`, which empties it.
//!
//! What must always hold: a partition stands in the rotation once if it has something to deliver and may deliver it, and
//! not at all otherwise; what arrives for an earlier life of a partition (before a seek, before it was given away) is
//! dropped.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::task::AtomicWaker;
use headwater_proto::TopicId;
use headwater_proto::batch::BatchHeader;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::record::Position;
use crate::TopicPartition;
use crate::connection::lock;
use crate::error::ConsumeError;

/// A partition's positions, shared by whoever needs them.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) at: TopicPartition,
    progress: Mutex<Progress>,
    /// -1: not known yet.
    pub(crate) high_watermark: AtomicI64,
    /// Bytes that the application took and the fetch task has not counted yet.
    released: AtomicU64,
    /// The fetch task should look.
    pub(crate) wake: Notify,
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
    fn new(at: TopicPartition, start: Position) -> Arc<Cell> {
        Arc::new(Cell {
            at,
            progress: Mutex::new(Progress { delivered: start, processed: start, held: false }),
            high_watermark: AtomicI64::new(-1),
            released: AtomicU64::new(0),
            wake: Notify::new(),
        })
    }

    /// The application has something of this partition in hand.
    fn hold(&self) {
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

    pub(crate) fn delivered(&self) -> Position {
        lock(&self.progress).delivered
    }

    pub(crate) fn processed(&self) -> Position {
        lock(&self.progress).processed
    }

    pub(crate) fn is_held(&self) -> bool {
        lock(&self.progress).held
    }

    fn release(&self, bytes: usize) {
        self.released.fetch_add(bytes as u64, Ordering::AcqRel);
        self.wake.notify_one();
    }

    pub(crate) fn take_released(&self) -> u64 {
        self.released.swap(0, Ordering::AcqRel)
    }
}

/// What arrived for a partition.
#[derive(Debug)]
pub(crate) enum Item {
    /// A batch, checked.
    Batch(BatchHeader, Bytes),
    /// A batch that was taken and not delivered whole: its bytes are counted as taken.
    Returned(BatchHeader, Bytes),
    /// Nothing is left to read before this position.
    Pass(Position),
    /// The partition cannot be read on.
    Error(ConsumeError),
}

struct Partition {
    cell: Arc<Cell>,
    topic_id: TopicId,
    /// Tells this life of the partition from earlier ones.
    life: u64,
    items: VecDeque<Item>,
    paused: bool,
    /// About to be given away: nothing of it is delivered any more.
    leaving: bool,
    in_rotation: bool,
    /// Records from here on are not delivered.
    bound: Option<i64>,
    /// The rest of a batch was dropped at the bound.
    cut: bool,
    task: Option<AbortOnDropHandle<()>>,
}

impl Partition {
    fn may_deliver(&self) -> bool {
        !self.paused && !self.leaving && self.bound.is_none_or(|bound| self.cell.delivered().offset < bound)
    }
}

#[derive(Default)]
struct Inner {
    partitions: HashMap<TopicPartition, Partition>,
    rotation: VecDeque<TopicPartition>,
    errors: VecDeque<ConsumeError>,
    lives: u64,
    assigned_once: bool,
    bounds: BTreeMap<TopicPartition, i64>,
    closed: bool,
}

/// The shared state of a consumer.
#[derive(Default)]
pub(crate) struct State {
    inner: Mutex<Inner>,
    /// The application waits for something to deliver.
    pub(crate) ready: AtomicWaker,
    /// Changes whenever what is being delivered may not be any more.
    version: AtomicU64,
    /// The application asked for more: it is done with what it had.
    pub(crate) asked: Notify,
    /// Partitions came or went.
    pub(crate) assigned: Notify,
}

/// What is to be delivered next.
pub(crate) enum Turn {
    Item {
        cell: Arc<Cell>,
        life: u64,
        item: Item,
        below: i64,
    },
    Error(ConsumeError),
    /// Every assigned partition reached its bound, or the consumer is closed.
    End,
    /// Nothing yet.
    Wait,
}

impl State {
    /// Changes whenever a partition was taken away, sought or paused.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.ready.wake();
    }

    /// A new life of a partition, beginning at `start`; `spawn` makes its fetch task. What an earlier one left is dropped.
    pub(crate) fn begin(
        &self,
        at: &TopicPartition,
        topic_id: TopicId,
        start: Position,
        spawn: impl FnOnce(Arc<Cell>, u64) -> Option<AbortOnDropHandle<()>>,
    ) {
        let mut inner = lock(&self.inner);
        inner.lives += 1;
        let life = inner.lives;
        let cell = Cell::new(at.clone(), start);
        let task = spawn(cell.clone(), life);
        let paused = inner.partitions.get(at).is_some_and(|p| p.paused);
        let bound = inner.bounds.get(at).copied();
        inner.rotation.retain(|other| other != at);
        let items = VecDeque::new();
        let leaving = false;
        let partition =
            Partition { cell, topic_id, life, items, paused, leaving, in_rotation: false, bound, cut: false, task };
        inner.partitions.insert(at.clone(), partition);
        drop(inner);
        self.changed();
    }

    /// The set of partitions is known from now on, though it may be empty.
    pub(crate) fn assignment_known(&self) {
        lock(&self.inner).assigned_once = true;
        self.assigned.notify_waiters();
        self.ready.wake();
    }

    pub(crate) fn is_assignment_known(&self) -> bool {
        lock(&self.inner).assigned_once
    }

    /// Stops reading partitions. Their last positions are returned.
    pub(crate) fn end(&self, partitions: &[TopicPartition]) -> Vec<Arc<Cell>> {
        let mut inner = lock(&self.inner);
        let ended: Vec<Partition> = partitions.iter().filter_map(|at| inner.partitions.remove(at)).collect();
        inner.rotation.retain(|at| !partitions.contains(at));
        drop(inner);
        self.changed();
        ended.into_iter().map(|partition| partition.cell).collect()
    }

    /// Stops delivering from partitions that are about to be given away, without forgetting them.
    pub(crate) fn hold_back(&self, partitions: &[TopicPartition]) -> Vec<Arc<Cell>> {
        let mut inner = lock(&self.inner);
        let mut cells = Vec::new();
        for at in partitions {
            if let Some(partition) = inner.partitions.get_mut(at) {
                partition.task = None;
                partition.items.clear();
                partition.leaving = true;
                partition.in_rotation = false;
                cells.push(partition.cell.clone());
            }
        }
        inner.rotation.retain(|at| !partitions.contains(at));
        drop(inner);
        self.changed();
        cells
    }

    /// Reads no more of a partition: what arrived of it cannot be read.
    pub(crate) fn halt(&self, at: &TopicPartition, life: u64) {
        let mut inner = lock(&self.inner);
        let Some(partition) = inner.partitions.get_mut(at).filter(|p| p.life == life) else { return };
        partition.task = None;
        partition.items.clear();
        partition.in_rotation = false;
        inner.rotation.retain(|other| other != at);
    }

    /// Something arrived.
    pub(crate) fn push(&self, at: &TopicPartition, life: u64, item: Item) {
        let mut inner = lock(&self.inner);
        let Some(partition) = inner.partitions.get_mut(at).filter(|p| p.life == life) else { return };
        partition.items.push_back(item);
        if !partition.in_rotation && partition.may_deliver() {
            partition.in_rotation = true;
            inner.rotation.push_back(at.clone());
        }
        drop(inner);
        self.ready.wake();
    }

    /// Puts back what was taken and not delivered whole; it is first again.
    pub(crate) fn put_back(&self, at: &TopicPartition, life: u64, item: Item) {
        let mut inner = lock(&self.inner);
        let Some(partition) = inner.partitions.get_mut(at).filter(|p| p.life == life) else { return };
        partition.items.push_front(item);
        if !partition.in_rotation && partition.may_deliver() {
            partition.in_rotation = true;
            inner.rotation.push_front(at.clone());
        }
    }

    /// An error of the consumer as a whole.
    pub(crate) fn push_error(&self, error: ConsumeError) {
        lock(&self.inner).errors.push_back(error);
        self.assigned.notify_waiters();
        self.ready.wake();
    }

    /// Takes the next item of the partition whose turn it is; the partition goes to the end of the row.
    pub(crate) fn next(&self) -> Turn {
        let mut inner = lock(&self.inner);
        if let Some(error) = inner.errors.pop_front() {
            return Turn::Error(error);
        }
        while let Some(at) = inner.rotation.pop_front() {
            let Some(partition) = inner.partitions.get_mut(&at) else { continue };
            partition.in_rotation = false;
            if !partition.may_deliver() {
                continue;
            }
            let Some(item) = partition.items.pop_front() else { continue };
            let (cell, life) = (partition.cell.clone(), partition.life);
            let below = partition.bound.unwrap_or(i64::MAX);
            if !partition.items.is_empty() {
                partition.in_rotation = true;
                inner.rotation.push_back(at);
            }
            // In hand from this moment: whoever lets go of the partition waits for what becomes of it.
            cell.hold();
            if let Item::Batch(_, bytes) = &item {
                cell.release(bytes.len());
            }
            return Turn::Item { cell, life, item, below };
        }
        if inner.closed || inner.is_finished() { Turn::End } else { Turn::Wait }
    }

    /// Whether this life of a partition goes on and may deliver.
    pub(crate) fn is_current(&self, at: &TopicPartition, life: u64) -> bool {
        lock(&self.inner).partitions.get(at).is_some_and(|p| p.life == life && p.may_deliver())
    }

    /// Sets the offsets up to which records are delivered. Returns the partitions of which something was dropped at an
    /// earlier bound, and which must begin again at their positions.
    pub(crate) fn set_bounds(&self, bounds: BTreeMap<TopicPartition, i64>) -> Vec<TopicPartition> {
        let mut inner = lock(&self.inner);
        inner.bounds = bounds;
        let Inner { partitions, bounds, rotation, .. } = &mut *inner;
        let mut again = Vec::new();
        for (at, partition) in partitions {
            partition.bound = bounds.get(at).copied();
            if !partition.may_deliver() {
                continue;
            }
            if partition.cut {
                again.push(at.clone());
            } else if !partition.in_rotation && !partition.items.is_empty() {
                partition.in_rotation = true;
                rotation.push_back(at.clone());
            }
        }
        drop(inner);
        self.changed();
        again
    }

    /// A batch was delivered up to the bound only, and the rest of it dropped.
    pub(crate) fn cut(&self, at: &TopicPartition, life: u64) {
        let mut inner = lock(&self.inner);
        if let Some(partition) = inner.partitions.get_mut(at).filter(|p| p.life == life) {
            partition.cut = true;
        }
    }

    /// Pauses or resumes partitions; those that are not assigned are passed over.
    pub(crate) fn set_paused(&self, partitions: impl IntoIterator<Item = TopicPartition>, paused: bool) {
        let mut inner = lock(&self.inner);
        for at in partitions {
            let Some(partition) = inner.partitions.get_mut(&at) else { continue };
            partition.paused = paused;
            if !partition.in_rotation && !partition.items.is_empty() && partition.may_deliver() {
                partition.in_rotation = true;
                inner.rotation.push_back(at);
            }
        }
        drop(inner);
        self.changed();
    }

    /// The id of an assigned partition's topic.
    pub(crate) fn topic_id(&self, at: &TopicPartition) -> Option<TopicId> {
        lock(&self.inner).partitions.get(at).map(|p| p.topic_id)
    }

    /// Takes an error of the consumer as a whole.
    pub(crate) fn take_error(&self) -> Option<ConsumeError> {
        lock(&self.inner).errors.pop_front()
    }

    pub(crate) fn cell(&self, topic: &str, partition: u32) -> Option<Arc<Cell>> {
        let inner = lock(&self.inner);
        // The key needs an owned name; partitions are few and this is not the hot path.
        inner.partitions.get(&TopicPartition::new(topic, partition)).map(|p| p.cell.clone())
    }

    pub(crate) fn cells(&self) -> Vec<Arc<Cell>> {
        lock(&self.inner).partitions.values().map(|p| p.cell.clone()).collect()
    }

    pub(crate) fn assignment(&self) -> BTreeSet<TopicPartition> {
        lock(&self.inner).partitions.keys().cloned().collect()
    }

    pub(crate) fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.partitions.clear();
        inner.rotation.clear();
        drop(inner);
        self.changed();
        self.assigned.notify_waiters();
    }
}

impl Inner {
    /// Whether there are bounds, and every assigned partition has one and reached it.
    fn is_finished(&self) -> bool {
        let at_bound = |p: &Partition| p.bound.is_some_and(|bound| p.cell.delivered().offset >= bound);
        self.assigned_once && !self.bounds.is_empty() && self.partitions.values().all(at_bound)
    }
}
