//! Damage to the files at the root of the data folder: what they say concerns every partition.

use std::fs;

use rand::rngs::StdRng;

use crate::harness::Broker;
use crate::{Damage, Values, client, copied, damage, files, name_of, produce, random, read, runtime, seeds};

const PARTITIONS: u32 = 2;
/// Records before this offset of partition 0 were deleted.
const DELETED: usize = 30;
/// What says how far the logs were flushed, where they begin, what readers see, and what there is at all.
const DATA: [&str; 6] = [
    "recovery-point-offset-checkpoint",
    "replication-offset-checkpoint",
    "log-start-offset-checkpoint",
    "headwater-log-start-offsets",
    "meta.properties",
    "headwater.metadata",
];
/// What `meta.properties` says.
const KEYS: [&str; 3] = ["cluster.id", "node.id", "headwater.format"];
const MARKER: &str = ".kafka_cleanshutdown";

struct Left {
    folder: tempfile::TempDir,
    written: Vec<Values>,
}

/// What a broker left behind that wrote so many batches to each partition.
fn left_behind(cleanly: bool, batches: u32) -> Left {
    let mut broker = Broker::start(&["log.flush.offset.checkpoint.interval.ms=50"]);
    broker.run(&["topic", "create", "kept", "-p", &PARTITIONS.to_string(), "-c", "segment.bytes=50000"]).ok();
    let written = runtime().block_on(async {
        let client = client(&broker).await;
        let written = produce(&client, "kept", PARTITIONS, batches, 10).await;
        client.admin().delete_records("kept", 0, Some(DELETED as i64)).await.expect("deleted");
        client.close().await;
        written
    });
    match cleanly {
        true => broker.stop(),
        false => {
            let points = broker.data().join("recovery-point-offset-checkpoint");
            let end = format!(" {}", batches * 10);
            crate::harness::eventually("every recovery point is at the end", || {
                let text = fs::read_to_string(&points).ok()?;
                let known = text.lines().filter(|line| line.starts_with("kept ") && line.ends_with(&end));
                (known.count() == PARTITIONS as usize).then_some(())
            });
            broker.kill();
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    crate::copy(&broker.data(), &folder.path().join("data"));
    Left { folder, written }
}

/// Whether a text names a file, and a place in it.
fn names(text: &str, file: &str) -> bool {
    let is_place = |word: &str| ["byte", "line", "position"].contains(&word);
    let words: Vec<&str> = text.split([' ', '=', ',', ':', ';']).filter(|word| !word.is_empty()).collect();
    let place = words.windows(2).any(|pair| is_place(pair[0]) && pair[1].parse::<u64>().is_ok());
    text.contains(file) && place
}

fn try_one(left: &Left, other: &Left, name: &str, kind: Damage, rng: &mut StdRng) {
    let folder = copied(&left.folder.path().join("data"));
    let file = folder.path().join("data").join(name);
    let Some(at) = damage(&file, &other.folder.path().join("data").join(name), kind, rng) else { return };
    let what = format!("{name}: {kind:?}, at byte {at}");
    let mut broker = match Broker::try_start_in(folder, &[]) {
        Ok(broker) => broker,
        Err(words) => {
            assert!(!words.contains("panicked"), "{what}: {words}");
            // Whose the folder is, and what belongs to whom, may look right and be something else: then the key is named that says so.
            let other = match name {
                "meta.properties" => words.contains(name) && KEYS.iter().any(|key| words.contains(key)),
                _ => kind == Damage::Swapped && words.contains(name),
            };
            assert!(
                other || names(&words, name),
                "{what}: it does not start, and does not say where it looked: {words}"
            );
            return;
        }
    };
    let read: Vec<_> = runtime().block_on(async {
        let client = client(&broker).await;
        let mut all = Vec::new();
        for partition in 0..PARTITIONS {
            all.push(read(&client, "kept", partition).await);
        }
        client.close().await;
        all
    });
    let log = broker.log();
    assert!(!log.contains("panicked"), "{what}: {log}");
    for (number, (read, written)) in read.iter().zip(&left.written).enumerate() {
        let start = if number == 0 { DELETED } else { 0 };
        if let Some(error) = &read.error {
            assert!(
                error.contains(name),
                "{what}: partition {number} is not served, and the error names another file: {error}"
            );
            continue;
        }
        assert_eq!(read.start, start as i64, "{what}: partition {number} begins elsewhere");
        assert!(read.values == written[start..], "{what}: partition {number} serves something else");
    }
    // Digits may become others, which nobody can tell where there is no checksum: then all is served. What makes no sense is named.
    let senseless = match kind {
        Damage::Emptied | Damage::Truncated => name != MARKER,
        Damage::Bit => ["headwater.metadata", "headwater-log-start-offsets"].contains(&name),
        Damage::ByteAt(_) | Damage::Swapped => false,
    };
    assert!(!senseless || log.lines().any(|line| names(line, name)), "{what}: nobody says so: {log}");
    broker.kill();
}

/// A bit of each value that `meta.properties` gives to a key.
fn values(left: &Left, name: &str) -> Vec<Damage> {
    if name != "meta.properties" {
        return Vec::new();
    }
    let text = fs::read(left.folder.path().join("data").join(name)).expect("the file");
    let begins = text.iter().enumerate().filter(|(_, byte)| **byte == b'=').map(|(at, _)| Damage::ByteAt(at + 1));
    begins.collect()
}

fn every_damage(cleanly: bool) {
    let (left, other) = (left_behind(cleanly, 12), left_behind(cleanly, 9));
    let names: Vec<String> = files(&left.folder.path().join("data")).iter().map(|file| name_of(file)).collect();
    assert!(DATA.iter().all(|name| names.iter().any(|found| found == name)), "{names:?}");
    assert_eq!(names.iter().any(|name| name == MARKER), cleanly, "{names:?}");
    for seed in seeds() {
        eprintln!("seed {seed}");
        let mut rng = random(seed);
        for name in names.iter().filter(|name| DATA.contains(&name.as_str()) || *name == MARKER) {
            let kinds = [Damage::Bit, Damage::Truncated, Damage::Emptied, Damage::Swapped];
            for kind in kinds.into_iter().chain(values(&left, name)) {
                try_one(&left, &other, name, kind, &mut rng);
            }
        }
    }
}

#[test]
fn damage_to_the_root_after_a_clean_end_is_named_and_never_served() {
    every_damage(true);
}

#[test]
fn damage_to_the_root_after_a_crash_is_named_and_never_served() {
    every_damage(false);
}
