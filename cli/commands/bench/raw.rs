//! `headwater bench raw`: the same bytes over bare QUIC between two processes, this one with the client's own settings and
//! the other one with the broker's; and round trips of one record on an idle stream.
//!
//! The other process is this command again (`--serve`): it makes a certificate, prints where it listens, serves one
//! stream after another and ends with its standard input. A stream begins with a request of 17 bytes: what to do, how
//! much, in pieces of which size. Each side is made by the function that makes the real one, so that they cannot differ.

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

use super::data::Values;
use super::{Answer, Latencies};
use crate::args::{BenchArgs, Direction, Mode};
use crate::connect::block_on;
use crate::os::cpu_time;
use crate::output::print_json;
use crate::signals::Signals;
use headwater_broker::config::BrokerConfig;
use headwater_client::quic;

/// Bytes handed to the transport at once.
const PIECE_BYTES: usize = 256 << 10;
/// Round trips that are measured.
const ROUND_TRIPS: u64 = 2_000;
/// Seconds that round trips at a rate take.
const PACED_SECONDS: u64 = 10;
/// Round trips that are measured however long they take; how long more of them may take together, and the first ones
/// that are not measured.
const FEWEST_ROUND_TRIPS: u64 = 10;
const ROUND_TRIPS_TIME: Duration = Duration::from_secs(15);
const WARM_UP_TIME: Duration = Duration::from_secs(2);
/// Name in the certificate.
const SERVER_NAME: &str = "localhost";
/// How long the other process may take to be ready, and a round trip to come back; it may take longer where a record is
/// large: as long as so many bytes a second need.
const DEADLINE: Duration = Duration::from_secs(30);
const SLOWEST_BYTES_PER_SECOND: u64 = 1 << 20;

/// What the other process prints first.
#[derive(Serialize, Deserialize)]
struct Ready {
    listen: SocketAddr,
    certificate: String,
}

/// What a stream is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Send back pieces as they come.
    Echo = 0,
    /// Send so many bytes.
    Send = 1,
    /// Take so many bytes, then say so with one.
    Take = 2,
    /// Say how much CPU time was spent so far: microseconds.
    Cpu = 3,
}

struct Request {
    task: Task,
    bytes: u64,
    piece: u64,
}

impl Request {
    const BYTES: usize = 17;

    fn encode(&self) -> [u8; Request::BYTES] {
        let mut bytes = [0; Request::BYTES];
        bytes[0] = self.task as u8;
        bytes[1..9].copy_from_slice(&self.bytes.to_be_bytes());
        bytes[9..].copy_from_slice(&self.piece.to_be_bytes());
        bytes
    }

    async fn read(stream: &mut RecvStream) -> Result<Request> {
        let (mut task, mut bytes, mut piece) = ([0; 1], [0; 8], [0; 8]);
        stream.read_exact(&mut task).await?;
        stream.read_exact(&mut bytes).await?;
        stream.read_exact(&mut piece).await?;
        let task = match task[0] {
            0 => Task::Echo,
            1 => Task::Send,
            2 => Task::Take,
            3 => Task::Cpu,
            other => bail!("no task has number {other}"),
        };
        Ok(Request { task, bytes: u64::from_be_bytes(bytes), piece: u64::from_be_bytes(piece) })
    }
}

/// Runs the mode.
pub(super) fn run(args: &BenchArgs) -> Result<Answer> {
    broker_config(args.mtu)?;
    // Whoever ends it leaves no other process behind.
    let signals = Signals::catch();
    let mut other = Other::start(args)?;
    let outcome = block_on(async {
        let measured = async { measure(args, other.ready().await?).await };
        let outcome = signals.unless_asked(measured).await.transpose();
        // Ctrl-C in a terminal reaches the other process too, whose end is then what the measuring saw first.
        if signals.is_asked() { outcome.or(Ok(None)) } else { outcome }
    });
    other.end();
    match outcome? {
        Some(answer) => Ok(answer),
        None => Err(anyhow!("interrupted")),
    }
}

async fn measure(args: &BenchArgs, ready: Ready) -> Result<Answer> {
    let endpoint =
        quic::endpoint((Ipv4Addr::LOCALHOST, 0).into(), args.mtu, None).context("cannot make an endpoint")?;
    let config = quic::client_config(ready.certificate.as_bytes(), None, args.mtu)?;
    let connection = endpoint.connect_with(config, ready.listen, SERVER_NAME)?.await.context("cannot connect")?;
    let latencies = round_trips(&connection, args.record_bytes(), args.throughput).await?;
    let bytes = args.record_count() * args.record_size;
    let (cpu, other_cpu) = (cpu_time(), others_cpu(&connection).await?);
    let began = Instant::now();
    match args.direction {
        Direction::Receive => {
            let (_, mut recv) =
                open(&connection, Request { task: Task::Send, bytes, piece: PIECE_BYTES as u64 }).await?;
            take(&mut recv, bytes).await?;
        }
        Direction::Send => {
            let (mut send, mut recv) = open(&connection, Request { task: Task::Take, bytes, piece: 0 }).await?;
            pour(&mut send, bytes, PIECE_BYTES).await?;
            recv.read_exact(&mut [0]).await?;
        }
    }
    let wall = began.elapsed();
    let (cpu, other_cpu) = (cpu_time().saturating_sub(cpu), others_cpu(&connection).await?.saturating_sub(other_cpu));
    connection.close(0u32.into(), b"done");
    endpoint.wait_idle().await;
    Ok(Answer::new(Mode::Raw, args.record_count(), bytes, wall)
        .latency("round trip of a record", &latencies)
        .cpu(cpu, Some(other_cpu.as_secs_f64())))
}

async fn open(connection: &Connection, request: Request) -> Result<(SendStream, RecvStream)> {
    let (mut send, recv) = connection.open_bi().await?;
    send.write_all(&request.encode()).await?;
    Ok((send, recv))
}

/// One after another, or so many a second: a machine that idles in between takes longer to wake up.
async fn round_trips(connection: &Connection, size: usize, rate: Option<u64>) -> Result<Latencies> {
    let (mut send, mut recv) = open(connection, Request { task: Task::Echo, bytes: 0, piece: size as u64 }).await?;
    let record = Values::new(size).get(0);
    let mut back = vec![0; size];
    let mut latencies = Latencies::new();
    let rounds = rate.map_or(ROUND_TRIPS, |rate| (rate * PACED_SECONDS).clamp(FEWEST_ROUND_TRIPS, ROUND_TRIPS));
    let (first, deadline) = (Instant::now(), deadline(size));
    let (mut warm, mut measured) = (0, 0);
    // Large records take their time, and fewer of them tell as much.
    while measured < rounds && (measured < FEWEST_ROUND_TRIPS || first.elapsed() < ROUND_TRIPS_TIME) {
        if let Some(rate) = rate {
            tokio::time::sleep(Duration::from_secs_f64(1.0 / rate as f64)).await;
        }
        let began = Instant::now();
        tokio::time::timeout(deadline, there_and_back(&mut send, &mut recv, &record, &mut back))
            .await
            .with_context(|| format!("a record of {size} bytes did not come back within {deadline:?}"))??;
        // The first tenth warms both sides up.
        if warm < rounds / 10 && first.elapsed() < WARM_UP_TIME {
            warm += 1;
        } else {
            latencies.record(began.elapsed());
            measured += 1;
        }
    }
    send.finish()?;
    Ok(latencies)
}

/// How long a round trip of a record may take.
fn deadline(size: usize) -> Duration {
    DEADLINE + Duration::from_secs(2 * size as u64 / SLOWEST_BYTES_PER_SECOND)
}

/// Sends a record and takes it back at the same time: it may be larger than what the other side holds.
async fn there_and_back(send: &mut SendStream, recv: &mut RecvStream, record: &[u8], back: &mut [u8]) -> Result<()> {
    let (sent, taken) = tokio::join!(send.write_all(record), recv.read_exact(back));
    sent?;
    taken?;
    Ok(())
}

async fn others_cpu(connection: &Connection) -> Result<Duration> {
    let (_send, mut recv) = open(connection, Request { task: Task::Cpu, bytes: 0, piece: 0 }).await?;
    let mut micros = [0; 8];
    recv.read_exact(&mut micros).await?;
    Ok(Duration::from_micros(u64::from_be_bytes(micros)))
}

/// Sends so many bytes, piece by piece, out of more memory than caches hold.
async fn pour(send: &mut SendStream, bytes: u64, piece: usize) -> Result<()> {
    let values = Values::new(piece);
    let (mut left, mut number) = (bytes, 0);
    while left > 0 {
        let mut next: Bytes = values.get(number);
        next.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= next.len() as u64;
        number += 1;
        send.write_chunk(next).await?;
    }
    Ok(())
}

async fn take(recv: &mut RecvStream, bytes: u64) -> Result<()> {
    let mut left = bytes;
    while left > 0 {
        match recv.read_chunk(usize::MAX, true).await? {
            Some(chunk) => left = left.saturating_sub(chunk.bytes.len() as u64),
            None => bail!("the stream ended {left} bytes early"),
        }
    }
    Ok(())
}

/// The other process.
struct Other {
    child: Child,
}

impl Other {
    fn start(args: &BenchArgs) -> Result<Other> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
        command.args(["bench", "raw", "--serve"]);
        if let Some(mtu) = args.mtu {
            command.args(["--mtu", &mtu.to_string()]);
        }
        let child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the other process")?;
        Ok(Other { child })
    }

    async fn ready(&mut self) -> Result<Ready> {
        let stdout = self.child.stdout.take().context("the other process has no output")?;
        let (send, receive) = oneshot::channel();
        let read = move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line).map(|_| line);
            // Whoever does not wait any more has said why.
            let _ = send.send(read);
        };
        std::thread::Builder::new().name("other".into()).spawn(read).context("cannot start a thread")?;
        let line = tokio::time::timeout(DEADLINE, receive)
            .await
            .with_context(|| format!("the other process was not ready within {DEADLINE:?}"))?
            .context("the thread that reads what the other process says has ended")?
            .context("the other process does not answer")?;
        serde_json::from_str(&line).context("the other process did not start")
    }

    fn end(&mut self) {
        // It ends when its standard input does; killing it after that is for a process that hangs.
        drop(self.child.stdin.take());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The settings of a broker that is told nothing but the size of its packets.
fn broker_config(mtu: Option<u16>) -> Result<BrokerConfig> {
    let mut config = BrokerConfig::default();
    if let Some(mtu) = mtu {
        config.set_pair(&format!("mtu={mtu}")).context("no broker takes packets of that size")?;
    }
    Ok(config)
}

/// A broker's endpoint without the broker, and the certificate to trust.
fn broker_endpoint(config: &BrokerConfig) -> Result<(Endpoint, String)> {
    let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]).context("cannot make a certificate")?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let socket = headwater_broker::quic::bind((Ipv4Addr::LOCALHOST, 0).into()).context("cannot make a socket")?;
    let certificates = vec![made.cert.der().clone()];
    let endpoint =
        headwater_broker::quic::endpoint(config, socket, certificates, key.into(), &rand::random()).context("QUIC")?;
    Ok((endpoint, made.cert.pem()))
}

/// Is the other process: serves until standard input ends.
pub(super) fn serve(args: &BenchArgs) -> Result<()> {
    std::thread::spawn(|| {
        // Whatever ends the input, the one who started this is gone.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    block_on(async {
        let (endpoint, certificate) = broker_endpoint(&broker_config(args.mtu)?)?;
        print_json(&Ready { listen: endpoint.local_addr()?, certificate })?;
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await?;
            tokio::spawn(async move {
                while let Ok((send, recv)) = connection.accept_bi().await {
                    tokio::spawn(async move {
                        if let Err(error) = answer(send, recv).await {
                            tracing::debug!(%error, "a stream ended early");
                        }
                    });
                }
            });
        }
        Ok(())
    })
}

async fn answer(mut send: SendStream, mut recv: RecvStream) -> Result<()> {
    let request = Request::read(&mut recv).await?;
    match request.task {
        Task::Echo => {
            let mut piece = vec![0; usize::try_from(request.piece)?];
            while recv.read_exact(&mut piece).await.is_ok() {
                send.write_all(&piece).await?;
            }
        }
        Task::Send => pour(&mut send, request.bytes, usize::try_from(request.piece)?).await?,
        Task::Take => {
            take(&mut recv, request.bytes).await?;
            send.write_all(&[1]).await?;
        }
        Task::Cpu => send.write_all(&u64::try_from(cpu_time().as_micros())?.to_be_bytes()).await?,
    }
    send.finish()?;
    // What was sent last must arrive before the stream is dropped.
    send.stopped().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn large_records_have_longer_to_come_back() {
        assert_eq!(deadline(1000), DEADLINE);
        assert_eq!(deadline(64 << 20), DEADLINE + Duration::from_secs(128));
    }

    /// What a peer can see of a broker's settings: how many streams it grants, and of which kind.
    #[tokio::test]
    async fn the_other_side_grants_what_a_broker_grants() {
        for mtu in [None, Some(1452)] {
            let config = broker_config(mtu).expect("settings");
            assert_eq!(config.mtu, mtu.unwrap_or(BrokerConfig::default().mtu));
            let (endpoint, certificate) = broker_endpoint(&config).expect("an endpoint");
            let listen = endpoint.local_addr().expect("an address");
            let serving = tokio::spawn(async move { endpoint.accept().await.expect("somebody").await });
            let client = quic::endpoint((Ipv4Addr::LOCALHOST, 0).into(), mtu, None).expect("an endpoint");
            let trust = quic::client_config(certificate.as_bytes(), None, mtu).expect("a configuration");
            let connecting = client.connect_with(trust, listen, SERVER_NAME).expect("a connection");
            let connection = tokio::time::timeout(DEADLINE, connecting).await.expect("in time").expect("connected");
            let _served = tokio::time::timeout(DEADLINE, serving).await.expect("in time").expect("no panic");
            let mut open = Vec::new();
            while let Some(stream) = connection.open_bi().now_or_never() {
                open.push(stream.expect("a stream"));
            }
            assert_eq!(u32::try_from(open.len()).ok(), Some(config.max_streams_per_connection));
            assert!(connection.open_uni().now_or_never().is_none());
        }
    }

    #[test]
    fn packets_that_no_broker_sends_are_refused() {
        assert!(broker_config(Some(9000)).is_err());
    }
}
