//! Work that comes round: over one partition after another, so that it takes no more than one thread from commits; one that is
//! stuck (its disk hangs) is left behind to end when it can, and passed over meanwhile.
//!
//! Owns: whose turn it is. Refuses: to know what is done, and to stop what is stuck: nobody can. Read next: [`crate::partitions`]
//! (retention), [`crate::cleaner`].

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use headwater_proto::TopicId;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// Without a sign of life for so long, work counts as stuck.
pub(crate) const STUCK_AFTER: Duration = Duration::from_secs(10);

/// A partition.
pub(crate) type Key = (TopicId, u32);

/// Signs of life of work.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    beats: AtomicU64,
    queued: AtomicBool,
}

impl Pulse {
    /// The work goes on.
    pub(crate) fn beat(&self) {
        self.queued.store(false, Ordering::Relaxed);
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// The work waits for a thread, until it beats: that says nothing of the partition.
    pub(crate) fn queue(&self) {
        self.queued.store(true, Ordering::Relaxed);
    }

    /// Waits until there was no sign of life for [`STUCK_AFTER`].
    async fn silent(&self) {
        let (mut beats, mut since) = (0, Instant::now());
        while since.elapsed() < STUCK_AFTER {
            sleep(STUCK_AFTER / 10).await;
            let now = self.beats.load(Ordering::Relaxed);
            if now != beats || self.queued.load(Ordering::Relaxed) {
                (beats, since) = (now, Instant::now());
            }
        }
    }
}

/// What was left behind.
#[derive(Default)]
pub(crate) struct Rounds<'a> {
    stuck: FuturesUnordered<BoxFuture<'a, Key>>,
    keys: HashSet<Key>,
}

impl<'a> Rounds<'a> {
    /// Whether work on this partition was left behind and goes on.
    pub(crate) fn is_stuck(&self, key: &Key) -> bool {
        self.keys.contains(key)
    }

    /// Does `work`, unless it gets stuck. False: it did, and is left behind.
    pub(crate) async fn attend(&mut self, key: Key, mut work: BoxFuture<'a, Key>, pulse: &Pulse) -> bool {
        let mut silent = std::pin::pin!(pulse.silent());
        loop {
            tokio::select! {
                biased;
                _ = &mut work => return true,
                Some(ended) = self.stuck.next() => drop(self.keys.remove(&ended)),
                () = &mut silent => break,
            }
        }
        self.keys.insert(key);
        self.stuck.push(work);
        false
    }

    /// Waits for the next round; true if `shutdown` came before.
    pub(crate) async fn pause(&mut self, interval: Duration, shutdown: &CancellationToken) -> bool {
        let mut interval = std::pin::pin!(sleep(interval));
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return true,
                Some(ended) = self.stuck.next() => drop(self.keys.remove(&ended)),
                () = &mut interval => return false,
            }
        }
    }
}
