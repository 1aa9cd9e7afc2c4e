//! `headwater segment ...`: what lies in segment files, checked, counted and repaired. Needs no broker.
//!
//! Owns: rendering. What is found, and the JSON of it, is [`headwater_storage::inspect`]'s.

mod dump;
mod stats;

use anyhow::{Result, bail};
use headwater_storage::inspect::{self, RepairMode, RepairReport, Target, VerifyReport};
use headwater_storage::{Files, OsFiles};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::args::{Global, RepairArgs, SegmentCommand};
use crate::output::{StdoutClosed, Unit, bytes, complain, number, plural, print, print_json, progress};
use crate::sentence;

/// Runs one of the subcommands.
pub(crate) fn run(global: &Global, command: SegmentCommand) -> Result<()> {
    match command {
        SegmentCommand::Dump(args) => dump::run(global, &args),
        SegmentCommand::Verify { path } => verify(global, &path),
        SegmentCommand::Stats { path } => stats::run(global, &path),
        SegmentCommand::Repair(args) => repair(global, &args),
    }
}

/// A file or a folder, to look into.
fn open(path: &Path) -> Result<Target> {
    Ok(Target::open(Arc::new(OsFiles::default()), path)?)
}

/// Looks into one path after another. One that cannot be looked into keeps nobody from the others.
fn each(paths: &[PathBuf], mut look: impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let mut failed = 0;
    for path in paths {
        match look(path) {
            Ok(()) => {}
            Err(error) if paths.len() == 1 || error.is::<StdoutClosed>() => return Err(error),
            Err(error) => {
                failed += 1;
                complain(format_args!("error: {}", sentence(&error)));
            }
        }
    }
    match failed {
        0 => Ok(()),
        _ => bail!("{failed} of {} paths could not be looked into", paths.len()),
    }
}

fn verify(global: &Global, paths: &[PathBuf]) -> Result<()> {
    let mut damaged = Vec::new();
    let looked = each(paths, |path| {
        let target = open(path)?;
        let bar = progress(global, "verify", Unit::Bytes, Some(target.log_bytes()));
        let report = inspect::verify(&target, &|bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        if global.json {
            print_json(&report)?;
        } else {
            print(verify_text(&report))?;
        }
        if !report.faults.is_empty() {
            damaged.push((path.to_owned(), report.faults.len()));
        }
        Ok(())
    });
    let text = match damaged.as_slice() {
        [] => return looked,
        [(path, faults), others @ ..] => format!(
            "{} in {}{}; `headwater segment repair PATH --out DIR` writes a copy without them",
            plural(*faults as i64, "fault"),
            path.display(),
            if others.is_empty() { String::new() } else { format!(", and {} more paths have some", others.len()) }
        ),
    };
    match looked {
        Ok(()) => bail!(text),
        Err(error) => Err(error.context(text)),
    }
}

fn verify_text(report: &VerifyReport) -> String {
    let mut text = format!(
        "{}: {}, {}, {}\n",
        report.path,
        if report.batches == 1 { "1 batch".to_owned() } else { format!("{} batches", number(report.batches)) },
        plural(report.records, "record"),
        if report.faults.is_empty() { "no fault".to_owned() } else { plural(report.faults.len() as i64, "fault") }
    );
    for (mark, findings) in [("fault", &report.faults), ("note", &report.notes)] {
        for finding in findings {
            text += &format!("  {mark}: {}, position {}", finding.file, finding.position);
            if let Some(offset) = finding.offset {
                text += &format!(", offset {offset}");
            }
            text += &format!(": {}: {}\n", finding.kind.name(), finding.detail);
        }
    }
    text
}

fn repair(global: &Global, args: &RepairArgs) -> Result<()> {
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    let mode = match &args.out {
        Some(out) => RepairMode::Copy(out.clone()),
        None => RepairMode::InPlace,
    };
    let total = Target::open(Arc::clone(&files), &args.path).map(|target| target.log_bytes()).ok();
    let bar = progress(global, "repair", Unit::Bytes, total);
    let report = inspect::repair(&files, &args.path, &mode, &|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    if global.json { print_json(&report) } else { print(repair_text(&report)) }
}

fn repair_text(report: &RepairReport) -> String {
    let mut text = format!(
        "{} is repaired: {} in {} kept\n",
        report.out,
        plural(report.kept_records, "record"),
        if report.kept_batches == 1 {
            "1 batch".to_owned()
        } else {
            format!("{} batches", number(report.kept_batches))
        }
    );
    match report.lost.as_slice() {
        [] => text += "no offset is lost\n",
        lost => {
            let words: Vec<String> = lost
                .iter()
                .map(|range| match range.from == range.to {
                    true => range.from.to_string(),
                    false => format!("{} to {}", range.from, range.to),
                })
                .collect();
            text += &format!("lost offsets: {} ({} were left out)\n", words.join(", "), bytes(report.dropped_bytes));
        }
    }
    for segment in &report.foreign {
        text += &format!("{} was left out, which is no segment of this partition: {}\n", segment.file, segment.detail);
    }
    for batch in &report.mended {
        text += &format!(
            "mended without a loss: offsets {} to {} at position {} of {}: {}\n",
            batch.base_offset, batch.last_offset, batch.position, batch.file, batch.detail
        );
    }
    if let Some(original) = &report.original {
        text += &format!("the original is kept as {original}\n");
    }
    text
}
