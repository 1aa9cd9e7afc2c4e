//! A seed decides what goes wrong with the brokers of a cluster, and when, while producers produce and a group reads. In the end all
//! is mended, heals within a deadline, and the checker judges what the clients saw.
//!
//! `NEMESIS_SECONDS=1800 cargo test --test nemesis nemesis:: -- --nocapture` is half an hour of it; `NEMESIS_SEED` is the seed,
//! `NEMESIS_MEMBERS` how many read in the group, `NEMESIS_HISTORY` a file for what the clients saw. The seed decides which faults
//! come in which order; what they meet is up to the machine.

use super::clients::{TOPIC, Witness, World, belong, produce};
use super::cluster::{Cluster, On};
use super::harness::{run, signal};
use super::lost_writes::{check_group, environment, judge, soon};
use super::quorum::{leave_and_return, number, resume};
use super::relay::{CUT, Trouble, Way};
use super::serving::{Process, one_after_the_other};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

const PARTITIONS: u32 = 6;
/// Brokers there are at most: more are added.
const MOST_BROKERS: usize = 4;
/// Time for every partition to take records again once nothing more goes wrong, besides what the start of the brokers took so many times: the
/// machine may have other work, and some of them are started then.
const TAKES: Duration = Duration::from_secs(10);
const STARTS: u32 = 4;
/// And for the group to commit: a member may have to be missed first.
const RESUMED: Duration = Duration::from_secs(60);
/// A run that lasts so long has to have seen everything.
const LONG: Duration = Duration::from_secs(1_200);
/// Time for everything to be mended and well again.
const HEALED: Duration = Duration::from_secs(120);

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// One is killed, and started again a while later.
    Kill,
    /// Most voters are killed: the quorum is lost until they are started again.
    KillMost,
    /// Most voters stand still for a while.
    PauseMost,
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
    /// One comes to vote, or votes no more.
    ChangeVoters,
    /// A broker leaves for good, and comes in again as a new one.
    LeaveAndReturn,
}

use Fault::*;

const FAULTS: [(Fault, u32); 21] = [
    (Kill, 3),
    (KillMost, 1),
    (PauseMost, 1),
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
    (ChangeVoters, 3),
    (LeaveAndReturn, 1),
];

/// The end of a fault.
#[derive(Debug)]
enum Mend {
    /// They are started again.
    Start(Vec<usize>),
    /// They go on who stand still.
    GoOn(Vec<usize>),
    /// No way is in trouble.
    Open,
}

struct Nemesis {
    rng: StdRng,
    cluster: Cluster,
    began: Instant,
    story: Vec<String>,
    /// What is mended while other things go wrong, and when.
    later: Vec<(Instant, Mend)>,
    /// How often what came about, and how often which command was carried out.
    faults: BTreeMap<Fault, usize>,
    carried_out: BTreeMap<String, usize>,
    /// Whose disk was emptied last, and as which start of it: until another one has come in, nothing is well.
    emptied: Option<(usize, String)>,
    /// Votes of disks that are gone: they may count still.
    gone_votes: usize,
    members: Vec<Arc<Notify>>,
    /// How often one of them was told to die.
    died: usize,
    /// A command of a person that is under way.
    command: Option<JoinHandle<(String, bool)>>,
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

    /// One that runs, if one does.
    fn any(&mut self) -> usize {
        let running = self.cluster.brokers.iter().filter(|node| node.process.is_some());
        let running: Vec<usize> = running.map(|node| node.id).collect();
        let all = self.ids();
        *running.choose(&mut self.rng).or_else(|| all.choose(&mut self.rng)).expect("there are some")
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

    /// As many as keep the others from deciding anything; two where nobody says who votes.
    async fn most_voters(&mut self) -> Vec<usize> {
        let told = self.cluster.describe().await;
        let voters = told.map(|told| told.voters.iter().filter_map(|id| usize::try_from(*id).ok()).collect::<Vec<_>>());
        let voters = voters.ok().filter(|voters| !voters.is_empty()).unwrap_or_else(|| vec![1, 2, 3]);
        voters.choose_multiple(&mut self.rng, voters.len() / 2 + 1).copied().collect()
    }

    /// Something goes wrong, if what was drawn can.
    async fn strike(&mut self) {
        let total = FAULTS.iter().map(|(_, weight)| weight).sum();
        let mut drawn = self.rng.random_range(0..total);
        let fault = FAULTS.iter().find(|(_, weight)| {
            let is_it = drawn < *weight;
            drawn = drawn.wrapping_sub(*weight);
            is_it
        });
        let fault = fault.expect("the weights add up").0;
        if self.come_about(fault).await {
            *self.faults.entry(fault).or_default() += 1;
        }
    }

    async fn come_about(&mut self, fault: Fault) -> bool {
        match fault {
            Kill => {
                let id = self.any();
                self.kill_for_a_while("killed", &[id]).await;
            }
            KillLeader => {
                let id = self.leader().await;
                self.kill_for_a_while("killed while they lead", &[id]).await;
            }
            KillMost => {
                let most = self.most_voters().await;
                self.kill_for_a_while("killed, who are most voters", &most).await;
            }
            PauseMost => {
                let most = self.most_voters().await;
                self.pause_for_a_while(&most).await;
            }
            KillAll => {
                let all = self.ids();
                self.kill_for_a_while("killed, who are all", &all).await;
            }
            Pause => {
                let id = self.any();
                self.pause_for_a_while(&[id]).await;
            }
            Restart => {
                self.mend_due(true);
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
            EmptyPartitions => return self.empty_disk(false).await,
            ReplaceDisk => return self.empty_disk(true).await,
            KillMember if self.members.is_empty() => return false,
            KillMember => {
                let member = self.rng.random_range(0..self.members.len());
                self.tell(format!("member {member} dies"));
                self.members[member].notify_one();
                self.died += 1;
            }
            PreferLeaders => return self.command(&["elect", "--preferred"]),
            Reassign => {
                let (one, other) = self.two();
                let third = *self.ids().iter().find(|id| ![one, other].contains(id)).expect("there are three");
                let partition = self.rng.random_range(0..PARTITIONS).to_string();
                let replicas = format!("{one},{other},{third}");
                return self.command(&[
                    "reassign",
                    "--topic",
                    TOPIC,
                    "--partition",
                    &partition,
                    "--replicas",
                    &replicas,
                ]);
            }
            // With three brokers there is nobody to take over what is kept three times.
            Drain if self.ids().len() > 3 => {
                let id = self.any().to_string();
                // Now and then it may be given something again.
                return match self.rng.random_bool(0.5) {
                    true => self.command(&["drain", &id]),
                    false => self.command(&["drain", &id, "--cancel"]),
                };
            }
            Add if self.ids().len() < MOST_BROKERS && self.knows("rebalance") => {
                let id = self.cluster.add().await;
                self.tell(format!("broker {id} comes in"));
            }
            Rebalance => return self.command(&["rebalance"]),
            ChangeVoters => {
                let Ok(told) = self.cluster.describe().await else { return false };
                let id = self.any();
                let change = if told.voters.contains(&number(id)) { "remove" } else { "add" };
                return self.command(&["voters", change, &id.to_string()]);
            }
            LeaveAndReturn => return self.leave_and_return().await,
            Drain | Add => return false,
        }
        true
    }

    /// What has gone wrong is mended a while later: before anything else does, or, a third of the time, beside it.
    async fn mend_later(&mut self, most_ms: u64, mend: Mend) {
        let due = Instant::now() + Duration::from_millis(self.rng.random_range(100..most_ms));
        if self.rng.random_ratio(1, 3) {
            self.later.push((due, mend));
        } else {
            sleep_until(due).await;
            self.mend(mend);
        }
    }

    fn mend(&mut self, mend: Mend) {
        match mend {
            Mend::Start(ids) => {
                for id in &ids {
                    if self.cluster.node(*id).process.is_none() {
                        self.cluster.spawn(*id);
                    }
                }
                self.tell(format!("brokers {ids:?} are started again"));
            }
            Mend::GoOn(ids) => {
                self.signal(&ids, "CONT");
                self.tell(format!("brokers {ids:?} go on"));
            }
            Mend::Open => {
                self.cluster.network.heal();
                self.tell("all ways are open".to_owned());
            }
        }
    }

    /// Mends what is due, or everything.
    fn mend_due(&mut self, everything: bool) {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.later).into_iter().partition(|(at, _)| everything || *at <= now);
        self.later = later;
        due.into_iter().for_each(|(_, mend)| self.mend(mend));
    }

    fn signal(&mut self, ids: &[usize], name: &str) {
        let pids: Vec<u32> =
            ids.iter().filter_map(|id| self.cluster.node(*id).process.as_ref().map(Process::pid)).collect();
        pids.iter().for_each(|pid| signal(*pid, name));
    }

    async fn kill_for_a_while(&mut self, how: &str, ids: &[usize]) {
        self.tell(format!("brokers {ids:?} are {how}"));
        self.cluster.kill(ids);
        self.mend_later(3_000, Mend::Start(ids.to_vec())).await;
    }

    async fn pause_for_a_while(&mut self, ids: &[usize]) {
        self.tell(format!("brokers {ids:?} stand still"));
        self.signal(ids, "STOP");
        self.mend_later(4_000, Mend::GoOn(ids.to_vec())).await;
    }

    async fn trouble_for_a_while(&mut self, ways: &[Way], trouble: Trouble) {
        let what = match trouble == CUT {
            true => "cut".to_owned(),
            false => format!("bad ({:.2} lost, {} ms late)", trouble.lost, trouble.late_ms),
        };
        self.tell(format!("ways {ways:?} are {what}"));
        self.cluster.network.trouble(ways.iter().copied(), trouble);
        self.mend_later(5_000, Mend::Open).await;
    }

    /// Not before everything is well after the last time: what was kept three times is kept once at least.
    async fn empty_disk(&mut self, is_new: bool) -> bool {
        self.mend_due(true);
        let Ok(told) = self.cluster.is_well().await else { return false };
        let start = |id: usize| {
            let broker = told.brokers.iter().find(|broker| broker.id == number(id));
            broker.map(|broker| broker.incarnation.clone()).unwrap_or_default()
        };
        if self.emptied.as_ref().is_some_and(|(id, before)| start(*id) == *before) {
            return false;
        }
        let id = self.any();
        if is_new && told.voters.contains(&number(id)) {
            // Its vote is gone with its disk: the others have to be a majority without it, whatever is asked for meanwhile.
            self.finish_command().await;
            let left = told.voters.len() - 1;
            if left <= (told.voters.len() + self.gone_votes) / 2 {
                return false;
            }
            self.gone_votes += 1;
        }
        self.emptied = Some((id, start(id)));
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
        true
    }

    /// Where the others can take over what it keeps, and decide without it.
    async fn leave_and_return(&mut self) -> bool {
        self.mend_due(true);
        self.finish_command().await;
        let Ok(told) = self.cluster.is_well().await else { return false };
        let id = self.any();
        let left = told.voters.iter().filter(|voter| **voter != number(id)).count();
        if self.ids().len() < MOST_BROKERS || left <= (left + self.gone_votes) / 2 {
            return false;
        }
        let killed = Some(self.any()).filter(|other| *other != id);
        self.tell(format!("broker {id} leaves; killed meanwhile: {killed:?}"));
        leave_and_return(&mut self.cluster, id, killed).await;
        self.tell(format!("broker {id} is in again, as a new one"));
        true
    }

    fn knows(&self, command: &str) -> bool {
        self.known.iter().any(|known| known == command)
    }

    /// Runs `headwater cluster ...` beside what else happens, unless one runs already. What it answers is for the story: it may be
    /// refused, and often rightly.
    fn command(&mut self, args: &[&str]) -> bool {
        if !self.knows(args[0]) || self.command.is_some() {
            return false;
        }
        let line = format!("headwater cluster {}", args.join(" "));
        self.tell(line.clone());
        let answer = self.cluster.command(&[&["cluster"], args].concat());
        self.command = Some(tokio::spawn(async move {
            let answer = answer.await.expect("no panic");
            let said = [answer.text(), answer.stderr].map(|said| said.trim().to_owned());
            (format!("{line}: {}: {said:?}", answer.status), answer.status.success())
        }));
        true
    }

    async fn finish_command(&mut self) {
        if let Some(command) = self.command.take() {
            let (told, is_done) = command.await.expect("no panic");
            let name = told.split_whitespace().nth(2).unwrap_or_default().trim_end_matches(':').to_owned();
            *self.carried_out.entry(name).or_default() += usize::from(is_done);
            self.tell(told);
        }
    }

    /// A run that is long enough for it has seen everything, and each command carried out.
    fn check_variety(&self) {
        let missing: Vec<&Fault> =
            FAULTS.iter().map(|(fault, _)| fault).filter(|fault| !self.faults.contains_key(fault)).collect();
        assert!(missing.is_empty(), "these never came about: {missing:?}");
        for name in ["elect", "reassign", "drain", "rebalance", "voters"] {
            assert!(self.carried_out.get(name).is_some_and(|times| *times > 0), "{name}: {:?}", self.carried_out);
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
    let (seed, seconds) = (environment("NEMESIS_SEED", 1), environment("NEMESIS_SECONDS", 45));
    eprintln!("seed {seed}, {seconds} s");
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(haunt(seed, Duration::from_secs(seconds)));
}

async fn haunt(seed: u64, lasts: Duration) {
    let mut rng = StdRng::seed_from_u64(seed);
    // Retention and compaction run too; segments are small enough to be rolled.
    let starting = Instant::now();
    let cluster = Cluster::start(3, rng.random(), On::Shipped, "\"log.retention.check.interval.ms\" = 5000").await;
    cluster.create_topic(TOPIC, PARTITIONS, 3, &[("min.insync.replicas", "2"), ("segment.bytes", "262144")]).await;
    let took = starting.elapsed();
    let (world, stop, leave) =
        (World::new(cluster.client(), PARTITIONS), CancellationToken::new(), CancellationToken::new());
    let _witness = Witness(&world);
    let producers: Vec<_> = (1..=3).map(|n| produce(&world, format!("p{n}"), rng.random(), 70, stop.clone())).collect();
    let deaths: Vec<Arc<Notify>> = (0..environment("NEMESIS_MEMBERS", 3)).map(|_| Arc::default()).collect();
    let members: Vec<_> =
        (0..).zip(&deaths).map(|(n, die)| belong(&world, format!("m{n}"), leave.clone(), Arc::clone(die))).collect();
    let began = Instant::now();
    let mut nemesis = Nemesis {
        rng,
        cluster,
        began,
        story: vec![format!("seed {seed}")],
        later: Vec::new(),
        faults: BTreeMap::new(),
        carried_out: BTreeMap::new(),
        emptied: None,
        gone_votes: 0,
        members: deaths.clone(),
        died: 0,
        command: None,
        known: known_commands(),
    };
    while began.elapsed() < lasts {
        nemesis.a_while(4_000).await;
        nemesis.mend_due(false);
        if nemesis.command.as_ref().is_some_and(JoinHandle::is_finished) {
            nemesis.finish_command().await;
        }
        nemesis.strike().await;
        nemesis.cluster.check_processes();
        world.note_progress().await;
    }
    nemesis.mend_due(true);
    nemesis.tell(format!("nothing more goes wrong; the brokers started in {took:?} at first"));
    resume(&world, PARTITIONS, false, Instant::now() + TAKES + took * STARTS).await;
    nemesis.tell("every partition takes records".to_owned());
    resume(&world, PARTITIONS, !members.is_empty(), Instant::now() + RESUMED).await;
    nemesis.tell("and the group commits".to_owned());
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
    let batches = nemesis.cluster.check_replicas(TOPIC).await;
    nemesis.tell(format!("the replicas are the same: {batches} batches"));
    nemesis.tell(format!("what came about: {:?}; commands carried out: {:?}", nemesis.faults, nemesis.carried_out));
    let counts = judge(&world, &nemesis.story.join("\n"));
    assert_eq!(progress, ends, "members that leave in good order have committed everything");
    let enough = usize::try_from(lasts.as_secs()).expect("a short time") * 20;
    assert!(counts.acknowledged > enough, "less went on than should: {counts:?}");
    check_group(&counts, deaths.len(), nemesis.died > 0);
    if lasts >= LONG {
        nemesis.check_variety();
    }
}
