//! `headwater bench ...`: what this machine and this broker do, in numbers that can be compared.
//!
//! Every mode makes its own topic and data. Throughput is by the wall clock, from the first send to the last
//! acknowledgement; latency counts from the moment a record was due, so that a stall counts for every record that it
//! delayed. Megabytes are 10^6 bytes of record values. Read next: one file for each mode.

mod consume;
mod data;
mod disk;
mod e2e;
mod isolation;
mod load;
mod produce;
mod raw;

use anyhow::{Context, Result, anyhow};
use hdrhistogram::Histogram;
use headwater_client::{Admin, Client, ClientConfig, ErrorCode, NewTopic};
use serde::Serialize;
use std::time::Duration;

use crate::args::{BenchArgs, Durability, Global, Mode};
use crate::connect::connect_with;
use crate::output::{note, number, print, print_json};
use crate::signals::Signals;

/// Runs a mode.
pub(crate) fn run(global: &Global, args: BenchArgs) -> Result<()> {
    if args.serve {
        return raw::serve(&args);
    }
    match args.mode {
        Mode::Produce => answer(global, &produce::run(global, &args)?.packets(mtu(global, &args)?)),
        Mode::Consume => answer(global, &consume::run(global, &args)?.packets(mtu(global, &args)?)),
        Mode::E2e => answer(global, &e2e::run(global, &args)?.packets(mtu(global, &args)?)),
        Mode::Raw => answer(global, &raw::run(&args)?.packets(args.mtu)),
        Mode::Disk => answer(global, &disk::run(global, &args)?),
        Mode::Isolation => isolation::run(global, &args),
    }
}

/// What a mode found out.
#[derive(Debug, Serialize)]
struct Answer {
    mode: &'static str,
    /// Bytes of this side's packets, where they were set; null where they were found out, and where there are none.
    mtu: Option<u16>,
    records: u64,
    bytes: u64,
    seconds: f64,
    mb_per_s: f64,
    records_per_s: f64,
    latency_us: Latency,
    /// What the latency is the latency of.
    latency_of: &'static str,
    client_cpu_s: f64,
    /// CPU time of the broker (raw: of the other process); null where there is none.
    broker_cpu_s: Option<f64>,
}

impl Answer {
    fn new(mode: Mode, records: u64, bytes: u64, wall: Duration) -> Answer {
        let seconds = wall.as_secs_f64().max(1e-9);
        Answer {
            mode: mode.name(),
            mtu: None,
            records,
            bytes,
            seconds,
            mb_per_s: bytes as f64 / 1e6 / seconds,
            records_per_s: records as f64 / seconds,
            latency_us: Latency::default(),
            latency_of: "",
            client_cpu_s: 0.0,
            broker_cpu_s: None,
        }
    }

    fn packets(mut self, mtu: Option<u16>) -> Answer {
        self.mtu = mtu;
        self
    }

    fn latency(mut self, of: &'static str, latencies: &Latencies) -> Answer {
        self.latency_us = latencies.summary();
        self.latency_of = of;
        self
    }

    fn cpu(mut self, client: Duration, broker: Option<f64>) -> Answer {
        self.client_cpu_s = client.as_secs_f64();
        self.broker_cpu_s = broker;
        self
    }
}

fn answer(global: &Global, answer: &Answer) -> Result<()> {
    if global.json {
        return print_json(answer);
    }
    let latency = &answer.latency_us;
    let mut text = format!(
        "{}: {:.1} MB/s, {} records/s ({} records in {:.2} s)\n{}: p50 {} µs, p99 {} µs, p99.9 {} µs, max {} µs\nCPU: client {:.2} s",
        answer.mode,
        answer.mb_per_s,
        number(answer.records_per_s.round() as i64),
        number(answer.records),
        answer.seconds,
        answer.latency_of,
        number(latency.p50),
        number(latency.p99),
        number(latency.p999),
        number(latency.max),
        answer.client_cpu_s
    );
    if let Some(broker) = answer.broker_cpu_s {
        text += &format!(
            ", {} {broker:.2} s",
            if answer.mode == Mode::Raw.name() { "the other process" } else { "broker" }
        );
    }
    text.push('\n');
    print(text)
}

/// Percentiles, in microseconds.
#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Latency {
    p50: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

/// Latencies of many things.
struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> Latencies {
        // Three digits hold for every value that the automatic range grows to.
        let mut histogram =
            Histogram::new_with_bounds(1, 60_000_000, 3).unwrap_or_else(|_| unreachable!("the bounds are constants"));
        histogram.auto(true);
        Latencies(histogram)
    }

    fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }

    fn add(&mut self, other: &Latencies) {
        // Both have the same digits, and this one grows.
        let _ = self.0.add(&other.0);
    }

    fn summary(&self) -> Latency {
        let at = |quantile| self.0.value_at_quantile(quantile);
        Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: self.0.max() }
    }
}

/// Connects with the packets that were asked for.
async fn connect(global: &Global, args: &BenchArgs) -> Result<Client> {
    connect_with(client_config(global, args)?).await
}

fn client_config(global: &Global, args: &BenchArgs) -> Result<ClientConfig> {
    let mut config = crate::connect::client_config(global)?;
    if args.mtu.is_some() {
        config.mtu = args.mtu;
    }
    Ok(config)
}

/// The packets that were asked for, by `--mtu` or by the profile.
fn mtu(global: &Global, args: &BenchArgs) -> Result<Option<u16>> {
    Ok(client_config(global, args)?.mtu)
}

/// The topic of a run.
struct Topic {
    name: String,
    partitions: u32,
    temporary: bool,
}

/// Connects, makes the topic of a run and does `work` on it. The topic is deleted again however that ends, also where
/// somebody asks for the end: then the work is given up where it stands.
async fn on_topic<T>(
    global: &Global,
    args: &BenchArgs,
    work: impl AsyncFnOnce(&Client, &Topic) -> Result<T>,
) -> Result<T> {
    let client = connect(global, args).await?;
    let admin = client.admin();
    let signals = Signals::catch();
    let topic = Topic::make(&admin, args).await?;
    let outcome = signals.unless_asked(work(&client, &topic)).await.unwrap_or_else(|| Err(anyhow!("interrupted")));
    let dropped = topic.drop(&admin).await;
    client.close().await;
    match (outcome, dropped) {
        (Err(error), Err(left)) => {
            note(global, format_args!("{left:#}"));
            Err(error)
        }
        (outcome, dropped) => outcome.and_then(|found| dropped.map(|()| found)),
    }
}

impl Topic {
    /// Makes the topic, or takes the one that is named and there.
    async fn make(admin: &Admin, args: &BenchArgs) -> Result<Topic> {
        let name = match &args.topic {
            Some(name) => name.clone(),
            None => format!("bench-{}-{:08x}", args.mode.name(), rand::random::<u32>()),
        };
        // What a run leaves must not be deleted under it.
        let mut topic = NewTopic::new(&name).partitions(args.partition_count()).config("retention.ms", "-1");
        if let Some(durability) = args.durability {
            topic = topic.config(
                "durability",
                match durability {
                    Durability::Flushed => "flushed",
                    Durability::Replicated => "replicated",
                },
            );
        }
        let partitions = match admin.create_topic(topic).await {
            Ok(created) => created.partitions,
            Err(error) if args.topic.is_some() && error.code() == Some(ErrorCode::TopicExists) => {
                let topic =
                    admin.describe_topic(&name).await.with_context(|| format!("cannot describe topic {name}"))?;
                u32::try_from(topic.partitions.len()).unwrap_or(u32::MAX)
            }
            Err(error) => {
                if args.topic.is_none() && error.code().is_none() {
                    // Nobody answered; it may be there all the same.
                    let _ = admin.delete_topic(&name).await;
                }
                return Err(error).with_context(|| format!("cannot create topic {name}"));
            }
        };
        Ok(Topic { name, partitions, temporary: args.topic.is_none() && !args.keep })
    }

    /// Deletes it again, unless it was named or is to be kept.
    async fn drop(self, admin: &Admin) -> Result<()> {
        if self.temporary {
            admin
                .delete_topic(&self.name)
                .await
                .with_context(|| format!("cannot delete topic {0}; `headwater topic delete {0}` does it", self.name))?;
        }
        Ok(())
    }
}

/// CPU time of the broker so far, in seconds.
async fn broker_cpu(admin: &Admin) -> Result<f64> {
    Ok(admin.describe_broker().await.context("cannot ask the broker for its CPU time")?.cpu_seconds)
}

/// Records when nothing else is said.
const DEFAULT_RECORDS: u64 = 1_000_000;

impl BenchArgs {
    fn record_bytes(&self) -> usize {
        usize::try_from(self.record_size).unwrap_or(usize::MAX)
    }

    fn batch_bytes(&self) -> usize {
        usize::try_from(self.batch).unwrap_or(usize::MAX)
    }

    fn record_count(&self) -> u64 {
        self.records.unwrap_or(DEFAULT_RECORDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_all_parts() {
        let (mut one, mut other) = (Latencies::new(), Latencies::new());
        for n in 1..=500 {
            one.record(Duration::from_micros(n));
            other.record(Duration::from_micros(500 + n));
        }
        one.add(&other);
        let summary = one.summary();
        assert!((499..=501).contains(&summary.p50), "{summary:?}");
        assert!((989..=991).contains(&summary.p99), "{summary:?}");
        assert!((1000..=1001).contains(&summary.max), "{summary:?}");
    }
}
