//! Brokers that come back under other addresses, and addresses that are told apart from where a broker listens.

use crate::development::Development;
use crate::harness::eventually;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::path::Path;

/// An address that nobody listens on.
fn free() -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("bound").to_string()
}

/// Changes a setting in a configuration file, or adds it.
fn set(file: &Path, key: &str, value: &str) {
    let text = std::fs::read_to_string(file).expect("a file");
    let kept = text.lines().filter(|line| !line.starts_with(&format!("{key} = ")));
    let text: String = kept.map(|line| format!("{line}\n")).collect();
    std::fs::write(file, format!("{text}{key} = {value:?}\n")).expect("written");
}

fn broker(cluster: &Development, id: usize) -> Value {
    cluster.object(&["cluster", "describe"])["brokers"][id - 1].clone()
}

fn isr_of(cluster: &Development, topic: &str) -> Value {
    cluster.object(&["topic", "describe", topic])["partitions"][0]["isr"].clone()
}

fn read(cluster: &Development, topic: &str) -> Vec<String> {
    cluster.command(&["consume", topic, "--from", "earliest", "--until", "end"]).ok().lines()
}

#[test]
fn a_broker_that_comes_back_at_another_port_is_found_by_brokers_and_clients() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "its", "--replica-placement", "2", "-c", "min.insync.replicas=1"]).ok();
    let both = ["topic", "create", "both", "--replica-placement", "1:2", "-c", "min.insync.replicas=1"];
    cluster.command(&both).ok();
    cluster.feed(&["produce", "its"], "before\n");
    let before = broker(&cluster, 2);
    cluster.kill(2);
    cluster.until("it is missed", || (isr_of(&cluster, "both") == json!([1])).then_some(()));
    cluster.feed(&["produce", "both"], "meanwhile\n");
    let (config, address) = (cluster.data(2).join("broker.toml"), free());
    set(&config, "listen", &address);
    // The profile, and the other brokers' configurations, still name the old port.
    cluster.revive(2);
    let after = cluster.until("it is active again", || {
        let told = broker(&cluster, 2);
        (told["state"] == "active" && told["incarnation"] != before["incarnation"]).then_some(told)
    });
    assert_eq!((&after["address"], after["address"] == before["address"]), (&json!(address), false));
    assert_eq!(read(&cluster, "its"), ["before"], "a client finds the only replica");
    cluster.feed(&["produce", "its"], "after\n");
    assert_eq!(read(&cluster, "its"), ["before", "after"]);
    cluster.until("it follows", || (isr_of(&cluster, "both") == json!([1, 2])).then_some(()));
    assert_eq!(cluster.object(&["cluster", "describe"])["voters"], json!([1, 2, 3]), "and it votes");
}

#[test]
fn what_a_broker_advertises_is_where_it_is_dialled() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "its", "--replica-placement", "3", "-c", "min.insync.replicas=1"]).ok();
    cluster.feed(&["produce", "its"], "before\n");
    cluster.kill(3);
    let address = free();
    let port = address.rsplit_once(':').expect("a port").1;
    let config = cluster.data(3).join("broker.toml");
    set(&config, "listen", &address);
    set(&config, "advertised.listener", &format!("localhost:{port}"));
    cluster.revive(3);
    cluster.until("it is active there", || {
        let told = broker(&cluster, 3);
        (told["state"] == "active" && told["address"] == format!("localhost:{port}")).then_some(())
    });
    assert_eq!(read(&cluster, "its"), ["before"]);
}

#[test]
fn a_development_cluster_comes_up_again_at_other_ports_which_its_files_hold() {
    let mut cluster = Development::up(3, &[]);
    cluster.command(&["topic", "create", "t", "-r", "3"]).ok();
    cluster.feed(&["produce", "t"], "kept\n");
    let told = |cluster: &Development, key: &str| -> Vec<String> {
        let brokers = cluster.ready["brokers"].as_array().expect("brokers");
        brokers.iter().map(|broker| broker[key].as_str().expect("text").to_owned()).collect()
    };
    let (profile, before) = (cluster.profile(), told(&cluster, "listen"));
    assert!(
        Path::new(&profile).is_absolute() && told(&cluster, "data").iter().all(|data| Path::new(data).is_absolute())
    );
    let ports: BTreeSet<String> = before.iter().chain(&told(&cluster, "admin")).cloned().collect();
    assert_eq!(ports.len(), 6, "each has ports of its own: {ports:?}");
    cluster.end();
    // All at once, so that nobody is given the same.
    let sockets = [0; 3].map(|_| UdpSocket::bind("127.0.0.1:0").expect("a port"));
    let addresses = sockets.map(|socket| socket.local_addr().expect("bound").to_string());
    for (id, address) in (1..).zip(&addresses) {
        set(&cluster.data(id).join("broker.toml"), "listen", address);
    }
    cluster.up_again(3);
    assert_eq!((told(&cluster, "listen"), cluster.profile()), (addresses.to_vec(), profile.clone()));
    let held = std::fs::read_to_string(&profile).expect("a profile");
    assert!(addresses.iter().all(|it| held.contains(it)) && !before.iter().any(|it| held.contains(it)), "{held}");
    let shown = |told: &Value| -> Vec<Value> {
        told["brokers"].as_array().expect("brokers").iter().map(|broker| broker["address"].clone()).collect()
    };
    eventually("all are shown there", || {
        (shown(&cluster.object(&["cluster", "describe"])) == addresses.clone().map(Value::from)).then_some(())
    });
    assert_eq!(read(&cluster, "t"), ["kept"]);
}
