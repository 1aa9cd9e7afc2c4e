//! What the operating system says about this process. Elsewhere than on Linux the resident size is not known.
//!
//! Owns: two numbers. Read next: [`crate::metrics`].

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
