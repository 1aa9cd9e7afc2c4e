//! How everybody else reaches the groups.
//!
//! Owns: [`Groups`], which finds the shard of a group by Kafka's rule, and [`MemberStream`], a joined member's end of
//! its stream. Refuses: decisions. Read next: [`super::task`].

use super::GroupError;
use super::offsets::{CommitEntry, Committed, EntryError};
use super::seats::{self, Coordinator, Seats};
use super::standing::Standing;
use super::state::{Group, Join, Report, check_name};
use super::task::{GroupContext, Joined, Listed, MemberView, OwnedSpeaker, Request, Tell, elsewhere};
use super::topic::OffsetsTopic;
use crate::config::BrokerConfig;
use crate::error::StartError;
use crate::metadata::MetadataHandle;
use crate::metadata::name::OFFSETS_TOPIC;
use crate::metrics::Samples;
use crate::partitions::Partitions;
use crate::pool::Pool;
use futures::future::join_all;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time for a shard to tell what was committed, for the metrics.
const SAMPLES_TIMEOUT: Duration = Duration::from_secs(1);

/// All groups that this broker coordinates.
#[derive(Clone)]
pub(crate) struct Groups {
    context: GroupContext,
    seats: Seats,
    topic: OffsetsTopic,
    me: i32,
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
    /// Coordinates the groups of each partition of the offsets topic that this broker leads, from when it does for as long as it does.
    /// A broker that is alone makes the topic if there is none; one of several, when it is first needed. Requests wait until the groups
    /// of their partition were read.
    ///
    /// # Errors
    /// [`StartError`] if the topic cannot be made.
    pub(crate) async fn start(
        config: &BrokerConfig,
        metadata: MetadataHandle,
        partitions: Arc<Partitions>,
        pool: Pool,
        standing: Standing,
    ) -> Result<Groups, StartError> {
        let topic = OffsetsTopic::new(config);
        if standing.is_alone() {
            let made = topic.make_alone(&metadata).await;
            made.map_err(|error| StartError::Groups(format!("{OFFSETS_TOPIC}: {error}")))?;
        }
        let elsewhere_ms = match standing.is_alone() {
            true => 0,
            false => u64::try_from(elsewhere(config).as_millis()).unwrap_or(u64::MAX),
        };
        let context = GroupContext {
            settings: config.groups.clone(),
            metadata,
            pool,
            logs: partitions,
            standing,
            elsewhere_ms,
            stop: CancellationToken::new(),
        };
        let me = i32::try_from(config.broker_id).unwrap_or(i32::MAX);
        let groups = Groups { context, seats: Seats::new(), topic, me };
        let (mut applied, mut published) = (groups.context.logs.applied(), groups.context.metadata.changes());
        applied.mark_unchanged();
        published.mark_unchanged();
        groups.seats.take(&groups.context);
        let keeper = groups.clone();
        groups.seats.beside(async move {
            loop {
                let changed = async {
                    // A role is taken before the metadata are published, or after it.
                    tokio::select! {
                        changed = applied.changed() => changed,
                        changed = published.changed() => changed,
                    }
                };
                match keeper.context.stop.run_until_cancelled(changed).await {
                    Some(Ok(())) => keeper.seats.take(&keeper.context),
                    // The metadata stop before the groups do: nothing changes any more.
                    Some(Err(_)) | None => return,
                }
            }
        });
        Ok(groups)
    }

    /// The metadata that say which groups there may be.
    pub(crate) fn metadata(&self) -> &MetadataHandle {
        &self.context.metadata
    }

    /// Keeps and answers what was decided, refuses the rest, and ends the members' streams.
    pub(crate) async fn shutdown(&self) {
        self.context.stop.cancel();
        self.seats.ended().await;
    }

    /// Who coordinates a group, or (`None`) all of them, as far as is known here. For a group the offsets topic is made, if there is none.
    ///
    /// # Errors
    /// [`GroupError`] if it cannot be made, or not yet.
    pub(crate) async fn find(&self, group: Option<&str>) -> Result<Vec<Coordinator>, GroupError> {
        let Some(group) = group else { return Ok(seats::coordinators(&self.context.metadata.state())) };
        check_name(group)?;
        self.make_topic(group).await?;
        Ok(seats::coordinator(&self.context.metadata.state(), group).into_iter().collect())
    }

    /// Who coordinates a group, as far as is known here.
    pub(crate) fn known_coordinator(&self, group: &str) -> Option<Coordinator> {
        seats::coordinator(&self.context.metadata.state(), group)
    }

    async fn make_topic(&self, group: &str) -> Result<(), GroupError> {
        if self.context.metadata.state().topic(OFFSETS_TOPIC).is_some() {
            return Ok(());
        }
        let unavailable = |why: String| GroupError::Unavailable { group: group.to_owned(), why };
        match self.topic.make(&self.context.metadata).await {
            Ok(None) => Ok(()),
            Ok(Some(why)) => Err(unavailable(why)),
            Err(error) => Err(unavailable(error.to_string())),
        }
    }

    /// A member opens its stream.
    ///
    /// # Errors
    /// [`GroupError`]: the member is not in the group, unless an earlier stream of it is.
    pub(crate) async fn join(&self, group: &str, join: Join) -> Result<MemberStream, GroupError> {
        self.make_topic(group).await?;
        let (shard, member) = (self.shard(group)?, join.member_id.clone());
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
        self.make_topic(group).await?;
        ask(&self.shard(group)?, |tell| Request::Commit { group: name, speaker, entries, tell }).await
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
        ask(&self.shard(group)?, |tell| Request::Offsets { group: name, speaker, tell }).await
    }

    /// The group as it stands.
    ///
    /// # Errors
    /// [`GroupError::NotFound`].
    pub(crate) async fn describe(&self, group: &str) -> Result<Box<Group>, GroupError> {
        let name = group.to_owned();
        ask(&self.shard(group)?, |tell| Request::Describe { group: name, tell }).await
    }

    /// Every group of these partitions of the offsets topic, by name; none named: of those that this broker has.
    ///
    /// # Errors
    /// [`GroupError`] if the groups of a partition cannot be read, or another broker has it.
    pub(crate) async fn list(&self, partitions: &[u32]) -> Result<Vec<Listed>, GroupError> {
        let shards: Vec<_> = match partitions {
            [] => self.seats.all(),
            named => {
                let found = named.iter().map(|number| self.seats.of_partition(*number).ok_or(GroupError::Moved));
                found.collect::<Result<_, _>>()?
            }
        };
        let listed = join_all(shards.iter().map(|shard| ask(shard, |tell| Request::List { tell }))).await;
        let mut all: Vec<Listed> = listed.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        all.sort_by(|a, b| a.group.cmp(&b.group));
        Ok(all)
    }

    /// Forgets a group.
    ///
    /// # Errors
    /// [`GroupError::NotFound`], [`GroupError::NotEmpty`].
    pub(crate) async fn delete(&self, group: &str) -> Result<(), GroupError> {
        let name = group.to_owned();
        ask(&self.shard(group)?, |tell| Request::Delete { group: name, tell }).await
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
        ask(&self.shard(group)?, |tell| Request::DeleteOffsets { group: name, topic, partitions, tell }).await
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
        ask(&self.shard(group)?, |tell| Request::TakeOver { group: name, offsets, tell }).await
    }

    /// Returns once every group has taken note of the newest metadata, and what became of it is kept.
    ///
    /// # Errors
    /// [`GroupError`] if it could not be kept; the groups take note again when they are read anew.
    pub(crate) async fn topics_changed(&self) -> Result<(), GroupError> {
        for shard in self.seats.all() {
            ask(&shard, |tell| Request::TopicsChanged { tell }).await?;
        }
        Ok(())
    }

    /// The lag of every group, as metrics.
    pub(crate) async fn samples(&self, samples: &mut Samples) {
        // Of a shard that is being read, or cannot be, there is nothing to show; the others are shown without it.
        let shards = self.seats.all();
        let asked = shards.iter().map(|shard| {
            let committed = ask(shard, |tell| Request::Committed { tell });
            async { timeout(SAMPLES_TIMEOUT, committed).await.ok()?.ok() }
        });
        let committed = join_all(asked).await.into_iter().flatten().flatten();
        let state = self.context.metadata.state();
        samples.begin(
            "headwater_group_lag",
            "gauge",
            "Records between a group's committed offset and the high watermark.",
        );
        for (group, topic, partition, offset) in committed {
            // A replica knows the high watermark too, as of a moment ago.
            let kept = state.topic(&topic).and_then(|topic| self.context.logs.replica(&topic.id, partition));
            let Some(found) = kept else { continue };
            let lag = (found.offsets().high_watermark - offset).max(0);
            let labels: [(&str, &dyn Display); 3] = [("group", &group), ("topic", &topic), ("partition", &partition)];
            samples.sample("headwater_group_lag", &labels, lag);
        }
    }

    fn shard(&self, group: &str) -> Result<mpsc::Sender<Request>, GroupError> {
        check_name(group)?;
        self.seats.of_group(&self.context.metadata.state(), self.me, group)
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
        self.shard.send(request).await.map_err(|_| GroupError::Moved)
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

async fn ask<T>(shard: &mpsc::Sender<Request>, request: impl FnOnce(Tell<T>) -> Request) -> Result<T, GroupError> {
    let (tell, told) = oneshot::channel();
    // Whoever shuts down says so; a coordinator that is none any more has gone.
    shard.send(request(tell)).await.map_err(|_| GroupError::Moved)?;
    told.await.unwrap_or(Err(GroupError::Moved))
}
