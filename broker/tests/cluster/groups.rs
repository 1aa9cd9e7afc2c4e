//! Groups whose coordinators come and go: who leads the partition of the offsets topic coordinates, and goes on where the one before it
//! stopped.

use crate::harness::members::{Member, commit, committed, entry, open_member};
use crate::harness::{Client, DEADLINE, within};
use crate::nodes::{Nodes, brokers_of};
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response};
use std::collections::BTreeSet;
use std::time::Instant;

/// Calls until it is not told to try again.
async fn ask(client: &Client, request: Request) -> Response {
    let began = Instant::now();
    loop {
        match client.call(request.clone()).await {
            Response::Error(error) if error.retryable => assert!(began.elapsed() < DEADLINE, "{error:?}"),
            answer => return answer,
        }
        tokio::task::yield_now().await;
    }
}

pub(crate) async fn find(client: &Client, group: &str) -> Vec<wire::Coordinator> {
    match ask(client, Request::FindCoordinator(wire::FindCoordinator { group: group.into() })).await {
        Response::FindCoordinator(found) => found.coordinators,
        other => panic!("{other:?}"),
    }
}

/// The coordinator of a group, which is not one of these, by its number among the nodes, once it serves the group.
pub(crate) async fn coordinator(nodes: &Nodes, asked: usize, group: &str, not: &[usize]) -> (usize, Client) {
    let (client, began) = (nodes.client(asked).await, Instant::now());
    loop {
        assert!(began.elapsed() < DEADLINE, "no coordinator");
        let found = find(&client, group).await.remove(0);
        let Ok(number) = usize::try_from(found.broker_id - 1) else { continue };
        if not.contains(&number) {
            continue;
        }
        assert_eq!(found.address, nodes.address(number).to_string());
        let there = nodes.client(number).await;
        let fetch = wire::FetchOffsets { group: group.into(), ..Default::default() };
        if let Response::FetchOffsets(_) = there.call(Request::FetchOffsets(fetch)).await {
            return (number, there);
        }
    }
}

/// The same member, on another stream.
pub(crate) async fn again(client: &Client, group: &str, member: &Member, topics: &[&str]) -> Member {
    let open = wire::OpenMember {
        member_epoch: member.epoch,
        owned: member.owned.clone(),
        ..patient(group, &member.id, topics)
    };
    Member::open(client, open).await
}

/// A member that stays one for as long as a machine with other work may need for brokers to start.
fn patient(group: &str, id: &str, topics: &[&str]) -> wire::OpenMember {
    wire::OpenMember { session_timeout_ms: 45_000, ..open_member(group, id, topics) }
}

pub(crate) async fn until_replicated(nodes: &Nodes, number: usize, topic: &str, replicas: usize) {
    let (client, began) = (nodes.client(number).await, Instant::now());
    loop {
        let describe = wire::DescribeTopic { name: topic.into(), stale: false };
        match client.call(Request::DescribeTopic(describe)).await {
            Response::DescribeTopic(told) if told.partitions.iter().all(|it| it.isr.len() == replicas) => return,
            told => assert!(began.elapsed() < DEADLINE, "{told:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_goes_on_with_another_coordinator_where_it_was() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    nodes.client(0).await.create_topic("t", 2, &[]).await;
    let (first, client) = coordinator(&nodes, 0, "g", &[]).await;
    until_replicated(&nodes, 0, "__consumer_offsets", 3).await;
    let all = find(&client, "").await;
    assert_eq!(all.iter().map(|it| it.partition).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
    assert_eq!(all.iter().map(|it| it.broker_id).collect::<BTreeSet<_>>(), BTreeSet::from([1, 2, 3]), "spread");
    // Whoever does not coordinate the group says who does.
    let elsewhere = nodes.client((first + 1) % 3).await;
    let mut lost = Member::join(&elsewhere, "g", "x", &["t"]).await;
    let refused = lost.hear().await.unwrap().error.unwrap();
    assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::NotCoordinator, "{}", refused.message);
    assert_eq!(refused.leader.unwrap().broker_id, first as i32 + 1);

    let mut x = Member::open(&client, patient("g", "x", &["t"])).await;
    x.take_until(|owned| owned.len() == 2).await;
    let mut y = Member::open(&client, patient("g", "y", &["t"])).await;
    x.take_until(|owned| owned.len() == 1).await;
    y.take_until(|owned| owned.len() == 1).await;
    while x.epoch < y.epoch {
        x.take().await;
    }
    let (mine, others) = (x.partitions()[0].1, y.partitions()[0].1);
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", mine, 7)]).await, Ok(vec![0]));

    nodes.kill(first);
    let (second, client) = coordinator(&nodes, (first + 1) % 3, "g", &[first]).await;
    let mut z = again(&client, "g", &x, &["t"]).await;
    let update = within("an update", z.hear()).await.unwrap();
    assert_eq!((update.error, update.member_epoch, update.assignment), (None, x.epoch, x.owned.clone()));
    z.report().await;
    let mut y = again(&client, "g", &y, &["t"]).await;
    assert_eq!(within("an update", y.take()).await, [("t".to_owned(), others)]);
    // Those who commit with what they were told, and nobody else.
    assert_eq!(committed(&client, "g").await, [("t".to_owned(), mine, 7)]);
    assert_eq!(commit(&client, "g", Some(&z), vec![entry("t", mine, 9)]).await, Ok(vec![0]));
    let stale = Member { epoch: z.epoch - 1, ..z };
    assert_eq!(commit(&client, "g", Some(&stale), vec![entry("t", mine, 1)]).await, Err(ErrorCode::StaleMemberEpoch));
    // All groups are those of all coordinators.
    let named: Vec<u32> =
        find(&client, "").await.iter().filter(|it| it.broker_id == second as i32 + 1).map(|it| it.partition).collect();
    match client.call(Request::ListGroups(wire::ListGroups { partitions: named })).await {
        Response::ListGroups(listed) => {
            assert_eq!(listed.groups.iter().map(|it| (&*it.group, it.members)).collect::<Vec<_>>(), [("g", 2)]);
        }
        other => panic!("{other:?}"),
    }
    let refused = client.call(Request::ListGroups(wire::ListGroups { partitions: (0..16).collect() })).await;
    assert!(matches!(&refused, Response::Error(error) if error.code == ErrorCode::NotCoordinator.number()));

    // All of them stop, one after the other, and start anew at once.
    nodes.start(first).await;
    nodes.until(second, "all are active", |told| brokers_of(told, "active").len() == 3).await;
    until_replicated(&nodes, second, "__consumer_offsets", 3).await;
    for number in 0..3 {
        nodes.kill(number);
    }
    nodes.start_all(0..3).await;
    nodes.until(0, "all are active", |told| brokers_of(told, "active").len() == 3).await;
    until_replicated(&nodes, 0, "__consumer_offsets", 3).await;
    let (_, client) = coordinator(&nodes, 0, "g", &[]).await;
    assert_eq!(committed(&client, "g").await, [("t".to_owned(), mine, 9)]);
    let mut back = again(&client, "g", &x, &["t"]).await;
    assert_eq!(within("an update", back.take()).await, [("t".to_owned(), mine)]);
    assert_eq!(back.epoch, x.epoch);
    back.leave(false).await;
}

/// Whoever cannot know whether it coordinates says nothing of offsets, and keeps no member from looking for whoever does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_hears_nothing_from_the_quorum_says_nothing() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    nodes.client(0).await.create_topic("t", 1, &[]).await;
    let (number, client) = coordinator(&nodes, 0, "g", &[]).await;
    until_replicated(&nodes, 0, "__consumer_offsets", 3).await;
    let mut x = Member::open(&client, patient("g", "x", &["t"])).await;
    x.take_until(|owned| owned.len() == 1).await;
    assert_eq!(commit(&client, "g", Some(&x), vec![entry("t", 0, 7)]).await, Ok(vec![0]));
    let others = [(number + 1) % 3, (number + 2) % 3];
    others.into_iter().for_each(|other| nodes.kill(other));
    assert_eq!(within("the end of the stream", x.error()).await.0, ErrorCode::NotCoordinator);
    let fetch = Request::FetchOffsets(wire::FetchOffsets { group: "g".into(), ..Default::default() });
    let refused = client.call(fetch).await;
    assert!(
        matches!(&refused, Response::Error(error) if error.code == ErrorCode::NotCoordinator.number()),
        "{refused:?}"
    );
    nodes.start_all(others.into_iter()).await;
    let (_, client) = coordinator(&nodes, number, "g", &[]).await;
    assert_eq!(committed(&client, "g").await, [("t".to_owned(), 0, 7)]);
    // However long nobody could hear it, it is a member still.
    let mut back = again(&client, "g", &x, &["t"]).await;
    assert_eq!(within("an update", back.take()).await, [("t".to_owned(), 0)]);
    assert_eq!(back.epoch, x.epoch);
}
