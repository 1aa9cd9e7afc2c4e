//! Lines of a file or of standard input, as slices of large reads.
//!
//! Owns: cutting lines without copying them one by one; a line is handed on as soon as it is complete. Refuses: meaning
//! ([`crate::fields`]), and lines that no batch could hold. Read next: `commands/produce.rs`.

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use headwater_proto::limits::MAX_BATCH_BYTES;
use std::io::{ErrorKind, Read};

/// Bytes of one read: large enough that a system call is nothing beside it.
const READ_BYTES: usize = 1 << 20;

/// Reads lines.
pub(crate) struct Lines<R> {
    input: R,
    scratch: Vec<u8>,
    /// The beginning of a line whose end has not been read.
    open: BytesMut,
    read: u64,
    ended: bool,
}

impl<R: Read> Lines<R> {
    /// Lines of an input that needs no buffer of its own.
    pub(crate) fn new(input: R) -> Lines<R> {
        Lines { input, scratch: vec![0; READ_BYTES], open: BytesMut::new(), read: 0, ended: false }
    }

    /// Lines that one read completed, without their line feeds; empty at the end of the input, and only then.
    pub(crate) fn next_lines(&mut self) -> Result<Vec<Bytes>> {
        while !self.ended {
            let count = match self.input.read(&mut self.scratch) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("cannot read the input"),
            };
            let bytes = &self.scratch[..count];
            self.ended = count == 0;
            let complete = if self.ended {
                self.open.len()
            } else {
                match memchr::memrchr(b'\n', bytes) {
                    Some(last) => self.open.len() + last + 1,
                    None => 0,
                }
            };
            self.open.extend_from_slice(bytes);
            if complete == 0 {
                if self.open.len() > MAX_BATCH_BYTES {
                    bail!(
                        "line {} is longer than {MAX_BATCH_BYTES} bytes, more than any record may have",
                        self.read + 1
                    );
                }
                continue;
            }
            let block = self.open.split_to(complete).freeze();
            let lines = cut(&block);
            self.read += lines.len() as u64;
            return Ok(lines);
        }
        Ok(Vec::new())
    }
}

/// A block's lines. What follows its last line feed, if anything, is a line too.
fn cut(block: &Bytes) -> Vec<Bytes> {
    let mut lines = Vec::new();
    let mut begin = 0;
    for end in memchr::memchr_iter(b'\n', block) {
        lines.push(block.slice(begin..end));
        begin = end + 1;
    }
    if begin < block.len() {
        lines.push(block.slice(begin..));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives its bytes in reads of at most so many.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let count = self.0.len().min(self.1).min(into.len());
            let (now, later) = self.0.split_at(count);
            into[..count].copy_from_slice(now);
            self.0 = later;
            Ok(count)
        }
    }

    fn all(input: &[u8], read: usize) -> Vec<Vec<u8>> {
        let mut lines = Lines::new(Slow(input, read));
        let mut all = Vec::new();
        loop {
            let some = lines.next_lines().expect("lines");
            if some.is_empty() {
                return all;
            }
            all.extend(some.iter().map(|line| line.to_vec()));
        }
    }

    #[test]
    fn a_last_line_needs_no_line_feed_and_an_empty_line_counts() {
        assert_eq!(all(b"a\n\nb", 100), [b"a".to_vec(), vec![], b"b".to_vec()]);
        assert_eq!(all(b"a\n", 100), [b"a"]);
        assert_eq!(all(b"\n", 100), [b""]);
        assert_eq!(all(b"", 100), Vec::<Vec<u8>>::new());
        assert_eq!(all(b"\xff\x00\r\n", 1), [b"\xff\x00\r"]);
    }

    #[test]
    fn a_complete_line_does_not_wait_for_the_next() {
        let mut lines = Lines::new(Slow(b"one\ntw", 5));
        assert_eq!(lines.next_lines().expect("a line"), ["one"]);
        assert_eq!(lines.next_lines().expect("a line"), ["tw"]);
        assert!(lines.next_lines().expect("the end").is_empty());
    }

    #[test]
    fn an_endless_line_is_refused() {
        let error = Lines::new(std::io::repeat(b'x')).next_lines().expect_err("endless");
        assert!(error.to_string().starts_with("line 1 is longer"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_input_in_any_reads_gives_its_lines(input in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200), read in 1usize..20) {
            let mut expected: Vec<Vec<u8>> = input.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
            if expected.last().is_some_and(Vec::is_empty) {
                expected.pop();
            }
            prop_assert_eq!(all(&input, read), expected);
        }
    }
}
