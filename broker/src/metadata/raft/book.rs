//! Where the other members are reached. Pure.
//!
//! A broker's registration says it; before there is one, what a member says when it connects, or the list in the
//! configuration, which names nobody: whoever is there says who it is. Raft's own records hold no addresses, since those
//! change, and a member's records do not.
//!
//! Owns: which addresses are tried for a member, and in which order. Refuses: to connect. Read next: [`super::links`].

use super::super::state::MetadataState;
use std::collections::BTreeMap;

/// The addresses of the members.
#[derive(Debug, Default)]
pub struct AddressBook {
    configured: Vec<String>,
    /// What members said of themselves when they connected or asked to be taken in.
    said: BTreeMap<u64, String>,
    /// Where a member was met last.
    met: BTreeMap<u64, String>,
}

impl AddressBook {
    /// With the addresses of the configuration.
    pub fn new(configured: Vec<String>) -> AddressBook {
        AddressBook { configured, ..AddressBook::default() }
    }

    /// A member says where it is reached.
    pub fn say(&mut self, node_id: u64, address: &str) {
        if !address.is_empty() && self.said.get(&node_id).is_none_or(|said| said != address) {
            self.said.insert(node_id, address.to_owned());
        }
    }

    /// A member was met at an address; so nobody else is there any more.
    pub fn meet(&mut self, node_id: u64, address: &str) {
        if self.met.get(&node_id).is_some_and(|met| met == address) {
            return;
        }
        self.met.retain(|_, met| met != address);
        self.met.insert(node_id, address.to_owned());
    }

    /// Where a member may be reached, the likeliest first: where it registered, where it was met, what it said, and, where
    /// nobody else was met there, the configuration's addresses. 0: whoever is there.
    pub fn addresses(&self, node_id: u64, state: &MetadataState) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        let mut add = |address: &String| {
            if !address.is_empty() && !found.contains(address) {
                found.push(address.clone());
            }
        };
        if node_id == 0 {
            state.brokers().for_each(|broker| add(&broker.address));
            self.said.values().chain(&self.configured).for_each(add);
            return found;
        }
        state.brokers().filter(|broker| broker.node_id == node_id).for_each(|broker| add(&broker.address));
        self.met.get(&node_id).into_iter().chain(self.said.get(&node_id)).for_each(&mut add);
        let others: Vec<&String> = self.met.iter().filter(|(id, _)| **id != node_id).map(|(_, met)| met).collect();
        self.configured.iter().filter(|address| !others.contains(address)).for_each(add);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::command::{RegisterBroker, command::Command as Kind};
    use super::*;

    fn registered(brokers: &[(i32, u64, &str)]) -> MetadataState {
        let mut state = MetadataState::new("cluster");
        for (broker_id, node_id, address) in brokers {
            let register = RegisterBroker {
                broker_id: *broker_id,
                incarnation: vec![*broker_id as u8; 16].into(),
                address: (*address).to_owned(),
                boots: 1,
                node_id: *node_id,
                ..RegisterBroker::default()
            };
            state.apply(state.index() + 1, &Kind::RegisterBroker(register).into()).expect("accepted");
        }
        state
    }

    #[test]
    fn a_registration_goes_before_what_was_said_and_configured() {
        let mut book = AddressBook::new(vec!["a:1".into(), "b:1".into(), "c:1".into()]);
        let nobody = registered(&[]);
        assert_eq!(book.addresses(7, &nobody), ["a:1", "b:1", "c:1"]);
        book.say(7, "d:1");
        assert_eq!(book.addresses(7, &nobody), ["d:1", "a:1", "b:1", "c:1"]);
        let state = registered(&[(1, 7, "e:1"), (2, 8, "b:1")]);
        assert_eq!(book.addresses(7, &state), ["e:1", "d:1", "a:1", "b:1", "c:1"]);
        assert_eq!(book.addresses(9, &state), ["a:1", "b:1", "c:1"]);
        assert_eq!(book.addresses(0, &state), ["e:1", "b:1", "d:1", "a:1", "c:1"]);
    }

    #[test]
    fn where_somebody_was_met_nobody_else_is_looked_for() {
        let mut book = AddressBook::new(vec!["a:1".into(), "b:1".into()]);
        let nobody = registered(&[]);
        book.meet(8, "b:1");
        assert_eq!(book.addresses(7, &nobody), ["a:1"]);
        assert_eq!(book.addresses(8, &nobody), ["b:1", "a:1"]);
        // An emptied disk is another member at the same place.
        book.meet(9, "b:1");
        assert_eq!(book.addresses(8, &nobody), ["a:1"]);
    }
}
