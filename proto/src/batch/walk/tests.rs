//! What a walk refuses, with every codec.

use bytes::Bytes;

use super::super::{BatchBuilder, BuildOptions, Header, LENGTH_PREFIX_BYTES, Records, compression, rebuild};
use super::*;

const LOG: WalkRules =
    WalkRules { origin: Origin::Log, require_keys: false, max_decompressed_bytes: MAX_DECOMPRESSED_BATCH_BYTES };

/// A batch of which the middle record is larger than a piece, so that it is walked across pieces.
fn batch(options: BuildOptions) -> Bytes {
    let large: Vec<u8> = (0..200_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let headers = [Header { key: Bytes::from_static(b"header"), value: None }];
    let mut builder = BatchBuilder::new(options);
    builder.append(1_000, Some(b"a"), Some(b"small"), &headers);
    builder.append(3_000, Some(b"b"), Some(&large), &headers);
    builder.append(2_000, None, None, &[]);
    builder.append(3_000, Some(b""), Some(b""), &[]);
    builder.build().unwrap()
}

fn all_codecs(check: impl Fn(BuildOptions)) {
    for codec in Codec::ALL {
        check(BuildOptions { codec, ..BuildOptions::default() });
    }
}

/// The batch with another header and body, sealed again.
fn changed(batch: &Bytes, change: impl Fn(&mut BatchHeader, &mut Vec<u8>)) -> Bytes {
    let mut header = BatchHeader::parse(batch).unwrap();
    let codec = header.codec().unwrap();
    let mut records = compression::decompress(codec, &batch[HEADER_BYTES..], 1 << 20).unwrap();
    change(&mut header, &mut records);
    let mut body = Vec::new();
    compression::compress(codec, None, &records, &mut body).unwrap();
    header.batch_length = (HEADER_BYTES - LENGTH_PREFIX_BYTES + body.len()) as i32;
    Bytes::from([header.sealed(&body).encode().as_slice(), &body].concat())
}

#[test]
fn the_largest_timestamp_is_the_first_of_its_kind() {
    all_codecs(|options| {
        let walked = walk(&batch(options), WalkRules::default()).unwrap();
        assert_eq!((walked.max_timestamp, walked.offset_of_max_timestamp_delta), (3_000, 1));
    });
}

#[test]
fn the_smallest_timestamp_is_looked_for_in_every_record_and_may_be_missing() {
    all_codecs(|options| {
        for (timestamps, smallest) in
            [(&[5_000, 4_000, 6_000][..], Some(4_000)), (&[5_000, -1, 6_000], Some(5_000)), (&[-1, -1], None)]
        {
            let mut builder = BatchBuilder::new(options);
            for timestamp in timestamps {
                builder.append(*timestamp, None, Some(b"x"), &[]);
            }
            let walked = walk(&builder.build().unwrap(), WalkRules::default()).unwrap();
            assert_eq!(walked.min_timestamp, smallest);
        }
    });
}

#[test]
fn what_does_not_add_up_is_named() {
    all_codecs(|options| {
        let good = batch(options);
        let refused = |change: &dyn Fn(&mut BatchHeader, &mut Vec<u8>)| {
            walk(&changed(&good, change), WalkRules::default()).unwrap_err()
        };
        assert_eq!(
            refused(&|header, _| header.max_timestamp += 1),
            BatchError::MaxTimestamp { stored: 3_001, found: 3_000 }
        );
        assert_eq!(
            refused(&|header, _| header.base_timestamp = i64::MAX - 10),
            BatchError::Record { index: 1, fault: RecordFault::Timestamp(2_000) }
        );
        assert_eq!(
            refused(&|header, _| header.base_timestamp = -2),
            BatchError::Record { index: 0, fault: RecordFault::Timestamp(0) }
        );
        assert_eq!(refused(&|_, records| records.push(0)), BatchError::TrailingBytes { record_count: 4 });
        assert_eq!(
            refused(&|_, records| records.truncate(records.len() - 1)),
            BatchError::Record { index: 3, fault: RecordFault::Truncated }
        );
        assert_eq!(
            refused(&|header, _| (header.record_count, header.last_offset_delta) = (5, 4)),
            BatchError::Record { index: 4, fault: RecordFault::Truncated }
        );
        assert_eq!(
            refused(&|header, _| (header.record_count, header.last_offset_delta) = (3, 2)),
            BatchError::TrailingBytes { record_count: 3 }
        );
        assert_eq!(
            refused(&|header, _| header.record_count = 3),
            BatchError::Counts { record_count: 3, last_offset_delta: 3 }
        );
        // Byte 3 of the first record is its offset delta.
        assert_eq!(
            refused(&|_, records| records[3] = 2),
            BatchError::Record { index: 0, fault: RecordFault::OffsetDelta { expected: 0, found: 1 } }
        );
        // Byte 0 is its length: one byte less, and its fields no longer fit.
        assert_eq!(refused(&|_, records| records[0] -= 2), BatchError::Record { index: 0, fault: RecordFault::Length });
        assert_eq!(refused(&|_, records| records[0] = 1), BatchError::Record { index: 0, fault: RecordFault::Length });
    });
}

#[test]
fn keys_are_asked_for_where_the_topic_is_compacted() {
    all_codecs(|options| {
        let refused = walk(&batch(options), WalkRules { require_keys: true, ..WalkRules::default() }).unwrap_err();
        assert_eq!(refused, BatchError::Record { index: 2, fault: RecordFault::MissingKey });
        assert_eq!(refused.code(), crate::ErrorCode::InvalidRecord);
    });
}

#[test]
fn what_only_a_log_may_hold_is_refused_from_a_producer() {
    all_codecs(|options| {
        let good = batch(options);
        let header = BatchHeader::parse(&good).unwrap();
        let records: Vec<_> = Records::new(&good).unwrap().map(Result::unwrap).collect();
        for only_log in [
            batch(BuildOptions { control: true, ..options }),
            batch(BuildOptions { transactional: true, ..options }),
            changed(&good, |header, _| *header = header.with_log_append_time(5_000, &[])),
            changed(&good, |header, _| header.attributes |= 1 << 7),
            changed(&good, |header, _| header.producer_id = 7),
            rebuild(&header, &records, Some(9_000)).unwrap(),
            rebuild(&header, &[], None).unwrap(),
        ] {
            let refused = walk(&only_log, WalkRules::default()).unwrap_err();
            assert!(matches!(refused, BatchError::NotForProducers(_)), "{refused}");
            assert_eq!(walk(&only_log, LOG).map(|walked| walked.header), check(&only_log));
        }
        let thinned_out = rebuild(&header, &records[1..3], None).unwrap();
        assert!(matches!(walk(&thinned_out, WalkRules::default()), Err(BatchError::Counts { .. })));
        assert!(walk(&thinned_out, LOG).is_ok());
    });
}

#[test]
fn a_walk_stops_at_the_limit_of_decompressed_bytes() {
    all_codecs(|options| {
        let batch = batch(options);
        let walked = walk(&batch, WalkRules { max_decompressed_bytes: 150_000, ..WalkRules::default() });
        match options.codec {
            Codec::None => assert!(walked.is_ok(), "nothing is decompressed"),
            _ => assert_eq!(walked, Err(BatchError::TooLarge { limit: 150_000 })),
        }
    });
}
