//! Whether this broker coordinates still.
//!
//! A broker that was cut off from the others goes on to believe what it knew last, while another one coordinates in its place.
//! What it appends is never kept then; but what it says of offsets and members would be of the past. So it asks first. The quorum
//! is asked, not a clock: what it knew after the question was put is what holds.
//!
//! Owns: [`Standing`]. Refuses: what is done without an answer ([`super::task`]).

use crate::metadata::MetadataHandle;
use crate::partition::PartitionHandle;
use std::time::Duration;
use tokio::time::Instant;

/// Time for the quorum to answer.
pub(super) const ANSWERS: Duration = Duration::from_secs(3);

/// How a coordinator knows that it is one.
#[derive(Clone)]
pub(crate) enum Standing {
    /// Nobody decides but this broker.
    Alone,
    /// The quorum does.
    Quorum,
}

impl Standing {
    /// Whether there may be another coordinator that this broker has not heard of.
    pub(super) fn is_alone(&self) -> bool {
        matches!(self, Standing::Alone)
    }

    /// Whether this broker led the partition in this epoch at some moment after the call. Everything that was decided before the
    /// call is known here when it returns.
    pub(super) async fn confirm(&self, metadata: &MetadataHandle, partition: &PartitionHandle, epoch: i32) -> bool {
        if self.is_alone() {
            return partition.leads_in() == Some(epoch);
        }
        if let Err(error) = metadata.catch_up(Instant::now() + ANSWERS).await {
            tracing::debug!(?partition, %error, "nobody confirms that this broker coordinates still");
            return false;
        }
        let (state, me) = (metadata.state(), partition.me().broker);
        let known = state.topic_by_id(&partition.topic_id());
        let known = known.and_then(|topic| topic.partitions.get(partition.partition() as usize));
        known.is_some_and(|known| (known.leader, known.leader_epoch) == (me, epoch))
    }
}
