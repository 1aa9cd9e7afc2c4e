//! What needs no broker, and what no broker can be found for.

use crate::Held;
use crate::harness::{Broker, Running, eventually, headwater, run};
use serde_json::json;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

#[test]
fn help_and_version_are_answers() {
    assert!(run(&["--version"]).ok().text().starts_with("headwater "));
    let help = run(&["--help"]).ok().text();
    for word in [
        "up", "cert", "import", "broker", "config", "topic", "produce", "consume", "group", "replay", "segment",
        "bench", "demo",
    ] {
        assert!(help.contains(word), "{word} is missing:\n{help}");
    }
}

#[test]
fn misuse_exits_with_2() {
    for line in
        ["", "bogus", "topic bogus", "consume", "consume t --from yesterday", "replay", "group reset g --to earliest"]
    {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        run(&arguments).fails(2);
    }
}

#[test]
fn completions_are_scripts_of_their_shell() {
    for (shell, word) in [
        ("bash", "_headwater"),
        ("zsh", "#compdef headwater"),
        ("fish", "complete -c headwater"),
        ("powershell", "Register-ArgumentCompleter"),
        ("elvish", "edit:completion"),
    ] {
        assert!(run(&["completions", shell]).ok().text().contains(word), "{shell}");
    }
    run(&["completions", "tcsh"]).fails(2);
}

#[test]
fn without_a_profile_the_error_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = headwater();
    command.current_dir(folder.path()).env_remove("HEADWATER_PROFILE");
    let output = command.args(["topic", "list"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("headwater up") && said.contains("--profile"), "{said}");
}

#[test]
fn an_address_where_no_broker_is_fails() {
    let broker = Broker::start(&[]);
    let no_authority = run(&["topic", "list", "--broker", broker.listen()]).fails(1);
    assert!(no_authority.stderr.contains("--ca"), "{}", no_authority.stderr);
    // A port that was free a moment ago, and the right certificates: only the broker is missing.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("an address").to_string();
    let answer = broker.run(&["topic", "list", "--broker", &address]).fails(1);
    assert!(answer.stderr.contains(&address), "{}", answer.stderr);
}

#[test]
fn the_profile_is_found_by_flag_by_environment_and_by_folder() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "list"]).ok();

    let listed =
        headwater().args(["topic", "list"]).env("HEADWATER_PROFILE", broker.profile()).output().expect("it runs");
    assert!(listed.status.success());

    let elsewhere = tempfile::tempdir().expect("a folder");
    let folder = elsewhere.path().join("headwater-data");
    std::fs::create_dir(&folder).expect("a folder");
    for file in ["client.toml", "ca.pem"] {
        std::fs::copy(broker.data().join(file), folder.join(file)).expect(file);
    }
    let mut command = headwater();
    command.current_dir(elsewhere.path()).env_remove("HEADWATER_PROFILE");
    assert!(command.args(["topic", "list"]).output().expect("it runs").status.success());

    let ca = broker.data().join("ca.pem");
    let mut command = headwater();
    command.current_dir(std::env::temp_dir()).env_remove("HEADWATER_PROFILE");
    let listed =
        command.args(["topic", "list", "--broker", broker.listen(), "--ca"]).arg(&ca).output().expect("it runs");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));

    let empty =
        broker.command(&["topic", "list"]).env("HEADWATER_PROFILE", "").env("HEADWATER_LOG_FORMAT", "").output();
    assert!(empty.expect("it runs").status.success(), "an empty variable says nothing");
    let mut command = headwater();
    command.current_dir(elsewhere.path()).env("HEADWATER_PROFILE", "").env("HEADWATER_LOG", "");
    let listed = command.args(["topic", "list"]).output().expect("it runs");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));

    let missing = broker.folder().join("nowhere.toml");
    let answer = crate::harness::run(&["topic", "list", "--profile", missing.to_str().expect("text")]).fails(1);
    assert!(answer.stderr.contains("nowhere.toml"), "{}", answer.stderr);
}

#[test]
fn logs_go_to_standard_error_in_the_form_asked_for() {
    let broker = Broker::start(&[]);
    let answer = broker.run(&["topic", "list", "--log", "trace", "--log-format", "json"]).ok();
    let line = answer.stderr.lines().next().expect("a line of log");
    assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    broker.run(&["topic", "list", "--log", "=="]).fails(1);
    let listed = |filter: &str, more: &[&str]| {
        let mut command = broker.command(&["topic", "list"]);
        command.args(more).env("HEADWATER_LOG", filter).env("HEADWATER_LOG_FORMAT", "json");
        let output = command.output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = listed("trace", &[]);
    assert!(code == Some(0) && said.lines().any(|line| line.starts_with('{')), "{said}");
    assert_eq!(listed("off", &[]), (Some(0), String::new()));
    assert_eq!(listed("trace", &["--log", "off"]), (Some(0), String::new()), "a flag has the last word");
    let (code, said) = listed("==", &[]);
    assert!(code == Some(1) && said.contains("\"==\""), "{said}");
    assert_eq!(broker.run(&["topic", "list"]).ok().stderr, "", "nothing to say by default");
}

/// Ctrl-C, once: a tail and a replay end well, a member has left, and what is not whole is no success.
#[test]
fn ctrl_c_ends_commands_in_good_order() {
    let broker = Broker::start(&[]);
    for topic in ["t", "u"] {
        broker.run(&["topic", "create", topic]).ok();
    }
    broker.run_with(&["produce", "t", "--timestamp-field", "at"], "{\"at\":0}\n{\"at\":3600000}\n").ok();
    let end = |topic: &str| {
        let described = broker.run(&["topic", "describe", topic, "--json"]);
        described.status.success().then(|| described.object()["partitions"][0]["high_watermark"].as_i64()).flatten()
    };
    // Under way when it has printed a line, or when something is in this topic.
    for (line, fills, code) in [
        ("consume t", None, 0),
        ("consume t --group g", None, 0),
        ("consume t --group h --until offset:99", None, 0),
        ("replay t --from earliest --speed real", None, 0),
        ("replay t --from earliest --speed real --to u", Some("u"), 1),
        ("bench produce --topic b --records 1000000000 --throughput 100", Some("b"), 1),
        ("bench e2e --topic c --records 1000000000", Some("c"), 1),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut command = broker.command(&line.split_whitespace().collect::<Vec<_>>());
        command.stdout(writer).stderr(Stdio::piped());
        let mut running = Held::start(command);
        let (mut out, mut printed) = (BufReader::new(reader), String::new());
        match fills {
            Some(topic) => _ = eventually("records", || end(topic).filter(|end| *end > 0)),
            None => _ = out.read_line(&mut printed).expect("it prints"),
        }
        running.signal("INT");
        let status = running.wait();
        let mut said = String::new();
        running.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        assert_eq!(status.code(), Some(code), "{line}: {said}");
        assert_eq!(said.contains("interrupted"), code == 1, "{line}: {said}");
        out.read_to_string(&mut printed).expect("text");
        if let Some(group) = line.split_whitespace().skip_while(|word| *word != "--group").nth(1) {
            let left = broker.object(&["group", "describe", group]);
            assert_eq!(left["members"], json!([]), "{group} has been left");
            assert_eq!(left["offsets"][0]["committed"], printed.lines().count(), "with what was printed");
        }
    }
}

#[test]
fn what_cannot_be_said_changes_no_outcome() {
    let broker = Broker::start(&[]);
    for (arguments, code) in [
        (&["topic", "create", "t"][..], 0),
        (&["topic", "describe", "nosuch"], 1),
        (&["topic", "list", "--log", "trace"], 0),
        (&["topic", "bogus"], 2),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = broker.command(arguments);
        command.stdout(Stdio::null()).stderr(writer);
        assert_eq!(Held::start(command).wait().code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn the_profiles_name_for_this_client_is_used() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let text = std::fs::read_to_string(broker.profile()).expect("a profile");
    let named = broker.data().join("named.toml");
    let without: String =
        text.lines().filter(|line| !line.starts_with("client_id")).map(|line| format!("{line}\n")).collect();
    std::fs::write(&named, format!("{without}client_id = \"board\"\n")).expect("written");
    for (profile, name) in [(broker.profile(), "headwater-cli"), (named.as_path(), "board")] {
        let mut command = headwater();
        command.args(["consume", "t", "--group", name, "--profile"]).arg(profile);
        let _member = Running::start(command);
        let client = eventually("a member", || {
            let members = broker.run(&["group", "members", name, "--json"]);
            members.status.success().then(|| members.json().first().map(|member| member["client_id"].clone())).flatten()
        });
        assert_eq!(client, name);
    }
}

/// What this end of a terminal is told, until `enough` of it. How the other end is found by its name, and that its closing is an
/// error here, is Linux's way.
#[cfg(target_os = "linux")]
fn on_a_terminal(mut command: std::process::Command, enough: impl Fn(&str) -> bool + Send + 'static) -> (Held, String) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("its other end");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&ours, size).expect("a size");
    let name = ptsname(&ours, Vec::new()).expect("a name").into_string().expect("text");
    let theirs = std::fs::File::options().read(true).write(true).open(name).expect("the other end");
    command.env("TERM", "xterm").stdout(Stdio::null()).stderr(theirs);
    let held = Held::start(command);
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut ours, mut seen, mut piece) = (std::fs::File::from(ours), String::new(), [0; 4096]);
        while !enough(&seen) {
            // The end of a terminal is an error.
            let Ok(read @ 1..) = ours.read(&mut piece) else { break };
            seen.push_str(&String::from_utf8_lossy(&piece[..read]));
        }
        let _ = send.send(seen);
        // Whoever writes on must not be held up.
        let _ = std::io::copy(&mut ours, &mut std::io::sink());
    });
    let seen = receive.recv_timeout(crate::harness::DEADLINE).expect("what it shows, or its end");
    (held, seen)
}

#[test]
#[cfg(target_os = "linux")]
fn progress_is_shown_on_a_terminal_and_nowhere_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let bench = |records: &str, more: &[&str]| {
        let mut command = headwater();
        command.args(["bench", "disk", "--records", records, "--dir"]).arg(folder.path()).args(more);
        command
    };
    let shown = |text: &str| text.contains("bench disk") && text.contains("KiB/") | text.contains("MiB/");
    let (mut running, seen) = on_a_terminal(bench("1000000000", &[]), shown);
    assert!(shown(&seen), "{seen:?}");
    running.signal("INT");
    assert_eq!(running.wait().code(), Some(1));
    let (mut quiet, seen) = on_a_terminal(bench("5000", &["--quiet"]), |_| false);
    assert!(quiet.wait().success());
    assert_eq!(seen, "", "nobody who asks for quiet is shown anything");
    let piped = bench("5000", &[]).output().expect("it runs");
    assert!(piped.status.success());
    assert_eq!(String::from_utf8_lossy(&piped.stderr), "");
}

/// Every long work with records or files of its own shows how far it is; what it prints is no terminal here.
#[test]
#[cfg(target_os = "linux")]
fn import_produce_replay_and_segment_verify_show_how_far_they_are() {
    let broker = Broker::start(&[]);
    broker.run(&["topic", "create", "t"]).ok();
    let input = broker.folder().join("input");
    std::fs::write(&input, "a line of it\n".repeat(5000)).expect("written");
    let imported = broker.folder().join("imported");
    let text = |path: &std::path::Path| path.to_str().expect("text").to_owned();
    let (input, into) = (text(&input), text(&imported));
    let kafka = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/kafka-logs/dirs");
    let log = format!("{kafka}/codecs-0");
    for (line, shown) in [
        (&["import", "--data", &into, kafka][..], "iB/"),
        (&["produce", "t", "--file", &input], "/63.48 KiB"),
        // Everything was produced twice by now.
        (&["replay", "t"], "/10,000 "),
        (&["segment", "verify", &log], "iB/"),
    ] {
        let (name, quiet) = (line[if line[0] == "segment" { 1 } else { 0 }], [line, &["--quiet"]].concat());
        let is_shown = |text: &str| text.contains(name) && text.contains(shown);
        let (mut running, seen) = on_a_terminal(broker.command(line), |_| false);
        assert!(running.wait().success(), "{line:?}: {seen:?}");
        assert!(is_shown(&seen), "{line:?}: {seen:?}");
        if name == "import" {
            std::fs::remove_dir_all(&imported).expect("removed");
        }
        let (mut running, seen) = on_a_terminal(broker.command(&quiet), |_| false);
        assert!(running.wait().success(), "{line:?}: {seen:?}");
        assert!(!is_shown(&seen), "{quiet:?}: {seen:?}");
    }
}

#[test]
fn help_says_what_would_surprise() {
    for (command, said) in [
        ("consume", "A value that holds line feeds itself takes several lines; --json"),
        ("bench", "of this side. The broker's packets are as large as its own setting `mtu` says"),
    ] {
        let help = run(&[command, "--help"]).ok().text();
        let words: Vec<&str> = help.split_whitespace().collect();
        assert!(words.join(" ").contains(said), "{help}");
    }
}
