//! What each operating system does in its own way: space reserved in a file, the CPU time of this process, how exactly a
//! thread sleeps, and whether anybody reads a pipe.
//!
//! Owns: the differences, each with a portable answer. Refuses: unsafe code. Read next: `commands/bench/disk.rs`.

use std::fs::File;
use std::io;
use std::time::Duration;

/// Reserves room in a file, so that writing there allocates nothing. Where the system cannot, the file grows as it is
/// written.
pub(crate) fn reserve(file: &File, offset: u64, len: u64) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), offset, len)?;
    #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
    let _ = (file, offset, len);
    Ok(())
}

/// User and system time of this process so far; zero where the system does not say.
pub(crate) fn cpu_time() -> Duration {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
    #[cfg(not(unix))]
    Duration::ZERO
}

/// Makes this thread's sleeps end when they are due: Linux adds up to 50 microseconds unless told.
pub(crate) fn sleep_exactly() {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Err(error) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
        tracing::debug!(%error, "sleeps of this thread stay inexact");
    }
}

/// Waits until nobody reads any more what is written to a pipe, a socket or a terminal. `false`: that cannot be known
/// here.
pub(crate) fn wait_until_unread(out: &File) -> bool {
    #[cfg(unix)]
    {
        use rustix::event::{PollFd, PollFlags, poll};
        // Errors and hang-ups are told unasked.
        let mut polled = [PollFd::new(out, PollFlags::empty())];
        loop {
            match poll(&mut polled, None) {
                Ok(_) => return polled[0].revents().intersects(PollFlags::ERR | PollFlags::HUP),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
    #[cfg(not(unix))]
    {
        let _ = out;
        false
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    #[test]
    fn busy_work_costs_cpu_time() {
        let before = super::cpu_time();
        let began = Instant::now();
        while super::cpu_time() - before < Duration::from_millis(5) {
            assert!(began.elapsed() < Duration::from_secs(30), "CPU time does not pass");
            std::hint::black_box((0..1000).sum::<u64>());
        }
    }
}
