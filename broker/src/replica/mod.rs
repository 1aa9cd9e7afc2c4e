//! What replicas of a partition decide: the leader about who is in sync and how far the high watermark stands, the follower
//! about what it cuts and takes.
//!
//! Owns: [`leader`], [`follower`] and the comparison of their [`history`], all pure: the time, offsets and what others said
//! come in as arguments, decisions go out as effects. Beside them the streams on which they speak to each other (the leader's end in
//! `serve`, the follower's in `follow`, the connections in `links`), which decide nothing. Refuses: logs and roles (the partition's task has them),
//! the metadata (a [`leader::View`] is what they say of one partition). Read next: [`leader`].

mod alters;
pub(crate) mod follow;
pub mod follower;
#[cfg(test)]
mod follower_tests;
pub mod history;
pub mod lag;
pub mod leader;
#[cfg(test)]
mod leader_tests;
pub(crate) mod links;
pub mod message;
pub(crate) mod serve;
mod soundness;
pub(crate) mod throttle;

use history::History;
use uuid::Uuid;

/// A broker as it was started once. Leadership and membership in the ISR belong to it, not to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The broker.
    pub broker: i32,
    /// What it drew at random when it started.
    pub incarnation: Uuid,
}

/// What a completion of a write or a flush belongs to. It counts for nothing once either changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tenure {
    /// The leader epoch in which the job began.
    pub leader_epoch: i32,
    /// How often this incarnation had cut the log by then.
    pub generation: u64,
}

/// What a follower says first, and again after every cut. Nothing is pushed before the leader finds nothing to cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The follower.
    pub member: Member,
    /// The epoch in which it follows, and how often it has cut its log.
    pub tenure: Tenure,
    /// Its whole log, in terms of leader epochs.
    pub history: History,
}

/// How far a follower is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The follower.
    pub member: Member,
    /// What its offsets belong to.
    pub tenure: Tenure,
    /// Everything below is written to its log.
    pub received: i64,
    /// Everything below is on stable storage.
    pub flushed: i64,
    /// Where its log begins, which no crash takes back; `None`: it does not say.
    pub log_start: Option<i64>,
}
