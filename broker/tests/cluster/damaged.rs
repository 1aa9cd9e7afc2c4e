//! A leader whose log is damaged while it runs: what it wrote itself it does not check again before it pushes it.

use crate::harness::*;
use crate::nodes::Nodes;
use bytes::Bytes;
use headwater_proto::wire::{self, Acks, call::Request, call_response::Response};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// A topic of one partition that these brokers keep, the first of them as its leader.
async fn create(nodes: &Nodes, brokers: &[i32]) -> Bytes {
    let create = wire::CreateTopic {
        name: "t".into(),
        placement: vec![wire::TopicReplicas { brokers: brokers.to_vec() }],
        config: vec![wire::ConfigChange { name: "min.insync.replicas".into(), value: Some("2".into()) }],
        ..Default::default()
    };
    match nodes.client(0).await.call(Request::CreateTopic(create)).await {
        Response::CreateTopic(created) => created.topic_id,
        other => panic!("{other:?}"),
    }
}

async fn topic(nodes: &Nodes, number: usize) -> wire::DescribeTopicResponse {
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "t".into(), stale: false });
    match nodes.client(number).await.call(describe).await {
        Response::DescribeTopic(told) => told,
        other => panic!("{other:?}"),
    }
}

/// Waits until the partition is so, as this broker has it.
async fn until(
    nodes: &Nodes,
    number: usize,
    what: &str,
    is_so: impl Fn(&wire::PartitionDescription) -> bool,
) -> wire::PartitionDescription {
    within(what, async {
        loop {
            let told = topic(nodes, number).await.partitions.remove(0);
            if is_so(&told) {
                return told;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
}

/// Sends one record to whoever leads, with acks=all.
async fn send(nodes: &Nodes, leader: usize, topic_id: &Bytes, value: &[u8]) {
    let sent = async {
        loop {
            let client = nodes.client(leader).await;
            let open = wire::OpenProduce { acks: Acks::All.into(), ..open_produce(topic_id, 0) };
            let (mut produce, answer) = client.produce(open).await;
            if answer.error.is_none() {
                produce.request(&batch(&[value])).await;
                if produce.answer().await.error.is_none() {
                    return;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    within("an acknowledgement", sent).await;
}

/// Changes one byte of the value in a broker's log, behind its back.
fn damage(nodes: &Nodes, number: usize, value: &[u8]) {
    let path: PathBuf = nodes.config(number).data_dir.join("t-0/00000000000000000000.log");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    let read = file.read_at(&mut bytes, 0).unwrap();
    let at = bytes[..read].windows(value.len()).position(|it| it == value).expect("it is there");
    file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
}

/// The followers refused it and asked for it again, for ever: nobody heard of it, and soon nobody was in sync but the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_followers_refuse_what_is_damaged_in_its_log_leads_no_more() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let topic_id = create(&nodes, &[1, 2, 3]).await;
    let (leader, other, away) = (0, 1, 2);
    let before = until(&nodes, leader, "all are in sync", |told| told.leader == 1 && told.isr.len() == 3).await;
    send(&nodes, leader, &topic_id, b"before").await;
    nodes.kill(away);
    until(&nodes, leader, "one is away", |told| told.isr.len() == 2).await;
    send(&nodes, leader, &topic_id, b"this will be damaged").await;
    send(&nodes, leader, &topic_id, b"after").await;
    damage(&nodes, leader, b"this will be damaged");
    // It asks for what is damaged now.
    nodes.start(away).await;
    let after = until(&nodes, other, "another one leads", |told| told.leader == 2).await;
    assert!(after.leader_epoch > before.leader_epoch, "{after:?}");
    send(&nodes, other, &topic_id, b"goes on").await;
    until(&nodes, other, "who was away is in sync", |told| told.isr.contains(&3)).await;
    let client = nodes.client(other).await;
    let mut fetch = client.fetch(open_fetch(&topic_id, 0, 0)).await.0;
    let records = within("records", fetch.read_to(4)).await;
    let values: Vec<&[u8]> = records.iter().map(|(_, value)| &value[..]).take(4).collect();
    assert_eq!(values, [&b"before"[..], b"this will be damaged", b"after", b"goes on"]);
    // And the one that was damaged is as good as the others, without a restart.
    until(&nodes, other, "all are in sync again", |told| told.isr.len() == 3).await;
    within("it was fetched anew", async {
        while sample(nodes.broker(leader), "headwater_replicas_healed_total").await < 1.0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    send(&nodes, other, &topic_id, b"to all").await;
    nodes.kill(away);
    until(&nodes, other, "one is away", |told| told.isr.len() == 2).await;
    send(&nodes, other, &topic_id, b"to two").await;
}
