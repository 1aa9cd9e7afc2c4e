//! The driver of groups: one task for each partition of the offsets topic that this broker leads, and each epoch in which it does,
//! which owns the groups whose records lie there.
//!
//! An event changes the groups in memory at once; what it makes visible (answers, updates to members) waits until the
//! records it wrote are kept, and so does everything that was decided after it. Events that arrive during an append
//! share the next one. If the partition refuses an append, memory has run ahead of the log: the groups are read anew,
//! whoever waited is told to try again, and members open their streams again.
//!
//! What is read of a group (and that somebody belongs to it) is told only once it is confirmed that this broker leads still: that
//! is asked after the question came. It is asked as well where the broker's lease is over, or it is behind, while members hold streams here, so
//! that none of them stays with a coordinator which is cut off, while another one takes it for dead.
//!
//! Owns: clocks, streams and appends of groups. Refuses: decisions ([`super::state`], [`super::offsets`]).
//! Read next: [`super::load`].

use super::offsets::{CommitEntry, Committed, EntryError, Speaker};
use super::records::Replay;
use super::standing::{ANSWERS, Standing};
use super::state::{Effect, Effects, Group, Join, Report};
use super::waiting::{Asked, Outbox, Questions};
use super::{GroupError, GroupSettings, Now, Partitions, load};
use crate::clock::now_ms;
use crate::config::BrokerConfig;
use crate::error::PartitionError;
use crate::lease::BEHIND;
use crate::metadata::{MetadataHandle, MetadataState};
use crate::partition::PartitionHandle;
use crate::pool::Pool;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use headwater_proto::ErrorCode;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_proto::wire::Acks;
use headwater_storage::NewBatch;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Requests that may wait for one shard.
pub(super) const WAITING_REQUESTS: usize = 4096;
/// Bytes of records that may gather while an append is under way.
const GATHERED_BYTES: usize = 4 << 20;
/// How often the lease is looked at, while members hold streams here.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
/// Time for a member that is sent away to find who coordinates by then, and to be heard there.
const ON_ITS_WAY: Duration = Duration::from_secs(1);
/// Time between two tries to read the groups of a partition that refuses.
const RELOAD_AFTER: Duration = Duration::from_millis(500);

/// What a member's stream is to be told. Only the newest matters: each update is whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemberView {
    /// Epoch and assignment, once there are any.
    pub(crate) update: Option<(i32, Partitions)>,
    /// The stream ends: with an error, or because the member left.
    pub(crate) ended: Option<Result<(), GroupError>>,
}

/// What a joined member gets.
pub(super) struct Joined {
    pub(super) stream_id: u64,
    pub(super) view: watch::Receiver<MemberView>,
    pub(super) heartbeat_interval_ms: u32,
}

pub(super) type Tell<T> = oneshot::Sender<Result<T, GroupError>>;

/// Who speaks, as it travels to a shard.
#[derive(Debug, Clone)]
pub(crate) enum OwnedSpeaker {
    Member { id: String, epoch: i32 },
    Administrator,
}

impl OwnedSpeaker {
    fn as_speaker(&self) -> Speaker<'_> {
        match self {
            OwnedSpeaker::Member { id, epoch } => Speaker::Member { id, epoch: *epoch },
            OwnedSpeaker::Administrator => Speaker::Administrator,
        }
    }
}

/// A group in a list.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) group: String,
    pub(crate) state: &'static str,
    pub(crate) members: usize,
    pub(crate) assignor: &'static str,
}

pub(super) enum Request {
    Join { group: String, join: Join, tell: Tell<Joined> },
    Report { group: String, member: String, stream_id: u64, report: Report },
    Leave { group: String, member: String, stream_id: u64, keep: bool },
    Disconnected { group: String, member: String, stream_id: u64 },
    Commit { group: String, speaker: OwnedSpeaker, entries: Vec<CommitEntry>, tell: Tell<Vec<Result<(), EntryError>>> },
    Offsets { group: String, speaker: OwnedSpeaker, tell: Tell<Vec<(String, u32, Committed)>> },
    Describe { group: String, tell: Tell<Box<Group>> },
    List { tell: Tell<Vec<Listed>> },
    Committed { tell: Tell<Vec<(String, String, u32, i64)>> },
    Delete { group: String, tell: Tell<()> },
    DeleteOffsets { group: String, topic: String, partitions: Vec<u32>, tell: Tell<()> },
    TakeOver { group: String, offsets: Vec<(String, u32, Committed)>, tell: Tell<()> },
    TopicsChanged { tell: Tell<()> },
}

impl Request {
    /// Whether a coordinator that is none any more could answer it, though nothing that it decides is kept.
    fn needs_confirmation(&self) -> bool {
        matches!(self, Request::Join { .. } | Request::Offsets { .. } | Request::Describe { .. } | Request::List { .. })
    }
}

/// What waits for records to be kept.
enum Then {
    Update(watch::Sender<MemberView>, (i32, Partitions)),
    End(watch::Sender<MemberView>, Result<(), GroupError>),
    Answer(Box<dyn FnOnce(Result<(), GroupError>) + Send>),
}

impl Then {
    fn run(self, kept: Result<(), GroupError>) {
        match (self, kept) {
            (Then::Update(stream, update), Ok(())) => stream.send_modify(|view| view.update = Some(update)),
            (Then::Update(stream, _) | Then::End(stream, _), Err(error)) => end(&stream, Err(error)),
            (Then::End(stream, why), Ok(())) => end(&stream, why),
            (Then::Answer(answer), kept) => answer(kept),
        }
    }
}

fn end(stream: &watch::Sender<MemberView>, why: Result<(), GroupError>) {
    stream.send_modify(|view| {
        view.ended.get_or_insert(why);
    });
}

struct Stream {
    id: u64,
    view: watch::Sender<MemberView>,
}

/// What every shard needs.
#[derive(Clone)]
pub(crate) struct GroupContext {
    pub(crate) settings: GroupSettings,
    pub(crate) metadata: MetadataHandle,
    pub(crate) pool: Pool,
    pub(crate) logs: Arc<crate::partitions::Partitions>,
    /// Says whether this broker leads still.
    pub(crate) standing: Standing,
    /// For how long members may stay with a coordinator that another one has followed.
    pub(crate) elsewhere_ms: u64,
    /// Tells the tasks to end.
    pub(crate) stop: CancellationToken,
}

/// For how long members may stay with a coordinator that another one has followed: until it has heard that it is behind, has been for as long
/// as it may (twice, where it gets what it lacked first just before), or its lease is over; has looked at that, and has asked in vain.
pub(super) fn elsewhere(config: &BrokerConfig) -> Duration {
    let behind = Duration::from_millis(config.broker_heartbeat_interval_ms) + BEHIND * 2;
    behind.max(Duration::from_millis(config.broker_session_timeout_ms)) + CONFIRM_EVERY + ANSWERS + ON_ITS_WAY
}

type Loading = BoxFuture<'static, Result<Replay, PartitionError>>;
type Appending = BoxFuture<'static, Result<(), PartitionError>>;
/// Whether this broker leads still.
type Confirming = BoxFuture<'static, bool>;

/// Why a shard ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The broker stops.
    Stop,
    /// This broker does not lead in this epoch any more.
    Over,
}

pub(super) struct Shard {
    context: GroupContext,
    partition: PartitionHandle,
    /// In which it leads the partition.
    epoch: i32,
    began: Instant,
    groups: BTreeMap<String, Group>,
    streams: HashMap<(String, String), Stream>,
    next_stream_id: u64,
    /// When each group's next deadline is.
    deadlines: BTreeSet<(u64, String)>,
    deadline_of: HashMap<String, u64>,
    /// Reads the groups; `None` once they are served.
    loading: Option<Loading>,
    /// Why the groups could not be read or written: what is asked while they are read again is refused with this. While
    /// they are read for the first time, requests wait.
    refusing: Option<GroupError>,
    /// Records, keys and values, and what waits for them.
    outbox: Outbox<(Bytes, Option<Bytes>), Then>,
    gathered_bytes: usize,
    /// The append under way.
    appending: Option<Appending>,
    /// What waits until it is known whether this broker leads still.
    questions: Questions<Request>,
    /// The question to the quorum that is under way.
    confirming: Option<Confirming>,
    /// When it is asked next, though nobody waits for it.
    confirm_at: Instant,
    /// The partition took nothing any more in this epoch.
    is_over: bool,
}

impl Shard {
    pub(super) fn new(context: GroupContext, partition: PartitionHandle, epoch: i32) -> Shard {
        let loading = load::read(&context, partition.clone(), epoch, Duration::ZERO).boxed();
        Shard {
            context,
            partition,
            epoch,
            began: Instant::now(),
            groups: BTreeMap::new(),
            streams: HashMap::new(),
            next_stream_id: 0,
            deadlines: BTreeSet::new(),
            deadline_of: HashMap::new(),
            loading: Some(loading),
            refusing: None,
            outbox: Outbox::default(),
            gathered_bytes: 0,
            appending: None,
            questions: Questions::default(),
            confirming: None,
            confirm_at: Instant::now(),
            is_over: false,
        }
    }

    /// Serves the groups until the broker stops, or `over`: it does not lead in this epoch any more.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>, over: CancellationToken) {
        let stop = self.context.stop.clone();
        let mut changes = self.context.metadata.changes();
        let mut watching = true;
        let expire_every = Duration::from_millis(self.context.settings.offsets_check_interval_ms);
        let mut expire_at = Instant::now() + expire_every;
        let ending = loop {
            let deadline = self.next_deadline().map_or(expire_at, |deadline| deadline.min(expire_at));
            let admits = self.gathered_bytes < GATHERED_BYTES
                && self.questions.waiting() < WAITING_REQUESTS
                && (self.loading.is_none() || self.refusing.is_some());
            let confirms = self.questions.asks_now(!self.streams.is_empty()) && !self.context.standing.is_alone();
            tokio::select! {
                biased;
                () = stop.cancelled() => break Ending::Stop,
                () = over.cancelled() => break Ending::Over,
                confirmed = confirmed(&mut self.confirming) => self.confirmed(confirmed),
                () = sleep_until(self.confirm_at), if confirms => match self.is_up_to_date() {
                    true => self.confirm_at = Instant::now() + CONFIRM_EVERY,
                    false => self.confirm(),
                },
                kept = appended(&mut self.appending) => self.appended(kept),
                replay = loaded(&mut self.loading) => self.loaded(replay),
                changed = changes.changed(), if watching => match changed {
                    Ok(()) => self.topics_changed(),
                    // The metadata stops before the groups do.
                    Err(_) => watching = false,
                },
                () = sleep_until(deadline) => {
                    // Reports that have arrived count, however late this task is.
                    for _ in 0..if admits { WAITING_REQUESTS } else { 0 } {
                        let Ok(request) = requests.try_recv() else { break };
                        self.handle(request);
                    }
                    self.tick();
                    if Instant::now() >= expire_at {
                        self.expire();
                        expire_at = Instant::now() + expire_every;
                    }
                }
                request = requests.recv(), if admits => match request {
                    Some(request) => self.handle(request),
                    None => break Ending::Stop,
                },
            }
            if self.is_over {
                break Ending::Over;
            }
            if self.questions.asks_now(false) {
                self.confirm();
            }
            self.append_gathered();
        };
        self.end(ending, &mut requests).await;
    }

    fn handle(&mut self, request: Request) {
        if self.loading.is_some() || !request.needs_confirmation() || self.context.standing.is_alone() {
            return self.serve(request);
        }
        match self.questions.ask(request, self.context.logs.lease().holds()) {
            Asked::Waits => {}
            Asked::Answered(request) => self.serve(request),
            // Others may have taken it for dead: whoever asks need not wait until nobody answers.
            Asked::Refused(request) => refuse(request, |_| GroupError::Unconfirmed),
        }
    }

    /// Whether nobody took this broker for dead, and it knows what the others decided: where the partition is led elsewhere, it hears of that.
    fn is_up_to_date(&self) -> bool {
        let (lease, here) = (self.context.logs.lease(), self.context.metadata.state().index());
        lease.holds() && !lease.is_behind(here, BEHIND)
    }

    /// Asks whether this broker leads still, on behalf of whoever waits for that by now.
    fn confirm(&mut self) {
        let (context, partition, epoch) = (self.context.clone(), self.partition.clone(), self.epoch);
        let confirming = async move { context.standing.confirm(&context.metadata, &partition, epoch).await };
        self.confirming = Some(confirming.boxed());
        self.questions.begin();
        self.confirm_at = Instant::now() + CONFIRM_EVERY;
    }

    fn confirmed(&mut self, leads: bool) {
        self.confirming = None;
        let waiting = self.questions.answered();
        if leads {
            waiting.into_iter().for_each(|request| self.serve(request));
            return;
        }
        // Members look for whoever coordinates. If it is this broker after all, they have their whole session from then on: whether they
        // were silent or not heard, nobody can say.
        for request in waiting {
            refuse(request, |_| GroupError::Unconfirmed);
        }
        if self.loading.is_none() {
            self.fail(&GroupError::Unconfirmed);
            self.reload(GroupError::Unconfirmed);
        }
    }

    fn serve(&mut self, request: Request) {
        let now = self.now();
        if self.loading.is_some() {
            let refusing = self.refusing.clone();
            return refuse(request, |group| refusing.clone().unwrap_or_else(|| GroupError::Loading(group.to_owned())));
        }
        let metadata = self.context.metadata.state();
        match request {
            Request::Join { group, join, tell } => self.join(now, group, join, &metadata, tell),
            Request::Report { group, member, stream_id, report } => {
                if self.is_current(&group, &member, stream_id) {
                    let done = self.with(&group, |g| g.heartbeat(now, &member, report, &metadata));
                    self.end_if_refused(group, member, done);
                }
            }
            Request::Leave { group, member, stream_id, keep } => {
                if self.is_current(&group, &member, stream_id) {
                    let done = self.with(&group, |g| g.leave(now, &member, keep, &metadata));
                    self.end_if_refused(group, member, done);
                }
            }
            Request::Disconnected { group, member, stream_id } => {
                if self.is_current(&group, &member, stream_id) {
                    if let Some(group) = self.groups.get_mut(&group) {
                        group.disconnected(&member);
                    }
                    self.streams.remove(&(group, member));
                }
            }
            Request::Commit { group, speaker, entries, tell } => {
                let mut results = Vec::new();
                let done = self.with(&group, |g| {
                    let (effects, entries) = g.commit(now, speaker.as_speaker(), entries, &metadata)?;
                    results = entries;
                    Ok(effects)
                });
                self.answer(done, tell, move || results);
            }
            Request::Offsets { group, speaker, tell } => {
                let found = match self.groups.get(&group) {
                    Some(group) => group.check_speaker(speaker.as_speaker()).map(|()| copy_offsets(group)),
                    None => match speaker {
                        OwnedSpeaker::Administrator => Ok(Vec::new()),
                        OwnedSpeaker::Member { id, .. } => Err(GroupError::UnknownMember { group, member: id }),
                    },
                };
                self.answer_read(found, tell);
            }
            Request::Describe { group, tell } => {
                let found = self.groups.get(&group).cloned().map(Box::new).ok_or(GroupError::NotFound(group));
                self.answer_read(found, tell);
            }
            Request::List { tell } => {
                let listed = self.groups.values().map(|group| Listed {
                    group: group.name().to_owned(),
                    state: group.phase().name(),
                    members: group.members().len(),
                    assignor: group.assignor().name(),
                });
                let listed = listed.collect();
                self.answer_read(Ok(listed), tell);
            }
            Request::Committed { tell } => {
                let offsets = self.groups.values().flat_map(|group| {
                    let name = group.name();
                    group.offsets().map(|(topic, p, kept)| (name.to_owned(), topic.to_owned(), p, kept.offset))
                });
                let offsets = offsets.collect();
                self.answer_read(Ok(offsets), tell);
            }
            Request::Delete { group, tell } => {
                let done = self.with(&group, Group::delete);
                self.answer(done, tell, || ());
            }
            Request::DeleteOffsets { group, topic, partitions, tell } => {
                let done = self.with(&group, |g| g.delete_offsets(&topic, &partitions));
                self.answer(done, tell, || ());
            }
            Request::TakeOver { group, offsets, tell } => {
                let done = self.with(&group, |g| Ok(g.take_over(now, offsets)));
                self.answer(done, tell, || ());
            }
            Request::TopicsChanged { tell } => {
                self.topics_changed();
                self.answer(Ok(()), tell, || ());
            }
        }
    }

    fn join(&mut self, now: Now, group: String, join: Join, metadata: &MetadataState, tell: Tell<Joined>) {
        let key = (group.clone(), join.member_id.clone());
        let member = join.member_id.clone();
        let settings = self.context.settings.clone();
        // The stream is there before the effects: they hold its first update. A refused join leaves an older one be.
        let (view, watched) = watch::channel(MemberView::default());
        let older = self.streams.insert(key.clone(), Stream { id: self.next_stream_id, view });
        let done = self.with(&group, |g| g.join(now, join, metadata, &settings));
        match done {
            Ok(()) => {
                let interval = |g: &Group| g.heartbeat_interval_ms(&member, &settings);
                let heartbeat_interval_ms = self.groups.get(&group).map_or(settings.heartbeat_interval_ms, interval);
                let stream_id = self.next_stream_id;
                self.next_stream_id += 1;
                // A member that does not wait for the answer has dropped its stream, and says so.
                drop(tell.send(Ok(Joined { stream_id, view: watched, heartbeat_interval_ms })));
            }
            Err(error) => {
                match older {
                    Some(older) => self.streams.insert(key, older),
                    None => self.streams.remove(&key),
                };
                self.answer_read(Err(error), tell);
            }
        }
    }

    /// Lets a group decide, and takes note of what it decided.
    fn with(
        &mut self,
        name: &str,
        decide: impl FnOnce(&mut Group) -> Result<Effects, GroupError>,
    ) -> Result<(), GroupError> {
        let group = self.groups.entry(name.to_owned()).or_insert_with(|| Group::new(name));
        let decided = decide(group);
        let (forgotten, deadline) = (group.is_forgotten(), group.next_deadline_ms());
        if forgotten {
            self.groups.remove(name);
        }
        self.note_deadline(name, deadline);
        self.perform(name, decided?);
        Ok(())
    }

    fn note_deadline(&mut self, name: &str, deadline: Option<u64>) {
        if self.deadline_of.get(name).copied() == deadline {
            return;
        }
        if let Some(before) = self.deadline_of.remove(name) {
            self.deadlines.remove(&(before, name.to_owned()));
        }
        if let Some(deadline) = deadline {
            self.deadline_of.insert(name.to_owned(), deadline);
            self.deadlines.insert((deadline, name.to_owned()));
        }
    }

    fn perform(&mut self, group: &str, effects: Effects) {
        // Whatever the event makes visible waits for all of its records.
        let (writes, visible): (Effects, Effects) =
            effects.into_iter().partition(|effect| matches!(effect, Effect::Write(..)));
        for write in writes {
            let Effect::Write(key, value) = write else { continue };
            let encoded = key.encode().and_then(|key| Ok((key, value.map(|value| value.encode()).transpose()?)));
            match encoded {
                Ok((key, value)) => {
                    self.gathered_bytes += BatchBuilder::record_bound(Some(&key), value.as_deref(), &[]);
                    self.outbox.write((key, value));
                }
                Err(error) => tracing::error!(group, %error, "group record cannot be written"),
            }
        }
        for effect in visible {
            let key = |member: &str| (group.to_owned(), member.to_owned());
            match effect {
                Effect::Update { member_id, epoch, assigned } => {
                    if let Some(stream) = self.streams.get(&key(&member_id)) {
                        let then = Then::Update(stream.view.clone(), (epoch, assigned));
                        self.defer(then);
                    }
                }
                Effect::Expel { member_id, error } => {
                    tracing::info!(group, member = member_id, %error, "member is out");
                    if let Some(stream) = self.streams.remove(&key(&member_id)) {
                        self.defer(Then::End(stream.view, Err(error)));
                    }
                }
                Effect::Left { member_id } => {
                    if let Some(stream) = self.streams.remove(&key(&member_id)) {
                        self.defer(Then::End(stream.view, Ok(())));
                    }
                }
                Effect::Write(..) => {}
            }
        }
    }

    /// Does something once everything decided so far is kept.
    fn defer(&mut self, then: Then) {
        if let Some(then) = self.outbox.defer(then) {
            then.run(Ok(()));
        }
    }

    fn answer<T: Send + 'static>(
        &mut self,
        done: Result<(), GroupError>,
        tell: Tell<T>,
        value: impl FnOnce() -> T + Send + 'static,
    ) {
        self.defer(Then::Answer(Box::new(move |kept| {
            // Whoever asked may have gone.
            drop(tell.send(kept.and(done).map(|()| value())));
        })));
    }

    fn answer_read<T: Send + 'static>(&mut self, found: Result<T, GroupError>, tell: Tell<T>) {
        self.defer(Then::Answer(Box::new(move |kept| drop(tell.send(kept.and(found))))));
    }

    fn end_if_refused(&mut self, group: String, member: String, done: Result<(), GroupError>) {
        if let Err(error) = done
            && let Some(stream) = self.streams.remove(&(group, member))
        {
            self.defer(Then::End(stream.view, Err(error)));
        }
    }

    fn is_current(&self, group: &str, member: &str, stream_id: u64) -> bool {
        self.streams.get(&(group.to_owned(), member.to_owned())).is_some_and(|stream| stream.id == stream_id)
    }

    fn each_group(&mut self, decide: impl Fn(&mut Group) -> Effects) {
        let names: Vec<String> = self.groups.keys().cloned().collect();
        for name in names {
            // Deciding for all of them cannot be refused.
            drop(self.with(&name, |group| Ok(decide(group))));
        }
    }

    fn topics_changed(&mut self) {
        if self.loading.is_some() {
            return;
        }
        let (now, metadata) = (self.now(), self.context.metadata.state());
        self.each_group(|group| {
            let mut effects = group.topics_changed(now, &metadata);
            effects.extend(group.forget_deleted_topics(&metadata));
            effects
        });
    }

    fn expire(&mut self) {
        if self.loading.is_none() {
            let (now, settings) = (self.now(), self.context.settings.clone());
            self.each_group(|group| group.expire(now, &settings));
        }
    }

    fn tick(&mut self) {
        let now = self.now();
        let metadata = self.context.metadata.state();
        while let Some((deadline, name)) = self.deadlines.first().cloned() {
            if deadline > now.monotonic_ms {
                break;
            }
            // A tick cannot be refused.
            drop(self.with(&name, |group| Ok(group.tick(now, &metadata))));
        }
    }

    fn append_gathered(&mut self) {
        let Some(records) = self.outbox.next_append() else { return };
        self.gathered_bytes = 0;
        let timestamp = now_ms();
        let mut builder = BatchBuilder::new(BuildOptions::default());
        for (key, value) in &records {
            builder.append(timestamp, Some(key), value.as_deref(), &[]);
        }
        let built = builder.build().and_then(|bytes| Ok(NewBatch { header: BatchHeader::parse(&bytes)?, bytes }));
        let (partition, epoch) = (self.partition.clone(), self.epoch);
        // Groups as of this epoch: another coordinator may have decided otherwise since.
        let append = async move { partition.append_in(epoch, vec![built?], Acks::All).await.map(drop) };
        self.appending = Some(append.boxed());
    }

    fn appended(&mut self, kept: Result<(), PartitionError>) {
        self.appending = None;
        match kept {
            Ok(()) => self.outbox.appended().into_iter().for_each(|then| then.run(Ok(()))),
            Err(PartitionError::NotLeader(_)) => {
                self.fail(&GroupError::Moved);
                self.is_over = true;
            }
            Err(error) => {
                tracing::warn!(partition = ?self.partition, %error, "group records not kept; reading the groups anew");
                self.fail(&not_kept(&error));
                self.reload(not_kept(&error));
            }
        }
    }

    /// Tells everybody who waits or listens that what was decided does not hold.
    fn fail(&mut self, error: &GroupError) {
        (self.appending, self.gathered_bytes) = (None, 0);
        for then in self.outbox.give_up() {
            then.run(Err(error.clone()));
        }
        for (_, stream) in self.streams.drain() {
            end(&stream.view, Err(error.clone()));
        }
    }

    fn reload(&mut self, error: GroupError) {
        self.refusing = Some(error);
        self.groups.clear();
        self.deadlines.clear();
        self.deadline_of.clear();
        // A partition that could not be opened, because the disk was full, has been opened again meanwhile.
        if let Some(partition) = self.context.logs.get(&self.partition.topic_id(), self.partition.partition()) {
            self.partition = partition;
        }
        self.loading = Some(load::read(&self.context, self.partition.clone(), self.epoch, RELOAD_AFTER).boxed());
    }

    fn loaded(&mut self, replay: Result<Replay, PartitionError>) {
        self.loading = None;
        match replay {
            Ok(replay) => {
                self.refusing = None;
                self.confirm_at = Instant::now() + CONFIRM_EVERY;
                let passed_over = replay.passed_over();
                let metadata = self.context.metadata.state();
                let (settings, elsewhere_ms) = (&self.context.settings, self.context.elsewhere_ms);
                let (groups, effects) = replay.finish(self.now(), &metadata, settings, elsewhere_ms);
                if passed_over > 0 {
                    tracing::warn!(partition = ?self.partition, passed_over, "records of the offsets topic passed over");
                }
                for (name, group) in &groups {
                    self.note_deadline(name, group.next_deadline_ms());
                }
                self.groups = groups;
                for (name, effects) in effects {
                    self.perform(&name, effects);
                }
                self.topics_changed();
            }
            Err(error) => {
                // Not where others have not confirmed it yet, or lead by now.
                if self.refusing.is_none() && !matches!(error, PartitionError::NotLeader(_)) {
                    tracing::error!(partition = ?self.partition, %error, "groups cannot be read; trying again");
                }
                self.reload(not_kept(&error));
            }
        }
    }

    fn now(&self) -> Now {
        let monotonic_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { monotonic_ms, wall_ms: now_ms() }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let (deadline, _) = self.deadlines.first()?;
        Some(self.began + Duration::from_millis(*deadline))
    }

    /// Where the broker stops, what was decided is kept and answered; the rest is refused.
    async fn end(mut self, ending: Ending, requests: &mut mpsc::Receiver<Request>) {
        let why = match ending {
            Ending::Stop => GroupError::ShuttingDown,
            Ending::Over => GroupError::Moved,
        };
        requests.close();
        self.confirming = None;
        for request in self.questions.give_up() {
            refuse(request, |_| why.clone());
        }
        while let Ok(request) = requests.try_recv() {
            refuse(request, |_| why.clone());
        }
        if ending == Ending::Over {
            return self.fail(&why);
        }
        self.append_gathered();
        while self.appending.is_some() {
            let kept = appended(&mut self.appending).await;
            self.appended(kept);
            self.append_gathered();
        }
        self.fail(&why);
    }
}

/// The end of the append under way; never, without one.
async fn appended(appending: &mut Option<Appending>) -> Result<(), PartitionError> {
    match appending {
        Some(append) => append.await,
        None => std::future::pending().await,
    }
}

/// The answer to the question under way; never, without one.
async fn confirmed(confirming: &mut Option<Confirming>) -> bool {
    match confirming {
        Some(confirming) => confirming.await,
        None => std::future::pending().await,
    }
}

/// The end of the reading under way; never, without one.
async fn loaded(loading: &mut Option<Loading>) -> Result<Replay, PartitionError> {
    match loading {
        Some(loading) => loading.await,
        None => std::future::pending().await,
    }
}

fn not_kept(error: &PartitionError) -> GroupError {
    if matches!(error, PartitionError::NotLeader(_)) {
        return GroupError::Unconfirmed;
    }
    let code = match error.code() {
        // The coordinator can go on; it has to read what is there.
        ErrorCode::PartitionFenced => ErrorCode::PartitionFenced,
        code if code.retryable() => code,
        _ => ErrorCode::CoordinatorLoading,
    };
    GroupError::NotKept { code, reason: error.to_string() }
}

fn copy_offsets(group: &Group) -> Vec<(String, u32, Committed)> {
    group.offsets().map(|(topic, partition, committed)| (topic.to_owned(), partition, committed.clone())).collect()
}

fn refuse(request: Request, error: impl Fn(&str) -> GroupError) {
    fn tell_it<T>(tell: Tell<T>, error: GroupError) {
        // Whoever asked may have gone.
        drop(tell.send(Err(error)));
    }
    match request {
        Request::Join { group, tell, .. } => tell_it(tell, error(&group)),
        Request::Commit { group, tell, .. } => tell_it(tell, error(&group)),
        Request::Offsets { group, tell, .. } => tell_it(tell, error(&group)),
        Request::Describe { group, tell } => tell_it(tell, error(&group)),
        Request::List { tell } => tell_it(tell, error("*")),
        Request::Committed { tell } => tell_it(tell, error("*")),
        Request::Delete { group, tell }
        | Request::DeleteOffsets { group, tell, .. }
        | Request::TakeOver { group, tell, .. } => tell_it(tell, error(&group)),
        // Topics are looked at once the groups are read.
        Request::TopicsChanged { tell } => drop(tell.send(Ok(()))),
        // Their streams ended when the groups were let go.
        Request::Report { .. } | Request::Leave { .. } | Request::Disconnected { .. } => {}
    }
}
