//! What a broker counts and measures of its cluster.
//!
//! Counters follow the states that are published, one look a change; gauges are counted when they are asked for. An idle cluster
//! costs nothing, however many partitions it has.
//!
//! Owns: their names and meanings. Refuses: judging what changed ([`crate::metadata::changes`]).

use crate::metadata::MetadataHandle;
use crate::metadata::changes::{changes, standing};
use crate::metadata::raft::RaftNode;
use crate::metadata::state::BrokerState;
use crate::metrics::{Metrics, Samples};
use crate::partition::PartitionHandle;
use crate::replica::lag::Lag;
use futures::future::join_all;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Partitions that are asked how far their followers are, before others get a turn.
const PARTITIONS_AT_ONCE: usize = 64;

/// Replicas that are told of one by one, at most: those that are behind for longest.
const MOST_REPLICAS: usize = 100;

/// Counts what happens, until `stop`.
pub(crate) async fn watch(metadata: MetadataHandle, me: i32, metrics: Arc<Metrics>, stop: CancellationToken) {
    let (mut news, mut before) = (metadata.changes(), metadata.state());
    while let Some(Ok(())) = stop.run_until_cancelled(news.changed()).await {
        let after = metadata.state();
        let seen = changes(&before, &after, me);
        metrics.isr_shrinks.increment(seen.shrunk as u64);
        metrics.isr_expands.increment(seen.expanded as u64);
        metrics.leader_elections.increment(seen.led_by_me as u64);
        metrics.unclean_elections.increment(seen.unclean.len() as u64);
        before = after;
    }
}

/// How the cluster is now, as this broker knows it.
pub(crate) fn samples(samples: &mut Samples, metadata: &MetadataHandle, node: Option<&RaftNode>, me: i32) {
    let state = metadata.state();
    let now = standing(&state, me);
    let mut gauge = |name: &str, help: &str, value: &dyn Display| {
        samples.begin(name, "gauge", help);
        samples.sample(name, &[], value);
    };
    gauge("headwater_partitions_led", "Partitions that this broker leads.", &now.led);
    gauge(
        "headwater_partitions_under_replicated",
        "Partitions that this broker leads and of which a replica is not in sync.",
        &now.under_replicated,
    );
    gauge(
        "headwater_partitions_under_min_isr",
        "Partitions that this broker leads with fewer in-sync replicas than min.insync.replicas: acks=all is refused.",
        &now.under_min_isr,
    );
    gauge(
        "headwater_partitions_at_min_isr",
        "Partitions that this broker leads with just as many in-sync replicas as min.insync.replicas.",
        &now.at_min_isr,
    );
    gauge("headwater_partitions_reassigning", "Partitions that this broker leads and that move.", &now.reassigning);
    gauge("headwater_partitions_offline", "Partitions of the cluster that nobody leads.", &now.offline);
    gauge("headwater_replicas_fenced", "Replicas of the cluster that a disk fenced.", &now.fenced_replicas);
    let in_office = metadata.controller_epoch().borrow().is_some();
    gauge("headwater_controller_active", "1 on the broker that is the controller.", &u8::from(in_office));
    gauge("headwater_metadata_version", "The version of the metadata that this broker goes by.", &state.index());
    gauge(
        "headwater_feature_level",
        "Which commands the cluster may be given: raised by `headwater cluster upgrade --finalize`.",
        &state.feature_level(),
    );
    if let Some(node) = node {
        let told = node.metrics().borrow().clone();
        let applied = told.last_applied.map_or(0, |last| last.index);
        let committed = node.committed().max(applied);
        gauge("headwater_raft_term", "The term of the metadata quorum, as this member knows it.", &told.current_term);
        gauge("headwater_raft_commit_index", "The last entry that is known to be committed.", &committed);
        gauge(
            "headwater_raft_last_log_index",
            "The last entry in this member's log.",
            &told.last_log_index.unwrap_or(0),
        );
        gauge(
            "headwater_metadata_lag_entries",
            "Committed entries that are not applied here yet.",
            &(committed - applied),
        );
        gauge("headwater_raft_voters", "Members that vote on the metadata.", &node.membership().voter_ids().count());
        let leads = told.current_leader == Some(node.node_id());
        gauge("headwater_raft_leader", "1 on the member that leads the metadata quorum.", &u8::from(leads));
        gauge(
            "headwater_raft_leader_known",
            "1 where it is known who leads the metadata quorum.",
            &u8::from(told.current_leader.is_some()),
        );
        // The lease of whoever leads: nobody has a younger one.
        let unheard = told.millis_since_quorum_ack.filter(|_| leads).map_or(-1.0, |ms| ms as f64 / 1000.0);
        gauge(
            "headwater_raft_quorum_unheard_seconds",
            "On the leader: how long ago a majority answered last, on which its office rests; -1 elsewhere.",
            &unheard,
        );
    }
    let name = "headwater_brokers";
    samples.begin(name, "gauge", "Brokers of the cluster, by state.");
    for kind in [BrokerState::Active, BrokerState::Fenced, BrokerState::Draining] {
        let count = state.brokers().filter(|broker| broker.state == kind).count();
        samples.sample(name, &[("state", &kind.name())], count);
    }
}

fn seconds(ms: i64) -> String {
    (ms as f64 / 1000.0).to_string()
}

/// What a follower lacks of the partitions that this broker leads.
#[derive(Default)]
struct Behind {
    partitions: usize,
    records: i64,
    most_records: i64,
    longest_ms: i64,
}

/// How far the followers of the partitions that this broker leads are behind: for each broker, and for the replicas that are worst off. So
/// there are no more series than brokers and [`MOST_REPLICAS`], however many partitions there are.
pub(crate) async fn lags(samples: &mut Samples, metadata: &MetadataHandle, partitions: &[PartitionHandle], me: i32) {
    let state = metadata.state();
    let others = state.brokers().map(|broker| broker.id).filter(|id| *id != me);
    let mut brokers: BTreeMap<i32, Behind> = others.map(|id| (id, Behind::default())).collect();
    let mut replicas: Vec<(&PartitionHandle, Lag)> = Vec::new();
    for some in partitions.chunks(PARTITIONS_AT_ONCE) {
        let told = join_all(some.iter().map(PartitionHandle::lags)).await;
        for (partition, lag) in
            some.iter().zip(told).flat_map(|(partition, lags)| lags.into_iter().map(move |lag| (partition, lag)))
        {
            if lag.records > 0 {
                let broker = brokers.entry(lag.broker).or_default();
                broker.partitions += 1;
                broker.records = broker.records.saturating_add(lag.records);
                broker.most_records = broker.most_records.max(lag.records);
                broker.longest_ms = broker.longest_ms.max(lag.ms);
                replicas.push((partition, lag));
            }
        }
        replicas.sort_by_key(|(_, lag)| std::cmp::Reverse((lag.ms, lag.records)));
        replicas.truncate(MOST_REPLICAS);
    }
    type Read<T> = fn(&T) -> String;
    let of_brokers: [(&str, &str, Read<Behind>); 4] = [
        (
            "headwater_replica_lagging_partitions",
            "Partitions that this broker leads and of which the follower lacks something.",
            |it| it.partitions.to_string(),
        ),
        (
            "headwater_replica_lag_records",
            "Records (offsets) that the follower lacks of the partitions that this broker leads, together.",
            |it| it.records.to_string(),
        ),
        (
            "headwater_replica_lag_records_max",
            "Records (offsets) that the follower lacks of the partition of which it lacks most.",
            |it| it.most_records.to_string(),
        ),
        (
            "headwater_replica_lag_seconds",
            "How long ago the follower had everything, of the partition where that is longest; 0 where it has everything.",
            |it| seconds(it.longest_ms),
        ),
    ];
    for (name, help, read) in of_brokers {
        samples.begin(name, "gauge", help);
        for (id, behind) in &brokers {
            samples.sample(name, &[("follower", id)], read(behind));
        }
    }
    let of_replicas: [(&str, &str, Read<Lag>); 2] = [
        (
            "headwater_partition_replica_lag_records",
            "Records (offsets) that a follower lacks of a partition that this broker leads; the hundred that are behind for longest.",
            |it| it.records.to_string(),
        ),
        ("headwater_partition_replica_lag_seconds", "How long ago that follower had everything.", |it| seconds(it.ms)),
    ];
    for (name, help, read) in of_replicas {
        samples.begin(name, "gauge", help);
        for (partition, lag) in &replicas {
            let labels: [(&str, &dyn Display); 3] =
                [("topic", partition.topic()), ("partition", &partition.partition()), ("follower", &lag.broker)];
            samples.sample(name, &labels, read(lag));
        }
    }
}
