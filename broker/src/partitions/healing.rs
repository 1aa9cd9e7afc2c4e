//! Replicas that were damaged while their broker ran, and are made anew without a restart of it.
//!
//! A read, a check, a write or a flush that failed fences a replica. Once the metadata know that (it is in sync no more, and may not be) and
//! another broker leads, what is left of it is set aside and a fresh log is fetched, as for one that was found damaged at the start
//! ([`super::lost`]). One that fails again has a longer time to wait for each further try, and as many tries an hour as [`Tries`] says: a disk that
//! goes on failing is for a person to look at. What was fenced for another reason than damage stays as it is: there, nothing is wrong with
//! the disk.
//!
//! Owns: when a damaged replica is made anew. Refuses: to fence (partitions do), and what the controller makes of it. Read next: [`super::lost`].

use super::{Key, Partitions};
use crate::partition::PartitionHandle;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Tries an hour for one replica.
const TRIES: usize = 4;
/// Tries an hour, of all replicas, that are not a replica's first.
const FURTHER_TRIES: usize = 32;
const AN_HOUR: Duration = Duration::from_secs(3600);
/// The pause before the second try; the next ones are so many times as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const GROWTH: u32 = 6;
/// Time to hear of everything that was decided.
const ANSWERS: Duration = Duration::from_secs(3);
/// How long a job of the old log may take to come back; else it is waited for another time.
const LAST_JOB: Duration = Duration::from_secs(5);

/// When replicas were made anew in the last hour.
#[derive(Debug, Default)]
pub(super) struct Tries {
    by_replica: HashMap<Key, VecDeque<Instant>>,
    further: VecDeque<Instant>,
}

/// What becomes of a damaged replica.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Now,
    Later,
    /// It has had its tries; said once.
    Enough,
}

impl Tries {
    /// Whether it is a replica's turn. Where it is, that counts as a try.
    fn turn(&mut self, key: Key, now: Instant) -> Turn {
        let is_over = |at: &Instant| now.saturating_duration_since(*at) >= AN_HOUR;
        let forget = |tries: &mut VecDeque<Instant>| {
            while tries.front().is_some_and(is_over) {
                tries.pop_front();
            }
        };
        self.by_replica.values_mut().for_each(forget);
        self.by_replica.retain(|_, tries| !tries.is_empty());
        forget(&mut self.further);
        let tries = self.by_replica.entry(key).or_default();
        let before = u32::try_from(tries.len()).unwrap_or(u32::MAX);
        if let Some(last) = tries.back() {
            let pause = FIRST_PAUSE * GROWTH.saturating_pow(before - 1);
            if now.saturating_duration_since(*last) < pause.min(AN_HOUR) {
                return Turn::Later;
            }
            if tries.len() > TRIES {
                return Turn::Later;
            }
            if tries.len() == TRIES || self.further.len() >= FURTHER_TRIES {
                // A mark that is no try: it is said again in an hour at the earliest.
                tries.resize(TRIES + 1, now);
                return Turn::Enough;
            }
            self.further.push_back(now);
        }
        tries.push_back(now);
        Turn::Now
    }
}

impl Partitions {
    /// Gives up what is left of damaged replicas whose turn it is: they count as lost from then on, and are made anew.
    pub(super) async fn give_up_damaged(&self) {
        let damaged = self.damaged();
        // They were found damaged before this. What this broker knows may be of the past: such a replica may have been restored and taken in sync
        // since, after it was fenced for something else.
        if damaged.is_empty() || !self.catch_up().await {
            return;
        }
        for handle in damaged.into_iter().filter(|handle| self.may_begin_anew(handle)) {
            let (topic, partition) = (handle.topic(), handle.partition());
            let turn = self.tries().turn((handle.topic_id(), partition), Instant::now());
            match turn {
                Turn::Now => self.give_up(&handle).await,
                Turn::Later => {}
                Turn::Enough => tracing::error!(
                    %topic, partition,
                    "a replica fails again and again and is not fetched anew for an hour: look at its disk"
                ),
            }
        }
    }

    /// The replicas that were damaged while this broker ran, which the metadata know, and that somebody else leads.
    fn damaged(&self) -> Vec<PartitionHandle> {
        let kept = self.kept();
        let damaged = kept.open.values().filter(|handle| handle.is_damaged() && self.may_begin_anew(handle));
        damaged.filter(|handle| !self.is_lost(handle)).cloned().collect()
    }

    async fn catch_up(&self) -> bool {
        match self.context.replication.get() {
            Some(replication) => replication.catch_up(ANSWERS).await,
            None => false,
        }
    }

    fn may_begin_anew(&self, handle: &PartitionHandle) -> bool {
        let known = self.context.replication.get().and_then(|it| it.partition(&handle.topic_id(), handle.partition()));
        known.is_some_and(|known| known.may_begin_anew(handle.me().broker))
    }

    async fn give_up(&self, handle: &PartitionHandle) {
        let (topic, partition) = (handle.topic(), handle.partition());
        // What is written to the old log while it is set aside would be found in the new one's place.
        let ended = async {
            // It was fenced, and has nothing to close in good order.
            drop(handle.close().await);
            drop(handle.compacting().lock().await);
        };
        if timeout(LAST_JOB, ended).await.is_err() {
            return tracing::warn!(%topic, partition, "a damaged replica is not fetched anew yet: its disk hangs");
        }
        // It may have been let go of meanwhile, or be assigned anew.
        let is_there = self.kept().open.get(&(handle.topic_id(), partition)).is_some_and(|open| open.is(handle));
        if !is_there || !self.may_begin_anew(handle) {
            return;
        }
        let why = handle.ended().map(|why| why.to_string()).unwrap_or_default();
        tracing::warn!(%topic, partition, why, "what is left of a damaged replica is given up: another broker has the partition");
        self.count_as_lost(handle);
        self.context.metrics.replicas_healed.increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Partition;
    use crate::metadata::state::NO_LEADER;
    use headwater_proto::TopicId;

    fn key(partition: u32) -> Key {
        (TopicId::from_bytes([1; 16]), partition)
    }

    #[test]
    fn a_replica_that_fails_again_waits_longer_each_time_and_has_few_tries_an_hour() {
        let (mut tries, began) = (Tries::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(tries.turn(key(0), at(0)), Turn::Now);
        assert_eq!(tries.turn(key(1), at(1)), Turn::Now, "another one has not failed before");
        let mut tried = vec![0];
        let mut told = Vec::new();
        for seconds in 1..3600 {
            match tries.turn(key(0), at(seconds)) {
                Turn::Now => tried.push(seconds),
                Turn::Enough => told.push(seconds),
                Turn::Later => {}
            }
        }
        assert_eq!(tried, [0, 10, 70, 430]);
        assert_eq!(told, [2590], "once");
        assert_eq!(tries.turn(key(0), at(3600 + 2590)), Turn::Now, "an hour later");
    }

    /// A disk with ten thousand replicas is not written anew four times an hour.
    #[test]
    fn a_disk_that_goes_on_failing_has_a_bounded_number_of_tries() {
        let (mut tries, began) = (Tries::default(), Instant::now());
        let mut now = 0;
        for second in 0..3000 {
            for partition in 0..200 {
                now += usize::from(tries.turn(key(partition), began + Duration::from_secs(second)) == Turn::Now);
            }
        }
        assert_eq!(now, 200 + FURTHER_TRIES);
    }

    #[test]
    fn only_what_the_metadata_know_to_be_of_no_use_and_another_broker_leads_begins_anew() {
        let fenced = Partition { fenced: vec![1], ..Partition::new(vec![1, 2], vec![2], 3) };
        assert!(fenced.may_begin_anew(1));
        let but = |change: fn(&mut Partition)| {
            let mut partition = fenced.clone();
            change(&mut partition);
            partition.may_begin_anew(1)
        };
        assert!(!but(|it| it.fenced.clear()), "nobody knows of it yet");
        assert!(!but(|it| it.isr = vec![1, 2]), "it may be elected yet");
        assert!(!but(|it| it.elr = vec![1]));
        assert!(!but(|it| (it.leader, it.last_known) = (NO_LEADER, vec![1])), "it may be the last one");
        assert!(!but(|it| it.leader = NO_LEADER));
        assert!(!but(|it| it.leader = 1));
    }
}
