//! The task that reads one partition.
//!
//! Owns: the fetch stream (opening it, and opening it again after a loss), credit, checking batches. It always drains what
//! arrives, into memory it granted; where the application takes nothing, it grants no more. Refuses: delivering (see
//! [`super::state`]), and skipping: what cannot be read is an error. Read next: [`super::credit`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use headwater_proto::ErrorCode;
use headwater_proto::batch;
use headwater_proto::frame::FrameEvent;
use headwater_proto::wire::{self, open};
use quinn::SendStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::credit::{Assembler, FetchCredit};
use super::locate::start_position;
use super::prefetch::SMALLEST_SHARE_BYTES;
use super::record::{OutOfRange, Position, StartFrom};
use super::state::{Item, Life, State};
use crate::TopicPartition;
use crate::connection::{Connections, Lease};
use crate::error::{ConsumeError, Error, Refusal};
use crate::metadata::{Metadata, PartitionInfo, TopicInfo, is_stale};
use crate::retry::{Backoff, NEVER, after, reached};
use crate::stream::{FrameReader, write_message};
use crate::watch::{LeaderWatch, WORTH_ASKING};

/// A stream that is not opened within this time is tried anew.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// A nearer replica that is not opened within this time is not waited for: the leader serves too.
const NEAR_PATIENCE: Duration = Duration::from_secs(1);
/// How long the leader is read from where a nearer replica could not be, before that is tried again: so many of the longest pauses
/// between two tries.
const NEAR_PAUSES: u32 = 10;

/// What the broker was granted beyond a share that became smaller must have come within this time, or the stream is opened
/// anew: at the end of a log it may never come, and others wait for it.
const NARROW_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a stream is left whose leader is none any more.
const REPLACED: &str = "another broker leads the partition by now";

/// What the fetch tasks of a consumer share.
pub(crate) struct Context {
    pub(crate) connections: Arc<Connections>,
    pub(crate) metadata: Arc<Metadata>,
    pub(crate) state: Arc<State>,
    pub(crate) on_out_of_range: OutOfRange,
    /// Yields to readers at the tail.
    pub(crate) background: bool,
    /// A group decides what is read: where a topic is deleted, it takes the partitions away.
    pub(crate) subscribed: bool,
    /// The consumer ends.
    pub(crate) stop: CancellationToken,
}

/// One partition's reading.
pub(crate) struct Fetch {
    context: Arc<Context>,
    life: Life,
    /// Of what is read next; ahead of the application's.
    next: Position,
    /// Of the prefetch: how much this partition has claimed.
    claimed_bytes: u64,
    /// When this began. The partition was assigned before: what was known of its topic by then may be older than that.
    since: Instant,
    /// Who leads, as a broker tells unasked.
    leader: LeaderWatch,
    /// The epoch of the leader to whom a stream was opened last, or was to be.
    leader_epoch: i32,
    /// The leader is asked for a nearer replica from then on.
    near_at: Instant,
    /// How long it is not asked after a nearer replica was of no use.
    near_pause: Duration,
}

/// An open fetch stream.
struct Stream {
    lease: Lease,
    address: Arc<str>,
    send: SendStream,
    data: FrameReader<wire::FetchData>,
    assembler: Assembler,
    /// What it was opened with.
    info: Arc<TopicInfo>,
    /// It comes from a replica that is nearer than the leader.
    is_near: bool,
    /// Another stream is opened then: there may be a nearer replica by that time.
    look_at: Option<Instant>,
}

/// Why reading stops.
enum Stop {
    /// Trying again can help.
    Lost(Error),
    /// The broker has more credit than is this partition's now: the stream is opened anew with less.
    Narrowed,
    /// There may be a nearer replica than the leader: the stream is opened anew, wherever that is.
    Nearer,
    /// The broker's word about this partition.
    Refused(Refusal),
    /// The application must decide.
    Fatal(ConsumeError),
}

impl Fetch {
    /// Reading from `next` on.
    pub(crate) fn new(context: Arc<Context>, life: Life, next: Position) -> Fetch {
        let leader = context.metadata.watch_leader(life.cell.topic_id, life.cell.at.partition);
        let since = Instant::now();
        let near_pause = context.connections.config.retry_backoff_max.saturating_mul(NEAR_PAUSES).min(NEVER);
        Fetch { context, life, next, claimed_bytes: 0, since, leader, leader_epoch: -1, near_at: since, near_pause }
    }

    /// Reads until the task is dropped or the application must decide how to go on.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::new(&self.context.connections.config);
        let mut credit = FetchCredit::new(SMALLEST_SHARE_BYTES);
        let mut doubted = None;
        let mut warned = false;
        loop {
            let before = self.next.offset;
            let stop = self.read(&mut credit, &mut doubted).await;
            // What waits for the application still counts; others may have the rest until there is a stream again.
            credit.reopened();
            self.claimed_bytes = self.life.feed.claim.adjust(credit.used().min(self.claimed_bytes));
            if self.next.offset > before {
                backoff.reset();
            }
            let at_once = matches!(stop, Stop::Narrowed | Stop::Nearer);
            if let Err(error) = self.decide(stop).await {
                if !self.context.subscribed || !is_gone(&error) {
                    return self.push(Item::Error(error));
                }
                // The group takes it away; unless whoever was asked has not heard yet of what the group assigned.
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(partition = %self.life.cell.at, %error, "not read at the moment");
                }
            }
            if at_once {
                continue;
            }
            let pause = Instant::now() + backoff.next(rand::random());
            tokio::select! {
                () = reached(Some(pause)) => {}
                newest = self.leader.replaced(self.leader_epoch) => {
                    // Which ends one pause only.
                    self.leader_epoch = newest;
                    backoff.reset();
                    doubted = None;
                }
            }
        }
    }

    /// What follows from a stop: reading on, or an error for the application.
    async fn decide(&mut self, stop: Stop) -> Result<(), ConsumeError> {
        let TopicPartition { topic, partition } = self.life.cell.at.clone();
        let refusal = match stop {
            Stop::Fatal(error) => return Err(error),
            Stop::Narrowed | Stop::Nearer => return Ok(()),
            Stop::Lost(error) => {
                tracing::debug!(topic = &*topic, partition, %error, "fetch stream lost");
                return Ok(());
            }
            Stop::Refused(refusal) => refusal,
        };
        let offset = self.next.offset;
        let is_cut = match refusal.code {
            ErrorCode::LogTruncated => true,
            ErrorCode::OffsetOutOfRange => offset > refusal.end_offset,
            _ => false,
        };
        if is_cut {
            // With what was read, what was known of the log is gone.
            self.life.cell.high_watermark.store(-1, Ordering::Relaxed);
        }
        match (refusal.code, self.context.on_out_of_range) {
            _ if refusal.retryable => {
                tracing::debug!(topic = &*topic, partition, %refusal, "fetch refused");
                Ok(())
            }
            (ErrorCode::OffsetOutOfRange, OutOfRange::Error) => Err(ConsumeError::OffsetOutOfRange {
                topic,
                partition,
                offset,
                log_start_offset: refusal.log_start_offset,
                end_offset: refusal.end_offset,
            }),
            (ErrorCode::OffsetOutOfRange, choice) => {
                let from = if choice == OutOfRange::Earliest { StartFrom::Earliest } else { StartFrom::Latest };
                tracing::warn!(topic = &*topic, partition, offset, ?from, "position out of range");
                let found = start_position(&self.context, &self.life.cell.at, from).await;
                match found {
                    Ok(position) => {
                        self.next = position;
                        self.push(Item::Pass(position));
                        Ok(())
                    }
                    Err(error) if error.retryable() => Ok(()),
                    Err(error) => Err(error),
                }
            }
            (ErrorCode::LogTruncated, _) => {
                Err(ConsumeError::LogTruncated { topic, partition, offset, end_offset: refusal.end_offset })
            }
            _ => Err(ConsumeError::Refused { topic, partition, refusal }),
        }
    }

    fn push(&self, item: Item) {
        self.context.state.push(&self.life, item);
    }

    /// Opens a stream and reads it to its end. Returns why it ended.
    async fn read(&mut self, credit: &mut FetchCredit, doubted: &mut Option<Instant>) -> Stop {
        credit.released(self.life.feed.take_released());
        let metadata = self.context.metadata.clone();
        let opened = {
            let opening = tokio::time::timeout(OPEN_TIMEOUT, self.open(credit, doubted));
            let mut opening = std::pin::pin!(opening);
            loop {
                match tokio::time::timeout(WORTH_ASKING, &mut opening).await {
                    Ok(opened) => break opened,
                    Err(_) => metadata.nudge(),
                }
            }
        };
        let mut stream = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(stop)) => return stop,
            Err(_) => return Stop::Lost(Error::TimedOut { what: "opening a fetch stream", after: OPEN_TIMEOUT }),
        };
        let ended = self.drain(&mut stream, credit).await;
        if stream.is_near && !matches!(ended, Ok(Stop::Narrowed) | Err(Stop::Fatal(_))) {
            self.near_at = Instant::now() + self.near_pause;
        }
        match ended {
            // What a position is worth, the leader says.
            Ok(Stop::Refused(refusal)) if stream.is_near => Stop::Lost(Error::Refused(refusal)),
            Ok(Stop::Refused(refusal)) => self.refused(refusal, &stream.info, doubted),
            Ok(stop) | Err(stop) => stop,
        }
    }

    async fn open(&mut self, credit: &mut FetchCredit, doubted: &mut Option<Instant>) -> Result<Stream, Stop> {
        let TopicPartition { topic, partition } = &self.life.cell.at.clone();
        let context = self.context.clone();
        let lost = |error: Error| match error.code() {
            Some(ErrorCode::UnknownTopic) => Stop::Fatal(ConsumeError::UnknownTopic { topic: topic.clone() }),
            _ if error.retryable() => Stop::Lost(error),
            _ => Stop::Fatal(error.into()),
        };
        let info = match doubted.take() {
            Some(doubted) => context.metadata.newer_than(topic, Some(doubted)).await,
            None => context.metadata.topic(topic).await,
        };
        let info = info.map_err(lost)?;
        if info.id != self.life.cell.topic_id {
            // Which of the two is the older one, only an answer from after the assignment tells.
            *doubted = Some(info.at);
            let why = format!("topic {topic:?} was deleted and created anew");
            let refusal = Refusal::from(wire::Error::new(ErrorCode::UnknownTopicId, why));
            let newer = info.at > self.since;
            return Err(if newer { Stop::Refused(refusal) } else { Stop::Lost(Error::Refused(refusal)) });
        }
        let Some(leader) = info.leader(*partition).filter(|leader| leader.leader >= 0) else {
            *doubted = Some(info.at);
            return Err(Stop::Refused(wire::Error::new(ErrorCode::NotLeader, "the partition has no leader").into()));
        };
        // Unless it answers: whoever led cannot be reached, or is no longer there; another may lead by now.
        *doubted = Some(info.at);
        self.leader_epoch = leader.leader_epoch;
        let mut watch = self.leader.clone();
        let opened = tokio::select! {
            biased;
            opened = self.open_at(&info, leader, credit) => opened,
            _ = watch.replaced(leader.leader_epoch) => {
                *doubted = None;
                return Err(Stop::Lost(Error::refused(ErrorCode::NotLeader, REPLACED)));
            }
        };
        let (stream, answer) = opened.map_err(lost)?;
        *doubted = None;
        if let Some(error) = answer.error {
            return Err(self.refused(error.into(), &info, doubted));
        }
        self.life.cell.high_watermark.fetch_max(answer.high_watermark, Ordering::Relaxed);
        stream.map_err(lost)
    }

    /// Opens a stream to the leader, or to a replica that the leader names because it is nearer.
    async fn open_at(
        &mut self,
        info: &Arc<TopicInfo>,
        leader: PartitionInfo,
        credit: &mut FetchCredit,
    ) -> Result<(Result<Stream, Error>, wire::FetchOpened), Error> {
        let Some(rack) = self.context.connections.config.rack.clone() else {
            return self.open_on(info, leader, (leader.leader, String::new()), credit, None).await;
        };
        if Instant::now() < self.near_at {
            return self.open_on(info, leader, (leader.leader, String::new()), credit, Some(self.near_at)).await;
        }
        // Where there is none, there may be one later: after as long as what is known of a topic is used.
        let later = after(Instant::now(), self.context.connections.config.metadata_max_age.max(self.near_pause));
        let opened = self.open_on(info, leader, (leader.leader, rack), credit, Some(later)).await?;
        let Some(near) = opened.1.preferred_replica.filter(|near| *near != leader.leader) else { return Ok(opened) };
        drop(opened);
        credit.reopened();
        // Unless it serves: then the leader is asked again with the next stream.
        self.near_at = Instant::now() + self.near_pause;
        let opening = self.open_on(info, leader, (near, String::new()), credit, None);
        let refusal = match tokio::time::timeout(NEAR_PATIENCE, opening).await {
            Ok(Ok((stream, answer))) if answer.error.is_none() => {
                self.near_at = Instant::now();
                return Ok((stream, answer));
            }
            Ok(Ok((_, answer))) => answer.error.map(|error| Error::Refused(error.into())),
            Ok(Err(error)) => Some(error),
            Err(_) => Some(Error::TimedOut { what: "opening a fetch stream", after: NEAR_PATIENCE }),
        };
        let at = &self.life.cell.at;
        tracing::debug!(%at, near, error = refusal.map(tracing::field::display), "not read from a replica that is nearer");
        credit.reopened();
        self.open_on(info, leader, (leader.leader, String::new()), credit, Some(self.near_at)).await
    }

    async fn open_on(
        &mut self,
        info: &Arc<TopicInfo>,
        leader: PartitionInfo,
        (broker_id, rack): (i32, String),
        credit: &mut FetchCredit,
        look_at: Option<Instant>,
    ) -> Result<(Result<Stream, Error>, wire::FetchOpened), Error> {
        let share = self.life.feed.claim.share();
        let mut lease = self.context.connections.lease(broker_id, share).await?;
        self.fit(&mut lease, credit);
        let is_near = broker_id != leader.leader;
        let request = wire::OpenFetch {
            topic_id: info.id.to_wire(),
            partition: self.life.cell.at.partition,
            offset: self.next.offset,
            position_leader_epoch: self.next.leader_epoch,
            leader_epoch: leader.leader_epoch,
            min_bytes: 1,
            max_wait_ms: 0,
            credit_bytes: credit.grant(),
            background: self.context.background,
            rack,
            from_follower: is_near,
        };
        let (send, recv) = lease.link.open(open::Stream::Fetch(request)).await?;
        let address = lease.link.address().clone();
        let mut opened = FrameReader::<wire::FetchOpened>::new(recv, address.clone());
        let answer = opened.message().await?.ok_or_else(|| {
            let reason = "the fetch stream ended before it was opened".into();
            Error::ConnectionLost { address: address.to_string(), reason }
        })?;
        let (info, assembler) = (info.clone(), Assembler::default());
        let data = opened.followed_by();
        let stream = data.map(|data| Stream { lease, address, send, data, assembler, info, is_near, look_at });
        Ok((stream, answer))
    }

    /// Keeps the limit of credit within this partition's part of the prefetch and of the connection.
    fn fit(&mut self, lease: &mut Lease, credit: &mut FetchCredit) {
        let share = self.life.feed.claim.share();
        // What is over the share is given back as it is taken, since what was granted may still come.
        let wanted = if self.claimed_bytes > share { credit.used().clamp(share, self.claimed_bytes) } else { share };
        if wanted != self.claimed_bytes {
            self.claimed_bytes = self.life.feed.claim.adjust(wanted);
        }
        if lease.credit != share && credit.outstanding() <= share {
            lease.resize(share);
        }
        credit.set_limit(self.claimed_bytes.max(SMALLEST_SHARE_BYTES).min(share).min(lease.credit));
    }

    /// Takes what arrives, and grants more as the application takes it.
    async fn drain(&mut self, stream: &mut Stream, credit: &mut FetchCredit) -> Result<Stop, Stop> {
        // The offset that the frame at hand leads to.
        let mut leads_to = self.next.offset;
        let mut narrow_at = None;
        let link = stream.lease.link.clone();
        // Once after each time that something came: whoever leads may be gone.
        let mut ask_at = None;
        loop {
            if self.claimed_bytes > self.life.feed.claim.share() {
                self.fit(&mut stream.lease, credit);
            }
            let over = self.claimed_bytes > self.life.feed.claim.share() && credit.outstanding() > 0;
            narrow_at = over.then(|| narrow_at.unwrap_or_else(|| Instant::now() + NARROW_TIMEOUT));
            let grant = credit.grant();
            if grant > 0 {
                let message = wire::FetchCredit { credit_bytes: grant };
                write_message(&mut stream.send, &message, &stream.address).await.map_err(Stop::Lost)?;
            }
            let event = tokio::select! {
                event = stream.data.next() => event.map_err(Stop::Lost)?,
                () = self.life.feed.wake.notified() => {
                    credit.released(self.life.feed.take_released());
                    self.fit(&mut stream.lease, credit);
                    continue;
                }
                () = reached(narrow_at) => return Ok(Stop::Narrowed),
                // What is on its way of a batch would come twice.
                () = reached(stream.look_at), if stream.assembler.is_at_boundary() => return Ok(Stop::Nearer),
                _ = self.leader.replaced(self.leader_epoch) => {
                    return Ok(Stop::Lost(Error::refused(ErrorCode::NotLeader, REPLACED)));
                }
                () = link.left(), if stream.is_near => {
                    let reason = "the replica is out of sync, or gone".into();
                    return Ok(Stop::Lost(Error::ConnectionLost { address: stream.address.to_string(), reason }));
                }
                () = reached(ask_at) => {
                    self.context.metadata.nudge();
                    ask_at = None;
                    continue;
                }
            };
            ask_at = Some(Instant::now() + WORTH_ASKING);
            let whole = match event {
                Some(FrameEvent::Header { message, payload_bytes }) => {
                    if let Some(error) = message.error {
                        return Ok(Stop::Refused(error.into()));
                    }
                    // Whoever led before may have said more, and so may the leader where this comes from a replica.
                    self.life.cell.high_watermark.fetch_max(message.high_watermark, Ordering::Relaxed);
                    leads_to = message.next_offset;
                    payload_bytes == 0
                }
                Some(FrameEvent::Payload { mut part, remaining }) => {
                    if !credit.received(part.len() as u64) {
                        return Ok(Stop::Lost(Error::Protocol("more bytes than were granted".into())));
                    }
                    while let Some(batch) = stream.assembler.next(&mut part).map_err(|e| self.corrupt(&e))? {
                        self.take(batch, credit)?;
                    }
                    remaining == 0
                }
                None => {
                    let reason = "the broker ended the fetch stream".into();
                    return Ok(Stop::Lost(Error::ConnectionLost { address: stream.address.to_string(), reason }));
                }
            };
            if whole && stream.assembler.is_at_boundary() && leads_to > self.next.offset {
                self.next.offset = leads_to;
                self.push(Item::Pass(self.next));
            }
        }
    }

    fn take(&mut self, bytes: bytes::Bytes, credit: &mut FetchCredit) -> Result<(), Stop> {
        let header = batch::check(&bytes).map_err(|e| self.corrupt(&e))?;
        if header.next_offset() <= self.next.offset {
            // The first batch may end before the position where compaction left a gap.
            return Ok(());
        }
        self.next = Position { offset: header.next_offset(), leader_epoch: header.leader_epoch };
        credit.complete(bytes.len() as u64);
        self.push(Item::Batch(header, bytes));
        Ok(())
    }

    /// What follows from a broker's refusal, and whether it says that what was known of the topic is wrong.
    fn refused(&self, refusal: Refusal, known: &TopicInfo, doubted: &mut Option<Instant>) -> Stop {
        if let Some(hint) = &refusal.leader
            && self.context.metadata.hinted(known, self.life.cell.at.partition, hint)
        {
            return Stop::Lost(Error::Refused(refusal));
        }
        if is_stale(refusal.code) {
            *doubted = Some(known.at);
            if refusal.code == ErrorCode::UnknownTopicId || refusal.code == ErrorCode::UnknownPartition {
                // Gone, or not heard of yet where it leads now: the next answer about the topic tells.
                return Stop::Lost(Error::Refused(refusal));
            }
        }
        Stop::Refused(refusal)
    }

    fn corrupt(&self, reason: &dyn std::fmt::Display) -> Stop {
        let TopicPartition { topic, partition } = self.life.cell.at.clone();
        Stop::Fatal(ConsumeError::Corrupt { topic, partition, offset: self.next.offset, reason: reason.to_string() })
    }
}

/// Whether a topic or partition does not exist (any more).
pub(crate) fn is_gone(error: &ConsumeError) -> bool {
    matches!(error.code(), Some(ErrorCode::UnknownTopic | ErrorCode::UnknownTopicId | ErrorCode::UnknownPartition))
}
