//! Figures of a cluster of three brokers on one machine, for people: nothing here passes or fails by them.
//!
//! `cargo test --release --test nemesis figures:: -- --ignored --nocapture --test-threads 1` takes all of them, the name of one behind
//! `figures::` that one. Each is a line of JSON, and words before it. `FIGURE_KILLS`, `FIGURE_PARTITIONS` (several with commas),
//! `FIGURE_TOPICS` and `FIGURE_MEGABYTES` say how much of each.

use super::clients::TOPIC;
use super::cluster::{Cluster, On};
use super::harness::run;
use super::lost_writes::environment;
use headwater_client::{Client, NewTopic, ProducerRecord};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Partitions that are produced to, of however many there are.
const PROBED: u32 = 30;
/// The pause between an acknowledgement and the next record of a partition.
const PACE: Duration = Duration::from_millis(5);
/// Time for whatever takes long.
const LONG: Duration = Duration::from_secs(900);

fn told(what: &str, figures: &Value) {
    println!("{what}");
    if let Some(figures) = figures.as_object() {
        figures.iter().for_each(|(name, value)| println!("  {name:40} {value}"));
    }
    println!("{}", json!({ "figure": what, "values": figures }));
}

fn three(settings: &str) -> (tokio::runtime::Runtime, Cluster) {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let cluster = runtime.block_on(Cluster::start(3, 1, On::ShippedAlone, settings));
    (runtime, cluster)
}

async fn create(cluster: &Cluster, name: &str, partitions: u32) {
    let client = Client::connect(cluster.client()).await.expect("they serve");
    let topic = NewTopic::new(name).partitions(partitions).replication_factor(3).config("min.insync.replicas", "2");
    client.admin().create_topic(topic).await.expect("created");
    client.close().await;
    cluster.wait_until_well(Instant::now() + LONG).await;
}

/// One record after the other to each of some partitions, and when each was acknowledged.
struct Probe {
    acknowledged: Arc<Mutex<BTreeMap<u32, Vec<Instant>>>>,
    tasks: JoinSet<()>,
}

impl Probe {
    async fn start(cluster: &Cluster, partitions: u32) -> Probe {
        let client = Client::connect(cluster.client()).await.expect("they serve");
        let producer = Arc::new(client.producer().linger(Duration::ZERO).build().await.expect("a producer"));
        let acknowledged: Arc<Mutex<BTreeMap<u32, Vec<Instant>>>> = Arc::default();
        let mut tasks = JoinSet::new();
        let probed = PROBED.min(partitions);
        for partition in (0..probed).map(|n| n * (partitions / probed)) {
            let (producer, acknowledged, client) = (Arc::clone(&producer), Arc::clone(&acknowledged), client.clone());
            tasks.spawn(async move {
                // The connections live as long as it does.
                let _client = client;
                loop {
                    let record = ProducerRecord::new(TOPIC, bytes::Bytes::from_static(b"probe")).partition(partition);
                    if let Ok(delivery) = producer.send(record).await
                        && delivery.await.is_ok()
                    {
                        acknowledged.lock().expect("whole").entry(partition).or_default().push(Instant::now());
                    }
                    sleep(PACE).await;
                }
            });
        }
        let probe = Probe { acknowledged, tasks };
        probe.all_since(Instant::now()).await;
        probe
    }

    /// Waits until every partition has been acknowledged something after a moment.
    async fn all_since(&self, since: Instant) {
        let probed = self.tasks.len();
        let is_so = || {
            let acknowledged = self.acknowledged.lock().expect("whole");
            acknowledged.values().filter(|times| times.last().is_some_and(|last| *last > since)).count() == probed
        };
        while !is_so() {
            assert!(since.elapsed() < LONG, "a partition is acknowledged nothing");
            sleep(PACE).await;
        }
    }

    /// The longest time without an acknowledgement that any partition had from a moment on.
    fn longest_ms(&self, since: Instant) -> u128 {
        let acknowledged = self.acknowledged.lock().expect("whole");
        let gaps = acknowledged.values().flat_map(|times| times.windows(2).filter(|pair| pair[1] > since));
        gaps.map(|pair| (pair[1] - pair[0]).as_millis()).max().unwrap_or(0)
    }
}

fn spread(mut silences: Vec<u128>) -> Value {
    silences.sort_unstable();
    json!({ "p50_ms": silences.get(silences.len() / 2), "max_ms": silences.last(), "all_ms": silences })
}

#[test]
#[ignore = "a figure"]
fn failover_after_a_leader_is_killed() {
    let partitions = std::env::var("FIGURE_PARTITIONS").unwrap_or_else(|_| "10,1000,5000".to_owned());
    for partitions in partitions.split(',').map(|text| text.parse::<u32>().expect("numbers")) {
        let (runtime, mut cluster) = three("");
        let silences = runtime.block_on(async {
            create(&cluster, TOPIC, partitions).await;
            let probe = Probe::start(&cluster, partitions).await;
            let mut silences: [Vec<u128>; 2] = Default::default();
            for kill in 0..environment("FIGURE_KILLS", 20) {
                let controller = cluster.describe().await.expect("told").controller.expect("one is in office");
                let controller = usize::try_from(controller).expect("an id");
                // Every other time it is the controller's broker.
                let id = if kill % 2 == 0 { controller } else { controller % 3 + 1 };
                let killed = Instant::now();
                cluster.kill(&[id]);
                probe.all_since(killed + Duration::from_millis(20)).await;
                // What comes late of the same death counts too.
                sleep(Duration::from_secs(1)).await;
                silences[usize::from(id == controller)].push(probe.longest_ms(killed));
                cluster.spawn(id);
                cluster.wait_until_well(Instant::now() + LONG).await;
            }
            silences
        });
        let [others, controllers] = silences;
        let figures = json!({
            "partitions": partitions, "all": spread([others.clone(), controllers.clone()].concat()),
            "the_controllers_broker": spread(controllers), "another_broker": spread(others),
        });
        told("longest time without acknowledgements on a partition, after kill -9 of a leader", &figures);
    }
}

#[test]
#[ignore = "a figure"]
fn clean_restart_under_load() {
    let (runtime, mut cluster) = three("");
    let silences = runtime.block_on(async {
        create(&cluster, TOPIC, 30).await;
        let probe = Probe::start(&cluster, 30).await;
        let mut silences = Vec::new();
        for id in [1, 2, 3, 1, 2, 3] {
            let stopped = Instant::now();
            cluster.node(id).process.take().expect("it runs").stop();
            cluster.spawn(id);
            cluster.wait_until_well(Instant::now() + LONG).await;
            probe.all_since(Instant::now()).await;
            silences.push(probe.longest_ms(stopped));
        }
        silences
    });
    told("longest time without acknowledgements on a partition, while a broker is restarted", &spread(silences));
}

/// Megabytes a second of `headwater bench produce` on a topic that is there.
fn bench(profile: &Path, megabytes: u64) -> f64 {
    let records = (megabytes * 1_000).to_string();
    let args = ["bench", "produce", "--topic", TOPIC, "--records", &records, "--json", "--profile"];
    let answer = run(&[&args[..], &[profile.to_str().expect("text")]].concat()).ok().object();
    answer["mb_per_s"].as_f64().expect("a number")
}

#[test]
#[ignore = "a figure"]
fn durable_produce_replicated_and_alone() {
    let megabytes = environment("FIGURE_MEGABYTES", 1_000);
    let alone = super::harness::Broker::start(&[]);
    alone.run(&["topic", "create", TOPIC, "-p", "1"]).ok();
    let (runtime, cluster) = three("");
    runtime.block_on(create(&cluster, TOPIC, 1));
    let profiles = [alone.profile().to_owned(), cluster.profile()];
    // Once unmeasured, then in turns: the disk and the machine are not the same all the time.
    for profile in &profiles {
        bench(profile, megabytes / 4);
    }
    let mut rates: [Vec<f64>; 2] = Default::default();
    for _ in 0..5 {
        rates.iter_mut().zip(&profiles).for_each(|(rates, profile)| rates.push(bench(profile, megabytes / 4)));
    }
    let [one, three] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    let figures = json!({ "one_broker_mb_per_s": one, "three_min_2_mb_per_s": three, "ratio": three / one });
    told("durable produce", &figures);
}

/// Processor time of a process so far, in seconds, and its resident memory, in bytes.
fn used(pid: u32) -> (f64, u64) {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).expect("it runs");
    let stat = read("stat");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks = [fields[11], fields[12]].map(|ticks| ticks.parse::<f64>().expect("a number"));
    let resident = read("statm").split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    let page = rustix::param::page_size() as u64;
    (ticks.iter().sum::<f64>() / per_second, resident.expect("pages") * page)
}

fn used_by_all(cluster: &Cluster) -> (f64, u64) {
    let pids = cluster.brokers.iter().filter_map(|node| Some(node.process.as_ref()?.pid()));
    pids.map(used).fold((0.0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

#[test]
#[ignore = "a figure"]
fn three_idle_brokers() {
    let (runtime, cluster) = three("");
    let before = used_by_all(&cluster);
    let mut figures = serde_json::Map::new();
    runtime.block_on(create(&cluster, TOPIC, 1_000));
    // What was begun comes to rest.
    std::thread::sleep(Duration::from_secs(10));
    let (then, began) = (used_by_all(&cluster), Instant::now());
    std::thread::sleep(Duration::from_secs(30));
    let now = used_by_all(&cluster);
    let percent = 100.0 * (now.0 - then.0) / began.elapsed().as_secs_f64();
    figures.insert("cpu_percent_of_all_three_with_1000_partitions".into(), json!(percent));
    let bytes = now.1.saturating_sub(before.1) / 3_000;
    figures.insert("resident_bytes_a_replica".into(), json!(bytes));
    told("idle brokers", &figures.into());
}

#[test]
#[ignore = "a figure"]
fn time_to_rejoin() {
    let megabytes = environment("FIGURE_MEGABYTES", 1_000);
    let (runtime, mut cluster) = three("");
    runtime.block_on(create(&cluster, TOPIC, 4));
    cluster.kill(&[3]);
    bench(&cluster.profile(), megabytes);
    let began = Instant::now();
    cluster.spawn(3);
    let ready = cluster.node(3).process.as_mut().expect("it was started").ready();
    assert!(ready["ready"].as_bool().unwrap_or(true), "{ready}");
    let served = began.elapsed();
    runtime.block_on(cluster.wait_until_well(Instant::now() + LONG));
    let well = began.elapsed();
    let figures = json!({
        "megabytes_behind": megabytes, "serves_after_s": served.as_secs_f64(), "all_in_sync_after_s": well.as_secs_f64(),
        "mb_per_s": megabytes as f64 / well.as_secs_f64(),
    });
    told("a broker comes back", &figures);
}

#[test]
#[ignore = "a figure"]
fn many_topics() {
    let topics = environment("FIGURE_TOPICS", 10_000);
    let (runtime, cluster) = three("");
    let journal = |id: usize| {
        let path = cluster.data(id).join("headwater.metadata");
        // Space that is reserved ahead is no part of it.
        let bytes = std::fs::read(path).expect("a journal");
        bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
    };
    let (before, memory) = (journal(1), used_by_all(&cluster).1);
    let began = Instant::now();
    let largest = Arc::new(Mutex::new(0));
    runtime.block_on(async {
        let client = Client::connect(cluster.client()).await.expect("they serve");
        let mut tasks = JoinSet::new();
        for n in 0..topics {
            while tasks.len() >= 32 {
                tasks.join_next().await.expect("some").expect("no panic");
            }
            let admin = client.admin();
            tasks.spawn(async move {
                let topic = NewTopic::new(format!("topic-{n}")).partitions(1).replication_factor(3);
                admin.create_topic(topic).await.expect("created");
            });
            if n % 200 == 0 {
                // A snapshot may take its place: the most that it was counts.
                let mut largest = largest.lock().expect("whole");
                *largest = journal(1).max(*largest);
            }
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("no panic");
        }
    });
    let created = began.elapsed();
    runtime.block_on(cluster.wait_until_well(Instant::now() + LONG));
    let well = began.elapsed();
    let bytes = journal(1).max(*largest.lock().expect("whole")).saturating_sub(before);
    let figures = json!({
        "topics": topics, "created_s": created.as_secs_f64(), "all_in_sync_s": well.as_secs_f64(),
        "resident_bytes_a_topic_and_broker": used_by_all(&cluster).1.saturating_sub(memory) / (3 * topics),
        "journal_bytes_a_topic_at_most_seen": bytes / topics,
    });
    told("topics of one partition, kept three times", &figures);
}
