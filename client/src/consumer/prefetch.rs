//! How the prefetch is shared out.
//!
//! Owns: [`Prefetch`], the bytes that a consumer's partitions may fetch ahead together, and [`Claim`], what one of them has
//! of it. Refuses: counting what arrived (see [`super::credit`]). Read next: [`super::fetch`], which keeps to it.
//!
//! What must always hold: the claims together are at most the prefetch. Where it is claimed already, a partition may fetch
//! [`SMALLEST_SHARE_BYTES`] ahead all the same. So what is granted, on its way or waiting for the application is at most
//! the prefetch and that much for each partition, and the batch that each is putting together, whatever comes and goes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::connection::lock;

/// What a partition may fetch ahead at least.
pub(crate) const SMALLEST_SHARE_BYTES: u64 = 16 << 10;
/// And at most: more keeps no reader busier.
const LARGEST_SHARE_BYTES: u64 = 4 << 20;

/// What the partitions of a consumer may fetch ahead.
#[derive(Debug)]
pub(crate) struct Prefetch {
    bytes: u64,
    /// What each partition may claim now.
    share: AtomicU64,
    pool: Mutex<Pool>,
}

#[derive(Debug)]
struct Pool {
    free: u64,
    claims: HashMap<u64, Part>,
    /// Somebody got less than was wanted.
    short: bool,
    next_number: u64,
}

#[derive(Debug)]
struct Part {
    bytes: u64,
    wake: Arc<Notify>,
}

impl Prefetch {
    /// `bytes` for one partition, to begin with.
    pub(crate) fn new(bytes: u64) -> Arc<Prefetch> {
        let pool = Pool { free: bytes, claims: HashMap::new(), short: false, next_number: 0 };
        Arc::new(Prefetch { bytes, share: AtomicU64::new(share(bytes, 1)), pool: Mutex::new(pool) })
    }

    /// There are so many partitions now. Those who read them are woken where their share is another now.
    pub(crate) fn divide(&self, partitions: usize) {
        let share = share(self.bytes, partitions as u64);
        if self.share.swap(share, Ordering::AcqRel) != share {
            lock(&self.pool).claims.values().for_each(|part| part.wake.notify_one());
        }
    }

    pub(crate) fn share(&self) -> u64 {
        self.share.load(Ordering::Acquire)
    }

    /// A claim of nothing, yet. `wake` is notified when there may be more for it, and when the share has changed.
    pub(crate) fn claim(self: &Arc<Self>, wake: Arc<Notify>) -> Claim {
        let mut pool = lock(&self.pool);
        pool.next_number += 1;
        let number = pool.next_number;
        pool.claims.insert(number, Part { bytes: 0, wake });
        Claim { prefetch: self.clone(), number }
    }
}

/// The even share of `partitions`, counted up to a power of two: so that one more or less does not change everybody's.
fn share(bytes: u64, partitions: u64) -> u64 {
    (bytes / partitions.max(1).next_power_of_two()).clamp(SMALLEST_SHARE_BYTES, LARGEST_SHARE_BYTES)
}

impl Pool {
    /// Takes back, and wakes those who want it.
    fn give_back(&mut self, bytes: u64, share: u64) {
        self.free += bytes;
        if bytes > 0 && std::mem::take(&mut self.short) {
            self.claims.values().filter(|part| part.bytes < share).for_each(|part| part.wake.notify_one());
        }
    }
}

/// What one partition has of the prefetch, for as long as anything of it may be held. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Claim {
    prefetch: Arc<Prefetch>,
    number: u64,
}

impl Claim {
    pub(crate) fn share(&self) -> u64 {
        self.prefetch.share()
    }

    /// Claims `wanted` bytes in all, or as much as there is; says how much it is now.
    pub(crate) fn adjust(&self, wanted: u64) -> u64 {
        let mut pool = lock(&self.prefetch.pool);
        let pool = &mut *pool;
        let Some(part) = pool.claims.get_mut(&self.number) else { return 0 };
        let surplus = part.bytes.saturating_sub(wanted);
        let more = wanted.saturating_sub(part.bytes).min(pool.free);
        part.bytes = part.bytes - surplus + more;
        let bytes = part.bytes;
        pool.free -= more;
        pool.short |= bytes < wanted;
        pool.give_back(surplus, self.prefetch.share());
        bytes
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut pool = lock(&self.prefetch.pool);
        let bytes = pool.claims.remove(&self.number).map_or(0, |part| part.bytes);
        pool.give_back(bytes, self.prefetch.share());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    fn claim(prefetch: &Arc<Prefetch>) -> (Claim, Arc<Notify>) {
        let wake = Arc::new(Notify::new());
        (prefetch.claim(wake.clone()), wake)
    }

    fn is_woken(wake: &Notify) -> bool {
        wake.notified().now_or_never().is_some()
    }

    #[test]
    fn a_share_is_even_and_neither_tiny_nor_huge() {
        assert_eq!([1, 8, 9, 16, 1 << 20].map(|n| share(32 << 20, n) >> 10), [4096, 4096, 2048, 2048, 16]);
        assert_eq!(share(100_000, 1), 100_000);
        assert_eq!(share(1, 0), SMALLEST_SHARE_BYTES);
    }

    #[test]
    fn who_comes_late_is_short_until_others_give_back() {
        let prefetch = Prefetch::new(1 << 20);
        let (first, told) = claim(&prefetch);
        assert_eq!(first.adjust(prefetch.share()), 1 << 20);
        assert!(!is_woken(&told));
        prefetch.divide(2);
        assert!(is_woken(&told), "its share is half of what it was");
        let (second, wake) = claim(&prefetch);
        assert_eq!(second.adjust(prefetch.share()), 0);
        assert_eq!(first.adjust(700 << 10), 700 << 10);
        assert!(is_woken(&wake));
        assert_eq!(second.adjust(prefetch.share()), 324 << 10);
        drop(first);
        assert!(is_woken(&wake), "it still had less than its share");
        assert_eq!(second.adjust(prefetch.share()), 512 << 10);
        prefetch.divide(1);
        assert!(is_woken(&wake));
    }

    proptest! {
        #[test]
        fn claims_are_never_more_than_the_prefetch(
            bytes in 0u64..100_000,
            steps in proptest::collection::vec((0usize..6, 0u64..50_000, 0usize..20), 1..200),
        ) {
            let prefetch = Prefetch::new(bytes);
            let mut claims: Vec<Option<Claim>> = (0..6).map(|_| Some(claim(&prefetch).0)).collect();
            for (at, wanted, partitions) in steps {
                match &claims[at] {
                    Some(claim) if wanted % 7 > 0 => prop_assert!(claim.adjust(wanted) <= wanted),
                    Some(_) => claims[at] = None,
                    None => claims[at] = Some(claim(&prefetch).0),
                }
                prefetch.divide(partitions);
                let pool = lock(&prefetch.pool);
                prop_assert_eq!(pool.free + pool.claims.values().map(|part| part.bytes).sum::<u64>(), bytes);
            }
            drop(claims);
            prop_assert_eq!(lock(&prefetch.pool).free, bytes);
        }
    }
}
