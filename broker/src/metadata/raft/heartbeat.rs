//! Saying that a broker is there, and doing what the controller decides of those who are not.
//!
//! Everything here runs on the quorum's thread, over the quorum's connections: a busy data path never looks like a death.
//!
//! Owns: the two loops, and the clock. Refuses: the decision ([`super::sessions`]). Read next: [`super::sessions`].

use super::super::command::{
    BrokerHeard, BrokerHeartbeat, Command, ElectLeaders, ElectionKind, FenceBroker, FenceReplicas, RaftRequest,
    RaftResponse, RestoreReplicas, TopicPartition, UnfenceBroker, command::Command as Kind, raft_request::Request,
    raft_response::Response,
};
use super::super::state::{Broker, BrokerState, MetadataState};
use super::balance::Balance;
use super::links::{Links, RaftStream};
use super::members::Change;
use super::node::RaftNode;
use super::sessions::{self, Decision, Says, Sessions};
use super::{story, succession};
use crate::disk::DiskHealth;
use crate::lease::{Lease, confirmed_ms};
use crate::rounds::Key;
use bytes::Bytes;
use futures::future::join_all;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often the controller looks at the sessions.
const LOOK: Duration = Duration::from_millis(50);
/// A look that comes so much later than it was to be: this process stood still, and heard nothing.
const STOOD_STILL: Duration = Duration::from_millis(100);
/// Time for the quorum to take what the controller decided.
const DECISION: Duration = Duration::from_secs(2);

/// How often the controller looks who should lead.
const BALANCE: Duration = Duration::from_secs(1);
/// Time for a change of who votes.
const SUCCESSION: Duration = Duration::from_secs(10);
/// How long a change of who votes that was refused is not tried again.
const SUCCESSION_PAUSE: Duration = Duration::from_secs(2);
/// Most replicas that a heartbeat names: the others come with the next ones.
const MOST_UNFIT: usize = 1_000;

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

    /// The next moment for what is done every so often: all that is due then wakes the thread once.
    fn next(&self, every: Duration) -> Instant {
        next_after(self.began, Instant::now(), every)
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A broker says that it is there; nothing, if it does not say who.
    pub(super) fn hear(&self, node: &RaftNode, heartbeat: &BrokerHeartbeat) -> BrokerHeard {
        let Ok(incarnation) = Uuid::from_slice(&heartbeat.incarnation) else {
            return BrokerHeard { fenced: true, version: 0 };
        };
        let state = Arc::clone(&node.applied().borrow().state);
        let says =
            Says { is_ready: heartbeat.ready, unfit: heartbeat.unfit.clone(), restored: heartbeat.restored.clone() };
        self.lock().hear(self.now_ms(), heartbeat.broker_id, incarnation, says, &state);
        let known = state.broker(heartbeat.broker_id).filter(|known| known.incarnation == incarnation);
        BrokerHeard { fenced: known.is_none_or(|known| known.state == BrokerState::Fenced), version: state.index() }
    }
}

/// The first moment after `now` that is a whole number of times `every` after `began`.
fn next_after(began: Instant, now: Instant, every: Duration) -> Instant {
    let passed = now.saturating_duration_since(began).as_nanos();
    let every = every.as_nanos().max(1);
    let next = (passed / every + 1) * every;
    began + Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX))
}

/// A broker that says that it is there.
#[derive(Clone, Debug)]
pub(crate) struct Heart {
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
    /// Confirmed by the answers.
    pub lease: Lease,
    /// How long an answer confirms it.
    pub session: Duration,
    /// When the newest heartbeat was sent that each voter has answered, by the lease's clock.
    pub answered: Arc<Mutex<HashMap<u64, u64>>>,
    /// What the disk does to the broker's replicas.
    pub(crate) disk: Arc<DiskHealth>,
    /// How long a broker has to be in sync everywhere before it leads again what it should; `None`: it is not made to.
    pub balance_after: Option<Duration>,
    /// How long elections took, since the broker that led was heard last.
    pub elections: metrics::Histogram,
}

impl Heart {
    /// Beats to every voter until `stop`. To be run on the quorum's thread.
    pub(crate) async fn beat(self, stop: CancellationToken) {
        let mut voters: HashMap<u64, JoinHandle<()>> = HashMap::new();
        let mut due = Instant::now();
        while stop.run_until_cancelled(sleep_until(due)).await.is_some() {
            due = self.hearing.next(self.interval);
            let voting: BTreeSet<u64> = self.node.membership().voter_ids().collect();
            if voting.contains(&self.node.node_id()) {
                let now_ms = self.lease.now_ms();
                let heard = self.hearing.hear(&self.node, &self.heartbeat());
                self.answered_by(self.node.node_id(), now_ms, heard);
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
        let state = Arc::clone(&self.node.applied().borrow().state);
        let named = |replicas: Vec<Key>, are_fenced| {
            let concerned =
                replicas.into_iter().filter(|it| sessions::is_fenced(&state, self.broker_id, it) == Some(are_fenced));
            let named = concerned.map(|(id, partition)| TopicPartition { topic_id: id.to_wire(), partition });
            named.take(MOST_UNFIT).collect::<Vec<_>>()
        };
        let unfit = named(self.disk.unfit(), false);
        self.disk.forget(|(topic, _)| state.topic_by_id(topic).is_some());
        let restored = named(self.disk.restored(), true);
        BrokerHeartbeat { broker_id: self.broker_id, incarnation: self.incarnation.clone(), ready, unfit, restored }
    }

    /// A voter has answered the heartbeat that was sent then.
    fn answered_by(&self, voter: u64, sent_ms: u64, heard: BrokerHeard) {
        self.lease.hear_of(heard.version, self.node.applied().borrow().state.index());
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        match heard.fenced {
            true => answered.remove(&voter),
            false => answered.insert(voter, sent_ms),
        };
        let membership = self.node.membership();
        if let Some(confirmed_ms) = confirmed_ms(membership.get_joint_config(), &answered) {
            self.lease.confirm(confirmed_ms, self.session);
        }
    }

    async fn beat_to(self, voter: u64) {
        // As long as a session may be: an answer that is late is better than a stream that is always new.
        let patience = self.interval * 5;
        let mut stream: Option<RaftStream> = None;
        let mut is_away = false;
        let mut due = Instant::now();
        loop {
            sleep_until(due).await;
            due = self.hearing.next(self.interval);
            let open = match stream.take().filter(RaftStream::is_alive) {
                Some(open) => Ok(open),
                None => match timeout(patience, self.links.open(voter)).await {
                    Ok(opened) => opened.map_err(|error| error.to_string()),
                    Err(_) => Err("no answer in time".to_owned()),
                },
            };
            let asked = async {
                let mut open = open?;
                let timeout_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
                let sent_ms = self.lease.now_ms();
                let request = RaftRequest { timeout_ms, request: Some(Request::Heartbeat(self.heartbeat())) };
                match open.ask(&request, patience).await {
                    Ok(RaftResponse { response: Some(Response::Heard(heard)) }) => {
                        self.answered_by(voter, sent_ms, heard);
                        Ok(open)
                    }
                    Ok(_) => Err("an answer to another question".to_owned()),
                    Err(error) => {
                        self.links.suspect(open.address());
                        Err(error.to_string())
                    }
                }
            };
            // Once when it goes, and once when it is back: what lies between says nothing new.
            match asked.await {
                Ok(open) => {
                    stream = Some(open);
                    if std::mem::take(&mut is_away) {
                        tracing::info!(broker = self.name_of(voter), "a member of the metadata quorum answers again");
                    }
                }
                Err(error) if !is_away => {
                    is_away = true;
                    tracing::warn!(
                        broker = self.name_of(voter),
                        error,
                        "a member of the metadata quorum does not answer"
                    );
                }
                Err(error) => tracing::debug!(broker = self.name_of(voter), error, "no heartbeat"),
            }
        }
    }

    fn name_of(&self, voter: u64) -> String {
        let state = Arc::clone(&self.node.applied().borrow().state);
        let known = state.brokers().find(|broker| broker.is_or_was(voter)).map(|broker| broker.id.to_string());
        known.unwrap_or_else(|| format!("{voter:x}"))
    }

    /// Fences and unfences brokers while this one is the controller, until `stop`. To be run on the quorum's thread.
    pub(crate) async fn control(self, stop: CancellationToken) {
        let settled_ms = self.balance_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        let mut balance = settled_ms.map(Balance::new);
        let (mut office, mut balanced) = (None, Instant::now());
        let mut known: Option<Arc<MetadataState>> = None;
        let mut lately = story::Lately::default();
        // It ends with this.
        let mut successions = JoinSet::new();
        loop {
            let due = self.hearing.next(LOOK);
            if stop.run_until_cancelled(sleep_until(due)).await.is_none() {
                return;
            }
            let late = due.elapsed();
            if late > STOOD_STILL {
                let (now_ms, late_ms) = (self.hearing.now_ms(), u64::try_from(late.as_millis()).unwrap_or(u64::MAX));
                self.hearing.lock().stood_still(now_ms, late_ms);
            }
            let in_office = *self.in_office.borrow();
            if std::mem::replace(&mut office, in_office) != in_office {
                balance.iter_mut().for_each(Balance::forget);
                known = None;
            }
            let state = Arc::clone(&self.node.applied().borrow().state);
            lately.observe(self.hearing.now_ms(), &state);
            let Some(epoch) = in_office else { continue };
            match known.replace(Arc::clone(&state)) {
                Some(before) => story::tell(&before, &state),
                None => story::tell_unclean(&lately.unclean(&state)),
            }
            // Somebody else's office has begun, which this broker has not heard of otherwise.
            if state.controller_epoch() != epoch {
                continue;
            }
            let decisions = self.hearing.lock().decide(self.hearing.now_ms(), &state);
            join_all(decisions.into_iter().map(|decision| self.propose(epoch, decision))).await;
            while successions.try_join_next().is_some() {}
            if successions.is_empty() && state.brokers().any(|broker| !broker.former_node_ids.is_empty()) {
                let members = self.node.membership();
                let of = |broker: &Broker| {
                    let broker_id = broker.id;
                    succession::due(broker, &members).into_iter().map(move |change| (broker_id, change))
                };
                let changes: Vec<(i32, Change)> = state.brokers().flat_map(of).collect();
                if !changes.is_empty() {
                    successions.spawn(self.clone().succeed(changes));
                }
            }
            if let Some(balance) = balance.as_mut().filter(|_| balanced.elapsed() >= BALANCE) {
                balanced = Instant::now();
                let state = Arc::clone(&self.node.applied().borrow().state);
                let partitions = balance.decide(self.hearing.now_ms(), &state);
                if !partitions.is_empty() {
                    self.give_back(epoch, partitions).await;
                }
            }
        }
    }

    /// Has brokers whose disks are new vote as the members that they are.
    async fn succeed(self, changes: Vec<(i32, Change)>) {
        for (broker_id, change) in changes {
            match self.node.change_members(change, Instant::now() + SUCCESSION).await {
                Ok(()) => {
                    tracing::info!(broker_id, ?change, "a broker with a new disk has its place in the quorum again")
                }
                Err(error) => {
                    tracing::info!(%error, broker_id, ?change, "a broker with a new disk does not have its place yet");
                    sleep(SUCCESSION_PAUSE).await;
                }
            }
        }
    }

    /// Has the preferred leaders lead again.
    async fn give_back(&self, controller_epoch: u64, partitions: Vec<TopicPartition>) {
        let count = partitions.len();
        let kind = Kind::ElectLeaders(ElectLeaders { kind: ElectionKind::Preferred.into(), partitions });
        let command = Command { controller_epoch, ..kind.into() };
        match self.node.propose_leading(command, true, Instant::now() + DECISION).await {
            Ok(_) => {
                tracing::info!(partitions = count, "leaderships are given back to the brokers that should have them")
            }
            // A topic may have been deleted meanwhile: the next look knows of it.
            Err(error) => tracing::info!(%error, "leaderships are not given back yet"),
        }
    }

    async fn propose(&self, controller_epoch: u64, decision: Decision) {
        let wire = |incarnation: Uuid| Bytes::copy_from_slice(incarnation.as_bytes());
        let kind = match decision.clone() {
            Decision::FenceReplicas { broker_id, incarnation, replicas } => {
                Kind::FenceReplicas(FenceReplicas { broker_id, incarnation: wire(incarnation), replicas })
            }
            Decision::RestoreReplicas { broker_id, incarnation, replicas } => {
                Kind::RestoreReplicas(RestoreReplicas { broker_id, incarnation: wire(incarnation), replicas })
            }
            Decision::Fence { broker_id, incarnation } => {
                Kind::FenceBroker(FenceBroker { broker_id, incarnation: wire(incarnation) })
            }
            Decision::Unfence { broker_id, incarnation } => {
                Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation: wire(incarnation) })
            }
        };
        let command = Command { controller_epoch, ..kind.into() };
        let state = || Arc::clone(&self.node.applied().borrow().state);
        let (before, began) = (state(), Instant::now());
        let heard_before = match &decision {
            Decision::Fence { broker_id, .. } => self.hearing.lock().unheard_ms(*broker_id, self.hearing.now_ms()),
            _ => 0,
        };
        // What belongs to an office is said by whoever holds it, and by nobody for it.
        match self.node.propose_leading(command, true, Instant::now() + DECISION).await {
            Ok(_) => {
                let took = began.elapsed();
                if matches!(decision, Decision::Fence { .. }) {
                    self.elections.record((Duration::from_millis(heard_before) + took).as_secs_f64());
                }
                story::decided(&decision, (&before, &state()), heard_before, took);
            }
            Err(error) => tracing::info!(%error, ?decision, "the controller's decision did not come into force"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_as_often_or_twice_as_often_is_due_at_the_same_moments() {
        let began = Instant::now();
        let ms = |ms: u64| began + Duration::from_millis(ms);
        let (beat, look) = (Duration::from_millis(100), Duration::from_millis(50));
        for (now, beats, looks) in
            [(0, 100, 50), (49, 100, 50), (50, 100, 100), (99, 100, 100), (100, 200, 150), (163, 200, 200)]
        {
            assert_eq!(
                (next_after(began, ms(now), beat), next_after(began, ms(now), look)),
                (ms(beats), ms(looks)),
                "{now}"
            );
        }
        assert_eq!(next_after(ms(7), ms(3), beat), ms(107), "a clock that two threads look at");
    }
}
