//! All partitions of this broker: opening, finding, looking after and closing them.
//!
//! Owns: which partitions are open, their folders and checkpoints, and the periodic work (retention, age rolls, expiry of
//! producers, compaction, checkpoints). A partition that cannot be opened is fenced, named in the log, and keeps no other
//! from being served. Refuses: to decide which partitions there are; the metadata does, through [`Partitions::apply`].
//! Read next: [`crate::partition`].

use crate::clock::now_ms;
use crate::config::BrokerConfig;
use crate::error::PartitionError;
use crate::metrics::{Counted, Metrics};
use crate::partition::state::{Offsets, fenced};
use crate::partition::{AssignedPartition, PartitionContext, PartitionHandle, log_config};
use crate::pool::Pool;
use futures::StreamExt;
use futures::stream;
use headwater_proto::TopicId;
use headwater_storage::checkpoint::PartitionOffsets;
use headwater_storage::{DataDir, IoFailure, Log, LogIdentity, OpenError};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

type Key = (TopicId, u32);

/// How often a recovery that takes long says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The partitions that this broker leads.
pub(crate) struct Partitions {
    /// `None` once it was closed.
    data_dir: Mutex<Option<Arc<DataDir>>>,
    context: PartitionContext,
    /// Threads of the pool: so many partitions are opened or closed at once.
    parallel: usize,
    open: Mutex<HashMap<Key, PartitionHandle>>,
    /// Only one change at a time.
    applying: tokio::sync::Mutex<()>,
    written: Mutex<Checkpoints>,
    /// The offsets that `written` was made of.
    seen: Mutex<HashMap<Key, Offsets>>,
}

/// What the checkpoint files hold.
#[derive(Default, Clone, PartialEq)]
struct Checkpoints {
    recovery_points: PartitionOffsets,
    log_starts: PartitionOffsets,
    high_watermarks: PartitionOffsets,
}

impl Partitions {
    pub(crate) fn new(
        data_dir: Arc<DataDir>,
        pool: Pool,
        threads: usize,
        metrics: Arc<Metrics>,
        config: &BrokerConfig,
    ) -> Partitions {
        let context = PartitionContext {
            pool,
            metrics,
            append_queue_bytes: config.append_queue_bytes,
            group_bytes: config.group_commit_bytes as usize,
            producer_id_expiration_ms: config.producer_id_expiration_ms,
        };
        Partitions {
            data_dir: Mutex::new(Some(data_dir)),
            context,
            parallel: threads,
            open: Mutex::default(),
            applying: tokio::sync::Mutex::default(),
            written: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// A partition, if this broker leads it.
    pub(crate) fn get(&self, topic_id: &TopicId, partition: u32) -> Option<PartitionHandle> {
        self.open().get(&(*topic_id, partition)).cloned()
    }

    /// Every partition that this broker leads.
    pub(crate) fn all(&self) -> Vec<PartitionHandle> {
        self.open().values().cloned().collect()
    }

    /// Brings what is open in line with `assigned`, which is everything that this broker leads: lets go of and deletes what
    /// is gone, opens or creates what is new, configures what changed. Returns once that is done.
    pub(crate) async fn apply(&self, assigned: Vec<AssignedPartition>) {
        let _one_at_a_time = self.applying.lock().await;
        let wanted: HashMap<Key, AssignedPartition> =
            assigned.into_iter().map(|assigned| ((assigned.topic_id, assigned.partition), assigned)).collect();
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        {
            let mut open = self.open();
            open.retain(|key, handle| {
                let keep = wanted.contains_key(key);
                if !keep {
                    gone.push(handle.clone());
                }
                keep
            });
            for (key, assigned) in wanted {
                match open.get(&key) {
                    None => new.push(assigned),
                    Some(handle) => {
                        let changed =
                            assigned.leader_epoch > handle.leader_epoch() || assigned.config != handle.config();
                        if changed {
                            handle.configure(assigned.leader_epoch, assigned.config);
                        }
                    }
                }
            }
        }
        // First what is gone: a topic that was deleted and created again has the same folders.
        stream::iter(gone).for_each_concurrent(self.parallel, |handle| self.remove(handle)).await;
        self.open_all(new).await;
    }

    async fn remove(&self, handle: PartitionHandle) {
        handle.delete().await;
        drop(handle.compacting().lock().await);
        let Some(data_dir) = self.data_dir() else { return };
        let (topic, partition, id) = (Arc::clone(handle.topic()), handle.partition(), handle.topic_id());
        let removed = self.context.pool.run_long(move || data_dir.remove_partition(&topic, partition, id)).await;
        match removed {
            Ok(()) => tracing::info!(topic = %handle.topic(), partition, "partition deleted"),
            // What is left is cleared away at the next start, or stays a stray.
            Err(error) => {
                tracing::error!(topic = %handle.topic(), partition, %error, "partition's folder cannot be deleted")
            }
        }
    }

    async fn open_all(&self, mut new: Vec<AssignedPartition>) {
        new.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
        let (total, began) = (new.len(), Instant::now());
        let Some(data_dir) = self.data_dir() else { return };
        let mut opening = stream::iter(new)
            .map(|assigned| self.open_one(Arc::clone(&data_dir), assigned))
            .buffer_unordered(self.parallel);
        let (mut done, mut told) = (0, Instant::now());
        while let Some(handle) = opening.next().await {
            done += 1;
            self.open().insert((handle.topic_id(), handle.partition()), handle);
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                tracing::info!(done, total, seconds = began.elapsed().as_secs(), "opening partitions");
            }
        }
    }

    async fn open_one(&self, data_dir: Arc<DataDir>, assigned: AssignedPartition) -> PartitionHandle {
        let recovering = Counted::new(&self.context.metrics.partitions_recovering);
        let identity = LogIdentity {
            topic: assigned.topic.to_string(),
            topic_id: assigned.topic_id,
            partition: assigned.partition,
        };
        let config = log_config(&assigned.config, self.context.producer_id_expiration_ms);
        let hints = data_dir.hints(&assigned.topic, assigned.partition);
        let path = data_dir.partition_path(&assigned.topic, assigned.partition);
        let opened = self
            .context
            .pool
            .run(move || Log::open(Arc::clone(data_dir.files()), &path, identity, config, hints, now_ms()))
            .await;
        drop(recovering);
        let log = match opened {
            Ok((log, report)) => {
                self.context.metrics.recovered_bytes.increment(report.scanned_bytes);
                // A new log has nothing to recover.
                if !report.clean && report.scanned_bytes > 0 {
                    tracing::info!(topic = %assigned.topic, partition = assigned.partition, ?report, "partition recovered");
                }
                Ok(log)
            }
            Err(error) => {
                tracing::error!(
                    topic = %assigned.topic, partition = assigned.partition, %error,
                    "partition cannot be opened and is fenced; every other is served"
                );
                // Its checkpoints stay as they are, so that the next recovery knows as much as this one did.
                let offsets = Offsets {
                    log_start: hints.log_start_offset,
                    high_watermark: hints.log_start_offset.max(hints.recovery_point),
                    log_end: hints.log_start_offset.max(hints.recovery_point),
                    flushed: hints.recovery_point,
                };
                Err((open_error(&error), offsets))
            }
        };
        PartitionHandle::start(&assigned, log, &self.context)
    }

    /// Partitions that found no room for their first files are tried again.
    async fn reopen_where_the_disk_was_full(&self) {
        let _one_at_a_time = self.applying.lock().await;
        let is_full = |handle: &PartitionHandle| matches!(handle.ended(), Some(PartitionError::DiskFull(_)));
        let mut again = Vec::new();
        for handle in self.all().into_iter().filter(is_full) {
            handle.delete().await;
            again.push(handle.assigned());
        }
        self.open_all(again).await;
    }

    /// Writes down how far each log is flushed, where it begins, and its high watermark, where that changed.
    pub(crate) async fn checkpoint(&self) -> Result<(), IoFailure> {
        // Most of the time, and with most partitions, nothing changed: that must cost next to nothing.
        let offsets: HashMap<Key, Offsets> = self.open().iter().map(|(key, handle)| (*key, handle.offsets())).collect();
        if *self.seen.lock().unwrap_or_else(PoisonError::into_inner) == offsets {
            return Ok(());
        }
        let mut now = Checkpoints::default();
        for handle in self.all() {
            let Offsets { log_start, high_watermark, flushed, .. } = handle.offsets();
            let key = (handle.topic().to_string(), handle.partition());
            now.recovery_points.insert(key.clone(), flushed);
            now.log_starts.insert(key.clone(), log_start);
            now.high_watermarks.insert(key, high_watermark);
        }
        let before = self.written.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if now == before {
            return Ok(());
        }
        let Some(data_dir) = self.data_dir() else { return Ok(()) };
        let written = now.clone();
        self.context
            .pool
            .run(move || {
                if now.recovery_points != before.recovery_points {
                    data_dir.write_recovery_points(&now.recovery_points)?;
                }
                if now.log_starts != before.log_starts {
                    data_dir.write_log_start_offsets(&now.log_starts)?;
                }
                if now.high_watermarks != before.high_watermarks {
                    data_dir.write_high_watermarks(&now.high_watermarks)?;
                }
                Ok(())
            })
            .await?;
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = written;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = offsets;
        Ok(())
    }

    /// Writes checkpoints down at their interval, until `shutdown`.
    pub(crate) async fn keep_checkpoints(&self, interval: Duration, shutdown: CancellationToken) {
        let mut failing = false;
        while !paused(interval, &shutdown).await {
            self.reopen_where_the_disk_was_full().await;
            match self.checkpoint().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::error!(%error, "checkpoints cannot be written; a recovery would scan more");
                }
                Err(_) => {}
            }
        }
    }

    /// Retention, age rolls and expiry of producers, at their interval, until `shutdown`.
    pub(crate) async fn enforce_retention(&self, interval: Duration, shutdown: CancellationToken) {
        while !paused(interval, &shutdown).await {
            for handle in self.all() {
                if handle.ended().is_some() {
                    continue;
                }
                let high_watermark = handle.offsets().high_watermark;
                let done = handle.with_log(move |log| {
                    let now = now_ms();
                    log.expire_producers(now);
                    log.roll_if_due(now)?;
                    log.enforce_retention(now, high_watermark)
                });
                match done.await {
                    Ok(Some(log_start)) => tracing::info!(
                        topic = %handle.topic(), partition = handle.partition(), log_start, "old segments deleted"
                    ),
                    Ok(None) | Err(PartitionError::Deleted | PartitionError::ShuttingDown) => {}
                    Err(error) => tracing::warn!(
                        topic = %handle.topic(), partition = handle.partition(), %error, "retention failed and is tried again"
                    ),
                }
            }
        }
    }

    /// Closes every log and writes the last checkpoints. True: everything was closed in good order.
    pub(crate) async fn close(&self) -> bool {
        let _one_at_a_time = self.applying.lock().await;
        let results = stream::iter(self.all()).map(|handle| async move {
            let result = handle.close().await;
            if let Err(error) = &result {
                tracing::error!(topic = %handle.topic(), partition = handle.partition(), %error, "partition was not closed in good order");
            }
            result.is_ok()
        });
        let clean = results.buffer_unordered(self.parallel).fold(true, |all, one| async move { all && one }).await;
        match self.checkpoint().await {
            Ok(()) => clean,
            Err(error) => {
                tracing::error!(%error, "the last checkpoints cannot be written");
                false
            }
        }
    }

    /// Lets the data folder go, and with it its lock; `clean`: with the marker that makes the next start skip recovery.
    /// False: there is no marker.
    pub(crate) async fn close_data_dir(&self, clean: bool) -> bool {
        let data_dir = self.data_dir.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(data_dir) = data_dir.and_then(Arc::into_inner).filter(|_| clean) else { return false };
        let closed = self.context.pool.run(move || data_dir.close_clean()).await;
        closed.inspect_err(|error| tracing::error!(%error, "the clean-shutdown marker cannot be written")).is_ok()
    }

    /// The recovery point of a partition as it stands on the disk; -1 if there is none yet.
    pub(crate) fn recovery_point(&self, handle: &PartitionHandle) -> i64 {
        let key = (handle.topic().to_string(), handle.partition());
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.recovery_points.get(&key).copied().unwrap_or(-1)
    }

    /// The data folder, until it is closed.
    pub(crate) fn data_dir(&self) -> Option<Arc<DataDir>> {
        self.data_dir.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Key, PartitionHandle>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Folders of partitions that the metadata does not assign are set aside, never opened: they may be all that is left of
/// something. Returns how many there are.
pub(crate) fn report_strays(data_dir: &DataDir, assigned: &[AssignedPartition]) -> Result<usize, IoFailure> {
    let known: BTreeMap<(&str, u32), TopicId> =
        assigned.iter().map(|assigned| ((&*assigned.topic, assigned.partition), assigned.topic_id)).collect();
    let mut strays = 0;
    for folder in data_dir.partitions()? {
        let expected = known.get(&(folder.topic.as_str(), folder.partition));
        if expected.is_none() {
            strays += 1;
            tracing::warn!(
                path = %folder.path.display(), topic_id = ?folder.topic_id,
                "folder of a partition that the metadata does not know; it is left alone"
            );
        }
    }
    Ok(strays)
}

fn open_error(error: &OpenError) -> PartitionError {
    match error {
        OpenError::FullDisk(full) => PartitionError::DiskFull(full.to_string().into()),
        error => fenced(error),
    }
}

/// Waits for `interval`; true if `shutdown` came before.
async fn paused(interval: Duration, shutdown: &CancellationToken) -> bool {
    tokio::time::timeout(interval, shutdown.cancelled()).await.is_ok()
}
