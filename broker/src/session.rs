//! One connection: hello first, then streams, each with a task of its own.
//!
//! Owns: the order of things on a connection, its deadlines and bounds, and what its produce streams share. Every first
//! frame has a deadline and a limit, every later frame too; so a peer that stalls, floods or lies holds up its own
//! connection and nobody else's. Refuses: to serve anything before hello, and to know what a stream does.
//! Read next: [`crate::produce`], [`crate::fetch`].

use crate::config::BrokerConfig;
use crate::credit::ConnectionCredit;
use crate::metadata::raft::server::FirstStream;
use crate::metadata::several::Ready;
use crate::quic::{FETCH_CREDIT_BYTES, PRODUCE_CREDIT};
use crate::replica::serve;
use crate::server::{Door, Place};
use crate::shared::Shared;
use crate::stream::{Frames, StreamError, send_within, write_within};
use crate::tls::live::Live;
use crate::tls::principal::Principal;
use crate::{call, fetch, member, produce, watch};
use bytes::Bytes;
use headwater_proto::frame;
use headwater_proto::limits::{
    MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES, MAX_OPEN_FRAME_BYTES, PROTOCOL_VERSION,
};
use headwater_proto::wire::{
    self, CallResponse, ConnectionRole, FetchData, Hello, HelloResponse, MemberUpdate, Open, ProduceResponse,
    RaftOpened, ReplicaOpened, WatchUpdate, call as call_message, call_response::Response, open,
};
use headwater_proto::{ErrorCode, ResetCode, WATCH_FEATURE};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// Acknowledgements, assignments and answers go before the data of the same connection.
const CONTROL_PRIORITY: i32 = 1;

/// What a call waits for.
const ANSWER: &str = "an answer";

/// What members of a metadata quorum are told.
const IN_NO_QUORUM: &str = "this broker is alone: it takes part in no metadata quorum with others";

/// What they are told on a connection that said hello.
const APART: &str = "raft streams have a connection of their own, which says no hello";

/// Longest texts that hello may carry, in bytes.
const MAX_CLIENT_TEXT_BYTES: usize = 256;

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) remote: SocketAddr,
    pub(crate) client_id: String,
    pub(crate) client_software: String,
    pub(crate) role: ConnectionRole,
    /// Who it is by its certificate: streams that are one broker's alone ask it ([`Principal::require_broker`]).
    pub(crate) principal: Principal,
}

/// A connection past its hello.
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) connection: quinn::Connection,
    pub(crate) peer: Peer,
    /// Loans are given to one stream of a connection at a time.
    pub(crate) loan_turn: Arc<Semaphore>,
    /// Lookups in logs that this connection may begin: its calls share them.
    lookups: Arc<Semaphore>,
    credit: Mutex<ConnectionCredit>,
}

impl Session {
    /// What this connection's produce streams share. Never held over an await.
    pub(crate) fn credit(&self) -> MutexGuard<'_, ConnectionCredit> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the client may leave unread what is written to it.
    pub(crate) fn patience(&self) -> Duration {
        patience(&self.shared.config)
    }
}

fn patience(config: &BrokerConfig) -> Duration {
    Duration::from_millis(config.frame_timeout_ms)
}

/// Serves a connection from its handshake to its end; it has this place among them until then.
pub(crate) async fn serve(door: Arc<Door>, incoming: quinn::Incoming, mut place: Place) {
    let handshake = Duration::from_millis(door.config.handshake_timeout_ms);
    let remote = incoming.remote_address();
    let connecting = match incoming.accept() {
        Ok(connecting) => connecting,
        Err(error) => return tracing::debug!(%remote, %error, "handshake refused"),
    };
    let connected = door.shutdown.run_until_cancelled(timeout(handshake, connecting));
    let connection = match connected.await {
        Some(Ok(Ok(connection))) => connection,
        Some(Ok(Err(error))) => {
            // A certificate that was shown and is not good: TLS's alerts are errors 0x100 to 0x1ff.
            if let quinn::ConnectionError::TransportError(error) = &error
                && (0x100..0x200).contains(&u64::from(error.code))
            {
                door.metrics.rejected(ErrorCode::AuthenticationFailed);
            }
            return tracing::debug!(%remote, %error, "handshake failed");
        }
        Some(Err(_)) => return tracing::debug!(%remote, "handshake took too long"),
        None => return,
    };
    if !place.is_for(matches!(door.tls.principal(&connection), Ok(Principal::Broker(_)))) {
        tracing::warn!(%remote, "connection refused: there are as many as the settings allow, and what is left is for brokers");
        door.metrics.rejected(ErrorCode::Overloaded);
        return connection
            .close(ResetCode::Limit.number().into(), b"there are as many connections as the settings allow");
    }
    let id = door.next_connection.fetch_add(1, Ordering::Relaxed);
    let span = tracing::debug_span!("session", peer = %remote, id);
    serve_connection(&door, connection, handshake).instrument(span).await;
}

async fn serve_connection(door: &Door, connection: quinn::Connection, handshake: Duration) {
    let greeted = door.shutdown.run_until_cancelled(timeout(handshake, hello(door, &connection)));
    let (shared, peer) = match greeted.await {
        Some(Ok(Ok(Greeted::Peer(shared, peer)))) => (shared, peer),
        Some(Ok(Ok(Greeted::Member { broker_id, first }))) => {
            return serve_member(door, connection, broker_id, first).await;
        }
        Some(Ok(Err(error))) => {
            match &error {
                StreamError::Refused(ErrorCode::AuthenticationFailed | ErrorCode::ClusterAuthorizationFailed, _) => {
                    tracing::warn!(%error, "a connection is not who it must be");
                }
                error => tracing::debug!(%error, "connection ends before hello"),
            }
            if let Some(error) = error.to_wire() {
                door.metrics.rejected(ErrorCode::from_number(error.code));
            }
            return linger(&connection, error.reset_code()).await;
        }
        Some(Err(_)) => {
            tracing::debug!("no hello in time");
            door.metrics.rejected(ErrorCode::TimedOut);
            return connection.close(ResetCode::Deadline.number().into(), b"no hello in time");
        }
        None => return connection.close(ResetCode::ShuttingDown.number().into(), b""),
    };
    let (client, software, role, principal) = (&peer.client_id, &peer.client_software, peer.role, &peer.principal);
    tracing::debug!(client, software, ?role, %principal, "connection opened");
    let session = Arc::new(Session {
        shared: Arc::clone(&shared),
        connection: connection.clone(),
        peer,
        loan_turn: Arc::new(Semaphore::new(1)),
        lookups: Arc::new(Semaphore::new(call::LOOKUPS_AT_ONCE)),
        credit: Mutex::new(ConnectionCredit::new(PRODUCE_CREDIT)),
    });
    let ended = CancellationToken::new();
    let streams = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => break,
            accepted = connection.accept_bi() => accepted,
        };
        let (send, recv) = match accepted {
            Ok(stream) => stream,
            Err(reason) => {
                tracing::debug!(%reason, "connection closed");
                // Whatever its streams wait for, nobody is left to hear of it.
                ended.cancel();
                break;
            }
        };
        let (session, ended) = (Arc::clone(&session), ended.clone());
        streams.spawn(
            async move {
                // None: the connection ended first.
                let _ = ended.run_until_cancelled(serve_stream(session, send, recv)).await;
            }
            .in_current_span(),
        );
    }
    // At shutdown what was received is still appended and acknowledged, for as long as the broker's deadline permits.
    streams.close();
    streams.wait().await;
    linger(&connection, ResetCode::ShuttingDown).await;
}

/// Closes a connection once the peer has had a moment to read the last frames; closing drops what is on its way.
async fn linger(connection: &quinn::Connection, code: ResetCode) {
    // Either the peer closes, or the moment is over.
    drop(timeout(Duration::from_millis(250), connection.closed()).await);
    connection.close(code.number().into(), b"");
}

fn frames(config: &BrokerConfig, recv: quinn::RecvStream) -> Frames<Open> {
    let frame_timeout = Duration::from_millis(config.frame_timeout_ms);
    Frames::new(recv, MAX_OPEN_FRAME_BYTES, 0, frame_timeout)
}

/// What the first stream of a connection told.
enum Greeted {
    /// Whoever is to be served said hello.
    Peer(Arc<Shared>, Peer),
    /// A member of the metadata quorum, which is this broker by its certificate.
    Member { broker_id: i32, first: FirstStream },
}

/// The streams of another member of the metadata quorum, on the quorum's thread.
async fn serve_member(door: &Door, connection: quinn::Connection, broker_id: i32, first: FirstStream) {
    let Some((server, thread)) = &door.quorum else { return };
    let (server, served) = (server.clone(), connection.clone());
    let serving = thread.spawn(async move { server.serve_from(served, Some(broker_id), Some(first)).await });
    if door.shutdown.run_until_cancelled(connection.closed()).await.is_none() {
        // Others may need it until this broker is gone; then its endpoint closes.
        return;
    }
    // It ends with the connection; where it panics, that is said there.
    drop(serving.await);
}

/// Whether whoever opens a raft stream may: only a broker of this cluster, and only where there is a quorum of several.
fn admit_member(door: &Door, connection: &quinn::Connection) -> Result<i32, wire::Error> {
    match door.quorum {
        Some(_) => Ok(principal(&door.tls, connection)?.broker("raft streams")?),
        None => Err(wire::Error::new(ErrorCode::InvalidRequest, IN_NO_QUORUM)),
    }
}

fn principal(tls: &Live, connection: &quinn::Connection) -> Result<Principal, wire::Error> {
    let principal = tls.principal(connection);
    principal.map_err(|error| wire::Error::new(ErrorCode::AuthenticationFailed, error.to_string()))
}

/// The first stream of a connection is the hello call, or that of a member of the quorum.
async fn hello(door: &Door, connection: &quinn::Connection) -> Result<Greeted, StreamError> {
    let closed = |reason| StreamError::Read(quinn::ReadError::ConnectionLost(reason));
    let (mut send, recv) = connection.accept_bi().await.map_err(closed)?;
    let mut frames = frames(&door.config, recv);
    let result = match frames.message().await {
        Ok(Some(Open { stream: Some(open::Stream::Call(wire::Call { request, .. })) })) => match request {
            Some(call_message::Request::Hello(hello)) => {
                let mut served = door.shared.clone();
                let ended = |_| StreamError::Refused(ErrorCode::ShuttingDown, "the broker did not start".to_owned());
                let shared = served.wait_for(Option::is_some).await.map_err(ended)?.clone();
                let shared = shared.ok_or_else(|| StreamError::Deadline("the broker's start"))?;
                greet(&shared, connection, hello).map(|(peer, answer)| (shared, peer, answer))
            }
            _ => Err(wire::Error::new(ErrorCode::InvalidRequest, "the first call of a connection is hello")),
        },
        Ok(Some(Open { stream: Some(open::Stream::Raft(hello)) })) => match admit_member(door, connection) {
            Ok(broker_id) => {
                return Ok(Greeted::Member { broker_id, first: FirstStream { hello, send, frames } });
            }
            Err(error) => {
                let refused = StreamError::Refused(ErrorCode::from_number(error.code), error.message.clone());
                let opened = RaftOpened { error: Some(error), ..RaftOpened::default() };
                send_within(&mut send, &opened, patience(&door.config), ANSWER).await?;
                finish(&mut send);
                return Err(refused);
            }
        },
        Ok(_) => Err(wire::Error::new(ErrorCode::InvalidRequest, "the first stream of a connection is the hello call")),
        Err(error) => match error.to_wire() {
            Some(told) => Err(told),
            None => return Err(error),
        },
    };
    let (response, outcome) = match result {
        Ok((shared, peer, answer)) => (Response::Hello(answer), Ok(Greeted::Peer(shared, peer))),
        Err(error) => {
            let refused = StreamError::Refused(ErrorCode::from_number(error.code), error.message.clone());
            (Response::Error(error), Err(refused))
        }
    };
    send_within(&mut send, &CallResponse { response: Some(response) }, patience(&door.config), ANSWER).await?;
    finish(&mut send);
    outcome
}

fn greet(shared: &Shared, connection: &quinn::Connection, hello: Hello) -> Result<(Peer, HelloResponse), wire::Error> {
    if hello.min_version > PROTOCOL_VERSION || hello.max_version < PROTOCOL_VERSION {
        return Err(wire::Error::new(
            ErrorCode::UnsupportedVersion,
            format!(
                "the client speaks versions {} to {}, this broker version {PROTOCOL_VERSION}",
                hello.min_version, hello.max_version
            ),
        ));
    }
    if !hello.cluster_id.is_empty() && hello.cluster_id != shared.cluster_id {
        return Err(wire::Error::new(
            ErrorCode::WrongCluster,
            format!("this is cluster {}, not {}", shared.cluster_id, hello.cluster_id),
        ));
    }
    if hello.client_id.len() > MAX_CLIENT_TEXT_BYTES || hello.client_software.len() > MAX_CLIENT_TEXT_BYTES {
        let why = format!("client_id and client_software have at most {MAX_CLIENT_TEXT_BYTES} bytes");
        return Err(wire::Error::new(ErrorCode::LimitExceeded, why));
    }
    let role = ConnectionRole::try_from(hello.role)
        .map_err(|_| wire::Error::new(ErrorCode::InvalidRequest, format!("a connection has no role {}", hello.role)))?;
    let principal = principal(&shared.tls, connection)?;
    if role == ConnectionRole::Peer {
        principal.broker("connections between brokers")?;
    }
    let peer = Peer {
        principal,
        remote: connection.remote_address(),
        client_id: hello.client_id,
        client_software: hello.client_software,
        role,
    };
    let state = shared.metadata.state();
    let incarnation = state.broker(shared.broker_id()).map(|broker| broker.incarnation.as_bytes().to_vec().into());
    let answer = HelloResponse {
        version: PROTOCOL_VERSION,
        cluster_id: shared.cluster_id.clone(),
        broker_id: shared.broker_id(),
        broker_software: crate::SOFTWARE.to_owned(),
        features: vec![WATCH_FEATURE.to_owned()],
        max_streams: shared.config.max_streams_per_connection,
        fetch_credit_bytes: FETCH_CREDIT_BYTES,
        produce_credit_bytes: PRODUCE_CREDIT.connection_bytes,
        max_frame_header_bytes: MAX_FRAME_HEADER_BYTES as u32,
        max_frame_payload_bytes: MAX_FRAME_PAYLOAD_BYTES as u32,
        incarnation: incarnation.unwrap_or_default(),
    };
    Ok((peer, answer))
}

/// One stream, from its first frame to its end.
async fn serve_stream(session: Arc<Session>, mut send: quinn::SendStream, recv: quinn::RecvStream) {
    let shared = &session.shared;
    let mut frames = frames(&shared.config, recv);
    let first = Duration::from_millis(shared.config.first_frame_timeout_ms);
    let opened = tokio::select! {
        biased;
        opened = timeout(first, frames.message()) => opened.unwrap_or(Err(StreamError::Deadline("the first frame"))),
        () = shared.shutdown.cancelled() => return,
    };
    let stream = match opened {
        Ok(Some(Open { stream: Some(stream) })) => stream,
        // Opened and finished without a word.
        Ok(None) => return,
        Ok(Some(Open { stream: None })) => {
            let why = "the first frame opens no kind of stream that this broker knows".to_owned();
            let error = StreamError::Refused(ErrorCode::InvalidRequest, why);
            return refuse(&session, &mut send, error, |error| frame::encode(&refused(error), 0)).await;
        }
        Err(error) => {
            return refuse(&session, &mut send, error, |error| frame::encode(&refused(error), 0)).await;
        }
    };
    match stream {
        open::Stream::Call(call) => {
            prioritise(&send);
            let answer = answer(&session, call).await;
            if let Err(error) = send_within(&mut send, &answer, session.patience(), ANSWER).await {
                tracing::debug!(%error, "nobody waits for the answer");
                // An error means that the stream is closed already.
                drop(send.reset(error.reset_code().number().into()));
            }
        }
        open::Stream::Produce(open) => {
            prioritise(&send);
            if let Err(error) = produce::serve(&session, open, &mut send, frames).await {
                let last = |error| ProduceResponse { error: Some(error), ..ProduceResponse::default() };
                let last = |error| frame::encode(&last(error), 0);
                refuse(&session, &mut send, error, last).await;
            }
        }
        open::Stream::Fetch(open) => {
            if let Err(error) = fetch::serve(&session, open, &mut send, frames).await {
                let last = |error| FetchData { next_offset: -1, error: Some(error), ..FetchData::default() };
                let last = |error| frame::encode(&last(error), 0);
                refuse(&session, &mut send, error, last).await;
            }
        }
        open::Stream::Member(open) => {
            prioritise(&send);
            let served = match frames.followed_by(MAX_OPEN_FRAME_BYTES, 0) {
                Ok(frames) => member::serve(shared, open, &session.peer, &mut send, frames).await,
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                let last = |error| MemberUpdate { error: Some(error), ..MemberUpdate::default() };
                let last = |error| frame::encode(&last(error), 0);
                refuse(&session, &mut send, error, last).await;
            }
        }
        open::Stream::Replica(open) => {
            if let Err(error) = serve::serve(&session, open, &mut send, frames).await {
                let last = |error| ReplicaOpened { error: Some(error), ..ReplicaOpened::default() };
                refuse(&session, &mut send, error, |error| frame::encode(&last(error), 0)).await;
            }
        }
        open::Stream::Watch(open) => {
            prioritise(&send);
            let _watches = shared.watches.token();
            let served = match frames.followed_by(MAX_OPEN_FRAME_BYTES, 0) {
                Ok(frames) => watch::serve(&session, open, &mut send, frames).await,
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                let last = |error| WatchUpdate { error: Some(error), ..WatchUpdate::default() };
                refuse(&session, &mut send, error, |error| frame::encode(&last(error), 0)).await;
            }
            if shared.leaving.is_cancelled() {
                finish(&mut send);
                // The connection ends soon, and with it what has not arrived: whoever shuts down waits for this.
                drop(timeout(watch::TELLING, send.stopped()).await);
            }
        }
        open::Stream::Raft(_) => {
            let error = match session.peer.principal.broker("raft streams") {
                Err(error) => error.into(),
                Ok(_) => {
                    let why = if shared.ready.is_some() { APART } else { IN_NO_QUORUM };
                    StreamError::Refused(ErrorCode::InvalidRequest, why.to_owned())
                }
            };
            let last = |error| RaftOpened { error: Some(error), ..RaftOpened::default() };
            refuse(&session, &mut send, error, |error| frame::encode(&last(error), 0)).await;
        }
    }
    finish(&mut send);
}

async fn answer(session: &Session, call: wire::Call) -> CallResponse {
    let shared = &session.shared;
    let name = call_name(call.request.as_ref());
    let began = Instant::now();
    let limit = match u64::from(call.timeout_ms) {
        0 => shared.config.request_timeout_ms,
        asked => asked.min(shared.config.request_timeout_ms),
    };
    let answer = match &call.request {
        Some(call_message::Request::Hello(_)) => {
            refused(wire::Error::new(ErrorCode::InvalidRequest, "hello is said once, as the first call"))
        }
        None => refused(wire::Error::new(ErrorCode::InvalidRequest, "a call that this broker does not know")),
        Some(_) => match timeout(Duration::from_millis(limit), call::answer(shared, &session.lookups, call)).await {
            Ok(answer) => answer,
            Err(_) => {
                let is_heard = shared.ready.as_ref().is_none_or(Ready::is_heard);
                let why = match is_heard && watch::is_in_touch(shared) {
                    true => "",
                    false => "the metadata quorum has no leader that this broker reaches: ",
                };
                let told = format!("{why}no answer within {limit} ms; the request may still take effect");
                refused(wire::Error::new(ErrorCode::TimedOut, told))
            }
        },
    };
    shared.metrics.answered(name, began.elapsed().as_secs_f64());
    if let Some(Response::Error(error)) = &answer.response {
        shared.metrics.rejected(ErrorCode::from_number(error.code));
    }
    answer
}

fn refused(error: wire::Error) -> CallResponse {
    CallResponse { response: Some(Response::Error(error)) }
}

fn call_name(request: Option<&call_message::Request>) -> &'static str {
    use call_message::Request;
    match request {
        None => "unknown",
        Some(Request::Hello(_)) => "hello",
        Some(Request::DescribeBroker(_)) => "describe_broker",
        Some(Request::Metadata(_)) => "metadata",
        Some(Request::CreateTopic(_)) => "create_topic",
        Some(Request::DescribeTopic(_)) => "describe_topic",
        Some(Request::AlterTopic(_)) => "alter_topic",
        Some(Request::AddPartitions(_)) => "add_partitions",
        Some(Request::DeleteTopic(_)) => "delete_topic",
        Some(Request::DeleteRecords(_)) => "delete_records",
        Some(Request::ListOffsets(_)) => "list_offsets",
        Some(Request::AllocateProducerId(_)) => "allocate_producer_id",
        Some(Request::CommitOffsets(_)) => "commit_offsets",
        Some(Request::FetchOffsets(_)) => "fetch_offsets",
        Some(Request::ListGroups(_)) => "list_groups",
        Some(Request::DescribeGroup(_)) => "describe_group",
        Some(Request::DeleteGroup(_)) => "delete_group",
        Some(Request::DeleteOffsets(_)) => "delete_offsets",
        Some(Request::DescribeCluster(_)) => "describe_cluster",
        Some(Request::ChangeVoters(_)) => "change_voters",
        Some(Request::FindCoordinator(_)) => "find_coordinator",
        Some(Request::RemoveBroker(_)) => "remove_broker",
        Some(Request::ElectLeaders(_)) => "elect_leaders",
        Some(Request::MovePartitions(_)) => "move_partitions",
        Some(Request::CancelMoves(_)) => "cancel_moves",
        Some(Request::ListMoves(_)) => "list_moves",
        Some(Request::DescribeReplicas(_)) => "describe_replicas",
        Some(Request::ClusterHealth(_)) => "cluster_health",
        Some(Request::UpgradeCluster(_)) => "upgrade_cluster",
    }
}

/// Ends a stream that went wrong: a last frame with the error where the peer is there to read it, else a reset.
async fn refuse(
    session: &Session,
    send: &mut quinn::SendStream,
    error: StreamError,
    last: impl Fn(wire::Error) -> Bytes,
) {
    if error.is_offence() {
        let Peer { remote, client_id, principal, .. } = &session.peer;
        tracing::warn!(%error, peer = %remote, client = client_id, %principal, "a peer broke the protocol");
    } else {
        tracing::debug!(%error, "stream ended");
    }
    let code = error.reset_code();
    if let Some(told) = error.to_wire() {
        session.shared.metrics.rejected(ErrorCode::from_number(told.code));
        if write_within(send, last(told), session.patience(), "an error").await.is_ok() {
            return finish(send);
        }
    }
    // An error means that the stream is closed already.
    drop(send.reset(code.number().into()));
}

fn prioritise(send: &quinn::SendStream) {
    // An error means that the stream is gone, which the next write says.
    drop(send.set_priority(CONTROL_PRIORITY));
}

fn finish(send: &mut quinn::SendStream) {
    // An error means that it was reset or finished before.
    drop(send.finish());
}
