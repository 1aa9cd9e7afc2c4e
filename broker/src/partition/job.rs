//! What is done with the write half of a partition's log on the I/O pool, one job at a time.
//!
//! Owns: the jobs of either role, and what comes back from them. Refuses: to decide which is next ([`super::state`],
//! [`super::following`]) and what follows from it ([`super::task`]). Read next: `storage/src/log.rs`.

use super::following::{self, Cut};
use super::state::{Job, Request, fenced};
use super::{PartitionShared, Work};
use crate::clock::now_ms;
use crate::error::PartitionError;
use crate::metrics::Metrics;
use headwater_proto::batch;
use headwater_storage::{AppendError, BatchOutcome, Log, LogError, NewBatch};
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::mpsc;

/// What comes back from the I/O pool; boxed on its way, as what the task is told is.
pub(super) enum Report {
    Written(Written),
    Done {
        log: Box<Log>,
        written: Option<Written>,
        refused: Option<PartitionError>,
        flushed: Flushed,
        failed: Option<String>,
    },
    Followed {
        log: Box<Log>,
        came: Followed,
        flushed: Flushed,
        failed: Option<String>,
    },
    /// The job panicked and took the write half with it.
    Lost,
}

/// What became of the flush of a job.
pub(super) enum Flushed {
    /// It had none.
    Not,
    /// Everything below this offset is on stable storage.
    To(i64),
    /// There was no room for what goes beside the log, or too many files were open; the log is well.
    Postponed(String),
}

pub(super) struct Written {
    pub(super) requests: Vec<Result<Vec<BatchOutcome>, PartitionError>>,
    pub(super) log_end: i64,
    pub(super) bytes: usize,
}

/// What came of a follower's job.
pub(super) enum Followed {
    Done,
    Appended {
        log_end: i64,
        bytes: usize,
    },
    /// The end of the log was moved back.
    Cut,
    /// What was pushed is not sound, and nothing of it was written. `at`: from where on it is not, unless it only came at the wrong time.
    Unsound {
        at: Option<i64>,
        why: String,
    },
    /// No room, or too many open files.
    Postponed(String),
}

/// A follower's job on the I/O pool.
pub(super) fn follow(
    job: following::Job<Work>,
    log: &mut Log,
    cut: impl FnOnce(&mut Log, Cut) -> Result<(), LogError>,
    metrics: &Metrics,
    flushed: &mut Flushed,
    failed: &mut Option<String>,
) -> Followed {
    let mut settle = |log: &Log, result: Result<Followed, LogError>| match result {
        Ok(came) => came,
        Err(error) if error.retryable() && !log.is_poisoned() => Followed::Postponed(error.to_string()),
        Err(error) => {
            *failed = Some(error.to_string());
            Followed::Done
        }
    };
    match job {
        following::Job::Append { from, batches, rolls, bytes, flush } => {
            let began = Instant::now();
            let came = match append_pushed(log, from, &batches, &rolls) {
                Ok(()) => Followed::Appended { log_end: log.log_end_offset(), bytes },
                Err(Refused::Log(error)) if log.is_poisoned() => {
                    *failed = Some(error.to_string());
                    return Followed::Done;
                }
                Err(Refused::Log(error)) if error.retryable() => return Followed::Postponed(error.to_string()),
                Err(error) => {
                    let at = match &error {
                        Refused::Hole { .. } => None,
                        Refused::Batch(at, _) => Some(*at),
                        Refused::Log(_) => Some(from),
                    };
                    return Followed::Unsound { at, why: error.to_string() };
                }
            };
            metrics.append_seconds.record(began.elapsed());
            metrics.commit_bytes.record(bytes as f64);
            if flush {
                self::flush(log, metrics, flushed, failed);
            }
            came
        }
        following::Job::Flush => {
            self::flush(log, metrics, flushed, failed);
            Followed::Done
        }
        following::Job::Cut(at) => {
            let result = cut(log, at).map(|()| Followed::Cut);
            settle(log, result)
        }
        following::Job::Trim { before, high_watermark } => {
            let result = log.delete_records(before, high_watermark, now_ms()).map(|_| Followed::Done);
            let came = settle(log, result);
            *flushed = Flushed::To(log.flushed_offset());
            came
        }
        following::Job::Work(work) => {
            work(Ok(log));
            if log.is_poisoned() {
                *failed = Some("writing to the log failed; the reason was given where it was asked for".to_owned());
            } else {
                *flushed = Flushed::To(log.flushed_offset());
            }
            Followed::Done
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("batches from offset {from} for a log that ends at {log_end}")]
    Hole { from: i64, log_end: i64 },
    #[error("a batch at offset {0}: {1}")]
    Batch(i64, batch::BatchError),
    #[error(transparent)]
    Log(#[from] AppendError),
}

/// Checks what a leader pushed to the last byte, and writes it as it is.
fn append_pushed(log: &mut Log, from: i64, batches: &[NewBatch], rolls: &[i64]) -> Result<(), Refused> {
    let log_end = log.log_end_offset();
    if from != log_end {
        return Err(Refused::Hole { from, log_end });
    }
    for pushed in batches {
        batch::check(&pushed.bytes).map_err(|error| Refused::Batch(pushed.header.base_offset, error))?;
    }
    Ok(log.append_as_follower(batches, rolls, now_ms())?)
}

/// Moves the end of the log back. First the checkpoints say so: a log that ends before its recovery point counts as damaged.
pub(super) fn cut_back(
    log: &mut Log,
    cut: Cut,
    shared: &PartitionShared,
    root: &super::DataRoot,
) -> Result<(), LogError> {
    // Until it is published where the log ends now, nobody else writes down where it ended.
    shared.cutting.store(true, Ordering::Release);
    let to = match cut {
        Cut::To(to) | Cut::RestartAt(to) => to,
    };
    if let Some(root) = root.get() {
        let key = (shared.topic.to_string(), shared.partition);
        // What they never said, they need not take back: after the death of a leader many logs are cut, and few of them that far.
        let said_more = root.lower_checkpoints(&key, to, matches!(cut, Cut::RestartAt(_)));
        if said_more {
            root.write_checkpoints()?;
        }
    }
    match cut {
        Cut::To(to) => log.truncate(to, now_ms()),
        Cut::RestartAt(at) => {
            log.truncate_and_restart_at(at, now_ms())?;
            shared.kept_start.store(at, Ordering::Release);
            Ok(())
        }
    }
}

/// One job on the I/O pool.
pub(super) fn run(
    job: Job<Work>,
    mut log: Box<Log>,
    reports: &mpsc::UnboundedSender<Box<Report>>,
    metrics: &Metrics,
) -> Report {
    let (mut written, mut refused, mut flushed, mut failed) = (None, None, Flushed::Not, None);
    match job {
        Job::Commit { mut requests, leader_epoch, flush, tell_written, .. } => {
            match append(&mut log, &mut requests, leader_epoch, metrics) {
                Ok(done) if tell_written => drop(reports.send(Box::new(Report::Written(done)))),
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
