//! Asking a person before something is lost.
//!
//! Whoever sits at a terminal is asked, and types a word; a script says it with a flag. Both are told first what will be lost.
//!
//! Owns: the question. Refuses: to know what is lost.

use anyhow::{Result, bail};
use std::io::{self, BufRead, IsTerminal};

use crate::output::complain;

/// The longest answer that is read.
const MOST_BYTES: u64 = 1000;

/// Whether somebody is there to be asked: what is said and what is typed is a terminal's.
pub(crate) fn is_somebody_there() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks for a word; an error says that it was not given.
///
/// # Errors
/// Anything but the word was typed, and nothing was done.
pub(crate) async fn ask(question: String, word: &str) -> Result<()> {
    complain(question);
    let word = word.to_owned();
    // Whoever thinks about it keeps no connection from being kept alive.
    tokio::task::spawn_blocking(move || answered(io::stdin().lock(), &word)).await?
}

fn answered(input: impl BufRead, word: &str) -> Result<()> {
    let mut line = String::new();
    input.take(MOST_BYTES).read_line(&mut line)?;
    match line.trim() == word {
        true => Ok(()),
        false => bail!("nothing was done: \"{word}\" was not typed"),
    }
}

#[cfg(test)]
mod tests {
    use super::answered;

    #[test]
    fn only_the_word_itself_is_a_yes() {
        for said in ["yes\n", "  yes \r\n", "yes"] {
            assert!(answered(said.as_bytes(), "yes").is_ok(), "{said:?}");
        }
        for said in ["", "\n", "y\n", "YES\n", "no\nyes\n", "yes, please\n"] {
            let why = answered(said.as_bytes(), "yes").expect_err(said).to_string();
            assert_eq!(why, "nothing was done: \"yes\" was not typed");
        }
    }
}
