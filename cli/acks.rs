//! Acknowledgements as they arrive: counted, logged, and what failed remembered.
//!
//! Owns: the count, and the acknowledgement log. Runs on a thread of its own, so that writing a log never delays the
//! network. Refuses: sending. Read next: `commands/produce.rs`.

use anyhow::{Context, Result, anyhow};
use headwater_client::{Acknowledgement, Delivery, Durability, ProduceError};
use std::collections::BTreeMap;
use std::fs::File;
use std::future::poll_fn;
use std::io::Write;
use std::path::Path;
use std::thread::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::outcomes::{Expect, Outcomes};

/// What became of all records.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) acknowledged: u64,
    /// Bytes of the keys and values that are acknowledged.
    pub(crate) bytes: u64,
    /// The weakest level that any acknowledgement told.
    pub(crate) durability: Option<Durability>,
    /// First and last offset of each partition.
    pub(crate) partitions: BTreeMap<u32, (i64, i64)>,
    /// The smallest number that failed, and why.
    pub(crate) first_failure: Option<(u64, ProduceError)>,
}

impl Tally {
    fn count(&mut self, partition: u32, bytes: usize, acknowledgement: &Acknowledgement) {
        self.acknowledged += 1;
        self.bytes += bytes as u64;
        let (offset, level) = (acknowledgement.offset, acknowledgement.durability);
        if offset >= 0 {
            self.partitions.entry(partition).and_modify(|(_, last)| *last = offset).or_insert((offset, offset));
        }
        self.durability = Some(self.durability.map_or(level, |weakest| weakest.min(level)));
    }

    /// Counts a record that failed.
    pub(crate) fn fail(&mut self, number: u64, error: ProduceError) {
        if self.first_failure.as_ref().is_none_or(|(first, _)| number < *first) {
            self.first_failure = Some((number, error));
        }
    }
}

/// What an acknowledgement is told by: the record's number, and the bytes of its key and value.
pub(crate) type Mark = (u64, usize);

/// Where deliveries go.
pub(crate) struct Acknowledgements {
    expect: Expect<Mark>,
    /// Something failed, or the collecting itself did.
    failed: CancellationToken,
    thread: JoinHandle<Result<Tally>>,
}

impl Acknowledgements {
    /// Begins to collect; `log` is appended to.
    pub(crate) fn start(log: Option<&Path>) -> Result<Acknowledgements> {
        let log = match log {
            Some(path) => Some(
                File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("cannot open the acknowledgement log {}", path.display()))?,
            ),
            None => None,
        };
        let (expect, outcomes) = Outcomes::new();
        let failed = CancellationToken::new();
        let collector = collect(outcomes, log, failed.clone());
        let (runtime, ended) = (tokio::runtime::Handle::current(), failed.clone().drop_guard());
        let work = move || {
            let _ended = ended;
            runtime.block_on(collector)
        };
        let thread =
            std::thread::Builder::new().name("acknowledgements".into()).spawn(work).context("cannot start a thread")?;
        Ok(Acknowledgements { expect, failed, thread })
    }

    /// Hands deliveries over; those of a partition in the order of their sending.
    pub(crate) fn expect(&self, deliveries: Vec<(Mark, Delivery)>) {
        // A collector that ended had a reason, which `finish` tells.
        let _ = self.expect.send(deliveries);
    }

    /// Whether anything failed so far.
    pub(crate) fn any_failed(&self) -> bool {
        self.failed.is_cancelled()
    }

    /// Is cancelled when something fails.
    pub(crate) fn failure(&self) -> CancellationToken {
        self.failed.clone()
    }

    /// Waits for every outcome.
    pub(crate) async fn finish(self) -> Result<Tally> {
        let Acknowledgements { expect, thread, failed: _ } = self;
        drop(expect);
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .context("the wait for acknowledgements was cut off")?
            .map_err(|_| anyhow!("the thread that collects acknowledgements panicked"))?
    }
}

/// What the thread runs.
async fn collect(mut outcomes: Outcomes<Mark>, mut log: Option<File>, failed: CancellationToken) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    poll_fn(|context| {
        let logging = log.is_some();
        let done = outcomes.poll(context, |partition, (number, bytes), outcome| match outcome {
            Ok(acknowledgement) => {
                tally.count(partition, bytes, &acknowledgement);
                if logging && acknowledgement.offset >= 0 {
                    let offset = acknowledgement.offset;
                    // Writing to a Vec cannot fail.
                    let _ = writeln!(lines, "{{\"line\":{number},\"partition\":{partition},\"offset\":{offset}}}");
                }
            }
            Err(error) => {
                failed.cancel();
                tally.fail(number, error);
            }
        });
        if let Some(log) = &mut log
            && !lines.is_empty()
        {
            // One write for whole lines: a reader, or a kill, finds no half line.
            log.write_all(&lines).context("cannot write to the acknowledgement log")?;
            lines.clear();
        }
        done.map(Ok)
    })
    .await
    .map(|()| tally)
}
