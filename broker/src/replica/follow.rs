//! The follower's end of replica streams: one task for each partition that another broker leads, with one stream at a time.
//!
//! It says what the partition has to say ([`Hello`]), tells it the answer, and hands over what the leader pushes, whole batches in order. What
//! the headers tell is looked at here; the bytes are checked where they are written, on the I/O pool. Credit comes back once they are. A
//! stream that ends is opened again, after a pause that grows while nothing comes of it: the partition says hello anew each time.
//!
//! Owns: one partition's stream to its leader. Refuses: to decide what is taken ([`super::follower`]), and when there is another leader (the
//! partition's task drops this, and begins anew). Read next: [`super::serve`], the other end.

use super::follower::{BatchSpan, Push};
use super::history::Verdict;
use super::links::{LinkError, Place, REPLICA_CREDIT, Replication};
use super::message::{self, MessageError, Opening};
use super::{Hello, Report, Tenure};
use crate::loan::Loan;
use crate::metrics::Counted;
use crate::partition::{Inbox, Pushed};
use crate::stream::{Frames, StreamError, send_within};
use bytes::{Buf, BytesMut};
use headwater_proto::batch::{BatchError, BatchHeader, HEADER_BYTES};
use headwater_proto::frame::FrameEvent;
use headwater_proto::limits::{MAX_BATCH_BYTES, MAX_REPLICA_HEADER_BYTES, MAX_REPLICA_PAYLOAD_BYTES};
use headwater_proto::wire::{Open, ReplicaData, ReplicaOpened, open};
use headwater_proto::{ErrorCode, TopicId, wire};
use headwater_storage::NewBatch;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long the leader may take to answer a hello.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a leader that does not answer keeps the streams to others of its partitions from being opened.
const TURN: Duration = Duration::from_millis(250);

/// Pauses between two streams, while nothing comes of them.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("opening: {0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("the leader refuses: {0}")]
    Refused(String),
    #[error("the leader ended it")]
    Finished,
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("a batch at offset {0}: {1}")]
    Batch(i64, BatchError),
    #[error("a batch at offset {at} of {bytes} bytes")]
    TooLarge { at: i64, bytes: usize },
    #[error("what it brought was not taken")]
    NotTaken(Option<i64>),
}

/// What the partition wants of its stream.
#[derive(Debug, Default)]
struct Orders {
    /// The stream's number; 0: none is wanted yet.
    stream: u64,
    hello: Option<Hello>,
    report: Option<Report>,
    /// Bytes of this stream that are not in memory any more, in all.
    released: u64,
    is_closed: bool,
    /// From where on what it brought is damaged.
    refused: Option<i64>,
}

/// A partition's hold on its stream to the leader, which ends when this is dropped.
pub(crate) struct FollowStream {
    orders: watch::Sender<Orders>,
    _stop: DropGuard,
}

impl FollowStream {
    /// Starts the task, which does nothing before the partition says hello.
    pub(crate) fn start(
        replication: Replication,
        leader: i32,
        partition: (TopicId, u32),
        inbox: Inbox,
    ) -> FollowStream {
        let (orders, ordered) = watch::channel(Orders::default());
        let stop = CancellationToken::new();
        let follower = Follower { replication, leader, partition, inbox };
        let task = follower.run(ordered);
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled_owned(task).await });
        FollowStream { orders, _stop: stop.drop_guard() }
    }

    /// Say this, on a stream of this number.
    pub(crate) fn open(&self, stream: u64, hello: Hello) {
        self.orders.send_replace(Orders { stream, hello: Some(hello), ..Orders::default() });
    }

    /// Tell the leader how far the replica is.
    pub(crate) fn report(&self, report: Report) {
        self.orders.send_modify(|orders| orders.report = Some(report));
    }

    /// So many bytes that the stream brought are not in memory any more.
    pub(crate) fn released(&self, bytes: u64) {
        self.orders.send_modify(|orders| orders.released += bytes);
    }

    /// End the stream of this number, and tell the leader from where on what it pushed is damaged, if it is.
    pub(crate) fn close(&self, stream: u64, refused: Option<i64>) {
        self.orders.send_modify(|orders| {
            if orders.stream == stream {
                (orders.is_closed, orders.refused) = (true, orders.refused.or(refused));
            }
        });
    }
}

struct Follower {
    replication: Replication,
    leader: i32,
    partition: (TopicId, u32),
    inbox: Inbox,
}

impl Follower {
    async fn run(self, mut orders: watch::Receiver<Orders>) {
        let (mut pause, mut last, mut told) = (FIRST_PAUSE, 0, false);
        loop {
            let (stream, hello) = {
                // An error means that the partition is gone.
                let Ok(wanted) = orders.wait_for(|orders| orders.stream > last).await else { return };
                (wanted.stream, wanted.hello.clone())
            };
            last = stream;
            let Some(hello) = hello else { continue };
            let mut came_through = false;
            let ended = self.follow(stream, hello, &mut orders, &mut came_through).await;
            let Err(why) = ended else {
                pause = FIRST_PAUSE;
                continue;
            };
            let (topic_id, partition) = self.partition;
            tracing::debug!(%topic_id, partition, leader = self.leader, stream, %why, "a replica stream ended");
            if matches!(why, Ended::Batch(..) | Ended::TooLarge { .. }) && !std::mem::replace(&mut told, true) {
                tracing::error!(
                    %topic_id, partition, leader = self.leader, %why,
                    "what the leader pushed is not taken; it is asked for again"
                );
            }
            if came_through {
                pause = FIRST_PAUSE;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            self.inbox.lost(stream);
        }
    }

    /// One stream, until it ends, or the partition wants another (`Ok`). `came_through`: whether anything was pushed on it.
    async fn follow(
        &self,
        stream: u64,
        hello: Hello,
        orders: &mut watch::Receiver<Orders>,
        came_through: &mut bool,
    ) -> Result<(), Ended> {
        let patience = self.replication.patience();
        let turn = self.replication.turn(self.leader).await;
        let mut place = self.replication.place(self.leader).await?;
        let (mut send, recv) = timeout(patience, place.connection().open_bi())
            .await
            .map_err(|_| StreamError::Deadline("a stream to the leader"))??;
        let (tenure, next) = (hello.tenure, hello.history.log_end());
        let (topic_id, partition) = self.partition;
        let opening = Opening { topic_id, partition, hello, credit_bytes: place.credit().outstanding() };
        let open = Open { stream: Some(open::Stream::Replica(opening.to_wire())) };
        send_within(&mut send, &open, patience, "hello to the leader").await?;
        let mut frames = Frames::<ReplicaOpened>::new(recv, MAX_REPLICA_HEADER_BYTES, 0, patience);
        let opened = {
            let mut answer = std::pin::pin!(timeout(ANSWER_TIMEOUT, frames.message()));
            let early = timeout(TURN, &mut answer).await;
            drop(turn);
            match early {
                Ok(opened) => opened,
                Err(_) => answer.await,
            }
        };
        let opened = opened.map_err(|_| StreamError::Deadline("the leader's answer"))??.ok_or(Ended::Finished)?;
        if let Some(error) = opened.error {
            return Err(Ended::Refused(error.message));
        }
        let verdict = message::verdict(&opened)?;
        self.inbox.verdict(stream, tenure, verdict);
        if verdict != Verdict::Agrees {
            // The partition cuts its log, and says hello again; or it is fenced, and says nothing more.
            return Ok(());
        }
        let _counted = Counted::new(&self.replication.metrics().follower_streams);
        let frames = frames.followed_by::<ReplicaData>(MAX_REPLICA_HEADER_BYTES, MAX_REPLICA_PAYLOAD_BYTES)?;
        let pushes = Pushes {
            follower: self,
            stream,
            tenure,
            place,
            send,
            next,
            held: 0,
            partial: BytesMut::new(),
            segment: None,
            loan: None,
        };
        pushes.run(frames, orders, came_through).await
    }
}

/// A stream on which the leader pushes.
struct Pushes<'a> {
    follower: &'a Follower,
    stream: u64,
    tenure: Tenure,
    place: Place,
    send: quinn::SendStream,
    /// Where what was handed over ends.
    next: i64,
    /// Bytes that were handed over and not released.
    held: u64,
    /// The beginning of a batch.
    partial: BytesMut,
    /// Where the leader's segment begins that the last batch was in.
    segment: Option<i64>,
    loan: Option<Loan>,
}

impl Pushes<'_> {
    /// Takes what comes, and tells the leader if it is damaged.
    async fn run(
        mut self,
        frames: Frames<ReplicaData>,
        orders: &mut watch::Receiver<Orders>,
        came_through: &mut bool,
    ) -> Result<(), Ended> {
        let ended = self.take(frames, orders, came_through).await;
        let refused = match &ended {
            Err(Ended::NotTaken(refused)) => *refused,
            // A length that is wrong shows behind its batch.
            Err(Ended::Batch(..) | Ended::TooLarge { .. }) => Some(self.next),
            _ => None,
        };
        if let Some(at) = refused {
            let patience = self.follower.replication.patience();
            send_within(&mut self.send, &message::refused(at), patience, "what is damaged").await?;
            // It is the last word, which would be lost with the stream. Whether it came, the stream's end tells.
            drop(self.send.finish());
            drop(timeout(patience, self.send.stopped()).await);
        }
        ended
    }

    async fn take(
        &mut self,
        mut frames: Frames<ReplicaData>,
        orders: &mut watch::Receiver<Orders>,
        came_through: &mut bool,
    ) -> Result<(), Ended> {
        let (mut released, mut reported) = (0, None);
        let mut header = ReplicaData::default();
        let mut batches = Vec::new();
        loop {
            if let Some(grant) = self.lend().await? {
                self.tell(None, grant).await?;
                frames.restart_deadline();
            }
            let event = tokio::select! {
                biased;
                changed = orders.changed() => {
                    let (report, newly_released) = {
                        // An error means that the partition is gone.
                        let Ok(()) = changed else { return Ok(()) };
                        let orders = orders.borrow_and_update();
                        match orders.stream {
                            number if number != self.stream => return Ok(()),
                            _ if orders.is_closed => return Err(Ended::NotTaken(orders.refused)),
                            _ => (orders.report, orders.released - std::mem::replace(&mut released, orders.released)),
                        }
                    };
                    self.held = self.held.saturating_sub(newly_released);
                    let grant = self.place.release(newly_released);
                    let news = report.filter(|report| reported != Some(*report));
                    if news.is_some() || grant > 0 {
                        reported = report;
                        self.tell(news, grant).await?;
                    }
                    continue;
                }
                event = frames.next() => event?,
            };
            match event {
                None => return Err(Ended::Finished),
                Some(FrameEvent::Header { message, payload_bytes }) => {
                    if let Some(error) = message.error {
                        return Err(Ended::Refused(error.message));
                    }
                    *came_through = true;
                    header = message;
                    if payload_bytes == 0 {
                        self.hand_over(&header, Vec::new());
                    }
                }
                Some(FrameEvent::Payload { part, remaining }) => {
                    let bytes = part.len() as u64;
                    let exceeded = |error: crate::credit::CreditExceeded| {
                        StreamError::Refused(ErrorCode::CreditExceeded, error.to_string())
                    };
                    self.place.credit().receive(bytes).map_err(exceeded)?;
                    self.partial.extend_from_slice(&part);
                    while let Some(batch) = self.whole_batch()? {
                        batches.push(batch);
                    }
                    if remaining == 0 {
                        self.hand_over(&header, std::mem::take(&mut batches));
                    }
                }
            }
        }
    }

    /// The next batch that is complete.
    fn whole_batch(&mut self) -> Result<Option<NewBatch>, Ended> {
        let Some(front) = self.partial.get(..HEADER_BYTES) else { return Ok(None) };
        let header = BatchHeader::parse(front).map_err(|error| Ended::Batch(self.next, error))?;
        if header.size() > MAX_BATCH_BYTES {
            return Err(Ended::TooLarge { at: header.base_offset, bytes: header.size() });
        }
        if self.partial.len() < header.size() {
            return Ok(None);
        }
        let bytes = self.partial.split_to(header.size()).freeze();
        if !self.partial.has_remaining() {
            self.partial = BytesMut::new();
        }
        Ok(Some(NewBatch { header, bytes }))
    }

    /// Gives the partition what is complete, and the leader's offsets.
    fn hand_over(&mut self, header: &ReplicaData, batches: Vec<NewBatch>) {
        let rolls: Vec<i64> = batches
            .first()
            .filter(|first| self.begins_segment(header, first))
            .into_iter()
            .map(|first| first.header.base_offset)
            .collect();
        let bytes: u64 = batches.iter().map(|batch| batch.bytes.len() as u64).sum();
        self.held += bytes;
        let from = self.next;
        let span = |batch: &NewBatch| BatchSpan {
            base_offset: batch.header.base_offset,
            next_offset: batch.header.next_offset(),
            leader_epoch: batch.header.leader_epoch,
        };
        let spans: Vec<BatchSpan> = batches.iter().map(span).collect();
        self.next = spans.last().map_or(from, |last| last.next_offset);
        let (high_watermark, log_start) = (header.high_watermark, header.log_start_offset);
        let push = Push { tenure: self.tenure, from, batches: spans, high_watermark, log_start };
        let loan = if batches.is_empty() { None } else { self.loan.take() };
        self.follower.replication.metrics().replicated_bytes.increment(bytes);
        self.follower.inbox.pushed(self.stream, push, Pushed { batches, rolls, bytes, loan });
    }

    /// Whether the leader's segment begins with this batch, the first that a frame completes: all that it completes are in one segment.
    fn begins_segment(&mut self, header: &ReplicaData, first: &NewBatch) -> bool {
        let base = header.segment_base_offset;
        let before = self.segment.replace(base);
        // Where it was compacted, its first batch may come later.
        first.header.base_offset == base || before.is_some_and(|before| before < base)
    }

    /// Lends the batch under way what it lacks, where nothing that its stream holds will be released before: in parts.
    async fn lend(&mut self) -> Result<Option<u64>, Ended> {
        let has = self.partial.len() as u64;
        if has == 0 || self.held > 0 || self.place.credit().outstanding() > 0 {
            return Ok(None);
        }
        let whole = match self.partial.get(..HEADER_BYTES) {
            Some(front) => BatchHeader::parse(front).map_err(|error| Ended::Batch(self.next, error))?.size() as u64,
            None => HEADER_BYTES as u64,
        };
        let lack = whole.saturating_sub(has);
        if lack == 0 {
            return Ok(None);
        }
        if self.loan.is_none() && whole > HEADER_BYTES as u64 {
            let (memory, most) = self.follower.replication.loans();
            let bytes = u32::try_from(lack).unwrap_or(u32::MAX).min(most);
            let patience = self.follower.replication.patience();
            self.loan = Some(Loan::take(self.place.loan_turn(), memory, bytes, patience).await?);
        }
        let part = lack.min(REPLICA_CREDIT.stream_max_bytes);
        self.place.credit().lend(part);
        Ok(Some(part))
    }

    async fn tell(&mut self, report: Option<Report>, credit_bytes: u64) -> Result<(), Ended> {
        let progress: wire::ReplicaProgress = message::progress(report.as_ref(), credit_bytes);
        let patience = self.follower.replication.patience();
        Ok(send_within(&mut self.send, &progress, patience, "how far the replica is").await?)
    }
}
