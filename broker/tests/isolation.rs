//! One partition's reader stops reading: the others on the same connection go on at their speed.
//!
//! The story: where QUIC's windows bind instead of the credits, quinn wakes blocked streams last-in-first-out, and four
//! readers that did not read stopped the fifth, and every call, completely (0 MB/s, no answer in three seconds). So all
//! credit of a connection fits into its windows, and this is the test that it does.
//!
//! Broker, readers and caller have a thread each, as they have a process each elsewhere. A machine that is busy with
//! other things makes a round worse and never better: the best of a few rounds counts.

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_broker::{Broker, runtime};
use headwater_proto::wire::{self, call};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const PARTITIONS: u32 = 64;
const STALLED: u32 = 8;
const BYTES_EACH: u64 = 6 << 20;
const CREDIT: u64 = 512 << 10;
const ROUNDS: usize = 5;

/// What one round measured.
#[derive(Debug)]
struct Round {
    /// The smallest share of the readers that read, as a part of the largest.
    least_of_most: f64,
    call_p99: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn readers_that_never_read_delay_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let (broker, stop) = broker_on_its_own_thread(dir.path());
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", PARTITIONS, &[("durability", "replicated")]).await;
    fill(&client, &topic).await;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let round = measure(&broker, &topic).await;
        let good = round.least_of_most >= 0.8 && round.call_p99 < Duration::from_millis(20);
        rounds.push(round);
        if good {
            break;
        }
        assert!(rounds.len() < ROUNDS, "shares differ by more than 20 %, or calls take more than 20 ms: {rounds:?}");
    }
    stop.send(()).unwrap();
}

fn broker_on_its_own_thread(dir: &Path) -> (Arc<Broker>, oneshot::Sender<()>) {
    let (started, start) = std::sync::mpsc::channel();
    let (stop, stopped) = oneshot::channel();
    let config = config(dir);
    std::thread::spawn(move || {
        runtime::build(&config).unwrap().block_on(async {
            let broker = Arc::new(Broker::start(config).await.unwrap());
            started.send(Arc::clone(&broker)).unwrap();
            drop(stopped.await);
        });
    });
    (start.recv().unwrap(), stop)
}

async fn fill(client: &Client, topic: &Bytes) {
    let values = vec![vec![b'x'; 1000]; 500];
    let bytes = batch(&values.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for partition in 0..PARTITIONS {
        let (mut produce, _) = client.produce(open_produce(topic, partition)).await;
        for request_id in 1..=1 + BYTES_EACH / bytes.len() as u64 {
            produce.request_as(wire::ProduceRequest { request_id, partition }, &bytes).await;
            assert_eq!(produce.answer().await.error, None);
        }
    }
}

async fn measure(broker: &Arc<Broker>, topic: &Bytes) -> Round {
    // All readers on one connection, calls on another, as the SDK has it.
    let readers = Arc::new(Client::connect(broker).await);
    let mut stalled = Vec::new();
    for partition in 0..STALLED {
        let open = wire::OpenFetch { credit_bytes: CREDIT, ..open_fetch(topic, partition, 0) };
        stalled.push(readers.fetch(open).await);
    }
    let enough = Arc::new(AtomicBool::new(false));
    let mut read = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    let ready = Arc::new(tokio::sync::Barrier::new(1 + (PARTITIONS - STALLED) as usize));
    for partition in STALLED..PARTITIONS {
        let total = Arc::new(AtomicU64::new(0));
        read.push(Arc::clone(&total));
        let (readers, topic) = (Arc::clone(&readers), topic.clone());
        let (enough, ready) = (Arc::clone(&enough), Arc::clone(&ready));
        tasks.spawn(async move {
            let open = wire::OpenFetch { credit_bytes: 0, ..open_fetch(&topic, partition, 0) };
            let (mut fetch, _) = readers.fetch(open).await;
            ready.wait().await;
            fetch.grant(CREDIT).await;
            while !enough.load(Ordering::Acquire) {
                let (_, payload) = fetch.data().await;
                fetch.grant(payload.len() as u64).await;
                if total.fetch_add(payload.len() as u64, Ordering::AcqRel) >= BYTES_EACH - CREDIT {
                    // The first to come to its end stops the measurement.
                    enough.store(true, Ordering::Release);
                }
            }
        });
    }
    ready.wait().await;
    let (broker, done) = (Arc::clone(broker), Arc::clone(&enough));
    let calling = tokio::task::spawn_blocking(move || call_until(&broker, &done));
    while !enough.load(Ordering::Acquire) {
        within("a reader", tasks.join_next()).await;
    }
    let shares: Vec<u64> = read.iter().map(|total| total.load(Ordering::Acquire)).collect();
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    tasks.shutdown().await;
    drop(stalled);
    Round { least_of_most: *least as f64 / *most as f64, call_p99: calling.await.unwrap() }
}

/// Calls, one after another, on a connection and a thread of their own; the 99th percentile.
fn call_until(broker: &Broker, done: &AtomicBool) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::connect(broker).await;
        let mut latencies = Vec::new();
        while !done.load(Ordering::Acquire) || latencies.is_empty() {
            let began = Instant::now();
            client
                .call(call::Request::Metadata(wire::Metadata { topics: vec!["t".into()], ..Default::default() }))
                .await;
            latencies.push(began.elapsed());
        }
        latencies.sort();
        latencies[latencies.len() * 99 / 100]
    })
}
