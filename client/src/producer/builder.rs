//! How a producer is set up.
//!
//! Owns: [`ProducerBuilder`]: the settings, their defaults, and which of them make no sense. Read next: [`super`].

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use headwater_proto::batch::Codec;
use headwater_proto::limits::MAX_IN_FLIGHT_BATCHES;
use headwater_proto::wire::Acks;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::batcher::BatcherConfig;
use super::partition::Shared;
use super::stream::allocate_identity;
use super::topics::Topics;
use super::{Inner, Producer};
use crate::config::ConfigError;
use crate::connection::Connections;
use crate::error::Error;
use crate::metadata::Metadata;
use crate::partitioner::Partitioner;

/// How a producer is set up. Made by [`crate::Client::producer`].
#[derive(Clone)]
#[must_use = "a builder does nothing until it is built"]
pub struct ProducerBuilder {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    acks: Acks,
    idempotent: Option<bool>,
    max_in_flight: usize,
    buffer_bytes: usize,
    partitioner: Partitioner,
    batches: BatcherConfig,
}

impl std::fmt::Debug for ProducerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProducerBuilder")
            .field("acks", &self.acks)
            .field("idempotent", &self.idempotent)
            .field("max_in_flight", &self.max_in_flight)
            .field("buffer_bytes", &self.buffer_bytes)
            .field("partitioner", &self.partitioner)
            .field("batches", &self.batches)
            .finish_non_exhaustive()
    }
}

impl ProducerBuilder {
    pub(crate) fn new(connections: Arc<Connections>, metadata: Arc<Metadata>) -> ProducerBuilder {
        ProducerBuilder {
            connections,
            metadata,
            acks: Acks::All,
            idempotent: None,
            max_in_flight: MAX_IN_FLIGHT_BATCHES,
            buffer_bytes: 64 << 20,
            partitioner: Partitioner::Default,
            batches: BatcherConfig {
                batch_bytes: 256 << 10,
                linger: Duration::ZERO,
                delivery_timeout: Duration::from_secs(120),
                codec: Codec::None,
                compression_level: None,
            },
        }
    }

    /// What an acknowledgement waits for. Default: [`Acks::All`], as durable as the topic asks.
    pub fn acks(mut self, acks: Acks) -> ProducerBuilder {
        self.acks = acks;
        self
    }

    /// How batches are compressed. Default: not.
    pub fn compression(mut self, codec: Codec) -> ProducerBuilder {
        self.batches.codec = codec;
        self
    }

    /// The codec's level (gzip, zstd). Default: the codec's own.
    pub fn compression_level(mut self, level: i32) -> ProducerBuilder {
        self.batches.compression_level = Some(level);
        self
    }

    /// The size at which a batch is full, in bytes before compression. Default: 256 KiB. Larger ones cost less for each
    /// record and wait no longer: a batch grows only while earlier ones are on their way, or lingers.
    pub fn batch_bytes(mut self, bytes: usize) -> ProducerBuilder {
        self.batches.batch_bytes = bytes;
        self
    }

    /// How long a batch that is not full waits for more records. Default: not at all.
    pub fn linger(mut self, linger: Duration) -> ProducerBuilder {
        self.batches.linger = linger;
        self
    }

    /// How long after it was handed over a record without an acknowledgement fails; as long [`Producer::send`] waits, at most,
    /// before that. Default: 120 s.
    pub fn delivery_timeout(mut self, timeout: Duration) -> ProducerBuilder {
        self.batches.delivery_timeout = timeout;
        self
    }

    /// Bytes of records that wait for their acknowledgement, at most; beyond them [`Producer::send`] waits. Default: 64 MiB.
    pub fn buffer_bytes(mut self, bytes: usize) -> ProducerBuilder {
        self.buffer_bytes = bytes;
        self
    }

    /// How records are placed that name no partition. Default: by the key's hash, as Kafka places them.
    pub fn partitioner(mut self, partitioner: Partitioner) -> ProducerBuilder {
        self.partitioner = partitioner;
        self
    }

    /// Whether the broker recognises a batch that is sent again. Default: yes, except with [`Acks::None`], where nothing is
    /// sent again. Without it a lost connection may double records.
    pub fn idempotent(mut self, idempotent: bool) -> ProducerBuilder {
        self.idempotent = Some(idempotent);
        self
    }

    /// Batches of one partition that may be unacknowledged: 1 to 5, since the broker remembers five. Default: 5.
    pub fn max_in_flight(mut self, batches: usize) -> ProducerBuilder {
        self.max_in_flight = batches;
        self
    }

    /// The producer. Where it is idempotent, the broker is asked for a producer id.
    ///
    /// # Errors
    /// When a setting makes no sense, or the broker cannot be asked.
    pub async fn build(self) -> Result<Producer, Error> {
        let wrong = |setting, reason: &str| Err(ConfigError::Setting { setting, reason: reason.into() }.into());
        let idempotent = self.idempotent.unwrap_or(self.acks != Acks::None);
        if idempotent && self.acks == Acks::None {
            return wrong("idempotent", "needs acknowledgements: acks=1 or acks=all");
        }
        if !(1..=MAX_IN_FLIGHT_BATCHES).contains(&self.max_in_flight) {
            return wrong("max_in_flight", "1 to 5 batches");
        }
        if self.batches.batch_bytes == 0 || self.buffer_bytes == 0 {
            return wrong("batch_bytes and buffer_bytes", "must be above 0");
        }
        if self.buffer_bytes > Semaphore::MAX_PERMITS / 2 {
            return wrong("buffer_bytes", "is larger than any memory");
        }
        let identity = match idempotent {
            true => Some(allocate_identity(&self.connections, None).await?),
            false => None,
        };
        let shared = Arc::new(Shared {
            connections: self.connections,
            metadata: self.metadata,
            acks: self.acks,
            codec: self.batches.codec,
            compression_level: self.batches.compression_level,
            delivery_timeout: self.batches.delivery_timeout,
            max_in_flight: self.max_in_flight,
            budget: Arc::new(Semaphore::new(self.buffer_bytes)),
            starving: AtomicUsize::new(0),
            closed: CancellationToken::new(),
        });
        let topics = Topics::new(shared.clone(), identity, self.batches);
        let (partitioner, buffer_bytes) = (self.partitioner, self.buffer_bytes);
        Ok(Producer { inner: Arc::new(Inner { shared, topics, partitioner, buffer_bytes }) })
    }
}
