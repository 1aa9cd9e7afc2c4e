//! Producers, members of a group and a reader, which write down what they do and see.

use super::history::{Recorder, Seen, What, to_lines};
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use headwater_client::{
    Client, ClientConfig, ConsumeError, ConsumedRecord, Consumer, Position, ProduceError, ProducerRecord, Rebalance,
    StartFrom, TopicPartition,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

pub(crate) const TOPIC: &str = "t";
pub(crate) const GROUP: &str = "g";

/// Keys of one producer.
const KEYS: u64 = 29;
/// Records of one producer that have no outcome yet, at most.
const IN_FLIGHT: usize = 400;
/// How long a producer tries: beyond what anything here takes to heal.
const DELIVERY: Duration = Duration::from_secs(90);
/// How often a member commits.
const COMMIT: Duration = Duration::from_millis(300);
/// How long whatever goes wrong is not tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// Leaves behind what was seen if a test fails before it is judged.
pub(crate) struct Witness<'a>(pub(crate) &'a World);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.leave_behind();
        }
    }
}

/// Where clients find brokers, and where they write down what they see.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) config: ClientConfig,
    pub(crate) history: Arc<Recorder>,
    pub(crate) partitions: u32,
    /// What went wrong and is no anomaly by itself, for a person.
    pub(crate) complaints: Arc<Mutex<Vec<String>>>,
}

impl World {
    pub(crate) fn new(config: ClientConfig, partitions: u32) -> World {
        World { config, history: Arc::new(Recorder::new()), partitions, complaints: Arc::default() }
    }

    fn complain(&self, who: &str, error: &dyn std::fmt::Display) {
        let at = self.history.elapsed().as_secs_f64();
        self.complaints.lock().expect("whole").push(format!("{at:8.2} s  {who}: {error}"));
    }

    /// Leaves what was seen where it can be looked at, and says what clients complained of last.
    pub(crate) fn leave_behind(&self) {
        let path = std::env::var_os("NEMESIS_HISTORY").map_or_else(
            || std::env::temp_dir().join(format!("headwater-history-{}.jsonl", std::process::id())),
            PathBuf::from,
        );
        std::fs::write(&path, to_lines(&self.history.entries())).expect("written");
        let complaints = self.complaints.lock().expect("whole");
        eprintln!("what clients saw is in {}; they complained {} times", path.display(), complaints.len());
        complaints.iter().rev().take(30).rev().for_each(|complaint| eprintln!("{complaint}"));
    }

    fn config_of(&self, who: &str) -> ClientConfig {
        ClientConfig { client_id: who.to_owned(), ..self.config.clone() }
    }

    fn all_partitions(&self) -> Vec<TopicPartition> {
        (0..self.partitions).map(|partition| TopicPartition::new(TOPIC, partition)).collect()
    }

    /// A client, however long it takes.
    async fn connected(&self, who: &str, stop: &CancellationToken) -> Option<Client> {
        while !stop.is_cancelled() {
            match Client::connect(self.config_of(who)).await {
                Ok(client) => return Some(client),
                Err(error) => self.complain(who, &error),
            }
            sleep(PAUSE).await;
        }
        None
    }
}

/// A producer that goes on until it is told to stop, and then until it knows what became of all it sent.
pub(crate) fn produce(
    world: &World,
    who: String,
    seed: u64,
    per_second: u64,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let world = world.clone();
    tokio::spawn(async move {
        let mut rng = StdRng::seed_from_u64(seed);
        let Some(client) = world.connected(&who, &stop).await else { return };
        let producer = loop {
            match client.producer().delivery_timeout(DELIVERY).build().await {
                Ok(producer) => break producer,
                Err(error) => world.complain(&who, &error),
            }
            if stop.is_cancelled() {
                return;
            }
            sleep(PAUSE).await;
        };
        let (began, mut n, mut outcomes) = (Instant::now(), 0, FuturesUnordered::new());
        while !stop.is_cancelled() {
            let partition = rng.random_range(0..world.partitions);
            let (key, value) = (format!("{who}-k{}", n % KEYS), format!("{who}-{n}"));
            n += 1;
            world.history.add(&who, What::Sent { partition, key: key.clone(), value: value.clone() });
            let record = ProducerRecord::new(TOPIC, bytes::Bytes::from(value.clone())).key(bytes::Bytes::from(key));
            match producer.send(record.partition(partition)).await {
                Ok(delivery) => outcomes.push(async move { (value, delivery.await) }),
                Err(error) => world.failed(&who, value, error),
            }
            let due = began + Duration::from_nanos(n * 1_000_000_000 / per_second);
            // What is known meanwhile is written down meanwhile.
            loop {
                let told = match outcomes.len() > IN_FLIGHT {
                    true => Ok(outcomes.next().await),
                    false => timeout_at(due, outcomes.next()).await,
                };
                match told {
                    Ok(Some((value, outcome))) => world.told(&who, value, outcome),
                    Ok(None) => {
                        tokio::time::sleep_until(due).await;
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
        while let Some((value, outcome)) = outcomes.next().await {
            world.told(&who, value, outcome);
        }
        producer.close().await;
        client.close().await;
    })
}

impl World {
    fn told(&self, who: &str, value: String, outcome: Result<headwater_client::Acknowledgement, ProduceError>) {
        match outcome {
            Ok(acknowledged) => {
                let (partition, offset) = (acknowledged.partition, acknowledged.offset);
                self.history.add(who, What::Acknowledged { value, partition, offset });
            }
            Err(error) => self.failed(who, value, error),
        }
    }

    fn failed(&self, who: &str, value: String, error: ProduceError) {
        let why = error.to_string();
        let is_unknown = matches!(
            error,
            ProduceError::OutcomeUnknown { .. }
                | ProduceError::TimedOut { sent: true, .. }
                | ProduceError::Closed
                | ProduceError::Defect { .. }
        );
        self.history.add(who, if is_unknown { What::Unknown { value, why } } else { What::Failed { value, why } });
    }
}

/// What a member is to commit of each partition that it has. Held while something of it is written down, so that what is delivered and
/// what is let go are written down in the order in which they happen.
type Turn = Arc<Mutex<BTreeMap<u32, Position>>>;

/// A member of the group that goes on until it is told to stop; then it commits and leaves. Each time that it is told to die it comes
/// to its end without a word, and another one begins.
pub(crate) fn belong(world: &World, who: String, stop: CancellationToken, die: Arc<Notify>) -> JoinHandle<()> {
    let world = world.clone();
    tokio::spawn(async move {
        for life in 0.. {
            if stop.is_cancelled() {
                return;
            }
            // A member that begins anew is another one.
            live(&world, &format!("{who}.{life}"), &stop, &die).await;
        }
    })
}

async fn live(world: &World, who: &str, stop: &CancellationToken, die: &Notify) {
    let turn: Turn = Arc::default();
    let Some(client) = world.connected(who, stop).await else { return };
    let (told, own) = ((world.history.clone(), turn.clone(), who.to_owned()), who.to_owned());
    let builder = client.consumer().group(GROUP).topics([TOPIC]).start(StartFrom::Earliest).auto_commit(None);
    let built = builder.on_rebalance(move |event| rebalanced(told.clone(), event)).build().await;
    let mut consumer = match built {
        Ok(consumer) => consumer,
        Err(error) => {
            world.complain(&own, &error);
            sleep(PAUSE).await;
            return;
        }
    };
    let mut commit_at = Instant::now() + COMMIT;
    let is_over = loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break false,
            () = die.notified() => break true,
            () = tokio::time::sleep_until(commit_at) => {
                commit(world, who, &consumer, &turn).await;
                commit_at = Instant::now() + COMMIT;
            }
            next = next(&mut consumer, world, who, &turn) => match next {
                Ok(()) => {}
                Err(error) if error.retryable() => world.complain(who, &error),
                Err(error) => {
                    world.complain(who, &format!("gives up: {error}"));
                    break true;
                }
            },
        }
    };
    if is_over {
        let partitions = turn.lock().expect("whole").keys().copied().collect();
        world.history.add(who, What::Lost { partitions });
        drop(consumer);
    } else {
        commit(world, who, &consumer, &turn).await;
        if let Err(error) = consumer.close().await {
            world.complain(who, &error);
        }
    }
    client.close().await;
}

/// The next record, written down in the moment in which it is handed over.
async fn next(consumer: &mut Consumer, world: &World, who: &str, turn: &Turn) -> Result<(), ConsumeError> {
    let taken = std::future::poll_fn(|cx| {
        let mut turn = turn.lock().expect("whole");
        let polled = Pin::new(&mut *consumer).poll_next(cx);
        if let std::task::Poll::Ready(Some(Ok(record))) = &polled {
            turn.insert(record.partition, record.next_position());
            world.history.add(who, What::Delivered(seen(record)));
        }
        polled
    });
    match taken.await {
        Some(Err(error)) => Err(error),
        Some(Ok(_)) => Ok(()),
        None => Err(ConsumeError::Closed),
    }
}

async fn commit(world: &World, who: &str, consumer: &Consumer, turn: &Turn) {
    let positions: Vec<(u32, Position)> = {
        let turn = turn.lock().expect("whole");
        let known = turn.iter().filter(|(_, position)| position.offset >= 0);
        known.map(|(partition, position)| (*partition, *position)).collect()
    };
    let asked = Instant::now();
    write_down_commit(&world.history, who, &positions, consumer.commit_offsets(at(&positions)))
        .await
        .unwrap_or_else(|error| world.complain(who, &format!("commit after {:?}: {error}", asked.elapsed())));
}

fn at(positions: &[(u32, Position)]) -> Vec<(TopicPartition, Position)> {
    positions.iter().map(|(partition, position)| (TopicPartition::new(TOPIC, *partition), *position)).collect()
}

async fn write_down_commit(
    history: &Recorder,
    who: &str,
    positions: &[(u32, Position)],
    commit: impl Future<Output = Result<(), ConsumeError>>,
) -> Result<(), ConsumeError> {
    if positions.is_empty() {
        return Ok(());
    }
    for (partition, position) in positions {
        history.add(who, What::Committing { partition: *partition, offset: position.offset });
    }
    commit.await?;
    for (partition, position) in positions {
        history.add(who, What::Committed { partition: *partition, offset: position.offset });
    }
    Ok(())
}

/// Writes down what the group does with a member. Where it lets go properly, it commits.
async fn rebalanced((history, turn, who): (Arc<Recorder>, Turn, String), event: Rebalance) {
    let numbers = |partitions: &[TopicPartition]| partitions.iter().map(|at| at.partition).collect::<Vec<_>>();
    match event {
        Rebalance::Assigned(given) => {
            let mut turn = turn.lock().expect("whole");
            let partitions = numbers(&given);
            turn.extend(partitions.iter().map(|partition| (*partition, Position::from(-1))));
            history.add(&who, What::Given { partitions });
        }
        Rebalance::Revoked(gone, committer) => {
            let positions: Vec<(u32, Position)> = {
                let mut turn = turn.lock().expect("whole");
                let partitions = numbers(&gone);
                history.add(&who, What::LetGo { partitions: partitions.clone() });
                partitions.into_iter().filter_map(|partition| Some((partition, turn.remove(&partition)?))).collect()
            };
            let read: Vec<_> = positions.into_iter().filter(|(_, position)| position.offset >= 0).collect();
            // One that fails means that the next owner reads some records again.
            drop(write_down_commit(&history, &who, &read, committer.commit_offsets(at(&read))).await);
        }
        Rebalance::Lost(gone) => {
            let mut turn = turn.lock().expect("whole");
            let partitions = numbers(&gone);
            turn.retain(|partition, _| !partitions.contains(partition));
            history.add(&who, What::Lost { partitions });
        }
    }
}

fn seen(record: &ConsumedRecord) -> Seen {
    let text = |bytes: &Option<bytes::Bytes>| String::from_utf8_lossy(bytes.as_deref().unwrap_or(b"")).into_owned();
    Seen { partition: record.partition, offset: record.offset, key: text(&record.key), value: text(&record.value) }
}

impl World {
    /// Waits for so many more acknowledgements.
    pub(crate) async fn more_acknowledgements(&self, more: usize) {
        let count = || self.history.count(|what| matches!(what, What::Acknowledged { .. }));
        let enough = count() + more;
        until(Instant::now() + DELIVERY, "acknowledgements", async || {
            (count() >= enough).then_some(()).ok_or_else(|| format!("{} of {enough}", count()))
        })
        .await;
    }

    /// How far the group is.
    pub(crate) async fn ask_progress(&self, deadline: Instant) -> BTreeMap<u32, i64> {
        let asked = self.history.len();
        let told = until(deadline, "the group's offsets", async || {
            let client = Client::connect(self.config_of("admin")).await.map_err(|error| error.to_string())?;
            let offsets = client.admin().fetch_offsets(GROUP).await.map_err(|error| error.to_string());
            client.close().await;
            offsets
        });
        let told: BTreeMap<u32, i64> = told.await.iter().map(|told| (told.partition, told.offset)).collect();
        for (partition, offset) in &told {
            self.history.add("admin", What::Progress { partition: *partition, offset: *offset, asked });
        }
        told
    }

    /// As [`World::ask_progress`], where somebody answers soon.
    pub(crate) async fn note_progress(&self) {
        let asked = self.history.len();
        let config = ClientConfig {
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(2),
            ..self.config_of("admin")
        };
        let Ok(client) = Client::connect(config).await else { return };
        if let Ok(offsets) = client.admin().fetch_offsets(GROUP).await {
            for told in offsets {
                self.history.add("admin", What::Progress { partition: told.partition, offset: told.offset, asked });
            }
        }
        client.close().await;
    }

    /// Waits until the group has been given everything that the log holds.
    pub(crate) async fn wait_for_group(&self, ends: &BTreeMap<u32, i64>, deadline: Instant) {
        until(deadline, "the group reads everything", async || {
            let behind = self.behind(ends);
            behind.is_empty().then_some(()).ok_or_else(|| format!("(partition, offset read, end): {behind:?}"))
        })
        .await;
    }

    fn behind(&self, ends: &BTreeMap<u32, i64>) -> Vec<(u32, i64, i64)> {
        let mut read: BTreeMap<u32, i64> = BTreeMap::new();
        for entry in self.history.entries() {
            if let What::Delivered(seen) = entry.what {
                let most = read.entry(seen.partition).or_default();
                *most = (*most).max(seen.offset + 1);
            }
        }
        let of = |partition: &u32| read.get(partition).copied().unwrap_or(0);
        ends.iter().filter(|(partition, end)| of(partition) < **end).map(|(at, end)| (*at, of(at), *end)).collect()
    }

    /// Reads the log as it stands, whole.
    pub(crate) async fn read_all(&self, deadline: Instant) -> BTreeMap<u32, i64> {
        let (starts, ends, records) = until(deadline, "the log is read whole", async || {
            let client = Client::connect(self.config_of("reader")).await.map_err(|error| error.to_string())?;
            let read = self.read_with(&client).await.map_err(|error| error.to_string());
            client.close().await;
            read
        })
        .await;
        records.iter().for_each(|record| self.history.add("reader", What::Kept(seen(record))));
        for (partition, end) in &ends {
            self.history.add("reader", What::Whole { partition: *partition, start: starts[partition], end: *end });
        }
        ends
    }

    #[allow(clippy::type_complexity, reason = "where partitions begin, where they end, what they hold")]
    async fn read_with(
        &self,
        client: &Client,
    ) -> Result<(BTreeMap<u32, i64>, BTreeMap<u32, i64>, Vec<ConsumedRecord>), ConsumeError> {
        let all = self.all_partitions();
        let assign = all.iter().map(|at| (at.topic.to_string(), at.partition));
        let mut consumer = client.consumer().assign(assign).start(StartFrom::Earliest).build().await?;
        let starts = consumer.beginning_offsets(all.clone()).await?;
        let ends = consumer.end_offsets(all).await?;
        consumer.until(ends.clone());
        let mut records = Vec::new();
        while let Some(record) = consumer.next().await {
            records.push(record?);
        }
        consumer.close().await?;
        let by_number = |offsets: BTreeMap<TopicPartition, i64>| {
            offsets.iter().map(|(at, offset)| (at.partition, *offset)).collect()
        };
        Ok((by_number(starts), by_number(ends), records))
    }
}

/// Tries until it succeeds; panics with the last error once the deadline is over.
pub(crate) async fn until<T>(deadline: Instant, what: &str, mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    let mut last = "it was never tried to the end".to_owned();
    while Instant::now() < deadline {
        match timeout_at(deadline, attempt()).await {
            Ok(Ok(done)) => return done,
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        sleep(PAUSE).await;
    }
    panic!("{what}: not in time; the last try: {last}");
}
