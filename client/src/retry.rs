//! When to try again.
//!
//! Owns: [`Backoff`], pure (the random part is an argument), [`Deadline`], and waits as long as anybody may ask for.
//! Refuses: deciding what may be retried: errors say so themselves.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::ClientConfig;

/// As good as never: clocks end, and adding `Duration::MAX` to one is a panic.
pub(crate) const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// `wait` from `now` on; as good as never where a clock does not reach that far.
pub(crate) fn after(now: Instant, wait: Duration) -> Instant {
    now + wait.min(NEVER)
}

/// Waits until then; without end, if there is no then.
pub(crate) async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Growing pauses between attempts.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(config: &ClientConfig) -> Backoff {
        Backoff { first: config.retry_backoff, longest: config.retry_backoff_max, failures: 0 }
    }

    /// It worked: the next pause is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause before the next attempt: twice the last one up to the longest, of which up to a half is taken off, as
    /// `random` (0 to 1) says, so that many clients do not come back in step.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let doubled = self.first.saturating_mul(1u32.checked_shl(self.failures.min(20)).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.longest).min(NEVER).mul_f64(1.0 - random.clamp(0.0, 1.0) / 2.0)
    }

    /// Waits for the next pause.
    pub(crate) async fn pause(&mut self) {
        let pause = self.next(rand::random());
        tokio::time::sleep(pause).await;
    }
}

/// The end of a wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) after: Duration,
}

impl Deadline {
    pub(crate) fn within(after: Duration) -> Deadline {
        Deadline { at: self::after(Instant::now(), after), after }
    }

    pub(crate) fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub(crate) fn passed(&self) -> bool {
        self.left().is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wait_is_too_long_for_a_clock() {
        let now = Instant::now();
        assert!(after(now, Duration::MAX) > now + Duration::from_secs(1 << 29));
        assert_eq!(after(now, Duration::from_secs(5)), now + Duration::from_secs(5));
        assert!(!Deadline::within(Duration::MAX).passed());
        let config =
            ClientConfig { retry_backoff: Duration::MAX, retry_backoff_max: Duration::MAX, ..ClientConfig::default() };
        assert!(Backoff::new(&config).next(0.0) > Duration::from_secs(1 << 29));
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_jitter_only_shortens_them() {
        let config = ClientConfig::default();
        let mut backoff = Backoff::new(&config);
        let whole: Vec<u128> = (0..7).map(|_| backoff.next(0.0).as_millis()).collect();
        assert_eq!(whole, [50, 100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_millis(25));
        for _ in 0..100 {
            assert!(backoff.next(0.3) <= config.retry_backoff_max);
        }
    }
}
