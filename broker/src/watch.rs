//! One watch stream: a client hears of other leaders, and of brokers that come and go, as soon as this broker knows.
//!
//! A change costs each stream a look at the topics that it watches, and those that did not change are seen to be the same at once
//! (their states are shared). While nothing changes, a stream costs its beat.
//!
//! A topic that is not known here may have been created elsewhere a moment ago: that it is gone is said once everything is known here that
//! was in force when it was asked for.
//!
//! Owns: the stream, and what was said on it ([`Told`], pure). Refuses: to say the same twice. Read next: [`crate::metadata`].

use crate::cluster_calls;
use crate::lease::BEHIND;
use crate::metadata::state::BrokerState;
use crate::metadata::{MetadataState, Topic};
use crate::session::Session;
use crate::shared::Shared;
use crate::stream::{Frames, StreamError, send_within};
use futures::FutureExt;
use futures::future::{BoxFuture, OptionFuture};
use headwater_proto::wire::{self, BrokerNode, OpenWatch, PartitionLeader, TopicLeaders, WatchRequest, WatchUpdate};
use headwater_proto::{ErrorCode, TopicId};
use openraft::ServerState;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// What a client that names no interval is told at least.
const BEAT: Duration = Duration::from_secs(1);
/// The intervals that a client may choose.
const BEATS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));
/// Topics that one stream may watch.
const MAX_WATCHED_TOPICS: usize = 100_000;
/// Partitions named in one frame: well below what a header may hold.
const PARTITIONS_PER_FRAME: usize = 50_000;
/// How long a leader of the metadata quorum may not have heard from a majority, and who follows without a vote not from its leader.
const OUT_OF_TOUCH_MS: u64 = 1_000;
/// How long a call waits for a broker that is out of touch to come back: a quorum elects its leader in less.
const BACK_IN_TOUCH: Duration = Duration::from_millis(1_500);
/// How often it looks meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// How long a broker that leaves waits for those who watch to hear who leads now.
pub(crate) const TELLING: Duration = Duration::from_millis(500);

/// Serves the stream until the client ends it, or the broker leaves: then it tells what is new still.
pub(crate) async fn serve(
    session: &Session,
    open: OpenWatch,
    send: &mut quinn::SendStream,
    mut frames: Frames<WatchRequest>,
) -> Result<(), StreamError> {
    let shared = &session.shared;
    let mut changes = shared.metadata.changes();
    let beat = match open.beat_ms {
        0 => BEAT,
        asked => Duration::from_millis(asked.into()).clamp(BEATS.0, BEATS.1),
    };
    let mut told = Told::default();
    let mut is_asked = true;
    let mut beat_at = Instant::now();
    let mut looking: Option<BoxFuture<'_, bool>> = None;
    loop {
        // Before the state is looked at: a change after that is seen the next time, and whoever is sent away knows where to go.
        let leaves = shared.leaving.is_cancelled();
        changes.borrow_and_update();
        let state = shared.metadata.state();
        let mut updates = told.news(&state, broker_nodes(shared, &state));
        if updates.is_empty() && is_asked {
            updates.push(WatchUpdate { version: state.index(), ..WatchUpdate::default() });
        }
        let in_touch = is_in_touch(shared);
        for update in updates {
            let update = WatchUpdate { in_touch, ..update };
            send_within(send, &update, session.patience(), "an update").await?;
            beat_at = Instant::now() + beat;
        }
        is_asked = false;
        if leaves {
            return Err(StreamError::Refused(ErrorCode::ShuttingDown, "the broker is shutting down".to_owned()));
        }
        if looking.is_none() && told.is_unsure() {
            told.look();
            let look = async {
                let looked = cluster_calls::look_again(shared).await;
                if looked.is_err() {
                    sleep(beat).await;
                }
                looked.is_ok()
            };
            looking = Some(look.boxed());
        }
        tokio::select! {
            biased;
            () = shared.leaving.cancelled() => {}
            request = frames.message() => {
                let Some(request) = request? else { return Ok(()) };
                is_asked = request.ping;
                told.watch(&request)?;
            }
            Some(looked) = OptionFuture::from(looking.as_mut()) => {
                looking = None;
                told.looked(looked);
            }
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            () = sleep_until(beat_at) => is_asked = true,
        }
    }
}

/// Whether this broker hears from whoever leads the metadata quorum, or leads it and is heard; and has not been behind for long.
pub(crate) fn is_in_touch(shared: &Shared) -> bool {
    let Some(node) = shared.node.as_ref().filter(|_| shared.ready.is_some()) else { return true };
    if is_behind(shared) {
        return false;
    }
    let observed = node.observed(0);
    match observed.leads_in {
        Some(_) => observed.unheard_ms.is_some_and(|ms| ms < OUT_OF_TOUCH_MS),
        None => {
            let is_led = || node.led_ms().is_some_and(|ms| ms < OUT_OF_TOUCH_MS);
            let metrics = node.metrics();
            let now = metrics.borrow();
            // Whoever votes stands for election where it hears nothing; who only follows waits on.
            now.current_leader.is_some() && (now.state != ServerState::Learner || is_led())
        }
    }
}

/// Whether this broker has lacked for long what others have in force, though it may hear them.
pub(crate) fn is_behind(shared: &Shared) -> bool {
    let version = shared.node.as_ref().map_or(u64::MAX, |node| node.applied().borrow().state.index());
    shared.partitions.lease().is_behind(version, BEHIND)
}

/// Waits until this broker is in touch.
pub(crate) async fn in_touch(shared: &Shared) {
    while !is_in_touch(shared) {
        sleep_until(Instant::now() + LOOK).await;
    }
}

/// Waits until this broker has been out of touch for longer than the quorum takes to elect its leader. Returns what whoever waits for an
/// answer is told, who does better to ask another broker.
pub(crate) async fn out_of_touch(shared: &Shared) -> wire::Error {
    let mut since = None;
    loop {
        let now = Instant::now();
        since = if is_in_touch(shared) { None } else { since.or(Some(now)) };
        if since.is_some_and(|since| now.duration_since(since) >= BACK_IN_TOUCH) {
            return wire::Error::new(ErrorCode::OutOfTouch, cluster_calls::health::out_of_touch(shared));
        }
        sleep_until(now + LOOK).await;
    }
}

/// The brokers, as clients are told of them.
pub(crate) fn broker_nodes(shared: &Shared, state: &MetadataState) -> Vec<BrokerNode> {
    let node = |broker: &crate::metadata::state::Broker| BrokerNode {
        broker_id: broker.id,
        address: if broker.id == shared.broker_id() { shared.advertised() } else { broker.address.clone() },
        rack: broker.rack.clone(),
        incarnation: broker.incarnation.as_bytes().to_vec().into(),
        fenced: broker.state == BrokerState::Fenced,
    };
    state.brokers().map(node).collect()
}

/// What a client was told.
#[derive(Debug, Default)]
struct Told {
    brokers: Vec<BrokerNode>,
    /// What is watched, and what was told of it.
    topics: HashMap<TopicId, Said>,
}

/// What was told of a topic.
#[derive(Debug, Clone)]
enum Said {
    Nothing(Looked),
    This(Arc<Topic>),
}

/// Whether it is known that a topic is gone which is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looked {
    NotYet,
    /// The metadata are waited for that were in force after it was asked for.
    Now,
    Done,
}

impl Told {
    fn watch(&mut self, request: &WatchRequest) -> Result<(), StreamError> {
        let id = |bytes: &[u8]| {
            let why = || format!("a topic id has 16 bytes, not {}", bytes.len());
            TopicId::from_slice(bytes).ok_or_else(|| StreamError::Refused(ErrorCode::InvalidRequest, why()))
        };
        for bytes in &request.remove_topic_ids {
            self.topics.remove(&id(bytes)?);
        }
        for bytes in &request.add_topic_ids {
            // Who asks again is told again.
            self.topics.insert(id(bytes)?, Said::Nothing(Looked::NotYet));
        }
        if self.topics.len() > MAX_WATCHED_TOPICS {
            let why = format!("a stream watches at most {MAX_WATCHED_TOPICS} topics");
            return Err(StreamError::Refused(ErrorCode::LimitExceeded, why));
        }
        Ok(())
    }

    /// Whether nothing was said of a topic, and nobody looks whether it is gone.
    fn is_unsure(&self) -> bool {
        self.topics.values().any(|said| matches!(said, Said::Nothing(Looked::NotYet)))
    }

    /// The metadata are waited for that are in force now.
    fn look(&mut self) {
        self.turn(Looked::NotYet, Looked::Now);
    }

    /// They are known, or could not be had.
    fn looked(&mut self, are_known: bool) {
        self.turn(Looked::Now, if are_known { Looked::Done } else { Looked::NotYet });
    }

    fn turn(&mut self, from: Looked, to: Looked) {
        for said in self.topics.values_mut() {
            if let Said::Nothing(looked) = said
                && *looked == from
            {
                *looked = to;
            }
        }
    }

    /// What is to be said, and counts as said from now on.
    fn news(&mut self, state: &MetadataState, brokers: Vec<BrokerNode>) -> Vec<WatchUpdate> {
        let version = state.index();
        let mut updates = Vec::new();
        let mut update = WatchUpdate { version, ..WatchUpdate::default() };
        if brokers != self.brokers {
            update.brokers.clone_from(&brokers);
            self.brokers = brokers;
        }
        let mut room = PARTITIONS_PER_FRAME;
        self.topics.retain(|id, told| {
            let Some(now) = state.topic_by_id(id) else {
                if matches!(told, Said::Nothing(Looked::NotYet | Looked::Now)) {
                    return true;
                }
                // An id is given once: there is nothing more to be said.
                update.topics.push(TopicLeaders { topic_id: id.to_wire(), deleted: true, ..TopicLeaders::default() });
                return false;
            };
            let before = match told {
                Said::This(before) if Arc::ptr_eq(before, now) => return true,
                Said::This(before) => Some(&**before),
                Said::Nothing(_) => None,
            };
            let mut partitions = new_leaders(before, now);
            let is_larger = before.is_none_or(|before| before.partitions.len() != now.partitions.len());
            *told = Said::This(Arc::clone(now));
            if partitions.is_empty() && !is_larger {
                return true;
            }
            let partition_count = u32::try_from(now.partitions.len()).unwrap_or(u32::MAX);
            loop {
                let rest = partitions.split_off(partitions.len().min(room));
                room -= partitions.len();
                let topic_id = id.to_wire();
                update.topics.push(TopicLeaders { topic_id, deleted: false, partition_count, partitions });
                if room == 0 {
                    updates.push(std::mem::replace(&mut update, WatchUpdate { version, ..WatchUpdate::default() }));
                    room = PARTITIONS_PER_FRAME;
                }
                partitions = rest;
                if partitions.is_empty() {
                    return true;
                }
            }
        });
        if !update.brokers.is_empty() || !update.topics.is_empty() {
            updates.push(update);
        }
        updates
    }
}

/// The partitions that are led otherwise than they were.
fn new_leaders(told: Option<&Topic>, now: &Topic) -> Vec<PartitionLeader> {
    let was = |number: usize| told.and_then(|told| told.partitions.get(number));
    let partitions = now.partitions.iter().enumerate().filter(|(number, partition)| {
        was(*number).is_none_or(|was| (was.leader, was.leader_epoch) != (partition.leader, partition.leader_epoch))
    });
    let partitions = partitions.map(|(number, partition)| PartitionLeader {
        partition: u32::try_from(number).unwrap_or(u32::MAX),
        leader: partition.leader,
        leader_epoch: partition.leader_epoch,
    });
    partitions.collect()
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
