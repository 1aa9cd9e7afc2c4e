//! `cli/JSON.md`: the keys of every answer, compared with real answers.

use crate::harness::{Answer, Broker, Running, eventually, headwater, kafka_logs, run};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The page: of every kind of answer its keys, and whether each may be missing.
fn page() -> BTreeMap<String, BTreeMap<String, bool>> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("cli/JSON.md")).expect("the page");
    let mut kinds = BTreeMap::new();
    for section in text.split("\n## ").skip(1) {
        let (title, table) = section.split_once('\n').expect("a title");
        let mut keys = BTreeMap::new();
        for row in table.lines().filter(|line| line.starts_with("| `")) {
            let (key, rest) = row[3..].split_once('`').expect("a key");
            let optional = rest.starts_with('?');
            assert!(keys.insert(key.to_owned(), optional).is_none(), "{title}: {key} stands there twice");
        }
        kinds.insert(title.to_owned(), keys);
    }
    kinds
}

/// The keys of an answer as the page writes them. `names` are objects whose keys are names.
fn keys(value: &Value, at: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let key = if at == "codecs" { "*" } else { key };
                let path = if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
                keys(value, &path, found);
            }
        }
        // What records look like stands in a section of its own.
        Value::Array(list) if at != "records" && list.iter().any(Value::is_object) => {
            list.iter().for_each(|value| keys(value, &format!("{at}[]"), found));
        }
        // A list of objects that is empty says nothing of their keys.
        Value::Array(list) if list.is_empty() && EMPTY.contains(&at) => {}
        _ => {
            found.insert(at.to_owned());
        }
    }
}

/// Lists of objects that may be empty.
const EMPTY: [&str; 12] = [
    "headers",
    "faults",
    "notes",
    "lost",
    "mended",
    "foreign",
    "partitions",
    "members",
    "offsets",
    "not_served",
    "leaderless",
    "partitions[].adding",
];

/// Compares answers of one kind with what the page says of it.
#[track_caller]
fn check(page: &BTreeMap<String, BTreeMap<String, bool>>, seen: &mut BTreeSet<String>, kind: &str, answers: &[Value]) {
    let documented = page.get(kind).unwrap_or_else(|| panic!("{kind} is missing on the page"));
    assert!(!answers.is_empty(), "{kind}: no answer");
    for answer in answers {
        let mut found = BTreeSet::new();
        keys(answer, "", &mut found);
        let unknown: Vec<&String> = found.iter().filter(|key| !documented.contains_key(*key)).collect();
        assert!(unknown.is_empty(), "{kind}: {unknown:?} are missing on the page: {answer}");
        for (key, optional) in documented {
            assert!(*optional || found.contains(key), "{kind}: {key} is always there, says the page: {answer}");
        }
        seen.extend(found.into_iter().map(|key| format!("{kind}: {key}")));
    }
    seen.insert(kind.to_owned());
}

#[test]
fn the_page_says_what_answers_hold() {
    let page = page();
    let mut seen = BTreeSet::new();
    let mut check = |kind: &str, answers: &[Value]| check(&page, &mut seen, kind, answers);
    let broker = Broker::start(&["group.consumer.min.session.timeout.ms=1000"]);

    check("Topic create", &broker.json(&["topic", "create", "t", "-p", "2"]));
    check("Topic list", &broker.json(&["topic", "list"]));
    let produce =
        ["produce", "t", "--partition", "0", "--key-separator", ":", "--header", "h=1", "--ack-log", "acks", "--json"];
    check("Produce", &[broker.run_with(&produce, b"k:v\n\xff:\xfe\n").ok().object()]);
    let acks = std::fs::read_to_string(broker.folder().join("acks")).expect("a log");
    let acks: Vec<Value> = acks.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    check("Acknowledgement", &acks);
    check("Topic describe", &broker.json(&["topic", "describe", "t"]));
    check("Record", &broker.records("t"));
    check("Record", &broker.json(&["replay", "t", "--from", "earliest"]));
    broker.run(&["topic", "create", "copy"]).ok();
    check("Produce", &broker.json(&["replay", "t", "--from", "earliest", "--to", "copy"]));
    check("Topic alter", &broker.json(&["topic", "alter", "t", "-c", "retention.ms=5000000", "--unset", "segment.ms"]));
    check("Topic add-partitions", &broker.json(&["topic", "add-partitions", "t", "3"]));
    check("Topic delete-records", &broker.json(&["topic", "delete-records", "t", "--partition", "0", "--before", "1"]));

    let member = Running::start(broker.command(&["consume", "t", "--group", "g", "--from", "latest"]));
    let described = eventually("a member with a commit", || {
        let group = broker.run(&["group", "describe", "g", "--json"]);
        let group = group.status.success().then(|| group.object())?;
        let (offsets, members) = (group["offsets"].as_array()?, group["members"].as_array()?);
        let whole =
            !offsets.is_empty() && members.iter().any(|m| m["partitions"].as_array().is_some_and(|p| !p.is_empty()));
        whole.then_some(group.clone())
    });
    check("Group describe", &[described]);
    check("Group members", &broker.json(&["group", "members", "g"]));
    check("Group list", &broker.json(&["group", "list"]));
    drop(member);
    broker.run(&["group", "reset", "h", "--topic", "t:0", "--to", "offset:1", "--execute"]).ok();
    check("Group reset", &broker.json(&["group", "reset", "h", "--topic", "t:0", "--to", "offset:99"]));
    check("Group delete-offsets", &broker.json(&["group", "delete-offsets", "h", "--topic", "t:0"]));
    broker.run(&["group", "reset", "h", "--topic", "t:0", "--to", "offset:1", "--execute"]).ok();
    check("Group delete", &broker.json(&["group", "delete", "h"]));

    check("Cluster describe", &broker.json(&["cluster", "describe"]));
    check("Cluster voters", &broker.json(&["cluster", "voters", "add", "1"]));
    check("Cluster upgrade", &broker.json(&["cluster", "upgrade"]));
    cluster_answers(&mut check);

    for mode in ["produce", "consume", "e2e"] {
        check("Bench", &broker.json(&["bench", mode, "--records", "100"]));
    }
    let isolation = ["bench", "isolation", "--partitions", "2", "--stalled", "1", "--records", "1000"];
    check("Bench isolation", &broker.json(&isolation));
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    check("Bench", &run(&["bench", "raw", "--records", "100", "--json"]).ok().json());
    check("Bench", &run(&["bench", "disk", "--records", "10", "--dir", &path(""), "--json"]).ok().json());
    check("Topic delete", &broker.json(&["topic", "delete", "copy"]));

    let fixtures = kafka_logs().join("dirs");
    let fixture = |name: &str| fixtures.join(name).to_str().expect("text").to_owned();
    let dumped = run(&["segment", "dump", &fixture("codecs-0"), "--json", "--records"]).ok().json();
    check("Segment dump", &dumped);
    check("Segment dump", &run(&["segment", "dump", &fixture("codecs-0"), "--json"]).ok().json());
    let records: Vec<Value> =
        dumped.iter().flat_map(|batch| batch["records"].as_array().expect("records")).cloned().collect();
    check("Record", &records);
    check("Segment stats", &run(&["segment", "stats", &fixture("codecs-0"), "--json"]).ok().json());
    let damaged = folder.path().join("damaged-0");
    std::fs::create_dir(&damaged).expect("a folder");
    for entry in std::fs::read_dir(fixture("segments-0")).expect("a fixture").flatten() {
        std::fs::copy(entry.path(), damaged.join(entry.file_name())).expect("copied");
    }
    let log = damaged.join("00000000000000000000.log");
    let mut bytes = std::fs::read(&log).expect("bytes");
    bytes[100] ^= 1;
    std::fs::write(&log, bytes).expect("written");
    check("Segment dump", &run(&["segment", "dump", &path("damaged-0"), "--json"]).json());
    check("Segment verify", &run(&["segment", "verify", &path("damaged-0"), "--json"]).fails(1).json());
    check(
        "Segment repair",
        &run(&["segment", "repair", &path("damaged-0"), "--out", &path("out-0"), "--json"]).ok().json(),
    );
    check("Segment repair", &run(&["segment", "repair", &path("damaged-0"), "--in-place", "--json"]).ok().json());
    check("Import", &run(&["import", "--data", &path("data"), fixtures.to_str().expect("text"), "--json"]).ok().json());

    let file = path("broker.toml");
    let settings = format!("data.dir = {:?}\nlisten = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n", path("data"));
    std::fs::write(&file, settings).expect("written");
    check("Config check", &run(&["config", "check", &file, "--json"]).ok().json());
    let mut command = headwater();
    command.args(["broker", "--config", &file, "--json"]);
    let mut started = Running::start(command);
    let ready = eventually("the first line", || started.json().first().cloned());
    check("Ready", &[ready]);
    assert!(started.terminate().success());
    for made in [
        &["ca"][..],
        &["broker", "--ca", &path("certificates"), "--id", "1", "--host", "a"],
        &["client", "--ca", &path("certificates"), "--name", "a", "--broker", "a:1"],
    ] {
        let out = ["--out", &path("certificates"), "--json"];
        // A folder of its own for each but the authority.
        let out = if made[0] == "ca" {
            out.map(str::to_owned)
        } else {
            out.map(|word| word.replace("certificates", made[0]))
        };
        let words: Vec<&str> =
            ["cert"].into_iter().chain(made.iter().copied()).chain(out.iter().map(String::as_str)).collect();
        check("Cert", &run(&words).ok().json());
    }
    let cluster = format!(
        "data.dir = {:?}\nbroker.id = 1\ncontroller.quorum.bootstrap.servers = \"localhost:9392\"\n",
        path("broker")
    );
    std::fs::write(&file, cluster).expect("written");
    check("Cluster init", &run(&["cluster", "init", "--config", &file, "--json"]).ok().json());
    let demo: Answer = run(&["demo", "--json"]).ok();
    check("Demo", &demo.json());

    let missing: Vec<&String> = page.keys().filter(|kind| !seen.contains(*kind)).collect();
    assert!(missing.is_empty(), "nobody answers {missing:?}");
    for rare in
        ["Record: key_base64", "Record: headers[].value", "Segment verify: faults[].kind", "Segment repair: lost[].to"]
    {
        assert!(seen.contains(rare), "no answer held {rare}");
    }
}

/// What has something to tell only where there are several brokers.
fn cluster_answers(check: &mut impl FnMut(&str, &[Value])) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.current_dir(folder.path()).args(["up", "--brokers", "2", "--data", "data", "--json"]);
    let mut up = Running::start(command);
    let ready = eventually("the first line", || up.json().first().cloned());
    let profile = ready["profile"].as_str().expect("a path");
    let answer = |args: &[&str]| run(&[args, &["--profile", profile, "--json"]].concat());
    let json = |args: &[&str]| answer(args).ok().json();
    let one = ["-c", "min.insync.replicas=1"];
    json(&[&["topic", "create", "t", "--replica-placement", "1,1"], &one[..]].concat());
    json(&[&["topic", "create", "u", "--replica-placement", "2:1"], &one[..]].concat());
    let lines = folder.path().join("lines");
    std::fs::write(&lines, format!("{}\n", "x".repeat(999)).repeat(300)).expect("written");
    let lines = lines.to_str().expect("text");
    let produce = ["produce", "t", "--partition", "0", "--compression", "none", "--file", lines];
    answer(&produce).ok();

    check("Cluster reassign", &json(&["cluster", "rebalance", "--dry-run"]));
    let reassign = ["cluster", "reassign", "--topic", "t", "--partition", "0", "--replicas", "2", "--throttle", "1kB"];
    check("Cluster reassign", &json(&reassign));
    check("Cluster reassign status", &json(&["cluster", "reassign", "status"]));
    check("Cluster reassign", &json(&["cluster", "reassign", "cancel"]));
    check("Cluster reassign status", &json(&["cluster", "reassign", "status"]));
    let swap = ["cluster", "reassign", "--topic", "u", "--partition", "0", "--replicas", "1,2"];
    check("Cluster reassign", &json(&swap));
    let elected = eventually("both are in sync", || {
        let elected = json(&["cluster", "elect", "--preferred"]);
        (!elected.is_empty()).then_some(elected)
    });
    check("Cluster elect", &elected);
    check("Cluster health", &answer(&["cluster", "health"]).json());

    // One of two is no majority, and what broker 2 alone kept has no leader.
    json(&[&["topic", "create", "v", "--replica-placement", "2"], &one[..]].concat());
    json(&["cluster", "voters", "remove", "2"]);
    let pid = u32::try_from(ready["brokers"][1]["pid"].as_u64().expect("a number")).expect("a pid");
    crate::harness::signal(pid, "KILL");
    let offline = eventually("it is missed", || {
        let offline = json(&["topic", "list", "--offline"]);
        (!offline.is_empty()).then_some(offline)
    });
    check("Topic list of what is in trouble", &offline);
    let health = answer(&["cluster", "health"]).json();
    assert_eq!(health[0]["leaderless"][0]["topic"], "v");
    check("Cluster health", &health);
    let cluster_id = json(&["cluster", "describe"])[0]["cluster_id"].as_str().expect("an id").to_owned();
    assert!(up.terminate().success());
    let config = Path::new(ready["brokers"][0]["data"].as_str().expect("a path")).join("broker.toml");
    let config = config.to_str().expect("text");
    let recover = ["cluster", "unsafe-recover", "--config", config, "--json", "--yes-lose-what-only-others-know"];
    check("Cluster unsafe-recover", &run(&[&recover[..], &[&cluster_id]].concat()).ok().json());
}
