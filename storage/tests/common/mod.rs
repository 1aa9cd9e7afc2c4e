//! What the tests of the log share.
#![allow(dead_code)] // each test binary uses its part

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchBuilder, BuildOptions, Records};
use headwater_storage::{
    BatchOutcome, Cursor, Files, Log, LogConfig, LogIdentity, LogReader, NewBatch, OpenHints, OsFiles, RecoveryReport,
};

pub(crate) const NOW: i64 = 1_700_000_000_000;

pub(crate) fn identity() -> LogIdentity {
    LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([9; 16]), partition: 0 }
}

pub(crate) fn batch_of(options: BuildOptions, timestamp: i64, values: &[&[u8]]) -> NewBatch {
    let mut builder = BatchBuilder::new(options);
    for (n, value) in values.iter().enumerate() {
        builder.append(timestamp + n as i64, Some(b"k"), Some(value), &[]);
    }
    let bytes = builder.build().unwrap();
    NewBatch { header: batch::check(&bytes).unwrap(), bytes }
}

pub(crate) fn one(value: &[u8], timestamp: i64) -> NewBatch {
    batch_of(BuildOptions::default(), timestamp, &[value])
}

pub(crate) fn files() -> Arc<dyn Files> {
    Arc::new(OsFiles::with_open_limit(64))
}

pub(crate) fn open(dir: &Path, config: &LogConfig, hints: OpenHints) -> (Log, RecoveryReport) {
    Log::open(files(), dir, identity(), config.clone(), hints, NOW).unwrap()
}

pub(crate) fn clean() -> OpenHints {
    OpenHints { clean_shutdown: true, ..OpenHints::default() }
}

/// Reads everything below `below` from an offset on, in pieces of `piece` bytes.
pub(crate) fn bytes_from(reader: &LogReader, cursor: &mut Cursor, piece: usize, below: i64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(slice) = reader.read(cursor, piece, below).unwrap() {
        slice.load().unwrap();
        assert!(slice.is_resident());
        assert_eq!(slice.bytes().len(), slice.len());
        bytes.extend_from_slice(&slice.bytes());
    }
    bytes
}

pub(crate) fn values(bytes: Vec<u8>) -> Vec<(i64, Vec<u8>)> {
    let bytes = Bytes::from(bytes);
    let mut found = Vec::new();
    for item in batch::Batches::new(&bytes) {
        let (position, header, _) = item.unwrap();
        let whole = bytes.slice(position..position + header.size());
        batch::check(&whole).unwrap();
        for record in Records::new(&whole).unwrap() {
            let record = record.unwrap();
            found.push((record.offset, record.value.unwrap().to_vec()));
        }
    }
    found
}

pub(crate) fn all(log: &Log) -> Vec<(i64, Vec<u8>)> {
    let reader = log.reader();
    let mut cursor = reader.seek(reader.log_start_offset()).unwrap();
    values(bytes_from(&reader, &mut cursor, 1 << 20, i64::MAX))
}

pub(crate) fn small() -> LogConfig {
    LogConfig { segment_bytes: 4000, index_interval_bytes: 200, ..LogConfig::default() }
}

pub(crate) fn fill(log: &mut Log, count: usize) -> Vec<(i64, Vec<u8>)> {
    let mut expected = Vec::new();
    for n in 0..count {
        let value = format!("value {n} {}", "x".repeat(n % 90)).into_bytes();
        let at = log.log_end_offset();
        let outcome = log.append(&[one(&value, NOW + n as i64)], 1, NOW).unwrap();
        assert_eq!(outcome, [BatchOutcome::Appended { base_offset: at, last_offset: at, log_append_time_ms: -1 }]);
        expected.push((at, value));
    }
    expected
}
