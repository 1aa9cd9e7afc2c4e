//! Damage of every kind to every file of a data folder: it is named with its file, nothing damaged is ever served, no other
//! partition suffers, and nothing panics.
//!
//! A broker writes two topics and ends, well or by SIGKILL. Each case copies what it left, damages one file, looks at it
//! with `headwater segment verify`, starts a broker on it and reads everything back.

#[path = "../harness/mod.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use harness::{Answer, Broker, run};
use rand::{Rng, SeedableRng};
use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    /// A bit in the first 21 bytes: of a segment, what no batch checksum covers.
    HeaderBit,
    /// A bit anywhere.
    Bit,
    /// Half of the file is gone.
    Truncated,
    /// Nothing is left.
    Emptied,
    /// The file of the other topic's partition stands in its place.
    Swapped,
}

const DAMAGES: [Damage; 5] = [Damage::HeaderBit, Damage::Bit, Damage::Truncated, Damage::Emptied, Damage::Swapped];

/// What a broker left behind, and what it had acknowledged.
struct Left {
    folder: tempfile::TempDir,
    records: BTreeMap<String, BTreeMap<u64, String>>,
}

const TOPICS: [&str; 2] = ["damaged", "sound"];

fn left_behind(cleanly: bool) -> Left {
    let mut broker = Broker::start(&[]);
    for (n, topic) in TOPICS.iter().enumerate() {
        broker.run(&["topic", "create", topic, "-c", "segment.bytes=262144", "-c", "index.interval.bytes=4096"]).ok();
        for round in 0..6 {
            let lines: String =
                (0..1_000).map(|i| format!("k{i}:{topic} {round} {i} {}\n", "y".repeat(40 + n * 7))).collect();
            broker.run_with(&["produce", topic, "--key-separator", ":"], lines).ok();
        }
    }
    let records = TOPICS.iter().map(|t| (t.to_string(), by_offset(&broker.records(t)))).collect();
    match cleanly {
        true => broker.stop(),
        false => broker.kill(),
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy(&broker.data(), &folder.path().join("data"));
    Left { folder, records }
}

fn by_offset(records: &[Value]) -> BTreeMap<u64, String> {
    records.iter().map(|r| (r["offset"].as_u64().expect("an offset"), format!("{}:{}", r["key"], r["value"]))).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("its type").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("copied")),
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

/// Damages the file; `None` where this damage changes nothing.
fn damage(file: &Path, kind: Damage, rng: &mut impl Rng) -> Option<String> {
    let before = fs::read(file).expect("the file");
    let mut after = before.clone();
    // Space that is reserved and not yet written holds nothing that could be damaged.
    let written = before.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let mut told = String::new();
    match kind {
        Damage::HeaderBit | Damage::Bit => {
            let end = if kind == Damage::HeaderBit { written.min(21) } else { written };
            if end == 0 {
                return None;
            }
            let at = rng.random_range(0..end);
            after[at] ^= 1 << rng.random_range(0..8);
            told = format!(" at byte {at}");
        }
        Damage::Truncated => after.truncate(written / 2),
        Damage::Emptied => after.clear(),
        Damage::Swapped => {
            let other = file.to_str().expect("plain").replace("/damaged-0/", "/sound-0/");
            after = fs::read(other).ok()?;
        }
    }
    (after != before).then(|| {
        fs::write(file, &after).expect("written");
        told
    })
}

/// Starts a broker on the folder and reads both topics; what was served must be what was written.
fn serve(case: &str, left: &Left, folder: tempfile::TempDir, sound: &[&str]) {
    let mut broker = match start(case, folder) {
        Ok(broker) => broker,
        Err(words) => {
            assert!(!words.contains("panicked"), "{case}: {words}");
            let file = case.split(' ').next().unwrap_or_default();
            assert!(words.contains(file), "{case}: the broker refuses to start without naming the file: {words}");
            return;
        }
    };
    // A segment of another partition whose batches are all valid may as well have been copied here by a person, or written by
    // Kafka: that is said, not refused.
    let foreign = case.contains(".log Swapped");
    if foreign {
        assert!(broker.log().contains("the checksum file disagrees"), "{case}: {}", broker.log());
    }
    for topic in TOPICS.into_iter().filter(|topic| !foreign || sound.contains(topic)) {
        let answer = broker.run(&["consume", topic, "--from", "earliest", "--until", "end", "--json"]);
        let expected = &left.records[topic];
        let served = by_offset(&answer.json());
        for (offset, record) in &served {
            assert_eq!(Some(record), expected.get(offset), "{case}: {topic} at {offset}");
        }
        if sound.contains(&topic) {
            answer.ok();
            assert_eq!(served.len(), expected.len(), "{case}: {topic} must not suffer");
        } else if answer.status.success() {
            let log = broker.log();
            assert_eq!(served.len(), expected.len(), "{case}: records are missing and nobody says so: {log}");
        } else {
            answer.fails(1);
        }
    }
    assert!(!broker.log().contains("panicked"), "{case}: {}", broker.log());
    broker.kill();
}

fn start(case: &str, folder: tempfile::TempDir) -> Result<Broker, String> {
    Broker::try_start_in(folder, &[]).map_err(|e| format!("{case}: {e}"))
}

fn verify(partition: &Path) -> Answer {
    let answer = run(&["segment", "verify", "--json", partition.to_str().expect("plain")]);
    assert!(matches!(answer.status.code(), Some(0 | 1)), "{}: {}", answer.status, answer.stderr);
    assert!(!answer.stderr.contains("panicked"), "{}", answer.stderr);
    answer
}

fn every_damage(cleanly: bool) {
    let left = left_behind(cleanly);
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let partition = left.folder.path().join("data/damaged-0");
    let roots = files(&left.folder.path().join("data"));
    let targets: Vec<PathBuf> = files(&partition).into_iter().chain(roots).collect();
    let last_segment = files(&partition)
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .filter_map(|p| p.file_stem()?.to_str().map(str::to_owned))
        .next_back()
        .expect("a segment");
    assert!(targets.len() > 15, "a partition of several segments: {targets:?}");
    for target in targets {
        for kind in DAMAGES {
            let folder = tempfile::tempdir().expect("a temporary folder");
            copy(&left.folder.path().join("data"), &folder.path().join("data"));
            let inside = target.strip_prefix(left.folder.path()).expect("inside");
            let name = target.file_name().and_then(|n| n.to_str()).expect("plain").to_owned();
            let in_partition = target.starts_with(&partition);
            let in_the_open = !cleanly && in_partition && name.starts_with(&last_segment);
            if in_the_open && kind == Damage::Swapped {
                // Its `.crc`, which binds bytes to their partition, is written when the segment is rolled or closed.
                continue;
            }
            let Some(place) = damage(&folder.path().join(inside), kind, &mut rng) else { continue };
            let case = format!("{name} {kind:?}{place} (clean: {cleanly})");
            if in_partition && name != "partition.metadata" {
                let answer = verify(&folder.path().join("data/damaged-0"));
                let found: Vec<Value> = answer
                    .json()
                    .iter()
                    .flat_map(|v| ["faults", "notes"].map(|key| v[key].as_array().cloned().unwrap_or_default()))
                    .flatten()
                    .collect();
                let named = found.iter().any(|f| f["file"].as_str().is_some_and(|file| file.ends_with(&name)));
                // What a crash left of the segment that was being written may end anywhere, as far as the folder alone tells;
                // the broker knows better, from its recovery point.
                let open_end =
                    !cleanly && name.starts_with(&last_segment) && matches!(kind, Damage::Truncated | Damage::Emptied);
                assert!(named || open_end, "{case}: verify names {found:?}");
            }
            serve(&case, &left, folder, if in_partition { &["sound"] } else { &[] });
        }
    }
}

#[test]
fn damage_after_a_clean_end_is_named_and_never_served() {
    every_damage(true);
}

#[test]
fn damage_after_a_crash_is_named_and_never_served() {
    every_damage(false);
}

#[test]
fn a_partition_that_is_being_written_is_not_called_damaged() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    for size in [1, 60_000, 150_000] {
        broker.run_with(&["produce", "t"], "x".repeat(size) + "\n").ok();
        run(&["segment", "verify", broker.partition("t-0").to_str().expect("plain")]).ok();
    }
}
