//! Raft's own messages to another member, as openraft sends them.
//!
//! openraft waits for each answer no longer than a heartbeat. Over a long way, or to a slow disk, everything takes longer: it
//! would be sent for ever and answered never. So what is sent goes on being sent, and whoever asks for the same again waits for
//! that answer ([`Sending`]). What says only that there is a leader goes by a stream of its own, past the entries.
//!
//! Owns: one stream for each purpose and member. Refuses: connections ([`super::links`]). Read next: [`super::server`].

use super::super::command::{RaftRequest, RaftResponse, raft_request::Request, raft_response::Response};
use super::convert::Malformed;
use super::links::{LinkError, Links, RaftStream};
use super::node::ELECTION_TIMEOUT_MS;
use super::{LogId, TypeConfig, Vote, message};
use openraft::EmptyNode;
use openraft::error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use std::io;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long entries may take on their way, and to be kept.
const ENTRIES: Duration = Duration::from_secs(30);
/// How long the sign of a leader may take.
const SIGN: Duration = Duration::from_millis(ELECTION_TIMEOUT_MS);
/// The pauses of openraft after a member was not reached, and the longest. It hears of no leader meanwhile.
const PAUSES_MS: [u64; 3] = [20, 50, 100];
const LONGEST_PAUSE_MS: u64 = 150;

impl RaftNetworkFactory<TypeConfig> for Links {
    type Network = MemberNetwork;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> MemberNetwork {
        let way = || Way { links: self.clone(), target, stream: None };
        MemberNetwork { entries: Appending::by(way()), signs: Appending::by(way()), others: way() }
    }
}

/// openraft's ways to a member.
#[derive(Debug)]
pub struct MemberNetwork {
    entries: Appending,
    signs: Appending,
    others: Way,
}

/// A stream to a member, once it is needed.
#[derive(Debug)]
struct Way {
    links: Links,
    target: u64,
    /// Free: every answer has come.
    stream: Option<RaftStream>,
}

/// A way that goes on though nobody waits for the answer.
#[derive(Debug)]
struct Appending {
    links: Links,
    target: u64,
    /// `None`: it is under way.
    way: Option<Way>,
    sending: Option<Sending>,
}

/// Entries, or the sign of a leader, on their way.
#[derive(Debug)]
struct Sending {
    vote: Vote,
    previous: Option<LogId>,
    last: Option<LogId>,
    answer: JoinHandle<(Way, Result<AppendEntriesResponse<u64>, LinkError>)>,
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.answer.abort();
    }
}

type Failed<E = RaftError<u64>> = RPCError<u64, EmptyNode, E>;

fn unreachable<E: std::error::Error>(error: &LinkError) -> RPCError<u64, EmptyNode, E> {
    match error {
        // It is waited for at once again.
        LinkError::Late { .. } => RPCError::Network(NetworkError::new(error)),
        _ => RPCError::Unreachable(Unreachable::new(error)),
    }
}

impl Way {
    fn late(&self) -> LinkError {
        let addresses = self.links.addresses(self.target);
        addresses.iter().for_each(|address| self.links.suspect(address));
        LinkError::Late { address: addresses.into_iter().next().unwrap_or_default() }
    }

    /// Asks on the stream of this purpose.
    async fn ask(&mut self, request: Request, patience: Duration) -> Result<Response, LinkError> {
        let began = std::time::Instant::now();
        let mut stream = match self.stream.take().filter(RaftStream::is_alive) {
            Some(stream) => stream,
            None => match timeout(patience, self.links.open(self.target)).await {
                Ok(opened) => opened?,
                Err(_) => return Err(self.late()),
            },
        };
        let left = patience.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
        let request = RaftRequest { timeout_ms: millis(patience), request: Some(request) };
        match stream.ask(&request, left).await {
            Ok(RaftResponse { response: Some(response) }) => {
                self.stream = Some(stream);
                Ok(response)
            }
            Ok(_) => Err(senseless(&stream)),
            Err(error) => {
                self.links.suspect(stream.address());
                Err(error)
            }
        }
    }

    async fn append(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        patience: Duration,
    ) -> Result<AppendEntriesResponse<u64>, LinkError> {
        let (vote, previous) = (request.vote, request.prev_log_id);
        let message = Request::Append(message::append_message(&request));
        match self.ask(message, patience).await? {
            Response::Appended(answer) => {
                message::appended(&answer, &vote, previous).map_err(|error| self.malformed(error))
            }
            other => Err(self.unexpected(&other)),
        }
    }

    fn malformed(&self, error: Malformed) -> LinkError {
        LinkError::Lost { address: format!("member {:x}", self.target), why: error.to_string() }
    }

    fn unexpected(&self, response: &Response) -> LinkError {
        let why = match response {
            Response::Failure(failure) => failure.message.clone(),
            _ => "an answer to another question".to_owned(),
        };
        LinkError::Unreachable { address: format!("member {:x}", self.target), why }
    }
}

impl Appending {
    fn by(way: Way) -> Appending {
        Appending { links: way.links.clone(), target: way.target, way: Some(way), sending: None }
    }

    /// Sends this; or waits on for the same that is on its way. It may be there for so long.
    async fn send(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        patience: Duration,
        longest: Duration,
    ) -> Result<AppendEntriesResponse<u64>, LinkError> {
        let (vote, previous) = (request.vote, request.prev_log_id);
        let wanted = request.entries.last().map(|entry| entry.log_id);
        let under_way = self.sending.take().filter(|sending| sending.vote == vote && sending.previous == previous);
        let mut sending = under_way.unwrap_or_else(|| {
            let fresh = || Way { links: self.links.clone(), target: self.target, stream: None };
            let mut way = self.way.take().unwrap_or_else(fresh);
            let answer = tokio::spawn(async move {
                let answer = way.append(request, longest).await;
                (way, answer)
            });
            Sending { vote, previous, last: wanted, answer }
        });
        match timeout(patience, &mut sending.answer).await {
            Ok(Ok((way, answer))) => {
                self.way = Some(way);
                match answer {
                    Ok(AppendEntriesResponse::Success) if sending.last < wanted => {
                        Ok(AppendEntriesResponse::PartialSuccess(sending.last))
                    }
                    answer => answer,
                }
            }
            Ok(Err(_)) => Err(LinkError::Lost { address: String::new(), why: "the member ends".to_owned() }),
            Err(_) => {
                self.sending = Some(sending);
                let addresses = self.links.addresses(self.target);
                addresses.iter().for_each(|address| self.links.suspect(address));
                Err(LinkError::Late { address: addresses.into_iter().next().unwrap_or_default() })
            }
        }
    }
}

fn senseless(stream: &RaftStream) -> LinkError {
    LinkError::Lost { address: stream.address().to_owned(), why: "an answer of no known kind".to_owned() }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

impl RaftNetwork<TypeConfig> for MemberNetwork {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed> {
        // Nearly all of openraft's patience, so that the answer to why is this one's.
        let patience = option.hard_ttl() * 9 / 10;
        let answered = match request.entries.is_empty() {
            true => self.signs.send(request, patience, SIGN).await,
            false => self.entries.send(request, patience, ENTRIES).await,
        };
        answered.map_err(|error| unreachable(&error))
    }

    async fn vote(&mut self, request: VoteRequest<u64>, option: RPCOption) -> Result<VoteResponse<u64>, Failed> {
        let message = Request::AskVote(message::ask_vote_message(&request));
        let answered = match self.others.ask(message, option.hard_ttl() * 9 / 10).await {
            Ok(Response::Voted(answer)) => message::voted(&answer).map_err(|error| self.others.malformed(error)),
            Ok(other) => Err(self.others.unexpected(&other)),
            Err(error) => Err(error),
        };
        answered.map_err(|error| unreachable(&error))
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<RaftError<u64, InstallSnapshotError>>> {
        let message = Request::SnapshotPart(message::snapshot_part_message(request));
        let answered = match self.others.ask(message, option.hard_ttl() * 9 / 10).await {
            Ok(Response::SnapshotTaken(answer)) => {
                message::snapshot_taken(answer).map_err(|error| self.others.malformed(error))
            }
            Ok(other) => Err(self.others.unexpected(&other)),
            Err(error) => Err(error),
        };
        match answered {
            Ok(Ok(taken)) => Ok(taken),
            Ok(Err(mismatch)) => Err(RPCError::RemoteError(RemoteError::new(
                self.others.target,
                RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch)),
            ))),
            Err(error) => Err(unreachable(&error)),
        }
    }

    fn backoff(&self) -> Backoff {
        let pauses = PAUSES_MS.into_iter().chain(std::iter::repeat(LONGEST_PAUSE_MS));
        Backoff::new(pauses.map(Duration::from_millis))
    }
}

/// The network of a member that is alone: it reaches nobody.
#[derive(Debug, Clone, Copy)]
pub struct NoNetwork;

fn nobody<E: std::error::Error>() -> RPCError<u64, EmptyNode, E> {
    let error = io::Error::new(io::ErrorKind::NotConnected, "this member of the metadata quorum has no network");
    RPCError::Unreachable(Unreachable::new(&error))
}

impl RaftNetworkFactory<TypeConfig> for NoNetwork {
    type Network = NoNetwork;

    async fn new_client(&mut self, _target: u64, _node: &EmptyNode) -> NoNetwork {
        NoNetwork
    }
}

impl RaftNetwork<TypeConfig> for NoNetwork {
    async fn append_entries(
        &mut self,
        _request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed> {
        Err(nobody())
    }

    async fn install_snapshot(
        &mut self,
        _request: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<RaftError<u64, InstallSnapshotError>>> {
        Err(nobody())
    }

    async fn vote(&mut self, _request: VoteRequest<u64>, _option: RPCOption) -> Result<VoteResponse<u64>, Failed> {
        Err(nobody())
    }
}
