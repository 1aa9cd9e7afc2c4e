//! Why a group refuses: one enum, each with its wire code.

use super::assign::UnknownAssignor;
use headwater_proto::ErrorCode;

/// Why a group refuses what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// The name is empty or too long.
    #[error("a group's name has from 1 to {max} bytes; this one has {len}", max = headwater_proto::limits::MAX_GROUP_NAME_BYTES)]
    InvalidName {
        /// Its length in bytes.
        len: usize,
    },
    /// A member's identity is empty or too long.
    #[error("a {what} has from 1 to {max} bytes; this one has {len}", max = headwater_proto::limits::MAX_GROUP_NAME_BYTES)]
    InvalidIdentity {
        /// Which identity.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// A timeout outside the broker's bounds.
    #[error("a session timeout of {asked} ms is outside of what this broker allows, {min} to {max} ms")]
    InvalidSessionTimeout {
        /// What was asked for.
        asked: u32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// Nothing is known of the group.
    #[error("there is no group {0}")]
    NotFound(String),
    /// The group has no such member.
    #[error("group {group} has no member {member}: it left, or was fenced; join again as a new member")]
    UnknownMember {
        /// The group.
        group: String,
        /// The member.
        member: String,
    },
    /// The member was put out of the group.
    #[error("member {member} of group {group} was fenced: {why}; join again as a new member")]
    Fenced {
        /// The group.
        group: String,
        /// The member.
        member: String,
        /// What it did or did not do.
        why: &'static str,
    },
    /// The member names an epoch that the coordinator never gave it.
    #[error(
        "member {member} names epoch {named}, which it was never given (it has {current}); join again as a new member"
    )]
    FencedEpoch {
        /// The member.
        member: String,
        /// The epoch it named.
        named: i32,
        /// The epoch it has.
        current: i32,
    },
    /// Another broker has the group.
    #[error("another broker coordinates group {0}")]
    NotCoordinator(String),
    /// This broker coordinates the groups no more.
    #[error("another broker coordinates the group by now")]
    Moved,
    /// Nobody has confirmed that this broker coordinates still.
    #[error("this broker has not heard from the metadata quorum: another one may coordinate the group by now")]
    Unconfirmed,
    /// There is nothing yet to keep groups in.
    #[error("group {group} has no coordinator yet: {why}")]
    Unavailable {
        /// The group.
        group: String,
        /// What is missing.
        why: String,
    },
    /// The member's epoch is behind.
    #[error("member {member} names epoch {named} and has {current} by now: take the newest assignment first")]
    StaleEpoch {
        /// The member.
        member: String,
        /// The epoch it named.
        named: i32,
        /// The epoch it has.
        current: i32,
    },
    /// The instance id belongs to a member that is alive.
    #[error(
        "instance id {instance} belongs to member {holder}, heard from {heard_ms_ago} ms ago: two members cannot share it"
    )]
    UnreleasedInstance {
        /// The instance id.
        instance: String,
        /// Who has it.
        holder: String,
        /// How long ago it was heard from.
        heard_ms_ago: u64,
        /// It counts as silent, and may be replaced, unless it is heard from within this time.
        silent_in_ms: u64,
    },
    /// Somebody took the instance id over.
    #[error("instance id {instance} was taken over by member {holder}")]
    FencedInstance {
        /// The instance id.
        instance: String,
        /// Who has it now.
        holder: String,
    },
    /// A member comes back under another instance id.
    #[error("member {member} cannot change its instance id: join as a new member")]
    InstanceChanged {
        /// The member.
        member: String,
    },
    /// What was asked needs a group without members.
    #[error("group {group} has {members} members: {needs}")]
    NotEmpty {
        /// The group.
        group: String,
        /// How many.
        members: usize,
        /// What must be done first.
        needs: &'static str,
    },
    /// No such assignor.
    #[error(transparent)]
    Assignor(#[from] UnknownAssignor),
    /// The group is full.
    #[error("group {group} has {members} members, the most this broker allows")]
    Full {
        /// The group.
        group: String,
        /// How many.
        members: usize,
    },
    /// The groups of this part of the offsets topic are being read.
    #[error("the coordinator of group {0} is loading")]
    Loading(String),
    /// The group's record could not be kept.
    #[error("the offsets topic did not take the record: {reason}")]
    NotKept {
        /// The partition's error code.
        code: ErrorCode,
        /// What the partition said.
        reason: String,
    },
    /// The broker is going away.
    #[error("the broker is shutting down")]
    ShuttingDown,
}

impl GroupError {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            GroupError::InvalidName { .. } => ErrorCode::InvalidGroup,
            GroupError::InvalidIdentity { .. }
            | GroupError::InvalidSessionTimeout { .. }
            | GroupError::InstanceChanged { .. } => ErrorCode::InvalidRequest,
            GroupError::NotFound(_) => ErrorCode::GroupNotFound,
            GroupError::UnknownMember { .. } => ErrorCode::UnknownMember,
            GroupError::Fenced { .. } | GroupError::FencedEpoch { .. } => ErrorCode::FencedMemberEpoch,
            GroupError::StaleEpoch { .. } => ErrorCode::StaleMemberEpoch,
            GroupError::UnreleasedInstance { .. } => ErrorCode::UnreleasedInstanceId,
            GroupError::FencedInstance { .. } => ErrorCode::FencedInstanceId,
            GroupError::NotEmpty { .. } => ErrorCode::GroupNotEmpty,
            GroupError::Assignor(_) => ErrorCode::UnsupportedAssignor,
            GroupError::Full { .. } => ErrorCode::GroupFull,
            GroupError::Loading(_) | GroupError::Unavailable { .. } => ErrorCode::CoordinatorLoading,
            GroupError::NotKept { code, .. } => *code,
            GroupError::NotCoordinator(_) | GroupError::Moved | GroupError::Unconfirmed => ErrorCode::NotCoordinator,
            GroupError::ShuttingDown => ErrorCode::ShuttingDown,
        }
    }
}

impl From<&GroupError> for headwater_proto::wire::Error {
    fn from(error: &GroupError) -> Self {
        headwater_proto::wire::Error::new(error.code(), error.to_string())
    }
}
