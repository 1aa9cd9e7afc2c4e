//! Consumer groups: who reads which partition, and how far it got.
//!
//! Owns: the assignors ([`assign`]), the state machine of one group ([`state`] its members, [`offsets`] what it
//! committed, [`records`] how both stand in `__consumer_offsets`, [`waiting`] what nobody is told yet), and the tasks that drive it where this broker coordinates (`seats`,
//! `task`). Read next: [`state`].

pub mod assign;
pub mod error;
mod handle;
mod load;
pub mod offsets;
pub mod records;
mod seats;
mod standing;
pub mod state;
mod task;
mod topic;
pub mod waiting;

use headwater_proto::TopicId;
use std::collections::BTreeSet;

pub use crate::config::GroupSettings;
pub use error::GroupError;
pub(crate) use handle::{Groups, MemberStream};
pub use offsets::{CommitEntry, Committed, EntryError};
pub(crate) use standing::Standing;
pub use state::{Effect, Effects, Group, Join, Report};
pub(crate) use task::{MemberView, OwnedSpeaker};

/// A partition of a topic.
pub type PartitionOf = (TopicId, u32);

/// Partitions, ordered.
pub type Partitions = BTreeSet<PartitionOf>;

/// The time, as a driver reads it: decisions about waiting use the one, what is kept uses the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// Milliseconds of a clock that never jumps.
    pub monotonic_ms: u64,
    /// Milliseconds since 1970.
    pub wall_ms: i64,
}
