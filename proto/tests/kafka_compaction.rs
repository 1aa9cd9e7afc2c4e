//! What `rebuild` leaves of a batch, compared with what Kafka's own compaction leaves of the same batch
//! (`tests/fixtures/kafka-compaction`: every combination of kept values, kept tombstones, emptied batches, horizons old and
//! new, timestamp types, producers and the ends of transactions).

use std::path::Path;

use bytes::Bytes;
use headwater_proto::batch::{self, BatchHeader, Codec, HEADER_BYTES, Record, Records, compression, rebuild};

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    before: String,
    kept: Vec<i64>,
    new_horizon_ms: i64,
    after: String,
}

fn bytes(hex: &str) -> Bytes {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    hex.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

#[test]
fn compaction_leaves_kafkas_bytes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-compaction/compacted.jsonl");
    let mut compared = 0;
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let case: Case = serde_json::from_str(line).unwrap();
        let (before, after) = (bytes(&case.before), bytes(&case.after));
        let header = batch::check(&before).unwrap();
        let records = Records::new(&before).unwrap().map(Result::unwrap);
        let kept: Vec<Record> = records.filter(|record| case.kept.contains(&record.offset)).collect();
        assert_eq!(kept.len(), case.kept.len(), "{}", case.name);
        // Tombstones, and the end of a transaction of which nothing else is left, get a horizon.
        let needs_horizon =
            kept.iter().any(|record| record.value.is_none()) || case.name == "end of an emptied transaction";
        let rebuilt = rebuild(&header, &kept, needs_horizon.then_some(case.new_horizon_ms)).unwrap();
        let expected = batch::check(&after).unwrap();
        match expected.codec().unwrap() {
            Codec::None => assert_eq!(rebuilt, after, "{}", case.name),
            codec => {
                let ours = batch::check(&rebuilt).unwrap();
                let same = BatchHeader { batch_length: expected.batch_length, crc: expected.crc, ..ours };
                assert_eq!(same, expected, "{}", case.name);
                let decompress = |batch: &Bytes| compression::decompress(codec, &batch[HEADER_BYTES..], 4096);
                assert_eq!(decompress(&rebuilt), decompress(&after), "{}", case.name);
            }
        }
        compared += 1;
    }
    assert_eq!(compared, 58);
}
