//! `headwater demo`, the first command of the README.

use crate::Held;
use crate::harness::{DEADLINE, eventually, headwater, run};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
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
    let mut lines = BufReader::new(demo.0.stdout.take().expect("piped")).lines();
    let mut step = || {
        let line = lines.next()?.expect("a line");
        let step: Value = serde_json::from_str(&line).expect("JSON");
        let (name, ok) = (step["step"].as_str().expect("text").to_owned(), step["ok"].as_bool().expect("a truth"));
        Some((name, ok, step["detail"].as_str().expect("text").to_owned()))
    };
    let broker = step().expect("the broker");
    assert!(broker.0 == "broker" && broker.1, "{broker:?}");
    let produce = step().expect("the flights");
    assert!(produce.0 == "produce" && produce.1, "{produce:?}");
    let profile = eventually("its profile", || {
        let inside = std::fs::read_dir(folder.path()).expect("a folder").flatten();
        inside.map(|entry| entry.path().join("client.toml")).find(|file| file.exists())
    });
    std::fs::write(folder.path().join("one"), "a flight that nobody knows\n").expect("written");
    let one = folder.path().join("one");
    let arguments = ["produce", "flights", "--file", one.to_str().expect("text"), "--profile"];
    run(&[&arguments[..], &[profile.to_str().expect("text")]].concat()).ok();
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
