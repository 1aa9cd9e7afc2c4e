//! Whose a segment is, when its bytes are not those that its checksum file was made of, though every batch is valid.
//!
//! Owns: the look at the other partitions of the data root, which lie beside the folder; recovery and the inspection ask the same. Refuses: to
//! look without a reason, since that opens files of each of them (once for all that are opened at a time: `neighbours.rs`). Read next: `segment.rs`.
//!
//! Kafka may have appended or compacted here: then valid batches are good enough. A file that was exchanged with another partition's is not:
//! whoever reads it gets records that were never written there. The checksums begin with the partition, so the `.crc` of the one that the bytes
//! belong to agrees with them from the first step on. What Kafka appended has a beginning that agrees here, and what it compacted agrees nowhere.
//!
//! * A folder that was copied or renamed as a whole is no exchange: the `.crc` of every segment agrees with its bytes and names one and the same other
//!   partition, and that one's folder, if there is one, has nothing else in their place. It is reported, and the files are made this partition's
//!   before anything else is done (a crash amid that leaves some of both, which looks exchanged).
//! * Among segments of this partition, one that lies with its own `.crc` of another is that one's.
//! * A `.crc` of ours that is whole and was made of other bytes says that these were not written here; if another partition's says they were there, so
//!   it is, even where that one still has them.
//! * A `.crc` that is damaged, or another's that was not made of these bytes, says nothing. Then another partition's counts only if its own `.log`
//!   is not what it was made of: nothing was exchanged where it is, and these bytes are in a copy.
//! * Nothing can be said where nobody wrote checksums: of what Kafka wrote, and of the last segment after a crash, of which the first step was not
//!   full. It is served from any folder that it is put into, if its offsets fit.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_proto::batch::{self, BatchHeader};

use super::neighbours::Neighbours;
use super::report::CrcDisagreement;
use crate::active::{Place, read_crc_file};
use crate::checkpoint::segment_file_name;
use crate::crcfile::{self, CrcFile, CrcHeader, RunningCrc, STEP_BYTES};
use crate::error::{During, IoFailure};
use crate::files::{self, Files, OpenMode, is_exhausted, parent, read_exact_at};

/// Of a checksum file, as much as tells whose the log's beginning is.
const BEGINNING_BYTES: usize = crcfile::HEADER_BYTES + crcfile::ENTRY_BYTES;

/// A partition's folder, and whose it is said to be.
#[derive(Clone, Copy)]
pub(crate) struct Folder<'a> {
    pub(crate) files: &'a dyn Files,
    pub(crate) dir: &'a Path,
    /// Where the other partitions lie.
    pub(crate) root: &'a Path,
    pub(crate) topic_id: TopicId,
    pub(crate) partition: u32,
    /// What is known of the others.
    pub(crate) neighbours: &'a Neighbours,
    pub(crate) now_ms: i64,
}

impl<'a> Folder<'a> {
    pub(super) fn of(place: Place<'a>, neighbours: &'a Neighbours, now_ms: i64) -> Folder<'a> {
        let Place { files, dir, identity, .. } = place;
        let (topic_id, partition) = (identity.topic_id, identity.partition);
        Folder { files: &**files, dir, root: parent(dir), topic_id, partition, neighbours, now_ms }
    }

    fn file(&self, base_offset: i64, extension: &str) -> PathBuf {
        self.dir.join(segment_file_name(base_offset, extension))
    }

    fn header(&self, base_offset: i64) -> CrcHeader {
        CrcHeader { topic_id: self.topic_id, partition: self.partition, base_offset }
    }

    /// Without this one.
    fn others(&self, mut found: Vec<Arc<Path>>) -> Vec<Arc<Path>> {
        let own = self.dir.file_name().map(|name| self.root.join(name));
        found.retain(|folder| own.as_deref() != Some(&**folder));
        found
    }

    /// The folders beside this one that are said to be of a partition.
    fn folders_of(&self, header: CrcHeader) -> Result<Vec<Arc<Path>>, IoFailure> {
        let at = (self.files, self.root);
        Ok(self.others(self.neighbours.of_partition(at, self.now_ms, header.topic_id, header.partition)?))
    }

    /// The folders beside this one where a segment of this base offset is said to begin with these bytes.
    fn folders_with(&self, base_offset: i64, bytes: &[u8]) -> Result<Vec<Arc<Path>>, IoFailure> {
        Ok(self.others(self.neighbours.beginning_as((self.files, self.root), self.now_ms, base_offset, bytes)?))
    }
}

/// Makes the checksum files of a folder that was copied or renamed this partition's, where they are whole. Says which.
pub(super) fn take_over(folder: Folder<'_>, bases: &[i64]) -> Result<Vec<CrcDisagreement>, IoFailure> {
    let mut changed = Vec::new();
    if !is_copy(folder, bases)? {
        return Ok(changed);
    }
    for base_offset in bases {
        let path = folder.file(*base_offset, ".crc");
        let Some(Ok(file)) = read_crc_file(folder.files, &path)? else { continue };
        let CrcHeader { topic_id, partition, .. } = file.header;
        let detail =
            format!("it was written for partition {partition} of topic {topic_id}, of which this folder is a copy");
        tracing::warn!(path = %path.display(), detail, "the checksum file is made this partition's");
        files::replace(folder.files, &path, &file.renamed(folder.header(*base_offset))).during("write", &path)?;
        changed.push(CrcDisagreement { path, position: 0, detail });
    }
    Ok(changed)
}

/// Whether the folder as a whole is another partition's under a new name, or a copy of it. `bases` are its segments, rising.
pub(crate) fn is_copy(folder: Folder<'_>, bases: &[i64]) -> Result<bool, IoFailure> {
    let mut all: Vec<CrcFile> = Vec::new();
    for base_offset in bases.iter().rev() {
        let Some(file) = beginning(folder.files, &folder.file(*base_offset, ".crc"))? else { continue };
        let CrcHeader { topic_id, partition, .. } = file.header;
        let of_another = (topic_id, partition) != (folder.topic_id, folder.partition);
        let first = all.first().map_or(file.header, |first| first.header);
        let of_the_same = (first.topic_id, first.partition) == (topic_id, partition);
        if !of_another || !of_the_same || file.header.base_offset != *base_offset {
            return Ok(false);
        }
        let bytes = first_bytes(folder.files, &folder.file(*base_offset, ".log"), u64::MAX)?;
        if !file.entries.is_empty() && !begins_as(&bytes, &file) {
            return Ok(false);
        }
        all.push(file);
    }
    all.retain(|file| !file.entries.is_empty());
    let Some(first) = all.first() else { return Ok(false) };
    for other in folder.folders_of(first.header)? {
        for file in &all {
            let path = |extension| other.join(segment_file_name(file.header.base_offset, extension));
            let bytes = others_bytes(folder.files, &path(".log"))?;
            let own = beginning(folder.files, &path(".crc"))?.filter(|own| own.header == file.header);
            let is_whole = own.is_some_and(|own| own.entries.is_empty() || begins_as(&bytes, &own));
            if !bytes.is_empty() && !begins_as(&bytes, file) && !is_whole {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Which other partition a segment of a folder that is no copy is of, in words. `end` is where its batches end.
pub(crate) fn other_owner(folder: Folder<'_>, base_offset: i64, end: u64) -> Result<Option<String>, IoFailure> {
    let bytes = first_bytes(folder.files, &folder.file(base_offset, ".log"), end)?;
    let path = folder.file(base_offset, ".crc");
    if bytes.is_empty() || !files::exists(folder.files, &path).during("look at", &path)? {
        return Ok(None);
    }
    let found = beginning(folder.files, &path)?;
    let (ours, of_another) = match &found {
        Some(file) if file.header == folder.header(base_offset) => (Some(file), None),
        found => (None, found.as_ref()),
    };
    if ours.is_some_and(|file| file.entries.is_empty() || begins_as(&bytes, file)) {
        return Ok(None);
    }
    if let Some(file) = of_another
        && (begins_as(&bytes, file) || (file.entries.is_empty() && is_exchanged(folder, base_offset, file, &bytes)?))
        && let Some(words) = brought_along(folder, file.header)?
    {
        return Ok(Some(words));
    }
    // It may have been given the name of a segment that began elsewhere.
    let first = BatchHeader::parse(bytes.get(..batch::HEADER_BYTES).unwrap_or_default());
    let mut bases = vec![base_offset];
    bases.extend(first.ok().map(|first| first.base_offset).filter(|first| *first != base_offset));
    search(folder, &bases, &bytes, ours.is_some())
}

/// Whether a segment was exchanged whose checksum file, another partition's, has no entry, as a crash leaves it: the other partition has ours in
/// return, and a log that may be ours. (Alone, such a file says nothing of the log beside it.)
fn is_exchanged(folder: Folder<'_>, base_offset: i64, found: &CrcFile, bytes: &[u8]) -> Result<bool, IoFailure> {
    for other in folder.folders_of(found.header)? {
        let path = |extension| other.join(segment_file_name(base_offset, extension));
        let ours = beginning(folder.files, &path(".crc"))?.filter(|ours| ours.header == folder.header(base_offset));
        let Some(ours) = ours.filter(|ours| !begins_as(bytes, ours)) else { continue };
        let theirs = others_bytes(folder.files, &path(".log"))?;
        let has_batch = BatchHeader::parse(theirs.get(..batch::HEADER_BYTES).unwrap_or_default())
            .is_ok_and(|first| first.magic == 2 && first.base_offset >= base_offset);
        if begins_as(&theirs, &ours) || (ours.entries.is_empty() && has_batch) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A segment that lies here with its own checksum file: whether it is one of another partition of this topic, or of this data root.
fn brought_along(folder: Folder<'_>, header: CrcHeader) -> Result<Option<String>, IoFailure> {
    let CrcHeader { topic_id, partition, base_offset } = header;
    if (topic_id, partition) == (folder.topic_id, folder.partition) {
        return Ok(Some(format!("it is the segment of offset {base_offset}, as its .crc says, which lies with it")));
    }
    if topic_id == folder.topic_id {
        return Ok(Some(format!("it is of partition {partition} of this topic, as its .crc says, which lies with it")));
    }
    let found = folder.folders_of(header)?;
    Ok(found
        .first()
        .map(|of| format!("it is of the partition in {}, as its .crc says, which lies with it", of.display())))
}

/// The partition beside this one of which a checksum file agrees with these bytes, the first ones of a segment of one of these names. `is_certain`: they
/// are not this partition's.
fn search(folder: Folder<'_>, bases: &[i64], bytes: &[u8], is_certain: bool) -> Result<Option<String>, IoFailure> {
    let mut found = None;
    for base_offset in bases {
        for other in folder.folders_with(*base_offset, bytes)? {
            let path = |extension| other.join(segment_file_name(*base_offset, extension));
            let file = beginning(folder.files, &path(".crc"))?;
            let Some(file) = file.filter(|file| begins_as(bytes, file)) else { continue };
            if file.header == folder.header(*base_offset) {
                // Our checksum file lies there: it, not the log, was exchanged.
                return Ok(None);
            }
            let is_ours = (file.header.topic_id, file.header.partition) == (folder.topic_id, folder.partition);
            if !is_ours && (is_certain || !begins_as(&others_bytes(folder.files, &path(".log"))?, &file)) {
                let words =
                    format!("it is of the partition in {}, as {} says", other.display(), path(".crc").display());
                found.get_or_insert(words);
            }
        }
    }
    Ok(found)
}

/// The header of a checksum file and its first entry, if it has one. What is wrong with another partition's files is not this one's matter.
pub(super) fn beginning(files: &dyn Files, path: &Path) -> Result<Option<CrcFile>, IoFailure> {
    match first_of(files, path, BEGINNING_BYTES as u64) {
        Ok(bytes) => Ok(crcfile::decode(&bytes).ok()),
        Err(error) if is_exhausted(&error) => Err(IoFailure::new("open", path, error)),
        Err(_) => Ok(None),
    }
}

/// The first bytes of a log that ends at `end`: as many as its first checksum covers. None if there is no log.
fn first_bytes(files: &dyn Files, path: &Path, end: u64) -> Result<Vec<u8>, IoFailure> {
    match first_of(files, path, end.min(STEP_BYTES)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        result => result.during("read", path),
    }
}

/// The same of another partition's log; none if they cannot be read.
fn others_bytes(files: &dyn Files, path: &Path) -> Result<Vec<u8>, IoFailure> {
    match first_of(files, path, STEP_BYTES) {
        Err(error) if is_exhausted(&error) => Err(IoFailure::new("open", path, error)),
        result => Ok(result.unwrap_or_default()),
    }
}

fn first_of(files: &dyn Files, path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = files.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; file.len()?.min(most) as usize];
    read_exact_at(&*file, &mut bytes, 0)?;
    Ok(bytes)
}

/// Whether the first entry of a checksum file was made of these bytes.
fn begins_as(bytes: &[u8], file: &CrcFile) -> bool {
    let Some(first) = file.entries.first() else { return false };
    let Some(covered) = bytes.get(..first.position as usize) else { return false };
    let mut running = RunningCrc::new(&file.header);
    running.update(covered);
    running.entry() == *first
}
