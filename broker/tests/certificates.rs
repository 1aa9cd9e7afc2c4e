//! Who is let in by which certificate, who is believed to be which broker, and certificates that are renewed while the broker runs. Real sockets;
//! the certificates are those that `headwater cert` makes, and some that it would not make.

mod harness;

use harness::*;
use headwater_broker::Broker;
use headwater_broker::peer::PeerError;
use headwater_broker::quic::crypto_provider;
use headwater_broker::tls::make::{Authority, Issued, Validity};
use headwater_broker::tls::principal::Principal;
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use headwater_proto::ErrorCode;
use headwater_proto::limits::ALPN;
use headwater_proto::wire::{self, ConnectionRole, call, call_response};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

fn a_day() -> Validity {
    Validity::from_now(now_s(), Duration::from_secs(86_400))
}

fn yesterday() -> Validity {
    Validity { not_before_s: now_s() - 2 * 86_400, not_after_s: now_s() - 86_400 }
}

/// A cluster's authority.
struct Ca {
    authority: Authority,
    pem: String,
    key_pem: String,
}

impl Ca {
    fn new(cluster: &str) -> Ca {
        let whole = Validity { not_before_s: now_s() - 9 * 86_400, not_after_s: now_s() + 9 * 86_400 };
        let (authority, issued) = Authority::make(cluster, whole, None).unwrap();
        Ca { authority, pem: issued.certificate_pem, key_pem: issued.key_pem }
    }

    fn broker(&self, id: i32) -> Issued {
        self.authority.broker(id, &["localhost".into(), "127.0.0.1".into()], a_day()).unwrap()
    }

    fn client(&self, name: &str) -> Issued {
        self.authority.client(name, a_day()).unwrap()
    }

    /// A certificate that this authority signs and the command does not make: the name and the use are free.
    fn odd(&self, uris: &[&str], usage: rcgen::ExtendedKeyUsagePurpose) -> Issued {
        let ca_key = rcgen::KeyPair::from_pem(&self.key_pem).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_pem(&self.pem, ca_key).unwrap();
        let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.subject_alt_names.extend(uris.iter().map(|uri| rcgen::SanType::URI((*uri).try_into().unwrap())));
        params.extended_key_usages = vec![usage];
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        // Its name is not looked at here.
        let name = "headwater://odd".parse().unwrap();
        Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem(), name }
    }
}

fn put(dir: &Path, issued: &Issued, ca_pem: &str) {
    std::fs::write(dir.join(CERTIFICATE_FILE), &issued.certificate_pem).unwrap();
    std::fs::write(dir.join(KEY_FILE), &issued.key_pem).unwrap();
    std::fs::write(dir.join(CA_FILE), ca_pem).unwrap();
}

/// A broker of the cluster, its folder, and nothing configured: the certificates lie in the folder.
async fn broker(ca: &Ca, id: i32) -> (tempfile::TempDir, Broker) {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &ca.broker(id), &ca.pem);
    let broker = start_with(dir.path(), &[&format!("broker.id={id}"), "tls.reload.interval.ms=100"]).await;
    (dir, broker)
}

fn certified(issued: &Issued) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(issued.certificate_pem.as_bytes()).map(Result::unwrap).collect();
    (chain, PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap())
}

fn resolver(shown: &Issued) -> Arc<rustls::sign::SingleCertAndKey> {
    let (chain, key) = certified(shown);
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
    Arc::new(rustls::sign::CertifiedKey::new(chain, signer).into())
}

/// A client that shows this certificate, past the handshake as it sees it.
async fn dial(broker: &Broker, shown: Option<&Issued>) -> quinn::Connection {
    dial_with(broker, settings(broker, shown)).await
}

fn settings(broker: &Broker, shown: Option<&Issued>) -> quinn::ClientConfig {
    let mut tls = client_tls(broker);
    if let Some(shown) = shown {
        tls.client_auth_cert_resolver = resolver(shown);
    }
    client_config(tls, 1 << 20)
}

async fn dial_with(broker: &Broker, settings: quinn::ClientConfig) -> quinn::Connection {
    let endpoint = client_endpoint("127.0.0.1:0");
    let connecting = endpoint.connect_with(settings, broker.listen_addr(), "localhost").unwrap();
    within("handshake", connecting).await.unwrap()
}

/// What the broker answers to hello; an error where it ends the connection instead.
async fn hello_as(
    connection: &quinn::Connection,
    role: ConnectionRole,
) -> Result<call_response::Response, quinn::ConnectionError> {
    let lost = |_: &dyn std::fmt::Debug| connection.close_reason().expect("the connection ended");
    let (mut send, recv) = within("a stream", connection.open_bi()).await?;
    let hello = wire::Hello { role: role.into(), ..hello() };
    let call = wire::Call { request: Some(call::Request::Hello(hello)), ..wire::Call::default() };
    let open = wire::Open { stream: Some(wire::open::Stream::Call(call)) };
    send.write_chunk(headwater_proto::frame::encode(&open, 0)).await.map_err(|error| lost(&error))?;
    let mut frames = FrameReader::<wire::CallResponse>::new(recv);
    let answer = within("an answer", frames.try_next()).await.map_err(|error| lost(&error))?;
    Ok(answer.expect("an answer").0.response.unwrap())
}

/// What the broker says to whoever says hello as a broker.
async fn hello_as_peer(broker: &Broker, shown: Option<&Issued>) -> Result<i32, (ErrorCode, String)> {
    match hello_as(&dial(broker, shown).await, ConnectionRole::Peer).await.unwrap() {
        call_response::Response::Hello(answer) => Ok(answer.broker_id),
        call_response::Response::Error(error) => Err((ErrorCode::from_number(error.code), error.message)),
        other => panic!("{other:?}"),
    }
}

/// The alert (RFC 8446, section 6) with which the broker ends a connection whose certificate is not good.
async fn alert(broker: &Broker, shown: &Issued) -> u8 {
    alert_to(&dial(broker, Some(shown)).await).await
}

async fn alert_to(connection: &quinn::Connection) -> u8 {
    match hello_as(connection, ConnectionRole::Data).await {
        Err(quinn::ConnectionError::ConnectionClosed(close)) => {
            u8::try_from(u64::from(close.error_code) - 0x100).expect("an alert of TLS")
        }
        other => panic!("{other:?}"),
    }
}

const BAD_CERTIFICATE_KINDS: std::ops::RangeInclusive<u8> = 42..=46;
const CERTIFICATE_EXPIRED: u8 = 45;
const UNKNOWN_CA: u8 = 48;

#[tokio::test]
async fn only_brokers_of_the_cluster_are_peers() {
    let ca = Ca::new("prod");
    let (_dir, broker) = broker(&ca, 1).await;
    assert_eq!(hello_as_peer(&broker, Some(&ca.broker(2))).await, Ok(1));
    for (shown, says) in [(None, "showed no certificate"), (Some(ca.client("alice")), "is client alice")] {
        let (code, why) = hello_as_peer(&broker, shown.as_ref()).await.unwrap_err();
        assert!(code == ErrorCode::ClusterAuthorizationFailed && why.contains(says), "{code} {why}");
        // For everything else they are welcome.
        let welcome = hello_as(&dial(&broker, shown.as_ref()).await, ConnectionRole::Data).await.unwrap();
        assert!(matches!(welcome, call_response::Response::Hello(_)), "{welcome:?}");
    }
    let rejected = "headwater_rejected_total{code=\"cluster_authorization_failed\"}";
    assert_eq!(sample(&broker, rejected).await, 2.0);
}

/// Streams of brokers are theirs on every connection, also on one that did not say hello as a peer.
#[tokio::test]
async fn raft_streams_are_refused_by_name_to_whoever_is_no_broker() {
    let ca = Ca::new("prod");
    let (_dir, broker) = broker(&ca, 1).await;
    for (shown, says, code) in [
        (None, "showed no certificate", ErrorCode::ClusterAuthorizationFailed),
        (
            Some(ca.client("alice")),
            "only brokers of this cluster may open raft streams",
            ErrorCode::ClusterAuthorizationFailed,
        ),
        (Some(ca.client("2")), "is client 2", ErrorCode::ClusterAuthorizationFailed),
        // It is heard, and told something else.
        (Some(ca.broker(2)), "this broker is alone", ErrorCode::InvalidRequest),
    ] {
        let connection = dial(&broker, shown.as_ref()).await;
        hello_as(&connection, ConnectionRole::Control).await.unwrap();
        let (mut send, recv) = within("a stream", connection.open_bi()).await.unwrap();
        let raft = wire::OpenRaft { cluster_id: broker.cluster_id().into(), ..Default::default() };
        let open = wire::Open { stream: Some(wire::open::Stream::Raft(raft)) };
        send.write_chunk(headwater_proto::frame::encode(&open, 0)).await.unwrap();
        let opened = FrameReader::<wire::RaftOpened>::new(recv).next().await.expect("an answer").0;
        let error = opened.error.expect("a refusal");
        assert_eq!(ErrorCode::from_number(error.code), code, "{}", error.message);
        assert!(error.message.contains(says), "{says}: {}", error.message);
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_good_is_worse_than_none() {
    let ca = Ca::new("prod");
    let (_dir, broker) = broker(&ca, 1).await;
    assert_eq!(alert(&broker, &Ca::new("prod").broker(2)).await, UNKNOWN_CA);
    let expired = ca.authority.broker(2, &[], yesterday()).unwrap();
    assert_eq!(alert(&broker, &expired).await, CERTIFICATE_EXPIRED);
    // One that may serve and not dial.
    let server = ca.odd(&["headwater://prod/broker/2"], rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let told = alert(&broker, &server).await;
    assert!(BAD_CERTIFICATE_KINDS.contains(&told), "{told}");
    within("the count", async {
        while sample(&broker, "headwater_rejected_total{code=\"authentication_failed\"}").await < 3.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// What checks signatures knows an authority's name and key, and not when it ends: one that had expired was trusted on.
#[tokio::test]
async fn whoever_an_expired_authority_signed_is_refused_on_either_side() {
    let ca = Ca::new("prod");
    let (_, expired) = Authority::make("prod", yesterday(), None).unwrap();
    // Its key goes on signing, for longer than it was to.
    let (authority, _) = Authority::make("prod", ca.authority.validity(), Some(&expired.key_pem)).unwrap();
    let late = authority.broker(2, &["localhost".into()], a_day()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &ca.broker(1), &(ca.pem.clone() + &expired.certificate_pem));
    let broker = start(dir.path()).await;
    let told = alert(&broker, &late).await;
    assert!(BAD_CERTIFICATE_KINDS.contains(&told), "{told}");
    let (_endpoint, address) = impostor(&late);
    let refused = connect(&broker, 2, &address).await.unwrap_err();
    assert!(matches!(&refused, PeerError::Impostor { why, .. } if why.contains("its authority, ")), "{refused}");
    assert_eq!(hello_as_peer(&broker, Some(&ca.broker(2))).await, Ok(1));
}

/// The authority's signature alone is nobody: an authority may sign for two clusters, and for web servers.
#[tokio::test]
async fn a_good_certificate_of_nobody_here_is_refused_by_name() {
    let (ca, other) = (Ca::new("prod"), Ca::new("test"));
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &ca.broker(1), &(ca.pem.clone() + &other.pem));
    let broker = start(dir.path()).await;
    let client = rcgen::ExtendedKeyUsagePurpose::ClientAuth;
    for (shown, says) in [
        (other.broker(2), "headwater://test/broker/2, and this is cluster prod"),
        (other.client("alice"), "headwater://test/client/alice, and this is cluster prod"),
        (ca.odd(&[], client.clone()), "names nobody"),
        (ca.odd(&["https://prod/broker/2"], client.clone()), "names nobody"),
        (ca.odd(&["headwater://prod/broker/02"], client.clone()), "names nobody"),
        (ca.odd(&["HEADWATER://prod/broker/2"], client.clone()), "names nobody"),
        (ca.odd(&["headwater://prod"], client.clone()), "the authority's own"),
        (ca.odd(&["headwater://prod/client/a", "headwater://prod/broker/2"], client), "a certificate names one"),
    ] {
        for role in [ConnectionRole::Peer, ConnectionRole::Control] {
            let answer = hello_as(&dial(&broker, Some(&shown)).await, role).await.unwrap();
            let call_response::Response::Error(error) = answer else { panic!("{answer:?}") };
            assert_eq!(ErrorCode::from_number(error.code), ErrorCode::AuthenticationFailed, "{error:?}");
            assert!(error.message.contains(says), "{says}: {}", error.message);
        }
    }
}

/// Somebody at a broker's address, with a certificate of their choice.
fn impostor(issued: &Issued) -> (quinn::Endpoint, SocketAddr) {
    let (chain, key) = certified(issued);
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(crypto_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
    let server = quinn::ServerConfig::with_crypto(Arc::new(tls));
    let endpoint = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
    let address = endpoint.local_addr().unwrap();
    let serving = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = serving.accept().await {
            // Whatever it hears, it says nothing.
            tokio::spawn(async move {
                if let Ok(connection) = incoming.await {
                    connection.closed().await;
                }
            });
        }
    });
    (endpoint, address)
}

async fn connect(from: &Broker, id: i32, address: &SocketAddr) -> Result<quinn::Connection, PeerError> {
    let connected = from.peers().connect(id, &address.to_string(), Instant::now() + DEADLINE).await;
    connected.map(|it| it.connection)
}

#[tokio::test]
async fn a_broker_that_dials_takes_only_the_broker_it_means() {
    let ca = Ca::new("prod");
    let ((_one, one), (_two, two)) = (broker(&ca, 1).await, broker(&ca, 2).await);
    // Peers of one cluster have one cluster id; these two were founded apart, and hear so once they know each other.
    let met = connect(&one, 2, &two.listen_addr()).await.unwrap_err();
    assert!(matches!(&met, PeerError::Refused { why, .. } if why.contains(two.cluster_id())), "{met}");
    // In both directions: two answers where one is meant, and one where two is.
    for (from, meant, at, shown) in [(&one, 1, &two, "broker 2"), (&two, 2, &one, "broker 1")] {
        let posing = connect(from, meant, &at.listen_addr()).await.unwrap_err();
        let PeerError::Impostor { broker_id, why, .. } = &posing else { panic!("{posing}") };
        assert_eq!((*broker_id, why.as_str()), (meant, format!("it shows the certificate of {shown}").as_str()));
    }
    let server = rcgen::ExtendedKeyUsagePurpose::ServerAuth;
    for (shown, says) in [
        // What a client has serves nobody,
        (ca.client("alice"), "does not allow extended key usage for server"),
        // and neither if the authority was careless about its use.
        (ca.odd(&["headwater://prod/client/2"], server.clone()), "client 2"),
        (ca.odd(&["headwater://test/broker/2"], server.clone()), "this is cluster prod"),
        (ca.odd(&["headwater://prod"], server.clone()), "the authority's own"),
        (ca.odd(&[], server), "names nobody"),
        (Ca::new("prod").broker(2), "another authority"),
        (ca.authority.broker(2, &["localhost".into()], yesterday()).unwrap(), "expired"),
    ] {
        let (_endpoint, address) = impostor(&shown);
        let refused = connect(&one, 2, &address).await.unwrap_err();
        assert!(matches!(&refused, PeerError::Impostor { why, .. } if why.contains(says)), "{says}: {refused}");
    }
}

/// One folder's certificates and metadata twice would be two brokers with one name: two ids in one cluster are what this stands for.
#[tokio::test]
async fn brokers_of_one_cluster_reach_each_other_under_any_address() {
    let ca = Ca::new("prod");
    let ((one_dir, one), (two_dir, two)) = (broker(&ca, 1).await, broker(&ca, 2).await);
    let cluster_id = one.cluster_id().to_owned();
    assert!(one.shutdown().await && two.shutdown().await);
    // The second joins the first one's cluster: its folder is made anew with that id.
    let fresh = tempfile::tempdir().unwrap();
    let properties = std::fs::read_to_string(one_dir.path().join("meta.properties")).unwrap();
    let directory = std::fs::read_to_string(two_dir.path().join("meta.properties")).unwrap();
    let directory = directory.lines().find(|line| line.starts_with("directory.id=")).unwrap();
    let properties: Vec<String> = properties
        .lines()
        .map(|line| match line.split_once('=').map_or(line, |(key, _)| key) {
            "node.id" => "node.id=2".into(),
            "broker.id" => "broker.id=2".into(),
            "directory.id" => directory.into(),
            _ => line.into(),
        })
        .collect();
    std::fs::write(fresh.path().join("meta.properties"), properties.join("\n") + "\n").unwrap();
    // Its certificate names no host at all: who it is counts, not where.
    put(fresh.path(), &ca.authority.broker(2, &[], a_day()).unwrap(), &ca.pem);
    let one = start(one_dir.path()).await;
    let two = start_with(fresh.path(), &["broker.id=2"]).await;
    assert_eq!(two.cluster_id(), cluster_id);
    let there = connect(&one, 2, &two.listen_addr()).await.unwrap();
    let back = connect(&two, 1, &one.listen_addr()).await.unwrap();
    assert!(there.close_reason().is_none() && back.close_reason().is_none());
    // Past hello: it can be called.
    let stream = within("a stream", there.open_bi()).await.unwrap();
    drop(stream);
}

/// Whoever looks for a cluster at an address knows no id yet: it takes any broker, learns which, and nobody else.
#[tokio::test]
async fn a_broker_that_means_any_learns_which_it_reached() {
    let ca = Ca::new("prod");
    let ((_one, one), (_two, two)) = (broker(&ca, 1).await, broker(&ca, 2).await);
    let peers = one.peers();
    let settings = peers.client_config(None, quinn::TransportConfig::default()).unwrap();
    let reached = dial_with(&two, settings.clone()).await;
    assert_eq!(peers.principal(&reached), Ok(Principal::Broker(2)));
    assert!(matches!(hello_as(&reached, ConnectionRole::Peer).await, Ok(call_response::Response::Hello(_))));
    let server = rcgen::ExtendedKeyUsagePurpose::ServerAuth;
    for shown in [
        ca.odd(&["headwater://prod/client/alice"], server.clone()),
        ca.odd(&["headwater://test/broker/2"], server),
        Ca::new("prod").broker(2),
    ] {
        let (_endpoint, address) = impostor(&shown);
        let connecting = client_endpoint("127.0.0.1:0").connect_with(settings.clone(), address, "any").unwrap();
        within("the refusal", connecting).await.unwrap_err();
    }
}

#[tokio::test]
async fn a_broker_hears_that_its_own_certificate_is_not_taken() {
    let (old, new) = (Ca::new("prod"), Ca::new("prod"));
    let (_two, two) = broker(&old, 2).await;
    // It trusts both authorities, and shows a certificate of the one that the other side does not know.
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &new.broker(1), &(old.pem.clone() + &new.pem));
    let one = start(dir.path()).await;
    let refused = connect(&one, 2, &two.listen_addr()).await.unwrap_err();
    assert!(matches!(&refused, PeerError::Refused { why, .. } if why.contains("certificate")), "{refused}");
}

#[tokio::test]
async fn whoever_has_no_name_dials_nobody() {
    let ca = Ca::new("prod");
    let dir = tempfile::tempdir().unwrap();
    let nameless = ca.odd(&[], rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    put(dir.path(), &nameless, &ca.pem);
    let broker = start(dir.path()).await;
    let refused = connect(&broker, 2, &broker.listen_addr()).await.unwrap_err();
    assert!(matches!(refused, PeerError::NoIdentity(_)), "{refused}");
    // Nor is anybody of its cluster, which has no name either.
    let (code, why) = hello_as_peer(&broker, Some(&ca.broker(2))).await.unwrap_err();
    assert!(code == ErrorCode::AuthenticationFailed && why.contains("names no cluster"), "{code} {why}");
}

/// The certificate that the broker shows.
fn shown(connection: &quinn::Connection) -> CertificateDer<'static> {
    let chain = connection.peer_identity().unwrap().downcast::<Vec<CertificateDer<'static>>>().unwrap();
    chain.into_iter().next().unwrap()
}

fn leaf(issued: &Issued) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()
}

async fn renewals(broker: &Broker, outcome: &str, count: f64) {
    let name = format!("headwater_tls_renewals_total{{outcome=\"{outcome}\"}}");
    within(&format!("{count} {outcome}"), async {
        loop {
            let counted = sample(broker, &name).await;
            assert!(counted <= count, "{outcome}: {counted}, where {count} were to come");
            if counted == count {
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn certificates_are_renewed_without_a_restart() {
    let ca = Ca::new("prod");
    let (dir, broker) = broker(&ca, 1).await;
    let earlier = dial(&broker, None).await;
    assert!(matches!(hello_as(&earlier, ConnectionRole::Control).await, Ok(call_response::Response::Hello(_))));
    let renewed = ca.authority.broker(1, &["localhost".into()], Validity { not_after_s: now_s() + 7_777, ..a_day() });
    let renewed = renewed.unwrap();
    put(dir.path(), &renewed, &ca.pem);
    renewals(&broker, "taken", 1.0).await;
    assert_eq!(
        sample(&broker, "headwater_tls_certificate_expiry_seconds").await,
        validity(&renewed).not_after_s as f64
    );

    let later = dial(&broker, None).await;
    assert_eq!(shown(&later), leaf(&renewed));
    assert_ne!(shown(&earlier), leaf(&renewed));
    // Who was connected stays so.
    let still = earlier.open_bi().await.unwrap();
    drop(still);
    assert!(earlier.close_reason().is_none());

    // An authority is replaced in three steps, none of which cuts anybody off: both, the new certificates, the new alone.
    let new = Ca::new("prod");
    assert_eq!(alert(&broker, &new.client("alice")).await, UNKNOWN_CA);
    put(dir.path(), &renewed, &(ca.pem.clone() + &new.pem));
    renewals(&broker, "taken", 2.0).await;
    for ca in [&ca, &new] {
        assert_eq!(hello_as_peer(&broker, Some(&ca.broker(2))).await, Ok(1));
    }
    // Whoever connects again and again with what it remembers of the last time.
    let mut lasting = client_tls(&broker);
    lasting.client_auth_cert_resolver = resolver(&ca.client("alice"));
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates([&ca, &new].map(|ca| CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()));
    lasting.dangerous().set_certificate_verifier(
        rustls::client::WebPkiServerVerifier::builder_with_provider(roots.into(), crypto_provider().into())
            .build()
            .unwrap(),
    );
    let lasting = client_config(lasting, 1 << 20);
    for _ in 0..2 {
        let welcome = hello_as(&dial_with(&broker, lasting.clone()).await, ConnectionRole::Data).await.unwrap();
        assert!(matches!(welcome, call_response::Response::Hello(_)), "{welcome:?}");
    }
    put(dir.path(), &new.broker(1), &(ca.pem.clone() + &new.pem));
    renewals(&broker, "taken", 3.0).await;
    put(dir.path(), &new.broker(1), &new.pem);
    renewals(&broker, "taken", 4.0).await;
    assert_eq!(alert(&broker, &ca.broker(2)).await, UNKNOWN_CA);
    assert_eq!(alert_to(&dial_with(&broker, lasting).await).await, UNKNOWN_CA, "an earlier session was resumed");
    assert_eq!(hello_as_peer(&broker, Some(&new.broker(2))).await, Ok(1));
    assert_eq!(sample(&broker, "headwater_tls_renewals_total{outcome=\"refused\"}").await, 0.0);
}

fn validity(issued: &Issued) -> Validity {
    Validity::of(&leaf(issued)).unwrap()
}

#[tokio::test]
async fn a_broken_renewal_keeps_what_was_in_use_and_is_counted_once() {
    let ca = Ca::new("prod");
    let (dir, broker) = broker(&ca, 1).await;
    let first = shown(&dial(&broker, None).await);
    let path = |name: &str| dir.path().join(name);
    let good = ca.broker(1);
    let other = Ca::new("prod");
    type Breaking<'a> = Box<dyn Fn() + 'a>;
    let breakings: Vec<(&str, Breaking<'_>)> = vec![
        ("no PEM", Box::new(|| std::fs::write(path(CERTIFICATE_FILE), "nothing").unwrap())),
        (
            "another key",
            Box::new(|| put(dir.path(), &Issued { key_pem: ca.broker(1).key_pem, ..copy(&good) }, &ca.pem)),
        ),
        ("another broker's", Box::new(|| put(dir.path(), &ca.broker(2), &ca.pem))),
        ("a client's", Box::new(|| put(dir.path(), &ca.client("alice"), &ca.pem))),
        ("another authority's", Box::new(|| put(dir.path(), &other.broker(1), &ca.pem))),
        (
            "another cluster's",
            Box::new(|| {
                let other = Ca::new("test");
                put(dir.path(), &other.broker(1), &other.pem);
            }),
        ),
        ("expired", Box::new(|| put(dir.path(), &ca.authority.broker(1, &[], yesterday()).unwrap(), &ca.pem))),
        ("an authority that is none", Box::new(|| put(dir.path(), &good, "nothing"))),
        ("no file", Box::new(|| std::fs::remove_file(path(KEY_FILE)).unwrap())),
    ];
    for (count, (what, break_it)) in breakings.iter().enumerate() {
        break_it();
        renewals(&broker, "refused", (count + 1) as f64).await;
        assert_eq!(shown(&dial_trusting(&broker, &ca).await), first, "{what}");
        assert_eq!(sample(&broker, "headwater_tls_renewals_total{outcome=\"taken\"}").await, 0.0, "{what}");
    }
    put(dir.path(), &good, &ca.pem);
    renewals(&broker, "taken", 1.0).await;
    assert_eq!(shown(&dial(&broker, None).await), leaf(&good));
    renewals(&broker, "refused", breakings.len() as f64).await;
}

fn copy(issued: &Issued) -> Issued {
    Issued {
        certificate_pem: issued.certificate_pem.clone(),
        key_pem: issued.key_pem.clone(),
        name: issued.name.clone(),
    }
}

/// As [`dial`], of whoever has the authority from elsewhere, as clients have.
async fn dial_trusting(broker: &Broker, ca: &Ca) -> quinn::Connection {
    assert_eq!(broker.ca_pem().unwrap(), ca.pem, "the authority in use");
    dial(broker, None).await
}

#[tokio::test]
async fn a_start_with_certificates_that_do_not_fit_is_refused_by_name() {
    let (ca, other) = (Ca::new("prod"), Ca::new("prod"));
    for (shown, ca_pem, says) in [
        (ca.broker(2), &ca.pem, "headwater://prod/broker/2, and this is broker 1"),
        (ca.client("alice"), &ca.pem, "headwater://prod/client/alice, and this is broker 1"),
        (ca.broker(1), &other.pem, "another authority signed it"),
        (Issued { key_pem: ca.broker(1).key_pem, ..ca.broker(1) }, &ca.pem, "is not the key of"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &shown, ca_pem);
        let refused = within("the refusal", Broker::start(config(dir.path()))).await.unwrap_err().to_string();
        assert!(refused.contains(says) && refused.contains(CERTIFICATE_FILE), "{says}: {refused}");
    }
}

/// What repairs it is a renewal, and that needs a broker that runs.
#[tokio::test]
async fn a_broker_whose_certificate_expired_starts_and_can_be_renewed() {
    let ca = Ca::new("prod");
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &ca.authority.broker(1, &["localhost".into()], yesterday()).unwrap(), &ca.pem);
    let broker = start_with(dir.path(), &["tls.reload.interval.ms=100"]).await;
    let endpoint = client_endpoint("127.0.0.1:0");
    let settings = client_config(client_tls(&broker), 1 << 20);
    let connecting = endpoint.connect_with(settings, broker.listen_addr(), "localhost").unwrap();
    let expired = within("the refusal", connecting).await.unwrap_err().to_string();
    assert!(expired.contains("xpired"), "{expired}");
    put(dir.path(), &ca.broker(1), &ca.pem);
    renewals(&broker, "taken", 1.0).await;
    dial(&broker, None).await;
}

/// Configured files, and certificate and key in one of them, which is replaced at one moment.
#[tokio::test]
async fn certificates_may_lie_anywhere_and_in_one_file() {
    let ca = Ca::new("prod");
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (both, trusted) = (files.path().join("both.pem"), files.path().join("trusted.pem"));
    let write = |issued: &Issued| std::fs::write(&both, issued.certificate_pem.clone() + &issued.key_pem).unwrap();
    write(&ca.broker(1));
    std::fs::write(&trusted, &ca.pem).unwrap();
    let file = |key: &str, path: &Path| format!("{key}={}", path.display());
    let settings = [file("tls.certificate", &both), file("tls.key", &both), file("tls.ca", &trusted)];
    let settings: Vec<&str> = settings.iter().map(String::as_str).chain(["tls.reload.interval.ms=100"]).collect();
    let broker = start_with(dir.path(), &settings).await;
    assert_eq!(hello_as_peer(&broker, Some(&ca.broker(2))).await, Ok(1));
    let renewed = ca.broker(1);
    write(&renewed);
    renewals(&broker, "taken", 1.0).await;
    assert_eq!(shown(&dial(&broker, None).await), leaf(&renewed));
    assert!(broker.profile().is_none() && !dir.path().join(CERTIFICATE_FILE).exists());
    // Without an authority nobody is asked for a certificate.
    drop(broker);
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &settings[..2]).await;
    assert_eq!(broker.ca_pem(), None);
    let alone = config(dir.path());
    let mut alone = alone;
    alone.set_pair(settings[2]).unwrap();
    assert!(alone.check().unwrap_err().to_string().contains("tls.ca"));
}
