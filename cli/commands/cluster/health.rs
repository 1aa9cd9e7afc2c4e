//! `headwater cluster health | upgrade`: what the cluster bears, and what it may be told.

use anyhow::{Context, Result, bail};
use headwater_client::{Admin, BrokerHealth, ClusterHealth, QuorumHealth};
use serde_json::json;

use super::moves::ids;
use crate::args::Global;
use crate::commands::look_failed;
use crate::output::{Told, complain, note, print, print_json, table};

/// Partitions without a leader that are told of one by one.
const TOLD: usize = 10;

/// `headwater cluster health`.
pub(super) async fn health(global: &Global, admin: &Admin, id: Option<i32>) -> Result<()> {
    let told = admin.cluster_health().await;
    let told = told.map_err(|error| look_failed("cannot ask for the cluster's health", "cluster health", error))?;
    let ClusterHealth { brokers: told, leaderless, quorum } = told;
    if let Some(id) = id.filter(|id| told.iter().all(|broker| broker.broker_id != *id)) {
        bail!("broker {id} is not registered");
    }
    let lost = quorum.as_ref().filter(|quorum| quorum.is_lost());
    let (words, may) = match (lost.map(lost_why), id) {
        (None, _) => line(&told, id),
        (Some(why), None) => (format!("NO broker may be stopped now: {why}"), false),
        (Some(why), Some(id)) => (format!("broker {id} may NOT be stopped now: {why}"), false),
    };
    if global.json {
        let brokers = told.iter().filter(|broker| id.is_none_or(|id| broker.broker_id == id));
        let why_not = |it: &BrokerHealth| lost.map(lost_why).or_else(|| it.why_not.clone());
        let brokers = brokers.map(|it| (it.broker_id, why_not(it)));
        let may_stop: Vec<i32> = brokers.clone().filter(|(_, why_not)| why_not.is_none()).map(|(id, _)| id).collect();
        let brokers: Vec<_> = brokers
            .map(|(id, why_not)| json!({ "id": id, "may_stop": why_not.is_none(), "why_not": why_not }))
            .collect();
        let leaderless: Vec<_> = leaderless
            .iter()
            .map(|it| json!({ "topic": it.topic, "partition": it.partition, "advice": it.advice }))
            .collect();
        let quorum = quorum.as_ref().map(|it| json!({ "voters": it.voters, "answering": it.answering }));
        print_json(&json!({ "may_stop": may_stop, "brokers": brokers, "leaderless": leaderless, "quorum": quorum }))?;
    } else {
        print(format!("{words}\n"))?;
        for it in leaderless.iter().take(TOLD) {
            complain(format_args!("{}-{} HAS NO LEADER: {}", it.topic, it.partition, it.advice));
        }
        if leaderless.len() > TOLD {
            complain(format_args!("... and {} more partitions have no leader", leaderless.len() - TOLD));
        }
    }
    if may { Ok(()) } else { Err(Told.into()) }
}

/// Why nobody may be stopped where the metadata quorum is lost.
pub(super) fn lost_why(quorum: &QuorumHealth) -> String {
    let (answering, ids) = (quorum.answering.len(), ids(&quorum.answering));
    let answer = match answering {
        0 => "none".to_owned(),
        1 => format!("1 (broker {ids})"),
        _ => format!("{answering} (brokers {ids})"),
    };
    let (voters, majority) = (quorum.voters, quorum.majority());
    format!("the metadata quorum is lost: of {voters} voters {answer} answers, and {majority} have to")
}

/// The line, and whether a broker may be stopped.
fn line(told: &[BrokerHealth], id: Option<i32>) -> (String, bool) {
    if let Some(broker) = id.and_then(|id| told.iter().find(|broker| broker.broker_id == id)) {
        return match &broker.why_not {
            None => (format!("broker {} may be stopped now", broker.broker_id), true),
            Some(why) => (format!("broker {} may NOT be stopped now: {why}", broker.broker_id), false),
        };
    }
    let may: Vec<String> = told.iter().filter(|it| it.why_not.is_none()).map(|it| it.broker_id.to_string()).collect();
    let not: Vec<String> =
        told.iter().filter_map(|it| Some(format!("not {}, as {}", it.broker_id, it.why_not.as_ref()?))).collect();
    let words = match (&*may, &*not) {
        ([], _) => format!("NO broker may be stopped now: {}", not.join("; ")),
        ([_], []) => format!("broker {} may be stopped now", may.join("")),
        (_, []) => format!("any one broker may be stopped now: {}", may.join(", ")),
        ([_], _) => format!("broker {} may be stopped now; {}", may.join(""), not.join("; ")),
        _ => format!("one of brokers {} may be stopped now; {}", may.join(", "), not.join("; ")),
    };
    (words, !may.is_empty())
}

/// `headwater cluster upgrade`.
pub(super) async fn upgrade(global: &Global, admin: &Admin, finalize: bool) -> Result<()> {
    let before = admin.feature_levels().await.context("cannot ask for the feature level")?;
    let now = match finalize {
        true => admin.finalize_upgrade().await.context("cannot raise the feature level")?,
        false => before.clone(),
    };
    let newest = now.brokers.iter().map(|(_, level)| *level).max().unwrap_or(now.level);
    let behind: Vec<i32> = now.brokers.iter().filter(|(_, level)| *level < newest).map(|(id, _)| *id).collect();
    if global.json {
        let brokers: Vec<_> =
            now.brokers.iter().map(|(id, level)| json!({ "id": id, "feature_level": level })).collect();
        print_json(&json!({ "feature_level": now.level, "possible": now.possible, "brokers": brokers }))?;
    } else if !finalize {
        let rows = now.brokers.iter().map(|(id, level)| vec![id.to_string(), level.to_string()]);
        let hint = match now.possible > now.level {
            true => "; `headwater cluster upgrade --finalize` raises it",
            false => "",
        };
        let text = format!("feature level {}, possible {}{hint}\n\n", now.level, now.possible);
        print(text + &table(&["broker", "can"], rows))?;
    } else {
        let verb = if now.level > before.level { "is now" } else { "stays" };
        note(global, format_args!("the feature level {verb} {}", now.level));
    }
    if finalize && !behind.is_empty() {
        let ids: Vec<String> = behind.iter().map(i32::to_string).collect();
        bail!(
            "level {newest} is not reached: broker {} can only {}. Run a newer Headwater there, or remove it",
            ids.join(", "),
            now.possible
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_who_may_be_stopped_and_why_others_may_not() {
        let broker =
            |broker_id, why: &str| BrokerHealth { broker_id, why_not: (!why.is_empty()).then(|| why.to_owned()) };
        let well = [broker(1, ""), broker(2, ""), broker(3, "")];
        assert_eq!(line(&well, None), ("any one broker may be stopped now: 1, 2, 3".to_owned(), true));
        let one = [broker(1, "it leads"), broker(2, "")];
        assert_eq!(line(&one, None), ("broker 2 may be stopped now; not 1, as it leads".to_owned(), true));
        assert_eq!(line(&one, Some(1)), ("broker 1 may NOT be stopped now: it leads".to_owned(), false));
        assert_eq!(line(&one, Some(2)), ("broker 2 may be stopped now".to_owned(), true));
        let quorum = |voters, answering: &[i32]| QuorumHealth { voters, answering: answering.to_vec() };
        let lost = "the metadata quorum is lost: of 3 voters 1 (broker 2) answers, and 2 have to";
        assert!(quorum(3, &[2]).is_lost() && !quorum(3, &[1, 2]).is_lost() && !quorum(1, &[1]).is_lost());
        assert_eq!(lost_why(&quorum(3, &[2])), lost);
        let none = [broker(1, "it is alone")];
        assert_eq!(line(&none, None), ("NO broker may be stopped now: not 1, as it is alone".to_owned(), false));
    }
}
