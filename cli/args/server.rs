//! `headwater up`, `broker`, `config`, `import` and `segment ...`: what runs without asking a broker.

use crate::spec::Setting;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// The broker's folder, or with --brokers the folder of all their folders; made if it is not there.
    #[arg(long, value_name = "DIR", default_value = "./headwater-data")]
    pub(crate) data: PathBuf,
    /// Where to listen for clients (UDP); port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,
    /// Where to serve /health, /ready and /metrics (TCP); port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) admin: Option<String>,
    /// Starts a cluster of N brokers on this machine, each a process of its own with a folder of its own below --data. They end with
    /// this command. One that was killed stays dead: `headwater broker --config DATA/ID/broker.toml` starts it again. Ports are free
    /// ones, and stay the same the next time; DATA/ID/broker.toml may say others.
    #[arg(long, value_name = "N", conflicts_with_all = ["listen", "admin"], value_parser = clap::value_parser!(u32).range(1..=99))]
    pub(crate) brokers: Option<u32>,
    /// A broker setting under Kafka's name, such as log.retention.check.interval.ms=500. `headwater broker config
    /// example` lists them all.
    #[arg(short, long = "config", value_name = "KEY=VALUE")]
    pub(crate) config: Vec<Setting>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct BrokerArgs {
    /// The configuration file; `headwater broker config example` prints one.
    #[arg(long, value_name = "FILE", required = true)]
    pub(crate) config: Option<PathBuf>,
    /// Ends when nobody holds its standard input open any more.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_ends: bool,
    #[command(subcommand)]
    pub(crate) command: Option<BrokerCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BrokerCommand {
    /// Shows or checks broker configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Prints a configuration file with every key, its default and its meaning.
    Example,
    /// Says whether a configuration file is right.
    Check {
        /// The configuration file.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The broker's folder; made if it is not there. No broker may run on it.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// One of Kafka's log directories.
    #[arg(value_name = "KAFKA_LOG_DIR")]
    pub(crate) source: PathBuf,
    /// Only this topic; may be given several times.
    #[arg(long, value_name = "TOPIC")]
    pub(crate) topic: Vec<String>,
    /// A setting of the imported topics. Their retention is unlimited unless it is set here.
    #[arg(short, long = "config", value_name = "KEY=VALUE")]
    pub(crate) config: Vec<Setting>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SegmentCommand {
    /// Prints every batch, and with --records every record.
    Dump(DumpArgs),
    /// Checks batches, offsets, indexes, checksums and snapshots; exits 1 and names every fault if there is one.
    Verify {
        /// A segment file or a partition's folder.
        #[arg(required = true)]
        path: Vec<PathBuf>,
    },
    /// Sizes, rates, compression, keys, times and gaps.
    Stats {
        /// A segment file or a partition's folder.
        #[arg(required = true)]
        path: Vec<PathBuf>,
    },
    /// Writes a repaired copy, and says exactly which offsets are lost.
    Repair(RepairArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// A segment file or a partition's folder.
    #[arg(required = true)]
    pub(crate) path: Vec<PathBuf>,
    /// The records too.
    #[arg(long)]
    pub(crate) records: bool,
    /// Only batches that reach this offset or a later one.
    #[arg(long, value_name = "N")]
    pub(crate) from_offset: Option<i64>,
    /// How to print keys and values as text.
    #[arg(long, value_name = "FORM", default_value = "utf8")]
    pub(crate) decode: Decode,
}

/// How keys and values are printed as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Decode {
    /// As text; bytes that are none are escaped.
    Utf8,
    /// As JSON, indented; what is none is printed as text.
    Json,
    /// As hexadecimal digits.
    Hex,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("where").required(true).args(["out", "in_place"]))]
pub(crate) struct RepairArgs {
    /// A segment file or a partition's folder.
    pub(crate) path: PathBuf,
    /// The folder that becomes the repaired partition; must not exist yet, or be empty.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Repair in place; the original is kept beside it.
    #[arg(long)]
    pub(crate) in_place: bool,
}
