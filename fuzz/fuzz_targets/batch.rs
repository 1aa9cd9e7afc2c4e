//! Any bytes as a batch, as they are and with length and checksum made right: nothing panics, and the walk and the reader
//! are of one mind.
//!
//! `cargo +nightly fuzz run batch`
#![no_main]

use bytes::Bytes;
use headwater_proto::batch::{
    self, BatchError, Batches, Origin, Record, RecordFault, Records, WalkRules, rebuild, walk,
};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let _ = Batches::new(data).count();
    read_every_way(&Bytes::copy_from_slice(data));
    if let Some(mended) = mended(data) {
        read_every_way(&mended);
    }
});

fn mended(data: &[u8]) -> Option<Bytes> {
    let mut batch = data.to_vec();
    let length = i32::try_from(batch.len().checked_sub(12)?).ok()?;
    batch.get_mut(8..12)?.copy_from_slice(&length.to_be_bytes());
    *batch.get_mut(16)? = 2;
    let crc = batch::crc(&batch);
    batch.get_mut(17..21)?.copy_from_slice(&crc.to_be_bytes());
    Some(batch.into())
}

fn read_every_way(batch: &Bytes) {
    let records = Records::with_limit(batch, LIMIT).and_then(|records| records.collect::<Result<Vec<Record>, _>>());
    let rules = WalkRules { origin: Origin::Log, require_keys: false, max_decompressed_bytes: LIMIT };
    let produced = walk(batch, WalkRules { origin: Origin::Producer, ..rules });
    match (walk(batch, rules), records) {
        (Ok(walked), Ok(records)) => {
            assert_eq!(records.len(), walked.header.record_count as usize);
            rebuild(&walked.header, &records, None).expect("records of the batch");
        }
        (Ok(_), Err(error)) => panic!("walked, but cannot be read: {error}"),
        (Err(BatchError::MaxTimestamp { .. } | BatchError::Crc { .. }), Ok(_)) | (Err(_), Err(_)) => {
            assert!(produced.is_err(), "a producer may do what a log may not");
        }
        (Err(BatchError::Record { fault: RecordFault::Timestamp(_), .. }), Ok(_)) => assert!(produced.is_err()),
        (Err(error), Ok(_)) => panic!("can be read, but not walked: {error}"),
    }
}
