//! The consumer: a stream of records from the partitions that are its own.
//!
//! Owns: [`Consumer`]: delivering in order and fairly, seeking, pausing, bounds, committing what was delivered. Refuses:
//! reading partitions ([`fetch`]) and deciding whose they are ([`group`]). Read next: [`state`], then [`fetch`].

mod builder;
mod cell;
mod commit;
mod credit;
mod fetch;
mod group;
mod locate;
mod prefetch;
mod readers;
mod rebalance;
mod record;
mod state;

pub use builder::ConsumerBuilder;
pub use commit::Committer;
pub use rebalance::Rebalance;
pub use record::{ConsumedBatch, ConsumedRecord, ConsumedRecords, OutOfRange, Position, StartFrom};

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context as TaskContext, Poll};

use futures::Stream;
use futures::future::BoxFuture;
use headwater_proto::batch::{BatchHeader, Records, TimestampType};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::admin::OffsetAt;
use crate::error::ConsumeError;
use crate::leaders::Leaders;
use crate::{OffsetQuery, TopicPartition};
use cell::Cell;
use locate::{no_offset, start_position};
use readers::Readers;
use record::Origin;
use state::{Item, State, Turn};

/// A callback for [`Rebalance`]s.
pub(crate) type RebalanceFn = dyn Fn(Rebalance) -> BoxFuture<'static, ()> + Send + Sync;

/// Reads records: a [`Stream`] of them, or batch by batch with [`Consumer::next_batch`], which is faster.
///
/// Records of one partition come in order; partitions take turns, batch by batch. What is not taken is not fetched beyond
/// the prefetch, and a partition that is paused delays no other. Every method may be cancelled: what was not returned
/// comes again.
///
/// Dropping a consumer leaves its group without committing; [`Consumer::close`] commits first, where commits are automatic.
///
/// ```no_run
/// # async fn example(client: headwater_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use futures::StreamExt;
/// let mut consumer = client.consumer().group("billing").topics(["flights"]).build().await?;
/// while let Some(record) = consumer.next().await {
///     let record = record?;
///     println!("{}-{}@{}: {:?}", record.topic, record.partition, record.offset, record.value);
/// }
/// consumer.close().await?;
/// # Ok(()) }
/// ```
pub struct Consumer {
    readers: Arc<Readers>,
    state: Arc<State>,
    committer: Option<Committer>,
    membership: Option<Membership>,
    auto_commit: bool,
    stop: CancellationToken,
    /// The batch whose records are being delivered one by one.
    current: Option<Current>,
    /// The partition of what was delivered last.
    held: Option<Arc<Cell>>,
    /// The state's version that `current` is known to agree with.
    version: u64,
}

/// What ties a consumer to its group.
pub(crate) struct Membership {
    pub(crate) member_id: String,
    pub(crate) topics: watch::Sender<Vec<String>>,
    pub(crate) task: JoinHandle<()>,
}

/// A batch on its way to the application.
struct Current {
    cell: Arc<Cell>,
    life: u64,
    header: BatchHeader,
    origin: Origin,
    /// The batch itself, in case it must be put back.
    batch: bytes::Bytes,
    records: Records,
    /// Records from here on are not delivered.
    below: i64,
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer")
            .field("group", &self.committer.as_ref().map(Committer::group))
            .field("member_id", &self.member_id())
            .field("positions", &self.positions())
            .finish_non_exhaustive()
    }
}

impl Consumer {
    pub(crate) fn new(
        readers: Arc<Readers>,
        committer: Option<Committer>,
        auto_commit: bool,
        stop: CancellationToken,
    ) -> Consumer {
        let state = readers.context.state.clone();
        let (membership, current, held) = (None, None, None);
        Consumer { readers, state, committer, membership, auto_commit, stop, current, held, version: 0 }
    }

    /// The next batch of records, or what is left of the one whose records are being taken one by one. The whole batch
    /// counts as delivered. It holds no record where the position moved over offsets that have none.
    ///
    /// `None`: the bounds of [`Consumer::until`] are reached.
    pub async fn next_batch(&mut self) -> Option<Result<ConsumedBatch, ConsumeError>> {
        std::future::poll_fn(|cx| self.poll_batch(cx)).await
    }

    fn poll_batch(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<ConsumedBatch, ConsumeError>>> {
        self.catch_up();
        let current = match self.current.take() {
            Some(current) => current,
            None => match self.poll_turn(cx) {
                Poll::Ready(Some(Ok(Delivery::Batch(current)))) => *current,
                Poll::Ready(Some(Ok(Delivery::Passed(cell, from)))) => {
                    return Poll::Ready(Some(Ok(empty_batch(&cell, from))));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            },
        };
        let from = current.cell.delivered().offset;
        let end = self.end_of(&current);
        current.cell.hand_out(end);
        self.held = Some(current.cell.clone());
        Poll::Ready(Some(Ok(ConsumedBatch {
            bytes: current.batch.len(),
            origin: current.origin,
            records: (!current.header.is_control()).then_some(current.records),
            from,
            below: end.offset,
        })))
    }

    fn poll_record(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<ConsumedRecord, ConsumeError>>> {
        self.catch_up();
        loop {
            if let Some(current) = &mut self.current {
                let epoch = current.header.leader_epoch;
                let from = current.cell.delivered().offset;
                let next = if current.header.is_control() { None } else { current.records.next() };
                match next {
                    Some(Ok(record)) if record.offset < from => continue,
                    Some(Ok(record)) if record.offset < current.below => {
                        current.cell.hand_out(Position { offset: record.offset + 1, leader_epoch: epoch });
                        if !self.held.as_ref().is_some_and(|held| Arc::ptr_eq(held, &current.cell)) {
                            self.held = Some(current.cell.clone());
                        }
                        return Poll::Ready(Some(Ok(current.origin.record(record))));
                    }
                    Some(Err(error)) => {
                        let error = current.origin.corrupt(from, error);
                        self.stop_partition();
                        return Poll::Ready(Some(Err(error)));
                    }
                    // The end of the batch, or of what may be delivered of it.
                    Some(Ok(_)) | None => {
                        if let Some(current) = self.current.take() {
                            current.cell.pass(self.end_of(&current));
                        }
                    }
                }
            }
            match self.poll_turn(cx) {
                Poll::Ready(Some(Ok(Delivery::Batch(current)))) => self.current = Some(*current),
                Poll::Ready(Some(Ok(Delivery::Passed(..)))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// The position after the whole batch, or at the bound before its end.
    fn end_of(&self, current: &Current) -> Position {
        let offset = current.header.next_offset();
        if offset > current.below {
            self.state.cut(&current.cell.at, current.life);
        }
        Position { offset: offset.min(current.below), leader_epoch: current.header.leader_epoch }
    }

    /// The application asks for more, so it is done with what it had; and what it was being given may have been taken away.
    fn catch_up(&mut self) {
        let version = self.state.version();
        if version == self.version {
            return;
        }
        self.version = version;
        self.let_go_of_held();
        if let Some(current) = self.current.take() {
            if self.state.is_current(&current.cell.at, current.life) {
                self.current = Some(current);
            } else {
                // Paused, or gone: then nothing takes it back.
                current.cell.done();
                self.put_back(current);
            }
        }
        self.state.asked.notify_waiters();
    }

    fn put_back(&self, current: Current) {
        self.state.put_back(&current.cell.at, current.life, Item::Returned(current.header, current.batch));
    }

    fn let_go_of_held(&mut self) {
        if let Some(held) = self.held.take() {
            held.done();
        }
    }

    /// The next item of the partition whose turn it is.
    fn poll_turn(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Delivery, ConsumeError>>> {
        self.let_go_of_held();
        self.state.ready.register(cx.waker());
        let (cell, life, item, below) = match self.state.next() {
            Turn::Item { cell, life, item, below } => (cell, life, item, below),
            Turn::Error(error) => return Poll::Ready(Some(Err(error))),
            Turn::End => return Poll::Ready(None),
            Turn::Wait => {
                self.state.asked.notify_waiters();
                return Poll::Pending;
            }
        };
        if !matches!(item, Item::Error(_)) {
            self.held = Some(cell.clone());
        }
        Poll::Ready(Some(match item {
            Item::Error(error) => Err(error),
            Item::Pass(to) => {
                let from = cell.delivered().offset;
                cell.pass(Position { offset: to.offset.min(below), ..to });
                Ok(Delivery::Passed(cell, from))
            }
            Item::Batch(header, batch) | Item::Returned(header, batch) => match Records::new(&batch) {
                Ok(records) => {
                    let origin = Origin::new(&cell.at.topic, cell.at.partition, &header);
                    Ok(Delivery::Batch(Box::new(Current { cell, life, header, origin, batch, records, below })))
                }
                Err(error) => {
                    let offset = cell.delivered().offset;
                    let error = Origin::new(&cell.at.topic, cell.at.partition, &header).corrupt(offset, error);
                    self.state.halt(&cell.at, life);
                    Err(error)
                }
            },
        }))
    }

    /// Reads no more of the partition at hand.
    fn stop_partition(&mut self) {
        if let Some(current) = self.current.take() {
            self.state.halt(&current.cell.at, current.life);
        }
    }

    /// Sets bounds: records of these partitions at or past their offset are not delivered, and once every assigned
    /// partition has reached its bound the stream ends, whether or not records stand before it (offsets may hold control
    /// records, or nothing any more). Replaces earlier bounds; an empty set removes them. A stream that ended goes on after
    /// a seek, other bounds, or a change of the assignment.
    pub fn until(&mut self, ends: impl IntoIterator<Item = (TopicPartition, i64)>) {
        if let Some(current) = self.current.take() {
            // It was taken under the old bounds.
            self.put_back(current);
        }
        for at in self.state.set_bounds(ends.into_iter().collect()) {
            self.begin_again(&at);
        }
    }

    /// Reads a partition anew from its position: what was dropped at a bound must be fetched again.
    fn begin_again(&self, at: &TopicPartition) {
        if let Some(cell) = self.state.cell(at) {
            self.readers.restart(at, cell.delivered());
        }
    }

    /// Moves to another place of a partition. What was fetched from the old one is dropped.
    ///
    /// While the application still has something in hand of a partition that the group takes away, the place counts too:
    /// nothing more of it is delivered here, and whoever gets the partition begins there (where commits are automatic).
    ///
    /// # Errors
    /// When the partition is not assigned, or the broker cannot be asked where the place is.
    pub async fn seek(&mut self, topic: &str, partition: u32, to: StartFrom) -> Result<(), ConsumeError> {
        let at = TopicPartition::new(topic, partition);
        let not_assigned = || ConsumeError::NotAssigned { topic: topic.into(), partition };
        self.state.cell(&at).ok_or_else(not_assigned)?;
        let position = start_position(&self.readers.context, &at, to).await?;
        // It may have been given away while the broker was asked.
        if self.readers.restart(&at, position) { Ok(()) } else { Err(not_assigned()) }
    }

    /// Delivers no more of these partitions until [`Consumer::resume`]. They stay assigned; at most their prefetch is fetched.
    pub fn pause(&mut self, partitions: impl IntoIterator<Item = TopicPartition>) {
        self.state.set_paused(partitions, true);
    }

    /// Delivers these partitions again.
    pub fn resume(&mut self, partitions: impl IntoIterator<Item = TopicPartition>) {
        self.state.set_paused(partitions, false);
    }

    /// The next offset to be delivered; `None` if the partition is not assigned, or where it begins is not known yet.
    pub fn position(&self, topic: &str, partition: u32) -> Option<Position> {
        let cell = self.state.cell(&TopicPartition::new(topic, partition))?;
        Some(cell.delivered()).filter(Position::is_known)
    }

    /// The position of every assigned partition of which it is known where it begins.
    pub fn positions(&self) -> BTreeMap<TopicPartition, Position> {
        let cells = self.state.cells().into_iter();
        cells.map(|cell| (cell.at.clone(), cell.delivered())).filter(|(_, position)| position.is_known()).collect()
    }

    /// The partitions that are this consumer's.
    pub fn assignment(&self) -> BTreeSet<TopicPartition> {
        self.state.assignment()
    }

    /// Waits for the first assignment of a group, and returns the present one. It may be empty: a group may have more
    /// members than partitions. Where they begin is known then, except for partitions that are not served at the moment.
    /// Errors that come first are returned here.
    ///
    /// # Errors
    /// When the group refuses this consumer.
    pub async fn assigned(&mut self) -> Result<BTreeSet<TopicPartition>, ConsumeError> {
        loop {
            let mut assigned = std::pin::pin!(self.state.assigned.notified());
            assigned.as_mut().enable();
            if let Some(error) = self.state.take_error() {
                return Err(error);
            }
            if self.state.is_assignment_known() {
                return Ok(self.state.assignment());
            }
            assigned.await;
        }
    }

    /// The highest high watermark that was told; `None` if the partition is not assigned or was not read yet, or its log was cut
    /// and not read since.
    pub fn high_watermark(&self, topic: &str, partition: u32) -> Option<i64> {
        let cell = self.state.cell(&TopicPartition::new(topic, partition))?;
        let known = cell.high_watermark.load(Ordering::Relaxed);
        (known >= 0).then_some(known)
    }

    /// The high watermarks of partitions, asked now.
    ///
    /// # Errors
    /// When one does not exist, or the broker cannot be asked.
    pub async fn end_offsets(
        &self,
        partitions: impl IntoIterator<Item = TopicPartition>,
    ) -> Result<BTreeMap<TopicPartition, i64>, ConsumeError> {
        self.offsets(partitions, OffsetAt::Latest).await
    }

    /// The first offsets that partitions hold, asked now.
    ///
    /// # Errors
    /// When one does not exist, or the broker cannot be asked.
    pub async fn beginning_offsets(
        &self,
        partitions: impl IntoIterator<Item = TopicPartition>,
    ) -> Result<BTreeMap<TopicPartition, i64>, ConsumeError> {
        self.offsets(partitions, OffsetAt::Earliest).await
    }

    async fn offsets(
        &self,
        partitions: impl IntoIterator<Item = TopicPartition>,
        at: OffsetAt,
    ) -> Result<BTreeMap<TopicPartition, i64>, ConsumeError> {
        let context = &self.readers.context;
        let leaders = Leaders::new(context.connections.clone(), context.metadata.clone());
        let partitions: Vec<TopicPartition> = partitions.into_iter().collect();
        let query =
            |of: &TopicPartition| OffsetQuery { topic: of.topic.to_string(), partition: of.partition, at }.into();
        let answers = leaders.list_offsets_patiently(partitions.iter().map(query).collect()).await?;
        let found = partitions.into_iter().zip(answers).map(|(of, answer)| match answer {
            Ok(answer) => Ok((of, answer.offset)),
            Err(refusal) => Err(no_offset(&of, refusal)),
        });
        found.collect()
    }

    /// Commits everything that was delivered, the last record too.
    ///
    /// # Errors
    /// When there is no group, or the coordinator refuses.
    pub async fn commit(&mut self) -> Result<(), ConsumeError> {
        let committer = self.committer()?;
        committer.commit_cells(&self.state.cells(), Cell::delivered).await
    }

    /// Commits positions, or plain offsets: see [`Committer::commit_offsets`].
    ///
    /// # Errors
    /// When there is no group, or the coordinator refuses, or a partition is not this consumer's.
    pub async fn commit_offsets<P: Into<Position>>(
        &self,
        positions: impl IntoIterator<Item = (TopicPartition, P)>,
    ) -> Result<(), ConsumeError> {
        self.committer()?.commit_offsets(positions).await
    }

    /// A handle that commits for this consumer while it is being read elsewhere.
    ///
    /// # Errors
    /// When there is no group.
    pub fn committer(&self) -> Result<Committer, ConsumeError> {
        self.committer.clone().ok_or(ConsumeError::Usage("committing offsets needs a group"))
    }

    /// Subscribes to other topics instead. The group shares partitions out anew.
    ///
    /// # Errors
    /// When this consumer was told its partitions.
    pub async fn subscribe<T: Into<String>>(
        &mut self,
        topics: impl IntoIterator<Item = T>,
    ) -> Result<(), ConsumeError> {
        let membership = self.membership.as_ref();
        let membership = membership.ok_or(ConsumeError::Usage("subscribing needs a consumer built with topics"))?;
        let topics = topics.into_iter().map(Into::into).collect();
        membership.topics.send(topics).map_err(|_| ConsumeError::Closed)
    }

    /// The id under which this consumer is a member of its group.
    pub fn member_id(&self) -> Option<&str> {
        self.membership.as_ref().map(|membership| &*membership.member_id)
    }

    /// Commits what was delivered (where commits are automatic), leaves the group, ends. A static member's partitions wait
    /// for its return within the session timeout. Where the coordinator is away, the commit is given up after
    /// [`crate::ClientConfig::request_timeout`] and leaving after 5 s.
    ///
    /// A callback ([`ConsumerBuilder::on_rebalance`]) that is running is waited for. So this must not be called in one;
    /// there the consumer can be dropped.
    ///
    /// # Errors
    /// When the commit fails; the group is left all the same.
    pub async fn close(mut self) -> Result<(), ConsumeError> {
        self.let_go_of_held();
        self.state.asked.notify_waiters();
        let committed = match &self.committer {
            Some(committer) if self.auto_commit => committer.commit_cells(&self.state.cells(), Cell::delivered).await,
            _ => Ok(()),
        };
        self.stop.cancel();
        if let Some(membership) = &mut self.membership {
            let _ = (&mut membership.task).await;
        }
        committed
    }
}

/// What a turn gives.
enum Delivery {
    Batch(Box<Current>),
    /// The position moved over offsets without records; the second is where it was.
    Passed(Arc<Cell>, i64),
}

fn empty_batch(cell: &Cell, from: i64) -> ConsumedBatch {
    let position = cell.delivered();
    ConsumedBatch {
        origin: Origin {
            topic: cell.at.topic.clone(),
            partition: cell.at.partition,
            leader_epoch: position.leader_epoch,
            timestamp_type: TimestampType::Create,
        },
        records: None,
        from,
        below: position.offset,
        bytes: 0,
    }
}

impl Stream for Consumer {
    type Item = Result<ConsumedRecord, ConsumeError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_record(cx)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // The membership task says goodbye by itself.
        self.stop.cancel();
        self.state.close();
    }
}
