use super::following::{Cut, Effect, Following, Job};
use super::state::{Limits, Offsets};
use super::{Pushed, TopicConfig};
use crate::replica::follower::{BatchSpan, Push, Replica};
use crate::replica::history::{History, Verdict};
use crate::replica::{Member, Report, Tenure};
use crate::topic_config::TopicDurability;
use bytes::Bytes;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_storage::NewBatch;
use headwater_storage::epochs::EpochEntry;
use uuid::Uuid;

const ME: Member = Member { broker: 2, incarnation: Uuid::from_u128(2) };
const TENURE: Tenure = Tenure { leader_epoch: 3, generation: 0 };
const LIMITS: Limits = Limits { group_bytes: 1000, unflushed_bytes: 10_000, replica_lag_time_max_ms: 1000 };

fn history(log_end: i64) -> History {
    History::new(vec![EpochEntry { epoch: 1, start_offset: 0 }], 0, log_end).unwrap()
}

fn follower_of(durability: TopicDurability) -> Following<&'static str> {
    let replica =
        Replica { member: ME, history: history(10), flushed: 10, high_watermark: 4, generation: 0, unclean_taken: 0 };
    let topic = TopicConfig { durability, flush_ms: 500, ..TopicConfig::default() };
    let offsets = Offsets { log_start: 0, high_watermark: 4, log_end: 10, flushed: 10 };
    Following::new(Some((3, replica, 0)), 7, &topic, LIMITS, offsets)
}

/// One that the leader has told to go on, on stream 8.
fn following(durability: TopicDurability) -> Following<&'static str> {
    let mut following = follower_of(durability);
    assert!(matches!(&following.take_effects()[..], [Effect::Open(8, _), Effect::Publish(_)]));
    following.verdict(8, TENURE, Verdict::Agrees);
    assert!(following.take_effects().contains(&Effect::Report(report(10, 10))));
    following
}

fn report(received: i64, flushed: i64) -> Report {
    Report { member: ME, tenure: TENURE, received, flushed, log_start: Some(0) }
}

fn pushed(base_offset: i64, bytes: usize) -> (Push, Pushed) {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    builder.append(0, None, Some(&vec![b'x'; bytes]), &[]);
    let whole: Bytes = builder.build().unwrap();
    let header = BatchHeader { base_offset, leader_epoch: 3, ..BatchHeader::parse(&whole).unwrap() };
    let span = BatchSpan { base_offset, next_offset: base_offset + 1, leader_epoch: 3 };
    let push = Push { tenure: TENURE, from: base_offset, batches: vec![span], high_watermark: 11, log_start: 0 };
    let bytes = whole.len() as u64;
    (push, Pushed { batches: vec![NewBatch { header, bytes: whole }], rolls: vec![base_offset], bytes, loan: None })
}

fn push(following: &mut Following<&'static str>, stream: u64, base_offset: i64, bytes: usize) -> u64 {
    let (push, pushed) = pushed(base_offset, bytes);
    let size = pushed.bytes;
    following.pushed(stream, &push, pushed);
    size
}

#[test]
fn what_is_pushed_is_written_flushed_and_reported_as_one_group() {
    let mut following = following(TopicDurability::Flushed);
    let bytes = push(&mut following, 8, 10, 100) + push(&mut following, 8, 11, 100);
    let job = following.next_job(0);
    let Some(Job::Append { batches, rolls, flush: true, .. }) = job else { panic!("{job:?}") };
    assert_eq!((batches.len(), rolls), (2, vec![10, 11]));
    assert!(following.next_job(0).is_none(), "the write half is away");
    following.appended(12, 200, 0);
    following.flushed(12);
    following.returned(0);
    let effects = following.take_effects();
    assert!(effects.contains(&Effect::Report(report(12, 12))) && effects.contains(&Effect::Released(bytes)));
    assert_eq!(following.offsets(), Offsets { log_start: 0, high_watermark: 11, log_end: 12, flushed: 12 });
}

#[test]
fn a_replicated_topic_is_flushed_in_its_time_and_reports_what_it_received_before() {
    let mut following = following(TopicDurability::Replicated);
    push(&mut following, 8, 10, 100);
    assert!(matches!(following.next_job(1000), Some(Job::Append { flush: false, .. })));
    following.appended(11, 100, 1000);
    following.returned(0);
    assert!(following.take_effects().contains(&Effect::Report(report(11, 10))));
    assert_eq!(following.deadline_ms(), Some(1500));
    assert!(following.next_job(1499).is_none());
    assert!(matches!(following.next_job(1500), Some(Job::Flush)));
}

#[test]
fn nothing_of_an_earlier_stream_is_written() {
    let mut following = following(TopicDurability::Flushed);
    push(&mut following, 8, 10, 100);
    following.lost(8);
    push(&mut following, 8, 11, 100);
    assert!(following.next_job(0).is_none(), "what waited is asked for again");
    following.reopen(|| history(10));
    assert!(
        matches!(&following.take_effects()[..], [.., Effect::Open(9, hello), Effect::Publish(_)] if hello.history == history(10))
    );
    following.verdict(8, TENURE, Verdict::Agrees);
    push(&mut following, 8, 10, 100);
    assert!(following.next_job(0).is_none(), "nobody has answered the new hello");
    following.verdict(9, TENURE, Verdict::Agrees);
    push(&mut following, 9, 10, 100);
    assert!(following.next_job(0).is_some());
}

#[test]
fn another_stream_is_opened_once_the_write_half_is_here() {
    let mut following = following(TopicDurability::Flushed);
    push(&mut following, 8, 10, 100);
    assert!(following.next_job(0).is_some());
    following.lost(8);
    following.reopen(|| unreachable!("the log is being written"));
    following.appended(11, 100, 0);
    following.flushed(11);
    following.returned(0);
    following.take_effects();
    following.reopen(|| history(11));
    assert!(following.take_effects().iter().any(|effect| matches!(effect, Effect::Open(9, _))));
}

#[test]
fn a_log_is_cut_before_anything_else_and_hello_is_said_again() {
    let mut following = follower_of(TopicDurability::Flushed);
    following.take_effects();
    following.verdict(8, TENURE, Verdict::Cut { to: 6 });
    assert!(matches!(following.next_job(0), Some(Job::Cut(Cut::To(6)))));
    following.postponed(0);
    following.returned(0);
    assert!(following.next_job(999).is_none(), "there was no room");
    assert!(matches!(following.next_job(1000), Some(Job::Cut(Cut::To(6)))));
    following.was_cut(history(6));
    following.returned(0);
    let effects = following.take_effects();
    let again = |effect: &Effect| matches!(effect, Effect::Open(9, hello) if hello.tenure.generation == 1);
    assert!(effects.iter().any(again), "{effects:?}");
    assert_eq!(following.offsets(), Offsets { log_start: 0, high_watermark: 4, log_end: 6, flushed: 6 });
}

#[test]
fn what_is_not_sound_is_asked_for_on_another_stream() {
    let mut following = following(TopicDurability::Flushed);
    let bytes = push(&mut following, 8, 10, 100);
    assert!(following.next_job(0).is_some());
    push(&mut following, 8, 11, 100);
    following.refused(Some(10));
    following.returned(0);
    let effects = following.take_effects();
    assert!(effects.contains(&Effect::Close(8, Some(10))) && effects.contains(&Effect::Released(bytes)), "{effects:?}");
    assert!(following.next_job(0).is_none(), "what came behind it would leave a hole");
    // The stream's end takes a while, and what was on its way arrives meanwhile.
    push(&mut following, 8, 11, 100);
    push(&mut following, 8, 12, 100);
    assert!(following.next_job(0).is_none(), "so does what comes later");
    following.verdict(8, TENURE, Verdict::Agrees);
    push(&mut following, 8, 11, 100);
    assert!(following.next_job(0).is_none(), "no second verdict on the same stream changes that");
    following.lost(8);
    following.reopen(|| history(10));
    following.verdict(9, TENURE, Verdict::Agrees);
    push(&mut following, 9, 10, 100);
    assert!(matches!(following.next_job(0), Some(Job::Append { from: 10, .. })));
}

#[test]
fn nothing_is_written_behind_what_found_no_room() {
    let mut following = following(TopicDurability::Flushed);
    push(&mut following, 8, 10, 100);
    assert!(following.next_job(0).is_some());
    following.postponed(0);
    following.returned(0);
    assert!(following.take_effects().contains(&Effect::Close(8, None)));
    push(&mut following, 8, 11, 100);
    assert!(following.next_job(5000).is_none(), "the room may be there now, and what comes before it is not");
}

#[test]
fn a_hole_ends_the_stream() {
    let mut following = following(TopicDurability::Flushed);
    push(&mut following, 8, 12, 100);
    assert!(following.take_effects().contains(&Effect::Close(8, None)));
    assert!(following.next_job(0).is_none());
}

#[test]
fn the_log_begins_where_the_leaders_does_up_to_the_high_watermark() {
    let mut following = following(TopicDurability::Flushed);
    let news = Push { tenure: TENURE, from: 10, batches: vec![], high_watermark: 8, log_start: 9 };
    following.pushed(8, &news, Pushed { batches: vec![], rolls: vec![], bytes: 0, loan: None });
    assert!(matches!(following.next_job(0), Some(Job::Trim { before: 8, high_watermark: 8 })));
    following.returned(8);
    assert!(following.next_job(0).is_none());
}

#[test]
fn the_work_of_others_goes_first_and_goes_on_where_nobody_leads() {
    let topic = TopicConfig::default();
    let offsets = Offsets { log_start: 0, high_watermark: 4, log_end: 10, flushed: 10 };
    let mut waiting = Following::new(None, 0, &topic, LIMITS, offsets);
    waiting.work("upkeep");
    assert!(matches!(waiting.next_job(0), Some(Job::Work("upkeep"))));
    waiting.returned(0);
    assert!(waiting.is_idle());
    let mut following = following(TopicDurability::Flushed);
    push(&mut following, 8, 10, 100);
    following.work("upkeep");
    assert!(matches!(following.next_job(0), Some(Job::Work(_))));
}
