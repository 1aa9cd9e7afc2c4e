//! Connections to other brokers: who is dialled is who must answer.
//!
//! A broker that dials another one shows its own certificate and takes no other than that of the broker it means, signed by
//! the cluster's authority; where the certificate comes from and under which host name does not count, since a broker may come back at
//! another address, and its id is what the metadata knows it by. Then it says hello as a peer, which the other side allows
//! to brokers alone. Streams that one broker alone may open check it again: [`Principal::require_broker`].
//!
//! Whoever speaks to brokers in its own way, on an endpoint of its own or to whichever broker is there, takes the same settings
//! ([`Peers::client_config`]) and asks who the other side is ([`Peers::principal`]), which dialled or was dialled.
//!
//! Owns: [`Peers`]. Refuses: to keep connections, to try again, and to know what is sent on them; and sessions that are resumed, which show
//! no certificate. Read next: [`crate::tls::live`], and [`crate::session`] for the other side.
//!
//! [`Principal::require_broker`]: crate::tls::principal::Principal::require_broker

use crate::config::BrokerConfig;
use crate::metadata::raft::new_node_id;
use crate::quic;
use crate::stream::{Frames, StreamError, send_within};
use crate::tls::live::Live;
use crate::tls::principal::{Holder, Principal, Stranger};
use headwater_proto::limits::{ALPN, MAX_OPEN_FRAME_BYTES, PROTOCOL_VERSION};
use headwater_proto::wire::{
    self, CallResponse, ConnectionRole, Hello, HelloResponse, Open, OpenRaft, RaftOpened, call,
    call_response::Response, open,
};
use headwater_proto::{ErrorCode, ResetCode};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, IdleTimeout, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// An idle connection says that it lives so often,
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// and one that is silent for so long is over.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// What is said where nobody says anything.
const LATE: &str = "no answer in time";

/// What the handshake calls the other side; its certificate is not asked for it.
pub(crate) const HANDSHAKE_NAME: &str = "broker.headwater.invalid";

/// Dials other brokers as this one.
#[derive(Clone)]
pub struct Peers {
    endpoint: quinn::Endpoint,
    live: Arc<Live>,
    config: Arc<BrokerConfig>,
    cluster_id: String,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers").field("live", &self.live).finish_non_exhaustive()
    }
}

/// A broker that was met at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Met {
    pub(crate) cluster_id: String,
    pub(crate) broker_id: i32,
    /// It is a cluster by itself, and takes nobody in.
    pub(crate) is_alone: bool,
}

/// A connection to another broker, past its hello.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PeerConnection {
    /// The connection.
    pub connection: quinn::Connection,
    /// So many streams the other side takes on it at once: whoever opens one more waits for another to end.
    pub max_streams: u32,
}

/// Why another broker was not reached.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// This broker has nothing to show.
    #[error("this broker cannot dial others: {0}")]
    NoIdentity(String),
    /// The address leads nowhere.
    #[error("broker {broker_id} at {address}: {why}")]
    Unreachable {
        /// Who was meant.
        broker_id: i32,
        /// Where.
        address: String,
        /// What the system or the transport says.
        why: String,
    },
    /// Somebody else answered, or a broker whose certificate does not hold.
    #[error("whoever answers at {address} is not broker {broker_id}: {why}")]
    Impostor {
        /// Who was meant.
        broker_id: i32,
        /// Where.
        address: String,
        /// What it showed instead.
        why: String,
    },
    /// The other side does not take this broker for one.
    #[error("broker {broker_id} at {address} refuses this broker: {why}")]
    Refused {
        /// Who was asked.
        broker_id: i32,
        /// Where.
        address: String,
        /// What it says.
        why: String,
    },
}

impl Peers {
    /// Dials from `endpoint`; the other side must be of this cluster.
    pub(crate) fn new(endpoint: quinn::Endpoint, live: Arc<Live>, config: &BrokerConfig, cluster_id: &str) -> Peers {
        Peers { endpoint, live, config: Arc::new(config.clone()), cluster_id: cluster_id.to_owned() }
    }

    /// The settings of connections to the broker with this id, or to any broker of the cluster. They stay good when certificates are
    /// renewed, for each handshake asks for those of its moment.
    ///
    /// # Errors
    /// [`PeerError::NoIdentity`].
    pub fn client_config(
        &self,
        broker_id: Option<i32>,
        transport: quinn::TransportConfig,
    ) -> Result<quinn::ClientConfig, PeerError> {
        self.client(&Expected::new(&self.live, broker_id), transport)
    }

    /// Who is at the other end of a connection, whichever side dialled.
    ///
    /// # Errors
    /// [`Stranger`]: a good certificate of nobody in this cluster.
    pub fn principal(&self, connection: &quinn::Connection) -> Result<Principal, Stranger> {
        self.live.principal(connection)
    }

    /// A connection to the broker with this id, past its hello. Everything of it is done by `deadline`.
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn connect(&self, broker_id: i32, address: &str, deadline: Instant) -> Result<PeerConnection, PeerError> {
        let unreachable = |why: String| PeerError::Unreachable { broker_id, address: address.to_owned(), why };
        let expected = Expected::new(&self.live, Some(broker_id));
        let mut transport = quic::transport(&self.config);
        transport
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
            // Who dials opens the streams.
            .max_concurrent_bidi_streams(VarInt::from_u32(0));
        let client = self.client(&expected, transport)?;
        let connection = dial(&self.endpoint, &client, HANDSHAKE_NAME, address, deadline).await;
        let connection = connection.map_err(|error| match expected.why_not() {
            Some(why) => PeerError::Impostor { broker_id, address: address.to_owned(), why },
            None => unreachable(error),
        })?;
        let greeted = timeout_at(deadline, self.greet(&connection, broker_id, address)).await;
        let greeted = greeted.map_err(|_| unreachable(LATE.into())).and_then(|greeted| greeted);
        if greeted.is_err() {
            // Whoever is there has been told, or is not who was meant.
            connection.close(ResetCode::Done.number().into(), b"");
        }
        greeted.map(|max_streams| PeerConnection { connection, max_streams })
    }

    /// No session is kept, so every connection shows certificates.
    fn client(
        &self,
        expected: &Arc<Expected>,
        transport: quinn::TransportConfig,
    ) -> Result<quinn::ClientConfig, PeerError> {
        let nothing = |why: &dyn std::fmt::Display| PeerError::NoIdentity(why.to_string());
        let identity = self.live.current();
        if !matches!(identity.name.as_ref().map(|name| &name.holder), Some(Holder::Broker(_))) {
            return Err(nothing(
                &"its certificate names no broker of a cluster (`headwater cert broker` makes one that does)",
            ));
        }
        if identity.trusted.is_none() {
            return Err(nothing(&"it knows no authority to check others with (tls.ca)"));
        }
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(self.live.provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| nothing(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(expected) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::clone(&self.live) as Arc<dyn ResolvesClientCert>);
        tls.alpn_protocols = vec![ALPN.to_vec()];
        tls.resumption = Resumption::disabled();
        tls.enable_early_data = false;
        tls.enable_sni = false;
        let mut client =
            quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(|error| nothing(&error))?));
        client.transport_config(Arc::new(transport));
        Ok(client)
    }

    /// Who is at an address, by its own word; its certificate is one of ours.
    pub(crate) async fn who_is_at(&self, address: &str, deadline: Instant) -> Result<Met, String> {
        let client = self.client_config(None, quic::transport(&self.config)).map_err(|error| error.to_string())?;
        let dialled = || dial(&self.endpoint, &client, HANDSHAKE_NAME, address, deadline);
        let close = |connection: &quinn::Connection| connection.close(ResetCode::Done.number().into(), b"");
        let asking = async {
            let connection = dialled().await?;
            let answer = self.say_hello(&connection).await;
            close(&connection);
            let hello = match answer.map_err(|error| error.to_string())? {
                Some(Response::Hello(hello)) => hello,
                Some(Response::Error(error)) => return Err(error.message),
                _ => return Err("it answers hello with something else".to_owned()),
            };
            // Members of a quorum have connections of their own.
            let connection = dialled().await?;
            let answer = self.say_raft_hello(&connection, &hello.cluster_id).await;
            close(&connection);
            let opened = answer.map_err(|error| error.to_string())?.ok_or("it does not answer")?;
            let HelloResponse { cluster_id, broker_id, .. } = hello;
            match opened.error {
                Some(error) if opened.node_id == 0 && error.code == ErrorCode::InvalidRequest.number() => {
                    Ok(Met { cluster_id, broker_id, is_alone: true })
                }
                Some(error) if opened.node_id == 0 => Err(error.message),
                _ => Ok(Met { cluster_id, broker_id, is_alone: false }),
            }
        };
        let asked = timeout_at(deadline, asking).await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        asked.map_err(|why| format!("{address}: {why}"))
    }

    /// What whoever is there says to a new member of its quorum, which nothing is asked for.
    async fn say_raft_hello(
        &self,
        connection: &quinn::Connection,
        cluster_id: &str,
    ) -> Result<Option<RaftOpened>, StreamError> {
        let patience = Duration::from_millis(self.config.frame_timeout_ms);
        let closed = |reason| StreamError::Read(quinn::ReadError::ConnectionLost(reason));
        let (mut send, recv) = connection.open_bi().await.map_err(closed)?;
        let hello = OpenRaft { cluster_id: cluster_id.to_owned(), from_node_id: new_node_id(), ..OpenRaft::default() };
        send_within(&mut send, &Open { stream: Some(open::Stream::Raft(hello)) }, patience, "hello").await?;
        Frames::<RaftOpened>::new(recv, MAX_OPEN_FRAME_BYTES, 0, patience).message().await
    }

    async fn say_hello(&self, connection: &quinn::Connection) -> Result<Option<Response>, StreamError> {
        let patience = Duration::from_millis(self.config.frame_timeout_ms);
        let closed = |reason| StreamError::Read(quinn::ReadError::ConnectionLost(reason));
        let (mut send, recv) = connection.open_bi().await.map_err(closed)?;
        let hello = Hello {
            min_version: PROTOCOL_VERSION,
            max_version: PROTOCOL_VERSION,
            client_id: format!("broker-{}", self.config.broker_id),
            client_software: crate::SOFTWARE.to_owned(),
            role: ConnectionRole::Peer.into(),
            cluster_id: self.cluster_id.clone(),
            features: Vec::new(),
        };
        let call = wire::Call { request: Some(call::Request::Hello(hello)), ..wire::Call::default() };
        let open = Open { stream: Some(open::Stream::Call(call)) };
        send_within(&mut send, &open, patience, "hello").await?;
        // An error means that it was stopped, which reading tells.
        drop(send.finish());
        let mut frames = Frames::<CallResponse>::new(recv, MAX_OPEN_FRAME_BYTES, 0, patience);
        Ok(frames.message().await?.and_then(|answer| answer.response))
    }

    /// Says hello. Returns how many streams the other side takes.
    async fn greet(&self, connection: &quinn::Connection, broker_id: i32, address: &str) -> Result<u32, PeerError> {
        let unreachable = |why: &dyn std::fmt::Display| PeerError::Unreachable {
            broker_id,
            address: address.into(),
            why: why.to_string(),
        };
        let refused = |why: String| PeerError::Refused { broker_id, address: address.to_owned(), why };
        let lost = |error: &dyn std::fmt::Display| match connection.close_reason() {
            // It judges our certificate after we have judged its own; TLS's alerts are errors 0x100 to 0x1ff.
            Some(ConnectionError::ConnectionClosed(close)) if (0x100..0x200).contains(&u64::from(close.error_code)) => {
                refused(format!("it does not take this broker's certificate ({})", close.error_code))
            }
            _ => unreachable(error),
        };
        let answer = self.say_hello(connection).await.map_err(|error| lost(&error))?;
        match answer {
            Some(Response::Hello(hello)) if hello.broker_id == broker_id => Ok(hello.max_streams),
            Some(Response::Hello(HelloResponse { broker_id: id, .. })) => Err(PeerError::Impostor {
                broker_id,
                address: address.to_owned(),
                why: format!("it shows that broker's certificate, and says that it is broker {id}"),
            }),
            Some(Response::Error(error)) => Err(refused(error.message)),
            _ => Err(refused("it answers hello with something else".into())),
        }
    }
}

/// Connects to whoever is behind an address, as `name`, by `deadline`: to the first that answers at the places that it resolves to.
///
/// # Errors
/// What became of the last attempt.
pub(crate) async fn dial(
    endpoint: &quinn::Endpoint,
    client: &quinn::ClientConfig,
    name: &str,
    address: &str,
    deadline: Instant,
) -> Result<quinn::Connection, String> {
    let found = timeout_at(deadline, tokio::net::lookup_host(address)).await.map_err(|_| LATE.to_owned())?;
    let places: Vec<SocketAddr> = found.map_err(|error| error.to_string())?.collect();
    dial_one_of(endpoint, client, name, &places, deadline).await
}

/// One after another. What is silent has its share of the time that is left, so that those behind it are tried too; the last has all of it.
async fn dial_one_of(
    endpoint: &quinn::Endpoint,
    client: &quinn::ClientConfig,
    name: &str,
    places: &[SocketAddr],
    deadline: Instant,
) -> Result<quinn::Connection, String> {
    let mut last = "the name has no address".to_owned();
    for (left, place) in (1..=u32::try_from(places.len()).unwrap_or(u32::MAX)).rev().zip(places) {
        let now = Instant::now();
        let until = now + deadline.saturating_duration_since(now) / left;
        last = match endpoint.connect_with(client.clone(), *place, name) {
            Ok(connecting) => match timeout_at(until, connecting).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => error.to_string(),
                Err(_) => LATE.to_owned(),
            },
            // Of a family that the socket does not have.
            Err(error) => error.to_string(),
        };
    }
    Err(last)
}

/// Takes the certificate of one broker, or of any.
#[derive(Debug)]
struct Expected {
    live: Arc<Live>,
    broker_id: Option<i32>,
    /// Why the last one was not taken: the handshake's own error says less.
    why_not: Mutex<Option<String>>,
}

impl Expected {
    fn new(live: &Arc<Live>, broker_id: Option<i32>) -> Arc<Expected> {
        Arc::new(Expected { live: Arc::clone(live), broker_id, why_not: Mutex::default() })
    }

    fn why_not(&self) -> Option<String> {
        self.why_not.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let identity = self.live.current();
        let trusted = identity.trusted.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        trusted.verify_server(end_entity, intermediates, now)?;
        let other = |error: Arc<dyn std::error::Error + Send + Sync>| CertificateError::Other(OtherError(error));
        let shown = Principal::of(end_entity, identity.cluster()).map_err(|error: Stranger| other(Arc::new(error)))?;
        let is_meant = match (self.broker_id, &shown) {
            (Some(meant), Principal::Broker(id)) => *id == meant,
            (None, Principal::Broker(_)) => true,
            (_, Principal::Client(_) | Principal::Anonymous) => false,
        };
        if is_meant { Ok(()) } else { Err(other(Arc::new(Shown(shown))).into()) }
    }
}

/// A good certificate of somebody else.
#[derive(Debug)]
struct Shown(Principal);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it shows the certificate of {}", self.0)
    }
}

impl std::error::Error for Shown {}

impl ServerCertVerifier for Expected {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion()).inspect_err(|error| {
            let why = match error {
                rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => why.to_string(),
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                    "another authority signed its certificate".to_owned()
                }
                error => error.to_string(),
            };
            *self.why_not.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.live.provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.live.provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.live.provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::crypto::rustls::QuicServerConfig;
    use rustls_pki_types::PrivatePkcs8KeyDer;

    /// Somebody who answers, and the settings of whoever believes him.
    fn somebody() -> (quinn::Endpoint, quinn::ClientConfig) {
        let made = rcgen::generate_simple_self_signed([HANDSHAKE_NAME.to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        let provider = Arc::new(quic::crypto_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
        let endpoint = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        (endpoint, quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap())))
    }

    /// A name that led to two places was tried at the first of them alone: one that is silent used up the time of the other.
    #[tokio::test]
    async fn all_places_of_a_name_are_tried_in_turn() {
        let (server, client) = somebody();
        let answers = server.local_addr().unwrap();
        let serving = tokio::spawn(async move { server.accept().await.unwrap().await.unwrap() });
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // A socket of one family reaches no place of the other.
        let unreachable = "[2001:db8::1]:9392".parse().unwrap();
        let from = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let places = [unreachable, silent.local_addr().unwrap(), answers];
        let deadline = Instant::now() + Duration::from_secs(3);
        let connection = dial_one_of(&from, &client, HANDSHAKE_NAME, &places, deadline).await.unwrap();
        assert_eq!(connection.remote_address(), answers);
        assert!(Instant::now() < deadline, "the silent one has its share alone");
        serving.await.unwrap();

        let deadline = Instant::now() + Duration::from_millis(200);
        let late = dial_one_of(&from, &client, HANDSHAKE_NAME, &places[..2], deadline).await.unwrap_err();
        assert_eq!(late, LATE);
        let nowhere = dial_one_of(&from, &client, HANDSHAKE_NAME, &[], deadline).await.unwrap_err();
        assert_eq!(nowhere, "the name has no address");
    }
}
