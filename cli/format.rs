//! `-f FORMAT`: what one record looks like on the screen.
//!
//! Owns: the language of formats, read once into pieces. Refuses: JSON ([`crate::record`] has it). Read next:
//! [`crate::record`].

use anyhow::{Result, bail};
use std::io::Write;
use std::str::{Chars, FromStr};

use crate::record::Shown;

/// A format, ready to be filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Format {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(Vec<u8>),
    Topic,
    Partition,
    Offset,
    Timestamp,
    Key,
    Value,
    Headers,
    Size,
}

impl Format {
    /// Appends one record. A null key or value prints as nothing; headers as `key=value` with commas between them.
    pub(crate) fn write(&self, out: &mut Vec<u8>, record: Shown<'_>) {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.extend_from_slice(text),
                Piece::Topic => out.extend_from_slice(record.topic.as_bytes()),
                Piece::Partition => number(out, record.partition),
                Piece::Offset => number(out, record.offset),
                Piece::Timestamp => number(out, record.timestamp_ms),
                Piece::Key => out.extend_from_slice(record.key.unwrap_or_default()),
                Piece::Value => out.extend_from_slice(record.value.unwrap_or_default()),
                Piece::Size => number(out, record.value.map_or(0, |value| value.len() as i64)),
                Piece::Headers => {
                    for (index, header) in record.headers.iter().enumerate() {
                        if index > 0 {
                            out.push(b',');
                        }
                        out.extend_from_slice(&header.key);
                        out.push(b'=');
                        out.extend_from_slice(header.value.as_deref().unwrap_or_default());
                    }
                }
            }
        }
    }
}

fn number(out: &mut Vec<u8>, number: i64) {
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{number}");
}

/// Text in which `\n`, `\t`, `\r`, `\0`, `\\` and `\xHH` stand for one byte each.
pub(crate) fn unescape(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => bytes.push(escaped(&mut rest)?),
            other => bytes.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Ok(bytes)
}

/// The byte that is meant by what follows a backslash.
fn escaped(rest: &mut Chars<'_>) -> Result<u8> {
    Ok(match rest.next() {
        Some('n') => b'\n',
        Some('t') => b'\t',
        Some('r') => b'\r',
        Some('0') => 0,
        Some('\\') => b'\\',
        Some('x') => {
            let digits: String = rest.by_ref().take(2).collect();
            match u8::from_str_radix(&digits, 16) {
                Ok(byte) if digits.len() == 2 => byte,
                _ => bail!("\\x needs two hexadecimal digits, not {digits:?}"),
            }
        }
        Some(other) => bail!("\\{other} means nothing; there are \\n \\t \\r \\0 \\\\ and \\xHH"),
        None => bail!("a single \\ at the end; write \\\\ for a backslash"),
    })
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(format: &str) -> Result<Format> {
        let mut pieces = Vec::new();
        let mut text = Vec::new();
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            let piece = match c {
                '%' => match rest.next() {
                    Some('%') => {
                        text.push(b'%');
                        continue;
                    }
                    Some('t') => Piece::Topic,
                    Some('p') => Piece::Partition,
                    Some('o') => Piece::Offset,
                    Some('T') => Piece::Timestamp,
                    Some('k') => Piece::Key,
                    Some('v') => Piece::Value,
                    Some('h') => Piece::Headers,
                    Some('s') => Piece::Size,
                    Some(other) => bail!("%{other} means nothing; there are %t %p %o %T %k %v %h %s and %%"),
                    None => bail!("a single % at the end; write %% for a percent sign"),
                },
                '\\' => {
                    text.push(escaped(&mut rest)?);
                    continue;
                }
                other => {
                    text.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes());
                    continue;
                }
            };
            if !text.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut text)));
            }
            pieces.push(piece);
        }
        if !text.is_empty() {
            pieces.push(Piece::Text(text));
        }
        Ok(Format { pieces })
    }
}

#[cfg(test)]
mod tests {
    use super::Format;
    use crate::record::Shown;
    use headwater_proto::batch::Header;

    fn filled(format: &str) -> Vec<u8> {
        let headers = [Header { key: "a".into(), value: Some("1".into()) }, Header { key: "b".into(), value: None }];
        let record = Shown {
            topic: "flights",
            partition: 3,
            offset: 42,
            timestamp_ms: 1_357_000_000_000,
            log_append_time: false,
            key: Some(b"N14228"),
            value: Some(b"\xff\x00x"),
            headers: &headers,
        };
        let mut out = Vec::new();
        format.parse::<Format>().expect(format).write(&mut out, record);
        out
    }

    #[test]
    fn every_letter_has_its_meaning() {
        assert_eq!(filled("%t|%p|%o|%T|%k|%h|%s\\n"), b"flights|3|42|1357000000000|N14228|a=1,b=|3\n");
        assert_eq!(filled("%v"), b"\xff\x00x", "bytes are not changed");
        assert_eq!(filled("100%% \\t\\x41\\\\\\0✈"), "100% \tA\\\0✈".as_bytes());
        assert_eq!(filled(""), b"");
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for bad in ["%", "%q", "\\", "\\q", "\\x4", "\\xzz"] {
            assert!(bad.parse::<Format>().is_err(), "{bad}");
        }
    }
}
