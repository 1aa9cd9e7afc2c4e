//! Frames on a QUIC stream: what every stream's task reads and writes through.
//!
//! Owns: [`Frames`] (the receiving side, with whatever was read beyond the last frame) and [`write_within`]; the errors of
//! both. Refuses: to know what a message means. Read next: [`crate::session`].

use crate::tls::principal::NotAuthorized;
use bytes::Bytes;
use headwater_proto::frame::{self, FrameDecoder, FrameError, FrameEvent};
use headwater_proto::{ErrorCode, ResetCode, wire};
use prost::Message;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Why a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the stream ended in the middle of a frame")]
    EndedInFrame,
    #[error("{0} did not arrive in time")]
    Deadline(&'static str),
    #[error("{0} was not read in time")]
    Unread(&'static str),
    #[error("{1}")]
    Refused(ErrorCode, String),
    #[error("reading: {0}")]
    Read(#[from] quinn::ReadError),
    #[error("writing: {0}")]
    Write(#[from] quinn::WriteError),
}

impl From<NotAuthorized> for StreamError {
    fn from(error: NotAuthorized) -> StreamError {
        StreamError::Refused(ErrorCode::ClusterAuthorizationFailed, error.to_string())
    }
}

impl StreamError {
    /// Whether the peer is to blame: input that was refused, rather than a stream, a connection or a broker that goes away.
    pub(crate) fn is_offence(&self) -> bool {
        match self {
            StreamError::Frame(_) | StreamError::EndedInFrame => true,
            // What passes by itself is nobody's fault: the broker shuts down, or has too much to do.
            StreamError::Refused(code, _) => !code.retryable(),
            StreamError::Deadline(_) | StreamError::Unread(_) | StreamError::Read(_) | StreamError::Write(_) => false,
        }
    }

    /// How the stream is reset and stopped.
    pub(crate) fn reset_code(&self) -> ResetCode {
        match self {
            StreamError::Frame(FrameError::HeaderTooLarge { .. } | FrameError::PayloadTooLarge { .. }) => {
                ResetCode::Limit
            }
            StreamError::Frame(_) | StreamError::EndedInFrame => ResetCode::Protocol,
            StreamError::Deadline(_) | StreamError::Unread(_) => ResetCode::Deadline,
            StreamError::Refused(ErrorCode::ShuttingDown, _) => ResetCode::ShuttingDown,
            StreamError::Refused(ErrorCode::LimitExceeded | ErrorCode::CreditExceeded, _) => ResetCode::Limit,
            StreamError::Refused(..) => ResetCode::Protocol,
            StreamError::Read(_) | StreamError::Write(_) => ResetCode::Done,
        }
    }

    /// What the peer is told before the reset; `None` where it is gone anyway.
    pub(crate) fn to_wire(&self) -> Option<wire::Error> {
        let code = match self {
            StreamError::Frame(FrameError::HeaderTooLarge { .. } | FrameError::PayloadTooLarge { .. }) => {
                ErrorCode::LimitExceeded
            }
            StreamError::Frame(_) | StreamError::EndedInFrame => ErrorCode::InvalidRequest,
            StreamError::Deadline(_) => ErrorCode::TimedOut,
            StreamError::Refused(code, _) => *code,
            // Half a frame may be on its way; and who did not read that does not read this.
            StreamError::Read(_) | StreamError::Write(_) | StreamError::Unread(_) => return None,
        };
        Some(wire::Error::new(code, self.to_string()))
    }
}

/// Chunks (QUIC packets' worth) taken from a stream at once.
const CHUNKS_PER_READ: usize = 32;

/// The receiving side of a stream whose frames carry `M`.
pub(crate) struct Frames<M> {
    recv: quinn::RecvStream,
    decoder: FrameDecoder<M>,
    /// When the frame that is under way began to arrive.
    frame_began: Option<Instant>,
    frame_timeout: Duration,
}

impl<M: Message + Default> Frames<M> {
    /// A stream at its beginning, with the limits on its first frame.
    pub(crate) fn new(
        recv: quinn::RecvStream,
        max_header_bytes: usize,
        max_payload_bytes: usize,
        frame_timeout: Duration,
    ) -> Frames<M> {
        let decoder = FrameDecoder::new(max_header_bytes, max_payload_bytes);
        Frames { recv, decoder, frame_began: None, frame_timeout }
    }

    /// The rest of the stream, whose frames carry `N`, after its first frame.
    ///
    /// # Errors
    /// When the first frame goes on: it has no payload.
    pub(crate) fn followed_by<N: Message + Default>(
        self,
        max_header_bytes: usize,
        max_payload_bytes: usize,
    ) -> Result<Frames<N>, StreamError> {
        let decoder = self.decoder.followed_by::<N>().ok_or(StreamError::EndedInFrame)?;
        Ok(Frames {
            recv: self.recv,
            decoder: decoder.with_limits(max_header_bytes, max_payload_bytes),
            frame_began: None,
            frame_timeout: self.frame_timeout,
        })
    }

    /// The next event, or `None` where the peer finished the stream between two frames. Safe to cancel.
    ///
    /// # Errors
    /// When the bytes are no frames, the stream or the connection ended, or a frame that began does not end in time.
    pub(crate) async fn next(&mut self) -> Result<Option<FrameEvent<M>>, StreamError> {
        loop {
            if let Some(event) = self.decoder.next_event()? {
                match &event {
                    FrameEvent::Header { payload_bytes: 0, .. } | FrameEvent::Payload { remaining: 0, .. } => {
                        self.frame_began = None;
                    }
                    _ => self.frame_began = self.frame_began.or_else(|| Some(Instant::now())),
                }
                return Ok(Some(event));
            }
            if self.decoder.is_at_boundary() {
                self.frame_began = None;
            } else if self.frame_began.is_none() {
                self.frame_began = Some(Instant::now());
            }
            let mut chunks: [Bytes; CHUNKS_PER_READ] = std::array::from_fn(|_| Bytes::new());
            let read = match self.frame_began {
                Some(began) => timeout_at(began + self.frame_timeout, self.recv.read_chunks(&mut chunks))
                    .await
                    .map_err(|_| StreamError::Deadline("the rest of a frame"))??,
                None => self.recv.read_chunks(&mut chunks).await?,
            };
            match read {
                Some(n) => chunks.into_iter().take(n).for_each(|chunk| self.decoder.push(chunk)),
                None if self.decoder.is_at_boundary() => return Ok(None),
                None => return Err(StreamError::EndedInFrame),
            }
        }
    }

    /// A message that has no payload: credit, heartbeats, the first frame of a stream.
    ///
    /// # Errors
    /// As [`Frames::next`], and when a payload follows.
    pub(crate) async fn message(&mut self) -> Result<Option<M>, StreamError> {
        match self.next().await? {
            None => Ok(None),
            Some(FrameEvent::Header { message, payload_bytes: 0 }) => Ok(Some(message)),
            Some(_) => Err(StreamError::Refused(ErrorCode::InvalidRequest, "this frame carries no payload".into())),
        }
    }

    /// The frame under way was held up by this broker: its deadline begins anew.
    pub(crate) fn restart_deadline(&mut self) {
        if self.frame_began.is_some() {
            self.frame_began = Some(Instant::now());
        }
    }
}

/// Writes whole frames to a peer that has `limit` to make room for them. `what`: what they are to it.
///
/// # Errors
/// When the stream or the connection ended, or the peer made no room; part of a frame may then have been sent.
pub(crate) async fn write_within(
    send: &mut quinn::SendStream,
    frames: Bytes,
    limit: Duration,
    what: &'static str,
) -> Result<(), StreamError> {
    match timeout(limit, send.write_chunk(frames)).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(StreamError::Unread(what)),
    }
}

/// As [`write_within`], of one frame that has no payload.
pub(crate) async fn send_within<M: Message>(
    send: &mut quinn::SendStream,
    header: &M,
    limit: Duration,
    what: &'static str,
) -> Result<(), StreamError> {
    write_within(send, frame::encode(header, 0), limit, what).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every client that watched for new leaders was once logged as an offender when its broker shut down.
    #[test]
    fn a_peer_is_not_to_blame_for_a_broker_that_goes_away() {
        let refused = |code| StreamError::Refused(code, String::new()).is_offence();
        assert!(!refused(ErrorCode::ShuttingDown) && !refused(ErrorCode::Overloaded));
        assert!(refused(ErrorCode::InvalidRequest) && refused(ErrorCode::CreditExceeded));
        assert!(!StreamError::Read(quinn::ReadError::ClosedStream).is_offence());
        assert!(StreamError::EndedInFrame.is_offence(), "half a frame, and then an end");
    }
}
