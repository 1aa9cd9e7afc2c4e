//! `headwater bench produce`: each producer on a thread of its own, with connections of its own.

use anyhow::{Context, Result, anyhow};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::Duration;

use super::data::Values;
use super::load::{Load, Sent, producer};
use super::{Answer, Latencies, broker_cpu, connect, on_topic};
use crate::args::{BenchArgs, Global, Mode};
use crate::connect::block_on;
use crate::os::cpu_time;
use crate::output::{Unit, progress};

/// Runs the mode.
pub(super) fn run(global: &Global, args: &BenchArgs) -> Result<Answer> {
    block_on(on_topic(global, args, async |client, topic| {
        let admin = client.admin();
        let cpu_before = (cpu_time(), broker_cpu(&admin).await?);
        let (global, owned, name) = (global.clone(), args.clone(), topic.name.clone());
        let filled = tokio::task::spawn_blocking(move || fill(&global, &owned, &name)).await;
        let (wall, latencies) = filled.context("the producers failed")??;
        let broker = broker_cpu(&admin).await? - cpu_before.1;
        let client_cpu = cpu_time().saturating_sub(cpu_before.0);
        let records = args.record_count();
        Ok(Answer::new(Mode::Produce, records, records * args.record_size, wall)
            .latency("from due to acknowledged", &latencies)
            .cpu(client_cpu, Some(broker)))
    }))
}

/// Produces all records and says how long that took, from the first send to the last acknowledgement.
pub(super) fn fill(global: &Global, args: &BenchArgs, topic: &str) -> Result<(Duration, Latencies)> {
    let producers = u64::from(args.producers).min(args.record_count());
    let values = Values::new(args.record_bytes());
    let bar = progress(global, "bench produce", Unit::Records, Some(args.record_count()));
    let start = Arc::new(Barrier::new(usize::try_from(producers)?));
    let threads: Vec<_> = (0..producers)
        .map(|index| {
            let load = Load {
                topic: topic.into(),
                values: values.clone(),
                first: index,
                step: producers,
                records: args.record_count() / producers + u64::from(index < args.record_count() % producers),
                interval: args.throughput.map(|rate| Duration::from_secs_f64(producers as f64 / rate as f64)),
                bar: bar.clone(),
            };
            let (global, args, start) = (global.clone(), args.clone(), start.clone());
            std::thread::Builder::new()
                .name(format!("producer-{index}"))
                .spawn(move || one(&global, &args, load, &start))
                .context("cannot start a thread")
        })
        .collect::<Result<_>>()?;
    let mut all: Option<Sent> = None;
    for thread in threads {
        let sent = thread.join().map_err(|_| anyhow!("a producer's thread panicked"))??;
        all = Some(match all {
            None => sent,
            Some(all) => all.beside(sent),
        });
    }
    bar.finish_and_clear();
    let all = all.context("no producer ran")?;
    Ok((all.wall(), all.latencies))
}

fn one(global: &Global, args: &BenchArgs, load: Load, start: &Barrier) -> Result<Sent> {
    block_on(async {
        let client = connect(global, args).await;
        let producer = match &client {
            Ok(client) => Some(producer(client, args).await),
            Err(_) => None,
        };
        // All begin together; one that could not connect must not keep the others waiting.
        start.wait();
        let (client, producer) = (client?, producer.context("no connection")??);
        let sent = load.run(&producer, &OnceLock::new()).await;
        producer.close().await;
        client.close().await;
        sent
    })
}
