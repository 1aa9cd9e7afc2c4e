//! A majority that is lost for good.

use crate::clients::within;
use crate::development::Development;
use crate::harness::{eventually, run};
use bytes::Bytes;
use futures::StreamExt;
use headwater_client::{
    Client, ClientConfig, ConsumeError, Consumer, ErrorCode, ProduceError, Producer, ProducerRecord, StartFrom,
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A command was silent for half a minute, and then said that there was no answer.
#[test]
fn that_the_quorum_is_lost_is_told_soon_and_who_answers() {
    let cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "t"]).ok();
    // There are coordinators.
    cluster.command(&["group", "reset", "g", "--topic", "t:0", "--to", "earliest", "--execute"]).ok();
    let well = cluster.object(&["cluster", "health"]);
    assert_eq!((&well["may_stop"], &well["quorum"]["voters"]), (&json!([1, 2, 3]), &json!(3)));
    cluster.kill(2);
    cluster.kill(3);
    for look in [
        &["cluster", "describe"][..],
        &["cluster", "health"],
        &["topic", "list"],
        &["topic", "list", "--offline"],
        &["topic", "describe", "t"],
        &["cluster", "reassign", "status"],
        &["cluster", "upgrade"],
        &["cluster", "elect", "--unclean", "--dry-run"],
        &["cluster", "rebalance", "--dry-run"],
        &["group", "list"],
        &["group", "describe", "g"],
    ] {
        // As soon as the broker that is left is sure of it.
        let told = cluster.until("it is told", || {
            let began = Instant::now();
            let told = cluster.command(look);
            (!told.status.success()).then(|| (told.stderr, began.elapsed()))
        });
        let (told, took) = told;
        assert!(took < Duration::from_secs(20), "{look:?}: {took:?}");
        assert!(told.contains("of 3 voters only broker 1 answers it, and 2 have to"), "{look:?}: {told}");
        if let [kind @ ("cluster" | "topic"), what @ ("describe" | "health" | "list"), ..] = look {
            assert!(told.contains(&format!("`headwater {kind} {what} --stale`")), "{look:?}: {told}");
        }
    }
    let lost = "the metadata quorum is lost: of 3 voters 1 (broker 1) answers, and 2 have to";
    let stale = |args: &[&str]| {
        let told = cluster.command(&[&["cluster", "health", "--stale"], args].concat());
        assert_eq!(told.status.code(), Some(1), "{}", told.stderr);
        told
    };
    assert_eq!(stale(&[]).lines(), [format!("NO broker may be stopped now: {lost}")]);
    assert_eq!(stale(&["2"]).lines(), [format!("broker 2 may NOT be stopped now: {lost}")]);
    let stale = stale(&["--json"]).object();
    assert_eq!((&stale["may_stop"], &stale["quorum"]), (&json!([]), &json!({ "voters": 3, "answering": [1] })));
    let stale = cluster.command(&["cluster", "describe", "--stale"]).ok().text();
    assert!(stale.contains(lost) && stale.contains("start broker 2,3 again"), "{stale}");
}

#[test]
fn a_cluster_goes_on_from_one_broker_by_hand_and_the_others_join_it_again() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "t", "-r", "3", "-c", "min.insync.replicas=1"]).ok();
    let partition = |cluster: &Development| cluster.object(&["topic", "describe", "t"])["partitions"][0].clone();
    let in_sync = |cluster: &Development, count: usize| {
        partition(cluster)["isr"].as_array().filter(|isr| isr.len() == count).map(|_| ())
    };
    cluster.until("all are in sync", || in_sync(&cluster, 3));
    cluster.feed(&["produce", "t"], "kept\n");
    let cluster_id = cluster.object(&["cluster", "describe"])["cluster_id"].as_str().expect("an id").to_owned();
    let config =
        |cluster: &Development, id: usize| cluster.data(id).join("broker.toml").to_str().expect("text").to_owned();
    let recover = |cluster: &Development, named: &str| {
        let args = ["cluster", "unsafe-recover", "--config", &config(cluster, 1)];
        run(&[&args[..], &["--yes-lose-what-only-others-know", named]].concat())
    };
    let in_use = recover(&cluster, &cluster_id).fails(1);
    assert!(in_use.stderr.contains("is not recovered, and is as it was"), "{}", in_use.stderr);
    for id in 1..=3 {
        cluster.kill(id);
    }
    // Another cluster's name is a mistake.
    eventually("the folder is free, and not of that cluster", || {
        recover(&cluster, "another")
            .stderr
            .contains(&format!("is of cluster {cluster_id}, not of another"))
            .then_some(())
    });
    let unsaid = run(&["cluster", "unsafe-recover", "--config", &config(&cluster, 1)]).fails(1);
    assert!(unsaid.stderr.contains("LOST FOR GOOD") && unsaid.stderr.contains("nothing was done"), "{}", unsaid.stderr);
    assert!(unsaid.stderr.contains(&format!("--yes-lose-what-only-others-know {cluster_id}")), "{}", unsaid.stderr);
    let done = recover(&cluster, &cluster_id).ok();
    assert!(done.stderr.contains("BY ITSELF") && done.stderr.contains("IS LOST"), "{}", done.stderr);
    cluster.revive(1);
    let told = cluster.until("it leads by itself", || {
        let told = cluster.command(&["cluster", "describe", "--json"]);
        let told = told.status.success().then(|| told.object())?;
        (told["brokers"][0]["state"] == "active" && told["brokers"][1]["state"] == "fenced").then_some(told)
    });
    assert_eq!(
        (&told["voters"], &told["controller"], &told["cluster_id"]),
        (&json!([1]), &json!(1), &json!(cluster_id))
    );
    // As far as it knows the others stayed in sync when it died, and may have more than it: only a person can say that it leads.
    cluster.until("it leads the partition", || {
        cluster.command(&["cluster", "elect", "--unclean", "--topic", "t", "--yes"]);
        (partition(&cluster)["leader"] == 1).then_some(())
    });
    let read = cluster.command(&["consume", "t", "--from", "earliest", "--until", "end"]).ok();
    assert_eq!(read.lines(), ["kept"]);

    for id in [2, 3] {
        let args = ["cluster", "join", "--config", &config(&cluster, id), "--again", "--json"];
        assert_eq!(run(&args).ok().object()["cluster_id"], json!(cluster_id));
        cluster.revive(id);
    }
    cluster.until("all are in sync again", || in_sync(&cluster, 3));
    for id in ["2", "3"] {
        cluster.command(&["cluster", "voters", "add", id]).ok();
    }
    let voters: Value = cluster.object(&["cluster", "describe"])["voters"].clone();
    assert_eq!(voters, json!([1, 2, 3]));
}

/// A producer and a consumer that are there all the time.
struct Clients {
    runtime: tokio::runtime::Runtime,
    producer: Producer,
    consumer: Consumer,
}

impl Clients {
    fn of(cluster: &Development) -> Clients {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (producer, consumer) = runtime.block_on(async {
            let config = ClientConfig::from_profile(cluster.profile()).expect("a profile");
            let client = within("a connection", Client::connect(config)).await.expect("connected");
            let producer = within("a producer", client.producer().build()).await.expect("built");
            let consumer = client.consumer().assign([("t", 0)]).start(StartFrom::Earliest).build();
            (producer, within("a consumer", consumer).await.expect("built"))
        });
        Clients { runtime, producer, consumer }
    }

    /// Each of these is acknowledged before the next: they are batches of their own.
    fn send(&self, values: &[String]) {
        values.iter().for_each(|value| self.try_send(value).expect("acknowledged"));
    }

    fn try_send(&self, value: &str) -> Result<(), ProduceError> {
        self.runtime.block_on(async {
            let record = ProducerRecord::new("t", Bytes::from(value.to_owned())).partition(0);
            let delivery = within("room", self.producer.send(record)).await.expect("taken");
            within(value, delivery).await.map(|_| ())
        })
    }

    fn next(&mut self) -> Result<(i64, String), ConsumeError> {
        let record = self.runtime.block_on(within("a record", self.consumer.next())).expect("it goes on")?;
        let value = record.value.expect("a value");
        Ok((record.offset, String::from_utf8(value.to_vec()).expect("text")))
    }

    /// The next records are these.
    #[track_caller]
    fn read(&mut self, from: i64, values: &[String]) {
        for (offset, value) in (from..).zip(values) {
            assert_eq!(self.next().expect("no error"), (offset, value.clone()));
        }
    }
}

fn texts(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

/// What the survivor lacks is lost, everywhere: two others led on after it died and had records acknowledged in an epoch that it never heard of.
#[test]
fn what_the_survivor_lacked_is_cut_from_the_others_and_everybody_goes_on_with_what_it_has() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "t", "--replica-placement", "1:2:3", "-c", "min.insync.replicas=1"]).ok();
    let partition = |cluster: &Development| cluster.object(&["topic", "describe", "t"])["partitions"][0].clone();
    let in_sync = |cluster: &Development, ids: Value| {
        cluster.until("who is in sync", || {
            let mut isr: Vec<i64> = serde_json::from_value(partition(cluster)["isr"].clone()).expect("ids");
            isr.sort_unstable();
            (json!(isr) == ids).then_some(())
        });
    };
    let config =
        |cluster: &Development, id: usize| cluster.data(id).join("broker.toml").to_str().expect("text").to_owned();
    // Of each batch where it is, its bytes, and what those do not cover.
    let dump = |cluster: &Development, id: usize| -> Vec<Value> {
        let folder = cluster.data(id).join("t-0");
        let batches = run(&["segment", "dump", folder.to_str().expect("text"), "--json"]).ok().json();
        let of = |it: &Value| json!([it["base_offset"], it["last_offset"], it["crc"], it["leader_epoch"], it["valid"]]);
        batches.iter().map(of).collect()
    };
    in_sync(&cluster, json!([1, 2, 3]));
    let mut clients = Clients::of(&cluster);
    let (first, lost) = (texts("first", 10), texts("lost", 7));
    clients.send(&first);
    clients.read(0, &first);
    cluster.kill(1);
    in_sync(&cluster, json!([2, 3]));
    // In as many epochs as the survivor will count in anew, and more.
    clients.send(&lost[..3]);
    for (values, leader, order) in [(3..5, 3, "3,2,1"), (5..7, 2, "2,3,1")] {
        let reassign = ["cluster", "reassign", "--topic", "t", "--partition", "0", "--replicas", order];
        cluster.command(&reassign).ok();
        cluster.until("it is led by another", || {
            cluster.command(&["cluster", "elect", "--preferred"]).ok();
            (partition(&cluster)["leader"] == leader).then_some(())
        });
        clients.send(&lost[values]);
    }
    clients.read(10, &lost);
    let cluster_id = cluster.object(&["cluster", "describe"])["cluster_id"].as_str().expect("an id").to_owned();
    cluster.kill(2);
    cluster.kill(3);

    let args = ["cluster", "unsafe-recover", "--config", &config(&cluster, 1), "--json"];
    let recovered = run(&[&args[..], &["--yes-lose-what-only-others-know", &cluster_id]].concat()).ok().object();
    assert_eq!((&recovered["id"], &recovered["voters_before"]), (&json!(1), &json!(3)));
    cluster.revive(1);
    cluster.until("it leads the partition", || {
        cluster.command(&["cluster", "elect", "--unclean", "--topic", "t", "--yes"]);
        let told = cluster.command(&["topic", "describe", "t", "--json"]);
        (told.status.success() && told.object()["partitions"][0]["leader"] == 1).then_some(())
    });
    // More than were lost: no offset tells that they were.
    let (new, old, both) = (texts("new", 6), texts("old", 6), texts("both", 3));
    cluster.feed(&["produce", "t"], &(new.join("\n") + "\n"));
    // Records that were acknowledged before are gone. Whoever wrote them is told so once, by one that is not written in their place.
    let gap = clients.try_send("a gap").expect_err("what came before it is gone");
    assert_eq!(gap.code(), Some(ErrorCode::OutOfOrderSequence), "{gap}");
    clients.send(&old);
    let cut = clients.next().expect_err("what was read is gone");
    assert!(matches!(cut, ConsumeError::LogTruncated { offset: 17, end_offset: 10, .. }), "{cut}");
    clients.runtime.block_on(clients.consumer.seek("t", 0, StartFrom::Offset(10))).expect("it is there");
    clients.read(10, &new);
    clients.read(16, &old);

    let held: Vec<Vec<Value>> = [1, 2, 3].map(|id| dump(&cluster, id)).into();
    assert!(held[1] == held[2] && held[1].len() == 17 && held[0][..10] == held[1][..10], "{held:?}");
    assert!(held[0][10..].iter().all(|batch| !held[1].contains(batch)), "{held:?}");
    for id in [2, 3] {
        run(&["cluster", "join", "--config", &config(&cluster, id), "--again"]).ok();
        cluster.revive(id);
    }
    in_sync(&cluster, json!([1, 2, 3]));
    clients.send(&both);
    clients.read(22, &both);
    let held: Vec<Vec<Value>> = [1, 2, 3].map(|id| dump(&cluster, id)).into();
    assert!(held[0] == held[1] && held[0] == held[2], "{held:?}");
    let read = cluster.command(&["consume", "t", "--from", "earliest", "--until", "end"]).ok();
    assert_eq!(read.lines(), [first, new, old, both].concat());
    clients.runtime.block_on(clients.producer.close());
}

/// The controller had heard that the replica was of no use, and nobody told it of the healing: it stayed out of sync for good.
#[test]
fn a_replica_whose_segment_was_cut_is_fetched_from_its_leader_and_comes_in_sync_again() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "t", "--replica-placement", "1:2:3"]).ok();
    let isr = |cluster: &Development| {
        let told = cluster.object(&["topic", "describe", "t"])["partitions"][0]["isr"].clone();
        told.as_array().expect("a list").len()
    };
    cluster.feed(&["produce", "t", "--compression", "none"], &format!("{}\n", "x".repeat(999)).repeat(300));
    cluster.until("all are in sync", || (isr(&cluster) == 3).then_some(()));
    cluster.kill(3);
    cluster.until("it is missed", || (isr(&cluster) == 2).then_some(()));
    let log = cluster.data(3).join("t-0").join("00000000000000000000.log");
    let held = std::fs::read(&log).expect("its segment");
    assert!(held.len() > 300_000, "{}", held.len());
    std::fs::write(&log, &held[..150_000]).expect("cut");
    cluster.revive(3);
    cluster.until("it is in sync again", || (isr(&cluster) == 3).then_some(()));
    let log = std::fs::read(&log).expect("its segment");
    assert_eq!(log.get(..300_000), held.get(..300_000), "what the leader has");
}
