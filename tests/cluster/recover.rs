//! A majority that is lost for good.

use crate::development::Development;
use crate::harness::{eventually, run};
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
