//! Where new partitions are kept: pure, and the same for the same state and seed.
//!
//! A partition's replicas are in as many racks as there are; within that, every active broker that is not to be emptied keeps as many
//! partitions of the topic as the next, and then as many at all; leaderships are spread likewise. What is left open, the seed decides.
//!
//! Owns: that choice. Refuses: moving what is there already.

use super::command::Replicas;
use super::handle::MetadataError;
use super::state::{Broker, BrokerState, MetadataState, Partition, Topic};
use crate::config::BrokerConfig;
use std::collections::BTreeMap;

/// A broker that new replicas may be given to, and what it has: of the topic, and of all topics.
#[derive(Debug)]
struct Candidate<'a> {
    broker_id: i32,
    rack: &'a str,
    replicas: (usize, usize),
    leaders: (usize, usize),
}

/// Replicas of a topic that nobody says more of: as many as there are brokers, but no more than this.
const DEFAULT_REPLICATION_FACTOR: u32 = 3;

/// How often a new topic is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// Brokers that keep each partition.
    pub replication_factor: u32,
    /// Those of them that acks=all needs, unless the topic says something else.
    pub min_insync_replicas: u32,
}

/// How often a new topic is kept, internal ones too: `asked` times (0: nobody says), else as the broker's settings say, else three times
/// where there are so many active brokers.
pub fn copies(state: &MetadataState, asked: u32, config: &BrokerConfig) -> Copies {
    let active = || {
        let active = state.brokers().filter(|broker| broker.takes_partitions()).count();
        u32::try_from(active).unwrap_or(u32::MAX).clamp(1, DEFAULT_REPLICATION_FACTOR)
    };
    let said = [asked, config.default_replication_factor].into_iter().find(|said| *said > 0);
    let replication_factor = said.unwrap_or_else(active);
    Copies { replication_factor, min_insync_replicas: config.topic_defaults.min_insync_replicas(replication_factor) }
}

/// Replicas for `partitions` new partitions of a topic, each leader first. `topic`: what there is of it already.
///
/// # Errors
/// [`MetadataError::InvalidReplicationFactor`]: fewer brokers are active than a partition is to have replicas.
pub fn place(
    state: &MetadataState,
    topic: Option<&Topic>,
    partitions: u32,
    replication_factor: u32,
    seed: u64,
) -> Result<Vec<Replicas>, MetadataError> {
    let mut candidates = candidates(state, topic);
    let (asked, brokers) = (replication_factor, candidates.len());
    if asked == 0 || asked as usize > brokers {
        return Err(MetadataError::InvalidReplicationFactor { asked, brokers, emptied: emptied(state) });
    }
    let first = topic.map_or(0, |topic| topic.partitions.len() as u64);
    let placed = (first..first + u64::from(partitions)).map(|number| {
        let chosen = choose(&mut candidates, replication_factor as usize, |broker_id| dice(seed, number, broker_id));
        Replicas { brokers: chosen }
    });
    Ok(placed.collect())
}

/// The brokers that run and are to keep nothing.
fn emptied(state: &MetadataState) -> Vec<i32> {
    let are = |broker: &&Broker| broker.state == BrokerState::Active && broker.is_emptied;
    state.brokers().filter(are).map(|broker| broker.id).collect()
}

fn candidates<'a>(state: &'a MetadataState, topic: Option<&Topic>) -> Vec<Candidate<'a>> {
    let mut candidates: BTreeMap<i32, Candidate<'a>> = state
        .brokers()
        .filter(|broker| broker.takes_partitions())
        .map(|broker| {
            let candidate = Candidate { broker_id: broker.id, rack: &broker.rack, replicas: (0, 0), leaders: (0, 0) };
            (broker.id, candidate)
        })
        .collect();
    for known in state.topics() {
        let is_this = usize::from(topic.is_some_and(|topic| topic.id == known.id));
        for Partition { leader, replicas, .. } in &known.partitions {
            for broker in replicas {
                if let Some(candidate) = candidates.get_mut(broker) {
                    candidate.replicas.0 += is_this;
                    candidate.replicas.1 += 1;
                }
            }
            if let Some(candidate) = candidates.get_mut(leader) {
                candidate.leaders.0 += is_this;
                candidate.leaders.1 += 1;
            }
        }
    }
    candidates.into_values().collect()
}

/// The replicas of one partition, which count for the next.
fn choose(candidates: &mut [Candidate<'_>], replication_factor: usize, dice: impl Fn(i32) -> u64) -> Vec<i32> {
    let mut in_rack: BTreeMap<&str, usize> = BTreeMap::new();
    let mut chosen: Vec<i32> = Vec::with_capacity(replication_factor);
    while chosen.len() < replication_factor {
        let free = candidates.iter_mut().filter(|candidate| !chosen.contains(&candidate.broker_id));
        let next = free.min_by_key(|candidate| {
            let near = in_rack.get(candidate.rack).copied().unwrap_or(0);
            (near, candidate.replicas, dice(candidate.broker_id))
        });
        let Some(next) = next else { break };
        next.replicas.0 += 1;
        next.replicas.1 += 1;
        *in_rack.entry(next.rack).or_default() += 1;
        chosen.push(next.broker_id);
    }
    let kept_by = candidates.iter_mut().filter(|candidate| chosen.contains(&candidate.broker_id));
    let leader = kept_by.min_by_key(|candidate| (candidate.leaders, dice(candidate.broker_id)));
    let leader = leader.map(|leader| {
        leader.leaders.0 += 1;
        leader.leaders.1 += 1;
        leader.broker_id
    });
    // Those that would lead next are spread by the dice.
    chosen.sort_by_key(|broker| (Some(*broker) != leader, dice(*broker)));
    chosen
}

/// The same number for the same three, and else any (splitmix64).
fn dice(seed: u64, partition: u64, broker_id: i32) -> u64 {
    let mixed = |number: u64| {
        let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    };
    mixed(mixed(mixed(seed) ^ partition) ^ u64::from(broker_id.cast_unsigned()))
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
