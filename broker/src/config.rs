//! The broker's settings: one table of every key, and what it is parsed into.
//!
//! Owns: [`BrokerConfig`], its defaults, bounds and texts. A key has the same dotted name in the configuration file
//! (TOML), on the command line (`-c key=value`) and in the environment (`HEADWATER_` and the name in capitals, dots as
//! underscores); where Apache Kafka has a name for the same thing, it is Kafka's
//! (<https://kafka.apache.org/documentation/#brokerconfigs>). Refuses: unknown keys, by name; values out of their bounds;
//! listening beyond this machine without a word that says so. Topic keys under their broker-wide names
//! (`log.retention.ms`) belong to [`crate::topic_config`].

use crate::topic_config::{KEYS as TOPIC_KEYS, TopicConfigError, TopicDefaults, left_out, nearest};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Everything a broker can be told. Each field is the key that the table names for it; see there for units and costs.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct BrokerConfig {
    pub data_dir: PathBuf,
    pub broker_id: u32,
    pub listen: SocketAddr,
    pub advertised_listener: Option<String>,
    pub admin: SocketAddr,
    pub insecure_listen: bool,
    pub tls_certificate: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub tls_ca: Option<PathBuf>,
    pub tls_reload_interval_ms: u64,
    pub network_threads: u32,
    pub io_threads: u32,
    pub mtu: u16,
    pub max_connections: u32,
    pub max_connections_per_ip: u32,
    pub max_streams_per_connection: u32,
    pub idle_timeout_ms: u64,
    pub handshake_timeout_ms: u64,
    pub first_frame_timeout_ms: u64,
    pub frame_timeout_ms: u64,
    pub request_timeout_ms: u64,
    pub shutdown_timeout_ms: u64,
    pub append_queue_bytes: u32,
    pub group_commit_bytes: u32,
    pub loan_bytes: u32,
    pub open_segments: u32,
    pub default_partitions: u32,
    pub default_replication_factor: u32,
    pub broker_rack: String,
    pub quorum_bootstrap_servers: String,
    pub broker_heartbeat_interval_ms: u64,
    pub broker_session_timeout_ms: u64,
    pub retention_check_interval_ms: u64,
    pub checkpoint_interval_ms: u64,
    pub cleaner_enabled: bool,
    pub cleaner_backoff_ms: u64,
    pub cleaner_memory_bytes: u64,
    pub producer_id_expiration_ms: u64,
    pub replica_lag_time_max_ms: u64,
    pub stray_delete_delay_ms: u64,
    pub flush_timeout_ms: u64,
    pub leader_rebalance: bool,
    pub leader_imbalance_check_interval_s: u64,
    pub groups: GroupSettings,
    pub logging_level: String,
    pub logging_format: String,
    /// What topics get that set nothing themselves.
    pub topic_defaults: TopicDefaults,
}

/// The settings of groups and of their committed offsets.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct GroupSettings {
    pub session_timeout_ms: u32,
    pub min_session_timeout_ms: u32,
    pub max_session_timeout_ms: u32,
    pub heartbeat_interval_ms: u32,
    pub rebalance_timeout_ms: u32,
    pub max_size: u32,
    pub offsets_partitions: u32,
    pub offsets_replication_factor: u32,
    pub offsets_retention_minutes: u64,
    pub offsets_check_interval_ms: u64,
}

/// Why a setting is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No such key.
    #[error("{origin}: {key} is no setting of the broker{hint}")]
    UnknownKey {
        /// File, flag or environment variable.
        origin: String,
        /// The key.
        key: String,
        /// The nearest legal key or the reason why a known one is missing, as the end of the sentence.
        hint: String,
    },
    /// A value that the key cannot hold.
    #[error("{origin}: {key} cannot be {value:?}: it takes {legal}")]
    InvalidValue {
        /// File, flag or environment variable.
        origin: String,
        /// The key.
        key: String,
        /// The value that was given.
        value: String,
        /// What is legal.
        legal: String,
    },
    /// A value that topics cannot have.
    #[error("{origin}: {error}")]
    Topic {
        /// File, flag or environment variable.
        origin: String,
        /// What is wrong.
        error: TopicConfigError,
    },
    /// The file is no TOML.
    #[error("{origin}: {error}")]
    Toml {
        /// The file.
        origin: String,
        /// What the parser says, with line and column.
        error: toml::de::Error,
    },
    /// The file cannot be read.
    #[error("{path}: {error}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// Settings that are legal alone and senseless together.
    #[error("{0}")]
    Contradiction(String),
}

/// A row of the table of keys.
pub struct Key {
    /// The dotted name.
    pub name: &'static str,
    /// What it does, its unit, and what raising it costs.
    pub doc: &'static str,
    /// What a value may be.
    pub legal: &'static str,
    set: fn(&mut BrokerConfig, &str) -> Option<()>,
    show: fn(&BrokerConfig) -> String,
}

trait Setting: Sized {
    fn parse(text: &str) -> Option<Self>;
    fn show(&self) -> String;
}

macro_rules! settings_by_text {
    ($($kind:ty),*) => {$(impl Setting for $kind {
        fn parse(text: &str) -> Option<Self> { text.parse().ok() }
        fn show(&self) -> String { self.to_string() }
    })*};
}
settings_by_text!(u16, u32, u64, bool, String, SocketAddr);

impl Setting for PathBuf {
    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.into())
    }
    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl<T: Setting> Setting for Option<T> {
    fn parse(text: &str) -> Option<Self> {
        if text.is_empty() { Some(None) } else { T::parse(text).map(Some) }
    }
    fn show(&self) -> String {
        self.as_ref().map(T::show).unwrap_or_default()
    }
}

macro_rules! keys {
    ($($name:literal => $($field:ident).+ $([$range:expr])?, $legal:literal, $doc:literal;)*) => {
        /// Every key, in the order of the example.
        pub const KEYS: &[Key] = &[$(Key {
            name: $name,
            doc: $doc,
            legal: $legal,
            set: |config, text| {
                let value = Setting::parse(text.trim())?;
                $(if !$range.contains(&value) { return None; })?
                config.$($field).+ = value;
                Some(())
            },
            show: |config| Setting::show(&config.$($field).+),
        },)*];
    };
}

keys! {
    "data.dir" => data_dir, "a folder",
        "Folder of the data: partition folders, checkpoints, certificates, the metadata journal.";
    "broker.id" => broker_id [(0..=i32::MAX as u32)], "a whole number that is 0 or more",
        "Identity of this broker in its cluster. Fixed once the data folder exists.";
    "listen" => listen, "address:port",
        "Where clients connect, over QUIC (UDP). Port 0 takes a free one.";
    "advertised.listener" => advertised_listener, "host:port, or nothing",
        "What the broker tells clients to connect to, where that differs from `listen`.";
    "admin.listen" => admin, "address:port",
        "Where /health, /ready and /metrics are served, over plain HTTP. Port 0 takes a free one.";
    "insecure.listen" => insecure_listen, "true or false",
        "There is no authentication yet: whoever reaches the broker may read and write everything. So `listen` and `admin.listen` take only addresses of this machine, unless this is true.";
    "tls.certificate" => tls_certificate, "a PEM file, or nothing",
        "The broker's certificate and its chain. Nothing: `broker.pem`, `broker-key.pem` and `ca.pem` in the data folder, where development certificates are made if there are none. `headwater cert` makes those of a cluster.";
    "tls.key" => tls_key, "a PEM file, or nothing",
        "The key of `tls.certificate`; it may stand in the same file.";
    "tls.ca" => tls_ca, "a PEM file, or nothing",
        "The cluster's certificate authority, or several while one takes over from another. Whoever connects is asked for a certificate, and need not have one: one that is shown must come from here, and says by its URI who shows it (headwater://CLUSTER/broker/ID, headwater://CLUSTER/client/NAME). Brokers know each other by these alone. Nothing, with `tls.certificate`: nobody is asked.";
    "tls.reload.interval.ms" => tls_reload_interval_ms [(100..=86_400_000)], "a whole number from 100 to 86400000",
        "How often the three files are looked at, in milliseconds. New ones hold for connections that begin after that; if they cannot be used, the old ones stay, which is logged and counted (headwater_tls_renewals_total).";
    "num.network.threads" => network_threads [(0..=1024)], "a whole number from 0 to 1024",
        "Threads that serve connections and never block. 0: by the number of cores (see the `runtime` module for the rule and its reason).";
    "num.io.threads" => io_threads [(0..=1024)], "a whole number from 0 to 1024",
        "Threads that may block: group commits, cold reads, recovery, compaction. 0: four for each core, at least 8 and at most 64; an fdatasync waits for the disk, not for a core.";
    "mtu" => mtu [(1200..=6550)], "a whole number from 1200 to 6550",
        "Largest UDP payload that path MTU discovery tries, in bytes. Big packets decide QUIC's speed: 6500 fits ten segments into one send, and loopback and jumbo networks gain three times. Elsewhere discovery stays at what the path carries.";
    "max.connections" => max_connections [(1..=1_000_000)], "a whole number from 1 to 1000000",
        "Connections at once; more are refused.";
    "max.connections.per.ip" => max_connections_per_ip [(1..=1_000_000)], "a whole number from 1 to 1000000",
        "Connections at once from one address; more are refused.";
    "max.streams.per.connection" => max_streams_per_connection [(16..=65_536)], "a whole number from 16 to 65536",
        "Streams that a client may have open on one connection: one for each partition it reads or writes. Each takes a few kilobytes once it is used.";
    "connections.max.idle.ms" => idle_timeout_ms [(1_000..=3_600_000)], "a whole number from 1000 to 3600000",
        "A connection from which nothing came for so long is closed, in milliseconds. Clients keep theirs alive.";
    "handshake.timeout.ms" => handshake_timeout_ms [(100..=600_000)], "a whole number from 100 to 600000",
        "Time for the handshake, and again for the first call, in milliseconds.";
    "first.frame.timeout.ms" => first_frame_timeout_ms [(100..=600_000)], "a whole number from 100 to 600000",
        "Time from the opening of a stream to the end of its first frame, in milliseconds.";
    "frame.timeout.ms" => frame_timeout_ms [(100..=600_000)], "a whole number from 100 to 600000",
        "Time from the first byte of a frame to its last, for a client to read an answer or some of the data that it granted credit for, and for a partition to let a produce stream open, in milliseconds. Waiting for credit does not count.";
    "request.timeout.ms" => request_timeout_ms [(100..=600_000)], "a whole number from 100 to 600000",
        "Longest time that a call may take, in milliseconds; a client may ask for less.";
    "shutdown.timeout.ms" => shutdown_timeout_ms [(0..=600_000)], "a whole number from 0 to 600000",
        "At shutdown: how long what was received may take to be appended and acknowledged, in milliseconds.";
    "append.queue.bytes" => append_queue_bytes [((1 << 20)..=(1 << 30))], "a whole number from 1048576 to 1073741824",
        "Bytes of record batches that may wait for one partition's log; more wait on their streams.";
    "group.commit.bytes" => group_commit_bytes [((64 << 10)..=(256 << 20))], "a whole number from 65536 to 268435456",
        "Most bytes that one group commit writes and flushes: larger ones raise throughput and the latency of each.";
    "loan.bytes" => loan_bytes [((64 << 20)..=(1 << 30))], "a whole number from 67108864 to 1073741824",
        "Memory for frames that are larger than their stream's share of credit, in bytes, all connections together.";
    "open.segments.max" => open_segments [(64..=1_000_000)], "a whole number from 64 to 1000000",
        "Segments that are open and mapped at once, but at most a quarter of the files that the process may open.";
    "num.partitions" => default_partitions [(1..=100_000)], "a whole number from 1 to 100000",
        "Partitions of a topic that is created without saying how many.";
    "default.replication.factor" => default_replication_factor [(0..=32_767)], "a whole number from 0 to 32767",
        "Replicas of a topic that is created without saying how many. 0: as many as there are active brokers, but 3 at most.";
    "broker.rack" => broker_rack, "a name, or nothing",
        "Where this broker stands. Replicas of a partition are spread over racks.";
    "controller.quorum.bootstrap.servers" => quorum_bootstrap_servers, "host:port, several with commas, or nothing",
        "Where brokers of its cluster are found, as they are advertised: any of them will do, and this one may be among them. With it the broker is one of several, that is, it takes others in and is reached by them; its folder has to be made by `headwater cluster init` or `headwater cluster join`, or be that of a broker which was alone. Nothing: the broker is the whole cluster.";
    "broker.heartbeat.interval.ms" => broker_heartbeat_interval_ms [(10..=60_000)], "a whole number from 10 to 60000",
        "How often a broker that is one of several says to every voter of the metadata quorum that it is there, in milliseconds.";
    "broker.session.timeout.ms" => broker_session_timeout_ms [(100..=600_000)], "a whole number from 100 to 600000",
        "A broker that is not heard of for so long is fenced, in milliseconds: others lead what it led. The controller's own setting counts.";
    "log.retention.check.interval.ms" => retention_check_interval_ms [(1..=86_400_000)], "a whole number from 1 to 86400000",
        "How often segments are looked through for what retention deletes and age rolls, in milliseconds.";
    "log.flush.offset.checkpoint.interval.ms" => checkpoint_interval_ms [(1..=60_000)], "a whole number from 1 to 60000",
        "How often recovery points, high watermarks and log start offsets are written down if they changed, in milliseconds. A recovery scans from there.";
    "log.cleaner.enable" => cleaner_enabled, "true or false",
        "Whether topics with cleanup.policy=compact are compacted.";
    "log.cleaner.backoff.ms" => cleaner_backoff_ms [(1..=86_400_000)], "a whole number from 1 to 86400000",
        "How often logs are looked through for what is worth compacting, in milliseconds.";
    "log.cleaner.dedupe.buffer.size" => cleaner_memory_bytes [((1 << 20)..=(1 << 34))], "a whole number from 1048576 to 17179869184",
        "Memory for the keys of a compaction, in bytes. What does not fit is left for the next one.";
    "producer.id.expiration.ms" => producer_id_expiration_ms [(1_000..=u64::MAX >> 1)], "a whole number that is 1000 or more",
        "How long a partition remembers the sequence of a producer that no longer writes, in milliseconds.";
    "replica.lag.time.max.ms" => replica_lag_time_max_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "A follower that has not reported a batch for so long leaves the in-sync replicas, in milliseconds. More keeps slow followers in sync, and acknowledgements waiting for dead ones.";
    "flush.timeout.ms" => flush_timeout_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "A write or flush of a log that takes longer is a failure of the disk, in milliseconds: others lead what this broker leads there.";
    "auto.leader.rebalance.enable" => leader_rebalance, "true or false",
        "Whether the controller gives leaderships back to the brokers that should have them (the first of a partition's replicas).";
    "leader.imbalance.check.interval.seconds" => leader_imbalance_check_interval_s [(1..=86_400)], "a whole number from 1 to 86400",
        "How long a broker has to be in sync wherever it keeps a replica before it leads again what it should, in seconds. The controller's own setting counts.";
    "stray.delete.delay.ms" => stray_delete_delay_ms [(0..=u64::MAX >> 1)], "a whole number that is 0 or more",
        "How long folders lie there that were set aside, because no partition of the metadata is theirs or because they are damaged and were fetched from a leader, before they are deleted, in milliseconds. It counts from when this start of the broker sees them.";
    "group.consumer.session.timeout.ms" => groups.session_timeout_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "A member that sends no heartbeat for so long is out of its group, in milliseconds, where it asks for nothing else.";
    "group.consumer.min.session.timeout.ms" => groups.min_session_timeout_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "Shortest session timeout that a member may ask for, in milliseconds.";
    "group.consumer.max.session.timeout.ms" => groups.max_session_timeout_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "Longest session timeout that a member may ask for, in milliseconds.";
    "group.consumer.heartbeat.interval.ms" => groups.heartbeat_interval_ms [(50..=600_000)], "a whole number from 50 to 600000",
        "How often members send heartbeats, in milliseconds.";
    "group.rebalance.timeout.ms" => groups.rebalance_timeout_ms [(100..=3_600_000)], "a whole number from 100 to 3600000",
        "How long a member may take to let go of a partition before it is fenced, in milliseconds, where it asks for nothing else.";
    "group.consumer.max.size" => groups.max_size [(1..=1_000_000)], "a whole number from 1 to 1000000",
        "Members of a group.";
    "offsets.topic.num.partitions" => groups.offsets_partitions [(1..=1_000)], "a whole number from 1 to 1000",
        "Partitions of __consumer_offsets. Fixed once the topic exists.";
    "offsets.topic.replication.factor" => groups.offsets_replication_factor [(1..=32)], "a whole number from 1 to 32",
        "Brokers that keep each partition of __consumer_offsets, or as many as the cluster has. The topic is made once so many are known; a majority of them has to have what is committed.";
    "offsets.retention.minutes" => groups.offsets_retention_minutes [(1..=u64::MAX >> 20)], "a whole number that is 1 or more",
        "How long the committed offsets of a group without members are kept, in minutes.";
    "offsets.retention.check.interval.ms" => groups.offsets_check_interval_ms [(1..=86_400_000)], "a whole number from 1 to 86400000",
        "How often committed offsets are looked through for what expired, in milliseconds.";
    "logging.level" => logging_level, "error, warn, info, debug, trace, or a filter as tracing-subscriber takes it",
        "What is logged, to standard error.";
    "logging.format" => logging_format, "human or json",
        "How it is logged.";
}

impl Default for BrokerConfig {
    fn default() -> Self {
        BrokerConfig {
            data_dir: "headwater-data".into(),
            broker_id: 1,
            listen: SocketAddr::from(([127, 0, 0, 1], 9392)),
            advertised_listener: None,
            admin: SocketAddr::from(([127, 0, 0, 1], 9393)),
            insecure_listen: false,
            tls_certificate: None,
            tls_key: None,
            tls_ca: None,
            tls_reload_interval_ms: 10_000,
            network_threads: 0,
            io_threads: 0,
            mtu: 6500,
            max_connections: 10_000,
            max_connections_per_ip: 10_000,
            max_streams_per_connection: 16_384,
            idle_timeout_ms: 30_000,
            handshake_timeout_ms: 10_000,
            first_frame_timeout_ms: 10_000,
            frame_timeout_ms: 30_000,
            request_timeout_ms: 30_000,
            shutdown_timeout_ms: 10_000,
            append_queue_bytes: 64 << 20,
            group_commit_bytes: 8 << 20,
            loan_bytes: 256 << 20,
            open_segments: 16_384,
            default_partitions: 1,
            default_replication_factor: 0,
            broker_rack: String::new(),
            quorum_bootstrap_servers: String::new(),
            broker_heartbeat_interval_ms: 100,
            broker_session_timeout_ms: 600,
            retention_check_interval_ms: 300_000,
            checkpoint_interval_ms: 1_000,
            cleaner_enabled: true,
            cleaner_backoff_ms: 15_000,
            cleaner_memory_bytes: 128 << 20,
            producer_id_expiration_ms: 86_400_000,
            replica_lag_time_max_ms: 30_000,
            stray_delete_delay_ms: 86_400_000,
            flush_timeout_ms: 10_000,
            leader_rebalance: true,
            leader_imbalance_check_interval_s: 5,
            groups: GroupSettings {
                session_timeout_ms: 10_000,
                min_session_timeout_ms: 1_000,
                max_session_timeout_ms: 1_800_000,
                heartbeat_interval_ms: 3_000,
                rebalance_timeout_ms: 45_000,
                max_size: 10_000,
                offsets_partitions: 16,
                offsets_replication_factor: 3,
                offsets_retention_minutes: 10_080,
                offsets_check_interval_ms: 600_000,
            },
            logging_level: "info".into(),
            logging_format: "human".into(),
            topic_defaults: TopicDefaults::new(),
        }
    }
}

fn is_reachable(server: &str) -> bool {
    server
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// Prefix of environment variables that hold settings.
pub const ENVIRONMENT_PREFIX: &str = "HEADWATER_";

impl BrokerConfig {
    /// Sets one key. `origin` says where it comes from, for the error.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key.
    pub fn set(&mut self, origin: &str, key: &str, value: &str) -> Result<(), ConfigError> {
        if let Some(row) = KEYS.iter().find(|row| row.name == key) {
            return (row.set)(self, value).ok_or_else(|| ConfigError::InvalidValue {
                origin: origin.into(),
                key: key.into(),
                value: value.into(),
                legal: row.legal.into(),
            });
        }
        let of_topics =
            self.topic_defaults.set(key, value).map_err(|error| ConfigError::Topic { origin: origin.into(), error })?;
        if of_topics {
            return Ok(());
        }
        let legal = KEYS.iter().map(|row| row.name).chain(TopicDefaults::broker_names());
        let hint = match (left_out(key), nearest(key, legal)) {
            (Some(why), _) => format!(", though Kafka has it: {why}"),
            (None, Some(near)) => format!("; the nearest is {near}"),
            (None, None) => String::new(),
        };
        Err(ConfigError::UnknownKey { origin: origin.into(), key: key.into(), hint })
    }

    /// Sets a key given as `key=value`.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key.
    pub fn set_pair(&mut self, pair: &str) -> Result<(), ConfigError> {
        match pair.split_once('=') {
            Some((key, value)) => self.set("-c", key.trim(), value.trim()),
            None => Err(ConfigError::InvalidValue {
                origin: "-c".into(),
                key: pair.into(),
                value: String::new(),
                legal: "key=value".into(),
            }),
        }
    }

    /// Takes everything a TOML text sets. Dotted keys, quoted keys and tables are the same thing: `log.retention.ms = 1` is
    /// `[log]`, `retention.ms = 1`.
    ///
    /// # Errors
    /// [`ConfigError`] naming `origin` and the key.
    pub fn apply_toml(&mut self, origin: &str, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|error| ConfigError::Toml { origin: origin.into(), error })?;
        let mut pairs = Vec::new();
        flatten("", &table, &mut pairs);
        pairs.into_iter().try_for_each(|(key, value)| self.set(origin, &key, &value))
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file and the key.
    pub fn apply_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        self.apply_toml(&path.display().to_string(), &text)
    }

    /// Takes every variable that begins with [`ENVIRONMENT_PREFIX`], but for those in `reserved`, which are somebody
    /// else's (the command line's own).
    ///
    /// # Errors
    /// [`ConfigError`] naming the variable.
    pub fn apply_environment(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
        reserved: &[&str],
    ) -> Result<(), ConfigError> {
        for (variable, value) in variables {
            let Some(name) = variable.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
            if reserved.contains(&variable.as_str()) {
                continue;
            }
            let key = KEYS
                .iter()
                .map(|row| row.name)
                .chain(TopicDefaults::broker_names())
                .find(|key| environment_name(key) == name)
                .map_or_else(|| name.to_lowercase().replace('_', "."), str::to_owned);
            self.set(&variable, &key, &value)?;
        }
        Ok(())
    }

    /// Where brokers of the cluster are found; empty: this broker is alone.
    pub fn quorum_servers(&self) -> Vec<String> {
        let servers = self.quorum_bootstrap_servers.split(',').map(str::trim);
        servers.filter(|server| !server.is_empty()).map(str::to_owned).collect()
    }

    /// What must hold between settings.
    ///
    /// # Errors
    /// [`ConfigError::Contradiction`] as a sentence that names the keys.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |why: String| Err(ConfigError::Contradiction(why));
        for (key, address) in [("listen", self.listen), ("admin.listen", self.admin)] {
            if !address.ip().is_loopback() && !self.insecure_listen {
                return refuse(format!(
                    "{key} = {address} can be reached from other machines, and there is no authentication yet: \
                     set insecure.listen = true if everybody who reaches it may read and write everything"
                ));
            }
        }
        if self.tls_certificate.is_some() != self.tls_key.is_some() {
            return refuse("tls.certificate and tls.key go together: one is set and the other is not".into());
        }
        if self.tls_ca.is_some() && self.tls_certificate.is_none() {
            let why = "tls.ca is set and tls.certificate is not: the broker would show a development certificate that this \
                       authority did not sign";
            return refuse(why.into());
        }
        if let Some(wrong) = self.quorum_servers().iter().find(|server| !is_reachable(server)) {
            return refuse(format!("controller.quorum.bootstrap.servers: {wrong:?} is no host:port"));
        }
        if self.broker_heartbeat_interval_ms.saturating_mul(2) > self.broker_session_timeout_ms {
            return refuse(format!(
                "broker.heartbeat.interval.ms = {} must be at most half of broker.session.timeout.ms = {}: a single lost packet \
                 would fence the broker",
                self.broker_heartbeat_interval_ms, self.broker_session_timeout_ms
            ));
        }
        let groups = &self.groups;
        if !(groups.min_session_timeout_ms..=groups.max_session_timeout_ms).contains(&groups.session_timeout_ms) {
            return refuse(format!(
                "group.consumer.session.timeout.ms = {} is outside its bounds, group.consumer.min.session.timeout.ms = {} and group.consumer.max.session.timeout.ms = {}",
                groups.session_timeout_ms, groups.min_session_timeout_ms, groups.max_session_timeout_ms
            ));
        }
        if groups.heartbeat_interval_ms >= groups.session_timeout_ms {
            return refuse(format!(
                "group.consumer.heartbeat.interval.ms = {} must be below group.consumer.session.timeout.ms = {}",
                groups.heartbeat_interval_ms, groups.session_timeout_ms
            ));
        }
        if !["human", "json"].contains(&self.logging_format.as_str()) {
            return refuse(format!("logging.format cannot be {:?}: it takes human or json", self.logging_format));
        }
        Ok(())
    }

    /// A configuration file with every key, its meaning and its default, all commented out.
    pub fn example() -> String {
        let defaults = BrokerConfig::default();
        let mut out = String::from(
            "# Headwater broker: every setting with its default. A key set here can also be given as\n\
             # `-c key=value` and in the environment: HEADWATER_ and the key in capitals, dots as underscores.\n",
        );
        for key in KEYS {
            row(&mut out, key.name, key.doc, key.legal, &(key.show)(&defaults));
        }
        out.push_str("\n# What topics get that set nothing themselves.\n");
        for key in TOPIC_KEYS {
            for (index, (name, factor)) in key.broker_names.iter().enumerate() {
                let stronger: Vec<&str> = key.broker_names.iter().take(index).map(|(name, _)| *name).collect();
                let legal = key.broker_legal(name, *factor);
                match (stronger.first(), key.default.parse::<i64>()) {
                    (Some(first), Ok(default)) => {
                        let unit = name.rsplit('.').next().unwrap_or(name);
                        let doc = format!("As {first}, in {unit}. Counts only without {}.", stronger.join(" and "));
                        row(&mut out, name, &doc, &legal, &(default / factor).to_string());
                    }
                    _ => row(&mut out, name, key.doc, &legal, key.default),
                }
            }
        }
        out
    }
}

fn row(out: &mut String, name: &str, doc: &str, legal: &str, default: &str) {
    out.push('\n');
    let mut line = String::from("#");
    for word in doc.split_whitespace() {
        if line.len() + word.len() > 110 {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    let value = match default {
        "true" | "false" => default.to_owned(),
        number if number.parse::<i64>().is_ok() => number.to_owned(),
        text => format!("{text:?}"),
    };
    // TOML cannot hold a key that is the beginning of another, unless it is quoted.
    let quote = if KEYS.iter().any(|key| key.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))) {
        "\""
    } else {
        ""
    };
    out.push_str(&format!("{line}\n# Takes {legal}.\n#{quote}{name}{quote} = {value}\n"));
}

fn environment_name(key: &str) -> String {
    key.to_uppercase().replace('.', "_")
}

fn flatten(prefix: &str, table: &toml::Table, pairs: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) => flatten(&name, inner, pairs),
            toml::Value::String(text) => pairs.push((name, text.clone())),
            toml::Value::Array(items) => {
                let items: Vec<String> =
                    items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned)).collect();
                pairs.push((name, items.join(",")));
            }
            other => pairs.push((name, other.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic_config::{TopicConfig, TopicValues};
    use std::collections::BTreeSet;

    #[test]
    fn the_example_with_every_key_uncommented_is_the_default() {
        let example = BrokerConfig::example();
        let is_setting = |line: &&str| line.starts_with(|c: char| c == '"' || c.is_ascii_lowercase());
        let settings: Vec<&str> =
            example.lines().filter_map(|line| line.strip_prefix('#')).filter(is_setting).collect();
        let read = |text: &str| {
            let mut config = BrokerConfig::default();
            config.apply_toml("example", text).unwrap();
            config.check().unwrap();
            config
        };
        let config = read(&settings.join("\n"));
        let defaults = BrokerConfig::default();
        for key in KEYS {
            assert_eq!((key.show)(&config), (key.show)(&defaults), "{}", key.name);
        }
        // Each alone: of several names for one thing only the strongest counts.
        for line in &settings {
            let topics = TopicConfig::resolve(&TopicValues::new(), &read(line).topic_defaults).unwrap();
            assert_eq!(topics, TopicConfig::default(), "{line}");
        }
        let name = |line: &&str| line.split(" = ").next().unwrap().replace('"', "");
        let shown: BTreeSet<String> = settings.iter().map(name).collect();
        let taken = KEYS.iter().map(|key| key.name).chain(TopicDefaults::broker_names()).map(str::to_owned);
        assert_eq!(shown, taken.collect(), "what is shown, and what is taken");
        assert_eq!(shown.len(), settings.len(), "each once");
    }

    #[test]
    fn other_units_have_bounds_of_their_own() {
        for (pair, legal) in [
            ("log.roll.hours=-1", "a whole number of hours, 1 or more"),
            ("log.retention.minutes=-2", "a whole number of minutes, 0 or more, or -1 for no limit"),
        ] {
            let error = BrokerConfig::default().set_pair(pair).unwrap_err().to_string();
            assert!(error.ends_with(legal), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_by_name_with_the_nearest() {
        let mut config = BrokerConfig::default();
        let error = config.apply_toml("f.toml", "log.retention.mss = 5").unwrap_err().to_string();
        assert!(
            error.contains("f.toml") && error.contains("log.retention.mss") && error.contains("log.retention.ms"),
            "{error}"
        );
        let left_out = config.set_pair("log.segment.delete.delay.ms=1").unwrap_err().to_string();
        assert!(left_out.contains("goes at once"), "{left_out}");
        assert!(config.set_pair("bogus=1").unwrap_err().to_string().contains("bogus"));
        assert!(config.set_pair("mtu").is_err());
        assert!(config.set_pair("mtu=900").unwrap_err().to_string().contains("1200"));
    }

    #[test]
    fn files_flags_and_environment_name_the_same_keys() {
        let mut config = BrokerConfig::default();
        config.apply_toml("f", "[log]\nretention.check.interval.ms = 7\nretention.ms = 9\n").unwrap();
        assert_eq!(config.retention_check_interval_ms, 7);
        let variables = [("HEADWATER_MAX_CONNECTIONS", "12"), ("HEADWATER_PROFILE", "x"), ("OTHER", "y")];
        let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned()));
        config.apply_environment(variables, &["HEADWATER_PROFILE"]).unwrap();
        assert_eq!(config.max_connections, 12);
        let unknown = [("HEADWATER_MAX_CONNECTION".to_owned(), "1".to_owned())];
        assert!(config.apply_environment(unknown, &[]).unwrap_err().to_string().contains("HEADWATER_MAX_CONNECTION"));
        config.set_pair("log.retention.check.interval.ms=8").unwrap();
        assert_eq!(config.retention_check_interval_ms, 8);
    }

    #[test]
    fn other_machines_are_let_in_only_on_purpose() {
        for key in ["listen", "admin.listen"] {
            let mut config = BrokerConfig::default();
            config.set_pair(&format!("{key}=0.0.0.0:9392")).unwrap();
            assert!(config.check().unwrap_err().to_string().contains("insecure.listen"), "{key}");
            config.set_pair("insecure.listen=true").unwrap();
            config.check().unwrap();
        }
    }
}
