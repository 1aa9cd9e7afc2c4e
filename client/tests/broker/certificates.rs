//! A client with a certificate of its own: shown where it has one, and told clearly where it is not taken.

use super::{Client, ClientConfig, NewTopic, ProducerRecord, within};
use headwater_broker::tls::make::{Authority, Issued, Validity};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use headwater_broker::{Broker, config::BrokerConfig};
use headwater_client::{ClientIdentity, ConfigError, Error, IdentityFiles};
use tempfile::TempDir;

const ALWAYS: Validity = Validity { not_before_s: 0, not_after_s: 4_000_000_000 };

fn authority(cluster: &str) -> (Authority, String) {
    let (authority, issued) = Authority::make(cluster, ALWAYS, None).unwrap();
    (authority, issued.certificate_pem)
}

fn certify(dir: &TempDir, authority: &Authority, trusted: &str) {
    let issued = authority.broker(1, &["localhost".into()], ALWAYS).unwrap();
    for (name, text) in
        [(CERTIFICATE_FILE, issued.certificate_pem.as_str()), (KEY_FILE, &issued.key_pem), (CA_FILE, trusted)]
    {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
}

async fn broker(dir: &TempDir, authority: &Authority, trusted: &str) -> Broker {
    certify(dir, authority, trusted);
    let any = "127.0.0.1:0".parse().unwrap();
    let defaults = BrokerConfig { tls_reload_interval_ms: 100, ..BrokerConfig::default() };
    let config = BrokerConfig { data_dir: dir.path().into(), listen: any, admin: any, ..defaults };
    within("start", Broker::start(config)).await.unwrap()
}

fn identity(issued: Issued) -> Option<ClientIdentity> {
    let (certificate_pem, key_pem) = (issued.certificate_pem.into(), issued.key_pem.into());
    Some(ClientIdentity { certificate_pem, key_pem, files: None })
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

/// A client that lives for longer than its certificate was refused by every broker it had not reached yet, however often that was renewed.
#[tokio::test]
async fn a_renewed_certificate_is_shown_from_the_next_connection_on() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ((old, old_pem), (new, new_pem)) = (authority("prod"), authority("prod"));
    let both = old_pem.clone() + &new_pem;
    let broker = broker(&dir, &old, &both).await;
    let files = IdentityFiles { certificate: own.path().join("client.pem"), key: own.path().join("client-key.pem") };
    let first = old.client("alice", ALWAYS).unwrap();
    std::fs::write(&files.certificate, &first.certificate_pem).unwrap();
    std::fs::write(&files.key, &first.key_pem).unwrap();
    let config = ClientConfig {
        identity: Some(files.clone().read().unwrap()),
        ca_pem: both.into(),
        ..ClientConfig::from_profile(broker.profile().unwrap()).unwrap()
    };
    let client = within("connect", Client::connect(config)).await.unwrap();
    within("a topic", client.admin().create_topic(NewTopic::new("t"))).await.unwrap();
    // The authority is another one now, and what the old one signed is refused.
    let next = new.client("alice", ALWAYS).unwrap();
    certify(&dir, &new, &new_pem);
    within("the broker's renewal", async {
        while broker.ca_pem().as_ref() != Some(&new_pem) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // As a renewal leaves them that ended before its last step.
    std::fs::write(&files.key, first.key_pem + &next.key_pem).unwrap();
    std::fs::write(&files.certificate, &next.certificate_pem).unwrap();
    // The first record takes a connection of its own.
    let producer = within("build", client.producer().build()).await.unwrap();
    let sent =
        within("a record", producer.send(ProducerRecord::new("t", bytes::Bytes::from_static(b"x")))).await.unwrap();
    within("its acknowledgement", sent).await.unwrap();
    // Files that are of no use change nothing.
    std::fs::remove_file(&files.certificate).unwrap();
    within("a call", client.admin().list_topics()).await.unwrap();
    client.close().await;
}
