//! What a client is told: where the brokers are, whom to trust, how long to wait.
//!
//! Owns: [`ClientConfig`], and the profile file that `headwater up` writes. Refuses: the settings of producers and
//! consumers (their builders hold those). Read next: [`crate::quic`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// How often a certificate and its key are read anew because they were renewed meanwhile.
const RENEWALS_WHILE_READING: usize = 3;

/// How to reach a cluster. `ClientConfig::default()` needs `bootstrap` and `ca_pem` filled in;
/// [`ClientConfig::from_profile`] reads both from a file.
///
/// ```
/// use headwater_client::ClientConfig;
/// let config = ClientConfig { bootstrap: vec!["broker.example:9093".into()], ..ClientConfig::default() };
/// assert_eq!(config.client_id, "headwater");
/// ```
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Brokers to begin with, `host:port`; tried in order. Any of them tells of the others, which are tried after these
    /// when a connection was lost.
    pub bootstrap: Vec<String>,
    /// The name to expect in the brokers' certificates. `None`: the host part of the address.
    pub server_name: Option<String>,
    /// The certificates (PEM) of the authorities that are trusted. Nothing else is: the system's own are not consulted.
    pub ca_pem: Vec<u8>,
    /// The certificate by which brokers know this client. `None`: it is anonymous to them.
    pub identity: Option<ClientIdentity>,
    /// What the broker calls this client in its log, metrics and group descriptions.
    pub client_id: String,
    /// Where this client is. Consumers read from an in-sync replica of the same rack, if there is one. `None`: from the leader.
    pub rack: Option<String>,
    /// Bytes of UDP payload in a packet. `None`: found out, from 1,200 up to 6,500. `Some(n)`: `n` at once and never
    /// more, for paths known to carry it (loopback, jumbo frames); on a path that does not, nothing large arrives. Above
    /// 6,550 bytes segmentation offload is off, which costs more than the larger packets gain.
    pub mtu: Option<u16>,
    /// How long [`crate::Client::connect`], and each later attempt to connect, may take.
    pub connect_timeout: Duration,
    /// How long a call may take, its retries included.
    pub request_timeout: Duration,
    /// The pause before the first retry; it doubles with each further one. Every pause is shortened by a random part.
    pub retry_backoff: Duration,
    /// The longest pause between two attempts.
    pub retry_backoff_max: Duration,
    /// Age at which what is known of topics is asked anew even though nothing contradicted it. Lower: new partitions are
    /// seen sooner; each producer and consumer asks more often.
    pub metadata_max_age: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            bootstrap: Vec::new(),
            server_name: None,
            ca_pem: Vec::new(),
            identity: None,
            client_id: "headwater".into(),
            rack: None,
            mtu: None,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            retry_backoff: Duration::from_millis(50),
            retry_backoff_max: Duration::from_secs(1),
            metadata_max_age: Duration::from_secs(300),
        }
    }
}

/// A client's own certificate and its key, as `headwater cert client` makes them.
#[derive(Clone)]
pub struct ClientIdentity {
    /// The certificate and its chain (PEM).
    pub certificate_pem: Vec<u8>,
    /// The certificate's key (PEM). Of several, that one counts which is the certificate's.
    pub key_pem: Vec<u8>,
    /// Where both are from. They are read again for each connection, so that a renewed certificate is shown from the next one on.
    /// `None`: what stands here is shown for good.
    pub files: Option<IdentityFiles>,
}

/// The files of a client's certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The certificate and its chain (PEM).
    pub certificate: PathBuf,
    /// The certificate's key (PEM).
    pub key: PathBuf,
}

impl IdentityFiles {
    /// Reads both; blocks.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`].
    pub fn read(self) -> Result<ClientIdentity, ConfigError> {
        let (mut certificate_pem, mut key_pem) = (read(&self.certificate)?, read(&self.key)?);
        // `headwater cert client --renew` leaves the old key beside the new one until the certificate is replaced.
        for _ in 0..RENEWALS_WHILE_READING {
            let again = read(&self.certificate)?;
            if again == certificate_pem {
                break;
            }
            (certificate_pem, key_pem) = (again, read(&self.key)?);
        }
        Ok(ClientIdentity { certificate_pem, key_pem, files: Some(self) })
    }
}

/// The key stays out of logs.
impl std::fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientIdentity").finish_non_exhaustive()
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The profile is no valid TOML, or holds an unknown key or a senseless value.
    #[error("{path}: {reason}")]
    Profile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// Nobody to connect to.
    #[error("no bootstrap address: name at least one broker as host:port")]
    NoBootstrap,
    /// An address without a port, or with one that is none.
    #[error("{0:?} is no address: write host:port")]
    Address(String),
    /// The authorities' certificates cannot be used.
    #[error("the certificates of the authorities (ca) cannot be used: {0}")]
    Certificates(String),
    /// The client's own certificate cannot be used.
    #[error("the client's own certificate (certificate, key) cannot be used: {0}")]
    Identity(String),
    /// A packet size that QUIC does not allow.
    #[error("mtu {0} is out of range: 1200 to 65527 bytes")]
    Mtu(u16),
    /// A setting of a producer or a consumer.
    #[error("{setting}: {reason}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Why its value makes no sense.
        reason: String,
    },
}

/// The profile file, as it stands on disk.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    bootstrap: Vec<String>,
    ca: PathBuf,
    server_name: Option<String>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    client_id: Option<String>,
    rack: Option<String>,
    mtu: Option<u16>,
}

impl ClientConfig {
    /// Reads a client profile (`client.toml`): `bootstrap`, `ca` (a file; a relative path starts at the profile's folder)
    /// and, where wanted, `certificate` and `key` (files too), `server_name`, `client_id`, `rack` and `mtu`.
    ///
    /// # Errors
    /// When a file cannot be read, or the profile holds an unknown key, a senseless value or no bootstrap address.
    pub fn from_profile(path: impl AsRef<Path>) -> Result<ClientConfig, ConfigError> {
        let path = path.as_ref();
        let text = String::from_utf8(read(path)?)
            .map_err(|e| ConfigError::Profile { path: path.into(), reason: e.to_string() })?;
        let profile: Profile =
            toml::from_str(&text).map_err(|e| ConfigError::Profile { path: path.into(), reason: e.to_string() })?;
        let beside = |file: &Path| path.parent().unwrap_or(Path::new("")).join(file);
        let identity = match (&profile.certificate, &profile.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                Some(IdentityFiles { certificate: beside(certificate), key: beside(key) }.read()?)
            }
            _ => {
                let reason = "certificate and key go together: one is set and the other is not".into();
                return Err(ConfigError::Profile { path: path.into(), reason });
            }
        };
        let defaults = ClientConfig::default();
        let config = ClientConfig {
            bootstrap: profile.bootstrap,
            server_name: profile.server_name,
            ca_pem: read(&beside(&profile.ca))?,
            identity,
            client_id: profile.client_id.unwrap_or(defaults.client_id),
            rack: profile.rack,
            mtu: profile.mtu,
            ..ClientConfig::default()
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses what can never work.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.bootstrap.is_empty() {
            return Err(ConfigError::NoBootstrap);
        }
        for address in &self.bootstrap {
            host_of(address)?;
        }
        match self.mtu {
            Some(mtu) if !(1200..=65_527).contains(&mtu) => Err(ConfigError::Mtu(mtu)),
            _ => Ok(()),
        }
    }
}

/// The host part of `host:port`, without the brackets of an IPv6 address.
pub(crate) fn host_of(address: &str) -> Result<&str, ConfigError> {
    let (host, port) = address.rsplit_once(':').ok_or_else(|| ConfigError::Address(address.into()))?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(ConfigError::Address(address.into()));
    }
    Ok(host)
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|e| ConfigError::Unreadable { path: path.into(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> Result<ClientConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), b"certificate").unwrap();
        let path = dir.path().join("client.toml");
        std::fs::write(&path, text).unwrap();
        ClientConfig::from_profile(path)
    }

    #[test]
    fn a_profile_names_brokers_and_an_authority_beside_it() {
        let config =
            profile("bootstrap = [\"127.0.0.1:1234\"]\nca = \"ca.pem\"\nserver_name = \"localhost\"\n").unwrap();
        assert_eq!(config.bootstrap, ["127.0.0.1:1234"]);
        assert_eq!(config.ca_pem, b"certificate");
        assert_eq!(config.server_name.as_deref(), Some("localhost"));
    }

    #[test]
    fn a_profile_may_name_the_clients_own_certificate_and_its_key_is_not_logged() {
        let both = "bootstrap = [\"a:1\"]\nca = \"ca.pem\"\ncertificate = \"ca.pem\"\nkey = \"client.toml\"\n";
        let config = profile(both).unwrap();
        let identity = config.identity.as_ref().unwrap();
        assert_eq!((&identity.certificate_pem[..], &identity.key_pem[..]), (&b"certificate"[..], both.as_bytes()));
        let logged = format!("{identity:?} {:?}", ClientConfig { ca_pem: Vec::new(), ..config.clone() });
        assert!(!logged.contains(&format!("{:?}", identity.key_pem)), "{logged}");
        for one in ["certificate", "key"] {
            let alone = profile(&format!("bootstrap = [\"a:1\"]\nca = \"ca.pem\"\n{one} = \"ca.pem\"\n")).unwrap_err();
            assert!(alone.to_string().contains("go together"), "{alone}");
        }
    }

    #[test]
    fn unknown_keys_missing_files_and_senseless_values_are_named() {
        let unknown = profile("bootstrap = [\"a:1\"]\nca = \"ca.pem\"\nbootstap = 1\n").unwrap_err();
        assert!(unknown.to_string().contains("bootstap"), "{unknown}");
        assert!(matches!(profile("bootstrap = []\nca = \"ca.pem\""), Err(ConfigError::NoBootstrap)));
        assert!(matches!(profile("bootstrap = [\"a\"]\nca = \"ca.pem\""), Err(ConfigError::Address(_))));
        assert!(matches!(profile("bootstrap = [\"a:1\"]\nca = \"no.pem\""), Err(ConfigError::Unreadable { .. })));
        assert!(matches!(profile("bootstrap = [\"a:1\"]\nca = \"ca.pem\"\nmtu = 100"), Err(ConfigError::Mtu(100))));
    }

    #[test]
    fn hosts_are_taken_from_addresses() {
        assert_eq!(host_of("localhost:1").unwrap(), "localhost");
        assert_eq!(host_of("[::1]:9").unwrap(), "::1");
        assert!(host_of(":9").is_err() && host_of("a:b").is_err() && host_of("a").is_err());
    }
}
