//! Finding where partitions begin.
//!
//! Owns: [`Search`]: a group's commits, offsets by place or time, trying again. Each partition begins, or fails, by itself:
//! one that cannot be served keeps no other waiting. Refuses: reading (see [`super::fetch`]). Read next:
//! [`super::readers`], which begins what was found.

use std::collections::HashMap;
use std::sync::Arc;

use headwater_proto::{ErrorCode, wire};

use super::commit::Committer;
use super::fetch::{Context, is_gone};
use super::group::partitions_to_wire;
use super::readers::Readers;
use super::record::{Position, StartFrom};
use super::state::{Item, Life};
use crate::admin::{OffsetAnswer, OffsetAt};
use crate::error::{ConsumeError, Refusal};
use crate::leaders::Leaders;
use crate::retry::Backoff;
use crate::{OffsetQuery, TopicPartition};

/// A partition whose beginning is not known yet.
pub(crate) struct Sought {
    pub(crate) life: Life,
    /// Where it begins, unless the group says.
    pub(crate) from: StartFrom,
    /// The group's commit comes first.
    pub(crate) ask_group: bool,
}

/// Partitions whose beginnings are being found out.
pub(crate) struct Search {
    readers: Arc<Readers>,
    committer: Option<Committer>,
    open: Vec<Sought>,
}

impl Search {
    pub(crate) fn new(readers: Arc<Readers>, committer: Option<Committer>, open: Vec<Sought>) -> Search {
        Search { readers, committer, open }
    }

    /// Whether nothing is left to be found out.
    pub(crate) fn is_done(&self) -> bool {
        self.open.is_empty()
    }

    /// Asks until each partition has begun, failed for good, or been given away. After the first answers the assignment
    /// counts as known: then only those have no position that are not served at the moment.
    pub(crate) async fn run(mut self) {
        let stop = self.readers.context.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.ask_until_done() => {}
        }
    }

    async fn ask_until_done(&mut self) {
        let mut backoff = Backoff::new(&self.readers.context.connections.config);
        while !self.is_done() {
            match self.ask().await {
                Ok(()) => {}
                // Fenced meanwhile, or the topic deleted: the group will say so, and take the partitions away.
                Err(error) if error.retryable() || fenced(&error) || self.will_be_taken(&error) => {
                    tracing::debug!(%error, "no start yet");
                }
                Err(error) => {
                    for sought in std::mem::take(&mut self.open) {
                        self.fail(sought.life, error.clone());
                    }
                }
            }
            let state = &self.readers.context.state;
            state.assignment_known();
            self.open.retain(|sought| state.is_alive(&sought.life));
            if !self.is_done() {
                backoff.pause().await;
            }
        }
    }

    /// Asks once about everything that is open. What is found begins; what is wrong with a single partition is told to the
    /// application, unless it may pass: then it stays open.
    ///
    /// # Errors
    /// When nobody could be asked, or the group gives no answer.
    pub(crate) async fn ask(&mut self) -> Result<(), ConsumeError> {
        self.ask_group().await?;
        let (asked, waiting) = std::mem::take(&mut self.open).into_iter().partition(|sought| !sought.ask_group);
        self.open = waiting;
        let asked: Vec<Sought> = asked;
        let starts = asked.iter().map(|sought| (sought.life.cell.at.clone(), sought.from)).collect();
        let mut asked: Vec<Option<Sought>> = asked.into_iter().map(Some).collect();
        let mut waiting = Vec::new();
        let outcome = start_positions(&self.readers.context, starts, |index, found| {
            let Some(sought) = asked.get_mut(index).and_then(Option::take) else { return };
            match found {
                // As it is known: another one's leader may take its time.
                Ok(position) => self.readers.read(&sought.life, position),
                Err(error) if error.retryable() || self.will_be_taken(&error) => {
                    tracing::debug!(partition = %sought.life.cell.at, %error, "no start yet");
                    waiting.push(sought);
                }
                Err(error) => self.fail(sought.life, error),
            }
        });
        let outcome = outcome.await;
        self.open.extend(waiting.into_iter().chain(asked.into_iter().flatten()));
        outcome
    }

    /// Begins what the group has committed.
    async fn ask_group(&mut self) -> Result<(), ConsumeError> {
        let asked = self.open.iter().filter(|sought| sought.ask_group).map(|sought| &sought.life.cell);
        let asked = partitions_to_wire(asked.map(|cell| (&cell.at, cell.topic_id)));
        if asked.is_empty() {
            return Ok(());
        }
        let committed: HashMap<TopicPartition, Position> = match &self.committer {
            Some(committer) => committer.committed(asked).await?.into_iter().collect(),
            None => HashMap::new(),
        };
        let readers = &self.readers;
        self.open.retain_mut(|sought| match committed.get(&sought.life.cell.at) {
            Some(position) if sought.ask_group => {
                readers.read(&sought.life, *position);
                false
            }
            _ => {
                sought.ask_group = false;
                true
            }
        });
        Ok(())
    }

    /// Whether the group will take the partition away.
    fn will_be_taken(&self, error: &ConsumeError) -> bool {
        self.readers.context.subscribed && is_gone(error)
    }

    fn fail(&self, life: Life, error: ConsumeError) {
        self.readers.context.state.push(&life, Item::Error(error));
    }
}

fn fenced(error: &ConsumeError) -> bool {
    matches!(error.code(), Some(ErrorCode::UnknownMember | ErrorCode::FencedMemberEpoch))
}

/// Where a partition begins.
pub(crate) async fn start_position(
    context: &Context,
    at: &TopicPartition,
    from: StartFrom,
) -> Result<Position, ConsumeError> {
    let mut position = Err(ConsumeError::Usage("no partition"));
    start_positions(context, vec![(at.clone(), from)], |_, found| position = found).await?;
    position
}

/// Where partitions begin: `told` hears of each by its index, as their leaders answer.
///
/// # Errors
/// When nobody could be asked.
pub(crate) async fn start_positions(
    context: &Context,
    starts: Vec<(TopicPartition, StartFrom)>,
    mut told: impl FnMut(usize, Result<Position, ConsumeError>),
) -> Result<(), ConsumeError> {
    let mut asked = Vec::new();
    for (index, (at, from)) in starts.iter().enumerate() {
        let place = match from {
            StartFrom::Earliest => OffsetAt::Earliest,
            StartFrom::Latest => OffsetAt::Latest,
            StartFrom::Timestamp(ms) => OffsetAt::Timestamp(*ms),
            StartFrom::Offset(offset) => {
                told(index, Ok((*offset).into()));
                continue;
            }
            StartFrom::Position(position) => {
                told(index, Ok(*position));
                continue;
            }
        };
        asked.push((index, OffsetQuery { topic: at.topic.to_string(), partition: at.partition, at: place }));
    }
    let (indices, queries): (Vec<usize>, Vec<_>) =
        asked.into_iter().map(|(index, query)| (index, query.into())).unzip();
    let leaders = Leaders::new(context.connections.clone(), context.metadata.clone());
    let answered = |nth: usize, answer: Result<wire::OffsetAnswer, Refusal>| {
        let Some((index, (at, _))) = indices.get(nth).and_then(|index| Some((*index, starts.get(*index)?))) else {
            return;
        };
        let position = match answer.map(OffsetAnswer::from) {
            // No record is that young: what comes next is.
            Ok(answer) => Ok(answer.offset.unwrap_or(answer.high_watermark).into()),
            Err(refusal) => Err(no_offset(at, refusal)),
        };
        told(index, position);
    };
    Ok(leaders.list_offsets(&queries, answered).await?)
}

/// Why a partition's offset is not known.
pub(crate) fn no_offset(at: &TopicPartition, refusal: Refusal) -> ConsumeError {
    match refusal.code {
        ErrorCode::UnknownTopic => ConsumeError::UnknownTopic { topic: at.topic.clone() },
        _ => ConsumeError::Refused { topic: at.topic.clone(), partition: at.partition, refusal },
    }
}
