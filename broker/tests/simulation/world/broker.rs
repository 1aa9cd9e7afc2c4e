//! What a broker does: it drives the machines as the product's drivers will, on its log.

use super::*;

/// What is left of a generation once it is told which log of the replica it belongs to.
const CUTS_BITS: u32 = 32;

impl World {
    /// A broker starts on its disk, recovers its log, and registers until the metadata know it.
    pub(super) fn start(&mut self, id: i32) {
        if self.node(id).process.is_some() {
            return;
        }
        let now = self.now;
        let me = Member { broker: id, incarnation: self.random.uuid() };
        let new_disk = self.random.next();
        let durable = self.topic.durability == TopicDurability::Flushed;
        let node = &mut self.nodes[id as usize - 1];
        let local = node.local(now);
        // What lies there is looked at once it is known what is assigned to the broker.
        let assigned = self.truth.topic_by_id(&TOPIC).and_then(|topic| topic.partitions.first());
        let is_assigned = assigned.is_some_and(|partition| partition.replicas.contains(&id));
        let is_left = is_of_another_topic(Some(node.folder_of), TOPIC);
        if is_left || (node.folder_of != TOPIC && !is_assigned) {
            node.set_folder_aside(new_disk);
            self.reached.folder_left |= is_assigned;
        }
        let is_unhealed = node.lost_folder && node.kept.has_replica;
        if !is_unhealed {
            node.begin_folder();
        }
        let log = node.open(self.policy, local);
        let end = log.log_end_offset();
        if !is_unhealed {
            assert!(
                node.lost || !durable || end >= node.kept.flushed,
                "broker {id} flushed up to {} and has {end}",
                node.kept.flushed
            );
            node.kept.claims_loss |= node.kept.has_replica && (end < node.kept.flushed || (node.rebooted && !durable));
            // Recovery syncs what it keeps.
            node.kept.flushed = end;
        }
        let claims_loss = node.kept.claims_loss || is_unhealed;
        node.was_flushed = node.was_flushed.max(end);
        let mut process = Process {
            me,
            log,
            mirror: Vec::new(),
            begins_at: 0,
            coordinator: None,
            handed_until: 0,
            configured: None,
            is_configuring: false,
            metadata: MetadataState::new("simulated"),
            is_unhealed,
            is_damaged: false,
            damaged_at: 0,
            times_anew: 0,
            is_unknown: false,
            claims_loss,
            applied: 0,
            apply_pending: false,
            registered_at: i64::MIN / 2,
            role: Role::Idle,
            role_of: (-1, -1, false),
            busy: None,
            is_restored: false,
            high_watermark: node.kept.high_watermark.min(end),
            generation: 0,
            contact_ms: i64::MIN / 2,
            lineage: if is_unhealed { 0 } else { node.kept.lineage },
            unclean_taken: if is_unhealed { 0 } else { node.kept.unclean_taken },
            role_lineage: node.kept.unclean_taken,
            checked: 0,
            sessions: Sessions::new(SESSION_MS as u64, local as u64),
            asked: BTreeMap::new(),
            ticked_ms: local,
            plan: None,
            compacted: None,
            connections: BTreeMap::new(),
            opening: BTreeMap::new(),
            requests: BTreeMap::new(),
        };
        process.mirror = process.read_all(self.checks.committed(process.lineage)).0;
        node.process = Some(process);
        self.note(format_args!("{id} starts as {} with {end}", me.incarnation));
        let after = self.random.between(0, TICK_MS);
        self.at(after, Event::Tick(id, me));
        self.apply_later(id);
    }

    pub(super) fn tick(&mut self, id: i32, member: Member) {
        let (now, is_connected) = (self.now, !self.is_cut(id, QUORUM) && !self.is_cut(QUORUM, id));
        let local = self.local(id);
        let (chore, says) = (self.chore(), self.node(id).says(now));
        let Some(process) = self.process(id, member) else { return };
        if is_connected {
            process.contact_ms = local;
        }
        if local - process.ticked_ms > STOOD_STILL_MS {
            process.sessions.could_not_hear(local as u64);
        }
        process.ticked_ms = local;
        process.sessions.hear(local as u64, id, member.incarnation, says.clone(), &process.metadata);
        let stale_stream = matches!(&process.role, Role::Follower { heard_ms, .. } if now - heard_ms > PATIENCE_MS);
        if let Role::Leader { state, .. } = &mut process.role {
            state.replicas(|leader| leader.tick(local));
        }
        if stale_stream && process.busy.is_none() {
            let history = process.history();
            if let Role::Follower { state, jobs, heard_ms, .. } = &mut process.role {
                jobs.retain(|job| matches!(job, FollowerJob::Cut(..) | FollowerJob::Restart(..)));
                *heard_ms = now;
                state.reconnect(history);
            }
        }
        let (flushed, high_watermark) = (process.log.flushed_offset(), process.high_watermark);
        let unflushed = flushed < process.log.log_end_offset();
        if let Role::Follower { state, jobs, .. } = &mut process.role
            && unflushed
            && jobs.is_empty()
        {
            jobs.push_back(FollowerJob::Flush(state.tenure()));
        }
        if let Some(chore) = chore {
            process.begin_chore(chore);
        }
        let (lineage, unclean_taken, is_unhealed) = (process.lineage, process.unclean_taken, process.is_unhealed);
        if !is_unhealed {
            let kept = &mut self.node(id).kept;
            (kept.flushed, kept.high_watermark) = (flushed, high_watermark);
            (kept.lineage, kept.unclean_taken) = (lineage, unclean_taken);
        }
        self.register(id, member);
        for other in 1..=self.nodes.len() as i32 {
            if other != id && !self.is_cut(id, other) && !self.random.percent(2) {
                let delay = self.delay();
                let message = Message::Heartbeat(member, says.clone());
                self.at(delay, Event::Deliver(Box::new(Envelope { from: id, to: other, connection: None, message })));
            }
        }
        self.control(id, member);
        let interval = TICK_MS * 1000 / self.node(id).clock.0;
        self.at(interval, Event::Tick(id, member));
    }

    /// Tells a leader of its lease before it does anything: it may have stood still, and the lease is over.
    pub(super) fn look_at_lease(&mut self, id: i32) {
        let local = self.local(id);
        let Some(process) = &mut self.node(id).process else { return };
        let has_lease = local - process.contact_ms < LEASE_MS;
        if let Role::Leader { state, .. } = &mut process.role
            && state.leader().has_lease() != has_lease
        {
            state.replicas(|leader| leader.lease(has_lease, local));
        }
    }

    fn register(&mut self, id: i32, member: Member) {
        let local = self.local(id);
        let disk = self.node(id).kept.disk;
        let directory_id = disk.to_string();
        let Some(process) = self.process(id, member) else { return };
        let (known, claims_loss) = (process.metadata.broker(id).cloned(), process.claims_loss);
        if known.as_ref().is_some_and(|known| known.incarnation == member.incarnation) {
            let counted = known.map_or(0, |known| known.boots);
            let is_damaged = process.is_damaged;
            let node = self.node(id);
            (node.boots, node.kept.claims_loss) = (Boots::counted(counted, None), false);
            (node.lost, node.rebooted) = (node.unfit || is_damaged, false);
            return;
        }
        if local - process.registered_at < PATIENCE_MS {
            return;
        }
        process.registered_at = local;
        let boots = self.node(id).boots.begin(member.incarnation, known.as_ref());
        let lost = match claims_loss {
            true => vec![command::TopicPartition { topic_id: TOPIC.to_wire(), partition: 0 }],
            false => Vec::new(),
        };
        let register = command::RegisterBroker {
            broker_id: id,
            incarnation: wire(member.incarnation),
            boots,
            directory_id,
            lost,
            replaces: known.map_or(0, |known| known.epoch),
            feature_level: FEATURE_LEVEL,
            ..command::RegisterBroker::default()
        };
        self.propose(id, Kind::RegisterBroker(register).into(), None);
    }

    /// The controller fences who is not heard of, and unfences who is.
    fn control(&mut self, id: i32, member: Member) {
        let local = self.local(id);
        let Some(process) = self.process(id, member) else { return };
        if process.metadata.controller() != Some((id, member.incarnation)) {
            return;
        }
        let epoch = process.metadata.controller_epoch();
        let mut commands = Vec::new();
        for decision in process.sessions.decide(local as u64, &process.metadata) {
            let (broker_id, kind) = match decision {
                Decision::Fence { broker_id, incarnation } => {
                    let incarnation = wire(incarnation);
                    (broker_id, Kind::FenceBroker(command::FenceBroker { broker_id, incarnation }))
                }
                Decision::FenceReplicas { broker_id, incarnation, replicas } => {
                    let incarnation = wire(incarnation);
                    (broker_id, Kind::FenceReplicas(command::FenceReplicas { broker_id, incarnation, replicas }))
                }
                Decision::RestoreReplicas { broker_id, incarnation, replicas } => {
                    let incarnation = wire(incarnation);
                    (broker_id, Kind::RestoreReplicas(command::RestoreReplicas { broker_id, incarnation, replicas }))
                }
                Decision::Unfence { broker_id, incarnation } => {
                    let incarnation = wire(incarnation);
                    (broker_id, Kind::UnfenceBroker(command::UnfenceBroker { broker_id, incarnation }))
                }
            };
            if process.asked.get(&broker_id).is_none_or(|asked| local - asked > PATIENCE_MS) {
                process.asked.insert(broker_id, local);
                commands.push(command::Command { controller_epoch: epoch, ..kind.into() });
            }
        }
        for command in commands {
            self.propose(id, command, None);
        }
    }

    /// The settings that came last. They come on a way of their own, and may be older than what else the metadata say.
    fn settings(&mut self, id: i32) -> TopicConfig {
        let mut settings = self.topic.clone();
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return settings };
        let Some(topic) = process.metadata.topic_by_id(&TOPIC) else { return settings };
        let newest = topic.min_insync_replicas();
        let known = *process.configured.get_or_insert(newest);
        if known != newest && !process.is_configuring {
            process.is_configuring = self.random.percent(30);
            if process.is_configuring {
                let (member, after) = (process.me, self.random.between(1, 500));
                self.at(after, Event::Configure(id, member));
            } else {
                process.configured = Some(newest);
            }
        }
        let configured = self.nodes[id as usize - 1].process.as_ref().and_then(|process| process.configured);
        settings.min_insync_replicas = configured.unwrap_or(newest);
        settings
    }

    pub(super) fn configured(&mut self, id: i32, member: Member) {
        let Some(process) = self.process(id, member) else { return };
        let newest = process.metadata.topic_by_id(&TOPIC).map(|topic| topic.min_insync_replicas());
        (process.configured, process.is_configuring) = (newest, false);
        self.learned(id);
    }

    /// The metadata are newer.
    pub(super) fn learned(&mut self, id: i32) {
        let local = self.local(id);
        let settings = self.settings(id);
        let Some(process) = &mut self.node(id).process else { return };
        let Some(topic) = process.metadata.topic_by_id(&TOPIC) else { return };
        let Some(partition) = topic.partitions.first() else { return };
        let view = View::of(&process.metadata, topic, partition);
        let is_over = process.role_of != (partition.leader, partition.leader_epoch, partition.replicas.contains(&id));
        match &mut process.role {
            Role::Idle => {}
            // It leads on, in a later epoch.
            Role::Leader { state, .. } if is_over && view.leader == Some(process.me) && !state.leader().is_ended() => {}
            Role::Leader { state, .. } => {
                state.configure(&settings, local);
                state.replicas(|leader| leader.view(&view, local));
            }
            Role::Follower { state, .. } if is_over => state.end(),
            Role::Follower { .. } => {}
        }
    }

    /// Does what the machines of a broker decided, and gives the log its next job.
    pub(super) fn proceed(&mut self, id: i32) {
        let node = self.node(id);
        if let Some(process) = &node.process {
            // A segment that is rolled is flushed too.
            node.was_flushed = node.was_flushed.max(process.log.flushed_offset());
        }
        // What was decided in a role is done before another is taken.
        self.perform(id);
        self.adopt(id);
        self.perform(id);
        self.begin_job(id);
        self.perform(id);
        self.push(id);
        self.look(id);
        self.coordinate(id);
    }

    /// Looks at what readers of a broker may see.
    fn look(&mut self, id: i32) {
        if self.checks.visible(&mut self.nodes[id as usize - 1]) {
            self.check_in_sync();
        }
    }

    /// Takes the role that the metadata give, once no job is on its way.
    fn adopt(&mut self, id: i32) {
        let now = self.now;
        let local = self.local(id);
        let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
        let Some(topic) = process.metadata.topic_by_id(&TOPIC) else { return };
        let Some(partition) = topic.partitions.first().cloned() else { return };
        let mut settings = self.topic.clone();
        settings.min_insync_replicas = process.configured.unwrap_or_else(|| topic.min_insync_replicas());
        let view = View::of(&process.metadata, topic, &partition);
        let role_of = (partition.leader, partition.leader_epoch, partition.replicas.contains(&id));
        let registered = process.metadata.broker(id).map(|broker| broker.incarnation);
        if process.is_unhealed && partition.replicas.contains(&id) {
            if !view.heals(process.me) {
                return;
            }
            let is_behind = process.applied < process.damaged_at;
            if process.is_damaged && (is_behind || !partition.may_begin_anew(id)) {
                return;
            }
            (process.is_unhealed, process.is_damaged, process.is_unknown) = (false, false, true);
            process.times_anew += 1;
            process.generation = process.times_anew << CUTS_BITS;
            self.node(id).begin_folder();
            self.reached.healed = true;
            self.note(format_args!("{id} makes its replica anew"));
            return self.adopt(id);
        }
        if process.busy.is_some() || role_of == process.role_of || registered != Some(process.me.incarnation) {
            return;
        }
        // A later registration of this broker counts only once it is known: until then it may be another's leadership.
        (process.role_of, process.role_lineage) = (role_of, partition.unclean_recoveries);
        let (me, log_end) = (process.me, process.log.log_end_offset());
        let (read, holes) = process.read_all(self.checks.committed(process.lineage));
        assert_eq!(process.mirror, read, "broker {id} reads something else than it wrote");
        self.checks.compacted(id, &holes);
        if let Role::Leader { state, streams } = &mut process.role
            && partition.leader == id
            && !state.leader().is_ended()
        {
            process.log.assign_leader_epoch(partition.leader_epoch);
            streams.clear();
            state.configure(&settings, local);
            state.lead(view, local);
            (process.lineage, process.unclean_taken) = (partition.unclean_recoveries, partition.unclean_recoveries);
            let mirror = process.mirror.clone();
            self.reached.led_on = true;
            self.checks.leads(partition.leader_epoch, partition.unclean_recoveries, me, &mirror);
            return self.note(format_args!("{id} leads on as {role_of:?} with {log_end}"));
        }
        process.connections.clear();
        process.opening.clear();
        process.requests.clear();
        if partition.leader == id {
            if partition.unclean_recoveries != process.lineage {
                // What it shows its readers may not be flushed: nobody asked it to be in sync.
                process.log.flush().expect("a flush");
            }
            process.log.assign_leader_epoch(partition.leader_epoch);
            let offsets = Offsets {
                log_start: process.log.log_start_offset(),
                high_watermark: process.high_watermark.clamp(process.log.log_start_offset(), log_end),
                log_end,
                flushed: process.log.flushed_offset(),
            };
            let limits = Limits { group_bytes: 500, unflushed_bytes: 2_000, replica_lag_time_max_ms: LAG_MS };
            let state = PartitionState::new(me, &view, true, &settings, limits, offsets, local);
            process.high_watermark = state.offsets().high_watermark;
            process.role = Role::Leader { state: Box::new(state), streams: BTreeMap::new() };
            (process.lineage, process.unclean_taken) = (partition.unclean_recoveries, partition.unclean_recoveries);
            process.checked = 0;
            let mirror = process.mirror.clone();
            self.node(id).kept.has_replica = true;
            self.checks.leads(partition.leader_epoch, partition.unclean_recoveries, me, &mirror);
        } else if partition.leader >= 0 && partition.replicas.contains(&id) {
            let replica = Replica {
                member: me,
                history: process.history(),
                flushed: process.log.flushed_offset(),
                high_watermark: process.high_watermark,
                generation: process.generation,
                unclean_taken: process.unclean_taken,
            };
            let mut state = FollowerState::follow(partition.leader_epoch, replica, partition.unclean_recoveries);
            // What was compacted away before the first batch is not there either.
            state.start_kept(process.log.log_start_offset().max(process.history().log_start()));
            process.role = Role::Follower { state, stream: 0, heard_ms: now, jobs: VecDeque::new() };
            self.node(id).kept.has_replica = true;
        } else {
            process.role = Role::Idle;
            process.is_restored |= std::mem::take(&mut process.is_unknown);
            if !partition.replicas.contains(&id) {
                self.set_aside(id);
            }
        }
        self.note(format_args!("{id} takes role {role_of:?} with {log_end}"));
    }

    /// The metadata do not assign the replica any more: whatever comes later begins with nothing.
    fn set_aside(&mut self, id: i32) {
        let local = self.local(id);
        let node = self.node(id);
        node.lost_folder = false;
        let Some(process) = &mut node.process else { return };
        process.is_restored |= std::mem::take(&mut process.is_unhealed);
        process.is_damaged = false;
        process.log.truncate_and_restart_at(0, local).expect("an empty log");
        process.mirror.clear();
        process.begins_at = 0;
        process.generation = process.times_anew << CUTS_BITS;
        (process.high_watermark, process.checked) = (0, 0);
        (process.lineage, process.unclean_taken) = (0, 0);
        node.kept = Kept { disk: node.kept.disk, ..Kept::default() };
        // What it flushed is still there, but for the metadata.
        self.note(format_args!("{id} sets its replica aside"));
    }

    fn perform(&mut self, id: i32) {
        loop {
            let Some(process) = &mut self.node(id).process else { return };
            let leader = process.role_of.0;
            match &mut process.role {
                Role::Idle => return,
                Role::Leader { state, .. } => {
                    let effects = state.take_effects();
                    if effects.is_empty() {
                        return;
                    }
                    effects.into_iter().for_each(|effect| self.perform_leader(id, effect));
                }
                Role::Follower { state, .. } => {
                    let effects = state.take_effects();
                    if effects.is_empty() {
                        return;
                    }
                    effects.into_iter().for_each(|effect| self.perform_follower(id, leader, effect));
                }
            }
        }
    }

    fn perform_leader(&mut self, id: i32, effect: LeaderEffect<RequestId>) {
        match effect {
            LeaderEffect::Publish(offsets) => {
                if let Some(process) = &mut self.node(id).process {
                    assert!(offsets.high_watermark >= process.high_watermark, "the high watermark falls");
                    process.high_watermark = offsets.high_watermark;
                }
                self.look(id);
            }
            LeaderEffect::Propose(alter) => {
                self.note(format_args!("{id} asks for {:?}", alter.isr));
                let epoch = alter.partition_epoch;
                self.propose(id, alter_partition(alter), Some(epoch));
            }
            LeaderEffect::Answer(request, result) => self.answer(id, request, result),
        }
    }

    fn perform_follower(&mut self, id: i32, leader: i32, effect: follower::Effect) {
        let now = self.now;
        match effect {
            follower::Effect::Hello(hello) => {
                self.next_stream += 1;
                let id_of_stream = self.next_stream;
                if let Some(Process { role: Role::Follower { stream, heard_ms, .. }, .. }) = &mut self.node(id).process
                {
                    (*stream, *heard_ms) = (id_of_stream, now);
                }
                self.send(id, leader, id_of_stream, Message::Hello(id_of_stream, hello));
            }
            follower::Effect::Cut { to } => self.cut_log(id, |tenure| FollowerJob::Cut(tenure, to)),
            follower::Effect::Restart { at } => self.cut_log(id, |tenure| FollowerJob::Restart(tenure, at)),
            follower::Effect::Report(report) => {
                let Some(Process { role: Role::Follower { stream, .. }, .. }) = &self.node(id).process else { return };
                let stream = *stream;
                self.send(id, leader, stream, Message::Report(report));
            }
            follower::Effect::HighWatermark(to) => {
                if let Some(process) = &mut self.node(id).process {
                    process.high_watermark = to;
                }
            }
            follower::Effect::LogStart(to) => {
                if let Some(process) = &mut self.node(id).process {
                    process.begins_at = to;
                }
            }
            follower::Effect::Fence(why) => panic!("broker {id} is fenced: {why}"),
        }
    }

    fn cut_log(&mut self, id: i32, job: impl FnOnce(Tenure) -> FollowerJob) {
        let Some(Process { role: Role::Follower { state, jobs, .. }, .. }) = &mut self.node(id).process else { return };
        let job = job(state.tenure());
        jobs.clear();
        jobs.push_back(job);
    }

    // Streams.

    pub(super) fn hello(&mut self, id: i32, from: i32, stream: u64, hello: Hello) {
        let local = self.local(id);
        let Some(process) = &mut self.node(id).process else { return };
        let history = process.history();
        let Role::Leader { state, .. } = &mut process.role else { return };
        // Whoever is refused says hello again when nobody answers.
        let Ok(verdict) = state.replicas(|leader| leader.hello(&hello, &history, local)) else { return };
        let tenure = hello.tenure;
        self.note(format_args!("{id} is told {hello:?} on {stream}: {verdict:?}"));
        let Some(Process { role: Role::Leader { streams, .. }, .. }) = &mut self.node(id).process else { return };
        if verdict == Verdict::Agrees {
            streams.insert(from, Stream { id: stream, tenure, next: hello.history.log_end(), told: -1 });
        }
        self.send(id, from, stream, Message::Verdict(stream, tenure, verdict));
    }

    pub(super) fn verdict(&mut self, id: i32, on: u64, tenure: Tenure, verdict: Verdict) {
        let now = self.now;
        let Some(Process { role: Role::Follower { state, stream, heard_ms, .. }, .. }) = &mut self.node(id).process
        else {
            return;
        };
        if *stream == on {
            *heard_ms = now;
            state.verdict(tenure, verdict);
            let (taken, watermark, agrees) = (state.unclean_taken(), state.high_watermark(), state.is_following());
            let Some(process) = &mut self.nodes[id as usize - 1].process else { return };
            process.is_restored |= agrees && std::mem::take(&mut process.is_unknown);
            let is_newer = std::mem::replace(&mut process.unclean_taken, taken) != taken;
            if is_newer && taken != process.lineage {
                // What lies before the log stands for what the leader deleted.
                let begin = process.log.log_start_offset();
                if let Some(deleted) = self.checks.committed(taken).get(..begin as usize) {
                    process.mirror[..begin as usize].copy_from_slice(deleted);
                }
                (process.lineage, process.checked, process.high_watermark) = (taken, 0, watermark);
            }
        }
    }

    /// Pushes to followers what they lack, or a sign of life.
    fn push(&mut self, id: i32) {
        let now = self.now;
        let (mut pushes, mut ended) = (Vec::new(), Vec::new());
        let Some(process) = &self.node(id).process else { return };
        let Role::Leader { state, streams } = &process.role else { return };
        if state.leader().is_ended() {
            return;
        }
        let (end, high_watermark) = (process.log.log_end_offset(), process.high_watermark);
        let log_start = process.log.log_start_offset();
        for (to, stream) in streams {
            let is_due = stream.next < end || high_watermark > stream.told || now % 100 == 0;
            if !is_due {
                continue;
            }
            let is_there = || stream.next >= log_start.min(end) || stream.next >= process.history().log_start();
            if stream.next < end && !is_there() {
                // Records that it lacks are deleted by now: it is told so when it says hello again.
                ended.push((*to, stream.id));
                continue;
            }
            let batches = if stream.next < end { process.batches_from(stream.next) } else { Vec::new() };
            let spans = batches.iter().map(|batch| BatchSpan {
                base_offset: batch.header.base_offset,
                next_offset: batch.header.next_offset(),
                leader_epoch: batch.header.leader_epoch,
            });
            let (from, tenure) = (stream.next, stream.tenure);
            let push = Push { tenure, from, batches: spans.collect(), high_watermark, log_start };
            pushes.push((*to, stream.id, push, batches));
        }
        for (to, stream) in ended {
            self.broken.insert(stream);
            if let Some(Process { role: Role::Leader { streams, .. }, .. }) = &mut self.node(id).process {
                streams.remove(&to);
            }
        }
        for (to, stream, push, batches) in pushes {
            if let Some(Process { role: Role::Leader { streams, .. }, .. }) = &mut self.node(id).process
                && let Some(stream) = streams.get_mut(&to)
            {
                stream.next = push.batches.last().map_or(stream.next, |batch| batch.next_offset);
                stream.told = push.high_watermark;
            }
            self.send(id, to, stream, Message::Push(stream, push, batches));
        }
    }

    pub(super) fn pushed(&mut self, id: i32, on: u64, push: Push, batches: Vec<NewBatch>) {
        let now = self.now;
        self.note(format_args!("{id} is pushed {} batches from {} on {on}", batches.len(), push.from));
        let Some(Process { role: Role::Follower { state, stream, heard_ms, jobs }, .. }) = &mut self.node(id).process
        else {
            return;
        };
        if *stream != on {
            return;
        }
        *heard_ms = now;
        // Streams are in order here, so that the leader would have to be at fault.
        match state.push(&push).expect("batches without a hole") {
            Take::Append(tenure) => jobs.push_back(FollowerJob::Append(tenure, batches)),
            Take::Nothing => {}
        }
    }
}

fn alter_partition(alter: AlterPartition) -> command::Command {
    let member = |member: &Member| command::Member { broker_id: member.broker, incarnation: wire(member.incarnation) };
    let partition = command::AlterPartition {
        topic_id: TOPIC.to_wire(),
        partition: 0,
        leader: Some(member(&alter.leader)),
        leader_epoch: alter.leader_epoch,
        partition_epoch: alter.partition_epoch,
        isr: alter.isr.iter().map(member).collect(),
    };
    Kind::AlterPartitions(command::AlterPartitions { partitions: vec![partition] }).into()
}
