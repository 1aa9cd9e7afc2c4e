//! The batches of one partition that were sent and not yet acknowledged.
//!
//! Owns: sequences, the order of sending and resending, and what follows from each answer: pure. Refuses: streams,
//! clocks, and batches that were never sent (see [`super::batcher`]). Read next: [`super::exchange`], which drives it.
//!
//! What must always hold:
//! * Outcomes are told in the order in which the batches came.
//! * Sequences in the window follow one another without a gap, and the window's last one is followed by `next_sequence`.
//! * A batch that a broker may have is sent again with the same sequence until its outcome is known, even after its
//!   records were failed by the delivery timeout: leaving it out would leave a gap, and numbering those behind it anew
//!   could double them, because a broker may have them too.
//! * A batch of several records that the broker refuses as too large is split: nothing of it was written, so its parts
//!   share the sequences that it had, and those behind it keep theirs.
//! * Sequences are given anew, under a higher producer epoch, only when it is certain that no batch of the window was
//!   written: the broker refused the oldest one before it looked for room in the log, and with it all behind it; and its log holds
//!   none of it from before, and no stream ended before it had told what became of them. The higher
//!   epoch fences copies that may still be on their way. After any other refusal for good nobody knows what was written:
//!   the whole window fails as such, and nothing of it is sent again.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchHeader, HEADER_BYTES};
use headwater_proto::wire::Durability;
use tokio::time::Instant;

use super::delivery::{Completion, Promise, Written};
use super::split::{Part, split};
use crate::error::{ProduceError, Refusal};
use crate::planted::{Bug, planted};

/// Who a producer is to a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) id: i64,
    pub(crate) epoch: i16,
}

/// A batch in the window.
#[derive(Debug)]
pub(crate) struct Sent {
    bytes: Bytes,
    /// 0 where it is not sent.
    records: i32,
    /// On the current stream; 0: not sent on it yet.
    request_id: u64,
    /// Told before its time where the records have failed and only the place in the sequence is still to be filled.
    promise: Promise,
    expires_at: Instant,
    base_sequence: i32,
    /// It was given to a stream at least once: a broker may have it.
    tried: bool,
    /// It was given to a stream that ended before its outcome was known: a copy of it may yet be written there, or be in the log of a leader
    /// that leads no more and may lead again.
    elsewhere: bool,
    /// The broker said that its log holds it; only its offset is still to be told.
    in_log: bool,
    /// The broker refused it as too large: it is split before anything is sent again.
    too_large: bool,
    /// It is not sent, since it cannot be written: it stands here so that outcomes come in order.
    failure: Option<ProduceError>,
}

/// A batch that is larger than the topic allows.
pub(crate) struct Large {
    pub(crate) bytes: Bytes,
    pub(crate) records: i32,
    pub(crate) promise: Promise,
    pub(crate) expires_at: Instant,
}

/// What to do after a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Next {
    /// Open the stream anew, after a pause, and send the window again as it is.
    Resend,
    /// As [`Next::Resend`], as the same producer under a later epoch, which [`Window::become_producer`] has to be told first.
    HigherEpoch,
    /// As [`Next::HigherEpoch`], under a producer id of its own: the present one is of no more use.
    NewIdentity,
}

/// The peer answered what was not asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an answer to append {got} where {expected:?} was the oldest")]
pub(crate) struct WrongAnswer {
    got: u64,
    expected: Option<u64>,
}

/// Sent and unacknowledged batches, oldest first.
#[derive(Debug)]
pub(crate) struct Window {
    /// `None`: not idempotent.
    identity: Option<Identity>,
    next_sequence: i32,
    in_flight: VecDeque<Sent>,
    capacity: usize,
    last_request_id: u64,
    /// The broker refused the oldest batch on this stream before it was written, and with it all behind it.
    is_refused: bool,
}

impl Window {
    pub(crate) fn new(identity: Option<Identity>, capacity: usize) -> Window {
        let in_flight = VecDeque::with_capacity(capacity);
        Window { identity, next_sequence: 0, in_flight, capacity, last_request_id: 0, is_refused: false }
    }

    pub(crate) fn identity(&self) -> Option<Identity> {
        self.identity
    }

    /// How many more batches may be sent.
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.in_flight.len())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// The producer and sequence for the next batch, which must then be [`Window::admit`]ted.
    pub(crate) fn stamp(&self) -> Option<(Identity, i32)> {
        self.identity.map(|identity| (identity, self.next_sequence))
    }

    /// Takes a batch in that carries the current [`Window::stamp`].
    pub(crate) fn admit(&mut self, bytes: Bytes, records: i32, promise: Promise, expires_at: Instant) {
        let base_sequence = self.next_sequence;
        self.next_sequence = after(base_sequence, records);
        self.in_flight.push_back(Sent {
            bytes,
            records,
            request_id: 0,
            promise,
            expires_at,
            base_sequence,
            tried: false,
            elsewhere: false,
            in_log: false,
            too_large: false,
            failure: None,
        });
    }

    /// Takes in a batch that cannot be sent. It fails once everything before it has its outcome.
    pub(crate) fn admit_failed(&mut self, failure: ProduceError, promise: Promise, expires_at: Instant) {
        self.admit(Bytes::new(), 0, promise, expires_at);
        if let Some(last) = self.in_flight.back_mut() {
            last.failure = Some(failure);
        }
        self.fail_oldest();
    }

    /// Takes in a batch of nobody's that is larger than `limit` as several. Records that are too large alone fail in their
    /// turn, as `too_large` says of their size.
    pub(crate) fn admit_split(
        &mut self,
        batch: Large,
        limit: usize,
        compression_level: Option<i32>,
        too_large: impl Fn(usize) -> ProduceError,
    ) {
        let Large { bytes, records, promise, expires_at } = batch;
        let parts = match records {
            1 => Vec::new(),
            _ => split(&bytes, limit, false, compression_level).unwrap_or_default(),
        };
        if parts.is_empty() {
            return self.admit_failed(too_large(bytes.len()), promise, expires_at);
        }
        let promises = promise.split(parts.iter().map(|part| (part.records, part.charge)));
        for (part, promise) in parts.into_iter().zip(promises) {
            if part.bytes.len() > limit {
                self.admit_failed(too_large(part.bytes.len()), promise, expires_at);
            } else {
                let bytes = match self.stamp() {
                    Some((identity, sequence)) => restamp(part.bytes, identity, sequence),
                    None => part.bytes,
                };
                self.admit(bytes, part.records, promise, expires_at);
            }
        }
    }

    /// Where the broker refused a batch as too large: makes several of it and of all others beyond the `limit`, which were
    /// refused with it or never sent. Records that are too large alone fail in their turn.
    pub(crate) fn split_large(
        &mut self,
        limit: usize,
        compression_level: Option<i32>,
        too_large: impl Fn(usize) -> ProduceError,
    ) -> Next {
        // Only the oldest is ever refused. Where the log has it after all, those behind it are refused in their turn.
        let refused = |oldest: &mut Sent| std::mem::take(&mut oldest.too_large) && !oldest.in_log;
        if !self.in_flight.front_mut().is_some_and(refused) {
            return Next::Resend;
        }
        let mut failed = false;
        for (i, mut sent) in std::mem::take(&mut self.in_flight).into_iter().enumerate() {
            let refused = i == 0;
            let large = (refused || sent.bytes.len() > limit) && sent.failure.is_none();
            let parts = match large && sent.records > 1 {
                // Were the limit not what it seems, ever smaller parts would find it.
                true => split(&sent.bytes, limit, refused && sent.bytes.len() <= limit, compression_level).ok(),
                false => None,
            };
            let Some(parts) = parts else {
                if large {
                    failed = true;
                    sent.records = 0;
                    sent.failure = Some(too_large(sent.bytes.len()));
                }
                self.in_flight.push_back(sent);
                continue;
            };
            let Sent { promise, expires_at, tried, mut base_sequence, .. } = sent;
            let promises = promise.split(parts.iter().map(|part| (part.records, part.charge)));
            for (Part { bytes, records, .. }, promise) in parts.into_iter().zip(promises) {
                let failure = (bytes.len() > limit).then(|| too_large(bytes.len()));
                failed |= failure.is_some();
                // What is not sent has no sequence.
                let records = if failure.is_some() { 0 } else { records };
                let bytes = match self.identity {
                    Some(identity) => restamp(bytes, identity, base_sequence),
                    None => bytes,
                };
                let (request_id, elsewhere, in_log, too_large) = (0, false, false, false);
                let part = Sent {
                    bytes,
                    records,
                    request_id,
                    promise,
                    expires_at,
                    base_sequence,
                    tried,
                    elsewhere,
                    in_log,
                    too_large,
                    failure,
                };
                self.in_flight.push_back(part);
                base_sequence = after(base_sequence, records);
            }
        }
        self.fail_oldest();
        // What failed leaves a gap.
        if failed { self.renew() } else { Next::Resend }
    }

    /// Tells the failures that nothing stands before.
    fn fail_oldest(&mut self) {
        while let Some(failure) = self.in_flight.front_mut().and_then(|oldest| oldest.failure.take()) {
            if let Some(failed) = self.in_flight.pop_front() {
                failed.promise.keep(Err(failure));
            }
        }
    }

    /// The next batch to be sent on the current stream, under its number there; of the parts of a batch that was split, no
    /// more than the capacity are under way.
    pub(crate) fn next_to_send(&mut self) -> Option<(u64, Bytes)> {
        if self.in_flight.iter().filter(|sent| sent.request_id != 0).count() >= self.capacity {
            return None;
        }
        let is_unsent = |sent: &&mut Sent| sent.request_id == 0 && sent.failure.is_none();
        let unsent = match planted(Bug::NewestSentFirst) {
            true => self.in_flight.iter_mut().rev().find(is_unsent)?,
            false => self.in_flight.iter_mut().find(is_unsent)?,
        };
        self.last_request_id += 1;
        unsent.request_id = self.last_request_id;
        unsent.tried = true;
        Some((unsent.request_id, unsent.bytes.clone()))
    }

    /// Another stream: everything is to be sent again, numbered from 1. `last`: epoch and sequence of the last batch of
    /// this producer that the log holds. What the log holds is sent again all the same: the answer tells its offset, and
    /// comes only when it is as durable as asked.
    pub(crate) fn reopened(&mut self, last: Option<(i32, i32)>) {
        self.last_request_id = 0;
        let is_refused = std::mem::take(&mut self.is_refused) || planted(Bug::CopiesForgotten);
        for sent in &mut self.in_flight {
            sent.elsewhere |= sent.request_id != 0 && !is_refused;
        }
        let known = last.and_then(|(epoch, last_sequence)| {
            self.identity.filter(|identity| i32::from(identity.epoch) == epoch)?;
            self.in_flight.iter().position(|sent| after(sent.base_sequence, sent.records - 1) == last_sequence)
        });
        for (i, sent) in self.in_flight.iter_mut().enumerate() {
            sent.request_id = 0;
            sent.in_log = known.is_some_and(|known| i <= known);
        }
        if planted(Bug::TimedOutLeftOut) {
            self.in_flight.retain(|sent| !sent.promise.is_told());
        }
        if planted(Bug::InLogIsAcknowledged) {
            let known = self.in_flight.iter().take_while(|sent| sent.in_log).count();
            for sent in self.in_flight.drain(..known) {
                let durability = Durability::None;
                sent.promise.keep(Ok(Written { base_offset: -1, log_append_time_ms: -1, durability, duplicate: true }));
            }
        }
    }

    /// The oldest batch is in the log.
    pub(crate) fn acknowledged(&mut self, request_id: u64, written: Written) -> Result<(), WrongAnswer> {
        let sent = self.take_oldest(request_id)?;
        sent.promise.keep(Ok(written));
        self.fail_oldest();
        Ok(())
    }

    /// The oldest batch was refused, and so is everything behind it on this stream.
    ///
    /// # Errors
    /// When another one is the oldest.
    pub(crate) fn refused(&mut self, request_id: u64, refusal: Refusal) -> Result<Next, WrongAnswer> {
        let oldest = self.in_flight.front().map(|sent| sent.request_id);
        if oldest != Some(request_id) || request_id == 0 {
            return Err(WrongAnswer { got: request_id, expected: oldest });
        }
        let in_log = self.in_flight.front().is_some_and(|sent| sent.in_log);
        let may_be_copied = self.identity.is_some() && self.in_flight.front().is_some_and(|sent| sent.elsewhere);
        let is_retried = refusal.retryable && !planted(Bug::RefusedForGood);
        Ok(match refusal.code {
            _ if is_retried => Next::Resend,
            code if !is_before_append(code) => self.abandon(|completion, _| unknown(completion, refusal.clone())),
            // So many came after it that it is kept; where, nobody remembers.
            ErrorCode::DuplicateSequence => {
                let written =
                    Written { base_offset: -1, log_append_time_ms: -1, durability: Durability::None, duplicate: true };
                self.acknowledged(request_id, written)?;
                Next::Resend
            }
            // A copy of it, or of those behind it, may be written yet, or was since the stream was opened: parts of it, or the same under another
            // sequence, would be there beside it.
            code if may_be_copied && !in_log && !is_forgotten(code) => {
                self.abandon(|completion, _| unknown(completion, refusal.clone()))
            }
            // It is in the log of this leader; whether that is kept, nobody says. Those behind it follow on it there.
            _ if in_log => {
                let sent = self.take_oldest(request_id)?;
                let error = unknown(sent.promise.completion(), refusal);
                sent.promise.keep(Err(error));
                self.fail_oldest();
                Next::Resend
            }
            ErrorCode::MessageTooLarge if self.in_flight.front().is_some_and(|sent| sent.records > 1) => {
                self.is_refused = true;
                self.in_flight.iter_mut().take(1).for_each(|sent| sent.too_large = true);
                Next::Resend
            }
            // The log has forgotten this producer; nothing of the window is in it.
            ErrorCode::UnknownProducerId if planted(Bug::ForgottenGoesOn) => Next::Resend,
            ErrorCode::UnknownProducerId => self.renew(),
            code => {
                self.is_refused = true;
                let sent = self.take_oldest(request_id)?;
                let error = refused(sent.promise.completion(), refusal);
                sent.promise.keep(Err(error));
                self.fail_oldest();
                if code == ErrorCode::InvalidProducerEpoch { Next::NewIdentity } else { self.renew() }
            }
        })
    }

    /// Sent, with no answer to come (`acks=0`).
    pub(crate) fn unanswered(&mut self, request_id: u64) -> Result<(), WrongAnswer> {
        let written =
            Written { base_offset: -1, log_append_time_ms: -1, durability: Durability::None, duplicate: false };
        self.acknowledged(request_id, written)
    }

    /// The window's batches need new sequences from 0, under a higher epoch. Only where none of them can be in the log.
    fn renew(&self) -> Next {
        if self.identity.is_some() { Next::HigherEpoch } else { Next::Resend }
    }

    /// As another producer (or under another epoch): sequences begin at 0 again. Records that have failed need no place
    /// in them any more.
    pub(crate) fn become_producer(&mut self, identity: Identity) {
        let epoch = self.identity.map(|before| before.epoch).filter(|_| planted(Bug::RenumberedInSameEpoch));
        self.identity = Some(Identity { epoch: epoch.unwrap_or(identity.epoch), ..identity });
        self.in_flight.retain(|sent| !sent.promise.is_told());
        self.fail_oldest();
        self.in_flight.iter_mut().for_each(|sent| sent.in_log = false);
        self.renumber(0, 0);
    }

    /// Gives the batches from the `first` on new sequences, from `sequence` on.
    fn renumber(&mut self, first: usize, sequence: i32) {
        self.next_sequence = sequence;
        for sent in self.in_flight.iter_mut().skip(first) {
            sent.base_sequence = self.next_sequence;
            if let Some(identity) = self.identity {
                sent.bytes = restamp(std::mem::take(&mut sent.bytes), identity, sent.base_sequence);
            }
            self.next_sequence = after(self.next_sequence, sent.records);
        }
    }

    /// When the oldest records without an outcome fail.
    pub(crate) fn expires_at(&self) -> Option<Instant> {
        self.in_flight.iter().find(|sent| !sent.promise.is_told()).map(|sent| sent.expires_at)
    }

    /// Fails the records whose time is up, oldest first; `failure` is told whether they were sent. A batch that a broker
    /// may have keeps its place in the sequence; any other is let go.
    pub(crate) fn expire(&mut self, now: Instant, failure: impl Fn(&Completion, bool) -> ProduceError) {
        for sent in &self.in_flight {
            match sent.promise.is_told() {
                true => {}
                false if now >= sent.expires_at => {
                    sent.promise.tell(Err(failure(sent.promise.completion(), sent.tried)));
                }
                false => break,
            }
        }
        let idempotent = self.identity.is_some();
        let of_no_use = |sent: &Sent| {
            let is_nowhere = if idempotent { !sent.tried } else { sent.request_id == 0 };
            sent.promise.is_told() && (is_nowhere || planted(Bug::TimedOutGivesPlace))
        };
        // Those never sent stand behind all that were.
        if let Some(first) = self.in_flight.iter().position(of_no_use) {
            let sequence = self.in_flight.get(first).map_or(self.next_sequence, |sent| sent.base_sequence);
            self.in_flight.retain(|sent| !of_no_use(sent));
            if idempotent {
                self.renumber(first, sequence);
            }
            self.fail_oldest();
        }
    }

    /// Fails everything; `failure` is told whether it was sent. It is not sent again, and what comes later is numbered anew,
    /// since a broker may have some of it.
    pub(crate) fn abandon(&mut self, failure: impl Fn(&Completion, bool) -> ProduceError) -> Next {
        for sent in self.in_flight.drain(..) {
            if !sent.promise.is_told() {
                sent.promise.tell(Err(failure(sent.promise.completion(), sent.tried)));
            }
        }
        self.renew()
    }

    fn take_oldest(&mut self, request_id: u64) -> Result<Sent, WrongAnswer> {
        let expected = self.in_flight.front().map(|sent| sent.request_id);
        let wrong = WrongAnswer { got: request_id, expected };
        if expected != Some(request_id) || request_id == 0 {
            return Err(wrong);
        }
        self.in_flight.pop_front().ok_or(wrong)
    }
}

fn refused(completion: &Completion, refusal: Refusal) -> ProduceError {
    ProduceError::Refused { topic: completion.topic().clone(), partition: completion.partition(), refusal }
}

fn unknown(completion: &Completion, refusal: Refusal) -> ProduceError {
    refused(completion, refusal).of_unknown_outcome(completion.partition())
}

/// Whether a broker that refuses an append so has written nothing of it: its size, its form or its sequence is wrong. All
/// other refusals may come when the batch is in the log already.
fn is_before_append(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::CorruptBatch
            | ErrorCode::InvalidRecord
            | ErrorCode::MessageTooLarge
            | ErrorCode::UnsupportedCompression
            | ErrorCode::InvalidTimestamp
            | ErrorCode::InvalidRequest
            | ErrorCode::LimitExceeded
            | ErrorCode::OutOfOrderSequence
            | ErrorCode::InvalidProducerEpoch
            | ErrorCode::UnknownProducerId
            | ErrorCode::DuplicateSequence
    )
}

/// Whether the log says that it does not remember what came before. Nothing of a window is in it then, or all of it is.
fn is_forgotten(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::UnknownProducerId | ErrorCode::DuplicateSequence)
}

/// The sequence after `records` more; after the largest comes 0.
fn after(sequence: i32, records: i32) -> i32 {
    ((i64::from(sequence) + i64::from(records)) % (i64::from(i32::MAX) + 1)) as i32
}

/// The same records under another producer and sequence. Copies only where somebody else still holds the bytes.
pub(crate) fn restamp(batch: Bytes, identity: Identity, base_sequence: i32) -> Bytes {
    let Ok(header) = BatchHeader::parse(&batch) else { return batch };
    let mut batch = batch.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
    let (front, body) = batch.split_at_mut(HEADER_BYTES);
    front.copy_from_slice(&header.with_producer(identity.id, identity.epoch, base_sequence, body).encode());
    batch.freeze()
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
