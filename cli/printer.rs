//! Records on their way to standard output.
//!
//! Owns: the thread that renders and writes, so that a reader who stops reading stops this command and not its
//! heartbeats; what was really printed, partition by partition, which is what a group may commit; `--count`. Output is
//! written in large pieces, and at once when nothing more is waiting. Refuses: fetching. Read next: `commands/consume.rs`.
//!
//! Invariant: a position is published only after everything below it was written.

use anyhow::{Context, Result, anyhow};
use headwater_client::{ConsumeError, ConsumedBatch, ConsumedRecord, TopicPartition};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, watch};

use crate::filter::Filter;
use crate::output::{stdout, stdout_error};
use crate::record::Style;

/// Bytes of output that are written together while more is waiting.
const WRITE_BYTES: usize = 256 << 10;
/// Batches that may wait to be printed; beyond them the fetching waits.
const QUEUE_BATCHES: usize = 16;
/// How long an end waits for a reader who does not read.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What is printed, and how much of it.
pub(crate) struct Rules {
    pub(crate) style: Style,
    pub(crate) filter: Filter,
    /// The end comes after so many records.
    pub(crate) limit: Option<u64>,
    /// A partition ends before its first record of this time or a later one.
    pub(crate) until_ms: Option<i64>,
}

/// Something to print.
pub(crate) enum Work {
    /// A batch as it was fetched.
    Batch(ConsumedBatch),
    /// Records chosen one by one.
    Records(Vec<ConsumedRecord>),
}

/// The printing thread's handle.
pub(crate) struct Printer {
    queue: mpsc::Sender<Work>,
    progress: Progress,
    thread: JoinHandle<Result<u64>>,
}

/// How far the printing is; cheap to clone.
#[derive(Clone)]
pub(crate) struct Progress {
    shared: Arc<Shared>,
    /// Pieces of work that are printed; closed when the thread ends.
    printed: watch::Receiver<u64>,
}

#[derive(Default)]
struct Shared {
    /// The offset after the last one printed.
    positions: Mutex<BTreeMap<TopicPartition, i64>>,
    /// Pieces of work handed over.
    handed: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn positions(&self) -> MutexGuard<'_, BTreeMap<TopicPartition, i64>> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Printer {
    /// Starts to print on standard output.
    pub(crate) fn start(rules: Rules) -> Result<Printer> {
        Printer::start_on(stdout()?, rules)
    }

    fn start_on(out: File, rules: Rules) -> Result<Printer> {
        let (queue, work) = mpsc::channel(QUEUE_BATCHES);
        let (report, printed) = watch::channel(0);
        let shared = Arc::new(Shared::default());
        let writer = Writer {
            out,
            buffer: Vec::with_capacity(2 * WRITE_BYTES),
            rules,
            records: 0,
            ended: HashSet::new(),
            pending: BTreeMap::new(),
            done: 0,
            shared: shared.clone(),
            report,
        };
        let thread = std::thread::Builder::new()
            .name("printer".into())
            .spawn(move || writer.run(work))
            .context("cannot start a thread")?;
        Ok(Printer { queue, progress: Progress { shared, printed }, thread })
    }

    /// Hands work over; waits while too much is waiting. `false`: the printing has ended, and [`Printer::finish`] says why.
    pub(crate) async fn print(&self, work: Work) -> bool {
        self.progress.shared.handed.fetch_add(1, Ordering::Relaxed);
        self.queue.send(work).await.is_ok()
    }

    /// How far the printing is.
    pub(crate) fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Resolves when the printing ended by itself: the limit is reached, or standard output is closed.
    pub(crate) async fn ended(&self) {
        self.queue.closed().await;
    }

    /// Prints what is waiting and ends; gives the number of records.
    pub(crate) async fn finish(self) -> Result<u64> {
        drop(self.queue);
        tokio::task::spawn_blocking(move || self.thread.join())
            .await
            .context("the printing was cut off")?
            .map_err(|_| anyhow!("the printing thread panicked"))?
    }

    /// Ends without printing what is waiting, even where nobody reads.
    pub(crate) async fn stop(self) -> Result<u64> {
        self.progress.shared.stop.store(true, Ordering::Relaxed);
        match tokio::time::timeout(STOP_TIMEOUT, self.finish()).await {
            Ok(outcome) => outcome,
            Err(_) => Ok(0),
        }
    }
}

impl Progress {
    /// Waits until everything handed over so far is printed, or the printing has ended.
    pub(crate) async fn caught_up(&self) {
        let goal = self.shared.handed.load(Ordering::Relaxed);
        let _ = self.printed.clone().wait_for(|printed| *printed >= goal).await;
    }

    /// The offset after the last one printed, of every partition of which something was.
    pub(crate) fn positions(&self) -> BTreeMap<TopicPartition, i64> {
        self.shared.positions().clone()
    }

    /// Forgets partitions that belong to somebody else now.
    pub(crate) fn forget(&self, partitions: &[TopicPartition]) {
        let mut positions = self.shared.positions();
        for partition in partitions {
            positions.remove(partition);
        }
    }
}

/// The thread's own side.
struct Writer {
    out: File,
    buffer: Vec<u8>,
    rules: Rules,
    records: u64,
    /// Partitions that reached `until_ms`.
    ended: HashSet<TopicPartition>,
    /// Positions rendered and not yet written.
    pending: BTreeMap<TopicPartition, i64>,
    done: u64,
    shared: Arc<Shared>,
    report: watch::Sender<u64>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Work>) -> Result<u64> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let work = match queue.try_recv() {
                Ok(work) => Some(work),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    self.flush()?;
                    queue.blocking_recv()
                }
            };
            let Some(work) = work else { break };
            let rendered = match work {
                Work::Batch(batch) => {
                    let partition = TopicPartition::new(batch.topic().clone(), batch.partition());
                    let next = batch.next_offset();
                    let rendered = self.render(batch);
                    if matches!(rendered, Ok(true)) && !self.ended.contains(&partition) {
                        self.pending.insert(partition, next);
                    }
                    rendered
                }
                Work::Records(records) => self.render(records.into_iter().map(Ok)),
            };
            self.done += 1;
            let more = match rendered {
                Ok(more) => more,
                Err(error) => {
                    self.flush()?;
                    return Err(error);
                }
            };
            if !more {
                break;
            }
            if self.buffer.len() >= WRITE_BYTES {
                self.flush()?;
            }
        }
        self.flush()?;
        Ok(self.records)
    }

    /// Renders records; `false` when the limit is reached.
    fn render(&mut self, records: impl IntoIterator<Item = Result<ConsumedRecord, ConsumeError>>) -> Result<bool> {
        for record in records {
            let record = record?;
            if let Some(until_ms) = self.rules.until_ms {
                let partition = TopicPartition::new(record.topic.clone(), record.partition);
                if record.timestamp_ms >= until_ms || self.ended.contains(&partition) {
                    self.ended.insert(partition);
                    continue;
                }
            }
            if self.rules.filter.keeps(&record) {
                self.rules.style.write(&mut self.buffer, (&record).into());
                self.records += 1;
            }
            let full = self.rules.limit == Some(self.records);
            if full || self.rules.until_ms.is_some() || self.buffer.len() >= 4 * WRITE_BYTES {
                self.pending.insert(TopicPartition::new(record.topic, record.partition), record.offset + 1);
            }
            if full {
                return Ok(false);
            }
            if self.buffer.len() >= 4 * WRITE_BYTES {
                self.flush()?;
            }
        }
        Ok(true)
    }

    /// Writes what is rendered, and only then tells of it.
    fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.out.write_all(&self.buffer).map_err(stdout_error)?;
            self.buffer.clear();
        }
        if !self.pending.is_empty() {
            self.shared.positions().append(&mut self.pending);
        }
        self.report.send_if_modified(|printed| std::mem::replace(printed, self.done) != self.done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::StdoutClosed;
    use bytes::Bytes;
    use headwater_client::TimestampType;
    use std::io::{Read, Seek};

    fn record(partition: u32, offset: i64, timestamp_ms: i64) -> ConsumedRecord {
        ConsumedRecord {
            topic: "t".into(),
            partition,
            offset,
            timestamp_ms,
            timestamp_type: TimestampType::Create,
            key: None,
            value: Some(Bytes::from(format!("{partition}-{offset}"))),
            headers: Vec::new(),
            leader_epoch: 0,
        }
    }

    fn rules(limit: Option<u64>, until_ms: Option<i64>) -> Rules {
        Rules { style: Style::Value, filter: Filter::default(), limit, until_ms }
    }

    fn at(partition: u32) -> TopicPartition {
        TopicPartition::new("t", partition)
    }

    fn text(mut file: &File) -> String {
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the output can be read");
        text
    }

    #[tokio::test]
    async fn a_limit_ends_inside_a_batch_and_the_position_says_where() {
        let file = tempfile::tempfile().expect("a file");
        let printer = Printer::start_on(file.try_clone().expect("a handle"), rules(Some(3), None)).expect("a printer");
        let progress = printer.progress();
        assert!(printer.print(Work::Records(vec![record(0, 5, 0), record(0, 6, 0)])).await);
        printer.print(Work::Records(vec![record(1, 0, 0), record(1, 1, 0)])).await;
        printer.ended().await;
        assert_eq!(printer.finish().await.expect("a count"), 3);
        assert_eq!(text(&file), "0-5\n0-6\n1-0\n");
        assert_eq!(progress.positions().get(&at(1)), Some(&1));
    }

    #[tokio::test]
    async fn a_partition_ends_before_a_time_and_the_others_go_on() {
        let file = tempfile::tempfile().expect("a file");
        let printer =
            Printer::start_on(file.try_clone().expect("a handle"), rules(None, Some(100))).expect("a printer");
        let progress = printer.progress();
        for work in
            [vec![record(0, 0, 99), record(0, 1, 100), record(0, 2, 5)], vec![record(1, 0, 99), record(0, 3, 0)]]
        {
            printer.print(Work::Records(work)).await;
        }
        progress.caught_up().await;
        assert_eq!(progress.positions(), BTreeMap::from([(at(0), 1), (at(1), 1)]));
        assert_eq!(printer.finish().await.expect("a count"), 2);
        assert_eq!(text(&file), "0-0\n1-0\n");
    }

    #[tokio::test]
    async fn nothing_counts_as_printed_when_nobody_reads() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let printer =
            Printer::start_on(File::from(std::os::fd::OwnedFd::from(writer)), rules(None, None)).expect("a printer");
        let progress = printer.progress();
        printer.print(Work::Records(vec![record(0, 0, 0)])).await;
        printer.ended().await;
        progress.caught_up().await;
        assert!(progress.positions().is_empty());
        let error = printer.finish().await.expect_err("standard output is closed");
        assert!(error.is::<StdoutClosed>(), "{error}");
    }
}
