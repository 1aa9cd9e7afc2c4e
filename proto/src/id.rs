//! Identities that stand on disk and on the wire.
//!
//! Owns: [`TopicId`], in the form Kafka gives it. Refuses: names (a name may be given again, an id never is).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// What a topic is, whatever it is called: sixteen random bytes, written as Kafka writes them (URL-safe base64 without padding).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicId([u8; 16]);

impl TopicId {
    /// No topic (all zero).
    pub const ZERO: TopicId = TopicId([0; 16]);

    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> TopicId {
        TopicId(bytes)
    }

    /// The id in a wire message; `None` unless it has sixteen bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<TopicId> {
        bytes.try_into().ok().map(TopicId)
    }

    /// The id's bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The id as a field of a wire message.
    pub fn to_wire(self) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(&self.0)
    }
}

impl std::fmt::Display for TopicId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl std::fmt::Debug for TopicId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TopicId({self})")
    }
}

/// The text is no topic id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a topic id: {0:?}")]
pub struct InvalidTopicId(String);

impl std::str::FromStr for TopicId {
    type Err = InvalidTopicId;

    fn from_str(text: &str) -> Result<Self, InvalidTopicId> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidTopicId(text.into()))?;
        TopicId::from_slice(&bytes).ok_or_else(|| InvalidTopicId(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::TopicId;

    #[test]
    fn text_comes_back() {
        let id = TopicId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "MDEyMzQ1Njc4OWFiY2RlZg");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("MDEy".parse::<TopicId>().is_err());
    }
}
