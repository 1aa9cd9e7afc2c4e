//! The listening endpoint: who is let in.
//!
//! Owns: accepting connections, and their number. Refuses: more of them than the settings allow, in all and from one
//! address; and to answer a flood of spoofed first packets with handshakes (while many are under way, an address must
//! prove itself by a retry first). Read next: [`crate::session`].

use crate::metrics::Counted;
use crate::session;
use crate::shared::Shared;
use headwater_proto::ErrorCode;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections above which an address has to prove itself before a handshake begins: as a share of what is allowed.
const RETRY_ABOVE_PERCENT: u32 = 50;

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
    shared: Arc<Shared>,
    address: IpAddr,
    _counted: Counted,
}

impl Place {
    fn take(shared: &Arc<Shared>, address: IpAddr) -> Option<Place> {
        let mut connections = shared.connections.lock();
        let all: u32 = connections.values().sum();
        let from_here = connections.get(&address).copied().unwrap_or(0);
        if all >= shared.config.max_connections || from_here >= shared.config.max_connections_per_ip {
            return None;
        }
        connections.insert(address, from_here + 1);
        drop(connections);
        let counted = Counted::new(&shared.metrics.connections);
        Some(Place { shared: Arc::clone(shared), address, _counted: counted })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.connections.lock();
        if let Some(count) = connections.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.address);
            }
        }
    }
}

/// Accepts connections until the broker shuts down.
pub(crate) async fn accept(shared: Arc<Shared>, endpoint: quinn::Endpoint) {
    loop {
        let incoming = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        let address = incoming.remote_address().ip();
        let crowded = shared.connections.count() * 100 >= shared.config.max_connections * RETRY_ABOVE_PERCENT;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // An error means that it cannot be retried, which was asked before.
            drop(incoming.retry());
            continue;
        }
        let Some(place) = Place::take(&shared, address) else {
            tracing::warn!(%address, "connection refused: there are as many as the settings allow");
            shared.metrics.rejected(ErrorCode::Overloaded);
            incoming.refuse();
            continue;
        };
        shared.metrics.connections_total.increment(1);
        let session = session::serve(Arc::clone(&shared), incoming);
        shared.sessions.spawn(async move {
            session.await;
            drop(place);
        });
    }
    // Late comers are told at once, instead of waiting for a handshake that never comes.
    endpoint.set_server_config(None);
    shared.sessions.close();
}
