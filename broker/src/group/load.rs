//! Reads the groups that a partition of the offsets topic holds.
//!
//! Owns: the way from the log's bytes to a [`Replay`]. Refuses: what the records mean ([`super::records`]).

use super::records::Replay;
use crate::error::PartitionError;
use crate::partition::PartitionHandle;
use crate::pool::Pool;
use bytes::{Bytes, BytesMut};
use headwater_proto::batch::{BatchError, BatchHeader, LENGTH_PREFIX_BYTES, Records};
use headwater_storage::{LogReader, ReadError, offsets_schema};
use std::time::Duration;
use tokio::time::timeout;

/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 20;

/// How long the high watermark may take to reach the end of the log.
const COUNTED_WITHIN: Duration = Duration::from_secs(1);

/// Waits, then reads everything that is there. Records beyond the high watermark may be lost yet, or count later without anybody saying so:
/// the groups are not read before it is known which.
///
/// # Errors
/// When the partition is fenced, cannot be read, holds bytes that are no batches, or does not know its high watermark in time.
pub(super) async fn read(partition: PartitionHandle, pool: Pool, after: Duration) -> Result<Replay, PartitionError> {
    tokio::time::sleep(after).await;
    let reader = partition.reader()?;
    let end = partition.offsets().log_end;
    let mut watermarks = partition.watermarks();
    let counted = watermarks.wait_for(|now| now.ended.is_some() || now.offsets.high_watermark >= end);
    if timeout(COUNTED_WITHIN, counted).await.is_err() {
        let counted = partition.offsets().high_watermark;
        let why = format!(
            "the log of the groups ends at offset {end}, and only what lies before {counted} is certain to stay"
        );
        return Err(PartitionError::Internal(why.into()));
    }
    // Not where the partition ended meanwhile.
    partition.reader()?;
    pool.run_long(move || replay(&partition, &reader, end)).await
}

fn replay(partition: &PartitionHandle, reader: &LogReader, end: i64) -> Result<Replay, PartitionError> {
    let mut replay = Replay::default();
    let start = reader.log_start_offset();
    if start >= end {
        return Ok(replay);
    }
    let failed = |error: ReadError| partition.read_failed(&error);
    let mut cursor = reader.seek(start).map_err(failed)?;
    let mut bytes = BytesMut::new();
    while let Some(slice) = reader.read(&mut cursor, READ_BYTES, end).map_err(failed)? {
        slice.load().map_err(failed)?;
        bytes.extend_from_slice(&slice.bytes());
        while let Some(batch) = split_batch(&mut bytes)? {
            apply(&mut replay, &batch)?;
        }
    }
    Ok(replay)
}

/// The first batch of the bytes, once all of it is there.
fn split_batch(bytes: &mut BytesMut) -> Result<Option<Bytes>, BatchError> {
    if bytes.len() < LENGTH_PREFIX_BYTES {
        return Ok(None);
    }
    match BatchHeader::parse(bytes) {
        Ok(header) if header.size() <= bytes.len() => Ok(Some(bytes.split_to(header.size()).freeze())),
        Ok(_) | Err(BatchError::Truncated { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn apply(replay: &mut Replay, batch: &Bytes) -> Result<(), PartitionError> {
    let records = Records::new(batch)?;
    if records.header().is_control() {
        return Ok(());
    }
    for record in records {
        let record = record?;
        match offsets_schema::decode(record.key.as_deref().unwrap_or_default(), record.value.as_deref()) {
            Ok((key, value)) => replay.apply(key, value),
            Err(error) => {
                tracing::debug!(offset = record.offset, %error, "record of the offsets topic passed over");
                replay.pass_over();
            }
        }
    }
    Ok(())
}
