//! The same broker on one network thread, on eight and on 32: many connections that write and read at once.

mod harness;

use harness::*;
use headwater_broker::{Broker, config::BrokerConfig, runtime};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, Durability};
use std::sync::{Arc, mpsc};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

const BATCHES: u64 = 40;

/// A broker on the threads that it gets where it has the process to itself.
fn start_apart(config: BrokerConfig) -> (Arc<Broker>, oneshot::Sender<()>, std::thread::JoinHandle<bool>) {
    let (started, start) = mpsc::channel();
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        runtime::build(&config).unwrap().block_on(async {
            let broker = Arc::new(Broker::start(config).await.unwrap());
            started.send(Arc::clone(&broker)).unwrap();
            drop(stopped.await);
            Arc::into_inner(broker).expect("everybody else let go").shutdown().await
        })
    });
    (start.recv().unwrap(), stop, thread)
}

async fn write_and_read(client: Client, topic: bytes::Bytes, partition: u32) {
    let open = wire::OpenProduce { partition, ..open_produce(&topic, partition) };
    let (mut produce, opened) = client.produce(open).await;
    assert_eq!(opened.error, None);
    let (mut fetch, _) = client.fetch(open_fetch(&topic, partition, 0)).await;
    let value = |n: u64| format!("{partition} {n}").into_bytes();
    for n in 1..=BATCHES {
        // The large ones are checked elsewhere than on a network thread. All of them together fit the stream's first credit.
        let large = vec![b'x'; if n % 8 == 0 { 140_000 } else { 0 }];
        let bytes = batch(&[&value(n), &large]);
        produce.request_as(wire::ProduceRequest { request_id: n, partition }, &bytes).await;
    }
    for n in 1..=BATCHES {
        let answer = produce.answer().await;
        assert_eq!((answer.request_id, answer.error.clone(), answer.durability()), (n, None, Durability::Flushed));
    }
    let read = fetch.read_to(2 * BATCHES as i64).await;
    assert_eq!(read.len() as u64, 2 * BATCHES);
    for (n, record) in (1..).zip(read.iter().step_by(2)) {
        assert_eq!((record.0, &record.1[..]), (2 * (n as i64 - 1), &value(n)[..]));
    }
}

fn one_broker(network_threads: u32, connections: u32) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.set_pair(&format!("num.network.threads={network_threads}")).unwrap();
    let (broker, stop, thread) = start_apart(config);
    let clients = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    clients.block_on(async {
        let client = Client::connect(&broker).await;
        match client.call(Request::DescribeBroker(wire::DescribeBroker {})).await {
            Response::DescribeBroker(described) => assert_eq!(described.io_threads, network_threads),
            other => panic!("{other:?}"),
        }
        let topic = client.create_topic("t", connections, &[]).await;
        let mut tasks = JoinSet::new();
        for partition in 0..connections {
            let client = Client::connect(&broker).await;
            tasks.spawn(write_and_read(client, topic.clone(), partition));
        }
        while let Some(done) = within("every connection", tasks.join_next()).await {
            done.unwrap();
        }
    });
    drop(clients);
    drop(broker);
    stop.send(()).unwrap();
    assert!(thread.join().unwrap(), "clean");
}

#[test]
fn one_network_thread_serves_many_connections() {
    one_broker(1, 8);
}

#[test]
fn eight_network_threads_serve_many_connections() {
    one_broker(8, 8);
}

/// Each of them has connections to serve: there are more than threads.
#[test]
fn thirty_two_network_threads_serve_many_connections() {
    one_broker(32, 48);
}
