//! What a broker does: it drives the machines as the product's drivers will, on its log.

use super::*;

impl World {
    /// A broker starts on its disk, recovers its log, and registers until the metadata know it.
    pub(super) fn start(&mut self, id: i32) {
        if self.node(id).process.is_some() {
            return;
        }
        let now = self.now;
        let me = Member { broker: id, incarnation: self.random.uuid() };
        let durable = self.topic.durability == TopicDurability::Flushed;
        let node = self.node(id);
        node.kept.boots += 1;
        let log = node.open(node.local(now));
        let end = log.log_end_offset();
        assert!(
            node.lost || !durable || end >= node.kept.flushed,
            "broker {id} flushed up to {} and has {end}",
            node.kept.flushed
        );
        let claims_loss = node.kept.has_replica && (end < node.kept.flushed || (node.rebooted && !durable));
        // Recovery syncs what it keeps.
        node.kept.flushed = end;
        node.was_flushed = node.was_flushed.max(end);
        let mut process = Process {
            me,
            log,
            mirror: Vec::new(),
            metadata: MetadataState::new("simulated"),
            applied: 0,
            apply_pending: false,
            claims_loss,
            registered_at: i64::MIN / 2,
            role: Role::Idle,
            role_of: (-1, -1, false),
            busy: false,
            high_watermark: node.kept.high_watermark.min(end),
            generation: 0,
            contact_ms: i64::MIN / 2,
            lineage: node.kept.unclean_taken,
            checked: 0,
            heard: BTreeMap::new(),
            asked: BTreeMap::new(),
            in_office_since: None,
            connections: BTreeMap::new(),
            requests: BTreeMap::new(),
        };
        process.mirror = process.read_all();
        node.process = Some(process);
        self.note(format_args!("{id} starts as {} with {end}", me.incarnation));
        let after = self.random.between(0, TICK_MS);
        self.at(after, Event::Tick(id, me));
        self.apply_later(id);
    }

    pub(super) fn tick(&mut self, id: i32, member: Member) {
        let (now, is_connected) = (self.now, !self.is_cut(id, QUORUM) && !self.is_cut(QUORUM, id));
        let local = self.local(id);
        let Some(process) = self.process(id, member) else { return };
        if is_connected {
            process.contact_ms = now;
        }
        let has_lease = now - process.contact_ms < LEASE_MS;
        let stale_stream = matches!(&process.role, Role::Follower { heard_ms, .. } if now - heard_ms > PATIENCE_MS);
        if let Role::Leader { state, .. } = &mut process.role {
            if state.leader().has_lease() != has_lease {
                state.replicas(|leader| leader.lease(has_lease, local));
            }
            state.replicas(|leader| leader.tick(local));
        }
        if stale_stream && !process.busy {
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
        let unclean_taken = process.lineage;
        let kept = &mut self.node(id).kept;
        (kept.flushed, kept.high_watermark, kept.unclean_taken) = (flushed, high_watermark, unclean_taken);
        self.register(id, member);
        for other in 1..=self.nodes.len() as i32 {
            if other != id && !self.is_cut(id, other) && !self.random.percent(2) {
                let delay = self.delay();
                let message = Message::Heartbeat(member);
                self.at(delay, Event::Deliver(Box::new(Envelope { from: id, to: other, connection: None, message })));
            }
        }
        self.control(id, member);
        let interval = TICK_MS * 1000 / self.node(id).clock.0;
        self.at(interval, Event::Tick(id, member));
    }

    fn register(&mut self, id: i32, member: Member) {
        let now = self.now;
        let boots = self.node(id).kept.boots;
        let directory_id = self.node(id).kept.disk.to_string();
        let Some(process) = self.process(id, member) else { return };
        let known = process.metadata.broker(id).cloned();
        if known.as_ref().is_some_and(|known| known.incarnation == member.incarnation) {
            let counted = known.map_or(boots, |known| known.boots);
            self.node(id).kept.boots = counted;
            self.node(id).lost = false;
            self.node(id).rebooted = false;
            return;
        }
        if now - process.registered_at < PATIENCE_MS {
            return;
        }
        process.registered_at = now;
        let lost = match process.claims_loss {
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
            ..command::RegisterBroker::default()
        };
        self.propose(id, Kind::RegisterBroker(register).into(), None);
    }

    /// The controller fences who is not heard of, and unfences who is.
    fn control(&mut self, id: i32, member: Member) {
        let now = self.now;
        let mut commands = Vec::new();
        let Some(process) = self.process(id, member) else { return };
        let epoch = process.metadata.controller_epoch();
        if process.metadata.controller() != Some((id, member.incarnation)) {
            process.in_office_since = None;
            return;
        }
        let since = match process.in_office_since {
            Some((known, since)) if known == epoch => since,
            _ => {
                process.in_office_since = Some((epoch, now));
                now
            }
        };
        for broker in process.metadata.brokers() {
            let registered = Member { broker: broker.id, incarnation: broker.incarnation };
            let heard = match process.heard.get(&broker.id) {
                Some((heard, at)) if *heard == registered => *at,
                _ => i64::MIN / 2,
            };
            let is_fresh = broker.id == id || now - heard < 200;
            let is_dead = broker.id != id && now - heard.max(since) > SESSION_MS;
            let (broker_id, incarnation) = (broker.id, wire(broker.incarnation));
            let kind = match broker.state {
                BrokerState::Active if is_dead => Kind::FenceBroker(command::FenceBroker { broker_id, incarnation }),
                BrokerState::Fenced if is_fresh => {
                    Kind::UnfenceBroker(command::UnfenceBroker { broker_id, incarnation })
                }
                _ => continue,
            };
            if process.asked.get(&broker_id).is_none_or(|asked| now - asked > PATIENCE_MS) {
                process.asked.insert(broker_id, now);
                commands.push(command::Command { controller_epoch: epoch, ..kind.into() });
            }
        }
        for command in commands {
            self.propose(id, command, None);
        }
    }

    /// The metadata are newer.
    pub(super) fn learned(&mut self, id: i32) {
        let local = self.local(id);
        let mut settings = self.topic.clone();
        let Some(process) = &mut self.node(id).process else { return };
        let Some(topic) = process.metadata.topic_by_id(&TOPIC) else { return };
        let Some(partition) = topic.partitions.first() else { return };
        settings.min_insync_replicas = topic.min_insync_replicas();
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
        let mut settings = self.topic.clone();
        let local = self.local(id);
        let Some(process) = &mut self.node(id).process else { return };
        let Some(topic) = process.metadata.topic_by_id(&TOPIC) else { return };
        let Some(partition) = topic.partitions.first().cloned() else { return };
        settings.min_insync_replicas = topic.min_insync_replicas();
        let view = View::of(&process.metadata, topic, &partition);
        let role_of = (partition.leader, partition.leader_epoch, partition.replicas.contains(&id));
        let registered = process.metadata.broker(id).map(|broker| broker.incarnation);
        if process.busy || role_of == process.role_of || registered != Some(process.me.incarnation) {
            return;
        }
        // A later registration of this broker counts only once it is known: until then it may be another's leadership.
        process.role_of = role_of;
        let (me, log_end) = (process.me, process.log.log_end_offset());
        assert_eq!(process.mirror, process.read_all(), "broker {id} reads something else than it wrote");
        if let Role::Leader { state, streams } = &mut process.role
            && partition.leader == id
            && !state.leader().is_ended()
        {
            process.log.assign_leader_epoch(partition.leader_epoch);
            streams.clear();
            state.configure(&settings, local);
            state.lead(view, local);
            process.lineage = partition.unclean_recoveries;
            let mirror = process.mirror.clone();
            self.reached.led_on = true;
            self.checks.leads(partition.leader_epoch, partition.unclean_recoveries, me, &mirror);
            return self.note(format_args!("{id} leads on as {role_of:?} with {log_end}"));
        }
        process.connections.clear();
        process.requests.clear();
        if partition.leader == id {
            if partition.unclean_recoveries != process.lineage {
                // What it shows its readers may not be flushed: nobody asked it to be in sync.
                process.log.flush().expect("a flush");
            }
            process.log.assign_leader_epoch(partition.leader_epoch);
            let offsets = Offsets {
                log_start: 0,
                high_watermark: process.high_watermark.min(log_end),
                log_end,
                flushed: process.log.flushed_offset(),
            };
            let limits = Limits { group_bytes: 500, unflushed_bytes: 2_000, replica_lag_time_max_ms: LAG_MS };
            let state = PartitionState::new(me, &view, true, &settings, limits, offsets, local);
            process.high_watermark = state.offsets().high_watermark;
            process.role = Role::Leader { state: Box::new(state), streams: BTreeMap::new() };
            (process.lineage, process.checked) = (partition.unclean_recoveries, 0);
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
                unclean_taken: process.lineage,
            };
            let state = FollowerState::follow(partition.leader_epoch, replica, partition.unclean_recoveries);
            process.role = Role::Follower { state, stream: 0, heard_ms: now, jobs: VecDeque::new() };
            self.node(id).kept.has_replica = true;
        } else {
            process.role = Role::Idle;
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
        let Some(process) = &mut node.process else { return };
        process.log.truncate_and_restart_at(0, local).expect("an empty log");
        process.mirror.clear();
        process.generation += 1;
        (process.high_watermark, process.checked, process.lineage) = (0, 0, 0);
        let Kept { boots, disk, .. } = node.kept;
        node.kept = Kept { boots, disk, ..Kept::default() };
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
            follower::Effect::LogStart(_) => {}
            follower::Effect::Fence(why) => panic!("broker {id} is fenced: {why}"),
        }
    }

    fn cut_log(&mut self, id: i32, job: impl FnOnce(Tenure) -> FollowerJob) {
        let Some(Process { role: Role::Follower { state, jobs, .. }, .. }) = &mut self.node(id).process else { return };
        let job = job(state.tenure());
        jobs.clear();
        jobs.push_back(job);
    }

    // The log.

    /// How long the disk takes for a job.
    fn job_ms(&mut self, id: i32) -> i64 {
        let is_slow = self.now < self.node(id).slow_disk_until;
        if is_slow { self.random.between(20, 400) } else { self.random.between(1, 10) }
    }

    fn begin_job(&mut self, id: i32) {
        let after = self.job_ms(id);
        let local = self.local(id);
        let Some(process) = &mut self.node(id).process else { return };
        if process.busy {
            return;
        }
        let work = match &mut process.role {
            Role::Idle => None,
            Role::Leader { state, .. } => state.next_job(local).map(|job| match job {
                Job::Commit { mut requests, leader_epoch, flush, .. } => {
                    let batches = requests.iter_mut().flat_map(|request| request.take().expect("checked"));
                    Work::Commit(batches.collect(), leader_epoch, flush)
                }
                Job::Flush | Job::Work(()) => Work::Flush,
            }),
            Role::Follower { jobs, .. } => jobs.pop_front().map(Work::Follower),
        };
        if let Some(work) = work {
            process.busy = true;
            let me = process.me;
            self.at(after, Event::Job(id, me, Box::new(work)));
        }
    }

    pub(super) fn work(&mut self, id: i32, member: Member, work: Work) {
        let after = self.job_ms(id);
        let local = self.local(id);
        let Some(process) = self.process(id, member) else { return };
        match work {
            Work::Commit(batches, epoch, flush) => {
                let bytes = batches.iter().map(|batch| batch.bytes.len()).sum();
                let outcomes = match batches.is_empty() {
                    true => Vec::new(),
                    false => process.log.append(&batches, epoch, local).expect("an append"),
                };
                for (batch, outcome) in batches.iter().zip(&outcomes) {
                    if matches!(outcome, BatchOutcome::Appended { .. }) {
                        process.mirror.extend(values(batch).into_iter().map(|value| (epoch, value)));
                    }
                }
                let log_end = process.log.log_end_offset();
                assert_eq!(process.mirror.len() as i64, log_end, "what was appended and what the log holds");
                // Each request has one batch.
                let became = outcomes.into_iter().map(|outcome| match outcome {
                    BatchOutcome::Refused(error) => Err(PartitionError::Sequence(error)),
                    done => Ok(vec![done]),
                });
                if let Role::Leader { state, .. } = &mut process.role {
                    state.written(became.collect(), log_end, bytes, local);
                }
                self.note(format_args!("{id} appends up to {log_end}"));
                if flush {
                    return self.at(after, Event::Job(id, member, Box::new(Work::Flush)));
                }
            }
            Work::Flush => {
                let flushed = process.log.flush().expect("a flush");
                if let Role::Leader { state, .. } = &mut process.role {
                    state.flushed(flushed, local);
                }
                let node = self.node(id);
                node.was_flushed = node.was_flushed.max(flushed);
            }
            Work::Follower(job) => self.follower_work(id, member, job, local),
        }
        let Some(process) = self.process(id, member) else { return };
        process.busy = false;
        if let Role::Leader { state, .. } = &mut process.role
            && state.is_busy()
        {
            state.returned(0, local);
        }
    }

    fn follower_work(&mut self, id: i32, member: Member, job: FollowerJob, local: i64) {
        let durability = self.topic.durability;
        if let FollowerJob::Cut(_, to) | FollowerJob::Restart(_, to) = job {
            let node = self.node(id);
            // A log that ends before its recovery point is taken for damaged.
            node.kept.flushed = node.kept.flushed.min(to);
            node.kept.high_watermark = node.kept.high_watermark.min(to);
            node.was_flushed = node.was_flushed.min(to);
            self.reached.truncation = true;
            self.note(format_args!("{id} cuts at {to}"));
        }
        let Some(process) = self.process(id, member) else { return };
        match job {
            FollowerJob::Append(tenure, batches) => {
                process.log.append_as_follower(&batches, local).expect("an append");
                for batch in &batches {
                    process.mirror.extend(values(batch).into_iter().map(|value| (batch.header.leader_epoch, value)));
                }
                let end = process.log.log_end_offset();
                if let Role::Follower { state, jobs, .. } = &mut process.role {
                    state.written(tenure, end);
                    if durability == TopicDurability::Flushed {
                        jobs.push_back(FollowerJob::Flush(tenure));
                    }
                }
            }
            FollowerJob::Flush(tenure) => {
                let flushed = process.log.flush().expect("a flush");
                let node = self.node(id);
                node.was_flushed = node.was_flushed.max(flushed);
                // The log goes on meanwhile, and may be cut.
                let after = self.random.between(0, 25);
                self.at(after, Event::Flushed(id, member, tenure, flushed));
            }
            FollowerJob::Cut(tenure, to) => {
                process.log.truncate(to, local).expect("a cut");
                process.was_cut(tenure, to);
            }
            FollowerJob::Restart(tenure, at) => {
                process.log.truncate_and_restart_at(at, local).expect("a cut");
                process.was_cut(tenure, at);
            }
        }
    }

    pub(super) fn flush_completed(&mut self, id: i32, member: Member, tenure: Tenure, offset: i64) {
        let Some(process) = self.process(id, member) else { return };
        if let Role::Follower { state, .. } = &mut process.role {
            state.flushed(tenure, offset);
        }
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
            let (taken, watermark) = (state.unclean_taken(), state.high_watermark());
            if let Some(process) = &mut self.node(id).process
                && taken != process.lineage
            {
                (process.lineage, process.checked, process.high_watermark) = (taken, 0, watermark);
            }
        }
    }

    /// Pushes to followers what they lack, or a sign of life.
    fn push(&mut self, id: i32) {
        let now = self.now;
        let mut pushes = Vec::new();
        let Some(process) = &self.node(id).process else { return };
        let Role::Leader { state, streams } = &process.role else { return };
        if state.leader().is_ended() {
            return;
        }
        let (end, high_watermark) = (process.log.log_end_offset(), process.high_watermark);
        for (to, stream) in streams {
            let is_due = stream.next < end || high_watermark > stream.told || now % 100 == 0;
            if !is_due {
                continue;
            }
            let batches = if stream.next < end { process.batches_from(stream.next) } else { Vec::new() };
            let spans = batches.iter().map(|batch| BatchSpan {
                base_offset: batch.header.base_offset,
                next_offset: batch.header.next_offset(),
                leader_epoch: batch.header.leader_epoch,
            });
            let (from, tenure) = (stream.next, stream.tenure);
            let push = Push { tenure, from, batches: spans.collect(), high_watermark, log_start: 0 };
            pushes.push((*to, stream.id, push, batches));
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

    // Producing.

    pub(super) fn append(&mut self, id: i32, request: RequestId, batch: NewBatch) {
        let Some(process) = &mut self.node(id).process else { return };
        let expected = process.connections.entry(request.0).or_insert(Some(0));
        // After an error nothing more is taken on a connection.
        let is_next = *expected == Some(request.1);
        let Role::Leader { state, .. } = &mut process.role else {
            *expected = None;
            return self.send(id, CLIENT, request.0, Message::Produced(request, Done::Refused));
        };
        if !is_next {
            return self.send(id, CLIENT, request.0, Message::Produced(request, Done::Refused));
        }
        *expected = Some(request.1 + 1);
        process.requests.insert(request, values(&batch));
        let bytes = batch.bytes.len();
        state.append(Append { batches: vec![batch], check: None, bytes, acks: Acks::All, reply: request });
    }

    fn answer(&mut self, id: i32, request: RequestId, result: AppendResult) {
        let is_flushed = self.topic.durability == TopicDurability::Flushed;
        let Some(process) = &mut self.node(id).process else { return };
        let values = process.requests.remove(&request);
        if result.is_err() {
            process.connections.insert(request.0, None);
        }
        let needed = match &process.role {
            Role::Leader { state, .. } => state.leader().min_insync_replicas() as usize,
            _ => 1,
        };
        let (epoch, lineage) = (process.role_of.1, process.lineage);
        let is_gap = matches!(
            result,
            Err(PartitionError::Sequence(SequenceError::OutOfOrder { .. } | SequenceError::UnknownProducer { .. }))
        );
        let done = if result.is_ok() {
            Done::Kept
        } else if is_gap {
            Done::Gap
        } else {
            Done::Refused
        };
        match (result, values) {
            (Ok(done), Some(values)) => {
                for outcome in &done.batches {
                    let (base_offset, last_offset) = match *outcome {
                        BatchOutcome::Appended { base_offset, last_offset, .. } => (base_offset, last_offset),
                        BatchOutcome::Duplicate { base_offset, last_offset } => {
                            let original = self.checks.committed(lineage).get(base_offset as usize);
                            self.reached.duplicate_after_failover |= original.is_some_and(|entry| entry.0 < epoch);
                            (base_offset, last_offset)
                        }
                        BatchOutcome::Refused(error) => panic!("acknowledged though {error}"),
                    };
                    let has = |node: &&Node| {
                        let written = node.process.as_ref().map_or(0, |process| process.mirror.len() as i64);
                        last_offset < if is_flushed { node.was_flushed } else { written.max(node.was_flushed) }
                    };
                    let disks = self.nodes.iter().filter(has).count();
                    // The original was acknowledged as it was asked for then.
                    let is_retry = matches!(outcome, BatchOutcome::Duplicate { .. });
                    let needed = if is_flushed && !is_retry { needed } else { 1 };
                    self.checks.acknowledged(lineage, base_offset, &values, disks, needed);
                }
            }
            (Err(PartitionError::Sequence(error)), _) => {
                // A request that was sent twice, and the first is cut or still to come.
                self.note(format_args!("{id} refuses {request:?}: {error}"));
            }
            _ => {}
        }
        self.send(id, CLIENT, request.0, Message::Produced(request, done));
    }

    pub(super) fn produce(&mut self) {
        let interval = self.random.between(5, 60);
        self.at(interval, Event::Producer);
        if self.truth.topic_by_id(&TOPIC).is_none() {
            return;
        }
        let room = self.producer.waiting.len() < 5;
        if room && (!self.healing || self.now % 3 == 0) {
            let count = self.random.below(3) + 1;
            let padding = self.random.below(200) as usize;
            let producer = &mut self.producer;
            let batch = batch(producer.epoch, producer.next_sequence, producer.next_value, count, padding, self.now);
            producer.next_value += count;
            producer.next_sequence += count as i32;
            producer.waiting.push_back(batch);
        }
        if self.producer.leader.is_none() || self.now - self.producer.heard_ms > PATIENCE_MS {
            return self.reconnect_producer();
        }
        self.send_waiting();
    }

    /// The producer asks any broker who leads, and sends there what is not acknowledged.
    pub(super) fn reconnect_producer(&mut self) {
        let up: Vec<i32> = self.nodes.iter().filter(|node| node.process.is_some()).map(|node| node.id).collect();
        let asked = self.random.pick(&up);
        let leader = asked.and_then(|id| {
            let process = self.node(id).process.as_ref()?;
            process.metadata.topic_by_id(&TOPIC)?.partitions.first().map(|partition| partition.leader)
        });
        self.next_stream += 1;
        let producer = &mut self.producer;
        producer.connection = self.next_stream;
        producer.leader = leader.filter(|leader| *leader >= 0);
        (producer.sent, producer.acknowledged, producer.heard_ms) = (0, 0, self.now);
    }

    fn send_waiting(&mut self) {
        let Some(leader) = self.producer.leader else { return };
        loop {
            let producer = &mut self.producer;
            let place = (producer.sent - producer.acknowledged) as usize;
            let Some(batch) = producer.waiting.get(place).cloned() else { return };
            let (connection, request) = (producer.connection, (producer.connection, producer.sent));
            producer.sent += 1;
            self.send(CLIENT, leader, connection, Message::Produce(request, batch));
        }
    }
}

impl Process {
    fn was_cut(&mut self, tenure: Tenure, end: i64) {
        self.mirror.truncate(end as usize);
        self.checked = self.checked.min(end);
        self.generation = tenure.generation;
        let history: History = self.history();
        if let Role::Follower { state, .. } = &mut self.role {
            state.cut(tenure, history);
        }
    }
}

fn alter_partition(alter: AlterPartition) -> command::Command {
    let member = |member: &Member| command::Member { broker_id: member.broker, incarnation: wire(member.incarnation) };
    Kind::AlterPartition(command::AlterPartition {
        topic_id: TOPIC.to_wire(),
        partition: 0,
        leader: Some(member(&alter.leader)),
        leader_epoch: alter.leader_epoch,
        partition_epoch: alter.partition_epoch,
        isr: alter.isr.iter().map(member).collect(),
    })
    .into()
}
