//! Brokers of one cluster in this process, each with its folder, certificate and port.

use crate::harness::{Client, DEADLINE, within};
use headwater_broker::config::BrokerConfig;
use headwater_broker::metadata::raft::{Founding, Store};
use headwater_broker::tls::make::{Authority, Issued, Validity};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use headwater_broker::{Broker, StartError, cluster};
use headwater_proto::wire::{self, call::Request, call_response::Response};
use headwater_storage::{Files, OsFiles};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A cluster's authority.
pub(crate) struct Ca {
    authority: Authority,
    pem: String,
}

impl Ca {
    pub(crate) fn new() -> Ca {
        let (authority, issued) = Authority::make("prod", days(9), None).unwrap();
        Ca { authority, pem: issued.certificate_pem }
    }

    pub(crate) fn broker(&self, id: i32) -> Issued {
        self.authority.broker(id, &["localhost".into(), "127.0.0.1".into()], days(1)).unwrap()
    }

    pub(crate) fn client(&self, name: &str) -> Issued {
        self.authority.client(name, days(1)).unwrap()
    }

    fn put(&self, dir: &Path, id: i32) {
        let issued = self.broker(id);
        std::fs::write(dir.join(CERTIFICATE_FILE), &issued.certificate_pem).unwrap();
        std::fs::write(dir.join(KEY_FILE), &issued.key_pem).unwrap();
        std::fs::write(dir.join(CA_FILE), &self.pem).unwrap();
    }
}

/// From an hour ago, for so many days.
fn days(days: i64) -> Validity {
    let now_s: i64 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap();
    Validity { not_before_s: now_s - 3_600, not_after_s: now_s + days * 86_400 }
}

struct Node {
    dir: tempfile::TempDir,
    port: u16,
    /// Where it keeps its logs, if that is no ordinary disk.
    files: Option<Arc<dyn Files>>,
    broker: Option<Broker>,
}

/// Brokers 1, 2, ...; by their place from 0 on.
pub(crate) struct Nodes {
    pub(crate) ca: Ca,
    nodes: Vec<Node>,
    settings: Vec<String>,
}

impl Nodes {
    /// So many folders, nobody running.
    pub(crate) fn of(count: usize) -> Nodes {
        let ca = Ca::new();
        // All at once, so that nobody is given the same.
        let sockets: Vec<_> = (0..count).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let nodes = sockets.iter().zip(1..).map(|(socket, id)| {
            let dir = tempfile::tempdir().unwrap();
            ca.put(dir.path(), id);
            Node { dir, port: socket.local_addr().unwrap().port(), files: None, broker: None }
        });
        let nodes = nodes.collect();
        Nodes { ca, nodes, settings: Vec::new() }
    }

    /// A setting of all of them.
    pub(crate) fn set(&mut self, pair: &str) {
        self.settings.push(pair.to_owned());
    }

    /// What one of them keeps its logs on.
    pub(crate) fn on(&mut self, number: usize, files: Arc<dyn Files>) {
        self.nodes[number].files = Some(files);
    }

    pub(crate) fn config(&self, number: usize) -> BrokerConfig {
        let node = &self.nodes[number];
        let servers: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
        let mut config = BrokerConfig { data_dir: node.dir.path().to_owned(), ..BrokerConfig::default() };
        for pair in [
            format!("broker.id={}", number + 1),
            format!("listen=127.0.0.1:{}", node.port),
            "admin.listen=127.0.0.1:0".to_owned(),
            format!("controller.quorum.bootstrap.servers={}", servers.join(", ")),
            "request.timeout.ms=3000".to_owned(),
            // What follows is not about how long a machine with other work takes.
            "broker.session.timeout.ms=1500".to_owned(),
        ] {
            config.set_pair(&pair).unwrap();
        }
        self.settings.iter().for_each(|pair| config.set_pair(pair).unwrap());
        config
    }

    /// The first begins, the others join it, and so many vote.
    pub(crate) async fn form(&mut self, brokers: usize) {
        cluster::init(&self.config(0)).await.unwrap();
        self.start(0).await;
        for number in 1..brokers {
            self.join(number).await;
            let votes = wire::ChangeVoters { broker_id: number as i32 + 1, votes: true };
            let done = self.client(0).await.call(Request::ChangeVoters(votes)).await;
            assert!(matches!(done, Response::Done(_)), "{done:?}");
        }
        for number in 0..brokers {
            self.until(number, "all are active", |told| brokers_of(told, "active").len() == brokers).await;
        }
    }

    pub(crate) async fn join(&mut self, number: usize) {
        within("join", cluster::join(&self.config(number))).await.unwrap();
        self.start(number).await;
    }

    pub(crate) async fn start(&mut self, number: usize) {
        let (config, files) = (self.config(number), self.nodes[number].files.clone());
        self.nodes[number].broker = Some(within("start", start(config, files)).await);
    }

    /// Why it does not start.
    pub(crate) async fn start_refused(&self, number: usize) -> String {
        let started = try_start(self.config(number), self.nodes[number].files.clone());
        within("start", started).await.expect_err("it does not start").to_string()
    }

    /// None of them can without another one.
    pub(crate) async fn start_all(&mut self, numbers: impl Iterator<Item = usize> + Clone) {
        let starting = numbers.clone().map(|number| start(self.config(number), self.nodes[number].files.clone()));
        let started = within("start", futures::future::join_all(starting)).await;
        for (number, broker) in numbers.zip(started) {
            self.nodes[number].broker = Some(broker);
        }
    }

    /// As a process that is killed: nobody is told.
    pub(crate) fn kill(&mut self, number: usize) {
        drop(self.nodes[number].broker.take().expect("it runs"));
    }

    /// The broker, which does not run, has an empty disk; whoever runs it puts its certificate there.
    pub(crate) fn renew_disk(&mut self, number: usize) {
        let dir = tempfile::tempdir().unwrap();
        self.ca.put(dir.path(), number as i32 + 1);
        self.nodes[number].dir = dir;
    }

    /// What is on the disk of a broker that does not run.
    pub(crate) fn copy_disk(&self, number: usize) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(self.nodes[number].dir.path(), copy.path());
        copy
    }

    /// The broker, which does not run, has this disk from now on.
    pub(crate) fn change_disk(&mut self, number: usize, disk: tempfile::TempDir) {
        self.nodes[number].dir = disk;
    }

    /// Which member of the metadata quorum a broker is that does not run.
    pub(crate) fn node_id(&self, number: usize) -> u64 {
        // Not on the disk itself: opening it may write.
        let (copy, files) = (self.copy_disk(number), Arc::new(OsFiles::new()));
        let cluster_id = self.broker(0).cluster_id();
        let opened = Store::open(files, copy.path(), cluster_id, true, Founding::Joins, 1);
        opened.unwrap().store.node_id()
    }

    pub(crate) async fn stop(&mut self, number: usize) {
        let broker = self.nodes[number].broker.take().expect("it runs");
        assert!(within("shutdown", broker.shutdown()).await, "in good order");
    }

    /// All at the same time.
    pub(crate) async fn stop_all(&mut self, count: usize) {
        let brokers: Vec<Broker> = self.nodes.iter_mut().take(count).filter_map(|node| node.broker.take()).collect();
        let stopped = futures::future::join_all(brokers.into_iter().map(Broker::shutdown));
        assert!(within("shutdown", stopped).await.into_iter().all(|clean| clean), "in good order");
    }

    /// Where a broker is, or was.
    pub(crate) fn address(&self, number: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.nodes[number].port))
    }

    pub(crate) fn broker(&self, number: usize) -> &Broker {
        self.nodes[number].broker.as_ref().expect("it runs")
    }

    pub(crate) async fn client(&self, number: usize) -> Client {
        Client::connect(self.broker(number)).await
    }

    pub(crate) async fn describe(&self, number: usize, stale: bool) -> wire::DescribeClusterResponse {
        match self.client(number).await.call(Request::DescribeCluster(wire::DescribeCluster { stale })).await {
            Response::DescribeCluster(told) => told,
            other => panic!("{other:?}"),
        }
    }

    /// Asks until the answer is as it should be.
    pub(crate) async fn until(
        &self,
        number: usize,
        what: &str,
        is_so: impl Fn(&wire::DescribeClusterResponse) -> bool,
    ) -> wire::DescribeClusterResponse {
        let (client, began) = (self.client(number).await, Instant::now());
        loop {
            let told = client.call(Request::DescribeCluster(wire::DescribeCluster { stale: false })).await;
            match told {
                Response::DescribeCluster(told) if is_so(&told) => return told,
                told => assert!(began.elapsed() < DEADLINE, "{what}: {told:?}"),
            }
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let there = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&there).unwrap();
            copy_folder(&entry.path(), &there);
        } else {
            std::fs::copy(entry.path(), there).unwrap();
        }
    }
}

/// A folder that was just let go of may be locked for another moment.
async fn start(config: BrokerConfig, files: Option<Arc<dyn Files>>) -> Broker {
    try_start(config, files).await.unwrap_or_else(|error| panic!("{error}"))
}

async fn try_start(config: BrokerConfig, files: Option<Arc<dyn Files>>) -> Result<Broker, StartError> {
    loop {
        let started = match &files {
            Some(files) => Broker::start_on(config.clone(), Arc::clone(files)).await,
            None => Broker::start(config.clone()).await,
        };
        match started {
            Err(StartError::DataDir(_) | StartError::Listen { .. }) => tokio::task::yield_now().await,
            started => return started,
        }
    }
}

/// The brokers in this state.
pub(crate) fn brokers_of(told: &wire::DescribeClusterResponse, state: &str) -> Vec<i32> {
    told.brokers.iter().filter(|broker| broker.state == state).map(|broker| broker.broker_id).collect()
}
