//! The identity in use: what handshakes are made with, and its renewal while the broker runs.
//!
//! Every handshake, incoming or outgoing, asks [`Live`] for the identity of this moment, so a renewal holds from the next one on;
//! connections that are open stay as they are. The files are read again every `tls.reload.interval.ms` and compared by their
//! bytes: a copied file keeps its time, a mounted secret changes behind a link, and a signal would have to be sent to
//! every broker by whoever renews. Files that cannot be used change nothing: what was in use stays in use, and that is logged and counted.
//!
//! Owns: that, and the answers to rustls. Refuses: to judge files ([`super::identity`]) and names ([`super::principal`]).
//! Read next: [`crate::peer`].

use super::TlsError;
use super::identity::{Contents, Identity, Paths, Trusted};
use super::make::hosts_of;
use super::principal::{Principal, Stranger};
use crate::clock::now_ms;
use crate::metrics::Metrics;
use crate::pool::Pool;
use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// The identity in use.
pub(crate) struct Live {
    current: ArcSwap<Identity>,
    paths: Paths,
    broker_id: u32,
    provider: Arc<CryptoProvider>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("paths", &self.paths).finish_non_exhaustive()
    }
}

/// What came of looking at the files.
#[derive(Debug)]
pub(crate) enum Look {
    /// They are those that were looked at before.
    Same,
    /// They cannot be used, and may be half written: the next look tells.
    Unsettled,
    /// They are in use from now on.
    Renewed,
    /// They cannot be used; the earlier identity stays. Where the time alone is why, later looks judge them again.
    Refused(TlsError),
    /// After they could not be used, they are again what is in use.
    Restored,
}

/// What the last looks saw.
pub(crate) struct Seen {
    /// The bytes of what is in use.
    in_use: Contents,
    /// What could not be used when it was first seen.
    unsettled: Option<Found>,
    /// What was refused last, and whether that is for good.
    refused: Option<(Found, bool)>,
}

/// What a look finds; `None`: the files could not be read.
type Found = Option<Contents>;

impl Seen {
    fn new(in_use: Contents) -> Seen {
        Seen { in_use, unsettled: None, refused: None }
    }
}

impl Live {
    /// Reads the files; blocks. A certificate that is not valid by the clock is taken all the same, with an error in the log: what
    /// repairs it is a renewal, which needs a broker that runs.
    pub(crate) fn open(paths: Paths, broker_id: u32) -> Result<(Live, Seen), TlsError> {
        let provider = Arc::new(crate::quic::crypto_provider());
        let contents = paths.read()?;
        let now_s = now_ms() / 1_000;
        let identity = Identity::new(&paths, &contents, broker_id, now_s, &provider)?;
        if let Err(error) = identity.check_time(&paths, now_s) {
            tracing::error!(%error, "nobody who checks the certificate will connect until it is renewed");
        }
        let live = Live { current: ArcSwap::from_pointee(identity), paths, broker_id, provider };
        Ok((live, Seen::new(contents)))
    }

    /// The identity of this moment.
    pub(crate) fn current(&self) -> Arc<Identity> {
        self.current.load_full()
    }

    /// Whom it trusts, as PEM.
    pub(crate) fn ca_pem(&self) -> Option<String> {
        self.current.load().trusted.as_ref().map(|trusted| trusted.pem.clone())
    }

    /// The hosts that the certificate is good for.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let identity = self.current.load();
        // It was read before; one without hosts has none.
        identity.certified.cert.first().and_then(|certificate| hosts_of(certificate).ok()).unwrap_or_default()
    }

    pub(crate) fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// Who is at the other end, by the certificate that the handshake verified.
    pub(crate) fn principal(&self, connection: &quinn::Connection) -> Result<Principal, Stranger> {
        let shown = connection.peer_identity().and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
        match shown.as_deref().and_then(|chain| chain.first()) {
            None => Ok(Principal::Anonymous),
            Some(certificate) => Principal::of(certificate, self.current.load().cluster()),
        }
    }

    /// Looks at the files once; blocks. Certificate and key are two files and are not replaced at one moment, so what cannot be used
    /// is refused only when the next look finds it unchanged. What is refused because of the time is told once and judged at each look:
    /// it may be too early for it.
    pub(crate) fn look(&self, seen: &mut Seen, now_s: i64) -> Look {
        let read = self.paths.read();
        let found = read.as_ref().ok().cloned();
        if found.as_ref() == Some(&seen.in_use) {
            seen.unsettled = None;
            return if seen.refused.take().is_some() { Look::Restored } else { Look::Same };
        }
        let was_told = matches!(&seen.refused, Some((refused, _)) if *refused == found);
        if was_told && matches!(seen.refused, Some((_, true))) {
            seen.unsettled = None;
            return Look::Same;
        }
        let error = match read.and_then(|contents| Ok((self.take(&contents, now_s)?, contents))) {
            Ok((is_new, contents)) => {
                let was_refused = seen.refused.is_some();
                *seen = Seen::new(contents);
                return match (is_new, was_refused) {
                    (true, _) => Look::Renewed,
                    (false, true) => Look::Restored,
                    (false, false) => Look::Same,
                };
            }
            Err(error) => error,
        };
        let for_good = !error.is_of_time();
        if was_told && !for_good {
            seen.unsettled = None;
            return Look::Same;
        }
        if !was_told && seen.unsettled.as_ref() != Some(&found) {
            seen.unsettled = Some(found);
            return Look::Unsettled;
        }
        (seen.unsettled, seen.refused) = (None, Some((found, for_good)));
        Look::Refused(error)
    }

    /// Whether it is another identity than the one in use, whose place it took then.
    fn take(&self, contents: &Contents, now_s: i64) -> Result<bool, TlsError> {
        let identity = Identity::new(&self.paths, contents, self.broker_id, now_s, &self.provider)?;
        let current = self.current.load();
        identity.check_renewal(&current, &self.paths, now_s)?;
        let is_new = !identity.is_same(&current);
        if is_new {
            self.current.store(Arc::new(identity));
        }
        Ok(is_new)
    }

    /// Looks at the files again and again until shutdown.
    pub(crate) async fn keep(
        self: Arc<Self>,
        mut seen: Seen,
        every: Duration,
        pool: Pool,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) {
        self.measure(&metrics);
        let mut told_expired = self.is_expired();
        let mut told_authorities = self.tell_expired_authorities(Vec::new());
        while timeout(every, shutdown.cancelled()).await.is_err() {
            let live = Arc::clone(&self);
            let (looked, now_seen) = pool
                .run(move || {
                    let looked = live.look(&mut seen, now_ms() / 1_000);
                    (looked, seen)
                })
                .await;
            seen = now_seen;
            match looked {
                Look::Same | Look::Unsettled => {}
                Look::Renewed => {
                    let certificate = self.paths.certificate.display();
                    tracing::info!(%certificate, "certificates renewed: new connections use them");
                    metrics.tls_renewals.increment(1);
                    self.measure(&metrics);
                }
                Look::Refused(error) => {
                    if error.is_of_time() {
                        tracing::error!(%error, "the new certificates cannot be used now and are tried again; those from before stay in use");
                    } else {
                        tracing::error!(%error, "the new certificates cannot be used; those from before stay in use");
                    }
                    metrics.tls_renewals_refused.increment(1);
                }
                Look::Restored => {
                    let certificate = self.paths.certificate.display();
                    tracing::info!(%certificate, "the certificates in use can be read again");
                }
            }
            let expired = self.is_expired();
            if expired && !told_expired {
                let certificate = self.paths.certificate.display();
                tracing::error!(%certificate, "the certificate has expired: nobody who checks it connects any more; renew it");
            }
            told_expired = expired;
            told_authorities = self.tell_expired_authorities(told_authorities);
        }
    }

    /// Says which authorities have expired that `told` does not have; returns all that have.
    fn tell_expired_authorities(&self, told: Vec<String>) -> Vec<String> {
        let identity = self.current.load();
        let expired = identity.trusted.iter().flat_map(|trusted| trusted.expired(now_ms() / 1_000));
        let expired: Vec<String> = expired.map(str::to_owned).collect();
        for authority in expired.iter().filter(|authority| !told.contains(authority)) {
            tracing::error!(
                authority,
                "an authority has expired: certificates that it signed are refused; renew it, or leave it out"
            );
        }
        expired
    }

    fn is_expired(&self) -> bool {
        now_ms() / 1_000 > self.current.load().validity.not_after_s
    }

    fn measure(&self, metrics: &Metrics) {
        let identity = self.current.load();
        metrics.tls_certificate_expiry.set(identity.validity.not_after_s as f64);
        if let Some(trusted) = &identity.trusted {
            metrics.tls_ca_expiry.set(trusted.not_after_s as f64);
        }
    }

    fn incoming<T>(&self, judge: impl FnOnce(&Trusted) -> Result<T, rustls::Error>) -> Result<T, rustls::Error> {
        match &self.current.load().trusted {
            Some(trusted) => judge(trusted),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }
}

impl ResolvesServerCert for Live {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().certified))
    }
}

impl ResolvesClientCert for Live {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A certificate is asked for where there is an authority to check it with, and may be missing; one that is shown must be good.
impl ClientCertVerifier for Live {
    fn offer_client_auth(&self) -> bool {
        self.current.load().trusted.is_some()
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// No hints: whoever has a certificate shows it, and hears that it is not trusted instead of being anonymous without a word.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.incoming(|trusted| trusted.verify_client(end_entity, intermediates, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.incoming(|trusted| trusted.signatures().verify_tls12_signature(message, cert, dss))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.incoming(|trusted| trusted.signatures().verify_tls13_signature(message, cert, dss))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::make::{Authority, Issued, Validity};
    use super::*;
    use std::path::Path;

    const NOW_S: i64 = 1_000_000_000;

    struct Files {
        dir: tempfile::TempDir,
        authority: Authority,
    }

    impl Files {
        fn new() -> Files {
            let always = Validity { not_before_s: 0, not_after_s: 4_000_000_000 };
            let (authority, ca) = Authority::make("prod", always, None).unwrap();
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("ca"), ca.certificate_pem).unwrap();
            let files = Files { dir, authority };
            let first = files.issue();
            files.write("certificate", &first.certificate_pem);
            files.write("key", &first.key_pem);
            files
        }

        fn issue(&self) -> Issued {
            self.authority.broker(1, &[], Validity { not_before_s: 0, not_after_s: 2 * NOW_S }).unwrap()
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.path(name), text).unwrap();
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            Path::join(self.dir.path(), name)
        }

        fn open(&self) -> (Live, Seen) {
            let paths =
                Paths { certificate: self.path("certificate"), key: self.path("key"), ca: Some(self.path("ca")) };
            Live::open(paths, 1).unwrap()
        }
    }

    /// Two files are not replaced at one moment: a look in between is no alarm.
    #[test]
    fn what_is_half_written_is_waited_for() {
        let files = Files::new();
        let (live, mut seen) = files.open();
        let before = live.current().certified.cert.clone();
        let next = files.issue();
        files.write("key", &next.key_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Unsettled));
        assert_eq!(live.current().certified.cert, before);
        files.write("certificate", &next.certificate_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Renewed));
        assert_ne!(live.current().certified.cert, before);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Same));
    }

    /// `headwater cert --renew` replaces three files, one after another, and may end after each of them.
    #[test]
    fn whatever_is_left_of_a_renewal_can_be_used() {
        let files = Files::new();
        let (live, mut seen) = files.open();
        let before = live.current().certified.cert.clone();
        let (old_key, next) = (std::fs::read_to_string(files.path("key")).unwrap(), files.issue());
        files.write("key", &(old_key + &next.key_pem));
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Same), "nothing is new yet");
        assert_eq!(files.open().0.current().certified.cert, before);
        files.write("certificate", &next.certificate_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Renewed));
        let renewed = live.current().certified.cert.clone();
        assert_ne!(renewed, before);
        assert_eq!(files.open().0.current().certified.cert, renewed);
        files.write("key", &next.key_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Same), "told once");
        assert_eq!(files.open().0.current().certified.cert, renewed);
    }

    #[test]
    fn what_stays_broken_is_told_once() {
        let files = Files::new();
        let (live, mut seen) = files.open();
        let (certificate, key) = (files.path("certificate"), std::fs::read_to_string(files.path("key")).unwrap());
        for round in 0..2 {
            let next = files.issue();
            files.write("key", &next.key_pem);
            assert!(matches!(live.look(&mut seen, NOW_S), Look::Unsettled));
            let Look::Refused(error) = live.look(&mut seen, NOW_S) else { panic!("{round}: not refused") };
            assert!(matches!(&error, TlsError::Mismatch { certificate: of, .. } if *of == certificate), "{error}");
            assert!(matches!(live.look(&mut seen, NOW_S), Look::Same));
        }
        std::fs::remove_file(files.path("key")).unwrap();
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Unsettled));
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Refused(TlsError::Io { .. })));
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Same));
        files.write("key", &key);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Restored), "nothing is new");
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Same));
        let next = files.issue();
        files.write("key", &next.key_pem);
        files.write("certificate", &next.certificate_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Renewed));
    }

    /// By the clock alone a certificate is not renewed: a new one that is over, or not yet begun, changes nothing. One that was
    /// put there too early was looked at once, refused, and never again: the one in use expired beside it.
    #[test]
    fn a_renewal_is_taken_once_it_is_valid() {
        let files = Files::new();
        let (live, mut seen) = files.open();
        let before = live.current().certified.cert.clone();
        let next = files.issue();
        files.write("key", &next.key_pem);
        files.write("certificate", &next.certificate_pem);
        assert!(matches!(live.look(&mut seen, 3 * NOW_S), Look::Unsettled));
        let Look::Refused(error) = live.look(&mut seen, 3 * NOW_S) else { panic!("taken") };
        assert!(error.to_string().contains("expired"), "{error}");

        let validity = Validity { not_before_s: NOW_S + 100, not_after_s: 2 * NOW_S };
        let early = files.authority.broker(1, &[], validity).unwrap();
        files.write("key", &early.key_pem);
        files.write("certificate", &early.certificate_pem);
        assert!(matches!(live.look(&mut seen, NOW_S), Look::Unsettled));
        let Look::Refused(error) = live.look(&mut seen, NOW_S + 1) else { panic!("taken") };
        assert!(error.to_string().contains("becomes valid in 99 s"), "{error}");
        for later in [2, 50, 99] {
            assert!(matches!(live.look(&mut seen, NOW_S + later), Look::Same), "told once");
            assert_eq!(live.current().certified.cert, before);
        }
        assert!(matches!(live.look(&mut seen, NOW_S + 100), Look::Renewed));
        assert_ne!(live.current().certified.cert, before);
        assert!(matches!(live.look(&mut seen, NOW_S + 101), Look::Same));
    }
}
