//! What the controller's log says of elections: one line for every broker that came, went or stops, with what became of partitions,
//! and one, loudly, for every leader that may miss acknowledged records.
//!
//! Owns: the words. Refuses: decisions ([`super::sessions`]).

use super::super::changes::{Changes, Unclean, changes};
use super::super::state::{BrokerState, MetadataState};
use super::sessions::Decision;
use std::collections::VecDeque;
use std::sync::Arc;
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

/// Every leader that may miss records, loudly.
pub(super) fn tell_unclean(unclean: &[Unclean]) {
    for Unclean { topic, partition, leader } in unclean {
        tracing::error!(topic, partition, leader, "UNCLEAN ELECTION: acknowledged records may be lost");
    }
}

/// What the state was a while ago: whoever comes into office tells what happened at the end of the one before, which may have had no time for
/// it.
#[derive(Debug, Default)]
pub(super) struct Lately {
    states: VecDeque<(u64, Arc<MetadataState>)>,
}

/// So long ago.
const A_WHILE_MS: u64 = 10_000;
/// A state is kept so often.
const MARK_MS: u64 = 1_000;

impl Lately {
    /// The state is this now.
    pub(super) fn observe(&mut self, now_ms: u64, state: &Arc<MetadataState>) {
        if self.states.back().is_none_or(|(at_ms, _)| now_ms.saturating_sub(*at_ms) >= MARK_MS) {
            self.states.push_back((now_ms, Arc::clone(state)));
        }
        while self.states.get(1).is_some_and(|(at_ms, _)| now_ms.saturating_sub(*at_ms) >= A_WHILE_MS) {
            self.states.pop_front();
        }
    }

    /// The leaders that came since, and may miss acknowledged records.
    pub(super) fn unclean(&self, now: &MetadataState) -> Vec<Unclean> {
        self.states.front().map(|(_, before)| changes(before, now, NOBODY).unclean).unwrap_or_default()
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
    tell_unclean(&unclean);
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{
        BecomeController, Command, CreateTopic, FenceBroker, RegisterBroker, Replicas, UnfenceBroker,
        command::Command as Kind,
    };
    use super::*;
    use bytes::Bytes;
    use uuid::Uuid;

    fn incarnation() -> Bytes {
        Uuid::from_u128(1).as_bytes().to_vec().into()
    }

    fn apply(state: &mut Arc<MetadataState>, kind: Kind) {
        let state = Arc::make_mut(state);
        let command = Command { controller_epoch: state.controller_epoch(), ..kind.into() };
        state.apply(state.index() + 1, &command).expect("accepted");
    }

    /// It was told by nobody where the one who elected left office, and its successor looked for the first time after it.
    #[test]
    fn an_unclean_election_at_the_end_of_an_office_is_known_to_the_next() {
        let mut state = Arc::new(MetadataState::new("cluster"));
        let id = |broker_id| (broker_id, incarnation());
        for broker_id in [1, 2] {
            let (broker_id, incarnation) = id(broker_id);
            let register = RegisterBroker { broker_id, incarnation, boots: 1, ..RegisterBroker::default() };
            apply(&mut state, Kind::RegisterBroker(register));
        }
        apply(&mut state, Kind::BecomeController(BecomeController { broker_id: 1, incarnation: incarnation() }));
        for broker_id in [1, 2] {
            apply(&mut state, Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: incarnation() }));
        }
        apply(
            &mut state,
            Kind::CreateTopic(CreateTopic {
                name: "t".into(),
                topic_id: Bytes::from_static(&[1; 16]),
                partitions: vec![Replicas { brokers: vec![1, 2] }],
                config: [("unclean.leader.election.enable".to_owned(), "true".to_owned())].into(),
                ..CreateTopic::default()
            }),
        );
        let mut lately = Lately::default();
        lately.observe(0, &state);
        let fence = |broker_id| Kind::FenceBroker(FenceBroker { broker_id, incarnation: incarnation() });
        apply(&mut state, fence(2));
        apply(&mut state, fence(1));
        apply(&mut state, Kind::UnfenceBroker(UnfenceBroker { broker_id: 2, incarnation: incarnation() }));
        let unclean = [Unclean { topic: "t".into(), partition: 0, leader: 2 }];
        for at_ms in [50, 1_000, 2_000, 9_000] {
            lately.observe(at_ms, &state);
            assert_eq!(lately.unclean(&state), unclean, "{at_ms}");
        }
        // What was so all the time is nothing new.
        for at_ms in (10_000..=30_000).step_by(500) {
            lately.observe(at_ms, &state);
            assert!(lately.states.len() <= 13);
        }
        assert_eq!(lately.unclean(&state), []);
    }
}
