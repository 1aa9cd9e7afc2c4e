//! What lies between the members: each is reached through a relay of its own, which loses what is cut.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// Which way is cut: packets from the first to the second.
pub(crate) type Way = (usize, usize);

/// The ways between members, by their numbers.
#[derive(Default)]
pub(crate) struct Network {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    cut: BTreeSet<Way>,
    /// Whose socket it is.
    sockets: BTreeMap<SocketAddr, usize>,
}

impl Network {
    /// Packets from this socket are this member's.
    pub(crate) fn belongs(&self, socket: SocketAddr, member: usize) {
        self.inner.lock().expect("whole").sockets.insert(socket, member);
    }

    pub(crate) fn cut(&self, ways: impl IntoIterator<Item = Way>) {
        self.inner.lock().expect("whole").cut.extend(ways);
    }

    /// Every way is open.
    pub(crate) fn heal(&self) {
        self.inner.lock().expect("whole").cut.clear();
    }

    /// Opens all the ways of this member.
    pub(crate) fn heal_all_of(&self, member: usize) {
        self.inner.lock().expect("whole").cut.retain(|(from, to)| *from != member && *to != member);
    }

    fn passes(&self, from: Option<usize>, to: Option<usize>) -> bool {
        let inner = self.inner.lock().expect("whole");
        from.zip(to).is_none_or(|way| !inner.cut.contains(&way))
    }

    fn member_at(&self, socket: SocketAddr) -> Option<usize> {
        self.inner.lock().expect("whole").sockets.get(&socket).copied()
    }

    /// A relay to this member, whose socket may come and go: where it is reached.
    pub(crate) async fn relay(self: &Arc<Self>, member: usize, to: Arc<Mutex<Option<SocketAddr>>>) -> SocketAddr {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a socket"));
        let address = socket.local_addr().expect("bound");
        let network = Arc::clone(self);
        tokio::spawn(async move {
            let mut back = JoinSet::new();
            let mut ways: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
            let mut packet = vec![0; 65_536];
            while let Ok((bytes, sender)) = socket.recv_from(&mut packet).await {
                let from = network.member_at(sender);
                if let std::collections::btree_map::Entry::Vacant(vacant) = ways.entry(sender) {
                    let way = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a socket"));
                    vacant.insert(Arc::clone(&way));
                    let (network, socket) = (Arc::clone(&network), Arc::clone(&socket));
                    back.spawn(async move {
                        let mut packet = vec![0; 65_536];
                        while let Ok(bytes) = way.recv(&mut packet).await {
                            if network.passes(Some(member), from) {
                                drop(socket.send_to(&packet[..bytes], sender).await);
                            }
                        }
                    });
                }
                let target = *to.lock().expect("whole");
                if let Some((target, way)) = target.zip(ways.get(&sender))
                    && network.passes(from, Some(member))
                {
                    // Nobody may be there.
                    drop(way.send_to(&packet[..bytes], target).await);
                }
            }
        });
        address
    }
}
