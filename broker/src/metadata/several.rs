//! A broker that is one of several: its member of the quorum on a thread of its own, and how it comes in.
//!
//! It is a member first (whoever is none asks to follow), then it knows what everybody knows, and looks at its replicas; then it registers
//! this start of it, which ends what earlier ones held, and names the replicas that are lost. From then on it says to every voter that it is there, and the controller lets it serve
//! once it has recovered. Nothing of this gives up while nobody leads: all brokers may start at once.
//!
//! Owns: that order, and the file with the count of this disk's starts ([`super::boots`]). Refuses: what the commands mean ([`super::state`]); who is held to be
//! there ([`super::raft::sessions`]). Read next: [`super::alone`], the same for a broker that is the whole cluster.

use super::MetadataError;
use super::alone;
use super::boots::Boots;
use super::command::{DrainBroker, RegisterBroker, command::Command as Kind};
use super::raft::{Hearing, Heart, Links, LinksConfig, RaftNode, RaftServer, RaftThread, Store, links};
use super::state::{Broker, BrokerState, MetadataState, Outcome};
use crate::config::BrokerConfig;
use crate::disk::DiskHealth;
use crate::error::StartError;
use crate::lease::Lease;
use crate::os;
use crate::peer::Peers;
use crate::pool::Pool;
use headwater_proto::{ErrorCode, wire};
use headwater_storage::files::{self, Files};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often this disk was started as a member of a cluster of several, and as of which start of the operating system.
pub(crate) const BOOTS_FILE: &str = "headwater.boots";

/// Time for one try to come in.
const TRY: Duration = Duration::from_secs(5);
/// How long nothing is tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is said that nobody leads.
const TELL: Duration = Duration::from_secs(10);
/// Time for the controller to let a broker serve that says it is ready; then it serves what it may.
const UNFENCED: Duration = Duration::from_secs(15);
/// Time to hand leaderships over before a broker stops.
const DRAINED: Duration = Duration::from_secs(10);
/// How often it is looked whether there is a quorum to hand them over still.
const LOOK: Duration = Duration::from_millis(20);

/// This broker's member.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) node: RaftNode,
    pub(crate) server: RaftServer,
    pub(crate) thread: RaftThread,
    links: Links,
    hearing: Hearing,
}

/// Where this broker is, and whom it speaks to.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) listen: SocketAddr,
    /// Where others reach it.
    pub(crate) advertised: String,
    pub(crate) peers: Peers,
}

impl Member {
    /// Starts the member. It answers others from now on, if whoever accepts connections lets it.
    pub(crate) async fn start(
        store: Store,
        config: &BrokerConfig,
        place: Place,
        start: Option<wire::RaftStart>,
        deadline: Instant,
    ) -> Result<Member, StartError> {
        let refused = |error: &dyn std::fmt::Display| StartError::Quorum(error.to_string());
        let thread = RaftThread::start().map_err(StartError::Threads)?;
        let client = place.peers.client_config(None, links::transport()).map_err(|error| refused(&error))?;
        let endpoint = {
            // What is heard on it is heard on the quorum's thread, however busy the others are.
            let _entered = thread.runtime().enter();
            let any = SocketAddr::new(place.listen.ip(), 0);
            quinn::Endpoint::client(any).map_err(|error| StartError::Listen { address: any, error })?
        };
        let links_config = LinksConfig {
            cluster_id: store.cluster_id().to_owned(),
            node_id: store.node_id(),
            address: place.advertised,
            start,
            configured: config.quorum_servers(),
            client,
            server_name: crate::peer::HANDSHAKE_NAME.to_owned(),
            peers: Some(place.peers),
        };
        let links = Links::new(&thread, endpoint, links_config);
        let linked = links.clone();
        let started = thread.runtime().spawn(async move { RaftNode::start_linked(store, linked, deadline).await });
        let node = started.await.map_err(|error| refused(&error))?.map_err(|error| refused(&error))?;
        let hearing = Hearing::new(Duration::from_millis(config.broker_session_timeout_ms));
        let server = RaftServer::new(node.clone(), links.clone(), hearing.clone());
        Ok(Member { node, server, thread, links, hearing })
    }

    /// Comes in: when this returns, the broker follows the metadata, and knows what everybody knows.
    pub(crate) async fn come_in(&self) -> Result<Arc<MetadataState>, StartError> {
        let node = &self.node;
        let is_member = || node.applied().borrow().membership.membership().get_node(&node.node_id()).is_some();
        if !is_member() {
            patiently("to be taken in", || node.join(Instant::now() + TRY)).await?;
        }
        self.catch_up().await
    }

    async fn catch_up(&self) -> Result<Arc<MetadataState>, StartError> {
        patiently("to know what the others know", || self.node.catch_up(Instant::now() + TRY)).await?;
        Ok(Arc::clone(&self.node.applied().borrow().state))
    }

    fn is_only_voter(&self) -> bool {
        self.node.membership().voter_ids().eq([self.node.node_id()])
    }

    /// Registers: when this returns, the cluster knows this start of the broker, which is fenced, and which of its replicas are lost.
    /// `registration` says everything but the number of starts.
    pub(crate) async fn register(
        &self,
        registration: RegisterBroker,
        mut boots: Boots,
        (root, files, pool): (&Path, &Arc<dyn Files>, &Pool),
    ) -> Result<RegisterBroker, StartError> {
        let node = &self.node;
        // To look at the replicas may have taken long.
        let state = self.catch_up().await?;
        let known = state.broker(registration.broker_id);
        let path = root.join(BOOTS_FILE);
        let incarnation = incarnation_of(&registration);
        let count = boots.begin(incarnation, known);
        // Whose journal is an older copy too is another member from now on, before it counts as a start of this disk. The journal of the
        // only voter is the newest there is.
        let was_member = known.filter(|known| known.node_id == node.node_id());
        let is_older = |known: &Broker| boots.start().is_some_and(|start| known.is_older_copy(&start));
        if let Some(known) = was_member.filter(|known| is_older(known))
            && !self.is_only_voter()
        {
            let why = format!(
                "this disk was started {count} times, broker {} {} times before, as the cluster knows it",
                registration.broker_id, known.boots
            );
            return Err(StartError::OlderDisk(why));
        }
        // The kernel is another one for as long as nobody was told so.
        keep_boots(&boots, &path, files, pool).await?;
        let (replaces, begins) = (known.map_or(0, |known| known.epoch), alone::first_level(&state));
        let registration = RegisterBroker { boots: count, replaces, ..registration };
        let command: super::command::Command = Kind::RegisterBroker(registration.clone()).into();
        let registered = patiently("to register", || node.propose(command.clone(), true, Instant::now() + TRY));
        let counts = match registered.await? {
            (_, Outcome::BrokerRegistered { boots: counts }) => counts,
            _ => count,
        };
        keep_boots(&Boots::counted(counts, os::kernel_start()), &path, files, pool).await?;
        // Where an older broker came at the same time, a person raises it.
        if let Some(begins) = begins
            && let Err(error) = node.propose(begins, true, Instant::now() + TRY).await
        {
            tracing::info!(%error, "the cluster begins at an older feature level");
        }
        Ok(registration)
    }

    /// Says that this broker is there, and controls the others while it is the controller, until `stop`.
    pub(crate) fn live(
        &self,
        registration: &RegisterBroker,
        config: &BrokerConfig,
        Known { in_office, carried_out, lease, disk, elections }: Known,
        stop: &CancellationToken,
    ) -> Ready {
        let is_ready = Arc::new(AtomicBool::new(false));
        let heart = Heart {
            node: self.node.clone(),
            links: self.links.clone(),
            hearing: self.hearing.clone(),
            broker_id: registration.broker_id,
            incarnation: registration.incarnation.clone(),
            is_ready: Arc::clone(&is_ready),
            interval: Duration::from_millis(config.broker_heartbeat_interval_ms),
            in_office,
            lease: lease.clone(),
            session: Duration::from_millis(config.broker_session_timeout_ms),
            answered: Arc::default(),
            disk,
            balance_after: config
                .leader_rebalance
                .then(|| Duration::from_secs(config.leader_imbalance_check_interval_s)),
            elections,
        };
        self.thread.runtime().spawn(heart.clone().beat(stop.clone()));
        self.thread.runtime().spawn(heart.control(stop.clone()));
        Ready { is_ready, node: self.node.clone(), registration: registration.clone(), carried_out, lease }
    }
}

/// What the rest of the broker knows of itself.
pub(crate) struct Known {
    /// The epoch in which it is the controller.
    pub(crate) in_office: watch::Receiver<Option<u64>>,
    /// The version of the metadata by which its partitions go.
    pub(crate) carried_out: watch::Receiver<u64>,
    pub(crate) lease: Lease,
    pub(crate) disk: Arc<DiskHealth>,
    /// How long elections take.
    pub(crate) elections: metrics::Histogram,
}

/// Says that a broker has recovered.
#[derive(Debug)]
pub(crate) struct Ready {
    is_ready: Arc<AtomicBool>,
    node: RaftNode,
    registration: RegisterBroker,
    carried_out: watch::Receiver<u64>,
    lease: Lease,
}

impl Ready {
    /// Lets the controller know, and waits until it lets the broker serve; not for ever, as there may be no controller.
    pub(crate) async fn say(&self) {
        self.is_ready.store(true, Ordering::Release);
        let (broker_id, mut applied) = (self.registration.broker_id, self.node.applied());
        let active = applied.wait_for(|applied| is_active(&applied.state, broker_id));
        if timeout_at(Instant::now() + UNFENCED, active).await.is_err() {
            tracing::warn!(broker_id, "no controller has let this broker serve yet");
        }
    }

    /// Whether most voters have answered this broker of late.
    pub(crate) fn is_heard(&self) -> bool {
        self.lease.holds()
    }

    /// Hands over what this broker leads, where others remain: it is about to stop. Never waits for a quorum that is lost.
    pub(crate) async fn drain(&self) {
        let RegisterBroker { broker_id, incarnation, .. } = self.registration.clone();
        let state = Arc::clone(&self.node.applied().borrow().state);
        let others = state.brokers().any(|other| other.id != broker_id && other.state == BrokerState::Active);
        if !others || !is_active(&state, broker_id) {
            return;
        }
        let deadline = Instant::now() + DRAINED;
        let handed_over = async {
            let drain = Kind::DrainBroker(DrainBroker { broker_id, incarnation });
            self.node.propose(drain.into(), true, deadline).await?;
            let mut applied = self.node.applied();
            let left = applied.wait_for(|applied| !leads_what_another_may(&applied.state, broker_id));
            let index = left.await.map(|applied| applied.state.index()).map_err(|_| MetadataError::ShuttingDown)?;
            let mut carried_out = self.carried_out.clone();
            let carried_out = carried_out.wait_for(|carried_out| *carried_out >= index);
            carried_out.await.map(drop).map_err(|_| MetadataError::ShuttingDown)
        };
        let handed_over = tokio::select! {
            biased;
            handed_over = timeout_at(deadline, handed_over) => handed_over.unwrap_or(Err(MetadataError::TimedOut)),
            // Those who would take over are gone too.
            () = self.lease_is_over() => Err(MetadataError::NoLeader),
        };
        match handed_over {
            Ok(()) => tracing::info!("leaderships handed over"),
            Err(error) => tracing::warn!(%error, "leaderships were not handed over: the others find out by themselves"),
        }
    }

    async fn lease_is_over(&self) {
        while self.lease.holds() {
            sleep(LOOK).await;
        }
    }
}

/// Whether a broker leads a partition that another one may lead once it is in sync.
fn leads_what_another_may(state: &MetadataState, broker_id: i32) -> bool {
    let may = |other: &i32| *other != broker_id && is_active(state, *other);
    let mut partitions = state.topics().flat_map(|topic| &topic.partitions);
    partitions.any(|partition| partition.leader == broker_id && partition.replicas.iter().any(may))
}

fn is_active(state: &MetadataState, broker_id: i32) -> bool {
    state.broker(broker_id).is_some_and(|broker| broker.state == BrokerState::Active)
}

/// Tries until it is done, or refused.
async fn patiently<T, F: Future<Output = Result<T, MetadataError>>>(
    what: &'static str,
    mut attempt: impl FnMut() -> F,
) -> Result<T, StartError> {
    let mut told: Option<Instant> = None;
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(MetadataError::Elsewhere { code: ErrorCode::OlderDisk, message, .. }) => {
                return Err(StartError::OlderDisk(message));
            }
            Err(error)
                if error.is_refusal() || matches!(error, MetadataError::Stopped(_) | MetadataError::Journal(_)) =>
            {
                return Err(StartError::Quorum(error.to_string()));
            }
            Err(error) => {
                if told.is_none_or(|told| told.elapsed() >= TELL) {
                    tracing::info!(%error, what, "the broker waits for the metadata quorum");
                    told = Some(Instant::now());
                }
                sleep(PAUSE).await;
            }
        }
    }
}

/// What this disk knows of its starts, with this one among those that may be registered. It is kept before anybody is answered.
pub(crate) async fn begin_start(
    registration: &RegisterBroker,
    (root, files, pool): (&Path, &Arc<dyn Files>, &Pool),
) -> Result<Boots, StartError> {
    let (read_from, path) = (Arc::clone(files), root.join(BOOTS_FILE));
    let mut boots = pool.run(move || read_boots(&*read_from, &path)).await?;
    if boots.tries(incarnation_of(registration)) {
        keep_boots(&boots, &root.join(BOOTS_FILE), files, pool).await?;
    }
    Ok(boots)
}

fn incarnation_of(registration: &RegisterBroker) -> Uuid {
    Uuid::from_slice(&registration.incarnation).unwrap_or_default()
}

fn read_boots(files: &dyn Files, path: &Path) -> Result<Boots, StartError> {
    let failed = |error| StartError::Boots { path: path.to_owned(), error };
    if !files::exists(files, path).map_err(failed)? {
        return Ok(Boots::default());
    }
    let bytes = files::read(files, path, 4096).map_err(failed)?;
    let text = String::from_utf8_lossy(&bytes);
    Boots::decode(&text).ok_or_else(|| {
        let why = format!("it holds {:?}", text.trim());
        failed(std::io::Error::new(std::io::ErrorKind::InvalidData, why))
    })
}

async fn keep_boots(boots: &Boots, path: &Path, files: &Arc<dyn Files>, pool: &Pool) -> Result<(), StartError> {
    let (files, path, text): (_, PathBuf, _) = (Arc::clone(files), path.to_owned(), boots.encode());
    let kept = pool.run(move || {
        files::replace(&*files, &path, text.as_bytes()).map_err(|error| StartError::Boots { path, error })
    });
    kept.await
}
