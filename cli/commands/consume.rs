//! `headwater consume`: records out, alone or as a member of a group.
//!
//! With `--group`, what is committed is what was printed, and where nothing was, the place where the reading began: every
//! second, when a partition is taken away, and at the end, whichever end it is. Commits of one process follow each other,
//! so that an older one never undoes a newer one.
//!
//! A member has read up to `--until` when the group has: its own partitions are not all there are, and at times it has none.
//! Where a partition begins of which nothing is committed only its owner knows, and commits it; until then it counts as read
//! up to the log's start. Whether another member that commits nothing is slow or stuck, nobody can know: it is waited for, and
//! named to the person who waits.
//!
//! Read next: [`crate::shares`], then [`crate::printer`].

use anyhow::{Context, Result, bail};
use headwater_client::{
    Admin, Client, Committer, ConsumeError, ConsumedBatch, Consumer, ErrorCode, MemberDescription, OffsetAt,
    OffsetQuery, PartitionDescription, Position, Rebalance, StartFrom, TopicDescription, TopicPartition,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Notify};

use crate::args::{ConsumeArgs, Global};
use crate::commands::{ago_ms, check_offset, chosen, confirm_offsets, now_ms};
use crate::connect::{client_config, with_config};
use crate::filter::Filter;
use crate::output::note;
use crate::printer::{Printer, Progress, Rules, Work};
use crate::record::Style;
use crate::shares::Shares;
use crate::signals::Signals;
use crate::spec::{End, Start};

/// How often a member commits what it printed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);
/// How often a member that has read what it has asks how far its group is.
const GROUP_INTERVAL: Duration = Duration::from_millis(500);
/// How long a partition that is taken away waits for a reader who does not read: less than its coordinator waits for it.
const READER_PATIENCE: Duration = Duration::from_secs(10);
/// How long the rest of a group may commit nothing before a member that waits for it says so.
const GROUP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command.
pub(crate) fn run(global: &Global, args: ConsumeArgs) -> Result<()> {
    let mut config = client_config(global)?;
    config.rack = args.rack.clone().or(config.rack);
    with_config(config, async |client| consume(global, client, args).await)
}

async fn consume(global: &Global, client: &Client, args: ConsumeArgs) -> Result<()> {
    let admin = client.admin();
    let mut topic =
        admin.describe_topic(&args.topic).await.with_context(|| format!("cannot consume topic {}", args.topic))?;
    chosen(&topic, &args.partition)?;
    if args.until.is_some() || args.no_follow || matches!(args.from, Start::Offset(_)) {
        confirm_offsets(&admin, &mut topic, &args.partition).await?;
    }
    let topic = topic;
    let partitions = chosen(&topic, &args.partition)?;
    if let (Start::Offset(offset), None) = (args.from, &args.group) {
        for partition in &partitions {
            check_offset(&topic.name, partition, offset)?;
        }
    }
    let mut until = args.until;
    if until.is_none() && args.no_follow {
        until = Some(End::Now);
    }
    let ends = Ends::resolve(&admin, &topic, &partitions, until, args.no_follow).await?;
    let signals = Signals::catch();
    let shares = args.group.is_some().then(Arc::<Shares>::default);
    let rules = Rules {
        style: Style::new(global.json, args.format.clone()),
        filter: Filter::default(),
        limit: args.count,
        until_ms: ends.wait_for_ms,
    };
    let printer = Printer::start(rules, shares.clone())?;
    let commits = shares.map(|shares| Commits::new(printer.progress(), shares));
    let begin = build(client, &args, &partitions, commits.clone());
    let Some(begun) = signals.unless_asked(begin).await else {
        return printer.stop().await.map(|_| ());
    };
    let mut consumer = begun?;
    let member = match (&args.group, &commits) {
        (Some(group), Some(commits)) => Some(Member { group, commits, committer: consumer.committer()? }),
        _ => None,
    };
    let ticking = member
        .as_ref()
        .map(|member| tokio::spawn(Arc::clone(member.commits).keep_committing(member.committer.clone())));
    let reading = Reading {
        global,
        consumer: &mut consumer,
        printer: &printer,
        admin: &admin,
        topic: &topic,
        partitions: &partitions,
        member: member.as_ref(),
        signals: &signals,
        bounds: ends.bounds,
        standstill: Standstill::default(),
    };
    let outcome = reading.pump(ends.wait_for_ms).await;
    let printed = match outcome {
        Ok(Ended::Asked) => printer.stop().await,
        _ => printer.finish(signals.asked()).await,
    };
    if let Some(ticking) = ticking {
        ticking.abort();
    }
    let committed = match &member {
        Some(member) => {
            member.commits.begin(&consumer);
            member.commits.commit(&member.committer).await.context("cannot commit what was printed")
        }
        None => Ok(()),
    };
    let closed = consumer.close().await.context("cannot leave in good order");
    let kept = match &member {
        Some(member) => member.commits.nothing_left().await,
        None => Ok(()),
    };
    // What happened first says why the others happened.
    outcome?;
    printed.and(committed).and(closed).and(kept)
}

/// Why the reading ended.
enum Ended {
    /// Everything up to the end was read, or printing needs no more.
    Done,
    /// Somebody asked for it.
    Asked,
}

async fn build(
    client: &Client,
    args: &ConsumeArgs,
    partitions: &[&PartitionDescription],
    commits: Option<Arc<Commits>>,
) -> Result<Consumer> {
    let mut builder = client.consumer().start(start_from(args.from)).auto_commit(None);
    builder = match &args.group {
        None => builder.assign(partitions.iter().map(|partition| (args.topic.as_str(), partition.partition))),
        Some(group) => {
            let mut builder = builder.group(group.as_str()).topics([args.topic.as_str()]);
            if let Some(id) = &args.instance_id {
                builder = builder.instance_id(id);
            }
            if let Some(assignor) = &args.assignor {
                builder = builder.assignor(assignor);
            }
            if let Some(timeout) = args.session_timeout {
                builder = builder.session_timeout(timeout);
            }
            if let Some(commits) = commits {
                builder = builder.on_rebalance(move |change| {
                    let commits = commits.clone();
                    async move { commits.rebalance(change).await }
                });
            }
            builder
        }
    };
    builder.build().await.with_context(|| match &args.group {
        Some(group) => format!("cannot join group {group}"),
        None => format!("cannot consume topic {}", args.topic),
    })
}

/// Where a consumer starts.
pub(crate) fn start_from(start: Start) -> StartFrom {
    match start {
        Start::Earliest => StartFrom::Earliest,
        Start::Latest => StartFrom::Latest,
        Start::Offset(offset) => StartFrom::Offset(offset),
        Start::Time(ms) => StartFrom::Timestamp(ms),
        Start::Ago(ago) => StartFrom::Timestamp(ago_ms(ago)),
    }
}

/// A membership, for whoever has to know how far the group is.
struct Member<'a> {
    group: &'a str,
    commits: &'a Arc<Commits>,
    committer: Committer,
}

/// Everything that reading needs.
struct Reading<'a> {
    global: &'a Global,
    consumer: &'a mut Consumer,
    printer: &'a Printer,
    admin: &'a Admin,
    topic: &'a TopicDescription,
    partitions: &'a [&'a PartitionDescription],
    member: Option<&'a Member<'a>>,
    signals: &'a Signals,
    /// The first offset of each partition that is not wanted. `None`: there is no end, or nobody knows it yet.
    bounds: Option<BTreeMap<TopicPartition, i64>>,
    standstill: Standstill,
}

impl Reading<'_> {
    /// Fetches and hands over until one of the ends comes.
    async fn pump(mut self, mut waiting: Option<i64>) -> Result<Ended> {
        if let Some(bounds) = &self.bounds {
            self.consumer.until(bounds.clone());
        }
        if self.member.is_some() {
            tokio::select! {
                biased;
                () = self.signals.asked() => return Ok(Ended::Asked),
                () = self.printer.ended() => return Ok(Ended::Done),
                assigned = self.consumer.assigned() => { assigned.map_err(explain)?; }
            }
        }
        let awaited = waiting;
        let moment = async {
            match awaited {
                Some(ms) => tokio::time::sleep(until(ms)).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(moment);
        let mut tick = tokio::time::interval(GROUP_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Nothing is left of what this member has, and since when the group has not been asked.
        let (mut idle, mut unasked) = (false, true);
        loop {
            if let Some(member) = self.member {
                member.commits.begin(self.consumer);
            }
            tokio::select! {
                biased;
                () = self.signals.asked() => return Ok(Ended::Asked),
                () = self.printer.ended() => return Ok(Ended::Done),
                () = &mut moment, if waiting.is_some() => {
                    let ms = waiting.take().unwrap_or_default();
                    let found = self.signals.unless_asked(bounds_at(self.admin, self.topic, self.partitions, ms)).await;
                    let Some(bounds) = found else { return Ok(Ended::Asked) };
                    let bounds = bounds?;
                    self.consumer.until(bounds.clone());
                    self.bounds = Some(bounds);
                }
                () = assigned(self.member) => idle = false,
                _ = tick.tick(), if self.member.is_some() => {
                    self.bound_what_was_added();
                    if idle {
                        let signals = self.signals;
                        match signals.unless_asked(self.is_through()).await {
                            None => return Ok(Ended::Asked),
                            Some(through) => if through? { return Ok(Ended::Done) },
                        }
                        (idle, unasked) = (false, false);
                    }
                }
                batch = self.consumer.next_batch(), if !idle => match batch {
                    None if self.member.is_none() => return Ok(Ended::Done),
                    None => {
                        idle = true;
                        if unasked {
                            tick.reset_immediately();
                        }
                    }
                    Some(batch) => {
                        unasked = true;
                        let batch = batch.map_err(explain)?;
                        if !self.is_wanted(&batch) {
                            continue;
                        }
                        let printing = self.printer.print(Work::Batch(batch));
                        tokio::select! {
                            biased;
                            // Whoever reads the output may have stopped to.
                            () = self.signals.asked() => return Ok(Ended::Asked),
                            more = printing => if !more { return Ok(Ended::Done) },
                        }
                    }
                }
            }
        }
    }

    /// Takes note of where a batch begins. `false`: its partition was added since the end was fixed, and what is in it
    /// lies beyond the end.
    fn is_wanted(&mut self, batch: &ConsumedBatch) -> bool {
        let Some(member) = self.member else { return true };
        let at = TopicPartition::new(batch.topic().clone(), batch.partition());
        member.commits.shares.begin(&at, Position { offset: batch.base_offset(), leader_epoch: -1 });
        self.bounds.as_ref().is_none_or(|bounds| bounds.get(&at).is_some_and(|bound| *bound > batch.base_offset()))
    }

    /// Partitions that were added since the end was fixed lie beyond it.
    fn bound_what_was_added(&mut self) {
        let Some(bounds) = &mut self.bounds else { return };
        let known = bounds.len();
        for at in self.consumer.assignment() {
            bounds.entry(at).or_insert(0);
        }
        if bounds.len() > known {
            self.consumer.until(bounds.clone());
        }
    }

    /// Whether the group has read everything up to the end. What this member printed counts once it is committed.
    async fn is_through(&mut self) -> Result<bool> {
        let (Some(member), Some(bounds)) = (self.member, &self.bounds) else { return Ok(false) };
        if !self.printer.progress().caught_up().await || member.commits.commit(&member.committer).await.is_err() {
            // The one who commits regularly says why, and tries again.
            return Ok(false);
        }
        if !member.commits.shares.all_begun() {
            // Its place in a partition is still to come, and to be committed.
            return Ok(false);
        }
        let committed = match self.admin.fetch_offsets(member.group).await {
            Ok(offsets) => offsets,
            // The broker may be starting again; the consumer waits for it too.
            Err(error) if error.retryable() => return Ok(false),
            Err(error) if error.code() == Some(ErrorCode::GroupNotFound) => Vec::new(),
            Err(error) => return Err(error).context("cannot ask how far the group is"),
        };
        let at = |number| TopicPartition::new(self.topic.name.as_str(), number);
        let mut places: BTreeMap<TopicPartition, i64> =
            self.partitions.iter().map(|partition| (at(partition.partition), partition.log_start_offset)).collect();
        places.extend(
            committed.into_iter().map(|entry| (TopicPartition::new(entry.topic, entry.partition), entry.offset)),
        );
        let behind = behind(bounds, &places);
        let through = behind.is_empty();
        if self.standstill.is_news(behind, Instant::now())
            && let Ok(group) = self.admin.describe_group(member.group).await
        {
            for waiting in self.standstill.tell(&group.members) {
                note(self.global, waiting);
            }
        }
        Ok(through)
    }
}

/// The partitions that are not read up to their bounds: how far they are, and the bound. Before the first offset there is
/// nothing to read.
fn behind(
    bounds: &BTreeMap<TopicPartition, i64>,
    places: &BTreeMap<TopicPartition, i64>,
) -> BTreeMap<TopicPartition, (i64, i64)> {
    let place = |at| places.get(at).copied().unwrap_or(0);
    let all = bounds.iter().map(|(at, bound)| (at.clone(), (place(at), *bound)));
    all.filter(|(_, (place, bound))| place < bound).collect()
}

/// What a member that has read its own partitions still waits for, and since when nothing of it has moved.
#[derive(Default)]
struct Standstill {
    behind: BTreeMap<TopicPartition, (i64, i64)>,
    since: Option<Instant>,
    told: bool,
}

impl Standstill {
    /// Whether it is time to [tell](Self::tell), once, that nothing moves.
    fn is_news(&mut self, behind: BTreeMap<TopicPartition, (i64, i64)>, now: Instant) -> bool {
        if behind != self.behind {
            *self = Standstill { behind, ..Standstill::default() };
        }
        let since = *self.since.get_or_insert(now);
        !self.behind.is_empty() && !self.told && now.saturating_duration_since(since) >= GROUP_PATIENCE
    }

    /// What is waited for, one line a partition.
    fn tell(&mut self, members: &[MemberDescription]) -> Vec<String> {
        self.told = true;
        let line = |(at, (place, bound)): (&TopicPartition, &(i64, i64))| {
            let holder = members.iter().find(|member| member.assigned.contains(at)).map_or_else(
                || "nobody holds it yet".to_owned(),
                |m| format!("member {} ({} at {}) holds it", m.member_id, m.client_id, m.client_host),
            );
            format!(
                "waiting for {at}: {holder}, and nothing was committed for {} s; the group is at {place} of {bound}",
                GROUP_PATIENCE.as_secs()
            )
        };
        self.behind.iter().map(line).collect()
    }
}

/// Resolves when a member was given partitions.
async fn assigned(member: Option<&Member<'_>>) {
    match member {
        Some(member) => member.commits.assigned.notified().await,
        None => std::future::pending().await,
    }
}

/// What to do about an error of the consumer.
pub(crate) fn explain(error: ConsumeError) -> anyhow::Error {
    let advice = match &error {
        ConsumeError::OffsetOutOfRange { .. } => {
            "choose another place with --from, or move the group with `headwater group reset`"
        }
        ConsumeError::LogTruncated { .. } => "look at the broker's log: records that were read before are lost",
        ConsumeError::Corrupt { .. } => "check the broker's files with `headwater segment verify`",
        _ => return anyhow::Error::new(error),
    };
    anyhow::anyhow!("{error}. What to do: {advice}")
}

/// How long until a moment.
fn until(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms.saturating_sub(now_ms())).unwrap_or(0))
}

/// Where the reading ends.
#[derive(Debug, Default)]
struct Ends {
    /// The first offset of each partition that is not wanted.
    bounds: Option<BTreeMap<TopicPartition, i64>>,
    /// A time to come: until then nobody knows the bounds, and records of that time or later are not wanted.
    wait_for_ms: Option<i64>,
}

impl Ends {
    async fn resolve(
        admin: &Admin,
        topic: &TopicDescription,
        partitions: &[&PartitionDescription],
        until: Option<End>,
        no_follow: bool,
    ) -> Result<Ends> {
        let at = |partition: &PartitionDescription| TopicPartition::new(topic.name.as_str(), partition.partition);
        let bounds = match until {
            None => return Ok(Ends::default()),
            Some(End::Now) => partitions.iter().map(|p| (at(p), p.high_watermark)).collect(),
            Some(End::Offset(offset)) => partitions
                .iter()
                .map(|p| (at(p), if no_follow { offset.min(p.high_watermark) } else { offset }))
                .collect(),
            Some(End::Time(ms)) if ms > now_ms() && !no_follow => {
                return Ok(Ends { bounds: None, wait_for_ms: Some(ms) });
            }
            Some(End::Time(ms)) => bounds_at(admin, topic, partitions, ms).await?,
            Some(End::Ago(ago)) => bounds_at(admin, topic, partitions, ago_ms(ago)).await?,
        };
        Ok(Ends { bounds: Some(bounds), wait_for_ms: None })
    }
}

/// Of each partition the first offset at or after a time; its end where there is none.
async fn bounds_at(
    admin: &Admin,
    topic: &TopicDescription,
    partitions: &[&PartitionDescription],
    ms: i64,
) -> Result<BTreeMap<TopicPartition, i64>> {
    let queries = partitions.iter().map(|partition| OffsetQuery {
        topic: topic.name.clone(),
        partition: partition.partition,
        at: OffsetAt::Timestamp(ms),
    });
    let answers = admin.list_offsets(queries.collect()).await.context("cannot look offsets up by time")?;
    let mut bounds = BTreeMap::new();
    for (partition, answer) in partitions.iter().zip(answers) {
        let answer = answer.context("cannot look an offset up by time")?;
        bounds.insert(
            TopicPartition::new(topic.name.as_str(), partition.partition),
            answer.offset.unwrap_or(answer.high_watermark),
        );
    }
    Ok(bounds)
}

/// Says which partitions this member lost.
fn taken_away<'a>(partitions: impl Iterator<Item = &'a TopicPartition>) -> String {
    let names: Vec<String> = partitions.map(ToString::to_string).collect();
    format!("partitions {} were taken away", names.join(", "))
}

/// What a member commits.
struct Commits {
    progress: Progress,
    shares: Arc<Shares>,
    /// What was committed last; held while a commit is under way.
    last: Mutex<BTreeMap<TopicPartition, Position>>,
    /// Partitions were given to this member.
    assigned: Notify,
    /// Partitions were lost: what is being committed of them must not be tried again.
    lost: Notify,
}

impl Commits {
    fn new(progress: Progress, shares: Arc<Shares>) -> Arc<Commits> {
        let (last, assigned, lost) = (Mutex::default(), Notify::new(), Notify::new());
        Arc::new(Commits { progress, shares, last, assigned, lost })
    }

    /// Takes note of where reading began, for partitions of which nothing came yet.
    fn begin(&self, consumer: &Consumer) {
        if self.shares.all_begun() {
            return;
        }
        for (at, position) in consumer.positions() {
            self.shares.begin(&at, position);
        }
    }

    /// Commits what was printed since the last time.
    async fn commit(&self, committer: &Committer) -> Result<(), ConsumeError> {
        self.commit_by(|positions| committer.commit_offsets(positions)).await
    }

    /// As [`Commits::commit`]. A partition that is this member's no more is given up; the others are committed all the same.
    async fn commit_by<C: Future<Output = Result<(), ConsumeError>>>(
        &self,
        commit: impl Fn(BTreeMap<TopicPartition, Position>) -> C,
    ) -> Result<(), ConsumeError> {
        let mut last = self.last.lock().await;
        let mut lost = std::pin::pin!(self.lost.notified());
        lost.as_mut().enable();
        let mut news = self.beyond(&last);
        while !news.is_empty() {
            let committed = tokio::select! {
                biased;
                // A member that comes back may not commit what it had before.
                () = lost.as_mut() => return Ok(()),
                committed = commit(news.clone()) => committed,
            };
            match committed {
                Ok(()) => last.append(&mut news),
                // Its next owner commits it; whoever takes it away here tells the shares.
                Err(ConsumeError::NotAssigned { topic, partition })
                    if news.remove(&TopicPartition::new(topic.clone(), partition)).is_some() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Where this member is in partitions of which that is not what was committed `last`.
    fn beyond(&self, last: &BTreeMap<TopicPartition, Position>) -> BTreeMap<TopicPartition, Position> {
        let mut positions = self.shares.positions();
        positions.retain(|partition, position| last.get(partition) != Some(position));
        positions
    }

    /// Nothing that was printed is left without a commit.
    async fn nothing_left(&self) -> Result<()> {
        let left = self.beyond(&*self.last.lock().await);
        if left.is_empty() {
            return Ok(());
        }
        bail!(
            "{} before what was printed of them was committed; their next owner prints it again",
            taken_away(left.keys())
        )
    }

    async fn rebalance(&self, change: Rebalance) {
        match change {
            Rebalance::Assigned(partitions) => {
                self.shares.take_on(&partitions);
                self.assigned.notify_one();
            }
            Rebalance::Revoked(partitions, committer) => {
                if tokio::time::timeout(READER_PATIENCE, self.progress.caught_up()).await.is_err() {
                    tracing::warn!("nobody reads the output; what waits to be printed is left to the next owner");
                }
                if let Err(error) = self.commit(&committer).await {
                    tracing::warn!(%error, "cannot commit what was printed; the next owner prints it again");
                }
                let mut left = self.beyond(&*self.last.lock().await);
                left.retain(|partition, _| partitions.contains(partition));
                if !left.is_empty() {
                    tracing::warn!(
                        "{} before what was printed of them was committed; their next owner prints it again",
                        taken_away(left.keys())
                    );
                }
                self.forget(&partitions).await;
            }
            Rebalance::Lost(partitions) => {
                tracing::warn!(
                    count = partitions.len(),
                    "partitions are lost; their next owner may print some records again"
                );
                self.shares.give_up(&partitions);
                self.lost.notify_waiters();
                self.forget(&partitions).await;
            }
        }
    }

    async fn forget(&self, partitions: &[TopicPartition]) {
        self.shares.give_up(partitions);
        self.last.lock().await.retain(|partition, _| !partitions.contains(partition));
    }

    async fn keep_committing(self: Arc<Self>, committer: Committer) {
        let mut tick = tokio::time::interval(COMMIT_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(error) = self.commit(&committer).await {
                tracing::warn!(%error, "cannot commit; will try again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn at(partition: u32) -> TopicPartition {
        TopicPartition::new("t", partition)
    }

    /// A member of this many partitions, with five records printed of each.
    fn commits(partitions: u32) -> Arc<Commits> {
        let rules = Rules { style: Style::Value, filter: Filter::default(), limit: None, until_ms: None };
        let shares = Arc::new(Shares::default());
        let printer = Printer::start_on(tempfile::tempfile().expect("a file"), rules, Some(shares.clone()));
        let commits = Commits::new(printer.expect("a printer").progress(), shares);
        for partition in (0..partitions).map(at) {
            commits.shares.take_on(std::slice::from_ref(&partition));
            commits.shares.begin(&partition, Position { offset: 5, leader_epoch: 0 });
        }
        commits
    }

    #[tokio::test]
    async fn a_partition_that_was_taken_away_keeps_no_other_from_being_committed() {
        let commits = commits(4);
        let asked = RefCell::new(Vec::new());
        let coordinator = |positions: BTreeMap<TopicPartition, Position>| {
            let asked_now: Vec<u32> = positions.keys().map(|at| at.partition).collect();
            let gone = asked_now.iter().find(|partition| [0, 2].contains(*partition)).copied();
            asked.borrow_mut().push(asked_now);
            std::future::ready(match gone {
                Some(partition) => Err(ConsumeError::NotAssigned { topic: "t".into(), partition }),
                None => Ok(()),
            })
        };
        commits.commit_by(coordinator).await.expect("the others are committed");
        assert_eq!(asked.take(), [vec![0, 1, 2, 3], vec![1, 2, 3], vec![1, 3]]);
        commits.commit_by(coordinator).await.expect("nothing new");
        assert_eq!(asked.take(), [vec![0, 2], vec![2]], "what is committed is not committed again");
        let left = commits.nothing_left().await.expect_err("two are left").to_string();
        assert!(left.contains("t-0, t-2 were taken away"), "{left}");
        commits.forget(&[at(0)]).await;
        commits.forget(&[at(2)]).await;
        commits.nothing_left().await.expect("others have them now");
        commits.shares.take_on(&[at(0)]);
        commits.shares.begin(&at(0), Position { offset: 6, leader_epoch: 0 });
        let refuse = |_| std::future::ready(Err(ConsumeError::Closed));
        assert!(commits.commit_by(refuse).await.is_err(), "any other refusal is one");
    }

    #[test]
    fn what_nobody_began_is_read_up_to_where_the_log_starts() {
        let bounds = BTreeMap::from([(at(0), 10), (at(1), 10), (at(2), 0)]);
        let places = |first, second| BTreeMap::from([(at(0), first), (at(1), second)]);
        assert_eq!(behind(&bounds, &places(10, 11)), BTreeMap::new(), "an empty partition needs no place");
        assert_eq!(behind(&bounds, &places(10, 9)), BTreeMap::from([(at(1), (9, 10))]));
        assert_eq!(behind(&bounds, &BTreeMap::from([(at(0), 10)])), BTreeMap::from([(at(1), (0, 10))]));
    }

    #[test]
    fn a_member_that_keeps_the_others_waiting_is_named_once_while_nothing_moves() {
        let began = Instant::now();
        let mut standstill = Standstill::default();
        let news = |standstill: &mut Standstill, place, seconds| {
            let behind = BTreeMap::from([(at(1), (place, 10))]);
            standstill.is_news(behind, began + Duration::from_secs(seconds))
        };
        assert!(!news(&mut standstill, 4, 0) && !news(&mut standstill, 4, 9));
        assert!(!news(&mut standstill, 5, 10) && !news(&mut standstill, 5, 19), "it moved");
        assert!(news(&mut standstill, 5, 20));
        assert!(news(&mut standstill, 5, 21), "nobody could say who holds it");
        standstill.tell(&[]);
        assert!(!news(&mut standstill, 5, 22) && !news(&mut standstill, 5, 99), "said already");
        assert!(!news(&mut standstill, 6, 100) && news(&mut standstill, 6, 110), "and stands still again");
        assert!(
            !standstill.is_news(BTreeMap::new(), began)
                && !standstill.is_news(BTreeMap::new(), began + 2 * GROUP_PATIENCE)
        );
        standstill.is_news(BTreeMap::from([(at(1), (6, 10)), (at(2), (0, 1))]), began);
        let holder = MemberDescription {
            member_id: "m".into(),
            instance_id: None,
            client_id: "billing".into(),
            client_host: "10.0.0.1".into(),
            member_epoch: 3,
            assigned: vec![at(1)],
            target: Vec::new(),
            topics: Vec::new(),
        };
        let told = standstill.tell(&[holder]);
        assert!(told[0].contains("waiting for t-1: member m (billing at 10.0.0.1) holds it"), "{told:?}");
        assert!(told[0].contains("at 6 of 10"), "{told:?}");
        assert!(told[1].contains("waiting for t-2: nobody holds it yet"), "{told:?}");
    }
}
