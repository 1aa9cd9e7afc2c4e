//! Reads the groups that a partition of the offsets topic holds.
//!
//! Owns: the way from the log's bytes to a [`Replay`]. Refuses: what the records mean ([`super::records`]).

use super::records::Replay;
use super::task::GroupContext;
use crate::error::PartitionError;
use crate::partition::PartitionHandle;
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
/// the groups are not read before it is known which. Nor before the metadata known here are those of now: what was committed for a
/// topic that this broker has not heard of yet is not to be taken for that of a deleted one.
///
/// # Errors
/// When the partition is fenced, cannot be read, holds bytes that are no batches, or does not know its high watermark in time; when it
/// is not confirmed that this broker leads it in this epoch.
pub(super) fn read(
    context: &GroupContext,
    partition: PartitionHandle,
    epoch: i32,
    after: Duration,
) -> impl Future<Output = Result<Replay, PartitionError>> + Send + use<> {
    let context = context.clone();
    async move {
        tokio::time::sleep(after).await;
        let counted = timeout(COUNTED_WITHIN, counted(&partition, epoch));
        let Ok(counted) = counted.await else {
            let offsets = partition.offsets();
            let why = format!(
                "the log of the groups ends at offset {}, and only what lies before {} is certain to stay",
                offsets.log_end, offsets.high_watermark
            );
            return Err(PartitionError::Internal(why.into()));
        };
        let (reader, end) = counted?;
        if !context.standing.confirm(&context.metadata, &partition, epoch).await {
            return Err(PartitionError::NotLeader(epoch));
        }
        context.pool.run_long(move || replay(&partition, &reader, end)).await
    }
}

/// The log, and where it ends, once everything in it counts.
async fn counted(partition: &PartitionHandle, epoch: i32) -> Result<(LogReader, i64), PartitionError> {
    let mut watermarks = partition.watermarks();
    // Who leads by the metadata takes the role when its log is at hand. An error means that the partition is gone.
    drop(watermarks.wait_for(|now| now.ended.is_some() || now.leads).await);
    let reader = partition.reader()?;
    let end = partition.written_end(epoch).await?;
    drop(watermarks.wait_for(|now| now.ended.is_some() || now.offsets.high_watermark >= end).await);
    // Not where the partition ended meanwhile.
    partition.reader()?;
    Ok((reader, end))
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
