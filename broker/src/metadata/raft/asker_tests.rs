use super::super::super::command::{self, RaftAppend, RaftAskVote, RaftSnapshotPart};
use super::*;
use openraft::EmptyNode;
use std::collections::{BTreeMap, BTreeSet};

/// Voters 1 to 3, and 4 follows.
fn membership() -> Membership {
    let nodes: BTreeMap<u64, EmptyNode> = (1..=4).map(|id| (id, EmptyNode {})).collect();
    Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes)
}

fn request(request: Request) -> RaftRequest {
    RaftRequest { timeout_ms: 0, request: Some(request) }
}

fn propose(kind: Kind) -> RaftRequest {
    request(Request::Propose(RaftPropose { command: Some(kind.into()), urgent: false }))
}

fn leads(node_id: u64) -> [RaftRequest; 3] {
    let vote = Some(RaftVote { node_id, ..RaftVote::default() });
    [
        request(Request::Append(RaftAppend { vote, ..RaftAppend::default() })),
        request(Request::AskVote(RaftAskVote { vote, ..RaftAskVote::default() })),
        request(Request::SnapshotPart(RaftSnapshotPart { vote, ..RaftSnapshotPart::default() })),
    ]
}

const SECOND: Asker = Asker { node_id: 2, broker_id: Some(2) };

#[test]
fn only_members_lead_where_it_is_known_who_they_are() {
    let known = membership();
    for node_id in [1, 4] {
        let asker = Asker { node_id, broker_id: Some(7) };
        leads(node_id).iter().for_each(|asked| assert_eq!(asker.check(asked, Some(&known)), Ok(())));
    }
    let stranger = Asker { node_id: 9, broker_id: Some(7) };
    for asked in leads(9) {
        assert_eq!(stranger.check(&asked, Some(&known)), Err(Improper::Stranger));
        assert_eq!(stranger.check(&asked, None), Ok(()), "it may have been taken in since");
    }
    for asked in leads(1) {
        assert_eq!(SECOND.check(&asked, Some(&known)), Err(Improper::OfAnother));
        assert_eq!(SECOND.check(&asked, None), Err(Improper::OfAnother));
    }
    // Whoever comes in is no member yet.
    let change = command::RaftChangeMembers { node_id: 9, ..Default::default() };
    assert_eq!(stranger.check(&request(Request::ChangeMembers(change)), Some(&known)), Ok(()));
}

#[test]
fn who_the_members_are_is_known_to_whoever_led_or_was_led_of_late() {
    let known = membership();
    let standing = |state, acknowledged_ms, led_ms| {
        let standing = Standing { node_id: 1, membership: &known, state, acknowledged_ms, led_ms };
        standing.members(5_000).is_some()
    };
    assert!(standing(ServerState::Follower, None, Some(5_000)));
    assert!(!standing(ServerState::Follower, Some(1), Some(5_001)), "it may have been cut off");
    assert!(!standing(ServerState::Candidate, None, None), "it has just started");
    assert!(standing(ServerState::Candidate, None, Some(800)));
    assert!(standing(ServerState::Leader, Some(5_000), None));
    assert!(!standing(ServerState::Leader, Some(5_001), Some(1)), "another one may lead by now");
    assert!(!standing(ServerState::Leader, None, None));
    let alone = Membership::new(vec![BTreeSet::from([1])], BTreeSet::from([1, 2]));
    let alone = |state| Standing { node_id: 1, membership: &alone, state, acknowledged_ms: None, led_ms: None };
    assert!(alone(ServerState::Leader).members(5_000).is_some(), "nobody is taken in without it");
    let nobody = Membership::new(vec![BTreeSet::new()], BTreeSet::new());
    let new = Standing { membership: &nobody, ..alone(ServerState::Learner) };
    assert!(new.members(5_000).is_none(), "it is new");
}

#[test]
fn what_a_broker_says_of_itself_it_alone_says() {
    let member = |broker_id| Some(command::Member { broker_id, ..Default::default() });
    let alter = |broker_id| command::AlterPartition { leader: member(broker_id), ..Default::default() };
    let of = |broker_id, node_id| {
        [
            Kind::RegisterBroker(command::RegisterBroker { broker_id, node_id, ..Default::default() }),
            Kind::DrainBroker(command::DrainBroker { broker_id, ..Default::default() }),
            Kind::AllocateProducerIds(command::AllocateProducerIds { broker_id, count: 1 }),
            Kind::AlterPartition(alter(broker_id)),
            Kind::AlterPartitions(command::AlterPartitions { partitions: vec![alter(2), alter(broker_id)] }),
        ]
    };
    for kind in of(2, 2) {
        assert_eq!(SECOND.check(&propose(kind.clone()), None), Ok(()), "{kind:?}");
        let nameless = Asker { broker_id: None, ..SECOND };
        assert_eq!(nameless.check(&propose(kind), None), Ok(()), "where certificates say nothing");
    }
    for kind in of(1, 2) {
        assert_eq!(SECOND.check(&propose(kind.clone()), None), Err(Improper::OfAnother), "{kind:?}");
    }
    let heartbeat = |broker_id| command::BrokerHeartbeat { broker_id, ..Default::default() };
    assert_eq!(SECOND.check(&request(Request::Heartbeat(heartbeat(2))), None), Ok(()));
    assert_eq!(SECOND.check(&request(Request::Heartbeat(heartbeat(1))), None), Err(Improper::OfAnother));
    // As another broker's member.
    let [register, ..] = of(2, 1);
    assert_eq!(SECOND.check(&propose(register), None), Err(Improper::OfAnother));
}

#[test]
fn what_a_controller_decides_is_nobodys_over_the_wire() {
    let decided = [
        Kind::BecomeController(command::BecomeController { broker_id: 2, ..Default::default() }),
        Kind::FenceBroker(command::FenceBroker { broker_id: 2, ..Default::default() }),
        Kind::UnfenceBroker(command::UnfenceBroker { broker_id: 2, ..Default::default() }),
        Kind::FenceReplicas(command::FenceReplicas { broker_id: 2, ..Default::default() }),
        Kind::RestoreReplicas(command::RestoreReplicas { broker_id: 2, ..Default::default() }),
    ];
    for kind in decided {
        assert_eq!(SECOND.check(&propose(kind.clone()), None), Err(Improper::OfController), "{kind:?}");
    }
    assert_eq!(SECOND.check(&propose(Kind::ImportTopics(Default::default())), None), Err(Improper::OfOneAlone));
    // A person elects leaders through any broker; the controller by itself.
    let elect = Command { controller_epoch: 7, ..Kind::ElectLeaders(Default::default()).into() };
    let as_controller = request(Request::Propose(RaftPropose { command: Some(elect), urgent: true }));
    assert_eq!(SECOND.check(&as_controller, None), Err(Improper::OfController));
    let a_persons = [
        Kind::ElectLeaders(Default::default()),
        Kind::CreateTopic(Default::default()),
        Kind::EmptyBroker(command::EmptyBroker { broker_id: 1, is_emptied: true }),
        Kind::RemoveBroker(command::RemoveBroker { broker_id: 1 }),
        Kind::NextProducerEpoch(Default::default()),
    ];
    for kind in a_persons {
        assert_eq!(SECOND.check(&propose(kind.clone()), None), Ok(()), "{kind:?}");
    }
}
