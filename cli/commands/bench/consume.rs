//! `headwater bench consume`: one consumer over records that were produced just before, and so are in memory.

use anyhow::{Context, Result, ensure};
use headwater_client::{StartFrom, TopicPartition};
use std::time::Instant;

use super::{Answer, Latencies, Topic, broker_cpu, connect, on_topic, produce};
use crate::args::{BenchArgs, Global, Mode};
use crate::connect::block_on;
use crate::os::cpu_time;
use crate::output::{Unit, note, progress};

/// Runs the mode.
pub(super) fn run(global: &Global, args: &BenchArgs) -> Result<Answer> {
    block_on(on_topic(global, args, async |_, topic| measure(global, args, topic).await))
}

async fn measure(global: &Global, args: &BenchArgs, topic: &Topic) -> Result<Answer> {
    let (owned_global, owned, name) = (global.clone(), args.clone(), topic.name.clone());
    let (wall, _) = tokio::task::spawn_blocking(move || produce::fill(&owned_global, &owned, &name))
        .await
        .context("the producers failed")??;
    note(global, format_args!("produced in {:.1} s; now they are read", wall.as_secs_f64()));

    let client = connect(global, args).await?;
    let admin = client.admin();
    let (records, bytes) = (args.record_count(), args.record_count() * args.record_size);
    let bar = progress(global, "bench consume", Unit::Records, Some(records));
    let (cpu, broker) = (cpu_time(), broker_cpu(&admin).await?);
    let mut latencies = Latencies::new();
    let began = Instant::now();
    let mut consumer = client
        .consumer()
        .assign((0..topic.partitions).map(|partition| (topic.name.as_str(), partition)))
        .start(StartFrom::Earliest)
        .auto_commit(None)
        .build()
        .await
        .context("cannot start to consume")?;
    let ends = consumer
        .end_offsets((0..topic.partitions).map(|partition| TopicPartition::new(topic.name.as_str(), partition)))
        .await?;
    consumer.until(ends);
    let (mut seen, mut seen_bytes) = (0u64, 0u64);
    loop {
        let asked = Instant::now();
        let Some(batch) = consumer.next_batch().await else { break };
        latencies.record(asked.elapsed());
        let before = seen;
        for record in batch? {
            seen_bytes += record?.value.map_or(0, |value| value.len() as u64);
            seen += 1;
        }
        bar.inc(seen - before);
    }
    let wall = began.elapsed();
    bar.finish_and_clear();
    consumer.close().await?;
    let broker = broker_cpu(&admin).await? - broker;
    let client_cpu = cpu_time().saturating_sub(cpu);
    client.close().await;
    // A topic that was there before may hold more.
    ensure!(seen >= records && seen_bytes >= bytes, "{records} records were produced and {seen} consumed");
    Ok(Answer::new(Mode::Consume, seen, seen_bytes, wall)
        .latency("waiting for the next batch", &latencies)
        .cpu(client_cpu, Some(broker)))
}
