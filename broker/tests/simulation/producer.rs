//! The producer: the shipped client's machines (`headwater_client::simulation`), which number batches, have several on the way, send
//! them again, fail what is too late and go on under another epoch. Here is what drives them, and what it was told of each record.

use crate::checks::Checks;
use headwater_broker::replica::Member;
use headwater_client::simulation::Sender;
use headwater_client::{Delivery, ErrorCode, ProduceError};
use std::collections::{HashSet, VecDeque};

/// Records that wait for their outcome, at most.
const MOST_WAITING: usize = 30;

/// What the producer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// There is no stream; the next attempt is then.
    Pausing { until: i64 },
    /// An identity was asked for.
    Asking { call: u64, since: i64 },
    /// A stream was asked for.
    Opening { connection: u64, leader: Member, since: i64 },
    /// There is one, with requests that are not answered. When a word of the leader came, or the first that waits for one was sent.
    Open { connection: u64, leader: Member, unanswered: usize, heard_ms: i64 },
}

/// What was said of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Waiting,
    Acknowledged,
    /// It failed before any broker had it.
    NeverSent,
    /// A broker would not have it.
    Refused,
    /// It failed, and may be in the log all the same.
    Unknown,
}

pub(crate) struct Producer {
    /// Nothing is sent before there is a producer id.
    pub(crate) sender: Option<Sender>,
    pub(crate) link: Link,
    /// The newest metadata that it heard of: it never goes back to older ones. How many commands they come after, who leads, in
    /// which epoch.
    pub(crate) known: (usize, i32, i32),
    /// The leader epoch of the last attempt.
    pub(crate) tried_epoch: i32,
    pub(crate) delivery_timeout_ms: u64,
    /// Whether records have keys.
    pub(crate) compacts: bool,
    pub(crate) next_value: u64,
    waiting: VecDeque<(u64, Delivery)>,
    /// Of each record, in order.
    fates: Vec<Fate>,
    /// One that may be in a log is sent no more: it became too large.
    has_left_out: bool,
    /// The last one that was acknowledged, and one more.
    pub(crate) acknowledged: u64,
    /// What brokers said is kept, and where; -1: nobody remembers.
    pub(crate) said: HashSet<(u64, i64)>,
}

impl Producer {
    pub(crate) fn new(compacts: bool, delivery_timeout_ms: u64) -> Producer {
        Producer {
            sender: None,
            link: Link::Pausing { until: 0 },
            known: (0, -1, -1),
            tried_epoch: -1,
            delivery_timeout_ms,
            compacts,
            next_value: 0,
            waiting: VecDeque::new(),
            fates: Vec::new(),
            has_left_out: false,
            acknowledged: 0,
            said: HashSet::new(),
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        self.sender.is_some() && self.waiting.len() < MOST_WAITING
    }

    /// The next record is on its way.
    pub(crate) fn sent(&mut self, delivery: Delivery) {
        self.waiting.push_back((self.next_value, delivery));
        self.fates.push(Fate::Waiting);
        self.next_value += 1;
    }

    /// Whether nothing waits for an outcome, and nothing has to be sent again.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.sender.as_ref().is_some_and(Sender::is_idle)
    }

    pub(crate) fn unacknowledged(&self) -> usize {
        self.waiting.len()
    }

    /// The records that have no outcome yet, and those that failed and may be sent again all the same.
    pub(crate) fn unsettled(&self) -> Vec<u64> {
        let is_unsettled = |fate: &Fate| matches!(fate, Fate::Waiting | Fate::Unknown);
        (0..).zip(&self.fates).filter(|(_, fate)| is_unsettled(fate)).map(|(value, _)| value).collect()
    }

    /// Looks what is known of the records by now. It is told in order, and nothing is told as kept that no broker said is.
    /// Returns what became of those that are told now.
    pub(crate) fn look(&mut self, checks: &Checks) -> Vec<Fate> {
        let mut told = Vec::new();
        while let Some(outcome) = self.waiting.front().and_then(|(_, delivery)| delivery.try_result()) {
            let Some((value, _)) = self.waiting.pop_front() else { break };
            let fate = match outcome {
                Ok(acknowledged) => {
                    let offset = acknowledged.offset;
                    let is_said = self.said.contains(&(value, offset));
                    assert!(is_said, "record {value} is taken for kept at {offset}, which no broker said");
                    self.acknowledged = value + 1;
                    Fate::Acknowledged
                }
                Err(ProduceError::TimedOut { sent: false, .. }) => Fate::NeverSent,
                Err(ProduceError::TimedOut { sent: true, .. }) => Fate::Unknown,
                Err(ProduceError::TooLarge { .. }) => Fate::Refused,
                Err(error @ ProduceError::OutcomeUnknown { .. }) => {
                    // It is in some log; whether it stays there, nobody says to a batch that is too large by now. Or it may have got into it
                    // beside what was asked of that log.
                    let is_large = error.code() == Some(ErrorCode::MessageTooLarge);
                    assert!(is_large || error.code() == Some(ErrorCode::OutOfOrderSequence), "record {value}: {error}");
                    self.has_left_out |= is_large;
                    Fate::Unknown
                }
                Err(error @ ProduceError::Refused { .. }) => {
                    // What comes before it is gone: an unclean election took that, or it is sent no more, as it became too large for the
                    // leader that may have had it. Or it is too large alone.
                    let may_lack = checks.unclean() > 0 || self.has_left_out;
                    let is_gap = error.code() == Some(ErrorCode::OutOfOrderSequence) && may_lack;
                    let is_large = error.code() == Some(ErrorCode::MessageTooLarge);
                    assert!(is_gap || is_large, "record {value} is refused: {error}");
                    Fate::Refused
                }
                Err(error) => panic!("record {value}: {error}"),
            };
            self.fates[value as usize] = fate;
            told.push(fate);
        }
        let early = self.waiting.iter().find(|(_, delivery)| delivery.try_result().is_some());
        assert!(early.is_none(), "record {early:?} is told before those that came before it");
        told
    }

    /// What is in the log in the end is what was said to be there, and nothing that was said not to be. What an unclean election
    /// takes is gone.
    pub(crate) fn compare(&self, committed: &HashSet<u64>, was_unclean: bool) {
        for (value, fate) in (0..).zip(&self.fates) {
            let is_there = committed.contains(&value);
            match fate {
                Fate::Waiting => panic!("record {value} has no outcome"),
                Fate::Acknowledged => assert!(is_there || was_unclean, "record {value} was acknowledged, and is gone"),
                Fate::NeverSent => assert!(!is_there, "record {value} is said not to have been sent, and is there"),
                Fate::Refused => {
                    assert!(!is_there || was_unclean, "record {value} is said to be refused, and is there")
                }
                Fate::Unknown => {}
            }
        }
    }
}
