//! Brokers as processes: the `headwater` command, or this very binary on files that remember what was not synced, which no binary
//! that is shipped can do.

use super::harness::{DEADLINE, eventually_within, headwater, signal};
use super::unsynced::{Sync, UnsyncedFiles};
use headwater_broker::Broker;
use headwater_broker::config::BrokerConfig;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Names the configuration to the process that is to serve.
const CONFIG: &str = "NEMESIS_CONFIG";
/// How long a sync takes there, in milliseconds: long enough that a process is often killed while something waits for one.
const SYNC_TAKES: u64 = 4;

/// Held by one test after the other: several clusters at once are too many for a small machine.
pub(crate) fn one_after_the_other() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A broker's process. It ends when this is dropped, or whoever holds this ends.
pub(crate) struct Process {
    child: Child,
    ready: Arc<OnceLock<Value>>,
}

impl Process {
    /// The `headwater` command with this configuration; what it says goes to `log`.
    pub(crate) fn shipped(config: &Path, log: &Path) -> Process {
        let mut command = headwater();
        command.args(["broker", "--until-stdin-ends", "--json", "--config"]).arg(config);
        Process::start(command, log)
    }

    /// A broker with this configuration on files that remember what is not synced.
    pub(crate) fn on_unsynced_files(config: &Path, log: &Path) -> Process {
        let mut command = Command::new(std::env::current_exe().expect("this binary is a file"));
        command
            .args(["serving::a_broker_that_others_start", "--exact", "--ignored", "--nocapture"])
            .env(CONFIG, config);
        Process::start(command, log)
    }

    fn start(mut command: Command, log: &Path) -> Process {
        let log = File::options().create(true).append(true).open(log).expect("a log file");
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("the broker starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let ready = Arc::new(OnceLock::new());
        let told = Arc::clone(&ready);
        std::thread::spawn(move || {
            let mut line = String::new();
            while stdout.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                if let Ok(said) = serde_json::from_str(&line) {
                    told.get_or_init(|| said);
                    break;
                }
                line.clear();
            }
            let _ = stdout.read_to_end(&mut Vec::new());
        });
        Process { child, ready }
    }

    /// What it says once it serves.
    pub(crate) fn ready(&mut self) -> Value {
        eventually_within(DEADLINE, "the broker serves", || {
            let ended = self.child.try_wait().expect("it can be asked");
            assert!(ended.is_none(), "the broker ended by itself: {ended:?}");
            self.ready.get().cloned()
        })
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it can be asked").is_none()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("it is gone");
    }

    /// SIGTERM, and its end. Whether it was a good one.
    pub(crate) fn stop(&mut self) -> bool {
        signal(self.child.id(), "TERM");
        let child = &mut self.child;
        eventually_within(DEADLINE, "the broker ends after SIGTERM", || child.try_wait().expect("it can be asked"))
            .success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that is stopped is ended by this too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What [`Process::on_unsynced_files`] starts. Without its environment it is nothing.
#[test]
#[ignore = "a process of other tests"]
fn a_broker_that_others_start() {
    let Some(config) = std::env::var_os(CONFIG) else { return };
    let mut settings = BrokerConfig::default();
    settings.apply_file(Path::new(&config)).expect("a configuration");
    let filter = tracing_subscriber::EnvFilter::new(&settings.logging_level);
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let files = UnsyncedFiles::open(&settings.data_dir, Sync::Works(Duration::from_millis(SYNC_TAKES))).expect("files");
    let runtime = headwater_broker::runtime::build(&settings).expect("threads");
    runtime.block_on(async {
        let broker = Broker::start_on(settings, Arc::new(files)).await.unwrap_or_else(|error| panic!("{error}"));
        let profile = broker.profile().map(|path| path.display().to_string());
        // On a line of its own: the name of this test stands on one without an end.
        println!("\n{}", json!({ "listen": broker.listen_addr().to_string(), "profile": profile }));
        let whoever_started_it = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
        drop(whoever_started_it.await);
        broker.shutdown().await;
    });
    std::process::exit(0);
}
