//! Strays: folders of partitions that the metadata does not assign to this broker.
//!
//! They may be all that is left of something, or a deletion was cut short: they are set aside when the broker starts, reported, never
//! opened, and deleted after a while. Their names are free again, and nothing that the checkpoints say of them counts.
//!
//! Owns: that. Refuses: to decide what is assigned (the metadata does).

use super::{Partitions, paused};
use crate::clock::now_ms;
use crate::partition::{AssignedPartition, is_of_another_topic};
use headwater_proto::TopicId;
use headwater_storage::{DataDir, IoFailure};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How often it is looked for strays.
const SHORTEST_ROUND: Duration = Duration::from_millis(100);
const LONGEST_ROUND: Duration = Duration::from_secs(60);

/// What makes a folder a stray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strays {
    /// Its name: whoever is alone has no other replica, and a folder that names another topic is damaged.
    ByName,
    /// Its name, or the topic id in it: the topic that it belonged to was deleted meanwhile.
    ByTopic,
}

/// Sets strays aside.
///
/// # Errors
/// [`IoFailure`]: the folders cannot be listed.
pub(crate) fn set_strays_aside(
    data_dir: &DataDir,
    assigned: &[AssignedPartition],
    by: Strays,
) -> Result<(), IoFailure> {
    let known: HashMap<(&str, u32), TopicId> =
        assigned.iter().map(|assigned| ((&*assigned.topic, assigned.partition), assigned.topic_id)).collect();
    let (mut strays, mut of_another) = (Vec::new(), Vec::new());
    for folder in data_dir.partitions()? {
        match known.get(&(folder.topic.as_str(), folder.partition)) {
            None => strays.push(folder),
            Some(id) if by == Strays::ByTopic && is_of_another_topic(folder.topic_id, *id) => {
                of_another.push((folder.topic.clone(), folder.partition));
                strays.push(folder);
            }
            Some(_) => {}
        }
    }
    data_dir.update_checkpoints(|checkpoints| {
        checkpoints.retain(|(topic, partition)| known.contains_key(&(topic.as_str(), *partition)));
        // What is known of the replica itself says which topic it is of.
        let replicas = checkpoints.replicas.clone();
        checkpoints.retain(|key| !of_another.contains(key));
        let is_ours = |(key, kept): &(&(String, u32), &headwater_storage::KeptReplica)| {
            known.get(&(key.0.as_str(), key.1)) == Some(&kept.topic_id)
        };
        checkpoints.replicas = replicas.iter().filter(is_ours).map(|(key, kept)| (key.clone(), *kept)).collect();
    });
    if let Err(error) = data_dir.write_checkpoints() {
        tracing::warn!(%error, "checkpoints name partitions that are no more; they are written again");
    }
    for folder in strays {
        let (path, topic_id) = (folder.path.display(), folder.topic_id);
        match data_dir.set_aside(&folder.topic, folder.partition, now_ms()) {
            Ok(aside) => tracing::warn!(
                %path, ?topic_id, aside = %aside.display(), "folder of a partition that the metadata does not know set aside"
            ),
            Err(error) => {
                tracing::error!(%path, ?topic_id, %error, "folder of a partition that the metadata does not know cannot be set aside")
            }
        }
    }
    Ok(())
}

impl Partitions {
    /// Deletes what was set aside once it has lain there for `delay`, until `shutdown`.
    ///
    /// While `is_kept`, nothing is: the metadata may have forgotten topics that were never deleted, of which these are all that is left. Each
    /// is told once, and is a person's to delete.
    pub(crate) async fn delete_strays(&self, delay: Duration, is_kept: impl Fn() -> bool, shutdown: CancellationToken) {
        let mut due: BTreeMap<PathBuf, Instant> = BTreeMap::new();
        let mut told: BTreeSet<PathBuf> = BTreeSet::new();
        let mut pause = SHORTEST_ROUND;
        while !paused(pause, &shutdown).await {
            let Some(data_dir) = self.data_dir() else { return };
            let mut known = std::mem::take(&mut due);
            let (is_kept, mut kept) = (is_kept(), std::mem::take(&mut told));
            let round = move || {
                let (now, time_ms) = (Instant::now(), now_ms());
                for (path, aside_ms) in data_dir.strays()? {
                    let at = known.remove(&path).unwrap_or_else(|| now + remaining(delay, aside_ms, time_ms));
                    if now < at {
                        due.insert(path, at);
                        continue;
                    }
                    if is_kept {
                        due.insert(path.clone(), at);
                        if !kept.contains(&path) {
                            tracing::warn!(
                                path = %path.display(),
                                "what was set aside is kept: these metadata were recovered without their majority (`headwater cluster unsafe-recover`) and may have forgotten its topic; delete the folder once it is of no use"
                            );
                            kept.insert(path);
                        }
                        continue;
                    }
                    match data_dir.remove_stray(&path) {
                        Ok(()) => tracing::info!(path = %path.display(), "what was set aside is deleted"),
                        Err(error) => {
                            tracing::warn!(path = %path.display(), %error, "what was set aside cannot be deleted yet");
                            due.insert(path, at);
                        }
                    }
                }
                Ok::<_, IoFailure>((due, kept))
            };
            match self.context.pool.run_long(round).await {
                Ok(still_there) => (due, told) = still_there,
                Err(error) => {
                    tracing::warn!(%error, "folders that were set aside cannot be listed");
                    due = BTreeMap::new();
                }
            }
            // Those that are due and still there are kept, or cannot be deleted yet.
            let (now, others) = (Instant::now(), delay.clamp(SHORTEST_ROUND, LONGEST_ROUND));
            let next = due.values().filter(|at| **at > now).min().map_or(others, |at| *at - now);
            pause = next.clamp(SHORTEST_ROUND, others);
        }
    }
}

/// How long a stray is left where it is from now on, which is when this process sees it first: clocks may be wrong, so what its name says
/// of its time is asked this once, and a person has an hour of each day of the delay to see it in any case.
fn remaining(delay: Duration, aside_ms: Option<i64>, now_ms: i64) -> Duration {
    let lain = aside_ms.and_then(|aside_ms| u64::try_from(now_ms.checked_sub(aside_ms)?).ok());
    delay.saturating_sub(Duration::from_millis(lain.unwrap_or(0))).max(delay / 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stray_is_seen_for_a_while_whatever_the_clock_says() {
        let (hour, day) = (Duration::from_secs(3_600), Duration::from_secs(86_400));
        let hours = |count: i64| count * 3_600_000;
        let now = hours(500_000);
        for (aside, left) in [
            (None, day),
            (Some(now), day),
            (Some(now - hours(20)), 4 * hour),
            (Some(now - hours(30)), hour),
            // The clock of 1970, and one that goes ahead.
            (Some(0), hour),
            (Some(i64::MIN), day),
            (Some(now + hours(5)), day),
        ] {
            assert_eq!(remaining(day, aside, now), left, "{aside:?}");
        }
    }
}
