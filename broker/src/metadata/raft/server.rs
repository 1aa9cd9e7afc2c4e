//! The answering side of the quorum's streams.
//!
//! A stream begins with a hello that names the cluster, who asks and who is meant, and is refused by name if one of the first
//! and the last is wrong; then come questions, each answered before the next. What is not the asker's to say ([`super::asker`]), and what
//! a member that was elected could not have said ([`super::message`]), is refused.
//!
//! Owns: deadlines of this side, and what openraft is given. Refuses: connections that are not the quorum's (whoever accepts
//! knows them by their first frame). Read next: [`super::network`], which asks.

use super::super::command::{
    RaftFailure, RaftMembersChanged, RaftPropose, RaftProposed, RaftReadAt, RaftRequest, RaftResponse,
    raft_failure::Kind, raft_request::Request, raft_response::Response,
};
use super::asker::{Asker, Improper, Standing};
use super::convert::{self, Malformed};
use super::forward::{Asked, Attempt, Known};
use super::heartbeat::Hearing;
use super::links::Links;
use super::node::RaftNode;
use super::{TypeConfig, message};
use crate::stream::{Frames, StreamError, send_within};
use headwater_proto::ErrorCode;
use headwater_proto::limits::{MAX_OPEN_FRAME_BYTES, MAX_RAFT_FRAME_BYTES};
use headwater_proto::wire::{self, Open, OpenRaft, RaftOpened, open};
use openraft::error::{InstallSnapshotError, RaftError};
use openraft::raft::AppendEntriesResponse;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// Time for the first frame of a stream.
const FIRST_FRAME: Duration = Duration::from_secs(2);
/// Time for a frame that has begun.
const FRAME: Duration = Duration::from_secs(10);
/// Time for an answer to be read.
const UNREAD: Duration = Duration::from_secs(10);
/// The longest that a question is worked on.
const LONGEST: Duration = Duration::from_secs(60);
/// How long after it led, or was led, a member knows who the members are.
const KNOWS_MEMBERS_MS: u64 = 5_000;

/// Answers other members for this one.
#[derive(Clone, Debug)]
pub struct RaftServer {
    node: RaftNode,
    links: Links,
    hearing: Hearing,
}

/// The first stream of a connection, which told whose it is.
pub(crate) struct FirstStream {
    pub(crate) hello: OpenRaft,
    pub(crate) send: quinn::SendStream,
    pub(crate) frames: Frames<Open>,
}

impl RaftServer {
    /// Answers for this member, which uses these connections itself.
    pub fn new(node: RaftNode, links: Links, hearing: Hearing) -> RaftServer {
        RaftServer { node, links, hearing }
    }

    /// Serves the streams of a connection that is the quorum's alone, until it ends. To be run on the quorum's thread.
    /// `broker_id`: whose certificate was shown, where certificates say that.
    pub async fn serve(&self, connection: quinn::Connection, broker_id: Option<i32>) {
        self.serve_from(connection, broker_id, None).await;
    }

    /// As [`serve`](Self::serve), of a connection of which one stream was accepted before.
    pub(crate) async fn serve_from(
        &self,
        connection: quinn::Connection,
        broker_id: Option<i32>,
        first: Option<FirstStream>,
    ) {
        let mut streams = JoinSet::new();
        if let Some(FirstStream { hello, mut send, frames }) = first {
            let server = self.clone();
            streams.spawn(async move {
                let served = server.serve_stream(hello, broker_id, &mut send, frames).await;
                end(send, served);
            });
        }
        while let Ok((mut send, recv)) = connection.accept_bi().await {
            let server = self.clone();
            streams.spawn(async move {
                let mut frames = Frames::<Open>::new(recv, MAX_OPEN_FRAME_BYTES, 0, FRAME);
                let first = timeout(FIRST_FRAME, frames.message()).await;
                let served = match first.unwrap_or(Err(StreamError::Deadline("the first frame"))) {
                    Ok(Some(Open { stream: Some(open::Stream::Raft(hello)) })) => {
                        server.serve_stream(hello, broker_id, &mut send, frames).await
                    }
                    Ok(None) => Ok(()),
                    Ok(Some(_)) => {
                        let why = "this connection is for members of the metadata quorum".to_owned();
                        Err(StreamError::Refused(ErrorCode::InvalidRequest, why))
                    }
                    Err(error) => Err(error),
                };
                end(send, served);
            });
            while streams.try_join_next().is_some() {}
        }
        // Whatever they wait for, nobody is left to hear of it.
        streams.shutdown().await;
    }

    /// Serves a stream after its first frame.
    async fn serve_stream(
        &self,
        hello: OpenRaft,
        broker_id: Option<i32>,
        send: &mut quinn::SendStream,
        frames: Frames<Open>,
    ) -> Result<(), StreamError> {
        let refusal = self.refusal(&hello, broker_id);
        let opened = RaftOpened { error: refusal.clone(), node_id: self.links.node_id(), start: self.links.start() };
        send_within(send, &opened, UNREAD, "an answer").await?;
        if let Some(refusal) = refusal {
            let from = format!("{:x}", hello.from_node_id);
            if refusal.code == ErrorCode::WrongMember.number() {
                // It looks for another one, or does not know yet that this disk is new.
                tracing::debug!(from, error = refusal.message, "a member looks for another one");
            } else {
                tracing::warn!(from, error = refusal.message, "a member was refused");
            }
            // An error means that it was reset before.
            drop(send.finish());
            return Ok(());
        }
        self.links.say(hello.from_node_id, &hello.from_address);
        let mut frames = frames.followed_by::<RaftRequest>(MAX_RAFT_FRAME_BYTES, 0)?;
        let asker = Asker { node_id: hello.from_node_id, broker_id };
        let mut told = false;
        while let Some(request) = frames.message().await? {
            let answer = match self.check(&asker, &request) {
                Ok(()) => self.answer(request, asker).await,
                Err(improper) => {
                    if !std::mem::replace(&mut told, true) {
                        let from = format!("{:x}", asker.node_id);
                        tracing::warn!(from, broker_id, error = %improper, "what a member asked for was refused");
                    }
                    Response::Failure(senseless(&improper))
                }
            };
            let answer = RaftResponse { response: Some(answer) };
            send_within(send, &answer, UNREAD, "an answer").await?;
        }
        drop(send.finish());
        Ok(())
    }

    fn refusal(&self, hello: &OpenRaft, broker_id: Option<i32>) -> Option<wire::Error> {
        let (ours, us) = (self.links.cluster_id(), self.links.node_id());
        if hello.cluster_id != ours {
            let why = format!("this is cluster {ours}, not {}", hello.cluster_id);
            return Some(wire::Error::new(ErrorCode::WrongCluster, why));
        }
        if hello.to_node_id != 0 && hello.to_node_id != us {
            let why = format!("member {us:x} of the metadata quorum is here, not {:x}", hello.to_node_id);
            return Some(wire::Error::new(ErrorCode::WrongMember, why));
        }
        if hello.from_node_id == us {
            // The list in the configuration may name this broker too.
            return Some(wire::Error::new(ErrorCode::WrongMember, "this is the member itself"));
        }
        if hello.from_node_id == 0 {
            return Some(wire::Error::new(ErrorCode::InvalidRequest, "a member that does not say who it is"));
        }
        if let Some(why) = self.links.older_copy(hello.from_node_id, hello.from_start.as_ref()) {
            return Some(wire::Error::new(ErrorCode::OlderDisk, why));
        }
        match (broker_id, self.links.broker_of(hello.from_node_id)) {
            (Some(shown), Some(registered)) if shown != registered => {
                let from = hello.from_node_id;
                let why = format!("member {from:x} of the metadata quorum is broker {registered}, not broker {shown}");
                Some(wire::Error::new(ErrorCode::ClusterAuthorizationFailed, why))
            }
            _ => None,
        }
    }

    fn check(&self, asker: &Asker, request: &RaftRequest) -> Result<(), Improper> {
        let metrics = self.node.raft.metrics();
        let now = metrics.borrow();
        let standing = Standing {
            node_id: self.links.node_id(),
            membership: now.membership_config.membership(),
            state: now.state,
            acknowledged_ms: now.millis_since_quorum_ack,
            led_ms: self.node.led_ms(),
        };
        asker.check(request, standing.members(KNOWS_MEMBERS_MS))
    }

    async fn answer(&self, request: RaftRequest, asker: Asker) -> Response {
        let patience = match request.timeout_ms {
            0 => LONGEST,
            asked => Duration::from_millis(asked.into()).min(LONGEST),
        };
        let deadline = Instant::now() + patience;
        let answered = match request.request {
            Some(Request::Heartbeat(heartbeat)) => Ok(Response::Heard(self.hearing.hear(&self.node, &heartbeat))),
            Some(Request::Append(asked)) => self.append(asked, asker.node_id).await,
            Some(Request::AskVote(asked)) => match message::ask_vote(&asked) {
                Ok(asked) => match self.node.raft.vote(asked).await {
                    Ok(voted) => Ok(Response::Voted(message::voted_message(&voted))),
                    Err(error) => Err(ended(&error)),
                },
                Err(error) => Err(senseless(&error)),
            },
            Some(Request::SnapshotPart(asked)) => match message::snapshot_part(asked) {
                Ok(asked) => self.take_part(asked).await,
                Err(error) => Err(senseless(&error)),
            },
            Some(Request::Propose(RaftPropose { command: Some(command), urgent })) => {
                self.do_as_leader(Asked::Propose { command, urgent }, deadline).await
            }
            Some(Request::ReadIndex(_)) => self.do_as_leader(Asked::ReadAt, deadline).await,
            Some(Request::ChangeMembers(asked)) => match message::change(&asked) {
                Ok(change) => {
                    self.links.say(asked.node_id, &asked.address);
                    self.do_as_leader(Asked::Members { change, address: asked.address }, deadline).await
                }
                Err(error) => Err(senseless(&error)),
            },
            Some(Request::Propose(RaftPropose { command: None, .. })) | None => {
                Err(senseless(&Malformed("a request of no known kind".to_owned())))
            }
        };
        answered.unwrap_or_else(Response::Failure)
    }

    async fn append(&self, asked: super::super::command::RaftAppend, leader: u64) -> Result<Response, RaftFailure> {
        let asked = message::append(asked).map_err(|error| senseless(&error))?;
        let appended = self.node.raft.append_entries(asked).await.map_err(|error| ended(&error))?;
        if !matches!(appended, AppendEntriesResponse::HigherVote(_)) {
            self.node.led_by(leader);
        }
        Ok(Response::Appended(message::appended_message(&appended)))
    }

    async fn take_part(
        &self,
        asked: openraft::raft::InstallSnapshotRequest<TypeConfig>,
    ) -> Result<Response, RaftFailure> {
        let taken = match self.node.raft.install_snapshot(asked).await {
            Ok(taken) => message::snapshot_taken_message(Ok(&taken)),
            Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch))) => {
                message::snapshot_taken_message(Err(&mismatch))
            }
            Err(RaftError::Fatal(fatal)) => return Err(ended(&fatal)),
        };
        Ok(Response::SnapshotTaken(taken))
    }

    /// Does what a person or a broker asked for, if this member leads.
    async fn do_as_leader(&self, asked: Asked, deadline: Instant) -> Result<Response, RaftFailure> {
        match self.node.answer_as_leader(&asked, deadline).await {
            Attempt::Done(Ok(known)) => Ok(match known {
                Known::Proposed(index, outcome) => {
                    Response::Proposed(RaftProposed { index, outcome: Some(message::outcome_message(&outcome)) })
                }
                Known::ReadAt(last) => {
                    Response::ReadAt(RaftReadAt { last: last.as_ref().map(convert::log_id_message) })
                }
                Known::Members(members) => {
                    let membership = Some(convert::membership_message(&members));
                    Response::MembersChanged(RaftMembersChanged { membership })
                }
            }),
            attempt => Err(self.failure(attempt)),
        }
    }

    fn failure(&self, attempt: Attempt<Known>) -> RaftFailure {
        match attempt {
            Attempt::NotLeader(leader) => RaftFailure {
                kind: Kind::NotLeader.into(),
                message: "this member does not lead the metadata quorum".to_owned(),
                leader_node_id: leader.unwrap_or(0),
                leader_address: leader.and_then(|id| self.links.addresses(id).into_iter().next()).unwrap_or_default(),
                ..RaftFailure::default()
            },
            Attempt::Unknown | Attempt::Done(Ok(_)) => RaftFailure {
                kind: Kind::UnknownOutcome.into(),
                message: "the metadata quorum did not answer in time".to_owned(),
                ..RaftFailure::default()
            },
            Attempt::Done(Err(error)) => RaftFailure {
                kind: if error.is_refusal() { Kind::Refused } else { Kind::Ended }.into(),
                code: error.code().number(),
                message: error.to_string(),
                producer_epochs_exhausted: error.is_out_of_producer_epochs(),
                ..RaftFailure::default()
            },
        }
    }
}

/// Ends a stream that was served.
fn end(mut send: quinn::SendStream, served: Result<(), StreamError>) {
    if let Err(error) = served {
        tracing::debug!(%error, "a stream of the quorum ended");
        // An error means that it is closed already.
        drop(send.reset(error.reset_code().number().into()));
    }
}

fn ended(error: &dyn std::error::Error) -> RaftFailure {
    RaftFailure { kind: Kind::Ended.into(), message: error.to_string(), ..RaftFailure::default() }
}

fn senseless(error: &dyn std::error::Error) -> RaftFailure {
    RaftFailure { kind: Kind::UnknownRequest.into(), message: error.to_string(), ..RaftFailure::default() }
}
