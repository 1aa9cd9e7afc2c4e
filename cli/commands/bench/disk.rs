//! `headwater bench disk`: the same batches, written to a file and synced one by one.
//!
//! The file's space is reserved ahead in steps, as the log's is, and goes round: no more than a segment is written anew.

use anyhow::{Context, Result, ensure};
use headwater_proto::batch::{BatchBuilder, BuildOptions};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::data::Values;
use super::{Answer, Latencies};
use crate::args::{BenchArgs, Global, Mode};
use crate::connect::profile;
use crate::os::{cpu_time, reserve, sleep_exactly};
use crate::output::{Unit, progress};
use crate::signals::Signals;

/// Bytes reserved at a time.
const RESERVE_BYTES: u64 = 16 << 20;

/// Runs the mode.
pub(super) fn run(global: &Global, args: &BenchArgs) -> Result<Answer> {
    let folder = match &args.dir {
        Some(folder) => folder.clone(),
        None => profile(global)?.and_then(|file| file.parent().map(PathBuf::from)).unwrap_or_else(|| ".".into()),
    };
    let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
    // Whoever ends it leaves no file behind.
    let signals = Signals::catch();
    let mut named = tempfile::Builder::new()
        .prefix("bench-")
        .suffix(".log")
        .tempfile_in(&folder)
        .with_context(|| format!("cannot make a file in {}", folder.display()))?;
    if args.keep {
        named.disable_cleanup(true);
    }
    let written = write(global, args, named.as_file_mut(), &signals)
        .with_context(|| format!("cannot write to {}", named.path().display()))?;
    Ok(written)
}

fn write(global: &Global, args: &BenchArgs, file: &mut File, signals: &Signals) -> Result<Answer> {
    let values = Values::new(args.record_bytes());
    let per_batch = (args.batch / (args.record_size + 16)).max(1);
    let records = args.record_count();
    let batch = |first: u64, count: u64| {
        let mut builder = BatchBuilder::new(BuildOptions { codec: args.compression.into(), ..BuildOptions::default() });
        for number in first..first + count {
            builder.append(0, None, Some(&values.get(number)), &[]);
        }
        builder.build()
    };
    let whole = batch(0, per_batch).context("cannot make a batch")?;
    let bar = progress(global, "bench disk", Unit::Bytes, Some(records * args.record_size));
    let mut latencies = Latencies::new();
    let (mut sent, mut position, mut reserved) = (0, 0, 0);
    let interval = args.throughput.map(|rate| Duration::from_secs_f64(1.0 / rate as f64));
    if interval.is_some() {
        sleep_exactly();
    }
    let cpu = cpu_time();
    let began = Instant::now();
    while sent < records {
        ensure!(!signals.is_asked(), "interrupted");
        let count = per_batch.min(records - sent);
        let last;
        let bytes = if count == per_batch {
            &whole
        } else {
            last = batch(sent, count).context("cannot make a batch")?;
            &last
        };
        let due = interval.map_or_else(Instant::now, |interval| began + interval.mul_f64(sent as f64));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if position + bytes.len() as u64 > reserved {
            if reserved >= SEGMENT_BYTES {
                position = 0;
                file.seek(SeekFrom::Start(0))?;
            } else {
                reserve(file, reserved, RESERVE_BYTES.max(bytes.len() as u64))?;
                reserved += RESERVE_BYTES.max(bytes.len() as u64);
            }
        }
        file.write_all(bytes)?;
        file.sync_data()?;
        latencies.record(due.elapsed());
        position += bytes.len() as u64;
        sent += count;
        bar.inc(count * args.record_size);
    }
    let wall = began.elapsed();
    bar.finish_and_clear();
    Ok(Answer::new(Mode::Disk, records, records * args.record_size, wall)
        .latency("writing and syncing a batch", &latencies)
        .cpu(cpu_time().saturating_sub(cpu), None))
}

/// After so many bytes writing begins at the front again: the default `segment.bytes`.
const SEGMENT_BYTES: u64 = 1 << 30;
