//! The leader's end of a replica stream: one follower of one partition.
//!
//! The follower says hello, with all of its log in terms of leader epochs; the partition answers what to cut, and where nothing is,
//! batches are pushed as they are appended, byte for byte from the mapped segments, within the follower's credit. Nobody polls: the stream
//! sleeps on the partition's watermarks. Offsets that move are told without data too; what the follower says of its own goes to the
//! partition, which decides.
//!
//! Only the broker itself may follow as that broker, and only in the incarnation that it registered. The stream ends with the leader
//! epoch, and when the follower opens another.
//!
//! Owns: one stream. Refuses: to decide who is in sync ([`super::leader`]). Read next: [`super::follow`], the other end.

use super::Member;
use super::leader::HelloRefusal;
use super::message::{self, MessageError, Opening};
use super::soundness;
use super::throttle::Throttle;
use crate::error::PartitionError;
use crate::metrics::Counted;
use crate::partition::state::Offsets;
use crate::partition::{Admitted, PartitionHandle, Watermarks};
use crate::sending::{
    Account, COLD_FRAME_BYTES, FAR_BYTES, FRAME_BYTES, HANDED_BYTES, OnItsWay, Precedence, prioritise, write_all,
};
use crate::session::Session;
use crate::stream::{Frames, StreamError, send_within};
use bytes::Bytes;
use headwater_proto::frame;
use headwater_proto::limits::{MAX_REPLICA_HEADER_BYTES, MAX_REPLICA_PAYLOAD_BYTES};
use headwater_proto::wire::{self, OpenReplica, ReplicaData, ReplicaOpened, ReplicaProgress};
use headwater_proto::{ErrorCode, ResetCode};
use headwater_storage::{Cursor, LogReader, Slice};
use std::sync::Arc;
use tokio::sync::watch;

const _: () = assert!(COLD_FRAME_BYTES <= MAX_REPLICA_PAYLOAD_BYTES && FRAME_BYTES <= MAX_REPLICA_PAYLOAD_BYTES);

/// What a follower is told first.
const OPENING: &str = "the answer to a hello";

/// Why a stream ends with an error frame, or without.
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

/// Serves the stream until the follower ends it, the epoch is over, or the broker's shutdown.
pub(crate) async fn serve(
    session: &Session,
    open: OpenReplica,
    send: &mut quinn::SendStream,
    frames: Frames<wire::Open>,
) -> Result<(), StreamError> {
    session.peer.principal.require_broker(open.broker_id, "its replica streams")?;
    let opening = Opening::from_wire(&open);
    let opening = opening.map_err(|error| StreamError::Refused(ErrorCode::InvalidRequest, error.to_string()))?;
    drop(open);
    let mut frames = frames.followed_by::<ReplicaProgress>(MAX_REPLICA_HEADER_BYTES, 0)?;
    let (member, position, credit_bytes) =
        (opening.hello.member, opening.hello.history.log_end(), opening.credit_bytes);
    let (partition, reader, admitted) = match admit(session, opening).await {
        Ok(admitted) => admitted,
        Err(error) => {
            session.shared.metrics.rejected(ErrorCode::from_number(error.code));
            let refused = ReplicaOpened { error: Some(error), ..ReplicaOpened::default() };
            return send_within(send, &refused, session.patience(), OPENING).await;
        }
    };
    let Admitted { verdict, over } = admitted;
    send_within(send, &message::opened(verdict), session.patience(), OPENING).await?;
    if verdict != super::history::Verdict::Agrees {
        return Ok(());
    }
    let _counted = Counted::new(&session.shared.metrics.replica_streams);
    let credit = Account::default();
    credit.add(credit_bytes);
    let epoch = partition.leader_epoch();
    let watermarks = partition.watermarks();
    let sending = Sending {
        session,
        reader: reader.clone(),
        watermarks: watermarks.clone(),
        partition: partition.clone(),
        credit: &credit,
        handed: Arc::default(),
        precedence: Precedence::Tail,
        told: (-1, -1),
        throttle: Throttle::new(
            &session.shared.throttles,
            &session.shared.metadata,
            (partition.topic_id(), partition.partition()),
            (partition.me().broker, member.broker),
        ),
    };
    let ended = tokio::select! {
        biased;
        () = over.cancelled() => Err(End::Partition(PartitionError::NotLeader(epoch))),
        ended = progress(session, &mut frames, member, &partition, &reader, &credit) => ended,
        () = shut_down(session, watermarks) => {
            // A frame may be half written: nothing more makes sense behind it.
            let _ = send.reset(ResetCode::ShuttingDown.number().into());
            return Ok(());
        }
        ended = sending.run(send, position) => ended,
    };
    match ended {
        Ok(()) => Ok(()),
        Err(End::Stream(error)) => Err(error),
        Err(End::Partition(error)) => {
            // What is half written would be taken for a part of this: it is told by a reset instead.
            tracing::debug!(%error, follower = member.broker, "a replica stream ends");
            let _ = send.reset(ResetCode::Done.number().into());
            Ok(())
        }
    }
}

/// Waits until the broker shuts down and whatever was appended is acknowledged: the followers' reports do that.
async fn shut_down(session: &Session, mut watermarks: watch::Receiver<Watermarks>) {
    session.shared.shutdown.cancelled().await;
    let is_done = |now: &Watermarks| now.offsets.high_watermark >= now.offsets.log_end || now.ended.is_some();
    // An error means that the partition is closed.
    drop(watermarks.wait_for(is_done).await);
}

/// Takes what the follower says, until it ends its side.
async fn progress(
    session: &Session,
    frames: &mut Frames<ReplicaProgress>,
    member: Member,
    partition: &PartitionHandle,
    reader: &LogReader,
    credit: &Account,
) -> Result<(), End> {
    let nonsense = |error: MessageError| StreamError::Refused(ErrorCode::InvalidRequest, error.to_string());
    while let Some(progress) = frames.message().await? {
        credit.add(progress.credit_bytes);
        if let Some(report) = message::report(member, &progress).map_err(nonsense)? {
            partition.reported(report)?;
        }
        if let Some(at) = message::refused_at(&progress).map_err(nonsense)? {
            return examine(session, member, partition, reader, at).await;
        }
    }
    Ok(())
}

/// A follower found something damaged from this offset on: either it is so in the log here, which then is no log to lead with, or it
/// was damaged on its way.
async fn examine(
    session: &Session,
    member: Member,
    partition: &PartitionHandle,
    reader: &LogReader,
    at: i64,
) -> Result<(), End> {
    let (looking, epoch) = (reader.clone(), partition.leader_epoch());
    let found = session.shared.pool.run(move || soundness::damage(&looking, at, epoch)).await;
    let (topic, number, follower) = (partition.topic(), partition.partition(), member.broker);
    match found {
        Ok(None) => {
            if partition.is_first_refusal_of(member) {
                tracing::warn!(
                    %topic, partition = number, follower, offset = at,
                    "a follower found damaged what is sound here: its memory, or what lies between, is at fault; it asks again"
                );
            }
            Ok(())
        }
        Ok(Some(damage)) => Err(partition
            .fence(&format!("{damage} (follower {follower} refused what lies from offset {at} on)"))
            .into()),
        Err(error) => Err(partition.read_failed(&error).into()),
    }
}

async fn admit(session: &Session, opening: Opening) -> Result<(PartitionHandle, LogReader, Admitted), wire::Error> {
    let Opening { topic_id, partition, hello, .. } = opening;
    let shared = &session.shared;
    let partition = shared.partition(topic_id.as_bytes(), partition)?;
    let reader = partition.reader().map_err(|why| why.to_wire())?;
    let (held, _) = reader.extent();
    // Records may have been deleted up to within a batch, and it is pushed whole.
    let from = match hello.history.log_end() <= held.start && held.start < held.end {
        true => {
            let reader = reader.clone();
            let found = shared.pool.run(move || reader.batch_at(held.start)).await;
            Some(found.map_err(|error| partition.read_failed(&error).to_wire())?)
        }
        false => None,
    };
    match partition.hello(hello, from).await {
        Ok(Ok(admitted)) => Ok((partition, reader, admitted)),
        Ok(Err(refusal)) => Err(wire::Error::new(code_of(&refusal), refusal.to_string())),
        Err(error) => Err(error.to_wire()),
    }
}

fn code_of(refusal: &HelloRefusal) -> ErrorCode {
    match refusal {
        HelloRefusal::NotLeader(_) => ErrorCode::NotLeader,
        HelloRefusal::UnknownReplica(_) => ErrorCode::UnknownReplica,
        HelloRefusal::Stale => ErrorCode::StaleReplica,
    }
}

struct Sending<'a> {
    session: &'a Session,
    partition: PartitionHandle,
    reader: LogReader,
    watermarks: watch::Receiver<Watermarks>,
    credit: &'a Account,
    /// Bytes that QUIC has and the follower has not acknowledged.
    handed: Arc<Account>,
    precedence: Precedence,
    /// The high watermark and the log start that the follower was told last.
    told: (i64, i64),
    throttle: Throttle,
}

impl Sending<'_> {
    async fn run(mut self, send: &mut quinn::SendStream, position: i64) -> Result<(), End> {
        prioritise(send, self.precedence);
        let reader = self.reader.clone();
        // Finding the position reads an index and the log, which may not be in memory.
        let sought = self.session.shared.pool.run(move || reader.seek(position.max(reader.log_start_offset()))).await;
        let mut cursor = sought.map_err(|error| self.partition.read_failed(&error))?;
        self.take_precedence(send, self.precedence.after_read(|| self.reader.is_far(&cursor, FAR_BYTES)));
        let mut chunk = FRAME_BYTES;
        loop {
            let offsets = self.offsets()?;
            let room = HANDED_BYTES + self.session.connection.stats().path.cwnd;
            let credit = self.credit.get();
            let (is_granted, has_room) = (credit > 0, self.handed.get() < room);
            let (pause, piece) = self.throttle.allows();
            let most = usize::try_from(credit).unwrap_or(chunk).min(chunk).min(piece);
            let may_push = is_granted && has_room && pause.is_zero();
            let slice = if may_push { self.read(&mut cursor, most)? } else { None };
            if let Some(slice) = slice {
                self.take_precedence(send, self.precedence.after_read(|| self.reader.is_far(&cursor, FAR_BYTES)));
                let cold = !slice.is_resident();
                self.throttle.sends(slice.len() as u64);
                chunk = if cold { COLD_FRAME_BYTES } else { FRAME_BYTES };
                self.push(send, slice, cold).await?;
                continue;
            }
            if may_push {
                self.take_precedence(send, self.precedence.at_the_end());
            }
            if self.told != (offsets.high_watermark, offsets.log_start) {
                let news = self.news(offsets);
                send_within(send, &news, self.session.patience(), "offsets that moved").await?;
                continue;
            }
            tokio::select! {
                biased;
                moved = self.watermarks.changed() => moved.map_err(|_| PartitionError::ShuttingDown)?,
                () = self.credit.until(|credit| credit > 0), if !is_granted => {}
                () = self.handed.until(|handed| handed < room), if !has_room => {}
                () = tokio::time::sleep(pause), if !pause.is_zero() => {}
            }
        }
    }

    fn offsets(&mut self) -> Result<Offsets, End> {
        let watermarks = self.watermarks.borrow_and_update();
        match &watermarks.ended {
            Some(why) => Err(End::Partition(why.clone())),
            None => Ok(watermarks.offsets),
        }
    }

    /// The header that tells of these offsets.
    fn news(&mut self, offsets: Offsets) -> ReplicaData {
        let Offsets { high_watermark, log_start, .. } = offsets;
        self.told = (high_watermark, log_start);
        ReplicaData { high_watermark, log_start_offset: log_start, ..ReplicaData::default() }
    }

    fn take_precedence(&mut self, send: &quinn::SendStream, precedence: Precedence) {
        if precedence != self.precedence {
            self.precedence = precedence;
            prioritise(send, precedence);
        }
    }

    /// The next slice of the log.
    fn read(&self, cursor: &mut Cursor, bytes: usize) -> Result<Option<Slice>, End> {
        Ok(self.reader.read(cursor, bytes, i64::MAX).map_err(|error| self.partition.read_failed(&error))?)
    }

    async fn push(&mut self, send: &mut quinn::SendStream, slice: Slice, cold: bool) -> Result<(), End> {
        let slice = if cold {
            let loaded = self.session.shared.pool.run(move || slice.load().map(|()| slice)).await;
            loaded.map_err(|error| self.partition.read_failed(&error))?
        } else {
            slice
        };
        let offsets = self.offsets()?;
        let segment_base_offset = slice.segment_base_offset();
        let bytes = slice.bytes();
        let length = bytes.len() as u64;
        self.credit.take(length);
        self.handed.add(length);
        let payload = Bytes::from_owner(OnItsWay { bytes, account: Arc::clone(&self.handed) });
        let header = ReplicaData { segment_base_offset, ..self.news(offsets) };
        let mut frame = [frame::encode(&header, payload.len()), payload];
        write_all(send, &mut frame, self.session.patience()).await?;
        self.session.shared.metrics.pushed_bytes.increment(length);
        Ok(())
    }
}
