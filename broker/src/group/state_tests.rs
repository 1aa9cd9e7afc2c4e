//! One group with members that answer late, vanish, come back and are replaced, and a broker that restarts.

use super::super::offsets::{CommitEntry, Speaker};
use super::*;
use crate::group::records::Replay;
use crate::metadata::command::{self, command::Command as Kind};
use headwater_proto::{ErrorCode, TopicId};
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

fn topic_id(name: &str) -> TopicId {
    let mut bytes = [7; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    TopicId::from_bytes(bytes)
}

/// Updates on the way to a member, and reports on the way from it.
type Wires = (VecDeque<(i32, Partitions)>, VecDeque<Report>);

/// A member's process, as it sees things.
#[derive(Debug, Default)]
struct Actor {
    instance: Option<String>,
    topics: BTreeSet<String>,
    epoch: i32,
    owned: Partitions,
    stream: Option<Wires>,
}

struct World {
    group: Group,
    metadata: MetadataState,
    settings: GroupSettings,
    now: Now,
    /// For how long members may be with the coordinator before.
    elsewhere_ms: u64,
    actors: BTreeMap<String, Actor>,
    log: Vec<(OffsetsKey, Option<OffsetsValue>)>,
    epochs: HashMap<String, i32>,
    transcript: Vec<String>,
}

impl World {
    fn new(topics: &[(&str, usize)]) -> World {
        let mut world = World {
            group: Group::new("g"),
            metadata: MetadataState::new("cluster"),
            settings: GroupSettings {
                rebalance_timeout_ms: 5_000,
                heartbeat_interval_ms: 2_000,
                ..crate::config::BrokerConfig::default().groups
            },
            now: Now { monotonic_ms: 1_000, wall_ms: 1_700_000_000_000 },
            elsewhere_ms: 0,
            actors: BTreeMap::new(),
            log: Vec::new(),
            epochs: HashMap::new(),
            transcript: Vec::new(),
        };
        world.command(Kind::RegisterBroker(command::RegisterBroker { broker_id: 1, ..Default::default() }));
        for (name, partitions) in topics {
            world.create(name, *partitions);
        }
        world
    }

    fn command(&mut self, kind: Kind) {
        let index = self.metadata.index() + 1;
        if self.metadata.apply(index, &kind.into()).is_ok() {
            let effects = self.group.topics_changed(self.now, &self.metadata);
            self.perform(effects);
            let effects = self.group.forget_deleted_topics(&self.metadata);
            self.perform(effects);
        }
    }

    fn create(&mut self, name: &str, partitions: usize) {
        self.command(Kind::CreateTopic(command::CreateTopic {
            name: name.into(),
            topic_id: topic_id(name).to_wire(),
            partitions: vec![command::Replicas { brokers: vec![1] }; partitions],
            ..Default::default()
        }));
    }

    fn grow(&mut self, name: &str, by: usize) {
        let Some(from) = self.metadata.topic(name).map(|topic| topic.partitions.len() as u32) else { return };
        let partitions = vec![command::Replicas { brokers: vec![1] }; by];
        self.command(Kind::AddPartitions(command::AddPartitions {
            topic_id: topic_id(name).to_wire(),
            from,
            partitions,
        }));
    }

    fn delete(&mut self, name: &str) {
        self.command(Kind::DeleteTopic(command::DeleteTopic { topic_id: topic_id(name).to_wire() }));
    }

    fn short(partitions: &Partitions) -> String {
        let name = |topic: &TopicId| char::from(topic.as_bytes()[0]);
        partitions.iter().map(|(topic, p)| format!("{}{p}", name(topic))).collect::<Vec<_>>().join(" ")
    }

    fn perform(&mut self, effects: Effects) {
        for effect in effects {
            match effect {
                Effect::Write(key, value) => self.log.push((key, value)),
                Effect::Update { member_id, epoch, assigned } => {
                    self.transcript.push(format!("{member_id} epoch {epoch} [{}]", Self::short(&assigned)));
                    if let Some(actor) = self.actors.get_mut(&member_id)
                        && let Some((inbox, _)) = &mut actor.stream
                    {
                        inbox.push_back((epoch, assigned));
                    }
                }
                Effect::Expel { member_id, error } => {
                    self.transcript.push(format!("{member_id} out: {}", error.code()));
                    self.actors.remove(&member_id);
                }
                Effect::Left { member_id } => self.transcript.push(format!("{member_id} left")),
            }
        }
        self.check();
    }

    /// Opens a stream for the actor: a first one, or one after a disconnection.
    fn open(&mut self, id: &str, instance: Option<&str>, topics: &[&str]) -> Result<(), GroupError> {
        let known = self.actors.get(id);
        let join = Join {
            member_id: id.into(),
            instance_id: instance.map(str::to_owned),
            topics: topics.iter().map(|name| (*name).to_owned()).collect(),
            owned: known.map(|actor| actor.owned.clone()).unwrap_or_default(),
            member_epoch: known.map_or(0, |actor| actor.epoch),
            ..Join::default()
        };
        let actor = self.actors.entry(id.to_owned()).or_default();
        actor.instance = join.instance_id.clone();
        actor.topics = join.topics.clone();
        actor.stream = Some(Default::default());
        let joined = self.group.join(self.now, join, &self.metadata, &self.settings);
        match joined {
            Ok(effects) => {
                let told = effects.iter().any(|e| matches!(e, Effect::Update { member_id, .. } if member_id == id));
                assert!(told, "whoever opens a stream hears its assignment");
                self.perform(effects);
                Ok(())
            }
            Err(error) => {
                // A client that is refused begins anew, with nothing.
                self.actors.remove(id);
                Err(error)
            }
        }
    }

    /// All but the newest of the actor's updates are lost: each is whole, and a driver sends no other.
    fn skip(&mut self, id: &str) {
        if let Some((inbox, _)) = self.actors.get_mut(id).and_then(|actor| actor.stream.as_mut()) {
            inbox.drain(..inbox.len().saturating_sub(1));
        }
    }

    /// The actor takes one update: lets go, takes up, reports.
    fn deliver(&mut self, id: &str) -> bool {
        let Some(actor) = self.actors.get_mut(id) else { return false };
        let Some((inbox, outbox)) = &mut actor.stream else { return false };
        let Some((epoch, assigned)) = inbox.pop_front() else { return false };
        actor.epoch = epoch;
        actor.owned = assigned;
        outbox.push_back(Report { member_epoch: epoch, owned: actor.owned.clone(), topics: None });
        self.check();
        true
    }

    fn beat(&mut self, id: &str) {
        if let Some(actor) = self.actors.get_mut(id)
            && let Some((_, outbox)) = &mut actor.stream
        {
            outbox.push_back(Report { member_epoch: actor.epoch, owned: actor.owned.clone(), topics: None });
        }
    }

    fn subscribe(&mut self, id: &str, topics: &[&str]) {
        if let Some(actor) = self.actors.get_mut(id)
            && let Some((_, outbox)) = &mut actor.stream
        {
            actor.topics = topics.iter().map(|name| (*name).to_owned()).collect();
            let topics = Some(actor.topics.clone());
            outbox.push_back(Report { member_epoch: actor.epoch, owned: actor.owned.clone(), topics });
        }
    }

    /// The coordinator takes one report.
    fn receive(&mut self, id: &str) -> bool {
        let Some(actor) = self.actors.get_mut(id) else { return false };
        let Some((_, outbox)) = &mut actor.stream else { return false };
        let Some(report) = outbox.pop_front() else { return false };
        let effects = self
            .group
            .heartbeat(self.now, id, report, &self.metadata)
            .expect("a member that follows the rules is heard");
        self.perform(effects);
        true
    }

    fn disconnect(&mut self, id: &str) {
        if let Some(actor) = self.actors.get_mut(id) {
            actor.stream = None;
            self.group.disconnected(id);
        }
    }

    fn leave(&mut self, id: &str, keep: bool) {
        if self.actors.get(id).is_some_and(|actor| actor.stream.is_some()) {
            self.actors.remove(id);
            let effects = self.group.leave(self.now, id, keep, &self.metadata).expect("a member");
            self.perform(effects);
        }
    }

    fn pass(&mut self, ms: u64) {
        self.now.monotonic_ms += ms;
        self.now.wall_ms += ms as i64;
        let effects = self.group.tick(self.now, &self.metadata);
        self.perform(effects);
        assert!(self.group.next_deadline_ms().is_none_or(|at| at > self.now.monotonic_ms));
    }

    /// The broker dies and reads the offsets topic; every stream is gone.
    fn restart(&mut self) {
        let mut replay = Replay::default();
        for (key, value) in &self.log {
            let value_bytes = value.as_ref().map(|value| value.encode().expect("encodes"));
            let key_bytes = key.encode().expect("encodes");
            let (key, value) =
                headwater_storage::offsets_schema::decode(&key_bytes, value_bytes.as_deref()).expect("reads");
            replay.apply(key, value);
        }
        assert_eq!(replay.passed_over(), 0);
        let (mut groups, effects) = replay.finish(self.now, &self.metadata, &self.settings, self.elsewhere_ms);
        let group = groups.remove("g").unwrap_or_else(|| Group::new("g"));
        assert_eq!(group.offsets, self.group.offsets);
        let held = |member: &Member| -> Partitions { member.assigned.union(&member.revoking).copied().collect() };
        assert_eq!(group.members.keys().collect::<Vec<_>>(), self.group.members.keys().collect::<Vec<_>>());
        for (id, member) in &group.members {
            let before = &self.group.members[id];
            assert!(member.epoch >= before.epoch && member.away == before.away, "{id}");
            assert!(held(member).is_superset(&held(before)), "{id}");
        }
        self.group = group;
        for actor in self.actors.values_mut() {
            actor.stream = None;
        }
        effects.into_iter().for_each(|(_, effects)| self.perform(effects));
    }

    fn run_until_quiet(&mut self) {
        let ids: Vec<String> = self.actors.keys().cloned().collect();
        while ids.iter().any(|id| self.deliver(id) | self.receive(id)) {}
    }

    fn check(&mut self) {
        let mut given: HashMap<(TopicId, u32), &str> = HashMap::new();
        for (id, member) in self.group.members() {
            assert!(member.epoch <= self.group.epoch());
            assert!(member.assigned.is_disjoint(&member.revoking));
            assert!(member.confirmed.is_subset(&member.assigned));
            for partition in member.assigned.iter().chain(&member.revoking) {
                assert_eq!(given.insert(*partition, id), None, "{partition:?} is given twice");
            }
            let last = self.epochs.insert(id.clone(), member.epoch).unwrap_or(0);
            assert!(member.epoch >= last, "the epoch of {id} fell");
        }
        let mut owned: HashMap<(TopicId, u32), &str> = HashMap::new();
        for (id, actor) in &self.actors {
            for partition in &actor.owned {
                if let Some(other) = owned.insert(*partition, id) {
                    panic!("{partition:?} is read by {other} and {id}");
                }
                assert_eq!(given.get(partition), Some(&id.as_str()), "{id} reads {partition:?} and was not given it");
            }
        }
        for (id, partitions) in &self.group.target {
            assert!(self.group.members().contains_key(id) && partitions.len() < 1000);
        }
    }

    /// Everybody who lives has a stream, answers, and nothing is under way: every partition has its reader.
    fn check_at_rest(&mut self) {
        let ids: Vec<String> = self.actors.keys().cloned().collect();
        for _ in 0..8 {
            for id in &ids {
                let Some(actor) = self.actors.get(id) else { continue };
                if actor.stream.is_none() {
                    let topics: Vec<String> = actor.topics.iter().cloned().collect();
                    let instance = actor.instance.clone();
                    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
                    drop(self.open(id, instance.as_deref(), &topics));
                }
                self.beat(id);
            }
            self.run_until_quiet();
            self.pass(3_000);
        }
        let phase = self.group.phase();
        assert_ne!(phase, Phase::Reconciling, "{:#?}\n{}", self.group, self.transcript.join("\n"));
        assert_eq!(self.group.members().len(), self.actors.len());
        let wanted: Partitions = self
            .group
            .subscribed(&self.metadata)
            .into_iter()
            .flat_map(|(topic, count)| (0..count).map(move |p| (topic, p)))
            .collect();
        let owned: Partitions = self.actors.values().flat_map(|actor| &actor.owned).copied().collect();
        assert_eq!(owned, wanted, "orphaned or dead partitions");
        let same = self.actors.values().map(|actor| &actor.topics).collect::<BTreeSet<_>>().len() <= 1;
        let loads: Vec<usize> = self.actors.values().map(|actor| actor.owned.len()).collect();
        if let (true, Some(most), Some(least)) = (same, loads.iter().max(), loads.iter().min()) {
            assert!(most - least <= 1, "{loads:?}");
        }
    }

    fn commit(&mut self, speaker: Speaker<'_>, partition: u32, offset: i64) -> Result<(), GroupError> {
        let entry = CommitEntry {
            topic: "a".into(),
            topic_id: TopicId::ZERO,
            partition,
            offset,
            leader_epoch: 0,
            metadata: String::new(),
        };
        let (effects, results) = self.group.commit(self.now, speaker, vec![entry], &self.metadata)?;
        assert_eq!(results, [Ok(())]);
        self.perform(effects);
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Open(u8, bool, u8),
    Deliver(u8),
    Skip(u8),
    Beat(u8),
    Subscribe(u8, u8),
    Receive(u8),
    Disconnect(u8),
    Leave(u8, bool),
    Crash(u8),
    Pass(u64),
    Create(u8, usize),
    Grow(u8, usize),
    Delete(u8),
    Commit(u8, u32, i64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let m = 0..5u8;
    let t = 0..3u8;
    prop_oneof![
        6 => (m.clone(), any::<bool>(), 0..4u8).prop_map(|(m, s, t)| Step::Open(m, s, t)),
        12 => m.clone().prop_map(Step::Deliver),
        3 => m.clone().prop_map(Step::Skip),
        4 => m.clone().prop_map(Step::Beat),
        12 => m.clone().prop_map(Step::Receive),
        1 => (m.clone(), 0..4u8).prop_map(|(m, t)| Step::Subscribe(m, t)),
        2 => m.clone().prop_map(Step::Disconnect),
        1 => (m.clone(), any::<bool>()).prop_map(|(m, keep)| Step::Leave(m, keep)),
        1 => m.clone().prop_map(Step::Crash),
        4 => (100..4_000u64).prop_map(Step::Pass),
        1 => (t.clone(), 1..5usize).prop_map(|(t, n)| Step::Create(t, n)),
        1 => (t.clone(), 1..3usize).prop_map(|(t, n)| Step::Grow(t, n)),
        1 => t.prop_map(Step::Delete),
        2 => (m, 0..3u32, 0..100i64).prop_map(|(m, p, o)| Step::Commit(m, p, o)),
        1 => Just(Step::Restart),
    ]
}

const NAMES: [&str; 3] = ["a", "b", "c"];

/// The subscriptions that members choose among: mostly the same.
fn subscription(n: u8) -> &'static [&'static str] {
    match n {
        0 => &["a", "b"],
        1 => &["a", "b", "c"],
        _ => &["a", "c"],
    }
}

fn play(world: &mut World, steps: &[Step], lives: &mut u32) {
    // An actor's id names the member and its life: whoever was expelled comes back as somebody new.
    let mut current: HashMap<u8, String> = HashMap::new();
    for step in steps {
        let id = |m: &u8| current.get(m).cloned().unwrap_or_default();
        match step {
            Step::Open(m, fixed, topics) => {
                let id = match current.get(m).filter(|id| world.actors.contains_key(*id)) {
                    Some(id) => id.clone(),
                    None => {
                        *lives += 1;
                        format!("m{m}-{lives}")
                    }
                };
                current.insert(*m, id.clone());
                // Members 0 and 1 are static, and share an instance id where the script says so.
                let instance = (*m < 2).then(|| if *fixed { "i0".to_owned() } else { format!("i{m}") });
                match world.open(&id, instance.as_deref(), subscription(*topics)) {
                    Ok(()) | Err(GroupError::UnreleasedInstance { .. } | GroupError::FencedInstance { .. }) => {}
                    Err(GroupError::UnknownMember { .. } | GroupError::FencedEpoch { .. }) => {}
                    Err(GroupError::InstanceChanged { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Deliver(m) => drop(world.deliver(&id(m))),
            Step::Skip(m) => world.skip(&id(m)),
            Step::Beat(m) => world.beat(&id(m)),
            Step::Subscribe(m, topics) => world.subscribe(&id(m), subscription(*topics)),
            Step::Receive(m) => drop(world.receive(&id(m))),
            Step::Disconnect(m) => world.disconnect(&id(m)),
            Step::Leave(m, keep) => world.leave(&id(m), *keep),
            Step::Crash(m) => drop(world.actors.remove(&id(m))),
            Step::Pass(ms) => world.pass(*ms),
            Step::Create(t, n) => world.create(NAMES[usize::from(*t)], *n),
            Step::Grow(t, n) => world.grow(NAMES[usize::from(*t)], *n),
            Step::Delete(t) => world.delete(NAMES[usize::from(*t)]),
            Step::Commit(m, partition, offset) => {
                let id = id(m);
                let topic = world.metadata.topic("a").map_or(0, |topic| topic.partitions.len() as u32);
                if let Some(epoch) = world.actors.get(&id).map(|actor| actor.epoch)
                    && *partition < topic
                {
                    let allowed =
                        world.group.members().get(&id).is_some_and(|member| member.epoch == epoch && !member.away);
                    let committed = world.commit(Speaker::Member { id: &id, epoch }, *partition, *offset);
                    assert_eq!(committed.is_ok(), allowed, "{committed:?}");
                }
            }
            Step::Restart => world.restart(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("HEADWATER_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(96)
    ))]

    #[test]
    fn no_partition_is_read_twice_and_none_is_orphaned_once_quiet(steps in prop::collection::vec(step(), 1..160)) {
        let mut world = World::new(&[("a", 3), ("b", 4)]);
        play(&mut world, &steps, &mut 0);
        world.check_at_rest();
    }
}

fn transcript(world: &mut World) -> Vec<String> {
    std::mem::take(&mut world.transcript)
}

#[test]
fn a_partition_moves_only_after_its_owner_let_go() {
    let mut world = World::new(&[("a", 4)]);
    world.open("x", None, &["a"]).expect("joins");
    world.run_until_quiet();
    world.open("y", None, &["a"]).expect("joins");
    assert_eq!(
        transcript(&mut world),
        ["x epoch 1 [a0 a1 a2 a3]", "x epoch 1 [a0 a1]", "y epoch 2 []"],
        "y waits while x still has everything"
    );
    world.deliver("x");
    assert_eq!(transcript(&mut world), [""; 0], "x let go, and nobody knows yet");
    world.receive("x");
    assert_eq!(transcript(&mut world), ["x epoch 2 [a0 a1]", "y epoch 2 [a2 a3]"]);
    world.run_until_quiet();
    assert_eq!(world.group.phase(), Phase::Stable);
}

#[test]
fn a_report_from_before_a_grant_does_not_count_as_letting_go() {
    let mut world = World::new(&[("a", 2)]);
    world.open("x", None, &["a"]).expect("joins");
    world.beat("x"); // sent before the update with a0 and a1 arrived
    world.open("y", None, &["a"]).expect("joins");
    transcript(&mut world);
    world.receive("x");
    assert_eq!(transcript(&mut world), [""; 0], "x may be about to take up both");
    world.deliver("x");
    world.receive("x");
    assert_eq!(transcript(&mut world), ["x epoch 1 [a0]"]);
    world.run_until_quiet();
    world.check_at_rest();
}

#[test]
fn a_silent_member_is_out_after_its_session_and_a_stubborn_one_after_the_rebalance_timeout() {
    let mut world = World::new(&[("a", 4)]);
    world.open("x", None, &["a"]).expect("joins");
    world.run_until_quiet();
    world.open("y", None, &["a"]).expect("joins");
    for _ in 0..4 {
        world.pass(1_000);
        let owned = world.actors["x"].owned.clone();
        let report = Report { member_epoch: 1, owned, topics: None };
        let effects = world.group.heartbeat(world.now, "x", report, &world.metadata).expect("heard");
        world.perform(effects);
    }
    transcript(&mut world);
    world.pass(1_000);
    assert_eq!(transcript(&mut world), ["x out: fenced_member_epoch", "y epoch 3 [a0 a1 a2 a3]"]);
    world.pass(4_999);
    assert_eq!(transcript(&mut world), [""; 0]);
    world.pass(1);
    assert_eq!(transcript(&mut world), ["y out: fenced_member_epoch"]);
    assert_eq!(world.group.phase(), Phase::Empty);
}

/// Where the broker's 10 s counted after the coordinator had moved, a member that was paused for 15 s lost what it would have kept.
#[test]
fn a_member_keeps_the_session_that_it_asked_for_though_the_coordinator_moves() {
    for (asked, session_ms) in [(60_000, 60_000), (0, 10_000)] {
        let mut world = World::new(&[("a", 2)]);
        let topics = ["a".to_owned()].into();
        let join = Join { member_id: "x".into(), topics, session_timeout_ms: asked, ..Join::default() };
        let joined = world.group.join(world.now, join, &world.metadata, &world.settings);
        world.perform(joined.expect("joins"));
        world.restart();
        world.pass(session_ms - 1);
        assert_eq!(world.group.members().len(), 1, "{asked} were asked for");
        world.pass(1);
        assert_eq!(world.group.phase(), Phase::Empty);
    }
}

/// A member whose coordinator's disk hung read on for 4.5 s beside the next owner of what it had.
#[test]
fn a_member_that_may_be_with_the_coordinator_before_is_not_put_out_until_it_cannot_be_or_is_heard() {
    let after_restart = |session_timeout_ms, rebalance_timeout_ms, members: &[&str]| {
        let mut world = World::new(&[("a", 2)]);
        world.elsewhere_ms = 9_000;
        for id in members {
            let topics = ["a".to_owned()].into();
            let join =
                Join { member_id: (*id).into(), topics, session_timeout_ms, rebalance_timeout_ms, ..Join::default() };
            let joined = world.group.join(world.now, join, &world.metadata, &world.settings);
            world.perform(joined.expect("joins"));
        }
        world.restart();
        world
    };
    let mut silent = after_restart(1_000, 60_000, &["x"]);
    silent.pass(8_999);
    assert_eq!(silent.group.members().len(), 1, "it may be told elsewhere still");
    silent.pass(1);
    assert_eq!(silent.group.phase(), Phase::Empty);

    let mut heard = after_restart(1_000, 60_000, &["x"]);
    let x = &heard.group.members()["x"];
    let report = Report { member_epoch: x.epoch, owned: x.assigned.clone(), topics: None };
    let effects = heard.group.heartbeat(heard.now, "x", report, &heard.metadata).expect("a member");
    heard.perform(effects);
    heard.pass(1_000);
    assert_eq!(heard.group.phase(), Phase::Empty, "it was here, and its session is over");

    // x had both partitions, and is to let go of one.
    let mut late = after_restart(20_000, 2_000, &["x", "y"]);
    assert!(!late.group.members()["x"].revoking.is_empty());
    late.pass(8_999);
    assert_eq!(late.group.members().len(), 2, "it may not have been told to let go");
    late.pass(1);
    assert_eq!(late.group.members().keys().collect::<Vec<_>>(), ["y"]);
}

#[test]
fn a_static_member_gets_its_partitions_back_and_a_second_holder_is_refused() {
    let mut world = World::new(&[("a", 4)]);
    world.open("x1", Some("ix"), &["a"]).expect("joins");
    world.open("y1", Some("iy"), &["a"]).expect("joins");
    world.run_until_quiet();
    let had = world.actors["x1"].owned.clone();
    let epoch = world.group.epoch();

    let refused = world.open("z", Some("ix"), &["a"]).expect_err("x1 lives");
    assert_eq!(refused.code(), ErrorCode::UnreleasedInstanceId);
    assert!(refused.to_string().contains("instance id ix belongs to member x1"), "{refused}");

    world.leave("x1", true);
    world.pass(9_000);
    world.beat("y1");
    world.run_until_quiet();
    transcript(&mut world);
    world.open("x2", Some("ix"), &["a"]).expect("returns");
    assert_eq!(transcript(&mut world), [format!("x2 epoch {epoch} [{}]", World::short(&had))]);
    assert_eq!(world.group.epoch(), epoch, "a return changes nothing for the others");
    world.run_until_quiet();

    world.disconnect("x2");
    world.open("x3", Some("ix"), &["a"]).expect("x2 is not connected");
    world.run_until_quiet();
    assert_eq!(world.actors["x3"].owned, had);
    assert!(!world.actors.contains_key("x2"), "the old holder was told");
    let late = world.commit(Speaker::Member { id: "x2", epoch }, 0, 1).expect_err("fenced");
    assert_eq!(late.code(), ErrorCode::UnknownMember);

    world.leave("x3", true);
    world.beat("y1");
    world.run_until_quiet();
    world.pass(9_999);
    world.beat("y1");
    world.run_until_quiet();
    assert_eq!(world.actors["y1"].owned.len(), 2, "x3's wait for it");
    world.pass(1);
    world.run_until_quiet();
    assert_eq!(world.actors["y1"].owned.len(), 4);
}

#[test]
fn commits_need_the_members_epoch_and_administrators_an_empty_group() {
    let mut world = World::new(&[("a", 2)]);
    world.commit(Speaker::Administrator, 0, 5).expect("nobody is there");
    world.open("x", None, &["a"]).expect("joins");
    world.run_until_quiet();
    let code = |result: Result<(), GroupError>| result.expect_err("refused").code();
    assert_eq!(code(world.commit(Speaker::Administrator, 0, 6)), ErrorCode::GroupNotEmpty);
    assert_eq!(code(world.commit(Speaker::Member { id: "y", epoch: 1 }, 0, 6)), ErrorCode::UnknownMember);
    assert_eq!(code(world.commit(Speaker::Member { id: "x", epoch: 0 }, 0, 6)), ErrorCode::StaleMemberEpoch);
    assert_eq!(code(world.commit(Speaker::Member { id: "x", epoch: 2 }, 0, 6)), ErrorCode::FencedMemberEpoch);
    world.commit(Speaker::Member { id: "x", epoch: 1 }, 0, 7).expect("its epoch");
    assert_eq!(world.group.offset("a", 0).map(|committed| committed.offset), Some(7));
    assert_eq!(world.group.delete().expect_err("refused").code(), ErrorCode::GroupNotEmpty);
    assert_eq!(world.group.delete_offsets("a", &[]).expect_err("refused").code(), ErrorCode::GroupNotEmpty);
    world.leave("x", false);
    let effects = world.group.delete().expect("empty");
    world.perform(effects);
    assert!(world.group.is_forgotten());
    assert!(matches!(world.group.delete(), Err(GroupError::NotFound(_))));
    world.restart();
    assert!(world.group.is_forgotten(), "a restart brings nothing back");
}

#[test]
fn deleting_a_topic_removes_its_offsets_and_a_new_one_of_that_name_begins_without() {
    let mut world = World::new(&[("a", 2), ("b", 1)]);
    world.open("x", None, &["a", "b"]).expect("joins");
    world.run_until_quiet();
    world.commit(Speaker::Member { id: "x", epoch: 1 }, 1, 5).expect("commits");
    world.delete("a");
    world.run_until_quiet();
    assert!(world.group.offset("a", 1).is_none());
    assert_eq!(World::short(&world.actors["x"].owned), "b0");
    world.create("c", 1);
    world.grow("b", 1);
    world.run_until_quiet();
    assert_eq!(World::short(&world.actors["x"].owned), "b0 b1", "new partitions are assigned, other topics are not");
    world.restart();
    assert!(world.group.offset("a", 1).is_none());
}

#[test]
fn offsets_of_an_empty_group_expire_and_then_the_group() {
    let mut world = World::new(&[("a", 2)]);
    world.settings.offsets_retention_minutes = 1;
    world.open("x", None, &["a"]).expect("joins");
    world.run_until_quiet();
    world.commit(Speaker::Member { id: "x", epoch: 1 }, 0, 5).expect("commits");
    world.now.wall_ms += 600_000;
    assert_eq!(world.group.expire(world.now, &world.settings), [], "not while it has members");
    world.leave("x", false);
    world.now.wall_ms += 59_999;
    assert_eq!(world.group.expire(world.now, &world.settings), [], "counted from when it became empty");
    world.now.wall_ms += 1;
    let effects = world.group.expire(world.now, &world.settings);
    world.perform(effects);
    assert!(world.group.is_forgotten());
    world.restart();
    assert!(world.group.is_forgotten());
}

#[test]
fn members_choose_the_assignor_by_majority() {
    let mut world = World::new(&[("a", 4)]);
    for (id, assignor) in [("x", Assignor::Range), ("y", Assignor::Uniform), ("z", Assignor::Range)] {
        let topics = BTreeSet::from(["a".to_owned()]);
        let join = Join { member_id: id.into(), topics, assignor: Some(assignor), ..Join::default() };
        let effects = world.group.join(world.now, join, &world.metadata, &world.settings).expect("joins");
        drop(effects);
    }
    assert_eq!(world.group.assignor(), Assignor::Range);
    let loads: Vec<usize> = world.group.target.values().map(BTreeSet::len).collect();
    assert_eq!(loads, [2, 1, 1]);
}

#[test]
fn joins_that_make_no_sense_are_refused() {
    let mut world = World::new(&[("a", 1)]);
    let mut refused =
        |join: Join| world.group.join(world.now, join, &world.metadata, &world.settings).expect_err("refused").code();
    let join = Join { member_id: "x".into(), ..Join::default() };
    assert_eq!(refused(Join::default()), ErrorCode::InvalidRequest);
    assert_eq!(refused(Join { session_timeout_ms: 5, ..join.clone() }), ErrorCode::InvalidRequest);
    assert_eq!(refused(Join { member_epoch: 3, ..join.clone() }), ErrorCode::UnknownMember);
    assert_eq!(refused(Join { instance_id: Some("i".repeat(256)), ..join.clone() }), ErrorCode::InvalidRequest);
    world.settings.max_size = 0;
    let full = world.group.join(world.now, join, &world.metadata, &world.settings).expect_err("refused");
    assert_eq!(full.code(), ErrorCode::GroupFull);
    assert_eq!(world.group.epoch(), 0);
}
