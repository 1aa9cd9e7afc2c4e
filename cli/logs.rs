//! Logs, on standard error.
//!
//! Owns: what is logged and how it looks: the flags first, then what the command itself says. Refuses: answers
//! ([`crate::output`]).

use anyhow::{Result, anyhow};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

use crate::args::{Global, LogFormat};

/// What commands log that are no broker.
pub(crate) const COMMAND_LEVEL: &str = "warn";

/// What the metadata quorum's library says beside is left out: every step of its own, and while a member is away each message to it.
const QUIET: &str = "openraft=error,openraft::replication=off,openraft::engine=off,openraft::core=off";

/// Starts to log at `level`, as `human` or `json`, unless the flags say otherwise.
pub(crate) fn start(global: &Global, level: &str, format: &str) -> Result<()> {
    let level = quieted(level);
    let filter = global.log.as_deref().unwrap_or(&level);
    let filter = EnvFilter::try_new(filter).map_err(|error| anyhow!("{filter:?} is no filter for logs: {error}"))?;
    let json = global.log_format.map_or(format == "json", |format| format == LogFormat::Json);
    // A log that nobody reads any more is lost in silence: to say so on standard error would panic.
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    // Somebody else may have started to log: an embedded broker's host. Theirs is as good.
    let _ = if json { logs.json().try_init() } else { logs.with_ansi(std::io::stderr().is_terminal()).try_init() };
    Ok(())
}

/// A plain level as a filter, but for whoever debugs: the broker tells what matters of the quorum's library.
fn quieted(level: &str) -> String {
    match level {
        "error" | "warn" | "info" => format!("{level},{QUIET}"),
        _ => level.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quorums_library_is_quiet_at_every_plain_level() {
        for level in ["error", "warn", "info"] {
            let filter = EnvFilter::try_new(quieted(level)).unwrap().to_string();
            assert!(filter.contains("openraft::replication=off") && filter.contains(level), "{filter}");
        }
        assert_eq!(quieted("debug"), "debug");
        assert_eq!(quieted("headwater_broker=trace"), "headwater_broker=trace");
    }
}
