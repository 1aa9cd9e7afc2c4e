//! `headwater group reset`: where a group's offsets would go, and with `--execute` where they go.
//!
//! Owns: the plan, which is made in full before anything is changed. An offset outside of what a partition holds is
//! brought to its nearer end, as Kafka's tool does, and the plan says so.

use anyhow::{Context, Result, anyhow, bail};
use headwater_client::{
    Admin, Error, ErrorCode, GroupDescription, OffsetAt, OffsetQuery, Refusal, TopicDescription, TopicPartition,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

use crate::args::{Global, ResetArgs};
use crate::commands::{ago_ms, chosen, confirm_offsets};
use crate::output::{note, plural, print, print_all};
use crate::spec::{ResetTarget, TopicSelection};

/// A line of the plan.
#[derive(Debug, Serialize)]
struct Step {
    group: String,
    topic: String,
    partition: u32,
    /// Where the group stands; null where it has committed nothing.
    committed: Option<i64>,
    /// Where it goes.
    offset: i64,
    /// Whether it was done.
    executed: bool,
    /// What was asked for, where the log does not hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    asked: Option<i64>,
    /// Why it was not done, although it was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Plans, shows, and executes if asked to.
pub(super) async fn run(global: &Global, admin: &Admin, args: ResetArgs) -> Result<()> {
    let file = match &args.to {
        ResetTarget::File(path) => Some(read_plan(path)?),
        _ => None,
    };
    let selections = match &file {
        Some(file) if args.topic.is_empty() => from_file(file),
        Some(file) => named_in(file, &args.topic)?,
        None => args.topic.clone(),
    };
    let described = match admin.describe_group(&args.group).await {
        Ok(group) => Some(group),
        // Offsets may be given to a group that nobody has used yet.
        Err(error) if error.code() == Some(ErrorCode::GroupNotFound) => None,
        Err(error) => return Err(error).with_context(|| format!("cannot describe group {}", args.group)),
    };
    let mut steps = Vec::new();
    for selection in &selections {
        let mut topic = admin
            .describe_topic(&selection.topic)
            .await
            .with_context(|| format!("cannot describe topic {}", selection.topic))?;
        confirm_offsets(admin, &mut topic, &[]).await?;
        steps.extend(plan(admin, &args, &topic, selection, described.as_ref(), file.as_ref()).await?);
    }
    let mut failed = None;
    if args.execute && !steps.is_empty() {
        let offsets = steps.iter().map(|step| (TopicPartition::new(step.topic.as_str(), step.partition), step.offset));
        let results = admin.commit_offsets(&args.group, offsets.collect()).await;
        let results = results.map_err(|error| cannot_reset(&args.group, error))?;
        failed = settle(&mut steps, results.into_iter().map(|(_, result)| result));
    }
    show(global, &args, &steps)?;
    match failed {
        None => Ok(()),
        Some(failure) => Err(failure.context(format!("not every offset of group {} was moved", args.group))),
    }
}

/// Says what to do where that is known.
fn cannot_reset(group: &str, error: Error) -> anyhow::Error {
    let advice = match error.code() {
        Some(ErrorCode::GroupNotEmpty) => "; stop its members first",
        _ => "",
    };
    anyhow::Error::new(error).context(format!("cannot reset group {group}{advice}"))
}

/// Notes what became of each step; the first failure, if there is one.
fn settle(steps: &mut [Step], results: impl Iterator<Item = Result<(), Refusal>>) -> Option<anyhow::Error> {
    let mut first = None;
    let mut count = 0;
    for (step, result) in steps.iter_mut().zip(results) {
        match result {
            Ok(()) => step.executed = true,
            Err(refusal) => {
                count += 1;
                step.error = Some(refusal.to_string());
                first.get_or_insert_with(|| format!("partition {} of topic {}: {refusal}", step.partition, step.topic));
            }
        }
    }
    first.map(|first| anyhow!("{count} of {} were refused; {first}", plural(steps.len() as i64, "offset")))
}

async fn plan(
    admin: &Admin,
    args: &ResetArgs,
    topic: &TopicDescription,
    selection: &TopicSelection,
    group: Option<&GroupDescription>,
    file: Option<&BTreeMap<(String, u32), i64>>,
) -> Result<Vec<Step>> {
    let partitions = chosen(topic, selection.partitions.as_deref().unwrap_or_default())?;
    let time = match args.to {
        ResetTarget::Time(ms) => Some(ms),
        ResetTarget::Ago(ago) => Some(ago_ms(ago)),
        _ => None,
    };
    let mut by_time = Vec::new();
    if let Some(ms) = time {
        let queries = partitions.iter().map(|partition| OffsetQuery {
            topic: topic.name.clone(),
            partition: partition.partition,
            at: OffsetAt::Timestamp(ms),
        });
        by_time = admin.list_offsets(queries.collect()).await.context("cannot look offsets up by time")?;
    }
    let mut steps = Vec::new();
    for (index, partition) in partitions.into_iter().enumerate() {
        let number = partition.partition;
        let (first, end) = (partition.log_start_offset, partition.high_watermark);
        let committed = group
            .and_then(|group| group.offsets.iter().find(|o| *o.topic == *topic.name && o.partition == number))
            .and_then(|offset| offset.committed);
        let asked = match &args.to {
            ResetTarget::Earliest => first,
            ResetTarget::Latest => end,
            ResetTarget::Current => committed.unwrap_or(end),
            ResetTarget::Offset(offset) => *offset,
            ResetTarget::Shift(by) => match committed {
                Some(committed) => committed.saturating_add(*by),
                None => bail!(
                    "group {} has committed nothing for partition {number} of topic {}, so there is nothing to shift; \
                     reset it to earliest, latest or an offset",
                    args.group,
                    topic.name
                ),
            },
            ResetTarget::Time(_) | ResetTarget::Ago(_) => match by_time.get(index) {
                Some(Ok(answer)) => answer.offset.unwrap_or(end),
                Some(Err(refusal)) => return Err(refusal.clone()).context("cannot look an offset up by time"),
                None => bail!("the broker did not answer for partition {number} of topic {}", topic.name),
            },
            ResetTarget::File(_) => match file.and_then(|file| file.get(&(topic.name.clone(), number))) {
                Some(offset) => *offset,
                None => bail!("the file names no offset for partition {number} of topic {}", topic.name),
            },
        };
        let offset = asked.clamp(first, end.max(first));
        steps.push(Step {
            group: args.group.clone(),
            topic: topic.name.clone(),
            partition: number,
            committed,
            offset,
            executed: false,
            asked: (asked != offset).then_some(asked),
            error: None,
        });
    }
    Ok(steps)
}

fn show(global: &Global, args: &ResetArgs, steps: &[Step]) -> Result<()> {
    if args.export {
        let lines: String = steps.iter().map(|s| format!("{},{},{}\n", s.topic, s.partition, s.offset)).collect();
        print(lines)?;
    } else {
        print_all(global, steps, &["topic", "partition", "committed", "new offset", ""], |step| {
            vec![
                step.topic.clone(),
                step.partition.to_string(),
                step.committed.map_or("-".to_owned(), |offset| offset.to_string()),
                step.offset.to_string(),
                match (&step.error, step.asked) {
                    (Some(error), _) => format!("not moved: {error}"),
                    (None, Some(asked)) => format!("{asked} is not in the log"),
                    (None, None) => String::new(),
                },
            ]
        })?;
    }
    if !global.json {
        if args.execute {
            let moved = steps.iter().filter(|step| step.executed).count();
            note(global, format_args!("{} of group {} moved", plural(moved as i64, "offset"), args.group));
        } else {
            note(global, "nothing was changed; add --execute to do it");
        }
    }
    Ok(())
}

/// Lines `topic,partition,offset`; an empty line and one that begins with `#` say nothing.
fn read_plan(path: &Path) -> Result<BTreeMap<(String, u32), i64>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_plan(&text).with_context(|| path.display().to_string())
}

fn parse_plan(text: &str) -> Result<BTreeMap<(String, u32), i64>> {
    let mut plan = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut fields = line.split(',').map(|field| field.trim().trim_matches('"'));
        let (Some(topic), Some(partition), Some(offset), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            bail!("line {} is not topic,partition,offset: {line}", index + 1);
        };
        let (Ok(partition), Ok(offset)) = (partition.parse(), offset.parse()) else {
            bail!("line {}: partition and offset must be numbers: {line}", index + 1);
        };
        if plan.insert((topic.to_owned(), partition), offset).is_some() {
            bail!("line {} names partition {partition} of topic {topic} a second time", index + 1);
        }
    }
    Ok(plan)
}

/// What the file says of topics, each with the partitions that were named, or with those that the file names.
fn named_in(plan: &BTreeMap<(String, u32), i64>, wanted: &[TopicSelection]) -> Result<Vec<TopicSelection>> {
    let mut selections = Vec::new();
    for selection in wanted {
        let of_topic = plan.keys().filter(|(topic, _)| *topic == selection.topic).map(|(_, partition)| *partition);
        let there: Vec<u32> = of_topic.collect();
        if there.is_empty() {
            bail!("the file names no partition of topic {}", selection.topic);
        }
        let partitions = selection.partitions.clone().unwrap_or_else(|| there.clone());
        if let Some(missing) = partitions.iter().find(|partition| !there.contains(partition)) {
            bail!("the file names no offset for partition {missing} of topic {}", selection.topic);
        }
        selections.push(TopicSelection { topic: selection.topic.clone(), partitions: Some(partitions) });
    }
    Ok(selections)
}

fn from_file(plan: &BTreeMap<(String, u32), i64>) -> Vec<TopicSelection> {
    let mut topics: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for (topic, partition) in plan.keys() {
        topics.entry(topic).or_default().push(*partition);
    }
    topics
        .into_iter()
        .map(|(topic, partitions)| TopicSelection { topic: topic.to_owned(), partitions: Some(partitions) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_back() {
        let plan = parse_plan("# by hand\nt,0,5\n \"t\", 1, 0\r\n\nu,0,7").expect("a plan");
        assert_eq!(plan.len(), 3);
        assert_eq!(plan[&("t".to_owned(), 1)], 0);
        let selections = from_file(&plan);
        assert_eq!(selections[0], TopicSelection { topic: "t".into(), partitions: Some(vec![0, 1]) });
    }

    #[test]
    fn what_was_named_must_be_in_the_file() {
        let plan = parse_plan("t,0,5\nt,2,6\nu,0,7").expect("a plan");
        let named = |text: &str| named_in(&plan, &[text.parse().expect(text)]);
        let found = |text: &str| named(text).expect(text)[0].partitions.clone();
        assert_eq!(found("t"), Some(vec![0, 2]), "those that the file names");
        assert_eq!(found("t:2"), Some(vec![2]));
        assert!(named("t:0,1").is_err_and(|error| error.to_string().contains("partition 1 of topic t")));
        assert!(named("v").is_err_and(|error| error.to_string().contains("topic v")));
    }

    fn refusal(code: ErrorCode, message: &str) -> Refusal {
        let (message, log_start_offset, end_offset) = (message.into(), -1, -1);
        Refusal { code, message, retryable: false, log_start_offset, end_offset, leader: None }
    }

    #[test]
    fn only_a_group_with_members_is_told_to_stop_them() {
        let busy = Error::Refused(refusal(ErrorCode::GroupNotEmpty, "it has members"));
        assert!(cannot_reset("g", busy).to_string().contains("stop its members first"));
        let slow = Error::TimedOut { what: "commit offsets", after: std::time::Duration::from_secs(30) };
        let said = format!("{:#}", cannot_reset("g", slow));
        assert!(said.contains("no answer") && !said.contains("members"), "{said}");
    }

    #[test]
    fn every_partition_is_told_what_became_of_it() {
        let step = |partition| Step {
            group: "g".into(),
            topic: "t".into(),
            partition,
            committed: None,
            offset: 5,
            executed: false,
            asked: None,
            error: None,
        };
        let refusal = refusal(ErrorCode::UnknownPartition, "it is gone");
        let mut steps = [step(0), step(1), step(2)];
        let failure = settle(&mut steps, [Ok(()), Err(refusal), Ok(())].into_iter()).expect("a failure").to_string();
        assert_eq!(steps.each_ref().map(|step| step.executed), [true, false, true]);
        assert!(steps[1].error.as_ref().is_some_and(|error| error.contains("it is gone")));
        assert!(failure.contains("1 of 3 offsets") && failure.contains("partition 1 of topic t"), "{failure}");
        assert!(settle(&mut steps[..1], [Ok(())].into_iter()).is_none());
    }

    #[test]
    fn a_plan_that_is_none_names_its_line() {
        for (bad, line) in
            [("t,0", "line 1"), ("t,0,1\nt,x,1", "line 2"), ("t,0,1,2", "line 1"), ("t,0,1\nt,0,2", "line 2")]
        {
            let error = parse_plan(bad).expect_err(bad).to_string();
            assert!(error.contains(line), "{error}");
        }
    }
}
