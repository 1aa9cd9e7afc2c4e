//! Brokers of one cluster as processes, which reach each other, and are reached, through relays.

use super::clients::until;
use super::harness::{Answer, run};
use super::relay::{Network, address_of};
use super::serving::Process;
use headwater_broker::cluster;
use headwater_broker::config::BrokerConfig;
use headwater_client::{Client, ClientConfig, ClusterDescription, NewTopic, TopicDescription};
use serde_json::Value;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Time for one question, which is asked again.
const ASK: Duration = Duration::from_secs(10);

/// What a broker's folder has that is no data.
const IDENTITY: [&str; 3] = ["ca.pem", "broker.pem", "broker-key.pem"];

pub(crate) struct Cluster {
    folder: tempfile::TempDir,
    pub(crate) network: Arc<Network>,
    pub(crate) brokers: Vec<Node>,
    on: On,
    settings: String,
    cluster_id: String,
}

/// What brokers are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    /// The command that is shipped.
    Shipped,
    /// The command that is shipped, without relays between brokers: for figures.
    ShippedAlone,
    /// Brokers on files that remember what is not synced.
    UnsyncedFiles,
}

/// A broker, running or not.
pub(crate) struct Node {
    pub(crate) id: usize,
    listen: SocketAddr,
    advertised: SocketAddr,
    pub(crate) process: Option<Process>,
}

impl Cluster {
    /// So many brokers, of which the first three vote, with a setting a line for each of them; all of them are active.
    pub(crate) async fn start(brokers: usize, seed: u64, on: On, settings: &str) -> Cluster {
        let mut cluster = Cluster {
            folder: tempfile::tempdir().expect("a folder"),
            network: Network::new(seed),
            brokers: Vec::new(),
            on,
            settings: settings.to_owned(),
            cluster_id: String::new(),
        };
        run(&["cert", "ca", "--out", &cluster.path("ca"), "--cluster", "prod"]).ok();
        for _ in 0..brokers {
            cluster.place().await;
        }
        cluster.configure();
        for id in 1..=brokers {
            cluster.prepare(id).await;
            cluster.spawn(id);
        }
        for id in 1..=brokers {
            cluster.node(id).process.as_mut().expect("it was started").ready();
        }
        cluster.take_votes().await;
        cluster.wait_until_well(Instant::now() + super::harness::DEADLINE).await;
        cluster
    }

    /// A place for one more broker.
    async fn place(&mut self) -> usize {
        let id = self.brokers.len() + 1;
        let socket = UdpSocket::bind((address_of(id), 0)).expect("a port");
        let listen = socket.local_addr().expect("bound");
        let advertised = match self.on {
            On::ShippedAlone => listen,
            _ => self.network.relay(id, listen).await,
        };
        self.brokers.push(Node { id, listen, advertised, process: None });
        let own = address_of(id).to_string();
        let host = ["--host", "localhost", "--host", "127.0.0.1", "--host", &own];
        let (ca, data) = (self.path("ca"), self.data(id));
        let (data, id) = (data.to_str().expect("text"), id.to_string());
        run(&[&["cert", "broker", "--ca", &ca, "--id", &id, "--out", data], &host[..]].concat()).ok();
        self.brokers.len()
    }

    /// Writes everybody's configuration.
    fn configure(&self) {
        let servers: Vec<String> = self.brokers.iter().map(|node| node.advertised.to_string()).collect();
        for Node { id, listen, advertised, .. } in &self.brokers {
            let settings = format!(
                "\"data.dir\" = {:?}\n\"broker.id\" = {id}\nlisten = \"{listen}\"\n\"advertised.listener\" = \"{advertised}\"\n\
                 \"admin.listen\" = \"127.0.0.1:0\"\n\"controller.quorum.bootstrap.servers\" = {:?}\n{}\n",
                self.data(*id),
                servers.join(","),
                self.settings,
            );
            std::fs::write(self.config(*id), settings).expect("written");
        }
        let profile = format!("bootstrap = {servers:?}\nca = \"ca/ca.pem\"\n");
        std::fs::write(self.profile(), profile).expect("written");
    }

    /// Makes a broker's folder one of the cluster.
    async fn prepare(&mut self, id: usize) {
        let mut config = BrokerConfig::default();
        config.apply_file(&self.config(id)).expect("a configuration");
        let prepared = match self.cluster_id.is_empty() {
            true => cluster::init(&config).await,
            false => cluster::join_known(&config, self.cluster_id.clone()).await,
        };
        self.cluster_id = prepared.unwrap_or_else(|error| panic!("broker {id}: {error}")).cluster_id;
    }

    /// One more broker, which only follows the metadata. It is not waited for.
    pub(crate) async fn add(&mut self) -> usize {
        let id = self.place().await;
        self.configure();
        self.prepare(id).await;
        self.spawn(id);
        id
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("text").to_owned()
    }

    pub(crate) fn data(&self, id: usize) -> PathBuf {
        self.folder.path().join(format!("data-{id}"))
    }

    fn config(&self, id: usize) -> PathBuf {
        self.folder.path().join(format!("{id}.toml"))
    }

    fn log(&self, id: usize) -> PathBuf {
        self.folder.path().join(format!("{id}.err"))
    }

    pub(crate) fn profile(&self) -> PathBuf {
        self.folder.path().join("client.toml")
    }

    pub(crate) fn client(&self) -> ClientConfig {
        ClientConfig::from_profile(self.profile()).expect("a profile")
    }

    pub(crate) fn node(&mut self, id: usize) -> &mut Node {
        &mut self.brokers[id - 1]
    }

    /// Starts a broker that does not run. It serves once there is a quorum, which nobody waits for here.
    pub(crate) fn spawn(&mut self, id: usize) {
        let (config, log) = (self.config(id), self.log(id));
        let process = match self.on {
            On::UnsyncedFiles => Process::on_unsynced_files(&config, &log),
            On::Shipped | On::ShippedAlone => Process::shipped(&config, &log),
        };
        assert!(self.node(id).process.replace(process).is_none(), "broker {id} runs");
    }

    /// SIGKILL, for all of these before it is waited for the end of any.
    pub(crate) fn kill(&mut self, ids: &[usize]) {
        let mut killed: Vec<Process> = ids.iter().filter_map(|id| self.node(*id).process.take()).collect();
        killed.iter().for_each(|process| super::harness::signal(process.pid(), "KILL"));
        killed.iter_mut().for_each(Process::kill);
    }

    /// The disk of a broker that does not run is empty but for who it is; it is made one of the cluster anew.
    pub(crate) async fn replace_disk(&mut self, id: usize) {
        for entry in std::fs::read_dir(self.data(id)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let is_kept = path.file_name().is_some_and(|name| IDENTITY.iter().any(|kept| name == *kept));
            remove(&path, is_kept);
        }
        self.prepare(id).await;
    }

    /// A broker that does not run lacks every partition.
    pub(crate) fn empty_partitions(&self, id: usize) {
        for entry in std::fs::read_dir(self.data(id)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let is_partition = path.is_dir();
            remove(&path, !is_partition);
        }
    }

    /// Every broker that should run does, and nobody has panicked.
    pub(crate) fn check_processes(&mut self) {
        for id in 1..=self.brokers.len() {
            let log = self.log(id);
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(process) = &mut self.node(id).process {
                let tail = || said().lines().rev().take(12).map(|line| format!("\n  {line}")).collect::<String>();
                assert!(process.is_running(), "broker {id} ended by itself; the end of its log, backwards: {}", tail());
            }
            let panicked = said().lines().find(|line| line.contains("panicked at")).map(str::to_owned);
            assert_eq!(panicked, None, "broker {id}");
        }
    }

    /// Lets the first three vote.
    async fn take_votes(&self) {
        let deadline = Instant::now() + super::harness::DEADLINE;
        for id in 1..=self.brokers.len().min(3) {
            let id = i32::try_from(id).expect("few");
            until(deadline, "a vote", async || {
                let client = self.connect().await?;
                let told = client.admin().describe_cluster().await.map_err(|error| error.to_string())?;
                match told.voters.contains(&id) {
                    true => Ok(()),
                    false => client.admin().change_voters(id, true).await.map_err(|error| error.to_string()),
                }
            })
            .await;
        }
    }

    async fn connect(&self) -> Result<Client, String> {
        let config = ClientConfig { connect_timeout: ASK, request_timeout: ASK, ..self.client() };
        Client::connect(config).await.map_err(|error| error.to_string())
    }

    /// Runs `headwater ...` with these arguments against the cluster, beside what else happens.
    pub(crate) fn command(&self, args: &[&str]) -> JoinHandle<Answer> {
        let profile = self.profile().to_str().expect("text").to_owned();
        let line: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).chain(["--profile".into(), profile]).collect();
        tokio::task::spawn_blocking(move || {
            let answer = run(&line.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(!answer.stderr.contains("panicked"), "{line:?}: {}", answer.stderr);
            answer
        })
    }

    pub(crate) async fn create_topic(&self, name: &str, partitions: u32, replicas: u32, settings: &[(&str, &str)]) {
        let topic = NewTopic::new(name).partitions(partitions).replication_factor(replicas);
        let topic = settings.iter().fold(topic, |topic, (name, value)| topic.config(*name, *value));
        let client = self.connect().await.expect("they serve");
        client.admin().create_topic(topic).await.expect("created");
        client.close().await;
    }

    pub(crate) async fn describe(&self) -> Result<ClusterDescription, String> {
        let client = self.connect().await?;
        let told = client.admin().describe_cluster().await.map_err(|error| error.to_string());
        client.close().await;
        told
    }

    pub(crate) async fn describe_topic(&self, topic: &str) -> Result<TopicDescription, String> {
        let client = self.connect().await?;
        let told = client.admin().describe_topic(topic).await.map_err(|error| error.to_string());
        client.close().await;
        told
    }

    /// Whether all brokers that run are active, and all replicas in sync; else what is not well.
    pub(crate) async fn is_well(&self) -> Result<ClusterDescription, String> {
        let told = self.describe().await?;
        let active: Vec<i32> =
            told.brokers.iter().filter(|broker| broker.state != "fenced").map(|broker| broker.id).collect();
        let running = self.brokers.iter().filter(|node| node.process.is_some());
        let missing: Vec<usize> =
            running.map(|node| node.id).filter(|id| !active.iter().any(|other| *other as usize == *id)).collect();
        match missing.is_empty() && told.controller.is_some() && (told.under_replicated, told.offline) == (0, 0) {
            true => Ok(told),
            false => Err(format!(
                "not active: {missing:?}, controller {:?}, {} partitions under-replicated, {} offline",
                told.controller, told.under_replicated, told.offline
            )),
        }
    }

    pub(crate) async fn wait_until_well(&self, deadline: Instant) -> ClusterDescription {
        until(deadline, "all brokers are active and all replicas in sync", async || self.is_well().await).await
    }

    /// Stops all brokers in good order: what they keep of a topic is the same on each disk, batch by batch. How many batches that are.
    pub(crate) async fn check_replicas(&mut self, topic: &str) -> usize {
        let deadline = Instant::now() + super::harness::DEADLINE;
        let told = until(deadline, "where the topic is kept", async || self.describe_topic(topic).await).await;
        for id in 1..=self.brokers.len() {
            assert!(self.node(id).process.take().expect("it runs").stop(), "broker {id} stops in good order");
        }
        let mut count = 0;
        for partition in told.partitions {
            let kept = partition.replicas.iter().map(|broker| {
                let id = usize::try_from(*broker).expect("an id");
                (id, batches(&self.data(id).join(format!("{topic}-{}", partition.partition))))
            });
            let kept: Vec<(usize, Vec<Batch>)> = kept.collect();
            let (first, own) = kept.first().expect("it is kept");
            for (other, others) in &kept {
                let differs = own.iter().zip(others).position(|(one, other)| one != other);
                let at = differs.unwrap_or(own.len().min(others.len()));
                assert!(
                    own == others,
                    "partition {}: brokers {first} and {other} differ from batch {at} of {} and {} on: {:?}, {:?}",
                    partition.partition,
                    own.len(),
                    others.len(),
                    own.get(at),
                    others.get(at)
                );
            }
            count += own.len();
        }
        count
    }

    /// Leaves the folder where it is, for a person to look at.
    pub(crate) fn keep(&mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        self.folder.path().to_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the brokers' logs and data are in {}", self.keep().display());
        }
    }
}

/// What identifies a batch: where it begins and ends, its checksum and its leader epoch.
type Batch = [Value; 4];

/// The batches of a partition that nobody writes.
fn batches(folder: &Path) -> Vec<Batch> {
    let told = run(&["segment", "dump", "--json", folder.to_str().expect("text")]).ok().json();
    let batch = |told: &Value| ["base_offset", "last_offset", "crc", "leader_epoch"].map(|key| told[key].clone());
    told.iter().map(batch).collect()
}

fn remove(path: &Path, keep: bool) {
    let removed = match (keep, path.is_dir()) {
        (true, _) => Ok(()),
        (_, true) => std::fs::remove_dir_all(path),
        (_, false) => std::fs::remove_file(path),
    };
    removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
