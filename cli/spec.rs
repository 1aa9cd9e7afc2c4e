//! The small languages inside the values of flags: offsets and times, durations and sizes, settings and conditions.
//!
//! Owns: reading them, once, into types that cannot be wrong. Refuses: what a broker must say (whether an offset is in
//! range). Times are RFC 3339, or a date (midnight UTC), or milliseconds since 1970; durations are `90s`, `1h 30m`,
//! `7d` or ISO 8601 (`PT1H`). Read next: [`crate::args`].

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use headwater_proto::limits::MAX_BATCH_BYTES;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::format::unescape;

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// The first record there is.
    Earliest,
    /// After the last record there is.
    Latest,
    /// This offset.
    Offset(i64),
    /// The first record at or after this time, in milliseconds since 1970.
    Time(i64),
    /// The first record at or after the moment that was so long ago.
    Ago(Duration),
}

impl FromStr for Start {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Start> {
        Ok(match text.split_once(':') {
            _ if text == "earliest" => Start::Earliest,
            _ if text == "latest" => Start::Latest,
            Some(("offset", offset)) => Start::Offset(parse_offset(offset)?),
            Some(("time", time)) => Start::Time(bound_ms(time)?),
            _ => match text.strip_prefix('-') {
                Some(ago) => Start::Ago(duration(ago)?),
                None => bail!("expected earliest, latest, offset:N, time:RFC3339 or -DURATION"),
            },
        })
    }
}

/// Where reading ends. Neither the offset nor the time is included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The high watermark at the moment of asking.
    Now,
    /// This offset.
    Offset(i64),
    /// This time, in milliseconds since 1970.
    Time(i64),
    /// The moment that was so long ago.
    Ago(Duration),
}

impl FromStr for End {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<End> {
        Ok(match text.split_once(':') {
            _ if text == "end" || text == "latest" => End::Now,
            Some(("offset", offset)) => End::Offset(parse_offset(offset)?),
            Some(("time", time)) => End::Time(bound_ms(time)?),
            _ => match text.strip_prefix('-') {
                Some(ago) => End::Ago(duration(ago)?),
                None => bail!("expected end, offset:N, time:RFC3339 or -DURATION"),
            },
        })
    }
}

/// Where a group's offsets go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResetTarget {
    /// The first record there is.
    Earliest,
    /// After the last record there is.
    Latest,
    /// Where the group stands; the end where it has committed nothing.
    Current,
    /// This offset.
    Offset(i64),
    /// The first record at or after this time, in milliseconds since 1970.
    Time(i64),
    /// So many records on, or back.
    Shift(i64),
    /// The first record at or after the moment that was so long ago.
    Ago(Duration),
    /// What a file says for each partition.
    File(PathBuf),
}

impl FromStr for ResetTarget {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<ResetTarget> {
        Ok(match text.split_once(':') {
            _ if text == "earliest" => ResetTarget::Earliest,
            _ if text == "latest" => ResetTarget::Latest,
            _ if text == "current" => ResetTarget::Current,
            Some(("offset", offset)) => ResetTarget::Offset(parse_offset(offset)?),
            Some(("time", time)) => ResetTarget::Time(bound_ms(time)?),
            Some(("shift", by)) => {
                ResetTarget::Shift(by.parse().with_context(|| format!("{by:?} is no number of records"))?)
            }
            Some(("duration", ago)) => ResetTarget::Ago(duration(ago)?),
            Some(("file", path)) if !path.is_empty() => ResetTarget::File(path.into()),
            _ => bail!("expected earliest, latest, current, offset:N, time:RFC3339, shift:N, duration:D or file:FILE"),
        })
    }
}

/// A topic, or some of its partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TopicSelection {
    pub(crate) topic: String,
    /// `None`: all of them.
    pub(crate) partitions: Option<Vec<u32>>,
}

impl FromStr for TopicSelection {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<TopicSelection> {
        let (topic, partitions) = match text.split_once(':') {
            None => (text, None),
            Some((topic, list)) => {
                let numbers: Result<Vec<u32>> = list
                    .split(',')
                    .map(|number| number.parse().with_context(|| format!("{number:?} is no partition number")))
                    .collect();
                (topic, Some(numbers?))
            }
        };
        if topic.is_empty() {
            bail!("the topic's name is missing");
        }
        Ok(TopicSelection { topic: topic.to_owned(), partitions })
    }
}

/// A setting: `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for Setting {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Setting> {
        match text.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => {
                Ok(Setting { key: key.trim().to_owned(), value: value.trim().to_owned() })
            }
            _ => bail!("expected KEY=VALUE"),
        }
    }
}

/// A header of a record: `key=value`, where only the first `=` counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeaderArg {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for HeaderArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<HeaderArg> {
        let (key, value) = text.split_once('=').context("expected KEY=VALUE")?;
        Ok(HeaderArg { key: key.to_owned(), value: value.to_owned() })
    }
}

/// What stands between key and value: at least one byte, with the escapes of formats.
pub(crate) fn separator(text: &str) -> Result<Bytes> {
    match unescape(text)? {
        empty if empty.is_empty() => bail!("an empty separator separates nothing"),
        bytes => Ok(bytes.into()),
    }
}

/// A condition on a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Where {
    /// The key is this text.
    Key(String),
    /// A header of this name has this text.
    Header { name: String, value: String },
}

impl FromStr for Where {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Where> {
        if let Some(key) = text.strip_prefix("key=") {
            return Ok(Where::Key(key.to_owned()));
        }
        match text.strip_prefix("header:").and_then(|rest| rest.split_once('=')) {
            Some((name, value)) => Ok(Where::Header { name: name.to_owned(), value: value.to_owned() }),
            None => bail!("expected key=K or header:NAME=VALUE"),
        }
    }
}

/// When something happened, in milliseconds since 1970: RFC 3339, a date (midnight UTC), or the number itself. What is
/// finer than a millisecond is left out.
pub(crate) fn time_ms(text: &str) -> Result<i64> {
    moment(text, |nanoseconds| nanoseconds.div_euclid(NANOSECONDS))
}

/// A moment that separates what happened before it from what did not: as [`time_ms`], but rounded up. A timestamp in
/// milliseconds lies at or after a moment between two of them exactly if it lies at or after the later one.
fn bound_ms(text: &str) -> Result<i64> {
    moment(text, |nanoseconds| -(-nanoseconds).div_euclid(NANOSECONDS))
}

/// Of a millisecond.
const NANOSECONDS: i128 = 1_000_000;

fn moment(text: &str, to_ms: impl Fn(i128) -> i128) -> Result<i64> {
    if let Ok(number) = text.parse::<i64>() {
        return Ok(number);
    }
    if let Ok(at) = text.parse::<jiff::Timestamp>() {
        return Ok(i64::try_from(to_ms(at.as_nanosecond()))?);
    }
    if text.len() == "2013-01-01".len()
        && let Ok(date) = text.parse::<jiff::civil::Date>()
    {
        return Ok(date.to_zoned(jiff::tz::TimeZone::UTC)?.timestamp().as_millisecond());
    }
    bail!("{text:?} is no time; expected RFC 3339 with an offset (2013-01-03T00:00:00-05:00), a date, or milliseconds")
}

/// A length of time: `90s`, `500ms`, `1h 30m`, `7d`, or ISO 8601 (`PT1H`).
pub(crate) fn duration(text: &str) -> Result<Duration> {
    if let Ok(duration) = humantime::parse_duration(text) {
        return Ok(duration);
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .with_context(|| format!("{text:?} is no duration; expected 90s, 500ms, 1h30m, 7d or PT1H"))
}

/// The longest time to wait for anything: more is a slip of the pen, and clocks end somewhere.
const LONGEST_WAIT: Duration = Duration::from_secs(366 * 86_400);

/// A length of time to wait: as [`duration`], and at most a year.
pub(crate) fn wait(text: &str) -> Result<Duration> {
    match duration(text)? {
        wait if wait <= LONGEST_WAIT => Ok(wait),
        _ => bail!("{text} is too long: at most 366 days"),
    }
}

/// How long a certificate is valid: as [`duration`], a minute at least and a hundred years at most.
pub(crate) fn validity(text: &str) -> Result<Duration> {
    const DAY_S: u64 = 86_400;
    match duration(text)? {
        length if (60..=36_525 * DAY_S).contains(&length.as_secs()) => Ok(length),
        _ => bail!("a certificate is valid for a minute at least and 36525 days at most, not {text}"),
    }
}

/// The size of a record or a batch: as [`byte_size`], and at most what any batch may have.
pub(crate) fn batch_size(text: &str) -> Result<u64> {
    match byte_size(text)? {
        bytes if bytes <= MAX_BATCH_BYTES as u64 => Ok(bytes),
        _ => bail!("{text} is too large: no batch may have more than {MAX_BATCH_BYTES} bytes"),
    }
}

/// So many a second: as [`count`], and at most one each nanosecond.
pub(crate) fn per_second(text: &str) -> Result<u64> {
    match count(text)? {
        rate if rate <= 1_000_000_000 => Ok(rate),
        _ => bail!("{text} a second are too many: at most 1,000,000,000"),
    }
}

/// A number of bytes: `1000`, `64KiB`, `1MB`, `2GiB`.
pub(crate) fn byte_size(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => bail!("{text:?} is no number of bytes; expected 1000, 64KiB, 1MB, ..."),
    };
    let number: u64 = number.parse().with_context(|| format!("{text:?} is no number of bytes"))?;
    match number.checked_mul(factor) {
        Some(0) => bail!("0 bytes make no sense here"),
        Some(bytes) => Ok(bytes),
        None => bail!("{text} is more than can be counted"),
    }
}

/// The brokers that keep a partition, the leader first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replicas(pub(crate) Vec<i32>);

/// Brokers' ids: `1:2:3`.
pub(crate) fn replicas(text: &str) -> Result<Replicas> {
    let id = |id: &str| match id.trim().parse() {
        Ok(id @ 0i32..) => Ok(id),
        _ => bail!("{text:?} names no brokers; expected ids such as 1:2:3"),
    };
    text.split(':').map(id).collect::<Result<_>>().map(Replicas)
}

/// A number of things, at least one; `_` and `,` may stand between digits.
pub(crate) fn count(text: &str) -> Result<u64> {
    let digits: String = text.chars().filter(|c| !matches!(c, '_' | ',')).collect();
    match digits.parse() {
        Ok(0) | Err(_) => bail!("{text:?} is no number from 1 on"),
        Ok(number) => Ok(number),
    }
}

/// The first offset that stays: a number, or `end` (-1 on the wire).
pub(crate) fn before_offset(text: &str) -> Result<i64> {
    if text == "end" { Ok(-1) } else { parse_offset(text) }
}

fn parse_offset(text: &str) -> Result<i64> {
    match text.parse::<i64>() {
        Ok(offset) if offset >= 0 => Ok(offset),
        _ => bail!("{text:?} is no offset; expected a number from 0 on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<T: FromStr>(text: &str) -> Option<T> {
        text.parse().ok()
    }

    #[test]
    fn starts() {
        assert_eq!(parse("earliest"), Some(Start::Earliest));
        assert_eq!(parse("latest"), Some(Start::Latest));
        assert_eq!(parse("offset:42"), Some(Start::Offset(42)));
        assert_eq!(parse("time:1700000000000"), Some(Start::Time(1_700_000_000_000)));
        assert_eq!(parse("time:2013-01-03T00:00:00-05:00"), Some(Start::Time(1_357_189_200_000)));
        assert_eq!(parse("-1h30m"), Some(Start::Ago(Duration::from_secs(5400))));
        for bad in ["", "offset:", "offset:-1", "offset:x", "time:", "time:noon", "1h", "-", "--1h", "end"] {
            assert_eq!(parse::<Start>(bad), None, "{bad}");
        }
    }

    #[test]
    fn ends() {
        assert_eq!(parse("end"), Some(End::Now));
        assert_eq!(parse("offset:0"), Some(End::Offset(0)));
        assert_eq!(parse("time:1970-01-01T00:00:01.5Z"), Some(End::Time(1500)));
        assert_eq!(parse("-1d"), Some(End::Ago(Duration::from_secs(86_400))));
        assert_eq!(parse::<End>("earliest"), None);
    }

    #[test]
    fn reset_targets() {
        assert_eq!(parse("shift:-5"), Some(ResetTarget::Shift(-5)));
        assert_eq!(parse("shift:5"), Some(ResetTarget::Shift(5)));
        assert_eq!(parse("duration:PT1H"), Some(ResetTarget::Ago(Duration::from_secs(3600))));
        assert_eq!(parse("file:a:b.csv"), Some(ResetTarget::File("a:b.csv".into())));
        assert_eq!(parse("current"), Some(ResetTarget::Current));
        for bad in ["", "shift:", "file:", "duration:-1h", "offset:-3", "end"] {
            assert_eq!(parse::<ResetTarget>(bad), None, "{bad}");
        }
    }

    #[test]
    fn topics_with_and_without_partitions() {
        let selection = |topic: &str, partitions| Some(TopicSelection { topic: topic.into(), partitions });
        assert_eq!(parse("t"), selection("t", None));
        assert_eq!(parse("t:1"), selection("t", Some(vec![1])));
        assert_eq!(parse("t:0,2,4"), selection("t", Some(vec![0, 2, 4])));
        for bad in ["", ":1", "t:", "t:a", "t:1,", "t:-1"] {
            assert_eq!(parse::<TopicSelection>(bad), None, "{bad}");
        }
    }

    #[test]
    fn settings_headers_and_conditions() {
        assert_eq!(parse("a.b=c=d"), Some(Setting { key: "a.b".into(), value: "c=d".into() }));
        assert_eq!(parse::<Setting>("=v"), None);
        assert_eq!(parse("größe=✈"), Some(HeaderArg { key: "größe".into(), value: "✈".into() }));
        assert_eq!(parse("k="), Some(HeaderArg { key: "k".into(), value: String::new() }));
        assert_eq!(parse("key="), Some(Where::Key(String::new())));
        assert_eq!(parse("header:a=b=c"), Some(Where::Header { name: "a".into(), value: "b=c".into() }));
        assert_eq!(parse::<Where>("value=x"), None);
        assert_eq!(separator("\\t").ok(), Some("\t".into()));
        assert_eq!(separator("→\\x1f\\\\").ok(), Some("→\u{1f}\\".into()));
        assert!(separator("").is_err() && separator("\\").is_err() && separator("\\q").is_err());
    }

    #[test]
    fn times_have_one_meaning_each() {
        assert_eq!(time_ms("2013-01-03").ok(), Some(1_357_171_200_000));
        assert_eq!(time_ms("2013-01-03T05:00:00Z").ok(), time_ms("2013-01-03T00:00:00-05:00").ok());
        assert_eq!(time_ms("-1").ok(), Some(-1));
        assert!(time_ms("2013-01-03T05:00:00").is_err(), "no offset: whose noon is it");
    }

    #[test]
    fn bounds_between_two_milliseconds_are_the_later_one() {
        for (text, floor, ceil) in [
            ("1970-01-01T00:00:01.5Z", 1500, 1500),
            ("1970-01-01T00:00:01.5001Z", 1500, 1501),
            ("1970-01-01T00:00:01.500999999Z", 1500, 1501),
            ("1969-12-31T23:59:59.9995Z", -1, 0),
            ("1969-12-31T23:59:59.999Z", -1, -1),
            ("-1", -1, -1),
        ] {
            assert_eq!((time_ms(text).ok(), bound_ms(text).ok()), (Some(floor), Some(ceil)), "{text}");
        }
        assert_eq!(parse("time:1970-01-01T00:00:01.0001Z"), Some(Start::Time(1001)));
        assert_eq!(parse("time:1970-01-01T00:00:01.0001Z"), Some(End::Time(1001)));
        assert_eq!(parse("time:1970-01-01T00:00:01.0001Z"), Some(ResetTarget::Time(1001)));
    }

    #[test]
    fn durations_and_sizes() {
        assert_eq!(duration("120s").ok(), Some(Duration::from_secs(120)));
        assert_eq!(duration("1500ms").ok(), Some(Duration::from_millis(1500)));
        assert_eq!(duration("PT90S").ok(), Some(Duration::from_secs(90)));
        assert!(duration("soon").is_err() && duration("").is_err() && duration("5").is_err());
        assert_eq!(byte_size("64KiB").ok(), Some(65_536));
        assert_eq!(byte_size("1 MB").ok(), Some(1_000_000));
        assert_eq!(byte_size("12").ok(), Some(12));
        for bad in ["0", "", "MB", "-1", "1.5MB", "1TB!", "99999999999GiB"] {
            assert!(byte_size(bad).is_err(), "{bad}");
        }
        assert_eq!(wait("366d").ok(), Some(LONGEST_WAIT));
        assert!(wait("367d").is_err() && wait("18446744073709551615s").is_err());
        assert_eq!(batch_size("64MiB").ok(), Some(64 << 20));
        assert!(batch_size("65MiB").is_err() && batch_size("18446744073709551615").is_err());
        assert!(per_second("1000000000").is_ok() && per_second("1000000001").is_err());
        assert_eq!(count("1_000_000").ok(), Some(1_000_000));
        assert!(count("0").is_err() && count("many").is_err());
    }
}
