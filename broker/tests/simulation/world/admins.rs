//! An administrator, who looks at what the group committed: he asks whomever he takes for the coordinator, and stays with that one for as
//! long as it answers. And the network that makes one of it which is none any more: a broker is cut off from all the others, and not from
//! him.

use super::groups::{MEMBERS, READ_PARTITIONS, SILENCE_MS};
use super::*;

/// The administrator's place in the network.
pub(super) const ADMIN: i32 = -5;

#[derive(Default)]
pub(crate) struct Admin {
    stream: Option<(u64, i32)>,
    heard_ms: i64,
}

impl Admin {
    /// Whether this is the stream on which the administrator listens.
    pub(super) fn listens_on(&self, stream: u64) -> bool {
        self.stream.is_some_and(|(on, _)| on == stream)
    }
}

impl World {
    /// Whom any broker takes for the leader, by what it has heard of.
    pub(super) fn leader_by_hearsay(&mut self) -> Option<i32> {
        let up: Vec<i32> = self.nodes.iter().filter(|node| node.process.is_some()).map(|node| node.id).collect();
        let through = self.random.pick(&up)?;
        let process = self.nodes[through as usize - 1].process.as_ref()?;
        process.metadata.topic_by_id(&TOPIC)?.partitions.first().map(|partition| partition.leader)
    }

    pub(super) fn look_at_offsets(&mut self) {
        let next = self.random.between(20, 120);
        self.at(next, Event::Admin);
        let leader = self.leader_by_hearsay().filter(|leader| *leader >= 0);
        if self.admin.stream.is_some() && self.now - self.admin.heard_ms > SILENCE_MS {
            self.admin.stream = None;
        }
        let (stream, to) = match (self.admin.stream, leader) {
            (Some(stream), _) => stream,
            (None, None) => return,
            (None, Some(leader)) => {
                self.next_stream += 1;
                self.admin = Admin { stream: Some((self.next_stream, leader)), heard_ms: self.now };
                (self.next_stream, leader)
            }
        };
        let known = (0..READ_PARTITIONS).map(|partition| self.members.committed_of(partition)).collect();
        self.send(ADMIN, to, stream, Message::ToCoordinator(stream, ToCoordinator::Look { known }));
    }

    /// The administrator is answered: nothing goes back behind what was committed before he asked, and nothing is ahead of what was
    /// delivered.
    pub(super) fn admin_told(&mut self, told: ToMember) {
        self.admin.heard_ms = self.now;
        match told {
            ToMember::Elsewhere => self.admin.stream = None,
            ToMember::Seen(seen, known) => {
                for (partition, (offset, known)) in (0..).zip(seen.into_iter().zip(known)) {
                    assert!(offset >= known, "an administrator is told that {offset} of {known} were committed");
                    self.members.is_shown("an administrator", partition, offset);
                }
            }
            _ => {}
        }
    }

    /// A broker, most often the one that leads, is cut off from the others and from the quorum, and not from the administrator.
    pub(super) fn isolate(&mut self) {
        if self.healing {
            return;
        }
        let next = self.random.between(500, 3_000);
        self.at(next, Event::Isolate);
        let count = self.nodes.len() as i32;
        let (any, is_any) = (self.random.between(1, i64::from(count)) as i32, self.random.percent(30));
        let id = self.partition().map_or(any, |partition| partition.leader);
        let id = if is_any || id < 0 { any } else { id };
        let (lasts, ways) = (self.random.between(500, 3_000), self.random.below(5));
        let mut others: Vec<i32> = (1..=count).filter(|other| *other != id).collect();
        others.push(QUORUM);
        others.extend([MEMBERS, CLIENT].into_iter().filter(|_| self.random.percent(60)));
        self.note(format_args!("{id} is cut off from {others:?} for {lasts}, {ways}"));
        let (speaks, hears) = (ways == 0, ways == 1);
        for other in others {
            if !speaks {
                self.cut_for(id, other, lasts);
            }
            if !hears {
                self.cut_for(other, id, lasts);
            }
        }
        self.reached.isolated = true;
    }

    fn cut_for(&mut self, from: i32, to: i32, lasts: i64) {
        self.cut.insert((from, to));
        self.at(lasts, Event::Heal(from, to));
    }
}
