//! Who is let in, how many, and for how long they are waited for.

mod harness;

use harness::*;
use headwater_broker::Broker;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, open};
use headwater_proto::{ErrorCode, ResetCode};
use headwater_storage::sim::{Fault, Operation, SimFiles};
use quinn::{ConnectionError, TransportErrorCode};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UdpSocket;

const WINDOW: u32 = 16 << 20;

/// Tries to connect from this address.
async fn connect_from(broker: &Broker, address: &str) -> Result<(quinn::Endpoint, quinn::Connection), ConnectionError> {
    let endpoint = client_endpoint(address);
    let config = client_config(client_tls(broker), WINDOW);
    let connecting = endpoint.connect_with(config, broker.listen_addr(), "localhost").unwrap();
    within("an answer", connecting).await.map(|connection| (endpoint, connection))
}

fn is_refused(answer: &Result<(quinn::Endpoint, quinn::Connection), ConnectionError>) -> bool {
    let refused = TransportErrorCode::CONNECTION_REFUSED;
    matches!(answer, Err(ConnectionError::ConnectionClosed(closed)) if closed.error_code == refused)
}

async fn until(broker: &Broker, name: &str, wanted: impl Fn(f64) -> bool) {
    within(name, async {
        while !wanted(sample(broker, name).await) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// What is sent as 0-RTT data can be sent again by whoever listens: an append, for one.
#[tokio::test]
async fn data_before_the_handshake_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let mut tls = client_tls(&broker);
    tls.enable_early_data = true;
    let (endpoint, config) = (client_endpoint("127.0.0.1:0"), client_config(tls, WINDOW));
    for known in [false, true, true] {
        let connecting = endpoint.connect_with(config.clone(), broker.listen_addr(), "localhost").unwrap();
        let Err(connecting) = connecting.into_0rtt() else {
            panic!("0-RTT was offered (known to the broker: {known})")
        };
        let connection = within("handshake", connecting).await.unwrap();
        // Tickets for another session, if there were any, come with the answer to hello, or before.
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let hello = open::Stream::Call(wire::Call { request: Some(Request::Hello(hello())), ..wire::Call::default() });
        send.write_chunk(headwater_proto::frame::encode(&wire::Open { stream: Some(hello) }, 0)).await.unwrap();
        within("an answer", recv.read_to_end(1 << 16)).await.unwrap();
        connection.close(0u32.into(), b"");
    }
    broker.shutdown().await;
}

/// The name by which clients of any build know this protocol, written out: it is a promise and no constant to be changed.
#[tokio::test]
async fn who_speaks_another_protocol_than_headwater_1_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let endpoint = client_endpoint("127.0.0.1:0");
    let connect = async |offered: &[&str]| {
        let mut tls = client_tls(&broker);
        tls.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        let connecting = endpoint.connect_with(client_config(tls, WINDOW), broker.listen_addr(), "localhost").unwrap();
        within("an answer", connecting).await
    };
    for offered in [&["headwater/1"][..], &["h3", "headwater/1"]] {
        let connection = connect(offered).await.unwrap();
        let handshake =
            connection.handshake_data().unwrap().downcast::<quinn::crypto::rustls::HandshakeData>().unwrap();
        assert_eq!(handshake.protocol.as_deref(), Some(&b"headwater/1"[..]), "{offered:?}");
    }
    // TLS: no_application_protocol.
    let refused = TransportErrorCode::crypto(120);
    for offered in [&["headwater/2"][..], &["headwater"], &["HEADWATER/1"], &["h3"], &[]] {
        match connect(offered).await {
            Err(ConnectionError::ConnectionClosed(closed)) => assert_eq!(closed.error_code, refused, "{offered:?}"),
            Err(other) => panic!("{offered:?}: {other:?}"),
            Ok(_) => panic!("{offered:?} was let in"),
        }
    }
    broker.shutdown().await;
}

/// Nobody else may write to its metadata, or make it vote.
#[tokio::test]
async fn who_speaks_as_a_member_of_the_metadata_quorum_is_refused_by_a_broker_that_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let refused = |opened: wire::RaftOpened, code: ErrorCode, why: &str| {
        let error = opened.error.unwrap();
        assert_eq!((error.code, opened.node_id), (code.number(), 0));
        assert!(error.message.contains(why), "{}", error.message);
    };
    let hello = wire::OpenRaft { cluster_id: broker.cluster_id().into(), from_node_id: 7, ..Default::default() };
    let (_endpoint, connection) = connect_from(&broker, "127.0.0.1:0").await.unwrap();
    let (mut send, recv) = connection.open_bi().await.unwrap();
    let first = wire::Open { stream: Some(open::Stream::Raft(hello.clone())) };
    send.write_chunk(headwater_proto::frame::encode(&first, 0)).await.unwrap();
    let opened = FrameReader::new(recv).next().await.unwrap().0;
    refused(opened, ErrorCode::InvalidRequest, "takes part in no metadata quorum");
    // Nor as a client.
    let client = Client::connect(&broker).await;
    let stream = client.open(open::Stream::Raft(hello)).await;
    let opened = FrameReader::new(stream.recv).next().await.unwrap().0;
    refused(opened, ErrorCode::ClusterAuthorizationFailed, "only brokers of this cluster");
    broker.shutdown().await;
}

#[tokio::test]
async fn more_connections_than_allowed_are_refused_and_places_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["max.connections=3"]).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(connect_from(&broker, "127.0.0.1:0").await.unwrap());
    }
    for _ in 0..2 {
        assert!(is_refused(&connect_from(&broker, "127.0.0.1:0").await));
    }
    assert_eq!(sample(&broker, "headwater_connections").await, 3.0);
    assert_eq!(sample(&broker, "headwater_rejected_total{code=\"overloaded\"}").await, 2.0);
    let (_, leaving) = open.pop().unwrap();
    leaving.close(0u32.into(), b"");
    until(&broker, "headwater_connections", |open| open == 2.0).await;
    connect_from(&broker, "127.0.0.1:0").await.unwrap();
    broker.shutdown().await;
}

#[tokio::test]
async fn one_address_takes_no_more_than_its_share_of_connections() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["max.connections.per.ip=2"]).await;
    let _first = connect_from(&broker, "127.0.0.1:0").await.unwrap();
    let _second = connect_from(&broker, "127.0.0.1:0").await.unwrap();
    assert!(is_refused(&connect_from(&broker, "127.0.0.1:0").await));
    // All of 127.0.0.0/8 is this machine.
    let _other = connect_from(&broker, "127.0.0.2:0").await.unwrap();
    assert!(is_refused(&connect_from(&broker, "127.0.0.1:0").await));
    broker.shutdown().await;
}

#[tokio::test]
async fn who_never_says_hello_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["handshake.timeout.ms=200"]).await;
    let silent = Client::connect_silently(&broker).await;
    let ConnectionError::ApplicationClosed(closed) = within("the end", silent.connection.closed()).await else {
        panic!("the broker closes the connection")
    };
    assert_eq!(closed.error_code, ResetCode::Deadline.number().into());
    assert_eq!(sample(&broker, "headwater_rejected_total{code=\"timed_out\"}").await, 1.0);
    // Half of a hello is none.
    let halting = Client::connect_silently(&broker).await;
    let (mut send, _recv) = halting.connection.open_bi().await.unwrap();
    send.write_all(&[0, 0, 0, 9, 0]).await.unwrap();
    within("the end", halting.connection.closed()).await;
    broker.shutdown().await;
}

/// Only past its hello a connection heard of the end: one that had not said it held the broker up for as long as it may.
#[tokio::test]
async fn who_never_says_hello_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["handshake.timeout.ms=600000", "shutdown.timeout.ms=600000"]).await;
    let silent = Client::connect_silently(&broker).await;
    until(&broker, "headwater_connections", |open| open == 1.0).await;
    assert!(within("the end", broker.shutdown()).await);
    within("the end", silent.connection.closed()).await;
}

/// The first packet of a handshake, and then nothing: what it holds is let go.
#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["handshake.timeout.ms=500"]).await;
    let (near, far) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let endpoint = client_endpoint("127.0.0.1:0");
    let config = client_config(client_tls(&broker), WINDOW);
    let _connecting = endpoint.connect_with(config, near.local_addr().unwrap(), "localhost").unwrap();
    let mut packet = vec![0; 65536];
    let (length, _) = within("the first packet", near.recv_from(&mut packet)).await.unwrap();
    far.send_to(&packet[..length], broker.listen_addr()).await.unwrap();
    until(&broker, "headwater_connections_opened_total", |opened| opened == 1.0).await;
    until(&broker, "headwater_connections", |open| open == 0.0).await;
    Client::connect(&broker).await;
    broker.shutdown().await;
}

#[tokio::test]
async fn a_call_that_takes_too_long_is_answered_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let mut config = config(dir.path());
    config.set_pair("request.timeout.ms=300").unwrap();
    let broker = within("start", Broker::start_on(config, Arc::<SimFiles>::clone(&files))).await.unwrap();
    let client = Client::connect(&broker).await;
    let held = files.hold(Fault::new(Operation::Sync).on("metadata"));
    let create = |name: &str| Request::CreateTopic(wire::CreateTopic { name: name.into(), ..Default::default() });
    for (timeout_ms, said) in [(0, "no answer within 300 ms"), (50, "no answer within 50 ms"), (9000, "within 300 ms")]
    {
        let call = wire::Call { timeout_ms, request: Some(create("t")), ..wire::Call::default() };
        let stream = client.open(open::Stream::Call(call)).await;
        let answer = FrameReader::<wire::CallResponse>::new(stream.recv).next().await.unwrap().0.response.unwrap();
        let Response::Error(error) = answer else { panic!("{answer:?}") };
        assert_eq!((ErrorCode::from_number(error.code), error.retryable), (ErrorCode::TimedOut, true));
        assert!(error.message.contains(said), "{}", error.message);
    }
    drop(held);
    // The first of them took effect.
    let Response::Error(error) = client.call(create("t")).await else { panic!("the topic exists") };
    assert_eq!(ErrorCode::from_number(error.code), ErrorCode::TopicExists);
    broker.shutdown().await;
}
