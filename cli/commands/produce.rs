//! `headwater produce`: lines in, acknowledgements out.
//!
//! Three threads share the work: one reads and cuts the input, one talks to the broker, one takes the acknowledgements
//! in. A record that is itself not fit to be sent is passed over, and told of at the end. The first one that is sent and
//! fails ends the reading, since what comes after it could no longer be in order.
//!
//! Read next: [`crate::lines`], [`crate::fields`], [`crate::acks`].

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use headwater_client::{Admin, Durability, ErrorCode, NewTopic, ProduceError, Producer, ProducerRecord};
use indicatif::ProgressBar;
use serde::Serialize;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

use crate::acks::{Acknowledgements, Tally};
use crate::args::{Global, ProduceArgs};
use crate::connect::with_client;
use crate::fields::{Fields, Parsed};
use crate::lines::Lines;
use crate::output::{Unit, bytes, number, plural, print, print_json, progress};
use crate::signals::Signals;

/// Blocks of lines that may wait to be sent.
const QUEUE_BLOCKS: usize = 4;

/// Lines of one read.
struct Block {
    /// The number of the first, from 1.
    first: u64,
    records: Vec<Parsed>,
    /// Why there are no more, where it is not the end of the input.
    error: Option<anyhow::Error>,
}

/// Runs the command.
pub(crate) fn run(global: &Global, args: ProduceArgs) -> Result<()> {
    let (input, size): (Box<dyn Read + Send>, Option<u64>) = match &args.file {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            let size = file.metadata().map(|metadata| metadata.len()).ok();
            (Box::new(file), size)
        }
        None => (Box::new(std::io::stdin()), None),
    };
    let by_hand = args.file.is_none() && std::io::stdin().is_terminal();
    let bar = if by_hand { ProgressBar::hidden() } else { progress(global, "produce", Unit::Bytes, size) };
    with_client(global, async |client| {
        if args.create {
            create(&client.admin(), &args).await?;
        }
        let mut builder = client
            .producer()
            .acks(args.acks.into())
            .compression(args.compression.into())
            .delivery_timeout(args.delivery_timeout);
        if let Some(bytes) = args.batch {
            builder = builder.batch_bytes(usize::try_from(bytes).context("--batch is too large")?);
        }
        if let Some(linger) = args.linger {
            builder = builder.linger(linger);
        }
        let producer = builder.build().await.context("cannot start to produce")?;
        produce(global, &args, producer, input, by_hand, &bar).await
    })
}

async fn create(admin: &Admin, args: &ProduceArgs) -> Result<()> {
    let mut topic = NewTopic::new(args.topic.as_str());
    if let Some(partitions) = args.partitions {
        topic = topic.partitions(partitions);
    }
    match admin.create_topic(topic).await {
        Err(error) if error.code() != Some(ErrorCode::TopicExists) => {
            Err(error).with_context(|| format!("cannot create topic {}", args.topic))
        }
        _ => Ok(()),
    }
}

async fn produce(
    global: &Global,
    args: &ProduceArgs,
    producer: Producer,
    input: Box<dyn Read + Send>,
    by_hand: bool,
    bar: &ProgressBar,
) -> Result<()> {
    // The first send would say the same, but an unknown topic is worth saying before anything is read.
    let partitions = producer.partitions(&args.topic).await.with_context(|| match args.create {
        true => format!("cannot produce to topic {}", args.topic),
        false => format!("cannot produce to topic {} (--create makes a topic that is not there)", args.topic),
    })?;
    if let Some(wanted) = args.partition
        && wanted >= partitions
    {
        bail!(
            "topic {} has no partition {wanted}; it has {}, counted from 0",
            args.topic,
            plural(partitions, "partition")
        );
    }
    let acknowledgements = Acknowledgements::start(args.ack_log.as_deref())?;
    let mut blocks = read(input, Fields::from(args))?;
    let failure = acknowledgements.failure();
    let mut sending =
        Sending { producer, template: Template::new(args), acknowledgements, records: 0, bytes: 0, unfit: None };
    let began = Instant::now();
    let signals = Signals::catch();
    let stop = loop {
        let step = async {
            let Some(block) = blocks.recv().await else { return Some(Stop::End) };
            if let Err(failure) = sending.send(block.first, block.records).await {
                return Some(Stop::Unsent(failure));
            }
            bar.set_position(sending.bytes);
            // A block is sent without waiting; the connection needs its turn.
            tokio::task::yield_now().await;
            block.error.map(Stop::Input)
        };
        tokio::select! {
            biased;
            // Somebody who types ends the input this way.
            () = signals.asked() => break if by_hand { Stop::End } else { Stop::Asked },
            () = failure.cancelled() => break Stop::Unacknowledged,
            stop = step => if let Some(stop) = stop { break stop },
        }
    };
    drop(blocks);
    let Sending { producer, acknowledgements, records, unfit, .. } = sending;
    // Whoever asks only now does not want to wait for acknowledgements.
    let asked_before = signals.is_asked();
    let waited = tokio::select! {
        () = producer.flush() => true,
        () = signals.asked(), if !asked_before => false,
    };
    match waited {
        true => producer.close().await,
        false => drop(producer),
    }
    let mut tally = acknowledgements.finish().await?;
    let seconds = began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    if let Some((line, error)) = unfit {
        tally.fail(line, error);
    }
    let stop = match stop {
        Stop::Unsent((line, error)) => {
            tally.fail(line, error);
            Stop::Unacknowledged
        }
        stop => stop,
    };
    report(global, &args.topic, &tally, seconds)?;
    outcome(args, tally, records, stop, waited)
}

/// What is to be said of all of it.
fn outcome(args: &ProduceArgs, tally: Tally, records: u64, stop: Stop, waited: bool) -> Result<()> {
    let acknowledged = plural(tally.acknowledged, "record");
    let Some((line, error)) = &tally.first_failure else {
        return match stop {
            Stop::End | Stop::Unsent(_) | Stop::Unacknowledged => Ok(()),
            Stop::Input(error) => {
                Err(error.context(format!("the input cannot be sent on; {acknowledged} before are acknowledged")))
            }
            Stop::Asked => bail!(
                "interrupted: reading stopped after line {records}, and nothing after it was sent; {acknowledged} until \
                 then are acknowledged"
            ),
        };
    };
    let mut text = format!(
        "{}{} of {} records were not acknowledged, from line {line} on: {}",
        if waited { "" } else { "interrupted: " },
        number(records - tally.acknowledged),
        number(records),
        sentence(error)
    );
    match stop {
        Stop::End => {}
        Stop::Input(error) => text += &format!("; then the input could not be sent on: {error:#}"),
        Stop::Asked | Stop::Unsent(_) | Stop::Unacknowledged => {
            text += &format!("; reading stopped after line {records}, and nothing after it was sent");
        }
    }
    if tally.acknowledged > 0 && args.ack_log.is_none() {
        text += ". Later lines may be acknowledged; --ack-log FILE lists which";
    }
    bail!(text)
}

/// A line that was not sent or not acknowledged, and why.
type Failure = (u64, ProduceError);

/// Why there is nothing more to send.
enum Stop {
    /// The input has ended.
    End,
    /// It cannot be read on, or a line is not what it should be.
    Input(anyhow::Error),
    /// A record could not be sent, and so none after it.
    Unsent(Failure),
    /// A record was sent and failed.
    Unacknowledged,
    /// Somebody asked for it.
    Asked,
}

/// Reads the input on a thread of its own.
fn read(input: Box<dyn Read + Send>, fields: Fields) -> Result<mpsc::Receiver<Block>> {
    let (send, receive) = mpsc::channel(QUEUE_BLOCKS);
    let mut input = Lines::new(input);
    let mut first = 1;
    let work = move || {
        loop {
            let mut block = Block { first, records: Vec::new(), error: None };
            match input.next_lines() {
                Ok(lines) if lines.is_empty() => return,
                Ok(lines) => {
                    block.records.reserve(lines.len());
                    for line in lines {
                        match fields.parse(line) {
                            Ok(record) => block.records.push(record),
                            Err(error) => {
                                block.error =
                                    Some(error.context(format!("line {}", first + block.records.len() as u64)));
                                break;
                            }
                        }
                    }
                }
                Err(error) => block.error = Some(error),
            }
            first += block.records.len() as u64;
            let last = block.error.is_some();
            if send.blocking_send(block).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name("input".into()).spawn(work).context("cannot start a thread")?;
    Ok(receive)
}

/// What all records have in common.
struct Template {
    topic: Arc<str>,
    partition: Option<u32>,
    headers: Vec<(Bytes, Bytes)>,
}

impl Template {
    fn new(args: &ProduceArgs) -> Template {
        Template {
            topic: args.topic.as_str().into(),
            partition: args.partition,
            headers: args.header.iter().map(|h| (h.key.clone().into(), h.value.clone().into())).collect(),
        }
    }

    fn fill(&self, parsed: Parsed) -> ProducerRecord {
        let mut record = ProducerRecord::new(self.topic.clone(), parsed.value).key(parsed.key);
        if let Some(partition) = self.partition {
            record = record.partition(partition);
        }
        if let Some(timestamp_ms) = parsed.timestamp_ms {
            record = record.timestamp_ms(timestamp_ms);
        }
        for (key, value) in &self.headers {
            record = record.header(key.clone(), value.clone());
        }
        record
    }
}

/// The way out.
struct Sending {
    producer: Producer,
    template: Template,
    acknowledgements: Acknowledgements,
    /// Records tried so far, and the bytes of their keys and values.
    records: u64,
    bytes: u64,
    /// The first record that was passed over, since nobody would take it.
    unfit: Option<Failure>,
}

impl Sending {
    /// Sends a block's records, as far as anybody would take them.
    async fn send(&mut self, first: u64, records: Vec<Parsed>) -> Result<(), Failure> {
        let mut under_way = Vec::with_capacity(records.len());
        for (parsed, number) in records.into_iter().zip(first..) {
            let size = parsed.key.as_ref().map_or(0, Bytes::len) + parsed.value.as_ref().map_or(0, Bytes::len);
            let record = self.template.fill(parsed);
            let outcome = match self.producer.try_send(record) {
                Ok(delivery) => Ok(delivery),
                Err((record, ProduceError::BufferFull | ProduceError::TopicPending { .. })) => {
                    // What is sent already must not wait for its acknowledgement to be taken in.
                    self.acknowledgements.expect(std::mem::take(&mut under_way));
                    self.producer.send(record).await
                }
                Err((_, error)) => Err(error),
            };
            self.records += 1;
            self.bytes += size as u64;
            match outcome {
                Ok(delivery) => under_way.push(((number, size), delivery)),
                // It is this record's own fault, and was never given a place: those after it stay in order.
                Err(
                    error @ (ProduceError::TooLarge { .. }
                    | ProduceError::LargerThanBuffer { .. }
                    | ProduceError::InvalidRecord { .. }),
                ) => {
                    self.unfit.get_or_insert((number, error));
                }
                Err(error) => {
                    self.acknowledgements.expect(under_way);
                    return Err((number, error));
                }
            }
        }
        self.acknowledgements.expect(under_way);
        Ok(())
    }
}

#[derive(Serialize)]
struct Summary {
    records: u64,
    bytes: u64,
    seconds: f64,
    durability: Option<&'static str>,
    partitions: Vec<PartitionSummary>,
}

#[derive(Serialize)]
struct PartitionSummary {
    partition: u32,
    first_offset: i64,
    last_offset: i64,
}

/// The answer; also after a failure, since what was acknowledged stays.
pub(super) fn report(global: &Global, topic: &str, tally: &Tally, seconds: f64) -> Result<()> {
    let summary = Summary {
        records: tally.acknowledged,
        bytes: tally.bytes,
        seconds,
        durability: tally.durability.map(level),
        partitions: tally
            .partitions
            .iter()
            .map(|(&partition, &(first_offset, last_offset))| PartitionSummary { partition, first_offset, last_offset })
            .collect(),
    };
    if global.json {
        return print_json(&summary);
    }
    if global.quiet {
        return Ok(());
    }
    let mut text =
        format!("{} to {topic}, {} in {seconds:.2} s", plural(summary.records, "record"), bytes(summary.bytes));
    if let Some(durability) = summary.durability {
        text += &format!(", {durability}");
    }
    text.push('\n');
    for p in &summary.partitions {
        text += &format!("  partition {}: offsets {} to {}\n", p.partition, p.first_offset, p.last_offset);
    }
    print(text)
}

/// A durability's name.
fn level(durability: Durability) -> &'static str {
    match durability {
        Durability::None => "none",
        Durability::Written => "written",
        Durability::Replicated => "replicated",
        Durability::Flushed => "flushed",
    }
}

/// An error with what caused it.
fn sentence(error: &ProduceError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text += &format!(": {said}");
        }
        cause = error.source();
    }
    text
}

impl From<&ProduceArgs> for Fields {
    fn from(args: &ProduceArgs) -> Fields {
        Fields {
            key: args.key.clone().map(Bytes::from),
            key_separator: args.key_separator.clone(),
            json_key: args.json_key.clone(),
            timestamp: args.timestamp_field.clone(),
            null_value: args.null_value.clone(),
        }
    }
}
