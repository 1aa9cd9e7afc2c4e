//! Where records go: topics that are not known yet, leaders that change, topics that are created anew.

use super::producer::{producer, record};
use super::support::*;
use bytes::Bytes;
use futures::FutureExt;
use headwater_client::{
    Client, ClientConfig, Delivery, ErrorCode, OffsetAt, OffsetQuery, ProduceError, Producer, ProducerRecord,
};
use headwater_proto::wire::{self, call, call_response};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[tokio::test]
async fn all_senders_to_an_unknown_topic_wait_for_one_answer_and_no_longer_than_the_delivery_timeout() {
    let peer = Peer::start(1).await;
    let timeout = Duration::from_millis(300);
    let producer = producer(&peer, |b| b.delivery_timeout(timeout)).await;
    drop(producer.send(record("known")).await.unwrap());
    peer.hold_metadata(true);
    let began = tokio::time::Instant::now();
    let senders = || futures::future::join_all((0..100).map(|_| producer.send(ProducerRecord::new("nowhere", None))));
    for outcome in within("timeouts", senders()).await {
        let error = outcome.unwrap_err();
        assert!(matches!(error, ProduceError::TimedOut { sent: false, .. }), "{error}");
    }
    assert!(began.elapsed() < 20 * timeout, "one after another: {:?}", began.elapsed());
    drop(producer.send(record("known")).now_or_never().expect("others do not wait").unwrap());
    let release = async { peer.hold_metadata(false) };
    let (outcomes, ()) = within("an answer", futures::future::join(senders(), release)).await;
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert!(matches!(error, ProduceError::UnknownTopic { .. }), "{error}");
    }
    assert_eq!(peer.metadata_asked(), 2, "once for each topic");
}

/// Tries again until it is told something else than to do so.
async fn try_until_known(producer: &Producer, mut record: ProducerRecord) -> Result<Delivery, ProduceError> {
    within("an outcome", async {
        loop {
            match producer.try_send(record) {
                Err((back, ProduceError::TopicPending { .. })) => record = back,
                Err((_, error)) => return Err(error),
                Ok(delivery) => return Ok(delivery),
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[tokio::test]
async fn sending_without_waiting_asks_for_a_topic_and_works_once_it_is_known() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    peer.hold_metadata(true);
    for _ in 0..10 {
        // From any thread, without a runtime.
        let outside = producer.clone();
        let sending = std::thread::spawn(move || outside.try_send(record("patient")).unwrap_err());
        let (_, error) = sending.join().unwrap();
        assert!(matches!(error, ProduceError::TopicPending { .. }) && error.retryable(), "{error}");
    }
    peer.hold_metadata(false);
    let delivery = try_until_known(&producer, record("patient")).await.unwrap();
    assert_eq!(peer.metadata_asked(), 1);
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    stream.acknowledge(1, 7, false).await;
    assert_eq!(within("an acknowledgement", delivery).await.unwrap().offset, 7);
    let error = try_until_known(&producer, ProducerRecord::new("nowhere", None)).await.unwrap_err();
    assert!(matches!(error, ProduceError::UnknownTopic { .. }), "{error}");
    let error = try_until_known(&producer, record("x").partition(9)).await.unwrap_err();
    assert!(matches!(error, ProduceError::UnknownPartition { partition: 9, partitions: 1, .. }), "{error}");
}

#[tokio::test]
async fn what_was_learned_a_while_ago_is_no_answer_for_a_sender_that_comes_back() {
    let peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let later = || ProducerRecord::new("later", None).partition(0);
    let (_, error) = producer.try_send(later()).unwrap_err();
    assert!(matches!(error, ProduceError::TopicPending { .. }), "{error}");
    let error = producer.send(later()).await.expect_err("the same look-up");
    assert!(matches!(error, ProduceError::UnknownTopic { .. }), "{error}");
    // Whoever keeps the outcome has its turn.
    tokio::task::yield_now().await;
    peer.answer(|request| match request {
        call::Request::Metadata(_) => Some(described("later")),
        _ => None,
    });
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(2)).await;
    tokio::time::resume();
    let sent = within("the topic", async {
        loop {
            match producer.try_send(later()) {
                Err((_, ProduceError::TopicPending { .. })) => tokio::task::yield_now().await,
                outcome => return outcome.map_err(|(_, error)| error),
            }
        }
    })
    .await;
    assert!(sent.is_ok(), "it is there by now: {sent:?}");
}

/// The broker that is asked has not heard of the partition yet: producers and readers were told for good that there is none.
#[tokio::test]
async fn a_partition_that_was_added_a_moment_ago_is_asked_for_before_it_is_called_unknown() {
    let mut peer = Peer::start(1).await;
    peer.answer(|request| match request {
        call::Request::Metadata(asked) => Some(metadata(TOPIC_ID, if asked.confirmed { 2 } else { 1 })),
        _ => None,
    });
    for waits in [true, false] {
        let producer = producer(&peer, |b| b).await;
        let delivery = match waits {
            true => within("sent", producer.send(record("x").partition(1))).await.unwrap(),
            false => try_until_known(&producer, record("x").partition(1)).await.unwrap(),
        };
        let (mut stream, open) = peer.produce(1 << 20).await;
        assert_eq!(open.partition, 1);
        stream.append().await;
        stream.acknowledge(1, 7, false).await;
        assert_eq!(within("an acknowledgement", delivery).await.unwrap().offset, 7);
        let error = producer.send(record("x").partition(9)).await.unwrap_err();
        assert!(matches!(error, ProduceError::UnknownPartition { partition: 9, partitions: 2, .. }), "{error}");
    }
    let client = peer.client().await;
    let consumer = within("build", client.consumer().assign([(TOPIC, 0), (TOPIC, 1)]).build()).await.unwrap();
    assert_eq!(fetches(&mut peer, 2).await.len(), 2);
    drop(consumer);
    let client = peer.client().await;
    let query = OffsetQuery { topic: TOPIC.into(), partition: 1, at: OffsetAt::Latest };
    let told = within("the end", client.admin().list_offsets(vec![query])).await.unwrap();
    assert!(matches!(&told[..], [Ok(_)]), "{told:?}");
}

#[tokio::test]
async fn a_partition_that_nobody_can_be_asked_about_is_not_called_unknown() {
    let peer = Peer::start(1).await;
    let config = ClientConfig { request_timeout: Duration::from_millis(300), ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let producer = within("build", client.producer().build()).await.unwrap();
    drop(producer.send(record("known")).await.unwrap());
    peer.set_deaf(true);
    peer.drop_connections();
    let error = within("an outcome", producer.send(record("x").partition(9))).await.unwrap_err();
    assert!(matches!(error, ProduceError::Client(_)) && error.retryable(), "{error}");
}

#[tokio::test]
async fn keys_and_partitions_are_placed_and_unknown_ones_refused() {
    let peer = Peer::start(6).await;
    let producer = producer(&peer, |b| b).await;
    let keyed = ProducerRecord::new(TOPIC, None).key(Bytes::from_static(b"N14228"));
    let delivery = producer.send(keyed).await.unwrap();
    assert_eq!(delivery.partition(), headwater_client::partition_for_key(b"N14228", 6));
    let error = producer.send(record("x").partition(9)).await.unwrap_err();
    assert!(matches!(error, ProduceError::UnknownPartition { partition: 9, partitions: 6, .. }), "{error}");
    let error = producer.send(ProducerRecord::new("nowhere", None)).await.unwrap_err();
    assert!(matches!(error, ProduceError::UnknownTopic { .. }), "{error}");
}

#[tokio::test]
async fn a_topic_that_was_created_anew_takes_later_records_and_fails_earlier_ones() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let first = producer.send(record("old")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    let id = headwater_client::TopicId::from_bytes([8; 16]);
    peer.answer(move |request| match request {
        wire::call::Request::Metadata(_) => {
            let partition = wire::PartitionMetadata { leader: 1, leader_epoch: 0, ..Default::default() };
            let topic = wire::TopicMetadata {
                name: TOPIC.into(),
                topic_id: id.to_wire(),
                partitions: vec![partition],
                ..Default::default()
            };
            let answer = wire::MetadataResponse { topics: vec![topic], ..Default::default() };
            Some(wire::call_response::Response::Metadata(answer))
        }
        _ => None,
    });
    stream.refuse(1, ErrorCode::NotLeader).await;
    let error = within("an outcome", first).await.unwrap_err();
    assert!(matches!(error, ProduceError::OutcomeUnknown { .. }), "the old topic may have had it: {error}");
    assert_eq!(error.code(), Some(ErrorCode::UnknownTopicId));
    let second = producer.send(record("new")).await.unwrap();
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!(open.topic_id, id.to_wire());
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    assert_eq!(within("an acknowledgement", second).await.unwrap().offset, 0);
}

/// Metadata of a topic of one partition.
fn described(name: &str) -> call_response::Response {
    let partition = wire::PartitionMetadata { leader: 1, leader_epoch: 0, ..Default::default() };
    let topic = wire::TopicMetadata {
        name: name.into(),
        topic_id: TOPIC_ID.to_wire(),
        partitions: vec![partition],
        max_message_bytes: 1_048_588,
        ..Default::default()
    };
    call_response::Response::Metadata(wire::MetadataResponse { topics: vec![topic], ..Default::default() })
}

/// Metadata of the one topic, whose one partition is led so. Broker 2 is said to be where broker 1 answers.
fn led_by(address: &str, leader: i32, leader_epoch: i32) -> call_response::Response {
    call_response::Response::Metadata(wire::MetadataResponse {
        brokers: vec![wire::BrokerNode { broker_id: 2, address: address.into(), ..Default::default() }],
        topics: vec![wire::TopicMetadata {
            name: TOPIC.into(),
            topic_id: TOPIC_ID.to_wire(),
            partitions: vec![wire::PartitionMetadata { leader, leader_epoch, ..Default::default() }],
            ..wire::TopicMetadata::default()
        }],
        ..wire::MetadataResponse::default()
    })
}

#[tokio::test]
async fn who_leads_is_asked_before_the_retry_of_what_a_former_leader_refused() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let delivery = producer.send(record("patient")).await.unwrap();
    for leader_epoch in 3..6 {
        let (mut stream, open) = peer.produce(1 << 20).await;
        assert_eq!(open.leader_epoch, leader_epoch);
        let (request, _) = stream.append().await;
        let address = peer.address();
        peer.answer(move |request| {
            matches!(request, call::Request::Metadata(_)).then(|| led_by(&address, 1, leader_epoch + 1))
        });
        stream.refuse(request.request_id, ErrorCode::NotLeader).await;
    }
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!(open.leader_epoch, 6);
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", delivery).await.unwrap();
}

#[tokio::test]
async fn a_leader_where_another_broker_answers_is_asked_for_anew() {
    let mut peer = Peer::start(1).await;
    let (address, asked) = (peer.address(), AtomicBool::new(false));
    peer.answer(move |request| {
        let call::Request::Metadata(_) = request else { return None };
        // At first broker 2 leads, at an address that is broker 1's by now.
        Some(led_by(&address, if asked.swap(true, Ordering::SeqCst) { 1 } else { 2 }, 3))
    });
    let producer = producer(&peer, |b| b).await;
    let delivery = producer.send(record("found")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", delivery).await.unwrap();
}

#[tokio::test]
async fn new_partitions_are_used_once_the_metadata_is_old() {
    let peer = Peer::start(1).await;
    let config = headwater_client::ClientConfig { metadata_max_age: Duration::ZERO, ..peer.config() };
    let client = within("connect", headwater_client::Client::connect(config)).await.unwrap();
    let producer = within("build", client.producer().batch_bytes(1).build()).await.unwrap();
    let value = || ProducerRecord::new(TOPIC, Bytes::from_static(b"x"));
    assert_eq!(producer.send(value()).await.unwrap().partition(), 0);
    peer.answer(|request| match request {
        wire::call::Request::Metadata(_) => {
            let partition =
                |partition| wire::PartitionMetadata { partition, leader: 1, leader_epoch: 3, ..Default::default() };
            let topic = wire::TopicMetadata {
                name: TOPIC.into(),
                topic_id: TOPIC_ID.to_wire(),
                partitions: (0..4).map(partition).collect(),
                ..Default::default()
            };
            let answer = wire::MetadataResponse { topics: vec![topic], ..Default::default() };
            Some(wire::call_response::Response::Metadata(answer))
        }
        _ => None,
    });
    within("another partition", async {
        while producer.send(value()).await.unwrap().partition() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
