//! Who may ask what of a member: nobody speaks in another one's name. Pure.
//!
//! Whoever proposes for people may be any broker, for people ask any broker. What a broker says of itself (that it starts, is there,
//! stops, who is in sync with what it leads, ids that are to be its own) is bound to the certificate that it shows; what a controller
//! decides is never forwarded, so that it is nobody's over the wire.
//!
//! Whoever leads, stands for election or sends a snapshot is a member of the quorum. A member that hears its leader knows
//! who that may be; one that has been cut off, or is new, may lack the entry that took somebody in, and believes whoever shows a
//! certificate of this cluster.
//!
//! Owns: those rules. Refuses: whose certificate it is ([`crate::session`]), which broker registered as which member
//! ([`super::server`]). Read next: [`super::server`].

use super::super::command::{
    AlterPartition, Command, RaftPropose, RaftRequest, RaftVote, command::Command as Kind, raft_request::Request,
};
use super::Membership;
use openraft::ServerState;

/// Why a question is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Improper {
    #[error("a member speaks for itself alone")]
    OfAnother,
    #[error(
        "only a leader takes the controller's office, and by itself; and what a controller decides it proposes itself"
    )]
    OfController,
    #[error("topics are imported by a broker that is alone")]
    OfOneAlone,
    #[error("only members lead the metadata quorum, and this is none of them")]
    Stranger,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    pub(super) node_id: u64,
    /// Whose certificate was shown, where certificates say that.
    pub(super) broker_id: Option<i32>,
}

impl Asker {
    fn is(&self, broker_id: i32) -> bool {
        self.broker_id.is_none_or(|shown| shown == broker_id)
    }

    fn leads(&self, alter: &AlterPartition) -> bool {
        alter.leader.as_ref().is_none_or(|leader| self.is(leader.broker_id))
    }

    /// Whether it may ask this. `members`: where it is known who they are.
    pub(super) fn check(&self, request: &RaftRequest, members: Option<&Membership>) -> Result<(), Improper> {
        let Some(request) = &request.request else { return Ok(()) };
        let is_own = |vote: &Option<RaftVote>| vote.as_ref().is_none_or(|vote| vote.node_id == self.node_id);
        let is_member = || members.is_none_or(|members| members.get_node(&self.node_id).is_some());
        let leads = |vote| match is_own(vote) {
            true if is_member() => Ok(()),
            true => Err(Improper::Stranger),
            false => Err(Improper::OfAnother),
        };
        match request {
            Request::Append(asked) => leads(&asked.vote),
            Request::AskVote(asked) => leads(&asked.vote),
            Request::SnapshotPart(asked) => leads(&asked.vote),
            Request::Heartbeat(heartbeat) if !self.is(heartbeat.broker_id) => Err(Improper::OfAnother),
            Request::Propose(RaftPropose { command: Some(command), .. }) => self.check_command(command),
            Request::Heartbeat(_) | Request::Propose(_) | Request::ReadIndex(_) | Request::ChangeMembers(_) => Ok(()),
        }
    }

    fn check_command(&self, command: &Command) -> Result<(), Improper> {
        if command.controller_epoch != 0 {
            return Err(Improper::OfController);
        }
        let is_own = match &command.command {
            Some(Kind::RegisterBroker(register)) => {
                self.is(register.broker_id) && [0, self.node_id].contains(&register.node_id)
            }
            Some(Kind::DrainBroker(drain)) => self.is(drain.broker_id),
            Some(Kind::AllocateProducerIds(allocate)) => self.is(allocate.broker_id),
            Some(Kind::AlterPartition(alter)) => self.leads(alter),
            Some(Kind::AlterPartitions(alters)) => alters.partitions.iter().all(|alter| self.leads(alter)),
            Some(
                Kind::BecomeController(_)
                | Kind::FenceBroker(_)
                | Kind::UnfenceBroker(_)
                | Kind::FenceReplicas(_)
                | Kind::RestoreReplicas(_),
            ) => return Err(Improper::OfController),
            Some(Kind::ImportTopics(_)) => return Err(Improper::OfOneAlone),
            // A person's, whichever broker was asked; of a producer, which asks any broker too; or of no known kind.
            Some(
                Kind::CreateTopic(_)
                | Kind::AlterTopic(_)
                | Kind::AddPartitions(_)
                | Kind::DeleteTopic(_)
                | Kind::EmptyBroker(_)
                | Kind::RemoveBroker(_)
                | Kind::RaiseFeatureLevel(_)
                | Kind::ElectLeaders(_)
                | Kind::Reassign(_)
                | Kind::CancelReassignment(_)
                | Kind::NextProducerEpoch(_),
            )
            | None => true,
        };
        if is_own { Ok(()) } else { Err(Improper::OfAnother) }
    }
}

/// What a member has to go by, to know who the members are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing<'a> {
    pub(super) node_id: u64,
    pub(super) membership: &'a Membership,
    pub(super) state: ServerState,
    /// How long ago most of them answered it, if it leads.
    pub(super) acknowledged_ms: Option<u64>,
    /// How long ago it took something of a leader that is a member as far as it knew.
    pub(super) led_ms: Option<u64>,
}

impl Standing<'_> {
    /// Who the members are, where it knows: for so long after it led or was led, as nobody was taken in meanwhile and leads already.
    pub(super) fn members(&self, longest_ms: u64) -> Option<&Membership> {
        let is_late = |ms: Option<u64>| ms.is_none_or(|ms| ms > longest_ms);
        let votes_alone = self.membership.voter_ids().all(|voter| voter == self.node_id);
        let knows = match self.state {
            // Nobody is taken in without its vote.
            ServerState::Leader if votes_alone => true,
            ServerState::Leader => !is_late(self.acknowledged_ms),
            _ => !is_late(self.led_ms),
        };
        knows.then_some(self.membership)
    }
}

#[cfg(test)]
#[path = "asker_tests.rs"]
mod tests;
