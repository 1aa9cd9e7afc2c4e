//! The stable error codes of the protocol.
//!
//! Owns: each code's number, name and whether trying again can help. Refuses: sentences (whoever refuses writes one).
//! Read next: the `Error` message in `schema/common.proto`.

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal, retry $retry:literal;)*) => {
        /// What kind of refusal an answer carries. Numbers never change their meaning; an unknown one is [`ErrorCode::Unknown`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode { $($(#[$doc])* $name,)* }

        impl ErrorCode {
            /// Every code, in the order of their numbers.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)*];

            /// The number on the wire.
            pub const fn number(self) -> u32 { match self { $(ErrorCode::$name => $number,)* } }

            /// The code with this number.
            pub const fn from_number(number: u32) -> ErrorCode { match number { $($number => ErrorCode::$name,)* _ => ErrorCode::Unknown } }

            /// The code's stable name, for logs, metrics and JSON.
            pub const fn name(self) -> &'static str { match self { $(ErrorCode::$name => $text,)* } }

            /// Whether the same request may succeed later without anybody changing anything.
            pub const fn retryable(self) -> bool { match self { $(ErrorCode::$name => $retry,)* } }
        }
    };
}

codes! {
    /// A code that this build does not know.
    Unknown = 0, "unknown", retry false;
    /// A defect of the broker.
    Internal = 1, "internal", retry false;
    /// The message makes no sense: a missing part, a value out of its range, a wrong order.
    InvalidRequest = 2, "invalid_request", retry false;
    /// No version in common, or a feature that this broker does not have.
    UnsupportedVersion = 3, "unsupported_version", retry false;
    /// The broker could not answer within the deadline. The request may still take effect.
    TimedOut = 4, "timed_out", retry true;
    /// A bounded queue or budget is full.
    Overloaded = 5, "overloaded", retry true;
    /// The broker is going away.
    ShuttingDown = 6, "shutting_down", retry true;
    /// A limit of the connection, the frame or the request was passed.
    LimitExceeded = 7, "limit_exceeded", retry false;
    /// The connection's cluster is not the one the client knows.
    WrongCluster = 8, "wrong_cluster", retry false;
    /// A peer sent more than the credit it had.
    CreditExceeded = 9, "credit_exceeded", retry false;

    /// No topic of that name.
    UnknownTopic = 10, "unknown_topic", retry false;
    /// No topic with that id: deleted, or deleted and created anew.
    UnknownTopicId = 11, "unknown_topic_id", retry false;
    /// The topic has no such partition.
    UnknownPartition = 12, "unknown_partition", retry false;
    /// A topic of that name exists.
    TopicExists = 13, "topic_exists", retry false;
    /// The topic's name is not allowed.
    InvalidTopic = 14, "invalid_topic", retry false;
    /// An unknown configuration key or a senseless value.
    InvalidConfig = 15, "invalid_config", retry false;
    /// A senseless number of partitions.
    InvalidPartitions = 16, "invalid_partitions", retry false;
    /// More replicas than there are brokers.
    InvalidReplicationFactor = 17, "invalid_replication_factor", retry false;

    /// This broker hears nothing of the metadata quorum: what it knows may be old, and it can change nothing. Another one may.
    OutOfTouch = 18, "out_of_touch", retry true;

    /// The disk of a member of the metadata quorum is an older copy than the one that registered.
    OlderDisk = 19, "older_disk", retry false;

    /// This broker does not lead the partition; the error may carry a hint who does.
    NotLeader = 20, "not_leader", retry true;
    /// The client's leader epoch is older than the partition's.
    FencedLeaderEpoch = 21, "fenced_leader_epoch", retry true;
    /// The client's leader epoch is newer than the broker knows.
    UnknownLeaderEpoch = 22, "unknown_leader_epoch", retry true;
    /// The offset lies outside the log.
    OffsetOutOfRange = 23, "offset_out_of_range", retry false;
    /// The log was cut below the client's position: records it saw are gone.
    LogTruncated = 24, "log_truncated", retry false;
    /// The partition is not served: damage or a failed disk.
    PartitionFenced = 25, "partition_fenced", retry false;
    /// No room on the disk; appends succeed again once there is.
    DiskFull = 26, "disk_full", retry true;
    /// Fewer in-sync replicas than `min.insync.replicas`.
    NotEnoughReplicas = 27, "not_enough_replicas", retry true;

    /// Another member of the metadata quorum is here than the one that was meant.
    WrongMember = 28, "wrong_member", retry true;
    /// The change would leave the metadata quorum without a majority that answers.
    LosesQuorum = 29, "loses_quorum", retry false;

    /// A batch whose checksum or form is wrong.
    CorruptBatch = 30, "corrupt_batch", retry false;
    /// A batch whose records break a rule of the topic.
    InvalidRecord = 31, "invalid_record", retry false;
    /// A batch larger than `max.message.bytes`.
    MessageTooLarge = 32, "message_too_large", retry false;
    /// A compression codec that the broker does not take.
    UnsupportedCompression = 33, "unsupported_compression", retry false;
    /// A timestamp outside the topic's bounds.
    InvalidTimestamp = 34, "invalid_timestamp", retry false;

    /// A gap in the producer's sequence.
    OutOfOrderSequence = 40, "out_of_order_sequence", retry false;
    /// A newer producer has taken this producer id.
    InvalidProducerEpoch = 41, "invalid_producer_epoch", retry false;
    /// The log knows nothing of this producer, and the sequence does not begin at 0.
    UnknownProducerId = 42, "unknown_producer_id", retry false;
    /// A duplicate of a batch too old to be remembered.
    DuplicateSequence = 43, "duplicate_sequence", retry false;
    /// An earlier append of this stream failed; everything later is refused until it is opened again.
    EarlierAppendFailed = 44, "earlier_append_failed", retry true;

    /// The coordinator is not ready.
    CoordinatorLoading = 50, "coordinator_loading", retry true;
    /// Another broker coordinates this group.
    NotCoordinator = 51, "not_coordinator", retry true;
    /// No such group.
    GroupNotFound = 52, "group_not_found", retry false;
    /// The group's name is not allowed.
    InvalidGroup = 53, "invalid_group", retry false;
    /// The group has no such member: it was fenced, or it left.
    UnknownMember = 54, "unknown_member", retry false;
    /// The member's epoch is not the one the coordinator knows.
    FencedMemberEpoch = 55, "fenced_member_epoch", retry false;
    /// The member's epoch is behind: it must take its newest assignment first.
    StaleMemberEpoch = 56, "stale_member_epoch", retry true;
    /// Another live member has this instance id.
    UnreleasedInstanceId = 57, "unreleased_instance_id", retry false;
    /// Another member has taken this instance id over.
    FencedInstanceId = 58, "fenced_instance_id", retry false;
    /// The group has members, and what was asked needs an empty one.
    GroupNotEmpty = 59, "group_not_empty", retry false;
    /// No such assignor.
    UnsupportedAssignor = 60, "unsupported_assignor", retry false;
    /// The commit's metadata is too long.
    OffsetMetadataTooLarge = 61, "offset_metadata_too_large", retry false;
    /// The group is full.
    GroupFull = 62, "group_full", retry false;

    /// The connection's certificate is nobody's in this cluster.
    AuthenticationFailed = 70, "authentication_failed", retry false;
    /// What only a broker of the cluster may do, or only a certain one.
    ClusterAuthorizationFailed = 71, "cluster_authorization_failed", retry false;

    /// The broker keeps no replica of the partition in this incarnation, as far as is known here.
    UnknownReplica = 80, "unknown_replica", retry true;
    /// The follower has said a newer hello.
    StaleReplica = 81, "stale_replica", retry true;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The codes with which a peer resets or stops a stream, or closes a connection (QUIC application error codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ResetCode {
    /// The sender is done; nothing is wrong.
    Done = 0,
    /// The peer broke the protocol.
    Protocol = 1,
    /// A deadline passed.
    Deadline = 2,
    /// A limit was passed.
    Limit = 3,
    /// The broker is going away.
    ShuttingDown = 4,
    /// The reader is no longer interested.
    Cancelled = 5,
}

impl ResetCode {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::ErrorCode;

    #[test]
    fn numbers_come_back_and_none_is_used_twice() {
        let mut seen = std::collections::HashSet::new();
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_number(code.number()), code);
            assert!(seen.insert(code.number()), "{code} shares its number");
            assert!(seen.len() <= ErrorCode::ALL.len());
        }
        assert_eq!(ErrorCode::from_number(9999), ErrorCode::Unknown);
    }
}
