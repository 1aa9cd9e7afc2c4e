//! Connections to the other members: one to each address, for the quorum's own streams and nothing else.
//!
//! A connection is made when somebody needs it, once for all who do, and goes on being made if they stop waiting: openraft's
//! patience is a heartbeat, a handshake may take longer. After a failure nobody tries again before a pause. A connection on
//! which no packet comes while answers are waited for is given up for a new one: after a cut, QUIC would wait longer before
//! its next packet than a new handshake takes.
//!
//! Every stream says which cluster and which member it is for, and is refused by whoever is another one; so an emptied disk
//! never answers for the member it was. And whoever answers has to show the certificate of the broker that registered as that
//! member.
//!
//! Owns: connections and the beginning of streams. Refuses: what is said on them ([`super::network`], [`super::forward`]).
//! Read next: [`super::book`].

use super::super::command::{RaftRequest, RaftResponse};
use super::Applied;
use super::book::AddressBook;
use super::thread::RaftThread;
use crate::peer::{Peers, dial};
use crate::stream::{Frames, StreamError, send_within};
use crate::tls::principal::Principal;
use futures::future::{BoxFuture, FutureExt, Shared, select_ok};
use headwater_proto::limits::{MAX_OPEN_FRAME_BYTES, MAX_RAFT_FRAME_BYTES};
use headwater_proto::wire::{self, Open, OpenRaft, RaftOpened, RaftStart, open};
use headwater_proto::{ErrorCode, ResetCode};
use quinn::{IdleTimeout, TransportConfig, VarInt};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// Time to look an address up and shake hands.
const CONNECT: Duration = Duration::from_secs(1);
/// Time for another member to say who it is.
const OPEN: Duration = Duration::from_millis(500);
/// Time for a frame that has begun.
const FRAME: Duration = Duration::from_secs(10);
/// The pauses after failures to connect, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// How long nothing is heard on a connection before it is given up.
const IDLE: Duration = Duration::from_millis(1500);
/// How long no packet comes on a connection on which answers are waited for before it is given up.
const SILENCE: Duration = Duration::from_millis(400);
/// How often a connection says that it is there.
const KEEP_ALIVE: Duration = Duration::from_millis(300);
/// The round trip that a new connection reckons with: a first packet that is lost is sent again after three of them.
const FIRST_ROUND_TRIP: Duration = Duration::from_millis(30);
/// Bytes on the way on one connection and on one stream of it.
const WINDOW_BYTES: u32 = 16 << 20;

/// The transport settings of the connections between members.
pub fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(u64::from(WINDOW_BYTES))
        .initial_rtt(FIRST_ROUND_TRIP)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok());
    transport
}

/// Why another member did not answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum LinkError {
    /// Nobody knows where it is.
    #[error("nobody knows where member {0:x} is reached")]
    NoAddress(u64),
    /// It is not tried again yet.
    #[error("{address}: {why}")]
    Unreachable { address: String, why: String },
    /// It answered that it does not serve this.
    #[error("{address}: {} ({})", .error.message, ErrorCode::from_number(.error.code))]
    Refused { address: String, error: wire::Error },
    /// It has not answered yet.
    #[error("{address}: no answer in time")]
    Late { address: String },
    /// The stream or the connection ended.
    #[error("{address}: the answer did not come: {why}")]
    Lost { address: String, why: String },
}

impl LinkError {
    pub(super) fn is_of_another_cluster(&self) -> bool {
        matches!(self, LinkError::Refused { error, .. } if error.code == ErrorCode::WrongCluster.number())
    }

    /// Whether there is no use in asking anybody again.
    pub(super) fn is_final(&self) -> bool {
        let is_older = |error: &wire::Error| error.code == ErrorCode::OlderDisk.number();
        self.is_of_another_cluster() || matches!(self, LinkError::Refused { error, .. } if is_older(error))
    }
}

/// Who connects, and to whom.
#[derive(Debug, Clone)]
pub struct LinksConfig {
    /// The cluster.
    pub cluster_id: String,
    /// This member.
    pub node_id: u64,
    /// Where it is reached, for those who do not know its registration yet.
    pub address: String,
    /// Which start of its disk it is; `None`: nobody counts them.
    pub start: Option<RaftStart>,
    /// Addresses to try for members that nobody has heard of.
    pub configured: Vec<String>,
    /// Whose certificates are trusted, and [`transport`].
    pub client: quinn::ClientConfig,
    /// The name that certificates of brokers carry.
    pub server_name: String,
    /// Who tells by certificates which broker is at the other end. `None`: a certificate says nothing of that.
    pub peers: Option<Peers>,
}

/// The connections of this member.
#[derive(Clone)]
pub struct Links {
    shared: Arc<SharedLinks>,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Links").field("node_id", &self.shared.config.node_id).finish_non_exhaustive()
    }
}

struct SharedLinks {
    endpoint: quinn::Endpoint,
    /// Where connections are driven, whoever asks for them.
    runtime: Handle,
    /// Nobody drives them any more.
    ended: CancellationToken,
    config: LinksConfig,
    book: Mutex<AddressBook>,
    applied: OnceLock<watch::Receiver<Arc<Applied>>>,
    links: Mutex<HashMap<String, Arc<Link>>>,
    /// When a member answered last.
    heard: Mutex<HashMap<u64, Instant>>,
}

impl Links {
    /// Connections from this endpoint, which the quorum's thread drives, whoever asks for them.
    pub fn new(thread: &RaftThread, endpoint: quinn::Endpoint, config: LinksConfig) -> Links {
        let (runtime, ended) = (thread.runtime().clone(), thread.ended());
        let book = Mutex::new(AddressBook::new(config.configured.clone()));
        let (applied, links, heard) = (OnceLock::new(), Mutex::default(), Mutex::default());
        Links { shared: Arc::new(SharedLinks { endpoint, runtime, ended, config, book, applied, links, heard }) }
    }

    /// Goes by the registrations in this state from now on.
    pub(super) fn follow(&self, applied: watch::Receiver<Arc<Applied>>) {
        // A member has one state.
        drop(self.shared.applied.set(applied));
    }

    /// Which member this is.
    pub(super) fn node_id(&self) -> u64 {
        self.shared.config.node_id
    }

    /// The cluster it belongs to.
    pub(super) fn cluster_id(&self) -> &str {
        &self.shared.config.cluster_id
    }

    /// Where this member is reached.
    pub(super) fn own_address(&self) -> &str {
        &self.shared.config.address
    }

    /// A member says where it is reached.
    pub(super) fn say(&self, node_id: u64, address: &str) {
        lock(&self.shared.book).say(node_id, address);
    }

    /// Where a member may be reached; 0: any of them.
    pub(super) fn addresses(&self, node_id: u64) -> Vec<String> {
        let state = self.shared.applied.get().map(|applied| Arc::clone(&applied.borrow().state));
        match state {
            Some(state) => lock(&self.shared.book).addresses(node_id, &state),
            None => lock(&self.shared.book).addresses(node_id, &super::MetadataState::new("")),
        }
    }

    /// The broker that registered as this member, be it that one still or not, as far as it is known here.
    pub(super) fn broker_of(&self, node_id: u64) -> Option<i32> {
        let state = Arc::clone(&self.shared.applied.get()?.borrow().state);
        state.brokers().find(|broker| broker.is_or_was(node_id)).map(|broker| broker.id)
    }

    /// Why a member is not heard: its disk is an older copy than the one that registered, as far as it is known here.
    pub(super) fn older_copy(&self, node_id: u64, start: Option<&RaftStart>) -> Option<String> {
        let state = Arc::clone(&self.shared.applied.get()?.borrow().state);
        let broker = state.brokers().find(|broker| broker.node_id == node_id)?;
        let start = start.filter(|start| broker.is_older_copy(start))?;
        Some(format!(
            "broker {} was started {} times as the cluster knows it, this disk {} times: it is an older copy, whose votes do not count",
            broker.id, broker.boots, start.boots
        ))
    }

    /// Which start of its disk this member is.
    pub(super) fn start(&self) -> Option<RaftStart> {
        self.shared.config.start.clone()
    }

    /// Refuses whoever shows another certificate than that of the broker which is this member, or that of none.
    fn check_identity(&self, connection: &quinn::Connection, node_id: u64) -> Result<(), String> {
        let Some(peers) = &self.shared.config.peers else { return Ok(()) };
        let shown = peers.principal(connection).map_err(|error| error.to_string())?;
        match (self.broker_of(node_id), &shown) {
            (Some(meant), Principal::Broker(id)) if *id == meant => Ok(()),
            // It has not registered yet.
            (None, Principal::Broker(_)) => Ok(()),
            (meant, shown) => {
                let meant = meant.map_or_else(|| "a broker".to_owned(), |id| format!("broker {id}"));
                Err(format!("it shows the certificate of {shown}, and member {node_id:x} is {meant}"))
            }
        }
    }

    /// Whether a member has answered since then.
    pub(super) fn has_answered(&self, node_id: u64, since: Instant) -> bool {
        lock(&self.shared.heard).get(&node_id).is_some_and(|heard| *heard >= since)
    }

    /// A stream to a member, wherever it is.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn open(&self, node_id: u64) -> Result<RaftStream, LinkError> {
        let tries = self.addresses(node_id).into_iter();
        let tries: Vec<_> = tries.map(|address| self.open_at(address, node_id).boxed()).collect();
        if tries.is_empty() {
            return Err(LinkError::NoAddress(node_id));
        }
        select_ok(tries).await.map(|(stream, _)| stream)
    }

    /// A stream to a member that may be at this address; 0: whoever is there.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn open_at(&self, address: String, node_id: u64) -> Result<RaftStream, LinkError> {
        let link = Arc::clone(lock(&self.shared.links).entry(address.clone()).or_default());
        let connection = link.connection(&self.shared, &address).await?;
        let hello = OpenRaft {
            cluster_id: self.shared.config.cluster_id.clone(),
            from_node_id: self.shared.config.node_id,
            to_node_id: node_id,
            from_address: self.shared.config.address.clone(),
            from_start: self.start(),
        };
        let opened = timeout(OPEN, RaftStream::open(connection.clone(), hello, self.clone(), address.clone())).await;
        let opened = opened.unwrap_or_else(|_| {
            connection.close(ResetCode::Deadline.number().into(), b"no answer");
            Err(LinkError::Late { address: address.clone() })
        });
        match &opened {
            Ok(stream) => lock(&self.shared.book).meet(stream.node_id, &address),
            Err(error) if error.is_of_another_cluster() => {
                tracing::warn!(%error, "a member of another cluster was met")
            }
            Err(_) => {}
        }
        opened
    }

    /// An answer has not come in time: is the way there still?
    pub(super) fn suspect(&self, address: &str) {
        let link = lock(&self.shared.links).get(address).cloned();
        if let Some(link) = link {
            link.suspect();
        }
    }

    fn hear(&self, node_id: u64) {
        lock(&self.shared.heard).insert(node_id, Instant::now());
    }
}

type Connecting = Shared<BoxFuture<'static, Result<quinn::Connection, String>>>;

/// The connection to one address.
#[derive(Default)]
struct Link {
    state: Mutex<LinkState>,
    /// Packets that came on the connection, and since when there are no more.
    packets: Mutex<Option<(u64, Instant)>>,
    /// Attempts, one after another: what an old one finds out is of no interest.
    attempt: AtomicU64,
}

enum LinkState {
    Down { until: Option<Instant>, pause: Duration, why: String },
    Connecting(Connecting),
    Up(quinn::Connection),
}

impl Default for LinkState {
    fn default() -> LinkState {
        LinkState::Down { until: None, pause: FIRST_PAUSE, why: String::new() }
    }
}

impl Link {
    async fn connection(
        self: &Arc<Self>,
        shared: &Arc<SharedLinks>,
        address: &str,
    ) -> Result<quinn::Connection, LinkError> {
        let unreachable = |why: String| LinkError::Unreachable { address: address.to_owned(), why };
        let connecting = {
            let mut state = lock(&self.state);
            match &*state {
                LinkState::Up(connection) if connection.close_reason().is_none() => return Ok(connection.clone()),
                LinkState::Down { until: Some(until), why, .. } if Instant::now() < *until => {
                    return Err(unreachable(why.clone()));
                }
                LinkState::Connecting(connecting) => connecting.clone(),
                LinkState::Up(_) => self.begin(&mut state, shared, address, FIRST_PAUSE),
                LinkState::Down { pause, .. } => {
                    let pause = *pause;
                    self.begin(&mut state, shared, address, pause)
                }
            }
        };
        connecting.await.map_err(unreachable)
    }

    fn suspect(&self) {
        let state = lock(&self.state);
        let LinkState::Up(connection) = &*state else { return };
        let came = connection.stats().udp_rx.datagrams;
        let mut packets = lock(&self.packets);
        match *packets {
            Some((before, since)) if before == came => {
                if since.elapsed() >= SILENCE {
                    connection.close(ResetCode::Deadline.number().into(), b"nothing is heard");
                    *packets = None;
                }
            }
            _ => *packets = Some((came, Instant::now())),
        }
    }

    /// Connects, whoever waits for it.
    fn begin(
        self: &Arc<Self>,
        state: &mut LinkState,
        shared: &Arc<SharedLinks>,
        address: &str,
        pause: Duration,
    ) -> Connecting {
        let (link, shared, address) = (Arc::clone(self), Arc::clone(shared), address.to_owned());
        let attempt = link.attempt.fetch_add(1, Ordering::Relaxed) + 1;
        let runtime = shared.runtime.clone();
        // QUIC drives a connection where it was dialled: on a thread that serves records it would wait behind them.
        let task = runtime.spawn(async move {
            let (config, deadline) = (&shared.config, Instant::now() + CONNECT);
            let connected = dial(&shared.endpoint, &config.client, &config.server_name, &address, deadline).await;
            let mut state = lock(&link.state);
            if link.attempt.load(Ordering::Relaxed) == attempt {
                *state = match &connected {
                    Ok(connection) => LinkState::Up(connection.clone()),
                    Err(why) => LinkState::Down {
                        until: Some(Instant::now() + pause),
                        pause: (pause * 2).min(LONGEST_PAUSE),
                        why: why.clone(),
                    },
                };
            }
            connected
        });
        let connecting =
            async move { task.await.unwrap_or_else(|_| Err("the member ends".to_owned())) }.boxed().shared();
        *state = LinkState::Connecting(connecting.clone());
        connecting
    }
}

/// A stream to a member: questions and answers, one after another. Dropped in between, it is reset.
pub(super) struct RaftStream {
    connection: quinn::Connection,
    send: quinn::SendStream,
    frames: Frames<RaftResponse>,
    links: Links,
    address: String,
    /// Who answers.
    pub(super) node_id: u64,
}

impl std::fmt::Debug for RaftStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftStream")
            .field("node_id", &self.node_id)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl RaftStream {
    async fn open(
        connection: quinn::Connection,
        hello: OpenRaft,
        links: Links,
        address: String,
    ) -> Result<RaftStream, LinkError> {
        let lost = |why: String| LinkError::Lost { address: address.clone(), why };
        let meant = hello.to_node_id;
        let (mut send, recv) = connection.open_bi().await.map_err(|error| lost(error.to_string()))?;
        let hello = Open { stream: Some(open::Stream::Raft(hello)) };
        send_within(&mut send, &hello, OPEN, "a hello").await.map_err(|error| lost(error.to_string()))?;
        let mut frames = Frames::<RaftOpened>::new(recv, MAX_OPEN_FRAME_BYTES, 0, FRAME);
        let opened = frames.message().await.map_err(|error| lost(error.to_string()))?;
        let opened = opened.ok_or_else(|| lost("the stream ended".to_owned()))?;
        if let Err(why) = links.check_identity(&connection, opened.node_id) {
            tracing::warn!(address, why, "whoever answers is not that member of the metadata quorum");
            return Err(lost(why));
        }
        if let Some(why) = links.older_copy(opened.node_id, opened.start.as_ref()) {
            tracing::warn!(address, why, "an older copy of a disk is not asked");
            return Err(lost(why));
        }
        if opened.node_id != 0 {
            lock(&links.shared.book).meet(opened.node_id, &address);
        }
        if let Some(error) = opened.error {
            return Err(LinkError::Refused { address, error });
        }
        if opened.node_id == 0 || (meant != 0 && opened.node_id != meant) {
            return Err(lost(format!("member {:x} answers for {meant:x}", opened.node_id)));
        }
        let frames = frames.followed_by(MAX_RAFT_FRAME_BYTES, 0).map_err(|error| lost(error.to_string()))?;
        Ok(RaftStream { connection, send, frames, links, address, node_id: opened.node_id })
    }

    /// Asks, and waits for the answer. After an error, or where nobody waited for the end, the stream is of no more use.
    ///
    /// # Errors
    /// [`LinkError::Late`], [`LinkError::Lost`]: whoever was asked may have heard it.
    pub(super) async fn ask(&mut self, request: &RaftRequest, patience: Duration) -> Result<RaftResponse, LinkError> {
        let asked = timeout(patience, async {
            send_within(&mut self.send, request, patience, "a request").await?;
            self.frames.message().await
        });
        let address = self.address.clone();
        // Where nobody drives the connection any more, no answer comes, nor word that none will.
        let Some(asked) = self.links.shared.ended.run_until_cancelled(asked).await else {
            return Err(LinkError::Lost { address, why: "this member ends".to_owned() });
        };
        match asked {
            Ok(Ok(Some(answer))) => {
                self.links.hear(self.node_id);
                Ok(answer)
            }
            Ok(Ok(None)) => Err(LinkError::Lost { address, why: "the stream ended".to_owned() }),
            Ok(Err(error)) => Err(LinkError::Lost { address, why: self.why(&error) }),
            Err(_) => Err(LinkError::Late { address }),
        }
    }

    /// Whether the connection is there still.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Where the member is.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    fn why(&self, error: &StreamError) -> String {
        self.connection.close_reason().map_or_else(|| error.to_string(), |reason| reason.to_string())
    }
}

impl Drop for RaftStream {
    fn drop(&mut self) {
        // An error means that it is closed already.
        drop(self.send.reset(ResetCode::Cancelled.number().into()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
