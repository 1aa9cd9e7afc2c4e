//! Whose a segment is, when its bytes are not those that its checksum file was made of, though every batch is valid.
//!
//! Owns: the look at the other partitions of the data root, which lie beside the folder. Refuses: to look without a reason, since that opens a
//! file of each of them. Read next: `segment.rs`.
//!
//! Kafka may have appended or compacted here, and a person may have copied the folder under another name: then valid batches are good
//! enough. A file that lies in another partition's folder is not: whoever reads it gets records that were never written there. The checksums
//! begin with the partition, so the `.crc` of the one that the bytes belong to agrees with them from the first step on. What
//! Kafka appended has a beginning that agrees here, and what it compacted agrees nowhere.

use std::path::Path;

use headwater_proto::batch::{self, BatchHeader};

use crate::active::{Place, crc_header};
use crate::checkpoint::{parse_partition_dir_name, read_partition_metadata, segment_file_name};
use crate::crcfile::{self, CrcFile, CrcHeader, RunningCrc, STEP_BYTES};
use crate::error::{During, IoFailure};
use crate::files::{OpenMode, is_exhausted, parent, read_exact_at};

/// Of a checksum file, as much as tells whose the log's beginning is.
const BEGINNING_BYTES: usize = crcfile::HEADER_BYTES + crcfile::ENTRY_BYTES;

/// Which other partition the batches of a segment are, in words. `found` is the checksum file beside them, if it can be read, and `end` where
/// they end.
pub(super) fn other_owner(
    place: Place<'_>,
    base_offset: i64,
    end: u64,
    found: Option<&CrcFile>,
) -> Result<Option<String>, IoFailure> {
    if end == 0 {
        return Ok(None);
    }
    let path = place.dir.join(segment_file_name(base_offset, ".log"));
    let file = place.files.open(&path, OpenMode::Read).during("open", &path)?;
    let mut bytes = vec![0; end.min(STEP_BYTES) as usize];
    read_exact_at(&*file, &mut bytes, 0).during("read", &path)?;
    let ours = crc_header(place.identity, base_offset);
    if let Some(file) = found.filter(|file| file.header != ours)
        && (begins_as(&bytes, file) || (file.entries.is_empty() && file.header.base_offset == base_offset))
        && let Some(words) = brought_along(place, file.header)?
    {
        return Ok(Some(words));
    }
    // It may have been given the name of a segment that began elsewhere.
    let first = BatchHeader::parse(bytes.get(..batch::HEADER_BYTES).unwrap_or_default());
    let mut bases = vec![base_offset];
    bases.extend(first.ok().map(|first| first.base_offset).filter(|first| *first != base_offset));
    search(place, &bases, &bytes)
}

/// A segment that lies here with its own checksum file: whether it is one of another partition of this topic, or of this data root.
fn brought_along(place: Place<'_>, header: CrcHeader) -> Result<Option<String>, IoFailure> {
    let CrcHeader { topic_id, partition, base_offset } = header;
    if (topic_id, partition) == (place.identity.topic_id, place.identity.partition) {
        return Ok(Some(format!("it is the segment of offset {base_offset}, as its .crc says, which lies with it")));
    }
    if topic_id == place.identity.topic_id {
        return Ok(Some(format!("it is of partition {partition} of this topic, as its .crc says, which lies with it")));
    }
    let root = parent(place.dir);
    for entry in place.files.list(root).during("list", root)? {
        let folder = root.join(&entry.name);
        let is_candidate = parse_partition_dir_name(&entry.name).is_some_and(|(_, number)| number == partition);
        if is_candidate && read_partition_metadata(&**place.files, &folder).is_ok_and(|id| id == Some(topic_id)) {
            let folder = folder.display();
            return Ok(Some(format!("it is of the partition in {folder}, as its .crc says, which lies with it")));
        }
    }
    Ok(None)
}

/// The partition beside this one of which a checksum file agrees with these bytes, the first ones of a segment of one of these names.
fn search(place: Place<'_>, bases: &[i64], bytes: &[u8]) -> Result<Option<String>, IoFailure> {
    let ours = crc_header(place.identity, 0);
    let root = parent(place.dir);
    for entry in place.files.list(root).during("list", root)? {
        let folder = root.join(&entry.name);
        if parse_partition_dir_name(&entry.name).is_none() || folder == **place.dir {
            continue;
        }
        for base_offset in bases {
            let path = folder.join(segment_file_name(*base_offset, ".crc"));
            let agrees = beginning(place, &path)?.is_some_and(|other| {
                let is_ours = (other.header.topic_id, other.header.partition) == (ours.topic_id, ours.partition);
                !is_ours && begins_as(bytes, &other)
            });
            if agrees {
                return Ok(Some(format!("it is of the partition in {}, as {} says", folder.display(), path.display())));
            }
        }
    }
    Ok(None)
}

/// The header and first entry of a checksum file. What is wrong with another partition's files is not this one's matter.
fn beginning(place: Place<'_>, path: &Path) -> Result<Option<CrcFile>, IoFailure> {
    let mut bytes = [0; BEGINNING_BYTES];
    let read = place.files.open(path, OpenMode::Read).and_then(|file| read_exact_at(&*file, &mut bytes, 0));
    match read {
        Ok(()) => Ok(crcfile::decode(&bytes).ok()),
        Err(error) if is_exhausted(&error) => Err(IoFailure::new("open", path, error)),
        Err(_) => Ok(None),
    }
}

/// Whether the first entry of a checksum file was made of these bytes.
fn begins_as(bytes: &[u8], file: &CrcFile) -> bool {
    let Some(first) = file.entries.first() else { return false };
    let Some(covered) = bytes.get(..first.position as usize) else { return false };
    let mut running = RunningCrc::new(&file.header);
    running.update(covered);
    running.entry() == *first
}
