//! The demo's broker: in this process, on threads of its own.

use anyhow::{Context, Result, anyhow};
use headwater_broker::config::BrokerConfig;
use headwater_broker::{Broker, runtime};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Free ports, and a group that notices a death within two seconds, so that nobody waits for the default ten.
const SETTINGS: [(&str, &str); 5] = [
    ("listen", "127.0.0.1:0"),
    ("admin.listen", "127.0.0.1:0"),
    ("group.consumer.session.timeout.ms", "2000"),
    ("group.consumer.min.session.timeout.ms", "1000"),
    ("group.consumer.heartbeat.interval.ms", "500"),
];

/// A broker in this process.
pub(super) struct Embedded {
    pub(super) listen: String,
    pub(super) profile: PathBuf,
    pub(super) data: PathBuf,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<bool>,
}

impl Embedded {
    /// Starts it and waits until it serves.
    pub(super) fn start(data: &Path) -> Result<Embedded> {
        let mut config = BrokerConfig { data_dir: data.to_owned(), ..BrokerConfig::default() };
        for (key, value) in SETTINGS {
            config.set("the demo", key, value)?;
        }
        let runtime = runtime::build(&config).context("cannot start the broker's threads")?;
        let (ready, started) = mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(async {
                let broker = match Broker::start(config).await {
                    Ok(broker) => broker,
                    Err(error) => {
                        // Who waits for it learns why.
                        let _ = ready.send(Err(error));
                        return false;
                    }
                };
                let _ = ready.send(Ok((broker.listen_addr().to_string(), broker.profile().map(Path::to_owned))));
                // A sender that is gone means the same as one that speaks.
                let _ = stopped.await;
                broker.shutdown().await
            })
        };
        let thread = std::thread::Builder::new().name("broker".into()).spawn(serve).context("cannot start a thread")?;
        let (listen, profile) =
            started.recv().context("the broker's thread ended")?.context("cannot start the demo's broker")?;
        let profile = profile.context("the broker wrote no client profile")?;
        Ok(Embedded { listen, profile, data: data.to_owned(), stop, thread })
    }

    /// Stops it; whether all of it was closed in good order.
    pub(super) fn stop(self) -> Result<bool> {
        let _ = self.stop.send(());
        self.thread.join().map_err(|_| anyhow!("the broker panicked"))
    }
}
