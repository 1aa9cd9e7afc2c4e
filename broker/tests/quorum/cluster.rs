//! Members of a quorum in one process: each with its own thread, files and socket, and a relay before it.

use super::relay::Network;
use headwater_broker::metadata::command::{self, Command, command::Command as Kind};
use headwater_broker::metadata::raft::{
    Applied, Founding, Hearing, Links, LinksConfig, RaftNode, RaftServer, RaftThread, Store, links, new_node_id,
};
use headwater_broker::metadata::{MetadataError, MetadataState, Outcome};
use headwater_broker::quic;
use headwater_proto::TopicId;
use headwater_proto::limits::ALPN;
use headwater_storage::{Files, OsFiles};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls_pki_types::PrivatePkcs8KeyDer;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::{Instant, timeout_at};

pub(crate) const CLUSTER: &str = "cluster";
/// A broker that is active, which topics are kept on.
const KEEPER: i32 = 100;

/// Nothing here takes long; what takes longer than this hangs.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// One certificate for all, and who trusts it.
pub(crate) struct Trust {
    server: quinn::ServerConfig,
    client: quinn::ClientConfig,
}

impl Trust {
    pub(crate) fn new() -> Trust {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        let provider = Arc::new(quic::crypto_provider());
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .expect("it fits");
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut roots = rustls::RootCertStore::empty();
        roots.add(made.cert.der().clone()).expect("a certificate");
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("a version")
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let server =
            quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).expect("a cipher suite")));
        let mut client =
            quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).expect("a cipher suite")));
        client.transport_config(Arc::new(links::transport()));
        Trust { server, client }
    }
}

/// A running member.
pub(crate) struct Running {
    pub(crate) node: RaftNode,
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) thread: RaftThread,
}

/// A broker's place: its folder and address stay when it goes.
pub(crate) struct Place {
    pub(crate) number: usize,
    pub(crate) folder: TempDir,
    pub(crate) files: Arc<dyn Files>,
    pub(crate) address: String,
    socket: Arc<Mutex<Option<SocketAddr>>>,
    pub(crate) running: Option<Running>,
}

pub(crate) struct Cluster {
    /// Where the sockets are served, by number; else it is the quorum's thread.
    pub(crate) data: Vec<tokio::runtime::Handle>,
    pub(crate) network: Arc<Network>,
    pub(crate) trust: Trust,
    pub(crate) places: Vec<Place>,
}

impl Cluster {
    /// So many places, nobody running.
    pub(crate) async fn of(members: usize) -> Cluster {
        let network = Arc::new(Network::default());
        let mut places = Vec::new();
        for number in 0..members {
            let socket = Arc::default();
            let address = network.relay(number, Arc::clone(&socket)).await.to_string();
            let folder = tempfile::tempdir().expect("a folder");
            let files = Arc::new(OsFiles::new());
            places.push(Place { number, folder, files, address, socket, running: None });
        }
        Cluster { data: Vec::new(), network, trust: Trust::new(), places }
    }

    /// So many voters, and so many others that follow.
    pub(crate) async fn formed(voters: usize, observers: usize) -> Cluster {
        let mut cluster = Cluster::of(voters + observers).await;
        cluster.form(voters).await;
        cluster
    }

    /// All are started, so many vote, the others follow.
    pub(crate) async fn form(&mut self, voters: usize) {
        let (observers, cluster) = (self.places.len() - voters, self);
        cluster.start(0, Founding::Alone).await;
        for number in 1..voters + observers {
            cluster.start(number, Founding::Joins).await;
        }
        let others: Vec<(u64, String)> =
            (1..voters).map(|n| (cluster.id(n), cluster.places[n].address.clone())).collect();
        cluster.node(0).form(&others, soon()).await.expect("a quorum");
        for number in voters..voters + observers {
            cluster.node(number).join(soon()).await.expect("taken in");
        }
        // As of before there were clusters: it is active at once.
        let keeper = command::RegisterBroker { broker_id: KEEPER, ..Default::default() };
        propose(cluster.node(0), Kind::RegisterBroker(keeper).into()).await.expect("in force");
        for number in 0..voters + observers {
            cluster.register(number).await;
        }
    }

    /// The place gets another address; nobody is told, and nobody answers at the old one.
    pub(crate) async fn move_to_another_address(&mut self, number: usize) {
        let socket = Arc::default();
        let address = self.network.relay(number, Arc::clone(&socket)).await.to_string();
        (self.places[number].socket, self.places[number].address) = (socket, address);
    }

    pub(crate) async fn start(&mut self, number: usize, founding: Founding) {
        self.start_in(number, founding, CLUSTER).await;
    }

    /// Starts the member of a folder: the one that was there, or a new one.
    pub(crate) async fn start_in(&mut self, number: usize, founding: Founding, cluster_id: &str) {
        let configured = self.places.iter().map(|place| place.address.clone()).collect();
        let place = &mut self.places[number];
        let opened =
            Store::open(Arc::clone(&place.files), place.folder.path(), cluster_id, false, founding, new_node_id());
        let store = opened.expect("opens").store;
        let thread = RaftThread::start().expect("a thread");
        let endpoint = {
            let _entered = self.data.get(number).unwrap_or(thread.runtime()).enter();
            let any = "127.0.0.1:0".parse().expect("an address");
            quinn::Endpoint::server(self.trust.server.clone(), any).expect("a socket")
        };
        let socket = endpoint.local_addr().expect("bound");
        self.network.belongs(socket, number);
        *place.socket.lock().expect("whole") = Some(socket);
        let config = LinksConfig {
            cluster_id: cluster_id.to_owned(),
            node_id: store.node_id(),
            address: place.address.clone(),
            start: None,
            configured,
            client: self.trust.client.clone(),
            server_name: "localhost".to_owned(),
            peers: None,
        };
        let links = Links::new(&thread, endpoint.clone(), config);
        let linked = links.clone();
        let started = thread.runtime().spawn(async move { RaftNode::start_linked(store, linked, soon()).await });
        let node = started.await.expect("no panic").expect("starts");
        let server = RaftServer::new(node.clone(), links, Hearing::new(Duration::from_millis(600)));
        let accepting = endpoint.clone();
        thread.runtime().spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let server = server.clone();
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        server.serve(connection, None).await;
                    }
                });
            }
        });
        place.running = Some(Running { node, endpoint, thread });
    }

    /// Ends a member without a word to anybody.
    pub(crate) async fn kill(&mut self, number: usize) {
        let others = 0..self.places.len();
        self.network.cut(others.flat_map(|other| [(number, other), (other, number)]));
        let Running { node, endpoint, thread, .. } = self.places[number].running.take().expect("it runs");
        node.stop().await;
        endpoint.close(0u32.into(), b"");
        endpoint.wait_idle().await;
        drop(thread);
        *self.places[number].socket.lock().expect("whole") = None;
        self.network.heal_all_of(number);
    }

    pub(crate) fn node(&self, number: usize) -> &RaftNode {
        &self.places[number].running.as_ref().expect("it runs").node
    }

    pub(crate) fn id(&self, number: usize) -> u64 {
        self.node(number).node_id()
    }

    /// Whoever has this member's id.
    pub(crate) fn number_of(&self, node_id: u64) -> usize {
        let mut running = self.places.iter().filter(|place| place.running.is_some());
        running.find(|place| self.id(place.number) == node_id).expect("it runs").number
    }

    /// Registers the broker of a member, as a start does.
    pub(crate) async fn register(&self, number: usize) {
        let register = Kind::RegisterBroker(self.registration(number));
        self.node(number).propose(register.into(), true, soon()).await.expect("in force");
    }

    pub(crate) fn registration(&self, number: usize) -> command::RegisterBroker {
        let state = state(self.node(number));
        let broker_id = i32::try_from(number).expect("few");
        let boots = state.broker(broker_id).map_or(0, |known| known.boots) + 1;
        command::RegisterBroker {
            broker_id,
            incarnation: rand::random::<[u8; 16]>().to_vec().into(),
            address: self.places[number].address.clone(),
            boots,
            node_id: self.id(number),
            ..Default::default()
        }
    }

    /// Waits until all of these know one leader among them: its number.
    pub(crate) async fn leader_among(&self, numbers: impl IntoIterator<Item = usize> + Clone) -> usize {
        let numbers: BTreeSet<usize> = numbers.into_iter().collect();
        let ids: BTreeSet<u64> = numbers.iter().map(|number| self.id(*number)).collect();
        loop {
            let mut known = BTreeSet::new();
            for number in &numbers {
                let mut metrics = self.node(*number).metrics();
                let leads = metrics.wait_for(|now| now.current_leader.is_some_and(|leader| ids.contains(&leader)));
                let leads = timeout_at(soon(), leads).await.expect("in time").expect("it runs");
                known.extend(leads.current_leader);
            }
            if let [leader] = known.into_iter().collect::<Vec<_>>()[..] {
                return self.number_of(leader);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Waits until a member has applied this entry.
    pub(crate) async fn applied(&self, number: usize, index: u64) -> Arc<Applied> {
        let mut applied = self.node(number).applied();
        let there = applied.wait_for(|applied| applied.last_log_id.is_some_and(|last| last.index >= index));
        let there =
            timeout_at(soon(), there).await.unwrap_or_else(|_| panic!("member {number} has not applied {index}"));
        Arc::clone(&there.expect("it runs"))
    }

    /// Waits until a member's members are these.
    pub(crate) async fn members(&self, number: usize, voters: &[u64], observers: &[u64]) {
        let (voters, observers) = (set(voters), set(observers));
        let mut metrics = self.node(number).metrics();
        let are = metrics.wait_for(|now| {
            let members = now.membership_config.membership();
            members.get_joint_config() == std::slice::from_ref(&voters)
                && members.learner_ids().collect::<BTreeSet<_>>() == observers
        });
        let are = timeout_at(soon(), are).await;
        assert!(are.is_ok(), "{:?}", self.node(number).membership());
    }
}

fn set(ids: &[u64]) -> BTreeSet<u64> {
    ids.iter().copied().collect()
}

pub(crate) fn state(node: &RaftNode) -> Arc<MetadataState> {
    Arc::clone(&node.applied().borrow().state)
}

pub(crate) fn topic_id(n: u64) -> TopicId {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    TopicId::from_bytes(id)
}

pub(crate) fn create(n: u64) -> Command {
    Kind::CreateTopic(command::CreateTopic {
        name: format!("topic-{n}"),
        topic_id: topic_id(n).to_wire(),
        partitions: vec![command::Replicas { brokers: vec![KEEPER] }],
        ..Default::default()
    })
    .into()
}

pub(crate) async fn propose(node: &RaftNode, command: Command) -> Result<(u64, Outcome), MetadataError> {
    node.propose(command, false, soon()).await
}

/// Empties a folder, as a new disk is.
pub(crate) fn empty(folder: &Path) {
    for file in std::fs::read_dir(folder).expect("there") {
        std::fs::remove_file(file.expect("read").path()).expect("removed");
    }
}
