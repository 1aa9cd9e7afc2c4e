//! Where a replay goes: to standard output, or into another topic.

use anyhow::{Context, Result, bail};
use headwater_client::{Client, ConsumedBatch, ConsumedRecord, Producer, ProducerRecord, TopicDescription};
use std::sync::Arc;
use std::time::Instant;

use crate::acks::Acknowledgements;
use crate::args::{Global, ReplayArgs};
use crate::commands::produce::report;
use crate::filter::Filter;
use crate::output::number;
use crate::printer::{Printer, Rules, Work};
use crate::record::Style;

/// Bytes of a record's key and value.
pub(super) fn size(record: &ConsumedRecord) -> usize {
    record.key.as_ref().map_or(0, |key| key.len()) + record.value.as_ref().map_or(0, |value| value.len())
}

/// Where records go.
pub(super) enum Sink {
    Print(Print),
    Topic(Copy),
}

/// Standard output.
pub(super) struct Print {
    printer: Printer,
    /// Records that are due and not handed over yet.
    due: Vec<ConsumedRecord>,
}

/// Another topic.
pub(super) struct Copy {
    target: Arc<str>,
    producer: Producer,
    /// Both topics have as many partitions.
    keep_partition: bool,
    acknowledgements: Acknowledgements,
    records: u64,
    bytes: u64,
}

impl Sink {
    /// The sink that `--to` names.
    pub(super) async fn open(
        global: &Global,
        client: &Client,
        args: &ReplayArgs,
        topic: &TopicDescription,
        filter: &Filter,
    ) -> Result<Sink> {
        if args.to == "stdout" {
            let style = Style::new(global.json, args.format.clone());
            let printer = Printer::start(Rules { style, filter: filter.clone(), limit: None, until_ms: None })?;
            return Ok(Sink::Print(Print { printer, due: Vec::new() }));
        }
        let producer = client.producer().build().await.context("cannot start to produce")?;
        let partitions = producer
            .partitions(&args.to)
            .await
            .with_context(|| format!("cannot replay into topic {}; `headwater topic create` makes it", args.to))?;
        Ok(Sink::Topic(Copy {
            target: args.to.as_str().into(),
            producer,
            keep_partition: partitions as usize == topic.partitions.len(),
            acknowledgements: Acknowledgements::start(None)?,
            records: 0,
            bytes: 0,
        }))
    }

    /// Takes a record; `false`: no more.
    pub(super) async fn take(&mut self, record: ConsumedRecord) -> Result<bool> {
        match self {
            Sink::Print(print) => print.due.push(record),
            Sink::Topic(copy) => return copy.take(record).await,
        }
        Ok(true)
    }

    /// Passes on what is due; `false`: nobody takes any more.
    pub(super) async fn flush(&mut self) -> bool {
        match self {
            Sink::Print(print) if !print.due.is_empty() => {
                print.printer.print(Work::Records(std::mem::take(&mut print.due))).await
            }
            _ => true,
        }
    }

    /// Ends; unless it is `whole`, without what is still waiting.
    pub(super) async fn finish(self, global: &Global, whole: bool, began: Instant) -> Result<()> {
        match self {
            Sink::Print(print) if whole => print.printer.finish().await.map(|_| ()),
            Sink::Print(print) => print.printer.stop().await.map(|_| ()),
            Sink::Topic(copy) => copy.finish(global, began).await,
        }
    }
}

impl Print {
    /// Passes a batch on as it is; the printer has the filter.
    pub(super) async fn batch(&self, batch: ConsumedBatch) -> bool {
        self.printer.print(Work::Batch(batch)).await
    }
}

impl Copy {
    async fn take(&mut self, record: ConsumedRecord) -> Result<bool> {
        if self.acknowledgements.any_failed() {
            return Ok(false);
        }
        self.records += 1;
        self.bytes += size(&record) as u64;
        let (partition, offset) = (record.partition, record.offset);
        let mut copy =
            ProducerRecord::new(self.target.clone(), record.value).key(record.key).timestamp_ms(record.timestamp_ms);
        if self.keep_partition {
            copy = copy.partition(partition);
        }
        for header in record.headers {
            copy = copy.header(header.key, header.value);
        }
        let delivery = self.producer.send(copy).await.with_context(|| {
            format!("cannot append record {offset} of partition {partition} to topic {}", self.target)
        })?;
        self.acknowledgements.expect(vec![(self.records, delivery)]);
        Ok(true)
    }

    async fn finish(self, global: &Global, began: Instant) -> Result<()> {
        self.producer.flush().await;
        let tally = self.acknowledgements.finish().await?;
        self.producer.close().await;
        report(global, &self.target, &tally, self.bytes, began.elapsed().as_secs_f64())?;
        if let Some((_, error)) = tally.first_failure {
            bail!(
                "{} of {} records were not acknowledged by topic {}: {error}",
                number(self.records - tally.acknowledged),
                number(self.records),
                self.target
            );
        }
        Ok(())
    }
}
