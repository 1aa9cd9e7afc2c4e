//! Judges a history: which of the promises that clients rely on it breaks.
//!
//! Pure: entries in, anomalies out. A history ends with the log as it stands when everything has healed ([`What::Kept`],
//! [`What::Whole`]); what was acknowledged, delivered or committed before is held against it.
//!
//! * Where a producer cannot say what became of a record, it may be there, once, or not.
//! * A member that was told nothing keeps believing in its partitions while another one has them: that is an anomaly only if it
//!   let go properly later, for then the group should have waited, or if a commit of it is taken meanwhile.
//! * The group may be given a record again, but not one that it had committed before.

use super::history::{Entry, Seen, What};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// A kind of broken promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// What was acknowledged, or delivered, does not stand in the log.
    Lost,
    /// A record stands in the log more than once.
    Duplicated,
    /// Records of one producer do not stand in a partition in the order in which they were sent.
    Reordered,
    /// A record that nobody sent, or not so, or that its producer was told is not written.
    Invented,
    /// A place in the log that held something else before.
    Changed,
    /// A record in the log that the group was never given.
    Unseen,
    /// A member, or the group, was taken back to where it had been before.
    WentBack,
    /// A partition had two owners in the group.
    TwoOwners,
    /// The group is told to be further than its members ever were.
    CommittedAhead,
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Anomaly {
    pub(crate) kind: Kind,
    /// What exactly, for a person.
    pub(crate) what: String,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.what)
    }
}

/// How much a history holds: one in which nothing happened proves nothing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) sent: usize,
    pub(crate) acknowledged: usize,
    /// Of those, how many without the offset at which they stand.
    pub(crate) unplaced: usize,
    pub(crate) failed: usize,
    pub(crate) unknown: usize,
    /// Of those, how many stand in the log.
    pub(crate) unknown_kept: usize,
    pub(crate) kept: usize,
    pub(crate) delivered: usize,
    pub(crate) committed: usize,
    /// How often a member was given a partition.
    pub(crate) given: usize,
}

/// The anomalies of a history, in an order that is always the same, and what it holds.
pub(crate) fn check(entries: &[Entry]) -> (Vec<Anomaly>, Counts) {
    let records = Records::of(entries);
    let mut found = Vec::new();
    records.check_log(&mut found);
    records.check_readings(entries, &mut found);
    let group = Group::follow(entries, &mut found);
    group.check_coverage(&records, entries, &mut found);
    let count = |is_so: fn(&What) -> bool| entries.iter().filter(|entry| is_so(&entry.what)).count();
    let counts = Counts {
        sent: records.sent.len(),
        acknowledged: records.acknowledged.len(),
        unplaced: records.acknowledged.values().filter(|(_, offset)| *offset < 0).count(),
        failed: records.failed.len(),
        unknown: count(|what| matches!(what, What::Unknown { .. })),
        unknown_kept: records.unknown_kept(entries),
        kept: records.log.values().map(BTreeMap::len).sum(),
        delivered: count(|what| matches!(what, What::Delivered(_))),
        committed: count(|what| matches!(what, What::Committed { .. })),
        given: count(|what| matches!(what, What::Given { .. })),
    };
    (found, counts)
}

/// A record as it was sent.
struct Sent<'a> {
    who: &'a str,
    /// Its place among everything that was sent.
    order: usize,
    partition: u32,
    key: &'a str,
}

/// What became of records, and the log as it stands in the end.
struct Records<'a> {
    sent: HashMap<&'a str, Sent<'a>>,
    acknowledged: BTreeMap<&'a str, (u32, i64)>,
    failed: HashMap<&'a str, &'a str>,
    log: BTreeMap<u32, BTreeMap<i64, &'a Seen>>,
    whole: BTreeMap<u32, (i64, i64)>,
    /// Before where what each partition held may be gone.
    deleted: HashMap<u32, i64>,
    /// Everything that was sent twice: the history itself is wrong.
    resent: Vec<&'a str>,
}

impl<'a> Records<'a> {
    fn of(entries: &'a [Entry]) -> Records<'a> {
        let mut records = Records {
            sent: HashMap::new(),
            acknowledged: BTreeMap::new(),
            failed: HashMap::new(),
            log: BTreeMap::new(),
            whole: BTreeMap::new(),
            deleted: HashMap::new(),
            resent: Vec::new(),
        };
        for (order, entry) in entries.iter().enumerate() {
            match &entry.what {
                What::Sent { partition, key, value } => {
                    let sent = Sent { who: &entry.who, order, partition: *partition, key };
                    if records.sent.insert(value, sent).is_some() {
                        records.resent.push(value);
                    }
                }
                What::Acknowledged { value, partition, offset } => {
                    records.acknowledged.insert(value, (*partition, *offset));
                }
                What::Failed { value, why } => {
                    records.failed.insert(value, why);
                }
                What::Kept(seen) => {
                    records.log.entry(seen.partition).or_default().insert(seen.offset, seen);
                }
                What::Whole { partition, start, end } => {
                    records.whole.insert(*partition, (*start, *end));
                }
                What::Deleted { partition, before } => {
                    let most = records.deleted.entry(*partition).or_default();
                    *most = (*before).max(*most);
                }
                _ => {}
            }
        }
        records
    }

    fn at(&self, partition: u32, offset: i64) -> Option<&'a Seen> {
        self.log.get(&partition)?.get(&offset).copied()
    }

    fn deleted_before(&self, partition: u32) -> i64 {
        self.deleted.get(&partition).copied().unwrap_or(0)
    }

    fn unknown_kept(&self, entries: &[Entry]) -> usize {
        let kept: BTreeSet<&str> = self.log.values().flat_map(|log| log.values().map(|seen| &*seen.value)).collect();
        let is_kept = |entry: &&Entry| matches!(&entry.what, What::Unknown { value, .. } if kept.contains(&**value));
        entries.iter().filter(is_kept).count()
    }

    /// The log as it stands in the end, against what producers did and were told.
    fn check_log(&self, found: &mut Vec<Anomaly>) {
        let mut add = |kind, what| found.push(Anomaly { kind, what });
        for value in &self.resent {
            add(Kind::Invented, format!("{value} was sent twice: values have to name records"));
        }
        let mut places: BTreeMap<&str, Vec<(u32, i64)>> = BTreeMap::new();
        for seen in self.log.values().flat_map(BTreeMap::values) {
            places.entry(&seen.value).or_default().push((seen.partition, seen.offset));
        }
        for (value, (partition, offset)) in &self.acknowledged {
            let Some((_, end)) = self.whole.get(partition) else {
                add(
                    Kind::Lost,
                    format!("{value} was acknowledged in partition {partition}, which nobody read in the end"),
                );
                continue;
            };
            let deleted_before = self.deleted_before(*partition);
            if *offset < 0 {
                let stands = places.get(value).is_some_and(|places| places.iter().any(|(at, _)| at == partition));
                if !stands && deleted_before == 0 {
                    let what = format!(
                        "{value} was acknowledged in partition {partition}, no place said, and stands nowhere in it"
                    );
                    add(Kind::Lost, what);
                }
                continue;
            }
            // What was deleted is no loss.
            if *offset < deleted_before {
                continue;
            }
            match self.at(*partition, *offset) {
                Some(seen) if seen.value == *value => {}
                Some(seen) => add(
                    Kind::Lost,
                    format!("{value} was acknowledged at {partition}@{offset}, where {} stands", seen.value),
                ),
                None => add(
                    Kind::Lost,
                    format!(
                        "{value} was acknowledged at {partition}@{offset}, where nothing stands (the log ends at {end})"
                    ),
                ),
            }
        }
        for (partition, (start, _)) in &self.whole {
            let deleted_before = self.deleted_before(*partition);
            if *start > deleted_before {
                let what = format!(
                    "partition {partition} begins at {start}, and nothing at or above {deleted_before} was deleted"
                );
                add(Kind::Lost, what);
            }
        }
        for (value, places) in places {
            if places.len() > 1 {
                add(Kind::Duplicated, format!("{value} stands at {places:?}"));
            }
        }
        for (partition, log) in &self.log {
            let mut last: BTreeMap<&str, (usize, &Seen)> = BTreeMap::new();
            for seen in log.values() {
                let Some(sent) = self.sent.get(&*seen.value) else { continue };
                let before = last.insert(sent.who, (sent.order, seen));
                if let Some((order, before)) = before
                    && sent.order < order
                {
                    add(
                        Kind::Reordered,
                        format!(
                            "{} was sent before {} and stands behind it, at {partition}@{}",
                            seen.value, before.value, seen.offset
                        ),
                    );
                }
            }
        }
    }

    /// Every record that anybody was given, against what was sent and what stands there in the end.
    fn check_readings(&self, entries: &'a [Entry], found: &mut Vec<Anomaly>) {
        let mut told: BTreeSet<(u32, i64, &str)> = BTreeSet::new();
        for entry in entries {
            let (seen, in_the_end) = match &entry.what {
                What::Delivered(seen) => (seen, false),
                What::Kept(seen) => (seen, true),
                _ => continue,
            };
            // Once for each place and value, however often it was read.
            if !told.insert((seen.partition, seen.offset, &seen.value)) {
                continue;
            }
            let place = format!("{}@{}", seen.partition, seen.offset);
            let mut add = |kind, what| found.push(Anomaly { kind, what });
            match self.sent.get(&*seen.value) {
                None => add(Kind::Invented, format!("{} at {place} was never sent", seen.value)),
                Some(sent) if (sent.partition, sent.key) != (seen.partition, &*seen.key) => add(
                    Kind::Invented,
                    format!(
                        "{} was sent to partition {} with key {} and stands at {place} with key {}",
                        seen.value, sent.partition, sent.key, seen.key
                    ),
                ),
                Some(_) => {}
            }
            if let Some(why) = self.failed.get(&*seen.value) {
                add(Kind::Invented, format!("{} stands at {place}, and its producer was told: {why}", seen.value));
            }
            if in_the_end || seen.offset < self.deleted_before(seen.partition) {
                continue;
            }
            match self.at(seen.partition, seen.offset) {
                Some(stands) if stands.value == seen.value => {}
                Some(stands) => add(
                    Kind::Changed,
                    format!("{} was delivered to {} at {place}, where {} stands", seen.value, entry.who, stands.value),
                ),
                None => add(
                    Kind::Lost,
                    format!("{} was delivered to {} at {place}, where nothing stands", seen.value, entry.who),
                ),
            }
        }
    }
}

/// A member's time with a partition.
#[derive(Debug, Clone)]
struct Stint {
    who: String,
    partition: u32,
    began: usize,
    /// When, and whether it let go by itself.
    ended: Option<(usize, bool)>,
    /// The first and the last offset that was delivered.
    first: Option<i64>,
    last: Option<i64>,
    /// What the group had committed for sure when it began.
    from: i64,
}

/// The group's partitions, over time.
struct Group {
    stints: Vec<Stint>,
}

impl Group {
    fn follow(entries: &[Entry], found: &mut Vec<Anomaly>) -> Group {
        let mut group = Group { stints: Vec::new() };
        // The highest offset that was delivered.
        let mut delivered: HashMap<u32, i64> = HashMap::new();
        // What the group had committed for sure, and since when.
        let mut committed: HashMap<u32, Vec<(usize, i64)>> = HashMap::new();
        let known = |committed: &HashMap<u32, Vec<(usize, i64)>>, partition: &u32, by: usize| {
            let steps = committed.get(partition).into_iter().flatten();
            steps.rev().find(|(since, _)| *since < by).map_or(0, |(_, offset)| *offset)
        };
        let mut add = |kind, what| found.push(Anomaly { kind, what });
        for (at, entry) in entries.iter().enumerate() {
            let who = &entry.who;
            match &entry.what {
                What::Given { partitions } => {
                    for partition in partitions {
                        if group.current(who, *partition).is_some() {
                            add(Kind::TwoOwners, format!("{who} was given partition {partition}, which it has"));
                        }
                        group.stints.push(Stint {
                            who: who.clone(),
                            partition: *partition,
                            began: at,
                            ended: None,
                            first: None,
                            last: None,
                            from: known(&committed, partition, at),
                        });
                    }
                }
                What::LetGo { partitions } | What::Lost { partitions } => {
                    let properly = matches!(entry.what, What::LetGo { .. });
                    for partition in partitions {
                        if let Some(stint) = group.current(who, *partition) {
                            stint.ended = Some((at, properly));
                        }
                    }
                }
                What::Delivered(Seen { partition, offset, value, .. }) => {
                    let most = delivered.entry(*partition).or_insert(-1);
                    *most = (*offset).max(*most);
                    let Some(stint) = group.current(who, *partition) else {
                        add(
                            Kind::TwoOwners,
                            format!(
                                "{value} at {partition}@{offset} was delivered to {who}, which has not the partition"
                            ),
                        );
                        continue;
                    };
                    if stint.first.is_none() && *offset < stint.from {
                        let from = stint.from;
                        add(
                            Kind::WentBack,
                            format!(
                                "{who} was given partition {partition} from {offset} on, and the group had committed {from}"
                            ),
                        );
                    }
                    if let Some(last) = stint.last
                        && *offset <= last
                    {
                        add(Kind::WentBack, format!("{who} was given {partition}@{offset} after {partition}@{last}"));
                    }
                    stint.first.get_or_insert(*offset);
                    stint.last = Some(*offset);
                }
                What::Committing { partition, offset } | What::Committed { partition, offset } => {
                    let is_taken = matches!(entry.what, What::Committed { .. });
                    // Another one, which was given the partition later, and still has it.
                    let mine = group.last_began(who, *partition);
                    let successor = group.stints.iter().find(|stint| {
                        stint.partition == *partition
                            && stint.who != *who
                            && stint.ended.is_none()
                            && mine.is_some_and(|mine| stint.began > mine)
                    });
                    // It was asked for after that: it cannot have been on its way.
                    if let Some(stint) = successor
                        && is_taken
                        && asked_after(entries, at, who, *partition, *offset, stint.began)
                    {
                        add(
                            Kind::TwoOwners,
                            format!("a commit of {who} for partition {partition} was taken while {} had it", stint.who),
                        );
                    }
                    if is_taken {
                        let most = known(&committed, partition, at);
                        committed.entry(*partition).or_default().push((at, most.max(*offset)));
                    }
                }
                What::Progress { partition, offset, asked } => {
                    let most = delivered.get(partition).map_or(0, |most| most + 1);
                    if *offset > most {
                        add(
                            Kind::CommittedAhead,
                            format!(
                                "the group is said to be at {partition}@{offset}, and was given what lies below {most}"
                            ),
                        );
                    }
                    let least = known(&committed, partition, *asked);
                    if *offset < least {
                        add(
                            Kind::WentBack,
                            format!("the group is said to be at {partition}@{offset}, and had committed {least}"),
                        );
                    }
                }
                _ => {}
            }
        }
        group.check_owners(found);
        group
    }

    /// What a member has of a partition now.
    fn current(&mut self, who: &str, partition: u32) -> Option<&mut Stint> {
        self.stints
            .iter_mut()
            .rev()
            .find(|stint| stint.who == who && stint.partition == partition && stint.ended.is_none())
    }

    fn last_began(&self, who: &str, partition: u32) -> Option<usize> {
        self.stints.iter().rev().find(|stint| stint.who == who && stint.partition == partition).map(|stint| stint.began)
    }

    /// Two who had a partition at once, though the first let it go properly later, or never.
    fn check_owners(&self, found: &mut Vec<Anomaly>) {
        let partitions: BTreeSet<u32> = self.stints.iter().map(|stint| stint.partition).collect();
        for partition in partitions {
            let stints: Vec<&Stint> = self.stints.iter().filter(|stint| stint.partition == partition).collect();
            for (n, first) in stints.iter().enumerate() {
                for second in &stints[n + 1..] {
                    let was_fenced = matches!(first.ended, Some((_, false)));
                    let over = first.ended.is_some_and(|(ended, _)| ended < second.began);
                    if first.who != second.who && !over && !was_fenced {
                        found.push(Anomaly {
                            kind: Kind::TwoOwners,
                            what: format!(
                                "{} was given partition {partition} while {} had it and was not fenced",
                                second.who, first.who
                            ),
                        });
                    }
                }
            }
        }
    }

    /// Whether the group was given everything that stands in the log, and no member passed over anything.
    fn check_coverage(&self, records: &Records<'_>, entries: &[Entry], found: &mut Vec<Anomaly>) {
        if self.stints.is_empty() {
            return;
        }
        let mut seen: BTreeMap<u32, BTreeSet<i64>> = BTreeMap::new();
        let mut last: HashMap<(&str, u32), i64> = HashMap::new();
        for entry in entries {
            match &entry.what {
                What::Given { partitions } => {
                    last.retain(|(who, partition), _| *who != entry.who || !partitions.contains(partition));
                }
                What::Delivered(Seen { partition, offset, .. }) => {
                    seen.entry(*partition).or_default().insert(*offset);
                    let before = last.insert((&*entry.who, *partition), *offset);
                    if let Some(before) = before
                        && before < *offset
                        && let Some(log) = records.log.get(partition)
                        && let Some((passed, record)) = log.range(before + 1..*offset).next()
                    {
                        found.push(Anomaly {
                            kind: Kind::Unseen,
                            what: format!(
                                "{} passed over {} at {partition}@{passed}, on its way from {before} to {offset}",
                                entry.who, record.value
                            ),
                        });
                    }
                }
                _ => {}
            }
        }
        for (partition, log) in &records.log {
            let nothing = BTreeSet::new();
            let seen = seen.get(partition).unwrap_or(&nothing);
            let mut unseen = log.iter().filter(|(offset, _)| !seen.contains(offset));
            if let Some((offset, record)) = unseen.next() {
                found.push(Anomaly {
                    kind: Kind::Unseen,
                    what: format!(
                        "the group was never given {} at {partition}@{offset}, nor {} others of that partition",
                        record.value,
                        unseen.count()
                    ),
                });
            }
        }
    }
}

/// Whether the commit that was taken at this entry was asked for after `after`.
fn asked_after(entries: &[Entry], taken: usize, who: &str, partition: u32, offset: i64, after: usize) -> bool {
    let committing = What::Committing { partition, offset };
    let asked = entries[..taken].iter().rposition(|entry| entry.who == who && entry.what == committing);
    asked.is_some_and(|asked| asked > after)
}
