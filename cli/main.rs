//! The `headwater` command.
//!
//! Owns: the process: logs, errors, exit codes (0 done, 1 failed, 2 misused). Refuses: everything else. Read next:
//! [`args`], the surface; [`commands`], what stands behind it; [`spec`], the small languages inside the values.

// `println!` and `eprintln!` panic where nobody reads any more; `output` has what does not.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod acks;
mod args;
mod commands;
mod confirm;
mod connect;
mod fields;
mod filter;
mod format;
mod lines;
mod logs;
mod os;
mod outcomes;
mod output;
mod pace;
mod printer;
mod record;
mod shares;
mod signals;
mod spec;

use std::process::ExitCode;

use args::{Cli, Command, Global};

fn main() -> ExitCode {
    let Cli { global, command } = match Cli::read(std::env::args_os(), |name| std::env::var_os(name)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help that nobody reads to its end is no failure.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let outcome = run(&global, command);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<output::StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) if error.is::<output::Told>() => ExitCode::FAILURE,
        Err(error) => {
            output::complain(format_args!("error: {}", sentence(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(global: &Global, command: Command) -> anyhow::Result<()> {
    // Brokers begin to log when they know their configuration.
    let serves = match &command {
        Command::Up(_) => true,
        Command::Broker(args) => args.command.is_none(),
        _ => false,
    };
    if !serves {
        logs::start(global, logs::COMMAND_LEVEL, "human")?;
    }
    match command {
        Command::Up(args) => commands::up::run(global, args),
        Command::Broker(args) => commands::broker::run(global, args),
        Command::Config(command) => commands::broker::config(global, command),
        Command::Cert(command) => commands::cert::run(global, command),
        Command::Cluster(command) => commands::cluster::run(global, command),
        Command::Import(args) => commands::import::run(global, args),
        Command::Topic(command) => commands::topic::run(global, command),
        Command::Produce(args) => commands::produce::run(global, args),
        Command::Consume(args) => commands::consume::run(global, args),
        Command::Group(command) => commands::group::run(global, command),
        Command::Replay(args) => commands::replay::run(global, args),
        Command::Segment(command) => commands::segment::run(global, command),
        Command::Bench(args) => commands::bench::run(global, args),
        Command::Demo { cluster } => commands::demo::run(global, cluster),
        Command::Completions { shell } => commands::completions::run(shell),
    }
}

/// An error and its causes, each said once.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let said = cause.to_string();
        if text.is_empty() {
            text = said;
        } else if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    #[test]
    fn a_cause_that_was_said_is_not_said_again() {
        let error = anyhow!("no room").context("cannot write: no room").context("cannot go on");
        assert_eq!(super::sentence(&error), "cannot go on: cannot write: no room");
        let error = Err::<(), _>(anyhow!("b")).context("a").expect_err("an error");
        assert_eq!(super::sentence(&error), "a: b");
    }
}
