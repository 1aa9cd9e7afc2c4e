//! Mistakes planted in the machines, one at a time: the simulation finds each of them, or it is too weak. `planted.md` is the
//! table of them, with how many seeds it took and what was seen.
//!
//! `PLANTED=name` plants one, `PLANTED=all` all of them, and `PLANTED_TABLE=write` writes the table anew; without, those that
//! the table says are found soon are tried, which takes seconds.

use crate::world::World;
use headwater_broker::planted::{Bug, plant};
use headwater_client::planted as client;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

const TABLE: &str = include_str!("planted.md");

/// Seeds within which every mistake is found.
const MOST_SEEDS: u64 = 12_000;

/// What no seed finds, and where it is found.
const ELSEWHERE: &[(Bug, &str)] = &[
    (Bug::OlderViewTaken, "by the model (`tests/model`), within a second"),
    (
        Bug::ReportOutlivesEpoch,
        "not found by 12,000 seeds, nor by the model: of the same log a report stays true in a later epoch; it takes a replica \
         that is taken off its broker and given to it again, and a report from before that",
    ),
    (
        Bug::LostRestored,
        "not found by 12,000 seeds, nor by the model: it takes the last replica, lost, and then fenced by its disk in the same \
         start; but for unclean elections the simulation loses no last one",
    ),
];

/// A mistake of the broker's machines, or of the client's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mistake {
    Broker(Bug),
    Client(client::Bug),
}

impl std::fmt::Debug for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Mistake::Broker(bug) => bug.fmt(f),
            Mistake::Client(bug) => bug.fmt(f),
        }
    }
}

/// All of them, and what each does.
fn all() -> Vec<(Mistake, &'static str)> {
    let brokers = Bug::ALL.iter().map(|(bug, what)| (Mistake::Broker(*bug), *what));
    brokers.chain(client::Bug::ALL.iter().map(|(bug, what)| (Mistake::Client(*bug), *what))).collect()
}

/// Plants one in this thread's machines, or none.
fn plant_either(mistake: Option<Mistake>) {
    let (mut broker, mut client) = (None, None);
    match mistake {
        Some(Mistake::Broker(bug)) => broker = Some(bug),
        Some(Mistake::Client(bug)) => client = Some(bug),
        None => {}
    }
    plant(broker);
    client::plant(client);
}

fn elsewhere(mistake: Mistake) -> Option<&'static str> {
    ELSEWHERE.iter().find(|(other, _)| Mistake::Broker(*other) == mistake).map(|(_, found)| *found)
}

/// What the table says is found within so many seeds is tried each time.
const SAMPLE_SEEDS: u64 = 12;

/// How many seeds the table says it took.
fn recorded(bug: Mistake) -> Option<u64> {
    let name = format!("| `{bug:?}` ");
    let line = TABLE.lines().find(|line| line.starts_with(&name))?;
    line.split('|').nth(3)?.trim().parse().ok()
}

/// How many seeds it takes until a mistake is found, and what is seen then. A seed that fails without it has found something else.
fn find(bug: Mistake) -> Option<(u64, String)> {
    (0..MOST_SEEDS).find_map(|seed| {
        plant_either(Some(bug));
        let lived = catch_unwind(AssertUnwindSafe(|| World::new(seed).run()));
        plant_either(None);
        let panic = lived.err()?;
        catch_unwind(|| World::new(seed).run()).ok()?;
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let seen = text.unwrap_or("a panic").lines().next().unwrap_or_default();
        let seen: String = seen.chars().map(|c| if c == '|' { '/' } else { c }).take(110).collect();
        Some((seed + 1, seen))
    })
}

#[test]
fn every_planted_mistake_is_found() {
    let chosen = std::env::var("PLANTED").unwrap_or_default();
    let is_chosen = |bug: &Mistake| match chosen.as_str() {
        "" => recorded(*bug).is_some_and(|seeds| seeds <= SAMPLE_SEEDS),
        "all" => true,
        name => name == format!("{bug:?}"),
    };
    assert!(all().len() >= 40, "at least forty mistakes");
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let bugs: Vec<(Mistake, &str)> = all().into_iter().filter(|(bug, _)| is_chosen(bug)).collect();
    let found: Vec<_> = std::thread::scope(|scope| {
        let half = |odd: usize| {
            let bugs = &bugs;
            scope.spawn(move || {
                let mine = bugs.iter().enumerate().filter(|(place, _)| place % 2 == odd);
                mine.map(|(place, (bug, _))| (place, find(*bug))).collect::<Vec<_>>()
            })
        };
        let mut found: Vec<_> = [half(0), half(1)].into_iter().flat_map(|half| half.join().expect("it ends")).collect();
        found.sort_by_key(|(place, _)| *place);
        found
    });
    std::panic::set_hook(hook);
    let mut table = String::from(HEAD);
    let mut missed = Vec::new();
    for ((bug, what), (_, found)) in bugs.iter().zip(found) {
        let Some((seeds, seen)) = found else {
            match elsewhere(*bug) {
                Some(found) => {
                    writeln!(table, "| `{bug:?}` | {} | - | {found} |", what.trim()).expect("a string takes all")
                }
                None => missed.push(*bug),
            }
            continue;
        };
        eprintln!("{bug:?}: {seeds} seeds: {seen}");
        writeln!(table, "| `{bug:?}` | {} | {seeds} | {seen} |", what.trim()).expect("a string takes all");
    }
    if chosen == "all" && std::env::var("PLANTED_TABLE").is_ok_and(|what| what == "write") {
        std::fs::write("tests/simulation/planted.md", table).expect("the table");
    }
    assert!(missed.is_empty(), "not found within {MOST_SEEDS} seeds: {missed:?}");
}

#[test]
fn the_table_has_every_mistake() {
    let is_missing = |bug: &Mistake| match elsewhere(*bug) {
        Some(found) => !TABLE.contains(&format!("| - | {found} |")) || !TABLE.contains(&format!("| `{bug:?}` ")),
        None => recorded(*bug).is_none(),
    };
    let missing: Vec<Mistake> = all().into_iter().map(|(bug, _)| bug).filter(is_missing).collect();
    assert!(all().len() - ELSEWHERE.len() >= 40, "at least forty are found");
    assert!(missing.is_empty(), "PLANTED=all PLANTED_TABLE=write writes the table anew; it lacks {missing:?}");
}

const HEAD: &str = "\
# Planted mistakes

Each is planted in the shipped machines (`broker/src/planted.rs`, `client/src/planted.rs`), and found by an invariant of the simulation or by its rule that every
seed ends healed. Written by `PLANTED=all PLANTED_TABLE=write cargo test -p headwater-broker --features planted-bugs --test simulation planted`.

| mistake | what the machine does | seeds | what is seen |
|---|---|---|---|
";
