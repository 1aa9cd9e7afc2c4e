//! Finding who coordinates a group, and asking there.
//!
//! The brokers know who leads the group's partition of the offsets topic; any of them says it. It moves when a broker dies, and the
//! one before may only be silent: so where an answer is long in coming, the others are asked whether it has moved.
//!
//! Owns: [`Coordinators`], what was learned last. Refuses: what is asked. Read next: `consumer/commit.rs`, `consumer/group.rs`.
//!
//! What must always hold: nobody goes back to the coordinator of an earlier epoch than is remembered.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, OptionFuture, join_all};
use futures::stream::{FuturesUnordered, StreamExt};
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response};
use tokio::time::{sleep, timeout_at};

use crate::connection::{Connections, lock, repeatable};
use crate::error::{Error, LeaderHint, Refusal};
use crate::retry::{Backoff, Deadline};

/// An answer that takes longer makes one wonder whether somebody else would give it.
pub(crate) const SILENCE: Duration = Duration::from_secs(1);
/// Time for somebody to say who coordinates, where there is another one to ask.
const ASK_ONE: Duration = Duration::from_secs(1);
/// So long only one broker is asked who coordinates, then the next one too.
const NEXT_ONE: Duration = Duration::from_millis(300);
/// Most groups whose coordinators are remembered.
const MOST_KNOWN: usize = 4_096;

/// The broker that has a group, in the epoch in which it has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coordinator {
    pub(crate) broker_id: i32,
    leader_epoch: i32,
}

/// What is known of a group.
#[derive(Debug, Clone, Copy)]
struct Known {
    coordinator: Coordinator,
    /// It has turned out wrong, or did not answer.
    doubted: bool,
    /// Counts up with what is learned.
    learned: u64,
}

/// What is known of groups: of those that were heard of last.
#[derive(Default)]
struct Groups {
    known: HashMap<String, Known>,
    learned: u64,
}

impl Groups {
    /// Somebody says who coordinates a group. Returns who does, as far as is known then.
    fn note(&mut self, group: &str, said: Coordinator) -> Coordinator {
        self.learned += 1;
        let learned = self.learned;
        if let Some(known) = self.known.get_mut(group) {
            known.learned = learned;
            if said.leader_epoch >= known.coordinator.leader_epoch {
                (known.coordinator, known.doubted) = (said, false);
            }
            return known.coordinator;
        }
        if self.known.len() >= MOST_KNOWN {
            let mut ages: Vec<u64> = self.known.values().map(|known| known.learned).collect();
            let middle = *ages.select_nth_unstable(MOST_KNOWN / 2).1;
            self.known.retain(|_, known| known.learned >= middle);
        }
        self.known.insert(group.to_owned(), Known { coordinator: said, doubted: false, learned });
        said
    }
}

/// Who coordinates which group.
pub(crate) struct Coordinators {
    connections: Arc<Connections>,
    groups: Mutex<Groups>,
}

impl Coordinators {
    pub(crate) fn new(connections: Arc<Connections>) -> Coordinators {
        Coordinators { connections, groups: Mutex::default() }
    }

    /// One call to the group's coordinator, repeated with whoever has it then while that can help and cannot do harm, until the request's
    /// time is up; where the metadata quorum is lost and it is not waited for (`is_patient`: it is), until every broker that is reached has said so.
    pub(crate) async fn call(
        &self,
        group: &str,
        what: &'static str,
        is_patient: bool,
        request: Request,
    ) -> Result<Response, Error> {
        self.ask_coordinator(group, what, is_patient, || Some(request.clone())).await?.ok_or(Error::Closed)
    }

    /// As [`Coordinators::call`], with a request made anew for each attempt; `None` where nothing is left to be asked.
    pub(crate) async fn call_with(
        &self,
        group: &str,
        what: &'static str,
        request: impl Fn() -> Option<Request>,
    ) -> Result<Option<Response>, Error> {
        self.ask_coordinator(group, what, true, request).await
    }

    async fn ask_coordinator(
        &self,
        group: &str,
        what: &'static str,
        is_patient: bool,
        request: impl Fn() -> Option<Request>,
    ) -> Result<Option<Response>, Error> {
        let deadline = Deadline::within(self.connections.config.request_timeout);
        let mut backoff = Backoff::new(&self.connections.config);
        let mut cut_off = CutOff::default();
        loop {
            let error = match self.find(group, deadline).await {
                Err(error) => error,
                Ok(found) => {
                    let Some(request) = request() else { return Ok(None) };
                    let repeatable = repeatable(&request);
                    let call = self.connections.call_at(found.broker_id, what, request, deadline);
                    let error = match self.unless_moved(group, found, call).await {
                        Ok(response) => return Ok(Some(response)),
                        Err(error) => error,
                    };
                    self.failed(group, found, &error);
                    let unknown_outcome = match &error {
                        Error::Refused(refusal) => refusal.code == ErrorCode::TimedOut,
                        Error::Connect { .. } => false,
                        _ => true,
                    };
                    if unknown_outcome && !repeatable {
                        return Err(error);
                    }
                    error
                }
            };
            let error = cut_off.most_telling(error);
            if !error.retryable()
                || deadline.passed()
                || cut_off.is_told(is_patient, self.connections.known_brokers().len())
            {
                return Err(error);
            }
            tracing::debug!(what, group, %error, "the coordinator gives no answer, trying again");
            timeout_at(deadline.at, backoff.pause()).await.map_err(|_| error)?;
        }
    }

    /// All groups: those of every coordinator. `is_patient`: a lost quorum is waited for.
    pub(crate) async fn list(&self, is_patient: bool) -> Result<Vec<wire::GroupListing>, Error> {
        let deadline = Deadline::within(self.connections.config.request_timeout);
        let mut backoff = Backoff::new(&self.connections.config);
        // By the partition of the offsets topic: whoever has it by now lists its groups.
        let mut listed: HashMap<u32, Vec<wire::GroupListing>> = HashMap::new();
        let mut cut_off = CutOff::default();
        loop {
            let error = match self.ask("", None, deadline).await {
                Err(error) => error,
                Ok(found) => match self.list_once(found, &mut listed, deadline).await {
                    None => {
                        let mut groups: Vec<_> = listed.into_values().flatten().collect();
                        groups.sort_by(|a, b| a.group.cmp(&b.group));
                        return Ok(groups);
                    }
                    Some(error) => error,
                },
            };
            let error = cut_off.most_telling(error);
            if !error.retryable()
                || deadline.passed()
                || cut_off.is_told(is_patient, self.connections.known_brokers().len())
            {
                return Err(error);
            }
            tracing::debug!(%error, "not every coordinator has answered, trying again");
            timeout_at(deadline.at, backoff.pause()).await.map_err(|_| error)?;
        }
    }

    /// Asks each coordinator of partitions that are missing yet; what kept one from answering.
    async fn list_once(
        &self,
        found: Vec<wire::Coordinator>,
        listed: &mut HashMap<u32, Vec<wire::GroupListing>>,
        deadline: Deadline,
    ) -> Option<Error> {
        let mut by_broker: BTreeMap<i32, Vec<u32>> = BTreeMap::new();
        for coordinator in found.iter().filter(|found| !listed.contains_key(&found.partition)) {
            by_broker.entry(coordinator.broker_id).or_default().push(coordinator.partition);
        }
        let asking = by_broker.into_iter().map(|(broker_id, partitions)| async move {
            if broker_id < 0 {
                return Err(nobody("some groups"));
            }
            let request = Request::ListGroups(wire::ListGroups { partitions: partitions.clone() });
            let by = Deadline::within(deadline.left().min(SILENCE * 3));
            match self.connections.call_at(broker_id, "list groups", request, by).await? {
                Response::ListGroups(answer) => Ok((partitions, answer.groups)),
                _ => Err(Error::Protocol("an answer that does not belong to list groups".into())),
            }
        });
        let mut failed = None;
        for answer in join_all(asking).await {
            match answer {
                Ok((partitions, groups)) => {
                    let mut groups = Some(groups);
                    listed
                        .extend(partitions.into_iter().map(|partition| (partition, groups.take().unwrap_or_default())));
                }
                // One that asking again does not help counts for more.
                Err(error) if failed.as_ref().is_none_or(Error::retryable) => failed = Some(error),
                Err(_) => {}
            }
        }
        failed
    }

    /// The group's coordinator, as far as is known; asked anew where that is in doubt.
    ///
    /// # Errors
    /// When nobody says, or nobody coordinates it at the moment.
    pub(crate) async fn find(&self, group: &str, deadline: Deadline) -> Result<Coordinator, Error> {
        let known = lock(&self.groups).known.get(group).copied();
        if let Some(Known { coordinator, doubted: false, .. }) = known {
            return Ok(coordinator);
        }
        let found = self.ask(group, None, deadline).await?;
        let found = found.into_iter().next().filter(|found| found.broker_id >= 0).ok_or_else(|| nobody(group))?;
        Ok(self.note(group, found.broker_id, found.leader_epoch))
    }

    /// Works with the coordinator that was found, for as long as nobody says that it has moved.
    ///
    /// # Errors
    /// The work's own; [`Error::ConnectionLost`] where it has moved.
    pub(crate) async fn unless_moved<T>(
        &self,
        group: &str,
        found: Coordinator,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let mut work = std::pin::pin!(work);
        loop {
            let moved = async {
                sleep(SILENCE).await;
                self.has_moved(group, found).await
            };
            tokio::select! {
                biased;
                done = &mut work => return done,
                moved = moved => if moved {
                    return Err(moved_away(found));
                }
            }
        }
    }

    /// Asks the other brokers whether another one coordinates by now.
    pub(crate) async fn has_moved(&self, group: &str, found: Coordinator) -> bool {
        let asked = self.ask(group, Some(found.broker_id), Deadline::within(ASK_ONE)).await;
        let others = asked.ok().and_then(|found| found.into_iter().next()).filter(|other| other.broker_id >= 0);
        match others {
            Some(other) if other.leader_epoch > found.leader_epoch => {
                self.note(group, other.broker_id, other.leader_epoch) != found
            }
            _ => false,
        }
    }

    /// The coordinator that was found did not do what it was asked.
    pub(crate) fn failed(&self, group: &str, found: Coordinator, error: &Error) {
        match error {
            Error::Refused(refusal) => self.refused(group, found, refusal),
            _ => self.doubt(group, found),
        }
    }

    /// The coordinator that was found refused.
    pub(crate) fn refused(&self, group: &str, found: Coordinator, refusal: &Refusal) {
        let is_elsewhere =
            matches!(refusal.code, ErrorCode::NotCoordinator | ErrorCode::NotLeader | ErrorCode::ShuttingDown);
        if !is_elsewhere {
            return;
        }
        self.doubt(group, found);
        if let Some(LeaderHint { broker_id, address, leader_epoch }) = &refusal.leader {
            self.connections.learn_brokers(&[wire::BrokerNode {
                broker_id: *broker_id,
                address: address.clone(),
                ..wire::BrokerNode::default()
            }]);
            self.note(group, *broker_id, *leader_epoch);
        }
    }

    fn doubt(&self, group: &str, found: Coordinator) {
        if let Some(known) = lock(&self.groups).known.get_mut(group).filter(|known| known.coordinator == found) {
            known.doubted = true;
        }
    }

    /// Somebody says who coordinates: that, or what was heard of a later epoch.
    fn note(&self, group: &str, broker_id: i32, leader_epoch: i32) -> Coordinator {
        lock(&self.groups).note(group, Coordinator { broker_id, leader_epoch })
    }

    /// Asks who coordinates a group, or ("") all of them: one broker after the other, until one says it. `not`: who is not asked.
    async fn ask(&self, group: &str, not: Option<i32>, deadline: Deadline) -> Result<Vec<wire::Coordinator>, Error> {
        let request = Request::FindCoordinator(wire::FindCoordinator { group: group.to_owned() });
        let brokers = self.connections.known_brokers().into_iter().filter(|broker| Some(*broker) != not);
        let mut others = brokers.collect::<Vec<_>>().into_iter();
        let mut asking: FuturesUnordered<BoxFuture<'_, Result<Vec<wire::Coordinator>, Error>>> =
            FuturesUnordered::new();
        // Whoever answers on the control connection says most, of why nobody does too.
        let mut anybody = not.is_none().then(|| self.ask_anybody(request.clone(), deadline).boxed());
        let mut failed = None;
        loop {
            if asking.is_empty() && anybody.is_none() {
                match others.next() {
                    Some(broker) => asking.push(self.ask_broker(broker, request.clone(), deadline).boxed()),
                    None => return Err(failed.unwrap_or_else(|| nobody(group))),
                }
            }
            tokio::select! {
                biased;
                Some(answer) = OptionFuture::from(anybody.as_mut()) => match answer {
                    Ok(found) => return Ok(found),
                    Err(error) => (anybody, failed) = (None, Some(error)),
                },
                Some(answer) = asking.next() => match answer {
                    Ok(found) => return Ok(found),
                    Err(error) => {
                        failed.get_or_insert(error);
                    }
                },
                () = sleep(NEXT_ONE), if others.len() > 0 => {
                    if let Some(broker) = others.next() {
                        asking.push(self.ask_broker(broker, request.clone(), deadline).boxed());
                    }
                }
            }
        }
    }

    async fn ask_broker(
        &self,
        broker_id: i32,
        request: Request,
        deadline: Deadline,
    ) -> Result<Vec<wire::Coordinator>, Error> {
        let deadline = Deadline::within(deadline.left().min(ASK_ONE));
        self.coordinators(self.connections.call_at(broker_id, "find coordinator", request, deadline).await?)
    }

    async fn ask_anybody(&self, request: Request, deadline: Deadline) -> Result<Vec<wire::Coordinator>, Error> {
        let link = self.connections.control_by(deadline).await?;
        match link.call("find coordinator", request, deadline).await {
            // One of the time when there was one broker: it has all groups.
            Err(Error::Refused(refusal)) if refusal.code == ErrorCode::InvalidRequest => {
                Ok(vec![wire::Coordinator { broker_id: link.broker_id, ..wire::Coordinator::default() }])
            }
            answer => self.coordinators(answer.inspect_err(|error| self.connections.refused(&link, error))?),
        }
    }

    fn coordinators(&self, answer: Response) -> Result<Vec<wire::Coordinator>, Error> {
        let Response::FindCoordinator(found) = answer else {
            return Err(Error::Protocol("an answer that does not belong to find coordinator".into()));
        };
        let brokers = found.coordinators.iter().filter(|found| found.broker_id >= 0).map(|found| wire::BrokerNode {
            broker_id: found.broker_id,
            address: found.address.clone(),
            ..wire::BrokerNode::default()
        });
        self.connections.learn_brokers(&brokers.collect::<Vec<_>>());
        Ok(found.coordinators)
    }
}

/// What brokers said that are cut off from the others.
#[derive(Default)]
struct CutOff {
    said: Option<Error>,
    times: usize,
}

impl CutOff {
    /// What is told of an attempt that failed. What a broker said that is cut off tells more than that none of the others is reached.
    fn most_telling(&mut self, error: Error) -> Error {
        if error.code() == Some(ErrorCode::OutOfTouch) {
            self.said = Some(error.clone());
            self.times += 1;
        }
        self.said.clone().filter(|_| error.code().is_none() && error.retryable()).unwrap_or(error)
    }

    /// Whether whoever does not wait for a lost quorum has heard enough: so often that one of so many `brokers` has said it again.
    fn is_told(&self, is_patient: bool, brokers: usize) -> bool {
        !is_patient && self.times > brokers
    }
}

/// What is told of a coordinator that another one has followed.
pub(crate) fn moved_away(found: Coordinator) -> Error {
    Error::ConnectionLost {
        address: format!("broker {}", found.broker_id),
        reason: "it was silent, and another broker coordinates the group by now".into(),
    }
}

fn nobody(group: &str) -> Error {
    Error::refused(ErrorCode::NotCoordinator, format!("nobody coordinates {group} at the moment"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coordinators_of_the_groups_that_were_heard_of_last_are_remembered() {
        let (mut groups, first) = (Groups::default(), Coordinator { broker_id: 1, leader_epoch: 3 });
        for number in 0..5 * MOST_KNOWN {
            groups.note(&format!("g{number}"), first);
            // A member of it lives on.
            assert_eq!(groups.note("own", Coordinator { broker_id: 2, leader_epoch: 4 }).broker_id, 2);
            assert!(groups.known.len() <= MOST_KNOWN);
        }
        let newest = format!("g{}", 5 * MOST_KNOWN - 1);
        assert!(groups.known.contains_key(&newest) && !groups.known.contains_key("g0"));
        assert_eq!(groups.note("own", first).broker_id, 2, "nobody goes back");
    }
}
