//! Committing offsets for a group.
//!
//! Owns: [`Committer`], who speaks for a group and under which epoch, automatic commits. Refuses: deciding who owns what
//! (see [`super::group`]).
//!
//! What must always hold: commits of one consumer reach the coordinator one after another, in the order in which they were
//! asked for; each names the topic that the position was read from; nothing is committed for a partition that this
//! consumer's group took away, however often an attempt is repeated.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use headwater_proto::wire::{self, call, call_response::Response};
use headwater_proto::{ErrorCode, TopicId};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cell::Cell;
use super::record::Position;
use super::state::State;
use crate::TopicPartition;
use crate::connection::lock;
use crate::error::{ConsumeError, Error, Refusal};
use crate::metadata::{Metadata, unknown_topic};
use crate::retry::NEVER;

/// Commits offsets in the name of one consumer. Cheap to clone, and usable while the consumer is being read.
#[derive(Clone)]
pub struct Committer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Committer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (member_id, member_epoch) = lock(&self.inner.member).clone();
        f.debug_struct("Committer")
            .field("group", &self.inner.group)
            .field("member_id", &member_id)
            .field("member_epoch", &member_epoch)
            .finish_non_exhaustive()
    }
}

struct Inner {
    metadata: Arc<Metadata>,
    state: Arc<State>,
    group: Arc<str>,
    /// Partitions are this consumer's only while the group says so.
    subscribed: bool,
    /// Empty id and epoch 0 for a consumer that is no member.
    member: Mutex<(String, i32)>,
    /// The newest answer that the member of this epoch is none any more.
    out: watch::Sender<Option<(i32, Refusal)>>,
    /// What the coordinator has, as far as this consumer knows.
    committed: Mutex<HashMap<TopicPartition, (TopicId, Position)>>,
    /// Held by the commit that is under way.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// What is to be committed of a partition.
struct Entry {
    at: TopicPartition,
    /// `None`: the partition was not assigned when this was asked for.
    cell: Option<Arc<Cell>>,
    wanted: Wanted,
}

enum Wanted {
    Given(Position),
    /// What this says of the cell at the time of the attempt.
    Of(fn(&Cell) -> Position),
}

/// What an attempt sends of an entry.
struct Sent {
    at: TopicPartition,
    topic_id: TopicId,
    position: Position,
}

impl Committer {
    pub(crate) fn new(metadata: Arc<Metadata>, state: Arc<State>, group: Arc<str>, subscribed: bool) -> Committer {
        let (member, committed, turn) = (Mutex::default(), Mutex::default(), Arc::default());
        let out = watch::Sender::new(None);
        Committer { inner: Arc::new(Inner { metadata, state, group, subscribed, member, out, committed, turn }) }
    }

    pub(crate) fn group(&self) -> &Arc<str> {
        &self.inner.group
    }

    /// Speaks as this member from now on.
    pub(crate) fn set_member(&self, member_id: &str, epoch: i32) {
        let mut member = lock(&self.inner.member);
        if *member != (member_id.to_owned(), epoch) {
            *member = (member_id.to_owned(), epoch);
            // What was said of the one that it was says nothing of the one that it is, whose epoch may be the same.
            self.inner.out.send_replace(None);
        }
    }

    /// Hears of an answer that the member of an epoch is none any more: from whoever coordinates by then, which need not be the one that the
    /// member has its stream from.
    pub(crate) fn out(&self) -> watch::Receiver<Option<(i32, Refusal)>> {
        self.inner.out.subscribe()
    }

    /// Commits positions: for each partition the next offset to be read, and the leader epoch of the record before it
    /// where it is known ([`crate::ConsumedRecord::next_position`]). With the epoch a consumer that resumes there is told
    /// if the log lost what was read; a plain offset leaves it out.
    ///
    /// A commit is for the topic that this consumer was assigned the partition of; where it never was, for the one that bears
    /// the name now. Where a topic was deleted and made anew, positions in the earlier one are refused and not taken for
    /// positions in the later one ([`ErrorCode::UnknownTopicId`]).
    ///
    /// Commits of one consumer are made one after another. One that nobody waits for any more is carried through all the
    /// same once its turn has come.
    ///
    /// # Errors
    /// When the coordinator refuses, for instance because this member was fenced, or a partition is not (any more) among
    /// those that the group gave to this consumer; the other ones are committed all the same.
    pub async fn commit_offsets<P: Into<Position>>(
        &self,
        positions: impl IntoIterator<Item = (TopicPartition, P)>,
    ) -> Result<(), ConsumeError> {
        let entries = positions.into_iter().map(|(at, position)| {
            let cell = self.inner.state.cell(&at);
            Entry { at, cell, wanted: Wanted::Given(position.into()) }
        });
        self.commit(entries.collect()).await
    }

    /// Commits the positions of `cells` that the coordinator does not have yet, as they are when they are sent.
    pub(crate) async fn commit_cells(
        &self,
        cells: &[Arc<Cell>],
        position: fn(&Cell) -> Position,
    ) -> Result<(), ConsumeError> {
        let entries = cells.iter().map(|cell| Entry {
            at: cell.at.clone(),
            cell: Some(cell.clone()),
            wanted: Wanted::Of(position),
        });
        self.commit(entries.collect()).await
    }

    /// Waits until what is being committed has its outcome.
    pub(crate) async fn idle(&self) {
        drop(self.inner.turn.lock().await);
    }

    async fn commit(&self, entries: Vec<Entry>) -> Result<(), ConsumeError> {
        if entries.is_empty() {
            return Ok(());
        }
        let asked = Instant::now();
        let turn = self.inner.turn.clone().lock_owned().await;
        let inner = self.inner.clone();
        // Whoever waits may stop waiting; but what was sent may still arrive, so the next one must wait for it.
        let work = tokio::spawn(async move {
            let outcome = inner.exchange(entries, asked).await;
            drop(turn);
            outcome
        });
        work.await.unwrap_or(Err(ConsumeError::Closed))
    }

    /// What the group committed for partitions; those without a commit are missing.
    pub(crate) async fn committed(
        &self,
        partitions: Vec<wire::TopicPartitions>,
    ) -> Result<Vec<(TopicPartition, Position)>, ConsumeError> {
        let spoke_in = AtomicI32::new(0);
        let request = || {
            let (member_id, member_epoch) = lock(&self.inner.member).clone();
            spoke_in.store(member_epoch, Ordering::Relaxed);
            let (group, partitions) = (self.inner.group.to_string(), partitions.clone());
            Some(call::Request::FetchOffsets(wire::FetchOffsets { group, partitions, member_id, member_epoch }))
        };
        let answer = self.inner.metadata.coordinators().call_with(&self.inner.group, "fetch offsets", request).await;
        let offsets = match answer {
            Ok(Some(Response::FetchOffsets(answer))) => answer.offsets,
            Ok(_) => return Err(Error::Protocol("no answer to fetch offsets".into()).into()),
            // A group that does not exist has committed nothing.
            Err(error) if error.code() == Some(ErrorCode::GroupNotFound) => Vec::new(),
            Err(error) => return Err(self.inner.refused(error, spoke_in.into_inner())),
        };
        let asked: BTreeMap<&str, &[u8]> = partitions.iter().map(|t| (&*t.topic, &*t.topic_id)).collect();
        // The commit of another topic that bears the name now says nothing about this one.
        let same = |o: &wire::CommittedOffset| {
            o.topic_id.is_empty() || asked.get(&*o.topic).is_none_or(|id| **id == *o.topic_id)
        };
        let known: Vec<(TopicPartition, Position)> = offsets
            .iter()
            .filter(|o| same(o))
            .map(|o| {
                let position = Position { offset: o.offset, leader_epoch: o.leader_epoch };
                (TopicPartition::new(&*o.topic, o.partition), position)
            })
            .collect();
        let mut committed = lock(&self.inner.committed);
        for (at, position) in &known {
            if let Some(id) = asked.get(&*at.topic).and_then(|id| TopicId::from_slice(id)) {
                committed.insert(at.clone(), (id, *position));
            }
        }
        drop(committed);
        Ok(known)
    }
}

impl Inner {
    /// One commit, from the first attempt to the outcome.
    async fn exchange(&self, entries: Vec<Entry>, asked: Instant) -> Result<(), ConsumeError> {
        let mut outcome = Ok(());
        let mut resolved = Vec::with_capacity(entries.len());
        for entry in entries {
            match self.topic_id(&entry, asked).await {
                Ok(topic_id) => resolved.push((entry, topic_id)),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        let (sent, spoke_in) = (Mutex::new(Vec::new()), AtomicI32::new(0));
        // Made anew for each attempt: an update may have raised the epoch since the last one, the application may have
        // got further, and what was let go of is somebody else's now.
        let request = || {
            let entries = self.due(&resolved);
            let offsets: Vec<wire::OffsetEntry> = entries.iter().map(Sent::to_wire).collect();
            let (member_id, member_epoch) = lock(&self.member).clone();
            spoke_in.store(member_epoch, Ordering::Relaxed);
            let group = self.group.to_string();
            *lock(&sent) = entries;
            (!offsets.is_empty()).then_some(call::Request::CommitOffsets(wire::CommitOffsets {
                group,
                member_id,
                member_epoch,
                offsets,
            }))
        };
        let answer = self.metadata.coordinators().call_with(&self.group, "commit offsets", request).await;
        let sent = std::mem::take(&mut *lock(&sent));
        let results = match answer.map_err(|error| self.refused(error, spoke_in.into_inner()))? {
            None => Vec::new(),
            Some(Response::CommitOffsets(answer)) if answer.results.len() == sent.len() => answer.results,
            Some(_) => return Err(Error::Protocol("an answer that does not belong to commit offsets".into()).into()),
        };
        let mut committed = lock(&self.committed);
        for (Sent { at, topic_id, position }, result) in sent.into_iter().zip(results) {
            if result.code == 0 {
                committed.insert(at, (topic_id, position));
            } else {
                let TopicPartition { topic, partition } = at;
                outcome = outcome.and(Err(ConsumeError::CommitRefused { topic, partition, refusal: result.into() }));
            }
        }
        drop(committed);
        let given_up = |(entry, _): &&(Entry, TopicId)| matches!(entry.wanted, Wanted::Given(_)) && self.is_gone(entry);
        match resolved.iter().find(given_up) {
            Some((entry, _)) => outcome.and(Err(not_assigned(&entry.at))),
            None => outcome,
        }
    }

    /// The topic that an entry's position belongs to.
    async fn topic_id(&self, entry: &Entry, asked: Instant) -> Result<TopicId, ConsumeError> {
        if let Some(cell) = &entry.cell {
            return Ok(cell.topic_id);
        }
        // Of a consumer that was closed the coordinator says itself that it is no member any more.
        if self.subscribed && !self.state.is_closed() {
            return Err(not_assigned(&entry.at));
        }
        if let Some(read) = self.state.topic_id(&entry.at) {
            return Ok(read);
        }
        // Only the application knows what it read: a topic by this name, which may be another one than is remembered.
        let info = self.metadata.newer_than(&entry.at.topic, Some(asked)).await;
        Ok(info.map_err(|error| unknown_topic(error, &entry.at.topic))?.id)
    }

    /// Whether the group took the partition away since the commit was asked for.
    fn is_gone(&self, entry: &Entry) -> bool {
        self.subscribed && entry.cell.as_ref().is_some_and(|cell| cell.is_let_go())
    }

    /// What is to be sent now. Until it is known what became of it, the coordinator may have either.
    fn due(&self, entries: &[(Entry, TopicId)]) -> Vec<Sent> {
        let mut committed = lock(&self.committed);
        let due = entries.iter().filter(|(entry, _)| !self.is_gone(entry)).filter_map(|(entry, topic_id)| {
            let position = match (&entry.wanted, &entry.cell) {
                (Wanted::Given(position), _) => *position,
                (Wanted::Of(position), Some(cell)) => {
                    let position = position(cell);
                    let known = committed.get(&entry.at) == Some(&(*topic_id, position));
                    Some(position).filter(|position| position.is_known() && !known)?
                }
                (Wanted::Of(_), None) => return None,
            };
            committed.remove(&entry.at);
            Some(Sent { at: entry.at.clone(), topic_id: *topic_id, position })
        });
        due.collect()
    }

    /// What the coordinator refused to whoever spoke in this epoch.
    fn refused(&self, error: Error, epoch: i32) -> ConsumeError {
        match error {
            Error::Refused(refusal) => {
                let member = lock(&self.member);
                let is_out = matches!(refusal.code, ErrorCode::UnknownMember | ErrorCode::FencedMemberEpoch);
                if is_out && epoch > 0 && member.1 == epoch {
                    self.out.send_replace(Some((epoch, refusal.clone())));
                }
                drop(member);
                ConsumeError::Group { group: self.group.clone(), refusal }
            }
            error => ConsumeError::Client(error),
        }
    }
}

impl Sent {
    fn to_wire(&self) -> wire::OffsetEntry {
        wire::OffsetEntry {
            topic: self.at.topic.to_string(),
            topic_id: self.topic_id.to_wire(),
            partition: self.at.partition,
            offset: self.position.offset,
            leader_epoch: self.position.leader_epoch,
            ..wire::OffsetEntry::default()
        }
    }
}

fn not_assigned(at: &TopicPartition) -> ConsumeError {
    ConsumeError::NotAssigned { topic: at.topic.clone(), partition: at.partition }
}

/// Commits what the application is done with, every `interval`, until cancelled.
pub(crate) async fn commit_regularly(
    committer: Committer,
    state: Arc<State>,
    interval: Duration,
    stop: CancellationToken,
) {
    let mut timer = tokio::time::interval(interval.min(NEVER));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    timer.tick().await;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = timer.tick() => {}
        }
        let cells = state.cells();
        let commit = committer.commit_cells(&cells, Cell::processed);
        tokio::select! {
            () = stop.cancelled() => return,
            result = commit => if let Err(error) = result {
                tracing::warn!(group = &*committer.inner.group, %error, "automatic commit fails");
            }
        }
    }
}
