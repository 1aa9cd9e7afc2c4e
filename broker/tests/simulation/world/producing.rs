//! Producing: what the producer does, on which connections, and what brokers answer it.

use super::*;
use crate::node::ProduceStream;
use crate::producer::{Fate, Link};
use headwater_broker::metadata::MetadataError;
use headwater_broker::partition::state::Check;
use headwater_client::ProduceError;
use headwater_client::simulation::{Sender, Settings, first_identity};
use headwater_proto::ErrorCode;
use headwater_proto::limits::MAX_IN_FLIGHT_BATCHES;
use headwater_proto::wire::{self, OpenProduce, ProduceOpened, ProduceRequest, ProduceResponse};
use std::time::Duration;

/// A batch of the producer is full at so many bytes.
const BATCH_BYTES: usize = 400;

impl World {
    // The producer.

    pub(super) fn produce(&mut self) {
        let interval = self.random.between(5, 60);
        self.at(interval, Event::Producer);
        if self.truth.topic_by_id(&TOPIC).is_none() {
            return;
        }
        self.change_limit();
        self.make_records();
        self.hear_of_leaders();
        let now = self.now;
        match self.producer.link {
            Link::Pausing { until } if now < until => {}
            Link::Pausing { .. } => self.begin_stream(),
            Link::Asking { since, .. } | Link::Opening { since, .. } => {
                if now - since > PATIENCE_MS {
                    self.pause_producer();
                }
            }
            Link::Open { connection, leader, heard_ms, .. } => {
                if self.random.percent(2) || self.is_lost(connection, leader, heard_ms) {
                    self.pause_producer();
                }
            }
        }
        self.send_due();
        if let Some(sender) = &mut self.producer.sender {
            sender.expire(since_begin(now));
        }
        self.look_at_outcomes();
    }

    /// In every third seed max.message.bytes changes now and then, so that what was sent may be too large by now.
    fn change_limit(&mut self) {
        if self.seed % 3 == 1 && !self.healing && self.random.percent(3) {
            let limit = self.random.between(180, 600) as u32;
            self.topic.max_message_bytes = limit;
            self.note(format_args!("a batch has at most {limit} bytes"));
        }
    }

    fn make_records(&mut self) {
        if !self.producer.has_room() || (self.healing && self.now % 3 != 0) {
            return;
        }
        for _ in 0..self.random.below(3) + 1 {
            let padding = self.random.below(200) as usize;
            let (key, value) = keyed(self.producer.compacts, self.producer.next_value);
            let mut bytes = value.to_le_bytes().to_vec();
            bytes.resize(8 + padding, 0);
            let (key, value) = (key.map(bytes::Bytes::from), bytes::Bytes::from(bytes));
            let Some(sender) = &mut self.producer.sender else { return };
            match sender.send(since_begin(self.now), self.now, key.as_ref(), &value) {
                Ok(delivery) => self.producer.sent(delivery),
                Err(error) => assert!(matches!(error, ProduceError::TooLarge { .. }), "a record: {error}"),
            }
        }
    }

    /// Now and then some broker tells who leads; a later leader ends the stream, or a pause.
    fn hear_of_leaders(&mut self) {
        if !self.random.percent(30) {
            return;
        }
        let Some(asked) = self.some_broker() else { return };
        self.hear_of_leader(asked);
        if self.producer.known.2 > self.producer.tried_epoch
            && matches!(self.producer.link, Link::Open { .. } | Link::Pausing { .. })
        {
            self.producer.tried_epoch = self.producer.known.2;
            self.producer.link = Link::Pausing { until: self.now };
        }
    }

    fn some_broker(&mut self) -> Option<i32> {
        let is_reached =
            |node: &&Node| node.process.is_some() && !self.is_cut(CLIENT, node.id) && !self.is_cut(node.id, CLIENT);
        let up: Vec<i32> = self.nodes.iter().filter(is_reached).map(|node| node.id).collect();
        self.random.pick(&up)
    }

    fn hear_of_leader(&mut self, asked: i32) {
        let Some(process) = &self.node(asked).process else { return };
        let partition = process.metadata.topic_by_id(&TOPIC).and_then(|topic| topic.partitions.first());
        if let Some(partition) = partition {
            let told = (process.applied, partition.leader, partition.leader_epoch);
            self.producer.known = if told.0 > self.producer.known.0 { told } else { self.producer.known };
        }
    }

    /// Whether nobody is at the other end any more.
    fn is_lost(&self, connection: u64, leader: Member, heard_ms: i64) -> bool {
        let node = &self.nodes[leader.broker as usize - 1];
        self.now - heard_ms > PATIENCE_MS
            && (self.broken.contains(&connection)
                || self.is_cut(CLIENT, leader.broker)
                || self.is_cut(leader.broker, CLIENT)
                || node.paused_until > self.now
                || node.process.as_ref().map(|process| process.me) != Some(leader))
    }

    /// The stream, if there is one, is of no more use; the next comes after a pause.
    fn pause_producer(&mut self) {
        let random = self.random.below(1000) as f64 / 1000.0;
        let pause = self.producer.sender.as_mut().map_or(50, |sender| sender.pause(random).as_millis() as i64);
        self.producer.link = Link::Pausing { until: self.now + pause };
    }

    /// Any broker is asked for an identity, or who leads; a stream is opened there.
    fn begin_stream(&mut self) {
        let now = self.now;
        let Some(asked) = self.some_broker() else { return };
        if self.producer.sender.as_ref().is_some_and(Sender::is_idle) {
            return;
        }
        self.next_stream += 1;
        let connection = self.next_stream;
        let wanted = self.producer.sender.as_ref().map_or_else(|| Some(first_identity()), Sender::wants_identity);
        if let Some(request) = wanted {
            self.producer.link = Link::Asking { call: connection, since: now };
            return self.send(CLIENT, asked, connection, Message::AllocateProducerId(connection, request));
        }
        self.hear_of_leader(asked);
        let (_, leader, epoch) = self.producer.known;
        self.producer.tried_epoch = epoch;
        let process = (leader > 0).then(|| self.node(leader).process.as_ref()).flatten();
        let (Some(leader), Some(sender)) = (process.map(|process| process.me), &self.producer.sender) else {
            return self.pause_producer();
        };
        let open = sender.open(TOPIC, epoch);
        self.producer.link = Link::Opening { connection, leader, since: now };
        self.send(CLIENT, leader.broker, connection, Message::OpenProduce(connection, open));
    }

    /// Sends what is due on the stream, if there is one.
    fn send_due(&mut self) {
        while let Link::Open { connection, leader, unanswered, heard_ms } = self.producer.link
            && let Some(sender) = &mut self.producer.sender
            && let Some((request, payload)) = sender.next_request(since_begin(self.now))
        {
            let (unanswered, heard_ms) = (unanswered + 1, if unanswered == 0 { self.now } else { heard_ms });
            self.producer.link = Link::Open { connection, leader, unanswered, heard_ms };
            self.reached.window_full |= unanswered == MAX_IN_FLIGHT_BATCHES;
            self.send(CLIENT, leader.broker, connection, Message::Produce(connection, request, payload));
        }
    }

    pub(super) fn identity_given(&mut self, of: u64, answer: Result<wire::AllocateProducerIdResponse, wire::Error>) {
        if !matches!(self.producer.link, Link::Asking { call, .. } if call == of) {
            return;
        }
        self.note(format_args!("the producer is given {answer:?}"));
        let timeout = Duration::from_millis(self.producer.delivery_timeout_ms);
        let settings = Settings { batch_bytes: BATCH_BYTES, delivery_timeout: timeout };
        match (&mut self.producer.sender, answer) {
            (Some(sender), answer) => {
                let is_given = sender.identified(answer).is_ok();
                self.reached.producer_epoch |= is_given;
                if is_given {
                    self.producer.link = Link::Pausing { until: self.now };
                    self.begin_stream();
                } else {
                    self.pause_producer();
                }
            }
            (None, Ok(identity)) => {
                let sender = Sender::new(("topic", 0), identity, settings);
                self.producer.sender = Some(sender.expect("an identity"));
                self.producer.link = Link::Pausing { until: self.now };
            }
            (None, Err(_)) => self.pause_producer(),
        }
        self.look_at_outcomes();
    }

    pub(super) fn opened(&mut self, on: u64, opened: ProduceOpened) {
        let Link::Opening { connection, leader, .. } = self.producer.link else { return };
        if connection != on {
            return;
        }
        self.note(format_args!("the producer is told {opened:?} by {}", leader.broker));
        if opened.error.is_none() && opened.last_sequence < 0 {
            self.forgotten();
        }
        let Some(sender) = &mut self.producer.sender else { return };
        if sender.opened(opened) {
            self.producer.link = Link::Open { connection, leader, unanswered: 0, heard_ms: self.now };
            self.send_due();
        } else {
            self.pause_producer();
        }
        self.look_at_outcomes();
    }

    pub(super) fn produced(&mut self, on: u64, answer: ProduceResponse) {
        let Link::Open { connection, leader, unanswered, .. } = self.producer.link else { return };
        if connection != on {
            return;
        }
        let unanswered = unanswered.saturating_sub(1);
        self.producer.link = Link::Open { connection, leader, unanswered, heard_ms: self.now };
        let code = answer.error.as_ref().map(|error| ErrorCode::from_number(error.code));
        let Some(sender) = &mut self.producer.sender else { return };
        let answered = sender.answered(answer);
        let is_anew = sender.wants_identity().is_some();
        if let Err(error) = &answered {
            self.note(format_args!("the producer is refused: {error}"));
        }
        self.reached.too_large |= code == Some(ErrorCode::MessageTooLarge);
        if code == Some(ErrorCode::UnknownProducerId) && is_anew {
            self.forgotten();
        }
        match answered {
            Ok(()) => self.send_due(),
            Err(_) => self.pause_producer(),
        }
        self.look_at_outcomes();
    }

    /// A log remembers nothing of the producer: what of its records was there is deleted.
    fn forgotten(&mut self) {
        let starts = self.nodes.iter().filter_map(|node| node.process.as_ref());
        let deleted = starts.map(|process| process.log.log_start_offset()).max().unwrap_or(0);
        if deleted > 0 {
            self.checks.forgotten(&self.producer.unsettled(), deleted);
        }
    }

    fn look_at_outcomes(&mut self) {
        for fate in self.producer.look(&self.checks) {
            self.reached.timed_out_sent |= fate == Fate::Unknown;
            self.reached.timed_out_unsent |= fate == Fate::NeverSent;
        }
    }

    // The brokers.

    /// A broker asks the quorum for a producer id, or an epoch of one.
    pub(super) fn allocate_producer_id(&mut self, id: i32, call: u64, request: wire::AllocateProducerId) {
        let kind = match request.producer_id {
            None => Kind::AllocateProducerIds(command::AllocateProducerIds { broker_id: id, count: 1 }),
            Some(producer_id) => {
                let producer_epoch = request.producer_epoch;
                Kind::NextProducerEpoch(command::NextProducerEpoch { producer_id, producer_epoch })
            }
        };
        self.propose_for(id, kind.into(), None, Some((call, request)));
    }

    /// What came of that is passed on.
    pub(super) fn identity_decided(
        &mut self,
        from: i32,
        member: Member,
        (call, request): (u64, wire::AllocateProducerId),
        result: &Result<Applied, headwater_broker::metadata::Refusal>,
    ) {
        if self.process(from, member).is_none() {
            return;
        }
        let given = |producer_id, producer_epoch| wire::AllocateProducerIdResponse { producer_id, producer_epoch };
        let answer = match result {
            Ok(Applied::ProducerIds { first, .. }) => Ok(given(*first, 0)),
            Ok(Applied::ProducerEpoch(epoch)) => Ok(given(request.producer_id.unwrap_or(-1), i32::from(*epoch))),
            Ok(other) => panic!("a producer is given {other:?}"),
            Err(refusal) => Err(wire::Error::from(&MetadataError::from(refusal.clone()))),
        };
        self.send(from, CLIENT, call, Message::ProducerId(call, answer));
    }

    /// A broker is asked for a produce stream: it looks what its log holds of the producer, before what waits to be appended.
    pub(super) fn open_produce(&mut self, id: i32, connection: u64, open: OpenProduce) {
        let Some(process) = &mut self.node(id).process else { return };
        match process.admit(&open) {
            Err(error) => self.refuse_to_open(id, connection, error),
            Ok(()) => {
                process.opening.insert(connection, open);
                process.begin_chore(Chore::OpenProduce(connection));
            }
        }
    }

    pub(super) fn looked_for_producer(&mut self, id: i32, connection: u64) {
        let (total, max_message_bytes) = (self.commands.len(), self.topic.max_message_bytes);
        let Some(process) = &mut self.node(id).process else { return };
        let Some(open) = process.opening.remove(&connection) else { return };
        match process.open_produce(connection, &open, total) {
            Ok(opened) => {
                let opened = ProduceOpened { max_message_bytes, ..opened };
                self.send(id, CLIENT, connection, Message::Opened(connection, opened));
            }
            Err(error) => self.refuse_to_open(id, connection, error),
        }
    }

    fn refuse_to_open(&mut self, id: i32, connection: u64, error: wire::Error) {
        let refused =
            ProduceOpened { error: Some(error), last_sequence: -1, last_offset: -1, ..ProduceOpened::default() };
        self.send(id, CLIENT, connection, Message::Opened(connection, refused));
    }

    pub(super) fn append(&mut self, id: i32, connection: u64, request: ProduceRequest, bytes: bytes::Bytes) {
        let limit = self.topic.max_message_bytes as usize;
        let Some(process) = &mut self.node(id).process else { return };
        let epoch = process.role_of.1;
        let Some(stream) = process.connections.get_mut(&connection) else {
            // It was opened in an epoch that is over.
            let error = Some(PartitionError::NotLeader(epoch).to_wire());
            let refused = ProduceResponse { request_id: request.request_id, error, ..ProduceResponse::default() };
            return self.send(id, CLIENT, connection, Message::Produced(connection, refused));
        };
        let batch = NewBatch { header: headwater_proto::batch::check(&bytes).expect("a sound batch"), bytes };
        let request_id = (connection, request.request_id);
        if let Err(error) = stream.take(&request, &batch, limit) {
            return self.answer_in_turn(id, request_id, Err(error));
        }
        let (epoch, check) = (Some(stream.leader_epoch), Some(Check::new(stream.not_written.clone(), None)));
        process.requests.insert(request_id, values(&batch));
        let bytes = batch.bytes.len();
        if let Role::Leader { state, .. } = &mut process.role {
            state.append(Append { epoch, batches: vec![batch], check, bytes, acks: Acks::All, reply: request_id });
        }
    }

    pub(super) fn answer(&mut self, id: i32, request: RequestId, result: AppendResult) {
        if request.0 == COORDINATOR {
            return self.group_kept(id, request.1, result.is_ok());
        }
        let is_flushed = self.topic.durability == TopicDurability::Flushed;
        let Some(process) = &mut self.node(id).process else { return };
        let values = process.requests.remove(&request);
        let needed = match &process.role {
            Role::Leader { state, .. } => state.leader().min_insync_replicas() as usize,
            _ => 1,
        };
        let (epoch, lineage) = (process.role_of.1, process.lineage);
        match (&result, values) {
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
                    let needed = if is_retry { needed.min(self.checks.least_min_insync) } else { needed };
                    let needed = if is_flushed { needed } else { 1 };
                    self.checks.acknowledged(lineage, base_offset, &values, disks, needed);
                    self.producer.said.extend(values.iter().copied().zip(base_offset..));
                }
            }
            (Err(PartitionError::Sequence(SequenceError::DuplicateTooOld { .. })), Some(values)) => {
                self.checks.acknowledged_somewhere(lineage, &values);
                self.producer.said.extend(values.into_iter().map(|value| (value, -1)));
            }
            (Err(PartitionError::Sequence(error)), _) => {
                // A request that was sent twice, and the first is cut or still to come.
                self.note(format_args!("{id} refuses {request:?}: {error}"));
            }
            _ => {}
        }
        let answer = result.map_err(|error| error.to_wire()).map(|done| {
            let (batches, durability) = (done.acks(), done.durability.into());
            ProduceResponse { batches, durability, ..ProduceResponse::default() }
        });
        self.answer_in_turn(id, request, answer);
    }

    /// A broker answers the requests of a stream in their order, and after a refusal refuses all that follow.
    fn answer_in_turn(&mut self, id: i32, request: RequestId, answer: Result<ProduceResponse, wire::Error>) {
        let Some(process) = &mut self.node(id).process else { return };
        let Some(stream) = process.connections.get_mut(&request.0) else { return };
        for answer in stream.answers(request.1, answer) {
            self.send(id, CLIENT, request.0, Message::Produced(request.0, answer));
        }
    }
}

impl Process {
    /// Whether it leads in the epoch that the producer knows of.
    fn admit(&self, open: &OpenProduce) -> Result<(), wire::Error> {
        let epoch = self.role_of.1;
        let leads = matches!(&self.role, Role::Leader { state, .. } if !state.leader().is_ended());
        if !leads || open.leader_epoch < epoch {
            return Err(PartitionError::NotLeader(epoch).to_wire());
        }
        if open.leader_epoch > epoch {
            return Err(wire::Error::new(ErrorCode::UnknownLeaderEpoch, "not known here yet"));
        }
        Ok(())
    }

    /// Opens a produce stream, as a broker does that looks twice at what it does not know: at all that was decided before it was
    /// asked.
    fn open_produce(
        &mut self,
        connection: u64,
        open: &OpenProduce,
        total: usize,
    ) -> Result<ProduceOpened, wire::Error> {
        self.admit(open)?;
        let epoch = self.role_of.1;
        let last = self.log.last_sequence(open.producer_id);
        let identified = self.metadata.identify(open.producer_id, open.producer_epoch, last);
        let producer = match identified {
            Ok(producer) => producer,
            Err(_) if self.applied < total => return Err(wire::Error::from(&MetadataError::NoLeader)),
            Err(refusal) => return Err(wire::Error::from(&MetadataError::from(refusal))),
        };
        self.connections.insert(connection, ProduceStream::new(epoch, producer));
        Ok(ProduceOpened {
            leader_epoch: epoch,
            last_sequence: last.map_or(-1, |last| last.sequence),
            last_offset: last.map_or(-1, |last| last.offset),
            last_producer_epoch: last.map_or(-1, |last| i32::from(last.epoch)),
            ..ProduceOpened::default()
        })
    }
}

fn since_begin(now: i64) -> Duration {
    Duration::from_millis(now as u64)
}
