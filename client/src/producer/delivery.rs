//! How a record's sender learns what became of it.
//!
//! Owns: [`Delivery`], the completion that all records of a batch share (one allocation a batch, none a record), and the
//! [`Promise`] to tell it. Refuses: deciding outcomes (see [`super::window`]).
//!
//! What must always hold: every record has an outcome in the end, and the buffer it took is given back, whatever becomes of
//! the task that has it in hand.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};

use headwater_proto::wire::Durability;
use tokio::sync::Semaphore;

use crate::connection::lock;
use crate::error::ProduceError;

/// A record that the cluster has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledgement {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: u32,
    /// The record's offset; -1 where it is not told (`acks=0`).
    pub offset: i64,
    /// The record's timestamp in the log, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// What the acknowledgement promises.
    pub durability: Durability,
    /// Whether the record was in the log already, from an attempt whose answer was lost. It stands there once.
    pub duplicate: bool,
}

/// A durability in one word: `flushed`, `replicated`, `written` or `none`.
pub const fn durability_name(durability: Durability) -> &'static str {
    match durability {
        Durability::Flushed => "flushed",
        Durability::Replicated => "replicated",
        Durability::Written => "written",
        Durability::None => "none",
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    /// -1: not told.
    pub(crate) base_offset: i64,
    /// -1: records keep their own timestamps.
    pub(crate) log_append_time_ms: i64,
    pub(crate) durability: Durability,
    pub(crate) duplicate: bool,
}

/// What is known of a batch's records.
#[derive(Debug)]
enum Fate {
    Told(Result<Written, ProduceError>),
    /// The batch was too large: its records went into others, in order. Each with the place of its first record.
    Split(Vec<(i32, Arc<Completion>)>),
}

/// The shared outcome of a batch's records.
#[derive(Debug)]
pub(crate) struct Completion {
    topic: Arc<str>,
    partition: u32,
    fate: OnceLock<Fate>,
    waiting: Mutex<Vec<Option<Waker>>>,
}

impl Completion {
    pub(crate) fn new(topic: Arc<str>, partition: u32) -> Arc<Completion> {
        Arc::new(Completion { topic, partition, fate: OnceLock::new(), waiting: Mutex::default() })
    }

    pub(crate) fn topic(&self) -> &Arc<str> {
        &self.topic
    }

    pub(crate) fn partition(&self) -> u32 {
        self.partition
    }

    /// Tells everybody. The first outcome stays.
    pub(crate) fn resolve(&self, outcome: Result<Written, ProduceError>) {
        self.decide(Fate::Told(outcome));
    }

    fn decide(&self, fate: Fate) {
        let _ = self.fate.set(fate);
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    fn outcome(&self) -> Option<&Result<Written, ProduceError>> {
        match self.fate.get()? {
            Fate::Told(outcome) => Some(outcome),
            Fate::Split(_) => None,
        }
    }

    /// Where the record at `index` went, and its place there, if the batch was split.
    fn part_of(&self, index: i32) -> Option<(&Arc<Completion>, i32)> {
        let Fate::Split(parts) = self.fate.get()? else { return None };
        let (first, part) = parts.iter().rev().find(|(first, _)| *first <= index)?;
        Some((part, index - first))
    }

    /// Whether the fate is known; else `waker` is woken when it is. `place` is the waiter's own, `None` at first.
    fn poll(&self, place: &mut Option<usize>, waker: &Waker) -> bool {
        if self.fate.get().is_some() {
            return true;
        }
        let mut waiting = lock(&self.waiting);
        if self.fate.get().is_some() {
            return true;
        }
        match place.and_then(|place| waiting.get_mut(place)) {
            Some(slot) => {
                if slot.as_ref().is_none_or(|known| !known.will_wake(waker)) {
                    *slot = Some(waker.clone());
                }
            }
            None => {
                *place = Some(waiting.len());
                waiting.push(Some(waker.clone()));
            }
        }
        false
    }

    /// Waits until all of the records have their outcome.
    pub(crate) async fn resolved(self: &Arc<Self>) {
        let mut last = self.clone();
        loop {
            let mut place = None;
            let known = |cx: &mut Context<'_>| match last.poll(&mut place, cx.waker()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            };
            std::future::poll_fn(known).await;
            // Outcomes are told in order.
            match last.part_of(i32::MAX) {
                Some((part, _)) => last = part.clone(),
                None => return,
            }
        }
    }
}

/// The duty to tell a batch's records their outcome, and to give back the buffer that they take. Where it is dropped
/// undone, a defect ended whoever had it: the records are told so.
#[derive(Debug)]
pub(crate) struct Promise {
    completion: Arc<Completion>,
    /// Bytes of the buffer.
    charge: usize,
    buffer: Arc<Semaphore>,
}

impl Promise {
    pub(crate) fn new(completion: Arc<Completion>, buffer: Arc<Semaphore>) -> Promise {
        Promise { completion, charge: 0, buffer }
    }

    /// One more record, which took `charge` bytes of the buffer.
    pub(crate) fn take_on(&mut self, charge: usize) {
        self.charge += charge;
    }

    pub(crate) fn completion(&self) -> &Arc<Completion> {
        &self.completion
    }

    /// Tells the records; what they take of the buffer is still in use.
    pub(crate) fn tell(&self, outcome: Result<Written, ProduceError>) {
        self.completion.resolve(outcome);
    }

    /// Whether the records have their outcome.
    pub(crate) fn is_told(&self) -> bool {
        self.completion.outcome().is_some()
    }

    /// The same duty to the records of the batches that this one is split into: how many there are in each, and the bytes of
    /// the buffer that they take, of which the last part has the rest. Those that were told stay told.
    pub(crate) fn split(mut self, parts: impl Iterator<Item = (i32, usize)>) -> Vec<Promise> {
        let mut first = 0;
        let mut promises: Vec<Promise> = Vec::new();
        let mut completions = Vec::new();
        for (records, charge) in parts {
            let completion = Completion::new(self.completion.topic.clone(), self.completion.partition);
            completions.push((first, completion.clone()));
            let charge = charge.min(self.charge);
            self.charge -= charge;
            promises.push(Promise { completion, charge, buffer: self.buffer.clone() });
            first += records;
        }
        if let Some(last) = promises.last_mut() {
            last.charge += std::mem::take(&mut self.charge);
            match self.completion.outcome() {
                Some(outcome) => completions.iter().for_each(|(_, part)| part.resolve(outcome.clone())),
                None => self.completion.decide(Fate::Split(completions)),
            }
        }
        promises
    }

    /// Tells the records, and gives the buffer back.
    pub(crate) fn keep(self, outcome: Result<Written, ProduceError>) {
        self.tell(outcome);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if self.completion.fate.get().is_none() {
            let Completion { topic, partition, .. } = &*self.completion;
            self.tell(Err(ProduceError::Defect { topic: topic.clone(), partition: *partition }));
        }
        self.buffer.add_permits(self.charge);
    }
}

/// A record on its way: a future that yields the acknowledgement, or why there is none.
///
/// Deliveries of one partition finish in the order in which their records were sent. Dropping one does not take the
/// record back.
#[derive(Debug)]
#[must_use = "a delivery that nobody looks at may fail unseen; await it, or flush and check"]
pub struct Delivery {
    completion: Arc<Completion>,
    /// The record's place in its batch.
    index: i32,
    timestamp_ms: i64,
    place: Option<usize>,
}

impl Delivery {
    pub(crate) fn new(completion: Arc<Completion>, index: i32, timestamp_ms: i64) -> Delivery {
        Delivery { completion, index, timestamp_ms, place: None }
    }

    /// The topic.
    pub fn topic(&self) -> &Arc<str> {
        &self.completion.topic
    }

    /// The partition that the record goes to.
    pub fn partition(&self) -> u32 {
        self.completion.partition
    }

    /// The outcome, if it is known already.
    pub fn try_result(&self) -> Option<Result<Acknowledgement, ProduceError>> {
        let (mut completion, mut index) = (&self.completion, self.index);
        while let Some((part, place)) = completion.part_of(index) {
            (completion, index) = (part, place);
        }
        Some(completion.outcome()?.as_ref().map_err(Clone::clone).map(|written| Acknowledgement {
            topic: self.completion.topic.clone(),
            partition: self.completion.partition,
            offset: if written.base_offset < 0 { -1 } else { written.base_offset + i64::from(index) },
            timestamp_ms: if written.log_append_time_ms < 0 { self.timestamp_ms } else { written.log_append_time_ms },
            durability: written.durability,
            duplicate: written.duplicate,
        }))
    }
}

impl Future for Delivery {
    type Output = Result<Acknowledgement, ProduceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let mut place = self.place;
            let known = self.completion.poll(&mut place, cx.waker());
            self.place = place;
            if !known {
                return Poll::Pending;
            }
            match self.completion.part_of(self.index).map(|(part, index)| (part.clone(), index)) {
                Some((part, index)) => (self.completion, self.index, self.place) = (part, index, None),
                None => return self.try_result().map_or(Poll::Pending, Poll::Ready),
            }
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(place) = self.place
            && let Some(slot) = lock(&self.completion.waiting).get_mut(place)
        {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn written(base_offset: i64) -> Written {
        Written { base_offset, log_append_time_ms: -1, durability: Durability::Flushed, duplicate: false }
    }

    #[test]
    fn records_whose_task_ends_by_a_defect_are_told_and_the_buffer_is_whole_again() {
        let buffer = Arc::new(Semaphore::new(0));
        let completion = Completion::new("t".into(), 3);
        let mut promise = Promise::new(completion.clone(), buffer.clone());
        promise.take_on(70);
        promise.take_on(30);
        let ended = std::thread::spawn(move || {
            let _in_hand = promise;
            panic!("a defect");
        });
        assert!(ended.join().is_err());
        let outcome = Delivery::new(completion, 0, 0).try_result().unwrap();
        assert!(matches!(outcome, Err(ProduceError::Defect { partition: 3, .. })), "{outcome:?}");
        assert_eq!(buffer.available_permits(), 100);
    }

    #[tokio::test]
    async fn records_of_a_batch_that_is_split_learn_their_own_offsets_and_the_buffer_is_whole_again() {
        let buffer = Arc::new(Semaphore::new(0));
        let completion = Completion::new("t".into(), 3);
        let mut whole = Promise::new(completion.clone(), buffer.clone());
        whole.take_on(100);
        let waiting = |range: std::ops::Range<i32>| {
            let deliveries = range.map(|i| Delivery::new(completion.clone(), i, 0));
            tokio::spawn(futures::future::join_all(deliveries.collect::<Vec<_>>()))
        };
        let (early, flush) = (waiting(0..6), completion.clone());
        let flush = tokio::spawn(async move { flush.resolved().await });
        tokio::task::yield_now().await;
        let mut parts = whole.split([(2, 30), (4, 30)].into_iter()).into_iter();
        let late = waiting(0..6);
        parts.next().unwrap().keep(Ok(written(40)));
        assert_eq!(buffer.available_permits(), 30);
        tokio::task::yield_now().await;
        assert!(!flush.is_finished());
        // And once more.
        let mut again = parts.next().unwrap().split([(1, 5), (3, 5)].into_iter()).into_iter();
        again.next().unwrap().keep(Err(ProduceError::Closed));
        again.next().unwrap().keep(Ok(written(70)));
        flush.await.unwrap();
        let offsets = |told: Vec<Result<Acknowledgement, ProduceError>>| {
            told.into_iter().map(|r| r.map_or(-1, |a| a.offset)).collect::<Vec<_>>()
        };
        assert_eq!(offsets(early.await.unwrap()), [40, 41, -1, 70, 71, 72]);
        assert_eq!(offsets(late.await.unwrap()), [40, 41, -1, 70, 71, 72]);
        assert_eq!(buffer.available_permits(), 100);
    }

    #[tokio::test]
    async fn every_record_of_a_batch_learns_its_own_offset_from_one_outcome() {
        let completion = Completion::new("t".into(), 3);
        let mut deliveries: Vec<Delivery> =
            (0..3).map(|i| Delivery::new(completion.clone(), i, 1000 + i64::from(i))).collect();
        for delivery in &mut deliveries {
            assert!(delivery.now_or_never().is_none());
        }
        drop(deliveries.remove(0));
        let waiting = tokio::spawn(futures::future::join_all(deliveries));
        tokio::task::yield_now().await;
        completion.resolve(Ok(written(40)));
        let told: Vec<_> = waiting.await.unwrap().into_iter().map(|r| r.unwrap()).collect();
        assert_eq!(told.iter().map(|a| (a.offset, a.timestamp_ms)).collect::<Vec<_>>(), [(41, 1001), (42, 1002)]);
        completion.resolve(Err(ProduceError::Closed));
        assert!(Delivery::new(completion, 0, 0).await.is_ok(), "the first outcome stays");
    }
}
