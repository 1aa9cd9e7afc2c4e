//! Power failures for real processes. kill -9 leaves the page cache, so by itself it cannot show that something was acknowledged
//! before it was on the disk.
//!
//! A broker runs on [`UnsyncedFiles`], which are the operating system's, and write down beforehand how each change is undone
//! ([`log`]). Once the process is dead, [`PowerFailure`] undoes what was never synced: all of it, or a seed's choice of it, down
//! to sectors. What a crash may leave is what `storage/src/files.rs` says.

mod files;
mod log;
mod power;
mod tests;

pub(super) use files::{Sync, UnsyncedFiles};
pub(super) use power::{Loss, PowerFailure};
