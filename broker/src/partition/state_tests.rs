use super::state::{Append, AppendResult, Ask, Check, Effect, Job, Limits, Offsets, PartitionState, fenced};
use crate::error::PartitionError;
use crate::replica::history::History;
use crate::replica::leader::{Assigned, View};
use crate::replica::{Hello, Member, Report, Tenure};
use crate::topic_config::TopicConfig;
use crate::topic_config::TopicDurability::{self, Flushed, Replicated};
use bytes::Bytes;
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_proto::wire::{Acks, Durability};
use headwater_storage::{BatchOutcome, NewBatch, SequenceError};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

type State = PartitionState<u32, &'static str>;

const LIMITS: Limits = Limits { group_bytes: 1000, unflushed_bytes: 5000, replica_lag_time_max_ms: 1000 };

const ME: Member = Member { broker: 1, incarnation: uuid::Uuid::nil() };
const OTHER: Member = Member { broker: 2, incarnation: uuid::Uuid::nil() };

fn topic(durability: TopicDurability, flush_ms: u64) -> TopicConfig {
    TopicConfig { durability, flush_ms, ..TopicConfig::default() }
}

fn state(durability: TopicDurability) -> State {
    let offsets = Offsets { log_start: 0, high_watermark: 0, log_end: 0, flushed: 0 };
    PartitionState::new(ME, &View::alone(ME, 1), true, &topic(durability, 1000), LIMITS, offsets, 0)
}

fn batch() -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    builder.append(0, None, Some(b"x"), &[]);
    let bytes: Bytes = builder.build().unwrap();
    NewBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes }
}

fn append(state: &mut State, reply: u32, acks: Acks, bytes: usize) {
    state.append(Append { epoch: None, batches: vec![batch()], check: None, bytes, acks, reply });
}

fn appended(offset: i64) -> BatchOutcome {
    BatchOutcome::Appended { base_offset: offset, last_offset: offset, log_append_time_ms: -1 }
}

/// Requests of one batch each.
fn each(outcomes: impl IntoIterator<Item = BatchOutcome>) -> Vec<Result<Vec<BatchOutcome>, PartitionError>> {
    outcomes.into_iter().map(|outcome| Ok(vec![outcome])).collect()
}

fn answers(state: &mut State) -> Vec<(u32, AppendResult)> {
    let effects = state.take_effects();
    effects
        .into_iter()
        .filter_map(|e| if let Effect::Answer(r, result) = e { Some((r, result)) } else { None })
        .collect()
}

fn levels(state: &mut State) -> Vec<(u32, Durability)> {
    answers(state).into_iter().map(|(reply, result)| (reply, result.unwrap().durability)).collect()
}

/// Takes the next commit; how many batches it has, whether it flushes, whether the write is to be told.
fn commit(state: &mut State, now_ms: i64) -> (usize, bool, bool) {
    match state.next_job(now_ms) {
        Some(Job::Commit { requests, flush, tell_written, .. }) => {
            (requests.iter().map(|request| request.len()).sum(), flush, tell_written)
        }
        _ => panic!("a commit was expected"),
    }
}

#[test]
fn acks_all_waits_for_the_flush_where_the_topic_is_flushed() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    assert_eq!(commit(&mut state, 0), (1, true, false));
    state.written(each([appended(0)]), 1, 10, 0);
    assert_eq!(levels(&mut state), []);
    assert_eq!(state.offsets().high_watermark, 0);
    state.flushed(1, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Flushed)]);
    assert_eq!(state.offsets().high_watermark, 1);
}

#[test]
fn acks_all_waits_for_the_write_alone_where_the_topic_is_replicated() {
    let mut state = state(Replicated);
    append(&mut state, 1, Acks::All, 10);
    assert_eq!(commit(&mut state, 0), (1, false, true));
    state.written(each([appended(0)]), 1, 10, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Replicated)]);
    assert_eq!((state.offsets().high_watermark, state.offsets().flushed), (1, 0));
}

#[test]
fn acks_of_the_leader_and_none_wait_for_the_write_and_readers_wait_for_the_flush() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::Leader, 10);
    append(&mut state, 2, Acks::None, 10);
    assert_eq!(commit(&mut state, 0), (2, true, true));
    state.written(each([appended(0), appended(1)]), 2, 20, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Written), (2, Durability::None)]);
    assert_eq!(state.offsets().high_watermark, 0);
    state.flushed(2, 0);
    assert_eq!(state.offsets().high_watermark, 2);
}

/// The setting was taken, shown and documented, and nothing read it: one broker acknowledged acks=all for two.
#[test]
fn acks_all_is_refused_where_the_topic_asks_for_more_replicas_than_are_in_sync() {
    let mut state = state(Flushed);
    let two = TopicConfig { min_insync_replicas: 2, ..topic(Flushed, 1000) };
    state.configure(&two, 0);
    append(&mut state, 1, Acks::All, 10);
    let refused = answers(&mut state).remove(0).1.unwrap_err();
    assert!(refused.to_string().contains("not enough in-sync replicas: 1 of 2"), "{refused}");
    assert_eq!((refused.code(), refused.retryable()), (ErrorCode::NotEnoughReplicas, true));
    assert!(state.next_job(0).is_none(), "nothing of it is written");
    append(&mut state, 2, Acks::Leader, 10);
    append(&mut state, 3, Acks::None, 10);
    state.append(Append { epoch: None, batches: Vec::new(), check: None, bytes: 0, acks: Acks::All, reply: 4 });
    assert_eq!(commit(&mut state, 0).0, 2);
    let nothing = Ok(Vec::new());
    state.written(each([appended(0), appended(1)]).into_iter().chain([nothing]).collect(), 2, 20, 0);
    state.flushed(2, 0);
    state.returned(0, 0);
    assert!(answers(&mut state).iter().all(|(_, result)| result.is_ok()));
    state.configure(&topic(Flushed, 1000), 0);
    append(&mut state, 5, Acks::All, 10);
    assert_eq!(commit(&mut state, 0).0, 1);
}

#[test]
fn what_arrives_during_a_commit_forms_the_next_group() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    for reply in 2..6 {
        append(&mut state, reply, Acks::All, 10);
    }
    assert!(state.next_job(0).is_none(), "the write half is away");
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(commit(&mut state, 0).0, 4);
}

#[test]
fn a_group_is_bounded_and_a_single_large_request_goes_alone() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 600);
    append(&mut state, 2, Acks::All, 600);
    append(&mut state, 3, Acks::All, 3000);
    for end in 1..=3 {
        assert_eq!(commit(&mut state, 0).0, 1);
        state.written(each([appended(end - 1)]), end, 10, 0);
        state.flushed(end, 0);
        state.returned(0, 0);
    }
}

#[test]
fn a_duplicate_is_acknowledged_once_its_original_is_flushed() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::Leader, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Written)]);
    state.returned(0, 0);
    // The flush did not happen yet; the producer asks for more this time.
    append(&mut state, 2, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([BatchOutcome::Duplicate { base_offset: 0, last_offset: 0 }]), 1, 10, 0);
    assert_eq!(levels(&mut state), []);
    state.flushed(1, 0);
    assert_eq!(levels(&mut state), [(2, Durability::Flushed)]);
    state.returned(0, 0);
    // Flushed long ago: at once.
    append(&mut state, 3, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([BatchOutcome::Duplicate { base_offset: 0, last_offset: 0 }]), 1, 10, 0);
    assert_eq!(levels(&mut state), [(3, Durability::Flushed)]);
}

/// Until then it was acknowledged as flushed, and was not.
#[test]
fn a_duplicate_waits_for_its_flush_where_the_topic_is_flushed_from_now_on() {
    let mut state = state(Replicated);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.returned(0, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Replicated)]);
    state.configure(&topic(Flushed, 1000), 0);
    append(&mut state, 2, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([BatchOutcome::Duplicate { base_offset: 0, last_offset: 0 }]), 1, 0, 0);
    assert_eq!((levels(&mut state), state.offsets().high_watermark), (vec![], 1));
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(levels(&mut state), [(2, Durability::Flushed)]);
}

#[test]
fn a_refused_sequence_refuses_its_request_and_no_other() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    append(&mut state, 2, Acks::All, 10);
    commit(&mut state, 0);
    let gap = SequenceError::OutOfOrder { given: 7, expected: 3 };
    let refused = Err(PartitionError::Sequence(gap));
    state.written(vec![refused, Ok(vec![appended(0)])], 1, 10, 0);
    state.flushed(1, 0);
    let answers = answers(&mut state);
    assert!(matches!(answers[0], (1, Err(PartitionError::Sequence(_)))));
    assert!(matches!(answers[1], (2, Ok(_))));
}

/// Also what is in the next group already, and was refused nothing itself.
#[test]
fn nothing_of_a_stream_overtakes_what_failed() {
    let refusal = || PartitionError::Internal("wrong".into());
    let wrong = || Box::new(move |_: &[NewBatch]| Err(refusal())) as Ask;
    let good = || Box::new(|_: &[NewBatch]| Ok(())) as Ask;
    for (first, by_the_log) in [(wrong(), false), (good(), true)] {
        let mut state = state(Flushed);
        let (failed, others) = (Arc::<AtomicBool>::default(), Arc::default());
        let mut ask = |reply, failed: &Arc<AtomicBool>, ask| {
            let check = Some(Check::new(Arc::clone(failed), ask));
            state.append(Append { epoch: None, batches: vec![batch()], check, bytes: 10, acks: Acks::All, reply });
        };
        ask(1, &failed, Some(first));
        ask(2, &failed, Some(good()));
        ask(3, &failed, None);
        ask(4, &others, Some(good()));
        let Some(Job::Commit { mut requests, .. }) = state.next_job(0) else { panic!("a commit was expected") };
        let first = requests[0].take();
        if by_the_log {
            first.unwrap();
            requests[0].fail();
        } else {
            assert!(matches!(first, Err(PartitionError::Internal(_))));
        }
        assert!(matches!(requests[1].take(), Err(PartitionError::EarlierFailed)));
        assert!(matches!(requests[2].take(), Err(PartitionError::EarlierFailed)));
        assert_eq!(requests[3].take().unwrap().len(), 1, "another stream's");
    }
    // What is refused before it comes to a commit.
    let mut state = state(Flushed);
    state.configure(&TopicConfig { min_insync_replicas: 2, ..topic(Flushed, 1000) }, 0);
    let failed = Arc::<AtomicBool>::default();
    let check = Some(Check::new(Arc::clone(&failed), None));
    state.append(Append { epoch: None, batches: vec![batch()], check, bytes: 10, acks: Acks::All, reply: 1 });
    assert!(failed.load(Ordering::Relaxed));
}

#[test]
fn a_full_disk_refuses_the_group_and_takes_the_next() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.refused(&PartitionError::DiskFull("no space".into()));
    state.returned(0, 0);
    let refused = answers(&mut state);
    assert!(matches!(&refused[..], [(1, Err(error))] if error.retryable()));
    append(&mut state, 2, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    assert_eq!(levels(&mut state), [(2, Durability::Flushed)]);
}

#[test]
fn a_failed_flush_refuses_everything_that_rests_on_it_and_all_that_comes() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    append(&mut state, 2, Acks::All, 10);
    state.written(each([appended(0)]), 1, 10, 0);
    state.end(fenced("fdatasync failed"));
    append(&mut state, 3, Acks::All, 10);
    let refused: Vec<u32> = answers(&mut state)
        .into_iter()
        .map(|(reply, result)| {
            assert!(matches!(result, Err(PartitionError::Fenced(_))));
            reply
        })
        .collect();
    assert_eq!(refused, [1, 2, 3]);
    assert_eq!(state.offsets().high_watermark, 0, "what was not flushed is never shown");
}

#[test]
fn a_replicated_log_is_flushed_when_its_time_has_come() {
    let mut state = state(Replicated);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 500);
    state.written(each([appended(0)]), 1, 10, 500);
    state.returned(0, 0);
    assert_eq!(state.flush_deadline_ms(), Some(1500));
    assert!(state.next_job(1499).is_none());
    assert!(matches!(state.next_job(1500), Some(Job::Flush)));
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(state.flush_deadline_ms(), None);
    assert!(state.next_job(9999).is_none());
}

#[test]
fn a_replicated_log_is_flushed_when_too_much_is_unflushed() {
    let mut state = state(Replicated);
    let mut flushes = 0;
    for n in 0..20 {
        append(&mut state, n, Acks::All, 900);
        let (_, flush, _) = commit(&mut state, 0);
        let end = i64::from(n) + 1;
        state.written(each([appended(end - 1)]), end, 900, 0);
        if flush {
            flushes += 1;
            state.flushed(end, 0);
        }
        state.returned(0, 0);
    }
    assert_eq!(flushes, 3, "every sixth write of 900 reaches 5000");
}

#[test]
fn other_work_goes_before_the_appends_that_wait() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    state.work("delete records");
    assert!(matches!(state.next_job(0), Some(Job::Work("delete records"))));
    state.returned(0, 0);
    assert!(matches!(state.next_job(0), Some(Job::Commit { .. })));
}

#[test]
fn a_topic_made_replicated_shows_at_once_what_is_written() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.configure(&topic(Replicated, 1000), 0);
    assert_eq!(levels(&mut state), [(1, Durability::Replicated)]);
    state.configure(&topic(Flushed, 1000), 0);
    state.lead(View::alone(ME, 2), 0);
    assert_eq!(state.offsets().high_watermark, 1, "the high watermark never falls");
    append(&mut state, 2, Acks::All, 10);
    state.returned(0, 0);
    assert!(matches!(state.next_job(0), Some(Job::Commit { leader_epoch: 2, .. })));
}

/// The topic was `replicated` a moment ago; the leader that heard of the change has died.
#[test]
fn a_duplicate_waits_for_its_flush_where_somebody_leads_who_had_not_flushed_it() {
    let offsets = Offsets { log_start: 0, high_watermark: 1, log_end: 1, flushed: 0 };
    let mut state: State =
        PartitionState::new(ME, &View::alone(ME, 2), true, &topic(Flushed, 1000), LIMITS, offsets, 0);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([BatchOutcome::Duplicate { base_offset: 0, last_offset: 0 }]), 1, 0, 0);
    assert_eq!((levels(&mut state), state.offsets().high_watermark), (vec![], 1));
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Flushed)]);
}

/// A partition on brokers 1 and 2, both in sync.
fn replicated_on_two(min_insync_replicas: u32) -> State {
    let config = TopicConfig { min_insync_replicas, ..topic(Flushed, 1000) };
    let offsets = Offsets { log_start: 0, high_watermark: 0, log_end: 0, flushed: 0 };
    PartitionState::new(ME, &on_two(1, 0, true), true, &config, LIMITS, offsets, 0)
}

fn on_two(leader_epoch: i32, partition_epoch: i32, in_sync: bool) -> View {
    let replicas =
        vec![Assigned { member: ME, active: true, in_sync: true }, Assigned { member: OTHER, active: true, in_sync }];
    View { index: 0, leader: Some(ME), leader_epoch, partition_epoch, min_insync_replicas: None, replicas }
}

fn report(state: &mut State, flushed: i64, now_ms: i64) {
    let tenure = Tenure { leader_epoch: 1, generation: 0 };
    let hello = Hello { member: OTHER, tenure, history: History::default() };
    let report = Report { member: OTHER, tenure, received: flushed, flushed, log_start: Some(0) };
    state.replicas(|leader| {
        leader.hello(&hello, &History::default(), now_ms).unwrap();
        assert!(leader.report(report, now_ms));
    });
}

#[test]
fn acks_all_waits_for_every_replica_in_sync() {
    let mut state = replicated_on_two(2);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    assert_eq!((levels(&mut state), state.offsets().high_watermark), (vec![], 0));
    report(&mut state, 1, 0);
    assert_eq!((levels(&mut state), state.offsets().high_watermark), (vec![(1, Durability::Flushed)], 1));
}

#[test]
fn a_replica_that_lags_is_proposed_away_and_acknowledgements_wait_until_that_is_committed() {
    let mut state = replicated_on_two(1);
    report(&mut state, 0, 0);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    state.replicas(|leader| leader.tick(1001));
    let effects = state.take_effects();
    let proposals: Vec<_> =
        effects.iter().filter_map(|e| if let Effect::Propose(alter) = e { Some(&alter.isr) } else { None }).collect();
    assert_eq!(proposals, [&vec![ME]]);
    assert_eq!(state.offsets().high_watermark, 0);
    state.replicas(|leader| leader.view(&on_two(1, 1, false), 1002));
    assert_eq!(levels(&mut state), [(1, Durability::Flushed)]);
}

#[test]
fn what_is_parked_fails_retriably_when_its_epoch_ends() {
    let mut state = replicated_on_two(2);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    append(&mut state, 2, Acks::All, 10);
    let elsewhere = View { leader: Some(OTHER), ..on_two(2, 1, true) };
    state.replicas(|leader| leader.view(&elsewhere, 0));
    state.flushed(1, 0);
    append(&mut state, 3, Acks::Leader, 10);
    for (reply, result) in answers(&mut state) {
        let error = result.unwrap_err();
        assert_eq!((error.code(), error.retryable()), (ErrorCode::NotLeader, true), "{reply}");
    }
    assert_eq!(state.offsets().high_watermark, 0);
    state.returned(0, 0);
    assert!(state.is_idle() && state.next_job(0).is_none());
}

/// The later epoch begins where the log ends once the write half is back, and not before.
#[test]
fn an_acknowledgement_does_not_outlive_its_epoch_though_the_same_broker_leads_on() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.returned(0, 0);
    append(&mut state, 2, Acks::All, 10);
    append(&mut state, 3, Acks::Leader, 10);
    commit(&mut state, 0);
    append(&mut state, 4, Acks::All, 10);
    state.lead(View::alone(ME, 2), 0);
    assert!(matches!(&answers(&mut state)[..], [(1, Err(PartitionError::NotLeader(1)))]));
    state.written(each([appended(1), appended(2)]), 3, 20, 0);
    let answered = answers(&mut state);
    assert!(matches!(&answered[..], [(2, Err(PartitionError::NotLeader(1))), (3, Ok(_))]), "{answered:?}");
    state.flushed(3, 0);
    state.returned(0, 0);
    assert_eq!((state.leader().tenure().leader_epoch, state.leader().epoch_start()), (2, 3));
    assert!(matches!(state.next_job(0), Some(Job::Commit { leader_epoch: 2, .. })));
    state.written(each([appended(3)]), 4, 10, 0);
    state.flushed(4, 0);
    assert_eq!(levels(&mut state), [(4, Durability::Flushed)]);
}

/// A coordinator decides on what it knows of its groups in one epoch, and a producer on what the log said when its stream was opened: in
/// between, another broker may have led.
#[test]
fn what_was_decided_in_an_epoch_is_appended_in_no_other() {
    let mut state = state(Flushed);
    let ask = |state: &mut State, reply, epoch| {
        state.append(Append { epoch, batches: vec![batch()], check: None, bytes: 10, acks: Acks::Leader, reply });
    };
    let refused_in = |answers: Vec<(u32, AppendResult)>, epoch: i32| -> Vec<u32> {
        let refused = |(reply, result): (u32, AppendResult)| match result {
            Err(PartitionError::NotLeader(said)) if said == epoch => reply,
            other => panic!("{reply}: {other:?}"),
        };
        answers.into_iter().map(refused).collect()
    };
    ask(&mut state, 1, Some(1));
    commit(&mut state, 0);
    // The write half is away: these wait, and the epoch that begins does so without them.
    ask(&mut state, 2, Some(1));
    ask(&mut state, 3, None);
    state.lead(View::alone(ME, 3), 0);
    assert_eq!(refused_in(answers(&mut state), 1), [2]);
    for (reply, epoch) in [(4, 1), (5, 2), (6, 4)] {
        ask(&mut state, reply, Some(epoch));
        assert_eq!(refused_in(answers(&mut state), 3), [reply], "decided in epoch {epoch}");
    }
    ask(&mut state, 7, Some(3));
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    state.returned(0, 0);
    ask(&mut state, 8, Some(3));
    let Some(Job::Commit { requests, leader_epoch: 3, .. }) = state.next_job(0) else { panic!("a commit of epoch 3") };
    assert_eq!(requests.len(), 3, "3, 7 and 8");
}

/// What was refused with the old epoch is sent again after what followed it: nothing of its stream may be written in between.
#[test]
fn nothing_of_a_stream_overtakes_what_its_epoch_refused() {
    for is_parked in [true, false] {
        let mut state = state(Flushed);
        let (failed, others) = (Arc::<AtomicBool>::default(), Arc::default());
        let ask = |state: &mut State, reply, failed: &Arc<AtomicBool>| {
            let check = Some(Check::new(Arc::clone(failed), None));
            state.append(Append { epoch: None, batches: vec![batch()], check, bytes: 10, acks: Acks::All, reply });
        };
        ask(&mut state, 1, &failed);
        commit(&mut state, 0);
        ask(&mut state, 2, &failed);
        ask(&mut state, 3, &others);
        if is_parked {
            state.written(each([appended(0)]), 1, 10, 0);
            state.lead(View::alone(ME, 2), 0);
        } else {
            state.lead(View::alone(ME, 2), 0);
            state.written(each([appended(0)]), 1, 10, 0);
        }
        assert!(matches!(&answers(&mut state)[..], [(1, Err(PartitionError::NotLeader(1)))]));
        state.flushed(1, 0);
        state.returned(0, 0);
        let Some(Job::Commit { mut requests, .. }) = state.next_job(0) else { panic!("a commit was expected") };
        assert!(matches!(requests[0].take(), Err(PartitionError::EarlierFailed)), "{is_parked}");
        assert_eq!(requests[1].take().unwrap().len(), 1, "another stream's");
    }
}

#[test]
fn a_drained_partition_answers_what_it_took_and_takes_nothing_new() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    state.drain(PartitionError::ShuttingDown);
    append(&mut state, 2, Acks::All, 10);
    assert!(matches!(&answers(&mut state)[..], [(2, Err(PartitionError::ShuttingDown))]));
    assert!(!state.is_idle());
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Flushed)]);
    assert!(state.is_idle());
}

/// A model of the log for the property below: how much it holds, and how much of that is flushed.
#[derive(Default)]
struct Log {
    end: i64,
    flushed: i64,
    job: Option<(usize, usize, bool)>,
}

impl Log {
    fn begin(&mut self, state: &mut State, now: i64) -> bool {
        if self.job.is_none() {
            self.job = match state.next_job(now) {
                Some(Job::Commit { requests, bytes, flush, .. }) => Some((requests.len(), bytes, flush)),
                Some(Job::Flush) => Some((0, 0, true)),
                _ => None,
            };
        }
        self.job.is_some()
    }

    fn finish(&mut self, state: &mut State, now: i64) {
        let Some((batches, bytes, flush)) = self.job.take() else { return };
        if batches > 0 {
            let outcomes = each((self.end..).take(batches).map(appended));
            self.end += batches as i64;
            state.written(outcomes, self.end, bytes, now);
        }
        if flush {
            self.flushed = self.end;
            state.flushed(self.flushed, 0);
        }
        state.returned(0, 0);
    }
}

proptest! {
    #[test]
    fn every_request_is_answered_once_and_not_before_it_is_as_durable_as_it_asked(
        steps in proptest::collection::vec((0u8..5, 0usize..3, 1usize..1500), 1..200),
        replicated in any::<bool>(),
    ) {
        let mut state = state(if replicated { Replicated } else { Flushed });
        let mut log = Log::default();
        let mut asked = Vec::new();
        let mut answered = std::collections::BTreeSet::new();
        let mut now = 0;
        let mut take = |state: &mut State, log: &Log, asked: &[Acks]| {
            for (reply, result) in answers(state) {
                let end = result.unwrap().batches.iter().map(|b| match b {
                    BatchOutcome::Appended { last_offset, .. } => last_offset + 1,
                    _ => 0,
                }).max().unwrap();
                assert!(end <= log.end);
                assert!(replicated || asked[reply as usize] != Acks::All || end <= log.flushed);
                assert!(answered.insert(reply));
            }
            answered.len()
        };
        for (what, acks, bytes) in steps {
            now += 100;
            if what < 3 {
                let acks = [Acks::All, Acks::Leader, Acks::None][acks];
                append(&mut state, asked.len() as u32, acks, bytes);
                asked.push(acks);
            } else {
                log.finish(&mut state, now);
            }
            log.begin(&mut state, now);
            take(&mut state, &log, &asked);
        }
        while log.begin(&mut state, now) {
            log.finish(&mut state, now);
        }
        prop_assert_eq!(take(&mut state, &log, &asked), asked.len());
    }
}

/// A flush for which there was no room fenced its partition, though the log was well and the next one would have done.
#[test]
fn what_is_parked_outlasts_a_flush_that_found_no_room_and_the_flush_is_tried_again() {
    let mut state = state(Flushed);
    append(&mut state, 1, Acks::All, 10);
    commit(&mut state, 0);
    state.written(each([appended(0)]), 1, 10, 0);
    assert!(state.flush_postponed(50));
    state.returned(0, 0);
    assert!(answers(&mut state).is_empty() && state.offsets().high_watermark == 0);
    assert!(state.next_job(1049).is_none());
    assert!(matches!(state.next_job(1050), Some(Job::Flush)));
    assert!(!state.flush_postponed(1060));
    state.returned(0, 0);
    assert!(state.is_idle(), "a disk that stays full does not keep the log from being closed");
    assert!(matches!(state.next_job(2060), Some(Job::Flush)));
    state.flushed(1, 0);
    state.returned(0, 0);
    assert_eq!(levels(&mut state), [(1, Durability::Flushed)]);
    assert_eq!(state.flush_deadline_ms(), None);
}
