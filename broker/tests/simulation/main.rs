//! The replication of a partition under one seed: the pure machines of the metadata, the leader and its followers, on real logs
//! on simulated disks, with a network, a quorum and a producer that are simulated too. A virtual clock drives all of it, so
//! that a seed is one history and a failing one is seen again.
//!
//! `SIMULATION_SEED=n` or `SIMULATION_SEEDS=a..b` choose the seeds; `SIMULATION_TRACE=1` tells what happens. A failing seed
//! prints itself. Many seeds at once want the machines optimised, some milliseconds each:
//! `CARGO_PROFILE_DEV_OPT_LEVEL=2 SIMULATION_SEEDS=0..100000 cargo test -p headwater-broker --test simulation`.
//!
//! With the feature `planted-bugs`, `planted.rs` plants mistakes in the machines and looks whether they are found.

mod checks;
mod node;
#[cfg(feature = "planted-bugs")]
mod planted;
mod producer;
mod random;
mod world;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use world::{Outcome, World};

/// How many seeds a run without instructions tries.
const SEEDS: u64 = 60;

fn seeds() -> Range<u64> {
    let number = |text: &str| text.trim().parse::<u64>().expect("SIMULATION_SEED and SIMULATION_SEEDS hold numbers");
    if let Ok(seed) = std::env::var("SIMULATION_SEED") {
        return number(&seed)..number(&seed) + 1;
    }
    match std::env::var("SIMULATION_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("SIMULATION_SEEDS is a..b");
            number(from)..number(to)
        }
        Err(_) => 0..SEEDS,
    }
}

fn live(seed: u64) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| World::new(seed).run())).unwrap_or_else(|panic| {
        eprintln!("again: SIMULATION_SEED={seed} SIMULATION_TRACE=1 cargo test -p headwater-broker --test simulation");
        resume_unwind(panic)
    })
}

/// Lives through all of them, on as many threads as there are cores.
fn live_through(seeds: Range<u64>) -> Vec<Outcome> {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut lived = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return lived;
            }
            lived.push((seed, live(seed)));
        }
    };
    let mut outcomes: Vec<(u64, Outcome)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    outcomes.sort_by_key(|(seed, _)| *seed);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

#[test]
fn no_acknowledged_record_is_lost_whatever_happens() {
    let seeds = seeds();
    let total = seeds.end - seeds.start;
    let outcomes = live_through(seeds);
    let committed: usize = outcomes.iter().map(|outcome| outcome.committed).sum();
    let elections: i32 = outcomes.iter().map(|outcome| outcome.elections).sum();
    eprintln!("{total} seeds, {committed} records, {elections} leader epochs");
    let share = |what: &str, percent: u64, reached: fn(&Outcome) -> bool| {
        let count = outcomes.iter().filter(|outcome| reached(outcome)).count() as u64;
        eprintln!("{what}: {count} of {total}");
        assert!(total < SEEDS || count * 100 >= total * percent, "{what}: only {count} of {total} seeds");
    };
    share("an ISR of one", 30, |outcome| outcome.reached.isr_of_one);
    share("an election from the eligible replicas", 3, |outcome| outcome.reached.eligible_elected);
    share("a truncation", 10, |outcome| outcome.reached.truncation);
    share("a controller lost with a proposal in flight", 5, |outcome| outcome.reached.controller_lost);
    share("a duplicate after a failover", 5, |outcome| outcome.reached.duplicate_after_failover);
    share("a torn write", 30, |outcome| outcome.reached.torn_write);
    share("a proposal left unknown", 5, |outcome| outcome.reached.proposal_unknown);
    share("an unclean election", 2, |outcome| outcome.reached.unclean_elected);
    share("a reassignment that ended", 20, |outcome| outcome.reached.reassigned);
    share("a broker drained", 10, |outcome| outcome.reached.drained);
    share("an emptied disk", 10, |outcome| outcome.reached.disk_emptied);
    share("min.insync.replicas changed", 20, |outcome| outcome.reached.setting_changed);
    share("a leader that leads on in a later epoch", 2, |outcome| outcome.reached.led_on);
}

#[test]
fn one_seed_is_one_history() {
    for seed in [3, 11] {
        assert_eq!(live(seed), live(seed), "seed {seed}");
    }
    assert_ne!(live(3).trace, live(11).trace);
}
