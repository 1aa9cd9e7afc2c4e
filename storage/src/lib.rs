//! The log of one Headwater partition, as Kafka lays it out on disk.

pub mod offsets_schema;
