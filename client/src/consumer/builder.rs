//! How a consumer is set up.
//!
//! Owns: [`ConsumerBuilder`]: checking settings, finding where partitions begin, starting tasks. Read next:
//! [`super::Consumer`].

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::commit::{Committer, commit_regularly};
use super::fetch::Context;
use super::group::{Member, Settings};
use super::prefetch::Prefetch;
use super::readers::{Readers, Wanted};
use super::rebalance::{Hands, Rebalance};
use super::record::{OutOfRange, StartFrom};
use super::state::State;
use super::{Consumer, Membership, RebalanceFn};
use crate::TopicPartition;
use crate::connection::Connections;
use crate::error::ConsumeError;
use crate::metadata::{Metadata, TopicInfo, unknown_topic};

/// How a consumer is set up. Made by [`crate::Client::consumer`].
///
/// Either it subscribes (`group` and `topics`), and the group shares partitions out; or it is told its partitions
/// (`assign`), with a `group` if their offsets are to be committed. A group's commits are where it begins.
#[must_use = "a builder does nothing until it is built"]
pub struct ConsumerBuilder {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
    group: Option<Arc<str>>,
    instance_id: String,
    topics: Vec<String>,
    assignor: String,
    session_timeout: Option<Duration>,
    rebalance_timeout: Duration,
    assign: BTreeSet<TopicPartition>,
    start: StartFrom,
    start_at: BTreeMap<TopicPartition, StartFrom>,
    on_out_of_range: OutOfRange,
    auto_commit: Option<Duration>,
    prefetch_bytes: usize,
    background: bool,
    on_rebalance: Option<Arc<RebalanceFn>>,
}

impl std::fmt::Debug for ConsumerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsumerBuilder")
            .field("group", &self.group)
            .field("instance_id", &self.instance_id)
            .field("topics", &self.topics)
            .field("assignor", &self.assignor)
            .field("session_timeout", &self.session_timeout)
            .field("rebalance_timeout", &self.rebalance_timeout)
            .field("assign", &self.assign)
            .field("start", &self.start)
            .field("start_at", &self.start_at)
            .field("on_out_of_range", &self.on_out_of_range)
            .field("auto_commit", &self.auto_commit)
            .field("prefetch_bytes", &self.prefetch_bytes)
            .field("background", &self.background)
            .field("on_rebalance", &self.on_rebalance.is_some())
            .finish_non_exhaustive()
    }
}

impl ConsumerBuilder {
    pub(crate) fn new(connections: Arc<Connections>, metadata: Arc<Metadata>) -> ConsumerBuilder {
        ConsumerBuilder {
            connections,
            metadata,
            group: None,
            instance_id: String::new(),
            topics: Vec::new(),
            assignor: String::new(),
            session_timeout: None,
            rebalance_timeout: Duration::from_secs(60),
            assign: BTreeSet::new(),
            start: StartFrom::Earliest,
            start_at: BTreeMap::new(),
            on_out_of_range: OutOfRange::Error,
            auto_commit: Some(Duration::from_secs(5)),
            prefetch_bytes: 32 << 20,
            background: false,
            on_rebalance: None,
        }
    }

    /// The group to which offsets are committed.
    pub fn group(mut self, group: impl Into<Arc<str>>) -> ConsumerBuilder {
        self.group = Some(group.into());
        self
    }

    /// Static membership: a member that returns under this name within the session timeout gets its partitions back, and
    /// nobody else is disturbed.
    pub fn instance_id(mut self, id: impl Into<String>) -> ConsumerBuilder {
        self.instance_id = id.into();
        self
    }

    /// Topics whose partitions the group shares out.
    pub fn topics<T: Into<String>>(mut self, topics: impl IntoIterator<Item = T>) -> ConsumerBuilder {
        self.topics = topics.into_iter().map(Into::into).collect();
        self
    }

    /// How the group shares partitions out: `uniform` (sticky) or `range`. Default: the broker's.
    pub fn assignor(mut self, assignor: impl Into<String>) -> ConsumerBuilder {
        self.assignor = assignor.into();
        self
    }

    /// How long a member may be silent before it is out. Default: the broker's (10 s).
    pub fn session_timeout(mut self, timeout: Duration) -> ConsumerBuilder {
        self.session_timeout = Some(timeout);
        self
    }

    /// How long this member may take to let go of a partition, which includes being done with what it has in hand.
    /// Default: 60 s.
    pub fn rebalance_timeout(mut self, timeout: Duration) -> ConsumerBuilder {
        self.rebalance_timeout = timeout;
        self
    }

    /// The partitions to read, decided by the application.
    pub fn assign<T: Into<Arc<str>>>(mut self, partitions: impl IntoIterator<Item = (T, u32)>) -> ConsumerBuilder {
        self.assign = partitions.into_iter().map(|(topic, partition)| TopicPartition::new(topic, partition)).collect();
        self
    }

    /// Where partitions begin for which the group committed nothing. Default: [`StartFrom::Earliest`].
    pub fn start(mut self, from: StartFrom) -> ConsumerBuilder {
        self.start = from;
        self
    }

    /// Where one of the partitions of [`ConsumerBuilder::assign`] begins, whatever is committed. It is no setting of a
    /// consumer that subscribes: with every assignment it would read again what its group has committed since. Such a
    /// consumer seeks ([`Consumer::seek`]) once it knows its partitions ([`Consumer::assigned`]).
    pub fn start_at(mut self, topic: impl Into<Arc<str>>, partition: u32, from: StartFrom) -> ConsumerBuilder {
        self.start_at.insert(TopicPartition::new(topic, partition), from);
        self
    }

    /// What to do when a position lies outside the log. Default: [`OutOfRange::Error`].
    pub fn on_out_of_range(mut self, choice: OutOfRange) -> ConsumerBuilder {
        self.on_out_of_range = choice;
        self
    }

    /// How often the group's progress is committed (also when partitions are given away, and by [`Consumer::close`]);
    /// `None`: only by [`Consumer::commit`]. What is committed is what the application is done with: what it was handed
    /// before it asked for more. Default: 5 s.
    pub fn auto_commit(mut self, interval: Option<Duration>) -> ConsumerBuilder {
        self.auto_commit = interval;
        self
    }

    /// Bytes that are fetched ahead, shared evenly by the consumer's partitions (counted up to a power of two): 16 KiB to
    /// 4 MiB each. More of them keep a fast reader busy on a slow path; they are memory. Default: 32 MiB.
    ///
    /// What is fetched and not yet taken by the application is never more than this, plus 16 KiB and one batch for each
    /// partition, also while partitions come and go, are paused, or nothing is taken at all. A partition that comes while
    /// others have claimed everything begins with 16 KiB, until they have given back what is over their new share.
    pub fn prefetch_bytes(mut self, bytes: usize) -> ConsumerBuilder {
        self.prefetch_bytes = bytes;
        self
    }

    /// Yields to readers at the end of the log: for replay and catching up.
    pub fn background(mut self, background: bool) -> ConsumerBuilder {
        self.background = background;
        self
    }

    /// Called when partitions come and go, before it takes effect; what it returns is waited for.
    pub fn on_rebalance<F>(mut self, callback: impl Fn(Rebalance) -> F + Send + Sync + 'static) -> ConsumerBuilder
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.on_rebalance = Some(Arc::new(move |event| callback(event).boxed()));
        self
    }

    /// The consumer. One that is told its partitions knows where they begin when this returns, except for those that are
    /// not served at the moment: these begin later, or their error comes with the records. One that subscribes joins its
    /// group in the background ([`Consumer::assigned`] waits for it).
    ///
    /// # Errors
    /// When the settings make no sense, a topic or partition does not exist, or the broker cannot be asked.
    pub async fn build(self) -> Result<Consumer, ConsumeError> {
        let usage = |what| Err(ConsumeError::Usage(what));
        if self.topics.is_empty() == self.assign.is_empty() {
            return usage("a consumer needs either topics (with a group) or assigned partitions");
        }
        if self.group.is_none() && !self.topics.is_empty() {
            return usage("subscribing to topics needs a group");
        }
        if self.auto_commit.is_some_and(|interval| interval.is_zero()) {
            return usage("the interval of automatic commits must be above 0; None turns them off");
        }
        if !self.start_at.is_empty() && !self.topics.is_empty() {
            return usage(
                "start_at needs assigned partitions; a consumer that subscribes seeks once it is assigned some",
            );
        }
        if self.start_at.keys().any(|at| !self.assign.contains(at)) {
            return usage("start_at names a partition that is not assigned");
        }
        let state = Arc::new(State::new(Prefetch::new(self.prefetch_bytes as u64)));
        let stop = CancellationToken::new();
        let context = Arc::new(Context {
            connections: self.connections.clone(),
            metadata: self.metadata.clone(),
            state: state.clone(),
            on_out_of_range: self.on_out_of_range,
            background: self.background,
            subscribed: !self.topics.is_empty(),
            stop: stop.clone(),
        });
        let readers = Arc::new(Readers { context });
        let committer = self
            .group
            .clone()
            .map(|group| Committer::new(self.metadata.clone(), state.clone(), group, !self.topics.is_empty()));
        let auto_commit = self.auto_commit.is_some();
        // From now on whatever ends this, if only that nobody waits for it any more, ends what it has begun.
        let mut consumer = Consumer::new(readers.clone(), committer.clone(), auto_commit, stop.clone());
        if self.topics.is_empty() {
            // What is remembered may be older than what the application knows of its topics.
            let begun = Instant::now();
            let mut infos: BTreeMap<Arc<str>, Arc<TopicInfo>> = BTreeMap::new();
            let mut partitions = Vec::new();
            for at in &self.assign {
                let info = match infos.get(&at.topic).filter(|info| info.leader(at.partition).is_some()) {
                    Some(info) => info.clone(),
                    None => {
                        let info = self.metadata.with_partition(&at.topic, at.partition, Some(begun)).await;
                        let info = info.map_err(|error| unknown_topic(error, &at.topic))?;
                        infos.insert(at.topic.clone(), info.clone());
                        info
                    }
                };
                if at.partition >= info.partition_count() {
                    let (topic, partition) = (at.topic.clone(), at.partition);
                    return Err(ConsumeError::UnknownPartition {
                        topic,
                        partition,
                        partitions: info.partition_count(),
                    });
                }
                let told = self.start_at.get(at).copied();
                partitions.push(Wanted {
                    at: at.clone(),
                    topic_id: info.id,
                    from: told.unwrap_or(self.start),
                    ask_group: told.is_none() && committer.is_some(),
                });
            }
            let mut search = readers.begin(partitions, committer.clone());
            search.ask().await?;
            if !search.is_done() {
                tokio::spawn(search.run());
            }
            state.assignment_known();
        } else if let Some(committer) = &committer {
            let member_id = uuid::Uuid::new_v4().to_string();
            committer.set_member(&member_id, 0);
            let (topics, wanted) = watch::channel(self.topics);
            let settings = Settings {
                member_id: member_id.clone(),
                instance_id: self.instance_id,
                assignor: self.assignor,
                session_timeout: self.session_timeout,
            };
            let hands = Hands {
                readers: readers.clone(),
                committer: committer.clone(),
                on_rebalance: self.on_rebalance,
                auto_commit,
                rebalance_timeout: self.rebalance_timeout,
                start: self.start,
            };
            let member = Member::new(settings, hands, wanted);
            let task = tokio::spawn(member.run());
            consumer.membership = Some(Membership { member_id, topics, task });
        }
        if let (Some(committer), Some(interval)) = (&committer, self.auto_commit) {
            tokio::spawn(commit_regularly(committer.clone(), state.clone(), interval, stop.clone()));
        }
        Ok(consumer)
    }
}
