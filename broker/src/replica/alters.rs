//! What this broker's leaders say of who is in sync, on its way to the metadata.
//!
//! A failover, or a broker that comes back, has thousands of partitions say so at once: they go together, one command at a time, and what
//! comes meanwhile waits for the next. Where nobody takes the command, as the quorum is lost, it is tried again after pauses that grow, not
//! once for each partition.
//!
//! Owns: the queue and its pauses. Refuses: to decide who is in sync ([`super::leader`]) and whether that may be (the metadata).

use super::leader::{AlterPartition, Altered};
use crate::metadata::command::{self, command::Command as Kind};
use crate::metadata::state::Outcome;
use crate::metadata::{MetadataError, MetadataHandle};
use headwater_proto::TopicId;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Most partitions of one command.
const MOST: usize = 2_000;

/// How long the first one waits for others: a broker that is lost or comes back concerns all of them.
const GATHER: Duration = Duration::from_millis(10);

/// Pauses after a command that nobody took.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// One partition's proposal, and who waits for what becomes of it. Where it is committed, or is too old to count, the metadata say so
/// themselves.
pub(super) struct Wanted {
    pub(super) topic_id: TopicId,
    pub(super) partition: u32,
    pub(super) alter: AlterPartition,
    pub(super) tell: Box<dyn FnOnce(Altered) + Send>,
}

/// Proposes what comes, until nobody is left who proposes.
pub(super) async fn run(metadata: MetadataHandle, mut inbox: mpsc::UnboundedReceiver<Wanted>) {
    let mut pause = Duration::ZERO;
    let mut wanted = Vec::new();
    while inbox.recv_many(&mut wanted, MOST).await > 0 {
        sleep(GATHER).await;
        while wanted.len() < MOST
            && let Ok(more) = inbox.try_recv()
        {
            wanted.push(more);
        }
        let partitions = wanted.iter().map(message).collect();
        let command = Kind::AlterPartitions(command::AlterPartitions { partitions });
        match metadata.propose(command).await {
            Ok(Outcome::PartitionsAltered { refused, .. }) => {
                if !pause.is_zero() {
                    tracing::info!("changes of the in-sync replicas come into force again");
                }
                pause = Duration::ZERO;
                for (place, Wanted { tell, .. }) in wanted.drain(..).enumerate() {
                    if refused.contains(&u32::try_from(place).unwrap_or(u32::MAX)) {
                        tell(Altered::Refused);
                    }
                }
            }
            Ok(_) => wanted.clear(),
            Err(error) => {
                if pause.is_zero() {
                    let partitions = wanted.len();
                    tracing::warn!(%error, partitions, "the in-sync replicas cannot be changed now; it is tried again");
                }
                pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                // Each of them proposes again once it is told: not before that makes sense.
                sleep(pause).await;
                let altered = what_became(&error);
                wanted.drain(..).for_each(|Wanted { tell, .. }| tell(altered.clone()));
            }
        }
    }
}

fn message(wanted: &Wanted) -> command::AlterPartition {
    let Wanted { topic_id, partition, alter, .. } = wanted;
    let member = |member: &super::Member| command::Member {
        broker_id: member.broker,
        incarnation: member.incarnation.as_bytes().to_vec().into(),
    };
    command::AlterPartition {
        topic_id: topic_id.to_wire(),
        partition: *partition,
        leader: Some(member(&alter.leader)),
        leader_epoch: alter.leader_epoch,
        partition_epoch: alter.partition_epoch,
        isr: alter.isr.iter().map(member).collect(),
    }
}

/// What became of a command that was not answered with its success.
fn what_became(error: &MetadataError) -> Altered {
    match error {
        MetadataError::Behind | MetadataError::NoLeader | MetadataError::Ended(_) => Altered::Refused,
        _ => Altered::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{CreateTopic, RegisterBroker, Replicas, UnfenceBroker};
    use crate::metadata::handle::common::Common;
    use crate::replica::Member;
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;
    use uuid::Uuid;

    #[test]
    fn only_what_is_never_committed_counts_as_refused() {
        assert_eq!(what_became(&MetadataError::NoLeader), Altered::Refused);
        for unknown in [MetadataError::TimedOut, MetadataError::ShuttingDown] {
            assert_eq!(what_became(&unknown), Altered::Unknown, "{unknown}");
        }
    }

    fn member(broker: i32) -> Member {
        Member { broker, incarnation: Uuid::from_u128(broker.unsigned_abs().into()) }
    }

    fn incarnation(broker: i32) -> bytes::Bytes {
        member(broker).incarnation.as_bytes().to_vec().into()
    }

    /// A thousand partitions that lose a replica at once cost some commands, not a thousand.
    #[tokio::test]
    async fn what_comes_together_goes_together_and_each_is_answered_for_itself() {
        const PARTITIONS: u32 = 1_000;
        let common = Common::new("cluster");
        for broker_id in [1, 2] {
            let boots = 1;
            let register =
                RegisterBroker { broker_id, incarnation: incarnation(broker_id), boots, ..Default::default() };
            common.apply(Kind::RegisterBroker(register)).unwrap();
            let unfence = UnfenceBroker { broker_id, incarnation: incarnation(broker_id) };
            common.control(Kind::UnfenceBroker(unfence)).unwrap();
        }
        let topic_id = TopicId::from_bytes([1; 16]);
        let create = CreateTopic {
            name: "t".into(),
            topic_id: topic_id.to_wire(),
            partitions: vec![Replicas { brokers: vec![1, 2] }; PARTITIONS as usize],
            ..Default::default()
        };
        common.apply(Kind::CreateTopic(create)).unwrap();
        let before = common.state().index();
        let stop = CancellationToken::new();
        let carry_out = Box::new(|_| Box::pin(std::future::ready(())) as futures::future::BoxFuture<'static, ()>);
        let (metadata, task) = common.handle(common.state(), carry_out, stop.clone());
        let task = tokio::spawn(task);

        let (queue, inbox) = mpsc::unbounded_channel();
        let (tell, mut told) = mpsc::unbounded_channel();
        for partition in 0..PARTITIONS {
            // One of them names a start of the other broker that is no more, and one speaks of the past.
            let other =
                if partition == 7 { Member { incarnation: Uuid::from_u128(99), ..member(2) } } else { member(2) };
            let isr = if partition == 7 { vec![member(1), other] } else { vec![member(1)] };
            let partition_epoch = if partition == 9 { -1 } else { 0 };
            let alter = AlterPartition { leader: member(1), leader_epoch: 0, partition_epoch, isr };
            let tell = tell.clone();
            let tell = Box::new(move |altered| tell.send((partition, altered)).unwrap());
            drop(queue.send(Wanted { topic_id, partition, alter, tell }));
        }
        drop((queue, tell));
        run(metadata, inbox).await;
        assert_eq!(told.recv().await, Some((7, Altered::Refused)));
        assert_eq!(told.recv().await, None, "the others are told by the metadata");
        let state = common.state();
        assert_eq!(state.index(), before + 1, "one command");
        let topic = Arc::clone(state.topic("t").unwrap());
        let shrunk = topic.partitions.iter().filter(|partition| partition.isr == [1]).count();
        assert_eq!(shrunk, PARTITIONS as usize - 2);
        stop.cancel();
        task.await.unwrap();
    }
}
