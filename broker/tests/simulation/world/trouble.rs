//! What goes wrong: power failures with torn writes, of one broker or of all, killed processes, emptied and slow disks, pauses, cut links. And the end, where all of
//! it is mended and everything must come right.

use super::groups::{GROUP_VALUES, MEMBERS};
use super::*;
use crate::node::{Entry, NEVER_HANGS};

impl World {
    pub(super) fn trouble(&mut self) {
        if self.healing {
            return;
        }
        let next = self.random.between(50, 700);
        self.at(next, Event::Trouble);
        let id = self.random.between(1, self.nodes.len() as i64) as i32;
        match self.random.below(17) {
            0..3 => self.power_off(id),
            3 => self.kill(id),
            4 => self.empty(id, false),
            14 => self.empty(id, true),
            15..17 => self.lose_folder(id),
            5 => {
                // What waits already goes on waiting, so that nothing overtakes it.
                let until = (self.now + self.random.between(50, 1_500)).max(self.nodes[id as usize - 1].paused_until);
                let is_one_lost = self.nodes.iter().any(|node| node.lost);
                let node = self.node(id);
                node.paused_until = until;
                // Whoever stands still within a job has a disk that hung, when it goes on: where another one lost what it had, the
                // metadata cannot make that good.
                if let Some(process) = node.process.as_mut().filter(|_| is_one_lost) {
                    process.busy = process.busy.map(|_| NEVER_HANGS);
                }
                self.reached.paused = true;
                self.note(format_args!("{id} pauses until {until}"));
            }
            6 => self.slow = !self.slow,
            // What is flushed outlives a power failure of all of them at once; what is only received need not.
            13 if self.topic.durability == TopicDurability::Flushed => {
                self.reached.all_off = true;
                (1..=self.nodes.len() as i32).for_each(|id| self.power_off(id));
            }
            12 => {
                let until = self.now + self.random.between(200, 2_000);
                self.node(id).slow_disk_until = until;
                self.note(format_args!("{id} has a slow disk until {until}"));
            }
            7 => {
                self.cut_link(id, QUORUM);
                self.cut_link(QUORUM, id);
            }
            8 => self.cut_link(id, QUORUM),
            9 => self.cut_link(QUORUM, id),
            _ => {
                let mut ends: Vec<i32> = (1..=self.nodes.len() as i32).filter(|other| *other != id).collect();
                ends.extend([CLIENT, MEMBERS]);
                let Some(other) = self.random.pick(&ends) else { return };
                self.cut_link(id, other);
                if self.random.percent(60) {
                    self.cut_link(other, id);
                }
            }
        }
    }

    fn cut_link(&mut self, from: i32, to: i32) {
        // In some seeds a broker that the quorum does not reach lives on for long.
        let is_long = self.seed % 8 == 5 && (from == QUORUM || to == QUORUM);
        let lasts = self.random.between(50, if is_long { 5_000 } else { 2_000 });
        self.cut.insert((from, to));
        let is_cut_back = self.is_cut(to, from);
        self.reached.cut_both_ways |= is_cut_back;
        self.reached.cut_one_way |= !is_cut_back;
        self.note(format_args!("{from} to {to} cut for {lasts}"));
        self.at(lasts, Event::Heal(from, to));
    }

    /// Whether what is promised outlives the loss of this replica: an acknowledgement stands for min.insync.replicas copies, so
    /// that one fewer may be lost before the metadata hear of it, as long as another replica is known to have everything.
    fn may_lose(&self, id: i32) -> bool {
        if self.unclean {
            return true;
        }
        let Some(partition) = self.partition() else { return false };
        // A fence may be proposed late.
        let may_hang = |node: &Node| {
            self.now < node.slow_disk_until.max(node.paused_until) + 5_000 || partition.fenced.contains(&node.id)
        };
        let is_lost = |other: i32| {
            let node = &self.nodes[other as usize - 1];
            other == id || node.lost || may_hang(node)
        };
        let lost = partition.replicas.iter().filter(|other| is_lost(**other)).count();
        let mut whole = partition.isr.iter().chain(&partition.elr);
        lost < self.min_insync_replicas() as usize && whole.any(|other| !is_lost(*other))
    }

    fn end(&mut self, id: i32) {
        let proposals = self.proposals.get(&id).copied().unwrap_or(0);
        let sits = self.truth.controller().is_some_and(|(controller, _)| controller == id);
        self.reached.controller_lost |= sits && proposals > 0;
        self.node(id).process = None;
        let after = self.random.between(20, 2_500);
        self.at(after, Event::Start(id));
    }

    /// The process ends; what it wrote stays in the page cache.
    pub(super) fn kill(&mut self, id: i32) {
        if self.node(id).process.is_some() {
            self.note(format_args!("{id} is killed"));
            self.end(id);
            let node = self.node(id);
            node.files = node.files.restart();
        }
    }

    /// The power fails, perhaps within a write.
    pub(super) fn power_off(&mut self, id: i32) {
        // Replicas in memory are all that a replicated topic promises: the machine does not lose the last one.
        let loses = self.topic.durability == TopicDurability::Replicated;
        if self.node(id).process.is_none() || (loses && !self.may_lose(id)) {
            return;
        }
        self.note(format_args!("{id} loses its power"));
        if self.random.percent(50) {
            let (operations, now) = (self.random.below(6), self.now);
            let node = self.node(id);
            node.files.power_off_after(operations);
            if let Some(process) = &mut node.process {
                let batch = batch(Some(0), -1, &[(Some(vec![0]), u64::MAX - 8)], 300, now);
                let epoch = process.log.leader_epochs().latest().unwrap_or(0).max(0);
                // Nobody is told what becomes of these.
                let _ = process.log.append(&[batch], epoch, now);
                let _ = process.log.flush();
            }
            self.reached.torn_write = true;
        }
        self.end(id);
        let node = self.node(id);
        node.files = node.files.crash();
        node.rebooted = true;
        node.lost |= loses;
    }

    /// The broker comes back with an empty disk, or with an older copy of its own.
    fn empty(&mut self, id: i32, is_older: bool) {
        if self.node(id).process.is_none() || !self.may_lose(id) {
            return;
        }
        self.note(format_args!("{id} loses its disk"));
        self.end(id);
        self.reached.disk_emptied = true;
        self.reached.older_disk |= is_older;
        let known = self.truth.broker(id).map_or(0, |broker| broker.boots);
        let seed = self.random.next();
        let node = self.node(id);
        let disk = node.kept.disk;
        node.wipe(seed);
        if is_older {
            // From before its last start that the metadata know: what was copied later than that looks like the disk itself.
            (node.boots, node.kept.disk) = (Boots::counted(known.saturating_sub(1), None), disk);
        }
        node.lost = true;
    }

    /// The disk damages the partition, and nothing else. What became of it is seen while the broker runs, or at its next start.
    fn lose_folder(&mut self, id: i32) {
        if self.node(id).process.is_none() || !self.node(id).kept.has_replica || !self.may_lose(id) {
            return;
        }
        // The last one is never made anew.
        let has_folder = |other: &&Node| other.id != id && other.kept.has_replica && !other.lost_folder && !other.unfit;
        if self.unclean && !self.nodes.iter().any(|other| has_folder(&other)) {
            return;
        }
        self.node(id).lost = true;
        if self.random.percent(50) {
            self.node(id).unfit = true;
            self.node(id).process.as_mut().expect("it runs").is_restored = false;
            self.note(format_args!("{id} has a disk that fails"));
            let after = self.random.between(50, 800);
            return self.at(after, Event::LoseFolder(id));
        }
        self.folder_lost(id);
    }

    pub(super) fn folder_lost(&mut self, id: i32) {
        // Everything else may have become of it meanwhile.
        if !self.node(id).lost {
            return;
        }
        if !self.healing && self.random.percent(50) {
            return self.damaged(id);
        }
        self.note(format_args!("{id} loses the partition"));
        self.kill(id);
        let seed = self.random.next();
        self.node(id).wipe_folder(seed);
    }

    /// The disk damages the partition while the broker runs, which serves nothing of it any more, and says so.
    fn damaged(&mut self, id: i32) {
        let (seed, local, policy) = (self.random.next(), self.local(id), self.policy);
        let (is_slow, slow_for) = (self.random.percent(50), self.random.between(300, 2_500));
        let (slow_until, decided) = (self.now + slow_for, self.commands.len());
        let node = self.node(id);
        let Some(process) = node.process.as_mut().filter(|process| !process.is_unhealed) else { return };
        if process.busy.is_some() {
            // Once the job is back. No other one loses the last that there is meanwhile.
            node.unfit = true;
            return self.at(5, Event::LoseFolder(id));
        }
        (process.is_unhealed, process.is_damaged, process.is_restored, process.is_unknown) = (true, true, false, false);
        process.damaged_at = decided;
        (process.role, process.role_of) = (Role::Idle, (-1, -1, false));
        (process.coordinator, process.plan, process.compacted) = (None, None, None);
        process.connections.clear();
        process.requests.clear();
        process.mirror.clear();
        (process.high_watermark, process.checked, process.begins_at) = (0, 0, 0);
        (process.lineage, process.unclean_taken) = (0, 0);
        node.wipe_folder(seed);
        if is_slow {
            // It takes its time until it has everything again.
            node.slow_disk_until = slow_until;
        }
        let log = node.open(policy, local);
        if let Some(process) = &mut node.process {
            process.log = log;
        }
        self.reached.damaged = true;
        self.note(format_args!("{id} finds the partition damaged while it runs"));
        if self.random.percent(60) {
            self.rest(slow_for);
        }
    }

    /// Nothing comes from the producer for a while: what replicas had before is all that there is to have.
    pub(super) fn rest(&mut self, lasts: i64) {
        for id in 1..=self.nodes.len() as i32 {
            self.cut.insert((CLIENT, id));
            self.at(lasts, Event::Heal(CLIENT, id));
        }
        self.note(format_args!("the producer rests for {lasts}"));
    }

    /// All links work, all brokers start.
    pub(super) fn heal(&mut self) {
        self.note(format_args!("all is mended"));
        self.healing = true;
        for id in 1..=self.nodes.len() as i32 {
            if self.node(id).unfit {
                self.folder_lost(id);
            }
        }
        self.at_heal = (self.producer.next_value, self.members.commits);
        self.slow = false;
        self.cut.clear();
        for id in 1..=self.nodes.len() as i32 {
            self.start(id);
        }
    }

    /// Led, all replicas in sync, equal and read to their end, and everything that the producer sent is acknowledged.
    pub(super) fn is_healed(&mut self) -> bool {
        if !self.producer.is_idle()
            || self.producer.acknowledged <= self.at_heal.0
            || !self.reader.is_at_the_end(self.checks.committed(self.checks.unclean()).len())
        {
            return false;
        }
        let Some(partition) = self.partition() else { return false };
        let committed = self.checks.committed(partition.unclean_recoveries).len() as i64;
        let total = self.commands.len();
        let is_up = |node: &Node| {
            let broker = self.truth.broker(node.id);
            let process = node.process.as_ref().filter(|process| process.applied == total);
            process.is_some_and(|process| {
                broker.is_some_and(|broker| {
                    broker.state == BrokerState::Active && broker.incarnation == process.me.incarnation
                })
            })
        };
        let is_whole = |id: &i32| {
            let process = self.nodes[*id as usize - 1].process.as_ref();
            process
                .is_some_and(|process| process.high_watermark == committed && process.mirror.len() as i64 == committed)
        };
        partition.target.is_empty()
            && partition.leader >= 0
            && partition.isr.len() == partition.replicas.len()
            && partition.replicas.iter().all(is_whole)
            && self.nodes.iter().all(is_up)
            && self.is_group_settled()
    }

    pub(super) fn finish(self) -> Outcome {
        for node in &self.nodes {
            let process = node.process.as_ref().expect("every broker is up");
            let (read, holes) = process.read_all(self.checks.committed(process.lineage));
            assert_eq!(process.mirror, read, "broker {} reads something else", node.id);
            self.checks.compacted(node.id, &holes);
            assert_eq!(process.metadata, self.truth, "the metadata of broker {} differ", node.id);
        }
        let sent = self.producer.next_value;
        let committed = self.checks.committed(self.checks.unclean());
        let committed: Vec<Entry> = committed.iter().filter(|entry| entry.1 < GROUP_VALUES).copied().collect();
        // In order, each once: a record that was sent later never comes before. What an unclean election takes is gone.
        if self.checks.unclean() == 0 && !self.checks.has_sent_anew() {
            assert!(committed.windows(2).all(|pair| pair[0].1 < pair[1].1), "records changed places");
        }
        self.producer.compare(&committed.iter().map(|entry| entry.1).collect(), self.checks.unclean() > 0);
        assert!(sent > 0, "seed {}: nothing was sent", self.seed);
        let elections = self.partition().map_or(0, |partition| partition.leader_epoch);
        Outcome { trace: self.trace, committed: committed.len(), elections, reached: self.reached }
    }
}
