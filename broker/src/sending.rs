//! What streams that send the log share: fetch streams and replica streams.
//!
//! What they send are slices of mapped segments, never copied before the packet. What is handed to QUIC and not yet acknowledged is at
//! most [`HANDED_BYTES`] above the congestion window, whatever the credit: more would only pile up in front of streams that are
//! opened later, and its pages could be gone by the time they are sent.
//!
//! Owns: the account of such bytes, who goes first, and writing. Refuses: to know what is read, and up to where. Read next:
//! [`crate::fetch`], [`crate::replica::serve`].

use crate::stream::StreamError;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Payload of one frame from memory: large enough that headers cost nothing, small enough that readers take turns.
pub(crate) const FRAME_BYTES: usize = 256 << 10;

/// What is read at once where the range is not in memory: a hop to the I/O pool and a disk's seek are worth more.
pub(crate) const COLD_FRAME_BYTES: usize = 1 << 20;

/// Bytes handed to QUIC and not yet sent.
pub(crate) const HANDED_BYTES: u64 = 1 << 20;

/// A reader that has more of the log before it catches up.
pub(crate) const FAR_BYTES: u64 = 4 << 20;

/// Who goes first on a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Precedence {
    /// A reader at the tail.
    Tail,
    /// A reader that has to catch up: whatever reads at the tail, and every acknowledgement, goes before it.
    CatchUp,
    /// A reader that wants no more than that, wherever it is.
    Background,
}

impl Precedence {
    pub(crate) const fn priority(self) -> i32 {
        match self {
            Precedence::Tail => 0,
            Precedence::CatchUp | Precedence::Background => -1,
        }
    }

    /// After a read that left much, or little, to the end of the log.
    pub(crate) fn after_read(self, is_far: impl FnOnce() -> bool) -> Precedence {
        if self == Precedence::Tail && is_far() { Precedence::CatchUp } else { self }
    }

    /// After a look that found nothing more.
    pub(crate) fn at_the_end(self) -> Precedence {
        if self == Precedence::CatchUp { Precedence::Tail } else { self }
    }
}

/// A number of bytes that goes up and down, and somebody who waits for it.
#[derive(Default)]
pub(crate) struct Account {
    bytes: AtomicU64,
    changed: Notify,
}

impl Account {
    pub(crate) fn get(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.change(|have| have.saturating_add(bytes));
    }

    pub(crate) fn take(&self, bytes: u64) {
        self.change(|have| have.saturating_sub(bytes));
    }

    fn change(&self, to: impl Fn(u64) -> u64) {
        let mut have = self.get();
        while let Err(now) = self.bytes.compare_exchange_weak(have, to(have), Ordering::AcqRel, Ordering::Acquire) {
            have = now;
        }
        self.changed.notify_one();
    }

    pub(crate) async fn until(&self, enough: impl Fn(u64) -> bool) {
        while !enough(self.get()) {
            self.changed.notified().await;
        }
    }
}

/// Bytes on their way: counted until QUIC lets go of them, which it does when they are acknowledged.
pub(crate) struct OnItsWay {
    pub(crate) bytes: Bytes,
    pub(crate) account: Arc<Account>,
}

impl AsRef<[u8]> for OnItsWay {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.account.take(self.bytes.len() as u64);
    }
}

/// Writes data that the reader granted credit for. Whoever grants it has the memory, and takes the bytes in whatever else it does: one
/// that takes none of them for as long as `patience` is not waited for.
pub(crate) async fn write_all(
    send: &mut quinn::SendStream,
    mut frame: &mut [Bytes],
    patience: Duration,
) -> Result<(), StreamError> {
    while !frame.is_empty() {
        let written = timeout(patience, send.write_chunks(frame)).await;
        let written = written.map_err(|_| StreamError::Unread("data within the credit"))??;
        frame = frame.get_mut(written.chunks..).unwrap_or_default();
    }
    Ok(())
}

pub(crate) fn prioritise(send: &quinn::SendStream, precedence: Precedence) {
    // An error means that the stream is gone, which the next write says.
    drop(send.set_priority(precedence.priority()));
}

#[cfg(test)]
mod tests {
    use super::Precedence::{Background, CatchUp, Tail};

    #[test]
    fn a_reader_lets_others_go_first_from_far_behind_until_it_has_caught_up() {
        assert_eq!(Tail.after_read(|| false), Tail);
        assert_eq!(Tail.after_read(|| true), CatchUp);
        assert_eq!(CatchUp.after_read(|| false), CatchUp, "near the end is not at it");
        assert_eq!(CatchUp.at_the_end(), Tail);
        assert_eq!((Background.at_the_end(), Background.after_read(|| false)), (Background, Background));
        assert!(CatchUp.priority() < Tail.priority() && Background.priority() == CatchUp.priority());
    }
}
