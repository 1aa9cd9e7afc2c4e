//! Compaction of the logs of topics with `cleanup.policy=compact`: one log after another, on one thread of the I/O pool.
//!
//! Planning and putting the new segments in place need the log's write half for a moment; the work between them needs
//! none, so appends and readers go on. A log that is stuck keeps none of the others waiting. How far each log is clean stands
//! in Kafka's `cleaner-offset-checkpoint`.
//! Owns: when, and that checkpoint. Refuses: what stays of a log (storage decides). Read next: `storage/src/compaction/`.

use crate::clock::now_ms;
use crate::error::PartitionError;
use crate::partition::PartitionHandle;
use crate::partitions::Partitions;
use crate::pool::Pool;
use crate::rounds::{Pulse, Rounds};
use futures::FutureExt;
use headwater_storage::{CompactionError, CompactionStats, Log};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub(crate) struct Cleaner {
    pub(crate) partitions: Arc<Partitions>,
    pub(crate) pool: Pool,
    /// Memory for keys.
    pub(crate) memory_bytes: usize,
    /// Time between two looks at all logs.
    pub(crate) backoff: Duration,
    pub(crate) shutdown: CancellationToken,
}

impl Cleaner {
    /// Compacts what is worth it, until the broker shuts down.
    pub(crate) async fn run(self) {
        let mut rounds = Rounds::default();
        while !rounds.pause(self.backoff, &self.shutdown).await {
            for handle in self.partitions.all() {
                let key = (handle.topic_id(), handle.partition());
                if !handle.config().cleanup_compact || handle.ended().is_some() || rounds.is_stuck(&key) {
                    continue;
                }
                let pulse = Arc::new(Pulse::default());
                let work = self.attempt(handle.clone(), Arc::clone(&pulse)).map(move |()| key).boxed();
                if !rounds.attend(key, work, &pulse).await {
                    let (topic, partition) = (handle.topic(), handle.partition());
                    tracing::warn!(%topic, partition, "compaction waits for the log, and goes on with the others");
                }
                if self.shutdown.is_cancelled() {
                    return;
                }
            }
        }
    }

    async fn attempt(&self, handle: PartitionHandle, pulse: Arc<Pulse>) {
        let (topic, partition) = (handle.topic(), handle.partition());
        match self.compact(&handle, pulse).await {
            Ok(None) | Err(PartitionError::Deleted | PartitionError::ShuttingDown) => {}
            Ok(Some((until, stats))) => tracing::info!(%topic, partition, until, ?stats, "log compacted"),
            Err(error) => tracing::warn!(%topic, partition, %error, "compaction failed and is tried again"),
        }
    }

    /// Compacts one log if it is worth it. Returns up to where it is clean.
    async fn compact(
        &self,
        handle: &PartitionHandle,
        pulse: Arc<Pulse>,
    ) -> Result<Option<(i64, CompactionStats)>, PartitionError> {
        // Whoever deletes the partition waits for this, so that nothing is written into the folder of its successor, or said
        // of it in the checkpoint.
        let _compacting = handle.compacting().lock().await;
        let cleaned_until = self.partitions.cleaned_until(handle);
        let compactable = handle.offsets().compactable();
        let plan = handle.with_log(move |log| log.plan_compaction(now_ms(), compactable, cleaned_until)).await?;
        let Some(plan) = plan else { return Ok(None) };
        let (memory_bytes, stop, watched) = (self.memory_bytes, self.shutdown.clone(), handle.clone());
        pulse.queue();
        let cancelled = move || {
            pulse.beat();
            stop.is_cancelled() || watched.ended().is_some()
        };
        let result = match self.pool.run_long(move || plan.run(memory_bytes, &cancelled)).await {
            Ok(result) => result,
            Err(CompactionError::Cancelled | CompactionError::Departed) => return Ok(None),
            Err(CompactionError::Corruption(damage)) => return Err(handle.fence(&damage)),
            Err(error) => return Err(PartitionError::Internal(error.to_string().into())),
        };
        let (until, stats) = (result.cleaned_until(), result.stats());
        // Segments are replaced only below the recovery point that stands on the disk.
        let written = self.partitions.checkpoint().await;
        let recovery_point = self.partitions.recovery_point(handle);
        if written.is_err() || recovery_point < until {
            let discard = move |log: &mut Log| {
                log.discard_compaction(result);
                Ok(())
            };
            return handle.with_log(discard).await.map(|()| None);
        }
        let until = handle.with_log(move |log| log.install(result, recovery_point)).await?;
        self.partitions.cleaned(handle, until).await;
        Ok(Some((until, stats)))
    }
}
