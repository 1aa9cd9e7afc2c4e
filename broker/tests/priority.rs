//! Who goes first on one connection: a reader at the tail before one that catches up or replays. And how much may be on its way there.
//!
//! The client's packets take a way on which those of the broker can be held up. Held up, the first reader fills what may be on its
//! way; then the second one asks. What comes first when the way is free again is what the broker puts first.

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_broker::Broker;
use headwater_proto::wire;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::net::UdpSocket;
use tokio::sync::Notify;

const BATCH_BYTES: u64 = 128 << 10;
/// What the reader at the tail has to read, in many small records; the other one has few large ones.
const TAIL_BYTES: u64 = 1 << 20;
const TAIL_RECORD_BYTES: u64 = 128;
const LONG_BATCHES: u64 = 64;
const ROUNDS: usize = 3;

/// A way for packets of one client.
#[derive(Default)]
struct Way {
    is_held: AtomicBool,
    held_bytes: AtomicU64,
    freed: Notify,
}

impl Way {
    async fn to(broker: SocketAddr) -> (Arc<Way>, SocketAddr) {
        let way = Arc::new(Way::default());
        let near = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let far = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        far.connect(broker).await.unwrap();
        let address = near.local_addr().unwrap();
        tokio::spawn(Arc::clone(&way).carry(near, far));
        (way, address)
    }

    async fn carry(self: Arc<Way>, near: UdpSocket, far: UdpSocket) {
        let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
        let mut client = None;
        let mut held: VecDeque<Vec<u8>> = VecDeque::new();
        loop {
            tokio::select! {
                // What is lost here is sent again, and what was measured is wrong: take in as much as there is.
                biased;
                got = far.recv(&mut down) => {
                    let packet = down[..got.unwrap()].to_vec();
                    self.held_bytes.fetch_add(packet.len() as u64, Ordering::AcqRel);
                    held.push_back(packet);
                }
                got = near.recv_from(&mut up) => {
                    let (length, from) = got.unwrap();
                    client = Some(from);
                    far.send(&up[..length]).await.unwrap();
                }
                () = self.freed.notified() => {}
            }
            while let (false, Some(to)) = (self.is_held.load(Ordering::Acquire), client) {
                let Some(packet) = held.pop_front() else { break };
                near.send_to(&packet, to).await.unwrap();
            }
        }
    }

    fn hold(&self) {
        self.held_bytes.store(0, Ordering::Release);
        self.is_held.store(true, Ordering::Release);
    }

    fn free(&self) {
        self.is_held.store(false, Ordering::Release);
        self.freed.notify_one();
    }
}

async fn fill(client: &Client, topic: &Bytes, batches: u64, record_bytes: u64) {
    let (mut produce, _) = client.produce(open_produce(topic, 0)).await;
    let value = vec![b'x'; record_bytes as usize];
    let bytes = batch(&vec![value.as_slice(); (BATCH_BYTES / record_bytes) as usize]);
    for _ in 0..batches {
        produce.request(&bytes).await;
        assert_eq!(produce.answer().await.error, None);
    }
}

/// Reads everything that comes, and counts it.
fn count(fetch: Stream) -> Arc<AtomicU64> {
    let bytes = Arc::new(AtomicU64::new(0));
    let (counted, mut recv) = (Arc::clone(&bytes), fetch.recv);
    tokio::spawn(async move {
        let _keep_open = fetch.send;
        while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
            counted.fetch_add(chunk.bytes.len() as u64, Ordering::AcqRel);
        }
    });
    bytes
}

async fn until_sent(broker: &Broker, name: &str, at_least: f64) {
    within(name, async { while sample(broker, name).await < at_least {} }).await;
}

/// How much of the first reader's data came before the second one had all of its own, beyond what was on its way when that one
/// asked.
async fn ahead_of_the_tail(broker: &Broker, first: wire::OpenFetch, tail: &Bytes) -> u64 {
    let (way, address) = Way::to(broker.listen_addr()).await;
    let client = Client::connect_at(broker, address, 16 << 20).await;
    client.greet().await;
    let open = |open| wire::open::Stream::Fetch(wire::OpenFetch { credit_bytes: 32 << 20, ..open });
    let sent_bytes = sample(broker, "headwater_fetch_bytes_total").await;
    let sent_records = sample(broker, "headwater_fetch_records_total").await;
    way.hold();
    let first = count(client.open(open(first)).await);
    // The broker sends as much as may be on its way, and has more ready.
    until_sent(broker, "headwater_fetch_bytes_total", sent_bytes + f64::from(1 << 20)).await;
    let mut second = client.open(open(open_fetch(tail, 0, 0))).await;
    until_sent(broker, "headwater_fetch_records_total", sent_records + (TAIL_BYTES / TAIL_RECORD_BYTES) as f64).await;
    let on_its_way = way.held_bytes.load(Ordering::Acquire);
    way.free();
    let mut read = 0;
    while read < TAIL_BYTES {
        let chunk = within("the reader at the tail", second.recv.read_chunk(usize::MAX, true)).await.unwrap();
        read += chunk.expect("data").bytes.len() as u64;
    }
    first.load(Ordering::Acquire).saturating_sub(on_its_way)
}

#[tokio::test]
async fn a_reader_at_the_tail_goes_before_one_that_catches_up_or_replays() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let config = [("durability", "replicated")];
    let (tail, long) = (client.create_topic("tail", 1, &config).await, client.create_topic("long", 1, &config).await);
    fill(&client, &tail, TAIL_BYTES / BATCH_BYTES, TAIL_RECORD_BYTES).await;
    fill(&client, &long, LONG_BATCHES, BATCH_BYTES).await;
    let near = LONG_BATCHES as i64 - 24;
    let replaying = wire::OpenFetch { background: true, ..open_fetch(&long, 0, near) };
    for (what, first, equal) in [
        ("near the tail", open_fetch(&long, 0, near), true),
        ("far from it", open_fetch(&long, 0, 0), false),
        ("replaying", replaying, false),
    ] {
        // Readers of a busy machine are woken late, and count what came meanwhile.
        let mut ahead = Vec::new();
        while ahead.last().is_none_or(|bytes| (*bytes > TAIL_BYTES / 2) != equal) {
            assert!(ahead.len() < ROUNDS, "{what}: {ahead:?} bytes");
            ahead.push(ahead_of_the_tail(&broker, first.clone(), &tail).await);
        }
    }
    broker.shutdown().await;
}

/// However much a reader grants, what it does not acknowledge piles up only so far: in front of whatever is opened later.
#[tokio::test]
async fn no_more_than_a_congestion_window_and_a_mebibyte_is_on_its_way_whatever_the_credit() {
    /// The first congestion window, which nothing has enlarged by much, a mebibyte, and the frame that goes beyond it.
    const MOST: f64 = 4e6;
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["connections.max.idle.ms=3000"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("durability", "replicated")]).await;
    fill(&client, &topic, 2 * LONG_BATCHES, BATCH_BYTES).await;
    let sent_bytes = async || sample(&broker, "headwater_fetch_bytes_total").await;
    assert_eq!(sent_bytes().await, 0.0);
    let (way, address) = Way::to(broker.listen_addr()).await;
    let reader = Client::connect_at(&broker, address, 16 << 20).await;
    reader.greet().await;
    way.hold();
    let open = wire::OpenFetch { credit_bytes: 32 << 20, ..open_fetch(&topic, 0, 0) };
    let _fetch = reader.open(wire::open::Stream::Fetch(open)).await;
    until_sent(&broker, "headwater_fetch_bytes_total", f64::from(1 << 20)).await;
    // Neither end hears of the other: the broker has all the time until it gives the reader up.
    let readers = "headwater_streams{kind=\"fetch\"}";
    within("the reader to be given up", async { while sample(&broker, readers).await > 0.0 {} }).await;
    let sent = sent_bytes().await;
    assert!(sent <= MOST, "{sent} bytes");
    way.free();
    assert_eq!(client.fetch(open_fetch(&topic, 0, 0)).await.1.error, None);
    broker.shutdown().await;
}
