//! Calls about where partitions are kept and who leads them.
//!
//! What moves is planned on one state and proposed partition by partition: each proposal is judged anew, on the state of its time.
//!
//! Owns: what the calls mean in terms of plans and commands. Refuses: the plans ([`crate::metadata::moves`]).

use super::{Answer, see};
use crate::command_id::CommandId;
use crate::metadata::command::{self, ElectionKind, command::Command as Kind};
use crate::metadata::moves::{self, Move};
use crate::metadata::state::{EMPTIED_LEVEL, NO_LEADER, Refusal};
use crate::metadata::{MetadataError, MetadataState, Outcome, Partition, Topic};
use crate::shared::Shared;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, move_partitions::What};
use headwater_proto::{ErrorCode, TopicId};
use std::sync::Arc;

fn refused(error: &MetadataError) -> wire::Error {
    wire::Error::from(error)
}

/// The partitions of this topic, or of all.
fn partitions<'a>(
    state: &'a MetadataState,
    topic: &str,
) -> Result<Vec<(&'a Topic, u32, &'a Partition)>, MetadataError> {
    if !topic.is_empty() && state.topic(topic).is_none() {
        return Err(MetadataError::UnknownTopic(topic.to_owned()));
    }
    let topics = state.topics().filter(|known| topic.is_empty() || known.name == topic);
    let all = topics.flat_map(|known| known.partitions.iter().zip(0..).map(move |(it, number)| (&**known, number, it)));
    Ok(all.collect())
}

pub(crate) async fn elect(shared: &Shared, request: wire::ElectLeaders, id: CommandId) -> Answer {
    see(shared, false).await?;
    let before = shared.metadata.state();
    if !request.validate_only
        && let Some(outcome) = id.outcome(&before)
    {
        // Asked for again: what has a leader by now is not found any more.
        let unnamed = match outcome {
            Outcome::PartitionsChanged(count) => *count as u64,
            _ => 0,
        };
        return Ok(Response::ElectLeaders(wire::ElectLeadersResponse { unnamed, ..Default::default() }));
    }
    let concerned: Vec<(TopicId, u32)> = partitions(&before, &request.topic)
        .map_err(|error| refused(&error))?
        .into_iter()
        .filter(|(_, _, partition)| match request.unclean {
            true => partition.leader == NO_LEADER,
            false => partition.replicas.first() != Some(&partition.leader),
        })
        .map(|(topic, number, _)| (topic.id, number))
        .collect();
    let kind = if request.unclean { ElectionKind::Unclean } else { ElectionKind::Preferred };
    let of = |(topic_id, partition): &(TopicId, u32)| command::TopicPartition {
        topic_id: topic_id.to_wire(),
        partition: *partition,
    };
    let elect = command::ElectLeaders { kind: kind.into(), partitions: concerned.iter().map(of).collect() };
    let after = match request.validate_only {
        true => {
            let mut tried = MetadataState::clone(&before);
            let index = tried.index() + 1;
            tried.apply(index, &Kind::ElectLeaders(elect).into()).map_err(|why| refused(&why.into()))?;
            Arc::new(tried)
        }
        false => {
            if !concerned.is_empty() {
                let proposed = shared.metadata.propose(id.command(0, Kind::ElectLeaders(elect))).await;
                proposed.map_err(|error| refused(&error))?;
            }
            shared.metadata.state()
        }
    };
    let elected = concerned.iter().filter_map(|(topic_id, number)| {
        let of = |state: &MetadataState| state.topic_by_id(topic_id)?.partitions.get(*number as usize).cloned();
        let (was, is) = (of(&before)?, of(&after)?);
        let had_everything = match request.unclean {
            true => had_everything(&was),
            false => Vec::new(),
        };
        (was.leader != is.leader).then(|| wire::ElectedLeader {
            topic: before.topic_by_id(topic_id).map(|topic| topic.name.clone()).unwrap_or_default(),
            partition: *number,
            leader_before: was.leader,
            leader: is.leader,
            had_everything,
        })
    });
    let elected: Vec<_> = elected.collect();
    if request.unclean && !request.validate_only {
        for it in &elected {
            tracing::warn!(
                topic = it.topic,
                partition = it.partition,
                leader = it.leader,
                had_everything = ?it.had_everything,
                "UNCLEAN ELECTION by a person's command: acknowledged records that the new leader misses are lost"
            );
        }
    }
    Ok(Response::ElectLeaders(wire::ElectLeadersResponse { partitions: elected, unnamed: 0 }))
}

/// Who was last known to have everything that was acknowledged: whoever is elected may be among them, where what it lost was brought back.
fn had_everything(partition: &Partition) -> Vec<i32> {
    let known = if partition.elr.is_empty() { &partition.last_known } else { &partition.elr };
    known.clone()
}

pub(crate) async fn move_partitions(shared: &Shared, request: wire::MovePartitions, id: CommandId) -> Answer {
    see(shared, false).await?;
    let state = shared.metadata.state();
    let throttle = request.throttle_bytes_per_second;
    let what = request
        .what
        .ok_or_else(|| wire::Error::new(ErrorCode::InvalidRequest, "it is not said which partitions move"))?;
    let planned = match what {
        What::Partition(asked) => one(&state, asked).map(|it| vec![it]),
        What::Rebalance(_) => {
            let state = Arc::clone(&state);
            Ok(shared.pool.run_long(move || moves::rebalance(&state)).await)
        }
        What::Drain(broker_id) => drain(shared, state, broker_id, request.validate_only, throttle, &id).await,
    };
    let planned = planned.map_err(|error| refused(&error))?;
    for planned in &planned {
        let reassign = Kind::Reassign(command::Reassign {
            topic_id: planned.topic_id.to_wire(),
            partition: planned.partition,
            replicas: planned.to.clone(),
            throttle_bytes_per_second: throttle,
        });
        let outcome = match request.validate_only {
            true => shared.metadata.validate(|_| Ok(reassign.into())),
            false => shared.metadata.propose(id.about(&planned.topic_id, planned.partition, reassign)).await,
        };
        outcome.map_err(|error| refused(&error))?;
    }
    if !request.validate_only && !planned.is_empty() {
        tracing::info!(partitions = planned.len(), throttle, "partitions move, by a person's command");
    }
    Ok(moved(planned))
}

/// What leaves a broker with nothing. From now on it is given nothing either, unless that is only asked about.
async fn drain(
    shared: &Shared,
    state: Arc<MetadataState>,
    broker_id: i32,
    validate_only: bool,
    throttle: u64,
    id: &CommandId,
) -> Result<Vec<Move>, MetadataError> {
    let plan = |state: Arc<MetadataState>| shared.pool.run_long(move || moves::drain(&state, broker_id));
    // What cannot be emptied stays as it is.
    let planned = plan(Arc::clone(&state)).await?;
    if validate_only {
        return Ok(planned);
    }
    let is_new = set_emptied(shared, &state, broker_id, true, id).await?;
    // What moves away already does so at the pace that is said now.
    for topic in state.topics() {
        for (partition, number) in topic.partitions.iter().zip(0..) {
            if partition.removing.contains(&broker_id) && partition.throttle_bytes_per_second != throttle {
                let reassign = Kind::Reassign(command::Reassign {
                    topic_id: topic.id.to_wire(),
                    partition: number,
                    replicas: partition.target.clone(),
                    throttle_bytes_per_second: throttle,
                });
                shared.metadata.propose(id.about(&topic.id, number, reassign)).await?;
            }
        }
    }
    if !is_new {
        return Ok(planned);
    }
    // What was placed there meanwhile moves too.
    plan(shared.metadata.state()).await
}

/// Says that a broker is to keep nothing, or may be given something again. False: that is so already, or some broker is too old to know of it.
async fn set_emptied(
    shared: &Shared,
    state: &MetadataState,
    broker_id: i32,
    is_emptied: bool,
    id: &CommandId,
) -> Result<bool, MetadataError> {
    let is_so = state.broker(broker_id).is_none_or(|broker| broker.is_emptied == is_emptied);
    if is_so || state.feature_level() < EMPTIED_LEVEL {
        return Ok(false);
    }
    let empty = Kind::EmptyBroker(command::EmptyBroker { broker_id, is_emptied });
    shared.metadata.propose(id.command(0, empty)).await?;
    tracing::info!(broker_id, is_emptied, "whether a broker is to be emptied, by a person's command");
    Ok(true)
}

fn moved(planned: Vec<Move>) -> Response {
    let moves = planned.into_iter().map(|it| wire::PartitionMove {
        topic: it.topic,
        partition: it.partition,
        from: it.from,
        to: it.to,
    });
    Response::MovePartitions(wire::MovePartitionsResponse { moves: moves.collect() })
}

/// A partition that a person moves.
fn one(state: &MetadataState, asked: wire::PartitionReplicas) -> Result<Move, MetadataError> {
    let topic = state.topic(&asked.topic).ok_or(MetadataError::UnknownTopic(asked.topic))?;
    let from = topic.partitions.get(asked.partition as usize).map(|it| it.replicas.clone()).unwrap_or_default();
    let replicas = asked.replicas.len();
    // Whoever has too few already may move those.
    if replicas < from.len() && replicas < topic.min_insync_replicas() as usize {
        let why = "fewer than min.insync.replicas: acks=all would be refused from then on";
        let (topic, partition) = (topic.name.clone(), asked.partition as usize);
        return Err(Refusal::InvalidReplicas { topic, partition, replicas: asked.replicas, why }.into());
    }
    Ok(Move { topic: topic.name.clone(), topic_id: topic.id, partition: asked.partition, from, to: asked.replicas })
}

pub(crate) async fn cancel(shared: &Shared, request: wire::CancelMoves, id: CommandId) -> Answer {
    see(shared, false).await?;
    let state = shared.metadata.state();
    if let Some(broker_id) = request.leaving {
        state.broker(broker_id).ok_or_else(|| refused(&Refusal::UnknownBroker(broker_id).into()))?;
        set_emptied(shared, &state, broker_id, false, &id).await.map_err(|error| refused(&error))?;
    }
    let concerned = partitions(&state, &request.topic).map_err(|error| refused(&error))?;
    let concerned = concerned.into_iter().filter(|(_, number, partition)| {
        let leaves = |broker: &i32| partition.removing.contains(broker);
        // Whoever names one is told that it does not move.
        request.partition.map_or(!partition.target.is_empty(), |asked| asked == *number)
            && request.leaving.as_ref().is_none_or(leaves)
    });
    let cancelled: Vec<Move> = concerned
        .map(|(topic, number, partition)| {
            let stays = partition.replicas.iter().copied().filter(|broker| !partition.adding.contains(broker));
            Move {
                topic: topic.name.clone(),
                topic_id: topic.id,
                partition: number,
                from: partition.target.clone(),
                to: stays.collect(),
            }
        })
        .collect();
    for it in &cancelled {
        let cancel = Kind::CancelReassignment(command::CancelReassignment {
            topic_id: it.topic_id.to_wire(),
            partition: it.partition,
        });
        let outcome = shared.metadata.propose(id.about(&it.topic_id, it.partition, cancel)).await;
        outcome.map_err(|error| refused(&error))?;
    }
    Ok(moved(cancelled))
}

pub(crate) async fn list(shared: &Shared, request: &wire::ListMoves) -> Answer {
    see(shared, request.stale).await?;
    let state = shared.metadata.state();
    let all = partitions(&state, "").map_err(|error| refused(&error))?;
    let moving = all.into_iter().filter(|(_, _, partition)| !partition.target.is_empty());
    let moving = moving.map(|(topic, number, partition)| wire::MovingPartition {
        topic: topic.name.clone(),
        topic_id: topic.id.to_wire(),
        partition: number,
        leader: partition.leader,
        replicas: partition.replicas.clone(),
        isr: partition.isr.clone(),
        target: partition.target.clone(),
        adding: partition.adding.clone(),
        removing: partition.removing.clone(),
        throttle_bytes_per_second: partition.throttle_bytes_per_second,
    });
    Ok(Response::ListMoves(wire::ListMovesResponse { partitions: moving.collect() }))
}

/// What this broker has on its own disk.
pub(crate) fn describe_replicas(shared: &Shared, request: wire::DescribeReplicas) -> Answer {
    let described = request.replicas.into_iter().map(|named| {
        let id = TopicId::from_slice(&named.topic_id);
        match id.and_then(|id| shared.partitions.get(&id, named.partition)) {
            None => wire::ReplicaDescription::default(),
            Some(handle) => {
                let status = handle.status();
                wire::ReplicaDescription {
                    is_there: true,
                    log_start_offset: status.log_start_offset,
                    high_watermark: status.high_watermark,
                    log_end_offset: status.log_end_offset,
                    size_bytes: status.size_bytes,
                }
            }
        }
    });
    Ok(Response::DescribeReplicas(wire::DescribeReplicasResponse { replicas: described.collect() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{BecomeController, CreateTopic, RegisterBroker, Replicas, UnfenceBroker};
    use uuid::Uuid;

    #[test]
    fn a_partition_is_given_no_fewer_replicas_than_acks_all_asks_for() {
        let mut state = MetadataState::new("cluster");
        let mut apply = |kind: Kind| {
            let command = command::Command { controller_epoch: state.controller_epoch(), ..kind.into() };
            state.apply(state.index() + 1, &command).map(drop).expect("accepted");
        };
        let incarnation: bytes::Bytes = Uuid::from_u128(1).as_bytes().to_vec().into();
        for broker_id in 1..=4 {
            let incarnation = incarnation.clone();
            let broker = RegisterBroker { broker_id, incarnation, boots: 1, ..RegisterBroker::default() };
            apply(Kind::RegisterBroker(broker));
        }
        apply(Kind::BecomeController(BecomeController { broker_id: 1, incarnation: incarnation.clone() }));
        for broker_id in 1..=4 {
            apply(Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: incarnation.clone() }));
        }
        apply(Kind::CreateTopic(CreateTopic {
            name: "t".into(),
            topic_id: TopicId::from_bytes([1; 16]).to_wire(),
            partitions: vec![Replicas { brokers: vec![1, 2, 3] }, Replicas { brokers: vec![1] }],
            config: [("min.insync.replicas".to_owned(), "2".to_owned())].into(),
            ..CreateTopic::default()
        }));
        let planned = |partition, replicas: &[i32]| {
            one(&state, wire::PartitionReplicas { topic: "t".into(), partition, replicas: replicas.to_vec() })
        };
        let refused = planned(0, &[4]).unwrap_err().to_string();
        assert!(refused.contains("fewer than min.insync.replicas"), "{refused}");
        assert_eq!(planned(0, &[4, 2]).map(|it| it.to).ok(), Some(vec![4, 2]));
        assert_eq!(planned(1, &[4]).map(|it| it.to).ok(), Some(vec![4]), "it has one already");
    }
}
