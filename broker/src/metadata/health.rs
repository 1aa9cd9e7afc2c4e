//! Which broker may be stopped now without anything becoming unavailable: pure.
//!
//! A broker may be stopped if the metadata quorum has a majority without it, and every partition that it is in sync of keeps
//! a leader and as many in-sync replicas as its min.insync.replicas asks for.
//!
//! And what a person has to do where a partition has no leader: who of its replicas has everything that was acknowledged, and what it takes to
//! go on without it.
//!
//! Owns: that judgement, and its words. Refuses: to stop anything.

use super::state::{Broker, BrokerState, MetadataState, NO_LEADER, Partition};
use std::collections::BTreeSet;

/// Whether a broker may be stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerHealth {
    /// The broker.
    pub broker_id: i32,
    /// Why it may not; `None`: it may.
    pub why_not: Option<String>,
}

/// Of every broker, whether it may be stopped. `voters`: the members of the quorum that vote; two sets of them while they change, and
/// each needs its majority.
pub fn health(state: &MetadataState, voters: &[BTreeSet<u64>]) -> Vec<BrokerHealth> {
    state
        .brokers()
        .map(|broker| BrokerHealth { broker_id: broker.id, why_not: why_not(state, voters, broker) })
        .collect()
}

fn why_not(state: &MetadataState, voters: &[BTreeSet<u64>], broker: &Broker) -> Option<String> {
    match broker.state {
        BrokerState::Active => {}
        BrokerState::Fenced => return Some("it does not run, or is not heard of".to_owned()),
        BrokerState::Draining => return Some("it is stopping already".to_owned()),
    }
    let is_other = |other: &&Broker| other.id != broker.id && other.state == BrokerState::Active;
    let others: Vec<&Broker> = state.brokers().filter(is_other).collect();
    if others.is_empty() {
        return Some("no other broker is active".to_owned());
    }
    for voters in voters.iter().filter(|voters| voters.contains(&broker.node_id)) {
        let needed = voters.len() / 2 + 1;
        let remain = others.iter().filter(|other| voters.contains(&other.node_id)).count();
        if remain < needed {
            return Some(format!(
                "the metadata quorum would lose its majority: {remain} of {} voters would remain, and {needed} are needed",
                voters.len()
            ));
        }
    }
    without(state, broker.id)
}

/// What the partitions lose with a broker.
fn without(state: &MetadataState, broker_id: i32) -> Option<String> {
    let is_active = |broker: &i32| state.broker(*broker).is_some_and(|broker| broker.state == BrokerState::Active);
    let (mut offline, mut too_few, mut first) = (0usize, 0usize, None);
    for topic in state.topics() {
        for (number, partition) in topic.partitions.iter().enumerate() {
            if !partition.isr.contains(&broker_id) {
                continue;
            }
            let remain = partition.isr.iter().filter(|other| **other != broker_id && is_active(other)).count();
            let needed = (topic.min_insync_replicas() as usize).min(partition.replicas.len());
            if remain == 0 {
                offline += 1;
                // What goes offline is named before what only takes no records.
                if offline == 1 {
                    first = Some(format!("{}-{number}", topic.name));
                }
            } else if remain < needed {
                too_few += 1;
                first.get_or_insert_with(|| format!("{}-{number}", topic.name));
            }
        }
    }
    let first = first?;
    let partitions = |count: usize| if count == 1 { "1 partition".to_owned() } else { format!("{count} partitions") };
    let mut words = Vec::new();
    if offline > 0 {
        words.push(format!("{} would have no leader", partitions(offline)));
    }
    if too_few > 0 {
        words.push(format!("{} would have fewer in-sync replicas than min.insync.replicas", partitions(too_few)));
    }
    Some(format!("{} ({first} is one)", words.join(", ")))
}

/// The partitions that nobody leads, and what is to be done about each.
pub fn leaderless(state: &MetadataState) -> impl Iterator<Item = (&str, u32, String)> {
    let partitions = state.topics().flat_map(|topic| topic.partitions.iter().zip(0..).map(move |it| (topic, it)));
    let leaderless = partitions.filter(|(_, (partition, _))| partition.leader == NO_LEADER);
    leaderless.map(|(topic, (partition, number))| (&*topic.name, number, advice(state, &topic.name, number, partition)))
}

/// In an order that loses nothing first: whoever has everything comes back; then whoever had everything is mended; then a person takes the loss.
fn advice(state: &MetadataState, topic: &str, number: u32, partition: &Partition) -> String {
    let elect = format!("`headwater cluster elect --unclean --topic {topic}`");
    let dry = "with --dry-run it only says who would lead and what may be lost";
    let is_active = |broker: &i32| state.broker(*broker).is_some_and(|broker| broker.state == BrokerState::Active);
    let holders: Vec<i32> = partition.isr.iter().chain(&partition.elr).copied().collect();
    let is_back =
        |broker: &i32| is_active(broker) && ![&partition.lost, &partition.fenced].iter().any(|it| it.contains(broker));
    match (&holders[..], &partition.last_known[..]) {
        ([], [last, ..]) if is_back(last) => format!(
            "broker {last} was the last that had everything that was acknowledged, lost it, and has {topic}-{number} again: {elect} lets it lead \
             ({dry}). Nothing is lost then, if what was brought back is whole and no older copy"
        ),
        ([], [last, ..]) if is_active(last) => format!(
            "broker {last} was the last that had everything that was acknowledged, and says that its replica is damaged or gone. Stop it, bring \
             {topic}-{number} in its data folder back or mend it (`headwater segment verify` says what is wrong), start it, and then \
             let it lead: {elect} ({dry}). Without it, the same command lets another replica lead that runs, and WHAT THAT ONE \
             MISSES IS LOST"
        ),
        ([], [last, ..]) => format!(
            "broker {last} was the last that had everything that was acknowledged, and lost it. It does not run: start it with a sound \
             {topic}-{number} in its data folder, and let it lead: {elect} ({dry}). Without it, the same command lets another replica \
             lead that runs, and WHAT THAT ONE MISSES IS LOST"
        ),
        ([], []) => format!(
            "nobody is known to have everything that was acknowledged. {elect} lets a replica lead that runs ({dry})"
        ),
        (holders, _) => {
            let names: Vec<String> = holders.iter().map(i32::to_string).collect();
            let which = match &names[..] {
                [one] => format!("broker {one} has"),
                names => format!("each of brokers {} has", names.join(", ")),
            };
            format!(
                "{which} everything that was acknowledged, and leads once it runs: start it. Only if it never comes back: {elect} lets another \
                 replica lead ({dry}), and WHAT THAT ONE MISSES IS LOST"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::{self, command::Command as Kind};
    use super::*;
    use headwater_proto::TopicId;

    /// So many active brokers, each with the member of its number.
    fn brokers(count: i32) -> MetadataState {
        let mut state = MetadataState::new("cluster");
        for broker_id in 1..=count {
            let incarnation = vec![broker_id as u8; 16].into();
            let node_id = broker_id as u64;
            let register =
                command::RegisterBroker { broker_id, node_id, incarnation, ..command::RegisterBroker::default() };
            apply(&mut state, Kind::RegisterBroker(register));
        }
        state
    }

    fn apply(state: &mut MetadataState, kind: Kind) {
        state.apply(state.index() + 1, &kind.into()).expect("accepted");
    }

    fn create(state: &mut MetadataState, replicas: &[&[i32]], min: u32) {
        let partitions = replicas.iter().map(|brokers| command::Replicas { brokers: brokers.to_vec() }).collect();
        let name = format!("t{}", state.topics().count());
        let topic_id = TopicId::from_bytes([state.topics().count() as u8 + 1; 16]).to_wire();
        let default_min_insync_replicas = min;
        let create =
            command::CreateTopic { name, topic_id, partitions, default_min_insync_replicas, ..Default::default() };
        apply(state, Kind::CreateTopic(create));
    }

    fn voters(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn told(state: &MetadataState, voting: &[u64]) -> Vec<Option<String>> {
        health(state, &[voters(voting)]).into_iter().map(|health| health.why_not).collect()
    }

    #[test]
    fn each_of_three_may_be_stopped_while_two_suffice() {
        let mut state = brokers(3);
        create(&mut state, &[&[1, 2, 3], &[2, 3, 1]], 2);
        assert_eq!(told(&state, &[1, 2, 3]), [None, None, None]);
    }

    #[test]
    fn a_partition_keeps_a_broker_running() {
        let mut state = brokers(3);
        create(&mut state, &[&[1, 2], &[2, 1]], 2);
        create(&mut state, &[&[1]], 1);
        let told = told(&state, &[1, 2, 3]);
        let first = told[0].as_deref().expect("not it");
        assert!(first.contains("1 partition would have no leader") && first.contains("t1-0 is one"), "{first}");
        assert!(first.contains("2 partitions would have fewer in-sync replicas"), "{first}");
        let second = told[1].as_deref().expect("not it");
        assert!(second.contains("t0-0 is one") && !second.contains("leader"), "{second}");
        assert_eq!(told[2], None);
    }

    #[test]
    fn the_quorum_keeps_its_majority() {
        let state = brokers(3);
        assert_eq!(told(&state, &[1, 2, 3]), [None, None, None]);
        let of_two = told(&state, &[1, 2]);
        assert!(of_two[0].as_deref().is_some_and(|why| why.contains("1 of 2 voters would remain, and 2 are needed")));
        assert_eq!(of_two[2], None, "it does not vote");
        // A voter that is gone counts against the others.
        let mut state = state;
        let drain = command::DrainBroker { broker_id: 2, incarnation: vec![2; 16].into() };
        apply(&mut state, Kind::DrainBroker(drain));
        let told = told(&state, &[1, 2, 3]);
        assert!(told[0].as_deref().is_some_and(|why| why.contains("1 of 3 voters")), "{told:?}");
        assert_eq!(told[1].as_deref(), Some("it is stopping already"));
    }

    /// Member 3 is gone, and 4 takes its place: until that is done, nothing is decided without two of 1, 2 and 3.
    #[test]
    fn while_the_voters_change_both_sets_keep_their_majority() {
        let mut state = brokers(4);
        let drain = command::DrainBroker { broker_id: 3, incarnation: vec![3; 16].into() };
        apply(&mut state, Kind::DrainBroker(drain));
        let why_not = |sets: &[BTreeSet<u64>]| health(&state, sets)[1].why_not.clone();
        assert_eq!(why_not(&[voters(&[1, 2, 4])]), None);
        let told = why_not(&[voters(&[1, 2, 3]), voters(&[1, 2, 4])]);
        assert!(told.as_deref().is_some_and(|why| why.contains("1 of 3 voters")), "{told:?}");
    }

    #[test]
    fn of_a_partition_without_a_leader_it_is_said_what_is_to_be_done() {
        let mut state = brokers(2);
        create(&mut state, &[&[1, 2]], 1);
        assert_eq!(leaderless(&state).count(), 0);
        let told = |state: &MetadataState| leaderless(state).next().expect("nobody leads it").2;
        let incarnation = |broker: u8| bytes::Bytes::from(vec![broker; 16]);
        apply(
            &mut state,
            Kind::BecomeController(command::BecomeController { broker_id: 2, incarnation: incarnation(2) }),
        );
        let control = |state: &mut MetadataState, kind: Kind| {
            let command = command::Command { controller_epoch: state.controller_epoch(), ..kind.into() };
            state.apply(state.index() + 1, &command).expect("accepted");
        };
        control(&mut state, Kind::FenceBroker(command::FenceBroker { broker_id: 2, incarnation: incarnation(2) }));
        control(&mut state, Kind::FenceBroker(command::FenceBroker { broker_id: 1, incarnation: incarnation(1) }));
        let said = told(&state);
        assert!(said.starts_with("broker 1 has everything") && said.contains("start it"), "{said}");
        assert!(said.contains("`headwater cluster elect --unclean --topic t0`") && said.contains("LOST"), "{said}");

        let topic_id = TopicId::from_bytes([1; 16]).to_wire();
        let lost = vec![command::TopicPartition { topic_id, partition: 0 }];
        let again = command::RegisterBroker {
            broker_id: 1,
            node_id: 1,
            incarnation: incarnation(9),
            boots: 2,
            lost,
            ..command::RegisterBroker::default()
        };
        apply(&mut state, Kind::RegisterBroker(again));
        let said = told(&state);
        assert!(said.contains("broker 1 was the last") && said.contains("does not run"), "{said}");
        control(&mut state, Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 1, incarnation: incarnation(9) }));
        let said = told(&state);
        assert!(said.contains("says that its replica is damaged or gone") && said.contains("t0-0"), "{said}");
        assert!(said.contains("`headwater segment verify`") && said.contains("--dry-run"), "{said}");
        // As it was told to.
        let mended = command::RegisterBroker {
            broker_id: 1,
            node_id: 1,
            incarnation: incarnation(10),
            boots: 3,
            ..command::RegisterBroker::default()
        };
        apply(&mut state, Kind::RegisterBroker(mended));
        control(&mut state, Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 1, incarnation: incarnation(10) }));
        let said = told(&state);
        assert!(said.contains("has t0-0 again: `headwater cluster elect --unclean --topic t0` lets it lead"), "{said}");
    }

    #[test]
    fn a_broker_alone_is_not_to_be_stopped() {
        assert_eq!(told(&brokers(1), &[1]), [Some("no other broker is active".to_owned())]);
    }
}
