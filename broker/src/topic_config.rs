//! The settings of a topic: one table of every key, with its type, default, bounds, meaning and broker-wide name.
//!
//! Owns: what a key may hold, which level a value came from (topic, broker, default), and the refusal of everything
//! else by a sentence that names the key and what is legal. Names, defaults and meanings are those of Apache Kafka 4
//! (<https://kafka.apache.org/documentation/#topicconfigs>); where one is ours, its text says so.
//! Refuses: storing values (the metadata does) and acting on them (partitions do).
//! Read next: [`crate::metadata`].

use headwater_proto::limits::MAX_BATCH_BYTES;
use std::collections::{BTreeMap, BTreeSet};

/// One setting of a topic.
#[derive(Debug)]
pub struct TopicKey {
    /// The topic's key.
    pub name: &'static str,
    /// The broker's keys that give every topic its default, strongest first, with what one unit of it is in units of
    /// the topic's key.
    pub broker_names: &'static [(&'static str, i64)],
    /// What a value may be.
    pub kind: Kind,
    /// The value where neither topic nor broker names one.
    pub default: &'static str,
    /// What it does, its unit, and what changing it costs.
    pub doc: &'static str,
}

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A whole number within bounds.
    Integer {
        /// Smallest legal value.
        min: i64,
        /// Largest legal value.
        max: i64,
        /// Whether -1 is legal too and means "no limit".
        unlimited: bool,
        /// What it counts.
        unit: &'static str,
    },
    /// A number from 0 to 1.
    Ratio,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One or more of these words, joined by commas.
    List(&'static [&'static str]),
}

/// The level a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Set for this topic.
    Topic,
    /// Set for every topic of the broker.
    Broker,
    /// Nobody set it.
    Default,
}

impl Source {
    /// The word shown to people and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Source::Topic => "topic",
            Source::Broker => "broker",
            Source::Default => "default",
        }
    }
}

/// Why a setting is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopicConfigError {
    /// No such key.
    #[error("{key} is no setting of a topic{hint}")]
    UnknownKey {
        /// The key that was given.
        key: String,
        /// The nearest legal key or the reason why a known one is missing, as the end of the sentence.
        hint: String,
    },
    /// A value that the key cannot hold.
    #[error("{key} cannot be {value:?}: it takes {legal}")]
    InvalidValue {
        /// The key.
        key: String,
        /// The value that was given.
        value: String,
        /// What is legal.
        legal: String,
    },
    /// One key, two values.
    #[error("{key} is given twice")]
    GivenTwice {
        /// The key.
        key: String,
    },
    /// Two values that are legal alone and senseless together.
    #[error("{key}={value} does not go with {other}={other_value}: {why}")]
    Contradiction {
        /// The first key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The second key.
        other: &'static str,
        /// Its value.
        other_value: String,
        /// What must hold.
        why: &'static str,
    },
}

/// How much of a record's way to stable storage an acknowledgement with acks=all waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopicDurability {
    /// Every in-sync replica has it on stable storage.
    Flushed,
    /// Every in-sync replica has it in memory (Kafka's promise); `flush.ms` bounds what a power loss can take.
    Replicated,
}

impl TopicDurability {
    /// The value of the key `durability`.
    pub const fn name(self) -> &'static str {
        match self {
            TopicDurability::Flushed => "flushed",
            TopicDurability::Replicated => "replicated",
        }
    }
}

/// Who stamps the records of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampSource {
    /// The producer.
    Create,
    /// The broker, when it appends.
    LogAppend,
}

/// Every setting of a topic, resolved over its levels and parsed. Each field is the key of the same name.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct TopicConfig {
    pub retention_ms: Option<u64>,
    pub retention_bytes: Option<u64>,
    pub segment_bytes: u32,
    pub segment_ms: u64,
    pub segment_index_bytes: u32,
    pub index_interval_bytes: u32,
    pub cleanup_delete: bool,
    pub cleanup_compact: bool,
    pub delete_retention_ms: u64,
    pub min_compaction_lag_ms: u64,
    pub max_compaction_lag_ms: u64,
    pub min_cleanable_dirty_ratio: f64,
    pub max_message_bytes: u32,
    pub message_timestamp_type: TimestampSource,
    pub message_timestamp_before_max_ms: u64,
    pub message_timestamp_after_max_ms: u64,
    pub min_insync_replicas: u32,
    pub durability: TopicDurability,
    pub flush_ms: u64,
}

/// Values that a broker gives every topic, under the topics' keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopicDefaults {
    /// Topic key -> (rank of the broker key that set it, value).
    values: BTreeMap<&'static str, (usize, String)>,
}

/// A setting as it is shown: key, value, and where the value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownSetting {
    /// The key.
    pub name: &'static str,
    /// The value in force, as text.
    pub value: String,
    /// Who set it.
    pub source: Source,
}

/// The values that a topic sets for itself.
pub type TopicValues = BTreeMap<String, String>;

const MAX: i64 = i64::MAX;
const MAX_TEXT: &str = "9223372036854775807";

const fn milliseconds(min: i64) -> Kind {
    Kind::Integer { min, max: MAX, unlimited: false, unit: "milliseconds" }
}

const fn bytes(min: i64, max: i64) -> Kind {
    Kind::Integer { min, max, unlimited: false, unit: "bytes" }
}

/// Every key, in the order in which it is shown.
pub const KEYS: &[TopicKey] = &[
    TopicKey {
        name: "cleanup.policy",
        broker_names: &[("log.cleanup.policy", 1)],
        kind: Kind::List(&["delete", "compact"]),
        default: "delete",
        doc: "What happens to old segments: `delete` removes them by age and size, `compact` keeps the last value of every key, `compact,delete` does both.",
    },
    TopicKey {
        name: "compression.type",
        broker_names: &[("compression.type", 1)],
        kind: Kind::Choice(&["producer"]),
        default: "producer",
        doc: "Batches are kept as the producer compressed them; the broker never compresses anew.",
    },
    TopicKey {
        name: "delete.retention.ms",
        broker_names: &[("log.cleaner.delete.retention.ms", 1)],
        kind: milliseconds(0),
        default: "86400000",
        doc: "How long compaction keeps tombstones, in milliseconds: the time a reader has to see a deletion.",
    },
    TopicKey {
        name: "durability",
        broker_names: &[("durability", 1)],
        kind: Kind::Choice(&["flushed", "replicated"]),
        default: "flushed",
        doc: "Headwater's own. What acks=all waits for: `flushed`, every in-sync replica has the record on stable storage; `replicated`, every in-sync replica has it in memory (what Kafka promises), and flush.ms bounds what a power loss can take.",
    },
    TopicKey {
        name: "flush.ms",
        broker_names: &[("log.flush.interval.ms", 1)],
        kind: milliseconds(1),
        default: "1000",
        doc: "Longest time that a written record stays unflushed where no acknowledgement waits for the flush, in milliseconds. Kafka's default is to leave it to the operating system; ours bounds what a power loss can take.",
    },
    TopicKey {
        name: "index.interval.bytes",
        broker_names: &[("log.index.interval.bytes", 1)],
        kind: bytes(0, i32::MAX as i64),
        default: "4096",
        doc: "Bytes of log between two entries of the offset index: fewer make seeks read less and the index larger.",
    },
    TopicKey {
        name: "max.compaction.lag.ms",
        broker_names: &[("log.cleaner.max.compaction.lag.ms", 1)],
        kind: milliseconds(1),
        default: MAX_TEXT,
        doc: "Longest time that a record stays out of reach of compaction, in milliseconds.",
    },
    TopicKey {
        name: "max.message.bytes",
        broker_names: &[("message.max.bytes", 1)],
        kind: bytes(0, MAX_BATCH_BYTES as i64),
        default: "1048588",
        doc: "Largest record batch taken in, in bytes, as it arrives (compressed, with its header).",
    },
    TopicKey {
        name: "message.timestamp.after.max.ms",
        broker_names: &[("log.message.timestamp.after.max.ms", 1)],
        kind: milliseconds(0),
        default: "3600000",
        doc: "How far a record's timestamp may lie ahead of the broker's clock, in milliseconds. Ignored with LogAppendTime.",
    },
    TopicKey {
        name: "message.timestamp.before.max.ms",
        broker_names: &[("log.message.timestamp.before.max.ms", 1)],
        kind: milliseconds(0),
        default: MAX_TEXT,
        doc: "How far a record's timestamp may lie behind the broker's clock, in milliseconds. Ignored with LogAppendTime.",
    },
    TopicKey {
        name: "message.timestamp.type",
        broker_names: &[("log.message.timestamp.type", 1)],
        kind: Kind::Choice(&["CreateTime", "LogAppendTime"]),
        default: "CreateTime",
        doc: "Who stamps records: the producer (CreateTime) or the broker as it appends (LogAppendTime).",
    },
    TopicKey {
        name: "min.cleanable.dirty.ratio",
        broker_names: &[("log.cleaner.min.cleanable.ratio", 1)],
        kind: Kind::Ratio,
        default: "0.5",
        doc: "Share of a compacted log that must be new before it is compacted again: less saves space and costs reading and writing.",
    },
    TopicKey {
        name: "min.compaction.lag.ms",
        broker_names: &[("log.cleaner.min.compaction.lag.ms", 1)],
        kind: milliseconds(0),
        default: "0",
        doc: "How long compaction leaves a new record alone, in milliseconds.",
    },
    TopicKey {
        name: "min.insync.replicas",
        broker_names: &[("min.insync.replicas", 1)],
        kind: Kind::Integer { min: 1, max: i32::MAX as i64, unlimited: false, unit: "replicas" },
        default: "1",
        doc: "In-sync replicas without which acks=all is refused. Set nowhere, it is a majority of the replicas that the topic is created with: 1 of 1, 2 of 3. With more than a topic has replicas, only acks=0 and acks=1 are taken.",
    },
    TopicKey {
        name: "retention.bytes",
        broker_names: &[("log.retention.bytes", 1)],
        kind: Kind::Integer { min: 0, max: MAX, unlimited: true, unit: "bytes" },
        default: "-1",
        doc: "Bytes of each partition that `delete` always keeps: the oldest segment goes while at least this much remains without it. -1: no limit.",
    },
    TopicKey {
        name: "retention.ms",
        broker_names: &[("log.retention.ms", 1), ("log.retention.minutes", 60_000), ("log.retention.hours", 3_600_000)],
        kind: Kind::Integer { min: 0, max: MAX, unlimited: true, unit: "milliseconds" },
        default: "604800000",
        doc: "How long `delete` keeps a segment after its largest record timestamp or its last append, whichever is later, in milliseconds. -1: no limit.",
    },
    TopicKey {
        name: "segment.bytes",
        broker_names: &[("log.segment.bytes", 1)],
        kind: bytes(4096, i32::MAX as i64),
        default: "1073741824",
        doc: "Size at which a segment is rolled, in bytes. Retention and compaction work on whole segments: smaller ones go sooner and cost more files.",
    },
    TopicKey {
        name: "segment.index.bytes",
        broker_names: &[("log.index.size.max.bytes", 1)],
        kind: bytes(12, i32::MAX as i64),
        default: "10485760",
        doc: "Largest size of an index file, in bytes; a full index rolls the segment.",
    },
    TopicKey {
        name: "segment.ms",
        broker_names: &[("log.roll.ms", 1), ("log.roll.hours", 3_600_000)],
        kind: milliseconds(1),
        default: "604800000",
        doc: "Age by record timestamp at which a segment is rolled even if it is not full, in milliseconds.",
    },
    TopicKey {
        name: UNCLEAN,
        broker_names: &[(UNCLEAN, 1)],
        kind: Kind::Choice(&["false", "true"]),
        default: "false",
        doc: "Whether a replica that may have missed acknowledged records leads where no other can: the partition is served, and what only the others had is lost. The broker's counts for topics that are created from then on.",
    },
];

/// Whether a replica that may have missed acknowledged records may lead.
const UNCLEAN: &str = "unclean.leader.election.enable";

const DELETED_AT_ONCE: &str = "the file of a deleted segment goes at once, and readers that hold it read on";

/// Keys that Kafka has and Headwater leaves out, with the reason.
const LEFT_OUT: &[(&str, &str)] = &[
    ("file.delete.delay.ms", DELETED_AT_ONCE),
    ("log.segment.delete.delay.ms", DELETED_AT_ONCE),
    ("flush.messages", "durability=flushed flushes before every acknowledgement, and flush.ms bounds the rest"),
    ("preallocate", "space is always reserved ahead"),
    ("segment.jitter.ms", "segments roll when they are due"),
    ("message.format.version", "records are always kept in format v2"),
    ("message.downconversion.enable", "records are always kept and served in format v2"),
    ("message.timestamp.difference.max.ms", "use message.timestamp.before.max.ms and message.timestamp.after.max.ms"),
    ("compression.gzip.level", "the broker never compresses anew"),
    ("compression.lz4.level", "the broker never compresses anew"),
    ("compression.zstd.level", "the broker never compresses anew"),
    ("remote.storage.enable", "there is no tiered storage"),
    ("local.retention.ms", "there is no tiered storage"),
    ("local.retention.bytes", "there is no tiered storage"),
    ("leader.replication.throttled.replicas", "replication is not throttled per topic"),
    ("follower.replication.throttled.replicas", "replication is not throttled per topic"),
];

/// Why a key that Kafka has is missing here.
pub(crate) fn left_out(name: &str) -> Option<&'static str> {
    LEFT_OUT.iter().find(|(left_out, _)| *left_out == name).map(|(_, why)| *why)
}

/// The table's row for a topic's key.
pub fn key(name: &str) -> Option<&'static TopicKey> {
    KEYS.iter().find(|key| key.name == name)
}

/// The legal name most like `given`, if one is near enough to be what was meant.
pub fn nearest<'a>(given: &str, legal: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    legal
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(given, name), name))
        .min()
        .filter(|(distance, name)| *distance <= 2 + name.len() / 5)
        .map(|(_, name)| name)
}

impl TopicKey {
    /// Whether the key can hold this value; the value in its shown form.
    ///
    /// # Errors
    /// [`TopicConfigError::InvalidValue`] with what is legal.
    pub fn check(&self, value: &str) -> Result<String, TopicConfigError> {
        let value = value.trim();
        let shown = match self.kind {
            Kind::Integer { min, max, unlimited, .. } => value
                .parse::<i64>()
                .ok()
                .filter(|number| (min..=max).contains(number) || (unlimited && *number == -1))
                .map(|number| number.to_string()),
            Kind::Ratio => {
                value.parse::<f64>().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).map(|ratio| ratio.to_string())
            }
            Kind::Choice(words) => words.contains(&value).then(|| value.to_owned()),
            Kind::List(words) => {
                let given: Vec<&str> = value.split(',').map(str::trim).collect();
                let distinct: BTreeSet<&str> = given.iter().copied().collect();
                (distinct.len() == given.len() && given.iter().all(|word| words.contains(word)))
                    .then(|| given.join(","))
            }
        };
        shown.ok_or_else(|| TopicConfigError::InvalidValue {
            key: self.name.to_owned(),
            value: value.to_owned(),
            legal: self.legal(),
        })
    }

    /// What the key takes, in words.
    pub fn legal(&self) -> String {
        match self.kind {
            Kind::Integer { min, max, unlimited, unit } => {
                let bounds = match max {
                    MAX => format!("a whole number of {unit}, {min} or more"),
                    _ => format!("a whole number of {unit} from {min} to {max}"),
                };
                if unlimited { format!("{bounds}, or -1 for no limit") } else { bounds }
            }
            Kind::Ratio => "a number from 0 to 1".to_owned(),
            Kind::Choice([only]) => format!("only {only}"),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::List(words) => format!("one or more of {}, joined by commas", words.join(", ")),
        }
    }

    /// What one of its broker names takes, of which a unit is `factor` of the topic's: such a name ends in its unit.
    pub fn broker_legal(&self, name: &str, factor: i64) -> String {
        match self.kind {
            Kind::Integer { min, unlimited, .. } if factor != 1 => {
                let unit = name.rsplit('.').next().unwrap_or(name);
                let limit = if unlimited { ", or -1 for no limit" } else { "" };
                format!("a whole number of {unit}, {} or more{limit}", (min + factor - 1) / factor)
            }
            _ => self.legal(),
        }
    }
}

impl TopicDefaults {
    /// No broker-wide value at all.
    pub fn new() -> TopicDefaults {
        TopicDefaults::default()
    }

    /// Takes a key of the broker's configuration. `Ok(false)`: it is not about topics.
    ///
    /// # Errors
    /// [`TopicConfigError::InvalidValue`] naming the broker's key.
    pub fn set(&mut self, broker_key: &str, value: &str) -> Result<bool, TopicConfigError> {
        let found = KEYS.iter().find_map(|key| {
            let rank = key.broker_names.iter().position(|(name, _)| *name == broker_key)?;
            Some((key, rank, key.broker_names.get(rank)?.1))
        });
        let Some((key, rank, factor)) = found else { return Ok(false) };
        let refused = || TopicConfigError::InvalidValue {
            key: broker_key.to_owned(),
            value: value.to_owned(),
            legal: key.broker_legal(broker_key, factor),
        };
        let scaled = match factor {
            1 => value.to_owned(),
            _ => match value.trim().parse::<i64>().map_err(|_| refused())? {
                -1 => "-1".to_owned(),
                number => number.checked_mul(factor).ok_or_else(refused)?.to_string(),
            },
        };
        let shown = key.check(&scaled).map_err(|_| refused())?;
        match self.values.get(key.name) {
            Some((stronger, _)) if *stronger < rank => {}
            _ => {
                self.values.insert(key.name, (rank, shown));
            }
        }
        Ok(true)
    }

    /// Every broker key that [`set`](Self::set) takes.
    pub fn broker_names() -> impl Iterator<Item = &'static str> {
        KEYS.iter().flat_map(|key| key.broker_names.iter().map(|(name, _)| *name))
    }

    /// What counts for a topic of so many replicas that has no `min.insync.replicas` of its own: what the broker says, or a majority.
    pub(crate) fn min_insync_replicas(&self, replication_factor: u32) -> u32 {
        let set = self.get("min.insync.replicas").and_then(|value| value.parse().ok());
        set.unwrap_or(replication_factor / 2 + 1)
    }

    /// What a new topic says itself from then on, though it was not asked to: elections go by the metadata alone.
    pub(crate) fn of_new_topic(&self, mut own: TopicValues) -> TopicValues {
        if let Some(unclean) = self.get(UNCLEAN) {
            own.entry(UNCLEAN.to_owned()).or_insert_with(|| unclean.to_owned());
        }
        own
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(_, value)| value.as_str())
    }
}

/// A topic's own values after `changes` (`None` takes a value back to the broker's).
///
/// # Errors
/// [`TopicConfigError`]: the first key or value that is not legal, alone or together with the others.
pub fn change(
    current: &TopicValues,
    changes: impl IntoIterator<Item = (String, Option<String>)>,
    defaults: &TopicDefaults,
) -> Result<TopicValues, TopicConfigError> {
    let mut values = current.clone();
    let mut seen = BTreeSet::new();
    for (name, value) in changes {
        let row = key(&name).ok_or_else(|| unknown(&name))?;
        if !seen.insert(row.name) {
            return Err(TopicConfigError::GivenTwice { key: name });
        }
        match value {
            Some(value) => values.insert(name, row.check(&value)?),
            None => values.remove(&name),
        };
    }
    TopicConfig::resolve(&values, defaults)?;
    Ok(values)
}

/// Every setting as it is in force, with its source, in the order of [`KEYS`]. `min_insync_replicas`: what the metadata say of the topic.
pub fn shown(values: &TopicValues, min_insync_replicas: u32, defaults: &TopicDefaults) -> Vec<ShownSetting> {
    KEYS.iter()
        .map(|key| {
            let (value, source) = in_force(key, values, defaults);
            match key.name {
                // It was decided when the topic was created, by its replicas or by the settings of then.
                "min.insync.replicas" if source != Source::Topic => {
                    let in_force = min_insync_replicas.to_string();
                    let source = if source == Source::Broker && in_force == value { source } else { Source::Default };
                    ShownSetting { name: key.name, value: in_force, source }
                }
                name => ShownSetting { name, value: value.to_owned(), source },
            }
        })
        .collect()
}

impl TopicConfig {
    /// The settings in force for a topic with these values.
    ///
    /// # Errors
    /// [`TopicConfigError`] if a value is not legal, or two do not go together.
    pub fn resolve(values: &TopicValues, defaults: &TopicDefaults) -> Result<TopicConfig, TopicConfigError> {
        if let Some(name) = values.keys().find(|name| key(name).is_none()) {
            return Err(unknown(name));
        }
        let text = |name: &'static str| -> Result<String, TopicConfigError> {
            let row = key(name).ok_or_else(|| unknown(name))?;
            row.check(in_force(row, values, defaults).0)
        };
        let number = |name: &'static str| -> Result<i64, TopicConfigError> {
            let value = text(name)?;
            value.parse().map_err(|_| TopicConfigError::InvalidValue {
                key: name.to_owned(),
                value,
                legal: "a whole number".to_owned(),
            })
        };
        let unsigned = |name| number(name).map(i64::unsigned_abs);
        let small = |name| number(name).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let limit = |name| number(name).map(|n| u64::try_from(n).ok());
        let policy = text("cleanup.policy")?;
        let config = TopicConfig {
            retention_ms: limit("retention.ms")?,
            retention_bytes: limit("retention.bytes")?,
            segment_bytes: small("segment.bytes")?,
            segment_ms: unsigned("segment.ms")?,
            segment_index_bytes: small("segment.index.bytes")?,
            index_interval_bytes: small("index.interval.bytes")?,
            cleanup_delete: policy.split(',').any(|word| word == "delete"),
            cleanup_compact: policy.split(',').any(|word| word == "compact"),
            delete_retention_ms: unsigned("delete.retention.ms")?,
            min_compaction_lag_ms: unsigned("min.compaction.lag.ms")?,
            max_compaction_lag_ms: unsigned("max.compaction.lag.ms")?,
            min_cleanable_dirty_ratio: text("min.cleanable.dirty.ratio")?.parse().unwrap_or(0.5),
            // A segment holds at least one batch.
            max_message_bytes: small("max.message.bytes")?.min(small("segment.bytes")?),
            message_timestamp_type: match text("message.timestamp.type")?.as_str() {
                "LogAppendTime" => TimestampSource::LogAppend,
                _ => TimestampSource::Create,
            },
            message_timestamp_before_max_ms: unsigned("message.timestamp.before.max.ms")?,
            message_timestamp_after_max_ms: unsigned("message.timestamp.after.max.ms")?,
            min_insync_replicas: small("min.insync.replicas")?,
            durability: match text("durability")?.as_str() {
                "replicated" => TopicDurability::Replicated,
                _ => TopicDurability::Flushed,
            },
            flush_ms: unsigned("flush.ms")?,
        };
        if config.min_compaction_lag_ms > config.max_compaction_lag_ms {
            return Err(TopicConfigError::Contradiction {
                key: "min.compaction.lag.ms",
                value: config.min_compaction_lag_ms.to_string(),
                other: "max.compaction.lag.ms",
                other_value: config.max_compaction_lag_ms.to_string(),
                why: "the smallest lag must not be above the largest",
            });
        }
        Ok(config)
    }
}

impl Default for TopicConfig {
    fn default() -> Self {
        TopicConfig::resolve(&TopicValues::new(), &TopicDefaults::new()).expect("the table's defaults are legal")
    }
}

fn in_force<'a>(key: &'a TopicKey, values: &'a TopicValues, defaults: &'a TopicDefaults) -> (&'a str, Source) {
    match (values.get(key.name), defaults.get(key.name)) {
        (Some(value), _) => (value, Source::Topic),
        (None, Some(value)) => (value, Source::Broker),
        (None, None) => (key.default, Source::Default),
    }
}

fn unknown(name: &str) -> TopicConfigError {
    let hint = if let Some(why) = left_out(name) {
        format!(" here, though Kafka has it: {why}")
    } else if let Some(key) = KEYS.iter().find(|key| key.broker_names.iter().any(|(broker, _)| *broker == name)) {
        format!(": it is a broker's; a topic's is {}", key.name)
    } else if let Some(near) = nearest(name, KEYS.iter().map(|key| key.name)) {
        format!("; did you mean {near}?")
    } else {
        format!("; there are {}", KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", "))
    };
    TopicConfigError::UnknownKey { key: name.to_owned(), hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, &str)]) -> Result<TopicValues, TopicConfigError> {
        let changes = pairs.iter().map(|(key, value)| ((*key).to_owned(), Some((*value).to_owned())));
        change(&TopicValues::new(), changes, &TopicDefaults::new())
    }

    fn refusal(name: &str, value: &str) -> String {
        set(&[(name, value)]).expect_err("refused").to_string()
    }

    #[test]
    fn every_default_is_legal_and_stands_in_its_shown_form() {
        for key in KEYS {
            assert_eq!(key.check(key.default).as_deref(), Ok(key.default), "{}", key.name);
        }
        let config = TopicConfig::default();
        assert_eq!((config.retention_ms, config.retention_bytes), (Some(604_800_000), None));
        assert_eq!((config.segment_bytes, config.max_message_bytes), (1 << 30, 1_048_588));
        assert_eq!(config.message_timestamp_before_max_ms, i64::MAX as u64);
        assert!(config.cleanup_delete && !config.cleanup_compact);
    }

    #[test]
    fn no_name_stands_twice_in_the_table() {
        let mut topic = BTreeSet::new();
        let mut broker = BTreeSet::new();
        for key in KEYS {
            assert!(topic.insert(key.name), "{}", key.name);
            assert!(!key.doc.is_empty() && !key.broker_names.is_empty());
            for (name, _) in key.broker_names {
                assert!(broker.insert(*name), "{name}");
            }
        }
        assert!(LEFT_OUT.iter().all(|(name, _)| !topic.contains(name)));
        assert!(KEYS.is_sorted_by_key(|key| key.name));
    }

    #[test]
    fn refusals_name_the_key_and_what_is_legal() {
        assert_eq!(refusal("retention.mss", "1"), "retention.mss is no setting of a topic; did you mean retention.ms?");
        assert_eq!(
            refusal("log.retention.hours", "1"),
            "log.retention.hours is no setting of a topic: it is a broker's; a topic's is retention.ms"
        );
        assert!(refusal("flush.messages", "1").contains("durability=flushed"));
        assert!(refusal("file.delete.delay.ms", "1").contains("goes at once"));
        assert!(refusal("colour", "red").contains("cleanup.policy"));
        assert_eq!(
            refusal("retention.ms", "soon"),
            "retention.ms cannot be \"soon\": it takes a whole number of milliseconds, 0 or more, or -1 for no limit"
        );
        assert_eq!(
            refusal("max.message.bytes", "67108865"),
            "max.message.bytes cannot be \"67108865\": it takes a whole number of bytes from 0 to 67108864"
        );
        assert_eq!(refusal("compression.type", "zstd"), "compression.type cannot be \"zstd\": it takes only producer");
        assert!(refusal("min.cleanable.dirty.ratio", "NaN").contains("from 0 to 1"));
        for policy in ["", "delete,", "delete,delete", "shred"] {
            assert!(refusal("cleanup.policy", policy).contains("joined by commas"), "{policy}");
        }
    }

    #[test]
    fn every_integer_is_held_to_its_bounds() {
        for key in KEYS {
            let Kind::Integer { min, max, unlimited, .. } = key.kind else { continue };
            assert!(key.check(&min.to_string()).is_ok() && key.check(&max.to_string()).is_ok());
            assert_eq!(key.check("-1").is_ok(), unlimited, "{}", key.name);
            assert!(key.check("-2").is_err() && key.check("1e3").is_err() && key.check("").is_err());
            if max < i64::MAX {
                assert!(key.check(&(max + 1).to_string()).is_err());
            }
        }
    }

    #[test]
    fn values_come_from_the_topic_before_the_broker_before_the_default() {
        let mut defaults = TopicDefaults::new();
        assert_eq!(defaults.set("log.retention.hours", "1"), Ok(true));
        assert_eq!(defaults.set("log.retention.ms", "5000"), Ok(true));
        assert_eq!(defaults.set("log.retention.minutes", "9"), Ok(true));
        assert_eq!(defaults.set("log.segment.bytes", "1048576"), Ok(true));
        assert_eq!(defaults.set("listen", "anything"), Ok(false));
        let values = set(&[("segment.bytes", "2097152")]).expect("legal");
        let shown = shown(&values, 2, &defaults);
        let of = |name: &str| {
            let setting = shown.iter().find(|setting| setting.name == name).expect("shown");
            (setting.value.as_str(), setting.source)
        };
        assert_eq!(of("retention.ms"), ("5000", Source::Broker));
        assert_eq!(of("segment.bytes"), ("2097152", Source::Topic));
        assert_eq!(of("flush.ms"), ("1000", Source::Default));
        assert_eq!(of("min.insync.replicas"), ("2", Source::Default), "what the metadata say");
        assert_eq!(shown.len(), KEYS.len());
        let back = change(&values, [("segment.bytes".to_owned(), None)], &defaults).expect("legal");
        assert_eq!(TopicConfig::resolve(&back, &defaults).map(|config| config.segment_bytes), Ok(1_048_576));
    }

    #[test]
    fn a_new_topic_takes_along_what_the_broker_says_of_unclean_elections() {
        let mut defaults = TopicDefaults::new();
        assert_eq!(defaults.of_new_topic(TopicValues::new()), TopicValues::new());
        assert_eq!(defaults.set(UNCLEAN, "true"), Ok(true));
        assert_eq!(defaults.of_new_topic(TopicValues::new()), set(&[(UNCLEAN, "true")]).expect("legal"));
        let own = set(&[(UNCLEAN, "false")]).expect("legal");
        assert_eq!(defaults.of_new_topic(own.clone()), own);
    }

    #[test]
    fn broker_keys_refuse_by_their_own_names() {
        let mut defaults = TopicDefaults::new();
        let refused = defaults.set("log.retention.hours", "9223372036854775807").expect_err("overflow").to_string();
        assert!(refused.starts_with("log.retention.hours cannot be"), "{refused}");
        assert!(defaults.set("log.segment.bytes", "12").expect_err("small").to_string().contains("log.segment.bytes"));
        assert_eq!(defaults, TopicDefaults::new());
        assert_eq!(defaults.set("log.retention.hours", "-1"), Ok(true));
        assert_eq!(defaults.get("retention.ms"), Some("-1"));
    }

    #[test]
    fn values_that_contradict_each_other_are_refused() {
        let refused = set(&[("min.compaction.lag.ms", "10"), ("max.compaction.lag.ms", "5")]).expect_err("refused");
        assert!(refused.to_string().contains("min.compaction.lag.ms=10 does not go with max.compaction.lag.ms=5"));
        let twice = set(&[("flush.ms", "1"), ("flush.ms", "2")]).expect_err("refused");
        assert_eq!(twice, TopicConfigError::GivenTwice { key: "flush.ms".into() });
    }
}
