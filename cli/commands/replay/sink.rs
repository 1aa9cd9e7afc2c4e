//! Where a replay goes: to standard output, or into another topic.

use anyhow::{Context, Result, bail};
use futures::future::Either;
use headwater_client::{Client, ConsumedBatch, ConsumedRecord, Producer, ProducerRecord, TopicDescription};
use std::sync::Arc;
use tokio::time::Instant;

use crate::acks::Acknowledgements;
use crate::args::{Global, ReplayArgs};
use crate::commands::produce::report;
use crate::filter::Filter;
use crate::output::{number, plural};
use crate::printer::{Printer, Rules, Work};
use crate::record::Style;
use crate::signals::Signals;

/// Records that are due go to the printer together, but no more than so many, and no more than so many bytes of them.
const DUE_RECORDS: usize = 1_000;
const DUE_BYTES: usize = 256 << 10;

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
    /// Records that are due and not handed over yet, and the bytes of their keys and values.
    due: Vec<ConsumedRecord>,
    due_bytes: usize,
}

/// Another topic.
pub(super) struct Copy {
    target: Arc<str>,
    producer: Producer,
    /// Both topics have as many partitions.
    keep_partition: bool,
    acknowledgements: Acknowledgements,
    records: u64,
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
            let rules = Rules { style, filter: filter.clone(), limit: None, until_ms: None };
            return Ok(Sink::Print(Print::new(Printer::start(rules, None)?)));
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
        }))
    }

    /// Takes a record; `false`: no more.
    pub(super) async fn take(&mut self, record: ConsumedRecord) -> Result<bool> {
        match self {
            Sink::Print(print) => Ok(print.take(record).await),
            Sink::Topic(copy) => copy.take(record).await,
        }
    }

    /// Passes on what is due; `false`: nobody takes any more.
    pub(super) async fn flush(&mut self) -> bool {
        match self {
            Sink::Print(print) => print.flush().await,
            Sink::Topic(_) => true,
        }
    }

    /// Resolves when nobody takes any more: the printing has ended, or an append failed.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + use<> {
        match self {
            Sink::Print(print) => Either::Left(print.printer.ended()),
            Sink::Topic(copy) => Either::Right(copy.acknowledgements.failure().cancelled_owned()),
        }
    }

    /// Ends; unless it is `whole`, without what is still waiting.
    pub(super) async fn finish(self, global: &Global, whole: bool, began: Instant, signals: &Signals) -> Result<()> {
        match self {
            Sink::Print(print) if whole => print.printer.finish(signals.asked()).await.map(|_| ()),
            Sink::Print(print) => print.printer.stop().await.map(|_| ()),
            Sink::Topic(copy) => copy.finish(global, whole, began, signals).await,
        }
    }
}

impl Print {
    fn new(printer: Printer) -> Print {
        Print { printer, due: Vec::new(), due_bytes: 0 }
    }

    async fn take(&mut self, record: ConsumedRecord) -> bool {
        self.due_bytes += size(&record);
        self.due.push(record);
        if self.due.len() < DUE_RECORDS && self.due_bytes < DUE_BYTES { true } else { self.flush().await }
    }

    async fn flush(&mut self) -> bool {
        self.due_bytes = 0;
        match std::mem::take(&mut self.due) {
            due if due.is_empty() => true,
            due => self.printer.print(Work::Records(due)).await,
        }
    }

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
        let bytes = size(&record);
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
        self.acknowledgements.expect(vec![((self.records, bytes), delivery)]);
        Ok(true)
    }

    async fn finish(self, global: &Global, whole: bool, began: Instant, signals: &Signals) -> Result<()> {
        // Whoever asks only now does not want to wait for acknowledgements.
        let asked_before = signals.is_asked();
        let waited = tokio::select! {
            () = self.producer.flush() => true,
            () = signals.asked(), if !asked_before => false,
        };
        match waited {
            true => self.producer.close().await,
            false => drop(self.producer),
        }
        let tally = self.acknowledgements.finish().await?;
        report(global, &self.target, &tally, began.elapsed().as_secs_f64())?;
        let interrupted = if whole && waited { "" } else { "interrupted: " };
        if let Some((_, error)) = tally.first_failure {
            bail!(
                "{interrupted}{} of {} records were not acknowledged by topic {}: {error}",
                number(self.records - tally.acknowledged),
                number(self.records),
                self.target
            );
        }
        if !whole {
            bail!("interrupted: {} copied to topic {}, not all", plural(tally.acknowledged, "record"), self.target);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::Filter;
    use headwater_client::TimestampType;
    use std::io::{Read, Seek};

    fn record(offset: i64, bytes: usize) -> ConsumedRecord {
        ConsumedRecord {
            topic: "t".into(),
            partition: 0,
            offset,
            timestamp_ms: 0,
            timestamp_type: TimestampType::Create,
            key: None,
            value: Some(vec![b'x'; bytes].into()),
            headers: Vec::new(),
            leader_epoch: 0,
        }
    }

    /// A replay that is behind has records due without end, and must not keep them.
    #[tokio::test]
    async fn what_is_due_does_not_pile_up() {
        let mut file = tempfile::tempfile().expect("a file");
        let rules = Rules { style: Style::Value, filter: Filter::default(), limit: None, until_ms: None };
        let printer = Printer::start_on(file.try_clone().expect("a handle"), rules, None).expect("a printer");
        let mut print = Print::new(printer);
        for (count, bytes) in [(10 * DUE_RECORDS, 1), (100, DUE_BYTES / 10)] {
            for offset in 0..count {
                assert!(print.take(record(offset as i64, bytes)).await);
                assert!(print.due.len() < DUE_RECORDS && print.due_bytes < DUE_BYTES, "{} wait", print.due.len());
            }
        }
        assert!(print.flush().await);
        let printed = print.printer.finish(std::future::pending()).await.expect("a count");
        assert_eq!(printed, 10 * DUE_RECORDS as u64 + 100);
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the output can be read");
        assert_eq!(text.lines().count() as u64, printed);
    }
}
