//! The metadata quorum itself under the nemesis: most voters stop and come back; brokers come to vote and vote no more, leave and come in
//! again, while the controller is killed. Clients go on meanwhile, and the checker judges what they saw.
//!
//! `NEMESIS_STOPS` says how often most voters stop, `NEMESIS_CHANGES` how often the members change, `NEMESIS_KILLS` how often all brokers
//! are killed at once; `NEMESIS_SEED` whom it strikes.
//! `NEMESIS_KILLS=20 cargo test --test nemesis the_end_of_all -- --nocapture` kills all of them twenty times.

use super::checker::Counts;
use super::clients::{TOPIC, Witness, World, belong, produce, until};
use super::cluster::{Cluster, On};
use super::harness::{Answer, signal};
use super::history::What;
use super::lost_writes::{check_group, environment, judge, soon};
use super::serving::one_after_the_other;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

const PARTITIONS: u32 = 3;
const MEMBERS: usize = 2;
/// Time for everything to be well again.
const HEALED: Duration = Duration::from_secs(120);
/// Time for every partition to take records again, and the group to commit, once most voters are back.
const RESUMED: Duration = Duration::from_secs(30);
/// Whatever was decided before most voters stopped is told within this time.
const TOLD: Duration = Duration::from_secs(2);

/// Producers and a group that go on while the quorum is troubled.
struct Clients {
    world: World,
    stop: CancellationToken,
    leave: CancellationToken,
    producers: Vec<JoinHandle<()>>,
    members: Vec<JoinHandle<()>>,
}

impl Clients {
    async fn start(cluster: &Cluster, rng: &mut StdRng, members: usize) -> Clients {
        cluster.create_topic(TOPIC, PARTITIONS, 3, &[("min.insync.replicas", "2")]).await;
        let world = World::new(cluster.client(), PARTITIONS);
        let (stop, leave) = (CancellationToken::new(), CancellationToken::new());
        let producers = (1..=2).map(|n| produce(&world, format!("p{n}"), rng.random(), 150, stop.clone())).collect();
        let members = (0..members).map(|n| belong(&world, format!("m{n}"), leave.clone(), Arc::default())).collect();
        Clients { world, stop, leave, producers, members }
    }

    /// Ends them in good order, has everything heal, and judges what they saw.
    async fn finish(self, cluster: &mut Cluster, story: &str) -> Counts {
        cluster.wait_until_well(Instant::now() + HEALED).await;
        self.stop.cancel();
        for producer in self.producers {
            producer.await.expect("no panic");
        }
        let (ends, members) = (self.world.read_all(soon()).await, self.members.len());
        if members > 0 {
            self.world.wait_for_group(&ends, soon()).await;
            self.leave.cancel();
            for member in self.members {
                member.await.expect("no panic");
            }
            let progress = self.world.ask_progress(soon()).await;
            assert_eq!(progress, ends, "members that leave in good order have committed everything");
        }
        cluster.check_processes();
        let batches = cluster.check_replicas(TOPIC).await;
        let counts = judge(&self.world, &format!("{story}\n  the replicas are the same: {batches} batches"));
        check_group(&counts, members, false);
        assert_eq!(counts.sent, counts.acknowledged, "every record was kept in the end");
        counts
    }
}

/// All partitions take records, and the group commits if there is one, counted from now on.
pub(crate) async fn resume(world: &World, partitions: u32, is_grouped: bool, deadline: Instant) {
    let from = world.history.len();
    until(deadline, "all partitions take records again, and the group commits", async || {
        let (mut taken, mut is_committed) = (BTreeSet::new(), !is_grouped);
        for entry in world.history.entries().into_iter().skip(from) {
            match entry.what {
                What::Acknowledged { partition, .. } => drop(taken.insert(partition)),
                What::Committed { .. } => is_committed = true,
                _ => {}
            }
        }
        let is_so = taken.len() == partitions as usize && is_committed;
        is_so.then_some(()).ok_or_else(|| format!("records are taken by {taken:?}, a commit: {is_committed}"))
    })
    .await;
}

/// Has a command succeed, which may be refused as long as the quorum has not come to itself.
async fn insist(cluster: &Cluster, args: &[&str]) {
    until(soon(), &args.join(" "), async || {
        let answer = cluster.command(args).await.expect("no panic");
        answer.status.success().then_some(()).ok_or(answer.stderr)
    })
    .await;
}

/// As the metadata have it.
pub(crate) fn number(id: usize) -> i32 {
    i32::try_from(id).expect("few brokers")
}

/// A broker leaves and comes in again as a new one: what it keeps moves to others, it votes no more, stops, and is forgotten. Everything
/// is well before, and after. Somebody else may be killed in the middle, and is started again.
pub(crate) async fn leave_and_return(cluster: &mut Cluster, id: usize, killed: Option<usize>) {
    let name = id.to_string();
    let votes = until(soon(), "who votes", async || cluster.describe().await).await.voters.contains(&number(id));
    insist(cluster, &["cluster", "drain", &name, "--no-wait"]).await;
    until(soon(), "it keeps nothing", async || {
        let told = cluster.describe().await?;
        let kept = told.brokers.iter().find(|broker| broker.id == number(id)).map(|broker| broker.partitions);
        (kept == Some(0)).then_some(()).ok_or_else(|| format!("it keeps {kept:?} partitions"))
    })
    .await;
    let removing = votes.then(|| cluster.command(&["cluster", "voters", "remove", &name]));
    if let Some(other) = killed {
        cluster.kill(&[other]);
        sleep(Duration::from_millis(500)).await;
        cluster.spawn(other);
    }
    if let Some(removing) = removing {
        removing.await.expect("no panic");
        insist(cluster, &["cluster", "voters", "remove", &name]).await;
    }
    cluster.node(id).process.take().expect("it runs").stop();
    insist(cluster, &["cluster", "remove", &name]).await;
    let told = until(soon(), "who is there", async || cluster.describe().await).await;
    assert!(told.brokers.iter().all(|broker| broker.id != number(id)), "broker {id} is forgotten: {told:?}");
    cluster.replace_disk(id).await;
    cluster.spawn(id);
    cluster.wait_until_well(soon()).await;
    if votes {
        insist(cluster, &["cluster", "voters", "add", &name]).await;
    }
}

#[test]
fn what_a_cluster_acknowledged_survives_the_end_of_all_its_brokers_at_once() {
    let _turn = one_after_the_other();
    let (seed, times) = (environment("NEMESIS_SEED", 1), environment("NEMESIS_KILLS", 4));
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(kill_all(seed, times));
}

async fn kill_all(seed: u64, times: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(3, rng.random(), On::Shipped, "").await;
    let clients = Clients::start(&cluster, &mut rng, MEMBERS).await;
    let (world, mut story) = (clients.world.clone(), format!("seed {seed}"));
    let _witness = Witness(&world);
    for _ in 0..times {
        world.more_acknowledgements(rng.random_range(50..400)).await;
        cluster.kill(&[1, 2, 3]);
        let killed = Instant::now();
        // With one broker there is no quorum; a second one finds it again.
        cluster.spawn(1);
        let alone = Duration::from_millis(rng.random_range(0..1_500));
        sleep(alone).await;
        cluster.spawn(2);
        world.more_acknowledgements(1).await;
        story += &format!("\n  all killed, one alone for {alone:?}: acknowledged after {:?}", killed.elapsed());
        cluster.spawn(3);
        cluster.check_processes();
    }
    clients.finish(&mut cluster, &story).await;
}

#[test]
fn a_quorum_that_is_lost_is_named_and_found_again() {
    let _turn = one_after_the_other();
    let (seed, times) = (environment("NEMESIS_SEED", 1), environment("NEMESIS_STOPS", 2));
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(stop_most(seed, times));
}

/// What is asked while most voters are gone is answered in time, and the answer says what is wrong.
async fn check_refusals(cluster: &Cluster) {
    let stale = cluster.command(&["cluster", "describe", "--stale"]).await.expect("no panic");
    stale.ok();
    let asked: Vec<JoinHandle<Answer>> =
        [&["cluster", "describe"][..], &["topic", "create", "late"], &["cluster", "voters", "remove", "1"]]
            .map(|args| cluster.command(args))
            .into();
    for answer in asked {
        let refused = answer.await.expect("no panic").fails(1);
        assert!(refused.stderr.contains("the metadata quorum"), "it says what is wrong: {}", refused.stderr);
    }
}

async fn stop_most(seed: u64, times: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(3, rng.random(), On::Shipped, "").await;
    let clients = Clients::start(&cluster, &mut rng, MEMBERS).await;
    let (world, mut story) = (clients.world.clone(), format!("seed {seed}"));
    let _witness = Witness(&world);
    let acknowledged = || world.history.count(|what| matches!(what, What::Acknowledged { .. }));
    for round in 0..times {
        resume(&world, PARTITIONS, true, soon()).await;
        let most: Vec<usize> = [1, 2, 3].choose_multiple(&mut rng, 2).copied().collect();
        // Killed in turn, and standing still, which closes nothing.
        let stand_still = round % 2 == 1;
        let pids = most.iter().map(|id| cluster.node(*id).process.as_ref().expect("it runs").pid()).collect::<Vec<_>>();
        match stand_still {
            true => pids.iter().for_each(|pid| signal(*pid, "STOP")),
            false => cluster.kill(&most),
        }
        sleep(TOLD).await;
        let before = acknowledged();
        // What is asked meanwhile is refused by name, or done once the quorum is back.
        let waits = match round {
            0 => {
                check_refusals(&cluster).await;
                None
            }
            _ => Some(cluster.command(&["topic", "create", &format!("late-{round}")])),
        };
        sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
        assert_eq!(acknowledged(), before, "one of three acknowledges nothing by itself");
        match stand_still {
            true => pids.iter().for_each(|pid| signal(*pid, "CONT")),
            false => most.iter().for_each(|id| cluster.spawn(*id)),
        }
        let back = Instant::now();
        resume(&world, PARTITIONS, true, back + RESUMED).await;
        let how = if stand_still { "stood still" } else { "were killed" };
        story += &format!("\n  {most:?} {how}: back after {:?}", back.elapsed());
        if let Some(waits) = waits {
            waits.await.expect("no panic").ok();
        }
        cluster.check_processes();
    }
    clients.finish(&mut cluster, &story).await;
}

#[test]
fn voters_and_brokers_come_and_go_while_the_controller_is_killed() {
    let _turn = one_after_the_other();
    let (seed, times) = (environment("NEMESIS_SEED", 1), environment("NEMESIS_CHANGES", 1));
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(change_members(seed, times));
}

async fn change_members(seed: u64, times: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    // Three vote, and the fourth takes over what another one keeps.
    let mut cluster = Cluster::start(4, rng.random(), On::Shipped, "").await;
    let clients = Clients::start(&cluster, &mut rng, MEMBERS).await;
    let (world, mut story) = (clients.world.clone(), format!("seed {seed}"));
    let _witness = Witness(&world);
    for _ in 0..times {
        resume(&world, PARTITIONS, true, soon()).await;
        let told = cluster.wait_until_well(soon()).await;
        let votes = |id: &usize| told.voters.contains(&number(*id));
        let all: Vec<usize> = cluster.brokers.iter().map(|node| node.id).collect();
        let comes = *all.iter().find(|id| !votes(id)).expect("one does not vote");
        // It may be the controller, which has to have another one lead first.
        let goes = *all.iter().filter(|id| votes(id)).collect::<Vec<_>>().choose(&mut rng).expect("three vote");
        let controller = usize::try_from(told.controller.expect("all is well")).expect("an id");
        story += &format!("\n  {comes} comes to vote and {goes} does not; controller {controller} is killed");
        let (adding, in_the_middle) =
            (cluster.command(&["cluster", "voters", "add", &comes.to_string()]), rng.random_range(0..300));
        sleep(Duration::from_millis(in_the_middle)).await;
        cluster.kill(&[controller]);
        let removing = cluster.command(&["cluster", "voters", "remove", &goes.to_string()]);
        sleep(Duration::from_millis(rng.random_range(0..2_000))).await;
        cluster.spawn(controller);
        // Done, or refused by name: either can be asked for again.
        for answer in [adding, removing] {
            let answer = answer.await.expect("no panic");
            let is_named = answer.status.success() || answer.stderr.contains("metadata");
            assert!(is_named, "{}: {}", answer.status, answer.stderr);
        }
        insist(&cluster, &["cluster", "voters", "add", &comes.to_string()]).await;
        insist(&cluster, &["cluster", "voters", "remove", &goes.to_string()]).await;
        let told = cluster.wait_until_well(soon()).await;
        let wanted: BTreeSet<i32> = all.iter().filter(|id| *id != goes).map(|id| number(*id)).collect();
        assert_eq!(told.voters.iter().copied().collect::<BTreeSet<_>>(), wanted, "{story}");

        let (leaves, killed) = (*all.choose(&mut rng).expect("four"), *all.choose(&mut rng).expect("four"));
        let killed = Some(killed).filter(|id| *id != leaves);
        story += &format!("\n  {leaves} leaves and comes in again; killed meanwhile: {killed:?}");
        leave_and_return(&mut cluster, leaves, killed).await;
        cluster.check_processes();
    }
    clients.finish(&mut cluster, &story).await;
}
