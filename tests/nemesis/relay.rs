//! What lies between brokers: each is reached through a relay of its own, which cuts, loses, delays and doubles packets as it is told.
//!
//! A packet's sender is known by its address: each broker has one of its own on this machine, 127.0.1.ID, from which it dials too.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// From whom to whom, by ids; 0: everybody who is no broker.
pub(crate) type Way = (usize, usize);

/// What happens to packets on one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Trouble {
    /// The share that vanishes: 1 cuts the way.
    pub(crate) lost: f64,
    /// The share that comes twice.
    pub(crate) doubled: f64,
    /// Each comes up to so much later, so that they overtake each other.
    pub(crate) late_ms: u64,
}

pub(crate) const CUT: Trouble = Trouble { lost: 1.0, doubled: 0.0, late_ms: 0 };

/// The ways between brokers. All are open at first.
#[derive(Debug)]
pub(crate) struct Network {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    troubles: BTreeMap<Way, Trouble>,
    rng: StdRng,
}

/// Where the broker with this id is on this machine.
pub(crate) fn address_of(id: usize) -> IpAddr {
    Ipv4Addr::new(127, 0, 1, u8::try_from(id).expect("few brokers")).into()
}

fn id_of(sender: SocketAddr) -> usize {
    match sender.ip() {
        IpAddr::V4(ip) if ip.octets()[..3] == [127, 0, 1] => ip.octets()[3].into(),
        _ => 0,
    }
}

impl Network {
    pub(crate) fn new(seed: u64) -> Arc<Network> {
        let inner = Inner { troubles: BTreeMap::new(), rng: StdRng::seed_from_u64(seed) };
        Arc::new(Network { inner: Mutex::new(inner) })
    }

    pub(crate) fn trouble(&self, ways: impl IntoIterator<Item = Way>, trouble: Trouble) {
        self.inner.lock().expect("whole").troubles.extend(ways.into_iter().map(|way| (way, trouble)));
    }

    /// Every way is open.
    pub(crate) fn heal(&self) {
        self.inner.lock().expect("whole").troubles.clear();
    }

    /// How late each copy of a packet comes.
    fn fate(&self, way: Way) -> Vec<Duration> {
        let mut inner = self.inner.lock().expect("whole");
        let Some(trouble) = inner.troubles.get(&way).copied() else { return vec![Duration::ZERO] };
        if inner.rng.random_bool(trouble.lost) {
            return Vec::new();
        }
        let copies = 1 + usize::from(inner.rng.random_bool(trouble.doubled));
        (0..copies).map(|_| Duration::from_millis(inner.rng.random_range(0..=trouble.late_ms))).collect()
    }

    async fn pass(&self, way: Way, by: &Arc<UdpSocket>, packet: &[u8], to: SocketAddr) {
        for late in self.fate(way) {
            // Nobody may be there.
            if late.is_zero() {
                drop(by.send_to(packet, to).await);
            } else {
                let (by, packet) = (Arc::clone(by), packet.to_vec());
                tokio::spawn(async move {
                    tokio::time::sleep(late).await;
                    drop(by.send_to(&packet, to).await);
                });
            }
        }
    }

    /// A relay to the broker with this id, which listens at `to` or does not: where it is reached.
    pub(crate) async fn relay(self: &Arc<Self>, id: usize, to: SocketAddr) -> SocketAddr {
        let socket = Arc::new(bind().await);
        let address = socket.local_addr().expect("bound");
        let network = Arc::clone(self);
        tokio::spawn(async move {
            let mut back = JoinSet::new();
            let mut ways: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
            let mut packet = vec![0; 65_536];
            loop {
                // An error is that nobody was where an earlier packet went.
                let Ok((bytes, sender)) = socket.recv_from(&mut packet).await else { continue };
                if let std::collections::btree_map::Entry::Vacant(vacant) = ways.entry(sender) {
                    let way = Arc::new(bind().await);
                    vacant.insert(Arc::clone(&way));
                    back.spawn(Arc::clone(&network).back(way, Arc::clone(&socket), id, sender));
                }
                let way = &ways[&sender];
                network.pass((id_of(sender), id), way, &packet[..bytes], to).await;
            }
        });
        address
    }

    async fn back(self: Arc<Self>, way: Arc<UdpSocket>, by: Arc<UdpSocket>, id: usize, to: SocketAddr) {
        let mut packet = vec![0; 65_536];
        loop {
            let Ok((bytes, _)) = way.recv_from(&mut packet).await else { continue };
            self.pass((id, id_of(to)), &by, &packet[..bytes], to).await;
        }
    }
}

async fn bind() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    // What the system permits of it: what does not fit is lost.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4 << 20);
    socket
}
