//! The values that benchmarks send: text of words, about as compressible as logs are.

use bytes::{BufMut, Bytes, BytesMut};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::args::NUMBER_BYTES;

/// Bytes of text that values are cut from: more than caches near a core hold.
const TEXT_BYTES: usize = 8 << 20;
/// Distance of one value's beginning from the next; prime, so that values differ for long.
const STRIDE: u64 = 7_919;

/// Values of one size.
#[derive(Clone)]
pub(super) struct Values {
    text: Bytes,
    size: usize,
    numbered: bool,
}

impl Values {
    /// Values of `size` bytes, the same in every run.
    pub(super) fn new(size: usize) -> Values {
        let mut random = StdRng::seed_from_u64(1);
        let words: Vec<String> = (0..4096)
            .map(|_| {
                let letters = random.random_range(2..12);
                (0..letters).map(|_| char::from(random.random_range(b'a'..=b'z'))).collect()
            })
            .collect();
        let mut text = Vec::with_capacity(TEXT_BYTES + size);
        while text.len() < TEXT_BYTES + size {
            // Few words are frequent, as in any text.
            let pick = random.random::<f64>();
            let index = (pick * pick * pick * words.len() as f64) as usize;
            text.extend_from_slice(words.get(index).map_or(b"x", |word| word.as_bytes()));
            text.push(b' ');
        }
        Values { text: text.into(), size, numbered: false }
    }

    /// Values that begin with the record's number (big-endian); `size` is at least [`NUMBER_BYTES`].
    pub(super) fn numbered(size: usize) -> Values {
        Values { numbered: true, ..Values::new(size) }
    }

    /// The value of a record.
    pub(super) fn get(&self, number: u64) -> Bytes {
        let begin = (number.wrapping_mul(STRIDE) % TEXT_BYTES as u64) as usize;
        let text = self.text.slice(begin..begin + self.size);
        if !self.numbered {
            return text;
        }
        let mut value = BytesMut::with_capacity(self.size);
        value.put_u64(number);
        value.put_slice(text.get(NUMBER_BYTES..).unwrap_or_default());
        value.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::Values;

    #[test]
    fn values_have_their_size_and_differ() {
        let values = Values::new(100);
        assert_eq!(values.get(0).len(), 100);
        assert_ne!(values.get(0), values.get(1));
        assert_eq!(values.get(u64::MAX).len(), 100);
        assert_eq!(Values::new(100).get(7), values.get(7), "the same in every run");
        let numbered = Values::numbered(100).get(258);
        assert_eq!((numbered.len(), &numbered[..8]), (100, &[0, 0, 0, 0, 0, 0, 1, 2][..]));
    }
}
