//! The frame: what every stream is made of.
//!
//! ```text
//! 0        4         8                    8+H                     8+H+P
//! | u32 H  | u32 P   | header: H bytes    | payload: P bytes      |
//! ```
//! Both lengths are big-endian. The header is one protobuf message; the payload is raw record batches, or empty.
//!
//! Owns: encoding a frame's front, and taking frames apart as their bytes arrive, without joining payloads.
//! Refuses: sockets, and lengths above the limits it was given, before it allocates. Read next: [`crate::batch`].

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use std::collections::VecDeque;
use std::marker::PhantomData;

use crate::limits::FRAME_PREFIX_BYTES;

/// Why a peer's bytes are no frame. None of these can be retried: the peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header's length is above the limit.
    #[error("frame header of {bytes} bytes is larger than the limit of {limit}")]
    HeaderTooLarge {
        /// The length the peer named.
        bytes: usize,
        /// The largest length allowed here.
        limit: usize,
    },
    /// The payload's length is above the limit.
    #[error("frame payload of {bytes} bytes is larger than the limit of {limit}")]
    PayloadTooLarge {
        /// The length the peer named.
        bytes: usize,
        /// The largest length allowed here.
        limit: usize,
    },
    /// The header is no protobuf message of the expected type.
    #[error("frame header cannot be decoded: {0}")]
    Header(String),
}

/// The front of a frame: both lengths and the header. The payload, if any, is written after it.
///
/// # Panics
/// If the header or the payload is larger than a `u32` can tell, which [`crate::limits`] rules out.
pub fn encode<M: Message>(header: &M, payload_bytes: usize) -> Bytes {
    let header_bytes = header.encoded_len();
    let mut out = BytesMut::with_capacity(FRAME_PREFIX_BYTES + header_bytes);
    out.put_u32(u32::try_from(header_bytes).expect("a header is smaller than 4 GiB"));
    out.put_u32(u32::try_from(payload_bytes).expect("a payload is smaller than 4 GiB"));
    header.encode(&mut out).expect("the buffer grows");
    out.freeze()
}

/// What a [`FrameDecoder`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum FrameEvent<M> {
    /// A frame begins; `payload_bytes` of payload follow as [`FrameEvent::Payload`] parts.
    Header {
        /// The frame's header.
        message: M,
        /// Bytes of payload that follow; 0 means that the frame ends here.
        payload_bytes: usize,
    },
    /// The next part of the current frame's payload: a slice of what was pushed, never copied, never empty.
    Payload {
        /// The bytes.
        part: Bytes,
        /// Bytes of this frame's payload that have not arrived yet; 0 means that the frame ends here.
        remaining: usize,
    },
}

#[derive(Debug)]
enum Expect {
    Prefix,
    Header { header_bytes: usize, payload_bytes: usize },
    Payload { remaining: usize },
}

/// Takes frames apart as their bytes arrive. Memory held: the bytes pushed and not yet taken, at most.
#[derive(Debug)]
pub struct FrameDecoder<M> {
    max_header_bytes: usize,
    max_payload_bytes: usize,
    chunks: VecDeque<Bytes>,
    buffered: usize,
    expect: Expect,
    message: PhantomData<M>,
}

impl<M: Message + Default> FrameDecoder<M> {
    /// A decoder at the beginning of a frame, with the limits of this kind of stream in bytes.
    pub fn new(max_header_bytes: usize, max_payload_bytes: usize) -> Self {
        FrameDecoder {
            max_header_bytes,
            max_payload_bytes,
            chunks: VecDeque::new(),
            buffered: 0,
            expect: Expect::Prefix,
            message: PhantomData,
        }
    }

    /// Hands over what arrived next.
    pub fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.buffered += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    /// The next event, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// A [`FrameError`] as soon as the bytes cannot be a frame; the decoder is of no use afterwards.
    pub fn next_event(&mut self) -> Result<Option<FrameEvent<M>>, FrameError> {
        loop {
            match self.expect {
                Expect::Prefix => {
                    let Some(prefix) = self.take_exact(FRAME_PREFIX_BYTES) else { return Ok(None) };
                    let (header, payload) = prefix.split_at(4);
                    let header_bytes = be_u32(header);
                    let payload_bytes = be_u32(payload);
                    if header_bytes > self.max_header_bytes {
                        return Err(FrameError::HeaderTooLarge { bytes: header_bytes, limit: self.max_header_bytes });
                    }
                    if payload_bytes > self.max_payload_bytes {
                        return Err(FrameError::PayloadTooLarge {
                            bytes: payload_bytes,
                            limit: self.max_payload_bytes,
                        });
                    }
                    self.expect = Expect::Header { header_bytes, payload_bytes };
                }
                Expect::Header { header_bytes, payload_bytes } => {
                    let Some(header) = self.take_exact(header_bytes) else { return Ok(None) };
                    let message = M::decode(header).map_err(|e| FrameError::Header(e.to_string()))?;
                    self.expect = match payload_bytes {
                        0 => Expect::Prefix,
                        remaining => Expect::Payload { remaining },
                    };
                    return Ok(Some(FrameEvent::Header { message, payload_bytes }));
                }
                Expect::Payload { remaining } => {
                    let Some(mut part) = self.chunks.pop_front() else { return Ok(None) };
                    if part.len() > remaining {
                        self.chunks.push_front(part.split_off(remaining));
                    }
                    self.buffered -= part.len();
                    let remaining = remaining - part.len();
                    self.expect = if remaining == 0 { Expect::Prefix } else { Expect::Payload { remaining } };
                    return Ok(Some(FrameEvent::Payload { part, remaining }));
                }
            }
        }
    }

    /// Goes on with another kind of message: a stream's first frame is often of its own kind. Bytes pushed already are
    /// kept. `None` in the middle of a frame.
    pub fn followed_by<N: Message + Default>(self) -> Option<FrameDecoder<N>> {
        let Expect::Prefix = self.expect else { return None };
        Some(FrameDecoder {
            max_header_bytes: self.max_header_bytes,
            max_payload_bytes: self.max_payload_bytes,
            chunks: self.chunks,
            buffered: self.buffered,
            expect: Expect::Prefix,
            message: PhantomData,
        })
    }

    /// Whether everything pushed was taken and no frame is half done: where a stream may end.
    pub fn is_at_boundary(&self) -> bool {
        matches!(self.expect, Expect::Prefix) && self.buffered == 0
    }

    /// The same decoder with other limits, from the next frame on.
    pub fn with_limits(mut self, max_header_bytes: usize, max_payload_bytes: usize) -> Self {
        self.max_header_bytes = max_header_bytes;
        self.max_payload_bytes = max_payload_bytes;
        self
    }

    /// `n` bytes from the front, joined only if they came in several chunks.
    fn take_exact(&mut self, n: usize) -> Option<Bytes> {
        if self.buffered < n {
            return None;
        }
        self.buffered -= n;
        if n == 0 {
            return Some(Bytes::new());
        }
        if let Some(front) = self.chunks.front_mut()
            && front.len() >= n
        {
            let out = front.split_to(n);
            if front.is_empty() {
                self.chunks.pop_front();
            }
            return Some(out);
        }
        let mut out = BytesMut::with_capacity(n);
        while out.len() < n {
            let mut chunk = self.chunks.pop_front()?;
            let rest = n - out.len();
            if chunk.len() > rest {
                self.chunks.push_front(chunk.split_off(rest));
            }
            out.extend_from_slice(&chunk);
        }
        Some(out.freeze())
    }
}

fn be_u32(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Error, FetchCredit};
    use proptest::prelude::*;

    fn frames() -> Vec<u8> {
        let mut out = Vec::new();
        for (code, payload) in [(1, &b""[..]), (2, &b"payload"[..]), (300, &[7u8; 1000][..])] {
            let header = Error { code, message: "why".into(), ..Error::default() };
            out.extend_from_slice(&encode(&header, payload.len()));
            out.extend_from_slice(payload);
        }
        out
    }

    proptest! {
        #[test]
        fn frames_come_back_however_their_bytes_are_cut(cuts in proptest::collection::vec(1usize..40, 1..200)) {
            let bytes = Bytes::from(frames());
            let mut decoder = FrameDecoder::<Error>::new(100, 1000);
            let mut at = 0;
            let mut cuts = cuts.into_iter().cycle();
            let mut found: Vec<(u32, Vec<u8>)> = Vec::new();
            while at < bytes.len() {
                let end = (at + cuts.next().unwrap_or(1)).min(bytes.len());
                decoder.push(bytes.slice(at..end));
                at = end;
                while let Some(event) = decoder.next_event().unwrap() {
                    match event {
                        FrameEvent::Header { message, .. } => found.push((message.code, Vec::new())),
                        FrameEvent::Payload { part, .. } => found.last_mut().unwrap().1.extend_from_slice(&part),
                    }
                }
            }
            prop_assert!(decoder.is_at_boundary());
            prop_assert_eq!(found, vec![(1, vec![]), (2, b"payload".to_vec()), (300, vec![7; 1000])]);
        }

        #[test]
        fn random_bytes_are_refused_or_awaited_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = FrameDecoder::<FetchCredit>::new(64, 64);
            decoder.push(bytes.into());
            while let Ok(Some(_)) = decoder.next_event() {}
        }
    }

    #[test]
    fn a_stream_goes_on_with_another_message_and_loses_no_byte() {
        let mut bytes = encode(&Error { code: 5, ..Error::default() }, 0).to_vec();
        bytes.extend_from_slice(&encode(&FetchCredit { credit_bytes: 7 }, 3));
        bytes.extend_from_slice(b"abc");
        let mut decoder = FrameDecoder::<Error>::new(100, 100);
        decoder.push(bytes.into());
        assert!(matches!(decoder.next_event(), Ok(Some(FrameEvent::Header { message: Error { code: 5, .. }, .. }))));
        let mut decoder = decoder.followed_by::<FetchCredit>().unwrap();
        let message = FetchCredit { credit_bytes: 7 };
        assert_eq!(decoder.next_event(), Ok(Some(FrameEvent::Header { message, payload_bytes: 3 })));
        assert!(decoder.followed_by::<Error>().is_none(), "a payload is still to come");
    }

    #[test]
    fn lengths_above_the_limits_are_refused_before_their_bytes_arrive() {
        let mut decoder = FrameDecoder::<Error>::new(10, 10);
        decoder.push(Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]));
        assert!(matches!(decoder.next_event(), Err(FrameError::HeaderTooLarge { limit: 10, .. })));
        let mut decoder = FrameDecoder::<Error>::new(10, 10);
        decoder.push(Bytes::from_static(&[0, 0, 0, 1, 0, 0, 0, 11]));
        assert_eq!(decoder.next_event(), Err(FrameError::PayloadTooLarge { bytes: 11, limit: 10 }));
    }
}
