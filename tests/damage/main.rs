//! Damage of every kind to every file of a data folder: it is named with its file and its place, nothing damaged is ever served, no other
//! partition suffers, and nothing panics.
//!
//! A broker writes a topic of many partitions and ends, well or by SIGKILL. Each round copies what it left, does another damage to each
//! of the partitions, looks at all of them with `headwater segment verify`, starts one broker on the folder and reads everything back.
//! Files at the root of the folder concern every partition: each damage to one of them has a broker of its own.
//!
//! `DAMAGE_SEED` sets the first seed, `DAMAGE_SEEDS` how many are tried; a failure names its seed. Every byte of a header is
//! damaged with each; seeds decide on the bits, and on the places elsewhere.

#[path = "../harness/mod.rs"]
mod harness;
mod partitions;
mod root;
mod swapped;

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use harness::Broker;
use headwater_client::{Client, ClientConfig, OffsetAt, OffsetQuery, ProducerRecord, StartFrom, TopicPartition};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    /// A bit of this byte.
    ByteAt(usize),
    /// A bit anywhere.
    Bit,
    /// Something is left, but not all.
    Truncated,
    /// Nothing is left.
    Emptied,
    /// The same file of another partition stands in its place, or another file of the same kind.
    Swapped,
}

/// Damages a file, of which `other` may take the place; where it was damaged. `None` if this damage changes nothing.
fn damage(file: &Path, other: &Path, kind: Damage, rng: &mut StdRng) -> Option<usize> {
    let before = fs::read(file).expect("the file");
    let mut after = before.clone();
    // Space that is reserved and not yet written holds nothing that could be damaged.
    let written = before.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let mut at = 0;
    match kind {
        Damage::ByteAt(_) | Damage::Bit if written == 0 => return None,
        Damage::ByteAt(_) | Damage::Bit => {
            at = if let Damage::ByteAt(at) = kind { at } else { rng.random_range(0..written) };
            after[at] ^= 1 << rng.random_range(0..8);
        }
        Damage::Truncated if written < 2 => return None,
        Damage::Truncated => {
            at = rng.random_range(1..written);
            after.truncate(at);
        }
        Damage::Emptied => after.clear(),
        Damage::Swapped => after = fs::read(other).ok()?,
    }
    (after != before).then(|| {
        fs::write(file, &after).expect("written");
        at
    })
}

fn seeds() -> impl Iterator<Item = u64> {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = setting("DAMAGE_SEED").unwrap_or(1);
    first..first + setting("DAMAGE_SEEDS").unwrap_or(2)
}

fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

async fn client(broker: &Broker) -> Client {
    Client::connect(ClientConfig::from_profile(broker.profile()).expect("the profile")).await.expect("connected")
}

/// What a partition held: the value of each record, by offset.
type Values = Vec<Vec<u8>>;

/// Batches of records to each of some partitions: of the `n`-th partition, each record has `1,000 + 13 * (n % 7)` bytes.
async fn produce(client: &Client, topic: &str, partitions: u32, batches: u32, per_batch: u32) -> Vec<Values> {
    let producer = client.producer().batch_bytes(1 << 20).build().await.expect("a producer");
    let mut written = vec![Values::new(); partitions as usize];
    for batch in 0..batches {
        let mut waiting = Vec::new();
        for partition in 0..partitions {
            for n in 0..per_batch {
                let mut value = format!("{topic}-{partition} {batch} {n} ").into_bytes();
                value.resize(1_000 + 13 * (partition as usize % 7), b'a' + (n % 26) as u8);
                let timestamp_ms = 1_700_000_000_000 + i64::from(batch * 1_000 + partition * 100 + n);
                let record = ProducerRecord::new(topic, bytes::Bytes::from(value.clone()))
                    .partition(partition)
                    .timestamp_ms(timestamp_ms);
                waiting.push(producer.send(record).await.expect("taken"));
                written[partition as usize].push(value);
            }
        }
        producer.flush().await;
        for delivery in waiting {
            delivery.await.expect("acknowledged");
        }
    }
    producer.close().await;
    written
}

/// What a client was given of a partition, from its log start on, and the error that it got in place of the rest.
struct Read {
    start: i64,
    values: Values,
    error: Option<String>,
}

/// Reads a partition up to its end.
async fn read(client: &Client, topic: &str, partition: u32) -> Read {
    let deadline = harness::DEADLINE;
    let reading = read_to_its_end(client, topic, partition);
    tokio::time::timeout(deadline, reading)
        .await
        .unwrap_or_else(|_| panic!("{topic}-{partition}: not within {deadline:?}"))
}

async fn read_to_its_end(client: &Client, topic: &str, partition: u32) -> Read {
    let mut read = Read { start: 0, values: Vec::new(), error: None };
    let query = OffsetQuery { topic: topic.into(), partition, at: OffsetAt::Latest };
    let answer = client.admin().list_offsets(vec![query]).await.expect("an answer").remove(0);
    let (start, end) = match answer {
        Ok(answer) => (answer.log_start_offset, answer.high_watermark),
        Err(refusal) => {
            read.error = Some(refusal.to_string());
            return read;
        }
    };
    read.start = start;
    let consumer = client.consumer().assign([(topic, partition)]).start(StartFrom::Earliest).build().await;
    let mut consumer = match consumer {
        Ok(consumer) => consumer,
        Err(error) => {
            read.error = Some(error.to_string());
            return read;
        }
    };
    consumer.until([(TopicPartition::new(topic, partition), end)]);
    while let Some(batch) = consumer.next_batch().await {
        match batch {
            Ok(batch) => {
                for record in batch {
                    let record = record.expect("it is checked");
                    assert_eq!(record.offset, start + read.values.len() as i64, "{topic}-{partition}");
                    read.values.push(record.value.expect("a value").to_vec());
                }
            }
            Err(error) => {
                read.error = Some(error.to_string());
                break;
            }
        }
    }
    read
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

/// A copy of a data folder, for a broker to start on.
fn copied(from: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy(from, &folder.path().join("data"));
    folder
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

fn name_of(path: &Path) -> String {
    path.file_name().and_then(|name| name.to_str()).expect("a plain name").to_owned()
}

/// What the admin port answers.
fn get(address: &str, path: &str) -> String {
    let mut connection = std::net::TcpStream::connect(address).expect("the admin port answers");
    write!(connection, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn a_partition_that_is_being_written_is_not_called_damaged() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    for size in [1, 60_000, 150_000] {
        broker.run_with(&["produce", "t"], "x".repeat(size) + "\n").ok();
        harness::run(&["segment", "verify", broker.partition("t-0").to_str().expect("plain")]).ok();
    }
}
