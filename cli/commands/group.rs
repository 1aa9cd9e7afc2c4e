//! `headwater group ...`

use anyhow::{Context, Result, anyhow};
use headwater_client::{Admin, GroupDescription};
use serde::Serialize;
use serde_json::json;

use crate::args::{DeleteOffsetsArgs, Global, GroupCommand};
use crate::commands::chosen;
use crate::connect::with_client;
use crate::output::{note, number, plural, print, print_all, print_json, table};
use crate::spec::TopicSelection;

mod reset;

/// Runs one of the subcommands.
pub(crate) fn run(global: &Global, command: GroupCommand) -> Result<()> {
    with_client(global, async |client| {
        let admin = client.admin();
        match command {
            GroupCommand::List => list(global, &admin.impatient()).await,
            GroupCommand::Describe { group } => describe(global, &admin.impatient(), &group).await,
            GroupCommand::Members { group } => members(global, &admin.impatient(), &group).await,
            GroupCommand::Reset(args) => reset::run(global, &admin, args).await,
            GroupCommand::Delete { group } => {
                admin.delete_group(&group).await.with_context(|| format!("cannot delete group {group}"))?;
                if global.json {
                    return print_json(&json!({ "group": group, "deleted": true }));
                }
                note(global, format_args!("group {group} is deleted"));
                Ok(())
            }
            GroupCommand::DeleteOffsets(args) => delete_offsets(global, &admin, args).await,
        }
    })
}

#[derive(Serialize)]
struct Listing {
    group: String,
    state: String,
    members: u32,
}

async fn list(global: &Global, admin: &Admin) -> Result<()> {
    let mut groups: Vec<Listing> = admin
        .list_groups()
        .await
        .context("cannot list the groups")?
        .into_iter()
        .map(|group| Listing { group: group.group, state: group.state, members: group.members })
        .collect();
    groups.sort_by(|a, b| a.group.cmp(&b.group));
    print_all(global, &groups, &["group", "state", "members"], |group| {
        vec![group.group.clone(), group.state.clone(), group.members.to_string()]
    })
}

#[derive(Serialize)]
struct Description<'a> {
    group: &'a str,
    state: &'a str,
    epoch: i32,
    assignor: &'a str,
    members: Vec<Member<'a>>,
    offsets: Vec<Offset<'a>>,
}

#[derive(Serialize)]
struct Member<'a> {
    member_id: &'a str,
    instance_id: Option<&'a str>,
    client_id: &'a str,
    client_host: &'a str,
    member_epoch: i32,
    partitions: Vec<Assigned<'a>>,
}

#[derive(Serialize)]
struct Assigned<'a> {
    topic: &'a str,
    partition: u32,
}

#[derive(Serialize)]
struct Offset<'a> {
    topic: &'a str,
    partition: u32,
    committed: Option<i64>,
    log_start_offset: i64,
    high_watermark: i64,
    lag: Option<i64>,
}

async fn description(admin: &Admin, group: &str) -> Result<GroupDescription> {
    admin.describe_group(group).await.with_context(|| format!("cannot describe group {group}"))
}

fn member_list(group: &GroupDescription) -> Vec<Member<'_>> {
    group
        .members
        .iter()
        .map(|member| Member {
            member_id: &member.member_id,
            instance_id: member.instance_id.as_deref(),
            client_id: &member.client_id,
            client_host: &member.client_host,
            member_epoch: member.member_epoch,
            partitions: member.assigned.iter().map(|p| Assigned { topic: &p.topic, partition: p.partition }).collect(),
        })
        .collect()
}

async fn describe(global: &Global, admin: &Admin, group: &str) -> Result<()> {
    let group = description(admin, group).await?;
    let mut offsets: Vec<Offset<'_>> = group
        .offsets
        .iter()
        .map(|offset| Offset {
            topic: &offset.topic,
            partition: offset.partition,
            committed: offset.committed,
            log_start_offset: offset.log_start_offset,
            high_watermark: offset.high_watermark,
            lag: offset.lag,
        })
        .collect();
    offsets.sort_by(|a, b| (a.topic, a.partition).cmp(&(b.topic, b.partition)));
    let answer = Description {
        group: &group.group,
        state: &group.state,
        epoch: group.epoch,
        assignor: &group.assignor,
        members: member_list(&group),
        offsets,
    };
    if global.json {
        return print_json(&answer);
    }
    let lag: i64 = answer.offsets.iter().filter_map(|offset| offset.lag).sum();
    let mut text = format!(
        "group {}, {}, epoch {}, {}, lag {}\n",
        answer.group,
        answer.state,
        answer.epoch,
        plural(answer.members.len() as i64, "member"),
        number(lag)
    );
    if !answer.members.is_empty() {
        text.push('\n');
        text += &member_table(&answer.members);
    }
    if !answer.offsets.is_empty() {
        text.push('\n');
        let or_none = |offset: Option<i64>| offset.map_or("-".to_owned(), |offset| offset.to_string());
        text += &table(
            &["topic", "partition", "committed", "log start", "high watermark", "lag"],
            answer.offsets.iter().map(|offset| {
                vec![
                    offset.topic.to_owned(),
                    offset.partition.to_string(),
                    or_none(offset.committed),
                    offset.log_start_offset.to_string(),
                    offset.high_watermark.to_string(),
                    or_none(offset.lag),
                ]
            }),
        );
    }
    print(text)
}

async fn members(global: &Global, admin: &Admin, group: &str) -> Result<()> {
    let group = description(admin, group).await?;
    let members = member_list(&group);
    if global.json {
        return print_all(global, &members, &[], |_| Vec::new());
    }
    print(member_table(&members))
}

fn member_table(members: &[Member<'_>]) -> String {
    table(
        &["member", "instance", "client", "host", "epoch", "partitions"],
        members.iter().map(|member| {
            vec![
                member.member_id.to_owned(),
                member.instance_id.unwrap_or("-").to_owned(),
                member.client_id.to_owned(),
                member.client_host.to_owned(),
                member.member_epoch.to_string(),
                partitions_text(&member.partitions),
            ]
        }),
    )
}

/// `flights:0,2 other:1`
fn partitions_text(partitions: &[Assigned<'_>]) -> String {
    let mut sorted: Vec<(&str, u32)> = partitions.iter().map(|p| (p.topic, p.partition)).collect();
    sorted.sort_unstable();
    let mut text = String::new();
    for (index, (topic, partition)) in sorted.iter().enumerate() {
        let same = index > 0 && sorted[index - 1].0 == *topic;
        match (same, index) {
            (true, _) => text.push(','),
            (false, 0) => text += &format!("{topic}:"),
            (false, _) => text += &format!(" {topic}:"),
        }
        text += &partition.to_string();
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

/// Looks at every topic before it touches one: the broker takes one at a time, and what the first lost is gone when it refuses the second.
async fn delete_offsets(global: &Global, admin: &Admin, args: DeleteOffsetsArgs) -> Result<()> {
    let cannot = |topic: &str| {
        let nothing = if args.topic.len() > 1 { ", and nothing was deleted" } else { "" };
        format!("cannot delete what group {} committed for topic {topic}{nothing}", args.group)
    };
    let group = description(admin, &args.group).await?;
    for TopicSelection { topic, partitions } in &args.topic {
        let described = admin.describe_topic(topic).await.with_context(|| cannot(topic))?;
        chosen(&described, partitions.as_deref().unwrap_or_default()).with_context(|| cannot(topic))?;
        if let Some(member) = group.members.iter().find(|member| member.topics.contains(topic)) {
            let reads = anyhow!(
                "member {} reads it; offsets of a topic are deleted when no member subscribes to it",
                member.member_id
            );
            return Err(reads.context(cannot(topic)));
        }
    }
    for selection in &args.topic {
        let partitions = selection.partitions.as_deref().unwrap_or_default();
        admin.delete_offsets(&args.group, &selection.topic, partitions).await.with_context(|| {
            format!("cannot delete what group {} committed for topic {}", args.group, selection.topic)
        })?;
        if global.json {
            print_json(
                &json!({ "group": args.group, "topic": selection.topic, "partitions": selection.partitions, "deleted": true }),
            )?;
        } else {
            note(global, format_args!("what group {} committed for topic {} is deleted", args.group, selection.topic));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Assigned, partitions_text};

    #[test]
    fn partitions_are_grouped_by_topic() {
        let assigned = [("b", 1), ("a", 2), ("a", 0)].map(|(topic, partition)| Assigned { topic, partition });
        assert_eq!(partitions_text(&assigned), "a:0,2 b:1");
        assert_eq!(partitions_text(&[]), "none");
    }
}
