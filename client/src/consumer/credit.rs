//! Byte credit of one fetch stream, and putting its bytes together again.
//!
//! Owns: how many bytes a broker may send ([`FetchCredit`]) and finding batches in what it sent ([`Assembler`]), both pure.
//! Refuses: streams. Read next: [`super::fetch`], which drives them.
//!
//! What must always hold: credit is granted below the limit only, so credit outstanding is at most the (highest) limit, and
//! with the complete batches that the application has not taken at most that and one batch more (the one that was being put
//! together). So memory is bounded, whatever is read or not read, and a batch of any size arrives.

use bytes::{BufMut, Bytes, BytesMut};
use headwater_proto::batch::{HEADER_BYTES, LENGTH_PREFIX_BYTES};
use headwater_proto::limits::MAX_BATCH_BYTES;

/// What a broker may send on one stream.
#[derive(Debug)]
pub(crate) struct FetchCredit {
    limit: u64,
    /// Granted, and not arrived.
    outstanding: u64,
    /// Complete batches, not taken by the application.
    held: u64,
}

impl FetchCredit {
    pub(crate) fn new(limit: u64) -> FetchCredit {
        FetchCredit { limit: limit.max(1), outstanding: 0, held: 0 }
    }

    /// Another limit. What was granted stays granted: below it nothing more is, until enough was taken.
    pub(crate) fn set_limit(&mut self, limit: u64) {
        self.limit = limit.max(1);
    }

    /// The stream is gone, and with it the credit outstanding.
    pub(crate) fn reopened(&mut self) {
        self.outstanding = 0;
    }

    /// Granted, and not arrived.
    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// What counts against the limit.
    pub(crate) fn used(&self) -> u64 {
        self.outstanding + self.held
    }

    /// How much to grant now. 0 where so little became free that it is not worth a frame.
    pub(crate) fn grant(&mut self) -> u64 {
        let room = self.limit.saturating_sub(self.outstanding).saturating_sub(self.held);
        if room == 0 || room < self.limit / 4 && self.outstanding > 0 {
            return 0;
        }
        self.outstanding += room;
        room
    }

    /// `bytes` arrived. `false`: more than was granted.
    #[must_use]
    pub(crate) fn received(&mut self, bytes: u64) -> bool {
        match self.outstanding.checked_sub(bytes) {
            Some(left) => {
                self.outstanding = left;
                true
            }
            None => false,
        }
    }

    /// `bytes` of what arrived are now complete batches that wait for the application.
    pub(crate) fn complete(&mut self, bytes: u64) {
        self.held += bytes;
    }

    /// The application took `bytes`.
    pub(crate) fn released(&mut self, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
    }
}

/// Finds record batches in a stream of bytes. Copies them once, into memory of their own.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// The beginning of a batch, up to its length.
    prefix: BytesMut,
    batch: BytesMut,
    /// 0: not known yet.
    size: usize,
}

/// A length that no batch has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a batch of {0} bytes")]
pub(crate) struct SenselessLength(i64);

impl Assembler {
    /// The next complete batch in `part`, from which its bytes are taken; `None` once all of `part` is taken.
    pub(crate) fn next(&mut self, part: &mut Bytes) -> Result<Option<Bytes>, SenselessLength> {
        if self.size == 0 {
            let missing = LENGTH_PREFIX_BYTES - self.prefix.len();
            self.prefix.put(part.split_to(missing.min(part.len())));
            if self.prefix.len() < LENGTH_PREFIX_BYTES {
                return Ok(None);
            }
            let length = self.prefix.iter().skip(LENGTH_PREFIX_BYTES - 4).fold(0i64, |n, b| n << 8 | i64::from(*b));
            let size = length + LENGTH_PREFIX_BYTES as i64;
            match usize::try_from(size) {
                Ok(size @ HEADER_BYTES..=MAX_BATCH_BYTES) => self.size = size,
                _ => return Err(SenselessLength(size)),
            }
            self.batch = BytesMut::with_capacity(self.size);
            self.batch.put(self.prefix.split());
        }
        let missing = self.size - self.batch.len();
        self.batch.put(part.split_to(missing.min(part.len())));
        if self.batch.len() < self.size {
            return Ok(None);
        }
        self.size = 0;
        Ok(Some(std::mem::take(&mut self.batch).freeze()))
    }

    /// Whether no batch is half here.
    pub(crate) fn is_at_boundary(&self) -> bool {
        self.size == 0 && self.prefix.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_proto::batch::{BatchBuilder, BuildOptions};
    use proptest::prelude::*;

    fn batches(sizes: &[usize]) -> Vec<Bytes> {
        let build = |n: &usize| {
            let mut builder = BatchBuilder::new(BuildOptions::default());
            builder.append(0, None, Some(&vec![1; *n]), &[]);
            builder.build().unwrap()
        };
        sizes.iter().map(build).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn batches_come_back_however_their_bytes_are_cut(
            sizes in proptest::collection::vec(0usize..3000, 1..10),
            cuts in proptest::collection::vec(1usize..900, 1..50),
        ) {
            let batches = batches(&sizes);
            let mut all = Bytes::from(batches.concat());
            let mut found = Vec::new();
            let mut assembler = Assembler::default();
            let mut cuts = cuts.iter().cycle();
            while !all.is_empty() {
                let mut part = all.split_to((*cuts.next().unwrap()).min(all.len()));
                while let Some(batch) = assembler.next(&mut part).unwrap() { found.push(batch) }
                prop_assert!(part.is_empty());
            }
            prop_assert!(assembler.is_at_boundary());
            prop_assert_eq!(found, batches);
        }

        #[test]
        fn memory_stays_bounded_and_every_batch_arrives(
            sizes in proptest::collection::vec(1u64..3000, 1..40),
            limit in 1u64..2000,
            takes in proptest::collection::vec(0usize..3, 1..400),
        ) {
            let mut credit = FetchCredit::new(limit);
            let largest = sizes.iter().copied().max().unwrap_or(0);
            let mut to_send: std::collections::VecDeque<u64> = sizes.iter().copied().collect();
            let mut partial = 0;
            let mut queue = std::collections::VecDeque::new();
            let mut granted = 0;
            let mut takes = takes.into_iter().cycle();
            for _ in 0..100_000 {
                granted += credit.grant();
                prop_assert!(credit.outstanding <= limit, "{credit:?}");
                prop_assert!(credit.outstanding + credit.held <= limit + largest, "{credit:?}");
                // The broker sends what it may, in pieces.
                if let Some(size) = to_send.front().copied() && granted > 0 {
                    let piece = granted.min(size - partial).min(700);
                    prop_assert!(credit.received(piece));
                    (granted, partial) = (granted - piece, partial + piece);
                    if partial == size {
                        credit.complete(size);
                        queue.push_back(size);
                        to_send.pop_front();
                        partial = 0;
                    }
                }
                for _ in 0..takes.next().unwrap_or(1).max(usize::from(granted == 0)) {
                    if let Some(size) = queue.pop_front() { credit.released(size) }
                }
                if to_send.is_empty() { break }
            }
            prop_assert!(to_send.is_empty(), "stuck: {credit:?}");
        }
    }

    #[test]
    fn an_application_that_takes_nothing_gets_no_further_credit() {
        let mut credit = FetchCredit::new(1000);
        assert_eq!(credit.grant(), 1000);
        assert!(credit.received(1000));
        credit.complete(1000);
        assert_eq!(credit.grant(), 0);
        credit.released(100);
        assert_eq!(credit.grant(), 100, "nothing is on its way, so any room is worth a frame");
        assert!(!credit.received(101), "more than was granted");
    }

    #[test]
    fn lengths_that_no_batch_has_are_refused_before_memory_is_taken() {
        for length in [0i32, 48, -1, i32::MAX] {
            let mut bytes = vec![0; 8];
            bytes.extend_from_slice(&length.to_be_bytes());
            assert!(Assembler::default().next(&mut bytes.into()).is_err(), "{length}");
        }
    }
}
