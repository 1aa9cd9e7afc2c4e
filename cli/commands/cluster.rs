//! `headwater cluster ...`

mod health;
mod moves;
mod recover;

use anyhow::{Context, Result};
use headwater_broker::cluster::{self, Prepared};
use headwater_client::{Admin, ClusterBroker, ClusterDescription};
use serde::Serialize;
use serde_json::json;

use super::broker::read;
use crate::args::{ClusterCommand, FolderArgs, Global, VotersCommand};
use crate::connect::with_client;
use crate::output::{note, plural, print, print_json, table};

/// Runs one of the subcommands.
pub(crate) fn run(global: &Global, command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Init(args) => prepare(global, &args, true),
        ClusterCommand::Join { folder, again: false } => prepare(global, &folder, false),
        ClusterCommand::Join { folder, again: true } => recover::join_again(global, &folder),
        ClusterCommand::UnsafeRecover { folder, yes_lose_what_only_others_know: cluster_id } => {
            recover::recover(global, &folder, &cluster_id)
        }
        ClusterCommand::Describe { stale } => with_client(global, async |client| {
            let admin = client.admin();
            let admin = if stale { admin.stale() } else { admin };
            let told = admin.describe_cluster().await.context("cannot describe the cluster")?;
            if global.json { print_json(&Description::from(&told)) } else { print(text(&told)) }
        }),
        ClusterCommand::Health { id } => {
            with_client(global, async |client| health::health(global, &client.admin(), id).await)
        }
        ClusterCommand::Upgrade { finalize } => {
            with_client(global, async |client| health::upgrade(global, &client.admin(), finalize).await)
        }
        ClusterCommand::Elect(args) => {
            with_client(global, async |client| moves::elect(global, &client.admin(), &args).await)
        }
        ClusterCommand::Reassign(args) => {
            with_client(global, async |client| moves::reassign(global, &client.admin(), args).await)
        }
        ClusterCommand::Rebalance { dry_run, pace } => {
            with_client(global, async |client| moves::rebalance(global, &client.admin(), dry_run, &pace).await)
        }
        ClusterCommand::Drain { id, cancel: true, .. } => {
            with_client(global, async |client| moves::cancel_drain(global, &client.admin(), id).await)
        }
        ClusterCommand::Drain { id, cancel: false, pace } => {
            with_client(global, async |client| moves::drain(global, &client.admin(), id, &pace).await)
        }
        ClusterCommand::Voters(command) => with_client(global, async |client| {
            let admin = client.admin();
            match command {
                VotersCommand::Add { id } => voters(global, &admin, id, true).await,
                VotersCommand::Remove { id } => voters(global, &admin, id, false).await,
            }
        }),
        ClusterCommand::Remove { id } => with_client(global, async |client| {
            let admin = client.admin();
            admin.remove_broker(id).await.with_context(|| format!("cannot forget broker {id}"))?;
            if global.json {
                let told = admin.describe_cluster().await.context("cannot describe the cluster")?;
                return print_json(&Description::from(&told));
            }
            note(global, format_args!("broker {id} is forgotten"));
            Ok(())
        }),
    }
}

fn prepare(global: &Global, args: &FolderArgs, is_first: bool) -> Result<()> {
    let config = read(&args.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let prepared = runtime.block_on(async {
        match is_first {
            true => cluster::init(&config).await.context("cannot make a cluster"),
            false => cluster::join(&config).await.context("cannot join the cluster"),
        }
    });
    let Prepared { cluster_id, broker_id } = prepared?;
    let data = config.data_dir.display().to_string();
    if global.json {
        return print_json(&json!({ "cluster_id": cluster_id, "id": broker_id, "data": data }));
    }
    let start = format!("headwater broker --config {}", args.config.display());
    note(global, format_args!("{data} is that of broker {broker_id} of cluster {cluster_id}; start it: {start}"));
    Ok(())
}

async fn voters(global: &Global, admin: &Admin, id: i32, votes: bool) -> Result<()> {
    let changed = admin.change_voters(id, votes).await;
    changed.with_context(|| format!("cannot {} broker {id} vote", if votes { "let" } else { "no longer let" }))?;
    if global.json {
        return print_json(&json!({ "id": id, "votes": votes }));
    }
    note(global, format_args!("broker {id} {} on the metadata", if votes { "votes" } else { "does not vote" }));
    Ok(())
}

#[derive(Serialize)]
struct Description<'a> {
    cluster_id: &'a str,
    controller: Option<i32>,
    controller_epoch: u64,
    voters: &'a [i32],
    observers: &'a [i32],
    brokers: Vec<Broker<'a>>,
    under_replicated: u64,
    under_min_isr: u64,
    offline: u64,
    metadata_version: u64,
}

#[derive(Serialize)]
struct Broker<'a> {
    id: i32,
    incarnation: &'a str,
    address: &'a str,
    rack: &'a str,
    state: &'a str,
    leaders: u64,
    partitions: u64,
    registered: i64,
}

impl<'a> From<&'a ClusterDescription> for Description<'a> {
    fn from(told: &'a ClusterDescription) -> Description<'a> {
        let brokers = told.brokers.iter().map(|broker| Broker {
            id: broker.id,
            incarnation: &broker.incarnation,
            address: &broker.address,
            rack: &broker.rack,
            state: &broker.state,
            leaders: broker.leaders,
            partitions: broker.partitions,
            registered: broker.registered_ms,
        });
        Description {
            cluster_id: &told.cluster_id,
            controller: told.controller,
            controller_epoch: told.controller_epoch,
            voters: &told.voters,
            observers: &told.observers,
            brokers: brokers.collect(),
            under_replicated: told.under_replicated,
            under_min_isr: told.under_min_isr,
            offline: told.offline,
            metadata_version: told.metadata_version,
        }
    }
}

/// The cluster at a glance: what is wrong stands first.
fn text(told: &ClusterDescription) -> String {
    let gone: Vec<String> =
        told.brokers.iter().filter(|broker| broker.state == "fenced").map(|broker| broker.id.to_string()).collect();
    let mut faults = Vec::new();
    if told.controller.is_none() {
        faults.push("no controller is in office".to_owned());
    }
    if !gone.is_empty() {
        faults.push(format!("not heard of: broker {}", gone.join(", ")));
    }
    for (count, what) in [
        (told.offline, "without a leader"),
        (told.under_min_isr, "under min.insync.replicas"),
        (told.under_replicated, "under-replicated"),
    ] {
        if count > 0 {
            faults.push(format!("{} {what}", plural(i128::from(count), "partition")));
        }
    }
    let state = if faults.is_empty() { "all is well".to_owned() } else { faults.join("; ") };
    let mut text = format!("cluster {}, {}: {state}\n\n", told.cluster_id, plural(told.brokers.len() as i64, "broker"));
    text += &table(
        &["broker", "state", "metadata", "leads", "keeps", "rack", "address"],
        told.brokers.iter().map(|broker| {
            vec![
                broker.id.to_string(),
                broker.state.clone(),
                part_of(told, broker),
                broker.leaders.to_string(),
                broker.partitions.to_string(),
                broker.rack.clone(),
                broker.address.clone(),
            ]
        }),
    );
    text += &format!("\nmetadata version {}, controller epoch {}\n", told.metadata_version, told.controller_epoch);
    text
}

/// What a broker does for the metadata.
fn part_of(told: &ClusterDescription, broker: &ClusterBroker) -> String {
    let votes = if told.voters.contains(&broker.id) {
        "votes"
    } else if told.observers.contains(&broker.id) {
        "follows"
    } else {
        "-"
    };
    if told.controller == Some(broker.id) { format!("{votes}, controller") } else { votes.to_owned() }
}
