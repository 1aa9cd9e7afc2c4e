//! What a client remembers of topics, and when it asks again all the same.

use super::support::*;
use headwater_client::{
    Client, ClientConfig, ErrorCode, NewTopic, Partitioner, ProducerRecord, TopicId, TopicPartition,
};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, open};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

/// The topic as it is after it was made anew, and grew, so many times.
fn generation(number: u8) -> (TopicId, u32) {
    (TopicId::from_bytes([number; 16]), number.into())
}

/// Lets the number say which generation of the topic the peer has.
fn serve_generations(peer: &Peer) -> Arc<AtomicU8> {
    let number = Arc::new(AtomicU8::new(1));
    let now = number.clone();
    peer.answer(move |request| match request {
        Request::Metadata(_) => {
            let (id, partitions) = generation(now.load(SeqCst));
            Some(metadata(id, partitions))
        }
        // Whether it was created is not known.
        Request::CreateTopic(_) => Some(Response::Error(wire::Error::new(ErrorCode::Internal, "no answer"))),
        Request::AlterTopic(_) | Request::AddPartitions(_) | Request::DeleteTopic(_) => {
            Some(Response::Done(wire::Done {}))
        }
        _ => None,
    });
    number
}

/// What a new producer opens for a record that it puts into the topic's last partition.
async fn produced_to(peer: &mut Peer, client: &Client) -> (TopicId, u32) {
    let last = Partitioner::Custom(Arc::new(|context| context.partitions - 1));
    let producer = within("build", client.producer().partitioner(last).build()).await.unwrap();
    drop(within("a send", producer.send(ProducerRecord::new(TOPIC, None))).await.unwrap());
    let (_stream, open) = peer.produce(1 << 20).await;
    (TopicId::from_slice(&open.topic_id).unwrap(), open.partition + 1)
}

#[tokio::test]
async fn partitions_that_an_application_names_are_the_brokers_and_not_remembered_ones() {
    let mut peer = Peer::start(1).await;
    let number = serve_generations(&peer);
    let client = peer.client().await;
    assert_eq!(produced_to(&mut peer, &client).await, generation(1));
    number.store(2, SeqCst);
    let build = client.consumer().assign([(TOPIC, 1), (TOPIC, 0)]).build();
    let consumer = within("build", build).await.expect("partition 1 is there by now");
    let asked = peer.metadata_asked();
    for _ in 0..2 {
        let stream = peer.stream().await;
        let open::Stream::Fetch(open) = &stream.open else { panic!("{:?}", stream.open) };
        assert_eq!(open.topic_id, generation(2).0.to_wire());
    }
    drop(consumer);
    assert_eq!((asked, peer.metadata_asked()), (2, 2), "once for both, and for reading them");
}

#[tokio::test]
async fn the_count_of_partitions_is_remembered_as_long_as_the_topic_is() {
    let peer = Peer::start(1).await;
    let number = serve_generations(&peer);
    let client = peer.client().await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let count = async || within("a count", producer.partitions(TOPIC)).await.unwrap();
    assert_eq!(count().await, 1);
    number.store(2, SeqCst);
    assert_eq!((count().await, peer.metadata_asked()), (1, 1), "as records are spread");
    within("add partitions", client.admin().add_partitions(TOPIC, 2)).await.unwrap();
    assert_eq!((count().await, peer.metadata_asked()), (2, 2), "this client changed it");
    let config = ClientConfig { metadata_max_age: Duration::ZERO, ..peer.config() };
    let forgetful = within("connect", Client::connect(config)).await.unwrap();
    let producer = within("build", forgetful.producer().build()).await.unwrap();
    for generation in [2, 3] {
        number.store(generation, SeqCst);
        assert_eq!(within("a count", producer.partitions(TOPIC)).await.unwrap(), u32::from(generation), "too old");
    }
}

#[tokio::test]
async fn what_a_client_has_changed_it_asks_about_anew_whatever_became_of_it() {
    let mut peer = Peer::start(1).await;
    let number = serve_generations(&peer);
    let client = peer.client().await;
    let admin = client.admin();
    assert_eq!(produced_to(&mut peer, &client).await, generation(1));
    assert_eq!((produced_to(&mut peer, &client).await, peer.metadata_asked()), (generation(1), 1), "remembered");
    number.store(2, SeqCst);
    within("delete", admin.delete_topic(TOPIC)).await.unwrap();
    assert_eq!(produced_to(&mut peer, &client).await, generation(2));
    number.store(3, SeqCst);
    within("create", admin.create_topic(NewTopic::new(TOPIC))).await.unwrap_err();
    assert_eq!(produced_to(&mut peer, &client).await, generation(3));
    number.store(4, SeqCst);
    within("add partitions", admin.add_partitions(TOPIC, 4)).await.unwrap();
    assert_eq!(produced_to(&mut peer, &client).await, generation(4));
    number.store(5, SeqCst);
    within("alter", admin.alter_topic(TOPIC, Vec::new(), false)).await.unwrap();
    assert_eq!(produced_to(&mut peer, &client).await, generation(5));
    number.store(6, SeqCst);
    within("delete", admin.delete_topic("another")).await.unwrap();
    assert_eq!(produced_to(&mut peer, &client).await, generation(5), "nothing was changed about this one");
}

/// A slow answer about the topic as it was must not be what is remembered of the topic as it is.
#[tokio::test]
async fn an_answer_from_before_a_change_is_not_remembered_after_it() {
    let mut peer = Peer::start(1).await;
    let answers = AtomicUsize::new(0);
    peer.answer(move |request| match request {
        Request::Metadata(_) => {
            let (id, partitions) = generation(if answers.fetch_add(1, SeqCst) == 0 { 1 } else { 2 });
            Some(metadata(id, partitions))
        }
        Request::AddPartitions(_) => Some(Response::Done(wire::Done {})),
        _ => None,
    });
    let client = peer.client().await;
    peer.hold_metadata(true);
    let slow = within("build", client.producer().build()).await.unwrap();
    let asked = tokio::spawn(async move { slow.partitions(TOPIC).await });
    within("a question", async {
        while peer.metadata_asked() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    within("add partitions", client.admin().add_partitions(TOPIC, 2)).await.unwrap();
    peer.hold_metadata(false);
    assert_eq!(within("the slow answer", asked).await.unwrap().unwrap(), 1);
    assert_eq!(produced_to(&mut peer, &client).await, generation(2));
}

/// Topics named by the commits since this was last asked, in order.
fn committed_to(peer: &Peer) -> Vec<TopicId> {
    let entries = peer.calls().into_iter().filter_map(|call| match call {
        Request::CommitOffsets(commit) => Some(commit.offsets),
        _ => None,
    });
    entries.flatten().map(|entry| TopicId::from_slice(&entry.topic_id).unwrap()).collect()
}

#[tokio::test]
async fn a_commit_is_for_the_topic_that_was_read_or_else_for_the_one_that_bears_the_name_now() {
    let mut peer = Peer::start(1).await;
    let number = serve_generations(&peer);
    let client = peer.client().await;
    number.store(2, SeqCst);
    let build = client.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None).build();
    let consumer = within("build", build).await.unwrap();
    drop(peer.fetch(1000).await);
    let committer = consumer.committer().unwrap();
    let commit = async |partition| {
        within("commit", committer.commit_offsets([(TopicPartition::new(TOPIC, partition), 7)])).await.unwrap();
        committed_to(&peer)
    };
    let (old, new) = (generation(2).0, generation(3).0);
    assert_eq!(commit(1).await, [old]);
    number.store(3, SeqCst);
    assert_eq!(commit(0).await, [old], "assigned");
    assert_eq!(commit(1).await, [new], "never assigned: the one of now, and not what is remembered");
    within("close", consumer.close()).await.unwrap();
    assert_eq!(commit(0).await, [old], "what was read of it before");
}
