//! What the controller's log says of elections: one line for every broker that came, went or stops, with what became of partitions,
//! and one, loudly, for every leader that may miss acknowledged records.
//!
//! Owns: the words. Refuses: decisions ([`super::sessions`]).

use super::super::changes::{Changes, Unclean, changes};
use super::super::state::{BrokerState, MetadataState};
use super::sessions::Decision;
use std::time::Duration;

/// Counts for whoever leads: nobody here.
const NOBODY: i32 = i32::MIN;

/// A decision of the controller is in force, between these two states.
pub(super) fn decided(
    decision: &Decision,
    (before, after): (&MetadataState, &MetadataState),
    heard_before_ms: u64,
    took: Duration,
) {
    let Changes { new_leaders, without_leader, .. } = changes(before, after, NOBODY);
    let took_ms = took.as_millis();
    match decision {
        Decision::Fence { broker_id, .. } => {
            let last_heard_ms = u128::from(heard_before_ms) + took_ms;
            tracing::warn!(
                broker_id,
                last_heard_ms,
                took_ms,
                new_leaders,
                without_leader,
                "broker fenced: it is not heard of, and leads nothing any more"
            );
        }
        Decision::Unfence { broker_id, .. } => {
            tracing::info!(broker_id, took_ms, new_leaders, "broker unfenced: it may lead and be in sync");
        }
        Decision::FenceReplicas { broker_id, replicas, .. } => {
            let replicas = replicas.len();
            tracing::warn!(
                broker_id,
                replicas,
                took_ms,
                new_leaders,
                without_leader,
                "replicas fenced: their disk failed"
            );
        }
        Decision::RestoreReplicas { broker_id, replicas, .. } => {
            let replicas = replicas.len();
            tracing::info!(broker_id, replicas, took_ms, new_leaders, "replicas restored: their disk came back");
        }
    }
}

/// What others did between two states: who came anew, who is about to stop, and every leader that may miss records.
pub(super) fn tell(before: &MetadataState, after: &MetadataState) {
    if before.index() == after.index() {
        return;
    }
    let Changes { new_leaders, without_leader, unclean, .. } = changes(before, after, NOBODY);
    for broker in after.brokers() {
        let known = before.broker(broker.id);
        let (broker_id, address, boots) = (broker.id, &broker.address, broker.boots);
        if known.is_none_or(|known| known.incarnation != broker.incarnation) {
            tracing::info!(
                broker_id,
                address,
                boots,
                new_leaders,
                without_leader,
                "broker registered: fenced until it is ready"
            );
        } else if broker.state == BrokerState::Draining && known.is_some_and(|known| known.state != broker.state) {
            tracing::info!(
                broker_id,
                new_leaders,
                without_leader,
                "broker is about to stop: it hands its leaderships over"
            );
        }
    }
    for Unclean { topic, partition, leader } in &unclean {
        tracing::error!(topic, partition, leader, "UNCLEAN ELECTION: acknowledged records may be lost");
    }
}
