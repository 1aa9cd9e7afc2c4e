//! Produce credit: how many bytes of payload a client may have on the way to this broker.
//!
//! Owns: the arithmetic ([`ConnectionCredit`], [`StreamCredit`]), pure. What must always hold, for a connection:
//!
//! * outstanding credit and received bytes that are not released yet, of all streams together, are at most the
//!   connection's budget plus [`CreditLimits::stream_min_bytes`] for each stream plus the loans. All of it lies below the
//!   receive windows that [`crate::quic`] sets, so QUIC's flow control never stops a stream (DESIGN section 6: windows
//!   that bind starve streams at random).
//! * A stream always has, or will get back when what it sent is released, its minimum.
//!
//! A stream begins with a small share. A share grows by what the stream uses, up to an equal part of the budget, and
//! shrinks again when more streams are open: credit gathers where the traffic is. A frame larger than its stream's share
//! is granted the rest as a loan, in parts, once the loan budget permits.
//!
//! Refuses: clocks, streams, channels. Read next: [`crate::produce`], which drives it.

/// The bounds on produce credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CreditLimits {
    /// Bytes for all streams of a connection.
    pub(crate) connection_bytes: u64,
    /// Most bytes for one stream, and the size of a loan's parts.
    pub(crate) stream_max_bytes: u64,
    /// Fewest bytes for one stream, even where the budget is spent.
    pub(crate) stream_min_bytes: u64,
    /// Most bytes that a stream begins with.
    pub(crate) stream_initial_bytes: u64,
}

/// What the streams of one connection share.
#[derive(Debug)]
pub(crate) struct ConnectionCredit {
    limits: CreditLimits,
    streams: u64,
    reserved: u64,
}

/// A peer sent more than it was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{sent} bytes arrived where {credit} bytes of credit were left")]
pub(crate) struct CreditExceeded {
    pub(crate) sent: u64,
    pub(crate) credit: u64,
}

/// One produce stream's account.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StreamCredit {
    /// Bytes of the connection's budget that this stream holds: credit outstanding plus bytes received and not released.
    share: u64,
    /// Bytes the client may still send.
    outstanding: u64,
    /// Bytes received and not yet released.
    held: u64,
    /// Part of outstanding and held that is lent beyond the share.
    loan: u64,
}

impl ConnectionCredit {
    pub(crate) fn new(limits: CreditLimits) -> ConnectionCredit {
        ConnectionCredit { limits, streams: 0, reserved: 0 }
    }

    /// A stream opens: its first share is a sixteenth of what is left, within the limits.
    pub(crate) fn open(&mut self) -> StreamCredit {
        let left = self.limits.connection_bytes.saturating_sub(self.reserved);
        let share = (left / 16).min(self.limits.stream_initial_bytes).max(self.limits.stream_min_bytes);
        self.streams += 1;
        self.reserved += share;
        StreamCredit { share, outstanding: share, held: 0, loan: 0 }
    }

    /// A stream ended; what it held is free.
    pub(crate) fn close(&mut self, stream: &StreamCredit) {
        self.streams -= 1;
        self.reserved -= stream.share;
    }

    /// The share at which a stream neither grows nor shrinks: an equal part of the budget.
    fn target(&self) -> u64 {
        (self.limits.connection_bytes / self.streams.max(1))
            .clamp(self.limits.stream_min_bytes, self.limits.stream_max_bytes)
    }

    /// `bytes` that `stream` had sent are no longer in memory. Returns how many bytes to grant it.
    pub(crate) fn release(&mut self, stream: &mut StreamCredit, bytes: u64) -> u64 {
        debug_assert!(bytes <= stream.held);
        let bytes = bytes.min(stream.held);
        stream.held -= bytes;
        // What was lent is paid back first.
        let repaid = bytes.min(stream.loan);
        stream.loan -= repaid;
        let mut grant = bytes - repaid;
        let target = self.target();
        if stream.share > target {
            let given_back = grant.min(stream.share - target);
            stream.share -= given_back;
            self.reserved -= given_back;
            grant -= given_back;
        } else {
            let left = self.limits.connection_bytes.saturating_sub(self.reserved);
            let more = grant.min(target - stream.share).min(left);
            stream.share += more;
            self.reserved += more;
            grant += more;
        }
        stream.outstanding += grant;
        grant
    }
}

impl StreamCredit {
    /// `bytes` of payload arrived.
    ///
    /// # Errors
    /// When the client had less credit than that.
    pub(crate) fn receive(&mut self, bytes: u64) -> Result<(), CreditExceeded> {
        if bytes > self.outstanding {
            return Err(CreditExceeded { sent: bytes, credit: self.outstanding });
        }
        self.outstanding -= bytes;
        self.held += bytes;
        Ok(())
    }

    /// Bytes the client may still send.
    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// The bytes that a frame needs beyond all that its stream will be granted by itself: `remaining` bytes of it are to
    /// come, and `held_by_frame` are held by it and are released only when it is complete. 0: no loan is needed.
    pub(crate) fn shortfall(&self, remaining: u64, held_by_frame: u64) -> u64 {
        // What earlier frames hold comes back as credit, unless the share is shrinking meanwhile: so only what is there
        // now counts once nothing else is held.
        if self.held > held_by_frame { 0 } else { remaining.saturating_sub(self.outstanding) }
    }

    /// `bytes` are lent to the stream.
    pub(crate) fn lend(&mut self, bytes: u64) {
        self.loan += bytes;
        self.outstanding += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: CreditLimits = CreditLimits {
        connection_bytes: 64 << 20,
        stream_max_bytes: 4 << 20,
        stream_min_bytes: 4 << 10,
        stream_initial_bytes: 1 << 20,
    };

    #[test]
    fn a_lone_busy_stream_grows_to_the_largest_share() {
        let mut connection = ConnectionCredit::new(LIMITS);
        let mut stream = connection.open();
        assert_eq!(stream.outstanding(), 1 << 20);
        for _ in 0..10 {
            let sent = stream.outstanding();
            stream.receive(sent).unwrap();
            connection.release(&mut stream, sent);
        }
        assert_eq!(stream.outstanding(), 4 << 20);
    }

    #[test]
    fn a_thousand_streams_all_begin_and_busy_ones_even_out() {
        let mut connection = ConnectionCredit::new(LIMITS);
        let mut streams: Vec<_> = (0..1000).map(|_| connection.open()).collect();
        assert!(streams.iter().all(|s| s.outstanding() >= LIMITS.stream_min_bytes));
        for _ in 0..40 {
            for stream in &mut streams {
                let sent = stream.outstanding();
                stream.receive(sent).unwrap();
                connection.release(stream, sent);
            }
        }
        let (least, most) =
            streams.iter().fold((u64::MAX, 0), |(l, m), s| (l.min(s.outstanding()), m.max(s.outstanding())));
        assert!(most <= 2 * least, "{least} to {most}");
    }

    #[test]
    fn more_than_the_credit_is_refused() {
        let mut connection = ConnectionCredit::new(LIMITS);
        let mut stream = connection.open();
        let credit = stream.outstanding();
        assert_eq!(stream.receive(credit + 1), Err(CreditExceeded { sent: credit + 1, credit }));
    }

    #[test]
    fn a_frame_larger_than_the_share_is_lent_the_rest_and_pays_it_back() {
        let mut connection = ConnectionCredit::new(LIMITS);
        let mut stream = connection.open();
        let share = stream.outstanding();
        let frame = 10 << 20;
        stream.receive(share).unwrap();
        let lack = stream.shortfall(frame - share, share);
        assert_eq!(lack, frame - share);
        stream.lend(lack);
        stream.receive(lack).unwrap();
        assert_eq!(stream.shortfall(0, frame), 0);
        let grant = connection.release(&mut stream, frame);
        assert!(grant >= share, "the share comes back and the loan does not");
        assert_eq!(stream.outstanding(), grant);
        assert!(stream.outstanding() <= LIMITS.stream_max_bytes);
    }

    #[test]
    fn a_frame_waits_for_what_earlier_frames_will_release() {
        let mut connection = ConnectionCredit::new(LIMITS);
        let mut stream = connection.open();
        let share = stream.outstanding();
        stream.receive(share).unwrap();
        assert_eq!(stream.shortfall(share, share / 2), 0, "the other half is released soon");
    }

    proptest! {
        #[test]
        fn the_budget_holds_whatever_happens(steps in proptest::collection::vec((0u8..4, any::<u16>(), 0u64..(2 << 20)), 1..400)) {
            let mut connection = ConnectionCredit::new(LIMITS);
            let mut streams: Vec<StreamCredit> = Vec::new();
            for (what, which, bytes) in steps {
                let n = streams.len();
                match what {
                    0 => streams.push(connection.open()),
                    1 if n > 0 => { let s = streams.swap_remove(usize::from(which) % n); connection.close(&s); }
                    2 if n > 0 => { let s = &mut streams[usize::from(which) % n]; let sent = bytes.min(s.outstanding()); s.receive(sent).unwrap(); }
                    3 if n > 0 => { let s = &mut streams[usize::from(which) % n]; let held = bytes.min(s.held); connection.release(s, held); }
                    _ => {}
                }
                let total: u64 = streams.iter().map(|s| s.outstanding + s.held).sum();
                prop_assert_eq!(total, connection.reserved);
                prop_assert!(total <= LIMITS.connection_bytes + streams.len() as u64 * LIMITS.stream_min_bytes);
                for s in &streams {
                    prop_assert!(s.share >= LIMITS.stream_min_bytes && s.share <= LIMITS.stream_max_bytes);
                    prop_assert_eq!(s.share, s.outstanding + s.held);
                }
            }
        }
    }
}
