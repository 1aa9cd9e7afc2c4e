//! How far the followers of a partition lag, as its leader tells it to people: in offsets and in time.
//!
//! The offset is the one that counts for the ISR too: flushed, or received where `durability=replicated`. The time is how long ago
//! the follower had everything that the leader had then (Kafka's caught-up time): it stays near zero while the follower
//! keeps pace, however much is appended, and grows by a second a second once it does not.
//!
//! Owns: [`Lags`], pure. Refuses: to decide who is in sync ([`super::leader`] does, by what it remembers of the batches).

use std::collections::BTreeMap;

/// Where a follower is, as its leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The follower.
    pub broker: i32,
    /// The offset that counts; what every in-sync replica has, where it has said nothing in this epoch.
    pub offset: i64,
}

/// How far a follower is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lag {
    /// The follower.
    pub broker: i32,
    /// Offsets that it lacks.
    pub records: i64,
    /// How long ago it had everything, in milliseconds; 0 where it has.
    pub ms: i64,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    offset: i64,
    /// It had everything then.
    caught_up_ms: i64,
    /// Where the log ended when it was looked last, and when that was: once the follower is there, it had everything then.
    mark: (i64, i64),
}

/// What was seen of the followers, since this broker leads.
#[derive(Debug, Default)]
pub struct Lags {
    log_end: i64,
    seen: BTreeMap<i32, Seen>,
}

impl Lags {
    /// The log ends here now, and the followers are there. Whoever is not named is no follower any more.
    pub fn observe(&mut self, log_end: i64, followers: impl Iterator<Item = Position>, now_ms: i64) {
        let (before, mut known) = (self.log_end, std::mem::take(&mut self.seen));
        for Position { broker, offset } in followers {
            // Nobody that is new is late yet.
            let new = Seen { offset, caught_up_ms: now_ms, mark: (log_end, now_ms) };
            let mut seen = known.remove(&broker).unwrap_or(new);
            if seen.offset >= before && log_end > before {
                // Until now it had everything.
                (seen.caught_up_ms, seen.mark) = (now_ms, (log_end, now_ms));
            }
            seen.offset = offset;
            if offset >= seen.mark.0 {
                (seen.caught_up_ms, seen.mark) = (seen.mark.1, (log_end, now_ms));
            }
            self.seen.insert(broker, seen);
        }
        self.log_end = log_end;
    }

    /// How far each follower is behind. Nobody lacks what is below the start of the log.
    pub fn now(&self, log_start: i64, now_ms: i64) -> Vec<Lag> {
        let lag = |(broker, seen): (&i32, &Seen)| {
            let records = self.log_end.saturating_sub(seen.offset.max(log_start)).max(0);
            let ms = if records == 0 { 0 } else { now_ms.saturating_sub(seen.caught_up_ms).max(0) };
            Lag { broker: *broker, records, ms }
        };
        self.seen.iter().map(lag).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe(lags: &mut Lags, log_end: i64, offset: i64, now_ms: i64) {
        lags.observe(log_end, [Position { broker: 2, offset }].into_iter(), now_ms);
    }

    fn told(lags: &Lags, now_ms: i64) -> (i64, i64) {
        let told = lags.now(0, now_ms);
        assert_eq!(told.len(), 1);
        (told[0].records, told[0].ms)
    }

    #[test]
    fn time_counts_from_when_the_follower_had_everything() {
        let mut lags = Lags::default();
        observe(&mut lags, 10, 10, 1000);
        assert_eq!(told(&lags, 9000), (0, 0));
        // However long nothing came, it is not late before something does.
        observe(&mut lags, 15, 10, 10_000);
        assert_eq!(told(&lags, 10_300), (5, 300));
        observe(&mut lags, 20, 12, 11_000);
        assert_eq!(told(&lags, 11_000), (8, 1000));
        // At 15 it has what the leader had at 10,000.
        observe(&mut lags, 20, 15, 12_000);
        assert_eq!(told(&lags, 12_000), (5, 2000));
        observe(&mut lags, 20, 20, 12_500);
        assert_eq!(told(&lags, 99_000), (0, 0));
    }

    #[test]
    fn a_follower_that_keeps_pace_is_never_long_behind() {
        let mut lags = Lags::default();
        observe(&mut lags, 0, 0, 0);
        for n in 1..1000 {
            // It always lacks the last batch.
            observe(&mut lags, n * 10, (n - 1) * 10, n * 10);
            assert!(told(&lags, n * 10).1 <= 10, "{:?}", told(&lags, n * 10));
        }
        let (records, ms) = told(&lags, 20_000);
        assert!(records == 10 && ms > 9_900, "{records} {ms}");
    }

    #[test]
    fn what_was_deleted_is_missed_by_nobody_and_who_left_is_not_told_of() {
        let mut lags = Lags::default();
        observe(&mut lags, 100, -1, 0);
        assert_eq!(told(&lags, 50), (100, 50));
        assert_eq!(lags.now(90, 50), [Lag { broker: 2, records: 10, ms: 50 }]);
        assert_eq!(lags.now(100, 50), [Lag { broker: 2, records: 0, ms: 0 }]);
        lags.observe(100, [Position { broker: 3, offset: 100 }].into_iter(), 60);
        assert_eq!(lags.now(0, 70), [Lag { broker: 3, records: 0, ms: 0 }]);
    }
}
