//! How replicas reach other brokers, and the metadata.
//!
//! All partitions that follow the same broker share its connections: one, and another for each so many streams as that broker takes on one. Their credits sum to less
//! than QUIC's windows, as on a client's connection ([`crate::credit`]): a partition that is idle holds [`REPLICA_CREDIT`]'s least, and a busy one
//! what the idle ones leave. Whoever dials dials for all; while a broker does not answer, nobody dials it more often than the pause
//! between two attempts.
//!
//! Owns: [`Replication`], the connections. Refuses: what goes over the streams. Read next: [`super::follow`].

use super::alters::{self, Wanted};
use super::leader::{AlterPartition, Altered};
use crate::config::BrokerConfig;
use crate::credit::{ConnectionCredit, CreditLimits, StreamCredit};
use crate::metadata::{MetadataHandle, Partition};
use crate::metrics::Metrics;
use crate::peer::{PeerConnection, PeerError, Peers};
use crate::quic::FETCH_CREDIT_BYTES;
use headwater_proto::TopicId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;

/// Credit on one connection between brokers.
pub(crate) const REPLICA_CREDIT: CreditLimits = CreditLimits {
    connection_bytes: 40 << 20,
    stream_max_bytes: 4 << 20,
    stream_min_bytes: 2 << 10,
    stream_initial_bytes: 8 << 10,
};

/// Most replica streams of one connection.
const STREAMS_PER_CONNECTION: usize = 8 << 10;

// The leader may send all of it, and its window takes more. A loan is at most what one stream may hold.
const _: () = assert!(
    REPLICA_CREDIT.connection_bytes
        + STREAMS_PER_CONNECTION as u64 * REPLICA_CREDIT.stream_min_bytes
        + REPLICA_CREDIT.stream_max_bytes
        < FETCH_CREDIT_BYTES
);

/// Streams of a connection that are not for replicas: its hello, and calls.
const RESERVED_STREAMS: usize = 8;

/// Most streams to one broker that are being opened: behind thousands, nothing else that its thread has to do would come in time.
const OPENING: usize = 64;

/// How long a connection may take to be made.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between two attempts to reach a broker.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a broker is not reached.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum LinkError {
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("the metadata know no address of broker {0}")]
    Unknown(i32),
}

/// What replication goes through. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Replication {
    shared: Arc<Shared>,
}

struct Shared {
    peers: Peers,
    metadata: watch::Sender<Option<MetadataHandle>>,
    /// What leaders propose; and the other end, until the metadata are there.
    alters: mpsc::UnboundedSender<Wanted>,
    altering: Mutex<Option<mpsc::UnboundedReceiver<Wanted>>>,
    links: Mutex<HashMap<i32, Arc<tokio::sync::Mutex<Link>>>>,
    opening: Turns,
    /// Memory for batches that are larger than their stream's share of the credit.
    loans: Arc<Semaphore>,
    loan_bytes: u32,
    patience: Duration,
    metrics: Arc<Metrics>,
}

/// The connections to one broker.
#[derive(Default)]
struct Link {
    channels: Vec<Arc<Channel>>,
    failed: Option<Failed>,
}

struct Failed {
    address: String,
    at: Instant,
    pause: Duration,
    why: PeerError,
}

struct Channel {
    connection: quinn::Connection,
    address: String,
    /// Most replica streams: beyond that, there is another connection.
    max_streams: usize,
    credit: Mutex<Credit>,
    loan_turn: Arc<Semaphore>,
}

struct Credit {
    connection: ConnectionCredit,
    streams: usize,
}

/// A stream's place on a connection; given back when this is dropped.
pub(crate) struct Place {
    channel: Arc<Channel>,
    credit: StreamCredit,
}

impl Replication {
    pub(crate) fn new(peers: Peers, config: &BrokerConfig, metrics: Arc<Metrics>) -> Replication {
        let (alters, altering) = mpsc::unbounded_channel();
        let shared = Shared {
            peers,
            metadata: watch::Sender::new(None),
            alters,
            altering: Mutex::new(Some(altering)),
            links: Mutex::default(),
            opening: Turns::default(),
            loans: Arc::new(Semaphore::new(config.loan_bytes as usize)),
            loan_bytes: config.loan_bytes,
            patience: Duration::from_millis(config.frame_timeout_ms),
            metrics,
        };
        Replication { shared: Arc::new(shared) }
    }

    /// Takes the metadata, which whoever needs them waits for.
    pub(crate) fn learn_from(&self, metadata: MetadataHandle) {
        if let Some(altering) = lock(&self.shared.altering).take() {
            tokio::spawn(alters::run(metadata.clone(), altering));
        }
        self.shared.metadata.send_replace(Some(metadata));
    }

    /// How long the other side may leave unread what is written to it, and a large batch waits for memory.
    pub(crate) fn patience(&self) -> Duration {
        self.shared.patience
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// Memory for batches that are larger than their share, and how much of it one may have.
    pub(crate) fn loans(&self) -> (&Arc<Semaphore>, u32) {
        (&self.shared.loans, self.shared.loan_bytes)
    }

    /// Proposes another ISR; `tell` hears of it where it is not committed. Where it is, this broker's metadata say so.
    pub(crate) fn propose(
        &self,
        topic_id: TopicId,
        partition: u32,
        alter: AlterPartition,
        tell: impl FnOnce(Altered) + Send + 'static,
    ) {
        // An error means that the broker ends.
        drop(self.shared.alters.send(Wanted { topic_id, partition, alter, tell: Box::new(tell) }));
    }

    /// The turn to open a stream to a broker, of which many are opened at once after an election; given back when it is dropped.
    pub(crate) async fn turn(&self, broker_id: i32) -> Option<OwnedSemaphorePermit> {
        self.shared.opening.take(broker_id).await
    }

    /// What the metadata say of a partition, if they are there and know it.
    pub(crate) fn partition(&self, topic_id: &TopicId, partition: u32) -> Option<Partition> {
        let metadata = self.shared.metadata.borrow().clone()?;
        metadata.state().topic_by_id(topic_id)?.partitions.get(partition as usize).cloned()
    }

    /// Waits until everything that was decided before the call is known here. False: not in time.
    pub(crate) async fn catch_up(&self, within: Duration) -> bool {
        let metadata = self.shared.metadata.borrow().clone();
        let Some(metadata) = metadata else { return false };
        metadata.catch_up(Instant::now() + within).await.is_ok()
    }

    /// A place on a connection to a broker.
    ///
    /// # Errors
    /// [`LinkError`]; whoever tries again soon is told the same without an attempt.
    pub(crate) async fn place(&self, broker_id: i32) -> Result<Place, LinkError> {
        let metadata = self.metadata().await.ok_or(LinkError::Unknown(broker_id))?;
        let address = metadata.state().broker(broker_id).map(|broker| broker.address.clone());
        let address = address.filter(|address| !address.is_empty()).ok_or(LinkError::Unknown(broker_id))?;
        let link = Arc::clone(lock(&self.shared.links).entry(broker_id).or_default());
        let mut link = link.lock().await;
        link.channels.retain(|channel| channel.connection.close_reason().is_none());
        let has_room =
            |channel: &&Arc<Channel>| channel.address == address && lock(&channel.credit).streams < channel.max_streams;
        if let Some(channel) = link.channels.iter().find(has_room) {
            return Ok(Place::take(channel));
        }
        let before = link.failed.take().filter(|failed| failed.address == address);
        if let Some(failed) = before.as_ref().filter(|failed| failed.at.elapsed() < failed.pause) {
            let why = failed.why.clone();
            link.failed = before;
            return Err(why.into());
        }
        match self.shared.peers.connect(broker_id, &address, Instant::now() + DIAL_TIMEOUT).await {
            Ok(PeerConnection { connection, max_streams }) => {
                let allowed = (max_streams as usize).saturating_sub(RESERVED_STREAMS);
                let max_streams = STREAMS_PER_CONNECTION.min(allowed).max(1);
                tracing::debug!(broker_id, address, max_streams, "connected to follow its partitions");
                let credit = Credit { connection: ConnectionCredit::new(REPLICA_CREDIT), streams: 0 };
                let channel = Arc::new(Channel {
                    connection,
                    address,
                    max_streams,
                    credit: Mutex::new(credit),
                    loan_turn: Arc::new(Semaphore::new(1)),
                });
                link.channels.push(Arc::clone(&channel));
                Ok(Place::take(&channel))
            }
            Err(why) => {
                match &before {
                    None => tracing::warn!(%why, "a broker whose partitions are followed is not reached"),
                    Some(_) => tracing::debug!(%why, "a broker is not reached yet"),
                }
                let pause = before.map_or(FIRST_PAUSE, |failed| (failed.pause * 2).min(LONGEST_PAUSE));
                link.failed = Some(Failed { address, at: Instant::now(), pause, why: why.clone() });
                Err(why.into())
            }
        }
    }

    /// The metadata, once they are there.
    async fn metadata(&self) -> Option<MetadataHandle> {
        let mut known = self.shared.metadata.subscribe();
        let known = known.wait_for(Option::is_some).await.ok()?;
        known.clone()
    }
}

/// Whose turn it is to open a stream to a broker.
#[derive(Default)]
struct Turns(Mutex<HashMap<i32, Arc<Semaphore>>>);

impl Turns {
    async fn take(&self, broker_id: i32) -> Option<OwnedSemaphorePermit> {
        let fresh = || Arc::new(Semaphore::new(OPENING));
        let turns = Arc::clone(lock(&self.0).entry(broker_id).or_insert_with(fresh));
        turns.acquire_owned().await.ok()
    }
}

impl Place {
    fn take(channel: &Arc<Channel>) -> Place {
        let mut all = lock(&channel.credit);
        all.streams += 1;
        let credit = all.connection.open();
        Place { channel: Arc::clone(channel), credit }
    }

    pub(crate) fn connection(&self) -> &quinn::Connection {
        &self.channel.connection
    }

    /// The turn of the connection's streams to be lent something.
    pub(crate) fn loan_turn(&self) -> &Arc<Semaphore> {
        &self.channel.loan_turn
    }

    /// The stream's account.
    pub(crate) fn credit(&mut self) -> &mut StreamCredit {
        &mut self.credit
    }

    /// Bytes that the stream brought are not in memory any more. Returns how many more it may bring.
    pub(crate) fn release(&mut self, bytes: u64) -> u64 {
        lock(&self.channel.credit).connection.release(&mut self.credit, bytes)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.channel.credit);
        all.streams -= 1;
        all.connection.close(&self.credit);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn some_streams_to_a_broker_are_opened_at_a_time_and_those_to_another_one_beside() {
        let turns = Turns::default();
        let mut taken: Vec<_> = (0..OPENING).map(|_| turns.take(1).now_or_never().flatten().unwrap()).collect();
        assert!(turns.take(1).now_or_never().is_none());
        assert!(turns.take(2).now_or_never().is_some());
        taken.pop();
        assert!(turns.take(1).now_or_never().flatten().is_some());
    }
}
