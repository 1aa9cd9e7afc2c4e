//! What a log is told: its settings, its identity, and what the checkpoints said of it.
//!
//! Owns: plain structs with Kafka's defaults. Refuses: names and texts of settings (the broker's table), and validation of
//! combinations. Read next: `log.rs`.

use headwater_proto::TopicId;
use headwater_proto::batch::TimestampType;

/// Which topic and partition a log belongs to. Bound into every segment's checksum file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogIdentity {
    /// The topic's name.
    pub topic: String,
    /// The topic's id.
    pub topic_id: TopicId,
    /// The partition.
    pub partition: u32,
}

/// What happens to old records (`cleanup.policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleanup {
    /// Segments beyond the retention are deleted.
    pub delete: bool,
    /// Only the last value of every key is kept.
    pub compact: bool,
}

/// Settings of a log. The default is Kafka's.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// Bytes after which a segment is rolled (`segment.bytes`). More means fewer files, and coarser retention.
    pub segment_bytes: u32,
    /// Milliseconds of record time (and, for a log that is not written, of the clock) after which a segment is rolled (`segment.ms`).
    pub segment_ms: u64,
    /// Bytes after which an index is full and its segment rolled (`segment.index.bytes`).
    pub segment_index_bytes: u32,
    /// Bytes of log between two index entries (`index.interval.bytes`). More means smaller indexes, and longer scans to find an offset.
    pub index_interval_bytes: u32,
    /// Milliseconds that records are kept (`retention.ms`); `None` is for ever.
    pub retention_ms: Option<u64>,
    /// Bytes that are kept (`retention.bytes`); `None` is everything.
    pub retention_bytes: Option<u64>,
    /// What happens to old records (`cleanup.policy`).
    pub cleanup: Cleanup,
    /// Milliseconds that a compacted log keeps a tombstone (`delete.retention.ms`).
    pub delete_retention_ms: u64,
    /// Milliseconds for which a record is not compacted away (`min.compaction.lag.ms`).
    pub min_compaction_lag_ms: u64,
    /// Milliseconds after which a record is compacted whatever the dirty ratio (`max.compaction.lag.ms`).
    pub max_compaction_lag_ms: u64,
    /// Share of uncompacted bytes from which a log is compacted (`min.cleanable.dirty.ratio`).
    pub min_cleanable_dirty_ratio: f64,
    /// Largest batch that is appended (`max.message.bytes`).
    pub max_message_bytes: u32,
    /// Whose timestamps records carry (`message.timestamp.type`).
    pub timestamp_type: TimestampType,
    /// Milliseconds after which a producer that wrote nothing is forgotten (`producer.id.expiration.ms`).
    pub producer_id_expiration_ms: u64,
    /// Most bytes that are written and not yet flushed; an append that would pass it flushes first. Recovery rests on it: damage further
    /// than this before a valid batch is no torn write. It must not shrink between a crash and the recovery.
    pub unflushed_limit_bytes: u64,
    /// Bytes of a segment after which its indexes, its checksums and what is known of producers are put on the disk, with the next flush, so that
    /// recovery scans no more than about these. Fewer mean more syncs.
    pub checkpoint_bytes: u64,
    /// Deleted segments that are kept to be written again, which makes writes and syncs several times faster. Each costs up to a segment of disk space,
    /// and is given up when the disk is full, or after an hour without use.
    pub recycled_segments: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        const DAY_MS: u64 = 24 * 60 * 60 * 1000;
        LogConfig {
            segment_bytes: 1 << 30,
            segment_ms: 7 * DAY_MS,
            segment_index_bytes: 10 << 20,
            index_interval_bytes: 4096,
            retention_ms: Some(7 * DAY_MS),
            retention_bytes: None,
            cleanup: Cleanup { delete: true, compact: false },
            delete_retention_ms: DAY_MS,
            min_compaction_lag_ms: 0,
            max_compaction_lag_ms: i64::MAX as u64,
            min_cleanable_dirty_ratio: 0.5,
            max_message_bytes: 1_048_588,
            timestamp_type: TimestampType::Create,
            producer_id_expiration_ms: DAY_MS,
            unflushed_limit_bytes: headwater_proto::limits::MAX_BATCH_BYTES as u64,
            checkpoint_bytes: 128 << 20,
            recycled_segments: 1,
        }
    }
}

/// What the checkpoints of the data root say of a log that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenHints {
    /// The log was closed in good order: nothing is scanned.
    pub clean_shutdown: bool,
    /// Everything before this offset was flushed. 0 where nothing is known.
    pub recovery_point: i64,
    /// Where the log begins, if that is beyond the beginning of its first segment. 0 where nothing is known.
    pub log_start_offset: i64,
}
