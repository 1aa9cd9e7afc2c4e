//! A partition and a group under one seed: the pure machines of the metadata, of sessions, of the leader and its followers, of the
//! group and of the client's producer, on real logs on simulated disks, with a network, a quorum, a reader and members that are
//! simulated too. A virtual clock drives all of it, so that a seed is one history and a failing one is seen again.
//!
//! What happens: messages come late, twice or never, links are cut one-way and two-way, brokers stand still, are killed, lose their power
//! within a write, their disk or one folder of it, or come back with an older disk; clocks run apart; applies are late, controllers are
//! deposed, proposals are left unknown and committed twice or long after; brokers are added, removed and drained, replicas
//! reassigned, settings changed, unclean elections asked for, records deleted, expired and compacted; members fall silent, leave,
//! and start anew. `checks.rs` has what must hold after every step; in the end all is mended, and everything must come right.
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
use std::panic::{catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use world::{Outcome, World};

/// How many seeds a run without instructions tries.
const SEEDS: u64 = 300;
/// Seeds that fail before a thread gives up.
const MOST_FAILED: usize = 10;

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
    World::new(seed).run()
}

/// Lives through all of them, on as many threads as there are cores. A seed that fails keeps none of the others from being tried.
fn live_through(seeds: Range<u64>) -> Vec<Outcome> {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let (mut lived, mut failed) = (Vec::new(), Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || failed.len() >= MOST_FAILED {
                return (lived, failed);
            }
            match catch_unwind(|| live(seed)) {
                Ok(outcome) => lived.push((seed, outcome)),
                Err(_) => {
                    let again = "SIMULATION_TRACE=1 cargo test -p headwater-broker --test simulation";
                    eprintln!("seed {seed} fails; again: SIMULATION_SEED={seed} {again}");
                    failed.push(seed);
                }
            }
        }
    };
    let (mut outcomes, mut failed) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let (lived, not) = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            outcomes.extend(lived);
            failed.extend(not);
        }
    });
    assert!(failed.is_empty(), "seeds that fail: {failed:?}");
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
    share("a coordinator that moved", 10, |outcome| outcome.reached.coordinator_moved);
    share("an offset committed", 30, |outcome| outcome.reached.committed_offset);
    share("records deleted", 30, |outcome| outcome.reached.records_deleted);
    share("a follower that begins anew where the leader's log begins", 2, |outcome| outcome.reached.begun_anew);
    share("records read from a follower", 90, |outcome| outcome.reached.read_from_follower);
    share("a log compacted", 5, |outcome| outcome.reached.compacted);
    share("old segments deleted", 3, |outcome| outcome.reached.retained);
    share("a lost replica named", 5, |outcome| outcome.reached.loss_claimed);
    share("a replica fenced", 5, |outcome| outcome.reached.replica_fenced);
    share("a broker added", 3, |outcome| outcome.reached.broker_added);
    share("a broker removed", 3, |outcome| outcome.reached.broker_removed);
    share("a message lost", 50, |outcome| outcome.reached.message_lost);
    share("a message that comes twice, and late", 50, |outcome| outcome.reached.message_twice);
    share("a link cut one-way", 50, |outcome| outcome.reached.cut_one_way);
    share("a link cut both ways", 50, |outcome| outcome.reached.cut_both_ways);
    share("a broker that stands still", 30, |outcome| outcome.reached.paused);
    share("the power gone everywhere at once", 20, |outcome| outcome.reached.all_off);
    share("clocks that run apart", 20, |outcome| outcome.reached.clocks_apart);
    share("an older disk", 5, |outcome| outcome.reached.older_disk);
    share("a folder of an earlier topic", 3, |outcome| outcome.reached.folder_left);
    share("a lost replica made anew", 5, |outcome| outcome.reached.healed);
    share("a replica damaged while its broker runs", 3, |outcome| outcome.reached.damaged);
    share("a disk that hung and came back", 10, |outcome| outcome.reached.disk_hung);
    share("a broker cut off from all but the administrator", 20, |outcome| outcome.reached.isolated);
    share("a coordinator looked at that is none any more", 5, |outcome| outcome.reached.former_looked_at);
    share("a coordinator that nobody confirms", 5, |outcome| outcome.reached.unconfirmed);
    share("a window full of batches", 90, |outcome| outcome.reached.window_full);
    share("a batch that is too large by now", 10, |outcome| outcome.reached.too_large);
    share("another epoch of the producer", 5, |outcome| outcome.reached.producer_epoch);
    share("records that fail, and are perhaps kept", 20, |outcome| outcome.reached.timed_out_sent);
    share("records that fail before they are sent", 20, |outcome| outcome.reached.timed_out_unsent);
    share("a new leader that says only later where the log ends", 5, |outcome| outcome.reached.latest_awaited);
}

#[test]
fn one_seed_is_one_history() {
    for seed in [3, 11] {
        assert_eq!(live(seed), live(seed), "seed {seed}");
    }
    assert_ne!(live(3).trace, live(11).trace);
}
