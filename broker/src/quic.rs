//! How QUIC is set up: transport settings, TLS and the socket.
//!
//! Owns: the numbers, with their reasons, and [`endpoint`]. Refuses: certificates (see [`crate::tls`]) and connections.
//! Read next: [`crate::server`].
//!
//! *Credits bind, QUIC's windows never do*: the windows here are larger than all credit that may be outstanding. Where a
//! connection's window binds, quinn wakes every blocked stream last-in-first-out, and a few readers that do not read stop
//! all others on their connection; where the sum of the credits fits, shares are equal within 1 %.

use crate::config::BrokerConfig;
use crate::credit::CreditLimits;
use crate::tls::live::Live;
use aws_lc_rs::hmac;
use headwater_proto::limits::ALPN;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::server::ResolvesServerCert;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of fetch credit that a client may have outstanding on one connection. The broker keeps none of them in memory:
/// what is on its way are slices of mapped segments.
pub(crate) const FETCH_CREDIT_BYTES: u64 = 64 << 20;

/// Produce credit on one connection: see [`crate::credit`].
pub(crate) const PRODUCE_CREDIT: CreditLimits = CreditLimits {
    connection_bytes: 64 << 20,
    stream_max_bytes: 4 << 20,
    stream_min_bytes: 4 << 10,
    stream_initial_bytes: 1 << 20,
};

/// Bytes that the loans of one connection may have outstanding: its streams take turns, and a loan goes out in parts.
pub(crate) const LOAN_PART_BYTES: u64 = PRODUCE_CREDIT.stream_max_bytes;

/// Window of one stream: the largest share, a loan's part, and room for the headers of frames, which credit does not count.
const STREAM_RECEIVE_WINDOW_BYTES: u32 = 16 << 20;

/// Room in the windows for what credit does not count: frame headers, calls, heartbeats.
const UNCOUNTED_BYTES: u64 = 32 << 20;

const _: () = assert!(PRODUCE_CREDIT.stream_max_bytes + LOAN_PART_BYTES < STREAM_RECEIVE_WINDOW_BYTES as u64);

/// First congestion window in bytes. A local network takes that much at once, and a group commit's worth of
/// acknowledgements or a first fetch does not wait for slow start.
const INITIAL_WINDOW_BYTES: u64 = 1_300_000;

/// The transport settings of every connection.
pub(crate) fn transport(config: &BrokerConfig) -> TransportConfig {
    let streams = u64::from(config.max_streams_per_connection);
    let receive_window =
        PRODUCE_CREDIT.connection_bytes + streams * PRODUCE_CREDIT.stream_min_bytes + LOAN_PART_BYTES + UNCOUNTED_BYTES;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(config.max_streams_per_connection))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW_BYTES))
        .receive_window(VarInt::from_u64(receive_window).unwrap_or(VarInt::MAX))
        .send_window(FETCH_CREDIT_BYTES + UNCOUNTED_BYTES)
        .max_idle_timeout(IdleTimeout::try_from(Duration::from_millis(config.idle_timeout_ms)).ok())
        .mtu_discovery_config(Some(mtu_discovery(config.mtu)))
        .enable_segmentation_offload(true)
        .congestion_controller_factory(Arc::new(congestion()));
    transport
}

fn mtu_discovery(upper_bound: u16) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(upper_bound);
    discovery
}

fn congestion() -> CubicConfig {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    cubic
}

/// The cryptography: aws-lc-rs (5 to 20 % faster than ring at large packets), TLS 1.3 alone, AES-128-GCM first (ChaCha20
/// costs a third to a half of the throughput where the processor has AES).
pub fn crypto_provider() -> CryptoProvider {
    let mut crypto = provider::default_provider();
    crypto.cipher_suites = vec![
        provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
        provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    crypto
}

/// Why the endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The certificate or its key does not do.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No usable first cipher suite for QUIC.
    #[error("TLS: {0}")]
    NoSuite(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// A transport setting out of its range.
    #[error("QUIC: {0}")]
    Transport(#[from] quinn::ConfigError),
    /// The socket does not do.
    #[error("UDP socket: {0}")]
    Socket(#[from] std::io::Error),
}

/// Bytes of the secret that outlives the process.
pub const SECRET_BYTES: usize = 32;

/// An endpoint as a broker's, on a socket that is bound, which shows this certificate and asks for none. To be called within a tokio
/// runtime.
pub fn endpoint(
    config: &BrokerConfig,
    socket: UdpSocket,
    certificates: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    secret: &[u8; SECRET_BYTES],
) -> Result<quinn::Endpoint, QuicError> {
    let tls = rustls::ServerConfig::builder_with_provider(Arc::new(crypto_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    listen(config, socket, tls, secret)
}

/// As [`endpoint`], with the certificates in use at each handshake: what is shown, and who may show what.
pub(crate) fn endpoint_of(
    config: &BrokerConfig,
    socket: UdpSocket,
    live: &Arc<Live>,
    secret: &[u8; SECRET_BYTES],
) -> Result<quinn::Endpoint, QuicError> {
    let tls = rustls::ServerConfig::builder_with_provider(Arc::clone(live.provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::clone(live) as Arc<dyn ClientCertVerifier>)
        .with_cert_resolver(Arc::clone(live) as Arc<dyn ResolvesServerCert>);
    listen(config, socket, tls, secret)
}

/// `secret` is the same at every start: with it a broker that was killed and started again answers packets of its earlier
/// connections with a stateless reset, and clients reconnect at once instead of waiting for their idle timeout.
fn listen(
    config: &BrokerConfig,
    socket: UdpSocket,
    mut tls: rustls::ServerConfig,
    secret: &[u8; SECRET_BYTES],
) -> Result<quinn::Endpoint, QuicError> {
    // No tickets: a session that is resumed shows no certificate, and would outlive its expiry, its renewal and its authority.
    tls.send_tls13_tickets = 0;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // 0-RTT data can be replayed, and an append must not be: none is accepted.
    tls.max_early_data_size = 0;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    server.transport_config(Arc::new(transport(config)));
    // Handshakes that are under way and not accepted yet; each may buffer its first packets.
    server.max_incoming(config.max_connections as usize).incoming_buffer_size_total(64 << 20);
    let mut endpoint_config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, secret)));
    // The key only tells our connection ids from noise, so the secret's first bytes do.
    let cid_key = secret.iter().take(8).fold(0, |key: u64, byte| key << 8 | u64::from(*byte));
    endpoint_config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
    endpoint_config.max_udp_payload_size(config.mtu.max(1472))?;
    Ok(quinn::Endpoint::new(endpoint_config, Some(server), socket, Arc::new(quinn::TokioRuntime))?)
}

/// Bytes of both socket buffers: 208 KiB, the usual default, loses packets whenever a burst meets a busy endpoint (168
/// congestion events against 10 in a gigabyte).
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Binds the socket: before recovery, so that an address that is taken is known at once.
pub fn bind(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    for (name, set) in [
        ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)),
        ("send", socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)),
    ] {
        if let Err(error) = set {
            tracing::warn!(%error, buffer = name, bytes = SOCKET_BUFFER_BYTES, "socket buffer stays at the system's size");
        }
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}
