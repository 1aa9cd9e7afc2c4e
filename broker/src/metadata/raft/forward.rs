//! Commands and questions of a member that does not lead: they go to the one that does.
//!
//! What was asked of a leader that is gone may have come into force, or may still. A command that does the same when it is
//! applied twice is proposed again; one of a person gets an id before it is sent, by which it is applied once. Of another one
//! it is said that nobody knows what becomes of it.
//!
//! Owns: who is asked, how often, and what is said truthfully when nobody answered. Refuses: what commands mean.
//! Read next: [`super::node`].

use super::super::command::{
    Command, RaftFailure, RaftPropose, RaftReadIndex, RaftRequest, command::Command as Kind, raft_failure,
    raft_request::Request, raft_response::Response,
};
use super::super::handle::MetadataError;
use super::super::state::Outcome;
use super::convert::Malformed;
use super::links::{LinkError, Links, RaftStream};
use super::members::Change;
use super::node::RaftNode;
use super::{LogId, Membership, convert, message};
use headwater_proto::ErrorCode;
use headwater_proto::limits::MAX_COMMAND_BYTES;
use openraft::error::{CheckIsLeaderError, ClientWriteError, RaftError};
use openraft::{RaftMetrics, ServerState};
use prost::Message;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

/// How long nobody is asked again after nobody was found who leads.
const PAUSE: Duration = Duration::from_millis(20);

/// What came of asking one member.
#[derive(Debug)]
pub(super) enum Attempt<T> {
    /// It is known, be it good or bad.
    Done(Result<T, MetadataError>),
    /// It does not lead, and nothing was proposed; who does, as far as it knows.
    NotLeader(Option<u64>),
    /// It may have come into force, or may still.
    Unknown,
}

/// What is asked of whoever leads.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    /// To bring a command into force, which may take the last space on the disk.
    Propose { command: Command, urgent: bool },
    /// Up to where everything is acknowledged.
    ReadAt,
    /// To change who votes and who follows; where the one that comes is reached.
    Members { change: Change, address: String },
}

/// What is answered.
#[derive(Debug)]
pub(super) enum Known {
    Proposed(u64, Outcome),
    ReadAt(Option<LogId>),
    Members(Membership),
}

impl Asked {
    fn request(&self) -> Request {
        match self {
            Asked::Propose { command, urgent } => {
                Request::Propose(RaftPropose { command: Some(command.clone()), urgent: *urgent })
            }
            Asked::ReadAt => Request::ReadIndex(RaftReadIndex {}),
            Asked::Members { change, address } => Request::ChangeMembers(message::change_message(*change, address)),
        }
    }

    /// `None`: an answer to another question.
    fn known(response: Response) -> Option<Result<Known, Malformed>> {
        Some(match response {
            Response::Proposed(proposed) => {
                message::outcome(proposed.outcome).map(|outcome| Known::Proposed(proposed.index, outcome))
            }
            Response::ReadAt(read) => Ok(Known::ReadAt(read.last.as_ref().map(convert::log_id))),
            Response::MembersChanged(changed) => {
                convert::membership(&changed.membership.unwrap_or_default()).map(Known::Members)
            }
            _ => return None,
        })
    }

    /// Whether it may be asked for again though it may be done already.
    fn is_repeatable(&self) -> bool {
        match self {
            Asked::Propose { command, .. } => is_repeatable(command),
            Asked::ReadAt | Asked::Members { .. } => true,
        }
    }
}

/// A command as it is proposed where several vote: with an id, if it is a person's, and marked as not tried.
fn prepared(command: Command) -> Command {
    let mut command = Command { untried: true, ..command };
    if command.command_id.is_empty() && is_a_persons(&command) {
        command.command_id = rand::random::<[u8; 16]>().to_vec().into();
    }
    command
}

/// Whether what comes of the command is kept under its id.
fn is_a_persons(command: &Command) -> bool {
    matches!(
        command.command,
        Some(
            Kind::CreateTopic(_)
                | Kind::AlterTopic(_)
                | Kind::AddPartitions(_)
                | Kind::DeleteTopic(_)
                | Kind::DrainBroker(_)
                | Kind::EmptyBroker(_)
                | Kind::RemoveBroker(_)
                | Kind::RaiseFeatureLevel(_)
                | Kind::ElectLeaders(_)
                | Kind::Reassign(_)
                | Kind::CancelReassignment(_)
        )
    )
}

/// Whether the command may be proposed again though it may be in force already: it does the same, or is known by its id.
fn is_repeatable(command: &Command) -> bool {
    match &command.command {
        // The second one would be refused, as if the first had not counted.
        Some(Kind::AlterPartition(_)) | None => false,
        // An id is given away for nothing at worst; a registration, a fence and an epoch are known again.
        Some(_) => !is_a_persons(command) || !command.command_id.is_empty(),
    }
}

impl RaftNode {
    /// Brings a command into force by whoever leads: its index and what came of it. It is applied here then.
    pub(super) async fn propose_to_leader(
        &self,
        command: Command,
        urgent: bool,
        deadline: Instant,
    ) -> Result<(u64, Outcome), MetadataError> {
        let command = prepared(command);
        if command.encoded_len() > MAX_COMMAND_BYTES {
            return Err(MetadataError::TooLarge { bytes: command.encoded_len(), limit: MAX_COMMAND_BYTES });
        }
        match self.until_known(Asked::Propose { command, urgent }, deadline).await? {
            Known::Proposed(index, outcome) => {
                // It is in force whether it is seen here in time or not.
                drop(self.applied_up_to(index, deadline).await);
                Ok((index, outcome))
            }
            _ => Err(MetadataError::TimedOut),
        }
    }

    /// Brings a command into force if this member leads, and by nobody else: what belongs to a leadership is no other's.
    ///
    /// # Errors
    /// [`MetadataError`], as of [`propose`](RaftNode::propose).
    pub(in super::super) async fn propose_leading(
        &self,
        command: Command,
        urgent: bool,
        deadline: Instant,
    ) -> Result<(u64, Outcome), MetadataError> {
        match self.propose_as_leader(&command, urgent, deadline).await {
            Attempt::Done(Ok(Known::Proposed(index, outcome))) => Ok((index, outcome)),
            Attempt::Done(Err(error)) => Err(error),
            Attempt::NotLeader(_) => Err(MetadataError::NoLeader),
            Attempt::Done(Ok(_)) | Attempt::Unknown => Err(MetadataError::TimedOut),
        }
    }

    /// Waits until everything that was acknowledged by anybody before this is applied here.
    ///
    /// # Errors
    /// [`MetadataError`]: it is not known what that is, or not in time.
    pub async fn catch_up(&self, deadline: Instant) -> Result<(), MetadataError> {
        match self.until_known(Asked::ReadAt, deadline).await {
            Ok(Known::ReadAt(Some(last))) => self.applied_up_to(last.index, deadline).await,
            Ok(_) => Ok(()),
            // To ask changes nothing.
            Err(MetadataError::TimedOut) => Err(MetadataError::NoLeader),
            Err(error) => Err(error),
        }
    }

    /// Asks whoever leads until the answer is known.
    pub(super) async fn until_known(&self, asked: Asked, deadline: Instant) -> Result<Known, MetadataError> {
        let mut metrics = self.raft.metrics();
        // Who is said to lead, and who was asked and does not: a member that is none any more hears of no other one.
        let (mut hint, mut wrong) = (None, None);
        let mut may_be_in_force = false;
        loop {
            let running = metrics.borrow_and_update().running_state.clone();
            if let Err(fatal) = running {
                return Err(self.ended(&fatal).await);
            }
            let leader = hint.take().or_else(|| self.leader().filter(|leader| wrong.take() != Some(*leader)));
            let attempt = match leader {
                Some(id) if id == self.node_id() => self.answer_as_leader(&asked, deadline).await,
                _ => self.ask_other(leader, &asked, deadline).await,
            };
            match attempt {
                Attempt::Done(Err(error)) if may_be_in_force && !error.is_refusal() => {
                    return Err(MetadataError::TimedOut);
                }
                Attempt::Done(known) => return known,
                Attempt::NotLeader(other) => {
                    hint = other.filter(|id| Some(*id) != leader && *id != self.node_id());
                    wrong = leader;
                }
                Attempt::Unknown => {
                    may_be_in_force = true;
                    if !asked.is_repeatable() {
                        return Err(MetadataError::TimedOut);
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(if may_be_in_force { MetadataError::TimedOut } else { MetadataError::NoLeader });
            }
            if hint.is_none() {
                // Whichever comes first: news, or the time to ask again.
                tokio::select! {
                    changed = metrics.changed() => if changed.is_err() {
                        return Err(if may_be_in_force { MetadataError::TimedOut } else { MetadataError::ShuttingDown });
                    },
                    () = sleep(PAUSE) => {}
                }
            }
        }
    }

    /// Answers as the leader, if this member is.
    pub(super) async fn answer_as_leader(&self, asked: &Asked, deadline: Instant) -> Attempt<Known> {
        if self.aside.load(Ordering::Acquire) {
            return Attempt::NotLeader(None);
        }
        match asked {
            Asked::Propose { command, urgent } => self.propose_as_leader(command, *urgent, deadline).await,
            Asked::ReadAt => self.read_at_as_leader(deadline).await,
            Asked::Members { change, .. } => self.change_as_leader(*change, deadline).await,
        }
    }

    /// Who leads, as far as it is known here.
    pub fn leader(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow();
        // Whoever is no member any more takes itself for the leader that it was.
        now.current_leader.filter(|leader| *leader != self.node_id() || now.state == ServerState::Leader)
    }

    /// Brings a command into force as the leader, if this member is.
    async fn propose_as_leader(&self, command: &Command, urgent: bool, deadline: Instant) -> Attempt<Known> {
        let proposed = |(index, outcome)| Known::Proposed(index, outcome);
        // Nobody else can lead then.
        match timeout_at(deadline, self.propose_alone(command, urgent, deadline)).await {
            Ok(Some(known)) => return Attempt::Done(known.map(proposed)),
            Ok(None) => {}
            Err(_) => return Attempt::Unknown,
        }
        if self.leader() != Some(self.node_id()) {
            return Attempt::NotLeader(self.leader());
        }
        let bytes = command.encoded_len() as u64;
        if let Err(error) = self.make_room(bytes, urgent).await {
            return Attempt::Done(Err(error));
        }
        let command = Command { untried: true, ..command.clone() };
        let may_repeat = is_repeatable(&command);
        let deposed = deposed(self.raft.metrics(), self.node_id());
        let written = tokio::select! {
            biased;
            written = timeout_at(deadline, self.raft.client_write(command)) => written,
            // What it wrote may be lost without a word.
            () = deposed, if may_repeat => return Attempt::Unknown,
        };
        match written {
            Err(_) => Attempt::Unknown,
            // It was not written; or it was, and a leader after this one took it back here. A third one may have it still, and
            // bring it into force.
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Attempt::Unknown,
            Ok(Err(RaftError::APIError(error))) => Attempt::Done(Err(MetadataError::Stopped(error.to_string()))),
            Ok(Err(RaftError::Fatal(fatal))) => Attempt::Done(Err(self.ended(&fatal).await)),
            Ok(Ok(written)) => Attempt::Done(super::node::answer_of(written).map(proposed)),
        }
    }

    /// Up to where everything is acknowledged, as the leader, if this member is and a quorum confirms it.
    async fn read_at_as_leader(&self, deadline: Instant) -> Attempt<Known> {
        match timeout_at(deadline, self.raft.get_read_log_id()).await {
            Ok(Ok((last, _))) => Attempt::Done(Ok(Known::ReadAt(last))),
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to)))) => Attempt::NotLeader(to.leader_id),
            Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) | Err(_) => Attempt::NotLeader(None),
            Ok(Err(RaftError::Fatal(fatal))) => Attempt::Done(Err(self.ended(&fatal).await)),
        }
    }

    /// Asks another member; `None`: any.
    async fn ask_other(&self, leader: Option<u64>, asked: &Asked, deadline: Instant) -> Attempt<Known> {
        let Some(links) = &self.links else { return Attempt::NotLeader(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1);
        let request = RaftRequest { timeout_ms, request: Some(asked.request()) };
        let streams = match leader {
            Some(id) => match timeout_at(deadline, links.open(id)).await {
                Ok(Ok(stream)) => vec![stream],
                Ok(Err(error)) => return not_reached(&error),
                Err(_) => return Attempt::NotLeader(None),
            },
            None => match self.any(links, deadline).await {
                Ok(streams) => streams,
                Err(error) => return not_reached(&error),
            },
        };
        let mut attempt = Attempt::NotLeader(None);
        for mut stream in streams {
            let gone = leads_no_more(self.raft.metrics(), leader);
            let answer = tokio::select! {
                biased;
                answer = stream.ask(&request, left) => answer,
                () = gone => return Attempt::Unknown,
            };
            attempt = match answer {
                Ok(answer) => understand(answer.response, links),
                Err(_) => Attempt::Unknown,
            };
            if !matches!(attempt, Attempt::NotLeader(None)) {
                break;
            }
        }
        attempt
    }

    /// Streams to all that are known and reached.
    async fn any(&self, links: &Links, deadline: Instant) -> Result<Vec<RaftStream>, LinkError> {
        let tries = links.addresses(0).into_iter().map(|address| links.open_at(address, 0));
        let opened = timeout_at(deadline, futures::future::join_all(tries)).await.unwrap_or_default();
        let (mut streams, mut foreign) = (Vec::new(), None);
        for opened in opened {
            match opened {
                Ok(stream) => streams.push(stream),
                Err(error) => foreign = foreign.or(error.is_final().then_some(error)),
            }
        }
        // One wrong address among good ones is said in the log. Who knows that this disk is an older copy knows more than others.
        let is_the_answer = |error: &LinkError| streams.is_empty() || !error.is_of_another_cluster();
        match foreign {
            Some(error) if is_the_answer(&error) => Err(error),
            _ => Ok(streams),
        }
    }

    /// Waits until this entry is applied here.
    pub(super) async fn applied_up_to(&self, index: u64, deadline: Instant) -> Result<(), MetadataError> {
        let mut applied = self.applied();
        let there = applied.wait_for(|applied| applied.last_log_id.is_some_and(|last| last.index >= index));
        match timeout_at(deadline, there).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MetadataError::ShuttingDown),
            Err(_) => Err(MetadataError::NoLeader),
        }
    }
}

type Metrics = watch::Receiver<RaftMetrics<u64, openraft::EmptyNode>>;

/// Ends when another member leads than this one.
async fn deposed(mut metrics: Metrics, node_id: u64) {
    if metrics.wait_for(|now| now.current_leader.is_some_and(|leader| leader != node_id)).await.is_err() {
        // The answer says so too.
        std::future::pending::<()>().await;
    }
}

/// Ends when another one leads than who was asked.
async fn leads_no_more(mut metrics: Metrics, asked: Option<u64>) {
    let Some(asked) = asked else { return std::future::pending().await };
    if metrics.wait_for(|now| now.current_leader.is_some_and(|leader| leader != asked)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn not_reached(error: &LinkError) -> Attempt<Known> {
    match error {
        LinkError::Refused { error: told, .. } if error.is_final() => Attempt::Done(Err(MetadataError::Elsewhere {
            code: ErrorCode::from_number(told.code),
            message: told.message.clone(),
            is_out_of_producer_epochs: false,
        })),
        _ => Attempt::NotLeader(None),
    }
}

fn understand(response: Option<Response>, links: &Links) -> Attempt<Known> {
    let failure = match response {
        Some(Response::Failure(failure)) => failure,
        Some(answer) => {
            return match Asked::known(answer) {
                Some(Ok(known)) => Attempt::Done(Ok(known)),
                Some(Err(_)) | None => Attempt::Unknown,
            };
        }
        None => RaftFailure { kind: raft_failure::Kind::UnknownRequest.into(), ..RaftFailure::default() },
    };
    match raft_failure::Kind::try_from(failure.kind) {
        Ok(raft_failure::Kind::NotLeader) => {
            links.say(failure.leader_node_id, &failure.leader_address);
            Attempt::NotLeader((failure.leader_node_id != 0).then_some(failure.leader_node_id))
        }
        Ok(raft_failure::Kind::Refused) => Attempt::Done(Err(MetadataError::Elsewhere {
            code: ErrorCode::from_number(failure.code),
            message: failure.message,
            is_out_of_producer_epochs: failure.producer_epochs_exhausted,
        })),
        Ok(raft_failure::Kind::UnknownRequest) => Attempt::Done(Err(MetadataError::Elsewhere {
            code: ErrorCode::UnsupportedVersion,
            message: failure.message,
            is_out_of_producer_epochs: false,
        })),
        Ok(raft_failure::Kind::Ended | raft_failure::Kind::UnknownOutcome) | Err(_) => Attempt::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{AlterPartition, BecomeController, CreateTopic, RegisterBroker};
    use super::*;

    #[test]
    fn a_persons_command_gets_an_id_once_and_can_be_proposed_again() {
        let create: Command = Kind::CreateTopic(CreateTopic::default()).into();
        assert!(!is_repeatable(&create), "two would be created, or the second refused");
        let first = prepared(create);
        assert!(first.untried && first.command_id.len() == 16 && is_repeatable(&first));
        assert_eq!(prepared(first.clone()), first, "its own id stays");
    }

    #[test]
    fn what_says_the_same_twice_needs_no_id_and_what_would_be_refused_then_is_not_repeated() {
        for kind in
            [Kind::RegisterBroker(RegisterBroker::default()), Kind::BecomeController(BecomeController::default())]
        {
            let command = prepared(kind.into());
            assert!(command.command_id.is_empty() && is_repeatable(&command));
        }
        // Whether the first one counted is in the partition's epoch; the second one hides that.
        assert!(!is_repeatable(&prepared(Kind::AlterPartition(AlterPartition::default()).into())));
        assert!(!is_repeatable(&Command::default()));
    }
}
