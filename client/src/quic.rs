//! How QUIC is set up: packets, windows, sockets, TLS.
//!
//! Owns: the transport's settings and the reasons for them. Refuses: what is sent. Read next: `connection.rs`.
//!
//! Credits bind and windows never do (quinn wakes streams blocked on a window last-in-first-out, which starves the
//! others): the windows here are larger than all the credit that may be outstanding on a connection.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{ClientIdentity, ConfigError};
use headwater_proto::limits::ALPN;

/// Largest packet that discovery tries, in bytes of UDP payload: ten of them fit one segmented send of 64 KiB.
pub const MTU_UPPER_BOUND: u16 = 6_500;
/// Ten segments of more than this do not fit one send: the system refuses it, and packets fall back to 1,200 bytes.
const MTU_WITH_OFFLOAD: u16 = 65_507 / 10;
/// Bytes a broker may have on the way to this client, on one connection.
pub const RECEIVE_WINDOW_BYTES: u32 = 80 << 20;
/// Bytes of fetch credit this client ever has outstanding on one connection: below the receive window by more than
/// frame headers and call answers can need.
pub const FETCH_CREDIT_BYTES: u64 = 64 << 20;
/// Bytes this client may have on the way to a broker before the broker's credit is known.
const SEND_WINDOW_BYTES: u64 = 40 << 20;
/// Asked of the system for each socket, both ways: fewer packets are lost in bursts.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// A peer that is silent for longer is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Congestion window to begin with: a fresh connection to a fast path does not crawl.
const INITIAL_CONGESTION_WINDOW_BYTES: u64 = 1_300_000;

/// The transport's settings, for either side. `mtu`: see [`crate::ClientConfig::mtu`].
pub fn transport(mtu: Option<u16>) -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(mtu.unwrap_or(MTU_UPPER_BOUND));
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(INITIAL_CONGESTION_WINDOW_BYTES);
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(Duration::from_millis(100))
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .enable_segmentation_offload(mtu.unwrap_or(MTU_UPPER_BOUND) <= MTU_WITH_OFFLOAD)
        .congestion_controller_factory(Arc::new(congestion))
        .mtu_discovery_config(Some(discovery));
    if let Some(mtu) = mtu {
        transport.initial_mtu(mtu);
    }
    transport
}

/// An endpoint on `local` with large socket buffers, on the current tokio runtime.
///
/// # Errors
/// When the socket cannot be made or bound.
pub fn endpoint(
    local: SocketAddr,
    mtu: Option<u16>,
    server: Option<quinn::ServerConfig>,
) -> std::io::Result<quinn::Endpoint> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
    if local.is_ipv6() {
        // Where a system has no dual-stack sockets, IPv6 alone is served.
        let _ = socket.set_only_v6(false);
    }
    // The system may grant less: slower under bursts, never wrong.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.bind(&local.into())?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(mtu.unwrap_or(MTU_UPPER_BOUND).max(1472)).map_err(std::io::Error::other)?;
    quinn::Endpoint::new(config, server, socket.into(), Arc::new(TokioRuntime))
}

/// A client's endpoint: any free port, both families where the system has them.
pub(crate) fn client_endpoint(mtu: Option<u16>) -> std::io::Result<quinn::Endpoint> {
    endpoint((Ipv6Addr::UNSPECIFIED, 0).into(), mtu, None)
        .or_else(|_| endpoint((Ipv4Addr::UNSPECIFIED, 0).into(), mtu, None))
}

/// TLS 1.3 with the authorities of `ca_pem`, this protocol's name, no early data.
///
/// # Errors
/// When `ca_pem` holds no usable certificate, `identity` no certificate with its key, or `mtu` is out of range.
pub fn client_config(
    ca_pem: &[u8],
    identity: Option<&ClientIdentity>,
    mtu: Option<u16>,
) -> Result<quinn::ClientConfig, ConfigError> {
    if let Some(mtu) = mtu
        && !(1200..=65_527).contains(&mtu)
    {
        return Err(ConfigError::Mtu(mtu));
    }
    let certificates = |e: &dyn std::fmt::Display| ConfigError::Certificates(e.to_string());
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem) {
        roots.add(certificate.map_err(|e| certificates(&e))?).map_err(|e| certificates(&e))?;
    }
    if roots.is_empty() {
        return Err(ConfigError::Certificates("no certificate in it".into()));
    }
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| certificates(&e))?
        .with_root_certificates(roots);
    let mut tls = match identity {
        None => tls.with_no_client_auth(),
        Some(ClientIdentity { certificate_pem, key_pem, .. }) => {
            let unusable = |e: &dyn std::fmt::Display| ConfigError::Identity(e.to_string());
            let chain = CertificateDer::pem_slice_iter(certificate_pem).collect::<Result<Vec<_>, _>>();
            let chain = chain.map_err(|e| unusable(&e))?;
            let mut made = Err(unusable(&"no key in it"));
            // While a certificate is renewed, there are its old key and its new one.
            for key in PrivateKeyDer::pem_slice_iter(key_pem) {
                let key = key.map_err(|e| unusable(&format!("the key: {e}")))?;
                made = tls.clone().with_client_auth_cert(chain.clone(), key).map_err(|e| unusable(&e));
                if made.is_ok() {
                    break;
                }
            }
            made?
        }
    };
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.enable_early_data = false;
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).map_err(|e| certificates(&e))?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport(mtu)));
    Ok(config)
}

/// aws-lc-rs with AES-128-GCM preferred: the fastest here, and as strong as anybody needs.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

const _: () = assert!(MTU_UPPER_BOUND <= MTU_WITH_OFFLOAD);
const _: () = assert!(FETCH_CREDIT_BYTES < RECEIVE_WINDOW_BYTES as u64);
