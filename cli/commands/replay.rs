//! `headwater replay`: a stretch of history, once more.
//!
//! A window of time holds exactly the records whose timestamps lie in it, wherever they lie in the log: reading begins
//! at the first offset that can hold one (the time index knows it) and goes on to the end, since a late record may come
//! at any place. Ends are fixed when the replay begins. No group is involved.
//!
//! At full speed partitions are read together and come as they come. At a pace every partition has a reader of its own,
//! and `replay/ordered.rs` puts their records into one row. Read next: [`crate::pace`], then `replay/ordered.rs` and
//! `replay/sink.rs`.

mod ordered;
mod sink;

use anyhow::{Context, Result};
use futures::{Stream, StreamExt};
use headwater_client::{
    Client, ConsumedRecord, Consumer, OffsetAt, OffsetQuery, PartitionDescription, StartFrom, TopicDescription,
    TopicPartition,
};
use indicatif::ProgressBar;
use std::io::IsTerminal;
use std::sync::Arc;
use tokio::time::Instant;

use crate::args::{Global, ReplayArgs};
use crate::commands::consume::explain;
use crate::commands::{ago_ms, check_offset, chosen, confirm_offsets};
use crate::connect::with_client;
use crate::filter::Filter;
use crate::output::{Unit, progress};
use crate::pace::{Pacer, Speed};
use crate::signals::Signals;
use crate::spec::{End, Start};
use ordered::{Step, ordered, wait_for};
use sink::Sink;

/// Bytes that each reader of a paced replay fetches ahead.
const PACED_PREFETCH_BYTES: usize = 256 << 10;

/// Runs the command.
pub(crate) fn run(global: &Global, args: ReplayArgs) -> Result<()> {
    with_client(global, async |client| {
        let admin = client.admin();
        let mut topic =
            admin.describe_topic(&args.topic).await.with_context(|| format!("cannot replay topic {}", args.topic))?;
        chosen(&topic, &args.partition)?;
        confirm_offsets(&admin, &mut topic, &args.partition).await?;
        let stretches = stretches(client, &args, &topic).await?;
        let filter = filter(&args);
        let sink = Sink::open(global, client, &args, &topic, &filter).await?;
        let total = stretches.iter().map(|s| s.end.saturating_sub(s.start).unsigned_abs()).sum();
        // On a terminal the records themselves are progress enough.
        let bar = match &sink {
            Sink::Print(_) if std::io::stdout().is_terminal() => ProgressBar::hidden(),
            _ => progress(global, "replay", Unit::Records, Some(total)),
        };
        let signals = Signals::catch();
        let began = Instant::now();
        let pacer = Pacer::new(args.speed, args.rate);
        let topic = topic.name.as_str().into();
        let ended = sink.ended();
        let mut replay = Replay { client, topic, stretches, filter, pacer, began, sink, bar };
        let outcome = tokio::select! {
            biased;
            () = signals.asked() => Ok(false),
            outcome = replay.run(args.speed) => outcome.map(|()| true),
            () = ended => Ok(true),
        };
        let Replay { sink, bar, .. } = replay;
        bar.finish_and_clear();
        let ended = sink.finish(global, !matches!(outcome, Ok(false)), began, &signals).await;
        outcome?;
        ended
    })
}

/// What is read of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stretch {
    partition: u32,
    start: i64,
    end: i64,
}

/// The stretches that can hold what was asked for; partitions that cannot are left out.
async fn stretches(client: &Client, args: &ReplayArgs, topic: &TopicDescription) -> Result<Vec<Stretch>> {
    let partitions = chosen(topic, &args.partition)?;
    let starts = starts(client, args, topic, &partitions).await?;
    Ok(partitions
        .into_iter()
        .zip(starts)
        .filter_map(|(partition, start)| stretch(partition, start?, args.until))
        .collect())
}

/// What is read of a partition from an offset on, if anything is.
fn stretch(partition: &PartitionDescription, start: i64, until: End) -> Option<Stretch> {
    let end = match until {
        End::Offset(offset) => offset.min(partition.high_watermark),
        End::Now | End::Time(_) | End::Ago(_) => partition.high_watermark,
    };
    (start < end).then_some(Stretch { partition: partition.partition, start, end })
}

async fn starts(
    client: &Client,
    args: &ReplayArgs,
    topic: &TopicDescription,
    partitions: &[&PartitionDescription],
) -> Result<Vec<Option<i64>>> {
    let ms = match args.from {
        Start::Earliest => return Ok(partitions.iter().map(|p| Some(p.log_start_offset)).collect()),
        Start::Latest => return Ok(vec![None; partitions.len()]),
        Start::Offset(offset) => {
            for partition in partitions {
                check_offset(&topic.name, partition, offset)?;
            }
            return Ok(vec![Some(offset); partitions.len()]);
        }
        Start::Time(ms) => ms,
        Start::Ago(ago) => ago_ms(ago),
    };
    let queries = partitions.iter().map(|partition| OffsetQuery {
        topic: topic.name.clone(),
        partition: partition.partition,
        at: OffsetAt::Timestamp(ms),
    });
    let answers = client.admin().list_offsets(queries.collect()).await.context("cannot look offsets up by time")?;
    answers.into_iter().map(|answer| Ok(answer.context("cannot look an offset up by time")?.offset)).collect()
}

fn filter(args: &ReplayArgs) -> Filter {
    Filter {
        from_ms: match args.from {
            Start::Time(ms) => Some(ms),
            Start::Ago(ago) => Some(ago_ms(ago)),
            Start::Earliest | Start::Latest | Start::Offset(_) => None,
        },
        until_ms: match args.until {
            End::Time(ms) => Some(ms),
            End::Ago(ago) => Some(ago_ms(ago)),
            End::Now | End::Offset(_) => None,
        },
        conditions: args.conditions.clone(),
    }
}

/// The records of a reader that were asked for.
fn kept(
    reader: impl Stream<Item = Result<ConsumedRecord>>,
    filter: &Filter,
    bar: &ProgressBar,
) -> impl Stream<Item = Result<ConsumedRecord>> {
    reader.filter_map(async move |record| match record {
        Ok(record) => {
            bar.inc(1);
            filter.keeps(&record).then_some(Ok(record))
        }
        Err(error) => Some(Err(error)),
    })
}

/// A replay under way.
struct Replay<'a> {
    client: &'a Client,
    topic: Arc<str>,
    stretches: Vec<Stretch>,
    filter: Filter,
    pacer: Pacer,
    began: Instant,
    sink: Sink,
    bar: ProgressBar,
}

impl Replay<'_> {
    async fn run(&mut self, speed: Speed) -> Result<()> {
        if self.stretches.is_empty() {
            return Ok(());
        }
        match speed {
            Speed::Max => self.run_unordered().await,
            Speed::Times(_) => self.run_ordered().await,
        }
    }

    /// A consumer of some stretches that ends where they end.
    async fn consumer(&self, stretches: &[Stretch], prefetch_bytes: Option<usize>) -> Result<Consumer> {
        let mut builder = self
            .client
            .consumer()
            .assign(stretches.iter().map(|stretch| (self.topic.clone(), stretch.partition)))
            .background(true)
            .auto_commit(None);
        for stretch in stretches {
            builder = builder.start_at(self.topic.clone(), stretch.partition, StartFrom::Offset(stretch.start));
        }
        if let Some(bytes) = prefetch_bytes {
            builder = builder.prefetch_bytes(bytes);
        }
        let mut consumer = builder.build().await.context("cannot start to read")?;
        consumer.until(stretches.iter().map(|s| (TopicPartition::new(self.topic.clone(), s.partition), s.end)));
        Ok(consumer)
    }

    async fn run_unordered(&mut self) -> Result<()> {
        let mut consumer = self.consumer(&self.stretches, None).await?;
        while let Some(batch) = consumer.next_batch().await {
            let batch = batch.map_err(explain)?;
            self.bar.inc(batch.next_offset().saturating_sub(batch.base_offset()).unsigned_abs());
            if self.pacer.is_idle()
                && let Sink::Print(print) = &self.sink
            {
                if !print.batch(batch).await {
                    break;
                }
                continue;
            }
            for record in batch {
                let record = record.map_err(explain)?;
                if self.filter.keeps(&record) && !self.emit(record).await? {
                    return Ok(());
                }
            }
            if !self.sink.flush().await {
                break;
            }
        }
        consumer.close().await.context("cannot stop reading")
    }

    async fn run_ordered(&mut self) -> Result<()> {
        let mut readers = Vec::new();
        for stretch in &self.stretches {
            let reader = self.consumer(std::slice::from_ref(stretch), Some(PACED_PREFETCH_BYTES)).await?;
            readers.push(Box::pin(kept(reader.map(|record| record.map_err(explain)), &self.filter, &self.bar)));
        }
        let sink = &mut self.sink;
        let pass_on = async |step| match step {
            Step::Due(record) => sink.take(record).await,
            Step::Pause => Ok(sink.flush().await),
        };
        ordered(readers, &mut self.pacer, self.began, pass_on).await
    }

    /// Waits until a record is due and passes it on; `false`: nobody takes any more.
    async fn emit(&mut self, record: ConsumedRecord) -> Result<bool> {
        let due = self.pacer.due(self.began.elapsed(), record.timestamp_ms, sink::size(&record));
        if due > self.began.elapsed() {
            if !self.sink.flush().await {
                return Ok(false);
            }
            wait_for(self.began, due).await;
        }
        self.sink.take(record).await
    }
}
