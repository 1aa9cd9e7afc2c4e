//! `headwater broker`, and `headwater config`: a broker from its configuration file.

use anyhow::{Context, Result};
use headwater_broker::config::BrokerConfig;
use serde_json::json;
use std::path::Path;

use super::up::{apply_environment, serve};
use crate::args::{BrokerArgs, BrokerCommand, ConfigCommand, Global};
use crate::output::{print, print_json};

/// Runs `headwater broker`.
pub(crate) fn run(global: &Global, args: BrokerArgs) -> Result<()> {
    match args.command {
        Some(BrokerCommand::Config(command)) => config(global, command),
        None => serve(global, read(&args.config.context("--config is missing")?)?, args.until_stdin_ends),
    }
}

/// Runs `headwater config`, which is `headwater broker config` too.
pub(crate) fn config(global: &Global, command: ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Example => print(BrokerConfig::example()),
        ConfigCommand::Check { file } => {
            read(&file)?.check()?;
            if global.json {
                return print_json(&json!({ "file": file.display().to_string(), "valid": true }));
            }
            print(format!("{} is right\n", file.display()))
        }
    }
}

/// The defaults, the file, the environment: each has the last word over the one before.
pub(super) fn read(file: &Path) -> Result<BrokerConfig> {
    let mut config = BrokerConfig::default();
    config.apply_file(file)?;
    apply_environment(&mut config)?;
    Ok(config)
}
