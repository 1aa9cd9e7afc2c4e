//! Records on their way to standard output.
//!
//! Owns: the thread that renders and writes, so that a reader who stops reading stops this command and not its
//! heartbeats; telling a member's [`Shares`] what was really printed, which is what a group may commit; `--count`. Output
//! is written in large pieces, and at once when nothing more is waiting. Refuses: fetching. Read next:
//! `commands/consume.rs`.
//!
//! Invariant: a position is published only after everything below it was written. What a member fetched of a partition
//! before it lost it is not printed any more: it is the next owner's.

use anyhow::{Context, Result, anyhow};
use headwater_client::{ConsumeError, ConsumedBatch, ConsumedRecord, Position, TopicPartition};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::filter::Filter;
use crate::os::wait_until_unread;
use crate::output::{stdout, stdout_error};
use crate::record::Style;
use crate::shares::Shares;

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

/// Work, and the life of its partition in which it was fetched, where a member fetched it.
struct Handed {
    work: Work,
    of: Option<(TopicPartition, u64)>,
}

/// The printing thread's handle.
pub(crate) struct Printer {
    queue: mpsc::Sender<Handed>,
    progress: Progress,
    shares: Option<Arc<Shares>>,
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
    /// Pieces of work handed over.
    handed: AtomicU64,
    /// What is waiting is not printed any more.
    stop: CancellationToken,
    /// Nothing more can be printed.
    ended: CancellationToken,
}

impl Printer {
    /// Starts to print on standard output; with `shares` what is printed is told there.
    pub(crate) fn start(rules: Rules, shares: Option<Arc<Shares>>) -> Result<Printer> {
        Printer::start_on(stdout()?, rules, shares)
    }

    pub(crate) fn start_on(out: File, rules: Rules, shares: Option<Arc<Shares>>) -> Result<Printer> {
        // Whoever has nothing to print hears from no write that its reader has gone.
        let watched = out.metadata().is_ok_and(|metadata| !metadata.is_file()).then(|| out.try_clone().ok()).flatten();
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
            shares: shares.clone(),
            stop: shared.stop.clone(),
            report,
        };
        let ended = shared.ended.clone().drop_guard();
        let print = move || {
            let _ended = ended;
            writer.run(work)
        };
        let thread =
            std::thread::Builder::new().name("printer".into()).spawn(print).context("cannot start a thread")?;
        if let Some(watched) = watched {
            let ended = shared.ended.clone();
            let watch = move || {
                if wait_until_unread(&watched) {
                    ended.cancel();
                }
            };
            // It waits for as long as somebody reads, and ends with the process.
            std::thread::Builder::new().name("reader".into()).spawn(watch).context("cannot start a thread")?;
        }
        Ok(Printer { queue, progress: Progress { shared, printed }, shares, thread })
    }

    /// Hands work over; waits while too much is waiting. `false`: the printing has ended, and [`Printer::finish`] says why.
    pub(crate) fn print(&self, work: Work) -> impl Future<Output = bool> + '_ {
        // The life is the one of this moment, not of the moment at which there is room.
        let of = match (&work, &self.shares) {
            (Work::Batch(batch), Some(shares)) => {
                let at = TopicPartition::new(batch.topic().clone(), batch.partition());
                let life = shares.life(&at);
                Some((at, life))
            }
            _ => None,
        };
        async move {
            match of {
                // It was taken away while this batch was on its way.
                Some((_, None)) => true,
                Some((at, Some(life))) => self.hand(Handed { work, of: Some((at, life)) }).await,
                None => self.hand(Handed { work, of: None }).await,
            }
        }
    }

    async fn hand(&self, handed: Handed) -> bool {
        self.progress.shared.handed.fetch_add(1, Ordering::Relaxed);
        self.queue.send(handed).await.is_ok()
    }

    /// How far the printing is.
    pub(crate) fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Resolves when the printing ended by itself: the limit is reached, or standard output is closed.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + use<> {
        self.progress.shared.ended.clone().cancelled_owned()
    }

    /// Prints what is waiting and ends; gives the number of records. Once `end` comes, nobody waits for a reader who does
    /// not read.
    pub(crate) async fn finish(self, end: impl Future<Output = ()>) -> Result<u64> {
        drop(self.queue);
        let mut printing = tokio::task::spawn_blocking(move || self.thread.join());
        let joined = tokio::select! {
            biased;
            joined = &mut printing => joined,
            () = end => {
                self.progress.shared.stop.cancel();
                match tokio::time::timeout(STOP_TIMEOUT, printing).await {
                    Ok(joined) => joined,
                    Err(_) => return Ok(0),
                }
            }
        };
        joined.context("the printing was cut off")?.map_err(|_| anyhow!("the printing thread panicked"))?
    }

    /// Ends without printing what is waiting, even where nobody reads.
    pub(crate) async fn stop(self) -> Result<u64> {
        self.progress.shared.stop.cancel();
        self.finish(std::future::ready(())).await
    }
}

impl Progress {
    /// Waits until everything handed over so far is printed. `false`: it never will be, since the printing has ended.
    pub(crate) async fn caught_up(&self) -> bool {
        let goal = self.shared.handed.load(Ordering::Relaxed);
        let mut printed = self.printed.clone();
        tokio::select! {
            biased;
            outcome = printed.wait_for(|printed| *printed >= goal) => outcome.is_ok(),
            () = self.shared.stop.cancelled() => false,
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
    /// Positions rendered and not yet written, each with the life of its partition.
    pending: BTreeMap<TopicPartition, (u64, Position)>,
    done: u64,
    shares: Option<Arc<Shares>>,
    stop: CancellationToken,
    report: watch::Sender<u64>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Handed>) -> Result<u64> {
        while !self.stop.is_cancelled() {
            let handed = match queue.try_recv() {
                Ok(handed) => Some(handed),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    self.flush()?;
                    queue.blocking_recv()
                }
            };
            let Some(Handed { work, of }) = handed else { break };
            let rendered = if self.is_ours(of.as_ref()) { self.take(work, of) } else { Ok(true) };
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

    /// Whether a partition is in the life in which something of it was fetched; always, where there is no group.
    fn is_ours(&self, of: Option<&(TopicPartition, u64)>) -> bool {
        match (of, &self.shares) {
            (Some((at, life)), Some(shares)) => shares.life(at) == Some(*life),
            _ => true,
        }
    }

    /// Renders a piece of work; `false` when the limit is reached.
    fn take(&mut self, work: Work, of: Option<(TopicPartition, u64)>) -> Result<bool> {
        match work {
            Work::Records(records) => self.render(records.into_iter().map(Ok), of.map(|(_, life)| life)),
            Work::Batch(batch) => {
                let next = Position { offset: batch.next_offset(), leader_epoch: batch.leader_epoch() };
                let more = self.render(batch, of.as_ref().map(|(_, life)| *life))?;
                if let Some((at, life)) = of
                    && more
                    && !self.ended.contains(&at)
                {
                    self.pending.insert(at, (life, next));
                }
                Ok(more)
            }
        }
    }

    /// Renders records, with the life of their partition where there is a group; `false` when the limit is reached.
    fn render(
        &mut self,
        records: impl IntoIterator<Item = Result<ConsumedRecord, ConsumeError>>,
        life: Option<u64>,
    ) -> Result<bool> {
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
            let much = self.buffer.len() >= 4 * WRITE_BYTES;
            if let Some(life) = life
                && (full || much || self.rules.until_ms.is_some())
            {
                let next = record.next_position();
                self.pending.insert(TopicPartition::new(record.topic, record.partition), (life, next));
            }
            if full {
                return Ok(false);
            }
            if much {
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
        if let Some(shares) = &self.shares {
            for (at, (life, position)) in std::mem::take(&mut self.pending) {
                shares.printed(&at, life, position);
            }
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

    /// A member that owns two partitions.
    fn shares() -> Arc<Shares> {
        let shares = Arc::new(Shares::default());
        shares.take_on(&[at(0), at(1)]);
        shares
    }

    /// What was fetched of a partition in its present life.
    fn of(shares: &Shares, records: Vec<ConsumedRecord>) -> Handed {
        let of =
            records.first().map(|record| at(record.partition)).and_then(|at| Some((at.clone(), shares.life(&at)?)));
        Handed { work: Work::Records(records), of }
    }

    fn offsets(shares: &Shares) -> Vec<(u32, i64)> {
        shares.positions().into_iter().map(|(at, position)| (at.partition, position.offset)).collect()
    }

    #[tokio::test]
    async fn a_limit_ends_inside_a_batch_and_the_position_says_where() {
        let file = tempfile::tempfile().expect("a file");
        let shares = shares();
        let printer =
            Printer::start_on(file.try_clone().expect("a handle"), rules(Some(3), None), Some(shares.clone()))
                .expect("a printer");
        assert!(printer.hand(of(&shares, vec![record(0, 5, 0), record(0, 6, 0)])).await);
        printer.hand(of(&shares, vec![record(1, 0, 0), record(1, 1, 0)])).await;
        printer.ended().await;
        assert_eq!(printer.finish(std::future::pending()).await.expect("a count"), 3);
        assert_eq!(text(&file), "0-5\n0-6\n1-0\n");
        assert_eq!(offsets(&shares), [(1, 1)]);
    }

    #[tokio::test]
    async fn a_partition_ends_before_a_time_and_the_others_go_on() {
        let file = tempfile::tempfile().expect("a file");
        let shares = shares();
        let printer =
            Printer::start_on(file.try_clone().expect("a handle"), rules(None, Some(100)), Some(shares.clone()))
                .expect("a printer");
        for work in
            [vec![record(0, 0, 99), record(0, 1, 100), record(0, 2, 5)], vec![record(1, 0, 99)], vec![record(0, 3, 0)]]
        {
            printer.hand(of(&shares, work)).await;
        }
        assert!(printer.progress().caught_up().await);
        assert_eq!(offsets(&shares), [(0, 1), (1, 1)]);
        assert_eq!(printer.finish(std::future::pending()).await.expect("a count"), 2);
        assert_eq!(text(&file), "0-0\n1-0\n");
    }

    #[tokio::test]
    async fn what_waits_of_a_partition_that_was_lost_is_the_next_owners() {
        let file = tempfile::tempfile().expect("a file");
        let shares = shares();
        let printer =
            Printer::start_on(file.try_clone().expect("a handle"), rules(None, Some(100)), Some(shares.clone()))
                .expect("a printer");
        let waiting = of(&shares, vec![record(0, 0, 0)]);
        shares.give_up(&[at(0)]);
        shares.take_on(&[at(0)]);
        shares.begin(&at(0), Position { offset: 7, leader_epoch: 0 });
        printer.hand(waiting).await;
        printer.hand(of(&shares, vec![record(1, 0, 0)])).await;
        assert!(printer.progress().caught_up().await);
        assert_eq!(offsets(&shares), [(0, 7), (1, 1)]);
        assert_eq!(printer.finish(std::future::pending()).await.expect("a count"), 1);
        assert_eq!(text(&file), "1-0\n");
    }

    #[tokio::test]
    async fn nothing_counts_as_printed_when_nobody_reads() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let shares = shares();
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        let printer = Printer::start_on(writer, rules(None, None), Some(shares.clone())).expect("a printer");
        printer.hand(of(&shares, vec![record(0, 0, 0)])).await;
        printer.ended().await;
        assert!(!printer.progress().caught_up().await);
        assert!(shares.positions().is_empty());
        let error = printer.finish(std::future::pending()).await.expect_err("standard output is closed");
        assert!(error.is::<StdoutClosed>(), "{error}");
    }

    /// A pipe that nobody empties holds the thread in its write; nobody may wait for that without end.
    #[tokio::test]
    async fn an_end_waits_for_nobody_who_does_not_read() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        let printer = Printer::start_on(writer, rules(None, None), None).expect("a printer");
        let large = ConsumedRecord { value: Some(Bytes::from(vec![b'x'; 4 * WRITE_BYTES])), ..record(0, 0, 0) };
        printer.print(Work::Records(vec![large])).await;
        let progress = printer.progress();
        let both = async { tokio::join!(progress.caught_up(), printer.stop()) };
        let (caught_up, stopped) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("both end");
        assert!(!caught_up && stopped.is_ok_and(|records| records == 0));
        drop(reader);
    }
}
