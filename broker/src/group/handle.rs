//! How everybody else reaches the groups.
//!
//! Owns: [`Groups`], which finds the shard of a group by Kafka's rule, and [`MemberStream`], a joined member's end of
//! its stream. Refuses: decisions. Read next: [`super::task`].

use super::GroupError;
use super::offsets::{CommitEntry, Committed, EntryError};
use super::state::{Group, Join, Report, check_name};
use super::task::{GroupContext, Joined, Listed, MemberView, OwnedSpeaker, Request, Shard, Tell, WAITING_REQUESTS};
use crate::clock::now_ms;
use crate::config::BrokerConfig;
use crate::error::StartError;
use crate::metadata::command::{CreateTopic, Replicas, command::Command as Kind};
use crate::metadata::handle::new_topic_id;
use crate::metadata::name::OFFSETS_TOPIC;
use crate::metadata::{MetadataError, MetadataHandle, Topic};
use crate::metrics::Samples;
use crate::partitions::Partitions;
use crate::pool::Pool;
use crate::topic_config::{self, TopicValues};
use futures::future::join_all;
use headwater_storage::offsets_schema::partition_of_group;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The settings of the offsets topic: Kafka's, and room for a batch that holds all records of one event.
const OFFSETS_TOPIC_CONFIG: [(&str, &str); 3] =
    [("cleanup.policy", "compact"), ("segment.bytes", "104857600"), ("max.message.bytes", "67108864")];

/// Time for a shard to tell what was committed, for the metrics.
const SAMPLES_TIMEOUT: Duration = Duration::from_secs(1);

/// All groups of this broker.
#[derive(Clone)]
pub(crate) struct Groups {
    /// `None` where another broker leads the partition of the offsets topic.
    shards: Arc<[Option<mpsc::Sender<Request>>]>,
    metadata: MetadataHandle,
    partitions: Arc<Partitions>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// A joined member's end. When it is dropped without [`leave`](MemberStream::leave), the member stays in its group until
/// its session ends, or until it opens another stream.
pub(crate) struct MemberStream {
    shard: mpsc::Sender<Request>,
    group: String,
    member: String,
    stream_id: u64,
    /// What the member is to be told.
    pub(crate) view: watch::Receiver<MemberView>,
    /// How often it should report.
    pub(crate) heartbeat_interval_ms: u32,
}

impl Groups {
    /// Makes the offsets topic if there is none, and starts a task for each of its partitions that this broker leads. Requests wait
    /// until the groups of their partition were read.
    ///
    /// # Errors
    /// [`StartError`] if the topic cannot be made.
    pub(crate) async fn start(
        config: &BrokerConfig,
        metadata: MetadataHandle,
        partitions: Arc<Partitions>,
        pool: Pool,
    ) -> Result<Groups, StartError> {
        let topic = offsets_topic(config, &metadata).await?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let context = GroupContext {
            settings: config.groups.clone(),
            metadata: metadata.clone(),
            pool,
            logs: Arc::clone(&partitions),
            stop: stop.clone(),
        };
        let mut shards = Vec::with_capacity(topic.partitions.len());
        for (number, _) in (0u32..).zip(&topic.partitions) {
            let Some(partition) = partitions.get(&topic.id, number) else {
                shards.push(None);
                continue;
            };
            let (shard, requests) = mpsc::channel(WAITING_REQUESTS);
            tasks.spawn(Shard::new(context.clone(), partition).run(requests));
            shards.push(Some(shard));
        }
        tasks.close();
        Ok(Groups { shards: shards.into(), metadata, partitions, stop, tasks })
    }

    /// The groups of a broker that coordinates none.
    pub(crate) fn none(metadata: MetadataHandle, partitions: Arc<Partitions>) -> Groups {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        tasks.close();
        Groups { shards: Arc::new([]), metadata, partitions, stop, tasks }
    }

    /// The metadata that say which groups there may be.
    pub(crate) fn metadata(&self) -> &MetadataHandle {
        &self.metadata
    }

    /// Keeps and answers what was decided, refuses the rest, and ends the members' streams.
    pub(crate) async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }

    /// A member opens its stream.
    ///
    /// # Errors
    /// [`GroupError`]: the member is not in the group, unless an earlier stream of it is.
    pub(crate) async fn join(&self, group: &str, join: Join) -> Result<MemberStream, GroupError> {
        let (shard, member) = (self.shard(group)?.clone(), join.member_id.clone());
        let name = group.to_owned();
        let Joined { stream_id, view, heartbeat_interval_ms } =
            ask(&shard, |tell| Request::Join { group: name, join, tell }).await?;
        Ok(MemberStream { shard, group: group.to_owned(), member, stream_id, view, heartbeat_interval_ms })
    }

    /// Commits; each entry's result in its place.
    ///
    /// # Errors
    /// [`GroupError`] if the speaker may not commit, or the commit was not kept.
    pub(crate) async fn commit(
        &self,
        group: &str,
        speaker: OwnedSpeaker,
        entries: Vec<CommitEntry>,
    ) -> Result<Vec<Result<(), EntryError>>, GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::Commit { group: name, speaker, entries, tell }).await
    }

    /// What the group committed.
    ///
    /// # Errors
    /// [`GroupError`] if the speaker names an epoch that is not its own.
    pub(crate) async fn offsets(
        &self,
        group: &str,
        speaker: OwnedSpeaker,
    ) -> Result<Vec<(String, u32, Committed)>, GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::Offsets { group: name, speaker, tell }).await
    }

    /// The group as it stands.
    ///
    /// # Errors
    /// [`GroupError::NotFound`].
    pub(crate) async fn describe(&self, group: &str) -> Result<Box<Group>, GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::Describe { group: name, tell }).await
    }

    /// Every group, by name.
    ///
    /// # Errors
    /// [`GroupError`] if the groups of a partition cannot be read.
    pub(crate) async fn list(&self) -> Result<Vec<Listed>, GroupError> {
        let mut all = self.ask_all(|tell| Request::List { tell }).await?;
        all.sort_by(|a, b| a.group.cmp(&b.group));
        Ok(all)
    }

    /// Forgets a group.
    ///
    /// # Errors
    /// [`GroupError::NotFound`], [`GroupError::NotEmpty`].
    pub(crate) async fn delete(&self, group: &str) -> Result<(), GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::Delete { group: name, tell }).await
    }

    /// Forgets what a group committed for a topic: for these partitions, or for all if none are named.
    ///
    /// # Errors
    /// [`GroupError::NotFound`], [`GroupError::NotEmpty`].
    pub(crate) async fn delete_offsets(
        &self,
        group: &str,
        topic: String,
        partitions: Vec<u32>,
    ) -> Result<(), GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::DeleteOffsets { group: name, topic, partitions, tell }).await
    }

    /// Takes over what a group of Kafka committed, where this broker's group committed nothing.
    ///
    /// # Errors
    /// [`GroupError`] if it could not be kept.
    pub(crate) async fn take_over(
        &self,
        group: &str,
        offsets: Vec<(String, u32, Committed)>,
    ) -> Result<(), GroupError> {
        let name = group.to_owned();
        ask(self.shard(group)?, |tell| Request::TakeOver { group: name, offsets, tell }).await
    }

    /// Returns once every group has taken note of the newest metadata, and what became of it is kept.
    ///
    /// # Errors
    /// [`GroupError`] if it could not be kept; the groups take note again when they are read anew.
    pub(crate) async fn topics_changed(&self) -> Result<(), GroupError> {
        for shard in self.shards.iter().flatten() {
            ask(shard, |tell| Request::TopicsChanged { tell }).await?;
        }
        Ok(())
    }

    /// The lag of every group, as metrics.
    pub(crate) async fn samples(&self, samples: &mut Samples) {
        // Of a shard that is being read, or cannot be, there is nothing to show; the others are shown without it.
        let asked = self.shards.iter().flatten().map(|shard| {
            let committed = ask(shard, |tell| Request::Committed { tell });
            async { timeout(SAMPLES_TIMEOUT, committed).await.ok()?.ok() }
        });
        let committed = join_all(asked).await.into_iter().flatten().flatten();
        let state = self.metadata.state();
        samples.begin(
            "headwater_group_lag",
            "gauge",
            "Records between a group's committed offset and the high watermark.",
        );
        for (group, topic, partition, offset) in committed {
            let Some(found) = state.topic(&topic).and_then(|topic| self.partitions.get(&topic.id, partition)) else {
                continue;
            };
            let lag = (found.offsets().high_watermark - offset).max(0);
            let labels: [(&str, &dyn Display); 3] = [("group", &group), ("topic", &topic), ("partition", &partition)];
            samples.sample("headwater_group_lag", &labels, lag);
        }
    }

    fn shard(&self, group: &str) -> Result<&mpsc::Sender<Request>, GroupError> {
        check_name(group)?;
        let count = u32::try_from(self.shards.len()).unwrap_or(u32::MAX);
        let shard = self.shards.get(partition_of_group(group, count) as usize);
        shard.and_then(Option::as_ref).ok_or_else(|| GroupError::NotCoordinator(group.to_owned()))
    }

    async fn ask_all<T>(&self, request: impl Fn(Tell<Vec<T>>) -> Request) -> Result<Vec<T>, GroupError> {
        let mut all = Vec::new();
        for shard in self.shards.iter().flatten() {
            all.append(&mut ask(shard, &request).await?);
        }
        Ok(all)
    }
}

impl MemberStream {
    /// The member reports.
    ///
    /// # Errors
    /// [`GroupError::ShuttingDown`]; a report that is refused ends the stream through its view.
    pub(crate) async fn report(&self, report: Report) -> Result<(), GroupError> {
        self.send(Request::Report {
            group: self.group.clone(),
            member: self.member.clone(),
            stream_id: self.stream_id,
            report,
        })
        .await
    }

    /// The member leaves; the view tells when it has.
    ///
    /// # Errors
    /// [`GroupError::ShuttingDown`].
    pub(crate) async fn leave(&self, keep: bool) -> Result<(), GroupError> {
        self.send(Request::Leave {
            group: self.group.clone(),
            member: self.member.clone(),
            stream_id: self.stream_id,
            keep,
        })
        .await
    }

    async fn send(&self, request: Request) -> Result<(), GroupError> {
        self.shard.send(request).await.map_err(|_| GroupError::ShuttingDown)
    }
}

impl Drop for MemberStream {
    fn drop(&mut self) {
        let request = Request::Disconnected {
            group: std::mem::take(&mut self.group),
            member: std::mem::take(&mut self.member),
            stream_id: self.stream_id,
        };
        // In a shard that is too busy to hear it the member looks connected until its session ends.
        drop(self.shard.try_send(request));
    }
}

/// The offsets topic, made if there is none.
async fn offsets_topic(config: &BrokerConfig, metadata: &MetadataHandle) -> Result<Arc<Topic>, StartError> {
    let failed = |error: MetadataError| StartError::Groups(format!("{OFFSETS_TOPIC}: {error}"));
    if metadata.state().topic(OFFSETS_TOPIC).is_none() {
        let settings = OFFSETS_TOPIC_CONFIG.map(|(key, value)| (key.to_owned(), Some(value.to_owned())));
        let settings = topic_config::change(&TopicValues::new(), settings, &config.topic_defaults);
        let replicas = Replicas { brokers: vec![i32::try_from(config.broker_id).unwrap_or(i32::MAX)] };
        let create = CreateTopic {
            name: OFFSETS_TOPIC.to_owned(),
            topic_id: new_topic_id().to_wire(),
            internal: true,
            partitions: vec![replicas; config.groups.offsets_partitions as usize],
            config: settings.map_err(|error| failed(error.into()))?,
            created_ms: now_ms(),
            default_min_insync_replicas: config.topic_defaults.min_insync_replicas(1),
        };
        metadata.propose(Kind::CreateTopic(create)).await.map_err(failed)?;
    }
    let state = metadata.state();
    state.topic(OFFSETS_TOPIC).cloned().ok_or_else(|| StartError::Groups(format!("{OFFSETS_TOPIC} is missing")))
}

async fn ask<T>(shard: &mpsc::Sender<Request>, request: impl FnOnce(Tell<T>) -> Request) -> Result<T, GroupError> {
    let (tell, told) = oneshot::channel();
    shard.send(request(tell)).await.map_err(|_| GroupError::ShuttingDown)?;
    told.await.unwrap_or(Err(GroupError::ShuttingDown))
}
