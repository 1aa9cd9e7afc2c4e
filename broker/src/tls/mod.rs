//! Certificates: those that are configured, or those of the data folder, where development certificates are made if there are none.
//!
//! Owns: the files `ca.pem`, `broker.pem`, `broker-key.pem` and `client.toml` at the data root (files, no folder: Kafka
//! fails on a folder that it cannot parse). What `headwater cert broker --out` leaves has the same names, so that a data folder can be
//! given the certificates of a cluster. Refuses: to be a certificate authority for more than one broker. The
//! development authority's key is thrown away once it has signed, so nothing that lies on the disk can sign another broker.
//! Read next: [`live`], and [`crate::quic`].

mod identity;
pub(crate) mod live;
pub mod make;
pub mod principal;

use crate::quic::SECRET_BYTES;
use identity::Paths;
use live::{Live, Seen};
use make::{Authority, MakeError, Validity};
use principal::Name;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Certificate of the development authority: what clients trust.
pub const CA_FILE: &str = "ca.pem";
/// The broker's own development certificate.
pub const CERTIFICATE_FILE: &str = "broker.pem";
/// The key of [`CERTIFICATE_FILE`], readable by its owner alone.
pub const KEY_FILE: &str = "broker-key.pem";
/// The profile with which clients find the broker.
pub const PROFILE_FILE: &str = "client.toml";

/// What the QUIC endpoint keeps over restarts: see [`crate::quic::endpoint`].
const SECRET_FILE: &str = "quic-secret";

/// Name that development certificates carry beside the addresses.
const SERVER_NAME: &str = "localhost";
/// How the names of development authorities begin.
const DEVELOPMENT: &str = "development-";
/// Hexadecimal digits behind it.
const UNIQUE_CHARS: usize = 12;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// A file holds no certificate or no key.
    #[error("{path}: {error}", path = path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: rustls_pki_types::pem::Error,
    },
    /// The data folder has a part of a broker's certificates, which nothing may take the place of.
    #[error(
        "{path} is missing, and what belongs with it is there: put it beside them, or remove them all to have development \
         certificates made", path = path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A certificate could not be made.
    #[error("making a development certificate: {0}")]
    Make(#[from] MakeError),
    /// A certificate and a key that is another one's.
    #[error("{key} is not the key of {certificate}", key = key.display(), certificate = certificate.display())]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
    },
    /// A certificate that the cluster's authority did not sign, or not for this.
    #[error(
        "{certificate} does not hold before the authority {ca}: {why}",
        certificate = certificate.display(), ca = ca.display()
    )]
    NotOfAuthority {
        /// The certificate's file.
        certificate: PathBuf,
        /// The authority's.
        ca: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A certificate that is whole, and not for this broker.
    #[error("{path}: {why}", path = path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A certificate that is not valid now, or its authority's is not.
    #[error("{path}: {why}", path = path.display())]
    Untimely {
        /// The file.
        path: PathBuf,
        /// From when on, or until when it was.
        why: String,
    },
}

impl TlsError {
    /// Whether the same files may be good at another time.
    pub(crate) fn is_of_time(&self) -> bool {
        matches!(self, TlsError::Untimely { .. })
    }
}

/// What a configuration says of certificates.
#[derive(Debug, Clone)]
pub(crate) struct Configured {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: Option<PathBuf>,
}

/// Reads the configured certificate, or that of `root`; makes a development certificate if there is none. Blocks.
pub(crate) fn open(
    root: &Path,
    configured: Option<Configured>,
    broker_id: u32,
    listen: SocketAddr,
) -> Result<(Live, Seen), TlsError> {
    let paths = match configured {
        Some(Configured { certificate, key, ca }) => Paths { certificate, key, ca },
        None => {
            let (ca, certificate, key) = (root.join(CA_FILE), root.join(CERTIFICATE_FILE), root.join(KEY_FILE));
            match missing_of([&certificate, &ca, &key])?.as_slice() {
                [] => {}
                [_, _, _] => make(root, broker_id, listen.ip())?,
                [.., last] if *last == &key && is_development(&certificate) => make(root, broker_id, listen.ip())?,
                [missing, ..] => return Err(TlsError::Missing { path: missing.to_path_buf() }),
            }
            Paths { certificate, key, ca: Some(ca) }
        }
    };
    Live::open(paths, broker_id)
}

/// Which of these files are not there. A link that leads nowhere (yet) is there, and somebody's.
fn missing_of(paths: [&PathBuf; 3]) -> Result<Vec<&PathBuf>, TlsError> {
    let mut missing = Vec::new();
    for path in paths {
        match path.symlink_metadata() {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => missing.push(path),
            Err(error) => return Err(TlsError::Io { path: path.clone(), error }),
        }
    }
    Ok(missing)
}

/// Whether a start made this certificate, and nothing rests on it while its key is missing.
fn is_development(certificate: &Path) -> bool {
    let read = CertificateDer::from_pem_file(certificate).ok();
    let name = read.and_then(|certificate| Name::of(&certificate).ok().flatten());
    let unique = name.as_ref().and_then(|name| name.cluster.strip_prefix(DEVELOPMENT));
    // Somebody may have a cluster that is called `development-eu`.
    unique.is_some_and(|unique| unique.len() == UNIQUE_CHARS && unique.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The endpoint's secret, made at the first start.
pub(crate) fn secret(root: &Path) -> Result<[u8; SECRET_BYTES], TlsError> {
    let path = root.join(SECRET_FILE);
    match std::fs::read(&path) {
        Ok(bytes) => {
            if let Ok(secret) = bytes.try_into() {
                return Ok(secret);
            }
            // Nothing rests on the old one but the speed with which clients notice this restart.
            tracing::warn!(path = %path.display(), "the endpoint's secret is damaged and made anew");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(TlsError::Io { path, error }),
    }
    let secret: [u8; SECRET_BYTES] = rand::random();
    write_aside(&path, &secret, true)?;
    Ok(secret)
}

/// Writes the client profile: where the broker listens and what to trust. `hosts`: those of its certificate.
pub(crate) fn write_profile(root: &Path, listen: SocketAddr, hosts: &[String]) -> Result<PathBuf, TlsError> {
    let bootstrap = reachable(listen);
    let mut text = format!(
        "# How a client reaches this broker. Written at each start.\nbootstrap = [\"{bootstrap}\"]\nca = \"{CA_FILE}\"\n"
    );
    if hosts.iter().any(|host| host == SERVER_NAME) {
        text += &format!("server_name = \"{SERVER_NAME}\"\n");
    }
    let path = root.join(PROFILE_FILE);
    write_aside(&path, text.as_bytes(), false)?;
    Ok(path)
}

/// Where a client on this machine reaches a socket bound to `listen`: an unspecified address is no destination.
pub(crate) fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn make(root: &Path, broker_id: u32, listen: IpAddr) -> Result<(), TlsError> {
    // As long as anybody keeps a development broker.
    let validity = Validity { not_before_s: 1_704_067_200, not_after_s: 4_859_740_800 };
    let unique: String = uuid::Uuid::new_v4().simple().to_string().chars().take(UNIQUE_CHARS).collect();
    let (authority, ca) = Authority::make(&format!("{DEVELOPMENT}{unique}"), validity, None)?;
    let mut hosts = vec![SERVER_NAME.to_owned(), "127.0.0.1".into(), "::1".into()];
    if !listen.is_loopback() && !listen.is_unspecified() {
        hosts.push(listen.to_string());
    }
    let broker = authority.broker(i32::try_from(broker_id).unwrap_or(i32::MAX), &hosts, validity)?;
    // The key is what completes the set, so it is written last: without it nobody misses the others.
    write_aside(&root.join(CERTIFICATE_FILE), broker.certificate_pem.as_bytes(), false)?;
    write_aside(&root.join(CA_FILE), ca.certificate_pem.as_bytes(), false)?;
    write_aside(&root.join(KEY_FILE), broker.key_pem.as_bytes(), true)
}

/// Writes a file aside, syncs it and renames it into place. `private`: for its owner alone, from its first byte on.
///
/// # Errors
/// [`TlsError::Io`].
pub fn write_aside(path: &Path, bytes: &[u8], private: bool) -> Result<(), TlsError> {
    place(path, bytes, private, |_| Ok(()))
}

/// As [`write_aside`], over a file that is there. Its owner and its mode stay: whoever was to read the old one reads the new one.
///
/// # Errors
/// [`TlsError::Io`]; the file is as it was then.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), TlsError> {
    place(path, bytes, true, |file| {
        let before = std::fs::metadata(path)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::{MetadataExt, fchown};
            let now = file.metadata()?;
            if (now.uid(), now.gid()) != (before.uid(), before.gid()) {
                fchown(file, Some(before.uid()), Some(before.gid()))?;
            }
        }
        file.set_permissions(before.permissions())
    })
}

fn place(
    path: &Path,
    bytes: &[u8],
    private: bool,
    prepare: impl FnOnce(&File) -> std::io::Result<()>,
) -> Result<(), TlsError> {
    let aside = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        // One that a crash left may have been made for everybody.
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        if private {
            use std::os::unix::fs::OpenOptionsExt;
            options.mode(0o600);
        }
        let mut file = options.open(&aside)?;
        prepare(&file)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, path)?;
        // Else the old name may be back after a power loss.
        #[cfg(unix)]
        File::open(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?
            .sync_all()?;
        Ok(())
    };
    write().map_err(|error| TlsError::Io { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn development(root: &Path, broker_id: u32) -> Result<Live, TlsError> {
        open(root, None, broker_id, "127.0.0.1:0".parse().unwrap()).map(|(live, _)| live)
    }

    #[test]
    fn a_development_certificate_is_made_once_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (development(root.path(), 3).unwrap(), development(root.path(), 3).unwrap());
        assert_eq!(first.ca_pem(), second.ca_pem());
        assert_eq!(first.current().certified.cert, second.current().certified.cert);
        assert!(std::fs::read_dir(root.path()).unwrap().all(|e| e.unwrap().file_type().unwrap().is_file()));
    }

    /// Whoever puts a cluster's certificates into the folder may forget one.
    #[test]
    fn what_is_there_in_part_is_kept_unless_a_start_left_it() {
        for missing in [CA_FILE, CERTIFICATE_FILE, KEY_FILE] {
            let root = tempfile::tempdir().unwrap();
            let validity = Validity { not_before_s: 1_704_067_200, not_after_s: 4_859_740_800 };
            let (authority, ca) = Authority::make("development-eu", validity, None).unwrap();
            let broker = authority.broker(3, &["localhost".into()], validity).unwrap();
            let files = [
                (CA_FILE, &ca.certificate_pem),
                (CERTIFICATE_FILE, &broker.certificate_pem),
                (KEY_FILE, &broker.key_pem),
            ];
            let kept: Vec<_> = files.into_iter().filter(|(name, _)| *name != missing).collect();
            for (name, text) in &kept {
                std::fs::write(root.path().join(name), text).unwrap();
            }
            let refused = development(root.path(), 3).map(|_| ()).unwrap_err().to_string();
            assert!(refused.contains(missing) && refused.contains("is missing"), "{refused}");
            for (name, text) in kept {
                assert_eq!(std::fs::read_to_string(root.path().join(name)).unwrap(), *text);
            }
            assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
        }
        #[cfg(unix)]
        {
            // Nothing is mounted where they lead to.
            let root = tempfile::tempdir().unwrap();
            for name in [CA_FILE, CERTIFICATE_FILE, KEY_FILE] {
                std::os::unix::fs::symlink(root.path().join("mount").join(name), root.path().join(name)).unwrap();
            }
            let refused = development(root.path(), 3).map(|_| ()).unwrap_err().to_string();
            assert!([CA_FILE, CERTIFICATE_FILE, KEY_FILE].iter().any(|name| refused.contains(name)), "{refused}");
            assert!(root.path().join(KEY_FILE).is_symlink() && root.path().join(CERTIFICATE_FILE).is_symlink());
        }
        // A start that was killed before it was done.
        for left in [&[CERTIFICATE_FILE][..], &[CERTIFICATE_FILE, CA_FILE]] {
            let root = tempfile::tempdir().unwrap();
            development(root.path(), 3).unwrap();
            for name in [CA_FILE, CERTIFICATE_FILE, KEY_FILE].iter().filter(|name| !left.contains(name)) {
                std::fs::remove_file(root.path().join(name)).unwrap();
            }
            development(root.path(), 3).unwrap();
        }
    }

    /// A folder that is copied to be another broker's is not quietly the old one.
    #[test]
    fn a_certificate_is_one_brokers() {
        let root = tempfile::tempdir().unwrap();
        development(root.path(), 3).unwrap();
        let refused = development(root.path(), 4).unwrap_err().to_string();
        assert!(refused.contains("/broker/3") && refused.contains("broker 4 (broker.id)"), "{refused}");
    }

    #[cfg(unix)]
    #[test]
    fn the_key_is_readable_by_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        development(root.path(), 1).unwrap();
        let mode = std::fs::metadata(root.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }

    #[test]
    fn a_file_that_is_no_certificate_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("mine.pem");
        std::fs::write(&path, "no certificate").unwrap();
        let configured = Configured { certificate: path.clone(), key: path, ca: None };
        let error = open(root.path(), Some(configured), 1, "127.0.0.1:0".parse().unwrap()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("mine.pem"), "{error}");
    }

    #[test]
    fn the_profile_names_an_address_that_can_be_reached() {
        assert_eq!(reachable("0.0.0.0:9".parse().unwrap()), "127.0.0.1:9".parse().unwrap());
        assert_eq!(reachable("[::]:9".parse().unwrap()), "[::1]:9".parse().unwrap());
        assert_eq!(reachable("192.0.2.1:9".parse().unwrap()), "192.0.2.1:9".parse().unwrap());
    }
}
