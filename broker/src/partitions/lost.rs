//! Replicas that a disk lost: what a broker finds of them before it registers, and how they are made anew.
//!
//! What was flushed is known outside of the partitions' folders too, so a folder that is gone, or a log that ends before that, is no
//! replica of an empty partition: it is named when the broker registers, and is in no ISR any more when the broker serves. Only
//! then is it healed, as a new follower: what is left of it is set aside, and a fresh log is fetched from whoever leads. Where nobody
//! else leads it stays as it is, for a person to look at.
//!
//! Owns: which replicas are lost, and the logs that were opened to learn it. Refuses: to say so (the registration does). Read next:
//! [`super`].

use super::{Key, Partitions};
use crate::clock::now_ms;
use crate::error::PartitionError;
use crate::partition::state::fenced;
use crate::partition::{AssignedPartition, PartitionHandle, log_config};
use crate::topic_config::TopicDurability;
use futures::{StreamExt, stream};
use headwater_storage::{DataDir, IoFailure, KeptReplica, Log, RecoveryReport, files};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError};

/// So many lost replicas are told of one by one.
const TOLD: usize = 20;

/// What was found of a replica.
pub(super) enum Found {
    /// Its log, and what the recovery did.
    Log(Box<Log>, RecoveryReport),
    /// It is damaged, or gone: why it is not served.
    Lost(PartitionError),
}

/// What the partitions were when the broker looked.
#[derive(Default)]
pub(super) struct Before {
    /// What was found; taken when a partition is opened.
    found: HashMap<Key, Found>,
    /// Lost ones that were named, and are not made anew yet.
    lost: HashSet<Key>,
}

/// A replica that has not what it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) key: Key,
    pub(crate) why: String,
}

/// What there is of one replica.
enum Examined {
    /// Nothing, and there never was more.
    New,
    /// Whoever opens it next learns more.
    Unknown,
    Whole(Box<Log>, RecoveryReport),
    /// The log is sound, and may lack what was acknowledged before it was flushed.
    Behind(Box<Log>, RecoveryReport, String),
    Lost(PartitionError, String),
}

impl Partitions {
    /// Opens the logs of the partitions that this broker is to keep, without serving any, and says which replicas are lost. `same_kernel`:
    /// the operating system has run all the time since the last broker here, so that what was written is there, but for `fenced` ones,
    /// whose disk may have failed to write it.
    pub(crate) async fn examine(
        &self,
        assigned: Vec<AssignedPartition>,
        same_kernel: bool,
        fenced: &HashSet<Key>,
    ) -> Vec<Lost> {
        let Some(data_dir) = self.data_dir() else { return Vec::new() };
        let mut examining = stream::iter(assigned)
            .map(|assigned| {
                let data_dir = Arc::clone(&data_dir);
                let key = (assigned.topic_id, assigned.partition);
                let is_written = same_kernel && !fenced.contains(&key);
                async move {
                    let name = format!("{}-{}", assigned.topic, assigned.partition);
                    (key, name, self.examine_one(data_dir, &assigned, is_written).await)
                }
            })
            .buffer_unordered(self.parallel);
        let mut all = Vec::new();
        while let Some((key, partition, examined)) = examining.next().await {
            let mut before = self.before();
            let why = match examined {
                Examined::New | Examined::Unknown => continue,
                Examined::Whole(log, report) => {
                    before.found.insert(key, Found::Log(log, report));
                    continue;
                }
                Examined::Behind(log, report, why) => {
                    before.found.insert(key, Found::Log(log, report));
                    why
                }
                Examined::Lost(error, why) => {
                    before.found.insert(key, Found::Lost(error));
                    before.lost.insert(key);
                    why
                }
            };
            if all.len() < TOLD {
                tracing::warn!(
                    partition,
                    why,
                    "a replica is lost: it is in sync no more, and is fetched from its leader; where nobody leads, `headwater cluster health` says what to do"
                );
            }
            all.push(Lost { key, why });
        }
        if all.len() > TOLD {
            tracing::warn!(replicas = all.len(), "that many replicas are lost");
        }
        all.sort_by_key(|lost| lost.key);
        all
    }

    async fn examine_one(&self, data_dir: Arc<DataDir>, assigned: &AssignedPartition, is_written: bool) -> Examined {
        let path = data_dir.partition_path(&assigned.topic, assigned.partition);
        let known = data_dir.replica(&assigned.topic, assigned.partition);
        let known = known.filter(|known| known.topic_id == assigned.topic_id);
        let others_keep_it = assigned.view.replicas.len() > 1;
        let is_replicated = assigned.config.durability == TopicDurability::Replicated;
        let folder = path.clone();
        let looking = Arc::clone(&data_dir);
        let is_there = self.context.pool.run(move || files::exists(&**looking.files(), &folder)).await;
        match is_there {
            Ok(true) => {}
            Ok(false) => {
                let had_some = match known {
                    // It is not known yet what was flushed in the last moments.
                    Some(known) => known.flushed > 0 || others_keep_it,
                    None => !data_dir.knows_replicas(),
                };
                let why = format!("its folder {} is gone", path.display());
                return if had_some { Examined::Lost(fenced(&why), why) } else { Examined::New };
            }
            // Opening it says why.
            Err(_) => return Examined::Unknown,
        }
        let was_clean = data_dir.was_clean();
        match self.open_log(data_dir, assigned, false).await {
            Ok((log, report)) => {
                let end = log.log_end_offset();
                match known.filter(|known| known.flushed > end) {
                    Some(KeptReplica { flushed, .. }) => {
                        let why = format!("its log ends at {end}, and was flushed up to {flushed}");
                        Examined::Lost(fenced(&why), why)
                    }
                    None if is_replicated && others_keep_it && !was_clean && !is_written => {
                        let why = "the machine or its disk went down without a flush of all that was acknowledged";
                        Examined::Behind(Box::new(log), report, why.to_owned())
                    }
                    None => Examined::Whole(Box::new(log), report),
                }
            }
            Err(error) if error.retryable() => Examined::Unknown,
            Err(error) => Examined::Lost(super::open_error(&error), error.to_string()),
        }
    }

    /// What was found of a partition that is opened now.
    pub(super) fn take_found(&self, assigned: &AssignedPartition) -> Option<Found> {
        let mut found = self.before().found.remove(&(assigned.topic_id, assigned.partition))?;
        if let Found::Log(log, _) = &mut found {
            log.set_config(log_config(&assigned.config, self.context.producer_id_expiration_ms));
        }
        Some(found)
    }

    /// What was found of partitions that are not assigned any more is of no use. To be called once all the others are open.
    pub(crate) async fn forget_found(&self) {
        let unused = std::mem::take(&mut self.before().found);
        self.context.pool.run(move || drop(unused)).await;
    }

    /// Lost replicas that somebody else leads, as the metadata say since they know of the loss: they are to be made anew.
    pub(super) fn to_heal<'a>(
        &self,
        open: &'a HashMap<Key, PartitionHandle>,
    ) -> impl Iterator<Item = &'a PartitionHandle> + use<'a> {
        let lost: Vec<Key> = self.before().lost.iter().copied().collect();
        let lost = lost.into_iter().filter_map(|key| open.get(&key));
        lost.filter(|handle| handle.view().heals(handle.me()))
    }

    /// Whether what a replica had is lost.
    pub(super) fn is_lost(&self, handle: &PartitionHandle) -> bool {
        self.before().lost.contains(&(handle.topic_id(), handle.partition()))
    }

    /// Counts a replica as lost, of which the metadata know that it is of no use.
    pub(super) fn count_as_lost(&self, handle: &PartitionHandle) {
        self.before().lost.insert((handle.topic_id(), handle.partition()));
    }

    /// Whether a replica is one of those that are to be made anew.
    pub(super) fn is_to_heal(&self, handle: &PartitionHandle) -> bool {
        self.is_lost(handle) && handle.view().heals(handle.me())
    }

    /// Sets aside what is left of a lost replica, so that it may be opened as a new one. False: it cannot be yet.
    pub(super) async fn make_way_for(&self, data_dir: Arc<DataDir>, assigned: &AssignedPartition) -> bool {
        let (topic, partition) = (Arc::clone(&assigned.topic), assigned.partition);
        let leader = assigned.view.leader.map_or(-1, |leader| leader.broker);
        let name = Arc::clone(&topic);
        match self.context.pool.run(move || make_way(&data_dir, &name, partition)).await {
            Ok(aside) => {
                self.before().lost.remove(&(assigned.topic_id, partition));
                tracing::info!(%topic, partition, leader, ?aside, "a lost replica is fetched from its leader");
                true
            }
            Err(error) => {
                tracing::warn!(%topic, partition, %error, "what is left of a lost replica cannot be set aside yet");
                false
            }
        }
    }

    fn before(&self) -> MutexGuard<'_, Before> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing is there of the partition any more, and nothing is known of it but that it is to be there.
fn make_way(data_dir: &DataDir, topic: &str, partition: u32) -> Result<Option<String>, IoFailure> {
    let path = data_dir.partition_path(topic, partition);
    let is_there = files::exists(&**data_dir.files(), &path);
    let is_there = is_there.map_err(|error| IoFailure { action: "look for", path: path.clone(), error })?;
    let aside =
        if is_there { Some(data_dir.set_aside(topic, partition, now_ms())?.display().to_string()) } else { None };
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.retain(|(other, number)| !(other == topic && *number == partition));
    });
    data_dir.write_checkpoints()?;
    Ok(aside)
}
