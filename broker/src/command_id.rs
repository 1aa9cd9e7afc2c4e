//! The id under which a person's command is applied once, however often it is asked for.
//!
//! A call bears sixteen random bytes. Its commands are told apart by their number: asked for again, the call makes the same ids.
//!
//! Owns: those ids. Refuses: remembering them ([`crate::metadata::state`] does).

use crate::metadata::command::{Command, command::Command as Kind};
use crate::metadata::{MetadataError, MetadataState, Outcome};
use bytes::Bytes;
use headwater_proto::{ErrorCode, TopicId, wire};

/// The id of a call, if it has one.
#[derive(Debug, Clone)]
pub(crate) struct CommandId(Option<[u8; 16]>);

impl CommandId {
    /// The id that a call bears.
    pub(crate) fn of_call(bytes: &[u8]) -> Result<CommandId, wire::Error> {
        match bytes {
            [] => Ok(CommandId(None)),
            _ => bytes.try_into().map(|id| CommandId(Some(id))).map_err(|_| {
                let why = format!("a command id has 16 bytes, not {}", bytes.len());
                wire::Error::new(ErrorCode::InvalidRequest, why)
            }),
        }
    }

    fn of(&self, n: u32) -> Bytes {
        let Some(mut id) = self.0 else { return Bytes::new() };
        for (byte, number) in id.iter_mut().rev().zip(n.to_le_bytes()) {
            *byte ^= number;
        }
        Bytes::copy_from_slice(&id)
    }

    /// The `n`th command of the call.
    pub(crate) fn command(&self, n: u32, kind: Kind) -> Command {
        Command { command_id: self.of(n), ..kind.into() }
    }

    /// The command of the call that is about this partition, whichever others it has by now.
    pub(crate) fn about(&self, topic_id: &TopicId, partition: u32, kind: Kind) -> Command {
        let Some(mut id) = self.0 else { return kind.into() };
        let named = topic_id.as_bytes().iter().copied().zip(id.iter_mut());
        named.for_each(|(byte, id)| *id ^= byte);
        Command { command_id: CommandId(Some(id)).of(partition), ..kind.into() }
    }

    /// Whether the call's first command was applied before.
    pub(crate) fn is_known(&self, state: &MetadataState) -> bool {
        self.outcome(state).is_some()
    }

    /// What came of the call's first command, if it was applied before.
    pub(crate) fn outcome<'a>(&self, state: &'a MetadataState) -> Option<&'a Outcome> {
        state.outcome(&self.of(0))
    }

    /// Has what `decide` chooses applied once: what was applied under this id before is not decided again.
    pub(crate) fn once(
        self,
        decide: impl FnOnce(&MetadataState) -> Result<Command, MetadataError>,
    ) -> impl FnOnce(&MetadataState) -> Result<Command, MetadataError> {
        move |state| {
            // Only the id counts then.
            let command =
                if self.is_known(state) { Kind::ElectLeaders(Default::default()).into() } else { decide(state)? };
            Ok(Command { command_id: self.of(0), ..command })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{CreateTopic, DeleteTopic, Replicas};
    use std::collections::BTreeSet;

    #[test]
    fn the_commands_of_a_call_have_ids_of_their_own_and_the_same_again() {
        let id = CommandId::of_call(&[7; 16]).expect("sixteen");
        let ids = |id: &CommandId| (0..70_000).map(|n| id.of(n)).collect::<Vec<_>>();
        let all = ids(&id);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(all, ids(&CommandId::of_call(&[7; 16]).expect("sixteen")));
        let about = |topic: u8, partition| {
            id.about(&TopicId::from_bytes([topic; 16]), partition, Kind::ElectLeaders(Default::default())).command_id
        };
        assert_eq!(about(1, 4), about(1, 4));
        assert!(about(1, 4) != about(1, 5) && about(1, 4) != about(2, 4));
        assert!(CommandId::of_call(&[]).expect("none").of(3).is_empty());
        assert!(CommandId::of_call(&[7; 15]).is_err());
    }

    #[test]
    fn what_was_applied_is_not_decided_again() {
        let mut state = MetadataState::new("cluster");
        let mut run = |id: u8, decide: &dyn Fn(&MetadataState) -> Result<Command, MetadataError>| {
            let id = CommandId::of_call(&[id; 16]).expect("sixteen");
            let command = id.once(decide)(&state)?;
            Ok::<_, MetadataError>(state.apply(state.index() + 1, &command)?)
        };
        let topic_id = TopicId::from_bytes([1; 16]);
        let register =
            Kind::RegisterBroker(crate::metadata::command::RegisterBroker { broker_id: 1, ..Default::default() });
        run(9, &|_| Ok(register.clone().into())).expect("registered");
        let create = CreateTopic {
            name: "t".into(),
            topic_id: topic_id.to_wire(),
            partitions: vec![Replicas { brokers: vec![1] }],
            ..CreateTopic::default()
        };
        for _ in 0..2 {
            let created = run(1, &|_| Ok(Kind::CreateTopic(create.clone()).into())).expect("created");
            assert_eq!(created, Outcome::TopicCreated(topic_id));
        }
        let delete = |state: &MetadataState| {
            let topic = state.topic("t").ok_or(MetadataError::UnknownTopic("t".into()))?;
            Ok(Kind::DeleteTopic(DeleteTopic { topic_id: topic.id.to_wire() }).into())
        };
        for _ in 0..2 {
            assert_eq!(run(2, &delete).expect("deleted"), Outcome::TopicDeleted(topic_id));
        }
        assert!(run(3, &delete).is_err(), "another person's");
    }
}
