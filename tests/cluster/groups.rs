//! Groups of three brokers: whoever coordinates them may be killed, or stand still, at any moment.

use crate::harness::{self, Answer, Running, eventually, headwater, run};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Three brokers, started by one command.
struct Up {
    brokers: Vec<Value>,
    profile: String,
    revived: Vec<Running>,
    /// They end with it.
    _running: Running,
    folder: tempfile::TempDir,
}

impl Up {
    fn start(settings: &[&str]) -> Up {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = headwater();
        command.current_dir(folder.path()).args(["up", "--brokers", "3", "--data", "data", "--json"]);
        for setting in settings {
            command.args(["-c", setting]);
        }
        let running = Running::start(command);
        let ready = eventually("the first line", || running.json().first().cloned());
        let profile = ready["profile"].as_str().expect("a path").to_owned();
        let brokers = ready["brokers"].as_array().expect("brokers").clone();
        Up { brokers, profile, revived: Vec::new(), _running: running, folder }
    }

    fn broker(&self, id: i64) -> &Value {
        self.brokers.iter().find(|broker| broker["id"] == id).expect("a broker")
    }

    fn signal(&self, id: i64, name: &str) {
        let pid = self.broker(id)["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        harness::signal(pid.expect("a pid"), name);
    }

    fn revive(&mut self, id: i64) {
        let config = Path::new(self.broker(id)["data"].as_str().expect("a path")).join("broker.toml");
        let mut command = headwater();
        command.args(["broker", "--config", config.to_str().expect("text"), "--json"]);
        self.revived.push(Running::start(command));
    }

    fn run(&self, args: &[&str]) -> Answer {
        run(&[args, &["--profile", &self.profile]].concat())
    }

    fn object(&self, args: &[&str]) -> Option<Value> {
        let answer = self.run(&[args, &["--json"]].concat());
        answer.status.success().then(|| answer.object())
    }

    fn produce(&self, from: u32, to: u32) {
        let file = self.folder.path().join("lines");
        let lines: String = (from..to).map(|n| format!("k{}:{n}\n", n % 61)).collect();
        std::fs::write(&file, lines).expect("written");
        let file = file.to_str().expect("text");
        self.run(&["produce", "t", "--key-separator", ":", "--file", file]).ok();
    }

    fn member(&self) -> Running {
        let mut command = headwater();
        command.args(["consume", "t", "--group", "g", "--from", "earliest", "--json", "--profile", &self.profile]);
        Running::start(command)
    }

    /// Who leads the only partition of the offsets topic.
    fn coordinator(&self) -> Option<i64> {
        self.object(&["topic", "describe", "__consumer_offsets"])?["partitions"][0]["leader"].as_i64()
    }

    fn until_whole(&self, topic: &str) {
        eventually("all replicas are in sync", || {
            let told = self.object(&["topic", "describe", topic])?;
            let partitions = told["partitions"].as_array()?;
            partitions.iter().all(|it| it["isr"].as_array().is_some_and(|isr| isr.len() == 3)).then_some(())
        });
    }
}

/// What members are, by their ids: epochs and partitions.
fn members(group: &Value) -> BTreeMap<String, (Value, Value)> {
    let members = group["members"].as_array().expect("members").iter();
    members
        .map(|it| {
            (
                it["member_id"].as_str().expect("an id").to_owned(),
                (it["member_epoch"].clone(), it["partitions"].clone()),
            )
        })
        .collect()
}

fn seen(members: &[&Running]) -> Vec<(u64, u64)> {
    let records = members.iter().flat_map(|member| member.json());
    let number = |value: &Value| value.as_u64().expect("a number");
    records.map(|record| (number(&record["partition"]), number(&record["offset"]))).collect()
}

fn until_seen(members: &[&Running], count: usize) {
    eventually("the members see all of it", || {
        (seen(members).into_iter().collect::<BTreeSet<_>>().len() == count).then_some(())
    });
}

/// Of each partition, what is committed: never less than before.
fn commits(group: &Value, before: &mut BTreeMap<u64, i64>) {
    for offset in group["offsets"].as_array().expect("offsets") {
        let committed = offset["committed"].as_i64().unwrap_or(-1);
        let before = before.entry(offset["partition"].as_u64().expect("a number")).or_insert(committed);
        assert!(committed >= *before, "{group}");
        *before = committed;
    }
}

#[test]
fn members_keep_their_partitions_when_the_coordinator_is_killed_and_when_it_stands_still() {
    let mut up = Up::start(&["offsets.topic.num.partitions=1"]);
    up.run(&["topic", "create", "t", "-p", "4"]).ok();
    let (mut x, mut y) = (up.member(), up.member());
    let group = eventually("two members with two partitions each", || {
        let group = up.object(&["group", "describe", "g"])?;
        let members = members(&group);
        let two = |(_, partitions): &(Value, Value)| partitions.as_array().is_some_and(|it| it.len() == 2);
        (members.len() == 2 && members.values().all(two) && group["state"] == "stable").then_some(group)
    });
    let (before, mut committed) = (members(&group), BTreeMap::new());
    up.until_whole("__consumer_offsets");
    up.produce(0, 200);
    until_seen(&[&x, &y], 200);
    for (round, name) in (2u32..).zip(["KILL", "STOP"]) {
        let coordinator = eventually("a coordinator", || up.coordinator());
        up.signal(coordinator, name);
        let next = eventually("another one", || up.coordinator().filter(|it| *it != coordinator));
        up.produce((round - 1) * 200, round * 200);
        until_seen(&[&x, &y], round as usize * 200);
        let group = eventually("the group", || up.object(&["group", "describe", "g"]));
        assert_eq!(members(&group), before, "at broker {next}, after broker {coordinator} got {name}");
        commits(&group, &mut committed);
        match name {
            "KILL" => up.revive(coordinator),
            _ => up.signal(coordinator, "CONT"),
        }
        up.until_whole("__consumer_offsets");
        up.until_whole("t");
        commits(&eventually("the group", || up.object(&["group", "describe", "g"])), &mut committed);
    }
    assert!(x.terminate().success() && y.terminate().success());
    let all = seen(&[&x, &y]);
    assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (600, 600), "each record once");
    let group = up.object(&["group", "describe", "g"]).expect("the group");
    commits(&group, &mut committed);
    let lags: Vec<&Value> = group["offsets"].as_array().expect("offsets").iter().map(|it| &it["lag"]).collect();
    assert_eq!(lags, [0; 4], "{group}");
    assert_eq!(committed.values().sum::<i64>(), 600);
    // The list is that of all coordinators, and a group is reset and forgotten wherever it is.
    let other = ["group", "reset", "other", "--topic", "t", "--to", "earliest", "--execute"];
    up.run(&other).ok();
    let listed = up.run(&["group", "list", "--json"]).ok().text();
    assert!(listed.contains("\"g\"") && listed.contains("\"other\""), "{listed}");
    up.run(&["group", "delete", "other"]).ok();
    assert!(!up.run(&["group", "list", "--json"]).ok().text().contains("\"other\""));
}
