//! The admin port: `/health`, `/ready` and `/metrics`, over plain HTTP, on loopback unless the settings say otherwise.
//!
//! Owns: the three answers, and the connections on which they are asked for: one request each, within a deadline, and so
//! many that the next one takes the place of the oldest. So whoever says nothing, or does not read its answer, keeps
//! nobody else from being answered. `/health`: the process runs; `/ready`: it has recovered, serves all of it, and is not
//! going away; where its metadata take nothing any more, it says why; `/metrics`: Prometheus text. The port is served before anything is recovered, which may take long.
//! Refuses: to change anything. Read next: [`crate::metrics`].

use crate::cluster_metrics;
use crate::group::Groups;
use crate::metadata::raft::RaftNode;
use crate::metrics::{Metrics, Samples};
use crate::os;
use crate::partition::PartitionHandle;
use crate::partitions::Partitions;
use crate::pool::Pool;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a connection: request, answer, and reading it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections at once. A scrape takes some milliseconds, so the oldest of so many has not asked, or does not read.
const MAX_CONNECTIONS: usize = 64;

/// Partitions that are told of before others get a turn.
const PARTITIONS_AT_ONCE: usize = 64;

/// After what the operating system refuses (too many open files) the next connection is taken this much later.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Time for the answers under way when the broker has shut down.
const GOODBYE: Duration = Duration::from_millis(100);

/// A command that waits longer than this waits for a disk that hangs.
const METADATA_HANG: Duration = Duration::from_secs(30);

/// What the port shows of a broker, from the time on when it begins to recover.
pub(crate) struct Shown {
    pub(crate) started_ms: i64,
    pub(crate) network_threads: u32,
    pub(crate) pool: Pool,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) partitions: Arc<Partitions>,
    /// Set once everything was recovered and clients are served.
    pub(crate) groups: OnceLock<Groups>,
    /// This broker, and its member of the metadata quorum.
    pub(crate) member: OnceLock<(i32, Option<RaftNode>)>,
    /// Shutdown has begun.
    pub(crate) shutdown: CancellationToken,
    /// Shutdown is over.
    pub(crate) closed: CancellationToken,
}

/// Serves the port until the broker has shut down.
pub(crate) async fn serve(shown: Arc<Shown>, listener: TcpListener) {
    let closed = shown.closed.clone();
    let router = Router::new()
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shown);
    serve_router(router, listener, closed).await;
}

async fn serve_router(router: Router, listener: TcpListener, closed: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = closed.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection| !connection.is_finished());
        if oldest_first.len() >= MAX_CONNECTIONS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
        match accepted {
            Ok((stream, _)) => {
                oldest_first.push_back(connections.spawn(timeout(CONNECTION_TIMEOUT, answer(router.clone(), stream))));
            }
            Err(error) => {
                tracing::debug!(%error, "a connection to the admin port was not taken");
                drop(timeout(ACCEPT_AGAIN, closed.cancelled()).await);
            }
        }
    }
    // A client that does not read its answer does not hold the broker up; what is left is cut when the set is dropped.
    drop(timeout(GOODBYE, async { while connections.join_next().await.is_some() {} }).await);
}

/// One request of one connection.
async fn answer(router: Router, stream: TcpStream) {
    let connection = http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection to the admin port failed");
    }
}

async fn ready(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    let why_not = if shown.shutdown.is_cancelled() {
        "shutting down\n".to_owned()
    } else if let Some(groups) = shown.groups.get() {
        let waits = groups.metadata().waits();
        match groups.metadata().ended() {
            Some(cause) => format!("{cause}\n"),
            None if waits > METADATA_HANG => format!("the metadata wait for the disk for {} s\n", waits.as_secs()),
            None => return (StatusCode::OK, "ready\n".to_owned()),
        }
    } else {
        "starting\n".to_owned()
    };
    (StatusCode::SERVICE_UNAVAILABLE, why_not)
}

async fn metrics(State(shown): State<Arc<Shown>>) -> impl IntoResponse {
    let text = match timeout(ANSWER_TIMEOUT, render(&shown)).await {
        Ok(text) => (StatusCode::OK, text),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
    };
    (text.0, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text.1)
}

async fn render(shown: &Shown) -> String {
    let mut samples = Samples::new(shown.metrics.render());
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
        shown.started_ms / 1000,
    );
    one(&mut samples, "headwater_network_threads", "gauge", "Threads that serve connections.", shown.network_threads);
    one(
        &mut samples,
        "headwater_io_pool_queued",
        "gauge",
        "Jobs that wait for a thread of the I/O pool.",
        shown.pool.queued(),
    );
    let recovery = shown.partitions.recovery();
    one(
        &mut samples,
        "headwater_recovery_bytes_total",
        "counter",
        "Bytes of logs that recoveries since the start have to scan, as far as they have begun.",
        recovery.to_scan_bytes(),
    );
    one(
        &mut samples,
        "headwater_recovery_scanned_bytes_total",
        "counter",
        "Bytes of them that are behind.",
        recovery.scanned_bytes(),
    );
    let mut partitions = shown.partitions.all();
    partitions.sort_by(|a, b| (a.topic(), a.partition()).cmp(&(b.topic(), b.partition())));
    one(&mut samples, "headwater_partitions", "gauge", "Partitions that this broker keeps.", partitions.len());
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
        for some in partitions.chunks(PARTITIONS_AT_ONCE) {
            for partition in some {
                let labels: [(&str, &dyn Display); 2] =
                    [("topic", partition.topic()), ("partition", &partition.partition())];
                samples.sample(name, &labels, read(partition));
            }
            // This thread serves connections too.
            tokio::task::yield_now().await;
        }
    }
    if let Some(groups) = shown.groups.get() {
        one(
            &mut samples,
            "headwater_metadata_ended",
            "gauge",
            "1 where no topic, setting or producer id changes any more before a restart.",
            u8::from(groups.metadata().ended().is_some()),
        );
        one(
            &mut samples,
            "headwater_metadata_command_seconds",
            "gauge",
            "How long the metadata command under way waits; 0 where there is none.",
            groups.metadata().waits().as_secs_f64(),
        );
        if let Some((me, node)) = shown.member.get() {
            cluster_metrics::samples(&mut samples, groups.metadata(), node.as_ref(), *me);
            cluster_metrics::lags(&mut samples, groups.metadata(), &partitions, *me).await;
            one(
                &mut samples,
                "headwater_lease_held",
                "gauge",
                "1 while a majority confirms that this broker is not fenced: without, it refuses acks 0 and 1, and changes no ISR.",
                u8::from(shown.partitions.lease().holds()),
            );
        }
        groups.samples(&mut samples).await;
    }
    samples.finish()
}

fn one(samples: &mut Samples, name: &str, kind: &str, help: &str, value: impl Display) {
    samples.begin(name, kind, help);
    samples.sample(name, &[], value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    const ASK: &[u8] = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n";
    /// More than the socket buffers of both sides hold.
    const LARGE_BYTES: usize = 64 << 20;

    async fn admin() -> (SocketAddr, tokio::task::JoinHandle<()>, CancellationToken) {
        let router = Router::new()
            .route("/small", get(|| async { "small" }))
            .route("/large", get(|| async { vec![b'x'; LARGE_BYTES] }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let closed = CancellationToken::new();
        (address, tokio::spawn(serve_router(router, listener, closed.clone())), closed)
    }

    async fn connect(address: SocketAddr, say: &[u8]) -> TcpStream {
        let mut client = TcpStream::connect(address).await.expect("connected");
        client.write_all(say).await.expect("written");
        client
    }

    /// What comes until the connection ends; how it ends (reset or not) is the operating system's.
    async fn read(mut client: TcpStream) -> Vec<u8> {
        let mut got = Vec::new();
        let end = timeout(10 * CONNECTION_TIMEOUT, client.read_to_end(&mut got)).await;
        drop(end.expect("the connection ends"));
        got
    }

    fn is_small(answer: &[u8]) -> bool {
        answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"small")
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_or_half_a_request_is_cut_at_the_deadline() {
        let (address, _serving, _closed) = admin().await;
        for said in [&b""[..], b"GET /small HT", b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"] {
            let began = Instant::now();
            let client = connect(address, said).await;
            assert!(!is_small(&read(client).await));
            assert!(began.elapsed() <= CONNECTION_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
        }
        assert!(is_small(&read(connect(address, ASK).await).await));
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_cut_at_the_deadline() {
        let (address, _serving, _closed) = admin().await;
        let client = connect(address, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await;
        tokio::time::sleep(CONNECTION_TIMEOUT + Duration::from_secs(1)).await;
        assert!(read(client).await.len() < LARGE_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_clients_are_few_and_keep_nobody_from_an_answer() {
        let (address, _serving, _closed) = admin().await;
        let began = Instant::now();
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            silent.push(connect(address, b"").await);
            assert!(is_small(&read(connect(address, ASK).await).await));
        }
        let rest = silent.split_off(2 * MAX_CONNECTIONS);
        for cut in silent {
            assert!(read(cut).await.is_empty());
        }
        assert!(began.elapsed() < CONNECTION_TIMEOUT, "the oldest made room before their time: {:?}", began.elapsed());
        drop(rest);
    }

    #[tokio::test(start_paused = true)]
    async fn the_port_ends_with_the_broker() {
        let (address, serving, closed) = admin().await;
        let silent = connect(address, b"").await;
        assert!(is_small(&read(connect(address, ASK).await).await));
        closed.cancel();
        serving.await.expect("no panic");
        assert!(read(silent).await.is_empty());
    }
}
