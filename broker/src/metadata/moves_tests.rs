use super::super::command::{self, Replicas, command::Command as Kind};
use super::*;
use proptest::prelude::*;

/// Brokers 1, 2, ... in these racks: those that are not active are fenced.
fn brokers(racks: &[(&str, bool)]) -> MetadataState {
    let mut state = MetadataState::new("cluster");
    for ((rack, is_active), broker_id) in racks.iter().zip(1..) {
        let incarnation: bytes::Bytes = vec![broker_id as u8; 16].into();
        let (boots, rack) = (u64::from(!is_active), (*rack).to_owned());
        let register =
            command::RegisterBroker { broker_id, rack, boots, incarnation, ..command::RegisterBroker::default() };
        state.apply(state.index() + 1, &Kind::RegisterBroker(register).into()).expect("accepted");
    }
    state
}

fn create(state: &mut MetadataState, id: u8, partitions: &[Vec<i32>]) {
    let create = command::CreateTopic {
        name: format!("topic-{id}"),
        topic_id: TopicId::from_bytes([id; 16]).to_wire(),
        partitions: partitions.iter().map(|brokers| Replicas { brokers: brokers.clone() }).collect(),
        ..command::CreateTopic::default()
    };
    state.apply(state.index() + 1, &Kind::CreateTopic(create).into()).expect("accepted");
}

/// Who keeps what after the moves.
fn after(state: &MetadataState, moves: &[Move]) -> Vec<Vec<i32>> {
    let mut kept: BTreeMap<(TopicId, u32), Vec<i32>> = BTreeMap::new();
    for topic in state.topics() {
        for (partition, number) in topic.partitions.iter().zip(0..) {
            kept.insert((topic.id, number), partition.replicas.clone());
        }
    }
    for moved in moves {
        let before = kept.insert((moved.topic_id, moved.partition), moved.to.clone());
        assert_eq!(before.as_ref(), Some(&moved.from));
        assert_ne!(moved.from, moved.to);
    }
    kept.into_values().collect()
}

fn counts(brokers: i32, kept: &[Vec<i32>], counts: impl Fn(&[i32], i32) -> bool) -> Vec<usize> {
    (1..=brokers).map(|broker| kept.iter().filter(|replicas| counts(replicas, broker)).count()).collect()
}

fn keeps(replicas: &[i32], broker: i32) -> bool {
    replicas.contains(&broker)
}

fn leads(replicas: &[i32], broker: i32) -> bool {
    replicas.first() == Some(&broker)
}

fn copies(moves: &[Move]) -> usize {
    moves.iter().flat_map(|moved| moved.to.iter().filter(|broker| !moved.from.contains(broker))).count()
}

fn spread(counts: &[usize]) -> usize {
    counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0)
}

#[test]
fn a_broker_that_came_new_is_given_its_share_and_no_more() {
    let mut state = brokers(&[("", true); 3]);
    create(&mut state, 1, &vec![vec![1, 2]; 6]);
    let moves = rebalance(&state);
    let kept = after(&state, &moves);
    assert_eq!(counts(3, &kept, keeps), [4, 4, 4]);
    assert_eq!(counts(3, &kept, leads), [2, 2, 2]);
    assert_eq!(copies(&moves), 4);
}

#[test]
fn leaderships_are_evened_along_a_chain_and_nothing_is_copied() {
    let mut state = brokers(&[("", true); 3]);
    // 1 leads three, 3 leads none, and only by way of 2 can that change.
    create(&mut state, 1, &[vec![1, 2], vec![1, 2], vec![1, 2], vec![2, 3], vec![2, 3], vec![3, 2]]);
    let kept = after(&state, &rebalance(&state));
    assert_eq!(counts(3, &kept, leads), [2, 2, 2]);
    let mut state = brokers(&[("", true); 3]);
    create(&mut state, 1, &[vec![1, 2, 3], vec![1, 2, 3], vec![1, 2, 3]]);
    let moves = rebalance(&state);
    assert_eq!((copies(&moves), counts(3, &after(&state, &moves), leads)), (0, vec![1, 1, 1]));
}

#[test]
fn a_partition_leaves_a_rack_that_it_is_in_twice() {
    let mut state = brokers(&[("a", true), ("a", true), ("b", true)]);
    create(&mut state, 1, &[vec![1, 2]]);
    let kept = after(&state, &rebalance(&state));
    assert!(kept[0].contains(&3), "{kept:?}");
}

#[test]
fn what_a_stopped_broker_keeps_stays() {
    let mut state = brokers(&[("", true), ("", true), ("", false)]);
    create(&mut state, 1, &[vec![3, 1], vec![3, 1], vec![1, 2]]);
    for replicas in after(&state, &rebalance(&state)).iter().take(2) {
        assert!(replicas.contains(&3));
    }
}

#[test]
fn what_moves_already_counts_where_it_goes_and_is_left_alone() {
    let mut state = brokers(&[("", true); 2]);
    create(&mut state, 1, &[vec![1], vec![1]]);
    let (topic_id, replicas) = (TopicId::from_bytes([1; 16]).to_wire(), vec![2]);
    let reassign = command::Reassign { topic_id, partition: 0, replicas, throttle_bytes_per_second: 0 };
    state.apply(state.index() + 1, &Kind::Reassign(reassign).into()).expect("accepted");
    assert_eq!(rebalance(&state), []);
    let drained = drain(&state, 1).expect("planned");
    assert_eq!(drained.iter().map(|moved| moved.partition).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_drained_broker_keeps_and_leads_nothing() {
    let mut state = brokers(&[("a", true), ("b", true), ("a", true), ("b", true)]);
    create(&mut state, 1, &[vec![1, 2], vec![2, 1], vec![3, 4], vec![1, 4], vec![4, 3]]);
    let moves = drain(&state, 1).expect("planned");
    assert_eq!(copies(&moves), 3, "nothing else moves");
    let kept = after(&state, &moves);
    assert_eq!(counts(4, &kept, keeps)[0], 0);
    assert!(kept.iter().all(|replicas| replicas.len() == 2));
    let is_in = |rack: [i32; 2], replicas: &Vec<i32>| replicas.iter().any(|broker| rack.contains(broker));
    assert!(kept.iter().all(|replicas| is_in([1, 3], replicas) && is_in([2, 4], replicas)), "{kept:?}");
}

#[test]
fn a_broker_whose_partitions_nobody_else_can_take_is_not_drained() {
    let mut state = brokers(&[("", true); 3]);
    create(&mut state, 1, &[vec![1, 2, 3]]);
    let told = drain(&state, 3).expect_err("refused").to_string();
    assert!(told.contains("topic-1-0") && told.contains("no other broker is active"), "{told}");
    assert!(drain(&state, 9).expect_err("refused").to_string().contains("broker 9 is not registered"));
}

/// Partitions on so many brokers, each on some of them.
fn any_partitions(brokers: i32) -> impl Strategy<Value = Vec<Vec<i32>>> {
    let all: Vec<i32> = (1..=brokers).collect();
    let most = all.len().min(3);
    prop::collection::vec(prop::sample::subsequence(all, 1..=most).prop_shuffle(), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn shares_become_even_with_as_few_copies_as_that_takes(
        (brokers_count, partitions) in (2..6i32).prop_flat_map(|brokers| (Just(brokers), any_partitions(brokers)))
    ) {
        let mut state = brokers(&vec![("", true); brokers_count as usize]);
        create(&mut state, 1, &partitions);
        let moves = rebalance(&state);
        let kept = after(&state, &moves);
        for (before, after) in partitions.iter().zip(&kept) {
            prop_assert_eq!(before.len(), after.len());
            prop_assert_eq!(after.iter().collect::<BTreeSet<_>>().len(), after.len());
        }
        let shares = counts(brokers_count, &kept, keeps);
        prop_assert!(spread(&shares) <= 1, "{:?}", shares);
        // The fullest keep the odd ones.
        let mut had = counts(brokers_count, &partitions, keeps);
        had.sort_unstable_by(|a, b| b.cmp(a));
        let (total, brokers) = (had.iter().sum::<usize>(), had.len());
        let share = |place: usize| total / brokers + usize::from(place < total % brokers);
        let needed: usize = had.iter().enumerate().map(|(place, had)| had.saturating_sub(share(place))).sum();
        prop_assert_eq!(copies(&moves), needed);
        let led = |kept: &[Vec<i32>]| spread(&counts(brokers_count, kept, leads));
        if partitions.iter().all(|replicas| replicas.len() as i32 == brokers_count) {
            prop_assert!(led(&kept) <= 1);
        }
        // Nobody leads two more than another one who could lead one of those.
        let leaders = counts(brokers_count, &kept, leads);
        for replicas in &kept {
            for other in replicas.iter().skip(1) {
                prop_assert!(leaders[replicas[0] as usize - 1] <= leaders[*other as usize - 1] + 1);
            }
        }
        let mut again = brokers_of(brokers_count);
        create(&mut again, 1, &kept);
        prop_assert_eq!(rebalance(&again), vec![], "what is even stays");
    }

    #[test]
    fn racks_are_spread_and_stay_so(
        racks in prop::collection::vec(0..3usize, 3..7),
        partitions in any_partitions(3),
    ) {
        let names = ["a", "b", "c"];
        let racks: Vec<(&str, bool)> = racks.iter().map(|rack| (names[*rack], true)).collect();
        let mut state = brokers(&racks);
        create(&mut state, 1, &partitions);
        let all: BTreeSet<&str> = racks.iter().map(|(rack, _)| *rack).collect();
        for replicas in after(&state, &rebalance(&state)) {
            let in_racks: BTreeSet<&str> = replicas.iter().map(|broker| racks[*broker as usize - 1].0).collect();
            prop_assert_eq!(in_racks.len(), replicas.len().min(all.len()));
        }
    }
}

fn brokers_of(count: i32) -> MetadataState {
    brokers(&vec![("", true); count as usize])
}
