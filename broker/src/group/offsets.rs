//! What a group committed: how far each partition was read.
//!
//! A commit names the member's epoch: one from before the last change of the member's assignment is refused, so that
//! whoever lost a partition cannot move its offset. A group without members takes commits from anybody (consumers that
//! assign partitions by hand, and administrators).
//!
//! Owns: commits, their deletion and expiry. Refuses: the log's bounds (a committed offset may lie outside; a reader is
//! told when it starts there). Read next: [`super::records`].

use super::state::{Effects, Group};
use super::{GroupError, GroupSettings, Now, records};
use crate::metadata::MetadataState;
use crate::planted::{Bug, planted};
use headwater_proto::limits::MAX_OFFSET_METADATA_BYTES;
use headwater_proto::{ErrorCode, TopicId};

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The next offset to read.
    pub offset: i64,
    /// The leader epoch of the last record read; -1 when unknown.
    pub leader_epoch: i32,
    /// What the client wanted to be kept with it.
    pub metadata: String,
    /// When, in milliseconds since 1970.
    pub commit_time_ms: i64,
    /// The topic that the name meant; zero when unknown.
    pub topic_id: TopicId,
}

/// One partition of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitEntry {
    /// The topic's name.
    pub topic: String,
    /// The topic's id; zero: whichever has the name.
    pub topic_id: TopicId,
    /// The partition.
    pub partition: u32,
    /// The next offset to read.
    pub offset: i64,
    /// The leader epoch of the last record read; -1 when unknown.
    pub leader_epoch: i32,
    /// What to keep with it.
    pub metadata: String,
}

/// Why one partition of a commit is refused, while others are not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// No topic of that name.
    #[error("there is no topic {0}")]
    UnknownTopic(String),
    /// The topic was deleted, and perhaps created anew.
    #[error("topic {topic} does not have the id {id}: it was deleted, and perhaps created anew")]
    UnknownTopicId {
        /// Its name.
        topic: String,
        /// The id that was named.
        id: TopicId,
    },
    /// The topic has no such partition.
    #[error("topic {topic} has {count} partitions, and no partition {partition}")]
    UnknownPartition {
        /// Its name.
        topic: String,
        /// The partition that was named.
        partition: u32,
        /// How many it has.
        count: usize,
    },
    /// The metadata is too long.
    #[error("the metadata of a commit has at most {limit} bytes; this has {bytes}")]
    MetadataTooLong {
        /// Its length.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// Offsets begin at 0.
    #[error("{0} is no offset")]
    InvalidOffset(i64),
}

impl EntryError {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            EntryError::UnknownTopic(_) => ErrorCode::UnknownTopic,
            EntryError::UnknownTopicId { .. } => ErrorCode::UnknownTopicId,
            EntryError::UnknownPartition { .. } => ErrorCode::UnknownPartition,
            EntryError::MetadataTooLong { .. } => ErrorCode::OffsetMetadataTooLarge,
            EntryError::InvalidOffset(_) => ErrorCode::InvalidRequest,
        }
    }
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker<'a> {
    /// A member, naming its epoch.
    Member {
        /// Its id.
        id: &'a str,
        /// The epoch it names.
        epoch: i32,
    },
    /// Anybody else.
    Administrator,
}

impl Group {
    /// What the group committed, by topic name and partition.
    pub fn offsets(&self) -> impl Iterator<Item = (&str, u32, &Committed)> {
        self.offsets.iter().map(|((topic, partition), committed)| (topic.as_str(), *partition, committed))
    }

    /// What the group committed for one partition.
    pub fn offset(&self, topic: &str, partition: u32) -> Option<&Committed> {
        self.offsets.get(&(topic.to_owned(), partition))
    }

    /// Commits. Each entry is taken or refused alone, in order.
    ///
    /// # Errors
    /// [`GroupError`] if the speaker may not commit at all.
    pub fn commit(
        &mut self,
        now: Now,
        speaker: Speaker<'_>,
        entries: Vec<CommitEntry>,
        metadata: &MetadataState,
    ) -> Result<(Effects, Vec<Result<(), EntryError>>), GroupError> {
        match speaker {
            Speaker::Member { .. } => self.check_speaker(speaker)?,
            Speaker::Administrator => {
                self.check_empty("only its members may commit; stop them, or wait until their sessions end")?;
            }
        }
        let mut effects = Effects::new();
        let results = entries
            .into_iter()
            .map(|entry| {
                let topic_id = check_entry(&entry, metadata)?;
                let committed = Committed {
                    offset: entry.offset,
                    leader_epoch: entry.leader_epoch,
                    metadata: entry.metadata,
                    commit_time_ms: now.wall_ms,
                    topic_id,
                };
                effects.push(records::write_offset(&self.name, &entry.topic, entry.partition, Some(&committed)));
                if !planted(Bug::CommitForgotten) {
                    self.offsets.insert((entry.topic, entry.partition), committed);
                }
                Ok(())
            })
            .collect();
        if self.members.is_empty() && self.empty_since_ms.is_none() {
            self.empty_since_ms = Some(now.wall_ms);
        }
        Ok((effects, results))
    }

    /// Takes over what a group of Kafka committed, for partitions of which this group knows nothing.
    pub fn take_over(&mut self, now: Now, offsets: Vec<(String, u32, Committed)>) -> Effects {
        let mut effects = Effects::new();
        for (topic, partition, committed) in offsets {
            let key = (topic, partition);
            if !self.offsets.contains_key(&key) {
                effects.push(records::write_offset(&self.name, &key.0, partition, Some(&committed)));
                self.offsets.insert(key, committed);
            }
        }
        if self.members.is_empty() && self.empty_since_ms.is_none() {
            self.empty_since_ms = Some(now.wall_ms);
        }
        effects
    }

    /// Whether a member may read or commit with the epoch it names.
    ///
    /// # Errors
    /// [`GroupError`] naming what is wrong with the epoch, or that there is no such member.
    pub fn check_speaker(&self, speaker: Speaker<'_>) -> Result<(), GroupError> {
        let Speaker::Member { id, epoch } = speaker else { return Ok(()) };
        let unknown = || GroupError::UnknownMember { group: self.name.clone(), member: id.to_owned() };
        let member = self.members.get(id).filter(|member| !member.away).ok_or_else(unknown)?;
        match epoch.cmp(&member.epoch) {
            _ if planted(Bug::AnyMemberEpoch) => Ok(()),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => {
                Err(GroupError::StaleEpoch { member: id.to_owned(), named: epoch, current: member.epoch })
            }
            std::cmp::Ordering::Greater => {
                Err(GroupError::FencedEpoch { member: id.to_owned(), named: epoch, current: member.epoch })
            }
        }
    }

    /// Forgets the group.
    ///
    /// # Errors
    /// [`GroupError::NotEmpty`], or [`GroupError::NotFound`] if nothing is known of it.
    pub fn delete(&mut self) -> Result<Effects, GroupError> {
        if self.is_forgotten() {
            return Err(GroupError::NotFound(self.name.clone()));
        }
        self.check_empty("a group is deleted when it is empty")?;
        let mut effects = self.drop_offsets(|_, _, _| true);
        effects.extend(self.forget());
        Ok(effects)
    }

    /// Forgets what was committed for a topic: for these partitions, or for all if none are named.
    ///
    /// # Errors
    /// [`GroupError::NotEmpty`] while members subscribe to the topic; [`GroupError::NotFound`] if nothing is known of the group.
    pub fn delete_offsets(&mut self, topic: &str, partitions: &[u32]) -> Result<Effects, GroupError> {
        if self.is_forgotten() {
            return Err(GroupError::NotFound(self.name.clone()));
        }
        if self.members.values().any(|member| member.topics.contains(topic)) {
            self.check_empty("offsets of a topic are deleted when no member subscribes to it")?;
        }
        Ok(self.drop_offsets(|name, partition, _| {
            name == topic && (partitions.is_empty() || partitions.contains(&partition))
        }))
    }

    /// Forgets offsets of topics that are gone.
    pub fn forget_deleted_topics(&mut self, metadata: &MetadataState) -> Effects {
        self.drop_offsets(|name, _, committed| match metadata.topic(name) {
            None => true,
            Some(topic) => committed.topic_id != TopicId::ZERO && committed.topic_id != topic.id,
        })
    }

    /// Forgets offsets that nobody moved for the retention time, counted from when the group lost its last member; and
    /// the group, once it has neither.
    pub fn expire(&mut self, now: Now, settings: &GroupSettings) -> Effects {
        let Some(empty_since_ms) = self.empty_since_ms.filter(|_| self.members.is_empty()) else {
            return Effects::new();
        };
        let retention_ms = i64::try_from(settings.offsets_retention_minutes.saturating_mul(60_000)).unwrap_or(i64::MAX);
        let mut effects = self.drop_offsets(|_, _, committed| {
            committed.commit_time_ms.max(empty_since_ms).saturating_add(retention_ms) <= now.wall_ms
        });
        if self.offsets.is_empty() && empty_since_ms.saturating_add(retention_ms) <= now.wall_ms {
            effects.extend(self.forget());
        }
        effects
    }

    fn forget(&mut self) -> Effects {
        if self.epoch == 0 {
            return Effects::new();
        }
        self.epoch = 0;
        records::forget_group(&self.name)
    }

    fn drop_offsets(&mut self, gone: impl Fn(&str, u32, &Committed) -> bool) -> Effects {
        let mut effects = Effects::new();
        let group = &self.name;
        self.offsets.retain(|(topic, partition), committed| {
            let gone = gone(topic, *partition, committed);
            if gone {
                effects.push(records::write_offset(group, topic, *partition, None));
            }
            !gone
        });
        effects
    }

    fn check_empty(&self, needs: &'static str) -> Result<(), GroupError> {
        match self.members.len() {
            0 => Ok(()),
            members => Err(GroupError::NotEmpty { group: self.name.clone(), members, needs }),
        }
    }
}

fn check_entry(entry: &CommitEntry, metadata: &MetadataState) -> Result<TopicId, EntryError> {
    let topic = metadata.topic(&entry.topic).ok_or_else(|| EntryError::UnknownTopic(entry.topic.clone()))?;
    if entry.topic_id != TopicId::ZERO && entry.topic_id != topic.id {
        return Err(EntryError::UnknownTopicId { topic: entry.topic.clone(), id: entry.topic_id });
    }
    let count = topic.partitions.len();
    if entry.partition as usize >= count {
        return Err(EntryError::UnknownPartition { topic: entry.topic.clone(), partition: entry.partition, count });
    }
    if entry.offset < 0 {
        return Err(EntryError::InvalidOffset(entry.offset));
    }
    let (bytes, limit) = (entry.metadata.len(), MAX_OFFSET_METADATA_BYTES);
    if bytes > limit {
        return Err(EntryError::MetadataTooLong { bytes, limit });
    }
    Ok(topic.id)
}
