//! Whom a certificate names, and so who is at the other end of a connection.
//!
//! A certificate of a cluster holds exactly one URI of the scheme `headwater` among its subject alternative names:
//!
//! ```text
//! headwater://CLUSTER              the cluster's certificate authority
//! headwater://CLUSTER/broker/ID    the broker with that id, and no other one
//! headwater://CLUSTER/client/NAME  a client
//! ```
//!
//! Why a URI: a common name is free text that templates fill with host names, and one that all brokers share lets each of them
//! pose as every other; a DNS name says where something runs, and a broker may come back elsewhere. A URI is a typed
//! field that every authority can be asked for (`openssl`, cert-manager, Vault), that nobody's host name can equal, and its cluster keeps
//! apart two clusters whose certificates one company signs. A broker takes the cluster from its own certificate: there is
//! nothing to configure that could contradict it.
//!
//! Owns: [`Name`], [`Principal`] and what only a broker may do. Refuses: to judge a certificate (TLS has verified it by then).
//! Read next: [`super::live`].

use headwater_proto::{ErrorCode, wire};
use rustls_pki_types::CertificateDer;
use std::fmt::{self, Display};
use std::str::FromStr;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const SCHEME: &str = "headwater://";

/// Longest name of a cluster, in bytes: a label of a host name.
const MAX_CLUSTER_BYTES: usize = 63;
/// Longest name of a client, in bytes.
const MAX_CLIENT_BYTES: usize = 128;

/// What a certificate says of its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The cluster, which is its authority's.
    pub cluster: String,
    /// Who in it.
    pub holder: Holder,
}

/// Who in a cluster holds a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// The authority, which signs all others.
    Authority,
    /// The broker with this id.
    Broker(i32),
    /// A client by its name.
    Client(String),
}

/// Why a certificate's name cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Bytes that are no certificate.
    #[error("it is no certificate: {0}")]
    NoCertificate(String),
    /// A URI of the scheme in none of its forms.
    #[error(
        "{0:?} names nobody: it is headwater://CLUSTER/broker/ID or headwater://CLUSTER/client/NAME; a cluster has 1 to \
         {MAX_CLUSTER_BYTES} small letters, digits, points and hyphens, a client's name 1 to {MAX_CLIENT_BYTES} letters, digits and . _ @ + -"
    )]
    Malformed(String),
    /// More than one: nobody could say which counts.
    #[error("it names {0} and {1}: a certificate names one")]
    Several(String, String),
}

impl Name {
    /// Checks the parts.
    ///
    /// # Errors
    /// [`NameError::Malformed`].
    pub fn new(cluster: &str, holder: Holder) -> Result<Name, NameError> {
        let name = Name { cluster: cluster.to_owned(), holder };
        let uri = name.to_string();
        // A part that holds a slash would make somebody else of it.
        if uri.parse::<Name>()? == name { Ok(name) } else { Err(NameError::Malformed(uri)) }
    }

    /// The name in a certificate; `None` where it has none.
    ///
    /// # Errors
    /// [`NameError`]: it names nobody in particular.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Option<Name>, NameError> {
        let broken = |error: &dyn Display| NameError::NoCertificate(error.to_string());
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| broken(&error))?;
        let names = parsed.subject_alternative_name().map_err(|error| broken(&error))?;
        let mut found = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) if uri.get(..SCHEME.len()).is_some_and(|s| s.eq_ignore_ascii_case(SCHEME)) => {
                Some(*uri)
            }
            _ => None,
        });
        match (found.next(), found.next()) {
            (None, _) => Ok(None),
            (Some(uri), None) => uri.parse().map(Some),
            (Some(one), Some(other)) => Err(NameError::Several(one.into(), other.into())),
        }
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.cluster)?;
        match &self.holder {
            Holder::Authority => Ok(()),
            Holder::Broker(id) => write!(f, "/broker/{id}"),
            Holder::Client(name) => write!(f, "/client/{name}"),
        }
    }
}

impl FromStr for Name {
    type Err = NameError;

    /// One spelling for each name: what is compared is exact.
    fn from_str(uri: &str) -> Result<Name, NameError> {
        let parse = || {
            let mut parts = uri.strip_prefix(SCHEME)?.split('/');
            let cluster = parts.next().filter(|cluster| is_cluster(cluster))?.to_owned();
            let holder = match (parts.next(), parts.next(), parts.next()) {
                (None, ..) => Holder::Authority,
                (Some("broker"), Some(id), None) => Holder::Broker(broker_id(id)?),
                (Some("client"), Some(name), None) if is_client(name) => Holder::Client(name.to_owned()),
                _ => return None,
            };
            Some(Name { cluster, holder })
        };
        parse().ok_or_else(|| NameError::Malformed(uri.to_owned()))
    }
}

fn is_cluster(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=MAX_CLUSTER_BYTES).contains(&text.len())
        && text.bytes().all(|byte| plain(byte) || b".-".contains(&byte))
        && text.bytes().next().is_some_and(plain)
}

fn is_client(text: &str) -> bool {
    (1..=MAX_CLIENT_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._@+-".contains(&byte))
}

/// An id as it is printed: `+1` and `01` are none.
fn broker_id(text: &str) -> Option<i32> {
    let id = text.parse::<i32>().ok().filter(|id| *id >= 0)?;
    (id.to_string() == text).then_some(id)
}

/// Who is at the other end of a connection, as far as a verified certificate says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// The broker of this cluster with this id.
    Broker(i32),
    /// A client of this cluster with a certificate of its own.
    Client(String),
    /// Whoever showed no certificate.
    Anonymous,
}

impl Principal {
    /// Whom a verified certificate makes its holder in `cluster`, the verifier's own.
    ///
    /// # Errors
    /// [`Stranger`]: it is nobody's here.
    pub fn of(certificate: &CertificateDer<'_>, cluster: Option<&str>) -> Result<Principal, Stranger> {
        let cluster = cluster.ok_or(Stranger::NoClusterHere)?;
        let name = Name::of(certificate)?.ok_or(Stranger::Unnamed)?;
        if name.cluster != cluster {
            return Err(Stranger::OtherCluster { theirs: name.to_string(), ours: cluster.to_owned() });
        }
        match name.holder {
            Holder::Broker(id) => Ok(Principal::Broker(id)),
            Holder::Client(name) => Ok(Principal::Client(name)),
            Holder::Authority => Err(Stranger::Authority),
        }
    }

    /// The id of whichever broker of the cluster this is. `what`: what only brokers may do.
    ///
    /// # Errors
    /// [`NotAuthorized`]: it is none.
    pub fn broker(&self, what: &'static str) -> Result<i32, NotAuthorized> {
        match self {
            Principal::Broker(id) => Ok(*id),
            who => Err(NotAuthorized { what, only: None, who: who.clone() }),
        }
    }

    /// Refuses everybody but the broker `id`. `what`: what only it may do.
    ///
    /// # Errors
    /// [`NotAuthorized`]: it is somebody else.
    pub fn require_broker(&self, id: i32, what: &'static str) -> Result<(), NotAuthorized> {
        match self {
            Principal::Broker(of) if *of == id => Ok(()),
            who => Err(NotAuthorized { what, only: Some(id), who: who.clone() }),
        }
    }
}

impl Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Principal::Broker(id) => write!(f, "broker {id}"),
            Principal::Client(name) => write!(f, "client {name}"),
            Principal::Anonymous => f.write_str("anonymous"),
        }
    }
}

/// A certificate that TLS verified, and that is nobody's in this cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stranger {
    /// Its name is malformed.
    #[error("the certificate is not usable here: {0}")]
    Name(#[from] NameError),
    /// Without a name.
    #[error(
        "the certificate names nobody: it has no URI headwater://CLUSTER/... (`headwater cert` makes one that has)"
    )]
    Unnamed,
    /// Of a cluster that this one shares its authority with.
    #[error("the certificate is {theirs}, and this is cluster {ours}")]
    OtherCluster {
        /// Its whole name.
        theirs: String,
        /// The verifier's cluster.
        ours: String,
    },
    /// The authority's own, which only signs.
    #[error("the certificate is the authority's own")]
    Authority,
    /// The verifier has no name itself.
    #[error("this broker's own certificate names no cluster, so nobody can be a member of it")]
    NoClusterHere,
}

/// What only a broker may do was asked by somebody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAuthorized {
    what: &'static str,
    only: Option<i32>,
    who: Principal,
}

impl Display for NotAuthorized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NotAuthorized { what, only, who } = self;
        match only {
            Some(id) => write!(f, "only broker {id} may open {what}")?,
            None => write!(f, "only brokers of this cluster may open {what}")?,
        }
        match who {
            Principal::Anonymous => f.write_str(", and this connection showed no certificate"),
            who => write!(f, ", and this connection is {who}"),
        }
    }
}

impl std::error::Error for NotAuthorized {}

impl From<NotAuthorized> for wire::Error {
    fn from(error: NotAuthorized) -> wire::Error {
        wire::Error::new(ErrorCode::ClusterAuthorizationFailed, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_one_spelling() {
        for (uri, cluster, holder) in [
            ("headwater://prod", "prod", Holder::Authority),
            ("headwater://prod/broker/0", "prod", Holder::Broker(0)),
            ("headwater://a.b-1/broker/2147483647", "a.b-1", Holder::Broker(i32::MAX)),
            ("headwater://1/client/Alice.B_c@d+e-f", "1", Holder::Client("Alice.B_c@d+e-f".into())),
        ] {
            assert_eq!(uri.parse(), Ok(Name { cluster: cluster.into(), holder: holder.clone() }));
            assert_eq!(Name::new(cluster, holder).map(|name| name.to_string()).as_deref(), Ok(uri));
        }
        for uri in [
            "headwater://",
            "headwater:///broker/1",
            "headwater://Prod/broker/1",
            "HEADWATER://prod/broker/1",
            "headwater://-a/broker/1",
            "headwater://a@b/broker/1",
            "headwater://a:1/broker/1",
            "headwater://prod/",
            "headwater://prod/broker",
            "headwater://prod/broker/",
            "headwater://prod/broker/01",
            "headwater://prod/broker/+1",
            "headwater://prod/broker/-1",
            "headwater://prod/broker/2147483648",
            "headwater://prod/broker/1/",
            "headwater://prod/broker/1?x",
            "headwater://prod/brokers/1",
            "headwater://prod/client/",
            "headwater://prod/client/a/b",
            "headwater://prod/client/a%2fb",
            "headwater://prod/client/a b",
            "https://prod/broker/1",
        ] {
            assert_eq!(uri.parse::<Name>(), Err(NameError::Malformed(uri.into())), "{uri}");
        }
        assert!(Name::new("prod", Holder::Client("x".repeat(128))).is_ok());
        assert!(Name::new("prod", Holder::Client("x".repeat(129))).is_err());
        assert!(Name::new("prod", Holder::Client("a/../../broker/1".into())).is_err());
        assert!(Name::new("prod/broker/1", Holder::Authority).is_err());
        assert!(Name::new(&"c".repeat(64), Holder::Authority).is_err());
    }

    #[test]
    fn only_a_broker_is_a_broker_and_only_itself() {
        let broker = Principal::Broker(2);
        assert_eq!(broker.broker("peer connections"), Ok(2));
        assert_eq!(broker.require_broker(2, "replica streams"), Ok(()));
        let posing = broker.require_broker(1, "replica streams").unwrap_err();
        assert_eq!(posing.to_string(), "only broker 1 may open replica streams, and this connection is broker 2");
        let client = Principal::Client("broker".into());
        assert!(client.require_broker(1, "raft streams").unwrap_err().to_string().ends_with("is client broker"));
        let nobody = Principal::Anonymous.broker("raft streams").unwrap_err();
        assert!(nobody.to_string().contains("only brokers of this cluster may open raft streams"), "{nobody}");
        let told = wire::Error::from(nobody);
        assert_eq!((told.code, told.retryable), (ErrorCode::ClusterAuthorizationFailed.number(), false));
    }
}
