//! Opening one segment: looked at if it was sealed, scanned if a crash may have torn it.
//!
//! Owns: whether what a scan came upon is a torn write or corruption, and the segment's files as the log goes on with them. Refuses: the
//! order of segments (`../recovery.rs`). Read next: `../scan.rs`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::history::Upon;
use super::owner::{self, Folder};
use super::{CrcDisagreement, CutTail, Opening, renewal};
use crate::active::{Active, crc_header, note_failed_sync, read_crc_file};
use crate::checkpoint::{parse_segment_file_name, segment_file_name};
use crate::crcfile::{self, CrcEntry, CrcFile, RunningCrc, STEP_BYTES};
use crate::error::{Corruption, During, IoFailure, LogError, OpenError, ReadError};
use crate::files::{self, Metadata, OpenMode};
use crate::index::{IndexBuilder, IndexEntry, OffsetEntry};
use crate::metrics as names;
use crate::prefix;
use crate::reader::RecentEnds;
use crate::scan::{self, Checked, CutIndex, EpochAudit, IndexAudit, ScanStart, SegmentScan};
use crate::segment::Segment;

impl Opening<'_> {
    /// The end of a process may have come between the write of a file and its sync.
    pub(super) fn sync_file(&self, base_offset: i64, extension: &str) -> Result<(), OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, extension));
        match self.place.files.open(&path, OpenMode::Write).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => Ok(result.during("sync", &path)?),
        }
    }

    /// A segment that was complete when it was last written: its ends are looked at, not what lies between.
    /// Also returns whether the log ends in it although later segments exist.
    pub(super) fn check(&mut self, base_offset: i64, later: &[i64]) -> Result<(OpenedSegment, bool), OpenError> {
        let next_base = later.first().copied();
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let metadata = self.place.files.metadata(&path).during("look at", &path)?;
        if !self.hints.clean_shutdown && next_base.is_some_and(|next| next >= self.hints.recovery_point) {
            [".index", ".timeindex", ".crc"].iter().try_for_each(|extension| self.sync_file(base_offset, extension))?;
        }
        let mut checked = self.check_ends(base_offset, metadata, next_base);
        if let Ok(Checked::WrongEpoch(batch)) = checked {
            self.settle_epochs(Upon::Batch(batch))?;
            checked = self.check_ends(base_offset, metadata, next_base);
        }
        let complete = matches!(checked, Ok(Checked::Complete(_)));
        if !complete && !self.hints.clean_shutdown && self.first_written(later)?.is_none() {
            // The crash came when the next segment had been begun and this one was not sealed yet.
            return self.scan(base_offset, later);
        }
        match checked? {
            Checked::Complete(complete) => {
                let active = Active {
                    segment: complete.segment,
                    size: complete.size,
                    reserved: metadata.len,
                    index: complete.index,
                    crc: complete.crc,
                    first_timestamp: complete.first_timestamp,
                    begun_ms: self.now_ms,
                    last_append_ms: metadata.modified_ms,
                    recycled: false,
                    recent: RecentEnds::default(),
                    unflushed: None,
                    checkpointed: complete.size,
                };
                Ok((OpenedSegment { active, next_offset: complete.next_offset, complete: true }, false))
            }
            // Nothing was known of epochs any more.
            Checked::WrongEpoch(batch) => Err(batch.into()),
            checked => {
                let cut = match &checked {
                    Checked::CutIndex(cut) => Some(cut),
                    _ => None,
                };
                let why = match &checked {
                    Checked::Suspect(why) => why,
                    _ => "a file made from it was cut",
                };
                tracing::info!(path = %path.display(), why, "reading the segment whole");
                let rebuilt_before = self.report.rebuilt.len();
                if let Some(cut) = cut.filter(|cut| cut.extension != ".crc") {
                    self.name_cut(base_offset, cut);
                }
                self.announce(metadata.len);
                let scanned = self.scan_segment(base_offset, i64::MAX, next_base, None)?;
                // Behind zeros that were reserved, checksums lack nothing.
                if let Some(cut) = cut.filter(|cut| cut.extension == ".crc" && scanned.fault.is_none()) {
                    self.name_cut(base_offset, cut);
                }
                if why.contains("index") && self.report.rebuilt.len() == rebuilt_before {
                    let extension = if why.contains("time") { "timeindex" } else { "index" };
                    self.report.rebuilt.push(path.with_extension(extension));
                }
                let zeros_follow = scanned.fault.as_ref().is_some_and(|fault| fault.zeros_follow);
                if let Some(fault) = scanned.fault.as_ref().filter(|_| !zeros_follow) {
                    return Err(fault.corruption(&path).into());
                }
                self.check_loss(&path, &scanned, later)?;
                Ok((self.adopt(scanned, metadata.modified_ms, false)?, false))
            }
        }
    }

    fn name_cut(&mut self, base_offset: i64, cut: &CutIndex) {
        let CutIndex { extension, position } = *cut;
        let path = self.place.dir.join(segment_file_name(base_offset, extension));
        let why = match extension {
            // Nothing in a folder tells one from the other.
            OffsetEntry::EXTENSION => "entries are missing behind its end, unless index.interval.bytes was larger",
            _ => "entries are missing behind its end",
        };
        tracing::warn!(path = %path.display(), position, why, "made anew from the log");
        self.report.rebuilt.push(path);
    }

    fn check_ends(&self, base_offset: i64, metadata: Metadata, next_base: Option<i64>) -> Result<Checked, OpenError> {
        let known = self.epochs_known.then_some(&self.epochs);
        scan::check_segment(self.place, base_offset, metadata, next_base, known)
    }

    /// A segment that a crash may have torn. Also returns whether the log ends in it although later segments exist.
    pub(super) fn scan(&mut self, base_offset: i64, later: &[i64]) -> Result<(OpenedSegment, bool), OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let metadata = self.place.files.metadata(&path).during("look at", &path)?;
        let (recovery_point, next_base) = (self.hints.recovery_point, later.first().copied());
        let mut scanned =
            self.scan_segment(base_offset, recovery_point, next_base, self.start_of_scan(base_offset)?)?;
        if scanned.began > 0 && scanned.fault.as_ref().is_some_and(|fault| fault.expected_offset < recovery_point) {
            // The damage may begin further ahead.
            scanned = self.scan_segment(base_offset, recovery_point, next_base, None)?;
        }
        let mut ends_here = false;
        let end = scanned.next_offset;
        if scanned.fault.is_none() && later.first().is_some_and(|next| *next != end) {
            match self.first_written(later)? {
                // Segments were begun for a group whose beginning was never written here.
                None => ends_here = true,
                Some(_) if self.place.config.cleanup.compact => {}
                // Compaction may have left this, when it was set; never around the recovery point, which is the end of a batch.
                Some(_) if later.first().is_some_and(|next| *next <= recovery_point) => {}
                Some(goes_on) => {
                    let detail = format!("it ends before offset {end}; {} goes on behind it", goes_on.display());
                    return Err(Corruption { path, position: scanned.end, offset: Some(end), detail }.into());
                }
            }
        }
        if self.first_written(later)?.is_some() {
            self.check_loss(&path, &scanned, later)?;
        }
        if let Some(fault) = &scanned.fault {
            // Where the next segment goes on exactly here, what follows was reserved, or is stale.
            let continued = later.first() == Some(&fault.expected_offset);
            let only_reserved = fault.zeros_follow && later.is_empty();
            if !continued && !only_reserved {
                self.judge(&path, &scanned, later)?;
                ends_here = true;
            }
            if !continued && !fault.zeros_follow && !fault.stale_follows {
                let bytes = scanned.len - fault.position;
                tracing::warn!(path = %path.display(), position = fault.position, bytes, detail = fault.detail, "cut a torn write");
                metrics::counter!(names::CUT_BYTES).increment(bytes);
                self.report.cut = Some(CutTail {
                    path,
                    position: fault.position,
                    bytes,
                    next_offset: fault.expected_offset,
                    detail: fault.detail.clone(),
                });
            }
        }
        Ok((self.adopt(scanned, metadata.modified_ms, true)?, ends_here))
    }

    /// A segment that was flushed to its end may have space behind it that was reserved and not given back yet. Bytes that were
    /// written and are lost can look alike: what is known of the segment's end tells one from the other.
    fn check_loss(&self, path: &Path, scanned: &SegmentScan, later: &[i64]) -> Result<(), OpenError> {
        let (end, offset) = (scanned.end, scanned.next_offset);
        let corruption =
            |detail| Err(Corruption { path: path.into(), position: end, offset: Some(offset), detail }.into());
        let zeros_follow = scanned.fault.as_ref().is_some_and(|fault| fault.zeros_follow);
        let compacted = self.place.config.cleanup.compact;
        // Kafka may have compacted the segment, and leaves no zeros.
        if compacted && !zeros_follow {
            return Ok(());
        }
        // An entry is made of bytes that were appended, and the space behind the last one is given back before it gets its own.
        match self.recorded_end(scanned.base_offset)? {
            Some(recorded) if recorded > end => {
                corruption(format!("the batches end here, though {recorded} bytes were written"))
            }
            None if zeros_follow && !compacted && later.first().is_some_and(|next| *next != offset) => {
                corruption(format!(
                    "nothing but zeros from here on, though offset {offset} is next and the segment behind it begins at {}",
                    later.first().copied().unwrap_or(offset)
                ))
            }
            _ => Ok(()),
        }
    }

    /// How many bytes of a segment its checksum file knows of, if it is this segment's.
    fn recorded_end(&self, base_offset: i64) -> Result<Option<u64>, OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, ".crc"));
        let bytes = match files::read(&**self.place.files, &path, 1 << 20) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::FileTooLarge) => return Ok(None),
            Err(error) => return Err(IoFailure::new("read", &path, error).into()),
        };
        // An entry that is whole counts, whatever the rest is.
        let ours = crc_header(self.place.identity, base_offset);
        let found = crcfile::decode_leading(&bytes).ok().filter(|found| found.header == ours);
        Ok(found.map(|found| found.entries.last().map_or(0, |last| u64::from(last.position))))
    }

    /// Whether an invalid batch can be a torn write; if not, it is corruption.
    fn judge(&self, path: &Path, scanned: &SegmentScan, later: &[i64]) -> Result<(), OpenError> {
        let Some(fault) = &scanned.fault else { return Ok(()) };
        if fault.expected_offset < self.hints.recovery_point {
            return Err(fault.corruption(path).into());
        }
        let beyond = fault.position.saturating_add(self.place.config.unflushed_limit_bytes);
        let file = self.place.files.open(path, OpenMode::Read).during("open", path)?;
        let found = scan::find_batch(&*file, path, beyond, scanned.len, fault.expected_offset)?;
        if let Some(position) = found {
            let mut corruption = fault.corruption(path);
            corruption.detail.push_str(&format!("; a valid batch follows at position {position}"));
            return Err(corruption.into());
        }
        // A segment is flushed before the next one is written.
        if let Some(goes_on) = self.first_written(later)? {
            let mut corruption = fault.corruption(path);
            corruption.detail.push_str(&format!("; {} goes on behind it", goes_on.display()));
            return Err(corruption.into());
        }
        Ok(())
    }

    /// The first of these segments that begins with a batch of its own.
    fn first_written(&self, bases: &[i64]) -> Result<Option<PathBuf>, OpenError> {
        for base_offset in bases {
            let path = self.place.dir.join(segment_file_name(*base_offset, ".log"));
            let file = self.place.files.open(&path, OpenMode::Read).during("open", &path)?;
            let len = file.len().during("look at", &path)?;
            if scan::batch_at(&*file, &path, 0, len)?.is_some_and(|header| header.base_offset >= *base_offset) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    pub(super) fn announce(&mut self, bytes: u64) {
        self.announced_bytes += bytes;
        self.progress.announce(bytes);
    }

    /// Where the scan of a segment may begin, if not at its beginning.
    fn start_of_scan(&self, base_offset: i64) -> Result<Option<ScanStart>, OpenError> {
        // After a failed sync all of it goes to a new file, and has to be known for that.
        let from_within = base_offset < self.hints.recovery_point && !self.failed_syncs.contains(&base_offset);
        let Some(snapshot) = self.snapshot.filter(|_| from_within) else { return Ok(None) };
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let file = self.place.files.open(&path, OpenMode::Read).during("open", &path)?;
        Ok(prefix::find(self.place, &*file, base_offset, self.hints.recovery_point.min(snapshot))?)
    }

    fn scan_segment(
        &mut self,
        base_offset: i64,
        recovery_point: i64,
        next_base: Option<i64>,
        start: Option<ScanStart>,
    ) -> Result<SegmentScan, OpenError> {
        let path = self.place.dir.join(segment_file_name(base_offset, ".log"));
        let file = self.place.files.open(&path, OpenMode::Write).during("open", &path)?;
        let rules = scan::ScanRules {
            base_offset,
            // Compaction leaves gaps; nothing else does.
            exact_from: if self.place.config.cleanup.compact { i64::MAX } else { recovery_point },
            compacted: self.place.config.cleanup.compact,
            next_base,
            // After a failed sync, all of it goes to a new file.
            rewrite_from: if self.failed_syncs.contains(&base_offset) { i64::MAX } else { recovery_point },
        };
        let found = |extension| {
            let path = self.place.dir.join(segment_file_name(base_offset, extension));
            match files::read(&**self.place.files, &path, 1 << 30) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                // No index is as large: half an entry is none either.
                Err(error) if error.kind() == ErrorKind::FileTooLarge => Ok(Some(vec![0])),
                Err(error) => Err(IoFailure::new("read", &path, error)),
            }
        };
        let start = match start {
            Some(start) => start,
            None => {
                let crc = RunningCrc::new(&crc_header(self.place.identity, base_offset));
                let index = IndexBuilder::new(base_offset, self.place.config.index_interval_bytes);
                let audit = IndexAudit::new(base_offset, found(".index")?, found(".timeindex")?, i64::MIN);
                ScanStart::beginning(index, audit, crc, base_offset)
            }
        };
        let exact_below = if self.epochs_known { recovery_point } else { i64::MIN };
        let mut epochs = EpochAudit { epochs: &mut self.epochs, exact_below, changed: false };
        let (progress, announced) = (self.progress, &mut self.announced_bytes);
        let mut behind = |bytes: u64| {
            let bytes = bytes.min(*announced);
            *announced -= bytes;
            progress.behind(bytes);
        };
        behind(start.position);
        let scanned =
            scan::scan_segment(&*file, &path, rules, start, &mut epochs, |header| behind(header.size() as u64))?;
        self.epochs_changed |= epochs.changed;
        if let Some(fault) = scanned.fault.as_ref().filter(|fault| fault.only_epoch) {
            // Either it is the batch, which ends the matter, or the checkpoint, which counts for nothing then.
            let (position, offset, detail) = (fault.position, Some(fault.expected_offset), fault.detail.clone());
            self.settle_epochs(Upon::Batch(Corruption { path: path.clone(), position, offset, detail }))?;
            return self.scan_segment(base_offset, recovery_point, next_base, None);
        }
        behind(scanned.len - scanned.end);
        for (extension, wrong) in [(".index", scanned.audit.wrong_offsets), (".timeindex", scanned.audit.wrong_times)] {
            let path = self.place.dir.join(segment_file_name(base_offset, extension));
            if wrong && !self.report.rebuilt.contains(&path) {
                tracing::warn!(path = %path.display(), "damaged; made anew from the log");
                self.report.rebuilt.push(path);
            }
        }
        self.report.scanned_bytes += scanned.end - scanned.began;
        self.report.scanned_batches += scanned.batches;
        metrics::counter!(names::RECOVERED_BYTES).increment(scanned.end - scanned.began);
        Ok(scanned)
    }

    /// Takes a scanned segment as it is: cut to its valid batches, its derived files made from them, everything synced.
    /// `torn` if the crash may have come while its files were written.
    fn adopt(&mut self, scanned: SegmentScan, modified_ms: i64, torn: bool) -> Result<OpenedSegment, OpenError> {
        let base_offset = scanned.base_offset;
        let segment =
            Segment::new(Arc::clone(self.place.files), Arc::clone(self.place.dir), base_offset, scanned.end, 0, 0);
        let path = segment.log_path();
        // Before anything is changed that would speak for or against it.
        self.compare_crc(&segment.path(".crc"), &scanned.crc, base_offset, scanned.flushed, torn)?;
        if self.failed_syncs.contains(&base_offset)
            && let Some(doubtful) = renewal::renew_or_write_again(self.place, base_offset, &scanned.crc)?
        {
            self.failed_syncs.retain(|failed| *failed != base_offset);
            self.doubtful.push(doubtful);
        }
        let file = self.place.files.open(&path, OpenMode::Write).during("open", &path)?;
        if scanned.len > scanned.end {
            file.set_len(scanned.end).during("cut", &path)?;
            if scanned.fault.as_ref().is_some_and(|fault| fault.zeros_follow || fault.stale_follows) {
                self.report.finished_trims.push(path.clone());
            }
        }
        if let Err(failure) = file.sync_all().during("sync", &path) {
            note_failed_sync(&segment);
            return Err(failure.into());
        }
        let mut index = scanned.index;
        let mut entries = scanned.entries;
        index.seal(&mut entries);
        segment.rewrite_indexes(entries)?;
        if scanned.unchecked > 0 {
            segment.verified.distrust(scanned.unchecked);
            self.unchecked = Some((Arc::clone(&segment), scanned.unchecked));
        }
        let mut active = Active {
            segment,
            size: scanned.end,
            reserved: scanned.end,
            index,
            crc: Some(scanned.crc),
            first_timestamp: scanned.first_timestamp,
            begun_ms: self.now_ms,
            last_append_ms: modified_ms,
            recycled: false,
            recent: RecentEnds::default(),
            unflushed: None,
            checkpointed: scanned.began,
        };
        let complete = match active.seal(&**self.place.files, self.place.identity) {
            Err(LogError::FullDisk(full)) => {
                tracing::warn!(%full, "a segment is opened without it; it is written once there is room");
                false
            }
            sealed => sealed.map(|()| true)?,
        };
        Ok(OpenedSegment { active, next_offset: scanned.next_offset, complete })
    }

    /// Whether a checksum file may be what a crash left of a write: short, or with zeros where an entry should be.
    fn looks_torn(&self, path: &Path) -> Result<bool, OpenError> {
        let bytes = files::read(&**self.place.files, path, 1 << 20).during("read", path)?;
        let entry_bytes = crcfile::ENTRY_BYTES;
        let is_short = bytes.len() < crcfile::HEADER_BYTES || !bytes.len().is_multiple_of(entry_bytes);
        // The header of a first partition's first segment has as many zeros.
        let (header, entries) = bytes.split_at(crcfile::HEADER_BYTES.min(bytes.len()));
        let mut parts = entries.chunks(entry_bytes).chain([header]);
        Ok(is_short || parts.any(|part| part.iter().all(|byte| *byte == 0)))
    }

    /// Reports where a checksum file disagrees with a log of valid batches. `flushed`: bytes that lie below the recovery point.
    fn compare_crc(
        &mut self,
        path: &Path,
        computed: &RunningCrc,
        base_offset: i64,
        flushed: u64,
        torn: bool,
    ) -> Result<(), OpenError> {
        let found = read_crc_file(&**self.place.files, path)?;
        let torn = torn && matches!(found, Some(Err(_))) && self.looks_torn(path)?;
        let log = path.with_extension("log");
        let ours = crc_header(self.place.identity, base_offset);
        let (position, detail) = match &found {
            None => return Ok(()),
            Some(Err(_)) if torn => return Ok(()),
            Some(Err(fault)) => (0, fault.to_string()),
            Some(Ok(file)) if file.header != ours => (0, format!("it was written for {:?}", file.header)),
            Some(Ok(file)) => match self.first_wrong(file, computed, &log)? {
                // It may have been made of bytes that are lost; it may also never have been of these.
                None if file.entries.first().is_some_and(|first| u64::from(first.position) > computed.position()) => {
                    return self.check_owner(&log, base_offset, computed);
                }
                None => return Ok(()),
                Some(entry) => (entry.position, "the bytes up to here are others".to_owned()),
            },
        };
        let file = found.as_ref().and_then(|found| found.as_ref().ok());
        let from_the_first = file.and_then(|file| file.entries.first()).is_none_or(|first| position <= first.position);
        if from_the_first {
            self.check_owner(&log, base_offset, computed)?;
        }
        let position = u64::from(position);
        if let Some(last) = file.filter(|file| file.header == ours).and_then(|file| file.entries.last()) {
            let written = u64::from(last.position);
            // Compaction makes a segment shorter, never the one that is written.
            let may_be_compacted = self.place.config.cleanup.compact && self.bases.last() != Some(&base_offset);
            let as_long = written == computed.position() || (written > computed.position() && !may_be_compacted);
            if position <= flushed && as_long {
                // Changed in place, in bytes that batch checksums leave out.
                let detail = format!("bytes before here are not those that were written, as {} says", path.display());
                return Err(Corruption { path: log, position, offset: None, detail }.into());
            }
        }
        tracing::warn!(path = %path.display(), position, detail, "the checksum file disagrees with valid batches");
        self.report.crc_disagreements.push(CrcDisagreement { path: path.into(), position, detail });
        Ok(())
    }

    /// Valid batches that do not begin as they should may be another partition's.
    fn check_owner(&self, log: &Path, base_offset: i64, computed: &RunningCrc) -> Result<(), OpenError> {
        let folder = Folder::of(self.place, &self.progress.neighbours, self.now_ms);
        let Some(other) = owner::other_owner(folder, base_offset, computed.position())? else {
            return Ok(());
        };
        let detail = format!("every batch is valid, but this is no file of this partition: {other}");
        Err(Corruption { path: log.into(), position: 0, offset: Some(base_offset), detail }.into())
    }

    /// The first entry of a checksum file that disagrees with the log.
    fn first_wrong(&self, file: &CrcFile, computed: &RunningCrc, log: &Path) -> Result<Option<CrcEntry>, IoFailure> {
        let right: BTreeMap<u32, u32> =
            computed.pending().chain([computed.entry()]).map(|entry| (entry.position, entry.crc)).collect();
        let wrong = file.entries.iter().find(|entry| right.get(&entry.position).is_some_and(|crc| *crc != entry.crc));
        let Some((last, before)) = file.entries.split_last().filter(|_| wrong.is_none()) else {
            return Ok(wrong.copied());
        };
        // The last one may stand where a log ended that goes on now.
        let from = before.last().map_or(0, |before| before.position);
        let is_known = right.contains_key(&last.position) || u64::from(last.position) > computed.position();
        if is_known || u64::from(last.position - from) > STEP_BYTES {
            return Ok(None);
        }
        let mut running = match before.last() {
            Some(entry) => RunningCrc::resume(*entry, before.len()),
            None => RunningCrc::new(&file.header),
        };
        let mut bytes = vec![0; (last.position - from) as usize];
        let opened = self.place.files.open(log, OpenMode::Read).during("open", log)?;
        files::read_exact_at(&*opened, &mut bytes, u64::from(from)).during("read", log)?;
        running.update(&bytes);
        Ok((running.entry() != *last).then_some(*last))
    }

    /// A walk over headers that came upon something else than a batch says where; the damage may lie further ahead, in a
    /// length. A scan finds it.
    pub(super) fn locate(&mut self, error: ReadError) -> OpenError {
        let error = from_reading(error);
        let OpenError::Corruption(corruption) = &error else { return error };
        let name = corruption.path.file_name().and_then(|name| name.to_str());
        let Some((base_offset, ".log")) = name.and_then(parse_segment_file_name) else { return error };
        match self.scan_segment(base_offset, i64::MAX, None, None) {
            Ok(SegmentScan { fault: Some(fault), .. }) if fault.position < corruption.position => {
                fault.corruption(&corruption.path).into()
            }
            _ => error,
        }
    }
}

/// A segment that was opened, and where it ends.
pub(super) struct OpenedSegment {
    pub(super) active: Active,
    pub(super) next_offset: i64,
    /// Its indexes and checksums are on the disk.
    pub(super) complete: bool,
}

pub(super) fn from_reading(error: ReadError) -> OpenError {
    match error {
        ReadError::Io(failure) => failure.into(),
        ReadError::Corruption(corruption) => corruption.into(),
        error => OpenError::Misuse(error.to_string()),
    }
}
