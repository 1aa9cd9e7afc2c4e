//! One record as a line: its value, JSON or a format.
//!
//! ```json
//! {"topic":"t","partition":0,"offset":7,"timestamp":1357034100000,"timestamp_type":"create","key":"k","value":"v","headers":[{"key":"h","value":"x"}]}
//! ```
//! Bytes that are not UTF-8 come as `key_base64` and `value_base64` instead, in a header too; null stays null.
//!
//! Owns: the JSON of a record, its keys and their order. Refuses: where the lines go ([`crate::printer`]). Read next:
//! [`crate::printer`].

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use headwater_client::ConsumedRecord;
use headwater_proto::batch::{Header, TimestampType};
use std::io::Write;

use crate::format::Format;

/// A record as it is shown, wherever it came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a> {
    /// Empty where nobody knows.
    pub(crate) topic: &'a str,
    /// -1 where nobody knows.
    pub(crate) partition: i64,
    pub(crate) offset: i64,
    pub(crate) timestamp_ms: i64,
    pub(crate) log_append_time: bool,
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) headers: &'a [Header],
}

impl<'a> From<&'a ConsumedRecord> for Shown<'a> {
    fn from(record: &'a ConsumedRecord) -> Shown<'a> {
        Shown {
            topic: &record.topic,
            partition: i64::from(record.partition),
            offset: record.offset,
            timestamp_ms: record.timestamp_ms,
            log_append_time: record.timestamp_type == TimestampType::LogAppend,
            key: record.key.as_deref(),
            value: record.value.as_deref(),
            headers: &record.headers,
        }
    }
}

/// How records become lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Style {
    /// The value and a line feed.
    Value,
    /// A JSON object and a line feed.
    Json,
    /// As the format says, and nothing else.
    Format(Format),
}

impl Style {
    /// The style that `--json` and `-f` ask for.
    pub(crate) fn new(json: bool, format: Option<Format>) -> Style {
        match format {
            Some(format) => Style::Format(format),
            None if json => Style::Json,
            None => Style::Value,
        }
    }

    /// Appends one record.
    pub(crate) fn write(&self, out: &mut Vec<u8>, record: Shown<'_>) {
        match self {
            Style::Value => {
                out.extend_from_slice(record.value.unwrap_or_default());
                out.push(b'\n');
            }
            Style::Json => {
                write_json(out, record);
                out.push(b'\n');
            }
            Style::Format(format) => format.write(out, record),
        }
    }
}

/// Appends a record as one JSON object, without a line feed.
pub(crate) fn write_json(out: &mut Vec<u8>, record: Shown<'_>) {
    out.extend_from_slice(b"{\"topic\":");
    string(out, record.topic);
    // Writing to a Vec cannot fail, here and below.
    let _ = write!(
        out,
        ",\"partition\":{},\"offset\":{},\"timestamp\":{},\"timestamp_type\":\"{}\",",
        record.partition,
        record.offset,
        record.timestamp_ms,
        if record.log_append_time { "append" } else { "create" }
    );
    bytes(out, "key", record.key);
    out.push(b',');
    bytes(out, "value", record.value);
    out.extend_from_slice(b",\"headers\":[");
    for (index, header) in record.headers.iter().enumerate() {
        out.extend_from_slice(if index > 0 { b",{" } else { b"{" });
        bytes(out, "key", Some(&header.key));
        out.push(b',');
        bytes(out, "value", header.value.as_deref());
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
}

/// `"name":"text"`, `"name":null` or `"name_base64":"..."`.
fn bytes(out: &mut Vec<u8>, name: &str, bytes: Option<&[u8]>) {
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    match bytes.map(|bytes| std::str::from_utf8(bytes).map_err(|_| bytes)) {
        None => out.extend_from_slice(b"\":null"),
        Some(Ok(text)) => {
            out.extend_from_slice(b"\":");
            string(out, text);
        }
        Some(Err(bytes)) => {
            out.extend_from_slice(b"_base64\":\"");
            out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
            out.push(b'"');
        }
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    // A string always serialises, and writing to a Vec cannot fail.
    let _ = serde_json::to_writer(out, text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown<'a>(key: Option<&'a [u8]>, value: Option<&'a [u8]>, headers: &'a [Header]) -> Shown<'a> {
        Shown { topic: "t", partition: 1, offset: 7, timestamp_ms: -1, log_append_time: true, key, value, headers }
    }

    fn json(record: Shown<'_>) -> serde_json::Value {
        let mut out = Vec::new();
        write_json(&mut out, record);
        serde_json::from_slice(&out).expect("JSON")
    }

    #[test]
    fn a_record_is_one_object_with_stable_keys() {
        let headers = [
            Header { key: "größe".into(), value: Some("✈".into()) },
            Header { key: "raw".into(), value: Some(bytes::Bytes::from_static(b"\xfe")) },
            Header { key: "none".into(), value: None },
        ];
        assert_eq!(
            json(shown(Some(b"k\"\n"), Some(b"\xff"), &headers)),
            serde_json::json!({
                "topic": "t", "partition": 1, "offset": 7, "timestamp": -1, "timestamp_type": "append",
                "key": "k\"\n", "value_base64": "/w==",
                "headers": [{"key": "größe", "value": "✈"}, {"key": "raw", "value_base64": "/g=="}, {"key": "none", "value": null}]
            })
        );
    }

    #[test]
    fn null_and_empty_differ() {
        let record = json(shown(None, Some(b""), &[]));
        assert_eq!(record["key"], serde_json::Value::Null);
        assert_eq!(record["value"], "");
        assert_eq!(json(shown(Some(b""), None, &[]))["value"], serde_json::Value::Null);
    }

    #[test]
    fn a_json_line_has_no_line_feed_inside() {
        let mut out = Vec::new();
        Style::Json.write(&mut out, shown(Some(b"\n"), Some("\u{2028}\r\n".as_bytes()), &[]));
        assert_eq!(out.iter().filter(|&&b| b == b'\n').count(), 1);
    }

    #[test]
    fn plain_is_the_value_and_a_line_feed() {
        let mut out = Vec::new();
        Style::Value.write(&mut out, shown(Some(b"k"), Some(b"v"), &[]));
        Style::Value.write(&mut out, shown(Some(b"k"), None, &[]));
        assert_eq!(out, b"v\n\n");
    }
}
