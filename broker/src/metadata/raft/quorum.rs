//! Changing who votes and who follows: begun anywhere, done by the leader.
//!
//! A quorum begins with its first member alone. The others follow it, and come to vote all in one change ([`RaftNode::form`]).
//! A broker whose disk is new is a new member: it asks to follow ([`RaftNode::join`]) and takes its old place by one change.
//!
//! Owns: the order of the steps, and who is held to answer. Refuses: which changes are right ([`super::members`]).
//! Read next: [`super::forward`].

use super::super::handle::MetadataError;
use super::Membership;
use super::forward::{Asked, Attempt, Known};
use super::members::{Change, Members, MembersRefusal, Step};
use super::node::{ELECTION_TIMEOUT_MS, RaftNode};
use openraft::ServerState;
use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout_at};

/// Whoever has not answered within this time is not there.
const ANSWERS: Duration = Duration::from_millis(ELECTION_TIMEOUT_MS);
/// A member that lacks no more entries than this has caught up.
const CAUGHT_UP_ENTRIES: u64 = 1000;
/// Time for a member that has just been taken in to be heard of.
const COMES: Duration = Duration::from_secs(3);
/// Time for another member to lead.
const ASIDE: Duration = Duration::from_secs(5);
/// How long nothing is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// What is to become of the members.
#[derive(Debug, Clone)]
enum Wanted {
    Change(Change),
    AllVote(BTreeSet<u64>),
    /// What a leader before has begun.
    Finished,
}

/// While it lasts, a leader gives no sign of itself, and takes nothing.
struct Aside<'a>(&'a RaftNode);

impl Aside<'_> {
    fn of(node: &RaftNode) -> Aside<'_> {
        node.aside.store(true, Ordering::Release);
        node.raft.runtime_config().heartbeat(false);
        Aside(node)
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        self.0.raft.runtime_config().heartbeat(true);
        self.0.aside.store(false, Ordering::Release);
    }
}

impl Wanted {
    /// The voter that would be none any more.
    fn leaver(&self) -> Option<u64> {
        match self {
            Wanted::Change(change) => change.leaver(),
            Wanted::AllVote(_) | Wanted::Finished => None,
        }
    }
}

impl RaftNode {
    /// Changes who votes and who follows, whoever leads.
    ///
    /// # Errors
    /// [`MetadataError`]: where it is refused, by name, nothing changed.
    pub async fn change_members(&self, change: Change, deadline: Instant) -> Result<(), MetadataError> {
        self.change_by_leader(change, "", deadline).await
    }

    /// Asks the quorum to take this member in, and follows it when this returns. To be tried again is all right.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub async fn join(&self, deadline: Instant) -> Result<(), MetadataError> {
        let address = self.links.as_ref().map(|links| links.own_address().to_owned()).unwrap_or_default();
        self.change_by_leader(Change::AddObserver(self.node_id()), &address, deadline).await?;
        let (mut applied, node_id) = (self.applied(), self.node_id());
        let follows = applied.wait_for(|applied| applied.membership.membership().get_node(&node_id).is_some());
        match timeout_at(deadline, follows).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MetadataError::ShuttingDown),
            Err(_) => Err(MetadataError::NoLeader),
        }
    }

    /// Makes a quorum of this member, which leads, and of these, by where they are reached: they vote when this returns. To be
    /// tried again is all right.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub async fn form(&self, others: &[(u64, String)], deadline: Instant) -> Result<(), MetadataError> {
        for (node_id, address) in others {
            if let Some(links) = &self.links {
                links.say(*node_id, address);
            }
            self.change_by_leader(Change::AddObserver(*node_id), address, deadline).await?;
        }
        let ids = others.iter().map(|(node_id, _)| *node_id).chain([self.node_id()]).collect();
        match self.make(Wanted::AllVote(ids), deadline).await {
            Attempt::Done(made) => made.map(drop),
            Attempt::NotLeader(_) => Err(MetadataError::NoLeader),
            Attempt::Unknown => Err(MetadataError::TimedOut),
        }
    }

    async fn change_by_leader(&self, change: Change, address: &str, deadline: Instant) -> Result<(), MetadataError> {
        // What was done already is done by doing nothing.
        self.until_known(Asked::Members { change, address: address.to_owned() }, deadline).await.map(drop)
    }

    /// Changes who votes and who follows, as the leader, if this member is.
    pub(super) async fn change_as_leader(&self, change: Change, deadline: Instant) -> Attempt<Known> {
        self.make(Wanted::Change(change), deadline).await
    }

    /// Finishes what a leader before this one has begun.
    pub(super) async fn finish_change(&self, deadline: Instant) {
        if let Attempt::Done(Err(error)) = self.make(Wanted::Finished, deadline).await {
            tracing::warn!(%error, "a change of the metadata quorum that was begun is not finished yet");
        }
    }

    async fn make(&self, wanted: Wanted, deadline: Instant) -> Attempt<Known> {
        let Ok(_one_at_a_time) = timeout_at(deadline, self.changing.lock()).await else {
            return Attempt::NotLeader(None);
        };
        let began = Instant::now();
        loop {
            let Some(members) = self.members(began) else { return Attempt::NotLeader(self.leader()) };
            let unfinished = members.unfinished();
            let is_wanted = unfinished.is_none();
            let next = match (&wanted, unfinished) {
                (_, Some(step)) => Ok(Some(step)),
                (Wanted::Change(change), None) => members.step(*change),
                (Wanted::AllVote(ids), None) => members.all_vote(ids),
                (Wanted::Finished, None) => Ok(None),
            };
            match next {
                Ok(None) => return Attempt::Done(Ok(Known::Members(self.membership()))),
                // openraft's leader leads on while it is a member at all, and does not bear to be none.
                Ok(Some(_)) if is_wanted && wanted.leaver() == Some(self.node_id()) => {
                    return self.step_aside(deadline).await;
                }
                Ok(Some(step)) => match self.write_step(step, deadline).await {
                    Some(Attempt::Done(Ok(_))) if !is_wanted => {}
                    Some(ended) => return ended,
                    None => {}
                },
                // A leader that has just begun has not heard of everybody; a member that has just come has to catch up.
                Err(refusal) => {
                    let is_young = began.elapsed() < ANSWERS;
                    let comes = match &refusal {
                        // Whoever forms a quorum waits for all of them.
                        MembersRefusal::Behind(_) if matches!(wanted, Wanted::AllVote(_)) => true,
                        MembersRefusal::Behind(id) => began.elapsed() < COMES || self.answers(*id, began),
                        MembersRefusal::LosesQuorum { .. } => is_young,
                        _ => false,
                    };
                    if !comes || Instant::now() >= deadline {
                        return Attempt::Done(Err(refusal.into()));
                    }
                }
            }
            if Instant::now() >= deadline {
                return Attempt::Unknown;
            }
            sleep_until((Instant::now() + PAUSE).min(deadline)).await;
        }
    }

    /// Has another member lead.
    async fn step_aside(&self, deadline: Instant) -> Attempt<Known> {
        tracing::info!("this member steps aside: another one is to lead the metadata quorum");
        let _aside = Aside::of(self);
        let (mut metrics, node_id) = (self.raft.metrics(), self.node_id());
        let leads = metrics.wait_for(|now| now.current_leader.is_some_and(|leader| leader != node_id));
        match timeout_at(deadline.min(Instant::now() + ASIDE), leads).await {
            Ok(Ok(now)) => Attempt::NotLeader(now.current_leader),
            Ok(Err(_)) => Attempt::Done(Err(MetadataError::ShuttingDown)),
            Err(_) => Attempt::Done(Err(MembersRefusal::Leads(node_id).into())),
        }
    }

    /// Writes one step; `None`: another one is under way still.
    async fn write_step(&self, step: Step, deadline: Instant) -> Option<Attempt<Known>> {
        {
            // Whoever proposes alone is done before others may lead, and nobody does any more.
            let Ok(_turn) = timeout_at(deadline, self.turn.lock()).await else { return Some(Attempt::NotLeader(None)) };
            self.alone.store(false, Ordering::Release);
        }
        tracing::info!(change = ?step.change, "the members of the metadata quorum change");
        // Its second half follows though nobody may wait for it any more.
        let raft = self.raft.clone();
        let writing = tokio::spawn(async move { raft.change_membership(step.change, step.retain).await });
        Some(match timeout_at(deadline, writing).await {
            Err(_) | Ok(Err(_)) => Attempt::Unknown,
            Ok(Ok(Ok(written))) => Attempt::Done(Ok(Known::Members(written.membership.unwrap_or_default()))),
            Ok(Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))))) => Attempt::Unknown,
            Ok(Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))))) => match error {
                ChangeMembershipError::InProgress(_) => return None,
                error => Attempt::Done(Err(MetadataError::Stopped(error.to_string()))),
            },
            Ok(Ok(Err(RaftError::Fatal(fatal)))) => Attempt::Done(Err(self.ended(&fatal).await)),
        })
    }

    /// Who votes and who follows, as this member knows it.
    pub fn membership(&self) -> Membership {
        self.raft.metrics().borrow().membership_config.membership().clone()
    }

    /// Who is there, and has answered since then, if this member leads. Who answered before may be dead by now.
    fn members(&self, since: Instant) -> Option<Members> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow();
        if now.state != ServerState::Leader || now.running_state.is_err() {
            return None;
        }
        let membership = now.membership_config.membership();
        let all: BTreeSet<u64> = membership.nodes().map(|(id, _)| *id).collect();
        let needed = now.last_log_index.unwrap_or(0).saturating_sub(CAUGHT_UP_ENTRIES);
        let has_most = |id: &u64| {
            let kept = now.replication.as_ref().and_then(|kept| kept.get(id)).copied().flatten();
            kept.is_some_and(|kept| kept.index >= needed)
        };
        let is_up = |id: &u64| *id == self.node_id() || (self.answers(*id, since) && has_most(id));
        let caught_up = all.iter().copied().filter(is_up).collect();
        Some(Members { voters: membership.get_joint_config().clone(), all, caught_up })
    }

    /// Whether another member has answered this one since then.
    pub(crate) fn answers(&self, node_id: u64, since: Instant) -> bool {
        self.links.as_ref().is_some_and(|links| links.has_answered(node_id, since))
    }
}
