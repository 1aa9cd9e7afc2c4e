//! Brokers of one process: real endpoints, logs and certificates, and metadata that the test decides.

use crate::harness::*;
use bytes::Bytes;
use headwater_broker::Broker;
use headwater_broker::metadata::command::{
    CreateTopic, FenceBroker, RaiseFeatureLevel, Replicas, command::Command as Kind,
};
use headwater_broker::metadata::handle::common::Common;
use headwater_broker::metadata::state::FEATURE_LEVEL;
use headwater_broker::metadata::{MetadataState, Partition};
use headwater_broker::tls::make::{Authority, Issued, Validity};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use headwater_proto::TopicId;
use headwater_proto::wire::{self, Acks};
use headwater_storage::{DataDir, Files, NewIdentity, OsFiles};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

pub(crate) const CLUSTER: &str = "a-cluster";

/// A cluster's authority.
pub(crate) struct Ca {
    pub(crate) authority: Authority,
    pub(crate) pem: String,
}

impl Ca {
    pub(crate) fn new() -> Ca {
        let a_week = Validity::from_now(now_s(), Duration::from_secs(7 * 86_400));
        let (authority, issued) = Authority::make("prod", a_week, None).unwrap();
        Ca { authority, pem: issued.certificate_pem }
    }

    pub(crate) fn broker(&self, id: i32) -> Issued {
        self.authority.broker(id, &["localhost".into(), "127.0.0.1".into()], a_day()).unwrap()
    }
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

pub(crate) fn a_day() -> Validity {
    Validity::from_now(now_s(), Duration::from_secs(86_400))
}

pub(crate) struct Cluster {
    pub(crate) ca: Ca,
    pub(crate) common: Common,
    dirs: BTreeMap<i32, tempfile::TempDir>,
    brokers: BTreeMap<i32, Broker>,
    settings: Vec<String>,
}

impl Cluster {
    /// These brokers, with these settings beside the tests' own.
    pub(crate) async fn start(ids: &[i32], settings: &[&str]) -> Cluster {
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let (ca, common) = (Ca::new(), Common::new(CLUSTER));
        // As the first broker of a cluster does.
        common.apply(Kind::RaiseFeatureLevel(RaiseFeatureLevel { level: FEATURE_LEVEL })).unwrap();
        let mut cluster = Cluster { ca, common, dirs: BTreeMap::new(), brokers: BTreeMap::new(), settings };
        for id in ids {
            cluster.up(*id).await;
        }
        cluster
    }

    /// Starts a broker, in its folder.
    pub(crate) async fn up(&mut self, id: i32) {
        self.up_on(id, Arc::new(OsFiles::default()), &[]).await;
    }

    /// Waits until a broker that was killed has let go of its folder.
    pub(crate) async fn let_go(&self, id: i32) {
        let us = NewIdentity { cluster_id: CLUSTER.into(), broker_id: id as u32, directory_id: format!("disk-{id}") };
        within("its folder is free", async {
            while DataDir::open(Arc::new(OsFiles::default()), self.dir(id), &us).is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// As [`up`](Self::up), with logs on other files, and settings of its own.
    pub(crate) async fn up_on(&mut self, id: i32, files: Arc<dyn Files>, own: &[&str]) {
        let dir = self.dirs.entry(id).or_insert_with(|| tempfile::tempdir().unwrap()).path().to_owned();
        put(&dir, &self.ca.broker(id), &self.ca.pem);
        let us = NewIdentity { cluster_id: CLUSTER.into(), broker_id: id as u32, directory_id: format!("disk-{id}") };
        let started = async {
            loop {
                // Whoever was dropped lets go of its folder in its own time.
                match DataDir::open(Arc::clone(&files), &dir, &us) {
                    Ok(opened) => drop(opened),
                    Err(_) => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    }
                }
                let mut config = config(&dir);
                config.broker_id = id as u32;
                for pair in
                    ["offsets.topic.num.partitions=1", "num.io.threads=4"].into_iter().chain(own.iter().copied())
                {
                    config.set_pair(pair).unwrap();
                }
                self.settings.iter().for_each(|pair| config.set_pair(pair).unwrap());
                return Broker::start_among(config, Arc::clone(&files), self.common.clone()).await.unwrap();
            }
        };
        let broker = within("a start", started).await;
        self.brokers.insert(id, broker);
    }

    /// Ends a broker as if it had crashed. The metadata learn nothing of it.
    pub(crate) fn kill(&mut self, id: i32) {
        drop(self.brokers.remove(&id).expect("it runs"));
    }

    /// Ends a broker as it should be. Whether everything was in good order.
    pub(crate) async fn stop(&mut self, id: i32) -> bool {
        self.brokers.remove(&id).expect("it runs").shutdown().await
    }

    /// The controller hears nothing of a broker any more.
    pub(crate) fn fence(&self, id: i32) {
        let incarnation = self.incarnation(id).as_bytes().to_vec().into();
        self.common.control(Kind::FenceBroker(FenceBroker { broker_id: id, incarnation })).unwrap();
    }

    pub(crate) fn incarnation(&self, id: i32) -> Uuid {
        self.common.state().broker(id).expect("registered").incarnation
    }

    pub(crate) fn broker(&self, id: i32) -> &Broker {
        &self.brokers[&id]
    }

    pub(crate) fn dir(&self, id: i32) -> &Path {
        self.dirs[&id].path()
    }

    /// A topic whose every partition these brokers keep, the first of them as its leader.
    pub(crate) fn create(&self, name: &str, partitions: usize, replicas: &[i32], config: &[(&str, &str)]) -> Bytes {
        let topic_id = TopicId::from_bytes(*Uuid::new_v4().as_bytes()).to_wire();
        let create = CreateTopic {
            name: name.into(),
            topic_id: topic_id.clone(),
            partitions: vec![Replicas { brokers: replicas.to_vec() }; partitions],
            config: config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            default_min_insync_replicas: 1,
            ..CreateTopic::default()
        };
        self.common.apply(Kind::CreateTopic(create)).unwrap();
        topic_id
    }

    pub(crate) fn partition(&self, topic: &str) -> Partition {
        self.common.state().topic(topic).expect("a topic").partitions[0].clone()
    }

    /// Waits until the metadata are so.
    pub(crate) async fn until(&self, what: &str, mut probe: impl FnMut(&MetadataState) -> bool) {
        let mut changes = self.common.changes();
        within(what, changes.wait_for(|state| probe(state))).await.unwrap();
    }

    /// Waits until these are in sync.
    pub(crate) async fn until_in_sync(&self, topic: &str, brokers: &[i32]) {
        let is_so = |partition: &Partition| {
            let mut isr = partition.isr.clone();
            isr.sort_unstable();
            isr == brokers
        };
        let what = format!("{topic} in sync at {brokers:?}");
        self.until(&what, |state| state.topic(topic).is_some_and(|topic| topic.partitions.iter().all(is_so))).await;
    }

    /// Waits until a number that the broker tells of itself is so.
    pub(crate) async fn until_sample(&self, id: i32, name: &str, wanted: f64) {
        let reached = async {
            while sample(self.broker(id), name).await != wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within(&format!("{name} = {wanted} at {id}"), reached).await;
    }

    /// Opens a produce stream; refusals that pass are tried again.
    pub(crate) async fn produce(&self, id: i32, topic_id: &Bytes, acks: Acks) -> Produce {
        let opened = async {
            loop {
                let client = Client::connect(self.broker(id)).await;
                let open = wire::OpenProduce { acks: acks.into(), ..open_produce(topic_id, 0) };
                let (produce, answer) = client.produce(open).await;
                match answer.error {
                    None => {
                        // The connection lives as long as its streams are used.
                        std::mem::forget(client);
                        return produce;
                    }
                    Some(error) => assert!(error.retryable || error.code == 11, "{error:?}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within("a produce stream", opened).await
    }

    /// Every record below `end`, as a broker serves it.
    pub(crate) async fn read(&self, id: i32, topic_id: &Bytes, end: i64) -> Vec<String> {
        let client = Client::connect(self.broker(id)).await;
        let opened = async {
            loop {
                let (fetch, answer) = client.fetch(open_fetch(topic_id, 0, 0)).await;
                match answer.error {
                    None => return fetch,
                    Some(error) => assert!(error.retryable || error.code == 23, "{error:?}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let mut fetch = within("a fetch stream", opened).await;
        let records = within("records", fetch.read_to(end)).await;
        records.into_iter().map(|(_, value)| String::from_utf8(value.to_vec()).unwrap()).collect()
    }
}

/// What the metrics call the offset of a partition.
pub(crate) fn log_end(topic: &str) -> String {
    format!("headwater_partition_log_end_offset{{topic=\"{topic}\",partition=\"0\"}}")
}

pub(crate) fn put(dir: &Path, issued: &Issued, ca_pem: &str) {
    std::fs::write(dir.join(CERTIFICATE_FILE), &issued.certificate_pem).unwrap();
    std::fs::write(dir.join(KEY_FILE), &issued.key_pem).unwrap();
    std::fs::write(dir.join(CA_FILE), ca_pem).unwrap();
}

/// Sends one batch of one record for each of the values, and takes the acknowledgements.
pub(crate) async fn send(produce: &mut Produce, values: &[String]) -> Vec<wire::ProduceResponse> {
    for value in values {
        produce.request(&batch(&[value.as_bytes()])).await;
    }
    let mut answers = Vec::new();
    for _ in values {
        answers.push(within("an acknowledgement", produce.answer()).await);
    }
    answers
}

/// As [`send`]; all of them are acknowledged.
pub(crate) async fn send_all(produce: &mut Produce, values: &[String]) {
    for answer in send(produce, values).await {
        assert_eq!(answer.error, None);
    }
}

pub(crate) fn texts(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

pub(crate) fn unclean_topic() -> [(&'static str, &'static str); 1] {
    [("unclean.leader.election.enable", "true")]
}
