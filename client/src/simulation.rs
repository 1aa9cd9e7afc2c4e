//! A producer without streams, clocks and tasks, for the simulation of the protocol (`broker/tests/simulation`).
//!
//! Owns: [`Sender`], which has the machines of one partition's sender ([`Exchange`], with the window in it, [`Batcher`],
//! [`Backoff`]) and calls them as `producer/partition.rs` does; streams, time and chance are the caller's. Refuses: to decide
//! anything. Behind the feature `simulation`, which nothing turns on but the broker's tests: no application sees it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::batch::{BatchBuilder, Codec};
use headwater_proto::limits::MAX_IN_FLIGHT_BATCHES;
use headwater_proto::wire;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::config::ClientConfig;
use crate::error::{Error, ProduceError, Refusal};
use crate::producer::Delivery;
use crate::producer::batcher::{Batcher, BatcherConfig, Parts};
use crate::producer::exchange::Exchange;
use crate::producer::stream::{NoStream, identity_given, identity_request};
use crate::producer::window::Window;
use crate::retry::Backoff;

/// Asks for a producer id, as a producer does that is made.
pub fn first_identity() -> wire::AllocateProducerId {
    identity_request(None)
}

/// What sends one partition's records, as all partitions of a producer do that changes nothing but these.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The size at which a batch is full, in bytes.
    pub batch_bytes: usize,
    /// After which a record fails.
    pub delivery_timeout: Duration,
}

/// A partition's sender.
#[derive(Debug)]
pub struct Sender {
    topic: Arc<str>,
    partition: u32,
    exchange: Exchange,
    batcher: Batcher,
    backoff: Backoff,
    /// From here the caller counts its time.
    began: Instant,
}

impl Sender {
    /// The sender of a partition, of a producer that was given this identity.
    ///
    /// # Errors
    /// When it is none.
    pub fn new(
        (topic, partition): (&str, u32),
        identity: wire::AllocateProducerIdResponse,
        settings: Settings,
    ) -> Result<Sender, Error> {
        let (topic, buffer): (Arc<str>, _) = (topic.into(), Arc::new(Semaphore::new(0)));
        let config = BatcherConfig {
            batch_bytes: settings.batch_bytes,
            linger: Duration::ZERO,
            delivery_timeout: settings.delivery_timeout,
            codec: Codec::None,
            compression_level: None,
        };
        let window = Window::new(Some(identity_given(identity)?), MAX_IN_FLIGHT_BATCHES);
        Ok(Sender {
            exchange: Exchange::new((topic.clone(), partition), window, settings.delivery_timeout, None),
            batcher: Batcher::new(topic.clone(), partition, config, buffer, 0),
            topic,
            partition,
            backoff: Backoff::new(&ClientConfig::default()),
            began: Instant::now(),
        })
    }

    /// Takes a record.
    ///
    /// # Errors
    /// When no batch can hold it.
    pub fn send(
        &mut self,
        now: Duration,
        timestamp_ms: i64,
        key: Option<&Bytes>,
        value: &Bytes,
    ) -> Result<Delivery, ProduceError> {
        let parts = Parts { timestamp_ms, key, value: Some(value), headers: &[] };
        let charge = BatchBuilder::record_bound(key.map(|key| &**key), Some(value), &[]);
        let now = self.began + now;
        self.batcher.append(parts, charge, || now).map(|(delivery, _)| delivery)
    }

    /// Whether nothing is to be sent, or to be answered.
    pub fn is_idle(&self) -> bool {
        self.exchange.window.is_empty() && self.batcher.is_empty()
    }

    /// What the cluster has to be asked for before the next stream.
    pub fn wants_identity(&self) -> Option<wire::AllocateProducerId> {
        self.exchange.wants_identity().map(identity_request)
    }

    /// The cluster answered that.
    ///
    /// # Errors
    /// When it refused.
    pub fn identified(&mut self, answer: Result<wire::AllocateProducerIdResponse, wire::Error>) -> Result<(), Error> {
        let identity = answer.map_err(|error| Error::Refused(error.into())).and_then(identity_given);
        let identity = identity.inspect_err(|error| self.exchange.mind_epoch(error))?;
        self.exchange.become_producer(identity);
        Ok(())
    }

    /// Asks the leader of an epoch for a stream.
    pub fn open(&self, topic_id: TopicId, leader_epoch: i32) -> wire::OpenProduce {
        let identity = self.exchange.window.identity();
        wire::OpenProduce {
            topic_id: topic_id.to_wire(),
            partition: self.partition,
            producer_id: identity.map_or(-1, |identity| identity.id),
            producer_epoch: identity.map_or(-1, |identity| identity.epoch.into()),
            acks: wire::Acks::All.into(),
            leader_epoch,
        }
    }

    /// The leader answered that. Says whether the stream is of use.
    pub fn opened(&mut self, opened: wire::ProduceOpened) -> bool {
        if let Some(error) = opened.error {
            match NoStream::of(Refusal::from(error), &self.topic, self.partition) {
                NoStream::Later(error) => self.exchange.mind_epoch(&error),
                NoStream::Refused(error) | NoStream::Gone(error) => {
                    self.exchange.abandon(&error);
                    for filling in self.batcher.drain() {
                        filling.promise.keep(Err(error.clone()));
                    }
                }
            }
            return false;
        }
        if opened.max_message_bytes > 0 {
            self.batcher.set_max_message_bytes(opened.max_message_bytes as usize);
        }
        self.exchange.opened(&opened, self.batcher.max_message_bytes());
        self.exchange.is_ready()
    }

    /// What is to be sent next on the stream.
    pub fn next_request(&mut self, now: Duration) -> Option<(wire::ProduceRequest, Bytes)> {
        while self.exchange.window.room() > 0
            && let Some(filling) = self.batcher.take(self.began + now, false)
        {
            let (pending, builder) = self.exchange.begin(filling);
            self.exchange.build(pending, builder, self.batcher.max_message_bytes());
        }
        let (request_id, payload) = self.exchange.window.next_to_send()?;
        Some((wire::ProduceRequest { request_id, partition: self.partition }, payload))
    }

    /// An answer of the stream.
    ///
    /// # Errors
    /// When the stream is of no more use.
    pub fn answered(&mut self, answer: wire::ProduceResponse) -> Result<(), Error> {
        if self.exchange.answered(answer)? {
            self.backoff.reset();
        }
        Ok(())
    }

    /// Fails the records whose time is up.
    pub fn expire(&mut self, now: Duration) {
        let now = self.began + now;
        self.exchange.expire(now, || self.batcher.expire(now));
    }

    /// How long to wait before the next attempt; `random` is from 0 to 1.
    pub fn pause(&mut self, random: f64) -> Duration {
        self.backoff.next(random)
    }
}
