//! `headwater bench`: that it measures what it says, on little data. Figures are never asserted.

use crate::Held;
use crate::harness::{Broker, Running, eventually, headwater, run, signal};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

fn check(answer: &Value, mode: &str, mtu: Option<u16>, records: u64) {
    assert_eq!(answer.get("mtu"), Some(&mtu.into()), "{answer}");
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
    check(&produce, "produce", None, 5001);
    assert!(produce["broker_cpu_s"].as_f64().is_some());
    assert_eq!(produce["bytes"], 500_100);
    check(
        &bench(&["produce", "--records", "300", "--throughput", "1000", "--acks", "1", "--linger", "1ms"]),
        "produce",
        None,
        300,
    );
    check(
        &bench(&["consume", "--records", "5000", "--record-size", "100", "--partitions", "2", "--mtu", "1452"]),
        "consume",
        Some(1452),
        5000,
    );
    check(&bench(&["e2e", "--records", "300", "--throughput", "500"]), "e2e", None, 300);
    assert!(broker.json(&["topic", "list"]).iter().all(|topic| topic["internal"] == true), "a bench cleans up");

    check(&bench(&["produce", "--records", "100", "--topic", "kept"]), "produce", None, 100);
    check(&bench(&["produce", "--records", "100", "--topic", "kept"]), "produce", None, 100);
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

/// What the profile set was said to have been found out.
#[test]
fn packets_that_the_profile_sets_are_told() {
    let broker = Broker::start(&[]);
    let small = broker.profile().with_file_name("small.toml");
    let profile = std::fs::read_to_string(broker.profile()).expect("the profile");
    std::fs::write(&small, profile + "mtu = 1300\n").expect("a profile");
    let small = small.to_str().expect("text");
    for (flag, mtu) in [(&[][..], 1300), (&["--mtu", "1452"], 1452)] {
        let produce = ["bench", "produce", "--records", "300", "--profile", small, "--json"];
        check(&run(&[&produce[..], flag].concat()).ok().object(), "produce", Some(mtu), 300);
    }
}

#[test]
fn isolation_tells_the_readers_shares_and_the_latency_of_calls() {
    let broker = Broker::start(&[]);
    let answer = broker.object(&[
        "bench",
        "isolation",
        "--partitions",
        "8",
        "--stalled",
        "2",
        "--records",
        "16000",
        "--mtu",
        "6500",
    ]);
    assert_eq!(answer["mtu"], 6500);
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
        check(&raw, "raw", Some(1452), 20_000);
        assert!(raw["broker_cpu_s"].as_f64().is_some());
    }
    let dir = folder.path().to_str().expect("text");
    let disk = run(&["bench", "disk", "--records", "2000", "--batch", "64KiB", "--dir", dir, "--json"]).ok().object();
    check(&disk, "disk", None, 2000);
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

fn made_by_bench(broker: &Broker) -> Vec<String> {
    let topics = broker.json(&["topic", "list"]);
    let names = topics.iter().map(|topic| topic["name"].as_str().expect("text").to_owned());
    names.filter(|name| name.starts_with("bench-")).collect()
}

#[test]
fn an_interrupted_bench_cleans_up() {
    let broker = Broker::start(&[]);
    for mode in [
        &["produce", "--records", "1000000000"][..],
        &["consume", "--records", "1000000000"],
        &["e2e", "--records", "1000000000", "--throughput", "100"],
        &["isolation", "--records", "1000000000"],
    ] {
        let mut command = broker.command(&["bench"]);
        command.args(mode).stdout(Stdio::null()).stderr(Stdio::null());
        let mut bench = Held::start(command);
        eventually("its topic", || (!made_by_bench(&broker).is_empty()).then_some(()));
        bench.signal("TERM");
        assert_eq!(bench.wait().code(), Some(1), "{mode:?}");
        assert_eq!(made_by_bench(&broker), Vec::<String>::new(), "{mode:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let files = || std::fs::read_dir(folder.path()).expect("a folder").count();
    let mut command = headwater();
    command.args(["bench", "disk", "--records", "1000000000", "--dir"]).arg(folder.path()).stderr(Stdio::null());
    let mut bench = Held::start(command);
    eventually("its file", || (files() == 1).then_some(()));
    bench.signal("INT");
    assert_eq!(bench.wait().code(), Some(1));
    assert_eq!(files(), 0);
}

/// It goes on in two processes; both have the same standard error, which ends when both have.
#[test]
fn an_interrupted_raw_bench_ends_with_its_other_process() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = headwater();
    command.args(["bench", "raw", "--records", "1000000000", "--log", "trace"]);
    command.stdout(Stdio::null()).stderr(writer);
    let mut bench = Held::start(command);
    let (mut lines, (send, receive)) = (BufReader::new(reader).lines().map_while(Result::ok), mpsc::channel());
    let first = lines.next();
    assert!(first.is_some(), "something is logged when they connect");
    bench.signal("INT");
    std::thread::spawn(move || send.send(lines.last()));
    assert_eq!(bench.wait().code(), Some(1));
    let last = receive.recv_timeout(crate::harness::DEADLINE).expect("both processes have ended");
    assert_eq!(last.as_deref(), Some("error: interrupted"));
}

#[test]
fn absurd_numbers_are_usage_errors() {
    for line in [
        "produce t --delivery-timeout 18446744073709551615s",
        "produce t --linger 400d",
        "produce t --batch 18446744073709551615",
        "consume t --group g --session-timeout 18446744073709551615s",
        "bench produce --record-size 18446744073709551615",
        "bench produce --record-size 65MiB",
        "bench produce --batch 18446744073709551615",
        "bench produce --partitions 4294967295",
        "bench raw --records 18446744073709552",
        "bench disk --records 18446744073709551615",
        "bench e2e --throughput 18446744073709551615",
        "bench e2e --records 18446744073709551615",
        "bench isolation --records 18446744073709551615",
    ] {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        run(&arguments).fails(2);
    }
}

/// It is a run of decades, and says nothing of memory: records are measured as they come.
#[test]
fn a_run_of_any_length_begins() {
    let broker = Broker::start(&[]);
    let mut command = broker.command(&["bench", "e2e", "--records", "1000000000000", "--topic", "t"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = Held::start(command);
    eventually("records", || {
        let described = broker.run(&["topic", "describe", "t", "--json"]);
        let end = described.status.success().then(|| described.object()["partitions"][0]["high_watermark"].as_i64());
        end.flatten().filter(|end| *end > 0)
    });
    bench.signal("TERM");
    assert_eq!(bench.wait().code(), Some(1));
}

#[test]
fn a_topic_that_is_there_decides_how_many_readers_may_stall() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "4"]).ok();
    let few = broker.run(&["bench", "isolation", "--topic", "t", "--stalled", "4", "--records", "4000"]).fails(1);
    assert!(few.stderr.contains("topic t has 4 partitions"), "{}", few.stderr);
    for (stalled, arguments) in [(0, &[][..]), (3, &["--stalled", "3"])] {
        let line = [&["bench", "isolation", "--topic", "t", "--records", "4000"][..], arguments].concat();
        let answer = broker.object(&line);
        assert_eq!((&answer["partitions"], &answer["stalled"]), (&4.into(), &stalled.into()), "{answer}");
    }
}

/// Another clock, of processors for one, would tell of less than the half second over which records are due, or of more than
/// the whole command took.
#[test]
fn seconds_are_those_of_the_wall() {
    let broker = Broker::start(&[]);
    let began = Instant::now();
    let answer = broker.object(&["bench", "produce", "--records", "51", "--throughput", "100"]);
    let (seconds, whole) = (answer["seconds"].as_f64().expect("a number"), began.elapsed().as_secs_f64());
    assert!(0.5 <= seconds && seconds < whole, "{answer} in {whole} s");
    for (rate, of) in [("records_per_s", 51.0), ("mb_per_s", answer["bytes"].as_f64().expect("a number") / 1e6)] {
        let rate = answer[rate].as_f64().expect("a number");
        assert!((rate * seconds - of).abs() < 1e-6 * of, "{answer}");
    }
}

/// Round trips of large records take long; they are bounded by time, not by number.
#[test]
fn raw_measures_large_records() {
    let raw = run(&["bench", "raw", "--records", "4", "--record-size", "8MiB", "--json"]).ok().object();
    check(&raw, "raw", None, 4);
    assert!(raw["latency_us"]["p50"].as_u64() > Some(0), "{raw}");
}

/// Somebody stands still for a while, and records go on to be due: what they waited is in the figures of all of them, not
/// only of the few that were under way (no coordinated omission).
#[test]
fn a_stall_counts_for_every_record_that_was_due_in_it() {
    const STALL: Duration = Duration::from_secs(2);
    let broker = Broker::start(&[]);
    let measure = |mode: &str, topic: &str, stalled: &dyn Fn(u32) -> u32| {
        // Eight seconds; a quarter of them is stalled. What a stall leaves out of a hundredth is less than 100 ms of it.
        let arguments = ["bench", mode, "--topic", topic, "--throughput", "200", "--records", "1600", "--json"];
        let mut bench = Running::start(broker.command(&arguments));
        eventually("records", || {
            let described = broker.run(&["topic", "describe", topic, "--json"]);
            let end =
                described.status.success().then(|| described.object()["partitions"][0]["high_watermark"].as_i64());
            // e2e does not count its first twentieth.
            end.flatten().filter(|end| *end > 80)
        });
        signal(stalled(bench.pid()), "STOP");
        // This is the stall itself.
        std::thread::sleep(STALL);
        signal(stalled(bench.pid()), "CONT");
        assert!(bench.wait().success());
        let answer = eventually("its answer", || bench.json().first().cloned());
        check(&answer, mode, None, 1600);
        let at = |name: &str| Duration::from_micros(answer["latency_us"][name].as_u64().expect("a number"));
        assert!(at("max") >= STALL.mul_f64(0.9), "{topic}: {answer}");
        assert!(at("p99") >= STALL.mul_f64(0.8), "{topic}: one in four waited, up to the whole stall: {answer}");
    };
    std::thread::scope(|scope| {
        // A bench that is stopped sends late what was due; it must count from when it was due.
        scope.spawn(|| measure("produce", "own", &|bench| bench));
        scope.spawn(|| measure("e2e", "own-e2e", &|bench| bench));
    });
    measure("produce", "brokers", &|_| broker.pid());
}
