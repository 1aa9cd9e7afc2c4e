//! The surface of the command: every subcommand, flag and default, and nothing that they do.
//!
//! Owns: names, help and the refusal of senseless combinations. Refuses: work; `commands/` has one file for each word
//! here. Read next: [`crate::spec`], the small languages inside the values.

mod bench;
mod cert;
mod cluster;
mod data;
mod groups;
mod server;
mod topics;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

use crate::spec::ResetTarget;

pub(crate) use bench::{BenchArgs, Direction, Durability, Mode, NUMBER_BYTES};
pub(crate) use cert::{BrokerCertArgs, CaArgs, CertCommand, ClientCertArgs};
pub(crate) use cluster::{
    ClusterCommand, ElectArgs, FolderArgs, PaceArgs, ReassignArgs, ReassignCommand, VotersCommand,
};
pub(crate) use data::{AcksArg, CodecArg, ConsumeArgs, ProduceArgs, ReplayArgs};
pub(crate) use groups::{DeleteOffsetsArgs, GroupCommand, ResetArgs};
pub(crate) use server::{
    BrokerArgs, BrokerCommand, ConfigCommand, Decode, DumpArgs, ImportArgs, RepairArgs, SegmentCommand, UpArgs,
};
pub(crate) use topics::TopicCommand;

/// Record streams that are kept: a partitioned, append-only log over QUIC.
#[derive(Debug, Parser)]
#[command(name = "headwater", version, propagate_version = true, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Reads a command line, and what the environment adds to it. An error is help, a version, or misuse, and knows how
    /// to exit.
    pub(crate) fn read(
        line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Cli, clap::Error> {
        let mut cli = Cli::try_parse_from(line)?;
        let misused = |why: &str| Cli::command().error(ErrorKind::ValueValidation, why);
        cli.global.fill(environment).map_err(|why| misused(&why))?;
        match cli.misuse() {
            None => Ok(cli),
            Some(why) => Err(misused(why)),
        }
    }

    /// What no single flag can know to be wrong.
    fn misuse(&self) -> Option<&'static str> {
        match &self.command {
            Command::Group(GroupCommand::Reset(reset))
                if reset.topic.is_empty() && !matches!(reset.to, ResetTarget::File(_)) =>
            {
                Some("name the topic: --topic TOPIC or --topic TOPIC:PARTITIONS (only --to file:F needs none)")
            }
            Command::Bench(bench) => bench.misuse(),
            _ => None,
        }
    }
}

/// What every command understands.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Address of a broker, instead of the profile's; may be given several times.
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub(crate) broker: Vec<String>,
    /// The client profile. Without it: $HEADWATER_PROFILE, then ./headwater-data/client.toml.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Certificate authority (PEM) that the broker's certificate must come from, instead of the profile's.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// One JSON object a line, or one an answer.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, no remarks: only what was asked for, and errors.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// What to log to standard error, as tracing filters: `info`, `headwater_client=debug`, ... Without it: $HEADWATER_LOG.
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// Form of the log lines. Without it: $HEADWATER_LOG_FORMAT.
    #[arg(long, global = true, value_name = "FORM")]
    pub(crate) log_format: Option<LogFormat>,
}

impl Global {
    /// Takes what the environment says where the flags say nothing. A variable that is empty counts as not set.
    fn fill(&mut self, environment: impl Fn(&str) -> Option<OsString>) -> Result<(), String> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        if self.profile.is_none() {
            self.profile = set("HEADWATER_PROFILE").map(PathBuf::from);
        }
        if self.log.is_none() {
            self.log = set("HEADWATER_LOG").map(|filter| filter.to_string_lossy().into_owned());
        }
        if let (None, Some(form)) = (self.log_format, set("HEADWATER_LOG_FORMAT")) {
            let form = LogFormat::from_str(&form.to_string_lossy(), true);
            self.log_format = Some(form.map_err(|why| format!("HEADWATER_LOG_FORMAT: {why}; it is human or json"))?);
        }
        Ok(())
    }
}

/// Form of the log lines on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For a person.
    Human,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Starts a development broker: makes its folder, certificates and the profile that the other commands find.
    Up(UpArgs),
    /// Starts a broker from a configuration file.
    Broker(BrokerArgs),
    /// Shows or checks broker configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Makes the certificates of a cluster: its authority's, its brokers', its clients'.
    #[command(subcommand)]
    Cert(CertCommand),
    /// Makes a cluster of several brokers, shows how it is, and changes who is in it, who leads and where partitions are kept.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Copies what Kafka wrote into a broker's folder, while that broker is not running.
    Import(ImportArgs),
    /// Creates, shows, changes and deletes topics.
    #[command(subcommand)]
    Topic(TopicCommand),
    /// Appends lines to a topic.
    Produce(ProduceArgs),
    /// Prints records as they come.
    ///
    /// Without -f and --json a record is its value and a line feed. A value that holds line feeds itself takes several
    /// lines; --json prints one line for every record, whatever it holds, and -f what it is told.
    Consume(ConsumeArgs),
    /// Shows consumer groups, moves and deletes their offsets.
    #[command(subcommand)]
    Group(GroupCommand),
    /// Reads a stretch of a topic's history again, at any speed; no group's offsets move.
    Replay(ReplayArgs),
    /// Looks into segment files and repairs them; needs no broker.
    #[command(subcommand)]
    Segment(SegmentCommand),
    /// Measures, on a topic and data of its own.
    Bench(BenchArgs),
    /// Shows the whole of it in a minute: a broker, a week of flights, a group, a takeover, a replay, and checks it all.
    ///
    /// It needs nothing and leaves nothing behind. Each line of the report is a check; the first that does not hold ends it with 1.
    Demo {
        /// Instead with a cluster of three brokers: a broker that leads is killed while flights are produced, packets are lost between
        /// the two others, and the killed one finds a file cut in half when it comes back. Checks that nothing acknowledged was lost.
        #[arg(long)]
        cluster: bool,
    },
    /// Prints the completions of a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(std::iter::once("headwater").chain(line.split_whitespace()), |_| None)
    }

    #[test]
    fn the_environment_says_what_the_flags_do_not() {
        let read = |line: &'static [&'static str], value: &'static str| {
            Cli::read(line, move |name| name.starts_with("HEADWATER_").then(|| value.into())).map(|cli| cli.global)
        };
        let given = read(&["headwater", "demo"], "json").expect("a line");
        assert_eq!(
            (given.profile, given.log, given.log_format),
            (Some("json".into()), Some("json".into()), Some(LogFormat::Json))
        );
        let flags = ["headwater", "demo", "--profile", "p", "--log", "info", "--log-format", "human"].as_slice();
        let given = Cli::read(flags, |_| Some("json".into())).expect("a line").global;
        assert_eq!(
            (given.profile, given.log, given.log_format),
            (Some("p".into()), Some("info".into()), Some(LogFormat::Human))
        );
        let empty = read(&["headwater", "demo"], "").expect("a line");
        assert_eq!((empty.profile, empty.log, empty.log_format), (None, None, None));
        assert_eq!(read(&["headwater", "demo"], "xml").err().map(|error| error.exit_code()), Some(2));
    }

    #[test]
    fn the_surface_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_form_of_the_surface_is_understood() {
        for line in [
            "up --data d --listen 127.0.0.1:0 --admin 127.0.0.1:0 -c log.retention.check.interval.ms=500 -c a=b --json",
            "cert ca --out d",
            "cert ca --out d --cluster prod --validity 10y --renew",
            "cert broker --ca d --id 1 --host a b 192.0.2.1 --host c --out e --validity 48h",
            "cert broker --ca d --id 1 --out e --renew",
            "cert client --ca d --name alice --out e --broker a:1 --json",
            "import --data d dirs --topic a --topic b -c retention.ms=1",
            "broker --config f",
            "broker config example",
            "broker config check f",
            "config example",
            "config check f",
            "topic create t -p 3 -c retention.ms=1 -c cleanup.policy=compact,delete",
            "topic list --json",
            "topic describe t",
            "topic alter t -c retention.ms=1",
            "topic alter t --unset retention.ms",
            "cluster health",
            "cluster health 2",
            "cluster elect --preferred",
            "cluster elect --unclean --topic t --dry-run",
            "cluster elect --unclean --yes",
            "cluster reassign --topic t --partition 0 --replicas 1,2,3 --throttle 10MB",
            "cluster reassign status",
            "cluster reassign cancel --topic t --partition 3",
            "cluster reassign cancel",
            "cluster rebalance --dry-run",
            "cluster rebalance --throttle 500kB --no-wait",
            "cluster drain 3",
            "cluster drain 3 --cancel",
            "cluster upgrade --finalize",
            "cluster join --config f --again",
            "cluster unsafe-recover --config f",
            "cluster unsafe-recover --config f --yes-lose-what-only-others-know C",
            "topic create t --replica-placement 1:2:3,2:3:1",
            "topic list --under-replicated",
            "topic list --under-min-isr --stale",
            "topic list --offline",
            "topic add-partitions t 5",
            "topic delete t",
            "topic delete t --yes",
            "topic delete-records t --partition 0 --before 7",
            "produce t --file f --key-separator : --header k=v --header w= --null-value - --partition 3",
            "produce t --json-key f --timestamp-field ts --ack-log a --delivery-timeout 120s --acks 1 --compression zstd",
            "produce t --create -p 4 --acks all",
            "consume t --group g --from earliest --until end --count 3",
            "consume t --partition 1 --partition 2 --from offset:7 --until offset:9 -f %t|%p\\n",
            "consume t --from -1h30m --no-follow --json",
            "consume t --from time:2013-01-01T00:00:00-05:00 --until time:2013-01-02T00:00:00Z",
            "consume t --from latest",
            "group list",
            "group describe g",
            "group members g",
            "group reset g --topic t:0,1 --to shift:-5 --execute --export",
            "group reset g --topic t --topic u --to duration:PT1H",
            "group reset g --to file:f.csv",
            "group delete g",
            "group delete-offsets g --topic t",
            "replay t --from time:2013-01-01T00:00:00Z --until end --partition 1 --speed real --rate 1000",
            "replay t",
            "replay t --from earliest --speed 10x --where key=K --where header:H=V --to u",
            "replay t --from offset:1 --to stdout",
            "segment dump p q --records --from-offset 3 --decode hex",
            "segment verify p",
            "segment stats p --json",
            "segment repair p --out o",
            "segment repair p --in-place",
            "bench produce --topic t --records 10 --record-size 9 --producers 2 --partitions 3 --batch 99 --throughput 5 --acks 1 --durability replicated --compression lz4",
            "bench raw --mtu 6500",
            "bench disk",
            "bench isolation --partitions 64 --stalled 8",
            "demo",
            "demo --cluster",
            "completions bash",
            "--broker 127.0.0.1:9 topic list",
            "topic list --broker 127.0.0.1:9 --broker 127.0.0.1:10 --profile x --quiet",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            "",
            "broker",
            "broker config",
            "cert",
            "cert ca",
            "cert ca --out d --validity 0s",
            "cert broker --ca d --id 1 --out e",
            "cert broker --ca d --id -1 --host a --out e",
            "cert broker --id 1 --host a --out e",
            "cert client --ca d --out e",
            "broker --config f config example",
            "topic bogus",
            "topic create",
            "topic create t -p 0",
            "topic create t --replica-placement 1:2,x",
            "topic create t --replica-placement 1:2 -p 3",
            "topic list --offline --under-replicated",
            "cluster elect",
            "cluster elect --preferred --unclean",
            "cluster elect --preferred --dry-run",
            "cluster elect --preferred --yes",
            "cluster elect --unclean --dry-run --yes",
            "cluster reassign --topic t --partition 0",
            "cluster reassign cancel --partition 3",
            "cluster drain",
            "cluster unsafe-recover",
            "cluster drain 3 --cancel --throttle 1MB",
            "topic alter t",
            "consume t --from yesterday",
            "consume t --until earliest",
            "consume t --group g --partition 1",
            "consume t -f %q",
            "consume t -f %v --json",
            "consume t --count 0",
            "produce t --key-separator",
            "produce t --key-separator : --json-key f",
            "produce t --header noequals",
            "produce t --acks 2",
            "produce t --compression brotli",
            "produce t -p 3",
            "group reset g --topic t",
            "group reset g --to earliest",
            "group reset g --topic t:x --to earliest",
            "replay",
            "replay t --from yesterday",
            "replay t --from earliest --speed 0x",
            "replay t --from earliest --where value=3",
            "segment repair p",
            "segment repair p --out o --in-place",
            "bench nothing",
            "bench isolation --partitions 4 --stalled 4",
            "bench e2e --record-size 7",
            "up -c novalue",
        ] {
            let error = parse(line).err().unwrap_or_else(|| panic!("{line} was taken"));
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
