//! As many partitions as one broker has to hold, on few open files and maps and on little memory. Alone in its process, whose limit on
//! open files it sets, and whose memory it looks at, in Linux's /proc: the other test only computes.
#![cfg(target_os = "linux")]

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_broker::Broker;
use headwater_proto::wire::{self, Durability};
use headwater_storage::checkpoint;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TOPICS: usize = 10;
const PARTITIONS: u32 = 1000;
/// Of each topic's partitions, one of so many is written to.
const WRITTEN_EACH: usize = 100;

const OPEN_FILES: u64 = 1024;
/// Of these a broker gives a quarter to segments, each of which has one file and one map.
const OPEN_SEGMENTS: usize = OPEN_FILES as usize / 4;
/// Files and maps of everything else.
const OTHERS: usize = 100;
/// An idle partition: 12 to 15 KB were measured, without optimisation.
const PARTITION_BYTES: usize = 24 << 10;

/// What the process has of the operating system.
struct Usage {
    files: usize,
    maps: usize,
    bytes: usize,
}

fn usage() -> Usage {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next());
    Usage {
        files: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        maps: std::fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
        bytes: kilobytes.unwrap().parse::<usize>().unwrap() << 10,
    }
}

/// What this thread has worked so far, in microseconds: who else uses the machine does not count.
fn thread_us() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unwrap()
}

/// How long the others on this thread, the broker among them, have it before it is this task's turn again: the longest, in microseconds.
struct Turns {
    longest: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Turns {
    fn watch() -> Turns {
        let longest = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&longest);
        let task = tokio::spawn(async move {
            loop {
                let before = thread_us();
                tokio::task::yield_now().await;
                seen.fetch_max(thread_us() - before, Ordering::Relaxed);
            }
        });
        Turns { longest, task }
    }

    fn longest(self) -> u64 {
        self.task.abort();
        self.longest.load(Ordering::Relaxed)
    }
}

fn partitions() -> impl Iterator<Item = u32> {
    (0..PARTITIONS).step_by(WRITTEN_EACH)
}

async fn write(client: &Client, topic: &Bytes, partition: u32) -> i64 {
    let (mut produce, opened) = client.produce(open_produce(topic, partition)).await;
    assert_eq!(opened.error, None);
    let value = format!("of partition {partition}");
    produce.request_as(wire::ProduceRequest { request_id: 1, partition }, &batch(&[value.as_bytes()])).await;
    let answer = produce.answer().await;
    assert_eq!((answer.error.clone(), answer.durability()), (None, Durability::Flushed));
    answer.batches[0].base_offset
}

async fn check_all(broker: &Broker, topics: &[Bytes], records: i64) {
    let all = (TOPICS * PARTITIONS as usize) as f64;
    // And those of the offsets topic.
    assert!(sample(broker, "headwater_partitions").await > all);
    assert_eq!(sample(broker, "headwater_partitions_fenced").await, 0.0);
    let client = Client::connect(broker).await;
    for topic in topics {
        for partition in partitions() {
            let (mut fetch, opened) = client.fetch(open_fetch(topic, partition, 0)).await;
            assert_eq!((opened.error, opened.high_watermark), (None, records));
            for (_, value) in fetch.read_to(records).await {
                assert_eq!(value, format!("of partition {partition}"));
            }
        }
        let (_, opened) = client.fetch(open_fetch(topic, 1, 0)).await;
        assert_eq!((opened.error, opened.high_watermark), (None, 0));
    }
}

/// Starts a broker though the one that crashed may not have let go of the folder yet.
async fn start_again(dir: &Path) -> Broker {
    within("another start", Broker::start(config(dir))).await.expect("a broker")
}

/// Not the disk is tried here: a hundred thousand small files are its matter, and to remove them may take minutes.
fn folder() -> tempfile::TempDir {
    const MEMORY: &str = "/dev/shm";
    let lacking = match rustix::fs::statvfs(MEMORY) {
        Ok(memory) => lacks(memory.f_bavail * memory.f_frsize, memory.f_files, memory.f_favail),
        Err(error) => Some(error.to_string()),
    };
    let Some(lacking) = lacking else { return tempfile::tempdir_in(MEMORY).unwrap() };
    let dir = tempfile::tempdir().unwrap();
    // Past what captures the output of tests that pass: whoever waits for minutes should know why.
    let notice =
        format!("\n** {MEMORY} DOES NOT DO ({lacking}): ON DISK, IN {}, THIS TAKES LONGER **\n", dir.path().display());
    std::io::stderr().write_all(notice.as_bytes()).unwrap();
    dir
}

/// What a file system has too little of. One that counts no files has none to run out of.
fn lacks(free_bytes: u64, files: u64, free_files: u64) -> Option<String> {
    const NEEDED_BYTES: u64 = 512 << 20;
    // A folder and its files.
    const NEEDED_FILES: u64 = 12 * TOPICS as u64 * PARTITIONS as u64;
    if free_bytes < NEEDED_BYTES {
        Some(format!("{free_bytes} bytes are free, and it takes {NEEDED_BYTES}"))
    } else if files > 0 && free_files < NEEDED_FILES {
        Some(format!("{free_files} files may be made, and it takes {NEEDED_FILES}"))
    } else {
        None
    }
}

#[test]
fn memory_that_has_room_for_bytes_and_not_for_files_does_not_do() {
    assert_eq!(lacks(1 << 30, 1 << 20, 1 << 20), None);
    assert_eq!(lacks(1 << 30, 0, 0), None, "files are not counted");
    assert!(lacks(1 << 20, 1 << 20, 1 << 20).is_some_and(|lacking| lacking.contains("1048576 bytes are free")));
    assert!(lacks(1 << 30, 1 << 20, 1000).is_some_and(|lacking| lacking.contains("1000 files may be made")));
}

#[tokio::test]
async fn ten_thousand_partitions_fit() {
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) }).unwrap();
    let dir = folder();
    let broker = start_with(dir.path(), &["log.flush.offset.checkpoint.interval.ms=100"]).await;
    let before = usage();
    let bounded = |what: &str, brokers: usize| {
        let now = usage();
        let partitions = brokers * TOPICS * PARTITIONS as usize;
        assert!(now.files <= OPEN_SEGMENTS + OTHERS, "{what}: {} open files", now.files);
        assert!(now.maps <= before.maps + OPEN_SEGMENTS + OTHERS, "{what}: {} maps", now.maps);
        let each = now.bytes.saturating_sub(before.bytes) / partitions;
        assert!(each <= PARTITION_BYTES, "{what}: {each} bytes for each partition");
    };

    let client = Client::connect(&broker).await;
    let mut topics = Vec::new();
    for number in 0..TOPICS {
        topics.push(client.create_topic(&format!("t{number}"), PARTITIONS, &[]).await);
    }
    bounded("made", 1);

    // What goes over all partitions takes turns with those who are served on the same thread.
    let (began, turns) = (thread_us(), Turns::watch());
    get(broker.admin_addr(), "/metrics").await;
    let scrape = thread_us() - began;
    let longest = turns.longest();
    assert!(longest < scrape / 3, "{longest} us of a scrape of {scrape} us at once");

    let turns = Turns::watch();
    for topic in &topics {
        for partition in partitions() {
            assert_eq!(write(&client, topic, partition).await, 0);
        }
    }
    let recovery_points = dir.path().join(checkpoint::RECOVERY_POINTS);
    within("the checkpoint", async {
        while !std::fs::read_to_string(&recovery_points).is_ok_and(|text| text.contains("\nt9 900 1\n")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let longest = turns.longest();
    assert!(longest < scrape / 3, "{longest} us for checkpoints, {scrape} for a scrape");
    check_all(&broker, &topics, 1).await;
    bounded("written to", 1);
    drop(client);
    assert!(broker.shutdown().await);

    let broker = start(dir.path()).await;
    check_all(&broker, &topics, 1).await;
    bounded("started again", 1);
    let client = Client::connect(&broker).await;
    for topic in &topics {
        for partition in partitions() {
            assert_eq!(write(&client, topic, partition).await, 1);
        }
    }
    drop(client);
    drop(broker);

    let broker = start_again(dir.path()).await;
    check_all(&broker, &topics, 2).await;
    // What the one before it had is let go of bit by bit, and reused.
    bounded("recovered", 2);
    assert!(broker.shutdown().await);
}
