//! Writes a segment anew, batch by batch, with everything that stands beside its `.log`.
//!
//! Owns: the files of one segment while repair or compaction make it. Refuses: offsets (batches keep theirs) and names (the files carry a
//! suffix until whoever made them puts them in place). Nothing of it counts before [`SegmentWriter::finish`], which syncs every file; the
//! caller syncs the directory. Read next: `compaction/swap.rs`.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::batch::BatchHeader;

use crate::checkpoint::segment_file_name;
use crate::crcfile::{CrcHeader, RunningCrc};
use crate::error::{During, IoFailure};
use crate::files::{File, Files, OpenMode};
use crate::index::{IndexBuilder, IndexBytes, LargestTimestamp};
use crate::transactions::{self, AbortedTransaction};

/// Written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A segment that is being written.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    files: Arc<dyn Files>,
    dir: PathBuf,
    base_offset: i64,
    suffix: &'static str,
    log: Arc<dyn File>,
    /// Bytes of whole batches, buffered ones included.
    size: u64,
    buffer: Vec<u8>,
    index: IndexBuilder,
    entries: IndexBytes,
    /// `None` where it is not known whose segment it is.
    crc: Option<(CrcHeader, RunningCrc)>,
    aborted: Vec<u8>,
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentSummary {
    pub(crate) base_offset: i64,
    /// Bytes of the `.log`.
    pub(crate) size: u64,
    /// Bytes of the offset index.
    pub(crate) offsets_bytes: u64,
    /// Bytes of the time index.
    pub(crate) times_bytes: u64,
    pub(crate) largest: Option<LargestTimestamp>,
}

impl SegmentWriter {
    /// Begins a segment in `dir`. The names of its files get `suffix` at the end.
    pub(crate) fn create(
        files: Arc<dyn Files>,
        dir: &Path,
        base_offset: i64,
        suffix: &'static str,
        crc: Option<CrcHeader>,
        index_interval_bytes: u32,
    ) -> Result<SegmentWriter, IoFailure> {
        let path = dir.join(segment_file_name(base_offset, &format!(".log{suffix}")));
        let log = files.open(&path, OpenMode::Create).during("create", &path)?;
        Ok(SegmentWriter {
            files,
            dir: dir.to_owned(),
            base_offset,
            suffix,
            log,
            size: 0,
            buffer: Vec::new(),
            index: IndexBuilder::new(base_offset, index_interval_bytes),
            entries: IndexBytes::default(),
            crc: crc.map(|header| (header, RunningCrc::new(&header))),
            aborted: Vec::new(),
        })
    }

    /// Appends a batch as it is.
    pub(crate) fn append(&mut self, header: &BatchHeader, bytes: &[u8]) -> Result<(), IoFailure> {
        self.index.batch(header, self.size, &mut self.entries);
        if let Some((_, crc)) = &mut self.crc {
            crc.update(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        self.size += bytes.len() as u64;
        if self.buffer.len() >= BUFFER_BYTES { self.write_out() } else { Ok(()) }
    }

    /// Adds an entry to the transaction index.
    pub(crate) fn append_aborted(&mut self, transaction: &AbortedTransaction) {
        self.aborted.extend_from_slice(&transaction.encode());
    }

    /// Completes the segment's files and syncs each of them. An empty transaction index is written only if asked for.
    pub(crate) fn finish(mut self, with_empty_transactions: bool) -> Result<SegmentSummary, IoFailure> {
        self.write_out()?;
        let path = self.path(".log");
        self.log.sync_all().during("sync", &path)?;
        self.index.seal(&mut self.entries);
        self.write_file(".index", &self.entries.offsets)?;
        self.write_file(".timeindex", &self.entries.times)?;
        if !self.aborted.is_empty() || with_empty_transactions {
            self.write_file(transactions::EXTENSION, &self.aborted)?;
        }
        if let Some((header, mut crc)) = self.crc.take() {
            let mut bytes = header.encode().to_vec();
            bytes.extend_from_slice(&crc.take().1);
            bytes.extend_from_slice(&crc.last_entry());
            self.write_file(".crc", &bytes)?;
        }
        Ok(SegmentSummary {
            base_offset: self.base_offset,
            size: self.size,
            offsets_bytes: self.entries.offsets.len() as u64,
            times_bytes: self.entries.times.len() as u64,
            largest: self.index.largest(),
        })
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.dir.join(segment_file_name(self.base_offset, &format!("{extension}{}", self.suffix)))
    }

    fn write_out(&mut self) -> Result<(), IoFailure> {
        let at = self.size - self.buffer.len() as u64;
        self.log.write_at(at, &[IoSlice::new(&self.buffer)]).during("write", &self.path(".log"))?;
        self.buffer.clear();
        Ok(())
    }

    fn write_file(&self, extension: &str, bytes: &[u8]) -> Result<(), IoFailure> {
        let path = self.path(extension);
        write_synced(&*self.files, &path, bytes)
    }
}

/// Writes a whole file and syncs it.
pub(crate) fn write_synced(files: &dyn Files, path: &Path, bytes: &[u8]) -> Result<(), IoFailure> {
    let write = || {
        let file = files.open(path, OpenMode::Create)?;
        file.write_at(0, &[IoSlice::new(bytes)])?;
        file.sync_all()
    };
    write().during("write", path)
}
