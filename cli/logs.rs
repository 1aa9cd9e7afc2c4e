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

/// What its library says of the metadata quorum beside: while a member is away, it would complain of each message to it.
const QUIET: &str = "info,openraft=error,openraft::replication=off,openraft::engine=off,openraft::core=off";

/// Starts to log at `level`, as `human` or `json`, unless the flags say otherwise.
pub(crate) fn start(global: &Global, level: &str, format: &str) -> Result<()> {
    // At this level the quorum's library tells every step of its own; the broker tells what matters of it.
    let level = if level == "info" { QUIET } else { level };
    let filter = global.log.as_deref().unwrap_or(level);
    let filter = EnvFilter::try_new(filter).map_err(|error| anyhow!("{filter:?} is no filter for logs: {error}"))?;
    let json = global.log_format.map_or(format == "json", |format| format == LogFormat::Json);
    // A log that nobody reads any more is lost in silence: to say so on standard error would panic.
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    // Somebody else may have started to log: an embedded broker's host. Theirs is as good.
    let _ = if json { logs.json().try_init() } else { logs.with_ansi(std::io::stderr().is_terminal()).try_init() };
    Ok(())
}
