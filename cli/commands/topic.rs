//! `headwater topic ...`

use anyhow::{Context, Result};
use headwater_client::{Admin, NewTopic, PartitionState, TopicDescription};
use serde::Serialize;
use serde_json::json;

use crate::args::{Global, TopicCommand};
use crate::commands::look_failed;
use crate::confirm::{ask, is_somebody_there};
use crate::connect::with_client;
use crate::output::{bytes, note, number, plural, print, print_all, print_json, table};
use crate::spec::{Replicas, Setting};

const CANNOT_LIST: &str = "cannot list the topics";

/// Runs one of the subcommands.
pub(crate) fn run(global: &Global, command: TopicCommand) -> Result<()> {
    with_client(global, async |client| {
        let admin = client.admin();
        match command {
            TopicCommand::Create { name, partitions, replication_factor, replica_placement, config } => {
                let mut topic = NewTopic::new(&name);
                if let Some(partitions) = partitions {
                    topic = topic.partitions(partitions);
                }
                if let Some(factor) = replication_factor {
                    topic = topic.replication_factor(factor);
                }
                if !replica_placement.is_empty() {
                    topic = topic.placement(replica_placement.into_iter().map(|Replicas(brokers)| brokers).collect());
                }
                create(global, &admin, &name, topic, config).await
            }
            TopicCommand::List { under_replicated, under_min_isr, offline, stale } => {
                let admin = asked(&admin, stale);
                let trouble: Option<fn(&PartitionState) -> bool> = match (under_replicated, under_min_isr, offline) {
                    (true, _, _) => Some(PartitionState::is_under_replicated),
                    (_, true, _) => Some(PartitionState::is_under_min_isr),
                    (_, _, true) => Some(PartitionState::is_offline),
                    _ => None,
                };
                match trouble {
                    None => list(global, &admin).await,
                    Some(is_so) => list_those(global, &admin, is_so).await,
                }
            }
            TopicCommand::Describe { name, stale } => describe(global, &asked(&admin, stale), &name).await,
            TopicCommand::Alter { name, config, unset } => alter(global, &admin, &name, config, unset).await,
            TopicCommand::AddPartitions { name, partitions } => {
                admin
                    .add_partitions(&name, partitions)
                    .await
                    .with_context(|| format!("cannot add partitions to topic {name}"))?;
                done(global, json!({ "name": name, "partitions": partitions }), || {
                    format!("topic {name} has {} now", plural(partitions, "partition"))
                })
            }
            TopicCommand::Delete { name, yes } => {
                if !yes && is_somebody_there() {
                    let told = admin.impatient().describe_topic(&name).await;
                    let told = told.with_context(|| format!("cannot describe topic {name}"))?;
                    let lost = held(told.partitions.iter().map(|it| (it.log_start_offset, it.high_watermark)));
                    ask(format!("Topic {name} and its {lost} are LOST FOR GOOD. Type its name to delete it:"), &name)
                        .await?;
                }
                admin.delete_topic(&name).await.with_context(|| format!("cannot delete topic {name}"))?;
                done(global, json!({ "name": name, "deleted": true }), || format!("topic {name} is deleted"))
            }
            TopicCommand::DeleteRecords { name, partition, before, yes } => {
                if !yes && is_somebody_there() {
                    let told = admin.impatient().describe_topic(&name).await;
                    let told = told.with_context(|| format!("cannot describe topic {name}"))?;
                    let concerned = told.partitions.iter().filter(|it| it.partition == partition);
                    let end = |end: i64| if before < 0 { end } else { end.min(before) };
                    let lost = held(concerned.map(|it| (it.log_start_offset, end(it.high_watermark))));
                    ask(
                        format!(
                            "{lost} of partition {partition} of topic {name} are LOST FOR GOOD. Type \"yes\" to delete them:"
                        ),
                        "yes",
                    )
                    .await?;
                }
                let start = admin
                    .delete_records(&name, partition, (before >= 0).then_some(before))
                    .await
                    .with_context(|| format!("cannot delete records of partition {partition} of topic {name}"))?;
                done(global, json!({ "topic": name, "partition": partition, "log_start_offset": start }), || {
                    format!("partition {partition} of topic {name} begins at offset {start} now")
                })
            }
        }
    })
}

/// How many records lie between these offsets, at most.
fn held(partitions: impl Iterator<Item = (i64, i64)>) -> String {
    plural(partitions.map(|(start, end)| end.saturating_sub(start).max(0)).sum::<i64>(), "record")
}

/// For whoever looks: a lost quorum is told at once.
fn asked(admin: &Admin, stale: bool) -> Admin {
    let admin = admin.impatient();
    if stale { admin.stale() } else { admin }
}

/// An answer to something that was done: JSON, or a remark.
fn done(global: &Global, answer: serde_json::Value, remark: impl FnOnce() -> String) -> Result<()> {
    if global.json {
        print_json(&answer)
    } else {
        note(global, remark());
        Ok(())
    }
}

#[derive(Serialize)]
struct Listing {
    name: String,
    topic_id: String,
    partitions: u32,
    replication_factor: u32,
    internal: bool,
}

async fn create(global: &Global, admin: &Admin, name: &str, mut topic: NewTopic, config: Vec<Setting>) -> Result<()> {
    for Setting { key, value } in config {
        // No setting of a topic, but one of its making.
        topic = match &*key {
            "replica.placement" => topic.placement(placement(&value)?),
            _ => topic.config(key, value),
        };
    }
    let created = admin.create_topic(topic).await.with_context(|| format!("cannot create topic {name}"))?;
    let answer = Listing {
        name: name.to_owned(),
        topic_id: created.topic_id.to_string(),
        partitions: created.partitions,
        replication_factor: created.replication_factor,
        internal: false,
    };
    if global.json {
        return print_json(&answer);
    }
    note(global, format_args!("topic {name} is created with {}", plural(answer.partitions, "partition")));
    Ok(())
}

async fn list(global: &Global, admin: &Admin) -> Result<()> {
    let topics = admin.list_topics().await.map_err(|error| look_failed(CANNOT_LIST, "topic list", error))?;
    let mut listings: Vec<Listing> = topics
        .into_iter()
        .map(|topic| Listing {
            name: topic.name,
            topic_id: topic.topic_id.to_string(),
            partitions: topic.partitions,
            replication_factor: topic.replication_factor,
            internal: topic.internal,
        })
        .collect();
    listings.sort_by(|a, b| a.name.cmp(&b.name));
    print_all(global, &listings, &["topic", "partitions", "replicas", "id", ""], |topic| {
        vec![
            topic.name.clone(),
            topic.partitions.to_string(),
            topic.replication_factor.to_string(),
            topic.topic_id.clone(),
            if topic.internal { "internal".to_owned() } else { String::new() },
        ]
    })
}

/// Which brokers keep each partition: `1:2:3,2:3:1`.
fn placement(text: &str) -> Result<Vec<Vec<i32>>> {
    let partitions = text.split(',').map(|partition| crate::spec::replicas(partition).map(|Replicas(brokers)| brokers));
    partitions.collect::<Result<_>>().context("replica.placement")
}

/// A partition that is not as it should be.
#[derive(Serialize)]
struct Trouble<'a> {
    topic: &'a str,
    partition: u32,
    leader: Option<i32>,
    replicas: &'a [i32],
    isr: &'a [i32],
    min_insync_replicas: u32,
}

async fn list_those(global: &Global, admin: &Admin, is_so: fn(&PartitionState) -> bool) -> Result<()> {
    let topics = admin.partition_states().await.map_err(|error| look_failed(CANNOT_LIST, "topic list", error))?;
    let those = topics.iter().flat_map(|(topic, partitions)| partitions.iter().map(move |it| (topic, it)));
    let those: Vec<Trouble<'_>> = those
        .filter(|(_, it)| is_so(it))
        .map(|(topic, it)| Trouble {
            topic,
            partition: it.partition,
            leader: it.leader,
            replicas: &it.replicas,
            isr: &it.isr,
            min_insync_replicas: it.min_insync_replicas,
        })
        .collect();
    let ids = |ids: &[i32]| ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    print_all(global, &those, &["topic", "partition", "leader", "replicas", "isr", "min isr"], |it| {
        vec![
            it.topic.to_owned(),
            it.partition.to_string(),
            it.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
            ids(it.replicas),
            ids(it.isr),
            it.min_insync_replicas.to_string(),
        ]
    })
}

#[derive(Serialize)]
struct Description<'a> {
    name: &'a str,
    topic_id: String,
    internal: bool,
    partitions: Vec<Partition<'a>>,
    config: Vec<Config<'a>>,
}

#[derive(Serialize)]
struct Partition<'a> {
    partition: u32,
    /// `None`: nobody.
    leader: Option<i32>,
    leader_epoch: i32,
    replicas: &'a [i32],
    isr: &'a [i32],
    /// `None`, as those below: no leader says it.
    log_start_offset: Option<i64>,
    high_watermark: Option<i64>,
    log_end_offset: Option<i64>,
    size_bytes: Option<u64>,
    /// Why the partition is not served, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    fenced: Option<&'a str>,
}

#[derive(Serialize)]
struct Config<'a> {
    name: &'a str,
    value: &'a str,
    source: &'a str,
}

async fn describe(global: &Global, admin: &Admin, name: &str) -> Result<()> {
    let topic = admin.describe_topic(name).await;
    let topic =
        topic.map_err(|error| look_failed(&format!("cannot describe topic {name}"), "topic describe", error))?;
    if !global.json {
        return print(description_text(&topic));
    }
    print_json(&Description {
        name: &topic.name,
        topic_id: topic.topic_id.to_string(),
        internal: topic.internal,
        partitions: topic
            .partitions
            .iter()
            .map(|p| Partition {
                partition: p.partition,
                leader: (p.leader >= 0).then_some(p.leader),
                leader_epoch: p.leader_epoch,
                replicas: &p.replicas,
                isr: &p.isr,
                log_start_offset: known(p.log_start_offset),
                high_watermark: known(p.high_watermark),
                log_end_offset: known(p.log_end_offset),
                size_bytes: known(p.log_end_offset).map(|_| p.size_bytes),
                fenced: p.fenced.as_ref().map(|refusal| refusal.message.as_str()),
            })
            .collect(),
        config: topic
            .config
            .iter()
            .map(|entry| Config { name: &entry.name, value: &entry.value, source: &entry.source })
            .collect(),
    })
}

/// What a leader said, if one did.
fn known(offset: i64) -> Option<i64> {
    (offset >= 0).then_some(offset)
}

fn shown(offset: i64) -> String {
    known(offset).map_or_else(|| "?".to_owned(), |offset| offset.to_string())
}

fn description_text(topic: &TopicDescription) -> String {
    let records: i64 = topic.partitions.iter().map(|p| p.high_watermark.max(0) - p.log_start_offset.max(0)).sum();
    let size: u64 = topic.partitions.iter().map(|p| p.size_bytes).sum();
    let mut text = format!(
        "topic {}{}, id {}, {}, offsets span {}, {}\n\n",
        topic.name,
        if topic.internal { " (internal)" } else { "" },
        topic.topic_id,
        plural(topic.partitions.len() as i64, "partition"),
        plural(records, "record"),
        bytes(size)
    );
    let ids = |ids: &[i32]| ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    text += &table(
        &["partition", "leader", "epoch", "replicas", "isr", "log start", "high watermark", "log end", "size"],
        topic.partitions.iter().map(|p| {
            vec![
                p.partition.to_string(),
                if p.leader < 0 { "none".to_owned() } else { p.leader.to_string() },
                p.leader_epoch.to_string(),
                ids(&p.replicas),
                ids(&p.isr),
                shown(p.log_start_offset),
                shown(p.high_watermark),
                shown(p.log_end_offset),
                known(p.log_end_offset).map_or_else(|| "?".to_owned(), |_| bytes(p.size_bytes)),
            ]
        }),
    );
    for partition in &topic.partitions {
        if let Some(refusal) = &partition.fenced {
            text += &format!("\npartition {} is fenced: {}\n", number(partition.partition), refusal.message);
        }
    }
    text.push('\n');
    text += &table(
        &["setting", "value", "source"],
        topic.config.iter().map(|entry| vec![entry.name.clone(), entry.value.clone(), entry.source.clone()]),
    );
    text
}

async fn alter(global: &Global, admin: &Admin, name: &str, config: Vec<Setting>, unset: Vec<String>) -> Result<()> {
    let changes: Vec<(String, Option<String>)> = config
        .into_iter()
        .map(|Setting { key, value }| (key, Some(value)))
        .chain(unset.into_iter().map(|key| (key, None)))
        .collect();
    admin
        .alter_topic(name, changes.clone(), false)
        .await
        .with_context(|| format!("cannot change the settings of topic {name}"))?;
    let answer: Vec<_> = changes.iter().map(|(key, value)| json!({ "name": key, "value": value })).collect();
    done(global, json!({ "name": name, "changed": answer }), || {
        let words: Vec<String> = changes
            .iter()
            .map(|(key, value)| match value {
                Some(value) => format!("{key} is {value}"),
                None => format!("{key} is the broker's"),
            })
            .collect();
        format!("topic {name}: {}", words.join(", "))
    })
}
