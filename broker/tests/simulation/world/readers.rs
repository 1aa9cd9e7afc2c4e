//! A reader: it follows the partition from whichever replica it finds, and asks the leader where the log ends.

use super::*;
use crate::node::Entry;

#[derive(Default)]
pub(crate) struct Reader {
    /// The next record that it wants.
    position: i64,
    /// The newest leader epoch that it heard of: it goes by nobody of an older one.
    epoch: i32,
    /// Where the log ended the last time it was told.
    latest: i64,
    /// After how many unclean elections: what was read before may be gone.
    unclean: u32,
    /// When the newest answer was given: those before it come late.
    answered: i64,
}

/// What a reader is answered.
#[derive(Debug, Clone)]
pub(super) struct Fetched {
    /// When it is said.
    answered: i64,
    epoch: i32,
    unclean: u32,
    from: i64,
    /// Where the log begins.
    log_start: i64,
    entries: Vec<(i64, Entry)>,
    /// The next offset after them.
    next: i64,
    /// Where the log ends for readers, as far as a leader knows.
    latest: Option<i64>,
}

impl Reader {
    /// Whether it has read everything.
    pub(super) fn is_at_the_end(&self, committed: usize) -> bool {
        self.position == committed as i64
    }
}

impl World {
    pub(super) fn read(&mut self) {
        let interval = self.random.between(10, 80);
        self.at(interval, Event::Reader);
        let to = self.random.between(1, self.nodes.len() as i64) as i32;
        let message = Message::Fetch(self.reader.position);
        let delay = self.delay();
        self.at(delay, Event::Deliver(Box::new(Envelope { from: READER, to, connection: None, message })));
    }

    /// A broker answers a reader with what it may show.
    pub(super) fn serve(&mut self, id: i32, from: i64) {
        let Some(process) = &self.node(id).process else { return };
        let (is_leader, latest) = match &process.role {
            Role::Leader { state, .. } if state.leader().is_ended() => return,
            Role::Leader { state, .. } => {
                (true, state.leader().serves_offsets().then_some(state.offsets().high_watermark))
            }
            Role::Follower { state, .. } if state.is_following() => (false, None),
            Role::Idle | Role::Follower { .. } => return,
        };
        let log_start = process.log.log_start_offset();
        // What is in the log, not what is believed to be there.
        let (begin, end) = (from.max(log_start), process.high_watermark);
        let (mut entries, mut next): (Vec<(i64, Entry)>, i64) = (Vec::new(), from);
        if begin < end {
            for batch in process.batches_from(begin) {
                entries.extend(records(&batch).into_iter().filter(|(offset, _)| (begin..end).contains(offset)));
                next = batch.header.next_offset().min(end);
            }
        }
        let (epoch, unclean) = (process.role_of.1, process.lineage);
        self.reached.read_from_follower |= !is_leader && !entries.is_empty();
        self.reached.latest_awaited |= is_leader && latest.is_none();
        let fetched = Fetched { answered: self.now, epoch, unclean, from, log_start, entries, next, latest };
        let delay = self.delay();
        let message = Message::Fetched(fetched);
        self.at(delay, Event::Deliver(Box::new(Envelope { from: id, to: READER, connection: None, message })));
    }

    /// A reader is answered. What it was told is kept stays so: no watermark that it hears of is below one that it heard before.
    pub(super) fn fetched(&mut self, fetched: Fetched) {
        let reader = &mut self.reader;
        let is_overtaken = fetched.answered < reader.answered;
        if is_overtaken || fetched.epoch < reader.epoch || fetched.from != reader.position {
            return;
        }
        (reader.epoch, reader.answered) = (fetched.epoch, fetched.answered);
        if fetched.unclean > reader.unclean {
            let committed = self.checks.committed(fetched.unclean).len() as i64;
            (reader.unclean, reader.latest) = (fetched.unclean, 0);
            reader.position = reader.position.min(committed);
            return;
        }
        if fetched.unclean < reader.unclean {
            return;
        }
        if let Some(latest) = fetched.latest {
            let known = reader.latest.max(reader.position);
            assert!(latest >= known, "a reader that knows of {known} records is told that there are {latest}");
            reader.latest = latest;
        }
        // What was deleted is passed over, and what was compacted.
        let from = reader.position.max(fetched.log_start);
        let committed = self.checks.committed(fetched.unclean);
        for (offset, entry) in &fetched.entries {
            let known = committed.get(*offset as usize);
            assert_eq!(known, Some(entry), "a reader gets something else at offset {offset}");
        }
        let is_missing = |offset: &i64| !fetched.entries.iter().any(|(there, _)| there == offset);
        let missing: Vec<i64> = (from..fetched.next).filter(is_missing).collect();
        assert!(missing.is_empty() || self.policy.compacts, "a reader gets nothing at {missing:?}");
        self.reader.position = fetched.next.max(from);
        self.checks.compacted(0, &missing);
    }
}
