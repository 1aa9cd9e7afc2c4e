//! The data root of a broker: partition folders, the checkpoints beside them, and whose they are.
//!
//! Owns: the lock that keeps a second broker out, the identity in `meta.properties`, the clean-shutdown marker, the list of
//! partition folders, and the checkpoints. Those name a partition by its topic's name, so that a topic which is made anew would
//! inherit them: [`DataDir::admit`] sees to it that it does not. A damaged checkpoint costs work and nothing else, but for the one that
//! says where the logs begin: it is kept twice, and where both are damaged no log is opened. Refuses: the logs themselves (`log.rs`) and which partitions ought to exist (the metadata says). Everything
//! that Headwater puts at the root is a file, because Kafka fails on a folder that it cannot parse. Read next: `log.rs`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use headwater_proto::TopicId;
use imbl::OrdMap;

use crate::checkpoint::{
    self, CLEAN_SHUTDOWN, CLEANER_OFFSETS, CheckpointError, FORMAT_VERSION, HIGH_WATERMARKS, KeptReplica, KeptReplicas,
    LOCK, LOG_START_COPY, LOG_START_OFFSETS, LogStarts, META_PROPERTIES, MetaProperties, PartitionOffsets,
    RECOVERY_POINTS,
};
use crate::config::OpenHints;
use crate::epochs::TextFault;
use crate::error::{During, IoFailure, OpenError, UnknownLogStarts};
use crate::files::{self, Files, Lock, is_exhausted};

/// What a data root is called when it is made.
#[derive(Debug, Clone)]
pub struct NewIdentity {
    /// The cluster that it belongs to from then on.
    pub cluster_id: String,
    /// The broker that it belongs to. A root that exists must belong to the same.
    pub broker_id: u32,
    /// Its own identity.
    pub directory_id: String,
}

/// Why a data root could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// The disk or the operating system.
    #[error(transparent)]
    Io(#[from] IoFailure),
    /// Another process has it.
    #[error("{} is in use by another broker (its .lock is held)", .0.display())]
    Locked(PathBuf),
    /// `meta.properties` makes no sense.
    #[error(transparent)]
    Damaged(#[from] CheckpointError),
    /// Kafka made it.
    #[error("{} was made by Kafka, as {} has no headwater.format; copy its logs into a data directory with `headwater import`",
        .0.display(), .0.join(META_PROPERTIES).display())]
    Kafka(PathBuf),
    /// A newer Headwater made it.
    #[error("{} has format {found}, as headwater.format in {} says; this build knows formats up to {FORMAT_VERSION}",
        path.display(), path.join(META_PROPERTIES).display())]
    Newer {
        /// The root.
        path: PathBuf,
        /// Its format version.
        found: u32,
    },
    /// It belongs to another broker.
    #[error("{} belongs to broker {found}, as node.id in {} says, not to broker {expected}",
        path.display(), path.join(META_PROPERTIES).display())]
    OtherBroker {
        /// The root.
        path: PathBuf,
        /// Whose it is.
        found: u32,
        /// Who asked.
        expected: u32,
    },
    /// Where its logs begin is not known.
    #[error(transparent)]
    UnknownLogStarts(#[from] UnknownLogStarts),
    /// It holds partitions, but nothing says whose they are.
    #[error("{} holds partition folders but no meta.properties: nobody can say whose they are", .0.display())]
    Unidentified(PathBuf),
}

/// A partition's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionFolder {
    /// The topic's name.
    pub topic: String,
    /// The partition's number.
    pub partition: u32,
    /// Where it is.
    pub path: PathBuf,
    /// The topic that its `partition.metadata` names; `None` if there is none.
    pub topic_id: Option<TopicId>,
}

pub(crate) fn retain<T: Clone>(known: &mut OrdMap<(String, u32), T>, keep: impl Fn(&(String, u32)) -> bool) {
    let gone: Vec<_> = known.keys().filter(|key| !keep(key)).cloned().collect();
    for key in gone {
        known.remove(&key);
    }
}

/// Whether two maps say the same. It takes as long as they differ: what one has of the other is not looked at.
fn is_same<T: Clone + PartialEq>(one: &OrdMap<(String, u32), T>, other: &OrdMap<(String, u32), T>) -> bool {
    one.diff(other).next().is_none()
}

/// What the checkpoint files say of partitions. A copy costs nothing, however many there are.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Checkpoints {
    /// How far each log was flushed.
    pub recovery_points: PartitionOffsets,
    /// Where each log begins.
    pub log_start_offsets: PartitionOffsets,
    /// Each log's high watermark.
    pub high_watermarks: PartitionOffsets,
    /// Up to where each compacted log is clean.
    pub cleaner_offsets: PartitionOffsets,
    /// What is known of each replica, whatever becomes of its folder.
    pub replicas: KeptReplicas,
}

impl Checkpoints {
    /// Drops what is said of every partition that is not to be kept.
    pub fn retain(&mut self, keep: impl Fn(&(String, u32)) -> bool) {
        let Checkpoints { recovery_points, log_start_offsets, high_watermarks, cleaner_offsets, replicas } = self;
        for offsets in [recovery_points, log_start_offsets, high_watermarks, cleaner_offsets] {
            retain(offsets, &keep);
        }
        retain(replicas, &keep);
    }

    /// The files, each with what it says (that of the log starts with its copy).
    fn files(&self) -> [(&'static str, &PartitionOffsets); 4] {
        [
            (RECOVERY_POINTS, &self.recovery_points),
            (LOG_START_OFFSETS, &self.log_start_offsets),
            (HIGH_WATERMARKS, &self.high_watermarks),
            (CLEANER_OFFSETS, &self.cleaner_offsets),
        ]
    }
}

/// The checkpoints as they are to be, and as they are on the disk.
#[derive(Debug)]
struct Checkpointing {
    now: Checkpoints,
    written: Checkpoints,
    /// `now` was changed since it was last written.
    changed: bool,
    /// The log starts stand in both of their files.
    log_starts_twice: bool,
    /// The replicas stand in their file.
    replicas_stand: bool,
    /// The last write failed: nobody knows what the files say.
    unsure: bool,
}

/// An open data root. The lock is held until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    files: Arc<dyn Files>,
    path: PathBuf,
    meta: MetaProperties,
    was_clean: bool,
    checkpoints: Mutex<Checkpointing>,
    /// Held while checkpoints are written: they share the names of their temporary files, and a later one must not be replaced
    /// by an earlier one.
    writing: Mutex<()>,
    faults: Vec<CheckpointError>,
    /// Where logs begin that were there before is not known: nothing is said of it until somebody puts that right.
    unknown_log_starts: bool,
    /// What the replicas were when the last broker ended here is known.
    knows_replicas: bool,
    _lock: Box<dyn Lock>,
}

impl DataDir {
    /// Locks and opens a data root, or makes one. The clean-shutdown marker is noted and removed (and the directory synced) before
    /// anything else can be written. Folders of partitions whose deletion was cut short are removed.
    pub fn open(files: Arc<dyn Files>, path: &Path, identity: &NewIdentity) -> Result<DataDir, DataDirError> {
        create_root(&*files, path)?;
        let lock = match files.lock(&path.join(LOCK)) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(DataDirError::Locked(path.into())),
            Err(error) => return Err(IoFailure::new("lock", &path.join(LOCK), error).into()),
        };
        let meta = identify(&*files, path, identity)?;
        let mut faults = Vec::new();
        let mut offsets = |name| {
            checkpoint::read_offsets(&*files, path, name).unwrap_or_else(|fault| {
                faults.push(fault);
                PartitionOffsets::new()
            })
        };
        let mut written = Checkpoints {
            recovery_points: offsets(RECOVERY_POINTS),
            log_start_offsets: PartitionOffsets::new(),
            high_watermarks: offsets(HIGH_WATERMARKS),
            cleaner_offsets: offsets(CLEANER_OFFSETS),
            replicas: KeptReplicas::new(),
        };
        let knows_replicas = match checkpoint::read_replicas(&*files, path) {
            Ok(known) => {
                let is_known = known.is_some();
                written.replicas = known.unwrap_or_default();
                is_known
            }
            Err(fault) => {
                faults.push(fault);
                false
            }
        };
        let (log_starts, unknown_log_starts) = match checkpoint::read_log_starts(&*files, path) {
            Ok(known) => (known, false),
            Err(fault) => (LogStarts { fault: Some(fault), ..LogStarts::default() }, true),
        };
        if !log_starts.twice && log_starts.fault.is_none() {
            let (path, copy) = (path.join(LOG_START_OFFSETS), path.join(LOG_START_COPY));
            tracing::warn!(path = %path.display(), copy = %copy.display(), "log starts are not in both files; they are written again");
        }
        faults.extend(log_starts.fault);
        // What only found no descriptor is not damaged: nothing may count as unknown, or be written over, for that.
        let refused =
            |fault: &CheckpointError| matches!(fault, CheckpointError::Io(failure) if is_exhausted(&failure.error));
        if let Some(CheckpointError::Io(failure)) =
            faults.iter().position(refused).map(|refused| faults.swap_remove(refused))
        {
            return Err(failure.into());
        }
        let entries = files.list(path).during("list", path)?;
        let root = files.open_dir(path).during("open", path)?;
        let was_clean =
            files::remove_if_exists(&*files, &path.join(CLEAN_SHUTDOWN)).during("remove marker in", path)?;
        root.sync().during("sync", path)?;
        written.log_start_offsets = log_starts.offsets;
        let checkpoints = Mutex::new(Checkpointing {
            now: written.clone(),
            written,
            changed: false,
            log_starts_twice: log_starts.twice,
            replicas_stand: knows_replicas,
            unsure: false,
        });
        for entry in entries.iter().filter(|entry| entry.is_dir && entry.name.ends_with(DELETED)) {
            remove_folder(&*files, &path.join(&entry.name))?;
        }
        let path = path.to_path_buf();
        let writing = Mutex::default();
        Ok(DataDir {
            files,
            path,
            meta,
            was_clean,
            checkpoints,
            writing,
            faults,
            unknown_log_starts,
            knows_replicas,
            _lock: lock,
        })
    }

    /// The root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files it lies on.
    pub fn files(&self) -> &Arc<dyn Files> {
        &self.files
    }

    /// Whose it is.
    pub fn meta(&self) -> &MetaProperties {
        &self.meta
    }

    /// Whether the last broker here ended in good order, so that recovery may be skipped.
    pub fn was_clean(&self) -> bool {
        self.was_clean
    }

    /// Checkpoints that were damaged or unreadable. Without recovery points, logs are scanned whole; without cleaner offsets, a log
    /// is compacted from its beginning; log start offsets are taken from their other file.
    pub fn faults(&self) -> &[CheckpointError] {
        &self.faults
    }

    /// Whether anybody knows where the logs begin.
    ///
    /// # Errors
    /// [`UnknownLogStarts`]: both files that say it are damaged.
    pub fn check_log_starts(&self) -> Result<(), UnknownLogStarts> {
        if self.unknown_log_starts {
            let (checkpoint, copy) = (self.path.join(LOG_START_OFFSETS), self.path.join(LOG_START_COPY));
            return Err(UnknownLogStarts { checkpoint, copy });
        }
        Ok(())
    }

    /// What the checkpoints say of a partition, for opening its log.
    pub fn hints(&self, topic: &str, partition: u32) -> OpenHints {
        let checkpoints = self.checkpoints();
        let of = |offsets: &PartitionOffsets| offsets.get(&(topic.to_owned(), partition)).copied().unwrap_or(0);
        OpenHints {
            clean_shutdown: self.was_clean,
            recovery_point: of(&checkpoints.now.recovery_points),
            log_start_offset: of(&checkpoints.now.log_start_offsets),
        }
    }

    /// Up to where the cleaner's checkpoint calls a log clean.
    pub fn cleaned_until(&self, topic: &str, partition: u32) -> Option<i64> {
        self.checkpoints().now.cleaner_offsets.get(&(topic.to_owned(), partition)).copied()
    }

    /// The high watermark of a log as it was known last; 0 if it never was.
    pub fn high_watermark(&self, topic: &str, partition: u32) -> i64 {
        self.checkpoints().now.high_watermarks.get(&(topic.to_owned(), partition)).copied().unwrap_or(0)
    }

    /// What is known of a replica outside of its folder.
    pub fn replica(&self, topic: &str, partition: u32) -> Option<KeptReplica> {
        self.checkpoints().now.replicas.get(&(topic.to_owned(), partition)).copied()
    }

    /// Whether the last broker here has left word of its replicas: then one that is not named was never served.
    pub fn knows_replicas(&self) -> bool {
        self.knows_replicas
    }

    /// The recovery point of a log as it stands on the disk.
    pub fn written_recovery_point(&self, topic: &str, partition: u32) -> Option<i64> {
        self.checkpoints().written.recovery_points.get(&(topic.to_owned(), partition)).copied()
    }

    /// Makes way for the log of a topic that is `created` now, and says what the checkpoints know of it: a folder of another
    /// topic is set aside, and nothing that was said of a partition of the same name is on the disk any more when this returns.
    /// A log that was there before (not `created`) has its folder: one that names another topic is damaged, and stays where it is.
    ///
    /// # Errors
    /// [`OpenError`]: the log must not be opened. After a crash it could be taken for the other one, or records that were deleted
    /// would be served.
    pub fn admit(
        &self,
        topic: &str,
        partition: u32,
        topic_id: TopicId,
        created: bool,
        now_ms: i64,
    ) -> Result<OpenHints, OpenError> {
        let path = self.partition_path(topic, partition);
        let foreign = match checkpoint::read_partition_metadata(&*self.files, &path) {
            Ok(found) => created && found.is_some_and(|found| found != topic_id),
            Err(CheckpointError::Damaged { .. }) => false,
            Err(CheckpointError::Io(failure)) => return Err(failure.into()),
        };
        if !created {
            self.check_log_starts()?;
        }
        let key = (topic.to_owned(), partition);
        if foreign {
            self.update_checkpoints(|checkpoints| checkpoints.retain(|other| *other != key));
        }
        if self.is_stale(&key) {
            self.write_checkpoints()?;
        }
        if foreign {
            let aside = self.set_aside(topic, partition, now_ms)?;
            tracing::warn!(path = %path.display(), aside = %aside.display(), "folder of another topic of this name set aside");
        }
        Ok(self.hints(topic, partition))
    }

    /// Whether the checkpoints on the disk say something of a partition that was forgotten.
    fn is_stale(&self, key: &(String, u32)) -> bool {
        let checkpoints = self.checkpoints();
        let mut files = checkpoints.now.files().into_iter().zip(checkpoints.written.files());
        files.any(|((_, now), (_, written))| written.contains_key(key) && !now.contains_key(key))
            || checkpoints.written.replicas.contains_key(key) && !checkpoints.now.replicas.contains_key(key)
    }

    /// Where a partition's folder is, or would be.
    pub fn partition_path(&self, topic: &str, partition: u32) -> PathBuf {
        self.path.join(checkpoint::partition_dir_name(topic, partition))
    }

    /// The partition folders that exist. One whose `partition.metadata` is damaged is listed without a topic id.
    pub fn partitions(&self) -> Result<Vec<PartitionFolder>, IoFailure> {
        let mut folders = Vec::new();
        for entry in self.files.list(&self.path).during("list", &self.path)? {
            let Some((topic, partition)) = checkpoint::parse_partition_dir_name(&entry.name) else { continue };
            if entry.is_dir {
                let path = self.path.join(&entry.name);
                let topic_id = match checkpoint::read_partition_metadata(&*self.files, &path) {
                    Ok(topic_id) => topic_id,
                    Err(CheckpointError::Damaged { .. }) => None,
                    Err(CheckpointError::Io(failure)) => return Err(failure),
                };
                folders.push(PartitionFolder { topic, partition, path, topic_id });
            }
        }
        Ok(folders)
    }

    /// Changes what the checkpoints are to say. Nothing is written yet.
    pub fn update_checkpoints(&self, change: impl FnOnce(&mut Checkpoints)) {
        let mut checkpoints = self.checkpoints();
        change(&mut checkpoints.now);
        checkpoints.changed = true;
    }

    /// Lets the checkpoints say of a log no more than that it ends at `end`; if it `begins_there`, that too. True: they have to be
    /// written before the log is cut. What neither was said nor is said on the disk needs no taking back.
    pub fn lower_checkpoints(&self, key: &(String, u32), end: i64, begins_there: bool) -> bool {
        let mut checkpoints = self.checkpoints();
        let says_more = |said: &Checkpoints| {
            let offsets = [&said.recovery_points, &said.high_watermarks, &said.cleaner_offsets];
            offsets.iter().any(|offsets| offsets.get(key).is_some_and(|offset| *offset > end))
                || said.replicas.get(key).is_some_and(|kept| kept.flushed > end)
        };
        if !(begins_there || checkpoints.unsure || says_more(&checkpoints.now) || says_more(&checkpoints.written)) {
            return false;
        }
        let now = &mut checkpoints.now;
        for offsets in [&mut now.recovery_points, &mut now.high_watermarks, &mut now.cleaner_offsets] {
            if let Some(offset) = offsets.get_mut(key) {
                *offset = end.min(*offset);
            }
        }
        if let Some(kept) = now.replicas.get_mut(key) {
            kept.flushed = end.min(kept.flushed);
        }
        if begins_there {
            now.log_start_offsets.insert(key.clone(), end);
        }
        checkpoints.changed = true;
        true
    }

    /// Whether the checkpoints were changed since they were last written.
    pub fn has_unwritten_checkpoints(&self) -> bool {
        self.checkpoints().changed
    }

    /// Writes the checkpoints that differ from those on the disk. Callers wait for each other: when this returns, what was changed
    /// before it was called is on the disk.
    ///
    /// # Errors
    /// [`IoFailure`]: some may have been written. They are written again next time.
    pub fn write_checkpoints(&self) -> Result<(), IoFailure> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, written, log_starts_twice, replicas_stand) = {
            let mut checkpoints = self.checkpoints();
            checkpoints.changed = false;
            let Checkpointing { now, written, log_starts_twice, replicas_stand, .. } = &*checkpoints;
            (now.clone(), written.clone(), *log_starts_twice, *replicas_stand)
        };
        let result =
            now.files().into_iter().zip(written.files()).try_for_each(|((name, now), (_, written))| match name {
                LOG_START_OFFSETS if self.unknown_log_starts || (log_starts_twice && is_same(now, written)) => Ok(()),
                LOG_START_OFFSETS => checkpoint::write_log_starts(&*self.files, &self.path, now),
                _ if is_same(now, written) => Ok(()),
                _ => checkpoint::write_offsets(&*self.files, &self.path, name, now),
            });
        let result = result.and_then(|()| match replicas_stand && is_same(&now.replicas, &written.replicas) {
            true => Ok(()),
            false => checkpoint::write_replicas(&*self.files, &self.path, &now.replicas),
        });
        let mut checkpoints = self.checkpoints();
        match result {
            Ok(()) => {
                checkpoints.written = now;
                (checkpoints.log_starts_twice, checkpoints.replicas_stand) = (true, true);
                checkpoints.unsure = false;
            }
            Err(_) => (checkpoints.changed, checkpoints.unsure) = (true, true),
        }
        result
    }

    fn checkpoints(&self) -> MutexGuard<'_, Checkpointing> {
        self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renames a partition's folder so that nobody takes it for the partition's any more, as Kafka names strays. Returns where it
    /// is now: the name says when that was.
    pub fn set_aside(&self, topic: &str, partition: u32, now_ms: i64) -> Result<PathBuf, IoFailure> {
        let path = self.partition_path(topic, partition);
        let aside = self.path.join(name_aside(topic, partition, &unique_at(now_ms), STRAY));
        self.files.rename(&path, &aside).during("rename", &path)?;
        self.files.sync_dir(&self.path).during("sync", &self.path)?;
        Ok(aside)
    }

    /// The folders that were set aside, and when (milliseconds since 1970), where the name says so: Kafka's do not.
    pub fn strays(&self) -> Result<Vec<(PathBuf, Option<i64>)>, IoFailure> {
        let entries = self.files.list(&self.path).during("list", &self.path)?;
        let strays = entries.into_iter().filter(|entry| entry.is_dir && entry.name.ends_with(STRAY));
        Ok(strays.map(|entry| (self.path.join(&entry.name), aside_since_ms(&entry.name))).collect())
    }

    /// Removes a folder that was set aside, and everything in it.
    pub fn remove_stray(&self, stray: &Path) -> Result<(), IoFailure> {
        remove_folder(&*self.files, stray)
    }

    /// Removes a partition's folder: renamed first, so that it is gone at once even if removing is cut short. Its log must be
    /// closed or dropped; views of it stay valid. A folder that does not exist is fine.
    pub fn remove_partition(&self, topic: &str, partition: u32, topic_id: TopicId) -> Result<(), IoFailure> {
        let path = self.partition_path(topic, partition);
        let mut hex = String::new();
        for byte in topic_id.as_bytes() {
            hex.push_str(&format!("{byte:02x}"));
        }
        let aside = self.path.join(name_aside(topic, partition, &hex, DELETED));
        match self.files.rename(&path, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(IoFailure::new("rename", &path, error)),
        }
        self.files.sync_dir(&self.path).during("sync", &self.path)?;
        remove_folder(&*self.files, &aside)
    }

    /// Says that everything here is complete: every log was closed, every checkpoint written, and no partition is fenced. The next broker
    /// skips recovery. This is the last write.
    pub fn close_clean(self) -> Result<(), IoFailure> {
        let path = self.path.join(CLEAN_SHUTDOWN);
        files::replace(&*self.files, &path, br#"{"version":0,"brokerEpoch":-1}"#).during("write", &path)
    }
}

/// How the names begin of what we keep at the root and Kafka does not.
const OURS: &str = "headwater";

/// How the folder of a deleted partition ends (Kafka's word).
const DELETED: &str = "-delete";

/// How the folder of a partition ends that nobody assigned (Kafka's word).
const STRAY: &str = "-stray";

/// What makes a name unique, and begins with a time: a UUID of version 7.
fn unique_at(now_ms: i64) -> String {
    let mut random = [0; 10];
    random.copy_from_slice(&uuid::Uuid::new_v4().as_bytes()[..10]);
    let now_ms = u64::try_from(now_ms).unwrap_or(0);
    uuid::Builder::from_unix_timestamp_millis(now_ms, &random).into_uuid().simple().to_string()
}

/// When a stray of this name was set aside.
fn aside_since_ms(name: &str) -> Option<i64> {
    let (_, unique) = name.strip_suffix(STRAY)?.rsplit_once('.')?;
    let unique = uuid::Uuid::parse_str(unique).ok().filter(|unique| unique.get_version_num() == 7)?;
    i64::try_from(unique.as_u128() >> 80).ok()
}

/// What Kafka calls a folder that is a partition's no more, cut to what a file system allows for a name.
fn name_aside(topic: &str, partition: u32, unique: &str, end: &str) -> String {
    let suffix = format!("-{partition}.{unique}{end}");
    let kept = topic.len().min(255 - suffix.len());
    format!("{}{suffix}", topic.get(..kept).unwrap_or("topic"))
}

fn identify(files: &dyn Files, path: &Path, identity: &NewIdentity) -> Result<MetaProperties, DataDirError> {
    let file = path.join(META_PROPERTIES);
    let bytes = match files::read(files, &file, 1 << 16) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let entries = files.list(path).during("list", path)?;
            if entries.iter().any(|entry| entry.is_dir && checkpoint::parse_partition_dir_name(&entry.name).is_some()) {
                return Err(DataDirError::Unidentified(path.into()));
            }
            let meta = MetaProperties {
                cluster_id: identity.cluster_id.clone(),
                broker_id: identity.broker_id,
                directory_id: identity.directory_id.clone(),
                format_version: Some(FORMAT_VERSION),
            };
            files::replace(files, &file, meta.encode().as_bytes()).during("write", &file)?;
            return Ok(meta);
        }
        Err(error) => return Err(IoFailure::new("read", &file, error).into()),
    };
    let meta =
        MetaProperties::decode(&bytes).map_err(|fault| CheckpointError::Damaged { path: file.clone(), fault })?;
    match meta.format_version {
        None => return Err(without_format(files, path, &bytes)?),
        Some(found) if found > FORMAT_VERSION => return Err(DataDirError::Newer { path: path.into(), found }),
        Some(_) => {}
    }
    if meta.broker_id != identity.broker_id {
        let (found, expected) = (meta.broker_id, identity.broker_id);
        return Err(DataDirError::OtherBroker { path: path.into(), found, expected });
    }
    Ok(meta)
}

/// A `meta.properties` that makes sense, but for the format that ours ends with: it is Kafka's, or has lost its end.
fn without_format(files: &dyn Files, path: &Path, bytes: &[u8]) -> Result<DataDirError, IoFailure> {
    let entries = files.list(path).during("list", path)?;
    let Some(ours) = entries.iter().find(|entry| !entry.is_dir && entry.name.starts_with(OURS)) else {
        return Ok(DataDirError::Kafka(path.into()));
    };
    let line = bytes.split(|byte| *byte == b'\n').count();
    let detail = format!("headwater.format is missing, though {} lies beside: the file has lost its end", ours.name);
    Ok(CheckpointError::Damaged { path: path.join(META_PROPERTIES), fault: TextFault { line, detail } }.into())
}

/// Creates the folder and those above it. What is acknowledged later rests on their names too, so those are made durable.
fn create_root(files: &dyn Files, path: &Path) -> Result<(), IoFailure> {
    let mut missing = Vec::new();
    for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
        if files::exists(files, folder).during("look for", folder)? {
            break;
        }
        missing.push(folder);
    }
    files.create_dir_all(path).during("create", path)?;
    for folder in missing {
        let parent = match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        files.sync_dir(parent).during("sync", parent)?;
    }
    Ok(())
}

/// Removes a folder and everything in it.
pub(crate) fn remove_folder(files: &dyn Files, path: &Path) -> Result<(), IoFailure> {
    for entry in files.list(path).during("list", path)? {
        let path = path.join(&entry.name);
        if entry.is_dir {
            remove_folder(files, &path)?;
        } else {
            files.remove_file(&path).during("remove", &path)?;
        }
    }
    files.remove_dir(path).during("remove", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_stray_says_since_when_it_is_one() {
        for now_ms in [0, 1_700_000_000_123, (1 << 48) - 1] {
            let name = name_aside("a.topic-7", 3, &unique_at(now_ms), STRAY);
            assert_eq!(aside_since_ms(&name), Some(now_ms), "{name}");
            assert!(checkpoint::parse_partition_dir_name(&name).is_none(), "{name}");
        }
        assert_ne!(unique_at(5), unique_at(5));
        let of_kafka = uuid::Uuid::new_v4().simple().to_string();
        for name in [name_aside("t", 0, &of_kafka, STRAY), "t-0-stray".into(), "t-0.x-stray".into()] {
            assert_eq!(aside_since_ms(&name), None, "{name}");
        }
    }
}
