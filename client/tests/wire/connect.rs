//! Connecting: hello, trust, bootstrap lists, limits.

use super::support::*;
use futures::StreamExt;
use headwater_client::{Client, ClientConfig, Error, ErrorCode};
use headwater_proto::wire;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use std::time::Duration;

#[tokio::test]
async fn the_first_broker_that_answers_serves() {
    let peer = Peer::start(1).await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let config = ClientConfig {
        bootstrap: vec![silent.local_addr().unwrap().to_string(), peer.address()],
        connect_timeout: Duration::from_secs(8),
        ..peer.config()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    assert_eq!((client.broker().broker_id, &*client.broker().cluster_id), (1, "cluster"));
    client.close().await;
}

/// QUIC holds a handshake that nobody answers open for three seconds: every command took so long once the first broker was dead.
#[tokio::test]
async fn a_broker_that_is_not_there_does_not_hold_up_the_end() {
    let peer = Peer::start(1).await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let config =
        ClientConfig { bootstrap: vec![silent.local_addr().unwrap().to_string(), peer.address()], ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let began = std::time::Instant::now();
    client.close().await;
    assert!(began.elapsed() < Duration::from_millis(1_500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn nobody_there_is_an_error_in_time_that_names_the_address() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let peer = Peer::start(1).await;
    let address = silent.local_addr().unwrap().to_string();
    let config =
        ClientConfig { bootstrap: vec![address.clone()], connect_timeout: Duration::from_millis(300), ..peer.config() };
    let error = within("connect", Client::connect(config)).await.err().unwrap();
    assert!(error.to_string().contains(&address) && error.retryable(), "{error}");
}

#[tokio::test]
async fn a_broker_with_a_foreign_certificate_is_refused_at_once() {
    let (peer, other) = (Peer::start(1).await, Peer::start(1).await);
    let config = ClientConfig { ca_pem: other.config().ca_pem, ..peer.config() };
    let error = within("connect", Client::connect(config)).await.err().unwrap();
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
}

#[tokio::test]
async fn a_foreign_certificate_is_told_of_although_another_broker_of_the_list_is_silent() {
    let (peer, other) = (Peer::start(1).await, Peer::start(1).await);
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let config = ClientConfig {
        bootstrap: vec![peer.address(), silent.clone()],
        ca_pem: other.config().ca_pem,
        connect_timeout: Duration::from_millis(1_500),
        ..peer.config()
    };
    let error = within("connect", Client::connect(config)).await.err().unwrap();
    let text = error.to_string();
    assert!(text.contains(&format!("{}: no secure connection", peer.address())), "{text}");
    assert!(text.contains(&format!("{silent}: no answer")) && error.retryable(), "{text}");
}

#[tokio::test]
async fn of_each_address_it_is_told_whether_it_was_tried_and_for_how_long() {
    let peer = Peer::start(1).await;
    let silent = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let [first, second] = silent.each_ref().map(|socket| socket.local_addr().unwrap().to_string());
    let config = ClientConfig {
        bootstrap: vec![peer.address(), first.clone(), second.clone()],
        request_timeout: Duration::from_secs(1),
        ..peer.config()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    peer.set_hello(|hello| hello.version = 99);
    peer.drop_connections();
    let error = within("list groups", client.admin().list_groups()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("{}: the broker speaks version 99", peer.address())), "{text}");
    let waited = |address: &str| {
        let (_, waited) = text.split_once(&format!("{address}: no answer so far, after ")).expect(&text);
        waited.split_once("ms").expect("less than the request's time").0.parse::<u32>().expect(&text)
    };
    assert!(waited(&first) < 1000, "{text}");
    assert!(waited(&second) + 150 < waited(&first), "one after another: {text}");
}

#[tokio::test]
async fn a_broker_that_is_silent_holds_up_nobody_for_long_and_is_tried_last_from_then_on() {
    let peer = Peer::start(1).await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let bootstrap = vec![silent.local_addr().unwrap().to_string(), peer.address()];
    let began = std::time::Instant::now();
    let client = within("connect", Client::connect(ClientConfig { bootstrap, ..peer.config() })).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(2_500), "it has three seconds: {:?}", began.elapsed());
    silent.set_nonblocking(true).unwrap();
    let mut packet = [0; 2048];
    while silent.recv_from(&mut packet).is_ok() {}
    peer.answer(|_| Some(Response::ListGroups(wire::ListGroupsResponse::default())));
    for _ in 0..3 {
        peer.drop_connections();
        within("a call", client.admin().list_groups()).await.unwrap();
    }
    assert!(silent.recv_from(&mut packet).is_err(), "the one that answered is tried first");
}

#[tokio::test]
async fn a_broker_of_another_version_is_refused_by_name() {
    let peer = Peer::start(1).await;
    peer.set_hello(|hello| hello.version = 99);
    let error = within("connect", Client::connect(peer.config())).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::UnsupportedVersion));
}

#[tokio::test]
async fn a_broker_that_allows_no_fetch_credit_is_refused_by_name_and_not_asked_without_end() {
    let peer = Peer::start(1).await;
    let client = peer.client().await;
    peer.set_hello(|hello| hello.fetch_credit_bytes = 0);
    let build = client.consumer().assign([(TOPIC, 0)]).build();
    let mut consumer = within("build", build).await.unwrap();
    let error = within("an error", consumer.next()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("fetch_credit_bytes"), "{error}");
    let error = within("connect", Client::connect(peer.config())).await.err().unwrap();
    assert!(matches!(&error, Error::Protocol(why) if why.contains("fetch_credit_bytes")), "{error}");
}

#[tokio::test]
async fn a_call_is_repeated_over_a_lost_connection_unless_that_could_do_harm() {
    let peer = Peer::start(1).await;
    let client = peer.client().await;
    let overloaded = std::sync::atomic::AtomicUsize::new(2);
    peer.answer(move |_| {
        use std::sync::atomic::Ordering::SeqCst;
        match overloaded.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => Some(Response::Error(wire::Error::new(ErrorCode::Overloaded, "full"))),
            Err(_) => Some(Response::ListGroups(wire::ListGroupsResponse::default())),
        }
    });
    assert!(within("list groups", client.admin().list_groups()).await.unwrap().is_empty());
    assert_eq!(peer.calls().len(), 3);
    peer.drop_connections();
    assert!(within("list groups", client.admin().list_groups()).await.unwrap().is_empty());
    peer.answer(|_| Some(Response::Error(wire::Error::new(ErrorCode::TimedOut, "no answer from the disk"))));
    let error = within("delete", client.admin().delete_group("billing")).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::TimedOut), "it may have been deleted, and a second try would say so");
    // What bears an id is done once, however often it is asked for.
    let late = std::sync::atomic::AtomicUsize::new(2);
    peer.answer(move |request| {
        use std::sync::atomic::Ordering::SeqCst;
        assert!(matches!(request, Request::DeleteTopic(_)));
        Some(match late.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => Response::Error(wire::Error::new(ErrorCode::TimedOut, "no answer from the quorum")),
            Err(_) => Response::Done(wire::Done {}),
        })
    });
    within("delete", client.admin().delete_topic(TOPIC)).await.unwrap();
}

/// That nobody answers there is not what is wrong.
#[tokio::test]
async fn where_nobody_else_answers_the_word_of_a_broker_that_is_cut_off_is_told() {
    let (peer, silent) = (Peer::start(1).await, std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let config = ClientConfig {
        bootstrap: vec![peer.address(), silent.local_addr().unwrap().to_string()],
        request_timeout: Duration::from_secs(2),
        ..peer.config()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    peer.answer(move |_| {
        let _ = tell.send(());
        Some(Response::Error(wire::Error::new(ErrorCode::OutOfTouch, "cut off")))
    });
    let asking = tokio::spawn(async move { client.admin().delete_topic(TOPIC).await });
    within("the call", told.recv()).await.unwrap();
    peer.drop_connections();
    drop(peer);
    let error = within("the answer", asking).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::OutOfTouch), "{error}");
}

#[tokio::test]
async fn a_broker_that_was_heard_of_serves_when_those_that_were_named_are_gone() {
    let (peer, other) = (Peer::start(1).await, Peer::start(1).await);
    other.set_hello(|hello| hello.broker_id = 2);
    other.answer(|_| Some(Response::ListGroups(wire::ListGroupsResponse::default())));
    let address = other.address();
    peer.answer(move |request| match request {
        Request::Metadata(_) => Some(Response::Metadata(wire::MetadataResponse {
            brokers: vec![wire::BrokerNode { broker_id: 2, address: address.clone(), ..Default::default() }],
            ..wire::MetadataResponse::default()
        })),
        _ => None,
    });
    let config = ClientConfig {
        ca_pem: [peer.config().ca_pem, other.config().ca_pem].concat(),
        connect_timeout: Duration::from_secs(1),
        ..peer.config()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    within("metadata", client.admin().metadata(&[])).await.unwrap();
    peer.set_deaf(true);
    peer.drop_connections();
    assert!(within("list groups", client.admin().list_groups()).await.unwrap().is_empty());
    assert_eq!(other.calls().len(), 1);
}

#[tokio::test]
async fn streams_and_credit_beyond_a_connection_s_limits_get_a_further_one() {
    let mut peer = Peer::start(6).await;
    // Sixteen streams are kept in reserve for calls, so two long ones fit.
    peer.set_hello(|hello| hello.max_streams = 18);
    let client = peer.client().await;
    let consumer = client.consumer().assign((0..6).map(|p| (TOPIC, p))).build();
    let consumer = within("build", consumer).await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(peer.fetch(0).await.0);
    }
    let ids: std::collections::HashSet<usize> = streams.iter().map(|s| s.connection.stable_id()).collect();
    assert_eq!(ids.len(), 3, "two streams each");
    drop(consumer);
    peer.set_hello(|hello| {
        hello.max_streams = 100;
        hello.fetch_credit_bytes = 1 << 20;
    });
    peer.drop_connections();
    let client = peer.client().await;
    let build = client.consumer().assign((0..6).map(|p| (TOPIC, p))).prefetch_bytes(8 << 19).build();
    let _consumer = within("build", build).await.unwrap();
    let mut granted = std::collections::HashMap::<usize, u64>::new();
    for _ in 0..6 {
        let (stream, open) = peer.fetch(0).await;
        *granted.entry(stream.connection.stable_id()).or_default() += open.credit_bytes;
        streams.push(stream);
    }
    assert!(granted.len() >= 3 && granted.values().all(|bytes| *bytes <= 1 << 20), "{granted:?}");
}
