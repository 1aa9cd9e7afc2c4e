//! One fetch stream: byte ranges of the log as they become readable, within the reader's credit.
//!
//! The reader sets the pace: it grants bytes, and the broker sends only within them. At the tail the stream sleeps on the
//! partition's watermarks and sends the moment they move. What it sends are slices of the mapped segments, never copied
//! before the packet; a slice that is not in memory is loaded on the I/O pool first, because a page fault would stop every
//! connection of this thread for as long as the disk takes.
//!
//! What is handed to QUIC and not yet acknowledged is at most [`HANDED_BYTES`] above the congestion window, whatever the
//! credit: more would only pile up in front of streams that are opened later, and its pages could be gone by the time
//! they are sent.
//!
//! A reader that replays, or has more than [`FAR_BYTES`] to catch up with, comes after whoever reads at the tail of the same
//! connection, until it has caught up. (Not a moment earlier: the first of several would overtake the others near its end.)
//!
//! A reader may be elsewhere: where another in-sync replica is in its rack, the leader sends it there, and that one serves up to the high
//! watermark that it knows.
//!
//! Owns: one stream. Refuses: to read above the high watermark. Read next: `storage/src/reader.rs`.

use crate::cluster_calls;
use crate::error::PartitionError;
use crate::metrics::Counted;
use crate::partition::state::Offsets;
use crate::partition::{PartitionHandle, Watermarks};
use crate::sending::{
    Account, COLD_FRAME_BYTES, FAR_BYTES, FRAME_BYTES, HANDED_BYTES, OnItsWay, Precedence, prioritise, write_all,
};
use crate::session::Session;
use crate::stream::{Frames, StreamError, send_within};
use bytes::Bytes;
use headwater_proto::frame;
use headwater_proto::wire::{FetchCredit, FetchData, FetchOpened, OpenFetch};
use headwater_proto::{ErrorCode, ResetCode, wire};
use headwater_storage::{Cursor, LogReader, ReadError, Slice};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Largest header of a credit frame, in bytes.
const MAX_HEADER_BYTES: usize = 1 << 10;

/// How often a follower that has nothing to send looks whether its readers are in good hands.
const LOOK: Duration = Duration::from_secs(1);
/// It sends them away when its leader has pushed nothing to it for so long.
const APART: Duration = Duration::from_secs(3);

/// What a reader is told first.
const OPENING: &str = "the answer to the opening";

/// Why a fetch stream ends with an error frame, or without.
enum End {
    Partition(PartitionError),
    Stream(StreamError),
}

impl From<PartitionError> for End {
    fn from(error: PartitionError) -> End {
        End::Partition(error)
    }
}

impl From<StreamError> for End {
    fn from(error: StreamError) -> End {
        End::Stream(error)
    }
}

/// Serves the stream until the reader finishes its side, an error, or the broker's shutdown.
pub(crate) async fn serve(
    session: &Session,
    open: OpenFetch,
    send: &mut quinn::SendStream,
    frames: Frames<wire::Open>,
) -> Result<(), StreamError> {
    let _counted = Counted::new(&session.shared.metrics.fetch_streams);
    let mut frames = frames.followed_by::<FetchCredit>(MAX_HEADER_BYTES, 0)?;
    let (partition, reader) = match admit(session, &open).await {
        Ok(admitted) => admitted,
        Err(error) => {
            session.shared.metrics.rejected(ErrorCode::from_number(error.code));
            let refused = FetchOpened { error: Some(error), ..FetchOpened::default() };
            return send_within(send, &refused, session.patience(), OPENING).await;
        }
    };
    let precedence = if open.background { Precedence::Background } else { Precedence::Tail };
    prioritise(send, precedence);
    let Offsets { log_start, high_watermark, .. } = partition.offsets();
    let leads = partition.is_leader();
    let opened = FetchOpened {
        error: None,
        leader_epoch: partition.leader_epoch(),
        log_start_offset: log_start,
        high_watermark,
        preferred_replica: nearer(session, &partition, &open.rack).filter(|_| leads),
    };
    if opened.preferred_replica.is_some() {
        return send_within(send, &opened, session.patience(), OPENING).await;
    }
    send_within(send, &opened, session.patience(), OPENING).await?;
    let credit = Account::default();
    credit.add(open.credit_bytes);
    let sending = Sending {
        session,
        reader,
        watermarks: partition.watermarks(),
        partition: partition.clone(),
        leader_epoch: opened.leader_epoch,
        follows: !leads,
        credit: &credit,
        handed: Arc::default(),
        min_bytes: u64::from(open.min_bytes),
        max_wait: Duration::from_millis(u64::from(open.max_wait_ms)),
        sent_to: open.offset,
        precedence,
    };
    tokio::select! {
        biased;
        () = session.shared.shutdown.cancelled() => {
            // A frame may be half written: nothing more makes sense behind it.
            let _ = send.reset(ResetCode::ShuttingDown.number().into());
            Ok(())
        }
        granted = grants(&mut frames, &credit) => granted,
        ended = sending.run(send, open.offset) => {
            let (error, offsets) = match ended {
                Ok(()) => return Ok(()),
                Err((End::Stream(error), _)) => return Err(error),
                Err((End::Partition(error), offsets)) => (error, offsets),
            };
            let last = FetchData {
                next_offset: -1,
                high_watermark: offsets.high_watermark,
                log_start_offset: offsets.log_start,
                error: Some(session.shared.refusal(&partition, &error)),
            };
            send_within(send, &last, session.patience(), "why the stream ends").await
        }
    }
}

/// Takes the reader's grants until it finishes its side: it is then no longer interested.
async fn grants(frames: &mut Frames<FetchCredit>, credit: &Account) -> Result<(), StreamError> {
    while let Some(FetchCredit { credit_bytes }) = frames.message().await? {
        credit.add(credit_bytes);
    }
    Ok(())
}

async fn admit(session: &Session, open: &OpenFetch) -> Result<(PartitionHandle, LogReader), wire::Error> {
    let find = || match open.from_follower {
        true => session.shared.replica(&open.topic_id, open.partition),
        false => session.shared.partition(&open.topic_id, open.partition),
    };
    let partition = session.shared.look_twice(find).await?;
    let current = partition.leader_epoch();
    if open.leader_epoch != -1 && open.leader_epoch != current {
        let code =
            if open.leader_epoch < current { ErrorCode::FencedLeaderEpoch } else { ErrorCode::UnknownLeaderEpoch };
        let why =
            format!("leader epoch {} was named, this is epoch {current}: refresh the metadata", open.leader_epoch);
        let leader = match partition.is_leader() {
            true => Some(session.shared.leader_hint(current)),
            // It knows the leader of its own epoch alone.
            false => None,
        };
        return Err(wire::Error { leader, ..wire::Error::new(code, why) });
    }
    if open.position_leader_epoch > current {
        cluster_calls::look_again(&session.shared).await?;
        let state = session.shared.metadata.state();
        let known = state.topic_by_id(&partition.topic_id());
        let known = known.and_then(|topic| topic.partitions.get(partition.partition() as usize));
        // Where the cluster knows no such epoch either, what was read in it is gone.
        if known.is_none_or(|known| open.position_leader_epoch <= known.leader_epoch) {
            // Whoever led in that epoch knows what became of the position; this broker has not heard of it yet.
            let why = format!(
                "the position is of leader epoch {}, and none after {current} is known here yet",
                open.position_leader_epoch
            );
            return Err(wire::Error::new(ErrorCode::UnknownLeaderEpoch, why));
        }
    }
    let reader = partition.reader().map_err(|why| session.shared.refusal(&partition, &why))?;
    check_position(&reader, &partition, open).map_err(|why| match partition.is_leader() {
        true => session.shared.refusal(&partition, &why),
        // What a position is worth, the leader says.
        false => session.shared.refusal(&partition, &PartitionError::NotLeader(current)),
    })?;
    Ok((partition, reader))
}

/// An in-sync replica of the partition in the reader's rack, where this broker's is none.
fn nearer(session: &Session, partition: &PartitionHandle, rack: &str) -> Option<i32> {
    if rack.is_empty() || session.shared.config.broker_rack == rack {
        return None;
    }
    let (state, view) = (session.shared.metadata.state(), partition.view());
    let is_there = |broker_id: i32| state.broker(broker_id).is_some_and(|broker| broker.rack == rack);
    let near = view.replicas.iter().filter(|replica| replica.in_sync && replica.active);
    let near: Vec<i32> = near.map(|replica| replica.member.broker).filter(|broker_id| is_there(*broker_id)).collect();
    // Of several, each serves some partitions.
    near.get(partition.partition() as usize % near.len().max(1)).copied()
}

/// Whether the log still holds the history on which the reader's position rests.
fn check_position(reader: &LogReader, partition: &PartitionHandle, open: &OpenFetch) -> Result<(), PartitionError> {
    let Offsets { log_start, high_watermark, log_end, .. } = partition.offsets();
    if open.position_leader_epoch >= 0 {
        // The log's last record of that epoch, or of the largest epoch before it. A reader that is past it saw records
        // that were lost: it is told so, instead of being given others under their offsets.
        let latest = reader.leader_epochs().latest().unwrap_or(-1);
        let end = reader.epoch_end(open.position_leader_epoch.min(latest));
        let (epoch, end) = end.unwrap_or((-1, log_start));
        let diverged = epoch < open.position_leader_epoch || end < open.offset;
        if diverged && open.offset > log_start {
            return Err(PartitionError::LogTruncated {
                offset: open.offset,
                epoch: open.position_leader_epoch,
                log_start_offset: log_start,
                end_offset: end.min(open.offset),
            });
        }
    }
    if open.offset < log_start || open.offset > log_end {
        return Err(PartitionError::OffsetOutOfRange {
            offset: open.offset,
            log_start_offset: log_start,
            end_offset: high_watermark,
        });
    }
    Ok(())
}

struct Sending<'a> {
    session: &'a Session,
    partition: PartitionHandle,
    /// The epoch in which the reader came.
    leader_epoch: i32,
    /// The reader was sent here because it is near.
    follows: bool,
    reader: LogReader,
    watermarks: watch::Receiver<Watermarks>,
    credit: &'a Account,
    /// Bytes that QUIC has and the reader has not acknowledged.
    handed: Arc<Account>,
    min_bytes: u64,
    max_wait: Duration,
    /// Everything below went out in whole batches.
    sent_to: i64,
    precedence: Precedence,
}

impl Sending<'_> {
    async fn run(mut self, send: &mut quinn::SendStream, offset: i64) -> Result<(), (End, Offsets)> {
        let ended = self.send_from(send, offset).await;
        let offsets = self.watermarks.borrow().offsets;
        ended.map_err(|end| (end, offsets))
    }

    async fn send_from(&mut self, send: &mut quinn::SendStream, offset: i64) -> Result<(), End> {
        let reader = self.reader.clone();
        // Finding the position reads an index and the log, which may not be in memory.
        let sought = self.session.shared.pool.run(move || reader.seek(offset)).await;
        let mut cursor = sought.map_err(|error| self.read_error(error))?;
        self.take_precedence(send, self.precedence.after_read(|| self.reader.is_far(&cursor, FAR_BYTES)));
        // Read and not yet sent: it is less than the reader waits for.
        let mut gathered: Vec<Slice> = Vec::new();
        let mut gathered_bytes = 0;
        // When the reader has waited long enough for the first of them.
        let mut due: Option<tokio::time::Instant> = None;
        let mut chunk = FRAME_BYTES;
        loop {
            self.credit.until(|credit| credit > gathered_bytes).await;
            let room = HANDED_BYTES + self.session.connection.stats().path.cwnd;
            self.handed.until(|handed| handed < room).await;
            let credit = self.credit.get();
            let enough = self.min_bytes.min(credit);
            let most = usize::try_from(credit - gathered_bytes).unwrap_or(chunk).min(chunk);
            match self.read(&mut cursor, most)? {
                Some(slice) => {
                    gathered_bytes += slice.len() as u64;
                    gathered.push(slice);
                    due = due.or_else(|| Some(tokio::time::Instant::now() + self.max_wait));
                    if gathered_bytes < enough {
                        continue;
                    }
                }
                None => {
                    self.take_precedence(send, self.precedence.at_the_end());
                    if self.changed(due).await? {
                        continue;
                    }
                }
            }
            self.take_precedence(send, self.precedence.after_read(|| self.reader.is_far(&cursor, FAR_BYTES)));
            gathered_bytes = 0;
            due = None;
            for slice in gathered.drain(..) {
                let cold = !slice.is_resident();
                chunk = if cold { COLD_FRAME_BYTES } else { FRAME_BYTES };
                self.send_slice(send, slice, cold).await?;
            }
        }
    }

    fn take_precedence(&mut self, send: &quinn::SendStream, precedence: Precedence) {
        if precedence != self.precedence {
            self.precedence = precedence;
            prioritise(send, precedence);
        }
    }

    /// The next slice below the high watermark.
    fn read(&mut self, cursor: &mut Cursor, bytes: usize) -> Result<Option<Slice>, End> {
        let high_watermark = {
            let watermarks = self.watermarks.borrow_and_update();
            if let Some(why) = &watermarks.ended {
                return Err(End::Partition(why.clone()));
            }
            let is_served = match self.follows {
                // It goes on as long as nobody else leads, and it is in sync.
                true => self.partition.leader_epoch() == self.leader_epoch && self.partition.is_in_sync(),
                false => watermarks.leads,
            };
            if !is_served {
                return Err(End::Partition(PartitionError::NotLeader(self.leader_epoch)));
            }
            watermarks.offsets.high_watermark
        };
        self.reader.read(cursor, bytes, high_watermark).map_err(|error| self.read_error(error))
    }

    /// Waits until the watermarks move. False: it is `due` all the same, however often they moved.
    async fn changed(&mut self, due: Option<tokio::time::Instant>) -> Result<bool, End> {
        let overdue = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = overdue => Ok(false),
            () = tokio::time::sleep(LOOK), if self.follows => {
                // Its leader pushes nothing to it: what it knows of the high watermark grows old.
                if self.watermarks.borrow().apart_since.is_some_and(|since| since.elapsed() > APART) {
                    return Err(End::Partition(PartitionError::NotLeader(self.leader_epoch)));
                }
                Ok(true)
            }
            changed = self.watermarks.changed() => {
                changed.map(|()| true).map_err(|_| End::Partition(PartitionError::ShuttingDown))
            }
        }
    }

    async fn send_slice(&mut self, send: &mut quinn::SendStream, slice: Slice, cold: bool) -> Result<(), End> {
        let metrics = &self.session.shared.metrics;
        let slice = if cold {
            let began = Instant::now();
            let loaded = self.session.shared.pool.run(move || slice.load().map(|()| slice)).await;
            metrics.cold_reads.increment(1);
            metrics.cold_read_seconds.record(began.elapsed());
            loaded.map_err(|error| self.read_error(error))?
        } else {
            slice
        };
        let next_offset = slice.next_offset().map_err(|error| self.read_error(error))?;
        let Offsets { high_watermark, log_start, .. } = self.watermarks.borrow().offsets;
        let bytes = slice.bytes();
        let length = bytes.len() as u64;
        let header = FetchData { next_offset, high_watermark, log_start_offset: log_start, error: None };
        self.credit.take(length);
        self.handed.add(length);
        let payload = Bytes::from_owner(OnItsWay { bytes, account: Arc::clone(&self.handed) });
        let mut frame = [frame::encode(&header, payload.len()), payload];
        write_all(send, &mut frame, self.session.patience()).await?;
        metrics.bytes_out.increment(length);
        metrics.records_out.increment(u64::try_from(next_offset - self.sent_to).unwrap_or(0));
        self.sent_to = self.sent_to.max(next_offset);
        Ok(())
    }

    fn read_error(&self, error: ReadError) -> End {
        End::Partition(self.partition.read_failed(&error))
    }
}
