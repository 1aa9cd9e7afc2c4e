//! What one partition does: the task that owns the log's write half and drives [`PartitionState`].
//!
//! The write half is either here or on the I/O pool with one job; meanwhile appends gather into the next group. A commit checks
//! the batches that nobody has checked, and reports its write before it flushes, where somebody waits for the write alone.
//! Owns: the write half, the clock, the answers. Refuses: decisions. Read next: `storage/src/log.rs`.

use super::state::{Effect, Job, PartitionState, Request, fenced};
use super::{Message, PartitionContext, PartitionShared, Reply, Work, alone, log_config};
use crate::clock::now_ms;
use crate::error::PartitionError;
use crate::metrics::{Counted, Metrics};
use headwater_storage::{AppendError, BatchOutcome, Log};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// What comes back from the I/O pool.
enum Report {
    Written(Written),
    Done {
        log: Box<Log>,
        written: Option<Written>,
        refused: Option<PartitionError>,
        flushed: Flushed,
        failed: Option<String>,
    },
    /// The job panicked and took the write half with it.
    Lost,
}

/// What became of the flush of a job.
enum Flushed {
    /// It had none.
    Not,
    /// Everything below this offset is on stable storage.
    To(i64),
    /// There was no room for what goes beside the log, or too many files were open; the log is well.
    Postponed(String),
}

struct Written {
    requests: Vec<Result<Vec<BatchOutcome>, PartitionError>>,
    log_end: i64,
    bytes: usize,
}

enum Ending {
    Close(Vec<oneshot::Sender<Result<(), PartitionError>>>),
    Delete(Vec<oneshot::Sender<()>>),
}

struct Task {
    shared: Arc<PartitionShared>,
    state: PartitionState<Reply, Work>,
    log: Option<Box<Log>>,
    ending: Option<Ending>,
    fenced: Option<Counted>,
    reports: mpsc::UnboundedSender<Report>,
    context: PartitionContext,
}

pub(super) fn spawn(
    shared: Arc<PartitionShared>,
    mut state: PartitionState<Reply, Work>,
    log: Option<Log>,
    ended: Option<PartitionError>,
    messages: mpsc::UnboundedReceiver<Message>,
    context: &PartitionContext,
) {
    let fenced = ended.is_some().then(|| Counted::new(&context.metrics.partitions_fenced));
    if let Some(why) = ended {
        state.end(why);
    }
    let (reports, reported) = mpsc::unbounded_channel();
    let task = Task { shared, state, log: log.map(Box::new), ending: None, fenced, reports, context: context.clone() };
    tokio::spawn(task.run(messages, reported));
}

impl Task {
    async fn run(
        mut self,
        mut messages: mpsc::UnboundedReceiver<Message>,
        mut reported: mpsc::UnboundedReceiver<Report>,
    ) {
        loop {
            self.perform();
            if self.finish_if_idle().await {
                return;
            }
            self.begin_job();
            let flush_at = match self.state.flush_deadline_ms() {
                Some(deadline) if self.log.is_some() => {
                    let wait = u64::try_from(deadline - now_ms()).unwrap_or(0);
                    Some(tokio::time::sleep(Duration::from_millis(wait)))
                }
                _ => None,
            };
            tokio::select! {
                biased;
                Some(report) = reported.recv() => self.report(report),
                message = messages.recv() => match message {
                    Some(message) => {
                        self.message(message);
                        while let Ok(message) = messages.try_recv() {
                            self.message(message);
                        }
                    }
                    // Every handle is gone: nobody can ask for anything any more, and nobody closed the log.
                    None => return self.log.take().map_or((), |log| self.let_go(log)),
                },
                () = async { match flush_at { Some(sleep) => sleep.await, None => std::future::pending().await } } => {}
            }
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Append(append) => self.state.append(append),
            Message::Work(work) => match self.ended() {
                Some(why) => work(Err(why)),
                None => self.state.work(work),
            },
            Message::Configure => {
                let config = self.shared.config.load_full();
                let leader_epoch = self.shared.leader_epoch.load(Ordering::Acquire);
                let now = now_ms();
                self.state.configure(&config, now);
                self.state.lead(alone(leader_epoch), now);
                // The newest count when their turn has come: one turn is enough, however often they change until then.
                if !self.shared.configuring.swap(true, Ordering::AcqRel) {
                    let (shared, expiration_ms) = (Arc::clone(&self.shared), self.context.producer_id_expiration_ms);
                    self.state.work(Box::new(move |write_half| {
                        shared.configuring.store(false, Ordering::Release);
                        if let Ok(write_half) = write_half {
                            write_half.set_config(log_config(&shared.config.load(), expiration_ms));
                        }
                    }));
                }
            }
            Message::Fence(reason) => {
                if self.ended().is_none() {
                    self.fence(&reason);
                }
            }
            Message::Close(tell) => {
                self.state.drain(PartitionError::ShuttingDown);
                match &mut self.ending {
                    Some(Ending::Close(waiting)) => waiting.push(tell),
                    Some(Ending::Delete(_)) => drop(tell.send(Err(PartitionError::Deleted))),
                    None => self.ending = Some(Ending::Close(vec![tell])),
                }
            }
            Message::Delete(tell) => {
                self.state.end(PartitionError::Deleted);
                self.publish_end(PartitionError::Deleted);
                match &mut self.ending {
                    Some(Ending::Delete(waiting)) => waiting.push(tell),
                    _ => self.ending = Some(Ending::Delete(vec![tell])),
                }
            }
        }
    }

    fn report(&mut self, report: Report) {
        let now = now_ms();
        match report {
            Report::Written(written) => self.state.written(written.requests, written.log_end, written.bytes, now),
            Report::Done { log, written, refused, flushed, failed } => {
                if let Some(written) = written {
                    self.state.written(written.requests, written.log_end, written.bytes, now);
                }
                if let Some(why) = refused {
                    self.state.refused(&why);
                }
                match flushed {
                    Flushed::Not => {}
                    Flushed::To(offset) => self.state.flushed(offset, now),
                    Flushed::Postponed(why) => {
                        if self.state.flush_postponed(now) {
                            let (topic, partition) = (&self.shared.topic, self.shared.partition);
                            tracing::warn!(%topic, partition, why, "a flush waits, and its acknowledgements with it");
                        }
                    }
                }
                self.state.returned(log.log_start_offset(), now);
                match failed {
                    Some(reason) => {
                        self.let_go(log);
                        self.fence(&reason);
                    }
                    // A reader may have found it damaged meanwhile.
                    None if self.fenced.is_some() => self.let_go(log),
                    None => self.log = Some(log),
                }
            }
            Report::Lost => {
                self.state.returned(self.state.offsets().log_start, now);
                self.fence("a job on its log panicked");
            }
        }
    }

    /// The write half is let go on the pool: its maps and files may block.
    fn let_go(&self, log: Box<Log>) {
        self.context.pool.spawn(move || drop(log));
    }

    /// Nothing of this partition is served from here on; every other partition goes on.
    fn fence(&mut self, reason: &str) {
        tracing::error!(
            topic = %self.shared.topic, partition = self.shared.partition, reason,
            "partition is fenced; it is served again once the broker has recovered it at its next start"
        );
        if let Some(log) = self.log.take() {
            self.let_go(log);
        }
        let why = fenced(reason);
        self.state.end(why.clone());
        self.publish_end(why);
        self.fenced.get_or_insert_with(|| Counted::new(&self.context.metrics.partitions_fenced));
    }

    fn ended(&self) -> Option<PartitionError> {
        self.shared.watermarks.borrow().ended.clone()
    }

    fn publish_end(&self, why: PartitionError) {
        self.shared.watermarks.send_modify(|watermarks| watermarks.ended = Some(why));
        self.shared.admission.close();
        self.shared.work_admission.close();
    }

    fn perform(&mut self) {
        let mut publish = None;
        for effect in self.state.take_effects() {
            match effect {
                Effect::Publish(offsets) => publish = Some(offsets),
                // A partition whose only replica is here has nothing to propose.
                Effect::Propose(_) => {}
                // Whoever asked may have gone.
                Effect::Answer(reply, result) => drop(reply.tell.send(result)),
            }
        }
        if let Some(offsets) = publish {
            self.shared.watermarks.send_if_modified(|watermarks| {
                let changed = watermarks.offsets != offsets;
                watermarks.offsets = offsets;
                changed
            });
        }
    }

    fn begin_job(&mut self) {
        let Some(log) = self.log.take() else {
            // Without a write half no work is ever done: fenced, or the job under way brings it back.
            if let Some(why) = self.ended().filter(|_| !self.state.is_busy()) {
                self.state.take_work().into_iter().for_each(|work| work(Err(why.clone())));
            }
            return;
        };
        let Some(job) = self.state.next_job(now_ms()) else {
            self.log = Some(log);
            return;
        };
        let reports = self.reports.clone();
        let metrics = Arc::clone(&self.context.metrics);
        self.context.pool.spawn(move || {
            let done = catch_unwind(AssertUnwindSafe(|| run(job, log, &reports, &metrics)));
            // The task may have ended with its runtime.
            drop(reports.send(done.unwrap_or(Report::Lost)));
        });
    }

    /// Closes the log once everything is answered, or lets it go. True: the task is over.
    async fn finish_if_idle(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        if self.state.is_busy() || (matches!(ending, Ending::Close(_)) && self.log.is_some() && !self.state.is_idle()) {
            return false;
        }
        let log = self.log.take();
        match self.ending.take() {
            Some(Ending::Close(waiting)) => {
                let result = match log {
                    Some(log) => {
                        self.context.pool.run(move || log.close()).await.map_err(|error| super::log_error(&error))
                    }
                    None => Err(self.ended().unwrap_or(PartitionError::ShuttingDown)),
                };
                if result.is_ok() {
                    // What was written is flushed now.
                    self.state.flushed(self.state.offsets().log_end, now_ms());
                }
                self.perform();
                if self.ended().is_none() {
                    self.publish_end(PartitionError::ShuttingDown);
                }
                for tell in waiting {
                    drop(tell.send(result.clone()));
                }
            }
            Some(Ending::Delete(waiting)) => {
                self.perform();
                self.context.pool.run(move || drop(log)).await;
                for tell in waiting {
                    // Whoever asked may have gone.
                    let _ = tell.send(());
                }
            }
            None => {}
        }
        for work in self.state.take_work() {
            work(Err(PartitionError::ShuttingDown));
        }
        true
    }
}

/// One job on the I/O pool.
fn run(job: Job<Work>, mut log: Box<Log>, reports: &mpsc::UnboundedSender<Report>, metrics: &Metrics) -> Report {
    let (mut written, mut refused, mut flushed, mut failed) = (None, None, Flushed::Not, None);
    match job {
        Job::Commit { mut requests, leader_epoch, flush, tell_written, .. } => {
            match append(&mut log, &mut requests, leader_epoch, metrics) {
                Ok(done) if tell_written => drop(reports.send(Report::Written(done))),
                Ok(done) => written = Some(done),
                Err(error) => {
                    requests.iter().for_each(Request::fail);
                    match error {
                        error if log.is_poisoned() => {
                            refused = Some(fenced(&error));
                            failed = Some(error.to_string());
                        }
                        AppendError::FullDisk(full) => {
                            refused = Some(PartitionError::DiskFull(full.to_string().into()))
                        }
                        AppendError::TooLarge { size, limit } => {
                            refused = Some(PartitionError::TooLarge { bytes: size, limit });
                        }
                        AppendError::OldEpoch { given, .. } => refused = Some(PartitionError::NotLeader(given)),
                        error if error.retryable() => {
                            refused = Some(PartitionError::Exhausted(error.to_string().into()))
                        }
                        error => refused = Some(PartitionError::Internal(error.to_string().into())),
                    }
                }
            }
            if flush && failed.is_none() {
                self::flush(&mut log, metrics, &mut flushed, &mut failed);
            }
        }
        Job::Flush => self::flush(&mut log, metrics, &mut flushed, &mut failed),
        Job::Work(work) => {
            work(Ok(&mut log));
            if log.is_poisoned() {
                failed = Some("writing to the log failed; the reason was given where it was asked for".to_owned());
            } else {
                flushed = Flushed::To(log.flushed_offset());
            }
        }
    }
    Report::Done { log, written, refused, flushed, failed }
}

/// Checks what is left to check, and writes what may be written.
fn append(
    log: &mut Log,
    requests: &mut [Request],
    leader_epoch: i32,
    metrics: &Metrics,
) -> Result<Written, AppendError> {
    let (mut group, mut checked) = (Vec::new(), Vec::with_capacity(requests.len()));
    for request in requests.iter_mut() {
        checked.push(request.take().map(|batches| {
            let count = batches.len();
            group.extend(batches);
            count
        }));
    }
    let bytes = group.iter().map(|batch| batch.bytes.len()).sum();
    let mut outcomes = Vec::new();
    if !group.is_empty() {
        let began = Instant::now();
        outcomes = log.append(&group, leader_epoch, now_ms())?;
        metrics.append_seconds.record(began.elapsed());
        metrics.commit_bytes.record(bytes as f64);
    }
    let mut outcomes = outcomes.into_iter();
    let became = checked.into_iter().zip(&*requests);
    let became = became.map(|(batches, request)| request.became(outcomes.by_ref().take(batches?).collect()));
    Ok(Written { requests: became.collect(), log_end: log.log_end_offset(), bytes })
}

fn flush(log: &mut Log, metrics: &Metrics, flushed: &mut Flushed, failed: &mut Option<String>) {
    let began = Instant::now();
    match log.flush() {
        Ok(offset) => {
            metrics.flush_seconds.record(began.elapsed());
            *flushed = Flushed::To(offset);
        }
        Err(error) if error.retryable() && !log.is_poisoned() => *flushed = Flushed::Postponed(error.to_string()),
        Err(error) => *failed = Some(error.to_string()),
    }
}
