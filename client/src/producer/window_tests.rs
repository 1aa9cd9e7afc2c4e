//! The window against a broker of a few lines: whatever gets lost or refused, the log holds every record once and in order.

use super::*;
use headwater_proto::batch::{BatchBuilder, BuildOptions};
use headwater_proto::wire;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

const IDENTITY: Identity = Identity { id: 7, epoch: 0 };
const NEXT_IDENTITY: Identity = Identity { id: 7, epoch: 1 };

/// An empty window, the buffer that its records take up, and a time that is far.
fn empty() -> (Window, Arc<Semaphore>, Instant) {
    (Window::new(Some(IDENTITY), 5), buffer(), Instant::now() + Duration::from_secs(60))
}

fn batch(window: &Window, value: u32, records: i32) -> Bytes {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    for i in 0..records as u32 {
        // Some are larger than others.
        let rest = vec![0; if (value + i) % 7 == 6 { 60 } else { 0 }];
        builder.append(0, None, Some(&[&value.to_be_bytes()[..], &rest].concat()), &[]);
    }
    if let Some((identity, sequence)) = window.stamp() {
        builder.set_producer(identity.id, identity.epoch, sequence);
    }
    builder.build().unwrap()
}

/// A promise to so many bytes of `buffer`, and what keeps watch over it.
fn promise(buffer: &Arc<Semaphore>) -> (Promise, Arc<Completion>) {
    let completion = Completion::new("t".into(), 0);
    let mut promise = Promise::new(completion.clone(), buffer.clone());
    promise.take_on(10);
    (promise, completion)
}

fn admit(
    window: &mut Window,
    buffer: &Arc<Semaphore>,
    value: u32,
    records: i32,
    expires_at: Instant,
) -> Arc<Completion> {
    let (promise, completion) = promise(buffer);
    window.admit(batch(window, value, records), records, promise, expires_at);
    completion
}

fn buffer() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}

fn refusal(code: ErrorCode) -> Refusal {
    wire::Error::new(code, "refused").into()
}

fn timed_out(completion: &Completion, sent: bool) -> ProduceError {
    ProduceError::TimedOut {
        topic: completion.topic().clone(),
        partition: 0,
        after: Duration::ZERO,
        sent,
        reason: None,
    }
}

fn written(base_offset: i64) -> Written {
    Written { base_offset, log_append_time_ms: -1, durability: Durability::Flushed, duplicate: false }
}

fn outcome(completion: &Arc<Completion>) -> Option<Result<i64, ErrorCode>> {
    outcome_of(completion, 0)
}

fn outcome_of(completion: &Arc<Completion>, index: i32) -> Option<Result<i64, ErrorCode>> {
    let result = super::super::Delivery::new(completion.clone(), index, 0).try_result()?;
    Some(result.map(|a| a.offset).map_err(|error| match error {
        // Of whatever kind.
        ProduceError::OutcomeUnknown { .. } => ErrorCode::TimedOut,
        error => error.code().unwrap_or(ErrorCode::TimedOut),
    }))
}

fn sequences(window: &Window) -> Vec<(i16, i32)> {
    let headers = window.in_flight.iter().map(|sent| BatchHeader::parse(&sent.bytes).unwrap());
    headers.map(|h| (h.producer_epoch, h.base_sequence)).collect()
}

#[test]
fn what_was_sent_is_sent_again_with_its_sequence_on_another_stream() {
    let (mut window, buffer, far) = empty();
    let first = admit(&mut window, &buffer, 1, 3, far);
    let second = admit(&mut window, &buffer, 2, 2, far);
    let (id, sent) = window.next_to_send().unwrap();
    assert_eq!(id, 1);
    assert_eq!(window.next_to_send().unwrap().0, 2);
    assert!(window.next_to_send().is_none());
    window.reopened(None);
    assert_eq!(window.next_to_send().unwrap(), (1, sent), "the very same bytes");
    window.acknowledged(1, written(100)).unwrap();
    assert_eq!(outcome(&first), Some(Ok(100)));
    assert!(window.acknowledged(1, written(100)).is_err(), "an answer nobody waits for");
    assert_eq!(outcome(&second), None);
    assert_eq!(buffer.available_permits(), 10);
}

#[test]
fn a_refused_batch_fails_alone_and_those_behind_it_go_on_under_a_higher_epoch() {
    let (mut window, buffer, far) = empty();
    let poison = admit(&mut window, &buffer, 1, 3, far);
    let behind = admit(&mut window, &buffer, 2, 2, far);
    let _ = (window.next_to_send(), window.next_to_send());
    assert_eq!(window.refused(1, refusal(ErrorCode::InvalidRecord)), Ok(Next::HigherEpoch));
    assert_eq!(outcome(&poison), Some(Err(ErrorCode::InvalidRecord)));
    window.become_producer(NEXT_IDENTITY);
    assert_eq!(outcome(&behind), None);
    assert_eq!(sequences(&window), [(1, 0)]);
    assert_eq!(window.stamp(), Some((NEXT_IDENTITY, 2)));
    for sent in &window.in_flight {
        headwater_proto::batch::check(&sent.bytes).expect("the checksum covers the new numbers");
    }
}

#[test]
fn a_timed_out_batch_that_a_broker_may_have_keeps_its_place_and_one_that_was_never_sent_gives_it_up() {
    let now = Instant::now();
    let (mut window, buffer, _) = empty();
    let sent = admit(&mut window, &buffer, 1, 3, now);
    let _ = window.next_to_send();
    let unsent = admit(&mut window, &buffer, 2, 4, now);
    let young = admit(&mut window, &buffer, 3, 5, now + Duration::from_secs(9));
    window.expire(now, timed_out);
    assert!(outcome(&sent).is_some() && outcome(&unsent).is_some() && outcome(&young).is_none());
    assert_eq!(sequences(&window), [(0, 0), (0, 3)], "no gap before the young one");
    window.reopened(None);
    assert_eq!(window.next_to_send().map(|(id, _)| id), Some(1), "the timed out one goes first");
    window.acknowledged(1, written(0)).unwrap();
    let _ = window.next_to_send();
    window.acknowledged(2, written(3)).unwrap();
    assert_eq!(outcome(&young), Some(Ok(3)));
    assert!(window.is_empty());
}

#[test]
fn a_batch_that_cannot_be_sent_fails_in_its_turn_and_leaves_no_gap() {
    let (mut window, buffer, far) = empty();
    let first = admit(&mut window, &buffer, 1, 3, far);
    let (promised, hopeless) = promise(&buffer);
    window.admit_failed(ProduceError::BufferFull, promised, far);
    let last = admit(&mut window, &buffer, 2, 2, far);
    let sent: Vec<u64> = std::iter::from_fn(|| window.next_to_send()).map(|(id, _)| id).collect();
    assert_eq!(sent, [1, 2]);
    assert_eq!(outcome(&hopeless), None, "the first one has no outcome yet");
    window.acknowledged(1, written(0)).unwrap();
    assert!(outcome(&first).is_some() && outcome(&hopeless).is_some_and(|o| o.is_err()) && outcome(&last).is_none());
    assert_eq!(sequences(&window), [(0, 3)]);
    window.acknowledged(2, written(3)).unwrap();
    window.admit_failed(ProduceError::BufferFull, promise(&buffer).0, far);
    assert!(window.is_empty(), "with nothing before it, it fails at once");
    assert_eq!(buffer.available_permits(), 40);
}

/// What a leader's log holds may not be kept yet: a leader that refused it for its form, because the topic's limits are others by now, and
/// died, left a producer that was told of success, and no record.
#[test]
fn a_refusal_of_what_the_log_holds_already_is_neither_a_failure_nor_a_promise() {
    let form = [ErrorCode::MessageTooLarge, ErrorCode::InvalidTimestamp, ErrorCode::UnsupportedCompression];
    for code in form.into_iter().chain([ErrorCode::DuplicateSequence]) {
        let (mut window, buffer, far) = empty();
        let first = admit(&mut window, &buffer, 1, 3, far);
        let behind = admit(&mut window, &buffer, 2, 2, far);
        let _ = window.next_to_send();
        window.reopened(Some((0, 2)));
        let _ = (window.next_to_send(), window.next_to_send());
        assert_eq!(window.refused(1, refusal(code)), Ok(Next::Resend));
        let told = super::super::Delivery::new(first, 0, 0).try_result().unwrap();
        match (code, told) {
            // So many came after it that it is kept.
            (ErrorCode::DuplicateSequence, told) => assert_eq!(told.unwrap().offset, -1),
            (_, told) => assert!(matches!(told, Err(ProduceError::OutcomeUnknown { .. })), "{code}: {told:?}"),
        }
        assert_eq!((sequences(&window), outcome(&behind)), (vec![(0, 3)], None), "the log goes on behind it");
        assert_eq!(buffer.available_permits(), 10);
    }
}

fn too_large(limit: usize) -> impl Fn(usize) -> ProduceError {
    move |bytes| ProduceError::TooLarge { topic: "t".into(), bytes, limit }
}

#[test]
fn a_batch_that_is_too_large_is_split_within_its_sequences_and_those_behind_it_keep_theirs() {
    let (mut window, buffer, far) = empty();
    let large = admit(&mut window, &buffer, 1, 30, far);
    let small = admit(&mut window, &buffer, 2, 2, far);
    let _ = (window.next_to_send(), window.next_to_send());
    assert_eq!(window.refused(1, refusal(ErrorCode::MessageTooLarge)), Ok(Next::Resend));
    window.reopened(None);
    let limit = 140;
    assert_eq!(window.split_large(limit, None, too_large(limit)), Next::Resend);
    let records: Vec<i32> = window.in_flight.iter().map(|sent| sent.records).collect();
    assert_eq!(records.iter().sum::<i32>(), 32);
    assert!(records.len() > 5, "{records:?}");
    let expected = records.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).map(|base| (0, base));
    assert_eq!(sequences(&window), expected.collect::<Vec<_>>());
    assert_eq!(window.stamp(), Some((IDENTITY, 32)));
    let mut offset = 100;
    for (under_way, records) in records.iter().enumerate() {
        let sent = std::iter::from_fn(|| window.next_to_send()).collect::<Vec<_>>();
        assert!(under_way > 0 || sent.len() == 5, "a broker remembers five");
        for (_, bytes) in sent {
            assert!(bytes.len() <= limit);
            headwater_proto::batch::check(&bytes).expect("the checksum covers the numbers");
        }
        window.acknowledged(under_way as u64 + 1, written(offset)).unwrap();
        offset += i64::from(*records);
    }
    let told: Vec<_> = (0..30).map(|i| outcome_of(&large, i).unwrap().unwrap()).collect();
    assert_eq!(told, (100..130).collect::<Vec<_>>());
    assert_eq!(outcome(&small), Some(Ok(130)));
    assert!(window.is_empty() && buffer.available_permits() == 20);
}

/// The topic's limit was lowered while a connection was lost: the parts came behind the whole batch, and after the refusal everything was written
/// once more under another epoch.
#[test]
fn what_may_be_written_yet_by_a_stream_that_was_lost_is_neither_split_nor_numbered_anew() {
    for code in [ErrorCode::MessageTooLarge, ErrorCode::OutOfOrderSequence, ErrorCode::InvalidTimestamp] {
        let (mut window, buffer, far) = empty();
        let completions = [admit(&mut window, &buffer, 1, 3, far), admit(&mut window, &buffer, 2, 2, far)];
        window.reopened(None);
        let _ = (window.next_to_send(), window.next_to_send());
        window.reopened(None);
        let _ = window.next_to_send();
        assert_eq!(window.refused(1, refusal(code)), Ok(Next::HigherEpoch), "{code}");
        for completion in completions {
            let told = super::super::Delivery::new(completion, 0, 0).try_result().unwrap();
            assert!(matches!(told, Err(ProduceError::OutcomeUnknown { .. })), "{code}: {told:?}");
        }
        assert!(window.is_empty());
    }
    let (mut window, buffer, far) = empty();
    let _completion = admit(&mut window, &buffer, 1, 3, far);
    window.reopened(None);
    let _ = window.next_to_send();
    assert_eq!(window.refused(1, refusal(ErrorCode::MessageTooLarge)), Ok(Next::Resend));
    // Nothing was written of the stream on which it was refused.
    window.reopened(None);
    assert_eq!(window.split_large(80, None, too_large(80)), Next::Resend);
    assert_eq!(window.in_flight.len(), 3);
}

#[test]
fn a_refusal_as_too_large_that_no_limit_explains_halves_the_batch_and_a_record_alone_is_refused() {
    let (mut window, buffer, far) = empty();
    let completion = admit(&mut window, &buffer, 1, 40, far);
    while let Some(records) = window.in_flight.front().map(|sent| sent.records).filter(|records| *records > 1) {
        let (id, _) = window.next_to_send().unwrap();
        assert_eq!(window.refused(id, refusal(ErrorCode::MessageTooLarge)), Ok(Next::Resend));
        window.reopened(None);
        assert_eq!(window.split_large(1 << 20, None, too_large(0)), Next::Resend);
        assert!(window.in_flight.front().unwrap().records < records);
        assert_eq!(window.in_flight.iter().map(|sent| sent.records).sum::<i32>(), 40);
    }
    let (id, _) = window.next_to_send().unwrap();
    assert_eq!(window.refused(id, refusal(ErrorCode::MessageTooLarge)), Ok(Next::HigherEpoch));
    assert_eq!(outcome_of(&completion, 0), Some(Err(ErrorCode::MessageTooLarge)));
    assert_eq!(outcome_of(&completion, 1), None);
}

#[test]
fn what_a_broker_refuses_after_it_may_have_written_it_has_no_known_outcome_and_is_never_sent_again() {
    for code in [ErrorCode::PartitionFenced, ErrorCode::UnknownTopicId, ErrorCode::Internal, ErrorCode::Unknown] {
        for in_log in [false, true] {
            let (mut window, buffer, far) = empty();
            let first = admit(&mut window, &buffer, 1, 3, far);
            let second = admit(&mut window, &buffer, 2, 2, far);
            let _ = (window.next_to_send(), window.next_to_send());
            if in_log {
                window.reopened(Some((0, 2)));
                let _ = (window.next_to_send(), window.next_to_send());
            }
            assert_eq!(window.refused(1, refusal(code)), Ok(Next::HigherEpoch));
            for completion in [first, second] {
                let outcome = super::super::Delivery::new(completion, 0, 0).try_result().unwrap();
                let error = outcome.expect_err("a success that nobody promised");
                assert!(matches!(error, ProduceError::OutcomeUnknown { .. }), "{code}: {error}");
            }
            assert!(window.is_empty(), "{code}: sent again, it might be doubled");
            window.become_producer(NEXT_IDENTITY);
            assert_eq!(window.stamp(), Some((NEXT_IDENTITY, 0)), "no gap for what comes later");
            assert_eq!(buffer.available_permits(), 20);
        }
    }
}

#[test]
fn records_that_have_failed_are_not_sent_under_another_epoch() {
    let now = Instant::now();
    let (mut window, buffer, _) = empty();
    let poison = admit(&mut window, &buffer, 1, 1, now + Duration::from_secs(9));
    let late = admit(&mut window, &buffer, 2, 2, now);
    let young = admit(&mut window, &buffer, 3, 3, now + Duration::from_secs(9));
    while window.next_to_send().is_some() {}
    window.acknowledged(1, written(0)).unwrap();
    assert_eq!(outcome(&poison), Some(Ok(0)));
    window.expire(now, timed_out);
    assert!(outcome(&late).is_some() && outcome(&young).is_none());
    assert_eq!(window.refused(2, refusal(ErrorCode::UnknownProducerId)), Ok(Next::HigherEpoch));
    window.become_producer(NEXT_IDENTITY);
    assert_eq!(sequences(&window), [(1, 0)], "only the young one");
    assert_eq!(buffer.available_permits(), 20);
}

#[test]
fn sequences_wrap_from_the_largest_to_zero() {
    assert_eq!(after(i32::MAX - 1, 1), i32::MAX);
    assert_eq!(after(i32::MAX, 1), 0);
    assert_eq!(after(i32::MAX - 1, 5), 3);
}

/// What a broker knows of one producer: Kafka's rules.
#[derive(Default)]
struct Broker {
    log: Vec<u32>,
    epoch: i16,
    next: i32,
    /// Base sequence, last sequence, base offset of the last five.
    recent: Vec<(i32, i32, i64)>,
    forgot: bool,
    /// The largest batch that it takes; 0: any.
    limit: usize,
}

impl Broker {
    fn append(&mut self, batch: &Bytes, poison: &dyn Fn(u32) -> bool) -> Result<i64, ErrorCode> {
        let header = headwater_proto::batch::check(batch).unwrap();
        let records: Vec<u32> = headwater_proto::batch::Records::new(batch)
            .unwrap()
            .map(|r| u32::from_be_bytes(r.unwrap().value.unwrap()[..4].try_into().unwrap()))
            .collect();
        if self.limit > 0 && batch.len() > self.limit {
            return Err(ErrorCode::MessageTooLarge);
        }
        if header.producer_epoch < self.epoch {
            return Err(ErrorCode::InvalidProducerEpoch);
        }
        if header.producer_epoch == self.epoch && !self.forgot {
            let (base, last) = (header.base_sequence, header.last_sequence());
            if let Some(known) = self.recent.iter().find(|r| (r.0, r.1) == (base, last)) {
                return Ok(known.2);
            }
        }
        if poison(records[0]) {
            return Err(ErrorCode::InvalidRecord);
        }
        let expected = if header.producer_epoch > self.epoch { 0 } else { self.next };
        if self.forgot && header.base_sequence != 0 {
            return Err(ErrorCode::UnknownProducerId);
        }
        if !self.forgot && header.base_sequence != expected {
            return Err(ErrorCode::OutOfOrderSequence);
        }
        if header.producer_epoch > self.epoch || self.forgot {
            self.recent.clear();
        }
        self.forgot = false;
        self.epoch = header.producer_epoch;
        self.next = after(header.last_sequence(), 1);
        let offset = self.log.len() as i64;
        self.log.extend(records);
        self.recent.push((header.base_sequence, header.last_sequence(), offset));
        if self.recent.len() > 5 {
            self.recent.remove(0);
        }
        Ok(offset)
    }

    fn last(&self) -> Option<(i32, i32)> {
        self.recent.last().map(|r| (i32::from(self.epoch), r.1))
    }

    /// Opens another stream. Whether another epoch is needed first.
    fn reopen(&self, window: &mut Window) -> bool {
        window.reopened(self.last());
        let limit = if self.limit == 0 { 1 << 20 } else { self.limit };
        window.split_large(limit, None, too_large(limit)) != Next::Resend
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// A batch of so many records comes; one in sixteen is refused by the broker.
    Send(i32, bool),
    /// A batch comes that cannot be sent.
    Hopeless,
    /// So many frames reach the broker.
    Arrive(usize),
    /// So many answers reach the client.
    Answer(usize),
    /// The connection is lost with everything on it; the broker still reads so many frames of it afterwards.
    Lose(usize),
    /// The oldest records' time is up.
    Expire,
    /// The broker forgets the producer, as it does after days.
    Forget,
    /// The topic's limit is set anew: a record alone takes 72 bytes, or 132; a second one 11 more.
    Limit(usize),
    /// The disk fails while the next frame is being written; it may be in the log all the same.
    Fail(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1i32..8, proptest::bool::weighted(0.06)).prop_map(|(n, poison)| Step::Send(n, poison)),
        1 => Just(Step::Hopeless),
        6 => (1usize..4).prop_map(Step::Arrive),
        6 => (1usize..4).prop_map(Step::Answer),
        2 => (0usize..4).prop_map(Step::Lose),
        1 => Just(Step::Expire),
        1 => Just(Step::Forget),
        1 => any::<bool>().prop_map(Step::Fail),
        1 => (68usize..160).prop_map(Step::Limit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("HEADWATER_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(256)
    ))]
    #[test]
    fn the_log_holds_every_batch_once_and_in_order_whatever_is_lost(steps in proptest::collection::vec(step(), 1..120)) {
        let start = Instant::now();
        let mut now = start;
        let (mut window, buffer, _) = empty();
        let mut broker = Broker::default();
        let mut poisoned = std::collections::HashSet::new();
        let mut batches: Vec<(u32, i32, Arc<Completion>)> = Vec::new();
        let mut wire_up: VecDeque<(u64, Bytes)> = VecDeque::new();
        let mut wire_down: VecDeque<(u64, Result<i64, ErrorCode>)> = VecDeque::new();
        let mut failed_stream = false;
        let mut failing: Option<bool> = None;
        // There is no stream before the next epoch is known.
        let mut awaits_epoch = false;
        // Runs the given steps, then lets everything arrive.
        let settle = (0..200).flat_map(|_| [Step::Arrive(5), Step::Answer(5)]);
        for step in steps.into_iter().chain(settle) {
            match step {
                Step::Send(records, poison) if window.room() > 0 => {
                    let value = batches.len() as u32;
                    if poison { poisoned.insert(value); }
                    let completion = admit(&mut window, &buffer, value, records, now + Duration::from_secs(10));
                    batches.push((value, records, completion));
                }
                Step::Hopeless if window.room() > 0 => {
                    let (promise, completion) = promise(&buffer);
                    window.admit_failed(ProduceError::BufferFull, promise, now + Duration::from_secs(10));
                    batches.push((batches.len() as u32, 0, completion));
                }
                Step::Send(..) | Step::Hopeless => {}
                Step::Arrive(n) => for _ in 0..n {
                    let Some((id, bytes)) = wire_up.pop_front() else { break };
                    let result = match failing.take_if(|_| !failed_stream) {
                        _ if failed_stream => Err(ErrorCode::EarlierAppendFailed),
                        None => broker.append(&bytes, &|v| poisoned.contains(&v)),
                        Some(written) => {
                            let refused = written.then(|| broker.append(&bytes, &|v| poisoned.contains(&v)));
                            Err(refused.and_then(Result::err).unwrap_or(ErrorCode::PartitionFenced))
                        }
                    };
                    failed_stream |= result.is_err();
                    wire_down.push_back((id, result));
                },
                Step::Answer(_) if awaits_epoch => {
                    let Identity { id, epoch } = window.identity().unwrap();
                    window.become_producer(Identity { id, epoch: epoch + 1 });
                    awaits_epoch = broker.reopen(&mut window);
                }
                Step::Answer(n) => for _ in 0..n {
                    let Some((id, result)) = wire_down.pop_front() else { break };
                    match result {
                        Ok(offset) => window.acknowledged(id, written(offset)).unwrap(),
                        Err(code) => {
                            let next = window.refused(id, refusal(code)).unwrap();
                            wire_up.clear();
                            wire_down.clear();
                            failed_stream = false;
                            match next {
                                Next::Resend => awaits_epoch = broker.reopen(&mut window),
                                Next::HigherEpoch => awaits_epoch = true,
                                Next::NewIdentity => prop_assert!(false, "nobody else has this id"),
                            }
                            if awaits_epoch { break }
                        }
                    }
                },
                Step::Lose(late) => {
                    // Frames on their way may still be appended before the new stream opens.
                    for (_, bytes) in wire_up.drain(..).take(late) {
                        if failed_stream || broker.append(&bytes, &|v| poisoned.contains(&v)).is_err() { break }
                    }
                    wire_down.clear();
                    failed_stream = false;
                    awaits_epoch |= broker.reopen(&mut window);
                }
                Step::Expire => {
                    now += Duration::from_secs(4);
                    window.expire(now, timed_out);
                }
                // Only where nothing is unanswered: days pass before a broker forgets.
                Step::Forget if window.is_empty() => broker.forgot = true,
                Step::Forget => {}
                Step::Fail(written) => failing = Some(written),
                Step::Limit(bytes) => broker.limit = bytes,
            }
            while !awaits_epoch && let Some(sent) = window.next_to_send() { wire_up.push_back(sent) }
            let told: Vec<bool> = batches.iter().flat_map(|(_, records, completion)| {
                (0..*records.max(&1)).map(|i| outcome_of(completion, i).is_some())
            }).collect();
            prop_assert!(told.is_sorted_by(|a, b| a >= b), "outcomes out of order: {told:?}");
        }
        prop_assert!(window.is_empty(), "everything is answered in the end: {window:?}");
        prop_assert_eq!(buffer.available_permits(), batches.len() * 10);
        let mut in_order = Vec::new();
        for (value, records, completion) in &batches {
            let copies = broker.log.iter().filter(|v| *v == value).count();
            let (mut acknowledged, mut unknown, mut last_offset) = (0, 0, -1);
            for index in 0..*records {
                match outcome_of(completion, index).unwrap() {
                    // It is in the log; where, nobody remembers.
                    Ok(-1) => acknowledged += 1,
                    Ok(offset) => {
                        acknowledged += 1;
                        prop_assert_eq!(broker.log[offset as usize], *value);
                        prop_assert!(offset > last_offset, "each its own, in order");
                        last_offset = offset;
                    }
                    Err(ErrorCode::InvalidRecord | ErrorCode::MessageTooLarge) => {}
                    Err(ErrorCode::TimedOut | ErrorCode::PartitionFenced) => unknown += 1,
                    Err(other) => prop_assert!(false, "{}", other),
                }
            }
            prop_assert!((acknowledged..=acknowledged + unknown).contains(&copies), "acknowledged: there once");
            in_order.extend(std::iter::repeat_n(*value, copies));
        }
        prop_assert_eq!(&broker.log, &in_order, "in the order of sending");
    }
}
