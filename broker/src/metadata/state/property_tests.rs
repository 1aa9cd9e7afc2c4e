//! Any commands of a cluster against what must always hold.

use super::brokers::incarnation_to_wire;
use super::cluster_tests::*;
use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// What one command is made of; the state says what it means.
#[derive(Debug, Clone)]
struct Draw {
    kind: usize,
    broker: i32,
    partition: u32,
    /// Often 0: then nothing is wrong with the command.
    fault: usize,
    replicas: Vec<i32>,
    number: usize,
}

fn any_draw() -> impl Strategy<Value = Draw> {
    let replicas = prop::sample::subsequence(vec![1, 2, 3, 4], 1..4).prop_shuffle();
    let fault = prop_oneof![6 => Just(0), 1 => 1..4usize];
    let kind = prop_oneof![8 => 0..KINDS, 3 => Just(0usize), 7 => Just(1usize), 4 => Just(2usize), 10 => Just(12usize), 2 => Just(13usize)];
    (kind, 1..5i32, 0..3u32, fault, replicas, 0..4usize).prop_map(
        |(kind, broker, partition, fault, replicas, number)| Draw { kind, broker, partition, fault, replicas, number },
    )
}

const KINDS: usize = 16;

fn command_of(state: &MetadataState, draw: &Draw, step: usize) -> command::Command {
    let Draw { broker: broker_id, fault, number, .. } = *draw;
    let known = state.broker(broker_id);
    let incarnation = match (known, fault) {
        (Some(known), 0 | 2 | 3) => incarnation_to_wire(known.incarnation),
        _ => incarnation_to_wire(Uuid::from_bytes([fault as u8; 16])),
    };
    let named = vec![command::TopicPartition { topic_id: TOPIC.to_wire(), partition: draw.partition }];
    let config: &[&[(&str, &str)]] =
        &[&[], MIN_2, &[("min.insync.replicas", "3")], &[("unclean.leader.election.enable", "true")]];
    let config = values(config[number]);
    let kind = match draw.kind {
        0 => {
            let mut fresh = [0x55; 16];
            fresh[..8].copy_from_slice(&(step as u64).to_be_bytes());
            let boots = known.map_or(1, |known| known.boots + 1);
            Kind::RegisterBroker(command::RegisterBroker {
                broker_id,
                incarnation: incarnation_to_wire(Uuid::from_bytes(fresh)),
                boots: if fault == 1 { boots.saturating_sub(2).max(1) } else { boots },
                directory_id: if fault == 2 { "another" } else { "disk" }.into(),
                lost: if fault == 3 { named } else { Vec::new() },
                replaces: known.filter(|_| number > 1).map_or(0, |known| known.epoch),
                feature_level: FEATURE_LEVEL,
                ..command::RegisterBroker::default()
            })
        }
        1 => Kind::UnfenceBroker(command::UnfenceBroker { broker_id, incarnation }),
        2 => Kind::FenceBroker(command::FenceBroker { broker_id, incarnation }),
        3 => Kind::DrainBroker(command::DrainBroker { broker_id, incarnation }),
        4 => Kind::FenceReplicas(command::FenceReplicas { broker_id, incarnation, replicas: named }),
        5 => Kind::BecomeController(command::BecomeController { broker_id, incarnation }),
        6 if number == 0 => Kind::EmptyBroker(command::EmptyBroker { broker_id, is_emptied: fault == 0 }),
        6 => Kind::RemoveBroker(command::RemoveBroker { broker_id }),
        7 => Kind::AlterTopic(command::AlterTopic { topic_id: TOPIC.to_wire(), config }),
        8 if number == 0 => Kind::DeleteTopic(command::DeleteTopic { topic_id: TOPIC.to_wire() }),
        9 => Kind::RegisterBroker(command::RegisterBroker {
            boots: 0,
            feature_level: FEATURE_LEVEL,
            ..registration(broker_id, 99)
        }),
        10 => Kind::AddPartitions(command::AddPartitions {
            topic_id: TOPIC.to_wire(),
            from: state.topic_by_id(&TOPIC).map_or(0, |topic| topic.partitions.len() as u32),
            partitions: vec![command::Replicas { brokers: draw.replicas.clone() }],
        }),
        11 => Kind::RestoreReplicas(command::RestoreReplicas { broker_id, incarnation, replicas: named }),
        12 => alter_of(state, draw).unwrap_or(Kind::AlterTopic(command::AlterTopic::default())),
        13 => Kind::Reassign(command::Reassign {
            topic_id: TOPIC.to_wire(),
            partition: draw.partition,
            replicas: draw.replicas.clone(),
            throttle_bytes_per_second: 0,
        }),
        14 => Kind::CancelReassignment(command::CancelReassignment {
            topic_id: TOPIC.to_wire(),
            partition: draw.partition,
        }),
        15 => Kind::ElectLeaders(command::ElectLeaders { kind: i32::from(number == 0), partitions: named }),
        _ => {
            let replicas = &draw.replicas[..];
            let Kind::CreateTopic(create) = create_topic(&[replicas, replicas, replicas], &[]) else { unreachable!() };
            Kind::CreateTopic(command::CreateTopic { config, ..create })
        }
    };
    let is_controllers = matches!(kind, Kind::UnfenceBroker(_) | Kind::FenceBroker(_));
    command::Command {
        controller_epoch: if is_controllers {
            state.controller_epoch - u64::from(fault == 2).min(state.controller_epoch)
        } else {
            0
        },
        ..kind.into()
    }
}

/// What a leader says of its followers: all that are active are in sync, or some of them, or something is wrong.
fn alter_of(state: &MetadataState, draw: &Draw) -> Option<Kind> {
    let partition = state.topic_by_id(&TOPIC)?.partitions.get(draw.partition as usize)?;
    let leader = state.broker(partition.leader)?;
    let member = |broker: &Broker| command::Member {
        broker_id: broker.id,
        incarnation: incarnation_to_wire(broker.incarnation),
    };
    let is_in = |broker: &&Broker| match draw.fault {
        0 => broker.state == BrokerState::Active && (draw.number > 0 || draw.replicas.contains(&broker.id)),
        1 => true,
        _ => broker.id == draw.broker,
    };
    let replicas = partition.replicas.iter().filter_map(|broker| state.broker(*broker));
    let mut isr: Vec<command::Member> =
        replicas.filter(|broker| broker.id == leader.id || is_in(broker)).map(member).collect();
    if draw.fault == 3 {
        isr.extend(state.brokers().last().map(member));
    }
    Some(Kind::AlterPartition(command::AlterPartition {
        topic_id: TOPIC.to_wire(),
        partition: draw.partition,
        leader: Some(member(leader)),
        leader_epoch: partition.leader_epoch,
        partition_epoch: partition.partition_epoch - i32::from(draw.fault == 2),
        isr,
    }))
}

/// Who led which epoch of a partition.
type Leaderships = BTreeMap<(usize, i32), (i32, Uuid)>;

fn check_step(before: &MetadataState, after: &MetadataState, is_leaders_word: bool, leaderships: &mut Leaderships) {
    assert!(after.controller_epoch >= before.controller_epoch && after.feature_level >= before.feature_level);
    let (Some(new), old) = (after.topic_by_id(&TOPIC), before.topic_by_id(&TOPIC)) else {
        leaderships.clear();
        return;
    };
    for (number, partition) in new.partitions.iter().enumerate() {
        if let Some(old) = old.and_then(|old| old.partitions.get(number)) {
            assert!(partition.leader_epoch >= old.leader_epoch);
            assert!(partition.unclean_recoveries >= old.unclean_recoveries);
            assert_eq!(partition.partition_epoch, old.partition_epoch + i32::from(partition != old));
            // Everybody who was in sync is, or is eligible, or was given up by name; with enough of them in sync, or none to
            // lose, they may go.
            if partition.isr.is_empty() && partition.elr.is_empty() && !(old.isr.is_empty() && old.elr.is_empty()) {
                assert_eq!(partition.last_known.len(), 1, "{old:?} -> {partition:?}");
            }
            let may_miss = !old.isr.contains(&partition.leader) && !old.elr.contains(&partition.leader);
            // The last one in sync, whose disk failed and came back, has everything.
            let is_restored = old.fenced.contains(&partition.leader)
                && old.last_known == [partition.leader]
                && !partition.fenced.contains(&partition.leader);
            let may_miss = may_miss && !is_restored;
            // Whom a draining leader takes into the ISR, leads at once.
            if old.leader != partition.leader && partition.leader != NO_LEADER && may_miss && !is_leaders_word {
                assert_eq!(partition.unclean_recoveries, old.unclean_recoveries + 1, "{old:?} -> {partition:?}");
            }
        }
        if let Some(leader) = after.broker(partition.leader) {
            let led_by = (leader.id, leader.incarnation);
            let first = *leaderships.entry((number, partition.leader_epoch)).or_insert(led_by);
            assert_eq!(first, led_by, "two leaderships in epoch {} of {number}", partition.leader_epoch);
        }
    }
}

/// How often what the rules are there for came to pass: commands that reach none of it prove nothing.
#[derive(Debug, Default)]
struct Tally {
    elected: usize,
    elected_eligible: usize,
    elected_unclean: usize,
    last_lost: usize,
    joined: usize,
    moved: usize,
}

impl Tally {
    fn count(&mut self, before: &MetadataState, after: &MetadataState) {
        let (Some(old), Some(new)) = (before.topic_by_id(&TOPIC), after.topic_by_id(&TOPIC)) else { return };
        for (old, new) in old.partitions.iter().zip(&new.partitions).filter(|_| old.created_ms == new.created_ms) {
            let is_elected = new.leader != NO_LEADER && new.leader != old.leader;
            self.elected += usize::from(is_elected);
            self.elected_eligible += usize::from(is_elected && old.elr.contains(&new.leader));
            self.elected_unclean += usize::from(new.unclean_recoveries > old.unclean_recoveries);
            self.last_lost += usize::from(!new.last_known.is_empty() && old.last_known.is_empty());
            self.joined += usize::from(new.isr.len() > old.isr.len() && new.leader == old.leader);
            self.moved += usize::from(!old.adding.is_empty() && new.target.is_empty() && new.replicas == old.target);
        }
    }
}

#[test]
fn any_commands_of_a_cluster_keep_what_must_hold() {
    let tally = std::cell::RefCell::new(Tally::default());
    let draws = (prop::collection::vec(any_draw(), 1..120), 0..120usize);
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(256) });
    let ran = runner.run(&draws, |(draws, cut)| {
        let mut cluster = Cluster::new(4);
        cluster.state.feature_level = FEATURE_LEVEL;
        cluster.run(create_topic(&[&[1, 2, 3], &[2, 3, 4], &[4]], MIN_2));
        let mut copy = cluster.state.clone();
        let mut leaderships = Leaderships::new();
        check_step(&cluster.state.clone(), &cluster.state, false, &mut leaderships);
        for (step, draw) in draws.iter().enumerate() {
            if step == cut {
                copy = MetadataState::from_snapshot(copy.snapshot()).expect("its own snapshot");
                prop_assert_eq!(&copy, &cluster.state);
            }
            let command = command_of(&cluster.state, draw, step);
            let before = cluster.state.clone();
            let outcome = cluster.try_run(command.clone());
            let is_leaders_word = matches!(command.command, Some(Kind::AlterPartition(_)));
            check_step(&before, &cluster.state, is_leaders_word, &mut leaderships);
            tally.borrow_mut().count(&before, &cluster.state);
            prop_assert_eq!(copy.apply(before.index + 1, &command), outcome);
            prop_assert_eq!(&copy, &cluster.state);
        }
        Ok(())
    });
    ran.unwrap_or_else(|failure| panic!("{failure}"));
    let Tally { elected, elected_eligible, elected_unclean, last_lost, joined, moved } = tally.into_inner();
    assert!(elected.min(joined) > 100, "{elected} elections, {joined} joined");
    for (reached, what) in [
        (elected_eligible, "elections of an eligible replica"),
        (elected_unclean, "unclean elections"),
        (last_lost, "last replicas lost"),
        (moved, "reassignments"),
    ] {
        assert!(reached > 10, "only {reached} {what}");
    }
}
