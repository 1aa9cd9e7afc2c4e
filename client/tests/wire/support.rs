//! A QUIC peer that speaks the protocol's frames and is no broker: a test receives every long stream the client opens,
//! reads what comes on it, and answers as it likes. Calls are answered at once: hello, metadata of one topic and who coordinates by
//! themselves, the rest by a function that the test may set.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use headwater_client::{Client, ClientConfig, Consumer, ConsumerBuilder, quic};
use headwater_proto::batch::{BatchBuilder, BuildOptions};
use headwater_proto::frame::{self, FrameDecoder, FrameEvent};
use headwater_proto::limits::{ALPN, MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES, PROTOCOL_VERSION};
use headwater_proto::wire::{self, MemberHeartbeat, MemberUpdate, call, call_response::Response, open};
use headwater_proto::{ErrorCode, TopicId};
use prost::Message;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::{mpsc, watch};

/// How long anything in a test may take before it counts as hanging.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The one topic.
pub const TOPIC: &str = "flights";
pub const TOPIC_ID: TopicId = TopicId::from_bytes([7; 16]);

/// Waits, but not for ever.
pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// Answers calls; `None`: the peer's own answer.
pub type Answer = dyn Fn(&call::Request) -> Option<Response> + Send + Sync;

/// What every connection of the peer shares.
struct Shared {
    streams: mpsc::UnboundedSender<PeerStream>,
    answer: Mutex<Arc<Answer>>,
    /// Calls other than hello, metadata and who coordinates, in order of arrival.
    calls: Mutex<Vec<call::Request>>,
    connections: Mutex<Vec<quinn::Connection>>,
    deaf: AtomicBool,
    /// Attempts to connect that were not answered.
    knocks: watch::Sender<HashSet<String>>,
    hello: Mutex<wire::HelloResponse>,
    /// Whether all calls but hello are refused because this peer is cut off from other brokers.
    out_of_touch: AtomicBool,
    /// Who coordinates every group; `None`: this peer.
    coordinator: Mutex<Option<wire::Coordinator>>,
    /// How often metadata was asked for, and whether the answers are held back.
    metadata: (AtomicUsize, watch::Sender<bool>),
    /// Whether answers about offsets are held back.
    offsets: watch::Sender<bool>,
    partitions: u32,
    max_message_bytes: u32,
}

/// The peer.
pub struct Peer {
    shared: Arc<Shared>,
    streams: mpsc::UnboundedReceiver<PeerStream>,
    endpoint: quinn::Endpoint,
    ca_pem: Vec<u8>,
}

/// A long stream that the client opened.
pub struct PeerStream {
    pub open: open::Stream,
    pub connection: quinn::Connection,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    rest: Vec<u8>,
}

impl Peer {
    pub async fn start(partitions: u32) -> Peer {
        Peer::with_limit(partitions, 1_048_588).await
    }

    pub async fn with_limit(partitions: u32, max_message_bytes: u32) -> Peer {
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(Arc::new(quic::transport(None)));
        let endpoint = quic::endpoint("127.0.0.1:0".parse().unwrap(), None, Some(server)).unwrap();
        let (sender, streams) = mpsc::unbounded_channel();
        let hello = wire::HelloResponse {
            version: PROTOCOL_VERSION,
            cluster_id: "cluster".into(),
            broker_id: 1,
            broker_software: "peer".into(),
            max_streams: 100,
            fetch_credit_bytes: 32 << 20,
            produce_credit_bytes: 32 << 20,
            ..wire::HelloResponse::default()
        };
        let shared = Arc::new(Shared {
            streams: sender,
            answer: Mutex::new(Arc::new(|_| None)),
            calls: Mutex::default(),
            connections: Mutex::default(),
            deaf: AtomicBool::new(false),
            knocks: watch::Sender::default(),
            hello: Mutex::new(hello),
            out_of_touch: AtomicBool::default(),
            coordinator: Mutex::default(),
            metadata: Default::default(),
            offsets: watch::Sender::default(),
            partitions,
            max_message_bytes,
        });
        let (accepting, connections) = (endpoint.clone(), shared.clone());
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                if connections.deaf.load(Ordering::SeqCst) {
                    let attempt = format!("{:?}", incoming.orig_dst_cid());
                    incoming.ignore();
                    connections.knocks.send_if_modified(|knocks| knocks.insert(attempt));
                    continue;
                }
                tokio::spawn(connection(connections.clone(), incoming));
            }
        });
        let ca_pem = certified.cert.pem().into_bytes();
        Peer { shared, streams, endpoint, ca_pem }
    }

    pub fn address(&self) -> String {
        self.endpoint.local_addr().unwrap().to_string()
    }

    pub fn config(&self) -> ClientConfig {
        ClientConfig {
            bootstrap: vec![self.address()],
            server_name: Some("localhost".into()),
            ca_pem: self.ca_pem.clone(),
            retry_backoff: Duration::from_millis(5),
            retry_backoff_max: Duration::from_millis(50),
            ..ClientConfig::default()
        }
    }

    pub async fn client(&self) -> Client {
        within("connect", Client::connect(self.config())).await.unwrap()
    }

    /// Changes what the next hellos say.
    pub fn set_hello(&self, change: impl FnOnce(&mut wire::HelloResponse)) {
        change(&mut self.shared.hello.lock().unwrap());
    }

    /// Refuses calls as a broker does that is cut off from the others, from now on.
    pub fn lose_touch(&self) {
        self.shared.out_of_touch.store(true, Ordering::SeqCst);
    }

    /// Says that this one coordinates every group.
    pub fn set_coordinator(&self, broker_id: i32, address: String, leader_epoch: i32) {
        let coordinator = wire::Coordinator { partition: 0, broker_id, address, leader_epoch };
        *self.shared.coordinator.lock().unwrap() = Some(coordinator);
    }

    /// Answers calls from now on, where `answer` gives an answer.
    pub fn answer(&self, answer: impl Fn(&call::Request) -> Option<Response> + Send + Sync + 'static) {
        *self.shared.answer.lock().unwrap() = Arc::new(answer);
    }

    /// The calls that came since this was last asked, hello, metadata and who coordinates left out.
    pub fn calls(&self) -> Vec<call::Request> {
        std::mem::take(&mut *self.shared.calls.lock().unwrap())
    }

    /// Holds back all answers about topics, or lets them go.
    pub fn hold_metadata(&self, held: bool) {
        self.shared.metadata.1.send_replace(held);
    }

    /// Holds back all answers about offsets, or lets them go.
    pub fn hold_offsets(&self, held: bool) {
        self.shared.offsets.send_replace(held);
    }

    /// How often somebody asked about topics.
    pub fn metadata_asked(&self) -> usize {
        self.shared.metadata.0.load(Ordering::SeqCst)
    }

    /// Answers nobody who wants to connect, or again everybody.
    pub fn set_deaf(&self, deaf: bool) {
        self.shared.deaf.store(deaf, Ordering::SeqCst);
    }

    /// Waits until so many attempts to connect were not answered.
    pub async fn knocked(&self, attempts: usize) {
        let mut knocks = self.shared.knocks.subscribe();
        within("attempts to connect", knocks.wait_for(|knocks| knocks.len() >= attempts)).await.unwrap();
    }

    /// Ends every connection, as a broker that goes away does.
    pub fn drop_connections(&self) {
        for connection in self.shared.connections.lock().unwrap().drain(..) {
            connection.close(4u32.into(), b"going away");
        }
    }

    /// The next long stream that the client opens.
    pub async fn stream(&mut self) -> PeerStream {
        within("a stream", self.streams.recv()).await.unwrap()
    }

    /// No stream was opened that nobody looked at.
    pub fn no_further_stream(&mut self) -> bool {
        self.streams.try_recv().is_err()
    }

    /// The next produce stream, accepted with this much credit.
    pub async fn produce(&mut self, credit_bytes: u64) -> (PeerStream, wire::OpenProduce) {
        self.produce_after(wire::ProduceOpened { credit_bytes, ..nothing_yet() }).await
    }

    /// The next produce stream, accepted in these words.
    pub async fn produce_after(&mut self, opened: wire::ProduceOpened) -> (PeerStream, wire::OpenProduce) {
        let mut stream = self.stream().await;
        let open::Stream::Produce(open) = stream.open.clone() else { panic!("{:?}", stream.open) };
        stream.send(&opened, &[]).await;
        (stream, open)
    }

    /// The next fetch stream, accepted.
    pub async fn fetch(&mut self, high_watermark: i64) -> (PeerStream, wire::OpenFetch) {
        let mut stream = self.stream().await;
        let open::Stream::Fetch(open) = stream.open.clone() else { panic!("{:?}", stream.open) };
        stream.send(&wire::FetchOpened { high_watermark, ..wire::FetchOpened::default() }, &[]).await;
        (stream, open)
    }

    /// Whether the client opens no stream for a while. Only for what must not happen.
    pub async fn is_quiet(&mut self, pause: Duration) -> bool {
        tokio::time::timeout(pause, self.streams.recv()).await.is_err()
    }

    /// The next membership stream.
    pub async fn member(&mut self) -> (PeerStream, wire::OpenMember) {
        let stream = self.stream().await;
        let open::Stream::Member(open) = stream.open.clone() else { panic!("{:?}", stream.open) };
        (stream, open)
    }
}

/// What a log says of a producer that it does not know.
pub fn nothing_yet() -> wire::ProduceOpened {
    wire::ProduceOpened {
        credit_bytes: 16 << 20,
        last_sequence: -1,
        last_offset: -1,
        last_producer_epoch: -1,
        ..wire::ProduceOpened::default()
    }
}

impl PeerStream {
    /// Sends a frame. A client that is gone does not matter here.
    pub async fn send<M: Message>(&mut self, header: &M, payload: &[u8]) {
        let _ = self.send.write_all(&frame::encode(header, payload.len())).await;
        let _ = self.send.write_all(payload).await;
    }

    /// The next frame, whole; `None` where the client ended the stream.
    pub async fn frame<M: Message + Default>(&mut self) -> Option<(M, Vec<u8>)> {
        within("a frame", async {
            let mut decoder = FrameDecoder::<M>::new(MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES);
            let mut message = None;
            let mut payload = Vec::new();
            loop {
                let taken = self.take_frame();
                if let Some(bytes) = taken {
                    decoder.push(bytes);
                    while let Some(event) = decoder.next_event().unwrap() {
                        match event {
                            FrameEvent::Header { message: m, .. } => message = Some(m),
                            FrameEvent::Payload { part, .. } => payload.extend_from_slice(&part),
                        }
                    }
                    return message.map(|m| (m, payload));
                }
                self.fill().await?;
            }
        })
        .await
    }

    /// An append: its header and its batch.
    pub async fn append(&mut self) -> (wire::ProduceRequest, headwater_proto::batch::BatchHeader) {
        let (request, payload) = self.frame::<wire::ProduceRequest>().await.expect("an append");
        let header = headwater_proto::batch::check(&payload).expect("a good batch");
        (request, header)
    }

    /// Acknowledges.
    pub async fn acknowledge(&mut self, request_id: u64, base_offset: i64, duplicate: bool) {
        let ack = wire::BatchAck { base_offset, log_append_time_ms: -1, duplicate };
        let response = wire::ProduceResponse {
            request_id,
            credit_bytes: 0,
            error: None,
            batches: vec![ack],
            durability: wire::Durability::Flushed.into(),
        };
        self.send(&response, &[]).await;
    }

    /// Refuses an append.
    pub async fn refuse(&mut self, request_id: u64, code: ErrorCode) {
        let error = Some(wire::Error::new(code, format!("refused as {code}")));
        self.send(&wire::ProduceResponse { request_id, error, ..wire::ProduceResponse::default() }, &[]).await;
    }

    /// Sends a piece of the log that ends a batch at `next_offset`.
    pub async fn data(&mut self, next_offset: i64, high_watermark: i64, payload: &[u8]) {
        self.send(&wire::FetchData { next_offset, high_watermark, ..wire::FetchData::default() }, payload).await;
    }

    /// Credit that the client grants beyond the first.
    pub async fn credit(&mut self) -> u64 {
        self.frame::<wire::FetchCredit>().await.expect("credit").0.credit_bytes
    }

    /// Bytes of the next frame that have arrived, without waiting for the rest: its two lengths and what follows.
    pub async fn arrived_of_frame(&mut self, at_least: usize) -> usize {
        within("part of a frame", async {
            while self.rest.len() < at_least {
                self.fill().await.expect("the stream goes on");
            }
            self.rest.len()
        })
        .await
    }

    /// Whether the client sends nothing for a while. Only for what must not happen; a test never waits like this for what must.
    pub async fn is_quiet(&mut self, pause: Duration) -> bool {
        tokio::time::timeout(pause, self.fill()).await.is_err()
    }

    fn take_frame(&mut self) -> Option<Bytes> {
        let lengths = self.rest.first_chunk::<8>()?;
        let (header, payload) = lengths.split_at(4);
        let length = |bytes: &[u8]| bytes.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
        let whole = 8 + length(header) + length(payload);
        if self.rest.len() < whole {
            return None;
        }
        let rest = self.rest.split_off(whole);
        Some(std::mem::replace(&mut self.rest, rest).into())
    }

    async fn fill(&mut self) -> Option<()> {
        let chunk = self.recv.read_chunk(1 << 16, true).await.ok().flatten()?;
        self.rest.extend_from_slice(&chunk.bytes);
        Some(())
    }
}

async fn connection(shared: Arc<Shared>, incoming: quinn::Incoming) {
    let Ok(connection) = incoming.await else { return };
    shared.connections.lock().unwrap().push(connection.clone());
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (shared, connection) = (shared.clone(), connection.clone());
        tokio::spawn(async move {
            let unread = open::Stream::Call(wire::Call::default());
            let mut stream = PeerStream { open: unread, connection, send, recv, rest: Vec::new() };
            let Some((opened, _)) = stream.frame::<wire::Open>().await else { return };
            match opened.stream {
                Some(open::Stream::Call(call)) => {
                    let request = call.request.unwrap();
                    if let call::Request::Metadata(_) = request {
                        shared.metadata.0.fetch_add(1, Ordering::SeqCst);
                        let _ = shared.metadata.1.subscribe().wait_for(|held| !held).await;
                    }
                    if let call::Request::ListOffsets(_) = request {
                        let _ = shared.offsets.subscribe().wait_for(|held| !held).await;
                    }
                    let response = Some(respond(&shared, &request));
                    stream.send(&wire::CallResponse { response }, &[]).await;
                    let _ = stream.send.finish();
                    let _ = stream.send.stopped().await;
                }
                Some(open) => {
                    stream.open = open;
                    let _ = shared.streams.send(stream);
                }
                None => {}
            }
        });
    }
}

fn respond(shared: &Shared, request: &call::Request) -> Response {
    if let call::Request::Hello(_) = request {
        return Response::Hello(shared.hello.lock().unwrap().clone());
    }
    if shared.out_of_touch.load(Ordering::SeqCst) {
        return Response::Error(wire::Error::new(ErrorCode::OutOfTouch, "cut off"));
    }
    if let call::Request::FindCoordinator(_) = request {
        let own = || wire::Coordinator { broker_id: shared.hello.lock().unwrap().broker_id, ..Default::default() };
        let coordinator = shared.coordinator.lock().unwrap().clone().unwrap_or_else(own);
        let coordinators = vec![coordinator];
        return Response::FindCoordinator(wire::FindCoordinatorResponse { coordinators });
    }
    let answer = shared.answer.lock().unwrap().clone();
    if !matches!(request, call::Request::Metadata(_)) {
        shared.calls.lock().unwrap().push(request.clone());
    }
    if let Some(response) = answer(request) {
        return response;
    }
    match request {
        call::Request::Metadata(asked) => Response::Metadata(wire::MetadataResponse {
            topics: asked.topics.iter().filter(|t| *t == TOPIC).map(|_| topic(shared)).collect(),
            ..wire::MetadataResponse::default()
        }),
        call::Request::AllocateProducerId(asked) => {
            let epoch = asked.producer_id.map_or(0, |_| asked.producer_epoch + 1);
            let producer_id = asked.producer_id.unwrap_or(4000);
            Response::AllocateProducerId(wire::AllocateProducerIdResponse { producer_id, producer_epoch: epoch })
        }
        call::Request::ListOffsets(asked) => offsets(asked, |_| None),
        call::Request::FetchOffsets(_) => Response::FetchOffsets(wire::FetchOffsetsResponse::default()),
        call::Request::CommitOffsets(asked) => Response::CommitOffsets(wire::CommitOffsetsResponse {
            results: vec![wire::Error::default(); asked.offsets.len()],
        }),
        other => panic!("the test answers no {other:?}"),
    }
}

fn topic(shared: &Shared) -> wire::TopicMetadata {
    let partition = |partition| wire::PartitionMetadata { partition, leader: 1, leader_epoch: 3, ..Default::default() };
    wire::TopicMetadata {
        name: TOPIC.into(),
        topic_id: TOPIC_ID.to_wire(),
        replication_factor: 1,
        partitions: (0..shared.partitions).map(partition).collect(),
        max_message_bytes: shared.max_message_bytes,
        ..wire::TopicMetadata::default()
    }
}

/// What metadata says of the one topic where it has this id and so many partitions.
pub fn metadata(topic_id: TopicId, partitions: u32) -> Response {
    let partition = |partition| wire::PartitionMetadata { partition, leader: 1, leader_epoch: 3, ..Default::default() };
    let topic = wire::TopicMetadata {
        name: TOPIC.into(),
        topic_id: topic_id.to_wire(),
        partitions: (0..partitions).map(partition).collect(),
        ..wire::TopicMetadata::default()
    };
    Response::Metadata(wire::MetadataResponse { topics: vec![topic], ..Default::default() })
}

/// Answers every question about an offset with what `refusal` says of its partition, or else with offset 0.
pub fn offsets(asked: &wire::ListOffsets, refusal: impl Fn(u32) -> Option<ErrorCode>) -> Response {
    let answer = |q: &wire::OffsetQuery| wire::OffsetAnswer {
        topic: q.topic.clone(),
        partition: q.partition,
        error: refusal(q.partition).map(|code| wire::Error::new(code, format!("refused as {code}"))),
        ..wire::OffsetAnswer::default()
    };
    Response::ListOffsets(wire::ListOffsetsResponse { answers: asked.queries.iter().map(answer).collect() })
}

/// A batch of records with these values, as a leader keeps it.
pub fn batch(base_offset: i64, values: &[&[u8]]) -> Bytes {
    let mut builder = BatchBuilder::new(BuildOptions { base_offset, leader_epoch: 3, ..BuildOptions::default() });
    for (i, value) in values.iter().enumerate() {
        builder.append(1_000 + i as i64, None, Some(value), &[]);
    }
    builder.build().unwrap()
}

/// Batches of one record of `bytes` each.
pub fn batches(base_offset: i64, count: usize, bytes: usize) -> Vec<Bytes> {
    (0..count).map(|i| batch(base_offset + i as i64, &[&vec![i as u8; bytes]])).collect()
}

/// A member of the group `billing`.
pub async fn member_of_billing(peer: &Peer, set: impl FnOnce(ConsumerBuilder) -> ConsumerBuilder) -> Consumer {
    let builder = peer.client().await.consumer().group("billing").topics([TOPIC]);
    within("build", set(builder).build()).await.unwrap()
}

pub fn partitions(partitions: &[u32]) -> Vec<wire::TopicPartitions> {
    let topic =
        wire::TopicPartitions { topic: TOPIC.into(), topic_id: TOPIC_ID.to_wire(), partitions: partitions.to_vec() };
    if partitions.is_empty() { Vec::new() } else { vec![topic] }
}

/// Gives a member its partitions.
pub async fn assign(stream: &mut PeerStream, member_epoch: i32, owns: &[u32]) {
    let update = MemberUpdate {
        member_epoch,
        assignment: partitions(owns),
        heartbeat_interval_ms: 100,
        ..MemberUpdate::default()
    };
    stream.send(&update, &[]).await;
}

/// Lets the consumer join, and gives it the topic's first partition: the membership's stream, and that of reading it.
pub async fn joined(peer: &mut Peer, member_epoch: i32) -> (PeerStream, PeerStream) {
    let (mut member, _) = peer.member().await;
    assign(&mut member, member_epoch, &[0]).await;
    let (fetch, _) = peer.fetch(1000).await;
    owns(&mut member, &[0]).await;
    (member, fetch)
}

/// Refuses a member for this reason.
pub async fn refuse(member: &mut PeerStream, code: ErrorCode) {
    let error = Some(wire::Error::new(code, format!("refused as {code}")));
    member.send(&MemberUpdate { error, ..MemberUpdate::default() }, &[]).await;
}

/// The next heartbeat that says the member owns exactly these.
pub async fn owns(stream: &mut PeerStream, expected: &[u32]) -> MemberHeartbeat {
    within("letting go or taking on", async {
        loop {
            let (heartbeat, _) = stream.frame::<MemberHeartbeat>().await.expect("a heartbeat");
            if heartbeat.owned == partitions(expected) {
                return heartbeat;
            }
        }
    })
    .await
}

/// The first heartbeat of this epoch says that the member owns these: it has heard of the epoch, and let go of nothing yet.
pub async fn owns_in_epoch(stream: &mut PeerStream, member_epoch: i32, expected: &[u32]) {
    let heartbeat = within("a heartbeat of the epoch", async {
        loop {
            // One may have been on its way when the epoch began.
            let (heartbeat, _) = stream.frame::<MemberHeartbeat>().await.expect("a heartbeat");
            if heartbeat.member_epoch == member_epoch {
                return heartbeat;
            }
        }
    });
    assert_eq!(heartbeat.await.owned, partitions(expected), "the application has something in hand");
}

/// What was committed since this was last asked: epoch, partition, offset, leader epoch.
pub fn commits(peer: &Peer) -> Vec<(i32, u32, i64, i32)> {
    let commit = |call| match call {
        call::Request::CommitOffsets(c) => Some(c),
        _ => None,
    };
    let commits = peer.calls().into_iter().filter_map(commit);
    commits
        .flat_map(|c| {
            let epoch = c.member_epoch;
            c.offsets.into_iter().map(move |o| (epoch, o.partition, o.offset, o.leader_epoch))
        })
        .collect()
}

/// Accepts the fetch streams of these partitions, in order of their numbers.
pub async fn fetches(peer: &mut Peer, count: usize) -> Vec<(PeerStream, wire::OpenFetch)> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(peer.fetch(1000).await);
    }
    streams.sort_by_key(|(_, open)| open.partition);
    streams
}

pub async fn next_offset(consumer: &mut Consumer) -> i64 {
    within("a record", consumer.next()).await.unwrap().unwrap().offset
}
