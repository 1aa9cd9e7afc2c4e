//! Calls about what the cluster bears: which broker may be stopped, and which commands it may be given.
//!
//! Owns: what the calls mean. Refuses: the judgement ([`crate::metadata::health`]).

use super::{Answer, see};
use crate::command_id::CommandId;
use crate::metadata::command::{self, command::Command as Kind};
use crate::metadata::health;
use crate::metadata::raft::RaftNode;
use crate::shared::Shared;
use crate::watch::is_behind;
use headwater_proto::wire;
use headwater_proto::wire::call_response::Response;
use std::time::Duration;
use tokio::time::Instant;

/// Partitions without a leader that are told of one by one.
const MAX_LEADERLESS: usize = 1_000;
/// A voter that has not answered for so long does not, nor for so many heartbeats.
const ANSWERS: Duration = Duration::from_millis(1_500);
const HEARTBEATS: u32 = 3;

pub(crate) async fn health(shared: &Shared, request: &wire::ClusterHealth) -> Answer {
    see(shared, request.stale).await?;
    let quorum = quorum(shared);
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
        voters: quorum.as_ref().map_or(0, |quorum| quorum.voters),
        answering: quorum.map(|quorum| quorum.answering).unwrap_or_default(),
    }))
}

/// Who votes on the metadata, and who answers.
struct Quorum {
    voters: u32,
    answering: Vec<i32>,
}

/// `None`: it is not known here.
fn quorum(shared: &Shared) -> Option<Quorum> {
    let node = shared.node.as_ref()?;
    let (state, membership) = (shared.metadata.state(), node.membership());
    let heartbeats = Duration::from_millis(shared.config.broker_heartbeat_interval_ms) * HEARTBEATS;
    let since = Instant::now().checked_sub(ANSWERS.max(heartbeats))?;
    // While the voters change, those who are to be.
    let voters = membership.get_joint_config().last()?;
    let answer = state.brokers().filter(|broker| {
        let (id, votes) = (broker.node_id, voters.contains(&broker.node_id));
        votes && (id == node.node_id() || node.answers(id, since))
    });
    Some(Quorum { voters: u32::try_from(voters.len()).ok()?, answering: answer.map(|broker| broker.id).collect() })
}

/// What is told where this broker hears of no leader of the metadata quorum.
pub(crate) fn out_of_touch(shared: &Shared) -> String {
    let us = shared.broker_id();
    if is_behind(shared) {
        return format!("broker {us} lacks what the others have decided: its disk, or the way to them, holds it up");
    }
    let Some(Quorum { voters, answering }) = quorum(shared) else {
        return format!("broker {us} hears nothing of the metadata quorum");
    };
    let majority = voters / 2 + 1;
    let ids = answering.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
    let answer = match answering.len() {
        enough if enough >= majority as usize => {
            return format!("broker {us} hears of no leader of the metadata quorum, though brokers {ids} answer it");
        }
        0 => "none answers it".to_owned(),
        1 => format!("only broker {ids} answers it"),
        _ => format!("only brokers {ids} answer it"),
    };
    format!(
        "the metadata quorum is lost, or out of reach of broker {us}: of {voters} voters {answer}, and {majority} have to"
    )
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
