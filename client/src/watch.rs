//! Hearing of new leaders as soon as a broker knows of them: one watch stream for the whole client.
//!
//! The stream belongs to the connection for calls. A broker that says nothing for longer than it promised is left for another one;
//! whoever waits for an acknowledgement or for records longer than usual has it asked whether it is still there ([`Nudge`]), so that
//! one that died is found out in a moment, and one that is idle costs a beat.
//!
//! Owns: the stream, and when its broker is left. Refuses: what is known ([`crate::metadata`]); one partition's leader
//! ([`LeaderWatch`]) is all that senders and readers see of it. Read next: [`crate::metadata`].

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use headwater_proto::wire::{self, open};
use headwater_proto::{TopicId, WATCH_FEATURE};
use quinn::SendStream;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::connection::{Connections, Link};
use crate::error::Error;
use crate::metadata::{Knowledge, PartitionInfo};
use crate::retry::Backoff;
use crate::stream::{FrameReader, write_message};

/// How often the broker is to say that it is there.
const BEAT: Duration = Duration::from_secs(1);
/// It is gone, or stands still, when it has said nothing for so long.
const SILENCE: Duration = Duration::from_millis(2_500);
/// Time for it to answer when it is asked; twice as long with each broker in a row that did not.
const PATIENCE: Duration = Duration::from_millis(400);
const LONGEST_PATIENCE: Duration = Duration::from_millis(3_200);
/// Whoever was heard so shortly ago need not be asked.
const JUST_HEARD: Duration = Duration::from_millis(100);
/// How long a broker may know nothing of those that lead the metadata quorum before another one is asked.
const OUT_OF_TOUCH: Duration = Duration::from_secs(2);
/// A wait that is longer than this is worth asking for.
pub(crate) const WORTH_ASKING: Duration = Duration::from_millis(300);

/// Who leads one partition, from now on.
#[derive(Debug, Clone)]
pub(crate) struct LeaderWatch {
    newest: watch::Receiver<PartitionInfo>,
}

impl LeaderWatch {
    pub(crate) fn new(newest: watch::Receiver<PartitionInfo>) -> LeaderWatch {
        LeaderWatch { newest }
    }

    /// Waits until a leader of a later epoch is known. Returns its epoch. Cancel-safe.
    pub(crate) async fn replaced(&mut self, leader_epoch: i32) -> i32 {
        let newer = |now: &PartitionInfo| now.leader >= 0 && now.leader_epoch > leader_epoch;
        let newest = self.newest.wait_for(newer).await.map(|newest| newest.leader_epoch);
        match newest {
            Ok(leader_epoch) => leader_epoch,
            // The client is closed.
            Err(_) => std::future::pending().await,
        }
    }
}

/// How others wake the task that watches.
#[derive(Debug, Default)]
pub(crate) struct Nudge {
    wake: Notify,
    is_asked: AtomicBool,
}

impl Nudge {
    /// What is watched has changed.
    pub(crate) fn look(&self) {
        self.wake.notify_one();
    }

    /// Somebody waits for longer than usual: is the broker that tells of new leaders still there?
    pub(crate) fn ask(&self) {
        if !self.is_asked.swap(true, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }
}

/// Watches for as long as the client is open.
pub(crate) async fn keep(connections: Arc<Connections>, knowledge: Arc<Knowledge>) {
    let mut backoff = Backoff::new(&connections.config);
    let mut in_a_row = 0;
    loop {
        let ended = match connections.control().await {
            Err(error) => Err(error),
            Ok(link) if !link.has(WATCH_FEATURE) => {
                link.ended().await;
                Ok(End::Lost)
            }
            Ok(link) => {
                let patience = PATIENCE.saturating_mul(1 << in_a_row.min(8)).min(LONGEST_PATIENCE);
                let mut watching = Watching::new(&knowledge, link.address().clone(), patience);
                let ended = watching.run(&link).await;
                if watching.listening.was_heard {
                    (in_a_row, backoff) = (0, Backoff::new(&connections.config));
                }
                if matches!(ended, Ok(End::Silent | End::OutOfTouch)) {
                    in_a_row += 1;
                    connections.leave(&link);
                }
                ended
            }
        };
        match ended {
            Err(Error::Closed) => return,
            // Another one is asked at once.
            Ok(End::Silent | End::OutOfTouch) => {}
            Ok(End::Lost) => backoff.pause().await,
            Err(error) => {
                tracing::debug!(%error, "not told of new leaders at the moment");
                backoff.pause().await;
            }
        }
    }
}

/// Why a broker is watched no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its stream or connection ended.
    Lost,
    /// It says nothing.
    Silent,
    /// It knows nothing new.
    OutOfTouch,
}

/// One watch stream.
struct Watching<'a> {
    knowledge: &'a Knowledge,
    address: Arc<str>,
    listening: Listening,
    /// The topics that the broker was asked about.
    topics: HashSet<TopicId>,
    /// Which choice of topics that was.
    seen: Option<u64>,
    /// Since when it has been out of touch.
    out_of_touch: Option<Instant>,
}

/// When a broker counts as silent. Pure.
#[derive(Debug)]
struct Listening {
    heard: Instant,
    was_heard: bool,
    /// When it was asked whether it is there, and has not answered.
    asked: Option<Instant>,
    patience: Duration,
}

impl Listening {
    /// To a broker that is to give its first answer within `patience` of being asked for it.
    fn new(patience: Duration, now: Instant) -> Listening {
        Listening { heard: now, was_heard: false, asked: None, patience }
    }

    fn ask(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    fn is_worth_asking(&self, now: Instant) -> bool {
        self.asked.is_none() && now - self.heard > JUST_HEARD
    }

    fn heard(&mut self, now: Instant) {
        // It had longer for its first answer alone: where it dies, it is missed as soon as any.
        *self = Listening { heard: now, was_heard: true, asked: None, patience: PATIENCE };
    }

    /// When it is silent, if nothing is heard of it before.
    fn silent_at(&self) -> Instant {
        let silent_at = self.heard + SILENCE;
        self.asked.map_or(silent_at, |asked| silent_at.min(asked + self.patience))
    }
}

impl<'a> Watching<'a> {
    fn new(knowledge: &'a Knowledge, address: Arc<str>, patience: Duration) -> Watching<'a> {
        let listening = Listening::new(patience, Instant::now());
        Watching { knowledge, address, listening, topics: HashSet::new(), seen: None, out_of_touch: None }
    }

    async fn run(&mut self, link: &Link) -> Result<End, Error> {
        let beat_ms = u32::try_from(BEAT.as_millis()).unwrap_or(u32::MAX);
        let opening = link.open(open::Stream::Watch(wire::OpenWatch { beat_ms }));
        let (mut send, recv) = match timeout(SILENCE, opening).await {
            Ok(opened) => opened?,
            Err(_) => return Ok(End::Silent),
        };
        let mut updates = FrameReader::<wire::WatchUpdate>::new(recv, self.address.clone());
        // The broker answers the first frame: until then it is as if it was asked.
        self.listening.ask(Instant::now());
        loop {
            self.say(&mut send).await?;
            let silent_at = self.listening.silent_at();
            tokio::select! {
                biased;
                update = updates.message() => {
                    let Some(update) = update? else { return Ok(End::Lost) };
                    if let Some(end) = self.heard(update)? {
                        return Ok(end);
                    }
                }
                () = self.knowledge.nudge.wake.notified() => {}
                () = sleep_until(silent_at) => {
                    tracing::debug!(address = &*self.address, "the broker says nothing: another one is asked for new leaders");
                    return Ok(End::Silent);
                }
            }
        }
    }

    /// Says what is to be watched, and asks whether the broker is there if somebody wants to know.
    async fn say(&mut self, send: &mut SendStream) -> Result<(), Error> {
        let wanted = self.knowledge.watched(&mut self.seen);
        let id = |id: &TopicId| id.to_wire();
        let mut request = wire::WatchRequest::default();
        if let Some(wanted) = wanted {
            request.add_topic_ids = wanted.difference(&self.topics).map(id).collect();
            request.remove_topic_ids = self.topics.difference(&wanted).map(id).collect();
            self.topics = wanted;
        }
        let is_asked = self.knowledge.nudge.is_asked.swap(false, Ordering::Relaxed);
        let now = Instant::now();
        request.ping = is_asked && self.listening.is_worth_asking(now);
        if request.ping {
            self.listening.ask(now);
        }
        if request == wire::WatchRequest::default() {
            return Ok(());
        }
        write_message(send, &request, &self.address).await
    }

    fn heard(&mut self, update: wire::WatchUpdate) -> Result<Option<End>, Error> {
        if let Some(error) = update.error {
            return Err(Error::Refused(error.into()));
        }
        let now = Instant::now();
        self.listening.heard(now);
        self.out_of_touch = if update.in_touch { None } else { self.out_of_touch.or(Some(now)) };
        self.knowledge.told(update);
        let is_cut_off = self.out_of_touch.is_some_and(|since| since.elapsed() > OUT_OF_TOUCH);
        Ok(is_cut_off.then_some(End::OutOfTouch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a broker that died, the next one had as long as its first answer was given for the rest of its life: its own death was found out
    /// 0.4 s later than the first.
    #[test]
    fn whoever_is_watched_after_one_that_was_silent_is_missed_as_soon_once_it_has_answered() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut listening = Listening::new(LONGEST_PATIENCE, began);
        listening.ask(began);
        assert_eq!(listening.silent_at(), at(2_500), "its first answer may take long");
        listening.heard(at(1_000));
        assert!(!listening.is_worth_asking(at(1_100)));
        assert_eq!(listening.silent_at(), at(3_500));
        assert!(listening.is_worth_asking(at(1_300)));
        listening.ask(at(1_300));
        assert_eq!(listening.silent_at(), at(1_700));
        assert!(!listening.is_worth_asking(at(1_600)), "it was");
    }
}
