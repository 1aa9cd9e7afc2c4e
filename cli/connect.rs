//! Which broker a command talks to, and the runtime it talks in.
//!
//! Owns: finding the client profile (`--profile`, $HEADWATER_PROFILE, ./headwater-data/client.toml), what `--broker` and
//! `--ca` change in it. Refuses: retries (the client has them). Read next: `commands/`.

use anyhow::{Context, Result, bail};
use headwater_client::{Client, ClientConfig};
use std::future::Future;
use std::path::{Path, PathBuf};

use crate::args::Global;

/// Where `headwater up` leaves the profile, seen from the directory it was started in.
const DEFAULT_PROFILE: &str = "headwater-data/client.toml";

/// The client configuration that the flags, the environment and the current directory give.
pub(crate) fn client_config(global: &Global) -> Result<ClientConfig> {
    let profile = profile(global)?;
    let mut config = match &profile {
        Some(path) => ClientConfig::from_profile(path)
            .with_context(|| format!("cannot use the client profile {}", path.display()))?,
        None if global.broker.is_empty() => bail!(
            "no broker is known: there is no {DEFAULT_PROFILE} here. Start a broker with `headwater up`, or name a \
             profile with --profile FILE (or $HEADWATER_PROFILE), or an address with --broker HOST:PORT and --ca FILE"
        ),
        None => ClientConfig::default(),
    };
    if !global.broker.is_empty() {
        config.bootstrap = global.broker.clone();
    }
    if let Some(path) = &global.ca {
        config.ca_pem =
            std::fs::read(path).with_context(|| format!("cannot read the certificate authority {}", path.display()))?;
    } else if profile.is_none() {
        bail!(
            "the broker's certificate cannot be checked: name its certificate authority with --ca FILE, or a client \
             profile with --profile FILE"
        );
    }
    if config.client_id == ClientConfig::default().client_id {
        config.client_id = "headwater-cli".to_owned();
    }
    Ok(config)
}

/// The profile that the flags, the environment and the current directory give.
pub(crate) fn profile(global: &Global) -> Result<Option<PathBuf>> {
    match &global.profile {
        Some(path) if path.as_os_str().is_empty() => bail!("the client profile has an empty name"),
        Some(path) => Ok(Some(path.clone())),
        None => Ok(Some(Path::new(DEFAULT_PROFILE)).filter(|path| path.exists()).map(Path::to_owned)),
    }
}

/// Connects, or says what to do.
pub(crate) async fn connect_with(config: ClientConfig) -> Result<Client> {
    let addresses = config.bootstrap.join(", ");
    Client::connect(config)
        .await
        .with_context(|| format!("cannot connect to a broker at {addresses}; does it run? (`headwater up` starts one)"))
}

/// Runs a command's conversation with a broker. One thread is enough: whatever can block has a thread of its own.
pub(crate) fn block_on<T>(conversation: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    let outcome = runtime.block_on(conversation);
    // Nothing that is left may delay the end: readers of standard input sit in their system call.
    runtime.shutdown_background();
    outcome
}

/// Connects, holds one conversation and closes.
pub(crate) fn with_client<T>(global: &Global, conversation: impl AsyncFnOnce(&Client) -> Result<T>) -> Result<T> {
    with_config(client_config(global)?, conversation)
}

/// As [`with_client`], with a configuration.
pub(crate) fn with_config<T>(config: ClientConfig, conversation: impl AsyncFnOnce(&Client) -> Result<T>) -> Result<T> {
    block_on(async {
        let client = connect_with(config).await?;
        let outcome = conversation(&client).await;
        client.close().await;
        outcome
    })
}
