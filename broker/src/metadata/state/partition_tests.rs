//! The rules of in-sync replicas, asked-for elections and reassignments, one by one.

use super::cluster_tests::*;
use super::*;

impl Cluster {
    fn member(&self, broker_id: i32) -> command::Member {
        command::Member { broker_id, incarnation: self.incarnation(broker_id) }
    }

    /// What the leader says: these are in sync.
    fn word(&self, isr: &[i32]) -> command::AlterPartition {
        let Partition { leader, leader_epoch, partition_epoch, .. } = *self.partition();
        command::AlterPartition {
            topic_id: TOPIC.to_wire(),
            partition: 0,
            leader: Some(self.member(leader)),
            leader_epoch,
            partition_epoch,
            isr: isr.iter().map(|broker| self.member(*broker)).collect(),
        }
    }

    fn say(&mut self, isr: &[i32]) -> Outcome {
        let word = self.word(isr);
        self.run(Kind::AlterPartition(word))
    }

    fn refuse_word(&mut self, isr: &[i32], change: impl FnOnce(&mut command::AlterPartition)) -> Refusal {
        let mut word = self.word(isr);
        change(&mut word);
        self.refused(Kind::AlterPartition(word))
    }

    fn reassign(&mut self, target: &[i32]) -> Outcome {
        self.run(reassign(target))
    }

    fn cancel(&self) -> Kind {
        Kind::CancelReassignment(command::CancelReassignment { topic_id: TOPIC.to_wire(), partition: 0 })
    }

    fn elect(&mut self, kind: command::ElectionKind) -> Outcome {
        self.run(Kind::ElectLeaders(command::ElectLeaders { kind: kind.into(), partitions: named(0) }))
    }

    fn replicas(&self) -> &[i32] {
        &self.partition().replicas
    }
}

fn reassign(target: &[i32]) -> Kind {
    Kind::Reassign(command::Reassign {
        topic_id: TOPIC.to_wire(),
        partition: 0,
        replicas: target.to_vec(),
        ..Default::default()
    })
}

#[test]
fn a_leader_says_who_is_in_sync() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    assert_eq!(cluster.say(&[1, 2]), Outcome::PartitionAltered { leader_epoch: 0, partition_epoch: 1 });
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[][..]), "two are enough");
    cluster.say(&[1]);
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[2][..]), "the one that left has everything that counts");
    cluster.say(&[3, 1]);
    assert_eq!(cluster.seen(), (1, 0, &[1, 3][..], &[][..]), "with enough in sync it will miss something");
    cluster.say(&[1, 2]);
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[][..]), "one left and one came, and they are enough");
    let unchanged = cluster.say(&[2, 1]);
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[][..]), "the order is nothing");
    // Whoever leads may say so because it does not know what became of another word, which is refused from now on.
    assert_eq!(unchanged, Outcome::PartitionAltered { leader_epoch: 0, partition_epoch: 5 });
}

#[test]
fn a_leaders_word_counts_only_while_everything_it_rests_on_does() {
    let mut cluster = Cluster::with_topic(4, &[1, 2, 3], &[]);
    cluster.say(&[1, 2]);
    let (old_leader, old_follower) = (cluster.member(1), cluster.member(2));
    let refusal = cluster.refuse_word(&[1, 2, 3], |word| word.partition_epoch -= 1);
    assert_eq!(refusal, Refusal::PartitionEpoch { given: 0, current: 1 });
    let refusal = cluster.refuse_word(&[1, 2, 3], |word| word.leader_epoch += 1);
    assert_eq!(refusal, Refusal::LeaderEpoch { given: 1, current: 0 });
    let two = cluster.member(2);
    let refusal = cluster.refuse_word(&[1, 2, 3], |word| word.leader = Some(two));
    assert_eq!(refusal, Refusal::NotLeader { broker_id: 2, leader: 1 });
    assert_eq!(cluster.refuse_word(&[1], |word| word.leader = None), Refusal::Unknown("names no leader"));
    let ineligible = |broker_id, why| Refusal::IneligibleReplica { broker_id, why };
    assert_eq!(cluster.refuse_word(&[1, 4], |_| {}), ineligible(4, "is no replica of the partition"));
    assert_eq!(cluster.refuse_word(&[1, 2, 2], |_| {}), ineligible(2, "is named twice"));
    assert_eq!(cluster.refuse_word(&[2, 3], |_| {}), ineligible(1, "leads, and is not named"));
    assert_eq!(cluster.refuse_word(&[], |_| {}), ineligible(1, "leads, and is not named"));
    assert_eq!(cluster.refuse_word(&[1, 9], |_| {}), Refusal::UnknownBroker(9));
    let refusal = cluster.refuse_word(&[1, 2], |word| word.partition = 7);
    assert_eq!(refusal, Refusal::UnknownPartition { topic: "topic".into(), partition: 7 });
    let other = TopicId::from_bytes([9; 16]);
    let refusal = cluster.refuse_word(&[1, 2], |word| word.topic_id = other.to_wire());
    assert_eq!(refusal, Refusal::UnknownTopicId(other));

    // A follower that was fenced, or drains, or started anew since, does not join.
    cluster.fence(3);
    assert_eq!(cluster.refuse_word(&[1, 2, 3], |_| {}), ineligible(3, "is not active"));
    cluster.unfence(3);
    cluster.fence_replica(3);
    assert_eq!(cluster.refuse_word(&[1, 2, 3], |_| {}), ineligible(3, "is fenced by its disk"));
    cluster.restore_replica(3);
    cluster.drain(3);
    assert_eq!(cluster.refuse_word(&[1, 2, 3], |_| {}), ineligible(3, "is not active"));
    cluster.start(2);
    cluster.unfence(2);
    let stale = |broker_id| Refusal::StaleIncarnation {
        broker_id,
        given: incarnation(broker_id, 1),
        registered: incarnation(broker_id, 2),
    };
    assert_eq!(cluster.refuse_word(&[1], |word| word.isr.push(old_follower)), stale(2));
    cluster.say(&[1, 2]);
    // Nor does the word of a leader that started anew since, though it leads again.
    cluster.start(1);
    cluster.become_controller(2);
    cluster.unfence(1);
    cluster.say(&[2, 1]);
    cluster.fence(2);
    assert_eq!(cluster.seen(), (1, 2, &[1][..], &[][..]));
    assert_eq!(cluster.refuse_word(&[1], |word| word.leader = Some(old_leader)), stale(1));
}

#[test]
fn whom_a_draining_leader_takes_in_leads() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], MIN_2);
    cluster.fence(2);
    cluster.drain(1);
    assert_eq!(cluster.seen(), (1, 0, &[1][..], &[2][..]));
    cluster.unfence(2);
    assert_eq!(cluster.say(&[1, 2]), Outcome::PartitionAltered { leader_epoch: 1, partition_epoch: 2 });
    assert_eq!(cluster.seen(), (2, 1, &[2][..], &[1][..]));
}

#[test]
fn a_replica_that_a_disk_fenced_joins_once_the_disk_came_back_or_its_broker_started() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    let fenced = Refusal::IneligibleReplica { broker_id: 2, why: "is fenced by its disk" };
    cluster.fence_replica(2);
    assert_eq!(cluster.refuse_word(&[1, 2], |_| {}), fenced);
    cluster.restore_replica(2);
    cluster.say(&[1, 2]);
    cluster.fence_replica(2);
    cluster.start(2);
    cluster.unfence(2);
    cluster.say(&[1, 2]);
    assert_eq!(cluster.partition().fenced, [0; 0]);
}

#[test]
fn the_preferred_leader_leads_where_it_is_in_sync() {
    let mut cluster = Cluster::with_topic(2, &[1, 2], &[]);
    assert_eq!(cluster.elect(command::ElectionKind::Preferred), Outcome::PartitionsChanged(0));
    cluster.fence(1);
    cluster.unfence(1);
    assert_eq!(cluster.elect(command::ElectionKind::Preferred), Outcome::PartitionsChanged(0), "it is not in sync");
    cluster.say(&[1, 2]);
    assert_eq!(cluster.elect(command::ElectionKind::Preferred), Outcome::PartitionsChanged(1));
    assert_eq!(cluster.seen(), (1, 2, &[1, 2][..], &[][..]));
    let unknown = Kind::ElectLeaders(command::ElectLeaders { kind: 0, partitions: named(3) });
    assert_eq!(cluster.refused(unknown).to_string(), "topic topic has no partition 3");
    let strange = Kind::ElectLeaders(command::ElectLeaders { kind: 7, partitions: named(0) });
    assert!(matches!(cluster.refused(strange), Refusal::Unknown(_)));
}

#[test]
fn an_unclean_leader_is_elected_by_hand_only_where_nobody_leads() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.say(&[1, 2]);
    assert_eq!(cluster.elect(command::ElectionKind::Unclean), Outcome::PartitionsChanged(0));
    cluster.fence(1);
    cluster.fence(2);
    assert_eq!(cluster.seen(), (NO_LEADER, 2, &[][..], &[1, 2][..]));
    assert_eq!(cluster.elect(command::ElectionKind::Unclean), Outcome::PartitionsChanged(1));
    assert_eq!(
        cluster.seen(),
        (3, 2, &[3][..], &[][..]),
        "what the others have may be more: they are eligible no more"
    );
    assert_eq!(cluster.partition().unclean_recoveries, 1);
}

#[test]
fn a_reassigned_partition_is_kept_by_both_until_all_of_the_new_are_in_sync() {
    let mut cluster = Cluster::with_topic(5, &[1, 2, 3], MIN_2);
    assert_eq!(cluster.reassign(&[4, 3, 5]), Outcome::PartitionsChanged(1));
    let moving = cluster.partition();
    assert_eq!((&moving.replicas[..], &moving.isr[..]), (&[1, 2, 3, 4, 5][..], &[1, 2, 3][..]));
    assert_eq!((&moving.adding[..], &moving.removing[..]), (&[4, 5][..], &[1, 2][..]));
    assert_eq!(cluster.reassign(&[4, 3, 5]), Outcome::PartitionsChanged(0), "asked for twice");
    let refusal = cluster.refused(reassign(&[1, 2, 4]));
    assert_eq!(refusal.to_string(), "topic-0 moves to brokers [4, 3, 5] already: wait for that, or cancel it first");
    cluster.say(&[1, 2, 3, 4]);
    assert_eq!((cluster.partition().leader, cluster.replicas()), (1, &[1, 2, 3, 4, 5][..]));
    assert_eq!(cluster.say(&[1, 2, 3, 4, 5]), Outcome::PartitionAltered { leader_epoch: 1, partition_epoch: 3 });
    assert_eq!(cluster.seen(), (4, 1, &[3, 4, 5][..], &[][..]));
    let moved = cluster.partition();
    assert_eq!((&moved.replicas[..], moved.adding.len(), moved.removing.len()), (&[4, 3, 5][..], 0, 0));
}

#[test]
fn fewer_replicas_wait_for_those_that_stay() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], MIN_2);
    cluster.fence(3);
    cluster.reassign(&[3, 1]);
    assert_eq!((cluster.replicas(), &cluster.partition().removing[..]), (&[1, 2, 3][..], &[2][..]));
    cluster.unfence(3);
    cluster.say(&[1, 2, 3]);
    assert_eq!((cluster.replicas(), cluster.seen()), (&[3, 1][..], (1, 1, &[1, 3][..], &[][..])));
    cluster.reassign(&[1]);
    assert_eq!((cluster.replicas(), cluster.seen()), (&[1][..], (1, 2, &[1][..], &[][..])), "nothing to wait for");
}

#[test]
fn another_order_is_another_preferred_leader_and_nothing_else() {
    let mut cluster = Cluster::with_topic(3, &[1, 2, 3], &[]);
    cluster.fence(3);
    assert_eq!(cluster.reassign(&[3, 2, 1]), Outcome::PartitionsChanged(1));
    assert_eq!((cluster.replicas(), cluster.seen()), (&[3, 2, 1][..], (1, 0, &[1, 2][..], &[][..])));
    assert_eq!(cluster.partition().target, [0; 0]);
    for (wrong, why) in
        [(&[][..], "there are none"), (&[1, 1], "one is named twice"), (&[1, 9], "one never registered")]
    {
        let refusal = cluster.refused(reassign(wrong));
        assert_eq!(refusal.to_string(), format!("partition topic-0 cannot be kept on brokers {wrong:?}: {why}"));
    }
}

#[test]
fn a_cancelled_reassignment_leaves_everything_where_it_was() {
    let mut cluster = Cluster::with_topic(4, &[2, 1], MIN_2);
    let nothing = Refusal::NotReassigning { topic: "topic".into(), partition: 0 };
    assert_eq!(cluster.refused(cluster.cancel()), nothing);
    cluster.reassign(&[3, 4]);
    cluster.say(&[2, 1, 3]);
    assert_eq!(cluster.run(cluster.cancel()), Outcome::PartitionsChanged(1));
    assert_eq!((cluster.replicas(), cluster.seen()), (&[2, 1][..], (2, 1, &[2, 1][..], &[][..])));
    assert_eq!(cluster.refused(cluster.cancel()), nothing);
    // A new one that leads hands over.
    cluster.reassign(&[3, 4]);
    cluster.say(&[2, 1, 3]);
    cluster.fence(2);
    cluster.fence(1);
    assert_eq!(cluster.seen(), (3, 3, &[3][..], &[1][..]));
    let refusal = cluster.refused(cluster.cancel());
    assert_eq!(refusal.to_string(), "topic-0 cannot stay where it was: only replicas that it moves to have everything");
    cluster.unfence(1);
    cluster.say(&[3, 1]);
    cluster.run(cluster.cancel());
    assert_eq!((cluster.replicas(), cluster.seen()), (&[2, 1][..], (1, 4, &[1][..], &[][..])));
}

/// It may be given the partition again before it hears that it was taken out. It throws its log away when it does, and what it
/// had told the leader until then, in the same epoch, brought it into sync with nothing.
#[test]
fn taking_a_replica_out_ends_the_leader_epoch() {
    let mut cluster = Cluster::with_topic(3, &[1, 2], &[]);
    cluster.reassign(&[1, 2, 3]);
    assert_eq!(cluster.seen(), (1, 0, &[1, 2][..], &[][..]), "nobody is taken out");
    cluster.run(cluster.cancel());
    assert_eq!(cluster.seen(), (1, 1, &[1, 2][..], &[][..]));
    cluster.reassign(&[1, 2, 3]);
    cluster.say(&[1, 2, 3]);
    assert_eq!((cluster.replicas(), cluster.seen()), (&[1, 2, 3][..], (1, 1, &[1, 2, 3][..], &[][..])));
    cluster.reassign(&[1, 3]);
    assert_eq!((cluster.replicas(), cluster.seen()), (&[1, 3][..], (1, 2, &[1, 3][..], &[][..])));
}

#[test]
fn a_removed_replica_is_nothing_in_the_partition_any_more() {
    let mut cluster = Cluster::with_topic(4, &[1, 2, 3], &[("min.insync.replicas", "3")]);
    cluster.fence(3);
    cluster.fence_replica(2);
    assert_eq!((&cluster.partition().elr[..], &cluster.partition().fenced[..]), (&[3][..], &[2][..]));
    cluster.reassign(&[1]);
    let partition = cluster.partition();
    assert_eq!((&partition.replicas[..], &partition.elr[..], &partition.fenced[..]), (&[1][..], &[][..], &[][..]));
}

#[test]
fn a_throttle_needs_its_feature_level_is_changed_and_ends_with_the_move() {
    let mut cluster = Cluster::new(0);
    for broker in 1..=3 {
        cluster.start_with(broker, |register| register.feature_level = 2);
        if broker == 1 {
            cluster.become_controller(1);
        }
        cluster.unfence(broker);
    }
    cluster.run(create_topic(&[&[1, 2]], &[]));
    let throttled = |limit| match reassign(&[1, 3]) {
        Kind::Reassign(it) => Kind::Reassign(command::Reassign { throttle_bytes_per_second: limit, ..it }),
        _ => unreachable!(),
    };
    let refusal = cluster.refused(throttled(500));
    assert_eq!(refusal, Refusal::AboveFeatureLevel { what: "a reassignment with a throttle", needed: 2, level: 1 });
    cluster.run(Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: 2 }));
    let of = |cluster: &Cluster, broker| cluster.state.topic("topic").expect("there").partitions[0].throttle_of(broker);
    for limit in [500, 700] {
        cluster.run(throttled(limit));
        assert_eq!((of(&cluster, 3), of(&cluster, 2), of(&cluster, 1)), (Some(limit), None, None));
        let snapshot = cluster.state.snapshot();
        assert_eq!(MetadataState::from_snapshot(snapshot).expect("whole"), cluster.state);
    }
    cluster.say(&[1, 2, 3]);
    assert_eq!(cluster.state.topic("topic").expect("there").partitions[0].replicas, [1, 3]);
    assert_eq!(cluster.state.topic("topic").expect("there").partitions[0].throttle_bytes_per_second, 0);
    cluster.run(match reassign(&[1, 2]) {
        Kind::Reassign(it) => Kind::Reassign(command::Reassign { throttle_bytes_per_second: 9, ..it }),
        _ => unreachable!(),
    });
    cluster.run(Kind::CancelReassignment(command::CancelReassignment { topic_id: TOPIC.to_wire(), partition: 0 }));
    assert_eq!(cluster.state.topic("topic").expect("there").partitions[0].throttle_bytes_per_second, 0);
}
