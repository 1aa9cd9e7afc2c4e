//! Real brokers as child processes, driven through the `headwater` command alone.
//!
//! Owns: starting, killing and restarting a broker, running commands against it, waiting with a deadline.
//! Refuses: fixed ports, sleeping in place of waiting, and leaving a process behind. Read next: any `tests/*/main.rs`.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything in a test may take before it counts as hanging.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The `headwater` binary under test.
pub fn headwater() -> Command {
    Command::new(env!("CARGO_BIN_EXE_headwater"))
}

/// Fixtures that Kafka wrote, with Kafka's own answers.
pub fn kafka_logs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kafka-logs")
}

/// Asks `probe` again until it answers, and fails the test with `what` when it does not within [`DEADLINE`].
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, probe)
}

/// [`eventually`] with a deadline of its own.
pub fn eventually_within<T>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {deadline:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a command answered.
pub struct Answer {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Answer {
    fn from(output: Output) -> Answer {
        Answer {
            status: output.status,
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The command must have succeeded.
    #[track_caller]
    pub fn ok(self) -> Answer {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
        self
    }

    /// The command must have ended with this exit code and said why, without a panic.
    #[track_caller]
    pub fn fails(self, code: i32) -> Answer {
        assert_eq!(self.status.code(), Some(code), "stderr: {}\nstdout: {}", self.stderr, self.text());
        assert!(!self.stderr.trim().is_empty(), "a failure must say why");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn lines(&self) -> Vec<String> {
        self.text().lines().map(str::to_owned).collect()
    }

    /// One JSON value a line.
    #[track_caller]
    pub fn json(&self) -> Vec<Value> {
        self.text()
            .split('\n')
            .filter(|line| !line.trim().is_empty())
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// The only JSON value.
    #[track_caller]
    pub fn object(&self) -> Value {
        let mut all = self.json();
        assert_eq!(all.len(), 1, "one object expected, got {all:?}");
        all.remove(0)
    }
}

/// Runs a command that needs no broker.
pub fn run(args: &[&str]) -> Answer {
    run_with_input(&mut headwater(), args, b"")
}

fn run_with_input(command: &mut Command, args: &[&str], input: &[u8]) -> Answer {
    let mut child = command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the headwater binary starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A command that ends early closes its input; that is its right.
        let _ = stdin.write_all(&input);
    });
    let pid = child.id();
    let (done, timer) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if timer.recv_timeout(DEADLINE * 3) == Err(mpsc::RecvTimeoutError::Timeout) {
            signal(pid, "KILL");
        }
    });
    let output = child.wait_with_output().expect("the command can be waited for");
    drop(done);
    watchdog.join().expect("the watchdog ends");
    feeder.join().expect("the feeder ends");
    Answer::from(output)
}

/// Sends a signal by name (`KILL`, `TERM`, `STOP`, `CONT`).
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
    assert!(status.is_ok(), "`kill` runs");
}

/// A broker in a folder of its own, started by `headwater up`.
pub struct Broker {
    folder: tempfile::TempDir,
    config: Vec<String>,
    child: Option<Child>,
    listen: String,
    admin: String,
    profile: PathBuf,
}

impl Broker {
    /// Starts a broker with `-c` settings, in a fresh folder, on free ports.
    #[track_caller]
    pub fn start(config: &[&str]) -> Broker {
        Broker::start_in(tempfile::tempdir().expect("a temporary folder"), config)
    }

    /// Starts a broker in a folder that may hold `data/` already.
    #[track_caller]
    pub fn start_in(folder: tempfile::TempDir, config: &[&str]) -> Broker {
        Broker::try_start_in(folder, config).unwrap_or_else(|e| panic!("{e}"))
    }

    /// As [`Broker::start_in`]; the broker's own words where it does not start.
    pub fn try_start_in(folder: tempfile::TempDir, config: &[&str]) -> Result<Broker, String> {
        let mut broker = Broker {
            folder,
            config: config.iter().map(|c| c.to_string()).collect(),
            child: None,
            listen: "127.0.0.1:0".into(),
            admin: String::new(),
            profile: PathBuf::new(),
        };
        broker.try_revive().map(|()| broker)
    }

    /// Starts the broker again after [`Broker::kill`] or [`Broker::stop`], on the port it had.
    #[track_caller]
    pub fn revive(&mut self) {
        self.try_revive().unwrap_or_else(|e| panic!("{e}"));
    }

    /// As [`Broker::revive`]; the broker's own words where it does not start.
    pub fn try_revive(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "the broker runs already");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("broker.err"))
            .expect("a log file");
        let mut command = headwater();
        command.current_dir(self.folder.path()).args(["up", "--data", "data", "--listen", &self.listen]);
        command.args(["--admin", "127.0.0.1:0", "--json"]);
        for setting in &self.config {
            command.args(["-c", setting]);
        }
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().expect("the broker starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = stdout.read_line(&mut line);
            let _ = send.send(line);
            let _ = stdout.read_to_end(&mut Vec::new());
        });
        let line = receive.recv_timeout(DEADLINE).unwrap_or_default();
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("no ready line but {line:?}; broker.err: {}", self.log()));
        };
        assert_eq!(ready["ready"], true, "{line}");
        let text = |key: &str| ready[key].as_str().unwrap_or_else(|| panic!("{key} is missing: {line}")).to_owned();
        self.listen = text("listen");
        self.admin = text("admin");
        self.profile = self.folder.path().join(text("profile"));
        self.child = Some(child);
        Ok(())
    }

    /// What the broker wrote on standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("broker.err")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the broker runs").id()
    }

    pub fn listen(&self) -> &str {
        &self.listen
    }

    pub fn admin(&self) -> &str {
        &self.admin
    }

    pub fn profile(&self) -> &Path {
        &self.profile
    }

    /// The folder the broker runs in; its data is in `data/`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn partition(&self, name: &str) -> PathBuf {
        self.data().join(name)
    }

    /// SIGKILL: nothing is flushed, nothing is said.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the broker runs");
        child.kill().expect("SIGKILL");
        child.wait().expect("the broker is gone");
    }

    /// SIGTERM; the broker must end well.
    #[track_caller]
    pub fn stop(&mut self) {
        signal(self.pid(), "TERM");
        let mut child = self.child.take().expect("the broker runs");
        let status = eventually("the broker ends after SIGTERM", || child.try_wait().expect("it can be asked"));
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// A command with this broker's profile, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = headwater();
        command.current_dir(self.folder.path()).arg("--profile").arg(&self.profile).args(args);
        command
    }

    /// Runs a command against this broker.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Answer {
        self.run_with(args, b"")
    }

    /// Runs a command with standard input.
    #[track_caller]
    pub fn run_with(&self, args: &[&str], input: impl AsRef<[u8]>) -> Answer {
        run_with_input(&mut self.command(&[]), args, input.as_ref())
    }

    /// Runs a command that must succeed, with `--json`: a value a line.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Vec<Value> {
        self.run(&[args, &["--json"]].concat()).ok().json()
    }

    /// As [`Broker::json`], for commands that answer one object.
    #[track_caller]
    pub fn object(&self, args: &[&str]) -> Value {
        self.run(&[args, &["--json"]].concat()).ok().object()
    }

    /// Every record of a topic, in the order of each partition.
    #[track_caller]
    pub fn records(&self, topic: &str) -> Vec<Value> {
        self.json(&["consume", topic, "--from", "earliest", "--until", "end"])
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the broker's log:\n{}", self.log());
        }
    }
}

/// A `headwater` command that goes on while the test does, its output lines collected.
pub struct Running {
    child: Child,
    lines: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
}

impl Running {
    pub fn start(mut command: Command) -> Running {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the command starts");
        let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let sink = lines.clone();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                sink.lock().expect("not poisoned").push(line);
            }
        });
        Running { child, lines }
    }

    pub fn stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("taken once")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("not poisoned").clone()
    }

    pub fn json(&self) -> Vec<Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it can be asked").is_none()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the command's own end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        eventually_within(DEADLINE * 3, "the command ends", || self.child.try_wait().expect("it can be asked"))
    }

    /// SIGTERM, and the end that follows.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        signal(self.child.id(), "TERM");
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}
