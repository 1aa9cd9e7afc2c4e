//! Calls: one request, one answer. Every call but hello is answered here.
//!
//! Owns: what each call means in terms of metadata, partitions and groups, and the refusals that need no more than
//! those. Refuses: deadlines (the session keeps them) and decisions (metadata and groups make them).
//! Read next: [`crate::metadata`], [`crate::group`].

use crate::clock::now_ms;
use crate::cluster_calls::{self, health, moves};
use crate::command_id::CommandId;
use crate::error::PartitionError;
use crate::group::{CommitEntry, EntryError, Group, GroupError, OwnedSpeaker};
use crate::member::to_topic_partitions;
use crate::metadata::command::{self, command::Command as Kind};
use crate::metadata::handle::{new_topic_id, topic_to_change};
use crate::metadata::name::OFFSETS_TOPIC;
use crate::metadata::{MetadataError, MetadataState, Outcome, Refusal, Topic, name, placement};
use crate::os;
use crate::partition::PartitionHandle;
use crate::shared::Shared;
use crate::topic_config::{self, TopicConfig, TopicValues};
use crate::watch::{broker_nodes, in_touch, out_of_touch};
use futures::{StreamExt, stream};
use headwater_proto::limits::MAX_PARTITIONS_PER_TOPIC;
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::wire::{self, CallResponse, Done, offset_query::At};
use headwater_proto::{ErrorCode, TopicId};
use headwater_storage::ReadError;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{Semaphore, oneshot};

/// Offsets that one connection looks up in its logs at the same time: each may walk through a batch of
/// `MAX_DECOMPRESSED_BATCH_BYTES`.
pub(crate) const LOOKUPS_AT_ONCE: usize = 4;

type Answer = Result<Response, wire::Error>;

/// Answers a call. `lookups`: of the connection's [`LOOKUPS_AT_ONCE`], those that are free.
pub(crate) async fn answer(shared: &Arc<Shared>, lookups: &Arc<Semaphore>, call: wire::Call) -> CallResponse {
    let id = match CommandId::of_call(&call.command_id) {
        Ok(id) => id,
        Err(error) => return CallResponse { response: Some(Response::Error(error)) },
    };
    let answer = match call.request.as_ref().is_some_and(rests_on_the_quorum) {
        false => perform(shared, lookups, id, call.request).await,
        true => tokio::select! {
            biased;
            answer = async {
                in_touch(shared).await;
                perform(shared, lookups, id, call.request).await
            } => answer,
            error = out_of_touch(shared) => Err(error),
        },
    };
    CallResponse { response: Some(answer.unwrap_or_else(Response::Error)) }
}

async fn perform(shared: &Arc<Shared>, lookups: &Arc<Semaphore>, id: CommandId, request: Option<Request>) -> Answer {
    match request {
        None | Some(Request::Hello(_)) => {
            Err(wire::Error::new(ErrorCode::InvalidRequest, "a call that this broker does not know"))
        }
        Some(Request::DescribeBroker(_)) => Ok(describe_broker(shared)),
        Some(Request::Metadata(request)) => metadata(shared, &request).await,
        Some(Request::CreateTopic(request)) => create_topic(shared, request, id).await,
        Some(Request::DescribeTopic(request)) => describe_topic(shared, &request).await,
        Some(Request::AlterTopic(request)) => alter_topic(shared, request, id).await,
        Some(Request::AddPartitions(request)) => add_partitions(shared, request, id).await,
        Some(Request::DeleteTopic(request)) => delete_topic(shared, request, id).await,
        Some(Request::DeleteRecords(request)) => delete_records(shared, request).await,
        Some(Request::ListOffsets(request)) => Ok(list_offsets(shared, lookups, request).await),
        Some(Request::AllocateProducerId(request)) => allocate_producer_id(shared, &request).await,
        Some(Request::CommitOffsets(request)) => commit_offsets(shared, request).await,
        Some(Request::FetchOffsets(request)) => fetch_offsets(shared, request).await,
        Some(Request::FindCoordinator(request)) => find_coordinator(shared, &request).await,
        Some(Request::ListGroups(request)) => list_groups(shared, &request).await,
        Some(Request::DescribeGroup(request)) => describe_group(shared, &request.group).await,
        Some(Request::DeleteGroup(request)) => delete_group(shared, &request.group).await,
        Some(Request::DeleteOffsets(request)) => delete_offsets(shared, request).await,
        Some(Request::DescribeCluster(request)) => cluster_calls::describe(shared, &request).await,
        Some(Request::ChangeVoters(request)) => cluster_calls::change_voters(shared, &request).await,
        Some(Request::RemoveBroker(request)) => cluster_calls::remove_broker(shared, &request, id).await,
        Some(Request::ElectLeaders(request)) => moves::elect(shared, request, id).await,
        Some(Request::MovePartitions(request)) => moves::move_partitions(shared, request, id).await,
        Some(Request::CancelMoves(request)) => moves::cancel(shared, request, id).await,
        Some(Request::ListMoves(request)) => moves::list(shared, &request).await,
        Some(Request::DescribeReplicas(request)) => moves::describe_replicas(shared, request),
        Some(Request::ClusterHealth(request)) => health::health(shared, &request).await,
        Some(Request::UpgradeCluster(request)) => health::upgrade(shared, &request, id).await,
    }
}

/// Whether a broker that is cut off from the metadata quorum cannot answer this, or would answer with what was true once. It may be asked
/// of another broker, though this one was about to do it: commands are done once under their id.
fn rests_on_the_quorum(request: &Request) -> bool {
    match request {
        Request::Metadata(request) => request.confirmed,
        Request::DescribeTopic(request) => !request.stale,
        Request::DescribeCluster(request) => !request.stale,
        Request::ListMoves(request) => !request.stale,
        Request::ClusterHealth(request) => !request.stale,
        Request::CreateTopic(_)
        | Request::AlterTopic(_)
        | Request::AddPartitions(_)
        | Request::DeleteTopic(_)
        | Request::AllocateProducerId(_)
        | Request::FindCoordinator(_)
        | Request::ChangeVoters(_)
        | Request::RemoveBroker(_)
        | Request::ElectLeaders(_)
        | Request::MovePartitions(_)
        | Request::CancelMoves(_)
        | Request::UpgradeCluster(_) => true,
        // What is asked of this broker's data and groups, their leadership answers for.
        Request::Hello(_)
        | Request::DescribeBroker(_)
        | Request::DeleteRecords(_)
        | Request::ListOffsets(_)
        | Request::CommitOffsets(_)
        | Request::FetchOffsets(_)
        | Request::ListGroups(_)
        | Request::DescribeGroup(_)
        | Request::DeleteGroup(_)
        | Request::DeleteOffsets(_)
        | Request::DescribeReplicas(_) => false,
    }
}

fn describe_broker(shared: &Shared) -> Response {
    Response::DescribeBroker(wire::DescribeBrokerResponse {
        broker_id: shared.broker_id(),
        cluster_id: shared.cluster_id.clone(),
        software: crate::SOFTWARE.to_owned(),
        pid: std::process::id(),
        started_ms: shared.started_ms,
        cpu_seconds: os::cpu_seconds(),
        connections: shared.connections.count(),
        io_threads: shared.network_threads,
        resident_bytes: os::resident_bytes().unwrap_or(0),
        admin_address: shared.admin.to_string(),
    })
}

// ---------------------------------------------------------------- topics

async fn metadata(shared: &Shared, request: &wire::Metadata) -> Answer {
    cluster_calls::see(shared, !request.confirmed).await?;
    // Whoever names a topic may have heard of it from another broker.
    let behind = match request.confirmed || knows(&shared.metadata.state(), request) {
        true => None,
        false => cluster_calls::look_again(shared).await.err(),
    };
    let state = shared.metadata.state();
    let mut topics = Vec::new();
    if request.topics.is_empty() && request.topic_ids.is_empty() {
        topics.extend(state.topics().map(|topic| topic_metadata(shared, topic)));
    }
    for name in &request.topics {
        topics.push(match state.topic(name) {
            Some(topic) => topic_metadata(shared, topic),
            None => {
                let error = Some(behind.clone().unwrap_or_else(|| unknown_topic(name)));
                wire::TopicMetadata { name: name.clone(), error, ..wire::TopicMetadata::default() }
            }
        });
    }
    for bytes in &request.topic_ids {
        let id = parse_topic_id(bytes)?;
        topics.push(match state.topic_by_id(&id) {
            Some(topic) => topic_metadata(shared, topic),
            None => {
                let error = Some(behind.clone().unwrap_or_else(|| unknown_topic_id(&id)));
                wire::TopicMetadata { topic_id: bytes.clone(), error, ..wire::TopicMetadata::default() }
            }
        });
    }
    Ok(Response::Metadata(wire::MetadataResponse {
        version: state.index(),
        cluster_id: state.cluster_id().to_owned(),
        brokers: broker_nodes(shared, &state),
        topics,
    }))
}

/// Whether all topics that are named are known.
fn knows(state: &MetadataState, request: &wire::Metadata) -> bool {
    let is_known = |id: TopicId| state.topic_by_id(&id).is_some();
    request.topics.iter().all(|name| state.topic(name).is_some())
        && request.topic_ids.iter().all(|id| TopicId::from_slice(id).is_none_or(is_known))
}

fn topic_metadata(shared: &Shared, topic: &Topic) -> wire::TopicMetadata {
    let config = config_of(shared, topic);
    let partitions = topic.partitions.iter().zip(0u32..).map(|(partition, number)| wire::PartitionMetadata {
        partition: number,
        leader: partition.leader,
        leader_epoch: partition.leader_epoch,
        replicas: partition.replicas.clone(),
        isr: partition.isr.clone(),
    });
    wire::TopicMetadata {
        name: topic.name.clone(),
        topic_id: topic.id.to_wire(),
        internal: topic.internal,
        replication_factor: topic.partitions.first().map_or(0, |partition| partition.replicas.len() as u32),
        partitions: partitions.collect(),
        error: None,
        max_message_bytes: config.max_message_bytes,
        durability: config.durability.name().to_owned(),
        min_insync_replicas: topic.min_insync_replicas(),
    }
}

/// The settings in force: the partition's, which were resolved when they came into force.
fn config_of(shared: &Shared, topic: &Topic) -> Arc<TopicConfig> {
    match shared.partitions.get(&topic.id, 0) {
        Some(partition) => partition.config(),
        None => Arc::new(TopicConfig::resolve(&topic.config, &shared.config.topic_defaults).unwrap_or_default()),
    }
}

async fn create_topic(shared: &Arc<Shared>, request: wire::CreateTopic, id: CommandId) -> Answer {
    let by_hand = placement_by_hand(&request)?;
    let placed = by_hand.as_ref().and_then(|(placed, _)| u32::try_from(placed.len()).ok());
    let partitions = placed.unwrap_or_else(|| or_default(request.partitions, shared.config.default_partitions));
    let (topic_id, created_ms, validate_only) = (new_topic_id(), now_ms(), request.validate_only);
    let (broker, (tell, mut told)) = (shared.config.clone(), oneshot::channel());
    let decide = move |state: &MetadataState| {
        // The name first: whoever misspells it learns that before anything else.
        name::check(&request.name, false).map_err(Refusal::from)?;
        let changes = request.config.into_iter().map(|change| (change.name, change.value));
        let config = topic_config::change(&TopicValues::new(), changes, &broker.topic_defaults)?;
        let config = broker.topic_defaults.of_new_topic(config);
        let asked = by_hand.as_ref().map_or(request.replication_factor, |(_, replicas)| *replicas);
        let copies = placement::copies(state, asked, &broker);
        // Whoever asked may have gone.
        let _ = tell.send(copies.replication_factor);
        let create = command::CreateTopic {
            partitions: match by_hand {
                Some((placed, _)) => placed,
                None => place(state, None, (&request.name, &topic_id), partitions, copies.replication_factor)?,
            },
            name: request.name,
            topic_id: topic_id.to_wire(),
            internal: false,
            config,
            created_ms,
            default_min_insync_replicas: copies.min_insync_replicas,
        };
        Ok(Kind::CreateTopic(create).into())
    };
    let outcome = change_metadata(shared, validate_only, id, decide).await?;
    // Asked for again, it is the one that was created before.
    let topic_id = if let Outcome::TopicCreated(created) = outcome { created } else { topic_id };
    let first = |topic: &Arc<Topic>| topic.partitions.first().map(|partition| partition.replicas.len() as u32);
    let before = || shared.metadata.state().topic_by_id(&topic_id).and_then(first).unwrap_or_default();
    Ok(Response::CreateTopic(wire::CreateTopicResponse {
        topic_id: topic_id.to_wire(),
        partitions,
        // What was accepted was decided, now or before.
        replication_factor: told.try_recv().unwrap_or_else(|_| before()),
    }))
}

/// Where a person wants the partitions of a new topic, and how many replicas each of them has then.
fn placement_by_hand(request: &wire::CreateTopic) -> Result<Option<(Vec<command::Replicas>, u32)>, wire::Error> {
    let placement = &request.placement;
    let Some(first) = placement.first() else { return Ok(None) };
    if placement.len() > MAX_PARTITIONS_PER_TOPIC as usize {
        return Err(invalid(&format!("a topic has at most {MAX_PARTITIONS_PER_TOPIC} partitions")));
    }
    if let Some(other) = placement.iter().find(|other| other.brokers.len() != first.brokers.len()) {
        let (one, other) = (first.brokers.len(), other.brokers.len());
        return Err(invalid(&format!("one partition is placed on {one} brokers, and another on {other}")));
    }
    let (partitions, replicas) = (placement.len() as u32, first.brokers.len() as u32);
    for (what, asked, placed) in [
        ("partitions", request.partitions, partitions),
        ("replicas of each partition", request.replication_factor, replicas),
    ] {
        if asked != 0 && asked != placed {
            return Err(invalid(&format!("{asked} {what} are asked for, and the placement names {placed}")));
        }
    }
    let placed = placement.iter().map(|partition| command::Replicas { brokers: partition.brokers.clone() });
    Ok(Some((placed.collect(), replicas)))
}

/// The replicas of new partitions of a topic, of which there may be some.
fn place(
    state: &MetadataState,
    topic: Option<&Topic>,
    (name, topic_id): (&str, &TopicId),
    partitions: u32,
    replicas: u32,
) -> Result<Vec<command::Replicas>, MetadataError> {
    if partitions > MAX_PARTITIONS_PER_TOPIC {
        let why = format!("at most {MAX_PARTITIONS_PER_TOPIC} are allowed");
        let (topic, asked) = (name.to_owned(), partitions as usize);
        return Err(Refusal::InvalidPartitions { topic, asked, why }.into());
    }
    // The id is random: it will do for a seed.
    let seed = topic_id.as_bytes().iter().fold(0u64, |seed, byte| seed.rotate_left(8) ^ u64::from(*byte));
    placement::place(state, topic, partitions, replicas, seed)
}

async fn change_metadata(
    shared: &Shared,
    validate_only: bool,
    id: CommandId,
    decide: impl FnOnce(&MetadataState) -> Result<command::Command, MetadataError> + Send + 'static,
) -> Result<Outcome, wire::Error> {
    let outcome = match validate_only {
        true => shared.metadata.validate(decide),
        false => shared.metadata.propose_with(id.once(decide)).await,
    };
    outcome.map_err(|error| wire::Error::from(&error))
}

async fn describe_topic(shared: &Shared, request: &wire::DescribeTopic) -> Answer {
    cluster_calls::see(shared, request.stale).await?;
    let state = shared.metadata.state();
    let topic = state.topic(&request.name).ok_or_else(|| unknown_topic(&request.name))?;
    let partitions = topic.partitions.iter().zip(0u32..).map(|(partition, number)| {
        let mut described = wire::PartitionDescription {
            partition: number,
            leader: partition.leader,
            leader_epoch: partition.leader_epoch,
            replicas: partition.replicas.clone(),
            isr: partition.isr.clone(),
            log_start_offset: -1,
            high_watermark: -1,
            log_end_offset: -1,
            ..wire::PartitionDescription::default()
        };
        if let Some(handle) = shared.partitions.get(&topic.id, number) {
            let status = handle.status();
            described.log_start_offset = status.log_start_offset;
            described.high_watermark = status.high_watermark;
            described.log_end_offset = status.log_end_offset;
            described.size_bytes = status.size_bytes;
            described.fenced = handle.ended().map(|why| why.to_wire());
        }
        described
    });
    let config = topic_config::shown(&topic.config, topic.min_insync_replicas(), &shared.config.topic_defaults)
        .into_iter()
        .map(|setting| {
            let source = setting.source.name().to_owned();
            wire::ConfigEntry { name: setting.name.to_owned(), value: setting.value, source }
        });
    Ok(Response::DescribeTopic(wire::DescribeTopicResponse {
        name: topic.name.clone(),
        topic_id: topic.id.to_wire(),
        internal: topic.internal,
        partitions: partitions.collect(),
        config: config.collect(),
    }))
}

async fn alter_topic(shared: &Arc<Shared>, request: wire::AlterTopic, id: CommandId) -> Answer {
    let defaults = shared.config.topic_defaults.clone();
    let validate_only = request.validate_only;
    let decide = move |state: &MetadataState| {
        let topic = topic_to_change(state, &request.name)?;
        let changes = request.config.into_iter().map(|change| (change.name, change.value));
        let config = topic_config::change(&topic.config, changes, &defaults)?;
        Ok(Kind::AlterTopic(command::AlterTopic { topic_id: topic.id.to_wire(), config }).into())
    };
    change_metadata(shared, validate_only, id, decide).await?;
    Ok(Response::Done(Done {}))
}

async fn add_partitions(shared: &Arc<Shared>, request: wire::AddPartitions, id: CommandId) -> Answer {
    let decide = move |state: &MetadataState| {
        let topic = topic_to_change(state, &request.name)?;
        let from = topic.partitions.len() as u32;
        let Some(more) = request.partitions.checked_sub(from) else {
            let (topic, asked) = (request.name, request.partitions as usize);
            let why = format!("it has {from}, and partitions are only ever added");
            return Err(Refusal::InvalidPartitions { topic, asked, why }.into());
        };
        let replicas = topic.partitions.first().map_or(1, |partition| partition.replicas.len() as u32);
        let partitions = place(state, Some(topic), (&request.name, &topic.id), more, replicas)?;
        Ok(Kind::AddPartitions(command::AddPartitions { topic_id: topic.id.to_wire(), from, partitions }).into())
    };
    change_metadata(shared, false, id, decide).await?;
    Ok(Response::Done(Done {}))
}

async fn delete_topic(shared: &Arc<Shared>, request: wire::DeleteTopic, id: CommandId) -> Answer {
    let decide = move |state: &MetadataState| {
        let topic = topic_to_change(state, &request.name)?;
        Ok(Kind::DeleteTopic(command::DeleteTopic { topic_id: topic.id.to_wire() }).into())
    };
    change_metadata(shared, false, id, decide).await?;
    // The topic is gone. Its offsets go with it, or when the groups are read the next time.
    if let Err(error) = shared.groups.topics_changed().await {
        tracing::warn!(%error, "offsets of a deleted topic are not removed yet");
    }
    Ok(Response::Done(Done {}))
}

async fn delete_records(shared: &Shared, request: wire::DeleteRecords) -> Answer {
    let find = || {
        topic_to_change(&shared.metadata.state(), &request.topic).map_err(|error| wire::Error::from(&error))?;
        partition_of(shared, &request.topic, request.partition)
    };
    let partition = shared.look_twice(find).await?;
    let deleted = shared.partitions.delete_records(&partition, request.before_offset).await;
    let log_start_offset = deleted.map_err(|error| error.to_wire())?;
    Ok(Response::DeleteRecords(wire::DeleteRecordsResponse { log_start_offset }))
}

// ---------------------------------------------------------------- offsets of logs

async fn list_offsets(shared: &Shared, lookups: &Arc<Semaphore>, request: wire::ListOffsets) -> Response {
    // Looking for a timestamp reads the log: so many at once, as a person or a consumer of many partitions asks for.
    let answers = request.queries.into_iter().map(|query| list_offset(shared, lookups, query));
    let answers = stream::iter(answers).buffered(LOOKUPS_AT_ONCE).collect().await;
    Response::ListOffsets(wire::ListOffsetsResponse { answers })
}

async fn list_offset(shared: &Shared, lookups: &Arc<Semaphore>, query: wire::OffsetQuery) -> wire::OffsetAnswer {
    let mut answer = wire::OffsetAnswer {
        topic: query.topic,
        partition: query.partition,
        offset: -1,
        timestamp_ms: -1,
        leader_epoch: -1,
        ..wire::OffsetAnswer::default()
    };
    if let Err(error) = look_up(shared, lookups, query.at, &mut answer).await {
        answer.error = Some(error);
    }
    answer
}

async fn look_up(
    shared: &Shared,
    lookups: &Arc<Semaphore>,
    at: Option<At>,
    answer: &mut wire::OffsetAnswer,
) -> Result<(), wire::Error> {
    let partition = shared.look_twice(|| partition_of(shared, &answer.topic, answer.partition)).await?;
    let reader = partition.reader().map_err(|error| error.to_wire())?;
    let offsets = match at {
        Some(At::Earliest(_)) => partition.offsets(),
        _ => partition.settled_offsets().await.map_err(|error| shared.refusal(&partition, &error))?,
    };
    let end = offsets.high_watermark;
    answer.log_start_offset = offsets.log_start;
    answer.high_watermark = end;
    let failed = |error: ReadError| partition.read_failed(&error).to_wire();
    let found = match at {
        None => return Err(invalid("the query does not say which offset it asks for")),
        Some(At::Earliest(_)) => {
            answer.offset = offsets.log_start;
            answer.leader_epoch = reader.epoch_at(offsets.log_start).unwrap_or(-1);
            return Ok(());
        }
        Some(At::Latest(_)) => {
            answer.offset = end;
            answer.leader_epoch = partition.leader_epoch();
            return Ok(());
        }
        Some(At::LeaderEpochEnd(epoch)) => {
            if let Some((epoch, offset)) = reader.epoch_end(epoch) {
                answer.offset = offset.min(end);
                answer.leader_epoch = epoch;
            }
            return Ok(());
        }
        Some(At::TimestampMs(timestamp)) => {
            walk_log(shared, lookups, move || reader.offset_for_timestamp(timestamp, end)).await?.map_err(failed)?
        }
        Some(At::MaxTimestamp(_)) => {
            walk_log(shared, lookups, move || reader.offset_for_max_timestamp(end)).await?.map_err(failed)?
        }
    };
    if let Some(found) = found {
        answer.offset = found.offset;
        answer.timestamp_ms = found.timestamp;
        answer.leader_epoch = found.leader_epoch;
    }
    Ok(())
}

/// Runs a lookup where commits do not wait for it. Its turn lasts as long as the work, even where the call is given up.
async fn walk_log<T: Send + 'static>(
    shared: &Shared,
    lookups: &Arc<Semaphore>,
    lookup: impl FnOnce() -> T + Send + 'static,
) -> Result<T, wire::Error> {
    let turn = Arc::clone(lookups).acquire_owned().await.map_err(|_| PartitionError::ShuttingDown.to_wire())?;
    let job = move || {
        let found = lookup();
        drop(turn);
        found
    };
    Ok(shared.pool.run_long(job).await)
}

// ---------------------------------------------------------------- producers

async fn allocate_producer_id(shared: &Shared, request: &wire::AllocateProducerId) -> Answer {
    let (metadata, broker_id) = (&shared.metadata, shared.broker_id());
    let given = match request.producer_id {
        Some(producer_id) => metadata.next_producer_epoch(broker_id, producer_id, request.producer_epoch).await,
        None => metadata.next_producer_id(broker_id).await.map(|producer_id| (producer_id, 0)),
    };
    let (producer_id, producer_epoch) = given.map_err(|error| wire::Error::from(&error))?;
    let producer_epoch = i32::from(producer_epoch);
    Ok(Response::AllocateProducerId(wire::AllocateProducerIdResponse { producer_id, producer_epoch }))
}

// ---------------------------------------------------------------- groups

async fn commit_offsets(shared: &Shared, request: wire::CommitOffsets) -> Answer {
    let is_known = |entry: &wire::OffsetEntry| is_known(&shared.metadata.state(), entry);
    if !request.offsets.iter().all(is_known) {
        // Another broker may know more of it than this one does yet.
        cluster_calls::see(shared, false).await?;
    }
    let state = shared.metadata.state();
    let entries = request.offsets.into_iter().map(|entry| to_commit(entry, &state)).collect::<Result<Vec<_>, _>>()?;
    let (group, speaker) = (request.group, speaker(request.member_id, request.member_epoch));
    let results = shared.groups.commit(&group, speaker, entries).await;
    let results = results.map_err(|error| shared.group_refusal(&group, &error))?;
    let results = results.into_iter().map(|result| match result {
        Ok(()) => wire::Error::default(),
        Err(error) => wire::Error::new(error.code(), error.to_string()),
    });
    Ok(Response::CommitOffsets(wire::CommitOffsetsResponse { results: results.collect() }))
}

/// Whether the metadata known here have the partition.
fn is_known(state: &MetadataState, entry: &wire::OffsetEntry) -> bool {
    let by_id = TopicId::from_slice(&entry.topic_id).map(|id| state.topic_by_id(&id));
    let topic = by_id.unwrap_or_else(|| state.topic(&entry.topic));
    topic.is_some_and(|topic| (entry.partition as usize) < topic.partitions.len())
}

fn to_commit(entry: wire::OffsetEntry, state: &MetadataState) -> Result<CommitEntry, wire::Error> {
    let topic_id = match entry.topic_id.is_empty() {
        true => TopicId::ZERO,
        false => parse_topic_id(&entry.topic_id)?,
    };
    // A topic may be named by its id alone.
    let topic = match entry.topic.is_empty() {
        true => state.topic_by_id(&topic_id).map(|topic| topic.name.clone()).unwrap_or_default(),
        false => entry.topic,
    };
    Ok(CommitEntry {
        topic,
        topic_id,
        partition: entry.partition,
        offset: entry.offset,
        leader_epoch: entry.leader_epoch,
        metadata: entry.metadata,
    })
}

async fn fetch_offsets(shared: &Shared, request: wire::FetchOffsets) -> Answer {
    know_groups(shared).await?;
    let by_id = |topic: &wire::TopicPartitions| TopicId::from_slice(&topic.topic_id);
    let is_known = |id: TopicId| shared.metadata.state().topic_by_id(&id).is_some();
    if !request.partitions.iter().filter_map(by_id).all(is_known) {
        cluster_calls::look_again(shared).await?;
    }
    let speaker = speaker(request.member_id, request.member_epoch);
    let committed = shared.groups.offsets(&request.group, speaker).await;
    let committed = committed.map_err(|error| shared.group_refusal(&request.group, &error))?;
    let state = shared.metadata.state();
    let mut wanted: BTreeSet<(&str, u32)> = BTreeSet::new();
    for topic in &request.partitions {
        let name = match TopicId::from_slice(&topic.topic_id).and_then(|id| state.topic_by_id(&id)) {
            Some(found) => found.name.as_str(),
            None => topic.topic.as_str(),
        };
        wanted.extend(topic.partitions.iter().map(|partition| (name, *partition)));
    }
    let all = request.partitions.is_empty();
    let offsets = committed
        .into_iter()
        .filter(|(topic, partition, _)| all || wanted.contains(&(topic.as_str(), *partition)))
        .map(|(topic, partition, committed)| wire::CommittedOffset {
            topic_id: state.topic(&topic).map(|topic| topic.id.to_wire()).unwrap_or_default(),
            topic,
            partition,
            offset: committed.offset,
            leader_epoch: committed.leader_epoch,
            metadata: committed.metadata,
            commit_time_ms: committed.commit_time_ms,
        });
    Ok(Response::FetchOffsets(wire::FetchOffsetsResponse { offsets: offsets.collect() }))
}

/// Who coordinates, as far as this broker knows. Whoever is named may know better, and say so.
async fn find_coordinator(shared: &Shared, request: &wire::FindCoordinator) -> Answer {
    let group = (!request.group.is_empty()).then_some(request.group.as_str());
    if group.is_none() {
        know_groups(shared).await?;
    }
    let found = shared.groups.find(group).await.map_err(|error| shared.group_refusal(&request.group, &error))?;
    let state = shared.metadata.state();
    let coordinators = found.into_iter().map(|found| wire::Coordinator {
        partition: found.partition,
        broker_id: found.broker_id,
        address: shared.address_of(&state, found.broker_id).unwrap_or_default(),
        leader_epoch: found.leader_epoch,
    });
    Ok(Response::FindCoordinator(wire::FindCoordinatorResponse { coordinators: coordinators.collect() }))
}

async fn list_groups(shared: &Shared, request: &wire::ListGroups) -> Answer {
    know_groups(shared).await?;
    let listed = shared.groups.list(&request.partitions).await.map_err(|error| wire::Error::from(&error))?;
    let groups = listed.into_iter().map(|group| wire::GroupListing {
        group: group.group,
        state: group.state.to_owned(),
        members: u32::try_from(group.members).unwrap_or(u32::MAX),
        assignor: group.assignor.to_owned(),
    });
    Ok(Response::ListGroups(wire::ListGroupsResponse { groups: groups.collect() }))
}

/// Before anybody hears that there are no groups: the topic that they are kept in may have been made elsewhere.
async fn know_groups(shared: &Shared) -> Result<(), wire::Error> {
    match shared.metadata.state().topic(OFFSETS_TOPIC) {
        Some(_) => Ok(()),
        None => cluster_calls::look_again(shared).await,
    }
}

async fn delete_group(shared: &Shared, group: &str) -> Answer {
    know_groups(shared).await?;
    done(shared, group, shared.groups.delete(group).await)
}

async fn describe_group(shared: &Shared, name: &str) -> Answer {
    know_groups(shared).await?;
    let group = shared.groups.describe(name).await.map_err(|error| shared.group_refusal(name, &error))?;
    let state = shared.metadata.state();
    let members = group.members().iter().map(|(id, member)| wire::MemberDescription {
        member_id: id.clone(),
        instance_id: member.instance_id.clone().unwrap_or_default(),
        client_id: member.client_id.clone(),
        client_host: member.client_host.clone(),
        member_epoch: member.epoch,
        assigned: to_topic_partitions(&member.assigned, &state),
        target: group.target(id).map(|target| to_topic_partitions(target, &state)).unwrap_or_default(),
        topics: member.topics.iter().cloned().collect(),
    });
    Ok(Response::DescribeGroup(wire::DescribeGroupResponse {
        group: group.name().to_owned(),
        state: group.phase().name().to_owned(),
        epoch: group.epoch(),
        assignor: group.assignor().name().to_owned(),
        members: members.collect(),
        offsets: group_offsets(shared, &group, &state),
    }))
}

/// What the group committed, and what its members read without a commit so far.
fn group_offsets(shared: &Shared, group: &Group, state: &MetadataState) -> Vec<wire::GroupOffset> {
    let mut partitions: BTreeSet<(String, u32)> =
        group.offsets().map(|(topic, partition, _)| (topic.to_owned(), partition)).collect();
    for (topic, partition) in group.members().values().flat_map(|member| &member.assigned) {
        if let Some(topic) = state.topic_by_id(topic) {
            partitions.insert((topic.name.clone(), *partition));
        }
    }
    let described = partitions.into_iter().map(|(topic, partition)| {
        let committed = group.offset(&topic, partition);
        let handle = state.topic(&topic).and_then(|topic| shared.partitions.get(&topic.id, partition));
        let (log_start_offset, high_watermark) = match handle.map(|handle| handle.offsets()) {
            Some(offsets) => (offsets.log_start, offsets.high_watermark),
            None => (-1, -1),
        };
        // Without a commit everything in the log is still to be read.
        let read_to = committed.map_or(log_start_offset, |committed| committed.offset);
        wire::GroupOffset {
            topic,
            partition,
            committed: committed.map_or(-1, |committed| committed.offset),
            log_start_offset,
            high_watermark,
            lag: if high_watermark == -1 { -1 } else { (high_watermark - read_to).max(0) },
            leader_epoch: committed.map_or(-1, |committed| committed.leader_epoch),
            metadata: committed.map(|committed| committed.metadata.clone()).unwrap_or_default(),
        }
    });
    described.collect()
}

fn speaker(member_id: String, epoch: i32) -> OwnedSpeaker {
    match member_id.is_empty() {
        true => OwnedSpeaker::Administrator,
        false => OwnedSpeaker::Member { id: member_id, epoch },
    }
}

// ---------------------------------------------------------------- small parts

fn partition_of(shared: &Shared, topic: &str, partition: u32) -> Result<PartitionHandle, wire::Error> {
    let state = shared.metadata.state();
    let found = state.topic(topic).ok_or_else(|| unknown_topic(topic))?;
    shared.partition(found.id.as_bytes(), partition)
}

/// A topic or partition that is not there has no offsets: one that was mistyped must not look like work done.
async fn delete_offsets(shared: &Shared, request: wire::DeleteOffsets) -> Answer {
    cluster_calls::see(shared, false).await?;
    let count = match shared.metadata.state().topic(&request.topic) {
        Some(topic) => topic.partitions.len(),
        None => return Err(unknown_topic(&request.topic)),
    };
    if let Some(&partition) = request.partitions.iter().find(|partition| **partition as usize >= count) {
        let error = EntryError::UnknownPartition { topic: request.topic, partition, count };
        return Err(wire::Error::new(error.code(), error.to_string()));
    }
    let deleted = shared.groups.delete_offsets(&request.group, request.topic, request.partitions).await;
    done(shared, &request.group, deleted)
}

fn done(shared: &Shared, group: &str, result: Result<(), GroupError>) -> Answer {
    result.map(|()| Response::Done(Done {})).map_err(|error| shared.group_refusal(group, &error))
}

fn or_default(asked: u32, default: u32) -> u32 {
    if asked == 0 { default } else { asked }
}

fn parse_topic_id(bytes: &[u8]) -> Result<TopicId, wire::Error> {
    TopicId::from_slice(bytes).ok_or_else(|| invalid(&format!("a topic id has 16 bytes, not {}", bytes.len())))
}

fn invalid(why: &str) -> wire::Error {
    wire::Error::new(ErrorCode::InvalidRequest, why)
}

fn unknown_topic(name: &str) -> wire::Error {
    wire::Error::new(ErrorCode::UnknownTopic, format!("there is no topic {name}"))
}

fn unknown_topic_id(id: &TopicId) -> wire::Error {
    wire::Error::new(ErrorCode::UnknownTopicId, format!("no topic has the id {id}: it was deleted"))
}
