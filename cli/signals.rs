//! The signals that end a command: Ctrl-C and SIGTERM.
//!
//! Owns: hearing them, on a thread of its own, so that no wait of the command keeps them from being heard. The first asks
//! for an orderly end; a second ends the process at once, as the shell counts such ends (130, 143). Refuses: what an
//! orderly end is. Read next: `commands/`.

use anyhow::Result;
use std::future::Future;
use tokio_util::sync::CancellationToken;

/// Whether somebody asked this process to end; cheap to clone.
#[derive(Clone)]
pub(crate) struct Signals(CancellationToken);

impl Signals {
    /// Hears the signals from now on: none of them ends the process any more, until the second.
    pub(crate) fn catch() -> Signals {
        let asked = CancellationToken::new();
        if let Err(error) = listen(asked.clone()) {
            tracing::warn!(%error, "signals cannot be caught; they end this process at once");
        }
        Signals(asked)
    }

    /// The end of standard input asks too: whoever held it open is gone, however it went.
    pub(crate) fn ask_when_stdin_ends(&self) {
        let asked = self.0.clone();
        let read = std::thread::Builder::new().name("stdin".into()).spawn(move || {
            // What is said there means nothing.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            asked.cancel();
        });
        if let Err(error) = read {
            tracing::warn!(%error, "the end of standard input is not noticed");
        }
    }

    /// Resolves when somebody asked.
    pub(crate) async fn asked(&self) {
        self.0.cancelled().await;
    }

    /// Whether somebody asked.
    pub(crate) fn is_asked(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Does something unless somebody asks for the end first: then `None`, and it is given up where it stands.
    pub(crate) async fn unless_asked<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.asked() => None,
            done = work => Some(done),
        }
    }
}

/// Ends the process as a shell would report a death by this signal.
fn end_at_once(number: i32) -> ! {
    crate::output::complain("asked a second time: ended at once");
    std::process::exit(128 + number)
}

fn listen(asked: CancellationToken) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    #[cfg(unix)]
    let mut next = {
        use tokio::signal::unix::{SignalKind, signal};
        // Caught from here on, not from when the thread runs.
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        async move || {
            tokio::select! {
                _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
                _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            }
        }
    };
    #[cfg(windows)]
    let mut next = {
        let mut interrupt = tokio::signal::windows::ctrl_c()?;
        async move || {
            interrupt.recv().await;
            2
        }
    };
    drop(entered);
    let hear = move || {
        runtime.block_on(async {
            next().await;
            asked.cancel();
            end_at_once(next().await)
        })
    };
    std::thread::Builder::new().name("signals".into()).spawn(hear)?;
    Ok(())
}
