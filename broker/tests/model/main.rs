//! Model checking: every history of a partition with two and with three replicas, within bounds. The machines are those that ship
//! (metadata, leader, follower, histories), not a copy; around them stand brokers that are as small as can be: a log is a list of
//! records of which a beginning is flushed. What the simulation draws by chance is here tried in every order.
//!
//! Tried in every order: appends, flushes of each log, hellos and cuts, pushes, reports that come late, out of order or never, proposals
//! that are answered, refused, left unknown and taken long after, metadata that each broker applies when it does, and the crash,
//! start, fencing and unfencing of any broker. The bounds are a record, and a crash, a fence or a time in which followers lag; a
//! run without instructions visits 1,800 and 16,000 distinct states of two replicas, of which one suffices (1,000 with a fence), 1,600 and
//! 15,500 of which both are needed, and 60,800 of three of which two are needed. Each check fails where it visits fewer, or where what
//! it is there for never comes about. `MODEL=deep` takes wider bounds, and minutes.
//!
//! Not here: producers, deletion, unclean elections and reassignments, which the simulation has.

mod world;

use headwater_broker::topic_config::TopicDurability;
use stateright::{Checker, Model};
use world::{Bounds, Partition};

const COMMITTED: &str = "a record is committed";
const ISR_OF_ONE: &str = "an ISR of one";
const CUT: &str = "a log is cut";
const ELIGIBLE: &str = "an eligible replica is elected";
const FAILOVER: &str = "somebody else commits a record";

/// Tries everything within the bounds. `least`: distinct states that there are at least, lest a bound shrinks unseen. `reached`: what
/// has to come about somewhere, lest nothing is tried at all.
fn check(name: &str, bounds: Bounds, least: usize, reached: &[&'static str]) {
    let model = Partition {
        bounds,
        #[cfg(feature = "planted-bugs")]
        bug: None,
    };
    let began = std::time::Instant::now();
    let checker = model.checker().threads(threads()).spawn_bfs().join();
    let (all, distinct) = (checker.state_count(), checker.unique_state_count());
    eprintln!(
        "{name}: {all} states, {distinct} of them distinct, {} levels, {:?}",
        checker.max_depth(),
        began.elapsed()
    );
    if let Some(path) = checker.discovery("nothing is broken") {
        let last = path.last_state().broken().to_owned();
        panic!("{last}, after {:?}", path.into_actions());
    }
    for what in reached {
        assert!(checker.discovery(what).is_some(), "{name}: never {what}");
    }
    assert!(distinct >= least, "{name}: only {distinct} states, where there were {least}");
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn is_deep() -> bool {
    std::env::var("MODEL").is_ok_and(|which| which == "deep")
}

/// Where one suffices, nobody is ever kept as eligible.
const MOST: [&str; 4] = [COMMITTED, ISR_OF_ONE, CUT, FAILOVER];
const ALL: [&str; 5] = [COMMITTED, ISR_OF_ONE, CUT, ELIGIBLE, FAILOVER];

const FLUSHED: TopicDurability = TopicDurability::Flushed;

/// Bounds of two replicas, and of three: what may happen how often.
const fn bounds(replicas: i32, least: u32, [records, crashes, fences, lags]: [u8; 4]) -> Bounds {
    Bounds { replicas, least, records, crashes, fences, lags, reports: 1, slow_flushes: false, durability: FLUSHED }
}

#[test]
fn two_replicas_of_which_one_suffices() {
    check("two replicas, one suffices: a crash", bounds(2, 1, [1, 1, 0, 0]), 1_700, &MOST);
    check("two replicas, one suffices: a crash, a lag", bounds(2, 1, [1, 1, 0, 1]), 15_600, &MOST);
    check("two replicas, one suffices: a fence", bounds(2, 1, [1, 0, 1, 0]), 940, &MOST);
    if is_deep() {
        check("two replicas, one suffices: two records", bounds(2, 1, [2, 1, 0, 1]), 16_000, &MOST);
        check("two replicas, one suffices: a crash, a fence", bounds(2, 1, [1, 1, 1, 0]), 16_000, &MOST);
    }
}

#[test]
fn two_replicas_of_which_both_are_needed() {
    check(
        "two replicas, both are needed: a crash",
        bounds(2, 2, [1, 1, 0, 0]),
        1_500,
        &[COMMITTED, ISR_OF_ONE, CUT, FAILOVER],
    );
    check("two replicas, both are needed: a crash, a lag", bounds(2, 2, [1, 1, 0, 1]), 14_900, &ALL);
    if is_deep() {
        check("two replicas, both are needed: two crashes", bounds(2, 2, [1, 2, 0, 0]), 15_000, &ALL);
    }
}

#[test]
fn three_replicas_of_which_two_are_needed() {
    check("three replicas, two are needed: a crash", bounds(3, 2, [1, 1, 0, 0]), 60_000, &[COMMITTED, CUT, FAILOVER]);
    if is_deep() {
        check("three replicas, two are needed: a lag", bounds(3, 2, [1, 0, 0, 1]), 1, &[COMMITTED]);
        check(
            "three replicas, two are needed: a crash, a fence",
            bounds(3, 2, [1, 1, 1, 0]),
            60_000,
            &[COMMITTED, CUT],
        );
    }
}

/// The checker would see mistakes, if there were any. `PLANTED=all` tries all of them, `PLANTED=name` one; without, those for which the
/// simulation takes long.
#[cfg(feature = "planted-bugs")]
#[test]
fn planted_mistakes_are_found() {
    use headwater_broker::planted::Bug;
    let lag = bounds(2, 1, [1, 1, 0, 1]);
    let slow = Bounds { slow_flushes: true, ..bounds(2, 1, [2, 1, 1, 0]) };
    let chosen = std::env::var("PLANTED").unwrap_or_default();
    // Those that the simulation takes many seeds for, or does not find.
    let sample =
        [Bug::PendingIsrForgotten, Bug::UnknownProposalForgotten, Bug::AlteredWithoutIncarnation, Bug::OlderViewTaken];
    let mut missed = Vec::new();
    for (bug, bounds) in [
        (Bug::PendingIsrForgotten, lag),
        (Bug::UnknownProposalForgotten, lag),
        (Bug::JoinsOnReceived, lag),
        (Bug::JoinsBelowWatermark, lag),
        (Bug::ReceivedCountsAsFlushed, lag),
        (Bug::LeaderCountsItsWrites, lag),
        (Bug::WrittenReportedAsFlushed, lag),
        (Bug::EligibleKept, lag),
        (Bug::EpochNotRaised, lag),
        (Bug::AlteredWithoutIncarnation, lag),
        (Bug::OlderViewTaken, lag),
        (Bug::FlushOutlivesCut, slow),
    ] {
        let is_chosen = match chosen.as_str() {
            "" => sample.contains(&bug),
            "all" => true,
            name => name == format!("{bug:?}"),
        };
        if !is_chosen {
            continue;
        }
        let began = std::time::Instant::now();
        let model = Partition { bounds, bug: Some(bug) };
        let checker = model.checker().threads(threads()).spawn_bfs().join();
        let (path, states) = (checker.discovery("nothing is broken"), checker.unique_state_count());
        let seen = path.as_ref().map_or("not found", |path| path.last_state().broken());
        eprintln!("{bug:?}: {seen}, {states} states, {:?}", began.elapsed());
        missed.extend(path.is_none().then_some(bug));
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
