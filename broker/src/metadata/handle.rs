//! How commands reach the metadata: one task owns journal and state, everybody else holds a [`MetadataHandle`].
//!
//! A proposal is decided on the newest state, applied to a copy, journaled, carried out by the partitions, and only then
//! published and answered. So an answer means that the command is kept and in force, and two proposals never decide on
//! the same state.
//!
//! Owns: that order. Refuses: what a command means ([`super::state`]) and how it is kept ([`super::journal`]).
//! Read next: [`super::state`].

use super::command::{Command, NextProducerEpoch, command::Command as Kind};
use super::journal::{Journal, JournalError};
use super::producer_ids::ProducerIds;
use super::state::{MetadataState, Outcome, Refusal, Topic};
use crate::pool::Pool;
use crate::topic_config::TopicConfigError;
use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use headwater_proto::{ErrorCode, TopicId, wire};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Proposals that may wait.
const WAITING_PROPOSALS: usize = 1024;

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
    #[error("a topic cannot have {asked} replicas: there {}", in_words(*brokers))]
    InvalidReplicationFactor {
        /// How many were asked for.
        asked: u32,
        /// How many brokers are active.
        brokers: usize,
    },
    /// The journal did not take the command.
    #[error(transparent)]
    Journal(#[from] JournalError),
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
                Refusal::InvalidPartitions { .. } => ErrorCode::InvalidPartitions,
                Refusal::InvalidReplicas { .. } => ErrorCode::InvalidReplicationFactor,
                Refusal::UnknownProducerId(_) => ErrorCode::InvalidRequest,
                Refusal::UnknownProducerEpoch { .. } => ErrorCode::InvalidProducerEpoch,
                _ => ErrorCode::Internal,
            },
            MetadataError::Config(_) => ErrorCode::InvalidConfig,
            MetadataError::UnknownTopic(_) => ErrorCode::UnknownTopic,
            MetadataError::Internal(_) => ErrorCode::InvalidTopic,
            MetadataError::InvalidReplicationFactor { .. } => ErrorCode::InvalidReplicationFactor,
            MetadataError::Journal(JournalError::Full { .. }) => ErrorCode::DiskFull,
            MetadataError::Journal(_) => ErrorCode::Internal,
            MetadataError::ShuttingDown => ErrorCode::ShuttingDown,
        }
    }
}

impl From<&MetadataError> for wire::Error {
    fn from(error: &MetadataError) -> Self {
        wire::Error::new(error.code(), error.to_string())
    }
}

fn in_words(brokers: usize) -> String {
    match brokers {
        1 => "is 1 active broker".to_owned(),
        _ => format!("are {brokers} active brokers"),
    }
}

/// Chooses the command, on the state it will be applied to.
type Decide = Box<dyn FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send>;

struct Proposal {
    decide: Decide,
    tell: oneshot::Sender<Result<Outcome, MetadataError>>,
}

/// A cheap handle on the metadata.
#[derive(Clone, Debug)]
pub struct MetadataHandle {
    proposals: mpsc::Sender<Proposal>,
    state: Arc<ArcSwap<MetadataState>>,
    changes: watch::Receiver<u64>,
    producer_ids: Arc<ProducerIds>,
}

/// Carries a state out before it is published: opens, changes and deletes partitions.
pub(crate) type CarryOut = Box<dyn FnMut(Arc<MetadataState>) -> BoxFuture<'static, ()> + Send>;

impl MetadataHandle {
    /// The handle, and the task, which ends once `stop` is cancelled and the proposal under way is answered.
    pub(crate) fn new(
        journal: Journal,
        state: MetadataState,
        pool: Pool,
        carry_out: CarryOut,
        stop: CancellationToken,
    ) -> (MetadataHandle, impl Future<Output = ()> + Send) {
        let (proposals, inbox) = mpsc::channel(WAITING_PROPOSALS);
        let (announce, changes) = watch::channel(state.index());
        let state = Arc::new(ArcSwap::from_pointee(state));
        let task = Task { journal: Some(journal), state: Arc::clone(&state), announce, pool, carry_out };
        (MetadataHandle { proposals, state, changes, producer_ids: Arc::default() }, task.run(inbox, stop))
    }

    /// The newest state.
    pub fn state(&self) -> Arc<MetadataState> {
        self.state.load_full()
    }

    /// Tells the index of the newest state whenever it changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Brings a command into force.
    ///
    /// # Errors
    /// [`MetadataError`]; nothing changed.
    pub async fn propose(&self, command: impl Into<Command>) -> Result<Outcome, MetadataError> {
        let command = command.into();
        self.propose_with(move |_| Ok(command)).await
    }

    /// Brings into force what `decide` chooses. It sees the state that its command is applied to.
    ///
    /// # Errors
    /// [`MetadataError`]; nothing changed.
    pub async fn propose_with(
        &self,
        decide: impl FnOnce(&MetadataState) -> Result<Command, MetadataError> + Send + 'static,
    ) -> Result<Outcome, MetadataError> {
        let (tell, told) = oneshot::channel();
        let proposal = Proposal { decide: Box::new(decide), tell };
        self.proposals.send(proposal).await.map_err(|_| MetadataError::ShuttingDown)?;
        told.await.unwrap_or(Err(MetadataError::ShuttingDown))
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
            Ok(_) | Err(MetadataError::Refused(Refusal::ProducerEpochsExhausted(_))) => {
                Ok((self.next_producer_id(broker_id).await?, 0))
            }
            Err(error) => Err(error),
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
    /// Away only while the pool has it.
    journal: Option<Journal>,
    state: Arc<ArcSwap<MetadataState>>,
    announce: watch::Sender<u64>,
    pool: Pool,
    carry_out: CarryOut,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Proposal>, stop: CancellationToken) {
        loop {
            let proposal = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                proposal = inbox.recv() => proposal,
            };
            let Some(Proposal { decide, tell }) = proposal else { return };
            let outcome = self.bring_into_force(decide).await;
            // Whoever proposed may have stopped waiting; the command is in force all the same.
            drop(tell.send(outcome));
        }
    }

    async fn bring_into_force(&mut self, decide: Decide) -> Result<Outcome, MetadataError> {
        let current = self.state.load_full();
        let command = decide(&current)?;
        let mut next = MetadataState::clone(&current);
        let index = current.index() + 1;
        let outcome = next.apply(index, &command)?;
        let next = Arc::new(next);
        self.keep(index, command, &next).await?;
        (self.carry_out)(Arc::clone(&next)).await;
        self.state.store(next);
        self.announce.send_replace(index);
        Ok(outcome)
    }

    async fn keep(&mut self, index: u64, command: Command, next: &Arc<MetadataState>) -> Result<(), MetadataError> {
        let Some(mut journal) = self.journal.take() else { return Err(MetadataError::ShuttingDown) };
        let next = Arc::clone(next);
        let work = move || {
            let kept = journal.append(index, &command, is_urgent(&command));
            if kept.is_ok()
                && journal.is_snapshot_due()
                && let Err(error) = journal.snapshot(&next)
            {
                tracing::warn!(%error, "metadata snapshot not written; the journal goes on without it");
            }
            (journal, kept)
        };
        let (journal, kept) = self.pool.run(work).await;
        self.journal = Some(journal);
        if let Err(error) = &kept {
            tracing::error!(%error, index, "metadata command not kept");
        }
        Ok(kept?)
    }
}

/// Whether a command may take the last of the space: it frees some, or the broker cannot start without it.
fn is_urgent(command: &Command) -> bool {
    matches!(command.command, Some(Kind::DeleteTopic(_) | Kind::RegisterBroker(_)))
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
