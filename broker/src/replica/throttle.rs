//! How fast new replicas of partitions that move are sent what they lack.
//!
//! A limit is a broker's: so many bytes a second are what it takes in of all the partitions that move to it together, from whomever. The leaders
//! of these partitions share it among them, each by how many of them it leads, which every broker tells from the metadata alone: whatever one
//! of them does not use, nobody does, and the sum is never more than the limit. Where partitions were given different ones, the highest is
//! the broker's, and each partition keeps to its own besides.
//!
//! A limit is of the metadata: it counts from the moment that they say so, and no more once the replica is in sync. Nothing is
//! saved up: after a pause no more goes at once than before.
//!
//! Owns: the pace ([`Pace`], pure), and where the limit comes from. Refuses: to wait; [`super::serve`] does.

use crate::metadata::{MetadataHandle, MetadataState};
use headwater_proto::TopicId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Pieces a second: what one of them holds is waited for in one go.
const PIECES_A_SECOND: u64 = 8;
/// The smallest piece worth a frame.
const SMALLEST_PIECE_BYTES: u64 = 512;
/// The longest that nobody looks whether the limit is another one.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// So many bytes a second, each at its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    bytes_per_second: u64,
    /// When the next byte may go, since some moment.
    next: Duration,
}

impl Pace {
    fn new(bytes_per_second: u64, now: Duration) -> Pace {
        Pace { bytes_per_second: bytes_per_second.max(1), next: now }
    }

    /// The same, at another pace: what has gone is paid for at the new one.
    fn at(self, bytes_per_second: u64, now: Duration) -> Pace {
        let bytes_per_second = bytes_per_second.max(1);
        let unpaid = self.wait(now).as_nanos().saturating_mul(u128::from(self.bytes_per_second));
        let wait = u64::try_from(unpaid / u128::from(bytes_per_second)).unwrap_or(u64::MAX);
        Pace { bytes_per_second, next: now.saturating_add(Duration::from_nanos(wait)) }
    }

    /// How long nothing may go.
    fn wait(&self, now: Duration) -> Duration {
        self.next.saturating_sub(now)
    }

    /// How much may go at once.
    fn piece_bytes(&self) -> u64 {
        (self.bytes_per_second / PIECES_A_SECOND).max(SMALLEST_PIECE_BYTES)
    }

    fn sent(&mut self, bytes: u64, now: Duration) {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let wait = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.next = self.next.max(now).saturating_add(wait);
    }
}

/// What this broker, as a leader, may send a broker in a second, of all the partitions together that move to it: its part of that broker's
/// limit. `None`: there is no limit.
fn share(state: &MetadataState, leader: i32, follower: i32) -> Option<u64> {
    let (mut limit, mut led, mut all) = (0u64, 0u64, 0u64);
    for partition in state.topics().flat_map(|topic| &topic.partitions) {
        if let Some(its) = partition.throttle_of(follower) {
            limit = limit.max(its);
            led += u64::from(partition.leader == leader);
            // Nobody sends what nobody leads.
            all += u64::from(partition.leader >= 0);
        }
    }
    let part = u128::from(limit) * u128::from(led) / u128::from(all.max(1));
    (limit > 0).then(|| u64::try_from(part).unwrap_or(u64::MAX).max(1))
}

/// What goes to one broker.
#[derive(Debug)]
struct Taken {
    /// The metadata as of which the pace is.
    index: u64,
    pace: Pace,
}

/// What this broker sends to others whose partitions move there, all streams together.
#[derive(Debug)]
pub(crate) struct Throttles {
    began: Instant,
    followers: Mutex<HashMap<i32, Taken>>,
}

impl Throttles {
    pub(crate) fn new() -> Throttles {
        Throttles { began: Instant::now(), followers: Mutex::default() }
    }

    /// The pace at which a broker is sent things now.
    fn pace(&self, state: &MetadataState, leader: i32, follower: i32) -> Option<Pace> {
        let now = self.began.elapsed();
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        let known = followers.get(&follower).filter(|taken| taken.index >= state.index());
        if let Some(taken) = known {
            return Some(taken.pace);
        }
        let Some(share) = share(state, leader, follower) else {
            followers.remove(&follower);
            return None;
        };
        let pace = match followers.get(&follower) {
            Some(taken) => taken.pace.at(share, now),
            None => Pace::new(share, now),
        };
        followers.insert(follower, Taken { index: state.index(), pace });
        Some(pace)
    }

    fn sent(&self, follower: i32, bytes: u64) {
        let now = self.began.elapsed();
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = followers.get_mut(&follower) {
            taken.pace.sent(bytes, now);
        }
    }
}

/// What limits one stream, if anything does now.
pub(super) struct Throttle {
    throttles: Arc<Throttles>,
    metadata: MetadataHandle,
    changes: watch::Receiver<u64>,
    topic_id: TopicId,
    partition: u32,
    leader: i32,
    follower: i32,
    /// Its partition's own.
    pace: Option<Pace>,
}

impl Throttle {
    /// Of what goes from this leader of a partition to this follower.
    pub(super) fn new(
        throttles: &Arc<Throttles>,
        metadata: &MetadataHandle,
        (topic_id, partition): (TopicId, u32),
        (leader, follower): (i32, i32),
    ) -> Throttle {
        let (throttles, metadata, mut changes) = (Arc::clone(throttles), metadata.clone(), metadata.changes());
        changes.mark_changed();
        Throttle { throttles, metadata, changes, topic_id, partition, leader, follower, pace: None }
    }

    /// How long nothing may go (not at all, mostly), and how much at once after that.
    pub(super) fn allows(&mut self) -> (Duration, usize) {
        let now = self.throttles.began.elapsed();
        // Metadata that nobody changes any more leave it as it is.
        if self.changes.has_changed().unwrap_or(false) {
            self.changes.mark_unchanged();
            let state = self.metadata.state();
            let partition = state.topic_by_id(&self.topic_id).and_then(|it| it.partitions.get(self.partition as usize));
            let limit = partition.and_then(|partition| partition.throttle_of(self.follower));
            self.pace = limit.map(|limit| match self.pace {
                Some(pace) if pace.bytes_per_second == limit => pace,
                _ => Pace::new(limit, now),
            });
        }
        let Some(own) = &self.pace else { return (Duration::ZERO, usize::MAX) };
        let all = self.throttles.pace(&self.metadata.state(), self.leader, self.follower).unwrap_or(*own);
        let (wait, piece) = (own.wait(now).max(all.wait(now)), own.piece_bytes().min(all.piece_bytes()));
        (wait.min(LOOK_AGAIN), usize::try_from(piece).unwrap_or(usize::MAX))
    }

    /// So much goes: said before it does, so that no other stream takes the same moment.
    pub(super) fn sends(&mut self, bytes: u64) {
        let now = self.throttles.began.elapsed();
        if let Some(pace) = &mut self.pace {
            pace.sent(bytes, now);
            self.throttles.sent(self.follower, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{self, command::Command as Kind};
    use proptest::prelude::*;

    #[test]
    fn a_piece_is_paid_for_before_the_next() {
        let at = Duration::from_millis;
        let mut pace = Pace::new(1000, at(5000));
        assert_eq!(pace.wait(at(5000)), Duration::ZERO);
        pace.sent(500, at(5000));
        assert_eq!((pace.wait(at(5000)), pace.wait(at(5400)), pace.wait(at(5500))), (at(500), at(100), at(0)));
        // A pause saves nothing up.
        pace.sent(500, at(60_000));
        assert_eq!(pace.wait(at(60_000)), at(500));
        assert_eq!(Pace::new(1 << 20, at(0)).piece_bytes(), 1 << 17);
        assert_eq!(Pace::new(0, at(0)).piece_bytes(), SMALLEST_PIECE_BYTES);
        // At another pace, what is unpaid takes as much less or more.
        assert_eq!(pace.at(500, at(60_000)).wait(at(60_000)), at(1000));
        assert_eq!(pace.at(u64::MAX, at(60_000)).wait(at(60_000)), at(0));
        assert_eq!(pace.at(500, at(90_000)).wait(at(90_000)), at(0));
    }

    /// Partitions that move to broker 3, by who leads them and their limits; `None`: it does not move.
    fn moving(partitions: &[(i32, Option<u64>)]) -> MetadataState {
        let mut state = MetadataState::new("cluster");
        let mut apply = |kind: Kind| state.apply(state.index() + 1, &kind.into()).expect("accepted");
        for broker_id in 1..=3 {
            apply(Kind::RegisterBroker(command::RegisterBroker { broker_id, feature_level: 2, ..Default::default() }));
        }
        apply(Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: 2 }));
        let topic_id = TopicId::from_bytes([7; 16]).to_wire();
        let kept = |(leader, _): &(i32, _)| command::Replicas { brokers: vec![*leader] };
        let (name, id) = ("t".to_owned(), topic_id.clone());
        let replicas = partitions.iter().map(kept).collect();
        apply(Kind::CreateTopic(command::CreateTopic {
            name,
            topic_id: id,
            partitions: replicas,
            ..Default::default()
        }));
        for ((_, limit), partition) in partitions.iter().zip(0..) {
            let Some(throttle_bytes_per_second) = *limit else { continue };
            let (topic_id, replicas) = (topic_id.clone(), vec![3]);
            apply(Kind::Reassign(command::Reassign { topic_id, partition, replicas, throttle_bytes_per_second }));
        }
        state
    }

    #[test]
    fn leaders_share_what_a_broker_takes_in_by_how_many_partitions_they_lead() {
        let state = moving(&[(1, Some(900)), (1, Some(900)), (2, Some(900)), (2, None), (1, Some(0))]);
        assert_eq!((share(&state, 1, 3), share(&state, 2, 3)), (Some(600), Some(300)));
        assert_eq!(share(&state, 1, 2), None, "nothing moves there");
        // The highest is the broker's.
        let state = moving(&[(1, Some(100)), (2, Some(1000))]);
        assert_eq!((share(&state, 1, 3), share(&state, 2, 3)), (Some(500), Some(500)));
        assert_eq!(share(&moving(&[(1, Some(1)), (2, Some(1))]), 2, 3), Some(1), "never nothing");
    }

    #[test]
    fn all_streams_to_a_broker_wait_for_what_any_of_them_sent() {
        let state = moving(&[(1, Some(1000)), (1, Some(1000))]);
        let throttles = Throttles::new();
        let pace = || throttles.pace(&state, 1, 3).expect("there is a limit");
        assert_eq!(pace().wait(throttles.began.elapsed()), Duration::ZERO);
        throttles.sent(3, 60_000);
        let wait = pace().wait(throttles.began.elapsed());
        assert!(wait > Duration::from_secs(50) && wait <= Duration::from_secs(60), "{wait:?}");
        // A broker to which nothing moves any more waits for nothing.
        let mut after = moving(&[(1, None)]);
        while after.index() <= state.index() {
            let again = Kind::RaiseFeatureLevel(command::RaiseFeatureLevel { level: 2 });
            after.apply(after.index() + 1, &again.into()).expect("accepted");
        }
        assert_eq!(throttles.pace(&after, 1, 3), None);
    }

    proptest! {
        #[test]
        fn whoever_waits_as_told_sends_no_more_than_the_limit(
            limit in 1..10_000_000u64,
            steps in prop::collection::vec((0..5_000_000u64, 0..3_000u64), 1..200),
        ) {
            let mut pace = Pace::new(limit, Duration::ZERO);
            let (mut now, mut sent, mut last) = (Duration::ZERO, 0u64, 0u64);
            for (bytes, late_ms) in steps {
                now += pace.wait(now) + Duration::from_millis(late_ms);
                // All but the last piece was paid for.
                prop_assert!(u128::from(sent) * 1_000_000_000 <= now.as_nanos() * u128::from(limit) + u128::from(limit) * 200);
                pace.sent(bytes, now);
                (sent, last) = (sent + bytes, bytes);
            }
            prop_assert!(last <= sent);
        }
    }
}
