//! The Headwater broker: sessions, partitions, groups, metadata, admin port.

pub mod config;
pub mod group;
pub mod metadata;
pub mod topic_config;
