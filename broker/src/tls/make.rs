//! Making certificates: a cluster's authority, and what it signs for brokers and clients.
//!
//! Owns: what stands in them ([`super::principal`] says how they name their holder). Refuses: files (the command's and
//! [`super`]'s) and clocks. Read next: [`super::principal`].
//!
//! A broker's certificate serves and dials (a broker is a client of the others), a client's only dials: so a client's can be
//! shown by no server, whatever name is in it. Keys are ECDSA P-256; the authority signs no other authority.

use super::principal::{Holder, Name, NameError};
use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::net::IpAddr;
use std::time::Duration;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Clocks run apart: what is signed now is valid on a machine that is behind by less than this.
const BACKDATED: Duration = Duration::from_secs(3_600);

/// Why no certificate could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakeError {
    /// The name that was asked for.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The authority's files do not belong together, or are none.
    #[error("{0}")]
    Authority(String),
    /// A host that can stand in no certificate.
    #[error("{0:?} is no host: write a DNS name or an IP address, without a port")]
    Host(String),
    /// It would outlive its authority, and be refused from then on.
    #[error("it would be valid for longer than its authority")]
    Outlives,
    /// The library's own words.
    #[error(transparent)]
    Library(#[from] rcgen::Error),
}

/// From when to when, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before_s: i64,
    /// The last second.
    pub not_after_s: i64,
}

impl Validity {
    /// From `now_s` on (and a little before, since clocks run apart), for so long.
    pub fn from_now(now_s: i64, length: Duration) -> Validity {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        Validity { not_before_s: now_s - seconds(BACKDATED), not_after_s: now_s.saturating_add(seconds(length)) }
    }

    /// What a certificate says of itself.
    ///
    /// # Errors
    /// [`NameError::NoCertificate`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Validity, NameError> {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| NameError::NoCertificate(error.to_string()))?;
        let validity = parsed.validity();
        Ok(Validity { not_before_s: validity.not_before.timestamp(), not_after_s: validity.not_after.timestamp() })
    }

    fn put(self, params: &mut CertificateParams) {
        // What X.509 can say ends with the year 9999.
        const LAST_S: i64 = 253_402_300_799;
        let at = |seconds: i64| {
            let since_1970 = Duration::from_secs(u64::try_from(seconds.clamp(0, LAST_S)).unwrap_or(0));
            date_time_ymd(1970, 1, 1) + since_1970
        };
        params.not_before = at(self.not_before_s);
        params.not_after = at(self.not_after_s);
    }
}

/// A certificate that was made, and its key, as PEM.
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key, which nobody else has.
    pub key_pem: String,
    /// Whom it names.
    pub name: Name,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A cluster's certificate authority, with its key.
#[derive(Debug)]
pub struct Authority {
    cluster: String,
    validity: Validity,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority for a cluster of this name. `key`: an earlier one's, so that what it signed stays good.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn make(cluster: &str, validity: Validity, key_pem: Option<&str>) -> Result<(Authority, Issued), MakeError> {
        let name = Name::new(cluster, Holder::Authority)?;
        let key = match key_pem {
            Some(pem) => authority_key(pem)?,
            None => KeyPair::generate()?,
        };
        // Told apart from the cluster's next authority by its key: whoever verifies finds the signer by this name.
        let digest = digest(&SHA256, &key.subject_public_key_info());
        let key_id: String = digest.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let mut params = params(&name, &format!("Headwater authority of {cluster} ({key_id})"))?;
        validity.put(&mut params);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let issued = Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem(), name };
        Ok((Authority { cluster: cluster.to_owned(), validity, issuer: Issuer::new(params, key) }, issued))
    }

    /// Takes an authority from its files. Of several certificates in `ca_pem` (an old authority and a new one) the one that is
    /// the key's counts.
    ///
    /// # Errors
    /// [`MakeError::Authority`].
    pub fn load(ca_pem: &str, key_pem: &str) -> Result<Authority, MakeError> {
        let broken = |why: &dyn std::fmt::Display| MakeError::Authority(format!("the authority's certificate: {why}"));
        let key = authority_key(key_pem)?;
        let public = key.subject_public_key_info();
        for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            let certificate = certificate.map_err(|error| broken(&error))?;
            let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|error| broken(&error))?;
            if parsed.public_key().raw != public {
                continue;
            }
            if !parsed.is_ca() {
                return Err(MakeError::Authority("it is no authority's certificate: it may sign nothing".into()));
            }
            let Some(Name { cluster, holder: Holder::Authority }) = Name::of(&certificate)? else {
                let why = "the authority's certificate names no cluster (a URI headwater://CLUSTER): certificates of an \
                           authority that `headwater cert ca` did not make are made by that authority's own tools";
                return Err(MakeError::Authority(why.into()));
            };
            let validity = Validity::of(&certificate)?;
            return Ok(Authority { cluster, validity, issuer: Issuer::from_ca_cert_der(&certificate, key)? });
        }
        Err(MakeError::Authority("the authority's key belongs to no certificate of the authority".into()))
    }

    /// The cluster that it is the authority of.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// From when to when it is valid.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// A certificate for the broker with this id, which clients reach as `hosts`.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn broker(&self, id: i32, hosts: &[String], validity: Validity) -> Result<Issued, MakeError> {
        let name = Name::new(&self.cluster, Holder::Broker(id))?;
        let mut params = params(&name, &format!("Headwater broker {id} of {}", self.cluster))?;
        for host in hosts {
            params.subject_alt_names.push(alternative_name(host)?);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(name, params, validity)
    }

    /// A certificate for the client of this name.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn client(&self, client: &str, validity: Validity) -> Result<Issued, MakeError> {
        let name = Name::new(&self.cluster, Holder::Client(client.to_owned()))?;
        let mut params = params(&name, &format!("Headwater client {client} of {}", self.cluster))?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(name, params, validity)
    }

    fn issue(&self, name: Name, mut params: CertificateParams, validity: Validity) -> Result<Issued, MakeError> {
        if validity.not_after_s > self.validity.not_after_s {
            return Err(MakeError::Outlives);
        }
        validity.put(&mut params);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem(), name })
    }
}

fn authority_key(pem: &str) -> Result<KeyPair, MakeError> {
    KeyPair::from_pem(pem).map_err(|error| MakeError::Authority(format!("the authority's key: {error}")))
}

fn params(name: &Name, common_name: &str) -> Result<CertificateParams, MakeError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = vec![SanType::URI(name.to_string().as_str().try_into()?)];
    Ok(params)
}

/// DNS names as they are in certificates: letters, digits, hyphens, points, and a star for a first label.
fn alternative_name(host: &str) -> Result<SanType, MakeError> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // Four numbers that are no address were meant as one.
    let numeric = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if host.len() > 253 || numeric || !host.strip_prefix("*.").unwrap_or(host).split('.').all(label) {
        return Err(MakeError::Host(host.to_owned()));
    }
    Ok(SanType::DnsName(host.try_into()?))
}

/// The hosts that a certificate is good for, as [`Authority::broker`] takes them.
///
/// # Errors
/// [`NameError::NoCertificate`].
pub fn hosts_of(certificate: &CertificateDer<'_>) -> Result<Vec<String>, NameError> {
    use x509_parser::prelude::GeneralName;
    let broken = |error: &dyn std::fmt::Display| NameError::NoCertificate(error.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| broken(&error))?;
    let names = parsed.subject_alternative_name().map_err(|error| broken(&error))?;
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(host) => Some((*host).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(IpAddr::from([a, b, c, d]).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    Ok(names.iter().flat_map(|names| &names.value.general_names).filter_map(host).collect())
}

#[cfg(test)]
mod tests {
    use super::super::principal::{Principal, Stranger};
    use super::*;

    const DAY_S: i64 = 86_400;

    fn days(from: i64, to: i64) -> Validity {
        Validity { not_before_s: from * DAY_S, not_after_s: to * DAY_S }
    }

    fn der(issued: &Issued) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()
    }

    #[test]
    fn certificates_say_what_was_asked_for() {
        let (made, ca) = Authority::make("prod", days(10, 30), None).unwrap();
        let loaded = Authority::load(&ca.certificate_pem, &ca.key_pem).unwrap();
        assert_eq!((loaded.cluster(), loaded.validity()), ("prod", made.validity()));
        let hosts = ["a.example".to_owned(), "*.b.example".into(), "192.0.2.1".into(), "[2001:db8::1]".into()];
        for authority in [&made, &loaded] {
            let broker = authority.broker(7, &hosts, days(11, 12)).unwrap();
            let client = authority.client("alice", days(11, 30)).unwrap();
            assert_eq!(Name::of(&der(&broker)).unwrap().unwrap().to_string(), "headwater://prod/broker/7");
            assert_eq!(hosts_of(&der(&broker)).unwrap(), ["a.example", "*.b.example", "192.0.2.1", "2001:db8::1"]);
            assert_eq!(Validity::of(&der(&broker)).unwrap(), days(11, 12));
            assert_eq!(Principal::of(&der(&broker), Some("prod")), Ok(Principal::Broker(7)));
            assert_eq!(Principal::of(&der(&client), Some("prod")), Ok(Principal::Client("alice".into())));
            assert!(matches!(Principal::of(&der(&client), Some("pro")), Err(Stranger::OtherCluster { .. })));
            assert_eq!(Principal::of(&der(&client), None), Err(Stranger::NoClusterHere));
            assert!(hosts_of(&der(&client)).unwrap().is_empty());
        }
        assert_eq!(Principal::of(&der(&ca), Some("prod")), Err(Stranger::Authority));
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let (authority, ca) = Authority::make("prod", days(10, 30), None).unwrap();
        let (_, other) = Authority::make("prod", days(10, 30), None).unwrap();
        assert!(matches!(authority.client("a", days(10, 31)), Err(MakeError::Outlives)));
        assert!(matches!(authority.client("a/b", days(10, 11)), Err(MakeError::Name(_))));
        assert!(matches!(authority.broker(-1, &[], days(10, 11)), Err(MakeError::Name(_))));
        assert!(matches!(Authority::make("Prod", days(10, 11), None), Err(MakeError::Name(_))));
        for host in ["", "a:9392", "a b", "-a", "a..b", "a/b", "1.2.3", "[::1", "*", "a.*.b", "ä"] {
            let refused = authority.broker(1, &[host.to_owned()], days(10, 11));
            assert!(matches!(&refused, Err(MakeError::Host(told)) if told == host), "{host}: {refused:?}");
        }
        assert!(matches!(Authority::load(&ca.certificate_pem, &other.key_pem), Err(MakeError::Authority(_))));
        let broker = authority.broker(1, &[], days(10, 11)).unwrap();
        assert!(matches!(Authority::load(&broker.certificate_pem, &broker.key_pem), Err(MakeError::Authority(_))));
    }

    /// An authority is renewed in two ways: its key gets a new certificate, or a new one stands beside it for a while.
    #[test]
    fn a_renewed_authority_is_the_one_of_the_key() {
        let (_, old) = Authority::make("prod", days(10, 30), None).unwrap();
        let (_, renewed) = Authority::make("prod", days(10, 90), Some(&old.key_pem)).unwrap();
        assert_eq!(renewed.key_pem, old.key_pem);
        assert_eq!(Authority::load(&renewed.certificate_pem, &old.key_pem).unwrap().validity(), days(10, 90));
        let (_, new) = Authority::make("prod", days(10, 60), None).unwrap();
        let both = old.certificate_pem.clone() + &new.certificate_pem;
        assert_eq!(Authority::load(&both, &new.key_pem).unwrap().validity(), days(10, 60));
        assert_eq!(Authority::load(&both, &old.key_pem).unwrap().validity(), days(10, 30));
    }
}
