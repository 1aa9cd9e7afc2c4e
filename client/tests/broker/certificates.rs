//! A client with a certificate of its own: shown where it has one, and told clearly where it is not taken.

use super::{Client, ClientConfig, within};
use headwater_broker::tls::make::{Authority, Issued, Validity};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use headwater_broker::{Broker, config::BrokerConfig};
use headwater_client::{ClientIdentity, ConfigError, Error};
use tempfile::TempDir;

const ALWAYS: Validity = Validity { not_before_s: 0, not_after_s: 4_000_000_000 };

fn authority(cluster: &str) -> (Authority, String) {
    let (authority, issued) = Authority::make(cluster, ALWAYS, None).unwrap();
    (authority, issued.certificate_pem)
}

async fn broker(dir: &TempDir, authority: &Authority, trusted: &str) -> Broker {
    let issued = authority.broker(1, &["localhost".into()], ALWAYS).unwrap();
    for (name, text) in
        [(CERTIFICATE_FILE, issued.certificate_pem.as_str()), (KEY_FILE, &issued.key_pem), (CA_FILE, trusted)]
    {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let any = "127.0.0.1:0".parse().unwrap();
    let config = BrokerConfig { data_dir: dir.path().into(), listen: any, admin: any, ..BrokerConfig::default() };
    within("start", Broker::start(config)).await.unwrap()
}

fn identity(issued: Issued) -> Option<ClientIdentity> {
    Some(ClientIdentity { certificate_pem: issued.certificate_pem.into(), key_pem: issued.key_pem.into() })
}

#[tokio::test]
async fn a_client_shows_its_certificate_and_hears_why_it_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let ((ours, pem), (other, other_pem)) = (authority("prod"), authority("test"));
    let broker = broker(&dir, &ours, &(pem + &other_pem)).await;
    let connect = async |identity: Option<ClientIdentity>| {
        let config = ClientConfig { identity, ..ClientConfig::from_profile(broker.profile().unwrap()).unwrap() };
        within("connect", Client::connect(config)).await
    };
    for welcome in [None, identity(ours.client("alice", ALWAYS).unwrap())] {
        let client = connect(welcome).await.unwrap();
        within("a call", client.admin().list_topics()).await.unwrap();
        client.close().await;
    }
    // Verified, and of another cluster: the broker says so in words. An anonymous client would have been welcome, so it was shown.
    let refused = connect(identity(other.client("alice", ALWAYS).unwrap())).await.map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("headwater://test/client/alice") && !refused.retryable(), "{refused}");
    // Of an authority that the broker does not know, or no longer valid: TLS says so, and trying again does not help.
    let past = Validity { not_before_s: 0, not_after_s: 1_000_000_000 };
    for not_good in [authority("prod").0.client("alice", ALWAYS).unwrap(), ours.client("alice", past).unwrap()] {
        let refused = connect(identity(not_good)).await.map(|_| ()).unwrap_err();
        assert!(
            matches!(&refused, Error::Untrusted { reason, .. } if reason.contains("this client's certificate")),
            "{refused}"
        );
    }
    // What cannot be shown is known before anything is sent.
    let mut mixed = identity(ours.client("alice", ALWAYS).unwrap()).unwrap();
    mixed.key_pem = ours.client("alice", ALWAYS).unwrap().key_pem.into();
    let refused = connect(Some(mixed)).await.map(|_| ()).unwrap_err();
    assert!(matches!(&refused, Error::Config(ConfigError::Identity(_))), "{refused}");
}
