//! The listening endpoint: who is let in.
//!
//! Owns: accepting connections, and their number. Refuses: more of them than the settings allow, in all and from one
//! address; and to answer a flood of spoofed first packets with handshakes (while many are under way, an address must
//! prove itself by a retry first). Read next: [`crate::session`].

use crate::config::BrokerConfig;
use crate::metadata::raft::RaftServer;
use crate::metrics::{Counted, Metrics};
use crate::session;
use crate::shared::Shared;
use crate::tls::live::Live;
use headwater_proto::ErrorCode;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections above which an address has to prove itself before a handshake begins: as a share of what is allowed.
const RETRY_ABOVE_PERCENT: u32 = 50;

/// What a connection is received with, before it is known whose it is. A member of a quorum of several receives the others
/// before it serves clients: it cannot start without them, nor they without it.
pub(crate) struct Door {
    pub(crate) config: BrokerConfig,
    pub(crate) tls: Arc<Live>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) next_connection: AtomicU64,
    pub(crate) sessions: TaskTracker,
    pub(crate) shutdown: CancellationToken,
    /// Who answers other members of the metadata quorum, and on which thread.
    pub(crate) quorum: Option<(RaftServer, Handle)>,
    /// What clients are served with; `None`: not yet.
    pub(crate) shared: watch::Receiver<Option<Arc<Shared>>>,
}

/// Open connections by address.
#[derive(Default)]
pub(crate) struct Connections {
    by_address: Mutex<HashMap<IpAddr, u32>>,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.lock().values().sum()
    }
}

/// One place among the connections, given back when this is dropped.
struct Place {
    door: Arc<Door>,
    address: IpAddr,
    _counted: Counted,
}

impl Place {
    fn take(door: &Arc<Door>, address: IpAddr) -> Option<Place> {
        let mut connections = door.connections.lock();
        let all: u32 = connections.values().sum();
        let from_here = connections.get(&address).copied().unwrap_or(0);
        if all >= door.config.max_connections || from_here >= door.config.max_connections_per_ip {
            return None;
        }
        connections.insert(address, from_here + 1);
        drop(connections);
        let counted = Counted::new(&door.metrics.connections);
        Some(Place { door: Arc::clone(door), address, _counted: counted })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.door.connections.lock();
        if let Some(count) = connections.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.address);
            }
        }
    }
}

/// Accepts connections until the broker shuts down.
pub(crate) async fn accept(door: Arc<Door>, endpoint: quinn::Endpoint) {
    loop {
        let incoming = tokio::select! {
            biased;
            () = door.shutdown.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        let address = incoming.remote_address().ip();
        let crowded = door.connections.count() * 100 >= door.config.max_connections * RETRY_ABOVE_PERCENT;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // An error means that it cannot be retried, which was asked before.
            drop(incoming.retry());
            continue;
        }
        let Some(place) = Place::take(&door, address) else {
            tracing::warn!(%address, "connection refused: there are as many as the settings allow");
            door.metrics.rejected(ErrorCode::Overloaded);
            incoming.refuse();
            continue;
        };
        door.metrics.connections_total.increment(1);
        let session = session::serve(Arc::clone(&door), incoming);
        door.sessions.spawn(async move {
            session.await;
            drop(place);
        });
    }
    // Late comers are told at once, instead of waiting for a handshake that never comes.
    endpoint.set_server_config(None);
    door.sessions.close();
}
