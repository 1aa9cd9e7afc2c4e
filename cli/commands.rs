//! One file for each word of the surface; what several share stands here.

pub(crate) mod bench;
pub(crate) mod broker;
pub(crate) mod cert;
pub(crate) mod cluster;
pub(crate) mod completions;
pub(crate) mod consume;
pub(crate) mod demo;
pub(crate) mod group;
pub(crate) mod import;
pub(crate) mod produce;
pub(crate) mod replay;
pub(crate) mod segment;
pub(crate) mod topic;
pub(crate) mod up;

use anyhow::{Context, Result, bail};
use headwater_client::{Admin, ErrorCode, OffsetAt, OffsetQuery, PartitionDescription, TopicDescription};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What a look at something failed at. Where the metadata quorum is lost, a broker still tells what it knows: `command` with --stale.
pub(crate) fn look_failed(what: &str, command: &str, error: headwater_client::Error) -> anyhow::Error {
    let why = match error.code() {
        Some(ErrorCode::OutOfTouch) => {
            format!("{what} (`headwater {command} --stale` tells what the broker knows that answers)")
        }
        _ => what.to_owned(),
    };
    anyhow::Error::from(error).context(why)
}

/// Now, in milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The moment that was so long ago, in milliseconds since 1970.
pub(crate) fn ago_ms(ago: Duration) -> i64 {
    now_ms().saturating_sub(i64::try_from(ago.as_millis()).unwrap_or(i64::MAX))
}

/// The partitions that were asked for; all of them if none was.
pub(crate) fn chosen<'a>(topic: &'a TopicDescription, wanted: &[u32]) -> Result<Vec<&'a PartitionDescription>> {
    if wanted.is_empty() {
        return Ok(topic.partitions.iter().collect());
    }
    let mut chosen = Vec::new();
    for number in wanted {
        match topic.partitions.iter().find(|partition| partition.partition == *number) {
            Some(partition) => chosen.push(partition),
            None => bail!(
                "topic {} has no partition {number}; it has {}, counted from 0",
                topic.name,
                crate::output::plural(topic.partitions.len() as i64, "partition")
            ),
        }
    }
    chosen.sort_by_key(|partition| partition.partition);
    chosen.dedup_by_key(|partition| partition.partition);
    Ok(chosen)
}

/// Puts into the description where partitions begin and end as their leaders confirm it, of those that are `wanted` (none: of all):
/// just after a change of leader the description may be behind what was acknowledged, or know nothing.
pub(crate) async fn confirm_offsets(admin: &Admin, topic: &mut TopicDescription, wanted: &[u32]) -> Result<()> {
    let name = &topic.name;
    let mut partitions: Vec<&mut PartitionDescription> = topic.partitions.iter_mut().collect();
    partitions.retain(|partition| wanted.is_empty() || wanted.contains(&partition.partition));
    let latest = |partition: u32| OffsetQuery { topic: name.clone(), partition, at: OffsetAt::Latest };
    let queries = partitions.iter().map(|partition| latest(partition.partition)).collect();
    let answers = admin.list_offsets(queries).await.with_context(|| format!("cannot ask where topic {name} ends"))?;
    for (partition, answer) in partitions.into_iter().zip(answers) {
        match answer {
            Ok(answer) => {
                partition.log_start_offset = answer.log_start_offset;
                partition.high_watermark = answer.high_watermark;
            }
            Err(refusal) if refusal.retryable => {
                let number = partition.partition;
                return Err(refusal)
                    .with_context(|| format!("cannot ask where partition {number} of topic {name} ends"));
            }
            // Whoever reads it is told why that cannot be.
            Err(_) => {}
        }
    }
    Ok(())
}

/// An offset that a person named must be one that the partition can be read from.
pub(crate) fn check_offset(topic: &str, partition: &PartitionDescription, offset: i64) -> Result<()> {
    if (partition.log_start_offset..=partition.high_watermark).contains(&offset) {
        return Ok(());
    }
    bail!(
        "offset {offset} is out of range: partition {} of topic {topic} holds offsets from {} to {} (not included); \
         choose one of those, earliest or latest, or another partition with --partition",
        partition.partition,
        partition.log_start_offset,
        partition.high_watermark
    )
}
