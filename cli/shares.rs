//! What a member of a group owns, and how far it is with each partition.
//!
//! Owns: the lives of partitions. One that was taken away and came back begins another life, and what was fetched in the
//! earlier one counts for nothing any more: its next owner may be further on, and the group's offset must not fall behind
//! that. Refuses: committing (`commands/consume.rs`). Read next: [`crate::printer`], which tells what was printed.
//!
//! Invariant: there is a position only of partitions that are owned, and it stems from the life they are in.

use headwater_client::{Position, TopicPartition};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The partitions of a member, shared by whoever reads, prints and commits.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    lives: u64,
    owned: BTreeMap<TopicPartition, Share>,
}

#[derive(Debug)]
struct Share {
    life: u64,
    /// Where the reading began, and once something was printed: after that. `None`: nobody knows yet.
    position: Option<Position>,
}

impl Shares {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are owned from now on.
    pub(crate) fn take_on(&self, partitions: &[TopicPartition]) {
        let mut inner = self.lock();
        for at in partitions {
            inner.lives += 1;
            let share = Share { life: inner.lives, position: None };
            inner.owned.insert(at.clone(), share);
        }
    }

    /// These belong to somebody else now.
    pub(crate) fn give_up(&self, partitions: &[TopicPartition]) {
        let mut inner = self.lock();
        for at in partitions {
            inner.owned.remove(at);
        }
    }

    /// The life that a partition is in, if it is owned.
    pub(crate) fn life(&self, at: &TopicPartition) -> Option<u64> {
        self.lock().owned.get(at).map(|share| share.life)
    }

    /// Whether the position of every partition that is owned is known.
    pub(crate) fn all_begun(&self) -> bool {
        self.lock().owned.values().all(|share| share.position.is_some())
    }

    /// Reading begins here. Says nothing new of a partition whose position is known.
    pub(crate) fn begin(&self, at: &TopicPartition, position: Position) {
        if let Some(share) = self.lock().owned.get_mut(at) {
            share.position.get_or_insert(position);
        }
    }

    /// Everything before `to` was printed, of what was fetched in this life of the partition.
    pub(crate) fn printed(&self, at: &TopicPartition, life: u64, to: Position) {
        if let Some(share) = self.lock().owned.get_mut(at).filter(|share| share.life == life) {
            share.position = Some(to);
        }
    }

    /// The position of every partition that is owned, as far as they are known.
    pub(crate) fn positions(&self) -> BTreeMap<TopicPartition, Position> {
        let inner = self.lock();
        inner.owned.iter().filter_map(|(at, share)| Some((at.clone(), share.position?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(offset: i64) -> Position {
        Position { offset, leader_epoch: 3 }
    }

    #[test]
    fn what_was_fetched_in_an_earlier_life_moves_nothing() {
        let (shares, at) = (Shares::default(), TopicPartition::new("t", 0));
        shares.printed(&at, 1, to(5));
        assert!(shares.positions().is_empty(), "what is not owned has no position");
        shares.take_on(std::slice::from_ref(&at));
        let first = shares.life(&at).expect("it is owned");
        shares.printed(&at, first, to(5));
        shares.give_up(std::slice::from_ref(&at));
        assert!(shares.positions().is_empty() && shares.life(&at).is_none());
        shares.take_on(std::slice::from_ref(&at));
        shares.begin(&at, to(90));
        shares.printed(&at, first, to(6));
        assert_eq!(shares.positions(), BTreeMap::from([(at.clone(), to(90))]));
        shares.printed(&at, shares.life(&at).expect("it is owned"), to(91));
        shares.begin(&at, to(90));
        assert_eq!(shares.positions(), BTreeMap::from([(at, to(91))]));
    }
}
