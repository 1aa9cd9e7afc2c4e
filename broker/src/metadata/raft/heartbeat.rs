//! Saying that a broker is there, and doing what the controller decides of those who are not.
//!
//! Everything here runs on the quorum's thread, over the quorum's connections: a busy data path never looks like a death.
//!
//! Owns: the two loops, and the clock. Refuses: the decision ([`super::sessions`]). Read next: [`super::sessions`].

use super::super::command::{
    BrokerHeartbeat, Command, FenceBroker, RaftRequest, UnfenceBroker, command::Command as Kind, raft_request::Request,
};
use super::links::{Links, RaftStream};
use super::node::RaftNode;
use super::sessions::{Decision, Sessions};
use bytes::Bytes;
use futures::future::join_all;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often the controller looks at the sessions.
const LOOK: Duration = Duration::from_millis(50);
/// A look that comes so much later than it was to be: this process stood still, and heard nothing.
const STOOD_STILL: Duration = Duration::from_millis(100);
/// Time for the quorum to take what the controller decided.
const DECISION: Duration = Duration::from_secs(2);

/// Who was heard of by this process.
#[derive(Clone, Debug)]
pub struct Hearing {
    sessions: Arc<Mutex<Sessions>>,
    began: Instant,
}

impl Hearing {
    /// Nobody yet.
    pub fn new(session_timeout: Duration) -> Hearing {
        let timeout_ms = u64::try_from(session_timeout.as_millis()).unwrap_or(u64::MAX);
        Hearing { sessions: Arc::new(Mutex::new(Sessions::new(timeout_ms, 0))), began: Instant::now() }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A broker says that it is there; nothing, if it does not say who.
    pub(super) fn hear(&self, node: &RaftNode, heartbeat: &BrokerHeartbeat) {
        let Ok(incarnation) = Uuid::from_slice(&heartbeat.incarnation) else { return };
        let state = Arc::clone(&node.applied().borrow().state);
        self.lock().hear(self.now_ms(), heartbeat.broker_id, incarnation, heartbeat.ready, &state);
    }
}

/// A broker that says that it is there.
#[derive(Clone, Debug)]
pub struct Heart {
    /// The member of the quorum.
    pub node: RaftNode,
    /// Its connections.
    pub links: Links,
    /// What it hears itself.
    pub hearing: Hearing,
    /// The broker.
    pub broker_id: i32,
    /// This start of it.
    pub incarnation: Bytes,
    /// Whether it has recovered.
    pub is_ready: Arc<AtomicBool>,
    /// How often it says so.
    pub interval: Duration,
    /// The controller's epoch, while this broker is it.
    pub in_office: watch::Receiver<Option<u64>>,
}

impl Heart {
    /// Beats to every voter until `stop`. To be run on the quorum's thread.
    pub async fn beat(self, stop: CancellationToken) {
        let mut voters: HashMap<u64, JoinHandle<()>> = HashMap::new();
        let mut every = interval(self.interval);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(every.tick()).await.is_some() {
            let voting: BTreeSet<u64> = self.node.membership().voter_ids().collect();
            if voting.contains(&self.node.node_id()) {
                self.hearing.hear(&self.node, &self.heartbeat());
            } else {
                let now_ms = self.hearing.now_ms();
                self.hearing.lock().could_not_hear(now_ms);
            }
            voters.retain(|voter, beating| {
                let stays = voting.contains(voter);
                if !stays {
                    beating.abort();
                }
                stays
            });
            for voter in voting.into_iter().filter(|voter| *voter != self.node.node_id()) {
                voters.entry(voter).or_insert_with(|| tokio::spawn(self.clone().beat_to(voter)));
            }
        }
        voters.values().for_each(JoinHandle::abort);
    }

    fn heartbeat(&self) -> BrokerHeartbeat {
        let ready = self.is_ready.load(Ordering::Acquire);
        BrokerHeartbeat { broker_id: self.broker_id, incarnation: self.incarnation.clone(), ready }
    }

    async fn beat_to(self, voter: u64) {
        // As long as a session may be: an answer that is late is better than a stream that is always new.
        let patience = self.interval * 5;
        let mut stream: Option<RaftStream> = None;
        let mut every = interval(self.interval);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let mut open = match stream.take().filter(RaftStream::is_alive) {
                Some(open) => open,
                None => match timeout(patience, self.links.open(voter)).await {
                    Ok(Ok(open)) => open,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, voter = format!("{voter:x}"), "no heartbeat");
                        continue;
                    }
                    Err(_) => continue,
                },
            };
            let timeout_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
            let request = RaftRequest { timeout_ms, request: Some(Request::Heartbeat(self.heartbeat())) };
            match open.ask(&request, patience).await {
                Ok(_) => stream = Some(open),
                Err(error) => {
                    tracing::debug!(%error, voter = format!("{voter:x}"), "no heartbeat");
                    self.links.suspect(open.address());
                }
            }
        }
    }

    /// Fences and unfences brokers while this one is the controller, until `stop`. To be run on the quorum's thread.
    pub async fn control(self, stop: CancellationToken) {
        loop {
            let due = Instant::now() + LOOK;
            if stop.run_until_cancelled(tokio::time::sleep_until(due)).await.is_none() {
                return;
            }
            if due.elapsed() > STOOD_STILL {
                let now_ms = self.hearing.now_ms();
                self.hearing.lock().could_not_hear(now_ms);
            }
            let Some(epoch) = *self.in_office.borrow() else { continue };
            let state = Arc::clone(&self.node.applied().borrow().state);
            // Somebody else's office has begun, which this broker has not heard of otherwise.
            if state.controller_epoch() != epoch {
                continue;
            }
            let decisions = self.hearing.lock().decide(self.hearing.now_ms(), &state);
            join_all(decisions.into_iter().map(|decision| self.propose(epoch, decision))).await;
        }
    }

    async fn propose(&self, controller_epoch: u64, decision: Decision) {
        let wire = |incarnation: Uuid| Bytes::copy_from_slice(incarnation.as_bytes());
        let kind = match decision {
            Decision::Fence { broker_id, incarnation } => {
                Kind::FenceBroker(FenceBroker { broker_id, incarnation: wire(incarnation) })
            }
            Decision::Unfence { broker_id, incarnation } => {
                Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: wire(incarnation) })
            }
        };
        let command = Command { controller_epoch, ..kind.into() };
        // What belongs to an office is said by whoever holds it, and by nobody for it.
        match self.node.propose_leading(command, true, Instant::now() + DECISION).await {
            Ok(_) => match decision {
                Decision::Fence { broker_id, .. } => tracing::warn!(broker_id, "broker fenced: it is not heard of"),
                Decision::Unfence { broker_id, .. } => tracing::info!(broker_id, "broker unfenced"),
            },
            Err(error) => tracing::info!(%error, ?decision, "the controller's decision did not come into force"),
        }
    }
}
