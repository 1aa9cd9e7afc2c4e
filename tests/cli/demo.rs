//! `headwater demo`, the first command of the README.

use crate::Held;
use crate::harness::{DEADLINE, eventually, headwater, run};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

#[test]
fn every_check_of_the_demo_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = headwater().current_dir(folder.path()).arg("demo").output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("6,099 flights"), "{text}");
    assert!(!text.contains('✗'), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "it leaves nothing behind");
}

/// Somebody else appends to the demo's own topic: a flight is there that was never acknowledged to it.
#[test]
fn a_check_that_does_not_hold_fails_the_demo() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.args(["demo", "--json"]).env("TMPDIR", folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut demo = Held::start(command);
    let mut step = steps(&mut demo);
    let broker = step().expect("the broker");
    assert!(broker.0 == "broker" && broker.1, "{broker:?}");
    let produce = step().expect("the flights");
    assert!(produce.0 == "produce" && produce.1, "{produce:?}");
    append_to_the_demo_in(folder.path());
    let rest: Vec<_> = std::iter::from_fn(step).collect();
    let (last, held) = rest.split_last().expect("a step");
    assert!(held.iter().all(|(_, ok, _)| *ok) && !last.1, "it ends with the check that failed: {rest:?}");
    assert_eq!(demo.wait_within(DEADLINE * 3).code(), Some(1));
    let mut said = String::new();
    demo.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(said.contains(&last.0) && said.contains("failed"), "{said}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["one"], "a demo that fails leaves nothing behind either");
}

/// What the demo says it did, whether it holds, and what it saw; one after the other as it happens.
fn steps(demo: &mut Held) -> impl FnMut() -> Option<(String, bool, String)> + use<> {
    let mut lines = BufReader::new(demo.0.stdout.take().expect("piped")).lines();
    move || {
        let line = lines.next()?.expect("a line");
        let step: Value = serde_json::from_str(&line).expect("JSON");
        let (name, ok) = (step["step"].as_str().expect("text").to_owned(), step["ok"].as_bool().expect("a truth"));
        Some((name, ok, step["detail"].as_str().expect("text").to_owned()))
    }
}

/// A flight of somebody else's, in the topic of the demo whose folder is made in this one.
fn append_to_the_demo_in(folder: &Path) {
    let profile = eventually("its profile", || {
        let inside = std::fs::read_dir(folder).expect("a folder").flatten();
        inside.map(|entry| entry.path().join("client.toml")).find(|file| file.exists())
    });
    let one = folder.join("one");
    std::fs::write(&one, "a flight that nobody knows\n").expect("written");
    let arguments = ["produce", "flights", "--file", one.to_str().expect("text"), "--profile"];
    run(&[&arguments[..], &[profile.to_str().expect("text")]].concat()).ok();
}

#[test]
fn every_check_of_the_demo_of_a_cluster_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.args(["demo", "--cluster", "--json"]).env("TMPDIR", folder.path());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut demo = Held::start(command);
    let told: Vec<_> = std::iter::from_fn(steps(&mut demo)).collect();
    let ended = demo.wait_within(DEADLINE * 3);
    let mut said = String::new();
    demo.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(ended.success(), "{told:?}\n{said}");
    assert!(told.iter().all(|(_, ok, _)| *ok), "{told:?}");
    let names: Vec<&str> = told.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["brokers", "produce", "failover", "heal", "read", "replicas", "segments"]);
    let detail = |name: &str| told.iter().find(|(known, ..)| known == name).expect("told").2.as_str();
    // A third before the kill, the rest through it.
    assert!(
        detail("produce").starts_with("2,033 flights in ") && !detail("produce").contains("(0 so far)"),
        "{told:?}"
    );
    assert!(detail("failover").contains("was killed in the middle; 4,066 more flights acknowledged"), "{told:?}");
    assert!(detail("heal").contains("was cut in half before it came back"), "{told:?}");
    assert!(detail("read").starts_with("6,099 flights acknowledged, 6,099 read: none missing, none twice"), "{told:?}");
    assert!(detail("replicas").ends_with("the same offsets, checksums and leader epochs on all 3 disks"), "{told:?}");
    assert!(detail("segments").contains("6,099 records"), "{told:?}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "it leaves nothing behind");
}

/// Somebody else appends to its topic while it runs: what is read is not what was acknowledged to it.
#[test]
fn a_check_that_does_not_hold_fails_the_demo_of_a_cluster() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.args(["demo", "--cluster", "--json"]).env("TMPDIR", folder.path());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut demo = Held::start(command);
    let mut step = steps(&mut demo);
    for name in ["brokers", "produce"] {
        let told = step().expect("a step");
        assert!(told.0 == name && told.1, "{told:?}");
    }
    append_to_the_demo_in(folder.path());
    let rest: Vec<_> = std::iter::from_fn(step).collect();
    let (last, held) = rest.split_last().expect("a step");
    assert!(held.iter().all(|(_, ok, _)| *ok), "{rest:?}");
    assert!(last.0 == "read" && !last.1 && last.2.contains("holds another flight"), "{rest:?}");
    assert_eq!(demo.wait_within(DEADLINE * 3).code(), Some(1));
    let mut said = String::new();
    demo.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(said.contains("read") && said.contains("failed"), "{said}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["one"], "nor does it leave anything behind");
}
