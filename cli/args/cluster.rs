//! `headwater cluster ...`: the brokers of a cluster.

use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Shows who is in the cluster: its brokers, who votes on the metadata, who is the controller, and what is not as it should be.
    Describe {
        /// What the broker that is asked knows, though others may know more; answers also without a majority.
        #[arg(long)]
        stale: bool,
    },
    /// Makes the data folder of the first broker of a new cluster; then start it.
    ///
    /// Its configuration names the cluster's brokers (controller.quorum.bootstrap.servers), and its certificate is one that
    /// `headwater cert broker` made.
    Init(FolderArgs),
    /// Makes the data folder of another broker of a cluster, of which a broker runs; then start it.
    ///
    /// It follows the metadata and serves; `cluster voters add` lets it vote.
    Join(FolderArgs),
    /// Changes which brokers vote on the metadata. Three or five are right: the cluster goes on while most of them run.
    #[command(subcommand)]
    Voters(VotersCommand),
    /// Forgets a broker that does not run any more, does not vote and keeps no partition.
    Remove {
        /// The broker's id.
        #[arg(value_name = "ID")]
        id: i32,
    },
}

#[derive(Debug, Args)]
pub(crate) struct FolderArgs {
    /// The broker's configuration file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VotersCommand {
    /// Lets a broker vote, once it has caught up.
    Add {
        /// The broker's id.
        #[arg(value_name = "ID")]
        id: i32,
    },
    /// Lets a broker only follow. Refused where the quorum would be lost.
    Remove {
        /// The broker's id.
        #[arg(value_name = "ID")]
        id: i32,
    },
}
