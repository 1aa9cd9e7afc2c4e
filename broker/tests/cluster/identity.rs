//! Who may speak as a member of the metadata quorum: a broker of this cluster, for itself.

use crate::harness::{FrameReader, client_config, client_endpoint, client_tls, within};
use crate::nodes::{Ca, Nodes, brokers_of};
use headwater_broker::Broker;
use headwater_broker::metadata::command::{
    self, Command, RaftAppend, RaftAskVote, RaftPropose, RaftRequest, RaftResponse, RaftVote, command::Command as Kind,
    raft_failure, raft_request, raft_response,
};
use headwater_broker::quic;
use headwater_broker::tls::make::Issued;
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, open};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;

/// A connection that shows this certificate; it may be closed at once.
async fn dial(broker: &Broker, shown: Option<&Issued>) -> quinn::Connection {
    let mut tls = client_tls(broker);
    if let Some(shown) = shown {
        let chain = CertificateDer::pem_slice_iter(shown.certificate_pem.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(shown.key_pem.as_bytes()).unwrap();
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
        let certified = rustls::sign::CertifiedKey::new(chain, signer);
        tls.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    }
    let connecting = client_endpoint("127.0.0.1:0");
    let connecting = connecting.connect_with(client_config(tls, 1 << 20), broker.listen_addr(), "localhost").unwrap();
    within("handshake", connecting).await.unwrap()
}

/// What a broker answers to the hello of a member.
async fn opened(broker: &Broker, shown: Option<&Issued>, hello: wire::OpenRaft) -> Result<wire::RaftOpened, String> {
    let connection = dial(broker, shown).await;
    let (mut send, recv) = within("a stream", connection.open_bi()).await.map_err(|error| error.to_string())?;
    let open = wire::Open { stream: Some(open::Stream::Raft(hello)) };
    let sent = send.write_chunk(headwater_proto::frame::encode(&open, 0)).await;
    sent.map_err(|error| format!("{error}: {:?}", connection.close_reason()))?;
    let mut frames = FrameReader::<wire::RaftOpened>::new(recv);
    match within("an answer", frames.try_next()).await {
        Ok(answer) => Ok(answer.expect("an answer").0),
        Err(error) => Err(format!("{error}: {:?}", connection.close_reason())),
    }
}

/// What a broker answers to a question of a member, if it is any answer.
async fn asked(
    broker: &Broker,
    shown: &Issued,
    from_node_id: u64,
    request: raft_request::Request,
) -> raft_response::Response {
    let connection = dial(broker, Some(shown)).await;
    let (mut send, recv) = within("a stream", connection.open_bi()).await.unwrap();
    let cluster_id = broker.cluster_id().into();
    let hello = wire::OpenRaft { cluster_id, from_node_id, ..Default::default() };
    let open = wire::Open { stream: Some(open::Stream::Raft(hello)) };
    send.write_chunk(headwater_proto::frame::encode(&open, 0)).await.unwrap();
    let mut frames = FrameReader::<wire::RaftOpened>::new(recv);
    let (opened, _) = within("a hello", frames.next()).await.expect("a hello");
    assert!(opened.error.is_none(), "{opened:?}");
    let request = RaftRequest { timeout_ms: 2_000, request: Some(request) };
    send.write_chunk(headwater_proto::frame::encode(&request, 0)).await.unwrap();
    let answer = within("an answer", frames.followed_by::<RaftResponse>().next()).await.expect("an answer");
    answer.0.response.expect("a known one")
}

/// It was taken from any broker of the cluster in any other one's name; and of a broker that is none any more, its vote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_proposes_for_itself_and_leads_as_a_member_alone() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let told = nodes.describe(0, false).await;
    let incarnation = |broker_id: i32| told.brokers[broker_id as usize - 1].incarnation.clone();
    let second = nodes.ca.broker(2);
    let refused = |answer: raft_response::Response, says: &str| {
        let raft_response::Response::Failure(failure) = answer else { panic!("{says}: {answer:?}") };
        assert_eq!(failure.kind(), raft_failure::Kind::UnknownRequest, "{failure:?}");
        assert!(failure.message.contains(says), "{says}: {}", failure.message);
    };
    let propose =
        |command: Command| raft_request::Request::Propose(RaftPropose { command: Some(command), urgent: true });
    let member = |broker_id| Some(command::Member { broker_id, incarnation: incarnation(broker_id) });
    let alter = command::AlterPartition { leader: member(1), isr: vec![member(1).unwrap()], ..Default::default() };
    let drain = |broker_id| command::DrainBroker { broker_id, incarnation: incarnation(broker_id) };
    let fence = command::FenceBroker { broker_id: 1, incarnation: incarnation(1) };
    let replicas = command::FenceReplicas { broker_id: 1, incarnation: incarnation(1), replicas: Vec::new() };
    let fence = Command { controller_epoch: told.controller_epoch, ..Kind::FenceBroker(fence).into() };
    let improper = [
        (Kind::AlterPartition(alter.clone()).into(), "for itself alone"),
        (Kind::AlterPartitions(command::AlterPartitions { partitions: vec![alter] }).into(), "for itself alone"),
        (Kind::DrainBroker(drain(1)).into(), "for itself alone"),
        (fence, "proposes itself"),
        (Kind::FenceReplicas(replicas).into(), "proposes itself"),
    ];
    for number in [0, 2] {
        for (command, says) in improper.clone() {
            refused(asked(nodes.broker(number), &second, 7, propose(command)).await, says);
        }
    }
    // The certificate is good, whoever has it: it is no member of this quorum.
    let vote = Some(RaftVote { term: 1_000, node_id: 7, committed: true });
    let append = raft_request::Request::Append(RaftAppend { vote, ..Default::default() });
    let vote = Some(RaftVote { term: 1_000, node_id: 7, committed: false });
    let stands = raft_request::Request::AskVote(RaftAskVote { vote, last: None });
    for request in [append, stands] {
        refused(asked(nodes.broker(2), &nodes.ca.broker(9), 7, request).await, "none of them");
    }
    // Nobody is elected anew for it, and what is its own to say it says.
    let after = nodes.describe(0, false).await;
    assert_eq!((after.controller, after.controller_epoch), (told.controller, told.controller_epoch));
    assert_eq!(brokers_of(&after, "active"), [1, 2, 3]);
    for number in [0, 2] {
        let answer = asked(nodes.broker(number), &second, 7, propose(Kind::DrainBroker(drain(2)).into())).await;
        let is_heard = match &answer {
            raft_response::Response::Proposed(_) => true,
            raft_response::Response::Failure(failure) => failure.kind() != raft_failure::Kind::UnknownRequest,
            _ => false,
        };
        assert!(is_heard, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_broker_speaks_as_a_member_and_for_itself() {
    let mut nodes = Nodes::of(2);
    nodes.form(2).await;
    let broker = nodes.broker(0);
    let hello = |from_node_id| wire::OpenRaft {
        cluster_id: broker.cluster_id().into(),
        from_node_id,
        to_node_id: 0,
        from_address: String::new(),
        from_start: None,
    };
    let member_of = async |number: usize| {
        let asked = opened(nodes.broker(number), Some(&nodes.ca.broker(9)), hello(7)).await.unwrap();
        assert!(asked.error.is_none(), "a new broker: {asked:?}");
        asked.node_id
    };
    let (first, second) = (member_of(0).await, member_of(1).await);
    assert!(first != 0 && second != 0 && first != second);

    let refused = |answer: wire::RaftOpened, code: ErrorCode, says: &str| {
        let error = answer.error.expect("a refusal");
        assert_eq!(ErrorCode::from_number(error.code), code, "{}", error.message);
        assert!(error.message.contains(says), "{says}: {}", error.message);
    };
    let denied = ErrorCode::ClusterAuthorizationFailed;
    refused(opened(broker, None, hello(second)).await.unwrap(), denied, "showed no certificate");
    let client = nodes.ca.client("2");
    refused(opened(broker, Some(&client), hello(second)).await.unwrap(), denied, "only brokers of this cluster");
    let other = nodes.ca.broker(3);
    let says = "is broker 2, not broker 3";
    refused(opened(broker, Some(&other), hello(second)).await.unwrap(), denied, says);
    // Another cluster's authority: the handshake ends it (an unknown authority).
    let foreign = opened(broker, Some(&Ca::new().broker(2)), hello(second)).await.unwrap_err();
    assert!(foreign.contains("UnknownIssuer"), "{foreign}");
    // The member itself is heard.
    let own = opened(broker, Some(&nodes.ca.broker(2)), hello(second)).await.unwrap();
    assert!(own.error.is_none() && own.node_id == first, "{own:?}");
    // And nobody's connection was lost by it.
    nodes.describe(1, false).await;
}

/// A broker of the cluster that says of itself that it is another member, and is where that one was, is asked nothing: neither for
/// its vote, nor to keep what it could then hide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_shows_another_brokers_certificate_is_not_the_member_that_is_dialled() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let hello = wire::OpenRaft {
        cluster_id: nodes.broker(1).cluster_id().into(),
        from_node_id: 7,
        to_node_id: 0,
        from_address: String::new(),
        from_start: None,
    };
    let second = opened(nodes.broker(1), Some(&nodes.ca.broker(9)), hello).await.unwrap().node_id;
    nodes.kill(1);
    let socket = within("its port", async {
        loop {
            match quic::bind(nodes.address(1)) {
                Ok(socket) => break socket,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    let shown = nodes.ca.broker(3);
    let chain = CertificateDer::pem_slice_iter(shown.certificate_pem.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(shown.key_pem.as_bytes()).unwrap();
    let impostor = quic::endpoint(&nodes.config(1), socket.await, chain, key, &[7; quic::SECRET_BYTES]).unwrap();
    let mut dialled = 0;
    while dialled < 5 {
        let incoming = within("somebody dials", impostor.accept()).await.expect("open");
        let Ok(connection) = incoming.await else { continue };
        while let Ok((mut send, recv)) = connection.accept_bi().await {
            let mut frames = FrameReader::<wire::Open>::new(recv);
            let Ok(Some((wire::Open { stream: Some(open::Stream::Raft(hello)) }, _))) = frames.try_next().await else {
                continue;
            };
            assert!([0, second].contains(&hello.to_node_id));
            let answer = wire::RaftOpened { node_id: second, ..Default::default() };
            // It may be gone already.
            drop(send.write_chunk(headwater_proto::frame::encode(&answer, 0)).await);
            // The first frame of a question is none of a hello: whatever can be read is one too many.
            let asked = within("the stream's end", frames.followed_by::<wire::Open>().try_next()).await;
            assert!(!matches!(asked, Ok(Some(_))), "it was asked: {asked:?}");
            dialled += 1;
            if dialled >= 5 {
                break;
            }
        }
    }
    nodes.until(0, "broker 2 is fenced", |told| brokers_of(told, "fenced") == [2]).await;
}
