//! The broker's certificate: one that is configured, or a development certificate made in the data folder.
//!
//! Owns: the files `ca.pem`, `broker.pem`, `broker-key.pem` and `client.toml` at the data root (files, no folder: Kafka
//! fails on a folder that it cannot parse). Refuses: to be a certificate authority for more than one broker. The
//! authority's key is thrown away once it has signed, so nothing that lies on the disk can sign another broker.
//! Read next: [`crate::quic`].

pub mod make;
pub mod principal;

use crate::quic::SECRET_BYTES;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
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
    /// A certificate could not be made.
    #[error("making a development certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// What TLS needs of the broker, and a client of it.
pub(crate) struct Identity {
    pub(crate) certificates: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    /// PEM of what clients have to trust; `None` where the certificate was configured and its issuer is not known.
    pub(crate) ca_pem: Option<String>,
}

/// Reads the configured certificate, or the development certificate of `root`; makes the latter if it is missing.
pub(crate) fn identity(
    root: &Path,
    configured: Option<(&Path, &Path)>,
    listen: SocketAddr,
) -> Result<Identity, TlsError> {
    if let Some((certificate, key)) = configured {
        return Ok(Identity { certificates: read_certificates(certificate)?, key: read_key(key)?, ca_pem: None });
    }
    let (ca, certificate, key) = (root.join(CA_FILE), root.join(CERTIFICATE_FILE), root.join(KEY_FILE));
    if !(ca.exists() && certificate.exists() && key.exists()) {
        make(root, listen.ip())?;
    }
    let ca_pem = std::fs::read_to_string(&ca).map_err(|error| TlsError::Io { path: ca, error })?;
    Ok(Identity { certificates: read_certificates(&certificate)?, key: read_key(&key)?, ca_pem: Some(ca_pem) })
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

/// Writes the client profile: where the broker listens and what to trust.
pub(crate) fn write_profile(root: &Path, listen: SocketAddr) -> Result<PathBuf, TlsError> {
    let bootstrap = reachable(listen);
    let text = format!(
        "# How a client reaches this broker. Written at each start.\nbootstrap = [\"{bootstrap}\"]\nca = \"{CA_FILE}\"\nserver_name = \"{SERVER_NAME}\"\n"
    );
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

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |error| TlsError::Pem { path: path.to_owned(), error };
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<_, _>>().map_err(pem)?;
    if certificates.is_empty() {
        return Err(pem(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::Pem { path: path.to_owned(), error })
}

fn make(root: &Path, listen: IpAddr) -> Result<(), TlsError> {
    let mut authority = params("Headwater development authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

    let mut broker = params("Headwater development broker");
    broker.subject_alt_names = vec![
        SanType::DnsName(SERVER_NAME.try_into()?),
        SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
        SanType::IpAddress(std::net::Ipv6Addr::LOCALHOST.into()),
    ];
    if !listen.is_loopback() && !listen.is_unspecified() {
        broker.subject_alt_names.push(SanType::IpAddress(listen));
    }
    broker.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    broker.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = broker.signed_by(&key, &authority)?;

    // The authority's certificate is what completes the set, so it is written last.
    write_aside(&root.join(KEY_FILE), key.serialize_pem().as_bytes(), true)?;
    write_aside(&root.join(CERTIFICATE_FILE), certificate.pem().as_bytes(), false)?;
    write_aside(&root.join(CA_FILE), authority.pem().as_bytes(), false)
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2024, 1, 1);
    params.not_after = date_time_ymd(2124, 1, 1);
    params
}

/// Writes a file aside, syncs it and renames it into place.
fn write_aside(path: &Path, bytes: &[u8], private: bool) -> Result<(), TlsError> {
    let aside = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        if private {
            use std::os::unix::fs::OpenOptionsExt;
            options.mode(0o600);
        }
        let mut file = options.open(&aside)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, path)
    };
    write().map_err(|error| TlsError::Io { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_development_certificate_is_made_once_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let first = identity(root.path(), None, listen).unwrap();
        let second = identity(root.path(), None, listen).unwrap();
        assert_eq!(first.ca_pem, second.ca_pem);
        assert_eq!(first.certificates, second.certificates);
        assert!(std::fs::read_dir(root.path()).unwrap().all(|e| e.unwrap().file_type().unwrap().is_file()));
    }

    #[cfg(unix)]
    #[test]
    fn the_key_is_readable_by_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        identity(root.path(), None, "127.0.0.1:0".parse().unwrap()).unwrap();
        let mode = std::fs::metadata(root.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }

    #[test]
    fn a_file_that_is_no_certificate_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("mine.pem");
        std::fs::write(&path, "no certificate").unwrap();
        let Err(error) = identity(root.path(), Some((&path, &path)), "127.0.0.1:0".parse().unwrap()) else {
            panic!("accepted")
        };
        assert!(error.to_string().contains("mine.pem"), "{error}");
    }

    #[test]
    fn the_profile_names_an_address_that_can_be_reached() {
        assert_eq!(reachable("0.0.0.0:9".parse().unwrap()), "127.0.0.1:9".parse().unwrap());
        assert_eq!(reachable("[::]:9".parse().unwrap()), "[::1]:9".parse().unwrap());
        assert_eq!(reachable("192.0.2.1:9".parse().unwrap()), "192.0.2.1:9".parse().unwrap());
    }
}
