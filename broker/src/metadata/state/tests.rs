use super::super::name::NameError;
use super::producers::MAX_PRODUCER_EPOCHS;
use super::*;
use proptest::prelude::*;

pub(crate) fn id(n: u8) -> TopicId {
    TopicId::from_bytes([n; 16])
}

fn register(broker_id: i32) -> command::Command {
    Kind::RegisterBroker(command::RegisterBroker {
        broker_id,
        address: "127.0.0.1:9192".into(),
        ..command::RegisterBroker::default()
    })
    .into()
}

fn replicas(count: usize) -> Vec<command::Replicas> {
    vec![command::Replicas { brokers: vec![1] }; count]
}

fn create(name: &str, topic: u8, partitions: usize) -> command::Command {
    Kind::CreateTopic(command::CreateTopic {
        name: name.into(),
        topic_id: id(topic).to_wire(),
        partitions: replicas(partitions),
        ..command::CreateTopic::default()
    })
    .into()
}

fn delete(topic: u8) -> command::Command {
    Kind::DeleteTopic(command::DeleteTopic { topic_id: id(topic).to_wire() }).into()
}

fn add(topic: u8, from: u32, count: usize) -> command::Command {
    let topic_id = id(topic).to_wire();
    Kind::AddPartitions(command::AddPartitions { topic_id, from, partitions: replicas(count) }).into()
}

fn next_epoch(producer_id: i64, producer_epoch: i32) -> command::Command {
    Kind::NextProducerEpoch(command::NextProducerEpoch { producer_id, producer_epoch }).into()
}

fn allocate(count: u32) -> command::Command {
    Kind::AllocateProducerIds(command::AllocateProducerIds { broker_id: 1, count }).into()
}

/// A state with broker 1, and the commands after it applied.
fn state(commands: &[command::Command]) -> MetadataState {
    let mut state = MetadataState::new("cluster");
    for command in std::iter::once(&register(1)).chain(commands) {
        state.apply(state.index() + 1, command).expect("accepted");
    }
    state
}

fn refusal(state: &MetadataState, command: &command::Command) -> Refusal {
    let mut after = state.clone();
    let refusal = after.apply(state.index() + 1, command).expect_err("refused");
    assert_eq!(&after, state, "a refused command changed the state");
    refusal
}

fn check(state: &MetadataState) {
    assert_eq!(state.names.len(), state.topics.len());
    for (name, topic) in &state.topics {
        assert_eq!(&topic.name, name);
        assert_eq!(state.topic_by_id(&topic.id).map(|found| &found.name), Some(name));
        assert!(!topic.partitions.is_empty());
        for partition in &topic.partitions {
            assert!(partition.replicas.contains(&partition.leader) && partition.leader_epoch >= 0);
            assert!(partition.isr.iter().all(|broker| partition.replicas.contains(broker)));
        }
    }
    assert!(state.producer_epochs.len() <= MAX_PRODUCER_EPOCHS);
    for (id, (epoch, index)) in &*state.producer_epochs {
        assert!((0..state.next_producer_id).contains(id) && *epoch > 0 && *index <= state.index);
    }
}

#[test]
fn a_topic_made_again_is_another_topic() {
    let mut state = state(&[create("orders", 1, 3)]);
    assert_eq!(refusal(&state, &create("orders", 2, 1)), Refusal::TopicExists("orders".into()));
    assert_eq!(refusal(&state, &create("other", 1, 1)), Refusal::IdTaken(id(1)));
    assert_eq!(state.apply(9, &delete(1)), Ok(Outcome::TopicDeleted(id(1))));
    assert!(state.topic("orders").is_none() && state.topic_by_id(&id(1)).is_none());
    assert_eq!(state.apply(10, &create("orders", 2, 1)), Ok(Outcome::TopicCreated(id(2))));
    assert_eq!(state.topic("orders").map(|topic| (topic.id, topic.partitions.len())), Some((id(2), 1)));
    assert_eq!(refusal(&state, &delete(1)), Refusal::UnknownTopicId(id(1)));
    assert_eq!(state.index(), 10);
}

#[test]
fn every_start_of_a_broker_raises_the_epochs_it_leads() {
    let mut state = state(&[create("a", 1, 2)]);
    assert_eq!(state.apply(9, &register(1)), Ok(Outcome::BrokerRegistered { boots: 2 }));
    assert_eq!(state.apply(10, &register(2)), Ok(Outcome::BrokerRegistered { boots: 1 }));
    let epochs: Vec<i32> = state.topic("a").expect("there").partitions.iter().map(|p| p.leader_epoch).collect();
    assert_eq!(epochs, [1, 1]);
}

#[test]
fn refusals_say_what_is_wrong() {
    let state = state(&[create("a.b", 1, 2)]);
    assert!(matches!(refusal(&state, &create("a/b", 2, 1)), Refusal::Name(NameError::IllegalCharacter { .. })));
    assert!(matches!(refusal(&state, &create("__consumer_offsets", 2, 1)), Refusal::Name(NameError::Reserved(_))));
    assert_eq!(
        refusal(&state, &create("a_b", 2, 1)).to_string(),
        "topic a_b collides with a.b: Kafka keeps names apart that differ only by '.' and '_'"
    );
    assert_eq!(
        refusal(&state, &create("none", 2, 0)).to_string(),
        "topic none cannot have 0 partitions: it takes from 1 to 100000"
    );
    assert_eq!(
        refusal(&state, &add(1, 2, 0)).to_string(),
        "topic a.b cannot have 2 partitions: it has 2 already, and partitions are only ever added"
    );
    assert!(refusal(&state, &add(1, 1, 1)).to_string().contains("it has 2 by now, not 1"));
    let foreign = Kind::AddPartitions(command::AddPartitions {
        topic_id: id(1).to_wire(),
        from: 2,
        partitions: vec![command::Replicas { brokers: vec![1, 7] }],
    });
    assert_eq!(
        refusal(&state, &foreign.into()).to_string(),
        "partition a.b-2 cannot be kept on brokers [1, 7]: one never registered"
    );
    assert!(matches!(refusal(&state, &command::Command::default()), Refusal::Unknown(_)));
    let mut late = state.clone();
    assert_eq!(late.apply(2, &delete(1)), Err(Refusal::OutOfOrder { index: 2, applied: 2 }));
}

#[test]
fn producer_ids_start_above_what_an_import_found_and_are_given_once() {
    let import = |from: i64| -> command::Command {
        let topic = command::CreateTopic {
            name: "old".into(),
            topic_id: id(9).to_wire(),
            partitions: replicas(2),
            ..command::CreateTopic::default()
        };
        let topics = vec![command::ImportedTopic { topic: Some(topic), leader_epochs: vec![7] }];
        Kind::ImportTopics(command::ImportTopics { topics, producer_ids_from: from }).into()
    };
    let mut state = state(&[allocate(1000)]);
    assert_eq!(state.apply(5, &import(5000)), Ok(Outcome::TopicsImported { added: 1 }));
    assert_eq!(state.apply(6, &import(10)), Ok(Outcome::TopicsImported { added: 0 }), "taken over once");
    assert_eq!(state.apply(7, &allocate(10)), Ok(Outcome::ProducerIds { first: 5000, count: 10 }));
    assert_eq!(state.apply(8, &allocate(10)), Ok(Outcome::ProducerIds { first: 5010, count: 10 }));
    let epochs: Vec<i32> = state.topic("old").expect("there").partitions.iter().map(|p| p.leader_epoch).collect();
    assert_eq!(epochs, [7, 0]);
    assert_eq!(
        refusal(&state, &Kind::AllocateProducerIds(command::AllocateProducerIds { broker_id: 4, count: 1 }).into()),
        Refusal::UnknownBroker(4)
    );
}

#[test]
fn an_epoch_is_given_out_only_after_the_one_before() {
    let mut state = state(&[allocate(10)]);
    assert_eq!(refusal(&state, &next_epoch(10, 0)), Refusal::UnknownProducerId(10));
    assert_eq!(refusal(&state, &next_epoch(-1, 0)), Refusal::UnknownProducerId(-1));
    let unknown = |given, newest| Refusal::UnknownProducerEpoch { producer_id: 7, given, newest };
    assert_eq!(refusal(&state, &next_epoch(7, 1)), unknown(1, 0));
    assert_eq!(refusal(&state, &next_epoch(7, -1)), unknown(-1, 0));
    for (index, given, next) in [(11, 0, 1), (12, 1, 2), (13, 0, 2), (14, 1, 2)] {
        assert_eq!(state.apply(index, &next_epoch(7, given)), Ok(Outcome::ProducerEpoch(next)));
    }
    assert_eq!((state.producer_epoch(7), state.producer_epoch(8)), (2, 0));
    for given in 2..i16::MAX {
        assert_eq!(state.apply(state.index() + 1, &next_epoch(7, given.into())), Ok(Outcome::ProducerEpoch(given + 1)));
    }
    assert_eq!(refusal(&state, &next_epoch(7, i16::MAX.into())), Refusal::ProducerEpochsExhausted(7));
    let restored = MetadataState::from_snapshot(state.snapshot()).expect("its own snapshot");
    assert_eq!(restored, state);
}

#[test]
fn the_epochs_of_those_who_asked_the_longest_ago_are_forgotten_first() {
    let ids = MAX_PRODUCER_EPOCHS as i64 + 2;
    let mut state = state(&[allocate(ids as u32)]);
    let again = |state: &mut MetadataState, id, given| {
        assert_eq!(
            state.apply(state.index() + 1, &next_epoch(id, given)),
            Ok(Outcome::ProducerEpoch(given as i16 + 1))
        );
    };
    (0..ids - 2).for_each(|id| again(&mut state, id, 0));
    again(&mut state, 0, 1);
    (ids - 2..ids).for_each(|id| again(&mut state, id, 0));
    check(&state);
    assert_eq!([0, 1, 2, 3, ids - 1].map(|id| state.producer_epoch(id)), [2, 0, 0, 1, 1]);
}

#[test]
fn a_snapshot_that_breaks_an_invariant_is_refused() {
    let good = state(&[create("a", 1, 1), allocate(10), next_epoch(3, 0)]).snapshot();
    let broken: [fn(&mut command::Snapshot); 8] = [
        |s| s.topics.push(s.topics[0].clone()),
        |s| s.topics[0].topic_id = vec![1].into(),
        |s| s.topics[0].partitions[0].leader = 3,
        |s| s.brokers.clear(),
        |s| s.next_producer_id = -1,
        |s| s.producer_epochs[0].epoch = 0,
        |s| s.producer_epochs[0].epoch = 1 << 15,
        |s| s.producer_epochs[0].producer_id = 10,
    ];
    for breaking in broken {
        let mut snapshot = good.clone();
        breaking(&mut snapshot);
        assert!(MetadataState::from_snapshot(snapshot).is_err());
    }
    assert!(MetadataState::from_snapshot(good).is_ok());
}

fn any_command() -> impl Strategy<Value = command::Command> {
    let name = prop::sample::select(vec!["a", "b.c", "b_c", "d", ""]);
    prop_oneof![
        2 => (1..3i32).prop_map(register),
        6 => (name, 0..6u8, 0..4usize).prop_map(|(name, topic, partitions)| create(name, topic, partitions)),
        3 => (0..6u8).prop_map(delete),
        3 => (0..6u8, 0..5u32, 0..3usize).prop_map(|(topic, from, count)| add(topic, from, count)),
        2 => (0..2000u32).prop_map(allocate),
        3 => (-1..4i64, -1..3i32).prop_map(|(id, given)| next_epoch(id, given)),
        1 => (0..6u8).prop_map(|topic| {
            let config = TopicValues::from([("flush.ms".to_owned(), "5".to_owned())]);
            Kind::AlterTopic(command::AlterTopic { topic_id: id(topic).to_wire(), config }).into()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_commands_keep_the_invariants_and_any_snapshot_continues_the_same(
        commands in prop::collection::vec(any_command(), 1..60),
        cut in 0..60usize,
    ) {
        let mut state = state(&[]);
        let mut restored: Option<MetadataState> = None;
        for (n, command) in commands.iter().enumerate() {
            if n == cut {
                restored = Some(MetadataState::from_snapshot(state.snapshot()).expect("its own snapshot"));
            }
            let before = state.clone();
            let index = state.index() + 1;
            let outcome = state.apply(index, command);
            check(&state);
            prop_assert!(state.next_producer_id() >= before.next_producer_id());
            prop_assert!((0..4).all(|id| state.producer_epoch(id) >= before.producer_epoch(id)));
            for topic in before.topics() {
                let Some(now) = state.topic_by_id(&topic.id) else { continue };
                prop_assert!(now.partitions.len() >= topic.partitions.len());
                for (old, new) in topic.partitions.iter().zip(&now.partitions) {
                    prop_assert!(new.leader_epoch >= old.leader_epoch);
                }
            }
            if outcome.is_err() {
                prop_assert_eq!(&state, &before);
            }
            if let Some(restored) = &mut restored {
                prop_assert_eq!(restored.apply(index, command), outcome);
            }
        }
        if let Some(restored) = restored {
            prop_assert_eq!(restored, state);
        }
    }
}
