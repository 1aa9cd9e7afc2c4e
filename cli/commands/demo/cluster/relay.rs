//! What lies between the brokers of the demo: each is dialled through a relay of its own, which loses packets between two of them.
//!
//! A broker dials from the address on which it listens, and so is known by where its packets come from.

use anyhow::{Context, Result};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// As large as a packet can be.
const PACKET_BYTES: usize = 65_536;

/// The ways between brokers.
pub(super) struct Relay {
    ways: Arc<Ways>,
}

struct Ways {
    lost_percent: u32,
    lost: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Whose socket it is.
    brokers: HashMap<SocketAddr, u32>,
    between: Option<(u32, u32)>,
}

impl Ways {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a packet between these arrives.
    fn passes(&self, peer: SocketAddr, broker: u32) -> bool {
        let inner = self.inner();
        let (Some(peer), Some((a, b))) = (inner.brokers.get(&peer), inner.between) else { return true };
        let concerned = (*peer, broker) == (a, b) || (*peer, broker) == (b, a);
        let is_lost = concerned && rand::random_range(0..100) < self.lost_percent;
        self.lost.fetch_add(u64::from(is_lost), Ordering::Relaxed);
        !is_lost
    }
}

impl Relay {
    /// Of a hundred packets between two brokers, so many are lost, once it is said which two.
    pub(super) fn new(lost_percent: u32) -> Relay {
        Relay { ways: Arc::new(Ways { lost_percent, lost: AtomicU64::new(0), inner: Mutex::default() }) }
    }

    pub(super) fn lose_between(&self, a: u32, b: u32) {
        self.ways.inner().between = Some((a, b));
    }

    pub(super) fn lose_nothing(&self) {
        self.ways.inner().between = None;
    }

    /// Packets lost so far.
    pub(super) fn lost(&self) -> u64 {
        self.ways.lost.load(Ordering::Relaxed)
    }

    /// A way to this broker: where it is dialled.
    pub(super) async fn add(&self, broker: u32, listen: SocketAddr) -> Result<SocketAddr> {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.context("there is no free port")?);
        let address = socket.local_addr()?;
        self.ways.inner().brokers.insert(listen, broker);
        tokio::spawn(relay(Arc::clone(&self.ways), socket, broker, listen));
        Ok(address)
    }
}

/// Until the runtime ends.
async fn relay(ways: Arc<Ways>, socket: Arc<UdpSocket>, broker: u32, listen: SocketAddr) {
    let (mut back, mut peers): (JoinSet<()>, HashMap<SocketAddr, Arc<UdpSocket>>) = Default::default();
    let mut packet = vec![0; PACKET_BYTES];
    loop {
        // A peer that is gone is told of by an error, and the next one is served.
        let Ok((bytes, peer)) = socket.recv_from(&mut packet).await else { continue };
        let way = match peers.get(&peer) {
            Some(way) => Arc::clone(way),
            None => {
                let Ok(way) = UdpSocket::bind("127.0.0.1:0").await else { continue };
                let way = Arc::new(way);
                peers.insert(peer, Arc::clone(&way));
                back.spawn(answers(Arc::clone(&ways), Arc::clone(&way), Arc::clone(&socket), peer, broker));
                way
            }
        };
        if ways.passes(peer, broker) {
            // Nobody may be there.
            drop(way.send_to(packet.get(..bytes).unwrap_or_default(), listen).await);
        }
    }
}

async fn answers(ways: Arc<Ways>, way: Arc<UdpSocket>, socket: Arc<UdpSocket>, peer: SocketAddr, broker: u32) {
    let mut packet = vec![0; PACKET_BYTES];
    loop {
        let Ok(bytes) = way.recv(&mut packet).await else { continue };
        if ways.passes(peer, broker) {
            drop(socket.send_to(packet.get(..bytes).unwrap_or_default(), peer).await);
        }
    }
}
