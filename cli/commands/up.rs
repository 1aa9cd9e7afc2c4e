//! `headwater up`: a development broker with nothing to prepare; and what it shares with `headwater broker`.

pub(super) mod several;

use anyhow::{Context, Result, bail};
use headwater_broker::config::BrokerConfig;
use headwater_broker::{Broker, runtime};
use serde::Serialize;

use crate::args::{Global, UpArgs};
use crate::logs;
use crate::output::{StdoutClosed, print, print_json};
use crate::signals::Signals;

/// Variables that begin as the broker's do and are this command's own.
const OWN_VARIABLES: [&str; 3] = ["HEADWATER_PROFILE", "HEADWATER_LOG", "HEADWATER_LOG_FORMAT"];

/// Runs the command.
pub(crate) fn run(global: &Global, args: UpArgs) -> Result<()> {
    if let Some(brokers) = args.brokers {
        return several::run(global, &args, brokers);
    }
    let mut config = BrokerConfig::default();
    apply_environment(&mut config)?;
    config.data_dir = args.data;
    if let Some(listen) = &args.listen {
        config.set("--listen", "listen", listen)?;
    }
    if let Some(admin) = &args.admin {
        config.set("--admin", "admin.listen", admin)?;
    }
    for setting in &args.config {
        config.set("-c", &setting.key, &setting.value)?;
    }
    serve(global, config, false)
}

/// Takes what the environment says.
pub(super) fn apply_environment(config: &mut BrokerConfig) -> Result<()> {
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Ok(config.apply_environment(variables, &OWN_VARIABLES)?)
}

/// What the first line says.
#[derive(Serialize)]
struct Ready {
    ready: bool,
    profile: Option<String>,
    listen: String,
    admin: String,
    pid: u32,
}

/// Runs a broker until somebody asks it to end; or, `until_stdin_ends`, nobody holds its standard input open any more.
pub(super) fn serve(global: &Global, config: BrokerConfig, until_stdin_ends: bool) -> Result<()> {
    config.check()?;
    logs::start(global, &config.logging_level, &config.logging_format)?;
    let data = config.data_dir.clone();
    let runtime = runtime::build(&config).context("cannot start the broker's threads")?;
    let outcome = runtime.block_on(async {
        // From here on a signal is an orderly end.
        let signals = Signals::catch();
        if until_stdin_ends {
            signals.ask_when_stdin_ends();
        }
        let Some(broker) = signals.unless_asked(Broker::start(config)).await else {
            bail!("interrupted before it served; the next start recovers what this one did not");
        };
        let broker = broker.with_context(|| format!("cannot start a broker on {}", data.display()))?;
        let ready = Ready {
            ready: true,
            profile: broker.profile().map(|path| path.display().to_string()),
            listen: broker.listen_addr().to_string(),
            admin: broker.admin_addr().to_string(),
            pid: std::process::id(),
        };
        match announce(global, &ready, &data) {
            // A broker goes on although nobody reads its first line.
            Err(error) if !error.is::<StdoutClosed>() => return Err(error),
            _ => {}
        }
        signals.asked().await;
        match broker.shutdown().await {
            true => Ok(()),
            false => bail!("not everything could be closed in good order; the next start recovers it"),
        }
    });
    if outcome.is_err() {
        // A start that was given up is still busy, and a disk that hangs does so for good: nobody waits for either.
        runtime.shutdown_background();
    }
    outcome
}

fn announce(global: &Global, ready: &Ready, data: &std::path::Path) -> Result<()> {
    if global.json {
        return print_json(ready);
    }
    let mut text = format!(
        "Headwater is up on {}, with its data in {} and its health at http://{}/health (Ctrl-C ends it)\n",
        ready.listen,
        data.display(),
        ready.admin
    );
    if let Some(profile) = &ready.profile
        && !global.quiet
    {
        text += &match data == std::path::Path::new("./headwater-data") {
            true => "Other commands find it when they run in this folder: headwater topic list\n".to_owned(),
            false => format!("Other commands find it by its profile: headwater --profile {profile} topic list\n"),
        };
    }
    print(text)
}
