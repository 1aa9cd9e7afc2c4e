//! Hearing of new leaders: pushed, hinted at, and never older ones.

use super::support::*;
use bytes::Bytes;
use futures::StreamExt;
use headwater_client::{Client, ClientConfig, ErrorCode, Producer, ProducerRecord, StartFrom};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::{self, call_response::Response, open};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Another leader of a partition, or the same in another epoch.
fn leaders(version: u64, leader_epoch: i32) -> wire::WatchUpdate {
    let partitions = vec![wire::PartitionLeader { partition: 0, leader: 1, leader_epoch }];
    let topic = wire::TopicLeaders { topic_id: TOPIC_ID.to_wire(), deleted: false, partition_count: 1, partitions };
    wire::WatchUpdate { version, in_touch: true, topics: vec![topic], ..wire::WatchUpdate::default() }
}

async fn watching() -> Peer {
    let peer = Peer::start(1).await;
    peer.set_hello(|hello| hello.features = vec![headwater_proto::WATCH_FEATURE.to_owned()]);
    peer
}

async fn send(producer: &Producer, value: &'static str) -> headwater_client::Delivery {
    within("a send", producer.send(ProducerRecord::new(TOPIC, Bytes::from_static(value.as_bytes())))).await.unwrap()
}

/// The next two streams: that on which the client watches, and another one.
async fn watched_and(peer: &mut Peer) -> (PeerStream, PeerStream) {
    let (one, other) = (peer.stream().await, peer.stream().await);
    if matches!(one.open, open::Stream::Watch(_)) { (one, other) } else { (other, one) }
}

async fn take_produce(mut stream: PeerStream) -> (PeerStream, wire::OpenProduce) {
    let open::Stream::Produce(open) = stream.open.clone() else { panic!("{:?}", stream.open) };
    stream.send(&nothing_yet(), &[]).await;
    (stream, open)
}

#[tokio::test]
async fn a_sender_and_a_reader_leave_a_leader_when_they_hear_of_the_next_and_not_for_an_earlier_one() {
    let mut peer = watching().await;
    let client = peer.client().await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let delivery = send(&producer, "one").await;
    let (mut watch, produce) = watched_and(&mut peer).await;
    let (request, _) = within("what is watched", watch.frame::<wire::WatchRequest>()).await.unwrap();
    assert_eq!(request.add_topic_ids, [TOPIC_ID.to_wire()]);
    let (mut produce, open) = take_produce(produce).await;
    assert_eq!(open.leader_epoch, 3);
    produce.frame::<wire::ProduceRequest>().await.expect("the record");
    watch.send(&leaders(1, 2), &[]).await;
    watch.send(&leaders(2, 7), &[]).await;
    let (mut produce, open) = take_produce(peer.stream().await).await;
    assert_eq!(open.leader_epoch, 7, "and not 2");
    let (again, _) = produce.frame::<wire::ProduceRequest>().await.expect("the same again");
    produce.acknowledge(again.request_id, 0, false).await;
    assert_eq!(within("an acknowledgement", delivery).await.unwrap().offset, 0);
    assert_eq!(peer.metadata_asked(), 1, "nobody had to ask");

    peer.answer(|request| match request {
        Request::Metadata(_) => {
            let Response::Metadata(answer) = metadata(TOPIC_ID, 1) else { panic!("no metadata") };
            Some(Response::Metadata(wire::MetadataResponse { version: 9, ..answer }))
        }
        _ => None,
    });
    let build = client.consumer().assign([(TOPIC, 0)]).start(StartFrom::Offset(0)).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut stream, open) = peer.fetch(1).await;
    assert_eq!(open.leader_epoch, 7, "metadata said 3");
    watch.send(&leaders(10, 8), &[]).await;
    assert!(stream.frame::<wire::FetchCredit>().await.is_none(), "the stream is left");
    let (mut stream, open) = peer.fetch(1).await;
    assert_eq!((open.leader_epoch, open.offset), (8, 0));
    stream.data(1, 1, &batch(0, &[b"one"])).await;
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().offset, 0);
}

#[tokio::test]
async fn a_broker_that_gives_no_answer_when_it_matters_is_left_for_another() {
    let mut peer = watching().await;
    let client = peer.client().await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let _delivery = send(&producer, "one").await;
    let (mut watch, produce) = watched_and(&mut peer).await;
    watch.send(&leaders(1, 3), &[]).await;
    let (mut produce, _) = take_produce(produce).await;
    produce.frame::<wire::ProduceRequest>().await.expect("the record");
    // It is not acknowledged: the broker is asked whether it is there, and says nothing.
    let asked = async { while !watch.frame::<wire::WatchRequest>().await.expect("a question").0.ping {} };
    within("a question", asked).await;
    let another = peer.stream().await;
    assert!(matches!(another.open, open::Stream::Watch(_)), "{:?}", another.open);
    assert_ne!(another.connection.stable_id(), watch.connection.stable_id());
}

#[tokio::test]
async fn a_refusal_that_names_the_leader_is_followed_without_asking() {
    let mut peer = Peer::start(1).await;
    let client = peer.client().await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let _delivery = send(&producer, "one").await;
    let leader = wire::LeaderHint { broker_id: 1, address: peer.address(), leader_epoch: 4 };
    let error = wire::Error { leader: Some(leader), ..wire::Error::new(ErrorCode::NotLeader, "another one leads") };
    peer.produce_after(wire::ProduceOpened { error: Some(error), ..wire::ProduceOpened::default() }).await;
    let (_stream, open) = peer.produce(1 << 20).await;
    assert_eq!((open.leader_epoch, peer.metadata_asked()), (4, 1));
}

#[tokio::test]
async fn an_answer_that_is_older_than_what_was_heard_before_is_not_taken() {
    let mut peer = Peer::start(1).await;
    let asked = AtomicUsize::new(0);
    peer.answer(move |request| match request {
        Request::Metadata(_) => {
            let (version, leader_epoch) = [(5, 5), (3, 3), (6, 6)][asked.fetch_add(1, SeqCst)];
            let Response::Metadata(mut answer) = metadata(TOPIC_ID, 1) else { panic!("no metadata") };
            answer.version = version;
            answer.topics[0].partitions[0].leader_epoch = leader_epoch;
            Some(Response::Metadata(answer))
        }
        _ => None,
    });
    let client = peer.client().await;
    for leader_epoch in [5, 6] {
        let build = client.consumer().assign([(TOPIC, 0)]).start(StartFrom::Offset(0)).build();
        let _consumer = within("build", build).await.unwrap();
        assert_eq!(peer.fetch(0).await.1.leader_epoch, leader_epoch);
    }
    assert_eq!(peer.metadata_asked(), 3);
}

#[tokio::test]
async fn a_reader_goes_where_the_leader_sends_it_and_back_when_it_is_refused_there() {
    let (mut leader, mut near) = (Peer::start(1).await, Peer::start(1).await);
    near.set_hello(|hello| hello.broker_id = 2);
    let address = near.address();
    leader.answer(move |request| match request {
        Request::Metadata(_) => {
            let Response::Metadata(mut answer) = metadata(TOPIC_ID, 1) else { panic!("no metadata") };
            answer.brokers = vec![wire::BrokerNode { broker_id: 2, address: address.clone(), ..Default::default() }];
            Some(Response::Metadata(answer))
        }
        _ => None,
    });
    let ca_pem = [leader.config().ca_pem, near.config().ca_pem].concat();
    let retry_backoff_max = std::time::Duration::from_millis(300);
    let config = ClientConfig { rack: Some("b".into()), ca_pem, retry_backoff_max, ..leader.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let build = client.consumer().assign([(TOPIC, 0)]).start(StartFrom::Offset(0)).build();
    let mut consumer = within("build", build).await.unwrap();

    let mut opened = leader.stream().await;
    let open::Stream::Fetch(open) = &opened.open else { panic!("{:?}", opened.open) };
    assert_eq!((&*open.rack, open.from_follower), ("b", false));
    opened.send(&wire::FetchOpened { preferred_replica: Some(2), ..wire::FetchOpened::default() }, &[]).await;
    let (mut stream, open) = near.fetch(1).await;
    assert_eq!((&*open.rack, open.from_follower, open.leader_epoch), ("", true, 3));
    stream.data(1, 2, &batch(0, &[b"near"])).await;
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().offset, 0);

    let error = Some(wire::Error::new(ErrorCode::OffsetOutOfRange, "not here"));
    stream.send(&wire::FetchData { next_offset: -1, high_watermark: 1, error, ..Default::default() }, &[]).await;
    let (mut stream, open) = leader.fetch(2).await;
    assert_eq!((&*open.rack, open.from_follower, open.offset), ("", false, 1), "not sent away at once again");
    stream.data(2, 2, &batch(1, &[b"far"])).await;
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().offset, 1);
    assert_eq!(consumer.high_watermark(TOPIC, 0), Some(2));

    // After a while the leader is asked again by itself, though its stream goes on.
    let mut opened = leader.stream().await;
    let open::Stream::Fetch(open) = &opened.open else { panic!("{:?}", opened.open) };
    assert_eq!((&*open.rack, open.from_follower, open.offset), ("b", false, 2));
    opened.send(&wire::FetchOpened { preferred_replica: Some(2), ..wire::FetchOpened::default() }, &[]).await;
    let (mut again, open) = near.fetch(3).await;
    assert_eq!((open.from_follower, open.offset), (true, 2));
    again.data(3, 3, &batch(2, &[b"near again"])).await;
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().offset, 2);
}

#[tokio::test]
async fn a_nearer_replica_that_is_silent_is_not_waited_for() {
    let mut leader = Peer::start(1).await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    leader.answer(move |request| match request {
        Request::Metadata(_) => {
            let Response::Metadata(mut answer) = metadata(TOPIC_ID, 1) else { panic!("no metadata") };
            answer.brokers = vec![wire::BrokerNode { broker_id: 2, address: address.clone(), ..Default::default() }];
            Some(Response::Metadata(answer))
        }
        _ => None,
    });
    let config = ClientConfig { rack: Some("b".into()), ..leader.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let build = client.consumer().assign([(TOPIC, 0)]).start(StartFrom::Offset(0)).build();
    let _consumer = within("build", build).await.unwrap();
    let mut opened = leader.stream().await;
    opened.send(&wire::FetchOpened { preferred_replica: Some(2), ..wire::FetchOpened::default() }, &[]).await;
    let began = std::time::Instant::now();
    assert_eq!(&*leader.fetch(1).await.1.rack, "");
    assert!(began.elapsed() < std::time::Duration::from_millis(2_500), "connecting takes three seconds");
}
