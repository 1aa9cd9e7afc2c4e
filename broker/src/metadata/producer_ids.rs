//! Producer ids, taken from the metadata in blocks.
//!
//! A block is journaled before the first of its ids is given away; what is left of it when the broker stops is never
//! used. So no id is given twice, whatever happens.

use super::command::{AllocateProducerIds, command::Command as Kind};
use super::handle::{MetadataError, MetadataHandle, PROPOSAL_TIMEOUT};
use super::state::{MetadataState, Outcome};
use std::ops::Range;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

/// Ids taken at once.
const BLOCK_IDS: u32 = 1000;

/// The ids that this broker may give away.
#[derive(Debug, Default)]
pub(crate) struct ProducerIds {
    block: Mutex<Range<i64>>,
}

impl ProducerIds {
    /// An id that nobody else has or will have.
    ///
    /// # Errors
    /// [`MetadataError`] if a block was needed and could not be had.
    pub(crate) async fn next(&self, metadata: &MetadataHandle, broker_id: i32) -> Result<i64, MetadataError> {
        // Those who wait for a block together wait as long as one.
        let deadline = Instant::now() + PROPOSAL_TIMEOUT;
        let block = timeout_at(deadline, self.block.lock()).await;
        let mut block = block.map_err(|_| MetadataError::Behind)?;
        loop {
            if let Some(id) = block.next() {
                return Ok(id);
            }
            let allocate = AllocateProducerIds { broker_id, count: BLOCK_IDS };
            let allocate = move |_: &MetadataState| Ok(Kind::AllocateProducerIds(allocate).into());
            if let Outcome::ProducerIds { first, count } = metadata.propose_by(deadline, allocate).await? {
                *block = first..first + i64::from(count);
            }
        }
    }
}
