//! Where two logs of one partition part, told from their whole histories of leader epochs.
//!
//! A record is known by its offset and its leader epoch, and two logs that hold the same record are equal up to it. So the last
//! epoch that both know is where they agree last: up to the offset at which the first of them leaves it. Comparing whole
//! histories finds it at once, where asking for the end of one epoch after the other takes a round for each quick change of
//! leader.
//!
//! Owns: [`History`] and [`History::compare`]. Refuses: high watermarks (whether a cut is permitted is
//! [`super::follower`]'s to say). Read next: [`super::leader`].

use crate::planted::{Bug, planted};
use headwater_storage::epochs::{EpochEntry, LeaderEpochs};

/// A log in terms of its leader epochs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    epochs: Vec<EpochEntry>,
    log_start: i64,
    log_end: i64,
}

/// What a peer sent is no history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Epochs or their offsets do not rise, or are negative.
    #[error("leader epoch {epoch} from offset {start_offset} does not come after the one before it")]
    Unordered {
        /// The epoch.
        epoch: i32,
        /// Where it begins.
        start_offset: i64,
    },
    /// The log ends before it begins, or before an epoch of it does.
    #[error("a log from {log_start} to {log_end} does not hold its leader epochs")]
    Bounds {
        /// Its first offset.
        log_start: i64,
        /// The offset that its next record gets.
        log_end: i64,
    },
}

/// What a follower does so that its log is a beginning of the leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: batches follow from its log end.
    Agrees,
    /// It cuts its log so that this is its end.
    Cut {
        /// The end.
        to: i64,
    },
    /// It throws its log away and begins anew here: where the leader's begins, or where its own did.
    Restart {
        /// The beginning.
        at: i64,
        /// What it held below this offset was equal, or the leader deleted it.
        equal_below: i64,
    },
}

impl History {
    /// The history of a log from `log_start` to `log_end`.
    ///
    /// # Errors
    /// [`HistoryError`]: no log has such a history.
    pub fn new(epochs: Vec<EpochEntry>, log_start: i64, log_end: i64) -> Result<History, HistoryError> {
        let mut before = EpochEntry { epoch: -1, start_offset: -1 };
        for entry in &epochs {
            if entry.epoch <= before.epoch || entry.start_offset <= before.start_offset {
                return Err(HistoryError::Unordered { epoch: entry.epoch, start_offset: entry.start_offset });
            }
            before = *entry;
        }
        if log_start < 0 || log_end < log_start || before.start_offset > log_end {
            return Err(HistoryError::Bounds { log_start, log_end });
        }
        Ok(History { epochs, log_start, log_end })
    }

    /// The history of a log on this broker.
    pub fn of_log(epochs: &LeaderEpochs, log_start: i64, log_end: i64) -> History {
        // An epoch that began at an end which was cut since wrote nothing.
        let epochs = epochs.entries().iter().filter(|entry| entry.start_offset <= log_end).copied().collect();
        History { epochs, log_start, log_end }
    }

    /// First offset of the log.
    pub fn log_start(&self) -> i64 {
        self.log_start
    }

    /// The offset that its next record gets.
    pub fn log_end(&self) -> i64 {
        self.log_end
    }

    /// The epochs, the oldest first.
    pub fn epochs(&self) -> &[EpochEntry] {
        &self.epochs
    }

    /// Where the epoch at a place ends.
    fn end_at(&self, place: usize) -> i64 {
        self.epochs.get(place + 1).map_or(self.log_end, |next| next.start_offset)
    }

    /// Up to which offset two logs are equal; `None` if they have no epoch in common.
    fn agreed_end(&self, other: &History) -> Option<i64> {
        if planted(Bug::OneRoundTruncation) {
            return self.end_of_last_epoch(other);
        }
        self.epochs.iter().enumerate().rev().find_map(|(place, entry)| {
            let there = other.epochs.binary_search_by_key(&entry.epoch, |entry| entry.epoch).ok()?;
            Some(self.end_at(place).min(other.end_at(there)))
        })
    }

    /// Where the other log leaves the last epoch of this one, or the one before that it has: not enough after quick changes.
    fn end_of_last_epoch(&self, other: &History) -> Option<i64> {
        let last = self.epochs.last()?.epoch;
        let place = other.epochs.iter().rposition(|entry| entry.epoch <= last)?;
        Some(other.end_at(place).min(self.log_end))
    }

    /// What the follower with this history does to follow the leader with that one.
    pub fn compare(&self, leader: &History) -> Verdict {
        let agreed = self.agreed_end(leader);
        let (start, is_empty) = (leader.log_start, self.log_start == self.log_end);
        // What the follower deleted was committed: a leader that goes as far has it. It begins no earlier: it may be in sync, and would
        // have less than was acknowledged until it had fetched it all again.
        let is_deleted = self.log_start >= start && self.log_start <= leader.log_end;
        match agreed {
            None if is_empty && is_deleted => Verdict::Agrees,
            None if self.log_start > start && is_deleted => {
                Verdict::Restart { at: self.log_start, equal_below: self.log_start }
            }
            Some(agreed) if agreed >= start && agreed >= self.log_end => Verdict::Agrees,
            // Nothing is left. It may begin within a batch, where no cut ends it.
            Some(agreed) if agreed >= start && agreed == self.log_start => {
                Verdict::Restart { at: agreed, equal_below: agreed }
            }
            Some(agreed) if agreed >= start && agreed > self.log_start => Verdict::Cut { to: agreed },
            _ => {
                let deleted = self.log_start.min(leader.log_end);
                Verdict::Restart { at: start, equal_below: start.max(agreed.unwrap_or(deleted)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn history(epochs: &[(i32, i64)], log_start: i64, log_end: i64) -> History {
        let epochs = epochs.iter().map(|&(epoch, start_offset)| EpochEntry { epoch, start_offset }).collect();
        History::new(epochs, log_start, log_end).unwrap()
    }

    #[test]
    fn a_log_that_is_a_beginning_of_the_leaders_is_left_alone() {
        let leader = history(&[(1, 0), (3, 10)], 0, 20);
        for (epochs, end) in [(&[(1, 0)][..], 5), (&[(1, 0)], 10), (&[(1, 0), (3, 10)], 15), (&[(1, 0), (3, 10)], 20)] {
            assert_eq!(history(epochs, 0, end).compare(&leader), Verdict::Agrees);
        }
        assert_eq!(History::default().compare(&leader), Verdict::Agrees);
    }

    #[test]
    fn what_no_leader_kept_is_cut() {
        let leader = history(&[(1, 0), (3, 10)], 0, 20);
        assert_eq!(history(&[(1, 0)], 0, 12).compare(&leader), Verdict::Cut { to: 10 });
        assert_eq!(history(&[(1, 0), (2, 8)], 0, 15).compare(&leader), Verdict::Cut { to: 8 });
        assert_eq!(history(&[(1, 0), (3, 10)], 0, 22).compare(&leader), Verdict::Cut { to: 20 });
        // A leader that wrote nothing yet.
        assert_eq!(history(&[(1, 0)], 0, 22).compare(&history(&[(1, 0), (4, 20)], 0, 20)), Verdict::Cut { to: 20 });
    }

    /// Kafka asked for the end of the follower's last epoch only, and one round was not enough: each leader of a quick
    /// succession wrote what no other kept.
    #[test]
    fn quick_changes_of_leader_are_found_in_one_round() {
        let leader = history(&[(1, 0), (4, 6), (7, 9)], 0, 12);
        let follower = history(&[(1, 0), (2, 4), (3, 6), (5, 8), (6, 11)], 0, 14);
        assert_eq!(follower.compare(&leader), Verdict::Cut { to: 4 });
        let cut = history(&[(1, 0)], 0, 4);
        assert_eq!(cut.compare(&leader), Verdict::Agrees);
    }

    #[test]
    fn a_log_that_the_leader_has_left_behind_begins_anew() {
        let leader = history(&[(4, 100)], 100, 150);
        assert_eq!(history(&[(1, 0)], 0, 50).compare(&leader), Verdict::Restart { at: 100, equal_below: 100 });
        assert_eq!(History::default().compare(&leader), Verdict::Restart { at: 100, equal_below: 100 });
        // Equal up to 120, and it deleted everything below 130.
        let follower = history(&[(4, 130)], 130, 140);
        assert_eq!(
            follower.compare(&history(&[(4, 100), (6, 120)], 100, 150)),
            Verdict::Restart { at: 100, equal_below: 120 }
        );
        // It deleted everything, but knows in which epoch.
        assert_eq!(history(&[(4, 130)], 130, 130).compare(&leader), Verdict::Agrees);
        // It led, deleted all that was committed, and wrote what nobody else kept.
        let follower = history(&[(2, 14)], 14, 26);
        let verdict = follower.compare(&history(&[(0, 0), (3, 14)], 5, 14));
        assert_eq!(verdict, Verdict::Restart { at: 14, equal_below: 14 });
        let verdict = follower.compare(&history(&[(0, 0), (3, 12)], 5, 12));
        assert_eq!(verdict, Verdict::Restart { at: 5, equal_below: 12 }, "the leader lacks some of it");
        // Other records than the leader's, and not one epoch in common.
        let leader = history(&[(2, 0)], 0, 10);
        assert_eq!(history(&[(1, 0)], 0, 5).compare(&leader), Verdict::Restart { at: 0, equal_below: 0 });
    }

    /// It was in sync or eligible, had deleted all that was committed, and began again where the leader's log begins: elected then, it would
    /// have given out offsets anew.
    #[test]
    fn a_follower_that_deleted_what_the_leader_has_goes_on_behind_it() {
        let leader = history(&[(0, 8), (3, 33)], 8, 40);
        assert_eq!(history(&[], 33, 33).compare(&leader), Verdict::Agrees);
        assert_eq!(history(&[(2, 33)], 33, 33).compare(&leader), Verdict::Agrees, "an epoch in which it wrote nothing");
        let restart = Verdict::Restart { at: 33, equal_below: 33 };
        assert_eq!(history(&[(2, 33)], 33, 36).compare(&leader), restart, "nobody kept what it wrote");
        assert_eq!(history(&[], 41, 41).compare(&leader), Verdict::Restart { at: 8, equal_below: 40 });
        assert_eq!(history(&[(0, 33)], 33, 36).compare(&leader), restart, "its first batch may begin before it");
        assert_eq!(history(&[], 7, 7).compare(&leader), Verdict::Restart { at: 8, equal_below: 8 });
    }

    #[test]
    fn what_a_peer_sends_is_checked() {
        let entry = |epoch, start_offset| EpochEntry { epoch, start_offset };
        for epochs in
            [vec![entry(1, 0), entry(1, 5)], vec![entry(1, 5), entry(2, 5)], vec![entry(-1, 0)], vec![entry(0, -1)]]
        {
            assert!(matches!(History::new(epochs, 0, 9), Err(HistoryError::Unordered { .. })));
        }
        assert!(matches!(History::new(vec![entry(0, 10)], 0, 9), Err(HistoryError::Bounds { .. })));
        assert!(matches!(History::new(vec![], 5, 4), Err(HistoryError::Bounds { .. })));
    }

    /// Logs as vectors of epochs, made as leaders make them: each goes on from a beginning of an older log.
    fn logs(steps: &[(usize, usize, usize)]) -> Vec<Vec<i32>> {
        let mut logs: Vec<Vec<i32>> = vec![Vec::new()];
        for (epoch, (from, kept, wrote)) in steps.iter().enumerate() {
            let from = &logs[from % logs.len()];
            let mut log = from[..kept % (from.len() + 1)].to_vec();
            log.extend(std::iter::repeat_n(epoch as i32, *wrote));
            logs.push(log);
        }
        logs
    }

    fn of(log: &[i32]) -> History {
        let mut epochs = LeaderEpochs::default();
        for (offset, epoch) in log.iter().enumerate() {
            epochs.assign(*epoch, offset as i64);
        }
        History::of_log(&epochs, 0, log.len() as i64)
    }

    proptest! {
        #[test]
        fn exactly_what_differs_is_cut(
            steps in proptest::collection::vec((0usize..20, 0usize..20, 0usize..4), 1..20),
            pair in (0usize..20, 0usize..20),
        ) {
            let logs = logs(&steps);
            let (follower, leader) = (&logs[pair.0 % logs.len()], &logs[pair.1 % logs.len()]);
            let equal = follower.iter().zip(leader).take_while(|(a, b)| a == b).count();
            let left = match of(follower).compare(&of(leader)) {
                Verdict::Agrees => follower.len(),
                Verdict::Cut { to } => to as usize,
                Verdict::Restart { at, equal_below } => {
                    prop_assert_eq!((at, equal_below), (0, 0));
                    0
                }
            };
            prop_assert_eq!(left, equal);
        }
    }
}
