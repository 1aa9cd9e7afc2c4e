//! Bytes decide what happens to a log, its disk and its process: the log is what the model of `storage/tests/model` says it is.
//!
//! `cargo +nightly fuzz run log_model`
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../storage/tests/model/choices.rs"]
mod choices;
#[path = "../../storage/tests/model/expected.rs"]
mod expected;
#[path = "../../storage/tests/model/world.rs"]
mod world;

const MOST_OPERATIONS: usize = 500;

fuzz_target!(|data: &[u8]| world::World::new(choices::Choices::Bytes(data)).run(MOST_OPERATIONS));
