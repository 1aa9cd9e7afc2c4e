//! What a topic may be called: Kafka's rules, so that a data folder can always go back to Kafka.
//!
//! Owns: the rules and the sentence of each refusal. Refuses: knowing which topics exist, except for collisions.

use headwater_proto::limits::MAX_TOPIC_NAME_BYTES;
use std::borrow::Cow;

/// The internal topic that holds what consumer groups commit, and the groups themselves.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";

/// Names that a data folder of Kafka gives a meaning of its own.
const RESERVED: &[&str] = &[OFFSETS_TOPIC, "__cluster_metadata", "__transaction_state", "__share_group_state"];

/// Why a topic cannot have a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing, or a name that a file system reads as a folder.
    #[error("a topic cannot be called {0:?}")]
    Meaningless(String),
    /// Longer than a folder's name may be with a partition behind it.
    #[error("a topic's name has at most {MAX_TOPIC_NAME_BYTES} bytes; {0:?} has {len}", len = .0.len())]
    TooLong(String),
    /// A character outside the legal ones.
    #[error("the topic name {name:?} holds {found:?}: legal are ASCII letters, digits, '.', '_' and '-'")]
    IllegalCharacter {
        /// The name.
        name: String,
        /// The first character that is not legal.
        found: char,
    },
    /// A name that the broker keeps for itself.
    #[error("the topic name {0:?} is reserved for the broker")]
    Reserved(String),
}

/// Whether a topic may be called this; `internal` ones may have a reserved name.
///
/// # Errors
/// [`NameError`]: the first rule that is broken.
pub fn check(name: &str, internal: bool) -> Result<(), NameError> {
    if matches!(name, "" | "." | "..") {
        return Err(NameError::Meaningless(name.to_owned()));
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(found) = name.chars().find(|c| !legal(*c)) {
        return Err(NameError::IllegalCharacter { name: name.chars().take(MAX_TOPIC_NAME_BYTES).collect(), found });
    }
    if name.len() > MAX_TOPIC_NAME_BYTES {
        return Err(NameError::TooLong(name.to_owned()));
    }
    if !internal && RESERVED.contains(&name) {
        return Err(NameError::Reserved(name.to_owned()));
    }
    Ok(())
}

/// What two names must not share: Kafka's metric names turn '.' into '_', so it refuses topics that differ only there.
pub fn collision_key(name: &str) -> Cow<'_, str> {
    if name.contains('.') { name.replace('.', "_").into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_kafkas_rules() {
        for legal in ["a", "orders", "A.b_c-9", "...", "-", "__mine", &"x".repeat(249)] {
            assert_eq!(check(legal, false), Ok(()), "{legal}");
        }
        for illegal in ["", ".", "..", "a/b", "a b", "größe", "a\0", &"x".repeat(250), OFFSETS_TOPIC] {
            assert!(check(illegal, false).is_err(), "{illegal}");
        }
        assert_eq!(check(OFFSETS_TOPIC, true), Ok(()));
        assert_eq!(
            check("a/b", false).expect_err("refused").to_string(),
            "the topic name \"a/b\" holds '/': legal are ASCII letters, digits, '.', '_' and '-'"
        );
    }
}
