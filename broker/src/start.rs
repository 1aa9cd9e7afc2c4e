//! Starting and stopping a broker.
//!
//! Owns: the order. Start: lock the data folder, serve the admin port, certificates, replay the metadata, register this incarnation (which
//! raises every leader epoch), recover the partitions, then groups, and only then serve. Who is one of several recovers before it registers,
//! so that it can name what it lost. Stop: hand leaderships over, take nothing new, append and acknowledge what was received, close the
//! logs in parallel, and write the clean-shutdown marker last, unless a partition is fenced. Refuses: signals and logging, which are the command's. Read next: [`crate::server`].

use crate::admin::{self, Shown};
use crate::assignments::{self, Assigned, Assignments};
use crate::cleaner::Cleaner;
use crate::clock::now_ms;
use crate::cluster_metrics;
use crate::config::BrokerConfig;
use crate::error::StartError;
use crate::group::{Groups, Standing};
use crate::metadata::command::{Command, RegisterBroker, TopicPartition};
use crate::metadata::handle::CarryOut;
use crate::metadata::handle::common::Common;
use crate::metadata::journal::JOURNAL_FILE;
use crate::metadata::raft::office::Effect;
use crate::metadata::raft::{Founding, NoNetwork, Office, RaftNode, Store, new_node_id, node};
use crate::metadata::several::{Known, Member, Place, begin_start};
use crate::metadata::state::FEATURE_LEVEL;
use crate::metadata::{MetadataError, MetadataHandle, MetadataState, Partition, alone};
use crate::metrics::Metrics;
use crate::partitions::{Lost, Partitions, Strays, set_strays_aside};
use crate::peer::Peers;
use crate::pool::Pool;
use crate::replica::throttle::Throttles;
use crate::server::Door;
use crate::shared::Shared;
use crate::watch::TELLING;
use crate::{import, os, quic, runtime, server, tls};
use headwater_proto::{ResetCode, TopicId};
use headwater_storage::import::{self as storage_import, Manifest};
use headwater_storage::{DataDir, DataDirError, Files, NewIdentity, OsFiles};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often samples are folded into histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Time for the last frames to reach their peers when the broker goes.
const GOODBYE: Duration = Duration::from_secs(1);

/// Time for the metadata to be led and to take what a start says.
const METADATA_START: Duration = Duration::from_secs(60);
/// How long a data folder may be another process's that is about to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// How often it is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A running broker. Dropping it without [`shutdown`](Broker::shutdown) stops serving at once, as if it had crashed.
pub struct Broker {
    shared: Arc<Shared>,
    endpoint: quinn::Endpoint,
    tasks: TaskTracker,
    profile: Option<PathBuf>,
}

impl Broker {
    /// Starts a broker in the current tokio runtime; [`crate::runtime::build`] makes the one that suits it best. Returns
    /// once everything was recovered and clients are served. Raises the process's soft limit on open files to the hard one.
    ///
    /// # Errors
    /// [`StartError`]: nothing was started.
    pub async fn start(config: BrokerConfig) -> Result<Broker, StartError> {
        let files = Arc::new(OsFiles::with_open_limit(os::open_segments(config.open_segments)));
        Broker::start_on(config, files).await
    }

    /// As [`start`](Broker::start), on other files: a simulation that fails or loses what was not synced. Certificates
    /// are files of the operating system all the same.
    ///
    /// # Errors
    /// [`StartError`]: nothing was started.
    pub async fn start_on(config: BrokerConfig, files: Arc<dyn Files>) -> Result<Broker, StartError> {
        Broker::start_by(config, files, None).await
    }

    /// As [`start_on`](Broker::start_on), by metadata that others go by too.
    ///
    /// # Errors
    /// [`StartError`]: nothing was started.
    pub async fn start_among(
        config: BrokerConfig,
        files: Arc<dyn Files>,
        common: Common,
    ) -> Result<Broker, StartError> {
        Broker::start_by(config, files, Some(common)).await
    }

    async fn start_by(
        config: BrokerConfig,
        files: Arc<dyn Files>,
        common: Option<Common>,
    ) -> Result<Broker, StartError> {
        config.check()?;
        match Box::pin(Broker::start_once(config.clone(), Arc::clone(&files), common.clone())).await {
            Err(StartError::OlderDisk(why)) => {
                tracing::error!(why, "this disk is an older copy: the broker begins as a new member of the quorum");
                Box::pin(Broker::start_once(config, files, common)).await
            }
            started => started,
        }
    }

    async fn start_once(
        config: BrokerConfig,
        files: Arc<dyn Files>,
        common: Option<Common>,
    ) -> Result<Broker, StartError> {
        let pool = Pool::start(runtime::io_threads(&config)).map_err(StartError::Threads)?;
        let run = Run::default();
        // Whatever was begun ends again if the rest fails, or nobody waits for it.
        let begun = (run.shutdown.clone().drop_guard(), run.closed.clone().drop_guard());
        match start(config, files, common, pool.clone(), &run).await {
            Ok(broker) => {
                begun.0.disarm();
                begun.1.disarm();
                Ok(broker)
            }
            Err(error) => {
                drop(begun);
                run.tasks.close();
                // They hold the data folder: whoever tries again finds it free.
                drop(timeout(GOODBYE, run.tasks.wait()).await);
                pool.close();
                Err(error)
            }
        }
    }

    /// Where clients connect.
    pub fn listen_addr(&self) -> SocketAddr {
        self.shared.listen
    }

    /// Where `/health`, `/ready` and `/metrics` are served.
    pub fn admin_addr(&self) -> SocketAddr {
        self.shared.admin
    }

    /// PEM of the authority that clients have to trust: the one in use; `None` where a certificate was configured without one.
    pub fn ca_pem(&self) -> Option<String> {
        self.shared.tls.ca_pem()
    }

    /// Dials other brokers of the cluster as this one.
    pub fn peers(&self) -> Peers {
        Peers::new(self.endpoint.clone(), Arc::clone(&self.shared.tls), &self.shared.config, &self.shared.cluster_id)
    }

    /// The client profile that was written beside the development certificate.
    pub fn profile(&self) -> Option<&Path> {
        self.profile.as_deref()
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> &str {
        &self.shared.cluster_id
    }

    /// Stops the broker: takes nothing new, appends and acknowledges what was received (for as long as the settings
    /// permit), closes every log. True: all of it was in good order, and the next start need not recover.
    pub async fn shutdown(self) -> bool {
        let shared = Arc::clone(&self.shared);
        tracing::info!("shutting down");
        if let Some(ready) = &shared.ready {
            ready.drain().await;
        }
        if let Some(node) = &shared.node {
            // What is in force may be published a moment later.
            let index = node.applied().borrow().state.index();
            drop(shared.metadata.published(index, Instant::now() + TELLING).await);
        }
        // Whoever is sent away knows by then where to go.
        shared.leaving.cancel();
        shared.watches.close();
        if timeout(TELLING, shared.watches.wait()).await.is_err() {
            tracing::info!(
                streams = shared.watches.len(),
                "some of those who watch have not heard in time who leads now"
            );
        }
        shared.shutdown.cancel();
        let drain = Duration::from_millis(shared.config.shutdown_timeout_ms);
        if timeout(drain, shared.sessions.wait()).await.is_err() {
            tracing::warn!(
                connections = shared.connections.count(),
                "some connections did not end in time and are cut"
            );
        }
        self.endpoint.close(ResetCode::ShuttingDown.number().into(), b"the broker is shutting down");
        shared.groups.shutdown().await;
        self.tasks.close();
        let mut clean = timeout(drain.max(GOODBYE), shared.partitions.close()).await.unwrap_or_else(|_| {
            tracing::error!("closing the logs takes too long; the next start recovers them");
            false
        });
        shared.closed.cancel();
        // The endpoint's last packets; whoever does not hear them notices by itself.
        drop(timeout(GOODBYE, self.endpoint.wait_idle()).await);
        drop(timeout(GOODBYE, self.tasks.wait()).await);
        clean &= shared.partitions.close_data_dir(clean).await;
        let pool = shared.pool.clone();
        pool.close();
        if clean {
            // Nothing is under way any more; a thread that hangs in the disk would have spoiled `clean`.
            drop(tokio::task::spawn_blocking(move || pool.join()).await);
        }
        tracing::info!(clean, "shut down");
        clean
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.shared.shutdown.cancel();
        self.shared.closed.cancel();
        self.endpoint.close(ResetCode::ShuttingDown.number().into(), b"");
        self.shared.pool.close();
    }
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Broker").field("listen", &self.shared.listen).finish_non_exhaustive()
    }
}

/// A broker's tasks, and what they end by.
#[derive(Default)]
struct Run {
    tasks: TaskTracker,
    /// Nothing new is taken.
    shutdown: CancellationToken,
    /// Everything is closed.
    closed: CancellationToken,
}

async fn start(
    config: BrokerConfig,
    files: Arc<dyn Files>,
    common: Option<Common>,
    pool: Pool,
    Run { tasks, shutdown, closed }: &Run,
) -> Result<Broker, StartError> {
    let (root, started_ms) = (config.data_dir.clone(), now_ms());
    let metrics = Arc::new(Metrics::new());
    check_folder(&config, &files, &pool).await?;
    // The folder is locked before anything in it is touched.
    let identity = NewIdentity { cluster_id: new_id(), broker_id: config.broker_id, directory_id: new_id() };
    let data_dir = Arc::new(open_folder(&files, &root, &identity, &pool).await?);
    for fault in data_dir.faults() {
        tracing::error!(%fault, "a checkpoint is damaged: recovery scans more, or logs are compacted from their beginnings");
    }
    if let Err(error) = data_dir.check_log_starts() {
        tracing::error!(%error, "no partition that was there before is served");
    }
    let cluster_id = data_dir.meta().cluster_id.clone();

    let socket = quic::bind(config.listen).map_err(|error| StartError::Listen { address: config.listen, error })?;
    let listen = socket.local_addr().map_err(|error| StartError::Listen { address: config.listen, error })?;
    let listener = TcpListener::bind(config.admin).await;
    let listener = listener.map_err(|error| StartError::Listen { address: config.admin, error })?;
    let admin = listener.local_addr().map_err(|error| StartError::Listen { address: config.admin, error })?;
    let threads = runtime::io_threads(&config);
    let partitions =
        Arc::new(Partitions::new(Arc::clone(&data_dir), pool.clone(), threads, Arc::clone(&metrics), &config));
    let network_threads = u32::try_from(tokio::runtime::Handle::current().metrics().num_workers()).unwrap_or(u32::MAX);
    let shown = Arc::new(Shown {
        started_ms,
        network_threads,
        pool: pool.clone(),
        metrics: Arc::clone(&metrics),
        partitions: Arc::clone(&partitions),
        groups: OnceLock::new(),
        member: OnceLock::new(),
        shutdown: shutdown.clone(),
        closed: closed.clone(),
    });
    tasks.spawn(admin::serve(Arc::clone(&shown), listener));
    tracing::info!(%admin, data = %root.display(), "starting");

    let configured = configured(&config);
    // Clients find a broker by its profile where nobody configured what they have to trust.
    let with_profile = configured.is_none();
    let (live, seen, secret) = {
        let (root, broker_id) = (root.clone(), config.broker_id);
        pool.run(move || {
            let (live, seen) = tls::open(&root, configured, broker_id, listen)?;
            Ok::<_, tls::TlsError>((Arc::new(live), seen, tls::secret(&root)?))
        })
        .await?
    };
    let endpoint = quic::endpoint_of(&config, socket, &live, &secret)?;
    let peers = Peers::new(endpoint.clone(), Arc::clone(&live), &config, &cluster_id);
    partitions.join(peers.clone(), &config);
    let every = Duration::from_millis(config.tls_reload_interval_ms);
    tasks.spawn(Arc::clone(&live).keep(seen, every, pool.clone(), Arc::clone(&metrics), shutdown.clone()));

    let advertised = config.advertised_listener.clone().unwrap_or_else(|| tls::reachable(listen).to_string());
    let (serves, served) = watch::channel(None);
    let door = Door {
        config: config.clone(),
        tls: Arc::clone(&live),
        metrics: Arc::clone(&metrics),
        connections: Arc::default(),
        next_connection: AtomicU64::new(1),
        sessions: TaskTracker::new(),
        shutdown: shutdown.clone(),
        quorum: None,
        shared: served,
    };
    let (connections, sessions) = (Arc::clone(&door.connections), door.sessions.clone());
    let By { manifest, registration, state, source, door } = match common {
        Some(common) => {
            let found = Disk { config: &config, data_dir: &data_dir, pool: &pool, partitions: &partitions };
            by_common(common, registration(&config, advertised, 0), found, door).await?
        }
        None => {
            let place = Place { listen, advertised, peers };
            let found = Disk { config: &config, data_dir: &data_dir, pool: &pool, partitions: &partitions };
            by_quorum(place, found, (tasks, closed), (door, &endpoint)).await?
        }
    };

    let me = assignments::member(registration.broker_id, &registration.incarnation);
    let mut assignments = Assignments::new(&config, me);
    let assigned = assignments.of(&state);
    if matches!(source, Source::Quorum(..)) {
        let assigned = assignments::partitions(&assigned);
        let data_dir = Arc::clone(&data_dir);
        pool.run(move || set_strays_aside(&data_dir, &assigned, Strays::ByName)).await?;
    }
    drop(data_dir);
    let node = match &source {
        Source::Quorum(node, _) => Some(node.clone()),
        Source::Several(member, _) => Some(member.node.clone()),
        Source::Common(_) => None,
    };
    let (metadata, ready) = match source {
        Source::Several(member, office) => {
            // Whoever votes and controls waits for no partition.
            let (newest, mut news) = watch::channel(Arc::clone(&state));
            let tell = Box::new(move |state: Arc<MetadataState>| {
                newest.send_replace(state);
                Box::pin(std::future::ready(())) as futures::future::BoxFuture<'static, ()>
            });
            let office = (office, registration.clone());
            let (metadata, task) = MetadataHandle::new(member.node.clone(), state, office, tell, shutdown.clone());
            tasks.spawn_on(task, member.thread.runtime());
            let (carries_out, carried_out) = watch::channel(0);
            let known = Known {
                in_office: metadata.controller_epoch(),
                carried_out,
                lease: partitions.lease().clone(),
                disk: Arc::clone(partitions.disk()),
                elections: metrics.leader_election_seconds.clone(),
            };
            let ready = member.live(&registration, &config, known, closed);
            partitions.learn_from(&metadata);
            open_partitions(&partitions, &assigned).await;
            let (partitions, stop) = (Arc::clone(&partitions), shutdown.clone());
            tasks.spawn(async move {
                while let Some(Ok(())) = stop.run_until_cancelled(news.changed()).await {
                    let state = Arc::clone(&news.borrow_and_update());
                    // Roles wait for no disk; what is to be opened or deleted is done beside.
                    partitions.direct(&assignments.of(&state));
                    carries_out.send_replace(state.index());
                }
            });
            (metadata, Some(ready))
        }
        Source::Quorum(node, office) => {
            open_partitions(&partitions, &assigned).await;
            let (office, carry_out) = ((office, registration), carry_out(&partitions, assignments));
            let (metadata, task) = MetadataHandle::new(node, state, office, carry_out, shutdown.clone());
            tasks.spawn(task);
            partitions.learn_from(&metadata);
            (metadata, None)
        }
        Source::Common(common) => {
            open_partitions(&partitions, &assigned).await;
            let carry_out = carry_out(&partitions, assignments);
            let (metadata, task) = common.handle(state, carry_out, shutdown.clone());
            tasks.spawn(task);
            partitions.learn_from(&metadata);
            (metadata, None)
        }
    };
    let (keeping, ended) = (Arc::clone(&partitions), closed.clone());
    tasks.spawn(async move { ended.run_until_cancelled(keeping.keep_up()).await.unwrap_or(()) });
    let standing = if node.is_some() && ready.is_some() { Standing::Quorum } else { Standing::Alone };
    let groups = Groups::start(&config, metadata.clone(), Arc::clone(&partitions), pool.clone(), standing).await?;
    if let Some(manifest) = manifest {
        import::take_over_offsets(&manifest, &metadata.state(), &groups).await?;
        let root = root.clone();
        pool.run(move || storage_import::taken_over(&*files, &root)).await?;
        tracing::info!(topics = manifest.topics.len(), offsets = manifest.offsets.len(), "import taken over");
    }

    let profile = match with_profile {
        false => None,
        true => {
            let (root, hosts) = (root.clone(), live.hosts());
            Some(pool.run(move || tls::write_profile(&root, listen, &hosts)).await?)
        }
    };
    let intervals = (
        Duration::from_millis(config.checkpoint_interval_ms),
        Duration::from_millis(config.retention_check_interval_ms),
    );
    let shared = Arc::new(Shared {
        cluster_id,
        tls: live,
        started_ms,
        network_threads,
        listen,
        admin,
        pool,
        metrics,
        partitions,
        metadata,
        groups,
        connections,
        node,
        ready,
        loans: Arc::new(Semaphore::new(config.loan_bytes as usize)),
        throttles: Arc::new(Throttles::new()),
        sessions,
        watches: TaskTracker::new(),
        leaving: shutdown.child_token(),
        shutdown: shutdown.clone(),
        closed: closed.clone(),
        config,
    });
    let partitions = Arc::clone(&shared.partitions);
    let stop = shutdown.clone();
    tasks.spawn(async move { partitions.keep_checkpoints(intervals.0, stop).await });
    let (partitions, stop) = (Arc::clone(&shared.partitions), shutdown.clone());
    let delay = Duration::from_millis(shared.config.stray_delete_delay_ms);
    let metadata = shared.metadata.clone();
    let is_kept = move || metadata.state().may_have_forgotten();
    tasks.spawn(async move { partitions.delete_strays(delay, is_kept, stop).await });
    let partitions = Arc::clone(&shared.partitions);
    let stop = shutdown.clone();
    tasks.spawn(async move { partitions.enforce_retention(intervals.1, stop).await });
    if shared.config.cleaner_enabled {
        let cleaner = Cleaner {
            partitions: Arc::clone(&shared.partitions),
            pool: shared.pool.clone(),
            memory_bytes: usize::try_from(shared.config.cleaner_memory_bytes).unwrap_or(usize::MAX),
            backoff: Duration::from_millis(shared.config.cleaner_backoff_ms),
            shutdown: shutdown.clone(),
        };
        tasks.spawn(cleaner.run());
    }
    let (metrics, stop) = (Arc::clone(&shared.metrics), shutdown.clone());
    tasks.spawn(async move {
        while timeout(METRICS_UPKEEP, stop.cancelled()).await.is_err() {
            metrics.upkeep();
        }
    });
    serves.send_replace(Some(Arc::clone(&shared)));
    if let Some(door) = door {
        tasks.spawn(server::accept(Arc::new(door), endpoint.clone()));
    }
    let ended = closed.clone();
    tasks.spawn(async move {
        ended.cancelled().await;
        // Whoever waits for it waits no more.
        drop(serves);
    });
    // Nobody else sets them.
    drop(shown.member.set((shared.broker_id(), shared.node.clone())));
    drop(shown.groups.set(shared.groups.clone()));
    let (metadata, metrics, stop) = (shared.metadata.clone(), Arc::clone(&shared.metrics), shutdown.clone());
    tasks.spawn(cluster_metrics::watch(metadata, shared.broker_id(), metrics, stop));
    if let Some(ready) = &shared.ready {
        ready.say().await;
    }
    tracing::info!(%listen, %admin, cluster_id = shared.cluster_id, data = %root.display(), "serving");
    Ok(Broker { shared, endpoint, tasks: tasks.clone(), profile })
}

/// What a start knows of the metadata.
struct By {
    manifest: Option<Manifest>,
    registration: RegisterBroker,
    state: Arc<MetadataState>,
    source: Source,
    /// Of a broker that receives nobody yet.
    door: Option<Door>,
}

/// Who decides.
enum Source {
    /// The quorum, of which this is this broker's member, and the office that it has.
    Quorum(RaftNode, Office),
    /// As that, where there may be others.
    Several(Arc<Member>, Office),
    Common(Common),
}

/// What a broker has of its partitions.
#[derive(Clone, Copy)]
struct Disk<'a> {
    config: &'a BrokerConfig,
    data_dir: &'a Arc<DataDir>,
    pool: &'a Pool,
    partitions: &'a Partitions,
}

impl Disk<'_> {
    /// Looks at every replica that the broker is to keep, before it registers: those that are lost are named then.
    async fn examine(
        self,
        state: &MetadataState,
        registration: RegisterBroker,
        same_kernel: bool,
    ) -> Result<RegisterBroker, StartError> {
        let me = assignments::member(registration.broker_id, &registration.incarnation);
        let assigned = Assignments::new(self.config, me).of(state);
        let assigned = assignments::partitions(&assigned);
        let (data_dir, known) = (Arc::clone(self.data_dir), assigned.clone());
        self.pool.run(move || set_strays_aside(&data_dir, &known, Strays::ByTopic)).await?;
        let is_fenced = |partition: &Partition| partition.fenced.contains(&registration.broker_id);
        let fenced = state.topics().flat_map(|topic| {
            let fenced = topic.partitions.iter().zip(0..).filter(|(partition, _)| is_fenced(partition));
            fenced.map(|(_, number)| (topic.id, number))
        });
        let lost = self.partitions.examine(assigned, same_kernel, &fenced.collect()).await;
        let named = |lost: &Lost| TopicPartition { topic_id: lost.key.0.to_wire(), partition: lost.key.1 };
        Ok(RegisterBroker { lost: lost.iter().map(named).collect(), ..registration })
    }
}

async fn by_common(common: Common, registration: RegisterBroker, disk: Disk<'_>, door: Door) -> Result<By, StartError> {
    let registration = disk.examine(&common.state(), registration, true).await?;
    common.register(&registration).map_err(refused)?;
    let (state, source) = (common.state(), Source::Common(common));
    Ok(By { manifest: None, registration, state, source, door: Some(door) })
}

/// A broker of several: it comes in, and receives the others meanwhile.
async fn by_several(
    store: Store,
    place: Place,
    disk: Disk<'_>,
    (tasks, closed): (&TaskTracker, &CancellationToken),
    (door, endpoint): (Door, &quinn::Endpoint),
) -> Result<By, StartError> {
    let Disk { config, data_dir, pool, partitions } = disk;
    // From here on others decide about this broker.
    partitions.lease().limit();
    let registration = registration(config, place.advertised.clone(), store.node_id());
    let registration = RegisterBroker { directory_id: data_dir.meta().directory_id.clone(), ..registration };
    // Before anybody hears of it.
    let boots = begin_start(&registration, (data_dir.path(), data_dir.files(), pool)).await?;
    let start = boots.start();
    let member = Member::start(store, config, place, start, Instant::now() + METADATA_START).await?;
    let member = Arc::new(member);
    stop_at_last(tasks, &member.node, closed, Some(Arc::clone(&member)));
    let quorum = Some((member.server.clone(), member.thread.runtime().clone()));
    tasks.spawn(server::accept(Arc::new(Door { quorum, ..door }), endpoint.clone()));
    let registered = async {
        let state = member.come_in().await?;
        let registration = disk.examine(&state, registration, boots.is_of_kernel(os::kernel_start())).await?;
        member.register(registration, boots, (data_dir.path(), data_dir.files(), pool)).await
    };
    let registration = match registered.await {
        Err(StartError::OlderDisk(why)) => {
            // What it voted and acknowledged later is forgotten: nobody is that member any more.
            member.node.stop().await;
            let (data_dir, cluster_id) = (Arc::clone(data_dir), data_dir.meta().cluster_id.clone());
            let anew = pool.run(move || {
                Store::begin_anew(Arc::clone(data_dir.files()), data_dir.path(), &cluster_id, new_node_id())
            });
            anew.await.map_err(|error| StartError::Journal(error.at_start()))?;
            return Err(StartError::OlderDisk(why));
        }
        registered => registered?,
    };
    let state = Arc::clone(&member.node.applied().borrow().state);
    let source = Source::Several(member, Office::new(node::ELECTION_TIMEOUT_MS));
    Ok(By { manifest: None, registration, state, source, door: None })
}

async fn by_quorum(
    place: Place,
    disk: Disk<'_>,
    (tasks, closed): (&TaskTracker, &CancellationToken),
    (door, endpoint): (Door, &quinn::Endpoint),
) -> Result<By, StartError> {
    let Disk { config, data_dir, pool, .. } = disk;
    let cluster_id = data_dir.meta().cluster_id.clone();
    let (manifest, store) = open_store(data_dir, pool, &cluster_id).await?;
    if !config.quorum_servers().is_empty() || !store.is_only_member() {
        if manifest.is_some() {
            let why = "a broker of several takes no import over: import into a broker that is alone".to_owned();
            return Err(StartError::Import(why));
        }
        return by_several(store, place, disk, (tasks, closed), (door, endpoint)).await;
    }
    let deadline = Instant::now() + METADATA_START;
    let node = RaftNode::start(store, NoNetwork, deadline).await.map_err(refused)?;
    stop_at_last(tasks, &node, closed, None);
    let imported = match &manifest {
        None => None,
        Some(manifest) => {
            let broker_id = i32::try_from(config.broker_id).unwrap_or(i32::MAX);
            Some(import::topics_command(manifest, broker_id, now_ms(), &config.topic_defaults)?)
        }
    };
    let registration = registration(config, place.advertised, node.node_id());
    // Where the starts of a broker of several were counted, this is one of them: it may be one of several again.
    begin_start(&registration, (data_dir.path(), data_dir.files(), pool)).await?;
    let office = take_part(&node, &registration, imported, deadline).await.map_err(refused)?;
    let state = Arc::clone(&node.applied().borrow().state);
    Ok(By { manifest, registration, state, source: Source::Quorum(node, office), door: Some(door) })
}

/// Opens the data folder. A process that was killed may hold it until its last write has ended: that is waited for.
async fn open_folder(
    files: &Arc<dyn Files>,
    root: &Path,
    identity: &NewIdentity,
    pool: &Pool,
) -> Result<DataDir, DataDirError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let (files, path, identity) = (Arc::clone(files), root.to_owned(), identity.clone());
        match pool.run(move || DataDir::open(files, &path, &identity)).await {
            Err(DataDirError::Locked(_)) if Instant::now() < deadline => sleep(LOCK_RETRY).await,
            opened => return opened,
        }
    }
}

/// What the settings say of certificates.
pub(crate) fn configured(config: &BrokerConfig) -> Option<tls::Configured> {
    let configured = config.tls_certificate.clone().zip(config.tls_key.clone());
    configured.map(|(certificate, key)| tls::Configured { certificate, key, ca: config.tls_ca.clone() })
}

/// Ends the member once everything else has ended.
fn stop_at_last(tasks: &TaskTracker, node: &RaftNode, closed: &CancellationToken, member: Option<Arc<Member>>) {
    let (node, closed) = (node.clone(), closed.clone());
    tasks.spawn(async move {
        closed.cancelled().await;
        node.stop().await;
        // Its thread ends after it.
        drop(member);
    });
}

/// A broker that is to be one of several does not begin as a cluster by itself.
async fn check_folder(config: &BrokerConfig, files: &Arc<dyn Files>, pool: &Pool) -> Result<(), StartError> {
    if config.quorum_servers().is_empty() {
        return Ok(());
    }
    let (files, path) = (Arc::clone(files), config.data_dir.join(JOURNAL_FILE));
    let looked =
        pool.run(move || headwater_storage::files::exists(&*files, &path).map_err(|error| (path, error))).await;
    match looked {
        Ok(true) => Ok(()),
        Ok(false) => Err(StartError::NoCluster(config.data_dir.clone())),
        Err((path, error)) => Err(StartError::Boots { path, error }),
    }
}

/// Has the partitions follow each state before it is published: whoever is told that a topic is there finds it.
fn carry_out(partitions: &Arc<Partitions>, mut assignments: Assignments) -> CarryOut {
    let partitions = Arc::clone(partitions);
    Box::new(move |state: Arc<MetadataState>| {
        let (partitions, begun) = (Arc::clone(&partitions), partitions.direct(&assignments.of(&state)));
        Box::pin(async move { partitions.settled(begun).await })
    })
}

async fn open_partitions(partitions: &Partitions, assigned: &Assigned) {
    let (total, began) = (assignments::partitions(assigned).len(), std::time::Instant::now());
    partitions.apply(assigned).await;
    partitions.forget_found().await;
    partitions.retry();
    partitions.finish().await;
    tracing::info!(partitions = total, milliseconds = began.elapsed().as_millis(), "partitions opened");
}

/// A new identity, in the form that Kafka gives it.
pub(crate) fn new_id() -> String {
    TopicId::from_bytes(*uuid::Uuid::new_v4().as_bytes()).to_string()
}

/// What an import left, and the store of this broker's member of the metadata quorum, which keeps the folder locked too.
async fn open_store(
    data_dir: &Arc<DataDir>,
    pool: &Pool,
    cluster_id: &str,
) -> Result<(Option<Manifest>, Store), StartError> {
    let (data_dir, cluster_id) = (Arc::clone(data_dir), cluster_id.to_owned());
    pool.run(move || {
        let manifest = storage_import::take(&**data_dir.files(), data_dir.path())?;
        let imported: HashSet<&str> =
            manifest.iter().flat_map(|manifest| &manifest.topics).map(|topic| topic.name.as_str()).collect();
        let has_partitions = data_dir.partitions()?.iter().any(|folder| !imported.contains(folder.topic.as_str()));
        let (files, root) = (Arc::clone(data_dir.files()), data_dir.path());
        let opened = Store::open(files, root, &cluster_id, has_partitions, Founding::Alone, new_node_id())?;
        if opened.torn_bytes > 0 {
            tracing::info!(bytes = opened.torn_bytes, "the journal's torn last frame was cut");
        }
        if opened.taken_over {
            tracing::info!(
                node = opened.store.node_id(),
                "the metadata of a broker alone are those of a quorum of one now"
            );
        }
        // Whoever votes and proposes waits behind no flush of the partitions'.
        let thread = Pool::single("headwater-journal").map_err(StartError::Threads)?;
        Ok((manifest, opened.store.of_broker(data_dir, thread)))
    })
    .await
}

/// Registers this broker, takes the controller's office, and lets the broker serve. A registration ends every leadership, so that
/// a consumer which is ahead of what was kept is told so.
async fn take_part(
    node: &RaftNode,
    registration: &RegisterBroker,
    imported: Option<Command>,
    deadline: Instant,
) -> Result<Office, MetadataError> {
    let (register, begins) = {
        let state = Arc::clone(&node.applied().borrow().state);
        (alone::registration_command(&state, registration), alone::first_level(&state))
    };
    node.propose(register, true, deadline).await?;
    if let Some(begins) = begins {
        node.propose(begins, true, deadline).await?;
    }
    let mut office = Office::new(node::ELECTION_TIMEOUT_MS);
    // The only voter leads by now, and is a quorum.
    if office.observe(node.observed(0)) == Some(Effect::Take) {
        let (_, taken) = node.propose(alone::office_command(registration), true, deadline).await?;
        office.taken(alone::epoch_of(Some(&taken)));
    }
    let epoch = office.epoch().ok_or(MetadataError::TimedOut)?;
    node.propose(alone::unfence_command(registration, epoch), true, deadline).await?;
    if let Some(imported) = imported {
        node.propose(imported, true, deadline).await?;
    }
    node.snapshot_if_due().await;
    Ok(office)
}

fn refused(error: MetadataError) -> StartError {
    match error {
        MetadataError::Refused(refusal) => StartError::Metadata(refusal),
        MetadataError::Journal(error) => StartError::Journal(error.at_start()),
        error => StartError::Quorum(error.to_string()),
    }
}

fn registration(config: &BrokerConfig, address: String, node_id: u64) -> RegisterBroker {
    RegisterBroker {
        broker_id: i32::try_from(config.broker_id).unwrap_or(i32::MAX),
        incarnation: uuid::Uuid::new_v4().as_bytes().to_vec().into(),
        address,
        rack: config.broker_rack.clone(),
        registered_ms: now_ms(),
        node_id,
        feature_level: FEATURE_LEVEL,
        ..RegisterBroker::default()
    }
}
