//! A partition that moves at a limited pace.

use crate::cluster::*;
use headwater_broker::metadata::command::{Reassign, command::Command as Kind};
use headwater_proto::wire::Acks;
use std::time::{Duration, Instant};

#[tokio::test]
async fn a_new_replica_is_sent_no_more_than_the_limit_until_it_is_in_sync() {
    let cluster = Cluster::start(&[1, 2, 3], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &vec!["x".repeat(10_000); 30]).await;
    let reassign = |throttle_bytes_per_second| {
        let (topic_id, replicas) = (topic_id.clone(), vec![1, 3]);
        Kind::Reassign(Reassign { topic_id, partition: 0, replicas, throttle_bytes_per_second })
    };
    let began = Instant::now();
    cluster.common.apply(reassign(100_000)).unwrap();
    // Those that are in sync are held up by nothing.
    send_all(&mut produce, &vec!["y".repeat(10_000); 5]).await;
    cluster.until_in_sync("t", &[1, 3]).await;
    // 350 KB, of which the first eighth of a second is not waited for.
    assert!(began.elapsed() >= Duration::from_millis(2500), "{:?}", began.elapsed());
    assert_eq!(cluster.partition("t").throttle_bytes_per_second, 0, "it ends with the move");
    // In sync, it is as fast as the others. With a replica that left, the leader epoch changed, and streams of the old one are over.
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    let began = Instant::now();
    send_all(&mut produce, &vec!["z".repeat(10_000); 100]).await;
    assert!(began.elapsed() < Duration::from_secs(10), "a megabyte would take that long: {:?}", began.elapsed());
}

#[tokio::test]
async fn the_limit_of_a_move_may_be_lifted_while_it_lasts() {
    let cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1], &[]);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &vec!["x".repeat(10_000); 100]).await;
    let reassign = |throttle_bytes_per_second| {
        let (topic_id, replicas) = (topic_id.clone(), vec![2]);
        Kind::Reassign(Reassign { topic_id, partition: 0, replicas, throttle_bytes_per_second })
    };
    // At a byte a second it would take days.
    cluster.common.apply(reassign(1)).unwrap();
    cluster.until_sample(1, "headwater_streams{kind=\"replica\"}", 1.0).await;
    cluster.common.apply(reassign(0)).unwrap();
    cluster.until_in_sync("t", &[2]).await;
}

/// Kafka's limit and any operator's: what moves to a broker must not drown it, from however many leaders and partitions it comes.
#[tokio::test]
async fn a_broker_takes_in_no_more_than_the_limit_of_all_that_moves_to_it() {
    let cluster = Cluster::start(&[1, 2, 3], &[]).await;
    // Two are led by broker 1, and one by broker 2.
    let topics = [("a", 1), ("b", 1), ("c", 2)];
    let mut moves = Vec::new();
    for (name, leader) in topics {
        let topic_id = cluster.create(name, 1, &[leader], &[]);
        let mut produce = cluster.produce(leader, &topic_id, Acks::All).await;
        send_all(&mut produce, &vec!["x".repeat(10_000); 15]).await;
        moves.push(Reassign { topic_id, partition: 0, replicas: vec![3], throttle_bytes_per_second: 100_000 });
    }
    let began = Instant::now();
    for reassign in moves {
        cluster.common.apply(Kind::Reassign(reassign)).unwrap();
    }
    for (name, _) in topics {
        cluster.until_in_sync(name, &[3]).await;
    }
    // 450 KB; each of them for itself would be there after a second and a half.
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
}
