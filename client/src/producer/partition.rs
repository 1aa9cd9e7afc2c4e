//! The task that sends one partition's batches and takes their acknowledgements.
//!
//! Owns: when a produce stream is opened again, its credit, timers. Refuses: opening it ([`super::stream`]), deciding which
//! batch is due ([`super::batcher`]) and what an answer means ([`super::exchange`]). Read next: [`super::exchange`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesOrdered, StreamExt};
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchError, Codec};
use headwater_proto::frame::{self, FrameEvent};
use headwater_proto::wire;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::batcher::{Batcher, Filling};
use super::exchange::{Exchange, Pending};
use super::stream::{NoStream, Outgoing, Stream, allocate_identity, open_stream};
use super::window::{Identity, Window};
use crate::connection::{Connections, lock};
use crate::error::{Error, ProduceError, Refusal};
use crate::metadata::{Metadata, TopicInfo, is_stale};
use crate::retry::{Backoff, after, reached};
use crate::watch::{LeaderWatch, WORTH_ASKING};

/// Batches at least this large are compressed on the blocking pool, so that they hold up nobody.
const COMPRESS_ELSEWHERE_BYTES: usize = 16 << 10;
/// What the partitions of a producer share.
pub(crate) struct Shared {
    pub(crate) connections: Arc<Connections>,
    pub(crate) metadata: Arc<Metadata>,
    pub(crate) acks: wire::Acks,
    pub(crate) codec: Codec,
    pub(crate) compression_level: Option<i32>,
    pub(crate) delivery_timeout: Duration,
    pub(crate) max_in_flight: usize,
    /// The buffer's free bytes.
    pub(crate) budget: Arc<Semaphore>,
    /// Senders that wait for room: while there are any, no batch lingers.
    pub(crate) starving: AtomicUsize,
    pub(crate) closed: CancellationToken,
}

/// A partition as its senders see it.
pub(crate) struct Partition {
    pub(crate) topic: Arc<TopicInfo>,
    pub(crate) partition: u32,
    pub(crate) batcher: Mutex<Batcher>,
    /// Something may be due, or somebody waits until everything has arrived.
    pub(crate) wake: Notify,
    /// They wait until the broker has what was written without an answer to come.
    arrivals: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Partition {
    pub(crate) fn new(topic: Arc<TopicInfo>, partition: u32, batcher: Batcher) -> Arc<Partition> {
        let (batcher, wake, arrivals) = (Mutex::new(batcher), Notify::new(), Mutex::default());
        Arc::new(Partition { topic, partition, batcher, wake, arrivals })
    }

    /// Waits until the broker has what was written so far, or the stream on which it was written was lost.
    pub(crate) fn arrival(&self) -> impl Future<Output = ()> + use<> {
        let (tell, told) = oneshot::channel();
        lock(&self.arrivals).push(tell);
        self.wake.notify_one();
        if lock(&self.batcher).is_closed() {
            // Nobody may be left to tell.
            self.arrived();
        }
        async move { drop(told.await) }
    }

    fn is_awaited(&self) -> bool {
        !lock(&self.arrivals).is_empty()
    }

    fn arrived(&self) {
        let told = std::mem::take(&mut *lock(&self.arrivals));
        for tell in told {
            let _ = tell.send(());
        }
    }
}

type Built = (Pending, Result<Bytes, BatchError>);

/// The task's own state.
pub(crate) struct Sender {
    shared: Arc<Shared>,
    partition: Arc<Partition>,
    exchange: Exchange,
    /// Batches being compressed, oldest first.
    building: FuturesOrdered<JoinHandle<Built>>,
    backoff: Backoff,
    /// When it turned out that whoever was thought to lead does not, or cannot be reached: another may lead by now.
    doubted: Option<Instant>,
    /// Who leads, as a broker tells unasked.
    leader: LeaderWatch,
    /// The epoch of the leader to whom a stream was opened last, or was to be.
    leader_epoch: i32,
    /// There is a stream on which something may be on its way.
    streaming: bool,
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Where a defect ended the task, nobody else is left to take the records, or to tell those that came.
        let Partition { topic, partition, .. } = &*self.partition;
        let reason = ProduceError::Defect { topic: topic.name.clone(), partition: *partition };
        lock(&self.partition.batcher).close(reason);
        self.partition.arrived();
    }
}

impl Sender {
    pub(crate) fn new(shared: Arc<Shared>, partition: Arc<Partition>, identity: Option<Identity>) -> Sender {
        let window = Window::new(identity, shared.max_in_flight);
        let place = (partition.topic.name.clone(), partition.partition);
        let exchange = Exchange::new(place, window, shared.delivery_timeout, shared.compression_level);
        let backoff = Backoff::new(&shared.connections.config);
        let leader = shared.metadata.watch_leader(partition.topic.id, partition.partition);
        Sender {
            shared,
            partition,
            exchange,
            building: FuturesOrdered::new(),
            backoff,
            doubted: None,
            leader,
            leader_epoch: -1,
            streaming: false,
        }
    }

    /// Runs until the producer is closed or the topic is gone; then everything left fails.
    pub(crate) async fn run(mut self) {
        let closed = self.shared.closed.clone();
        let end = tokio::select! {
            biased;
            () = closed.cancelled() => ProduceError::Closed,
            error = self.serve() => error,
        };
        let left = lock(&self.partition.batcher).close(end.clone());
        self.fail_all(&end, left).await;
    }

    /// One stream after another. Returns why there will be no further one.
    async fn serve(&mut self) -> ProduceError {
        loop {
            self.wait_for_work().await;
            let opened = match self.another_identity().await {
                Ok(()) => self.open().await,
                Err(error) => Err(NoStream::Later(error)),
            };
            let left = match opened {
                Ok(stream) if self.exchange.is_ready() => {
                    self.streaming = true;
                    let ended = self.drive(stream).await;
                    self.streaming = false;
                    self.partition.arrived();
                    if ended.is_ok() {
                        self.backoff.reset();
                        continue;
                    }
                    ended
                }
                // Records failed as it was opened, and what is left takes another epoch.
                Ok(_) => Ok(()),
                Err(NoStream::Later(error)) => Err(error),
                Err(NoStream::Gone(error)) => return error,
                Err(NoStream::Refused(error)) => {
                    let queued = lock(&self.partition.batcher).drain();
                    self.fail_all(&error, queued).await;
                    Ok(())
                }
            };
            if let Err(error) = left {
                let Partition { topic, partition, .. } = &*self.partition;
                tracing::debug!(topic = &*topic.name, partition, %error, "no produce stream");
            }
            self.pause().await;
        }
    }

    /// The next epoch of the producer id, or an id of its own for this partition, where that is needed.
    async fn another_identity(&mut self) -> Result<(), Error> {
        let Some(present) = self.exchange.wants_identity() else { return Ok(()) };
        let shared = self.shared.clone();
        let identity = self.expiring(allocate_identity(&shared.connections, present)).await;
        let identity = identity.inspect_err(|error| self.exchange.mind_epoch(error))?;
        self.exchange.become_producer(identity);
        Ok(())
    }

    /// Before the next attempt it is asked who leads, unless the broker that leads said why it does not serve.
    fn mind_leader(&mut self, error: &Error) {
        if let Error::Refused(Refusal { leader: Some(hint), .. }) = error
            && hint.leader_epoch > self.leader_epoch
            && self.shared.metadata.hinted(&self.partition.topic, self.partition.partition, hint)
        {
            return;
        }
        if error.code().is_none_or(is_stale) {
            self.doubted = Some(Instant::now());
        }
    }

    /// Fails what was sent, which a broker may have, what is being built and what was `queued`.
    async fn fail_all(&mut self, error: &ProduceError, queued: Vec<Filling>) {
        self.exchange.abandon(error);
        while let Some(built) = self.building.next().await {
            if let Ok((pending, _)) = built {
                pending.fail(error.clone());
            }
        }
        for filling in queued {
            filling.promise.keep(Err(error.clone()));
        }
    }

    /// Until there is something to send.
    async fn wait_for_work(&mut self) {
        while self.is_idle() {
            self.partition.arrived();
            self.partition.wake.notified().await;
        }
    }

    fn is_idle(&self) -> bool {
        self.exchange.window.is_empty() && self.building.is_empty() && lock(&self.partition.batcher).is_empty()
    }

    /// The pause between two attempts, in which records still expire. Where another broker has come to lead it is over.
    async fn pause(&mut self) {
        let end = Instant::now() + self.backoff.next(rand::random());
        let (mut leader, leader_epoch) = (self.leader.clone(), self.leader_epoch);
        let another = async {
            tokio::select! {
                () = sleep_until(end) => None,
                newest = leader.replaced(leader_epoch) => Some(newest),
            }
        };
        if let Some(newest) = self.expiring(another).await {
            // Which ends one pause only.
            self.leader_epoch = newest;
            self.backoff.reset();
            self.doubted = None;
        }
    }

    /// Waits for `work`, while records whose time is up are failed.
    async fn expiring<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut ask_at = Instant::now() + WORTH_ASKING;
        loop {
            let timer = self.expires_at();
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = sleep_until(ask_at) => {
                    self.shared.metadata.nudge();
                    ask_at = Instant::now() + WORTH_ASKING;
                }
                Some(built) = self.building.next(), if !self.building.is_empty() => self.built(built),
                () = sleep_until(timer) => self.expire(),
                // A new record may be the first to expire; and what is not on its way never arrives.
                () = self.partition.wake.notified() => if !self.streaming { self.partition.arrived() },
            }
        }
    }

    /// When the oldest record without an outcome fails.
    fn expires_at(&self) -> Instant {
        // What is being built stands before what is queued, and is soon in the window.
        let queued = if self.building.is_empty() { lock(&self.partition.batcher).expires_at() } else { None };
        [self.exchange.window.expires_at(), queued]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| after(Instant::now(), Duration::MAX))
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.exchange.expire(now, || match self.building.is_empty() {
            true => lock(&self.partition.batcher).expire(now),
            false => Vec::new(),
        });
    }

    /// Opens a produce stream to the leader, as it is known or asked anew.
    async fn open(&mut self) -> Result<Stream, NoStream> {
        let (shared, partition) = (self.shared.clone(), self.partition.clone());
        let identity = self.exchange.window.identity();
        let timeout = shared.connections.config.request_timeout;
        let (mut leader, doubted) = (self.leader.clone(), self.doubted);
        let mut leader_epoch = self.leader_epoch;
        let opening = async {
            let opening = open_stream(&shared, &partition, identity, doubted, (&mut leader, &mut leader_epoch));
            match tokio::time::timeout(timeout, opening).await {
                Ok(result) => result,
                Err(_) => Err(NoStream::Later(Error::TimedOut { what: "opening a produce stream", after: timeout })),
            }
        };
        let opened = self.expiring(opening).await;
        (self.doubted, self.leader_epoch) = (None, leader_epoch);
        if let Err(NoStream::Later(error)) = &opened {
            self.exchange.mind_epoch(error);
            self.mind_leader(error);
        }
        let (stream, opened) = opened?;
        let limit = {
            let mut batcher = lock(&self.partition.batcher);
            if opened.max_message_bytes > 0 {
                batcher.set_max_message_bytes(opened.max_message_bytes as usize);
            }
            batcher.max_message_bytes()
        };
        self.exchange.opened(&opened, limit);
        Ok(stream)
    }

    /// Sends and takes answers until the stream ends.
    async fn drive(&mut self, mut stream: Stream) -> Result<(), Error> {
        let unanswered = self.shared.acks == wire::Acks::None;
        // When it is long that nothing was acknowledged: whoever leads may be gone.
        let mut ask_at = None;
        loop {
            if unanswered && stream.outgoing.is_done() && self.partition.is_awaited() {
                return self.finish(stream).await;
            }
            let due_at = self.fill(&mut stream)?;
            let expires_at = self.expires_at();
            let timer = due_at.map_or(expires_at, |due| due.min(expires_at));
            let waits = stream.sent > 0 && !unanswered || !stream.outgoing.is_done();
            ask_at = waits.then(|| ask_at.unwrap_or_else(|| Instant::now() + WORTH_ASKING));
            let mut chunks = stream.outgoing.chunks(stream.credit);
            let writable = chunks.iter().any(|chunk| !chunk.is_empty());
            tokio::select! {
                biased;
                answer = stream.answers.next() => {
                    let message = match answer? {
                        Some(FrameEvent::Header { message, payload_bytes: 0 }) => message,
                        Some(_) => return Err(Error::Protocol("a payload on an answer to an append".into())),
                        None => return Err(lost(&stream, &"the broker ended the stream")),
                    };
                    stream.credit = stream.credit.saturating_add(message.credit_bytes);
                    if message.request_id != 0 {
                        stream.sent = stream.sent.saturating_sub(1);
                        ask_at = None;
                    }
                    self.answered(message)?;
                }
                _ = self.leader.replaced(self.leader_epoch) => {
                    return Err(Error::refused(ErrorCode::NotLeader, "another broker leads the partition by now"));
                }
                written = stream.send.write_chunks(&mut chunks), if writable => {
                    let written = written.map_err(|e| lost(&stream, &e))?;
                    stream.credit -= stream.outgoing.advance(written.bytes);
                    if stream.outgoing.is_done() {
                        stream.sent += 1;
                    }
                    if stream.outgoing.is_done() && unanswered {
                        self.exchange.unanswered(stream.outgoing.request_id)?;
                    }
                }
                Some(built) = self.building.next(), if !self.building.is_empty() => self.built(built),
                () = sleep_until(timer) => self.expire(),
                () = reached(ask_at) => {
                    self.shared.metadata.nudge();
                    ask_at = None;
                }
                () = self.partition.wake.notified() => {}
            }
        }
    }

    /// Ends the stream once the broker has everything that was written on it.
    async fn finish(&mut self, mut stream: Stream) -> Result<(), Error> {
        let after = self.shared.delivery_timeout;
        let finished = tokio::time::timeout(after, stream.finish());
        match self.expiring(finished).await {
            Ok(finished) => finished,
            Err(_) => Err(Error::TimedOut { what: "the end of a produce stream", after }),
        }
    }

    /// Moves due batches into the window and the next one of the window onto the stream. Returns when the next becomes due.
    fn fill(&mut self, stream: &mut Stream) -> Result<Option<Instant>, Error> {
        let now = Instant::now();
        let mut due_at = None;
        while self.exchange.window.room() > self.building.len() {
            let hurry = self.shared.starving.load(Ordering::Relaxed) > 0;
            let filling = {
                let mut batcher = lock(&self.partition.batcher);
                let filling = batcher.take(now, hurry);
                due_at = batcher.due_at();
                filling
            };
            let Some(filling) = filling else { break };
            self.build(filling);
        }
        if stream.outgoing.is_done()
            && let Some((request_id, payload)) = self.exchange.window.next_to_send()
        {
            let request = wire::ProduceRequest { request_id, partition: self.partition.partition };
            stream.outgoing = Outgoing { request_id, front: frame::encode(&request, payload.len()), payload };
        }
        Ok(due_at)
    }

    /// Makes a batch of what was collected: here, or where it is large and must be compressed, on the blocking pool.
    fn build(&mut self, filling: Filling) {
        let (pending, builder) = self.exchange.begin(filling);
        let small = builder.size_estimate() < COMPRESS_ELSEWHERE_BYTES || self.shared.codec == Codec::None;
        if small && self.building.is_empty() {
            let limit = lock(&self.partition.batcher).max_message_bytes();
            self.exchange.build(pending, builder, limit);
        } else {
            self.building.push_back(tokio::task::spawn_blocking(move || (pending, builder.build())));
        }
    }

    /// Takes in a batch that was built before its sequence was known.
    fn built(&mut self, built: Result<Built, tokio::task::JoinError>) {
        // A builder that panicked broke its promise, which told its records; nothing else can end the job.
        let Ok((pending, batch)) = built else { return };
        let limit = lock(&self.partition.batcher).max_message_bytes();
        self.exchange.built(pending, batch, limit);
    }

    /// An answer.
    ///
    /// # Errors
    /// When the stream is of no more use: after a refusal everything behind it is refused too.
    fn answered(&mut self, answer: wire::ProduceResponse) -> Result<(), Error> {
        match self.exchange.answered(answer) {
            Ok(true) => self.backoff.reset(),
            Ok(false) => {}
            Err(error) => {
                if matches!(error, Error::Refused(_)) {
                    self.mind_leader(&error);
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

fn lost(stream: &Stream, reason: &dyn std::fmt::Display) -> Error {
    Error::ConnectionLost { address: stream.lease.link.address().to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ClientConfig;
    use crate::producer::batcher::{BatcherConfig, Parts};

    #[tokio::test]
    async fn records_whose_sender_ends_by_a_defect_are_told_and_no_more_are_taken() {
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let ca_pem = certified.cert.pem().into_bytes();
        let config = ClientConfig { bootstrap: vec!["localhost:1".into()], ca_pem, ..ClientConfig::default() };
        let connections = Connections::new(config).unwrap();
        let shared = Arc::new(Shared {
            metadata: Arc::new(Metadata::new(connections.clone())),
            connections,
            acks: wire::Acks::All,
            codec: Codec::None,
            compression_level: None,
            delivery_timeout: Duration::MAX,
            max_in_flight: 5,
            budget: Arc::new(Semaphore::new(0)),
            starving: AtomicUsize::new(0),
            closed: CancellationToken::new(),
        });
        let batches = BatcherConfig {
            batch_bytes: 1000,
            linger: Duration::MAX,
            delivery_timeout: Duration::MAX,
            codec: Codec::None,
            compression_level: None,
        };
        let topic = TopicInfo {
            name: "t".into(),
            id: headwater_proto::TopicId::ZERO,
            partitions: Vec::new(),
            max_message_bytes: 0,
            at: Instant::now(),
        };
        let batcher = Batcher::new("t".into(), 0, batches, shared.budget.clone(), 0);
        let partition = Partition::new(Arc::new(topic), 0, batcher);
        let value = Bytes::from_static(b"value");
        let send = || {
            let parts = Parts { timestamp_ms: 1, key: None, value: Some(&value), headers: &[] };
            lock(&partition.batcher).append(parts, 100, Instant::now)
        };
        let (delivery, _) = send().unwrap();
        let sender = Sender::new(shared.clone(), partition.clone(), None);
        let ended = std::thread::spawn(move || {
            let _in_hand = sender;
            panic!("a defect");
        });
        assert!(ended.join().is_err());
        let outcome = delivery.try_result().unwrap();
        assert!(matches!(outcome, Err(ProduceError::Defect { .. })), "{outcome:?}");
        assert_eq!(shared.budget.available_permits(), 100);
        assert!(send().is_err());
        partition.arrival().await;
    }
}
