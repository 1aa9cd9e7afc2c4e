//! The ceilings of the protocol. A length that a peer names is compared with one of these before anything is allocated.
//!
//! Owns: constants and the relations between them, asserted at compile time. Refuses: settings (each component has a
//! configuration of its own, bounded by these). Read next: [`crate::frame`].

/// The application protocol named in the TLS handshake.
pub const ALPN: &[u8] = b"headwater/1";
/// Version of the protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Bytes of the two lengths in front of every frame.
pub const FRAME_PREFIX_BYTES: usize = 8;
/// Largest header (one protobuf message) of a frame, in bytes.
pub const MAX_FRAME_HEADER_BYTES: usize = 4 << 20;
/// Largest first frame of a stream, in bytes: read before the peer is known to be anybody.
pub const MAX_OPEN_FRAME_BYTES: usize = 1 << 20;
/// Largest payload of a frame, in bytes.
pub const MAX_FRAME_PAYLOAD_BYTES: usize = 64 << 20;
/// Largest frame between members of the metadata quorum, in bytes: some entries of its log, or a part of a snapshot.
pub const MAX_RAFT_FRAME_BYTES: usize = 64 << 20;
/// Largest metadata command that is sent to another member, in bytes.
pub const MAX_COMMAND_BYTES: usize = 32 << 20;
/// Largest header of a frame on a replica stream after the first, in bytes.
pub const MAX_REPLICA_HEADER_BYTES: usize = 16 << 10;
/// Largest payload of a frame on a replica stream, in bytes: a part of the log, in which a batch need not be whole.
pub const MAX_REPLICA_PAYLOAD_BYTES: usize = 1 << 20;
/// Most leader epochs that a follower tells of its log: the newest. What is older counts as unknown to it.
pub const MAX_REPLICA_EPOCHS: usize = 32 << 10;
/// Most bytes of one of them on the wire.
const REPLICA_EPOCH_BYTES: usize = 2 + 11 + 11;
/// Largest record batch anywhere, in bytes: the ceiling of `max.message.bytes`.
pub const MAX_BATCH_BYTES: usize = 64 << 20;
/// Largest size that one batch may have once decompressed, in bytes.
pub const MAX_DECOMPRESSED_BATCH_BYTES: usize = 256 << 20;
/// Most records in one batch.
pub const MAX_RECORDS_PER_BATCH: usize = 1 << 24;
/// Most headers of one record.
pub const MAX_HEADERS_PER_RECORD: usize = 1 << 16;

/// Longest topic name, in bytes (Kafka's rule: it must fit a directory name with its partition).
pub const MAX_TOPIC_NAME_BYTES: usize = 249;
/// Most partitions of one topic.
pub const MAX_PARTITIONS_PER_TOPIC: u32 = 100_000;
/// Longest group, member and instance identity, in bytes.
pub const MAX_GROUP_NAME_BYTES: usize = 255;
/// Longest free text that a commit may carry, in bytes (Kafka's `offset.metadata.max.bytes`).
pub const MAX_OFFSET_METADATA_BYTES: usize = 4096;
/// Most batches of one producer and partition that may be unacknowledged (Kafka's rule; the broker remembers five).
pub const MAX_IN_FLIGHT_BATCHES: usize = 5;

const _: () = assert!(MAX_BATCH_BYTES <= MAX_FRAME_PAYLOAD_BYTES);
const _: () = assert!(MAX_REPLICA_EPOCHS * REPLICA_EPOCH_BYTES + 1024 < MAX_OPEN_FRAME_BYTES);
const _: () = assert!(MAX_REPLICA_PAYLOAD_BYTES <= MAX_FRAME_PAYLOAD_BYTES);
const _: () = assert!(MAX_COMMAND_BYTES < MAX_RAFT_FRAME_BYTES);
const _: () = assert!(MAX_OPEN_FRAME_BYTES <= MAX_FRAME_HEADER_BYTES);
const _: () = assert!(MAX_DECOMPRESSED_BATCH_BYTES >= MAX_BATCH_BYTES);
const _: () = assert!(MAX_FRAME_HEADER_BYTES + MAX_FRAME_PAYLOAD_BYTES < u32::MAX as usize);
