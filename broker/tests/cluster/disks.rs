//! A broker of several with a disk that hangs.

use crate::behind::{LetGo, Slow, until_open};
use crate::harness::*;
use crate::nodes::Nodes;
use bytes::Bytes;
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response};
use std::sync::Arc;

async fn create(nodes: &Nodes, name: &str, brokers: &[i32]) -> Bytes {
    let placement = vec![wire::TopicReplicas { brokers: brokers.to_vec() }];
    let create = wire::CreateTopic { name: name.into(), placement, ..Default::default() };
    match nodes.client(0).await.call(Request::CreateTopic(create)).await {
        Response::CreateTopic(created) => created.topic_id,
        other => panic!("{other:?}"),
    }
}

/// It waited for the disk before it heard of anything else: it was elected for other partitions, said with its heartbeats that all was
/// well, and never led them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_under_a_deleted_partition_keeps_its_broker_from_no_role() {
    let slow = Arc::new(Slow::at("/hung-0/"));
    let gate = Arc::clone(&slow.gate);
    let let_go = LetGo(Arc::clone(&gate));
    let mut nodes = Nodes::of(3);
    nodes.set("num.io.threads=4");
    nodes.on(1, slow);
    nodes.form(3).await;
    let hung = create(&nodes, "hung", &[2]).await;
    let other = create(&nodes, "other", &[3, 2, 1]).await;
    until_open(&nodes.client(2).await, &other, 0).await;
    let client = nodes.client(1).await;
    until_open(&client, &hung, 0).await;
    gate.shut();
    let (mut produce, _) = client.produce(open_produce(&hung, 0)).await;
    produce.request(&batch(&[b"x"])).await;
    within("the disk to hang", async {
        while gate.waiting() < 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let delete = Request::DeleteTopic(wire::DeleteTopic { name: "hung".into() });
    let deleted = nodes.client(0).await.call(delete).await;
    assert!(matches!(deleted, Response::Done(_)), "{deleted:?}");
    let told = within("whoever waits is told", produce.answer()).await.error.expect("it is gone");
    assert_eq!(ErrorCode::from_number(told.code), ErrorCode::UnknownTopicId, "{told:?}");

    // The one that leads dies, and this one is next.
    nodes.kill(2);
    until_open(&client, &other, 0).await;
    let new = create(&nodes, "new", &[2]).await;
    until_open(&client, &new, 0).await;
    assert_eq!(produced(&client, &new, b"x").await.error, None);
    assert_eq!(gate.waiting(), 1);
    drop(let_go);
    nodes.stop(1).await;
}
