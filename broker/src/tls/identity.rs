//! What a broker shows and whom it trusts: one reading of its files, checked as a whole.
//!
//! Owns: [`Identity`] and every reason for which files are refused: no PEM, a key that is not the certificate's, an authority that did
//! not sign it, another broker's certificate. Refuses: to be changed; a renewal is another identity ([`super::live`]).
//! Read next: [`super::live`].

use super::TlsError;
use super::make::Validity;
use super::principal::{Holder, Name};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where an identity is read from. Certificate and key may stand in one file.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// The cluster's authority, or several: the old one and the new one. `None`: nobody's certificate is asked for.
    pub(crate) ca: Option<PathBuf>,
}

/// The bytes of the files.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Option<Vec<u8>>,
}

impl Paths {
    /// Reads the files; blocks.
    pub(crate) fn read(&self) -> Result<Contents, TlsError> {
        let read = |path: &Path| std::fs::read(path).map_err(|error| TlsError::Io { path: path.to_owned(), error });
        Ok(Contents {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
            ca: self.ca.as_deref().map(read).transpose()?,
        })
    }
}

/// Whom a broker trusts.
pub(crate) struct Trusted {
    pub(crate) pem: String,
    pub(crate) roots: RootCertStore,
    /// Judges the certificates of whoever connects.
    pub(crate) incoming: Arc<dyn ClientCertVerifier>,
    /// When the last of the authorities ends, in seconds since 1970.
    pub(crate) not_after_s: i64,
}

/// What a broker shows and whom it trusts.
pub(crate) struct Identity {
    pub(crate) certified: Arc<CertifiedKey>,
    /// What the certificate says of its holder.
    pub(crate) name: Option<Name>,
    pub(crate) validity: Validity,
    pub(crate) trusted: Option<Trusted>,
}

impl Identity {
    /// Checks the files of the broker with this id. Whether they are valid at `now_s` is [`Identity::check_time`]'s.
    pub(crate) fn new(
        paths: &Paths,
        contents: &Contents,
        broker_id: u32,
        now_s: i64,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Identity, TlsError> {
        let certificates = certificates(&paths.certificate, &contents.certificate)?;
        let unusable = |why: String| TlsError::Unusable { path: paths.certificate.clone(), why };
        let end_entity = certificates.first().ok_or_else(|| unusable("no certificate in it".into()))?;
        let name = Name::of(end_entity).map_err(|error| unusable(error.to_string()))?;
        let validity = Validity::of(end_entity).map_err(|error| unusable(error.to_string()))?;
        if let Some(name) = &name
            && !matches!(name.holder, Holder::Broker(id) if i64::from(id) == i64::from(broker_id))
        {
            return Err(unusable(format!(
                "it is the certificate of {name}, and this is broker {broker_id} (broker.id)"
            )));
        }
        let key = PrivateKeyDer::from_pem_slice(&contents.key);
        let key = key.map_err(|error| TlsError::Pem { path: paths.key.clone(), error })?;
        let certified = CertifiedKey::from_der(certificates, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                TlsError::Mismatch { certificate: paths.certificate.clone(), key: paths.key.clone() }
            }
            error => unusable(error.to_string()),
        })?;
        let trusted = match (&paths.ca, &contents.ca) {
            (Some(path), Some(pem)) => Some(trusted(path, pem, provider)?),
            _ => None,
        };
        let identity = Identity { certified: Arc::new(certified), name, validity, trusted };
        // Within its time, whatever the clock says: that is another question.
        let within_s = now_s.clamp(validity.not_before_s, validity.not_after_s.max(validity.not_before_s));
        match identity.verify(within_s, provider) {
            Err(error) if !is_of_time(&error) => Err(identity.not_of_authority(paths, &error)),
            _ => Ok(identity),
        }
    }

    /// Whether it shows the same and trusts the same as another one.
    pub(crate) fn is_same(&self, other: &Identity) -> bool {
        let trusted = self.trusted.as_ref().map(|trusted| &trusted.pem);
        self.certified.cert == other.certified.cert && trusted == other.trusted.as_ref().map(|trusted| &trusted.pem)
    }

    /// Its cluster, where its certificate names one.
    pub(crate) fn cluster(&self) -> Option<&str> {
        self.name.as_ref().map(|name| name.cluster.as_str())
    }

    /// Checks what it shows as peers and clients will, who trust the same authority: that it comes from there, for what it is used for.
    fn verify(&self, at_s: i64, provider: &CryptoProvider) -> Result<(), rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(()) };
        let Some((end_entity, intermediates)) = self.certified.cert.split_first() else { return Ok(()) };
        let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at_s).unwrap_or(0)));
        let algorithms = provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &trusted.roots, intermediates, at, algorithms)?;
        // Whoever has no name dials nobody.
        if self.name.is_some() {
            trusted.incoming.verify_client_cert(end_entity, intermediates, at)?;
        }
        Ok(())
    }

    fn not_of_authority(&self, paths: &Paths, error: &rustls::Error) -> TlsError {
        let why = match error {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                "another authority signed it".into()
            }
            error => error.to_string(),
        };
        let ca = paths.ca.clone().unwrap_or_default();
        TlsError::NotOfAuthority { certificate: paths.certificate.clone(), ca, why }
    }

    /// Whether it and its authority are valid now.
    pub(crate) fn check_time(&self, paths: &Paths, now_s: i64, provider: &CryptoProvider) -> Result<(), TlsError> {
        let Validity { not_before_s, not_after_s } = self.validity;
        let untimely = |why: String| Err(TlsError::Untimely { path: paths.certificate.clone(), why });
        if now_s < not_before_s {
            return untimely(format!("it becomes valid in {} s; is this machine's clock right?", not_before_s - now_s));
        }
        if now_s > not_after_s {
            return untimely(format!("it expired {} s ago; make a new one in its place", now_s - not_after_s));
        }
        self.verify(now_s, provider).map_err(|error| match is_of_time(&error) {
            true => TlsError::Untimely { path: paths.certificate.clone(), why: error.to_string() },
            false => self.not_of_authority(paths, &error),
        })
    }

    /// Whether it may take the place of `before` while the broker runs: the same broker of the same cluster, and valid.
    pub(crate) fn check_renewal(
        &self,
        before: &Identity,
        paths: &Paths,
        now_s: i64,
        provider: &CryptoProvider,
    ) -> Result<(), TlsError> {
        let said = |name: &Option<Name>| name.as_ref().map_or_else(|| "nobody".to_owned(), Name::to_string);
        if self.name != before.name {
            let why = format!("it names {}, and this broker is {}", said(&self.name), said(&before.name));
            return Err(TlsError::Unusable { path: paths.certificate.clone(), why });
        }
        self.check_time(paths, now_s, provider)
    }
}

fn is_of_time(error: &rustls::Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
    )
}

fn trusted(path: &Path, pem: &[u8], provider: &Arc<CryptoProvider>) -> Result<Trusted, TlsError> {
    let unusable = |why: String| TlsError::Unusable { path: path.to_owned(), why };
    let mut roots = RootCertStore::empty();
    let mut not_after_s = i64::MIN;
    for certificate in certificates(path, pem)? {
        let validity = Validity::of(&certificate).map_err(|error| unusable(error.to_string()))?;
        not_after_s = not_after_s.max(validity.not_after_s);
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    let incoming = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), Arc::clone(provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| unusable(error.to_string()))?;
    let pem = String::from_utf8(pem.to_vec()).map_err(|error| unusable(error.to_string()))?;
    Ok(Trusted { pem, roots, incoming, not_after_s })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let broken = |error| TlsError::Pem { path: path.to_owned(), error };
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(broken)?;
    if found.is_empty() {
        return Err(broken(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}
