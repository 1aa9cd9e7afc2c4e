//! Power failures of real processes: what was acknowledged is on the disk, though nothing of the page cache is left.
//!
//! `POWER_FAILURES` says how often the power fails in each test, `NEMESIS_SEED` what else happens.

use super::checker::{self, Kind};
use super::clients::{TOPIC, Witness, World, belong, produce};
use super::cluster::{Cluster, On};
use super::harness::DEADLINE;
use super::serving::{Process, one_after_the_other};
use super::unsynced::{Loss, PowerFailure};
use headwater_client::{Client, ClientConfig, NewTopic};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A number that the environment may say otherwise.
pub(crate) fn environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}")))
}

/// A deadline of one of many steps.
pub(crate) fn soon() -> Instant {
    Instant::now() + DEADLINE * 2
}

/// One broker on files that remember what is not synced.
struct Alone {
    folder: tempfile::TempDir,
    process: Process,
    client: ClientConfig,
}

impl Alone {
    fn start() -> Alone {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("data")).expect("made");
        let (config, log) = (folder.path().join("broker.toml"), folder.path().join("broker.err"));
        let write_config = |listen: &str| {
            let settings = format!(
                "\"data.dir\" = {:?}\nlisten = {listen:?}\n\"admin.listen\" = \"127.0.0.1:0\"\n",
                folder.path().join("data")
            );
            std::fs::write(&config, settings).expect("written");
        };
        write_config("127.0.0.1:0");
        let mut process = Process::on_unsynced_files(&config, &log);
        let ready = process.ready();
        write_config(ready["listen"].as_str().expect("an address"));
        let client = ClientConfig::from_profile(ready["profile"].as_str().expect("a path")).expect("a profile");
        Alone { folder, process, client }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn start_again(&mut self) {
        let at = |name: &str| self.folder.path().join(name);
        self.process = Process::on_unsynced_files(&at("broker.toml"), &at("broker.err"));
        self.process.ready();
    }

    async fn create_topic(&self, settings: &[(&str, &str)]) {
        let client = Client::connect(self.client.clone()).await.expect("it serves");
        let topic = NewTopic::new(TOPIC).partitions(3).replication_factor(1);
        let topic = settings.iter().fold(topic, |topic, (name, value)| topic.config(*name, *value));
        client.admin().create_topic(topic).await.expect("created");
        client.close().await;
    }
}

/// Says what a run found.
#[track_caller]
pub(crate) fn judge(world: &World, story: &str) -> checker::Counts {
    let entries = world.history.entries();
    let (found, counts) = checker::check(&entries);
    eprintln!("{story}\n{counts:?}");
    if std::env::var_os("NEMESIS_HISTORY").is_some() {
        world.leave_behind();
    }
    let shown: Vec<String> = found.iter().take(20).map(ToString::to_string).collect();
    assert!(found.is_empty(), "{} anomalies:\n{}", found.len(), shown.join("\n"));
    counts
}

/// A group of so many members did what a group does. Where one of them died, its partitions were given again.
#[track_caller]
pub(crate) fn check_group(counts: &checker::Counts, members: usize, one_died: bool) {
    let is_so = counts.committed > 0 && counts.delivered > 0 && counts.given >= members + usize::from(one_died);
    assert!(
        members == 0 || is_so,
        "the group of {members} members, of which one died: {one_died}, did little: {counts:?}"
    );
}

#[test]
fn what_one_broker_acknowledged_survives_power_failures() {
    let _turn = one_after_the_other();
    let (seed, times) = (environment("NEMESIS_SEED", 1), environment("POWER_FAILURES", 6));
    let mut rng = StdRng::seed_from_u64(seed);
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let _entered = runtime.enter();
    let mut broker = Alone::start();
    // Small segments, so that the power fails while one is rolled, trimmed and removed too.
    runtime.block_on(broker.create_topic(&[("segment.bytes", "65536")]));
    let (world, stop, leave) =
        (World::new(broker.client.clone(), 3), CancellationToken::new(), CancellationToken::new());
    let _witness = Witness(&world);
    let producers = [1, 2].map(|n| produce(&world, format!("p{n}"), seed + n, 400, stop.clone()));
    let member = belong(&world, "m".into(), leave.clone(), Arc::default());
    let (mut story, mut pages) = (format!("seed {seed}:"), 0);
    for round in 0..times {
        runtime.block_on(world.more_acknowledgements(rng.random_range(100..700)));
        broker.process.kill();
        let loss = match round % 3 {
            0 => Some(Loss::Everything),
            1 => Some(Loss::Some(rng.random())),
            // Only the process ends. What it did not sync is still not on the disk when the power fails in the next round.
            _ => None,
        };
        let struck = loss.map(|loss| PowerFailure::strike(&broker.data(), loss).expect("undone"));
        story += &format!("\n  killed, {loss:?}: {struck:?}");
        pages += struck.map_or(0, |struck| struck.pages);
        broker.start_again();
    }
    runtime.block_on(world.more_acknowledgements(100));
    stop.cancel();
    runtime.block_on(async {
        for producer in producers {
            producer.await.expect("no panic");
        }
        let ends = world.read_all(soon()).await;
        world.wait_for_group(&ends, soon()).await;
        leave.cancel();
        member.await.expect("no panic");
        let progress = world.ask_progress(soon()).await;
        assert_eq!(progress, ends, "a member that leaves in good order has committed everything");
    });
    let counts = judge(&world, &story);
    assert!(
        counts.acknowledged > 500 && pages > 0,
        "nothing was at stake: {counts:?}, {pages} pages were lost\n{story}"
    );
    check_group(&counts, 1, false);
}

/// Lets the power of brokers that do not run fail.
fn strike(cluster: &Cluster, ids: &[usize], loss: Loss) -> Vec<PowerFailure> {
    let struck = ids.iter().map(|id| PowerFailure::strike(&cluster.data(*id), loss).expect("undone"));
    struck.collect()
}

#[test]
fn what_a_cluster_acknowledged_survives_power_failures_of_one_broker_and_of_all() {
    let _turn = one_after_the_other();
    let (seed, times) = (environment("NEMESIS_SEED", 1), environment("POWER_FAILURES", 5));
    let mut rng = StdRng::seed_from_u64(seed);
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let _entered = runtime.enter();
    let mut cluster = runtime.block_on(Cluster::start(3, seed, On::UnsyncedFiles, ""));
    let settings = [("min.insync.replicas", "2"), ("segment.bytes", "65536")];
    runtime.block_on(cluster.create_topic(TOPIC, 3, 3, &settings));
    let (world, stop, leave) = (World::new(cluster.client(), 3), CancellationToken::new(), CancellationToken::new());
    let _witness = Witness(&world);
    let producers = [1, 2].map(|n| produce(&world, format!("p{n}"), seed + n, 300, stop.clone()));
    let members: Vec<_> = (0..environment("NEMESIS_MEMBERS", 2))
        .map(|n| belong(&world, format!("m{n}"), leave.clone(), Arc::default()))
        .collect();
    let grouped = members.len();
    let (mut story, mut pages) = (format!("seed {seed}:"), 0);
    for round in 0..times {
        runtime.block_on(world.more_acknowledgements(rng.random_range(100..500)));
        // All at once, which no other replica makes good, and one that the others outlive.
        let ids: Vec<usize> = if round % 3 == 2 { vec![rng.random_range(1..=3)] } else { vec![1, 2, 3] };
        let loss = if round % 2 == 0 { Loss::Everything } else { Loss::Some(rng.random()) };
        cluster.kill(&ids);
        let struck = strike(&cluster, &ids, loss);
        story += &format!("\n  {ids:?} killed, {loss:?}: {struck:?}");
        pages += struck.iter().map(|struck| struck.pages).sum::<usize>();
        ids.iter().for_each(|id| cluster.spawn(*id));
        cluster.check_processes();
    }
    runtime.block_on(world.more_acknowledgements(100));
    stop.cancel();
    runtime.block_on(async {
        for producer in producers {
            producer.await.expect("no panic");
        }
        cluster.wait_until_well(soon()).await;
        let ends = world.read_all(soon()).await;
        if !members.is_empty() {
            world.wait_for_group(&ends, soon()).await;
            leave.cancel();
            for member in members {
                member.await.expect("no panic");
            }
            let progress = world.ask_progress(soon()).await;
            assert_eq!(progress, ends, "members that leave in good order have committed everything");
        }
    });
    cluster.check_processes();
    let counts = judge(&world, &story);
    assert!(
        counts.acknowledged > 400 && pages > 0,
        "nothing was at stake: {counts:?}, {pages} pages were lost\n{story}"
    );
    check_group(&counts, grouped, false);
}

#[test]
fn what_a_cluster_acknowledges_from_memory_is_seen_to_be_lost_where_all_of_it_fails() {
    let _turn = one_after_the_other();
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let _entered = runtime.enter();
    let mut cluster = runtime.block_on(Cluster::start(3, 1, On::UnsyncedFiles, ""));
    let settings = [("min.insync.replicas", "2"), ("durability", "replicated"), ("flush.ms", "600000")];
    runtime.block_on(cluster.create_topic(TOPIC, 3, 3, &settings));
    let (world, stop) = (World::new(cluster.client(), 3), CancellationToken::new());
    let _witness = Witness(&world);
    let producer = produce(&world, "p".into(), 1, 300, stop.clone());
    runtime.block_on(world.more_acknowledgements(200));
    cluster.kill(&[1, 2, 3]);
    producer.abort();
    let struck = strike(&cluster, &[1, 2, 3], Loss::Everything);
    (1..=3).for_each(|id| cluster.spawn(id));
    runtime.block_on(async {
        cluster.wait_until_well(soon()).await;
        world.read_all(soon()).await;
    });
    let (found, counts) = checker::check(&world.history.entries());
    let lost = found.iter().filter(|anomaly| anomaly.kind == Kind::Lost).count();
    assert!(lost >= 200, "{lost} of {} acknowledged records are lost: {struck:?}", counts.acknowledged);
    assert_eq!(lost, found.len(), "nothing else is wrong: {found:#?}");
}

#[test]
fn what_is_acknowledged_before_it_is_flushed_is_seen_to_be_lost() {
    let _turn = one_after_the_other();
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let _entered = runtime.enter();
    let mut broker = Alone::start();
    // As a topic may ask for: an acknowledgement waits for the memory of the in-sync replicas, of which there is one.
    runtime.block_on(broker.create_topic(&[("durability", "replicated"), ("flush.ms", "600000")]));
    let (world, stop) = (World::new(broker.client.clone(), 3), CancellationToken::new());
    let producer = produce(&world, "p".into(), 1, 400, stop.clone());
    runtime.block_on(world.more_acknowledgements(200));
    broker.process.kill();
    producer.abort();
    let struck = PowerFailure::strike(&broker.data(), Loss::Everything).expect("undone");
    broker.start_again();
    runtime.block_on(world.read_all(soon()));
    let (found, counts) = checker::check(&world.history.entries());
    let lost = found.iter().filter(|anomaly| anomaly.kind == Kind::Lost).count();
    assert!(lost >= 200, "{lost} of {} acknowledged records are lost: {struck:?}", counts.acknowledged);
    assert_eq!(lost, found.len(), "nothing else is wrong: {found:#?}");
}
