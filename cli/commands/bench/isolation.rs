//! `headwater bench isolation`: many partitions read over one connection, some of them never read.
//!
//! The readers begin together and stop when the first of them has read its whole partition; their shares are what each
//! read until then. Calls to the broker go on meanwhile, at even distances, from a thread of their own: what they tell is how
//! fast the broker answers, not how busy the readers' thread is.

use anyhow::{Context, Result, anyhow, ensure};
use headwater_client::{
    Client, ClientConfig, Consumer, OffsetAt, OffsetQuery, ProducerRecord, StartFrom, TopicPartition,
};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::data::Values;
use super::load::producer;
use super::{Latencies, Topic, client_config, connect, on_topic};
use crate::args::{BenchArgs, Global};
use crate::connect::{block_on, connect_with};
use crate::output::{Unit, plural, print, print_json, progress};

/// Bytes of each partition when nothing else is said.
const DEFAULT_PARTITION_BYTES: u64 = 8_000_000;
/// Bytes that a reader fetches ahead: small enough that all of them fit the credit of one connection.
const PREFETCH_BYTES: usize = 512 << 10;
/// Distance between two calls.
const CALL_INTERVAL: Duration = Duration::from_millis(5);
/// A timer that is late by less is only as inexact as timers are.
const TIMER_ERROR: Duration = Duration::from_millis(2);
/// Records that go to one partition before the next has its turn.
const RUN: u64 = 250;
/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Serialize)]
struct Isolation {
    mode: &'static str,
    /// As in [`super::Answer`].
    mtu: Option<u16>,
    partitions: u32,
    stalled: u32,
    records: u64,
    bytes: u64,
    seconds: f64,
    reader_mb_per_s: Share,
    call_latency_us: CallLatency,
    calls: u64,
}

#[derive(Serialize)]
struct Share {
    min: f64,
    max: f64,
}

#[derive(Serialize)]
struct CallLatency {
    p50: u64,
    p99: u64,
    max: u64,
}

/// Runs the mode.
pub(super) fn run(global: &Global, args: &BenchArgs) -> Result<()> {
    let found = block_on(on_topic(global, args, async |client, topic| {
        let stalled = args.stalled.unwrap_or(topic.partitions / 8);
        ensure!(
            stalled < topic.partitions,
            "topic {} has {}, and somebody has to read: --stalled must be less than that",
            topic.name,
            plural(topic.partitions, "partition")
        );
        measure(global, args, client, topic, stalled).await
    }))?;
    if global.json {
        return print_json(&found);
    }
    print(format!(
        "isolation: {} on one connection, {} of them never read\neach of the others got {:.2} to {:.2} MB/s in {:.2} s\ncalls meanwhile: p50 {} µs, p99 {} µs, max {} µs\n",
        plural(found.partitions, "partition"),
        found.stalled,
        found.reader_mb_per_s.min,
        found.reader_mb_per_s.max,
        found.seconds,
        found.call_latency_us.p50,
        found.call_latency_us.p99,
        found.call_latency_us.max
    ))
}

async fn measure(global: &Global, args: &BenchArgs, client: &Client, topic: &Topic, stalled: u32) -> Result<Isolation> {
    let per_partition = args
        .records
        .map_or(DEFAULT_PARTITION_BYTES / args.record_size, |records| records / u64::from(topic.partitions))
        .max(1);
    fill(global, args, client, topic, per_partition).await?;
    // The readers get a client of their own: a connection for data that nothing else uses.
    let reading = connect(global, args).await?;
    let mut never_read = Vec::new();
    for partition in 0..stalled {
        never_read.push(open(&reading, topic, partition).await?);
    }
    let first_done = CancellationToken::new();
    let mut readers = Vec::new();
    for partition in stalled..topic.partitions {
        readers.push((open(&reading, topic, partition).await?, first_done.clone()));
    }
    let (connected, ready) = oneshot::channel();
    let calls = {
        let (config, topic, done) = (client_config(global, args)?, topic.name.clone(), first_done.clone());
        std::thread::spawn(move || block_on(call(config, topic, connected, done)))
    };
    // An error is told when the thread is joined.
    let _ = ready.await;
    let began = Instant::now();
    let readers: Vec<_> = readers.into_iter().map(|(reader, done)| tokio::spawn(read(reader, done))).collect();
    let ended = tokio::time::timeout(DEADLINE, first_done.cancelled()).await;
    let seconds = began.elapsed().as_secs_f64();
    first_done.cancel();
    let mut shares = Vec::new();
    for reader in readers {
        shares.push(reader.await.context("a reader failed")??);
    }
    let calls = tokio::task::spawn_blocking(move || calls.join()).await?;
    let (latencies, calls) = calls.map_err(|_| anyhow!("the thread that calls panicked"))??;
    drop(never_read);
    reading.close().await;
    ended.with_context(|| format!("no reader came to its end within {DEADLINE:?}"))?;
    let rates = shares.iter().map(|(_, bytes)| *bytes as f64 / 1e6 / seconds);
    let latency = latencies.summary();
    Ok(Isolation {
        mode: args.mode.name(),
        mtu: super::mtu(global, args)?,
        partitions: topic.partitions,
        stalled,
        records: shares.iter().map(|(records, _)| records).sum(),
        bytes: shares.iter().map(|(_, bytes)| bytes).sum(),
        seconds,
        reader_mb_per_s: Share { min: rates.clone().fold(f64::INFINITY, f64::min), max: rates.fold(0.0, f64::max) },
        call_latency_us: CallLatency { p50: latency.p50, p99: latency.p99, max: latency.max },
        calls,
    })
}

async fn fill(global: &Global, args: &BenchArgs, client: &Client, topic: &Topic, per_partition: u64) -> Result<()> {
    let values = Values::new(args.record_bytes());
    let records = per_partition * u64::from(topic.partitions);
    let bar = progress(global, "bench isolation", Unit::Records, Some(records));
    let producer = producer(client, args).await?;
    let name: Arc<str> = topic.name.as_str().into();
    let mut last = Vec::new();
    for number in 0..records {
        // In runs, so that batches are full however many partitions there are.
        let partition = u32::try_from(number / RUN % u64::from(topic.partitions))?;
        let record = ProducerRecord::new(name.clone(), values.get(number)).partition(partition);
        last.push(producer.send(record).await?);
        if last.len() >= 10_000 {
            tokio::task::yield_now().await;
            for delivery in last.drain(..5_000) {
                delivery.await?;
            }
            bar.inc(5_000);
        }
    }
    for delivery in last {
        delivery.await?;
    }
    producer.close().await;
    bar.finish_and_clear();
    Ok(())
}

async fn open(client: &Client, topic: &Topic, partition: u32) -> Result<Consumer> {
    let mut consumer = client
        .consumer()
        .assign([(topic.name.as_str(), partition)])
        .start(StartFrom::Earliest)
        .prefetch_bytes(PREFETCH_BYTES)
        .auto_commit(None)
        .build()
        .await
        .context("cannot start to consume")?;
    let ends = consumer.end_offsets([TopicPartition::new(topic.name.as_str(), partition)]).await?;
    consumer.until(ends);
    Ok(consumer)
}

/// Reads until its own end, which ends it for all, or until the first of the others came to theirs.
async fn read(mut reader: Consumer, first_done: CancellationToken) -> Result<(u64, u64)> {
    let (mut records, mut bytes) = (0, 0);
    loop {
        let batch = tokio::select! {
            biased;
            () = first_done.cancelled() => break,
            batch = reader.next_batch() => batch,
        };
        let Some(batch) = batch else {
            first_done.cancel();
            break;
        };
        // Records are not taken apart: what is measured is who gets how much, not what a reader does with it.
        let batch = batch?;
        bytes += batch.bytes() as u64;
        records += batch.next_offset().saturating_sub(batch.base_offset()).unsigned_abs();
    }
    reader.close().await?;
    Ok((records, bytes))
}

/// Calls at even distances, each on its own, so that a slow one delays no other.
async fn call(
    config: ClientConfig,
    topic: String,
    connected: oneshot::Sender<()>,
    done: CancellationToken,
) -> Result<(Latencies, u64)> {
    let client = connect_with(config).await?;
    let admin = client.admin();
    // Nobody waits any more if the readers failed.
    let _ = connected.send(());
    let mut calls = JoinSet::new();
    let mut due = tokio::time::interval(CALL_INTERVAL);
    while !done.is_cancelled() {
        let due = due.tick().await.into_std();
        let now = Instant::now();
        let from = if now - due > TIMER_ERROR { due } else { now };
        let query = OffsetQuery { topic: topic.clone(), partition: 0, at: OffsetAt::Latest };
        let admin = admin.clone();
        calls.spawn(async move { admin.list_offsets(vec![query]).await.map(|_| from.elapsed()) });
    }
    let mut latencies = Latencies::new();
    let mut count = 0;
    while let Some(call) = calls.join_next().await {
        latencies.record(call.context("a call failed")?.context("a call failed")?);
        count += 1;
    }
    client.close().await;
    Ok((latencies, count))
}
