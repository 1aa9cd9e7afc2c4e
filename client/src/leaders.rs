//! Asking the brokers that lead partitions, and putting their answers together.
//!
//! Owns: which broker is asked about which partition, all brokers at once; what is said of a partition whose leader gives no
//! answer. Refuses: what the answers mean. Read next: [`crate::metadata`], which says who leads.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt};
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response, offset_query::At};

use crate::connection::Connections;
use crate::error::{Error, Refusal};
use crate::metadata::{Metadata, PartitionInfo, TopicInfo, is_stale};
use crate::retry::{Backoff, Deadline};

/// Time for a leader to answer what it knows without looking into its log. One that is gone says nothing, and the next attempt may
/// find another.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time for leaders to fill in a description; then it stays as it is.
const DESCRIBE_PATIENCE: Duration = Duration::from_secs(4);
/// Of that, for one attempt.
const DESCRIBE_ONE: Duration = Duration::from_secs(1);

/// What is asked of partitions' leaders.
#[derive(Clone)]
pub(crate) struct Leaders {
    connections: Arc<Connections>,
    metadata: Arc<Metadata>,
}

impl Leaders {
    pub(crate) fn new(connections: Arc<Connections>, metadata: Arc<Metadata>) -> Leaders {
        Leaders { connections, metadata }
    }

    /// Asks each query's leader, all of them at once and each of them once. `told` hears of each query by its index, as the answers come.
    ///
    /// # Errors
    /// When nobody says who leads; what is wrong with a single query is told of that one. A leader that does not answer may be
    /// followed by another: then asking again may help.
    pub(crate) async fn list_offsets(
        &self,
        queries: &[wire::OffsetQuery],
        mut told: impl FnMut(usize, Result<wire::OffsetAnswer, Refusal>),
    ) -> Result<(), Error> {
        let topics = self.topics(queries).await?;
        let mut by_leader: HashMap<i32, Vec<usize>> = HashMap::new();
        for (index, query) in queries.iter().enumerate() {
            let topic = topics.get(&*query.topic).cloned().unwrap_or_else(|| Err(not_asked()));
            match topic.and_then(|topic| self.leader(&topic, query.partition)) {
                Ok(leader) => by_leader.entry(leader.leader).or_default().push(index),
                Err(refusal) => told(index, Err(refusal)),
            }
        }
        let asking = by_leader.into_iter().map(|(leader, indices)| async move {
            let of_leader: Vec<_> = indices.iter().filter_map(|index| queries.get(*index).cloned()).collect();
            let walks = |query: &wire::OffsetQuery| matches!(query.at, Some(At::TimestampMs(_) | At::MaxTimestamp(_)));
            let patience = match of_leader.iter().any(walks) {
                true => self.connections.config.request_timeout,
                false => PATIENCE.min(self.connections.config.request_timeout),
            };
            let request = Request::ListOffsets(wire::ListOffsets { queries: of_leader });
            let deadline = Deadline::within(patience);
            (leader, self.connections.call_at(leader, "list offsets", request, deadline).await, indices)
        });
        let mut asking: FuturesUnordered<_> = asking.collect();
        while let Some((leader, answer, indices)) = asking.next().await {
            let answers = match answer {
                Ok(Response::ListOffsets(answer)) if answer.answers.len() == indices.len() => Ok(answer.answers),
                Ok(_) => Err(Error::Protocol("an answer that does not belong to list offsets".into())),
                Err(Error::Closed) => return Err(Error::Closed),
                Err(error) => Err(error),
            };
            let answers: Vec<_> = match answers {
                Ok(answers) => answers
                    .into_iter()
                    .map(|answer| match &answer.error {
                        Some(error) => Err(Refusal::from(error.clone())),
                        None => Ok(answer),
                    })
                    .collect(),
                Err(error) => vec![Err(unanswered(leader, error)); indices.len()],
            };
            for (index, answer) in indices.into_iter().zip(answers) {
                // It does not lead, or is not there any more.
                if let Err(refusal) = &answer
                    && (is_stale(refusal.code) || refusal.code == ErrorCode::TimedOut)
                    && let Some(Ok(topic)) = queries.get(index).and_then(|query| topics.get(&*query.topic))
                {
                    self.metadata.doubt(topic);
                }
                told(index, answer);
            }
        }
        Ok(())
    }

    /// As [`Leaders::list_offsets`], where asking again helps until the request's time is up. Answered in the order of the queries.
    ///
    /// # Errors
    /// When nobody says who leads.
    pub(crate) async fn list_offsets_patiently(
        &self,
        queries: Vec<wire::OffsetQuery>,
    ) -> Result<Vec<Result<wire::OffsetAnswer, Refusal>>, Error> {
        let mut answers: Vec<Result<wire::OffsetAnswer, Refusal>> = vec![Err(not_asked()); queries.len()];
        let mut open: Vec<usize> = (0..queries.len()).collect();
        let deadline = Deadline::within(self.connections.config.request_timeout);
        let mut backoff = Backoff::new(&self.connections.config);
        loop {
            let asked: Vec<_> = open.iter().filter_map(|index| queries.get(*index).cloned()).collect();
            let told = |nth: usize, answer| {
                if let Some(place) = open.get(nth).and_then(|index| answers.get_mut(*index)) {
                    *place = answer;
                }
            };
            self.list_offsets(&asked, told).await?;
            open.retain(|index| matches!(answers.get(*index), Some(Err(refusal)) if refusal.retryable));
            if open.is_empty() || tokio::time::timeout_at(deadline.at, backoff.pause()).await.is_err() {
                return Ok(answers);
            }
        }
    }

    /// What is known of the topics that are asked about.
    async fn topics<'a>(
        &self,
        queries: &'a [wire::OffsetQuery],
    ) -> Result<HashMap<&'a str, Result<Arc<TopicInfo>, Refusal>>, Error> {
        let mut highest: HashMap<&str, u32> = HashMap::new();
        for query in queries {
            let highest = highest.entry(&query.topic).or_default();
            *highest = query.partition.max(*highest);
        }
        let found =
            join_all(highest.into_iter().map(|(name, highest)| async move { (name, self.topic(name, highest).await) }));
        let mut topics = HashMap::new();
        for (name, topic) in found.await {
            let topic = match topic {
                Ok(topic) => Ok(topic),
                Err(Error::Refused(refusal)) => Err(refusal),
                Err(error) => return Err(error),
            };
            topics.insert(name, topic);
        }
        Ok(topics)
    }

    /// What is known of a topic; asked anew where no partition `highest` is known.
    async fn topic(&self, name: &str, highest: u32) -> Result<Arc<TopicInfo>, Error> {
        let topic = self.metadata.topic(name).await?;
        match topic.leader(highest) {
            Some(_) => Ok(topic),
            None => self.metadata.with_partition(name, highest, Some(topic.at)).await,
        }
    }

    fn leader(&self, topic: &TopicInfo, partition: u32) -> Result<PartitionInfo, Refusal> {
        let (name, count) = (&topic.name, topic.partition_count());
        match topic.leader(partition) {
            None => {
                let why = format!("topic {name} has {count} partitions, and no number {partition}");
                Err(wire::Error::new(ErrorCode::UnknownPartition, why).into())
            }
            Some(leader) if leader.leader < 0 => {
                self.metadata.doubt(topic);
                let why = format!("partition {name}-{partition} has no leader at the moment");
                Err(wire::Error::new(ErrorCode::NotLeader, why).into())
            }
            Some(leader) => Ok(leader),
        }
    }

    /// One call to a partition's leader, repeated with whoever leads then while that can help, until the request's time is up.
    pub(crate) async fn call(
        &self,
        what: &'static str,
        topic: &str,
        partition: u32,
        request: Request,
    ) -> Result<Response, Error> {
        let deadline = Deadline::within(self.connections.config.request_timeout);
        let mut backoff = Backoff::new(&self.connections.config);
        loop {
            let info = self.topic(topic, partition).await?;
            let error = match self.leader(&info, partition) {
                Ok(leader) => match self.connections.call_at(leader.leader, what, request.clone(), deadline).await {
                    Ok(response) => return Ok(response),
                    Err(error) => error,
                },
                Err(refusal) => Error::Refused(refusal),
            };
            if !error.retryable() || deadline.passed() {
                return Err(error);
            }
            if error.code().is_none_or(is_stale) {
                self.metadata.doubt(&info);
            }
            tracing::debug!(what, topic, partition, %error, "the leader gives no answer, trying again");
            tokio::time::timeout_at(deadline.at, backoff.pause()).await.map_err(|_| error)?;
        }
    }

    /// A topic with what the leaders of its partitions say of them; -1 where one says nothing. `is_patient`: a lost quorum is waited for.
    pub(crate) async fn describe_topic(
        &self,
        name: &str,
        stale: bool,
        is_patient: bool,
    ) -> Result<wire::DescribeTopicResponse, Error> {
        let deadline = Deadline::within(DESCRIBE_PATIENCE.min(self.connections.config.request_timeout));
        let mut backoff = Backoff::new(&self.connections.config);
        loop {
            let request = Request::DescribeTopic(wire::DescribeTopic { name: name.into(), stale });
            let (broker_id, mut topic) = match self.connections.ask("describe topic", is_patient, request).await? {
                (broker_id, Response::DescribeTopic(topic)) => (broker_id, topic),
                _ => return Err(Error::Protocol("an answer that does not belong to describe topic".into())),
            };
            let whole = self.fill_in(&mut topic, broker_id).await?;
            if whole || deadline.passed() {
                return Ok(topic);
            }
            // A leader that is not reached may have a successor in a moment.
            tracing::debug!(name, "not every leader has answered");
            if tokio::time::timeout_at(deadline.at, backoff.pause()).await.is_err() {
                return Ok(topic);
            }
        }
    }

    /// What the leaders say of partitions whose logs the group's coordinator knows nothing of; -1 stays where one says nothing.
    pub(crate) async fn fill_in_offsets(&self, offsets: &mut [wire::GroupOffset]) -> Result<(), Error> {
        let deadline = Deadline::within(DESCRIBE_PATIENCE.min(self.connections.config.request_timeout));
        let mut backoff = Backoff::new(&self.connections.config);
        loop {
            let mut missing: Vec<&mut wire::GroupOffset> =
                offsets.iter_mut().filter(|offset| offset.high_watermark < 0).collect();
            let queries = missing.iter().map(|offset| wire::OffsetQuery {
                topic: offset.topic.clone(),
                partition: offset.partition,
                at: Some(At::Latest(wire::Done {})),
            });
            let queries: Vec<_> = queries.collect();
            let mut again = false;
            let told =
                |index: usize, answer: Result<wire::OffsetAnswer, Refusal>| match (missing.get_mut(index), answer) {
                    (Some(offset), Ok(answer)) => {
                        // Without a commit everything in the log is still to be read.
                        let read_to = if offset.committed < 0 { answer.log_start_offset } else { offset.committed };
                        offset.lag = (answer.high_watermark - read_to).max(0);
                        (offset.log_start_offset, offset.high_watermark) =
                            (answer.log_start_offset, answer.high_watermark);
                    }
                    (_, Err(refusal)) => again |= refusal.retryable,
                    (None, Ok(_)) => {}
                };
            self.list_offsets(&queries, told).await?;
            if !again || tokio::time::timeout_at(deadline.at, backoff.pause()).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Asks the leaders that the broker which described the topic is not. `false`: one did not answer.
    async fn fill_in(&self, topic: &mut wire::DescribeTopicResponse, described_by: i32) -> Result<bool, Error> {
        let others: BTreeSet<i32> = topic.partitions.iter().map(|partition| partition.leader).collect();
        let others: Vec<i32> = others.into_iter().filter(|leader| *leader >= 0 && *leader != described_by).collect();
        if others.iter().any(|leader| !self.connections.knows_address_of(*leader)) {
            // Its answer tells where the brokers are.
            self.metadata.newer_than(&topic.name, Some(tokio::time::Instant::now())).await?;
        }
        let name = &topic.name;
        let asking = others.into_iter().map(|leader| async move {
            // What it leads, it knows by itself.
            let request = Request::DescribeTopic(wire::DescribeTopic { name: name.clone(), stale: true });
            let deadline = Deadline::within(DESCRIBE_ONE);
            (leader, self.connections.call_at(leader, "describe topic", request, deadline).await)
        });
        for (leader, answer) in join_all(asking).await {
            let answer = match answer {
                Ok(Response::DescribeTopic(answer)) if answer.topic_id == topic.topic_id => answer,
                Ok(_) => continue,
                Err(Error::Closed) => return Err(Error::Closed),
                Err(error) => {
                    tracing::debug!(leader, %error, "a leader is not asked");
                    continue;
                }
            };
            for (partition, said) in topic.partitions.iter_mut().zip(answer.partitions) {
                if partition.leader == leader && said.leader == leader {
                    partition.log_start_offset = said.log_start_offset;
                    partition.high_watermark = said.high_watermark;
                    partition.log_end_offset = said.log_end_offset;
                    partition.size_bytes = said.size_bytes;
                    partition.fenced = said.fenced;
                }
            }
        }
        Ok(topic
            .partitions
            .iter()
            .all(|partition| partition.leader < 0 || partition.high_watermark >= 0 || partition.fenced.is_some()))
    }
}

/// What is said of a partition whose leader gave no answer.
fn unanswered(leader: i32, error: Error) -> Refusal {
    let (code, retryable) = match error.retryable() {
        true => (ErrorCode::TimedOut, true),
        false => (ErrorCode::Internal, false),
    };
    match error {
        Error::Refused(refusal) => refusal,
        error => {
            let why = format!("broker {leader}, which leads, gives no answer: {error}");
            Refusal { retryable, ..wire::Error::new(code, why).into() }
        }
    }
}

/// What stands for an answer before there is one.
fn not_asked() -> Refusal {
    wire::Error::new(ErrorCode::TimedOut, "the partition's leader was not asked").into()
}
