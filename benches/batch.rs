//! What a record batch costs: writing it, checking its checksum, walking it as a broker does, reading its records as a
//! consumer does; with every codec. Throughput counts the bytes of the uncompressed batch.
//!
//! `cargo bench --bench batch`

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use headwater_proto::batch::{BatchBuilder, BuildOptions, Codec, Records, WalkRules, check, walk};

/// Number of records and bytes of a value: a batch of a latency-bound producer, and one of small events.
const SHAPES: [(usize, usize); 2] = [(16, 1_000), (1_000, 100)];

/// Values that compress about as events in JSON do.
fn values(record_count: usize, value_bytes: usize) -> Vec<Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut number = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let fields = |value: &mut Vec<u8>, a: u64, b: u64| {
        value.extend_from_slice(
            format!("{{\"flight\":\"HW{:04}\",\"altitude\":{}}},", a % 10_000, b % 40_000).as_bytes(),
        );
    };
    let value = |_| {
        let mut value = Vec::with_capacity(value_bytes + 64);
        while value.len() < value_bytes {
            fields(&mut value, number(), number());
        }
        value.truncate(value_bytes);
        value
    };
    (0..record_count).map(value).collect()
}

fn build(codec: Codec, values: &[Vec<u8>]) -> Bytes {
    let options = BuildOptions { codec, ..BuildOptions::default() };
    let capacity = values.iter().map(|value| value.len() + 32).sum::<usize>() + 61;
    let mut builder = BatchBuilder::with_capacity(options, capacity);
    for (index, value) in values.iter().enumerate() {
        let key = (index as u64).to_be_bytes();
        builder.append(1_700_000_000_000 + index as i64, Some(&key), Some(value), &[]);
    }
    builder.build().expect("a legal batch")
}

fn batches(criterion: &mut Criterion) {
    for (record_count, value_bytes) in SHAPES {
        let shape = format!("{record_count}x{value_bytes}");
        let values = values(record_count, value_bytes);
        let plain = build(Codec::None, &values);
        let mut group = criterion.benchmark_group(&shape);
        group.throughput(Throughput::Bytes(plain.len() as u64));
        group.bench_function("check", |bencher| bencher.iter(|| check(black_box(&plain))));
        for codec in Codec::ALL {
            let batch = build(codec, &values);
            group.bench_function(BenchmarkId::new("encode", codec), |bencher| {
                bencher.iter(|| build(codec, black_box(&values)));
            });
            group.bench_function(BenchmarkId::new("walk", codec), |bencher| {
                bencher.iter(|| walk(black_box(&batch), WalkRules::default()).expect("a legal batch"));
            });
            group.bench_function(BenchmarkId::new("iterate", codec), |bencher| {
                bencher.iter(|| {
                    let records = Records::new(black_box(&batch)).expect("a legal batch");
                    records
                        .map(|record| record.expect("a legal record").value.map_or(0, |value| value.len()))
                        .sum::<usize>()
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(800));
    targets = batches
}
criterion_main!(benches);
