//! `headwater bench`: that it measures what it says, on little data. Figures are never asserted.

use crate::harness::{Broker, run};
use serde_json::Value;

fn check(answer: &Value, mode: &str, records: u64) {
    assert_eq!((answer["mode"].as_str(), answer["records"].as_u64()), (Some(mode), Some(records)), "{answer}");
    for key in ["bytes", "seconds", "mb_per_s", "records_per_s", "client_cpu_s"] {
        assert!(answer[key].as_f64().is_some_and(|number| number >= 0.0), "{key}: {answer}");
    }
    let latency = &answer["latency_us"];
    let at = |name: &str| latency[name].as_u64().unwrap_or_else(|| panic!("{name}: {answer}"));
    assert!(at("p50") <= at("p99") && at("p99") <= at("p999") && at("p999") <= at("max"), "{answer}");
}

#[test]
fn every_mode_answers_with_the_same_keys() {
    let broker = Broker::start(&[]);
    let bench = |arguments: &[&str]| broker.object(&[&["bench"][..], arguments].concat());
    let produce = bench(&[
        "produce",
        "--records",
        "5001",
        "--record-size",
        "100",
        "--producers",
        "2",
        "--partitions",
        "3",
        "--batch",
        "16KiB",
        "--acks",
        "all",
        "--durability",
        "replicated",
        "--compression",
        "lz4",
    ]);
    check(&produce, "produce", 5001);
    assert!(produce["broker_cpu_s"].as_f64().is_some());
    assert_eq!(produce["bytes"], 500_100);
    check(
        &bench(&["produce", "--records", "300", "--throughput", "1000", "--acks", "1", "--linger", "1ms"]),
        "produce",
        300,
    );
    check(
        &bench(&["consume", "--records", "5000", "--record-size", "100", "--partitions", "2", "--mtu", "1452"]),
        "consume",
        5000,
    );
    check(&bench(&["e2e", "--records", "300", "--throughput", "500"]), "e2e", 300);
    assert!(broker.json(&["topic", "list"]).iter().all(|topic| topic["internal"] == true), "a bench cleans up");

    check(&bench(&["produce", "--records", "100", "--topic", "kept"]), "produce", 100);
    check(&bench(&["produce", "--records", "100", "--topic", "kept"]), "produce", 100);
    assert_eq!(broker.records("kept").len(), 200, "a topic that is named is used and stays");
    bench(&["produce", "--records", "10", "--keep"]);
    assert_eq!(
        broker
            .json(&["topic", "list"])
            .iter()
            .filter(|t| t["name"].as_str().is_some_and(|n| n.starts_with("bench-")))
            .count(),
        1
    );
}

#[test]
fn isolation_tells_the_readers_shares_and_the_latency_of_calls() {
    let broker = Broker::start(&[]);
    let answer = broker.object(&["bench", "isolation", "--partitions", "8", "--stalled", "2", "--records", "16000"]);
    assert_eq!((&answer["partitions"], &answer["stalled"]), (&8.into(), &2.into()));
    let (min, max) = (answer["reader_mb_per_s"]["min"].as_f64(), answer["reader_mb_per_s"]["max"].as_f64());
    assert!(min > Some(0.0) && min <= max, "{answer}");
    for key in ["p50", "p99", "max"] {
        assert!(answer["call_latency_us"][key].as_u64().is_some(), "{key}: {answer}");
    }
    let text =
        broker.run(&["bench", "isolation", "--partitions", "4", "--stalled", "1", "--records", "4000"]).ok().text();
    assert!(text.contains("MB/s"), "{text}");
}

#[test]
fn raw_and_disk_need_no_broker() {
    let folder = tempfile::tempdir().expect("a folder");
    for way in ["receive", "send"] {
        let raw =
            run(&["bench", "raw", "--records", "20000", "--direction", way, "--mtu", "1452", "--json"]).ok().object();
        check(&raw, "raw", 20_000);
        assert!(raw["broker_cpu_s"].as_f64().is_some());
    }
    let dir = folder.path().to_str().expect("text");
    let disk = run(&["bench", "disk", "--records", "2000", "--batch", "64KiB", "--dir", dir, "--json"]).ok().object();
    check(&disk, "disk", 2000);
    assert!(disk["broker_cpu_s"].is_null());
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "the file is gone");
    run(&["bench", "disk", "--records", "10", "--dir", dir, "--keep"]).ok();
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
    run(&["bench", "disk", "--dir", "/nowhere"]).fails(1);
}

#[test]
fn what_makes_no_sense_is_refused() {
    run(&["bench", "isolation", "--partitions", "2", "--stalled", "2"]).fails(2);
    run(&["bench", "nothing"]).fails(2);
    let broker = Broker::start(&[]);
    broker.run(&["bench", "produce", "--records", "10", "--record-size", "3MB"]).fails(1);
    assert!(
        broker.json(&["topic", "list"]).iter().all(|topic| topic["internal"] == true),
        "a bench that fails cleans up too"
    );
}
