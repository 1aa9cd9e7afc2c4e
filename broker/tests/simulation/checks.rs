//! What must hold, whatever happens: the invariants of Kafka's replication as its TLA+ models state them, and some of our own.

use crate::node::{Entry, Node};
use headwater_broker::metadata::Partition;
use headwater_broker::replica::Member;
use std::collections::{BTreeMap, HashSet};

/// What was seen so far.
#[derive(Default)]
pub(crate) struct Checks {
    /// Everything that any reader may have read.
    pub(crate) committed: Vec<Entry>,
    /// How many records the producer was told are kept.
    pub(crate) acknowledged: u64,
    values: HashSet<u64>,
    leaders: BTreeMap<i32, Member>,
    /// How much was committed when somebody was elected, by leader epoch.
    elected: BTreeMap<i32, usize>,
    last: Option<Partition>,
}

impl Checks {
    /// A replica serves readers up to its high watermark: nobody ever reads anything else at an offset.
    pub(crate) fn visible(&mut self, node: &mut Node) {
        let Some(process) = &mut node.process else { return };
        let high_watermark = process.high_watermark;
        assert!(
            high_watermark <= process.mirror.len() as i64,
            "broker {} serves up to {high_watermark} of {} records",
            node.id,
            process.mirror.len()
        );
        for offset in process.checked..high_watermark {
            let entry = process.mirror[offset as usize];
            match self.committed.get(offset as usize) {
                Some(committed) => {
                    assert_eq!(entry, *committed, "broker {} shows something else at offset {offset}", node.id);
                }
                None => {
                    assert!(self.values.insert(entry.1), "record {} is committed twice, at {offset} too", entry.1);
                    self.committed.push(entry);
                }
            }
        }
        process.checked = process.checked.max(high_watermark);
    }

    /// One leader an epoch, and it has everything that was committed before. Whoever hears late that it was elected, when another
    /// leads already, need not have what that one committed.
    pub(crate) fn leads(&mut self, epoch: i32, me: Member, log: &[Entry]) {
        let leader = *self.leaders.entry(epoch).or_insert(me);
        assert_eq!(leader, me, "epoch {epoch} has two leaders");
        let is_last = self.last.as_ref().is_some_and(|last| last.leader_epoch == epoch);
        let before = self.elected.get(&epoch).copied().filter(|_| !is_last).unwrap_or(self.committed.len());
        assert!(log.len() >= before, "the leader of epoch {epoch} lacks committed records");
        assert_eq!(log[..before], self.committed[..before], "the leader of epoch {epoch} has other records");
    }

    /// The producer is told that records are kept: they are, where they are said to be, on as many disks as asked.
    pub(crate) fn acknowledged(&mut self, base_offset: i64, values: &[u64], disks: usize, needed: usize) {
        for (offset, value) in (base_offset..).zip(values) {
            let committed = self.committed.get(offset as usize).map(|entry| entry.1);
            assert_eq!(committed, Some(*value), "record {value} is acknowledged at offset {offset}, and is not there");
        }
        assert!(disks >= needed, "records from {base_offset} are acknowledged, and kept by {disks} of {needed}");
        self.acknowledged += values.len() as u64;
    }

    /// The metadata changed.
    pub(crate) fn partition(&mut self, now: &Partition) {
        if let Some(before) = &self.last {
            assert!(
                now.leader_epoch >= before.leader_epoch && now.partition_epoch >= before.partition_epoch,
                "epochs fall: {before:?}, {now:?}"
            );
            let other = now.leader != before.leader && now.leader >= 0 && before.leader >= 0;
            assert!(!other || now.leader_epoch > before.leader_epoch, "one epoch, two leaders: {before:?}, {now:?}");
        }
        now.check().unwrap_or_else(|why| panic!("{why}: {now:?}"));
        if now.leader >= 0 {
            self.elected.entry(now.leader_epoch).or_insert(self.committed.len());
        }
        self.last = Some(now.clone());
    }
}
