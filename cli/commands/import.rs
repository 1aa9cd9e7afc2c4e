//! `headwater import`: what Kafka wrote, into a broker's folder.
//!
//! The files are copied and checked here; the broker takes the topics, their settings and the groups' offsets over at its
//! next start.

use anyhow::{Context, Result};
use headwater_broker::config::BrokerConfig;
use headwater_broker::topic_config::{TopicDefaults, TopicValues, change};
use headwater_proto::TopicId;
use headwater_storage::import::{ImportOptions, ImportReport, import};
use headwater_storage::{Files, NewIdentity, OsFiles};
use std::path::Path;
use std::sync::Arc;

use super::up::apply_environment;
use crate::args::{Global, ImportArgs};
use crate::output::{Unit, bytes, note, plural, print_json, progress};

/// Runs the command.
pub(crate) fn run(global: &Global, args: ImportArgs) -> Result<()> {
    let mut config = BrokerConfig::default();
    apply_environment(&mut config)?;
    let settings = args.config.iter().map(|setting| (setting.key.clone(), Some(setting.value.clone())));
    let settings = change(&TopicValues::new(), settings, &TopicDefaults::new())?;
    let options = ImportOptions {
        source: args.source,
        data_dir: args.data,
        identity: NewIdentity { cluster_id: new_id(), broker_id: config.broker_id, directory_id: new_id() },
        topics: args.topic,
        config: settings,
    };
    let files: Arc<dyn Files> = Arc::new(OsFiles::default());
    // Every byte is told of twice: when it is checked, and when it is copied.
    let bar = progress(global, "import", Unit::Bytes, folder_bytes(&options.source).map(|bytes| 2 * bytes));
    let report = import(&files, &options, &|bytes| bar.inc(bytes))
        .with_context(|| format!("cannot import {} into {}", options.source.display(), options.data_dir.display()))?;
    bar.finish_and_clear();
    if global.json {
        return print_json(&report);
    }
    crate::output::print(text(&report))?;
    note(global, format_args!("a broker that starts on {} serves them", options.data_dir.display()));
    Ok(())
}

/// A random id, in the form that Kafka gives it.
fn new_id() -> String {
    TopicId::from_bytes(rand::random()).to_string()
}

/// Bytes of the log files in a folder's folders, for a progress bar; nothing where that cannot be seen.
fn folder_bytes(source: &Path) -> Option<u64> {
    let mut total = 0;
    for folder in std::fs::read_dir(source).ok()?.flatten() {
        for file in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            if file.path().extension().is_some_and(|extension| extension == "log") {
                total += file.metadata().map_or(0, |metadata| metadata.len());
            }
        }
    }
    Some(total)
}

fn text(report: &ImportReport) -> String {
    let mut text = String::new();
    for topic in &report.topics {
        text += &format!(
            "topic {}: {} in {}, {}\n",
            topic.name,
            plural(topic.records, "record"),
            plural(topic.partitions, "partition"),
            bytes(topic.bytes)
        );
    }
    if !report.groups.is_empty() {
        text += &format!("groups {}: {}\n", report.groups.join(", "), plural(report.offsets, "committed offset"));
    }
    for left in &report.not_served {
        text += &format!("not served: {}: {}\n", left.place, left.detail);
    }
    text
}
