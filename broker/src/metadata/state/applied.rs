//! The last commands of people, and what came of them: a command that is proposed again, because its answer was lost, is
//! answered and not applied again. Refused ones are not kept: they changed nothing, and are decided anew.

use super::super::command::{self, applied_command::Outcome as Kept};
use super::{Outcome, Refusal, topic_id};
use std::collections::VecDeque;
use std::sync::Arc;

/// How many are known: of those that concern partitions, of which one call may have as many as there are, and of the others.
const KEPT_COMMANDS: usize = 1000;

type CommandId = [u8; 16];

/// The last commands of people that were applied, the oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct AppliedCommands(Arc<VecDeque<(CommandId, Outcome)>>);

/// The id of a person's command.
pub(super) fn command_id(bytes: &[u8]) -> Result<Option<CommandId>, Refusal> {
    match bytes {
        [] => Ok(None),
        _ => bytes.try_into().map(Some).map_err(|_| Refusal::Unknown("holds a command id of another length than 16")),
    }
}

impl AppliedCommands {
    /// What came of the command before.
    pub(super) fn outcome(&self, id: &CommandId) -> Option<&Outcome> {
        self.0.iter().rev().find(|(applied, _)| applied == id).map(|(_, outcome)| outcome)
    }

    /// Whether there is a way to keep what comes of a command: those of people all have one.
    pub(super) fn keep(&mut self, id: CommandId, outcome: &Outcome) {
        if message(outcome).is_some() {
            let kept = Arc::make_mut(&mut self.0);
            kept.push_back((id, outcome.clone()));
            let is_alike = |(_, other): &(CommandId, Outcome)| is_of_partitions(other) == is_of_partitions(outcome);
            if kept.iter().filter(|it| is_alike(it)).count() > KEPT_COMMANDS
                && let Some(oldest) = kept.iter().position(is_alike)
            {
                kept.remove(oldest);
            }
        }
    }

    pub(super) fn to_messages(&self) -> Vec<command::AppliedCommand> {
        self.0
            .iter()
            .map(|(id, outcome)| command::AppliedCommand {
                command_id: bytes::Bytes::copy_from_slice(id),
                outcome: message(outcome),
            })
            .collect()
    }

    pub(super) fn from_messages(messages: Vec<command::AppliedCommand>) -> Result<AppliedCommands, Refusal> {
        let kept = messages.into_iter().map(|applied| {
            let missing = Refusal::Unknown("was applied and says not which or what came of it");
            let id = command_id(&applied.command_id)?.ok_or(missing.clone())?;
            let outcome = match applied.outcome.ok_or(missing)? {
                Kept::TopicCreated(id) => Outcome::TopicCreated(topic_id(&id)?),
                Kept::TopicChanged(id) => Outcome::TopicChanged(topic_id(&id)?),
                Kept::TopicDeleted(id) => Outcome::TopicDeleted(topic_id(&id)?),
                Kept::BrokerChanged(changed) => Outcome::BrokerChanged {
                    broker_id: changed.broker_id,
                    partitions: usize::try_from(changed.partitions).unwrap_or(usize::MAX),
                },
                Kept::PartitionsChanged(partitions) => {
                    Outcome::PartitionsChanged(usize::try_from(partitions).unwrap_or(usize::MAX))
                }
                Kept::FeatureLevel(level) => Outcome::FeatureLevelRaised(level),
            };
            Ok((id, outcome))
        });
        Ok(AppliedCommands(Arc::new(kept.collect::<Result<_, Refusal>>()?)))
    }
}

fn is_of_partitions(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::PartitionsChanged(_))
}

fn message(outcome: &Outcome) -> Option<Kept> {
    Some(match outcome {
        Outcome::TopicCreated(id) => Kept::TopicCreated(id.to_wire()),
        Outcome::TopicChanged(id) => Kept::TopicChanged(id.to_wire()),
        Outcome::TopicDeleted(id) => Kept::TopicDeleted(id.to_wire()),
        Outcome::BrokerChanged { broker_id, partitions } => {
            Kept::BrokerChanged(command::BrokerChanged { broker_id: *broker_id, partitions: *partitions as u64 })
        }
        Outcome::PartitionsChanged(partitions) => Kept::PartitionsChanged(*partitions as u64),
        Outcome::FeatureLevelRaised(level) => Kept::FeatureLevel(*level),
        _ => return None,
    })
}
