//! Making a broker's folder one of a cluster: the first of a new one, or another one of a cluster that is there.
//!
//! Both only prepare the folder: which cluster and which broker it belongs to, and the journal of a new member of the metadata
//! quorum. The first one holds a quorum of one, so that it leads when it starts; every other one waits to be taken in. Nothing
//! is said to anybody but the question which cluster it is; so each can be done again where it was cut short.
//!
//! Where the majority of a quorum is lost for good, [`recover`] makes a quorum of one of a folder, and [`join_again`] has the others
//! begin anew.
//!
//! Owns: these. Refuses: folders that belong to a cluster already, or to another one. Read next: [`crate::metadata`].

use crate::config::BrokerConfig;
use crate::error::StartError;
use crate::metadata::journal::JOURNAL_FILE;
pub use crate::metadata::raft::recover::Recovered;
use crate::metadata::raft::{Founding, Store, new_node_id};
use crate::peer::{Met, Peers};
use crate::start::{configured, new_id};
use crate::tls;
use headwater_storage::{DataDir, Files, NewIdentity, OsFiles, files};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Time for a broker of the cluster to say which one it is.
const ASK: Duration = Duration::from_secs(30);
/// Time for one of them.
const ASK_ONE: Duration = Duration::from_secs(3);

/// What a folder belongs to now.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The cluster.
    pub cluster_id: String,
    /// The broker.
    pub broker_id: u32,
}

/// Makes the folder of the first broker of a new cluster.
///
/// # Errors
/// [`StartError`]: nothing was begun.
pub async fn init(config: &BrokerConfig) -> Result<Prepared, StartError> {
    check(config)?;
    open_tls(config).await?;
    prepare(config, new_id(), Founding::Alone).await
}

/// Makes the folder of another broker of the cluster that the configured servers belong to, one of which has to run. Brokers know each
/// other by their certificates.
///
/// # Errors
/// [`StartError`]: nothing was begun.
pub async fn join(config: &BrokerConfig) -> Result<Prepared, StartError> {
    check(config)?;
    let live = open_tls(config).await?;
    let any = SocketAddr::new(config.listen.ip(), 0);
    let endpoint = quinn::Endpoint::client(any).map_err(|error| StartError::Listen { address: any, error })?;
    let peers = Peers::new(endpoint, live, config, "");
    let cluster_id = ask(&peers, config).await?;
    join_known(config, cluster_id).await
}

/// As [`join`], of a cluster whose id is known.
///
/// # Errors
/// [`StartError`]: nothing was begun.
pub async fn join_known(config: &BrokerConfig, cluster_id: String) -> Result<Prepared, StartError> {
    check(config)?;
    prepare(config, cluster_id, Founding::Joins).await
}

/// Makes a quorum of one of the folder of a broker that does not run, where the majority of its cluster is lost for good. `cluster_id`
/// is what a person says: another one is refused.
///
/// # Errors
/// [`StartError`]: nothing changed.
pub async fn recover(config: &BrokerConfig, cluster_id: &str) -> Result<Recovered, StartError> {
    let cluster_id = cluster_id.to_owned();
    on_folder(config, move |files, folder| {
        folder.check_cluster(&cluster_id)?;
        Ok(Store::recover_alone(files, folder.root(), &cluster_id, new_node_id())?)
    })
    .await
}

/// Which cluster the folder of a broker that does not run belongs to.
///
/// # Errors
/// [`StartError`]: it is no such folder, or in use.
pub async fn cluster_of(config: &BrokerConfig) -> Result<String, StartError> {
    on_folder(config, |_, folder| Ok(folder.0.meta().cluster_id.clone())).await
}

/// Makes a new member of the metadata quorum of the folder of a broker that does not run: after [`recover`] of another one it has to be
/// taken in like a new one. Its partitions stay, and so does what the old member knew, in a file of its own: where that is comes back, if it knew
/// anything.
///
/// # Errors
/// [`StartError`]: nothing changed.
pub async fn join_again(config: &BrokerConfig) -> Result<(Prepared, Option<PathBuf>), StartError> {
    check(config)?;
    let live = open_tls(config).await?;
    let any = SocketAddr::new(config.listen.ip(), 0);
    let endpoint = quinn::Endpoint::client(any).map_err(|error| StartError::Listen { address: any, error })?;
    let cluster_id = ask(&Peers::new(endpoint, live, config, ""), config).await?;
    let broker_id = config.broker_id;
    on_folder(config, move |files, folder| {
        folder.check_cluster(&cluster_id)?;
        let former = Store::begin_anew(files, folder.root(), &cluster_id, new_node_id())?;
        Ok((Prepared { cluster_id, broker_id }, former))
    })
    .await
}

/// A broker's folder, locked.
struct Folder(DataDir);

impl Folder {
    fn root(&self) -> &std::path::Path {
        self.0.path()
    }

    fn check_cluster(&self, named: &str) -> Result<(), StartError> {
        let (ours, root) = (&self.0.meta().cluster_id, self.root().display());
        match ours == named {
            true => Ok(()),
            false => Err(StartError::Quorum(format!("{root} is of cluster {ours}, not of {named}"))),
        }
    }
}

/// Does something to the folder of a broker that does not run.
async fn on_folder<T: Send + 'static>(
    config: &BrokerConfig,
    change: impl FnOnce(Arc<dyn Files>, &Folder) -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    let (root, broker_id) = (config.data_dir.clone(), config.broker_id);
    let changed = tokio::task::spawn_blocking(move || {
        let files: Arc<dyn Files> = Arc::new(OsFiles::new());
        let journal = root.join(JOURNAL_FILE);
        let is_there = files::exists(&*files, &journal);
        if !is_there.map_err(|error| StartError::Boots { path: journal, error })? {
            return Err(StartError::NoCluster(root));
        }
        let identity = NewIdentity { cluster_id: new_id(), broker_id, directory_id: new_id() };
        // Nobody else may have it.
        let folder = Folder(DataDir::open(Arc::clone(&files), &root, &identity)?);
        change(files, &folder)
    });
    changed.await.map_err(|error| StartError::Quorum(error.to_string()))?
}

fn check(config: &BrokerConfig) -> Result<(), StartError> {
    config.check()?;
    if config.quorum_servers().is_empty() {
        let why =
            "controller.quorum.bootstrap.servers is not set: a broker without it is a cluster by itself".to_owned();
        return Err(StartError::Quorum(why));
    }
    if config.tls_ca.is_none() && !config.data_dir.join(tls::CA_FILE).exists() {
        let why = "there are no certificates of a cluster (tls.certificate, tls.key and tls.ca, or the files that \
                   `headwater cert broker` leaves, in the data folder): brokers know each other by nothing else";
        return Err(StartError::Quorum(why.to_owned()));
    }
    Ok(())
}

async fn open_tls(config: &BrokerConfig) -> Result<Arc<tls::live::Live>, StartError> {
    let (root, given, broker_id, listen) =
        (config.data_dir.clone(), configured(config), config.broker_id, config.listen);
    let opened = tokio::task::spawn_blocking(move || tls::open(&root, given, broker_id, listen)).await;
    let (live, _) = opened.map_err(|error| StartError::Quorum(error.to_string()))??;
    Ok(Arc::new(live))
}

/// Which cluster it is, of whoever answers first.
async fn ask(peers: &Peers, config: &BrokerConfig) -> Result<String, StartError> {
    let deadline = Instant::now() + ASK;
    let own = config.advertised_listener.clone().unwrap_or_else(|| config.listen.to_string());
    let mut last = "nobody but this broker is named".to_owned();
    loop {
        for server in config.quorum_servers().iter().filter(|server| **server != own) {
            match peers.who_is_at(server, deadline.min(Instant::now() + ASK_ONE)).await {
                Ok(Met { broker_id, is_alone: true, .. }) => {
                    return Err(StartError::Quorum(format!(
                        "broker {broker_id} at {server} is a cluster by itself and takes nobody in: set \
                         controller.quorum.bootstrap.servers in its configuration too, start it again, and then join"
                    )));
                }
                Ok(Met { cluster_id, .. }) => return Ok(cluster_id),
                Err(error) => last = error,
            }
        }
        let pause = tokio::time::sleep(Duration::from_millis(200));
        if timeout_at(deadline, pause).await.is_err() {
            return Err(StartError::Quorum(format!(
                "no broker of controller.quorum.bootstrap.servers answers: {last}"
            )));
        }
    }
}

async fn prepare(config: &BrokerConfig, cluster_id: String, founding: Founding) -> Result<Prepared, StartError> {
    let (root, broker_id) = (config.data_dir.clone(), config.broker_id);
    let prepared = tokio::task::spawn_blocking(move || {
        let files: Arc<dyn Files> = Arc::new(OsFiles::new());
        let journal = root.join(JOURNAL_FILE);
        let is_there = files::exists(&*files, &journal);
        let is_there = is_there.map_err(|error| StartError::Boots { path: journal.clone(), error })?;
        if is_there {
            return Err(StartError::InCluster(root));
        }
        let identity = NewIdentity { cluster_id, broker_id, directory_id: new_id() };
        let folder = DataDir::open(Arc::clone(&files), &root, &identity)?;
        // A try that was cut short has named the cluster already.
        let cluster_id = match founding {
            Founding::Alone => folder.meta().cluster_id.clone(),
            Founding::Joins if folder.meta().cluster_id != identity.cluster_id => {
                let (ours, theirs) = (&folder.meta().cluster_id, &identity.cluster_id);
                let why = format!("{} is of cluster {ours}, not of {theirs}", root.display());
                return Err(StartError::Quorum(why));
            }
            Founding::Joins => identity.cluster_id,
        };
        let has_partitions = !folder.partitions()?.is_empty();
        Store::open(files, &root, &cluster_id, has_partitions, founding, new_node_id())?;
        folder.close_clean()?;
        Ok(Prepared { cluster_id, broker_id })
    });
    prepared.await.map_err(|error| StartError::Quorum(error.to_string()))?
}
