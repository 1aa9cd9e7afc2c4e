//! Connections to brokers: one for control to whoever answers, one more for control to each broker that is asked for by its id,
//! and as many for data as streams and credit need.
//!
//! Owns: connecting (brokers that were named or heard of, deadlines, backoff), hello, the limits that hello states, calls.
//! Refuses: what calls and streams carry, and the handshake (see [`crate::reach`]). Read next: [`crate::metadata`], then `producer` and `consumer`.
//!
//! What must always hold, for a data connection: its long streams are at most as many as hello allows, and the fetch
//! credit its streams have outstanding is at most what hello allows and below the receive window.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, Shared};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use headwater_proto::limits::PROTOCOL_VERSION;
use headwater_proto::wire::{self, call, call_response::Response, open};
use headwater_proto::{ErrorCode, ResetCode};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config::{ClientConfig, ClientIdentity, ConfigError, host_of};
use crate::error::Error;
use crate::quic;
use crate::reach::{Tried, reach, sum_up, tls_failed};
use crate::retry::{Backoff, Deadline};
use crate::stream::{FrameReader, write_message};

/// Streams of a data connection kept free for calls.
const STREAMS_IN_RESERVE: u32 = 16;
/// Time for an answer to arrive that a broker gives at the last moment; a tenth of the time there is, where that is less.
const ON_THE_WAY: Duration = Duration::from_secs(1);
/// A single attempt to reach one address gives up after this long; the whole of connecting has its own time.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// The next address is tried when the one before has said nothing for so long.
const STAGGER: Duration = Duration::from_millis(200);
/// Time for brokers to hear that a connection ends.
const GOODBYE: Duration = Duration::from_millis(250);
/// A connection that lived for longer than this was a good one: the next attempt begins at once.
const GOOD_CONNECTION: Duration = Duration::from_secs(1);
/// Send window beyond the broker's produce credit, for frame headers.
const SEND_SLACK_BYTES: u64 = 8 << 20;

/// Taking a lock that only a panic elsewhere can have poisoned; what it guards is whole between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection after hello.
pub(crate) struct Link {
    connection: quinn::Connection,
    address: Arc<str>,
    since: Instant,
    pub(crate) broker_id: i32,
    pub(crate) cluster_id: String,
    pub(crate) software: String,
    /// Which start of the broker it is; empty: it does not say.
    incarnation: Bytes,
    features: Vec<String>,
    /// The broker is gone or stands still, as far as is known: what is on its way may still come, and nothing new is begun here.
    left: CancellationToken,
    streams: Arc<Semaphore>,
    credit: Mutex<CreditPool>,
}

impl Link {
    pub(crate) fn address(&self) -> &Arc<str> {
        &self.address
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.connection.close_reason().is_none() && !self.left.is_cancelled()
    }

    /// Whether the broker's hello named a feature.
    pub(crate) fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|had| had == feature)
    }

    /// Waits until nothing new is begun on the connection.
    pub(crate) async fn left(&self) {
        self.left.cancelled().await;
    }

    /// Waits until the connection is of no more use.
    pub(crate) async fn ended(&self) {
        let _ = self.left.run_until_cancelled(self.connection.closed()).await;
    }

    /// How much was heard from the broker so far: it changes as long as the broker acknowledges what it is sent.
    pub(crate) fn heard(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    /// Opens a stream and says what it is for. Waits where the broker allows no more streams at this moment.
    pub(crate) async fn open(&self, stream: open::Stream) -> Result<(SendStream, RecvStream), Error> {
        let (mut send, recv) = self.connection.open_bi().await.map_err(|e| self.lost(&e))?;
        write_message(&mut send, &wire::Open { stream: Some(stream) }, &self.address).await?;
        Ok((send, recv))
    }

    /// One request, one answer.
    pub(crate) async fn call(
        &self,
        what: &'static str,
        request: call::Request,
        deadline: Deadline,
    ) -> Result<Response, Error> {
        self.call_as(what, request, bytes::Bytes::new(), deadline).await
    }

    /// As [`call`](Self::call), under an id: what was asked for under the same one before is answered, and not done again.
    pub(crate) async fn call_as(
        &self,
        what: &'static str,
        request: call::Request,
        command_id: bytes::Bytes,
        deadline: Deadline,
    ) -> Result<Response, Error> {
        // The broker is done a little sooner: why it has no answer is to arrive in time.
        let left = deadline.left();
        let told = left.saturating_sub((left / 10).min(ON_THE_WAY));
        let timeout_ms = u32::try_from(told.as_millis()).unwrap_or(u32::MAX).max(1);
        let exchange = async {
            let call = wire::Call { timeout_ms, command_id, request: Some(request) };
            let (mut send, recv) = self.open(open::Stream::Call(call)).await?;
            // The broker may have answered and stopped the stream already.
            let _ = send.finish();
            let answer = FrameReader::<wire::CallResponse>::new(recv, self.address.clone()).message().await?;
            match answer.ok_or_else(|| self.lost(&"the stream ended without an answer"))?.response {
                Some(Response::Error(error)) => Err(Error::Refused(error.into())),
                Some(response) => Ok(response),
                None => Err(Error::Protocol(format!("an answer to {what} that this client does not know"))),
            }
        };
        match timeout_at(deadline.at, exchange).await {
            Ok(result) => result,
            Err(_) => Err(Error::TimedOut { what, after: deadline.after }),
        }
    }

    /// Room for one more long stream, with up to `want` bytes of fetch credit of its own, or `None` if there is none.
    fn lease(self: &Arc<Self>, want: u64) -> Option<Lease> {
        let stream = self.streams.clone().try_acquire_owned().ok()?;
        let credit = if want == 0 { 0 } else { lock(&self.credit).reserve(want)? };
        Some(Lease { link: self.clone(), credit, _stream: stream })
    }

    fn lost(&self, reason: &dyn std::fmt::Display) -> Error {
        Error::ConnectionLost { address: self.address.to_string(), reason: reason.to_string() }
    }

    fn close(&self) {
        self.connection.close(VarInt::from_u32(ResetCode::Done.number()), b"client closed");
    }
}

/// A long stream's place on a connection. Dropping it gives stream and credit back.
pub(crate) struct Lease {
    pub(crate) link: Arc<Link>,
    /// Bytes of fetch credit that the stream may have outstanding.
    pub(crate) credit: u64,
    _stream: OwnedSemaphorePermit,
}

impl Lease {
    /// Takes `want` bytes of credit instead, or as much of it as the connection has left. Less than what the stream has
    /// outstanding would be too little.
    pub(crate) fn resize(&mut self, want: u64) {
        let mut pool = lock(&self.link.credit);
        if want < self.credit {
            pool.release(self.credit - want);
            self.credit = want;
        } else {
            self.credit += pool.extend(want - self.credit);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.link.credit).release(self.credit);
    }
}

/// The fetch credit of one connection, shared out among its streams when they open.
#[derive(Debug)]
struct CreditPool {
    limit: u64,
    reserved: u64,
}

impl CreditPool {
    /// The smallest share worth having, if more was wanted: below it another connection serves better.
    const SMALLEST_SHARE: u64 = 64 << 10;

    /// Takes up to `want` bytes. `None`: so little is left that another connection should be used.
    fn reserve(&mut self, want: u64) -> Option<u64> {
        let share = want.min(self.limit - self.reserved);
        if share < want.min(Self::SMALLEST_SHARE) && self.reserved > 0 || share == 0 {
            return None;
        }
        self.reserved += share;
        Some(share)
    }

    /// Takes up to `more` in addition.
    fn extend(&mut self, more: u64) -> u64 {
        let more = more.min(self.limit - self.reserved);
        self.reserved += more;
        more
    }

    fn release(&mut self, share: u64) {
        self.reserved -= share;
    }
}

type Attempt = Shared<BoxFuture<'static, Result<Arc<Link>, Error>>>;

/// A place for one connection: at most one attempt to connect runs at a time, and everybody waits for that one.
struct Slot {
    role: wire::ConnectionRole,
    state: Mutex<(Option<Attempt>, Backoff)>,
}

impl Slot {
    fn new(role: wire::ConnectionRole, config: &ClientConfig) -> Arc<Slot> {
        Arc::new(Slot { role, state: Mutex::new((None, Backoff::new(config))) })
    }

    /// The living connection, or the outcome of the attempt that runs now; a new attempt first waits out the backoff.
    async fn get(&self, connections: &Arc<Connections>, addresses: Vec<String>) -> Result<Arc<Link>, Error> {
        let attempt = {
            let mut state = lock(&self.state);
            let (attempt, backoff) = &mut *state;
            let pause = match attempt {
                Some(running) => match running.peek() {
                    None => Err(running.clone()),
                    Some(Ok(link)) if link.is_alive() => return Ok(link.clone()),
                    Some(Ok(link)) if link.since.elapsed() > GOOD_CONNECTION => {
                        backoff.reset();
                        Ok(Duration::ZERO)
                    }
                    Some(_) => Ok(backoff.next(rand::random())),
                },
                None => Ok(Duration::ZERO),
            };
            pause.map_or_else(
                |running| running,
                |pause| attempt.insert(connections.begin(self.role, addresses, pause)).clone(),
            )
        };
        attempt.await
    }

    /// The living connection, if there is one now.
    fn current(&self) -> Option<Arc<Link>> {
        let state = lock(&self.state);
        state.0.as_ref()?.peek()?.as_ref().ok().cloned()
    }
}

/// What connections are made with.
struct Shown {
    tls: quinn::ClientConfig,
    identity: Option<ClientIdentity>,
    /// Why the files were of no use when they were read last.
    told: Option<String>,
}

/// All connections of a client.
pub(crate) struct Connections {
    pub(crate) config: ClientConfig,
    endpoint: quinn::Endpoint,
    shown: Mutex<Shown>,
    /// To whoever answers.
    control: Arc<Slot>,
    /// To one broker each.
    controls: Mutex<HashMap<i32, Arc<Slot>>>,
    data: Mutex<HashMap<i32, Vec<Arc<Slot>>>>,
    known: Mutex<Known>,
}

/// What is known of the cluster.
#[derive(Default)]
struct Known {
    cluster_id: String,
    /// Where a broker was reached.
    reached: HashMap<i32, String>,
    /// Where it says it is.
    advertised: HashMap<i32, String>,
    /// What became of each address since the last control connection was made.
    tried: HashMap<String, Tried>,
    /// Addresses where nobody answered last, or whoever did was of no use: they are tried after the others, the last of them last.
    silent: Vec<String>,
    closed: bool,
}

impl Known {
    fn put_last(&mut self, address: &str) {
        self.speaks(address);
        self.silent.push(address.to_owned());
    }

    fn speaks(&mut self, address: &str) {
        self.silent.retain(|silent| silent != address);
    }
}

impl Connections {
    pub(crate) fn new(config: ClientConfig) -> Result<Arc<Connections>, Error> {
        config.check()?;
        let tls = quic::client_config(&config.ca_pem, config.identity.as_ref(), config.mtu)?;
        let endpoint = quic::client_endpoint(config.mtu).map_err(|e| Error::Connect {
            address: config.bootstrap.join(", "),
            reason: format!("no UDP socket: {e}"),
        })?;
        let control = Slot::new(wire::ConnectionRole::Control, &config);
        let (controls, data, known) = (Mutex::default(), Mutex::default(), Mutex::default());
        let shown = Mutex::new(Shown { tls, identity: config.identity.clone(), told: None });
        Ok(Arc::new(Connections { config, endpoint, shown, control, controls, data, known }))
    }

    /// What the next connection is made with. Where the client's certificate comes from files, what stands in them now; what was in use
    /// stays so while they are of no use.
    async fn tls(&self) -> quinn::ClientConfig {
        if let Some(files) = self.config.identity.as_ref().and_then(|identity| identity.files.clone()) {
            let certificate = files.certificate.clone();
            let read = tokio::task::spawn_blocking(move || files.read()).await;
            // An error means that the runtime ends.
            if let Ok(read) = read
                && let Err(error) = read.and_then(|identity| self.show(identity))
            {
                let why = error.to_string();
                let told = lock(&self.shown).told.replace(why.clone());
                if told.is_none_or(|told| told != why) {
                    let certificate = certificate.display();
                    tracing::warn!(%certificate, why, "the client's certificate is not renewed; that from before is shown");
                }
            }
        }
        lock(&self.shown).tls.clone()
    }

    /// Shows this from the next connection on, unless it is what is shown.
    fn show(&self, identity: ClientIdentity) -> Result<(), ConfigError> {
        let is_shown = |shown: &ClientIdentity| {
            (&shown.certificate_pem, &shown.key_pem) == (&identity.certificate_pem, &identity.key_pem)
        };
        let mut shown = lock(&self.shown);
        if !shown.identity.as_ref().is_some_and(is_shown) {
            shown.tls = quic::client_config(&self.config.ca_pem, Some(&identity), self.config.mtu)?;
            shown.identity = Some(identity);
        }
        shown.told = None;
        Ok(())
    }

    /// The connection for calls and membership.
    pub(crate) async fn control(self: &Arc<Self>) -> Result<Arc<Link>, Error> {
        self.control.get(self, self.control_addresses()).await
    }

    /// Where a control connection may lead: to the brokers that were named, then to those that were heard of. Any of them
    /// will do, if it is of this cluster; hello sees to that.
    fn control_addresses(&self) -> Vec<String> {
        let known = lock(&self.known);
        let mut heard_of: Vec<&String> = known.reached.values().chain(known.advertised.values()).collect();
        heard_of.sort();
        let mut addresses = self.config.bootstrap.clone();
        for address in heard_of {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        // In their order otherwise.
        addresses.sort_by_key(|address| {
            known.silent.iter().position(|silent| silent == address).map_or(0, |place| place + 1)
        });
        addresses
    }

    /// The broker at the other end is silent: nothing new is begun with it on the connections there are.
    pub(crate) fn leave(&self, link: &Link) {
        lock(&self.known).put_last(&link.address);
        link.left.cancel();
        self.links_to(link.broker_id).iter().for_each(|other| other.left.cancel());
    }

    /// Somebody refused a call. A broker that is cut off from the others is left for one that is not.
    pub(crate) fn refused(&self, link: &Link, error: &Error) {
        if error.code() == Some(ErrorCode::OutOfTouch) {
            tracing::debug!(address = &*link.address, "the broker is cut off from the others: another one is asked");
            self.leave(link);
        }
    }

    /// The connections to a broker, but for that to whoever answered.
    fn links_to(&self, broker_id: i32) -> Vec<Arc<Link>> {
        let mut slots = lock(&self.data).get(&broker_id).cloned().unwrap_or_default();
        slots.extend(lock(&self.controls).get(&broker_id).cloned());
        slots.iter().filter_map(|slot| slot.current()).filter(|link| link.broker_id == broker_id).collect()
    }

    /// Waits for the control connection, trying again until `deadline`.
    pub(crate) async fn control_by(self: &Arc<Self>, deadline: Deadline) -> Result<Arc<Link>, Error> {
        loop {
            match timeout_at(deadline.at, self.control()).await {
                Ok(Err(error)) if error.retryable() && !deadline.passed() => {}
                Ok(result) => return result,
                Err(_) => return Err(self.what_failed(deadline)),
            }
        }
    }

    /// Why there is no control connection, as far as is known before all attempts have ended.
    fn what_failed(&self, deadline: Deadline) -> Error {
        let addresses = self.control_addresses();
        let known = lock(&self.known);
        let failure = |address| known.tried.get(address).cloned().unwrap_or_default().tell(address, deadline);
        sum_up(addresses.iter().map(|address| (&**address, failure(address))).collect())
    }

    /// The connection for calls to `broker_id`, and for membership there.
    pub(crate) async fn control_at(self: &Arc<Self>, broker_id: i32) -> Result<Arc<Link>, Error> {
        if let Some(link) = self.control.current().filter(|link| link.broker_id == broker_id && link.is_alive()) {
            return Ok(link);
        }
        let slot = {
            let mut controls = lock(&self.controls);
            let new = || Slot::new(wire::ConnectionRole::Control, &self.config);
            controls.entry(broker_id).or_insert_with(new).clone()
        };
        let link = slot.get(self, self.addresses_of(broker_id)?).await?;
        self.expect_broker(&link, broker_id)?;
        Ok(link)
    }

    /// One call to `broker_id`, tried once: by the next attempt another broker may be the right one.
    pub(crate) async fn call_at(
        self: &Arc<Self>,
        broker_id: i32,
        what: &'static str,
        request: call::Request,
        deadline: Deadline,
    ) -> Result<Response, Error> {
        match timeout_at(deadline.at, self.control_at(broker_id)).await {
            Ok(link) => {
                let link = link?;
                link.call(what, request, deadline).await.inspect_err(|error| self.refused(&link, error))
            }
            Err(_) => Err(Error::TimedOut { what, after: deadline.after }),
        }
    }

    /// Whoever is at an address now may be another broker than was there before.
    fn expect_broker(&self, link: &Link, broker_id: i32) -> Result<(), Error> {
        if link.broker_id == broker_id {
            return Ok(());
        }
        link.close();
        lock(&self.known).reached.remove(&broker_id);
        let why = format!("{} is broker {} and not {broker_id}", link.address, link.broker_id);
        Err(Error::refused(ErrorCode::NotLeader, why))
    }

    /// A place for a long stream to `broker_id`, with up to `credit` bytes of fetch credit (0 for a produce stream).
    pub(crate) async fn lease(self: &Arc<Self>, broker_id: i32, credit: u64) -> Result<Lease, Error> {
        loop {
            let slots = {
                let mut data = lock(&self.data);
                let slots = data.entry(broker_id).or_default();
                if slots.is_empty() {
                    slots.push(Slot::new(wire::ConnectionRole::Data, &self.config));
                }
                slots.clone()
            };
            let addresses = self.addresses_of(broker_id)?;
            for slot in &slots {
                let link = slot.get(self, addresses.clone()).await?;
                self.expect_broker(&link, broker_id)?;
                if let Some(lease) = link.lease(credit) {
                    return Ok(lease);
                }
            }
            let mut data = lock(&self.data);
            let now = data.entry(broker_id).or_default();
            if now.len() == slots.len() {
                now.push(Slot::new(wire::ConnectionRole::Data, &self.config));
            }
        }
    }

    /// Remembers where brokers say they are. What is connected to an earlier start of one ends; with one that has not been heard of
    /// nothing new is begun on the connections there are.
    pub(crate) fn learn_brokers(&self, brokers: &[wire::BrokerNode]) {
        let advertised = brokers.iter().filter(|broker| !broker.address.is_empty());
        lock(&self.known).advertised.extend(advertised.map(|broker| (broker.broker_id, broker.address.clone())));
        for broker in brokers.iter().filter(|broker| !broker.incarnation.is_empty()) {
            for link in self.links_to(broker.broker_id) {
                if !link.incarnation.is_empty() && link.incarnation != broker.incarnation {
                    tracing::debug!(broker_id = broker.broker_id, "the broker was started again");
                    link.close();
                } else if broker.fenced {
                    link.left.cancel();
                }
            }
        }
    }

    /// The brokers of which it is known where they are.
    pub(crate) fn known_brokers(&self) -> Vec<i32> {
        let known = lock(&self.known);
        let brokers: BTreeSet<i32> = known.reached.keys().chain(known.advertised.keys()).copied().collect();
        brokers.into_iter().collect()
    }

    /// Whether it is known where a broker is.
    pub(crate) fn knows_address_of(&self, broker_id: i32) -> bool {
        self.addresses_of(broker_id).is_ok()
    }

    /// Where a broker may be: where it was reached before, then where it says it is.
    fn addresses_of(&self, broker_id: i32) -> Result<Vec<String>, Error> {
        let known = lock(&self.known);
        let mut addresses: Vec<String> = [&known.reached, &known.advertised]
            .into_iter()
            .filter_map(|known| known.get(&broker_id).cloned())
            .collect();
        addresses.dedup();
        if addresses.is_empty() {
            return Err(Error::Connect {
                address: format!("broker {broker_id}"),
                reason: "its address is not known yet".into(),
            });
        }
        Ok(addresses)
    }

    /// One call on the control connection, repeated while that can help and cannot do harm, until the request's time is up.
    pub(crate) async fn call(self: &Arc<Self>, what: &'static str, request: call::Request) -> Result<Response, Error> {
        self.call_with(what, || Some(request.clone())).await?.ok_or(Error::Closed)
    }

    /// As [`Connections::call`], with a request made anew for each attempt; `None` where nothing is left to be asked.
    pub(crate) async fn call_with(
        self: &Arc<Self>,
        what: &'static str,
        request: impl Fn() -> Option<call::Request>,
    ) -> Result<Option<Response>, Error> {
        Ok(self.ask_with(what, true, request).await?.map(|(_, response)| response))
    }

    /// As [`Connections::call`], and which broker answered. Where the metadata quorum is lost, it is not waited for (`is_patient`: it is): once
    /// every broker that is reached has said that it is cut off.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        what: &'static str,
        is_patient: bool,
        request: call::Request,
    ) -> Result<(i32, Response), Error> {
        self.ask_with(what, is_patient, || Some(request.clone())).await?.ok_or(Error::Closed)
    }

    async fn ask_with(
        self: &Arc<Self>,
        what: &'static str,
        is_patient: bool,
        request: impl Fn() -> Option<call::Request>,
    ) -> Result<Option<(i32, Response)>, Error> {
        let deadline = Deadline::within(self.config.request_timeout);
        let mut backoff = Backoff::new(&self.config);
        // All attempts are one command.
        let command_id = bytes::Bytes::copy_from_slice(&rand::random::<[u8; 16]>());
        // What a broker said that is cut off from the others: more than that none of the others is reached.
        let (mut cut_off, mut asked) = (None, BTreeSet::new());
        loop {
            let link = match self.control_by(deadline).await {
                Ok(link) => link,
                Err(error) => return Err(cut_off.filter(|_| error.retryable()).unwrap_or(error)),
            };
            let Some(request) = request() else { return Ok(None) };
            let repeatable = repeatable(&request);
            let answer = link.call_as(what, request, command_id.clone(), deadline);
            let answer = match repeatable {
                // Another broker gives the answer too.
                true => link.left.run_until_cancelled(answer).await.unwrap_or_else(|| Err(link.lost(&"it is silent"))),
                false => answer.await,
            };
            let error = match answer {
                Ok(response) => return Ok(Some((link.broker_id, response))),
                Err(error) => error,
            };
            let unknown_outcome = match &error {
                Error::Refused(refusal) => refusal.code == ErrorCode::TimedOut,
                _ => true,
            };
            // Why a broker had no answer in all that time says more than that another try got none in the rest of it.
            let is_late = error.code() == Some(ErrorCode::TimedOut) && deadline.left() <= ON_THE_WAY;
            if !error.retryable() || deadline.passed() || is_late || unknown_outcome && !repeatable {
                return Err(error);
            }
            self.refused(&link, &error);
            if error.code() == Some(ErrorCode::OutOfTouch) {
                // It is asked again once no other one was reached, or was of more use.
                if !asked.insert(link.broker_id) && !is_patient {
                    return Err(error);
                }
                cut_off = Some(error.clone());
            }
            tracing::debug!(what, %error, "call fails, trying again");
            tokio::time::timeout_at(deadline.at, backoff.pause()).await.map_err(|_| error)?;
        }
    }

    /// Starts to connect, after a pause, in a task of its own: whoever waits may stop waiting.
    fn begin(self: &Arc<Self>, role: wire::ConnectionRole, addresses: Vec<String>, pause: Duration) -> Attempt {
        let connections = self.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            connections.connect(role, &addresses).await
        });
        task.map(|done| done.unwrap_or(Err(Error::Closed))).boxed().shared()
    }

    /// Connects to the first of `addresses` that answers, and says hello. They are tried one after another, the next where one fails, or
    /// beside it where it says nothing.
    ///
    /// # Errors
    /// The most telling of what became of the attempts; where another attempt may help at one address and not at another,
    /// all of it, and that trying again may help.
    async fn connect(self: &Arc<Self>, role: wire::ConnectionRole, addresses: &[String]) -> Result<Arc<Link>, Error> {
        let control = role == wire::ConnectionRole::Control;
        let mut failures = Vec::new();
        let mut waiting = addresses.iter();
        let mut next_at = tokio::time::Instant::now();
        let mut begun: Vec<&String> = Vec::new();
        let mut attempts = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some((address, outcome)) = attempts.next(), if !attempts.is_empty() => match outcome {
                    Ok(link) => {
                        // Those that were tried before it have said nothing so far.
                        let link: Arc<Link> = link;
                        let silent = begun.into_iter().filter(|begun| begun.as_str() != &**link.address());
                        let mut known = lock(&self.known);
                        silent.for_each(|address| known.put_last(address));
                        drop(known);
                        return Ok(link);
                    }
                    Err(error) => {
                        tracing::debug!(address, %error, "connecting fails");
                        let mut known = lock(&self.known);
                        known.put_last(String::as_str(address));
                        if control {
                            let tried = Tried { since: None, failed: Some(Error::clone(&error)) };
                            known.tried.insert(String::clone(address), tried);
                        }
                        failures.push((&**address, error));
                        // Nothing more is to be waited for.
                        next_at = tokio::time::Instant::now();
                    }
                },
                () = sleep_until(next_at), if waiting.len() > 0 => {
                    let Some(address) = waiting.next() else { continue };
                    let deadline = Deadline::within(ATTEMPT_TIMEOUT.min(self.config.connect_timeout));
                    let mut known = lock(&self.known);
                    if known.closed {
                        return Err(Error::Closed);
                    }
                    if control {
                        known.tried.entry(address.clone()).or_default().since = Some(tokio::time::Instant::now());
                    }
                    begun.push(address);
                    attempts.push(async move { (address, self.connect_to(role, address, deadline).await) });
                    next_at = tokio::time::Instant::now() + STAGGER;
                }
                else => return Err(sum_up(failures)),
            }
        }
    }

    async fn connect_to(
        self: &Arc<Self>,
        role: wire::ConnectionRole,
        address: &str,
        deadline: Deadline,
    ) -> Result<Arc<Link>, Error> {
        let name = match &self.config.server_name {
            Some(name) => name,
            None => host_of(address)?,
        };
        let connection = reach(&self.endpoint, &self.tls().await, name, address, deadline).await?;
        self.hello(connection, role, address, deadline).await
    }

    async fn hello(
        self: &Arc<Self>,
        connection: quinn::Connection,
        role: wire::ConnectionRole,
        address: &str,
        deadline: Deadline,
    ) -> Result<Arc<Link>, Error> {
        let mut link = Link {
            connection,
            address: address.into(),
            since: Instant::now(),
            broker_id: -1,
            cluster_id: String::new(),
            software: String::new(),
            incarnation: Bytes::new(),
            features: Vec::new(),
            left: CancellationToken::new(),
            streams: Arc::new(Semaphore::new(0)),
            credit: Mutex::new(CreditPool { limit: 0, reserved: 0 }),
        };
        let hello = wire::Hello {
            min_version: PROTOCOL_VERSION,
            max_version: PROTOCOL_VERSION,
            client_id: self.config.client_id.clone(),
            client_software: concat!("headwater-client/", env!("CARGO_PKG_VERSION")).into(),
            role: role.into(),
            cluster_id: lock(&self.known).cluster_id.clone(),
            features: Vec::new(),
        };
        // A broker judges this client's certificate when the handshake is over here already.
        let refused = |error| match link.connection.close_reason() {
            Some(reason) if tls_failed(&reason) => {
                let reason = format!("the broker does not take this client's certificate: {reason}");
                Error::Untrusted { address: address.into(), reason }
            }
            _ => error,
        };
        let answer = link.call("hello", call::Request::Hello(hello), deadline).await.map_err(refused)?;
        let hello = match answer {
            Response::Hello(hello) => hello,
            _ => return Err(Error::Protocol("no answer to hello".into())),
        };
        if hello.version != PROTOCOL_VERSION {
            return Err(Error::refused(
                ErrorCode::UnsupportedVersion,
                format!("the broker speaks version {} and this client {PROTOCOL_VERSION}", hello.version),
            ));
        }
        if hello.fetch_credit_bytes == 0 {
            // Every stream would need a connection of its own, and none would do.
            return Err(Error::Protocol("hello allows no fetch credit (fetch_credit_bytes is 0)".into()));
        }
        link.connection.set_send_window(hello.produce_credit_bytes.saturating_add(SEND_SLACK_BYTES));
        let streams = hello.max_streams.saturating_sub(STREAMS_IN_RESERVE).max(1) as usize;
        link.streams = Arc::new(Semaphore::new(streams.min(Semaphore::MAX_PERMITS)));
        link.credit =
            Mutex::new(CreditPool { limit: hello.fetch_credit_bytes.min(quic::FETCH_CREDIT_BYTES), reserved: 0 });
        link.broker_id = hello.broker_id;
        link.cluster_id.clone_from(&hello.cluster_id);
        link.software = hello.broker_software;
        link.incarnation = hello.incarnation;
        link.features = hello.features;
        let mut known = lock(&self.known);
        if known.closed {
            link.close();
            return Err(Error::Closed);
        }
        known.cluster_id = hello.cluster_id;
        known.reached.insert(hello.broker_id, address.into());
        known.speaks(address);
        if role == wire::ConnectionRole::Control {
            known.tried.clear();
        }
        tracing::debug!(address, broker_id = hello.broker_id, ?role, "connected");
        Ok(Arc::new(link))
    }

    /// Closes every connection, and waits until the brokers can know; not for those that say nothing.
    pub(crate) async fn close(&self) {
        lock(&self.known).closed = true;
        if let Some(link) = self.control.current() {
            link.close();
        }
        let mut slots: Vec<Arc<Slot>> = lock(&self.data).drain().flat_map(|(_, slots)| slots).collect();
        slots.extend(lock(&self.controls).drain().map(|(_, slot)| slot));
        slots.iter().filter_map(|slot| slot.current()).for_each(|link| link.close());
        self.endpoint.close(VarInt::from_u32(ResetCode::Done.number()), b"client closed");
        // QUIC stays for three of its timeouts: for seconds after one broker stood still, or was not there.
        drop(timeout(GOODBYE, self.endpoint.wait_idle()).await);
    }
}

/// Whether asking twice gives what asking once gives. Where it does not (the second answer to "create" is "exists"), an
/// unknown outcome is told to the caller.
pub(crate) fn repeatable(request: &call::Request) -> bool {
    use call::Request as R;
    match request {
        R::DeleteGroup(_) | R::DeleteOffsets(_) => false,
        R::Hello(_)
        | R::DescribeBroker(_)
        | R::Metadata(_)
        | R::DescribeTopic(_)
        | R::AlterTopic(_)
        | R::DeleteRecords(_)
        | R::ListOffsets(_)
        | R::AllocateProducerId(_)
        | R::CommitOffsets(_)
        | R::FetchOffsets(_)
        | R::ListGroups(_)
        | R::DescribeGroup(_)
        | R::FindCoordinator(_)
        | R::DescribeCluster(_)
        | R::ChangeVoters(_)
        | R::ListMoves(_)
        | R::DescribeReplicas(_)
        | R::ClusterHealth(_) => true,
        // They are done once under the id of their call.
        R::CreateTopic(_)
        | R::AddPartitions(_)
        | R::DeleteTopic(_)
        | R::RemoveBroker(_)
        | R::ElectLeaders(_)
        | R::MovePartitions(_)
        | R::CancelMoves(_)
        | R::UpgradeCluster(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::{Connections, CreditPool, Slot};
    use crate::config::ClientConfig;
    use headwater_proto::wire::ConnectionRole;
    use std::time::Duration;
    use tokio::time::Instant;

    /// The clock jumps from one moment to the next: nothing but pauses takes time. With nobody to try, an attempt fails at once.
    #[tokio::test(start_paused = true)]
    async fn after_a_failure_the_next_attempt_to_connect_waits_out_a_pause_and_the_next_a_longer_one() {
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let config = ClientConfig {
            bootstrap: vec!["localhost:1".into()],
            ca_pem: certified.cert.pem().into_bytes(),
            retry_backoff: Duration::from_secs(1),
            retry_backoff_max: Duration::from_secs(3),
            ..ClientConfig::default()
        };
        let connections = Connections::new(config.clone()).unwrap();
        let slot = Slot::new(ConnectionRole::Data, &config);
        for seconds in [0, 1, 2, 3, 3] {
            let (began, whole) = (Instant::now(), Duration::from_secs(seconds));
            // Everybody waits for the one attempt that runs, and for its pause.
            let (one, other) = tokio::join!(slot.get(&connections, Vec::new()), slot.get(&connections, Vec::new()));
            assert!(one.is_err() && other.is_err());
            let took = began.elapsed();
            // A timer of the runtime is as fine as a millisecond.
            assert!(took >= whole / 2 && took <= whole + Duration::from_millis(1), "{took:?} of {whole:?}");
        }
    }

    #[test]
    fn streams_never_reserve_more_credit_than_the_connection_has() {
        let mut pool = CreditPool { limit: 1 << 20, reserved: 0 };
        assert_eq!(pool.reserve(700 << 10), Some(700 << 10));
        assert_eq!(pool.reserve(700 << 10), Some(324 << 10), "what is left, while that is a share worth having");
        assert_eq!(pool.reserve(1), None, "another connection must serve");
        pool.release(324 << 10);
        assert_eq!(pool.reserve(300 << 10), Some(300 << 10));
        assert_eq!(pool.reserve(300 << 10), None, "24 KiB are no share");
        assert_eq!(pool.reserve(10 << 10), Some(10 << 10), "unless no more was wanted");
        assert_eq!([pool.extend(4 << 10), pool.extend(1 << 20)], [4 << 10, 10 << 10]);
        assert!(pool.reserved <= pool.limit);
    }

    #[test]
    fn a_connection_with_little_credit_serves_one_stream_all_the_same() {
        let mut pool = CreditPool { limit: 1000, reserved: 0 };
        assert_eq!(pool.reserve(1 << 20), Some(1000));
        assert_eq!(pool.reserve(1 << 20), None);
    }
}
