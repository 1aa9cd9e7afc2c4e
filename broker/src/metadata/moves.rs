//! Which partitions move where, so that brokers have even shares or one has nothing: pure, and the same for the same state.
//!
//! A plan moves as little as it can. Replicas first: each partition in as many racks as there are, then no broker with two
//! replicas more than another one. Leaderships after that, which costs no copy: the order of a partition's replicas says who
//! should lead, and it is changed along chains of partitions until no broker should lead two more than another one, as far as
//! where partitions are kept allows it.
//!
//! Only active brokers that are not to be emptied are given anything. What others keep stays: they may come back. Partitions that
//! move already count where they go, and are left alone.
//!
//! Owns: that choice. Refuses: new partitions ([`super::placement`]), and what a reassignment is ([`super::state`]).

use super::handle::MetadataError;
use super::state::{MetadataState, Refusal, Topic};
use headwater_proto::TopicId;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// A partition that is to move, or to be led by another broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The topic.
    pub topic: String,
    /// Its id.
    pub topic_id: TopicId,
    /// The partition.
    pub partition: u32,
    /// Who keeps it, the first of whom should lead.
    pub from: Vec<i32>,
    /// Who is to keep it.
    pub to: Vec<i32>,
}

/// What evens out who keeps and who leads how many partitions.
pub fn rebalance(state: &MetadataState) -> Vec<Move> {
    let mut plan = Plan::new(state, None);
    plan.spread_over_racks();
    plan.even_replicas();
    plan.even_leaders();
    plan.moves()
}

/// What leaves a broker with nothing.
///
/// # Errors
/// [`MetadataError`]: it is not there, or one of its partitions can be kept nowhere else.
pub fn drain(state: &MetadataState, broker_id: i32) -> Result<Vec<Move>, MetadataError> {
    state.broker(broker_id).ok_or(Refusal::UnknownBroker(broker_id))?;
    let mut plan = Plan::new(state, Some(broker_id));
    plan.empty(broker_id)?;
    Ok(plan.moves())
}

/// A broker, and what it would have.
#[derive(Debug)]
struct Load<'a> {
    rack: &'a str,
    replicas: usize,
    /// Partitions that it should lead.
    leaders: usize,
}

/// A partition, and where it would be.
#[derive(Debug)]
struct Slot<'a> {
    topic: &'a Topic,
    partition: u32,
    before: &'a [i32],
    now: Vec<i32>,
    is_free: bool,
}

#[derive(Debug)]
struct Plan<'a> {
    /// Those that may be given something.
    loads: BTreeMap<i32, Load<'a>>,
    racks: HashMap<i32, &'a str>,
    slots: Vec<Slot<'a>>,
    of_topic: HashMap<(TopicId, i32), usize>,
}

impl<'a> Plan<'a> {
    fn new(state: &'a MetadataState, without: Option<i32>) -> Plan<'a> {
        let gives = state.brokers().filter(|it| it.takes_partitions() && Some(it.id) != without);
        let loads = gives.map(|broker| (broker.id, Load { rack: &broker.rack, replicas: 0, leaders: 0 })).collect();
        let racks = state.brokers().map(|broker| (broker.id, broker.rack.as_str())).collect();
        let mut plan = Plan { loads, racks, slots: Vec::new(), of_topic: HashMap::new() };
        for topic in state.topics() {
            for (partition, number) in topic.partitions.iter().zip(0u32..) {
                let is_free = partition.target.is_empty();
                let before = if is_free { &partition.replicas } else { &partition.target };
                plan.slots.push(Slot { topic, partition: number, before, now: before.clone(), is_free });
                for broker in before {
                    plan.count(topic.id, *broker, 1);
                }
                if let Some(load) = before.first().and_then(|first| plan.loads.get_mut(first)) {
                    load.leaders += 1;
                }
            }
        }
        plan
    }

    fn count(&mut self, topic: TopicId, broker: i32, by: isize) {
        let replicas = self.of_topic.entry((topic, broker)).or_default();
        *replicas = replicas.saturating_add_signed(by);
        if let Some(load) = self.loads.get_mut(&broker) {
            load.replicas = load.replicas.saturating_add_signed(by);
        }
    }

    fn rack(&self, broker: i32) -> &'a str {
        self.racks.get(&broker).copied().unwrap_or_default()
    }

    fn of(&self, slot: usize) -> &Slot<'a> {
        &self.slots[slot]
    }

    /// In how many racks these are.
    fn racks_of(&self, brokers: impl Iterator<Item = i32>) -> usize {
        brokers.map(|broker| self.rack(broker)).collect::<BTreeSet<_>>().len()
    }

    /// What the racks of a partition would be if `leaver` gave it to `taker`.
    fn racks_after(&self, slot: usize, leaver: i32, taker: i32) -> usize {
        let now = self.of(slot).now.iter().copied();
        self.racks_of(now.map(|broker| if broker == leaver { taker } else { broker }))
    }

    /// Who would best take a partition over from `leaver`: where few of its replicas are near, then few of its topic, then few.
    fn taker(&self, slot: usize, leaver: i32) -> Option<i32> {
        let Slot { now, topic, .. } = self.of(slot);
        let free = self.loads.iter().filter(|(broker, _)| !now.contains(broker));
        let best = free.min_by_key(|(broker, load)| {
            let near = now.iter().filter(|other| **other != leaver && self.rack(**other) == load.rack).count();
            let of_topic = self.of_topic.get(&(topic.id, **broker)).copied().unwrap_or(0);
            (near, of_topic, load.replicas, **broker)
        });
        best.map(|(broker, _)| *broker)
    }

    /// `taker` keeps a partition in the place of `leaver`.
    fn replace(&mut self, slot: usize, leaver: i32, taker: i32) {
        let id = self.of(slot).topic.id;
        self.count(id, leaver, -1);
        self.count(id, taker, 1);
        let now = &mut self.slots[slot].now;
        let Some(place) = now.iter().position(|broker| *broker == leaver) else { return };
        now[place] = taker;
        if place == 0 {
            self.lead(leaver, -1);
            self.lead(taker, 1);
        }
    }

    fn lead(&mut self, broker: i32, by: isize) {
        if let Some(load) = self.loads.get_mut(&broker) {
            load.leaders = load.leaders.saturating_add_signed(by);
        }
    }

    /// Another replica of a partition should lead it.
    fn prefer(&mut self, slot: usize, broker: i32) {
        let now = &mut self.slots[slot].now;
        let Some(place) = now.iter().position(|replica| *replica == broker).filter(|place| *place > 0) else { return };
        now.swap(0, place);
        let before = now[place];
        self.lead(before, -1);
        self.lead(broker, 1);
    }

    fn empty(&mut self, broker: i32) -> Result<(), MetadataError> {
        let has_it = |slot: &Slot<'_>| slot.is_free && slot.now.contains(&broker);
        let slots: Vec<usize> = (0..self.slots.len()).filter(|slot| has_it(self.of(*slot))).collect();
        for slot in slots {
            let Some(taker) = self.taker(slot, broker) else {
                let Slot { topic, partition, before, .. } = self.of(slot);
                return Err(Refusal::InvalidReplicas {
                    topic: topic.name.clone(),
                    partition: *partition as usize,
                    replicas: before.iter().copied().filter(|other| *other != broker).collect(),
                    why: "too few: no other broker is active that could take it",
                }
                .into());
            };
            let led = self.of(slot).now.first() == Some(&broker);
            self.replace(slot, broker, taker);
            let now = self.of(slot).now.iter();
            let least = now.filter_map(|replica| Some((self.loads.get(replica)?.leaders, *replica))).min();
            if let Some((_, least)) = least.filter(|_| led) {
                self.prefer(slot, least);
            }
        }
        Ok(())
    }

    fn free_slots(&self) -> impl Iterator<Item = usize> + use<> {
        let free: Vec<usize> = (0..self.slots.len()).filter(|slot| self.of(*slot).is_free).collect();
        free.into_iter()
    }

    /// Each partition is in as many racks as it can be.
    fn spread_over_racks(&mut self) {
        let racks = self.racks_of(self.loads.keys().copied());
        for slot in self.free_slots() {
            loop {
                let now = &self.of(slot).now;
                let spread = self.racks_of(now.iter().copied());
                if spread >= racks.min(now.len()) {
                    break;
                }
                let near = |broker: i32| now.iter().filter(|other| self.rack(**other) == self.rack(broker)).count();
                let may_leave = now.iter().copied().filter(|broker| self.loads.contains_key(broker));
                let leaver = may_leave.max_by_key(|broker| {
                    (near(*broker), self.loads.get(broker).map_or(0, |load| load.replicas), *broker)
                });
                let chosen = leaver.and_then(|leaver| Some((leaver, self.taker(slot, leaver)?)));
                let Some((leaver, taker)) =
                    chosen.filter(|(leaver, taker)| self.racks_after(slot, *leaver, *taker) > spread)
                else {
                    break;
                };
                self.replace(slot, leaver, taker);
            }
        }
    }

    /// No broker keeps two partitions more than another one.
    fn even_replicas(&mut self) {
        while let Some((slot, from, to)) = self.next_to_even() {
            self.replace(slot, from, to);
        }
    }

    fn next_to_even(&self) -> Option<(usize, i32, i32)> {
        let mut by_load: Vec<(usize, i32)> = self.loads.iter().map(|(broker, load)| (load.replicas, *broker)).collect();
        by_load.sort_unstable();
        for (most, from) in by_load.iter().rev() {
            for (least, to) in by_load.iter().take_while(|(least, _)| least + 2 <= *most) {
                debug_assert!(least < most);
                if let Some(slot) = self.slot_to_move(*from, *to) {
                    return Some((slot, *from, *to));
                }
            }
        }
        None
    }

    /// Which partition moves from one broker to another: one whose topic that evens, and that stays in as many racks.
    fn slot_to_move(&self, from: i32, to: i32) -> Option<usize> {
        let fits = self.free_slots().filter(|slot| {
            let now = &self.of(*slot).now;
            now.contains(&from)
                && !now.contains(&to)
                && self.racks_after(*slot, from, to) >= self.racks_of(now.iter().copied())
        });
        let of_topic = |slot: usize, broker| {
            let replicas = self.of_topic.get(&(self.of(slot).topic.id, broker)).copied().unwrap_or(0);
            isize::try_from(replicas).unwrap_or(isize::MAX)
        };
        fits.min_by_key(|slot| {
            let Slot { before, now, .. } = self.of(*slot);
            // What moves already costs nothing more, and a leader is moved last.
            let copies = before.contains(&from);
            (of_topic(*slot, to) - of_topic(*slot, from), copies, now.first() == Some(&from), *slot)
        })
    }

    /// No broker should lead two partitions more than another one, as far as they are kept by others that may.
    fn even_leaders(&mut self) {
        let mut led: BTreeMap<i32, BTreeSet<usize>> = BTreeMap::new();
        for slot in self.free_slots() {
            if let Some(first) = self.of(slot).now.first() {
                led.entry(*first).or_default().insert(slot);
            }
        }
        while let Some(chain) = self.chain(&led) {
            for (slot, from, to) in chain {
                self.prefer(slot, to);
                led.entry(from).or_default().remove(&slot);
                led.entry(to).or_default().insert(slot);
            }
        }
    }

    /// Partitions that change hands one after another, so that a broker which leads much leads one less, and another one that leads
    /// at least two less leads one more.
    fn chain(&self, led: &BTreeMap<i32, BTreeSet<usize>>) -> Option<Vec<(usize, i32, i32)>> {
        let mut by_load: Vec<(usize, i32)> = self.loads.iter().map(|(broker, load)| (load.leaders, *broker)).collect();
        by_load.sort_unstable();
        let least = by_load.first()?.0;
        for (most, begin) in by_load.into_iter().rev().take_while(|(most, _)| least + 2 <= *most) {
            // By which partition, and from whom, a broker is reached.
            let mut reached: BTreeMap<i32, (usize, i32)> = BTreeMap::new();
            let mut next = VecDeque::from([begin]);
            while let Some(broker) = next.pop_front() {
                if broker != begin && self.loads.get(&broker).is_some_and(|load| load.leaders + 2 <= most) {
                    let (mut chain, mut at) = (Vec::new(), broker);
                    while let Some((slot, from)) = reached.get(&at).filter(|_| at != begin) {
                        chain.push((*slot, *from, at));
                        at = *from;
                    }
                    return Some(chain);
                }
                for slot in led.get(&broker).into_iter().flatten() {
                    for other in self.of(*slot).now.iter().skip(1) {
                        if *other != begin && self.loads.contains_key(other) && !reached.contains_key(other) {
                            reached.insert(*other, (*slot, broker));
                            next.push_back(*other);
                        }
                    }
                }
            }
        }
        None
    }

    fn moves(self) -> Vec<Move> {
        let moved = self.slots.into_iter().filter(|slot| slot.is_free && slot.now != slot.before);
        moved
            .map(|slot| Move {
                topic: slot.topic.name.clone(),
                topic_id: slot.topic.id,
                partition: slot.partition,
                from: slot.before.to_vec(),
                to: slot.now,
            })
            .collect()
    }
}

#[cfg(test)]
#[path = "moves_tests.rs"]
mod tests;
