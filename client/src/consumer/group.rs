//! Membership in a consumer group.
//!
//! Owns: the membership stream, heartbeats, the steps that the coordinator asks for, leaving. Refuses: deciding
//! assignments, and carrying the steps out. Read next: [`super::rebalance`], where partitions come and go.
//!
//! What must always hold: a partition that was taken away is no longer read, its progress is committed (where commits are
//! automatic) and its callback has run, before the coordinator hears that it was let go. What a join says is all that this member has
//! until the coordinator has answered it: nothing is taken on from what an earlier stream told. However membership ends, no
//! partition is read afterwards, and the application hears of each that it had.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Either, FutureExt, OptionFuture};
use headwater_proto::wire::{self, open};
use headwater_proto::{ErrorCode, TopicId};
use quinn::SendStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::commit::Committer;
use super::rebalance::{Hands, Job, Rebalance};
use super::state::State;
use crate::TopicPartition;
use crate::connection::{Connections, Link};
use crate::coordinators::{Coordinator, SILENCE, moved_away};
use crate::error::{ConsumeError, Error, Refusal};
use crate::metadata::Metadata;
use crate::retry::{Backoff, Deadline, after};
use crate::stream::{FrameReader, write_message};

/// How long a coordinator may take to answer that a member left.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a member says of itself.
pub(crate) struct Settings {
    pub(crate) member_id: String,
    pub(crate) instance_id: String,
    pub(crate) assignor: String,
    pub(crate) session_timeout: Option<Duration>,
}

/// A partition by its topic's id; the name goes with it.
type Owned = BTreeMap<TopicPartition, TopicId>;

/// The membership task.
pub(crate) struct Member {
    settings: Settings,
    hands: Hands,
    connections: Arc<Connections>,
    state: Arc<State>,
    committer: Committer,
    topics: watch::Receiver<Vec<String>>,
    /// In which epoch it was said last to be no member any more, by whoever was asked for something else.
    out: watch::Receiver<Option<(i32, Refusal)>>,
    leave: CancellationToken,
    epoch: i32,
    /// What this member has, from taking it on until it has let go.
    owned: Owned,
    /// What it may have, as it was told last.
    assignment: Option<Owned>,
    /// One at a time.
    job: Option<Job>,
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

/// An open membership stream.
struct Membership {
    link: Arc<Link>,
    coordinator: Coordinator,
    send: SendStream,
    updates: FrameReader<wire::MemberUpdate>,
    address: Arc<str>,
}

impl Member {
    pub(crate) fn new(settings: Settings, hands: Hands, topics: watch::Receiver<Vec<String>>) -> Member {
        let context = hands.readers.context.clone();
        let (connections, state) = (context.connections.clone(), context.state.clone());
        let (committer, leave) = (hands.committer.clone(), context.stop.clone());
        let (owned, assignment, job) = (Owned::new(), None, None);
        let out = committer.out();
        Member { settings, hands, connections, state, committer, topics, out, leave, epoch: 0, owned, assignment, job }
    }

    /// Runs until this member leaves or is refused for good. Then it has nothing any more.
    pub(crate) async fn run(mut self) {
        match self.serve().await {
            Ok(()) => self.settle().await,
            Err(error) => {
                // Whoever panicked is not called again.
                if matches!(error, ConsumeError::CallbackPanicked { .. }) {
                    self.hands.on_rebalance = None;
                }
                let lost = self.lose_everything().await;
                self.state.push_error(error);
                if let Err(error) = lost {
                    self.state.push_error(error);
                }
            }
        }
    }

    /// One stream after another, until this member has left.
    ///
    /// # Errors
    /// When the coordinator will not have it, or the application's callback panicked.
    async fn serve(&mut self) -> Result<(), ConsumeError> {
        let mut backoff = Backoff::new(&self.connections.config);
        let mut unreleased_since: Option<Instant> = None;
        loop {
            let (end, joined) = self.belong().await;
            if joined {
                backoff.reset();
                unreleased_since = None;
            }
            match end {
                End::Left => return Ok(()),
                End::Fatal(error) => return Err(error),
                End::Lost(error) => {
                    tracing::debug!(group = &**self.committer.group(), %error, "membership stream lost");
                }
                End::Refused(refusal) => {
                    tracing::info!(group = &**self.committer.group(), %refusal, "membership refused");
                    match refusal.code {
                        ErrorCode::UnknownMember | ErrorCode::FencedMemberEpoch => self.lose_everything().await?,
                        // The one before this one may have been killed: it is out when its session is over.
                        ErrorCode::UnreleasedInstanceId => {
                            let since = *unreleased_since.get_or_insert_with(Instant::now);
                            let session = self.settings.session_timeout.unwrap_or(Duration::from_secs(10));
                            if since.elapsed() > session.saturating_add(Duration::from_secs(5)) {
                                return Err(self.refused(refusal));
                            }
                        }
                        _ if refusal.retryable => {}
                        _ => return Err(self.refused(refusal)),
                    }
                }
            }
            if self.leave.is_cancelled() {
                return Ok(());
            }
            let (leave, pause) = (self.leave.clone(), backoff.next(rand::random()));
            let pause = async move {
                tokio::select! {
                    () = leave.cancelled() => {}
                    () = sleep(pause) => {}
                }
            };
            self.meanwhile(pause).await?;
        }
    }

    fn refused(&self, refusal: Refusal) -> ConsumeError {
        ConsumeError::Group { group: self.committer.group().clone(), refusal }
    }

    /// Fenced, or out: whatever this member had, others may have by now.
    ///
    /// # Errors
    /// When the application's callback panicked.
    async fn lose_everything(&mut self) -> Result<(), ConsumeError> {
        self.assignment = None;
        self.epoch = 0;
        self.committer.set_member(&self.settings.member_id, 0);
        let partitions: Vec<TopicPartition> = self.owned.keys().cloned().collect();
        // Nothing more of it is delivered, whatever the application is in the middle of.
        self.state.end(&partitions);
        let mut outcome = Ok(());
        if let Some(mut job) = self.job.take() {
            job.fence();
            let done = job.done().await;
            outcome = self.finish_job(&job, done);
        }
        let lost: Vec<TopicPartition> = std::mem::take(&mut self.owned).into_keys().collect();
        self.state.end(&lost);
        if !lost.is_empty() && outcome.is_ok() {
            outcome = self.hands.tell(Rebalance::Lost(lost)).await;
        }
        outcome
    }

    /// Leaving: lets go of everything that is left, though nobody can be told but the application.
    async fn settle(&mut self) {
        loop {
            self.begin_job();
            let Some(job) = &mut self.job else { return };
            let done = job.done().await;
            if let Some(job) = self.job.take()
                && let Err(error) = self.finish_job(&job, done)
            {
                tracing::warn!(group = &**self.committer.group(), %error, "leaving");
                return;
            }
        }
    }

    /// Waits for `work`, while partitions come and go.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, ConsumeError> {
        let mut work = std::pin::pin!(work);
        loop {
            self.begin_job();
            let done = tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                _ = is_out(&mut self.out, self.epoch) => {
                    self.lose_everything().await?;
                    continue;
                }
                done = job_done(&mut self.job) => done,
            };
            if let Some(job) = self.job.take() {
                self.finish_job(&job, done)?;
            }
        }
    }

    /// One stream, from opening it to its end; whether it was answered.
    async fn belong(&mut self) -> (End, bool) {
        // An answer is as long in coming as any other; a static member's coordinator may first wait for another's end.
        let patience = self.connections.config.request_timeout.max(self.settings.session_timeout.unwrap_or_default());
        let answer_by = after(Instant::now(), patience);
        let late = || End::Lost(Error::TimedOut { what: "join group", after: patience });
        let group = self.committer.group().clone();
        let metadata = self.hands.readers.context.metadata.clone();
        let (mut stream, reported) = match self.open(&metadata, &group, answer_by).await {
            Ok(opened) => opened,
            Err(end) => return (end.unwrap_or_else(late), false),
        };
        let mut heartbeat_interval = Duration::from_secs(1);
        let mut heartbeat_at = Instant::now() + heartbeat_interval;
        if self.owned != reported {
            // Others wait for what was let go of meanwhile.
            heartbeat_at = Instant::now();
        }
        let mut joined = false;
        // Whoever is heard acknowledges what it is told. Where nothing comes the others are asked: a member is out when its session ends, at
        // whichever broker has the group by then.
        let (mut heard, mut wonder_at) = (stream.link.heard(), Instant::now() + SILENCE);
        let mut asking: Option<BoxFuture<'static, bool>> = None;
        let end = loop {
            let leaving = self.leave.is_cancelled();
            self.begin_job();
            if leaving && self.job.is_none() {
                break stream.part(self.goodbye()).await;
            }
            let result = tokio::select! {
                update = stream.updates.message() => match update {
                    Ok(Some(update)) => {
                        joined |= update.error.is_none();
                        if update.heartbeat_interval_ms > 0 {
                            heartbeat_interval = Duration::from_millis(update.heartbeat_interval_ms.into());
                            heartbeat_at = heartbeat_at.min(Instant::now() + heartbeat_interval);
                        }
                        self.updated(update)
                    }
                    Ok(None) => Err(End::Lost(Error::ConnectionLost {
                        address: stream.address.to_string(),
                        reason: "the broker ended the membership stream".into(),
                    })),
                    Err(error) => Err(End::Lost(error)),
                },
                done = job_done(&mut self.job) => {
                    let finished = self.job.take().map_or(Ok(()), |job| self.finish_job(&job, done));
                    match finished {
                        Ok(()) if leaving && self.owned.is_empty() => Ok(()),
                        Ok(()) => {
                            heartbeat_at = Instant::now() + heartbeat_interval;
                            stream.tell(&self.heartbeat(None)).await
                        }
                        Err(error) => {
                            // Others need not wait for this member's session to end.
                            self.state.end(&self.owned.keys().cloned().collect::<Vec<_>>());
                            stream.part(self.goodbye()).await;
                            Err(End::Fatal(error))
                        }
                    }
                }
                () = sleep_until(heartbeat_at) => {
                    heartbeat_at = Instant::now() + heartbeat_interval;
                    (heard, wonder_at) = (stream.link.heard(), Instant::now() + SILENCE);
                    stream.tell(&self.heartbeat(None)).await
                }
                () = stream.link.ended() => Err(End::Lost(Error::ConnectionLost {
                    address: stream.address.to_string(),
                    reason: "the broker is not there any more".into(),
                })),
                () = sleep_until(wonder_at), if asking.is_none() => {
                    wonder_at = heartbeat_at + SILENCE;
                    if stream.link.heard() == heard {
                        let (metadata, group, found) = (metadata.clone(), group.clone(), stream.coordinator);
                        asking = Some(async move { metadata.coordinators().has_moved(&group, found).await }.boxed());
                    }
                    Ok(())
                }
                Some(moved) = OptionFuture::from(asking.as_mut()) => {
                    (asking, wonder_at) = (None, Instant::now() + SILENCE);
                    if moved { Err(End::Lost(moved_away(stream.coordinator))) } else { Ok(()) }
                }
                () = sleep_until(answer_by), if !joined => Err(late()),
                // A consumer that went away also asked to leave.
                Ok(()) = self.topics.changed(), if !leaving => {
                    let topics = self.topics.borrow_and_update().clone();
                    stream.tell(&self.heartbeat(Some(topics))).await
                }
                out = is_out(&mut self.out, self.epoch) => Err(End::Refused(out)),
                () = self.leave.cancelled(), if !leaving => Ok(()),
            };
            if let Err(end) = result {
                break end;
            }
        };
        match &end {
            End::Lost(error) => metadata.coordinators().failed(&group, stream.coordinator, error),
            End::Refused(refusal) => metadata.coordinators().refused(&group, stream.coordinator, refusal),
            End::Left | End::Fatal(_) => {}
        }
        (end, joined)
    }

    /// Opens a stream at whoever coordinates the group. Returns it, and what the coordinator was told that this member has.
    ///
    /// # Errors
    /// Why there is none; `None`: it took too long.
    async fn open(
        &mut self,
        metadata: &Arc<Metadata>,
        group: &Arc<str>,
        by: Instant,
    ) -> Result<(Membership, Owned), Option<End>> {
        let (link, coordinator) =
            self.step(by, reach(self.connections.clone(), metadata.clone(), group.clone())).await?;
        // From here on the coordinator may know what this member has, and give the rest to others.
        let (join, reported) = (self.join(), self.owned.clone());
        if let Some(assignment) = &mut self.assignment {
            assignment.retain(|at, _| reported.contains_key(at));
        }
        let stream = self.step(by, open_member(link, coordinator, metadata.clone(), join)).await?;
        Ok((stream, reported))
    }

    /// One step towards a stream, while partitions come and go.
    async fn step<T>(&mut self, by: Instant, work: impl Future<Output = Result<T, Error>>) -> Result<T, Option<End>> {
        let leave = self.leave.clone();
        let work = async move {
            let mut work = std::pin::pin!(tokio::time::timeout_at(by, work));
            tokio::select! {
                done = &mut work => done.ok(),
                // The coordinator may hear of this member any moment, and then it must hear the goodbye too.
                () = leave.cancelled() => timeout(LEAVE_TIMEOUT, work).await.ok().and_then(Result::ok),
            }
        };
        match self.meanwhile(work).await {
            Ok(Some(Ok(done))) => Ok(done),
            Ok(Some(Err(error))) if error.retryable() => Err(Some(End::Lost(error))),
            Ok(Some(Err(error))) => Err(Some(End::Fatal(error.into()))),
            Ok(None) if self.leave.is_cancelled() => Err(Some(End::Left)),
            Ok(None) => Err(None),
            Err(error) => Err(Some(End::Fatal(error))),
        }
    }

    fn join(&mut self) -> wire::OpenMember {
        let topics = self.topics.borrow_and_update().clone();
        let settings = &self.settings;
        let ms = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        wire::OpenMember {
            group: self.committer.group().to_string(),
            member_id: settings.member_id.clone(),
            instance_id: settings.instance_id.clone(),
            client_id: self.connections.config.client_id.clone(),
            topics,
            assignor: settings.assignor.clone(),
            session_timeout_ms: settings.session_timeout.map_or(0, ms),
            rebalance_timeout_ms: ms(self.hands.rebalance_timeout),
            rack: self.connections.config.rack.clone().unwrap_or_default(),
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
            let why = "the coordinator put this member out";
            return Err(match self.leave.is_cancelled() {
                true => End::Left,
                false => End::Refused(wire::Error::new(ErrorCode::UnknownMember, why).into()),
            });
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

    /// Begins what is to be done next, if nothing is being done: letting go comes first. Whoever leaves lets go of
    /// everything.
    fn begin_job(&mut self) {
        let nothing = Owned::new();
        let assignment = match &self.assignment {
            _ if self.job.is_some() => return,
            _ if self.leave.is_cancelled() => &nothing,
            Some(assignment) => assignment,
            None => return,
        };
        let surplus = |(at, id): (&TopicPartition, &TopicId)| (assignment.get(at) != Some(id)).then(|| at.clone());
        let let_go: Vec<TopicPartition> = self.owned.iter().filter_map(surplus).collect();
        if !let_go.is_empty() {
            self.job = Some(self.hands.let_go(let_go));
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
            self.job = Some(self.hands.take_on(new));
        }
    }

    /// What follows from a job's end.
    fn finish_job(&mut self, job: &Job, done: Result<bool, ConsumeError>) -> Result<(), ConsumeError> {
        let told = done?;
        if job.letting_go && told {
            job.partitions.iter().for_each(|at| {
                self.owned.remove(at);
            });
        }
        Ok(())
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

impl Membership {
    async fn tell(&mut self, heartbeat: &wire::MemberHeartbeat) -> Result<(), End> {
        write_message(&mut self.send, heartbeat, &self.address).await.map_err(End::Lost)
    }

    /// Says goodbye, and waits for the answer.
    async fn part(&mut self, goodbye: wire::MemberHeartbeat) -> End {
        let exchange = async {
            write_message(&mut self.send, &goodbye, &self.address).await?;
            while let Some(update) = self.updates.message().await? {
                if update.left || update.error.is_some() {
                    break;
                }
            }
            Ok::<(), Error>(())
        };
        match timeout(LEAVE_TIMEOUT, exchange).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "leaving was not answered"),
            Err(_) => tracing::debug!("leaving was not answered in time"),
        }
        End::Left
    }
}

/// The end of the job that is being done; never, if there is none.
async fn job_done(job: &mut Option<Job>) -> Result<bool, ConsumeError> {
    match job {
        Some(job) => Either::Left(job.done()),
        None => Either::Right(std::future::pending()),
    }
    .await
}

/// Why the member of this epoch is none any more, once somebody says so.
async fn is_out(out: &mut watch::Receiver<Option<(i32, Refusal)>>, epoch: i32) -> Refusal {
    let said = out.wait_for(|said| said.as_ref().is_some_and(|(of, _)| *of == epoch)).await;
    match said.ok().and_then(|said| said.clone()) {
        Some((_, refusal)) => refusal,
        // Nobody is there any more who could hear of it.
        None => std::future::pending().await,
    }
}

/// Connects to whoever coordinates the group.
async fn reach(
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    group: Arc<str>,
) -> Result<(Arc<Link>, Coordinator), Error> {
    let coordinators = metadata.coordinators();
    let coordinator = coordinators.find(&group, Deadline::within(connections.config.request_timeout)).await?;
    let reaching = connections.control_at(coordinator.broker_id);
    let reached = coordinators.unless_moved(&group, coordinator, reaching).await;
    let link = reached.inspect_err(|error| coordinators.failed(&group, coordinator, error))?;
    Ok((link, coordinator))
}

async fn open_member(
    link: Arc<Link>,
    coordinator: Coordinator,
    metadata: Arc<Metadata>,
    request: wire::OpenMember,
) -> Result<Membership, Error> {
    let (coordinators, group) = (metadata.coordinators(), request.group.clone());
    let opening = async {
        let (send, recv) = link.open(open::Stream::Member(request)).await?;
        let address = link.address().clone();
        Ok(Membership { send, updates: FrameReader::new(recv, address.clone()), address, link, coordinator })
    };
    let opened = coordinators.unless_moved(&group, coordinator, opening).await;
    opened.inspect_err(|error| coordinators.failed(&group, coordinator, error))
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
