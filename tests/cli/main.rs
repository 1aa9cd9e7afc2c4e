//! The command surface, driven as a user drives it: every command and flag, and what it says when it is misused.
//!
//! One file for each word of the surface. Read next: `harness/mod.rs`, which starts the brokers.

#[path = "../harness/mod.rs"]
mod harness;

mod bench;
mod certs;
mod consume;
mod demo;
mod groups;
mod json;
mod produce;
mod readme;
mod replay;
mod segments;
mod servers;
mod surface;
mod topics;

use std::process::{Child, ExitStatus};
use std::time::Duration;

/// A process whose pipes a test holds itself; it does not outlive the test.
struct Held(Child);

impl Held {
    /// Starts it. The command's own ends of its pipes are closed here.
    fn start(mut command: std::process::Command) -> Held {
        Held(command.spawn().expect("the command starts"))
    }

    /// Its own end.
    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        self.wait_within(harness::DEADLINE)
    }

    #[track_caller]
    fn wait_within(&mut self, deadline: Duration) -> ExitStatus {
        harness::eventually_within(deadline, "the command ends", || self.0.try_wait().expect("it can be asked"))
    }

    fn signal(&self, name: &str) {
        harness::signal(self.0.id(), name);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
