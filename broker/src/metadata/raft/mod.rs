//! The metadata by quorum: openraft drives the state machine, over our journal.
//!
//! A member of the quorum keeps one file at the data root, the journal (format version 3): who it is, its vote, the log, and
//! a snapshot. The index of an entry in the log is the version of the metadata after it. A folder of the time when a broker
//! alone kept a journal of commands (versions 1 and 2) becomes that of a quorum of one: its state is the snapshot that the log
//! goes on from, so the version goes on too.
//!
//! Rules, since openraft's defaults lose data:
//! * A member's id is random and kept in the journal, never the broker's: who lost the journal is another member, and does
//!   not vote a second time.
//! * An entry that is committed is never taken back: openraft's feature `loosen-follower-log-revert` stays off, and the log
//!   refuses it by itself ([`log`]).
//! * Nobody calls `initialize`: a quorum begins with the journal of its first member, which says so.
//! * Nodes have no addresses here: those are in the brokers' registrations.
//!
//! * The controller's epoch is the index of its `BecomeController`, not the term ([`office`]). Proposals have deadlines ([`node`]).
//!
//! Owns: the types openraft is run with. Read next: [`store`] (what is kept, and how), [`log`] and [`machine`] (what openraft
//! sees of it), [`node`] (running), [`links`], [`network`] and [`server`] (between members), [`asker`] (who may ask what), [`quorum`] (who votes), [`succession`] (whose disk was emptied), [`sessions`] (which
//! brokers are there).

mod asker;
pub mod balance;
pub mod book;
pub mod convert;
mod forward;
pub mod heartbeat;
mod kept;
pub mod links;
pub mod log;
pub mod machine;
pub mod members;
mod message;
pub mod network;
pub mod node;
pub mod office;
pub mod quorum;
pub mod recover;
pub mod server;
pub mod sessions;
pub mod store;
mod story;
pub mod succession;
pub mod thread;

pub use heartbeat::Hearing;
pub(crate) use heartbeat::Heart;
pub use links::{Links, LinksConfig};
pub use log::RaftLog;
pub use machine::{Applied, RaftMachine};
pub use members::{Change, MembersRefusal};
pub use network::NoNetwork;
pub use node::RaftNode;
pub use office::Office;
pub use server::RaftServer;
pub use store::{Founding, OpenedStore, Store};
pub use thread::RaftThread;

use super::command::Command;
use super::state::{MetadataState, Outcome, Refusal};
use openraft::EmptyNode;
use std::io::Cursor;

openraft::declare_raft_types!(
    /// What the quorum is about: commands, and what comes of them.
    pub TypeConfig:
        D = Command,
        R = Answer,
        NodeId = u64,
        Node = EmptyNode,
        SnapshotData = Cursor<Vec<u8>>,
);

/// What comes of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is no command: a leader began, or the members changed.
    NoCommand,
    /// The command was applied.
    Applied(Outcome),
    /// The state machine refuses the command: nothing changed.
    Refused(Refusal),
}

/// An id for a new member: random, and not zero.
pub fn new_node_id() -> u64 {
    rand::random::<u64>().max(1)
}

type Entry = openraft::Entry<TypeConfig>;
type EntryPayload = openraft::EntryPayload<TypeConfig>;
type LogId = openraft::LogId<u64>;
pub(crate) type Membership = openraft::Membership<u64, EmptyNode>;
type SnapshotMeta = openraft::SnapshotMeta<u64, EmptyNode>;
type StorageError = openraft::StorageError<u64>;
type StoredMembership = openraft::StoredMembership<u64, EmptyNode>;
type Vote = openraft::Vote<u64>;

#[cfg(test)]
mod node_tests;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod suite_tests;
