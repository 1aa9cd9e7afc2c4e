//! `headwater bench e2e`: from the moment a record is due to the moment a consumer has it.
//!
//! Producer and consumer live in one process, so that one clock times both.

use anyhow::{Context, Result, bail};
use headwater_client::{Client, Consumer, StartFrom};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::data::Values;
use super::load::{Load, producer};
use super::{Answer, Latencies, Topic, broker_cpu, on_topic};
use crate::args::{BenchArgs, Global, Mode};
use crate::commands::confirm_offsets;
use crate::connect::block_on;
use crate::os::cpu_time;
use crate::output::{Unit, progress};

/// Records a second when nothing else is said, and for how many seconds.
const DEFAULT_RATE: u64 = 1_000;
const DEFAULT_SECONDS: u64 = 10;
/// The part of the records that warms both sides up and is not counted: one in so many.
const WARM_UP: u64 = 20;
/// How long nothing may arrive before the run has failed.
const SILENCE: Duration = Duration::from_secs(30);

/// Runs the mode.
pub(super) fn run(global: &Global, args: &BenchArgs) -> Result<Answer> {
    block_on(on_topic(global, args, async |client, topic| {
        let admin = client.admin();
        let cpu = (cpu_time(), broker_cpu(&admin).await?);
        let answer = measure(global, args, client, topic).await?;
        let broker = broker_cpu(&admin).await? - cpu.1;
        Ok(answer.cpu(cpu_time().saturating_sub(cpu.0), Some(broker)))
    }))
}

async fn measure(global: &Global, args: &BenchArgs, client: &Client, topic: &Topic) -> Result<Answer> {
    let rate = args.throughput.unwrap_or(DEFAULT_RATE);
    let records = args.records.unwrap_or_else(|| rate.saturating_mul(DEFAULT_SECONDS));
    let admin = client.admin();
    let mut described = admin.describe_topic(&topic.name).await.context("cannot describe the topic")?;
    confirm_offsets(&admin, &mut described, &[]).await?;
    let mut builder = client
        .consumer()
        .assign((0..topic.partitions).map(|partition| (topic.name.as_str(), partition)))
        .auto_commit(None);
    for partition in &described.partitions {
        builder =
            builder.start_at(topic.name.as_str(), partition.partition, StartFrom::Offset(partition.high_watermark));
    }
    let mut consumer = builder.build().await.context("cannot start to consume")?;
    let producer = producer(client, args).await?;
    let interval = Duration::from_secs_f64(1.0 / rate as f64);
    let bar = progress(global, "bench e2e", Unit::Records, Some(records));
    let load = Load {
        topic: topic.name.as_str().into(),
        values: Values::numbered(args.record_bytes()),
        first: 0,
        step: 1,
        records,
        interval: Some(interval),
        bar: bar.clone(),
    };
    let began = OnceLock::new();
    let expected = Expected { records, interval, began: &began };
    let (sent, received) = tokio::join!(load.run(&producer, &began), receive(&mut consumer, expected));
    bar.finish_and_clear();
    producer.close().await;
    consumer.close().await?;
    let (sent, (latencies, last)) = (sent?, received?);
    Ok(Answer::new(Mode::E2e, records, records * args.record_size, last.unwrap_or(sent.ended) - sent.began)
        .latency("from due to consumed", &latencies))
}

/// What is to arrive.
struct Expected<'a> {
    records: u64,
    /// From one record to the next.
    interval: Duration,
    /// When the first of them was due.
    began: &'a OnceLock<Instant>,
}

/// Takes all of it: how late the records came, and when the last one did.
async fn receive(consumer: &mut Consumer, expected: Expected<'_>) -> Result<(Latencies, Option<Instant>)> {
    let Expected { records, interval, began } = expected;
    let (mut latencies, mut received, mut last) = (Latencies::new(), 0, None);
    while received < records {
        let batch = tokio::time::timeout(SILENCE, consumer.next_batch())
            .await
            .with_context(|| format!("nothing arrived for {SILENCE:?}; {received} of {records} records did"))?
            .context("the consumer ended")??;
        let at = Instant::now();
        for record in batch {
            let value = record?.value.unwrap_or_default();
            let number = value.first_chunk().map(|number| u64::from_be_bytes(*number));
            let (Some(number), Some(began)) = (number.filter(|number| *number < records), began.get()) else {
                bail!("a record that this run did not send; is somebody else producing?");
            };
            if number >= records / WARM_UP {
                latencies.record(at.saturating_duration_since(*began + interval.mul_f64(number as f64)));
            }
            received += 1;
        }
        last = Some(at);
    }
    Ok((latencies, last))
}
