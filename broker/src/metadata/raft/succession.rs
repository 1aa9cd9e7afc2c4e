//! Members that brokers were before their disks were emptied: pure.
//!
//! A broker with a new disk is a new member, and nobody is the old one any more. For as long as that one votes, every majority
//! counts somebody who never answers, and one death more may be the quorum's end. So the new one votes in its place, by one
//! change of the membership, once it has caught up.
//!
//! Owns: which changes are due. Refuses: whether each may be made now ([`super::members`]); making them ([`super::heartbeat`]).

use super::super::state::Broker;
use super::Membership;
use super::members::Change;

/// The members that a broker was, as far as they vote or follow still.
pub fn gone(broker: &Broker, members: &Membership) -> Vec<u64> {
    broker.former_node_ids.iter().copied().filter(|former| members.get_node(former).is_some()).collect()
}

/// What makes a broker's place in the quorum that of the member which it is.
pub fn due(broker: &Broker, members: &Membership) -> Vec<Change> {
    let votes = |node_id| members.voter_ids().any(|voter| voter == node_id);
    let follows = members.get_node(&broker.node_id).is_some();
    let change = |former| match votes(former) {
        true => follows.then_some(Change::Replace { voter: former, by: broker.node_id }),
        false => Some(Change::Remove(former)),
    };
    gone(broker, members).into_iter().filter_map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{RegisterBroker, command::Command as Kind};
    use super::super::super::state::MetadataState;
    use super::*;
    use openraft::EmptyNode;
    use std::collections::{BTreeMap, BTreeSet};

    fn members(voters: &[u64], observers: &[u64]) -> Membership {
        let voting: BTreeSet<u64> = voters.iter().copied().collect();
        let nodes: BTreeMap<u64, EmptyNode> = voters.iter().chain(observers).map(|id| (*id, EmptyNode {})).collect();
        Membership::new(vec![voting], nodes)
    }

    /// A broker that registered as each of these members.
    fn broker(node_ids: &[u64]) -> Broker {
        let mut state = MetadataState::new("cluster");
        for (boots, node_id) in (1..).zip(node_ids) {
            let incarnation = vec![boots as u8; 16].into();
            let register =
                RegisterBroker { broker_id: 3, boots, node_id: *node_id, incarnation, ..RegisterBroker::default() };
            state.apply(state.index() + 1, &Kind::RegisterBroker(register).into()).expect("accepted");
        }
        state.broker(3).expect("registered").clone()
    }

    #[test]
    fn the_new_member_votes_where_the_old_one_did_and_an_observer_is_forgotten() {
        assert_eq!(due(&broker(&[13, 13]), &members(&[11, 12, 13], &[])), [], "the disk is the same");
        let again = broker(&[13, 23]);
        let replace = Change::Replace { voter: 13, by: 23 };
        assert_eq!(due(&again, &members(&[11, 12, 13], &[23])), [replace]);
        assert_eq!(due(&again, &members(&[11, 12, 13], &[])), [], "it does not follow yet");
        assert_eq!(due(&again, &members(&[11, 12], &[13, 23])), [Change::Remove(13)]);
        assert_eq!(due(&again, &members(&[11, 12, 23], &[])), [], "done");
        assert_eq!(gone(&again, &members(&[11, 12, 13], &[])), [13]);
        assert!(gone(&again, &members(&[11, 12, 23], &[])).is_empty());
    }

    /// A disk may be lost again before its member voted, or after.
    #[test]
    fn all_members_that_a_broker_was_are_remembered_until_they_are_gone() {
        let third = broker(&[13, 23, 33]);
        assert_eq!(third.former_node_ids, [13, 23]);
        let replace = Change::Replace { voter: 13, by: 33 };
        assert_eq!(due(&third, &members(&[11, 12, 13], &[23, 33])), [replace, Change::Remove(23)]);
        // A disk that was taken for another one, and is back.
        assert_eq!(broker(&[13, 23, 13]).former_node_ids, [23]);
        let node_ids: Vec<u64> = (1..=100).collect();
        assert_eq!(broker(&node_ids).former_node_ids, (92..=99).collect::<Vec<u64>>(), "the last ones, and no more");
    }
}
