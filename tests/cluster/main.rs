//! Brokers of one cluster as processes, made and shown by command alone.

#[path = "../harness/mod.rs"]
mod harness;

mod addresses;
mod development;
mod metrics;
mod moves;
mod recover;

mod clients;
mod groups;
mod silent;

use harness::{Running, eventually, headwater, run};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};

/// Three brokers' folders, certificates and configurations.
struct Cluster {
    folder: tempfile::TempDir,
    running: Vec<Option<Running>>,
}

impl Cluster {
    fn new() -> Cluster {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
        // All at once, so that nobody is given the same.
        let sockets = [0; 3].map(|_| UdpSocket::bind("127.0.0.1:0").expect("a port"));
        let addresses = sockets.map(|socket| socket.local_addr().expect("bound").to_string());
        run(&["cert", "ca", "--out", &at("ca"), "--cluster", "prod"]).ok();
        for (id, listen) in (1..).zip(&addresses) {
            let (id, data) = (id.to_string(), at(&format!("data-{id}")));
            let host = ["--host", "localhost", "--host", "127.0.0.1"];
            run(&[&["cert", "broker", "--ca", &at("ca"), "--id", &id, "--out", &data], &host[..]].concat()).ok();
            let settings = format!(
                "data.dir = {data:?}\nbroker.id = {id}\nlisten = {listen:?}\nadmin.listen = \"127.0.0.1:0\"\n\
                 controller.quorum.bootstrap.servers = {:?}\nbroker.rack = \"rack-{id}\"\n",
                addresses.join(",")
            );
            std::fs::write(folder.path().join(format!("{id}.toml")), settings).expect("written");
        }
        let broker = ["--broker", addresses[0].as_str()];
        run(&[&["cert", "client", "--ca", &at("ca"), "--name", "op", "--out", &at("client")], &broker[..]].concat())
            .ok();
        let cluster = Cluster { folder, running: vec![None, None, None] };
        let profile = format!("bootstrap = {addresses:?}\nca = \"ca.pem\"\n");
        std::fs::write(cluster.profile(), profile).expect("written");
        cluster
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("text").to_owned()
    }

    fn profile(&self) -> PathBuf {
        Path::new(&self.path("client")).join("client.toml")
    }

    fn config(&self, id: usize) -> String {
        self.path(&format!("{id}.toml"))
    }

    fn start(&mut self, id: usize) {
        let mut command = headwater();
        command.args(["broker", "--config", &self.config(id), "--json"]);
        self.running[id - 1] = Some(Running::start(command));
        let started = self.running[id - 1].as_ref().expect("started");
        eventually("the first line", || started.json().first().cloned());
    }

    /// A counter of a broker.
    fn metric(&self, id: usize, name: &str) -> u64 {
        let running = self.running[id - 1].as_ref().expect("it runs");
        let admin = running.json()[0]["admin"].as_str().expect("an address").to_owned();
        let mut connection = std::net::TcpStream::connect(&admin).expect("the admin port answers");
        write!(connection, "GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n").expect("it reads");
        let mut metrics = String::new();
        connection.read_to_string(&mut metrics).expect("it answers");
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse::<f64>().expect("a number") as u64)
    }

    fn command(&self, args: &[&str]) -> harness::Answer {
        let profile = self.profile();
        run(&[args, &["--profile", profile.to_str().expect("text")]].concat())
    }

    fn object(&self, args: &[&str]) -> Value {
        self.command(&[args, &["--json"]].concat()).ok().object()
    }

    fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || Some(self.object(&["cluster", "describe"])).filter(&is_so))
    }
}

fn states(told: &Value) -> Vec<&str> {
    let brokers = told["brokers"].as_array().expect("brokers");
    brokers.iter().map(|broker| broker["state"].as_str().expect("a state")).collect()
}

#[test]
fn a_cluster_is_made_shown_and_changed_by_command() {
    let mut cluster = Cluster::new();
    let refused = run(&["broker", "--config", &cluster.config(1)]).fails(1);
    assert!(refused.stderr.contains("headwater cluster init"), "{}", refused.stderr);
    run(&["cluster", "init", "--config", &cluster.config(1)]).ok();
    cluster.start(1);
    for id in [2, 3] {
        let joined = run(&["cluster", "join", "--config", &cluster.config(id), "--json"]).ok().object();
        assert_eq!(
            (&joined["id"], &joined["cluster_id"]),
            (&id.into(), &cluster.object(&["cluster", "describe"])["cluster_id"])
        );
        cluster.start(id);
        cluster.command(&["cluster", "voters", "add", &id.to_string()]).ok();
    }
    let told = cluster.until("all are active", |told| states(told) == ["active"; 3]);
    assert_eq!((&told["voters"], &told["controller"]), (&serde_json::json!([1, 2, 3]), &1.into()));
    assert_eq!((&told["offline"], &told["under_replicated"]), (&0.into(), &0.into()));
    let text = cluster.command(&["cluster", "describe"]).ok().text();
    assert!(text.contains("3 brokers: all is well") && text.contains("votes, controller"), "{text}");

    cluster.command(&["topic", "create", "t", "-p", "3", "-r", "1"]).ok();
    let too_many = cluster.command(&["topic", "create", "u", "-r", "4"]).fails(1);
    assert!(too_many.stderr.contains("4 replicas: there are only 3 active brokers"), "{}", too_many.stderr);
    let created = cluster.object(&["topic", "create", "d"]);
    assert_eq!(created["replication_factor"], 3, "as many as there are brokers, three at most");
    let described = cluster.object(&["topic", "describe", "d"]);
    let config = described["config"].as_array().expect("settings").iter();
    let in_sync = config.clone().find(|setting| setting["name"] == "min.insync.replicas").expect("it is shown");
    assert_eq!((&in_sync["value"], &in_sync["source"]), (&"2".into(), &"default".into()), "a majority of them");
    cluster.command(&["topic", "delete", "d"]).ok();
    let kept = cluster.command(&["cluster", "remove", "3"]).fails(1);
    assert!(kept.stderr.contains("stop it first"), "{}", kept.stderr);

    // The controller is killed: another one is in office, and says who is gone.
    cluster.running[0].take().expect("it runs").kill();
    let told = cluster.until("another controller", |told| states(told) == ["fenced", "active", "active"]);
    assert!([2, 3].contains(&told["controller"].as_i64().expect("a controller")), "{told}");
    assert_eq!(told["offline"], 1, "its partition");
    let text = cluster.command(&["cluster", "describe"]).ok().text();
    assert!(text.contains("not heard of: broker 1; 1 partition without a leader"), "{text}");
    assert!(text.contains("no leader  in sync 0 of 1"), "{text}");
    assert!(text.contains("start broker 1 (") && text.contains("2 of 3 voters there"), "{text}");
    cluster.start(1);
    let told = cluster.until("all are active again", |told| states(told) == ["active"; 3] && told["offline"] == 0);
    assert_eq!(told["voters"], serde_json::json!([1, 2, 3]));
    cluster.command(&["cluster", "voters", "remove", "3"]).ok();
    assert_eq!(cluster.object(&["cluster", "describe"])["observers"], serde_json::json!([3]));
}

/// Whether a process runs, and is not only waited for.
#[cfg(target_os = "linux")]
fn runs(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[cfg(target_os = "linux")]
#[test]
fn a_development_cluster_survives_a_broker_and_ends_with_its_command_however_that_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let up = || {
        let mut command = headwater();
        command.current_dir(folder.path()).args(["up", "--brokers", "3", "--data", "data", "--json"]);
        command.args(["-c", "log.retention.check.interval.ms=1000"]);
        let running = Running::start(command);
        let ready = eventually("the first line", || running.json().first().cloned());
        (running, ready)
    };
    let pids = |ready: &Value| -> Vec<u64> {
        let brokers = ready["brokers"].as_array().expect("brokers");
        brokers.iter().map(|broker| broker["pid"].as_u64().expect("a number")).collect()
    };
    let (mut running, ready) = up();
    let profile = ready["profile"].as_str().expect("a path").to_owned();
    let describe = || run(&["cluster", "describe", "--json", "--profile", &profile]).ok().object();
    let told = describe();
    assert_eq!((states(&told), &told["voters"]), (vec!["active"; 3], &serde_json::json!([1, 2, 3])));
    let first = pids(&ready);
    assert!(first.iter().all(|pid| runs(*pid)));
    harness::signal(u32::try_from(first[1]).expect("a pid"), "KILL");
    eventually("broker 2 is missed", || (states(&describe()) == ["active", "fenced", "active"]).then_some(()));
    assert!(running.is_running() && !runs(first[1]), "it stays dead");
    // Whoever starts it again has it: it does not end with the command.
    let config = Path::new(ready["brokers"][1]["data"].as_str().expect("a path")).join("broker.toml");
    let mut revived = headwater();
    revived.args(["broker", "--config", config.to_str().expect("text"), "--json"]);
    let mut revived = Running::start(revived);
    eventually("all are active", || (states(&describe()) == ["active"; 3]).then_some(()));
    // Killed, so that it can tell nobody.
    running.kill();
    eventually("the brokers end", || (!runs(first[0]) && !runs(first[2])).then_some(()));
    assert!(revived.is_running() && revived.terminate().success());
    // The folder goes on, at the same addresses; and an orderly end is one.
    let (mut again, ready_again) = up();
    for key in ["id", "listen", "admin", "data"] {
        let of = |ready: &Value| [0, 1, 2].map(|n| ready["brokers"][n][key].clone());
        assert_eq!(of(&ready), of(&ready_again), "{key}");
    }
    assert!(again.terminate().success());
    assert!(pids(&ready_again).iter().all(|pid| !runs(*pid)));
}

#[test]
fn a_reader_reads_from_the_replica_in_its_rack_and_from_another_one_when_that_is_gone() {
    let mut cluster = Cluster::new();
    run(&["cluster", "init", "--config", &cluster.config(1)]).ok();
    cluster.start(1);
    for id in [2, 3] {
        run(&["cluster", "join", "--config", &cluster.config(id)]).ok();
        cluster.start(id);
        cluster.command(&["cluster", "voters", "add", &id.to_string()]).ok();
    }
    cluster.until("all are active", |told| states(told) == ["active"; 3]);
    cluster.command(&["topic", "create", "t", "-p", "1", "-r", "3"]).ok();
    let lines: String = (0..100).map(|n| format!("{n} {}\n", "x".repeat(1000))).collect();
    std::fs::write(cluster.path("lines"), lines).expect("written");
    cluster.command(&["produce", "t", "--file", &cluster.path("lines")]).ok();
    let leader = eventually("all are in sync", || {
        let described = cluster.object(&["topic", "describe", "t"]);
        let partition = &described["partitions"][0];
        let is_whole = partition["isr"].as_array().expect("a list").len() == 3;
        partition["leader"].as_u64().filter(|_| is_whole)
    });
    let near = (1..4).find(|id| *id != leader as usize).expect("another broker");
    let read = |cluster: &Cluster, rack: &str| {
        let told = cluster.command(&["consume", "t", "--until", "end", "--rack", rack, "--json"]).ok().json();
        assert_eq!(told.len(), 100);
        told.iter().zip(0i64..).for_each(|(record, n)| assert_eq!(record["offset"], n));
    };
    let sent = |cluster: &Cluster, id: usize| cluster.metric(id, "headwater_fetch_bytes_total");
    let before = [sent(&cluster, near), sent(&cluster, leader as usize)];
    read(&cluster, &format!("rack-{near}"));
    let after = [sent(&cluster, near), sent(&cluster, leader as usize)];
    assert!(after[0] - before[0] > 100_000, "{before:?} {after:?}");
    assert_eq!(after[1], before[1], "nothing came from the leader");
    read(&cluster, "elsewhere");
    assert!(sent(&cluster, leader as usize) - after[1] > 100_000, "there is nobody in that rack");
    cluster.running[near - 1].take().expect("it runs").kill();
    read(&cluster, &format!("rack-{near}"));
}
