//! Taking partitions on and letting them go.
//!
//! Owns: [`Rebalance`], and the jobs that carry one out: each runs by itself, whether or not the coordinator can be reached
//! meanwhile, and is carried through once the application was told. Refuses: deciding what comes and goes (see
//! [`super::group`]). Read next: [`super::locate`], which finds out where partitions begin.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use headwater_proto::TopicId;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::RebalanceFn;
use super::cell::Cell;
use super::commit::Committer;
use super::readers::{Readers, Wanted};
use super::record::StartFrom;
use crate::TopicPartition;
use crate::error::ConsumeError;
use crate::retry::after;

/// How long commits that are under way may keep a partition from being let go.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// What happens to a consumer's partitions. Told before it takes effect, and waited for.
#[derive(Debug, Clone)]
pub enum Rebalance {
    /// These are read from now on.
    Assigned(Vec<TopicPartition>),
    /// These are no longer read, and somebody else gets them once this has been handled. What the application wants to
    /// have committed it commits now.
    Revoked(Vec<TopicPartition>, Committer),
    /// These were taken away: the member was fenced, and somebody else may read them already. Nothing can be committed.
    Lost(Vec<TopicPartition>),
}

/// What jobs work with.
#[derive(Clone)]
pub(crate) struct Hands {
    pub(crate) readers: Arc<Readers>,
    pub(crate) committer: Committer,
    pub(crate) on_rebalance: Option<Arc<RebalanceFn>>,
    pub(crate) auto_commit: bool,
    pub(crate) rebalance_timeout: Duration,
    /// Where a partition begins that has no commit.
    pub(crate) start: StartFrom,
}

/// Letting go, or taking on.
pub(crate) struct Job {
    pub(crate) partitions: Vec<TopicPartition>,
    pub(crate) letting_go: bool,
    /// The partitions are lost: what the application was not told yet it is not told.
    fenced: CancellationToken,
    work: JoinHandle<Result<bool, ConsumeError>>,
}

impl Job {
    /// The end of it: whether the application was told. Cancel-safe.
    ///
    /// # Errors
    /// When the callback panicked.
    pub(crate) async fn done(&mut self) -> Result<bool, ConsumeError> {
        match (&mut self.work).await {
            Ok(done) => done,
            Err(error) => Err(panicked(error)),
        }
    }

    /// The member was fenced. What the application is in the middle of is carried through.
    pub(crate) fn fence(&self) {
        self.fenced.cancel();
    }
}

impl Hands {
    /// Begins to let go: stops delivering, waits until the application is done with what it has in hand, commits, tells.
    pub(crate) fn let_go(&self, partitions: Vec<TopicPartition>) -> Job {
        let fenced = CancellationToken::new();
        let work = self.clone().letting_go(partitions.clone(), fenced.clone());
        Job { partitions, letting_go: true, fenced, work: tokio::spawn(work) }
    }

    /// Begins to take on: tells, and begins to read. Where to, is found out without holding up what comes next.
    pub(crate) fn take_on(&self, new: Vec<(TopicPartition, TopicId)>) -> Job {
        let fenced = CancellationToken::new();
        let partitions = new.iter().map(|(at, _)| at.clone()).collect();
        let work = self.clone().taking_on(new, fenced.clone());
        Job { partitions, letting_go: false, fenced, work: tokio::spawn(work) }
    }

    /// Tells the application, and waits until it has taken it in.
    ///
    /// # Errors
    /// When the callback panicked.
    pub(crate) async fn tell(&self, event: Rebalance) -> Result<(), ConsumeError> {
        let Some(callback) = self.on_rebalance.clone() else { return Ok(()) };
        tokio::spawn(async move { callback(event).await }).await.map_err(panicked)
    }

    async fn letting_go(
        self,
        partitions: Vec<TopicPartition>,
        fenced: CancellationToken,
    ) -> Result<bool, ConsumeError> {
        let context = &self.readers.context;
        let (state, leaving) = (&context.state, &context.stop);
        // The coordinator's patience, less some for the commit and the report.
        let until = after(Instant::now(), self.rebalance_timeout.mul_f64(0.7));
        let cells = state.hold_back(&partitions);
        loop {
            let mut asked = std::pin::pin!(state.asked.notified());
            asked.as_mut().enable();
            if !cells.iter().any(|cell| cell.is_held()) || Instant::now() >= until {
                break;
            }
            tokio::select! {
                biased;
                () = fenced.cancelled() => return Ok(false),
                // Nobody will ask for more.
                () = leaving.cancelled() => break,
                () = asked => {}
                () = sleep_until(until) => {}
            }
        }
        // Whoever closes a consumer commits first; whoever drops it commits nothing.
        if self.auto_commit && !leaving.is_cancelled() {
            tokio::select! {
                biased;
                () = fenced.cancelled() => return Ok(false),
                committed = self.committer.commit_cells(&cells, Cell::processed) => if let Err(error) = committed {
                    tracing::warn!(group = &**self.committer.group(), %error, "commit before letting go fails");
                }
            }
        }
        if fenced.is_cancelled() {
            return Ok(false);
        }
        let told = self.tell(Rebalance::Revoked(partitions.clone(), self.committer.clone())).await;
        // Nothing that speaks of these partitions may reach the coordinator after their next owner was told.
        let _ = timeout(COMMIT_TIMEOUT, self.committer.idle()).await;
        state.end(&partitions);
        state.assignment_known();
        told.map(|()| true)
    }

    async fn taking_on(
        self,
        new: Vec<(TopicPartition, TopicId)>,
        fenced: CancellationToken,
    ) -> Result<bool, ConsumeError> {
        self.tell(Rebalance::Assigned(new.iter().map(|(at, _)| at.clone()).collect())).await?;
        if !fenced.is_cancelled() {
            let from = self.start;
            let wanted = new.into_iter().map(|(at, topic_id)| Wanted { at, topic_id, from, ask_group: true });
            let search = self.readers.begin(wanted.collect(), Some(self.committer.clone()));
            tokio::spawn(search.run());
        }
        Ok(true)
    }
}

/// A task of the application's code ended without an outcome.
fn panicked(error: tokio::task::JoinError) -> ConsumeError {
    let Ok(payload) = error.try_into_panic() else { return ConsumeError::Closed };
    let text = |payload: &(dyn Any + Send)| match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    };
    ConsumeError::CallbackPanicked { reason: text(&*payload) }
}
