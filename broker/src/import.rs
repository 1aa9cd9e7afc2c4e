//! What `headwater import` left in the data folder becomes this broker's.
//!
//! First the journal takes the topics, then the groups their offsets, then the manifest is removed; clients are served
//! after that. Each step changes nothing the second time, so that a crash between them does no harm.
//!
//! Owns: the translation. Refuses: reading Kafka's files (`headwater_storage::import` did). Read next: [`crate::start`].

use crate::error::StartError;
use crate::group::{Committed, Groups};
use crate::metadata::MetadataState;
use crate::metadata::command::{Command, CreateTopic, ImportTopics, ImportedTopic, Replicas, command::Command as Kind};
use crate::topic_config::{self, TopicDefaults, TopicValues};
use headwater_storage::import::Manifest;
use std::collections::BTreeMap;

/// The command that makes imported topics known. An epoch is above every one that stands in its log.
///
/// # Errors
/// [`StartError::Import`] for a setting that topics do not have.
pub(crate) fn topics_command(
    manifest: &Manifest,
    broker_id: i32,
    created_ms: i64,
    defaults: &TopicDefaults,
) -> Result<Command, StartError> {
    let topic = |imported: &headwater_storage::import::ImportedTopic| {
        let given = imported.config.iter().map(|(key, value)| (key.clone(), Some(value.clone())));
        let config = topic_config::change(&TopicValues::new(), given, defaults)
            .map_err(|error| StartError::Import(format!("topic {}: {error}", imported.name)))?;
        let replicas = Replicas { brokers: vec![broker_id] };
        let create = CreateTopic {
            name: imported.name.clone(),
            topic_id: imported.topic_id.to_wire(),
            internal: false,
            partitions: vec![replicas; imported.leader_epochs.len()],
            config,
            created_ms,
            default_min_insync_replicas: defaults.min_insync_replicas(1),
        };
        let leader_epochs = imported.leader_epochs.iter().map(|epoch| epoch.saturating_add(1)).collect();
        Ok(ImportedTopic { topic: Some(create), leader_epochs })
    };
    let topics = manifest.topics.iter().map(topic).collect::<Result<_, StartError>>()?;
    Ok(Kind::ImportTopics(ImportTopics { topics, producer_ids_from: manifest.producer_ids_from }).into())
}

/// Commits what Kafka's groups had committed, where this broker's groups of those names know nothing better.
///
/// # Errors
/// [`StartError::Import`] if a commit cannot be kept.
pub(crate) async fn take_over_offsets(
    manifest: &Manifest,
    state: &MetadataState,
    groups: &Groups,
) -> Result<(), StartError> {
    let mut by_group: BTreeMap<&str, Vec<(String, u32, Committed)>> = BTreeMap::new();
    for found in &manifest.offsets {
        let Some(topic) = state.topic(&found.topic) else { continue };
        let committed = Committed {
            offset: found.offset,
            leader_epoch: found.leader_epoch,
            metadata: found.metadata.clone(),
            commit_time_ms: found.commit_timestamp_ms,
            topic_id: topic.id,
        };
        by_group.entry(&found.group).or_default().push((found.topic.clone(), found.partition, committed));
    }
    for (group, offsets) in by_group {
        let kept = groups.take_over(group, offsets).await;
        kept.map_err(|error| StartError::Import(format!("offsets of group {group}: {error}")))?;
    }
    Ok(())
}
