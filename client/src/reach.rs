//! Reaching a broker, and what to say where nobody could be reached.
//!
//! Owns: the handshake with whoever is behind an address, at all places that its name has; which of several failures is
//! told. Refuses: which addresses there are, when to try again, and hello (see [`crate::connection`]).

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use quinn::ConnectionError;
use tokio::time::{Instant, timeout_at};

use crate::error::Error;
use crate::retry::Deadline;

/// Connects to whoever answers first of those behind `address`, and is `name` by its certificate.
pub(crate) async fn reach(
    endpoint: &quinn::Endpoint,
    tls: &quinn::ClientConfig,
    name: &str,
    address: &str,
    deadline: Deadline,
) -> Result<quinn::Connection, Error> {
    let began = Instant::now();
    let failed = |reason: String| Error::Connect { address: address.into(), reason };
    let unresolved = |_| failed(format!("the name was not resolved within {:?}", deadline.after));
    let found = timeout_at(deadline.at, tokio::net::lookup_host(address)).await.map_err(unresolved)?;
    let attempts = found.map_err(|e| failed(e.to_string()))?.map(|to| {
        let attempt = endpoint.connect_with(tls.clone(), to, name);
        async move {
            let connecting = attempt.map_err(|e| Some(failed(e.to_string())))?;
            connecting.await.map_err(|error| match &error {
                ConnectionError::TimedOut => None,
                error if tls_failed(error) => {
                    Some(Error::Untrusted { address: address.into(), reason: error.to_string() })
                }
                error => Some(failed(error.to_string())),
            })
        }
    });
    let attempts: Vec<_> = attempts.collect();
    if attempts.is_empty() {
        return Err(failed("the name has no address".into()));
    }
    let silent = || failed(format!("no answer within {:?}", in_ms(began.elapsed().min(deadline.after))));
    first_of(attempts, deadline).await.map_err(|told| told.unwrap_or_else(silent))
}

/// What became of an address, as far as is known before the attempts have ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tried {
    /// When the attempt began that runs now.
    pub(crate) since: Option<Instant>,
    /// What the last attempt that ended said.
    pub(crate) failed: Option<Error>,
}

impl Tried {
    /// What to say to somebody whose time is up.
    pub(crate) fn tell(&self, address: &str, deadline: Deadline) -> Error {
        let reason = match (&self.failed, self.since) {
            (Some(error), _) => return error.clone(),
            (None, Some(since)) => {
                format!("no answer so far, after {:?}", in_ms(deadline.at.saturating_duration_since(since)))
            }
            (None, None) => format!("not tried yet when {:?} were over", deadline.after),
        };
        Error::Connect { address: address.into(), reason }
    }
}

/// As exact as a person wants it.
fn in_ms(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// The first of `attempts` to succeed.
///
/// # Errors
/// When all failed, or the time is up: the most telling of what they said. `None`: they were silent.
async fn first_of<T>(
    attempts: impl IntoIterator<Item = impl Future<Output = Result<T, Option<Error>>>>,
    deadline: Deadline,
) -> Result<T, Option<Error>> {
    let mut attempts: FuturesUnordered<_> = attempts.into_iter().collect();
    let mut told = Vec::new();
    // One that is silent must not hide what another one said.
    while let Ok(Some(outcome)) = timeout_at(deadline.at, attempts.next()).await {
        match outcome {
            Ok(done) => return Ok(done),
            Err(error) => told.extend(error),
        }
    }
    Err(most_telling(told))
}

/// A certificate that is not trusted says more than a refusal, and that more than nobody there.
fn most_telling(errors: impl IntoIterator<Item = Error>) -> Option<Error> {
    errors.into_iter().max_by_key(|error| match error {
        Error::Untrusted { .. } => 3,
        Error::Config(_) | Error::Refused(_) | Error::Protocol(_) | Error::Closed => 2,
        Error::ConnectionLost { .. } | Error::Connect { .. } => 1,
        Error::TimedOut { .. } => 0,
    })
}

/// One error for what became of the attempts to reach several addresses: the most telling; where another attempt may help
/// at one of them and not at another, all of it, and that trying again may help.
pub(crate) fn sum_up(mut failures: Vec<(&str, Error)>) -> Error {
    let passing = failures.iter().filter(|(_, error)| error.retryable()).count();
    if passing > 0 && failures.len() > 1 {
        // Sorted: whoever reads only the beginning reads what says most.
        failures.sort_by_key(|(_, error)| error.retryable());
        let reason = |(address, error): &(&str, Error)| match error {
            Error::Connect { reason, .. } => format!("{address}: {reason}"),
            Error::Untrusted { reason, .. } => format!("{address}: no secure connection: {reason}"),
            error => format!("{address}: {error}"),
        };
        let reasons: Vec<String> = failures.iter().map(reason).collect();
        let addresses: Vec<&str> = failures.iter().map(|(address, _)| *address).collect();
        return Error::Connect { address: addresses.join(", "), reason: reasons.join("; ") };
    }
    most_telling(failures.into_iter().map(|(_, error)| error)).unwrap_or(Error::Closed)
}

/// Whether TLS, here or there, ended the handshake (QUIC carries its alerts as errors 0x100 to 0x1ff).
pub(crate) fn tls_failed(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    (0x100..0x200).contains(&u64::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use headwater_proto::ErrorCode;

    fn silent(address: &str) -> Error {
        Error::Connect { address: address.into(), reason: "no answer within 3s".into() }
    }

    fn untrusted(address: &str) -> Error {
        Error::Untrusted { address: address.into(), reason: "invalid peer certificate: UnknownIssuer".into() }
    }

    #[tokio::test]
    async fn an_address_that_is_silent_hides_nothing_of_what_another_one_of_the_name_says() {
        let soon = || Deadline::within(Duration::from_millis(20));
        let attempt = |outcome: Option<Error>| match outcome {
            Some(error) => std::future::ready(Err::<(), _>(Some(error))).boxed(),
            None => std::future::pending().boxed(),
        };
        // `localhost` is ::1, where nobody is, and 127.0.0.1, where somebody else is.
        let told = first_of([attempt(Some(untrusted("localhost:1"))), attempt(None)], soon()).await.unwrap_err();
        assert!(matches!(told, Some(Error::Untrusted { .. })), "{told:?}");
        for refused_first in [true, false] {
            let mut outcomes = [attempt(Some(silent("localhost:1"))), attempt(Some(untrusted("localhost:1")))];
            if !refused_first {
                outcomes.reverse();
            }
            let told = first_of(outcomes, soon()).await.unwrap_err();
            assert!(matches!(told, Some(Error::Untrusted { .. })), "{told:?}");
        }
        assert!(first_of([attempt(None), attempt(None)], soon()).await.unwrap_err().is_none());
        let good = std::future::ready(Ok(())).boxed();
        assert!(first_of([attempt(Some(untrusted("localhost:1"))), good], soon()).await.is_ok());
    }

    #[test]
    fn an_address_is_said_to_be_silent_only_if_it_was_tried_and_for_as_long_as_it_was() {
        let deadline = Deadline::within(Duration::from_secs(10));
        let tell = |tried: Tried| tried.tell("a:1", deadline).to_string();
        let since = Some(deadline.at - Duration::from_micros(1_234_567));
        assert!(tell(Tried::default()).contains("a:1: not tried yet when 10s were over"));
        assert!(tell(Tried { since, failed: None }).contains("a:1: no answer so far, after 1.234s"));
        for since in [None, since] {
            assert!(tell(Tried { since, failed: Some(silent("a:1")) }).contains("a:1: no answer within 3s"));
        }
    }

    #[test]
    fn of_several_brokers_every_one_is_told_of_and_one_that_may_come_back_is_waited_for() {
        let one = sum_up(vec![("a:1", untrusted("a:1"))]);
        assert!(matches!(one, Error::Untrusted { .. }), "{one}");
        for failures in [
            vec![("a:1", untrusted("a:1")), ("b:1", silent("b:1"))],
            vec![("b:1", silent("b:1")), ("a:1", untrusted("a:1"))],
        ] {
            let both = sum_up(failures);
            assert!(both.retryable(), "b may be starting: {both}");
            let text = both.to_string();
            assert!(
                text.contains("a:1: no secure connection: invalid peer") && text.contains("b:1: no answer"),
                "{text}"
            );
        }
        let version = Error::refused(ErrorCode::UnsupportedVersion, "of another time");
        let neither = sum_up(vec![("a:1", untrusted("a:1")), ("b:1", version)]);
        assert!(matches!(neither, Error::Untrusted { .. }), "{neither}");
    }
}
