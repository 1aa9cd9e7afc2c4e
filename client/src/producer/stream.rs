//! The produce stream of a partition: opening it to whoever leads, and what is still to be written of a frame.
//!
//! Owns: where a stream is opened, which refusals of it may pass, producer ids. Refuses: what is sent on it, and what the
//! answers mean (see [`super::partition`]).

use std::sync::Arc;

use bytes::{Buf, Bytes};
use headwater_proto::frame::FrameEvent;
use headwater_proto::wire::{self, call, call_response::Response, open};
use headwater_proto::{ErrorCode, ResetCode};
use quinn::{SendStream, VarInt};
use tokio::time::Instant;

use super::partition::{Partition, Shared};
use super::window::Identity;
use crate::connection::{Connections, Lease};
use crate::error::{Error, ProduceError, Refusal};
use crate::metadata::{PartitionInfo, TopicInfo, is_stale};
use crate::stream::FrameReader;
use crate::watch::LeaderWatch;

/// Brokers in a row whose word on who leads is taken before others are asked.
const HINTS: u32 = 3;

/// What is still to be written of a frame.
#[derive(Default)]
pub(crate) struct Outgoing {
    pub(crate) request_id: u64,
    pub(crate) front: Bytes,
    pub(crate) payload: Bytes,
}

impl Outgoing {
    pub(crate) fn is_done(&self) -> bool {
        self.front.is_empty() && self.payload.is_empty()
    }

    /// What may be written within `credit` bytes of payload.
    pub(crate) fn chunks(&self, credit: u64) -> [Bytes; 2] {
        let payload = self.payload.len().min(usize::try_from(credit).unwrap_or(usize::MAX));
        [self.front.clone(), self.payload.slice(..payload)]
    }

    /// `bytes` were written. Returns how many of them were payload.
    pub(crate) fn advance(&mut self, bytes: usize) -> u64 {
        let front = bytes.min(self.front.len());
        self.front.advance(front);
        self.payload.advance(bytes - front);
        (bytes - front) as u64
    }
}

/// An open produce stream.
pub(crate) struct Stream {
    pub(crate) lease: Lease,
    pub(crate) send: SendStream,
    pub(crate) answers: FrameReader<wire::ProduceResponse>,
    pub(crate) credit: u64,
    pub(crate) outgoing: Outgoing,
    /// Requests that were sent and not answered.
    pub(crate) sent: usize,
}

impl Stream {
    /// Waits until the broker's log was given everything that was written: then the broker ends its side too. That its
    /// transport has the bytes is not enough, since it drops what nobody has read when the connection ends.
    pub(crate) async fn finish(&mut self) -> Result<(), Error> {
        let lost = |reason: String| Error::ConnectionLost { address: self.lease.link.address().to_string(), reason };
        self.send.finish().map_err(|e| lost(e.to_string()))?;
        while let Some(event) = self.answers.next().await? {
            if let FrameEvent::Header { message: wire::ProduceResponse { error: Some(error), .. }, .. } = event {
                return Err(Error::Refused(error.into()));
            }
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Dropping would finish it, as if half a frame were whole.
        let _ = self.send.reset(VarInt::from_u32(ResetCode::Done.number()));
    }
}

/// Why no stream can be had.
pub(crate) enum NoStream {
    /// Trying again can help.
    Later(Error),
    /// It cannot, for the records that are here now.
    Refused(ProduceError),
    /// The topic is gone.
    Gone(ProduceError),
}

impl NoStream {
    /// What the refusal of a stream comes to, once whoever leads was asked.
    pub(crate) fn of(refusal: Refusal, topic: &Arc<str>, partition: u32) -> NoStream {
        match refusal.code {
            _ if refusal.retryable => NoStream::Later(Error::Refused(refusal)),
            ErrorCode::InvalidProducerEpoch => NoStream::Later(Error::Refused(refusal)),
            // The broker that leads now has not heard of the topic yet.
            ErrorCode::UnknownTopicId | ErrorCode::UnknownPartition => NoStream::Later(Error::Refused(refusal)),
            _ => NoStream::Refused(ProduceError::Refused { topic: topic.clone(), partition, refusal }),
        }
    }
}

/// Asks for a producer id that nobody else has, or for an epoch after that of the `present` one.
pub(crate) fn identity_request(present: Option<Identity>) -> wire::AllocateProducerId {
    wire::AllocateProducerId {
        producer_id: present.map(|identity| identity.id),
        producer_epoch: present.map_or(0, |identity| identity.epoch.into()),
    }
}

/// The answer to that.
pub(crate) fn identity_given(answer: wire::AllocateProducerIdResponse) -> Result<Identity, Error> {
    let epoch = i16::try_from(answer.producer_epoch)
        .map_err(|_| Error::Protocol(format!("producer epoch {}", answer.producer_epoch)))?;
    Ok(Identity { id: answer.producer_id, epoch })
}

/// A producer id that nobody else has, or an epoch after that of the `present` one.
pub(crate) async fn allocate_identity(
    connections: &Arc<Connections>,
    present: Option<Identity>,
) -> Result<Identity, Error> {
    let request = call::Request::AllocateProducerId(identity_request(present));
    match connections.call("allocate producer id", request).await? {
        Response::AllocateProducerId(answer) => identity_given(answer),
        _ => Err(Error::Protocol("no answer to allocate producer id".into())),
    }
}

/// Opens a produce stream to a leader, or hears why not.
async fn open_at(
    shared: &Shared,
    info: &TopicInfo,
    partition: u32,
    identity: Option<Identity>,
    leader: PartitionInfo,
) -> Result<Result<(Stream, wire::ProduceOpened), Refusal>, Error> {
    let lease = shared.connections.lease(leader.leader, 0).await?;
    let request = wire::OpenProduce {
        topic_id: info.id.to_wire(),
        partition,
        producer_id: identity.map_or(-1, |i| i.id),
        producer_epoch: identity.map_or(-1, |i| i.epoch.into()),
        acks: shared.acks.into(),
        leader_epoch: leader.leader_epoch,
    };
    let (send, recv) = lease.link.open(open::Stream::Produce(request)).await?;
    let mut answers = FrameReader::<wire::ProduceOpened>::new(recv, lease.link.address().clone());
    let opened = answers.message().await?.ok_or_else(|| Error::ConnectionLost {
        address: lease.link.address().to_string(),
        reason: "the produce stream ended before it was opened".into(),
    })?;
    if let Some(error) = opened.error {
        return Ok(Err(error.into()));
    }
    let (answers, credit) = (answers.followed_by()?, opened.credit_bytes);
    Ok(Ok((Stream { lease, send, answers, credit, outgoing: Outgoing::default(), sent: 0 }, opened)))
}

/// Opens a produce stream to the leader, as it is known, and to another one as soon as that is heard of. Where that is `doubted`, the broker is asked; so it is, once, where
/// whoever was thought to lead refuses.
pub(crate) async fn open_stream(
    shared: &Shared,
    partition: &Partition,
    identity: Option<Identity>,
    mut doubted: Option<Instant>,
    (watch, leader_epoch): (&mut LeaderWatch, &mut i32),
) -> Result<(Stream, wire::ProduceOpened), NoStream> {
    let later = |error: Error| if error.retryable() { NoStream::Later(error) } else { NoStream::Refused(error.into()) };
    let name = &partition.topic.name;
    let gone = |why: String| {
        let refusal = wire::Error::new(ErrorCode::UnknownTopicId, why).into();
        NoStream::Gone(ProduceError::Refused { topic: name.clone(), partition: partition.partition, refusal })
    };
    let unknown_topic = |error: Error| match error.code() {
        Some(ErrorCode::UnknownTopic) => NoStream::Gone(ProduceError::UnknownTopic { topic: name.clone() }),
        _ => later(error),
    };
    let (mut asked_anew, mut hints) = (doubted.is_some(), 0);
    loop {
        let info = match doubted {
            Some(_) => shared.metadata.newer_than(name, doubted).await,
            None => shared.metadata.topic(name).await,
        };
        let info = info.map_err(unknown_topic)?;
        if info.id != partition.topic.id {
            return Err(gone(format!("topic {name:?} was deleted and created anew")));
        }
        let leader = info.leader(partition.partition).filter(|leader| leader.leader >= 0);
        let refusal = match leader {
            None => wire::Error::new(ErrorCode::NotLeader, "the partition has no leader").into(),
            Some(leader) => {
                *leader_epoch = leader.leader_epoch;
                let opened = tokio::select! {
                    biased;
                    opened = open_at(shared, &info, partition.partition, identity, leader) => opened,
                    _ = watch.replaced(leader.leader_epoch) => {
                        // What is known now is newer.
                        doubted = None;
                        continue;
                    }
                };
                match opened.map_err(later)? {
                    Ok(opened) => return Ok(opened),
                    Err(refusal) => refusal,
                }
            }
        };
        if let Some(hint) = &refusal.leader
            && hints < HINTS
            && shared.metadata.hinted(&info, partition.partition, hint)
        {
            hints += 1;
            doubted = None;
            continue;
        }
        // Another may lead by now, or the topic be gone; ask once, then wait.
        if !std::mem::replace(&mut asked_anew, true) && is_stale(refusal.code) {
            doubted = Some(info.at);
            continue;
        }
        return Err(NoStream::of(refusal, name, partition.partition));
    }
}
