//! What a log costs on this machine's disk: appending a group, making it durable, and reading at the end and behind it.
//!
//! `cargo bench --bench append`. Files go to a temporary directory (`TMPDIR` chooses the disk). Fill the page cache first, with a
//! file as large as memory: memory that was never touched makes buffered writes several times slower.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use headwater_proto::TopicId;
use headwater_proto::batch::{BatchBuilder, BuildOptions, check};
use headwater_storage::{Log, LogConfig, LogIdentity, NewBatch, OpenHints, OsFiles};

const NOW: i64 = 1_700_000_000_000;
const SEGMENT_BYTES: u32 = 64 << 20;

fn batch(bytes: usize) -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    let value = vec![0x5a; 1000.min(bytes)];
    for _ in 0..(bytes / 1000).max(1) {
        builder.append(NOW, None, Some(&value), &[]);
    }
    let bytes = builder.build().expect("a batch");
    NewBatch { header: check(&bytes).expect("a valid batch"), bytes }
}

fn open(dir: &Path, recycled_segments: usize) -> Log {
    let identity = LogIdentity { topic: "bench".into(), topic_id: TopicId::from_bytes([1; 16]), partition: 0 };
    let config = LogConfig {
        segment_bytes: SEGMENT_BYTES,
        retention_bytes: Some(u64::from(SEGMENT_BYTES)),
        recycled_segments,
        ..LogConfig::default()
    };
    let hints = OpenHints { clean_shutdown: true, ..OpenHints::default() };
    Log::open(Arc::new(OsFiles::new()), dir, identity, config, hints, NOW).expect("a log").0
}

/// Appends a group; deletes what is beyond the retention whenever a segment was rolled.
fn append(log: &mut Log, group: &[NewBatch], segments: &mut usize) {
    log.append(group, 1, NOW).expect("an append");
    let now = log.reader().segment_count();
    if now != *segments {
        let end = log.log_end_offset();
        log.enforce_retention(NOW, end).expect("retention");
        *segments = log.reader().segment_count();
    }
}

fn appending(criterion: &mut Criterion) {
    for (name, flush) in [("append", false), ("append_flush", true)] {
        let mut group = criterion.benchmark_group(name);
        group.measurement_time(Duration::from_secs(3)).sample_size(20);
        for batch_bytes in [1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000] {
            group.throughput(Throughput::Bytes(batch_bytes as u64));
            for recycled_segments in [0, 2] {
                let dir = tempfile::tempdir().expect("a directory");
                let mut log = open(&dir.path().join("bench-0"), recycled_segments);
                let batches = [batch(batch_bytes)];
                let mut segments = 1;
                let id = if recycled_segments == 0 { "new_files" } else { "recycled_files" };
                group.bench_function(BenchmarkId::new(id, batch_bytes), |bencher| {
                    bencher.iter(|| {
                        append(&mut log, &batches, &mut segments);
                        if flush {
                            log.flush().expect("a flush");
                        }
                    });
                });
            }
        }
        group.finish();
    }
}

fn grouping(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append_flush_group_of_1000_byte_batches");
    group.measurement_time(Duration::from_secs(3)).sample_size(20);
    for count in [1usize, 16, 256] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut log = open(&dir.path().join("bench-0"), 2);
        let batches = vec![batch(1_000); count];
        let mut segments = 1;
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| {
                append(&mut log, &batches, &mut segments);
                log.flush().expect("a flush");
            });
        });
    }
    group.finish();
}

fn reading(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut log = open(&dir.path().join("bench-0"), 0);
    let mut segments = 1;
    let batches = [batch(16_000)];
    for _ in 0..3_000 {
        append(&mut log, &batches, &mut segments);
    }
    let reader = log.reader();
    let mut group = criterion.benchmark_group("read");
    let end = reader.log_end_offset();
    group.bench_function("nothing_at_the_end", |bencher| {
        let mut cursor = reader.seek(end).expect("a cursor");
        bencher.iter(|| reader.read(&mut cursor, 1 << 20, end).expect("a read"));
    });
    group.bench_function("seek_and_one_batch_at_the_end", |bencher| {
        bencher.iter(|| {
            let mut cursor = reader.seek(end - 1).expect("a cursor");
            reader.read(&mut cursor, 1 << 20, end).expect("a read").expect("a slice")
        });
    });
    let start = reader.log_start_offset();
    let mut cursor = reader.seek(start).expect("a cursor");
    for piece in [16 << 10, 256 << 10] {
        group.throughput(Throughput::Bytes(piece as u64));
        group.bench_function(BenchmarkId::new("slice_of_the_middle", piece), |bencher| {
            bencher.iter(|| {
                let slice = match reader.read(&mut cursor, piece, end).expect("a read") {
                    Some(slice) => slice,
                    None => {
                        cursor = reader.seek(start).expect("a cursor");
                        reader.read(&mut cursor, piece, end).expect("a read").expect("a slice")
                    }
                };
                assert!(slice.is_resident());
                (slice.next_offset().expect("an offset"), slice.bytes())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, appending, grouping, reading);
criterion_main!(benches);
