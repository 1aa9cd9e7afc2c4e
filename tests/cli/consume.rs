//! `headwater consume`, alone.

use crate::Held;
use crate::harness::{self, Broker, Running, eventually};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::Duration;

/// Three partitions with ten records each, one second apart; values `partition-offset`.
fn filled() -> Broker {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "3"]).ok();
    for partition in 0..3 {
        let lines: String = (0..10).map(|n| format!("{{\"at\":{},\"v\":\"{partition}-{n}\"}}\n", n * 1000)).collect();
        let number = partition.to_string();
        broker.run_with(&["produce", "t", "--partition", &number, "--timestamp-field", "at"], lines).ok();
    }
    broker
}

fn offsets(records: &[Value], partition: u32) -> Vec<i64> {
    let of = records.iter().filter(|record| record["partition"] == partition);
    of.map(|record| record["offset"].as_i64().expect("a number")).collect()
}

fn range(from: i64, until: i64) -> Vec<i64> {
    (from..until).collect()
}

#[test]
fn every_beginning_and_every_end() {
    let broker = filled();
    for (from, until, expected) in [
        ("earliest", "end", range(0, 10)),
        ("latest", "end", vec![]),
        ("offset:4", "end", range(4, 10)),
        ("offset:10", "end", vec![]),
        ("offset:4", "offset:6", range(4, 6)),
        ("time:3000", "end", range(3, 10)),
        ("time:3001", "offset:6", range(4, 6)),
        ("time:1970-01-01T00:00:03Z", "time:5000", range(3, 5)),
        ("earliest", "-1h", range(0, 10)),
        ("-1h", "end", vec![]),
        ("-100000d", "end", range(0, 10)),
    ] {
        let records = broker.json(&["consume", "t", "--from", from, "--until", until]);
        for partition in 0..3 {
            assert_eq!(offsets(&records, partition), expected, "from {from} until {until}, partition {partition}");
        }
    }
    assert_eq!(broker.json(&["consume", "t", "--no-follow"]).len(), 30, "earliest when not told");
    assert_eq!(broker.json(&["consume", "t", "--no-follow", "--until", "offset:99"]).len(), 30);
    assert_eq!(broker.json(&["consume", "t", "--no-follow", "--until", "time:2999-01-01"]).len(), 30);
    let some = broker.json(&["consume", "t", "--partition", "2", "--partition", "0", "--no-follow"]);
    assert_eq!((offsets(&some, 0).len(), offsets(&some, 1).len(), offsets(&some, 2).len()), (10, 0, 10));
    assert_eq!(broker.json(&["consume", "t", "--count", "7"]).len(), 7);
    assert_eq!(broker.json(&["consume", "t", "--count", "700", "--until", "end"]).len(), 30);
}

#[test]
fn text_formats_and_json() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker
        .run_with(&["produce", "t", "--key-separator", ":", "--header", "h=1", "--header", "i=2"], "k:value\n:\n")
        .ok();
    assert_eq!(
        broker.run(&["consume", "t", "--no-follow"]).ok().text(),
        "value\n\n",
        "the values, a line each, and nothing else"
    );
    let format = "%t\\t%p\\t%o\\t%k\\t%v\\t%h\\t%s\\t100%%\\n";
    assert_eq!(
        broker.run(&["consume", "t", "--no-follow", "-f", format]).ok().text(),
        "t\t0\t0\tk\tvalue\th=1,i=2\t5\t100%\nt\t0\t1\t\t\th=1,i=2\t0\t100%\n"
    );
    let stamps = broker.run(&["consume", "t", "--no-follow", "-f", "%T "]).ok().text();
    assert!(
        stamps.split_whitespace().all(|stamp| stamp.parse::<i64>().is_ok_and(|ms| ms > 1_600_000_000_000)),
        "{stamps}"
    );
    let record = &broker.records("t")[0];
    let keys: Vec<&str> = record.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut expected = ["topic", "partition", "offset", "timestamp", "timestamp_type", "key", "value", "headers"];
    expected.sort_unstable();
    assert_eq!(keys, expected);
}

#[test]
fn a_topic_that_stamps_gives_its_own_time_and_says_so() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-c", "message.timestamp.type=LogAppendTime"]).ok();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis();
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":5}\n").ok();
    let record = &broker.records("t")[0];
    assert_eq!(record["timestamp_type"], "append");
    assert!(u128::from(record["timestamp"].as_u64().expect("a time")) >= now, "{record}");
}

#[test]
fn what_cannot_be_consumed_is_said() {
    let broker = filled();
    let range = broker.run(&["consume", "t", "--partition", "0", "--from", "offset:11", "--until", "end"]).fails(1);
    assert!(range.stderr.contains("offset 11") && range.stderr.contains("out of range"), "{}", range.stderr);
    let partition = broker.run(&["consume", "t", "--partition", "3"]).fails(1);
    assert!(partition.stderr.contains("partition 3"), "{}", partition.stderr);
    let topic = broker.run(&["consume", "nosuch"]).fails(1);
    assert!(topic.stderr.contains("nosuch"), "{}", topic.stderr);
    broker.run(&["topic", "delete-records", "t", "--partition", "0", "--before", "5"]).ok();
    broker.run(&["consume", "t", "--partition", "0", "--from", "offset:4", "--no-follow"]).fails(1);
    assert_eq!(broker.json(&["consume", "t", "--partition", "0", "--no-follow"]).len(), 5);
}

#[test]
fn new_records_appear_at_once_and_a_signal_ends_it_well() {
    let broker = filled();
    let mut tail = Running::start(broker.command(&["consume", "t", "--from", "latest"]));
    // Whether the consumer has its place is seen by what it prints: nothing that was there before.
    eventually("a record that came after the consumer", || {
        broker.run_with(&["produce", "t"], "new\n").ok();
        (!tail.lines().is_empty()).then_some(())
    });
    assert!(tail.lines().iter().all(|line| line == "new"), "{:?}", tail.lines());
    assert!(tail.terminate().success());
}

#[test]
fn an_end_in_the_future_is_waited_for() {
    let broker = filled();
    let end = std::time::SystemTime::now() + std::time::Duration::from_secs(3);
    let end_ms = end.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis();
    let until = format!("time:{end_ms}");
    let mut tail = Running::start(broker.command(&["consume", "t", "--partition", "0", "--until", &until]));
    let after = format!("{{\"at\":{end_ms},\"v\":\"after\"}}\n{{\"at\":0,\"v\":\"behind it\"}}\n");
    broker.run_with(&["produce", "t", "--partition", "0", "--timestamp-field", "at"], after).ok();
    assert!(tail.wait().success());
    assert!(std::time::SystemTime::now() >= end, "it ended early");
    let lines = eventually("all that was printed", || Some(tail.lines()).filter(|lines| lines.len() >= 10));
    assert_eq!(lines.len(), 10, "{lines:?}");
}

#[test]
fn a_closed_pipe_is_a_clean_end() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], "line\n".repeat(100_000)).ok();
    for arguments in [
        &["consume", "t"][..],
        &["consume", "t", "--group", "g"],
        &["replay", "t", "--from", "earliest"],
        &["topic", "list"],
    ] {
        let mut child =
            broker.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        out.read_line(&mut String::new()).expect("a line");
        drop(out);
        let mut said = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        assert!(child.wait().expect("it ends").success(), "{arguments:?}: {said}");
        assert_eq!(said, "", "{arguments:?}");
    }
}

/// Nothing is written any more that could tell it that its reader has gone: the system must, and only Linux is known to.
#[test]
#[cfg(target_os = "linux")]
fn a_pipe_that_closes_ends_a_command_that_has_nothing_to_say() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":0}\n{\"at\":3600000}\n").ok();
    for arguments in [
        &["consume", "t"][..],
        &["consume", "t", "--group", "g"],
        &["replay", "t", "--from", "earliest", "--speed", "real"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut command = broker.command(arguments);
        command.stdout(writer);
        let mut idle = Held::start(command);
        BufReader::new(reader).read_line(&mut String::new()).expect("it prints");
        assert!(idle.wait().success(), "{arguments:?}");
    }
}

/// `2>&1 | head -1`: there is nobody to complain to either.
#[test]
fn a_pipe_that_takes_everything_may_close_too() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], "line\n".repeat(100_000)).ok();
    for arguments in [
        &["consume", "t"][..],
        &["consume", "t", "--group", "g"],
        &["replay", "t", "--from", "earliest"],
        &["topic", "list"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut command = broker.command(arguments);
        command.args(["--log", "debug"]).stdout(writer.try_clone().expect("a handle")).stderr(writer);
        let mut child = Held::start(command);
        BufReader::new(reader).read_line(&mut String::new()).expect("a line");
        assert!(child.wait().success(), "{arguments:?}");
    }
}

#[test]
fn a_reader_who_stops_reading_stops_only_this_command() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], format!("{}\n", "x".repeat(999)).repeat(30_000)).ok();
    let mut stalled = broker.command(&["consume", "t"]).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut out = stalled.stdout.take().expect("piped");
    out.read_exact(&mut [0; 1]).expect("it prints");
    assert_eq!(broker.run(&["consume", "t", "--no-follow"]).ok().lines().len(), 30_000);
    crate::harness::signal(stalled.id(), "TERM");
    let status = eventually("it ends although nobody reads", || stalled.try_wait().expect("it can be asked"));
    assert!(status.success(), "{status}");
}

/// A member must commit and leave in good order although its printing sits in a write that never ends.
#[test]
fn a_member_whose_reader_stopped_reading_can_be_ended() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], format!("{}\n", "x".repeat(999)).repeat(30_000)).ok();
    for signal in ["TERM", "INT"] {
        let mut command = broker.command(&["consume", "t", "--group", signal]);
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        command.stdout(writer);
        let mut stalled = Held::start(command);
        reader.read_exact(&mut [0; 1]).expect("it prints");
        stalled.signal(signal);
        assert!(stalled.wait().success(), "{signal}");
        let group = broker.object(&["group", "describe", signal]);
        assert_eq!(group["members"], serde_json::json!([]), "it has left");
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], "a\n").ok();
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut command = broker.command(&["consume", "t", "--group", signal]);
        command.stdout(writer);
        let mut member = Held::start(command);
        BufReader::new(reader).read_line(&mut String::new()).expect("it prints");
        // Nobody answers any more: what was printed cannot be committed, and the goodbye is not heard.
        harness::signal(broker.pid(), "STOP");
        member.signal(signal);
        let mut asked = 1;
        let status = harness::eventually_within(Duration::from_secs(15), "it ends", || {
            asked += 1;
            member.signal(signal);
            member.0.try_wait().expect("it can be asked")
        });
        harness::signal(broker.pid(), "CONT");
        assert_eq!(status.code(), Some(code), "after {asked} signals");
    }
}

#[test]
fn a_tail_outlives_a_restart_of_its_broker() {
    let mut broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let tail = Running::start(broker.command(&["consume", "t"]));
    broker.run_with(&["produce", "t"], "before\n").ok();
    eventually("the first record", || (tail.lines() == ["before"]).then_some(()));
    broker.kill();
    broker.revive();
    broker.run_with(&["produce", "t"], "after\n").ok();
    eventually("the second record", || (tail.lines() == ["before", "after"]).then_some(()));
}

#[test]
fn the_end_is_found_behind_what_compaction_left() {
    let broker = Broker::start(&["log.cleaner.backoff.ms=200"]);
    let settings =
        ["cleanup.policy=compact", "segment.bytes=65536", "min.cleanable.dirty.ratio=0.01", "delete.retention.ms=0"];
    let mut create = vec!["topic", "create", "t"];
    settings.iter().for_each(|setting| create.extend(["-c", setting]));
    broker.run(&create).ok();
    let input: String = (1..3000).map(|n| format!("k{}:{}-{n}\n", n % 3, "v".repeat(100))).collect();
    broker.run_with(&["produce", "t", "--key-separator", ":"], format!("once:kept\n{input}")).ok();
    let left = eventually("compaction", || Some(offsets(&broker.records("t"), 0)).filter(|left| left.len() < 2000));
    assert_eq!((left[0], left.last()), (0, Some(&2999)), "the only one of its key is kept, and so is the last");
    assert!(left[1] > 100, "those behind it are gone: {left:?}");
    let read = |from: &str, until: &str| offsets(&broker.json(&["consume", "t", "--from", from, "--until", until]), 0);
    assert_eq!(read("earliest", "offset:50"), [0], "an end among offsets without a record is an end");
    assert_eq!(read("offset:1", "offset:50"), Vec::<i64>::new());
}

/// Feeding by hand: a record is on its way when its line is complete, not when a buffer is full.
#[test]
fn a_pipe_from_produce_to_consume_has_no_delay() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let mut producer = Running::start(broker.command(&["produce", "t"]));
    let tail = Running::start(broker.command(&["consume", "t"]));
    let mut input = producer.stdin();
    for n in 0..5 {
        writeln!(input, "{n}").expect("it reads");
        eventually("the line on the other side", || (tail.lines().len() == n + 1).then_some(()));
    }
    drop(input);
    assert!(producer.wait().success());
}
