//! Producers: blocks of ids, and the epochs under which an id goes on.
//!
//! Owns: which ids and epochs were given out. An epoch after the first is for a producer that must begin its sequences
//! anew: it fences what is still on its way under the ones before.

use super::super::command;
use super::{MetadataState, Outcome, Refusal};
use crate::error::ProducerIdentity;
use crate::planted::{Bug, planted};
use headwater_proto::batch::{NO_PRODUCER_EPOCH, NO_PRODUCER_ID};
use headwater_storage::LastSequence;
use std::sync::Arc;

/// Most producer ids of which a later epoch than the first is known. Beyond that, the one whose last epoch was given out
/// the longest ago is forgotten: what its log holds counts all the same, and else it takes another id.
pub(super) const MAX_PRODUCER_EPOCHS: usize = 1 << 16;

impl MetadataState {
    /// Who writes under this id and epoch. A newer epoch fences those before it, so it counts only if it was given out: otherwise
    /// anybody could fence anybody. What the log holds was, `last` (Kafka gave out what an import brings, and nobody knows which
    /// else).
    ///
    /// # Errors
    /// [`Refusal::UnknownProducerId`], [`Refusal::UnknownProducerEpoch`].
    pub fn identify(&self, id: i64, epoch: i32, last: Option<LastSequence>) -> Result<ProducerIdentity, Refusal> {
        if id == NO_PRODUCER_ID {
            return Ok(ProducerIdentity { id, epoch: NO_PRODUCER_EPOCH });
        }
        // From a counter that never falls, and that an import raises above every id in the logs it brings.
        if !(0..self.next_producer_id).contains(&id) {
            return Err(Refusal::UnknownProducerId(id));
        }
        let newest = self.producer_epoch(id).max(last.map_or(0, |last| last.epoch));
        match i16::try_from(epoch) {
            Ok(epoch) if (0..=newest).contains(&epoch) => Ok(ProducerIdentity { id, epoch }),
            _ => Err(Refusal::UnknownProducerEpoch { producer_id: id, given: epoch, newest }),
        }
    }

    pub(super) fn allocate(&mut self, allocate: &command::AllocateProducerIds) -> Result<Outcome, Refusal> {
        if !self.brokers.contains_key(&allocate.broker_id) {
            return Err(Refusal::UnknownBroker(allocate.broker_id));
        }
        let first = self.next_producer_id;
        let next = first.checked_add(i64::from(allocate.count)).ok_or(Refusal::ProducerIdsExhausted)?;
        self.next_producer_id = next - i64::from(planted(Bug::ProducerIdTwice));
        Ok(Outcome::ProducerIds { first, count: allocate.count })
    }

    pub(super) fn next_epoch(&mut self, index: u64, next: &command::NextProducerEpoch) -> Result<Outcome, Refusal> {
        let (producer_id, given) = (next.producer_id, next.producer_epoch);
        if !(0..self.next_producer_id).contains(&producer_id) {
            return Err(Refusal::UnknownProducerId(producer_id));
        }
        let newest = self.producer_epoch(producer_id);
        if given < 0 || given > i32::from(newest) {
            return Err(Refusal::UnknownProducerEpoch { producer_id, given, newest });
        }
        // One that asks for what it was given before did not hear the answer, or writes to another partition.
        if given < i32::from(newest) {
            return Ok(Outcome::ProducerEpoch(newest));
        }
        let epoch = newest.checked_add(1).ok_or(Refusal::ProducerEpochsExhausted(producer_id))?;
        let epochs = Arc::make_mut(&mut self.producer_epochs);
        epochs.insert(producer_id, (epoch, index));
        if epochs.len() > MAX_PRODUCER_EPOCHS
            && let Some(oldest) = epochs.iter().min_by_key(|(_, (_, index))| *index).map(|(id, _)| *id)
        {
            epochs.remove(&oldest);
        }
        Ok(Outcome::ProducerEpoch(epoch))
    }
}
