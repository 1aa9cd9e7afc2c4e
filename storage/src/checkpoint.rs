//! Kafka's small text files, and the names of files and folders.
//!
//! Owns: the checkpoints of the data root, `partition.metadata`, `meta.properties`, and how partition folders and
//! segment files are called. Refuses: what the numbers mean (`datadir.rs`, `log.rs`). Every write goes aside, is synced and
//! renamed over, and the directory is synced. Read next: `datadir.rs`.
//!
//! ```text
//! *-offset-checkpoint   "0\n" (version)  "2\n" (entries)  then per line: topic, partition, offset
//! partition.metadata    "version: 0\n" "topic_id: <base64>"
//! meta.properties       key=value lines; ours: version=1, cluster.id, node.id, directory.id, headwater.format
//! headwater-log-start-offsets   ours: the text of log-start-offset-checkpoint, then its CRC-32 in hexadecimal and "\n"
//! headwater-replicas    ours: as a checkpoint, per line: topic, partition, topic id, offset, unclean elections; then its CRC-32
//! ```
//!
//! Where a log begins stands in no other file: without it, records that somebody deleted would be served again, and with a wrong
//! one, segments that nobody deleted would go. So it is kept twice, the second time under a checksum.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use headwater_proto::TopicId;
use imbl::OrdMap;

use crate::epochs::TextFault;
use crate::error::{During, IoFailure};
use crate::files::{self, Files};

/// How far each log was flushed.
pub const RECOVERY_POINTS: &str = "recovery-point-offset-checkpoint";
/// Each log's high watermark.
pub const HIGH_WATERMARKS: &str = "replication-offset-checkpoint";
/// Where each log begins, where that is not the beginning of its first segment.
pub const LOG_START_OFFSETS: &str = "log-start-offset-checkpoint";
/// The same once more, under a checksum; ours.
pub const LOG_START_COPY: &str = "headwater-log-start-offsets";
/// What is known of each replica outside of its folder; ours.
pub const REPLICAS: &str = "headwater-replicas";
/// Up to where each compacted log is clean.
pub const CLEANER_OFFSETS: &str = "cleaner-offset-checkpoint";
/// Names the topic that a partition's folder belongs to.
pub const PARTITION_METADATA: &str = "partition.metadata";
/// Names the cluster and the broker that a data root belongs to.
pub const META_PROPERTIES: &str = "meta.properties";
/// Says that everything in the data root is complete.
pub const CLEAN_SHUTDOWN: &str = ".kafka_cleanshutdown";
/// Locked while a broker uses the data root.
pub const LOCK: &str = ".lock";

/// The version of everything that Headwater adds to Kafka's layout.
pub const FORMAT_VERSION: u32 = 1;

/// An offset for each partition, by topic name and partition number.
pub type PartitionOffsets = OrdMap<(String, u32), i64>;

/// What is known of a replica outside of its folder, so that it is noticed when that is gone, or holds less than it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptReplica {
    /// The topic that it belongs to.
    pub topic_id: TopicId,
    /// Everything below was flushed; more may have been since.
    pub flushed: i64,
    /// How many unclean elections of the partition it has taken in.
    pub unclean_taken: u32,
}

/// The replicas that a broker keeps, by topic name and partition number.
pub type KeptReplicas = OrdMap<(String, u32), KeptReplica>;

/// Largest checkpoint file that is read, in bytes (a million partitions with long names).
const MAX_CHECKPOINT_BYTES: u64 = 256 << 20;

/// Why a checkpoint could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The disk or the operating system.
    #[error(transparent)]
    Io(#[from] IoFailure),
    /// The file's text makes no sense.
    #[error("{} is damaged at line {}: {}", path.display(), fault.line, fault.detail)]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where and how.
        fault: TextFault,
    },
}

/// Reads a checkpoint of the data root; a missing one is empty.
pub fn read_offsets(files: &dyn Files, root: &Path, name: &str) -> Result<PartitionOffsets, CheckpointError> {
    let path = root.join(name);
    match files::read(files, &path, MAX_CHECKPOINT_BYTES) {
        Ok(bytes) => decode_offsets(&bytes).map_err(|fault| CheckpointError::Damaged { path, fault }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(PartitionOffsets::new()),
        Err(error) => Err(IoFailure::new("read", &path, error).into()),
    }
}

/// Writes a checkpoint of the data root.
pub fn write_offsets(files: &dyn Files, root: &Path, name: &str, offsets: &PartitionOffsets) -> Result<(), IoFailure> {
    let path = root.join(name);
    files::replace(files, &path, encode_offsets(offsets).as_bytes()).during("write", &path)
}

/// Where the logs begin, by the two files that say so.
#[derive(Debug, Default)]
pub struct LogStarts {
    /// What counts.
    pub offsets: PartitionOffsets,
    /// Whether both files say just that.
    pub twice: bool,
    /// A file that is damaged or unreadable.
    pub fault: Option<CheckpointError>,
}

/// Reads [`LOG_START_OFFSETS`] and its copy. The copy counts, if it is whole: it has a checksum and is written first.
///
/// # Errors
/// The first file's, where neither of them says anything.
pub fn read_log_starts(files: &dyn Files, root: &Path) -> Result<LogStarts, CheckpointError> {
    let first = read_offsets(files, root, LOG_START_OFFSETS);
    let path = root.join(LOG_START_COPY);
    let copy = match files::read(files, &path, MAX_CHECKPOINT_BYTES) {
        Ok(bytes) => decode_copy(&bytes).map(Some).map_err(|fault| CheckpointError::Damaged { path, fault }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IoFailure::new("read", &path, error).into()),
    };
    match (first, copy) {
        (first, Ok(Some(offsets))) => {
            let twice = first.as_ref().is_ok_and(|first| *first == offsets);
            Ok(LogStarts { offsets, twice, fault: first.err() })
        }
        // Kafka's directories have no copy, and those of a broker that never wrote one.
        (Ok(offsets), Ok(None)) => Ok(LogStarts { twice: offsets.is_empty(), offsets, fault: None }),
        (Ok(offsets), Err(fault)) => Ok(LogStarts { offsets, twice: false, fault: Some(fault) }),
        // The other one may be whole, once it can be read.
        (Err(_), Err(CheckpointError::Io(failure))) => Err(failure.into()),
        (Err(fault), Ok(None) | Err(_)) => Err(fault),
    }
}

/// Writes [`LOG_START_OFFSETS`], its copy first.
///
/// # Errors
/// [`IoFailure`]: the copy may have been written.
pub fn write_log_starts(files: &dyn Files, root: &Path, offsets: &PartitionOffsets) -> Result<(), IoFailure> {
    let path = root.join(LOG_START_COPY);
    files::replace(files, &path, encode_copy(offsets).as_bytes()).during("write", &path)?;
    write_offsets(files, root, LOG_START_OFFSETS, offsets)
}

fn encode_copy(offsets: &PartitionOffsets) -> String {
    with_sum(encode_offsets(offsets))
}

fn decode_copy(bytes: &[u8]) -> Result<PartitionOffsets, TextFault> {
    decode_offsets(without_sum(bytes)?)
}

/// Reads what is known of replicas; `None` if nobody ever wrote it.
pub fn read_replicas(files: &dyn Files, root: &Path) -> Result<Option<KeptReplicas>, CheckpointError> {
    let path = root.join(REPLICAS);
    match files::read(files, &path, MAX_CHECKPOINT_BYTES) {
        Ok(bytes) => match decode_replicas(&bytes) {
            Ok(replicas) => Ok(Some(replicas)),
            Err(fault) => Err(CheckpointError::Damaged { path, fault }),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IoFailure::new("read", &path, error).into()),
    }
}

/// Writes what is known of replicas.
pub fn write_replicas(files: &dyn Files, root: &Path, replicas: &KeptReplicas) -> Result<(), IoFailure> {
    let path = root.join(REPLICAS);
    files::replace(files, &path, encode_replicas(replicas).as_bytes()).during("write", &path)
}

fn encode_replicas(replicas: &KeptReplicas) -> String {
    let mut text = format!("0\n{}\n", replicas.len());
    for ((topic, partition), KeptReplica { topic_id, flushed, unclean_taken }) in replicas {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{topic} {partition} {topic_id} {flushed} {unclean_taken}");
    }
    with_sum(text)
}

fn decode_replicas(bytes: &[u8]) -> Result<KeptReplicas, TextFault> {
    let mut replicas = KeptReplicas::new();
    for (line, fields) in checkpoint_lines(without_sum(bytes)?)? {
        let fault = |detail: &str| TextFault { line, detail: detail.into() };
        let [topic, partition, topic_id, flushed, unclean_taken] = fields[..] else {
            return Err(fault("expected topic, partition, topic id, offset, unclean elections"));
        };
        let replica = KeptReplica {
            topic_id: topic_id.parse().map_err(|_| fault("not a topic id"))?,
            flushed: flushed.parse().map_err(|_| fault("not an offset"))?,
            unclean_taken: unclean_taken.parse().map_err(|_| fault("not a number of elections"))?,
        };
        let partition: u32 = partition.parse().map_err(|_| fault("not a partition"))?;
        if replicas.insert((topic.to_owned(), partition), replica).is_some() {
            return Err(fault("a partition that was named before"));
        }
    }
    Ok(replicas)
}

/// A text with its CRC-32 below it.
fn with_sum(text: String) -> String {
    let sum = crc32fast::hash(text.as_bytes());
    format!("{text}{sum:08x}\n")
}

fn without_sum(bytes: &[u8]) -> Result<&[u8], TextFault> {
    const SUM_LINE_BYTES: usize = 9;
    let (text, sum) = bytes.split_at(bytes.len().saturating_sub(SUM_LINE_BYTES));
    if sum != format!("{:08x}\n", crc32fast::hash(text)).as_bytes() {
        let line = 1 + bytes.iter().filter(|byte| **byte == b'\n').count().saturating_sub(1);
        return Err(TextFault { line, detail: "the checksum does not fit the text".into() });
    }
    Ok(text)
}

/// The text of a checkpoint of the data root.
pub fn encode_offsets(offsets: &PartitionOffsets) -> String {
    let mut text = format!("0\n{}\n", offsets.len());
    for ((topic, partition), offset) in offsets {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{topic} {partition} {offset}");
    }
    text
}

/// Reads the text of a checkpoint of the data root.
pub fn decode_offsets(bytes: &[u8]) -> Result<PartitionOffsets, TextFault> {
    let mut offsets = PartitionOffsets::new();
    for (line, fields) in checkpoint_lines(bytes)? {
        let fault = |detail: &str| TextFault { line, detail: detail.into() };
        let [topic, partition, offset] = fields[..] else { return Err(fault("expected topic, partition, offset")) };
        let partition: u32 = partition.parse().map_err(|_| fault("not a partition"))?;
        let offset: i64 = offset.parse().map_err(|_| fault("not an offset"))?;
        if offset < 0 {
            return Err(fault("a negative offset"));
        }
        if offsets.insert((topic.to_owned(), partition), offset).is_some() {
            return Err(fault("a partition that was named before"));
        }
    }
    Ok(offsets)
}

fn text_of(bytes: &[u8]) -> Result<&str, TextFault> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.iter().take(error.valid_up_to());
        TextFault { line: 1 + before.filter(|byte| **byte == b'\n').count(), detail: "not text".into() }
    })
}

/// The entries of a version 0 checkpoint, each with the number of its line and split at its spaces.
pub(crate) fn checkpoint_lines(bytes: &[u8]) -> Result<Vec<(usize, Vec<&str>)>, TextFault> {
    let fault = |line: usize, detail: String| TextFault { line, detail };
    let text = text_of(bytes)?;
    let mut lines = text.lines();
    match lines.next() {
        Some("0") => {}
        Some(version) => return Err(fault(1, format!("version {version:?}, expected 0"))),
        None => return Err(fault(1, "the file is empty".into())),
    }
    let expected: usize = lines
        .next()
        .and_then(|count| count.parse().ok())
        .ok_or_else(|| fault(2, "expected the number of entries".into()))?;
    let entries: Vec<(usize, Vec<&str>)> =
        lines.enumerate().map(|(number, line)| (number + 3, line.split_whitespace().collect())).collect();
    if entries.len() != expected {
        return Err(fault(2, format!("{expected} entries were announced, {} are there", entries.len())));
    }
    // A last number that lost its digits would still be a number.
    if !entries.is_empty() && !text.ends_with('\n') {
        return Err(fault(entries.len() + 2, "the last line is cut short".into()));
    }
    Ok(entries)
}

/// Reads a partition folder's `partition.metadata`; `None` if there is none.
pub fn read_partition_metadata(files: &dyn Files, partition_dir: &Path) -> Result<Option<TopicId>, CheckpointError> {
    let path = partition_dir.join(PARTITION_METADATA);
    let bytes = match files::read(files, &path, 4096) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(IoFailure::new("read", &path, error).into()),
    };
    decode_partition_metadata(&bytes).map(Some).map_err(|fault| CheckpointError::Damaged { path, fault })
}

/// Writes a partition folder's `partition.metadata`.
pub fn write_partition_metadata(files: &dyn Files, partition_dir: &Path, topic_id: TopicId) -> Result<(), IoFailure> {
    let path = partition_dir.join(PARTITION_METADATA);
    files::replace(files, &path, format!("version: 0\ntopic_id: {topic_id}").as_bytes()).during("write", &path)
}

/// Where the line with the topic's id begins.
pub(crate) const METADATA_SECOND_LINE_AT: u64 = "version: 0\n".len() as u64;

fn decode_partition_metadata(bytes: &[u8]) -> Result<TopicId, TextFault> {
    let fault = |line: usize, detail: &str| TextFault { line, detail: detail.into() };
    let text = text_of(bytes)?;
    let mut lines = text.lines();
    if lines.next() != Some("version: 0") {
        return Err(fault(1, "expected \"version: 0\""));
    }
    let id = lines.next().and_then(|line| line.strip_prefix("topic_id: ")).ok_or(fault(2, "expected a topic id"))?;
    id.trim_end().parse().map_err(|_| fault(2, "not a topic id"))
}

/// What `meta.properties` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaProperties {
    /// The cluster.
    pub cluster_id: String,
    /// The broker.
    pub broker_id: u32,
    /// This data root.
    pub directory_id: String,
    /// Version of our additions to Kafka's layout; `None` in a root that Kafka made.
    pub format_version: Option<u32>,
}

impl MetaProperties {
    /// The file's text.
    pub fn encode(&self) -> String {
        let mut text = format!(
            "version=1\ncluster.id={}\nnode.id={}\ndirectory.id={}\n",
            self.cluster_id, self.broker_id, self.directory_id
        );
        if let Some(version) = self.format_version {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "headwater.format={version}");
        }
        text
    }

    /// Reads the file's text, ours or Kafka's.
    pub fn decode(bytes: &[u8]) -> Result<MetaProperties, TextFault> {
        let fault = |line: usize, detail: &str| TextFault { line, detail: detail.into() };
        let text = text_of(bytes)?;
        let mut found: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = line.split_once('=').ok_or_else(|| fault(number + 1, "expected key=value"))?;
            found.insert(key.trim(), (number + 1, value.trim()));
        }
        // A last number that lost its digits would still be a number, so an end without a newline may be none: also where an editor
        // left it off, who is told.
        if found.contains_key("headwater.format") && !text.ends_with('\n') {
            let detail = "the last line has no end and may be cut short; if it is whole, end it with a newline";
            return Err(fault(text.lines().count(), detail));
        }
        let text_of = |key: &str| found.get(key).map(|(_, value)| (*value).to_owned());
        let broker = found.get("node.id").or_else(|| found.get("broker.id"));
        let (line, broker) = broker.ok_or_else(|| fault(1, "no node.id"))?;
        Ok(MetaProperties {
            cluster_id: text_of("cluster.id").ok_or_else(|| fault(1, "no cluster.id"))?,
            broker_id: broker.parse().map_err(|_| fault(*line, "not a broker id"))?,
            directory_id: text_of("directory.id").unwrap_or_default(),
            format_version: match found.get("headwater.format") {
                Some((line, version)) => Some(version.parse().map_err(|_| fault(*line, "not a version"))?),
                None => None,
            },
        })
    }
}

/// The folder of a partition, in the data root.
pub fn partition_dir_name(topic: &str, partition: u32) -> String {
    format!("{topic}-{partition}")
}

/// Topic and partition of a folder's name; `None` for folders that hold no partition (any more).
pub fn parse_partition_dir_name(name: &str) -> Option<(String, u32)> {
    let (topic, partition) = name.rsplit_once('-')?;
    let number: u32 = partition.parse().ok()?;
    // Kafka marks folders that are being deleted or moved with a dot and a suffix; and only one spelling names a partition.
    let canonical = !topic.is_empty() && number.to_string() == partition && partition_dir_name(topic, number) == name;
    canonical.then(|| (topic.to_owned(), number))
}

/// The file of a segment: its base offset with twenty digits, and an extension such as `.log`.
pub fn segment_file_name(base_offset: i64, extension: &str) -> String {
    format!("{base_offset:020}{extension}")
}

/// Base offset and extension (everything from the first dot on) of a segment's file.
pub fn parse_segment_file_name(name: &str) -> Option<(i64, &str)> {
    let (digits, extension) = name.split_at_checked(20)?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && extension.starts_with('.');
    plain.then(|| digits.parse().ok().map(|base_offset| (base_offset, extension))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kafkas_checkpoint_comes_back() {
        let text = "0\n2\n__consumer_offsets 1 6\ntrimmed 0 333\n";
        let offsets = decode_offsets(text.as_bytes()).unwrap();
        assert_eq!(offsets[&("trimmed".to_owned(), 0)], 333);
        assert_eq!(encode_offsets(&offsets), text);
        assert_eq!(decode_offsets(b"0\n0\n"), Ok(PartitionOffsets::new()));
    }

    #[test]
    fn damaged_checkpoints_name_the_line() {
        for (bad, line) in [
            ("", 1),
            ("1\n0\n", 1),
            ("0\n", 2),
            ("0\n2\na 0 1\n", 2),
            ("0\n1\na 0 1\nb 0 1\n", 2),
            ("0\n1\na 0\n", 3),
            ("0\n2\na 0 1\na 0 2\n", 4),
            ("0\n1\na 0 -1\n", 3),
            ("0\n1\na 0 1", 3),
            ("0\n1\na x 1\n", 3),
        ] {
            assert_eq!(decode_offsets(bad.as_bytes()).map_err(|fault| fault.line), Err(line), "{bad:?}");
        }
        assert!(decode_offsets(&[0xff, b'\n']).is_err());
    }

    #[test]
    fn what_is_known_of_replicas_comes_back_and_no_flipped_byte_is_believed() {
        let kept = |byte, flushed| KeptReplica { topic_id: TopicId::from_bytes([byte; 16]), flushed, unclean_taken: 2 };
        let replicas =
            KeptReplicas::from_iter([(("a".to_owned(), 0), kept(1, 500)), (("b".to_owned(), 7), kept(2, 0))]);
        let text = encode_replicas(&replicas);
        assert_eq!(decode_replicas(text.as_bytes()), Ok(replicas));
        for place in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[place] ^= 1;
            assert!(decode_replicas(&bytes).is_err(), "byte {place}");
            assert!(decode_replicas(&text.as_bytes()[..place]).is_err(), "cut at {place}");
        }
        for bad in ["a 0 x 1 0", "a 0 AQEBAQEBAQEBAQEBAQEBAQ 1", "a x AQEBAQEBAQEBAQEBAQEBAQ 1 0"] {
            let fault = decode_replicas(with_sum(format!("0\n1\n{bad}\n")).as_bytes()).unwrap_err();
            assert_eq!(fault.line, 3, "{bad}");
        }
    }

    #[test]
    fn meta_properties_are_read_from_kafka_and_from_us() {
        let ours = MetaProperties {
            cluster_id: "c1".into(),
            broker_id: 3,
            directory_id: "d1".into(),
            format_version: Some(FORMAT_VERSION),
        };
        assert_eq!(MetaProperties::decode(ours.encode().as_bytes()), Ok(ours));
        let kafkas =
            MetaProperties::decode(b"#\n#Sat Nov 21\nnode.id=1\ndirectory.id=x\nversion=1\ncluster.id=k\n").unwrap();
        assert_eq!((kafkas.cluster_id.as_str(), kafkas.broker_id, kafkas.format_version), ("k", 1, None));
        assert!(MetaProperties::decode(b"cluster.id=k\n").is_err());
        assert!(MetaProperties::decode(b"node.id=one\ncluster.id=k\n").is_err());
    }

    #[test]
    fn partition_metadata_is_kafkas() {
        let id = decode_partition_metadata(b"version: 0\ntopic_id: 879REUCmQLKwgG2VqGuGeA").unwrap();
        assert_eq!(id.to_string(), "879REUCmQLKwgG2VqGuGeA");
        assert!(decode_partition_metadata(b"version: 0\n").is_err());
        assert!(decode_partition_metadata(b"version: 1\ntopic_id: 879REUCmQLKwgG2VqGuGeA").is_err());
    }

    #[test]
    fn names_of_folders_and_files_are_kafkas() {
        assert_eq!(parse_partition_dir_name("a-b-12"), Some(("a-b".into(), 12)));
        for other in ["a-012", "a-b", "-1", "a", "a-1.0123-delete", "a--1x"] {
            assert_eq!(parse_partition_dir_name(other), None, "{other}");
        }
        assert_eq!(segment_file_name(42, ".log"), "00000000000000000042.log");
        assert_eq!(parse_segment_file_name("00000000000000000042.log.deleted"), Some((42, ".log.deleted")));
        assert_eq!(parse_segment_file_name("0000000000000000004.log"), None);
        assert_eq!(parse_segment_file_name("99999999999999999999.log"), None);
    }
}
