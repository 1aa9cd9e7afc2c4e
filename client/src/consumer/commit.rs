//! Committing offsets for a group.
//!
//! Owns: [`Committer`], who speaks for a group and under which epoch, automatic commits. Refuses: deciding who owns what
//! (see [`super::group`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call, call_response::Response};
use tokio_util::sync::CancellationToken;

use super::cell::Cell;
use super::record::Position;
use super::state::State;
use crate::TopicPartition;
use crate::connection::{Connections, lock};
use crate::error::{ConsumeError, Error};

/// Commits offsets in the name of one consumer. Cheap to clone, and usable while the consumer is being read.
#[derive(Clone)]
pub struct Committer {
    inner: Arc<Inner>,
}

struct Inner {
    connections: Arc<Connections>,
    group: Arc<str>,
    /// Empty id and epoch 0 for a consumer that is no member.
    member: Mutex<(String, i32)>,
    /// What the coordinator has, as far as this consumer knows.
    committed: Mutex<BTreeMap<TopicPartition, Position>>,
}

impl Committer {
    pub(crate) fn new(connections: Arc<Connections>, group: Arc<str>) -> Committer {
        let (member, committed) = (Mutex::default(), Mutex::default());
        Committer { inner: Arc::new(Inner { connections, group, member, committed }) }
    }

    pub(crate) fn group(&self) -> &Arc<str> {
        &self.inner.group
    }

    /// Speaks as this member from now on.
    pub(crate) fn set_member(&self, member_id: &str, epoch: i32) {
        *lock(&self.inner.member) = (member_id.to_owned(), epoch);
    }

    /// Commits offsets: for each partition the next one to be read.
    ///
    /// # Errors
    /// When the coordinator refuses, for instance because this member was fenced.
    pub async fn commit_offsets(
        &self,
        offsets: impl IntoIterator<Item = (TopicPartition, i64)>,
    ) -> Result<(), ConsumeError> {
        let positions = offsets.into_iter().map(|(at, offset)| (at, Position { offset, leader_epoch: -1 }));
        self.commit(positions.collect()).await
    }

    /// Commits the positions of `cells` that the coordinator does not have yet.
    pub(crate) async fn commit_cells(
        &self,
        cells: &[Arc<Cell>],
        position: impl Fn(&Cell) -> Position,
    ) -> Result<(), ConsumeError> {
        let moved = {
            let committed = lock(&self.inner.committed);
            let positions = cells.iter().map(|cell| (cell.at.clone(), position(cell)));
            positions.filter(|(at, new)| new.is_known() && committed.get(at) != Some(new)).collect()
        };
        self.commit(moved).await
    }

    async fn commit(&self, positions: Vec<(TopicPartition, Position)>) -> Result<(), ConsumeError> {
        if positions.is_empty() {
            return Ok(());
        }
        let offsets: Vec<wire::OffsetEntry> = positions
            .iter()
            .map(|(at, position)| wire::OffsetEntry {
                topic: at.topic.to_string(),
                partition: at.partition,
                offset: position.offset,
                leader_epoch: position.leader_epoch,
                ..wire::OffsetEntry::default()
            })
            .collect();
        // The epoch is read for each attempt: an update may have raised it since the last one.
        let request = || {
            let (member_id, member_epoch) = lock(&self.inner.member).clone();
            let group = self.inner.group.to_string();
            call::Request::CommitOffsets(wire::CommitOffsets {
                group,
                member_id,
                member_epoch,
                offsets: offsets.clone(),
            })
        };
        let answer = self.inner.connections.call_with("commit offsets", request).await;
        let results = match answer.map_err(|error| self.refused(error))? {
            Response::CommitOffsets(answer) if answer.results.len() == positions.len() => answer.results,
            _ => return Err(Error::Protocol("an answer that does not belong to commit offsets".into()).into()),
        };
        let mut outcome = Ok(());
        let mut committed = lock(&self.inner.committed);
        for ((at, position), result) in positions.into_iter().zip(results) {
            if result.code == 0 {
                committed.insert(at, position);
            } else if outcome.is_ok() {
                let TopicPartition { topic, partition } = at;
                outcome = Err(ConsumeError::CommitRefused { topic, partition, refusal: result.into() });
            }
        }
        outcome
    }

    /// What the group committed for partitions; those without a commit are missing.
    pub(crate) async fn committed(
        &self,
        partitions: Vec<wire::TopicPartitions>,
    ) -> Result<Vec<(TopicPartition, Position)>, ConsumeError> {
        let request = || {
            let (member_id, member_epoch) = lock(&self.inner.member).clone();
            let (group, partitions) = (self.inner.group.to_string(), partitions.clone());
            call::Request::FetchOffsets(wire::FetchOffsets { group, partitions, member_id, member_epoch })
        };
        let answer = self.inner.connections.call_with("fetch offsets", request).await;
        let offsets = match answer {
            Ok(Response::FetchOffsets(answer)) => answer.offsets,
            Ok(_) => return Err(Error::Protocol("no answer to fetch offsets".into()).into()),
            // A group that does not exist has committed nothing.
            Err(error) if error.code() == Some(ErrorCode::GroupNotFound) => Vec::new(),
            Err(error) => return Err(self.refused(error)),
        };
        let known: Vec<(TopicPartition, Position)> = offsets
            .into_iter()
            .map(|o| {
                let position = Position { offset: o.offset, leader_epoch: o.leader_epoch };
                (TopicPartition::new(o.topic, o.partition), position)
            })
            .collect();
        lock(&self.inner.committed).extend(known.iter().cloned());
        Ok(known)
    }

    fn refused(&self, error: Error) -> ConsumeError {
        match error {
            Error::Refused(refusal) => ConsumeError::Group { group: self.inner.group.clone(), refusal },
            error => ConsumeError::Client(error),
        }
    }
}

/// Commits what the application is done with, every `interval`, until cancelled.
pub(crate) async fn commit_regularly(
    committer: Committer,
    state: Arc<State>,
    interval: Duration,
    stop: CancellationToken,
) {
    let mut timer = tokio::time::interval(interval);
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
