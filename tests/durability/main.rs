//! kill -9 of the broker in the middle of production, with default settings: every acknowledged record is there once, in
//! order, where its acknowledgement said; and a producer that outlives its broker puts every record there exactly once.

#[path = "../harness/mod.rs"]
mod harness;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use harness::{Broker, Running, eventually, run};
use rand::{Rng, SeedableRng};
use serde_json::Value;

const KEYS: u64 = 97;
const KILLS: u64 = 20;

/// Feeds `key:tag-n` lines until told to stop (or until the reader is gone), and counts them.
struct Feeder {
    stop: Arc<AtomicBool>,
    lines: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Feeder {
    fn start(mut stdin: std::process::ChildStdin, tag: String) -> Feeder {
        let stop = Arc::new(AtomicBool::new(false));
        let lines = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (stop.clone(), lines.clone());
        let thread = std::thread::spawn(move || {
            let mut n = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                let mut chunk = String::new();
                for _ in 0..10 {
                    chunk.push_str(&format!("k{}:{tag}-{n}\n", n % KEYS));
                    n += 1;
                }
                if stdin.write_all(chunk.as_bytes()).is_err() {
                    return;
                }
                count.store(n, Ordering::Relaxed);
                // The pace of production, not a wait: kills must find batches in flight.
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
        });
        Feeder { stop, lines, thread: Some(thread) }
    }

    fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("joined once").join().expect("the feeder ends");
        self.lines.load(Ordering::Relaxed)
    }
}

/// The whole acknowledgements in an ack log; a line that the kill cut is not one.
fn acknowledgements(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).expect("an acknowledgement is JSON")).collect()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is missing in {value}"))
}

/// Offsets of each partition count up by one, and each key's records stand in the order they were produced.
fn assert_in_order(records: &[Value]) {
    let mut next: HashMap<u64, u64> = HashMap::new();
    let mut last: HashMap<(String, String), u64> = HashMap::new();
    for record in records {
        let partition = number(record, "partition");
        let offset = number(record, "offset");
        let expected = next.entry(partition).or_insert(0);
        assert_eq!(offset, *expected, "offsets of partition {partition} are consecutive");
        *expected += 1;
        let (tag, n) = record["value"].as_str().expect("text").split_once('-').expect("tag-n");
        let key = (record["key"].as_str().expect("a key").to_owned(), tag.to_owned());
        let n: u64 = n.parse().expect("a number");
        if let Some(before) = last.insert(key.clone(), n) {
            assert!(n > before, "{key:?}: {n} stands after {before}");
        }
    }
}

fn verify_segments(broker: &Broker, topic: &str, partitions: u32) {
    let paths: Vec<String> =
        (0..partitions).map(|p| broker.partition(&format!("{topic}-{p}")).display().to_string()).collect();
    let args: Vec<&str> = ["segment", "verify"].into_iter().chain(paths.iter().map(String::as_str)).collect();
    run(&args).ok();
}

#[test]
fn acknowledged_records_survive_twenty_kills_of_broker_and_producer() {
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let mut broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "4"]).ok();
    let mut acknowledged: HashMap<(u64, u64), (u64, u64)> = HashMap::new();
    for round in 0..KILLS {
        let log = broker.folder().join(format!("acks-{round}"));
        let mut producer = Running::start(broker.command(&[
            "produce",
            "t",
            "--key-separator",
            ":",
            "--ack-log",
            log.to_str().expect("a plain path"),
        ]));
        let feeder = Feeder::start(producer.stdin(), format!("r{round}"));
        let enough = rng.random_range(1_000..40_000);
        eventually("acknowledgements", || {
            assert!(producer.is_running(), "the producer ended by itself");
            (std::fs::metadata(&log).map_or(0, |m| m.len()) > enough).then_some(())
        });
        broker.kill();
        producer.kill();
        feeder.finish();
        for ack in acknowledgements(&log) {
            acknowledged.insert((round, number(&ack, "line") - 1), (number(&ack, "partition"), number(&ack, "offset")));
        }
        broker.revive();
    }
    let records = broker.records("t");
    assert_in_order(&records);
    let mut seen = HashSet::new();
    let mut at = HashMap::new();
    for record in &records {
        let value = record["value"].as_str().expect("text").to_owned();
        at.insert((number(record, "partition"), number(record, "offset")), value.clone());
        assert!(seen.insert(value), "a record stands in the log twice: {record}");
    }
    assert!(acknowledged.len() > 1_000, "only {} acknowledged: the test would mean nothing", acknowledged.len());
    for ((round, line), place) in &acknowledged {
        assert_eq!(
            at.get(place).map(String::as_str),
            Some(format!("r{round}-{line}").as_str()),
            "round {round}, line {line} was acknowledged at {place:?}"
        );
    }
    broker.stop();
    verify_segments(&broker, "t", 4);
}

#[test]
fn a_producer_that_outlives_twenty_kills_puts_every_record_there_exactly_once() {
    let mut rng = rand::rngs::StdRng::seed_from_u64(2);
    let mut broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "4"]).ok();
    let log = broker.folder().join("acks");
    let mut producer = Running::start(broker.command(&[
        "produce",
        "t",
        "--key-separator",
        ":",
        "--ack-log",
        log.to_str().expect("a plain path"),
    ]));
    let feeder = Feeder::start(producer.stdin(), "s".into());
    for _ in 0..KILLS {
        let before = std::fs::metadata(&log).map_or(0, |m| m.len());
        let more = rng.random_range(2_000..20_000);
        eventually("acknowledgements after a restart", || {
            assert!(producer.is_running(), "the producer gave up");
            (std::fs::metadata(&log).map_or(0, |m| m.len()) > before + more).then_some(())
        });
        broker.kill();
        broker.revive();
    }
    let produced = feeder.finish();
    assert!(producer.wait().success(), "the producer outlives its broker");

    let mut by_line: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for ack in acknowledgements(&log) {
        let place = (number(&ack, "partition"), number(&ack, "offset"));
        assert!(by_line.insert(number(&ack, "line"), place).is_none(), "a line acknowledged twice: {ack}");
    }
    assert!(by_line.keys().copied().eq(1..=produced), "{} of {produced} lines acknowledged", by_line.len());
    let records = broker.records("t");
    assert_in_order(&records);
    assert_eq!(records.len() as u64, produced, "every record exactly once");
    let at: HashMap<(u64, u64), &str> = records
        .iter()
        .map(|r| ((number(r, "partition"), number(r, "offset")), r["value"].as_str().expect("text")))
        .collect();
    for (line, place) in &by_line {
        assert_eq!(at.get(place).copied(), Some(format!("s-{}", line - 1).as_str()), "line {line} at {place:?}");
    }
    broker.stop();
    verify_segments(&broker, "t", 4);
}
