//! Producing, measured: what `bench produce` counts, `bench consume` prepares and `bench e2e` listens to.
//!
//! Without `--throughput` a record is due when it is handed to the producer, and the time it waits for room in the
//! buffer counts. With it, records are due at even distances, and what is late counts from when it was due.

use anyhow::{Context, Result};
use headwater_client::{Client, Delivery, ProduceError, Producer, ProducerRecord};
use indicatif::ProgressBar;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::Latencies;
use super::data::Values;
use crate::args::BenchArgs;
use crate::os::Alarm;
use crate::outcomes::{Expect, Outcomes};

/// Records sent without giving the connection its turn.
const RECORDS_PER_TURN: u64 = 64;
/// Distance between two moments at which a paced sender wakes up at the earliest.
const TICK: Duration = Duration::from_micros(20);

/// One producer's share of a load.
#[derive(Clone)]
pub(super) struct Load {
    pub(super) topic: Arc<str>,
    pub(super) values: Values,
    /// The first record's number, and how far it is to this producer's next.
    pub(super) first: u64,
    pub(super) step: u64,
    pub(super) records: u64,
    /// Time between two records of this producer.
    pub(super) interval: Option<Duration>,
    pub(super) bar: ProgressBar,
}

/// What became of a load.
pub(super) struct Sent {
    /// When the first record was due.
    pub(super) began: Instant,
    /// When the last acknowledgement came.
    pub(super) ended: Instant,
    pub(super) latencies: Latencies,
}

impl Sent {
    /// What acknowledgements say of a load that began at a moment.
    fn of(began: Instant, acknowledged: Acknowledged) -> Sent {
        Sent { began, ended: acknowledged.last.unwrap_or(began).max(began), latencies: acknowledged.latencies }
    }

    /// Two loads that ran side by side, as one.
    pub(super) fn beside(mut self, other: Sent) -> Sent {
        self.latencies.add(&other.latencies);
        Sent { began: self.began.min(other.began), ended: self.ended.max(other.ended), latencies: self.latencies }
    }

    /// The clock of throughput: from the first send to the last acknowledgement, on the wall.
    pub(super) fn wall(&self) -> Duration {
        self.ended - self.began
    }
}

/// Acknowledgements, as they come.
struct Acknowledged {
    latencies: Latencies,
    last: Option<Instant>,
}

impl Acknowledged {
    fn new() -> Acknowledged {
        Acknowledged { latencies: Latencies::new(), last: None }
    }

    /// A record that was due at a moment is acknowledged now.
    fn at(&mut self, now: Instant, due: Instant) {
        self.latencies.record(now.saturating_duration_since(due));
        self.last = self.last.max(Some(now));
    }
}

/// A producer as the flags want it.
pub(super) async fn producer(client: &Client, args: &BenchArgs) -> Result<Producer> {
    let mut builder =
        client.producer().acks(args.acks.into()).compression(args.compression.into()).batch_bytes(args.batch_bytes());
    if let Some(linger) = args.linger {
        builder = builder.linger(linger);
    }
    builder.build().await.context("cannot start to produce")
}

impl Load {
    /// Sends all of it and waits for every acknowledgement; `begin` tells others when the first record was due.
    pub(super) async fn run(self, producer: &Producer, begin: &OnceLock<Instant>) -> Result<Sent> {
        // The first record waits for nothing that is not its own.
        producer.partitions(&self.topic).await.with_context(|| format!("cannot produce to topic {}", self.topic))?;
        let (expect, outcomes) = Outcomes::new();
        let collecting = tokio::spawn(collect(outcomes, self.bar.clone()));
        let began = *begin.get_or_init(Instant::now);
        let sent = match self.interval {
            None => self.at_once(producer, &expect).await,
            Some(interval) => self.paced(producer, &expect, began, interval).await,
        };
        drop(expect);
        producer.flush().await;
        let acknowledged = collecting.await.context("collecting acknowledgements failed")??;
        sent?;
        Ok(Sent::of(began, acknowledged))
    }

    fn record(&self, index: u64) -> ProducerRecord {
        ProducerRecord::new(self.topic.clone(), self.values.get(self.first + index * self.step))
    }

    async fn at_once(&self, producer: &Producer, expect: &Expect<Instant>) -> Result<()> {
        let mut under_way: Vec<(Instant, Delivery)> = Vec::new();
        for index in 0..self.records {
            let due = Instant::now();
            let delivery = match producer.try_send(self.record(index)) {
                Err((record, ProduceError::BufferFull | ProduceError::TopicPending { .. })) => {
                    let _ = expect.send(std::mem::take(&mut under_way));
                    producer.send(record).await?
                }
                sent => sent.map_err(|(_, error)| error)?,
            };
            under_way.push((due, delivery));
            if index % RECORDS_PER_TURN == 0 {
                let _ = expect.send(std::mem::take(&mut under_way));
                tokio::task::yield_now().await;
            }
        }
        let _ = expect.send(under_way);
        Ok(())
    }

    /// Sends each record when it is due, and those that are late as fast as it can.
    async fn paced(
        &self,
        producer: &Producer,
        expect: &Expect<Instant>,
        began: Instant,
        interval: Duration,
    ) -> Result<()> {
        let mut alarm = Alarm::new().context("cannot make a timer")?;
        for index in 0..self.records {
            let due = began + interval.mul_f64(index as f64);
            if due.saturating_duration_since(Instant::now()) > TICK {
                alarm.wait_until(due).await.context("cannot set a timer")?;
            } else if index % RECORDS_PER_TURN == 0 {
                tokio::task::yield_now().await;
            }
            let delivery = match producer.try_send(self.record(index)) {
                Err((record, ProduceError::BufferFull | ProduceError::TopicPending { .. })) => {
                    producer.send(record).await?
                }
                sent => sent.map_err(|(_, error)| error)?,
            };
            let _ = expect.send(vec![(due, delivery)]);
        }
        Ok(())
    }
}

/// Measures every acknowledgement as it arrives.
async fn collect(mut outcomes: Outcomes<Instant>, bar: ProgressBar) -> Result<Acknowledged> {
    let mut acknowledged = Acknowledged::new();
    let mut failure = None;
    poll_fn(|context| {
        let now = Instant::now();
        let mut count = 0;
        let done = outcomes.poll(context, |_, due, outcome| {
            count += 1;
            match outcome {
                Ok(_) => acknowledged.at(now, due),
                Err(error) => failure = failure.take().or(Some(error)),
            }
        });
        if count > 0 {
            bar.inc(count);
        }
        done
    })
    .await;
    match failure {
        Some(error) => Err(anyhow::Error::new(error).context("a record was not acknowledged")),
        None => Ok(acknowledged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Mode;
    use crate::commands::bench::Answer;

    /// Two producers, each acknowledged late and out of order: neither the sum of their times is the clock, nor the longer
    /// one's, nor the time that records took.
    #[test]
    fn throughput_is_by_the_wall_from_the_first_send_to_the_last_acknowledgement() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let load = |began, acknowledgements: &[(u64, u64)]| {
            let mut acknowledged = Acknowledged::new();
            acknowledgements.iter().for_each(|&(due, now)| acknowledged.at(at(now), at(due)));
            Sent::of(at(began), acknowledged)
        };
        let one = load(1_000, &[(1_000, 1_200), (2_500, 4_000), (1_500, 3_000)]);
        assert_eq!(one.wall(), Duration::from_secs(3));
        let other = load(2_000, &[(2_000, 6_000)]);
        assert_eq!(other.wall(), Duration::from_secs(4));
        for both in [load(1_000, &[(1_000, 4_000)]).beside(load(2_000, &[(2_000, 6_000)])), other.beside(one)] {
            assert_eq!((both.began, both.ended), (at(1_000), at(6_000)));
            assert_eq!(both.wall(), Duration::from_secs(5));
        }
        let none = load(1_000, &[]);
        assert_eq!(none.wall(), Duration::ZERO);
        let answer = Answer::new(Mode::Produce, 10, 20_000_000, Duration::from_secs(5));
        assert_eq!((answer.seconds, answer.records_per_s, answer.mb_per_s), (5.0, 2.0, 4.0));
    }
}
