//! The metadata quorum over real sockets: three and five members, each with its thread and its files.

mod cluster;
mod office;
mod relay;

use cluster::{CLUSTER, Cluster, create, empty, propose, soon, state, topic_id};
use headwater_broker::metadata::command::{AlterPartition, AlterTopic, Command, command::Command as Kind};
use headwater_broker::metadata::raft::{Change, Founding, MembersRefusal};
use headwater_broker::metadata::{MetadataError, Outcome};
use headwater_proto::ErrorCode;
use headwater_storage::Files;
use headwater_storage::sim::{Fault, Operation, SimFiles};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_elect_one_and_commands_come_into_force_wherever_they_are_proposed() {
    let cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    assert_eq!(leader, 0, "whoever founds it leads on");
    let mut last = 0;
    for number in 0..3 {
        let n = number as u64;
        let (index, outcome) = propose(cluster.node(number), create(n)).await.expect("in force");
        assert_eq!(outcome, Outcome::TopicCreated(topic_id(n)));
        assert!(index > last);
        assert!(state(cluster.node(number)).topic(&format!("topic-{n}")).is_some(), "whoever is answered sees it");
        last = index;
    }
    for number in 0..3 {
        let applied = cluster.applied(number, last).await;
        assert_eq!((applied.state.topics().count(), applied.state.index()), (3, last));
    }
    let refused = propose(cluster.node(1), create(0)).await.expect_err("it is there");
    assert_eq!(refused.to_string(), "topic topic-0 exists already");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_dies_another_one_leads_and_nothing_that_was_answered_is_lost() {
    let mut cluster = Cluster::formed(3, 0).await;
    let mut answered = 0;
    for round in 0..3 {
        let leader = cluster.leader_among(0..3).await;
        let (index, _) = propose(cluster.node((leader + 1) % 3), create(2 * round)).await.expect("in force");
        cluster.kill(leader).await;
        let others: Vec<usize> = (0..3).filter(|number| *number != leader).collect();
        let (later, _) = propose(cluster.node(others[0]), create(2 * round + 1)).await.expect("in force");
        assert!(later > index);
        let next = cluster.leader_among(others).await;
        assert_ne!(next, leader);
        answered += 2;
        // It comes back as who it was, and has everything again.
        cluster.start(leader, Founding::Joins).await;
        let applied = cluster.applied(leader, later).await;
        assert_eq!(applied.state.topics().count(), answered);
        cluster.leader_among(0..3).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_cut_off_decides_nothing_and_catches_up_once_it_is_back() {
    let cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let cut = |a: usize, b: usize| [(a, b), (b, a)];
    cluster.network.cut(cut(leader, one).into_iter().chain(cut(leader, other)));
    // What the old leader takes now comes into force only if the others hear of it, and nobody knows that here.
    let deadline = Instant::now() + Duration::from_millis(300);
    let unknown = cluster.node(leader).propose(create(1), false, deadline).await.expect_err("nobody answers");
    assert!(matches!(unknown, MetadataError::TimedOut), "{unknown}");
    let (index, _) = propose(cluster.node(one), create(2)).await.expect("in force");
    assert_ne!(cluster.leader_among([one, other]).await, leader);
    assert!(state(cluster.node(leader)).topic("topic-2").is_none());
    cluster.network.heal();
    let healed = cluster.applied(leader, index).await;
    assert!(healed.state.topic("topic-2").is_some());
    // The entry that nobody heard of was taken back.
    let (index, _) = propose(cluster.node(leader), create(3)).await.expect("in force");
    let states: Vec<_> =
        [cluster.applied(leader, index).await, cluster.applied(one, index).await, cluster.applied(other, index).await]
            .map(|applied| applied.state.snapshot())
            .into();
    assert!(states.iter().all(|state| *state == states[0]));
}

/// It was said of it that it never comes into force, and the next leader was asked. Among five the third leader may have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_of_a_proposal_that_was_taken_back_is_not_known() {
    let cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let cut = |a: usize, b: usize| [(a, b), (b, a)];
    cluster.network.cut(cut(leader, one).into_iter().chain(cut(leader, other)));
    // Only once: a second one would hide whether the first counted.
    let alter = AlterPartition { topic_id: topic_id(1).to_wire(), ..Default::default() };
    let node = cluster.node(leader).clone();
    let proposed = tokio::spawn(async move { node.propose(Kind::AlterPartition(alter).into(), false, soon()).await });
    let (index, _) = propose(cluster.node(one), create(1)).await.expect("in force");
    cluster.leader_among([one, other]).await;
    cluster.network.heal();
    cluster.applied(leader, index).await;
    let unknown = proposed.await.expect("no panic").expect_err("nobody knows");
    assert!(matches!(unknown, MetadataError::TimedOut), "{unknown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_that_is_cut_in_one_direction_does_not_stop_the_quorum() {
    for from_leader in [true, false] {
        let cluster = Cluster::formed(3, 0).await;
        let leader = cluster.leader_among(0..3).await;
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        let ways = others.map(|other| if from_leader { (leader, other) } else { (other, leader) });
        cluster.network.cut(ways);
        let (index, _) = propose(cluster.node(others[0]), create(1)).await.expect("in force");
        assert_ne!(cluster.leader_among(others).await, leader, "it is heard of by nobody, or hears nobody");
        cluster.network.heal();
        cluster.applied(leader, index).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_hears_nothing_for_a_while_deposes_nobody_when_it_is_back() {
    let cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.network.cut([(leader, one), (one, leader), (other, one), (one, other)]);
    let mut metrics = cluster.node(one).metrics();
    let stands = metrics.wait_for(|now| now.vote.leader_id.node_id == cluster.id(one));
    drop(timeout_at(soon(), stands).await.expect("in time").expect("it runs"));
    let (index, _) = propose(cluster.node(other), create(1)).await.expect("in force");
    let term = cluster.node(leader).metrics().borrow().current_term;
    cluster.network.heal();
    cluster.applied(one, index).await;
    assert!(cluster.node(leader).metrics().borrow().current_term >= term);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_promised_and_with_it_everything_goes_on() {
    let mut cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.kill(leader).await;
    cluster.kill(one).await;
    let mut metrics = cluster.node(other).metrics();
    let alone = metrics.wait_for(|now| now.current_leader.is_none());
    drop(timeout_at(soon(), alone).await.expect("in time").expect("it runs"));
    let deadline = Instant::now() + Duration::from_millis(300);
    let refused = cluster.node(other).propose(create(1), false, deadline).await.expect_err("nobody leads");
    assert!(matches!(refused, MetadataError::NoLeader), "it was not proposed: {refused}");
    let stale = cluster.node(other).catch_up(Instant::now() + Duration::from_millis(300)).await.expect_err("who knows");
    assert!(matches!(stale, MetadataError::NoLeader), "{stale}");
    cluster.start(one, Founding::Joins).await;
    let (index, _) = propose(cluster.node(other), create(1)).await.expect("in force");
    assert_eq!(cluster.applied(one, index).await.state.topics().count(), 1);
}

/// Big settings, so that a snapshot is due and the entries in it are dropped.
async fn fill(cluster: &Cluster, number: usize) -> u64 {
    propose(cluster.node(number), create(1)).await.expect("in force");
    let config = std::collections::BTreeMap::from([("key".to_owned(), "x".repeat(100_000))]);
    let alter: Command = Kind::AlterTopic(AlterTopic { topic_id: topic_id(1).to_wire(), config }).into();
    let mut last = 0;
    for _ in 0..130 {
        last = propose(cluster.node(number), alter.clone()).await.expect("in force").0;
        cluster.node(number).snapshot_if_due().await;
    }
    let mut metrics = cluster.node(number).metrics();
    let dropped = metrics.wait_for(|now| now.purged.is_some_and(|purged| purged.index > 10));
    drop(timeout_at(soon(), dropped).await.expect("in time").expect("it runs"));
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lacks_what_was_dropped_is_sent_a_snapshot() {
    let mut cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let behind = (leader + 1) % 3;
    cluster.kill(behind).await;
    let last = fill(&cluster, leader).await;
    // The one that was away, and one that was never there.
    cluster.start(behind, Founding::Joins).await;
    let caught_up = cluster.applied(behind, last).await;
    assert_eq!(caught_up.state.snapshot(), state(cluster.node(leader)).snapshot());
    let snapshot = cluster.node(behind).metrics().borrow().snapshot;
    assert!(snapshot.is_some_and(|snapshot| snapshot.index > 10), "{snapshot:?}");
    cluster.kill(behind).await;
    empty(cluster.places[behind].folder.path());
    cluster.start(behind, Founding::Joins).await;
    cluster.node(behind).join(soon()).await.expect("taken in");
    assert_eq!(cluster.applied(behind, last).await.state.snapshot(), state(cluster.node(leader)).snapshot());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_voter_is_another_member_and_takes_its_old_place_by_one_change() {
    let mut cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let (emptied, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (old, staying) = (cluster.id(emptied), [cluster.id(leader), cluster.id(other)]);
    cluster.kill(emptied).await;
    empty(cluster.places[emptied].folder.path());
    cluster.start(emptied, Founding::Joins).await;
    let new = cluster.id(emptied);
    assert_ne!(new, old);
    // It is at the old one's address, is asked for the old one's vote, and gives none.
    cluster.kill(leader).await;
    let deadline = Instant::now() + Duration::from_secs(3);
    let refused = cluster.node(other).propose(create(1), false, deadline).await.expect_err("no quorum");
    assert!(matches!(refused, MetadataError::NoLeader | MetadataError::TimedOut), "{refused}");
    assert_eq!(cluster.node(emptied).metrics().borrow().vote.leader_id.node_id, 0, "it voted for nobody");
    cluster.start(leader, Founding::Joins).await;
    cluster.node(emptied).join(soon()).await.expect("taken in");
    cluster.register(emptied).await;
    let replace = Change::Replace { voter: old, by: new };
    // Whoever is asked; and a second time it is done already.
    for number in [emptied, leader] {
        cluster.node(number).change_members(replace, soon()).await.expect("changed");
    }
    for number in 0..3 {
        cluster.members(number, &[staying[0], staying[1], new], &[]).await;
    }
    cluster.kill(leader).await;
    propose(cluster.node(emptied), create(2)).await.expect("it votes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_vote_two_follow_and_each_change_is_one_command_or_refused_by_name() {
    let mut cluster = Cluster::formed(5, 2).await;
    let ids: Vec<u64> = (0..7).map(|number| cluster.id(number)).collect();
    for number in 0..7 {
        cluster.members(number, &ids[..5], &ids[5..]).await;
    }
    let change = async |number: usize, change: Change| cluster.node(number).change_members(change, soon()).await;
    change(6, Change::Demote(ids[4])).await.expect("changed");
    change(5, Change::Promote(ids[5])).await.expect("changed");
    change(1, Change::Remove(ids[6])).await.expect("changed");
    for number in 0..6 {
        cluster.members(number, &[ids[0], ids[1], ids[2], ids[3], ids[5]], &[ids[4]]).await;
    }
    let refused = change(2, Change::Promote(ids[6])).await.expect_err("it does not follow");
    assert_eq!(refused.code(), ErrorCode::InvalidRequest, "{refused}");
    assert!(refused.to_string().contains("does not follow the metadata log"), "{refused}");
    // The leader itself may go: another one leads first.
    let leader = cluster.leader_among(0..6).await;
    change(4, Change::Demote(ids[leader])).await.expect("changed");
    let others: Vec<usize> = [0, 1, 2, 3, 5].into_iter().filter(|number| *number != leader).collect();
    let next = cluster.leader_among(others.clone()).await;
    let voters: Vec<u64> = others.iter().map(|number| ids[*number]).collect();
    for number in 0..6 {
        cluster.members(number, &voters, &[ids[4], ids[leader]]).await;
    }
    // Of four voters one is dead, then of three: of two that are left none may go.
    let rest: Vec<usize> = others.into_iter().filter(|number| *number != next).collect();
    cluster.kill(rest[0]).await;
    cluster.node(next).change_members(Change::Remove(ids[rest[0]]), soon()).await.expect("the dead one may go");
    cluster.kill(rest[1]).await;
    let refused = cluster.node(next).change_members(Change::Demote(ids[rest[2]]), soon()).await;
    let refused = refused.expect_err("the quorum would be lost");
    assert_eq!(refused.code(), ErrorCode::LosesQuorum, "{refused}");
    assert!(
        matches!(refused, MetadataError::Members(MembersRefusal::LosesQuorum { .. }) | MetadataError::Elsewhere { .. }),
        "{refused}"
    );
    propose(cluster.node(4), create(1)).await.expect("it goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_cluster_is_refused_by_name() {
    let mut cluster = Cluster::of(2).await;
    cluster.start(0, Founding::Alone).await;
    cluster.start_in(1, Founding::Joins, "another").await;
    let refused = cluster.node(1).join(Instant::now() + Duration::from_secs(5)).await.expect_err("refused");
    assert_eq!(refused.code(), ErrorCode::WrongCluster, "{refused}");
    assert_eq!(refused.to_string(), format!("this is cluster {CLUSTER}, not another"));
    assert_eq!(cluster.node(0).membership().nodes().count(), 1);
}

/// Whoever was asked is gone before it answers, and what it wrote comes into force under the next one: who asks again must not
/// create two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_whose_answer_was_lost_is_applied_once() {
    let mut cluster = Cluster::of(3).await;
    let disks = [1, 2, 3].map(SimFiles::new);
    for (place, disk) in cluster.places.iter_mut().zip(&disks) {
        disk.create_dir_all(place.folder.path()).expect("made");
        place.files = disk.clone();
    }
    cluster.form(3).await;
    let leader = cluster.leader_among(0..3).await;
    let (asker, other) = ((leader + 1) % 3, (leader + 2) % 3);
    // The leader keeps it, and waits for the others.
    let held = [asker, other].map(|number| disks[number].hold(Fault::new(Operation::Sync)));
    let before = cluster.node(leader).metrics().borrow().last_log_index;
    let node = cluster.node(asker).clone();
    let asking = tokio::spawn(async move { propose(&node, create(1)).await });
    let written = async {
        let mut metrics = cluster.node(leader).metrics();
        drop(metrics.wait_for(|now| now.last_log_index > before).await.expect("it runs"));
        while held.iter().any(|held| held.waiting() == 0) {
            tokio::task::yield_now().await;
        }
    };
    timeout_at(soon(), written).await.expect("in time");
    let first = cluster.node(leader).metrics().borrow().last_log_index.expect("an entry");
    cluster.network.cut([(leader, asker), (asker, leader), (leader, other), (other, leader)]);
    drop(held);
    let (index, outcome) = asking.await.expect("no panic").expect("in force");
    assert_eq!(outcome, Outcome::TopicCreated(topic_id(1)));
    assert!(index > first, "it was written twice: at {first} and {index}");
    assert_eq!(cluster.applied(other, index).await.state.topics().count(), 1);
    cluster.network.heal();
    assert_eq!(cluster.applied(leader, index).await.state.snapshot(), state(cluster.node(asker)).snapshot());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_created_anywhere_is_seen_anywhere_by_whoever_catches_up_first() {
    let cluster = Cluster::formed(3, 1).await;
    for n in 0..20 {
        let (at, there) = (n as usize % 4, (n as usize + 1 + n as usize / 4) % 4);
        propose(cluster.node(at), create(n)).await.expect("in force");
        cluster.node(there).catch_up(soon()).await.expect("in time");
        assert!(state(cluster.node(there)).topic(&format!("topic-{n}")).is_some(), "{n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_may_come_back_under_another_address() {
    let mut cluster = Cluster::formed(3, 0).await;
    let leader = cluster.leader_among(0..3).await;
    let moved = (leader + 1) % 3;
    cluster.kill(moved).await;
    let before = cluster.places[moved].address.clone();
    cluster.move_to_another_address(moved).await;
    assert_ne!(before, cluster.places[moved].address);
    cluster.start(moved, Founding::Joins).await;
    cluster.register(moved).await;
    let (index, _) = propose(cluster.node(leader), create(1)).await.expect("in force");
    cluster.applied(moved, index).await;
    let others: Vec<usize> = (0..3).filter(|number| *number != leader).collect();
    cluster.kill(leader).await;
    propose(cluster.node(moved), create(2)).await.expect("both are a quorum");
    cluster.leader_among(others).await;
}

/// A data path that is always busy: its thread looks at the socket every 120 ms, so that an answer takes longer than openraft
/// waits for it.
fn busy() -> tokio::runtime::Handle {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let handle = runtime.handle().clone();
    for _ in 0..3 {
        runtime.spawn(async {
            loop {
                std::thread::sleep(Duration::from_millis(40));
                tokio::task::yield_now().await;
            }
        });
    }
    // It ends with the process.
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

/// What was not answered within a heartbeat was given up, its stream too: no sign of a leader came through, and everybody stood
/// for election again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_data_path_does_not_look_like_a_death() {
    let mut cluster = Cluster::of(3).await;
    cluster.data = (0..3).map(|_| busy()).collect();
    cluster.form(3).await;
    let leader = cluster.leader_among(0..3).await;
    let term = cluster.node(leader).metrics().borrow().current_term;
    let mut last = 0;
    for n in 0..3 {
        last = propose(cluster.node(n as usize % 3), create(n)).await.expect("in force").0;
    }
    for number in 0..3 {
        assert_eq!(cluster.applied(number, last).await.state.topics().count(), 3);
        assert_eq!(cluster.node(number).metrics().borrow().current_term, term, "nobody stood for election");
    }
}

/// A connection was driven by the thread of whoever asked for it first, as a broker does that joins: where that was one which serves
/// records, the quorum waited for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quorum_s_thread_drives_connections_whoever_asks_for_them() {
    let mut cluster = Cluster::of(3).await;
    let joined = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(cluster.form(3));
        (cluster, runtime)
    });
    // From here on nothing runs on it, and nothing has to.
    let (cluster, stands_still) = joined.await.expect("no panic");
    assert_eq!(stands_still.metrics().num_alive_tasks(), 0);
    for number in 0..3 {
        propose(cluster.node(number), create(number as u64)).await.expect("in force");
    }
    stands_still.shutdown_background();
}
