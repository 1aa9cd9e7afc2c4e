//! Beginning to read partitions.
//!
//! Owns: where a partition begins, its share of the prefetch, its fetch task. Refuses: reading (see [`super::fetch`]).

use std::collections::HashMap;
use std::sync::Arc;

use headwater_proto::TopicId;
use tokio_util::task::AbortOnDropHandle;

use super::commit::Committer;
use super::fetch::{Context, Fetch, start_positions};
use super::group::partitions_to_wire;
use super::record::{Position, StartFrom};
use crate::TopicPartition;
use crate::error::ConsumeError;

/// Smallest and largest share of the prefetch that one partition gets, in bytes.
const SHARE_BYTES: (u64, u64) = (16 << 10, 4 << 20);

/// A partition and where it begins.
pub(crate) type Start = (TopicPartition, TopicId, Position);

/// Begins partitions, in a group or without.
pub(crate) struct Readers {
    pub(crate) context: Arc<Context>,
    /// For all partitions together.
    pub(crate) prefetch_bytes: u64,
}

impl Readers {
    /// Where `partitions` begin: at the group's commit if there is one, else where `otherwise` says.
    pub(crate) async fn starts(
        &self,
        committer: Option<&Committer>,
        partitions: Vec<(TopicPartition, TopicId)>,
        otherwise: impl Fn(&TopicPartition) -> StartFrom,
    ) -> Result<Vec<Start>, ConsumeError> {
        let mut known: HashMap<TopicPartition, Position> = match committer {
            Some(committer) => {
                let asked = partitions_to_wire(partitions.iter().map(|(at, id)| (at, *id)));
                committer.committed(asked).await?.into_iter().collect()
            }
            None => HashMap::new(),
        };
        let unknown = partitions.iter().map(|(at, _)| at).filter(|at| !known.contains_key(*at));
        let unknown = unknown.map(|at| (at.clone(), otherwise(at))).collect();
        known.extend(start_positions(&self.context.connections, unknown).await?);
        let starts = partitions.into_iter().filter_map(|(at, id)| {
            let position = known.get(&at).copied()?;
            Some((at, id, position))
        });
        Ok(starts.collect())
    }

    /// Begins to read.
    pub(crate) fn begin(&self, starts: Vec<Start>) {
        let state = &self.context.state;
        let partitions = state.assignment().len().max(starts.len()) as u64;
        let prefetch_bytes = (self.prefetch_bytes / partitions.max(1)).clamp(SHARE_BYTES.0, SHARE_BYTES.1);
        for (at, topic_id, next) in starts {
            let context = self.context.clone();
            state.begin(&at, topic_id, next, |cell, life| {
                let fetch = Fetch { context, topic_id, cell, life, next, prefetch_bytes };
                Some(AbortOnDropHandle::new(tokio::spawn(fetch.run())))
            });
        }
    }
}
