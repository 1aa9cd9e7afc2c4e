//! Administration of a cluster: who is in it, who leads, where partitions are kept, and which broker may be stopped.
//!
//! Owns: these calls and what they answer. Refuses: plans: the brokers make them. Read next: [`super::types`].

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures::future::join_all;
use headwater_proto::TopicId;
use headwater_proto::wire::{self, call::Request, call_response::Response, move_partitions::What};

use super::{Admin, ClusterDescription};
use crate::error::Error;
use crate::retry::Deadline;

/// Time for one broker to say what it has on its disk: one that does not run says nothing.
const ASK_BROKER: Duration = Duration::from_secs(3);

/// A partition that is led by another broker than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElectedLeader {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Who led it before, if anybody did.
    pub leader_before: Option<i32>,
    /// Who leads it now, or would.
    pub leader: Option<i32>,
    /// Of an unclean election: who has everything that was acknowledged. What of it the new leader misses is lost.
    pub had_everything: Vec<i32>,
}

/// What came of an election.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Elected {
    /// The partitions that are led by another broker than before.
    pub leaders: Vec<ElectedLeader>,
    /// How many more there are of which nobody remembers which they are: an earlier attempt of the same call elected them, and its answer was
    /// lost.
    pub unnamed: u64,
}

/// Which partitions are to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moves {
    /// One partition, to these brokers; the first should lead.
    Partition {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// Where it is to be kept.
        replicas: Vec<i32>,
    },
    /// As few as even out who keeps and who leads how many.
    Rebalance,
    /// All that a broker keeps.
    Drain(i32),
}

/// A partition that moves, or is to be led by another broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionMove {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Where it was kept.
    pub from: Vec<i32>,
    /// Where it is to be kept.
    pub to: Vec<i32>,
}

/// A partition that moves, and how far that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reassignment {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Who leads it, if anybody does.
    pub leader: Option<i32>,
    /// Who keeps it now.
    pub replicas: Vec<i32>,
    /// Those of them that are in sync.
    pub isr: Vec<i32>,
    /// Where it is to be kept.
    pub target: Vec<i32>,
    /// Those that are new to it.
    pub adding: Vec<AddingReplica>,
    /// Those that will not keep it any more.
    pub removing: Vec<i32>,
    /// Bytes a second that a broker is sent at most of all partitions that move to it; 0: no limit.
    pub throttle_bytes_per_second: u64,
}

/// A replica that is new to a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddingReplica {
    /// The broker.
    pub broker_id: i32,
    /// Whether it is in sync already.
    pub in_sync: bool,
    /// Records that it lacks; `None`: the leader or it does not say.
    pub records_behind: Option<i64>,
    /// Bytes that it lacks, by the sizes of the logs; `None` likewise.
    pub bytes_behind: Option<u64>,
}

/// What the cluster bears, and what it lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterHealth {
    /// Of every broker, whether it may be stopped.
    pub brokers: Vec<BrokerHealth>,
    /// The partitions that nobody leads, or the first of very many.
    pub leaderless: Vec<LeaderlessPartition>,
    /// Who votes on the metadata and answers; `None`: the broker that was asked does not say.
    pub quorum: Option<QuorumHealth>,
}

/// Who votes on the metadata and answers the broker that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuorumHealth {
    /// How many vote.
    pub voters: u32,
    /// Those of them that answer, the broker itself among them if it votes.
    pub answering: Vec<i32>,
}

impl QuorumHealth {
    /// How many have to answer, so that anything can be decided.
    pub fn majority(&self) -> u32 {
        self.voters / 2 + 1
    }

    /// Whether too few answer.
    pub fn is_lost(&self) -> bool {
        self.answering.len() < self.majority() as usize
    }
}

/// A partition that nobody leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderlessPartition {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: u32,
    /// Why not, and what is to be done, for a person.
    pub advice: String,
}

/// Whether a broker may be stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerHealth {
    /// The broker.
    pub broker_id: i32,
    /// Why it may not be stopped now; `None`: it may.
    pub why_not: Option<String>,
}

/// Which commands the cluster may be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureLevels {
    /// The cluster's level.
    pub level: u32,
    /// The highest that every broker can.
    pub possible: u32,
    /// The highest that each of them can, by broker.
    pub brokers: Vec<(i32, u32)>,
}

/// A partition, as the metadata know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionState {
    /// Its number.
    pub partition: u32,
    /// Who leads it, if anybody does.
    pub leader: Option<i32>,
    /// Who keeps it.
    pub replicas: Vec<i32>,
    /// Those of them that are in sync.
    pub isr: Vec<i32>,
    /// In-sync replicas without which nothing is acknowledged.
    pub min_insync_replicas: u32,
}

impl PartitionState {
    /// Whether a replica is not in sync.
    pub fn is_under_replicated(&self) -> bool {
        self.isr.len() < self.replicas.len()
    }

    /// Whether it takes no records with acks=all, because too few replicas are in sync.
    pub fn is_under_min_isr(&self) -> bool {
        self.isr.len() < self.min_insync_replicas as usize
    }

    /// Whether nobody leads it.
    pub fn is_offline(&self) -> bool {
        self.leader.is_none()
    }
}

impl Admin {
    /// Who is in the cluster, who votes on its metadata, and who is the controller.
    ///
    /// # Errors
    /// When the broker cannot be asked, or has not heard from a majority.
    pub async fn describe_cluster(&self) -> Result<ClusterDescription, Error> {
        let request = wire::DescribeCluster { stale: self.stale };
        Ok(call!(self, "describe cluster", DescribeCluster(request) => DescribeCluster).into())
    }

    /// A broker votes on the metadata from now on, or only follows them. Done already is done.
    ///
    /// # Errors
    /// When the broker is unknown, has not caught up, or the quorum would be lost by it.
    pub async fn change_voters(&self, broker_id: i32, votes: bool) -> Result<(), Error> {
        let request = wire::ChangeVoters { broker_id, votes };
        call!(self, "change voters", ChangeVoters(request) => Done);
        Ok(())
    }

    /// Forgets a broker that does not run, does not vote and keeps no partition.
    ///
    /// # Errors
    /// When one of that is not so, by name.
    pub async fn remove_broker(&self, broker_id: i32) -> Result<(), Error> {
        let request = wire::RemoveBroker { broker_id };
        call!(self, "remove broker", RemoveBroker(request) => Done);
        Ok(())
    }

    /// Has the first of each partition's replicas lead it, where that one is in sync: of this topic, or of all. Answers what changed.
    ///
    /// # Errors
    /// When there is no such topic.
    pub async fn elect_preferred(&self, topic: Option<&str>) -> Result<Elected, Error> {
        self.elect(false, topic, false).await
    }

    /// Has a replica lead each partition that nobody leads, of this topic or of all, **though it may miss acknowledged records: those
    /// are lost then**. With `validate_only` it is only said what would be.
    ///
    /// # Errors
    /// When there is no such topic.
    pub async fn elect_unclean(&self, topic: Option<&str>, validate_only: bool) -> Result<Elected, Error> {
        self.elect(true, topic, validate_only).await
    }

    async fn elect(&self, unclean: bool, topic: Option<&str>, validate_only: bool) -> Result<Elected, Error> {
        let request = wire::ElectLeaders { unclean, topic: topic.unwrap_or_default().to_owned(), validate_only };
        let answer = call!(self, "elect leaders", ElectLeaders(request) => ElectLeaders);
        let leaders = answer.partitions.into_iter().map(|it| ElectedLeader {
            topic: it.topic,
            partition: it.partition,
            leader_before: some_broker(it.leader_before),
            leader: some_broker(it.leader),
            had_everything: it.had_everything,
        });
        Ok(Elected { leaders: leaders.collect(), unnamed: answer.unnamed })
    }

    /// Moves partitions; when this returns, that has begun ([`reassignments`](Self::reassignments) says how far it is). `throttle`:
    /// bytes a second that each broker is sent at most, of all partitions together that move to it. With `validate_only` it is only said what would be.
    ///
    /// # Errors
    /// When one cannot move there, by name.
    pub async fn move_partitions(
        &self,
        moves: Moves,
        throttle: Option<u64>,
        validate_only: bool,
    ) -> Result<Vec<PartitionMove>, Error> {
        let what = match moves {
            Moves::Partition { topic, partition, replicas } => {
                What::Partition(wire::PartitionReplicas { topic, partition, replicas })
            }
            Moves::Rebalance => What::Rebalance(wire::Rebalance {}),
            Moves::Drain(broker_id) => What::Drain(broker_id),
        };
        let throttle_bytes_per_second = throttle.unwrap_or(0);
        let request = wire::MovePartitions { what: Some(what), throttle_bytes_per_second, validate_only };
        Ok(moved(call!(self, "move partitions", MovePartitions(request) => MovePartitions)))
    }

    /// Partitions that move stay where they were: one, all of a topic, all that leave a broker, or all. Answers which.
    ///
    /// # Errors
    /// When the one that is named does not move, or only its new replicas have everything by now.
    pub async fn cancel_moves(
        &self,
        topic: Option<&str>,
        partition: Option<u32>,
        leaving: Option<i32>,
    ) -> Result<Vec<PartitionMove>, Error> {
        let request = wire::CancelMoves { topic: topic.unwrap_or_default().to_owned(), partition, leaving };
        Ok(moved(call!(self, "cancel moves", CancelMoves(request) => MovePartitions)))
    }

    /// Every partition that moves, and how far its new replicas are.
    ///
    /// # Errors
    /// When the broker cannot be asked. One that keeps a replica and does not answer leaves a gap.
    pub async fn reassignments(&self) -> Result<Vec<Reassignment>, Error> {
        let answer = call!(self, "list moves", ListMoves(wire::ListMoves { stale: self.stale }) => ListMoves);
        let moving = answer.partitions;
        let mut asked: BTreeMap<i32, Vec<wire::ReplicaName>> = BTreeMap::new();
        for it in &moving {
            for broker in it.adding.iter().chain([&it.leader]).filter(|broker| **broker >= 0) {
                let name = wire::ReplicaName { topic_id: it.topic_id.clone(), partition: it.partition };
                asked.entry(*broker).or_default().push(name);
            }
        }
        if !asked.is_empty() {
            // Whoever is asked has to be known where.
            self.metadata(&[]).await?;
        }
        let told =
            join_all(asked.into_iter().map(async |(broker, replicas)| (broker, self.replicas(broker, replicas).await)));
        let mut held: HashMap<(i32, Option<TopicId>, u32), wire::ReplicaDescription> = HashMap::new();
        for (broker, told) in told.await {
            match told {
                Ok(told) => held.extend(
                    told.into_iter()
                        .map(|(name, it)| ((broker, TopicId::from_slice(&name.topic_id), name.partition), it)),
                ),
                Err(error) => tracing::debug!(broker, %error, "a broker does not say what it has"),
            }
        }
        let progress = moving.into_iter().map(|it| {
            let id = TopicId::from_slice(&it.topic_id);
            let of = |broker: i32| held.get(&(broker, id, it.partition));
            let leader = of(it.leader).filter(|leader| leader.is_there);
            let adding = it.adding.iter().map(|broker| {
                let behind = leader.zip(of(*broker));
                AddingReplica {
                    broker_id: *broker,
                    in_sync: it.isr.contains(broker),
                    records_behind: behind.map(|(leader, new)| {
                        (leader.log_end_offset - new.log_end_offset.max(leader.log_start_offset)).max(0)
                    }),
                    bytes_behind: behind.map(|(leader, new)| leader.size_bytes.saturating_sub(new.size_bytes)),
                }
            });
            Reassignment {
                adding: adding.collect(),
                topic: it.topic,
                partition: it.partition,
                leader: some_broker(it.leader),
                replicas: it.replicas,
                isr: it.isr,
                target: it.target,
                removing: it.removing,
                throttle_bytes_per_second: it.throttle_bytes_per_second,
            }
        });
        Ok(progress.collect())
    }

    /// What a broker has of these on its disk.
    async fn replicas(
        &self,
        broker_id: i32,
        replicas: Vec<wire::ReplicaName>,
    ) -> Result<Vec<(wire::ReplicaName, wire::ReplicaDescription)>, Error> {
        let what = "describe replicas";
        let deadline = Deadline::within(ASK_BROKER);
        let request = Request::DescribeReplicas(wire::DescribeReplicas { replicas: replicas.clone() });
        let asked = async {
            let place = self.connections.lease(broker_id, 0).await?;
            place.link.call(what, request, deadline).await
        };
        let answer = tokio::time::timeout_at(deadline.at, asked).await;
        match answer.map_err(|_| Error::TimedOut { what, after: deadline.after })?? {
            Response::DescribeReplicas(told) if told.replicas.len() == replicas.len() => {
                Ok(replicas.into_iter().zip(told.replicas).collect())
            }
            _ => Err(Error::Protocol(format!("an answer that does not belong to {what}"))),
        }
    }

    /// Of every broker, whether it may be stopped now without anything becoming unavailable; and what has no leader.
    ///
    /// # Errors
    /// When the broker cannot be asked, or has not heard from a majority.
    pub async fn cluster_health(&self) -> Result<ClusterHealth, Error> {
        let answer =
            call!(self, "cluster health", ClusterHealth(wire::ClusterHealth { stale: self.stale }) => ClusterHealth);
        let brokers = answer
            .brokers
            .into_iter()
            .map(|it| BrokerHealth { broker_id: it.broker_id, why_not: (!it.may_stop).then_some(it.why_not) });
        let brokers = brokers.collect();
        let leaderless = answer.leaderless.into_iter();
        let leaderless =
            leaderless.map(|it| LeaderlessPartition { topic: it.topic, partition: it.partition, advice: it.advice });
        let quorum = (answer.voters > 0).then_some(QuorumHealth { voters: answer.voters, answering: answer.answering });
        Ok(ClusterHealth { brokers, leaderless: leaderless.collect(), quorum })
    }

    /// Which commands the cluster may be given, and which its brokers can.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn feature_levels(&self) -> Result<FeatureLevels, Error> {
        self.upgrade(false).await
    }

    /// Raises the feature level to the highest that every broker can. It never falls: no older broker comes in after this.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn finalize_upgrade(&self) -> Result<FeatureLevels, Error> {
        self.upgrade(true).await
    }

    async fn upgrade(&self, finalize: bool) -> Result<FeatureLevels, Error> {
        let request = wire::UpgradeCluster { finalize };
        let answer = call!(self, "upgrade cluster", UpgradeCluster(request) => UpgradeCluster);
        let brokers = answer.brokers.into_iter().map(|it| (it.broker_id, it.feature_level)).collect();
        Ok(FeatureLevels { level: answer.feature_level, possible: answer.possible, brokers })
    }

    /// Every topic's partitions as the metadata know them, in the order of the topics' names.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn partition_states(&self) -> Result<BTreeMap<String, Vec<PartitionState>>, Error> {
        let request = wire::Metadata { confirmed: !self.stale, ..wire::Metadata::default() };
        let answer = call!(self, "metadata", Metadata(request) => Metadata);
        let of_topic = |topic: wire::TopicMetadata| {
            let states = topic.partitions.into_iter().map(|it| PartitionState {
                partition: it.partition,
                leader: some_broker(it.leader),
                replicas: it.replicas,
                isr: it.isr,
                min_insync_replicas: topic.min_insync_replicas,
            });
            (topic.name, states.collect())
        };
        Ok(answer.topics.into_iter().map(of_topic).collect())
    }
}

fn some_broker(id: i32) -> Option<i32> {
    (id >= 0).then_some(id)
}

fn moved(answer: wire::MovePartitionsResponse) -> Vec<PartitionMove> {
    let moves = answer.moves.into_iter();
    moves.map(|it| PartitionMove { topic: it.topic, partition: it.partition, from: it.from, to: it.to }).collect()
}
