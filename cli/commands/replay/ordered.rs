//! The records of several partitions in one row, each when it is due.
//!
//! Of the records at the heads of the partitions the one with the smallest timestamp goes next, so that those of a
//! partition stay in order. The clock is the runtime's: in a test it jumps from one moment to the next. Owns: that order,
//! and the waiting. Refuses: deciding when a record is due ([`crate::pace`]) and holding more than one record of a
//! partition. Read next: `replay/sink.rs`.

use anyhow::Result;
use futures::{Stream, StreamExt};
use headwater_client::ConsumedRecord;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;
use tokio::time::Instant;

use super::sink::size;
use crate::pace::Pacer;

/// What comes next.
#[derive(Debug)]
pub(super) enum Step {
    /// A record that is due.
    Due(ConsumedRecord),
    /// Nothing for a while: whatever was kept together goes out now.
    Pause,
}

/// Gives every record of `readers` to `pass_on` when it is due; ends early when that answers `false`.
pub(super) async fn ordered<R>(
    mut readers: Vec<R>,
    pacer: &mut Pacer,
    began: Instant,
    mut pass_on: impl AsyncFnMut(Step) -> Result<bool>,
) -> Result<()>
where
    R: Stream<Item = Result<ConsumedRecord>> + Unpin,
{
    let mut heads: Vec<Option<ConsumedRecord>> = Vec::new();
    let mut row = BinaryHeap::new();
    for reader in &mut readers {
        let head = reader.next().await.transpose()?;
        if let Some(record) = &head {
            row.push(Reverse((record.timestamp_ms, heads.len())));
        }
        heads.push(head);
    }
    while let Some(Reverse((_, index))) = row.pop() {
        let (Some(reader), Some(head)) = (readers.get_mut(index), heads.get_mut(index)) else { continue };
        let Some(record) = head.take() else { continue };
        let due = pacer.due(began.elapsed(), record.timestamp_ms, size(&record));
        if due > began.elapsed() {
            if !pass_on(Step::Pause).await? {
                return Ok(());
            }
            wait_for(began, due).await;
        }
        if !pass_on(Step::Due(record)).await? {
            return Ok(());
        }
        let mut next = pin!(reader.next());
        let ready = std::future::poll_fn(|context| match next.as_mut().poll(context) {
            Poll::Ready(next) => Poll::Ready(Some(next)),
            Poll::Pending => Poll::Ready(None),
        });
        let next = match ready.await {
            Some(next) => next,
            None if pass_on(Step::Pause).await? => next.await,
            None => return Ok(()),
        };
        if let Some(record) = next.transpose()? {
            row.push(Reverse((record.timestamp_ms, index)));
            *head = Some(record);
        }
    }
    pass_on(Step::Pause).await.map(|_| ())
}

/// Waits for a moment, counted from `began`. One that no clock reaches is waited for until somebody asks this to end.
pub(super) async fn wait_for(began: Instant, due: Duration) {
    match began.checked_add(due) {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use crate::commands::replay::{filter, kept, stretch};
    use crate::pace::Speed;
    use crate::spec::Start;
    use headwater_client::{PartitionDescription, TimestampType};
    use indicatif::ProgressBar;

    /// 2013-01-01T00:00:00Z.
    const NEW_YEAR_MS: i64 = 1_356_998_400_000;

    fn record(partition: u32, offset: i64, timestamp_ms: i64) -> ConsumedRecord {
        ConsumedRecord {
            topic: "t".into(),
            partition,
            offset,
            timestamp_ms,
            timestamp_type: TimestampType::Create,
            key: None,
            value: Some(bytes::Bytes::from(format!("{partition}-{offset}"))),
            headers: Vec::new(),
            leader_epoch: 0,
        }
    }

    /// A week of records in three partitions: 7, 11 and 13 minutes apart, every tenth of them late by up to an hour.
    fn week() -> Vec<Vec<ConsumedRecord>> {
        let minutes = 7 * 24 * 60;
        [7, 11, 13]
            .into_iter()
            .enumerate()
            .map(|(partition, step)| {
                let of = (0..minutes / step).map(|n| {
                    let late = if n % 10 == 9 { n % 60 } else { 0 };
                    record(partition as u32, n, NEW_YEAR_MS + (n * step - late) * 60_000 + n % 7)
                });
                of.collect()
            })
            .collect()
    }

    /// Replays partitions on the runtime's clock; each record with the moment it came at.
    async fn replay(partitions: &[Vec<ConsumedRecord>], speed: Speed) -> Vec<(Duration, ConsumedRecord)> {
        let readers = partitions.iter().map(|records| futures::stream::iter(records.clone().into_iter().map(Ok)));
        play(readers.collect(), speed).await
    }

    async fn play<R>(readers: Vec<R>, speed: Speed) -> Vec<(Duration, ConsumedRecord)>
    where
        R: Stream<Item = Result<ConsumedRecord>> + Unpin,
    {
        let (began, mut came) = (Instant::now(), Vec::new());
        let take = async |step| {
            if let Step::Due(record) = step {
                came.push((began.elapsed(), record));
            }
            Ok(true)
        };
        ordered(readers, &mut Pacer::new(speed, None), began, take).await.expect("a replay");
        came
    }

    /// What `headwater replay t ...` takes of these partitions, on the runtime's clock. The broker is the test: it knows the
    /// first offset at or after a time, and the ends.
    async fn replay_as_told(partitions: &[Vec<ConsumedRecord>], flags: &str) -> Vec<(Duration, ConsumedRecord)> {
        let line = ["headwater", "replay", "t"].into_iter().chain(flags.split_whitespace());
        let Command::Replay(args) = Cli::read(line, |_| None).expect("a replay").command else { panic!("no replay") };
        let (wanted, bar) = (filter(&args), ProgressBar::hidden());
        let mut readers = Vec::new();
        for (partition, records) in (0..).zip(partitions) {
            let start = match args.from {
                Start::Offset(offset) => Some(offset),
                Start::Time(ms) => records.iter().find(|record| record.timestamp_ms >= ms).map(|record| record.offset),
                other => panic!("{other:?} is tried elsewhere"),
            };
            let end = records.len() as i64;
            let described = PartitionDescription {
                partition,
                leader: 1,
                leader_epoch: 0,
                replicas: vec![1],
                isr: vec![1],
                log_start_offset: 0,
                high_watermark: end,
                log_end_offset: end,
                size_bytes: 0,
                fenced: None,
            };
            let Some(stretch) = start.and_then(|start| stretch(&described, start, args.until)) else { continue };
            let read = records.iter().filter(|record| (stretch.start..stretch.end).contains(&record.offset)).cloned();
            let read: Vec<_> = read.map(Ok).collect();
            readers.push(Box::pin(kept(futures::stream::iter(read), &wanted, &bar)));
        }
        play(readers, args.speed).await
    }

    /// Each record is due as long after the first one as it is younger, and one that is late comes at once.
    fn check_spacing(came: &[(Duration, ConsumedRecord)]) {
        let mut latest = came.first().expect("records").1.timestamp_ms;
        let first = latest;
        for (at, record) in came {
            latest = latest.max(record.timestamp_ms);
            let due = Duration::from_millis(u64::try_from(latest - first).expect("after the first"));
            assert_eq!(*at, due, "{}-{}: due with its timestamp, or at once if late", record.partition, record.offset);
        }
    }

    fn of(came: &[(Duration, ConsumedRecord)], partition: u32) -> Vec<ConsumedRecord> {
        came.iter().map(|(_, record)| record).filter(|record| record.partition == partition).cloned().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_week_at_real_speed_is_the_input_with_its_spacing() {
        let input = week();
        let came = replay(&input, Speed::Times(1.0)).await;
        for (partition, records) in input.iter().enumerate() {
            assert_eq!(&of(&came, partition as u32), records);
        }
        assert_eq!(came[0].1.timestamp_ms, NEW_YEAR_MS);
        check_spacing(&came);
        assert!(came.last().is_some_and(|(at, _)| *at > Duration::from_secs(6 * 86_400)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_of_offsets_or_of_time_at_real_speed_is_that_part_of_the_input_with_its_spacing() {
        let input = week();
        let day = |n: i64| NEW_YEAR_MS + n * 86_400_000;
        let (all, ever) = (0..i64::MAX, i64::MIN..i64::MAX);
        for (flags, offsets, times, days) in [
            ("--from offset:100 --until offset:700", 100..700, ever.clone(), 5),
            (
                "--from time:2013-01-03T00:00:00Z --until time:2013-01-05T12:00:00Z",
                all.clone(),
                day(2)..day(4) + 43_200_000,
                2,
            ),
            ("--from offset:300 --until time:2013-01-04", 300..i64::MAX, i64::MIN..day(3), 1),
            ("--from time:2013-01-02 --until offset:500", 0..500, day(1)..i64::MAX, 3),
        ] {
            let came = replay_as_told(&input, &format!("{flags} --speed real")).await;
            for (partition, records) in input.iter().enumerate() {
                let wanted = records.iter().filter(|r| offsets.contains(&r.offset) && times.contains(&r.timestamp_ms));
                assert_eq!(of(&came, partition as u32), wanted.cloned().collect::<Vec<_>>(), "{flags}");
            }
            check_spacing(&came);
            let took = came.last().expect("records").0;
            assert_eq!(took.as_secs() / 86_400, days, "{flags}: {took:?}");
        }
        // Late ones lie among records of another time: what was taken by time is no stretch of offsets.
        let came = replay_as_told(&input, "--from time:2013-01-03 --until time:2013-01-04 --speed real").await;
        let one: Vec<i64> = of(&came, 0).iter().map(|record| record.offset).collect();
        assert!(one.windows(2).any(|pair| pair[1] > pair[0] + 1), "{one:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_faster_week_has_its_spacing_divided_and_its_order_kept() {
        let input = week();
        let (real, fast) = (replay(&input, Speed::Times(1.0)).await, replay(&input, Speed::Times(60.0)).await);
        assert_eq!(real.len(), fast.len());
        for ((slow, one), (quick, other)) in real.iter().zip(&fast) {
            assert_eq!(one, other);
            // A timer of the runtime is as fine as a millisecond.
            assert!(quick.abs_diff(*slow / 60) <= Duration::from_millis(1), "{quick:?} for {slow:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_together_goes_out_before_anything_is_waited_for() {
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        let reader = Box::pin(futures::stream::unfold(receive, async |mut receive| {
            receive.recv().await.map(|record| (Ok::<_, anyhow::Error>(record), receive))
        }));
        let feed = async {
            send.send(record(0, 0, 0)).expect("somebody reads");
            tokio::time::sleep(Duration::from_secs(5)).await;
            send.send(record(0, 1, 0)).expect("somebody reads");
            send.send(record(0, 2, 60_000)).expect("somebody reads");
            drop(send);
        };
        let (began, mut kept, mut out) = (Instant::now(), Vec::new(), Vec::new());
        let pass_on = async |step| {
            match step {
                Step::Due(record) => kept.push(record.offset),
                Step::Pause => out.extend(kept.drain(..).map(|offset| (offset, began.elapsed().as_secs()))),
            }
            Ok(true)
        };
        let mut pacer = Pacer::new(Speed::Times(1.0), None);
        let (replayed, ()) = tokio::join!(ordered(vec![reader], &mut pacer, began, pass_on), feed);
        replayed.expect("a replay");
        assert_eq!(out, [(0, 0), (1, 5), (2, 60)], "before a slow fetch, before a pause, and at the end");
    }
}
