//! The rules of brokers and elections, one by one.

use super::brokers::incarnation_to_wire;
use super::*;

/// A state under commands of a cluster. A broker's incarnation is its number and how often it was started.
#[derive(Debug, Clone)]
pub(super) struct Cluster {
    pub(super) state: MetadataState,
    pub(super) boots: BTreeMap<i32, u64>,
}

pub(super) const TOPIC: TopicId = TopicId::from_bytes([1; 16]);

pub(super) fn incarnation(broker_id: i32, boots: u64) -> Uuid {
    let mut bytes = [7; 16];
    bytes[0] = broker_id as u8;
    bytes[1] = boots as u8;
    Uuid::from_bytes(bytes)
}

pub(super) fn registration(broker_id: i32, boots: u64) -> command::RegisterBroker {
    command::RegisterBroker {
        broker_id,
        incarnation: incarnation_to_wire(incarnation(broker_id, boots)),
        boots,
        directory_id: format!("disk of {broker_id}"),
        ..command::RegisterBroker::default()
    }
}

pub(super) fn create_topic(partitions: &[&[i32]], config: &[(&str, &str)]) -> Kind {
    let replicas = |brokers: &&[i32]| command::Replicas { brokers: brokers.to_vec() };
    Kind::CreateTopic(command::CreateTopic {
        name: "topic".into(),
        topic_id: TOPIC.to_wire(),
        partitions: partitions.iter().map(replicas).collect(),
        config: values(config),
        ..command::CreateTopic::default()
    })
}

pub(super) fn values(config: &[(&str, &str)]) -> TopicValues {
    config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(super) fn named(partition: u32) -> Vec<command::TopicPartition> {
    vec![command::TopicPartition { topic_id: TOPIC.to_wire(), partition }]
}

impl Cluster {
    /// Brokers 1 to `brokers`, active; the first is the controller.
    pub(super) fn new(brokers: i32) -> Cluster {
        let mut cluster = Cluster { state: MetadataState::new("cluster"), boots: BTreeMap::new() };
        for broker in 1..=brokers {
            cluster.start(broker);
            if broker == 1 {
                cluster.become_controller(1);
            }
            cluster.unfence(broker);
        }
        cluster
    }

    /// The same with one topic of one partition.
    pub(super) fn with_topic(brokers: i32, replicas: &[i32], config: &[(&str, &str)]) -> Cluster {
        let mut cluster = Cluster::new(brokers);
        cluster.run(create_topic(&[replicas], config));
        cluster
    }

    pub(super) fn try_run(&mut self, command: impl Into<command::Command>) -> Result<Outcome, Refusal> {
        let before = self.state.clone();
        let result = self.state.apply(before.index + 1, &command.into());
        check(&self.state);
        if result.is_err() {
            assert_eq!(self.state, before, "a refused command changed the state");
        }
        result
    }

    pub(super) fn run(&mut self, command: impl Into<command::Command>) -> Outcome {
        self.try_run(command).expect("accepted")
    }

    pub(super) fn refused(&mut self, command: impl Into<command::Command>) -> Refusal {
        self.try_run(command).expect_err("refused")
    }

    /// The command of the controller in office.
    pub(super) fn controllers(&self, kind: Kind) -> command::Command {
        command::Command { controller_epoch: self.state.controller_epoch, ..kind.into() }
    }

    pub(super) fn incarnation(&self, broker_id: i32) -> bytes::Bytes {
        incarnation_to_wire(incarnation(broker_id, self.boots.get(&broker_id).copied().unwrap_or(1)))
    }

    pub(super) fn start_with(&mut self, broker_id: i32, change: impl FnOnce(&mut command::RegisterBroker)) -> Outcome {
        let boots = self.boots.entry(broker_id).or_default();
        *boots += 1;
        let mut register = registration(broker_id, *boots);
        change(&mut register);
        self.run(Kind::RegisterBroker(register))
    }

    pub(super) fn start(&mut self, broker_id: i32) -> Outcome {
        self.start_with(broker_id, |_| {})
    }

    pub(super) fn become_controller(&mut self, broker_id: i32) {
        let incarnation = self.incarnation(broker_id);
        self.run(Kind::BecomeController(command::BecomeController { broker_id, incarnation }));
    }

    pub(super) fn fence(&mut self, broker_id: i32) {
        let fence = command::FenceBroker { broker_id, incarnation: self.incarnation(broker_id) };
        self.run(self.controllers(Kind::FenceBroker(fence)));
    }

    pub(super) fn unfence(&mut self, broker_id: i32) {
        let unfence = command::UnfenceBroker { broker_id, incarnation: self.incarnation(broker_id) };
        self.run(self.controllers(Kind::UnfenceBroker(unfence)));
    }

    pub(super) fn drain(&mut self, broker_id: i32) {
        self.run(Kind::DrainBroker(command::DrainBroker { broker_id, incarnation: self.incarnation(broker_id) }));
    }

    pub(super) fn fence_replica(&mut self, broker_id: i32) {
        let incarnation = self.incarnation(broker_id);
        self.run(Kind::FenceReplicas(command::FenceReplicas { broker_id, incarnation, replicas: named(0) }));
    }

    pub(super) fn restore_replica(&mut self, broker_id: i32) {
        // Whichever it is otherwise.
        let level = std::mem::replace(&mut self.state.feature_level, RESTORED_LEVEL);
        self.run(self.restored(broker_id));
        self.state.feature_level = level;
    }

    fn restored(&self, broker_id: i32) -> Kind {
        let incarnation = self.incarnation(broker_id);
        Kind::RestoreReplicas(command::RestoreReplicas { broker_id, incarnation, replicas: named(0) })
    }

    fn elect_uncleanly(&mut self) {
        let kind = command::ElectionKind::Unclean.into();
        self.run(Kind::ElectLeaders(command::ElectLeaders { kind, partitions: named(0) }));
    }

    pub(super) fn alter(&mut self, config: &[(&str, &str)]) {
        let alter = command::AlterTopic { topic_id: TOPIC.to_wire(), config: values(config) };
        self.run(Kind::AlterTopic(alter));
    }

    pub(super) fn partition(&self) -> &Partition {
        &self.state.topic_by_id(&TOPIC).expect("there").partitions[0]
    }

    /// Leader, its epoch, in-sync and eligible replicas.
    pub(super) fn seen(&self) -> (i32, i32, &[i32], &[i32]) {
        let partition = self.partition();
        (partition.leader, partition.leader_epoch, &partition.isr, &partition.elr)
    }
}

/// What must always hold, beyond what a partition says of itself.
pub(super) fn check(state: &MetadataState) {
    assert_eq!(state.names.len(), state.topics.len());
    let state_of = |broker: &i32| state.broker(*broker).map(|broker| broker.state);
    for (name, topic) in &state.topics {
        assert_eq!(state.names.get(&topic.id), Some(name));
        for partition in &topic.partitions {
            partition.check().unwrap_or_else(|why| panic!("{why}: {partition:?}"));
            assert!(partition.replicas.iter().all(|broker| state.brokers.contains_key(broker)));
            let serves = |broker| matches!(state_of(broker), Some(BrokerState::Active | BrokerState::Draining));
            assert!(partition.isr.iter().all(serves), "a fenced broker is in sync: {partition:?}");
            let drains = |broker| state_of(broker) == Some(BrokerState::Draining);
            assert!(
                !drains(&partition.leader) || partition.isr.iter().all(drains),
                "a draining broker leads where another could: {partition:?}"
            );
            let waits = |broker| partition.elr.contains(broker) && state_of(broker) == Some(BrokerState::Active);
            assert!(
                partition.leader != NO_LEADER || !partition.replicas.iter().any(waits),
                "nobody leads, and one could: {partition:?}"
            );
            let enough = topic.min_insync_replicas().min(partition.replicas.len() as u32) as usize;
            assert!(partition.isr.len() < enough.max(1) || partition.elr.is_empty(), "{partition:?}");
        }
    }
    if let Some((broker, incarnation)) = state.controller {
        assert_eq!(state.broker(broker).map(|broker| broker.incarnation), Some(incarnation));
    }
}

pub(super) const MIN_2: &[(&str, &str)] = &[("min.insync.replicas", "2")];

#[test]
fn a_registered_broker_is_fenced_until_a_controller_says_otherwise() {
    let mut cluster = Cluster::new(1);
    assert_eq!(cluster.start(2), Outcome::BrokerRegistered { boots: 1 });
    let broker = cluster.state.broker(2).expect("there").clone();
    assert_eq!((broker.state, broker.epoch, broker.boots), (BrokerState::Fenced, cluster.state.index, 1));
    let refusal = cluster.refused(create_topic(&[&[2]], &[]));
    assert_eq!(refusal.to_string(), "partition topic-0 cannot be kept on brokers [2]: none of them is active");
    cluster.run(create_topic(&[&[2, 1]], &[]));
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[][..]), "who is fenced is not in sync");
    cluster.unfence(2);
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[][..]));
}

#[test]
fn a_new_start_ends_what_the_last_one_held() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], &[]);
    let before = cluster.partition().partition_epoch;
    assert_eq!(cluster.start(1), Outcome::BrokerRegistered { boots: 2 });
    assert_eq!(cluster.seen(), (2, 1, &[2, 3][..], &[][..]));
    assert_eq!(cluster.partition().partition_epoch, before + 1);
    cluster.become_controller(2);
    cluster.unfence(1);
    assert_eq!(cluster.seen(), (2, 1, &[2, 3][..], &[][..]), "it comes back as a follower");
    cluster.start(3);
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[][..]), "the leader's epoch is not the follower's business");
    assert_eq!(cluster.partition().partition_epoch, before + 2);
}

#[test]
fn a_broker_alone_starts_into_one_new_epoch() {
    let mut cluster = Cluster::with_topic(1, &[1], &[]);
    for start in 1..4 {
        cluster.start(1);
        assert_eq!(cluster.seen(), (NO_LEADER, start, &[][..], &[1][..]), "the old start does not lead on");
        cluster.become_controller(1);
        cluster.unfence(1);
        assert_eq!(cluster.seen(), (1, start, &[1][..], &[][..]));
    }
}

#[test]
fn a_registration_said_twice_changes_nothing() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    let before = cluster.state.clone();
    let again = Kind::RegisterBroker(registration(1, 1));
    assert_eq!(cluster.run(again), Outcome::BrokerRegistered { boots: 1 });
    assert_eq!((cluster.state.topics, cluster.state.brokers), (before.topics, before.brokers));
}

#[test]
fn a_disk_started_less_often_than_known_is_refused_or_counts_as_new() {
    let mut cluster = Cluster::with_topic(2, &[2, 1], MIN_2);
    cluster.start(2);
    cluster.start(2);
    cluster.unfence(2);
    assert_eq!(cluster.seen(), (1, 1, &[1][..], &[2][..]));
    let stale = |boots| {
        let copy = Uuid::from_bytes([9; 16]);
        command::RegisterBroker { incarnation: incarnation_to_wire(copy), ..registration(2, boots) }
    };
    for boots in 1..=3 {
        let refusal = cluster.refused(Kind::RegisterBroker(stale(boots)));
        assert_eq!(refusal, Refusal::StaleBoots { broker_id: 2, given: boots, known: 3 });
    }
    // One that names what stands here is a disk of its own. An equal one too, a copy: were it sent away, its next start would
    // count one more and be believed.
    let replaces = cluster.state.broker(2).expect("there").epoch;
    for boots in [1, 3] {
        let mut cluster = Cluster { state: cluster.state.clone(), boots: cluster.boots.clone() };
        let stale = command::RegisterBroker { replaces, ..stale(boots) };
        assert_eq!(cluster.run(Kind::RegisterBroker(stale)), Outcome::BrokerRegistered { boots: 4 });
        assert_eq!(cluster.seen(), (1, 1, &[1][..], &[][..]), "nothing on it counts");
    }
}

#[test]
fn another_disk_has_nothing_of_the_last_one() {
    let mut cluster = Cluster::with_topic(2, &[2, 1], MIN_2);
    cluster.start(2);
    assert_eq!(cluster.seen(), (1, 1, &[1][..], &[2][..]));
    cluster.start_with(2, |register| register.directory_id = "a new one".into());
    assert_eq!(cluster.seen(), (1, 1, &[1][..], &[][..]));
}

#[test]
fn lost_replicas_are_neither_in_sync_nor_eligible() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], MIN_2);
    cluster.start(2);
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[2][..]));
    cluster.start_with(2, |register| register.lost = named(0));
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[][..]));
    cluster.unfence(2);
    cluster.start_with(1, |register| register.lost = named(0));
    assert_eq!(cluster.seen(), (NO_LEADER, 1, &[][..], &[][..]));
    assert_eq!(cluster.partition().last_known, [1], "to be healed from by hand");
    cluster.become_controller(1);
    cluster.unfence(1);
    assert_eq!(cluster.seen(), (NO_LEADER, 1, &[][..], &[][..]), "it does not lead by itself");
}

/// A person was told to bring back what the last one had: it leads then, and not whoever is named first.
#[test]
fn the_last_one_that_was_in_sync_leads_first_once_it_has_its_log_again() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    cluster.fence(1);
    cluster.start_with(2, |register| register.lost = named(0));
    cluster.start(1);
    cluster.become_controller(1);
    cluster.unfence(1);
    // Its disk names it, and what is brought back may be older: that is a person's word.
    cluster.fence_replica(2);
    cluster.start(2);
    cluster.unfence(2);
    assert_eq!((cluster.seen().0, &cluster.partition().last_known[..]), (NO_LEADER, &[2][..]));
    cluster.elect_uncleanly();
    assert_eq!((cluster.seen().0, cluster.partition().unclean_recoveries), (2, 1));
}

/// It was elected, was fenced at once, and nobody led again.
#[test]
fn who_has_lost_its_log_leads_only_where_nobody_has_one() {
    for is_named_by_heartbeat in [false, true] {
        let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
        cluster.fence(2);
        cluster.start_with(1, |register| register.lost = named(0));
        cluster.start(2);
        cluster.become_controller(2);
        cluster.unfence(1);
        assert_eq!(cluster.partition().lost, [1]);
        if is_named_by_heartbeat {
            cluster.fence_replica(1);
            cluster.elect_uncleanly();
            assert_eq!(cluster.seen().0, NO_LEADER);
        }
        cluster.unfence(2);
        cluster.elect_uncleanly();
        assert_eq!(cluster.seen().0, 2);
        assert_eq!(cluster.partition().last_known, [0; 0]);
    }
}

#[test]
fn who_leaves_stays_eligible_only_where_too_few_remain() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.fence(3);
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[][..]), "two are enough: records are acknowledged without it");
    cluster.fence(2);
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[2][..]));
    cluster.fence(1);
    assert_eq!(cluster.seen(), (NO_LEADER, 1, &[][..], &[2, 1][..]), "the last one does not vanish");
    cluster.unfence(3);
    assert_eq!(cluster.seen(), (NO_LEADER, 1, &[][..], &[2, 1][..]), "it may miss what the others have");
    cluster.unfence(2);
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[1][..]), "an eligible one leads, alone in sync");
    assert_eq!(cluster.partition().unclean_recoveries, 0);
}

#[test]
fn the_first_of_the_replicas_that_can_is_elected() {
    let mut cluster = Cluster::with_topic(4, &[3, 1, 4, 2], &[]);
    for (fenced, leader, epoch) in [(3, 1, 1), (4, 1, 1), (1, 2, 2)] {
        cluster.fence(fenced);
        assert_eq!((cluster.partition().leader, cluster.partition().leader_epoch), (leader, epoch));
    }
    let mut eligible = Cluster::with_topic(3, &[3, 1, 2], &[("min.insync.replicas", "3")]);
    (1..4).for_each(|broker| eligible.fence(broker));
    eligible.unfence(1);
    assert_eq!(eligible.seen(), (1, 1, &[1][..], &[2, 3][..]));
    eligible.unfence(3);
    assert_eq!(eligible.partition().leader, 1, "nobody is elected where somebody leads");
}

#[test]
fn a_replica_that_may_miss_records_leads_only_where_the_topic_says_so() {
    const UNCLEAN: (&str, &str) = ("unclean.leader.election.enable", "true");
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    cluster.fence(1);
    cluster.fence(2);
    cluster.unfence(1);
    assert_eq!(cluster.seen(), (NO_LEADER, 2, &[][..], &[2][..]));
    cluster.alter(&[UNCLEAN]);
    assert_eq!(cluster.seen(), (1, 2, &[1][..], &[][..]), "the setting counts at once");
    assert_eq!(cluster.partition().unclean_recoveries, 1);
    cluster.unfence(2);
    cluster.fence(1);
    assert_eq!(cluster.seen(), (2, 3, &[2][..], &[][..]));
    assert_eq!(cluster.partition().unclean_recoveries, 2);
}

#[test]
fn a_new_min_insync_replicas_makes_nobody_eligible_who_was() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.fence(3);
    cluster.fence(2);
    assert_eq!(cluster.partition().elr, [2]);
    let before = cluster.partition().partition_epoch;
    cluster.alter(&[("min.insync.replicas", "2"), ("flush.ms", "5")]);
    assert_eq!((&cluster.partition().elr[..], cluster.partition().partition_epoch), (&[2][..], before));
    cluster.alter(&[("min.insync.replicas", "3")]);
    assert_eq!((&cluster.partition().elr[..], cluster.partition().partition_epoch), (&[][..], before + 1));
    // Where nobody is in sync nothing is acknowledged, under no value.
    cluster.fence(1);
    cluster.alter(MIN_2);
    assert_eq!(cluster.seen(), (NO_LEADER, 1, &[][..], &[1][..]));
}

#[test]
fn what_counts_without_a_value_of_the_topics_own_came_with_it() {
    let mut cluster = Cluster::new(3);
    let Kind::CreateTopic(create) = create_topic(&[&[1, 2, 3]], &[]) else { unreachable!() };
    cluster.run(Kind::CreateTopic(command::CreateTopic { default_min_insync_replicas: 3, ..create }));
    cluster.fence(3);
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[3][..]));
    cluster.alter(MIN_2);
    assert_eq!(cluster.partition().elr, [0; 0]);
    let topic = |cluster: &Cluster| cluster.state.topic("topic").expect("there").min_insync_replicas();
    assert_eq!(topic(&cluster), 2);
    cluster.alter(&[]);
    assert_eq!(topic(&cluster), 3);
}

#[test]
fn a_draining_broker_hands_over_and_leads_on_where_it_cannot() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.drain(1);
    assert_eq!(cluster.seen(), (2, 1, &[2, 3][..], &[][..]));
    cluster.drain(2);
    assert_eq!(cluster.seen(), (3, 2, &[3][..], &[2][..]));
    cluster.drain(3);
    assert_eq!(cluster.seen(), (3, 2, &[3][..], &[2][..]), "nobody else is in sync");
    let again = command::UnfenceBroker { broker_id: 3, incarnation: cluster.incarnation(3) };
    assert_eq!(cluster.refused(cluster.controllers(Kind::UnfenceBroker(again))), Refusal::Draining(3));
    cluster.fence(3);
    assert_eq!(cluster.seen(), (NO_LEADER, 3, &[][..], &[2, 3][..]));
    let fenced = command::DrainBroker { broker_id: 3, incarnation: cluster.incarnation(3) };
    assert_eq!(cluster.refused(Kind::DrainBroker(fenced)), Refusal::Fenced(3));
    cluster.start(1);
    cluster.start(3);
    assert_eq!(cluster.partition().leader, NO_LEADER, "the draining broker 2 is not elected");
    cluster.become_controller(3);
    cluster.unfence(3);
    assert_eq!(cluster.seen(), (3, 3, &[3][..], &[2][..]));
}

#[test]
fn a_replica_that_a_disk_fenced_leads_nothing() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.fence_replica(1);
    assert_eq!(cluster.seen(), (2, 1, &[2, 3][..], &[][..]));
    assert_eq!(cluster.partition().fenced, [1]);
    cluster.fence(3);
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[3][..]));
    cluster.fence_replica(3);
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[][..]), "nor is it eligible");
    cluster.fence_replica(2);
    assert_eq!(cluster.seen(), (NO_LEADER, 2, &[][..], &[][..]));
    assert_eq!((&cluster.partition().last_known[..], &cluster.partition().fenced[..]), (&[2][..], &[1, 3, 2][..]));
    cluster.alter(&[("unclean.leader.election.enable", "true")]);
    assert_eq!(cluster.partition().leader, NO_LEADER, "no broken log is chosen");
    cluster.start(3);
    assert_eq!(cluster.partition().fenced, [1, 2], "a start looks at its disk anew");
    cluster.unfence(3);
    assert_eq!(cluster.seen(), (3, 2, &[3][..], &[][..]));
    assert_eq!(cluster.partition().last_known, [0; 0]);
}

#[test]
fn a_replica_whose_disk_came_back_may_be_in_sync_and_leads_again_where_it_was_the_last() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], MIN_2);
    cluster.fence_replica(1);
    cluster.restore_replica(1);
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[][..]), "it is in sync once the leader says so");
    assert_eq!(cluster.partition().fenced, [0; 0]);
    cluster.fence_replica(2);
    cluster.fence_replica(1);
    assert_eq!(cluster.seen().0, NO_LEADER);
    cluster.restore_replica(1);
    assert_eq!(cluster.seen().0, NO_LEADER, "the other one was in sync last");
    cluster.restore_replica(2);
    assert_eq!(cluster.seen(), (2, 2, &[2][..], &[][..]));
    assert_eq!(cluster.partition().unclean_recoveries, 0);
}

/// Its broker was killed before the disk came back, and nobody led for good.
#[test]
fn the_last_one_that_a_disk_fenced_leads_again_once_its_broker_started() {
    let fenced = || {
        let mut cluster = Cluster::with_topic(2, &[1, 2], MIN_2);
        cluster.fence_replica(1);
        cluster.fence_replica(2);
        assert_eq!((cluster.seen().0, &cluster.partition().last_known[..]), (NO_LEADER, &[2][..]));
        cluster
    };
    let start = |cluster: &mut Cluster, broker_id, change: fn(&mut command::RegisterBroker)| {
        cluster.start_with(broker_id, change);
        cluster.become_controller(broker_id);
        cluster.unfence(broker_id);
        cluster.seen().0
    };
    let mut cluster = fenced();
    assert_eq!(start(&mut cluster, 1, |_| {}), NO_LEADER, "the other one was in sync last");
    assert_eq!(start(&mut cluster, 2, |_| {}), 2);
    assert_eq!(cluster.partition().unclean_recoveries, 0);
    assert_eq!(start(&mut fenced(), 2, |register| register.lost = named(0)), NO_LEADER, "it is lost");
    let mut cluster = Cluster::with_topic(1, &[1], &[]);
    cluster.fence_replica(1);
    let another = |register: &mut command::RegisterBroker| register.directory_id = "another".into();
    assert_eq!(start(&mut cluster, 1, another), NO_LEADER, "it is another disk");
}

#[test]
fn a_replica_that_was_lost_before_its_disk_hung_is_not_whole_when_that_comes_back() {
    let mut cluster = Cluster::with_topic(1, &[1], &[]);
    cluster.start_with(1, |register| register.lost = named(0));
    cluster.become_controller(1);
    cluster.unfence(1);
    cluster.fence_replica(1);
    cluster.restore_replica(1);
    assert_eq!((cluster.seen().0, &cluster.partition().last_known[..]), (NO_LEADER, &[1][..]));
}

#[test]
fn a_command_of_an_earlier_start_or_controller_is_refused() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    let epoch = cluster.state.controller_epoch;
    let old = cluster.incarnation(2);
    cluster.start(2);
    let registered = incarnation(2, 2);
    let stale = Refusal::StaleIncarnation { broker_id: 2, given: incarnation(2, 1), registered };
    let by_controller = |kind: Kind| command::Command { controller_epoch: epoch, ..kind.into() };
    let unfence = |incarnation: &bytes::Bytes| {
        Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 2, incarnation: incarnation.clone() })
    };
    assert_eq!(cluster.refused(by_controller(unfence(&old))), stale);
    let fence = command::FenceBroker { broker_id: 2, incarnation: old.clone() };
    assert_eq!(cluster.refused(by_controller(Kind::FenceBroker(fence))), stale);
    let office = command::BecomeController { broker_id: 2, incarnation: old.clone() };
    assert_eq!(cluster.refused(Kind::BecomeController(office)), stale);
    let drain = command::DrainBroker { broker_id: 2, incarnation: old.clone() };
    assert_eq!(cluster.refused(Kind::DrainBroker(drain)), stale);
    let replicas = command::FenceReplicas { broker_id: 2, incarnation: old, replicas: named(0) };
    assert_eq!(cluster.refused(Kind::FenceReplicas(replicas)), stale);

    let current = incarnation_to_wire(registered);
    let none = Refusal::StaleController { given: 0, current: epoch };
    assert_eq!(cluster.refused(unfence(&current)), none, "only a controller unfences");
    cluster.become_controller(2);
    assert_eq!(
        (cluster.state.controller, cluster.state.controller_epoch),
        (Some((2, registered)), cluster.state.index)
    );
    let newer = cluster.state.controller_epoch;
    let refusal = cluster.refused(by_controller(unfence(&current)));
    assert_eq!(refusal, Refusal::StaleController { given: epoch, current: newer });
    // Its start over, the controller is out of office, and so is what it sent.
    let late = cluster.controllers(unfence(&incarnation_to_wire(incarnation(2, 3))));
    cluster.start(2);
    assert_eq!((cluster.state.controller, cluster.state.controller_epoch), (None, newer));
    assert_eq!(cluster.refused(late), Refusal::StaleController { given: newer, current: newer });
}

#[test]
fn a_broker_is_removed_only_without_replicas() {
    let mut cluster = Cluster::with_topic(2, &[1], &[]);
    let remove = |broker_id| Kind::RemoveBroker(command::RemoveBroker { broker_id });
    let refusal = cluster.refused(remove(1));
    assert_eq!(refusal.to_string(), "broker 1 keeps topic-0: move its replicas to other brokers first");
    assert_eq!(cluster.run(remove(2)), Outcome::BrokerChanged { broker_id: 2, partitions: 0 });
    assert_eq!(cluster.refused(remove(2)), Refusal::UnknownBroker(2));
    cluster.run(Kind::DeleteTopic(command::DeleteTopic { topic_id: TOPIC.to_wire() }));
    cluster.run(remove(1));
    assert_eq!(cluster.state.controller, None);
}

#[test]
fn a_feature_level_rises_once_every_broker_can() {
    let mut cluster = Cluster::new(1);
    cluster.start_with(2, |register| register.feature_level = 3);
    let raise = |level| Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level });
    assert_eq!(cluster.state.feature_level(), 1);
    assert_eq!(cluster.refused(raise(2)), Refusal::FeatureLevel { broker_id: 1, able: 1, level: 2 });
    cluster.start_with(1, |register| register.feature_level = 2);
    assert_eq!(cluster.run(raise(2)), Outcome::FeatureLevelRaised(2));
    assert_eq!(cluster.refused(raise(1)), Refusal::FeatureLevelFalls { asked: 1, level: 2 });
    let old = Kind::RegisterBroker(registration(3, 1));
    assert_eq!(cluster.refused(old), Refusal::FeatureLevel { broker_id: 3, able: 1, level: 2 });
}

#[test]
fn a_broker_is_to_keep_nothing_until_that_is_taken_back() {
    let mut cluster = Cluster::new(1);
    let empty = |broker_id, is_emptied| Kind::EmptyBroker(command::EmptyBroker { broker_id, is_emptied });
    assert!(matches!(cluster.refused(empty(1, true)), Refusal::AboveFeatureLevel { needed: 3, level: 1, .. }));
    let restored = cluster.restored(1);
    assert!(matches!(cluster.refused(restored), Refusal::AboveFeatureLevel { needed: 3, level: 1, .. }));
    cluster.start_with(1, |register| register.feature_level = 3);
    cluster.run(Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: 3 }));
    assert_eq!(cluster.refused(empty(9, true)), Refusal::UnknownBroker(9));
    assert_eq!(cluster.run(empty(1, true)), Outcome::BrokerChanged { broker_id: 1, partitions: 0 });
    cluster.start_with(1, |register| register.feature_level = 3);
    let is_emptied = |state: &MetadataState| state.broker(1).expect("there").is_emptied;
    assert!(is_emptied(&cluster.state), "however often it starts");
    let restored = MetadataState::from_snapshot(cluster.state.snapshot()).expect("its own");
    assert!(is_emptied(&restored), "and in the snapshot");
    cluster.run(empty(1, false));
    assert!(!is_emptied(&cluster.state));
}

#[test]
fn a_persons_command_is_applied_once_and_answered_again() {
    let mut cluster = Cluster::new(1);
    let with_id = |kind: Kind, id: u64| {
        let id = [id.to_be_bytes(), [1; 8]].concat();
        command::Command { command_id: id.into(), ..kind.into() }
    };
    let delete = || Kind::DeleteTopic(command::DeleteTopic { topic_id: TOPIC.to_wire() });
    assert_eq!(cluster.refused(with_id(delete(), 2)), Refusal::UnknownTopicId(TOPIC));
    let create = with_id(create_topic(&[&[1]], &[]), 1);
    assert_eq!(cluster.run(create.clone()), Outcome::TopicCreated(TOPIC));
    assert_eq!(cluster.run(with_id(delete(), 2)), Outcome::TopicDeleted(TOPIC), "what was refused is decided anew");
    let index = cluster.state.index;
    assert_eq!(cluster.run(create.clone()), Outcome::TopicCreated(TOPIC), "the answer is the same");
    assert_eq!((cluster.state.topics().count(), cluster.state.index), (0, index + 1), "and nothing is done");
    let mut restored = MetadataState::from_snapshot(cluster.state.snapshot()).expect("its own");
    assert_eq!(restored.apply(index + 2, &create), Ok(Outcome::TopicCreated(TOPIC)));
    assert_eq!(restored.topics().count(), 0);
    // A rebalance has many commands, and they push out each other alone.
    for id in 2_000..4_000 {
        let elect = command::ElectLeaders { kind: command::ElectionKind::Preferred.into(), partitions: Vec::new() };
        cluster.run(with_id(Kind::ElectLeaders(elect), id));
    }
    assert!(cluster.state.has_applied(&with_id(delete(), 3_999).command_id));
    assert!(!cluster.state.has_applied(&with_id(delete(), 2_999).command_id));
    // The oldest of a thousand and one is forgotten.
    let raise = Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: 1 });
    for id in 3..=1000 {
        cluster.run(with_id(raise.clone(), id));
    }
    assert_eq!((cluster.run(create.clone()), cluster.state.topics().count()), (Outcome::TopicCreated(TOPIC), 0));
    cluster.run(with_id(raise, 1001));
    assert_eq!((cluster.run(create), cluster.state.topics().count()), (Outcome::TopicCreated(TOPIC), 1));
    let short = command::Command { command_id: vec![1].into(), ..delete().into() };
    assert!(matches!(cluster.refused(short), Refusal::Unknown(_)));
}

#[test]
fn a_journal_of_before_there_were_clusters_means_what_it_meant() {
    let mut state = MetadataState::new("cluster");
    let register = command::RegisterBroker { boots: 0, ..registration(1, 1) };
    let commands = [Kind::RegisterBroker(register.clone()), create_topic(&[&[1], &[1]], MIN_2)];
    for command in commands.into_iter().chain([Kind::RegisterBroker(register)]) {
        state.apply(state.index + 1, &command.into()).expect("accepted");
        check(&state);
    }
    let broker = state.broker(1).expect("there");
    assert_eq!((broker.boots, broker.state), (2, BrokerState::Active));
    let partitions = &state.topic("topic").expect("there").partitions;
    assert!(partitions.iter().all(|partition| (partition.leader, partition.leader_epoch) == (1, 1)));
    // And so does a snapshot, which says nothing of what came later.
    let mut snapshot = state.snapshot();
    snapshot.feature_level = 0;
    for topic in &mut snapshot.topics {
        topic.default_min_insync_replicas = 0;
        topic.partitions.iter_mut().for_each(|partition| partition.partition_epoch = 0);
    }
    snapshot.brokers.iter_mut().for_each(|broker| {
        (broker.epoch, broker.feature_level, broker.directory_id) = (0, 0, String::new());
    });
    let mut cluster = Cluster {
        state: MetadataState::from_snapshot(snapshot).expect("a snapshot of today"),
        boots: BTreeMap::from([(1, 2)]),
    };
    assert_eq!(cluster.start(1), Outcome::BrokerRegistered { boots: 3 });
    cluster.become_controller(1);
    cluster.unfence(1);
    assert_eq!(cluster.seen(), (1, 2, &[1][..], &[][..]));
}
