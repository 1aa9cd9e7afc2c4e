//! How commands reach the metadata: one task proposes to the quorum, everybody else holds a [`MetadataHandle`].
//!
//! A proposal is decided on the newest state (where others may write too, on one that has everything acknowledged before it was
//! made), tried on a copy, committed by the quorum, applied, carried out by the partitions,
//! and only then published and answered. So an answer means that the command is kept and in force, and two proposals never
//! decide on the same state. A proposal that the quorum does not answer in time may come into force later: then it is carried
//! out and published all the same. Before its fate is known nothing else is decided: that would be on a state which is past.
//!
//! When this broker's member of the quorum ends, which is what a journal that cannot be written makes of it, every later
//! proposal is answered with why; the newest state stays as it is.
//!
//! The task also holds the controller's office for this broker ([`super::raft::office`]).
//!
//! Owns: that order. Refuses: what a command means ([`super::state`]) and how it is kept ([`super::raft`]).
//! Read next: [`super::state`].

pub mod common;

use super::alone;
use super::command::{Command, NextProducerEpoch, RegisterBroker, command::Command as Kind};
use super::journal::JournalError;
use super::producer_ids::ProducerIds;
use super::raft::office::{Effect, Office};
use super::raft::{Applied, MembersRefusal, RaftNode};
use super::state::{MetadataState, Outcome, Refusal, Topic};
use crate::topic_config::TopicConfigError;
use arc_swap::ArcSwap;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use headwater_proto::{ErrorCode, TopicId, wire};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

/// Proposals that may wait.
const WAITING_PROPOSALS: usize = 1024;
/// How long a proposal may take, from when it is made.
pub(super) const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is looked whether the office is held still, though nothing is heard.
const OFFICE_CHECK: Duration = Duration::from_millis(200);

/// Why a proposal did not come into force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The state machine refuses the command.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A setting that is not legal.
    #[error(transparent)]
    Config(#[from] TopicConfigError),
    /// No topic of that name.
    #[error("there is no topic {0}")]
    UnknownTopic(String),
    /// The topic belongs to the broker.
    #[error("topic {0} belongs to the broker: it is not changed by hand")]
    Internal(String),
    /// More replicas than brokers.
    #[error("a topic cannot have {asked} replicas: there {}", in_words(*brokers, emptied))]
    InvalidReplicationFactor {
        /// How many were asked for.
        asked: u32,
        /// How many brokers are active, and given partitions.
        brokers: usize,
        /// Those that are active and to keep nothing.
        emptied: Vec<i32>,
    },
    /// The journal did not take the command.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The quorum has not answered.
    #[error("the metadata quorum did not answer in time; the command may still come into force")]
    TimedOut,
    /// What was proposed before keeps this from being decided in time: nothing changed.
    #[error("the metadata quorum has not answered an earlier command; this one was not tried")]
    Behind,
    /// Nobody leads the quorum, or whoever does is not reached: nothing changed.
    #[error("the metadata quorum has no leader that this broker reaches; the command was not proposed")]
    NoLeader,
    /// The command is too large to be sent to another member.
    #[error("a metadata command of {bytes} bytes is larger than a quorum of several takes, {limit}")]
    TooLarge {
        /// The command's size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The leader of the quorum refuses the command: nothing changed.
    #[error("{message}")]
    Elsewhere {
        /// The leader's code.
        code: ErrorCode,
        /// Its sentence.
        message: String,
        /// Whether the producer id has no further epoch.
        is_out_of_producer_epochs: bool,
    },
    /// The members of the quorum stay who they are.
    #[error(transparent)]
    Members(#[from] MembersRefusal),
    /// This broker's member of the quorum ended.
    #[error("the metadata take nothing any more ({0}): restart the broker")]
    Stopped(String),
    /// This broker's member of the quorum ended before this was proposed: nothing changed.
    #[error("{0}")]
    Ended(Arc<MetadataError>),
    /// The broker is going away.
    #[error("the broker is shutting down")]
    ShuttingDown,
}

impl MetadataError {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            MetadataError::Refused(refusal) => match refusal {
                Refusal::Name(_) | Refusal::Collision { .. } => ErrorCode::InvalidTopic,
                Refusal::TopicExists(_) => ErrorCode::TopicExists,
                Refusal::UnknownTopicId(_) => ErrorCode::UnknownTopicId,
                Refusal::UnknownPartition { .. } => ErrorCode::UnknownPartition,
                Refusal::NotLeader { .. } => ErrorCode::NotLeader,
                Refusal::LeaderEpoch { .. } => ErrorCode::FencedLeaderEpoch,
                Refusal::IneligibleReplica { .. } => ErrorCode::UnknownReplica,
                Refusal::InvalidPartitions { .. } => ErrorCode::InvalidPartitions,
                Refusal::InvalidReplicas { .. } => ErrorCode::InvalidReplicationFactor,
                Refusal::UnknownProducerId(_)
                | Refusal::UnknownBroker(_)
                | Refusal::Reassigning { .. }
                | Refusal::NotReassigning { .. }
                | Refusal::NoWayBack { .. }
                | Refusal::HasReplicas { .. }
                | Refusal::FeatureLevel { .. }
                | Refusal::FeatureLevelFalls { .. }
                | Refusal::AboveFeatureLevel { .. } => ErrorCode::InvalidRequest,
                Refusal::UnknownProducerEpoch { .. } => ErrorCode::InvalidProducerEpoch,
                _ => ErrorCode::Internal,
            },
            MetadataError::Config(_) => ErrorCode::InvalidConfig,
            MetadataError::UnknownTopic(_) => ErrorCode::UnknownTopic,
            MetadataError::Internal(_) => ErrorCode::InvalidTopic,
            MetadataError::InvalidReplicationFactor { .. } => ErrorCode::InvalidReplicationFactor,
            MetadataError::Journal(JournalError::Full { .. }) => ErrorCode::DiskFull,
            MetadataError::Journal(_) | MetadataError::Stopped(_) | MetadataError::Ended(_) => ErrorCode::Internal,
            MetadataError::TimedOut | MetadataError::Behind | MetadataError::NoLeader => ErrorCode::TimedOut,
            MetadataError::TooLarge { .. } => ErrorCode::LimitExceeded,
            MetadataError::Elsewhere { code, .. } => *code,
            MetadataError::Members(MembersRefusal::LosesQuorum { .. } | MembersRefusal::LastVoter(_)) => {
                ErrorCode::LosesQuorum
            }
            MetadataError::Members(_) => ErrorCode::InvalidRequest,
            MetadataError::ShuttingDown => ErrorCode::ShuttingDown,
        }
    }

    /// Whether it was decided that nothing changes: to propose the same again leads to the same.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            MetadataError::Journal(JournalError::Full { .. }) => true,
            MetadataError::Journal(_)
            | MetadataError::TimedOut
            | MetadataError::Behind
            | MetadataError::NoLeader
            | MetadataError::Stopped(_)
            | MetadataError::Ended(_)
            | MetadataError::ShuttingDown => false,
            _ => true,
        }
    }

    /// Whether it is refused because a producer id has no further epoch.
    pub(super) fn is_out_of_producer_epochs(&self) -> bool {
        match self {
            MetadataError::Refused(refusal) => matches!(refusal, Refusal::ProducerEpochsExhausted(_)),
            MetadataError::Elsewhere { is_out_of_producer_epochs, .. } => *is_out_of_producer_epochs,
            _ => false,
        }
    }
}

impl From<&MetadataError> for wire::Error {
    fn from(error: &MetadataError) -> Self {
        wire::Error::new(error.code(), error.to_string())
    }
}

fn in_words(brokers: usize, emptied: &[i32]) -> String {
    let there = match brokers {
        1 => "is only 1 active broker".to_owned(),
        _ => format!("are only {brokers} active brokers"),
    };
    let ids = |separator: &str| emptied.iter().map(i32::to_string).collect::<Vec<_>>().join(separator);
    match emptied {
        [] => there,
        [id] => format!(
            "{there} besides broker {id}, which is drained and is given nothing: `headwater cluster drain {id} --cancel` changes that"
        ),
        _ => format!(
            "{there} besides brokers {}, which are drained and are given nothing: `headwater cluster drain ID --cancel` changes that",
            ids(", ")
        ),
    }
}

/// Chooses the command, on the state it will be applied to.
type Decide = Box<dyn FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send>;

struct Proposal {
    decide: Decide,
    deadline: Instant,
    waits: Waits,
}

/// Who waits for what comes of a proposal.
enum Waits {
    Proposer(oneshot::Sender<Result<Outcome, MetadataError>>),
    Office,
}

/// What was waited for.
enum Fate {
    /// Everything that was acknowledged before the proposal is applied here: it is decided now.
    CaughtUp(Decide, Result<(), MetadataError>),
    /// What became of the command.
    Known(Result<(u64, Outcome), MetadataError>),
}

/// A command that was given to the quorum, or waits to be decided.
struct UnderWay {
    /// Ends when it is known what became of it.
    fate: BoxFuture<'static, Fate>,
    /// Whether it was given to the quorum.
    is_proposed: bool,
    /// `None`: nobody any more, because the deadline passed.
    waits: Option<Waits>,
    deadline: Instant,
}

/// A cheap handle on the metadata.
#[derive(Clone, Debug)]
pub struct MetadataHandle {
    /// `None`: nobody else decides.
    node: Option<RaftNode>,
    proposals: mpsc::Sender<Proposal>,
    state: Arc<ArcSwap<MetadataState>>,
    changes: watch::Receiver<u64>,
    controller_epoch: watch::Receiver<Option<u64>>,
    under_way_since: watch::Receiver<Option<Instant>>,
    ended: Arc<OnceLock<Arc<MetadataError>>>,
    producer_ids: Arc<ProducerIds>,
}

/// Carries a state out before it is published: opens, changes and deletes partitions.
pub type CarryOut = Box<dyn FnMut(Arc<MetadataState>) -> BoxFuture<'static, ()> + Send>;

impl MetadataHandle {
    /// The handle, and the task, which ends once `stop` is cancelled and the proposal under way is answered. `state` was
    /// carried out; `office` is what its registration was given.
    pub fn new(
        node: RaftNode,
        state: Arc<MetadataState>,
        office: (Office, RegisterBroker),
        carry_out: CarryOut,
        stop: CancellationToken,
    ) -> (MetadataHandle, impl Future<Output = ()> + Send) {
        let (proposals, inbox) = mpsc::channel(WAITING_PROPOSALS);
        let (announce, changes) = watch::channel(state.index());
        let (in_office, controller_epoch) = watch::channel(office.0.epoch());
        let (under_way, under_way_since) = watch::channel(None);
        let state = Arc::new(ArcSwap::new(state));
        let (office, registration) = office;
        let applied = node.applied();
        let ended = Arc::new(OnceLock::new());
        let asked = Some(node.clone());
        let task = Task {
            node,
            applied,
            state: Arc::clone(&state),
            announce,
            office,
            in_office,
            registration,
            carry_out,
            ended: Arc::clone(&ended),
            heard: Instant::now(),
            under_way: None,
            under_way_since: under_way,
            snapshot: None,
        };
        let producer_ids = Arc::default();
        let handle = MetadataHandle {
            node: asked,
            proposals,
            state,
            changes,
            controller_epoch,
            under_way_since,
            ended,
            producer_ids,
        };
        (handle, task.run(inbox, stop))
    }

    /// Waits until everything that was decided before the call is known here.
    ///
    /// # Errors
    /// [`MetadataError`]: the quorum does not answer in time.
    pub async fn catch_up(&self, deadline: Instant) -> Result<(), MetadataError> {
        let Some(node) = &self.node else { return Ok(()) };
        node.catch_up(deadline).await?;
        let index = node.applied().borrow().state.index();
        self.published(index, deadline).await
    }

    /// The newest state.
    pub fn state(&self) -> Arc<MetadataState> {
        self.state.load_full()
    }

    /// Tells the index of the newest state whenever it changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Waits until [`state`](Self::state) is this one, or a later one.
    ///
    /// # Errors
    /// [`MetadataError`]: not in time.
    pub(crate) async fn published(&self, index: u64, deadline: Instant) -> Result<(), MetadataError> {
        let mut changes = self.changes();
        match timeout_at(deadline, changes.wait_for(|published| *published >= index)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MetadataError::ShuttingDown),
            Err(_) => Err(MetadataError::NoLeader),
        }
    }

    /// The epoch in which this broker is the controller, if it is; and whenever that changes.
    pub fn controller_epoch(&self) -> watch::Receiver<Option<u64>> {
        self.controller_epoch.clone()
    }

    /// Why nothing comes into force any more before the next start, if that is so: this broker's member of the quorum ended.
    pub fn ended(&self) -> Option<&MetadataError> {
        self.ended.get().map(|cause| &**cause)
    }

    /// How long the command that the quorum has now waits for an answer; zero where there is none.
    pub fn waits(&self) -> Duration {
        self.under_way_since.borrow().map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Brings a command into force.
    ///
    /// # Errors
    /// [`MetadataError`]; nothing changed, unless it is [`MetadataError::TimedOut`], or the quorum's member ended meanwhile.
    pub async fn propose(&self, command: impl Into<Command>) -> Result<Outcome, MetadataError> {
        let command = command.into();
        self.propose_with(move |_| Ok(command)).await
    }

    /// Brings into force what `decide` chooses. It sees the state that its command is applied to.
    ///
    /// # Errors
    /// As of [`propose`](Self::propose).
    pub async fn propose_with(
        &self,
        decide: impl FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send + 'static,
    ) -> Result<Outcome, MetadataError> {
        self.propose_by(Instant::now() + PROPOSAL_TIMEOUT, decide).await
    }

    /// As [`propose_with`](Self::propose_with), until another deadline.
    pub(super) async fn propose_by(
        &self,
        deadline: Instant,
        decide: impl FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send + 'static,
    ) -> Result<Outcome, MetadataError> {
        let (tell, told) = oneshot::channel();
        let proposal = Proposal { decide: Box::new(decide), deadline, waits: Waits::Proposer(tell) };
        match timeout_at(deadline, self.proposals.send(proposal)).await {
            Err(_) => return Err(MetadataError::Behind),
            Ok(Err(_)) => return Err(MetadataError::ShuttingDown),
            Ok(Ok(())) => {}
        }
        // Partitions may take long to carry out what came before.
        match timeout_at(deadline, told).await {
            Err(_) => Err(MetadataError::TimedOut),
            Ok(answer) => answer.unwrap_or(Err(MetadataError::ShuttingDown)),
        }
    }

    /// A producer id that nobody else has or will have.
    ///
    /// # Errors
    /// [`MetadataError`] if there is none.
    pub async fn next_producer_id(&self, broker_id: i32) -> Result<i64, MetadataError> {
        self.producer_ids.next(self, broker_id).await
    }

    /// An epoch of this producer id after the `given` one; or, where it has none left, another id and its first epoch.
    ///
    /// # Errors
    /// [`MetadataError`]: the id or the epoch were never given out, or the journal takes nothing.
    pub async fn next_producer_epoch(
        &self,
        broker_id: i32,
        producer_id: i64,
        given: i32,
    ) -> Result<(i64, i16), MetadataError> {
        let next = NextProducerEpoch { producer_id, producer_epoch: given };
        match self.propose(Kind::NextProducerEpoch(next)).await {
            Ok(Outcome::ProducerEpoch(epoch)) => Ok((producer_id, epoch)),
            Err(error) if !error.is_out_of_producer_epochs() => Err(error),
            Ok(_) | Err(_) => Ok((self.next_producer_id(broker_id).await?, 0)),
        }
    }

    /// Whether what `decide` chooses would come into force now.
    ///
    /// # Errors
    /// [`MetadataError`]: why not.
    pub fn validate(
        &self,
        decide: impl FnOnce(&MetadataState) -> Result<Command, MetadataError>,
    ) -> Result<Outcome, MetadataError> {
        if let Some(cause) = self.ended.get() {
            return Err(MetadataError::Ended(Arc::clone(cause)));
        }
        let mut state = MetadataState::clone(&self.state());
        let command = decide(&state)?;
        Ok(state.apply(state.index() + 1, &command)?)
    }
}

/// The topic of this name, unless it is the broker's own: for commands that people give.
pub(crate) fn topic_to_change<'a>(state: &'a MetadataState, name: &str) -> Result<&'a Topic, MetadataError> {
    match state.topic(name) {
        None => Err(MetadataError::UnknownTopic(name.to_owned())),
        Some(topic) if topic.internal => Err(MetadataError::Internal(name.to_owned())),
        Some(topic) => Ok(topic),
    }
}

struct Task {
    node: RaftNode,
    applied: watch::Receiver<Arc<Applied>>,
    state: Arc<ArcSwap<MetadataState>>,
    announce: watch::Sender<u64>,
    office: Office,
    in_office: watch::Sender<Option<u64>>,
    registration: RegisterBroker,
    carry_out: CarryOut,
    ended: Arc<OnceLock<Arc<MetadataError>>>,
    /// When the member told of the leadership last.
    heard: Instant,
    under_way: Option<UnderWay>,
    under_way_since: watch::Sender<Option<Instant>>,
    /// Whoever asks for a snapshot may wait for the disk.
    snapshot: Option<BoxFuture<'static, ()>>,
}

/// What ended the task's work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    ToTheEnd,
    UntilTheMemberEnded,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Proposal>, stop: CancellationToken) {
        if self.serve(&mut inbox, &stop).await == Served::ToTheEnd {
            return self.finish().await;
        }
        let cause = self.end(&stop).await;
        self.finish().await;
        let Some(cause) = cause else { return };
        // Whoever asks is told why, not that the broker is going away: it goes on with what it has.
        while let Some(Some(Proposal { waits, .. })) = stop.run_until_cancelled(inbox.recv()).await {
            self.answer(waits, Err(MetadataError::Ended(Arc::clone(&cause))));
        }
    }

    async fn serve(&mut self, inbox: &mut mpsc::Receiver<Proposal>, stop: &CancellationToken) -> Served {
        let mut leadership = self.node.metrics();
        loop {
            // A member that hangs tells nothing: how old the last news are counts too.
            let look = sleep_until(Instant::now() + OFFICE_CHECK);
            let waits_until =
                self.under_way.as_ref().filter(|under_way| under_way.waits.is_some()).map(|it| it.deadline);
            tokio::select! {
                biased;
                () = stop.cancelled() => return Served::ToTheEnd,
                // Whoever changed it: what was proposed here and answered too late, too.
                changed = self.applied.changed() => match changed {
                    Ok(()) => {
                        self.publish().await;
                        // Others write too, and whoever follows keeps it.
                        if !self.node.is_alone() {
                            self.look_after_snapshots();
                        }
                    }
                    Err(_) => return Served::UntilTheMemberEnded,
                },
                changed = leadership.changed() => match changed {
                    Ok(()) => {
                        self.heard = Instant::now();
                        self.look_after_office();
                    }
                    Err(_) => return Served::UntilTheMemberEnded,
                },
                () = look, if !self.node.is_only_voter() => self.look_after_office(),
                Some(fate) = OptionFuture::from(self.under_way.as_mut().map(|under_way| &mut under_way.fate)) => {
                    match fate {
                        Fate::CaughtUp(decide, caught_up) => self.go_on(decide, caught_up).await,
                        Fate::Known(fate) => {
                            let is_poisoned =
                                matches!(&fate, Err(MetadataError::Journal(_))) && self.node.is_poisoned().await;
                            self.settle(fate).await;
                            // The member itself may not have noticed yet.
                            if is_poisoned {
                                return Served::UntilTheMemberEnded;
                            }
                        }
                    }
                }
                Some(()) = OptionFuture::from(waits_until.map(sleep_until)) => self.time_out(),
                Some(()) = OptionFuture::from(self.snapshot.as_mut()) => self.snapshot = None,
                proposal = inbox.recv(), if waits_until.is_none() => {
                    let Some(proposal) = proposal else { return Served::ToTheEnd };
                    self.begin(proposal);
                }
            }
        }
    }

    /// Answers whoever waits still.
    async fn finish(&mut self) {
        if let Some(UnderWay { fate, waits: Some(_), deadline, .. }) = &mut self.under_way {
            match timeout_at(*deadline, fate).await {
                Ok(Fate::Known(fate)) => self.settle(fate).await,
                Ok(Fate::CaughtUp(decide, _)) => self.go_on(decide, Err(MetadataError::ShuttingDown)).await,
                Err(_) => self.time_out(),
            }
        }
    }

    /// Why the member ended; `None`: because the broker shuts down.
    async fn end(&mut self, stop: &CancellationToken) -> Option<Arc<MetadataError>> {
        let cause = stop.run_until_cancelled(self.node.why_ended()).await?;
        if matches!(cause, MetadataError::ShuttingDown) {
            return None;
        }
        tracing::error!(%cause, "the metadata take no command any more before a restart; what is there is served");
        self.in_office.send_replace(None);
        let cause = Arc::new(cause);
        // Nobody else sets it.
        drop(self.ended.set(Arc::clone(&cause)));
        Some(cause)
    }

    /// Gives a proposal to the quorum, unless the answer is known before.
    fn begin(&mut self, Proposal { decide, deadline, waits }: Proposal) {
        if self.under_way.is_some() || self.node.is_alone() || matches!(waits, Waits::Office) {
            return self.give(decide, deadline, waits);
        }
        let node = self.node.clone();
        let fate = async move {
            let caught_up = node.catch_up(deadline).await;
            Fate::CaughtUp(decide, caught_up)
        };
        self.wait_for(fate.boxed(), false, deadline, waits);
    }

    /// Decides what could not be decided before.
    async fn go_on(&mut self, decide: Decide, caught_up: Result<(), MetadataError>) {
        let under_way = self.under_way.take();
        self.under_way_since.send_replace(None);
        let Some(UnderWay { waits: Some(waits), deadline, .. }) = under_way else { return };
        match caught_up {
            Ok(()) => {
                self.publish().await;
                self.give(decide, deadline, waits);
            }
            Err(error) => self.answer(waits, Err(error)),
        }
    }

    fn give(&mut self, decide: Decide, deadline: Instant, waits: Waits) {
        match self.decide(decide, deadline) {
            Ok(command) => {
                let (node, urgent) = (self.node.clone(), is_urgent(&command));
                let is_the_office = matches!(waits, Waits::Office);
                let fate = async move {
                    Fate::Known(match is_the_office {
                        true => node.propose_leading(command, urgent, deadline).await,
                        false => node.propose_until(command, urgent, deadline).await,
                    })
                };
                self.wait_for(fate.boxed(), true, deadline, waits);
            }
            Err(error) => self.answer(waits, Err(error)),
        }
    }

    fn wait_for(&mut self, fate: BoxFuture<'static, Fate>, is_proposed: bool, deadline: Instant, waits: Waits) {
        self.under_way = Some(UnderWay { fate, is_proposed, waits: Some(waits), deadline });
        self.under_way_since.send_replace(Some(Instant::now()));
    }

    fn decide(&self, decide: Decide, deadline: Instant) -> Result<Command, MetadataError> {
        if self.under_way.is_some() || deadline <= Instant::now() {
            return Err(MetadataError::Behind);
        }
        let current = self.state.load_full();
        let command = decide(&current)?;
        // What is refused here need not bother the quorum.
        MetadataState::clone(&current).apply(current.index() + 1, &command)?;
        Ok(command)
    }

    /// Nobody waits for the command under way any more; it is under way all the same, unless nobody was found to give it to.
    fn time_out(&mut self) {
        let Some(under_way) = &mut self.under_way else { return };
        let error = if under_way.is_proposed { MetadataError::TimedOut } else { MetadataError::NoLeader };
        tracing::error!(%error, "a metadata command is not answered in time; no other one is tried before that");
        if let Some(waits) = under_way.waits.take() {
            self.answer(waits, Err(error));
        }
    }

    /// What became of the command under way is known.
    async fn settle(&mut self, fate: Result<(u64, Outcome), MetadataError>) {
        let waits = self.under_way.take().and_then(|under_way| under_way.waits);
        self.under_way_since.send_replace(None);
        // It was with the quorum when that ended: nobody knows what the next start finds.
        let fate = fate.map_err(|error| match error {
            MetadataError::ShuttingDown => MetadataError::TimedOut,
            error => error,
        });
        match &fate {
            Ok((index, _)) if waits.is_none() => tracing::warn!(index, "the late metadata command is in force"),
            Err(error) if waits.is_none() || !matches!(error, MetadataError::Refused(_)) => {
                tracing::error!(%error, "metadata command not kept");
            }
            _ => {}
        }
        let is_kept = fate.is_ok();
        if is_kept {
            self.publish().await;
        }
        let is_the_office = matches!(waits, Some(Waits::Office));
        // Whoever proposed may have stopped waiting; the command is in force all the same.
        if let Some(waits) = waits {
            self.answer(waits, fate.map(|(_, outcome)| outcome));
        }
        if is_kept {
            self.look_after_snapshots();
        }
        // It could not be taken meanwhile.
        if !is_the_office && self.ended.get().is_none() {
            self.look_after_office();
        }
    }

    fn look_after_snapshots(&mut self) {
        if self.snapshot.is_none() {
            let node = self.node.clone();
            self.snapshot = Some(async move { node.snapshot_if_due().await }.boxed());
        }
    }

    fn answer(&mut self, waits: Waits, outcome: Result<Outcome, MetadataError>) {
        match waits {
            Waits::Proposer(tell) => drop(tell.send(outcome)),
            Waits::Office => {
                match &outcome {
                    Ok(outcome) => tracing::info!(?outcome, "the controller's office is taken"),
                    Err(error) => tracing::warn!(%error, "the controller's office could not be taken"),
                }
                self.office.taken(alone::epoch_of(outcome.ok().as_ref()));
                self.tell_of_office();
            }
        }
    }

    /// Carries out and publishes what was applied last.
    async fn publish(&mut self) {
        let newest = Arc::clone(&self.applied.borrow_and_update().state);
        let index = newest.index();
        if index == self.state.load().index() {
            return;
        }
        (self.carry_out)(Arc::clone(&newest)).await;
        self.state.store(newest);
        self.announce.send_replace(index);
    }

    /// Takes the controller's office when this broker comes to lead the quorum, and gives it up when it is not heard.
    fn look_after_office(&mut self) {
        let ago_ms = u64::try_from(self.heard.elapsed().as_millis()).unwrap_or(u64::MAX);
        match self.office.observe(self.node.observed(ago_ms)) {
            None => {}
            Some(Effect::GiveUp { epoch }) => tracing::warn!(epoch, "the controller's office is given up"),
            // Once the command under way is done.
            Some(Effect::Take) if self.under_way.is_some() => self.office.taken(None),
            Some(Effect::Take) => {
                let command = alone::office_command(&self.registration);
                let decide: Decide = Box::new(move |_| Ok(command));
                self.begin(Proposal { decide, deadline: Instant::now() + PROPOSAL_TIMEOUT, waits: Waits::Office });
            }
        }
        self.tell_of_office();
    }

    fn tell_of_office(&self) {
        let epoch = self.office.epoch();
        self.in_office.send_if_modified(|known| std::mem::replace(known, epoch) != epoch);
    }
}

/// Whether a command may take the last of the space: it frees some, or the broker cannot start without it.
fn is_urgent(command: &Command) -> bool {
    matches!(
        command.command,
        Some(Kind::DeleteTopic(_) | Kind::RegisterBroker(_) | Kind::BecomeController(_) | Kind::UnfenceBroker(_))
    )
}

/// An id for a new topic: random, and neither zero nor one that its text would make look like an option.
pub(crate) fn new_topic_id() -> TopicId {
    loop {
        let id = TopicId::from_bytes(*uuid::Uuid::new_v4().as_bytes());
        if !id.to_string().starts_with('-') {
            return id;
        }
    }
}

#[cfg(test)]
#[path = "handle_tests.rs"]
mod tests;
