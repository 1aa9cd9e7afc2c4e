//! `headwater cluster ...`

mod describe;
mod health;
mod moves;
mod recover;

use anyhow::{Context, Result};
use headwater_broker::cluster::{self, Prepared};
use headwater_client::Admin;
use serde_json::json;

use self::describe::Description;
use super::broker::read;
use crate::args::{ClusterCommand, FolderArgs, Global, VotersCommand};
use crate::connect::with_client;
use crate::output::{note, print_json};

/// Runs one of the subcommands.
pub(crate) fn run(global: &Global, command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Init(args) => prepare(global, &args, true),
        ClusterCommand::Join { folder, again: false } => prepare(global, &folder, false),
        ClusterCommand::Join { folder, again: true } => recover::join_again(global, &folder),
        ClusterCommand::UnsafeRecover { folder, yes_lose_what_only_others_know: cluster_id } => {
            recover::recover(global, &folder, cluster_id)
        }
        ClusterCommand::Describe { stale } => with_client(global, async |client| {
            let admin = client.admin().impatient();
            let admin = if stale { admin.stale() } else { admin };
            describe::describe(global, &admin, stale).await
        }),
        ClusterCommand::Health { id, stale } => with_client(global, async |client| {
            let admin = client.admin().impatient();
            let admin = if stale { admin.stale() } else { admin };
            health::health(global, &admin, id).await
        }),
        ClusterCommand::Upgrade { finalize } => with_client(global, async |client| {
            let admin = client.admin();
            health::upgrade(global, &if finalize { admin } else { admin.impatient() }, finalize).await
        }),
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
    changed.with_context(|| match votes {
        true => format!("cannot let broker {id} vote"),
        false => format!("cannot take its vote from broker {id}"),
    })?;
    if global.json {
        return print_json(&json!({ "id": id, "votes": votes }));
    }
    note(global, format_args!("broker {id} {} on the metadata", if votes { "votes" } else { "does not vote" }));
    Ok(())
}
