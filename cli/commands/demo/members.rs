//! The demo's consumers: this command again, each in a process of its own.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A record that a member printed.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Seen {
    pub(super) partition: u32,
    pub(super) offset: i64,
    pub(super) timestamp: i64,
    pub(super) key: Option<String>,
    pub(super) value: String,
}

/// A member of the group.
pub(super) struct Member {
    child: Child,
    seen: Arc<Mutex<Vec<Seen>>>,
    reader: Option<JoinHandle<()>>,
}

impl Member {
    /// Starts `headwater consume TOPIC --group GROUP`.
    pub(super) fn start(profile: &Path, topic: &str, group: &str) -> Result<Member> {
        let mut child = command(profile)?
            .args(["consume", topic, "--group", group, "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a consumer")?;
        let lines = BufReader::new(child.stdout.take().context("the consumer has no output")?).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let read = move || {
            // A line that a kill has cut is none.
            for record in lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(record);
            }
        };
        let reader = std::thread::Builder::new().spawn(read).context("cannot start a thread")?;
        Ok(Member { child, seen, reader: Some(reader) })
    }

    /// What it printed so far.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills it as a power cut would; what it had printed.
    pub(super) fn kill(mut self) -> Result<Vec<Seen>> {
        self.child.kill().context("cannot kill a consumer")?;
        self.finish()
    }

    /// Asks it to end, which it must do well; what it had printed.
    pub(super) async fn end(mut self) -> Result<Vec<Seen>> {
        terminate(&self.child)?;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        };
        if !status.success() && cfg!(unix) {
            bail!("a consumer ended with {status}");
        }
        self.finish()
    }

    fn finish(&mut self) -> Result<Vec<Seen>> {
        self.child.wait()?;
        if let Some(reader) = self.reader.take() {
            // It ends with the output it reads.
            let _ = reader.join();
        }
        Ok(self.seen())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(unix)]
fn terminate(child: &Child) -> Result<()> {
    let pid =
        i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).context("a consumer without a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("cannot signal a consumer")
}

#[cfg(not(unix))]
fn terminate(_child: &Child) -> Result<()> {
    bail!("this system has no signal that asks a process to end")
}

/// Runs this command with arguments and gives its output; an error if it failed.
pub(super) fn headwater(profile: &Path, arguments: &[&str]) -> Result<String> {
    let output = command(profile)?.args(arguments).output().context("cannot start this program again")?;
    if !output.status.success() {
        bail!("`headwater {}`: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("the output is no text")
}

fn command(profile: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
    command.stdin(Stdio::null());
    match profile.as_os_str().is_empty() {
        true => command.env_remove("HEADWATER_PROFILE"),
        false => command.env("HEADWATER_PROFILE", profile),
    };
    Ok(command)
}
