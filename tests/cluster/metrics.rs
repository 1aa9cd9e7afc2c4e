//! What the brokers of a cluster tell of it on their admin ports.

use crate::development::Development;
use std::io::{Read, Write};
use std::net::TcpStream;

impl Development {
    /// What a broker says of this; `None`: nothing, or it is not there.
    fn sample(&self, id: usize, name: &str) -> Option<f64> {
        let mut admin = TcpStream::connect(self.ready["brokers"][id - 1]["admin"].as_str()?).ok()?;
        admin.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        admin.read_to_string(&mut text).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    }

    fn sum(&self, name: &str) -> f64 {
        (1..=3).filter_map(|id| self.sample(id, name)).sum()
    }
}

#[test]
fn a_lost_broker_shows_in_the_metrics_of_the_others() {
    let cluster = Development::up(3, &[]);
    cluster
        .command(&["topic", "create", "t", "--replica-placement", "1:2,2:3,3:1", "-c", "min.insync.replicas=2"])
        .ok();
    cluster.command(&["topic", "create", "alone", "--replica-placement", "1"]).ok();
    let is = |what: &str, wanted: f64| {
        cluster.until(&format!("{what} is {wanted}"), || (cluster.sum(what) == wanted).then_some(()));
    };
    is("headwater_partitions_led", 4.0);
    is("headwater_partitions_at_min_isr", 4.0);
    is("headwater_partitions_under_replicated", 0.0);
    is("headwater_partitions_offline", 0.0);
    is("headwater_controller_active", 1.0);
    is("headwater_raft_leader", 1.0);
    is("headwater_lease_held", 3.0);
    is("headwater_brokers{state=\"active\"}", 9.0);
    is("headwater_feature_level", 9.0);
    is("headwater_metadata_lag_entries", 0.0);
    assert!(cluster.sample(1, "headwater_raft_term").is_some_and(|term| term >= 1.0));
    assert!(cluster.sample(1, "headwater_raft_commit_index").is_some_and(|index| index >= 10.0));

    cluster.kill(1);
    is("headwater_brokers{state=\"fenced\"}", 2.0);
    // Each of two others says so.
    is("headwater_partitions_offline", 2.0);
    is("headwater_partitions_under_replicated", 2.0);
    is("headwater_partitions_under_min_isr", 2.0);
    // The partition that broker 1 led is led by broker 2 now.
    assert!(cluster.sample(2, "headwater_leader_elections_total").is_some_and(|count| count >= 1.0));
    assert!(cluster.sum("headwater_isr_shrinks_total") >= 2.0);
    is("headwater_unclean_elections_total", 0.0);
    cluster.until("how long the election took is told by the controller", || {
        (cluster.sum("headwater_leader_election_seconds_count") >= 1.0).then_some(())
    });
    is("headwater_controller_active", 1.0);
}

#[test]
fn what_a_follower_lacks_is_told_in_records_and_in_time() {
    let mut cluster = Development::up(3, &[]);
    let create = ["topic", "create", "t", "--replica-placement", "1:3,2:3", "-c", "min.insync.replicas=1"];
    cluster.command(&create).ok();
    let of_broker = |what: &str| format!("headwater_replica_{what}{{follower=\"3\"}}");
    let of_replica =
        |what: &str| format!("headwater_partition_replica_{what}{{topic=\"t\",partition=\"0\",follower=\"3\"}}");
    let [records, most, seconds, partitions] =
        ["lag_records", "lag_records_max", "lag_seconds", "lagging_partitions"].map(of_broker);
    let [records_of_one, seconds_of_one] = ["lag_records", "lag_seconds"].map(of_replica);
    cluster.feed(&["produce", "t", "--partition", "0"], "seen\n");
    cluster.until("nothing lacks", || (cluster.sample(1, &records) == Some(0.0)).then_some(()));
    assert_eq!((cluster.sample(1, &seconds), cluster.sample(1, &records_of_one)), (Some(0.0), None));

    cluster.kill(3);
    let isr = || cluster.object(&["topic", "describe", "t"])["partitions"][0]["isr"].clone();
    cluster.until("it is missed", || (isr() == serde_json::json!([1])).then_some(()));
    cluster.feed(&["produce", "t", "--partition", "0"], "1\n2\n3\n4\n5\n6\n7\n");
    // Broker 2 leads a partition of which nobody lacks anything.
    cluster.until("it is told", || (cluster.sample(1, &records) == Some(7.0)).then_some(()));
    assert_eq!((cluster.sample(1, &most), cluster.sample(1, &partitions)), (Some(7.0), Some(1.0)));
    assert_eq!((cluster.sample(1, &records_of_one), cluster.sample(2, &records)), (Some(7.0), Some(0.0)));
    let before = cluster.sample(1, &seconds).expect("a time");
    cluster.until("time passes", || (cluster.sample(1, &seconds) > Some(before + 0.5)).then_some(()));
    assert!(cluster.sample(1, &seconds_of_one) > Some(before));
    // It comes back, and takes what it lacks.
    cluster.revive(3);
    cluster.until("nothing lacks", || (cluster.sample(1, &records) == Some(0.0)).then_some(()));
    assert_eq!((cluster.sample(1, &seconds), cluster.sample(1, &seconds_of_one)), (Some(0.0), None));
}
