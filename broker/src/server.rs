//! The listening endpoint: who is let in.
//!
//! Owns: accepting connections, and their number. Refuses: more of them than the settings allow, in all and from one
//! address (a few places beyond are for other brokers of the cluster, whom clients must not cut off from their quorum: whoever shows
//! another certificate there is sent away after the handshake); and to answer a flood of spoofed first packets with handshakes (while many are under way, an address must
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

/// Places beyond what the settings allow, for brokers of this cluster.
const BROKER_RESERVE: u32 = 64;
/// As many of them as one address has while it is not known yet that it is a broker's.
const UNPROVEN_PER_ADDRESS: u32 = 8;

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

impl Door {
    /// Whether there are other brokers, which may want to come in.
    fn knows_others(&self) -> bool {
        let shared = self.shared.borrow();
        self.quorum.is_some()
            || shared.as_ref().is_some_and(|shared| shared.metadata.state().brokers().nth(1).is_some())
    }
}

/// Open connections.
#[derive(Default)]
pub(crate) struct Connections {
    counts: Mutex<Counts>,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are of those that the settings limit.
    pub(crate) fn count(&self) -> u32 {
        self.lock().within_limits()
    }
}

/// What a connection has a place among.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Those that the settings limit.
    Anybody,
    /// The reserve, and nobody knows yet whose it is.
    Unproven,
    /// The reserve.
    Broker,
}

#[derive(Debug, Default)]
struct Counts {
    /// Those that the settings limit, by address.
    by_address: HashMap<IpAddr, u32>,
    reserved: u32,
    /// The unproven ones of these, by address.
    unproven: HashMap<IpAddr, u32>,
}

impl Counts {
    fn within_limits(&self) -> u32 {
        self.by_address.values().sum()
    }

    /// A place for a connection from this address; so many are allowed in all and from one address.
    fn take(
        &mut self,
        address: IpAddr,
        (in_all, per_address): (u32, u32),
        has_reserve: impl FnOnce() -> bool,
    ) -> Option<Kind> {
        let of = |counts: &HashMap<IpAddr, u32>| counts.get(&address).copied().unwrap_or(0);
        if self.within_limits() < in_all && of(&self.by_address) < per_address {
            *self.by_address.entry(address).or_default() += 1;
            return Some(Kind::Anybody);
        }
        let has_room = self.reserved < BROKER_RESERVE && of(&self.unproven) < UNPROVEN_PER_ADDRESS;
        (has_room && has_reserve()).then(|| {
            self.reserved += 1;
            *self.unproven.entry(address).or_default() += 1;
            Kind::Unproven
        })
    }

    /// It is a broker's.
    fn prove(&mut self, address: IpAddr) {
        lower(&mut self.unproven, address);
    }

    fn give_back(&mut self, address: IpAddr, kind: Kind) {
        match kind {
            Kind::Anybody => lower(&mut self.by_address, address),
            Kind::Unproven => {
                lower(&mut self.unproven, address);
                self.reserved -= 1;
            }
            Kind::Broker => self.reserved -= 1,
        }
    }
}

fn lower(counts: &mut HashMap<IpAddr, u32>, address: IpAddr) {
    if let Some(count) = counts.get_mut(&address) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&address);
        }
    }
}

/// One place among the connections, given back when this is dropped.
pub(crate) struct Place {
    door: Arc<Door>,
    address: IpAddr,
    kind: Kind,
    _counted: Counted,
}

impl Place {
    fn take(door: &Arc<Door>, address: IpAddr) -> Option<Place> {
        let limits = (door.config.max_connections, door.config.max_connections_per_ip);
        let kind = door.connections.lock().take(address, limits, || door.knows_others())?;
        let counted = Counted::new(&door.metrics.connections);
        Some(Place { door: Arc::clone(door), address, kind, _counted: counted })
    }

    /// Whether whoever has it may keep it, now that it is known whether it is a broker of the cluster.
    pub(crate) fn is_for(&mut self, is_broker: bool) -> bool {
        if self.kind == Kind::Unproven && is_broker {
            self.door.connections.lock().prove(self.address);
            self.kind = Kind::Broker;
        }
        self.kind != Kind::Unproven
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.connections.lock().give_back(self.address, self.kind);
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
        door.sessions.spawn(session::serve(Arc::clone(&door), incoming, place));
    }
    // Late comers are told at once, instead of waiting for a handshake that never comes.
    endpoint.set_server_config(None);
    door.sessions.close();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_for_brokers_and_has_bounds_itself() {
        let address = |n: u8| IpAddr::from([127, 0, 0, n]);
        let mut counts = Counts::default();
        let limits = (3, 2);
        let take = |counts: &mut Counts, n| counts.take(address(n), limits, || true);
        assert_eq!([1, 1, 2].map(|n| take(&mut counts, n)), [Some(Kind::Anybody); 3]);
        assert_eq!(counts.take(address(3), limits, || false), None, "a broker that is alone knows no others");
        // One address does not take it away from the others before it is known whose it is.
        let taken = (0..20).filter(|_| take(&mut counts, 1).is_some()).count();
        assert_eq!(taken, UNPROVEN_PER_ADDRESS as usize);
        counts.prove(address(1));
        assert_eq!((take(&mut counts, 1), take(&mut counts, 1)), (Some(Kind::Unproven), None));
        for n in 3..=u8::MAX {
            take(&mut counts, n);
        }
        assert_eq!((counts.reserved, counts.within_limits()), (BROKER_RESERVE, 3));
        assert_eq!(take(&mut counts, 2), None);
        // What is given back is there for whoever comes next.
        counts.give_back(address(1), Kind::Broker);
        assert_eq!(take(&mut counts, 2), Some(Kind::Unproven));
        counts.give_back(address(2), Kind::Unproven);
        counts.give_back(address(2), Kind::Anybody);
        assert_eq!(take(&mut counts, 2), Some(Kind::Anybody));
        assert!(!counts.unproven.contains_key(&address(2)));
    }
}
