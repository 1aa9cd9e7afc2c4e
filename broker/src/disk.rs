//! What the disk does to this broker's replicas: which of them it fenced, and which wait for it.
//!
//! A replica whose log failed, or from which a job does not come back, is of no use to anybody: the broker's heartbeats name it, and the
//! controller takes it out of the in-sync and the eligible replicas, so that its leadership moves. A flush that comes back after all is
//! named too, and the replica may be in sync again; and so may one that was set aside and is fetched from its leader, once that knows it for
//! another log: what the earlier one had reported counts with the leader until then. Any other log that failed stays fenced until its broker
//! starts.
//!
//! Owns: [`DiskHealth`]. Refuses: to fence (partitions do) and to decide (the controller does).

use crate::rounds::Key;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A job that may be long by itself has so many times the patience.
const LONG_JOB: u32 = 10;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct DiskHealth {
    /// A write or a flush that takes longer is a failure of the disk.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many marks each fenced replica has: an old task of a partition may end after a new one began.
    fenced: HashMap<Key, usize>,
    /// The job under way on each replica's log.
    busy: HashMap<Key, Begun>,
    /// Those that were ever told of as unfit: the metadata may count them as fenced, or come to do so by what a controller heard long ago.
    told: HashSet<Key>,
    /// Those whose log failed, until they begin with another one.
    failed: HashSet<Key>,
    /// How often each replica was made anew, and whether its leader is still to hear of the last time.
    anew: HashMap<Key, (u64, bool)>,
}

/// A job that is under way.
#[derive(Debug, Clone, Copy)]
struct Begun {
    at: Instant,
    patience: Duration,
}

impl Begun {
    fn hangs(&self) -> bool {
        self.at.elapsed() >= self.patience
    }
}

impl DiskHealth {
    pub(crate) fn new(patience: Duration) -> DiskHealth {
        DiskHealth { patience, state: Mutex::default() }
    }

    /// A replica is fenced, until what is returned is dropped.
    pub(crate) fn fenced(self: &Arc<Self>, key: Key) -> Fenced {
        let mut state = self.lock();
        *state.fenced.entry(key).or_default() += 1;
        state.failed.insert(key);
        drop(state);
        Fenced { health: Arc::clone(self), key }
    }

    /// A job is done on a replica's log, until what is returned is dropped. There is one for it at a time. `is_long`: it may take its time
    /// where the disk is well, as what is deleted, cut or put in place of other segments; a write and a flush may not.
    pub(crate) fn begin(self: &Arc<Self>, key: Key, is_long: bool) -> Busy {
        let patience = if is_long { self.patience * LONG_JOB } else { self.patience };
        self.lock().busy.insert(key, Begun { at: Instant::now(), patience });
        Busy { health: Arc::clone(self), key }
    }

    /// A replica that was lost or fenced begins anew, on a log that is well. Not until its leader knows that log for another one is it named as
    /// well: in sync by what the earlier log held, it might lead with nothing.
    pub(crate) fn begins_anew(&self, key: Key) {
        let mut state = self.lock();
        state.failed.remove(&key);
        state.told.insert(key);
        let (times, is_unknown) = state.anew.entry(key).or_default();
        (*times, *is_unknown) = (*times + 1, true);
    }

    /// How often a replica was made anew.
    pub(crate) fn times_anew(&self, key: Key) -> u64 {
        self.lock().anew.get(&key).map_or(0, |(times, _)| *times)
    }

    /// The leader knows the log of a replica, or nobody leads: one that was made anew is well from here on.
    pub(crate) fn is_known(&self, key: Key) {
        if let Some((_, is_unknown)) = self.lock().anew.get_mut(&key) {
            *is_unknown = false;
        }
    }

    /// A replica begins with a log that is well, after whatever this broker kept of it before.
    pub(crate) fn begins(&self, key: Key) {
        self.lock().failed.remove(&key);
    }

    /// The replicas that are of no use, in order. They count as told of from here on.
    pub(crate) fn unfit(&self) -> Vec<Key> {
        let mut state = self.lock();
        let hung = state.busy.iter().filter(|(_, begun)| begun.hangs()).map(|(key, _)| *key);
        let mut unfit: Vec<Key> = state.fenced.keys().copied().chain(hung).collect();
        unfit.sort_unstable();
        unfit.dedup();
        state.told.extend(&unfit);
        unfit
    }

    /// The replicas that were of no use, and are well now: the disk came back, or they begin anew. In order. They are named for as long as
    /// the metadata count them as fenced, however that comes.
    pub(crate) fn restored(&self) -> Vec<Key> {
        let state = self.lock();
        let hangs = |key: &Key| state.busy.get(key).is_some_and(Begun::hangs);
        // The task that was fenced may not have ended yet.
        let is_fenced = |key: &Key| state.failed.contains(key) || state.fenced.contains_key(key);
        let is_unknown = |key: &Key| state.anew.get(key).is_some_and(|(_, is_unknown)| *is_unknown);
        let well = state.told.iter().copied().filter(|key| !hangs(key) && !is_fenced(key) && !is_unknown(key));
        let mut restored: Vec<Key> = well.collect();
        restored.sort_unstable();
        restored
    }

    /// Forgets those of partitions that there are no more.
    pub(crate) fn forget(&self, is_there: impl Fn(&Key) -> bool) {
        let mut state = self.lock();
        state.told.retain(&is_there);
        state.failed.retain(&is_there);
        state.anew.retain(|key, _| is_there(key));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A replica that its disk fenced.
#[derive(Debug)]
pub(crate) struct Fenced {
    health: Arc<DiskHealth>,
    key: Key,
}

impl Drop for Fenced {
    fn drop(&mut self) {
        let mut state = self.health.lock();
        if let Some(marks) = state.fenced.get_mut(&self.key) {
            *marks -= 1;
            if *marks == 0 {
                state.fenced.remove(&self.key);
            }
        }
    }
}

/// A log that is being written or flushed.
#[derive(Debug)]
pub(crate) struct Busy {
    health: Arc<DiskHealth>,
    key: Key,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.health.lock();
        state.busy.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_proto::TopicId;

    #[test]
    fn what_is_fenced_or_hangs_is_unfit() {
        let key = |partition| (TopicId::from_bytes([1; 16]), partition);
        let patient = Arc::new(DiskHealth::new(Duration::from_secs(3600)));
        let (first, second, _other) = (patient.fenced(key(2)), patient.fenced(key(2)), patient.fenced(key(1)));
        let busy = patient.begin(key(3), false);
        assert_eq!(patient.unfit(), [key(1), key(2)]);
        drop((first, busy));
        assert_eq!(patient.unfit(), [key(1), key(2)]);
        drop(second);
        assert_eq!(patient.unfit(), [key(1)]);

        let hasty = Arc::new(DiskHealth::new(Duration::ZERO));
        let hangs = hasty.begin(key(4), true);
        assert_eq!(hasty.unfit(), [key(4)]);
        assert_eq!(hasty.restored(), []);
        drop(hangs);
        assert_eq!((hasty.unfit(), hasty.restored()), (vec![], vec![key(4)]));
        let hangs = hasty.begin(key(4), false);
        assert_eq!((hasty.unfit(), hasty.restored()), (vec![key(4)], vec![]), "it hangs again");
        drop(hangs);
        let fenced = hasty.fenced(key(4));
        drop(fenced);
        assert_eq!(hasty.restored(), [], "what failed is not whole because its task ended");
        let fenced = hasty.fenced(key(4));
        hasty.begins_anew(key(4));
        hasty.is_known(key(4));
        assert_eq!(hasty.restored(), [], "the old task is there yet");
        drop(fenced);
        assert_eq!(hasty.restored(), [key(4)], "it begins anew");
        drop(hasty.fenced(key(4)));
        let hung = hasty.begin(key(5), false);
        assert_eq!(hasty.unfit(), [key(5)]);
        drop((hung, hasty.begin(key(6), false)));
        assert_eq!((patient.restored(), hasty.restored()), (vec![], vec![key(5)]), "of 6 nothing was said");
    }

    /// The leader counted what the earlier log had reported, took the replica into the ISR, and might have been followed by an empty one.
    #[test]
    fn what_begins_anew_is_well_once_its_leader_knows_it() {
        let key = (TopicId::from_bytes([1; 16]), 1);
        let health = Arc::new(DiskHealth::new(Duration::from_secs(3600)));
        health.is_known(key);
        assert_eq!((health.restored(), health.times_anew(key)), (vec![], 0), "it was well all the time");
        health.begins_anew(key);
        assert_eq!((health.restored(), health.times_anew(key)), (vec![], 1));
        health.is_known(key);
        assert_eq!(health.restored(), [key]);
        health.begins_anew(key);
        assert_eq!((health.restored(), health.times_anew(key)), (vec![], 2));
        // The new log fails before its leader has heard of it.
        drop(health.fenced(key));
        health.is_known(key);
        assert_eq!(health.restored(), [], "it failed");
    }

    /// It was taken off this broker and given to it again before anybody acted on what was said of it: fenced then, it stayed so.
    #[test]
    fn what_was_told_of_is_restored_once_it_begins_again() {
        let key = |partition| (TopicId::from_bytes([1; 16]), partition);
        let health = Arc::new(DiskHealth::new(Duration::from_secs(3600)));
        let fenced = health.fenced(key(1));
        assert_eq!(health.unfit(), [key(1)]);
        drop(fenced);
        health.begins(key(1));
        health.begins(key(2));
        assert_eq!(health.restored(), [key(1)], "of the other one nothing was ever said");
    }

    /// It was forgotten once the metadata did not count it as fenced any more; by what was said of it long ago it was fenced again, and stayed so.
    #[test]
    fn what_is_whole_again_is_said_for_as_long_as_there_is_such_a_partition() {
        let key = |partition| (TopicId::from_bytes([1; 16]), partition);
        let hasty = Arc::new(DiskHealth::new(Duration::ZERO));
        for partition in 1..=3 {
            let _hangs = hasty.begin(key(partition), false);
            assert_eq!(hasty.unfit(), [key(partition)]);
        }
        hasty.forget(|it| it.1 != 3);
        for _ in 0..2 {
            assert_eq!(hasty.restored(), [key(1), key(2)], "3 was deleted");
        }
    }

    #[test]
    fn what_may_be_long_by_itself_has_longer() {
        let key = |partition| (TopicId::from_bytes([1; 16]), partition);
        let health = Arc::new(DiskHealth::new(Duration::from_secs(10)));
        let _jobs = [health.begin(key(1), false), health.begin(key(2), true)];
        let after = |seconds| {
            let ago = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("the machine runs that long");
            health.lock().busy.values_mut().for_each(|begun| begun.at = ago);
            health.unfit()
        };
        assert_eq!(after(9), []);
        assert_eq!(after(11), [key(1)]);
        assert_eq!(after(101), [key(1), key(2)]);
    }
}
