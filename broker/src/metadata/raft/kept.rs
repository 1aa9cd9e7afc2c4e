//! What a member of the quorum keeps, in memory as it is on stable storage: pure, changed only by [`Kept::apply`].
//!
//! Invariants: the entries have consecutive indexes; the first follows `purged`; nothing that is committed is taken back.
//!
//! Owns: which changes are legal. Refuses: files. Read next: [`super::store`].

use super::super::command::{RaftEntries, RaftJournal, RaftRecord, raft_record};
use super::super::state::MetadataState;
use super::convert::{self, Malformed};
use super::{Entry, LogId, Membership, SnapshotMeta, Vote};
use openraft::entry::RaftPayload;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A snapshot that is on stable storage.
#[derive(Debug, Clone)]
pub(super) struct KeptSnapshot {
    pub(super) meta: SnapshotMeta,
    pub(super) state: Arc<MetadataState>,
}

/// What a member keeps.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) node_id: u64,
    pub(super) cluster_id: String,
    pub(super) vote: Option<Vote>,
    /// In memory it runs ahead of the disk: it is written with the next change.
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    pub(super) snapshot: Option<KeptSnapshot>,
    /// Shared, so that a copy is cheap.
    pub(super) entries: BTreeMap<u64, Arc<Entry>>,
}

/// A change of it.
#[derive(Debug, Clone)]
pub(super) enum Change {
    /// These entries follow.
    Append(Vec<Entry>),
    /// The vote is now this.
    Vote(Vote),
    /// This entry and later ones are gone.
    Truncate(LogId),
    /// This entry and earlier ones are gone: they are in a snapshot.
    Purge(LogId),
}

impl Kept {
    /// A member that knows nothing.
    pub(super) fn new(node_id: u64, cluster_id: &str) -> Kept {
        let (vote, committed, purged, snapshot) = (None, None, None, None);
        Kept { node_id, cluster_id: cluster_id.into(), vote, committed, purged, snapshot, entries: BTreeMap::new() }
    }

    /// The last entry, be it there or dropped.
    pub(super) fn last_log_id(&self) -> Option<LogId> {
        self.entries.last_key_value().map(|(_, entry)| entry.log_id).or(self.purged)
    }

    /// Whether this member is a quorum by itself, as far as its log says.
    pub(super) fn is_only_voter(&self) -> bool {
        let configs = self.members().map_or(&[][..], |members| members.get_joint_config());
        matches!(configs, [voters] if voters.iter().eq([&self.node_id]))
    }

    /// Who votes, as its log says.
    pub(super) fn voters(&self) -> std::collections::BTreeSet<u64> {
        self.members().map(|members| members.voter_ids().collect()).unwrap_or_default()
    }

    /// Whether it votes, and nobody else votes or follows.
    pub(super) fn is_only_member(&self) -> bool {
        let mut members = self.members().into_iter().flat_map(|members| members.nodes());
        self.is_only_voter() && members.all(|(node_id, _)| *node_id == self.node_id)
    }

    /// Who votes and follows, as its log says.
    fn members(&self) -> Option<&Membership> {
        let in_it = self.snapshot.as_ref().and_then(|snapshot| snapshot.meta.last_log_id);
        // What a leader's snapshot has overtaken lies here until it is dropped, and says nothing any more.
        let newest_first = self.entries.values().rev();
        let in_log = newest_first
            .take_while(|entry| in_it.is_none_or(|last| entry.log_id.index > last.index))
            .find_map(|entry| entry.get_membership());
        let in_snapshot = self.snapshot.as_ref().map(|snapshot| snapshot.meta.last_membership.membership());
        in_log.or(in_snapshot)
    }

    /// Whether the change may come next.
    ///
    /// # Errors
    /// [`Malformed`]: why not.
    pub(super) fn check(&self, change: &Change) -> Result<(), Malformed> {
        match change {
            Change::Append(entries) => {
                let mut last = self.last_log_id();
                for entry in entries {
                    let given = entry.log_id;
                    if let Some(last) = last
                        && (given.index != last.index.saturating_add(1) || given.leader_id < last.leader_id)
                    {
                        return Err(Malformed(format!("entry {given} does not follow {last}")));
                    }
                    last = Some(given);
                }
                Ok(())
            }
            Change::Vote(vote) => match self.vote {
                // Two votes of one term are not to be compared.
                Some(kept) if vote.leader_id < kept.leader_id => {
                    Err(Malformed(format!("the vote {vote} is older than {kept}")))
                }
                _ => Ok(()),
            },
            Change::Truncate(from) => match self.committed.max(self.purged) {
                Some(committed) if from.index <= committed.index => {
                    Err(Malformed(format!("entry {from} is to be taken back, and {committed} is committed")))
                }
                _ => Ok(()),
            },
            Change::Purge(_) => Ok(()),
        }
    }

    /// Makes a change that was checked.
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Append(entries) => {
                self.entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, Arc::new(entry))))
            }
            Change::Vote(vote) => self.vote = Some(vote),
            Change::Truncate(from) => drop(self.entries.split_off(&from.index)),
            Change::Purge(to) => {
                self.purged = self.purged.max(Some(to));
                self.entries = self.entries.split_off(&to.index.saturating_add(1));
            }
        }
    }

    /// Everything, as the journal begins with it, with this snapshot.
    pub(super) fn message(&self, snapshot: Option<&KeptSnapshot>) -> RaftJournal {
        RaftJournal {
            node_id: self.node_id,
            cluster_id: self.cluster_id.clone(),
            vote: self.vote.as_ref().map(convert::vote_message),
            committed: self.committed.as_ref().map(convert::log_id_message),
            purged: self.purged.as_ref().map(convert::log_id_message),
            snapshot: snapshot.map(|kept| convert::snapshot_message(&kept.meta, &kept.state)),
            entries: self.entries.values().map(|entry| convert::entry_message(entry)).collect(),
        }
    }

    /// What a journal begins with.
    ///
    /// # Errors
    /// [`Malformed`]: it makes no sense.
    pub(super) fn from_message(message: RaftJournal) -> Result<Kept, Malformed> {
        if message.node_id == 0 {
            return Err(Malformed("the member has no id".to_owned()));
        }
        let snapshot = message.snapshot.map(convert::snapshot).transpose()?;
        if let Some((_, state)) = &snapshot
            && state.cluster_id() != message.cluster_id
        {
            let found = state.cluster_id();
            return Err(Malformed(format!(
                "the snapshot is of cluster {found}, the journal of {}",
                message.cluster_id
            )));
        }
        let mut kept = Kept {
            vote: message.vote.as_ref().map(convert::vote),
            committed: message.committed.as_ref().map(convert::log_id),
            purged: message.purged.as_ref().map(convert::log_id),
            snapshot: snapshot.map(|(meta, state)| KeptSnapshot { meta, state: Arc::new(state) }),
            ..Kept::new(message.node_id, &message.cluster_id)
        };
        kept.take(Change::Append(entries(message.entries)?))?;
        Ok(kept)
    }

    /// Makes the change that a record holds.
    ///
    /// # Errors
    /// [`Malformed`]: it makes no sense.
    pub(super) fn replay(&mut self, record: RaftRecord) -> Result<(), Malformed> {
        use raft_record::Change as Message;
        let change = match record.change {
            Some(Message::Append(append)) => Change::Append(entries(append.entries)?),
            Some(Message::Vote(vote)) => Change::Vote(convert::vote(&vote)),
            Some(Message::Truncate(from)) => Change::Truncate(convert::log_id(&from)),
            Some(Message::Purge(to)) => Change::Purge(convert::log_id(&to)),
            None => return Err(Malformed("a change of no known kind: it was written by a newer Headwater".to_owned())),
        };
        self.committed = self.committed.max(record.committed.as_ref().map(convert::log_id));
        self.take(change)
    }

    /// Whether everything that was dropped is in the snapshot.
    ///
    /// # Errors
    /// [`Malformed`]: entries are missing.
    pub(super) fn check_whole(&self) -> Result<(), Malformed> {
        let in_snapshot = self.snapshot.as_ref().and_then(|snapshot| snapshot.meta.last_log_id);
        match self.purged {
            Some(purged) if in_snapshot.is_none_or(|last| last.index < purged.index) => {
                let last = in_snapshot.map_or_else(|| "nothing".to_owned(), |last| last.to_string());
                Err(Malformed(format!("entries up to {purged} were dropped, and the snapshot ends with {last}")))
            }
            _ => Ok(()),
        }
    }

    fn take(&mut self, change: Change) -> Result<(), Malformed> {
        self.check(&change)?;
        self.apply(change);
        Ok(())
    }

    /// The record of a change.
    pub(super) fn record(&self, change: &Change) -> RaftRecord {
        use raft_record::Change as Message;
        let change = match change {
            Change::Append(entries) => {
                Message::Append(RaftEntries { entries: entries.iter().map(convert::entry_message).collect() })
            }
            Change::Vote(vote) => Message::Vote(convert::vote_message(vote)),
            Change::Truncate(from) => Message::Truncate(convert::log_id_message(from)),
            Change::Purge(to) => Message::Purge(convert::log_id_message(to)),
        };
        RaftRecord { committed: self.committed.as_ref().map(convert::log_id_message), change: Some(change) }
    }
}

fn entries(messages: Vec<super::super::command::RaftEntry>) -> Result<Vec<Entry>, Malformed> {
    messages.into_iter().map(convert::entry).collect()
}
