//! How fast a new replica of a partition that moves is sent what it lacks.
//!
//! A limit is of the metadata: it counts from the moment that they say so, and no more once the replica is in sync. Nothing is
//! saved up: after a pause no more goes at once than before.
//!
//! Owns: the pace ([`Pace`], pure), and where the limit comes from. Refuses: to wait; [`super::serve`] does.

use crate::metadata::MetadataHandle;
use headwater_proto::TopicId;
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
        self.next = self.next.max(now) + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
    }
}

/// The limit of one stream, if there is one now.
pub(super) struct Throttle {
    metadata: MetadataHandle,
    changes: watch::Receiver<u64>,
    topic_id: TopicId,
    partition: u32,
    follower: i32,
    began: Instant,
    pace: Option<Pace>,
}

impl Throttle {
    /// Of what goes to this follower of a partition.
    pub(super) fn new(metadata: &MetadataHandle, topic_id: TopicId, partition: u32, follower: i32) -> Throttle {
        let (metadata, mut changes) = (metadata.clone(), metadata.changes());
        changes.mark_changed();
        Throttle { metadata, changes, topic_id, partition, follower, began: Instant::now(), pace: None }
    }

    /// How long nothing may go (not at all, mostly), and how much at once after that.
    pub(super) fn allows(&mut self) -> (Duration, usize) {
        let now = self.began.elapsed();
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
        match &self.pace {
            None => (Duration::ZERO, usize::MAX),
            Some(pace) => (pace.wait(now).min(LOOK_AGAIN), usize::try_from(pace.piece_bytes()).unwrap_or(usize::MAX)),
        }
    }

    /// So much went.
    pub(super) fn sent(&mut self, bytes: u64) {
        let now = self.began.elapsed();
        if let Some(pace) = &mut self.pace {
            pace.sent(bytes, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
