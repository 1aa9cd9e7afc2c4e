//! Going on from a state that may not be the newest one: what a majority that is lost for good decided after it is not known.
//!
//! Nothing that it may have given out is given out again: another leadership under one leader epoch would be two logs that
//! are held to be equal, another producer under one id a retry that is acknowledged and not written, another state under one
//! version a client that takes the older one for the newer. So every such number makes a step that is longer than whatever was
//! decided in between.
//!
//! Owns: which numbers, and how far. Refuses: which folder is gone on from ([`super::super::raft::recover`]).

use super::{MetadataState, Topic};
use std::sync::Arc;

/// Epochs, and unclean elections, of a partition.
const EPOCHS: u32 = 1 << 16;
/// Producer ids.
const PRODUCER_IDS: i64 = 1 << 32;
/// Commands.
const VERSIONS: u64 = 1 << 32;

impl MetadataState {
    /// Whether it goes on from such a state: topics may have been forgotten that brokers still have folders of. No cluster comes as far by
    /// commands alone.
    pub fn may_have_forgotten(&self) -> bool {
        self.index >= VERSIONS
    }

    /// Leaves out every number that may have been given out after this state, by a quorum of which nobody is left to ask.
    ///
    /// For every partition it is as if an unclean election had come to pass, because one may have: who has records that the
    /// survivor's partition has not was told that they are committed, and has to cut them all the same.
    pub(in super::super) fn leave_out_what_is_lost(&mut self) {
        let mut raised = self.topics.clone();
        for topic in self.topics.values() {
            let mut topic = Topic::clone(topic);
            for partition in &mut topic.partitions {
                partition.leader_epoch = partition.leader_epoch.saturating_add_unsigned(EPOCHS);
                partition.partition_epoch = partition.partition_epoch.saturating_add_unsigned(EPOCHS);
                partition.unclean_recoveries = partition.unclean_recoveries.saturating_add(EPOCHS);
            }
            raised.insert(topic.name.clone(), Arc::new(topic));
        }
        self.topics = raised;
        self.next_producer_id = self.next_producer_id.saturating_add(PRODUCER_IDS);
        self.index = self.index.saturating_add(VERSIONS);
    }
}
