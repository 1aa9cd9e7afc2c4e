//! What goes over a replica stream, as the machines take it.
//!
//! Owns: taking messages apart and putting them together; a [`MessageError`] for each way in which a peer's make no sense. Refuses: frames
//! and streams. Read next: [`super::serve`], the leader's end; [`super::follow`], the follower's.

use super::history::{History, HistoryError, Verdict};
use super::{Hello, Member, Report, Tenure};
use headwater_proto::TopicId;
use headwater_proto::limits::MAX_REPLICA_EPOCHS;
use headwater_proto::wire::{
    self, EpochStart, OpenReplica, ReplicaOpened, ReplicaProgress, RestartAt, replica_opened::Verdict as WireVerdict,
};
use headwater_storage::epochs::EpochEntry;
use uuid::Uuid;

/// What a peer sent is nothing that a replica stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A topic id or an incarnation of another length.
    #[error("{what} has 16 bytes, not {bytes}")]
    Id {
        /// Which.
        what: &'static str,
        /// How many there are.
        bytes: usize,
    },
    /// A number that is negative.
    #[error("{what} is {given}")]
    Negative {
        /// Which.
        what: &'static str,
        /// What it is.
        given: i64,
    },
    /// More leader epochs than one may tell.
    #[error("a history of {0} leader epochs is longer than {MAX_REPLICA_EPOCHS}")]
    TooManyEpochs(usize),
    /// No log has such a history.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// Flushed what was not received.
    #[error("flushed up to {flushed}, received up to {received}")]
    Offsets {
        /// What was received.
        received: i64,
        /// What is flushed.
        flushed: i64,
    },
    /// The leader answered neither what to do nor what is wrong.
    #[error("the answer says nothing")]
    NoVerdict,
}

/// What a stream is opened for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// The topic.
    pub topic_id: TopicId,
    /// The partition.
    pub partition: u32,
    /// What the follower says.
    pub hello: Hello,
    /// Bytes that it grants.
    pub credit_bytes: u64,
}

impl Opening {
    /// As the follower sends it.
    pub fn to_wire(&self) -> OpenReplica {
        let Hello { member, tenure, history } = &self.hello;
        let epochs = history.epochs();
        // The newest tell where two logs part; without the oldest, one that parts there is copied anew.
        let newest = epochs.get(epochs.len().saturating_sub(MAX_REPLICA_EPOCHS)..).unwrap_or_default();
        OpenReplica {
            topic_id: self.topic_id.to_wire(),
            partition: self.partition,
            broker_id: member.broker,
            incarnation: member.incarnation.as_bytes().to_vec().into(),
            leader_epoch: tenure.leader_epoch,
            generation: tenure.generation,
            epochs: newest
                .iter()
                .map(|entry| EpochStart { epoch: entry.epoch, start_offset: entry.start_offset })
                .collect(),
            log_start_offset: history.log_start(),
            log_end_offset: history.log_end(),
            credit_bytes: self.credit_bytes,
        }
    }

    /// As the leader takes it.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn from_wire(open: &OpenReplica) -> Result<Opening, MessageError> {
        let id = |what, bytes: usize| MessageError::Id { what, bytes };
        let topic_id = TopicId::from_slice(&open.topic_id).ok_or(id("a topic id", open.topic_id.len()))?;
        let incarnation =
            Uuid::from_slice(&open.incarnation).map_err(|_| id("an incarnation", open.incarnation.len()))?;
        let negative = |what, given: i32| match given {
            ..0 => Err(MessageError::Negative { what, given: given.into() }),
            _ => Ok(given),
        };
        let broker = negative("the broker's id", open.broker_id)?;
        let leader_epoch = negative("the leader epoch", open.leader_epoch)?;
        if open.epochs.len() > MAX_REPLICA_EPOCHS {
            return Err(MessageError::TooManyEpochs(open.epochs.len()));
        }
        let epochs =
            open.epochs.iter().map(|start| EpochEntry { epoch: start.epoch, start_offset: start.start_offset });
        let history = History::new(epochs.collect(), open.log_start_offset, open.log_end_offset)?;
        let hello = Hello {
            member: Member { broker, incarnation },
            tenure: Tenure { leader_epoch, generation: open.generation },
            history,
        };
        Ok(Opening { topic_id, partition: open.partition, hello, credit_bytes: open.credit_bytes })
    }
}

/// The leader's answer to a hello.
pub fn opened(verdict: Verdict) -> ReplicaOpened {
    let verdict = match verdict {
        Verdict::Agrees => WireVerdict::Agrees(wire::Done {}),
        Verdict::Cut { to } => WireVerdict::CutTo(to),
        Verdict::Restart { at, equal_below } => WireVerdict::Restart(RestartAt { at, equal_below }),
    };
    ReplicaOpened { error: None, verdict: Some(verdict) }
}

/// The leader's answer, as the follower takes it. An error in it is the caller's to look at first.
///
/// # Errors
/// [`MessageError`].
pub fn verdict(opened: &ReplicaOpened) -> Result<Verdict, MessageError> {
    let offset = |what, given: i64| match given {
        ..0 => Err(MessageError::Negative { what, given }),
        _ => Ok(given),
    };
    match opened.verdict.as_ref().ok_or(MessageError::NoVerdict)? {
        WireVerdict::Agrees(_) => Ok(Verdict::Agrees),
        WireVerdict::CutTo(to) => Ok(Verdict::Cut { to: offset("the offset to cut at", *to)? }),
        WireVerdict::Restart(RestartAt { at, equal_below }) => {
            let at = offset("the offset to begin at", *at)?;
            Ok(Verdict::Restart { at, equal_below: offset("the offset below which all is equal", *equal_below)? })
        }
    }
}

/// How far a follower is, and what it grants.
pub fn progress(report: Option<&Report>, credit_bytes: u64) -> ReplicaProgress {
    match report {
        None => ReplicaProgress { received_offset: -1, flushed_offset: -1, credit_bytes, ..ReplicaProgress::default() },
        Some(report) => ReplicaProgress {
            leader_epoch: report.tenure.leader_epoch,
            generation: report.tenure.generation,
            received_offset: report.received,
            flushed_offset: report.flushed,
            credit_bytes,
            refused_offset: None,
            log_start_offset: report.log_start,
        },
    }
}

/// Something from this offset on is damaged, and was not taken: the last that a follower says on a stream.
pub fn refused(at: i64) -> ReplicaProgress {
    ReplicaProgress { refused_offset: Some(at), ..progress(None, 0) }
}

/// From where on something is damaged, if the follower says so.
///
/// # Errors
/// [`MessageError`].
pub fn refused_at(progress: &ReplicaProgress) -> Result<Option<i64>, MessageError> {
    match progress.refused_offset {
        Some(given @ ..0) => Err(MessageError::Negative { what: "the offset that was refused", given }),
        at => Ok(at),
    }
}

/// The report in what a follower said on its stream; `None`: it only grants.
///
/// # Errors
/// [`MessageError`].
pub fn report(member: Member, progress: &ReplicaProgress) -> Result<Option<Report>, MessageError> {
    let (received, flushed) = (progress.received_offset, progress.flushed_offset);
    if received == -1 {
        return Ok(None);
    }
    if received < 0 || flushed < 0 || flushed > received {
        return Err(MessageError::Offsets { received, flushed });
    }
    let tenure = Tenure { leader_epoch: progress.leader_epoch, generation: progress.generation };
    let log_start = progress.log_start_offset;
    if let Some(given @ ..0) = log_start {
        return Err(MessageError::Negative { what: "the log start", given });
    }
    Ok(Some(Report { member, tenure, received, flushed, log_start }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use headwater_proto::limits::MAX_OPEN_FRAME_BYTES;
    use proptest::prelude::*;
    use prost::Message;

    fn opening(epochs: usize) -> Opening {
        let entry = |n: usize| EpochEntry { epoch: 1 + n as i32 * 7, start_offset: (1 << 40) + n as i64 };
        let log_end = (1 << 40) + epochs as i64;
        let history = History::new((0..epochs).map(entry).collect(), 5, log_end).unwrap();
        let member = Member { broker: 3, incarnation: Uuid::from_u128(77) };
        let hello = Hello { member, tenure: Tenure { leader_epoch: 9, generation: 4 }, history };
        Opening { topic_id: TopicId::from_bytes([8; 16]), partition: 6, hello, credit_bytes: 1 << 20 }
    }

    #[test]
    fn what_is_said_comes_back() {
        for epochs in [0, 1, 500, MAX_REPLICA_EPOCHS] {
            let said = opening(epochs);
            let bytes = said.to_wire().encode_to_vec();
            let heard = OpenReplica::decode(bytes.as_slice()).unwrap();
            assert_eq!(Opening::from_wire(&heard), Ok(said));
        }
        for there in [Verdict::Agrees, Verdict::Cut { to: 0 }, Verdict::Restart { at: 7, equal_below: 9 }] {
            assert_eq!(verdict(&opened(there)), Ok(there));
        }
        let member = Member { broker: 3, incarnation: Uuid::from_u128(77) };
        let tenure = Tenure { leader_epoch: 9, generation: 4 };
        let said = Report { member, tenure, received: 12, flushed: 10, log_start: None };
        for said in [said, Report { log_start: Some(0), ..said }] {
            assert_eq!(report(member, &progress(Some(&said), 5)), Ok(Some(said)));
        }
        assert_eq!(report(member, &progress(None, 5)), Ok(None));
        assert_eq!(progress(None, 5).credit_bytes, 5);
        assert_eq!((report(member, &refused(0)), refused_at(&refused(0))), (Ok(None), Ok(Some(0))));
        assert_eq!(refused_at(&progress(Some(&said), 5)), Ok(None));
    }

    #[test]
    fn the_longest_history_fits_the_first_frame_and_a_longer_one_loses_its_oldest_epochs() {
        let entry =
            |n: i32| EpochEntry { epoch: i32::MAX - 100_000 + n, start_offset: i64::MAX - 200_000 + i64::from(n) };
        let all: Vec<_> = (0..40_000).map(entry).collect();
        let mut long = opening(0);
        long.hello.history = History::new(all.clone(), 0, i64::MAX).unwrap();
        let wire = long.to_wire();
        assert!(wire.encoded_len() < MAX_OPEN_FRAME_BYTES, "{}", wire.encoded_len());
        let heard = Opening::from_wire(&wire).unwrap();
        assert_eq!(heard.hello.history.epochs(), &all[40_000 - MAX_REPLICA_EPOCHS..]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let good = opening(3).to_wire();
        let refused = |change: fn(&mut OpenReplica)| {
            let mut open = good.clone();
            change(&mut open);
            Opening::from_wire(&open).unwrap_err()
        };
        assert_eq!(
            refused(|open| open.topic_id = Bytes::from_static(b"x")),
            MessageError::Id { what: "a topic id", bytes: 1 }
        );
        assert_eq!(
            refused(|open| open.incarnation = Bytes::from_static(&[0; 17])),
            MessageError::Id { what: "an incarnation", bytes: 17 }
        );
        assert!(matches!(refused(|open| open.broker_id = -1), MessageError::Negative { given: -1, .. }));
        assert!(matches!(refused(|open| open.leader_epoch = i32::MIN), MessageError::Negative { .. }));
        assert!(matches!(refused(|open| open.epochs.reverse()), MessageError::History(HistoryError::Unordered { .. })));
        assert!(matches!(refused(|open| open.log_end_offset = -5), MessageError::History(HistoryError::Bounds { .. })));
        assert_eq!(
            refused(|open| open.epochs = vec![EpochStart::default(); MAX_REPLICA_EPOCHS + 1]),
            MessageError::TooManyEpochs(MAX_REPLICA_EPOCHS + 1)
        );
        assert_eq!(verdict(&ReplicaOpened::default()), Err(MessageError::NoVerdict));
        for verdict_of in [
            Verdict::Cut { to: -1 },
            Verdict::Restart { at: -1, equal_below: 0 },
            Verdict::Restart { at: 0, equal_below: -3 },
        ] {
            assert!(matches!(verdict(&opened(verdict_of)), Err(MessageError::Negative { .. })));
        }
        let member = opening(0).hello.member;
        for (received_offset, flushed_offset) in [(-2, 0), (5, -1), (5, 6), (i64::MIN, i64::MAX)] {
            let said = ReplicaProgress { received_offset, flushed_offset, ..ReplicaProgress::default() };
            assert!(matches!(report(member, &said), Err(MessageError::Offsets { .. })), "{said:?}");
        }
        let said = ReplicaProgress { log_start_offset: Some(-1), ..ReplicaProgress::default() };
        assert!(matches!(report(member, &said), Err(MessageError::Negative { given: -1, .. })));
        assert!(matches!(refused_at(&super::refused(-1)), Err(MessageError::Negative { given: -1, .. })));
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(open) = OpenReplica::decode(bytes.as_slice()) {
                let _ = Opening::from_wire(&open);
            }
            if let Ok(answer) = ReplicaOpened::decode(bytes.as_slice()) {
                let _ = verdict(&answer);
            }
            if let Ok(said) = ReplicaProgress::decode(bytes.as_slice()) {
                let _ = report(opening(0).hello.member, &said);
            }
        }

        #[test]
        fn damaged_messages_are_refused_and_never_panic(at in 0usize..200, to: u8) {
            let mut bytes = opening(9).to_wire().encode_to_vec();
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(open) = OpenReplica::decode(bytes.as_slice()) {
                let _ = Opening::from_wire(&open);
            }
        }
    }
}
