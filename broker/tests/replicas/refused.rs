//! Who may follow: the broker itself, in the incarnation that it registered, and nobody else.

use super::cluster::*;
use super::harness::*;
use bytes::Bytes;
use headwater_broker::tls::make::Issued;
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, Acks};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use uuid::Uuid;

/// A connection to a broker of the cluster that shows this certificate, past its hello.
async fn dial(cluster: &Cluster, to: i32, shown: Option<&Issued>) -> quinn::Connection {
    let broker = cluster.broker(to);
    let mut tls = client_tls(broker);
    if let Some(shown) = shown {
        let chain = CertificateDer::pem_slice_iter(shown.certificate_pem.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(shown.key_pem.as_bytes()).unwrap();
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
        let certified = rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, signer));
        tls.client_auth_cert_resolver = Arc::new(certified);
    }
    let endpoint = client_endpoint("127.0.0.1:0");
    let connecting = endpoint.connect_with(client_config(tls, 1 << 20), broker.listen_addr(), "localhost").unwrap();
    let connection = within("handshake", connecting).await.unwrap();
    let (mut send, recv) = within("a stream", connection.open_bi()).await.unwrap();
    let call = wire::Call { request: Some(wire::call::Request::Hello(hello())), ..wire::Call::default() };
    let open = wire::Open { stream: Some(wire::open::Stream::Call(call)) };
    send.write_chunk(headwater_proto::frame::encode(&open, 0)).await.unwrap();
    FrameReader::<wire::CallResponse>::new(recv).next().await.unwrap();
    connection
}

/// What whoever says this hello is answered.
async fn follow(connection: &quinn::Connection, open: wire::OpenReplica) -> (wire::ReplicaOpened, quinn::SendStream) {
    let (mut send, recv) = within("a stream", connection.open_bi()).await.unwrap();
    let open = wire::Open { stream: Some(wire::open::Stream::Replica(open)) };
    send.write_chunk(headwater_proto::frame::encode(&open, 0)).await.unwrap();
    (FrameReader::<wire::ReplicaOpened>::new(recv).next().await.expect("an answer").0, send)
}

fn as_broker(cluster: &Cluster, id: i32, topic_id: &Bytes, incarnation: Uuid) -> wire::OpenReplica {
    wire::OpenReplica {
        topic_id: topic_id.clone(),
        partition: 0,
        broker_id: id,
        incarnation: incarnation.as_bytes().to_vec().into(),
        leader_epoch: cluster.partition("t").leader_epoch,
        credit_bytes: 1000,
        ..wire::OpenReplica::default()
    }
}

#[tokio::test]
async fn nobody_follows_as_another_broker_or_in_an_old_incarnation() {
    let mut cluster = Cluster::start(&[1, 2, 3], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let old = cluster.incarnation(2);
    cluster.kill(2);
    cluster.up(2).await;
    let now = cluster.incarnation(2);
    assert_ne!(old, now);
    cluster.until_in_sync("t", &[1, 2]).await;

    let refused = async |shown: Option<Issued>, open: wire::OpenReplica| {
        let connection = dial(&cluster, 1, shown.as_ref()).await;
        let error = follow(&connection, open).await.0.error.expect("a refusal");
        (ErrorCode::from_number(error.code), error.message)
    };
    let forbidden = ErrorCode::ClusterAuthorizationFailed;
    let as_2 = |incarnation| as_broker(&cluster, 2, &topic_id, incarnation);
    let client = cluster.ca.authority.client("alice", a_day()).unwrap();
    for shown in [None, Some(client), Some(cluster.ca.broker(3))] {
        let (code, why) = refused(shown, as_2(now)).await;
        assert_eq!(code, forbidden, "{why}");
    }
    let two = || Some(cluster.ca.broker(2));
    let (code, why) = refused(two(), as_2(old)).await;
    assert_eq!(code, ErrorCode::UnknownReplica, "{why}");
    // A broker of the cluster that keeps no replica of it.
    let three = as_broker(&cluster, 3, &topic_id, cluster.incarnation(3));
    let (code, why) = refused(Some(cluster.ca.broker(3)), three).await;
    assert_eq!(code, ErrorCode::UnknownReplica, "{why}");
    let (code, why) = refused(two(), wire::OpenReplica { leader_epoch: 99, ..as_2(now) }).await;
    assert_eq!(code, ErrorCode::NotLeader, "{why}");
    let (code, why) =
        refused(two(), wire::OpenReplica { incarnation: Bytes::from_static(b"short"), ..as_2(now) }).await;
    assert_eq!(code, ErrorCode::InvalidRequest, "{why}");
    let elsewhere = wire::OpenReplica { topic_id: Bytes::from_static(&[9; 16]), ..as_2(now) };
    assert_eq!(refused(two(), elsewhere).await.0, ErrorCode::UnknownTopicId);

    // Of all this the partition has noticed nothing.
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 3)).await;
    cluster.until_sample(2, &log_end("t"), 3.0).await;
}

#[tokio::test]
async fn another_authoritys_broker_does_not_get_past_the_handshake() {
    let cluster = Cluster::start(&[1], &[]).await;
    let other = Ca::new().authority;
    let foreign = other.broker(2, &["localhost".into()], a_day()).unwrap();
    let broker = cluster.broker(1);
    let mut tls = client_tls(broker);
    let chain = CertificateDer::pem_slice_iter(foreign.certificate_pem.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(foreign.key_pem.as_bytes()).unwrap();
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
    let certified = rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, signer));
    tls.client_auth_cert_resolver = Arc::new(certified);
    let endpoint = client_endpoint("127.0.0.1:0");
    let connecting = endpoint.connect_with(client_config(tls, 1 << 20), broker.listen_addr(), "localhost").unwrap();
    if let Ok(connection) = within("handshake", connecting).await {
        // A client of TLS 1.3 is through before it is judged.
        let reason = within("the end", connection.closed()).await;
        assert!(matches!(reason, quinn::ConnectionError::ConnectionClosed(_)), "{reason}");
    }
}
