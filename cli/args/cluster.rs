//! `headwater cluster ...`: the brokers of a cluster.

use crate::spec::byte_size;
use clap::{ArgGroup, Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Shows the cluster at a glance: its brokers, who votes on the metadata, which one is the controller; what is wrong, and what to do
    /// about it.
    ///
    /// A broker is active, fenced (not heard of, or not ready yet) or draining (about to stop, or drained). Of its partitions it leads some
    /// and follows the leaders of the others.
    Describe {
        /// Shows what the broker that is asked knows, which may be old. Needs no majority of the voters.
        #[arg(long)]
        stale: bool,
    },
    /// Says in one line whether a broker may be stopped now, and which; exits 1 if none may.
    ///
    /// A broker may be stopped if, without it, most voters still run, and every partition still has a leader and as many in-sync
    /// replicas as min.insync.replicas asks for. Of every partition without a leader it also says why, who has what was acknowledged, and what
    /// is to be done; nothing else tells that.
    Health {
        /// Only whether this broker may be stopped.
        #[arg(value_name = "ID")]
        id: Option<i32>,
        /// As far as the broker that is asked knows, which may be old; and how many voters answer it. Needs no majority of them.
        #[arg(long)]
        stale: bool,
    },
    /// Makes a new cluster: prepares the data folder of its first broker. Then start it with `headwater broker --config FILE`.
    ///
    /// Needed before: a certificate in that folder (`headwater cert ca`, `headwater cert broker`), and a configuration that names
    /// broker.id, listen, data.dir and some of the cluster's addresses (controller.quorum.bootstrap.servers).
    Init(FolderArgs),
    /// Adds a broker to a cluster that runs: prepares its data folder. Then start it with `headwater broker --config FILE`.
    ///
    /// It needs the same as the first one (`cluster init`). It serves at once, but keeps nothing before topics are created or `cluster
    /// rebalance` moves something there, and has no vote on the metadata before `cluster voters add`. A broker whose disk was emptied or
    /// replaced is added again in the same way, under its id: it votes again by itself if it did before, and fetches its partitions.
    Join {
        #[command(flatten)]
        folder: FolderArgs,
        /// For a broker that was in the cluster before another one was recovered by `cluster unsafe-recover`: what it kept of the
        /// metadata is thrown away; its partitions stay.
        #[arg(long)]
        again: bool,
    },
    /// Changes which brokers vote on the metadata. Three or five are right: the cluster can be changed while most of them run.
    #[command(subcommand)]
    Voters(VotersCommand),
    /// Elects leaders of partitions: those that are preferred, or, where there is no leader, one that may miss records.
    Elect(ElectArgs),
    /// Moves a partition to other brokers, shows what moves (`status`), or stops that (`cancel`).
    ///
    /// The new replicas copy the partition while the old ones go on serving it. Once all of the new ones are in sync, the old ones leave.
    /// The command itself does not wait for that.
    Reassign(ReassignArgs),
    /// Gives every active broker an even share of partitions and leaders, and spreads partitions over racks, with as few moves as
    /// possible. Waits until that is done.
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
    /// the drain is cancelled or the broker is removed. (Below feature level 3, which `cluster upgrade` tells and raises, that is not so: it says
    /// so at its end.) Refused where too few others are active to take what it keeps. Said again, what moves already goes on at the pace that
    /// is said now.
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
    /// MAY LOSE DATA: for when most voters are lost FOR GOOD. Makes one stopped broker a cluster by itself.
    ///
    /// What only the others knew is lost: topics, settings, and where acknowledged records are. Never do this while most voters can come
    /// back: there would be two clusters of one name. After it, start this broker, and have every other one that is left begin anew:
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
    /// Where the first of a partition's replicas is in sync, it leads. Nothing is lost.
    #[arg(long)]
    pub(crate) preferred: bool,
    /// Where a partition has no leader, a replica leads that MAY MISS ACKNOWLEDGED RECORDS: those are LOST then, for good. Says first
    /// which, and asks.
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
    /// The ids of the brokers that are to keep it, separated by commas; the first is the preferred leader.
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
    /// Leaves partitions that move where they were: all of them, those of a topic, or one.
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
