use super::*;
use crate::metadata::command::{self, command::Command as Kind};

fn id(n: u8) -> TopicId {
    TopicId::from_bytes([n; 16])
}

/// Brokers 1 and 2, and what `commands` made of it.
fn state(commands: Vec<Kind>) -> MetadataState {
    let mut state = MetadataState::new("cluster");
    let register = |broker_id: i32| {
        let incarnation = vec![broker_id as u8; 16].into();
        let address = format!("127.0.0.1:{broker_id}");
        Kind::RegisterBroker(command::RegisterBroker { broker_id, address, incarnation, ..Default::default() })
    };
    apply(&mut state, vec![register(1), register(2)]);
    apply(&mut state, commands);
    state
}

fn apply(state: &mut MetadataState, commands: Vec<Kind>) {
    for command in commands {
        state.apply(state.index() + 1, &command.into()).expect("accepted");
    }
}

fn create(topic: u8, partitions: usize) -> Kind {
    let replicas = command::Replicas { brokers: vec![1] };
    Kind::CreateTopic(command::CreateTopic {
        name: format!("topic-{topic}"),
        topic_id: id(topic).to_wire(),
        partitions: vec![replicas; partitions],
        ..Default::default()
    })
}

fn add(topic: u8, from: u32) -> Kind {
    let partitions = vec![command::Replicas { brokers: vec![1] }];
    Kind::AddPartitions(command::AddPartitions { topic_id: id(topic).to_wire(), from, partitions })
}

fn watching(topics: &[u8]) -> Told {
    let mut told = Told::default();
    let add_topic_ids = topics.iter().map(|topic| id(*topic).to_wire()).collect();
    assert!(told.watch(&WatchRequest { add_topic_ids, ..WatchRequest::default() }).is_ok());
    told
}

fn brokers(count: i32) -> Vec<BrokerNode> {
    (1..=count).map(|broker_id| BrokerNode { broker_id, ..BrokerNode::default() }).collect()
}

/// Of a topic its first byte, and the partitions named.
type Named = (u8, Vec<u32>);

/// Of each update: how many brokers, and the topics.
fn said(updates: &[WatchUpdate]) -> Vec<(usize, Vec<Named>)> {
    let topic = |topic: &TopicLeaders| {
        (topic.topic_id[0], topic.partitions.iter().map(|partition| partition.partition).collect::<Vec<_>>())
    };
    updates.iter().map(|update| (update.brokers.len(), update.topics.iter().map(topic).collect())).collect()
}

#[test]
fn what_is_new_is_said_once_and_of_watched_topics_alone() {
    let mut state = state(vec![create(1, 2), create(2, 1)]);
    let mut told = watching(&[1]);
    let first = told.news(&state, brokers(2));
    assert_eq!(said(&first), [(2, vec![(1, vec![0, 1])])], "everything, at first");
    assert_eq!(first[0].version, state.index());
    assert!(told.news(&state, brokers(2)).is_empty());

    apply(&mut state, vec![add(2, 1), add(1, 2)]);
    let next = told.news(&state, brokers(2));
    assert_eq!(said(&next), [(0, vec![(1, vec![2])])]);
    assert_eq!(next[0].topics[0].partition_count, 3);
    assert_eq!(said(&told.news(&state, brokers(3))), [(3, vec![])], "another broker");

    apply(&mut state, vec![Kind::DeleteTopic(command::DeleteTopic { topic_id: id(1).to_wire() })]);
    let last = told.news(&state, brokers(3));
    assert!(last[0].topics[0].deleted, "{last:?}");
    assert!(told.news(&state, brokers(3)).is_empty() && told.topics.is_empty());
}

/// It may have been created elsewhere a moment ago.
#[test]
fn a_topic_that_is_not_known_is_not_said_to_be_gone_before_it_is_certain() {
    let mut state = state(vec![create(1, 1)]);
    let mut told = watching(&[1, 2]);
    assert_eq!(said(&told.news(&state, Vec::new())), [(0, vec![(1, vec![0])])]);
    assert!(told.is_unsure());
    told.look();
    assert!(!told.is_unsure() && told.news(&state, Vec::new()).is_empty());
    told.looked(false);
    assert!(told.is_unsure() && told.news(&state, Vec::new()).is_empty(), "nobody could say");
    told.look();
    let add_topic_ids = vec![id(3).to_wire()];
    assert!(told.watch(&WatchRequest { add_topic_ids, ..WatchRequest::default() }).is_ok());
    apply(&mut state, vec![create(2, 1)]);
    told.looked(true);
    assert_eq!(said(&told.news(&state, Vec::new())), [(0, vec![(2, vec![0])])], "it was there");
    assert!(told.is_unsure(), "the other one was asked for later");
    told.look();
    told.looked(true);
    let gone = told.news(&state, Vec::new());
    assert!(gone[0].topics[0].deleted && gone[0].topics[0].topic_id == id(3).to_wire(), "{gone:?}");
}

#[test]
fn another_leader_is_said_and_a_change_of_anything_else_is_not() {
    let mut state = state(vec![create(1, 2)]);
    let mut told = watching(&[1]);
    told.news(&state, Vec::new());
    let config = [("retention.ms".to_owned(), "5".to_owned())].into_iter().collect();
    apply(&mut state, vec![Kind::AlterTopic(command::AlterTopic { topic_id: id(1).to_wire(), config })]);
    assert!(told.news(&state, Vec::new()).is_empty(), "its settings");
    // The next start of the broker ends what it led before.
    let register = command::RegisterBroker { broker_id: 1, incarnation: vec![9; 16].into(), ..Default::default() };
    apply(&mut state, vec![Kind::RegisterBroker(register)]);
    let next = told.news(&state, Vec::new());
    let of = state.topic_by_id(&id(1)).expect("it is there");
    let expected: Vec<_> = of.partitions.iter().map(|partition| (partition.leader, partition.leader_epoch)).collect();
    let leaders: Vec<_> = next[0].topics[0].partitions.iter().map(|p| (p.leader, p.leader_epoch)).collect();
    assert_eq!(leaders, expected);
}

#[test]
fn many_partitions_take_several_frames_and_none_is_left_out() {
    let state = state(vec![create(1, PARTITIONS_PER_FRAME - 1), create(2, 3)]);
    let updates = watching(&[1, 2]).news(&state, Vec::new());
    assert_eq!(updates.len(), 2);
    let named: usize = updates.iter().flat_map(|update| &update.topics).map(|topic| topic.partitions.len()).sum();
    assert_eq!(named, PARTITIONS_PER_FRAME + 2);
    assert!(updates.iter().all(|update| {
        update.topics.iter().map(|topic| topic.partitions.len()).sum::<usize>() <= PARTITIONS_PER_FRAME
    }));
}

#[test]
fn a_topic_that_is_asked_for_again_is_told_anew_and_a_bad_id_is_refused() {
    let state = state(vec![create(1, 1)]);
    let mut told = watching(&[1]);
    told.news(&state, Vec::new());
    let again = WatchRequest { add_topic_ids: vec![id(1).to_wire()], ..WatchRequest::default() };
    assert!(told.watch(&again).is_ok());
    assert_eq!(said(&told.news(&state, Vec::new())), [(0, vec![(1, vec![0])])]);
    let bad = WatchRequest { add_topic_ids: vec![vec![1].into()], ..WatchRequest::default() };
    assert!(matches!(told.watch(&bad), Err(StreamError::Refused(ErrorCode::InvalidRequest, _))));
}
