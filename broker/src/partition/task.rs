//! What one partition does: the task that owns the log's write half and drives [`PartitionState`] where this broker leads, and
//! [`Following`] where it does not.
//!
//! The write half is either here or on the I/O pool with one job; meanwhile appends, or what a leader pushes, gather into the next group. A
//! commit checks the batches that nobody has checked, and reports its write before it flushes, where somebody waits for the write alone.
//! A role ends the moment the metadata say so, and the next begins once the write half is here: never two at once.
//!
//! Owns: the write half, the clock, the answers. Refuses: decisions. Read next: `storage/src/log.rs`; for what goes between
//! replicas, [`crate::replica::follow`] and [`crate::replica::serve`].

use super::following::{self, Following};
use super::job::{Flushed, Followed, Report, cut_back, follow, run};
use super::state::{Effect, PartitionState, fenced};
use super::{Admitted, AssignedRole, Inbox, Message, PartitionContext, PartitionShared, Reply, Work, log_config};
use crate::clock::now_ms;
use crate::disk;
use crate::error::PartitionError;
use crate::metrics::Counted;
use crate::replica::Hello;
use crate::replica::follow::FollowStream;
use crate::replica::follower::Replica;
use crate::replica::history::History;
use crate::replica::lag::Lags;
use crate::replica::leader::{AlterPartition, HelloRefusal, View};
use crate::topic_config::TopicConfig;
use headwater_storage::Log;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How often a leader without a lease looks whether it is back, in milliseconds.
const LEASE_LOOK_MS: i64 = 250;
/// What is left of a generation once it is told which log of the replica it belongs to: how often that was cut.
const CUTS_BITS: u32 = 32;

enum Ending {
    Close(Vec<oneshot::Sender<Result<(), PartitionError>>>),
    Delete(Vec<oneshot::Sender<()>>),
}

/// What this broker is to the partition.
enum Role {
    Leader(Box<PartitionState<Reply, Work>>),
    /// It follows, or waits for somebody to lead.
    Follower(Box<Following<Work>>),
}

struct Task {
    shared: Arc<PartitionShared>,
    role: Role,
    /// What the role was taken by.
    taken: Option<Arc<AssignedRole>>,
    /// How often this start of the broker has cut the log, and made it anew.
    generation: u64,
    /// The streams of this leader's followers.
    streams: BTreeMap<i32, DropGuard>,
    /// How far they are behind.
    lags: Lags,
    /// The stream to the leader, and the number of the last one that there was in any role.
    follows: Option<FollowStream>,
    last_stream: u64,
    /// What the leader pushed was not sound, which was told.
    told_unsound: bool,
    log: Option<Box<Log>>,
    /// The settings that the write half has, or has been told.
    configured: Arc<TopicConfig>,
    ending: Option<Ending>,
    fenced: Option<Counted>,
    /// Says to the controller that the replica is of no use.
    unfit: Option<disk::Fenced>,
    reports: mpsc::UnboundedSender<Box<Report>>,
    inbox: Inbox,
    context: PartitionContext,
}

pub(super) fn spawn(
    shared: Arc<PartitionShared>,
    log: Option<Log>,
    ended: Option<PartitionError>,
    inbox: Inbox,
    messages: mpsc::UnboundedReceiver<Box<Message>>,
    context: &PartitionContext,
) {
    let fenced = ended.is_some().then(|| Counted::new(&context.metrics.partitions_fenced));
    // What only waits for room is no damage.
    let is_unfit = matches!(ended, Some(PartitionError::Fenced(_)));
    let unfit = is_unfit.then(|| context.disk.fenced((shared.topic_id, shared.partition)));
    let (reports, reported) = mpsc::unbounded_channel();
    let offsets = shared.watermarks.borrow().offsets;
    let mut waiting = Following::new(None, 0, &shared.config.load(), context.limits(), offsets);
    if ended.is_some() {
        waiting.end(ended);
    }
    let configured = shared.config.load_full();
    // What an earlier log of this replica reported is not taken for this one's.
    let generation = context.disk.times_anew((shared.topic_id, shared.partition)) << CUTS_BITS;
    let mut task = Task {
        shared,
        configured,
        role: Role::Follower(Box::new(waiting)),
        taken: None,
        generation,
        streams: BTreeMap::new(),
        lags: Lags::default(),
        follows: None,
        last_stream: 0,
        told_unsound: false,
        log: log.map(Box::new),
        ending: None,
        fenced,
        unfit,
        reports,
        inbox,
        context: context.clone(),
    };
    // Whoever opened it sees it in its role.
    task.take_role();
    task.perform();
    tokio::spawn(task.run(messages, reported));
}

impl Task {
    async fn run(
        mut self,
        mut messages: mpsc::UnboundedReceiver<Box<Message>>,
        mut reported: mpsc::UnboundedReceiver<Box<Report>>,
    ) {
        loop {
            self.take_role();
            self.look_at_lease();
            self.perform();
            if self.finish_if_idle().await {
                return;
            }
            self.begin_job();
            let due = self.deadline_ms().map(|deadline| {
                let wait = u64::try_from(deadline.saturating_sub(now_ms())).unwrap_or(0);
                tokio::time::sleep(Duration::from_millis(wait))
            });
            tokio::select! {
                biased;
                Some(report) = reported.recv() => self.report(*report),
                message = messages.recv() => match message {
                    Some(message) => {
                        self.message(*message);
                        while let Ok(message) = messages.try_recv() {
                            self.message(*message);
                        }
                    }
                    // Every handle is gone: nobody can ask for anything any more, and nobody closed the log.
                    None => return self.log.take().map_or((), |log| self.let_go(log)),
                },
                () = async { match due { Some(sleep) => sleep.await, None => std::future::pending().await } } => {
                    self.tick();
                }
            }
        }
    }

    /// When something is due, if nothing happens before.
    fn deadline_ms(&self) -> Option<i64> {
        let is_here = self.log.is_some();
        match &self.role {
            Role::Leader(state) => {
                let flush = state.flush_deadline_ms().filter(|_| is_here);
                // Nobody tells when the lease is back.
                let lease =
                    (!state.leader().has_lease() && state.leader().has_followers()).then(|| now_ms() + LEASE_LOOK_MS);
                flush.into_iter().chain(state.leader().deadline_ms()).chain(lease).min()
            }
            Role::Follower(following) => following.deadline_ms().filter(|_| is_here),
        }
    }

    fn tick(&mut self) {
        if let Role::Leader(state) = &mut self.role
            && state.leader().deadline_ms().is_some()
        {
            let now = now_ms();
            state.replicas(|leader| leader.tick(now));
        }
    }

    /// A process that stood still finds its lease gone before it takes anything.
    fn look_at_lease(&mut self) {
        if let Role::Leader(state) = &mut self.role {
            let holds = self.context.lease.holds();
            if state.leader().has_lease() != holds {
                let now = now_ms();
                state.replicas(|leader| leader.lease(holds, now));
            }
        }
    }

    fn message(&mut self, message: Message) {
        self.look_at_lease();
        match message {
            Message::Append(append) => match &mut self.role {
                Role::Leader(state) => state.append(append),
                Role::Follower(_) => {
                    let why = self.ended().unwrap_or(PartitionError::NotLeader(self.leader_epoch()));
                    // Whoever asked may have gone.
                    drop(append.refuse().tell.send(Err(why)));
                }
            },
            Message::Work(work) => match self.ended() {
                Some(why) => work(Err(why)),
                None => self.work(work),
            },
            Message::Configure => self.configure(),
            Message::Hello(hello, from, tell) => {
                // Whoever asked may have gone.
                drop(tell.send(self.hello(&hello, from)));
            }
            Message::Reported(report) => {
                if let Role::Leader(state) = &mut self.role {
                    let now = now_ms();
                    let counts = state.replicas(|leader| leader.report(report, now));
                    if !counts && state.leader().awaits_hello(report.member) {
                        // Its stream is one that nobody here remembers: it opens another.
                        self.streams.remove(&report.member.broker);
                    }
                }
            }
            Message::Altered(partition_epoch, altered) => {
                if let Role::Leader(state) = &mut self.role {
                    let now = now_ms();
                    state.replicas(|leader| leader.altered(partition_epoch, altered, now));
                }
            }
            Message::Verdict(stream, tenure, verdict) => {
                if let Role::Follower(following) = &mut self.role {
                    following.verdict(stream, tenure, verdict);
                    if following.is_led() {
                        self.context.disk.is_known((self.shared.topic_id, self.shared.partition));
                    }
                }
            }
            Message::Pushed(stream, push, pushed) => {
                if let Role::Follower(following) = &mut self.role {
                    following.pushed(stream, &push, pushed);
                }
            }
            Message::Lost(stream) => {
                if let Role::Follower(following) = &mut self.role {
                    following.lost(stream);
                }
            }
            Message::StartKept => {
                let kept_start = self.shared.kept_start.load(Ordering::Acquire);
                if let Role::Follower(following) = &mut self.role {
                    following.start_kept(kept_start);
                }
            }
            Message::Lags(tell) => {
                let log_start = self.shared.watermarks.borrow().offsets.log_start;
                // Whoever asked may have gone.
                drop(tell.send(self.lags.now(log_start, now_ms())));
            }
            Message::Fence(reason) => {
                if self.ended().is_none() {
                    self.damaged(&reason);
                }
            }
            Message::Close(tell) => {
                match &mut self.role {
                    Role::Leader(state) => state.drain(PartitionError::ShuttingDown),
                    Role::Follower(following) => following.end(Some(PartitionError::ShuttingDown)),
                }
                self.follows = None;
                match &mut self.ending {
                    Some(Ending::Close(waiting)) => waiting.push(tell),
                    Some(Ending::Delete(_)) => drop(tell.send(Err(PartitionError::Deleted))),
                    None => self.ending = Some(Ending::Close(vec![tell])),
                }
            }
            Message::Delete(tell) => {
                self.end(&PartitionError::Deleted);
                self.publish_end(PartitionError::Deleted);
                match &mut self.ending {
                    Some(Ending::Delete(waiting)) => waiting.push(tell),
                    _ => self.ending = Some(Ending::Delete(vec![tell])),
                }
            }
        }
    }

    /// New settings, or another role.
    fn configure(&mut self) {
        let (config, assigned, now) = (self.shared.config.load_full(), self.shared.role.load_full(), now_ms());
        let view = &assigned.view;
        let is_mine = view.leader == Some(self.shared.me);
        match &mut self.role {
            Role::Leader(state) => {
                state.configure(&config, now);
                if is_mine && view.leader_epoch > state.leader().tenure().leader_epoch {
                    // The followers of the epoch that ends say hello again.
                    self.streams.clear();
                    state.lead(View::clone(view), now);
                    self.taken = Some(Arc::clone(&assigned));
                } else {
                    state.replicas(|leader| leader.view(view, now));
                }
            }
            Role::Follower(following) => following.configure(&config),
        }
        if !self.is_in_role(&assigned) && self.ended().is_none() {
            self.leave_role();
        }
        // A broker that comes or goes concerns every partition, and hardly ever their settings: no thread is troubled for nothing.
        let is_news = !Arc::ptr_eq(&self.configured, &config) && self.configured != config;
        self.configured = config;
        // The newest count when their turn has come: one turn is enough, however often they change until then.
        if is_news && self.ended().is_none() && !self.shared.configuring.swap(true, Ordering::AcqRel) {
            let (shared, expiration_ms) = (Arc::clone(&self.shared), self.context.producer_id_expiration_ms);
            self.work(Box::new(move |write_half| {
                shared.configuring.store(false, Ordering::Release);
                if let Ok(write_half) = write_half {
                    write_half.set_config(log_config(&shared.config.load(), expiration_ms));
                }
            }));
        }
    }

    /// Whether the role is the one that this asks for.
    fn is_in_role(&self, assigned: &AssignedRole) -> bool {
        let is_kept = |role: &AssignedRole| role.view.replicas.iter().any(|it| it.member == self.shared.me);
        self.taken.as_ref().is_some_and(|taken| {
            let (taken_view, view) = (&taken.view, &assigned.view);
            let is_same = (taken_view.leader, taken_view.leader_epoch) == (view.leader, view.leader_epoch);
            is_same && is_kept(taken) == is_kept(assigned)
        })
    }

    /// The role is over: whatever waits for what only a leader can confirm is refused, and readers go elsewhere.
    fn leave_role(&mut self) {
        self.streams.clear();
        self.lags = Lags::default();
        self.follows = None;
        self.shared.watermarks.send_if_modified(|watermarks| std::mem::replace(&mut watermarks.leads, false));
        match &mut self.role {
            Role::Leader(state) => {
                let epoch = state.leader().tenure().leader_epoch;
                // It has ended itself, if the metadata say what it went by.
                state.end(PartitionError::NotLeader(epoch));
            }
            Role::Follower(following) => following.end(None),
        }
    }

    /// Takes the role that the metadata give, once the write half is here.
    fn take_role(&mut self) {
        if self.log.is_none() || self.ending.is_some() || self.fenced.is_some() {
            return;
        }
        let assigned = self.shared.role.load_full();
        if self.is_in_role(&assigned) {
            return;
        }
        self.leave_role();
        self.perform();
        let Some(log) = &mut self.log else { return };
        let (me, view, config) = (self.shared.me, &assigned.view, self.shared.config.load_full());
        let (limits, now) = (self.context.limits(), now_ms());
        let known = self.shared.watermarks.borrow().offsets.high_watermark;
        let (log_start, log_end) = (log.log_start_offset(), log.log_end_offset());
        let high_watermark = known.clamp(log_start, log_end);
        let offsets = super::Offsets { log_start, high_watermark, log_end, flushed: log.flushed_offset() };
        let work = match &mut self.role {
            Role::Leader(state) => state.take_work(),
            Role::Follower(following) => {
                if let Some((unclean_taken, generation)) = following.history() {
                    self.shared.unclean_taken.store(unclean_taken, Ordering::Release);
                    self.generation = generation;
                }
                self.last_stream = following.stream();
                following.take_work()
            }
        };
        let is_kept = view.replicas.iter().any(|replica| replica.member == me);
        if view.leader.is_none() {
            // Whoever leads next goes by nothing that was said before.
            self.context.disk.is_known((self.shared.topic_id, self.shared.partition));
        }
        if view.leader == Some(me) {
            if view.replicas.len() > 1 {
                log.assign_leader_epoch(view.leader_epoch);
            }
            self.shared.unclean_taken.store(assigned.unclean_recoveries, Ordering::Release);
            let mut state = PartitionState::new(me, view, self.context.lease.holds(), &config, limits, offsets, now);
            // Shows where it stands, and proposes what is called for.
            state.replicas(|_| ());
            work.into_iter().for_each(|work| state.work(work));
            self.role = Role::Leader(Box::new(state));
        } else {
            let leader = view.leader.filter(|_| is_kept);
            let replica = leader.map(|_| {
                let replica = Replica {
                    member: me,
                    history: History::of_log(log.leader_epochs(), log_start, log_end),
                    flushed: offsets.flushed,
                    high_watermark,
                    generation: self.generation,
                    unclean_taken: self.shared.unclean_taken.load(Ordering::Acquire),
                };
                (view.leader_epoch, replica, assigned.unclean_recoveries)
            });
            // Streams are numbered on through the roles: what belongs to an earlier one is told by it.
            let mut following = Following::new(replica, self.last_stream, &config, limits, offsets);
            following.start_kept(self.shared.kept_start.load(Ordering::Acquire));
            work.into_iter().for_each(|work| following.work(work));
            self.role = Role::Follower(Box::new(following));
            self.follows = leader.zip(self.context.replication.get()).map(|(leader, replication)| {
                let (topic_id, partition) = (self.shared.topic_id, self.shared.partition);
                FollowStream::start(replication.clone(), leader.broker, (topic_id, partition), self.inbox.clone())
            });
        }
        if view.replicas.len() > 1 {
            let (topic, partition, epoch) = (&self.shared.topic, self.shared.partition, view.leader_epoch);
            let leader = view.leader.map_or(-1, |leader| leader.broker);
            tracing::debug!(%topic, partition, epoch, leader, log_end, high_watermark, "replica takes its role");
        }
        if view.leader == Some(me) {
            self.shared.watermarks.send_modify(|watermarks| {
                (watermarks.leads, watermarks.epoch_start) = (true, log_end);
            });
        }
        self.taken = Some(assigned);
    }

    /// A follower opens its stream: the one that it had is over.
    fn hello(&mut self, hello: &Hello, from: Option<i64>) -> Result<Admitted, HelloRefusal> {
        let not_leader = HelloRefusal::NotLeader(hello.tenure.leader_epoch);
        let (Role::Leader(state), Some(reader)) = (&mut self.role, &self.shared.reader) else {
            return Err(not_leader);
        };
        let (held, epochs) = reader.extent();
        let log = History::of_log(&epochs, from.map_or(held.start, |from| from.min(held.start)), held.end);
        let now = now_ms();
        let verdict = state.replicas(|leader| leader.hello(hello, &log, now))?;
        let over = CancellationToken::new();
        self.streams.insert(hello.member.broker, over.clone().drop_guard());
        Ok(Admitted { verdict, over })
    }

    fn leader_epoch(&self) -> i32 {
        self.shared.role.load().view.leader_epoch
    }

    fn work(&mut self, work: Work) {
        match &mut self.role {
            Role::Leader(state) => state.work(work),
            Role::Follower(following) => following.work(work),
        }
    }

    fn take_work(&mut self) -> impl Iterator<Item = Work> + use<> {
        match &mut self.role {
            Role::Leader(state) => state.take_work().into_iter(),
            Role::Follower(following) => following.take_work().into_iter(),
        }
    }

    fn is_busy(&self) -> bool {
        match &self.role {
            Role::Leader(state) => state.is_busy(),
            Role::Follower(following) => following.is_busy(),
        }
    }

    fn is_idle(&self) -> bool {
        match &self.role {
            Role::Leader(state) => state.is_idle(),
            Role::Follower(following) => following.is_idle(),
        }
    }

    /// Nothing more is taken, and what waits is refused.
    fn end(&mut self, why: &PartitionError) {
        self.streams.clear();
        self.follows = None;
        match &mut self.role {
            Role::Leader(state) => state.end(why.clone()),
            Role::Follower(following) => following.end(Some(why.clone())),
        }
    }

    fn report(&mut self, report: Report) {
        let now = now_ms();
        let (log, failed) = match (report, &mut self.role) {
            (Report::Written(written), Role::Leader(state)) => {
                return state.written(written.requests, written.log_end, written.bytes, now);
            }
            (Report::Done { log, written, refused, flushed, failed }, Role::Leader(state)) => {
                if let Some(written) = written {
                    state.written(written.requests, written.log_end, written.bytes, now);
                }
                if let Some(why) = refused {
                    state.refused(&why);
                }
                match flushed {
                    Flushed::Not => {}
                    Flushed::To(offset) => state.flushed(offset, now),
                    Flushed::Postponed(why) => {
                        if state.flush_postponed(now) {
                            let (topic, partition) = (&self.shared.topic, self.shared.partition);
                            tracing::warn!(%topic, partition, why, "a flush waits, and its acknowledgements with it");
                        }
                    }
                }
                state.returned(log.log_start_offset(), now);
                (log, failed)
            }
            (Report::Followed { log, came, flushed, failed }, Role::Follower(following)) => {
                let (topic, partition) = (&self.shared.topic, self.shared.partition);
                match came {
                    Followed::Done => {}
                    Followed::Appended { log_end, bytes } => {
                        self.told_unsound = false;
                        following.appended(log_end, bytes, now);
                    }
                    Followed::Cut => {
                        let (start, end) = (log.log_start_offset(), log.log_end_offset());
                        following.was_cut(History::of_log(log.leader_epochs(), start, end));
                        tracing::warn!(%topic, partition, end, "the log was cut to follow its leader");
                    }
                    Followed::Unsound { at, why } => {
                        // The same comes again and again, until it is sound or somebody else leads.
                        if !std::mem::replace(&mut self.told_unsound, true) {
                            tracing::error!(%topic, partition, why, "what the leader pushed is not taken; it is asked for again");
                        }
                        following.refused(at);
                    }
                    Followed::Postponed(why) => {
                        tracing::warn!(%topic, partition, why, "the replica waits for room");
                        following.postponed(now);
                    }
                }
                match flushed {
                    Flushed::Not => {}
                    Flushed::To(offset) => following.flushed(offset),
                    Flushed::Postponed(why) => {
                        tracing::warn!(%topic, partition, why, "a flush of the replica waits");
                        following.postponed(now);
                    }
                }
                following.returned(log.log_start_offset());
                (log, failed)
            }
            (Report::Lost, role) => {
                let log_start = self.shared.watermarks.borrow().offsets.log_start;
                match role {
                    Role::Leader(state) => state.returned(log_start, now),
                    Role::Follower(following) => following.returned(log_start),
                }
                return self.fence("a job on its log panicked");
            }
            // A role changes only while the write half is here.
            (Report::Written(_), Role::Follower(_)) => return,
            (Report::Done { log, failed, .. }, Role::Follower(_))
            | (Report::Followed { log, failed, .. }, Role::Leader(_)) => (log, failed),
        };
        match failed {
            Some(reason) => {
                self.let_go(log);
                self.damaged(&reason);
            }
            // A reader may have found it damaged meanwhile.
            None if self.fenced.is_some() => self.let_go(log),
            None => self.log = Some(log),
        }
    }

    /// The write half is let go on the pool: its maps and files may block.
    fn let_go(&self, log: Box<Log>) {
        self.context.pool.spawn(move || drop(log));
    }

    /// Its log failed, or bytes of it are damaged.
    fn damaged(&mut self, reason: &str) {
        self.shared.damaged.store(true, Ordering::Release);
        self.fence(reason);
    }

    /// Nothing of this partition is served from here on; every other partition goes on.
    fn fence(&mut self, reason: &str) {
        let (topic, partition) = (&self.shared.topic, self.shared.partition);
        let others_keep_it = self.shared.role.load().view.replicas.len() > 1;
        match others_keep_it && self.shared.damaged.load(Ordering::Acquire) {
            true => tracing::error!(
                %topic, partition, reason,
                "partition is fenced; it is fetched anew once another broker leads, and else recovered at this broker's next start"
            ),
            false => tracing::error!(
                %topic, partition, reason,
                "partition is fenced; it is served again once the broker has recovered it at its next start"
            ),
        }
        if let Some(log) = self.log.take() {
            self.let_go(log);
        }
        let why = fenced(reason);
        self.end(&why);
        self.publish_end(why);
        self.fenced.get_or_insert_with(|| Counted::new(&self.context.metrics.partitions_fenced));
        let key = (self.shared.topic_id, self.shared.partition);
        self.unfit.get_or_insert_with(|| self.context.disk.fenced(key));
    }

    fn ended(&self) -> Option<PartitionError> {
        self.shared.watermarks.borrow().ended.clone()
    }

    fn publish_end(&self, why: PartitionError) {
        self.shared.watermarks.send_modify(|watermarks| watermarks.ended = Some(why));
        self.shared.admission.close();
        self.shared.work_admission.close();
    }

    fn perform(&mut self) {
        let mut publish = None;
        match &mut self.role {
            Role::Leader(state) => {
                let effects = state.take_effects();
                let is_over = state.leader().is_ended();
                if state.leader().has_followers() {
                    self.lags.observe(state.leader().log_end(), state.leader().positions(), now_ms());
                }
                for effect in effects {
                    match effect {
                        Effect::Publish(offsets) => publish = Some(offsets),
                        Effect::Propose(alter) => self.propose(alter),
                        // Whoever asked may have gone.
                        Effect::Answer(reply, result) => drop(reply.tell.send(result)),
                    }
                }
                if is_over {
                    self.streams.clear();
                }
            }
            Role::Follower(following) => {
                if let Some(log) = self.log.as_deref() {
                    let (start, end) = (log.log_start_offset(), log.log_end_offset());
                    following.reopen(|| History::of_log(log.leader_epochs(), start, end));
                }
                if let Some((unclean_taken, _)) = following.history() {
                    self.shared.unclean_taken.store(unclean_taken, Ordering::Release);
                }
                for effect in following.take_effects() {
                    match effect {
                        following::Effect::Publish(offsets) => publish = Some(offsets),
                        following::Effect::Fence(why) => return self.fence(&why),
                        effect => {
                            let Some(follows) = &self.follows else { continue };
                            match effect {
                                following::Effect::Open(stream, hello) => follows.open(stream, hello),
                                following::Effect::Report(report) => follows.report(report),
                                following::Effect::Released(bytes) => follows.released(bytes),
                                following::Effect::Close(stream, at) => follows.close(stream, at),
                                following::Effect::Publish(_) | following::Effect::Fence(_) => {}
                            }
                        }
                    }
                }
            }
        }
        let kept_start = match &self.role {
            Role::Leader(state) => state.leader().kept_start(),
            Role::Follower(_) => i64::MIN,
        };
        if self.shared.watermarks.borrow().kept_start != kept_start {
            self.shared.watermarks.send_modify(|watermarks| watermarks.kept_start = kept_start);
        }
        let is_apart = match &self.role {
            Role::Leader(_) => false,
            Role::Follower(following) => !following.is_led(),
        };
        if self.shared.watermarks.borrow().apart_since.is_some() != is_apart {
            let since = is_apart.then(Instant::now);
            self.shared.watermarks.send_modify(|watermarks| watermarks.apart_since = since);
        }
        if let Some(offsets) = publish {
            let mut is_trimmed = false;
            self.shared.watermarks.send_if_modified(|watermarks| {
                let changed = watermarks.offsets != offsets;
                is_trimmed = offsets.log_start > watermarks.offsets.log_start;
                watermarks.offsets = offsets;
                changed
            });
            // Who asked a leader to delete waits for its own checkpoint, and for those of its followers.
            if is_trimmed && matches!(self.role, Role::Follower(_)) {
                self.context.trimmed.notify_one();
            }
            // Whatever is written down from here on is what the log holds.
            if self.log.is_some() {
                self.shared.cutting.store(false, Ordering::Release);
            }
        }
    }

    /// Proposes another ISR to the metadata; what is committed comes back as this partition's new view.
    fn propose(&self, alter: AlterPartition) {
        // A broker that never came so far has no partition with other replicas.
        let Some(replication) = self.context.replication.get().cloned() else { return };
        let (topic_id, partition, inbox) = (self.shared.topic_id, self.shared.partition, self.inbox.clone());
        let partition_epoch = alter.partition_epoch;
        replication.propose(topic_id, partition, alter, move |altered| {
            inbox.send(Message::Altered(partition_epoch, altered));
        });
    }

    fn begin_job(&mut self) {
        let Some(log) = self.log.take() else {
            // Without a write half no work is ever done: fenced, or the job under way brings it back.
            if let Some(why) = self.ended().filter(|_| !self.is_busy()) {
                self.take_work().for_each(|work| work(Err(why.clone())));
            }
            return;
        };
        let (reports, metrics) = (self.reports.clone(), Arc::clone(&self.context.metrics));
        let key = (self.shared.topic_id, self.shared.partition);
        let run: Box<dyn FnOnce() -> Report + Send> = match &mut self.role {
            Role::Leader(state) => match state.next_job(now_ms()) {
                Some(job) => {
                    let (reports, disk) = (reports.clone(), Arc::clone(&self.context.disk));
                    Box::new(move || {
                        let _busy = disk.begin(key, job.is_long());
                        run(job, log, &reports, &metrics)
                    })
                }
                None => return self.log = Some(log),
            },
            Role::Follower(following) => match following.next_job(now_ms()) {
                Some(job) => {
                    let (shared, root) = (Arc::clone(&self.shared), self.context.root.clone());
                    let disk = Arc::clone(&self.context.disk);
                    Box::new(move || {
                        let _busy = disk.begin(key, job.is_long());
                        let mut log = log;
                        let (mut flushed, mut failed) = (Flushed::Not, None);
                        let cut = |log: &mut Log, cut| cut_back(log, cut, &shared, &root);
                        let came = follow(job, &mut log, cut, &metrics, &mut flushed, &mut failed);
                        Report::Followed { log, came, flushed, failed }
                    })
                }
                None => return self.log = Some(log),
            },
        };
        self.context.pool.spawn(move || {
            let done = catch_unwind(AssertUnwindSafe(run));
            // The task may have ended with its runtime.
            drop(reports.send(Box::new(done.unwrap_or(Report::Lost))));
        });
    }

    /// Closes the log once everything is answered, or lets it go. True: the task is over.
    async fn finish_if_idle(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        if self.is_busy() || (matches!(ending, Ending::Close(_)) && self.log.is_some() && !self.is_idle()) {
            return false;
        }
        let log = self.log.take();
        match self.ending.take() {
            Some(Ending::Close(waiting)) => {
                let result = match log {
                    Some(log) => {
                        self.context.pool.run(move || log.close()).await.map_err(|error| super::log_error(&error))
                    }
                    None => Err(self.ended().unwrap_or(PartitionError::ShuttingDown)),
                };
                if result.is_ok() {
                    // What was written is flushed now.
                    match &mut self.role {
                        Role::Leader(state) => state.flushed(state.offsets().log_end, now_ms()),
                        Role::Follower(following) => {
                            following.flushed(following.offsets().log_end);
                            following.returned(following.offsets().log_start);
                        }
                    }
                }
                self.perform();
                if self.ended().is_none() {
                    self.publish_end(PartitionError::ShuttingDown);
                }
                for tell in waiting {
                    drop(tell.send(result.clone()));
                }
            }
            Some(Ending::Delete(waiting)) => {
                self.perform();
                // A topic may have thousands: no commit waits behind them.
                self.context.pool.run_long(move || drop(log)).await;
                for tell in waiting {
                    // Whoever asked may have gone.
                    let _ = tell.send(());
                }
            }
            None => {}
        }
        for work in self.take_work() {
            work(Err(PartitionError::ShuttingDown));
        }
        true
    }
}
