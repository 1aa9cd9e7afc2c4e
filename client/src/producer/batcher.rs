//! How records of one partition become batches.
//!
//! Owns: [`Batcher`], pure: it takes `now` and says when a batch is due. Refuses: clocks, streams, sequences (see
//! [`super::window`]). Read next: [`super::partition`], which drives both.
//!
//! What must always hold: records leave in the order in which they came; a batch is never larger than the limit unless
//! one record alone is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headwater_proto::batch::{BatchBuilder, BuildOptions, Codec, HEADER_BYTES, Header};
use headwater_proto::limits::{MAX_BATCH_BYTES, MAX_RECORDS_PER_BATCH};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::delivery::{Completion, Delivery, Promise};
use super::split::fill_limit;
use crate::error::ProduceError;
use crate::retry::after;

/// When batches are due, and what they look like.
#[derive(Debug, Clone)]
pub(crate) struct BatcherConfig {
    /// A batch this large is due at once, in bytes before compression.
    pub(crate) batch_bytes: usize,
    /// A batch is due this long after its first record.
    pub(crate) linger: Duration,
    /// A record that has no outcome after this long fails.
    pub(crate) delivery_timeout: Duration,
    pub(crate) codec: Codec,
    pub(crate) compression_level: Option<i32>,
}

/// A record's contents.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) timestamp_ms: i64,
    pub(crate) key: Option<&'a Bytes>,
    pub(crate) value: Option<&'a Bytes>,
    pub(crate) headers: &'a [Header],
}

impl Parts<'_> {
    /// The most bytes that the record takes in a batch.
    pub(crate) fn bound(&self) -> usize {
        BatchBuilder::record_bound(self.key.map(|k| &**k), self.value.map(|v| &**v), self.headers)
    }
}

/// Records that will be one batch.
#[derive(Debug)]
pub(crate) struct Filling {
    pub(crate) builder: BatchBuilder,
    pub(crate) promise: Promise,
    /// When its first record came.
    pub(crate) since: Instant,
    /// The first record's time, from which a batch tells all others.
    base_timestamp_ms: i64,
}

/// The records of one partition that were not sent yet.
#[derive(Debug)]
pub(crate) struct Batcher {
    topic: Arc<str>,
    partition: u32,
    config: BatcherConfig,
    /// The producer's, of which the records hold a part.
    buffer: Arc<Semaphore>,
    max_message_bytes: usize,
    /// Complete batches, oldest first; behind them the one being filled.
    full: VecDeque<Filling>,
    open: Option<Filling>,
    /// Bytes of the last complete batch: the next one is likely to need as many.
    typical_bytes: usize,
    /// The newest batch's outcome: when it is known, so are all before it.
    last: Option<Arc<Completion>>,
    /// No more records are taken, for this reason.
    closed: Option<ProduceError>,
}

impl Batcher {
    pub(crate) fn new(
        topic: Arc<str>,
        partition: u32,
        config: BatcherConfig,
        buffer: Arc<Semaphore>,
        max_message_bytes: usize,
    ) -> Batcher {
        let mut batcher = Batcher {
            topic,
            partition,
            config,
            buffer,
            max_message_bytes: 0,
            full: VecDeque::new(),
            open: None,
            typical_bytes: 1024,
            last: None,
            closed: None,
        };
        batcher.set_max_message_bytes(max_message_bytes);
        batcher
    }

    /// The topic's `max.message.bytes`; 0: unknown.
    pub(crate) fn set_max_message_bytes(&mut self, bytes: usize) {
        self.max_message_bytes = if bytes == 0 { MAX_BATCH_BYTES } else { bytes.min(MAX_BATCH_BYTES) };
    }

    pub(crate) fn max_message_bytes(&self) -> usize {
        self.max_message_bytes
    }

    /// Adds a record that holds `charge` bytes of the buffer. Also says whether whoever sends should look: a batch began,
    /// or one became full. `now` is only asked where a batch begins: clocks are dear at a million records a second.
    ///
    /// # Errors
    /// When the record alone is too large for the topic, or no more records are taken.
    pub(crate) fn append(
        &mut self,
        parts: Parts<'_>,
        charge: usize,
        now: impl FnOnce() -> Instant,
    ) -> Result<(Delivery, bool), ProduceError> {
        if let Some(reason) = &self.closed {
            return Err(reason.clone());
        }
        let bound = parts.bound();
        let limit = self.batch_limit();
        let too_long = |open: &Filling| {
            open.builder.size_estimate() + bound > limit
                || open.builder.record_count() >= MAX_RECORDS_PER_BATCH
                || parts.timestamp_ms.checked_sub(open.base_timestamp_ms).is_none()
        };
        let mut notable = false;
        if self.open.as_ref().is_some_and(too_long) {
            self.complete();
            notable = true;
        }
        // With a codec the batch's size is known only once it is compressed.
        if HEADER_BYTES + bound > self.max_message_bytes && self.config.codec == Codec::None {
            let mut alone = BatchBuilder::new(BuildOptions::default());
            Self::put(&mut alone, parts);
            if alone.size_estimate() > self.max_message_bytes {
                return Err(self.too_large(alone.size_estimate()));
            }
        }
        if self.open.is_none() {
            notable = true;
        }
        let open = self.open.get_or_insert_with(|| {
            let options = BuildOptions {
                codec: self.config.codec,
                compression_level: self.config.compression_level,
                ..BuildOptions::default()
            };
            let completion = Completion::new(self.topic.clone(), self.partition);
            self.last = Some(completion.clone());
            let builder = BatchBuilder::with_capacity(options, self.typical_bytes.max(HEADER_BYTES + bound));
            let promise = Promise::new(completion, self.buffer.clone());
            Filling { builder, promise, since: now(), base_timestamp_ms: parts.timestamp_ms }
        });
        let index = Self::put(&mut open.builder, parts);
        open.promise.take_on(charge);
        let delivery = Delivery::new(open.promise.completion().clone(), index, parts.timestamp_ms);
        if open.builder.size_estimate() >= limit {
            self.complete();
            notable = true;
        }
        Ok((delivery, notable))
    }

    /// The next batch that is due at `now`. `hurry`: the one being filled is due whatever its age.
    pub(crate) fn take(&mut self, now: Instant, hurry: bool) -> Option<Filling> {
        if let Some(full) = self.full.pop_front() {
            return Some(full);
        }
        let due = self.open.as_ref().is_some_and(|open| hurry || now >= after(open.since, self.config.linger));
        if due {
            self.complete();
        }
        self.full.pop_front()
    }

    /// When the batch being filled becomes due; `None` if there is none or a full one is due already.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        if self.full.is_empty() { self.open.as_ref().map(|open| after(open.since, self.config.linger)) } else { None }
    }

    /// When the oldest record that was not sent fails.
    pub(crate) fn expires_at(&self) -> Option<Instant> {
        self.full.front().or(self.open.as_ref()).map(|oldest| after(oldest.since, self.config.delivery_timeout))
    }

    /// Takes out the batches that were not sent in time, oldest first.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Filling> {
        let mut expired = Vec::new();
        while self.expires_at().is_some_and(|at| now >= at) {
            expired.extend(self.full.pop_front().or_else(|| self.open.take()));
        }
        expired
    }

    /// What is being filled is full now, whatever its size. Returns the outcome to wait for: all before it are known then.
    pub(crate) fn seal(&mut self) -> Option<Arc<Completion>> {
        self.complete();
        self.last.clone()
    }

    /// Gives back everything that was not sent.
    pub(crate) fn drain(&mut self) -> Vec<Filling> {
        self.complete();
        self.full.drain(..).collect()
    }

    /// Takes no more records, and gives back what is left. The first reason stays.
    pub(crate) fn close(&mut self, reason: ProduceError) -> Vec<Filling> {
        self.closed.get_or_insert(reason);
        self.drain()
    }

    /// Whether no more records are taken.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.full.is_empty() && self.open.is_none()
    }

    pub(crate) fn too_large(&self, bytes: usize) -> ProduceError {
        ProduceError::TooLarge { topic: self.topic.clone(), bytes, limit: self.max_message_bytes }
    }

    fn complete(&mut self) {
        if let Some(open) = self.open.take() {
            self.typical_bytes = open.builder.size_estimate();
            self.full.push_back(open);
        }
    }

    /// The size at which a batch of several records is full.
    fn batch_limit(&self) -> usize {
        self.config.batch_bytes.min(fill_limit(self.config.codec, self.max_message_bytes))
    }

    fn put(builder: &mut BatchBuilder, parts: Parts<'_>) -> i32 {
        builder.append(parts.timestamp_ms, parts.key.map(|k| &**k), parts.value.map(|v| &**v), parts.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_proto::batch::Records;
    use proptest::prelude::*;

    fn config(batch_bytes: usize, linger_ms: u64) -> BatcherConfig {
        BatcherConfig {
            batch_bytes,
            linger: Duration::from_millis(linger_ms),
            delivery_timeout: Duration::from_secs(2),
            codec: Codec::None,
            compression_level: None,
        }
    }

    fn batcher(batch_bytes: usize, linger_ms: u64) -> Batcher {
        Batcher::new("t".into(), 0, config(batch_bytes, linger_ms), Arc::new(Semaphore::new(0)), 10_000)
    }

    fn add(batcher: &mut Batcher, value: &[u8], now: Instant) -> Result<bool, ProduceError> {
        let value = Bytes::copy_from_slice(value);
        let parts = Parts { timestamp_ms: 1, key: None, value: Some(&value), headers: &[] };
        batcher.append(parts, value.len(), || now).map(|(_, notable)| notable)
    }

    fn values(filling: Filling) -> Vec<Vec<u8>> {
        let batch = filling.builder.build().unwrap();
        Records::new(&batch).unwrap().map(|r| r.unwrap().value.unwrap().to_vec()).collect()
    }

    #[test]
    fn a_batch_is_due_when_it_is_full_or_its_first_record_has_lingered() {
        let now = Instant::now();
        let mut batcher = batcher(300, 5);
        assert!(add(&mut batcher, b"first", now).unwrap(), "the sender must learn that a batch began");
        assert!(!add(&mut batcher, b"second", now + Duration::from_millis(4)).unwrap());
        assert!(batcher.take(now + Duration::from_millis(4), false).is_none());
        assert_eq!(batcher.due_at(), Some(now + Duration::from_millis(5)));
        let due = batcher.take(now + Duration::from_millis(5), false).unwrap();
        assert_eq!(values(due), [b"first".to_vec(), b"second".to_vec()]);
        assert!(batcher.is_empty());
        add(&mut batcher, &[1; 150], now).unwrap();
        assert!(add(&mut batcher, &[2; 150], now).unwrap(), "the first one is full");
        assert_eq!(batcher.take(now, false).map(values), Some(vec![vec![1; 150]]));
        assert!(batcher.take(now, false).is_none(), "the second one is not");
        assert_eq!(batcher.take(now, true).map(values), Some(vec![vec![2; 150]]), "unless somebody waits for it");
    }

    #[test]
    fn a_record_beyond_max_message_bytes_is_refused_by_name_and_the_next_is_taken() {
        let now = Instant::now();
        let mut batcher = batcher(300, 0);
        let exact = 10_000 - (HEADER_BYTES + 9);
        let error = add(&mut batcher, &vec![0; exact + 10], now).unwrap_err();
        assert!(error.to_string().contains("max.message.bytes"), "{error}");
        add(&mut batcher, &vec![0; exact - 10], now).unwrap();
        assert_eq!(
            batcher.take(now, false).unwrap().builder.record_count(),
            1,
            "larger than a batch, and alone in one"
        );
        assert!(batcher.is_empty());
    }

    #[test]
    fn what_was_not_sent_in_time_comes_out_oldest_first() {
        let now = Instant::now();
        let mut batcher = batcher(150, 1000);
        for (i, ms) in [0u64, 500, 1000, 3000].into_iter().enumerate() {
            add(&mut batcher, &[i as u8; 100], now + Duration::from_millis(ms)).unwrap();
        }
        assert_eq!(batcher.expires_at(), Some(now + Duration::from_secs(2)));
        let expired: Vec<u8> =
            batcher.expire(now + Duration::from_secs(3)).into_iter().map(|f| values(f)[0][0]).collect();
        assert_eq!(expired, [0, 1, 2]);
        assert!(!batcher.is_empty());
        let rest = batcher.close(ProduceError::Closed);
        assert_eq!(rest.len(), 1);
        assert!(add(&mut batcher, b"late", now).is_err());
    }

    #[test]
    fn no_wait_is_too_long() {
        let now = Instant::now();
        let config = BatcherConfig { linger: Duration::MAX, delivery_timeout: Duration::MAX, ..config(1000, 0) };
        let mut batcher = Batcher::new("t".into(), 0, config, Arc::new(Semaphore::new(0)), 10_000);
        add(&mut batcher, b"patient", now).unwrap();
        assert!(batcher.take(now, false).is_none());
        assert!(batcher.due_at() > Some(now) && batcher.expires_at() > Some(now));
        assert!(batcher.take(now, true).is_some());
    }

    #[test]
    fn a_time_too_far_from_the_first_begins_another_batch() {
        let now = Instant::now();
        let mut batcher = batcher(1000, 0);
        for timestamp_ms in [-1, i64::MAX - 1, i64::MAX, 5] {
            let parts = Parts { timestamp_ms, key: None, value: None, headers: &[] };
            let _ = batcher.append(parts, 0, || now).unwrap();
        }
        let batches: Vec<_> =
            std::iter::from_fn(|| batcher.take(now, true)).map(|f| f.builder.build().unwrap()).collect();
        for batch in &batches {
            headwater_proto::batch::walk(batch, headwater_proto::batch::WalkRules::default()).unwrap();
        }
        assert_eq!(batches.len(), 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn records_leave_once_in_order_and_batches_keep_their_limit(
            sizes in proptest::collection::vec(0usize..400, 1..100),
            limit in 100usize..1000,
            takes in proptest::collection::vec(any::<bool>(), 100),
        ) {
            let now = Instant::now();
            let mut batcher = batcher(limit, 0);
            let mut out = Vec::new();
            let mut collect = |filling: Filling| {
                assert!(filling.builder.size_estimate() <= limit || filling.builder.record_count() == 1);
                out.extend(values(filling));
            };
            for (i, size) in sizes.iter().enumerate() {
                add(&mut batcher, &vec![i as u8; *size], now).unwrap();
                if takes[i] && let Some(filling) = batcher.take(now, false) { collect(filling) }
            }
            while let Some(filling) = batcher.take(now, true) { collect(filling) }
            let expected: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, n)| vec![i as u8; *n]).collect();
            prop_assert_eq!(out, expected);
            prop_assert_eq!(batcher.buffer.available_permits(), sizes.iter().sum::<usize>());
        }
    }
}
