//! `headwater group`, and `headwater consume --group`.

use crate::Held;
use crate::harness::{Answer, Broker, DEADLINE, Running, eventually};
use headwater_client::{Client, ClientConfig, StartFrom};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

/// A topic `t` with two partitions of ten records each, one second apart.
fn filled() -> Broker {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    for partition in ["0", "1"] {
        let lines: String = (0..10).map(|n| format!("{{\"at\":{}}}\n", n * 1000)).collect();
        broker.run_with(&["produce", "t", "--partition", partition, "--timestamp-field", "at"], lines).ok();
    }
    broker
}

fn committed(broker: &Broker, group: &str) -> Vec<(u64, Option<i64>)> {
    let offsets = broker.object(&["group", "describe", group])["offsets"].as_array().expect("offsets").clone();
    let mut found: Vec<(u64, Option<i64>)> =
        offsets.iter().map(|o| (o["partition"].as_u64().expect("a number"), o["committed"].as_i64())).collect();
    found.sort_unstable();
    found
}

fn members(broker: &Broker, group: &str) -> Vec<Value> {
    let answer: Answer = broker.run(&["group", "describe", group, "--json"]);
    if answer.status.success() { answer.object()["members"].as_array().expect("members").clone() } else { Vec::new() }
}

fn partitions(member: &Value) -> usize {
    member["partitions"].as_array().expect("partitions").len()
}

#[test]
fn what_was_printed_is_what_is_committed() {
    let broker = filled();
    let first = broker.json(&["consume", "t", "--group", "g", "--count", "7"]);
    let rest = broker.json(&["consume", "t", "--group", "g", "--until", "end"]);
    assert_eq!((first.len(), rest.len()), (7, 13));
    let mut all: Vec<(u64, i64)> = first
        .iter()
        .chain(&rest)
        .map(|r| (r["partition"].as_u64().expect("a number"), r["offset"].as_i64().expect("a number")))
        .collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 20, "nothing missing, nothing twice");
    let group = broker.object(&["group", "describe", "g"]);
    assert_eq!(group["members"], json!([]), "a command that ended has left");
    let lag: i64 =
        group["offsets"].as_array().expect("offsets").iter().map(|o| o["lag"].as_i64().expect("a number")).sum();
    assert_eq!(lag, 0);
    assert!(broker.json(&["consume", "t", "--group", "g", "--until", "end"]).is_empty());
    assert_eq!(
        broker.json(&["consume", "t", "--group", "late", "--from", "time:8000", "--until", "end"]).len(),
        4,
        "--from counts where nothing is committed"
    );
}

#[test]
fn a_group_is_listed_described_and_deleted() {
    let broker = filled();
    broker.run(&["consume", "t", "--group", "g", "--until", "end", "--quiet"]).ok();
    let listed = broker.json(&["group", "list"]);
    assert_eq!(listed, [json!({"group": "g", "state": listed[0]["state"], "members": 0})]);
    let text = broker.run(&["group", "describe", "g"]).ok().text();
    assert!(text.starts_with("group g, ") && text.contains("lag 0"), "{text}");
    broker.run(&["group", "delete-offsets", "g", "--topic", "t:0"]).ok();
    assert_eq!(
        committed(&broker, "g").into_iter().filter(|(_, offset)| offset.is_some()).collect::<Vec<_>>(),
        [(1, Some(10))]
    );
    broker.run(&["group", "delete-offsets", "g", "--topic", "t"]).ok();
    assert!(committed(&broker, "g").iter().all(|(_, offset)| offset.is_none()));
    broker.run(&["consume", "t", "--group", "h", "--count", "1"]).ok();
    broker.run(&["group", "delete", "h"]).ok();
    broker.run(&["group", "describe", "h"]).fails(1);
    broker.run(&["group", "members", "h"]).fails(1);
    broker.run(&["group", "delete", "h"]).fails(1);
    assert!(broker.json(&["group", "list"]).iter().all(|group| group["group"] != "h"));
}

/// What was mistyped has no offsets, and must not look like work done. Of several topics, those before it lost theirs.
#[test]
fn offsets_are_deleted_only_of_what_is_there_and_nobody_reads() {
    let broker = filled();
    broker.run(&["topic", "create", "other"]).ok();
    broker.run(&["consume", "t", "--group", "g", "--until", "end"]).ok();
    let refused = |group: &str, topics: &[&str], said: &str| {
        let named = topics.iter().flat_map(|topic| ["--topic", topic]);
        let args: Vec<&str> = ["group", "delete-offsets", group].into_iter().chain(named).collect();
        let answer = broker.run(&args).fails(1);
        assert!(answer.stderr.contains(said), "{topics:?} of {group}: {}", answer.stderr);
        let mut kept = committed(&broker, "g");
        kept.retain(|(_, offset)| offset.is_some());
        assert_eq!(kept, [(0, Some(10)), (1, Some(10))], "{topics:?} of {group}");
    };
    refused("nosuch", &["t"], "there is no group nosuch");
    refused("g", &["nosuch"], "there is no topic nosuch");
    refused("g", &["t", "nosuch"], "there is no topic nosuch");
    refused("g", &["t:0,2"], "topic t has no partition 2; it has 2 partitions");
    refused("g", &["t:0", "other:1"], "topic other has no partition 1");
    broker.run(&["group", "delete-offsets", "g", "--topic", "other"]).ok();
    let mut member = Running::start(broker.command(&["consume", "t", "--group", "g"]));
    eventually("a member", || (members(&broker, "g").len() == 1).then_some(()));
    refused("g", &["t"], "no member subscribes to it");
    assert!(member.terminate().success());
    let mut member = Running::start(broker.command(&["consume", "other", "--group", "g"]));
    eventually("a member", || (members(&broker, "g").len() == 1).then_some(()));
    refused("g", &["t", "other"], "no member subscribes to it");
    assert!(member.terminate().success());
}

#[test]
fn reset_shows_first_and_moves_only_when_told() {
    let broker = filled();
    broker.run(&["consume", "t", "--group", "g", "--until", "end"]).ok();
    let reset = |to: &str, more: &[&str]| {
        broker.run(&[&["group", "reset", "g", "--topic", "t", "--to", to][..], more].concat()).ok()
    };
    let dry = reset("earliest", &[]);
    assert!(dry.stderr.contains("--execute"), "{}", dry.stderr);
    assert_eq!(committed(&broker, "g"), [(0, Some(10)), (1, Some(10))]);
    for (to, expected) in [
        ("earliest", 0),
        ("latest", 10),
        ("offset:4", 4),
        ("current", 4),
        ("shift:3", 7),
        ("shift:-2", 5),
        ("shift:-99", 0),
        ("offset:99", 10),
        ("time:1970-01-01T00:00:03Z", 3),
        ("time:3001", 4),
        ("time:99999", 10),
        ("duration:1h", 10),
        ("duration:100000d", 0),
    ] {
        reset(to, &["--execute"]);
        assert_eq!(committed(&broker, "g"), [(0, Some(expected)), (1, Some(expected))], "--to {to}");
    }
    broker.run(&["group", "reset", "g", "--topic", "t:1", "--to", "offset:6", "--execute"]).ok();
    assert_eq!(committed(&broker, "g"), [(0, Some(0)), (1, Some(6))], "only the partition that was named");

    let plan = reset("offset:2", &["--export"]).text();
    assert_eq!(plan, "t,0,2\nt,1,2\n");
    std::fs::write(broker.folder().join("plan.csv"), "t,0,8\nt,1,9\n").expect("written");
    broker.run(&["group", "reset", "g", "--to", "file:plan.csv", "--execute"]).ok();
    assert_eq!(committed(&broker, "g"), [(0, Some(8)), (1, Some(9))]);
    std::fs::write(broker.folder().join("half.csv"), "t,0,3\n").expect("written");
    let missing =
        broker.run(&["group", "reset", "g", "--topic", "t:0,1", "--to", "file:half.csv", "--execute"]).fails(1);
    assert!(missing.stderr.contains("partition 1 of topic t"), "{}", missing.stderr);
    assert_eq!(committed(&broker, "g"), [(0, Some(8)), (1, Some(9))], "nothing is done by half");
    let line = broker.json(&["group", "reset", "g", "--topic", "t:0", "--to", "shift:1"]);
    assert_eq!(
        line,
        [json!({"group": "g", "topic": "t", "partition": 0, "committed": 8, "offset": 9, "executed": false})]
    );

    broker.run(&["group", "reset", "new", "--topic", "t", "--to", "offset:5", "--execute"]).ok();
    assert_eq!(
        committed(&broker, "new"),
        [(0, Some(5)), (1, Some(5))],
        "a group may be prepared before its first member"
    );
}

#[test]
fn what_cannot_be_reset_is_said() {
    let broker = filled();
    let consumer = Running::start(broker.command(&["consume", "t", "--group", "busy"]));
    eventually("a member", || members(&broker, "busy").first().filter(|member| partitions(member) == 2).map(|_| ()));
    let busy = broker.run(&["group", "reset", "busy", "--topic", "t", "--to", "earliest", "--execute"]).fails(1);
    assert!(busy.stderr.contains("stop its members first"), "{}", busy.stderr);
    broker.run(&["group", "delete", "busy"]).fails(1);
    drop(consumer);
    for arguments in [
        &["group", "reset", "g", "--topic", "nosuch", "--to", "earliest"][..],
        &["group", "reset", "g", "--topic", "t:9", "--to", "earliest"],
        &["group", "reset", "g", "--topic", "t", "--to", "shift:1"],
        &["group", "reset", "g", "--to", "file:nowhere.csv"],
    ] {
        broker.run(arguments).fails(1);
    }
    std::fs::write(broker.folder().join("bad.csv"), "t,zero,8\n").expect("written");
    let bad = broker.run(&["group", "reset", "g", "--to", "file:bad.csv"]).fails(1);
    assert!(bad.stderr.contains("bad.csv") && bad.stderr.contains("line 1"), "{}", bad.stderr);
}

#[test]
fn two_members_share_and_one_takes_over() {
    let broker = filled();
    let consume = |more: &[&str]| {
        let arguments = [&["consume", "t", "--group", "g", "--json", "--session-timeout", "6s"][..], more].concat();
        Running::start(broker.command(&arguments))
    };
    let mut one = consume(&[]);
    let two = consume(&["--assignor", "uniform"]);
    eventually("a partition each", || {
        let members = members(&broker, "g");
        (members.len() == 2 && members.iter().all(|member| partitions(member) == 1)).then_some(())
    });
    let text = broker.run(&["group", "members", "g"]).ok().text();
    assert!(text.contains("t:0") && text.contains("t:1"), "{text}");
    let listed = broker.json(&["group", "members", "g"]);
    assert_eq!(listed.len(), 2);
    for key in ["member_id", "client_host"] {
        assert!(listed[0][key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {}", listed[0]);
    }
    assert!(listed[0]["instance_id"].is_null());
    eventually("all twenty records", || (one.lines().len() + two.lines().len() == 20).then_some(()));
    eventually("their commit", || (committed(&broker, "g") == [(0, Some(10)), (1, Some(10))]).then_some(()));
    one.kill();
    broker.run_with(&["produce", "t", "--partition", "0"], "after\n").ok();
    broker.run_with(&["produce", "t", "--partition", "1"], "after\n").ok();
    eventually("the survivor has both partitions", || {
        let after = two.json().iter().filter(|record| record["value"] == "after").count();
        (after + one.json().iter().filter(|record| record["value"] == "after").count() == 2).then_some(())
    });
    let mut seen: Vec<(u64, i64)> = one
        .json()
        .iter()
        .chain(&two.json())
        .map(|r| (r["partition"].as_u64().expect("a number"), r["offset"].as_i64().expect("a number")))
        .collect();
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((seen.len(), count), (22, 22), "no gap, and nothing that was committed came again");
}

#[test]
fn a_member_that_is_asked_to_end_commits_and_leaves() {
    let broker = filled();
    let mut member = Running::start(broker.command(&["consume", "t", "--group", "g"]));
    eventually("all records", || (member.lines().len() == 20).then_some(()));
    assert!(member.terminate().success());
    assert_eq!(committed(&broker, "g"), [(0, Some(10)), (1, Some(10))]);
    assert!(members(&broker, "g").is_empty());
}

#[test]
fn a_static_member_returns_to_its_partitions() {
    let broker = filled();
    let start = |id: &str| Running::start(broker.command(&["consume", "t", "--group", "g", "--instance-id", id]));
    let mut one = start("one");
    let _two = start("two");
    let owned = |id: &str| {
        let members = members(&broker, "g");
        let member = members.iter().find(|member| member["instance_id"] == id)?.clone();
        (partitions(&member) == 1).then(|| member["partitions"].clone())
    };
    let (before, other) = eventually("a partition each", || owned("one").zip(owned("two")));
    one.kill();
    let _again = start("one");
    eventually("the same partition again", || (owned("one") == Some(before.clone())).then_some(()));
    assert_eq!(owned("two"), Some(other), "nobody else noticed");
}

/// The reading ends when the group has read everything, not when this member has nothing.
#[test]
fn a_member_without_partitions_waits_for_those_that_others_hold() {
    let broker = Broker::start(&["group.consumer.min.session.timeout.ms=1000"]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    let mut dead =
        Running::start(broker.command(&["consume", "t", "--group", "g", "--session-timeout", "3s", "--json"]));
    eventually("it holds both", || members(&broker, "g").first().filter(|member| partitions(member) == 2).map(|_| ()));
    crate::harness::signal(dead.pid(), "STOP");
    broker.run_with(&["produce", "t", "--partition", "0"], "a\nb\n").ok();
    broker.run_with(&["produce", "t", "--partition", "1"], "c\n").ok();
    let read = broker.json(&["consume", "t", "--group", "g", "--session-timeout", "3s", "--until", "end"]);
    assert_eq!(read.len(), 3, "what a dead member held is read once its session is over: {read:?}");
    assert_eq!(committed(&broker, "g"), [(0, Some(2)), (1, Some(1))]);
    dead.kill();
}

/// Where the group is in a partition that somebody else holds and commits nothing of, only that member knows: `--from latest`
/// is this one's own place, and not the group's.
#[test]
fn a_place_that_nobody_has_told_yet_is_waited_for() {
    let broker = filled();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let client = ClientConfig::from_profile(broker.profile()).expect("a profile");
    let client = runtime.block_on(Client::connect(client)).expect("a client");
    let silent = client.consumer().group("g").topics(["t"]).auto_commit(None).start(StartFrom::Earliest);
    let mut silent = runtime.block_on(silent.build()).expect("a member");
    assert_eq!(runtime.block_on(silent.assigned()).expect("an assignment").len(), 2);
    let mut ending =
        Running::start(broker.command(&["consume", "t", "--group", "g", "--from", "latest", "--until", "end"]));
    eventually("a partition each", || {
        // It takes what it is given only when its owner asks for more.
        let _ = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(50), silent.next_batch()).await });
        let members = members(&broker, "g");
        (members.len() == 2 && members.iter().all(|member| partitions(member) == 1)).then_some(())
    });
    eventually("one place is told", || {
        let told = committed(&broker, "g").iter().filter(|(_, offset)| offset.is_some()).count();
        (told == 1).then_some(())
    });
    assert!(ending.is_running(), "half of the group has told nothing");
    runtime.block_on(silent.close()).expect("it leaves");
    assert!(ending.wait().success());
    assert_eq!(ending.lines(), Vec::<String>::new());
    assert_eq!(committed(&broker, "g"), [(0, Some(10)), (1, Some(10))]);
}

#[test]
fn partitions_that_are_added_lie_beyond_an_end_that_was_fixed_before() {
    let broker = Broker::start(&["group.consumer.min.session.timeout.ms=1000"]);
    broker.run(&["topic", "create", "t", "-p", "1"]).ok();
    let mut holder = Running::start(broker.command(&["consume", "t", "--group", "g", "--session-timeout", "3s"]));
    eventually("it holds all", || members(&broker, "g").first().filter(|member| partitions(member) == 1).map(|_| ()));
    crate::harness::signal(holder.pid(), "STOP");
    broker.run_with(&["produce", "t"], "before\n").ok();
    let mut waiting = Running::start(broker.command(&["consume", "t", "--group", "g", "--until", "end"]));
    eventually("its end is fixed, and it has joined", || (members(&broker, "g").len() == 2).then_some(()));
    broker.run(&["topic", "add-partitions", "t", "3"]).ok();
    broker.run_with(&["produce", "t", "--partition", "2"], "after\n").ok();
    assert!(waiting.wait().success());
    let lines = eventually("what it printed", || Some(waiting.lines()).filter(|lines| !lines.is_empty()));
    assert_eq!(lines, ["before"]);
    assert_eq!(committed(&broker, "g")[0], (0, Some(1)));
    holder.kill();
}

#[test]
fn a_member_that_printed_nothing_has_a_place_all_the_same() {
    let broker = filled();
    let read = |more: &[&str]| broker.json(&[&["consume", "t", "--group", "g", "--from", "latest"][..], more].concat());
    assert!(read(&["--until", "end"]).is_empty());
    assert_eq!(committed(&broker, "g"), [(0, Some(10)), (1, Some(10))]);
    broker.run_with(&["produce", "t", "--partition", "1"], "between two members\n").ok();
    assert_eq!(read(&["--until", "end"]).len(), 1);

    let mut tail = Running::start(broker.command(&["consume", "t", "--group", "h", "--from", "latest"]));
    eventually("its place", || {
        let known = broker.run(&["group", "describe", "h"]).status.success();
        (known && committed(&broker, "h") == [(0, Some(10)), (1, Some(11))]).then_some(())
    });
    tail.kill();
}

/// The one who reads its output has stopped to; that is nobody else's trouble, and it costs no record.
#[test]
fn a_member_whose_reader_stalls_holds_up_no_other_and_goes_on_where_it_was() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    let start = |id: &str| {
        let mut command = broker.command(&["consume", "t", "--group", "g", "--json", "--instance-id", id]);
        let (reader, writer) = std::io::pipe().expect("a pipe");
        command.stdout(writer);
        (Held::start(command), BufReader::new(reader))
    };
    let ((mut stalled, mut unread), (mut other, read)) = (start("stalled"), start("other"));
    let owned = |id: &str| {
        let members = members(&broker, "g");
        let member = members.iter().find(|member| member["instance_id"] == id)?.clone();
        (partitions(&member) == 1).then(|| member["partitions"][0]["partition"].as_u64().expect("a number"))
    };
    let (of_stalled, of_other) = eventually("a partition each", || owned("stalled").zip(owned("other")));
    // Far more than a pipe and everything before it hold.
    let (records, line) = (20_000, format!("{}\n", "x".repeat(999)));
    for partition in ["0", "1"] {
        broker.run_with(&["produce", "t", "--partition", partition], line.repeat(records)).ok();
    }
    unread.read_line(&mut String::new()).expect("it prints, and then nobody reads");
    // The output stays open: a member whose reader has gone would leave.
    let take = |reader: BufReader<std::io::PipeReader>, count: usize| {
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = reader.lines();
            let of = |line: std::io::Result<String>| {
                let record: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
                (record["partition"].as_u64().expect("a number"), record["offset"].as_i64().expect("a number"))
            };
            let taken: Vec<_> = lines.by_ref().take(count).map(of).collect();
            send.send((taken, lines))
        });
        receive.recv_timeout(DEADLINE * 3).expect("all that it owns is printed")
    };
    let whole = |partition, from| (from..records as i64).map(|offset| (partition, offset)).collect::<Vec<_>>();
    let (got, _read) = take(read, records);
    assert!(got == whole(of_other, 0), "the other goes on: {} records, {:?}", got.len(), got.last());
    assert_eq!((owned("stalled"), owned("other")), (Some(of_stalled), Some(of_other)), "nobody was thrown out");
    let behind = committed(&broker, "g").iter().find(|(partition, _)| *partition == of_stalled).and_then(|(_, at)| *at);
    assert!(behind < Some(records as i64), "it is stalled: {behind:?}");

    let (got, _unread) = take(unread, records - 1);
    assert!(got == whole(of_stalled, 1), "it goes on where it was: {} records, {:?}", got.len(), got.last());
    for member in [&mut stalled, &mut other] {
        member.signal("TERM");
        assert!(member.wait().success());
    }
    assert_eq!(committed(&broker, "g"), [(0, Some(records as i64)), (1, Some(records as i64))]);
}

/// It was stopped, and others went on; when it wakes up it has much to print of what is no longer its own.
#[test]
fn a_member_that_was_fenced_does_not_move_the_group_back() {
    let broker = Broker::start(&["group.consumer.min.session.timeout.ms=1000"]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], format!("{}\n", "x".repeat(999)).repeat(30_000)).ok();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = broker.command(&["consume", "t", "--group", "g", "--session-timeout", "2s"]);
    command.stdout(writer);
    let mut slow = Held::start(command);
    reader.read_exact(&mut [0; 1]).expect("it prints");
    let first = members(&broker, "g")[0]["member_id"].clone();
    slow.signal("STOP");
    broker.run(&["consume", "t", "--group", "g", "--session-timeout", "2s", "--until", "end"]).ok();
    assert_eq!(committed(&broker, "g"), [(0, Some(30_000))]);
    slow.signal("CONT");
    eventually("it is a member again", || {
        members(&broker, "g").iter().any(|m| m["member_id"] == first && partitions(m) == 1).then_some(())
    });
    // Now it may write what it had taken before it was stopped; the end waits for that, and commits.
    let drained = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    slow.signal("TERM");
    assert!(slow.wait().success());
    drained.join().expect("it ends").expect("it can be read");
    assert_eq!(committed(&broker, "g"), [(0, Some(30_000))], "what it wrote was the other's, who was further on");
}
