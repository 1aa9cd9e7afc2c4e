//! `headwater segment stats`: what a partition is made of, with small histograms.

use anyhow::Result;
use headwater_storage::inspect;
use headwater_storage::inspect::stats::{Histogram, Stats};
use std::path::PathBuf;

use super::dump::time;
use super::{each, open};
use crate::args::Global;
use crate::output::{Unit, bytes, number, plural, print, print_json, progress};

/// Columns of the longest bar.
const BAR_COLUMNS: u64 = 40;

/// Counts every path.
pub(super) fn run(global: &Global, paths: &[PathBuf]) -> Result<()> {
    each(paths, |path| {
        let target = open(path)?;
        let bar = progress(global, "stats", Unit::Bytes, Some(target.log_bytes()));
        let stats = inspect::stats(&target, &|bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        if global.json { print_json(&stats) } else { print(text(&stats)) }
    })
}

fn text(stats: &Stats) -> String {
    let mut text = format!("{}\n", stats.path);
    let mut line = |title: &str, words: String| text += &format!("  {title:<12}{words}\n");
    let mut size = format!(
        "{} in {}, {} of batches",
        bytes(stats.file_bytes),
        plural(stats.segments, "segment"),
        bytes(stats.batch_bytes)
    );
    if stats.reserved_bytes > 0 {
        size += &format!(", {} reserved", bytes(stats.reserved_bytes));
    }
    line("size", size);
    if stats.damaged > 0 {
        line(
            "DAMAGE",
            format!(
                "{} of {}; `headwater segment verify` names them",
                plural(stats.damaged, "stretch"),
                bytes(stats.damaged_bytes)
            ),
        );
    }
    if let (Some(first), Some(end)) = (stats.first_offset, stats.end_offset) {
        let mut words = format!("{first} to {} (not included)", end);
        if stats.gaps.count > 0 {
            words += &format!(
                ", {} without a record in {}, the longest {}",
                number(stats.gaps.offsets),
                plural(stats.gaps.count, "gap"),
                number(stats.gaps.longest)
            );
        }
        line("offsets", words);
    }
    let mut words = format!("{} in {} batches", plural(stats.records, "record"), number(stats.batches));
    for (count, word) in [
        (stats.control_batches, "control"),
        (stats.transactional_batches, "transactional"),
        (stats.empty_batches, "empty"),
    ] {
        if count > 0 {
            words += &format!(", {} {word}", number(count));
        }
    }
    line("content", words);
    line("bytes", format!("{} of keys, values and headers", bytes(stats.record_bytes)));
    let mut keys = format!("{}{} distinct", if stats.keys.exact { "" } else { "about " }, number(stats.keys.count));
    for (count, word) in [(stats.null_keys, "null"), (stats.null_values, "null values (tombstones)")] {
        if count > 0 {
            keys += &format!(", {} {word}", number(count));
        }
    }
    line("keys", keys);
    line("producers", number(stats.producers));
    for (codec, of) in &stats.codecs {
        line(
            codec,
            format!(
                "{} batches, {} for {} ({:.2}x)",
                number(of.batches),
                bytes(of.bytes),
                bytes(of.uncompressed_bytes),
                of.ratio
            ),
        );
    }
    let times = &stats.timestamps;
    if let (Some(min), Some(max)) = (times.min, times.max) {
        line("times", format!("{} to {}", time(min), time(max)));
        if times.out_of_order > 0 {
            line(
                "late",
                format!("{}, by {} at the most", plural(times.out_of_order, "record"), span(times.max_lateness_ms)),
            );
        }
    }
    if let (Some(records), Some(log)) = (stats.rates.records_per_s, stats.rates.bytes_per_s) {
        let digits = if records < 1.0 { 4 } else { 1 };
        line("rate", format!("{records:.digits$} records/s, {log:.digits$} B/s by their times"));
    }
    for (title, histogram) in [
        ("batch size (bytes)", &stats.batch_sizes),
        ("records a batch", &stats.batch_records),
        ("record size (bytes)", &stats.record_sizes),
    ] {
        text += &bars(title, histogram);
    }
    text
}

fn span(ms: i64) -> String {
    humantime::format_duration(std::time::Duration::from_millis(u64::try_from(ms).unwrap_or(0))).to_string()
}

/// A histogram of bars; nothing where nothing was counted.
fn bars(title: &str, histogram: &Histogram) -> String {
    let Some(most) = histogram.buckets.iter().map(|bucket| bucket.count).max().filter(|most| *most > 0) else {
        return String::new();
    };
    let mut text =
        format!("  {title}: {} to {}, mean {:.1}\n", number(histogram.min), number(histogram.max), histogram.mean);
    for bucket in &histogram.buckets {
        // A bucket that holds anything shows it.
        let columns = (bucket.count * BAR_COLUMNS).div_ceil(most);
        let range = format!("{}..{}", number(bucket.from), number(bucket.below));
        text += &format!(
            "  {range:>24} {:<40} {}\n",
            "▇".repeat(usize::try_from(columns).unwrap_or(0)),
            number(bucket.count)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_storage::inspect::stats::Bucket;

    #[test]
    fn a_bar_is_as_long_as_its_share_and_never_invisible() {
        let mut histogram = Histogram::default();
        histogram.buckets = vec![
            Bucket { from: 1, below: 2, count: 1 },
            Bucket { from: 2, below: 4, count: 0 },
            Bucket { from: 4, below: 8, count: 1000 },
        ];
        let text = bars("size", &histogram);
        let columns: Vec<usize> = text.lines().skip(1).map(|line| line.matches('▇').count()).collect();
        assert_eq!(columns, [1, 0, 40]);
        assert_eq!(bars("size", &Histogram::default()), "");
    }
}
