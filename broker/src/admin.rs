//! The admin port: `/health`, `/ready` and `/metrics`, over plain HTTP, on loopback unless the settings say otherwise.
//!
//! Owns: the three answers. `/health`: the process runs; `/ready`: it has recovered, serves, and is not going away;
//! `/metrics`: Prometheus text. Refuses: to change anything. Read next: [`crate::metrics`].

use crate::metrics::Samples;
use crate::os;
use crate::partition::PartitionHandle;
use crate::shared::Shared;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the port until the broker has shut down.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let closed = shared.closed.clone();
    let router = Router::new()
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shared);
    let served = axum::serve(listener, router).with_graceful_shutdown(closed.clone().cancelled_owned());
    tokio::select! {
        served = served => if let Err(error) = served {
            tracing::error!(%error, "the admin port failed");
        },
        // A client that does not read its answer does not hold the broker up.
        () = async { closed.cancelled().await; tokio::time::sleep(Duration::from_millis(100)).await } => {}
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> (StatusCode, &'static str) {
    if shared.shutdown.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n")
    } else if !shared.is_ready() {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let text = match timeout(ANSWER_TIMEOUT, render(&shared)).await {
        Ok(text) => (StatusCode::OK, text),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
    };
    (text.0, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text.1)
}

async fn render(shared: &Arc<Shared>) -> String {
    let mut samples = Samples::new(shared.metrics.render());
    one(
        &mut samples,
        "headwater_process_cpu_seconds_total",
        "counter",
        "User and system time of the broker.",
        os::cpu_seconds(),
    );
    if let Some(bytes) = os::resident_bytes() {
        one(
            &mut samples,
            "headwater_process_resident_bytes",
            "gauge",
            "Memory of the broker, mapped files included.",
            bytes,
        );
    }
    one(
        &mut samples,
        "headwater_start_time_seconds",
        "gauge",
        "When the broker started, since 1970.",
        shared.started_ms / 1000,
    );
    one(&mut samples, "headwater_network_threads", "gauge", "Threads that serve connections.", shared.network_threads);
    one(
        &mut samples,
        "headwater_io_pool_queued",
        "gauge",
        "Jobs that wait for a thread of the I/O pool.",
        shared.pool.queued(),
    );
    let mut partitions = shared.partitions.all();
    partitions.sort_by(|a, b| (a.topic(), a.partition()).cmp(&(b.topic(), b.partition())));
    one(&mut samples, "headwater_partitions", "gauge", "Partitions that this broker leads.", partitions.len());
    type Read = fn(&PartitionHandle) -> i64;
    let gauges: [(&str, &str, Read); 5] = [
        ("headwater_partition_log_start_offset", "First offset of the log.", |p| p.offsets().log_start),
        ("headwater_partition_high_watermark", "Readers see what is below.", |p| p.offsets().high_watermark),
        ("headwater_partition_log_end_offset", "The offset that the next record gets.", |p| p.offsets().log_end),
        ("headwater_partition_size_bytes", "Bytes of the log's segments.", |p| {
            i64::try_from(p.status().size_bytes).unwrap_or(i64::MAX)
        }),
        ("headwater_partition_fenced", "1 where the partition is not served.", |p| i64::from(p.ended().is_some())),
    ];
    for (name, help, read) in gauges {
        samples.begin(name, "gauge", help);
        for partition in &partitions {
            let labels: [(&str, &dyn Display); 2] =
                [("topic", partition.topic()), ("partition", &partition.partition())];
            samples.sample(name, &labels, read(partition));
        }
    }
    shared.groups.samples(&mut samples).await;
    samples.finish()
}

fn one(samples: &mut Samples, name: &str, kind: &str, help: &str, value: impl Display) {
    samples.begin(name, kind, help);
    samples.sample(name, &[], value);
}
