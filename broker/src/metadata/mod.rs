//! What the cluster is: topics, their partitions and settings, brokers, producer ids.
//!
//! Owns: the commands and snapshots ([`command`]), the state machine they drive ([`state`]), the rules of topic names
//! ([`name`]), where new partitions are kept ([`placement`]) and where those that are there move ([`moves`]), which broker may be
//! stopped ([`health`]), how a disk counts its starts ([`boots`]), and the journal that keeps them ([`journal`], its bytes [`mod@format`]). Refuses: opinions on how commands
//! reach the machine, which is the quorum's ([`raft`]). Read next: [`state`].

pub(crate) mod alone;
pub mod boots;
pub mod changes;
pub mod command;
pub mod format;
pub mod handle;
pub mod health;
pub mod journal;
mod journal_file;
pub mod moves;
pub mod name;
pub mod placement;
mod producer_ids;
pub mod raft;
pub(crate) mod several;
pub mod state;

pub use handle::{MetadataError, MetadataHandle};
pub use state::{MetadataState, Outcome, Partition, Refusal, Topic};
