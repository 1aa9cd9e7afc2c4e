//! How much is fetched ahead while partitions come and go.

use super::support::*;
use headwater_client::TopicPartition;
use std::collections::BTreeMap;

/// For one partition; each of eight gets 32 KiB.
const PREFETCH_BYTES: u64 = 256 << 10;
const SMALLEST_BYTES: u64 = 16 << 10;

/// What the peer may send of each partition.
#[derive(Default)]
struct Granted(BTreeMap<u32, u64>);

impl Granted {
    /// Another stream of this partition was opened, and the one before it is gone.
    fn opened(&mut self, partition: u32, bytes: u64) {
        self.0.insert(partition, bytes);
        self.check();
    }

    fn granted(&mut self, partition: u32, bytes: u64) {
        *self.0.entry(partition).or_default() += bytes;
        self.check();
    }

    fn check(&self) {
        let bound = PREFETCH_BYTES + SMALLEST_BYTES * self.0.len() as u64;
        assert!(self.0.values().sum::<u64>() <= bound, "more than {bound} bytes: {:?}", self.0);
    }
}

#[tokio::test]
async fn partitions_that_come_wait_until_those_that_are_there_have_given_back_what_they_were_granted() {
    let mut peer = Peer::start(8).await;
    let _consumer = member_of_billing(&peer, |b| b.prefetch_bytes(PREFETCH_BYTES as usize)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let mut granted = Granted::default();
    let (mut idle, open) = peer.fetch(0).await;
    assert_eq!(open.credit_bytes, PREFETCH_BYTES, "everything for the only one");
    granted.opened(0, open.credit_bytes);
    assign(&mut member, 2, &[0, 1, 2, 3, 4, 5, 6, 7]).await;
    let mut streams = BTreeMap::new();
    for _ in 0..8 {
        let (stream, open) = peer.fetch(0).await;
        granted.opened(open.partition, open.credit_bytes);
        streams.insert(open.partition, stream);
    }
    // Nothing came of what the first one was granted, so it is taken back with the stream.
    within("the end of the stream", async {
        while idle.frame::<headwater_proto::wire::FetchCredit>().await.is_some() {}
    })
    .await;
    for (partition, stream) in &mut streams {
        while granted.0.get(partition) < Some(&(PREFETCH_BYTES / 8)) {
            granted.granted(*partition, stream.credit().await);
        }
    }
    assert!(granted.0.values().all(|bytes| *bytes == PREFETCH_BYTES / 8), "{:?}", granted.0);
    owns(&mut member, &[0, 1, 2, 3, 4, 5, 6, 7]).await;
    assign(&mut member, 3, &[5]).await;
    let mut only = streams.remove(&5).unwrap();
    let mut bytes = PREFETCH_BYTES / 8;
    while bytes < PREFETCH_BYTES {
        bytes += only.credit().await;
    }
    assert_eq!(bytes, PREFETCH_BYTES, "everything for the only one");
}

#[tokio::test]
async fn what_nobody_takes_counts_for_as_long_as_it_is_there() {
    let mut peer = Peer::start(8).await;
    let mut consumer = member_of_billing(&peer, |b| b.prefetch_bytes(PREFETCH_BYTES as usize)).await;
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    let (mut full, open) = peer.fetch(1000).await;
    let batches = batches(0, 16, 16_000);
    assert!((batches.concat().len() as u64) < open.credit_bytes);
    for (next_offset, batch) in (1..).zip(&batches) {
        full.data(next_offset, 1000, batch).await;
    }
    assert_eq!(next_offset(&mut consumer).await, 0);
    consumer.pause([TopicPartition::new(TOPIC, 0)]);
    assign(&mut member, 2, &[0, 1, 2, 3, 4, 5, 6, 7]).await;
    let mut granted = Granted::default();
    let mut streams = BTreeMap::new();
    for _ in 0..8 {
        let (stream, open) = peer.fetch(1000).await;
        granted.opened(open.partition, open.credit_bytes);
        streams.insert(open.partition, stream);
    }
    assert_eq!(granted.0.get(&0), Some(&0), "it holds more than its share");
    let held: u64 = batches.iter().skip(1).map(|batch| batch.len() as u64).sum();
    assert!(granted.0.values().sum::<u64>() + held <= PREFETCH_BYTES + 8 * SMALLEST_BYTES, "{:?}", granted.0);
    consumer.resume([TopicPartition::new(TOPIC, 0)]);
    for expected in 1..16 {
        assert_eq!(next_offset(&mut consumer).await, expected);
    }
    for (partition, stream) in &mut streams {
        while granted.0.get(partition) < Some(&(PREFETCH_BYTES / 8)) {
            granted.granted(*partition, stream.credit().await);
        }
    }
}
