use super::follower::{BatchSpan, Effect, FollowerState, Push, PushError, Replica, Take};
use super::history::{History, Verdict};
use super::{Member, Report, Tenure};
use headwater_storage::epochs::EpochEntry;
use uuid::Uuid;

const EPOCH: i32 = 5;
const TENURE: Tenure = Tenure { leader_epoch: EPOCH, generation: 0 };

/// A broker in an incarnation that is nobody's.
fn nobody(broker: i32) -> Member {
    Member { broker, incarnation: Uuid::nil() }
}

/// Epoch 1 up to 10, epoch 3 from there.
fn history(log_end: i64) -> History {
    let epochs = [(1, 0), (3, 10)].map(|(epoch, start_offset)| EpochEntry { epoch, start_offset });
    History::new(epochs.into_iter().filter(|entry| entry.start_offset < log_end).collect(), 0, log_end).unwrap()
}

fn follower(log_end: i64, high_watermark: i64, unclean_recorded: u32) -> FollowerState {
    let replica = Replica {
        member: nobody(2),
        history: history(log_end),
        flushed: log_end,
        high_watermark,
        generation: 0,
        unclean_taken: 0,
    };
    FollowerState::follow(EPOCH, replica, unclean_recorded)
}

fn following(log_end: i64) -> FollowerState {
    let mut state = follower(log_end, 5, 0);
    state.verdict(TENURE, Verdict::Agrees);
    state.take_effects();
    state
}

fn push(from: i64, batches: &[(i64, i64, i32)], high_watermark: i64) -> Push {
    let span = |&(base_offset, next_offset, leader_epoch)| BatchSpan { base_offset, next_offset, leader_epoch };
    Push { tenure: TENURE, from, batches: batches.iter().map(span).collect(), high_watermark, log_start: 0 }
}

fn report(received: i64, flushed: i64) -> Effect {
    Effect::Report(reported(received, flushed))
}

fn reported(received: i64, flushed: i64) -> Report {
    Report { member: nobody(2), tenure: TENURE, received, flushed, log_start: Some(0) }
}

#[test]
fn it_says_hello_with_its_whole_history_and_takes_nothing_before_the_answer() {
    let mut state = follower(15, 5, 0);
    let [Effect::Hello(hello)] = &state.take_effects()[..] else { panic!("a hello") };
    assert_eq!((hello.tenure, &hello.history), (TENURE, &history(15)));
    assert_eq!(state.push(&push(15, &[(15, 20, EPOCH)], 20)), Ok(Take::Nothing));
    assert_eq!(state.high_watermark(), 5);
    state.verdict(TENURE, Verdict::Agrees);
    assert_eq!(state.take_effects(), [report(15, 15)]);
    assert_eq!(state.push(&push(15, &[(15, 20, EPOCH)], 12)), Ok(Take::Append(TENURE)));
}

#[test]
fn it_asks_again_after_every_cut() {
    let mut state = follower(15, 5, 0);
    state.take_effects();
    state.verdict(TENURE, Verdict::Cut { to: 12 });
    assert_eq!(state.take_effects(), [Effect::Cut { to: 12 }]);
    let second = Tenure { generation: 1, ..TENURE };
    // What was said before the cut is nobody's.
    state.verdict(TENURE, Verdict::Agrees);
    state.flushed(TENURE, 15);
    assert_eq!(state.take_effects(), []);
    state.cut(second, history(12));
    let [Effect::Hello(hello)] = &state.take_effects()[..] else { panic!("a hello") };
    assert_eq!((hello.tenure, hello.history.log_end()), (second, 12));
    state.verdict(second, Verdict::Cut { to: 8 });
    assert_eq!(state.take_effects(), [Effect::Cut { to: 8 }]);
    let third = Tenure { generation: 2, ..TENURE };
    state.cut(third, history(8));
    state.take_effects();
    state.verdict(third, Verdict::Agrees);
    assert!(state.is_following());
    let Effect::Report(report) = state.take_effects()[0] else { panic!("a report") };
    assert_eq!((report.tenure, report.received, report.flushed), (third, 8, 8));
}

#[test]
fn a_cut_below_its_high_watermark_fences_the_replica() {
    for verdict in [Verdict::Cut { to: 9 }, Verdict::Restart { at: 0, equal_below: 9 }] {
        let mut state = follower(15, 10, 0);
        state.take_effects();
        state.verdict(TENURE, verdict);
        assert!(matches!(&state.take_effects()[..], [Effect::Fence(why)] if why.contains("no unclean election")));
        assert!(state.is_fenced());
        state.reconnect(history(15));
        state.verdict(TENURE, Verdict::Agrees);
        assert_eq!((state.take_effects(), state.is_following()), (vec![], false));
    }
    // Up to the high watermark it is a matter of course.
    let mut state = follower(15, 10, 0);
    state.verdict(TENURE, Verdict::Cut { to: 10 });
    assert!(!state.is_fenced());
}

#[test]
fn an_unclean_election_permits_one_cut_below_the_high_watermark() {
    let mut state = follower(15, 10, 1);
    state.take_effects();
    state.verdict(TENURE, Verdict::Cut { to: 3 });
    assert_eq!(state.take_effects(), [Effect::HighWatermark(3), Effect::Cut { to: 3 }]);
    let second = Tenure { generation: 1, ..TENURE };
    state.cut(second, history(3));
    assert_eq!(state.unclean_taken(), 0, "until the leader finds nothing more to cut");
    state.verdict(second, Verdict::Agrees);
    assert_eq!(state.unclean_taken(), 1);
}

#[test]
fn what_the_leader_deleted_is_no_loss() {
    let mut state = follower(15, 15, 0);
    state.take_effects();
    state.verdict(TENURE, Verdict::Restart { at: 100, equal_below: 100 });
    assert_eq!(state.take_effects(), [Effect::Restart { at: 100 }]);
    state.cut(Tenure { generation: 1, ..TENURE }, History::new(vec![], 100, 100).unwrap());
    assert_eq!(state.high_watermark(), 15);
}

/// What lies below in the leader's log is not what was deleted here.
#[test]
fn after_an_unclean_election_nothing_that_was_deleted_stands_for_what_the_leader_has() {
    let empty = |at| History::new(vec![], at, at).unwrap();
    for log_end in [20, 25] {
        let history = History::new(vec![], 20, log_end).unwrap();
        let replica =
            Replica { member: nobody(2), history, flushed: 20, high_watermark: 20, generation: 0, unclean_taken: 0 };
        let mut state = FollowerState::follow(EPOCH, replica, 1);
        if log_end > 20 {
            state.take_effects();
            state.verdict(TENURE, Verdict::Restart { at: 20, equal_below: 20 });
        }
        assert_eq!(state.take_effects(), [Effect::HighWatermark(0), Effect::Restart { at: 0 }]);
        let second = Tenure { generation: 1, ..TENURE };
        state.cut(second, empty(0));
        state.verdict(second, Verdict::Restart { at: 5, equal_below: 5 });
        let third = Tenure { generation: 2, ..TENURE };
        state.cut(third, empty(5));
        state.take_effects();
        // The leader takes it for whole by now.
        state.verdict(third, Verdict::Agrees);
        assert_eq!((state.is_following(), state.unclean_taken()), (true, 1));
    }
    // Nor is it said to have been deleted, once the log begins lower.
    let history = History::new(vec![], 20, 25).unwrap();
    let replica =
        Replica { member: nobody(2), history, flushed: 25, high_watermark: 20, generation: 0, unclean_taken: 0 };
    let mut state = FollowerState::follow(EPOCH, replica, 1);
    state.start_kept(20);
    state.verdict(TENURE, Verdict::Restart { at: 20, equal_below: 20 });
    let second = Tenure { generation: 1, ..TENURE };
    state.cut(second, empty(0));
    state.take_effects();
    state.verdict(second, Verdict::Agrees);
    assert_eq!(state.take_effects(), [Effect::Report(Report { tenure: second, ..reported(0, 0) })]);
    // One that is cut and not begun anew begins where it did: within a batch.
    let mut state = follower(15, 10, 1);
    state.start_kept(3);
    state.take_effects();
    state.verdict(TENURE, Verdict::Cut { to: 12 });
    state.cut(second, History::new(vec![EpochEntry { epoch: 1, start_offset: 0 }], 0, 12).unwrap());
    state.take_effects();
    state.verdict(second, Verdict::Agrees);
    assert_eq!(
        state.take_effects(),
        [Effect::Report(Report { log_start: Some(3), tenure: second, ..reported(12, 12) })]
    );
    // What it is told to begin with is not what it deleted.
    let mut state = follower(15, 10, 1);
    state.take_effects();
    state.verdict(TENURE, Verdict::Restart { at: 20, equal_below: 20 });
    let second = Tenure { generation: 1, ..TENURE };
    state.cut(second, empty(20));
    state.verdict(second, Verdict::Agrees);
    assert!(state.is_following());
}

#[test]
fn a_cut_that_no_log_permits_fences() {
    for to in [-1, 15, 20] {
        let mut state = follower(15, 0, 0);
        state.verdict(TENURE, Verdict::Cut { to });
        assert!(state.is_fenced(), "{to}");
    }
}

#[test]
fn it_reports_what_is_written_and_what_is_flushed() {
    let mut state = following(15);
    state.push(&push(15, &[(15, 18, EPOCH), (18, 20, EPOCH)], 20)).unwrap();
    assert_eq!(state.take_effects(), [Effect::HighWatermark(15)], "the watermark is at most its own end");
    state.written(TENURE, 20);
    assert_eq!(state.take_effects(), [Effect::HighWatermark(20), report(20, 15)]);
    state.flushed(TENURE, 20);
    assert_eq!(state.take_effects(), [report(20, 20)]);
    for stale in [Tenure { leader_epoch: EPOCH - 1, ..TENURE }, Tenure { generation: 1, ..TENURE }] {
        state.written(stale, 30);
        state.flushed(stale, 30);
    }
    assert_eq!(state.take_effects(), []);
}

#[test]
fn batches_are_taken_once_in_order_and_without_a_hole() {
    let mut state = following(15);
    assert_eq!(state.push(&push(15, &[(15, 18, EPOCH)], 0)), Ok(Take::Append(TENURE)));
    assert_eq!(state.push(&push(15, &[(15, 18, EPOCH)], 0)), Ok(Take::Nothing), "a duplicate");
    assert_eq!(state.push(&push(19, &[(19, 20, EPOCH)], 0)), Err(PushError::Hole { from: 19, expected: 18 }));
    // Compaction leaves gaps.
    assert_eq!(state.push(&push(18, &[(20, 22, EPOCH)], 0)), Ok(Take::Append(TENURE)));
    for (base, next, epoch) in [(21, 23, EPOCH), (22, 22, EPOCH), (22, 24, EPOCH - 1), (22, 24, EPOCH + 1)] {
        assert!(matches!(state.push(&push(22, &[(base, next, epoch)], 0)), Err(PushError::Unordered { .. })));
    }
    // Nor is a batch older than the log's own last epoch.
    let mut state = following(15);
    assert!(matches!(state.push(&push(15, &[(15, 16, 1)], 0)), Err(PushError::Unordered { .. })));
    assert_eq!(state.push(&push(15, &[(15, 16, 3)], 0)), Ok(Take::Append(TENURE)));
    let stale = Push { tenure: Tenure { generation: 1, ..TENURE }, ..push(16, &[(16, 17, 3)], 99) };
    assert_eq!(state.push(&stale), Ok(Take::Nothing));
    assert_eq!(state.high_watermark(), 5);
}

/// It had led in epoch 4 from offset 15 and written nothing; the next leader knew records of epoch 3 from there on.
#[test]
fn an_epoch_that_wrote_nothing_does_not_refuse_older_batches() {
    let epochs = [(1, 0), (3, 10), (4, 15)].map(|(epoch, start_offset)| EpochEntry { epoch, start_offset });
    let history = History::new(epochs.to_vec(), 0, 15).unwrap();
    let replica =
        Replica { member: nobody(2), history, flushed: 15, high_watermark: 5, generation: 0, unclean_taken: 0 };
    let mut state = FollowerState::follow(EPOCH, replica, 0);
    state.verdict(TENURE, Verdict::Agrees);
    assert_eq!(state.push(&push(15, &[(15, 16, 3)], 0)), Ok(Take::Append(TENURE)));
}

#[test]
fn it_asks_again_when_the_stream_ends_and_goes_on_from_what_it_has() {
    let mut state = following(15);
    state.push(&push(15, &[(15, 18, EPOCH)], 18)).unwrap();
    state.written(TENURE, 18);
    state.take_effects();
    state.reconnect(history(18));
    assert!(matches!(&state.take_effects()[..], [Effect::Hello(hello)] if hello.history.log_end() == 18));
    assert_eq!(state.push(&push(18, &[(18, 19, EPOCH)], 18)), Ok(Take::Nothing));
    state.verdict(TENURE, Verdict::Agrees);
    assert_eq!(state.push(&push(18, &[(18, 19, EPOCH)], 18)), Ok(Take::Append(TENURE)));
    state.end();
    assert_eq!(state.push(&push(19, &[(19, 20, EPOCH)], 20)), Ok(Take::Nothing));
}

#[test]
fn the_leaders_log_start_is_followed() {
    let mut state = following(15);
    state.push(&Push { log_start: 7, ..push(15, &[], 9) }).unwrap();
    assert_eq!(state.take_effects(), [Effect::HighWatermark(9), Effect::LogStart(7)]);
    state.push(&Push { log_start: 7, ..push(15, &[], 9) }).unwrap();
    assert_eq!(state.take_effects(), []);
}
