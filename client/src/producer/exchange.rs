//! What the sender of one partition makes of what brokers say.
//!
//! Owns: [`Exchange`]: which identity the next stream needs, what an opened stream tells of the log, what follows from each
//! answer and from each refusal, whose time is up: pure. Refuses: streams, clocks and who leads ([`super::partition`], and in
//! the simulation of the protocol `crate::simulation`), sequences and resending ([`super::window`]).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchBuilder, BatchError};
use headwater_proto::wire;
use tokio::time::Instant;

use super::batcher::Filling;
use super::delivery::{Completion, Promise, Written};
use super::window::{Identity, Large, Next, Window, WrongAnswer, restamp};
use crate::error::{Error, ProduceError, Refusal};
use crate::retry::after;

/// What stays of a [`Filling`] once its builder is at work.
pub(crate) struct Pending {
    promise: Promise,
    records: i32,
    expires_at: Instant,
}

impl Pending {
    /// The records fail before they are in the window.
    pub(crate) fn fail(self, error: ProduceError) {
        self.promise.keep(Err(error));
    }
}

/// A partition's window, and what is known beside it.
#[derive(Debug)]
pub(crate) struct Exchange {
    topic: Arc<str>,
    partition: u32,
    delivery_timeout: Duration,
    compression_level: Option<i32>,
    pub(crate) window: Window,
    /// What is needed before the next stream is opened.
    next: Next,
    /// Why the broker refused last what is to be sent again.
    refusal: Option<Refusal>,
}

impl Exchange {
    pub(crate) fn new(
        (topic, partition): (Arc<str>, u32),
        window: Window,
        delivery_timeout: Duration,
        compression_level: Option<i32>,
    ) -> Exchange {
        let (next, refusal) = (Next::Resend, None);
        Exchange { topic, partition, delivery_timeout, compression_level, window, next, refusal }
    }

    /// Whether the window may be sent on the stream that was opened last.
    pub(crate) fn is_ready(&self) -> bool {
        self.next == Next::Resend
    }

    /// Whom the cluster is to be asked to make of the producer before a stream is opened: the next epoch of an id, or, of
    /// nobody, an id of its own for this partition.
    pub(crate) fn wants_identity(&self) -> Option<Option<Identity>> {
        match self.next {
            Next::Resend => None,
            Next::HigherEpoch => Some(self.window.identity()),
            Next::NewIdentity => Some(None),
        }
    }

    /// The identity that was asked for.
    pub(crate) fn become_producer(&mut self, identity: Identity) {
        self.window.become_producer(identity);
        self.next = Next::Resend;
    }

    /// No stream was opened, or no identity given. Where the broker knows nothing of this epoch, neither does the log, so
    /// nothing was written under it.
    pub(crate) fn mind_epoch(&mut self, error: &Error) {
        if error.code() == Some(ErrorCode::InvalidProducerEpoch) {
            self.next = Next::NewIdentity;
        }
    }

    /// A stream is open, to a broker that takes batches up to `limit` bytes.
    pub(crate) fn opened(&mut self, opened: &wire::ProduceOpened, limit: usize) {
        let last = (opened.last_sequence >= 0).then_some((opened.last_producer_epoch, opened.last_sequence));
        self.window.reopened(last);
        let next = self.window.split_large(limit, self.compression_level, self.too_large(limit));
        self.next = self.next.max(next);
    }

    /// An answer. Says whether it is an acknowledgement.
    ///
    /// # Errors
    /// When the stream is of no more use: after a refusal everything behind it is refused too.
    pub(crate) fn answered(&mut self, answer: wire::ProduceResponse) -> Result<bool, Error> {
        if let Some(error) = answer.error {
            let refusal = Refusal::from(error);
            if answer.request_id != 0 {
                let next = self.window.refused(answer.request_id, refusal.clone()).map_err(wrong)?;
                self.next = self.next.max(next);
            }
            self.refusal = Some(refusal.clone());
            return Err(Error::Refused(refusal));
        }
        if answer.request_id == 0 {
            return Ok(false);
        }
        let [batch] = &answer.batches[..] else {
            return Err(Error::Protocol("an acknowledgement that does not name its batch".into()));
        };
        let written = Written {
            base_offset: batch.base_offset,
            log_append_time_ms: batch.log_append_time_ms,
            durability: answer.durability(),
            duplicate: batch.duplicate,
        };
        self.window.acknowledged(answer.request_id, written).map_err(wrong)?;
        self.refusal = None;
        Ok(true)
    }

    /// The request was written, and no answer will come (`acks=0`).
    pub(crate) fn unanswered(&mut self, request_id: u64) -> Result<(), Error> {
        self.window.unanswered(request_id).map_err(wrong)
    }

    /// Fails the records whose time is up: those of the window, then those of batches that were not sent, of which `queued`
    /// gives the ones whose time is up.
    pub(crate) fn expire(&mut self, now: Instant, queued: impl FnOnce() -> Vec<Filling>) {
        let (after, refusal) = (self.delivery_timeout, self.refusal.clone());
        let timed_out = |completion: &Completion, sent: bool| ProduceError::TimedOut {
            topic: completion.topic().clone(),
            partition: completion.partition(),
            after,
            sent,
            reason: refusal.clone().map(Box::new),
        };
        self.window.expire(now, timed_out);
        for filling in queued() {
            let error = timed_out(filling.promise.completion(), false);
            filling.promise.keep(Err(error));
        }
    }

    /// Fails what is in the window, which a broker may have.
    pub(crate) fn abandon(&mut self, error: &ProduceError) {
        let next = self.window.abandon(|completion, sent| match sent {
            true => error.clone().of_unknown_outcome(completion.partition()),
            false => error.clone(),
        });
        self.next = self.next.max(next);
    }

    /// What is to be built, and what stays of it meanwhile.
    pub(crate) fn begin(&self, filling: Filling) -> (Pending, BatchBuilder) {
        let Filling { builder, promise, since, .. } = filling;
        let records = i32::try_from(builder.record_count()).unwrap_or(i32::MAX);
        (Pending { promise, records, expires_at: after(since, self.delivery_timeout) }, builder)
    }

    /// Builds a batch and takes it in.
    pub(crate) fn build(&mut self, pending: Pending, mut builder: BatchBuilder, limit: usize) {
        if let Some((identity, sequence)) = self.window.stamp() {
            builder.set_producer(identity.id, identity.epoch, sequence);
        }
        self.admit(pending, builder.build(), limit);
    }

    /// Takes in a batch that was built before its sequence was known.
    pub(crate) fn built(&mut self, pending: Pending, batch: Result<Bytes, BatchError>, limit: usize) {
        let batch = match (batch, self.window.stamp()) {
            (Ok(batch), Some((identity, sequence))) => Ok(restamp(batch, identity, sequence)),
            (batch, _) => batch,
        };
        self.admit(pending, batch, limit);
    }

    fn admit(&mut self, pending: Pending, batch: Result<Bytes, BatchError>, limit: usize) {
        let Pending { promise, records, expires_at } = pending;
        let bytes = match batch {
            Ok(bytes) => bytes,
            Err(error) => {
                let failure = ProduceError::Refused {
                    topic: self.topic.clone(),
                    partition: self.partition,
                    refusal: wire::Error::new(ErrorCode::InvalidRecord, error.to_string()).into(),
                };
                return self.window.admit_failed(failure, promise, expires_at);
            }
        };
        if bytes.len() <= limit {
            self.window.admit(bytes, records, promise, expires_at);
        } else {
            let (level, too_large) = (self.compression_level, self.too_large(limit));
            self.window.admit_split(Large { bytes, records, promise, expires_at }, limit, level, too_large);
        }
    }

    /// What is said of a record that alone makes a batch of so many bytes.
    fn too_large(&self, limit: usize) -> impl Fn(usize) -> ProduceError + use<> {
        let topic = self.topic.clone();
        move |bytes| ProduceError::TooLarge { topic: topic.clone(), bytes, limit }
    }
}

fn wrong(answer: WrongAnswer) -> Error {
    Error::Protocol(answer.to_string())
}
