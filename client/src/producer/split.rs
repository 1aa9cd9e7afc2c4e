//! Batches that are too large, as several.
//!
//! Owns: [`split`], pure. Refuses: sequences ([`super::window`]) and telling the records' senders ([`super::delivery`]).

use bytes::Bytes;
use headwater_proto::batch::{BatchBuilder, BatchError, BuildOptions, Codec, HEADER_BYTES, Records};

/// Some of a batch's records, as a batch of nobody's.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) bytes: Bytes,
    pub(crate) records: i32,
    /// Bytes of the buffer that the records take.
    pub(crate) charge: usize,
}

/// The size up to which several records share a batch, before compression: compressed, it must not outgrow
/// `max_message_bytes` even where its bytes do not compress.
pub(crate) fn fill_limit(codec: Codec, max_message_bytes: usize) -> usize {
    match codec {
        Codec::None => max_message_bytes,
        _ => max_message_bytes - max_message_bytes / 16,
    }
}

/// The records of `batch`, in order, in batches that `max_message_bytes` allows, unless one record alone is larger; where
/// `halve`, in two at least.
///
/// # Errors
/// When the batch cannot be read, or its records cannot be compressed again.
pub(crate) fn split(
    batch: &Bytes,
    max_message_bytes: usize,
    halve: bool,
    compression_level: Option<i32>,
) -> Result<Vec<Part>, BatchError> {
    let records = Records::new(batch)?;
    let codec = records.header().codec()?;
    let half = HEADER_BYTES + records.data_len().div_ceil(2);
    let limit = fill_limit(codec, max_message_bytes).min(if halve { half } else { usize::MAX });
    let options = BuildOptions { codec, compression_level, ..BuildOptions::default() };
    let mut parts = Vec::new();
    let mut complete = |builder: BatchBuilder, charge| {
        let records = i32::try_from(builder.record_count()).unwrap_or(i32::MAX);
        let bytes = builder.build()?;
        if bytes.len() > max_message_bytes && records > 1 {
            // What does not compress may even grow.
            parts.extend(split(&bytes, max_message_bytes, true, compression_level)?);
        } else {
            parts.push(Part { bytes, records, charge });
        }
        Ok::<(), BatchError>(())
    };
    let (mut builder, mut charge) = (BatchBuilder::new(options), 0);
    for record in records {
        let record = record?;
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        let bound = BatchBuilder::record_bound(key, value, &record.headers);
        if !builder.is_empty() && builder.size_estimate() + bound > limit {
            let full = std::mem::replace(&mut builder, BatchBuilder::new(options));
            complete(full, std::mem::take(&mut charge))?;
        }
        builder.append(record.timestamp, key, value, &record.headers);
        charge += bound;
    }
    complete(builder, charge)?;
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_proto::batch::{Header, WalkRules, walk};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_same_records_stand_in_batches_that_are_allowed(
            sizes in proptest::collection::vec(0usize..400, 1..100),
            max_message_bytes in 80usize..2000,
            halve in any::<bool>(),
            codec in proptest::sample::select(Codec::ALL.to_vec()),
        ) {
            let mut builder = BatchBuilder::new(BuildOptions { codec, ..BuildOptions::default() });
            let mut charge = 0;
            for (i, size) in sizes.iter().enumerate() {
                let (key, value) = ([i as u8], vec![i as u8; *size]);
                let headers = [Header { key: Bytes::from_static(b"h"), value: None }];
                builder.append(1000 - i as i64, Some(&key), Some(&value), &headers);
                charge += BatchBuilder::record_bound(Some(&key), Some(&value), &headers);
            }
            let batch = builder.build().unwrap();
            let contents = |batch: &Bytes| -> Vec<_> {
                let records = Records::new(batch).unwrap().map(Result::unwrap);
                records.map(|r| (r.timestamp, r.key, r.value, r.headers)).collect()
            };
            let parts = split(&batch, max_message_bytes, halve, None).unwrap();
            for part in &parts {
                walk(&part.bytes, WalkRules::default()).unwrap();
                prop_assert!(part.bytes.len() <= max_message_bytes || part.records == 1);
                prop_assert_eq!(part.records as usize, contents(&part.bytes).len());
            }
            prop_assert!(!halve || sizes.len() == 1 || parts.len() > 1);
            prop_assert_eq!(parts.iter().map(|p| p.charge).sum::<usize>(), charge);
            prop_assert_eq!(parts.iter().flat_map(|p| contents(&p.bytes)).collect::<Vec<_>>(), contents(&batch));
        }
    }
}
