//! What a broker does with its log: one job after another, as the machines tell, and what is deleted and compacted between them.

use super::*;
use crate::node::{NEVER_HANGS, hangs};
use headwater_storage::CompactionError;

impl World {
    /// How long the disk takes for a job.
    fn job_ms(&mut self, id: i32) -> i64 {
        let is_slow = self.now < self.node(id).slow_disk_until;
        // A disk that hangs where another one lost what it had is more than the metadata can make good.
        let longest = if self.nodes.iter().any(|node| node.lost) { 130 } else { 400 };
        if is_slow { self.random.between(20, longest) } else { self.random.between(1, 10) }
    }

    pub(super) fn begin_job(&mut self, id: i32) {
        let (after, now) = (self.job_ms(id), self.now);
        let durable = self.topic.durability == TopicDurability::Flushed;
        let local = self.local(id);
        let Some(process) = &mut self.node(id).process else { return };
        if process.busy.is_some() {
            return;
        }
        let work = match &mut process.role {
            Role::Idle => None,
            Role::Leader { state, .. } => state.next_job(local).map(|job| match job {
                Job::Commit { requests, leader_epoch, flush, .. } => Work::Commit(requests, leader_epoch, flush),
                Job::Flush => Work::Flush,
                Job::Work(chore) => Work::Chore(chore),
            }),
            Role::Follower { jobs, .. } => {
                let before = process.begins_at.min(process.high_watermark);
                if jobs.is_empty() && before > process.log.log_start_offset() {
                    jobs.push_back(FollowerJob::Chore(Chore::Delete(before)));
                }
                jobs.pop_front().map(Work::Follower)
            }
        };
        if let Some(work) = work {
            // What is acknowledged before it is flushed is not trusted after a disk failed: nobody leads then who was the last.
            process.busy = Some(if durable { now } else { NEVER_HANGS });
            let me = process.me;
            self.at(after, Event::Job(id, me, Box::new(work)));
        }
    }

    pub(super) fn work(&mut self, id: i32, member: Member, work: Work) {
        let after = self.job_ms(id);
        let local = self.local(id);
        let Some(process) = self.process(id, member) else { return };
        match work {
            Work::Commit(mut requests, epoch, flush) => {
                let taken: Vec<_> = requests.iter_mut().map(Request::take).collect();
                let batches: Vec<NewBatch> = taken.iter().flatten().flatten().cloned().collect();
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
                let mut outcomes = outcomes.into_iter();
                let became = taken
                    .into_iter()
                    .zip(&requests)
                    .map(|(batches, request)| request.became(outcomes.by_ref().take(batches?.len()).collect()));
                let became = became.collect();
                if let Role::Leader { state, .. } = &mut process.role {
                    state.written(became, log_end, bytes, local);
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
            Work::Chore(chore) => self.chore_done(id, member, chore),
            Work::Follower(job) => self.follower_work(id, member, job, local),
        }
        let now = self.now;
        let Some(process) = self.process(id, member) else { return };
        let has_hung = hangs(process.busy.take(), now);
        process.is_restored |= has_hung;
        if let Role::Leader { state, .. } = &mut process.role
            && state.is_busy()
        {
            state.returned(process.log.log_start_offset(), local);
        }
        self.reached.disk_hung |= has_hung;
    }

    /// What is to be done to logs besides, now and then.
    pub(super) fn chore(&mut self) -> Option<Chore> {
        if self.policy.compacts {
            return self.random.percent(25).then_some(Chore::PlanCompaction);
        }
        (self.policy.retention_bytes.is_some() && self.random.percent(10)).then_some(Chore::Retain)
    }

    /// Does one of these; records go as far as they are committed.
    fn chore_done(&mut self, id: i32, member: Member, chore: Chore) {
        if let Chore::OpenProduce(connection) = chore {
            return self.looked_for_producer(id, connection);
        }
        let local = self.local(id);
        let after = self.random.between(5, 200);
        let node = &mut self.nodes[id as usize - 1];
        let Some(process) = &mut node.process else { return };
        let log = &mut process.log;
        let offsets = Offsets {
            log_start: log.log_start_offset(),
            high_watermark: process.high_watermark,
            log_end: log.log_end_offset(),
            flushed: log.flushed_offset(),
        };
        match chore {
            Chore::Delete(before) => {
                let before = before.min(offsets.high_watermark);
                if before <= offsets.log_start {
                    return;
                }
                let deleted = log.delete_records(before, offsets.high_watermark, local);
                node.kept.log_start = deleted.expect("a deletion");
                if let Role::Follower { state, .. } = &mut process.role {
                    state.start_kept(node.kept.log_start);
                }
            }
            Chore::Retain => match log.enforce_retention(local, offsets.high_watermark).expect("a deletion") {
                Some(log_start) => node.kept.log_start = log_start,
                None => return,
            },
            Chore::OpenProduce(_) => return,
            // One at a time.
            Chore::PlanCompaction if process.plan.is_some() || process.compacted.is_some() => return,
            Chore::PlanCompaction => {
                let plan = log.plan_compaction(local, offsets.compactable(), node.kept.cleaned).expect("a look");
                if plan.is_some() {
                    process.plan = plan;
                    self.at(after, Event::Compact(id, member));
                }
                return;
            }
            Chore::InstallCompaction => {
                let Some(result) = process.compacted.take() else { return };
                // What is on the disk by now is written down before segments are replaced.
                node.kept.flushed = log.flushed_offset();
                if node.kept.flushed < result.cleaned_until() {
                    return log.discard_compaction(result);
                }
                let until = log.install(result, node.kept.flushed).expect("an installation");
                node.kept.cleaned = Some(until);
                let (_, holes) = process.read_all(self.checks.committed(process.lineage));
                self.reached.compacted |= !holes.is_empty();
                self.checks.compacted(id, &holes);
                return self.note(format_args!("{id} has compacted up to {until}, and {} are gone", holes.len()));
            }
        }
        let log_start = node.kept.log_start;
        self.reached.records_deleted = true;
        self.reached.retained |= chore == Chore::Retain;
        self.note(format_args!("{id} deletes up to {log_start}"));
    }

    /// The part of a compaction that needs no write half.
    pub(super) fn compact(&mut self, id: i32, member: Member) {
        let Some(process) = self.process(id, member) else { return };
        let Some(plan) = process.plan.take() else { return };
        match plan.run(1 << 20, &|| false) {
            Ok(result) => {
                process.compacted = Some(result);
                process.begin_chore(Chore::InstallCompaction);
            }
            Err(CompactionError::Departed) => {}
            Err(error) => panic!("broker {id} cannot compact: {error}"),
        }
    }

    fn follower_work(&mut self, id: i32, member: Member, job: FollowerJob, local: i64) {
        let durability = self.topic.durability;
        let lineages = self.process(id, member).map(|process| (process.lineage, process.role_lineage));
        let (lineage, of_leader) = lineages.unwrap_or_default();
        if let FollowerJob::Cut(_, to) | FollowerJob::Restart(_, to) = job {
            let node = self.node(id);
            // A log that ends before its recovery point is taken for damaged.
            node.kept.flushed = node.kept.flushed.min(to);
            node.kept.high_watermark = node.kept.high_watermark.min(to);
            node.was_flushed = node.was_flushed.min(to);
            if matches!(job, FollowerJob::Restart(..)) {
                // Nothing is left in it of what another lineage wrote.
                (node.kept.log_start, node.kept.lineage) = (to, of_leader);
            }
            self.reached.truncation = true;
            self.reached.begun_anew |= to > 0 && matches!(job, FollowerJob::Restart(..));
            self.note(format_args!("{id} cuts at {to}"));
        }
        let committed = self.checks.committed(lineage).to_vec();
        let newest = self.checks.committed(of_leader).to_vec();
        let Some(process) = self.process(id, member) else { return };
        match job {
            FollowerJob::Append(tenure, batches) => {
                process.log.append_as_follower(&batches, &[], local).expect("an append");
                let mut mirror = std::mem::take(&mut process.mirror);
                for batch in &batches {
                    process.extend(&mut mirror, batch, &committed);
                }
                process.mirror = mirror;
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
            FollowerJob::Chore(chore) => self.chore_done(id, member, chore),
            FollowerJob::Cut(tenure, to) => {
                process.log.truncate(to, local).expect("a cut");
                process.was_cut(tenure, to);
            }
            FollowerJob::Restart(tenure, at) => {
                process.log.truncate_and_restart_at(at, local).expect("a cut");
                // What lies below is deleted, and was committed.
                process.mirror = newest[..at as usize].to_vec();
                if process.lineage != of_leader {
                    (process.lineage, process.checked) = (of_leader, 0);
                }
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
}

impl Process {
    /// Has something done to the log once no other job is on its way.
    pub(super) fn begin_chore(&mut self, chore: Chore) {
        if chore == Chore::PlanCompaction && (self.plan.is_some() || self.compacted.is_some()) {
            // One at a time; the one that waits may have been forgotten when the role changed.
            return if self.compacted.is_some() {
                self.begin_chore(Chore::InstallCompaction)
            };
        }
        match &mut self.role {
            Role::Leader { state, .. } if !state.leader().is_ended() => state.work(chore),
            Role::Follower { jobs, state, .. } if state.is_following() && chore != Chore::Retain => {
                jobs.push_back(FollowerJob::Chore(chore));
            }
            _ => {}
        }
    }

    pub(super) fn was_cut(&mut self, tenure: Tenure, end: i64) {
        self.mirror.truncate(end as usize);
        self.checked = self.checked.min(end);
        self.high_watermark = self.high_watermark.min(end);
        self.generation = tenure.generation;
        let history: History = self.history();
        if let Role::Follower { state, .. } = &mut self.role {
            state.cut(tenure, history);
        }
    }
}
