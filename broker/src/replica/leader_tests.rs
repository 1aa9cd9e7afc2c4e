use super::history::{History, Verdict};
use super::leader::{AlterPartition, Altered, Assigned, Effect, HelloRefusal, LeaderState, LocalLog, Settings, View};
use super::{Hello, Member, Report, Tenure};
use crate::error::PartitionError;
use crate::topic_config::TopicDurability::{self, Flushed, Replicated};
use headwater_proto::ErrorCode;
use headwater_proto::wire::Acks;
use headwater_storage::epochs::EpochEntry;
use uuid::Uuid;

const EPOCH: i32 = 5;
const TENURE: Tenure = Tenure { leader_epoch: EPOCH, generation: 0 };
const LAG_MS: u64 = 1000;

fn member(broker: i32) -> Member {
    Member { broker, incarnation: Uuid::from_u128(100 + broker as u128) }
}

fn settings(min_insync_replicas: u32, durability: TopicDurability) -> Settings {
    Settings { min_insync_replicas, durability, lag_time_max_ms: LAG_MS }
}

/// Partition 1, 2, 3, led by 1, with these in sync.
fn view(partition_epoch: i32, isr: &[i32]) -> View {
    let assigned = |broker| Assigned { member: member(broker), active: true, in_sync: isr.contains(&broker) };
    let replicas = [1, 2, 3].map(assigned).to_vec();
    let (index, min_insync_replicas) = (partition_epoch as u64, None);
    View { index, leader: Some(member(1)), leader_epoch: EPOCH, partition_epoch, min_insync_replicas, replicas }
}

/// A broker in an incarnation that is nobody's.
fn nobody(broker: i32) -> Member {
    Member { broker, incarnation: Uuid::nil() }
}

/// Epoch 1 up to 10, and nothing of this epoch yet.
fn history(log_end: i64) -> History {
    let epochs = [(1, 0), (EPOCH, 10)].map(|(epoch, start_offset)| EpochEntry { epoch, start_offset });
    History::new(epochs.into_iter().filter(|entry| entry.start_offset <= log_end).collect(), 0, log_end).unwrap()
}

fn leader_of(isr: &[i32], min_isr: u32, durability: TopicDurability) -> LeaderState {
    let log = LocalLog { log_end: 10, flushed: 10, high_watermark: 4, generation: 0 };
    LeaderState::lead(member(1), &view(7, isr), log, settings(min_isr, durability), true, 0)
}

fn leader(isr: &[i32]) -> LeaderState {
    leader_of(isr, 2, Flushed)
}

fn hello(state: &mut LeaderState, broker: i32, log_end: i64, now_ms: i64) {
    let hello = Hello { member: member(broker), tenure: TENURE, history: history(log_end) };
    assert_eq!(state.hello(&hello, &history(10), now_ms), Ok(Verdict::Agrees));
}

fn report(state: &mut LeaderState, broker: i32, received: i64, flushed: i64, now_ms: i64) -> bool {
    state.report(Report { member: member(broker), tenure: TENURE, received, flushed, log_start: Some(0) }, now_ms)
}

fn append(state: &mut LeaderState, end: i64, now_ms: i64) {
    state.written(TENURE, end, now_ms);
    state.flushed(TENURE, end, now_ms);
}

fn proposed(state: &mut LeaderState) -> Vec<(i32, Vec<i32>)> {
    let effects = state.take_effects();
    let proposals = effects.into_iter().filter_map(|effect| match effect {
        Effect::Propose(AlterPartition { partition_epoch, isr, .. }) => {
            Some((partition_epoch, isr.iter().map(|member| member.broker).collect()))
        }
        _ => None,
    });
    proposals.collect()
}

fn all_follow(state: &mut LeaderState) {
    for broker in [2, 3] {
        hello(state, broker, 10, 0);
        report(state, broker, 10, 10, 0);
    }
}

#[test]
fn the_high_watermark_is_the_least_flushed_offset_of_the_isr() {
    let mut state = leader(&[1, 2, 3]);
    append(&mut state, 20, 0);
    assert_eq!(state.high_watermark(), 4, "nobody has reported yet");
    hello(&mut state, 2, 10, 0);
    hello(&mut state, 3, 10, 0);
    report(&mut state, 2, 20, 15, 0);
    assert_eq!(state.high_watermark(), 4);
    assert!(!state.serves_offsets());
    report(&mut state, 3, 12, 12, 0);
    assert_eq!(state.high_watermark(), 12);
    assert!(state.serves_offsets());
    report(&mut state, 3, 20, 20, 0);
    assert_eq!(state.high_watermark(), 15, "what 2 received counts only once it is flushed");
    let moved: Vec<Effect> = state.take_effects();
    assert_eq!(moved, [Effect::HighWatermark(12), Effect::HighWatermark(15)]);
}

/// An election would bring back what was deleted.
#[test]
fn who_still_has_what_was_deleted_is_waited_for_and_comes_not_in_sync() {
    let said =
        |broker, log_start| Report { member: member(broker), tenure: TENURE, received: 10, flushed: 10, log_start };
    let mut state = leader(&[1, 2, 3]);
    assert_eq!(state.kept_start(), i64::MIN, "nobody has said anything");
    all_follow(&mut state);
    assert_eq!(state.kept_start(), 0);
    state.begins_at(7, 0);
    for (broker, log_start, kept) in [(2, 7, 0), (3, 5, 5), (3, 9, 7), (2, 3, 7)] {
        state.report(said(broker, Some(log_start)), 0);
        assert_eq!(state.kept_start(), kept);
    }

    // While too few are in sync others are eligible, who are not heard of.
    let mut state = leader(&[1]);
    state.begins_at(7, 0);
    assert_eq!(state.kept_start(), i64::MIN);
    let check = |isr: &[i32]| View { min_insync_replicas: Some(2), ..view(7, isr) }.check_in_sync();
    assert!(matches!(check(&[1]), Err(PartitionError::NotEnoughReplicas { in_sync: 1, needed: 2 })));
    assert!(check(&[1, 2]).is_ok());
    assert_eq!(leader_of(&[1], 1, Flushed).kept_start(), i64::MAX, "nobody else can lead");

    let mut state = leader(&[1, 2]);
    state.begins_at(7, 0);
    all_follow(&mut state);
    assert_eq!((state.kept_start(), proposed(&mut state)), (0, vec![]));
    state.report(said(3, Some(6)), 0);
    assert_eq!(proposed(&mut state), []);
    state.report(said(3, Some(7)), 0);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
    state.report(said(2, Some(8)), 0);
    assert_eq!(state.kept_start(), 7, "who is proposed may be in sync already");

    // A build that does not say where its log begins: nobody waits for it.
    let mut state = leader(&[1, 2]);
    for broker in [2, 3] {
        hello(&mut state, broker, 10, 0);
    }
    state.begins_at(7, 0);
    assert_eq!(state.kept_start(), i64::MIN);
    for broker in [2, 3] {
        state.report(said(broker, None), 0);
    }
    assert_eq!((state.kept_start(), proposed(&mut state)), (i64::MAX, vec![(7, vec![1, 2, 3])]));
}

#[test]
fn what_was_received_counts_where_the_topic_is_replicated() {
    let mut state = leader_of(&[1, 2, 3], 2, Replicated);
    state.written(TENURE, 20, 0);
    hello(&mut state, 2, 10, 0);
    hello(&mut state, 3, 10, 0);
    report(&mut state, 2, 20, 0, 0);
    report(&mut state, 3, 18, 0, 0);
    assert_eq!(state.high_watermark(), 18);
}

#[test]
fn the_leaders_own_flush_counts_like_any_other() {
    let mut state = leader(&[1, 2, 3]);
    all_follow(&mut state);
    state.written(TENURE, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    report(&mut state, 3, 20, 20, 0);
    assert_eq!(state.high_watermark(), 10);
    state.flushed(TENURE, 20, 0);
    assert_eq!(state.high_watermark(), 20);
}

/// The setting was raised before a follower left, which stays eligible by it, and the leader hears of the ISR first.
#[test]
fn min_insync_replicas_counts_as_of_the_view_that_says_the_isr() {
    let mut state = leader_of(&[1, 2], 1, Flushed);
    let raised = View { min_insync_replicas: Some(2), ..view(8, &[1]) };
    state.altered(7, Altered::Committed(raised), 0);
    assert_eq!((state.high_watermark(), state.min_insync_replicas()), (4, 2));
    assert!(state.admit(Acks::All).is_err());
    state.configure(settings(1, Flushed), 0);
    assert_eq!(state.high_watermark(), 4, "settings that come late are not newer");
    state.view(&View { min_insync_replicas: Some(1), ..view(9, &[1]) }, 0);
    assert_eq!(state.high_watermark(), 10);
}

#[test]
fn the_high_watermark_stays_while_the_isr_is_below_min_insync_replicas() {
    let mut state = leader(&[1]);
    append(&mut state, 20, 0);
    assert_eq!(state.high_watermark(), 4);
    let refused = state.admit(Acks::All).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::NotEnoughReplicas);
    assert!(refused.to_string().contains("1 of 2"), "{refused}");
    assert!(state.admit(Acks::Leader).is_ok());
    hello(&mut state, 2, 10, 0);
    report(&mut state, 2, 20, 20, 0);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])]);
    assert_eq!(state.high_watermark(), 4, "a proposal makes nobody in sync");
    state.altered(7, Altered::Committed(view(8, &[1, 2])), 0);
    assert_eq!(state.high_watermark(), 20);
    assert!(state.admit(Acks::All).is_ok());
}

#[test]
fn a_single_replica_is_read_though_its_topic_asks_for_two() {
    let log = LocalLog { log_end: 0, flushed: 0, high_watermark: 0, generation: 0 };
    let alone = View::alone(nobody(1), EPOCH);
    let mut state = LeaderState::lead(nobody(1), &alone, log, settings(2, Flushed), true, 0);
    append(&mut state, 3, 0);
    assert_eq!(state.high_watermark(), 3);
    assert!(state.admit(Acks::All).is_err());
}

#[test]
fn a_follower_joins_at_the_high_watermark_and_the_start_of_the_epoch() {
    let mut state = leader(&[1, 2]);
    hello(&mut state, 2, 10, 0);
    hello(&mut state, 3, 8, 0);
    report(&mut state, 3, 8, 8, 0);
    assert_eq!(proposed(&mut state), [], "above the high watermark of 4, but below the start of the epoch");
    append(&mut state, 20, 0);
    report(&mut state, 2, 15, 15, 0);
    assert_eq!(state.high_watermark(), 15);
    report(&mut state, 3, 20, 14, 0);
    assert_eq!(proposed(&mut state), [], "what it received is no offset that counts");
    report(&mut state, 3, 20, 15, 0);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
}

#[test]
fn a_follower_that_is_not_active_does_not_join() {
    let mut state = leader(&[1, 2]);
    let mut fenced = view(7, &[1, 2]);
    fenced.replicas[2].active = false;
    state.view(&fenced, 0);
    all_follow(&mut state);
    assert_eq!(proposed(&mut state), []);
    state.view(&view(7, &[1, 2]), 0);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
}

#[test]
fn a_follower_leaves_once_its_oldest_unreported_batch_is_too_old() {
    let mut state = leader(&[1, 2, 3]);
    all_follow(&mut state);
    append(&mut state, 12, 500);
    append(&mut state, 14, 900);
    report(&mut state, 2, 14, 14, 1000);
    report(&mut state, 3, 12, 12, 1400);
    assert_eq!(state.deadline_ms(), Some(1901));
    state.tick(1900);
    assert_eq!(proposed(&mut state), []);
    state.tick(1901);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])]);
    assert_eq!(state.high_watermark(), 12, "it counts until the change is committed");
    state.view(&view(8, &[1, 2]), 1950);
    assert_eq!(state.high_watermark(), 14);
    assert_eq!(state.deadline_ms(), None);
    // An idle follower never leaves.
    state.tick(1_000_000);
    assert_eq!(proposed(&mut state), []);
}

#[test]
fn a_follower_that_never_comes_leaves_though_nothing_is_appended() {
    let mut state = leader(&[1, 2, 3]);
    hello(&mut state, 2, 10, 0);
    report(&mut state, 2, 10, 10, 0);
    state.tick(1001);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])]);
}

#[test]
fn a_follower_that_joins_below_the_logs_end_and_stands_still_leaves_though_nothing_is_appended() {
    let mut state = leader(&[1]);
    append(&mut state, 20, 0);
    hello(&mut state, 2, 10, 10);
    report(&mut state, 2, 10, 10, 10);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])]);
    state.view(&view(8, &[1, 2]), 100);
    assert_eq!(state.high_watermark(), 10);
    assert_eq!(state.deadline_ms(), Some(1101));
    state.tick(1101);
    assert_eq!(proposed(&mut state), [(8, vec![1])]);
}

#[test]
fn a_proposed_member_holds_the_high_watermark() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
    append(&mut state, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    assert_eq!(state.high_watermark(), 10, "3 may be in sync already");
    report(&mut state, 3, 17, 17, 0);
    assert_eq!(state.high_watermark(), 17);
}

#[test]
fn a_proposal_left_unknown_counts_until_a_later_partition_epoch() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
    state.altered(7, Altered::Unknown, 0);
    append(&mut state, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    assert_eq!(state.high_watermark(), 10);
    // It is tried again, and refused this time: the first may be committed all the same.
    state.tick(99);
    assert_eq!(proposed(&mut state), []);
    state.tick(100);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
    state.altered(7, Altered::Refused, 100);
    assert_eq!(state.high_watermark(), 10);
    state.view(&view(8, &[1, 2]), 100);
    assert_eq!(state.high_watermark(), 20);
}

#[test]
fn a_proposal_left_unknown_does_not_hold_the_high_watermark_when_whom_it_names_is_gone() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2, 3])]);
    state.altered(7, Altered::Unknown, 0);
    append(&mut state, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    let mut gone = view(7, &[1, 2]);
    gone.replicas[2].active = false;
    state.view(&gone, 50);
    assert_eq!(state.high_watermark(), 10, "it may be in sync all the same");
    state.tick(100);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])], "what is committed ends the doubt");
    state.altered(7, Altered::Committed(view(8, &[1, 2])), 100);
    assert_eq!(state.high_watermark(), 20);
    state.tick(1000);
    assert_eq!(proposed(&mut state), [], "and once is enough");
}

#[test]
fn a_proposal_that_names_a_dead_incarnation_counts_no_more() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    state.altered(7, Altered::Unknown, 0);
    append(&mut state, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    assert_eq!(state.high_watermark(), 10);
    let mut restarted = view(7, &[1, 2]);
    restarted.replicas[2].member.incarnation = Uuid::from_u128(999);
    state.view(&restarted, 0);
    assert_eq!(state.high_watermark(), 20);
}

/// The answer to a proposal came later than the metadata of a broker's next start, and brought its old incarnation back: the new one
/// never joined.
#[test]
fn an_older_view_of_the_same_partition_epoch_changes_nothing() {
    let mut state = leader(&[1, 2]);
    let restarted = Member { incarnation: Uuid::from_u128(999), ..member(3) };
    let mut newer = view(7, &[1, 2]);
    newer.index = 9;
    newer.replicas[2].member = restarted;
    state.view(&newer, 0);
    state.altered(7, Altered::Committed(View { index: 8, ..view(7, &[1, 2]) }), 0);
    let hello = Hello { member: restarted, tenure: TENURE, history: history(10) };
    assert_eq!(state.hello(&hello, &history(10), 0), Ok(Verdict::Agrees));
}

#[test]
fn one_proposal_at_a_time_and_a_refused_one_is_made_again_later() {
    let mut state = leader(&[1, 2, 3]);
    all_follow(&mut state);
    append(&mut state, 20, 0);
    report(&mut state, 2, 20, 20, 0);
    state.tick(1001);
    assert_eq!(proposed(&mut state), [(7, vec![1, 2])]);
    report(&mut state, 3, 20, 20, 1002);
    state.tick(3000);
    assert_eq!(proposed(&mut state), []);
    state.altered(7, Altered::Refused, 3000);
    assert_eq!(state.deadline_ms(), Some(3100));
    state.tick(3100);
    assert_eq!(proposed(&mut state), [], "it has caught up meanwhile");
    assert_eq!(state.high_watermark(), 20);
}

#[test]
fn the_committed_isr_counts_whatever_was_proposed() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    append(&mut state, 20, 0);
    report(&mut state, 3, 20, 20, 0);
    // The controller fenced 2 at the same time.
    state.view(&view(8, &[1]), 0);
    assert_eq!(state.isr(), [member(1)]);
    assert_eq!(state.high_watermark(), 10);
    // An answer to what is no longer on its way changes nothing.
    state.altered(7, Altered::Unknown, 0);
    state.view(&view(9, &[1, 3]), 0);
    assert_eq!(state.high_watermark(), 20);
    // Nor does an older view.
    state.view(&view(8, &[1]), 0);
    assert_eq!(state.isr(), [member(1), member(3)]);
}

#[test]
fn reports_of_another_epoch_generation_or_incarnation_count_for_nothing() {
    let mut state = leader(&[1, 2]);
    append(&mut state, 20, 0);
    assert!(!report(&mut state, 2, 20, 20, 0), "nothing is known of its log before its hello");
    hello(&mut state, 2, 10, 0);
    let said = Report { member: member(2), tenure: TENURE, received: 20, flushed: 20, log_start: Some(0) };
    let stranger = Member { incarnation: Uuid::from_u128(1), ..member(2) };
    for stale in [
        Report { member: stranger, ..said },
        Report { tenure: Tenure { leader_epoch: EPOCH - 1, ..TENURE }, ..said },
        Report { tenure: Tenure { generation: 1, ..TENURE }, ..said },
    ] {
        assert!(!state.report(stale, 0));
    }
    assert_eq!(state.high_watermark(), 4);
    assert!(state.report(said, 0));
    assert_eq!(state.high_watermark(), 20);
}

#[test]
fn completions_of_another_epoch_or_generation_count_for_nothing() {
    let mut state = leader(&[1]);
    for stale in [Tenure { leader_epoch: EPOCH - 1, ..TENURE }, Tenure { generation: 1, ..TENURE }] {
        state.written(stale, 30, 0);
        state.flushed(stale, 30, 0);
    }
    state.configure(settings(1, Flushed), 0);
    assert_eq!(state.high_watermark(), 10);
    append(&mut state, 30, 0);
    assert_eq!(state.high_watermark(), 30);
}

#[test]
fn a_follower_cuts_before_it_is_pushed_to() {
    let mut state = leader(&[1, 2]);
    let own = history(10);
    let longer = History::new(vec![EpochEntry { epoch: 1, start_offset: 0 }], 0, 14).unwrap();
    let says = |generation, history| Hello { member: member(2), tenure: Tenure { generation, ..TENURE }, history };
    assert_eq!(state.hello(&says(0, longer.clone()), &own, 0), Ok(Verdict::Cut { to: 10 }));
    assert!(!report(&mut state, 2, 14, 14, 0));
    assert_eq!(state.hello(&says(1, history(10)), &own, 0), Ok(Verdict::Agrees));
    assert_eq!(state.hello(&says(0, longer), &own, 0), Err(HelloRefusal::Stale));
    assert!(!report(&mut state, 2, 14, 14, 0), "said before the cut");
    let stranger = Hello { member: nobody(2), ..says(1, history(10)) };
    assert_eq!(state.hello(&stranger, &own, 0), Err(HelloRefusal::UnknownReplica(nobody(2))));
    let mut early = says(1, history(10));
    early.tenure.leader_epoch = EPOCH + 1;
    assert_eq!(state.hello(&early, &own, 0), Err(HelloRefusal::NotLeader(EPOCH + 1)));
}

#[test]
fn without_its_lease_a_leader_takes_only_acks_all_and_changes_no_isr() {
    let mut state = leader(&[1, 2, 3]);
    state.lease(false, 0);
    assert!(state.admit(Acks::All).is_ok());
    for acks in [Acks::Leader, Acks::None] {
        let refused = state.admit(acks).unwrap_err();
        assert_eq!((refused.code(), refused.retryable()), (ErrorCode::NotLeader, true));
    }
    state.tick(5000);
    assert_eq!((proposed(&mut state), state.deadline_ms()), (vec![], None));
    state.lease(true, 5000);
    assert_eq!(proposed(&mut state), [(7, vec![1])]);
}

#[test]
fn nothing_outlives_its_epoch() {
    let mut state = leader(&[1, 2]);
    all_follow(&mut state);
    state.take_effects();
    // Even if the same broker leads on.
    state.view(&View { leader_epoch: EPOCH + 1, ..view(8, &[1, 2]) }, 0);
    assert_eq!(state.take_effects(), [Effect::Ended]);
    append(&mut state, 20, 0);
    assert!(!report(&mut state, 2, 20, 20, 0));
    state.tick(9999);
    assert_eq!(state.high_watermark(), 10);
    assert!(state.admit(Acks::All).is_err() && state.is_ended());
    assert_eq!(state.take_effects(), []);
}

/// A registration that comes late may count for a moment. What the broker said before is forgotten then, and its stream is of no use.
#[test]
fn a_follower_whose_broker_was_another_start_meanwhile_says_hello_again() {
    let mut state = leader(&[1, 2, 3]);
    all_follow(&mut state);
    assert!(!state.awaits_hello(member(2)));
    let mut other = view(8, &[1, 3]);
    other.replicas[1].member = nobody(2);
    state.view(&other, 0);
    assert!(!state.awaits_hello(member(2)), "it is none of the replicas");
    state.view(&view(9, &[1, 3]), 0);
    assert!(!report(&mut state, 2, 10, 10, 0));
    assert!(state.awaits_hello(member(2)));
    hello(&mut state, 2, 10, 0);
    assert!(report(&mut state, 2, 10, 10, 0));
    assert!(!state.awaits_hello(member(2)));
}
