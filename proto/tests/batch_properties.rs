//! Batches of any records come back, whatever the codec; batches of any bytes are refused by name.
//!
//! `PROPTEST_CASES` raises the number of cases.

use bytes::Bytes;
use headwater_proto::batch::{
    self, BatchBuilder, BatchError, BatchHeader, Batches, BuildOptions, Codec, HEADER_BYTES, Header, Origin, Record,
    Records, TimestampType, Walk, WalkRules, compression, rebuild, walk,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};

const LIMIT: usize = 1 << 20;
const LOG: WalkRules = WalkRules { origin: Origin::Log, require_keys: false, max_decompressed_bytes: LIMIT };

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

fn codec() -> impl Strategy<Value = Codec> {
    select(Codec::ALL.to_vec())
}

fn bytes(longest: usize) -> impl Strategy<Value = Bytes> {
    prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..64),
        1 => prop::collection::vec(any::<u8>(), 0..longest),
        1 => (any::<u8>(), 0..longest).prop_map(|(byte, length)| vec![byte; length]),
    ]
    .prop_map(Bytes::from)
}

fn nullable(longest: usize) -> impl Strategy<Value = Option<Bytes>> {
    prop::option::weighted(0.8, bytes(longest))
}

fn record() -> impl Strategy<Value = Record> {
    let timestamp = prop_oneof![Just(-1_i64), 0..2_000_000_000_000_i64, 1_700_000_000_000..1_700_000_001_000_i64];
    let header = (bytes(100), nullable(100)).prop_map(|(key, value)| Header { key, value });
    let headers = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(header, 0..4)];
    (timestamp, nullable(200), nullable(90_000), headers).prop_map(|(timestamp, key, value, headers)| Record {
        offset: 0,
        timestamp,
        key,
        value,
        headers,
    })
}

fn options() -> impl Strategy<Value = BuildOptions> {
    let producer = prop_oneof![Just((-1, -1, -1)), (0..i64::MAX, 0..i16::MAX, 0..=i32::MAX)];
    (codec(), 0..1_i64 << 62, producer, -1..i32::MAX).prop_map(|(codec, base_offset, producer, leader_epoch)| {
        let (producer_id, producer_epoch, base_sequence) = producer;
        BuildOptions {
            codec,
            base_offset,
            producer_id,
            producer_epoch,
            base_sequence,
            leader_epoch,
            ..BuildOptions::default()
        }
    })
}

fn build(options: BuildOptions, records: &mut [Record]) -> Bytes {
    let mut builder = BatchBuilder::new(options);
    for record in records {
        let delta = builder.append(record.timestamp, record.key.as_deref(), record.value.as_deref(), &record.headers);
        record.offset = options.base_offset + i64::from(delta);
    }
    builder.build().unwrap()
}

/// A batch of small records, as raw material for damage.
fn small_batch() -> impl Strategy<Value = Bytes> {
    let record = (0..1_000_i64, nullable(20), nullable(200)).prop_map(|(timestamp, key, value)| Record {
        offset: 0,
        timestamp,
        key,
        value,
        headers: vec![Header { key: Bytes::from_static(b"header"), value: Some(Bytes::from_static(b"value")) }],
    });
    (codec(), prop::collection::vec(record, 1..20))
        .prop_map(|(codec, mut records)| build(BuildOptions { codec, ..BuildOptions::default() }, &mut records))
}

/// The batch with its length and checksum made right again, so that damage reaches what lies behind them.
fn mended(batch: &[u8]) -> Option<Bytes> {
    let mut batch = batch.to_vec();
    let length = i32::try_from(batch.len().checked_sub(12)?).ok()?;
    batch.get_mut(8..12)?.copy_from_slice(&length.to_be_bytes());
    let crc = batch::crc(&batch);
    batch.get_mut(17..21)?.copy_from_slice(&crc.to_be_bytes());
    Some(batch.into())
}

fn all_records(batch: &Bytes) -> Result<Vec<Record>, BatchError> {
    Records::with_limit(batch, LIMIT)?.collect()
}

/// Reads the batch in every way there is. A walk and the reader must be of one mind about it.
fn read_every_way(batch: &Bytes) {
    let _ = Batches::new(batch).count();
    let records = all_records(batch);
    let walked = walk(batch, LOG);
    let _ = walk(batch, WalkRules { origin: Origin::Producer, require_keys: true, ..LOG });
    match (&walked, &records) {
        (Ok(Walk { header, max_timestamp, .. }), Ok(records)) => {
            assert_eq!(records.len(), header.record_count as usize);
            if let Some(largest) = records.iter().map(|record| record.timestamp).max() {
                // A walk, like Kafka's writer, counts up from -1.
                assert_eq!(largest.max(-1), (*max_timestamp).max(-1));
            }
            let _ = rebuild(header, records, None).unwrap();
        }
        (Ok(_), Err(error)) => panic!("walked, but cannot be read: {error}"),
        (Err(BatchError::MaxTimestamp { .. } | BatchError::Crc { .. }), Ok(_)) | (Err(_), Err(_)) => {}
        // The reader does not sum up timestamps that the broker replaced.
        (Err(BatchError::Record { fault: batch::RecordFault::Timestamp(_), .. }), Ok(_)) => {}
        (Err(error), Ok(_)) => panic!("can be read, but not walked: {error}"),
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn records_come_back(options in options(), mut records in prop::collection::vec(record(), 1..12)) {
        let batch = build(options, &mut records);
        let header = batch::check(&batch).unwrap();
        let largest = records.iter().map(|record| record.timestamp).max().unwrap();
        prop_assert_eq!(all_records(&batch).unwrap(), records.clone());
        prop_assert_eq!(header.codec(), Ok(options.codec));
        prop_assert_eq!(header.next_offset(), options.base_offset + records.len() as i64);
        prop_assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence),
            (options.producer_id, options.producer_epoch, options.base_sequence));
        prop_assert_eq!(header.max_timestamp, largest);

        let walked = walk(&batch, WalkRules::default()).unwrap();
        prop_assert_eq!(walked.max_timestamp, largest);
        prop_assert_eq!(records[walked.offset_of_max_timestamp_delta as usize].timestamp, largest);
        let own = records.iter().map(|record| record.timestamp).filter(|timestamp| *timestamp != -1);
        prop_assert_eq!(walked.min_timestamp, own.min());
        let keyed = records.iter().all(|record| record.key.is_some());
        prop_assert_eq!(walk(&batch, WalkRules { require_keys: true, ..WalkRules::default() }).is_ok(), keyed);

        let rebuilt = rebuild(&header, &records, None).unwrap();
        prop_assert_eq!(rebuilt, batch);
    }

    #[test]
    fn kept_records_come_back(options in options(), mut records in prop::collection::vec(record(), 1..12),
        keep in prop::collection::vec(any::<bool>(), 12), horizon in prop::option::of(0..i64::MAX / 2)) {
        let batch = build(options, &mut records);
        let mut keep = keep.into_iter();
        records.retain(|_| keep.next().unwrap());
        let rebuilt = rebuild(&batch::check(&batch).unwrap(), &records, horizon).unwrap();
        prop_assert_eq!(all_records(&rebuilt).unwrap(), records);
        let walked = walk(&rebuilt, WalkRules { origin: Origin::Log, ..WalkRules::default() });
        prop_assert!(walked.is_ok(), "{:?}", walked);
    }

    #[test]
    fn append_time_takes_the_place_of_every_timestamp(options in options(), ms in 0..i64::MAX,
        mut records in prop::collection::vec(record(), 1..5)) {
        let batch = build(options, &mut records);
        let body = &batch[HEADER_BYTES..];
        let stamped = batch::check(&batch).unwrap().with_log_append_time(ms, body);
        let batch = Bytes::from([stamped.encode().as_slice(), body].concat());
        prop_assert_eq!(batch::check(&batch), Ok(stamped));
        prop_assert_eq!(stamped.timestamp_type(), TimestampType::LogAppend);
        prop_assert!(all_records(&batch).unwrap().iter().all(|record| record.timestamp == ms));
    }

    #[test]
    fn damage_under_the_checksum_is_refused(batch in small_batch(), at in any::<Index>(), with in 1..=255_u8) {
        let mut damaged = batch.to_vec();
        let at = 17 + at.index(batch.len() - 17);
        damaged[at] ^= with;
        let computed = batch::crc(&damaged);
        let refused = batch::check(&damaged);
        prop_assert!(matches!(refused, Err(BatchError::Crc { .. } | BatchError::Counts { .. } | BatchError::Offsets { .. })),
            "{:?} with checksum {:#x}", refused, computed);
    }

    #[test]
    fn damaged_batches_never_panic(batch in small_batch(),
        damage in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4), cut in prop::option::of(any::<Index>())) {
        let mut damaged = batch.to_vec();
        for (at, byte) in damage {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        if let Some(cut) = cut {
            damaged.truncate(cut.index(batch.len()));
        }
        if let Some(mended) = mended(&damaged) {
            read_every_way(&mended);
        }
        read_every_way(&damaged.into());
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        read_every_way(&Bytes::from(bytes.clone()));
        for codec in Codec::ALL {
            let _ = compression::decompress(codec, &bytes, LIMIT);
        }
    }

    #[test]
    fn any_records_behind_a_good_header_never_panic(codec in codec(), squeeze in any::<bool>(), attributes in 0..128_i16,
        count in 0..100_i32, last in 0..100_i32, base_timestamp in any::<i64>(),
        body in prop::collection::vec(prop_oneof![0..20_u8, any::<u8>()], 0..400)) {
        let mut packed = Vec::new();
        if squeeze {
            compression::compress(codec, None, &body, &mut packed).unwrap();
        } else {
            packed = body;
        }
        let header = BatchHeader {
            base_offset: 7, batch_length: 0, leader_epoch: 0, magic: 2, crc: 0, attributes: attributes & !7 | codec.number(),
            last_offset_delta: last, base_timestamp, max_timestamp: base_timestamp, producer_id: -1, producer_epoch: -1,
            base_sequence: -1, record_count: count,
        };
        let batch = mended(&[header.encode().as_slice(), &packed].concat()).unwrap();
        read_every_way(&batch);
    }

    #[test]
    fn compressed_bytes_come_back(codec in codec(), level in prop::option::of(-10..30_i32), data in bytes(300_000)) {
        let mut packed = vec![1, 2, 3];
        compression::compress(codec, level, &data, &mut packed).unwrap();
        prop_assert_eq!(&packed[..3], &[1, 2, 3]);
        prop_assert_eq!(compression::decompress(codec, &packed[3..], data.len()).unwrap(), data.to_vec());
        if let Some(smaller) = data.len().checked_sub(1) {
            prop_assert_eq!(compression::decompress(codec, &packed[3..], smaller), Err(BatchError::TooLarge { limit: smaller }));
        }
    }
}
