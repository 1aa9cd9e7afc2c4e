//! Consumer groups: who reads which partition, and how far it got.
//!
//! Owns: the assignors ([`assign`]), the state machine of one group ([`state`] its members, [`offsets`] what it
//! committed, [`records`] how both stand in `__consumer_offsets`). Read next: [`state`].

pub mod assign;
pub mod error;
pub mod offsets;
pub mod records;
pub mod state;

use headwater_proto::TopicId;
use std::collections::BTreeSet;

pub use crate::config::GroupSettings;
pub use error::GroupError;
pub use state::{Effect, Effects, Group};

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
