//! `headwater bench ...`

use super::{AcksArg, CodecArg};
use crate::spec::{batch_size, count, per_second, wait};
use clap::{Args, ValueEnum};
use headwater_proto::limits::MAX_PARTITIONS_PER_TOPIC;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// What to measure.
    pub(crate) mode: Mode,
    /// The topic; made if it is not there, and kept. Without it a topic of a random name is made, and deleted at the end.
    #[arg(long, value_name = "TOPIC")]
    pub(crate) topic: Option<String>,
    /// How many records. Without it: 1,000,000; e2e 10 seconds of --throughput; isolation 8 MB for each partition.
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) records: Option<u64>,
    /// Bytes of a record's value.
    #[arg(long, value_name = "BYTES", default_value = "1000", value_parser = batch_size)]
    pub(crate) record_size: u64,
    /// How many producers, each with connections of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) producers: u32,
    /// Partitions of the topic. Without it: one; isolation 64. A topic that is there has as many as it has.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PARTITIONS_PER_TOPIC)))]
    pub(crate) partitions: Option<u32>,
    /// Bytes of a batch.
    #[arg(long, value_name = "BYTES", default_value = "256KiB", value_parser = batch_size)]
    pub(crate) batch: u64,
    /// How long a batch may wait for more records. Without it: the client's default.
    #[arg(long, value_name = "DURATION", value_parser = wait)]
    pub(crate) linger: Option<Duration>,
    /// Records a second, at even distances; latency counts from the moment a record was due. Without it: as fast as it
    /// goes (e2e: 1000). raw: round trips a second;
    /// disk: its batches are due when their first record is.
    #[arg(long, value_name = "RECORDS", value_parser = per_second)]
    pub(crate) throughput: Option<u64>,
    /// What to wait for.
    #[arg(long, value_name = "ACKS", default_value = "all")]
    pub(crate) acks: AcksArg,
    /// The topic's durability. Without it: the broker's default.
    #[arg(long, value_name = "LEVEL")]
    pub(crate) durability: Option<Durability>,
    /// Compression of the batches.
    #[arg(long, value_name = "CODEC", default_value = "none")]
    pub(crate) compression: CodecArg,
    /// Bytes of a packet (UDP payload), from 1200 on, of this side. The broker's packets are as large as its own setting
    /// `mtu` says: set both (`headwater up -c mtu=N`). raw sets both itself, up to a broker's largest, 6550. Without it: the
    /// client's default.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1200..=65000))]
    pub(crate) mtu: Option<u16>,
    /// isolation: partitions that are opened and never read. Without it: an eighth of them.
    #[arg(long, value_name = "K")]
    pub(crate) stalled: Option<u32>,
    /// raw: which way the bytes go.
    #[arg(long, value_name = "WAY", default_value = "receive")]
    pub(crate) direction: Direction,
    /// disk: the folder for the file. Without it: the folder of the client profile, else the current one.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Leave the topic (or file) there at the end.
    #[arg(long)]
    pub(crate) keep: bool,
    /// raw: be the other process.
    #[arg(long, hide = true)]
    pub(crate) serve: bool,
}

/// Bytes that a record of `e2e` needs for its number.
pub(crate) const NUMBER_BYTES: usize = 8;
/// Bytes of a whole run: more would take longer than anybody lives, and sums of them must not overflow.
const MOST_BYTES: u64 = 1 << 60;
/// Partitions of `isolation` when nothing else is said; an eighth of them are never read.
const ISOLATION_PARTITIONS: u32 = 64;

impl BenchArgs {
    /// Partitions of the topic.
    pub(crate) fn partition_count(&self) -> u32 {
        let default = if self.mode == Mode::Isolation { ISOLATION_PARTITIONS } else { 1 };
        self.partitions.unwrap_or(default)
    }

    pub(super) fn misuse(&self) -> Option<&'static str> {
        let bytes = self.records.unwrap_or(1).checked_mul(self.record_size);
        if bytes.is_none_or(|bytes| bytes > MOST_BYTES) {
            return Some("--records times --record-size is more than can be counted");
        }
        match self.mode {
            // A topic that is there may have other partitions; then they decide.
            Mode::Isolation
                if self.topic.is_none() && self.stalled.is_some_and(|stalled| stalled >= self.partition_count()) =>
            {
                Some("--stalled must be less than --partitions: somebody has to read")
            }
            Mode::E2e if self.record_size < NUMBER_BYTES as u64 => {
                Some("--record-size must be at least 8 for e2e: a record carries its number")
            }
            _ => None,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Producers, as fast as they can or at --throughput.
    Produce,
    /// A consumer over records that were produced just before (which is not counted).
    Consume,
    /// From the moment a record is due to the moment a consumer has it.
    E2e,
    /// The same bytes over bare QUIC between two processes, and round trips of a record: what the transport can do.
    Raw,
    /// The same batches written to a file, each of them synced: what the disk can do.
    Disk,
    /// Readers on one connection beside others that never read.
    Isolation,
}

impl Mode {
    /// The name in the answer.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Produce => "produce",
            Mode::Consume => "consume",
            Mode::E2e => "e2e",
            Mode::Raw => "raw",
            Mode::Disk => "disk",
            Mode::Isolation => "isolation",
        }
    }
}

/// A topic's durability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Durability {
    /// Acknowledged when it is on stable storage.
    Flushed,
    /// Acknowledged when it is in the memory of the in-sync replicas.
    Replicated,
}

/// Which way the bytes of `bench raw` go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// From the other process, as a consumer's do.
    Receive,
    /// To the other process, as a producer's do.
    Send,
}
