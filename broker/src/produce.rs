//! One produce stream: appends in order, pipelined; acknowledgements in order; byte credit back.
//!
//! Two halves share the stream's task. The reader takes frames, checks every batch, and hands it to the partition in order;
//! the writer awaits the outcomes in that order and writes as many acknowledgements at once as are ready. Credit comes
//! back with the acknowledgement. After an error everything later is refused until the stream is opened again, so that
//! nothing overtakes what failed.
//!
//! What a batch's header tells is looked at here; its bytes are checked (CRC-32C, then a walk over its records) on the I/O pool,
//! which takes about 16 microseconds a megabyte for the checksum and some ten nanoseconds a record. A small uncompressed frame
//! is checked by the job that writes it, because another job would cost more than the check. What is compressed, large or has
//! many records is checked by a job of its own before, beside those of other streams.
//!
//! Owns: one stream. Refuses: to decide on credit ([`crate::credit`]) and durability ([`crate::partition::state`]).
//! Read next: `partition/state.rs`, what the partition decides.

use crate::clock::now_ms;
use crate::cluster_calls;
use crate::credit::{CreditExceeded, StreamCredit};
use crate::error::{PartitionError, ProducerIdentity};
use crate::loan::Loan;
use crate::metadata::{MetadataError, MetadataState};
use crate::metrics::Counted;
use crate::partition::PartitionHandle;
use crate::partition::state::{AppendDone, AppendResult, Ask, Check};
use crate::quic::LOAN_PART_BYTES;
use crate::session::Session;
use crate::stream::{Frames, StreamError, send_within, write_within};
use crate::topic_config::{TimestampSource, TopicConfig};
use bytes::{BufMut, Bytes, BytesMut};
use headwater_proto::batch::{Batches, Codec, LENGTH_PREFIX_BYTES, NO_PRODUCER_ID, Walk, WalkRules, walk};
use headwater_proto::frame::{self, FrameEvent};
use headwater_proto::limits::MAX_FRAME_PAYLOAD_BYTES;
use headwater_proto::wire::{Acks, OpenProduce, ProduceOpened, ProduceRequest, ProduceResponse};
use headwater_proto::{ErrorCode, wire};
use headwater_storage::{LastSequence, NewBatch};
use quinn::{StoppedError, WriteError};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

/// Largest header of a produce frame, in bytes: two small numbers, and room for fields to come.
const MAX_HEADER_BYTES: usize = 4 << 10;

/// Batches of one frame: each has its acknowledgement, and all of them go into one header.
const MAX_BATCHES: usize = 16 << 10;

/// Requests of one stream that may wait for their outcome.
const MAX_PENDING: usize = 1024;

/// What the job checks that writes it, at most so many bytes ...
const QUICK_BYTES: usize = 16 << 10;
/// ... and so many records: a microsecond each, which the batches of others wait for.
const QUICK_RECORDS: i64 = 100;

/// What a client is told first.
const OPENING: &str = "the answer to the opening";

/// A request that was handed over, or refused before.
struct Pending {
    request_id: u64,
    bytes: u64,
    began: Instant,
    outcome: Outcome,
    _loan: Option<Loan>,
}

enum Outcome {
    Waiting(oneshot::Receiver<AppendResult>),
    Refused(wire::Error),
}

/// What both halves of the stream touch. Never held over an await.
struct Account {
    credit: StreamCredit,
    /// Granted and not yet told to the client.
    grant: u64,
    /// Whether a request was refused: all that follow are.
    failed: bool,
}

struct Stream<'a> {
    session: &'a Session,
    partition: PartitionHandle,
    /// In which it was opened; it does not outlive it.
    leader_epoch: i32,
    /// The only one whose batches are taken, besides batches that are nobody's.
    producer: ProducerIdentity,
    acks: Acks,
    account: Mutex<Account>,
    /// Whether the partition refused a request: none that it has of those after it is written.
    not_written: Arc<AtomicBool>,
    /// Credit was released or lent.
    credited: Notify,
    /// How long the client may leave an answer unread, and a large frame waits for memory: what waits here may hold
    /// memory that others wait for.
    patience: Duration,
}

/// Serves the stream until the client finishes it, an error, or the broker's shutdown.
pub(crate) async fn serve(
    session: &Session,
    open: OpenProduce,
    send: &mut quinn::SendStream,
    frames: Frames<wire::Open>,
) -> Result<(), StreamError> {
    let _counted = Counted::new(&session.shared.metrics.produce_streams);
    let frames = frames.followed_by::<ProduceRequest>(MAX_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES)?;
    let patience = session.patience();
    let refuse = |error: wire::Error| {
        session.shared.metrics.rejected(ErrorCode::from_number(error.code));
        ProduceOpened { error: Some(error), last_sequence: -1, last_offset: -1, ..ProduceOpened::default() }
    };
    let partition = match admit(session, &open).await {
        Ok(partition) => partition,
        Err(error) => return send_within(send, &refuse(error), patience, OPENING).await,
    };
    let leader_epoch = partition.leader_epoch();
    let Ok(acks) = Acks::try_from(open.acks) else {
        let error = wire::Error::new(ErrorCode::InvalidRequest, format!("acks cannot be {}", open.acks));
        return send_within(send, &refuse(error), patience, OPENING).await;
    };
    let last = match open.producer_id {
        ..0 => None,
        id => {
            // A disk that hangs answers nobody. Whoever tries again meanwhile must not leave a stream behind each time.
            let last = tokio::select! {
                biased;
                last = timeout(patience, partition.last_sequence(id)) => last,
                gave_up = stopped(send) => return Err(gave_up.into()),
            };
            let last = match last {
                Ok(last) => last.map_err(|error| session.shared.refusal(&partition, &error)),
                Err(_) => Err(hangs(&partition, patience)),
            };
            match last {
                Ok(last) => last,
                Err(error) => return send_within(send, &refuse(error), patience, OPENING).await,
            }
        }
    };
    let producer = match identify(&session.shared.metadata.state(), &open, last) {
        Ok(producer) => producer,
        // Another broker may have given it out just now, by metadata that this one does not know yet.
        Err(_) => {
            let known = tokio::select! {
                biased;
                seen = timeout(patience, cluster_calls::see(&session.shared, false)) => match seen {
                    Ok(seen) => seen,
                    Err(_) => Err(wire::Error::from(&MetadataError::NoLeader)),
                },
                gave_up = stopped(send) => return Err(gave_up.into()),
            };
            match known.and_then(|()| identify(&session.shared.metadata.state(), &open, last)) {
                Ok(producer) => producer,
                Err(error) => return send_within(send, &refuse(error), patience, OPENING).await,
            }
        }
    };
    let credit = session.credit().open();
    let opened = ProduceOpened {
        error: None,
        credit_bytes: credit.outstanding(),
        leader_epoch,
        max_message_bytes: partition.config().max_message_bytes,
        last_sequence: last.map_or(-1, |last| last.sequence),
        last_offset: last.map_or(-1, |last| last.offset),
        last_producer_epoch: last.map_or(-1, |last| i32::from(last.epoch)),
    };
    let account = Mutex::new(Account { credit, grant: 0, failed: false });
    let (not_written, credited) = (Arc::default(), Notify::new());
    let stream = Stream { session, partition, leader_epoch, producer, acks, account, not_written, credited, patience };
    send_within(send, &opened, patience, OPENING).await?;
    let (tell, told) = mpsc::channel(MAX_PENDING);
    // The reader ends first; then the writer answers what is pending, and ends.
    let gave_up = stopped(send);
    tokio::try_join!(stream.read(frames, tell, gave_up), stream.write(send, told)).map(|_| ())
}

/// Waits until the client wants no more answers, or is gone.
fn stopped(send: &quinn::SendStream) -> impl Future<Output = WriteError> + Send + use<> {
    let stopped = send.stopped();
    async {
        match stopped.await {
            Ok(Some(code)) => WriteError::Stopped(code),
            // It has everything, and nothing failed.
            Ok(None) => std::future::pending().await,
            Err(StoppedError::ConnectionLost(error)) => WriteError::ConnectionLost(error),
            Err(StoppedError::ZeroRttRejected) => WriteError::ZeroRttRejected,
        }
    }
}

fn hangs(partition: &PartitionHandle, patience: Duration) -> wire::Error {
    let (topic, number) = (partition.topic(), partition.partition());
    let why = format!("{topic}-{number} has done nothing of what it was given for {patience:?}; its disk may hang");
    wire::Error::new(ErrorCode::TimedOut, why)
}

async fn admit(session: &Session, open: &OpenProduce) -> Result<PartitionHandle, wire::Error> {
    let partition = session.shared.look_twice(|| session.shared.partition(&open.topic_id, open.partition)).await?;
    if session.shared.metadata.state().topic_by_id(&partition.topic_id()).is_some_and(|topic| topic.internal) {
        let why = format!("topic {} belongs to the broker: nobody else writes to it", partition.topic());
        return Err(wire::Error::new(ErrorCode::InvalidTopic, why));
    }
    let current = partition.leader_epoch();
    match open.leader_epoch {
        -1 => {}
        epoch if epoch < current => {
            return Err(wire::Error {
                leader: Some(session.shared.leader_hint(current)),
                ..wire::Error::new(
                    ErrorCode::NotLeader,
                    format!("leader epoch {epoch} is over, this is epoch {current}: refresh the metadata"),
                )
            });
        }
        epoch if epoch > current => {
            return Err(wire::Error::new(
                ErrorCode::UnknownLeaderEpoch,
                format!("leader epoch {epoch} is not known here yet, this is epoch {current}"),
            ));
        }
        _ => {}
    }
    match partition.ended() {
        None => Ok(partition),
        Some(why) => Err(session.shared.refusal(&partition, &why)),
    }
}

/// Who writes to the stream.
fn identify(
    metadata: &MetadataState,
    open: &OpenProduce,
    last: Option<LastSequence>,
) -> Result<ProducerIdentity, wire::Error> {
    let identified = metadata.identify(open.producer_id, open.producer_epoch, last);
    identified.map_err(|refusal| wire::Error::from(&MetadataError::from(refusal)))
}

/// The frame that is arriving.
struct Arriving {
    request_id: u64,
    payload: BytesMut,
    /// Bytes that arrived and are kept.
    held: u64,
    /// Bytes still to come.
    remaining: u64,
    /// Why the rest is thrown away as it arrives.
    refused: Option<wire::Error>,
    loan: Option<Loan>,
}

impl Stream<'_> {
    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(
        &self,
        mut frames: Frames<ProduceRequest>,
        pending: mpsc::Sender<Pending>,
        gave_up: impl Future<Output = WriteError>,
    ) -> Result<(), StreamError> {
        let mut gave_up = pin!(gave_up);
        let mut last_request = 0;
        let mut arriving: Option<Arriving> = None;
        loop {
            if let Some(frame) = &mut arriving {
                let lent = tokio::select! {
                    biased;
                    () = self.session.shared.shutdown.cancelled() => return Ok(()),
                    lent = self.lend(frame) => lent?,
                };
                if lent {
                    frames.restart_deadline();
                }
            }
            let event = tokio::select! {
                biased;
                () = self.session.shared.shutdown.cancelled() => return Ok(()),
                () = self.credited.notified(), if arriving.is_some() => {
                    frames.restart_deadline();
                    continue;
                }
                event = frames.next(), if !self.is_held_up(arriving.as_ref()) => event?,
            };
            match event {
                None => return Ok(()),
                Some(FrameEvent::Header { message, payload_bytes }) => {
                    if message.request_id != last_request + 1 {
                        let why = format!("request {} does not follow request {last_request}", message.request_id);
                        return Err(StreamError::Refused(ErrorCode::InvalidRequest, why));
                    }
                    last_request = message.request_id;
                    let mut frame = Arriving {
                        request_id: message.request_id,
                        payload: BytesMut::new(),
                        held: 0,
                        remaining: payload_bytes as u64,
                        refused: self.refusal(&message, payload_bytes),
                        loan: None,
                    };
                    if payload_bytes == 0 {
                        self.complete(frame, &pending, gave_up.as_mut()).await?;
                    } else {
                        // A client is believed as far as its credit goes; a larger buffer grows with what arrives.
                        let believed = self.account().credit.outstanding().min(payload_bytes as u64);
                        if frame.refused.is_none() {
                            frame.payload.reserve(usize::try_from(believed).unwrap_or(0));
                        }
                        arriving = Some(frame);
                    }
                }
                Some(FrameEvent::Payload { part, remaining }) => {
                    let Some(mut frame) = arriving.take() else { continue };
                    self.take(&mut frame, &part, remaining as u64)?;
                    if remaining == 0 {
                        self.complete(frame, &pending, gave_up.as_mut()).await?;
                    } else {
                        arriving = Some(frame);
                    }
                }
            }
        }
    }

    /// What is known to be wrong with a frame before its payload.
    fn refusal(&self, request: &ProduceRequest, payload_bytes: usize) -> Option<wire::Error> {
        if self.account().failed || self.not_written.load(Ordering::Acquire) {
            Some(earlier_failed())
        } else if request.partition != self.partition.partition() {
            let why = format!("this stream is for partition {}, not {}", self.partition.partition(), request.partition);
            Some(wire::Error::new(ErrorCode::InvalidRequest, why))
        } else if payload_bytes == 0 {
            Some(wire::Error::new(ErrorCode::InvalidRequest, "a produce frame without a record batch"))
        } else {
            None
        }
    }

    /// The client has no credit for the rest of this frame: nothing can arrive until some is released.
    fn is_held_up(&self, frame: Option<&Arriving>) -> bool {
        frame.is_some() && self.account().credit.outstanding() == 0
    }

    /// Part of a payload arrived.
    fn take(&self, frame: &mut Arriving, part: &Bytes, remaining: u64) -> Result<(), StreamError> {
        let bytes = part.len() as u64;
        frame.remaining = remaining;
        self.account().credit.receive(bytes).map_err(|exceeded: CreditExceeded| {
            self.session.shared.metrics.rejected(ErrorCode::CreditExceeded);
            StreamError::Refused(ErrorCode::CreditExceeded, exceeded.to_string())
        })?;
        frame.held += bytes;
        if frame.refused.is_none() {
            frame.payload.extend_from_slice(part);
            frame.refused = self.too_large(&frame.payload);
        }
        if frame.refused.is_some() {
            // The rest is only drained, so that the client gets as far as reading the answer.
            frame.payload = BytesMut::new();
            self.release(std::mem::take(&mut frame.held));
        }
        Ok(())
    }

    /// The size of the payload's first batch stands in its first bytes: too large is known before the rest arrives.
    fn too_large(&self, payload: &[u8]) -> Option<wire::Error> {
        if payload.len() < LENGTH_PREFIX_BYTES {
            return None;
        }
        let length = i32::from_be_bytes(payload.get(8..LENGTH_PREFIX_BYTES)?.try_into().ok()?);
        let bytes = usize::try_from(length).ok()? + LENGTH_PREFIX_BYTES;
        let limit = self.partition.config().max_message_bytes as usize;
        (bytes > limit).then(|| PartitionError::TooLarge { bytes, limit }.to_wire())
    }

    /// Lends the frame what it lacks, in parts, once the turn and the memory for it are there. Whether it did.
    async fn lend(&self, frame: &mut Arriving) -> Result<bool, StreamError> {
        let shortfall = self.account().credit.shortfall(frame.remaining, frame.held);
        if shortfall == 0 {
            return Ok(false);
        }
        if frame.loan.is_none() {
            let shared = &self.session.shared;
            let bytes = u32::try_from(shortfall).unwrap_or(u32::MAX).min(shared.config.loan_bytes);
            frame.loan = Some(Loan::take(&self.session.loan_turn, &shared.loans, bytes, self.patience).await?);
        }
        {
            let mut account = self.account();
            let part = shortfall.min(LOAN_PART_BYTES.saturating_sub(account.credit.outstanding()));
            if part == 0 {
                return Ok(false);
            }
            account.credit.lend(part);
            account.grant += part;
        }
        self.credited.notify_waiters();
        Ok(true)
    }

    /// A frame is complete: its batches are checked and handed to the partition, in order.
    ///
    /// # Errors
    /// When the client gives up before the partition has room.
    async fn complete(
        &self,
        mut frame: Arriving,
        pending: &mpsc::Sender<Pending>,
        gave_up: Pin<&mut impl Future<Output = WriteError>>,
    ) -> Result<(), StreamError> {
        let began = Instant::now();
        let outcome = match frame.refused.take() {
            Some(error) => Outcome::Refused(error),
            None => tokio::select! {
                biased;
                handed = self.hand_over(std::mem::take(&mut frame.payload).freeze()) => match handed {
                    Ok(waiting) => Outcome::Waiting(waiting),
                    Err(error) => Outcome::Refused(self.session.shared.refusal(&self.partition, &error)),
                },
                gave_up = gave_up => return Err(gave_up.into()),
            },
        };
        if matches!(outcome, Outcome::Refused(_)) {
            self.account().failed = true;
        }
        let pending_one =
            Pending { request_id: frame.request_id, bytes: frame.held, began, outcome, _loan: frame.loan };
        // The writer ends only with an error, which ends this half too.
        drop(pending.send(pending_one).await);
        Ok(())
    }

    async fn hand_over(&self, payload: Bytes) -> Result<oneshot::Receiver<AppendResult>, PartitionError> {
        let config = self.partition.config();
        let batches = take_apart(&payload, self.producer, config.max_message_bytes as usize)?;
        let check = move |batches: &[NewBatch]| check(batches, &config, now_ms());
        let left = if is_quick(&batches) {
            Some(Box::new(check) as Ask)
        } else {
            let large = batches.clone();
            self.session.shared.pool.run(move || check(&large)).await?;
            None
        };
        let check = Some(Check::new(Arc::clone(&self.not_written), left));
        self.partition.enqueue(Some(self.leader_epoch), batches, check, self.acks).await
    }

    /// `bytes` are no longer in memory: the client gets them back as credit.
    fn release(&self, bytes: u64) {
        let mut account = self.account();
        let grant = self.session.credit().release(&mut account.credit, bytes);
        account.grant += grant;
        drop(account);
        self.credited.notify_waiters();
    }

    async fn write(
        &self,
        send: &mut quinn::SendStream,
        mut pending: mpsc::Receiver<Pending>,
    ) -> Result<(), StreamError> {
        let mut out = BytesMut::new();
        let mut next: Option<Pending> = None;
        let mut failed = false;
        loop {
            // Wait for an outcome, or for credit to tell of.
            let credited = self.credited.notified();
            let done = tokio::select! {
                biased;
                done = self.first_outcome(&mut next, &mut pending) => done,
                () = credited, if self.account().grant == 0 => continue,
                () = std::future::ready(()), if self.account().grant > 0 => {
                    self.grant(&mut out);
                    write_within(send, out.split().freeze(), self.patience, "an acknowledgement").await?;
                    continue;
                }
            };
            let Some((request, result)) = done else { break };
            self.acknowledge(&mut out, request, result, &mut failed);
            // Whatever else is ready goes into the same write.
            while let Some((request, result)) = self.ready_outcome(&mut next, &mut pending) {
                self.acknowledge(&mut out, request, result, &mut failed);
            }
            self.grant(&mut out);
            if !out.is_empty() {
                write_within(send, out.split().freeze(), self.patience, "an acknowledgement").await?;
            }
        }
        Ok(())
    }

    /// Writes credit that no acknowledgement carried.
    fn grant(&self, out: &mut BytesMut) {
        let credit_bytes = std::mem::take(&mut self.account().grant);
        if credit_bytes > 0 {
            out.put(frame::encode(&ProduceResponse { credit_bytes, ..ProduceResponse::default() }, 0));
        }
    }

    /// Answers one request. `failed`: whether an earlier one was refused, and with it all that follow.
    fn acknowledge(
        &self,
        out: &mut BytesMut,
        request: Pending,
        result: Result<AppendDone, wire::Error>,
        failed: &mut bool,
    ) {
        let metrics = &self.session.shared.metrics;
        self.release(request.bytes);
        let mut response = ProduceResponse { request_id: request.request_id, ..ProduceResponse::default() };
        match result {
            Ok(_) if *failed => response.error = Some(earlier_failed()),
            Ok(done) => {
                metrics.produce_seconds.record(request.began.elapsed());
                metrics.bytes_in.increment(request.bytes);
                metrics.batches_in.increment(done.batches.len() as u64);
                metrics.records_in.increment(done.appended());
                response.batches = done.acks();
                response.durability = done.durability.into();
                if self.acks == Acks::None {
                    return;
                }
            }
            Err(_) if *failed => response.error = Some(earlier_failed()),
            Err(error) => {
                *failed = true;
                self.account().failed = true;
                metrics.rejected(ErrorCode::from_number(error.code));
                response.error = Some(error);
            }
        }
        response.credit_bytes = std::mem::take(&mut self.account().grant);
        out.put(frame::encode(&response, 0));
    }

    /// The outcome of the first request that has none yet; `None` once the reader ended and everything is answered.
    async fn first_outcome(
        &self,
        next: &mut Option<Pending>,
        pending: &mut mpsc::Receiver<Pending>,
    ) -> Option<(Pending, Result<AppendDone, wire::Error>)> {
        if next.is_none() {
            *next = Some(pending.recv().await?);
        }
        let request = next.as_mut()?;
        let result = match &mut request.outcome {
            Outcome::Waiting(waiting) => match waiting.await {
                Ok(result) => self.told(result),
                Err(_) => self.told(Err(self.partition.ended().unwrap_or(PartitionError::ShuttingDown))),
            },
            Outcome::Refused(error) => Err(error.clone()),
        };
        Some((next.take()?, result))
    }

    /// As [`first_outcome`](Self::first_outcome), if it is there already.
    fn ready_outcome(
        &self,
        next: &mut Option<Pending>,
        pending: &mut mpsc::Receiver<Pending>,
    ) -> Option<(Pending, Result<AppendDone, wire::Error>)> {
        if next.is_none() {
            *next = pending.try_recv().ok();
        }
        let result = match &mut next.as_mut()?.outcome {
            Outcome::Waiting(waiting) => self.told(waiting.try_recv().ok()?),
            Outcome::Refused(error) => Err(error.clone()),
        };
        Some((next.take()?, result))
    }

    fn told(&self, result: AppendResult) -> Result<AppendDone, wire::Error> {
        result.map_err(|error| self.session.shared.refusal(&self.partition, &error))
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        let account = self.account.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.session.credit().close(&account.credit);
    }
}

fn earlier_failed() -> wire::Error {
    PartitionError::EarlierFailed.to_wire()
}

/// Takes a payload apart into batches of this producer, by their headers.
fn take_apart(payload: &Bytes, producer: ProducerIdentity, limit: usize) -> Result<Vec<NewBatch>, PartitionError> {
    let mut batches = Vec::new();
    for batch in Batches::new(payload) {
        let (position, header, bytes) = batch.map_err(|(_, error)| PartitionError::Batch(error))?;
        if batches.len() == MAX_BATCHES {
            return Err(PartitionError::TooManyBatches { limit: MAX_BATCHES });
        }
        if bytes.len() > limit {
            return Err(PartitionError::TooLarge { bytes: bytes.len(), limit });
        }
        let batch = ProducerIdentity { id: header.producer_id, epoch: header.producer_epoch };
        if batch.id != NO_PRODUCER_ID && batch != producer {
            return Err(PartitionError::ForeignProducer { batch, stream: producer });
        }
        batches.push(NewBatch { header, bytes: payload.slice(position..position + bytes.len()) });
    }
    Ok(batches)
}

/// Whether checking them takes microseconds.
fn is_quick(batches: &[NewBatch]) -> bool {
    let bytes: usize = batches.iter().map(|batch| batch.bytes.len()).sum();
    let records: i64 = batches.iter().map(|batch| i64::from(batch.header.record_count)).sum();
    bytes <= QUICK_BYTES
        && records <= QUICK_RECORDS
        && batches.iter().all(|batch| batch.header.codec() == Ok(Codec::None))
}

/// Checks each to the last byte.
fn check(batches: &[NewBatch], config: &TopicConfig, now_ms: i64) -> Result<(), PartitionError> {
    let rules = WalkRules { require_keys: config.cleanup_compact, ..WalkRules::default() };
    for batch in batches {
        let walked = walk(&batch.bytes, rules)?;
        if config.message_timestamp_type == TimestampSource::Create {
            check_timestamps(&walked, config, now_ms)?;
        }
    }
    Ok(())
}

/// A record without a timestamp is neither too old nor too new.
fn check_timestamps(walked: &Walk, config: &TopicConfig, now_ms: i64) -> Result<(), PartitionError> {
    let after = config.message_timestamp_after_max_ms;
    if i128::from(walked.max_timestamp) - i128::from(now_ms) > i128::from(after) {
        return Err(PartitionError::Timestamp {
            timestamp_ms: walked.max_timestamp,
            now_ms,
            key: "message.timestamp.after.max.ms",
            limit_ms: after,
        });
    }
    let before = config.message_timestamp_before_max_ms;
    match walked.min_timestamp {
        Some(timestamp_ms) if i128::from(now_ms) - i128::from(timestamp_ms) > i128::from(before) => {
            Err(PartitionError::Timestamp {
                timestamp_ms,
                now_ms,
                key: "message.timestamp.before.max.ms",
                limit_ms: before,
            })
        }
        _ => Ok(()),
    }
}
