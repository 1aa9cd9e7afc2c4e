//! Several brokers that are one cluster: how they come together, who they believe each other to be, and who serves while some
//! are gone. Real sockets, certificates as `headwater cert` makes them, each broker with its own threads for the quorum.

#![recursion_limit = "256"]

mod behind;
mod damaged;
mod disks;
mod groups;
#[path = "../harness/mod.rs"]
mod harness;
mod identity;
mod leaders;
mod nodes;

use harness::within;
use headwater_broker::Broker;
use headwater_broker::cluster;
use headwater_broker::metadata::raft::recover::FORMER_FILE;
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response};
use nodes::{Nodes, brokers_of};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_brokers_come_together_and_each_knows_what_the_others_know() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    for number in 0..3 {
        let told = nodes.describe(number, false).await;
        assert_eq!((told.voters.as_slice(), told.observers.as_slice()), (&[1, 2, 3][..], &[][..]));
        assert_eq!(told.brokers.iter().map(|broker| broker.broker_id).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(told.brokers.iter().all(|broker| broker.state == "active"), "{:?}", told.brokers);
        assert_eq!(told.controller, 1, "whoever founded it leads on");
        assert_eq!(told.cluster_id, nodes.broker(0).cluster_id());
    }
    // Wherever a topic is created, everybody sees it who asks after that.
    for (n, (at, there)) in [(0, 1), (1, 2), (2, 0), (1, 0), (2, 1)].into_iter().enumerate() {
        let name = format!("topic-{n}");
        nodes.client(at).await.create_topic(&name, 3, &[]).await;
        let told =
            nodes.client(there).await.call(Request::DescribeTopic(wire::DescribeTopic { name, stale: false })).await;
        let Response::DescribeTopic(topic) = told else { panic!("{told:?}") };
        let leaders: Vec<i32> = topic.partitions.iter().map(|partition| partition.leader).collect();
        assert_eq!(leaders.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "spread: {leaders:?}");
        let create = wire::CreateTopic { name: topic.name, ..Default::default() };
        let refused = nodes.client(there).await.call(Request::CreateTopic(create)).await;
        assert!(
            matches!(&refused, Response::Error(error) if error.code == ErrorCode::TopicExists.number()),
            "{refused:?}"
        );
    }
    let told = nodes.describe(2, false).await;
    assert_eq!(told.brokers.iter().map(|broker| (broker.leaders, broker.partitions)).collect::<Vec<_>>(), [(5, 15); 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_controller_dies_another_one_is_in_office_and_fences_it_until_it_is_back() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    let before = nodes.describe(1, false).await;
    nodes.kill(0);
    let after = nodes.until(1, "another controller, and broker 1 fenced", |told| {
        told.controller != 1 && brokers_of(told, "fenced") == [1]
    });
    let after = after.await;
    assert!([2, 3].contains(&after.controller) && after.controller_epoch > before.controller_epoch);
    nodes.client(2).await.create_topic("meanwhile", 1, &[]).await;
    nodes.start(0).await;
    let back = nodes.until(0, "all are active", |told| brokers_of(told, "active") == [1, 2, 3]).await;
    let incarnation = |told: &wire::DescribeClusterResponse| told.brokers[0].incarnation.clone();
    assert_ne!(incarnation(&back), incarnation(&before), "it is another start");
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "meanwhile".into(), stale: true });
    let told = nodes.client(0).await.call(describe).await;
    assert!(matches!(told, Response::DescribeTopic(_)), "it has what it missed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_brokers_may_start_at_once_and_an_observer_may_be_added_and_forgotten() {
    let mut nodes = Nodes::of(4);
    nodes.form(3).await;
    nodes.join(3).await;
    let told =
        nodes.until(3, "it follows", |told| told.observers == [4] && brokers_of(told, "active").len() == 4).await;
    assert_eq!(told.voters, [1, 2, 3]);
    // It runs, or it votes: it is not forgotten.
    let remove = |broker_id| Request::RemoveBroker(wire::RemoveBroker { broker_id });
    let refused = nodes.client(0).await.call(remove(4)).await;
    assert!(matches!(&refused, Response::Error(error) if error.message.contains("stop it first")), "{refused:?}");
    let everywhere = wire::CreateTopic { name: "t".into(), partitions: 1, replication_factor: 4, ..Default::default() };
    let created = nodes.client(0).await.call(Request::CreateTopic(everywhere)).await;
    assert!(matches!(created, Response::CreateTopic(_)), "{created:?}");
    nodes.stop(3).await;
    nodes.until(0, "it is fenced", |told| brokers_of(told, "fenced") == [4]).await;
    let refused = nodes.client(1).await.call(remove(4)).await;
    assert!(matches!(&refused, Response::Error(error) if error.message.contains("keeps t-0")), "{refused:?}");
    assert_eq!(nodes.describe(0, false).await.observers, [4], "it is what it was");
    let delete = Request::DeleteTopic(wire::DeleteTopic { name: "t".into() });
    let deleted = nodes.client(0).await.call(delete).await;
    assert!(matches!(deleted, Response::Done(_)), "{deleted:?}");
    let done = nodes.client(2).await.call(remove(4)).await;
    assert!(matches!(done, Response::Done(_)), "{done:?}");
    let told = nodes.describe(1, false).await;
    assert_eq!((told.brokers.len(), told.observers.len()), (3, 0));
    for number in 0..3 {
        nodes.kill(number);
    }
    nodes.start_all(0..3).await;
    nodes.until(1, "all are active", |told| brokers_of(told, "active") == [1, 2, 3] && told.controller > 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_majority_that_is_lost_is_told_and_stale_answers_go_on() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    nodes.kill(1);
    nodes.kill(2);
    let stale = nodes.describe(0, true).await;
    assert_eq!(stale.brokers.len(), 3);
    // As soon as that is certain, so that whoever asks can ask another broker; and who coordinates, it does not know any more.
    let describe = Request::DescribeCluster(wire::DescribeCluster { stale: false });
    let find = Request::FindCoordinator(wire::FindCoordinator::default());
    for request in [describe, find] {
        let refused = nodes.client(0).await.call(request).await;
        let Response::Error(refused) = refused else { panic!("{refused:?}") };
        assert_eq!((ErrorCode::from_number(refused.code), refused.retryable), (ErrorCode::OutOfTouch, true));
        assert!(refused.message.contains("of 3 voters only broker 1 answers it, and 2 have to"), "{refused:?}");
    }
    let health = Request::ClusterHealth(wire::ClusterHealth { stale: true });
    let Response::ClusterHealth(told) = nodes.client(0).await.call(health).await else { panic!("it is stale") };
    assert_eq!((told.brokers.len(), told.voters, told.answering), (3, 3, vec![1]));
    nodes.start(1).await;
    nodes.until(0, "broker 3 is fenced", |told| brokers_of(told, "fenced") == [3]).await;
}

/// It took whoever led last for its leader for ever, and clients that it was out of touch with stayed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_observer_that_hears_of_no_leader_any_more_says_so() {
    let mut nodes = Nodes::of(3);
    nodes.form(2).await;
    nodes.join(2).await;
    nodes.until(2, "it follows", |told| told.observers == [3] && brokers_of(told, "active").len() == 3).await;
    nodes.kill(0);
    nodes.kill(1);
    let describe = Request::DescribeCluster(wire::DescribeCluster { stale: false });
    let find = Request::FindCoordinator(wire::FindCoordinator::default());
    for request in [describe, find] {
        let refused = nodes.client(2).await.call(request).await;
        let Response::Error(refused) = refused else { panic!("{refused:?}") };
        assert_eq!(ErrorCode::from_number(refused.code), ErrorCode::OutOfTouch, "{refused:?}");
    }
    nodes.start_all(0..2).await;
    nodes.until(2, "it follows again", |told| brokers_of(told, "active").len() == 3).await;
}

/// The member that it was voted for ever, and was counted in every majority: one more death was the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_whose_disk_was_emptied_votes_again_and_nobody_is_counted_who_is_gone() {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    nodes.kill(2);
    nodes.renew_disk(2);
    nodes.join(2).await;
    nodes.until(0, "it votes again", |told| told.voters == [1, 2, 3] && brokers_of(told, "active").len() == 3).await;
    // Two of three are a majority still, with it.
    nodes.kill(1);
    nodes.until(2, "broker 2 is fenced", |told| brokers_of(told, "fenced") == [2]).await;
    nodes.client(0).await.create_topic("after", 1, &[]).await;
    let done =
        nodes.client(2).await.call(Request::ChangeVoters(wire::ChangeVoters { broker_id: 2, votes: false })).await;
    assert!(matches!(done, Response::Done(_)), "{done:?}");
    assert_eq!(nodes.describe(0, false).await.voters, [1, 3]);
}

/// Three voters, of which the third does not run, on a copy of its disk that is two starts old; and which member it was.
async fn older_copy() -> (Nodes, u64) {
    let mut nodes = Nodes::of(3);
    nodes.form(3).await;
    nodes.stop(2).await;
    let copy = nodes.copy_disk(2);
    for _ in 0..2 {
        nodes.start(2).await;
        nodes.until(0, "it is active", |told| brokers_of(told, "active").contains(&3)).await;
        nodes.stop(2).await;
    }
    let was = nodes.node_id(2);
    nodes.change_disk(2, copy);
    (nodes, was)
}

/// It has forgotten how it voted, and what it acknowledged of the metadata: it voted on all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_a_voters_disk_is_another_member() {
    let (mut nodes, was) = older_copy().await;
    assert_eq!(nodes.node_id(2), was);
    nodes.start(2).await;
    nodes.until(0, "it votes again", |told| told.voters == [1, 2, 3] && brokers_of(told, "active").len() == 3).await;
    nodes.stop(2).await;
    assert_ne!(nodes.node_id(2), was, "what the old member promised since is nobody's");
}

/// The disk is known to be older by all, and the member that it was would have voted on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_that_cannot_be_begun_anew_stays_one() {
    let (mut nodes, was) = older_copy().await;
    // The old journal is to be kept there.
    let in_the_way = nodes.config(2).data_dir.join(FORMER_FILE);
    std::fs::create_dir_all(in_the_way.join("x")).unwrap();
    for _ in 0..2 {
        let refused = nodes.start_refused(2).await;
        assert!(refused.contains(FORMER_FILE), "{refused}");
    }
    std::fs::remove_dir_all(&in_the_way).unwrap();
    nodes.start(2).await;
    nodes.until(0, "it votes again", |told| told.voters == [1, 2, 3] && brokers_of(told, "active").len() == 3).await;
    nodes.stop(2).await;
    assert_ne!(nodes.node_id(2), was);
    assert!(in_the_way.is_file(), "what it was is kept");
}

/// Its starts were not counted while it was alone: the next start among several took the disk for an older copy, and threw the only journal away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_of_several_may_run_alone_for_a_while() {
    let mut nodes = Nodes::of(1);
    nodes.form(1).await;
    nodes.client(0).await.create_topic("among-several", 1, &[]).await;
    nodes.stop(0).await;
    for _ in 0..2 {
        let mut alone = nodes.config(0);
        alone.set_pair("controller.quorum.bootstrap.servers=").unwrap();
        let broker = within("start", Broker::start(alone)).await.unwrap();
        assert!(within("shutdown", broker.shutdown()).await);
    }
    nodes.start(0).await;
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "among-several".into(), stale: false });
    let told = nodes.client(0).await.call(describe).await;
    let Response::DescribeTopic(topic) = told else { panic!("{told:?}") };
    assert_eq!((topic.partitions[0].leader, &topic.partitions[0].isr[..]), (1, &[1][..]), "{topic:?}");
}

/// The folder of a broker that was alone goes on, and takes others in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_alone_becomes_the_first_of_several() {
    let mut nodes = Nodes::of(2);
    let mut alone = nodes.config(0);
    alone.set_pair("controller.quorum.bootstrap.servers=").unwrap();
    let broker = within("start", Broker::start(alone)).await.unwrap();
    let client = harness::Client::connect(&broker).await;
    client.create_topic("before", 2, &[]).await;
    let cluster_id = broker.cluster_id().to_owned();
    // Before that it takes nobody in: who joined it waited for ever.
    let refused = within("a refusal", cluster::join(&nodes.config(1))).await.unwrap_err().to_string();
    let what_to_do = "set controller.quorum.bootstrap.servers in its configuration too";
    assert!(refused.contains("broker 1 at") && refused.contains(what_to_do), "{refused}");
    assert!(!nodes.config(1).data_dir.join("meta.properties").exists(), "nothing was begun");
    assert!(within("shutdown", broker.shutdown()).await);
    nodes.start(0).await;
    nodes.join(1).await;
    nodes.until(1, "both are active", |told| brokers_of(told, "active") == [1, 2]).await;
    assert_eq!(nodes.broker(1).cluster_id(), cluster_id);
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: "before".into(), stale: true });
    let Response::DescribeTopic(topic) = nodes.client(1).await.call(describe).await else {
        panic!("it knows the topic")
    };
    assert!(topic.partitions.iter().all(|partition| (partition.leader, partition.leader_epoch) == (1, 1)), "{topic:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_made_for_a_cluster_once_and_by_command() {
    let mut nodes = Nodes::of(2);
    let refused = Broker::start(nodes.config(0)).await.unwrap_err().to_string();
    assert!(refused.contains("headwater cluster init") && refused.contains("headwater cluster join"), "{refused}");
    assert!(!nodes.config(0).data_dir.join("meta.properties").exists(), "nothing was begun");
    let mut alone = nodes.config(0);
    alone.set_pair("controller.quorum.bootstrap.servers=").unwrap();
    let refused = cluster::init(&alone).await.unwrap_err().to_string();
    assert!(refused.contains("controller.quorum.bootstrap.servers is not set"), "{refused}");
    let made = cluster::init(&nodes.config(0)).await.unwrap();
    let refused = cluster::init(&nodes.config(0)).await.unwrap_err().to_string();
    assert!(refused.contains("belongs to a cluster already"), "{refused}");
    nodes.start(0).await;
    assert_eq!(nodes.broker(0).cluster_id(), made.cluster_id);
    let joined = cluster::join(&nodes.config(1)).await.unwrap();
    assert_eq!(joined.cluster_id, made.cluster_id);
}
