//! When a replayed record is due. Pure: the caller holds the clock.
//!
//! Owns: `--speed` and `--rate`. The first record sets the origin: its timestamp is the moment at which the replay
//! begins, and a record that lies later by some span is due later by that span divided by the factor. A record that is
//! earlier than one before it is due at once. Refuses: sleeping, clocks, and the order of records
//! (`commands/replay.rs` decides that, and waits).

use anyhow::{Result, bail};
use std::str::FromStr;
use std::time::Duration;

/// How fast a stretch of history is replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Speed {
    /// Without regard to timestamps.
    Max,
    /// This many times as fast as the timestamps say; 1 is real time.
    Times(f64),
}

impl FromStr for Speed {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Speed> {
        match text {
            "max" => Ok(Speed::Max),
            "real" => Ok(Speed::Times(1.0)),
            _ => match text.strip_suffix('x').map(str::parse::<f64>) {
                Some(Ok(factor)) if factor.is_finite() && factor > 0.0 => Ok(Speed::Times(factor)),
                _ => bail!("expected max, real or a factor such as 10x or 0.5x"),
            },
        }
    }
}

/// Says when each record is due.
#[derive(Debug)]
pub(crate) struct Pacer {
    speed: Speed,
    bytes_per_second: Option<u64>,
    /// Timestamp of the first record and the moment it came.
    origin: Option<(i64, Duration)>,
    /// When the bytes so far are paid for at the rate.
    paid_at: Duration,
}

impl Pacer {
    /// A pacer; `bytes_per_second` bounds the rate whatever the speed.
    pub(crate) fn new(speed: Speed, bytes_per_second: Option<u64>) -> Pacer {
        Pacer { speed, bytes_per_second, origin: None, paid_at: Duration::ZERO }
    }

    /// Whether no record ever waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.speed == Speed::Max && self.bytes_per_second.is_none()
    }

    /// The moment at which a record of this timestamp and size is due, on the clock that `now` is read from. At or
    /// before `now`: at once. Counts the record as sent.
    pub(crate) fn due(&mut self, now: Duration, timestamp_ms: i64, bytes: usize) -> Duration {
        let by_time = match self.speed {
            Speed::Max => Duration::ZERO,
            Speed::Times(factor) => {
                let (first_ms, began) = *self.origin.get_or_insert((timestamp_ms, now));
                let after_ms = timestamp_ms.saturating_sub(first_ms).max(0);
                let after = Duration::try_from_secs_f64(after_ms as f64 / 1000.0 / factor).unwrap_or(Duration::MAX);
                began.saturating_add(after)
            }
        };
        let Some(rate) = self.bytes_per_second else { return by_time };
        // A pause earns no burst: what was not used is not saved up.
        let at = by_time.max(self.paid_at).max(now);
        let cost = Duration::try_from_secs_f64(bytes as f64 / rate as f64).unwrap_or(Duration::MAX);
        self.paid_at = at.saturating_add(cost);
        by_time.max(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Replays in virtual time: the clock jumps to each record's moment.
    fn play(mut pacer: Pacer, records: &[(i64, usize)]) -> Vec<Duration> {
        let mut now = ms(10_000);
        records
            .iter()
            .map(|&(timestamp, bytes)| {
                now = now.max(pacer.due(now, timestamp, bytes));
                now - ms(10_000)
            })
            .collect()
    }

    #[test]
    fn real_speed_keeps_the_spacing_of_a_week() {
        let hour: i64 = 3_600_000;
        let records: Vec<(i64, usize)> = (0..168).map(|n| (1_357_000_000_000 + n * hour, 100)).collect();
        let moments = play(Pacer::new(Speed::Times(1.0), None), &records);
        for (n, at) in moments.iter().enumerate() {
            assert_eq!(*at, Duration::from_secs(3600 * n as u64));
        }
    }

    #[test]
    fn a_factor_divides_the_spacing() {
        let records: Vec<(i64, usize)> = (0..6).map(|n| (n * 400, 1)).collect();
        assert_eq!(play(Pacer::new(Speed::Times(10.0), None), &records)[5], ms(200));
        assert_eq!(play(Pacer::new(Speed::Times(0.5), None), &records)[5], ms(4000));
    }

    #[test]
    fn late_records_come_at_once_and_delay_nothing() {
        let moments =
            play(Pacer::new(Speed::Times(1.0), None), &[(1000, 1), (3000, 1), (500, 1), (2500, 1), (4000, 1)]);
        assert_eq!(moments, [ms(0), ms(2000), ms(2000), ms(2000), ms(3000)]);
    }

    #[test]
    fn max_never_waits() {
        let mut pacer = Pacer::new(Speed::Max, None);
        assert!(pacer.is_idle());
        assert_eq!(pacer.due(ms(5), i64::MAX, 1 << 30), Duration::ZERO);
    }

    #[test]
    fn absurd_timestamps_do_not_overflow() {
        let mut pacer = Pacer::new(Speed::Times(1e-9), Some(1));
        pacer.due(ms(0), i64::MIN, 1);
        assert!(pacer.due(ms(0), i64::MAX, usize::MAX) > ms(1_000_000));
        assert!(pacer.due(Duration::MAX, 0, 1) == Duration::MAX);
    }

    #[test]
    fn a_rate_spreads_bytes_evenly() {
        let moments = play(Pacer::new(Speed::Max, Some(1000)), &[(0, 500), (0, 500), (0, 1000), (0, 1)]);
        assert_eq!(moments, [ms(0), ms(500), ms(1000), ms(2000)]);
    }

    #[test]
    fn a_pause_earns_no_burst() {
        let mut pacer = Pacer::new(Speed::Max, Some(1000));
        assert_eq!(pacer.due(ms(0), 0, 100), ms(0));
        assert_eq!(pacer.due(ms(10_000), 0, 100), ms(10_000));
        assert_eq!(pacer.due(ms(10_000), 0, 100), ms(10_100));
    }

    #[test]
    fn the_slower_of_speed_and_rate_decides() {
        let moments = play(Pacer::new(Speed::Times(1.0), Some(1000)), &[(0, 100), (50, 100), (1000, 100)]);
        assert_eq!(moments, [ms(0), ms(100), ms(1000)]);
    }

    #[test]
    fn speeds_are_read() {
        assert_eq!("real".parse::<Speed>().ok(), Some(Speed::Times(1.0)));
        assert_eq!("2.5x".parse::<Speed>().ok(), Some(Speed::Times(2.5)));
        for bad in ["", "x", "0x", "-1x", "infx", "nanx", "10"] {
            assert!(bad.parse::<Speed>().is_err(), "{bad}");
        }
    }
}
