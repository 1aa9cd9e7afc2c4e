//! Replicas whose disk lost them while their broker was away.

use super::cluster::*;
use super::harness::{batch, sample, within};
use bytes::Bytes;
use headwater_broker::metadata::command::{
    DeleteTopic, FenceReplicas, RestoreReplicas, TopicPartition, command::Command as Kind,
};
use headwater_proto::wire::Acks;
use headwater_storage::OsFiles;
use headwater_storage::sim::{Fault, Operation, SimFiles};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Whatever is flushed is known to be at once.
const SETTINGS: &[&str] = &["log.flush.offset.checkpoint.interval.ms=10"];

/// Waits until a line of what a broker knows of its replicas ends so.
async fn until_known(cluster: &Cluster, id: i32, topic: &str, end: &str) {
    let path = cluster.dir(id).join("headwater-replicas");
    let is_known =
        |text: &str| text.lines().any(|line| line.starts_with(&format!("{topic} 0 ")) && line.ends_with(end));
    within(&format!("{topic} is known with {end}"), async {
        while !is_known(&std::fs::read_to_string(&path).unwrap()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn strays(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.to_string_lossy().ends_with("-stray")).collect()
}

/// An empty log that is taken for a whole one would lead, and everything that was acknowledged be gone.
#[tokio::test]
async fn an_emptied_replica_is_not_believed_and_is_fetched_from_its_leader() {
    let mut cluster = Cluster::start(&[1, 2], SETTINGS).await;
    let topics = ["gone", "cut"];
    let mut ids = Vec::new();
    for topic in topics {
        let topic_id = cluster.create(topic, 1, &[1, 2], &[("min.insync.replicas", "2")]);
        cluster.until_in_sync(topic, &[1, 2]).await;
        let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
        send_all(&mut produce, &texts(topic, 50)).await;
        until_known(&cluster, 1, topic, " 50 0").await;
        ids.push(topic_id);
    }
    cluster.kill(1);
    cluster.let_go(1).await;
    std::fs::remove_dir_all(cluster.dir(1).join("gone-0")).unwrap();
    let log = std::fs::OpenOptions::new().write(true).open(cluster.dir(1).join("cut-0/00000000000000000000.log"));
    log.unwrap().set_len(1000).unwrap();

    let epochs = topics.map(|topic| cluster.partition(topic).leader_epoch);
    cluster.up(1).await;
    for ((topic, topic_id), epoch) in topics.into_iter().zip(&ids).zip(epochs) {
        cluster.until_in_sync(topic, &[1, 2]).await;
        let partition = cluster.partition(topic);
        assert_eq!((partition.leader, partition.leader_epoch), (2, epoch + 1), "{topic}");
        assert_eq!(cluster.read(2, topic_id, 50).await, texts(topic, 50), "{topic}");
        cluster.until_sample(1, &log_end(topic), 50.0).await;
    }
    let aside = strays(cluster.dir(1));
    assert!(aside.len() == 1 && aside[0].to_string_lossy().contains("cut-0."), "{aside:?}");
}

/// It was out of sync until somebody restarted its broker.
#[tokio::test]
async fn a_follower_whose_disk_failed_once_is_fetched_anew_while_its_broker_runs() {
    let mut cluster = Cluster::start(&[1], SETTINGS).await;
    let files = SimFiles::new(1);
    cluster.up_on(2, files.clone(), &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 5)).await;
    files.fail(Fault::new(Operation::Sync).on("t-0/00000000000000000000.log").times(1));
    produce.request(&batch(&[b"b"])).await;
    cluster.until_sample(2, "headwater_partitions_fenced", 1.0).await;
    assert_eq!(sample(cluster.broker(2), "headwater_replicas_healed_total").await, 0.0, "it may be elected yet");
    let replicas = vec![TopicPartition { topic_id: topic_id.clone(), partition: 0 }];
    let incarnation: Bytes = cluster.incarnation(2).as_bytes().to_vec().into();
    let fence = FenceReplicas { broker_id: 2, incarnation: incarnation.clone(), replicas: replicas.clone() };
    cluster.common.control(Kind::FenceReplicas(fence)).unwrap();
    assert_eq!(within("the acknowledgement", produce.answer()).await.error, None);
    cluster.until_sample(2, "headwater_replicas_healed_total", 1.0).await;
    cluster.until_sample(2, "headwater_partitions_fenced", 0.0).await;
    let restore = RestoreReplicas { broker_id: 2, incarnation, replicas };
    cluster.common.control(Kind::RestoreReplicas(restore)).unwrap();
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(2, &log_end("t"), 6.0).await;
    send_all(&mut produce, &texts("c", 1)).await;
}

#[tokio::test]
async fn the_last_replica_that_was_emptied_leads_nothing_and_is_not_made_anew() {
    let mut cluster = Cluster::start(&[1, 2], SETTINGS).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.kill(2);
    cluster.fence(2);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("only here ", 5)).await;
    cluster.kill(1);
    cluster.fence(1);
    cluster.let_go(1).await;
    std::fs::remove_dir_all(cluster.dir(1).join("t-0")).unwrap();
    cluster.up(2).await;
    cluster.up(1).await;
    let partition = cluster.partition("t");
    assert_eq!((partition.leader, partition.isr, partition.elr), (-1, vec![], vec![]));
    assert_eq!(partition.last_known, [1], "who had it last");
    assert!(!cluster.dir(1).join("t-0").exists(), "there is nobody to fetch it from");
}

#[tokio::test]
async fn a_folder_of_a_topic_that_was_deleted_meanwhile_is_a_stray_and_goes_after_its_time() {
    let mut cluster = Cluster::start(&[1, 2], SETTINGS).await;
    let old = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &old, Acks::All).await;
    send_all(&mut produce, &texts("old", 5)).await;
    cluster.kill(2);
    cluster.fence(2);
    cluster.common.apply(Kind::DeleteTopic(DeleteTopic { topic_id: old })).unwrap();
    let new = cluster.create("t", 1, &[1, 2], &[]);
    let mut produce = cluster.produce(1, &new, Acks::All).await;
    send_all(&mut produce, &texts("new", 3)).await;
    cluster.up(2).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(2, &log_end("t"), 3.0).await;
    assert_eq!(strays(cluster.dir(2)).len(), 1);

    cluster.kill(2);
    cluster.up_on(2, Arc::new(OsFiles::default()), &["stray.delete.delay.ms=100"]).await;
    within("the stray is deleted", async {
        while !strays(cluster.dir(2)).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// A broker that starts every day would else never delete anything.
#[tokio::test]
async fn how_long_a_folder_has_lain_aside_counts_however_often_its_broker_starts() {
    let mut cluster = Cluster::start(&[1], SETTINGS).await;
    cluster.kill(1);
    cluster.let_go(1).await;
    let root = cluster.dir(1).to_owned();
    std::fs::create_dir(root.join("stranger-0")).unwrap();
    cluster.up(1).await;
    let [aside] = &strays(&root)[..] else { panic!("{:?}", strays(&root)) };
    cluster.kill(1);
    cluster.let_go(1).await;
    // As if that had been an hour ago; and one that Kafka set aside, nobody knows when.
    let name = aside.file_name().unwrap().to_str().unwrap();
    let unique = Uuid::parse_str(name.strip_prefix("stranger-0.").unwrap().strip_suffix("-stray").unwrap()).unwrap();
    let since_ms = u64::try_from(unique.as_u128() >> 80).unwrap();
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    assert!(now_ms - u128::from(since_ms) < 60_000, "{name} says when it was set aside");
    let before = uuid::Builder::from_unix_timestamp_millis(since_ms - 3_600_000, &[7; 10]).into_uuid();
    let earlier = root.join(format!("stranger-0.{}-stray", before.simple()));
    std::fs::rename(aside, &earlier).unwrap();
    let of_kafka = root.join(format!("stranger-1.{}-stray", Uuid::new_v4().simple()));
    std::fs::create_dir(&of_kafka).unwrap();
    cluster.up_on(1, Arc::new(OsFiles::default()), &["stray.delete.delay.ms=24000"]).await;
    within("its time is over", async {
        while earlier.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(of_kafka.exists(), "its time begins when it is seen");
}

/// What a replica has taken in once does not permit another cut below what it knows to be acknowledged, after a restart neither.
#[tokio::test]
async fn an_unclean_election_that_was_taken_in_is_written_down() {
    let mut cluster = Cluster::start(&[1, 2], SETTINGS).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &unclean_topic());
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.kill(2);
    cluster.fence(2);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("lost", 7)).await;
    cluster.kill(1);
    cluster.fence(1);
    cluster.up(2).await;
    cluster.up(1).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    assert_eq!(cluster.partition("t").unclean_recoveries, 1);
    until_known(&cluster, 1, "t", " 1").await;
}
