//! Consumer groups through joins, leaves, crashes and returns: no partition is ever owned twice, none stays orphaned, every
//! record reaches the group, and who was fenced cannot commit.

#[path = "../harness/mod.rs"]
mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use harness::{Broker, DEADLINE, Running, eventually};
use headwater_client::{Client, ClientConfig, Consumer, ErrorCode, Rebalance, TopicPartition};
use serde_json::Value;

/// Who owns what, as the members' own callbacks tell it.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<LedgerState>>);

#[derive(Default)]
struct LedgerState {
    owners: BTreeMap<TopicPartition, String>,
    violations: Vec<String>,
}

impl Ledger {
    fn record(&self, member: &str, event: &Rebalance) {
        let mut state = self.0.lock().expect("not poisoned");
        match event {
            Rebalance::Assigned(partitions) => {
                for partition in partitions {
                    if let Some(owner) = state.owners.insert(partition.clone(), member.to_owned()) {
                        state.violations.push(format!("{member} was given {partition:?}, which {owner} still owned"));
                    }
                }
            }
            Rebalance::Revoked(partitions, _) | Rebalance::Lost(partitions) => {
                for partition in partitions {
                    match state.owners.remove(partition) {
                        Some(owner) if owner == member => {}
                        owner => state.violations.push(format!("{member} let go of {partition:?} owned by {owner:?}")),
                    }
                }
            }
        }
    }

    fn forget(&self, member: &str) {
        self.0.lock().expect("not poisoned").owners.retain(|_, owner| owner != member);
    }

    #[track_caller]
    fn assert_never_owned_twice(&self) {
        let state = self.0.lock().expect("not poisoned");
        assert!(state.violations.is_empty(), "{:#?}", state.violations);
    }

    /// How many partitions each member owns.
    fn shares(&self) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for owner in self.0.lock().expect("not poisoned").owners.values() {
            *shares.entry(owner.clone()).or_insert(0) += 1;
        }
        shares
    }
}

/// A member that consumes in the background until it is told to leave.
struct Member {
    leave: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone)]
struct Group {
    profile: std::path::PathBuf,
    topic: &'static str,
    ledger: Ledger,
    seen: Arc<Mutex<BTreeSet<(u32, i64)>>>,
}

impl Group {
    fn new(broker: &Broker, topic: &'static str) -> Group {
        Group { profile: broker.profile().to_owned(), topic, ledger: Ledger::default(), seen: Arc::default() }
    }

    async fn client(&self) -> Client {
        let config = ClientConfig::from_profile(&self.profile).expect("the profile");
        Client::connect(config).await.expect("the broker answers")
    }

    async fn consumer(&self, name: &str, instance: Option<&str>, assignor: &str) -> Consumer {
        let (ledger, member) = (self.ledger.clone(), name.to_owned());
        let mut builder = self.client().await.consumer().group("g").topics([self.topic]).assignor(assignor);
        if let Some(instance) = instance {
            builder = builder.instance_id(instance);
        }
        builder
            .on_rebalance(move |event| {
                ledger.record(&member, &event);
                std::future::ready(())
            })
            .build()
            .await
            .expect("the member joins")
    }

    async fn join(&self, name: &str, instance: Option<&str>, assignor: &str) -> Member {
        let mut consumer = self.consumer(name, instance, assignor).await;
        let (leave, mut left) = tokio::sync::oneshot::channel();
        let seen = self.seen.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut left => break,
                    record = consumer.next() => {
                        let record = record.expect("a member's stream does not end").expect("records come");
                        seen.lock().expect("not poisoned").insert((record.partition, record.offset));
                    }
                }
            }
            consumer.close().await.expect("a clean leave");
        });
        Member { leave, task }
    }

    /// Waits until the members own this many partitions each, smallest first.
    async fn shares(&self, expected: &[usize]) {
        let ledger = self.ledger.clone();
        let expected = expected.to_vec();
        self.until(&format!("shares of {expected:?}"), move || {
            let mut shares: Vec<usize> = ledger.shares().into_values().collect();
            shares.sort_unstable();
            shares == expected
        })
        .await;
    }

    async fn seen(&self, records: usize) {
        let seen = self.seen.clone();
        self.until(&format!("{records} records"), move || seen.lock().expect("not poisoned").len() == records).await;
    }

    async fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let wait = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(DEADLINE, wait).await.is_err() {
            panic!("{what}: not within {DEADLINE:?}; shares: {:?}", self.ledger.shares());
        }
    }
}

impl Member {
    async fn leave(self) {
        self.leave.send(()).expect("the member is there");
        self.task.await.expect("a clean leave");
    }
}

fn lines(from: usize, to: usize) -> String {
    (from..to).map(|n| format!("k{n}:{n}\n")).collect()
}

fn broker_with_topic(partitions: u32) -> Broker {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", &partitions.to_string()]).ok();
    broker
}

fn produce(broker: &Broker, from: usize, to: usize) {
    broker.run_with(&["produce", "t", "--key-separator", ":"], lines(from, to)).ok();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

#[test]
fn members_share_the_partitions_evenly_as_they_join_and_leave() {
    let broker = broker_with_topic(6);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        for assignor in ["uniform", "range"] {
            let a = group.join("a", None, assignor).await;
            group.shares(&[6]).await;
            let b = group.join("b", None, assignor).await;
            group.shares(&[3, 3]).await;
            let c = group.join("c", None, assignor).await;
            group.shares(&[2, 2, 2]).await;
            a.leave().await;
            group.shares(&[3, 3]).await;
            b.leave().await;
            group.shares(&[6]).await;
            c.leave().await;
            group.shares(&[]).await;
        }
    });
    group.ledger.assert_never_owned_twice();
}

#[test]
fn every_record_reaches_the_group_through_joins_and_leaves() {
    let broker = broker_with_topic(6);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let mut members = std::collections::VecDeque::new();
        for round in 0..6 {
            members.push_back(group.join(&format!("m{round}"), None, "uniform").await);
            if round % 2 == 1 {
                members.pop_front().expect("there is one").leave().await;
            }
            tokio::task::block_in_place(|| produce(&broker, round * 500, (round + 1) * 500));
        }
        group.seen(3_000).await;
        for member in members {
            member.leave().await;
        }
    });
    group.ledger.assert_never_owned_twice();
    let described = broker.object(&["group", "describe", "g"]);
    let lag: u64 = offsets(&described).values().map(|o| o["lag"].as_u64().expect("a lag")).sum();
    assert_eq!(lag, 0, "leaving members commit what they were given: {described}");
}

#[test]
fn ten_members_joining_at_once_end_up_with_one_partition_each() {
    let broker = broker_with_topic(10);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let names: Vec<String> = (0..10).map(|n| format!("m{n}")).collect();
        let members = futures::future::join_all(names.iter().map(|name| group.join(name, None, "uniform"))).await;
        group.shares(&[1; 10]).await;
        tokio::task::block_in_place(|| produce(&broker, 0, 1_000));
        group.seen(1_000).await;
        futures::future::join_all(members.into_iter().map(Member::leave)).await;
    });
    group.ledger.assert_never_owned_twice();
}

#[test]
fn members_beyond_the_partitions_wait_and_take_over() {
    let broker = broker_with_topic(2);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let a = group.join("a", None, "uniform").await;
        let b = group.join("b", None, "uniform").await;
        group.shares(&[1, 1]).await;
        let c = group.join("c", None, "uniform").await;
        let d = group.join("d", None, "uniform").await;
        a.leave().await;
        b.leave().await;
        group.shares(&[1, 1]).await;
        assert!(group.ledger.shares().keys().all(|owner| ["c", "d"].contains(&owner.as_str())));
        c.leave().await;
        group.shares(&[2]).await;
        d.leave().await;
    });
    group.ledger.assert_never_owned_twice();
}

#[test]
fn added_partitions_are_assigned_and_a_deleted_topic_is_let_go() {
    let broker = broker_with_topic(2);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let a = group.join("a", None, "uniform").await;
        group.shares(&[2]).await;
        tokio::task::block_in_place(|| broker.run(&["topic", "add-partitions", "t", "5"]).ok());
        group.shares(&[5]).await;
        a.leave().await;
    });
    broker.run(&["topic", "delete", "t"]).ok();
    let left = broker.run(&["group", "describe", "g", "--json"]);
    if left.status.success() {
        assert!(offsets(&left.object()).is_empty(), "deleting a topic removes its offsets");
    }
}

/// Offsets of topic `t` by partition, out of `group describe`.
fn offsets(described: &Value) -> BTreeMap<u64, Value> {
    described["offsets"]
        .as_array()
        .expect("offsets")
        .iter()
        .map(|o| (o["partition"].as_u64().expect("a partition"), o.clone()))
        .collect()
}

#[test]
fn a_killed_member_is_replaced_after_its_session_and_nothing_is_missed() {
    let broker = broker_with_topic(4);
    let mut victim = Running::start(broker.command(&["consume", "t", "--group", "g", "--json"]));
    eventually("the first member has all partitions", || (owned(&broker) == [4]).then_some(()));
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let survivor = group.join("survivor", None, "uniform").await;
        group.shares(&[2]).await;
        tokio::task::block_in_place(|| {
            produce(&broker, 0, 400);
            eventually("both members see records", || (!victim.lines().is_empty()).then_some(()));
            victim.kill();
        });
        group.shares(&[4]).await;
        tokio::task::block_in_place(|| produce(&broker, 400, 800));
        let printed: BTreeSet<(u64, u64)> = victim.json().iter().map(place).collect();
        let seen = group.seen.clone();
        group
            .until("every record was seen by one of them", move || {
                let seen = seen.lock().expect("not poisoned");
                let seen = seen.iter().map(|(p, o)| (u64::from(*p), u64::try_from(*o).expect("not negative")));
                printed.iter().copied().chain(seen).collect::<BTreeSet<_>>().len() == 800
            })
            .await;
        survivor.leave().await;
    });
    group.ledger.assert_never_owned_twice();
}

fn place(record: &Value) -> (u64, u64) {
    (record["partition"].as_u64().expect("a partition"), record["offset"].as_u64().expect("an offset"))
}

/// How many partitions each member owns, as the broker tells it.
fn owned(broker: &Broker) -> Vec<usize> {
    let answer = broker.run(&["group", "describe", "g", "--json"]);
    if !answer.status.success() {
        return Vec::new();
    }
    let mut owned: Vec<usize> = answer.object()["members"]
        .as_array()
        .expect("members")
        .iter()
        .map(|m| m["partitions"].as_array().expect("partitions").len())
        .collect();
    owned.sort_unstable();
    owned
}

#[test]
fn a_static_member_that_returns_finds_its_partitions_and_nobody_else_moved() {
    let broker = broker_with_topic(6);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let a = group.join("a", Some("one"), "uniform").await;
        let b = group.join("b", Some("two"), "uniform").await;
        group.shares(&[3, 3]).await;
        let before = group.ledger.0.lock().expect("not poisoned").owners.clone();
        a.leave().await;
        group.shares(&[3]).await;
        let a = group.join("a", Some("one"), "uniform").await;
        group.shares(&[3, 3]).await;
        assert_eq!(group.ledger.0.lock().expect("not poisoned").owners, before, "every member has what it had");
        a.leave().await;
        b.leave().await;
    });
    group.ledger.assert_never_owned_twice();
}

#[test]
fn a_second_live_member_with_the_same_instance_id_is_refused() {
    let broker = broker_with_topic(2);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let first = group.join("first", Some("one"), "uniform").await;
        group.shares(&[2]).await;
        let second = group.client().await.consumer().group("g").topics(["t"]).instance_id("one").build().await;
        let refused = match second {
            Err(refused) => refused,
            Ok(mut second) => match second.next().await {
                Some(Err(refused)) => refused,
                other => panic!("the second member was let in: {other:?}"),
            },
        };
        assert_eq!(refused.code(), Some(ErrorCode::UnreleasedInstanceId), "{refused}");
        first.leave().await;
    });
}

#[test]
fn the_commit_of_a_fenced_member_is_refused() {
    let broker = broker_with_topic(1);
    produce(&broker, 0, 10);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let mut consumer =
            group.client().await.consumer().group("g").topics(["t"]).auto_commit(None).build().await.expect("joins");
        let record = consumer.next().await.expect("a record").expect("it reads");
        assert_eq!(record.offset, 0);
        let committer = consumer.committer().expect("a group");
        consumer.close().await.expect("it leaves");
        let t0 = TopicPartition::new("t", 0);
        let late = committer.commit_offsets([(t0.clone(), 5)]).await.expect_err("a member that left cannot commit");
        assert!(matches!(late.code(), Some(ErrorCode::UnknownMember | ErrorCode::FencedMemberEpoch)), "{late}");
        let committed = group.client().await.admin().fetch_offsets("g").await.unwrap_or_default();
        assert!(committed.is_empty(), "nothing was committed: {committed:?}");
    });
}

#[test]
fn groups_and_their_offsets_outlive_kills_of_the_broker() {
    let mut broker = broker_with_topic(3);
    produce(&broker, 0, 300);
    let first = broker.json(&["consume", "t", "--group", "g", "--count", "100"]);
    assert_eq!(first.len(), 100);
    let before = offsets(&broker.object(&["group", "describe", "g"]));
    broker.kill();
    broker.revive();
    assert_eq!(offsets(&broker.object(&["group", "describe", "g"])), before);
    let group = Group::new(&broker, "t");
    runtime().block_on(async {
        let member = group.join("m", None, "uniform").await;
        group.shares(&[3]).await;
        tokio::task::block_in_place(|| {
            broker.kill();
            broker.revive();
            produce(&broker, 300, 600);
        });
        group
            .until("the member goes on after the broker's return", || {
                let seen = group.seen.lock().expect("not poisoned");
                let first: BTreeSet<(u32, i64)> = first.iter().map(place).map(|(p, o)| (p as u32, o as i64)).collect();
                seen.union(&first).count() == 600
            })
            .await;
        member.leave().await;
    });
    group.ledger.assert_never_owned_twice();
    group.ledger.forget("m");
}
