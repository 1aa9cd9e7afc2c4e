//! What the operating system says about this process. Elsewhere than on Linux the resident size is not known.
//!
//! Owns: three numbers, and the process's limit on open files. Read next: [`crate::metrics`].

/// How many segments may be open at once: as many as configured, but at most a quarter of the descriptors that the process may have,
/// whose soft limit is raised to the hard one first. The rest is for connections, indexes and small files.
pub(crate) fn open_segments(configured: u32) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the limit on open files cannot be raised");
    }
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(u64::from(configured).min(descriptors / 4)).unwrap_or(usize::MAX).max(16)
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
