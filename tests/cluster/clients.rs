//! Clients of three brokers, of which one may end at any moment.

use crate::harness::{self, Answer, Running, eventually, headwater, run};
use bytes::Bytes;
use futures::StreamExt;
use headwater_client::{Client, ClientConfig, ProducerRecord, StartFrom};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Three brokers, started by one command.
pub(crate) struct Up {
    /// They end with it.
    _running: Running,
    profile: String,
    pids: Vec<u32>,
    folder: tempfile::TempDir,
}

impl Up {
    pub(crate) fn start() -> Up {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = headwater();
        command.current_dir(folder.path()).args(["up", "--brokers", "3", "--data", "data", "--json"]);
        let running = Running::start(command);
        let ready = eventually("the first line", || running.json().first().cloned());
        let profile = ready["profile"].as_str().expect("a path").to_owned();
        let brokers = ready["brokers"].as_array().expect("brokers");
        let pid = |broker: &Value| u32::try_from(broker["pid"].as_u64().expect("a number")).expect("a pid");
        Up { pids: brokers.iter().map(pid).collect(), profile, _running: running, folder }
    }

    pub(crate) fn profile(&self) -> &str {
        &self.profile
    }

    /// Of broker `id`.
    pub(crate) fn signal(&self, id: i64, name: &str) {
        harness::signal(self.pids[usize::try_from(id - 1).expect("an id")], name);
    }

    pub(crate) fn run(&self, args: &[&str]) -> Answer {
        run(&[args, &["--profile", &self.profile]].concat())
    }

    /// Produces lines.
    fn produce(&self, args: &[&str], lines: &str) -> Answer {
        let file = self.folder.path().join("lines");
        std::fs::write(&file, lines).expect("written");
        self.run(&[&["produce"], args, &["--file", file.to_str().expect("text")]].concat())
    }

    fn json(&self, args: &[&str]) -> Vec<Value> {
        self.run(&[args, &["--json"]].concat()).ok().json()
    }

    /// The leader of the topic's only partition, once all its replicas are in sync.
    fn settled(&self, topic: &str) -> i64 {
        eventually("all replicas are in sync", || {
            let partition = self.partitions(topic).remove(0);
            let is_whole = partition["isr"].as_array().expect("a list").len() == 3;
            partition["leader"].as_i64().filter(|_| is_whole)
        })
    }

    pub(crate) fn partitions(&self, topic: &str) -> Vec<Value> {
        let told = self.json(&["topic", "describe", topic]);
        told[0]["partitions"].as_array().expect("partitions").clone()
    }
}

#[test]
fn each_leader_is_asked_about_what_it_leads() {
    let up = Up::start();
    up.run(&["topic", "create", "t", "-p", "6", "-r", "1"]).ok();
    for partition in 0..6 {
        let lines: String = (0..10).map(|n| format!("{{\"at\":{},\"v\":{n}}}\n", n * 1000)).collect();
        let number = partition.to_string();
        up.produce(&["t", "--partition", &number, "--timestamp-field", "at"], &lines).ok();
    }
    let described = up.partitions("t");
    let leaders: BTreeSet<i64> = described.iter().map(|p| p["leader"].as_i64().expect("a leader")).collect();
    assert_eq!(leaders, BTreeSet::from([1, 2, 3]));
    for partition in &described {
        assert_eq!((&partition["log_start_offset"], &partition["high_watermark"]), (&0.into(), &10.into()));
        assert!(partition["size_bytes"].as_u64().expect("a size") > 0, "{partition}");
    }
    assert_eq!(up.json(&["consume", "t", "--until", "end"]).len(), 60);
    assert_eq!(up.json(&["consume", "t", "--from", "time:3000", "--until", "end"]).len(), 42);
    assert_eq!(up.json(&["consume", "t", "--from", "offset:8", "--until", "time:9000"]).len(), 6);
    for partition in 0..6 {
        up.run(&["topic", "delete-records", "t", "--partition", &partition.to_string(), "--before", "4"]).ok();
    }
    assert_eq!(up.json(&["consume", "t", "--until", "end"]).len(), 36);

    // What nobody leads is said to be unknown, and all else is told of.
    up.signal(3, "KILL");
    let described = eventually("broker 3 is missed", || {
        let described = up.partitions("t");
        described.iter().any(|p| p["leader"].is_null()).then_some(described)
    });
    for partition in described {
        let expected = if partition["replicas"][0] == 3 { Value::Null } else { 10.into() };
        assert_eq!(partition["high_watermark"], expected, "{partition}");
    }
}

/// How long anything may take before it counts as hanging.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long nobody may have led, as a producer sees it, where nothing else has the machine: one detection (0.6 s), and time to elect and to be
/// told. A client that found out by itself that a broker is silent would take longer.
const LONGEST_SILENCE: Duration = Duration::from_millis(2_500);

/// How long the machine keeps one waiting who wants to run, at most: brokers wait as long, and at each step.
struct Machine(Arc<AtomicU64>);

impl Machine {
    fn watch() -> Machine {
        let longest = Arc::new(AtomicU64::new(0));
        let told = Arc::downgrade(&longest);
        std::thread::spawn(move || {
            while let Some(longest) = told.upgrade() {
                let (began, nap) = (Instant::now(), Duration::from_millis(5));
                std::thread::sleep(nap);
                let late = began.elapsed().saturating_sub(nap);
                longest.fetch_max(u64::try_from(late.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
        });
        Machine(longest)
    }

    /// Whether nobody led for no longer than a detection takes on this machine.
    fn bears(&self, silence: Duration) -> bool {
        let late = Duration::from_micros(self.0.load(Ordering::Relaxed));
        eprintln!("longest silence {silence:?}, the machine was late by {late:?}");
        silence < LONGEST_SILENCE + late * STEPS
    }
}

/// Who has to run, one after another, until a producer goes on: who misses a broker, who votes, who is told and leads, the client.
const STEPS: u32 = 20;

pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

/// What a producer saw: each record was acknowledged in its turn.
struct Acks {
    acknowledged: mpsc::UnboundedReceiver<Instant>,
    count: usize,
}

impl Acks {
    /// So many more from now on, and the longest time in which there was none. What came before now is waiting to be heard of.
    async fn more(&mut self, count: usize) -> Duration {
        let mut last = Instant::now();
        let (mut longest, mut left) = (Duration::ZERO, count);
        while left > 0 {
            let at = within("an acknowledgement", self.acknowledged.recv()).await.expect("the producer goes on");
            self.count += 1;
            if let Some(silence) = at.checked_duration_since(last) {
                (longest, last, left) = (longest.max(silence), at, left - 1);
            }
        }
        longest
    }
}

#[test]
fn whoever_leads_may_stand_still_or_die_and_records_are_there_once_and_in_order() {
    let up = Up::start();
    up.run(&["topic", "create", "t", "-p", "1", "-r", "3", "-c", "min.insync.replicas=2"]).ok();
    let paused = up.settled("t");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let config = ClientConfig::from_profile(&up.profile).expect("a profile");
        let client = within("a connection", Client::connect(config)).await.expect("connected");
        let consumer = client.consumer().assign([("t", 0)]).start(StartFrom::Earliest).build();
        let mut consumer = within("a consumer", consumer).await.expect("built");
        let producer = within("a producer", client.producer().build()).await.expect("built");
        let (tell, acknowledged) = mpsc::unbounded_channel();
        let producing = tokio::spawn(async move {
            for n in 0u64.. {
                let record = ProducerRecord::new("t", Bytes::from(n.to_string()));
                let delivery = producer.send(record).await.expect("taken");
                let acknowledgement = delivery.await.expect("acknowledged");
                assert_eq!(acknowledgement.offset, i64::try_from(n).expect("small"));
                if tell.send(Instant::now()).is_err() {
                    break;
                }
            }
            producer.close().await;
        });
        let mut acks = Acks { acknowledged, count: 0 };
        acks.more(50).await;

        let machine = Machine::watch();
        up.signal(paused, "STOP");
        let silence = acks.more(50).await;
        assert!(machine.bears(silence), "nobody took over from who stood still: {silence:?}");
        let killed = up.partitions("t")[0]["leader"].as_i64().expect("a leader");
        assert_ne!(killed, paused);
        up.signal(paused, "CONT");
        up.settled("t");

        let killed = up.partitions("t")[0]["leader"].as_i64().expect("a leader");
        let machine = Machine::watch();
        up.signal(killed, "KILL");
        let silence = acks.more(50).await;
        assert!(machine.bears(silence), "nobody took over from who died: {silence:?}");

        let count = acks.count;
        drop(acks);
        within("the producer's end", producing).await.expect("no defect");
        for n in 0..count {
            let record = within("a record", consumer.next()).await.expect("it goes on").expect("no error");
            assert_eq!((record.offset, record.value), (n as i64, Some(Bytes::from(n.to_string()))));
        }
    });
}
