//! Clients of three brokers, of which one may end at any moment.

use crate::harness::{self, Answer, Running, eventually, headwater, run};
use serde_json::Value;
use std::collections::BTreeSet;

/// Three brokers, started by one command.
struct Up {
    /// They end with it.
    _running: Running,
    profile: String,
    pids: Vec<u32>,
    folder: tempfile::TempDir,
}

impl Up {
    fn start() -> Up {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = headwater();
        command.current_dir(folder.path()).args(["up", "--brokers", "3", "--data", "data", "--json"]);
        let running = Running::start(command);
        let ready = eventually("the first line", || running.json().first().cloned());
        let profile = ready["profile"].as_str().expect("a path").to_owned();
        let brokers = ready["brokers"].as_array().expect("brokers");
        let pid = |broker: &Value| u32::try_from(broker["pid"].as_u64().expect("a number")).expect("a pid");
        Up { pids: brokers.iter().map(pid).collect(), profile, _running: running, folder }
    }

    /// Of broker `id`.
    fn signal(&self, id: i64, name: &str) {
        harness::signal(self.pids[usize::try_from(id - 1).expect("an id")], name);
    }

    fn run(&self, args: &[&str]) -> Answer {
        run(&[args, &["--profile", &self.profile]].concat())
    }

    /// Produces lines.
    fn produce(&self, args: &[&str], lines: &str) -> Answer {
        let file = self.folder.path().join("lines");
        std::fs::write(&file, lines).expect("written");
        self.run(&[&["produce"], args, &["--file", file.to_str().expect("text")]].concat())
    }

    fn json(&self, args: &[&str]) -> Vec<Value> {
        self.run(&[args, &["--json"]].concat()).ok().json()
    }

    fn partitions(&self, topic: &str) -> Vec<Value> {
        let told = self.json(&["topic", "describe", topic]);
        told[0]["partitions"].as_array().expect("partitions").clone()
    }
}

#[test]
fn each_leader_is_asked_about_what_it_leads() {
    let up = Up::start();
    up.run(&["topic", "create", "t", "-p", "6", "-r", "1"]).ok();
    for partition in 0..6 {
        let lines: String = (0..10).map(|n| format!("{{\"at\":{},\"v\":{n}}}\n", n * 1000)).collect();
        let number = partition.to_string();
        up.produce(&["t", "--partition", &number, "--timestamp-field", "at"], &lines).ok();
    }
    let described = up.partitions("t");
    let leaders: BTreeSet<i64> = described.iter().map(|p| p["leader"].as_i64().expect("a leader")).collect();
    assert_eq!(leaders, BTreeSet::from([1, 2, 3]));
    for partition in &described {
        assert_eq!((&partition["log_start_offset"], &partition["high_watermark"]), (&0.into(), &10.into()));
        assert!(partition["size_bytes"].as_u64().expect("a size") > 0, "{partition}");
    }
    assert_eq!(up.json(&["consume", "t", "--until", "end"]).len(), 60);
    assert_eq!(up.json(&["consume", "t", "--from", "time:3000", "--until", "end"]).len(), 42);
    assert_eq!(up.json(&["consume", "t", "--from", "offset:8", "--until", "time:9000"]).len(), 6);
    for partition in 0..6 {
        up.run(&["topic", "delete-records", "t", "--partition", &partition.to_string(), "--before", "4"]).ok();
    }
    assert_eq!(up.json(&["consume", "t", "--until", "end"]).len(), 36);

    // What nobody leads is said to be unknown, and all else is told of.
    up.signal(3, "KILL");
    let described = eventually("broker 3 is missed", || {
        let described = up.partitions("t");
        described.iter().any(|p| p["leader"].is_null()).then_some(described)
    });
    for partition in described {
        let expected = if partition["replicas"][0] == 3 { Value::Null } else { 10.into() };
        assert_eq!(partition["high_watermark"], expected, "{partition}");
    }
}
