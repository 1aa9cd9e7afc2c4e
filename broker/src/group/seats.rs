//! Which groups this broker coordinates: those whose partition of the offsets topic it leads.
//!
//! A partition's groups are served by one task for each epoch in which this broker leads it: nothing of an epoch outlives it, and
//! the next one begins with what the log says. The tasks of a partition never overlap.
//!
//! Owns: [`Seats`], the tasks that are there. Refuses: who leads (the metadata say so, and [`crate::partitions`] follows them).
//! Read next: [`super::task`].

use super::GroupError;
use super::task::{GroupContext, Request, Shard, WAITING_REQUESTS};
use crate::metadata::MetadataState;
use crate::metadata::name::OFFSETS_TOPIC;
use headwater_storage::offsets_schema::partition_of_group;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A partition of the offsets topic that this broker leads, or led last in this epoch.
struct Seat {
    epoch: i32,
    shard: mpsc::Sender<Request>,
    /// Cancelled when it leads it no more.
    over: CancellationToken,
    task: JoinHandle<()>,
}

/// The coordinator's tasks, by partition.
#[derive(Clone)]
pub(super) struct Seats {
    held: Arc<Mutex<BTreeMap<u32, Seat>>>,
    tasks: TaskTracker,
}

/// Who has a partition of the offsets topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Coordinator {
    pub(crate) partition: u32,
    /// -1: nobody at the moment.
    pub(crate) broker_id: i32,
    pub(crate) leader_epoch: i32,
}

impl Seats {
    pub(super) fn new() -> Seats {
        let tasks = TaskTracker::new();
        tasks.close();
        Seats { held: Arc::default(), tasks }
    }

    /// Takes the seats that this broker has by now, and gives up the others.
    pub(super) fn take(&self, context: &GroupContext) {
        let state = context.metadata.state();
        let topic = state.topic(OFFSETS_TOPIC);
        let count = topic.map_or(0, |topic| topic.partitions.len() as u32);
        let mut held = self.lock();
        for number in 0..count {
            let partition = topic.and_then(|topic| context.logs.get(&topic.id, number));
            let led = partition.and_then(|partition| Some((partition.leads_in()?, partition)));
            let (epoch, partition) = match led {
                Some((epoch, _)) if held.get(&number).is_some_and(|seat| seat.epoch >= epoch) => continue,
                Some(led) => led,
                None => {
                    if let Some(seat) = held.get(&number) {
                        seat.over.cancel();
                    }
                    continue;
                }
            };
            let before = held.remove(&number).map(|seat| {
                seat.over.cancel();
                seat.task
            });
            let (shard, requests) = mpsc::channel(WAITING_REQUESTS);
            let (over, context) = (CancellationToken::new(), context.clone());
            let ends = over.clone();
            let task = self.tasks.spawn(async move {
                if let Some(before) = before {
                    // However it ended.
                    drop(before.await);
                }
                Shard::new(context, partition, epoch).run(requests, ends).await;
            });
            held.insert(number, Seat { epoch, shard, over, task });
        }
    }

    /// The task of a group, as far as this broker knows.
    ///
    /// # Errors
    /// [`GroupError::NotCoordinator`]; [`GroupError::Loading`] where it has only just become it; [`GroupError::NotFound`] where nothing is
    /// known of any group.
    pub(super) fn of_group(
        &self,
        state: &MetadataState,
        me: i32,
        group: &str,
    ) -> Result<mpsc::Sender<Request>, GroupError> {
        let Coordinator { partition, broker_id, .. } =
            coordinator(state, group).ok_or_else(|| GroupError::NotFound(group.to_owned()))?;
        if let Some(shard) = self.of_partition(partition) {
            return Ok(shard);
        }
        Err(match broker_id == me {
            true => GroupError::Loading(group.to_owned()),
            false => GroupError::NotCoordinator(group.to_owned()),
        })
    }

    /// The task of a partition's groups, if this broker has it.
    pub(super) fn of_partition(&self, number: u32) -> Option<mpsc::Sender<Request>> {
        let held = self.lock();
        held.get(&number).filter(|seat| !seat.over.is_cancelled()).map(|seat| seat.shard.clone())
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<mpsc::Sender<Request>> {
        self.lock().values().filter(|seat| !seat.over.is_cancelled()).map(|seat| seat.shard.clone()).collect()
    }

    /// Waits until every task has ended.
    pub(super) async fn ended(&self) {
        self.tasks.wait().await;
    }

    /// Runs something beside the tasks, which is waited for likewise.
    pub(super) fn beside(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Seat>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who coordinates a group, by what is known; `None`: there are no groups yet.
pub(super) fn coordinator(state: &MetadataState, group: &str) -> Option<Coordinator> {
    let count = state.topic(OFFSETS_TOPIC)?.partitions.len();
    let partition = partition_of_group(group, u32::try_from(count).unwrap_or(u32::MAX));
    coordinators(state).into_iter().nth(partition as usize)
}

/// Who coordinates the groups of each partition, in order.
pub(super) fn coordinators(state: &MetadataState) -> Vec<Coordinator> {
    let partitions = state.topic(OFFSETS_TOPIC).into_iter().flat_map(|topic| &topic.partitions);
    let coordinators = partitions.zip(0u32..).map(|(known, partition)| Coordinator {
        partition,
        broker_id: known.leader,
        leader_epoch: known.leader_epoch,
    });
    coordinators.collect()
}
