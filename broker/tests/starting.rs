//! A broker that is still recovering: what can be seen of it from outside.

mod harness;

use harness::*;
use headwater_broker::Broker;
use headwater_storage::sim::{Fault, Operation, SimFiles};
use std::path::Path;
use std::sync::Arc;

async fn start_on(dir: &Path, files: &Arc<SimFiles>, pairs: &[&str]) -> Broker {
    let (mut config, files) = (config(dir), Arc::clone(files));
    pairs.iter().for_each(|pair| config.set_pair(pair).unwrap());
    within("start", Broker::start_on(config, files)).await.unwrap()
}

/// The port was bound and not served while partitions and groups were opened: a probe hung for the length of a recovery.
#[tokio::test]
async fn the_admin_port_answers_while_the_broker_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(1);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    for name in ["large", "small"] {
        let topic = client.create_topic(name, 1, &[]).await;
        let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
        produce.request(&batch(&[b"x"])).await;
        assert_eq!(produce.answer().await.error, None);
    }
    let files = files.restart();
    drop(broker);
    let held = files.hold(Fault::new(Operation::Read).on("large-0/00000000000000000000.log"));
    // A free port, so that it is known before the broker has started.
    let admin = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let starting = tokio::spawn({
        let (dir, files) = (dir.path().to_owned(), Arc::clone(&files));
        async move { start_on(&dir, &files, &[&format!("admin.listen={admin}")]).await }
    });
    within("the recovery", async {
        while held.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(get(admin, "/health").await.starts_with("HTTP/1.1 200"));
    let ready = get(admin, "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("starting\n"), "{ready}");
    let metrics = within("everything else to be opened", async {
        loop {
            let metrics = get(admin, "/metrics").await;
            if metrics.contains("headwater_partitions_recovering 1") {
                break metrics;
            }
        }
    });
    let metrics = metrics.await;
    assert!(metrics.contains("headwater_partition_high_watermark{topic=\"small\",partition=\"0\"} 1"), "{metrics}");
    let sample = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is missing")).parse::<u64>().unwrap()
    };
    let (scanned, to_scan) =
        (sample("headwater_recovery_scanned_bytes_total"), sample("headwater_recovery_bytes_total"));
    assert!(0 < scanned && scanned < to_scan, "{scanned} of {to_scan}");
    assert!(!starting.is_finished());
    drop(held);
    let broker = within("the start", starting).await.unwrap();
    assert_eq!(broker.admin_addr(), admin);
    assert!(get(admin, "/ready").await.ends_with("ready\n"));
    assert!(get(admin, "/metrics").await.contains("headwater_partitions_recovering 0"));
    broker.shutdown().await;
}

/// Whoever tries again right after a start that failed finds the folder free.
#[tokio::test]
async fn a_start_that_fails_lets_go_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(2);
    start_on(dir.path(), &files, &[]).await.shutdown().await;
    for _ in 0..3 {
        files.fail(Fault::new(Operation::Open).on("metadata"));
        let refused = within("the refusal", Broker::start_on(config(dir.path()), files.clone())).await.unwrap_err();
        assert!(refused.to_string().contains("metadata"), "{refused}");
        files.heal();
    }
    start_on(dir.path(), &files, &[]).await.shutdown().await;
}

/// The task of every partition had a way to itself, waited for whoever had one too, and kept its log open, for as long as the process
/// lived: a log that somebody else may have opened meanwhile.
#[tokio::test]
async fn a_broker_that_is_dropped_lets_go_of_its_logs() {
    let dir = tempfile::tempdir().unwrap();
    let files = SimFiles::new(3);
    let broker = start_on(dir.path(), &files, &[]).await;
    let client = Client::connect(&broker).await;
    // It would be flushed an hour later.
    let config = [("durability", "replicated"), ("flush.ms", "3600000")];
    let topic = client.create_topic("t", 3, &config).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"x"])).await;
    assert_eq!(produce.answer().await.error, None);
    drop(broker);
    within("everything to be let go of", async {
        while Arc::strong_count(&files) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
