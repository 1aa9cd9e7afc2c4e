//! The client against a broker, over real sockets, on real files.

mod certificates;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use headwater_broker::{Broker, StartError, config::BrokerConfig};
use headwater_client::{
    Acks, Client, ClientConfig, Codec, ConsumedRecord, Consumer, Durability, ErrorCode, NewTopic, OffsetAt,
    OffsetQuery, Partitioner, ProduceError, ProducerRecord, Rebalance, StartFrom, TopicPartition,
};
use tempfile::TempDir;

/// How long anything may take before it counts as hanging.
const DEADLINE: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// A broker in a folder of its own.
struct Node {
    broker: Option<Broker>,
    dir: TempDir,
    listen: SocketAddr,
}

impl Node {
    async fn start() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let broker = Node::broker(&dir, "127.0.0.1:0".parse().unwrap()).await;
        let listen = broker.listen_addr();
        Node { broker: Some(broker), dir, listen }
    }

    async fn broker(dir: &TempDir, listen: SocketAddr) -> Broker {
        let config = BrokerConfig {
            data_dir: dir.path().join("data"),
            listen,
            admin: "127.0.0.1:0".parse().unwrap(),
            network_threads: 1,
            io_threads: 2,
            ..BrokerConfig::default()
        };
        // The port of a broker that just stopped is free once its last packets are out, unless somebody took it meanwhile.
        within("the port", async {
            loop {
                match Broker::start(config.clone()).await {
                    Ok(broker) => return broker,
                    Err(StartError::Listen { error, .. }) if error.kind() == std::io::ErrorKind::AddrInUse => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await
    }

    /// Stops it, and starts it again on the same port.
    async fn restart(&mut self) {
        if let Some(broker) = self.broker.take() {
            within("shutdown", broker.shutdown()).await;
        }
        self.broker = Some(Node::broker(&self.dir, self.listen).await);
    }

    async fn client(&self) -> Client {
        let profile = self.broker.as_ref().unwrap().profile().unwrap();
        let config = ClientConfig::from_profile(profile).unwrap();
        within("connect", Client::connect(config)).await.unwrap()
    }

    async fn with_topic(partitions: u32) -> (Node, Client) {
        let node = Node::start().await;
        let client = node.client().await;
        let topic = NewTopic::new("flights").partitions(partitions);
        within("create", client.admin().create_topic(topic)).await.unwrap();
        (node, client)
    }
}

fn record(value: impl Into<Vec<u8>>) -> ProducerRecord {
    ProducerRecord::new("flights", Bytes::from(value.into()))
}

fn text(record: &ConsumedRecord) -> String {
    String::from_utf8(record.value.clone().unwrap().to_vec()).unwrap()
}

/// Everything from the consumer up to the ends as they are now.
async fn drain(consumer: &mut Consumer) -> Vec<ConsumedRecord> {
    let ends = within("ends", consumer.end_offsets(consumer.assignment())).await.unwrap();
    consumer.until(ends);
    let mut records = Vec::new();
    while let Some(record) = within("a record", consumer.next()).await {
        records.push(record.unwrap());
    }
    records
}

async fn whole_topic(client: &Client, partitions: u32) -> Vec<ConsumedRecord> {
    let consumer = client.consumer().assign((0..partitions).map(|p| ("flights", p))).build();
    drain(&mut within("build", consumer).await.unwrap()).await
}

/// Reads so many records from the beginning on, and waits for those that cannot be read yet.
async fn read(client: &Client, partitions: u32, count: usize) {
    let consumer = client.consumer().assign((0..partitions).map(|p| ("flights", p))).build();
    let mut consumer = within("build", consumer).await.unwrap();
    for i in 0..count {
        within(&format!("record {i} of {count}"), consumer.next()).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_produced_is_consumed_in_every_codec() {
    let (_node, client) = Node::with_topic(2).await;
    let mut sent = BTreeMap::new();
    for codec in [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
        let producer = within("build", client.producer().compression(codec).build()).await.unwrap();
        let mut deliveries = Vec::new();
        for i in 0..300 {
            let key = Bytes::from(format!("tail {}", i % 7));
            let value = format!("{codec:?} {i} {}", "x".repeat(200));
            let header = (Bytes::from_static(b"n"), Some(Bytes::from(i.to_string())));
            let record = record(value.clone()).key(key).timestamp_ms(1_000_000 + i).header(header.0, header.1);
            deliveries.push((value, producer.send(record).await.unwrap()));
        }
        for (value, delivery) in deliveries {
            let ack = within("an acknowledgement", delivery).await.unwrap();
            assert_eq!((ack.durability, ack.duplicate), (Durability::Flushed, false));
            assert!(sent.insert((ack.partition, ack.offset), value).is_none());
        }
        within("close", producer.close()).await;
    }
    let records = whole_topic(&client, 2).await;
    assert_eq!(records.len(), 1500);
    for record in &records {
        assert_eq!(sent.get(&(record.partition, record.offset)), Some(&text(record)));
        assert_eq!(record.partition, headwater_client::partition_for_key(record.key.as_ref().unwrap(), 2));
        assert_eq!(record.headers.len(), 1);
        assert!((1_000_000..1_000_300).contains(&record.timestamp_ms));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioner_of_ones_own_places_what_names_no_partition_and_no_other_is_invented_for_it() {
    let (_node, client) = Node::with_topic(3).await;
    // By the last digit of the value: neither the key's hash nor whatever sticks would do so.
    let partitioner = Partitioner::Custom(Arc::new(|context| {
        assert_eq!((context.topic, context.partitions), ("flights", 3));
        assert_eq!(context.key.map(|key| &key[..]), Some(&b"one key"[..]));
        u32::from(context.value.unwrap().last().unwrap() - b'0')
    }));
    let producer = within("build", client.producer().partitioner(partitioner).build()).await.unwrap();
    let sending = |record: ProducerRecord| producer.send(record.key(Bytes::from_static(b"one key")));
    for n in 0..9u32 {
        let delivery = within("a send", sending(record(format!("{}", n % 3)))).await.unwrap();
        assert_eq!(within("an acknowledgement", delivery).await.unwrap().partition, n % 3);
    }
    let delivery = within("a send", sending(record("2").partition(1))).await.unwrap();
    assert_eq!(within("an acknowledgement", delivery).await.unwrap().partition, 1, "the record's own word counts");

    for outside in ["3", "9"] {
        let refused = within("a refusal", sending(record(outside))).await.unwrap_err();
        let ProduceError::UnknownPartition { topic, partition, partitions } = &refused else { panic!("{refused}") };
        assert_eq!((&topic[..], partition.to_string(), *partitions), ("flights", outside.to_owned(), 3));
        let (back, refused) = producer.try_send(record(outside).key(Bytes::from_static(b"one key"))).unwrap_err();
        assert!(matches!(refused, ProduceError::UnknownPartition { .. }), "{refused}");
        assert_eq!(back.value, record(outside).value);
    }
    within("close", producer.close()).await;
    assert_eq!(whole_topic(&client, 3).await.len(), 10, "what was refused is nowhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_outlives_restarts_and_every_record_is_there_once_and_in_order() {
    let (mut node, client) = Node::with_topic(3).await;
    let producer = within("build", client.producer().batch_bytes(2000).build()).await.unwrap();
    let sending = tokio::spawn(async move {
        let mut deliveries = Vec::new();
        for i in 0..6000u32 {
            let record = record(format!("{i}")).key(Bytes::from(format!("key {}", i % 11)));
            deliveries.push(producer.send(record).await.unwrap());
            if i % 20 == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let mut acknowledged = Vec::new();
        for delivery in deliveries {
            acknowledged.push(within("an acknowledgement", delivery).await.unwrap());
        }
        producer.close().await;
        acknowledged
    });
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.restart().await;
    }
    let acknowledged = within("the producer", sending).await.unwrap();
    let records = whole_topic(&client, 3).await;
    assert_eq!(records.len(), 6000, "once each");
    let mut last = BTreeMap::new();
    for record in &records {
        let number: usize = text(record).parse().unwrap();
        let ack = &acknowledged[number];
        assert_eq!((ack.partition, ack.offset), (record.partition, record.offset));
        let before = last.insert(record.key.clone(), number);
        assert!(before.is_none_or(|before| before < number), "a key out of order");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_outlives_restarts_and_misses_nothing() {
    let (mut node, client) = Node::with_topic(1).await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let mut consumer = within("build", client.consumer().assign([("flights", 0)]).build()).await.unwrap();
    for round in 0..3 {
        for i in 0..100 {
            drop(producer.send(record(format!("{round} {i}"))).await.unwrap());
        }
        within("flush", producer.flush()).await;
        for i in 0..100 {
            let record = within("a record", consumer.next()).await.unwrap().unwrap();
            assert_eq!((record.offset, text(&record)), (round * 100 + i, format!("{round} {i}")));
        }
        node.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_are_found_by_offset_time_and_end() {
    let (_node, client) = Node::with_topic(1).await;
    let producer = within("build", client.producer().batch_bytes(500).build()).await.unwrap();
    for i in 0..1000 {
        drop(producer.send(record(format!("{i}")).timestamp_ms(10_000 + i * 10)).await.unwrap());
    }
    within("flush", producer.flush()).await;
    let build = client.consumer().assign([("flights", 0)]).start(StartFrom::Timestamp(15_001)).build();
    let mut consumer = within("build", build).await.unwrap();
    let next = within("a record", consumer.next()).await.unwrap().unwrap();
    assert_eq!(next.timestamp_ms, 15_010);
    within("seek", consumer.seek("flights", 0, StartFrom::Offset(7))).await.unwrap();
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().offset, 7);
    within("seek", consumer.seek("flights", 0, StartFrom::Latest)).await.unwrap();
    drop(producer.send(record("new")).await.unwrap());
    assert_eq!(text(&within("a record", consumer.next()).await.unwrap().unwrap()), "new");
    within("seek", consumer.seek("flights", 0, StartFrom::Earliest)).await.unwrap();
    let mut bytes = 0;
    let mut offsets = Vec::new();
    let ends = within("ends", consumer.end_offsets(consumer.assignment())).await.unwrap();
    consumer.until(ends);
    while let Some(batch) = within("a batch", consumer.next_batch()).await {
        let batch = batch.unwrap();
        bytes += batch.bytes();
        offsets.extend(batch.into_iter().map(|r| r.unwrap().offset));
    }
    assert_eq!(offsets, (0..1001).collect::<Vec<i64>>());
    assert!(bytes > 5000);
    let query = |at| OffsetQuery { topic: "flights".into(), partition: 0, at };
    let asked = vec![query(OffsetAt::Earliest), query(OffsetAt::Latest), query(OffsetAt::MaxTimestamp)];
    let answers = within("offsets", client.admin().list_offsets(asked)).await.unwrap();
    let offsets: Vec<_> = answers.into_iter().map(|a| a.unwrap().offset).collect();
    assert_eq!(offsets, [Some(0), Some(1001), Some(1000)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_members_share_and_one_takes_over_without_a_gap_or_a_second_reading() {
    let (_node, client) = Node::with_topic(4).await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let send = async |from: u32| {
        for i in from..from + 400 {
            drop(producer.send(record(format!("{i}")).partition(i % 4)).await.unwrap());
        }
        within("flush", producer.flush()).await;
    };
    send(0).await;
    let member = async || within("build", client.consumer().group("g").topics(["flights"]).build()).await.unwrap();
    let (mut one, mut two) = (member().await, member().await);
    let mut seen = BTreeSet::new();
    let mut take = |record: ConsumedRecord| {
        assert!(seen.insert((record.partition, record.offset)), "read twice: {record:?}");
        seen.len()
    };
    // Both are polled until each has its half, and everything was read.
    let mut count = 0;
    within("the first half", async {
        while count < 400 || one.assignment().len() != 2 || two.assignment().len() != 2 {
            tokio::select! {
                Some(record) = one.next() => count = take(record.unwrap()),
                Some(record) = two.next() => count = take(record.unwrap()),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
    })
    .await;
    within("close", two.close()).await.unwrap();
    send(400).await;
    within("the second half", async {
        while count < 800 {
            count = take(one.next().await.unwrap().unwrap());
        }
    })
    .await;
    assert_eq!(one.assignment().len(), 4);
    within("commit", one.commit()).await.unwrap();
    let group = within("describe", client.admin().describe_group("g")).await.unwrap();
    assert_eq!(group.members.len(), 1);
    assert_eq!(group.offsets.iter().map(|o| o.lag.unwrap()).sum::<i64>(), 0);
    within("close", one.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_resumes_exactly_where_it_closed() {
    let (_node, client) = Node::with_topic(3).await;
    let producer = within("build", client.producer().build()).await.unwrap();
    for i in 0..900 {
        drop(producer.send(record(format!("{i}")).key(Bytes::from(i.to_string()))).await.unwrap());
    }
    within("flush", producer.flush()).await;
    let mut seen = BTreeSet::new();
    let mut first = within("build", client.consumer().group("g").topics(["flights"]).build()).await.unwrap();
    for _ in 0..200 {
        let record = within("a record", first.next()).await.unwrap().unwrap();
        seen.insert((record.partition, record.offset));
    }
    within("close", first.close()).await.unwrap();
    let mut second = within("build", client.consumer().group("g").topics(["flights"]).build()).await.unwrap();
    within("assignment", second.assigned()).await.unwrap();
    for record in drain(&mut second).await {
        assert!(seen.insert((record.partition, record.offset)), "read twice: {record:?}");
    }
    assert_eq!(seen.len(), 900);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_in_a_deleted_topic_says_nothing_about_its_successor() {
    let (node, client) = Node::with_topic(1).await;
    let fill = async |client: &Client| {
        let producer = within("build", client.producer().build()).await.unwrap();
        for i in 0..10 {
            drop(producer.send(record(format!("{i}"))).await.unwrap());
        }
        within("close", producer.close()).await;
    };
    fill(&client).await;
    let build = client.consumer().group("g").assign([("flights", 0)]).auto_commit(None).build();
    let mut old = within("build", build).await.unwrap();
    for _ in 0..5 {
        within("a record", old.next()).await.unwrap().unwrap();
    }
    client.admin().delete_topic("flights").await.unwrap();
    client.admin().create_topic(NewTopic::new("flights")).await.unwrap();
    let error = within("commit", old.commit()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnknownTopicId), "{error}");
    // The client has heard of the new topic, and the consumer has nothing any more; what it had was of the old one.
    fill(&client).await;
    let committer = old.committer().unwrap();
    within("close", old.close()).await.unwrap();
    let by_hand = committer.commit_offsets([(TopicPartition::new("flights", 0), 5)]);
    let error = within("commit", by_hand).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnknownTopicId), "{error}");
    let client = node.client().await;
    fill(&client).await;
    let build = client.consumer().group("g").assign([("flights", 0)]).build();
    let mut new = within("build", build).await.unwrap();
    assert_eq!(within("a record", new.next()).await.unwrap().unwrap().offset, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_and_an_assigned_consumer_read_a_topic_that_somebody_else_made_anew_and_larger() {
    let (node, client) = Node::with_topic(1).await;
    let produce = async |client: &Client, value: &str, partition| {
        let producer = within("build", client.producer().build()).await.unwrap();
        let delivery = producer.send(record(value).partition(partition)).await.unwrap();
        within("an acknowledgement", delivery).await.unwrap();
    };
    let mut member = within("build", client.consumer().group("g").topics(["flights"]).build()).await.unwrap();
    produce(&client, "before", 0).await;
    assert_eq!(text(&within("a record", member.next()).await.unwrap().unwrap()), "before");
    let other = node.client().await;
    within("delete", other.admin().delete_topic("flights")).await.unwrap();
    within("create", other.admin().create_topic(NewTopic::new("flights"))).await.unwrap();
    produce(&other, "anew", 0).await;
    assert_eq!(text(&within("a record", member.next()).await.unwrap().unwrap()), "anew");
    within("add partitions", other.admin().add_partitions("flights", 2)).await.unwrap();
    produce(&other, "added", 1).await;
    assert_eq!(text(&within("a record", member.next()).await.unwrap().unwrap()), "added");
    let mut all: Vec<String> = whole_topic(&client, 2).await.iter().map(text).collect();
    all.sort();
    assert_eq!(all, ["added", "anew"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_keep_their_partitions_and_their_progress_over_a_restart() {
    let (mut node, client) = Node::with_topic(2).await;
    let producer = within("build", client.producer().build()).await.unwrap();
    let lost = Arc::new(AtomicUsize::new(0));
    let member = async || {
        let lost = lost.clone();
        let builder = client.consumer().group("g").topics(["flights"]).auto_commit(None);
        let builder = builder.on_rebalance(move |event| {
            let lost = lost.clone();
            async move {
                if let Rebalance::Lost(_) = event {
                    lost.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        within("build", builder.build()).await.unwrap()
    };
    let (mut one, mut two) = (member().await, member().await);
    within("shares", async {
        while one.assignment().len() != 1 || two.assignment().len() != 1 {
            tokio::select! {
                Some(_) = one.next() => panic!("nothing was produced"),
                Some(_) = two.next() => panic!("nothing was produced"),
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
        }
    })
    .await;
    let shares = (one.assignment(), two.assignment());
    let mut seen = BTreeSet::new();
    for round in 0..3 {
        for i in 0..50 {
            drop(producer.send(record(format!("{round} {i}")).partition(i % 2)).await.unwrap());
        }
        within("flush", producer.flush()).await;
        for _ in 0..50 {
            let record = within("a record", async {
                tokio::select! {
                    Some(record) = one.next() => record.unwrap(),
                    Some(record) = two.next() => record.unwrap(),
                }
            });
            let record = record.await;
            assert!(seen.insert((record.partition, record.offset)), "read twice: {record:?}");
        }
        node.restart().await;
        within("commit", one.commit()).await.unwrap();
        within("commit", two.commit()).await.unwrap();
    }
    assert_eq!((one.assignment(), two.assignment()), shares);
    assert_eq!(lost.load(Ordering::SeqCst), 0, "a restart fences nobody");
    let group = within("describe", client.admin().describe_group("g")).await.unwrap();
    assert_eq!(group.offsets.iter().map(|o| o.lag.unwrap()).sum::<i64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_member_comes_back_to_its_partitions_and_nobody_else_is_disturbed() {
    let (_node, client) = Node::with_topic(2).await;
    let events = Arc::new(AtomicUsize::new(0));
    let count = events.clone();
    let builder = client.consumer().group("g").topics(["flights"]).on_rebalance(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async {}
    });
    let mut other = within("build", builder.build()).await.unwrap();
    let till = async || {
        let builder = client.consumer().group("g").topics(["flights"]).instance_id("till-7");
        within("build", builder.build()).await.unwrap()
    };
    let mut first = till().await;
    within("shares", async {
        while first.assignment().len() != 1 || other.assignment().len() != 1 {
            tokio::select! {
                Some(_) = first.next() => panic!("nothing was produced"),
                Some(_) = other.next() => panic!("nothing was produced"),
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
        }
    })
    .await;
    let before = (first.assignment(), events.load(Ordering::SeqCst));
    within("close", first.close()).await.unwrap();
    let mut second = till().await;
    let again = within("assignment", second.assigned()).await.unwrap();
    assert_eq!((again, events.load(Ordering::SeqCst)), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_flushed_without_acknowledgements_is_there_though_the_client_goes_at_once() {
    let (node, client) = Node::with_topic(2).await;
    for round in 1..=3 {
        let leaving = node.client().await;
        let producer = within("build", leaving.producer().acks(Acks::None).build()).await.unwrap();
        for i in 0..2000 {
            drop(producer.send(record(vec![b'x'; 4000]).partition(i % 2)).await.unwrap());
        }
        within("flush", producer.flush()).await;
        drop(producer);
        within("close", leaving.close()).await;
        read(&client, 2, 2000 * round).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_records_pass_though_max_message_bytes_is_lowered_while_they_are_collected() {
    let (_node, client) = Node::with_topic(1).await;
    let producer = within("build", client.producer().linger(Duration::from_secs(3600)).build()).await.unwrap();
    let mut deliveries = vec![producer.send(record("before")).await.unwrap()];
    within("flush", producer.flush()).await;
    for i in 0..1000 {
        let size = if i == 500 { 3000 } else { 100 };
        deliveries.push(producer.send(record(format!("{i:0size$}"))).await.unwrap());
    }
    let limit = vec![("max.message.bytes".into(), Some("2000".into()))];
    within("alter", client.admin().alter_topic("flights", limit, false)).await.unwrap();
    within("flush", producer.flush()).await;
    let mut offsets = Vec::new();
    for (i, delivery) in deliveries.into_iter().enumerate() {
        match within("an outcome", delivery).await {
            Ok(acknowledged) => offsets.push(acknowledged.offset),
            Err(error) => assert!(i == 501 && error.to_string().contains("max.message.bytes"), "{i}: {error}"),
        }
    }
    assert_eq!(offsets, (0..1000).collect::<Vec<_>>());
    let values: Vec<String> = whole_topic(&client, 1).await.iter().skip(1).map(text).collect();
    assert_eq!(values, (0..1000).filter(|i| *i != 500).map(|i| format!("{i:0100}")).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledgements_tell_what_they_promise() {
    let (_node, client) = Node::with_topic(1).await;
    let topic = NewTopic::new("fast").config("durability", "replicated");
    within("create", client.admin().create_topic(topic)).await.unwrap();
    for (topic, acks, durability) in [
        ("flights", Acks::All, Durability::Flushed),
        ("fast", Acks::All, Durability::Replicated),
        ("flights", Acks::Leader, Durability::Written),
        ("flights", Acks::None, Durability::None),
    ] {
        let producer = within("build", client.producer().acks(acks).build()).await.unwrap();
        let value = Bytes::from_static(b"value");
        let delivery = producer.send(ProducerRecord::new(topic, value)).await.unwrap();
        assert_eq!(within("an acknowledgement", delivery).await.unwrap().durability, durability, "{topic} {acks:?}");
        within("close", producer.close()).await;
    }
    // What needed no acknowledgement is there too, and is read once it is as durable as the topic asks.
    read(&client, 1, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_larger_than_batches_credit_and_prefetch_pass() {
    let (_node, client) = Node::with_topic(1).await;
    let topic = NewTopic::new("large").config("max.message.bytes", "20000000");
    within("create", client.admin().create_topic(topic)).await.unwrap();
    let producer = within("build", client.producer().build()).await.unwrap();
    let large = Bytes::from(vec![7; 12 << 20]);
    let delivery = producer.send(ProducerRecord::new("large", large.clone())).await.unwrap();
    within("an acknowledgement", delivery).await.unwrap();
    let build = client.consumer().assign([("large", 0)]).prefetch_bytes(64 << 10).build();
    let mut consumer = within("build", build).await.unwrap();
    assert_eq!(within("a record", consumer.next()).await.unwrap().unwrap().value.unwrap(), large);
    let error = producer.send(record(vec![7; 2 << 20])).await.unwrap_err();
    assert!(error.to_string().contains("max.message.bytes"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_are_administered() {
    let (_node, client) = Node::with_topic(2).await;
    let admin = client.admin();
    assert_eq!(admin.create_topic(NewTopic::new("flights")).await.unwrap_err().code(), Some(ErrorCode::TopicExists));
    let error = admin.create_topic(NewTopic::new("x").config("retention.mss", "1")).await.unwrap_err();
    assert!(error.code() == Some(ErrorCode::InvalidConfig) && error.to_string().contains("retention.mss"), "{error}");
    admin.alter_topic("flights", vec![("retention.ms".into(), Some("1000000".into()))], false).await.unwrap();
    admin.add_partitions("flights", 5).await.unwrap();
    let topic = admin.describe_topic("flights").await.unwrap();
    let retention = topic.config.iter().find(|c| c.name == "retention.ms").unwrap();
    assert_eq!((topic.partitions.len(), &*retention.value, &*retention.source), (5, "1000000", "topic"));
    let producer = client.producer().build().await.unwrap();
    for _ in 0..10 {
        drop(producer.send(record("x").partition(4)).await.unwrap());
    }
    within("flush", producer.flush()).await;
    assert_eq!(admin.delete_records("flights", 4, Some(3)).await.unwrap(), 3);
    assert!(admin.list_topics().await.unwrap().iter().any(|t| t.name == "flights" && t.partitions == 5));
    let at = TopicPartition::new("flights", 4);
    assert!(admin.commit_offsets("g", vec![(at, 5)]).await.unwrap()[0].1.is_ok());
    assert_eq!(admin.fetch_offsets("g").await.unwrap()[0].offset, 5);
    assert!(admin.list_groups().await.unwrap().iter().any(|g| g.group == "g"));
    admin.delete_offsets("g", "flights", &[]).await.unwrap();
    assert!(admin.fetch_offsets("g").await.unwrap().is_empty());
    assert_eq!(admin.describe_broker().await.unwrap().pid, std::process::id());
    admin.delete_topic("flights").await.unwrap();
    let error = producer.send(record("late").partition(0)).await.unwrap().await.unwrap_err();
    assert!(matches!(error.code(), Some(ErrorCode::UnknownTopic | ErrorCode::UnknownTopicId)), "{error}");
}
