//! `headwater cert`: what it makes, that it overwrites nothing, and that brokers take it.

use crate::harness::{Answer, Running, eventually, headwater, run};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A folder, and the command in it.
struct Cluster(tempfile::TempDir);

impl Cluster {
    fn new() -> Cluster {
        let cluster = Cluster(tempfile::tempdir().expect("a folder"));
        cluster.cert("ca --cluster prod --out CA").ok();
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect(name)
    }

    /// `headwater cert ...`; words in capitals stand for folders.
    fn cert(&self, line: &str) -> Answer {
        let folder = |word: &str| match word.starts_with(|first: char| first.is_ascii_uppercase()) {
            true => self.path(word).to_str().expect("text").to_owned(),
            false => word.to_owned(),
        };
        let words: Vec<String> = ["cert".to_owned()].into_iter().chain(line.split_whitespace().map(folder)).collect();
        run(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn made(&self, line: &str) -> Value {
        self.cert(&format!("{line} --json")).ok().object()
    }
}

#[cfg(unix)]
fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).expect("a file").permissions().mode() & 0o777
}

#[test]
fn whoever_asks_for_quiet_is_told_of_nothing_that_went_well() {
    let cluster = Cluster::new();
    for line in [
        "broker --ca CA --id 7 --host a.example --out B7",
        "client --ca CA --name alice --out A",
        "ca --cluster b --out CB",
    ] {
        let made = cluster.cert(&format!("{line} -q")).ok();
        assert_eq!((made.text(), made.stderr), (String::new(), String::new()), "{line}");
    }
    assert_eq!(cluster.read("B7/ca.pem"), cluster.read("CA/ca.pem"));
}

#[test]
fn certificates_name_their_holders_and_keys_are_private() {
    let cluster = Cluster::new();
    let broker = cluster.made("broker --ca CA --id 7 --host a.example 192.0.2.1 --host b.example --out B7");
    assert_eq!(broker["uri"], "headwater://prod/broker/7");
    let hosts = ["a.example", "192.0.2.1", "b.example", "localhost", "127.0.0.1", "::1"];
    assert_eq!(broker["hosts"], serde_json::json!(hosts));
    let client = cluster.made("client --ca CA --name alice --out A --broker h:1");
    assert_eq!((&client["uri"], &client["kind"]), (&"headwater://prod/client/alice".into(), &"client".into()));
    let profile = cluster.read("A/client.toml");
    assert!(profile.contains("\"h:1\"") && profile.contains("client-key.pem"), "{profile}");
    for folder in ["B7", "A"] {
        assert_eq!(cluster.read(&format!("{folder}/ca.pem")), cluster.read("CA/ca.pem"));
    }
    #[cfg(unix)]
    for key in ["CA/ca-key.pem", "B7/broker-key.pem", "A/client-key.pem"] {
        assert_eq!(mode(&cluster.path(key)), 0o600, "{key}");
    }
    let said = cluster.cert("broker --ca CA --id 8 --host a --out B8").ok();
    assert!(
        said.text().contains("headwater://prod/broker/8") && said.stderr.contains("data folder"),
        "{}",
        said.stderr
    );
}

/// Every file of a folder with its bytes.
fn everything(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| (path.clone(), std::fs::read(path).expect("a file")))
        .collect();
    found.sort();
    found
}

#[test]
fn nothing_is_overwritten_and_every_refusal_says_what_to_do() {
    let cluster = Cluster::new();
    cluster.cert("broker --ca CA --id 1 --host a --out B").ok();
    cluster.cert("client --ca CA --name alice --out A --broker h:1").ok();
    cluster.cert("ca --cluster test --out T").ok();
    let folders = ["CA", "B", "A", "T"].map(|name| cluster.path(name));
    let before = folders.each_ref().map(|folder| everything(folder));
    for (line, says) in [
        ("ca --out CA", "--renew"),
        ("ca --out CA --renew --cluster other", "keeps the name"),
        ("ca --out NEW --cluster Prod", "small letters"),
        ("broker --ca CA --id 1 --host a --out B", "--renew"),
        ("broker --ca CA --id 2 --host a --out B --renew", "headwater://prod/broker/1"),
        ("broker --ca T --id 1 --host a --out B --renew", "headwater://test/broker/1"),
        ("broker --ca CA --id 2 --host a:9392 --out NEW", "without a port"),
        ("broker --ca CA --id 2 --host a --out NEW --validity 20y", "--validity"),
        ("broker --ca NOWHERE --id 2 --host a --out NEW", "headwater cert ca"),
        ("broker --ca CA --id 2 --host a --out NEW --renew", "cannot read"),
        ("client --ca CA --name bob --out A", "--renew"),
        ("client --ca CA --name bob --out A --renew", "headwater://prod/client/alice"),
        ("client --ca CA --name alice --out A --renew --broker h:2", "client.toml"),
        ("client --ca CA --name a/b --out NEW", "a client's name"),
    ] {
        let refused = cluster.cert(line).fails(1);
        assert!(refused.stderr.contains(says), "{line}: {says}: {}", refused.stderr);
        assert!(refused.stdout.is_empty(), "{line}");
    }
    assert_eq!(folders.each_ref().map(|folder| everything(folder)), before);
    assert!(!cluster.path("NEW").exists());
}

#[test]
fn a_renewal_keeps_the_holder_its_hosts_and_whom_it_trusts() {
    let cluster = Cluster::new();
    let first = cluster.made("broker --ca CA --id 1 --host a.example --out B --validity 2h");
    let (certificate, key) = (cluster.read("B/broker.pem"), cluster.read("B/broker-key.pem"));
    let renewed = cluster.made("broker --ca CA --id 1 --out B --renew");
    assert_eq!((&renewed["renewed"], &renewed["hosts"]), (&true.into(), &first["hosts"]));
    assert!(renewed["not_after"].as_i64() > first["not_after"].as_i64());
    assert!(cluster.read("B/broker.pem") != certificate && cluster.read("B/broker-key.pem") != key);
    assert_eq!(cluster.read("B/ca.pem"), cluster.read("CA/ca.pem"));

    // The authority: the key is the same, so what it signed stays good; whoever is renewed after that trusts both.
    let key = cluster.read("CA/ca-key.pem");
    cluster.cert("ca --out CA --renew").ok();
    assert_eq!(cluster.read("CA/ca-key.pem"), key);
    cluster.cert("broker --ca CA --id 1 --out B --renew").ok();
    // A new authority, with another key.
    cluster.cert("ca --cluster prod --out CA2").ok();
    cluster.cert("broker --ca CA2 --id 1 --out B --renew").ok();
    let trusted = cluster.read("B/ca.pem");
    assert!(trusted.contains(cluster.read("CA/ca.pem").trim()) && trusted.contains(cluster.read("CA2/ca.pem").trim()));
}

/// A renewal replaced the key and was killed before the certificate: the pair did not fit any more, and no start took it.
#[test]
fn a_renewal_that_ends_in_the_middle_leaves_what_a_broker_takes() {
    let cluster = Cluster::new();
    cluster.cert("broker --ca CA --id 1 --host a.example --out DATA").ok();
    let before = cluster.read("DATA/broker.pem");
    // What is written aside finds its place taken.
    std::fs::create_dir(cluster.path("DATA/broker.tmp")).expect("a folder");
    cluster.cert("broker --ca CA --id 1 --out DATA --renew").fails(1);
    assert_eq!(cluster.read("DATA/broker.pem"), before);
    let (mut broker, _) = serve(&cluster, "DATA", &[]);
    assert!(broker.terminate().success());
    std::fs::remove_dir(cluster.path("DATA/broker.tmp")).expect("a folder");
    cluster.cert("broker --ca CA --id 1 --out DATA --renew").ok();
    assert_ne!(cluster.read("DATA/broker.pem"), before);
    assert_eq!(cluster.read("DATA/broker-key.pem").matches("BEGIN").count(), 1, "the old key is left out");
    let (mut broker, _) = serve(&cluster, "DATA", &[]);
    assert!(broker.terminate().success());
}

/// Whoever renews is often somebody else than the broker, which could not read its new key.
#[cfg(unix)]
#[test]
fn a_renewal_keeps_owners_and_modes() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let cluster = Cluster::new();
    cluster.cert("broker --ca CA --id 1 --host a.example --out B").ok();
    let modes = [("B/broker.pem", 0o664), ("B/broker-key.pem", 0o640), ("CA/ca.pem", 0o600)];
    // Only root gives files away.
    let root = rustix::process::geteuid().is_root();
    for (name, mode) in modes {
        std::fs::set_permissions(cluster.path(name), std::fs::Permissions::from_mode(mode)).expect(name);
        if root {
            chown(cluster.path(name), Some(4711), Some(4712)).expect(name);
        }
    }
    cluster.cert("ca --out CA --renew").ok();
    cluster.cert("broker --ca CA --id 1 --out B --renew").ok();
    for (name, mode) in modes {
        assert_eq!(self::mode(&cluster.path(name)), mode, "{name}");
        let file = std::fs::metadata(cluster.path(name)).expect(name);
        assert!(!root || (file.uid(), file.gid()) == (4711, 4712), "{name}: {} {}", file.uid(), file.gid());
    }
}

/// A broker on a folder, with a line of log for everything.
fn serve(cluster: &Cluster, folder: &str, more: &[&str]) -> (Running, Value) {
    let mut command = headwater();
    command.args(["up", "--json", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data"]);
    command.arg(cluster.path(folder)).args(more);
    let running = Running::start(command);
    let ready = eventually("the first line", || running.json().first().cloned());
    (running, ready)
}

#[test]
fn a_broker_serves_with_the_certificates_of_its_folder_and_takes_new_ones() {
    let cluster = Cluster::new();
    cluster.cert("broker --ca CA --id 1 --host broker.example --out DATA").ok();
    let (mut broker, ready) = serve(&cluster, "DATA", &["-c", "tls.reload.interval.ms=100"]);
    assert_eq!(cluster.read("DATA/ca.pem"), cluster.read("CA/ca.pem"));
    let profile = ready["profile"].as_str().expect("a profile");
    run(&["topic", "create", "t", "--profile", profile]).ok();
    // The whole of a move to another authority, while it runs.
    cluster.cert("ca --cluster prod --out CA2").ok();
    cluster.cert("broker --ca CA2 --id 1 --out DATA --renew").ok();
    let (listen, new) = (ready["listen"].as_str().expect("an address"), cluster.path("CA2/ca.pem"));
    let by_new = ["topic", "list", "--json", "--broker", listen, "--ca", new.to_str().expect("text")];
    eventually("the new authority is shown", || run(&by_new).status.success().then_some(()));
    run(&["topic", "list", "--profile", profile]).ok();
    assert!(broker.terminate().success());
}

#[test]
fn a_broker_does_not_start_with_another_ones_certificate() {
    let cluster = Cluster::new();
    cluster.cert("broker --ca CA --id 2 --host a --out DATA").ok();
    let data = cluster.path("DATA");
    let refused =
        run(&["up", "--data", data.to_str().expect("text"), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let refused = refused.fails(1);
    assert!(
        refused.stderr.contains("headwater://prod/broker/2") && refused.stderr.contains("broker.id"),
        "{}",
        refused.stderr
    );
}
