//! What clients saw of one topic and one group, in the order in which they saw it: the material that [`super::checker`] judges.
//!
//! One line of JSON an entry, so that a run that failed can be looked at, and judged again, later.

use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Something that a client did or saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Milliseconds since the history began. For people: the order of the entries is what counts.
    pub(crate) ms: u64,
    /// Whose it is: a producer, a member of the group, a reader.
    pub(crate) who: String,
    #[serde(flatten)]
    pub(crate) what: What,
}

/// A record where it was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) partition: u32,
    pub(crate) offset: i64,
    pub(crate) key: String,
    pub(crate) value: String,
}

/// What was done or seen. Values name records: no two that are sent are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(crate) enum What {
    /// A record was given to a producer, for this partition.
    Sent { partition: u32, key: String, value: String },
    /// Its producer says that it is kept. Where it does not say at which offset, that is negative.
    Acknowledged { value: String, partition: u32, offset: i64 },
    /// Its producer says that it was not written, and never will be.
    Failed { value: String, why: String },
    /// Its producer cannot say whether it was written.
    Unknown { value: String, why: String },
    /// A member of the group was given partitions.
    Given { partitions: Vec<u32> },
    /// A member let partitions go: it is done with them.
    LetGo { partitions: Vec<u32> },
    /// A member learned that partitions were taken from it, or came to its end without a word: another one may have had them before.
    Lost { partitions: Vec<u32> },
    /// A record was delivered to a member.
    Delivered(Seen),
    /// A member is about to commit: the next offset to be read.
    Committing { partition: u32, offset: i64 },
    /// The coordinator has taken that commit.
    Committed { partition: u32, offset: i64 },
    /// Somebody was told how far the group is, having asked when the history held so many entries.
    Progress { partition: u32, offset: i64, asked: usize },
    /// Somebody asked that everything before this offset be deleted, or set the topic up so that it may be.
    Deleted { partition: u32, before: i64 },
    /// A record of the log as it stands in the end, read by nobody's member.
    Kept(Seen),
    /// The log as it stands in the end holds what lies between these offsets, and was read whole.
    Whole { partition: u32, start: i64, end: i64 },
}

/// A history that goes on.
#[derive(Debug)]
pub(crate) struct Recorder {
    began: Instant,
    entries: Mutex<Vec<Entry>>,
}

impl Recorder {
    pub(crate) fn new() -> Recorder {
        Recorder { began: Instant::now(), entries: Mutex::default() }
    }

    /// Adds what this client did or saw, at this moment.
    pub(crate) fn add(&self, who: &str, what: What) {
        let mut entries = self.entries.lock().expect("whole");
        let ms = u64::try_from(self.elapsed().as_millis()).expect("not that long");
        entries.push(Entry { ms, who: who.to_owned(), what });
    }

    /// How long it has gone on.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// How many entries so far satisfy this.
    pub(crate) fn count(&self, is_so: impl Fn(&What) -> bool) -> usize {
        self.entries.lock().expect("whole").iter().filter(|entry| is_so(&entry.what)).count()
    }

    /// How many entries there are so far.
    pub(crate) fn len(&self) -> usize {
        self.entries.lock().expect("whole").len()
    }

    /// What there is so far.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.entries.lock().expect("whole").clone()
    }
}

/// As lines of JSON.
pub(crate) fn to_lines(entries: &[Entry]) -> String {
    entries.iter().map(|entry| serde_json::to_string(entry).expect("plain values") + "\n").collect()
}

/// From lines of JSON.
pub(crate) fn from_lines(lines: &str) -> Vec<Entry> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}
