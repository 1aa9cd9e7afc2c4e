//! A thread of its own for the quorum: a busy data path never looks like a death.
//!
//! Owns: the thread and its runtime. Refuses: anything that blocks, which the journal's thread does. Read next: [`super::node`].

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The thread. Dropping it ends what runs there.
#[derive(Debug)]
pub struct RaftThread {
    runtime: Handle,
    ended: CancellationToken,
    _ends: DropGuard,
}

impl RaftThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn start() -> std::io::Result<RaftThread> {
        let runtime = Builder::new_current_thread().thread_name("headwater-raft-io").enable_all().build()?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let ended = end.clone();
        std::thread::Builder::new().name("headwater-raft".to_owned()).spawn(move || {
            runtime.block_on(ended.cancelled());
            // A disk that hangs holds up nobody.
            runtime.shutdown_background();
        })?;
        Ok(RaftThread { runtime: handle, ended: end.clone(), _ends: end.drop_guard() })
    }

    /// Cancelled when it ends: whoever waits elsewhere for something that runs on it waits no more then.
    pub(super) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// What runs on it.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}
