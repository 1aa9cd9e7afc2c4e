//! The controller's office, and what is decided on the metadata, through the handle that a broker has.

use crate::cluster::{Cluster, create, soon};
use headwater_broker::metadata::command::{AlterTopic, RegisterBroker, UnfenceBroker, command::Command as Kind};
use headwater_broker::metadata::raft::{Office, node::ELECTION_TIMEOUT_MS};
use headwater_broker::metadata::{MetadataError, MetadataHandle, Refusal, command::Command};
use std::future::ready;
use std::sync::Arc;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A broker's handle, and its registration.
struct Held {
    handle: MetadataHandle,
    registration: RegisterBroker,
    stop: CancellationToken,
}

async fn hold(cluster: &Cluster, number: usize) -> Held {
    let registration = cluster.registration(number);
    let node = cluster.node(number).clone();
    node.propose(Kind::RegisterBroker(registration.clone()).into(), true, soon()).await.expect("in force");
    let state = Arc::clone(&node.applied().borrow().state);
    let (office, stop) = ((Office::new(ELECTION_TIMEOUT_MS), registration.clone()), CancellationToken::new());
    let (handle, task) = MetadataHandle::new(node, state, office, Box::new(|_| Box::pin(ready(()))), stop.clone());
    tokio::spawn(task);
    Held { handle, registration, stop }
}

async fn held(cluster: &Cluster) -> Vec<Held> {
    let mut all = Vec::new();
    for number in 0..cluster.places.len() {
        all.push(hold(cluster, number).await);
    }
    all
}

impl Held {
    async fn in_office(&self) -> u64 {
        let mut epoch = self.handle.controller_epoch();
        let taken = timeout_at(soon(), epoch.wait_for(Option::is_some)).await.expect("in time").expect("it runs");
        taken.expect("an epoch")
    }

    async fn out_of_office(&self) {
        let mut epoch = self.handle.controller_epoch();
        drop(timeout_at(soon(), epoch.wait_for(Option::is_none)).await.expect("in time").expect("it runs"));
    }

    fn incarnation(&self) -> Uuid {
        Uuid::from_slice(&self.registration.incarnation).expect("sixteen bytes")
    }

    /// What only a controller may say.
    fn unfence(&self, controller_epoch: u64) -> Command {
        let (broker_id, incarnation) = (self.registration.broker_id, self.registration.incarnation.clone());
        let unfence = Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation });
        Command { controller_epoch, ..unfence.into() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_leadership_is_an_office_of_its_own_and_ends_without_a_quorum() {
    let cluster = Cluster::formed(3, 0).await;
    let brokers = held(&cluster).await;
    let leader = cluster.leader_among(0..3).await;
    let first = brokers[leader].in_office().await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let broker_id = brokers[leader].registration.broker_id;
    let state = brokers[leader].handle.state();
    assert_eq!(state.controller(), Some((broker_id, brokers[leader].incarnation())));
    assert_eq!(state.controller_epoch(), first, "the index of the command is the epoch");
    assert_eq!(*brokers[one].handle.controller_epoch().borrow(), None);
    brokers[leader].handle.propose(brokers[leader].unfence(first)).await.expect("in force");
    // Cut off, it knows by itself that it is not in office any more.
    cluster.network.cut([(leader, one), (leader, other), (one, leader), (other, leader)]);
    brokers[leader].out_of_office().await;
    let next = cluster.leader_among([one, other]).await;
    let second = brokers[next].in_office().await;
    assert!(second > first);
    cluster.network.heal();
    cluster.applied(leader, second).await;
    for broker in &brokers {
        let stale = broker.handle.propose(brokers[next].unfence(first)).await.expect_err("of an office that is over");
        assert!(matches!(stale, MetadataError::Refused(Refusal::StaleController { .. })), "{stale}");
    }
    brokers[next].handle.propose(brokers[next].unfence(second)).await.expect("in force");
    assert_eq!(*brokers[leader].handle.controller_epoch().borrow(), None);
    brokers.iter().for_each(|broker| broker.stop.cancel());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_broker_was_told_is_decided_on_everywhere() {
    let cluster = Cluster::formed(3, 1).await;
    let brokers = held(&cluster).await;
    for n in 0..12u64 {
        let (at, there) = (n as usize % 4, (n as usize + 1) % 4);
        brokers[at].handle.propose(create(n)).await.expect("in force");
        let name = format!("topic-{n}");
        let altered = brokers[there].handle.propose_with(move |state| {
            let topic = state.topic(&name).ok_or(MetadataError::UnknownTopic(name.clone()))?;
            let config = [("key".to_owned(), "value".to_owned())].into();
            Ok(Kind::AlterTopic(AlterTopic { topic_id: topic.id.to_wire(), config }).into())
        });
        altered.await.expect("it is there");
        let state = brokers[there].handle.state();
        assert!(state.topic(&format!("topic-{n}")).is_some_and(|topic| topic.config.contains_key("key")));
    }
    brokers.iter().for_each(|broker| broker.stop.cancel());
}
