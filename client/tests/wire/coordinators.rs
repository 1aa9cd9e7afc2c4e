//! Who coordinates a group: the first broker says that it is the second, until it is the first one itself.

use super::support::*;
use headwater_client::{Client, ClientConfig, TopicPartition};
use headwater_proto::ErrorCode;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, LeaderHint, MemberUpdate};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

/// Brokers 1 and 2, of which the first is named to the client and names the second as every group's coordinator.
async fn two() -> (Peer, Peer, Client) {
    let (first, second) = (Peer::start(1).await, Peer::start(1).await);
    second.set_hello(|hello| hello.broker_id = 2);
    first.set_coordinator(2, second.address(), 3);
    let config = ClientConfig { ca_pem: [first.config().ca_pem, second.config().ca_pem].concat(), ..first.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    (first, second, client)
}

fn not_here(hint: Option<LeaderHint>) -> wire::Error {
    wire::Error { leader: hint, ..wire::Error::new(ErrorCode::NotCoordinator, "another broker has it") }
}

async fn reset(client: &Client, offset: i64) {
    let offsets = vec![(TopicPartition::new(TOPIC, 0), offset)];
    let done = within("commit", client.admin().commit_offsets("billing", offsets)).await.unwrap();
    assert_eq!(done.len(), 1);
}

#[tokio::test]
async fn a_group_is_asked_of_its_coordinator_and_of_nobody_who_had_it_before() {
    let (first, second, client) = two().await;
    reset(&client, 7).await;
    assert_eq!((commits(&first).len(), commits(&second).len()), (0, 1));
    // It moves, and whoever had it says where to.
    let address = first.address();
    second.answer(move |_| {
        let hint = LeaderHint { broker_id: 1, address: address.clone(), leader_epoch: 5 };
        Some(Response::Error(not_here(Some(hint))))
    });
    reset(&client, 8).await;
    assert_eq!((commits(&first).len(), commits(&second).len()), (1, 1));
    // Somebody who has not heard of that names the second one still: nobody goes back there.
    let refusals = Mutex::new(1);
    first.answer(move |request| match (request, &mut *refusals.lock().unwrap()) {
        (Request::CommitOffsets(_), left @ 1..) => {
            *left -= 1;
            Some(Response::Error(not_here(None)))
        }
        _ => None,
    });
    reset(&client, 9).await;
    assert_eq!((commits(&first).len(), commits(&second).len()), (2, 0));
}

#[tokio::test]
async fn a_member_goes_on_with_the_coordinator_that_it_is_sent_to() {
    let (mut first, mut second, client) = two().await;
    let _consumer = within("build", client.consumer().group("billing").topics([TOPIC]).build()).await.unwrap();
    let (mut member, join) = second.member().await;
    assign(&mut member, 5, &[0]).await;
    owns(&mut member, &[0]).await;
    let hint = LeaderHint { broker_id: 1, address: first.address(), leader_epoch: 4 };
    member.send(&MemberUpdate { error: Some(not_here(Some(hint))), ..MemberUpdate::default() }, &[]).await;
    let again = loop {
        let stream = first.stream().await;
        if let wire::open::Stream::Member(again) = stream.open {
            break again;
        }
    };
    assert_eq!((again.member_id, again.member_epoch, again.owned), (join.member_id, 5, partitions(&[0])));
}

/// The client has no partition yet, so it hears of no leaders from it either.
#[tokio::test]
async fn a_broker_that_answers_and_is_cut_off_from_the_others_is_left_for_another_one() {
    let (first, second) = (Peer::start(1).await, Peer::start(1).await);
    second.set_hello(|hello| hello.broker_id = 2);
    let config = ClientConfig {
        bootstrap: vec![first.address(), second.address()],
        ca_pem: [first.config().ca_pem, second.config().ca_pem].concat(),
        request_timeout: Duration::from_secs(5),
        ..first.config()
    };
    let (commands, groups) = (Client::connect(config.clone()), Client::connect(config));
    let (commands, groups) = within("connect", async { tokio::try_join!(commands, groups) }).await.unwrap();
    first.lose_touch();
    assert!(within("a list", commands.admin().list_topics()).await.unwrap().is_empty());
    reset(&groups, 7).await;
    assert_eq!((commits(&first).len(), commits(&second).len()), (0, 1));
}

/// The others do not answer: that was all that was told.
#[tokio::test]
async fn what_a_broker_said_that_is_cut_off_is_told_where_no_other_answers() {
    let (peer, silent) = (Peer::start(1).await, std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let config = ClientConfig {
        bootstrap: vec![peer.address(), silent.local_addr().unwrap().to_string()],
        request_timeout: Duration::from_secs(1),
        ..peer.config()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    peer.lose_touch();
    let (listing, resetting) = (client.admin(), client.admin());
    let described = async { resetting.describe_group("billing").await.map(drop) };
    let (listed, described) =
        within("both", async { tokio::join!(async { listing.list_groups().await.map(drop) }, described) }).await;
    for refused in [listed, described] {
        let error = refused.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::OutOfTouch), "{error}");
    }
}

/// Whoever starts a cluster waits for its quorum; whoever looks at it wants to know.
#[tokio::test]
async fn a_quorum_that_is_lost_is_waited_for_unless_somebody_asks_for_less() {
    let peer = Peer::start(1).await;
    let config = ClientConfig { request_timeout: Duration::from_secs(3), ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    peer.lose_touch();
    let began = std::time::Instant::now();
    let error = within("a refusal", client.admin().impatient().describe_cluster()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::OutOfTouch), "{error}");
    let impatient = began.elapsed();
    let error = within("a refusal", client.admin().describe_cluster()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::OutOfTouch), "{error}");
    let patient = began.elapsed() - impatient;
    assert!(patient >= Duration::from_millis(2_500) && impatient < patient / 2, "{impatient:?} and {patient:?}");
}

/// Its connection lives, and nothing else of it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_coordinator_that_is_silent_is_left_once_another_one_is_named() {
    let (first, second, client) = two().await;
    let (speak, silence) = mpsc::channel::<()>();
    let silence = Mutex::new(silence);
    second.answer(move |_| {
        // Ends with the test.
        let _ = silence.lock().unwrap().recv();
        None
    });
    let committing = tokio::spawn(async move {
        reset(&client, 7).await;
        client
    });
    within("the call", async {
        while commits(&second).is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    first.set_coordinator(1, first.address(), 4);
    let client = within("the commit", committing).await.unwrap();
    assert_eq!(commits(&first).len(), 1);
    drop((speak, client));
}
