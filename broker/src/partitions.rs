//! All partitions of this broker: opening, finding, looking after and closing them.
//!
//! Owns: which partitions are open, their folders and checkpoints, and the periodic work (retention, age rolls, expiry of
//! producers, compaction, checkpoints). A partition that cannot be opened is fenced, named in the log, and keeps no other
//! from being served. Refuses: to decide which partitions there are; the metadata does, through [`Partitions::direct`].
//! Read next: [`keeping`], then [`crate::partition`].

mod healing;
mod keeping;
mod lost;
mod strays;

pub(crate) use lost::Lost;
pub(crate) use strays::{Strays, set_strays_aside};

use crate::clock::now_ms;
use crate::config::BrokerConfig;
use crate::disk::DiskHealth;
use crate::error::PartitionError;
use crate::lease::Lease;
use crate::metadata::MetadataHandle;
use crate::metrics::{Counted, Metrics};
use crate::partition::state::{Offsets, fenced};
use crate::partition::{AssignedPartition, Noted, PartitionContext, PartitionHandle, log_config};
use crate::peer::Peers;
use crate::pool::Pool;
use crate::replica::links::Replication;
use crate::rounds::{Key, Pulse, Rounds};
use futures::{FutureExt, StreamExt, stream};
use headwater_proto::TopicId;
use headwater_storage::{
    DataDir, IoFailure, KeptReplica, Log, LogError, LogIdentity, OpenError, RecoveryProgress, RecoveryReport,
};
use healing::Tries;
use keeping::{Folder, Kept};
use lost::{Before, Found};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// So many times as long as checkpoints took to be written, no others are written.
const REST_OF_CHECKPOINTS: u32 = 10;

/// The data folder, until it is closed.
#[derive(Clone)]
pub(crate) struct DataRoot(Arc<Mutex<Option<Arc<DataDir>>>>);

impl DataRoot {
    pub(crate) fn new(data_dir: Arc<DataDir>) -> DataRoot {
        DataRoot(Arc::new(Mutex::new(Some(data_dir))))
    }

    pub(crate) fn get(&self) -> Option<Arc<DataDir>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn take(&self) -> Option<Arc<DataDir>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A log, with its high watermark and the unclean elections that it has taken in; or why it cannot be served, and what is known of it.
type OpenedLog = Result<(Log, i64, u32), (PartitionError, Offsets)>;

/// The partitions that this broker keeps.
pub(crate) struct Partitions {
    context: PartitionContext,
    /// Threads of the pool: so many partitions are opened or closed at once.
    parallel: usize,
    kept: Mutex<Kept>,
    /// Held by whoever finishes what the metadata ask for.
    applying: tokio::sync::Mutex<()>,
    /// There is something to finish.
    changed: Notify,
    /// How often something was brought about that the metadata ask for.
    applied: watch::Sender<u64>,
    /// How far the recoveries are.
    recovery: Arc<RecoveryProgress>,
    /// Held while checkpoints are made.
    checkpointing: tokio::sync::Mutex<()>,
    /// What the partitions were before the broker registered.
    before: Mutex<Before>,
    /// When damaged replicas were made anew.
    tries: Mutex<Tries>,
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
            replica_lag_time_max_ms: config.replica_lag_time_max_ms,
            lease: Lease::unlimited(),
            disk: Arc::new(DiskHealth::new(Duration::from_millis(config.flush_timeout_ms))),
            root: DataRoot::new(data_dir),
            trimmed: Arc::default(),
            replication: Arc::default(),
        };
        Partitions {
            context,
            parallel: threads,
            kept: Mutex::default(),
            applying: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            applied: watch::Sender::new(0),
            recovery: Arc::default(),
            checkpointing: tokio::sync::Mutex::default(),
            before: Mutex::default(),
            tries: Mutex::default(),
        }
    }

    /// Joins the cluster: from here on partitions that others lead are followed. To be called before the first
    /// [`apply`](Self::apply).
    pub(crate) fn join(&self, peers: Peers, config: &BrokerConfig) {
        let replication = Replication::new(peers, config, Arc::clone(&self.context.metrics));
        // There is one cluster.
        drop(self.context.replication.set(replication));
    }

    /// Tells of the metadata: where brokers are, and who takes what leaders propose.
    pub(crate) fn learn_from(&self, metadata: &MetadataHandle) {
        if let Some(replication) = self.context.replication.get() {
            replication.learn_from(metadata.clone());
        }
    }

    /// The broker's lease. Whoever reads what only the leader of a partition may say looks at it after it has read.
    pub(crate) fn lease(&self) -> &Lease {
        &self.context.lease
    }

    /// What the disk does to the replicas.
    pub(crate) fn disk(&self) -> &Arc<DiskHealth> {
        &self.context.disk
    }

    /// A partition, if this broker leads it.
    pub(crate) fn get(&self, topic_id: &TopicId, partition: u32) -> Option<PartitionHandle> {
        self.replica(topic_id, partition).filter(PartitionHandle::is_leader)
    }

    /// A partition, if this broker keeps it.
    pub(crate) fn replica(&self, topic_id: &TopicId, partition: u32) -> Option<PartitionHandle> {
        self.kept().open.get(&(*topic_id, partition)).cloned()
    }

    /// Every partition that this broker keeps.
    pub(crate) fn all(&self) -> Vec<PartitionHandle> {
        self.kept().open.values().cloned().collect()
    }

    /// How far the recoveries since the start are.
    pub(crate) fn recovery(&self) -> &RecoveryProgress {
        &self.recovery
    }

    /// Tells whenever what this broker keeps, or leads, has been brought in line with the metadata.
    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    /// Nothing that the checkpoints say of these partitions counts any more.
    async fn forget(&self, data_dir: Arc<DataDir>, gone: impl Iterator<Item = &Folder>) {
        let gone: HashSet<_> = gone.map(|(topic, partition)| (topic.to_string(), *partition)).collect();
        data_dir.update_checkpoints(|checkpoints| checkpoints.retain(|key| !gone.contains(key)));
        if let Err(error) = self.context.pool.run(move || data_dir.write_checkpoints()).await {
            // On a full disk the folders are removed all the same. No partition of these names is opened before it is done.
            tracing::warn!(%error, "checkpoints still name deleted partitions; they are written again");
        }
    }

    async fn remove(&self, data_dir: Arc<DataDir>, (topic, partition): &Folder, topic_id: TopicId) {
        let (name, partition) = (Arc::clone(topic), *partition);
        let removed = self.context.pool.run_long(move || data_dir.remove_partition(&name, partition, topic_id)).await;
        match removed {
            Ok(()) => tracing::info!(%topic, partition, "partition deleted"),
            // What is left is cleared away at the next start, or becomes a stray.
            Err(error) => tracing::error!(%topic, partition, %error, "partition's folder cannot be deleted"),
        }
    }

    /// Before anything is taken in for a partition it is known that it is kept here, whatever becomes of its folder.
    async fn announce(&self, data_dir: &Arc<DataDir>, new: impl Iterator<Item = &AssignedPartition>) {
        data_dir.update_checkpoints(|checkpoints| {
            for it in new {
                let kept = KeptReplica { topic_id: it.topic_id, flushed: 0, unclean_taken: 0 };
                checkpoints.replicas.insert((it.topic.to_string(), it.partition), kept);
            }
        });
        let data_dir = Arc::clone(data_dir);
        if let Err(error) = self.context.pool.run(move || data_dir.write_checkpoints()).await {
            tracing::warn!(%error, "it is not written down yet which replicas are kept here; it is tried again");
        }
    }

    async fn open_log(
        &self,
        data_dir: Arc<DataDir>,
        assigned: &AssignedPartition,
        created: bool,
    ) -> Result<(Log, RecoveryReport), OpenError> {
        let _recovering = Counted::new(&self.context.metrics.partitions_recovering);
        let identity = LogIdentity {
            topic: assigned.topic.to_string(),
            topic_id: assigned.topic_id,
            partition: assigned.partition,
        };
        let config = log_config(&assigned.config, self.context.producer_id_expiration_ms);
        let progress = Arc::clone(&self.recovery);
        let opening = move || {
            let path = data_dir.partition_path(&identity.topic, identity.partition);
            let hints = data_dir.admit(&identity.topic, identity.partition, identity.topic_id, created, now_ms())?;
            let files = Arc::clone(data_dir.files());
            Log::open_watched(files, &path, identity, config, hints, now_ms(), &progress)
        };
        self.context.pool.run(opening).await
    }

    async fn open_one(&self, data_dir: Arc<DataDir>, assigned: &AssignedPartition, created: bool) -> OpenedLog {
        // Its checkpoints stay as they are where it cannot be opened, so that the next recovery knows as much as this one did.
        let known_offsets = |data_dir: &DataDir| {
            let hints = data_dir.hints(&assigned.topic, assigned.partition);
            Offsets {
                log_start: hints.log_start_offset,
                high_watermark: hints.log_start_offset.max(hints.recovery_point),
                log_end: hints.log_start_offset.max(hints.recovery_point),
                flushed: hints.recovery_point,
            }
        };
        let opened = match self.take_found(assigned) {
            Some(Found::Log(log, report)) => Ok((*log, report)),
            Some(Found::Lost(why)) => return Err((why, known_offsets(&data_dir))),
            None => self.open_log(Arc::clone(&data_dir), assigned, created).await,
        };
        match opened {
            Ok((log, report)) => {
                // A new log has nothing to recover.
                if !report.clean && report.scanned_bytes > 0 {
                    tracing::info!(topic = %assigned.topic, partition = assigned.partition, ?report, "partition recovered");
                }
                let known = data_dir.replica(&assigned.topic, assigned.partition);
                let unclean_taken = known.map_or(0, |known| known.unclean_taken);
                Ok((log, data_dir.high_watermark(&assigned.topic, assigned.partition), unclean_taken))
            }
            Err(error) => {
                let (topic, partition) = (&assigned.topic, assigned.partition);
                match error.retryable() {
                    false => tracing::error!(
                        %topic, partition, %error, "partition cannot be opened and is fenced; every other is served"
                    ),
                    // It is tried again each second, and told once.
                    true if self.replica(&assigned.topic_id, partition).is_some() => {}
                    true => tracing::error!(
                        %topic, partition, %error, "partition cannot be opened yet and is tried again; every other is served"
                    ),
                }
                Err((open_error(&error), known_offsets(&data_dir)))
            }
        }
    }

    /// Writes down how far each log is flushed, where it begins, and its high watermark, where that changed.
    pub(crate) async fn checkpoint(&self) -> Result<(), IoFailure> {
        let _one_at_a_time = self.checkpointing.lock().await;
        let Some(data_dir) = self.data_dir() else { return Ok(()) };
        // Most of the time, and with most partitions, nothing changed: that must cost next to nothing.
        let noted: Vec<(PartitionHandle, Noted)> = {
            let kept = self.kept();
            let is_changed = |handle: &&PartitionHandle| !handle.is_noted(&Noted::of(handle));
            let changed: Vec<_> = kept.open.values().filter(is_changed).collect();
            if changed.is_empty() && !data_dir.has_unwritten_checkpoints() {
                return Ok(());
            }
            let mut noted = Vec::with_capacity(changed.len());
            // Under the lock of what is open, so that nothing which was let go of meanwhile is named again, nor what is made anew; and each
            // anew under that of the checkpoints, where whoever cuts a log says so first.
            data_dir.update_checkpoints(|checkpoints| {
                for handle in changed {
                    if handle.is_cutting() || kept.is_opening_anew(handle) {
                        continue;
                    }
                    let now @ Noted { offsets, unclean_taken } = Noted::of(handle);
                    noted.push((handle.clone(), now));
                    let key = (handle.topic().to_string(), handle.partition());
                    checkpoints.recovery_points.insert(key.clone(), offsets.flushed);
                    checkpoints.log_start_offsets.insert(key.clone(), offsets.log_start);
                    checkpoints.high_watermarks.insert(key.clone(), offsets.high_watermark);
                    // What is known of one that cannot be served is what it was before.
                    if handle.ended().is_none_or(|why| matches!(why, PartitionError::ShuttingDown)) {
                        let (topic_id, flushed) = (handle.topic_id(), offsets.flushed);
                        checkpoints.replicas.insert(key, KeptReplica { topic_id, flushed, unclean_taken });
                    }
                }
            });
            noted
        };
        self.context.pool.run(move || data_dir.write_checkpoints()).await?;
        for (handle, now) in noted {
            handle.start_is_kept(now.offsets.log_start);
            handle.note(now);
        }
        Ok(())
    }

    /// Deletes the records of a partition below `before`, or below the high watermark if `before` is -1. Returns where the log
    /// begins, once the checkpoint of that is on stable storage here and at every replica in sync, which are as many as an acknowledgement
    /// needs: no crash and no election brings the records back.
    ///
    /// # Errors
    /// [`PartitionError`]. Where only the checkpoint could not be written, asking again writes it.
    pub(crate) async fn delete_records(&self, handle: &PartitionHandle, before: i64) -> Result<i64, PartitionError> {
        let log_start = handle.delete_records(before).await?;
        match self.checkpoint().await {
            Ok(()) => handle.start_kept_everywhere(log_start).await.map(|()| log_start),
            Err(failure) => {
                let why = format!("the log begins at {log_start} now, but after a crash it may not: {failure}");
                Err(match LogError::from(failure) {
                    LogError::FullDisk(_) => PartitionError::DiskFull(why.into()),
                    error if error.retryable() => PartitionError::Exhausted(why.into()),
                    _ => PartitionError::Internal(why.into()),
                })
            }
        }
    }

    /// Up to where the log of a partition is clean, as the cleaner's checkpoint has it.
    pub(crate) fn cleaned_until(&self, handle: &PartitionHandle) -> Option<i64> {
        self.data_dir()?.cleaned_until(handle.topic(), handle.partition())
    }

    /// Notes down up to where the log of a partition is clean. The caller holds [`PartitionHandle::compacting`], so that the
    /// partition is not forgotten before.
    pub(crate) async fn cleaned(&self, handle: &PartitionHandle, until: i64) {
        let Some(data_dir) = self.data_dir() else { return };
        let key = (handle.topic().to_string(), handle.partition());
        data_dir.update_checkpoints(|checkpoints| {
            checkpoints.cleaner_offsets.insert(key, until);
        });
        if let Err(error) = self.context.pool.run(move || data_dir.write_checkpoints()).await {
            tracing::warn!(%error, "the cleaner's checkpoint cannot be written; some work is done again");
        }
    }

    /// Writes checkpoints down at their interval, and at once what a follower deleted, until `shutdown`.
    pub(crate) async fn keep_checkpoints(&self, interval: Duration, shutdown: CancellationToken) {
        let mut failing = false;
        let mut round_at = Instant::now() + interval;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = sleep_until(round_at) => {
                    self.give_up_damaged().await;
                    self.retry();
                    round_at = Instant::now() + interval;
                }
                () = self.context.trimmed.notified() => {}
            }
            let began = Instant::now();
            match self.checkpoint().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::error!(%error, "checkpoints cannot be written; a recovery would scan more");
                }
                Err(_) => {}
            }
            // Retention deletes in many partitions, one after another: that must not keep the disk busy with what it writes for each.
            let rest = began.elapsed().saturating_mul(REST_OF_CHECKPOINTS).min(interval);
            if paused(rest, &shutdown).await {
                return;
            }
        }
    }

    /// Retention, age rolls and expiry of producers, at their interval, until `shutdown`.
    pub(crate) async fn enforce_retention(&self, interval: Duration, shutdown: CancellationToken) {
        let mut rounds = Rounds::default();
        while !rounds.pause(interval, &shutdown).await {
            for handle in self.all() {
                let key = (handle.topic_id(), handle.partition());
                if handle.ended().is_some() || rounds.is_stuck(&key) {
                    continue;
                }
                let work = enforce_retention_of(handle.clone()).map(move |()| key).boxed();
                if !rounds.attend(key, work, &Pulse::default()).await {
                    let (topic, partition) = (handle.topic(), handle.partition());
                    tracing::warn!(%topic, partition, "retention waits for the log, and goes on with the others");
                }
            }
        }
    }

    /// Closes every log and writes the last checkpoints. True: everything was closed in good order.
    pub(crate) async fn close(&self) -> bool {
        let before = self.close_doors();
        let mut clean = self.close_each(before.values().cloned()).await;
        // What was let go of is gone, and what was being opened is open.
        let _one_at_a_time = self.applying.lock().await;
        let is_new = |(key, handle): &(Key, PartitionHandle)| before.get(key).is_none_or(|known| !known.is(handle));
        let since: Vec<_> = self.close_doors().into_iter().filter(is_new).map(|(_, handle)| handle).collect();
        clean &= self.close_each(since.into_iter()).await;
        match self.checkpoint().await {
            Ok(()) => clean,
            Err(error) => {
                tracing::error!(%error, "the last checkpoints cannot be written");
                false
            }
        }
    }

    async fn close_each(&self, handles: impl Iterator<Item = PartitionHandle>) -> bool {
        let results = stream::iter(handles).map(|handle| async move {
            let result = handle.close().await;
            if let Err(error) = &result {
                tracing::error!(topic = %handle.topic(), partition = handle.partition(), %error, "partition was not closed in good order");
            }
            result.is_ok()
        });
        results.buffer_unordered(self.parallel).fold(true, |all, one| async move { all && one }).await
    }

    /// Lets the data folder go, and with it its lock; `clean`: with the marker that makes the next start skip recovery.
    /// False: there is no marker.
    pub(crate) async fn close_data_dir(&self, clean: bool) -> bool {
        let Some(data_dir) = self.context.root.take().and_then(Arc::into_inner).filter(|_| clean) else { return false };
        let closed = self.context.pool.run(move || data_dir.close_clean()).await;
        closed.inspect_err(|error| tracing::error!(%error, "the clean-shutdown marker cannot be written")).is_ok()
    }

    /// The recovery point of a partition as it stands on the disk; -1 if there is none yet.
    pub(crate) fn recovery_point(&self, handle: &PartitionHandle) -> i64 {
        let written =
            self.data_dir().and_then(|data_dir| data_dir.written_recovery_point(handle.topic(), handle.partition()));
        written.unwrap_or(-1)
    }

    /// The data folder, until it is closed.
    pub(crate) fn data_dir(&self) -> Option<Arc<DataDir>> {
        self.context.root.get()
    }

    fn tries(&self) -> MutexGuard<'_, Tries> {
        self.tries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn enforce_retention_of(handle: PartitionHandle) {
    let high_watermark = handle.offsets().high_watermark;
    let leads = handle.is_leader();
    let done = handle.with_log(move |log| {
        let now = now_ms();
        log.expire_producers(now);
        // The leader decides what goes, and followers learn of it.
        if !leads {
            return Ok(None);
        }
        log.roll_if_due(now)?;
        log.enforce_retention(now, high_watermark)
    });
    let (topic, partition) = (handle.topic(), handle.partition());
    match done.await {
        Ok(Some(log_start)) => tracing::info!(%topic, partition, log_start, "old segments deleted"),
        Ok(None) | Err(PartitionError::Deleted | PartitionError::ShuttingDown) => {}
        Err(error) => tracing::warn!(%topic, partition, %error, "retention failed and is tried again"),
    }
}

fn open_error(error: &OpenError) -> PartitionError {
    match error {
        OpenError::FullDisk(full) => PartitionError::DiskFull(full.to_string().into()),
        error if error.retryable() => PartitionError::Exhausted(error.to_string().into()),
        error => fenced(error),
    }
}

/// Waits for `interval`; true if `shutdown` came before.
async fn paused(interval: Duration, shutdown: &CancellationToken) -> bool {
    tokio::time::timeout(interval, shutdown.cancelled()).await.is_ok()
}

#[cfg(test)]
#[path = "partitions_tests.rs"]
mod tests;
