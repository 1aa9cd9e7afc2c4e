//! The assignors: which member of a group should read which partition.
//!
//! * `uniform` gives members as equal numbers of partitions as their subscriptions allow, over all topics together, and
//!   moves as few as that takes. Where every member subscribes to the same topics, any two differ by one at most.
//! * `range` gives each member, topic by topic and in the order of members, a run of neighbouring partitions; the first
//!   members get one more where it does not come out even. Two topics of the same size are split alike, so that
//!   records with one key meet in one member.
//!
//! Owns: both algorithms, pure and deterministic. Refuses: who owns what right now, and when it may move
//! ([`super::state`] decides that).

use super::{PartitionOf, Partitions};
use headwater_proto::TopicId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Which algorithm assigns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Assignor {
    /// Equal shares, few moves.
    #[default]
    Uniform,
    /// Runs of neighbours, topic by topic.
    Range,
}

/// The text is no assignor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no assignor {0:?}: there are uniform and range")]
pub struct UnknownAssignor(String);

impl Assignor {
    /// The name that members ask for it by.
    pub const fn name(self) -> &'static str {
        match self {
            Assignor::Uniform => "uniform",
            Assignor::Range => "range",
        }
    }
}

impl std::str::FromStr for Assignor {
    type Err = UnknownAssignor;

    fn from_str(text: &str) -> Result<Self, UnknownAssignor> {
        match text {
            "uniform" => Ok(Assignor::Uniform),
            "range" => Ok(Assignor::Range),
            _ => Err(UnknownAssignor(text.chars().take(64).collect())),
        }
    }
}

/// What an assignor knows of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscriber {
    /// The topics it subscribes to, of those that exist.
    pub topics: BTreeSet<TopicId>,
    /// What it was assigned before.
    pub previous: Partitions,
}

/// Members in the order in which `range` serves them.
pub type Subscribers = BTreeMap<String, Subscriber>;

/// How many partitions each topic has.
pub type PartitionCounts = BTreeMap<TopicId, u32>;

/// Assigns every partition of every topic that somebody subscribes to, each to one member. A member that gets nothing
/// stands in the answer with nothing.
pub fn assign(assignor: Assignor, members: &Subscribers, counts: &PartitionCounts) -> BTreeMap<String, Partitions> {
    match assignor {
        Assignor::Uniform => uniform(members, counts),
        Assignor::Range => range(members, counts),
    }
}

fn range(members: &Subscribers, counts: &PartitionCounts) -> BTreeMap<String, Partitions> {
    let mut out: BTreeMap<String, Partitions> = members.keys().map(|id| (id.clone(), Partitions::new())).collect();
    for (topic, &count) in counts {
        let readers: Vec<&String> =
            members.iter().filter(|(_, member)| member.topics.contains(topic)).map(|(id, _)| id).collect();
        let Some(share) = count.checked_div(readers.len() as u32) else { continue };
        let one_more = count % readers.len() as u32;
        let mut next = 0;
        for (n, id) in readers.into_iter().enumerate() {
            let end = next + share + u32::from((n as u32) < one_more);
            out.entry(id.clone()).or_default().extend((next..end).map(|partition| (*topic, partition)));
            next = end;
        }
    }
    out
}

/// Members by their place, so that the work is on small numbers.
struct Uniform<'a> {
    members: Vec<&'a Subscriber>,
    /// Places of the members that subscribe to a topic.
    readers: BTreeMap<TopicId, Vec<usize>>,
    owned: Vec<Owned>,
}

/// What one member has been given.
#[derive(Default)]
struct Owned {
    load: usize,
    topics: BTreeMap<TopicId, BTreeSet<u32>>,
}

fn uniform(members: &Subscribers, counts: &PartitionCounts) -> BTreeMap<String, Partitions> {
    let mut work = Uniform {
        members: members.values().collect(),
        readers: BTreeMap::new(),
        owned: members.iter().map(|_| Owned::default()).collect(),
    };
    for (place, member) in members.values().enumerate() {
        for topic in member.topics.iter().filter(|topic| counts.contains_key(topic)) {
            work.readers.entry(*topic).or_default().push(place);
        }
    }
    let free = work.keep_previous(counts);
    work.place(free);
    while work.shift_one() {}
    members.keys().cloned().zip(work.owned.into_iter().map(Owned::into_partitions)).collect()
}

impl Uniform<'_> {
    /// Gives everybody what it had and may still have. What is left over comes back, those with few possible readers
    /// first: the others can still go elsewhere.
    fn keep_previous(&mut self, counts: &PartitionCounts) -> Vec<PartitionOf> {
        let mut kept = Partitions::new();
        for (member, owned) in self.members.iter().zip(&mut self.owned) {
            for &(topic, partition) in &member.previous {
                let exists = counts.get(&topic).is_some_and(|count| partition < *count);
                if exists && member.topics.contains(&topic) && kept.insert((topic, partition)) {
                    owned.add(topic, partition);
                }
            }
        }
        let mut topics: Vec<(usize, TopicId)> =
            self.readers.iter().map(|(topic, readers)| (readers.len(), *topic)).collect();
        topics.sort_unstable();
        topics
            .into_iter()
            .flat_map(|(_, topic)| (0..counts.get(&topic).copied().unwrap_or(0)).map(move |p| (topic, p)))
            .filter(|partition| !kept.contains(partition))
            .collect()
    }

    /// Gives each partition to the reader of its topic that has least.
    fn place(&mut self, free: Vec<PartitionOf>) {
        for (topic, partition) in free {
            let readers = self.readers.get(&topic).into_iter().flatten();
            let least = readers.min_by_key(|place| (self.load(**place), **place));
            if let Some(owned) = least.and_then(|place| self.owned.get_mut(*place)) {
                owned.add(topic, partition);
            }
        }
    }

    /// Takes one partition off a member that has at least two more than another, along the shortest chain of members
    /// that can pass one on. Without such a chain the loads are as equal as the subscriptions allow (no cheaper
    /// semi-matching exists: Harvey, Ladner, Lovasz and Tamir, "Semi-matchings for bipartite graphs", 2003).
    fn shift_one(&mut self) -> bool {
        let lightest = self.owned.iter().map(|owned| owned.load).min().unwrap_or(0);
        let mut givers: Vec<usize> = (0..self.owned.len()).filter(|place| self.load(*place) >= lightest + 2).collect();
        givers.sort_by_key(|place| std::cmp::Reverse(self.load(*place)));
        for giver in givers {
            if let Some(chain) = self.chain_from(giver) {
                for (from, topic, to) in chain {
                    let partition = self.owned.get_mut(from).and_then(|owned| owned.take_last(topic));
                    if let (Some(partition), Some(owned)) = (partition, self.owned.get_mut(to)) {
                        owned.add(topic, partition);
                    }
                }
                return true;
            }
        }
        false
    }

    /// The shortest chain (from, topic, to) from `giver` to a member with at least two fewer; of several, to the one
    /// that has least.
    fn chain_from(&self, giver: usize) -> Option<Vec<(usize, TopicId, usize)>> {
        let enough = self.load(giver).checked_sub(2)?;
        let mut reached: BTreeMap<usize, Option<(usize, TopicId)>> = BTreeMap::from([(giver, None)]);
        let mut passed = BTreeSet::new();
        let mut level = VecDeque::from([giver]);
        while !level.is_empty() {
            let mut next = VecDeque::new();
            for from in level {
                for topic in self.owned.get(from).map(Owned::fullest_first).unwrap_or_default() {
                    if !passed.insert(topic) {
                        continue;
                    }
                    for &to in self.readers.get(&topic).into_iter().flatten() {
                        if let std::collections::btree_map::Entry::Vacant(entry) = reached.entry(to) {
                            entry.insert(Some((from, topic)));
                            next.push_back(to);
                        }
                    }
                }
            }
            let best =
                next.iter().copied().filter(|place| self.load(*place) <= enough).min_by_key(|p| (self.load(*p), *p));
            if let Some(mut to) = best {
                let mut chain = Vec::new();
                while let Some(Some((from, topic))) = reached.get(&to) {
                    chain.push((*from, *topic, to));
                    to = *from;
                }
                return Some(chain);
            }
            level = next;
        }
        None
    }

    fn load(&self, place: usize) -> usize {
        self.owned.get(place).map_or(0, |owned| owned.load)
    }
}

impl Owned {
    fn add(&mut self, topic: TopicId, partition: u32) {
        if self.topics.entry(topic).or_default().insert(partition) {
            self.load += 1;
        }
    }

    fn take_last(&mut self, topic: TopicId) -> Option<u32> {
        let partitions = self.topics.get_mut(&topic)?;
        let partition = partitions.pop_last()?;
        self.load -= 1;
        if partitions.is_empty() {
            self.topics.remove(&topic);
        }
        Some(partition)
    }

    /// Its topics, those with most partitions first, so that giving some up leaves a share of each.
    fn fullest_first(&self) -> Vec<TopicId> {
        let mut topics: Vec<(usize, TopicId)> =
            self.topics.iter().map(|(topic, partitions)| (partitions.len(), *topic)).collect();
        topics.sort_unstable_by_key(|(count, topic)| (std::cmp::Reverse(*count), *topic));
        topics.into_iter().map(|(_, topic)| topic).collect()
    }

    fn into_partitions(self) -> Partitions {
        self.topics
            .into_iter()
            .flat_map(|(topic, partitions)| partitions.into_iter().map(move |p| (topic, p)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn topic(n: u8) -> TopicId {
        TopicId::from_bytes([n; 16])
    }

    fn member(topics: &[u8]) -> Subscriber {
        Subscriber { topics: topics.iter().copied().map(topic).collect(), previous: Partitions::new() }
    }

    fn loads(assignment: &BTreeMap<String, Partitions>) -> Vec<usize> {
        assignment.values().map(BTreeSet::len).collect()
    }

    fn moved(before: &BTreeMap<String, Partitions>, after: &BTreeMap<String, Partitions>) -> usize {
        before.iter().filter_map(|(id, had)| Some(had.difference(after.get(id)?).count())).sum()
    }

    /// The members' next state: what they were just assigned is what they had.
    fn settle(members: &mut Subscribers, assignment: &BTreeMap<String, Partitions>) {
        for (id, member) in members {
            member.previous = assignment.get(id).cloned().unwrap_or_default();
        }
    }

    #[test]
    fn range_gives_neighbours_topic_by_topic_and_the_first_members_one_more() {
        let members = Subscribers::from([("a".into(), member(&[1, 2])), ("b".into(), member(&[1, 2, 3]))]);
        let counts = PartitionCounts::from([(topic(1), 3), (topic(2), 3), (topic(3), 1)]);
        let out = assign(Assignor::Range, &members, &counts);
        let of = |id: &str| out.get(id).expect("there").iter().map(|(t, p)| (t.as_bytes()[0], *p)).collect::<Vec<_>>();
        assert_eq!(of("a"), [(1, 0), (1, 1), (2, 0), (2, 1)]);
        assert_eq!(of("b"), [(1, 2), (2, 2), (3, 0)]);
    }

    #[test]
    fn uniform_spreads_each_topic_and_a_newcomer_takes_some_of_each() {
        let mut members = Subscribers::from([("a".into(), member(&[1, 2]))]);
        let counts = PartitionCounts::from([(topic(1), 4), (topic(2), 4)]);
        let first = assign(Assignor::Uniform, &members, &counts);
        settle(&mut members, &first);
        members.insert("b".into(), member(&[1, 2]));
        let second = assign(Assignor::Uniform, &members, &counts);
        assert_eq!((loads(&second), moved(&first, &second)), (vec![4, 4], 4));
        for partitions in second.values() {
            assert_eq!(partitions.iter().filter(|(t, _)| *t == topic(1)).count(), 2);
        }
    }

    #[test]
    fn uniform_passes_partitions_along_a_chain_of_subscriptions() {
        // Only b can take from a, and only c from b.
        let mut members =
            Subscribers::from([("a".into(), member(&[1])), ("b".into(), member(&[1, 2])), ("c".into(), member(&[2]))]);
        let counts = PartitionCounts::from([(topic(1), 3), (topic(2), 2)]);
        let lopsided = [("a", 0..3, 1u8), ("b", 0..2, 2)];
        for (id, partitions, t) in lopsided {
            members.get_mut(id).expect("there").previous = partitions.map(|p| (topic(t), p)).collect();
        }
        assert_eq!(loads(&assign(Assignor::Uniform, &members, &counts)), [2, 2, 1]);
    }

    #[test]
    fn more_members_than_partitions_leaves_some_with_nothing() {
        for assignor in [Assignor::Uniform, Assignor::Range] {
            let members: Subscribers = (0..5).map(|n| (format!("m{n}"), member(&[1]))).collect();
            let out = assign(assignor, &members, &PartitionCounts::from([(topic(1), 3)]));
            assert_eq!(loads(&out), [1, 1, 1, 0, 0]);
        }
        assert_eq!(
            "sticky".parse::<Assignor>().expect_err("refused").to_string(),
            "there is no assignor \"sticky\": there are uniform and range"
        );
    }

    fn any_group() -> impl Strategy<Value = (Subscribers, PartitionCounts)> {
        let counts = prop::collection::btree_map((0..5u8).prop_map(topic), 0..9u32, 1..5);
        let topics = prop::collection::btree_set((0..6u8).prop_map(topic), 0..5);
        let previous = prop::collection::btree_set(((0..6u8).prop_map(topic), 0..10u32), 0..8);
        let member = (topics, previous).prop_map(|(topics, previous)| Subscriber { topics, previous });
        (prop::collection::btree_map("[a-e]", member, 1..6), counts)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn every_subscribed_partition_has_one_reader_who_subscribes((members, counts) in any_group()) {
            for assignor in [Assignor::Uniform, Assignor::Range] {
                let out = assign(assignor, &members, &counts);
                prop_assert!(out.keys().eq(members.keys()));
                let mut seen = Partitions::new();
                for (id, partitions) in &out {
                    for partition in partitions {
                        prop_assert!(members[id].topics.contains(&partition.0), "not subscribed");
                        prop_assert!(partition.1 < counts[&partition.0], "no such partition");
                        prop_assert!(seen.insert(*partition), "assigned twice");
                    }
                }
                let wanted: usize = counts
                    .iter()
                    .filter(|(t, _)| members.values().any(|m| m.topics.contains(t)))
                    .map(|(_, count)| *count as usize)
                    .sum();
                prop_assert_eq!(seen.len(), wanted, "orphaned");
            }
        }

        #[test]
        fn uniform_is_as_even_as_subscriptions_allow((members, counts) in any_group()) {
            let out = assign(Assignor::Uniform, &members, &counts);
            for (giver, partitions) in &out {
                for (topic, _) in partitions {
                    for (taker, has) in &out {
                        if members[taker].topics.contains(topic) {
                            prop_assert!(has.len() + 1 >= partitions.len(), "{giver} could give {taker} one");
                        }
                    }
                }
            }
        }

        #[test]
        fn uniform_moves_no_more_than_evenness_takes(
            (members, counts) in any_group(),
            joins in prop::bool::ANY,
        ) {
            let topics: BTreeSet<TopicId> = counts.keys().copied().collect();
            let mut members: Subscribers = members
                .into_keys()
                .map(|id| (id, Subscriber { topics: topics.clone(), previous: Partitions::new() }))
                .collect();
            let before = assign(Assignor::Uniform, &members, &counts);
            settle(&mut members, &before);
            prop_assert_eq!(&assign(Assignor::Uniform, &members, &counts), &before, "moved without a cause");
            let total: usize = loads(&before).iter().sum();
            if joins {
                members.insert("new".into(), Subscriber { topics, previous: Partitions::new() });
                let after = assign(Assignor::Uniform, &members, &counts);
                let newcomer = after["new"].len();
                prop_assert_eq!(newcomer, total / members.len());
                prop_assert_eq!(moved(&before, &after), newcomer);
            } else if members.len() > 1 {
                let gone = members.pop_first().expect("one").0;
                let after = assign(Assignor::Uniform, &members, &counts);
                prop_assert_eq!(moved(&before, &after), 0, "somebody lost a partition when {} left", gone);
                let loads = loads(&after);
                prop_assert!(loads.iter().max() <= loads.iter().min().map(|least| least + 1).as_ref());
            }
        }
    }
}
