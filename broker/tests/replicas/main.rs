//! Partitions that several brokers keep: real endpoints over QUIC, real logs, and metadata that the tests decide.

#[path = "../harness/mod.rs"]
mod harness;

mod cluster;
mod idle;
mod lost;
mod refused;
mod throttle;

use cluster::*;
use harness::*;
use headwater_broker::metadata::command::{Reassign, command::Command as Kind};
use headwater_proto::ErrorCode;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, Acks, Durability};
use headwater_storage::OsFiles;
use headwater_storage::sim::{Fault, Operation, SimFiles};
use std::sync::Arc;

#[tokio::test]
async fn acks_all_waits_for_the_followers_flush() {
    let mut cluster = Cluster::start(&[1], &[]).await;
    let files = SimFiles::new(1);
    cluster.up_on(2, files.clone(), &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 1)).await;

    let held = files.hold(Fault::new(Operation::Sync).on("t-0/00000000000000000000.log"));
    produce.request(&batch(&[b"b"])).await;
    within("a flush that hangs", async {
        while held.waiting() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    // The leader has written and flushed it, and nobody is told.
    cluster.until_sample(1, &log_end("t"), 2.0).await;
    let early = tokio::time::timeout(std::time::Duration::from_millis(200), produce.answer()).await;
    assert!(early.is_err(), "{early:?}");
    cluster.until_sample(1, "headwater_partition_high_watermark{topic=\"t\",partition=\"0\"}", 1.0).await;
    drop(held);
    let answer = within("the acknowledgement", produce.answer()).await;
    assert_eq!((answer.error, answer.durability), (None, Durability::Flushed.into()));
    assert_eq!(cluster.read(1, &topic_id, 2).await, ["a0", "b"]);
}

/// A follower that went by its own setting waited for ever for the ninth stream.
#[tokio::test]
async fn a_leader_that_takes_few_streams_on_a_connection_is_followed_on_several() {
    let mut cluster = Cluster::start(&[2], &[]).await;
    cluster.up_on(1, Arc::new(OsFiles::default()), &["max.streams.per.connection=16"]).await;
    cluster.create("t", 40, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(1, "headwater_streams{kind=\"replica\"}", 40.0).await;
}

/// A broker that came back, or whose connection broke, was cut off from the others for as long as clients held all places.
#[tokio::test]
async fn clients_that_hold_all_connections_keep_no_broker_out() {
    for setting in ["max.connections=3", "max.connections.per.ip=3"] {
        let mut cluster = Cluster::start(&[], &[]).await;
        cluster.up_on(1, Arc::new(OsFiles::default()), &[setting]).await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(Client::connect(cluster.broker(1)).await);
        }
        cluster.up(2).await;
        let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
        let opened = async {
            loop {
                let open = wire::OpenProduce { acks: Acks::All.into(), ..open_produce(&topic_id, 0) };
                let (produce, answer) = clients[0].produce(open).await;
                match answer.error {
                    None => return produce,
                    Some(error) => assert!(error.retryable || error.code == 11, "{error:?}"),
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        send_all(&mut within("a produce stream", opened).await, &texts("a", 3)).await;
        // Nobody else has its places.
        let endpoint = client_endpoint("127.0.0.1:0");
        let settings = client_config(client_tls(cluster.broker(1)), 16 << 20);
        let listens = cluster.broker(1).listen_addr();
        let connected = within("a handshake", endpoint.connect_with(settings, listens, "localhost").unwrap()).await;
        let closed = match connected {
            Ok(connection) => within("its end", connection.closed()).await,
            Err(closed) => closed,
        };
        let limit = u64::from(headwater_proto::ResetCode::Limit.number());
        let is_limit = |code: quinn::VarInt| u64::from(code) == limit;
        assert!(
            matches!(&closed, quinn::ConnectionError::ApplicationClosed(why) if is_limit(why.error_code)),
            "{setting}: {closed:?}"
        );
    }
}

#[tokio::test]
async fn a_follower_that_dies_leaves_the_isr_and_the_rest_goes_on() {
    let mut cluster = Cluster::start(&[1, 2, 3], &["replica.lag.time.max.ms=500"]).await;
    let topic_id = cluster.create("t", 1, &[1, 2, 3], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2, 3]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 10)).await;
    cluster.kill(3);
    send_all(&mut produce, &texts("b", 10)).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    // It comes back, and catches up.
    cluster.up(3).await;
    cluster.until_in_sync("t", &[1, 2, 3]).await;
    cluster.until_sample(3, &log_end("t"), 20.0).await;
    send_all(&mut produce, &texts("c", 1)).await;
    assert_eq!(cluster.read(1, &topic_id, 21).await.len(), 21);
}

#[tokio::test]
async fn below_min_insync_replicas_acks_all_is_refused_by_name() {
    let mut cluster = Cluster::start(&[1, 2], &["replica.lag.time.max.ms=500"]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.kill(2);
    cluster.fence(2);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    let refused = send(&mut produce, &texts("a", 1)).await.remove(0).error.expect("a refusal");
    assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::NotEnoughReplicas, "{}", refused.message);
    assert!(refused.message.contains("1 of 2"), "{}", refused.message);
}

/// What it knows of the high watermark grows old: a reader that waits there would wait for ever, and hear nothing of it.
#[tokio::test]
async fn a_follower_that_lost_its_leader_sends_its_readers_away() {
    let mut cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 3)).await;
    let client = Client::connect(cluster.broker(2)).await;
    let (mut fetch, answer) =
        client.fetch(wire::OpenFetch { from_follower: true, ..open_fetch(&topic_id, 0, 0) }).await;
    assert_eq!(answer.error, None);
    assert_eq!(within("records", fetch.read_to(3)).await.len(), 3);
    // Nobody is told of it.
    cluster.kill(1);
    let sent_away = async {
        loop {
            if let Some(error) = fetch.data().await.0.error {
                return error;
            }
        }
    };
    let error = within("a word", sent_away).await;
    assert_eq!((ErrorCode::from_number(error.code), error.retryable), (ErrorCode::NotLeader, true));
    assert_eq!(cluster.partition("t").leader, 1);
}

/// It was answered once the follower's next round of checkpoints came.
#[tokio::test]
async fn deleted_records_are_written_down_by_a_follower_at_once() {
    let cluster = Cluster::start(&[1, 2], &["log.flush.offset.checkpoint.interval.ms=60000"]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 10)).await;
    let client = Client::connect(cluster.broker(1)).await;
    for before_offset in 1..=9 {
        let delete = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset };
        let deleted = within("an answer", client.call(Request::DeleteRecords(delete))).await;
        assert!(
            matches!(&deleted, Response::DeleteRecords(done) if done.log_start_offset == before_offset),
            "{deleted:?}"
        );
    }
}

/// The leader answered alone, and the next one served again what was deleted.
#[tokio::test]
async fn what_was_deleted_stays_deleted_whoever_leads_next() {
    let mut cluster = Cluster::start(&[1], &["log.flush.offset.checkpoint.interval.ms=10"]).await;
    let files = SimFiles::new(1);
    cluster.up_on(2, files.clone(), &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 10)).await;

    // The follower has deleted it, and a crash would bring it back.
    let held = files.hold(Fault::new(Operation::Sync).on("log-start-offset"));
    let client = Client::connect(cluster.broker(1)).await;
    let delete = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset: 7 };
    let mut deleting = Box::pin(client.call(Request::DeleteRecords(delete)));
    let log_start = "headwater_partition_log_start_offset{topic=\"t\",partition=\"0\"}";
    tokio::select! {
        () = cluster.until_sample(2, log_start, 7.0) => {}
        early = &mut deleting => panic!("{early:?}"),
    }
    within("a checkpoint that hangs", async {
        while held.waiting() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let early = tokio::time::timeout(std::time::Duration::from_millis(200), &mut deleting).await;
    assert!(early.is_err(), "{early:?}");
    drop(held);
    let deleted = within("an answer", deleting).await;
    assert!(matches!(&deleted, Response::DeleteRecords(done) if done.log_start_offset == 7), "{deleted:?}");
    cluster.kill(1);
    cluster.fence(1);
    assert_eq!(cluster.partition("t").leader, 2);
    let (_, answer) = Client::connect(cluster.broker(2)).await.fetch(open_fetch(&topic_id, 0, 6)).await;
    let refused = answer.error.expect("it is gone");
    assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::OffsetOutOfRange, "{}", refused.message);
}

/// The leader was alone in sync and answered; the other, which had been acknowledged as much, was elected and served all of it again.
#[tokio::test]
async fn records_that_an_eligible_replica_has_are_not_deleted_without_it() {
    let mut cluster = Cluster::start(&[1], &["log.flush.offset.checkpoint.interval.ms=10"]).await;
    let files = SimFiles::new(1);
    cluster.up_on(2, files.clone(), &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 10)).await;
    let _held = files.hold(Fault::new(Operation::Sync).on("log-start-offset"));
    let client = Client::connect(cluster.broker(1)).await;
    let delete = |before_offset| {
        let delete = wire::DeleteRecords { topic: "t".into(), partition: 0, before_offset };
        Box::pin(client.call(Request::DeleteRecords(delete)))
    };
    let mut deleting = delete(7);
    tokio::select! {
        () = cluster.until_sample(2, "headwater_partition_log_start_offset{topic=\"t\",partition=\"0\"}", 7.0) => {}
        early = &mut deleting => panic!("{early:?}"),
    }
    cluster.fence(2);
    assert_eq!((cluster.partition("t").isr, cluster.partition("t").elr), (vec![1], vec![2]));
    for deleting in [deleting, delete(9)] {
        let Response::Error(refused) = within("an answer", deleting).await else { panic!("it is deleted") };
        let code = ErrorCode::from_number(refused.code);
        assert_eq!((code, refused.retryable), (ErrorCode::NotEnoughReplicas, true), "{}", refused.message);
    }
}

#[tokio::test]
async fn a_follower_that_is_elected_has_every_acknowledged_record() {
    let mut cluster = Cluster::start(&[1, 2, 3], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2, 3], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2, 3]).await;
    let before = cluster.partition("t");
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 300)).await;
    cluster.kill(1);
    cluster.fence(1);
    let after = cluster.partition("t");
    assert_eq!((after.leader, after.leader_epoch), (2, before.leader_epoch + 1));
    assert_eq!(cluster.read(2, &topic_id, 300).await, texts("a", 300));
    let mut produce = cluster.produce(2, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("b", 10)).await;
    // The one that died follows now.
    cluster.up(1).await;
    cluster.until_in_sync("t", &[1, 2, 3]).await;
    cluster.until_sample(1, &log_end("t"), 310.0).await;
}

/// Records that only the old leader had: an unclean election gives their offsets to others, and it has to let go of them.
#[tokio::test]
async fn a_follower_whose_log_parts_from_the_leaders_cuts_its_own() {
    let mut cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &unclean_topic());
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("both", 5)).await;
    cluster.kill(2);
    cluster.fence(2);
    send_all(&mut produce, &texts("lost", 7)).await;
    cluster.kill(1);
    cluster.fence(1);
    cluster.up(2).await;
    assert_eq!((cluster.partition("t").leader, cluster.partition("t").unclean_recoveries), (2, 1));
    let mut produce = cluster.produce(2, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("kept", 3)).await;
    cluster.up(1).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(1, &log_end("t"), 8.0).await;
    // It leads again, and serves what the other wrote.
    cluster.kill(2);
    cluster.fence(2);
    let all = [texts("both", 5), texts("kept", 3)].concat();
    assert_eq!(cluster.read(1, &topic_id, 8).await, all);
    let log = std::fs::read(cluster.dir(1).join("t-0/00000000000000000000.log")).unwrap();
    let other = std::fs::read(cluster.dir(2).join("t-0/00000000000000000000.log")).unwrap();
    let used = log.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    assert_eq!(log[..used], other[..used], "byte for byte");
}

#[tokio::test]
async fn what_is_parked_fails_when_the_epoch_ends_and_says_who_leads() {
    let mut cluster = Cluster::start(&[1, 2], &[]).await;
    let files = SimFiles::new(2);
    cluster.up_on(3, files.clone(), &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2, 3], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2, 3]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    let held = files.hold(Fault::new(Operation::Sync).on("t-0/00000000000000000000.log"));
    produce.request(&batch(&[b"a"])).await;
    cluster.until_sample(1, &log_end("t"), 1.0).await;
    // The controller takes the leadership from a broker that is well.
    cluster.fence(1);
    let refused = within("an answer", produce.answer()).await.error.expect("a refusal");
    assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::NotLeader, "{}", refused.message);
    let partition = cluster.partition("t");
    let hint = refused.leader.expect("a hint");
    assert_eq!((hint.broker_id, hint.leader_epoch), (2, partition.leader_epoch));
    assert_eq!(hint.address, cluster.broker(2).listen_addr().to_string());
    drop(held);
}

#[tokio::test]
async fn a_follower_serves_nobody_and_says_who_does() {
    let cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_sample(2, "headwater_following_streams", 1.0).await;
    let client = Client::connect(cluster.broker(2)).await;
    let (_, produced) = client.produce(open_produce(&topic_id, 0)).await;
    let (_, fetched) = client.fetch(open_fetch(&topic_id, 0, 0)).await;
    for error in [produced.error, fetched.error] {
        let error: wire::Error = error.expect("a refusal");
        assert_eq!(ErrorCode::from_number(error.code), ErrorCode::NotLeader, "{}", error.message);
        let hint = error.leader.expect("a hint");
        assert_eq!((hint.broker_id, hint.address), (1, cluster.broker(1).listen_addr().to_string()));
    }
}

/// A batch larger than the credit of its stream comes in parts.
#[tokio::test]
async fn large_batches_reach_a_follower_that_comes_late() {
    let mut cluster = Cluster::start(&[1], &[]).await;
    let topic_id = cluster.create("t", 1, &[1], &[("max.message.bytes", "30000000")]);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    for size in [20 << 20, 100, 1 << 20, 9 << 20, 10] {
        produce.request(&batch(&[&vec![b'x'; size]])).await;
        assert_eq!(within("an acknowledgement", produce.answer()).await.error, None);
    }
    cluster.up(2).await;
    let reassign = Reassign { topic_id: topic_id.clone(), partition: 0, replicas: vec![1, 2], ..Reassign::default() };
    cluster.common.apply(Kind::Reassign(reassign)).unwrap();
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(2, &log_end("t"), 5.0).await;
}

#[tokio::test]
async fn readers_are_sent_to_the_new_leader_when_the_old_one_lives_on() {
    let cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[]);
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("a", 2)).await;
    let client = Client::connect(cluster.broker(1)).await;
    let (mut fetch, _) = client.fetch(open_fetch(&topic_id, 0, 0)).await;
    assert_eq!(fetch.read_to(2).await.len(), 2);
    cluster.fence(1);
    let error = loop {
        if let Some(error) = fetch.data().await.0.error {
            break error;
        }
    };
    assert_eq!(ErrorCode::from_number(error.code), ErrorCode::NotLeader, "{}", error.message);
    assert_eq!(error.leader.expect("a hint").broker_id, 2);
    assert_eq!(cluster.read(2, &topic_id, 2).await, texts("a", 2));
}

#[tokio::test]
async fn a_broker_that_stops_closes_its_logs_in_good_order_whatever_it_is_to_them() {
    let mut cluster = Cluster::start(&[1, 2], &[]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("min.insync.replicas", "2")]);
    let other = cluster.create("u", 1, &[2, 1], &[("min.insync.replicas", "2")]);
    for (leader, topic_id) in [(1, &topic_id), (2, &other)] {
        let mut produce = cluster.produce(leader, topic_id, Acks::All).await;
        send_all(&mut produce, &texts("a", 5)).await;
    }
    assert!(within("a stop", cluster.stop(1)).await, "in good order");
    cluster.fence(1);
    cluster.up(1).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    let mut produce = cluster.produce(2, &topic_id, Acks::All).await;
    send_all(&mut produce, &texts("b", 5)).await;
    cluster.until_sample(1, &log_end("t"), 10.0).await;
}

/// A segment that nobody writes to is rolled by the leader's clock, which followers do not share.
#[tokio::test]
async fn segments_begin_at_followers_where_they_begin_at_the_leader() {
    let mut cluster = Cluster::start(&[1, 2], &["log.retention.check.interval.ms=20"]).await;
    let topic_id = cluster.create("t", 1, &[1, 2], &[("segment.ms", "50")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.kill(2);
    cluster.fence(2);
    let mut produce = cluster.produce(1, &topic_id, Acks::All).await;
    let rolled = async |cluster: &Cluster, id: i32, base: i64| {
        let path = cluster.dir(id).join(format!("t-0/{base:020}.log"));
        within(&format!("a segment at {base} of broker {id}"), async {
            while !path.exists() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    send_all(&mut produce, &texts("a", 3)).await;
    rolled(&cluster, 1, 3).await;
    // It fetches what there is, and then is pushed what comes.
    cluster.up(2).await;
    cluster.until_in_sync("t", &[1, 2]).await;
    send_all(&mut produce, &texts("b", 2)).await;
    rolled(&cluster, 1, 5).await;
    send_all(&mut produce, &texts("c", 1)).await;
    cluster.until_sample(2, &log_end("t"), 6.0).await;
    for base in [3, 5] {
        rolled(&cluster, 2, base).await;
    }
    let sealed = |id: i32, base: i64| std::fs::read(cluster.dir(id).join(format!("t-0/{base:020}.log"))).unwrap();
    for base in [0, 3] {
        assert!(!sealed(2, base).is_empty() && sealed(1, base) == sealed(2, base), "the segment at {base}");
    }
}
