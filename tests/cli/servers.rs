//! `headwater up`, `broker`, `config` and `import`.

use crate::Held;
use crate::harness::{Broker, Running, eventually, headwater, kafka_logs, run};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};

fn get(address: &str, path: &str) -> String {
    let mut connection = std::net::TcpStream::connect(address).expect("the admin port answers");
    write!(connection, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn up_says_where_it_is_and_serves_its_admin_port() {
    let broker = Broker::start(&[]);
    assert!(broker.profile().ends_with("client.toml") && broker.profile().exists());
    assert!(!broker.listen().ends_with(":0") && !broker.admin().ends_with(":0"));
    for path in ["/health", "/ready"] {
        assert!(get(broker.admin(), path).starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(get(broker.admin(), "/metrics").contains("headwater_"));
}

#[test]
fn up_is_pleasant_without_json_and_ends_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.current_dir(folder.path()).args(["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let mut broker = Running::start(command);
    let line = eventually("the first line", || broker.lines().first().cloned());
    assert!(line.contains("headwater-data"), "{line}");
    let listed =
        headwater().current_dir(folder.path()).env_remove("HEADWATER_PROFILE").args(["topic", "list"]).output();
    assert!(listed.expect("it runs").status.success(), "commands in the same folder find the broker");
    assert!(broker.terminate().success());
}

/// `headwater up 2>&1 | head -1`: the one who read the first line has gone, and there is much to log yet.
#[test]
fn a_broker_outlives_whoever_read_its_output() {
    let folder = tempfile::tempdir().expect("a folder");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = headwater();
    command.current_dir(folder.path()).args(["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    command.args(["--log", "debug"]).stdout(writer.try_clone().expect("a handle")).stderr(writer);
    let mut broker = Held::start(command);
    BufReader::new(reader).read_line(&mut String::new()).expect("a line");
    let profile = folder.path().join("headwater-data/client.toml");
    eventually("the profile", || profile.exists().then_some(()));
    let command = |arguments: &[&str]| {
        headwater().arg("--profile").arg(&profile).args(arguments).output().expect("it runs").status.success()
    };
    eventually("it serves", || command(&["topic", "list"]).then_some(()));
    assert!(command(&["topic", "create", "t"]));
    broker.signal("TERM");
    assert!(broker.wait().success(), "{:?}", broker.wait());
}

#[test]
fn a_folder_has_one_broker() {
    let broker = Broker::start(&[]);
    let data = broker.data();
    let second =
        run(&["up", "--data", data.to_str().expect("text"), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .fails(1);
    assert!(second.stderr.contains("data"), "{}", second.stderr);
    broker.run(&["topic", "list"]).ok();
}

/// Ctrl-C: whatever runs ends in good order, and a broker leaves the marker that spares the next start its recovery.
#[test]
fn ctrl_c_ends_brokers_with_everything_closed() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let file = folder.path().join("broker.toml");
    let text = format!("data.dir = {data:?}\nlisten = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n");
    std::fs::write(&file, text).expect("written");
    let (data_text, file) = (data.to_str().expect("text"), file.to_str().expect("text"));
    let profile = data.join("client.toml");
    let marker = data.join(".kafka_cleanshutdown");
    for (turn, arguments) in [
        &["up", "--data", data_text, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"][..],
        &["broker", "--config", file],
        &["broker", "--config", file],
    ]
    .iter()
    .enumerate()
    {
        let log = folder.path().join("log");
        let mut command = headwater();
        command.args(*arguments).args(["--json", "--log", "info"]);
        let (reader, writer) = std::io::pipe().expect("a pipe");
        command.stdout(writer).stderr(std::fs::File::create(&log).expect("a file"));
        let mut broker = Held::start(command);
        let mut ready = String::new();
        BufReader::new(reader).read_line(&mut ready).expect("a line");
        assert!(ready.contains("\"ready\":true"), "{ready}");
        assert!(!marker.exists(), "it is open");
        let topic = format!("t{turn}");
        run(&["--profile", profile.to_str().expect("text"), "produce", &topic, "--create", "-p", "1"]).ok();
        broker.signal("INT");
        let status = broker.wait();
        let log = std::fs::read_to_string(log).expect("text");
        assert_eq!(status.code(), Some(0), "{arguments:?}: {log}");
        assert!(marker.exists(), "{arguments:?}: {log}");
    }
}

/// Every line, from the first to the last, also of what goes wrong.
#[test]
fn a_broker_logs_json_when_it_is_told_to() {
    let mut broker = Broker::start(&["logging.format=json", "logging.level=debug"]);
    broker.run(&["topic", "create", "t"]).ok();
    broker.run_with(&["produce", "t"], "a\n").ok();
    broker.run(&["consume", "t", "--group", "g", "--until", "end"]).ok();
    broker.run(&["topic", "create", "t"]).fails(1);
    broker.kill();
    broker.revive();
    broker.stop();
    let log = broker.log();
    let mut levels = std::collections::BTreeSet::new();
    for line in log.lines() {
        let Ok(Value::Object(event)) = serde_json::from_str(line) else { panic!("no JSON object: {line}") };
        assert!(event["timestamp"].is_string() && event["fields"].is_object(), "{line}");
        levels.insert(event["level"].as_str().expect("text").to_owned());
    }
    assert!(levels.contains("INFO") && levels.contains("DEBUG"), "{levels:?}: {log}");
}

#[test]
fn settings_of_up_are_checked_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    for (setting, named) in [
        ("log.retention.check.interval.mss=1", "log.retention.check.interval.mss"),
        ("log.segment.bytes=few", "log.segment.bytes"),
    ] {
        let answer =
            run(&["up", "--data", data.to_str().expect("text"), "--listen", "127.0.0.1:0", "-c", setting]).fails(1);
        assert!(answer.stderr.contains(named), "{}", answer.stderr);
    }
    let open = run(&["up", "--data", data.to_str().expect("text"), "--listen", "0.0.0.0:0"]).fails(1);
    assert!(open.stderr.contains("insecure"), "{}", open.stderr);
    run(&["up", "--data", data.to_str().expect("text"), "--listen", "nonsense"]).fails(1);
    run(&["up", "-c", "novalue"]).fails(2);
}

#[test]
fn a_broker_starts_from_its_configuration_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("broker.toml");
    let data = folder.path().join("kept");
    let text = format!(
        "data.dir = {data:?}\nlisten = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\nlog.retention.ms = 12345\n"
    );
    std::fs::write(&file, text).expect("written");
    let file = file.to_str().expect("text");
    run(&["config", "check", file]).ok();
    let mut command = headwater();
    command.args(["broker", "--config", file, "--json"]);
    let mut broker = Running::start(command);
    let line = eventually("the first line", || broker.lines().first().cloned());
    let ready: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(ready["ready"], true, "{line}");
    let profile = ready["profile"].as_str().expect("text");
    run(&["--profile", profile, "topic", "create", "t"]).ok();
    let described = run(&["--profile", profile, "topic", "describe", "t", "--json"]).ok().object();
    let retention = described["config"]
        .as_array()
        .expect("settings")
        .iter()
        .find(|entry| entry["name"] == "retention.ms")
        .expect("it is there")
        .clone();
    assert_eq!((&retention["value"], &retention["source"]), (&"12345".into(), &"broker".into()));
    assert!(broker.terminate().success());
}

#[test]
fn configuration_is_shown_and_checked() {
    let example = run(&["config", "example"]).ok().text();
    assert_eq!(run(&["broker", "config", "example"]).ok().text(), example);
    assert!(example.contains("log.retention.check.interval.ms") && example.contains("listen"), "{example}");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("broker.toml");
    let path = file.to_str().expect("text");
    std::fs::write(&file, &example).expect("written");
    run(&["config", "check", path]).ok();
    assert_eq!(run(&["config", "check", path, "--json"]).ok().object()["valid"], true);
    for (text, named) in [
        ("log.retention.mss = 1", "log.retention.mss"),
        ("listen = \"0.0.0.0:9392\"", "insecure"),
        ("listen =", "broker.toml"),
    ] {
        std::fs::write(&file, text).expect("written");
        for arguments in [&["config", "check", path][..], &["broker", "config", "check", path]] {
            let answer = run(arguments).fails(1);
            assert!(answer.stderr.contains(named), "{text}: {}", answer.stderr);
        }
        run(&["broker", "--config", path]).fails(1);
    }
    run(&["config", "check", "nowhere.toml"]).fails(1);
    run(&["broker"]).fails(2);
}
#[test]
fn what_kafka_wrote_is_imported() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let source = kafka_logs().join("dirs");
    let (data_text, source) = (data.to_str().expect("text").to_owned(), source.to_str().expect("text").to_owned());
    let report = run(&[
        "import",
        "--data",
        &data_text,
        &source,
        "--topic",
        "shapes",
        "--topic",
        "codecs",
        "-c",
        "retention.ms=86400000000",
        "--json",
    ])
    .ok();
    assert!(!report.json().is_empty());
    let broker = Broker::start_in(folder, &[]);
    let mut names: Vec<String> = broker
        .json(&["topic", "list"])
        .iter()
        .filter(|t| t["internal"] == false)
        .map(|t| t["name"].as_str().expect("text").to_owned())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["codecs", "shapes"]);
    assert_eq!(broker.records("codecs").len(), 120);
    let settings = broker.object(&["topic", "describe", "codecs"])["config"].as_array().expect("settings").clone();
    let retention = settings.iter().find(|entry| entry["name"] == "retention.ms").expect("it is there");
    assert_eq!(retention["value"], "86400000000");
    let running = run(&["import", "--data", &data_text, &source]).fails(1);
    assert!(running.stderr.contains("data"), "a running broker's folder is not touched: {}", running.stderr);
    run(&["import", "--data", &data_text, "/nowhere"]).fails(1);
}

#[test]
fn settings_of_an_import_are_checked_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let (target, source) = (data.to_str().expect("text"), kafka_logs().join("dirs"));
    for (setting, named) in [
        ("retention.mss=1", "retention.ms?"),
        ("retention.ms=soon", "retention.ms"),
        ("log.retention.ms=1", "a topic's is retention.ms"),
    ] {
        let answer = run(&["import", "--data", target, source.to_str().expect("text"), "-c", setting]).fails(1);
        let key = setting.split_once('=').expect("a setting").0;
        assert!(answer.stderr.contains(key) && answer.stderr.contains(named), "{setting}: {}", answer.stderr);
        assert!(!data.exists(), "nothing is copied before the settings are right");
    }
    run(&["import", "--data", target, source.to_str().expect("text"), "-c", "novalue"]).fails(2);
}
