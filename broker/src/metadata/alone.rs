//! A broker that is the whole cluster: what a quorum of one decides when it starts.
//!
//! The broker registers, which ends what its last start held, takes office, and is unfenced: it votes, controls and serves
//! alone.
//!
//! Owns: the commands of a start. Every one of them may be the last that is kept: the next start begins again.

use super::command::{
    BecomeController, Command, RaiseFeatureLevel, RegisterBroker, UnfenceBroker, command::Command as Kind,
};
use super::state::{FEATURE_LEVEL, MetadataState, Outcome};

/// The command by which a broker that is alone registers. Its disk's starts are counted in the journal, which is on the same
/// disk; for the same reason nothing needs to tell one disk from another, and which one it was among several stays as it is.
pub(crate) fn registration_command(state: &MetadataState, registration: &RegisterBroker) -> Command {
    let known = state.broker(registration.broker_id);
    let boots = known.map_or(0, |known| known.boots) + 1;
    let directory_id = known.map(|known| known.directory_id.clone()).unwrap_or_default();
    Kind::RegisterBroker(RegisterBroker { boots, directory_id, ..registration.clone() }).into()
}

/// The command by which a cluster that nobody was in before begins at the level of this build: there is no older broker.
pub(crate) fn first_level(state: &MetadataState) -> Option<Command> {
    let is_new = state.brokers().next().is_none() && state.topics().next().is_none();
    is_new.then(|| Kind::RaiseFeatureLevel(RaiseFeatureLevel { level: FEATURE_LEVEL }).into())
}

/// The command by which a registered broker takes the controller's office.
pub(crate) fn office_command(registration: &RegisterBroker) -> Command {
    let (broker_id, incarnation) = (registration.broker_id, registration.incarnation.clone());
    Kind::BecomeController(BecomeController { broker_id, incarnation }).into()
}

/// The controller's epoch, if that is what came of a command.
pub(crate) fn epoch_of(outcome: Option<&Outcome>) -> Option<u64> {
    match outcome {
        Some(Outcome::ControllerChanged { epoch }) => Some(*epoch),
        _ => None,
    }
}

/// The command by which the controller of this epoch lets a registered broker serve.
pub(crate) fn unfence_command(registration: &RegisterBroker, controller_epoch: u64) -> Command {
    let (broker_id, incarnation) = (registration.broker_id, registration.incarnation.clone());
    let unfence = Kind::UnfenceBroker(UnfenceBroker { broker_id, incarnation });
    Command { controller_epoch, ..unfence.into() }
}

#[cfg(test)]
mod tests {
    use super::super::command::{CreateTopic, Replicas};
    use super::super::state::BrokerState;
    use super::*;
    use headwater_proto::TopicId;
    use uuid::Uuid;

    /// A start of broker 1 of whose commands the first `kept` are kept.
    fn start(state: &mut MetadataState, start: u128, kept: usize) {
        let incarnation = Uuid::from_u128(start).as_bytes().to_vec().into();
        let registration = RegisterBroker { broker_id: 1, incarnation, ..RegisterBroker::default() };
        let register = registration_command(state, &registration);
        let mut take = |command: Command| state.apply(state.index() + 1, &command).expect("accepted");
        let mut epoch = 0;
        for step in 0..kept {
            match step {
                0 => drop(take(register.clone())),
                1 => epoch = epoch_of(Some(&take(office_command(&registration)))).expect("an epoch"),
                _ => drop(take(unfence_command(&registration, epoch))),
            }
        }
    }

    fn topic(state: &mut MetadataState) {
        let create = CreateTopic {
            name: "topic".into(),
            topic_id: TopicId::from_bytes([1; 16]).to_wire(),
            partitions: vec![Replicas { brokers: vec![1] }; 2],
            default_min_insync_replicas: 2,
            ..CreateTopic::default()
        };
        let created = state.apply(state.index() + 1, &Kind::CreateTopic(create).into());
        assert!(matches!(created, Ok(Outcome::TopicCreated(_))));
    }

    fn epochs(state: &MetadataState) -> Vec<(i32, i32)> {
        let partitions = state.topic("topic").map(|topic| topic.partitions.iter());
        partitions.into_iter().flatten().map(|partition| (partition.leader, partition.leader_epoch)).collect()
    }

    #[test]
    fn each_start_raises_every_leader_epoch_by_one() {
        let mut state = MetadataState::new("cluster");
        start(&mut state, 1, 3);
        topic(&mut state);
        for n in 2..5 {
            start(&mut state, n, 3);
            assert_eq!(epochs(&state), [(1, n as i32 - 1); 2]);
            let broker = state.broker(1).expect("there");
            assert_eq!((broker.boots, broker.state), (n as u64, BrokerState::Active));
            assert_eq!(state.controller(), Some((1, Uuid::from_u128(n))));
        }
    }

    #[test]
    fn a_start_that_is_cut_short_hinders_no_later_one() {
        for kept in 0..3 {
            let mut state = MetadataState::new("cluster");
            start(&mut state, 1, 3);
            topic(&mut state);
            start(&mut state, 2, kept);
            start(&mut state, 3, kept);
            start(&mut state, 4, 3);
            assert_eq!(epochs(&state), [(1, 1); 2], "nobody led in between, after {kept} commands");
        }
    }

    #[test]
    fn a_journal_of_before_there_were_clusters_goes_on() {
        let mut state = MetadataState::new("cluster");
        for start in 1..=3u128 {
            let incarnation = Uuid::from_u128(start).as_bytes().to_vec().into();
            let register = RegisterBroker { broker_id: 1, incarnation, ..RegisterBroker::default() };
            state.apply(state.index() + 1, &Kind::RegisterBroker(register).into()).expect("accepted");
            if start == 1 {
                topic(&mut state);
            }
        }
        assert_eq!(epochs(&state), [(1, 2); 2]);
        start(&mut state, 4, 3);
        assert_eq!(epochs(&state), [(1, 3); 2]);
    }
}
