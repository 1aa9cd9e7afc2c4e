//! Whether this broker is the controller: pure.
//!
//! Leading the log is not the office: a term has several leaders, and one that starts anew leads on. So whoever comes to lead
//! takes office by a command, whose index is its epoch, and nothing a controller says counts before. A controller that no
//! quorum has answered for an election timeout gives its office up by itself: another one may be in office by then.
//!
//! Owns: when to take office and when to give it up. Refuses: clocks; proposing. Read next: [`super::node`].

/// What is known of the log's leadership at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// The term in which this member leads; `None`: it does not.
    pub leads_in: Option<u64>,
    /// For how long no quorum has answered; `None`: none has yet.
    pub unheard_ms: Option<u64>,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Propose `BecomeController`, and tell what came of it.
    Take,
    /// The epoch is over for this broker: it decides nothing more in it.
    GiveUp {
        /// Which one.
        epoch: u64,
    },
}

/// The controller's office, as one broker sees it.
#[derive(Debug)]
pub struct Office {
    election_timeout_ms: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Out,
    Taking { term: u64 },
    In { term: u64, epoch: u64 },
}

impl Office {
    /// Nobody's yet.
    pub fn new(election_timeout_ms: u64) -> Office {
        Office { election_timeout_ms, state: State::Out }
    }

    /// The epoch in which this broker is the controller.
    pub fn epoch(&self) -> Option<u64> {
        match self.state {
            State::In { epoch, .. } => Some(epoch),
            _ => None,
        }
    }

    /// Something may have changed.
    pub fn observe(&mut self, now: Observed) -> Option<Effect> {
        let term = now.leads_in.filter(|_| now.unheard_ms.is_some_and(|ms| ms < self.election_timeout_ms));
        match (self.state, term) {
            (State::In { term, .. } | State::Taking { term }, Some(leads)) if term == leads => None,
            // It leads anew: what it was is over, and a new office begins once that was said.
            (State::In { epoch, .. }, _) => {
                self.state = State::Out;
                Some(Effect::GiveUp { epoch })
            }
            (_, Some(term)) => {
                self.state = State::Taking { term };
                Some(Effect::Take)
            }
            (_, None) => {
                self.state = State::Out;
                None
            }
        }
    }

    /// What came of [`Effect::Take`]: the epoch, if it is known that the command came into force. It counts unless the
    /// leadership that it was proposed in is over.
    pub fn taken(&mut self, epoch: Option<u64>) {
        if let State::Taking { term } = self.state {
            self.state = epoch.map_or(State::Out, |epoch| State::In { term, epoch });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADS: Observed = Observed { leads_in: Some(3), unheard_ms: Some(0) };
    const FOLLOWS: Observed = Observed { leads_in: None, unheard_ms: None };

    fn in_office() -> Office {
        let mut office = Office::new(600);
        assert_eq!(office.observe(FOLLOWS), None);
        assert_eq!(office.observe(LEADS), Some(Effect::Take));
        assert_eq!(office.epoch(), None, "not before the command is in force");
        assert_eq!(office.observe(LEADS), None, "once");
        office.taken(Some(17));
        assert_eq!(office.epoch(), Some(17));
        office
    }

    #[test]
    fn whoever_leads_takes_office_once() {
        let mut office = in_office();
        for unheard_ms in [0, 100, 599] {
            assert_eq!(office.observe(Observed { unheard_ms: Some(unheard_ms), ..LEADS }), None);
        }
        assert_eq!(office.epoch(), Some(17));
    }

    #[test]
    fn without_an_answer_for_an_election_timeout_the_office_is_given_up() {
        for unheard_ms in [Some(600), None] {
            let mut office = in_office();
            let cut_off = Observed { unheard_ms, ..LEADS };
            assert_eq!(office.observe(cut_off), Some(Effect::GiveUp { epoch: 17 }));
            assert_eq!((office.epoch(), office.observe(cut_off)), (None, None));
            // Heard again, it is another activation, though the term is the same.
            assert_eq!(office.observe(LEADS), Some(Effect::Take));
            office.taken(Some(21));
            assert_eq!(office.epoch(), Some(21));
        }
    }

    #[test]
    fn whoever_is_deposed_gives_up_and_takes_office_anew_in_another_term() {
        let mut office = in_office();
        assert_eq!(office.observe(FOLLOWS), Some(Effect::GiveUp { epoch: 17 }));
        let mut office = in_office();
        let again = Observed { leads_in: Some(5), ..LEADS };
        assert_eq!(office.observe(again), Some(Effect::GiveUp { epoch: 17 }));
        assert_eq!(office.observe(again), Some(Effect::Take));
    }

    #[test]
    fn an_answer_that_comes_after_the_leadership_ended_counts_for_nothing() {
        let mut office = Office::new(600);
        assert_eq!(office.observe(LEADS), Some(Effect::Take));
        assert_eq!(office.observe(FOLLOWS), None);
        office.taken(Some(9));
        assert_eq!(office.epoch(), None);
    }

    #[test]
    fn a_proposal_without_an_answer_is_made_again() {
        let mut office = Office::new(600);
        assert_eq!(office.observe(LEADS), Some(Effect::Take));
        office.taken(None);
        assert_eq!(office.observe(LEADS), Some(Effect::Take));
    }
}
