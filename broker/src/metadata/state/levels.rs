//! Feature levels: which commands a cluster may have, as brokers that run an older Headwater would not understand them all.
//!
//! A broker registers the highest level that it can. The cluster's level is raised by a person, once every broker can, and
//! never falls. A command above it is refused here, at every broker alike, and so is never proposed.
//!
//! | level | what it brings |
//! | --- | --- |
//! | 1 | everything before there were levels |
//! | 2 | reassignments with a throttle |
//! | 3 | brokers that are to keep nothing, and are given nothing; replicas that are given back by a disk that hung |
//!
//! Owns: the table. Refuses: raising the level ([`super::brokers`]).

use super::super::command::command::Command as Kind;
use super::Refusal;

/// The highest feature level that this build can.
pub const FEATURE_LEVEL: u32 = 3;

/// From this level on a broker may be [emptied](super::Broker::is_emptied) for good.
pub(crate) const EMPTIED_LEVEL: u32 = 3;

/// From this level on replicas that a disk fenced may be restored.
pub(crate) const RESTORED_LEVEL: u32 = 3;

/// Whether a command may be where the cluster is at this level.
pub(super) fn check(kind: &Kind, level: u32) -> Result<(), Refusal> {
    let (needed, what) = match kind {
        Kind::Reassign(reassign) if reassign.throttle_bytes_per_second > 0 => (2, "a reassignment with a throttle"),
        Kind::EmptyBroker(_) => (EMPTIED_LEVEL, "a broker that is to keep nothing"),
        Kind::RestoreReplicas(_) => (RESTORED_LEVEL, "a replica that is given back by a disk that hung"),
        _ => (1, "everything else"),
    };
    match needed <= level {
        true => Ok(()),
        false => Err(Refusal::AboveFeatureLevel { what, needed, level }),
    }
}
