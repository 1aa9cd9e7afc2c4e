//! `headwater group ...`

use crate::spec::{ResetTarget, TopicSelection};
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// Lists the groups.
    List,
    /// Shows a group: its members, what it committed and how far it lags.
    Describe {
        /// The group.
        group: String,
    },
    /// Shows a group's members and their partitions.
    Members {
        /// The group.
        group: String,
    },
    /// Moves a group's offsets. Only shows what would happen unless --execute is given.
    Reset(ResetArgs),
    /// Deletes a group that has no members, with its offsets.
    Delete {
        /// The group.
        group: String,
    },
    /// Deletes what a group committed for a topic.
    DeleteOffsets(DeleteOffsetsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ResetArgs {
    /// The group; it must have no members.
    pub(crate) group: String,
    /// The topic, or some of its partitions: `flights`, `flights:0,2`. May be given several times; with --to file:F it
    /// may be left out.
    #[arg(long, value_name = "TOPIC[:PARTITIONS]")]
    pub(crate) topic: Vec<TopicSelection>,
    /// Where to: earliest, latest, current, offset:N, time:RFC3339 (the first record at or after it), shift:N,
    /// duration:D (that long ago), or file:F (lines `topic,partition,offset`, as --export prints them).
    #[arg(long, value_name = "WHERE", allow_hyphen_values = true, required = true)]
    pub(crate) to: ResetTarget,
    /// Do it.
    #[arg(long)]
    pub(crate) execute: bool,
    /// Print the plan as CSV for file:F.
    #[arg(long)]
    pub(crate) export: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteOffsetsArgs {
    /// The group.
    pub(crate) group: String,
    /// The topic, or some of its partitions; may be given several times.
    #[arg(long, value_name = "TOPIC[:PARTITIONS]", required = true)]
    pub(crate) topic: Vec<TopicSelection>,
}
