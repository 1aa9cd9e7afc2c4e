//! Everything that peers must agree on: wire messages, frames, record batches, limits and error codes.
//!
//! Owns: formats. Refuses: I/O, clocks and settings; every function here is pure. Read next: [`frame`], then [`batch`].

pub mod batch;
pub mod code;
pub mod frame;
pub mod id;
pub mod limits;
pub mod wire;

pub use code::{ErrorCode, ResetCode};
pub use id::TopicId;

/// The feature in hello of a broker that serves watch streams.
pub const WATCH_FEATURE: &str = "watch";

impl wire::Error {
    /// An error message with a code's own word on whether to retry.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> wire::Error {
        wire::Error {
            code: code.number(),
            message: message.into(),
            retryable: code.retryable(),
            ..wire::Error::default()
        }
    }
}
