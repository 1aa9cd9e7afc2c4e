//! `headwater topic`.

use crate::harness::Broker;
use serde_json::Value;

fn setting<'a>(description: &'a Value, name: &str) -> (&'a str, &'a str) {
    let config = description["config"].as_array().expect("settings");
    let entry = config.iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("{name} is missing"));
    (entry["value"].as_str().expect("text"), entry["source"].as_str().expect("text"))
}

#[test]
fn a_topic_lives_from_create_to_delete() {
    let broker = Broker::start(&[]);
    let created = broker.object(&["topic", "create", "orders", "-p", "3", "-c", "retention.ms=3600000"]);
    assert_eq!((&created["name"], &created["partitions"]), (&"orders".into(), &3.into()));
    let described = broker.object(&["topic", "describe", "orders"]);
    assert_eq!(described["topic_id"], created["topic_id"]);
    assert_eq!(setting(&described, "retention.ms"), ("3600000", "topic"));
    assert_eq!(setting(&described, "segment.bytes").1, "default");
    let partition = &described["partitions"][2];
    assert_eq!((&partition["partition"], &partition["high_watermark"]), (&2.into(), &0.into()));
    for key in ["leader", "leader_epoch", "replicas", "isr", "log_start_offset", "log_end_offset", "size_bytes"] {
        assert!(!partition[key].is_null(), "{key} is missing: {partition}");
    }

    broker.run(&["topic", "alter", "orders", "-c", "retention.ms=7200000", "-c", "segment.bytes=1048576"]).ok();
    assert_eq!(setting(&broker.object(&["topic", "describe", "orders"]), "retention.ms"), ("7200000", "topic"));
    broker.run(&["topic", "alter", "orders", "--unset", "retention.ms"]).ok();
    assert_eq!(setting(&broker.object(&["topic", "describe", "orders"]), "retention.ms").1, "default");

    broker.run(&["topic", "add-partitions", "orders", "5"]).ok();
    broker.run(&["topic", "add-partitions", "orders", "5"]).fails(1);
    let listed = broker.json(&["topic", "list"]);
    let orders = listed.iter().find(|topic| topic["name"] == "orders").expect("listed");
    assert_eq!(
        (&orders["partitions"], &orders["internal"], &orders["replication_factor"]),
        (&5.into(), &false.into(), &1.into())
    );

    broker.run(&["topic", "delete", "orders"]).ok();
    assert!(broker.json(&["topic", "list"]).iter().all(|topic| topic["name"] != "orders"));
    broker.run(&["topic", "describe", "orders"]).fails(1);
    let again = broker.object(&["topic", "create", "orders"]);
    assert_ne!(again["topic_id"], created["topic_id"], "a name may come again, an id never");
    assert_eq!(again["partitions"], 1);
}

#[test]
fn what_a_broker_refuses_names_the_offence() {
    let broker = Broker::start(&[]);
    for (arguments, named) in [
        (&["topic", "create", "t", "-c", "retention.mss=1"][..], "retention.mss"),
        (&["topic", "create", "t", "-c", "retention.ms=soon"], "retention.ms"),
        (&["topic", "create", "a/b"], "a/b"),
        (&["topic", "create", "t", "--replication-factor", "3"], "3"),
        (&["topic", "describe", "nosuch"], "nosuch"),
        (&["topic", "delete", "nosuch"], "nosuch"),
        (&["topic", "alter", "nosuch", "-c", "retention.ms=1"], "nosuch"),
        (&["topic", "add-partitions", "nosuch", "2"], "nosuch"),
        (&["topic", "delete-records", "nosuch", "--partition", "0", "--before", "0"], "nosuch"),
    ] {
        let answer = broker.run(arguments).fails(1);
        assert!(answer.stderr.contains(named), "{arguments:?}: {}", answer.stderr);
    }
    broker.run(&["topic", "create", "t"]).ok();
    assert!(broker.run(&["topic", "create", "t"]).fails(1).stderr.contains("exist"));
    assert_eq!(broker.json(&["topic", "list"]).iter().filter(|topic| topic["internal"] == false).count(), 1);
}

#[test]
fn deleted_records_are_gone_and_the_others_stay() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], "a\nb\nc\nd\n").ok();
    let answer = broker.object(&["topic", "delete-records", "t", "--partition", "0", "--before", "2"]);
    assert_eq!(answer["log_start_offset"], 2);
    let left = broker.records("t");
    assert_eq!(left.iter().map(|r| r["offset"].as_i64().expect("a number")).collect::<Vec<_>>(), [2, 3]);
    broker.run(&["topic", "delete-records", "t", "--partition", "0", "--before", "99"]).fails(1);
    broker.run(&["topic", "delete-records", "t", "--partition", "7", "--before", "1"]).fails(1);
    broker.run(&["topic", "delete-records", "t", "--partition", "0", "--before", "end"]).ok();
    assert!(broker.records("t").is_empty());
}

#[test]
fn text_is_for_people() {
    let broker = Broker::start(&[]);
    let created = broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    assert_eq!(created.text(), "", "a remark is no answer");
    assert!(created.stderr.contains("topic t is created with 2 partitions"), "{}", created.stderr);
    assert_eq!(broker.run(&["topic", "create", "u", "--quiet"]).ok().stderr, "");
    let listed = broker.run(&["topic", "list"]).ok().text();
    assert!(listed.lines().any(|line| line.starts_with("t ")), "{listed}");
    let described = broker.run(&["topic", "describe", "t"]).ok().text();
    assert!(described.starts_with("topic t, id ") && described.contains("retention.ms"), "{described}");
}
