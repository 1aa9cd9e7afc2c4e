//! `headwater produce`.

use crate::Held;
use crate::harness::{Broker, Running, eventually};
use serde_json::{Value, json};
use std::io::Write;

fn pairs(records: &[Value]) -> Vec<(Value, Value)> {
    records.iter().map(|record| (record["key"].clone(), record["value"].clone())).collect()
}

#[test]
fn lines_become_records_in_order() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let summary = broker.run_with(&["produce", "t", "--json"], "one\n\nthree").ok().object();
    assert_eq!(
        (&summary["records"], &summary["bytes"], &summary["durability"]),
        (&3.into(), &8.into(), &"flushed".into())
    );
    assert_eq!(summary["partitions"], json!([{"partition": 0, "first_offset": 0, "last_offset": 2}]));
    assert!(summary["seconds"].as_f64().is_some());
    let records = broker.records("t");
    assert_eq!(records.iter().map(|r| r["value"].as_str().expect("text")).collect::<Vec<_>>(), ["one", "", "three"]);
    assert!(records.iter().all(|r| r["key"].is_null() && r["timestamp_type"] == "create"));

    let file = broker.folder().join("lines");
    std::fs::write(&file, "from a file\n").expect("written");
    let text = broker.run(&["produce", "t", "--file", file.to_str().expect("text")]).ok().text();
    assert!(text.starts_with("1 record to t, 11 B"), "{text}");
    assert_eq!(broker.run_with(&["produce", "t", "--quiet"], "x\n").ok().text(), "");
    let missing = broker.run(&["produce", "t", "--file", "nowhere"]).fails(1);
    assert!(missing.stderr.contains("nowhere"), "{}", missing.stderr);
}

#[test]
fn keys_headers_times_and_nulls() {
    let broker = Broker::start(&[]);
    for topic in ["s", "j", "n"] {
        broker.run(&["topic", "create", topic]).ok();
    }
    let input = "k:v:w\n:empty\nnone\nk:\n";
    broker.run_with(&["produce", "s", "--key-separator", ":", "--header", "a=1", "--header", "b=x=y"], input).ok();
    let records = broker.records("s");
    assert_eq!(
        pairs(&records),
        [
            (json!("k"), json!("v:w")),
            (json!(""), json!("empty")),
            (Value::Null, json!("none")),
            (json!("k"), json!(""))
        ]
    );
    assert_eq!(records[0]["headers"], json!([{"key": "a", "value": "1"}, {"key": "b", "value": "x=y"}]));

    let lines = "{\"id\":\"a\",\"at\":\"2013-01-01T00:00:00-05:00\"}\n{\"at\":1000}\n{\"id\":null,\"at\":\"2000\"}\n{\"id\":7,\"at\":0}\n";
    broker.run_with(&["produce", "j", "--json-key", "id", "--timestamp-field", "at"], lines).ok();
    let records = broker.records("j");
    assert_eq!(
        records.iter().map(|r| r["key"].clone()).collect::<Vec<_>>(),
        [json!("a"), Value::Null, Value::Null, json!("7")]
    );
    assert_eq!(
        records.iter().map(|r| r["timestamp"].as_i64().expect("ms")).collect::<Vec<_>>(),
        [1_357_016_400_000, 1000, 2000, 0]
    );

    broker.run_with(&["produce", "n", "--key-separator", "\t", "--null-value", "NULL"], "k\tNULL\nk\tnull\n").ok();
    broker.run_with(&["produce", "n", "--key-separator", "\\t"], "a\tb\n").ok();
    broker.run_with(&["produce", "n", "--key", "-same-"], "one\n").ok();
    assert_eq!(
        pairs(&broker.records("n")),
        [
            (json!("k"), Value::Null),
            (json!("k"), json!("null")),
            (json!("a"), json!("b")),
            (json!("-same-"), json!("one"))
        ]
    );
    for arguments in
        [&["--key", "k", "--json-key", "k"][..], &["--key", "k", "--key-separator", ":"], &["--key-separator", "\\q"]]
    {
        broker.run(&[&["produce", "n"][..], arguments].concat()).fails(2);
    }
}

#[test]
fn bytes_need_not_be_text() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "3"]).ok();
    broker.run_with(&["produce", "t", "--partition", "2", "--key-separator", "="], b"\xfe=\xff\x00\r\n").ok();
    let record = &broker.records("t")[0];
    assert_eq!(
        (&record["partition"], &record["key_base64"], &record["value_base64"]),
        (&2.into(), &"/g==".into(), &"/wAN".into())
    );
    assert!(record.get("value").is_none() && record.get("key").is_none());
}

#[test]
fn every_codec_and_every_acks_arrives() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        broker
            .run_with(
                &["produce", "t", "--compression", codec, "--batch", "64KiB", "--linger", "1ms"],
                format!("{codec}\n"),
            )
            .ok();
    }
    for (acks, durability) in [("all", json!("flushed")), ("1", json!("written")), ("0", json!("none"))] {
        let summary = broker.run_with(&["produce", "t", "--acks", acks, "--json"], format!("{acks}\n")).ok().object();
        assert_eq!((&summary["records"], &summary["durability"]), (&1.into(), &durability), "acks={acks}");
    }
    // Nobody acknowledged the last one, so it may take a moment.
    let values = eventually("all eight records", || {
        let records = broker.records("t");
        (records.len() == 8)
            .then(|| records.iter().map(|r| r["value"].as_str().expect("text").to_owned()).collect::<Vec<_>>())
    });
    assert_eq!(values, ["none", "gzip", "snappy", "lz4", "zstd", "all", "1", "0"]);
}

#[test]
fn a_topic_is_made_on_request_only() {
    let broker = Broker::start(&[]);
    let answer = broker.run_with(&["produce", "t"], "x\n").fails(1);
    assert!(answer.stderr.contains("--create"), "{}", answer.stderr);
    broker.run_with(&["produce", "t", "--create", "-p", "4"], "x\n").ok();
    assert_eq!(broker.object(&["topic", "describe", "t"])["partitions"].as_array().expect("partitions").len(), 4);
    broker.run_with(&["produce", "t", "--create", "-p", "9"], "y\n").ok();
    assert_eq!(broker.records("t").len(), 2, "a topic that is there is taken as it is");
}

#[test]
fn the_ack_log_lists_every_line_as_it_is_acknowledged() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "3"]).ok();
    let log = broker.folder().join("acks");
    let mut producer = Running::start(broker.command(&["produce", "t", "--key-separator", ":", "--ack-log", "acks"]));
    let mut input = producer.stdin();
    input.write_all(b"a:1\nb:2\n").expect("the producer reads");
    let read = || -> Vec<Value> {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a whole line")).collect()
    };
    eventually("two lines while the input is still open", || (read().len() == 2).then_some(()));
    input.write_all(b"c:3\n").expect("the producer reads");
    drop(input);
    assert!(producer.wait().success());
    let mut lines: Vec<i64> = read().iter().map(|ack| ack["line"].as_i64().expect("a number")).collect();
    lines.sort_unstable();
    assert_eq!(lines, [1, 2, 3]);
    for ack in read() {
        let line = usize::try_from(ack["line"].as_i64().expect("a number")).expect("from 1");
        let value = ["1", "2", "3"][line - 1];
        let found = broker
            .records("t")
            .into_iter()
            .any(|r| r["value"] == value && r["partition"] == ack["partition"] && r["offset"] == ack["offset"]);
        assert!(found, "{ack}");
    }
    broker.run_with(&["produce", "t", "--ack-log", "acks"], "again\n").ok();
    assert_eq!(read().len(), 4, "the log is appended to");
}

#[test]
fn what_cannot_be_produced_is_said_with_its_line() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    let none = broker.run_with(&["produce", "t", "--partition", "2"], "x\n").fails(1);
    assert!(none.stderr.contains("partition 2"), "{}", none.stderr);
    let large = "y".repeat(3 << 20);
    let large = broker.run_with(&["produce", "t", "--json"], format!("small\n{large}\nbehind it\n{large}\n")).fails(1);
    for said in ["2 of 4 records were not acknowledged", "from line 2 on", "max.message.bytes"] {
        assert!(large.stderr.contains(said), "{said}: {}", large.stderr);
    }
    assert!(!large.stderr.contains("reading stopped"), "{}", large.stderr);
    let summary = large.object();
    assert_eq!((&summary["records"], &summary["bytes"]), (&2.into(), &14.into()), "what is acknowledged counts");
    let json = broker.run_with(&["produce", "t", "--json-key", "k"], "{\"k\":\"a\"}\nno json\n").fails(1);
    assert!(json.stderr.contains("line 2") && json.stderr.contains("JSON"), "{}", json.stderr);
    let time = broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":\"noon\"}\n").fails(1);
    assert!(time.stderr.contains("line 1") && time.stderr.contains("noon"), "{}", time.stderr);
    let kept: Vec<Value> = broker.records("t").iter().map(|record| record["value"].clone()).collect();
    assert_eq!(kept.len(), 3, "{kept:?}");
    for value in ["small", "behind it", "{\"k\":\"a\"}"] {
        assert!(kept.contains(&value.into()), "what is not at fault is kept: {value} is missing of {kept:?}");
    }
    broker.run_with(&["produce", "t", "--ack-log", "no/such/folder"], "x\n").fails(1);
}

#[test]
fn a_delivery_timeout_ends_the_waiting() {
    let mut broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let mut command = broker.command(&["produce", "t", "--delivery-timeout", "1s"]);
    command
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null());
    let mut child = command.spawn().expect("it starts");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"first\n").expect("it reads");
    eventually("the first record", || (broker.records("t").len() == 1).then_some(()));
    broker.kill();
    input.write_all(b"second\n").expect("it reads");
    drop(input);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("1 of 2 records were not acknowledged, from line 2 on"), "{said}");
}

/// A topic that compacts refuses records without a key.
#[test]
fn a_failure_ends_it_although_the_input_goes_on() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-c", "cleanup.policy=compact"]).ok();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = broker.command(&["produce", "t", "--key-separator", ":", "--json", "--ack-log", "acks"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).stderr(writer);
    let mut producer = Held::start(command);
    let mut input = producer.0.stdin.take().expect("piped");
    input.write_all(b"k:first\n").expect("it reads");
    let acks = broker.folder().join("acks");
    eventually("the first", || std::fs::read_to_string(&acks).is_ok_and(|acks| !acks.is_empty()).then_some(()));
    input.write_all(b"no key\n").expect("it reads");
    // The input stays open and says nothing more.
    assert_eq!(producer.wait().code(), Some(1));
    let said = std::io::read_to_string(reader).expect("text");
    assert!(said.contains("1 of 2 records were not acknowledged, from line 2 on"), "{said}");
    assert!(said.contains("reading stopped after line 2, and nothing after it was sent"), "{said}");
    drop(input);
}

/// Whoever asks it to end while it waits for acknowledgements hears which are missing. Only Linux's /proc tells how far it has
/// read.
#[test]
#[cfg(target_os = "linux")]
fn nobody_has_to_wait_for_acknowledgements_that_do_not_come() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let fifo = broker.folder().join("input");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("it runs").success());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = broker.command(&["produce", "t", "--file", "input", "--ack-log", "acks"]);
    command.stdout(std::process::Stdio::null()).stderr(writer);
    let mut producer = Held::start(command);
    let mut input = std::fs::File::options().write(true).open(&fifo).expect("it reads");
    input.write_all(b"first\n").expect("it reads");
    let acks = broker.folder().join("acks");
    eventually("the first", || std::fs::read_to_string(&acks).is_ok_and(|acks| !acks.is_empty()).then_some(()));
    crate::harness::signal(broker.pid(), "STOP");
    input.write_all(b"second\nthird\n").expect("it reads");
    drop(input);
    let handles = format!("/proc/{}/fd", producer.0.id());
    eventually("it has read all of it", || {
        let open = std::fs::read_dir(&handles).expect("its handles").flatten();
        let mut open = open.filter_map(|handle| std::fs::read_link(handle.path()).ok());
        (!open.any(|path| path == fifo)).then_some(())
    });
    producer.signal("INT");
    let status = producer.wait_within(std::time::Duration::from_secs(20));
    crate::harness::signal(broker.pid(), "CONT");
    let said = std::io::read_to_string(reader).expect("text");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted: 2 of 3 records were not acknowledged, from line 2 on"), "{said}");
}
