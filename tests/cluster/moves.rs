//! Partitions that move, leaders that are elected, and what may be stopped, by command.

use crate::development::Development;
use serde_json::{Value, json};

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|it| it.as_i64().expect("a number")).collect()
}

#[test]
fn partitions_are_placed_moved_evened_and_drained_by_command() {
    let cluster = Development::up(4, &[]);
    let partitions = |topic: &str| cluster.object(&["topic", "describe", topic])["partitions"].clone();
    let replicas = |topic: &str, n: usize| numbers(&partitions(topic)[n]["replicas"]);

    // By hand, and never against what else is said.
    cluster.command(&["topic", "create", "t", "--replica-placement", "1:2,2:1", "-c", "min.insync.replicas=1"]).ok();
    assert_eq!((replicas("t", 0), replicas("t", 1)), (vec![1, 2], vec![2, 1]));
    cluster.command(&["topic", "create", "u", "-c", "replica.placement=2:1,1:2,1:2"]).ok();
    assert_eq!(replicas("u", 2), [1, 2]);
    let uneven = cluster.command(&["topic", "create", "v", "--replica-placement", "1:2,3"]).fails(1);
    assert!(uneven.stderr.contains("one partition is placed on 2 brokers, and another on 1"), "{}", uneven.stderr);
    let unknown = cluster.command(&["topic", "create", "v", "--replica-placement", "1:9"]).fails(1);
    assert!(unknown.stderr.contains("never registered"), "{}", unknown.stderr);

    // Moved by hand: the records are where it is then.
    cluster.feed(&["produce", "t", "--partition", "0"], "one\ntwo\n");
    let reassign = ["cluster", "reassign", "--topic", "t", "--partition", "0", "--replicas", "3,4"];
    assert_eq!(cluster.object(&reassign)["to"], json!([3, 4]));
    cluster.until("it has moved", || (replicas("t", 0) == [3, 4]).then_some(()));
    cluster.until("nothing moves", || {
        (cluster.object(&["cluster", "reassign", "status"])["partitions"] == json!([])).then_some(())
    });
    let read = cluster.command(&["consume", "t", "--partition", "0", "--from", "earliest", "--until", "end"]).ok();
    assert_eq!(read.lines(), ["one", "two"]);
    let nowhere = ["cluster", "reassign", "--topic", "t", "--partition", "0", "--replicas", "9"];
    assert!(cluster.command(&nowhere).fails(1).stderr.contains("never registered"));
    let still = cluster.command(&["cluster", "reassign", "cancel", "--topic", "t", "--partition", "0"]).fails(1);
    assert!(still.stderr.contains("t-0 is not being reassigned"), "{}", still.stderr);

    // Evened: what is said first is what is done, and then there is nothing left to do.
    let dry = cluster.command(&["cluster", "rebalance", "--dry-run", "--json"]).ok().json();
    assert!(!dry.is_empty());
    assert_eq!(cluster.command(&["cluster", "rebalance", "--json"]).ok().json(), dry);
    assert!(cluster.command(&["cluster", "rebalance", "--dry-run", "--json"]).ok().json().is_empty());
    let told = cluster.object(&["cluster", "describe"]);
    let brokers = told["brokers"].as_array().expect("brokers");
    let spread = |key: &str| {
        let counts = || brokers.iter().map(|broker| broker[key].as_i64().expect("a count"));
        counts().max().expect("some") - counts().min().expect("some")
    };
    assert!(spread("partitions") <= 1 && spread("leaders") <= 1, "{told}");

    // Emptied.
    let drained = cluster.command(&["cluster", "drain", "4"]).ok();
    assert!(drained.stderr.contains("broker 4 keeps nothing any more: it may be removed"), "{}", drained.stderr);
    let keeps = |told: &Value, id: usize| told["brokers"][id - 1]["partitions"].as_i64();
    assert_eq!(keeps(&cluster.object(&["cluster", "describe"]), 4), Some(0));
    let unknown = cluster.command(&["cluster", "drain", "9"]).fails(1);
    assert!(unknown.stderr.contains("broker 9 is not registered"), "{}", unknown.stderr);
}

/// A topic that was created while a broker was drained came to lie on it: the drain moved that too, and the next one, and found no end.
#[test]
fn what_is_created_during_a_drain_is_placed_elsewhere_and_the_drain_ends() {
    let cluster = Development::up(3, &[]);
    let create = ["topic", "create", "t", "--replica-placement", "3:1", "-c", "min.insync.replicas=1"];
    cluster.command(&create).ok();
    cluster.feed(&["produce", "t", "--compression", "none"], &format!("{}\n", "x".repeat(999)).repeat(300));
    // At this pace it takes some minutes.
    cluster.command(&["cluster", "drain", "3", "--throttle", "1kB", "--no-wait"]).ok();
    let state = || cluster.object(&["cluster", "describe"])["brokers"][2].clone();
    assert_eq!((&state()["state"], &state()["partitions"]), (&json!("draining"), &json!(1)));
    cluster.command(&["topic", "create", "u", "-p", "6", "-r", "2"]).ok();
    cluster.command(&["topic", "create", "v", "-p", "4"]).ok();
    cluster.command(&["topic", "add-partitions", "u", "9"]).ok();
    cluster.command(&["cluster", "rebalance", "--no-wait"]).ok();
    assert_eq!(state()["partitions"], json!(1), "nothing new");
    let refused = cluster.command(&["topic", "create", "w", "-r", "3"]).fails(1);
    assert!(refused.stderr.contains("3 replicas: there are only 2"), "{}", refused.stderr);
    // Said again without a limit, what moves already moves without one.
    let drained = cluster.command(&["cluster", "drain", "3"]).ok();
    assert!(drained.stderr.contains("broker 3 keeps nothing any more"), "{}", drained.stderr);
    let text = cluster.command(&["cluster", "describe"]).ok().text();
    let steps = "broker 3 is drained: headwater cluster voters remove 3, then stop it, then headwater cluster remove 3";
    assert!(text.contains(steps), "{text}");
    let cancelled = cluster.command(&["cluster", "drain", "3", "--cancel"]).ok();
    assert!(cancelled.stderr.contains("broker 3 may be given partitions again"), "{}", cancelled.stderr);
    assert_eq!(state()["state"], json!("active"));
    cluster.command(&["topic", "create", "w", "-r", "3"]).ok();
    assert_eq!(state()["partitions"], json!(1));
    let unknown = cluster.command(&["cluster", "drain", "9", "--cancel"]).fails(1);
    assert!(unknown.stderr.contains("broker 9 is not registered"), "{}", unknown.stderr);
}

#[test]
fn a_throttled_move_is_slow_shows_how_far_it_is_and_is_cancelled() {
    let cluster = Development::up(3, &[]);
    let create = ["topic", "create", "t", "--replica-placement", "1:2", "-c", "min.insync.replicas=1"];
    cluster.command(&create).ok();
    let value = format!("{}\n", "x".repeat(999));
    cluster.feed(&["produce", "t", "--compression", "none"], &value.repeat(1000));
    // At this pace it takes a quarter of an hour.
    let reassign =
        ["cluster", "reassign", "--topic", "t", "--partition", "0", "--replicas", "2,3", "--throttle", "1kB"];
    cluster.command(&reassign).ok();
    let status = cluster.until("the new replica says how far it is", || {
        let told = cluster.object(&["cluster", "reassign", "status"])["partitions"][0].clone();
        told["adding"][0]["bytes_behind"].is_u64().then_some(told)
    });
    assert_eq!((&status["target"], &status["removing"]), (&json!([2, 3]), &json!([1])));
    assert_eq!((&status["throttle"], &status["isr"]), (&json!(1000), &json!([1, 2])));
    let adding = &status["adding"][0];
    assert_eq!((&adding["id"], &adding["in_sync"]), (&json!(3), &json!(false)));
    assert!(adding["bytes_behind"].as_u64().expect("bytes") > 500_000, "{status}");
    assert!(adding["records_behind"].as_i64().expect("records") > 500, "{status}");
    let text = cluster.command(&["cluster", "reassign", "status"]).ok().text();
    assert!(text.contains("1.0 kB/s") && text.contains("1 partition move"), "{text}");
    cluster.command(&["cluster", "reassign", "cancel"]).ok();
    let told = cluster.object(&["topic", "describe", "t"]);
    assert_eq!(told["partitions"][0]["replicas"], json!([1, 2]));
    // Without a limit it is soon there.
    cluster.command(&reassign[..8]).ok();
    cluster.until("it has moved", || {
        (cluster.object(&["topic", "describe", "t"])["partitions"][0]["isr"] == json!([2, 3])).then_some(())
    });
}

#[test]
fn what_may_be_stopped_is_said_and_what_is_wrong_is_listed() {
    let cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "safe", "-r", "3"]).ok();
    let health = cluster.command(&["cluster", "health"]).ok().text();
    assert_eq!(health, "any one broker may be stopped now: 1, 2, 3\n");
    cluster.command(&["topic", "create", "alone", "--replica-placement", "1"]).ok();
    let health = cluster.command(&["cluster", "health"]).ok().text();
    assert!(health.starts_with("one of brokers 2, 3 may be stopped now; not 1, as "), "{health}");
    assert!(health.contains("alone-0 is one") && health.lines().count() == 1, "{health}");
    let (not, may) = (["cluster", "health", "1", "--json"], ["cluster", "health", "2", "--json"]);
    let told = cluster.command(&not);
    assert_eq!((told.status.code(), &*told.stderr), (Some(1), ""), "it is said by the answer and the exit code");
    assert_eq!(told.json()[0]["brokers"][0]["may_stop"], json!(false));
    assert_eq!(cluster.command(&may).ok().object()["may_stop"], json!([2]));

    assert!(cluster.command(&["topic", "list", "--offline", "--json"]).ok().json().is_empty());
    cluster.kill(1);
    cluster.until("it is missed", || (cluster.object(&["cluster", "describe"])["offline"] == 1).then_some(()));
    let listed = |flag: &str| {
        let rows = cluster.command(&["topic", "list", flag, "--json"]).ok().json();
        rows.iter()
            .map(|row| (row["topic"].as_str().expect("a name").to_owned(), row["leader"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(listed("--offline"), [("alone".to_owned(), Value::Null)]);
    assert_eq!(listed("--under-min-isr"), [("alone".to_owned(), Value::Null)]);
    assert_eq!(listed("--under-replicated").len(), 2);
    // It is the topic's own, a majority of its replicas, and not the broker's setting.
    let rows = cluster.command(&["topic", "list", "--under-replicated", "--json"]).ok().json();
    let safe = rows.iter().find(|row| row["topic"] == "safe").expect("it is listed");
    assert_eq!(safe["min_insync_replicas"], json!(2));
    assert_eq!(cluster.object(&["topic", "describe", "alone"])["partitions"][0]["leader"], Value::Null);
    let health = cluster.command(&["cluster", "health"]).text();
    assert!(
        health.contains("NO broker may be stopped now") && health.contains("not 1, as it does not run"),
        "{health}"
    );
    // Nobody else keeps it: nobody can be elected, and that is no error.
    assert!(cluster.command(&["cluster", "elect", "--unclean", "--json"]).ok().json().is_empty());
    cluster.until("who should lead does", || {
        cluster.command(&["cluster", "elect", "--preferred"]).ok();
        (cluster.object(&["cluster", "describe"])["controller"] != 1).then_some(())
    });
}

#[test]
fn an_unclean_election_says_loudly_what_may_be_lost() {
    let mut cluster = Development::up(3, &[]);
    let create = ["topic", "create", "t", "--replica-placement", "1:2", "-c", "min.insync.replicas=1"];
    cluster.command(&create).ok();
    let isr = |cluster: &Development| numbers(&cluster.object(&["topic", "describe", "t"])["partitions"][0]["isr"]);
    cluster.until("both are in sync", || (isr(&cluster).len() == 2).then_some(()));
    // Broker 2 misses what broker 1 acknowledges alone.
    cluster.kill(2);
    cluster.until("broker 1 is in sync alone", || (isr(&cluster) == [1]).then_some(()));
    cluster.feed(&["produce", "t"], "lost\n");
    cluster.kill(1);
    // Broker 3 alone is no majority: the others' metadata are asked once broker 2 is back.
    cluster.revive(2);
    let partition = |cluster: &Development| cluster.object(&["topic", "describe", "t"])["partitions"][0].clone();
    cluster.until("nobody leads", || (partition(&cluster)["leader"] == Value::Null).then_some(()));
    cluster.until("broker 2 is active", || {
        (cluster.object(&["cluster", "describe"])["brokers"][1]["state"] == "active").then_some(())
    });
    let dry = cluster.command(&["cluster", "elect", "--unclean", "--dry-run", "--json"]).ok();
    assert_eq!((&dry.object()["leader"], &dry.object()["leader_before"]), (&json!(2), &Value::Null));
    assert!(dry.stderr.contains("ACKNOWLEDGED RECORDS MAY BE LOST"), "{}", dry.stderr);
    assert_eq!(partition(&cluster)["leader"], Value::Null, "nothing was done");
    // Nobody sits at a terminal, and nobody said that it is meant.
    let refused = cluster.command(&["cluster", "elect", "--unclean", "--topic", "t", "--json"]).fails(1);
    assert!(refused.stderr.contains("whatever it misses of what broker 1 has is LOST"), "{}", refused.stderr);
    assert!(refused.stderr.contains("nothing was done: --yes says"), "{}", refused.stderr);
    assert_eq!((partition(&cluster)["leader"].clone(), refused.stdout.len()), (Value::Null, 0));
    let elected = cluster.command(&["cluster", "elect", "--unclean", "--topic", "t", "--yes", "--json"]).ok();
    assert!(elected.stderr.contains("whatever it misses of what broker 1 has is LOST"), "{}", elected.stderr);
    assert_eq!(elected.object()["had_everything"], json!([1]));
    assert_eq!(partition(&cluster)["leader"], 2);
}

#[test]
fn the_feature_level_is_that_of_all_brokers() {
    let cluster = Development::up(1, &[]);
    let told = cluster.object(&["cluster", "upgrade"]);
    assert_eq!((&told["feature_level"], &told["possible"]), (&json!(3), &json!(3)), "a new cluster begins with it");
    assert_eq!(told["brokers"], json!([{ "id": 1, "feature_level": 3 }]));
    let raised = cluster.command(&["cluster", "upgrade", "--finalize"]).ok();
    assert!(raised.stderr.contains("the feature level stays 3"), "{}", raised.stderr);
}
