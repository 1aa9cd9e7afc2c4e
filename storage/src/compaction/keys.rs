//! The last offset of each key, in a fixed amount of memory.
//!
//! Owns: an open-addressed table of 128-bit key hashes, 24 bytes a slot (as Kafka's cleaner has it, which hashes with MD5). Refuses:
//! more keys than it has room for: whoever fills it stops there, and goes on another time. Read next: `clean.rs`.

use std::hash::{DefaultHasher, Hasher};

/// Bytes of a slot.
const SLOT_BYTES: usize = 24;

#[derive(Debug, Clone, Copy)]
struct Slot {
    hash: [u64; 2],
    /// -1 where the slot is free.
    offset: i64,
}

/// Where the last value of each key is.
#[derive(Debug)]
pub(super) struct LastOffsets {
    slots: Vec<Slot>,
    used: usize,
    most: usize,
}

impl LastOffsets {
    /// A table of at most `memory_bytes`, and no larger than `keys` keys need.
    pub(super) fn new(memory_bytes: usize, keys: u64) -> LastOffsets {
        // Nine slots of ten are filled at most; one is always free, so that a search ends.
        let wanted = usize::try_from(keys.saturating_mul(10) / 9).unwrap_or(usize::MAX).saturating_add(2);
        let slots = (memory_bytes / SLOT_BYTES).min(wanted).max(2);
        LastOffsets {
            slots: vec![Slot { hash: [0; 2], offset: -1 }; slots],
            used: 0,
            most: (slots * 9 / 10).clamp(1, slots - 1),
        }
    }

    /// Notes that a key has a value at `offset`, which is larger than any before. False if there is no room for another key.
    pub(super) fn put(&mut self, key: &[u8], offset: i64) -> bool {
        let hash = hash(key);
        let full = self.used == self.most;
        let Some(slot) = find(&mut self.slots, hash) else { return false };
        if slot.offset < 0 {
            if full {
                return false;
            }
            self.used += 1;
        }
        *slot = Slot { hash, offset };
        true
    }

    /// The last offset of a key, if any value of it was noted.
    pub(super) fn get(&mut self, key: &[u8]) -> Option<i64> {
        find(&mut self.slots, hash(key)).map(|slot| slot.offset).filter(|offset| *offset >= 0)
    }
}

/// The slot of a hash, or the free one where it belongs.
fn find(slots: &mut [Slot], hash: [u64; 2]) -> Option<&mut Slot> {
    let [first, _] = hash;
    let start = (first % slots.len().max(1) as u64) as usize;
    let (before, from) = slots.split_at_mut(start);
    from.iter_mut().chain(before).find(|slot| slot.offset < 0 || slot.hash == hash)
}

/// Two independent 64-bit hashes: with a billion keys, the chance that any two share both is below 2^-69.
fn hash(key: &[u8]) -> [u64; 2] {
    [0u8, 1].map(|domain| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u8(domain);
        hasher.write(key);
        hasher.finish()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_offset_of_each_key_is_kept_up_to_the_bound() {
        let mut offsets = LastOffsets::new(usize::MAX, 1000);
        for round in 0..3i64 {
            for key in 0..1000i64 {
                assert!(offsets.put(&key.to_be_bytes(), round * 1000 + key));
            }
        }
        for key in 0..1000i64 {
            assert_eq!(offsets.get(&key.to_be_bytes()), Some(2000 + key));
        }
        assert_eq!(offsets.get(b"another"), None);
    }

    #[test]
    fn a_full_table_takes_known_keys_only() {
        let mut offsets = LastOffsets::new(10 * SLOT_BYTES, u64::MAX);
        let taken = (0..20i64).filter(|key| offsets.put(&key.to_be_bytes(), *key)).count();
        assert_eq!(taken, 9);
        assert!(offsets.put(&0i64.to_be_bytes(), 30));
        assert_eq!(offsets.get(&0i64.to_be_bytes()), Some(30));
        assert_eq!(offsets.get(&19i64.to_be_bytes()), None);
        let mut smallest = LastOffsets::new(0, 0);
        assert!(smallest.put(b"a", 1) && !smallest.put(b"b", 2));
    }
}
