//! Membership in a consumer group.
//!
//! Owns: the membership stream, heartbeats, letting go of partitions and taking them on, in the steps that the coordinator
//! asks for. Refuses: deciding assignments. Read next: [`super::state`], where partitions begin and end.
//!
//! What must always hold: a partition that was taken away is no longer read, its progress is committed (where commits are
//! automatic) and its callback has run, before the coordinator hears that it was let go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use headwater_proto::wire::{self, open};
use headwater_proto::{ErrorCode, TopicId};
use quinn::SendStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::RebalanceFn;
use super::cell::Cell;
use super::commit::Committer;
use super::readers::{Readers, Wanted};
use super::record::StartFrom;
use super::state::State;
use crate::TopicPartition;
use crate::connection::Connections;
use crate::error::{ConsumeError, Error, Refusal};
use crate::retry::Backoff;
use crate::stream::{FrameReader, write_message};

/// How long a coordinator may take to answer that a member left.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// A coordinator that answers a join later than this is tried anew.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What happens to a consumer's partitions. Told before it takes effect, and waited for.
#[derive(Clone)]
pub enum Rebalance {
    /// These are read from now on.
    Assigned(Vec<TopicPartition>),
    /// These are no longer read, and somebody else gets them once this has been handled. What the application wants to
    /// have committed it commits now.
    Revoked(Vec<TopicPartition>, Committer),
    /// These were taken away: the member was fenced, and somebody else may read them already. Nothing can be committed.
    Lost(Vec<TopicPartition>),
}

/// What a member says of itself.
pub(crate) struct Settings {
    pub(crate) member_id: String,
    pub(crate) instance_id: String,
    pub(crate) assignor: String,
    pub(crate) session_timeout: Option<Duration>,
    pub(crate) rebalance_timeout: Duration,
    pub(crate) auto_commit: bool,
    pub(crate) on_rebalance: Option<Arc<RebalanceFn>>,
    /// Where a partition begins that has no commit.
    pub(crate) start: StartFrom,
}

/// A partition by its topic's id; the name goes with it.
type Owned = BTreeMap<TopicPartition, TopicId>;

/// The membership task.
pub(crate) struct Member {
    pub(crate) settings: Settings,
    pub(crate) readers: Arc<Readers>,
    pub(crate) state: Arc<State>,
    pub(crate) committer: Committer,
    pub(crate) topics: watch::Receiver<Vec<String>>,
    pub(crate) leave: CancellationToken,
    epoch: i32,
    /// What this member has, from taking it on until it has let go.
    owned: Owned,
    /// What it may have, as it was told last.
    assignment: Option<Owned>,
    job: Option<Job>,
}

/// Letting go, or taking on: one at a time.
struct Job {
    partitions: Vec<TopicPartition>,
    letting_go: bool,
    work: BoxFuture<'static, Result<(), ConsumeError>>,
}

/// Why a membership stream ended.
enum End {
    /// It may be opened again.
    Lost(Error),
    Refused(Refusal),
    /// This member has left, or wants to and cannot say so.
    Left,
    /// The application must hear of it.
    Fatal(ConsumeError),
}

impl Member {
    pub(crate) fn new(
        settings: Settings,
        readers: Arc<Readers>,
        state: Arc<State>,
        committer: Committer,
        topics: watch::Receiver<Vec<String>>,
        leave: CancellationToken,
    ) -> Member {
        let (owned, assignment, job) = (Owned::new(), None, None);
        Member { settings, readers, state, committer, topics, leave, epoch: 0, owned, assignment, job }
    }

    /// Runs until this member leaves or is refused for good.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::new(&self.readers.context.connections.config);
        let mut unreleased_since: Option<Instant> = None;
        loop {
            let (end, joined) = self.belong().await;
            if joined {
                backoff.reset();
                unreleased_since = None;
            }
            let refusal = match end {
                End::Left => return,
                End::Fatal(error) => return self.state.push_error(error),
                End::Lost(error) => {
                    tracing::debug!(group = &**self.committer.group(), %error, "membership stream lost");
                    None
                }
                End::Refused(refusal) => Some(refusal),
            };
            if let Some(refusal) = refusal {
                tracing::info!(group = &**self.committer.group(), %refusal, "membership refused");
                match refusal.code {
                    ErrorCode::UnknownMember | ErrorCode::FencedMemberEpoch => self.lose_everything().await,
                    // The one before this one may have been killed: it is out when its session is over.
                    ErrorCode::UnreleasedInstanceId => {
                        let since = *unreleased_since.get_or_insert_with(Instant::now);
                        let session = self.settings.session_timeout.unwrap_or(Duration::from_secs(10));
                        if since.elapsed() > session + Duration::from_secs(5) {
                            return self.give_up(refusal).await;
                        }
                    }
                    _ if refusal.retryable => {}
                    _ => return self.give_up(refusal).await,
                }
            }
            tokio::select! {
                () = self.leave.cancelled() => return,
                () = backoff.pause() => {}
            }
        }
    }

    /// The coordinator will not have this member: the application must hear of it.
    async fn give_up(&mut self, refusal: Refusal) {
        self.lose_everything().await;
        self.state.push_error(ConsumeError::Group { group: self.committer.group().clone(), refusal });
    }

    /// Fenced: whatever this member had, others may have by now.
    async fn lose_everything(&mut self) {
        self.job = None;
        self.assignment = None;
        self.epoch = 0;
        self.committer.set_member(&self.settings.member_id, 0);
        let lost: Vec<TopicPartition> = std::mem::take(&mut self.owned).into_keys().collect();
        self.state.end(&lost);
        if let Some(callback) = self.settings.on_rebalance.clone().filter(|_| !lost.is_empty()) {
            callback(Rebalance::Lost(lost)).await;
        }
    }

    /// One stream, from opening it to its end; whether it was answered.
    async fn belong(&mut self) -> (End, bool) {
        let topics = self.topics.borrow_and_update().clone();
        let opening = open_member(self.readers.context.connections.clone(), self.join(topics));
        let mut opening = tokio::time::timeout(JOIN_TIMEOUT, opening).boxed();
        let opened = tokio::select! {
            opened = &mut opening => opened,
            // The coordinator may hear of this member any moment, and then it must hear the goodbye too.
            () = self.leave.cancelled() => match tokio::time::timeout(LEAVE_TIMEOUT, opening).await {
                Ok(opened) => opened,
                Err(_) => return (End::Left, false),
            },
        };
        let (mut send, mut updates, address) = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.retryable() => return (End::Lost(error), false),
            Ok(Err(error)) => return (End::Fatal(error.into()), false),
            Err(_) => return (End::Lost(Error::TimedOut { what: "join group", after: JOIN_TIMEOUT }), false),
        };
        let mut heartbeat_interval = Duration::from_secs(1);
        let mut heartbeat_at = Instant::now() + heartbeat_interval;
        let mut joined = false;
        let end = loop {
            self.begin_job();
            let result = tokio::select! {
                update = updates.message() => match update {
                    Ok(Some(update)) => {
                        joined |= update.error.is_none();
                        if update.heartbeat_interval_ms > 0 {
                            heartbeat_interval = Duration::from_millis(update.heartbeat_interval_ms.into());
                            heartbeat_at = heartbeat_at.min(Instant::now() + heartbeat_interval);
                        }
                        self.updated(update)
                    }
                    Ok(None) => Err(End::Lost(Error::ConnectionLost {
                        address: address.to_string(),
                        reason: "the broker ended the membership stream".into(),
                    })),
                    Err(error) => Err(End::Lost(error)),
                },
                done = async { match &mut self.job { Some(job) => (&mut job.work).await, None => std::future::pending().await } } => {
                    match self.finish_job(done) {
                        Ok(()) => {
                            heartbeat_at = Instant::now() + heartbeat_interval;
                            write_message(&mut send, &self.heartbeat(None), &address).await.map_err(End::Lost)
                        }
                        Err(error) => Err(End::Fatal(error)),
                    }
                }
                () = sleep_until(heartbeat_at) => {
                    heartbeat_at = Instant::now() + heartbeat_interval;
                    write_message(&mut send, &self.heartbeat(None), &address).await.map_err(End::Lost)
                }
                changed = self.topics.changed() => {
                    // The consumer went away: it also asked to leave.
                    let topics = changed.is_ok().then(|| self.topics.borrow_and_update().clone());
                    match topics {
                        Some(topics) => {
                            let heartbeat = self.heartbeat(Some(topics));
                            write_message(&mut send, &heartbeat, &address).await.map_err(End::Lost)
                        }
                        None => Err(self.leave_group(&mut send, &mut updates, &address).await),
                    }
                }
                () = self.leave.cancelled() => Err(self.leave_group(&mut send, &mut updates, &address).await),
            };
            if let Err(end) = result {
                break end;
            }
        };
        (end, joined)
    }

    fn join(&self, topics: Vec<String>) -> wire::OpenMember {
        let settings = &self.settings;
        let ms = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        wire::OpenMember {
            group: self.committer.group().to_string(),
            member_id: settings.member_id.clone(),
            instance_id: settings.instance_id.clone(),
            client_id: self.readers.context.connections.config.client_id.clone(),
            topics,
            assignor: settings.assignor.clone(),
            session_timeout_ms: settings.session_timeout.map_or(0, ms),
            rebalance_timeout_ms: ms(settings.rebalance_timeout),
            rack: String::new(),
            owned: to_wire(&self.owned),
            member_epoch: self.epoch,
        }
    }

    /// What the coordinator says.
    fn updated(&mut self, update: wire::MemberUpdate) -> Result<(), End> {
        if let Some(error) = update.error {
            return Err(End::Refused(error.into()));
        }
        if update.left {
            return Err(End::Left);
        }
        self.epoch = update.member_epoch;
        self.committer.set_member(&self.settings.member_id, self.epoch);
        let mut assignment = Owned::new();
        for topic in update.assignment {
            let id = TopicId::from_slice(&topic.topic_id)
                .ok_or_else(|| End::Lost(Error::Protocol("an assignment without a topic id".into())))?;
            let name: Arc<str> = topic.topic.into();
            for partition in topic.partitions {
                assignment.insert(TopicPartition { topic: name.clone(), partition }, id);
            }
        }
        tracing::debug!(
            group = &**self.committer.group(),
            epoch = self.epoch,
            partitions = assignment.len(),
            "assignment"
        );
        if assignment.is_empty() {
            self.state.assignment_known();
        }
        self.assignment = Some(assignment);
        Ok(())
    }

    /// Begins what is to be done next, if nothing is being done: letting go comes first.
    fn begin_job(&mut self) {
        let (None, Some(assignment)) = (&self.job, &self.assignment) else { return };
        let surplus = |(at, id): (&TopicPartition, &TopicId)| (assignment.get(at) != Some(id)).then(|| at.clone());
        let let_go: Vec<TopicPartition> = self.owned.iter().filter_map(surplus).collect();
        if !let_go.is_empty() {
            let work = self.let_go(let_go.clone()).boxed();
            self.job = Some(Job { partitions: let_go, letting_go: true, work });
            return;
        }
        let new: Vec<(TopicPartition, TopicId)> = assignment
            .iter()
            .filter(|(at, _)| !self.owned.contains_key(*at))
            .map(|(at, id)| (at.clone(), *id))
            .collect();
        if !new.is_empty() {
            // From now on it is reported as this member's.
            self.owned.extend(new.iter().cloned());
            let partitions = new.iter().map(|(at, _)| at.clone()).collect();
            let work = self.take_on(new).boxed();
            self.job = Some(Job { partitions, letting_go: false, work });
        }
    }

    /// Lets go of everything, so that the application hears of it before anybody else is given it; then the goodbye.
    async fn leave_group(
        &mut self,
        send: &mut SendStream,
        updates: &mut FrameReader<wire::MemberUpdate>,
        address: &str,
    ) -> End {
        if let Some(mut job) = self.job.take() {
            // What the application is in the middle of is carried through.
            if tokio::time::timeout(LEAVE_TIMEOUT, &mut job.work).await.is_err() {
                tracing::debug!(group = &**self.committer.group(), "the last rebalance did not end in time");
            }
            if job.letting_go {
                self.owned.retain(|at, _| !job.partitions.contains(at));
            }
        }
        let goodbye = self.goodbye();
        let let_go: Vec<TopicPartition> = std::mem::take(&mut self.owned).into_keys().collect();
        if let Some(callback) = self.settings.on_rebalance.clone().filter(|_| !let_go.is_empty()) {
            callback(Rebalance::Revoked(let_go, self.committer.clone())).await;
        }
        part(goodbye, send, updates, address).await
    }

    fn finish_job(&mut self, done: Result<(), ConsumeError>) -> Result<(), ConsumeError> {
        let Some(job) = self.job.take() else { return Ok(()) };
        if job.letting_go {
            job.partitions.iter().for_each(|at| {
                self.owned.remove(at);
            });
        }
        done
    }

    /// Stops reading, waits until the application is done with what it has in hand, commits.
    fn let_go(&self, partitions: Vec<TopicPartition>) -> impl Future<Output = Result<(), ConsumeError>> + use<> {
        let (state, committer) = (self.state.clone(), self.committer.clone());
        let callback = self.settings.on_rebalance.clone();
        let auto_commit = self.settings.auto_commit;
        // The coordinator's patience, less some for the commit and the report.
        let patience = self.settings.rebalance_timeout.mul_f64(0.7);
        async move {
            let until = Instant::now() + patience;
            let cells = state.hold_back(&partitions);
            loop {
                let mut asked = std::pin::pin!(state.asked.notified());
                asked.as_mut().enable();
                if !cells.iter().any(|cell| cell.is_held()) || Instant::now() >= until {
                    break;
                }
                tokio::select! {
                    () = asked => {}
                    () = sleep_until(until) => {}
                }
            }
            if auto_commit && let Err(error) = committer.commit_cells(&cells, Cell::processed).await {
                tracing::warn!(group = &**committer.group(), %error, "commit before letting go fails");
            }
            if let Some(callback) = callback {
                callback(Rebalance::Revoked(partitions.clone(), committer.clone())).await;
            }
            // Nothing that speaks of these partitions may reach the coordinator after their next owner was told.
            let _ = tokio::time::timeout(LEAVE_TIMEOUT, committer.idle()).await;
            state.end(&partitions);
            state.assignment_known();
            Ok(())
        }
    }

    /// Tells the application, and begins to read; where to, is found out without holding up what the coordinator asks next.
    fn take_on(&self, new: Vec<(TopicPartition, TopicId)>) -> impl Future<Output = Result<(), ConsumeError>> + use<> {
        let (readers, committer) = (self.readers.clone(), self.committer.clone());
        let callback = self.settings.on_rebalance.clone();
        let from = self.settings.start;
        async move {
            if let Some(callback) = callback {
                callback(Rebalance::Assigned(new.iter().map(|(at, _)| at.clone()).collect())).await;
            }
            let wanted = new.into_iter().map(|(at, topic_id)| Wanted { at, topic_id, from, ask_group: true });
            let search = readers.begin(wanted.collect(), Some(committer));
            tokio::spawn(search.run());
            readers.context.state.assignment_known();
            Ok(())
        }
    }

    /// What this member has, and that it lives.
    fn heartbeat(&self, topics: Option<Vec<String>>) -> wire::MemberHeartbeat {
        wire::MemberHeartbeat {
            member_epoch: self.epoch,
            owned: to_wire(&self.owned),
            subscribe: topics.is_some(),
            topics: topics.unwrap_or_default(),
            leave: false,
            keep_static: false,
        }
    }

    fn goodbye(&self) -> wire::MemberHeartbeat {
        let keep_static = !self.settings.instance_id.is_empty();
        wire::MemberHeartbeat { leave: true, keep_static, ..self.heartbeat(None) }
    }
}

async fn open_member(
    connections: Arc<Connections>,
    request: wire::OpenMember,
) -> Result<(SendStream, FrameReader<wire::MemberUpdate>, Arc<str>), Error> {
    let link = connections.control().await?;
    let (send, recv) = link.open(open::Stream::Member(request)).await?;
    Ok((send, FrameReader::new(recv, link.address().clone()), link.address().clone()))
}

/// Says goodbye, and waits for the answer.
async fn part(
    goodbye: wire::MemberHeartbeat,
    send: &mut SendStream,
    updates: &mut FrameReader<wire::MemberUpdate>,
    address: &str,
) -> End {
    let exchange = async {
        write_message(send, &goodbye, address).await?;
        while let Some(update) = updates.message().await? {
            if update.left || update.error.is_some() {
                break;
            }
        }
        Ok::<(), Error>(())
    };
    match tokio::time::timeout(LEAVE_TIMEOUT, exchange).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "leaving was not answered"),
        Err(_) => tracing::debug!("leaving was not answered in time"),
    }
    End::Left
}

fn to_wire(owned: &Owned) -> Vec<wire::TopicPartitions> {
    partitions_to_wire(owned.iter().map(|(at, id)| (at, *id)))
}

/// Partitions grouped by topic.
pub(crate) fn partitions_to_wire<'a>(
    partitions: impl Iterator<Item = (&'a TopicPartition, TopicId)>,
) -> Vec<wire::TopicPartitions> {
    let mut topics: BTreeMap<(TopicId, &str), BTreeSet<u32>> = BTreeMap::new();
    for (at, id) in partitions {
        topics.entry((id, &at.topic)).or_default().insert(at.partition);
    }
    let topics = topics.into_iter().map(|((id, topic), partitions)| wire::TopicPartitions {
        topic_id: id.to_wire(),
        topic: topic.to_owned(),
        partitions: partitions.into_iter().collect(),
    });
    topics.collect()
}
