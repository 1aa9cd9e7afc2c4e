//! A broker that stands still says nothing and refuses nothing. What that costs those who speak with it: one detection, whatever they do
//! after it, and not a timeout for each request.

use crate::clients::{Up, within};
use crate::harness::eventually;
use bytes::Bytes;
use futures::StreamExt;
use headwater_client::{
    Client, ClientConfig, Consumer, OffsetAt, OffsetQuery, Producer, ProducerRecord, StartFrom, TopicPartition,
};
use std::time::{Duration, Instant};

const PARTITIONS: u32 = 6;
/// What the first of each kind of request may take: the broker is missed by the others after 0.6 s, and others lead then.
const DETECTED: Duration = Duration::from_secs(8);
/// What a detection costs at least.
const SLOW: Duration = Duration::from_millis(300);
/// What any request may take after the first of its kind.
const SLOWEST: Duration = Duration::from_secs(3);
/// How often everything is done after that.
const PASSES: u32 = 20;

/// A broker that stands still until this is dropped, however the test ends.
struct Paused<'a>(&'a Up, i64);

impl<'a> Paused<'a> {
    fn new(up: &'a Up, broker: i64) -> Paused<'a> {
        up.signal(broker, "STOP");
        Paused(up, broker)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.signal(self.1, "CONT");
    }
}

struct Everything {
    client: Client,
    producer: Producer,
    consumer: Consumer,
}

impl Everything {
    async fn new(up: &Up) -> Everything {
        let config = ClientConfig::from_profile(up.profile()).expect("a profile");
        let client = within("a connection", Client::connect(config)).await.expect("connected");
        let producer = within("a producer", client.producer().build()).await.expect("built");
        let all = (0..PARTITIONS).map(|partition| ("t", partition));
        let consumer = client.consumer().assign(all).start(StartFrom::Latest).build();
        let consumer = within("a consumer", consumer).await.expect("built");
        Everything { client, producer, consumer }
    }

    /// Does everything once, and says how long each took.
    async fn pass(&mut self, number: u32) -> Vec<(&'static str, Duration)> {
        let mut took = Vec::new();
        let admin = self.client.admin();
        let mut began = Instant::now();
        let mut took_it = |what: &'static str| {
            took.push((what, began.elapsed()));
            began = Instant::now();
        };
        within("a description", admin.describe_topic("t")).await.expect("described");
        took_it("topic describe");
        within("a description", admin.describe_cluster()).await.expect("described");
        took_it("cluster describe");
        let at = |partition| OffsetQuery { topic: "t".into(), partition, at: OffsetAt::Latest };
        let ends = within("offsets", admin.list_offsets((0..PARTITIONS).map(at).collect())).await.expect("told");
        assert!(ends.iter().all(Result::is_ok), "{ends:?}");
        took_it("offsets");
        let group = format!("g{}", number % 7);
        let offset = vec![(TopicPartition::new("t", 0), 0)];
        within("a commit", admin.commit_offsets(&group, offset)).await.expect("committed");
        took_it("commit");
        within("a group", admin.describe_group(&group)).await.expect("described");
        took_it("group describe");
        for partition in 0..PARTITIONS {
            let record = ProducerRecord::new("t", Bytes::from_static(b"x")).partition(partition);
            let delivery = within("room", self.producer.send(record)).await.expect("taken");
            within("an acknowledgement", delivery).await.expect("acknowledged");
        }
        took_it("produce");
        for _ in 0..PARTITIONS {
            within("a record", self.consumer.next()).await.expect("it goes on").expect("no error");
        }
        took_it("consume");
        took
    }
}

#[test]
fn a_broker_that_stands_still_is_detected_once_and_not_by_each_request() {
    let up = Up::start();
    up.run(&["topic", "create", "t", "-p", &PARTITIONS.to_string(), "-r", "3", "-c", "min.insync.replicas=2"]).ok();
    let whole = |topic: &str| {
        eventually("all replicas are in sync", || {
            let whole = |partition: &serde_json::Value| partition["isr"].as_array().is_some_and(|isr| isr.len() == 3);
            up.partitions(topic).iter().all(whole).then_some(())
        });
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // Whoever answers the client's calls, leads what it reads and coordinates its groups: each of them once.
    for broker in 1..=3 {
        whole("t");
        let mut everything = runtime.block_on(Everything::new(&up));
        runtime.block_on(everything.pass(0));
        whole("__consumer_offsets");
        let paused = Paused::new(&up, broker);
        let first = runtime.block_on(everything.pass(0));
        assert!(first.iter().all(|(_, took)| *took < DETECTED), "broker {broker}: {first:?}");
        let mut rest = Vec::new();
        for number in 0..PASSES {
            rest.extend(runtime.block_on(everything.pass(number)));
        }
        // Groups that were not asked for before may have had it as their coordinator too.
        let slow: Vec<_> = rest.iter().filter(|(_, took)| *took >= SLOW).collect();
        let lost: Duration = slow.iter().map(|(_, took)| took.saturating_sub(SLOW)).sum();
        let said = || format!("broker {broker}: {} of {}, {lost:?} in all: {slow:?}", slow.len(), rest.len());
        assert!(slow.len() < PASSES as usize / 2, "{}", said());
        assert!(lost < DETECTED && slow.iter().all(|(_, took)| *took < SLOWEST), "{}", said());
        // A command begins anew each time, with all brokers that its profile names.
        for _ in 0..3 {
            let began = Instant::now();
            up.run(&["topic", "list"]).ok();
            assert!(began.elapsed() < Duration::from_millis(2_500), "broker {broker}: {:?}", began.elapsed());
        }
        drop(paused);
        runtime.block_on(everything.producer.close());
    }
}
