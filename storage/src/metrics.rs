//! The names of storage's metrics. Recorded through the `metrics` crate; the broker exports them.
//!
//! Owns: names and their descriptions. Labels are never topics or partitions: their number has no bound.

/// Histogram: seconds that a group append took (checks, write, indexes), without its sync.
pub const APPEND_SECONDS: &str = "headwater_storage_append_seconds";
/// Histogram: seconds that a sync of a log took.
pub const FLUSH_SECONDS: &str = "headwater_storage_flush_seconds";
/// Counter: bytes appended to logs.
pub const APPENDED_BYTES: &str = "headwater_storage_appended_bytes_total";
/// Counter: segments begun.
pub const SEGMENTS_ROLLED: &str = "headwater_storage_segments_rolled_total";
/// Counter: segments deleted by retention or by request.
pub const SEGMENTS_DELETED: &str = "headwater_storage_segments_deleted_total";
/// Counter: new segments that were written over a deleted one's file.
pub const SEGMENTS_RECYCLED: &str = "headwater_storage_segments_recycled_total";
/// Counter: bytes scanned by recovery.
pub const RECOVERED_BYTES: &str = "headwater_storage_recovered_bytes_total";
/// Counter: bytes of torn tails that recovery cut.
pub const CUT_BYTES: &str = "headwater_storage_cut_bytes_total";
/// Counter: appends refused because the disk was full.
pub const DISK_FULL: &str = "headwater_storage_disk_full_total";
/// Counter: logs poisoned by a failed write or sync.
pub const POISONED: &str = "headwater_storage_poisoned_total";
/// Counter: compactions that were installed.
pub const COMPACTIONS: &str = "headwater_storage_compactions_total";
/// Counter: bytes that compaction removed.
pub const COMPACTED_BYTES: &str = "headwater_storage_compacted_bytes_total";

/// Describes every metric to the recorder that is installed.
pub fn describe() {
    use metrics::{Unit, describe_counter, describe_histogram};
    describe_histogram!(APPEND_SECONDS, Unit::Seconds, "Time of a group append, without its sync");
    describe_histogram!(FLUSH_SECONDS, Unit::Seconds, "Time of a sync of a log");
    describe_counter!(APPENDED_BYTES, Unit::Bytes, "Bytes appended to logs");
    describe_counter!(SEGMENTS_ROLLED, Unit::Count, "Segments begun");
    describe_counter!(SEGMENTS_DELETED, Unit::Count, "Segments deleted by retention or by request");
    describe_counter!(SEGMENTS_RECYCLED, Unit::Count, "New segments written over a deleted one's file");
    describe_counter!(RECOVERED_BYTES, Unit::Bytes, "Bytes scanned by recovery");
    describe_counter!(CUT_BYTES, Unit::Bytes, "Bytes of torn tails that recovery cut");
    describe_counter!(DISK_FULL, Unit::Count, "Appends refused because the disk was full");
    describe_counter!(POISONED, Unit::Count, "Logs poisoned by a failed write or sync");
    describe_counter!(COMPACTIONS, Unit::Count, "Compactions installed");
    describe_counter!(COMPACTED_BYTES, Unit::Bytes, "Bytes removed by compaction");
}
