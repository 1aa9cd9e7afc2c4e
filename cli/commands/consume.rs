//! `headwater consume`: records out, alone or as a member of a group.
//!
//! With `--group`, what is committed is what was printed: every second, when a partition is taken away, and at the end,
//! whichever end it is. Commits of one process follow each other, so that an older one never undoes a newer one.
//!
//! Read next: [`crate::printer`].

use anyhow::{Context, Result};
use headwater_client::{
    Admin, Client, Committer, ConsumeError, Consumer, OffsetAt, OffsetQuery, PartitionDescription, Rebalance,
    StartFrom, TopicDescription, TopicPartition,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

use crate::args::{ConsumeArgs, Global};
use crate::commands::{ago_ms, check_offset, chosen, now_ms};
use crate::connect::{asked_to_end, with_client};
use crate::filter::Filter;
use crate::printer::{Printer, Progress, Rules, Work};
use crate::record::Style;
use crate::spec::{End, Start};

/// How often a member commits what it printed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the command.
pub(crate) fn run(global: &Global, args: ConsumeArgs) -> Result<()> {
    with_client(global, async |client| consume(global, client, args).await)
}

async fn consume(global: &Global, client: &Client, args: ConsumeArgs) -> Result<()> {
    let end = asked_to_end();
    let admin = client.admin();
    let topic =
        admin.describe_topic(&args.topic).await.with_context(|| format!("cannot consume topic {}", args.topic))?;
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
    let printer = Printer::start(Rules {
        style: Style::new(global.json, args.format.clone()),
        filter: Filter::default(),
        limit: args.count,
        until_ms: ends.wait_for_ms,
    })?;
    let commits = args.group.is_some().then(|| Commits::new(printer.progress()));
    let mut consumer = build(client, &args, &partitions, commits.clone()).await?;
    let committing = match &commits {
        Some(commits) => Some((commits, consumer.committer()?)),
        None => None,
    };
    let ticking = committing
        .as_ref()
        .map(|(commits, committer)| tokio::spawn(Arc::clone(commits).keep_committing(committer.clone())));
    let outcome = pump(&mut consumer, &printer, &admin, &topic, &partitions, ends, end).await;
    let printed = match outcome {
        Ok(Ended::Asked) => printer.stop().await.map(|_| ()),
        _ => printer.finish().await.map(|_| ()),
    };
    if let Some(ticking) = ticking {
        ticking.abort();
    }
    let committed = match &committing {
        Some((commits, committer)) => commits.commit(committer).await.context("cannot commit what was printed"),
        None => Ok(()),
    };
    let closed = consumer.close().await.context("cannot leave in good order");
    // What happened first says why the others happened.
    outcome?;
    printed.and(committed).and(closed)
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

/// Fetches and hands over until one of the ends comes.
async fn pump(
    consumer: &mut Consumer,
    printer: &Printer,
    admin: &Admin,
    topic: &TopicDescription,
    partitions: &[&PartitionDescription],
    ends: Ends,
    end: impl Future<Output = ()>,
) -> Result<Ended> {
    if let Some(bounds) = ends.bounds {
        consumer.until(bounds);
    }
    tokio::pin!(end);
    let moment = async {
        match ends.wait_for_ms {
            Some(ms) => tokio::time::sleep(until(ms)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(moment);
    let mut waiting = ends.wait_for_ms;
    loop {
        tokio::select! {
            biased;
            () = &mut end => return Ok(Ended::Asked),
            () = printer.ended() => return Ok(Ended::Done),
            () = &mut moment, if waiting.is_some() => {
                let bounds = bounds_at(admin, topic, partitions, waiting.take().unwrap_or_default()).await?;
                consumer.until(bounds);
            }
            batch = consumer.next_batch() => match batch {
                None => return Ok(Ended::Done),
                Some(batch) => {
                    let printing = printer.print(Work::Batch(batch.map_err(explain)?));
                    tokio::select! {
                        biased;
                        // Whoever reads the output may have stopped to.
                        () = &mut end => return Ok(Ended::Asked),
                        more = printing => if !more { return Ok(Ended::Done) },
                    }
                }
            }
        }
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

/// What a member commits.
struct Commits {
    progress: Progress,
    /// What was committed last; held while a commit is under way.
    last: Mutex<BTreeMap<TopicPartition, i64>>,
}

impl Commits {
    fn new(progress: Progress) -> Arc<Commits> {
        Arc::new(Commits { progress, last: Mutex::default() })
    }

    /// Commits what was printed since the last time.
    async fn commit(&self, committer: &Committer) -> Result<(), ConsumeError> {
        let mut last = self.last.lock().await;
        let mut news = self.progress.positions();
        news.retain(|partition, offset| last.get(partition) != Some(offset));
        if !news.is_empty() {
            committer.commit_offsets(news.clone()).await?;
            last.append(&mut news);
        }
        Ok(())
    }

    async fn rebalance(&self, change: Rebalance) {
        match change {
            Rebalance::Assigned(_) => {}
            Rebalance::Revoked(partitions, committer) => {
                self.progress.caught_up().await;
                if let Err(error) = self.commit(&committer).await {
                    tracing::warn!(%error, "cannot commit what was printed; the next owner prints it again");
                }
                self.forget(&partitions).await;
            }
            Rebalance::Lost(partitions) => {
                tracing::warn!(
                    count = partitions.len(),
                    "partitions are lost; their next owner may print some records again"
                );
                self.forget(&partitions).await;
            }
        }
    }

    async fn forget(&self, partitions: &[TopicPartition]) {
        let mut last = self.last.lock().await;
        self.progress.forget(partitions);
        last.retain(|partition, _| !partitions.contains(partition));
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
