//! `segment stats`: what a segment or partition is made of.
//!
//! Owns: counting, in one pass and bounded memory; distinct keys are counted exactly up to a bound and estimated beyond it
//! (HyperLogLog, Flajolet et al. 2007, with linear counting for small numbers). Refuses: rendering. Read next: `scan.rs`.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hasher};

use headwater_proto::batch::{BatchError, Records};
use serde::Serialize;

use super::scan::{FoundBatch, Item};
use super::{InspectError, Target, at};

/// What a target is made of.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// The path as given.
    pub path: String,
    /// Number of segments.
    pub segments: u64,
    /// Bytes of their `.log` files, reserved space included.
    pub file_bytes: u64,
    /// Bytes of whole batches.
    pub batch_bytes: u64,
    /// Bytes reserved behind the log's end.
    pub reserved_bytes: u64,
    /// Stretches of bytes that are no batch in its place.
    pub damaged: u64,
    /// Their bytes.
    pub damaged_bytes: u64,
    /// Number of batches.
    pub batches: u64,
    /// Batches of control records among them, which are counted nowhere below.
    pub control_batches: u64,
    /// Batches that compaction left empty.
    pub empty_batches: u64,
    /// Batches of transactions.
    pub transactional_batches: u64,
    /// Number of records.
    pub records: u64,
    /// Bytes of keys, values and headers, as producers gave them.
    pub record_bytes: u64,
    /// Records with no key.
    pub null_keys: u64,
    /// Records with no value: tombstones, where the log is compacted.
    pub null_values: u64,
    /// Offset of the first batch.
    pub first_offset: Option<i64>,
    /// Offset after the last batch.
    pub end_offset: Option<i64>,
    /// Distinct keys.
    pub keys: Cardinality,
    /// Distinct producer ids.
    pub producers: u64,
    /// By codec.
    pub codecs: BTreeMap<&'static str, CodecStats>,
    /// Record timestamps.
    pub timestamps: Timestamps,
    /// Offsets between the first and the end that no record has.
    pub gaps: Gaps,
    /// Records and bytes by time.
    pub rates: Rates,
    /// Sizes of batches, in bytes.
    pub batch_sizes: Histogram,
    /// Records in a batch.
    pub batch_records: Histogram,
    /// Sizes of records (key, value and headers), in bytes.
    pub record_sizes: Histogram,
}

/// Batches of one codec.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct CodecStats {
    /// Number of batches.
    pub batches: u64,
    /// Their records' bytes as they lie.
    pub bytes: u64,
    /// The same bytes decompressed.
    pub uncompressed_bytes: u64,
    /// Decompressed over compressed; 1 without compression.
    pub ratio: f64,
}

/// How many there are of something.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cardinality {
    /// The number.
    pub count: u64,
    /// Whether it is exact. An estimate is off by about 1 %.
    pub exact: bool,
}

/// Record timestamps, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timestamps {
    /// The smallest.
    pub min: Option<i64>,
    /// The largest.
    pub max: Option<i64>,
    /// Records older than one before them.
    pub out_of_order: u64,
    /// How much older at the most, in milliseconds.
    pub max_lateness_ms: i64,
    /// Records with no timestamp.
    pub missing: u64,
    /// Batches stamped by the producer.
    pub create_batches: u64,
    /// Batches stamped by the broker.
    pub append_batches: u64,
}

/// Offsets without a record.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Gaps {
    /// Number of stretches.
    pub count: u64,
    /// Offsets in them.
    pub offsets: u64,
    /// The longest stretch.
    pub longest: u64,
}

/// Over the span of record timestamps.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Rates {
    /// Records a second; `None` when all have one timestamp.
    pub records_per_s: Option<f64>,
    /// Bytes of log a second.
    pub bytes_per_s: Option<f64>,
}

/// How numbers are distributed: each bucket counts those from one power of two up to the next.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Histogram {
    /// The smallest.
    pub min: u64,
    /// The largest.
    pub max: u64,
    /// The mean.
    pub mean: f64,
    /// Buckets in rising order, from the first to the last that is not empty.
    pub buckets: Vec<Bucket>,
    /// By bucket: 0 holds the number 0, n those from 2^(n-1) on.
    #[serde(skip)]
    counts: BTreeMap<u32, u64>,
    #[serde(skip)]
    sum: u128,
}

/// Numbers from `from` to below `below`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// The smallest number that counts here.
    pub from: u64,
    /// The smallest that does not any more.
    pub below: u64,
    /// How many there are.
    pub count: u64,
}

/// Counts a target. `progress` is told of bytes as they are read.
pub fn stats(target: &Target, progress: &dyn Fn(u64)) -> Result<Stats, InspectError> {
    let mut counter = Counter::default();
    counter.stats.path = target.path().display().to_string();
    let epochs = target.leader_epochs();
    let mut previous = None;
    for segment in &target.segments {
        let Some(mut scanner) = target.scan(segment, epochs.clone(), previous)? else { continue };
        counter.stats.segments += 1;
        counter.stats.file_bytes += scanner.file_bytes();
        while let Some(item) = scanner.next().map_err(at(&segment.path))? {
            match item {
                Item::Batch(found) => {
                    progress(found.bytes.len() as u64);
                    counter.batch(&found);
                }
                Item::Damage(damage) => {
                    progress(damage.size);
                    counter.damage(damage.size);
                }
                Item::Tail(tail) => {
                    progress(tail.size);
                    counter.stats.reserved_bytes += tail.size;
                }
            }
        }
        previous = scanner.previous();
    }
    Ok(counter.finish())
}

#[derive(Default)]
struct Counter {
    stats: Stats,
    keys: Distinct,
    producers: HashSet<i64>,
    next_offset: Option<i64>,
    latest: i64,
}

impl Counter {
    fn damage(&mut self, size: u64) {
        self.stats.damaged += 1;
        self.stats.damaged_bytes += size;
    }

    fn batch(&mut self, found: &FoundBatch) {
        let header = &found.header;
        if let Err(_unreadable) = self.records(found) {
            self.damage(found.bytes.len() as u64);
            return;
        }
        let stats = &mut self.stats;
        stats.batches += 1;
        stats.batch_bytes += found.bytes.len() as u64;
        stats.first_offset.get_or_insert(header.base_offset);
        stats.end_offset = Some(header.next_offset());
        stats.batch_sizes.add(found.bytes.len() as u64);
        stats.transactional_batches += u64::from(header.is_transactional());
        match header.timestamp_type() {
            headwater_proto::batch::TimestampType::Create => stats.timestamps.create_batches += 1,
            headwater_proto::batch::TimestampType::LogAppend => stats.timestamps.append_batches += 1,
        }
        if header.is_control() {
            stats.control_batches += 1;
        } else {
            stats.empty_batches += u64::from(header.record_count == 0);
            stats.batch_records.add(header.record_count as u64);
        }
        if header.is_idempotent() {
            self.producers.insert(header.producer_id);
        }
    }

    /// Counts the records of a batch, once all of them could be read.
    fn records(&mut self, found: &FoundBatch) -> Result<(), BatchError> {
        let header = &found.header;
        let codec = header.codec()?;
        let records = Records::new(&found.bytes)?;
        let uncompressed = records.data_len() as u64;
        let records = records.collect::<Result<Vec<_>, _>>()?;
        let of_codec = self.stats.codecs.entry(codec.name()).or_default();
        of_codec.batches += 1;
        of_codec.bytes += (found.bytes.len() - headwater_proto::batch::HEADER_BYTES) as u64;
        of_codec.uncompressed_bytes += uncompressed;
        let mut next = self.next_offset.unwrap_or(header.base_offset);
        for record in &records {
            self.gap(record.offset - next);
            next = record.offset + 1;
        }
        self.gap(header.next_offset() - next);
        self.next_offset = Some(header.next_offset());
        if header.is_control() {
            return Ok(());
        }
        for record in &records {
            let stats = &mut self.stats;
            let length = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map_or(0, bytes::Bytes::len) as u64;
            let headers: u64 =
                record.headers.iter().map(|header| header.key.len() as u64 + length(&header.value)).sum();
            let size = length(&record.key) + length(&record.value) + headers;
            stats.records += 1;
            stats.record_bytes += size;
            stats.record_sizes.add(size);
            stats.null_values += u64::from(record.value.is_none());
            match &record.key {
                Some(key) => self.keys.add(key),
                None => stats.null_keys += 1,
            }
            if record.timestamp < 0 {
                stats.timestamps.missing += 1;
                continue;
            }
            stats.timestamps.min = Some(stats.timestamps.min.map_or(record.timestamp, |min| min.min(record.timestamp)));
            if stats.timestamps.max.is_some() && record.timestamp < self.latest {
                stats.timestamps.out_of_order += 1;
                stats.timestamps.max_lateness_ms = stats.timestamps.max_lateness_ms.max(self.latest - record.timestamp);
            }
            self.latest = self.latest.max(record.timestamp);
            stats.timestamps.max = Some(self.latest);
        }
        Ok(())
    }

    fn gap(&mut self, offsets: i64) {
        if let Ok(offsets @ 1..) = u64::try_from(offsets) {
            let gaps = &mut self.stats.gaps;
            gaps.count += 1;
            gaps.offsets += offsets;
            gaps.longest = gaps.longest.max(offsets);
        }
    }

    fn finish(mut self) -> Stats {
        let stats = &mut self.stats;
        stats.keys = self.keys.cardinality();
        stats.producers = self.producers.len() as u64;
        for codec in stats.codecs.values_mut() {
            codec.ratio = if codec.bytes == 0 { 1.0 } else { codec.uncompressed_bytes as f64 / codec.bytes as f64 };
        }
        if let (Some(min), Some(max)) = (stats.timestamps.min, stats.timestamps.max)
            && max > min
        {
            let seconds = (max - min) as f64 / 1000.0;
            stats.rates.records_per_s = Some(stats.records as f64 / seconds);
            stats.rates.bytes_per_s = Some(stats.batch_bytes as f64 / seconds);
        }
        for histogram in [&mut stats.batch_sizes, &mut stats.batch_records, &mut stats.record_sizes] {
            histogram.finish();
        }
        self.stats
    }
}

impl Histogram {
    fn add(&mut self, number: u64) {
        self.min = if self.counts.is_empty() { number } else { self.min.min(number) };
        self.max = self.max.max(number);
        self.sum += u128::from(number);
        *self.counts.entry(number.checked_ilog2().map_or(0, |log| log + 1)).or_default() += 1;
    }

    fn finish(&mut self) {
        let (Some((first, _)), Some((last, _))) = (self.counts.first_key_value(), self.counts.last_key_value()) else {
            return;
        };
        self.mean = self.sum as f64 / self.counts.values().sum::<u64>() as f64;
        let bucket = |index: u32| Bucket {
            from: index.checked_sub(1).map_or(0, |power| 1 << power),
            below: 1u64.checked_shl(index).unwrap_or(u64::MAX),
            count: self.counts.get(&index).copied().unwrap_or(0),
        };
        self.buckets = (*first..=*last).map(bucket).collect();
    }
}

/// Keys counted exactly up to this many; 8 bytes each.
const EXACT_KEYS: usize = 1 << 17;
/// 2^14 registers: a standard error of 0.8 %.
const REGISTER_BITS: u32 = 14;

/// Counts distinct byte strings by a 64-bit hash of each.
enum Distinct {
    Exact(HashSet<u64>),
    Sketch(Vec<u8>),
}

impl Default for Distinct {
    fn default() -> Self {
        Distinct::Exact(HashSet::new())
    }
}

impl Distinct {
    fn add(&mut self, key: &[u8]) {
        let mut hasher = DefaultHasher::new();
        hasher.write(key);
        let hash = hasher.finish();
        match self {
            Distinct::Exact(hashes) => {
                hashes.insert(hash);
                if hashes.len() > EXACT_KEYS {
                    let mut registers = vec![0; 1 << REGISTER_BITS];
                    hashes.iter().for_each(|hash| register(&mut registers, *hash));
                    *self = Distinct::Sketch(registers);
                }
            }
            Distinct::Sketch(registers) => register(registers, hash),
        }
    }

    fn cardinality(&self) -> Cardinality {
        let registers = match self {
            Distinct::Exact(hashes) => return Cardinality { count: hashes.len() as u64, exact: true },
            Distinct::Sketch(registers) => registers,
        };
        let size = registers.len() as f64;
        let sum: f64 = registers.iter().map(|rank| (-f64::from(*rank)).exp2()).sum();
        let estimate = 0.7213 / (1.0 + 1.079 / size) * size * size / sum;
        let unused = registers.iter().filter(|rank| **rank == 0).count();
        let count = if estimate <= 2.5 * size && unused > 0 { size * (size / unused as f64).ln() } else { estimate };
        Cardinality { count: count.round() as u64, exact: false }
    }
}

/// The first bits choose a register, which keeps the largest rank (1 + leading zeros) of the others.
fn register(registers: &mut [u8], hash: u64) {
    let rank = (hash << REGISTER_BITS | 1 << (REGISTER_BITS - 1)).leading_zeros() as u8 + 1;
    if let Some(register) = registers.get_mut((hash >> (64 - REGISTER_BITS)) as usize) {
        *register = (*register).max(rank);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_keys_are_exact_up_to_the_bound_and_close_beyond_it() {
        let mut keys = Distinct::default();
        let mut add = |from: u64, to: u64| {
            (from..to).chain(from..to).for_each(|key| keys.add(&key.to_be_bytes()));
            keys.cardinality()
        };
        let exact = add(0, 1000);
        assert_eq!((exact.count, exact.exact), (1000, true));
        let estimate = add(1000, 1_000_000);
        assert!(!estimate.exact);
        assert!((970_000..1_030_000).contains(&estimate.count), "{estimate:?}");
    }

    #[test]
    fn a_histogram_covers_everything_from_its_smallest_to_its_largest() {
        let mut histogram = Histogram::default();
        [0, 1, 2, 3, 9, u64::MAX].into_iter().for_each(|number| histogram.add(number));
        histogram.finish();
        assert_eq!((histogram.min, histogram.max), (0, u64::MAX));
        assert_eq!(histogram.buckets.iter().map(|bucket| bucket.count).sum::<u64>(), 6);
        assert_eq!(histogram.buckets[2], Bucket { from: 2, below: 4, count: 2 });
        assert!(histogram.buckets.windows(2).all(|pair| pair[0].below == pair[1].from));
    }
}
