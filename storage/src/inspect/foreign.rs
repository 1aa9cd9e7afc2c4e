//! Which segments of a folder are another partition's, as recovery sees it.
//!
//! Owns: whose the folder itself is, where nobody says so from outside: by its `partition.metadata` and its name, or else by most of its
//! checksum files. Refuses: to doubt a folder that was copied or renamed as a whole. Read next: `../recovery/owner.rs`, which decides.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::PathBuf;

use headwater_proto::TopicId;

use super::{InspectError, SegmentFile, Target, offsets_of};
use crate::checkpoint::segment_file_name;
use crate::crcfile::{self, CrcHeader};
use crate::error::IoFailure;
use crate::recovery::neighbours::Neighbours;
use crate::recovery::owner::{self, Folder};

/// Whose a folder's segments are.
pub(super) struct Owners<'a> {
    target: &'a Target,
    root: PathBuf,
    /// Whose the folder is said to be.
    pub(super) topic_id: Option<TopicId>,
    pub(super) partition: Option<u32>,
    neighbours: Neighbours,
    /// All of it is another's.
    is_copy: bool,
}

impl<'a> Owners<'a> {
    pub(super) fn read(target: &'a Target) -> Result<Owners<'a>, InspectError> {
        let mut bases = offsets_of(&*target.files, &target.dir, ".log")?;
        bases.sort_unstable();
        let headers: Vec<CrcHeader> = bases
            .iter()
            .filter_map(|base_offset| {
                let path = target.dir.join(segment_file_name(*base_offset, ".crc"));
                let bytes = target.small_file(&path).ok().flatten()?;
                crcfile::decode_leading(&bytes).ok().map(|file| file.header)
            })
            .collect();
        let said = most(headers.iter().map(|header| header.topic_id));
        // Where all say the same, it is the one file that says something else which is not of here.
        let all_say = said.filter(|topic| headers.len() > 1 && headers.iter().all(|header| header.topic_id == *topic));
        let topic_id = all_say.or(target.topic_id()).or(said);
        let by_name = target.partition().map(|(_, partition)| partition);
        let partition = by_name.or_else(|| most(headers.iter().map(|header| header.partition)));
        let neighbours = Neighbours::default();
        let mut owners = Owners { target, root: target.root(), topic_id, partition, neighbours, is_copy: false };
        if let Some(folder) = owners.folder() {
            owners.is_copy = owner::is_copy(folder, &bases).map_err(failed)?;
        }
        Ok(owners)
    }

    fn folder(&self) -> Option<Folder<'_>> {
        let (topic_id, partition) = self.topic_id.zip(self.partition)?;
        let (files, dir) = (&*self.target.files, self.target.dir.as_path());
        Some(Folder { files, dir, root: &self.root, topic_id, partition, neighbours: &self.neighbours, now_ms: 0 })
    }

    /// Whose this segment is, in words, if it is another partition's.
    pub(super) fn other(&self, segment: &SegmentFile) -> Result<Option<String>, InspectError> {
        let is_named = segment.name() == segment_file_name(segment.base_offset, ".log");
        match self.folder().filter(|_| is_named && !self.is_copy) {
            Some(folder) => owner::other_owner(folder, segment.base_offset, u64::MAX).map_err(failed),
            None => Ok(None),
        }
    }
}

fn failed(failure: IoFailure) -> InspectError {
    InspectError::Io { path: failure.path, source: failure.error }
}

/// What is said most often, if nothing else is said as often.
fn most<T: Copy + Eq + Hash>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: HashMap<T, usize> = HashMap::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    let largest = counts.values().max().copied()?;
    let mut all = counts.iter().filter(|(_, count)| **count == largest);
    let (value, _) = all.next()?;
    all.next().is_none().then_some(*value)
}
