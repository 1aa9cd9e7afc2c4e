//! Whether a leader's log is sound where a follower refused what was pushed of it.
//!
//! What this process wrote is not checked against the disk again before it is pushed, so that memory which fails shows at the followers
//! first. Here the bytes are looked at as they would be pushed.
//!
//! Owns: [`damage`], which blocks. Refuses: what follows from it ([`super::serve`]). Read next: `storage/src/verify.rs`, for what was on the
//! disk before this process.

use bytes::{Buf, BytesMut};
use headwater_proto::batch::{self, BatchHeader, HEADER_BYTES};
use headwater_proto::limits::MAX_BATCH_BYTES;
use headwater_storage::{LogReader, ReadError};

/// As much as a follower's stream may bring before any of it is checked there; the batch that exceeds it is looked at too.
const LOOKED_AT_BYTES: usize = 8 << 20;
/// Bytes that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// What is damaged of the log from this offset on, if anything is; of a leader in this epoch. Blocks.
///
/// # Errors
/// [`ReadError`]. An offset that the log does not have is no damage.
pub(super) fn damage(reader: &LogReader, from: i64, leader_epoch: i32) -> Result<Option<String>, ReadError> {
    let mut cursor = match reader.seek(from) {
        Err(ReadError::OutOfRange(_)) => return Ok(None),
        sought => sought?,
    };
    let (mut bytes, mut seen) = (BytesMut::new(), 0);
    // The batch that holds the offset may begin before it.
    let (mut after, mut epoch) = (i64::MIN, i32::MIN);
    loop {
        let slice = match reader.read(&mut cursor, PIECE_BYTES, i64::MAX) {
            // Deleted meanwhile.
            Err(ReadError::OutOfRange(_)) | Ok(None) => return Ok(None),
            Ok(Some(slice)) => slice,
            Err(error) => return Err(error),
        };
        slice.load()?;
        bytes.extend_from_slice(&slice.bytes());
        while let Some(front) = bytes.get(..HEADER_BYTES) {
            let said = match BatchHeader::parse(front) {
                Ok(header) if header.size() > MAX_BATCH_BYTES => Err(format!("it would have {} bytes", header.size())),
                Ok(header) => Ok(header),
                Err(error) => Err(error.to_string()),
            };
            let place = |at: i64| format!("the batch after offset {} is damaged", at.max(from));
            let header = match said {
                Ok(header) => header,
                Err(why) => return Ok(Some(format!("{}: {why}", place(after)))),
            };
            let Some(whole) = bytes.get(..header.size()) else { break };
            if let Err(error) = batch::check(whole) {
                return Ok(Some(format!("the batch at offset {} is damaged: {error}", header.base_offset)));
            }
            // Its checksum leaves these out.
            if header.base_offset < after || !(epoch..=leader_epoch).contains(&header.leader_epoch) {
                let what = format!("it claims offset {} and epoch {}", header.base_offset, header.leader_epoch);
                return Ok(Some(format!("{}: {what}", place(after))));
            }
            (after, epoch) = (header.next_offset(), header.leader_epoch);
            seen += header.size();
            bytes.advance(header.size());
            if seen >= LOOKED_AT_BYTES {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_proto::TopicId;
    use headwater_proto::batch::{BatchBuilder, BuildOptions};
    use headwater_storage::{Files, Log, LogConfig, LogIdentity, NewBatch, OpenHints, OsFiles};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    const VALUE: &[u8] = b"a value that is found in the file";

    fn log(dir: &std::path::Path) -> Log {
        let files: Arc<dyn Files> = Arc::new(OsFiles::default());
        let identity = LogIdentity { topic: "t".into(), topic_id: TopicId::from_bytes([1; 16]), partition: 0 };
        let hints = OpenHints { clean_shutdown: false, recovery_point: 0, log_start_offset: 0 };
        let (mut log, _) = Log::open(files, &dir.join("t-0"), identity, LogConfig::default(), hints, 0).unwrap();
        for _ in 0..10 {
            let mut builder = BatchBuilder::new(BuildOptions::default());
            builder.append(0, None, Some(VALUE), &[]);
            let bytes: bytes::Bytes = builder.build().unwrap();
            let batch = NewBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
            log.append(&[batch], 3, 0).unwrap();
        }
        log
    }

    /// Bytes of the log that change while it is open, as where memory fails; each batch has as many.
    #[test]
    fn damage_is_found_from_where_it_was_refused_and_a_sound_log_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(dir.path());
        let reader = log.reader();
        for from in [0, 4, 9, 10, 11, i64::MAX] {
            assert_eq!(damage(&reader, from, 3).unwrap(), None, "{from}");
        }
        let path = dir.path().join("t-0/00000000000000000000.log");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let size = reader.size_bytes() / 10;
        // In a value, and in what its checksum leaves out: the offset (too high, which shows at the next one; too low), and the epoch.
        let flips =
            [(70, 0x40, "the batch at offset 5"), (0, 0x40, "offset 6 and"), (7, 6, "offset 3"), (12, 0x40, "epoch")];
        for (within, flip, what) in flips {
            let at = 5 * size + within;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ flip], at).unwrap();
            let told = damage(&reader, 3, 3).unwrap().expect("damage");
            assert!(told.contains(what), "{within}: {told}");
            file.write_all_at(&byte, at).unwrap();
            assert_eq!(damage(&reader, 3, 3).unwrap(), None);
        }
        drop(log);
    }
}
