//! `segment repair`: what is whole of a damaged partition, as a partition.
//!
//! Owns: which batches are kept, which offsets are lost, and the files made anew from what is kept. A batch that is damaged is left out; one
//! whose checksummed part is whole and whose other fields can have one value only is mended. Empty batches (as
//! compaction leaves them) keep the place of what is lost, also at the log's end if it is known how far it went: offsets are never given
//! twice, and recovery never comes upon a gap that it must refuse.
//! A segment of another partition (`foreign.rs`) is left out whole.
//! Refuses: to change the original. Even in place a copy is written, and the original kept under another name.
//! Read next: `scan.rs` and `../rewrite.rs`.
//!
//! A copy is made beside its final name, synced, and renamed. In place, the original gets the name that Kafka gives to strays
//! (`<folder>.<number>-stray`, which no broker opens), and the copy takes its name; a crash between the two renames
//! leaves the original under that name, and the next repair in place of the same path puts it back before it begins.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater_proto::TopicId;
use headwater_proto::batch::control::{self, ControlType};
use headwater_proto::batch::{self, BatchHeader, Record, Records, rebuild};
use serde::Serialize;

use super::foreign::Owners;
use super::scan::{Damage, Item};
use super::{InspectError, SegmentFile, Target, at, name};
use crate::checkpoint::{self, parse_partition_dir_name, segment_file_name};
use crate::crcfile::CrcHeader;
use crate::epochs::{self, LeaderEpochs};
use crate::error::IoFailure;
use crate::files::{self, Files, OpenMode};
use crate::index::{OffsetEntry, decode_entries};
use crate::producers::{self, ProducerState};
use crate::rewrite::{SegmentWriter, write_synced};
use crate::transactions::{self, AbortedTransaction};

/// Where the repaired partition goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepairMode {
    /// Into this directory, which becomes the partition's folder. It must not exist, or be empty.
    Copy(PathBuf),
    /// In the original's place; the original is kept under another name. No broker may be running on it.
    InPlace,
}

/// What was kept and what was not.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepairReport {
    /// The path as given.
    pub path: String,
    /// The repaired partition.
    pub out: String,
    /// Where the original is now, if it was repaired in place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original: Option<String>,
    /// Batches that were kept.
    pub kept_batches: u64,
    /// Their records.
    pub kept_records: u64,
    /// Offsets that may have had a record and have none any more.
    pub lost: Vec<OffsetRange>,
    /// Batches that were mended without a loss.
    pub mended: Vec<MendedBatch>,
    /// Segments that are no segments of this partition.
    pub foreign: Vec<ForeignSegment>,
    /// Bytes that were left out.
    pub dropped_bytes: u64,
}

/// A segment that was left out because it is another partition's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForeignSegment {
    /// The file's name.
    pub file: String,
    /// Whose it is, in words.
    pub detail: String,
}

/// Offsets from one to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OffsetRange {
    /// The first.
    pub from: i64,
    /// The last.
    pub to: i64,
}

/// A batch of which fields were wrong that its checksum leaves out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MendedBatch {
    /// The file's name.
    pub file: String,
    /// Where it began in the original.
    pub position: u64,
    /// Its first offset.
    pub base_offset: i64,
    /// Its last offset.
    pub last_offset: i64,
    /// What was wrong.
    pub detail: String,
}

/// How a folder that is being written ends: Kafka and Headwater remove such folders when they start.
const UNFINISHED: &str = "-delete";
/// How a folder ends that is kept and not opened.
const STRAY: &str = "-stray";

/// Repairs the partition or segment at `path`. `progress` is told of bytes of `.log` files as they are read.
pub fn repair(
    files: &Arc<dyn Files>,
    path: &Path,
    mode: &RepairMode,
    progress: &dyn Fn(u64),
) -> Result<RepairReport, InspectError> {
    let _lock = match mode {
        RepairMode::Copy(_) => None,
        RepairMode::InPlace => {
            put_back(&**files, path)?;
            lock_root(&**files, path)?
        }
    };
    let target = Target::open(Arc::clone(files), path)?;
    let out = match mode {
        RepairMode::Copy(out) => {
            let vacant = match files.list(out) {
                Ok(entries) => entries.is_empty(),
                Err(error) => error.kind() == ErrorKind::NotFound,
            };
            if !vacant {
                return Err(InspectError::InTheWay(out.clone()));
            }
            out.clone()
        }
        RepairMode::InPlace if target.is_partition() => path.to_owned(),
        RepairMode::InPlace => {
            let reason = "only a partition's directory can be repaired in place".to_owned();
            return Err(InspectError::Refused { path: path.to_owned(), reason });
        }
    };
    let aside = unused_name(&**files, &out, UNFINISHED)?;
    files.create_dir_all(&aside).map_err(at(&aside))?;
    let mut report = match Repair::new(&target, &aside, &out)?.run(progress) {
        Ok(report) => report,
        Err(error) => {
            // What was begun is of no use to anybody, and would be removed by the next broker that starts here.
            let _ = remove_folder(&**files, &aside);
            return Err(error);
        }
    };
    if *mode == RepairMode::InPlace {
        let original = unused_name(&**files, &out, STRAY)?;
        files.rename(&out, &original).map_err(at(&out))?;
        report.original = Some(original.display().to_string());
    } else if files.list(&out).is_ok() {
        files.remove_dir(&out).map_err(at(&out))?;
    }
    files.rename(&aside, &out).map_err(at(&aside))?;
    files.sync_dir(files::parent(&out)).map_err(at(&out))?;
    Ok(report)
}

struct Repair<'a> {
    target: &'a Target,
    owners: Owners<'a>,
    to: &'a Path,
    topic_id: Option<TopicId>,
    partition: u32,
    report: RepairReport,
    epochs: Option<LeaderEpochs>,
    /// Those that the kept batches tell of themselves.
    epochs_of_batches: LeaderEpochs,
    epochs_contradicted: bool,
    producers: ProducerState,
    open_transactions: HashMap<i64, i64>,
    previous: Option<BatchHeader>,
    /// Stretches without a kept batch, and the offsets that the damaged batches there say they held, where all of them say so.
    losses: Vec<(OffsetRange, Option<Vec<OffsetRange>>)>,
    /// Whether the log looks like one that was compacted: then a stretch holds offsets that were gone before.
    compacted: bool,
    /// One after the last offset that the log must have had.
    known_end: i64,
    /// Up to where the cleaner's checkpoint calls the log clean.
    cleaned_until: Option<i64>,
}

impl<'a> Repair<'a> {
    fn new(target: &'a Target, to: &'a Path, out: &Path) -> Result<Repair<'a>, InspectError> {
        let owners = Owners::read(target)?;
        let by_name = parse_partition_dir_name(&name(out)).or_else(|| target.partition());
        let partition = by_name.map(|(_, partition)| partition).or(owners.partition).unwrap_or(0);
        let first = target.segments.first().map_or(0, |segment| segment.base_offset);
        let snapshot = target.small_file(&target.dir.join(segment_file_name(first, producers::EXTENSION)))?;
        let producers = snapshot.and_then(|bytes| producers::decode_snapshot(&bytes).ok()).unwrap_or_default();
        let report = RepairReport {
            path: target.path().display().to_string(),
            out: out.display().to_string(),
            ..RepairReport::default()
        };
        Ok(Repair {
            to,
            topic_id: target.topic_id().or(owners.topic_id),
            partition,
            report,
            epochs: target.leader_epochs(),
            epochs_of_batches: LeaderEpochs::default(),
            epochs_contradicted: false,
            producers: ProducerState::from_snapshot(&producers, 0),
            open_transactions: HashMap::new(),
            previous: None,
            losses: Vec::new(),
            compacted: false,
            known_end: known_end(target, true)?,
            cleaned_until: target.cleaned_until(),
            owners,
            target,
        })
    }

    fn run(mut self, progress: &dyn Fn(u64)) -> Result<RepairReport, InspectError> {
        for segment in &self.target.segments {
            self.segment(segment, progress)?;
        }
        let end = self.previous.map_or_else(
            || self.target.segments.last().map_or(0, |segment| segment.base_offset),
            |last| last.next_offset(),
        );
        if self.target.is_partition() || self.previous.is_some() {
            self.write_snapshot(end)?;
        }
        self.write_epochs(end)?;
        if let Some(topic_id) = self.topic_id {
            checkpoint::write_partition_metadata(&*self.target.files, self.to, topic_id).map_err(failed)?;
        }
        self.target.files.sync_dir(self.to).map_err(at(self.to))?;
        for (stretch, claims) in self.losses {
            match claims.filter(|_| self.compacted) {
                Some(claims) => self.report.lost.extend(claims),
                None => self.report.lost.push(stretch),
            }
        }
        Ok(self.report)
    }

    fn segment(&mut self, segment: &SegmentFile, progress: &dyn Fn(u64)) -> Result<(), InspectError> {
        if let Some(detail) = self.owners.other(segment)? {
            return self.leave_out(segment, detail, progress);
        }
        let aborted = self.aborted_in(segment)?;
        let Some(mut scanner) = self.target.scan(segment, self.epochs.clone(), self.previous)? else { return Ok(()) };
        let file = segment.name();
        let base_offset = segment.base_offset;
        let mut writer: Option<SegmentWriter> = None;
        let mut damaged: Vec<Damage> = Vec::new();
        while let Some(item) = scanner.next().map_err(at(&segment.path))? {
            let (position, header, bytes, mended) = match item {
                Item::Batch(found) => (found.position, found.header, found.bytes, None),
                Item::Damage(Damage { position, mended: Some((header, bytes)), detail, .. }) => {
                    (position, header, bytes, Some(detail))
                }
                Item::Damage(damage) => {
                    progress(damage.size);
                    self.report.dropped_bytes += damage.size;
                    damaged.push(damage);
                    continue;
                }
                Item::Tail(tail) => {
                    progress(tail.size);
                    continue;
                }
            };
            progress(bytes.len() as u64);
            let records = match Records::new(&bytes).and_then(|records| records.collect::<Result<Vec<_>, _>>()) {
                Ok(records) => records,
                Err(error) => {
                    self.report.dropped_bytes += bytes.len() as u64;
                    damaged.push(unreadable(position, header, &bytes, error.to_string()));
                    continue;
                }
            };
            if damaged.is_empty() {
                self.compacted |=
                    header.base_offset > self.previous.map_or(base_offset, |previous| previous.next_offset());
            }
            self.compacted |= i64::from(header.record_count) <= i64::from(header.last_offset_delta);
            let lost_to = self.lose(&mut damaged, Some(header.base_offset));
            if writer.is_none() {
                if self.previous.is_some() {
                    self.write_snapshot(base_offset)?;
                }
                writer = Some(self.writer(base_offset)?);
            }
            if let Some(writer) = &mut writer {
                self.fill(writer, base_offset, lost_to, Some(header.leader_epoch))?;
                writer.append(&header, &bytes).map_err(failed)?;
                if let Some(aborted) = self.keep(&header, &records, &aborted) {
                    writer.append_aborted(&aborted);
                }
            }
            if let Some(detail) = mended {
                let (base_offset, last_offset) = (header.base_offset, header.last_offset());
                self.report.mended.push(MendedBatch { file: file.clone(), position, base_offset, last_offset, detail });
            }
        }
        self.epochs_contradicted |= scanner.epoch_doubt().is_some();
        let end = segment.next_base_offset.or_else(|| self.end_of_log(&damaged));
        let lost_to = match self.lose(&mut damaged, end) {
            None => self.lose_end(base_offset, segment.next_base_offset),
            lost_to => lost_to,
        };
        if writer.is_none() {
            // One without a batch stays, as after compaction: without it, the offsets here would look like a lost segment's.
            if self.previous.is_some() {
                self.write_snapshot(base_offset)?;
            }
            writer = Some(self.writer(base_offset)?);
        }
        if let Some(mut writer) = writer {
            let next_epoch = segment.next_base_offset.and_then(|next| self.first_epoch(next));
            self.fill(&mut writer, base_offset, lost_to, next_epoch)?;
            writer.finish(false).map_err(failed)?;
        }
        Ok(())
    }

    /// A segment of another partition: whatever lay here is lost, up to where the log goes on or is known to have gone.
    fn leave_out(&mut self, segment: &SegmentFile, detail: String, progress: &dyn Fn(u64)) -> Result<(), InspectError> {
        let len = self.target.files.metadata(&segment.path).map_err(at(&segment.path))?.len;
        progress(len);
        self.report.dropped_bytes += len;
        self.report.foreign.push(ForeignSegment { file: segment.name(), detail });
        let from =
            self.previous.map_or(segment.base_offset, |previous| previous.next_offset()).max(segment.base_offset);
        let end = match segment.next_base_offset {
            Some(next) => next,
            // Its index may have come along, and counts if nothing else tells.
            None => match known_end(self.target, false)? {
                known if known > segment.base_offset => known,
                _ => self.known_end,
            },
        };
        let lost_to = end - 1;
        if self.previous.is_some() {
            self.write_snapshot(segment.base_offset)?;
        }
        let mut writer = self.writer(segment.base_offset)?;
        if from <= lost_to {
            self.losses.push((OffsetRange { from, to: lost_to }, None));
            let next_epoch = segment.next_base_offset.and_then(|next| self.first_epoch(next));
            self.fill(&mut writer, segment.base_offset, Some(lost_to), next_epoch)?;
        }
        writer.finish(false).map_err(failed)?;
        Ok(())
    }

    fn writer(&self, base_offset: i64) -> Result<SegmentWriter, InspectError> {
        let crc = self.topic_id.map(|topic_id| CrcHeader { topic_id, partition: self.partition, base_offset });
        let interval = crate::LogConfig::default().index_interval_bytes;
        SegmentWriter::create(Arc::clone(&self.target.files), self.to, base_offset, "", crc, interval).map_err(failed)
    }

    /// Takes note of a batch that is kept. Returns the entry that it brings to the transaction index.
    fn keep(
        &mut self,
        header: &BatchHeader,
        records: &[Record],
        aborted: &BTreeMap<i64, AbortedTransaction>,
    ) -> Option<AbortedTransaction> {
        self.report.kept_batches += 1;
        self.report.kept_records += if header.is_control() { 0 } else { records.len() as u64 };
        self.epochs_of_batches.assign(header.leader_epoch, header.base_offset);
        let known = self.epochs.as_ref().and_then(|epochs| epochs.at(header.base_offset));
        self.epochs_contradicted |= known.is_some_and(|epoch| epoch != header.leader_epoch);
        self.previous = Some(*header);
        let marker = records.first().filter(|_| header.is_control());
        let epoch = marker.and_then(|marker| control::parse_coordinator_epoch(marker.value.as_deref()?).ok());
        self.producers.replay(header, epoch, 0);
        let open = &mut self.open_transactions;
        if header.is_transactional() && !header.is_control() {
            open.entry(header.producer_id).or_insert(header.base_offset);
        }
        let marker = marker?;
        let (producer_id, last_offset) = (header.producer_id, marker.offset);
        let began = open.remove(&producer_id);
        if control::parse_key(marker.key.as_deref()?) != Ok(ControlType::Abort) {
            return None;
        }
        let known = aborted.get(&last_offset).copied().filter(|entry| entry.producer_id == producer_id);
        known.or(began.map(|first_offset| {
            let last_stable_offset = open.values().min().copied().unwrap_or(last_offset + 1);
            AbortedTransaction { producer_id, first_offset, last_offset, last_stable_offset }
        }))
    }

    fn aborted_in(&self, segment: &SegmentFile) -> Result<BTreeMap<i64, AbortedTransaction>, InspectError> {
        let bytes = self.target.small_file(&segment.sibling("txnindex"))?.unwrap_or_default();
        Ok(transactions::decode(&bytes).0.into_iter().map(|entry| (entry.last_offset, entry)).collect())
    }

    /// Counts the offsets of damaged batches as lost: everything up to `next`, where the log goes on. Returns the last of them.
    fn lose(&mut self, damaged: &mut Vec<Damage>, next: Option<i64>) -> Option<i64> {
        let from = damaged.first().map(|damage| damage.expected_offset);
        let claims: Option<Vec<OffsetRange>> = damaged.drain(..).map(|damage| claim(&damage, next)).collect();
        let stretch = OffsetRange { from: from?, to: next?.checked_sub(1)? };
        if stretch.from > stretch.to {
            return None;
        }
        let in_order =
            |claims: &Vec<OffsetRange>| claims.windows(2).all(|pair| matches!(pair, [a, b] if a.to < b.from));
        self.losses.push((stretch, claims.filter(in_order)));
        Some(stretch.to)
    }

    /// One after the last offset that the damaged end of the log can have held: what is known of it from elsewhere, or what its header says.
    fn end_of_log(&self, damaged: &[Damage]) -> Option<i64> {
        let last = damaged.last()?;
        let expected = damaged.first().map_or(last.expected_offset, |first| first.expected_offset);
        let claimed = claim(last, None).map(|range| range.to + 1);
        let known = Some(self.known_end).filter(|end| *end > expected);
        known.max(claimed)
    }

    /// Counts what is missing between a segment's last batch and the next segment as lost, though nothing damaged is there, unless compaction
    /// took it: the cleaner's checkpoint says so, or the rest of the log looks like it.
    fn lose_end(&mut self, base_offset: i64, next: Option<i64>) -> Option<i64> {
        let from = self.previous.filter(|previous| previous.base_offset >= base_offset)?.next_offset();
        let next = next?;
        if self.compacted || from >= next || self.cleaned_until.is_some_and(|until| until >= next) {
            return None;
        }
        // Nobody claims one of them, should what follows look compacted.
        self.losses.push((OffsetRange { from, to: next - 1 }, Some(Vec::new())));
        Some(next - 1)
    }

    /// Empty batches, one of each leader epoch, keep the place of offsets that are lost: at the log's end they would be given again, and
    /// elsewhere recovery takes a gap for damage. `next_epoch`: that of the batch that follows, if one does. A stretch that no batch could span
    /// stays a gap: nobody wrote so much, so what says that it was there is damaged.
    fn fill(
        &mut self,
        writer: &mut SegmentWriter,
        base_offset: i64,
        lost_to: Option<i64>,
        next_epoch: Option<i32>,
    ) -> Result<(), InspectError> {
        let Some(lost_to) = lost_to else { return Ok(()) };
        let mut first = self.previous.map_or(base_offset, |previous| previous.next_offset()).max(base_offset);
        while first <= lost_to {
            let epochs = self.epochs.iter().flat_map(|epochs| epochs.entries());
            let next_start = epochs.map(|entry| entry.start_offset).find(|start| *start > first);
            let last = next_start.map_or(lost_to, |next| lost_to.min(next - 1));
            let Some((header, bytes)) = self.empty_batch(first, last, next_epoch) else { break };
            writer.append(&header, &bytes).map_err(failed)?;
            self.keep(&header, &[], &BTreeMap::new());
            first = last + 1;
        }
        Ok(())
    }

    fn empty_batch(
        &self,
        first: i64,
        last_offset: i64,
        next_epoch: Option<i32>,
    ) -> Option<(BatchHeader, bytes::Bytes)> {
        let before = self.previous.map(|previous| previous.leader_epoch);
        let known = self.epochs.as_ref().and_then(|epochs| epochs.at(first)).or(before).unwrap_or(-1);
        // The checkpoint may be damaged, too; epochs never fall.
        let known = known.max(before.unwrap_or(-1));
        let like = BatchHeader {
            base_offset: first,
            batch_length: 0,
            leader_epoch: next_epoch.map_or(known, |next| known.min(next)),
            magic: 2,
            crc: 0,
            attributes: 0,
            last_offset_delta: i32::try_from(last_offset.checked_sub(first)?).ok().filter(|delta| *delta >= 0)?,
            base_timestamp: batch::NO_TIMESTAMP,
            max_timestamp: batch::NO_TIMESTAMP,
            producer_id: batch::NO_PRODUCER_ID,
            producer_epoch: batch::NO_PRODUCER_EPOCH,
            base_sequence: batch::NO_SEQUENCE,
            record_count: 0,
        };
        let bytes = rebuild(&like, &[], None).ok()?;
        Some((batch::check(&bytes).ok()?, bytes))
    }

    /// The leader epoch with which the segment of this offset begins, if that can be read.
    fn first_epoch(&self, base_offset: i64) -> Option<i32> {
        let segment = self.target.segments.iter().find(|segment| segment.base_offset == base_offset)?;
        if self.owners.other(segment).ok()?.is_some() {
            return None;
        }
        let file = self.target.files.open(&segment.path, OpenMode::Read).ok()?;
        let mut bytes = [0; batch::HEADER_BYTES];
        files::read_exact_at(&*file, &mut bytes, 0).ok()?;
        let first = BatchHeader::parse(&bytes).ok()?;
        (first.magic == 2 && first.base_offset == base_offset).then_some(first.leader_epoch)
    }

    fn write_snapshot(&self, offset: i64) -> Result<(), InspectError> {
        let path = self.to.join(segment_file_name(offset, producers::EXTENSION));
        let bytes = producers::encode_snapshot(&self.producers.snapshot());
        write_synced(&*self.target.files, &path, &bytes).map_err(failed)
    }

    fn write_epochs(&mut self, end: i64) -> Result<(), InspectError> {
        let mut epochs = match self.epochs.take() {
            Some(epochs) if !self.epochs_contradicted => epochs,
            _ => std::mem::take(&mut self.epochs_of_batches),
        };
        epochs.truncate_from(end + 1);
        if let Some(last) = self.previous.filter(|last| last.record_count == 0) {
            // It stands for what is lost, whoever wrote that.
            epochs.truncate_from(last.base_offset + 1);
        }
        let path = self.to.join(epochs::FILE_NAME);
        write_synced(&*self.target.files, &path, epochs.encode().as_bytes()).map_err(failed)
    }
}

/// The offsets that a damaged batch says it holds, if it can stand where it does.
fn claim(damage: &Damage, next: Option<i64>) -> Option<OffsetRange> {
    let header = damage.header.as_ref().filter(|header| header.magic == 2 && header.size() as u64 == damage.size)?;
    // A larger batch cannot be, and a damaged delta should not make everything lost.
    let delta =
        u32::try_from(header.last_offset_delta).ok().filter(|delta| u64::from(*delta) < damage.size.max(1 << 16))?;
    let (from, to) = (header.base_offset, header.base_offset.checked_add(i64::from(delta))?);
    let limit = next.unwrap_or(i64::MAX);
    let exact = next.is_some() || from == damage.expected_offset;
    (exact && from >= damage.expected_offset && to < limit).then_some(OffsetRange { from, to })
}

fn unreadable(position: u64, header: BatchHeader, bytes: &[u8], detail: String) -> Damage {
    Damage {
        position,
        size: bytes.len() as u64,
        expected_offset: header.base_offset,
        header: Some(header),
        kind: super::FaultKind::Records,
        detail,
        mended: None,
    }
}

/// One after the last offset that a partition must have had, as its snapshots, the checkpoints beside it and, if asked, its last index tell.
fn known_end(target: &Target, by_index: bool) -> Result<i64, InspectError> {
    if !target.is_partition() {
        return Ok(0);
    }
    let snapshot = target.snapshots.last().copied();
    let indexed = target.segments.last().filter(|_| by_index).and_then(|segment| {
        let bytes = target.small_file(&segment.sibling("index")).ok().flatten()?;
        let last = decode_entries::<OffsetEntry>(&bytes).ok()?.last().copied()?;
        Some(segment.base_offset + i64::from(last.relative_offset) + 1)
    });
    let root = target.root();
    let checkpointed = target.partition().and_then(|partition| {
        let offset = |name| checkpoint::read_offsets(&*target.files, &root, name).ok()?.get(&partition).copied();
        offset(checkpoint::RECOVERY_POINTS).max(offset(checkpoint::HIGH_WATERMARKS))
    });
    Ok(snapshot.max(indexed).max(checkpointed).unwrap_or(0))
}

/// Locks the data root that a partition lies in, if it is one: nothing may run on it.
fn lock_root(files: &dyn Files, partition: &Path) -> Result<Option<Box<dyn files::Lock>>, InspectError> {
    let lock = files::parent(partition).join(checkpoint::LOCK);
    if !files::exists(files, &lock).map_err(at(&lock))? {
        return Ok(None);
    }
    match files.lock(&lock) {
        Ok(lock) => Ok(Some(lock)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            let reason = "a broker is running on it; stop it first, or repair a copy with --out".to_owned();
            Err(InspectError::Refused { path: partition.to_owned(), reason })
        }
        Err(source) => Err(InspectError::Io { path: lock, source }),
    }
}

/// Undoes the first of two renames, if a repair in place was cut short between them.
fn put_back(files: &dyn Files, path: &Path) -> Result<(), InspectError> {
    if files::exists(files, path).map_err(at(path))? {
        return Ok(());
    }
    let prefix = format!("{}.", name(path));
    let dir = files::parent(path);
    let entries = files.list(dir).unwrap_or_default();
    let mut strays =
        entries.iter().filter(|entry| entry.is_dir && entry.name.starts_with(&prefix) && entry.name.ends_with(STRAY));
    if let Some(newest) = strays.next_back() {
        files.rename(&dir.join(&newest.name), path).map_err(at(path))?;
        files.sync_dir(dir).map_err(at(dir))?;
    }
    Ok(())
}

/// A name for a folder beside `path` that nothing has.
fn unused_name(files: &dyn Files, path: &Path, suffix: &str) -> Result<PathBuf, InspectError> {
    for number in 0u32.. {
        let candidate = path.with_file_name(format!("{}.{number:032x}{suffix}", name(path)));
        if !files::exists(files, &candidate).map_err(at(&candidate))? {
            return Ok(candidate);
        }
    }
    Err(InspectError::InTheWay(path.to_owned()))
}

fn remove_folder(files: &dyn Files, path: &Path) -> std::io::Result<()> {
    for entry in files.list(path)? {
        files.remove_file(&path.join(entry.name))?;
    }
    files.remove_dir(path)
}

fn failed(failure: IoFailure) -> InspectError {
    InspectError::Io { path: failure.path, source: failure.error }
}
