//! `headwater demo`: the whole of it in a minute, on a week of real flights, and every promise it makes is checked.
//!
//! Owns: the story and its checks. The broker runs in this process; consumers, replay and segment tools are this
//! command again, as separate processes, so that what is shown is what anybody can type, and a killed member is a killed
//! process. Refuses: leaving anything behind.

mod broker;
mod cluster;
mod members;

use anyhow::{Context, Result, anyhow, bail, ensure};
use headwater_client::{Admin, Client, ClientConfig, Durability, NewTopic, ProducerRecord};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::args::Global;
use crate::connect::block_on;
use crate::output::{bytes, number, plural, print, print_json};
use crate::signals::Signals;
use crate::spec::time_ms;
use broker::Embedded;
use members::{Member, Seen, headwater};

/// Flights out of New York in the first week of 2013, in the order of departure (`cli/data/README.md`).
const FLIGHTS: &str = include_str!("../data/flights-week.jsonl");
const TOPIC: &str = "flights";
const GROUP: &str = "arrivals";
const PARTITIONS: u32 = 6;
/// The day that is replayed, New York's midnight to midnight.
const DAY: (&str, &str) = ("2013-01-03T00:00:00-05:00", "2013-01-04T00:00:00-05:00");
/// The partition that is replayed, from its middle.
const REPLAYED: u32 = 2;
/// How long any step may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs the demo; an error if anything did not hold.
pub(crate) fn run(global: &Global, with_cluster: bool) -> Result<()> {
    if with_cluster {
        return cluster::run(global);
    }
    let report = Report { global, color: std::io::stdout().is_terminal(), began: Instant::now() };
    report.title()?;
    let folder = tempfile::Builder::new().prefix("headwater-demo-").tempdir().context("cannot make a folder")?;
    let broker = Embedded::start(folder.path())?;
    let told = block_on(async {
        let told = Signals::catch().unless_asked(tell(&report, &broker)).await;
        told.unwrap_or_else(|| Err(anyhow!("interrupted")))
    });
    let stopped = broker.stop();
    told?;
    ensure!(stopped?, "the broker did not end in good order");
    report.step("segments", verify(folder.path()))?;
    report.end()
}

/// A flight, as far as the demo looks at it.
#[derive(Deserialize)]
struct Flight {
    ts: String,
    tail: Option<String>,
}

/// Where each line of the input went.
type Placed = HashMap<(u32, i64), &'static str>;

async fn tell(report: &Report<'_>, broker: &Embedded) -> Result<()> {
    let client =
        Client::connect(ClientConfig::from_profile(&broker.profile)?).await.context("cannot reach the broker")?;
    let admin = client.admin();
    let words = format!("one process, serving on {} over QUIC, its files in {}", broker.listen, broker.data.display());
    report.step("broker", Ok(words))?;

    let lines: Vec<&'static str> = FLIGHTS.lines().collect();
    let (first, second) = lines.split_at(lines.len() / 2);
    let mut placed = Placed::new();
    admin.create_topic(NewTopic::new(TOPIC).partitions(PARTITIONS)).await.context("cannot create the topic")?;
    let began = Instant::now();
    let produced = produce(&client, first, &mut placed).await;
    report.step(
        "produce",
        produced.map(|()| {
            format!(
                "{} flights into {} by tail number in {:.2} s, each on disk before it was acknowledged",
                number(first.len() as i64),
                plural(PARTITIONS, "partition"),
                began.elapsed().as_secs_f64()
            )
        }),
    )?;

    let one = Member::start(&broker.profile, TOPIC, GROUP)?;
    let two = Member::start(&broker.profile, TOPIC, GROUP)?;
    report.step("group", share(&admin, [&one, &two], first.len()).await)?;
    report.step("takeover", take_over(&client, one, two, second, &mut placed).await)?;

    report.step("replay", replay_day(&broker.profile, &lines))?;
    report.step("replay", replay_partition(&broker.profile, &placed))?;
    client.close().await;
    Ok(())
}

/// Produces lines and remembers where each of them went.
async fn produce(client: &Client, lines: &[&'static str], placed: &mut Placed) -> Result<()> {
    let producer = client.producer().build().await?;
    let mut deliveries = Vec::with_capacity(lines.len());
    for line in lines {
        let flight: Flight = serde_json::from_str(line)?;
        let record = ProducerRecord::new(TOPIC, bytes::Bytes::from_static(line.as_bytes()))
            .key(flight.tail.map(bytes::Bytes::from))
            .timestamp_ms(time_ms(&flight.ts)?);
        deliveries.push((*line, producer.send(record).await?));
    }
    for (line, delivery) in deliveries {
        let acknowledged = delivery.await?;
        ensure!(acknowledged.durability == Durability::Flushed, "a flight was acknowledged before it was on disk");
        let place = (acknowledged.partition, acknowledged.offset);
        ensure!(placed.insert(place, line).is_none(), "two flights were given {place:?}");
    }
    producer.close().await;
    Ok(())
}

/// Waits until both members have their share, and all of it is read and committed.
async fn share(admin: &Admin, members: [&Member; 2], flights: usize) -> Result<String> {
    let shares = eventually("two members with three partitions each", async || {
        let Ok(group) = admin.describe_group(GROUP).await else { return Ok(None) };
        let shares: Vec<Vec<u32>> = group
            .members
            .iter()
            .map(|member| member.assigned.iter().map(|assigned| assigned.partition).collect::<BTreeSet<_>>())
            .map(|assigned| assigned.into_iter().collect())
            .collect();
        let even = shares.len() == 2 && shares.iter().all(|share| share.len() as u32 == PARTITIONS / 2);
        Ok(even.then_some(shares))
    })
    .await?;
    let owned: BTreeSet<u32> = shares.iter().flatten().copied().collect();
    ensure!(owned.len() as u32 == PARTITIONS, "a partition has two owners: {shares:?}");
    eventually("all flights read and committed", async || {
        let read = members.iter().map(|member| member.seen().len()).sum::<usize>();
        Ok((read >= flights && lag(admin).await? == 0).then_some(()))
    })
    .await?;
    let words: Vec<String> =
        shares.iter().map(|share| share.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")).collect();
    Ok(format!(
        "two members share the partitions: {}; {} flights read, all committed",
        words.join(" | "),
        number(flights as i64)
    ))
}

/// Kills one member, produces the rest, and sees that the other has everything, once.
async fn take_over(
    client: &Client,
    killed: Member,
    survivor: Member,
    lines: &[&'static str],
    placed: &mut Placed,
) -> Result<String> {
    let admin = client.admin();
    let of_killed = killed.kill()?;
    let began = Instant::now();
    produce(client, lines, placed).await?;
    eventually("the survivor has every partition", async || {
        let group = admin.describe_group(GROUP).await?;
        Ok(group.members.iter().any(|member| member.assigned.len() as u32 == PARTITIONS).then_some(()))
    })
    .await?;
    let took = began.elapsed();
    eventually("every flight read", async || {
        Ok((of_killed.len() + survivor.seen().len() >= placed.len()).then_some(()))
    })
    .await?;
    let of_survivor = survivor.end().await?;
    exactly_once(of_killed.iter().chain(&of_survivor), placed)?;
    ensure!(lag(&admin).await? == 0, "the survivor did not commit everything");
    for offset in admin.describe_group(GROUP).await?.offsets {
        ensure!(
            offset.committed == Some(offset.high_watermark),
            "partition {} is committed up to {:?} and ends at {}",
            offset.partition,
            offset.committed,
            offset.high_watermark
        );
    }
    Ok(format!(
        "one member was killed; the other had all {PARTITIONS} partitions {:.1} s later. {} flights read, none missing, none twice, each under its tail number",
        took.as_secs_f64(),
        number(placed.len() as i64)
    ))
}

/// Every flight must have been seen at the place where it was acknowledged, and nowhere else; under its tail number and
/// at its time, as the input says both.
fn exactly_once<'a>(seen: impl Iterator<Item = &'a Seen>, placed: &Placed) -> Result<()> {
    let mut found = BTreeSet::new();
    for record in seen {
        let place = (record.partition, record.offset);
        ensure!(
            placed.get(&place) == Some(&record.value.as_str()),
            "{place:?} holds another flight than was acknowledged there"
        );
        let flight: Flight = serde_json::from_str(&record.value)?;
        ensure!(record.key == flight.tail, "{place:?} has the key {:?} and its flight {:?}", record.key, flight.tail);
        ensure!(
            record.timestamp == time_ms(&flight.ts)?,
            "{place:?} is of {} ms and its flight of {}",
            record.timestamp,
            flight.ts
        );
        ensure!(found.insert(place), "{place:?} was read twice");
    }
    ensure!(found.len() == placed.len(), "{} of {} flights were not read", placed.len() - found.len(), placed.len());
    Ok(())
}

fn replay_day(profile: &Path, lines: &[&'static str]) -> Result<String> {
    let (from, until) = (time_ms(DAY.0)?, time_ms(DAY.1)?);
    let mut expected = Vec::new();
    for line in lines {
        let at = time_ms(&serde_json::from_str::<Flight>(line)?.ts)?;
        if (from..until).contains(&at) {
            expected.push(*line);
        }
    }
    ensure!(!expected.is_empty(), "the input has no flights on that day");
    let (x, y) = (format!("time:{}", DAY.0), format!("time:{}", DAY.1));
    let replayed = headwater(profile, &["replay", TOPIC, "--from", &x, "--until", &y])?;
    let mut replayed: Vec<&str> = replayed.lines().collect();
    let count = replayed.len();
    expected.sort_unstable();
    replayed.sort_unstable();
    ensure!(replayed == expected, "{count} flights came back, and the input has {} on that day", expected.len());
    Ok(format!("3 January, by time: {} flights, the same as in the input", number(count as i64)))
}

fn replay_partition(profile: &Path, placed: &Placed) -> Result<String> {
    let all: BTreeMap<i64, &str> = placed
        .iter()
        .filter(|((partition, _), _)| *partition == REPLAYED)
        .map(|((_, offset), line)| (*offset, *line))
        .collect();
    let from = all.len() as i64 / 2;
    let expected: Vec<&str> = all.range(from..).map(|(_, line)| *line).collect();
    let (partition, start) = (REPLAYED.to_string(), format!("offset:{from}"));
    let replayed = headwater(profile, &["replay", TOPIC, "--partition", &partition, "--from", &start])?;
    let replayed: Vec<&str> = replayed.lines().collect();
    ensure!(
        replayed == expected,
        "{} flights came back, or in another order, and there are {}",
        replayed.len(),
        expected.len()
    );
    Ok(format!("partition {REPLAYED} from offset {from}: {} flights, in their order", number(expected.len() as i64)))
}

/// Checks the files that the broker left.
fn verify(data: &Path) -> Result<String> {
    verify_folders(data)
}

/// Checks the files of all the flights in a broker's folder.
fn verify_folders(data: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Verified {
        batches: u64,
        records: u64,
    }
    let folders: Vec<PathBuf> = (0..PARTITIONS).map(|partition| data.join(format!("{TOPIC}-{partition}"))).collect();
    let mut arguments = vec!["segment", "verify", "--json"];
    arguments.extend(folders.iter().filter_map(|folder| folder.to_str()));
    let answer = headwater(Path::new(""), &arguments)?;
    let (mut batches, mut records) = (0, 0);
    for line in answer.lines() {
        let verified: Verified = serde_json::from_str(line)?;
        batches += verified.batches;
        records += verified.records;
    }
    let flights = FLIGHTS.lines().count() as u64;
    ensure!(records == flights, "the files hold {records} flights and {flights} were produced");
    let mut size = 0;
    for folder in &folders {
        for entry in std::fs::read_dir(folder)? {
            size += entry?.metadata()?.len();
        }
    }
    Ok(format!(
        "{} records in {} batches, {} on disk: every checksum, offset and index is right",
        number(records),
        number(batches),
        bytes(size)
    ))
}

async fn lag(admin: &Admin) -> Result<i64> {
    let group = admin.describe_group(GROUP).await?;
    if group.offsets.len() as u32 != PARTITIONS {
        return Ok(i64::MAX);
    }
    Ok(group.offsets.iter().map(|offset| offset.lag.unwrap_or(i64::MAX / i64::from(PARTITIONS))).sum())
}

/// Asks again until there is an answer.
async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe().await? {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("{what}: not within {DEADLINE:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The report, line by line as things happen.
struct Report<'a> {
    global: &'a Global,
    color: bool,
    began: Instant,
}

#[derive(Serialize)]
struct Step<'a> {
    step: &'a str,
    ok: bool,
    detail: &'a str,
}

impl Report<'_> {
    fn title(&self) -> Result<()> {
        if self.global.json {
            return Ok(());
        }
        let title = format!("Headwater {}: a week of flights out of New York", env!("CARGO_PKG_VERSION"));
        print(format!("{}\n\n", self.painted("1", &title)))
    }

    /// Prints a step's outcome, and passes its failure on.
    fn step(&self, name: &str, outcome: Result<String>) -> Result<()> {
        let (ok, detail) = match &outcome {
            Ok(words) => (true, words.clone()),
            Err(error) => (false, format!("{error:#}")),
        };
        if self.global.json {
            print_json(&Step { step: name, ok, detail: &detail })?;
        } else {
            let mark = if ok { self.painted("32", "✓") } else { self.painted("31", "✗") };
            print(format!("{mark} {name:<9} {detail}\n"))?;
        }
        outcome.map(|_| ()).with_context(|| format!("the demo's step {name:?} failed"))
    }

    fn end_of_cluster(&self) -> Result<()> {
        if self.global.json || self.global.quiet {
            return Ok(());
        }
        print(format!(
            "\nEverything held, in {:.1} s. The same by hand:\n\n  \
             headwater up --brokers 3                                  # a cluster, in a terminal of its own\n  \
             headwater produce flights --create -p 6 --json-key tail --timestamp-field ts --file cli/data/flights-week.jsonl\n  \
             headwater cluster describe                                # who leads; kill -9 one of them\n  \
             headwater cluster health                                  # what the rest bears\n",
            self.began.elapsed().as_secs_f64()
        ))
    }

    fn end(&self) -> Result<()> {
        if self.global.json || self.global.quiet {
            return Ok(());
        }
        print(format!(
            "\nEverything held, in {:.1} s. The same by hand:\n\n  \
             headwater up                                              # a broker, in a terminal of its own\n  \
             headwater produce flights --create -p 6 --json-key tail --timestamp-field ts --file cli/data/flights-week.jsonl\n  \
             headwater consume flights --group arrivals                # twice, and kill one of them\n  \
             headwater replay flights --from time:{} --until time:{}\n  \
             headwater segment verify headwater-data/flights-0\n",
            self.began.elapsed().as_secs_f64(),
            DAY.0,
            DAY.1
        ))
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_input_is_a_week_of_flights_in_order() {
        let times: Vec<i64> = FLIGHTS
            .lines()
            .map(|line| time_ms(&serde_json::from_str::<Flight>(line).expect("a flight").ts).expect("a time"))
            .collect();
        assert_eq!(times.len(), 6_099);
        assert!(times.is_sorted());
        let week = time_ms("2013-01-01T00:00:00-05:00").expect("a time")
            ..time_ms("2013-01-08T00:00:00-05:00").expect("a time");
        assert!(times.iter().all(|at| week.contains(at)));
    }

    #[test]
    fn a_gap_a_double_and_a_swap_are_all_noticed() {
        let (placed, [a, b]) = two();
        assert!(exactly_once([a.clone(), b.clone()].iter(), &placed).is_ok());
        assert!(exactly_once([a.clone()].iter(), &placed).is_err());
        assert!(exactly_once([a.clone(), b.clone(), b.clone()].iter(), &placed).is_err());
        let swapped = [Seen { offset: b.offset, ..a.clone() }, Seen { offset: a.offset, ..b }];
        assert!(exactly_once(swapped.iter(), &placed).is_err());
    }

    #[test]
    fn a_key_that_is_not_the_tail_number_and_a_time_that_is_not_the_flights_are_noticed() {
        let (placed, [a, b]) = two();
        for (wrong, word) in [
            (Seen { key: None, ..a.clone() }, "the key None"),
            (Seen { key: b.key.clone(), ..a.clone() }, "the key Some"),
            (Seen { timestamp: b.timestamp, ..a }, "ms and its flight of"),
        ] {
            let told = exactly_once([wrong, b.clone()].iter(), &placed).expect_err("it is not the flight's");
            assert!(told.to_string().contains(word), "{told}");
        }
    }

    /// The first flight of the week and the last one, and what a member that read them prints.
    fn two() -> (Placed, [Seen; 2]) {
        let lines = [FLIGHTS.lines().next(), FLIGHTS.lines().next_back()].map(|line| line.expect("a flight"));
        let seen = [0, 1].map(|n| {
            let flight: Flight = serde_json::from_str(lines[n]).expect("a flight");
            let timestamp = time_ms(&flight.ts).expect("a time");
            assert!(flight.tail.is_some());
            Seen { partition: 0, offset: n as i64, timestamp, key: flight.tail, value: lines[n].into() }
        });
        (HashMap::from([((0, 0), lines[0]), ((0, 1), lines[1])]), seen)
    }
}
