//! `headwater demo --cluster`: three brokers, of which the one that leads is killed in the middle of the flights, two lose packets
//! between them, and one finds a segment cut when it comes back; nothing that was acknowledged is lost.
//!
//! Owns: that story and its checks. The brokers are processes, as `headwater up --brokers 3` starts them. Read next: [`relay`].

mod relay;

use anyhow::{Context, Result, anyhow, bail, ensure};
use headwater_client::{Admin, Client, ClientConfig, NewTopic, ProducerRecord};
use serde_json::Value;
use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::members::{self, Seen};
use super::{FLIGHTS, Flight, PARTITIONS, Placed, Report, TOPIC, eventually, exactly_once, verify_folders};
use crate::args::Global;
use crate::commands::up::several::Brokers;
use crate::connect::block_on;
use crate::output::{number, plural};
use crate::signals::Signals;
use crate::spec::{Setting, time_ms};
use relay::Relay;

const BROKERS: u32 = 3;
/// Of a hundred packets between brokers 2 and 3, so many are lost.
const LOST_PERCENT: u32 = 20;

/// Runs it; an error if anything did not hold.
pub(super) fn run(global: &Global) -> Result<()> {
    let report = Report { global, color: std::io::stdout().is_terminal(), began: Instant::now() };
    report.title()?;
    let folder = tempfile::Builder::new().prefix("headwater-demo-").tempdir().context("cannot make a folder")?;
    block_on(async {
        let signals = Signals::catch();
        let mut brokers = None;
        let told = signals.unless_asked(tell(&report, folder.path(), &mut brokers)).await;
        if let Some(brokers) = brokers {
            brokers.end().await;
        }
        told.unwrap_or_else(|| Err(anyhow!("interrupted")))
    })?;
    report.step("segments", verify(folder.path()))?;
    report.end_of_cluster()
}

async fn tell(report: &Report<'_>, data: &Path, running: &mut Option<Brokers>) -> Result<()> {
    let relay = Arc::new(Relay::new(LOST_PERCENT));
    let quiet = Setting { key: "logging.level".to_owned(), value: "error".to_owned() };
    let mut prepared = Brokers::configure(data, &[quiet], BROKERS)?;
    // Whoever dials a broker dials its relay.
    for config in prepared.configs_mut() {
        let address = relay.add(config.broker_id, config.listen).await?;
        config.advertised_listener = Some(address.to_string());
    }
    prepared.write()?;
    prepared.start().await?;
    let brokers = running.insert(prepared);
    let profile = brokers.serve().await.context("the brokers do not come up")?.profile;
    let profile = PathBuf::from(profile);
    let client = Client::connect(ClientConfig::from_profile(&profile)?).await.context("cannot reach the brokers")?;
    let admin = client.admin();
    report.step("brokers", Ok(format!("{BROKERS} processes, one cluster; a controller is elected, all are active")))?;

    let topic = NewTopic::new(TOPIC).partitions(PARTITIONS).replication_factor(BROKERS);
    admin.create_topic(topic.config("min.insync.replicas", "2")).await.context("cannot create the topic")?;
    in_sync(&admin).await?;
    relay.lose_between(2, 3);
    let lines: Vec<&'static str> = FLIGHTS.lines().collect();
    let (first, rest) = lines.split_at(lines.len() / 3);
    let mut placed = Placed::new();
    let began = Instant::now();
    produce(&client, first, &mut placed, &Arc::default()).await?;
    report.step(
        "produce",
        Ok(format!(
            "{} flights in {:.2} s, each on the disks of two brokers before it was acknowledged; {LOST_PERCENT} % of the packets between brokers 2 and 3 are lost ({} so far)",
            number(first.len() as i64),
            began.elapsed().as_secs_f64(),
            number(relay.lost() as i64),
        )),
    )?;

    let killed = leader_of_most(&admin).await?;
    report.step("failover", fail_over(&client, brokers, killed, rest, &mut placed).await)?;
    let lost = relay.lost();
    ensure!(lost > 0, "no packet was lost");
    relay.lose_nothing();

    report.step("heal", heal(&admin, brokers, data, killed).await)?;
    report.step("read", read(&profile, &placed).await)?;
    report.step("replicas", same_everywhere(data).await)?;
    client.close().await;
    Ok(())
}

/// When each partition was acknowledged last, and how long the longest silence was.
#[derive(Default)]
struct Silences {
    last: HashMap<u32, Instant>,
    longest: Duration,
}

type Heard = Arc<Mutex<Silences>>;

/// Produces lines and remembers where each went, and how long nothing was acknowledged.
async fn produce(client: &Client, lines: &[&'static str], placed: &mut Placed, heard: &Heard) -> Result<()> {
    let producer = client.producer().build().await?;
    let mut deliveries = Vec::with_capacity(lines.len());
    for line in lines {
        let flight: Flight = serde_json::from_str(line)?;
        let record = ProducerRecord::new(TOPIC, bytes::Bytes::from_static(line.as_bytes()))
            .key(flight.tail.map(bytes::Bytes::from))
            .timestamp_ms(time_ms(&flight.ts)?);
        let (delivery, heard) = (producer.send(record).await?, Arc::clone(heard));
        deliveries.push((
            *line,
            tokio::spawn(async move {
                let acknowledged = delivery.await;
                if let Ok(acknowledged) = &acknowledged {
                    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                    let now = Instant::now();
                    if let Some(last) = heard.last.insert(acknowledged.partition, now) {
                        heard.longest = heard.longest.max(now - last);
                    }
                }
                acknowledged
            }),
        ));
        // At a pace at which a broker can die in the middle of it.
        if deliveries.len() % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    for (line, delivery) in deliveries {
        let acknowledged = delivery.await??;
        let place = (acknowledged.partition, acknowledged.offset);
        ensure!(placed.insert(place, line).is_none(), "two flights were given {place:?}");
    }
    producer.close().await;
    Ok(())
}

/// The broker that leads most partitions.
async fn leader_of_most(admin: &Admin) -> Result<u32> {
    let told = admin.describe_cluster().await?;
    let most = told.brokers.iter().max_by_key(|broker| broker.leaders).context("there are no brokers")?;
    Ok(u32::try_from(most.id)?)
}

/// Kills a broker in the middle of the flights.
async fn fail_over(
    client: &Client,
    brokers: &mut Brokers,
    killed: u32,
    lines: &[&'static str],
    placed: &mut Placed,
) -> Result<String> {
    let (heard, before) = (Heard::default(), placed.len());
    let kill = async {
        // Some of them are under way.
        loop {
            let acknowledged = !heard.lock().unwrap_or_else(PoisonError::into_inner).last.is_empty();
            if acknowledged {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        brokers.process(killed)?.kill()
    };
    tokio::try_join!(produce(client, lines, placed, &heard), kill).context("not every flight was acknowledged")?;
    let admin = client.admin();
    let told = admin.describe_cluster().await?;
    ensure!(told.offline == 0, "{} without a leader", plural(i128::from(told.offline), "partition"));
    let led = told.brokers.iter().find(|broker| i64::from(broker.id) == i64::from(killed)).map(|it| it.leaders);
    ensure!(led == Some(0), "the dead broker {killed} leads {led:?} partitions");
    let longest = heard.lock().unwrap_or_else(PoisonError::into_inner).longest;
    Ok(format!(
        "broker {killed}, which led most, was killed in the middle; {} more flights acknowledged, the longest silence of a partition {:.2} s",
        number((placed.len() - before) as i64),
        longest.as_secs_f64()
    ))
}

/// Cuts a segment of the broker that was killed, starts it, and waits until it has everything again.
async fn heal(admin: &Admin, brokers: &mut Brokers, data: &Path, id: u32) -> Result<String> {
    let (partition, log) = (0..PARTITIONS)
        .map(|partition| {
            let folder = data.join(id.to_string()).join(format!("{TOPIC}-{partition}"));
            (partition, folder.join("00000000000000000000.log"))
        })
        .max_by_key(|(_, log)| std::fs::metadata(log).map_or(0, |file| file.len()))
        .context("there are no partitions")?;
    let held = std::fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    ensure!(held.len() > 1000, "{} holds next to nothing", log.display());
    std::fs::write(&log, held.get(..held.len() / 2).unwrap_or_default())?;
    let began = Instant::now();
    brokers.start_again(id)?;
    in_sync(admin).await?;
    Ok(format!(
        "its segment of partition {partition} was cut in half before it came back; it fetched the rest from the leader and is in sync {:.1} s later",
        began.elapsed().as_secs_f64()
    ))
}

/// Waits until every replica of every partition is in sync.
async fn in_sync(admin: &Admin) -> Result<()> {
    eventually("every replica in sync", async || {
        let told = admin.describe_cluster().await?;
        let active = told.brokers.iter().filter(|broker| broker.state == "active").count();
        let topic = admin.describe_topic(TOPIC).await?;
        let whole = topic.partitions.iter().all(|it| it.isr.len() as u32 == BROKERS && it.leader >= 0);
        Ok((active as u32 == BROKERS && whole).then_some(()))
    })
    .await
}

/// Runs the command beside the relay, which goes on meanwhile.
async fn headwater(profile: &Path, args: &[&str]) -> Result<String> {
    let (profile, args): (_, Vec<String>) = (profile.to_owned(), args.iter().map(|arg| (*arg).to_owned()).collect());
    tokio::task::spawn_blocking(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        members::headwater(&profile, &args)
    })
    .await?
}

/// Every flight is read once, where it was acknowledged.
async fn read(profile: &Path, placed: &Placed) -> Result<String> {
    let out = headwater(profile, &["consume", TOPIC, "--from", "earliest", "--until", "end", "--json"]).await?;
    let seen: Vec<Seen> = out.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    exactly_once(seen.iter(), placed)?;
    Ok(format!(
        "{} flights acknowledged, {} read: none missing, none twice, each where it was acknowledged",
        number(placed.len() as i64),
        number(seen.len() as i64)
    ))
}

/// What identifies a partition's batches on one broker's disk.
async fn batches(data: &Path, broker: u32, partition: u32) -> Result<Vec<[Value; 4]>> {
    let folder = data.join(broker.to_string()).join(format!("{TOPIC}-{partition}"));
    let out = headwater(Path::new(""), &["segment", "dump", "--json", folder.to_str().context("text")?]).await?;
    let batch = |line: &str| -> Result<[Value; 4]> {
        let told: Value = serde_json::from_str(line)?;
        Ok(["base_offset", "last_offset", "crc", "leader_epoch"].map(|key| told.get(key).cloned().unwrap_or_default()))
    };
    out.lines().map(batch).collect()
}

/// Every broker has the same batches.
async fn same_everywhere(data: &Path) -> Result<String> {
    let mut count = 0;
    for partition in 0..PARTITIONS {
        count += eventually("the replicas are the same", async || {
            let first = batches(data, 1, partition).await?;
            for broker in 2..=BROKERS {
                if batches(data, broker, partition).await? != first {
                    return Ok(None);
                }
            }
            Ok(Some(first.len()))
        })
        .await?;
    }
    Ok(format!(
        "{} of {}: the same offsets, checksums and leader epochs on all {BROKERS} disks",
        plural(count as i64, "batch").replace("batchs", "batches"),
        plural(PARTITIONS, "partition")
    ))
}

fn verify(data: &Path) -> Result<String> {
    let mut words = None;
    for broker in 1..=BROKERS {
        words = Some(verify_folders(&data.join(broker.to_string()))?);
    }
    match words {
        Some(words) => Ok(format!("on each disk {words}")),
        None => bail!("there are no disks"),
    }
}
