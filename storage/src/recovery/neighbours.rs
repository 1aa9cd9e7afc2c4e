//! The partitions of a data root as those that are opened at one time see each other: whose folders lie there, and how their segments begin.
//!
//! Owns: that ten thousand partitions which all ask whose their segments are read every name and the beginning of every checksum file once, not ten
//! thousand times. Refuses: to be believed. It says where to look; `owner.rs` reads what is there before it decides. Read next: `owner.rs`.
//!
//! What the checksums of different partitions say of the same bytes can be compared without the bytes: what the header adds to a checksum depends on the
//! length alone, and is taken out. So a segment's beginning is looked up by its own checksum. What was learned is learned anew
//! after a minute; what was exchanged before a start is there all the time. It takes 16 bytes for each segment of the root, and about 100 for
//! each that was asked for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use headwater_proto::TopicId;

use super::owner::beginning;
use crate::checkpoint::{
    parse_partition_dir_name, parse_segment_file_name, read_partition_metadata, segment_file_name,
};
use crate::error::{During, IoFailure};
use crate::files::Files;

/// How long it counts what was learned.
const FRESH_MS: i64 = 60_000;

/// What is known of data roots.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    roots: Mutex<HashMap<PathBuf, Root>>,
}

#[derive(Debug)]
struct Root {
    learned_ms: i64,
    folders: Vec<Neighbour>,
    /// Topics of those with this number, once they were asked for.
    topics: HashMap<u32, Vec<(TopicId, usize)>>,
    /// The names of all checksum files, once they were asked for: base offset and folder, in order.
    names: Option<Vec<(i64, u32)>>,
    /// The segments of one base offset, once they were asked for.
    beginnings: HashMap<i64, Beginnings>,
}

#[derive(Debug)]
struct Neighbour {
    number: u32,
    folder: Arc<Path>,
}

/// Of the segments of one base offset: what the first checksum covers, and the folders where that checksum, without what its header adds, is this.
#[derive(Debug, Default)]
struct Beginnings {
    /// Rising.
    positions: Vec<u32>,
    folders: HashMap<(u32, u32), Vec<u32>>,
}

impl Neighbours {
    /// The folders that are said to be of a partition.
    pub(super) fn of_partition(
        &self,
        (files, root): (&dyn Files, &Path),
        now_ms: i64,
        topic_id: TopicId,
        number: u32,
    ) -> Result<Vec<Arc<Path>>, IoFailure> {
        self.look(files, root, now_ms, |root| {
            let Root { folders, topics, .. } = root;
            let topics = topics.entry(number).or_insert_with(|| {
                let numbered = folders.iter().enumerate().filter(|(_, neighbour)| neighbour.number == number);
                numbered
                    .filter_map(|(at, neighbour)| {
                        Some((read_partition_metadata(files, &neighbour.folder).ok().flatten()?, at))
                    })
                    .collect()
            });
            let found = topics.iter().filter(|(id, _)| *id == topic_id);
            Ok(found.filter_map(|(_, at)| folders.get(*at)).map(|found| Arc::clone(&found.folder)).collect())
        })
    }

    /// The folders where a segment of this base offset has a checksum file that agrees with these bytes, the first ones of a log.
    pub(super) fn beginning_as(
        &self,
        (files, root): (&dyn Files, &Path),
        now_ms: i64,
        base_offset: i64,
        bytes: &[u8],
    ) -> Result<Vec<Arc<Path>>, IoFailure> {
        self.look(files, root, now_ms, |root| {
            root.read_beginnings(files, base_offset)?;
            let Some(known) = root.beginnings.get(&base_offset) else { return Ok(Vec::new()) };
            let mut found = Vec::new();
            let (mut hasher, mut covered) = (crc32fast::Hasher::new(), 0);
            for position in &known.positions {
                let Some(next) = bytes.get(covered..*position as usize) else { break };
                hasher.update(next);
                covered = *position as usize;
                let alike = known.folders.get(&(*position, hasher.clone().finalize()));
                found.extend(alike.into_iter().flatten().filter_map(|at| root.folder(*at)));
            }
            Ok(found)
        })
    }

    fn look<T>(
        &self,
        files: &dyn Files,
        root: &Path,
        now_ms: i64,
        at: impl FnOnce(&mut Root) -> Result<T, IoFailure>,
    ) -> Result<T, IoFailure> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = roots.get_mut(root).filter(|known| now_ms.abs_diff(known.learned_ms) < FRESH_MS as u64) {
            return at(known);
        }
        let entries = files.list(root).during("list", root)?;
        let folders = entries.iter().filter_map(|entry| {
            let (_, number) = parse_partition_dir_name(&entry.name)?;
            Some(Neighbour { number, folder: root.join(&entry.name).into() })
        });
        let mut learned = Root {
            learned_ms: now_ms,
            folders: folders.collect(),
            topics: HashMap::new(),
            names: None,
            beginnings: HashMap::new(),
        };
        let answer = at(&mut learned);
        roots.insert(root.to_owned(), learned);
        answer
    }
}

impl Root {
    fn folder(&self, at: u32) -> Option<Arc<Path>> {
        self.folders.get(at as usize).map(|neighbour| Arc::clone(&neighbour.folder))
    }

    fn read_beginnings(&mut self, files: &dyn Files, base_offset: i64) -> Result<(), IoFailure> {
        if self.beginnings.contains_key(&base_offset) {
            return Ok(());
        }
        let names = match self.names.take() {
            Some(names) => names,
            None => self.read_names(files),
        };
        let from = names.partition_point(|(base, _)| *base < base_offset);
        let same = names.iter().skip(from).take_while(|(base, _)| *base == base_offset).map(|(_, at)| *at);
        let mut known = Beginnings::default();
        for at in same {
            let Some(folder) = self.folder(at) else { continue };
            let file = beginning(files, &folder.join(segment_file_name(base_offset, ".crc")))?;
            if let Some(first) = file.as_ref().and_then(|file| file.first_of_bytes()) {
                known.folders.entry((first.position, first.crc)).or_default().push(at);
                known.positions.push(first.position);
            }
        }
        known.positions.sort_unstable();
        known.positions.dedup();
        self.beginnings.insert(base_offset, known);
        self.names = Some(names);
        Ok(())
    }

    fn read_names(&self, files: &dyn Files) -> Vec<(i64, u32)> {
        let mut names = Vec::new();
        for (at, neighbour) in (0..).zip(&self.folders) {
            // What is wrong with another partition's folder is not the matter of who asks.
            let entries = files.list(&neighbour.folder).unwrap_or_default();
            names.extend(entries.iter().filter_map(|entry| match parse_segment_file_name(&entry.name)? {
                (base_offset, ".crc") => Some((base_offset, at)),
                _ => None,
            }));
        }
        names.sort_unstable();
        names
    }
}
