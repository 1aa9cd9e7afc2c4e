//! Who leads while brokers come, go, and are cut off.

use super::harness::*;
use super::nodes::{Nodes, brokers_of};
use bytes::Bytes;
use headwater_proto::wire::{self, Acks, call::Request, call_response::Response, open};
use headwater_proto::{ErrorCode, frame};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

async fn create(nodes: &Nodes, name: &str, partitions: u32, replication_factor: u32) -> Bytes {
    let create = wire::CreateTopic { name: name.into(), partitions, replication_factor, ..Default::default() };
    match nodes.client(0).await.call(Request::CreateTopic(create)).await {
        Response::CreateTopic(created) => created.topic_id,
        other => panic!("{other:?}"),
    }
}

fn leaders(told: &wire::DescribeClusterResponse) -> Vec<u64> {
    told.brokers.iter().map(|broker| broker.leaders).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaderships_are_handed_over_before_a_broker_stops_and_given_back_once_it_is_in_sync() {
    let mut nodes = Nodes::of(3);
    nodes.set("leader.imbalance.check.interval.seconds=1");
    nodes.form(3).await;
    create(&nodes, "t", 6, 3).await;
    assert_eq!(leaders(&nodes.describe(0, false).await), [2, 2, 2]);
    nodes.stop(1).await;
    let told = nodes.describe(0, false).await;
    // Whoever comes next among a partition's replicas leads it then, which may be the same broker for both.
    let led = leaders(&told);
    assert_eq!((led[1], led.iter().sum::<u64>(), told.offline), (0, 6, 0), "it told them before it went: {led:?}");
    nodes.start(1).await;
    nodes.until(0, "it leads again what it should", |told| leaders(told) == [2, 2, 2]).await;
}

/// The streams of those who watch ended before they had told what the broker itself knew by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_watch_a_broker_that_stops_hear_who_leads_before_they_are_sent_away() {
    // So many that they are not told at once.
    const STREAMS: usize = 500;
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let topic_id = create(&nodes, "t", 60, 3).await;
    let client = nodes.client(1).await;
    let mut watching = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = client.open(open::Stream::Watch(wire::OpenWatch { beat_ms: 60_000 })).await;
        let request = wire::WatchRequest { add_topic_ids: vec![topic_id.clone()], ..Default::default() };
        stream.send.write_chunk(frame::encode(&request, 0)).await.unwrap();
        watching.push((stream.send, FrameReader::<wire::WatchUpdate>::new(stream.recv), BTreeMap::new()));
    }
    for (_, updates, known) in &mut watching {
        while known.len() < 60 {
            learn(known, &updates.next().await.expect("an update").0);
        }
        assert_eq!(known.values().filter(|leader| **leader == 2).count(), 20, "{known:?}");
    }
    nodes.stop(1).await;
    for (_, updates, known) in &mut watching {
        let refused = loop {
            let update = updates.next().await.expect("the stream does not end without a word").0;
            learn(known, &update);
            if let Some(refused) = update.error {
                break refused;
            }
        };
        assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::ShuttingDown, "{refused:?}");
        assert_eq!(known.values().filter(|leader| **leader == 2).count(), 0, "{known:?}");
    }
}

fn learn(known: &mut BTreeMap<u32, i32>, update: &wire::WatchUpdate) {
    let partitions = update.topics.iter().flat_map(|topic| &topic.partitions);
    known.extend(partitions.map(|partition| (partition.partition, partition.leader)));
}

/// The answer was lost: whoever asked again was told that there is nothing to elect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_that_is_asked_for_again_says_that_it_took_place() {
    let mut nodes = Nodes::of(2);
    nodes.form(2).await;
    let placement = [vec![2, 1], vec![1, 2]].map(|brokers| wire::TopicReplicas { brokers });
    let config = wire::ConfigChange { name: "min.insync.replicas".into(), value: Some("1".into()) };
    let create =
        wire::CreateTopic { name: "t".into(), placement: placement.into(), config: vec![config], ..Default::default() };
    let created = nodes.client(0).await.call(Request::CreateTopic(create)).await;
    assert!(matches!(created, Response::CreateTopic(_)), "{created:?}");
    nodes.stop(1).await;
    nodes.start(1).await;
    nodes
        .until(0, "it is in sync again, and leads nothing", |told| {
            told.under_replicated == 0 && leaders(told) == [2, 0]
        })
        .await;
    let elect = async |number: usize, id: u8| {
        let elect = wire::ElectLeaders { topic: "t".into(), ..Default::default() };
        match nodes.client(number).await.call_as(vec![id; 16].into(), Request::ElectLeaders(elect)).await {
            Response::ElectLeaders(told) => {
                (told.partitions.iter().map(|it| it.leader).collect::<Vec<_>>(), told.unnamed)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(elect(0, 7).await, (vec![2], 0));
    for number in [0, 1] {
        assert_eq!(elect(number, 7).await, (vec![], 1), "the same again");
        assert_eq!(elect(number, 8).await, (vec![], 0), "there is nothing to elect for anybody else");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_that_all_stop_wait_for_nobody() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    create(&nodes, "t", 6, 3).await;
    let began = Instant::now();
    nodes.stop_all(3).await;
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

/// The ids are in force, and whoever leads the partition does not know of it yet: the producer was refused for good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_takes_a_producer_id_that_another_broker_has_given_out_just_now() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let topic_id = create(&nodes, "t", 3, 1).await;
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "t".into(), stale: false });
    let Response::DescribeTopic(topic) = nodes.client(0).await.call(describe).await else { panic!("it is there") };
    for (gives, leads) in [(0, 1), (0, 2), (1, 2), (2, 0)] {
        let led = topic.partitions.iter().find(|partition| partition.leader == leads as i32 + 1).expect("spread");
        let (giver, leader) = (nodes.client(gives).await, nodes.client(leads).await);
        let ready = || leader.produce(open_produce(&topic_id, led.partition));
        within("the partition is open", async { while ready().await.1.error.is_some() {} }).await;
        let producer_id = giver.allocate_producer_id().await;
        let open = wire::OpenProduce { producer_id, producer_epoch: 0, ..open_produce(&topic_id, led.partition) };
        assert_eq!(leader.produce(open).await.1.error, None, "{producer_id}");
    }
    // Nobody gave this one out, and the quorum knows.
    let open = wire::OpenProduce { producer_id: 1 << 40, producer_epoch: 0, ..open_produce(&topic_id, 0) };
    let number = topic.partitions[0].leader as usize - 1;
    let refused = nodes.client(number).await.produce(open).await.1.error.expect("refused");
    assert_eq!(refused.code, ErrorCode::InvalidRequest.number(), "{refused:?}");
}

/// What is acknowledged by a leader alone, or by nobody, rests on nobody else leading.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_from_the_quorum_acknowledges_nothing_by_itself() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let topic_id = create(&nodes, "t", 3, 1).await;
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "t".into(), stale: false });
    let Response::DescribeTopic(topic) = nodes.client(0).await.call(describe).await else { panic!("it is there") };
    let partition = topic.partitions.iter().find(|partition| partition.leader == 1).expect("spread").partition;
    let client = nodes.client(0).await;
    let produce = async |acks: Acks| {
        let open = wire::OpenProduce { acks: acks.into(), ..open_produce(&topic_id, partition) };
        let (mut produce, opened) = client.produce(open).await;
        match opened.error {
            Some(error) => Some(error),
            None => {
                let header = wire::ProduceRequest { request_id: 1, partition };
                produce.request_as(header, &batch(&[b"a"])).await;
                within("an answer", produce.answer()).await.error
            }
        }
    };
    within("the new partition is open", async {
        while produce(Acks::Leader).await.is_some_and(|error| error.retryable) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(produce(Acks::Leader).await, None);
    nodes.kill(1);
    nodes.kill(2);
    within("the lease ends", async {
        loop {
            match produce(Acks::Leader).await {
                None => tokio::time::sleep(Duration::from_millis(50)).await,
                Some(error) => {
                    assert_eq!(ErrorCode::from_number(error.code), ErrorCode::NotLeader, "{}", error.message);
                    assert!(error.retryable);
                    return;
                }
            }
        }
    })
    .await;
    assert_eq!(produce(Acks::All).await, None, "its whole ISR answers for that");
    nodes.start(1).await;
    nodes.until(0, "there is a quorum", |told| brokers_of(told, "active").contains(&2)).await;
    within("the lease is back", async {
        while produce(Acks::Leader).await.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}
