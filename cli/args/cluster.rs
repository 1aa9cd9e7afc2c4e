//! `headwater cluster ...`: the brokers of a cluster.

use crate::spec::byte_size;
use clap::{ArgGroup, Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Shows who is in the cluster: its brokers, who votes on the metadata, who is the controller, and what is not as it should be.
    Describe {
        /// What the broker that is asked knows, though others may know more; answers also without a majority.
        #[arg(long)]
        stale: bool,
    },
    /// Says in one line whether a broker may be stopped now, and which; exits 1 if none may.
    ///
    /// A broker may be stopped if the metadata keep their majority without it, and every partition its leader and as many in-sync
    /// replicas as min.insync.replicas asks for.
    Health {
        /// Whether this one may be stopped.
        #[arg(value_name = "ID")]
        id: Option<i32>,
    },
    /// Makes the data folder of the first broker of a new cluster; then start it.
    ///
    /// Its configuration names the cluster's brokers (controller.quorum.bootstrap.servers), and its certificate is one that
    /// `headwater cert broker` made.
    Init(FolderArgs),
    /// Makes the data folder of another broker of a cluster, of which a broker runs; then start it.
    ///
    /// It follows the metadata and serves; `cluster voters add` lets it vote.
    Join {
        #[command(flatten)]
        folder: FolderArgs,
        /// The broker was in the cluster before another one was recovered (`cluster unsafe-recover`): what it kept of the metadata is
        /// thrown away, its partitions stay.
        #[arg(long)]
        again: bool,
    },
    /// Changes which brokers vote on the metadata. Three or five are right: the cluster goes on while most of them run.
    #[command(subcommand)]
    Voters(VotersCommand),
    /// Elects leaders: those that should lead, or where nobody leads one that may miss records.
    Elect(ElectArgs),
    /// Moves a partition to other brokers; shows what moves; cancels it.
    ///
    /// The new replicas copy the partition while the old ones serve it, which leave once all of the new ones are in sync.
    Reassign(ReassignArgs),
    /// Evens out which brokers keep and lead how many partitions, and in how many racks, with as few moves as possible; waits until
    /// that is done.
    Rebalance {
        /// Only says what would move.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        pace: PaceArgs,
    },
    /// Moves everything that a broker keeps to others, and says when it may be stopped and removed.
    ///
    /// From the first moment on it is given nothing new: no topic that is created is placed on it, and `rebalance` moves nothing there, until
    /// the drain is cancelled or the broker is removed. Refused where too few others are active to take what it keeps. Said again, what moves
    /// already goes on at the pace that is said now.
    Drain {
        /// The broker's id.
        #[arg(value_name = "ID")]
        id: i32,
        /// What has not moved yet stays, and the broker may be given partitions again.
        #[arg(long, conflicts_with_all = ["throttle", "no_wait"])]
        cancel: bool,
        #[command(flatten)]
        pace: PaceArgs,
    },
    /// Forgets a broker that does not run any more, does not vote and keeps no partition.
    Remove {
        /// The broker's id.
        #[arg(value_name = "ID")]
        id: i32,
    },
    /// LOSES METADATA: makes a cluster of one broker of a stopped broker's folder, where most of its voters are lost FOR GOOD.
    ///
    /// What the others knew and this one does not is lost, and with it records that it does not know of. Never do this while a majority
    /// can come back: there would be two clusters of one name. Then start this broker, and have every other one begin anew:
    /// `headwater cluster join --again`.
    UnsafeRecover {
        #[command(flatten)]
        folder: FolderArgs,
        /// The cluster's id (`meta.properties` in the data folder says it): that you know what you do. Without it you are asked for it,
        /// at a terminal; elsewhere nothing is done.
        #[arg(long, value_name = "CLUSTER_ID")]
        yes_lose_what_only_others_know: Option<String>,
    },
    /// Shows which commands the cluster may be given, and raises that once every broker runs the newer Headwater.
    Upgrade {
        /// Raises the feature level to the highest that every broker can. It never falls: older brokers cannot come back after this.
        #[arg(long)]
        finalize: bool,
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

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("kind").required(true).args(["preferred", "unclean"]))]
pub(crate) struct ElectArgs {
    /// The first of each partition's replicas leads, where it is in sync. Nothing is lost.
    #[arg(long)]
    pub(crate) preferred: bool,
    /// Where nobody leads, a replica leads that MAY MISS ACKNOWLEDGED RECORDS: those are LOST then, for good.
    #[arg(long)]
    pub(crate) unclean: bool,
    /// Only this topic's partitions.
    #[arg(long, value_name = "TOPIC")]
    pub(crate) topic: Option<String>,
    /// Only says what an unclean election would do, and what it may lose.
    #[arg(long, conflicts_with = "preferred")]
    pub(crate) dry_run: bool,
    /// Does an unclean election without asking. Needed where nobody sits at a terminal to be asked.
    #[arg(long, conflicts_with_all = ["preferred", "dry_run"])]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct ReassignArgs {
    /// The topic.
    #[arg(long, value_name = "TOPIC", required = true)]
    pub(crate) topic: Option<String>,
    /// The partition.
    #[arg(long, value_name = "N", required = true)]
    pub(crate) partition: Option<u32>,
    /// The brokers that are to keep it; the first should lead.
    #[arg(long, value_name = "ID,...", required = true, value_delimiter = ',')]
    pub(crate) replicas: Vec<i32>,
    /// Bytes a second that each broker takes in at most, of all the partitions together that move to it: 500kB, 10MiB.
    ///
    /// Replicas that are in sync are not slowed down. The whole command said again with another limit changes it, for this partition; where
    /// partitions that move to one broker have different limits, the highest is the broker's and each keeps to its own besides.
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub(crate) throttle: Option<u64>,
    #[command(subcommand)]
    pub(crate) command: Option<ReassignCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReassignCommand {
    /// Shows every partition that moves, and how far its new replicas are.
    Status,
    /// Partitions that move stay where they were: all, those of a topic, or one.
    Cancel {
        /// Only this topic's.
        #[arg(long, value_name = "TOPIC")]
        topic: Option<String>,
        /// Only this partition.
        #[arg(long, value_name = "N", requires = "topic")]
        partition: Option<u32>,
    },
}

/// How fast partitions move, and whether that is waited for.
#[derive(Debug, Args)]
pub(crate) struct PaceArgs {
    /// Bytes a second that each broker takes in at most, of all the partitions together that move to it: 500kB, 10MiB.
    ///
    /// Replicas that are in sync are not slowed down.
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub(crate) throttle: Option<u64>,
    /// Does not wait until everything has moved; `cluster reassign status` shows how far it is.
    #[arg(long)]
    pub(crate) no_wait: bool,
}
