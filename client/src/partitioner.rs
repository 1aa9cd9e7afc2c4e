//! Where a record goes that names no partition.
//!
//! Owns: the hash of keys (murmur2, as Kafka's clients place them, so that records of one key written by either meet in
//! one partition) and the choice for records without a key. Refuses: knowing brokers; a partition without a leader still
//! gets its records.

use std::sync::Arc;

use bytes::Bytes;

/// What a [`Partitioner::Custom`] decides from. `{:?}` shows no contents.
pub struct PartitionContext<'a> {
    /// The topic.
    pub topic: &'a str,
    /// The record's key.
    pub key: Option<&'a Bytes>,
    /// The record's value.
    pub value: Option<&'a Bytes>,
    /// How many partitions the topic has; at least 1.
    pub partitions: u32,
}

impl std::fmt::Debug for PartitionContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartitionContext")
            .field("topic", &self.topic)
            .field("key_bytes", &self.key.map(Bytes::len))
            .field("value_bytes", &self.value.map(Bytes::len))
            .field("partitions", &self.partitions)
            .finish()
    }
}

/// How records are placed that name no partition themselves.
#[derive(Clone, Default)]
pub enum Partitioner {
    /// By the key's hash; records without a key stay with one partition until a batch is full, then move to another.
    #[default]
    Default,
    /// A function of the record. It is called for every record, on the sender's thread; an answer that is no partition of
    /// the topic fails the record.
    Custom(Arc<PartitionFn>),
}

/// A function for [`Partitioner::Custom`].
pub type PartitionFn = dyn Fn(&PartitionContext<'_>) -> u32 + Send + Sync;

impl std::fmt::Debug for Partitioner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Partitioner::Default => "Default",
            Partitioner::Custom(_) => "Custom",
        })
    }
}

/// The partition of a key among `partitions` (at least 1), as Kafka's own clients compute it.
///
/// ```
/// assert_eq!(headwater_client::partition_for_key(b"N14228", 6), headwater_client::partition_for_key(b"N14228", 6));
/// ```
pub fn partition_for_key(key: &[u8], partitions: u32) -> u32 {
    (murmur2(key) & 0x7fff_ffff) % partitions.max(1)
}

/// Austin Appleby's MurmurHash2 with the seed that Kafka chose.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mut hash = SEED ^ data.len() as u32;
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        let mut k = word.iter().rev().fold(0u32, |k, byte| k << 8 | u32::from(*byte));
        k = k.wrapping_mul(M);
        k ^= k >> 24;
        k = k.wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash ^= rest.iter().rev().fold(0u32, |k, byte| k << 8 | u32::from(*byte));
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ hash >> 15
}

/// The partition that records without a key stay with, for one topic. Moved on by `random` when it has had its share.
#[derive(Debug)]
pub(crate) struct Sticky {
    partition: u32,
    bytes: usize,
}

impl Sticky {
    pub(crate) fn new(random: u32, partitions: u32) -> Sticky {
        Sticky { partition: random % partitions.max(1), bytes: 0 }
    }

    /// The partition for a record of `bytes`, among `partitions`. After `share` bytes another one is chosen, never the
    /// same twice where there are several, so that every partition gets whole batches.
    pub(crate) fn place(&mut self, bytes: usize, share: usize, partitions: u32, random: impl FnOnce() -> u32) -> u32 {
        if self.bytes >= share || self.partition >= partitions {
            self.bytes = 0;
            if partitions > 1 {
                self.partition = (self.partition % partitions + 1 + random() % (partitions - 1)) % partitions;
            } else {
                self.partition = 0;
            }
        }
        self.bytes += bytes;
        self.partition
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn keys_hash_as_in_kafka() {
        for (key, hash) in [
            (&b"21"[..], -973_932_308),
            (b"foobar", -790_332_482),
            (b"a-little-bit-long-string", -985_981_536),
            (b"a-little-bit-longer-string", -1_486_304_829),
            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            (b"abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key) as i32, hash, "{}", String::from_utf8_lossy(key));
        }
        assert_eq!(partition_for_key(b"foobar", 1), 0);
    }

    #[test]
    fn records_without_a_key_move_on_after_their_share() {
        let mut sticky = Sticky::new(7, 3);
        let placed: Vec<u32> = (0..9).map(|i| sticky.place(100, 300, 3, || i)).collect();
        assert_eq!(placed[0], 1);
        for share in placed.chunks(3) {
            assert!(share.iter().all(|p| *p == share[0]), "{placed:?}");
        }
        assert!(placed[0] != placed[3] && placed[3] != placed[6], "{placed:?}");
        assert!(sticky.place(1, 300, 1, || 5) == 0, "partitions may only grow, but nothing breaks if they shrink");
    }
}
