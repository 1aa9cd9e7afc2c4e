//! `headwater topic ...`

use crate::spec::Setting;
use clap::{ArgGroup, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum TopicCommand {
    /// Creates a topic.
    Create {
        /// The topic's name: letters, digits, `.`, `_` and `-`.
        name: String,
        /// How many partitions. Without it: the broker's default, one.
        #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        partitions: Option<u32>,
        /// How many brokers keep each partition. Without it: the broker's default.
        #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        replication_factor: Option<u32>,
        /// Which brokers keep each partition, by hand, the leader first: 1:2:3,2:3:1 are two partitions of three replicas. Without it
        /// the cluster spreads them over brokers and racks.
        #[arg(long, value_name = "ID:ID,...", value_delimiter = ',', value_parser = crate::spec::replicas,
              conflicts_with_all = ["partitions", "replication_factor"])]
        replica_placement: Vec<crate::spec::Replicas>,
        /// A setting under Kafka's name, such as retention.ms=3600000.
        #[arg(short, long = "config", value_name = "KEY=VALUE")]
        config: Vec<Setting>,
    },
    /// Lists the topics; or the partitions that are not as they should be.
    #[command(group = ArgGroup::new("trouble").args(["under_replicated", "under_min_isr", "offline"]))]
    List {
        /// Only partitions of which a replica is not in sync.
        #[arg(long)]
        under_replicated: bool,
        /// Only partitions that take no records with acks=all, as too few replicas are in sync.
        #[arg(long)]
        under_min_isr: bool,
        /// Only partitions that nobody leads.
        #[arg(long)]
        offline: bool,
        /// Shows what the broker that is asked knows, which may be old. Needs no majority of the voters.
        #[arg(long)]
        stale: bool,
    },
    /// Shows a topic: its partitions with their offsets, and its settings with their sources.
    Describe {
        /// The topic.
        name: String,
        /// Shows what the broker that is asked knows, which may be old. Needs no majority of the voters.
        #[arg(long)]
        stale: bool,
    },
    /// Changes settings.
    Alter {
        /// The topic.
        name: String,
        /// A setting under Kafka's name.
        #[arg(short, long = "config", value_name = "KEY=VALUE", required_unless_present = "unset")]
        config: Vec<Setting>,
        /// A setting that goes back to the broker's value.
        #[arg(long, value_name = "KEY")]
        unset: Vec<String>,
    },
    /// Raises the number of partitions. Keys change their partition, as they do in Kafka.
    AddPartitions {
        /// The topic.
        name: String,
        /// The new number of partitions in all.
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        partitions: u32,
    },
    /// Deletes a topic, its records and what groups committed for it: FOR GOOD.
    ///
    /// Whoever sits at a terminal is asked first. A script that names a topic means it.
    Delete {
        /// The topic.
        name: String,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Deletes a partition's records below an offset: FOR GOOD.
    ///
    /// Whoever sits at a terminal is asked first. A script that names them means it.
    DeleteRecords {
        /// The topic.
        name: String,
        /// The partition.
        #[arg(long, value_name = "N")]
        partition: u32,
        /// The first offset that stays; `end` deletes every record there is.
        #[arg(long, value_name = "OFFSET", value_parser = crate::spec::before_offset)]
        before: i64,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
    },
}
