//! What each operating system does in its own way: space reserved in a file, the CPU time of this process, how exactly a
//! thread or a task sleeps, and whether anybody reads a pipe.
//!
//! Owns: the differences, each with a portable answer, and the crate's only unsafe line: tokio wants a promise that a file
//! descriptor it watches stays open, which is kept by giving it the descriptor. Read next: `commands/bench/disk.rs`.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

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

/// Wakes a task at a moment, to some microseconds: the runtime's own timers count in milliseconds, and a thread that
/// sleeps in its place has to wake the runtime afterwards. Where the system has nothing better, the runtime's timers do.
pub(crate) struct Alarm {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    timer: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
}

impl Alarm {
    /// Must be called inside a runtime.
    ///
    /// # Errors
    /// When the system refuses a timer.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    #[expect(unsafe_code, reason = "see the head of this file")]
    pub(crate) fn new() -> io::Result<Alarm> {
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: an owned descriptor is valid, always the same one, and open until it is dropped, with the alarm.
        let timer = unsafe { tokio::io::unix::AsyncFd::register_with_interest(timer, tokio::io::Interest::READABLE) }?;
        Ok(Alarm { timer })
    }

    /// Waits until `due`.
    ///
    /// # Errors
    /// When the system refuses to set the timer.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(crate) async fn wait_until(&mut self, due: Instant) -> io::Result<()> {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
        loop {
            let wait = due.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }),
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
            let mut rung = self.timer.readable().await?;
            // Setting it anew takes back what it told before.
            rung.clear_ready();
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    #[expect(clippy::unnecessary_wraps, reason = "systems with an exact timer may refuse one")]
    pub(crate) fn new() -> io::Result<Alarm> {
        Ok(Alarm {})
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    pub(crate) async fn wait_until(&mut self, due: Instant) -> io::Result<()> {
        tokio::time::sleep_until(due.into()).await;
        Ok(())
    }
}

/// Waits until nobody reads any more what is written to a pipe, a socket or a terminal. `false`: that cannot be known
/// here.
pub(crate) fn wait_until_unread(out: &File) -> bool {
    #[cfg(unix)]
    {
        use rustix::event::{PollFd, PollFlags, poll};
        // Errors and hang-ups are told unasked, except that macOS tells nothing to whoever asks for nothing.
        let mut polled = [PollFd::new(out, PollFlags::HUP)];
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

    #[tokio::test]
    async fn an_alarm_rings_when_it_is_due_and_never_before() {
        let mut alarm = super::Alarm::new().unwrap();
        for wait in [0, 300, 1_700, 20, 40_000].map(Duration::from_micros) {
            let due = Instant::now() + wait;
            tokio::time::timeout(Duration::from_secs(30), alarm.wait_until(due)).await.expect("it rings").unwrap();
            assert!(Instant::now() >= due, "{:?} too early", due - Instant::now());
        }
    }

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
