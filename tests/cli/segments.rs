//! `headwater segment`, on a broker's own files and on Kafka's.

use crate::harness::{Broker, kafka_logs, run};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn text(path: &Path) -> String {
    path.to_str().expect("text").to_owned()
}

/// A copy of a partition that Kafka wrote.
fn copied(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    let target = folder.path().join(name);
    std::fs::create_dir(&target).expect("a folder");
    for entry in std::fs::read_dir(kafka_logs().join("dirs").join(name)).expect("a fixture") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), target.join(entry.file_name())).expect("copied");
    }
    target
}

fn logs(folder: &Path) -> Vec<PathBuf> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    logs.sort();
    logs
}

#[test]
fn a_running_brokers_files_can_be_looked_into() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t", "--key-separator", ":", "--header", "h=1"], "k:{\"a\":1}\nk:\u{1}\n").ok();
    broker.run_with(&["produce", "t", "--compression", "zstd"], "three\n").ok();
    let folder = text(&broker.partition("t-0"));
    let batches = run(&["segment", "dump", &folder, "--json", "--records"]).ok().json();
    let records: Vec<&Value> = batches.iter().flat_map(|batch| batch["records"].as_array().expect("records")).collect();
    assert_eq!(records.len(), 3);
    assert_eq!(records[0]["headers"][0]["key"], "h");
    assert_eq!(batches.last().expect("a batch")["codec"], "zstd");
    assert!(batches.iter().all(|batch| batch["valid"] == true && batch["control"] == false));
    let later = run(&["segment", "dump", &folder, "--json", "--from-offset", "2"]).ok().json();
    assert_eq!(later.len(), 1);
    assert!(later[0].get("records").is_none(), "records come when asked for");
    let dump = run(&["segment", "dump", &folder, "--records"]).ok().text();
    assert!(dump.contains("zstd") && dump.contains("{\"a\":1}"), "{dump}");
    assert!(run(&["segment", "dump", &folder, "--records", "--decode", "hex"]).ok().text().contains("7b2261223a317d"));
    assert!(run(&["segment", "dump", &folder, "--records", "--decode", "json"]).ok().text().contains("\"a\": 1"));
    run(&["segment", "verify", &folder]).ok();
    let one = text(&logs(&broker.partition("t-0"))[0]);
    assert_eq!(
        run(&["segment", "dump", &one, "--json"]).ok().json().len(),
        batches.len(),
        "a file is as good as its folder"
    );
}

#[test]
fn stats_tell_what_is_in_it() {
    let folder = text(&kafka_logs().join("dirs/codecs-0"));
    let stats = run(&["segment", "stats", &folder, "--json"]).ok().object();
    assert_eq!(stats["records"], 120);
    assert!(stats["codecs"].as_object().expect("codecs").len() >= 5, "{stats}");
    let text = run(&["segment", "stats", &folder]).ok().text();
    for word in ["120 records", "zstd", "gzip", "batch"] {
        assert!(text.contains(word), "{word} is missing:\n{text}");
    }
    run(&["segment", "stats", "nowhere"]).fails(1);
}

/// An empty partition of a broker that ended well once had a note about a file that it never needed.
#[test]
fn of_an_empty_partition_there_is_nothing_to_note() {
    let mut broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    broker.run_with(&["produce", "t", "--partition", "0"], "x\n").ok();
    broker.stop();
    for partition in ["t-0", "t-1"] {
        let report = run(&["segment", "verify", &text(&broker.partition(partition)), "--json"]).ok().object();
        assert_eq!((&report["faults"], &report["notes"]), (&serde_json::json!([]), &serde_json::json!([])), "{report}");
    }
    std::fs::remove_file(broker.partition("t-0").join("leader-epoch-checkpoint")).expect("it was there");
    let report = run(&["segment", "verify", &text(&broker.partition("t-0")), "--json"]).ok().object();
    assert_eq!(report["notes"][0]["file"], "leader-epoch-checkpoint", "{report}");
}

#[test]
fn a_segments_file_does_as_well_as_a_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = text(&logs(&copied(&folder, "codecs-0"))[0]);
    assert_eq!(run(&["segment", "stats", &log, "--json"]).ok().object()["records"], 120);
    let out = folder.path().join("repaired");
    let repair = run(&["segment", "repair", &log, "--out", &text(&out), "--json"]).ok().object();
    assert_eq!((&repair["kept_records"], &repair["lost"]), (&120.into(), &serde_json::json!([])));
    assert_eq!(run(&["segment", "stats", &text(&out), "--json"]).ok().object()["records"], 120);
}

#[test]
fn a_dump_in_words_has_a_line_for_each_batch_with_all_that_its_header_says() {
    let folder = text(&kafka_logs().join("dirs/txn-0"));
    let batches = run(&["segment", "dump", &folder, "--json"]).ok().json();
    let text = run(&["segment", "dump", &folder]).ok().text();
    for batch in &batches {
        let number = |key: &str| batch[key].to_string();
        let line =
            text.lines().find(|line| line.contains(&number("crc"))).unwrap_or_else(|| panic!("{batch}:\n{text}"));
        for key in [
            "base_offset",
            "last_offset",
            "count",
            "base_sequence",
            "producer_id",
            "producer_epoch",
            "leader_epoch",
            "position",
            "size",
        ] {
            assert!(line.contains(&number(key)), "{key} of {batch} is missing: {line}");
        }
        assert!(line.contains(batch["codec"].as_str().expect("a name")), "{line}");
        assert_eq!(line.contains("transactional"), batch["transactional"] == true, "{line}");
        assert_eq!(line.contains("control"), batch["control"] == true, "{line}");
    }
    assert!(batches.iter().any(|batch| batch["control"] == true) && batches.len() > 3);
}

#[test]
fn damage_is_found_placed_and_repaired_beside_the_original() {
    let folder = tempfile::tempdir().expect("a folder");
    let damaged = copied(&folder, "segments-0");
    let path = text(&damaged);
    assert!(run(&["segment", "verify", &path]).ok().text().contains("no fault"));
    let log = &logs(&damaged)[1];
    let mut bytes = std::fs::read(log).expect("bytes");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(log, &bytes).expect("written");
    let name = log.file_name().and_then(|name| name.to_str()).expect("text");

    let said = run(&["segment", "verify", &path]).fails(1);
    assert!(said.text().contains(name), "{}", said.text());
    let report = run(&["segment", "verify", &path, "--json"]).fails(1).object();
    let fault = &report["faults"][0];
    assert!(fault["file"].as_str().is_some_and(|file| file.ends_with(name)), "{fault}");
    assert!(fault["position"].as_u64().is_some_and(|position| position <= middle as u64), "{fault}");

    let out = folder.path().join("repaired");
    let repair = run(&["segment", "repair", &path, "--out", &text(&out), "--json"]).ok().object();
    let lost: i64 = repair["lost"]
        .as_array()
        .expect("ranges")
        .iter()
        .map(|r| r["to"].as_i64().expect("a number") - r["from"].as_i64().expect("a number") + 1)
        .sum();
    assert!(lost > 0 && repair["kept_records"].as_i64().is_some_and(|kept| kept > 0), "{repair}");
    run(&["segment", "verify", &text(&out)]).ok();
    run(&["segment", "repair", &path, "--out", &text(&out)]).fails(1);
    assert_eq!(std::fs::read(log).expect("bytes"), bytes, "the original is not touched");

    let words = run(&["segment", "repair", &path, "--in-place"]).ok();
    assert!(words.text().contains("lost"), "{}", words.text());
    run(&["segment", "verify", &path]).ok();
    let kept = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(kept, 3, "the repaired copy, the repaired folder and the original");
}

#[test]
fn junk_and_missing_paths_are_errors_not_panics() {
    let folder = tempfile::tempdir().expect("a folder");
    let junk = folder.path().join("junk");
    std::fs::create_dir(&junk).expect("a folder");
    std::fs::write(junk.join("00000000000000000000.log"), vec![0xa5; 5000]).expect("written");
    run(&["segment", "verify", &text(&junk)]).fails(1);
    for word in ["dump", "stats"] {
        let answer = run(&["segment", word, &text(&junk)]);
        assert!(
            matches!(answer.status.code(), Some(0 | 1)) && !answer.stderr.contains("panicked"),
            "{word}: {}",
            answer.stderr
        );
    }
    for word in ["dump", "verify", "stats"] {
        let answer = run(&["segment", word, "nowhere"]).fails(1);
        assert!(answer.stderr.contains("nowhere"), "{}", answer.stderr);
    }
    run(&["segment", "repair", "nowhere", "--out", &text(&folder.path().join("out"))]).fails(1);
    run(&["segment", "repair", &text(&junk)]).fails(2);
}

#[test]
fn a_path_that_is_missing_keeps_nobody_from_the_others() {
    let dirs = kafka_logs().join("dirs");
    let (one, two) = (text(&dirs.join("shapes-0")), text(&dirs.join("codecs-0")));
    for word in ["dump", "verify", "stats"] {
        let alone: Vec<String> = [&one, &two].map(|path| run(&["segment", word, path, "--json"]).ok().text()).into();
        let answer = run(&["segment", word, &one, "nowhere", &two, "--json"]).fails(1);
        assert_eq!(answer.text(), alone.concat(), "{word}");
        assert!(answer.stderr.contains("nowhere") && answer.stderr.contains("1 of 3 paths"), "{}", answer.stderr);
    }
}

#[test]
fn several_paths_are_answered_one_by_one() {
    let dirs = kafka_logs().join("dirs");
    let (one, two) = (text(&dirs.join("shapes-0")), text(&dirs.join("codecs-0")));
    let reports = run(&["segment", "verify", &one, &two, "--json"]).ok().json();
    assert_eq!(reports.iter().map(|r| r["path"].as_str().expect("text").to_owned()).collect::<Vec<_>>(), [one, two]);
    assert!(
        reports.iter().all(
            |report| report["faults"].as_array().is_some_and(Vec::is_empty) && report["batches"].as_u64() > Some(0)
        )
    );
}
