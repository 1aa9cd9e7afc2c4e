//! `headwater up --brokers N`, and commands against it.

use crate::harness::{Answer, Running, eventually, headwater, run, signal};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A development cluster, which ends with the test.
pub(crate) struct Development {
    folder: tempfile::TempDir,
    /// The command that runs it.
    up: Running,
    /// What its first line said.
    pub(crate) ready: Value,
    revived: Vec<Running>,
}

impl Development {
    /// So many brokers, with these settings.
    pub(crate) fn up(brokers: u32, settings: &[&str]) -> Development {
        let folder = tempfile::tempdir().expect("a folder");
        let (up, ready) = start(folder.path(), brokers, settings);
        Development { folder, up, ready, revived: Vec::new() }
    }

    /// Ends the command, and with it the brokers.
    pub(crate) fn end(&mut self) {
        assert!(self.up.terminate().success(), "it ends well");
    }

    /// Runs the command again, on what is there.
    pub(crate) fn up_again(&mut self, brokers: u32) {
        (self.up, self.ready) = start(self.folder.path(), brokers, &[]);
    }

    pub(crate) fn profile(&self) -> String {
        self.ready["profile"].as_str().expect("a path").to_owned()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Answer {
        run(&[args, &["--profile", &self.profile()]].concat())
    }

    pub(crate) fn object(&self, args: &[&str]) -> Value {
        self.command(&[args, &["--json"]].concat()).ok().object()
    }

    /// A command that reads this.
    pub(crate) fn feed(&self, args: &[&str], input: &str) {
        let file = self.folder.path().join("input");
        std::fs::write(&file, input).expect("written");
        self.command(&[args, &["--file", file.to_str().expect("text")]].concat()).ok();
    }

    pub(crate) fn until<T>(&self, what: &str, probe: impl FnMut() -> Option<T>) -> T {
        eventually(what, probe)
    }

    /// A broker's folder.
    pub(crate) fn data(&self, id: usize) -> PathBuf {
        PathBuf::from(self.ready["brokers"][id - 1]["data"].as_str().expect("a path"))
    }

    pub(crate) fn pid(&self, id: usize) -> u32 {
        let pid = self.ready["brokers"][id - 1]["pid"].as_u64().expect("a number");
        u32::try_from(pid).expect("a pid")
    }

    /// Kills a broker of the command's.
    pub(crate) fn kill(&self, id: usize) {
        signal(self.pid(id), "KILL");
    }

    /// Starts a broker again by its configuration.
    pub(crate) fn revive(&mut self, id: usize) {
        let config = self.data(id).join("broker.toml");
        let mut command = headwater();
        command.args(["broker", "--config", config.to_str().expect("text"), "--json"]);
        self.revived.push(Running::start(command));
    }
}

fn start(folder: &Path, brokers: u32, settings: &[&str]) -> (Running, Value) {
    let mut command = headwater();
    command.current_dir(folder).args(["up", "--brokers", &brokers.to_string(), "--data", "data", "--json"]);
    for setting in settings {
        command.args(["-c", setting]);
    }
    let up = Running::start(command);
    let ready = eventually("the first line", || up.json().first().cloned());
    (up, ready)
}
