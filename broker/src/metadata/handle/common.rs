//! Metadata that several brokers of one process have in common, without a quorum: for tests of what follows the metadata, which say
//! themselves what is decided and when.
//!
//! Owns: [`Common`], one state for all, and the task by which a broker goes by it. Refuses: to keep anything, and to decide who is dead.
//! Read next: [`super`], whose handle it makes.

use super::super::command::{BecomeController, Command, RegisterBroker, UnfenceBroker, command::Command as Kind};
use super::super::state::{MetadataState, Outcome, Refusal};
use super::{CarryOut, MetadataError, MetadataHandle, Proposal, WAITING_PROPOSALS, Waits};
use crate::metadata::alone;
use arc_swap::ArcSwap;
use std::sync::{Arc, OnceLock};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// One state for several brokers.
#[derive(Debug, Clone)]
pub struct Common {
    state: Arc<watch::Sender<Arc<MetadataState>>>,
}

impl Common {
    /// The metadata of a cluster in which nothing was decided yet.
    pub fn new(cluster_id: &str) -> Common {
        Common { state: Arc::new(watch::Sender::new(Arc::new(MetadataState::new(cluster_id)))) }
    }

    /// The newest state.
    pub fn state(&self) -> Arc<MetadataState> {
        Arc::clone(&self.state.borrow())
    }

    /// Tells whenever the state changes.
    pub fn changes(&self) -> watch::Receiver<Arc<MetadataState>> {
        self.state.subscribe()
    }

    /// Brings a command into force, at every broker in its own time.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn apply(&self, command: impl Into<Command>) -> Result<Outcome, Refusal> {
        let command = command.into();
        self.change(|state| state.apply(state.index() + 1, &command))
    }

    /// As [`apply`](Self::apply), in the name of a controller.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn control(&self, kind: Kind) -> Result<Outcome, Refusal> {
        self.change(|state| {
            let candidate = state.brokers().next().map(|broker| (broker.id, broker.incarnation));
            if let Some((broker_id, incarnation)) = candidate.filter(|_| state.controller().is_none()) {
                let incarnation = incarnation.as_bytes().to_vec().into();
                let office = Kind::BecomeController(BecomeController { broker_id, incarnation });
                state.apply(state.index() + 1, &office.into())?;
            }
            let command = Command { controller_epoch: state.controller_epoch(), ..kind.into() };
            state.apply(state.index() + 1, &command)
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut MetadataState) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut result = Err(Refusal::Unknown("is not tried"));
        self.state.send_if_modified(|state| {
            let mut next = MetadataState::clone(state);
            result = change(&mut next);
            if result.is_ok() {
                *state = Arc::new(next);
            }
            result.is_ok()
        });
        result
    }

    /// A broker starts: it registers, and serves at once.
    pub(crate) fn register(&self, registration: &RegisterBroker) -> Result<(), MetadataError> {
        self.apply(alone::registration_command(&self.state(), registration))?;
        let (broker_id, incarnation) = (registration.broker_id, registration.incarnation.clone());
        self.control(Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation }))?;
        Ok(())
    }

    /// A broker's handle, and the task, which ends once `stop` is cancelled. `state` was carried out.
    pub(crate) fn handle(
        &self,
        state: Arc<MetadataState>,
        mut carry_out: CarryOut,
        stop: CancellationToken,
    ) -> (MetadataHandle, impl Future<Output = ()> + Send + use<>) {
        let (proposals, mut inbox) = mpsc::channel::<Proposal>(WAITING_PROPOSALS);
        let (announce, changes) = watch::channel(state.index());
        let (controls, controller_epoch) = watch::channel(None);
        let (under_way, under_way_since) = watch::channel(None);
        let (state, ended, producer_ids) = (Arc::new(ArcSwap::new(state)), Arc::new(OnceLock::new()), Arc::default());
        let (published, common, mut newest) = (Arc::clone(&state), self.clone(), self.changes());
        let task = async move {
            // They say the same for as long as this broker runs.
            let _says = (controls, under_way);
            loop {
                let proposal = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    // An error means that nobody decides any more.
                    changed = newest.changed() => match changed {
                        Ok(()) => None,
                        Err(_) => return,
                    },
                    proposal = inbox.recv() => match proposal {
                        Some(proposal) => Some(proposal),
                        None => return,
                    },
                };
                let came = proposal.map(|Proposal { decide, waits, .. }| {
                    let outcome = decide(&common.state()).and_then(|command| Ok(common.apply(command)?));
                    (waits, outcome)
                });
                let state = Arc::clone(&newest.borrow_and_update());
                if state.index() > published.load().index() {
                    carry_out(Arc::clone(&state)).await;
                    announce.send_replace(state.index());
                    published.store(state);
                }
                // Whoever asked may have gone.
                if let Some((Waits::Proposer(tell), outcome)) = came {
                    drop(tell.send(outcome));
                }
            }
        };
        let node = None;
        let handle =
            MetadataHandle { node, proposals, state, changes, controller_epoch, under_way_since, ended, producer_ids };
        (handle, task)
    }
}
