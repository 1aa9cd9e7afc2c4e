//! Where the model's decisions come from: a seed, or the bytes of a fuzzer.

/// Answers every question that a random test asks.
#[allow(dead_code)] // the fuzz target has bytes only
pub(crate) enum Choices<'a> {
    /// A stream of numbers that follows from its seed (SplitMix64).
    Seed(u64),
    /// What a fuzzer made up; zeros at its end.
    Bytes(&'a [u8]),
}

impl Choices<'_> {
    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A number in `from..=to`.
    pub(crate) fn between(&mut self, from: i64, to: i64) -> i64 {
        from + (self.next() % ((to - from).max(0) as u64 + 1)) as i64
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// One of these.
    pub(crate) fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Whether nothing more comes.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Choices::Bytes([]))
    }

    fn next(&mut self) -> u64 {
        match self {
            Choices::Seed(state) => {
                *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                z ^ (z >> 31)
            }
            Choices::Bytes(bytes) => {
                let (taken, rest) = bytes.split_at(bytes.len().min(2));
                *bytes = rest;
                taken.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
            }
        }
    }
}
