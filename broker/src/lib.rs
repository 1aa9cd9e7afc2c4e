//! The Headwater broker: sessions, partitions, groups, metadata, admin port.
