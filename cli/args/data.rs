//! `headwater produce`, `consume` and `replay`.

use crate::format::Format;
use crate::pace::Speed;
use crate::spec::{End, HeaderArg, Start, Where, batch_size, byte_size, count, separator, wait};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use headwater_proto::batch::Codec;
use headwater_proto::wire::Acks;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct ProduceArgs {
    /// The topic.
    pub(crate) topic: String,
    /// Lines to append; without it, standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// What stands between key and value, with the escapes of `consume -f` (\t, \x1f, ...; \\ for a backslash); the
    /// first one in a line counts. A line without it has no key.
    #[arg(long, value_name = "S", conflicts_with = "json_key", allow_hyphen_values = true, value_parser = separator)]
    pub(crate) key_separator: Option<Bytes>,
    /// The key of every record, for lines that are all of it the value.
    #[arg(long, value_name = "KEY", conflicts_with_all = ["key_separator", "json_key"], allow_hyphen_values = true)]
    pub(crate) key: Option<String>,
    /// Lines are JSON objects, and this field is the key. Missing or null: no key.
    #[arg(long, value_name = "FIELD")]
    pub(crate) json_key: Option<String>,
    /// Lines are JSON objects, and this field is the event's time: RFC 3339, or milliseconds since 1970.
    #[arg(long, value_name = "FIELD")]
    pub(crate) timestamp_field: Option<String>,
    /// A header of every record; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) header: Vec<HeaderArg>,
    /// A value that stands for null: a tombstone in a compacted topic.
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub(crate) null_value: Option<String>,
    /// All records into this partition. Without it the key decides (murmur2, as Kafka does).
    #[arg(long, value_name = "N")]
    pub(crate) partition: Option<u32>,
    /// Append a line of JSON to this file for every acknowledged record, when its acknowledgement arrives.
    #[arg(long, value_name = "FILE")]
    pub(crate) ack_log: Option<PathBuf>,
    /// How long a record may stay unacknowledged before it is given up.
    #[arg(long, value_name = "DURATION", default_value = "120s", value_parser = wait)]
    pub(crate) delivery_timeout: Duration,
    /// What to wait for: nothing, the leader, or all in-sync replicas.
    #[arg(long, value_name = "ACKS", default_value = "all")]
    pub(crate) acks: AcksArg,
    /// Compression of the batches.
    #[arg(long, value_name = "CODEC", default_value = "none")]
    pub(crate) compression: CodecArg,
    /// Bytes of a batch before it is sent without waiting for more; 64KiB, 1MB, ... Without it: the client's default.
    #[arg(long, value_name = "BYTES", value_parser = batch_size)]
    pub(crate) batch: Option<u64>,
    /// How long a batch may wait for more records. Without it: the client's default.
    #[arg(long, value_name = "DURATION", value_parser = wait)]
    pub(crate) linger: Option<Duration>,
    /// Create the topic if it is not there.
    #[arg(long)]
    pub(crate) create: bool,
    /// With --create: how many partitions.
    #[arg(short = 'p', long, value_name = "N", requires = "create", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) partitions: Option<u32>,
}

/// The acknowledgement to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AcksArg {
    /// Nothing.
    #[value(name = "0")]
    None,
    /// The leader's own log.
    #[value(name = "1")]
    Leader,
    /// All in-sync replicas, and what the topic's durability asks of them.
    #[value(name = "all", alias = "-1")]
    All,
}

impl From<AcksArg> for Acks {
    fn from(acks: AcksArg) -> Acks {
        match acks {
            AcksArg::None => Acks::None,
            AcksArg::Leader => Acks::Leader,
            AcksArg::All => Acks::All,
        }
    }
}

impl From<CodecArg> for Codec {
    fn from(codec: CodecArg) -> Codec {
        match codec {
            CodecArg::None => Codec::None,
            CodecArg::Gzip => Codec::Gzip,
            CodecArg::Snappy => Codec::Snappy,
            CodecArg::Lz4 => Codec::Lz4,
            CodecArg::Zstd => Codec::Zstd,
        }
    }
}

/// A compression codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CodecArg {
    /// Not compressed.
    None,
    /// gzip.
    Gzip,
    /// Snappy, in the framing of Kafka's Java client.
    Snappy,
    /// LZ4 frames.
    Lz4,
    /// Zstandard.
    Zstd,
}

#[derive(Debug, Args)]
pub(crate) struct ConsumeArgs {
    /// The topic.
    pub(crate) topic: String,
    /// Be a member of this group: share the partitions with the others, start where the group stands, commit what was
    /// printed.
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,
    /// With --group: a name that outlives this process, so that a restart within the session timeout moves nothing.
    #[arg(long, value_name = "ID", requires = "group")]
    pub(crate) instance_id: Option<String>,
    /// With --group: how the broker shares partitions out: uniform or range. Without it: the broker's default.
    #[arg(long, value_name = "NAME", requires = "group")]
    pub(crate) assignor: Option<String>,
    /// With --group: how long after its last sign of life a member is taken for dead. Without it: the broker's default.
    #[arg(long, value_name = "DURATION", requires = "group", value_parser = wait)]
    pub(crate) session_timeout: Option<Duration>,
    /// Where this reader is: read from an in-sync replica of the same rack (broker.rack), if there is one.
    #[arg(long, value_name = "RACK")]
    pub(crate) rack: Option<String>,
    /// Only this partition; may be given several times.
    #[arg(long, value_name = "N", conflicts_with = "group")]
    pub(crate) partition: Vec<u32>,
    /// Where to start: earliest, latest, offset:N, time:RFC3339 (or milliseconds), or -DURATION (that long ago). With
    /// --group only where the group has committed nothing.
    #[arg(long, value_name = "WHERE", default_value = "earliest", allow_hyphen_values = true)]
    pub(crate) from: Start,
    /// Where to stop: end (what there is now), offset:N or time:T (neither is printed). Without it: never. With --group when
    /// the whole group has committed that far: another member that commits nothing is waited for, and named after 10 s.
    #[arg(long, value_name = "WHERE", allow_hyphen_values = true)]
    pub(crate) until: Option<End>,
    /// Stop after so many records.
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) count: Option<u64>,
    /// How to print a record: %t topic, %p partition, %o offset, %T timestamp (ms), %k key, %v value, %h headers,
    /// %s size of the value, %% a percent sign, \n, \t, \r, \0, \\, \xHH. Ends no line by itself.
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "json", allow_hyphen_values = true)]
    pub(crate) format: Option<Format>,
    /// Stop at the end, as with --until end.
    #[arg(long)]
    pub(crate) no_follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The topic.
    pub(crate) topic: String,
    /// The beginning: earliest, offset:N, time:RFC3339 (or milliseconds), or -DURATION (that long ago).
    #[arg(long, value_name = "WHERE", default_value = "earliest", allow_hyphen_values = true)]
    pub(crate) from: Start,
    /// The end, not included: end (what there is now), offset:N, time:T or -DURATION. Records are chosen by their
    /// timestamps, wherever they lie in the log.
    #[arg(long, value_name = "WHERE", default_value = "end", allow_hyphen_values = true)]
    pub(crate) until: End,
    /// Only this partition; may be given several times.
    #[arg(long, value_name = "N")]
    pub(crate) partition: Vec<u32>,
    /// max; real keeps the spacing of the timestamps; 10x is ten times as fast. Real and Nx put the partitions in the
    /// order of their timestamps.
    #[arg(long, value_name = "SPEED", default_value = "max")]
    pub(crate) speed: Speed,
    /// At most so many bytes of keys and values a second: 500000, 64KiB, 1MB.
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub(crate) rate: Option<u64>,
    /// Only records with this key (key=K) or header (header:H=V); several must all hold.
    #[arg(long = "where", value_name = "CONDITION")]
    pub(crate) conditions: Vec<Where>,
    /// A topic to append to, which must exist; or stdout. Keeps order, key, value, headers and timestamp, and the
    /// partition where both topics have as many.
    #[arg(long, value_name = "TOPIC", default_value = "stdout")]
    pub(crate) to: String,
    /// How to print a record; see `consume`.
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "json", allow_hyphen_values = true)]
    pub(crate) format: Option<Format>,
}
