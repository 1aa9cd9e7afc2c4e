//! A running member of the quorum: proposals with deadlines, and what was applied.
//!
//! A member that has been alone since it started writes one proposal after another, and each is tried on everything that was
//! applied before it. So its log has no command that is refused ([`super::machine`] relies on that), not even behind one
//! whose proposer has stopped waiting. From the moment that it may have company, proposals are under way together, nobody can
//! know what comes before them, and a refusal is an answer; the commands say so ([`super::forward`]).
//!
//! Owns: openraft's settings and its end. Refuses: what a command means; sockets (whoever starts it brings the network).
//! Read next: [`super::forward`], [`super::quorum`], [`super::office`].

use super::super::command::Command;
use super::super::handle::MetadataError;
use super::super::journal::JournalError;
use super::super::state::{MetadataState, Outcome};
use super::links::Links;
use super::office::Observed;
use super::{Answer, Applied, RaftLog, RaftMachine, Store, TypeConfig};
use openraft::error::{ClientWriteError, Fatal, RaftError};
use openraft::network::RaftNetworkFactory;
use openraft::raft::ClientWriteResponse;
use openraft::{Config, EmptyNode, Raft, ServerState, SnapshotPolicy};
use prost::Message;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How often a leader is heard of: openraft looks at its clock at one and a half times this.
const HEARTBEAT_MS: u64 = 80;
/// How long after it heard of a leader a member votes for nobody else.
const LEASE_MS: u64 = 350;
/// How long after that it stands for election at the earliest.
const PATIENCE_MS: u64 = 250;
/// How long nothing is heard of a leader before another one may be elected.
pub const ELECTION_TIMEOUT_MS: u64 = LEASE_MS + PATIENCE_MS;
/// Time for a part of a snapshot to arrive, and for the last one to be kept.
const SNAPSHOT_PART_MS: u64 = 30_000;
/// Bytes of a part of a snapshot.
const SNAPSHOT_PART_BYTES: u64 = 1 << 20;
/// Entries that are kept though they are in a snapshot: a member that was away for a moment needs no snapshot.
const KEPT_ENTRIES: u64 = 100;
/// Bytes of an entry in the journal besides its command, at most.
const ENTRY_OVERHEAD_BYTES: usize = 256;
/// How long a proposal waits before it asks again who leads.
const RETRY: Duration = Duration::from_millis(20);
/// Time to learn why the member ended.
const CAUSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to finish a change of members.
const CHANGE: Duration = Duration::from_secs(30);
/// How long the end of a member that could not be started is waited for.
const STOP: Duration = Duration::from_secs(1);

/// A running member. It ends by [`stop`](RaftNode::stop), or when nobody has it any more.
#[derive(Clone)]
pub struct RaftNode {
    pub(super) raft: Raft<TypeConfig>,
    store: Store,
    applied: watch::Receiver<Arc<Applied>>,
    /// Whoever writes to the log of a member that is alone has it until that is applied.
    pub(super) turn: Arc<Mutex<()>>,
    /// Whether nobody else has been able to write to the log since the start. Changed by whoever has the turn.
    pub(super) alone: Arc<AtomicBool>,
    /// Whether this leader steps aside for another one.
    pub(super) aside: Arc<AtomicBool>,
    /// Whoever changes the members.
    pub(super) changing: Arc<Mutex<()>>,
    pub(super) links: Option<Links>,
    /// When something was taken last of a leader that is a member.
    led: Arc<std::sync::Mutex<Option<Instant>>>,
    /// Dropped by the last who has the member, which ends it. What looks after it by itself has none.
    _ends: Option<Arc<DropGuard>>,
}

impl std::fmt::Debug for RaftNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftNode").field("node_id", &self.store.node_id()).finish_non_exhaustive()
    }
}

impl RaftNode {
    /// Starts the member. If it is the only voter, it leads and has applied its whole log when this returns.
    ///
    /// # Errors
    /// [`MetadataError`]: the log holds a command that this build does not know, or cannot be led until the deadline.
    pub async fn start<N: RaftNetworkFactory<TypeConfig>>(
        store: Store,
        network: N,
        deadline: Instant,
    ) -> Result<RaftNode, MetadataError> {
        RaftNode::begin(store, network, None, deadline).await
    }

    /// As [`start`](Self::start), of a member that has company, or may have. To be called on the quorum's thread.
    ///
    /// # Errors
    /// As of [`start`](Self::start).
    pub async fn start_linked(store: Store, links: Links, deadline: Instant) -> Result<RaftNode, MetadataError> {
        RaftNode::begin(store, links.clone(), Some(links), deadline).await
    }

    async fn begin<N: RaftNetworkFactory<TypeConfig>>(
        store: Store,
        network: N,
        links: Option<Links>,
        deadline: Instant,
    ) -> Result<RaftNode, MetadataError> {
        let config = Config {
            cluster_name: store.cluster_id().to_owned(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: PATIENCE_MS,
            // The lease is as long.
            election_timeout_max: LEASE_MS,
            install_snapshot_timeout: SNAPSHOT_PART_MS,
            snapshot_max_chunk_size: SNAPSHOT_PART_BYTES,
            // The store says when one is due: it counts bytes.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: KEPT_ENTRIES,
            ..Config::default()
        };
        store.commit_if_alone();
        // openraft has told nothing yet when it has begun.
        let is_only_voter = store.kept().is_only_voter();
        let (machine, applied) = RaftMachine::new(store.clone());
        if let Some(links) = &links {
            links.follow(applied.clone());
        }
        let log = RaftLog::new(store.clone());
        let raft = timeout_at(deadline, Raft::new(store.node_id(), Arc::new(config), network, log, machine)).await;
        let raft = raft.map_err(|_| MetadataError::TimedOut)?;
        let raft = raft.map_err(|error| MetadataError::Stopped(error.to_string()))?;
        let (turn, changing) = (Arc::default(), Arc::default());
        let (alone, aside, led) = (Arc::default(), Arc::default(), Arc::default());
        let ended = CancellationToken::new();
        let ends = Some(Arc::new(ended.clone().drop_guard()));
        let node = RaftNode { raft, store, applied, turn, alone, aside, changing, links, led, _ends: ends };
        if is_only_voter {
            if let Err(error) = node.lead(deadline).await {
                // Where it hangs, it goes on hanging without anybody who waits.
                let stopping = tokio::spawn(async move { node.stop().await });
                drop(timeout(STOP, stopping).await);
                return Err(error);
            }
            node.alone.store(true, Ordering::Release);
        }
        tokio::spawn(RaftNode { _ends: None, ..node.clone() }.look_after(ended));
        Ok(node)
    }

    /// Something of this leader was taken.
    pub(super) fn led_by(&self, node_id: u64) {
        if self.membership().get_node(&node_id).is_some() {
            *self.led.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    /// How long ago something was taken of a leader that is a member; `None`: never since the start.
    pub(crate) fn led_ms(&self) -> Option<u64> {
        let led = *self.led.lock().unwrap_or_else(PoisonError::into_inner);
        led.map(|led| u64::try_from(led.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// The only voter needs to wait for nobody.
    async fn lead(&self, deadline: Instant) -> Result<(), MetadataError> {
        let mut metrics = self.raft.metrics();
        if metrics.borrow().state != ServerState::Leader {
            let asked = self.raft.trigger().elect().await;
            asked.map_err(|error| MetadataError::Stopped(error.to_string()))?;
        }
        let led = async {
            let led = metrics.wait_for(|now| {
                let applied = now.last_applied.map(|last| last.index);
                now.running_state.is_err() || (now.state == ServerState::Leader && applied >= now.last_log_index)
            });
            led.await.map(|now| now.running_state.as_ref().err().cloned())
        };
        match timeout_at(deadline, led).await {
            Err(_) => Err(MetadataError::TimedOut),
            Ok(Err(_)) => Err(MetadataError::ShuttingDown),
            Ok(Ok(Some(fatal))) => {
                // A disk that hangs tells nothing more.
                let cause = timeout_at(deadline, self.ended(&fatal)).await;
                Err(cause.unwrap_or_else(|_| MetadataError::Stopped(fatal.to_string())))
            }
            Ok(Ok(None)) => Ok(()),
        }
    }

    /// openraft's clock is for heartbeats and elections, which a member without others does not need: its own timer alone goes
    /// on. And a leader finishes the change of members that one before it has begun. Ends with the member, and ends it when
    /// nobody has it any more.
    async fn look_after(self, ended: CancellationToken) {
        let mut metrics = self.raft.metrics();
        let mut finishes: Option<tokio::task::JoinHandle<()>> = None;
        loop {
            let (has_others, is_unfinished) = {
                let now = metrics.borrow_and_update();
                let members = now.membership_config.membership();
                let has_others = members.nodes().any(|(node_id, _)| *node_id != self.store.node_id());
                (has_others, members.get_joint_config().len() > 1 && now.state == ServerState::Leader)
            };
            self.raft.runtime_config().tick(has_others);
            if is_unfinished && finishes.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
                let node = self.clone();
                finishes = Some(tokio::spawn(async move { node.finish_change(Instant::now() + CHANGE).await }));
            }
            match ended.run_until_cancelled(metrics.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) => return,
                None => return self.stop().await,
            }
        }
    }

    /// Brings a command into force: its index, and what came of it. An urgent one may take the last space on the disk.
    ///
    /// # Errors
    /// [`MetadataError`]. After [`MetadataError::TimedOut`], and when the member ended, the command may come into force still; after
    /// any other one nothing changed.
    pub async fn propose(
        &self,
        command: Command,
        urgent: bool,
        deadline: Instant,
    ) -> Result<(u64, Outcome), MetadataError> {
        let proposed = timeout_at(deadline, self.propose_until(command, urgent, deadline)).await;
        proposed.unwrap_or(Err(MetadataError::TimedOut))
    }

    /// As [`propose`](Self::propose), but a member that is alone ends only when it is known what becomes of the command, and that
    /// may be never. After the deadline it is not proposed any more.
    pub(in super::super) async fn propose_until(
        &self,
        command: Command,
        urgent: bool,
        deadline: Instant,
    ) -> Result<(u64, Outcome), MetadataError> {
        match self.propose_alone(&command, urgent, deadline).await {
            Some(known) => known,
            None => self.propose_to_leader(command, urgent, deadline).await,
        }
    }

    /// Brings a command into force as nobody else can; `None`: somebody else may.
    pub(super) async fn propose_alone(
        &self,
        command: &Command,
        urgent: bool,
        deadline: Instant,
    ) -> Option<Result<(u64, Outcome), MetadataError>> {
        if !self.is_alone() {
            return None;
        }
        if let Err(error) = self.make_room(command.encoded_len() as u64, urgent).await {
            return Some(Err(error));
        }
        let turn = Arc::clone(&self.turn).lock_owned().await;
        if Instant::now() >= deadline {
            return Some(Err(MetadataError::Behind));
        }
        if !self.is_alone() {
            return None;
        }
        let command = Command { untried: false, ..command.clone() };
        let applied = Arc::clone(&self.applied.borrow());
        let index = applied.last_log_id.map_or(0, |last| last.index) + 1;
        if let Err(refusal) = MetadataState::clone(&applied.state).apply(index, &command) {
            return Some(Err(refusal.into()));
        }
        let node = self.clone();
        // It keeps its turn though nobody may wait for it any more.
        let writing = tokio::spawn(async move {
            let written = node.write(command, deadline).await;
            drop(turn);
            written
        });
        Some(writing.await.unwrap_or(Err(MetadataError::ShuttingDown)))
    }

    /// Writes as the only voter.
    async fn write(&self, command: Command, deadline: Instant) -> Result<(u64, Outcome), MetadataError> {
        let written = loop {
            match self.raft.client_write(command.clone()).await {
                // It does not lead yet; as nobody else can write, it was not written.
                Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                    if Instant::now() >= deadline {
                        return Err(MetadataError::NoLeader);
                    }
                    sleep_until((Instant::now() + RETRY).min(deadline)).await;
                }
                Err(RaftError::APIError(error)) => return Err(MetadataError::Stopped(error.to_string())),
                Err(RaftError::Fatal(fatal)) => return Err(self.ended(&fatal).await),
                Ok(written) => break written,
            }
        };
        answer_of(written)
    }

    /// Has room in the journal for a command of so many bytes.
    pub(super) async fn make_room(&self, bytes: u64, urgent: bool) -> Result<(), MetadataError> {
        let bytes = bytes + ENTRY_OVERHEAD_BYTES as u64;
        self.store.blocking(move |store| store.make_room(bytes, urgent)).await.map_err(refused)
    }

    /// Whether nobody else has been able to write to the log since the start.
    pub(in super::super) fn is_alone(&self) -> bool {
        self.alone.load(Ordering::Acquire)
    }

    /// Which member this is.
    pub fn node_id(&self) -> u64 {
        self.store.node_id()
    }

    /// The last entry that is known to be committed.
    pub fn committed(&self) -> u64 {
        self.store.kept().committed.map_or(0, |last| last.index)
    }

    /// Has a snapshot written if one is due.
    pub async fn snapshot_if_due(&self) {
        if self.store.blocking(Store::is_snapshot_due).await {
            // Where the member ended, it needs none.
            drop(self.raft.trigger().snapshot().await);
        }
    }

    /// What was applied, and whenever that changes.
    pub fn applied(&self) -> watch::Receiver<Arc<Applied>> {
        self.applied.clone()
    }

    /// What is known of the leadership, and whenever that changes.
    pub fn metrics(&self) -> watch::Receiver<openraft::RaftMetrics<u64, EmptyNode>> {
        self.raft.metrics()
    }

    /// What the controller's office rests on, as it was `ago_ms` before.
    pub fn observed(&self, ago_ms: u64) -> Observed {
        let metrics = self.raft.metrics();
        let now = metrics.borrow();
        let leads = now.state == ServerState::Leader && now.running_state.is_ok();
        // The only voter is a quorum by itself. The same news tell: to borrow them once more could wait for ever, for a change
        // that waits for this.
        let ago_ms = if self.is_only_voter_by(&now) { 0 } else { ago_ms };
        Observed {
            leads_in: leads.then_some(now.current_term),
            unheard_ms: now.millis_since_quorum_ack.map(|ms| ms.saturating_add(ago_ms)),
        }
    }

    /// Ends the member: nothing is written after this. openraft waits for no snapshot that is being written; the store does.
    pub async fn stop(&self) {
        drop(self.raft.shutdown().await);
        self.store.blocking(Store::close).await;
    }

    /// Whether the member is a quorum by itself.
    pub fn is_only_voter(&self) -> bool {
        let metrics = self.raft.metrics();
        self.is_only_voter_by(&metrics.borrow())
    }

    fn is_only_voter_by(&self, now: &openraft::RaftMetrics<u64, EmptyNode>) -> bool {
        now.membership_config.membership().voter_ids().eq([self.store.node_id()])
    }

    /// Whether the journal takes nothing any more, whatever the disk does.
    pub async fn is_poisoned(&self) -> bool {
        // A disk that hangs tells nothing.
        let room = timeout(CAUSE_TIMEOUT, self.store.blocking(|store| store.make_room(0, true))).await;
        matches!(room, Ok(Err(JournalError::Poisoned { .. })))
    }

    /// Why the member ended, or is about to.
    pub async fn why_ended(&self) -> MetadataError {
        if self.is_poisoned().await {
            return self.ended(&Fatal::Panicked).await;
        }
        let mut metrics = self.raft.metrics();
        // The parts of a member end one after another.
        let said = match timeout(CAUSE_TIMEOUT, metrics.wait_for(|now| now.running_state.is_err())).await {
            Ok(Ok(now)) => now.running_state.as_ref().err().cloned(),
            // It does not say so when it panics.
            Ok(Err(_)) | Err(_) => None,
        };
        let fatal = said.unwrap_or(Fatal::Panicked);
        let cause = timeout(CAUSE_TIMEOUT, self.ended(&fatal)).await;
        cause.unwrap_or_else(|_| MetadataError::Stopped(fatal.to_string()))
    }

    /// Why the member ended: the journal's failure, if that is it.
    pub(super) async fn ended(&self, fatal: &Fatal<u64>) -> MetadataError {
        if matches!(fatal, Fatal::Stopped) {
            return MetadataError::ShuttingDown;
        }
        match self.store.blocking(|store| store.make_room(0, true)).await {
            Err(error) => refused(error),
            Ok(()) => MetadataError::Stopped(fatal.to_string()),
        }
    }
}

/// Why the journal has no room.
fn refused(error: JournalError) -> MetadataError {
    match error {
        JournalError::Closed { .. } => MetadataError::ShuttingDown,
        error => error.into(),
    }
}

/// What came of an entry that is applied.
pub(super) fn answer_of(written: ClientWriteResponse<TypeConfig>) -> Result<(u64, Outcome), MetadataError> {
    match written.data {
        Answer::Applied(outcome) => Ok((written.log_id.index, outcome)),
        Answer::Refused(refusal) => Err(refusal.into()),
        Answer::NoCommand => Err(MetadataError::Stopped("a command was applied as none".to_owned())),
    }
}
