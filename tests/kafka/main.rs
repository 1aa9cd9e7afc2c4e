//! Kafka and Headwater read each other's files: every directory that Kafka wrote is imported, served record by record as
//! Kafka's own consumer read it, and appended to; and Kafka's dump tool finds nothing wrong in what a broker leaves.
//!
//! The second half needs a JDK and Kafka's jars, which `.ci/run` fetches; without `KAFKA_JARS` it says loudly
//! that Kafka was not asked.

#[path = "../harness/mod.rs"]
mod harness;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use harness::{Broker, kafka_logs, run};
use serde_json::Value;

const FIXTURES: [&str; 9] =
    ["codecs-0", "shapes-0", "segments-0", "txn-0", "compacted-0", "appendtime-0", "trimmed-0", "epochs-0", "empty-0"];

/// What Kafka's consumer read of a fixture.
fn golden(name: &str) -> Vec<Value> {
    let plain = kafka_logs().join(format!("golden/{name}.records.jsonl"));
    let text = std::fs::read_to_string(&plain).unwrap_or_else(|_| {
        let packed = std::fs::read(plain.with_extension("jsonl.gz")).expect("the golden records");
        let mut text = String::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text).expect("gzip");
        text
    });
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn from_base64(value: &Value) -> Option<Vec<u8>> {
    value.as_str().map(|text| base64::engine::general_purpose::STANDARD.decode(text).expect("base64"))
}

/// A field of our JSON, which is text, or base64 under another key.
fn bytes(object: &Value, field: &str) -> Option<Vec<u8>> {
    from_base64(&object[format!("{field}_base64")])
        .or_else(|| object[field].as_str().map(|text| text.as_bytes().to_vec()))
}

fn assert_same_record(name: &str, ours: &Value, kafka: &Value) {
    assert_eq!(ours["offset"], kafka["offset"], "{name}: offset");
    assert_eq!(ours["timestamp"], kafka["timestamp"], "{name}: timestamp of {}", kafka["offset"]);
    for field in ["key", "value"] {
        assert_eq!(bytes(ours, field), from_base64(&kafka[field]), "{name}: {field} of {}", kafka["offset"]);
    }
    let headers = |v: &Value| v["headers"].as_array().cloned().unwrap_or_default();
    let ours: Vec<_> = headers(ours).iter().map(|h| (bytes(h, "key"), bytes(h, "value"))).collect();
    let theirs: Vec<_> = headers(kafka).iter().map(|h| (from_base64(&h[0]), from_base64(&h[1]))).collect();
    assert_eq!(ours, theirs, "{name}: headers of {}", kafka["offset"]);
}

/// A broker on everything that Kafka wrote.
fn imported() -> Broker {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let from = kafka_logs().join("dirs");
    run(&["import", "--data", data.to_str().expect("plain"), from.to_str().expect("plain")]).ok();
    Broker::start_in(folder, &[])
}

/// The jars of Kafka's dump tool, or a loud word that Kafka is not asked.
fn kafka_jars() -> Option<PathBuf> {
    let jars = std::env::var_os("KAFKA_JARS").map(PathBuf::from);
    if jars.is_none() {
        eprintln!("** KAFKA_JARS is not set: Kafka itself does not read these files this time **");
    }
    jars
}

fn dump(jars: &Path, args: &[&str]) -> String {
    let output = Command::new("java")
        .args(["-Xmx512m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp"])
        .arg(format!("{}/*", jars.display()))
        .arg("kafka.tools.DumpLogSegments")
        .args(args)
        .output()
        .expect("java runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "Kafka's dump tool failed on {args:?}: {text}");
    text
}

/// Kafka's dump tool reads every file of a partition directory and complains of nothing.
fn assert_kafka_reads(jars: &Path, directory: &Path, compacted: bool) {
    let complaints = [
        "isvalid: false",
        "not found in the log",
        "exception",
        "mismatch",
        "out of order",
        "could not",
        "not found for entry",
        "failed",
    ];
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(directory).expect("the directory").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    let mut logs = 0;
    for file in files {
        let kind = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_owned();
        if !["log", "index", "timeindex", "snapshot", "txnindex"].contains(&kind.as_str()) {
            continue;
        }
        logs += usize::from(kind == "log");
        if std::fs::metadata(&file).expect("its length").len() == 0 {
            continue;
        }
        let path = file.to_str().expect("plain");
        let mut text = match kind.as_str() {
            "log" => dump(jars, &["--files", path, "--deep-iteration"]),
            _ => dump(jars, &["--files", path]),
        };
        if kind == "index" {
            let sanity = dump(jars, &["--files", path, "--index-sanity-check"]);
            assert!(sanity.contains("passed sanity check"), "{path}: {sanity}");
            text.push_str(&sanity);
        }
        for line in text.lines() {
            let lower = line.to_lowercase();
            let gap = lower.contains("non-consecutive") && !compacted;
            assert!(!gap && !complaints.iter().any(|c| lower.contains(c)), "Kafka says of {path}: {line}");
        }
    }
    assert!(logs > 0, "{} holds no segment", directory.display());
}

#[test]
fn every_directory_that_kafka_wrote_is_served_as_kafka_served_it_and_appended_to() {
    let mut broker = imported();
    for fixture in FIXTURES {
        let topic = fixture.strip_suffix("-0").expect("partition 0");
        let (ours, kafka) = (broker.records(topic), golden(fixture));
        assert_eq!(ours.len(), kafka.len(), "{fixture}: number of records");
        for (ours, kafka) in ours.iter().zip(&kafka) {
            assert_same_record(fixture, ours, kafka);
        }
        broker.run_with(&["produce", topic, "--key-separator", ":"], "added:by headwater\n").ok();
        let last = broker.records(topic).pop().expect("the record just added");
        assert_eq!(last["value"], "by headwater", "{fixture}");
    }
    for group in ["billing", "search"] {
        let described = broker.object(&["group", "describe", group]);
        let codecs = described["offsets"]
            .as_array()
            .and_then(|all| all.iter().find(|o| o["topic"] == "codecs").cloned())
            .unwrap_or_else(|| panic!("{group} committed offsets of codecs: {described}"));
        assert_eq!(codecs["committed"], 7, "{group}");
    }
    broker.stop();
    if let Some(jars) = kafka_jars() {
        for fixture in FIXTURES {
            assert_kafka_reads(&jars, &broker.partition(fixture), fixture == "compacted-0");
        }
    }
}

#[test]
fn kafka_reads_what_a_broker_leaves() {
    let mut broker = Broker::start(&["log.retention.check.interval.ms=200"]);
    let lines: String = (0..20_000).map(|n| format!("k{}:value {n} {}\n", n % 50, "x".repeat(n % 300))).collect();
    let mut topics = Vec::new();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        broker.run(&["topic", "create", codec, "-c", "segment.bytes=1048576", "-p", "2"]).ok();
        broker.run_with(&["produce", codec, "--key-separator", ":", "--compression", codec], &lines).ok();
        topics.extend([(format!("{codec}-0"), false), (format!("{codec}-1"), false)]);
    }
    broker.run(&["topic", "create", "stamped", "-c", "message.timestamp.type=LogAppendTime"]).ok();
    broker.run_with(&["produce", "stamped", "--compression", "lz4"], &lines).ok();
    topics.push(("stamped-0".into(), false));
    // Killed with records in its log, then closed well: recovery's files are Kafka's too.
    broker.kill();
    broker.revive();
    broker.run_with(&["produce", "none", "--key-separator", ":"], &lines).ok();
    broker.run(&["consume", "none", "--group", "g", "--count", "100"]).ok();
    broker.stop();
    for (partition, _) in &topics {
        run(&["segment", "verify", broker.partition(partition).to_str().expect("plain")]).ok();
    }
    if let Some(jars) = kafka_jars() {
        for entry in std::fs::read_dir(broker.data()).expect("the data folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                let name = path.file_name().and_then(|n| n.to_str()).expect("plain").to_owned();
                assert_kafka_reads(&jars, &path, name.starts_with("__consumer_offsets"));
            }
        }
    }
}
