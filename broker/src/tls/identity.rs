//! What a broker shows and whom it trusts: one reading of its files, checked as a whole.
//!
//! Owns: [`Identity`] and every reason for which files are refused: no PEM, a key that is not the certificate's, an authority that did
//! not sign it, another broker's certificate; and that an authority is trusted within its time only. Refuses: to be changed; a renewal is another identity ([`super::live`]).
//! Read next: [`super::live`].

use super::TlsError;
use super::make::Validity;
use super::principal::{Holder, Name, NameError};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, OtherError, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How often the files are read anew because they were renewed meanwhile.
const RENEWALS_WHILE_READING: usize = 3;

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
    /// Reads the files; blocks. Whoever renews them puts the new key beside the old one, then the new certificate in the place of the old,
    /// then the new key alone in the place of both: so a key fits that was read while the certificate stayed the same.
    pub(crate) fn read(&self) -> Result<Contents, TlsError> {
        let read = |path: &Path| std::fs::read(path).map_err(|error| TlsError::Io { path: path.to_owned(), error });
        let (mut certificate, mut key) = (read(&self.certificate)?, read(&self.key)?);
        for _ in 0..RENEWALS_WHILE_READING {
            let again = read(&self.certificate)?;
            if again == certificate {
                break;
            }
            (certificate, key) = (again, read(&self.key)?);
        }
        Ok(Contents { certificate, key, ca: self.ca.as_deref().map(read).transpose()? })
    }
}

/// Whom a broker trusts.
pub(crate) struct Trusted {
    pub(crate) pem: String,
    authorities: Vec<Authority>,
    all: Judge,
    provider: Arc<CryptoProvider>,
    /// When the last of the authorities ends, in seconds since 1970.
    pub(crate) not_after_s: i64,
}

/// An authority, and when it is one: an anchor, which is what certificates are checked with, is a name and a key and knows no time.
struct Authority {
    anchor: TrustAnchor<'static>,
    subject: String,
    validity: Validity,
}

/// Judges certificates by the authorities that signed them.
struct Judge {
    roots: RootCertStore,
    /// Those of whoever connects.
    incoming: Arc<dyn ClientCertVerifier>,
}

/// A certificate is good but for its authority, whose time is not now.
#[derive(Debug, thiserror::Error)]
enum Untimely {
    #[error("its authority, {0}, expired {1} s ago")]
    Expired(String, i64),
    #[error("its authority, {0}, becomes valid in {1} s")]
    Early(String, i64),
}

impl Judge {
    fn new(
        anchors: impl IntoIterator<Item = TrustAnchor<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Judge, rustls::Error> {
        let roots = RootCertStore { roots: anchors.into_iter().collect() };
        let incoming = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), Arc::clone(provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Judge { roots, incoming })
    }
}

impl Trusted {
    fn new(path: &Path, pem: &[u8], provider: &Arc<CryptoProvider>) -> Result<Trusted, TlsError> {
        let unusable = |why: String| TlsError::Unusable { path: path.to_owned(), why };
        let mut roots = RootCertStore::empty();
        let mut said = Vec::new();
        for certificate in certificates(path, pem)? {
            let validity = Validity::of(&certificate).map_err(|error| unusable(error.to_string()))?;
            let subject = subject_of(&certificate).map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
            said.push((subject, validity));
        }
        let not_after_s = said.iter().map(|(_, validity)| validity.not_after_s).max().unwrap_or(i64::MIN);
        let all = Judge::new(roots.roots.clone(), provider).map_err(|error| unusable(error.to_string()))?;
        let authorities = roots.roots.into_iter().zip(said);
        let authorities =
            authorities.map(|(anchor, (subject, validity))| Authority { anchor, subject, validity }).collect();
        let pem = String::from_utf8(pem.to_vec()).map_err(|error| unusable(error.to_string()))?;
        Ok(Trusted { pem, authorities, all, provider: Arc::clone(provider), not_after_s })
    }

    /// Checks the certificate of whoever was dialled; not its name.
    ///
    /// # Errors
    /// What is wrong with it, or that its authority is not valid now.
    pub(crate) fn verify_server(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        self.judge(now, |judge| {
            verify_server_cert_signed_by_trust_anchor(&parsed, &judge.roots, intermediates, now, algorithms)
        })
    }

    /// Checks the certificate of whoever connects.
    ///
    /// # Errors
    /// As [`Trusted::verify_server`].
    pub(crate) fn verify_client(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(now, |judge| judge.incoming.verify_client_cert(end_entity, intermediates, now))
    }

    /// Checks signatures, for which authorities do not count.
    pub(crate) fn signatures(&self) -> &dyn ClientCertVerifier {
        &*self.all.incoming
    }

    /// The authorities that have expired, unless the same key goes on under a later certificate. Whoever they signed is refused.
    pub(crate) fn expired(&self, now_s: i64) -> impl Iterator<Item = &str> {
        let goes_on = move |of: &Authority| {
            self.authorities.iter().any(|other| other.anchor == of.anchor && other.validity.not_after_s >= now_s)
        };
        let expired = self.authorities.iter().filter(move |authority| !goes_on(authority));
        expired.map(|authority| authority.subject.as_str())
    }

    /// Asks with those authorities that are valid now.
    fn judge<T>(&self, now: UnixTime, ask: impl Fn(&Judge) -> Result<T, rustls::Error>) -> Result<T, rustls::Error> {
        let verified = ask(&self.all)?;
        let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let is_valid = |authority: &&Authority| {
            (authority.validity.not_before_s..=authority.validity.not_after_s).contains(&now_s)
        };
        let (valid, others): (Vec<&Authority>, Vec<&Authority>) = self.authorities.iter().partition(is_valid);
        if others.is_empty() {
            return Ok(verified);
        }
        let only = |authorities: &[&Authority]| {
            let anchors = authorities.iter().map(|authority| authority.anchor.clone());
            Judge::new(anchors, &self.provider).and_then(|judge| ask(&judge))
        };
        if !valid.is_empty()
            && let Ok(verified) = only(&valid)
        {
            return Ok(verified);
        }
        let signed = others.iter().find(|authority| only(&[authority]).is_ok());
        let untimely =
            signed.or(others.first()).map(|Authority { subject, validity, .. }| match now_s > validity.not_after_s {
                true => Untimely::Expired(subject.clone(), now_s - validity.not_after_s),
                false => Untimely::Early(subject.clone(), validity.not_before_s - now_s),
            });
        Err(match untimely {
            Some(untimely) => CertificateError::Other(OtherError(Arc::new(untimely))).into(),
            None => CertificateError::UnknownIssuer.into(),
        })
    }
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
        let certified = certified(&certificates, &keys(&paths.key, &contents.key)?, provider);
        let certified = certified.map_err(|error| unusable(error.to_string()))?;
        let mismatch = || TlsError::Mismatch { certificate: paths.certificate.clone(), key: paths.key.clone() };
        let certified = certified.ok_or_else(mismatch)?;
        let trusted = match (&paths.ca, &contents.ca) {
            (Some(path), Some(pem)) => Some(Trusted::new(path, pem, provider)?),
            _ => None,
        };
        let identity = Identity { certified: Arc::new(certified), name, validity, trusted };
        // Within its time, whatever the clock says: that is another question.
        let within_s = now_s.clamp(validity.not_before_s, validity.not_after_s.max(validity.not_before_s));
        match identity.verify(within_s) {
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
    fn verify(&self, at_s: i64) -> Result<(), rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(()) };
        let Some((end_entity, intermediates)) = self.certified.cert.split_first() else { return Ok(()) };
        let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at_s).unwrap_or(0)));
        trusted.verify_server(end_entity, intermediates, at)?;
        // Whoever has no name dials nobody.
        if self.name.is_some() {
            trusted.verify_client(end_entity, intermediates, at)?;
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
    pub(crate) fn check_time(&self, paths: &Paths, now_s: i64) -> Result<(), TlsError> {
        let Validity { not_before_s, not_after_s } = self.validity;
        let untimely = |why: String| Err(TlsError::Untimely { path: paths.certificate.clone(), why });
        if now_s < not_before_s {
            return untimely(format!("it becomes valid in {} s; is this machine's clock right?", not_before_s - now_s));
        }
        if now_s > not_after_s {
            return untimely(format!("it expired {} s ago; make a new one in its place", now_s - not_after_s));
        }
        self.verify(now_s).map_err(|error| match of_authority_time(&error) {
            Some(why) => TlsError::Untimely { path: paths.certificate.clone(), why: why.to_string() },
            None => self.not_of_authority(paths, &error),
        })
    }

    /// Whether it may take the place of `before` while the broker runs: the same broker of the same cluster, and valid.
    pub(crate) fn check_renewal(&self, before: &Identity, paths: &Paths, now_s: i64) -> Result<(), TlsError> {
        let said = |name: &Option<Name>| name.as_ref().map_or_else(|| "nobody".to_owned(), Name::to_string);
        if self.name != before.name {
            let why = format!("it names {}, and this broker is {}", said(&self.name), said(&before.name));
            return Err(TlsError::Unusable { path: paths.certificate.clone(), why });
        }
        self.check_time(paths, now_s)
    }
}

fn is_of_time(error: &rustls::Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let is_its_own = matches!(
        error,
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
    );
    is_its_own || of_authority_time(error).is_some()
}

/// What is wrong with the time of a certificate's authority.
fn of_authority_time(error: &rustls::Error) -> Option<&Untimely> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => why.downcast_ref(),
        _ => None,
    }
}

fn subject_of(certificate: &CertificateDer<'_>) -> Result<String, NameError> {
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|error| NameError::NoCertificate(error.to_string()))?;
    Ok(parsed.subject().to_string())
}

/// The certificate with that of the keys which is its own, if there is one: while it is renewed, there are the old one and the new one.
fn certified(
    certificates: &[CertificateDer<'static>],
    keys: &[PrivateKeyDer<'static>],
    provider: &CryptoProvider,
) -> Result<Option<CertifiedKey>, rustls::Error> {
    for key in keys {
        match CertifiedKey::from_der(certificates.to_vec(), key.clone_key(), provider) {
            Err(rustls::Error::InconsistentKeys(_)) => {}
            certified => return certified.map(Some),
        }
    }
    Ok(None)
}

fn keys(path: &Path, pem: &[u8]) -> Result<Vec<PrivateKeyDer<'static>>, TlsError> {
    let broken = |error| TlsError::Pem { path: path.to_owned(), error };
    let found: Vec<_> = PrivateKeyDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(broken)?;
    if found.is_empty() {
        return Err(broken(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let broken = |error| TlsError::Pem { path: path.to_owned(), error };
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(broken)?;
    if found.is_empty() {
        return Err(broken(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::make::{Authority, Issued};
    use super::*;

    const END_S: i64 = 1_000_000_000;

    fn trusting(pem: &[&Issued]) -> Trusted {
        let pem: String = pem.iter().map(|issued| issued.certificate_pem.as_str()).collect();
        Trusted::new(Path::new("ca.pem"), pem.as_bytes(), &Arc::new(crate::quic::crypto_provider())).unwrap()
    }

    fn at(seconds: i64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds as u64))
    }

    /// A certificate that was read before a renewal and a key that was read after it were a pair that does not fit, and a start was refused.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_pair_that_is_renewed_while_it_is_read_fits() {
        let dir = tempfile::tempdir().unwrap();
        let [certificate, key] = ["certificate", "key"].map(|name| dir.path().join(name));
        std::fs::write(&certificate, "old").unwrap();
        // Who opens a pipe to read waits for who opens it to write.
        let pipe = |path: &Path| {
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        };
        pipe(&key);
        let paths = Paths { certificate: certificate.clone(), key: key.clone(), ca: None };
        let next = dir.path().join("next");
        std::thread::spawn(move || {
            for _ in 0..2 {
                let mut to = std::fs::OpenOptions::new().write(true).open(&key).unwrap();
                std::fs::write(&certificate, "new").unwrap();
                // Whoever reads the key once more finds a pipe of its own, and not the end of this one.
                pipe(&next);
                std::fs::rename(&next, &key).unwrap();
                std::io::Write::write_all(&mut to, b"new key").unwrap();
            }
        });
        let Contents { certificate, key, .. } = paths.read().unwrap();
        assert_eq!((&certificate[..], &key[..]), (&b"new"[..], &b"new key"[..]));
    }

    /// Certificates are checked with an authority's name and key, which never end: one that had expired was trusted on.
    #[test]
    fn an_authority_is_trusted_within_its_time_only() {
        let short = Validity { not_before_s: END_S - 1_000, not_after_s: END_S };
        let long = Validity { not_before_s: 0, not_after_s: 4_000_000_000 };
        let (_, old) = Authority::make("prod", short, None).unwrap();
        // The same key, so what it signs is signed by the old one too, and may outlive that.
        let (authority, renewed) = Authority::make("prod", long, Some(&old.key_pem)).unwrap();
        let (_, other) = Authority::make("prod", long, None).unwrap();
        let broker = authority.broker(2, &["localhost".into()], long).unwrap();
        let leaf = CertificateDer::from_pem_slice(broker.certificate_pem.as_bytes()).unwrap();
        let both = |trusted: &Trusted, seconds: i64| {
            let told = |error: rustls::Error| of_authority_time(&error).expect("a matter of time").to_string();
            let client = trusted.verify_client(&leaf, &[], at(seconds)).map(|_| ()).map_err(told);
            assert_eq!(client, trusted.verify_server(&leaf, &[], at(seconds)).map_err(told));
            client
        };
        for trusted in [trusting(&[&old]), trusting(&[&other, &old])] {
            assert_eq!(both(&trusted, END_S), Ok(()));
            let refused = both(&trusted, END_S + 7).unwrap_err();
            assert!(refused.contains("authority of prod") && refused.ends_with("expired 7 s ago"), "{refused}");
            let refused = both(&trusted, END_S - 1_003).unwrap_err();
            assert!(refused.ends_with("becomes valid in 3 s"), "{refused}");
            assert_eq!((trusted.expired(END_S).count(), trusted.expired(END_S + 1).count()), (0, 1));
        }
        for trusted in [trusting(&[&renewed, &old]), trusting(&[&old, &renewed])] {
            assert_eq!(both(&trusted, END_S + 7), Ok(()), "its key goes on");
            assert_eq!(trusted.expired(END_S + 7).count(), 0);
        }
        let unknown = trusting(&[&other]).verify_server(&leaf, &[], at(END_S)).unwrap_err();
        assert!(of_authority_time(&unknown).is_none(), "{unknown}");
    }
}
