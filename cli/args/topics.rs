//! `headwater topic ...`

use crate::spec::Setting;
use clap::Subcommand;

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
        /// A setting under Kafka's name, such as retention.ms=3600000.
        #[arg(short, long = "config", value_name = "KEY=VALUE")]
        config: Vec<Setting>,
    },
    /// Lists the topics.
    List {
        /// What the broker that is asked knows, though others may know more; answers also without a majority.
        #[arg(long)]
        stale: bool,
    },
    /// Shows a topic: its partitions with their offsets, and its settings with their sources.
    Describe {
        /// The topic.
        name: String,
        /// What the broker that is asked knows, though others may know more; answers also without a majority.
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
    /// Deletes a topic, its records and what groups committed for it.
    Delete {
        /// The topic.
        name: String,
    },
    /// Deletes a partition's records below an offset.
    DeleteRecords {
        /// The topic.
        name: String,
        /// The partition.
        #[arg(long, value_name = "N")]
        partition: u32,
        /// The first offset that stays; `end` deletes every record there is.
        #[arg(long, value_name = "OFFSET", value_parser = crate::spec::before_offset)]
        before: i64,
    },
}
