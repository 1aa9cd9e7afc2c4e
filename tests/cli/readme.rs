//! The tour of the README, line by line as it stands there: what is shown to a newcomer is what works.

use crate::harness::{Running, eventually, headwater};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Flights in the file that the tour produces.
const FLIGHTS: usize = 6_099;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The command lines of the tour, without their remarks.
fn tour() -> Vec<String> {
    let text = std::fs::read_to_string(repository("README.md")).expect("the README");
    let (_, tour) = text.split_once("## A tour in five minutes").expect("the tour");
    let (tour, _) = tour.split_once("\n## ").expect("what follows the tour");
    let blocks = tour.split("```").skip(1).step_by(2);
    let lines = blocks.flat_map(|block| block.strip_prefix("console").expect("a block of commands").lines());
    let lines = lines.map(|line| line.split("  #").next().unwrap_or_default().trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

#[test]
fn every_line_of_the_tour_works() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir_all(folder.path().join("cli/data")).expect("a folder");
    let flights = "cli/data/flights-week.jsonl";
    std::fs::copy(repository(flights), folder.path().join(flights)).expect("copied");
    let program = headwater();
    let bin = Path::new(program.get_program()).parent().expect("a folder").to_owned();
    let path = std::env::join_paths(
        std::iter::once(bin).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    );
    let path = path.expect("a path");
    // As a shell runs it; signals go to the command itself.
    let shell = |line: &str| {
        let mut command = Command::new("sh");
        command.current_dir(folder.path()).args(["-c", line]).env("PATH", &path).env_remove("HEADWATER_PROFILE");
        command.env("HEADWATER_LISTEN", "127.0.0.1:0").env("HEADWATER_ADMIN_LISTEN", "127.0.0.1:0");
        command
    };
    let lines = tour();
    let mut ran = 0;
    let mut broker = None;
    for line in &lines {
        if line.starts_with("cargo install") {
            continue;
        }
        assert!(line.starts_with("headwater "), "what is this: {line}");
        ran += 1;
        if line == "headwater up" {
            let up = Running::start(shell("exec headwater up"));
            eventually("the broker", || (!up.lines().is_empty()).then_some(()));
            broker = Some(up);
            continue;
        }
        if line.contains("DAMAGED-0") {
            damage(folder.path());
        }
        let mut command =
            Running::start(shell(&if line.contains('|') { line.clone() } else { format!("exec {line}") }));
        let follows = line.starts_with("headwater consume") && !line.contains("--until") && !line.contains("--count");
        if follows {
            eventually("every flight", || (command.lines().len() == FLIGHTS).then_some(()));
            assert!(command.terminate().success(), "{line}");
        } else {
            assert!(command.wait().success(), "{line}");
        }
        let printed = || command.lines().len();
        let expected = match line {
            line if line.contains("head -3") || line.contains("--count 3") => Some(3),
            _ => None,
        };
        if let Some(expected) = expected {
            eventually(line, || (printed() == expected).then_some(()));
        }
    }
    assert!(ran > 15 && broker.is_some(), "{lines:?}");
    let mut copied = shell("headwater consume flights-copy --no-follow");
    let copied = copied.output().expect("it runs").stdout;
    assert_eq!(copied.iter().filter(|&&byte| byte == b'\n').count(), FLIGHTS, "the copy is whole");
    assert!(folder.path().join("repaired-0").exists());
    assert!(broker.expect("a broker").terminate().success());
}

/// A copy of a partition with a bit of it flipped.
fn damage(folder: &Path) {
    let (from, to) = (folder.join("headwater-data/flights-0"), folder.join("DAMAGED-0"));
    std::fs::create_dir(&to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a partition").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
    let log = to.join("00000000000000000000.log");
    let mut bytes = std::fs::read(&log).expect("a log");
    bytes[100] ^= 1;
    std::fs::write(log, bytes).expect("written");
}
