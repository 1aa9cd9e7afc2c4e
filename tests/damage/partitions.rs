//! Damage to the files of a partition.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use rand::rngs::StdRng;
use serde_json::Value;

use crate::harness::{Broker, run};
use crate::{Damage, Read, Values, client, copied, damage, files, name_of, produce, random, read, runtime, seeds};

/// Partitions that are damaged in one round.
const DAMAGED: u32 = 100;
/// Of the topic that stays as it is.
const SOUND: u32 = 3;
const HEADER_BYTES: usize = 61;
/// Where bytes begin that the batch's own checksum covers. Those before are covered by the `.crc`, which places damage to 64 KiB.
const COVERED_FROM: usize = 21;
const MAGIC_AT: usize = 16;
const STEP_BYTES: u64 = 64 << 10;
const CRC_HEADER_BYTES: u64 = 48;

/// What a broker left behind, and what it had acknowledged.
struct Left {
    folder: tempfile::TempDir,
    damaged: Vec<Values>,
    sound: Vec<Values>,
}

impl Left {
    /// Three segments a partition, of six batches of 16 KiB at most.
    fn behind(cleanly: bool) -> Left {
        let mut broker = Broker::start(&["log.flush.offset.checkpoint.interval.ms=50"]);
        for (topic, partitions) in [("damaged", DAMAGED), ("sound", SOUND)] {
            let partitions = partitions.to_string();
            broker.run(&["topic", "create", topic, "-p", &partitions, "-c", "segment.bytes=110000"]).ok();
        }
        let (damaged, sound) = runtime().block_on(async {
            let client = client(&broker).await;
            let damaged = produce(&client, "damaged", DAMAGED, 16, 16).await;
            // Not as long as the others, so that no file of it fits in there.
            let sound = produce(&client, "sound", SOUND, 17, 15).await;
            client.close().await;
            (damaged, sound)
        });
        match cleanly {
            true => broker.stop(),
            false => {
                // What was flushed is known as flushed: what a crash may take is another test's matter.
                let points = broker.data().join("recovery-point-offset-checkpoint");
                let known = |line: &str| line.starts_with("damaged ") && line.ends_with(" 256");
                crate::harness::eventually("every recovery point is at the end", || {
                    let text = fs::read_to_string(&points).ok()?;
                    (text.lines().filter(|line| known(line)).count() == DAMAGED as usize).then_some(())
                });
                broker.kill();
            }
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        crate::copy(&broker.data(), &folder.path().join("data"));
        Left { folder, damaged, sound }
    }

    fn partition(&self, name: &str) -> PathBuf {
        self.folder.path().join("data").join(name)
    }
}

/// One damage to one file of one partition.
struct Case {
    /// The file, by its place among those of its kind: segments have other names in other partitions.
    extension: String,
    number: usize,
    /// The batch that a byte is counted from.
    batch: Option<usize>,
    kind: Damage,
}

/// Every damage, for partitions that look like this one.
fn cases(partition: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    let logs = of_kind(partition, "log");
    assert_eq!(logs.len(), 3, "three segments: {logs:?}");
    // Every byte of five headers: of the first batch of all, of one in the middle, and of three of the segment that was written last.
    for (number, batch) in [(0, 0), (1, 2), (2, 0), (2, 2), (2, usize::MAX)] {
        let bytes = (0..HEADER_BYTES).map(Damage::ByteAt);
        cases.extend(bytes.map(|kind| Case { extension: "log".into(), number, batch: Some(batch), kind }));
    }
    let mut kinds: Vec<String> = files(partition).iter().map(|file| kind_of(file)).collect();
    kinds.sort();
    kinds.dedup();
    assert!(kinds.len() >= 7, "{kinds:?}");
    for extension in kinds {
        let first_bytes = (0..21).step_by(if extension == "log" { 21 } else { 3 });
        for number in 0..of_kind(partition, &extension).len() {
            let kinds = [Damage::Bit, Damage::Truncated, Damage::Emptied, Damage::Swapped];
            let kinds = kinds.into_iter().chain(first_bytes.clone().map(Damage::ByteAt));
            cases.extend(kinds.map(|kind| Case { extension: extension.clone(), number, batch: None, kind }));
        }
    }
    cases
}

/// The extension of a segment's files, and the name of others.
fn kind_of(file: &Path) -> String {
    let extension = file.extension().and_then(|extension| extension.to_str());
    extension.filter(|extension| *extension != "metadata").map_or_else(|| name_of(file), str::to_owned)
}

fn of_kind(partition: &Path, kind: &str) -> Vec<PathBuf> {
    files(partition).into_iter().filter(|file| kind_of(file) == kind).collect()
}

/// Where the batches of a `.log` are.
fn batches(log: &Path) -> Vec<Range<usize>> {
    let bytes = fs::read(log).expect("the log");
    let mut batches: Vec<Range<usize>> = Vec::new();
    loop {
        let at = batches.last().map_or(0, |batch| batch.end);
        match bytes.get(at + 8..at + 12).map(|length| u32::from_be_bytes(length.try_into().expect("four bytes"))) {
            Some(length) if length > 0 => batches.push(at..at + 12 + length as usize),
            _ => return batches,
        }
    }
}

/// A damage that was done, and what must be said of it.
struct Done {
    what: String,
    partition: u32,
    file: String,
    extension: String,
    kind: Damage,
    at: usize,
    /// The batch that it hit.
    batch: Option<Range<usize>>,
    /// The file is one of the segment that was written last, and was not closed.
    open: bool,
}

impl Done {
    fn new(case: &Case, folder: &Path, partition: u32, cleanly: bool, rng: &mut StdRng) -> Option<Done> {
        let dir = folder.join(format!("data/damaged-{partition}"));
        let file = of_kind(&dir, &case.extension).get(case.number)?.clone();
        let other =
            of_kind(&folder.join("data/sound-0"), &case.extension).get(case.number).cloned().unwrap_or_default();
        let batches = if case.extension == "log" { batches(&file) } else { Vec::new() };
        let mut kind = case.kind;
        if let (Some(batch), Damage::ByteAt(byte)) = (case.batch, kind) {
            kind = Damage::ByteAt(batches[batch.min(batches.len() - 1)].start + byte);
        }
        let len = fs::metadata(&file).expect("the file").len();
        if matches!(kind, Damage::ByteAt(at) if at as u64 >= len) {
            return None;
        }
        let at = damage(&file, &other, kind, rng)?;
        let batch = batches.into_iter().find(|batch| batch.contains(&at));
        let name = name_of(&file);
        let last = case.extension != "snapshot" && case.number == 2;
        let what = format!("damaged-{partition}/{name}: {:?}, at byte {at}", kind);
        Some(Done {
            what,
            partition,
            file: name,
            extension: case.extension.clone(),
            kind,
            at,
            batch,
            open: last && !cleanly,
        })
    }

    /// Where in the file the damage may be said to be.
    fn positions(&self) -> Range<u64> {
        let at = self.at as u64;
        match (&self.batch, self.extension.as_str(), self.kind) {
            (Some(batch), _, Damage::Bit | Damage::ByteAt(_)) => {
                let (start, within) = (batch.start as u64, self.at - batch.start);
                // What a crash left is scanned, batch by batch.
                let exact = self.open || within >= COVERED_FROM || within == MAGIC_AT;
                if exact { start..start + 1 } else { start.min(at / STEP_BYTES * STEP_BYTES)..start + STEP_BYTES + 1 }
            }
            (Some(batch), _, Damage::Truncated) => batch.start as u64..at + 1,
            (_, "index", Damage::Bit | Damage::ByteAt(_)) => at.saturating_sub(15)..at + 9,
            (_, "timeindex", Damage::Bit | Damage::ByteAt(_)) => at.saturating_sub(23)..at + 13,
            // By the line, but for the number of lines, and what is behind the last one.
            (_, "leader-epoch-checkpoint", Damage::Bit | Damage::ByteAt(_)) => 0..at + 1,
            (_, "crc", Damage::Bit | Damage::ByteAt(_)) if at < CRC_HEADER_BYTES => 0..CRC_HEADER_BYTES,
            (_, "crc", Damage::Bit | Damage::ByteAt(_)) => at.saturating_sub(11)..at + 1,
            _ => 0..u64::MAX,
        }
    }

    /// Whether a text names the file, and a place in it that may be right.
    fn is_named_in(&self, text: &str) -> bool {
        let file = format!("damaged-{}/{}", self.partition, self.file);
        let positions = text.split("position").skip(1).filter_map(|rest| {
            let digits = rest.trim_start_matches([' ', '=', '"', ':']);
            digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        });
        text.contains(&file) && positions.into_iter().any(|position: u64| self.positions().contains(&position))
    }

    /// `segment verify` names the file and the place, whatever else it says.
    fn check_report(&self, report: &Value) {
        let found = ["faults", "notes"].map(|key| report[key].as_array().cloned().unwrap_or_default()).concat();
        let positions = self.positions();
        let named = found.iter().any(|finding| {
            finding["file"].as_str() == Some(&self.file)
                && finding["position"].as_u64().is_some_and(|position| positions.contains(&position))
        });
        assert!(named, "{}: verify does not name {positions:?}: {found:#?}", self.what);
    }

    /// Nothing but what was written was served, and whatever is missing was named.
    fn check_read(&self, read: &Read, written: &Values, log: &str) {
        let folder = format!("damaged-{}/", self.partition);
        let told: Vec<&str> = log.lines().filter(|line| line.contains(&folder)).collect();
        assert_eq!(read.start, 0, "{}", self.what);
        for (offset, (value, written)) in read.values.iter().zip(written).enumerate() {
            assert!(value == written, "{}: something else is served at offset {offset}", self.what);
        }
        match &read.error {
            Some(error) if self.extension == "log" => {
                assert!(self.is_named_in(error), "{}: {:?} expected in {error}", self.what, self.positions());
            }
            Some(error) => {
                let place = if self.file == "partition.metadata" { "line " } else { "position " };
                assert!(error.contains(&self.file) && error.contains(place), "{}: {error}", self.what);
            }
            None => {
                let unnoticed = format!("{}: nobody noticed; {} records served", self.what, read.values.len());
                assert!(self.extension != "log", "{unnoticed}");
                let cut = matches!(self.kind, Damage::Truncated | Damage::Emptied);
                let epochs = self.file == "leader-epoch-checkpoint";
                // Those of the segment that was being written are not synced: after a crash they may end anywhere, or not be there at all, and
                // nothing on the disk says where they ended.
                let index = ["index", "timeindex", "crc"].contains(&self.extension.as_str()) && cut && !self.open;
                let is_told =
                    told.iter().any(|line| if epochs { line.contains(&self.file) } else { self.is_named_in(line) });
                assert!(!(epochs || index) || is_told, "{unnoticed}: {told:#?}");
                assert_eq!(read.values.len(), written.len(), "{}: records are missing: {told:#?}", self.what);
            }
        }
        let is_told = read.error.is_none() || self.extension == "log" || self.file == "partition.metadata";
        assert!(is_told, "{}: {:?}", self.what, read.error);
    }
}

fn every_damage(cleanly: bool) {
    let left = Left::behind(cleanly);
    for seed in seeds() {
        eprintln!("seed {seed}");
        let mut rng = random(seed);
        let mut cases = cases(&left.partition("damaged-0")).into_iter().peekable();
        let mut all = 0;
        while cases.peek().is_some() {
            let folder = copied(&left.partition(""));
            let mut done: Vec<Done> = Vec::new();
            while let Some(case) = cases.next_if(|_| done.len() < DAMAGED as usize) {
                done.extend(Done::new(&case, folder.path(), done.len() as u32, cleanly, &mut rng));
            }
            all += done.len();
            round(&left, folder, &done);
        }
        assert!(all > 260, "{all} damages");
    }
}

/// Verifies what was damaged, starts a broker on it, and reads it.
fn round(left: &Left, folder: tempfile::TempDir, done: &[Done]) {
    let paths: Vec<String> =
        done.iter().map(|done| format!("{}/data/damaged-{}", folder.path().display(), done.partition)).collect();
    let args: Vec<&str> = ["segment", "verify", "--json"].into_iter().chain(paths.iter().map(String::as_str)).collect();
    let answer = run(&args);
    assert!(answer.status.code() == Some(1) && !answer.stderr.contains("panicked"), "{}", answer.stderr);
    let reports = answer.json();
    assert_eq!(reports.len(), done.len(), "{}", answer.stderr);
    for (done, report) in done.iter().zip(&reports) {
        done.check_report(report);
    }

    let mut broker = Broker::start_in(folder, &[]);
    let (damaged, sound) = runtime().block_on(async {
        let client = &client(&broker).await;
        let read_all = |topic: &'static str, partitions: u32| {
            futures::stream::iter(0..partitions)
                .map(move |partition| read(client, topic, partition))
                .buffered(8)
                .collect()
        };
        let damaged: Vec<Read> = read_all("damaged", DAMAGED).await;
        let sound: Vec<Read> = read_all("sound", SOUND).await;
        client.close().await;
        (damaged, sound)
    });
    let log = broker.log();
    assert!(!log.contains("panicked"), "{log}");
    for done in done {
        let number = done.partition as usize;
        done.check_read(&damaged[number], &left.damaged[number], &log);
    }
    let well = damaged.iter().zip(&left.damaged).skip(done.len()).chain(sound.iter().zip(&left.sound));
    for (read, written) in well {
        assert!(read.error.is_none() && read.values == *written, "a sound partition suffers: {:?}", read.error);
    }
    let fenced =
        damaged.iter().filter(|read| read.error.as_ref().is_some_and(|error| error.contains("fenced"))).count();
    let metrics = crate::get(broker.admin(), "/metrics");
    let gauge = metrics.lines().find_map(|line| line.strip_prefix("headwater_partitions_fenced "));
    assert!(
        gauge.and_then(|value| value.parse().ok()).is_some_and(|value: usize| value >= fenced),
        "{gauge:?} {fenced}"
    );
    broker.kill();
}

#[test]
fn damage_to_a_partition_after_a_clean_end_is_named_and_never_served() {
    every_damage(true);
}

#[test]
fn damage_to_a_partition_after_a_crash_is_named_and_never_served() {
    every_damage(false);
}
