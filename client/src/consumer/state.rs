//! What the application's side of a consumer and its tasks share.
//!
//! Owns: the assigned partitions, what has arrived for each, positions, whose turn it is. Refuses: streams and calls; every
//! method returns at once. Read next: [`super::fetch`], which fills it, and `consumer/mod.rs`, which empties it.
//!
//! What must always hold: a partition stands in the rotation once if it has something to deliver and may deliver it, and
//! not at all otherwise; what arrives for an earlier life of a partition (before a seek, before it was given away) is
//! dropped; a partition that is being let go of delivers nothing any more; a consumer that is closed reads nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::task::AtomicWaker;
use headwater_proto::TopicId;
use headwater_proto::batch::BatchHeader;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::cell::{Cell, Feed};
use super::prefetch::Prefetch;
use super::record::Position;
use crate::TopicPartition;
use crate::connection::lock;
use crate::error::ConsumeError;

/// One stretch of reading an assigned partition: from when it was assigned, or from a seek, to the next or the end.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    pub(crate) cell: Arc<Cell>,
    pub(crate) feed: Arc<Feed>,
    /// Tells this life of the partition from earlier ones.
    pub(crate) number: u64,
}

/// What a life's reading runs in; dropping it ends the reading.
pub(crate) type Task = AbortOnDropHandle<()>;

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
    feed: Arc<Feed>,
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
    task: Option<Task>,
}

impl Partition {
    /// Ends its reading, and forgets what arrived. What it had of the prefetch is free.
    fn stop(&mut self, prefetch: &Arc<Prefetch>) {
        self.task = None;
        self.items.clear();
        self.in_rotation = false;
        self.feed = Feed::new(prefetch);
    }

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
    /// The topic of every partition that was ever assigned, as it was the last time: what the application still knows of it
    /// is of that topic, and not of another one that bears the name now.
    topics: HashMap<TopicPartition, TopicId>,
    closed: bool,
}

/// The shared state of a consumer.
pub(crate) struct State {
    inner: Mutex<Inner>,
    prefetch: Arc<Prefetch>,
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
    /// Nothing is assigned yet.
    pub(crate) fn new(prefetch: Arc<Prefetch>) -> State {
        State {
            inner: Mutex::default(),
            prefetch,
            ready: AtomicWaker::new(),
            version: AtomicU64::new(0),
            asked: Notify::new(),
            assigned: Notify::new(),
        }
    }

    /// Changes whenever a partition was taken away, sought or paused.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.ready.wake();
    }

    /// Takes partitions on; where they begin is still to be found out. A consumer that is closed takes none.
    pub(crate) fn begin(&self, new: Vec<(TopicPartition, TopicId)>) -> Vec<Life> {
        let mut inner = lock(&self.inner);
        if inner.closed {
            return Vec::new();
        }
        inner.rotation.retain(|other| !new.iter().any(|(at, _)| at == other));
        let mut lives = Vec::with_capacity(new.len());
        for (at, topic_id) in new {
            inner.lives += 1;
            let number = inner.lives;
            let cell = Arc::new(Cell::new(at.clone(), topic_id));
            let life = Life { cell, feed: Feed::new(&self.prefetch), number };
            let partition = Partition {
                cell: life.cell.clone(),
                feed: life.feed.clone(),
                life: number,
                items: VecDeque::new(),
                paused: inner.partitions.get(&at).is_some_and(|p| p.paused),
                leaving: false,
                in_rotation: false,
                bound: inner.bounds.get(&at).copied(),
                cut: false,
                task: None,
            };
            inner.topics.insert(at.clone(), topic_id);
            if let Some(before) = inner.partitions.insert(at, partition) {
                before.cell.let_go();
            }
            lives.push(life);
        }
        self.prefetch.divide(inner.partitions.len());
        drop(inner);
        self.changed();
        lives
    }

    /// It is known where a life begins: `spawn` makes its fetch task, unless it is over.
    pub(crate) fn read(&self, life: &Life, from: Position, spawn: impl FnOnce(Life) -> Task) {
        let mut inner = lock(&self.inner);
        let Some(partition) = inner.partitions.get_mut(&life.cell.at).filter(|p| p.life == life.number) else { return };
        if !partition.leaving {
            partition.cell.reposition(from);
            partition.task = Some(spawn(life.clone()));
        }
        drop(inner);
        // It may have begun at its bound.
        self.ready.wake();
    }

    /// Goes on elsewhere in a partition: another life of it. What the present one left is dropped. One that is being let
    /// go of is not read on, but while the application is not done with what it has of it, the position counts: whoever
    /// has it next begins there. `false`: it is not assigned.
    pub(crate) fn restart(&self, at: &TopicPartition, from: Position, spawn: impl FnOnce(Life) -> Task) -> bool {
        let mut inner = lock(&self.inner);
        inner.lives += 1;
        let number = inner.lives;
        let Some(partition) = inner.partitions.get_mut(at).filter(|p| !p.leaving || p.cell.is_held()) else {
            return false;
        };
        partition.life = number;
        partition.stop(&self.prefetch);
        partition.cut = false;
        partition.cell.reposition(from);
        let life = Life { cell: partition.cell.clone(), feed: partition.feed.clone(), number };
        partition.task = (!partition.leaving).then(|| spawn(life));
        inner.rotation.retain(|other| other != at);
        drop(inner);
        self.changed();
        true
    }

    /// Whether a life goes on.
    pub(crate) fn is_alive(&self, life: &Life) -> bool {
        lock(&self.inner).partitions.get(&life.cell.at).is_some_and(|p| p.life == life.number && !p.leaving)
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

    /// Stops reading partitions: they are this consumer's no more.
    pub(crate) fn end(&self, partitions: &[TopicPartition]) {
        let mut inner = lock(&self.inner);
        for ended in partitions.iter().filter_map(|at| inner.partitions.remove(at)) {
            ended.cell.let_go();
        }
        inner.rotation.retain(|at| !partitions.contains(at));
        self.prefetch.divide(inner.partitions.len());
        drop(inner);
        self.changed();
    }

    /// Stops delivering from partitions that are about to be given away, without forgetting them.
    pub(crate) fn hold_back(&self, partitions: &[TopicPartition]) -> Vec<Arc<Cell>> {
        let mut inner = lock(&self.inner);
        let mut cells = Vec::new();
        for at in partitions {
            if let Some(partition) = inner.partitions.get_mut(at) {
                partition.stop(&self.prefetch);
                partition.leaving = true;
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
        partition.stop(&self.prefetch);
        inner.rotation.retain(|other| other != at);
    }

    /// Something arrived.
    pub(crate) fn push(&self, life: &Life, item: Item) {
        let at = &life.cell.at;
        let mut inner = lock(&self.inner);
        let Some(partition) = inner.partitions.get_mut(at).filter(|p| p.life == life.number) else { return };
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
            if let Item::Batch(_, bytes) = &item {
                partition.feed.release(bytes.len());
            }
            if !partition.items.is_empty() {
                partition.in_rotation = true;
                inner.rotation.push_back(at);
            }
            if !matches!(item, Item::Error(_)) {
                // In hand from this moment: whoever lets go of the partition waits for what becomes of it.
                cell.hold();
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

    /// Takes an error of the consumer as a whole.
    pub(crate) fn take_error(&self) -> Option<ConsumeError> {
        lock(&self.inner).errors.pop_front()
    }

    pub(crate) fn cell(&self, at: &TopicPartition) -> Option<Arc<Cell>> {
        lock(&self.inner).partitions.get(at).map(|p| p.cell.clone())
    }

    /// The topic that a partition was assigned of last, also where it is not assigned any more.
    pub(crate) fn topic_id(&self, at: &TopicPartition) -> Option<TopicId> {
        lock(&self.inner).topics.get(at).copied()
    }

    pub(crate) fn cells(&self) -> Vec<Arc<Cell>> {
        lock(&self.inner).partitions.values().map(|p| p.cell.clone()).collect()
    }

    pub(crate) fn assignment(&self) -> BTreeSet<TopicPartition> {
        lock(&self.inner).partitions.keys().cloned().collect()
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.inner).closed
    }

    pub(crate) fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.partitions.drain().for_each(|(_, partition)| partition.cell.let_go());
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
