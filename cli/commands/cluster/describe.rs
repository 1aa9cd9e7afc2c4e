//! `headwater cluster describe`: who is in the cluster, what is wrong with it, and what to do about it.

use anyhow::{Context, Result};
use headwater_client::{Admin, ClusterBroker, ClusterDescription, PartitionState, QuorumHealth};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

use super::health::lost_why;
use super::moves::ids;
use crate::args::Global;
use crate::commands::look_failed;
use crate::output::{plural, print, print_json, table};

/// Partitions of each kind of trouble that are named; a command lists the rest.
const NAMED: usize = 5;
/// The least version of metadata that were recovered by hand: no cluster comes as far by commands alone.
const RECOVERED: u64 = 1 << 32;

/// Partitions by topic.
type Partitions = BTreeMap<String, Vec<PartitionState>>;

/// Runs the command. `stale`: the admin asks for what a broker knows, which may be of the past.
pub(super) async fn describe(global: &Global, admin: &Admin, stale: bool) -> Result<()> {
    let told = admin.describe_cluster().await;
    let told = told.map_err(|error| look_failed("cannot describe the cluster", "cluster describe", error))?;
    if global.json {
        return print_json(&Description::from(&told));
    }
    let partitions = match told.offline + told.under_min_isr + told.under_replicated {
        0 => Partitions::new(),
        _ => admin.partition_states().await.context("cannot see the cluster's partitions")?,
    };
    // Where nobody decides anything any more, nobody is said to be gone either.
    let quorum = match stale {
        true => admin.cluster_health().await.ok().and_then(|told| told.quorum).filter(QuorumHealth::is_lost),
        false => None,
    };
    print(text(&told, &partitions, quorum.as_ref()))
}

#[derive(Serialize)]
pub(super) struct Description<'a> {
    cluster_id: &'a str,
    controller: Option<i32>,
    controller_epoch: u64,
    voters: &'a [i32],
    vacant_votes: u32,
    observers: &'a [i32],
    brokers: Vec<Broker<'a>>,
    under_replicated: u64,
    under_min_isr: u64,
    offline: u64,
    metadata_version: u64,
}

#[derive(Serialize)]
struct Broker<'a> {
    id: i32,
    incarnation: &'a str,
    address: &'a str,
    rack: &'a str,
    state: &'a str,
    leaders: u64,
    partitions: u64,
    registered: i64,
}

impl<'a> From<&'a ClusterDescription> for Description<'a> {
    fn from(told: &'a ClusterDescription) -> Description<'a> {
        let brokers = told.brokers.iter().map(|broker| Broker {
            id: broker.id,
            incarnation: &broker.incarnation,
            address: &broker.address,
            rack: &broker.rack,
            state: &broker.state,
            leaders: broker.leaders,
            partitions: broker.partitions,
            registered: broker.registered_ms,
        });
        Description {
            cluster_id: &told.cluster_id,
            controller: told.controller,
            controller_epoch: told.controller_epoch,
            voters: &told.voters,
            vacant_votes: told.vacant_votes,
            observers: &told.observers,
            brokers: brokers.collect(),
            under_replicated: told.under_replicated,
            under_min_isr: told.under_min_isr,
            offline: told.offline,
            metadata_version: told.metadata_version,
        }
    }
}

/// The cluster at a glance: what is wrong stands first, who is there next, what to do about it last.
fn text(told: &ClusterDescription, partitions: &Partitions, lost: Option<&QuorumHealth>) -> String {
    let mut faults = faults(told);
    faults.splice(0..0, lost.map(|quorum| format!("{}, and what follows is what was known before", lost_why(quorum))));
    let state = if faults.is_empty() { "all is well".to_owned() } else { faults.join("; ") };
    let mut text = format!("cluster {}, {}: {state}\n\n", told.cluster_id, plural(told.brokers.len() as i64, "broker"));
    text += &table(
        &["broker", "state", "metadata", "leaders", "partitions", "rack", "address"],
        told.brokers.iter().map(|broker| {
            vec![
                broker.id.to_string(),
                broker.state.clone(),
                part_of(told, broker),
                broker.leaders.to_string(),
                broker.partitions.to_string(),
                if broker.rack.is_empty() { "-".to_owned() } else { broker.rack.clone() },
                broker.address.clone(),
            ]
        }),
    );
    text += &format!("\n{}\n", quorum(told, lost));
    for trouble in [Trouble::Offline, Trouble::UnderMinIsr, Trouble::UnderReplicated] {
        text += &trouble.list(partitions);
    }
    let mut next = next(told, partitions);
    next.splice(0..0, lost.and_then(|quorum| start_voters(told, quorum)));
    if !next.is_empty() {
        text += "\nwhat to do next:\n";
        next.iter().for_each(|step| text += &format!("  {step}\n"));
    }
    text
}

/// What is wrong, in some words each.
fn faults(told: &ClusterDescription) -> Vec<String> {
    let mut faults = Vec::new();
    if told.controller.is_none() {
        faults.push("no controller is in office".to_owned());
    }
    let gone = fenced(told);
    if !gone.is_empty() {
        faults.push(format!("not heard of: broker {}", ids(&gone)));
    }
    for (count, what) in [
        (told.offline, "without a leader"),
        (told.under_min_isr, "under min.insync.replicas"),
        (told.under_replicated, "under-replicated"),
    ] {
        if count > 0 {
            faults.push(format!("{} {what}", plural(i128::from(count), "partition")));
        }
    }
    faults
}

/// What a broker does for the metadata.
fn part_of(told: &ClusterDescription, broker: &ClusterBroker) -> String {
    let votes = if told.voters.contains(&broker.id) {
        "votes"
    } else if told.observers.contains(&broker.id) {
        "follows"
    } else {
        "-"
    };
    if told.controller == Some(broker.id) { format!("{votes}, controller") } else { votes.to_owned() }
}

/// Brokers that do not run, as far as is known.
fn fenced(told: &ClusterDescription) -> Vec<i32> {
    told.brokers.iter().filter(|broker| broker.state == "fenced").map(|broker| broker.id).collect()
}

/// How the metadata stand.
fn quorum(told: &ClusterDescription, lost: Option<&QuorumHealth>) -> String {
    let fenced = fenced(told);
    let active = told.voters.iter().filter(|voter| !fenced.contains(voter)).count();
    let voters = told.voters.len() + told.vacant_votes as usize;
    let active = lost.map_or(active, |quorum| quorum.answering.len());
    let bears = active.saturating_sub(voters / 2 + 1);
    let bears = match (active > voters / 2, bears) {
        (false, _) => "too few: nothing can be changed".to_owned(),
        (true, 0) => "none of them may be lost".to_owned(),
        (true, bears) => format!("{bears} of them may be lost"),
    };
    let vacant = match told.vacant_votes {
        0 => String::new(),
        vacant => format!(
            "; {} nobody's any more: a disk was emptied",
            plural(vacant, "vote") + if vacant == 1 { " is" } else { " are" }
        ),
    };
    format!(
        "metadata version {}, controller epoch {}; {active} of {} there ({bears}{vacant})",
        told.metadata_version,
        told.controller_epoch,
        plural(voters as i64, "voter")
    )
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Offline,
    UnderMinIsr,
    UnderReplicated,
}

impl Trouble {
    /// The worst that a partition is in.
    fn of(partition: &PartitionState) -> Option<Trouble> {
        match partition {
            it if it.is_offline() => Some(Trouble::Offline),
            it if it.is_under_min_isr() => Some(Trouble::UnderMinIsr),
            it if it.is_under_replicated() => Some(Trouble::UnderReplicated),
            _ => None,
        }
    }

    /// What it means, and the command that lists all of it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Trouble::Offline => ("offline: nobody leads them, nothing can be written or read", "--offline"),
            Trouble::UnderMinIsr => {
                ("under min.insync.replicas: writes that wait for all (acks=all) are refused", "--under-min-isr")
            }
            Trouble::UnderReplicated => {
                ("under-replicated: written and read, but a replica is not in sync", "--under-replicated")
            }
        }
    }

    /// The partitions in it, worse ones left out.
    fn list(self, partitions: &Partitions) -> String {
        let all = || partitions.iter().flat_map(|(topic, all)| all.iter().map(move |it| (topic, it)));
        let concerned: Vec<_> = all().filter(|(_, it)| Trouble::of(it) == Some(self)).collect();
        if concerned.is_empty() {
            return String::new();
        }
        let (words, flag) = self.words();
        let mut text = format!("\n{words}\n");
        let rows = concerned.iter().take(NAMED).map(|(topic, it)| {
            let leader = it.leader.map_or_else(|| "no leader".to_owned(), |leader| format!("leader {leader}"));
            let needed = match self {
                Trouble::UnderMinIsr => format!(", {} needed", it.min_insync_replicas),
                _ => String::new(),
            };
            let in_sync = format!("in sync {} of {}{needed}", it.isr.len(), it.replicas.len());
            let missing = missing(it);
            let missing = if missing.is_empty() { String::new() } else { format!("missing {}", ids(&missing)) };
            vec![format!("  {topic}-{}", it.partition), leader, in_sync, missing]
        });
        // The titles of a table are its first line.
        let rows = table(&[""; 4], rows);
        text += rows.split_once('\n').map_or("", |(_, rows)| rows);
        if concerned.len() > NAMED {
            text += &format!("  and {} more: headwater topic list {flag}\n", concerned.len() - NAMED);
        }
        text
    }
}

/// Replicas that are not in sync.
fn missing(partition: &PartitionState) -> Vec<i32> {
    partition.replicas.iter().copied().filter(|broker| !partition.isr.contains(broker)).collect()
}

/// Where the metadata quorum is lost: who has to come back.
fn start_voters(told: &ClusterDescription, quorum: &QuorumHealth) -> Option<String> {
    let silent: Vec<i32> = told.voters.iter().copied().filter(|voter| !quorum.answering.contains(voter)).collect();
    (!silent.is_empty()).then(|| {
        format!(
            "start broker {} again, or mend the network between the voters: nothing is decided before",
            ids(&silent)
        )
    })
}

/// Whether a broker has the metadata of before they were recovered by hand, and has not joined again since.
fn is_left_behind(told: &ClusterDescription, broker: &ClusterBroker) -> bool {
    told.metadata_version >= RECOVERED && !told.voters.contains(&broker.id) && !told.observers.contains(&broker.id)
}

/// What a person does now, the most urgent first.
fn next(told: &ClusterDescription, partitions: &Partitions) -> Vec<String> {
    let gone = fenced(told);
    let mut next = Vec::new();
    let troubled = || partitions.values().flatten().filter(|it| Trouble::of(it).is_some());
    let lost = told.brokers.iter().filter(|broker| gone.contains(&broker.id));
    let (left_behind, lost): (Vec<&ClusterBroker>, Vec<&ClusterBroker>) =
        lost.partition(|broker| is_left_behind(told, broker));
    let named = |brokers: &[&ClusterBroker]| {
        let each: Vec<String> = brokers.iter().map(|broker| format!("{} ({})", broker.id, broker.address)).collect();
        each.join(", ")
    };
    if !left_behind.is_empty() {
        next.push(format!(
            "do NOT start broker {} as it is: these metadata were recovered without it, and those who have the old ones would be a second cluster. Have it join first, headwater cluster join --config FILE --again, and only then start it",
            named(&left_behind)
        ));
    }
    if !lost.is_empty() {
        next.push(format!(
            "start broker {} again, on its folder: headwater broker --config FILE. What it keeps comes back by itself",
            named(&lost)
        ));
        next.push(
            "if its disk is empty or new: headwater cluster join --config FILE before that, and nothing else: it votes again and fetches what it kept"
                .to_owned(),
        );
    }
    if let [first, ..] = &*gone {
        let votes = if told.voters.contains(first) { format!(" voters remove {first},") } else { String::new() };
        next.push(format!(
            "only if it is gone for good: have another broker join where too few are left, then headwater cluster{votes} drain {first}, remove {first}"
        ));
    }
    if troubled().any(PartitionState::is_offline) {
        next.push(
            "only if none of their replicas comes back: headwater cluster elect --unclean --dry-run says what an election would LOSE"
                .to_owned(),
        );
    }
    let led = troubled().filter(|it| !it.is_offline());
    let behind: BTreeSet<i32> = led.flat_map(missing).filter(|broker| !gone.contains(broker)).collect();
    if !behind.is_empty() {
        next.push(format!(
            "broker {} runs and is catching up: wait; where that does not end, its log and its metric headwater_replicas_fenced say why",
            ids(&behind.into_iter().collect::<Vec<_>>())
        ));
    }
    for broker in told.brokers.iter().filter(|broker| broker.state == "draining") {
        let id = broker.id;
        next.push(match broker.partitions {
            0 => {
                // Whoever votes is not removed, and once it is stopped its vote is missed.
                let votes = match told.voters.contains(&id) {
                    true => format!("headwater cluster voters remove {id}, then "),
                    false => String::new(),
                };
                format!(
                    "broker {id} is drained: {votes}stop it, then headwater cluster remove {id}; or keep it: headwater cluster drain {id} --cancel"
                )
            }
            _ => format!("broker {id} is being emptied or stopped: headwater cluster reassign status shows what moves"),
        });
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(states: &[&str]) -> ClusterDescription {
        let broker = |(id, state): (i32, &&str)| ClusterBroker {
            id,
            incarnation: format!("i{id}"),
            address: format!("10.0.0.{id}:9092"),
            rack: if id == 2 { String::new() } else { format!("rack-{id}") },
            state: (*state).to_owned(),
            leaders: 7,
            partitions: if *state == "draining" { 0 } else { 12 },
            registered_ms: 0,
        };
        ClusterDescription {
            cluster_id: "prod".into(),
            controller: Some(2),
            controller_epoch: 40,
            voters: vec![1, 2, 3],
            vacant_votes: 0,
            observers: vec![4],
            brokers: (1..).zip(states).map(broker).collect(),
            under_replicated: 0,
            under_min_isr: 0,
            offline: 0,
            metadata_version: 123,
        }
    }

    fn partition(partition: u32, replicas: &[i32], isr: &[i32], min_insync_replicas: u32) -> PartitionState {
        let (replicas, isr) = (replicas.to_vec(), isr.to_vec());
        PartitionState { partition, leader: isr.first().copied(), replicas, isr, min_insync_replicas }
    }

    #[test]
    fn a_cluster_that_is_well_is_a_table_and_a_line() {
        let told = cluster(&["active", "active", "active", "active"]);
        assert_eq!(
            text(&told, &Partitions::new(), None),
            "cluster prod, 4 brokers: all is well\n\n\
             broker  state   metadata           leaders  partitions  rack    address\n     \
             1  active  votes                    7          12  rack-1  10.0.0.1:9092\n     \
             2  active  votes, controller        7          12  -       10.0.0.2:9092\n     \
             3  active  votes                    7          12  rack-3  10.0.0.3:9092\n     \
             4  active  follows                  7          12  rack-4  10.0.0.4:9092\n\n\
             metadata version 123, controller epoch 40; 3 of 3 voters there (1 of them may be lost)\n"
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_what_to_do_about_it() {
        let mut told = cluster(&["fenced", "active", "active", "draining"]);
        (told.offline, told.under_min_isr, told.under_replicated) = (1, 2, 10);
        let many = (0..7).map(|number| partition(number, &[2, 1, 3], &[2, 3], 2));
        let partitions = Partitions::from([
            ("alone".into(), vec![partition(0, &[1], &[], 1), partition(1, &[2], &[2], 1)]),
            ("many".into(), many.chain([partition(7, &[2, 3], &[2], 1)]).collect()),
            ("strict".into(), vec![partition(0, &[2, 1, 3], &[2, 3], 3)]),
        ]);
        let text = text(&told, &partitions, None);
        let (picture, rest) = text.split_once("metadata version").expect("the quorum's line");
        assert!(picture.starts_with(
            "cluster prod, 4 brokers: not heard of: broker 1; 1 partition without a leader; 2 partitions under min.insync.replicas; 10 partitions under-replicated\n"
        ));
        assert_eq!(
            rest,
            " 123, controller epoch 40; 2 of 3 voters there (none of them may be lost)\n\n\
             offline: nobody leads them, nothing can be written or read\n  \
             alone-0  no leader  in sync 0 of 1  missing 1\n\n\
             under min.insync.replicas: writes that wait for all (acks=all) are refused\n  \
             strict-0  leader 2  in sync 2 of 3, 3 needed  missing 1\n\n\
             under-replicated: written and read, but a replica is not in sync\n  \
             many-0  leader 2  in sync 2 of 3  missing 1\n  \
             many-1  leader 2  in sync 2 of 3  missing 1\n  \
             many-2  leader 2  in sync 2 of 3  missing 1\n  \
             many-3  leader 2  in sync 2 of 3  missing 1\n  \
             many-4  leader 2  in sync 2 of 3  missing 1\n  \
             and 3 more: headwater topic list --under-replicated\n\n\
             what to do next:\n  \
             start broker 1 (10.0.0.1:9092) again, on its folder: headwater broker --config FILE. What it keeps comes back by itself\n  \
             if its disk is empty or new: headwater cluster join --config FILE before that, and nothing else: it votes again and fetches what it kept\n  \
             only if it is gone for good: have another broker join where too few are left, then headwater cluster voters remove 1, drain 1, remove 1\n  \
             only if none of their replicas comes back: headwater cluster elect --unclean --dry-run says what an election would LOSE\n  \
             broker 3 runs and is catching up: wait; where that does not end, its log and its metric headwater_replicas_fenced say why\n  \
             broker 4 is drained: stop it, then headwater cluster remove 4; or keep it: headwater cluster drain 4 --cancel\n"
        );
        told.voters.push(4);
        let voting = super::text(&told, &partitions, None);
        let steps =
            "broker 4 is drained: headwater cluster voters remove 4, then stop it, then headwater cluster remove 4; or";
        assert!(voting.contains(steps), "{voting}");
    }

    #[test]
    fn votes_that_nobody_casts_count_among_those_of_which_a_majority_is_needed() {
        let told = |vacant_votes| {
            let told = ClusterDescription { vacant_votes, ..cluster(&["active"; 5]) };
            text(&told, &Partitions::new(), None).lines().last().expect("the quorum's line").to_owned()
        };
        let line = "metadata version 123, controller epoch 40; 3 of";
        let nobody = "nobody's any more: a disk was emptied)";
        assert_eq!(told(1), format!("{line} 4 voters there (none of them may be lost; 1 vote is {nobody}"));
        assert_eq!(told(2), format!("{line} 5 voters there (none of them may be lost; 2 votes are {nobody}"));
    }

    /// Who followed the advice had two clusters of one id, and both took records.
    #[test]
    fn who_was_left_behind_by_a_recovery_joins_again_before_it_is_started() {
        let mut told = cluster(&["active", "fenced", "fenced", "fenced"]);
        (told.voters, told.observers, told.metadata_version) = (vec![1], vec![3], RECOVERED + 7);
        let said = text(&told, &Partitions::new(), None);
        assert!(said.contains("do NOT start broker 2 (10.0.0.2:9092), 4 (10.0.0.4:9092) as it is"), "{said}");
        assert!(said.contains("cluster join --config FILE --again, and only then start it"), "{said}");
        assert!(
            said.contains("\n  start broker 3 (10.0.0.3:9092) again, on its folder"),
            "it has joined again: {said}"
        );
        // One that never was a member of these metadata has no other ones either.
        told.metadata_version = 123;
        let said = text(&told, &Partitions::new(), None);
        assert!(!said.contains("do NOT start") && said.contains("  start broker 2 (10.0.0.2:9092), 3"), "{said}");
    }

    #[test]
    fn a_lost_quorum_is_said() {
        let mut told = cluster(&["fenced", "fenced", "active"]);
        told.controller = None;
        let text = text(&told, &Partitions::new(), None);
        assert!(text.contains("no controller is in office; not heard of: broker 1,2"), "{text}");
        let too_few = "1 of 3 voters there (too few: nothing can be changed)";
        assert!(text.contains(too_few), "{text}");
        // Nobody decided that the others are gone.
        let told = cluster(&["active"; 3]);
        let lost = QuorumHealth { voters: 3, answering: vec![2] };
        let text = super::text(&told, &Partitions::new(), Some(&lost));
        assert!(text.contains("brokers: the metadata quorum is lost: of 3 voters 1 (broker 2) answers"), "{text}");
        assert!(text.contains(too_few) && text.contains("start broker 1,3 again"), "{text}");
    }
}
