//! What must hold, whatever happens: the invariants of Kafka's replication as its TLA+ models state them, and some of our own.

use crate::node::{Entry, Node, keyed};
use headwater_broker::metadata::command::{self, ElectionKind, command::Command as Kind};
use headwater_broker::metadata::state::BrokerState;
use headwater_broker::metadata::{MetadataState, Outcome, Partition, Refusal};
use headwater_broker::replica::Member;
use std::collections::{BTreeMap, HashSet};

/// What was seen so far.
pub(crate) struct Checks {
    /// Everything that any reader may have read, by how many unclean elections had been by then: each may take some of it.
    lineages: BTreeMap<u32, Lineage>,
    /// How many records the producer was told are kept.
    pub(crate) acknowledged: u64,
    leaders: BTreeMap<i32, Member>,
    /// How much was committed when somebody was elected, by leader epoch.
    elected: BTreeMap<i32, usize>,
    last: Option<Partition>,
    /// What people were answered, by the id of their command.
    answered: BTreeMap<Vec<u8>, Outcome>,
    /// Up to where producer ids were given out.
    producer_ids: i64,
    /// The smallest min.insync.replicas that ever was.
    pub(crate) least_min_insync: usize,
    /// The keys of records that are not the producer's, by what they say.
    pub(crate) keys: BTreeMap<u64, Vec<u8>>,
    /// What a producer sent again because its log, emptied by then, had forgotten it.
    sent_anew: HashSet<u64>,
}

impl Default for Checks {
    fn default() -> Checks {
        Checks {
            lineages: BTreeMap::new(),
            acknowledged: 0,
            leaders: BTreeMap::new(),
            elected: BTreeMap::new(),
            last: None,
            answered: BTreeMap::new(),
            producer_ids: 0,
            least_min_insync: usize::MAX,
            keys: BTreeMap::new(),
            sent_anew: HashSet::new(),
        }
    }
}

#[derive(Default)]
struct Lineage {
    committed: Vec<Entry>,
    values: HashSet<u64>,
}

impl Checks {
    /// What was committed, after so many unclean elections.
    pub(crate) fn committed(&self, unclean: u32) -> &[Entry] {
        self.lineages.get(&unclean).map_or(&[], |lineage| &lineage.committed)
    }

    /// A replica serves readers up to its high watermark: nobody ever reads anything else at an offset. True: more is seen than
    /// ever before.
    pub(crate) fn visible(&mut self, node: &mut Node) -> bool {
        let Some(process) = &mut node.process else { return false };
        let high_watermark = process.high_watermark;
        assert!(
            high_watermark <= process.mirror.len() as i64,
            "broker {} serves up to {high_watermark} of {} records",
            node.id,
            process.mirror.len()
        );
        let (mut is_more, was_unclean) = (false, self.unclean() > 0);
        let lineage = self.lineages.entry(process.lineage).or_default();
        for offset in process.checked..high_watermark {
            let entry = process.mirror[offset as usize];
            match lineage.committed.get(offset as usize) {
                Some(committed) => {
                    assert_eq!(entry, *committed, "broker {} shows something else at offset {offset}", node.id);
                }
                None => {
                    let is_new = lineage.values.insert(entry.1);
                    // A producer that was told of a gap sends what it has left under another epoch, and that may come to a leader
                    // that nobody follows any more.
                    let is_again = self.sent_anew.contains(&entry.1);
                    assert!(
                        is_new || was_unclean || is_again,
                        "record {} is committed twice, at {offset} too",
                        entry.1
                    );
                    lineage.committed.push(entry);
                    is_more = true;
                }
            }
        }
        process.checked = process.checked.max(high_watermark);
        is_more
    }

    /// One leader an epoch, and it has everything that was committed before. Whoever hears late that it was elected, when another
    /// leads already, need not have what that one committed.
    pub(crate) fn leads(&mut self, epoch: i32, unclean: u32, me: Member, log: &[Entry]) {
        let leader = *self.leaders.entry(epoch).or_insert(me);
        assert_eq!(leader, me, "epoch {epoch} has two leaders");
        if !self.lineages.contains_key(&unclean) {
            // What the first leader after an unclean election has of what was committed is all that is left of it.
            let before = self.lineages.last_key_value().map_or(&[][..], |(_, lineage)| &lineage.committed);
            let left = before.iter().zip(log).take_while(|(committed, entry)| committed == entry);
            let committed: Vec<Entry> = left.map(|(entry, _)| *entry).collect();
            let values = committed.iter().map(|entry| entry.1).collect();
            self.lineages.insert(unclean, Lineage { committed, values });
            return;
        }
        let is_last = self.last.as_ref().is_some_and(|last| last.leader_epoch == epoch);
        let committed = self.committed(unclean);
        let before = self.elected.get(&epoch).copied().filter(|_| !is_last).unwrap_or(committed.len());
        assert!(log.len() >= before, "the leader of epoch {epoch} lacks committed records");
        assert_eq!(log[..before], committed[..before], "the leader of epoch {epoch} has other records");
    }

    /// The producer is told that records are kept: they are, where they are said to be, on as many disks as asked.
    pub(crate) fn acknowledged(&mut self, unclean: u32, base_offset: i64, values: &[u64], disks: usize, needed: usize) {
        for (offset, value) in (base_offset..).zip(values) {
            let committed = self.committed(unclean).get(offset as usize).map(|entry| entry.1);
            assert_eq!(committed, Some(*value), "record {value} is acknowledged at offset {offset}, and is not there");
        }
        assert!(disks >= needed, "records from {base_offset} are acknowledged, and kept by {disks} of {needed}");
        self.acknowledged += values.len() as u64;
    }

    /// What a log lacks, compaction took: a later record has the same key, and is committed. What an unclean election takes is
    /// gone, whatever went for its sake.
    pub(crate) fn compacted(&self, id: i32, holes: &[i64]) {
        if self.unclean() > 0 || holes.is_empty() {
            return;
        }
        let committed = self.committed(0);
        let key = |value: u64| self.keys.get(&value).cloned().or_else(|| keyed(true, value).0);
        let mut last = BTreeMap::new();
        for (offset, entry) in (0i64..).zip(committed) {
            last.insert(key(entry.1), offset);
        }
        for hole in holes {
            let entry = committed.get(*hole as usize).map(|entry| key(entry.1));
            let later = entry.and_then(|key| last.get(&key));
            assert!(
                later.is_some_and(|later| later > hole),
                "broker {id} lacks the record at {hole}, which is the last one of its key"
            );
        }
    }

    /// The producer is told that records are kept, and not where.
    pub(crate) fn acknowledged_somewhere(&mut self, unclean: u32, values: &[u64]) {
        let known = self.lineages.get(&unclean).map(|lineage| &lineage.values);
        for value in values {
            let is_kept = known.is_some_and(|known| known.contains(value));
            assert!(is_kept || self.unclean() > 0, "record {value} is said to be kept, and is not committed");
        }
        self.acknowledged += values.len() as u64;
    }

    /// The producer is told that nothing of it is in the log, and sends these again as another.
    pub(crate) fn forgotten(&mut self, values: &[u64], deleted: i64) {
        for (offset, entry) in (0i64..).zip(self.committed(self.unclean())) {
            let is_there = offset >= deleted && values.contains(&entry.1);
            assert!(!is_there || self.unclean() > 0, "record {} at {offset} is said to be nowhere", entry.1);
        }
        self.sent_anew.extend(values);
    }

    /// Whether records may be there twice: what was deleted was sent again by a producer that was forgotten.
    pub(crate) fn has_sent_anew(&self) -> bool {
        !self.sent_anew.is_empty()
    }

    /// Everybody in sync, and everybody eligible, has everything that was committed (StrongIsr). Of a broker that is down, or
    /// whose present start the metadata do not know, nothing can be said.
    pub(crate) fn in_sync(&self, metadata: &MetadataState, partition: &Partition, nodes: &[Node], flushed: bool) {
        let Some(lineage) = self.lineages.get(&partition.unclean_recoveries) else { return };
        let committed = lineage.committed.len() as i64;
        for id in partition.isr.iter().chain(&partition.elr) {
            let node = &nodes[*id as usize - 1];
            let registered = metadata.broker(*id).map(|broker| broker.incarnation);
            let process = node.process.as_ref().filter(|process| Some(process.me.incarnation) == registered);
            // One that is damaged says so, and the metadata hear of it.
            let Some(process) = process.filter(|process| !process.is_damaged) else { continue };
            let has = if flushed { process.log.flushed_offset() } else { process.mirror.len() as i64 };
            let which = if partition.isr.contains(id) { "in sync" } else { "eligible" };
            assert!(has >= committed, "broker {id} is {which} and has {has} of {committed} committed records");
        }
    }

    /// A command was applied, or refused.
    pub(crate) fn applied(
        &mut self,
        command: &command::Command,
        before: &MetadataState,
        now: &MetadataState,
        result: &Result<Outcome, Refusal>,
    ) {
        let in_office = before.controller().map(|_| before.controller_epoch());
        let is_obeyed = result.is_ok() && command.controller_epoch != 0;
        assert!(!is_obeyed || in_office == Some(command.controller_epoch), "a deposed controller is obeyed");
        if !command.command_id.is_empty()
            && let Ok(outcome) = result
        {
            let known = self.answered.insert(command.command_id.to_vec(), outcome.clone());
            assert!(known.is_none_or(|known| known == *outcome), "one command, two answers");
        }
        if unclean(now) > unclean(before) {
            let is_asked = matches!(&command.command, Some(Kind::ElectLeaders(elect)) if elect.kind == i32::from(ElectionKind::Unclean));
            let asks = now.topics().any(|topic| topic.unclean_leader_election());
            assert!(is_asked || asks, "an unclean election that nobody asked for");
        }
        if let (Some(Kind::AlterPartitions(alter)), Ok(Outcome::PartitionsAltered { changed: 1, .. })) =
            (&command.command, result)
        {
            for named in alter.partitions.iter().flat_map(|alter| &alter.isr) {
                let registered = before.broker(named.broker_id).map(|broker| broker.incarnation.into_bytes());
                assert_eq!(registered.as_ref().map(|id| &id[..]), Some(&named.incarnation[..]), "another start joins");
            }
        }
        if let Ok(Outcome::ProducerIds { first, count }) = result {
            assert!(*first >= self.producer_ids, "producer id {first} is given out twice");
            self.producer_ids = first + i64::from(*count);
        }
        assert!(now.controller_epoch() >= before.controller_epoch(), "the controller's epoch falls");
    }

    /// The metadata changed.
    pub(crate) fn partition(&mut self, metadata: &MetadataState, now: &Partition) {
        if let Some(before) = &self.last {
            assert!(
                now.leader_epoch >= before.leader_epoch && now.partition_epoch >= before.partition_epoch,
                "epochs fall: {before:?}, {now:?}"
            );
            let other = now.leader != before.leader && now.leader >= 0 && before.leader >= 0;
            assert!(!other || now.leader_epoch > before.leader_epoch, "one epoch, two leaders: {before:?}, {now:?}");
        }
        now.check().unwrap_or_else(|why| panic!("{why}: {now:?}"));
        for id in &now.isr {
            let state = metadata.broker(*id).map(|broker| broker.state);
            let may_be = matches!(state, Some(BrokerState::Active | BrokerState::Draining));
            assert!(may_be, "broker {id} is in sync and {state:?}: {now:?}");
        }
        if now.leader >= 0 {
            let committed = self.committed(now.unclean_recoveries).len();
            self.elected.entry(now.leader_epoch).or_insert(committed);
        }
        self.last = Some(now.clone());
    }

    /// How many unclean elections there were.
    pub(crate) fn unclean(&self) -> u32 {
        self.last.as_ref().map_or(0, |last| last.unclean_recoveries)
    }
}

fn unclean(metadata: &MetadataState) -> u32 {
    metadata.topics().flat_map(|topic| &topic.partitions).map(|partition| partition.unclean_recoveries).sum()
}
