//! How what this broker keeps follows the metadata.
//!
//! Each state is taken in two steps. [`Partitions::direct`] changes the roles of what is open and lets go of what is gone; it waits for
//! nothing, so that no disk keeps a broker from a role that it was elected for. [`Partitions::finish`] does what takes its time: it waits
//! until no job has the log of what was let go of, forgets it, removes its folder, opens what is new, opens again what was refused, and
//! makes lost replicas anew. It always goes by the newest state, and none of these works waits for another one, except for the folder
//! that both need: a partition that comes back, or another topic's of the same name, is opened once the folder is gone.
//!
//! Invariant: of each folder there is at most one user, which is open, or being opened, or leaving; or being opened anew while the one
//! that could not be served is still there for whoever asks, or leaves.
//! Owns: [`Kept`], and whose turn it is. Refuses: to know how a log is opened or removed ([`super`] does).

use super::{OpenedLog, Partitions};
use crate::assignments::Assigned;
use crate::error::PartitionError;
use crate::partition::{AssignedPartition, PartitionHandle, log_config};
use crate::replica::leader::View;
use crate::rounds::Key;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use headwater_proto::TopicId;
use headwater_storage::DataDir;
use imbl::ordmap::DiffItem;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout_at};

/// How often opening that takes long says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Logs that were opened for the first time are written down together: so many, or those that have waited for so long.
const ANNOUNCED_AT_ONCE: usize = 256;
const ANNOUNCE_AFTER: Duration = Duration::from_millis(100);

/// Whoever waits for what a state asks for goes on when nothing of it has come about for so long: a disk hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// A partition by the name of its folder: no two of them that are to be kept have the same.
pub(super) type Folder = (Arc<str>, u32);

fn folder(assigned: &AssignedPartition) -> Folder {
    (Arc::clone(&assigned.topic), assigned.partition)
}

/// What this broker keeps, and what it is to keep.
#[derive(Default)]
pub(super) struct Kept {
    /// What the newest state says, by the topic's name.
    wanted: Assigned,
    pub(super) open: HashMap<Key, PartitionHandle>,
    /// What is to be opened; looked at again when its turn comes.
    queue: VecDeque<(Folder, How)>,
    /// Whose log is being opened.
    opening: HashSet<Folder>,
    /// Whose folder is to go.
    leaving: HashMap<Folder, Leaving>,
    /// Those of them that nobody waits for yet.
    left: Vec<(Folder, PartitionHandle, BoxFuture<'static, ()>)>,
    /// There was a state before: whatever comes now is new.
    has_begun: bool,
    /// Nothing is opened any more.
    is_closing: bool,
}

/// Why a partition is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It was there when the broker started.
    Found,
    /// It was created, or came here.
    Created,
    /// It could not be opened before.
    Again,
    /// It was lost, and is made anew.
    Healed,
}

/// A partition that was let go of.
struct Leaving {
    topic_id: TopicId,
    /// No job has its log any more.
    is_free: bool,
}

/// A partition that is being opened.
struct Opening {
    assigned: AssignedPartition,
    how: How,
}

/// What came of it.
type Opened = Box<(Opening, OpenedLog)>;

/// What came of a piece of work.
enum Done {
    /// No job has the log of what was let go of.
    Free(Folder),
    Forgotten(Vec<(Folder, TopicId)>),
    Removed(Folder),
    Opened(Opened),
    /// What is left of it is in the way.
    NotOpened(Folder),
    Announced(Vec<Opened>),
    /// What was opened in vain is closed.
    Dropped(Folder, TopicId),
}

/// What [`Partitions::finish`] has in hand.
#[derive(Default)]
struct Hands {
    /// Nobody uses these folders.
    free: Vec<(Folder, TopicId)>,
    is_forgetting: bool,
    /// Nothing is said of these any more.
    forgotten: VecDeque<(Folder, TopicId)>,
    removing: usize,
    opening: usize,
    opened: usize,
    opened_again: usize,
    began: Option<Instant>,
    tell_at: Option<Instant>,
    /// Opened, and not written down yet.
    unknown: Vec<Opened>,
    unknown_since: Option<Instant>,
    is_announcing: bool,
}

impl Kept {
    fn wanted(&self, (topic, partition): &Folder) -> Option<&AssignedPartition> {
        self.wanted.get(topic)?.get(*partition)
    }

    fn is_open(&self, assigned: &AssignedPartition) -> bool {
        self.open.contains_key(&(assigned.topic_id, assigned.partition))
    }

    /// Whether the log of a partition that is open is being opened anew: what is known of the one there was is not known of that.
    pub(super) fn is_opening_anew(&self, handle: &PartitionHandle) -> bool {
        self.opening.contains(&(Arc::clone(handle.topic()), handle.partition()))
    }

    /// Whether something is to be done yet about a folder.
    pub(super) fn is_busy_with(&self, folder: &Folder) -> bool {
        let is_to_come = || self.wanted(folder).is_some_and(|assigned| !self.is_open(assigned));
        !self.is_closing && (self.opening.contains(folder) || self.leaving.contains_key(folder) || is_to_come())
    }

    fn let_go(&mut self, gone: &AssignedPartition) {
        let Some(handle) = self.open.remove(&(gone.topic_id, gone.partition)) else { return };
        // Whoever has it is told from here on that it is gone.
        let free = Box::pin(handle.delete());
        self.leaving.insert(folder(gone), Leaving { topic_id: gone.topic_id, is_free: false });
        self.left.push((folder(gone), handle, free));
    }

    /// Takes a state in. Returns the folders with which there is something to do, and how many partitions it was looked at: those of which
    /// the state before did not say the same.
    pub(super) fn direct(&mut self, assigned: &Assigned) -> (Vec<Folder>, usize) {
        let before = std::mem::replace(&mut self.wanted, assigned.clone());
        let how = if self.has_begun { How::Created } else { How::Found };
        let (mut begun, mut new, mut looked_at) = (Vec::new(), Vec::new(), 0);
        for item in before.diff(assigned) {
            let (old, now) = match item {
                DiffItem::Add(_, now) => (None, Some(now)),
                DiffItem::Update { old: (_, old), new: (_, now) } => (Some(old), Some(now)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            let same = old.zip(now).filter(|(old, now)| old.id == now.id);
            let stays = |partition| same.is_some_and(|(_, now)| now.get(partition).is_some());
            for gone in old.iter().flat_map(|old| &old.partitions).filter(|gone| !stays(gone.partition)) {
                self.let_go(gone);
                begun.push(folder(gone));
            }
            for assigned in now.iter().flat_map(|now| &now.partitions) {
                let known = same.and_then(|(old, _)| old.get(assigned.partition));
                if known.is_some_and(|known| assigned.is_still(known)) {
                    continue;
                }
                looked_at += 1;
                match self.open.get(&(assigned.topic_id, assigned.partition)) {
                    None => new.push(folder(assigned)),
                    Some(handle) => {
                        let is_same = |view: &Arc<View>| view.says_the_same(&assigned.view);
                        if !is_same(&handle.view()) || assigned.config != handle.config() {
                            handle.configure(assigned.clone());
                        }
                    }
                }
            }
        }
        new.sort();
        self.queue.extend(new.iter().map(|folder| (folder.clone(), how)));
        self.has_begun = true;
        begun.extend(new);
        (begun, looked_at)
    }

    /// What is to be opened next.
    fn next(&mut self, is_to_heal: impl Fn(&PartitionHandle) -> bool) -> Option<(Folder, Opening)> {
        while let Some((folder, how)) = self.queue.pop_front().filter(|_| !self.is_closing) {
            // Whoever ends with the folder looks again.
            if self.opening.contains(&folder) || self.leaving.contains_key(&folder) {
                continue;
            }
            let Some(assigned) = self.wanted(&folder).cloned() else { continue };
            let is_due = match (self.open.get(&(assigned.topic_id, assigned.partition)), how) {
                (None, _) => true,
                (Some(_), How::Found | How::Created) => false,
                (Some(handle), How::Again) => is_refused(handle),
                (Some(handle), How::Healed) => is_to_heal(handle),
            };
            if is_due {
                self.opening.insert(folder.clone());
                return Some((folder, Opening { assigned, how }));
            }
        }
        None
    }

    /// The folder of whoever is let go of is not used by anybody any more, unless somebody opens it. Returns whose it was.
    fn free(&mut self, folder: &Folder) -> Option<TopicId> {
        let is_opening = self.opening.contains(folder);
        let leaving = self.leaving.get_mut(folder)?;
        leaving.is_free = true;
        (!is_opening).then_some(leaving.topic_id)
    }
}

impl Partitions {
    /// Takes in what this broker is to keep by a newer state, which is everything: changes the roles of what is open and lets go of what
    /// is gone. The rest is for [`finish`](Self::finish). Waits for nothing. Returns the folders with which there is something to do.
    pub(crate) fn direct(&self, assigned: &Assigned) -> Vec<Folder> {
        let (begun, looked_at) = self.kept().direct(assigned);
        tracing::debug!(looked_at, begun = begun.len(), "a state of the metadata is taken in");
        self.applied.send_modify(|times| *times += 1);
        self.changed.notify_one();
        begun
    }

    /// Brings what is open in line with `assigned`. Returns once that is done. For whoever starts: while somebody
    /// [keeps up](Self::keep_up), it is [`direct`](Self::direct).
    pub(crate) async fn apply(&self, assigned: &Assigned) {
        self.direct(assigned);
        self.finish().await;
    }

    /// Finishes whatever is begun, for ever.
    pub(crate) async fn keep_up(&self) {
        loop {
            self.finish().await;
            self.changed.notified().await;
        }
    }

    /// Waits until what was begun is done, or a disk hangs.
    pub(crate) async fn settled(&self, mut begun: Vec<Folder>) {
        let mut applied = self.applied();
        let mut until = Instant::now() + PATIENCE;
        loop {
            applied.mark_unchanged();
            {
                let kept = self.kept();
                while begun.pop_if(|folder| !kept.is_busy_with(folder)).is_some() {}
            }
            if begun.is_empty() {
                return;
            }
            if timeout_at(until, applied.changed()).await.is_err() {
                let left = begun.len();
                begun.retain(|folder| self.kept().is_busy_with(folder));
                if begun.len() == left {
                    tracing::warn!(partitions = left, "the disk holds partitions up that come or go; the others go on");
                    return;
                }
                until = Instant::now() + PATIENCE;
            }
        }
    }

    /// Has partitions opened again that could not be opened for want of room, or of descriptors, and lost replicas made anew.
    pub(crate) fn retry(&self) {
        let mut kept = self.kept();
        if !kept.queue.is_empty() {
            return;
        }
        let named = |handle: &PartitionHandle| (Arc::clone(handle.topic()), handle.partition());
        let again: Vec<_> = kept.open.values().filter(|handle| is_refused(handle)).map(named).collect();
        let healed: Vec<_> = self.to_heal(&kept.open).map(named).collect();
        if again.is_empty() && healed.is_empty() {
            return;
        }
        kept.queue.extend(again.into_iter().map(|folder| (folder, How::Again)));
        kept.queue.extend(healed.into_iter().map(|folder| (folder, How::Healed)));
        self.changed.notify_one();
    }

    /// Does what takes its time, until nothing of it is left. It ends late where a disk hangs, and goes on with everything else
    /// meanwhile.
    pub(crate) async fn finish(&self) {
        let _one_at_a_time = self.applying.lock().await;
        let (mut hands, mut work) = (Hands::default(), FuturesUnordered::new());
        loop {
            let Some(data_dir) = self.data_dir() else { return };
            self.begin(data_dir, &mut hands, &mut work);
            if work.is_empty() {
                return;
            }
            let announce_at = hands.unknown_since.filter(|_| !hands.is_announcing).map(|since| since + ANNOUNCE_AFTER);
            let wake_at = hands.tell_at.into_iter().chain(announce_at).min();
            tokio::select! {
                biased;
                () = self.changed.notified() => {}
                () = async { match wake_at { Some(at) => sleep_until(at).await, None => std::future::pending().await } } => {}
                Some(done) = work.next() => self.take(done, &mut hands, &mut work),
            }
            if hands.tell_at.is_some_and(|at| at <= Instant::now()) {
                self.tell(&mut hands);
            }
        }
    }

    /// Begins what can be.
    fn begin<'a>(
        &'a self,
        data_dir: Arc<DataDir>,
        hands: &mut Hands,
        work: &mut FuturesUnordered<BoxFuture<'a, Done>>,
    ) {
        let left = std::mem::take(&mut self.kept().left);
        for (folder, handle, free) in left {
            work.push(Box::pin(async move {
                free.await;
                // Nothing is written any more into what may be its successor's folder.
                drop(handle.compacting().lock().await);
                Done::Free(folder)
            }));
        }
        if !hands.is_forgetting && !hands.free.is_empty() {
            let free = std::mem::take(&mut hands.free);
            hands.is_forgetting = true;
            let data_dir = Arc::clone(&data_dir);
            work.push(Box::pin(async move {
                self.forget(data_dir, free.iter().map(|(folder, _)| folder)).await;
                Done::Forgotten(free)
            }));
        }
        while hands.removing < self.parallel
            && let Some((folder, topic_id)) = hands.forgotten.pop_front()
        {
            hands.removing += 1;
            let data_dir = Arc::clone(&data_dir);
            work.push(Box::pin(async move {
                self.remove(data_dir, &folder, topic_id).await;
                Done::Removed(folder)
            }));
        }
        while hands.opening < self.parallel
            && let Some((folder, opening)) = self.kept().next(|handle| self.is_to_heal(handle))
        {
            hands.opening += 1;
            let began = *hands.began.get_or_insert_with(Instant::now);
            hands.tell_at.get_or_insert(began + PROGRESS_INTERVAL);
            let data_dir = Arc::clone(&data_dir);
            work.push(Box::pin(async move {
                if opening.how == How::Healed && !self.make_way_for(Arc::clone(&data_dir), &opening.assigned).await {
                    return Done::NotOpened(folder);
                }
                let created = matches!(opening.how, How::Created | How::Healed);
                let opened = self.open_one(data_dir, &opening.assigned, created).await;
                Done::Opened(Box::new((opening, opened)))
            }));
        }
        let is_due = hands.opening == 0
            || hands.unknown.len() >= ANNOUNCED_AT_ONCE
            || hands.unknown_since.is_some_and(|since| since.elapsed() >= ANNOUNCE_AFTER);
        if is_due && !hands.is_announcing && !hands.unknown.is_empty() {
            let unknown = std::mem::take(&mut hands.unknown);
            (hands.unknown_since, hands.is_announcing) = (None, true);
            work.push(Box::pin(async move {
                self.announce(&data_dir, unknown.iter().map(|opened| &opened.0.assigned)).await;
                Done::Announced(unknown)
            }));
        }
    }

    /// Takes what came of a piece of work.
    fn take<'a>(&'a self, done: Done, hands: &mut Hands, work: &mut FuturesUnordered<BoxFuture<'a, Done>>) {
        match done {
            Done::Free(folder) => {
                let free = self.kept().free(&folder);
                hands.free.extend(free.map(|topic_id| (folder, topic_id)));
            }
            Done::Forgotten(forgotten) => {
                hands.is_forgetting = false;
                hands.forgotten.extend(forgotten);
            }
            Done::Removed(folder) => {
                hands.removing -= 1;
                self.let_in(folder);
            }
            Done::Opened(opened) => {
                self.opened_one(hands);
                let (Opening { assigned, how }, log) = &*opened;
                let known = self.data_dir().and_then(|data_dir| data_dir.replica(&assigned.topic, assigned.partition));
                hands.opened_again += usize::from(*how == How::Again && log.is_ok());
                match known.is_some_and(|known| known.topic_id == assigned.topic_id) {
                    true => self.serve(*opened, work),
                    false => {
                        hands.unknown_since.get_or_insert_with(Instant::now);
                        hands.unknown.push(opened);
                    }
                }
                if hands.opening == 0 && hands.opened_again > 0 {
                    // Whoever still has one of the old handles is told what it was told before, and asks again.
                    let opened = std::mem::take(&mut hands.opened_again);
                    tracing::info!(opened, "partitions that could not be opened before are served");
                }
            }
            Done::NotOpened(folder) => {
                self.opened_one(hands);
                let free = {
                    let mut kept = self.kept();
                    kept.opening.remove(&folder);
                    kept.leaving.get(&folder).filter(|leaving| leaving.is_free).map(|leaving| leaving.topic_id)
                };
                hands.free.extend(free.map(|topic_id| (folder, topic_id)));
            }
            Done::Announced(announced) => {
                hands.is_announcing = false;
                announced.into_iter().for_each(|opened| self.serve(*opened, work));
            }
            Done::Dropped(folder, topic_id) => {
                let free = {
                    let mut kept = self.kept();
                    kept.opening.remove(&folder);
                    let leaving = kept.leaving.entry(folder.clone()).or_insert(Leaving { topic_id, is_free: true });
                    leaving.is_free.then_some(leaving.topic_id)
                };
                hands.free.extend(free.map(|topic_id| (folder, topic_id)));
            }
        }
    }

    /// One more is opened, or not.
    fn opened_one(&self, hands: &mut Hands) {
        hands.opening -= 1;
        hands.opened += 1;
        if hands.opening == 0 && self.kept().queue.is_empty() {
            (hands.opened, hands.began, hands.tell_at) = (0, None, None);
        }
    }

    /// Serves a partition that was opened, in the role that the newest state gives it; or lets it go, if none does any more.
    fn serve<'a>(
        &'a self,
        (Opening { assigned, how }, mut opened): (Opening, OpenedLog),
        work: &mut FuturesUnordered<BoxFuture<'a, Done>>,
    ) {
        let (folder, key) = (folder(&assigned), (assigned.topic_id, assigned.partition));
        let mut kept = self.kept();
        let newest = kept.wanted(&folder).filter(|newest| newest.topic_id == assigned.topic_id).cloned();
        let Some(newest) = newest.filter(|_| !kept.leaving.contains_key(&folder)) else {
            work.push(Box::pin(async move {
                self.context.pool.run(move || drop(opened)).await;
                Done::Dropped(folder, assigned.topic_id)
            }));
            return;
        };
        if let Ok((log, _, _)) = &mut opened
            && newest.config != assigned.config
        {
            log.set_config(log_config(&newest.config, self.context.producer_id_expiration_ms));
        }
        let is_well = opened.is_ok();
        if how == How::Healed {
            self.context.disk.begins_anew(key);
        }
        kept.opening.remove(&folder);
        kept.open.insert(key, PartitionHandle::start(&newest, opened, &self.context));
        drop(kept);
        // The controller may have heard meanwhile, or before this broker was given it again, that it is of no use.
        if is_well && how != How::Healed {
            self.context.disk.begins(key);
        }
        self.applied.send_modify(|times| *times += 1);
    }

    /// A folder is gone: whoever waits for it has its turn.
    fn let_in(&self, folder: Folder) {
        {
            let mut kept = self.kept();
            kept.leaving.remove(&folder);
            if kept.wanted(&folder).is_some_and(|assigned| !kept.is_open(assigned)) {
                kept.queue.push_back((folder, How::Created));
            }
        }
        self.applied.send_modify(|times| *times += 1);
    }

    fn tell(&self, hands: &mut Hands) {
        let now = Instant::now();
        hands.tell_at = Some(now + PROGRESS_INTERVAL);
        let (done, seconds) = (hands.opened, hands.began.map_or(0, |began| (now - began).as_secs()));
        let total = done + hands.opening + self.kept().queue.len();
        let (scanned_bytes, to_scan_bytes) = (self.recovery.scanned_bytes(), self.recovery.to_scan_bytes());
        tracing::info!(done, total, seconds, scanned_bytes, to_scan_bytes, "opening partitions");
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is opened any more. What is open now.
    pub(super) fn close_doors(&self) -> HashMap<Key, PartitionHandle> {
        let mut kept = self.kept();
        kept.is_closing = true;
        kept.open.clone()
    }
}

/// Whether a partition may open when it is tried again.
fn is_refused(handle: &PartitionHandle) -> bool {
    handle.ended().is_some_and(|why| matches!(why, PartitionError::DiskFull(_) | PartitionError::Exhausted(_)))
}
