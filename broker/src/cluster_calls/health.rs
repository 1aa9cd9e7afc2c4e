//! Calls about what the cluster bears: which broker may be stopped, and which commands it may be given.
//!
//! Owns: what the calls mean. Refuses: the judgement ([`crate::metadata::health`]).

use super::{Answer, see};
use crate::command_id::CommandId;
use crate::metadata::command::{self, command::Command as Kind};
use crate::metadata::health;
use crate::metadata::raft::RaftNode;
use crate::shared::Shared;
use headwater_proto::wire;
use headwater_proto::wire::call_response::Response;

/// Partitions without a leader that are told of one by one.
const MAX_LEADERLESS: usize = 1_000;

pub(crate) async fn health(shared: &Shared) -> Answer {
    see(shared, false).await?;
    let state = shared.metadata.state();
    let membership = shared.node.as_ref().map(RaftNode::membership).unwrap_or_default();
    let brokers = health::health(&state, membership.get_joint_config()).into_iter().map(|told| wire::BrokerHealth {
        broker_id: told.broker_id,
        may_stop: told.why_not.is_none(),
        why_not: told.why_not.unwrap_or_default(),
    });
    let leaderless = health::leaderless(&state).map(|(topic, partition, advice)| wire::LeaderlessPartition {
        topic: topic.to_owned(),
        partition,
        advice,
    });
    Ok(Response::ClusterHealth(wire::ClusterHealthResponse {
        controller: state.controller().map_or(-1, |(broker_id, _)| broker_id),
        brokers: brokers.collect(),
        leaderless: leaderless.take(MAX_LEADERLESS).collect(),
    }))
}

pub(crate) async fn upgrade(shared: &Shared, request: &wire::UpgradeCluster, id: CommandId) -> Answer {
    see(shared, false).await?;
    if request.finalize {
        let raise = shared.metadata.propose_with(move |state| {
            let level = state.brokers().map(|broker| broker.feature_level).min().unwrap_or(1);
            // Brokers of which one is too old stay as they are.
            let raise = command::RaiseFeatureLevel { level: level.max(state.feature_level()) };
            Ok(id.command(0, Kind::RaiseFeatureLevel(raise)))
        });
        raise.await.map_err(|error| wire::Error::from(&error))?;
    }
    let state = shared.metadata.state();
    let levels =
        state.brokers().map(|broker| wire::BrokerLevel { broker_id: broker.id, feature_level: broker.feature_level });
    let brokers: Vec<_> = levels.collect();
    Ok(Response::UpgradeCluster(wire::UpgradeClusterResponse {
        feature_level: state.feature_level(),
        possible: brokers.iter().map(|broker| broker.feature_level).min().unwrap_or(1),
        brokers,
    }))
}
