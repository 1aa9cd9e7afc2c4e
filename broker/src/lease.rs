//! Whether this broker may take itself for what the metadata say it is: its lease.
//!
//! A broker that is one of several says to every voter of the metadata quorum that it is there. While a majority answers, nobody has
//! taken it for dead; the lease holds for a session after the moment at which the last heartbeat was *sent* that a majority
//! has answered. Only this machine's clock counts, and only how much of it has passed. A voter that knows the broker as fenced, or
//! another start of it, does not count. Where nobody else is, nobody else decides, and the lease holds always.
//!
//! The lease says that nobody took the broker for dead. A leadership may move all the same, and a broker that hears everybody but
//! whose disk keeps it from knowing what they decided would not hear of that. So the answers name the version of the metadata too, and
//! who has been behind for long says neither who coordinates nor anything else on behalf of the others ([`Lease::is_behind`]).
//!
//! What rests on the lease: acks=0 and acks=1, changes of who is in sync, and what a coordinator says of offsets. acks=all never does: its
//! whole ISR answers for it.
//!
//! Owns: [`Lease`], and how it follows from answers ([`confirmed_ms`], pure). Refuses: heartbeats
//! ([`crate::metadata::raft::heartbeat`] sends them).

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a broker may lack what the others decided before it says nothing on their behalf. Whoever coordinates in its place waits for
/// longer before it puts a member out that it has not heard itself (`group::task::elsewhere`), however short the member's session is.
pub(crate) const BEHIND: Duration = Duration::from_secs(2);

/// A broker's lease. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Lease(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    /// In milliseconds since then.
    until_ms: AtomicU64,
    behind: Mutex<Option<Behind>>,
}

/// What is in force elsewhere, and was not here yet.
#[derive(Debug, Clone, Copy)]
struct Behind {
    version: u64,
    since: Instant,
}

impl Lease {
    /// That of a broker that nobody else decides about.
    pub(crate) fn unlimited() -> Lease {
        Lease(Arc::new(Inner { began: Instant::now(), until_ms: AtomicU64::new(u64::MAX), behind: Mutex::default() }))
    }

    /// Others decide from here on: the lease has to be confirmed.
    pub(crate) fn limit(&self) {
        self.0.until_ms.store(0, Ordering::Release);
    }

    /// What the lease's clock says.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A majority has answered what was sent then.
    pub(crate) fn confirm(&self, sent_ms: u64, session: Duration) {
        let session_ms = u64::try_from(session.as_millis()).unwrap_or(u64::MAX);
        self.0.until_ms.fetch_max(sent_ms.saturating_add(session_ms), Ordering::AcqRel);
    }

    /// A voter has this version of the metadata, and `here` is the version here.
    pub(crate) fn hear_of(&self, version: u64, here: u64) {
        let mut behind = self.behind();
        if behind.is_none_or(|behind| behind.version <= here) {
            *behind = (version > here).then(|| Behind { version, since: Instant::now() });
        }
    }

    /// Whether something has been in force elsewhere for so long that is not in `here`, the version here.
    pub(crate) fn is_behind(&self, here: u64, patience: Duration) -> bool {
        self.behind().is_some_and(|behind| behind.version > here && behind.since.elapsed() >= patience)
    }

    fn behind(&self) -> MutexGuard<'_, Option<Behind>> {
        self.0.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the lease holds now.
    pub(crate) fn holds(&self) -> bool {
        match self.0.until_ms.load(Ordering::Acquire) {
            u64::MAX => true,
            until_ms => self.now_ms() < until_ms,
        }
    }
}

/// When the newest heartbeat was sent that a majority of the voters has answered: of both sets of them, while they change. `answered`:
/// when the newest was sent that each has answered.
pub(crate) fn confirmed_ms(voters: &[BTreeSet<u64>], answered: &HashMap<u64, u64>) -> Option<u64> {
    let of_set = |voters: &BTreeSet<u64>| {
        let mut answers: Vec<u64> = voters.iter().filter_map(|voter| answered.get(voter).copied()).collect();
        answers.sort_unstable_by(|a, b| b.cmp(a));
        answers.get(voters.len() / 2).copied()
    };
    voters.iter().map(of_set).min().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(answers: &[(u64, u64)]) -> HashMap<u64, u64> {
        answers.iter().copied().collect()
    }

    #[test]
    fn who_is_behind_for_long_is_told_so_until_it_has_what_it_lacked() {
        let lease = Lease::unlimited();
        let (now, never) = (Duration::ZERO, Duration::from_secs(3600));
        lease.hear_of(5, 5);
        assert!(!lease.is_behind(5, now));
        lease.hear_of(7, 5);
        lease.hear_of(9, 6);
        assert!(lease.is_behind(6, now) && !lease.is_behind(6, never));
        assert!(!lease.is_behind(7, now), "it has what it lacked first");
        lease.hear_of(9, 7);
        assert!(lease.is_behind(8, now), "and lacks something else");
        lease.hear_of(9, 9);
        assert!(!lease.is_behind(9, now));
    }

    fn voters(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn a_majority_has_to_answer() {
        let three = [voters(&[1, 2, 3])];
        let confirmed = |answers: &[(u64, u64)]| confirmed_ms(&three, &answered(answers));
        assert_eq!(confirmed(&[]), None);
        assert_eq!(confirmed(&[(1, 900)]), None, "its own member alone is none");
        assert_eq!(confirmed(&[(1, 900), (2, 500)]), Some(500));
        assert_eq!(confirmed(&[(1, 900), (2, 500), (3, 700)]), Some(700));
        assert_eq!(confirmed(&[(1, 900), (7, 800), (8, 800)]), None, "those who voted once do not count");
        assert_eq!(confirmed_ms(&[voters(&[1])], &answered(&[(1, 900)])), Some(900), "the only voter");
        assert_eq!(confirmed_ms(&[voters(&[1, 2])], &answered(&[(1, 900)])), None);
    }

    #[test]
    fn while_the_voters_change_both_majorities_have_to_answer() {
        let both = [voters(&[1, 2, 3]), voters(&[1, 4, 5])];
        assert_eq!(confirmed_ms(&both, &answered(&[(1, 900), (2, 500)])), None);
        assert_eq!(confirmed_ms(&both, &answered(&[(1, 900), (2, 500), (4, 300)])), Some(300));
    }

    #[test]
    fn it_lasts_a_session_from_when_the_heartbeat_was_sent() {
        let lease = Lease::unlimited();
        assert!(lease.holds());
        lease.limit();
        assert!(!lease.holds());
        let session = Duration::from_secs(3600);
        lease.confirm(lease.now_ms(), session);
        assert!(lease.holds());
        let lease = Lease(Arc::new(Inner {
            began: Instant::now() - session * 2,
            until_ms: AtomicU64::new(0),
            behind: Mutex::default(),
        }));
        lease.confirm(lease.now_ms() - 3_600_001, session);
        assert!(!lease.holds(), "the answer came too late");
        lease.confirm(lease.now_ms() - 3_000_000, session);
        lease.confirm(0, session);
        assert!(lease.holds(), "an older answer takes nothing back");
    }
}
