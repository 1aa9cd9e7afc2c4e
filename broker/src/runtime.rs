//! How many threads a broker runs on, and the runtime for them.
//!
//! Measured on two cores: one connection is served fastest by a runtime of one thread (a second one costs 5 % with packets
//! of 1,452 bytes and 21 % with 8,952, and three to five times the requests a second at depth 64), because a packet then
//! never changes cores. So up to two cores there is one network thread, and the other core is left to the I/O pool: group
//! commits, checks of large batches, cold reads. On larger machines many connections share the work, and half of the
//! cores serve them. The I/O pool has four threads for each core, because an fdatasync waits for the disk and not for a
//! core: sixteen files in parallel are flushed four times as often as one.
//!
//! Owns: those rules and [`build`]. Refuses: to be the only way: [`crate::Broker::start`] works inside any tokio runtime.
//! Read next: [`crate::pool`].

use crate::config::BrokerConfig;
use std::num::NonZero;
use std::thread::available_parallelism;

/// Threads that serve connections, for these settings on this machine.
pub fn network_threads(config: &BrokerConfig) -> usize {
    match config.network_threads {
        0 => auto_network_threads(cores()),
        threads => threads as usize,
    }
}

/// Threads of the I/O pool, for these settings on this machine.
pub fn io_threads(config: &BrokerConfig) -> usize {
    match config.io_threads {
        0 => auto_io_threads(cores()),
        threads => threads as usize,
    }
}

fn cores() -> usize {
    available_parallelism().map_or(1, NonZero::get)
}

fn auto_network_threads(cores: usize) -> usize {
    if cores <= 2 { 1 } else { cores.div_ceil(2) }
}

fn auto_io_threads(cores: usize) -> usize {
    (cores * 4).clamp(8, 64)
}

/// A runtime for a broker that has the process to itself.
///
/// # Errors
/// When the operating system refuses a thread.
pub fn build(config: &BrokerConfig) -> std::io::Result<tokio::runtime::Runtime> {
    let threads = network_threads(config);
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    builder.thread_name("headwater-net").enable_all().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_to_sixty_four_cores_get_threads_of_both_kinds() {
        let threads: Vec<_> =
            [1, 2, 4, 16, 64].into_iter().map(|n| (auto_network_threads(n), auto_io_threads(n))).collect();
        assert_eq!(threads, [(1, 8), (1, 8), (2, 16), (8, 64), (32, 64)]);
    }

    #[test]
    fn the_settings_win() {
        let config = BrokerConfig { network_threads: 3, io_threads: 5, ..BrokerConfig::default() };
        assert_eq!((network_threads(&config), io_threads(&config)), (3, 5));
        build(&config).unwrap().block_on(async {});
    }
}
