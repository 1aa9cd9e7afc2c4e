//! Where answers, remarks and progress go.
//!
//! Owns: standard output (answers: text or JSON, one write an answer), standard error (remarks and progress bars), and
//! the words for bytes and counts. A reader that closes standard output ends the command well: every write reports it
//! as [`StdoutClosed`], which `main` takes for success. Refuses: bulk records ([`crate::printer`]). Read next:
//! [`crate::printer`].

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fs::File;
use std::io::{self, IsTerminal, Write};

use crate::args::Global;

/// Nobody reads standard output any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StdoutClosed;

impl std::fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// The answer is that something is not so: it was said, and the exit code says it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told;

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it is not so")
    }
}

impl std::error::Error for Told {}

/// Standard output as a plain file: no line buffer, and owned, so that a thread can have it.
pub(crate) fn stdout() -> Result<File> {
    #[cfg(unix)]
    let handle = std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned();
    #[cfg(windows)]
    let handle = std::os::windows::io::AsHandle::as_handle(&io::stdout()).try_clone_to_owned();
    Ok(File::from(handle.context("standard output cannot be used")?))
}

/// What a failed write to standard output means.
pub(crate) fn stdout_error(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        StdoutClosed.into()
    } else {
        anyhow::Error::new(error).context("cannot write to standard output")
    }
}

/// Writes an answer.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref()).and_then(|()| out.flush()).map_err(stdout_error)
}

/// Writes an answer as JSON: one line.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    print(line)
}

/// Writes several answers: a JSON line each, or a table of them.
pub(crate) fn print_all<T: Serialize>(
    global: &Global,
    values: &[T],
    titles: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    if global.json {
        let mut lines = Vec::new();
        for value in values {
            serde_json::to_writer(&mut lines, value)?;
            lines.push(b'\n');
        }
        return print(lines);
    }
    print(table(titles, values.iter().map(row)))
}

/// A table with titles, numbers to the right, ending in a line feed.
pub(crate) fn table(titles: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(titles);
    let mut numeric = vec![true; titles.len()];
    for row in rows {
        for (numeric, cell) in numeric.iter_mut().zip(&row) {
            *numeric &= cell.is_empty() || cell == "-" || cell.parse::<f64>().is_ok();
        }
        table.add_row(row);
    }
    let empty = table.is_empty();
    for (index, numeric) in numeric.into_iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if numeric && !empty {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A remark for a person, unless they asked for quiet.
pub(crate) fn note(global: &Global, text: impl std::fmt::Display) {
    if !global.quiet {
        complain(text);
    }
}

/// Writes a line to standard error, where somebody still reads it: what cannot be said stops nobody.
pub(crate) fn complain(text: impl std::fmt::Display) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// A progress bar on standard error, where that is a terminal and nobody asked for quiet; else nothing.
pub(crate) fn progress(global: &Global, what: &'static str, unit: Unit, total: Option<u64>) -> ProgressBar {
    if global.quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let template = match (unit, total.is_some()) {
        (Unit::Bytes, true) => "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        (Unit::Bytes, false) => "{msg} {spinner} {bytes} {binary_bytes_per_sec} {elapsed}",
        (Unit::Records, true) => "{msg} {wide_bar} {human_pos}/{human_len} {per_sec} {eta}",
        (Unit::Records, false) => "{msg} {spinner} {human_pos} {per_sec} {elapsed}",
    };
    // The templates are constants of this file; the default is as good should one be wrong.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    bar.set_message(what);
    bar
}

/// What a progress bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes.
    Bytes,
    /// Records.
    Records,
}

/// Bytes for a person: 999 B, 1.0 kB, 12.3 MB (powers of ten).
pub(crate) fn bytes(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if size < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{size:.1} {unit}") };
        }
        size /= 1000.0;
    }
    format!("{size:.1} TB")
}

/// A count for a person: 1,234,567.
pub(crate) fn number(number: impl Into<i128>) -> String {
    let number: i128 = number.into();
    let digits = number.unsigned_abs().to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0 { format!("-{text}") } else { text }
}

/// `1 record`, `2 records`.
pub(crate) fn plural(count: impl Into<i128>, noun: &str) -> String {
    let count: i128 = count.into();
    format!("{} {noun}{}", number(count), if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_numbers() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(12_345_678), "12.3 MB");
        assert_eq!(number(1_234_567), "1,234,567");
        assert_eq!(number(-12), "-12");
        assert_eq!(number(-123_456), "-123,456");
        assert_eq!(plural(1, "record"), "1 record");
        assert_eq!(plural(0, "record"), "0 records");
    }

    #[test]
    fn tables_align_numbers_to_the_right_and_end_no_line_in_blanks() {
        let text = table(&["name", "n"], [vec!["a".into(), "5".into()], vec!["longer".into(), "1234".into()]]);
        assert_eq!(text, "name       n\na          5\nlonger  1234\n");
        assert_eq!(table(&["name", "n"], []), "name  n\n");
    }
}
