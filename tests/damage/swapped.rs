//! Segments that two partitions exchanged: whatever is valid in them was never written where it lies.

use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{Broker, eventually};
use crate::{Values, client, copied, copy, files, name_of, produce, read, runtime};

const TOPICS: [&str; 2] = ["one", "two"];
const PARTITIONS: u32 = 8;
const BATCHES: u32 = 16;
const PER_BATCH: u32 = 16;
const SEGMENTS: usize = 3;

/// Who exchanges: of one topic and of two, with records of the same length and not.
const PAIRS: [[(usize, usize); 2]; 4] = [[(0, 0), (0, 7)], [(0, 1), (0, 2)], [(0, 3), (1, 3)], [(0, 4), (1, 5)]];

/// What goes with the `.log`.
const COMPANIONS: [&[&str]; 4] = [&[], &["crc"], &["index", "timeindex"], &["crc", "index", "timeindex"]];

struct Left {
    folder: tempfile::TempDir,
    written: Vec<Vec<Values>>,
}

fn left_behind(cleanly: bool) -> Left {
    let mut broker = Broker::start(&["log.flush.offset.checkpoint.interval.ms=50"]);
    for topic in TOPICS {
        broker.run(&["topic", "create", topic, "-p", &PARTITIONS.to_string(), "-c", "segment.bytes=110000"]).ok();
    }
    let written = runtime().block_on(async {
        let client = client(&broker).await;
        let mut written = Vec::new();
        for topic in TOPICS {
            written.push(produce(&client, topic, PARTITIONS, BATCHES, PER_BATCH).await);
        }
        client.close().await;
        written
    });
    match cleanly {
        true => broker.stop(),
        false => {
            let points = broker.data().join("recovery-point-offset-checkpoint");
            let end = format!(" {}", BATCHES * PER_BATCH);
            let is_known = |line: &&str| TOPICS.iter().any(|topic| line.starts_with(topic)) && line.ends_with(&end);
            eventually("every recovery point is at the end", || {
                let text = fs::read_to_string(&points).ok()?;
                (text.lines().filter(is_known).count() == TOPICS.len() * PARTITIONS as usize).then_some(())
            });
            broker.kill();
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy(&broker.data(), &folder.path().join("data"));
    Left { folder, written }
}

/// The `.log` of a segment.
fn log(data: &Path, (topic, partition): (usize, usize), number: usize) -> PathBuf {
    let folder = data.join(format!("{}-{partition}", TOPICS[topic]));
    let mut logs = files(&folder);
    logs.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
    assert_eq!(logs.len(), SEGMENTS, "{logs:?}");
    logs.swap_remove(number)
}

fn exchange(one: &Path, other: &Path) {
    let aside = one.with_extension("aside");
    for (from, to) in [(one, aside.as_path()), (other, one), (aside.as_path(), other)] {
        if from.exists() {
            fs::rename(from, to).expect("renamed");
        }
    }
}

fn every_exchange(cleanly: bool) {
    let left = left_behind(cleanly);
    // What a crash leaves of the segment that was written last has no checksums yet, and nothing else in it says whose it is: batches know their
    // offsets and their producer, both alike here.
    let known = if cleanly { SEGMENTS } else { SEGMENTS - 1 };
    for (number, companions) in (0..known).flat_map(|number| COMPANIONS.map(|companions| (number, companions))) {
        let folder = copied(&left.folder.path().join("data"));
        let data = folder.path().join("data");
        let names: Vec<_> = PAIRS
            .iter()
            .flat_map(|pair| {
                let [one, other] = pair.map(|partition| log(&data, partition, number));
                for extension in companions.iter().chain(&["log"]) {
                    exchange(&one.with_extension(extension), &other.with_extension(extension));
                }
                pair.iter().copied().zip([one, other])
            })
            .collect();
        let mut broker = Broker::start_in(folder, &[]);
        runtime().block_on(async {
            let client = client(&broker).await;
            for (topic, partition) in
                (0..TOPICS.len()).flat_map(|topic| (0..PARTITIONS as usize).map(move |n| (topic, n)))
            {
                let read = read(&client, TOPICS[topic], partition as u32).await;
                let what = format!("segment {number} with {companions:?}, {}-{partition}", TOPICS[topic]);
                let written = &left.written[topic][partition];
                assert!(written.starts_with(&read.values), "{what}: something else is served");
                match (names.iter().find(|(of, _)| *of == (topic, partition)), read.error) {
                    (None, error) => {
                        assert!(error.is_none() && read.values.len() == written.len(), "{what}: {error:?}")
                    }
                    (Some((_, log)), Some(error)) => {
                        // The one behind it may begin too early, where the other partition's segments are longer.
                        let folder = format!("{}-{partition}/", TOPICS[topic]);
                        let other = error.contains(&folder) && error.contains("where the segment before it ends");
                        assert!(other || error.contains(&(folder + &name_of(log))), "{what}: {error}");
                    }
                    (Some(_), None) => panic!("{what}: nobody noticed"),
                }
            }
            client.close().await;
        });
        let log = broker.log();
        assert!(!log.contains("panicked"), "{log}");
        broker.kill();
    }
}

#[test]
fn segments_exchanged_after_a_clean_end_are_named_and_never_served() {
    every_exchange(true);
}

#[test]
fn segments_exchanged_after_a_crash_are_named_and_never_served() {
    every_exchange(false);
}
