//! A seed decides what goes wrong with the brokers of a cluster, and when, while producers produce and a group reads. In the end all
//! is mended, heals within a deadline, and the checker judges what the clients saw.
//!
//! `NEMESIS_SECONDS=1800 cargo test --test nemesis nemesis:: -- --nocapture` is half an hour of it; `NEMESIS_SEED` is the seed,
//! `NEMESIS_MEMBERS` how many read in the group, `NEMESIS_HISTORY` a file for what the clients saw. The seed decides which faults come in which order; what they meet is up to the
//! machine.

use super::clients::{TOPIC, Witness, World, belong, produce};
use super::cluster::{Cluster, On};
use super::harness::{headwater, run, signal};
use super::lost_writes::{environment, judge, soon};
use super::relay::{CUT, Trouble, Way};
use super::serving::one_after_the_other;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

const PARTITIONS: u32 = 6;
/// Brokers there are at most: more are added.
const MOST_BROKERS: usize = 4;
/// Time for everything to be mended and well again.
const HEALED: Duration = Duration::from_secs(120);

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// One is killed, and started again a while later.
    Kill,
    /// Most are killed: the quorum is lost until they are started again.
    KillMost,
    /// All are killed at once, and started again.
    KillAll,
    /// One stands still for a while.
    Pause,
    /// One is stopped in good order and started again.
    Restart,
    /// The leader of a partition, or the controller, is killed.
    KillLeader,
    /// Packets from one to another vanish.
    CutOneWay,
    /// Packets between two vanish.
    CutTwoWays,
    /// Whatever one says, or hears, of other brokers vanishes, or both.
    Isolate,
    /// Packets between all are lost, doubled and late.
    BadNetwork,
    /// One is killed and lacks its partitions when it starts again.
    EmptyPartitions,
    /// One is killed, and its disk is a new one when it starts again.
    ReplaceDisk,
    /// A member of the group comes to its end without a word.
    KillMember,
    /// Leaders go back to where they are preferred.
    PreferLeaders,
    /// A partition moves to other brokers.
    Reassign,
    /// Leaders and replicas leave a broker.
    Drain,
    /// A broker comes in.
    Add,
    /// What is uneven is moved.
    Rebalance,
}

use Fault::*;

const FAULTS: [(Fault, u32); 18] = [
    (Kill, 3),
    (KillMost, 1),
    (KillAll, 1),
    (Pause, 3),
    (Restart, 2),
    (KillLeader, 4),
    (CutOneWay, 2),
    (CutTwoWays, 2),
    (Isolate, 3),
    (BadNetwork, 2),
    (EmptyPartitions, 2),
    (ReplaceDisk, 1),
    (KillMember, 2),
    (PreferLeaders, 1),
    (Reassign, 2),
    (Drain, 1),
    (Add, 1),
    (Rebalance, 1),
];

struct Nemesis {
    rng: StdRng,
    cluster: Cluster,
    began: Instant,
    story: Vec<String>,
    /// A disk was emptied, and nobody has seen all replicas in sync since: no other may be.
    is_emptied: bool,
    members: Vec<Arc<Notify>>,
    /// A command of a person that is under way.
    command: Option<JoinHandle<String>>,
    /// The commands there are.
    known: Vec<String>,
}

impl Nemesis {
    fn tell(&mut self, what: String) {
        let told = format!("{:8.2} s  {what}", self.began.elapsed().as_secs_f64());
        eprintln!("{told}");
        self.story.push(told);
    }

    fn ids(&self) -> Vec<usize> {
        self.cluster.brokers.iter().map(|node| node.id).collect()
    }

    fn any(&mut self) -> usize {
        *self.ids().choose(&mut self.rng).expect("there are some")
    }

    fn two(&mut self) -> (usize, usize) {
        let ids = self.ids();
        let two: Vec<usize> = ids.choose_multiple(&mut self.rng, 2).copied().collect();
        (two[0], two[1])
    }

    /// How long a fault lasts, or nothing happens.
    async fn a_while(&mut self, most_ms: u64) {
        let ms = self.rng.random_range(100..most_ms);
        sleep(Duration::from_millis(ms)).await;
    }

    /// Whoever leads a partition, or the controller; anybody where nobody says.
    async fn leader(&mut self) -> usize {
        let partition = self.rng.random_range(0..=PARTITIONS);
        let found = match partition < PARTITIONS {
            true => self.cluster.describe_topic(TOPIC).await.map(|told| {
                let at = told.partitions.iter().find(|at| at.partition == partition);
                at.map(|at| at.leader)
            }),
            false => self.cluster.describe().await.map(|told| told.controller),
        };
        let found = found.ok().flatten().and_then(|id| usize::try_from(id).ok());
        match found {
            Some(id) => id,
            None => self.any(),
        }
    }

    async fn strike(&mut self) {
        let total = FAULTS.iter().map(|(_, weight)| weight).sum();
        let mut drawn = self.rng.random_range(0..total);
        let fault = FAULTS.iter().find(|(_, weight)| {
            let is_it = drawn < *weight;
            drawn = drawn.wrapping_sub(*weight);
            is_it
        });
        match fault.expect("the weights add up").0 {
            Kill => {
                let id = self.any();
                self.kill_for_a_while("killed", &[id]).await;
            }
            KillLeader => {
                let id = self.leader().await;
                self.kill_for_a_while("killed while they lead", &[id]).await;
            }
            KillMost => {
                let (one, other) = self.two();
                self.kill_for_a_while("killed", &[one, other]).await;
            }
            KillAll => {
                let all = self.ids();
                self.kill_for_a_while("killed", &all).await;
            }
            Pause => {
                let id = self.any();
                let pid = self.cluster.node(id).process.as_ref().expect("it runs").pid();
                self.tell(format!("broker {id} stands still"));
                signal(pid, "STOP");
                self.a_while(4_000).await;
                signal(pid, "CONT");
                self.tell(format!("broker {id} goes on"));
            }
            Restart => {
                let id = self.any();
                self.tell(format!("broker {id} is stopped"));
                let is_good = self.cluster.node(id).process.take().expect("it runs").stop();
                self.tell(format!("broker {id} has stopped, in good order: {is_good}"));
                self.cluster.spawn(id);
            }
            CutOneWay => {
                let way = self.two();
                self.trouble_for_a_while(&[way], CUT).await;
            }
            CutTwoWays => {
                let (one, other) = self.two();
                self.trouble_for_a_while(&[(one, other), (other, one)], CUT).await;
            }
            Isolate => {
                let (one, which) = (self.any(), self.rng.random_range(0..3));
                let others: Vec<usize> = self.ids().into_iter().filter(|id| *id != one).collect();
                let says = others.iter().map(|other| (one, *other)).filter(|_| which != 0);
                let hears = others.iter().map(|other| (*other, one)).filter(|_| which != 1);
                let ways: Vec<Way> = says.chain(hears).collect();
                self.trouble_for_a_while(&ways, CUT).await;
            }
            BadNetwork => {
                let ids = self.ids();
                let ways = ids.iter().flat_map(|one| ids.iter().map(|other| (*one, *other)));
                let ways: Vec<Way> = ways.filter(|(one, other)| one != other).collect();
                let lost = self.rng.random_range(0.0..0.25);
                let trouble = Trouble { lost, doubled: 0.1, late_ms: self.rng.random_range(0..40) };
                self.trouble_for_a_while(&ways, trouble).await;
            }
            EmptyPartitions => self.empty_disk(false).await,
            ReplaceDisk => self.empty_disk(true).await,
            KillMember if self.members.is_empty() => {}
            KillMember => {
                let member = self.rng.random_range(0..self.members.len());
                self.tell(format!("member {member} dies"));
                self.members[member].notify_one();
            }
            PreferLeaders => self.command(&["elect", "--preferred"]),
            Reassign => {
                let (one, other) = self.two();
                let third = *self.ids().iter().find(|id| ![one, other].contains(id)).expect("there are three");
                let partition = self.rng.random_range(0..PARTITIONS).to_string();
                let replicas = format!("{one},{other},{third}");
                self.command(&["reassign", "--topic", TOPIC, "--partition", &partition, "--replicas", &replicas]);
            }
            // With three brokers there is nobody to take over what is kept three times.
            Drain if self.ids().len() > 3 => {
                let id = self.any().to_string();
                // Now and then it may be given something again.
                match self.rng.random_bool(0.5) {
                    true => self.command(&["drain", &id]),
                    false => self.command(&["drain", &id, "--cancel"]),
                }
            }
            Add if self.ids().len() < MOST_BROKERS && self.knows("rebalance") => {
                let id = self.cluster.add().await;
                self.tell(format!("broker {id} comes in"));
            }
            Rebalance => self.command(&["rebalance"]),
            Drain | Add => {}
        }
    }

    async fn kill_for_a_while(&mut self, how: &str, ids: &[usize]) {
        self.tell(format!("brokers {ids:?} are {how}"));
        self.cluster.kill(ids);
        self.a_while(3_000).await;
        ids.iter().for_each(|id| self.cluster.spawn(*id));
        self.tell(format!("brokers {ids:?} are started again"));
    }

    async fn trouble_for_a_while(&mut self, ways: &[Way], trouble: Trouble) {
        let what = match trouble == CUT {
            true => "cut".to_owned(),
            false => format!("bad ({:.2} lost, {} ms late)", trouble.lost, trouble.late_ms),
        };
        self.tell(format!("ways {ways:?} are {what}"));
        self.cluster.network.trouble(ways.iter().copied(), trouble);
        self.a_while(5_000).await;
        self.cluster.network.heal();
        self.tell("all ways are open".to_owned());
    }

    /// Not before everything is well after the last time: what was kept three times is kept once at least.
    async fn empty_disk(&mut self, is_new: bool) {
        let is_well = self.cluster.is_well().await.is_ok();
        self.is_emptied &= !is_well;
        if !is_well || self.is_emptied {
            return;
        }
        self.is_emptied = true;
        let id = self.any();
        self.tell(format!(
            "broker {id} is killed, and {} gone",
            if is_new { "its disk is" } else { "its partitions are" }
        ));
        self.cluster.kill(&[id]);
        match is_new {
            true => self.cluster.replace_disk(id).await,
            false => self.cluster.empty_partitions(id),
        }
        self.a_while(1_000).await;
        self.cluster.spawn(id);
        self.tell(format!("broker {id} is started again"));
    }

    fn knows(&self, command: &str) -> bool {
        self.known.iter().any(|known| known == command)
    }

    /// Runs `headwater cluster ...` beside what else happens, unless one runs already. What it answers is for the story: it may be
    /// refused, and often rightly.
    fn command(&mut self, args: &[&str]) {
        if !self.knows(args[0]) || self.command.as_ref().is_some_and(|command| !command.is_finished()) {
            return;
        }
        let line = format!("headwater cluster {}", args.join(" "));
        self.tell(line.clone());
        let profile: PathBuf = self.cluster.profile();
        let mut command = headwater();
        command.arg("cluster").args(args).arg("--profile").arg(profile).stdin(Stdio::null());
        self.command = Some(tokio::task::spawn_blocking(move || {
            let answer = command.output().expect("it runs");
            let said = [answer.stdout, answer.stderr].map(|said| String::from_utf8_lossy(&said).trim().to_owned());
            assert!(!said[1].contains("panicked"), "{line}: {said:?}");
            format!("{line}: {}: {said:?}", answer.status)
        }));
    }

    async fn finish_command(&mut self) {
        if let Some(command) = self.command.take() {
            let told = command.await.expect("no panic");
            self.tell(told);
        }
    }
}

/// The subcommands of `headwater cluster`.
fn known_commands() -> Vec<String> {
    let help = run(&["cluster", "--help"]).ok().text();
    let lines = help.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    lines.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
}

#[test]
fn clients_of_a_cluster_see_no_anomaly_whatever_happens_to_it() {
    let _turn = one_after_the_other();
    let (seed, seconds) = (environment("NEMESIS_SEED", 1), environment("NEMESIS_SECONDS", 60));
    eprintln!("seed {seed}, {seconds} s");
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(haunt(seed, Duration::from_secs(seconds)));
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
    cluster.create_topic(TOPIC, PARTITIONS, 3, &[("min.insync.replicas", "2")]).await;
    let (world, stop) = (World::new(cluster.client(), PARTITIONS), CancellationToken::new());
    let _witness = Witness(&world);
    let producer = produce(&world, "p".into(), rng.random(), 300, stop.clone());
    let mut story = format!("seed {seed}");
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
    stop.cancel();
    producer.await.expect("no panic");
    cluster.wait_until_well(Instant::now() + HEALED).await;
    world.read_all(soon()).await;
    cluster.check_processes();
    let counts = judge(&world, &story);
    assert_eq!(counts.sent, counts.acknowledged, "every record was kept in the end");
}

async fn haunt(seed: u64, lasts: Duration) {
    let mut rng = StdRng::seed_from_u64(seed);
    // Retention and compaction run too; segments are small enough to be rolled.
    let cluster = Cluster::start(3, rng.random(), On::Shipped, "\"log.retention.check.interval.ms\" = 5000").await;
    cluster.create_topic(TOPIC, PARTITIONS, 3, &[("min.insync.replicas", "2"), ("segment.bytes", "262144")]).await;
    let (world, stop, leave) =
        (World::new(cluster.client(), PARTITIONS), CancellationToken::new(), CancellationToken::new());
    let _witness = Witness(&world);
    let producers: Vec<_> = (1..=3).map(|n| produce(&world, format!("p{n}"), rng.random(), 70, stop.clone())).collect();
    let deaths: Vec<Arc<Notify>> = (0..environment("NEMESIS_MEMBERS", 0)).map(|_| Arc::default()).collect();
    let members: Vec<_> =
        (0..).zip(&deaths).map(|(n, die)| belong(&world, format!("m{n}"), leave.clone(), Arc::clone(die))).collect();
    let began = Instant::now();
    let mut nemesis = Nemesis {
        rng,
        cluster,
        began,
        story: vec![format!("seed {seed}")],
        is_emptied: false,
        members: deaths.clone(),
        command: None,
        known: known_commands(),
    };
    while began.elapsed() < lasts {
        nemesis.a_while(4_000).await;
        nemesis.strike().await;
        nemesis.cluster.check_processes();
        world.note_progress().await;
    }
    nemesis.tell("nothing more goes wrong".to_owned());
    nemesis.finish_command().await;
    let told = nemesis.cluster.wait_until_well(Instant::now() + HEALED).await;
    nemesis.tell(format!("all is well: controller {:?}, epoch {}", told.controller, told.controller_epoch));
    stop.cancel();
    for producer in producers {
        producer.await.expect("no panic");
    }
    nemesis.tell("what became of all records is known".to_owned());
    let ends = world.read_all(soon()).await;
    nemesis.tell("the log is read whole".to_owned());
    if !members.is_empty() {
        world.wait_for_group(&ends, soon()).await;
        nemesis.tell("the group has read everything".to_owned());
    }
    leave.cancel();
    for member in members {
        member.await.expect("no panic");
    }
    let progress = if deaths.is_empty() { ends.clone() } else { world.ask_progress(soon()).await };
    nemesis.cluster.check_processes();
    let counts = judge(&world, &nemesis.story.join("\n"));
    assert_eq!(progress, ends, "members that leave in good order have committed everything");
    let enough = usize::try_from(lasts.as_secs()).expect("a short time") * 20;
    assert!(counts.acknowledged > enough, "less went on than should: {counts:?}");
}
