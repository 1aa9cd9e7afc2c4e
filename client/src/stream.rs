//! Frames on a QUIC stream.
//!
//! Owns: reading and writing them without joining payloads. Refuses: what the frames mean. Read next:
//! [`crate::connection`].

use bytes::Bytes;
use headwater_proto::frame::{self, FrameDecoder, FrameEvent};
use headwater_proto::limits::{MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES};
use prost::Message;
use quinn::{RecvStream, SendStream};

use crate::error::Error;

/// Chunks (packets' worth of bytes, mostly) that are taken from the transport at once.
const CHUNKS_AT_ONCE: usize = 32;

/// The receiving half of a stream.
pub(crate) struct FrameReader<M> {
    recv: RecvStream,
    decoder: FrameDecoder<M>,
    address: std::sync::Arc<str>,
}

impl<M: Message + Default> FrameReader<M> {
    pub(crate) fn new(recv: RecvStream, address: std::sync::Arc<str>) -> FrameReader<M> {
        FrameReader { recv, decoder: FrameDecoder::new(MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES), address }
    }

    /// The next part of a frame; `None` where the broker ended the stream between two frames. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<FrameEvent<M>>, Error> {
        loop {
            if let Some(event) = self.decoder.next_event().map_err(|e| Error::Protocol(e.to_string()))? {
                return Ok(Some(event));
            }
            let mut chunks: [Bytes; CHUNKS_AT_ONCE] = std::array::from_fn(|_| Bytes::new());
            match self.recv.read_chunks(&mut chunks).await {
                Ok(Some(count)) => chunks.into_iter().take(count).for_each(|chunk| self.decoder.push(chunk)),
                Ok(None) if self.decoder.is_at_boundary() => return Ok(None),
                Ok(None) => return Err(self.lost(&"the stream ended in the middle of a frame")),
                Err(e) => return Err(self.lost(&e)),
            }
        }
    }

    /// The next frame, which must have no payload.
    pub(crate) async fn message(&mut self) -> Result<Option<M>, Error> {
        match self.next().await? {
            Some(FrameEvent::Header { message, payload_bytes: 0 }) => Ok(Some(message)),
            Some(_) => Err(Error::Protocol("a payload where none belongs".into())),
            None => Ok(None),
        }
    }

    /// Goes on with another kind of message, between two frames.
    pub(crate) fn followed_by<N: Message + Default>(self) -> Result<FrameReader<N>, Error> {
        let decoder = self.decoder.followed_by();
        let decoder = decoder.ok_or_else(|| Error::Protocol("a payload where none belongs".into()))?;
        Ok(FrameReader { recv: self.recv, decoder, address: self.address })
    }

    fn lost(&self, reason: &dyn std::fmt::Display) -> Error {
        Error::ConnectionLost { address: self.address.to_string(), reason: reason.to_string() }
    }
}

/// Writes a frame without a payload.
pub(crate) async fn write_message<M: Message>(send: &mut SendStream, message: &M, address: &str) -> Result<(), Error> {
    send.write_chunk(frame::encode(message, 0))
        .await
        .map_err(|e| Error::ConnectionLost { address: address.into(), reason: e.to_string() })
}
