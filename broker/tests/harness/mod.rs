//! A broker in this process and a client made of frames: what a test says on the wire is exactly what it writes down.
#![allow(dead_code, unreachable_pub, reason = "a module of each test binary, which uses a part of it")]

pub mod members;

use bytes::Bytes;
use headwater_broker::{Broker, config::BrokerConfig, quic};
use headwater_proto::batch::{BatchBuilder, BuildOptions, Records};
use headwater_proto::frame::{self, FrameDecoder, FrameEvent};
use headwater_proto::limits::{ALPN, MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES};
use headwater_proto::wire::{self, call, call_response, open};
use headwater_storage::sim::SimFiles;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// Nothing here takes long; what takes longer than this hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

pub fn config(dir: &Path) -> BrokerConfig {
    let mut config = BrokerConfig { data_dir: dir.to_owned(), ..BrokerConfig::default() };
    config.set_pair("listen=127.0.0.1:0").unwrap();
    config.set_pair("admin.listen=127.0.0.1:0").unwrap();
    config
}

pub async fn start(dir: &Path) -> Broker {
    within("start", Broker::start(config(dir))).await.unwrap()
}

pub async fn start_with(dir: &Path, pairs: &[&str]) -> Broker {
    let mut config = config(dir);
    pairs.iter().for_each(|pair| config.set_pair(pair).unwrap());
    within("start", Broker::start(config)).await.unwrap()
}

/// A broker on a simulated disk.
pub async fn start_on(dir: &Path, files: &Arc<SimFiles>, pairs: &[&str]) -> Broker {
    let mut config = config(dir);
    pairs.iter().for_each(|pair| config.set_pair(pair).unwrap());
    let files = Arc::clone(files);
    within("start", Broker::start_on(config, files)).await.unwrap()
}

/// A connection of a client.
pub struct Client {
    pub connection: quinn::Connection,
    endpoint: quinn::Endpoint,
}

impl Client {
    /// Past the handshake, before hello.
    pub async fn connect_silently(broker: &Broker) -> Client {
        Client::connect_with_window(broker, 16 << 20).await
    }

    /// As [`Client::connect_silently`]: a stream takes in `stream_window` bytes that were not read yet.
    pub async fn connect_with_window(broker: &Broker, stream_window: u32) -> Client {
        Client::connect_at(broker, broker.listen_addr(), stream_window).await
    }

    /// As [`Client::connect_with_window`], by a way of its own.
    pub async fn connect_at(broker: &Broker, address: SocketAddr, stream_window: u32) -> Client {
        let endpoint = client_endpoint("127.0.0.1:0");
        let config = client_config(client_tls(broker), stream_window);
        let connecting = endpoint.connect_with(config, address, "localhost").unwrap();
        let connection = within("handshake", connecting).await.unwrap();
        Client { connection, endpoint }
    }

    pub async fn connect(broker: &Broker) -> Client {
        let client = Client::connect_silently(broker).await;
        client.greet().await;
        client
    }

    pub async fn greet(&self) {
        let answer = self.call(call::Request::Hello(hello())).await;
        assert!(matches!(answer, call_response::Response::Hello(_)), "{answer:?}");
    }

    pub async fn open(&self, stream: open::Stream) -> Stream {
        let (mut send, recv) = within("a stream", self.connection.open_bi()).await.unwrap();
        send.write_chunk(frame::encode(&wire::Open { stream: Some(stream) }, 0)).await.unwrap();
        Stream { send, recv }
    }

    pub async fn call(&self, request: call::Request) -> call_response::Response {
        self.call_as(Bytes::new(), request).await
    }

    /// A call under this command id.
    pub async fn call_as(&self, command_id: Bytes, request: call::Request) -> call_response::Response {
        let call = wire::Call { request: Some(request), command_id, ..wire::Call::default() };
        let stream = self.open(open::Stream::Call(call)).await;
        FrameReader::<wire::CallResponse>::new(stream.recv).next().await.unwrap().0.response.unwrap()
    }

    pub async fn create_topic(&self, name: &str, partitions: u32, config: &[(&str, &str)]) -> Bytes {
        let config = config
            .iter()
            .map(|(name, value)| wire::ConfigChange { name: (*name).into(), value: Some((*value).into()) })
            .collect();
        let create = wire::CreateTopic { name: name.into(), partitions, config, ..Default::default() };
        match self.call(call::Request::CreateTopic(create)).await {
            call_response::Response::CreateTopic(created) => created.topic_id,
            other => panic!("{other:?}"),
        }
    }

    pub async fn allocate_producer_id(&self) -> i64 {
        match self.call(call::Request::AllocateProducerId(wire::AllocateProducerId::default())).await {
            call_response::Response::AllocateProducerId(allocated) => allocated.producer_id,
            other => panic!("{other:?}"),
        }
    }

    pub async fn produce(&self, open: wire::OpenProduce) -> (Produce, wire::ProduceOpened) {
        let stream = self.open(open::Stream::Produce(open)).await;
        let mut opened = FrameReader::<wire::ProduceOpened>::new(stream.recv);
        let answer = opened.next().await.unwrap().0;
        let credit = answer.credit_bytes;
        (Produce { send: stream.send, frames: opened.followed_by(), credit, requests: 0 }, answer)
    }

    pub async fn fetch(&self, open: wire::OpenFetch) -> (Fetch, wire::FetchOpened) {
        let stream = self.open(open::Stream::Fetch(open)).await;
        let mut opened = FrameReader::<wire::FetchOpened>::new(stream.recv);
        let answer = opened.next().await.unwrap().0;
        (Fetch { send: stream.send, frames: opened.followed_by() }, answer)
    }
}

/// The TLS settings of a client that trusts this broker.
pub fn client_tls(broker: &Broker) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    let ca = rustls_pki_types::CertificateDer::from_pem_slice(broker.ca_pem().unwrap().as_bytes()).unwrap();
    roots.add(ca).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(quic::crypto_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls
}

pub fn client_config(tls: rustls::ClientConfig, stream_window: u32) -> quinn::ClientConfig {
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut client = quinn::ClientConfig::new(Arc::new(tls));
    let mut transport = quinn::TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(6500);
    transport
        .stream_receive_window(stream_window.into())
        .receive_window((128u32 << 20).into())
        .send_window(256 << 20)
        .mtu_discovery_config(Some(discovery))
        .keep_alive_interval(Some(Duration::from_secs(2)));
    client.transport_config(Arc::new(transport));
    client
}

/// The clients' end, on an address of its own.
pub fn client_endpoint(address: &str) -> quinn::Endpoint {
    let mut settings = quinn::EndpointConfig::default();
    settings.max_udp_payload_size(6500).unwrap();
    let socket = std::net::UdpSocket::bind(address).unwrap();
    quinn::Endpoint::new(settings, None, socket, Arc::new(quinn::TokioRuntime)).unwrap()
}

/// What the admin port answers.
pub async fn get(admin: SocketAddr, path: &str) -> String {
    let mut http = within("a connection", tokio::net::TcpStream::connect(admin)).await.unwrap();
    http.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer", http.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// A number that the broker tells of itself, by its name and labels; 0 where it says nothing of it yet.
pub async fn sample(broker: &Broker, name: &str) -> f64 {
    let text = get(broker.admin_addr(), "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

pub fn hello() -> wire::Hello {
    wire::Hello { min_version: 1, max_version: 1, client_id: "test".into(), ..Default::default() }
}

pub fn open_produce(topic_id: &Bytes, partition: u32) -> wire::OpenProduce {
    wire::OpenProduce { topic_id: topic_id.clone(), partition, producer_id: -1, leader_epoch: -1, ..Default::default() }
}

pub fn open_fetch(topic_id: &Bytes, partition: u32, offset: i64) -> wire::OpenFetch {
    wire::OpenFetch {
        topic_id: topic_id.clone(),
        partition,
        offset,
        position_leader_epoch: -1,
        leader_epoch: -1,
        min_bytes: 1,
        max_wait_ms: 500,
        credit_bytes: 1 << 20,
        background: false,
        ..wire::OpenFetch::default()
    }
}

pub struct Stream {
    pub send: quinn::SendStream,
    pub recv: quinn::RecvStream,
}

/// Whole frames of a stream.
pub struct FrameReader<M> {
    recv: quinn::RecvStream,
    decoder: FrameDecoder<M>,
}

impl<M: Message + Default> FrameReader<M> {
    pub fn new(recv: quinn::RecvStream) -> Self {
        FrameReader { recv, decoder: FrameDecoder::new(MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES) }
    }

    pub fn followed_by<N: Message + Default>(self) -> FrameReader<N> {
        FrameReader { recv: self.recv, decoder: self.decoder.followed_by().unwrap() }
    }

    /// The next frame, or `None` at the end of the stream; a reset is an error.
    pub async fn try_next(&mut self) -> Result<Option<(M, Bytes)>, quinn::ReadError> {
        let mut found: Option<M> = None;
        let mut payload = Vec::new();
        loop {
            while let Some(event) = self.decoder.next_event().unwrap() {
                match event {
                    FrameEvent::Header { message, payload_bytes: 0 } => return Ok(Some((message, Bytes::new()))),
                    FrameEvent::Header { message, .. } => found = Some(message),
                    FrameEvent::Payload { part, remaining } => {
                        payload.extend_from_slice(&part);
                        if remaining == 0 {
                            return Ok(Some((found.take().unwrap(), payload.into())));
                        }
                    }
                }
            }
            match self.recv.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => return Ok(None),
            }
        }
    }

    pub async fn next(&mut self) -> Option<(M, Bytes)> {
        within("a frame", self.try_next()).await.unwrap()
    }
}

/// A produce stream.
pub struct Produce {
    pub send: quinn::SendStream,
    pub frames: FrameReader<wire::ProduceResponse>,
    /// Bytes that may still be sent.
    pub credit: u64,
    pub requests: u64,
}

impl Produce {
    /// Sends one request, its payload in pieces as the credit permits. Returns its number.
    pub async fn request(&mut self, payload: &[u8]) -> u64 {
        self.requests += 1;
        let header = wire::ProduceRequest { request_id: self.requests, partition: 0 };
        self.request_as(header, payload).await
    }

    pub async fn request_as(&mut self, header: wire::ProduceRequest, mut payload: &[u8]) -> u64 {
        let id = header.request_id;
        self.send.write_chunk(frame::encode(&header, payload.len())).await.unwrap();
        while !payload.is_empty() {
            let n = payload.len().min(usize::try_from(self.credit).unwrap());
            if n == 0 {
                let response = self.response().await.expect("credit");
                assert_eq!((response.request_id, response.error), (0, None), "only credit was expected");
                continue;
            }
            let (now, later) = payload.split_at(n);
            self.send.write_all(now).await.unwrap();
            self.credit -= n as u64;
            payload = later;
        }
        id
    }

    pub async fn response(&mut self) -> Option<wire::ProduceResponse> {
        let (response, _) = self.frames.next().await?;
        self.credit += response.credit_bytes;
        Some(response)
    }

    /// The next response that is about a request.
    pub async fn answer(&mut self) -> wire::ProduceResponse {
        loop {
            let response = self.response().await.expect("an answer");
            if response.request_id > 0 || response.error.is_some() {
                return response;
            }
        }
    }
}

/// A fetch stream.
pub struct Fetch {
    pub send: quinn::SendStream,
    pub frames: FrameReader<wire::FetchData>,
}

impl Fetch {
    pub async fn grant(&mut self, credit_bytes: u64) {
        self.send.write_chunk(frame::encode(&wire::FetchCredit { credit_bytes }, 0)).await.unwrap();
    }

    pub async fn data(&mut self) -> (wire::FetchData, Bytes) {
        self.frames.next().await.expect("data")
    }

    /// Reads until everything below `end` has come; grants as much as it reads.
    pub async fn read_to(&mut self, end: i64) -> Vec<(i64, Bytes)> {
        let mut bytes = Vec::new();
        loop {
            let (header, payload) = self.data().await;
            assert_eq!(header.error, None);
            bytes.extend_from_slice(&payload);
            self.grant(payload.len() as u64).await;
            if header.next_offset >= end {
                return values(&bytes.into());
            }
        }
    }
}

/// One uncompressed batch of these values.
/// What is answered to one record on a stream of its own.
pub async fn produced(client: &Client, topic: &Bytes, value: &[u8]) -> wire::ProduceResponse {
    let (mut produce, opened) = client.produce(open_produce(topic, 0)).await;
    if opened.error.is_some() {
        return wire::ProduceResponse { error: opened.error, ..Default::default() };
    }
    produce.request(&batch(&[value])).await;
    produce.answer().await
}

pub fn batch(values: &[&[u8]]) -> Bytes {
    batch_with(BuildOptions::default(), values)
}

pub fn batch_with(options: BuildOptions, values: &[&[u8]]) -> Bytes {
    let mut builder = BatchBuilder::new(options);
    for value in values {
        builder.append(1_700_000_000_000, None, Some(value), &[]);
    }
    builder.build().unwrap()
}

/// Offset and value of every record.
pub fn values(bytes: &Bytes) -> Vec<(i64, Bytes)> {
    let mut found = Vec::new();
    for batch in headwater_proto::batch::Batches::new(bytes) {
        let (position, header, batch) = batch.unwrap();
        headwater_proto::batch::check(batch).unwrap();
        let whole = bytes.slice(position..position + header.size());
        found.extend(Records::new(&whole).unwrap().map(|record| {
            let record = record.unwrap();
            (record.offset, record.value.unwrap())
        }));
    }
    found
}
