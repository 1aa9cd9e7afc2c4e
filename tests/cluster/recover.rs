//! A majority that is lost for good.

use crate::development::Development;
use crate::harness::{eventually, run};
use serde_json::{Value, json};

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
