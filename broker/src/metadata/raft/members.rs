//! Who votes and who only follows: which changes of that are made, as one change of the membership each. Pure.
//!
//! A change that is made already is made by doing nothing, so that each can be asked for again. A change is refused by name
//! where those who would vote then, and answer now, are no majority of them: the quorum would be lost by it. A change of
//! voters goes through a joint quorum; one that was begun by a leader that is gone is finished before another one begins.
//!
//! Owns: those rules. Refuses: how a change is written; who answers (whoever leads knows). Read next: [`super::quorum`].

use openraft::{ChangeMembers, EmptyNode};
use std::collections::{BTreeMap, BTreeSet};

/// What somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The member follows the log from now on.
    AddObserver(u64),
    /// The observer votes from now on.
    Promote(u64),
    /// The voter only follows from now on.
    Demote(u64),
    /// The member neither votes nor follows.
    Remove(u64),
    /// An observer votes in the place of a voter, which goes.
    Replace {
        /// Who goes.
        voter: u64,
        /// Who comes.
        by: u64,
    },
}

/// Why a change is refused: nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MembersRefusal {
    /// Nobody of that id follows.
    #[error("member {0:x} does not follow the metadata log: add it as an observer first")]
    UnknownMember(u64),
    /// It has not what the others have.
    #[error("member {0:x} has not caught up with the metadata log, or does not answer")]
    Behind(u64),
    /// There would be no voter.
    #[error("member {0:x} is the only voter: promote another one first")]
    LastVoter(u64),
    /// The voters that answer would be no majority.
    #[error(
        "the metadata quorum would be lost: of the {voters} voters there would be, {answering} answer, and a majority is {majority}"
    )]
    LosesQuorum {
        /// How many would vote.
        voters: usize,
        /// How many of them answer.
        answering: usize,
        /// How many have to.
        majority: usize,
    },
    /// It would vote and go.
    #[error("member {0:x} cannot take its own place")]
    OwnPlace(u64),
    /// It leads, and no other one took that over.
    #[error("member {0:x} leads the metadata quorum, and no other one took that over: it votes on")]
    Leads(u64),
    /// Another change is on its way.
    #[error("another change of the metadata quorum is under way")]
    UnderWay,
}

impl Change {
    /// The voter that would be none any more.
    pub(super) fn leaver(&self) -> Option<u64> {
        match *self {
            Change::Demote(id) | Change::Remove(id) | Change::Replace { voter: id, .. } => Some(id),
            Change::AddObserver(_) | Change::Promote(_) => None,
        }
    }
}

/// Who is there, as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// Who votes: one set, or two in the middle of a change, of which the last is to be.
    pub voters: Vec<BTreeSet<u64>>,
    /// Voters and observers.
    pub all: BTreeSet<u64>,
    /// Who answers and has caught up, the leader itself among them.
    pub caught_up: BTreeSet<u64>,
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The change.
    pub change: ChangeMembers<u64, EmptyNode>,
    /// Whether a voter that votes no more follows on.
    pub retain: bool,
}

impl Members {
    fn last_voters(&self) -> BTreeSet<u64> {
        self.voters.last().cloned().unwrap_or_default()
    }

    /// The change that a leader before this one has begun, if there is one: it comes first.
    pub fn unfinished(&self) -> Option<Step> {
        (self.voters.len() > 1)
            .then(|| Step { change: ChangeMembers::ReplaceAllVoters(self.last_voters()), retain: true })
    }

    /// What brings a change about; `None`: nothing needs to be done.
    ///
    /// # Errors
    /// [`MembersRefusal`].
    pub fn step(&self, change: Change) -> Result<Option<Step>, MembersRefusal> {
        if self.voters.len() > 1 {
            return Err(MembersRefusal::UnderWay);
        }
        let voters = self.last_voters();
        match change {
            Change::AddObserver(id) if self.all.contains(&id) => Ok(None),
            Change::AddObserver(id) => {
                let change = ChangeMembers::AddNodes(BTreeMap::from([(id, EmptyNode {})]));
                Ok(Some(Step { change, retain: true }))
            }
            Change::Promote(id) if voters.contains(&id) => Ok(None),
            Change::Promote(id) => {
                self.check_can_vote(id)?;
                self.vote(voters.iter().copied().chain([id]).collect(), true).map(Some)
            }
            Change::Demote(id) if !self.all.contains(&id) => Err(MembersRefusal::UnknownMember(id)),
            Change::Demote(id) if !voters.contains(&id) => Ok(None),
            Change::Demote(id) => self.without(&voters, id, true).map(Some),
            Change::Remove(id) if !self.all.contains(&id) => Ok(None),
            Change::Remove(id) if !voters.contains(&id) => {
                Ok(Some(Step { change: ChangeMembers::RemoveNodes(BTreeSet::from([id])), retain: false }))
            }
            Change::Remove(id) => self.without(&voters, id, false).map(Some),
            Change::Replace { voter, by } if voter == by => Err(MembersRefusal::OwnPlace(voter)),
            Change::Replace { voter, by } if voters.contains(&by) && !voters.contains(&voter) => {
                // It votes already; whoever was to go may follow still.
                self.step(Change::Remove(voter))
            }
            Change::Replace { voter, .. } if !voters.contains(&voter) => Err(MembersRefusal::UnknownMember(voter)),
            Change::Replace { voter, by } => {
                self.check_can_vote(by)?;
                self.vote(voters.iter().copied().filter(|id| *id != voter).chain([by]).collect(), false).map(Some)
            }
        }
    }

    /// All of these vote from now on, in one change: how a quorum begins.
    ///
    /// # Errors
    /// [`MembersRefusal`].
    pub fn all_vote(&self, ids: &BTreeSet<u64>) -> Result<Option<Step>, MembersRefusal> {
        if self.voters.len() > 1 {
            return Err(MembersRefusal::UnderWay);
        }
        let voters = self.last_voters();
        if ids.is_subset(&voters) {
            return Ok(None);
        }
        ids.difference(&voters).try_for_each(|id| self.check_can_vote(*id))?;
        self.vote(voters.union(ids).copied().collect(), true).map(Some)
    }

    fn without(&self, voters: &BTreeSet<u64>, id: u64, retain: bool) -> Result<Step, MembersRefusal> {
        if voters.len() == 1 {
            return Err(MembersRefusal::LastVoter(id));
        }
        self.vote(voters.iter().copied().filter(|other| *other != id).collect(), retain)
    }

    fn check_can_vote(&self, id: u64) -> Result<(), MembersRefusal> {
        if !self.all.contains(&id) {
            return Err(MembersRefusal::UnknownMember(id));
        }
        if self.caught_up.contains(&id) { Ok(()) } else { Err(MembersRefusal::Behind(id)) }
    }

    fn vote(&self, voters: BTreeSet<u64>, retain: bool) -> Result<Step, MembersRefusal> {
        let (answering, majority) = (voters.intersection(&self.caught_up).count(), voters.len() / 2 + 1);
        if answering < majority {
            return Err(MembersRefusal::LosesQuorum { voters: voters.len(), answering, majority });
        }
        Ok(Step { change: ChangeMembers::ReplaceAllVoters(voters), retain })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(voters: &[u64], observers: &[u64], silent: &[u64]) -> Members {
        let all: BTreeSet<u64> = voters.iter().chain(observers).copied().collect();
        let caught_up = all.iter().copied().filter(|id| !silent.contains(id)).collect();
        Members { voters: vec![voters.iter().copied().collect()], all, caught_up }
    }

    fn voters(ids: &[u64], retain: bool) -> Result<Option<Step>, MembersRefusal> {
        let change = ChangeMembers::ReplaceAllVoters(ids.iter().copied().collect());
        Ok(Some(Step { change, retain }))
    }

    #[test]
    fn each_change_is_one_and_made_again_does_nothing() {
        let now = members(&[1, 2, 3], &[4, 5], &[]);
        let add = ChangeMembers::AddNodes(BTreeMap::from([(6, EmptyNode {})]));
        assert_eq!(now.step(Change::AddObserver(6)), Ok(Some(Step { change: add, retain: true })));
        assert_eq!(now.step(Change::Promote(4)), voters(&[1, 2, 3, 4], true));
        assert_eq!(now.step(Change::Demote(2)), voters(&[1, 3], true));
        assert_eq!(now.step(Change::Remove(2)), voters(&[1, 3], false));
        assert_eq!(now.step(Change::Replace { voter: 3, by: 4 }), voters(&[1, 2, 4], false));
        let remove = ChangeMembers::RemoveNodes(BTreeSet::from([4]));
        assert_eq!(now.step(Change::Remove(4)), Ok(Some(Step { change: remove, retain: false })));
        let done = [
            Change::AddObserver(4),
            Change::AddObserver(1),
            Change::Promote(1),
            Change::Demote(4),
            Change::Remove(9),
            Change::Replace { voter: 9, by: 1 },
        ];
        for change in done {
            assert_eq!(now.step(change), Ok(None), "{change:?}");
        }
    }

    #[test]
    fn who_does_not_follow_or_has_not_caught_up_does_not_vote() {
        let now = members(&[1, 2, 3], &[4], &[4]);
        assert_eq!(now.step(Change::Promote(9)), Err(MembersRefusal::UnknownMember(9)));
        assert_eq!(now.step(Change::Demote(9)), Err(MembersRefusal::UnknownMember(9)));
        assert_eq!(now.step(Change::Promote(4)), Err(MembersRefusal::Behind(4)));
        assert_eq!(now.step(Change::Replace { voter: 1, by: 4 }), Err(MembersRefusal::Behind(4)));
        assert_eq!(now.step(Change::Replace { voter: 4, by: 9 }), Err(MembersRefusal::UnknownMember(4)));
        assert_eq!(now.step(Change::Replace { voter: 1, by: 1 }), Err(MembersRefusal::OwnPlace(1)));
        assert_eq!(now.all_vote(&[4].into()), Err(MembersRefusal::Behind(4)));
    }

    #[test]
    fn what_would_lose_the_quorum_is_refused() {
        let lost = |voters, answering, majority| Err(MembersRefusal::LosesQuorum { voters, answering, majority });
        let one_dead = members(&[1, 2, 3], &[4], &[3]);
        assert_eq!(one_dead.step(Change::Remove(2)), lost(2, 1, 2));
        assert_eq!(one_dead.step(Change::Demote(1)), lost(2, 1, 2));
        // The dead one may go, be replaced, or be outnumbered.
        assert_eq!(one_dead.step(Change::Remove(3)), voters(&[1, 2], false));
        assert_eq!(one_dead.step(Change::Replace { voter: 3, by: 4 }), voters(&[1, 2, 4], false));
        assert_eq!(one_dead.step(Change::Promote(4)), voters(&[1, 2, 3, 4], true));
        let two_of_five_dead = members(&[1, 2, 3, 4, 5], &[], &[4, 5]);
        assert_eq!(two_of_five_dead.step(Change::Remove(3)), lost(4, 2, 3));
        assert_eq!(two_of_five_dead.step(Change::Remove(5)), voters(&[1, 2, 3, 4], false));
        let only = members(&[1], &[2], &[]);
        assert_eq!(only.step(Change::Remove(1)), Err(MembersRefusal::LastVoter(1)));
        assert_eq!(only.step(Change::Demote(1)), Err(MembersRefusal::LastVoter(1)));
    }

    #[test]
    fn a_change_that_was_begun_is_finished_before_another_one() {
        let mut now = members(&[1, 2, 3], &[4], &[]);
        assert_eq!(now.unfinished(), None);
        now.voters.push([1, 2, 4].into());
        assert_eq!(now.step(Change::AddObserver(5)), Err(MembersRefusal::UnderWay));
        assert_eq!(now.all_vote(&[1].into()), Err(MembersRefusal::UnderWay));
        assert_eq!(Ok(now.unfinished()), voters(&[1, 2, 4], true));
    }

    #[test]
    fn a_quorum_begins_with_all_its_voters_in_one_change() {
        let now = members(&[1], &[2, 3], &[]);
        assert_eq!(now.all_vote(&[1, 2, 3].into()), voters(&[1, 2, 3], true));
        assert_eq!(now.all_vote(&[1].into()), Ok(None));
    }
}
