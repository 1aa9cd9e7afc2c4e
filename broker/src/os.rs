//! What the operating system says about this process. Elsewhere than on Linux the resident size is not known.
//!
//! Owns: three numbers, and the process's limit on open files. Read next: [`crate::metrics`].

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// `OPEN_MAX` of macOS, whose hard limit says "unlimited" and which takes no more than this for a soft one.
const OPEN_MAX: u64 = 10_240;

/// How many segments may be open at once: as many as configured, but at most a quarter of the descriptors that the process may have,
/// whose soft limit is raised to the hard one first. The rest is for connections, indexes and small files.
pub(crate) fn open_segments(configured: u32) -> usize {
    if let Err(error) = raise(getrlimit(Resource::Nofile), |limit| setrlimit(Resource::Nofile, limit)) {
        tracing::warn!(%error, "the limit on open files cannot be raised");
    }
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(u64::from(configured).min(descriptors / 4)).unwrap_or(usize::MAX).max(16)
}

/// Raises a soft limit to the hard one, or, where the system says that there is none and yet refuses to go without, to what
/// it takes.
fn raise(limit: Rlimit, set: impl Fn(Rlimit) -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    if limit.current == limit.maximum {
        return Ok(());
    }
    set(Rlimit { current: limit.maximum, ..limit }).or_else(|error| match (limit.current, limit.maximum) {
        (Some(soft), None) if soft < OPEN_MAX => set(Rlimit { current: Some(OPEN_MAX), ..limit }),
        _ => Err(error),
    })
}

/// User and system time of the process so far, in seconds.
pub(crate) fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    // Seconds and nanoseconds of a process fit a double exactly enough.
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes of the process that are in memory, mapped files included.
#[cfg(target_os = "linux")]
pub(crate) fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Bytes of the process that are in memory, mapped files included.
#[cfg(not(target_os = "linux"))]
pub(crate) fn resident_bytes() -> Option<u64> {
    None
}

/// What this start of the operating system is called.
#[cfg(target_os = "linux")]
pub(crate) fn kernel_start() -> Option<uuid::Uuid> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().parse().ok()
}

/// What this start of the operating system is called.
#[cfg(not(target_os = "linux"))]
pub(crate) fn kernel_start() -> Option<uuid::Uuid> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::cell::Cell;

    /// What a system that takes at most `most` descriptors is left with.
    fn raised(current: Option<u64>, maximum: Option<u64>, most: u64) -> (Option<u64>, rustix::io::Result<()>) {
        let now = Cell::new(current);
        let result = raise(Rlimit { current, maximum }, |limit| {
            if limit.maximum != maximum || limit.current.is_none_or(|wanted| wanted > most) {
                return Err(Errno::INVAL);
            }
            now.set(limit.current);
            Ok(())
        });
        (now.get(), result)
    }

    #[test]
    fn the_limit_on_open_files_is_raised_as_far_as_the_system_allows() {
        assert_eq!(raised(Some(1024), Some(524_288), u64::MAX), (Some(524_288), Ok(())));
        assert_eq!(raised(Some(1024), Some(1024), 0), (Some(1024), Ok(())), "nothing to ask for");
        assert_eq!(raised(Some(256), None, OPEN_MAX), (Some(OPEN_MAX), Ok(())), "as macOS does it");
        assert_eq!(raised(Some(20_000), None, OPEN_MAX), (Some(20_000), Err(Errno::INVAL)), "never lowered");
        assert_eq!(raised(Some(1024), Some(524_288), 4096), (Some(1024), Err(Errno::INVAL)));
    }
}
