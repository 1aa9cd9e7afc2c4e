//! Faults of processes, disks and networks against real brokers, and a checker of what their clients saw.

#[path = "../harness/mod.rs"]
mod harness;

mod checker;
mod checker_tests;
#[cfg(target_os = "linux")]
mod clients;
#[cfg(target_os = "linux")]
mod cluster;
#[cfg(target_os = "linux")]
mod figures;
mod history;
#[cfg(target_os = "linux")]
mod lost_writes;
#[cfg(target_os = "linux")]
mod nemesis;
#[cfg(target_os = "linux")]
mod quorum;
#[cfg(target_os = "linux")]
mod relay;
#[cfg(target_os = "linux")]
mod serving;
#[cfg(target_os = "linux")]
mod unsynced;
