//! `headwater replay`.

use crate::Held;
use crate::harness::{Broker, Running, eventually};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A topic of two partitions whose timestamps go back and forth: records 0 to 39, at `(n * 7) % 40` seconds.
fn filled() -> Broker {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    for partition in 0..2 {
        let of = (0..40).filter(|n| n % 2 == partition);
        let lines: String =
            of.map(|n| format!("{{\"n\":{n},\"key\":\"k{}\",\"at\":{}}}\n", n % 4, (n * 7) % 40 * 1000)).collect();
        let (number, header) = (partition.to_string(), format!("side={partition}"));
        let arguments = [
            "produce",
            "t",
            "--partition",
            &number,
            "--timestamp-field",
            "at",
            "--json-key",
            "key",
            "--header",
            &header,
        ];
        broker.run_with(&arguments, lines).ok();
    }
    broker
}

fn times(records: &[Value]) -> Vec<i64> {
    records.iter().map(|record| record["timestamp"].as_i64().expect("ms") / 1000).collect()
}

fn sorted(mut numbers: Vec<i64>) -> Vec<i64> {
    numbers.sort_unstable();
    numbers
}

#[test]
fn a_window_of_time_holds_every_record_of_it_and_no_other() {
    let broker = filled();
    for (from, until) in [(0, 40), (10, 20), (13, 14), (39, 40), (0, 1), (40, 50)] {
        let (x, y) = (format!("time:{}", from * 1000), format!("time:{}", until * 1000));
        let records = broker.json(&["replay", "t", "--from", &x, "--until", &y]);
        assert_eq!(sorted(times(&records)), (from..until.min(40)).collect::<Vec<_>>(), "[{from}, {until})");
    }
    assert_eq!(
        broker.json(&["replay", "t", "--from", "time:1970-01-01T00:00:30Z"]).len(),
        10,
        "to the end when not told"
    );
    assert_eq!(broker.json(&["replay", "t", "--from", "-100000d", "--until", "-1h"]).len(), 40);
    assert!(broker.json(&["replay", "t", "--from", "-1h"]).is_empty());
}

#[test]
fn a_range_of_offsets_is_that_range() {
    let broker = filled();
    let all = broker.records("t");
    let one: Vec<&Value> = all.iter().filter(|record| record["partition"] == 1).collect();
    let range = broker.json(&["replay", "t", "--partition", "1", "--from", "offset:5", "--until", "offset:9"]);
    assert_eq!(range.iter().collect::<Vec<_>>(), one[5..9]);
    assert_eq!(broker.json(&["replay", "t", "--from", "offset:15", "--until", "end"]).len(), 10);
    assert_eq!(
        broker.json(&["replay", "t", "--from", "earliest", "--until", "offset:99"]).len(),
        40,
        "an end beyond the log is its end"
    );
    broker.run(&["replay", "t", "--from", "offset:21"]).fails(1);
    broker.run(&["replay", "t", "--from", "earliest", "--partition", "2"]).fails(1);
    broker.run(&["replay", "nosuch", "--from", "earliest"]).fails(1);
}

/// The start of the log, which is not offset 0 where records were deleted.
#[test]
fn a_replay_that_is_not_told_where_begins_at_the_earliest() {
    let broker = filled();
    broker.run(&["topic", "delete-records", "t", "--partition", "1", "--before", "5"]).ok();
    let replayed = broker.json(&["replay", "t"]);
    assert_eq!(replayed.len(), 20 + 15);
    let least = |of: i64| {
        let offsets =
            replayed.iter().filter(|record| record["partition"] == of).map(|record| record["offset"].as_i64());
        offsets.min()
    };
    assert_eq!((least(0), least(1)), (Some(Some(0)), Some(Some(5))));
    assert_eq!(times(&broker.json(&["replay", "t", "--partition", "0", "--until", "offset:2"])), [0, 14]);
}

#[test]
fn conditions_and_formats() {
    let broker = filled();
    let keyed = broker.json(&["replay", "t", "--from", "earliest", "--where", "key=k3"]);
    assert!(keyed.len() == 10 && keyed.iter().all(|record| record["key"] == "k3"));
    let headed = broker.json(&["replay", "t", "--from", "earliest", "--where", "header:side=0", "--where", "key=k2"]);
    assert!(headed.len() == 10 && headed.iter().all(|record| record["key"] == "k2" && record["partition"] == 0));
    assert!(
        broker.json(&["replay", "t", "--from", "earliest", "--where", "header:side=0", "--where", "key=k3"]).is_empty()
    );
    let lines = broker
        .run(&["replay", "t", "--from", "time:0", "--until", "time:1000", "-f", "%k@%T\\n", "--to", "stdout"])
        .ok();
    assert_eq!(lines.text(), "k0@0\n");
}

#[test]
fn a_copy_keeps_what_a_record_is() {
    let broker = filled();
    for (topic, partitions) in [("same", "2"), ("other", "3")] {
        broker.run(&["topic", "create", topic, "-p", partitions]).ok();
        let summary = broker.object(&["replay", "t", "--from", "earliest", "--to", topic]);
        assert_eq!((&summary["records"], &summary["durability"]), (&40.into(), &"flushed".into()));
    }
    let shape = |mut record: Value| {
        record["topic"] = Value::Null;
        record
    };
    let sort = |topic: &str| {
        let mut records: Vec<Value> = broker.records(topic).into_iter().map(shape).collect();
        records.sort_by_key(|r| (r["partition"].as_u64(), r["offset"].as_i64()));
        records
    };
    assert_eq!(sort("same"), sort("t"), "partition, order, key, value, headers and timestamp");
    let spread = broker.records("other");
    assert_eq!(sorted(times(&spread)), (0..40).collect::<Vec<_>>());
    for key in ["k0", "k1", "k2", "k3"] {
        let of: Vec<&Value> = spread.iter().filter(|record| record["key"] == key).collect();
        assert!(of.iter().all(|record| record["partition"] == of[0]["partition"]), "a key stays together");
    }
    let missing = broker.run(&["replay", "t", "--from", "earliest", "--to", "nosuch"]).fails(1);
    assert!(missing.stderr.contains("nosuch"), "{}", missing.stderr);
}

#[test]
fn a_pace_puts_partitions_in_the_order_of_their_times() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    for partition in 0..2 {
        let lines: String = (0..20).map(|n| format!("{{\"at\":{}}}\n", n * 100 + partition * 50)).collect();
        broker
            .run_with(&["produce", "t", "--partition", &partition.to_string(), "--timestamp-field", "at"], lines)
            .ok();
    }
    let began = Instant::now();
    let records = broker.json(&["replay", "t", "--from", "earliest", "--speed", "2x"]);
    assert!(began.elapsed() >= Duration::from_millis(1950 / 2), "40 records over 1.95 s at twice the speed");
    let stamps: Vec<i64> = records.iter().map(|record| record["timestamp"].as_i64().expect("ms")).collect();
    assert_eq!(stamps, (0..40).map(|n| n * 50).collect::<Vec<_>>());
    let began = Instant::now();
    assert_eq!(broker.json(&["replay", "t", "--from", "earliest", "--speed", "max"]).len(), 40);
    let fast = began.elapsed();
    let began = Instant::now();
    assert_eq!(broker.json(&["replay", "t", "--from", "earliest", "--rate", "400"]).len(), 40);
    assert!(
        began.elapsed() >= Duration::from_secs(1) && began.elapsed() > fast,
        "10 to 13 bytes each at 400 bytes a second"
    );
}

#[test]
fn a_replay_that_is_asked_to_end_ends_well() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":0}\n{\"at\":3600000}\n").ok();
    let mut replay = Running::start(broker.command(&["replay", "t", "--from", "earliest", "--speed", "real"]));
    eventually("the first record", || (replay.lines().len() == 1).then_some(()));
    assert!(replay.terminate().success());
    assert_eq!(replay.lines().len(), 1, "the second is an hour away");
}

#[test]
fn an_interrupted_copy_is_no_success() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run(&["topic", "create", "u"]).ok();
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":0}\n{\"at\":3600000}\n").ok();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = broker.command(&["replay", "t", "--from", "earliest", "--speed", "real", "--to", "u"]);
    command.stdout(std::process::Stdio::null()).stderr(writer);
    let mut copy = Held::start(command);
    eventually("the first record", || (broker.records("u").len() == 1).then_some(()));
    copy.signal("TERM");
    assert_eq!(copy.wait().code(), Some(1));
    let said = std::io::read_to_string(reader).expect("text");
    assert!(said.contains("interrupted: 1 record copied to topic u"), "{said}");
}

/// The next record is an hour away, and the copy has failed already.
#[test]
fn a_copy_that_fails_ends_although_there_is_more_to_wait_for() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run(&["topic", "create", "u", "-c", "message.timestamp.before.max.ms=1000"]).ok();
    let first = format!("{{\"at\":0,\"v\":\"{}\"}}\n", "x".repeat(2000));
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], first + "{\"at\":3600000}\n").ok();
    for pace in [&["--speed", "real"][..], &["--rate", "1"]] {
        let copy = broker.run(&[&["replay", "t", "--from", "earliest", "--to", "u"][..], pace].concat()).fails(1);
        let said = copy.stderr;
        assert!(
            said.contains("1 of 1 records were not acknowledged by topic u") && said.contains("before.max"),
            "{said}"
        );
        assert!(!said.contains("interrupted"), "{said}");
    }
    assert!(broker.records("u").is_empty());
}

#[test]
fn no_group_moves() {
    let broker = filled();
    broker.run(&["consume", "t", "--group", "g", "--count", "5"]).ok();
    let before = broker.object(&["group", "describe", "g"]);
    broker.run(&["replay", "t", "--from", "earliest"]).ok();
    assert_eq!(broker.object(&["group", "describe", "g"])["offsets"], before["offsets"]);
    assert_eq!(broker.json(&["group", "list"]).len(), 1, "and none is made");
    assert_eq!(before["members"], json!([]));
}
