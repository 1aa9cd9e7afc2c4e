//! What partitions cost on which nothing happens.

use super::cluster::*;
use super::harness::*;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::UdpSocket;

/// A relay in front of a broker: where it is reached, and how many packets went either way.
async fn relay(to: Arc<std::sync::Mutex<Option<SocketAddr>>>) -> (SocketAddr, Arc<AtomicU64>) {
    let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (address, packets) = (front.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&packets);
    tokio::spawn(async move {
        let (mut out, mut home) = (vec![0; 65_536], vec![0; 65_536]);
        // Its only peer.
        let mut peer = None;
        loop {
            let sent = tokio::select! {
                packet = front.recv_from(&mut out) => {
                    let (bytes, from) = packet.unwrap();
                    peer = Some(from);
                    let target = *to.lock().unwrap();
                    match target {
                        Some(target) => back.send_to(&out[..bytes], target).await,
                        None => continue,
                    }
                }
                packet = back.recv_from(&mut home) => {
                    let (bytes, _) = packet.unwrap();
                    match peer {
                        Some(peer) => front.send_to(&home[..bytes], peer).await,
                        None => continue,
                    }
                }
            };
            drop(sent);
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    (address, packets)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_idle_partitions_cost_keep_alives_and_nothing_else() {
    const PARTITIONS: usize = 1000;
    const WATCHED: Duration = Duration::from_secs(4);
    let mut cluster = Cluster::start(&[], &[]).await;
    let to = Arc::default();
    let (address, packets) = relay(Arc::clone(&to)).await;
    let files = Arc::new(headwater_storage::OsFiles::default());
    cluster.up_on(1, files, &[&format!("advertised.listener={address}")]).await;
    *to.lock().unwrap() = Some(cluster.broker(1).listen_addr());
    cluster.up(2).await;
    cluster.create("t", PARTITIONS, &[1, 2], &[("min.insync.replicas", "2")]);
    cluster.until_in_sync("t", &[1, 2]).await;
    cluster.until_sample(1, "headwater_streams{kind=\"replica\"}", PARTITIONS as f64).await;
    cluster.until_sample(2, "headwater_following_streams", PARTITIONS as f64).await;
    // What was said last is on its way still: it is over when nothing went for a moment.
    within("quiet", async {
        loop {
            let before = packets.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(500)).await;
            if packets.load(Ordering::Relaxed) - before <= 4 {
                return;
            }
        }
    })
    .await;
    let before = packets.load(Ordering::Relaxed);
    tokio::time::sleep(WATCHED).await;
    let sent = packets.load(Ordering::Relaxed) - before;
    // Either side says each second that it lives, and is answered.
    assert!(sent <= 8 * WATCHED.as_secs(), "{sent} packets in {WATCHED:?}");
    assert!(sent > 0, "the connection is there");
}
