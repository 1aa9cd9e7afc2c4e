//! `headwater cluster unsafe-recover | join --again`: what is left when the majority is lost for good.

use anyhow::{Context, Result, bail};
use headwater_broker::cluster::{self, Prepared, Recovered};
use headwater_broker::config::BrokerConfig;
use serde_json::json;

use super::read;
use crate::args::{FolderArgs, Global};
use crate::confirm::{ask, is_somebody_there};
use crate::output::{complain, note, plural, print_json};

/// `headwater cluster unsafe-recover`.
pub(super) fn recover(global: &Global, args: &FolderArgs, cluster_id: Option<String>) -> Result<()> {
    let config = read(&args.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cluster_id = match cluster_id {
        Some(cluster_id) => cluster_id,
        None => runtime.block_on(ask_for_id(&config))?,
    };
    let recovered = runtime
        .block_on(cluster::recover(&config, &cluster_id))
        .with_context(|| format!("{} is not recovered, and is as it was", config.data_dir.display()))?;
    let Recovered { version, uncommitted, voters } = recovered;
    complain(format_args!(
        "UNSAFE RECOVERY: broker {} is a metadata quorum BY ITSELF now, at version {version}. WHAT ONLY THE OTHERS KNEW IS LOST.",
        config.broker_id
    ));
    complain(format_args!(
        "Topics that it does not know are not deleted by this: their folders are set aside (*-stray) on the brokers that join again, and stay there until you delete them."
    ));
    if uncommitted > 0 {
        complain(format_args!(
            "{} that no majority was known to have count now.",
            plural(uncommitted as i64, "metadata entry").replace("entrys", "entries")
        ));
    }
    if global.json {
        return print_json(&json!({
            "cluster_id": cluster_id,
            "id": config.broker_id,
            "metadata_version": version,
            "uncommitted": uncommitted,
            "voters_before": voters,
        }));
    }
    note(
        global,
        format_args!(
            "Start it: headwater broker --config {}. On every other broker, which must not run on as it is: headwater cluster join --config FILE --again",
            args.config.display()
        ),
    );
    Ok(())
}

/// Says what is lost, and has a person type the cluster's id.
async fn ask_for_id(config: &BrokerConfig) -> Result<String> {
    let data = config.data_dir.display();
    let cluster_id = cluster::cluster_of(config).await.with_context(|| format!("{data} cannot be recovered"))?;
    complain(format_args!(
        "UNSAFE RECOVERY of {data}: whatever only the other brokers know is LOST FOR GOOD, topics and acknowledged records among it. Do this only \
         when most voters never come back."
    ));
    if !is_somebody_there() {
        bail!("nothing was done: --yes-lose-what-only-others-know {cluster_id} says that this is meant");
    }
    ask(format!("Type the cluster's id ({cluster_id}) to do it:"), &cluster_id).await?;
    Ok(cluster_id)
}

/// `headwater cluster join --again`.
pub(super) fn join_again(global: &Global, args: &FolderArgs) -> Result<()> {
    let config = read(&args.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let joined = runtime.block_on(cluster::join_again(&config)).context("cannot join the cluster again")?;
    let (Prepared { cluster_id, broker_id }, former) = joined;
    let data = config.data_dir.display().to_string();
    let former = former.map(|path| path.display().to_string());
    if global.json {
        return print_json(&json!({ "cluster_id": cluster_id, "id": broker_id, "data": data, "former": former }));
    }
    if let Some(former) = &former {
        note(global, format_args!("what the broker knew of the metadata stays in {former}"));
    }
    let start = format!("headwater broker --config {}", args.config.display());
    note(global, format_args!("{data} is that of broker {broker_id} of cluster {cluster_id} again; start it: {start}"));
    Ok(())
}
