//! What a line becomes: key, value and time of a record.
//!
//! Owns: `--key`, `--key-separator`, `--json-key`, `--timestamp-field` and `--null-value`. Refuses: lines that are no JSON object
//! where a field of one was asked for; an error names the line. Read next: `commands/produce.rs`.

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::spec::time_ms;

/// What stands in a line, and where.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fields {
    /// The key of every record.
    pub(crate) key: Option<Bytes>,
    /// What stands between key and value.
    pub(crate) key_separator: Option<Bytes>,
    /// The field of a JSON line that is the key.
    pub(crate) json_key: Option<String>,
    /// The field of a JSON line that is the time.
    pub(crate) timestamp: Option<String>,
    /// The value that stands for null.
    pub(crate) null_value: Option<String>,
}

/// A record of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Option<Bytes>,
    /// `None`: the producer's own clock.
    pub(crate) timestamp_ms: Option<i64>,
}

impl Fields {
    /// Takes a line apart.
    pub(crate) fn parse(&self, line: Bytes) -> Result<Parsed> {
        let (mut key, value) = match &self.key_separator {
            Some(separator) => match memchr::memmem::find(&line, separator) {
                Some(at) => (Some(line.slice(..at)), line.slice(at + separator.len()..)),
                None => (None, line),
            },
            None => (self.key.clone(), line),
        };
        if self.null_value.as_ref().is_some_and(|null| null.as_bytes() == value) {
            return Ok(Parsed { key, value: None, timestamp_ms: None });
        }
        let mut timestamp_ms = None;
        if self.json_key.is_some() || self.timestamp.is_some() {
            let mut json = serde_json::Deserializer::from_slice(&value);
            let found = Wanted { key: self.json_key.as_deref(), time: self.timestamp.as_deref() }
                .deserialize(&mut json)
                .and_then(|found| json.end().map(|()| found))
                .context("not a JSON object")?;
            if self.json_key.is_some() {
                key = found.key.map(key_of).transpose().context("not a JSON object")?.flatten();
            }
            if let Some(field) = &self.timestamp {
                timestamp_ms = Some(moment(field, found.time)?);
            }
        }
        Ok(Parsed { key, value: Some(value), timestamp_ms })
    }
}

/// A field as a key: a string's own text, nothing for null, and all else as it stands in the line. A number that was read
/// and written again would be another one: 1.10 would be 1.1, and of two large ones only one would be left.
fn key_of(json: &RawValue) -> serde_json::Result<Option<Bytes>> {
    match json.get() {
        "null" => Ok(None),
        text if text.starts_with('"') => serde_json::from_str::<String>(text).map(|text| Some(text.into())),
        other => Ok(Some(Bytes::copy_from_slice(other.as_bytes()))),
    }
}

fn moment(field: &str, json: Option<&RawValue>) -> Result<i64> {
    let value = json.map(|json| serde_json::from_str(json.get())).transpose();
    match value.with_context(|| format!("the time field {field:?}"))? {
        None | Some(Value::Null) => Err(anyhow!("the time field {field:?} is missing")),
        Some(Value::String(text)) => time_ms(&text).with_context(|| format!("the time field {field:?}")),
        Some(Value::Number(number)) => number
            .as_i64()
            .or_else(|| number.as_f64().map(|number| number as i64))
            .with_context(|| format!("the time field {field:?} is {number}, which is no number of milliseconds")),
        Some(other) => Err(anyhow!("the time field {field:?} is {other}; expected RFC 3339 or milliseconds")),
    }
}

/// Two fields of an object; all others are skipped, not built.
struct Wanted<'a> {
    key: Option<&'a str>,
    time: Option<&'a str>,
}

#[derive(Default)]
struct Found<'de> {
    key: Option<&'de RawValue>,
    time: Option<&'de RawValue>,
}

impl<'de> DeserializeSeed<'de> for Wanted<'_> {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Wanted<'_> {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found<'de>, A::Error> {
        let mut found = Found::default();
        while let Some((is_key, is_time)) = map.next_key_seed(Name(&self))? {
            if is_key || is_time {
                let value = map.next_value()?;
                if is_time {
                    found.time = Some(value);
                }
                if is_key {
                    found.key = Some(value);
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Compares a field's name with the two that are wanted.
struct Name<'a>(&'a Wanted<'a>);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = (bool, bool);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(bool, bool), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = (bool, bool);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<(bool, bool), E> {
        Ok((self.0.key == Some(name), self.0.time == Some(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(fields: &Fields, line: &'static str) -> (Option<String>, Option<String>, Option<i64>) {
        let text = |bytes: Option<Bytes>| bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let record = fields.parse(Bytes::from(line)).expect(line);
        (text(record.key), text(record.value), record.timestamp_ms)
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn a_separator_splits_at_its_first_occurrence() {
        let fields = Fields { key_separator: Some("::".into()), ..Fields::default() };
        assert_eq!(parsed(&fields, "k::v::w"), (some("k"), some("v::w"), None));
        assert_eq!(parsed(&fields, "::v"), (some(""), some("v"), None));
        assert_eq!(parsed(&fields, "k::"), (some("k"), some(""), None));
        assert_eq!(parsed(&fields, "none"), (None, some("none"), None));
    }

    #[test]
    fn a_key_may_be_the_same_for_all() {
        let fields = Fields { key: Some("k".into()), null_value: Some("NULL".into()), ..Fields::default() };
        assert_eq!(parsed(&fields, "v"), (some("k"), some("v"), None));
        assert_eq!(parsed(&fields, "NULL"), (some("k"), None, None));
        let fields = Fields { key: Some("k".into()), timestamp: Some("t".into()), ..Fields::default() };
        assert_eq!(parsed(&fields, r#"{"t":5}"#), (some("k"), some(r#"{"t":5}"#), Some(5)));
    }

    #[test]
    fn json_fields() {
        let fields = Fields { json_key: Some("k".into()), timestamp: Some("t".into()), ..Fields::default() };
        let line = r#"{"a":{"k":1},"k":"x\"y","t":"1970-01-01T00:00:01Z"}"#;
        assert_eq!(parsed(&fields, line), (some("x\"y"), some(line), Some(1000)));
        assert_eq!(parsed(&fields, r#"{"t":5}"#).0, None, "a missing field");
        assert_eq!(parsed(&fields, r#"{"k":null,"t":5}"#).0, None);
        assert_eq!(parsed(&fields, r#"{"k":"","t":5}"#).0, some(""));
        assert_eq!(parsed(&fields, r#"{"k":7,"t":5.9}"#), (some("7"), some(r#"{"k":7,"t":5.9}"#), Some(5)));
        assert_eq!(parsed(&fields, r#"{"k":[1, 2],"t":"5"}"#).0, some("[1, 2]"));
    }

    #[test]
    fn a_number_is_the_key_as_it_stands_there() {
        let fields = Fields { json_key: Some("k".into()), ..Fields::default() };
        for number in ["1.10", "1.1", "-0", "1e3", "123456789012345678901234567890", "123456789012345678901234567891"] {
            let line: &'static str = format!("{{\"a\":[{number}],\"k\": {number} }}").leak();
            assert_eq!(parsed(&fields, line).0, some(number));
        }
        assert_eq!(parsed(&fields, r#"{"k":true}"#).0, some("true"));
        assert_eq!(parsed(&fields, r#"{"k":"\u0041\\"}"#).0, some("A\\"));
    }

    #[test]
    fn one_field_may_be_both() {
        let fields = Fields { json_key: Some("t".into()), timestamp: Some("t".into()), ..Fields::default() };
        assert_eq!(parsed(&fields, r#"{"t":5}"#), (some("5"), some(r#"{"t":5}"#), Some(5)));
    }

    #[test]
    fn lines_that_do_not_have_what_was_asked_for_are_refused() {
        let fields = Fields { timestamp: Some("t".into()), ..Fields::default() };
        for bad in
            ["", "x", "[]", "{}", r#"{"t":null}"#, r#"{"t":"noon"}"#, r#"{"t":true}"#, r#"{"t":1} x"#, "{\"t\":1"]
        {
            assert!(fields.parse(Bytes::from(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_null_value_is_a_tombstone_and_needs_no_json() {
        let fields = Fields { key_separator: Some(":".into()), null_value: Some("NULL".into()), ..Fields::default() };
        assert_eq!(parsed(&fields, "k:NULL"), (some("k"), None, None));
        assert_eq!(parsed(&fields, "k:NULLS"), (some("k"), some("NULLS"), None));
        let fields = Fields { json_key: Some("k".into()), null_value: Some(String::new()), ..Fields::default() };
        assert_eq!(parsed(&fields, ""), (None, None, None));
    }
}
