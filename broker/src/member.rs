//! One membership stream: heartbeats up, assignments down the moment they change.
//!
//! Owns: the stream. A member that sends nothing is out after its session timeout, which the coordinator keeps; one that
//! does not read what it is told loses its stream. Refuses: decisions ([`crate::group`]).

use crate::group::{GroupError, Join, MemberStream, MemberView, Partitions, Report};
use crate::metadata::MetadataState;
use crate::metrics::Counted;
use crate::session::Peer;
use crate::shared::Shared;
use crate::stream::{Frames, StreamError, write_within};
use headwater_proto::wire::{MemberHeartbeat, MemberUpdate, OpenMember, TopicPartitions};
use headwater_proto::{ErrorCode, TopicId, frame, wire};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Serves the stream until the member leaves, is put out, goes away, or the broker shuts down.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    open: OpenMember,
    peer: &Peer,
    send: &mut quinn::SendStream,
    mut frames: Frames<MemberHeartbeat>,
) -> Result<(), StreamError> {
    let _counted = Counted::new(&shared.metrics.member_streams);
    let group = open.group.clone();
    let told = |error: &GroupError| refusal(shared.group_refusal(&group, error));
    let mut member = match join(shared, open, peer).await {
        Ok(member) => member,
        Err(error) => return tell(shared, send, &refusal(error)).await,
    };
    loop {
        tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => {
                return tell(shared, send, &told(&GroupError::ShuttingDown)).await;
            }
            changed = member.view.changed() => {
                // The sender is gone once another stream has taken this one's place.
                let view = if changed.is_ok() { member.view.borrow_and_update().clone() } else { return Ok(()) };
                let update = match &view.ended {
                    Some(Err(error)) => told(error),
                    _ => to_wire(&view, &shared.metadata.state(), member.heartbeat_interval_ms),
                };
                tell(shared, send, &update).await?;
                if view.ended.is_some() {
                    return Ok(());
                }
            }
            heartbeat = frames.message() => {
                let Some(heartbeat) = heartbeat? else { return Ok(()) };
                let taken = if heartbeat.leave {
                    member.leave(heartbeat.keep_static).await
                } else {
                    member.report(report(heartbeat, &shared.metadata.state())?).await
                };
                if let Err(error) = taken {
                    return tell(shared, send, &told(&error)).await;
                }
            }
        }
    }
}

async fn join(shared: &Shared, open: OpenMember, peer: &Peer) -> Result<MemberStream, wire::Error> {
    let group = open.group.clone();
    let join = to_join(open, peer, &shared.metadata.state())?;
    let refused = |error: &GroupError| shared.group_refusal(&group, error);
    match shared.groups.join(&group, join.clone()).await {
        Ok(member) => Ok(member),
        // A holder that has died looks alive until it misses a heartbeat: so long the newcomer waits, once.
        Err(GroupError::UnreleasedInstance { silent_in_ms, .. }) => {
            let wait = Duration::from_millis(silent_in_ms + 1);
            if timeout(wait, shared.shutdown.cancelled()).await.is_ok() {
                return Err(refused(&GroupError::ShuttingDown));
            }
            shared.groups.join(&group, join).await.map_err(|error| refused(&error))
        }
        Err(error) => Err(refused(&error)),
    }
}

fn to_join(open: OpenMember, peer: &Peer, metadata: &MetadataState) -> Result<Join, wire::Error> {
    let text = |text: String| (!text.is_empty()).then_some(text);
    let assignor = match text(open.assignor) {
        None => None,
        Some(name) => Some(name.parse().map_err(|error| wire::Error::from(&GroupError::Assignor(error)))?),
    };
    Ok(Join {
        member_id: open.member_id,
        instance_id: text(open.instance_id),
        client_id: text(open.client_id).unwrap_or_else(|| peer.client_id.clone()),
        client_host: peer.remote.ip().to_string(),
        rack: text(open.rack),
        topics: open.topics.into_iter().collect(),
        assignor,
        session_timeout_ms: open.session_timeout_ms,
        rebalance_timeout_ms: open.rebalance_timeout_ms,
        owned: partitions(&open.owned, metadata)?,
        member_epoch: open.member_epoch,
    })
}

fn report(heartbeat: MemberHeartbeat, metadata: &MetadataState) -> Result<Report, StreamError> {
    let owned = partitions(&heartbeat.owned, metadata)
        .map_err(|error| StreamError::Refused(ErrorCode::InvalidRequest, error.message))?;
    let topics: BTreeSet<String> = heartbeat.topics.into_iter().collect();
    Ok(Report { member_epoch: heartbeat.member_epoch, owned, topics: heartbeat.subscribe.then_some(topics) })
}

/// Partitions as a member names them: by the topic's id, or by its name where it gives none.
fn partitions(topics: &[TopicPartitions], metadata: &MetadataState) -> Result<Partitions, wire::Error> {
    let mut out = Partitions::new();
    for topic in topics {
        let id = match TopicId::from_slice(&topic.topic_id) {
            Some(id) => id,
            None if topic.topic_id.is_empty() => match metadata.topic(&topic.topic) {
                Some(found) => found.id,
                // Whoever owns a partition of a topic that is gone owns nothing.
                None => continue,
            },
            None => {
                let why = format!("a topic id has 16 bytes, not {}", topic.topic_id.len());
                return Err(wire::Error::new(ErrorCode::InvalidRequest, why));
            }
        };
        out.extend(topic.partitions.iter().map(|partition| (id, *partition)));
    }
    Ok(out)
}

/// Partitions as the wire has them, topic by topic.
pub(crate) fn to_topic_partitions(partitions: &Partitions, metadata: &MetadataState) -> Vec<TopicPartitions> {
    let mut topics: BTreeMap<TopicId, Vec<u32>> = BTreeMap::new();
    for (topic, partition) in partitions {
        topics.entry(*topic).or_default().push(*partition);
    }
    topics
        .into_iter()
        .map(|(id, partitions)| TopicPartitions {
            topic_id: id.to_wire(),
            topic: metadata.topic_by_id(&id).map(|topic| topic.name.clone()).unwrap_or_default(),
            partitions,
        })
        .collect()
}

fn to_wire(view: &MemberView, metadata: &MetadataState, heartbeat_interval_ms: u32) -> MemberUpdate {
    let mut update = MemberUpdate { heartbeat_interval_ms, ..MemberUpdate::default() };
    if let Some((epoch, assigned)) = &view.update {
        update.member_epoch = *epoch;
        update.assignment = to_topic_partitions(assigned, metadata);
    }
    update.left = matches!(view.ended, Some(Ok(())));
    update
}

fn refusal(error: wire::Error) -> MemberUpdate {
    MemberUpdate { error: Some(error), ..MemberUpdate::default() }
}

async fn tell(shared: &Shared, send: &mut quinn::SendStream, update: &MemberUpdate) -> Result<(), StreamError> {
    let limit = Duration::from_millis(shared.config.frame_timeout_ms);
    write_within(send, frame::encode(update, 0), limit, "an update").await
}
