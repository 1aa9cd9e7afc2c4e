//! The command surface, driven as a user drives it: every command and flag, and what it says when it is misused.
//!
//! One file for each word of the surface. Read next: `harness/mod.rs`, which starts the brokers.

#[path = "../harness/mod.rs"]
mod harness;

mod bench;
mod consume;
mod demo;
mod groups;
mod produce;
mod replay;
mod segments;
mod servers;
mod surface;
mod topics;
