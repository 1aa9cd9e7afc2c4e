//! What the broker counts and measures.
//!
//! Owns: every metric's name, meaning and handle, and the text that `/metrics` answers. Names are constants of the form
//! `headwater_<subsystem>_<noun>_<unit>`; labels are bounded (kinds, error codes, topics and partitions that exist).
//! What is only a state of something that exists (log sizes, offsets, lag) is written out when it is asked for, so that
//! nothing is left of a topic that was deleted. Refuses: to be global; each broker of a process has its own.
//! Read next: [`crate::admin`].

use headwater_proto::ErrorCode;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use std::collections::HashMap;
use std::fmt::{Display, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Bounds of the latency histograms, in seconds: a flush on a good disk takes 0.1 ms, a cold read 10 ms.
const LATENCY_BUCKETS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
];

/// The handles of one broker.
pub(crate) struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    rejected: Mutex<HashMap<&'static str, Counter>>,
    requests: Mutex<HashMap<&'static str, Histogram>>,
    pub(crate) bytes_in: Counter,
    pub(crate) records_in: Counter,
    pub(crate) batches_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) records_out: Counter,
    pub(crate) append_seconds: Histogram,
    pub(crate) flush_seconds: Histogram,
    pub(crate) commit_bytes: Histogram,
    pub(crate) produce_seconds: Histogram,
    pub(crate) cold_reads: Counter,
    pub(crate) cold_read_seconds: Histogram,
    pub(crate) connections: Gauge,
    pub(crate) connections_total: Counter,
    pub(crate) produce_streams: Gauge,
    pub(crate) fetch_streams: Gauge,
    pub(crate) member_streams: Gauge,
    pub(crate) replica_streams: Gauge,
    pub(crate) follower_streams: Gauge,
    pub(crate) pushed_bytes: Counter,
    pub(crate) replicated_bytes: Counter,
    pub(crate) partitions_recovering: Gauge,
    pub(crate) partitions_fenced: Gauge,
    pub(crate) isr_shrinks: Counter,
    pub(crate) isr_expands: Counter,
    pub(crate) leader_elections: Counter,
    pub(crate) unclean_elections: Counter,
    pub(crate) replicas_healed: Counter,
    pub(crate) leader_election_seconds: Histogram,
    pub(crate) tls_renewals: Counter,
    pub(crate) tls_renewals_refused: Counter,
    pub(crate) tls_certificate_expiry: Gauge,
    pub(crate) tls_ca_expiry: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), LATENCY_BUCKETS)
            .and_then(|builder| {
                let bytes: Vec<f64> = (9..=26).map(|n| f64::from(1u32 << n)).collect();
                builder.set_buckets_for_metric(Matcher::Suffix("_group_bytes".into()), &bytes)
            })
            .expect("there are buckets");
        let recorder = Arc::new(builder.build_recorder());
        // What storage counts goes to the first broker of the process: all but tests and demonstrations have one.
        if metrics::set_global_recorder(Arc::clone(&recorder)).is_ok() {
            headwater_storage::metrics::describe();
        }
        let r = &*recorder;
        Metrics {
            handle: recorder.handle(),
            rejected: Mutex::default(),
            requests: Mutex::default(),
            bytes_in: counter(r, "headwater_produce_bytes_total", "Bytes of record batches appended for producers."),
            records_in: counter(r, "headwater_produce_records_total", "Records appended for producers."),
            batches_in: counter(r, "headwater_produce_batches_total", "Record batches appended for producers."),
            bytes_out: counter(r, "headwater_fetch_bytes_total", "Bytes of record batches sent to readers."),
            records_out: counter(
                r,
                "headwater_fetch_records_total",
                "Offsets sent to readers: records, and gaps that compaction left.",
            ),
            append_seconds: histogram(
                r,
                "headwater_append_seconds",
                Unit::Seconds,
                "Time to write one group of batches, without the flush.",
            ),
            flush_seconds: histogram(
                r,
                "headwater_flush_seconds",
                Unit::Seconds,
                "Time of one fdatasync of a partition.",
            ),
            commit_bytes: histogram(
                r,
                "headwater_append_group_bytes",
                Unit::Bytes,
                "Bytes that one group commit wrote.",
            ),
            produce_seconds: histogram(
                r,
                "headwater_produce_seconds",
                Unit::Seconds,
                "Time from the last byte of a produce frame to its acknowledgement.",
            ),
            cold_reads: counter(
                r,
                "headwater_fetch_cold_reads_total",
                "Ranges that were not in memory and had to be read from the disk.",
            ),
            cold_read_seconds: histogram(
                r,
                "headwater_fetch_cold_read_seconds",
                Unit::Seconds,
                "Time to bring one such range into memory.",
            ),
            connections: gauge(r, "headwater_connections", "Connections that are open."),
            connections_total: counter(r, "headwater_connections_opened_total", "Connections accepted."),
            produce_streams: labelled_gauge(r, "headwater_streams", "produce", "Streams that are open."),
            fetch_streams: labelled_gauge(r, "headwater_streams", "fetch", "Streams that are open."),
            member_streams: labelled_gauge(r, "headwater_streams", "member", "Streams that are open."),
            replica_streams: labelled_gauge(r, "headwater_streams", "replica", "Streams that are open."),
            follower_streams: gauge(
                r,
                "headwater_following_streams",
                "Partitions of which this broker takes what their leaders push.",
            ),
            pushed_bytes: counter(
                r,
                "headwater_replica_pushed_bytes_total",
                "Bytes of record batches pushed to followers.",
            ),
            replicated_bytes: counter(
                r,
                "headwater_replica_received_bytes_total",
                "Bytes of record batches that leaders pushed to this broker.",
            ),
            partitions_recovering: gauge(
                r,
                "headwater_partitions_recovering",
                "Partitions that are being opened or recovered.",
            ),
            partitions_fenced: gauge(
                r,
                "headwater_partitions_fenced",
                "Partitions that are not served: damage or a failed disk.",
            ),
            isr_shrinks: counter(
                r,
                "headwater_isr_shrinks_total",
                "Times that replicas left the in-sync replicas of partitions that this broker leads.",
            ),
            isr_expands: counter(
                r,
                "headwater_isr_expands_total",
                "Times that replicas came in sync of partitions that this broker leads.",
            ),
            leader_elections: counter(
                r,
                "headwater_leader_elections_total",
                "Partitions that this broker came to lead.",
            ),
            replicas_healed: counter(
                r,
                "headwater_replicas_healed_total",
                "Replicas that were damaged while the broker ran, and are fetched anew from their leader.",
            ),
            unclean_elections: counter(
                r,
                "headwater_unclean_elections_total",
                "Leaders of the cluster that may miss acknowledged records, elected since this broker started.",
            ),
            leader_election_seconds: histogram(
                r,
                "headwater_leader_election_seconds",
                Unit::Seconds,
                "On the controller: time from the last that was heard of a broker until its partitions had other leaders.",
            ),
            tls_renewals: labelled_counter(r, RENEWALS, ("outcome", "taken"), RENEWALS_HELP),
            tls_renewals_refused: labelled_counter(r, RENEWALS, ("outcome", "refused"), RENEWALS_HELP),
            tls_certificate_expiry: gauge(
                r,
                "headwater_tls_certificate_expiry_seconds",
                "When the certificate in use expires, in seconds since 1970.",
            ),
            tls_ca_expiry: gauge(
                r,
                "headwater_tls_ca_expiry_seconds",
                "When the last of the trusted authorities expires, in seconds since 1970; 0 without one.",
            ),
            recorder,
        }
    }

    /// Input of a peer was refused.
    pub(crate) fn rejected(&self, code: ErrorCode) {
        let mut rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        rejected
            .entry(code.name())
            .or_insert_with(|| {
                let name = "headwater_rejected_total";
                self.recorder.describe_counter(
                    name.into(),
                    None,
                    "Requests, frames and batches refused, by error code.".into(),
                );
                self.recorder.register_counter(&Key::from_parts(name, vec![Label::new("code", code.name())]), &METADATA)
            })
            .increment(1);
    }

    /// A call was answered.
    pub(crate) fn answered(&self, call: &'static str, seconds: f64) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests
            .entry(call)
            .or_insert_with(|| {
                let name = "headwater_request_seconds";
                self.recorder.describe_histogram(
                    name.into(),
                    Some(Unit::Seconds),
                    "Time from a call's first frame to its answer.".into(),
                );
                self.recorder.register_histogram(&Key::from_parts(name, vec![Label::new("call", call)]), &METADATA)
            })
            .record(seconds);
    }

    /// Everything counted and measured so far, as Prometheus text.
    pub(crate) fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds samples into the histograms; without it they would pile up where nobody asks for `/metrics`.
    pub(crate) fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

const RENEWALS: &str = "headwater_tls_renewals_total";
const RENEWALS_HELP: &str = "New certificates that were found: taken into use, or refused while the old ones stay.";

const METADATA: Metadata<'static> = Metadata::new("headwater", Level::INFO, None);

fn counter(recorder: &PrometheusRecorder, name: &'static str, text: &'static str) -> Counter {
    recorder.describe_counter(name.into(), None, text.into());
    recorder.register_counter(&Key::from_static_name(name), &METADATA)
}

fn labelled_counter(
    recorder: &PrometheusRecorder,
    name: &'static str,
    (label, value): (&'static str, &'static str),
    text: &'static str,
) -> Counter {
    recorder.describe_counter(name.into(), None, text.into());
    recorder.register_counter(&Key::from_parts(name, vec![Label::new(label, value)]), &METADATA)
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, text: &'static str) -> Gauge {
    recorder.describe_gauge(name.into(), None, text.into());
    recorder.register_gauge(&Key::from_static_name(name), &METADATA)
}

fn labelled_gauge(recorder: &PrometheusRecorder, name: &'static str, kind: &'static str, text: &'static str) -> Gauge {
    recorder.describe_gauge(name.into(), None, text.into());
    recorder.register_gauge(&Key::from_parts(name, vec![Label::new("kind", kind)]), &METADATA)
}

fn histogram(recorder: &PrometheusRecorder, name: &'static str, unit: Unit, text: &'static str) -> Histogram {
    recorder.describe_histogram(name.into(), Some(unit), text.into());
    recorder.register_histogram(&Key::from_static_name(name), &METADATA)
}

/// Counts something while it lives.
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Counted {
        gauge.increment(1.0);
        Counted(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// Prometheus text for values that are read when they are asked for.
pub(crate) struct Samples {
    text: String,
}

impl Samples {
    pub(crate) fn new(text: String) -> Samples {
        Samples { text }
    }

    /// Begins a metric: its name, its kind (`gauge` or `counter`) and what it means.
    pub(crate) fn begin(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One sample of the metric that was begun.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.text.push_str(name);
        for (n, (label, value)) in labels.iter().enumerate() {
            self.text.push(if n == 0 { '{' } else { ',' });
            let value = value.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{label}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    pub(crate) fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_rendered() {
        let metrics = Metrics::new();
        metrics.bytes_in.increment(7);
        metrics.rejected(ErrorCode::CorruptBatch);
        metrics.answered("metadata", 0.003);
        let one = Counted::new(&metrics.fetch_streams);
        let text = metrics.render();
        assert!(text.contains("headwater_produce_bytes_total 7"), "{text}");
        assert!(text.contains("headwater_rejected_total{code=\"corrupt_batch\"} 1"), "{text}");
        assert!(text.contains("headwater_request_seconds_bucket{call=\"metadata\",le=\"0.005\"} 1"), "{text}");
        assert!(text.contains("headwater_streams{kind=\"fetch\"} 1"), "{text}");
        drop(one);
        assert!(metrics.render().contains("headwater_streams{kind=\"fetch\"} 0"));
    }

    #[test]
    fn labels_are_escaped() {
        let mut samples = Samples::new(String::new());
        samples.begin("headwater_x", "gauge", "x.");
        samples.sample("headwater_x", &[("group", &"a\"b\\c\nd"), ("partition", &3)], 1.5);
        assert!(samples.finish().ends_with("headwater_x{group=\"a\\\"b\\\\c\\nd\",partition=\"3\"} 1.5\n"));
    }
}
