//! `headwater cluster elect | reassign | rebalance | drain`: who leads, and where partitions are kept.

use anyhow::{Context, Result, bail};
use headwater_client::{AddingReplica, Admin, ElectedLeader, Moves, PartitionMove, Reassignment};
use serde::Serialize;
use serde_json::json;
use std::time::Duration;

use crate::args::{ElectArgs, Global, PaceArgs, ReassignArgs, ReassignCommand};
use crate::confirm::{ask, is_somebody_there};
use crate::output::{Unit, bytes, complain, note, number, plural, print, print_all, print_json, progress, table};

/// How often it is looked how far things have moved.
const LOOK: Duration = Duration::from_millis(200);

/// `headwater cluster elect`.
pub(super) async fn elect(global: &Global, admin: &Admin, args: &ElectArgs) -> Result<()> {
    let topic = args.topic.as_deref();
    if !args.unclean {
        let elected = admin.elect_preferred(topic).await.context("cannot elect leaders")?;
        if elected.unnamed > 0 {
            let leaders = plural(i128::from(elected.unnamed), "leader");
            complain(format_args!("{leaders} elected; the answer that named them was lost"));
            return Ok(());
        }
        let elected = elected.leaders;
        return print_elected(global, &elected, "every partition is led by who should lead it, or by who can");
    }
    let may_lose = match args.dry_run {
        true => admin.impatient().elect_unclean(topic, true).await,
        false => admin.elect_unclean(topic, true).await,
    };
    let may_lose = may_lose.context("cannot elect leaders")?.leaders;
    for line in warning(&may_lose) {
        complain(line);
    }
    let elected = match args.dry_run || may_lose.is_empty() {
        true => may_lose,
        false => {
            if !args.yes {
                if !is_somebody_there() {
                    bail!("nothing was done: --yes says that what is named above may be lost");
                }
                ask("Type \"yes\" to lose it:".to_owned(), "yes").await?;
            }
            let elected = admin.elect_unclean(topic, false).await.context("cannot elect leaders")?;
            match elected.unnamed {
                0 => elected.leaders,
                _ => who_leads_now(admin, may_lose).await?,
            }
        }
    };
    print_elected(global, &elected, "nothing to elect: no partition without a leader has a replica that runs")
}

/// The election took place, and the answer that said who was elected was lost.
async fn who_leads_now(admin: &Admin, elected: Vec<ElectedLeader>) -> Result<Vec<ElectedLeader>> {
    let states = admin.partition_states().await.context("leaders were elected; cannot see which")?;
    let leader = |it: &ElectedLeader| {
        let partition = states.get(&it.topic)?.iter().find(|partition| partition.partition == it.partition)?;
        partition.leader
    };
    let elected = elected.into_iter().map(|it| ElectedLeader { leader: leader(&it), ..it });
    Ok(elected.filter(|it| it.leader.is_some()).collect())
}

/// What an unclean election may lose, loudly.
fn warning(elected: &[ElectedLeader]) -> Vec<String> {
    if elected.is_empty() {
        return Vec::new();
    }
    let first = format!(
        "UNCLEAN ELECTION of {}: ACKNOWLEDGED RECORDS MAY BE LOST FOR GOOD. To lose nothing, start the brokers named below instead.",
        plural(elected.len() as i64, "leader")
    );
    let rest = elected.iter().map(|it| {
        let lost = match &*it.had_everything {
            [] => "whatever it misses of what whoever was in sync last has is LOST".to_owned(),
            brokers if it.leader.is_some_and(|leader| brokers.contains(&leader)) => {
                "it was in sync last; whatever it has lost since is LOST".to_owned()
            }
            brokers => format!("whatever it misses of what broker {} has is LOST", ids(brokers)),
        };
        format!("  {}-{}: broker {} leads; {lost}", it.topic, it.partition, name(it.leader))
    });
    std::iter::once(first).chain(rest).collect()
}

#[derive(Serialize)]
struct Elected<'a> {
    topic: &'a str,
    partition: u32,
    leader_before: Option<i32>,
    leader: Option<i32>,
    had_everything: &'a [i32],
}

fn print_elected(global: &Global, elected: &[ElectedLeader], none: &str) -> Result<()> {
    if elected.is_empty() && !global.json {
        note(global, none);
        return Ok(());
    }
    let rows: Vec<Elected<'_>> = elected
        .iter()
        .map(|it| Elected {
            topic: &it.topic,
            partition: it.partition,
            leader_before: it.leader_before,
            leader: it.leader,
            had_everything: &it.had_everything,
        })
        .collect();
    print_all(global, &rows, &["topic", "partition", "leader before", "leader"], |it| {
        vec![it.topic.to_owned(), it.partition.to_string(), name(it.leader_before), name(it.leader)]
    })
}

/// `headwater cluster reassign`.
pub(super) async fn reassign(global: &Global, admin: &Admin, args: ReassignArgs) -> Result<()> {
    match args.command {
        Some(ReassignCommand::Status) => {
            let moving = admin.impatient().reassignments().await.context("cannot see what moves")?;
            status(global, &moving)
        }
        Some(ReassignCommand::Cancel { topic, partition }) => {
            let cancelled = admin.cancel_moves(topic.as_deref(), partition, None).await;
            print_cancelled(global, &cancelled.context("cannot cancel it")?)
        }
        None => {
            let (topic, partition) = (args.topic.unwrap_or_default(), args.partition.unwrap_or_default());
            let what = format!("cannot move partition {partition} of topic {topic}");
            let moves = Moves::Partition { topic, partition, replicas: args.replicas };
            let moved = admin.move_partitions(moves, args.throttle, false).await.context(what)?;
            print_moves(global, &moved)?;
            if !global.json {
                note(global, "it moves now; `headwater cluster reassign status` shows how far it is");
            }
            Ok(())
        }
    }
}

/// `headwater cluster rebalance`.
pub(super) async fn rebalance(global: &Global, admin: &Admin, dry_run: bool, pace: &PaceArgs) -> Result<()> {
    let planner = if dry_run { admin.impatient() } else { admin.clone() };
    let moved = planner.move_partitions(Moves::Rebalance, pace.throttle, dry_run).await.context("cannot rebalance")?;
    if moved.is_empty() && !global.json {
        note(global, "partitions and leaders are as even as they can be: nothing is to be moved");
    } else {
        print_moves(global, &moved)?;
    }
    if dry_run || pace.no_wait {
        return Ok(());
    }
    wait(global, admin, "rebalance", |it| moved.iter().any(|moved| (&*moved.topic, moved.partition) == it)).await?;
    // Whoever should lead has everything now.
    let elected = admin.elect_preferred(None).await.context("cannot elect the leaders that should lead")?;
    if !global.json {
        let (moved, led) = (moved.len() as i64, elected.leaders.len() as u64 + elected.unnamed);
        note(global, format_args!("done: {}, {} elected", plural(moved, "partition"), plural(led, "leader")));
    }
    Ok(())
}

/// `headwater cluster drain`.
pub(super) async fn drain(global: &Global, admin: &Admin, id: i32, pace: &PaceArgs) -> Result<()> {
    let what = || format!("cannot drain broker {id}");
    let mut first = true;
    loop {
        let moved = admin.move_partitions(Moves::Drain(id), pace.throttle, false).await.with_context(what)?;
        if first {
            print_moves(global, &moved)?;
        }
        first = false;
        if pace.no_wait {
            return Ok(());
        }
        wait(global, admin, "drain", |_| true).await?;
        let told = admin.describe_cluster().await.with_context(what)?;
        let drained = told.brokers.iter().find(|broker| broker.id == id);
        if drained.is_some_and(|broker| broker.partitions > 0) {
            // A topic was created meanwhile, or a move was cancelled.
            tokio::time::sleep(LOOK).await;
            continue;
        }
        if !global.json {
            let votes = match told.voters.contains(&id) {
                true => format!("`headwater cluster voters remove {id}`, "),
                false => String::new(),
            };
            let stays = match drained.is_some_and(|broker| broker.state == "draining") {
                true => format!("is given nothing before `headwater cluster drain {id} --cancel`"),
                // Some broker was too old to understand that when the drain began.
                false => {
                    "MAY BE GIVEN partitions of new topics until then: only after `headwater cluster upgrade --finalize` a drain keeps it empty"
                        .to_owned()
                }
            };
            note(
                global,
                format_args!(
                    "broker {id} keeps nothing any more: it may be removed ({votes}stop it, `headwater cluster remove {id}`), and {stays}"
                ),
            );
        }
        return Ok(());
    }
}

/// `headwater cluster drain --cancel`.
pub(super) async fn cancel_drain(global: &Global, admin: &Admin, id: i32) -> Result<()> {
    let cancelled = admin.cancel_moves(None, None, Some(id)).await;
    print_cancelled(global, &cancelled.with_context(|| format!("cannot cancel the drain of broker {id}"))?)?;
    if !global.json {
        note(global, format_args!("broker {id} may be given partitions again"));
    }
    Ok(())
}

/// Waits until none of these moves any more, and shows how far they are.
async fn wait(
    global: &Global,
    admin: &Admin,
    what: &'static str,
    concerns: impl Fn((&str, u32)) -> bool,
) -> Result<()> {
    let (mut bar, mut most) = (None, 0);
    loop {
        let moving = admin.reassignments().await.context("cannot see what moves")?;
        let mut moving = moving.iter().filter(|it| concerns((&it.topic, it.partition))).peekable();
        if moving.peek().is_none() {
            return Ok(());
        }
        let behind: u64 = moving.flat_map(|it| &it.adding).filter_map(|it| it.bytes_behind).sum();
        most = most.max(behind);
        let bar = bar.get_or_insert_with(|| progress(global, what, Unit::Bytes, Some(behind)));
        bar.set_length(most);
        bar.set_position(most - behind);
        tokio::time::sleep(LOOK).await;
    }
}

#[derive(Serialize)]
struct Moved<'a> {
    topic: &'a str,
    partition: u32,
    from: &'a [i32],
    to: &'a [i32],
}

fn print_moves(global: &Global, moves: &[PartitionMove]) -> Result<()> {
    let rows: Vec<Moved<'_>> = moves
        .iter()
        .map(|it| Moved { topic: &it.topic, partition: it.partition, from: &it.from, to: &it.to })
        .collect();
    if rows.is_empty() && !global.json {
        return Ok(());
    }
    print_all(global, &rows, &["topic", "partition", "from", "to"], |it| {
        vec![it.topic.to_owned(), it.partition.to_string(), ids(it.from), ids(it.to)]
    })
}

fn print_cancelled(global: &Global, cancelled: &[PartitionMove]) -> Result<()> {
    if global.json {
        return print_moves(global, cancelled);
    }
    for it in cancelled {
        note(global, format_args!("partition {} of topic {} stays on {}", it.partition, it.topic, ids(&it.to)));
    }
    if cancelled.is_empty() {
        note(global, "nothing moves");
    }
    Ok(())
}

#[derive(Serialize)]
struct Status<'a> {
    topic: &'a str,
    partition: u32,
    leader: Option<i32>,
    replicas: &'a [i32],
    isr: &'a [i32],
    target: &'a [i32],
    adding: Vec<Adding>,
    removing: &'a [i32],
    throttle: Option<u64>,
}

#[derive(Serialize)]
struct Adding {
    id: i32,
    in_sync: bool,
    records_behind: Option<i64>,
    bytes_behind: Option<u64>,
}

impl From<&AddingReplica> for Adding {
    fn from(it: &AddingReplica) -> Adding {
        let AddingReplica { broker_id, in_sync, records_behind, bytes_behind } = it.clone();
        Adding { id: broker_id, in_sync, records_behind, bytes_behind }
    }
}

fn status(global: &Global, moving: &[Reassignment]) -> Result<()> {
    if global.json {
        let partitions: Vec<Status<'_>> = moving
            .iter()
            .map(|it| Status {
                topic: &it.topic,
                partition: it.partition,
                leader: it.leader,
                replicas: &it.replicas,
                isr: &it.isr,
                target: &it.target,
                adding: it.adding.iter().map(Adding::from).collect(),
                removing: &it.removing,
                throttle: Some(it.throttle_bytes_per_second).filter(|limit| *limit > 0),
            })
            .collect();
        return print_json(&json!({ "partitions": partitions }));
    }
    if moving.is_empty() {
        note(global, "nothing moves");
        return Ok(());
    }
    let mut text = table(
        &["topic", "partition", "target", "leaving", "throttle", "new replicas"],
        moving.iter().map(|it| {
            let limit = match it.throttle_bytes_per_second {
                0 => "-".to_owned(),
                limit => format!("{}/s", bytes(limit)),
            };
            let adding: Vec<String> = it.adding.iter().map(how_far).collect();
            vec![
                it.topic.clone(),
                it.partition.to_string(),
                ids(&it.target),
                ids(&it.removing),
                limit,
                adding.join("; "),
            ]
        }),
    );
    let behind: u64 = moving.iter().flat_map(|it| &it.adding).filter_map(|it| it.bytes_behind).sum();
    text += &format!("\n{} move, {} to go\n", plural(moving.len() as i64, "partition"), bytes(behind));
    print(text)
}

fn how_far(it: &AddingReplica) -> String {
    if it.in_sync {
        return format!("{} in sync", it.broker_id);
    }
    match (it.records_behind, it.bytes_behind) {
        (Some(records), Some(size)) => {
            format!("{} is {} behind ({} offsets)", it.broker_id, bytes(size), number(records))
        }
        _ => format!("{} does not say how far it is", it.broker_id),
    }
}

pub(super) fn ids(brokers: &[i32]) -> String {
    brokers.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
}

fn name(leader: Option<i32>) -> String {
    leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unclean_election_is_announced_loudly_and_by_name() {
        let elected = |had_everything: &[i32]| ElectedLeader {
            topic: "t".into(),
            partition: 3,
            leader_before: None,
            leader: Some(2),
            had_everything: had_everything.to_vec(),
        };
        let words = warning(&[elected(&[1]), elected(&[])]).join("\n");
        for said in
            ["ACKNOWLEDGED RECORDS MAY BE LOST", "2 leaders", "t-3: broker 2 leads", "what broker 1 has is LOST"]
        {
            assert!(words.contains(said), "{said}: {words}");
        }
        assert!(warning(&[]).is_empty());
        // What it lost was brought back: of that very broker it was said that others had more.
        let words = warning(&[elected(&[2])]).join("\n");
        assert!(words.contains("broker 2 leads; it was in sync last; whatever it has lost since is LOST"), "{words}");
    }
}
