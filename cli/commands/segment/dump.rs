//! `headwater segment dump`: every batch, and with `--records` every record.

use anyhow::Result;
use headwater_proto::batch::Record;
use headwater_storage::inspect::{self, DumpOptions, DumpedBatch};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::{each, open};
use crate::args::{Decode, DumpArgs, Global};
use crate::output::{stdout, stdout_error};
use crate::record::{Shown, write_json};

/// Prints the batches of every path.
pub(super) fn run(global: &Global, args: &DumpArgs) -> Result<()> {
    let mut out = BufWriter::with_capacity(256 << 10, stdout()?);
    each(&args.path, |path| {
        let dumped = dump(global, args, path, &mut out);
        out.flush().map_err(stdout_error)?;
        dumped
    })
}

fn dump(global: &Global, args: &DumpArgs, path: &Path, out: &mut impl Write) -> Result<()> {
    let options = DumpOptions { records: args.records, from_offset: args.from_offset };
    let target = open(path)?;
    let (topic, partition) = match target.partition() {
        Some((topic, partition)) => (topic, i64::from(partition)),
        None => (String::new(), -1),
    };
    let (mut line, mut file) = (Vec::new(), String::new());
    for batch in inspect::dump(&target, options) {
        let batch = batch?;
        line.clear();
        if global.json {
            json(&mut line, &batch, args.records.then_some((&topic, partition)))?;
        } else {
            if file != batch.file {
                file.clone_from(&batch.file);
                let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
                let _ = writeln!(line, "{}", folder.join(&file).display());
            }
            text(&mut line, &batch, args.decode);
        }
        out.write_all(&line).map_err(stdout_error)?;
    }
    Ok(())
}

/// One object; the records, which only this crate knows how to show, are put in at its end.
fn json(line: &mut Vec<u8>, batch: &DumpedBatch, records: Option<(&String, i64)>) -> Result<()> {
    serde_json::to_writer(&mut *line, batch)?;
    if let Some((topic, partition)) = records {
        line.pop();
        line.extend_from_slice(b",\"records\":[");
        for (index, record) in batch.records.iter().enumerate() {
            if index > 0 {
                line.push(b',');
            }
            write_json(line, shown(record, batch, topic, partition));
        }
        line.extend_from_slice(b"]}");
    }
    line.push(b'\n');
    Ok(())
}

fn shown<'a>(record: &'a Record, batch: &DumpedBatch, topic: &'a str, partition: i64) -> Shown<'a> {
    Shown {
        topic,
        partition,
        offset: record.offset,
        timestamp_ms: record.timestamp,
        log_append_time: batch.timestamp_type == "append",
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers: &record.headers,
    }
}

fn text(out: &mut Vec<u8>, batch: &DumpedBatch, decode: Decode) {
    // Writing to a Vec cannot fail, here and below.
    let _ = write!(
        out,
        "offsets {}..{}  count {}  sequence {}  producer {} epoch {}  leader epoch {}  position {}  size {}  {}  crc {}  {} {}",
        batch.base_offset,
        batch.last_offset,
        batch.count,
        batch.base_sequence,
        batch.producer_id,
        batch.producer_epoch,
        batch.leader_epoch,
        batch.position,
        batch.size,
        batch.codec,
        batch.crc,
        batch.timestamp_type,
        time(batch.max_timestamp)
    );
    for (holds, word) in [(batch.transactional, "  transactional"), (batch.control, "  control")] {
        if holds {
            out.extend_from_slice(word.as_bytes());
        }
    }
    if let Some(horizon) = batch.delete_horizon_ms {
        let _ = write!(out, "  delete horizon {}", time(horizon));
    }
    if !batch.valid {
        let _ = write!(out, "  INVALID: {}", batch.detail.as_deref().unwrap_or("damaged"));
    }
    out.push(b'\n');
    for record in &batch.records {
        let _ = write!(out, "  {}  {}  key ", record.offset, time(record.timestamp));
        value(out, record.key.as_deref(), decode);
        out.extend_from_slice(b"  value ");
        value(out, record.value.as_deref(), decode);
        for header in &record.headers {
            out.extend_from_slice(b"  header ");
            value(out, Some(&header.key), Decode::Utf8);
            out.push(b'=');
            value(out, header.value.as_deref(), decode);
        }
        out.push(b'\n');
    }
}

/// A moment, or the number itself where it is none.
pub(super) fn time(ms: i64) -> String {
    match jiff::Timestamp::from_millisecond(ms) {
        Ok(time) if ms >= 0 => format!("{time:.3}"),
        _ => ms.to_string(),
    }
}

fn value(out: &mut Vec<u8>, bytes: Option<&[u8]>, decode: Decode) {
    let Some(bytes) = bytes else {
        out.extend_from_slice(b"null");
        return;
    };
    match decode {
        Decode::Hex => {
            for byte in bytes {
                let _ = write!(out, "{byte:02x}");
            }
        }
        Decode::Json => match serde_json::from_slice::<serde_json::Value>(bytes) {
            Ok(json) if json.is_object() || json.is_array() => {
                let _ = write!(out, "\n{json:#}");
            }
            _ => escaped(out, bytes),
        },
        Decode::Utf8 => escaped(out, bytes),
    }
}

/// Text as it is, but for what would break the line or is no text.
fn escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                let _ = write!(out, "{}", c.escape_default());
            } else {
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: Option<&[u8]>, decode: Decode) -> String {
        let mut out = Vec::new();
        value(&mut out, bytes, decode);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn every_form_keeps_a_value_on_its_own() {
        assert_eq!(decoded(None, Decode::Hex), "null");
        assert_eq!(decoded(Some(b"\xff\x00a"), Decode::Hex), "ff0061");
        assert_eq!(decoded(Some("✈\n\\\u{1}".as_bytes()), Decode::Utf8), "✈\\n\\\\\\u{1}");
        assert_eq!(decoded(Some(b"a\xffb"), Decode::Utf8), "a\\xffb");
        assert_eq!(decoded(Some(b"{\"a\":1}"), Decode::Json), "\n{\n  \"a\": 1\n}");
        assert_eq!(decoded(Some(b"12"), Decode::Json), "12");
        assert_eq!(decoded(Some(b"{"), Decode::Json), "{");
    }

    #[test]
    fn moments_are_readable_and_others_are_numbers() {
        assert_eq!(time(1_357_034_100_000), "2013-01-01T09:55:00.000Z");
        assert_eq!(time(-1), "-1");
        assert_eq!(time(i64::MAX), i64::MAX.to_string());
    }
}
