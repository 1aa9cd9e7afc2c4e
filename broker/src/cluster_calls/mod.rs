//! Calls about the cluster: who is in it, who votes, who is forgotten.
//!
//! Owns: what they mean in terms of the metadata and the quorum. Refuses: decisions ([`crate::metadata`] makes them).
//! Read next: [`crate::metadata::raft::quorum`].

pub(crate) mod health;
pub(crate) mod moves;

use crate::command_id::CommandId;
use crate::metadata::command::{self, command::Command as Kind};
use crate::metadata::raft::{Change, Membership, RaftNode, succession};
use crate::metadata::state::{Broker, BrokerState, NO_LEADER};
use crate::metadata::{MetadataError, MetadataState, Refusal};
use crate::shared::Shared;
use headwater_proto::ErrorCode;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, Done};
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;

type Answer = Result<Response, wire::Error>;

/// How long it is waited for what may not have come here yet, before somebody is told to ask again.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Time for a change of who votes.
const CHANGE: Duration = Duration::from_secs(20);

/// Sees everything that anybody was told is in force before this, unless it is to be stale.
pub(crate) async fn see(shared: &Shared, stale: bool) -> Result<(), wire::Error> {
    if stale {
        return Ok(());
    }
    let within = Duration::from_millis(shared.config.request_timeout_ms);
    catch_up(shared, within).await.map_err(|error| wire::Error::from(&error))
}

/// What others were told may not have come here yet. So before anything is refused for good, everything is waited for that was in force
/// when it was asked for.
///
/// # Errors
/// Not in time, for whatever reason: nobody can say here that it is not so, and asking again may help.
pub(crate) async fn look_again(shared: &Shared) -> Result<(), wire::Error> {
    let seen = catch_up(shared, LOOK_AGAIN).await;
    seen.map_err(|error| {
        let why = format!("this broker does not know the newest metadata: {error}");
        wire::Error::new(ErrorCode::TimedOut, why)
    })
}

async fn catch_up(shared: &Shared, within: Duration) -> Result<(), MetadataError> {
    if shared.ready.is_none() {
        // Nobody else decides.
        return Ok(());
    }
    shared.metadata.catch_up(Instant::now() + within).await
}

pub(crate) async fn describe(shared: &Shared, request: &wire::DescribeCluster) -> Answer {
    see(shared, request.stale).await?;
    let state = shared.metadata.state();
    let membership = shared.node.as_ref().map(RaftNode::membership).unwrap_or_default();
    let (voters, vacant_votes) = votes(&state, &membership);
    let learners: BTreeSet<u64> = membership.learner_ids().collect();
    let counted = count(&state);
    let brokers = state.brokers().map(|broker| {
        let (leaders, partitions) = counted.by_broker.get(&broker.id).copied().unwrap_or_default();
        wire::BrokerDescription {
            broker_id: broker.id,
            incarnation: broker.incarnation.as_bytes().to_vec().into(),
            address: if broker.id == shared.broker_id() { shared.advertised() } else { broker.address.clone() },
            rack: broker.rack.clone(),
            state: shown(broker).to_owned(),
            leaders,
            partitions,
            registered_ms: broker.registered_ms,
        }
    });
    Ok(Response::DescribeCluster(wire::DescribeClusterResponse {
        cluster_id: state.cluster_id().to_owned(),
        controller: state.controller().map_or(-1, |(broker_id, _)| broker_id),
        controller_epoch: state.controller_epoch(),
        voters,
        observers: those(&state, &learners),
        brokers: brokers.collect(),
        under_replicated: counted.under_replicated,
        offline: counted.offline,
        metadata_version: state.index(),
        under_min_isr: counted.under_min_isr,
        vacant_votes,
    }))
}

/// The brokers that are these members.
fn those(state: &MetadataState, members: &BTreeSet<u64>) -> Vec<i32> {
    state.brokers().filter(|broker| members.contains(&broker.node_id)).map(|broker| broker.id).collect()
}

/// The brokers that vote on the metadata, and how many votes are nobody's, or nobody's any more.
fn votes(state: &MetadataState, membership: &Membership) -> (Vec<i32>, u32) {
    // While the voters change, both sets of them decide: one that only the new set has votes once the old one is given up.
    let in_all_sets = |id: &u64| membership.get_joint_config().iter().all(|set| set.contains(id));
    let members: BTreeSet<u64> = membership.voter_ids().filter(in_all_sets).collect();
    let voters = those(state, &members);
    let vacant = members.len().saturating_sub(voters.len());
    (voters, u32::try_from(vacant).unwrap_or(u32::MAX))
}

/// The state of a broker in a word: one that is emptied drains too, though it serves what it has.
fn shown(broker: &Broker) -> &'static str {
    match broker.state {
        BrokerState::Active if broker.is_emptied => BrokerState::Draining.name(),
        state => state.name(),
    }
}

#[derive(Default)]
struct Counted {
    /// What each broker leads, and what it keeps.
    by_broker: HashMap<i32, (u64, u64)>,
    under_replicated: u64,
    under_min_isr: u64,
    offline: u64,
}

fn count(state: &MetadataState) -> Counted {
    let mut counted = Counted::default();
    for topic in state.topics() {
        for partition in &topic.partitions {
            counted.under_replicated += u64::from(partition.isr.len() < partition.replicas.len());
            counted.under_min_isr += u64::from(partition.isr.len() < topic.min_insync_replicas() as usize);
            counted.offline += u64::from(partition.leader == NO_LEADER);
            for broker in &partition.replicas {
                counted.by_broker.entry(*broker).or_default().1 += 1;
            }
            if partition.leader != NO_LEADER {
                counted.by_broker.entry(partition.leader).or_default().0 += 1;
            }
        }
    }
    counted
}

fn node_of(shared: &Shared) -> Result<&RaftNode, wire::Error> {
    let none = || wire::Error::new(ErrorCode::InvalidRequest, "this broker has no member of a metadata quorum");
    shared.node.as_ref().ok_or_else(none)
}

fn registered(state: &MetadataState, broker_id: i32) -> Result<&Broker, wire::Error> {
    let unknown = || wire::Error::from(&MetadataError::from(Refusal::UnknownBroker(broker_id)));
    state.broker(broker_id).ok_or_else(unknown)
}

/// Makes these changes of who votes and who follows, one after another. Asked for again, what is done is done.
async fn change_members(shared: &Shared, changes: impl IntoIterator<Item = Change>) -> Result<(), wire::Error> {
    let (node, deadline) = (node_of(shared)?, Instant::now() + CHANGE);
    for change in changes {
        node.change_members(change, deadline).await.map_err(|error| wire::Error::from(&error))?;
    }
    Ok(())
}

pub(crate) async fn change_voters(shared: &Shared, request: &wire::ChangeVoters) -> Answer {
    see(shared, false).await?;
    let (state, members) = (shared.metadata.state(), node_of(shared)?.membership());
    let broker = registered(&state, request.broker_id)?;
    let changes = match request.votes {
        true => [succession::due(broker, &members), vec![Change::Promote(broker.node_id)]].concat(),
        // Before its disk was emptied it was another member, and nobody is that one any more.
        false => {
            let gone = succession::gone(broker, &members).into_iter().map(Change::Remove);
            gone.chain([Change::Demote(broker.node_id)]).collect()
        }
    };
    change_members(shared, changes).await?;
    Ok(Response::Done(Done {}))
}

/// Forgets a broker that does not run: it keeps nothing, and is no member of the quorum any more.
pub(crate) async fn remove_broker(shared: &Shared, request: &wire::RemoveBroker, id: CommandId) -> Answer {
    see(shared, false).await?;
    let (broker_id, state) = (request.broker_id, shared.metadata.state());
    if id.is_known(&state) && state.broker(broker_id).is_none() {
        return Ok(Response::Done(Done {}));
    }
    let broker = registered(&state, broker_id)?;
    if broker.state != BrokerState::Fenced {
        let why = format!("broker {broker_id} is running: stop it first");
        return Err(wire::Error::new(ErrorCode::InvalidRequest, why));
    }
    let members = node_of(shared)?.membership();
    if members.voter_ids().any(|voter| broker.is_or_was(voter)) {
        let why =
            format!("broker {broker_id} votes on the metadata: `headwater cluster voters remove {broker_id}` first");
        return Err(wire::Error::new(ErrorCode::InvalidRequest, why));
    }
    // What keeps partitions stays whole.
    let remove = id.command(0, Kind::RemoveBroker(command::RemoveBroker { broker_id }));
    shared.metadata.validate(|_| Ok(remove.clone())).map_err(|error| wire::Error::from(&error))?;
    // Asked for again, it is found by its registration.
    let gone = succession::gone(broker, &members).into_iter().chain([broker.node_id]);
    change_members(shared, gone.map(Change::Remove)).await?;
    let removed = shared.metadata.propose(remove).await;
    removed.map_err(|error| wire::Error::from(&error))?;
    Ok(Response::Done(Done {}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::EmptyNode;
    use std::collections::BTreeMap;

    /// Three of five may not be one less, though they are all that are brokers.
    #[test]
    fn the_votes_of_disks_that_were_emptied_are_counted() {
        let mut state = MetadataState::new("cluster");
        for (index, (broker_id, node_id)) in (1..).zip([(1, 11), (2, 12), (3, 13), (4, 14), (5, 15), (4, 24), (5, 25)])
        {
            let incarnation = vec![index as u8; 16].into();
            let register =
                command::RegisterBroker { broker_id, node_id, incarnation, boots: index, ..Default::default() };
            state.apply(index, &Kind::RegisterBroker(register).into()).expect("accepted");
        }
        let members = |sets: &[&[u64]]| {
            let sets: Vec<BTreeSet<u64>> = sets.iter().map(|set| set.iter().copied().collect()).collect();
            Membership::new(sets, (11..=25).map(|id| (id, EmptyNode {})).collect::<BTreeMap<_, _>>())
        };
        assert_eq!(votes(&state, &members(&[&[11, 12, 13, 14, 15]])), (vec![1, 2, 3], 2));
        let replacing = members(&[&[11, 12, 13, 14, 15], &[11, 12, 13, 24, 15]]);
        assert_eq!(votes(&state, &replacing), (vec![1, 2, 3], 1));
        assert_eq!(votes(&state, &members(&[&[11, 12, 13, 24, 25]])), (vec![1, 2, 3, 4, 5], 0));
    }
}
