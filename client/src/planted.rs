//! Mistakes that a test may plant in what makes a retry exact, to see that the simulation of the protocol finds them.
//!
//! Owns: their list, and a switch of this thread, as `broker/src/planted.rs` has for the broker's machines and says more of. Without
//! the feature `planted-bugs`, which nothing turns on by itself, the compiler leaves nothing of it.

#![cfg_attr(not(feature = "planted-bugs"), allow(unreachable_pub, reason = "only that feature lets tests reach it"))]

macro_rules! bugs {
    ($(#[doc = $doc:literal] $name:ident,)*) => {
        /// A mistake. It says what the machine does wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug { $(#[doc = $doc] $name,)* }

        impl Bug {
            /// All of them, and what each does.
            #[cfg(feature = "planted-bugs")]
            pub const ALL: &[(Bug, &str)] = &[$((Bug::$name, $doc),)*];
        }
    };
}

bugs! {
    /// A batch whose records timed out is left out of what is sent again.
    TimedOutLeftOut,
    /// A batch whose records timed out gives its place in the sequence up, though a broker may have it.
    TimedOutGivesPlace,
    /// The window is numbered anew without a new epoch.
    RenumberedInSameEpoch,
    /// A producer that the log has forgotten goes on with its sequences.
    ForgottenGoesOn,
    /// What the log of a leader holds when a stream is opened is taken for acknowledged.
    InLogIsAcknowledged,
    /// After a stream was lost the newest batch is sent first.
    NewestSentFirst,
    /// A batch is split, or numbered anew, though a stream that was lost may have it written yet.
    CopiesForgotten,
    /// A refusal that may pass is taken for one for good.
    RefusedForGood,
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a mistake in this thread's machines, or none.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this mistake is to be made: none is.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
